"""How many cores this process may use.

Owns the reading of what the system grants. What is said about it: ``summary.py``. Imports neither torch nor Lightning.
"""

import os
from collections.abc import Iterator
from pathlib import Path


def usable_cores(root: Path = Path("/")) -> int:
    """Whole cores, at least 1: those that the process is bound to, or fewer if its control groups have a quota.

    A container with a quota (``docker run --cpus=2``, a limit of Kubernetes) sees all cores of the machine, and is
    stopped for the rest of every period in which it has used up its share.

    Args:
        root: where ``proc`` and ``sys`` are.
    """
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min([bound, *_quotas(root)])))


def _quotas(root: Path) -> Iterator[float]:
    """CPU seconds per second, of every control group that the process is in and that has a quota (Linux).

    The path of a group is the machine's; a container may see its own group at the top instead.
    """
    groups = root / "proc/self/cgroup"
    for line in groups.read_text().splitlines() if groups.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / ("sys/fs/cgroup/cpu" if controllers else "sys/fs/cgroup")
        group = top / path.strip("/")
        for place in (group, *group.parents[: len(group.parts) - len(top.parts)]):
            files = (place / "cpu.cfs_quota_us", place / "cpu.cfs_period_us") if controllers else (place / "cpu.max",)
            numbers = " ".join(file.read_text() for file in files if file.exists()).split()
            if len(numbers) == 2 and numbers[0] not in ("max", "-1"):
                yield float(numbers[0]) / float(numbers[1])
