"""How many threads there are cores for."""

from __future__ import annotations

import math
import os
from pathlib import Path

import psutil

CGROUPS = Path("/sys/fs/cgroup")


def usable_cores(cgroups: Path = CGROUPS) -> int:
    """Physical cores, but no more than this process is bound to, nor than the CPU limit of its
    container gives time for: threads beyond these only wait for each other. At least 1."""
    cores = psutil.cpu_count(logical=False) or 1
    if hasattr(os, "sched_getaffinity"):
        cores = min(cores, len(os.sched_getaffinity(0)))
    return max(1, math.ceil(min(cores, _quota(cgroups))))


def _quota(cgroups: Path) -> float:
    """Cores' worth of time by the cgroup of a container, of version 2 or 1."""
    for files in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):
        try:
            quota, period = " ".join((cgroups / file).read_text() for file in files).split()
            if float(quota) > 0:  # version 1 says -1 if there is no limit, 2 says max
                return float(quota) / float(period)
        except (OSError, ValueError):
            continue
    return math.inf
