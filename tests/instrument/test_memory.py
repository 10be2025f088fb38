"""MemoryProbe against byte counts made by hand: every category, every phase."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from snell_scale.instrument.memory import MemoryProbe
from tests.instrument.memory_cases import (
    ADAMW_BYTES,
    BATCH_BYTES,
    FIRST_BYTES,
    HIDDEN_BYTES,
    MLP_BYTES,
    NUM_IMAGES,
    SECOND_BYTES,
    Blocks,
    SquareLayer,
    make_batch,
    make_mlp,
    measure,
    split,
)


def test_load_is_what_stands_before_the_first_step():
    module = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
    # Two 8-vectors of weight and bias, two of running statistics, one int64 counter.
    expected = FIRST_BYTES + 4 * 8 * 4 + 8
    report = MemoryProbe(module, torch.optim.AdamW(module.parameters())).report()
    assert report["device"] == "cpu"
    assert report["source"] == "live tensor storages"
    assert report["phases"].keys() == {"load"}
    assert split(report["phases"]["load"]) == {
        "parameters": expected,
    }
    assert report["peak"] == {"phase": "load", **report["phases"]["load"]}


def test_forward_of_an_mlp_counted_by_hand():
    report, _ = measure(make_mlp(), make_batch(), num_warmup_steps=1)
    # The peak is at the ReLU: its input is not saved, its output is (for itself and the second layer), and
    # the batch is (for the first layer's weight).
    assert split(report["phases"]["forward"]) == {
        "parameters": MLP_BYTES,
        "optimizer": ADAMW_BYTES,
        "activations": BATCH_BYTES + HIDDEN_BYTES,
        "temporary": HIDDEN_BYTES,
    }


def test_gradients_and_optimizer_state_counted_by_hand():
    report, optimizer = measure(make_mlp(), make_batch())
    assert all(p.grad is None for group in optimizer.param_groups for p in group["params"])
    assert report["phases"]["forward"]["optimizer_bytes"] == 0
    assert report["phases"]["backward"]["optimizer_bytes"] == 0
    assert 0 < report["phases"]["backward"]["gradients_bytes"] <= MLP_BYTES
    step = split(report["phases"]["step"])
    # The state was made by this very step. AdamW has at most two temporaries of its largest matrix (8 × 4)
    # at a time; the loss (4 bytes) is still held. The batch was saved for backward, and keeps that name.
    assert step == {
        "parameters": MLP_BYTES,
        "gradients": MLP_BYTES,
        "optimizer": ADAMW_BYTES,
        "activations": BATCH_BYTES,
        "temporary": 2 * 8 * 4 * 4 + 4,
    }


def test_frozen_weights_have_no_gradient_and_save_no_input():
    module = make_mlp()
    module[0].requires_grad_(False)
    report, _ = measure(module, make_batch(), num_warmup_steps=1)
    assert split(report["phases"]["forward"]) == {
        "parameters": MLP_BYTES,
        "optimizer": 2 * SECOND_BYTES + 2 * 4,
        "activations": HIDDEN_BYTES,
        "temporary": BATCH_BYTES + HIDDEN_BYTES,
    }
    assert report["phases"]["step"]["gradients_bytes"] == SECOND_BYTES


def test_tensors_saved_by_an_autograd_function_are_activations():
    module = nn.Sequential(nn.Linear(4, 8), SquareLayer())
    report, _ = measure(module, make_batch())
    # Saved: the batch and the squares' input. The squares themselves, and their sum, are not.
    forward = split(report["phases"]["forward"])
    assert forward["activations"] == BATCH_BYTES + HIDDEN_BYTES
    assert forward["temporary"] == HIDDEN_BYTES + 4


def test_evaluation_has_no_activations_and_no_gradients():
    module, batch = make_mlp(), make_batch()
    probe = MemoryProbe(module)
    with probe, probe.phase("evaluate"), torch.no_grad():
        module(batch)
    assert split(probe.report()["phases"]["evaluate"]) == {
        "parameters": MLP_BYTES,
        "temporary": BATCH_BYTES + 2 * HIDDEN_BYTES,
    }


def test_views_and_in_place_results_count_once_and_resized_storages_anew():
    module = nn.Linear(4, 8)
    probe = MemoryProbe(module)
    with probe, torch.no_grad():
        with probe.phase("views"):
            x = torch.zeros(16)
            y = x.view(4, 4).t().detach().add_(1)
            y[0].mul_(2)
        with probe.phase("resized"):
            x.resize_(64)
        with probe.phase("freed"):
            del x, y
            torch.zeros(2)
    phases = probe.report()["phases"]
    assert phases["views"]["temporary_bytes"] == 16 * 4
    assert phases["resized"]["temporary_bytes"] == 64 * 4
    # A phase starts with what stands at that moment: the peak of the last one is before `del`.
    assert phases["freed"]["temporary_bytes"] == 64 * 4


@pytest.mark.parametrize("make", [make_mlp, lambda: Blocks(None), lambda: Blocks(False), lambda: Blocks(True)])
def test_split_sums_to_the_total_and_repeats_exactly(make: Callable[[], nn.Module]):
    module = make()
    batch = make_batch(8 if isinstance(module, Blocks) else 4).requires_grad_()
    reports = [measure(copy.deepcopy(module), batch.detach().clone().requires_grad_())[0] for _ in range(2)]
    assert reports[0]["phases"] == reports[1]["phases"]
    assert list(reports[0]["phases"]) == ["load", "forward", "backward", "step"]
    for entry in reports[0]["phases"].values():
        assert sum(split(entry).values()) == entry["total_bytes"]
        assert min(split(entry).values()) > 0
    totals = {name: entry["total_bytes"] for name, entry in reports[0]["phases"].items()}
    assert reports[0]["peak"]["total_bytes"] == max(totals.values()) == totals[reports[0]["peak"]["phase"]]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_lowers_activations(use_reentrant: bool):
    batch = make_batch(8).requires_grad_()
    plain = measure(Blocks(None), batch)[0]["phases"]["forward"]
    lean = measure(Blocks(use_reentrant), batch)[0]["phases"]["forward"]
    one_block_bytes = 2 * NUM_IMAGES * 32 * 4
    # Each block saves the GELU's input and output, and its own input; checkpointed, only the last.
    assert plain["activations_bytes"] - lean["activations_bytes"] == 4 * one_block_bytes
    # While the last block runs its own two stand, though not for backward.
    assert plain["total_bytes"] - lean["total_bytes"] >= 3 * one_block_bytes


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputed_activations_are_temporary(use_reentrant: bool):
    # So many images that the peak of backward is in a recomputation, not the gradients at its end.
    num_images = 100 * NUM_IMAGES
    batch = make_batch(8).repeat(100, 1).requires_grad_()
    phases = measure(Blocks(use_reentrant), batch)[0]["phases"]
    assert phases["forward"]["activations_bytes"] == 4 * num_images * 8 * 4
    assert phases["backward"]["activations_bytes"] <= 4 * num_images * 8 * 4
    assert phases["backward"]["temporary_bytes"] >= 2 * num_images * 32 * 4


def test_several_blocks_keep_the_largest_phase_of_each_name():
    module = make_mlp()
    probe = MemoryProbe(module)
    for num_images in (2, 7, 3):
        with probe, probe.phase("evaluate"), torch.no_grad():
            module(torch.zeros(num_images, 4))
    assert probe.report()["phases"]["evaluate"]["temporary_bytes"] == 7 * (4 + 8 + 8) * 4


def test_extra_tensors_stand_under_their_category():
    module = make_mlp()
    ema = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    probe = MemoryProbe(module, extra={"optimizer": (tensor[:1] for tensor in ema.values())})
    with probe, probe.phase("evaluate"), torch.no_grad():
        module(make_batch())
    phases = probe.report()["phases"]
    assert phases["load"]["optimizer_bytes"] == MLP_BYTES
    assert phases["evaluate"]["optimizer_bytes"] == MLP_BYTES
    assert phases["evaluate"]["parameters_bytes"] == MLP_BYTES
    del ema
    with probe, probe.phase("after"):
        pass
    assert probe.report()["phases"]["after"]["optimizer_bytes"] == 0


def test_master_weights_and_a_listing_function_count_as_optimizer():
    module = make_mlp()
    masters = [nn.Parameter(p.detach().double()) for p in module.parameters()]
    masters[0].grad = torch.zeros_like(masters[0])
    for optimizer in (torch.optim.AdamW(masters), lambda: masters):
        load = MemoryProbe(module, optimizer).report()["phases"]["load"]
        assert load["optimizer_bytes"] == 2 * MLP_BYTES
        assert load["gradients_bytes"] == 2 * 8 * 4 * 4
