"""Checkpoints are complete or absent, and damage is noticed."""

from pathlib import Path

import pytest
import torch

from snell_scale.engines.checkpoint import find_damage, list_checkpoints, load_newest_checkpoint, save_checkpoint


def save(root: Path, step: int, keep_last: int = 2) -> Path:
    state = {"step": step, "weights": {"a": torch.full((3,), float(step))}}
    return save_checkpoint(root, step, state, keep_last=keep_last)


def test_newest_is_loaded_and_only_the_last_are_kept(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000020", "step-00000030"]
    state = load_newest_checkpoint(tmp_path)
    assert state is not None
    assert state["step"] == 30
    assert torch.equal(state["weights"]["a"], torch.full((3,), 30.0))


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert load_newest_checkpoint(tmp_path / "absent") is None


@pytest.mark.parametrize("damage", ["truncate", "flip", "no manifest", "empty manifest", "no state"])
def test_damaged_checkpoint_is_named_and_skipped(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, 10)
    newest = save(tmp_path, 20)
    state, manifest = newest / "state.pt", newest / "manifest.json"
    if damage == "truncate":
        state.write_bytes(state.read_bytes()[:-7])
    elif damage == "flip":
        content = bytearray(state.read_bytes())
        content[len(content) // 2] ^= 1
        state.write_bytes(bytes(content))
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "empty manifest":
        manifest.write_text("")
    else:
        state.unlink()
    assert find_damage(newest) is not None
    loaded = load_newest_checkpoint(tmp_path)
    assert loaded is not None
    assert loaded["step"] == 10
    assert "skipping checkpoint" in capsys.readouterr().err


def test_pickled_code_is_never_run(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, 1, {"weights": Path("a class that weights_only refuses")}, keep_last=1)
    assert find_damage(folder) is None
    with pytest.raises(Exception, match="weights_only|Weights only"):
        load_newest_checkpoint(tmp_path)


def test_full_disk_leaves_the_earlier_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 10)

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="Earlier checkpoints are untouched"):
        save(tmp_path, 20)
    monkeypatch.undo()
    state = load_newest_checkpoint(tmp_path)
    assert state is not None
    assert state["step"] == 10
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000010"]
