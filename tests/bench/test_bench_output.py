"""Where a benchmark's record goes, and what is left of one that was interrupted."""

from pathlib import Path

import pytest
import torch

from snell_scale.bench import merge
from snell_scale.bench_records import read_bench
from tests.command_line import call

LAYER = (
    "bench",
    "merge",
    "--shape",
    "24x40",
    "--shape",
    "16x12",
    "--tokens",
    "6",
    "--rank",
    "4",
    "--repeats",
    "3",
)


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.touch()
    for output in (file, file / "below"):
        code, out, err = call(monkeypatch, capsys, *LAYER, "--output", str(output))
        assert code == 2
        assert f"--output is {output}, which is no folder to write to" in err
        assert out == ""

    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    code, out, err = call(monkeypatch, capsys, *LAYER, "--output", str(tmp_path / "new" / "newer"))
    assert code == 2
    assert "Permission denied" in err
    assert out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_working_folder_gives_the_record_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert call(monkeypatch, capsys, *LAYER, "--sides", "frozen", "--output", ".")[0] == 0
    assert read_bench(tmp_path / "here").name == "here"


def test_ctrl_c_leaves_a_record_of_the_rounds_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    num_calls = []
    moves = merge.between_rounds

    def interrupt(side: str, module: torch.nn.Module) -> None:
        num_calls.append(side)
        if len(num_calls) == 1 + 2 * 2 + 2 * 2:  # warm-up; two rounds; then within the third
            raise KeyboardInterrupt
        moves(side, module)

    monkeypatch.setattr(merge, "between_rounds", interrupt)
    code, out, _ = call(monkeypatch, capsys, *LAYER, "--sides", "lora,snell", "--output", str(tmp_path))
    assert code == 130
    record = read_bench(tmp_path)
    assert record.interrupted
    assert [(row.case, row.side, row.rounds) for row in record.rows] == [
        ("24→40 r=4", "lora", 2),
        ("24→40 r=4", "snell", 2),
    ]
    assert (record.rows[1].note or "").endswith("interrupted after 2 rounds")
    assert set(record.rows[1].ratios) == {"lora"}
    assert ", interrupted" in out


def test_ctrl_c_before_anything_was_timed_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(merge, "gate_layer", interrupt)
    code, _, err = call(monkeypatch, capsys, *LAYER, "--output", str(tmp_path / "new"))
    assert code == 130
    assert "there is no record" in err
    assert not (tmp_path / "new").exists()
