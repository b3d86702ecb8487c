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

from lightning_diloco.comm.means import PAD, Joined, piece_length, pieces_of, row_of, shape_of
from lightning_diloco.comm.tensors import flat

_BLOCK = 512
"""Products that are summed in float32; longer blocks miss 2e-6 where all elements are equal."""

_SMALLEST, _LARGEST = 1e-26, 1e38  # sums of squares that float32 can be trusted with

Parts = dict[str, tuple[float | None, Tensor | None]]
"""Sums of a process, layer by layer: ‖mean‖², and the inner products of the participants, [n, n]."""


class MeanStatistics:
    """‖mean‖ and the inner products of the participants' rows, from the pieces that pass through this process.

    Costs no traffic: each process measures the pieces that it averages, and :meth:`parts` of all processes add up.

    Args:
        origin: name → tensor; if given, the rows are weights, and what is measured is ``origin − row`` and
            ``origin − mean``.
        layers: name of a tensor → the layer that it is added to; default: all are added together.

    Attributes:
        products: layer → inner products of the participants' rows, [n, n], float64; empty if no row was seen (with an
            all-reduce over processes nobody sees single rows).
        squares: layer → ‖mean‖²; empty if no mean was seen.
    """

    def __init__(self, origin: Mapping[str, Tensor] | None = None, layers: Mapping[str, str] | None = None) -> None:
        self.products: dict[str, Tensor] = {}
        self.squares: dict[str, float] = {}
        self._origin = origin
        self._layers = layers or {}
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
        self.add_products(name, self.products_of(name, start, rows))

    def layer_of(self, name: Joined) -> str:
        """The layer of a tensor; tensors of several layers are never joined."""
        return self._layers.get(name if isinstance(name, str) else name[0], "")

    def add_products(self, name: Joined, products: Tensor) -> None:
        """Adds inner products of the participants' tensor ``name``, [n, n], float64."""
        layer = self.layer_of(name)
        known = self.products.get(layer)
        self.products[layer] = products if known is None else known + products

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

    def add_square(self, name: Joined, square: float) -> None:
        """Adds a part of ‖mean‖² of tensor ``name``."""
        layer = self.layer_of(name)
        self.squares[layer] = self.squares.get(layer, 0.0) + square

    def parts(self) -> Parts:
        """The sums of this process, for :func:`joined_parts`."""
        layers = [*self.products, *(layer for layer in self.squares if layer not in self.products)]
        return {layer: (self.squares.get(layer), self.products.get(layer)) for layer in layers}

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
        buffer = self._buffer("rows", len(rows), length + PAD, rows[0])[:, :length]
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


def _product(a: Tensor, b: Tensor, scratch: Tensor) -> float:
    # torch.sum adds in a tree; a norm in float32 adds element by element, and misses by 1e-5 if all are equal
    return float(torch.mul(a, b, out=scratch).sum())


def _square(values: Tensor, scratch: Tensor) -> float:
    """The sum of the squares of a piece, which is not changed."""
    if values.dtype == torch.float32 and values.device.type == "cpu":
        square = _product(values, values, scratch)
        if _SMALLEST < square < _LARGEST:
            return square
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2


def products_of_two(a: Tensor, b: Tensor) -> tuple[float, float, float]:
    """⟨a, a⟩, ⟨a, b⟩ and ⟨b, b⟩ of a piece; errors of ⟨a, b⟩ are relative to ‖a‖ ‖b‖."""
    if a.dtype == b.dtype == torch.float32 and a.device.type == b.device.type == "cpu":
        scratch = torch.empty_like(a)
        of_a, of_b = _product(a, a, scratch), _product(b, b, scratch)
        if _SMALLEST < min(of_a, of_b) <= max(of_a, of_b) < _LARGEST:
            return of_a, _product(a, b, scratch), of_b
    products = _exact_products(torch.stack([a.double(), b.double()]))
    return float(products[0, 0]), float(products[0, 1]), float(products[1, 1])


def joined_parts(parts: Iterable[Parts]) -> Parts:
    """The sums of several processes, added up."""
    squares: dict[str, float] = {}
    products: dict[str, Tensor] = {}
    layers: dict[str, None] = {}
    for of_process in parts:
        for layer, (square, inner) in of_process.items():
            layers[layer] = None
            if square is not None:
                squares[layer] = squares.get(layer, 0.0) + square
            if inner is not None:
                products[layer] = products[layer] + inner if layer in products else inner
    return {layer: (squares.get(layer), products.get(layer)) for layer in layers}


def total_of(parts: Parts) -> tuple[float | None, Tensor | None]:
    """‖mean‖² and the inner products over all layers; None where nobody saw them."""
    squares = [square for square, _ in parts.values() if square is not None]
    products = [inner for _, inner in parts.values() if inner is not None]
    return sum(squares) if squares else None, torch.stack(products).sum(0) if products else None


def norm_and_cosine(parts: Sequence[Parts]) -> tuple[float | None, float | None]:
    """‖mean‖ and the mean pairwise cosine of the participants, from every process's parts; None where nobody saw it."""
    square, products = total_of(joined_parts(parts))
    return None if square is None else math.sqrt(square), None if products is None else mean_cosine(cosines(products))


def lengths(parts: Sequence[Parts]) -> list[float] | None:
    """The norm of each participant's row, from every process's parts; None where nobody saw single rows."""
    _, products = total_of(joined_parts(parts))
    return None if products is None else products.diagonal().sqrt().tolist()


def cosines(products: Tensor) -> Tensor:
    """Pairwise cosines, [n, n], from inner products; a row of zeros is orthogonal to all others."""
    norms = products.diagonal().sqrt()
    scale = torch.where(norms == 0, 1.0, norms)
    return products / scale / scale[:, None]


def mean_cosine(matrix: Tensor) -> float | None:
    """The mean over pairs of different rows, from pairwise cosines, [n, n]; None for n < 2."""
    n = len(matrix)
    return None if n < 2 else float((matrix.sum() - matrix.trace()) / (n * (n - 1)))


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
