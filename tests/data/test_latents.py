"""Latents computed once: what is kept, what happens to damage and kills, what is drawn per sample."""

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from snell_scale.data import latent_cache, stored_tensors
from snell_scale.data.batches import evaluation_batches
from snell_scale.data.latent_cache import CacheSettings, LatentCache
from snell_scale.data.latents import LatentSplit, NoiseDraws
from snell_scale.engines.ranks import Ranks
from snell_scale.engines.single import SingleConfig
from snell_scale.interfaces import DataBundle
from tests.data.cached_latents import DRAWS, SHAPE, cached, digits
from tests.tasks.diffusion_parts import PlainEncoders


def split_of(data: DataBundle, name: str = "train") -> LatentSplit:
    split = getattr(data, name)
    assert isinstance(split, LatentSplit)
    return split


def test_samples_hold_what_the_encoders_gave(tmp_path: Path) -> None:
    data = digits()
    made = cached(tmp_path, data, encoders=PlainEncoders(std=0.5))
    assert made.sizes == data.sizes
    for name in ("train", "validation", "test"):
        split, images = split_of(made, name), getattr(data, name)
        batch = split.__getitems__([(index, 0) for index in range(len(split))])
        found = next(evaluation_batches(images, len(images)))
        stored = load_file(split._images.path)
        assert torch.equal(stored["mean"], found["image"])
        assert torch.equal(batch["label"], found["label"])
        prompts = [split.prompts.texts[number] for number in batch["prompt"].tolist()]
        assert prompts == [data.captions[number] for number in found["caption"].tolist()]
        assert torch.equal(batch["condition.words"], PlainEncoders().encode_prompts(prompts)["words"])
        # mean + std · a standard normal number: 60 images and more of 64 pixels.
        spread = (batch["latents"] - found["image"]).std()
        assert abs(float(spread) - 0.5) < 0.05
        assert abs(float(batch["noise"].std()) - 1) < 0.05
        assert not torch.equal(batch["noise"], (batch["latents"] - found["image"]) / 0.5)


def test_a_sample_is_a_function_of_seed_index_and_epoch(tmp_path: Path) -> None:
    options = {"encoders": PlainEncoders(std=0.1), "flips": True}
    draws = NoiseDraws(seed=1, prompt_dropout=0.3, offset=0.2)
    split = split_of(cached(tmp_path, **options, draws=draws))
    whole = split.__getitems__([(3, 2), (4, 2), (3, 5)])
    for position, key in enumerate([(3, 2), (4, 2), (3, 5)]):
        assert all(torch.equal(value, whole[name][position]) for name, value in split[key].items())
    copy: LatentSplit = pickle.loads(pickle.dumps(split))
    assert all(torch.equal(value, split[3, 2][name]) for name, value in copy[3, 2].items())
    other_seed = split_of(cached(tmp_path, **options, draws=replace(draws, seed=2)))
    for other in (split[3, 5], split[4, 2], other_seed[3, 2]):
        assert not torch.equal(other["noise"], split[3, 2]["noise"])
        assert other["fraction"] != split[3, 2]["fraction"]


def test_pickled_splits_are_small(tmp_path: Path) -> None:
    data = digits(train_per_class=100, validation_per_class=5)
    assert len(pickle.dumps(split_of(cached(tmp_path, data)))) < 8000  # 200 images of 256 bytes are 51,200


def test_splits_have_noise_of_their_own(tmp_path: Path) -> None:
    made = cached(tmp_path)
    noises = [split_of(made, name)[0, 0]["noise"] for name in ("train", "validation", "test")]
    assert not torch.equal(noises[0], noises[1])
    assert not torch.equal(noises[1], noises[2])


def test_evaluation_covers_the_timesteps_evenly_and_never_changes(tmp_path: Path) -> None:
    draws = NoiseDraws(seed=1, prompt_dropout=0.9, offset=0.5)
    split = split_of(cached(tmp_path, draws=draws, flips=True), "validation")
    batch = next(evaluation_batches(split, len(split)))
    for part in (batch["fraction"], batch["fraction"][:20], batch["fraction"][-20:]):
        ordered = part.sort().values
        # Random numbers leave gaps of 4/N and more; the golden ratio's sequence at most 2.2/N.
        assert float(ordered.diff().max()) < 2.3 / len(part)
    assert batch["prompt"].ne(split.prompts.empty).all()  # no dropout
    assert torch.equal(batch["latents"], load_file(split._images.path)["mean"])  # no flips
    plain = split_of(cached(tmp_path, draws=NoiseDraws(seed=1)), "validation")
    assert torch.equal(plain[7, 0]["noise"], split[7, 0]["noise"])  # no offset


def test_prompts_are_dropped_and_images_mirrored_as_often_as_asked(tmp_path: Path) -> None:
    draws = NoiseDraws(seed=0, prompt_dropout=0.25)
    split = split_of(cached(tmp_path, draws=draws, flips=True))
    batch = split.__getitems__([(index, epoch) for epoch in range(50) for index in range(20)])
    dropped = batch["prompt"].eq(split.prompts.empty)
    assert abs(float(dropped.double().mean()) - 0.25) < 0.05  # 1000 draws: a deviation of 0.014
    empty = PlainEncoders().encode_prompts([""])["words"]
    assert torch.equal(batch["condition.words"][dropped], empty.expand(int(dropped.sum()), -1))
    stored = load_file(split._images.path)["mean"].repeat(50, 1, 1, 1)
    same = (batch["latents"] == stored).flatten(1).all(dim=1)
    mirrored = (batch["latents"] == stored.flip(-1)).flatten(1).all(dim=1)
    assert (same | mirrored).all()
    assert abs(float(mirrored.double().mean()) - 0.5) < 0.06


