"""A row of the table: the same work twice. Also the memory of a process, and processes that measure for a row."""

import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
HEADER = f"{'':<54}{'ratio':>7}{'least … most':>17}{'goal':>8}   floor"


@dataclass
class Row:
    """What was measured.

    Attributes:
        name: ours.
        floor: what ours is divided by, in words.
        ratios: one per repeat, of the same run.
        ours, floors: the figures themselves, one per repeat, in ``unit``.
        goal: the ratio is meant to be at most this; None: there is no goal.
    """

    name: str
    floor: str
    ours: Sequence[float]
    floors: Sequence[float]
    unit: str
    goal: float | None = None

    @property
    def ratios(self) -> list[float]:
        return [a / b for a, b in zip(self.ours, self.floors, strict=True)]

    def __str__(self) -> str:
        ratios = self.ratios
        spread = f"{min(ratios):.2f} … {max(ratios):.2f}" if len(ratios) > 1 else ""
        goal = "" if self.goal is None else f"≤ {self.goal:.2f}"
        both = f"{figure(self.ours)} / {figure(self.floors)} {self.unit}"
        return f"{self.name:<54}{statistics.median(ratios):>7.2f}{spread:>17}{goal:>8}   {self.floor}: {both}"

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "ratios": self.ratios, "median": statistics.median(self.ratios)}


def figure(values: Sequence[float]) -> str:
    middle = statistics.median(values)
    return f"{middle:.3g}" if middle < 1000 else f"{middle:.0f}"


def memory(field: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process in bytes; unlike ``ru_maxrss`` not inherited from the parent."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def forget_peak() -> None:
    """From now on VmHWM is the peak since this call."""
    Path("/proc/self/clear_refs").write_text("5")


def start(module: str, *arguments: object, launcher: Sequence[str] = ()) -> subprocess.Popen[str]:
    """A process of its own, which prints JSON in its last line. As users have it, Lightning sets its threads.

    Args:
        module: of ``tests.benchmarks``.
        arguments: of its command.
        launcher: arguments of Python before the module's, of a program that starts it.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith("OMP_")}
    command = [sys.executable, *launcher, "-m", f"tests.benchmarks.{module}", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT)


def result(process: subprocess.Popen[str]) -> dict[str, float]:
    output, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{process.args} ended with {process.returncode}.")
    found: dict[str, float] = json.loads(output.strip().splitlines()[-1])
    return found
