"""GPS: the selection against a by-hand top-k, and everything not selected bit-equal after training."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.tuners.methods.tiny_training import apply, loss_of, save, select, set_up, train, vit

MATRICES = {"patch_embed.proj"} | {
    f"blocks.{i}.{layer}" for i in range(2) for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
}


def by_hand(name: str, count: int) -> set[tuple[int, int]]:
    """(row, column) of the largest |Σ gradient| in each row, with autograd alone."""
    bundle = vit()
    weight = bundle.module.get_parameter(f"{name}.weight")
    tuner = type("Model", (), {"module": bundle.module})
    total = sum(torch.autograd.grad(loss_of(tuner, bundle, seed), weight)[0] for seed in range(2))
    assert isinstance(total, torch.Tensor)
    chosen = set()
    for row, values in enumerate(total.flatten(1).abs().tolist()):
        ranked = sorted(range(len(values)), key=lambda column: -values[column])
        chosen |= {(row, column) for column in ranked[:count]}
    return chosen


@pytest.mark.parametrize("per_neuron", [1, 3])
def test_exactly_the_largest_summed_gradients_of_each_row_train(per_neuron: int) -> None:
    bundle = vit()
    tuner = apply("gps", bundle, per_neuron=per_neuron)
    before = {n: p.detach().clone() for n, p in bundle.module.named_parameters()}
    train(tuner, bundle)  # with weight decay on everything that allows it
    for name in MATRICES:
        weight = bundle.module.get_parameter(f"{name}.weight")
        moved = (weight != before[f"{name}.weight"]).flatten(1).nonzero().tolist()
        assert {(row, column) for row, column in moved} == by_hand(name, per_neuron)


def test_norms_and_embeddings_are_frozen_biases_and_head_whole() -> None:
    tuner = apply("gps", vit())
    trainable = {n for n, p in tuner.module.named_parameters() if p.requires_grad}
    biases = {f"{name}.bias" for name in MATRICES}
    assert trainable == {f"{name}.weight" for name in MATRICES} | biases | {"head.weight", "head.bias"}


def test_selection_leaves_no_gradient_and_no_changed_weight() -> None:
    bundle = vit()
    tuner = apply("gps", bundle)
    before = {n: p.detach().clone() for n, p in bundle.module.named_parameters()}
    select(tuner, (loss_of(tuner, bundle, seed) for seed in range(2)))
    assert all(p.grad is None for p in bundle.module.parameters())
    assert all(torch.equal(p, before[n]) for n, p in bundle.module.named_parameters())


def test_masking_holds_over_accumulated_microbatches() -> None:
    bundle = vit()
    tuner = apply("gps", bundle)
    select(tuner, (loss_of(tuner, bundle, seed) for seed in range(2)))
    set_up(tuner)
    for seed in (5, 6):
        loss_of(tuner, bundle, seed).backward()
    gradient = bundle.module.get_parameter("blocks.1.mlp.fc2.weight").grad
    assert gradient is not None
    assert {(r, c) for r, c in gradient.nonzero().tolist()} <= by_hand("blocks.1.mlp.fc2", 1)


def test_a_resumed_run_trains_the_same_entries() -> None:
    bundle, other = vit(), vit()
    tuner, resumed = apply("gps", bundle), apply("gps", other)
    train(tuner, bundle, steps=1)
    resumed.load_state_dict(tuner.state_dict())
    before = other.module.get_parameter("blocks.0.attn.qkv.weight").detach().clone()
    train(resumed, other, steps=2, first=1)  # does not select again
    moved = (other.module.get_parameter("blocks.0.attn.qkv.weight") != before).nonzero().tolist()
    assert {(r, c) for r, c in moved} == by_hand("blocks.0.attn.qkv", 1)


def test_the_file_holds_only_the_selected_entries(tmp_path: Path) -> None:
    bundle = vit()
    tuner = apply("gps", bundle)
    train(tuner, bundle)
    save(tuner, tmp_path)
    content = load_file(tmp_path / "trained.safetensors")
    assert sum(t.numel() for n, t in content.items() if not n.endswith("#indices")) == tuner.num_trainable()
    assert content["blocks.0.mlp.fc1.weight#indices"].dtype == torch.int32


def test_gradients_that_cannot_rank_are_refused() -> None:
    bundle = vit()
    tuner = apply("gps", bundle)
    torch.nn.init.zeros_(bundle.module.get_parameter("head.weight"))
    with pytest.raises(ValueError, match="every gradient is zero: is the head all zeros"):
        select(tuner, [loss_of(tuner, bundle)])
    with pytest.raises(ValueError, match="every gradient is zero"):
        select(apply("gps", vit()), [])
    bundle = vit()
    tuner = apply("gps", bundle)
    with pytest.raises(ValueError, match="not finite"):
        select(tuner, [loss_of(tuner, bundle) * float("nan")])


def test_a_selection_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="selection is of other weights"):
        apply("gps", vit()).load_state_dict({"chosen": {"fc.weight": torch.arange(3)}})
