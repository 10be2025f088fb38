"""SNELL on nn.MultiheadAttention: q, k, v and out are four matrices, each with its own factors and threshold.

The module's weights are a bare `in_proj_weight` (q, k and v stacked) and an `out_proj` that is read without being
called, so that no adapter on a layer inside could have an effect: the attention is computed here.
"""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snell_scale.kernels.merge import merge_linear
from snell_scale.tuners.snell.layer import ProductArguments, SnellLayer

_IN, _OUT = slice(0, 3), slice(3, 4)


class SnellMultiheadAttention(SnellLayer):
    """nn.MultiheadAttention with W0 + ΔW for q, k, v and out; factors (4, H, embed_dim, r/H) in this order."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Arguments, shapes and results of nn.MultiheadAttention.forward.

        ValueError: a mask neither bool nor float, is_causal without attn_mask, a base whose forward was replaced.
        """
        active, base = self._active_here(), self._base()
        if not active:
            return self.base_layer(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        _check_call(base, attn_mask, is_causal=is_causal)
        is_batched, is_batch_first = query.dim() == 3, base.batch_first
        q, k, v = self._in_projections(_samples_first((query, key, value), is_batched, is_batch_first), active)
        padding = key_padding_mask if is_batched or key_padding_mask is None else key_padding_mask.unsqueeze(0)
        needs_mask = not is_causal or need_weights or padding is not None
        mask = _additive_mask(attn_mask if needs_mask else None, padding, like=q, heads=base.num_heads)
        dropout, heads = base.dropout if self.training else 0.0, base.num_heads
        context, weights = _attend(
            (q, k, v), mask, heads=heads, dropout=dropout, need_weights=need_weights, is_causal=not needs_mask
        )
        y = self._project(context, base.out_proj.weight, base.out_proj.bias, active, groups=_OUT)
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if not is_batched:
            return y.squeeze(0), None if weights is None else weights.squeeze(0)
        return y if is_batch_first else y.transpose(0, 1), weights

    @property
    def batch_first(self) -> bool:
        """Read by nn.TransformerEncoder and nn.TransformerDecoder."""
        return self._base().batch_first

    def _in_projections(self, inputs: Sequence[Tensor], active: list[str]) -> list[Tensor]:
        """q, k, v of inputs (N, length, embed_dim); one product, with the whole in_proj_weight.

        Inputs that differ go through it one after the other: of their outputs a third each is used. Parts of the
        weight would be views, and the op is to save the Parameter.
        """
        base = self._base()
        distinct = list({id(each): each for each in inputs}.values())
        x = distinct[0] if len(distinct) == 1 else torch.cat(distinct, dim=1)
        y = self._project(x, base.in_proj_weight, base.in_proj_bias, active, groups=_IN)
        parts = dict(zip(map(id, distinct), y.split([each.shape[1] for each in distinct], dim=1), strict=True))
        return [parts[id(each)].chunk(3, dim=-1)[place] for place, each in enumerate(inputs)]

    def _project(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, active: list[str], *, groups: slice
    ) -> Tensor:
        """x (W0 + ΔW)ᵀ + b with the deltas of these groups; x (N, length, embed_dim)."""
        dropouts = {name: self._dropout(name, groups) for name in active}
        if len(active) == 1 and not self._is_noisy(active[0], dropouts[active[0]]):
            A, B, arguments = self._factors(active[0], groups)
            return merge_linear(x, weight, A, B, bias, **arguments)
        y = F.linear(x, weight, bias)
        for name, dropout in dropouts.items():
            A, B, arguments = self._factors(name, groups)
            delta = merge_linear(F.dropout(x, dropout, self.training), None, A, B, **arguments)
            y = y + self._without_some_samples(delta, name).to(y.dtype)
        return y

    def _factors(self, adapter_name: str, groups: slice) -> tuple[Tensor, Tensor, ProductArguments]:
        """A, B and the op's other arguments for these of the four matrices."""
        arguments = self._product_arguments(adapter_name)
        sparsity, memory = arguments["sparsity"], arguments["threshold_memory"]
        if isinstance(sparsity, Tensor):
            arguments["sparsity"] = sparsity[groups]
        if memory is not None:
            arguments["threshold_memory"] = memory[groups]
        scalars = arguments["kernel_params"]
        if scalars is not None:
            arguments["kernel_params"] = {name: values[groups] for name, values in scalars.items()}
        return self.snell_A[adapter_name][groups], self.snell_B[adapter_name][groups], arguments

    def _dropout(self, adapter_name: str, groups: slice) -> float:
        plan = self.snell_plan[adapter_name]
        return plan.out_dropout if groups is _OUT else plan.dropout

    def _weights(self) -> tuple[Tensor, ...]:
        base = self._base()
        return base.in_proj_weight, base.out_proj.weight

    def _base(self) -> nn.MultiheadAttention:
        return cast(nn.MultiheadAttention, self.get_base_layer())


def _check_call(base: nn.MultiheadAttention, attn_mask: Tensor | None, *, is_causal: bool) -> None:
    if "forward" in vars(base):
        raise ValueError(
            "the forward of an adapted nn.MultiheadAttention was replaced (by an offloading hook?), which SNELL "
            "cannot follow: take the hook off, or merge the adapter first"
        )
    if is_causal and attn_mask is None:
        raise ValueError("is_causal=True is a hint about attn_mask, as in nn.MultiheadAttention: give the mask")


def _samples_first(inputs: Sequence[Tensor], is_batched: bool, is_batch_first: bool) -> list[Tensor]:
    """The inputs as (N, length, embed_dim); those that were one tensor stay one."""
    views = {
        id(each): each.unsqueeze(0) if not is_batched else each if is_batch_first else each.transpose(0, 1)
        for each in inputs
    }
    return [views[id(each)] for each in inputs]


def _additive_mask(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, *, like: Tensor, heads: int
) -> Tensor | None:
    """What is added to the scores (N, heads, length, keys), up to broadcasting; None where nothing is.

    attn_mask: (length, keys) or (N·heads, length, keys); key_padding_mask: (N, keys). bool (True: left out) or
    float.
    """
    masks = []
    if attn_mask is not None:
        mask = _additive(attn_mask, like)
        masks.append(mask.unflatten(0, (-1, heads)) if mask.dim() == 3 else mask)
    if key_padding_mask is not None:
        masks.append(_additive(key_padding_mask, like)[:, None, None, :])
    return sum(masks[1:], masks[0]) if masks else None


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return like.new_zeros(mask.shape).masked_fill(mask, float("-inf"))
    if not mask.is_floating_point():
        raise ValueError(
            f"a mask of attention is {mask.dtype}, expected torch.bool (True: left out) or a float type"
        )
    return mask.to(like.dtype)


def _attend(
    projected: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    *,
    heads: int,
    dropout: float,
    need_weights: bool,
    is_causal: bool,
) -> tuple[Tensor, Tensor | None]:
    """(context (N, length, embed_dim), weights after dropout (N, heads, length, keys) if wanted)."""
    q, k, v = (each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in projected)
    if not need_weights:
        context = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
        return context.transpose(1, 2).flatten(2), None
    scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)
    weights = (scores if mask is None else scores + mask).softmax(dim=-1)
    weights = F.dropout(weights, dropout)
    return (weights @ v).transpose(1, 2).flatten(2), weights
