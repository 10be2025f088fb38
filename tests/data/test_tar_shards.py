"""Shards: random access, ranges of names, and what is cut."""

import pickle
from pathlib import Path

import pytest

from snell_scale.data.tar_shards import TarShards, shard_paths
from tests.data.pair_files import write_tar


def test_a_shard_that_is_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "whole.tar", {f"{i}.txt": bytes(700) for i in range(3)}).read_bytes()
    end = 3 * (512 + 1024)
    assert whole[end:].count(0) == len(whole) - end
    cut = tmp_path / "cut.tar"
    for length in [*range(0, end, 256), end, end + 511]:
        cut.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="cut.tar is no whole, plain tar file"):
            TarShards([cut])
    cut.write_bytes(whole[: end + 512])
    assert [sample.key for sample in TarShards([cut]).samples] == ["0", "1", "2"]


def test_shards_are_read_at_random_and_after_pickling(tmp_path: Path) -> None:
    content = {
        f"{i}.{extension}": f"{i} {extension}".encode() * (i + 1)
        for i in range(70)
        for extension in ("txt", "SEG.png")
    }
    found = TarShards([write_tar(tmp_path / "s.tar", content)])
    for copy in (found, pickle.loads(pickle.dumps(found))):
        for index in (69, 0, 33):
            sample = copy.samples[index]
            assert copy.read(sample.members["seg.png"]) == content[f"{index}.SEG.png"]
            assert copy.name(sample, "txt") == f"{tmp_path}/s.tar:{index}.txt"


def test_ranges_of_shards() -> None:
    assert [str(path) for path in shard_paths(["a-{08..11}-{0..1}.tar", "b.tar"])] == [
        *(f"a-{number}-{part}.tar" for number in ("08", "09", "10", "11") for part in (0, 1)), "b.tar",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="smaller number first"):
        shard_paths("a-{3..1}.tar")
