"""DeepSpeed ZeRO: optimizer state (stage 1), gradients (2) and parameters (3) sharded."""

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from snell_scale.engines.batch_statistics import trained_statistics
from snell_scale.engines.deepspeed_config import DeepSpeedConfig
from snell_scale.engines.deepspeed_json import (
    check_dictated,
    check_optimizer,
    default_values,
    plan_values,
    settings,
)
from snell_scale.engines.deepspeed_process import load_deepspeed, register_held_parameters
from snell_scale.engines.deepspeed_state import LossScale, load_state, state_writer
from snell_scale.engines.ranks import Ranks
from snell_scale.engines.torch_engine import TorchEngine
from snell_scale.interfaces import ShardWriter, StepPlan


class DeepSpeedEngine(TorchEngine):
    """See `interfaces.Engine`.

    Parameters are float32 as in the other engines, and DeepSpeed keeps a float32 copy of what this rank updates.
    From stage 2 on gradients travel with every microbatch: keeping them sharded is what the stage is for.
    """

    def __init__(self, config: DeepSpeedConfig, ranks: Ranks) -> None:
        super().__init__(config, ranks)
        self._config = config
        self._deepspeed: Any = None  # deepspeed.DeepSpeedEngine, which has no type annotations
        self._loss_scale = LossScale() if config.precision == "fp16" else None
        self._kept: list[nn.Parameter] = []
        self._gradients: dict[nn.Parameter, Tensor] = {}

    @property
    def norm_names(self) -> tuple[str, ...]:
        return ("all",)

    @property
    def skips_steps(self) -> bool:
        return self._loss_scale is not None

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
        module.to(self.device)
        optimizer = make_optimizer(module)  # before sharding, which empties the parameters that it looks at
        given = self._config.read_json()
        dictated = {**self._config.dictated(), **plan_values(plan, self.ranks.world_size)}
        check_dictated(given, dictated)
        check_optimizer(given, optimizer)
        config = settings(given, dictated=dictated, defaults=default_values(module, blocks))
        os.environ.setdefault("LOCAL_RANK", str(self.ranks.local_rank))  # DeepSpeed insists
        deepspeed = load_deepspeed(self.device)
        self._deepspeed = deepspeed.initialize(model=module, optimizer=optimizer, config=config)[0]
        self._optimizer = self._deepspeed.optimizer
        if self._config.zero_stage == 3:
            register_held_parameters(module)
        self._statistics = trained_statistics(module)
        self._autocast_inside(module)
        self._tell_loss_scale()
        return self._deepspeed

    def microbatch(self, *, is_last: bool) -> AbstractContextManager[Any]:
        self._deepspeed.set_gradient_accumulation_boundary(is_last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self._deepspeed.backward(loss, scale_wrt_gas=False)

    def step(self) -> Tensor:
        from deepspeed.utils import safe_get_full_grad

        # DeepSpeed drops the gradients within its step.
        gradients = [cast(Tensor, safe_get_full_grad(parameter)) for parameter in self._kept]
        self._deepspeed.step()
        norm = torch.as_tensor(self._deepspeed.get_global_grad_norm(), dtype=torch.float32, device=self.device)
        factor = torch.ones_like(norm) if self._loss_scale is None else 1 / self._loss_scale.scale
        if self._clip_grad_norm is not None:
            factor = factor * (self._clip_grad_norm / (norm + 1e-6)).clamp(max=1.0)  # as DeepSpeed
        self._gradients = {p: gradient * factor for p, gradient in zip(self._kept, gradients, strict=True)}
        if self._loss_scale is not None:
            self._loss_scale.update(overflow=bool(self._deepspeed.optimizer.overflow))
            self._tell_loss_scale()
        self._average_statistics()
        return norm.reshape(1)

    def zero_grad(self) -> None:
        self._gradients.clear()
        self.optimizer.zero_grad(set_to_none=True)

    def edit_gradient(self, parameter: nn.Parameter, edit: Callable[[Tensor], None]) -> None:
        # DeepSpeed takes the gradient away as soon as it has accumulated; this comes before that.
        def hook(gradient: Tensor) -> Tensor:
            edited = gradient.clone()
            edit(edited)
            return edited

        parameter.register_hook(hook)

    def keep_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        self._kept = list(parameters)

    def last_update(self, parameter: nn.Parameter) -> tuple[Tensor, Tensor | None]:
        """Whole on every rank; in ZeRO-3 gathered for this call."""
        from deepspeed.utils import safe_get_full_fp32_param

        is_sharded = hasattr(parameter, "ds_id")
        value = cast(Tensor, safe_get_full_fp32_param(parameter)) if is_sharded else parameter.detach()
        return value, self._gradients.get(parameter)

    def gather(self, names: Collection[str]) -> dict[str, Tensor]:
        self._land()
        found: dict[str, Tensor] = {}
        for name, tensor in self._live(sorted(names)).items():  # in one order on all ranks
            with self._whole(tensor):
                if self.ranks.is_first:
                    found[name] = tensor.detach().to("cpu", copy=True)
        return found

    @torch.no_grad()
    def scatter(self, tensors: Mapping[str, Tensor]) -> None:
        self._land()
        names = self.ranks.first(lambda: list(tensors))
        for name, tensor in self._live(names).items():
            with self._whole(tensor, changed_by_first=True):
                if self.ranks.is_first:
                    tensor.copy_(tensors[name])
                dist.broadcast(tensor.detach(), src=0)

    def held(self) -> Mapping[str, Sequence[Tensor]]:
        """The float32 copies that are updated; in ZeRO-3 also this rank's parts of weights and gradients."""
        gradients = getattr(self.optimizer, "grad_partitions_flat_buffer", None)
        shards = [getattr(p, "ds_tensor", None) for p in self.module.parameters()]
        groups = [p for group in self.optimizer.param_groups for p in group["params"]]
        return {
            # ZeRO-3 lets its optimizer see them only while it steps.
            "optimizer": [*groups, *getattr(self.optimizer, "fp32_partitioned_groups_flat", ())],
            "parameters": [shard for shard in shards if shard is not None],
            "gradients": [] if gradients is None else [gradients],
        }

    def describe(self) -> str:
        return f"deepspeed zero-{self._config.zero_stage}"

    def layout(self) -> dict[str, Any]:
        return {"engine": self.describe(), "world_size": self.ranks.world_size}

    def check_checkpoint(self, layout: Mapping[str, Any]) -> None:
        if dict(layout) != self.layout():
            raise ValueError(
                f"the checkpoint was written by {layout['engine']} on {layout['world_size']} rank(s), but this "
                f"run is {self.describe()} on {self.ranks.world_size}; DeepSpeed's checkpoints are read by the "
                "same stage on as many ranks: continue with that, or start anew with --overwrite"
            )

    def writer(self, extra: Mapping[str, Tensor], *, staged: bool) -> ShardWriter:
        assert not staged, "check_run refuses checkpoint.asynchronous"
        return state_writer(self._deepspeed, extra)

    def load(self, folder: Path, extra: Mapping[str, Tensor]) -> None:
        load_state(self._deepspeed, folder, extra)

    def state_dict(self) -> dict[str, Any]:
        return {} if self._loss_scale is None else self._loss_scale.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._loss_scale is not None:
            self._loss_scale.load_state_dict(state)
            self._tell_loss_scale()

    def _land(self) -> None:
        """ZeRO-3 fetches weights ahead, and a forward without backward leaves some in flight."""
        if self._config.zero_stage == 3:
            self._deepspeed.optimizer.empty_partition_cache()
            whole = self._deepspeed.optimizer.persistent_parameters
            if whole:  # small ones, which DeepSpeed's trace of a step expects to be there
                whole[0].all_gather(whole)

    def _live(self, names: Collection[str]) -> dict[str, Tensor]:
        """Parameters as such, not detached: DeepSpeed knows the shards of these very objects."""
        live = dict(self.module.named_parameters()) | dict(self.module.named_buffers())
        return {name: live[name] for name in names}

    def _whole(self, tensor: Tensor, *, changed_by_first: bool = False) -> AbstractContextManager[Any]:
        """While it lasts, the parameter is whole on every rank."""
        if not hasattr(tensor, "ds_id"):
            return nullcontext()
        from deepspeed import zero

        return zero.GatheredParameters([tensor], modifier_rank=0 if changed_by_first else None)

    def _autocast_inside(self, module: nn.Module) -> None:
        """Autocast around the module's own forward, for DeepSpeed's turns off what it is called in."""
        entered: list[AbstractContextManager[Any]] = []

        def enter(*_: object) -> None:
            entered.append(self.autocast())
            entered[-1].__enter__()

        def leave(*_: object) -> None:
            entered.pop().__exit__(None, None, None)

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave, always_call=True)

    def _tell_loss_scale(self) -> None:
        if self._loss_scale is not None:
            self._deepspeed.optimizer.override_loss_scale(self._loss_scale.scale)
