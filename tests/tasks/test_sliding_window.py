"""Windows, scales and flips against averages by hand."""

import pytest
import torch
from torch import Tensor, nn

from snell_scale.tasks.sliding_window import Inference, window_starts
from tests.tasks.test_segmentation import Pixelwise, example


class Places(nn.Module):
    """Not local at all: what it says of a pixel is the pixel's row in the window that it is shown."""

    def forward(self, image: Tensor) -> Tensor:
        rows = torch.arange(float(image.shape[-2])).view(1, 1, -1, 1).expand(len(image), 1, -1, image.shape[-1])
        return torch.cat([rows, -rows], dim=1)


@pytest.mark.parametrize(
    ("side", "window", "stride", "expected"),
    [(10, 4, 3, [0, 3, 6]), (10, 4, 4, [0, 4, 6]), (4, 4, 2, [0]), (5, 4, 4, [0, 1])],
)
def test_windows_cover_a_side_and_end_with_it(side: int, window: int, stride: int, expected: list[int]) -> None:
    assert window_starts(side, window, stride) == expected


def test_overlapping_windows_are_averaged() -> None:
    inference = Inference(window=(4, 4), stride=(2, 4))
    logits = inference.log_probabilities(Places(), torch.zeros(1, 3, 6, 4), (6, 4))[0, :, :, 0]
    # Two windows, from rows 0 and 2: rows 2 and 3 are row 2 and 3 of the first, 0 and 1 of the second.
    rows = torch.tensor([0, 1, (2 + 0) / 2, (3 + 1) / 2, 2, 3])
    assert torch.allclose(logits, torch.stack([rows, -rows]).log_softmax(0))


@pytest.mark.parametrize("windows_per_forward", [1, 4, 100])
@pytest.mark.parametrize("size", [(6, 7), (3, 9), (3, 3)])
def test_sliding_equals_whole_for_a_local_model(size: tuple[int, int], windows_per_forward: int) -> None:
    images = example(size=size)["image"]
    sliding = Inference(window=(4, 4), stride=(3, 2), windows_per_forward=windows_per_forward)
    whole = Inference().log_probabilities(Pixelwise(), images, size)
    # Logits are small whole numbers: sums over windows and their division are exact.
    assert torch.equal(sliding.log_probabilities(Pixelwise(), images, size), whole)


def test_scales_and_flips_average_probabilities_at_the_masks_size() -> None:
    images, model = example(size=(8, 8))["image"], Pixelwise()
    size = (5, 9)

    def probabilities(shown: Tensor, *, mirrored: bool) -> Tensor:
        logits = model(shown.flip(-1) if mirrored else shown)
        logits = logits.flip(-1) if mirrored else logits
        return nn.functional.interpolate(logits, size=size, mode="bilinear").softmax(1)

    small = nn.functional.interpolate(images, scale_factor=0.5, mode="bilinear", antialias=True)
    parts = [probabilities(shown, mirrored=mirrored) for shown in (images, small) for mirrored in (False, True)]
    found = Inference(scales=(1.0, 0.5), flip=True).log_probabilities(model, images, size)
    # float32 logarithms and their inverse
    assert torch.allclose(found.exp(), sum(parts, torch.zeros(())) / 4, atol=1e-6)


@pytest.mark.parametrize(
    "inference",
    [
        Inference(),
        Inference(scales=(0.5, 1.0, 1.3), flip=True, multiple=4),
        Inference(window=(4, 4), stride=(3, 3), scales=(1.0, 2.0), flip=True, windows_per_forward=3),
    ],
)
def test_the_number_of_forwards_is_foretold_and_idle_ones_look_alike(inference: Inference) -> None:
    images, model = example(size=(6, 7))["image"], Pixelwise()
    inference.log_probabilities(model, images, (6, 7))
    assert len(model.shapes) == inference.num_forwards(images)
    inference.idle_forward(model, images)
    assert model.shapes[-1][1:] in {shape[1:] for shape in model.shapes[:-1]}


def test_whole_images_are_brought_to_multiples() -> None:
    model = Pixelwise()
    result = Inference(multiple=4).log_probabilities(model, torch.zeros(2, 3, 6, 8), (6, 8))
    assert model.shapes == [(2, 3, 8, 8)]
    assert result.shape == (2, 4, 6, 8)
