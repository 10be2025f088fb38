"""What the merged weight is multiplied into: a linear layer, a convolution, or nothing (the delta itself).

Each product is linear in the weight, seen as a matrix (out, in) that comes in ranges of columns. So one op serves
them all, and no product needs the whole merged weight at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from . import cpu_products


class Product(Protocol):
    """y = x · weight + bias, and its gradients; dy has y's shape."""

    writes_grad_weight: bool  # into memory that it is given, rather than returning its own

    def prepared(self, tensor: Tensor) -> Tensor:
        """x or dy in a layout that no range of columns has to change again."""
        ...

    def add_output(
        self, y: Tensor | None, x: Tensor, weight: Tensor, columns: slice, bias: Tensor | None
    ) -> Tensor:
        """y of the columns before (None: of none, which is where the bias goes), with these added in place.

        weight: (out, len(columns)); y and bias are in its dtype, x is rounded or raised to it.
        """
        ...

    def empty_grad_input(self, dy: Tensor, x_shape: Sequence[int]) -> Tensor:
        """Room for dx."""
        ...

    def add_grad_input(
        self, dx: Tensor | None, dy: Tensor, weight: Tensor, columns: slice, x_shape: Sequence[int]
    ) -> Tensor:
        """dx (None: with nothing written yet) with the part that these columns see."""
        ...

    def grad_weight(self, dy: Tensor, x: Tensor, columns: slice, *, out: Tensor | None = None) -> Tensor:
        """(out, len(columns)), in x.dtype; in `out`, if it is given to a product that writes there."""
        ...

    def grad_bias(self, dy: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class LinearProduct:
    """y (…, out) = x (…, in) weightᵀ + bias."""

    writes_grad_weight = True

    def prepared(self, tensor: Tensor) -> Tensor:
        return tensor.contiguous()

    def add_output(
        self, y: Tensor | None, x: Tensor, weight: Tensor, columns: slice, bias: Tensor | None
    ) -> Tensor:
        rows = _as_rows(x)[:, columns].to(weight.dtype)
        if y is not None:
            _as_rows(y).addmm_(rows, weight.T)
            return y
        linear = cpu_products.product if cpu_products.has_faster_product(rows) else torch.nn.functional.linear
        return linear(rows, weight, bias).view(*x.shape[:-1], weight.shape[0])

    def empty_grad_input(self, dy: Tensor, x_shape: Sequence[int]) -> Tensor:
        return dy.new_empty(x_shape)

    def add_grad_input(
        self, dx: Tensor | None, dy: Tensor, weight: Tensor, columns: slice, x_shape: Sequence[int]
    ) -> Tensor:
        rows, is_faster = _as_rows(dy), cpu_products.has_faster_product(_as_rows(dy))
        if is_faster and weight.shape[1] == x_shape[-1]:
            return cpu_products.product_backward(rows, weight).view(tuple(x_shape))
        dx = self.empty_grad_input(dy, x_shape) if dx is None else dx
        here = _as_rows(dx)[:, columns]
        if is_faster:
            here.copy_(cpu_products.product_backward(rows, weight))
        else:
            torch.mm(rows, weight, out=here)
        return dx

    def grad_weight(self, dy: Tensor, x: Tensor, columns: slice, *, out: Tensor | None = None) -> Tensor:
        return torch.mm(_as_rows(dy).T, _as_rows(x)[:, columns], out=out)

    def grad_bias(self, dy: Tensor) -> Tensor:
        return _as_rows(dy).sum(0)


@dataclass(frozen=True)
class Conv2dProduct:
    """y (N, out, h', w') = conv2d(x (N, in, h, w), weight seen as (out, in, kh, kw)) + bias.

    A range of columns begins and ends between input channels.
    """

    window: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    writes_grad_weight = False

    def prepared(self, tensor: Tensor) -> Tensor:
        return tensor

    def add_output(
        self, y: Tensor | None, x: Tensor, weight: Tensor, columns: slice, bias: Tensor | None
    ) -> Tensor:
        x_here, weight = x[:, self._channels(columns)].to(weight.dtype), self._as_window(weight)
        of_these = torch.nn.functional.conv2d(
            x_here, weight, bias if y is None else None, self.stride, self.padding, self.dilation
        )
        return of_these if y is None else y.add_(of_these)

    def empty_grad_input(self, dy: Tensor, x_shape: Sequence[int]) -> Tensor:
        is_last = not dy.is_contiguous() and dy.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if is_last else torch.contiguous_format
        return torch.empty(x_shape, dtype=dy.dtype, device=dy.device, memory_format=layout)

    def add_grad_input(
        self, dx: Tensor | None, dy: Tensor, weight: Tensor, columns: slice, x_shape: Sequence[int]
    ) -> Tensor:
        dx = self.empty_grad_input(dy, x_shape) if dx is None else dx
        here = dx[:, self._channels(columns)]
        only_its_shape = dy.new_empty(1).expand(here.shape)
        here.copy_(self._backward(dy, only_its_shape, self._as_window(weight), (True, False, False))[0])
        return dx

    def grad_weight(self, dy: Tensor, x: Tensor, columns: slice, *, out: Tensor | None = None) -> Tensor:
        here = x[:, self._channels(columns)]
        only_its_shape = x.new_empty(1).expand(dy.shape[1], here.shape[1], *self.window)
        return self._backward(dy, here, only_its_shape, (False, True, False))[1].reshape(dy.shape[1], -1)

    def grad_bias(self, dy: Tensor) -> Tensor:
        return dy.sum((0, 2, 3))

    def _channels(self, columns: slice) -> slice:
        size = self.window[0] * self.window[1]
        return slice(columns.start // size, columns.stop // size)

    def _as_window(self, weight: Tensor) -> Tensor:
        return weight.view(weight.shape[0], -1, *self.window)

    def _backward(
        self, dy: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool, bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        settings = (self.stride, self.padding, self.dilation, False, (0, 0), 1)
        return torch.ops.aten.convolution_backward(dy, x, weight, None, *settings, wanted)


@dataclass(frozen=True)
class WeightItself:
    """y (out, in) = weight: what `delta_weight` differentiates. x is (0, in)."""

    writes_grad_weight = False

    def prepared(self, tensor: Tensor) -> Tensor:
        return tensor

    def add_output(
        self, y: Tensor | None, x: Tensor, weight: Tensor, columns: slice, bias: Tensor | None
    ) -> Tensor:
        y = weight.new_empty(weight.shape[0], x.shape[-1]) if y is None else y
        y[:, columns] = weight
        return y

    def empty_grad_input(self, dy: Tensor, x_shape: Sequence[int]) -> Tensor:
        raise AssertionError("the delta has no input")

    def add_grad_input(
        self, dx: Tensor | None, dy: Tensor, weight: Tensor, columns: slice, x_shape: Sequence[int]
    ) -> Tensor:
        raise AssertionError("the delta has no input")

    def grad_weight(self, dy: Tensor, x: Tensor, columns: slice, *, out: Tensor | None = None) -> Tensor:
        return dy[:, columns]

    def grad_bias(self, dy: Tensor) -> Tensor:
        raise AssertionError("the delta has no bias")


def product_of(geometry: Sequence[int]) -> Product:
    """From what an operator can carry: nothing (linear), (0,) (the weight itself), or kh, kw, stride, padding and
    dilation of a convolution, two numbers each.
    """
    if not geometry:
        return LinearProduct()
    if len(geometry) == 1:
        return WeightItself()
    window, stride, padding, dilation = ((geometry[i], geometry[i + 1]) for i in range(0, 8, 2))
    return Conv2dProduct(window, stride, padding, dilation)


def _as_rows(tensor: Tensor) -> Tensor:
    """(…, features) → (rows, features); a view where the strides allow."""
    return tensor.reshape(-1, tensor.shape[-1])
