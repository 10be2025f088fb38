"""Checkpoints of one process are complete or absent, and damage is noticed. Two processes: see test_shards.py."""

import json
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from snell_scale.engines.checkpoint import Checkpoints, find_damage
from snell_scale.engines.ranks import Ranks
from snell_scale.engines.shards import read_shards, shard_writer
from snell_scale.interfaces import Ranks as RanksProtocol
from snell_scale.interfaces import ShardWriter

ALONE = {"world_size": 1}


def make(root: Path, keep_last: int = 2, asynchronous: bool = False) -> Checkpoints:
    return Checkpoints(root, Ranks(), keep_last=keep_last, asynchronous=asynchronous)


def save(checkpoints: Checkpoints, step: int, write: ShardWriter | None = None) -> None:
    write = write or shard_writer({"a": torch.full((300,), float(step))}, staged=True)
    checkpoints.save(step, write, layout=ALONE, common={"step": step}, own={"rng": torch.tensor(step)})


def save_and_wait(checkpoints: Checkpoints, step: int, write: ShardWriter) -> None:
    save(checkpoints, step, write)
    checkpoints.wait()


def newest_step(root: Path) -> int | None:
    """After every part of the newest one was found to be of the same step."""
    found = make(root).newest()
    if found is None:
        return None
    value = torch.zeros(300)
    read_shards(found.folder, {"a": value}, Ranks())
    assert found.own is not None
    assert (found.common["step"], int(found.own["rng"]), found.layout) == (found.step, found.step, ALONE)
    assert torch.equal(value, torch.full((300,), float(found.step)))
    return found.step


def names(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir())