def test_offset_noise_is_shared_by_a_channel(tmp_path: Path) -> None:
    plain = split_of(cached(tmp_path))
    offset = split_of(cached(tmp_path, draws=replace(DRAWS, offset=0.5)))
    keys = [(index, epoch) for epoch in range(30) for index in range(20)]
    difference = offset.__getitems__(keys)["noise"] - plain.__getitems__(keys)["noise"]
    # A difference of float32 numbers of size 1.
    assert float(difference.flatten(2).std(dim=2).max()) < 1e-6
    assert abs(float(difference[:, 0, 0, 0].std()) - 0.5) < 0.05


def test_nothing_is_computed_twice(tmp_path: Path) -> None:
    cached(tmp_path)
    again = PlainEncoders()
    made = cached(tmp_path, encoders=again, draws=NoiseDraws(seed=9, prompt_dropout=0.5))
    assert again.calls == []
    assert len(split_of(made)) == 20


@pytest.mark.parametrize("what", ["encoders", "images", "captions", "flips"])
def test_whatever_a_cache_depends_on_makes_another(tmp_path: Path, what: str) -> None:
    cached(tmp_path)
    again = PlainEncoders(fingerprint="others") if what == "encoders" else PlainEncoders()
    data = digits(image_size=8, train_per_class=9) if what == "images" else digits()
    if what == "captions":
        data = digits(captions=("a {}", "one {}"))
    cached(tmp_path, data, encoders=again, flips=what == "flips")
    assert again.calls


def test_encoders_are_released(tmp_path: Path) -> None:
    encoders = PlainEncoders()
    cached(tmp_path, encoders=encoders)
    assert encoders.calls
    assert encoders.weights is None
    failing = PlainEncoders()
    with pytest.raises(ValueError, match="latents of"):
        cached(tmp_path / "other", encoders=failing, shape=(4, 8, 8))
    assert failing.weights is None


@pytest.mark.parametrize("damage", ["truncated", "changed", "emptied"])
def test_a_damaged_file_is_made_again(tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    whole = split_of(cached(tmp_path))
    path, content = whole._images.path, whole._images.path.read_bytes()
    mean = load_file(path)["mean"]
    broken = {"truncated": content[:-10], "changed": content[:-10] + b"\x11" * 10, "emptied": b""}[damage]
    path.unlink()  # the mapped file stays as it is for whoever has it open
    path.write_bytes(broken)
    again = PlainEncoders()
    cached(tmp_path, encoders=again)
    assert again.calls == ["images 16", "images 4"]
    assert load_file(path).keys() == {"mean", "std", "label", "caption"}
    assert torch.equal(load_file(path)["mean"], mean)
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert f"{path} is damaged" in errors


def test_a_kill_while_writing_leaves_no_file_that_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    def killed(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(stored_tensors, "save_file", killed)
        with pytest.raises(Killed):
            cached(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert len(split_of(cached(tmp_path))) == 20


def test_prompts_come_from_a_template_or_are_one(tmp_path: Path) -> None:
    data = digits(captions=())
    named = split_of(cached(tmp_path, data, prompt="a photo of a {}"))
    assert {named.prompts.texts[number] for number in named.prompt_ids.tolist()} == {
        "a photo of a 5",
        "a photo of a 6",
    }
    one = split_of(cached(tmp_path, data, prompt="a photo of sks digit"))
    assert {one.prompts.texts[number] for number in one.prompt_ids.tolist()} == {"a photo of sks digit"}
    assert "something else" in one.prompts.texts
    assert one.prompts.texts[one.prompts.empty] == ""


def test_augmented_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cache_flips"):
        cached(tmp_path, digits(shift_pixels=2))
    assert list(tmp_path.iterdir()) == []


def test_latents_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not finite"):
        cached(tmp_path, encoders=PlainEncoders(std=float("nan")))


def test_standardized_images_reach_the_encoders_in_unit_range(tmp_path: Path) -> None:
    symmetric = load_file(split_of(cached(tmp_path / "a"))._images.path)["mean"]
    standardized = load_file(split_of(cached(tmp_path / "b", digits(scaling="standardized")))._images.path)[
        "mean"
    ]
    torch.testing.assert_close(symmetric, standardized, rtol=0, atol=1e-6)  # (x − m)/s and back, in float32


def test_a_long_computation_tells_how_far_it_is(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    clock = iter(range(0, 1000, 3))
    monkeypatch.setattr(latent_cache.time, "monotonic", lambda: float(next(clock)))
    assert list(latent_cache._shown(iter("abcd"), "encoding train", 4)) == list("abcd")
    assert "encoding train: 2/4 batches" in capsys.readouterr().err


def test_other_ranks_take_what_the_first_has_written(tmp_path: Path) -> None:
    """A rank that does not see the folder says so, instead of making files of its own."""
    cached(tmp_path)

    class Second(Ranks):
        def first(self, function: Any) -> Any:
            return {name: str(tmp_path / "elsewhere") for name in ("train", "validation", "test", "prompts")}

    encoders = PlainEncoders()
    cache = LatentCache(
        encoders,
        SingleConfig(device="cpu").build(Second(rank=1, world_size=2)),
        latent_shape=SHAPE,
        settings=CacheSettings(tmp_path, False, 16),
        prompt=None,
    )
    with pytest.raises(ValueError, match="cache_dir"):
        cache.prepare(digits(), draws=DRAWS)
    assert encoders.calls == []
