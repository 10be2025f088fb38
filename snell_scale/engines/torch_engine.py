"""What torch's own engines share: precision, backward, clipping, sums over ranks, state by parameter name."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.optim import Optimizer

from snell_scale.config import Config, StrictModel
from snell_scale.engines.batch_statistics import average_over_ranks, trained_statistics
from snell_scale.engines.ranks import Ranks
from snell_scale.engines.shards import read_shards, shard_writer
from snell_scale.interfaces import Batch, ShardWriter, StepPlan

_AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class EngineConfig(StrictModel):
    """What every engine lets one choose, so that changing `engine.name` alone changes the engine."""

    name: str
    device: str = Field(
        default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto: cuda if there is one."
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        default="fp32", description="Autocast; fp16 scales the loss."
    )
    frozen_dtype: Literal["fp32", "bf16"] = Field(default="fp32", description="What frozen weights are kept in.")
    cpu_threads: int | None = Field(
        default=None, gt=0, description="torch's CPU threads; null: as torch chooses. Small models like 1."
    )
    timeout_seconds: float = Field(
        default=600.0, gt=0, description="A rank without progress for so long ends the job (several ranks only)."
    )

    @model_validator(mode="after")
    def _check_dtypes(self) -> "EngineConfig":
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

    def check_run(self, config: Config) -> None:
        """ValueError where the rest of the config asks for what this engine cannot do."""
        return None

    def check_module(self, module: nn.Module) -> None:
        """ValueError where this engine cannot keep the module that is to be trained."""
        return None

    def device_of(self, ranks: Ranks) -> torch.device:
        """Where this rank computes: of several GPUs the one of its number on this machine."""
        uses_cuda = self.device.startswith("cuda") or (self.device == "auto" and torch.cuda.is_available())
        if not uses_cuda:
            return torch.device("cpu")
        if ranks.group is None:
            return torch.device("cuda" if self.device == "auto" else self.device)
        device = torch.device("cuda", ranks.local_rank)
        torch.cuda.set_device(device)
        return device

    def set_threads(self) -> None:
        if self.cpu_threads is not None:
            torch.set_num_threads(self.cpu_threads)


class TorchEngine:
    """See `interfaces.Engine`. As it stands: parameters whole on every rank, no gradient travels."""

    def __init__(self, config: EngineConfig, ranks: Ranks) -> None:
        config.set_threads()
        self.ranks = ranks
        self._name = config.name
        self.device = config.device_of(ranks)
        self._autocast_dtype = _AUTOCAST_DTYPES.get(config.precision)
        self._frozen_dtype = torch.bfloat16 if config.frozen_dtype == "bf16" else torch.float32
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        self._clip_grad_norm: float | None = None
        self._module: nn.Module | None = None
        self._optimizer: Optimizer | None = None
        self._statistics: list[Tensor] = []

    @property
    def module(self) -> nn.Module:
        assert self._module is not None, "setup() comes first"
        return self._module

    @property
    def optimizer(self) -> Optimizer:
        assert self._optimizer is not None, "setup() comes first"
        return self._optimizer

    @property
    def norm_names(self) -> tuple[str, ...]:
        return tuple(str(group["group_name"]) for group in self.optimizer.param_groups)

    @property
    def skips_steps(self) -> bool:
        """Whether a non-finite gradient is an expected event that the loss scaler answers by skipping."""
        return self._scaler.is_enabled()

    def setup(
        self,
        module: nn.Module,
        make_optimizer: Callable[[nn.Module], Optimizer],
        *,
        blocks: Sequence[nn.Module],
        plan: StepPlan,
    ) -> nn.Module:
        self._module, self._clip_grad_norm = module, plan.clip_grad_norm
        self._cast_frozen(module)
        forward = self._distribute(module, blocks)
        self._optimizer = make_optimizer(module)
        self._statistics = trained_statistics(module)
        return forward

    def _cast_frozen(self, module: nn.Module) -> None:
        if self._frozen_dtype is torch.float32:
            return
        for parameter in module.parameters():
            if not parameter.requires_grad and parameter.is_floating_point():
                parameter.data = parameter.data.to(self._frozen_dtype)

    def _distribute(self, module: nn.Module, blocks: Sequence[nn.Module]) -> nn.Module:
        """Put the module where it is trained; returns what a step calls."""
        return module.to(self.device)

    def autocast(self) -> AbstractContextManager[Any]:
        if self._autocast_dtype is None and self._frozen_dtype is torch.float32:
            return nullcontext()
        # bf16 weights beside fp32 activations need autocast too: it reconciles the two in every product. Its
        # cache would keep a copy of every trained weight until the forward ends, even of those FSDP2 has freed.
        dtype = self._autocast_dtype or self._frozen_dtype
        return torch.autocast(self.device.type, dtype=dtype, cache_enabled=False)

    def microbatch(self, *, is_last: bool) -> AbstractContextManager[Any]:
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self._scaler.scale(loss).backward()

    def step(self) -> Tensor:
        self._scaler.unscale_(self.optimizer)
        gradients = [
            [self._local(p.grad) for p in group["params"] if p.grad is not None]
            for group in self.optimizer.param_groups
        ]
        norms = self._whole_norms(torch.stack([self._norm(group) for group in gradients]))
        if self._clip_grad_norm is not None:
            total = torch.linalg.vector_norm(norms)
            factor = (self._clip_grad_norm / (total + 1e-6)).clamp(max=1.0)  # as clip_grad_norm_
            for group in gradients:
                for gradient in group:
                    gradient.mul_(factor)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self._average_statistics()
        return norms

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def edit_gradient(self, parameter: nn.Parameter, edit: Callable[[Tensor], None]) -> None:
        def hook(accumulated: Tensor) -> None:
            assert accumulated.grad is not None
            edit(accumulated.grad)

        parameter.register_post_accumulate_grad_hook(hook)

    def keep_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        return None  # they stand until zero_grad

    def last_update(self, parameter: nn.Parameter) -> tuple[Tensor, Tensor | None]:
        return parameter, parameter.grad

    def place(self, whole: Tensor, like: nn.Parameter) -> Tensor:
        return whole.to(like.device)

    def gather(self, names: Collection[str]) -> dict[str, Tensor]:
        if not self.ranks.is_first:
            return {}
        return {name: tensor.to("cpu", copy=True) for name, tensor in self._named(names).items()}

    @torch.no_grad()
    def scatter(self, tensors: Mapping[str, Tensor]) -> None:
        names = self.ranks.first(lambda: list(tensors))
        for name, tensor in self._named(names).items():
            if self.ranks.is_first:
                tensor.copy_(tensors[name])
            if self.ranks.group is not None:
                dist.broadcast(tensor, src=0)

    def held(self) -> Mapping[str, Sequence[Tensor]]:
        return {}

    def mean(self, loss: Tensor) -> Tensor:
        if self.ranks.group is not None:
            loss = loss / self.ranks.world_size
            dist.all_reduce(loss)
        return loss

    def sum(self, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        total = dict(sums)
        self.sum_in_place(list(total.values()))
        return total

    def sum_in_place(self, tensors: list[Tensor]) -> None:
        if self.ranks.group is not None:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def move(self, batch: Batch) -> Batch:
        return {key: tensor.to(self.device, non_blocking=True) for key, tensor in batch.items()}

    def describe(self) -> str:
        return self._name

    def layout(self) -> dict[str, Any]:
        return {"engine": "torch", "world_size": self.ranks.world_size}

    def check_checkpoint(self, layout: Mapping[str, Any]) -> None:
        if layout["engine"] != "torch":
            raise ValueError(
                f"the checkpoint was written by {layout['engine']} on {layout['world_size']} rank(s), which only "
                "the same engine on as many ranks reads; continue with that, or start anew with --overwrite"
            )

    def writer(self, extra: Mapping[str, Tensor], *, staged: bool) -> ShardWriter:
        self._complete_optimizer_state()
        return shard_writer({**self._state(), **extra}, staged=staged)

    def load(self, folder: Path, extra: Mapping[str, Tensor]) -> None:
        self._complete_optimizer_state()
        read_shards(folder, {**self._state(), **extra}, self.ranks)

    def state_dict(self) -> dict[str, Any]:
        return {"scaler": self._scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._scaler.load_state_dict(state["scaler"])

    def _named(self, names: Iterable[str]) -> dict[str, Tensor]:
        live = dict(self.module.named_parameters()) | dict(self.module.named_buffers())
        return {name: live[name].detach() for name in names}

    def _state(self) -> dict[str, Tensor]:
        """What trains, the buffers, and the optimizer's state, by parameter name: other engines read it too."""
        state: dict[str, Tensor] = {f"buffer.{name}": b for name, b in self.module.named_buffers()}
        for name, parameter in self.module.named_parameters():
            if not parameter.requires_grad:
                continue
            state[f"parameter.{name}"] = parameter.detach()
            for key, value in self.optimizer.state[parameter].items():
                state[f"optimizer.{name}.{key}"] = value
        return state

    def _complete_optimizer_state(self) -> None:
        """AdamW makes its state with a parameter's first gradient; checkpoints hold that of all of them."""
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if self.optimizer.state[parameter]:
                    continue
                moments = {key: torch.zeros_like(parameter.detach()) for key in ("exp_avg", "exp_avg_sq")}
                step = torch.zeros((), dtype=torch.float32, device=self.device if group["fused"] else "cpu")
                self.optimizer.state[parameter] = {"step": step, **moments}

    def _average_statistics(self) -> None:
        """So that between two steps every rank holds the same model."""
        if self.ranks.group is not None:
            average_over_ranks(self._statistics)

    def _local(self, tensor: Tensor) -> Tensor:
        """This rank's part of a gradient."""
        return tensor

    def _norm(self, gradients: list[Tensor]) -> Tensor:
        if not gradients:
            return torch.zeros((), device=self.device)
        return torch.nn.utils.get_total_norm(gradients).float()

    def _whole_norms(self, norms: Tensor) -> Tensor:
        """(groups,): norms of the whole gradients, from those of this rank's parts."""
        return norms
