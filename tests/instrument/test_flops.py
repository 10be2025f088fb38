"""FLOPs counted by hand, against FlopCounterMode, and for a published model."""

from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from snell_scale.instrument.device_peaks import peak_flops_per_s
from snell_scale.instrument.flops import FlopCounter, product_dtype, utilisation
from snell_scale.kernels.merge import delta_weight, merge_conv2d, merge_linear

ROWS, IN, OUT, RANK = 6, 96, 64, 8
PRODUCT = 2 * ROWS * IN * OUT


def counted(step: Callable[[], Tensor], *, backward: bool = True) -> dict[str, int]:
    with FlopCounter() as counter:
        loss = step().sum()
        if backward:
            with counter.backward():
                loss.backward()
    return counter.report()


def factors(num_groups: int = 1, *, num_in: int = IN) -> tuple[Tensor, Tensor]:
    A = torch.randn(num_groups, 2, num_in, RANK // 2, requires_grad=True)
    B = torch.randn(num_groups, 2, OUT // num_groups, RANK // 2, requires_grad=True)
    return A, B


@pytest.mark.parametrize(("trains_weight", "trains_input"), [(True, True), (True, False), (False, True)])
def test_a_linear_layer_costs_a_product_forward_and_one_for_each_gradient(
    trains_weight: bool, trains_input: bool
):
    weight = torch.randn(OUT, IN, requires_grad=trains_weight)
    x = torch.randn(ROWS, IN, requires_grad=trains_input)
    num_products = 1 + trains_weight + trains_input
    expected = {
        "model_flops": num_products * PRODUCT,
        "hardware_flops": num_products * PRODUCT,
        "kernel_flops": 0,
    }
    assert counted(lambda: F.linear(x, weight)) == expected


@pytest.mark.parametrize("sparsity", [None, 0.5])
@pytest.mark.parametrize("num_groups", [1, 2])
def test_the_merge_op_costs_three_products_and_the_kernel_beside_them(sparsity: float | None, num_groups: int):
    A, B = factors(num_groups)
    x, weight = torch.randn(2, ROWS // 2, IN, requires_grad=True), torch.randn(OUT, IN)
    found = counted(lambda: merge_linear(x, weight, A, B, sparsity=sparsity))
    assert found["model_flops"] == found["hardware_flops"] == 3 * PRODUCT
    # K once for τ (dense there is none), for y, and for the gradients, which go back to A and to B.
    num_evaluations = 2 if sparsity is None else 3
    entries = (OUT // num_groups) * IN * num_groups
    assert found["kernel_flops"] == entries * RANK * (3 * num_evaluations + 4)


def test_the_merge_op_computes_only_the_gradients_asked_for():
    A, B = factors()
    x, weight = torch.randn(ROWS, IN), torch.randn(OUT, IN)
    assert counted(lambda: merge_linear(x, weight, A, B, sparsity=0.5))["model_flops"] == 2 * PRODUCT
    asks_dx = x.clone().requires_grad_()
    frozen = [factor.detach() for factor in (A, B)]
    assert counted(lambda: merge_linear(asks_dx, weight, *frozen, sparsity=0.5))["model_flops"] == 2 * PRODUCT
    bias = torch.randn(OUT, requires_grad=True)
    found = counted(lambda: merge_linear(x, weight, frozen[0], frozen[1], bias, sparsity=0.5))
    assert found["model_flops"] == PRODUCT
    assert counted(lambda: delta_weight(A, B, sparsity=0.5))["model_flops"] == 0  # no product at all


def test_a_merged_convolution_costs_what_the_convolution_does():
    A, B = factors(num_in=4 * 9)
    x, weight = torch.randn(2, 4, 10, 10, requires_grad=True), torch.randn(OUT, 4, 3, 3)
    found = counted(lambda: merge_conv2d(x, weight, A, B, sparsity=0.5, stride=2))
    plain = weight.clone().requires_grad_()
    expected = counted(lambda: F.conv2d(x, plain, stride=2))
    assert found["model_flops"] == expected["model_flops"] == 3 * 2 * (2 * 4 * 4) * OUT * 4 * 9


def test_grouped_and_transposed_convolutions_cost_the_same_forward_and_for_each_gradient():
    x = torch.randn(2, 8, 5, 5, requires_grad=True)
    depthwise = torch.randn(8, 1, 3, 3, requires_grad=True)
    found = counted(lambda: F.conv2d(x, depthwise, groups=8))
    assert found["model_flops"] == 3 * 2 * (2 * 3 * 3) * 8 * 9
    weight = torch.randn(8, 4, 3, 3, requires_grad=True)
    found = counted(lambda: F.conv_transpose2d(x, weight))
    assert found["model_flops"] == 3 * 2 * (2 * 5 * 5) * 8 * 4 * 9


def test_torchs_own_counter_agrees_and_knows_the_merge_op_and_attention_on_cpu():
    A, B = factors()
    weight = torch.randn(OUT, IN, requires_grad=True)
    x = torch.randn(1, ROWS, IN, requires_grad=True)

    def step() -> Tensor:
        y = merge_linear(x, weight, A, B, sparsity=0.5)
        heads = y.view(1, ROWS, 4, OUT // 4).transpose(1, 2)
        return F.scaled_dot_product_attention(heads, heads, heads) @ torch.ones(OUT // 4, 3)

    found = counted(step)
    with FlopCounterMode(display=False) as other:
        step().sum().backward()
    scores = 2 * ROWS * ROWS * OUT
    assert found["hardware_flops"] == other.get_total_flops()
    # Fused attention computes its scores once more in backward.
    assert found["hardware_flops"] - found["model_flops"] == scores
    last = 2 * ROWS * OUT * 3
    assert found["model_flops"] == 3 * PRODUCT + 3 * 2 * scores + 2 * last


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_what_checkpointing_computes_again_is_no_model_flop(use_reentrant: bool):
    block = nn.Sequential(nn.Linear(IN, OUT), nn.GELU(), nn.Linear(OUT, IN))
    x = torch.randn(ROWS, IN, requires_grad=True)
    plain = counted(lambda: block(x))
    found = counted(lambda: checkpoint(block, x, use_reentrant=use_reentrant))
    assert found["model_flops"] == plain["model_flops"] == plain["hardware_flops"] == 6 * PRODUCT
    # Without reentrance it stops before the last layer, whose output nothing in backward needs.
    num_again = 2 if use_reentrant else 1
    assert found["hardware_flops"] - found["model_flops"] == num_again * PRODUCT


def test_a_published_model_costs_what_is_published():
    """ViT-L/16, 61.55 G multiply-adds an image: on shapes alone, with fused attention and without."""
    with torch.device("meta"):
        module, image = timm.create_model("vit_large_patch16_224"), torch.empty(1, 3, 224, 224)
        unfused = counted(lambda: module(image), backward=False)
    with FakeTensorMode(allow_non_fake_inputs=True):
        module = module.to_empty(device="cpu")
        image = torch.empty(1, 3, 224, 224)
        fused = counted(lambda: module(image), backward=False)
        step = counted(lambda: module(image))
    assert round(unfused["model_flops"] / 1e9, 1) == 123.1
    assert fused == unfused
    # Backward is twice as much, but for the images, which need no gradient.
    patches = 2 * 196 * 3 * 16 * 16 * 1024
    assert step["model_flops"] == 3 * fused["model_flops"] - patches


@pytest.mark.parametrize(
    ("name", "dtype", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 PCIe", "bf16", 756.0),
        ("NVIDIA H100 NVL", "tf32", 417.5),
        ("NVIDIA H200", "fp32", 67.0),
        ("NVIDIA A100-SXM4-80GB", "fp16", 312.0),
        ("NVIDIA A10", "bf16", 125.0),
        ("NVIDIA L4", "bf16", 121.0),
        ("NVIDIA L40S", "bf16", 362.05),
        ("Tesla V100-SXM2-32GB", "fp16", 125.0),
        ("Tesla V100-SXM2-32GB", "bf16", None),  # it has none
        ("Tesla T4", "fp16", 65.0),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("NVIDIA A10G", "bf16", None),  # another device
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16", None),  # a part of a device
        ("A card of tomorrow", "bf16", None),
    ],
)
def test_peaks_of_devices(name: str, dtype: str, tflops: float | None):
    assert peak_flops_per_s(name, dtype) == (None if tflops is None else 1e12 * tflops)


def test_utilisation_is_a_share_of_what_the_device_can_do(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100-SXM4-80GB")
    flops = {"model_flops": 78 * 10**12, "hardware_flops": 156 * 10**12, "kernel_flops": 5}
    cuda = torch.device("cuda", 0)
    found = utilisation(flops, step_ms=1000.0, device=cuda, dtype="bf16")
    assert (found["mfu"], found["hfu"]) == (0.25, 0.5)
    assert found["peak_flops_per_s"] == 312e12
    untimed = utilisation(flops, step_ms=None, device=cuda, dtype="bf16")
    assert (untimed["mfu"], untimed["hfu"]) == (None, None)
    on_cpu = utilisation(flops, step_ms=1000.0, device=torch.device("cpu"), dtype="fp32")
    assert on_cpu == {**flops, "dtype": "fp32", "peak_flops_per_s": None, "mfu": None, "hfu": None}


def test_products_are_computed_in_the_dtype_of_autocast(monkeypatch: pytest.MonkeyPatch):
    assert product_dtype("fp16", "fp32") == "fp16"
    assert product_dtype("fp32", "bf16") == "bf16"  # which takes autocast too
    assert product_dtype("fp32", "fp32") == "fp32"
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert product_dtype("fp32", "fp32") == "tf32"
