"""`snell-scale sweep` before anything starts: bad input, --print, --dry-run, GPUs, exit codes."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from snell_scale.attempt import blank_result
from snell_scale.records import Status
from snell_scale.sweep import command
from snell_scale.sweep.executors import Resources
from tests.sweep.planned import Call, folder_of, plan, record


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--executor", "pbs", "--grid", "seeds=0,1"], "expected one of local, slurm"),
        (["--executor", "local"], "this is one run, not a study"),
        (["--executor", "local", "--grid", "seeds=0,1", "--no-wait"], "--no-wait is for --executor slurm"),
        (["--executor", "local", "--grid", "seeds=0,1", "--time", "5"], "--time is for --executor slurm"),
        (["--executor", "local", "--grid", "seeds=0,1", "--processes", "2"], "--set engine.name=ddp"),
        (["--executor", "slurm", "--grid", "seeds=0,1", "--sbatch", "account"], "key=value"),
    ],
)
def test_bad_input_is_one_clear_message(
    arguments: list[str], expected: str, tiny_file: Path, snell: Call
) -> None:
    code, _, err = snell("sweep", tiny_file, *arguments)
    assert code == 2
    assert expected in err
    assert not (tiny_file.parent / "runs").exists()


def test_submitit_is_asked_for_by_name(tiny_file: Path, snell: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    code, _, err = snell("sweep", tiny_file, "--executor", "local", "--grid", "seeds=0,1")
    assert code == 2
    assert 'pip install "snell-scale[cluster]"' in err


def test_print_and_dry_run_start_nothing(tiny_file: Path, snell: Call) -> None:
    first = plan(tiny_file, 1)[0]
    record(first, "oom")
    arguments = ["sweep", tiny_file, "--name", "s", "--grid", "seeds=0,1"]
    code, out, _ = snell(*arguments, "--executor", "local", "--dry-run")
    assert code == 0
    assert out.splitlines() == [f"{folder_of(first)}: oom", f"{folder_of(first).with_name('seed1')}: new"]
    code, out, _ = snell(*arguments, "--executor", "local", "--print")
    assert code == 0
    config_file = folder_of(first).with_name(".configs") / "seed1.yaml"
    end = f" -m snell_scale.cli run {config_file} --resume auto --varied '{{\"seed\": 1}}'"
    assert out == f"{sys.executable}{end}\n"  # the other is done
    options = ["--set", "engine.name=ddp", "--processes", "2", "--nodes", "2", "--sbatch", "account=me"]
    code, out, _ = snell(*arguments, "--executor", "slurm", *options, "--print")
    assert code == 0
    assert "nodes=2" in out
    assert "'account': 'me'" in out
    assert "-m torch.distributed.run --nnodes=2" in out
    assert "--nproc-per-node=2" in out
    assert sorted(path.name for path in folder_of(first).parent.iterdir()) == ["seed0"]


def test_gpus_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    resources = Resources("local", num_jobs=2, gpus_per_node=2)
    assert [resources.visible_devices(slot) for slot in (0, 1)] == ["4,5", "6,7"]
    assert Resources("local").visible_devices(0) == "4,5,6,7"
    with pytest.raises(ValueError, match="need 6 GPUs"):
        Resources("local", num_jobs=3, gpus_per_node=2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert Resources("local", num_jobs=2, gpus_per_node=2).visible_devices(1) == "2,3"
    assert Resources("local").visible_devices(0) is None


def test_the_exit_code_tells_failures_from_results(tiny_file: Path) -> None:
    def code(*statuses: Status) -> int:
        config = plan(tiny_file, 1)[0].config
        return command._exit_code([replace(blank_result(config, {}), status=status) for status in statuses])

    assert code("ok", "oom", "diverged") == 0
    assert code("ok", "interrupted") == 75
    assert code("interrupted", "failed", "ok") == 1
