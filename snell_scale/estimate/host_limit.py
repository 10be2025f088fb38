"""How much memory the control groups of this process still allow: of a container, a SLURM job, a systemd unit."""

from pathlib import Path, PurePosixPath
from typing import NamedTuple

_MOUNTED = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")


class _Files(NamedTuple):
    """What a version of control groups calls them. cache: file pages, given back first; in memory.stat."""

    limit: str
    used: str
    cache: str


_V1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = _Files("memory.max", "memory.current", "inactive_file")


def group_free_bytes(mounted: Path = _MOUNTED, own_groups: str | None = None) -> int | None:
    """The least that is left in this process's group and in those above it; None: no limit is known.

    A limit holds for all groups below it, so that the tightest may be anywhere on the way to the root. In a
    container the path may be one of the host, of which only the root is there to read.
    mounted: where control groups are. own_groups: the text of /proc/self/cgroup; None: read.
    """
    text = (_read(_OWN_GROUPS) or "") if own_groups is None else own_groups
    free = [_free(folder, files) for folder, files in _groups(mounted, text)]
    return min((num_bytes for num_bytes in free if num_bytes is not None), default=None)


def _groups(mounted: Path, text: str) -> list[tuple[Path, _Files]]:
    """Of lines such as 0::/a/b (version 2) and 4:memory:/a/b (version 1): the folders of /a/b, /a and /."""
    found = []
    for line in text.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, files = (mounted / "memory", _V1) if controllers else (mounted, _V2)
        group = PurePosixPath(path)
        found += [(root / str(place).lstrip("/"), files) for place in (group, *group.parents)]
    return found


def _free(group: Path, files: _Files) -> int | None:
    """Limit less use. Cached file pages are no use: they make room when memory is asked for."""
    limit, used = _number(_read(group / files.limit)), _number(_read(group / files.used))
    if limit is None or used is None:
        return None
    return max(0, limit - max(0, used - _cached(group, files.cache)))


def _cached(group: Path, name: str) -> int:
    pairs = (line.split() for line in (_read(group / "memory.stat") or "").splitlines())
    return sum(int(pair[1]) for pair in pairs if pair[0] == name)


def _number(text: str | None) -> int | None:
    """None of "max", which is no limit."""
    return int(text) if text is not None and text.strip().isdigit() else None


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return None
