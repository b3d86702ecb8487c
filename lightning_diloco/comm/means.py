"""The arithmetic of a mean over workers, piece by piece.

Owns the order of summation, the accumulation dtype, and the cutting of tensors into pieces of bounded size. Does not
move pieces between processes (``channel.py``). Imports nothing of Lightning.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lightning_diloco.comm.tensors import flat

CHUNK = 1 << 22
"""Elements that a process sends at a time, those of all its workers together."""

PIECE = 1 << 16
"""Elements of a worker in a step of arithmetic: the pieces of several workers fit into a processor's cache."""


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
    first = tensors[0].to(accumulator(tensors[0].dtype))
    mean = torch.empty_like(first, memory_format=torch.contiguous_format)
    if len(tensors) == 1:
        return mean.copy_(first)
    total = len(tensors) if weights is None else sum(weights)
    flattened, target = [t.reshape(-1) for t in (first, *tensors[1:])], mean.view(-1)
    for piece in pieces_of(target):
        _mean_of_pieces([t[piece] for t in flattened], weights, total, target[piece])
    return mean


def pieces_of(tensor: Tensor) -> Iterator[slice]:
    """Slices of a flat tensor that fit into a processor's cache; on an accelerator the whole."""
    size = PIECE if tensor.device.type == "cpu" else max(1, len(tensor))
    return (slice(start, start + size) for start in range(0, len(tensor), size))


def _mean_of_pieces(pieces: Sequence[Tensor], weights: Sequence[float] | None, total: float, out: Tensor) -> None:
    """``x_0 − (Σ_{i>0} (x_0 − x_i)) / N``, which is the mean of :func:`mean_of` to the bit, and keeps a −0.0."""
    first = pieces[0]

    def shift(hide_equal: bool) -> Tensor:
        shift: Tensor | None = None
        for i, piece in enumerate(pieces[1:], start=1):
            piece = piece.to(first.dtype)
            difference = first - piece
            if hide_equal:
                difference.masked_fill_(piece == first, 0)
            if weights is not None:
                difference *= weights[i]
            shift = difference if shift is None else shift.add_(difference)
        assert shift is not None
        return shift

    # ∞ − ∞ is NaN, also where all workers hold the same ∞: then equal elements are hidden. Looking for that is cheap on
    # a CPU only.
    on_cpu = first.device.type == "cpu"
    shifted = shift(hide_equal=not on_cpu)
    if on_cpu and not math.isfinite(shifted.sum().abs()):
        shifted = shift(hide_equal=True)
    torch.sub(first, shifted.div_(total), out=out)


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
    if isinstance(tensors, Differences):
        minuend, subtrahend = flat(tensors.minuend[name]), flat(tensors.subtrahend[name])
        return lambda start, stop: minuend[start:stop] - subtrahend[start:stop]
    whole = flat(tensors[name])
    return lambda start, stop: whole[start:stop]


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
