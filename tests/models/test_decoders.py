"""Decoders against the published computations, written out in plain torch."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from snell_scale.models.segmentation.decoders.blocks import ConvNormRelu, PixelClassifier, resized
from snell_scale.models.segmentation.decoders.linear import LinearDecoder
from snell_scale.models.segmentation.decoders.pyramids import NormalizedMaps, PyramidOfPlainMaps
from snell_scale.models.segmentation.decoders.setr_pup import SetrPup, setr_auxiliary, setr_pup
from snell_scale.models.segmentation.decoders.upernet import UPerNet, upernet_auxiliary

NUM_CLASSES = 3
WIDTHS = (6, 8, 10, 12)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def used(module: nn.Module) -> nn.Module:
    """In evaluation mode, with norms that have seen data and classifiers that say something."""
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d | nn.LayerNorm):
            nn.init.uniform_(child.weight, 0.5, 1.5)
            nn.init.uniform_(child.bias, -0.5, 0.5)
        if isinstance(child, nn.BatchNorm2d):
            assert child.running_mean is not None
            assert child.running_var is not None
            child.running_mean.uniform_(-0.5, 0.5)
            child.running_var.uniform_(0.5, 1.5)
        if isinstance(child, PixelClassifier):
            nn.init.normal_(child.get_submodule("1").get_parameter("weight"))
    return module.eval()


def pyramid(side: int = 16) -> list[Tensor]:
    return [torch.randn(2, width, side >> level, side >> level) for level, width in enumerate(WIDTHS)]


def conv_norm_relu(block: nn.Module, x: Tensor) -> Tensor:
    weights = dict(block.named_parameters()) | dict(block.named_buffers())
    x = F.conv2d(x, weights["0.weight"], padding=weights["0.weight"].shape[-1] // 2)
    mean, variance = weights["1.running_mean"], weights["1.running_var"]
    return F.relu(F.batch_norm(x, mean, variance, weights["1.weight"], weights["1.bias"], eps=1e-5))


def classified(classifier: nn.Module, x: Tensor) -> Tensor:
    weights = dict(classifier.named_parameters())
    return F.conv2d(x, weights["1.weight"], weights["1.bias"])


def upsampled(x: Tensor, like: Sequence[int]) -> Tensor:
    return F.interpolate(x, size=tuple(like), mode="bilinear", align_corners=False)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Up to the rounding of float32 sums of a few hundred products in another order."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def test_resizing_does_not_align_corners() -> None:
    line = resized(torch.tensor([0.0, 1.0]).view(1, 1, 1, 2), (1, 4))
    # With aligned corners: 0, 1/3, 2/3, 1.
    assert line.flatten().tolist() == [0.0, 0.25, 0.75, 1.0]


def test_a_convolution_keeps_odd_sizes_and_starts_scaled_to_its_outputs() -> None:
    block = ConvNormRelu(64, 128, kernel_size=3)
    assert block(torch.randn(2, 64, 5, 7)).shape == (2, 128, 5, 7)
    conv = block[0]
    assert isinstance(conv, nn.Conv2d)
    assert conv.bias is None
    # He's rule over the 128·9 outputs; 74 thousand draws make the estimate good to 0.3 %.
    assert conv.weight.std().item() == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.02)


def test_a_classifier_starts_near_zero_and_drops_whole_channels_in_training_only() -> None:
    classifier = PixelClassifier(512, NUM_CLASSES, dropout=0.5)
    conv = classifier[1]
    assert isinstance(conv, nn.Conv2d)
    assert conv.bias is not None
    assert conv.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert not conv.bias.any()
    x = torch.ones(1, 512, 2, 2)
    assert torch.equal(classifier.eval()(x), conv(x))
    trained = classifier.train()(x)
    assert not torch.allclose(trained, conv(x))
    assert torch.equal(trained, trained[..., :1, :1].expand_as(trained))


def test_linear_is_linear_in_the_last_map() -> None:
    decoder = used(LinearDecoder(12, NUM_CLASSES, batch_norm=False, dropout=0.0))
    maps = pyramid()
    both = decoder([maps[-1]]) + decoder([2 * maps[-1]]) - decoder([torch.zeros_like(maps[-1])])
    assert_same(decoder([3 * maps[-1]]), both)
    assert torch.equal(decoder(maps), decoder([maps[-1]]))
    assert sum(p.numel() for p in decoder.parameters()) == 12 * NUM_CLASSES + NUM_CLASSES


def test_linear_with_batch_norm_normalizes_each_channel_first() -> None:
    decoder = LinearDecoder(12, NUM_CLASSES, batch_norm=True, dropout=0.0)
    x = torch.randn(4, 12, 5, 5)
    # Scale and offset of a channel do not survive a batch norm; its eps of 1e-5 shows at variances near 1.
    torch.testing.assert_close(decoder([x * 7 + 3]), decoder([x]), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("num_convs", "scale"), [(4, 2), (2, 4)], ids=["decoder", "auxiliary"])
def test_setr_pup_with_the_image_size_is_what_was_published(num_convs: int, scale: int) -> None:
    """Published: the classifier comes after the last upsampling; here before it."""
    decoder = used(SetrPup(12, NUM_CLASSES, channels=8, num_convs=num_convs, scale=scale, dropout=0.0))
    image_map = torch.randn(2, 12, 3, 5)
    norm = decoder.get_submodule("norm")
    x = F.layer_norm(
        image_map.permute(0, 2, 3, 1), (12,), norm.get_parameter("weight"), norm.get_parameter("bias"), 1e-6
    ).permute(0, 3, 1, 2)
    for i in range(num_convs):
        x = conv_norm_relu(decoder.get_submodule(f"convs.{i}"), x)
        x = F.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=False)
    expected = classified(decoder.get_submodule("classifier"), x)
    assert expected.shape == (2, NUM_CLASSES, 48, 80)
    assert_same(resized(decoder([image_map]), (48, 80)), expected)


def test_setr_auxiliary_heads_each_look_at_their_map() -> None:
    heads = setr_auxiliary(WIDTHS, NUM_CLASSES, channels=8)
    maps = [torch.randn(2, width, 3, 3, requires_grad=True) for width in WIDTHS]
    outputs = heads(maps)
    assert [tuple(out.shape) for out in outputs] == [(2, NUM_CLASSES, 12, 12)] * 3
    for i, out in enumerate(outputs):
        gradients = torch.autograd.grad(out.sum(), maps, allow_unused=True)
        assert [gradient is not None for gradient in gradients] == [place == i for place in range(4)]


def test_upernet_is_what_was_published() -> None:
    decoder = used(UPerNet(WIDTHS, NUM_CLASSES, channels=8, dropout=0.1))
    maps = pyramid()
    part = decoder.get_submodule
    pooled = [maps[-1]]
    for i, scale in enumerate((1, 2, 3, 6)):
        branch = conv_norm_relu(part(f"pooling.branches.{i}.1"), F.adaptive_avg_pool2d(maps[-1], scale))
        pooled.append(upsampled(branch, maps[-1].shape[-2:]))
    laterals = [conv_norm_relu(part(f"laterals.{i}"), maps[i]) for i in range(3)]
    laterals.append(conv_norm_relu(part("pooling.fuse"), torch.cat(pooled, dim=1)))
    for i in (2, 1, 0):
        laterals[i] = laterals[i] + upsampled(laterals[i + 1], laterals[i].shape[-2:])
    outputs = [conv_norm_relu(part(f"smooth.{i}"), laterals[i]) for i in range(3)] + [laterals[3]]
    fused = torch.cat([upsampled(x, laterals[0].shape[-2:]) for x in outputs], dim=1)
    expected = classified(part("classifier"), conv_norm_relu(part("fuse"), fused))
    assert expected.shape == (2, NUM_CLASSES, 16, 16)
    assert_same(decoder(maps), expected)


def test_upernet_needs_two_images_to_train_on() -> None:
    decoder = UPerNet(WIDTHS, NUM_CLASSES, channels=8, dropout=0.0)
    maps = [level[:1] for level in pyramid()]
    with pytest.raises(ValueError, match="at least 2 images at once.*training.batch_size"):
        decoder(maps)
    assert decoder.eval()(maps).shape == (1, NUM_CLASSES, 16, 16)


def test_upernet_auxiliary_head_looks_at_the_third_map() -> None:
    (logits,) = upernet_auxiliary(WIDTHS, NUM_CLASSES, dropout=0.0)(pyramid())
    assert logits.shape == (2, NUM_CLASSES, 4, 4)


def test_decoders_take_maps_of_odd_sizes() -> None:
    plain = [torch.randn(2, 12, 5, 3) for _ in range(4)]
    levels = PyramidOfPlainMaps((12,) * 4)(plain)
    assert [tuple(level.shape[-2:]) for level in levels] == [(20, 12), (10, 6), (5, 3), (3, 2)]
    assert torch.equal(levels[2], plain[2])
    assert UPerNet((12,) * 4, NUM_CLASSES, channels=8, dropout=0.0)(levels).shape == (2, NUM_CLASSES, 20, 12)
    assert setr_pup((12,) * 4, NUM_CLASSES, channels=8, dropout=0.0)(plain).shape == (2, NUM_CLASSES, 40, 24)


def test_normalized_maps_have_mean_0_and_variance_1_over_channels() -> None:
    levels = NormalizedMaps(WIDTHS)([10 * level + 5 for level in pyramid()])
    for level in levels:
        # The eps of 1e-6 beside variances of about 100.
        torch.testing.assert_close(level.mean(1), torch.zeros_like(level.mean(1)), atol=1e-5, rtol=0)
        variance = level.var(1, unbiased=False)
        torch.testing.assert_close(variance, torch.ones_like(variance), atol=1e-4, rtol=0)
