"""The largest coefficients of a blockwise discrete cosine transform (DeMo, Peng et al., arXiv 2411.19870)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from lightning_diloco.codecs.base import (
    Codec,
    Payload,
    arithmetic,
    check_integer,
    check_values,
    decode_values,
    encode_values,
    flat,
)
from lightning_diloco.codecs.packing import pack, unpack


@dataclass(frozen=True)
class DCT(Codec):
    """Of every block, the k coefficients of its cosine transform with the largest magnitude; the others are 0::

        X     = D_h · x · D_wᵀ                    per block of h × w elements; D_n is the orthonormal DCT-II
        S     = the k indices with the largest |X|
        C(x)  = D_hᵀ · (X on S, 0 elsewhere) · D_w

    A side of a matrix is cut into equal parts of the largest divisor of its length that is at most ``chunk``, as in the
    authors' code; a vector is a matrix of one row, and of more than two dimensions those after the first count as one.

    Args:
        chunk: longest side of a block, ≥ 1. Paper: 64.
        k: coefficients sent of each block, ≥ 1; smaller blocks send all they have. Paper: 32 (of 64 × 64).
        values: codec for the selected coefficients, all those of a tensor in one call; None: as they are, in the dtype
            of the tensor.

    Sent: per coefficient its value, and its index within the block in ⌈log₂ h·w⌉ bits, packed.
    When: in :class:`~lightning_diloco.DeMo`, inside :class:`ErrorFeedback`.
    Cost: two products with small matrices, a copy, and a selection.
    Proof: ``test_codecs.py::test_dct_by_hand``, ``::test_dct_agrees_with_the_slow_one``.
    """

    chunk: int = 64
    k: int = 32
    values: Codec | None = None

    def __post_init__(self) -> None:
        check_integer("DCT", "chunk", self.chunk, 1, None, "DeMo uses 64.")
        check_integer("DCT", "k", self.k, 1, None, "DeMo uses 32.")
        check_values("DCT", self.values)

    @override
    def encode(self, x: Tensor, memory: dict[str, Tensor], generator: torch.Generator) -> Payload:
        values, blocks = flat(x, self), _Blocks.of(x, self.chunk)
        coefficients = blocks.transformed(values)
        index = torch.topk(coefficients.abs(), blocks.sent(self.k), dim=1).indices
        selected = coefficients.gather(1, index).view(-1)
        payload = {"indices": pack(index.view(-1), blocks.index_bits)}
        return payload | encode_values(self.values, selected, x.dtype, memory, generator)

    @override
    def decode(self, payload: Payload, like: Tensor) -> Tensor:
        blocks = _Blocks.of(like, self.chunk)
        sent = blocks.sent(self.k)
        count = blocks.count * sent
        index = unpack(payload["indices"], count, blocks.index_bits).long().view(blocks.count, sent)
        selected = decode_values(self.values, payload, count, like).view(blocks.count, sent)
        coefficients = selected.new_zeros(blocks.count, blocks.height * blocks.width, dtype=arithmetic(like.dtype))
        return blocks.restored(coefficients.scatter_(1, index, selected)).view(like.shape)


@dataclass(frozen=True)
class _Blocks:
    """A matrix cut into equal blocks, block row after block row."""

    rows: int
    columns: int
    height: int
    width: int

    @classmethod
    def of(cls, x: Tensor, chunk: int) -> "_Blocks":
        rows = x.shape[0] if x.dim() > 1 else 1
        columns = x.numel() // rows if rows else 0
        return cls(rows, columns, _side(rows, chunk), _side(columns, chunk))

    @property
    def count(self) -> int:
        return self.rows // self.height * (self.columns // self.width)

    @property
    def index_bits(self) -> int:
        return max(1, (self.height * self.width - 1).bit_length())

    def sent(self, k: int) -> int:
        """Coefficients that a block sends."""
        return min(k, self.height * self.width)

    def transformed(self, values: Tensor) -> Tensor:
        """The coefficients, a row per block."""
        across, down = self.columns // self.width, self.rows // self.height
        blocks = values.view(down, self.height, across, self.width).transpose(1, 2)
        high, wide = (_basis(n, values.dtype, values.device) for n in (self.height, self.width))
        return (high @ blocks @ wide.T).reshape(self.count, self.height * self.width)

    def restored(self, coefficients: Tensor) -> Tensor:
        """The flat tensor."""
        across, down = self.columns // self.width, self.rows // self.height
        high, wide = (_basis(n, coefficients.dtype, coefficients.device) for n in (self.height, self.width))
        blocks = high.T @ coefficients.view(down, across, self.height, self.width) @ wide
        return blocks.transpose(1, 2).reshape(-1)


def _side(length: int, most: int) -> int:
    return next(d for d in range(min(length, most), 0, -1) if length % d == 0) if length else 1


_BASES: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}


def _basis(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The orthonormal DCT-II of n values, a row per frequency; computed once."""
    if (n, dtype, device) not in _BASES:
        frequency, at = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
        rows = torch.cos(math.pi * (2 * at + 1) * frequency / (2 * n)) * math.sqrt(2 / n)
        rows[0] /= math.sqrt(2)
        _BASES[n, dtype, device] = rows.to(device, dtype)
    return _BASES[n, dtype, device]
