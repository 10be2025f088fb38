"""The command of a run: right for one process, several, and an estimate; and it does make the run again."""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from synthetic_runs import WriteRun

from analysis.load import Row, load_environments, load_runs, rows_of
from analysis.report_page.commands import code_of, command_of

REPOSITORY = Path(__file__).resolve().parents[2]


def row(folder: Path) -> Row:
    return rows_of(load_runs([folder]))[0]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, "snell-scale run {config} output_dir=again"),
        (
            {"engine": "fsdp2", "world_size": 4},
            "launch/torchrun.sh --nproc-per-node 4 {config} output_dir=again",
        ),
        # An engine of several processes needs its launcher with one process too.
        ({"engine": "ddp"}, "launch/torchrun.sh --nproc-per-node 1 {config} output_dir=again"),
        ({"predicted": True}, "snell-scale estimate {config} --world-size 1"),
        (
            {"predicted": True, "engine": "deepspeed", "world_size": 1024, "conditions": {"microbatch_size": 4}},
            "snell-scale estimate {config} --world-size 1024 --microbatch 4",
        ),
        (
            {"predicted": True, "conditions": {"microbatch_size": 4, "target": "cuda", "num_classes": 1000}},
            "snell-scale estimate {config} --world-size 1 --microbatch 4 --num-classes 1000 --target cuda",
        ),
    ],
)
def test_command_by_engine_and_ranks(write_run: WriteRun, fields: dict[str, Any], expected: str) -> None:
    folder = write_run("lora", 0, **fields)
    assert command_of(row(folder), {}) == expected.format(config=folder / "config.yaml")


@pytest.mark.parametrize("is_predicted", [False, True])
def test_attention_that_kept_its_matrices_does_so_again(write_run: WriteRun, is_predicted: bool) -> None:
    def command(seed: int, is_fused: bool | None, environment: dict[str, Any]) -> str:
        conditions = {} if is_fused is None else {"fused_attention": is_fused}
        folder = write_run("lora", seed, predicted=is_predicted, conditions=conditions)
        found = command_of(row(folder), environment)
        assert found is not None
        return found.partition("snell-scale")[0]

    assert command(0, False, {}) == "TIMM_FUSED_ATTN=0 "
    assert command(1, False, {"variables.TIMM_FUSED_ATTN": "0"}) == "TIMM_FUSED_ATTN=0 "
    assert command(2, True, {"variables.TIMM_FUSED_ATTN": "2"}) == "TIMM_FUSED_ATTN=2 "
    assert command(3, True, {}) == command(4, None, {}) == ""


def test_a_condition_that_only_some_runs_know_is_in_their_commands(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("lora", 0)
    write_run("lora", 1, conditions={"fused_attention": False})
    unknown, unfused = (command_of(run, {}) or "" for run in rows_of(load_runs([tmp_path])))
    assert unknown.startswith("snell-scale ")
    assert unfused.startswith("TIMM_FUSED_ATTN=0 snell-scale ")


def test_variables_and_places_are_quoted(write_run: WriteRun) -> None:
    folder = write_run("lora", 0, study="a study")
    environment = {
        "variables.PYTORCH_ALLOC_CONF": "expandable_segments:True,x y",
        "variables.OMP_NUM_THREADS": None,
        "variables.TRITON_INTERPRET": float("nan"),
        "variables.CUDA_VISIBLE_DEVICES": "3",
    }
    command = command_of(row(folder), environment)
    assert command is not None
    assert command.startswith("PYTORCH_ALLOC_CONF='expandable_segments:True,x y' snell-scale run ")
    assert shlex.split(command)[3] == str(folder / "config.yaml")
    assert "CUDA" not in command


def test_a_record_without_its_config_has_no_command(write_run: WriteRun) -> None:
    folder = write_run("lora", 0)
    (folder / "config.yaml").unlink()
    assert command_of(row(folder), {}) is None


def test_code_is_the_commit_of_the_package() -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    git = {"git.commit": commit, "git.repository": "package", "git.dirty": False, "snell_scale": "0.1.0"}
    assert code_of(git) == "0123456789ab"
    assert code_of(git | {"git.dirty": True}) == "0123456789ab + changes"
    assert code_of(git | {"git.dirty": float("nan")}) == "0123456789ab"
    # The commit of somebody's repository says nothing about an installed package.
    assert code_of(git | {"git.repository": "current directory"}) == "version 0.1.0"
    assert code_of({}) is None


def test_the_command_of_a_run_makes_it_again(tiny_file: Path, tmp_path: Path) -> None:
    config = yaml.safe_load(tiny_file.read_text(encoding="utf-8"))
    snell_scale = [sys.executable, "-m", "snell_scale.cli"]

    def call(*arguments: str) -> None:
        done = subprocess.run(
            [*snell_scale, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr

    call("run", str(tiny_file), "engine.cpu_threads=1")
    runs = load_runs([config["output_dir"]])
    command = command_of(rows_of(runs)[0], rows_of(load_environments(runs))[0])
    assert command is not None
    words = shlex.split(command)
    call(*words[words.index("snell-scale") + 1 :])
    first, again = (
        json.loads((tmp_path / place / "tiny" / "result.json").read_text()) for place in ("runs", "again")
    )
    assert again["metrics"] == first["metrics"]
