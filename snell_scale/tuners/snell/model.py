"""SnellModel: puts SNELL layers into a model, the way PEFT expects a tuner to."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, cast_adapter_dtype
from torch import nn

from snell_scale.tuners.snell.attention import SnellMultiheadAttention
from snell_scale.tuners.snell.config import SnellConfig
from snell_scale.tuners.snell.conv import SnellConv2d
from snell_scale.tuners.snell.layer import SnellLayer
from snell_scale.tuners.snell.linear import SnellLinear
from snell_scale.tuners.snell.plan import OUT_PROJECTION, matches, plan_layer
from snell_scale.tuners.snell.targets import check_targets, is_bypassed, outer_modules, resolve_all_linear


class SnellModel(BaseTuner):
    """SNELL (arXiv 2411.01800) as a PEFT tuner; made by `peft.get_peft_model(model, SnellConfig(…))`."""

    prefix: str = "snell_"
    tuner_layer_cls = SnellLayer
    target_module_mapping: dict[str, list[str]] = {}

    def _prepare_adapter_config(self, peft_config: SnellConfig, model_config: dict[str, Any]) -> SnellConfig:
        if peft_config.target_modules is None:
            raise ValueError(
                "target_modules is missing: give a list of module names, a regular expression or 'all-linear'"
            )
        return peft_config

    def _prepare_model(self, peft_config: SnellConfig, model: nn.Module) -> None:
        """Every check of config against model, before the first module is replaced."""
        resolve_all_linear(peft_config, model)
        check_targets(peft_config, model)
        adapted = []
        for name, module in outer_modules(model):
            if self._check_target_module_exists(peft_config, name):
                _check_reachable(model, name, module)
                plan_layer(peft_config, name, module)
                adapted.append(name)
                if isinstance(module, (nn.MultiheadAttention, SnellMultiheadAttention)):
                    adapted.append(f"{name}.{OUT_PROJECTION}")
        without = peft_config.dropout_exclude_modules
        if adapted and without and not any(matches(without, name) for name in adapted):
            raise ValueError(
                f"dropout_exclude_modules={without!r} matches none of the {len(adapted)} adapted modules (e.g. "
                f"{adapted[0]}): correct it or leave it out"
            )

    def _create_and_replace(
        self,
        peft_config: SnellConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        plan = plan_layer(peft_config, current_key, target)
        inference_mode = peft_config.inference_mode
        if isinstance(target, SnellLayer):
            target.update_layer(adapter_name, plan, inference_mode=inference_mode)
            return
        layer = _layer_class(target)(target, adapter_name, plan, inference_mode=inference_mode)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        """PEFT's own wants every base to have one `weight`, and moves what a SNELL layer has put in its place."""
        setattr(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Factors are float32 from the start; False gives them the base weight's dtype, as PEFT documents."""
        cast_adapter_dtype(self.model, adapter_name, autocast_adapter_dtype)
        for layer in self.model.modules():
            if isinstance(layer, SnellLayer) and not autocast_adapter_dtype:
                layer.cast_factors_as_base(adapter_name)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT's hook around forward; without it PEFT would drop `adapter_names` unseen."""
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "SNELL cannot mix adapters within a batch (adapter_names): run one batch per adapter, with "
                "set_adapter before it"
            )
        yield


def _layer_class(target: nn.Module) -> type[SnellLinear | SnellConv2d | SnellMultiheadAttention]:
    if isinstance(target, nn.MultiheadAttention):
        return SnellMultiheadAttention
    return SnellConv2d if isinstance(target, nn.Conv2d) else SnellLinear


def _check_reachable(model: nn.Module, name: str, module: nn.Module) -> None:
    way_out = "narrow target_modules or put it into exclude_modules"
    if isinstance(module, BaseTunerLayer) and not isinstance(module, SnellLayer):
        raise ValueError(f"{name} already has an adapter of type {type(module).__qualname__}: {way_out}")
    if is_bypassed(model, name):
        parent = type(model.get_submodule(name.rpartition(".")[0])).__name__
        if parent == "MultiheadAttention":
            way_out = f"target the nn.{parent} itself, whose q, k, v and out are adapted, or {way_out}"
        raise ValueError(
            f"{name}: its parent, an nn.{parent}, reads this layer's weight without calling the layer, so an "
            f"adapter would have no effect: {way_out}"
        )
