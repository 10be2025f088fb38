"""SNELLA in the loop: budgets at the right steps, figures for the log, resuming."""

from dataclasses import replace

import pytest
import torch

from tests.tuners.methods.tiny_training import apply, train, vit

# q, k, v, proj (24×24), fc1, fc2 (48×24) in two blocks
ENTRIES = 2 * (4 * 24 * 24 + 2 * 48 * 24)
NUM_MATRICES = 12


def sparsities(module: torch.nn.Module) -> dict[str, list[float]]:
    return {n: b.tolist() for n, b in module.named_buffers() if "snell_sparsity" in n}


def budget(tick: int, ticks: int, *, target: float, init_warmup: int = 0, final_warmup: int = 0) -> float:
    """METHOD: a cubic from all entries to the share 1 − target, by ticks."""
    last = (1 - target) * ENTRIES
    if tick <= init_warmup:
        return ENTRIES
    if tick > ticks - final_warmup:
        return last
    progress = (tick - init_warmup) / (ticks - final_warmup - init_warmup)
    return last + (ENTRIES - last) * (1 - progress) ** 3


def test_the_budget_is_shared_out_at_every_epoch_start() -> None:
    bundle = vit()
    tuner = apply("snella", bundle)  # 40 steps, 4 per epoch: 10 ticks
    figures = train(tuner, bundle, steps=12)
    assert [bool(f) for f in figures] == [step in (4, 8) for step in range(12)]
    for epoch in (1, 2):
        nonzeros = figures[4 * epoch]["nonzeros"]
        # sharing drops fractions of an entry, at most one per matrix, and the budget is floored
        assert budget(epoch, 10, target=0.8) - NUM_MATRICES - 1 <= nonzeros <= budget(epoch, 10, target=0.8)
        assert figures[4 * epoch]["sparsity"] == pytest.approx(1 - nonzeros / ENTRIES, abs=1e-4)
    assert len({s for shares in sparsities(tuner.module).values() for s in shares}) > 1, "nobody competed"


def test_the_figures_have_the_share_of_every_matrix() -> None:
    bundle = vit()
    tuner = apply("snella", bundle)
    figures = train(tuner, bundle, steps=5)[4]
    logged = {key: value for key, value in figures.items() if key.startswith("sparsity/")}
    expected = {}
    for buffer, shares in sparsities(tuner.module).items():
        layer = buffer.removeprefix("base_model.model.").removesuffix(".snell_sparsity.default")
        expected |= {f"sparsity/{layer}/{index}": share for index, share in enumerate(shares)}
    assert "sparsity/blocks.0.attn.qkv/2" in expected
    assert logged == pytest.approx(expected, abs=1e-6)


def test_of_very_many_ticks_only_some_have_the_share_of_every_matrix() -> None:
    tuner = apply("snella", vit())
    competition = tuner.module.base_model.competition()
    competition._allocator.schedule = replace(competition._allocator.schedule, total_ticks=1000, mask_interval=2)
    allocation = {name: [0.5] * count for name, (count, _) in competition._allocator.matrices.items()}
    logged = [tick for tick in range(1000) if len(competition.figures(allocation, tick)) > 2]
    assert logged == [*range(0, 1000, 6), 999]


def test_ticks_can_be_steps() -> None:
    bundle = vit()
    tuner = apply("snella", bundle, tick="step", mask_interval=2, init_warmup=3)
    figures = train(tuner, bundle, steps=8)
    assert [bool(f) for f in figures] == [step in (4, 6) for step in range(8)]
    limit = budget(6, 40, target=0.8, init_warmup=3)
    assert limit - NUM_MATRICES - 1 <= figures[6]["nonzeros"] <= limit


def test_the_last_ticks_hold_the_target() -> None:
    bundle = vit()
    tuner = apply("snella", bundle, final_warmup=8)
    figures = train(tuner, bundle, steps=13)
    assert figures[12]["nonzeros"] == pytest.approx(0.2 * ENTRIES, abs=NUM_MATRICES + 1)


def test_a_resumed_run_allocates_as_the_unbroken_one() -> None:
    bundle, other = vit(), vit()
    tuner, resumed = apply("snella", bundle), apply("snella", other)
    train(tuner, bundle, steps=6)
    resumed.module.load_state_dict(tuner.module.state_dict())
    train(resumed, other, steps=0)  # binds it: its moving averages are there
    for key, average in resumed.sharded_state().items():
        average.copy_(tuner.sharded_state()[key])
    assert sparsities(resumed.module) == sparsities(tuner.module)
    before = sparsities(tuner.module)
    # both go on with a fresh optimizer, over the tick at step 8
    assert train(tuner, bundle, steps=4, first=6) == train(resumed, other, steps=4, first=6)
    assert sparsities(resumed.module) == sparsities(tuner.module) != before


def test_warm_ups_longer_than_the_training_are_refused() -> None:
    with pytest.raises(ValueError, match="warm"):
        apply("snella", vit(), init_warmup=6, final_warmup=5)
