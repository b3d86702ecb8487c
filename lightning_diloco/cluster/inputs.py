"""Numbers that describe a cluster: checked, and turned into floats and tuples.

Owns the checks and their errors only. Every error names the argument (whose name has the unit), what was given, the
rule and the way out.
"""

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, Literal

Bound = Literal["positive", "not negative", "fraction"]
Row = tuple[float, ...]
Numbers = float | Row | tuple[Row, ...]

_RULES = {
    "positive": "a finite number > 0",
    "not negative": "a finite number ≥ 0",
    "fraction": "a number > 0 and ≤ 1",
}


def number(owner: str, name: str, value: Any, bound: Bound = "positive") -> float:
    """``value`` as a float.

    Args:
        owner: whose argument it is; stands at the start of an error.
        name: the argument's name.
        value: what was given.
        bound: "positive": > 0; "not negative": ≥ 0; "fraction": > 0 and ≤ 1; always finite.

    Raises:
        ValueError: ``value`` is no such number.
    """
    if not _fits(value, bound):
        raise ValueError(f"{owner}: `{name}` (={value!r}) must be {_RULES[bound]}.")
    return float(value)


def count(owner: str, name: str, value: Any, least: int = 1) -> int:
    """``value`` as an integer ≥ ``least``.

    Raises:
        ValueError: ``value`` is no such number.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{owner}: `{name}` (={value!r}) must be an integer ≥ {least}.")
    return int(value)


def per_worker(owner: str, name: str, value: Any, bound: Bound) -> float | Row:
    """``value`` as a float, or as a tuple with a float per worker.

    Raises:
        ValueError: it is neither, or a number is out of bounds.
    """
    value = _plain(value)
    if not isinstance(value, list):
        return _one(owner, name, value, bound, ", or a list with one per worker")
    if not value or any(isinstance(item, list) for item in value):
        raise ValueError(f"{owner}: `{name}` (={value!r}) must be one number or a list with one number per worker.")
    return tuple(_one(owner, f"{name}[{i}]", item, bound) for i, item in enumerate(value))


def per_link(owner: str, name: str, value: Any, bound: Bound) -> Numbers:
    """``value`` as a float, a tuple with a float per worker, or a square matrix of tuples.

    Row i, column j of a matrix is the link from worker i to worker j. Its diagonal is not used: any number ≥ 0.

    Raises:
        ValueError: it is none of them, or a number is out of bounds.
    """
    value = _plain(value)
    if not isinstance(value, list) or not any(isinstance(row, list) for row in value):
        return per_worker(owner, name, value, bound)
    if not all(isinstance(row, list) and len(row) == len(value) for row in value):
        lengths = [len(row) if isinstance(row, list) else "no list" for row in value]
        raise ValueError(
            f"{owner}: `{name}` has {len(value)} rows of lengths {lengths}. A matrix must be square: row i, column j is"
            " the link from worker i to worker j."
        )
    return tuple(
        tuple(_one(owner, f"{name}[{i}][{j}]", x, "not negative" if i == j else bound) for j, x in enumerate(row))
        for i, row in enumerate(value)
    )


def check_length(owner: str, name: str, value: Numbers, num_workers: int) -> None:
    """Whether a tuple has a value for each worker.

    Raises:
        ValueError: it has not.
    """
    if isinstance(value, tuple) and len(value) != num_workers:
        kind = f"a {len(value)} × {len(value)} matrix" if isinstance(value[0], tuple) else f"{len(value)} numbers"
        raise ValueError(
            f"{owner}: `{name}` has {kind}, but there are {num_workers} workers. Give one number for all, or a list"
            f" with {num_workers}."
        )


def check_schedule(owner: str, interval: int, fragments: int, overlap_steps: int) -> None:
    """Whether each fragment has a step of its own in a round, and arrives before it is sent again.

    Raises:
        ValueError: there are more fragments than steps, or the overlap is a round or longer.
    """
    if fragments > interval:
        raise ValueError(
            f"{owner}: `fragments` (={fragments}) must be at most `interval` (={interval}): each has a local step of"
            " its own in a round."
        )
    if overlap_steps >= interval:
        raise ValueError(
            f"{owner}: `overlap_steps` (={overlap_steps}) must be less than `interval` (={interval}): a fragment has to"
            " arrive before it is sent again."
        )


def _fits(value: Any, bound: Bound) -> bool:
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    x = float(value)
    least = x >= 0 if bound == "not negative" else x > 0
    return math.isfinite(x) and least and (x <= 1 or bound != "fraction")


def _one(owner: str, name: str, value: Any, bound: Bound, alternative: str = "") -> float:
    if not _fits(value, bound):
        raise ValueError(f"{owner}: `{name}` (={value!r}) must be {_RULES[bound]}{alternative}.")
    return float(value)


def _plain(value: Any) -> Any:
    """Arrays, tensors and sequences as lists, one or two deep."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value
