"""The floating-point operations of a training step, counted by operator, and their share of a device's peak."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import (
    flop_registry,
    register_flop_formula,
    sdpa_backward_flop_count,
    sdpa_flop_count,
    shape_wrapper,
)

from snell_scale.instrument.device_peaks import peak_flops_per_s
from snell_scale.kernels.merge.operators import merge_backward, merge_forward, merge_thresholds

_aten = torch.ops.aten
# In backward these compute the attention scores again, which the mathematics does not ask for.
_ATTENTION_BACKWARD = (
    _aten._scaled_dot_product_efficient_attention_backward,
    _aten._scaled_dot_product_flash_attention_backward,
    _aten._scaled_dot_product_cudnn_attention_backward,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward,
)


class FlopCounter(TorchDispatchMode):
    """Counts the multiplications and additions of matrix products and convolutions inside `with counter:`.

    One multiply-add is two. The formulas are those that torch's FlopCounterMode uses, with the merge op's and
    CPU attention's added to them, so that FlopCounterMode counts these too, and one that is right for grouped
    convolutions. Backward belongs inside `with counter.backward():`. Use it on an instrumented step, never in a
    timed window. Enter it after a MemoryProbe: this one would hand it what the merge op does inside. What
    compiled code computes is not seen.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self._num_flops = self._num_again = self._num_kernel = 0
        self._is_backward = False

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Any other mode would make compiled code run eagerly, and another program be measured."""
        return True

    @contextmanager
    def backward(self) -> Iterator[None]:
        """What is computed in here while a graph is recorded is activation checkpointing's recomputation."""
        self._is_backward = True
        try:
            yield
        finally:
            self._is_backward = False

    def report(self) -> dict[str, int]:
        """Of this rank.

        model_flops: what the mathematics of the step needs: forward, and the gradients asked for, nothing twice.
        hardware_flops: what was computed, so also what was computed again: the forward of checkpointed blocks,
        the scores of fused attention. kernel_flops: the merge op's work on single numbers of K, beside these:
        evaluating K once in each of its operators (the search for a threshold may take more), and pulling its
        gradient back to the factors.
        """
        return {
            "model_flops": self._num_flops - self._num_again,
            "hardware_flops": self._num_flops,
            "kernel_flops": self._num_kernel,
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            # The DTensor goes first: the operators that it makes of this one come here by themselves.
            return NotImplemented
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        operator = getattr(func, "_overloadpacket", func)
        formula = _FORMULAS.get(operator) or flop_registry.get(operator)
        if formula is not None:
            self._count(operator, formula(*args, **kwargs, out_val=result), args)
        if func in _KERNEL_FORMULAS:
            self._num_kernel += _KERNEL_FORMULAS[func](*args)
        return result

    def _count(self, operator: Any, num_flops: int, args: Sequence[Any]) -> None:
        self._num_flops += num_flops
        # An autograd.Function runs its forward with gradients off, and the merge op is one.
        if self._is_backward and (torch.is_grad_enabled() or operator is merge_forward._overloadpacket):
            self._num_again += num_flops
        elif operator in _ATTENTION_BACKWARD:
            _, query, key, *_ = args
            self._num_again += 2 * query.numel() * key.shape[-2]


def utilisation(
    counted: dict[str, int], *, step_ms: float | None, device: torch.device, dtype: str
) -> dict[str, Any]:
    """The counted FLOPs of a step, and as shares of what the device can do in that time: mfu and hfu, 0 to 1.

    step_ms: of a typical step; None where none was timed. dtype: what products are computed in, fp32, tf32, bf16
    or fp16. mfu (of model_flops), hfu (of hardware_flops) and peak_flops_per_s are None where the device's peak
    is not known (every CPU) or no step was timed.
    """
    peak = peak_flops_per_s(torch.cuda.get_device_name(device), dtype) if device.type == "cuda" else None
    possible = peak * step_ms / 1000 if peak is not None and step_ms else None
    return {
        **counted,
        "dtype": dtype,
        "peak_flops_per_s": peak,
        "mfu": counted["model_flops"] / possible if possible else None,
        "hfu": counted["hardware_flops"] / possible if possible else None,
    }


def product_dtype(precision: str, frozen_dtype: str) -> str:
    """What a run of these `engine.precision` and `engine.frozen_dtype` computes its products in."""
    if precision == "fp32" and frozen_dtype == "fp32":
        return "fp32" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return frozen_dtype if precision == "fp32" else precision


def _merge_forward_flops(x: Any, weight: Any, bias: Any, taus: Any, logs: Any, *call: Any, out_shape: Any) -> int:
    """y = x (W0 + ΔW)ᵀ: (in) multiply-adds for each number of y, which a convolution has too."""
    return 2 * prod(out_shape) * _num_columns(call)


def _merge_backward_flops(
    dy: Any, x: Any, weight: Any, taus: Any, logs: Any, x_shape: Any, wanted: Any, *call: Any, out_shape: Any
) -> int:
    """dx and G, each as much as forward, where they are asked for."""
    wants_dx, wants_dweight, _, *wants_factors = wanted
    num_products = bool(wants_dx) + bool(wants_dweight or any(wants_factors))
    return 2 * prod(dy) * _num_columns(call) * num_products


def _num_columns(call: Sequence[Any]) -> int:
    """The in of A (G, H, in, r/H); 0 where the product is the weight itself, and so none."""
    A, geometry = call[0], call[5]
    return 0 if len(geometry) == 1 else A[2]


def _convolution_backward_flops(dy: Any, x: Any, weight: Any, *arguments: Any, **_: Any) -> int:
    """Each of dx and dweight as much as forward. torch's own formula counts a grouped dweight once per group."""
    transposed, wanted = arguments[4], arguments[7]
    places = prod((x if transposed else dy)[2:])
    return 2 * dy[0] * places * prod(weight) * (bool(wanted[0]) + bool(wanted[1]))


def _kernel_flops(A: Any, B: Any, kernel: str, *, pulls_back: bool) -> int:
    """Per entry and number of the rank difference, square, sum (or product, sum); back a multiply-add each."""
    num_groups, num_components, num_columns, size = A.shape
    per_number = (2 if kernel in ("linear", "sigmoid") else 3) + (4 if pulls_back else 0)
    return num_groups * B.shape[2] * num_columns * num_components * size * per_number


def _kernel_flops_of_thresholds(sparsity: Any, memory: Any, *call: Any) -> int:
    return 0 if sparsity is None else _kernel_flops(call[0], call[1], call[6], pulls_back=False)


def _kernel_flops_of_forward(x: Any, weight: Any, bias: Any, taus: Any, logs: Any, *call: Any) -> int:
    return _kernel_flops(call[0], call[1], call[6], pulls_back=False)


def _kernel_flops_of_backward(
    dy: Any, x: Any, weight: Any, taus: Any, logs: Any, x_shape: Any, wanted: Any, *call: Any
) -> int:
    return _kernel_flops(call[0], call[1], call[6], pulls_back=any(wanted[3:]))


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward_flops(dy: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(dy, query, key, value)


def _register(operator: Any, formula: Callable[..., int]) -> None:
    if operator not in flop_registry:  # a later torch may know it
        register_flop_formula(operator)(formula)


_KERNEL_FORMULAS: dict[Any, Callable[..., int]] = {
    merge_thresholds: _kernel_flops_of_thresholds,
    merge_forward: _kernel_flops_of_forward,
    merge_backward: _kernel_flops_of_backward,
}
_FORMULAS = {_aten.convolution_backward: shape_wrapper(_convolution_backward_flops)}
_register(merge_forward._overloadpacket, _merge_forward_flops)
_register(merge_backward._overloadpacket, _merge_backward_flops)
_register(_aten._scaled_dot_product_flash_attention_for_cpu, _attention_flops)
_register(_aten._scaled_dot_product_flash_attention_for_cpu_backward, _attention_backward_flops)
