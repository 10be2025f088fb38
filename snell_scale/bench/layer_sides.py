"""One linear layer under every method: the sides of `snell-scale bench merge`."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from peft import LoraConfig, ShiraConfig, get_peft_model
from torch import Tensor, nn

from snell_scale.bench.cpu_libraries import with_products_of
from snell_scale.bench.memory import Phases, clear_gradients
from snell_scale.bench.naive_snell import NaiveSnellLinear
from snell_scale.bench.settings import MKL_SIDE
from snell_scale.kernels.merge import merge_linear

# Adam's update at the start of training: the learning rate in every entry, up or down.
STEP_SIZE = 1e-3
_NUM_COMPONENTS = 2


@dataclass(frozen=True)
class Layer:
    """A layer's tensors, before any side makes them its own.

    weight (out, in), bias (out,), x (tokens, in), dy (tokens, out): of one dtype. A (1, H, in, r/H) and
    B (1, H, out, r/H): float32, drawn as SNELL starts. `implementation`: merge_linear's.
    """

    weight: Tensor
    bias: Tensor
    x: Tensor
    dy: Tensor
    A: Tensor
    B: Tensor
    rank: int
    sparsity: float
    implementation: str

    def of_tokens(self, num_tokens: int, *, weight: Tensor) -> "Layer":
        """The same with at most so many tokens, another weight and no bias to hide errors."""
        x, dy = self.x[:num_tokens], self.dy[:num_tokens]
        return replace(self, weight=weight, bias=torch.zeros_like(self.bias), x=x, dy=dy)


def make_layer(
    shape: tuple[int, int],
    device: torch.device,
    *,
    num_tokens: int,
    rank: int,
    sparsity: float,
    dtype: torch.dtype,
    implementation: str,
    seed: int,
) -> Layer:
    """Random tensors for a layer of (in, out) features."""
    num_in, num_out = shape
    generator = torch.Generator(device).manual_seed(seed)
    columns = rank // _NUM_COMPONENTS

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(size, generator=generator, device=device) * scale).to(dtype)

    def factor(features: int) -> Tensor:
        size = (1, _NUM_COMPONENTS, features, columns)
        bound = 1 / math.sqrt(features * columns)
        return (2 * torch.rand(size, generator=generator, device=device) - 1) * bound

    return Layer(
        weight=normal(num_out, num_in, scale=num_in**-0.5),
        bias=normal(num_out),
        x=normal(num_tokens, num_in),
        dy=normal(num_tokens, num_out),
        A=factor(num_in),
        B=factor(num_out),
        rank=rank,
        sparsity=sparsity,
        implementation=implementation,
    )


class MergedLinear(nn.Module):
    """`merge_linear` with a frozen weight and trainable factors; the thresholds' memory is kept between steps."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.threshold_memory: Tensor
        self.weight = nn.Parameter(layer.weight.clone(), requires_grad=False)
        self.bias = nn.Parameter(layer.bias.clone(), requires_grad=False)
        self.A = nn.Parameter(layer.A.clone())
        self.B = nn.Parameter(layer.B.clone())
        self.sparsity = layer.sparsity
        self.implementation = layer.implementation
        memory = torch.full((1, 2), float("nan"), device=layer.A.device, dtype=layer.A.dtype)
        self.register_buffer("threshold_memory", memory)

    def forward(self, x: Tensor) -> Tensor:
        return merge_linear(
            x,
            self.weight,
            self.A,
            self.B,
            self.bias,
            sparsity=self.sparsity,
            implementation=self.implementation,
            threshold_memory=self.threshold_memory,
        )

    def forget(self) -> None:
        """Make the next search for the threshold a cold one."""
        self.threshold_memory.fill_(float("nan"))


def side_module(side: str, layer: Layer) -> nn.Module:
    """The layer's module under one method; ready to run."""
    return BUILDERS[side](layer)


def side_phases(side: str, layer: Layer) -> Phases:
    """Forward and backward of one side, with the gradients of the step before dropped first."""
    module, outputs = side_module(side, layer), []
    x, dy = layer.x.clone().requires_grad_(), layer.dy.clone()

    def forward() -> None:
        clear_gradients([x, *module.parameters()])
        outputs.append(module(x))

    def backward() -> None:
        outputs.pop().backward(dy)

    return with_products_of(side, Phases(module, (("forward", forward), ("backward", backward))))


@torch.no_grad()
def between_rounds(side: str, module: nn.Module) -> None:
    """What an optimizer does between two steps, so that thresholds move as they do in training."""
    if side == "snell-cold":
        assert isinstance(module, MergedLinear)
        module.forget()
    for name in ("A", "B"):
        factor = getattr(module, name, None)
        if isinstance(factor, nn.Parameter):
            factor.add_(torch.randn_like(factor).sign_(), alpha=STEP_SIZE)


def _linear(layer: Layer, *, trainable: bool) -> nn.Linear:
    num_out, num_in = layer.weight.shape
    linear = nn.Linear(num_in, num_out, device="meta")
    linear.weight = nn.Parameter(layer.weight.clone(), requires_grad=trainable)
    linear.bias = nn.Parameter(layer.bias.clone(), requires_grad=trainable)
    return linear


def _frozen(layer: Layer) -> nn.Module:
    return _linear(layer, trainable=False)


def _full(layer: Layer) -> nn.Module:
    return _linear(layer, trainable=True)


def _lora(layer: Layer) -> nn.Module:
    return _by_peft(layer, LoraConfig(r=layer.rank, lora_alpha=layer.rank, target_modules=["linear"]))


def _shira(layer: Layer) -> nn.Module:
    # torch warns of unchecked sparse tensors unless told; peft's are made from indices that it checked.
    torch.sparse.check_sparse_tensor_invariants.disable()
    return _by_peft(layer, ShiraConfig(r=layer.rank, random_seed=0, target_modules=["linear"]))


def _naive(layer: Layer) -> nn.Module:
    return NaiveSnellLinear(
        _linear(layer, trainable=False), layer.A.clone(), layer.B.clone(), sparsity=layer.sparsity
    )


def _by_peft(layer: Layer, config: LoraConfig | ShiraConfig) -> nn.Module:
    model = get_peft_model(
        cast(
            Any, nn.ModuleDict({"linear": _linear(layer, trainable=False)})
        ),  # declared for transformers' models
        config,
        autocast_adapter_dtype=False,
    )
    return cast(nn.ModuleDict, model.base_model.model)["linear"]


BUILDERS: Mapping[str, Callable[[Layer], nn.Module]] = {
    "frozen": _frozen,
    "lora": _lora,
    "shira": _shira,
    "full": _full,
    "naive": _naive,
    "snell": MergedLinear,
    "snell-cold": MergedLinear,
    MKL_SIDE: MergedLinear,
}
