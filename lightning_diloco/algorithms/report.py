"""The report of an outer step, and its statistics: how far the workers are from θ and from each other.

Owns measurements only, taken from the tensors that an exchange moves anyway. Imports nothing of Lightning.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_diloco.comm.means import PIECE, pieces_of, reader, shape_of
from lightning_diloco.comm.tensors import flat, real_view


@dataclass(frozen=True)
class OuterStepReport:
    """A synchronisation in numbers.

    Attributes:
        step: local steps done, from 1.
        outer_step: synchronisations done, from 1.
        kind: "round" after H local steps, "flush" for the partial round at the end of training; algorithms may add
            others.
        pseudo_gradient_norm: ‖Δ‖₂ over the parameters that were exchanged; None if the algorithm formed no mean.
        drift: per worker ‖θ_i − θ‖₂ / ‖θ‖₂, with θ as it was before the step (the bare distance where ‖θ‖ = 0).
        cosine: mean over pairs of workers of the cosine between Δ_i and Δ_j (a zero Δ_i counts as orthogonal to all);
            None with fewer than two participants, without a mean, and with ``reduction="all_reduce"`` over several
            processes, where nobody sees single Δ_i.
        payload_bytes: bytes that each worker sent this round, in one direction: Δ, and the buffers and inner states
            that were averaged.
        participants: global ids of the workers in the mean.
        seconds: wall-clock time of the synchronisation.
    """

    step: int
    outer_step: int
    kind: str
    pseudo_gradient_norm: float | None
    drift: tuple[float, ...]
    cosine: float | None
    payload_bytes: int
    participants: tuple[int, ...]
    seconds: float


class PseudoGradientStatistics:
    """How alike the Δ_i are, from the pieces of the exchange that pass through this process: no extra traffic.

    Pieces are so small that their copies in float64 stay in a processor's cache.
    """

    def __init__(self, theta: Mapping[str, Tensor]) -> None:
        self._theta = theta
        self._latest = "", torch.empty(0)  # a tensor of θ, flattened: the one of the latest piece
        self._square: Tensor | None = None  # ‖Δ‖²
        self._products: Tensor | None = None  # Δ_i·Δ_j

    @torch.no_grad()
    def add(self, what: str | None, name: str, start: int, rows: Sequence[Tensor], mean: Tensor) -> None:
        if what not in ("delta", "weights") or name not in self._theta:
            return
        if what == "weights" and self._latest[0] != name:
            self._latest = name, flat(self._theta[name])
        for piece in pieces_of(mean):
            pieces = [t[piece] for t in (mean, *rows)]
            if what == "weights":
                old = self._latest[1][start + piece.start : start + piece.start + len(pieces[0])]
                pieces = [old - values for values in pieces]
            square = _products(pieces[:1])
            self._square = square if self._square is None else self._square + square
            if rows:
                products = _products(pieces[1:])
                self._products = products if self._products is None else self._products + products

    def parts(self) -> tuple[float | None, list[list[float]] | None]:
        """The sums of this process, for :func:`norm_and_cosine`."""
        return (
            None if self._square is None else float(self._square),
            None if self._products is None else self._products.tolist(),
        )


def _products(rows: Sequence[Tensor]) -> Tensor:
    """Inner products of the rows with each other, in float64: float32 can't hold the squares of large numbers."""
    stacked = torch.empty(len(rows), len(rows[0]), dtype=torch.float64, device=rows[0].device)
    for target, row in zip(stacked, rows, strict=True):
        target.copy_(row)
    return stacked @ stacked.T


def norm_and_cosine(parts: Sequence[Any]) -> tuple[float | None, float | None]:
    """‖Δ‖ of the mean and the mean pairwise cosine, from every process's parts; None where nobody has seen it."""
    squares = [square for square, _ in parts if square is not None]
    seen = [torch.tensor(products, dtype=torch.float64) for _, products in parts if products is not None]
    norm = math.sqrt(sum(squares)) if squares else None
    if not seen or len(seen[0]) < 2:
        return norm, None
    products = torch.stack(seen).sum(0)
    lengths = products.diagonal().sqrt()
    scale = torch.where(lengths == 0, 1.0, lengths)  # a Δ_i of zero is orthogonal to all
    cosines = products / scale / scale[:, None]
    n = len(cosines)
    return norm, float((cosines.sum() - cosines.trace()) / (n * (n - 1)))


@torch.no_grad()
def euclidean_norm(tensors: Mapping[str, Tensor], names: Iterable[str]) -> float:
    """Euclidean norm of all named tensors together, summed in float64; large tensors are read in pieces."""
    norms: list[Tensor] = []
    for name in names:
        like = shape_of(tensors, name)
        size = like.numel() * (1 + like.is_complex())
        if size <= PIECE:
            parts: Iterable[Tensor] = [real_view(tensors[name])]
        else:
            read = reader(tensors, name)
            parts = (read(p.start, min(p.stop, size)) for p in pieces_of(like.new_empty(()).expand(size)))
        norms.extend(torch.linalg.vector_norm(part, dtype=torch.float64) for part in parts)
    return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0
