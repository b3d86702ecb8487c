"""The figures of ``orderings.py``: per trial of a claim the runs, and below them what was claimed and found."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib.pyplot as plt
from judging import interval_of, verdict_of
from ordering_runs import TASKS

COLORS = {"holds": "#009E73", "doesn't": "#D55E00", "undecided": "#777777"}
RUN = "#0072B2"
ROW = 0.21
"""Height of a row in inches."""


def draw(findings: Sequence[Any], file: Path) -> None:
    """Draws the trials of a claim one below the other.

    Args:
        findings: a :class:`orderings.Finding` per trial; none: no figure.
        file: to write.
    """
    if not findings:
        return
    with plt.rc_context({"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "lightning_diloco"}):
        rows = [count for found in findings for count in (len(found.numbers), len(found.judged))]
        heights = [ROW * (count + 1) for count in rows]
        size = (5.2, sum(heights) + 1.15 * len(findings) + 0.35)
        figure, axes = plt.subplots(
            len(rows), 1, figsize=size, squeeze=False, layout="constrained", height_ratios=heights
        )
        claim = findings[0].claim
        title = fill(f"{claim.id}: {claim.text}", 60)
        figure.suptitle(title, fontsize=9, fontweight="bold")
        for i, found in enumerate(findings):
            of_runs(axes[2 * i][0], found)
            of_comparisons(axes[2 * i + 1][0], found)
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None, dpi=150)
        plt.close(figure)


def of_runs(ax: Any, found: Any) -> None:
    """Mean and 95 % interval of each run, and its seeds."""
    for y, values in enumerate(found.numbers.values()):
        interval = interval_of(values)
        if len(values) > 1:
            ax.plot([interval.low, interval.high], [y, y], color=RUN, lw=1.6, solid_capstyle="butt")
        ax.plot(values, [y] * len(values), ls="", marker="|", ms=6, color=RUN, alpha=0.5)
        ax.plot(interval.effect, y, marker="o", ms=5, color=RUN)
    finish(ax, list(found.numbers))
    ax.set_title(f"{found.title}; {found.trial.setting}", fontsize=8, wrap=True)
    ax.set_xlabel(f"{found.trial.quantity or TASKS[found.trial.task].unit}", fontsize=8, labelpad=1)


def of_comparisons(ax: Any, found: Any) -> None:
    """The claimed range as a grey bar, and the effect with its interval in the verdict's colour."""
    inside = [x for one in found.judged for x in (one.found.low, one.found.high, one.found.effect, 0.0)]
    finite = [x for x in inside if abs(x) < float("inf")]
    reach = 0.08 * (max(finite) - min(finite)) or 1.0
    left, right = min(finite) - reach, max(finite) + reach
    ends = [x for one in found.judged for x in (one.comparison.least, one.comparison.most) if abs(x) < float("inf")]
    left, right = min(left, *(x - reach for x in ends)), max(right, *(x + reach for x in ends))
    for y, one in enumerate(found.judged):
        start, end = max(one.comparison.least, left), min(one.comparison.most, right)
        ax.barh(y, end - start, 0.8, start, color="#e4e4e4", zorder=0)
        color = COLORS[one.verdict]
        ax.plot([max(one.found.low, left), min(one.found.high, right)], [y, y], color=color, lw=1.6)
        ax.plot(one.found.effect, y, marker="D", ms=4.5, color=color)
    ax.axvline(0, color="black", lw=0.8, zorder=1)
    ax.set_xlim(left, right)
    finish(ax, [one.comparison.text for one in found.judged])
    unit = "second run above the first, %" if found.judged[0].comparison.relative else "second run less the first"
    ax.set_xlabel(f"{unit}; grey: claimed", fontsize=8, labelpad=1)
    verdict = verdict_of(found.judged)
    ax.set_title(verdict, fontsize=9, fontweight="bold", color=COLORS[verdict], loc="right", pad=3)


def finish(ax: Any, labels: Sequence[str]) -> None:
    """A row per label, from above."""
    ax.set_yticks(range(len(labels)), labels)
    ax.set_ylim(len(labels) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.tick_params(axis="x", labelsize=8, pad=1)
    ax.spines[["top", "right", "left"]].set_visible(False)
