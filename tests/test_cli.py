"""The command line as a user meets it: what it prints, its exit codes, and bad input."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from safetensors.torch import load_file

from snell_scale import cli, registry
from snell_scale.compare import parse_grid, plan_study, run_study
from snell_scale.records import read_result, read_steps
from tests.command_line import call


def test_run_then_merge(
    tiny_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = call(monkeypatch, capsys, "run", str(tiny_file), "training.steps=4")
    assert code == 0
    assert "step 4/4" in out
    adapter = tiny_file.parent / "runs" / "tiny" / "adapter"
    assert (adapter / "adapter_model.safetensors").is_file()
    merged = tiny_file.parent / "merged.safetensors"
    code, out, _ = call(monkeypatch, capsys, "merge", str(adapter), "--output", str(merged))
    assert code == 0
    tensors = load_file(merged)
    assert "blocks.0.attn.qkv.weight" in tensors
    assert not [name for name in tensors if "snell" in name or "base" in name]
    code, _, err = call(monkeypatch, capsys, "merge", str(adapter), "--output", str(merged))
    assert code == 2
    assert "--overwrite" in err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["run", "absent.yaml"], "no config file at absent.yaml"),
        (["run", "TINY", "training.lr"], "key=value"),
        (["run", "TINY", "method.sparsity=1.5"], "method.sparsity"),
        (["run", "TINY", "--resume", "perhaps"], "expected auto or never"),
        (["run", "TINY", "training.sparsity=0.5"], "unknown key"),
        (["run", "TINY", "data.classes=[1]"], "classes"),
        (["run", "TINY", "model.weights=nowhere.safetensors"], "nowhere.safetensors"),
        (["run", "TINY", "model.architecture=vit_base_patch16_223"], "vit_base_patch16_22"),
        (["run", "TINY", "output_dir=/proc/none"], "/proc/none"),
        (["compare", "TINY", "--grid", "methods"], "key=value"),
        (["compare", "TINY", "--grid", "methods=snell,lorra"], "did you mean 'lora'"),
        (["compare", "TINY", "TINY"], "share the folder"),
        (["list", "modles"], "did you mean 'models'"),
        (["merge", "absent", "--output", "x.safetensors"], "--base"),
    ],
)
def test_bad_input_is_one_clear_message(
    arguments: list[str],
    expected: str,
    tiny_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    filled = [str(tiny_file) if argument == "TINY" else argument for argument in arguments]
    code, _, err = call(monkeypatch, capsys, *filled)
    assert code == 2
    assert expected in err.replace("\n", " ")
    assert "Traceback" not in err


def test_dry_run_counts_and_writes_nothing(
    tiny_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = call(monkeypatch, capsys, "run", str(tiny_file), "--dry-run")
    assert code == 0
    assert "trainable parameters" in out
    assert not (tiny_file.parent / "runs").exists()


@pytest.mark.parametrize("kind", ["models", "methods", "tasks", "datasets", "engines"])
def test_lists_name_everything_registered(
    kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = call(monkeypatch, capsys, "list", kind)
    assert code == 0
    for name in registry.names({"datasets": "data"}.get(kind, kind.removesuffix("s"))):
        assert name in out


def test_schema_is_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = call(monkeypatch, capsys, "schema")
    assert json.loads(out)["properties"]["training"]


def test_grid_takes_everything_that_follows_it() -> None:
    spread = cli._spread_lists(["compare", "a.yaml", "--grid", "methods=a,b", "seeds=0,1", "--jobs", "2"])
    assert spread == ["compare", "a.yaml", "--grid", "methods=a,b", "--grid", "seeds=0,1", "--jobs", "2"]
    assert cli._spread_lists(["--grid=seeds=0", "b=1", "--set", "c=2", "d=3"]) == [
        "--grid", "seeds=0", "--grid", "b=1", "--set", "c=2", "--set", "d=3",
    ]  # fmt: skip
    assert parse_grid("seeds=0,1") == ("seeds", [0, 1])
    assert parse_grid("training.lr=1e-3,null") == ("training.lr", [1e-3, None])
    assert parse_grid("method.targets=[all, mlp]") == ("method.targets", ["all", "mlp"])


def test_names_of_runs_are_read_at_a_glance(tiny_file: Path) -> None:
    grid = {
        "methods": ["lora"],
        "models": ["resnet18"],
        "engines": ["ddp"],
        "training.batch_size": [32],
        "training.lr": [0.1],
    }
    raw = yaml.safe_load(tiny_file.read_text())
    raw["model"] = {"name": "timm", "head": "new"}
    raw["method"] = {"r": 4, "targets": "all"}
    tiny_file.write_text(yaml.safe_dump(raw))
    lookup = registry.config_class
    (planned,) = plan_study([tiny_file], grid=grid, overrides=[], name="study", config_class=lookup)
    assert planned.config.name == "study/lora-resnet18-ddp-batch32-lr0.1"
    assert (planned.config.engine.name, planned.config.model.architecture) == ("ddp", "resnet18")


def test_a_study_runs_every_combination_and_survives_a_failing_one(tiny_file: Path) -> None:
    raw = yaml.safe_load(tiny_file.read_text())
    raw["training"]["steps"] = 2
    raw["cases"] = {"sparse": {"method.sparsity": 0.9}, "broken": {"method.targets": "nothing_like_this"}}
    raw["grid"] = {"seed": [0, 1]}
    tiny_file.write_text(yaml.safe_dump(raw, sort_keys=False))
    planned = plan_study([tiny_file], grid={}, overrides=[], name="study", config_class=registry.config_class)
    assert [p.config.name for p in planned] == [
        "study/sparse-seed0", "study/sparse-seed1", "study/broken-seed0", "study/broken-seed1",
    ]  # fmt: skip
    seen: list[str] = []
    results = run_study(planned, num_jobs=2, finished=lambda run, result: seen.append(run.config.name))
    assert sorted(seen) == sorted(p.config.name for p in planned)
    assert [r.status for r in results] == ["ok", "ok", "failed", "failed"]
    assert "nothing_like_this" in (results[2].message or "")
    study = Path(planned[0].config.output_dir) / "study"
    assert read_result(study / "sparse-seed0").varied == {"case": "sparse", "seed": 0}
    assert read_result(study / "broken-seed0").status == "failed"  # no row of a study is lost


def test_merging_into_another_base_is_refused(
    tiny_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = yaml.safe_load(tiny_file.read_text())
    other = tiny_file.with_name("other.yaml")
    adapter = tiny_file.parent / "runs" / "tiny" / "adapter"
    call(monkeypatch, capsys, "run", str(tiny_file), "training.steps=2")
    for depth, width in ((1, 16), (3, 16), (2, 32)):
        raw["model"]["arguments"] |= {"depth": depth, "embed_dim": width}
        other.write_text(yaml.safe_dump(raw))
        arguments = (
            "merge",
            str(adapter),
            "--base",
            str(other),
            "--output",
            str(tiny_file.with_name("m.safetensors")),
        )
        code, _, err = call(monkeypatch, capsys, *arguments)
        assert code == 2
        assert "not an adapter of this model" in err
    assert not tiny_file.with_name("m.safetensors").exists()


def living_in_group(group: int) -> list[str]:
    """Names of the processes of a process group that have not ended (a zombie has)."""
    living = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                living.append(process.name())
    return living


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_study_saves_and_continues(tiny_file: Path, number: int) -> None:
    command = [
        sys.executable,
        "-m",
        "snell_scale.cli",
        "compare",
        str(tiny_file),
        "--name",
        "study",
        "--jobs",
        "2",
    ]
    command += ["--set", "training.steps=400", "--grid", "seeds=0,1,2,3"]
    study = tiny_file.parent / "runs" / "study"
    process = subprocess.Popen(command, start_new_session=True)
    deadline = time.monotonic() + 120
    while not all(len(read_steps(study / f"seed{seed}")) > 20 for seed in (0, 1)):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)
    assert process.wait(timeout=60) == 75
    assert [read_result(study / f"seed{seed}").status for seed in (0, 1)] == ["interrupted", "interrupted"]
    assert not (study / "seed2").exists()
    deadline = time.monotonic() + 10  # multiprocessing's resource tracker ends a moment after its parent
    while living := living_in_group(process.pid):
        assert time.monotonic() < deadline, living
        time.sleep(0.05)
    assert subprocess.run(command, check=False).returncode == 0
    assert [read_result(study / f"seed{seed}").status for seed in range(4)] == ["ok"] * 4
    assert read_result(study / "seed0").resumed_from_steps


def test_import_is_light() -> None:
    code = (
        "import sys, time; t = time.perf_counter(); import snell_scale; print(time.perf_counter() - t);"
        "print([m for m in ('deepspeed', 'diffusers', 'open_clip', 'pandas', 'matplotlib', 'peft', 'timm') "
        "if m in sys.modules])"
    )
    seconds, modules = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert float(seconds) < 3
    assert modules == "[]"
