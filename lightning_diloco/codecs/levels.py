"""Codes of evenly spaced levels, and the values that codes stand for.

Owns two loops over pieces of a tensor. Does not own where the levels lie: each codec does.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_diloco.codecs.base import pieces


def level_codes(
    x: Tensor, offset: float, width: float, zero: int, highest: int, rounding: Callable[[Tensor], Tensor]
) -> Tensor:
    """``clamp(rounding((x − offset) / width) + zero, 0, highest)`` as uint8, in the dtype of ``x``.

    Args:
        x: one dimension.
        offset: the value of code ``zero``, or its lower edge, representable in the dtype.
        width: distance between levels; 0 (all elements equal ``offset``) gives code ``zero``.
        zero: code at ``offset``.
        highest: the last code, at most 255.
        rounding: in place, ``Tensor.round_`` (half to even) or ``Tensor.floor_``.
    """
    codes = torch.empty_like(x, dtype=torch.uint8)
    for piece in pieces(len(x), x.device):
        scaled = rounding((x[piece] - offset).div_(width))
        # 0 / 0 where all elements are equal; a NaN cast to an integer is undefined.
        codes[piece] = scaled.nan_to_num_(0.0).add_(zero).clamp_(0, highest)
    return codes


def look_up(table: Tensor, codes: Tensor) -> Tensor:
    """``table[codes]`` for uint8 codes."""
    values = torch.empty_like(codes, dtype=table.dtype)
    for piece in pieces(len(codes), codes.device):
        torch.index_select(table, 0, codes[piece].int(), out=values[piece])
    return values
