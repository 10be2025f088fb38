"""The environment record: right where something is there, None where it is not, and never a failure."""

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

import snell_scale
from snell_scale.instrument import environment
from snell_scale.instrument.environment import collect_environment

CPU = torch.device("cpu")


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b.c", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one commit and an ignored, thus untracked, copy of the package in it."""
    monkeypatch.delenv("GIT_DIR", raising=False)
    folder = tmp_path / "repository"
    package = folder / "site-packages"
    package.mkdir(parents=True)
    (folder / ".gitignore").write_text("site-packages\n")
    (package / "environment.py").write_text("")
    git(folder, "init", "--quiet")
    git(folder, "add", ".gitignore")
    git(folder, "commit", "--quiet", "--message", "first")
    monkeypatch.setattr(environment, "__file__", str(package / "environment.py"))
    monkeypatch.chdir(folder)
    return folder


def test_record_is_plain_data_with_the_versions_that_are_installed():
    record = collect_environment(CPU)
    assert json.loads(json.dumps(record)) == record
    assert record["snell_scale"] == snell_scale.__version__
    assert record["device"] == "cpu"
    assert record["python"] == ".".join(str(part) for part in sys.version_info[:3])
    assert record["packages"]["torch"] == metadata.version("torch")
    assert record["packages"]["numpy"] == metadata.version("numpy")
    assert record["cpu"]["num_logical_cores"] >= 1
    assert record["cpu"]["num_threads"] == torch.get_num_threads()
    assert record["cpu"]["ram_bytes"] is None or record["cpu"]["ram_bytes"] > 2**28
    assert (record["cuda"] is None) == (not torch.cuda.is_available())


def test_absent_packages_and_unset_variables_are_none(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(environment, "_PACKAGES", ("torch", "no-such-package-of-ours"))
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("TIMM_FUSED_ATTN", "0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    record = collect_environment(CPU)
    assert record["packages"]["no-such-package-of-ours"] is None
    assert record["variables"]["OMP_NUM_THREADS"] == "3"
    assert record["variables"]["TIMM_FUSED_ATTN"] == "0"
    assert record["variables"]["CUDA_VISIBLE_DEVICES"] is None


def test_no_named_package_is_imported():
    code = (
        "import sys, torch; from snell_scale.instrument.environment import collect_environment\n"
        "before = set(sys.modules); collect_environment(torch.device('cpu'))\n"
        "print(sorted({name.split('.')[0] for name in set(sys.modules) - before}))\n"
        "print([n for n in ('timm', 'peft', 'diffusers', 'open_clip', 'deepspeed', 'transformers', "
        "'accelerate') if n in sys.modules])"
    )
    root = Path(snell_scale.__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    new, named = done.stdout.splitlines()
    assert named == "[]"
    assert not {"numpy", "triton"} & set(json.loads(new.replace("'", '"')))


def test_commit_and_dirty_flag_of_the_current_directory(repository: Path):
    record = collect_environment(CPU)["git"]
    commit = git(repository, "rev-parse", "HEAD")
    assert record == {"commit": commit, "dirty": False, "repository": "current directory"}
    (repository / "new.txt").write_text("")
    assert collect_environment(CPU)["git"]["dirty"] is True


def test_the_repository_that_tracks_the_package_comes_first(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    git(repository, "add", "--force", "site-packages/environment.py")
    git(repository, "commit", "--quiet", "--message", "second")
    monkeypatch.chdir(tmp_path)
    commit = git(repository, "rev-parse", "HEAD")
    expected = {"commit": commit, "dirty": False, "repository": "package"}
    assert collect_environment(CPU)["git"] == expected
    # As inside a git hook.
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    assert collect_environment(CPU)["git"] == expected


def test_outside_of_a_checkout_and_without_git(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    nothing = {"commit": None, "dirty": None, "repository": None}
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "environment.py"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert collect_environment(CPU)["git"] == nothing
    monkeypatch.chdir(repository)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert collect_environment(CPU)["git"] == nothing


def test_before_the_first_commit_the_commit_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    git(tmp_path, "init", "--quiet")
    (tmp_path / "environment.py").write_text("")
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "environment.py"))
    monkeypatch.chdir(tmp_path)
    assert collect_environment(CPU)["git"] == {
        "commit": None,
        "dirty": True,
        "repository": "current directory",
    }
