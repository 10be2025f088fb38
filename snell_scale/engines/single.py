"""One device, one process: CPU or one GPU, in fp32 or mixed precision."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.optim import Optimizer

from snell_scale.config import StrictModel
from snell_scale.interfaces import Batch

_AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class SingleConfig(StrictModel):
    """One process on one device (CPU or one GPU)."""

    name: Literal["single"] = "single"
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto: cuda if there is one.")
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        default="fp32", description="Autocast; fp16 scales the loss."
    )
    frozen_dtype: Literal["fp32", "bf16"] = Field(default="fp32", description="What frozen weights are kept in.")

    cpu_threads: int | None = Field(
        default=None, gt=0, description="torch's CPU threads; null: as torch chooses. Small models like 1."
    )

    @model_validator(mode="after")
    def _check(self) -> "SingleConfig":
        if self.precision == "fp16" and self.frozen_dtype == "bf16":
            raise ValueError("frozen_dtype=bf16 does not go with precision=fp16; use precision=bf16")
        return self

    def check(self) -> None:
        """ValueError where this machine cannot do what the config asks."""
        if not self.device.startswith("cuda"):
            return
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = int(self.device.partition(":")[2] or 0)
        if index >= count:
            raise ValueError(
                f"engine.device is {self.device!r}, but this machine shows {count} CUDA device(s); "
                "use engine.device=auto or cpu"
            )

    def build(self) -> "SingleEngine":
        self.check()
        if self.cpu_threads is not None:
            torch.set_num_threads(self.cpu_threads)
        device = self.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        return SingleEngine(torch.device(device), precision=self.precision, frozen_dtype=self.frozen_dtype)


class SingleEngine:
    """See `interfaces.Engine`."""

    rank = 0
    world_size = 1

    def __init__(self, device: torch.device, *, precision: str, frozen_dtype: str) -> None:
        self.device = device
        self._autocast_dtype = _AUTOCAST_DTYPES.get(precision)
        self._frozen_dtype = torch.bfloat16 if frozen_dtype == "bf16" else torch.float32
        self._scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self._optimizer: Optimizer | None = None

    @property
    def optimizer(self) -> Optimizer:
        assert self._optimizer is not None, "setup() comes first"
        return self._optimizer

    @property
    def skips_steps(self) -> bool:
        """Whether a non-finite gradient is an expected event that the loss scaler answers by skipping."""
        return self._scaler.is_enabled()

    def setup(self, module: nn.Module, make_optimizer: Callable[[nn.Module], Optimizer]) -> nn.Module:
        module.to(self.device)
        if self._frozen_dtype is not torch.float32:
            for parameter in module.parameters():
                if not parameter.requires_grad and parameter.is_floating_point():
                    parameter.data = parameter.data.to(self._frozen_dtype)
        self._optimizer = make_optimizer(module)
        return module

    def autocast(self) -> AbstractContextManager[Any]:
        if self._autocast_dtype is None and self._frozen_dtype is torch.float32:
            return nullcontext()
        # bf16 weights beside fp32 activations need autocast too: it reconciles the two in every product.
        return torch.autocast(self.device.type, dtype=self._autocast_dtype or self._frozen_dtype)

    def backward(self, loss: Tensor) -> None:
        self._scaler.scale(loss).backward()

    def step(self, *, clip_grad_norm: float | None) -> Tensor:
        self._scaler.unscale_(self.optimizer)
        norms = torch.stack([self._group_norm(group["params"]) for group in self.optimizer.param_groups])
        if clip_grad_norm is not None:
            total = torch.linalg.vector_norm(norms)
            for group in self.optimizer.param_groups:
                torch.nn.utils.clip_grads_with_norm_(group["params"], clip_grad_norm, total)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        return norms

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def sum(self, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(sums)

    def move(self, batch: Batch) -> Batch:
        return {key: tensor.to(self.device, non_blocking=True) for key, tensor in batch.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict(), "scaler": self._scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])

    def _group_norm(self, parameters: list[nn.Parameter]) -> Tensor:
        gradients = [p.grad for p in parameters if p.grad is not None]
        if not gradients:
            return torch.zeros((), device=self.device)
        return torch.nn.utils.get_total_norm(gradients).float()
