"""Robust means: what takes the place of the mean where some workers send nonsense.

Owns the arithmetic, on the messages of all workers as they arrive. Does not own the sending (``sending.py``). Distances
are Euclidean, over all tensors of a transfer together, in float64. Imports nothing of Lightning.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

Row = Mapping[str, Tensor]
"""What a worker has sent: name → tensor."""


class Aggregate(ABC):
    """Makes one message of those of n workers. An immutable value, like a codec: runs are compared by its ``repr``."""

    @abstractmethod
    def least(self) -> int:
        """The smallest n that the rule works for."""

    @abstractmethod
    def __call__(self, rows: Sequence[Row], memory: dict[str, Tensor]) -> dict[str, Tensor]:
        """New tensors.

        Args:
            rows: the messages, in the workers' order; n ≥ :meth:`least`.
            memory: what the rule keeps from transfer to transfer, by name of a tensor; empty at first. The engine saves
                it.
        """


@dataclass(frozen=True)
class TrimmedMean(Aggregate):
    """For each element, the mean without the f largest and the f smallest values (Yin et al., arXiv 1803.01498).

    Args:
        f: workers that may send anything, ≥ 1; n > 2f.

    Raises:
        ValueError: ``f`` is no integer ≥ 1.
    """

    f: int

    def __post_init__(self) -> None:
        _check_count("TrimmedMean", "f", self.f, 1)

    @override
    def least(self) -> int:
        return 2 * self.f + 1

    @override
    def __call__(self, rows: Sequence[Row], memory: dict[str, Tensor]) -> dict[str, Tensor]:
        kept = slice(self.f, len(rows) - self.f)
        return {n: torch.stack([row[n] for row in rows]).sort(0).values[kept].mean(0) for n in rows[0]}


@dataclass(frozen=True)
class GeometricMedian(Aggregate):
    """The point with the smallest sum of distances to all messages (arXiv 1912.13445), by Weiszfeld's iteration::

        T = Σ_i w_i x_i / Σ_i w_i,   w_i = 1/‖x_i − z‖      over the messages further than ε·scale from z
        s = min(1, m / (‖T − z‖ · Σ_i w_i))                 m messages are nearer, and hold z (Vardi and Zhang, 2000)
        z ← (1 − s)·T + s·z                                 z starts at the median of each element

    scale is the median of the ‖x_i − z‖ at the start. Fewer than half of the workers can't move z far.

    Args:
        iterations: at most so many, ≥ 1; they end when z moves by less than ε·scale.
        eps: ε > 0.

    Raises:
        ValueError: an argument is out of its range.
    """

    iterations: int = 100
    eps: float = 1e-8

    def __post_init__(self) -> None:
        _check_count("GeometricMedian", "iterations", self.iterations, 1)
        _check_positive("GeometricMedian", "eps", self.eps)

    @override
    def least(self) -> int:
        return 1

    @override
    def __call__(self, rows: Sequence[Row], memory: dict[str, Tensor]) -> dict[str, Tensor]:
        z = {n: torch.stack([row[n] for row in rows]).quantile(0.5, dim=0) for n in rows[0]}
        distances = [_distance(row, z) for row in rows]
        smallest = self.eps * sorted(distances)[len(rows) // 2]
        for _ in range(self.iterations):
            far = [(row, 1 / d) for row, d in zip(rows, distances, strict=True) if d > smallest]
            if not far:
                break
            total = sum(w for _, w in far)
            target = _weighted([row for row, _ in far], [w / total for _, w in far])
            pull = _distance(target, z) * total
            stays = min(1.0, (len(rows) - len(far)) / pull) if pull else 1.0
            moved = _weighted([target, z], [1 - stays, stays])
            step, z = _distance(moved, z), moved
            distances = [_distance(row, z) for row in rows]
            if step < smallest:
                break
        return z


@dataclass(frozen=True)
class CentredClipping(Aggregate):
    """The previous result, moved by the mean of what the messages differ from it, each clipped (arXiv 2012.10333)::

        v ← v + (1/n) Σ_i (x_i − v) · min(1, τ/‖x_i − v‖)       v starts at the last result, at first at 0

    Args:
        radius: τ > 0, in the units of what is sent: about the distance between honest messages.
        iterations: ≥ 1.

    Raises:
        ValueError: an argument is out of its range.
    """

    radius: float
    iterations: int = 3

    def __post_init__(self) -> None:
        _check_positive("CentredClipping", "radius", self.radius)
        _check_count("CentredClipping", "iterations", self.iterations, 1)

    @override
    def least(self) -> int:
        return 1

    @override
    def __call__(self, rows: Sequence[Row], memory: dict[str, Tensor]) -> dict[str, Tensor]:
        v = {n: memory[n].clone() if n in memory else torch.zeros_like(t) for n, t in rows[0].items()}
        for _ in range(self.iterations):
            distances = [_distance(row, v) for row in rows]
            shares = [min(1.0, self.radius / d) / len(rows) if d else 0.0 for d in distances]
            v = {n: t + sum(s * (row[n] - t) for s, row in zip(shares, rows, strict=True)) for n, t in v.items()}
        memory.update({n: t.clone() for n, t in v.items()})
        return v


@dataclass(frozen=True)
class Krum(Aggregate):
    """The messages with the nearest neighbours (Blanchard et al., 2017; with ``select`` > 1 Multi-Krum)::

        score_i = sum of the n − f − 2 smallest ‖x_i − x_j‖², j ≠ i;   the mean of the messages with the lowest scores

    Args:
        f: workers that may send anything, ≥ 1; n ≥ 2f + 3.
        select: messages in the mean, ≥ 1, at most n − f.

    Raises:
        ValueError: an argument is out of its range.
    """

    f: int
    select: int = 1

    def __post_init__(self) -> None:
        _check_count("Krum", "f", self.f, 1)
        _check_count("Krum", "select", self.select, 1)

    @override
    def least(self) -> int:
        return max(2 * self.f + 3, self.select + self.f)

    @override
    def __call__(self, rows: Sequence[Row], memory: dict[str, Tensor]) -> dict[str, Tensor]:
        n = len(rows)
        squares = [[0.0 if i == j else _distance(rows[i], rows[j]) ** 2 for j in range(n)] for i in range(n)]
        scores = [sum(sorted(row[:i] + row[i + 1 :])[: n - self.f - 2]) for i, row in enumerate(squares)]
        chosen = sorted(range(n), key=lambda i: scores[i])[: self.select]
        return _weighted([rows[i] for i in sorted(chosen)], [1 / self.select] * self.select)


def _distance(a: Row, b: Row) -> float:
    return math.hypot(*(float(torch.linalg.vector_norm(a[n] - b[n], dtype=torch.float64)) for n in a))


def _weighted(rows: Sequence[Row], shares: Iterable[float]) -> dict[str, Tensor]:
    result = {n: torch.zeros_like(t) for n, t in rows[0].items()}
    for row, share in zip(rows, shares, strict=True):
        for n, t in row.items():
            result[n].add_(t, alpha=share)
    return result


def _check_count(rule: str, name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{rule}: `{name}` (={value!r}) must be an integer ≥ {least}.")


def _check_positive(rule: str, name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{rule}: `{name}` (={value!r}) must be a number > 0.")
