"""SNELL on the largest matrix of SD 1.5 and SDXL: a convolution of 2560 to 1280 channels, 29.5 M entries."""

import math
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from snell_scale.kernels.merge import delta_weight
from snell_scale.kernels.merge.reference import kernel_matrix_reference
from snell_scale.tuners import SnellConfig

IN, OUT, SPARSITY, SCALE = 2560, 1280, 0.9, 0.1
COLUMNS = IN * 3 * 3
ENTRIES = OUT * COLUMNS  # above 2^24: counts and positions no longer fit float32
ROWS_AT_ONCE = 64  # of the specification, whose distances take rank numbers an entry

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


class Run(NamedTuple):
    layer: Any
    x: Tensor
    y: Tensor
    dy: Tensor

    def factor(self, name: str) -> Tensor:
        return self.layer.get_parameter(f"{name}.default")


def run(dtype: torch.dtype) -> Run:
    """Forward and backward through the layer as peft makes it."""
    torch.manual_seed(0)
    conv = nn.Conv2d(IN, OUT, 3, padding=1).to(dtype)
    config = SnellConfig(r=8, sparsity=SPARSITY, scale=SCALE, target_modules=["0"], init_weights=False)
    layer = get_peft_model(nn.Sequential(conv), config).get_submodule("base_model.model.0")  # pyright: ignore
    x = torch.randn(1, IN, 4, 4, dtype=dtype)
    y = layer(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    return Run(layer, x, y.detach(), dy)


@pytest.fixture(scope="module", params=[torch.float64, torch.float32], ids=["float64", "float32"])
def made(request: pytest.FixtureRequest) -> Run:
    return run(request.param)


@torch.no_grad()
def kernel_and_mask(made: Run) -> tuple[Tensor, Tensor]:
    """K of the run's factors, dense, and where its magnitude is above the threshold that a sort gives."""
    K = delta_weight(made.factor("snell_A"), made.factor("snell_B"), sparsity=None, scale=SCALE)
    position = math.floor(SPARSITY * (ENTRIES - 1))
    threshold = K.abs().flatten().kthvalue(position + 1).values
    return K, K.abs() > threshold


def test_the_number_of_changed_weights_is_exact(made: Run) -> None:
    delta = made.layer.get_delta_weight("default")
    K, mask = kernel_and_mask(made)
    assert torch.equal(delta.flatten(1) != 0, mask)
    expected = ENTRIES - (math.floor(SPARSITY * (ENTRIES - 1)) + 1)
    # Entries equal to the threshold, itself one of them, are not above it: in float32 there may be a few.
    ties = int((K.abs() == K.abs()[~mask].max()).sum()) - 1
    assert expected - ties <= int(delta.count_nonzero()) <= expected
    assert ties == 0 or made.x.dtype == torch.float32
    assert ties < 100


def test_the_output_is_that_of_the_merged_weight(made: Run) -> None:
    base = made.layer.get_base_layer()
    K, mask = kernel_and_mask(made)
    weight = base.weight.double() + (K * K.abs() * mask).double().view_as(base.weight)
    expected = F.conv2d(made.x.double(), weight, base.bias.double(), padding=1)
    error = ((made.y.double() - expected).abs().max() / expected.abs().max()).item()
    # 23,040 products an entry: sqrt of it times an ulp, and a weight that was rounded once.
    assert error < (1e-12 if made.x.dtype == torch.float64 else 1e-5)
    without = F.conv2d(made.x.double(), base.weight.double(), base.bias.double(), padding=1)
    assert (without - expected).abs().max() > 0.01 * expected.abs().max()


def test_the_gradient_is_that_of_the_specification_in_float64(made: Run) -> None:
    """The loss ⟨y, dy⟩ is ⟨ΔW, dW⟩ and a constant, dW the convolution's own gradient; some rows at a time."""
    K, mask = kernel_and_mask(made)
    dW = conv2d_weight(made.x.double(), (OUT, IN, 3, 3), made.dy.double(), padding=1).flatten(1)
    gated = dW * (K.abs() * mask).double()
    A, B = (made.factor(name).detach().double().requires_grad_() for name in ("snell_A", "snell_B"))
    for start in range(0, OUT, ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        block = kernel_matrix_reference(A[0], B[0][:, rows], kernel="distance", scale=SCALE, kernel_params={})
        (block * gated[rows]).sum().backward()
    tolerance = 1e-10 if made.x.dtype == torch.float64 else 1e-3  # float32: distances of close points lose digits
    for factor, reference in (("snell_A", A), ("snell_B", B)):
        actual, expected = made.factor(factor).grad, reference.grad
        assert actual is not None
        assert expected is not None
        assert ((actual.double() - expected).abs().max() / expected.abs().max()).item() < tolerance
