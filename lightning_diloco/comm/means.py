"""The arithmetic of a mean over workers, piece by piece.

Owns the order of summation, the accumulation dtype, and the cutting of tensors into pieces of bounded size. Does not
move pieces between processes (``channel.py``). Imports nothing of Lightning.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lightning_diloco.comm.tensors import flat

CHUNK = 1 << 22
"""Elements that a process sends at a time, those of all its workers together."""

PIECE = 1 << 18
"""Elements in a step of arithmetic on a CPU, those of all workers together: they stay in a processor's cache."""

SHORTEST = 1 << 15
"""Elements of a worker in a step of arithmetic however many workers there are: a call of torch costs as much."""

SMALL = 1 << 13
"""Tensors of at most so many elements are averaged together with others."""

PAD = 16
"""Elements between the rows of a buffer: rows that begin a power of two apart push each other out of the cache."""

_TOGETHER = 16  # at a time: joining takes memory

_VIEWS = 64  # pieces that are cut at a time: views take memory, too


def mean_of(tensors: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    """``x_0 + (Σ_{i>0} (x_i − x_0)) / N``, summed in order; with weights ``x_0 + Σ_{i>0} w_i (x_i − x_0) / Σ_i w_i``.

    The mean of equal tensors, infinite ones included, is exactly their value; ``Σ x_i / N`` misses the value for
    N = 3, 5, 6, 7.

    Args:
        tensors: N ≥ 1 tensors of the same shape and dtype.
        weights: a number for each tensor, not all zero.

    Returns:
        A new tensor; half types are accumulated, and returned, in float32.
    """
    like = tensors[0]
    mean = room_for(like)
    PieceMeans(len(tensors), weights, like.dtype, like.device).take([Row(flat(t)) for t in tensors], mean)
    return in_shape(mean, like)


Joined = str | tuple[str, ...]
"""The name of a tensor, or the names of several that lie one after the other."""


class Measure(Protocol):
    """Statistics of a mean, taken while its pieces are in the cache (``statistics.py``)."""

    def add_rows(self, name: Joined, start: int, rows: Sequence[Tensor] | Tensor) -> None:
        """Adds the participants' values of the elements from ``start`` on of tensor ``name``."""

    def square_of(self, name: Joined, start: int, mean: Tensor) -> float:
        """The sum of squares of that part of the mean; not finite unless the part is."""

    def add_square(self, name: Joined, square: float) -> None:
        """Adds a sum of squares of the mean of that tensor."""

    def layer_of(self, name: Joined) -> str:
        """The layer to which the tensor's statistics are added; tensors of different layers are not joined."""


@dataclass
class Row:
    """A worker's tensor, flattened: ``values``, or ``minuend − values`` in their dtype."""

    values: Tensor
    minuend: Tensor | None = None

    def __getitem__(self, part: slice) -> "Row":
        return Row(self.values[part], None if self.minuend is None else self.minuend[part])


class PieceMeans:
    """Means over n participants, with buffers that are used again for every piece.

    The rows of a piece are read from memory once: their differences, statistics and mean are taken in the cache.

    Args:
        count: n ≥ 1.
        weights: a number for each participant, not all zero; default 1 each.
        dtype: of the participants' tensors.
        device: of the participants' tensors.
    """

    def __init__(
        self, count: int, weights: Sequence[float] | None, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self._dtype = accumulator(dtype.to_real())
        self._converts = self._dtype != dtype.to_real()
        self._on_cpu = torch.device(device).type == "cpu"
        self._total = count if weights is None else sum(weights)
        self._weights = weights
        self._length = piece_length(count, device)
        self._count = count
        self._room = torch.empty(0, dtype=self._dtype, device=device)
        self._views: dict[int, tuple[Tensor, list[Tensor], Tensor]] = {}  # by length of the piece
        column = torch.tensor([0.0] if weights is None else weights[1:], dtype=self._dtype, device=device)
        self._column = column[:, None]

    def take(
        self, rows: Sequence[Row], out: Tensor, name: Joined = "", start: int = 0, measure: Measure | None = None
    ) -> None:
        """Writes the mean of flat ``rows``.

        Args:
            rows: n rows of the same length.
            out: the mean goes there; flat.
            name: name of the tensor that the rows are a part of, or of the tensors that are joined, for ``measure``.
            start: first element of that part.
            measure: statistics that the pieces are handed to.
        """
        step = self._length * _VIEWS
        for begin in range(0, len(out), step):
            window = slice(begin, min(begin + step, len(out)))
            cut: dict[int, Sequence[Tensor]] = {}  # each tensor once: workers share a minuend, mostly
            for tensor in [t for row in rows for t in (row.values, row.minuend) if t is not None]:
                if tensor.data_ptr() not in cut:
                    cut[tensor.data_ptr()] = torch.split(tensor[window], self._length)
            at = start + begin
            for k, target in enumerate(torch.split(out[window], self._length)):
                piece = [
                    (cut[row.values.data_ptr()][k], None if row.minuend is None else cut[row.minuend.data_ptr()][k])
                    for row in rows
                ]
                self._take_piece(piece, target, name, at, measure)
                at += target.shape[0]

    def _take_piece(
        self,
        piece: Sequence[tuple[Tensor, Tensor | None]],
        out: Tensor,
        name: Joined,
        start: int,
        measure: Measure | None,
    ) -> None:
        rows = self._read(piece)
        if measure is not None:
            measure.add_rows(name, start, rows)
        self._mean(rows, out, hide_equal=not self._on_cpu)
        # ∞ − ∞ is NaN, also where all workers hold the same ∞: then those are hidden. Looking for that is cheap on a
        # CPU only, and cheaper where the squares of the mean are summed anyway.
        square = None if measure is None else measure.square_of(name, start, out)
        if self._on_cpu and not math.isfinite(out.sum() if square is None else square):
            self._mean(self._read(piece), out, hide_equal=True)
            square = None if measure is None else measure.square_of(name, start, out)
        if measure is not None and square is not None:
            measure.add_square(name, square)

    def _buffer(self, length: int) -> tuple[Tensor, list[Tensor], Tensor]:
        """Room for the rows of a piece: as a matrix, row by row, and without the first row."""
        if length not in self._views:
            padded = length + PAD
            if len(self._room) < self._count * padded:
                self._room = self._room.new_empty(self._count * padded)
                self._views.clear()
            rows = self._room[: self._count * padded].view(self._count, padded)[:, :length]
            self._views[length] = rows, list(rows), rows[1:]
        return self._views[length]

    def _read(self, piece: Sequence[tuple[Tensor, Tensor | None]]) -> Sequence[Tensor] | Tensor:
        """The rows of a piece: as they are if that is possible, else in the buffer."""
        if not self._converts and all(minuend is None for _, minuend in piece):
            return [values for values, _ in piece]
        rows, targets, _ = self._buffer(piece[0][0].shape[0])
        for target, (values, minuend) in zip(targets, piece, strict=True):
            if minuend is None:
                target.copy_(values)
            elif self._converts:
                target.copy_(minuend - values)  # the difference is rounded to the half type
            else:
                torch.sub(minuend, values, out=target)
        return rows

    def _mean(self, rows: Sequence[Tensor] | Tensor, out: Tensor, hide_equal: bool) -> None:
        """``x_0 − (Σ_{i>0} (x_0 − x_i)) / N``: the mean of :func:`mean_of` to the bit, and keeps a −0.0.

        Overwrites all rows but the first if they are in the buffer.
        """
        if self._count == 1:
            out.copy_(rows[0])
            return
        if isinstance(rows, Tensor) and not hide_equal:
            _, (first, shift, *more), others = self._buffer(out.shape[0])
            torch.sub(first, others, out=others)
            if self._weights is not None:
                others *= self._column
            for difference in more:
                shift.add_(difference)
        else:
            first, shift, difference = rows[0], out, torch.empty_like(out)
            for i, row in enumerate(rows[1:], start=1):
                target = shift if i == 1 else difference
                torch.sub(first, row, out=target)
                if hide_equal:
                    target.masked_fill_((row == first) & first.isinf(), 0)
                if self._weights is not None:
                    target *= self._weights[i]
                if i > 1:
                    shift.add_(target)
        torch.sub(first, shift.div_(self._total), out=out)


def piece_length(rows: int, device: torch.device | str) -> int:
    """Elements of each of ``rows`` rows in a step of arithmetic."""
    if torch.device(device).type == "cpu":
        return min(PIECE, max(PIECE // rows // 1024 * 1024, SHORTEST))
    return max(1, CHUNK // rows)  # a launch costs more than memory


def pieces_of(tensor: Tensor) -> Iterator[slice]:
    """Slices of a flat tensor that fit into a processor's cache; on an accelerator large ones."""
    size = piece_length(4, tensor.device)
    return (slice(start, start + size) for start in range(0, tensor.shape[0], size))


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which tensors of ``dtype`` are summed: float32 for half types, ``dtype`` itself otherwise."""
    return torch.float32 if dtype.is_floating_point and dtype.itemsize < 4 else dtype


class Differences(Mapping[str, Tensor]):
    """``minuend − subtrahend``, computed tensor by tensor and piece by piece when read.

    The Δ_i of all workers at the same time would need the memory of N more models.
    """

    def __init__(self, names: Sequence[str], minuend: Mapping[str, Tensor], subtrahend: Mapping[str, Tensor]) -> None:
        self._names, self.minuend, self.subtrahend = names, minuend, subtrahend

    def __getitem__(self, name: str) -> Tensor:
        return self.minuend[name] - self.subtrahend[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def row_of(tensors: Mapping[str, Tensor], name: str) -> Row:
    """Tensor ``name``, flattened; differences are not computed yet."""
    if isinstance(tensors, Differences):
        return Row(flat(tensors.subtrahend[name]), flat(tensors.minuend[name]))
    return Row(flat(tensors[name]))


def joined_names(
    names: Sequence[str], like: Mapping[str, Tensor], layer_of: Callable[[str], str] = lambda _: ""
) -> Iterator[list[str]]:
    """Large tensors one by one; small ones of a kind together, since a torch call costs as much as their arithmetic.

    Args:
        names: names of the tensors.
        like: name → a tensor of the right shape, dtype and device.
        layer_of: only tensors for which this gives the same word are put together.
    """
    together: dict[tuple[torch.dtype, torch.device, str], list[str]] = {}
    for name in names:
        if like[name].numel() > SMALL:
            yield [name]
        else:
            together.setdefault((like[name].dtype, like[name].device, layer_of(name)), []).append(name)
    for group in together.values():
        yield from (group[i : i + _TOGETHER] for i in range(0, len(group), _TOGETHER))


def joined_rows(tensors: Sequence[Mapping[str, Tensor]], names: Sequence[str]) -> list[Row]:
    """The tensors ``names`` of every worker, flattened, one after the other."""
    if len(names) == 1:
        return [row_of(t, names[0]) for t in tensors]
    minuends: dict[int, Tensor] = {}  # workers share them, mostly
    rows = []
    for of_worker in tensors:
        if isinstance(of_worker, Differences):
            minuend = of_worker.minuend
            if id(minuend) not in minuends:
                minuends[id(minuend)] = torch.cat([flat(minuend[n]) for n in names])
            values = torch.cat([flat(of_worker.subtrahend[n]) for n in names])
            rows.append(Row(values, minuends[id(minuend)]))
        else:
            rows.append(Row(torch.cat([flat(of_worker[n]) for n in names])))
    return rows


def chunks(names: Sequence[str], like: Mapping[str, Tensor], most: int) -> Iterator[list[tuple[str, int, int]]]:
    """Segments (name, start, stop) of flattened tensors, in groups of equal dtype and device and ``most`` elements."""
    for kind in dict.fromkeys((like[n].dtype, like[n].device) for n in names):
        group, free = [], most
        for name in names:
            size, at = like[name].numel() * (1 + like[name].is_complex()), 0
            while (like[name].dtype, like[name].device) == kind and at < size:
                stop = min(size, at + free)
                group.append((name, at, stop))
                free, at = free - (stop - at), stop
                if not free:
                    yield group
                    group, free = [], most
        if group:
            yield group


def reader(tensors: Mapping[str, Tensor], name: str) -> Callable[[int, int], Tensor]:
    """``(start, stop) →`` elements of the flattened tensor ``name``; differences are computed for these only."""
    row = row_of(tensors, name)
    values, minuend = row.values, row.minuend
    if minuend is None:
        return lambda start, stop: values[start:stop]
    return lambda start, stop: minuend[start:stop] - values[start:stop]


def shape_of(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """A tensor of the same shape, dtype and device that takes no memory; its values are meaningless."""
    tensor = (tensors.minuend if isinstance(tensors, Differences) else tensors)[name]
    return tensor.new_empty(()).expand(tensor.shape)


def room_for(like: Tensor) -> Tensor:
    """An empty flat tensor for the mean of tensors like ``like``."""
    size = like.numel() * (1 + like.is_complex())
    return torch.empty(size, dtype=accumulator(like.dtype.to_real()), device=like.device)


def in_shape(mean: Tensor, like: Tensor) -> Tensor:
    """A flat mean in the shape of ``like``, complex if ``like`` is complex."""
    return torch.view_as_complex(mean.view(*like.shape, 2)) if like.is_complex() else mean.view(like.shape)
