"""What the control groups of a process leave it, from a folder that looks like /sys/fs/cgroup."""

from pathlib import Path

import pytest

from snell_scale.estimate.host_limit import group_free_bytes

V1_UNLIMITED = 2**63 - 4096
JOB = "system.slice/slurmd/job_7/step_0"


def _v2(folder: Path, limit: int | str, used: int | None, stat: str | None = None) -> None:
    _write(folder, {"memory.max": limit, "memory.current": used, "memory.stat": stat})


def _v1(folder: Path, limit: int, used: int | None, stat: str | None = None) -> None:
    _write(folder, {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": used, "memory.stat": stat})


def _write(folder: Path, files: dict[str, int | str | None]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        if value is not None:
            (folder / name).write_text(f"{value}\n")


@pytest.mark.parametrize("limited", [".", "system.slice", "system.slice/slurmd/job_7", JOB])
def test_the_limit_of_any_group_up_to_the_root_holds(tmp_path: Path, limited: str) -> None:
    for name in (".", "system.slice", "system.slice/slurmd", "system.slice/slurmd/job_7", JOB):
        _v2(tmp_path / name, 1000 if name == limited else "max", 300)
    assert group_free_bytes(tmp_path, f"0::/{JOB}\n") == 700


def test_the_group_with_the_least_left_counts_and_not_the_one_with_the_least_limit(tmp_path: Path) -> None:
    _v2(tmp_path / "job", 2000, 1900)
    _v2(tmp_path / "job/step", 1000, 300)
    assert group_free_bytes(tmp_path, "0::/job/step\n") == 100


def test_groups_of_others_do_not_count(tmp_path: Path) -> None:
    _v2(tmp_path / "job", 2000, 500)
    _v2(tmp_path / "job/other", 10, 5)
    assert group_free_bytes(tmp_path, "0::/job/own\n") == 1500


def test_version_1_has_a_folder_of_its_own(tmp_path: Path) -> None:
    own = f"9:name=systemd:/{JOB}\n5:cpuset:/elsewhere\n4:memory:/{JOB}\n0::/\n"
    _v1(tmp_path / "memory", V1_UNLIMITED, 10**9)
    assert group_free_bytes(tmp_path, own) == V1_UNLIMITED - 10**9
    _v1(tmp_path / "memory/elsewhere", 5, 1)
    _v1(tmp_path / "memory" / JOB, 1000, 300)
    assert group_free_bytes(tmp_path, own) == 700


def test_a_container_that_sees_the_hosts_path_has_its_limit_at_the_root(tmp_path: Path) -> None:
    _v1(tmp_path / "memory", 1000, 300)
    assert group_free_bytes(tmp_path, "4:cpu,memory:/docker/0a1b\n") == 700


@pytest.mark.parametrize("version", [1, 2])
def test_cached_file_pages_are_free(tmp_path: Path, version: int) -> None:
    """What read the data filled the cache: it is the job's use, and given back where memory is asked for."""
    if version == 1:
        _v1(tmp_path / "memory", 1000, 900, "inactive_file 1\nactive_file 50\ntotal_inactive_file 600")
    else:
        _v2(tmp_path, 1000, 900, "anon 250\ninactive_file 600\nactive_file 50")
    assert group_free_bytes(tmp_path, "4:memory:/\n" if version == 1 else "0::/\n") == 700


def test_more_than_the_limit_in_use_leaves_nothing(tmp_path: Path) -> None:
    _v2(tmp_path, 1000, 1001)
    assert group_free_bytes(tmp_path, "0::/\n") == 0


def test_without_files_or_a_limit_there_is_none(tmp_path: Path) -> None:
    assert group_free_bytes(tmp_path, f"0::/{JOB}\n") is None
    assert group_free_bytes(tmp_path, "") is None
    _v2(tmp_path / JOB, "max", 300)
    assert group_free_bytes(tmp_path, f"0::/{JOB}\n") is None
    _v2(tmp_path, 1000, None)
    assert group_free_bytes(tmp_path, f"0::/{JOB}\n") is None


def test_the_groups_of_this_process_can_be_read() -> None:
    found = group_free_bytes()
    assert found is None or found >= 0
