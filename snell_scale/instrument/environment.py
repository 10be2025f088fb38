"""What a run ran on: commit, versions and hardware, as plain data; whatever cannot be found out is None."""

import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import snell_scale
from snell_scale.instrument import nvml

_PACKAGES = (
    "torch",
    "timm",
    "peft",
    "diffusers",
    "open_clip_torch",
    "deepspeed",
    "numpy",
    "triton",
    "transformers",
    "accelerate",
)
_VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "OMP_NUM_THREADS",
    "SNELL_SCALE_CPU_PRODUCTS",
    "TIMM_FUSED_ATTN",
    "TRITON_INTERPRET",
)


def collect_environment(device: torch.device) -> dict[str, Any]:
    """The content of environment.json for a run on `device`. Holds no host, user or path names.

    Never fails for something missing (git, a package, a driver), and imports none of the packages it names.
    """
    return {
        "snell_scale": snell_scale.__version__,
        "git": _git(),
        "device": str(device),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "cpu": _cpu(),
        "cuda": _cuda(),
        "variables": {name: os.environ.get(name) for name in _VARIABLES},
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git() -> dict[str, Any]:
    """Commit and dirty flag of the repository that tracks this package, else of the current directory's.

    A package installed into an environment inside somebody's repository is not tracked by it, and that
    repository's commit would say nothing about the package: then the current directory is meant.
    """
    package = Path(__file__).resolve().parent
    if _run_git(package, "ls-files", "--error-unmatch", Path(__file__).name) is not None:
        repository, directory = "package", package
    else:
        repository, directory = "current directory", Path.cwd()
    commit = _run_git(directory, "rev-parse", "HEAD")
    changes = _run_git(directory, "status", "--porcelain")
    return {
        "commit": commit,
        "dirty": None if changes is None else bool(changes),
        "repository": None if changes is None else repository,
    }


def _run_git(directory: Path, *arguments: str) -> str | None:
    # Inside a git hook GIT_DIR and others point at the hook's repository, wherever the directory is.
    # Without GIT_OPTIONAL_LOCKS=0 `git status` writes the index, and stands in the way of another git.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", "-C", str(directory), *arguments],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
            env={**inherited, "GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def cpu_model() -> str | None:
    """What the maker calls the processor."""
    model = re.search(r"^model name\s*:\s*(.+)$", _cpu_information(), re.MULTILINE)
    return model.group(1) if model else platform.processor() or None


def _cpu_information() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ""


def _cpu() -> dict[str, Any]:
    """num_cores are physical, num_logical_cores with hyper-threads, num_usable_cores this process's."""
    cores = re.findall(
        r"^physical id\s*:\s*(\d+)$.*?^core id\s*:\s*(\d+)$", _cpu_information(), re.MULTILINE | re.DOTALL
    )
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    return {
        "model": cpu_model(),
        "num_cores": len(set(cores)) or None,
        "num_logical_cores": os.cpu_count(),
        "num_usable_cores": usable,
        "num_threads": torch.get_num_threads(),
        "ram_bytes": _ram_bytes(),
    }


def _ram_bytes() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _cuda() -> dict[str, Any] | None:
    if not torch.cuda.is_available():
        return None
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return {
        "version": torch.version.cuda,
        "driver": nvml.driver_version(),
        "devices": [
            {
                "name": device.name,
                "capability": f"{device.major}.{device.minor}",
                "total_memory_bytes": device.total_memory,
            }
            for device in properties
        ],
    }
