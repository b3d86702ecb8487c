"""The rules by which samples are given to workers.

Owns who gets which sample. Elsewhere: labels and keys (``labels.py``), random numbers (``draws.py``), how lists are
read (``_lightning/rounds.py``). Imports nothing of Lightning.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, islice
from typing import Any

from lightning_diloco.partitions.draws import apportioned, dirichlet, log_gamma_draw, shares, shuffle, uniforms
from lightning_diloco.partitions.labels import Values, grouped, labels_of, values_of


@dataclass(frozen=True)
class ByLabel:
    """Workers get whole classes, or shards of the samples in the order of their labels.

    Classes are taken from the largest to the smallest (equal ones in the order of their labels), and each goes to the
    worker that has the fewest samples so far.

    Args:
        shards_per_worker: None: whole classes. s ≥ 1: the samples, sorted by label, are cut into N·s runs of equal
            length (up to one), and every worker gets s of them at random, so that most workers see at most s classes
            (McMahan et al., arXiv 1602.05629, §3, with s = 2).
        labels: a label per sample, or a function ``(dataset, index) → label``. None: the dataset's ``targets`` or
            ``labels``, the second tensor of a TensorDataset, those of the dataset inside a Subset or ConcatDataset;
            else the second entry of every item, which takes reading the whole dataset.
        seed: of the choice of runs.

    Raises:
        ValueError: an argument is out of its range; when called: fewer classes than workers, or samples than runs.
    """

    shards_per_worker: int | None = None
    labels: Values | None = field(default=None, repr=False, compare=False)
    seed: int = 0

    def __post_init__(self) -> None:
        s = self.shards_per_worker
        if s is not None and (isinstance(s, bool) or not isinstance(s, int) or s < 1):
            raise ValueError(
                f"ByLabel: `shards_per_worker` (={s!r}) must be an integer ≥ 1, or None for whole classes."
            )
        _check_seed(self)

    def __call__(self, dataset: Any, num_workers: int) -> list[list[int]]:
        """The indices of each worker, ascending."""
        classes = grouped(labels_of(dataset, self.labels))
        if self.shards_per_worker is None:
            return _whole(classes, num_workers, "ByLabel", "classes", "`ByLabel(shards_per_worker=2)` or `Dirichlet`")
        runs, size = num_workers * self.shards_per_worker, sum(map(len, classes))
        if size < runs:
            raise ValueError(
                f"{self!r}: {size} samples can't be cut into {runs} runs ({num_workers} workers ×"
                f" {self.shards_per_worker}). Use fewer."
            )
        ordered = [i for members in classes for i in members]
        cuts = [ordered[k * size // runs : (k + 1) * size // runs] for k in range(runs)]
        shuffle(cuts, uniforms(self.seed, "ByLabel"))
        return [sorted(i for cut in cuts[w::num_workers] for i in cut) for w in range(num_workers)]


@dataclass(frozen=True)
class Dirichlet:
    """Workers' classes are mixed in proportions that are drawn from a Dirichlet distribution.

    ``equal=True`` (Hsu et al., arXiv 1909.06335, §3.1): worker i draws q_i ~ Dir(α·p), where p are the shares of the
    classes in the dataset, and the workers take samples in turn, of a class drawn from q_i, as long as that class has
    samples left. All shards have the same size, up to one. α → 0: a single class as long as it lasts; α → ∞: all like
    p. Towards the end workers must take what is left, so that shards are somewhat more alike than the q_i.

    ``equal=False`` (Yurochkin et al., arXiv 1905.12022; Li et al., arXiv 2102.02079): class by class the workers'
    shares are drawn from a symmetric Dir(α, …, α). Shards differ in size, too; a worker that would be left without
    a sample takes one from the worker with the most.

    Args:
        alpha: α > 0.
        equal: see above.
        labels: as in :class:`ByLabel`.
        seed: of all draws.

    Raises:
        ValueError: an argument is out of its range; when called: fewer samples than workers.
    """

    alpha: float
    equal: bool = True
    labels: Values | None = field(default=None, repr=False, compare=False)
    seed: int = 0

    def __post_init__(self) -> None:
        if not _is_number(self.alpha) or self.alpha <= 0:
            raise ValueError(f"Dirichlet: `alpha` (={self.alpha!r}) must be a number > 0.")
        if not isinstance(self.equal, bool):
            raise ValueError(f"Dirichlet: `equal` (={self.equal!r}) must be True or False.")
        _check_seed(self)
        object.__setattr__(self, "alpha", float(self.alpha))

    def __call__(self, dataset: Any, num_workers: int) -> list[list[int]]:
        """The indices of each worker, ascending."""
        classes = grouped(labels_of(dataset, self.labels))
        size, uniform = sum(map(len, classes)), uniforms(self.seed, "Dirichlet")
        _check_size(self, size, num_workers)
        for members in classes:
            shuffle(members, uniform)
        if not self.equal:
            parts: list[list[int]] = [[] for _ in range(num_workers)]
            for members in classes:
                left, counts = iter(members), apportioned(len(members), dirichlet([self.alpha] * num_workers, uniform))
                for part, count in zip(parts, counts, strict=True):
                    part += islice(left, count)
            for part in parts:
                if not part:
                    part.append(max(parts, key=len).pop())
            return [sorted(part) for part in parts]
        prior = [self.alpha * len(members) / size for members in classes]
        takers = [_Taker([log_gamma_draw(a, uniform) for a in prior]) for _ in range(num_workers)]
        for k in range(size):
            takers[k % num_workers].take(classes, uniform)
        return [sorted(taker.taken) for taker in takers]


@dataclass(frozen=True)
class BySize:
    """Workers get different numbers of samples, chosen at random, so that shards differ in size alone.

    Args:
        proportions: a number > 0 per worker; worker i's share is its number over their sum.
        power: in place of ``proportions``: worker i's share is proportional to (i + 1)^−power, a power law in which
            worker 0 has the most; 0: equal shards.
        seed: of the choice of samples.

    Raises:
        ValueError: neither or both are given, or out of range; when called: another number of proportions than workers,
            or fewer samples than workers. (A share of less than one sample is one sample.)
    """

    proportions: Sequence[float] | None = None
    power: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.proportions is None) == (self.power is None):
            raise ValueError(
                f"BySize: give `proportions` (={self.proportions!r}), like [1, 2, 5], or `power` (={self.power!r}),"
                " like 1.5: one of the two."
            )
        if self.power is not None and (not _is_number(self.power) or self.power < 0):
            raise ValueError(f"BySize: `power` (={self.power!r}) must be a number ≥ 0.")
        if self.proportions is not None:
            given = self.proportions
            if isinstance(given, str) or not isinstance(given, Sequence) or not given:
                raise ValueError(f"BySize: `proportions` (={given!r}) must be a list with a number > 0 per worker.")
            if not all(_is_number(p) and p > 0 for p in given):
                raise ValueError(f"BySize: `proportions` (={given!r}) must hold numbers > 0 only.")
        _check_seed(self)

    def __call__(self, dataset: Any, num_workers: int) -> list[list[int]]:
        """The indices of each worker, ascending."""
        size = len(dataset)
        _check_size(self, size, num_workers)
        wanted = self.proportions
        if wanted is None:
            assert self.power is not None
            wanted = [(w + 1.0) ** -self.power for w in range(num_workers)]
        if len(wanted) != num_workers:
            raise ValueError(
                f"BySize: `proportions` has {len(wanted)} numbers, but there are {num_workers} workers. Give one each."
            )
        counts = apportioned(size, wanted)
        while 0 in counts:
            counts[counts.index(max(counts))] -= 1
            counts[counts.index(0)] += 1
        indices = list(range(size))
        shuffle(indices, uniforms(self.seed, "BySize"))
        ends = list(accumulate(counts))
        return [sorted(indices[end - count : end]) for count, end in zip(counts, ends, strict=True)]


@dataclass(frozen=True)
class ByKey:
    """Samples with the same key (a writer, a speaker, a source) stay together, and go to a worker whole.

    Groups are taken from the largest to the smallest (equal ones in the order of their keys), and each goes to the
    worker that has the fewest samples so far.

    Args:
        key: a key per sample, or a function ``(dataset, index) → key``, such as ``lambda data, i: data.writers[i]``.
            Keys are numbers, strings or other hashable values.

    Raises:
        ValueError: fewer keys than workers.
    """

    key: Values = field(repr=False, compare=False)

    def __call__(self, dataset: Any, num_workers: int) -> list[list[int]]:
        """The indices of each worker, ascending."""
        groups = grouped(values_of(dataset, self.key, "key"))
        return _whole(groups, num_workers, "ByKey", "different keys", "a finer key")


def _whole(groups: Sequence[list[int]], num_workers: int, name: str, what: str, way_out: str) -> list[list[int]]:
    if len(groups) < num_workers:
        raise ValueError(
            f"{name}: {len(groups)} {what} can't be dealt whole to {num_workers} workers, since every worker needs one."
            f" Use at most {len(groups)} workers, or {way_out}."
        )
    parts: list[list[int]] = [[] for _ in range(num_workers)]
    for group in sorted(groups, key=len, reverse=True):  # stable: equal ones stay in order
        min(parts, key=len).extend(group)
    return [sorted(part) for part in parts]


class _Taker:
    """A worker that draws classes from q, as long as they have samples left.

    Args:
        logs: the logarithms of the gamma draws whose shares are q. Those of the classes that are left are the shares of
            a Dirichlet distribution, too; as numbers they may all be 0.
    """

    def __init__(self, logs: Sequence[float]) -> None:
        self._logs = logs
        self.taken: list[int] = []
        self._draw_from(range(len(logs)))

    def _draw_from(self, classes: Sequence[int]) -> None:
        self._classes = classes
        self._sums = list(accumulate(shares([self._logs[c] for c in classes])))

    def take(self, classes: Sequence[list[int]], uniform: Callable[[], float]) -> None:
        while True:
            drawn = bisect_right(self._sums, uniform() * self._sums[-1])
            members = classes[self._classes[min(drawn, len(self._classes) - 1)]]
            if members:
                self.taken.append(members.pop())
                return
            self._draw_from([c for c, left in enumerate(classes) if left])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_seed(partition: ByLabel | Dirichlet | BySize) -> None:
    if isinstance(partition.seed, bool) or not isinstance(partition.seed, int):
        raise ValueError(f"{type(partition).__name__}: `seed` (={partition.seed!r}) must be an integer.")


def _check_size(partition: Dirichlet | BySize, size: int, num_workers: int) -> None:
    if size < num_workers:
        raise ValueError(
            f"{partition!r}: {size} samples are too few for {num_workers} workers: every worker needs one. Use at most"
            f" {size} workers."
        )
