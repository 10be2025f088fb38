"""SNELLA in training: the competition changes sparsities, travels with the adapter and resumes identically."""

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from snell_models import build, config, images, snell_layers, snella_of, train
from torch import nn

from snell_scale.tuners import SnellaConfig, SparsityCompetition


def snella_model(**changes: object) -> PeftModel:
    torch.manual_seed(2)
    model = get_peft_model(build("vit"), config("snella", "vit", **changes))
    assert isinstance(model, PeftModel)
    return model.train()


def sparsities(model: nn.Module) -> list[float]:
    return torch.cat([layer.snell_sparsity["default"] for layer in snell_layers(model).values()]).tolist()


def kept(model: nn.Module) -> int:
    return sum(
        round((1 - share) * layer.matrix_size("default"))
        for layer in snell_layers(model).values()
        for share in layer.snell_sparsity["default"].tolist()
    )


def test_budget_shrinks_to_the_target() -> None:
    model = snella_model()
    total = 2 * (4 * 32 * 32 + 2 * 32 * 128)
    assert sparsities(model) == [0.2] * 12
    train(model, ticks=range(1), competes=True)
    assert sparsities(model) == [0.2] * 12
    # Each of the 12 matrices drops its fraction of an entry; the cubic falls from 0.8 to 0.2 of all entries.
    for tick, budget in ((1, 0.2 + 0.6 * 0.75**3), (2, 0.2 + 0.6 * 0.5**3), (3, 0.2 + 0.6 * 0.25**3)):
        train(model, ticks=range(tick, tick + 1), competes=True)
        assert budget * total - 14 < kept(model) <= budget * total
    assert len(set(sparsities(model))) > 3


def test_delta_has_the_allocated_number_of_entries() -> None:
    model = snella_model()
    train(model, competes=True)
    layer = snell_layers(model)["blocks.0.attn.qkv"]
    for part, share in zip(
        layer.get_delta_weight("default").chunk(3), layer.snell_sparsity["default"], strict=True
    ):
        # A matrix with everything allowed still loses the entry that is the threshold itself.
        assert (part != 0).sum().item() in {round((1 - share.item()) * 1024), 1023}


def test_resumed_training_is_identical(tmp_path: Path) -> None:
    whole = snella_model()
    losses = train(whole, ticks=range(4), competes=True)
    first = snella_model()
    assert train(first, ticks=range(2), competes=True) == losses[:4]
    state = {"model": first.state_dict(), "allocator": snella_of(first).allocator_state_dict()}
    torch.save(state, tmp_path / "state.pt")
    second = snella_model()
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    second.load_state_dict(loaded["model"])
    snella_of(second).load_allocator_state_dict(loaded["allocator"])
    assert train(second, ticks=range(2, 4), competes=True) == losses[4:]
    assert sparsities(second) == sparsities(whole)


def test_scores_are_deterministic() -> None:
    model = snella_model()
    twin = copy.deepcopy(model)
    assert train(model, competes=True) == train(twin, competes=True)
    assert sparsities(model) == sparsities(twin)


def test_a_loaded_adapter_can_be_trained_on(tmp_path: Path) -> None:
    model = snella_model()
    train(model, competes=True)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(build("vit"), tmp_path, is_trainable=True)
    assert sparsities(loaded) == sparsities(model)
    train(loaded, ticks=range(1, 3), competes=True)
    assert sparsities(loaded) != sparsities(model)


def test_competition_in_an_injected_module() -> None:
    settings = config("snella", "vit", modules_to_save=None, total_ticks=2)
    assert isinstance(settings, SnellaConfig)
    torch.manual_seed(2)
    module = inject_adapter_in_model(settings, build("vit"))
    competition = SparsityCompetition(module, settings)
    module(images()).square().sum().backward()
    competition.update_scores()
    assert competition.allocate(0) is None
    allocation = competition.allocate(1)
    assert allocation is not None
    assert (
        allocation["blocks.0.attn.qkv"]
        == snell_layers(module)["blocks.0.attn.qkv"].snell_sparsity["default"].tolist()
    )


def test_deleting_the_adapter_ends_its_competition() -> None:
    model = snella_model()
    train(model, ticks=range(2), competes=True)
    model.add_adapter("other", config("snella", "vit", modules_to_save=None))
    model.delete_adapter("default")
    model.add_adapter("default", config("snella", "vit", modules_to_save=None))
    assert snella_of(model).allocator_state_dict("default") == {}


def test_what_training_refuses() -> None:
    with pytest.raises(ValueError, match="total_ticks is missing"):
        snella_of(snella_model(total_ticks=None)).allocate(0)
    model = snella_model()
    model.merge_adapter()
    with pytest.raises(ValueError, match="call unmerge_adapter first"):
        snella_of(model).allocate(1)
    model.unmerge_adapter()
    model.add_adapter("other", config("snella", "vit", modules_to_save=None))
    snella_of(model).set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="name the one that is meant"):
        snella_of(model).update_scores()
    settings = config("snella", "vit")
    assert isinstance(settings, SnellaConfig)
    with pytest.raises(ValueError, match="no SNELLA layer of an adapter 'default'"):
        SparsityCompetition(build("vit"), settings)
