"""Who takes part in a transfer.

Owns the choice only; what a worker does that takes no part is the algorithm's business: with
:class:`~lightning_diloco.Diloco` it keeps its weights and goes on.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from typing_extensions import override


class Participation(ABC):
    """Chooses the workers of a transfer.

    An immutable value, like a codec: runs are compared and saved by its ``repr``.
    """

    @abstractmethod
    def __call__(self, step: int, workers: Sequence[int], generator: torch.Generator) -> list[int]:
        """Those of ``workers`` that take part; none: nothing is sent.

        Args:
            step: the local step in which the transfer is sent, from 1.
            workers: global ids of the workers that would take part, ascending.
            generator: seeded from (run seed, tag of the transfer, step): the same on all processes and after a resume.
        """


@dataclass(frozen=True)
class DropOut(Participation):
    """Every worker is left out of a transfer with probability ``p`` (DiLoCo's dropped communication, §3.1 "Ablations").

    A worker that is left out keeps θ_i and goes on from there; the mean is over the others; if all are left out,
    nothing is sent.

    Args:
        p: probability in [0, 1], drawn for each transfer and worker independently. The paper finds 0.5 to cost 2.1 %
            perplexity on non-iid data.

    Raises:
        ValueError: ``p`` is no probability.
    """

    p: float

    def __post_init__(self) -> None:
        if isinstance(self.p, bool) or not isinstance(self.p, int | float) or not 0 <= self.p <= 1:
            raise ValueError(
                f"DropOut: `p` (={self.p!r}) must be a number from 0 (nobody is left out) to 1 (everybody)."
            )
        object.__setattr__(self, "p", float(self.p))  # 1 and 1.0 are the same setting

    @override
    def __call__(self, step: int, workers: Sequence[int], generator: torch.Generator) -> list[int]:
        drawn = torch.rand(len(workers), dtype=torch.float64, generator=generator).tolist()
        return [w for w, x in zip(workers, drawn, strict=True) if x >= self.p]


@dataclass(frozen=True)
class Table(Participation):
    """The workers that take part, written down.

    Args:
        rows: local step → global ids of the workers that take part in transfers sent in that step; an empty list:
            nobody. In steps without a row everybody takes part.

    Raises:
        ValueError: a step or a worker is no number of one; when the row is used: there is no such worker.
    """

    rows: dict[int, list[int]]

    def __post_init__(self) -> None:
        rows = self.rows if isinstance(self.rows, dict) else {0: []}
        if not all(_is_count(step, 1) and _is_row(row) for step, row in rows.items()):
            raise ValueError(
                f"Table: `rows` (={self.rows!r}) must map local steps, from 1, to lists of different workers, from 0,"
                " like {500: [0, 1], 1000: []}."
            )
        object.__setattr__(self, "rows", {step: sorted(row) for step, row in sorted(rows.items())})

    @override
    def __call__(self, step: int, workers: Sequence[int], generator: torch.Generator) -> list[int]:
        if step not in self.rows:
            return list(workers)
        row = self.rows[step]
        return [w for w in workers if w in row]

    def check(self, num_workers: int) -> None:
        """Whether all workers exist.

        Raises:
            ValueError: one doesn't.
        """
        for step, row in self.rows.items():
            if any(w >= num_workers for w in row):
                raise ValueError(
                    f"Table: `rows` has {row} for step {step}, but `num_nodes` is {num_workers}: the workers are 0 to"
                    f" {num_workers - 1}."
                )


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_row(row: object) -> bool:
    return isinstance(row, (list, tuple)) and all(_is_count(w, 0) for w in row) and len(set(row)) == len(row)
