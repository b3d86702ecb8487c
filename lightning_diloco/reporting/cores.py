"""How many cores this process may use.

Owns the reading of the system's limits. The advice that follows from them: ``summary.py``. Imports neither torch nor
Lightning.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path


def usable_cores(root: Path = Path("/")) -> int:
    """Whole cores, at least 1: those that the process is bound to, or fewer if its control groups have a quota.

    A container with a quota (``docker run --cpus=2``, a limit of Kubernetes) sees all cores of the machine, and is
    stopped for the rest of every period in which it has used up its share. Quotas are looked for where Linux
    distributions mount control groups; an unreadable file counts as no quota.

    Args:
        root: where ``proc`` and ``sys`` are.
    """
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min([bound, *_quotas(root)])))


def _quotas(root: Path) -> Iterator[float]:
    """CPU seconds per second, of every control group that the process is in.

    A path counts from the root of the namespace, often the machine's. In a container the group itself may be mounted
    at the top, so every place on the way up is tried.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().split("\n")
    except (OSError, ValueError):
        return
    for line in lines:
        controllers, _, path = line.partition(":")[2].partition(":")
        first_version = "cpu" in controllers.split(",")
        if not (first_version or line.startswith("0::")) or ".." in path.split("/"):  # another's, or out of sight
            continue
        top = root / ("sys/fs/cgroup/cpu" if first_version else "sys/fs/cgroup")
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if first_version else ("cpu.max",)
        group = top / path.strip("/")
        for place in (group, *group.parents[: len(group.parts) - len(top.parts)]):
            yield _share(place / name for name in names)


def _share(files: Iterator[Path]) -> float:
    """Quota over period; infinite without a quota ("max" or −1)."""
    try:
        quota, period = " ".join(file.read_text() for file in files).split()
        share = float(quota) / float(period)
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf
    return share if share > 0 else math.inf
