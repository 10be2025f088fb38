"""What the merged weight is multiplied into: a linear layer, a convolution, or nothing (the delta itself).

Each product is linear in the weight, always seen as a matrix (out, in); so one autograd Function serves them all.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Product(Protocol):
    """y = x · weight + bias, and its gradients; dy has y's shape, `rows` is a range of the weight's rows."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor: ...

    def grad_input(self, dy: Tensor, weight: Tensor, x_shape: torch.Size) -> Tensor: ...

    def grad_weight(self, dy: Tensor, x: Tensor, rows: slice) -> Tensor:
        """(rows, in), in x.dtype, a new tensor that the caller may overwrite."""
        ...

    def grad_bias(self, dy: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class LinearProduct:
    """y (…, out) = x (…, in) weightᵀ + bias."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def grad_input(self, dy: Tensor, weight: Tensor, x_shape: torch.Size) -> Tensor:
        return dy @ weight

    def grad_weight(self, dy: Tensor, x: Tensor, rows: slice) -> Tensor:
        return dy[..., rows].flatten(0, -2).T @ x.flatten(0, -2) if x.dim() > 1 else torch.outer(dy[rows], x)

    def grad_bias(self, dy: Tensor) -> Tensor:
        return dy.flatten(0, -2).sum(0) if dy.dim() > 1 else dy


@dataclass(frozen=True)
class Conv2dProduct:
    """y (N, out, h', w') = conv2d(x (N, in, h, w), weight seen as (out, in, kh, kw)) + bias."""

    weight_shape: tuple[int, int, int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, weight.view(self.weight_shape), bias, self.stride, self.padding, self.dilation)

    def grad_input(self, dy: Tensor, weight: Tensor, x_shape: torch.Size) -> Tensor:
        only_its_shape = dy.new_empty(1).expand(x_shape)
        return self._backward(dy, only_its_shape, weight.view(self.weight_shape), (True, False, False))[0]

    def grad_weight(self, dy: Tensor, x: Tensor, rows: slice) -> Tensor:
        dy = dy[:, rows]
        only_its_shape = x.new_empty(1).expand(dy.shape[1], *self.weight_shape[1:])
        return self._backward(dy, x, only_its_shape, (False, True, False))[1].reshape(dy.shape[1], -1)

    def grad_bias(self, dy: Tensor) -> Tensor:
        return dy.sum((0, 2, 3))

    def _backward(
        self, dy: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool, bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        settings = (self.stride, self.padding, self.dilation, False, (0, 0), 1)
        return torch.ops.aten.convolution_backward(dy, x, weight, None, *settings, wanted)


@dataclass(frozen=True)
class WeightItself:
    """y = weight: what `delta_weight` differentiates. x is not looked at."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return weight

    def grad_input(self, dy: Tensor, weight: Tensor, x_shape: torch.Size) -> Tensor:
        return dy.new_zeros(x_shape)

    def grad_weight(self, dy: Tensor, x: Tensor, rows: slice) -> Tensor:
        return dy[rows].clone()

    def grad_bias(self, dy: Tensor) -> Tensor:
        raise AssertionError("the delta has no bias")
