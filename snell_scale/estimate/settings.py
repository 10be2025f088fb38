"""What the estimates of one command share."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

Target: TypeAlias = Literal["cpu", "cuda"]
"""Whose kernels the merge op is taken to run."""

HEADROOM = 0.1
"""Share of a device's memory left for what no estimate knows: context, workspaces, fragmentation."""


@dataclass(frozen=True)
class Settings:
    """See Estimator. limit_bytes: what there is on a device; None: the peak alone is asked for."""

    num_classes: int | None
    target: Target | None
    microbatch_size: int | None
    limit_bytes: int | None
