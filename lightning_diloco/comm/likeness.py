"""How alike the participants of a mean are, from their inner products, or from scalars of single participants.

Owns the formulas; the inner products are measured in ``statistics.py``. Imports nothing of Lightning.

With x_i what participant i sends, w_i its weight, W = Σ w_i and x = Σ w_i x_i / W the mean::

    ⟨x_i, x⟩        = Σ_j w_j ⟨x_i, x_j⟩ / W
    cosine          = mean over pairs i ≠ j of ⟨x_i, x_j⟩ / (‖x_i‖ ‖x_j‖)
    norm ratio      = Σ w_i ‖x_i‖ / (W ‖x‖)                                            1: all point the same way

Where nobody sees two participants at the same time (an all-reduce over processes), each process knows ‖x_i‖ and
⟨x_i, x⟩ of its own, and since W² ‖x‖² = Σ_ij w_i w_j ⟨x_i, x_j⟩, this mean of the pairs' cosines, weighted by
w_i ‖x_i‖ w_j ‖x_j‖, is left::

    weighted cosine = (W² ‖x‖² − Σ w_i² ‖x_i‖²) / Σ_{i≠j} w_i ‖x_i‖ w_j ‖x_j‖

It is the plain mean where all w_i ‖x_i‖ are equal.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_diloco.comm.means import pieces_of, row_of
from lightning_diloco.comm.statistics import cosines, mean_cosine, products_of_two

Scalars = dict[str, tuple[float, float]]
"""Layer → ‖x_i‖² and ⟨x_i, x⟩ of a participant."""


@dataclass(frozen=True)
class Likeness:
    """How alike participants are; a row of zeros counts as orthogonal to all.

    Attributes:
        norm: ‖x‖; None if nobody saw the mean.
        norms: ‖x_i‖ of each participant; empty if nobody saw them.
        with_mean: cosine of each x_i with x.
        matrix: pairwise cosines; None if nobody saw pairs.
        cosine: mean over pairs; None with fewer than two participants.
        weighted: whether ``cosine`` is the weighted cosine.
        norm_ratio: mean of the norms over the norm of the mean; None where that is zero.
    """

    norm: float | None = None
    norms: tuple[float, ...] = ()
    with_mean: tuple[float, ...] = ()
    matrix: tuple[tuple[float, ...], ...] | None = None
    cosine: float | None = None
    weighted: bool = False
    norm_ratio: float | None = None


def of_products(square: float | None, products: Tensor | None, weights: Sequence[float]) -> Likeness:
    """From ‖x‖² and the inner products of all pairs, [n, n], float64; either None if nobody saw it."""
    norm = None if square is None else math.sqrt(square)
    if products is None or norm is None:
        return Likeness(norm)
    norms = products.diagonal().sqrt().tolist()
    dots = (products @ torch.tensor(weights, dtype=torch.float64) / sum(weights)).tolist()
    matrix = cosines(products)
    return Likeness(
        norm,
        tuple(norms),
        _with_mean(norms, dots, norm),
        tuple(map(tuple, matrix.tolist())),
        mean_cosine(matrix),
        norm_ratio=_ratio(norms, norm, weights),
    )


def of_scalars(square: float | None, scalars: Sequence[tuple[float, float]], weights: Sequence[float]) -> Likeness:
    """From ‖x‖², and ‖x_i‖² and ⟨x_i, x⟩ of every participant."""
    if square is None or not scalars:
        return Likeness(None if square is None else math.sqrt(square))
    norm, norms = math.sqrt(square), [math.sqrt(own) for own, _ in scalars]
    scaled = [w * n for w, n in zip(weights, norms, strict=True)]
    squares = sum(s * s for s in scaled)
    total, whole = sum(scaled), sum(weights) * norm
    pairs, apart = total * total - squares, whole * whole - squares
    cosine = None if len(norms) < 2 else apart / pairs if pairs else 0.0
    return Likeness(
        norm,
        tuple(norms),
        _with_mean(norms, [dot for _, dot in scalars], norm),
        None,
        cosine,
        weighted=True,
        norm_ratio=_ratio(norms, norm, weights),
    )


def _with_mean(norms: Sequence[float], dots: Sequence[float], norm: float) -> tuple[float, ...]:
    return tuple(dot / (own * norm) if own * norm else 0.0 for own, dot in zip(norms, dots, strict=True))


def _ratio(norms: Sequence[float], norm: float, weights: Sequence[float]) -> float | None:
    return sum(w * own for w, own in zip(weights, norms, strict=True)) / sum(weights) / norm if norm else None


@torch.no_grad()
def scalars_of(tensors: Mapping[str, Tensor], mean: Mapping[str, Tensor], layers: Mapping[str, str]) -> Scalars:
    """‖x_i‖² and ⟨x_i, x⟩ of a participant, layer by layer, as ``statistics.py`` sums.

    Args:
        tensors: name → tensor of the participant.
        mean: name → mean.
        layers: the names, and the layer of each.
    """
    found: Scalars = {}
    for name, layer in layers.items():
        square, dot, _ = inner_products(tensors, mean, name)
        known = found.get(layer, (0.0, 0.0))
        found[layer] = known[0] + square, known[1] + dot
    return found


@torch.no_grad()
def inner_products(a: Mapping[str, Tensor], b: Mapping[str, Tensor], name: str) -> tuple[float, float, float]:
    """⟨a, a⟩, ⟨a, b⟩ and ⟨b, b⟩ of a tensor, as ``statistics.py`` sums; differences are computed piece by piece."""
    rows = [row_of(tensors, name) for tensors in (a, b)]
    totals = [0.0, 0.0, 0.0]
    for piece in pieces_of(rows[0].values):
        pair = [row[piece] for row in rows]
        values = [row.values if row.minuend is None else row.minuend - row.values for row in pair]
        for i, product in enumerate(products_of_two(*values)):
            totals[i] += product
    return totals[0], totals[1], totals[2]