@pytest.mark.parametrize("asynchronous", [False, True])
def test_newest_is_loaded_and_only_the_last_are_kept(tmp_path: Path, asynchronous: bool) -> None:
    checkpoints = make(tmp_path, asynchronous=asynchronous)
    for step in (10, 20, 30):
        save(checkpoints, step)
    checkpoints.close()
    assert names(tmp_path) == ["step-00000020", "step-00000030"]
    assert newest_step(tmp_path) == 30


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert make(tmp_path / "absent").newest() is None


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        ("truncated shard", "shards/__0_0.distcp has"),
        ("flipped byte", "the SHA-256 of shards/__0_0.distcp does not match"),
        ("no rank file", "rank-00000.pt is missing"),
        ("no manifest", "manifest.json is missing or damaged"),
        ("empty manifest", "manifest.json is missing or damaged"),
        ("manifest of one file", "manifest.json is missing or damaged"),
        ("manifest without a rank", "manifest.json is missing or damaged"),
    ],
)
def test_damaged_checkpoint_is_named_and_skipped(
    tmp_path: Path, damage: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (10, 20):
        save(make(tmp_path), step)
    newest = tmp_path / "step-00000020"
    shard, manifest = newest / "shards/__0_0.distcp", newest / "manifest.json"
    if damage == "truncated shard":
        shard.write_bytes(shard.read_bytes()[:-7])
    elif damage == "flipped byte":
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(bytes(content))
    elif damage == "no rank file":
        (newest / "rank-00000.pt").unlink()
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "empty manifest":
        manifest.write_text("")
    elif damage == "manifest of one file":  # as they were before there were several ranks
        manifest.write_text(json.dumps({"step": 20, "bytes": 5, "sha256": "0"}))
    else:
        content = json.loads(manifest.read_text())
        del content["files"]["rank-00000.pt"]
        manifest.write_text(json.dumps(content))
    assert newest_step(tmp_path) == 10
    errors = capsys.readouterr().err
    assert f"skipping checkpoint {newest}" in errors
    assert told in errors


def test_unknown_files_do_no_harm(tmp_path: Path) -> None:
    save(make(tmp_path), 10)
    (tmp_path / "step-00000010" / "notes.txt").write_text("mine")
    (tmp_path / "step-one").mkdir()
    assert newest_step(tmp_path) == 10


@pytest.mark.parametrize("next_step", [15, 30])
def test_a_damaged_checkpoint_takes_no_good_ones_place(tmp_path: Path, next_step: int) -> None:
    """The run went on from 10, for 20 was damaged: it counts neither before nor after the next one."""
    for step in (10, 20):
        save(make(tmp_path), step)
    (tmp_path / "step-00000020" / "common.pt").unlink()
    save(make(tmp_path), next_step)
    assert names(tmp_path) == ["step-00000010", f"step-000000{next_step}"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(make(tmp_path), 10)
    (tmp_path / "step-00000010" / "common.pt").unlink()
    save(make(tmp_path), 10)
    assert names(tmp_path) == ["step-00000010"]
    assert newest_step(tmp_path) == 10


def test_what_is_replaced_is_readable_until_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(make(tmp_path), 10)
    replace = os.replace
    readable: list[int | None] = []

    def spying_replace(source: Path, target: Path) -> None:
        readable.append(newest_step(tmp_path))
        replace(source, target)
        readable.append(newest_step(tmp_path))

    monkeypatch.setattr("os.replace", spying_replace)
    save(make(tmp_path), 10)
    assert readable == [10] * len(readable)
    assert len(readable) == 6  # the manifest, the old folder, the new one


def test_what_a_killed_save_left_is_ignored_and_removed(tmp_path: Path) -> None:
    save(make(tmp_path), 10)
    os.rename(tmp_path / "step-00000010", tmp_path / ".step-00000030.partial")
    assert newest_step(tmp_path) is None
    save(make(tmp_path), 20)
    assert names(tmp_path) == ["step-00000020"]


def test_one_that_was_being_replaced_is_still_read(tmp_path: Path) -> None:
    save(make(tmp_path), 10)
    os.rename(tmp_path / "step-00000010", tmp_path / "step-00000010.replaced")
    assert newest_step(tmp_path) == 10


def test_every_file_is_on_disk_before_the_folder_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[int] = set()
    unsynced: list[str] = []
    fsync, replace = os.fsync, os.replace

    def spying_fsync(descriptor: int) -> None:
        fsync(descriptor)
        synced.add(os.fstat(descriptor).st_ino)

    def spying_replace(source: Path, target: Path) -> None:
        if Path(source).name.endswith(".partial"):
            unsynced.extend(
                str(p) for p in [Path(source), *Path(source).rglob("*")] if p.stat().st_ino not in synced
            )
        replace(source, target)

    monkeypatch.setattr("os.fsync", spying_fsync)
    monkeypatch.setattr("os.replace", spying_replace)
    save(make(tmp_path), 10)
    assert unsynced == []
    assert (tmp_path / "step-00000010" / "manifest.json").stat().st_ino in synced
    assert tmp_path.stat().st_ino in synced


def test_pickled_code_is_never_run(tmp_path: Path) -> None:
    refused = {"weights": Path("a class that weights_only refuses")}
    write = shard_writer({"a": torch.ones(1)}, staged=False)
    make(tmp_path).save(1, write, layout=ALONE, common=refused, own={})
    assert find_damage(tmp_path / "step-00000001") is None
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        make(tmp_path).newest()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_failed_write_leaves_the_earlier_checkpoint(tmp_path: Path, asynchronous: bool) -> None:
    def fail(folder: Path, ranks: RanksProtocol) -> list[Path]:
        (folder / "half").write_text("written")
        raise RuntimeError("unexpected pos 64 vs 0")  # how torch.save reports a full disk

    checkpoints = make(tmp_path, asynchronous=asynchronous)
    save(checkpoints, 10)
    with pytest.raises(
        OSError, match=r"step 20 .* unexpected pos 64 vs 0 \(on rank 0\)\. Earlier checkpoints are"
    ):
        save_and_wait(checkpoints, 20, fail)
    checkpoints.close()  # an error is told once
    assert names(tmp_path) == ["step-00000010"]
    assert newest_step(tmp_path) == 10


def test_a_mistake_in_a_writer_is_no_full_disk(tmp_path: Path) -> None:
    def fail(folder: Path, ranks: RanksProtocol) -> list[Path]:
        raise KeyError("name")

    checkpoints = make(tmp_path, asynchronous=True)
    save(checkpoints, 10, fail)
    with pytest.raises(KeyError, match="name"):
        checkpoints.close()


def test_training_goes_on_while_a_thread_writes(tmp_path: Path) -> None:
    """One save at a time: the second waits for the first, which waits for the test."""
    may_write = threading.Event()
    order: list[str] = []

    def write(folder: Path, ranks: RanksProtocol) -> list[Path]:
        order.append("asked")
        assert may_write.wait(timeout=20)
        order.append("wrote")
        return []

    checkpoints = make(tmp_path, asynchronous=True)
    save(checkpoints, 1, write)
    order.append("trained")
    may_write.set()
    save(checkpoints, 2, write)
    checkpoints.close()
    assert sorted(order[:2]) == ["asked", "trained"]
    assert order[2:] == ["wrote", "asked", "wrote"]
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def kill_savers(folder: Path, num_kills: int) -> dict[str, dict[str, int]]:
    """See checkpoint_kill.py, which asserts after every kill that a complete checkpoint is found."""
    program = Path(__file__).with_name("checkpoint_kill.py")
    repository = str(Path(__file__).parents[2])
    path = os.pathsep.join([repository, os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(program), str(folder), str(num_kills)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr  # a process alone is the ordinary case
    return json.loads(done.stdout)


def test_a_killed_save_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    found = kill_savers(tmp_path, 6)
    assert found.keys() == {"sync", "async", "replace"}
    assert sum(counted["saves"] for counted in found.values()) > 0


@pytest.mark.slow
def test_three_hundred_kills(tmp_path: Path) -> None:
    num_kills = 100
    for mode, counted in kill_savers(tmp_path, num_kills).items():
        # Nearly all of the time is spent inside a save: a tenth shows that the kills do what they are for.
        assert counted["kills_inside_a_save"] > num_kills / 10, mode
        assert counted["saves"] > num_kills / 10, mode
