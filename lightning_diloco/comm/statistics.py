"""Statistics of tensors: norms, whether they are finite, and how alike workers are, taken on the way of a mean.

Owns measurements only; sums are kept in float64. Does not own the mean (``means.py``). Imports nothing of Lightning.

Squares of float32 are summed in float32 over short blocks, and the blocks in float64: relative errors stay below 2e-6.
Where squares leave the range of float32 (values above 1e19, or sums below 1e-26) a piece is summed in float64.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_diloco.comm.means import Joined, piece_length, pieces_of, row_of, shape_of
from lightning_diloco.comm.tensors import flat

_BLOCK = 512
"""Products that are summed in float32; longer blocks miss 2e-6 where all elements are equal."""

_SMALLEST, _LARGEST = 1e-26, 1e38  # sums of squares that float32 can be trusted with

Parts = tuple[float | None, list[list[float]] | None]
"""Sums of a process: ‖mean‖², and the inner products of the participants."""


class MeanStatistics:
    """‖mean‖ and the inner products of the participants' rows, from the pieces that pass through this process.

    Costs no traffic: each process measures the pieces that it averages, and :meth:`parts` of all processes add up.

    Args:
        origin: name → tensor; if given, the rows are weights, and what is measured is ``origin − row`` and
            ``origin − mean``.

    Attributes:
        products: inner products of the participants' rows, [n, n], float64; None if no row was seen (with an
            all-reduce over processes nobody sees single rows).
        square: ‖mean‖²; None if no mean was seen.
    """

    def __init__(self, origin: Mapping[str, Tensor] | None = None) -> None:
        self.products: Tensor | None = None
        self.square: float | None = None
        self._origin = origin
        # of the origin, flattened: the tensor of the latest piece
        self._latest: tuple[Joined, Tensor] = "", torch.empty(0)
        self._buffers: dict[Any, Tensor] = {}

    def add_rows(self, name: Joined, start: int, rows: Sequence[Tensor] | Tensor) -> None:
        """Adds the participants' values of a piece.

        Args:
            name: name of the tensor.
            start: first element of the piece in the flattened tensor.
            rows: the values, [n, elements].
        """
        self.add_products(self.products_of(name, start, rows))

    def add_products(self, products: Tensor) -> None:
        """Adds inner products of the participants, [n, n], float64."""
        self.products = products if self.products is None else self.products + products

    def products_of(self, name: Joined, start: int, rows: Sequence[Tensor] | Tensor) -> Tensor:
        """The inner products of rows of a piece, without adding them; arguments as in :meth:`add_rows`."""
        length = rows[0].shape[0]
        step = piece_length(len(rows), rows[0].device)
        products: Tensor | None = None
        for begin in range(0, length, step):
            stop = min(begin + step, length)
            part = rows if stop - begin == length else [row[begin:stop] for row in rows]
            of_part = self._products(self._measured(name, start + begin, part))
            products = of_part if products is None else products + of_part
        return torch.zeros(len(rows), len(rows), dtype=torch.float64) if products is None else products

    def square_of(self, name: Joined, start: int, mean: Tensor) -> float:
        """‖mean‖² of a piece of tensor ``name`` from element ``start`` on, without adding it."""
        total = 0.0
        for piece in pieces_of(mean):
            values = mean[piece]
            length = values.shape[0]
            scratch, difference = self._buffer("mean", 2, length, mean).unbind()
            if self._origin is not None:
                values = torch.sub(self._part_of_origin(name, start + piece.start, length), values, out=difference)
            total += _square(values, scratch)
        return total

    def add_square(self, square: float) -> None:
        """Adds a part of ‖mean‖²."""
        self.square = square if self.square is None else self.square + square

    def parts(self) -> Parts:
        """The sums of this process, for :func:`norm_and_cosine` and :func:`lengths`."""
        return self.square, None if self.products is None else self.products.tolist()

    def _products(self, rows: Tensor) -> Tensor:
        """Inner products of the rows with each other, in float64 on the CPU."""
        single = rows.dtype == torch.float32 and rows.device.type == "cpu"
        if not single or torch.get_float32_matmul_precision() != "highest":
            return _exact_products(rows)
        n, whole = rows.shape[0], rows.shape[1] // _BLOCK * _BLOCK
        products = _exact_products(rows[:, whole:]) if whole < rows.shape[1] else None
        if whole:
            blocks = rows[:, :whole].view(n, -1, _BLOCK).transpose(0, 1)
            of_blocks = self._buffer("products", n * n, blocks.shape[0], rows).view(-1, n, n)
            torch.bmm(blocks, blocks.transpose(1, 2), out=of_blocks)  # `out` is beyond the reach of autocast
            exact = self._buffer("exact products", n * n, of_blocks.shape[0], rows, torch.float64)
            summed = exact.view(-1, n, n).copy_(of_blocks).sum(0)
            squares = summed.diagonal().tolist()
            if not _SMALLEST < min(squares) <= max(squares) < _LARGEST and rows.any():
                summed = _exact_products(rows[:, :whole])
            products = summed if products is None else products + summed
        assert products is not None
        return products

    def _measured(self, name: Joined, start: int, rows: Sequence[Tensor] | Tensor) -> Tensor:
        """What is measured, as a matrix."""
        if self._origin is None and isinstance(rows, Tensor):
            return rows
        length = rows[0].shape[0]
        buffer = self._buffer("rows", len(rows), length, rows[0])
        if self._origin is None:
            for target, row in zip(buffer, rows, strict=True):
                target.copy_(row)
        else:
            origin = self._part_of_origin(name, start, length)
            for target, row in zip(buffer, rows, strict=True):
                torch.sub(origin, row, out=target)
        return buffer

    def _part_of_origin(self, name: Joined, start: int, length: int) -> Tensor:
        assert self._origin is not None
        if self._latest[0] != name:
            tensors = [flat(self._origin[n]) for n in ((name,) if isinstance(name, str) else name)]
            self._latest = name, tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        return self._latest[1][start : start + length]

    def _buffer(self, use: str, rows: int, length: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A matrix that may be overwritten; memory from the system for every piece would cost page faults."""
        key = use, dtype or like.dtype, like.device
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < rows * length:
            buffer = self._buffers[key] = like.new_empty(rows * length, dtype=key[1])
        return buffer[: rows * length].view(rows, length)


