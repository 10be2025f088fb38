"""Sizes of memory as people write them: "80GiB", "24 GB", "512MiB"."""

import re

_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_UNITS["TB"] = 10**12


def parse_size(text: str) -> int:
    """ "80GiB" → bytes; GiB is 2^30 and GB 10^9. ValueError for anything else, or for nothing."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?B|B)\s*", text)
    if found is None or float(found[1]) == 0:
        raise ValueError(f"{text!r} is no size of memory; write it like 80GiB, 24GB or 512MiB")
    return int(float(found[1]) * _UNITS[found[2]])


def show_size(num_bytes: float) -> str:
    """In GiB from 1 GiB on, in MiB below."""
    return f"{num_bytes / 2**30:,.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:,.1f} MiB"
