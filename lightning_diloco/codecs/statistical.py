"""Bins over six standard deviations, decoded to their means.

MuLoCo, Thérien et al., arXiv 2505.23725; SparseLoCo, Sarfi et al., arXiv 2508.15706.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from lightning_diloco.codecs.base import Codec, Payload, check_integer, flat, shaped
from lightning_diloco.codecs.levels import level_codes, look_up
from lightning_diloco.codecs.moments import bin_means, mean_and_sigma
from lightning_diloco.codecs.packing import pack, unpack


@dataclass(frozen=True)
class Statistical(Codec):
    """2^bits equal bins over mean ± 3 standard deviations; each decodes to the mean of its members::

        m, σ  = mean and √(Σ(x − m)²/n) of the values present
        c     = clamp(⌊(x − m)/w⌋ + 2^bits/2, 0, 2^bits − 1),   w = 6σ / 2^bits
        C(x)  = mean of all x with the same c                   m itself needn't travel

    A bin holds its lower edge; the outermost bins hold what lies beyond 3σ. The statistics are those of one call: of a
    whole tensor, or, as ``values`` of :class:`TopK`, of all values that were selected of a tensor. The mean of the
    elements survives, up to rounding.

    Args:
        bits: bits per element, 1 to 8. MuLoCo and SparseLoCo use 2.

    Sent: ``bits`` per element, packed; 2^bits means, in float32 (float64 for float64 tensors).
    When: 2 to 4 bits, inside :class:`ErrorFeedback`; without it 2 bits lose much.
    Cost: a pass for m and σ, a pass for the codes, a pass for the means.
    Proof: ``test_codecs.py::test_statistical_by_hand`` and ``::test_codecs_agree_with_the_slow_reference``.
    """

    bits: int = 2

    def __post_init__(self) -> None:
        check_integer("Statistical", "bits", self.bits, 1, 8, "For more bits use Cast.")

    @override
    def encode(self, x: Tensor, memory: dict[str, Tensor], generator: torch.Generator) -> Payload:
        values, bins = flat(x, self), 2**self.bits
        mean, sigma = mean_and_sigma(values)
        codes = level_codes(values, mean, 6 * sigma / bins, zero=bins // 2, highest=bins - 1, rounding=Tensor.floor_)
        return {"codes": pack(codes, self.bits), "means": bin_means(values, codes, bins)}

    @override
    def decode(self, payload: Payload, like: Tensor) -> Tensor:
        return shaped(look_up(payload["means"], unpack(payload["codes"], like.numel(), self.bits)), like)
