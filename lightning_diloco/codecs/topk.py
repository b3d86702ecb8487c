"""The largest elements of each chunk (SparseLoCo, Sarfi et al., arXiv 2508.15706)."""

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
class TopK(Codec):
    """Of every chunk the k elements with the largest magnitude; all others are 0 at the receiver::

        S     = the k indices of a chunk with the largest |x|
        C(x)  = values(x_S) on S, 0 elsewhere

    A matrix is cut into blocks of ``chunk`` elements, the squarest whose sides divide ``chunk`` (64 × 64 for 4096,
    32 × 64 for 2048, 1 × p for a prime p); any other shape is flattened and cut into runs. Chunks at the edges are
    smaller and send min(k, their size). Nothing is padded on the wire or in statistics. Which of two equal magnitudes
    is sent is torch's choice.

    Args:
        chunk: elements per chunk, at least 2. Paper: 4096.
        k: elements sent of each chunk, 1 to ``chunk``. Paper: 64.
        values: codec for the values that were selected, all those of a tensor in one call; None: as they are, in the
            dtype of the tensor. Paper: ``Statistical(2)``.

    Sent: the index within its chunk, ⌈log₂ chunk⌉ bits each, packed (12 bits for 4096: three bytes to two indices); the
    values. ``TopK(4096, 64, Statistical(2))`` sends 112 bytes per chunk and 16 per tensor: 146.29 times fewer than
    float32.
    When: many times fewer bytes than 2 bits; inside :class:`ErrorFeedback`, without which most elements never arrive.
    Cost: a copy of the magnitudes (two for matrices, three with edges) and a selection, the slowest of all codecs.
    Proof: ``test_codecs.py::test_topk_by_hand``, ``::test_sparseloco_sends_112_bytes_per_chunk``.
    """

    chunk: int = 4096
    k: int = 64
    values: Codec | None = None

    def __post_init__(self) -> None:
        check_integer("TopK", "chunk", self.chunk, 2, None, "SparseLoCo uses 4096.")
        check_integer("TopK", "k", self.k, 1, self.chunk, f"A chunk has {self.chunk} elements (`chunk`).")
        check_values("TopK", self.values)

    @override
    def encode(self, x: Tensor, memory: dict[str, Tensor], generator: torch.Generator) -> Payload:
        values, grid = flat(x, self), _Grid.of(x, self.chunk)
        # Magnitude −1 keeps the padding behind every element. Sorted, it is cut off by the number that a chunk sends.
        index = torch.topk(grid.chunks(values.abs(), -1.0), self.k, dim=1).indices
        sent = grid.sizes(x.device).clamp_(max=self.k)
        index = index[torch.arange(self.k, device=x.device) < sent[:, None]]
        selected = values[grid.positions(index, sent)]
        payload = {"indices": pack(index, self._index_bits)}
        return payload | encode_values(self.values, selected, x.dtype, memory, generator)

    @override
    def decode(self, payload: Payload, like: Tensor) -> Tensor:
        device, grid = payload["indices"].device, _Grid.of(like, self.chunk)
        sent = grid.sizes(device).clamp_(max=self.k)
        count = int(sent.sum())
        index = unpack(payload["indices"], count, self._index_bits).long()
        result = torch.zeros(like.shape, dtype=arithmetic(like.dtype), device=device)
        result.view(-1)[grid.positions(index, sent)] = decode_values(self.values, payload, count, like)
        return result

    @property
    def _index_bits(self) -> int:
        return (self.chunk - 1).bit_length()


@dataclass(frozen=True)
class _Grid:
    """A matrix cut into blocks, block row after block row; what isn't a matrix is a matrix of one row."""

    rows: int
    columns: int
    height: int
    width: int

    @classmethod
    def of(cls, x: Tensor, chunk: int) -> "_Grid":
        if x.dim() != 2:
            return cls(1, x.numel(), 1, chunk)
        height = next(d for d in range(math.isqrt(chunk), 0, -1) if chunk % d == 0)
        return cls(x.shape[0], x.shape[1], height, chunk // height)

    @property
    def shape(self) -> tuple[int, int]:
        """Blocks from top to bottom, and from left to right."""
        return -(-self.rows // self.height), -(-self.columns // self.width)

    def chunks(self, flat: Tensor, fill: float) -> Tensor:
        """One row per block, edges padded with ``fill``."""
        down, across = self.shape
        matrix = flat.view(self.rows, self.columns)
        bottom, right = down * self.height - self.rows, across * self.width - self.columns
        if bottom or right:
            matrix = torch.nn.functional.pad(matrix, (0, right, 0, bottom), value=fill)
        blocks = matrix.view(down, self.height, across, self.width).transpose(1, 2)
        return blocks.reshape(down * across, self.height * self.width)

    def sizes(self, device: torch.device) -> Tensor:
        """Elements in each block, without padding."""
        down, across = (torch.arange(n, device=device) for n in self.shape)
        heights = (self.rows - down * self.height).clamp_(max=self.height)
        widths = (self.columns - across * self.width).clamp_(max=self.width)
        return (heights[:, None] * widths).view(-1)

    def positions(self, index: Tensor, sent: Tensor) -> Tensor:
        """Places in the flat tensor of indices within blocks, of which block b has ``sent[b]``, in order of blocks."""
        block = torch.arange(len(sent), device=sent.device).repeat_interleave(sent, output_size=len(index))
        across = self.shape[1]
        row = block.div(across, rounding_mode="floor") * self.height + index.div(self.width, rounding_mode="floor")
        return row * self.columns + block % across * self.width + index % self.width
