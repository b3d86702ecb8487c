"""Does a published ordering hold here? The rule of ``orderings.py``, fixed before anything is trained.

A claim says of two runs a and b how far apart they end. The *effect* is how much higher b's number is than a's, in per
cent of a's: ``100 · mean(b_s − a_s) / mean(a_s)`` over seeds s. (For numbers that may be near 0, such as cosines: the
bare difference.) Its 95 % interval is Student's, of the differences ``b_s − a_s`` seed by seed: what both runs share
with a seed, initial weights and data, cancels.

A comparison claims a range for the effect. It *holds* if the whole interval lies inside, it *doesn't* if the whole
interval lies outside on one side; otherwise it is *undecided*. Of several comparisons: "holds" if all hold, "doesn't"
if any doesn't.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, stdev
from typing import Literal

from scipy.stats import t as student

Verdict = Literal["holds", "doesn't", "undecided"]
Numbers = Callable[[str], Sequence[float]]
"""Label of a run → its numbers, seed by seed, in the same order for all runs."""

MUCH = 2.0
"""Per cent: "≪" means more than this, "≈" less, either way. The smallest published "much" is a little less, so that the
rule is stricter: 1.8 % of the loss (perplexity 44.27 against 41.35, arXiv 2401.09135)."""
SLACK = 1.0
"""Per cent: "≤" allows as much in the wrong direction."""


@dataclass(frozen=True)
class Comparison:
    """Two runs, and the range in which the effect must lie.

    Attributes:
        a: label of a run.
        b: label of another.
        least: lower end of the claimed range.
        most: upper end.
        text: what is claimed, for tables and figures.
        relative: whether the effect is in per cent of a's mean, else the bare difference.
    """

    a: str
    b: str
    least: float
    most: float
    text: str
    relative: bool = True


def lower(a: str, b: str, relative: bool = True) -> Comparison:
    """Claims a < b."""
    return Comparison(a, b, 0.0, math.inf, f"{a} < {b}", relative)


def much_lower(a: str, b: str) -> Comparison:
    """Claims a ≪ b: by more than :data:`MUCH`."""
    return Comparison(a, b, MUCH, math.inf, f"{a} ≪ {b}")


def at_most(a: str, b: str) -> Comparison:
    """Claims a ≤ b, up to :data:`SLACK`."""
    return Comparison(a, b, -SLACK, math.inf, f"{a} ≤ {b}")


def not_far_above(a: str, b: str, percent: float) -> Comparison:
    """Claims that b is at most ``percent`` above a."""
    return Comparison(a, b, -math.inf, percent, f"{a} + {percent:g} % > {b}")


def about_equal(a: str, b: str) -> Comparison:
    """Claims a ≈ b, within :data:`MUCH`."""
    return Comparison(a, b, -MUCH, MUCH, f"{a} ≈ {b}")


def in_order(make: Callable[[str, str], Comparison], labels: Sequence[str]) -> tuple[Comparison, ...]:
    """Each run with the next."""
    return tuple(make(a, b) for a, b in pairwise(labels))


@dataclass(frozen=True)
class Interval:
    """An effect, and its 95 % interval from ``low`` to ``high``; unbounded with fewer than two seeds."""

    effect: float
    low: float
    high: float


def interval_of(values: Sequence[float]) -> Interval:
    """Mean and Student's 95 % interval of the mean."""
    mean, n = fmean(values), len(values)
    if n < 2 or not all(map(math.isfinite, values)):
        return Interval(mean, -math.inf, math.inf)
    half = float(student.ppf(0.975, n - 1)) * stdev(values) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half)


@dataclass(frozen=True)
class Judged:
    """A comparison with what has been found."""

    comparison: Comparison
    found: Interval

    @property
    def verdict(self) -> Verdict:
        """See the module."""
        least, most, found = self.comparison.least, self.comparison.most, self.found
        if least < found.low and found.high < most:
            return "holds"
        return "doesn't" if found.high <= least or found.low >= most else "undecided"

    @property
    def room(self) -> float:
        """From the interval to the nearest end of the claimed range; negative if it reaches beyond."""
        return min(self.found.low - self.comparison.least, self.comparison.most - self.found.high)

    def __str__(self) -> str:
        unit, form = (" %", "+.1f") if self.comparison.relative else ("", "+.3f")
        return f"{self.found.effect:{form}}{unit} [{self.found.low:{form}}, {self.found.high:{form}}]"


def judge(comparison: Comparison, numbers: Numbers) -> Judged:
    """The effect with its interval, from differences seed by seed."""
    a, b = numbers(comparison.a), numbers(comparison.b)
    found = interval_of([y - x for x, y in zip(a, b, strict=True)])
    scale = 100 / fmean(a) if comparison.relative else 1.0
    return Judged(comparison, Interval(found.effect * scale, found.low * scale, found.high * scale))


def verdict_of(judged: Sequence[Judged]) -> Verdict:
    """Of several comparisons."""
    verdicts = {one.verdict for one in judged}
    return "doesn't" if "doesn't" in verdicts else "undecided" if "undecided" in verdicts else "holds"


def decisive(judged: Sequence[Judged]) -> Judged:
    """The comparison that decides: of those with the verdict of all, the one with the least room."""
    verdict = verdict_of(judged)
    return min((one for one in judged if one.verdict == verdict), key=lambda one: one.room)
