"""The products by oneDNN are the products: same numbers, any layout, and a choice that can be taken away."""

from collections.abc import Iterator

import pytest
import torch

from snell_scale.kernels.merge import cpu_products, merge_linear

from .merge_cases import assert_close, make_case

# float32 sums of up to 300 terms in another order.
TOLERANCE = 2e-6


@pytest.fixture(params=["mkl", "onednn"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each choice in turn, whatever this machine's own would be."""
    monkeypatch.setenv("SNELL_SCALE_CPU_PRODUCTS", request.param)
    cpu_products._prefers_onednn.cache_clear()
    yield request.param
    cpu_products._prefers_onednn.cache_clear()


@pytest.mark.parametrize(("tokens", "num_in", "num_out"), [(1, 1, 1), (1, 7, 5), (33, 300, 65), (130, 64, 2)])
@pytest.mark.parametrize("is_strided", [False, True])
def test_both_products_are_the_products(tokens: int, num_in: int, num_out: int, is_strided: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, weight = (torch.randn(size, num_in, generator=generator) for size in (tokens, num_out))
    bias, dy = torch.randn(num_out, generator=generator), torch.randn(tokens, num_out, generator=generator)
    if is_strided:
        rows, weight, dy = (each.T.contiguous().T for each in (rows, weight, dy))
    for offset in (None, bias):
        y = cpu_products.product(rows, weight, offset)
        exact = torch.nn.functional.linear(
            rows.double(), weight.double(), None if offset is None else offset.double()
        )
        assert_close({"y": y}, {"y": exact.float()}, tolerance=TOLERANCE)
    dx = cpu_products.product_backward(dy, weight)
    assert_close({"dx": dx}, {"dx": (dy.double() @ weight.double()).float()}, tolerance=TOLERANCE)


@pytest.mark.parametrize("shape", [(37,), (1, 37), (2, 5, 37), (0, 37)])
def test_the_op_gives_the_same_with_either(library: str, shape: tuple[int, ...]) -> None:
    case = make_case(groups=2, rows=21, num_in=37, dtype=torch.float32)
    case.x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
    case.dy = torch.randn(*shape[:-1], 42, generator=torch.Generator().manual_seed(2))
    assert cpu_products.has_faster_product(torch.ones(2, 2)) == (library == "onednn")
    y = merge_linear(case.x, case.weight, case.A, case.B, case.bias, **case.settings)
    by_reference = merge_linear(
        case.x, case.weight, case.A, case.B, case.bias, implementation="reference", **case.settings
    )
    # dA and dB of close pairs, see test_merge_precision.py.
    assert_close(case.gradients(y), case.gradients(by_reference), tolerance=1e-5)


@pytest.mark.usefixtures("library")
def test_only_float32_on_cpu_is_taken() -> None:
    for rows in (
        torch.ones(2, 2, dtype=torch.float64),
        torch.ones(2, 2, dtype=torch.bfloat16),
        torch.ones(2, 2, device="meta"),
        torch.ones(0, 2),
    ):
        assert not cpu_products.has_faster_product(rows)


def test_an_unknown_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SNELL_SCALE_CPU_PRODUCTS", "blas")
    cpu_products._prefers_onednn.cache_clear()
    with pytest.raises(ValueError, match="'blas'; expected auto, mkl or onednn"):
        cpu_products.has_faster_product(torch.ones(2, 2))
    cpu_products._prefers_onednn.cache_clear()
