"""The memory of this process on the host, as the operating system counts it."""

import re
from pathlib import Path

import psutil

_FIELDS = {"rss_bytes": "VmRSS", "peak_rss_bytes": "VmHWM"}


def host_memory(status: Path = Path("/proc/self/status")) -> dict[str, int | None]:
    """{"rss_bytes", "peak_rss_bytes"}: resident now, and at most since the process began.

    Pages that processes share (data loaded before workers were started) count in each. Where there is no
    /proc: from psutil, which knows a peak on Windows only; else the peak is None.
    """
    try:
        text = status.read_text(encoding="utf-8")
    except OSError:
        found = psutil.Process().memory_info()
        return {"rss_bytes": found.rss, "peak_rss_bytes": getattr(found, "peak_wset", None)}
    return {name: _bytes_of(text, key) for name, key in _FIELDS.items()}


def _bytes_of(text: str, key: str) -> int | None:
    line = re.search(rf"^{key}:\s*(\d+) kB$", text, re.MULTILINE)
    return 1024 * int(line.group(1)) if line else None