def _exact_products(rows: Tensor) -> Tensor:
    exact = rows.double()
    return (exact @ exact.T).cpu()


def _square(values: Tensor, scratch: Tensor) -> float:
    """The sum of the squares of a piece, which is not changed."""
    if values.dtype == torch.float32 and values.device.type == "cpu":
        # torch.sum adds in a tree; a norm in float32 adds element by element, and misses by 1e-5 if all are equal
        square = float(torch.mul(values, values, out=scratch).sum())
        if _SMALLEST < square < _LARGEST:
            return square
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2


def norm_and_cosine(parts: Sequence[Parts]) -> tuple[float | None, float | None]:
    """‖mean‖ and the mean pairwise cosine of the participants, from every process's parts; None where nobody saw it."""
    squares = [square for square, _ in parts if square is not None]
    norm = math.sqrt(sum(squares)) if squares else None
    products = _joined(parts)
    if products is None or len(products) < 2:
        return norm, None
    norms = products.diagonal().sqrt()
    scale = torch.where(norms == 0, 1.0, norms)  # a row of zeros is orthogonal to all
    cosines = products / scale / scale[:, None]
    n = len(cosines)
    return norm, float((cosines.sum() - cosines.trace()) / (n * (n - 1)))


def lengths(parts: Sequence[Parts]) -> list[float] | None:
    """The norm of each participant's row, from every process's parts; None where nobody saw single rows."""
    products = _joined(parts)
    return None if products is None else products.diagonal().sqrt().tolist()


def _joined(parts: Sequence[Parts]) -> Tensor | None:
    seen = [torch.tensor(products, dtype=torch.float64) for _, products in parts if products is not None]
    return torch.stack(seen).sum(0) if seen else None


@torch.no_grad()
def euclidean_norm(tensors: Mapping[str, Tensor], names: Iterable[str]) -> float:
    """Euclidean norm of all named tensors together, summed in float64; tensors are read in pieces."""
    return math.sqrt(sum(_square(piece, scratch) for piece, scratch in _pieces(tensors, names)))


@torch.no_grad()
def all_finite(tensors: Mapping[str, Tensor], names: Iterable[str]) -> bool:
    """Whether all elements of the named tensors are finite, in a single pass if they are."""
    for piece, _ in _pieces(tensors, [n for n in names if _may_be_infinite(shape_of(tensors, n))]):
        # The sum is finite only if every element is; it may overflow though all are.
        half = piece.itemsize < 4
        if not math.isfinite(piece.sum(dtype=torch.float32) if half else piece.sum()) and not piece.isfinite().all():
            return False
    return True


def _may_be_infinite(like: Tensor) -> bool:
    return like.is_floating_point() or like.is_complex()


def _pieces(tensors: Mapping[str, Tensor], names: Iterable[str]) -> Iterator[tuple[Tensor, Tensor]]:
    """Pieces of flattened tensors, or of their differences, and memory of the same size that may be overwritten."""
    buffers: dict[Any, Tensor] = {}
    for name in names:
        row = row_of(tensors, name)
        size = min(len(row.values), piece_length(3, row.values.device))
        if not size:
            continue
        key = row.values.dtype, row.values.device
        if key not in buffers or buffers[key].shape[1] < size:
            buffers[key] = row.values.new_empty(2, size)
        for start in range(0, len(row.values), size):
            values = row.values[start : start + size]
            difference, scratch = buffers[key][:, : len(values)]
            if row.minuend is not None:
                values = torch.sub(row.minuend[start : start + size], values, out=difference)
            yield values, scratch
