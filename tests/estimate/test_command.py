"""`snell-scale estimate` as a user meets it: what it prints and writes, its exit codes, what it refuses."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from analysis.load import load_runs
from snell_scale.config import Config
from snell_scale.records import read_result
from snell_scale.run import run
from tests.command_line import call
from tests.conftest import TINY

Estimate = Callable[..., tuple[int, str, str]]


@pytest.fixture
def estimate(tiny_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Estimate:
    """estimate(arguments …) → (exit code, stdout, stderr), of the tiny config."""
    return lambda *arguments: call(monkeypatch, capsys, "estimate", str(tiny_file), *arguments)


def test_the_phases_and_where_the_peak_stands(estimate: Estimate) -> None:
    code, out, _ = estimate()
    assert code == 0
    assert "microbatch of 8, kernels of cpu" in out
    rows = [re.split(r"[^\w.()]+", line)[1:3] for line in out.splitlines() if re.search(r"\d\.\d", line)]
    assert {"load", "forward", "step"} <= {name for name, _ in rows[:4]}
    assert "backward (peak)" in out
    assert re.search(r"estimated peak [\d.]+ MiB in backward at blocks\.\d", out)


def test_the_kernels_are_a_gpus_where_they_are_asked_for(estimate: Estimate) -> None:
    assert "kernels of cuda" in estimate("--target", "cuda")[1]
    assert "kernels of cuda" in estimate("engine.device=auto")[1]


@pytest.mark.parametrize(("memory", "code"), [("8GiB", 0), ("64KiB", 3)])
def test_the_exit_code_says_whether_it_fits(estimate: Estimate, memory: str, code: int) -> None:
    ended, out, _ = estimate("--device-memory", memory)
    assert ended == code
    assert ("does not fit into" in out) is (code == 3)
    assert ("Not even a microbatch of 1 fits" in out) is (code == 3)


def test_the_largest_microbatch_that_fits_is_said(estimate: Estimate) -> None:
    _, out, _ = estimate("--device-memory", "2MiB", "--headroom", "0")
    found = re.search(r"The largest microbatch that fits into 2\.0 MiB: (\d+) ", out)
    assert found is not None
    largest = int(found[1])
    assert estimate("--device-memory", "2MiB", "--headroom", "0", "--microbatch", str(largest))[0] == 0
    assert estimate("--device-memory", "2MiB", "--headroom", "0", "--microbatch", str(largest + 1))[0] == 3


def test_an_evaluation_batch_that_does_not_fit_is_told_from_the_step(estimate: Estimate) -> None:
    """No microbatch fits then, whatever the training step would bear."""
    limited = ["--device-memory", "2MiB", "--headroom", "0"]
    code, out, _ = estimate("evaluation.batch_size=1024", *limited)
    assert code == 3
    assert "An evaluation batch of 1024 does not fit: lower evaluation.batch_size" in out
    found = re.search(r"The largest microbatch of the training step that fits into 2\.0 MiB: (\d+) ", out)
    assert found is not None
    assert "The largest microbatch that fits" not in out
    assert estimate("evaluation.batch_size=1", "--microbatch", found[1], *limited)[0] == 0


@pytest.mark.parametrize(
    ("engine", "sharding"), [("ddp", "shard the weights (engine.name=fsdp2), "), ("fsdp2", "")]
)
def test_only_what_is_not_done_yet_is_advised(estimate: Estimate, engine: str, sharding: str) -> None:
    _, out, _ = estimate("--engine", engine, "--device-memory", "8KiB")
    advice = f"{sharding}set training.activation_checkpointing=true, or train less of the model"
    assert f"Not even a microbatch of 1 fits into 0.0 MiB: {advice}" in out.replace("\n", " ")


def test_headroom_is_kept_free(estimate: Estimate) -> None:
    _, out, _ = estimate("--device-memory", "10GiB", "--headroom", "0.5")
    assert "fits into 5.00 GiB" in out


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "deepspeed"])
def test_ranks_that_are_not_there(estimate: Estimate, engine: str) -> None:
    code, out, err = estimate("--engine", engine, "--world-size", "4", "training.batch_size=16")
    assert (code, err) == (0, "")
    assert "microbatch of 4, one of 4 ranks" in out
    assert ("DeepSpeed's documented arithmetic" in out) is (engine == "deepspeed")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--world-size", "2"], "choose --engine ddp, fsdp2 or deepspeed"),
        (["--world-size", "3", "--engine", "ddp"], "batch_size=8 does not divide"),
        (["training.compile=true"], "training.compile has no estimate"),
        (["--device-memory", "80G"], "write it like 80GiB"),
        (["--device-memory", "0GiB"], "write it like 80GiB"),
        (["--engine", "fsdp"], "did you mean 'fsdp2'"),
        (["--matrix", "world_size=0"], "expected whole numbers of ranks"),
        (["--matrix", "world_size=two"], "expected whole numbers of ranks"),
        (
            ["--engine", "fsdp2", "--world-size", "3", "--microbatch", "4", "engine.replicas=2"],
            "engine.replicas=2 does not divide 3",
        ),
    ],
)
def test_what_cannot_be_estimated_is_refused(estimate: Estimate, arguments: list[str], expected: str) -> None:
    code, _, err = estimate(*arguments)
    assert code == 2
    assert expected in err.replace("\n", " ")
    assert "Traceback" not in err


def test_shira_is_refused_and_a_method_like_it_named(tiny_file: Path, estimate: Estimate) -> None:
    tiny_file.write_text(yaml.safe_dump({**TINY, "method": {"name": "shira", "r": 4, "targets": "all"}}))
    code, _, err = estimate()
    assert code == 2
    assert "method.name=gps is the sparse method that has one" in err.replace("\n", " ")


def test_without_data_the_classes_can_be_given(tiny_file: Path, estimate: Estimate) -> None:
    nowhere = {"name": "image_folder", "root": "nowhere", "image_size": 8}
    tiny_file.write_text(yaml.safe_dump({**TINY, "data": nowhere}))
    code, _, err = estimate()
    assert code == 2
    assert "give --num-classes N, and no data are read" in err.replace("\n", " ")
    code, out, _ = estimate("--num-classes", "3")
    assert code == 0
    assert "parameters" in out


def test_a_record_is_written_where_it_is_asked_for(estimate: Estimate, tmp_path: Path) -> None:
    assert estimate()[0] == 0
    assert not (tmp_path / "runs").exists()
    assert estimate("--output", str(tmp_path / "out"), "--device-memory", "64KiB")[0] == 3
    result = read_result(tmp_path / "out" / "tiny")
    assert (result.predicted, result.status, result.batch_size) == (True, "oom", 8)


def test_a_run_that_was_run_is_not_overwritten(
    estimate: Estimate, tiny: Callable[..., Config], tmp_path: Path
) -> None:
    run(tiny("training.steps=2"), quiet=True)
    record = tmp_path / "runs" / "tiny" / "result.json"
    before = record.read_bytes()
    code, _, err = estimate("--output", str(tmp_path / "runs"))
    assert code == 2
    assert "give the estimates another --output" in err.replace("\n", " ")
    assert record.read_bytes() == before


@pytest.fixture
def matrix(tiny_file: Path, estimate: Estimate, tmp_path: Path) -> tuple[Path, tuple[int, str, str]]:
    """Where the records of a matrix are, and how it ended: two methods on two engines, one rank and four."""
    raw = {**TINY, "method": {"r": 4, "targets": "all"}, "variants": {"snell": {"method": {"sparsity": 0.5}}}}
    tiny_file.write_text(yaml.safe_dump(raw))
    options = ["--matrix", "methods=lora,snell", "--matrix", "engine.name=single,fsdp2"]
    options += ["--matrix", "world_size=1,4", "--microbatch", "8"]
    ended = estimate(*options, "--output", str(tmp_path / "out"))
    return tmp_path / "out", ended


def test_a_matrix_is_records_that_analysis_reads(matrix: tuple[Path, tuple[int, str, str]]) -> None:
    folder, (code, out, _) = matrix
    assert code == 0
    # One process on four ranks is no run: these two are refused, and the others go on.
    assert out.count("refused: ") == 2
    assert "choose --engine ddp, fsdp2 or deepspeed" in out
    runs = load_runs([folder])
    assert len(runs) == 6
    assert runs["predicted"].all()
    assert set(runs["method"]) == {"lora", "snell"}
    assert set(runs["microbatch_size"]) == {8}  # of one rank, as in weak scaling
    assert (runs["batch_size"] == 8 * runs["world_size"]).all()
    assert (runs["peak_total_mib"] > 0).all()
    of_fsdp2 = runs[runs["engine"].str.startswith("fsdp2")]
    for method in ("lora", "snell"):
        rows = of_fsdp2[of_fsdp2["method"] == method]
        sizes = dict(zip(rows["world_size"], rows["peak_parameters_mib"], strict=True))
        assert sizes.keys() == {1, 4}
        assert sizes[4] < sizes[1]
    written = [read_result(path.parent) for path in sorted(folder.rglob("result.json"))]
    assert all(result.predicted and result.status == "ok" for result in written)
    assert {result.varied["world_size"] for result in written} == {1, 4}


def test_a_record_knows_the_options_that_its_config_does_not(estimate: Estimate, tmp_path: Path) -> None:
    assert estimate("--target", "cuda", "--num-classes", "3", "--output", str(tmp_path / "given"))[0] == 0
    assert estimate("--output", str(tmp_path / "read"))[0] == 0
    given, read = (read_result(tmp_path / place / "tiny").conditions for place in ("given", "read"))
    assert (given["target"], given["num_classes"]) == ("cuda", 3)
    assert (read["target"], read.get("num_classes")) == ("cpu", None)
