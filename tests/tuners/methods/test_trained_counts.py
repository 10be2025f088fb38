"""Trainable parameters of every method on the tiny ViT, counted by hand."""

from typing import Any

import pytest

from tests.tuners.methods.tiny_training import apply, vit

# Width 24, 2 blocks, MLP 48, 3 classes, 4×4 patches of one channel, 4 patches and a class token.
D, M, BLOCKS = 24, 48, 2
HEAD = 3 * D + 3
BLOCK_MATRICES = [(3 * D, D), (D, D), (M, D), (D, M)]
BLOCK_BIASES = 3 * D + D + M + D
PATCH = D * 16
BIASES = D + BLOCKS * (BLOCK_BIASES + 2 * D) + D  # patch embedding, blocks with two norms each, last norm
WEIGHTS = PATCH + BLOCKS * (sum(m * n for m, n in BLOCK_MATRICES) + 2 * D) + D
FULL = WEIGHTS + BIASES + HEAD + D + 5 * D  # class token, position embedding
R = 4
LORA = BLOCKS * sum(R * (m + n) for m, n in BLOCK_MATRICES)
# q, k and v have factors of their own
SNELL_MATRICES = [(D, D)] * 3 + [(D, D), (M, D), (D, M)]
SNELL = BLOCKS * sum(R * (m + n) for m, n in SNELL_MATRICES)
ROWS = D + BLOCKS * sum(m for m, _ in BLOCK_MATRICES)
# all biases but those of norms
GPS = ROWS + D + BLOCKS * BLOCK_BIASES + HEAD


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("probe", {}, HEAD),
        ("probe", {"train_extra": True}, HEAD + D),
        ("bias", {}, BIASES + HEAD),
        ("full", {}, FULL),
        ("lora", {}, LORA + HEAD),
        ("lora", {"targets": "attention"}, BLOCKS * R * (4 * D + 2 * D) + HEAD),
        ("shira", {}, LORA + HEAD),  # as many as LoRA, by design
        ("klora", {}, SNELL + HEAD),
        ("snell", {"train_extra": True}, SNELL + HEAD + D),
        ("snell", {"targets": ["fc1"]}, BLOCKS * R * (M + D) + HEAD),
        ("snella", {}, SNELL + 3 * 6 * BLOCKS + HEAD),  # three scalars per matrix
        ("gps", {}, GPS),
        ("gps", {"per_neuron": 3}, GPS + 2 * ROWS),
        # 16 inputs per patch row are all there are
        ("gps", {"per_neuron": 20}, GPS + 19 * (ROWS - D) + 15 * D),
    ],
)
def test_counts(name: str, changes: dict[str, Any], expected: int) -> None:
    assert apply(name, vit(), **changes).num_trainable() == expected
