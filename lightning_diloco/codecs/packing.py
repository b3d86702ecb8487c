"""Integers of a few bits, packed into bytes without gaps.

A width that does not divide a byte is split into widths that do, the largest first, from the lowest bit up: 12 = 8 + 4
(three bytes hold two codes), 3 = 2 + 1. Within a width w neighbours don't share a byte: byte i holds code i in its
lowest w bits, code m + i in the next w, and so on, with m = ⌈n·w/8⌉. Each pass thus reads and writes contiguous memory,
and the layout is the same on little-endian and big-endian machines.
"""

from collections.abc import Iterator

import torch
from torch import Tensor


def packed_bytes(count: int, bits: int) -> int:
    """Bytes for ``count`` codes: ⌈count·bits/8⌉, and at most two more where several widths each end within a byte."""
    return sum(-(-count * width // 8) for width, _ in _widths(bits))


def pack(codes: Tensor, bits: int) -> Tensor:
    """Packs non-negative integers below 2^bits, one dimension, any integer dtype; returns uint8."""
    parts = []
    for width, shift in _widths(bits):
        size = packed_bytes(len(codes), width)
        part = codes.new_zeros(size, dtype=torch.uint8)
        for j in range(8 // width):
            lane = codes[j * size : (j + 1) * size]
            if bits > width:
                lane = (lane >> shift) & ((1 << width) - 1)
            part[: len(lane)] |= lane.to(torch.uint8) << (width * j)
        parts.append(part)
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def unpack(packed: Tensor, count: int, bits: int) -> Tensor:
    """The ``count`` codes that :func:`pack` packed: uint8 up to 8 bits, else int64."""
    codes = packed.new_zeros(count, dtype=torch.uint8 if bits <= 8 else torch.int64)
    start = 0
    for width, shift in _widths(bits):
        size = packed_bytes(count, width)
        part = packed[start : start + size]
        start += size
        for j in range(8 // width):
            lane = codes[j * size : (j + 1) * size]
            lane |= ((part[: len(lane)] >> (width * j)) & ((1 << width) - 1)).to(codes.dtype) << shift
    return codes


def _widths(bits: int) -> Iterator[tuple[int, int]]:
    """(width, its lowest bit in the code), for widths of 8, 4, 2 and 1 bits that add up to ``bits``."""
    low = 0
    while low < bits:
        width = next(w for w in (8, 4, 2, 1) if w <= bits - low)
        yield width, low
        low += width
