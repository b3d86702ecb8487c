"""Linear quantisation between the smallest and the largest element (MuLoCo's "linear", arXiv 2505.23725)."""

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from lightning_diloco.codecs.base import Codec, Payload, arithmetic, check_integer, flat, shaped
from lightning_diloco.codecs.levels import level_codes, look_up
from lightning_diloco.codecs.packing import pack, unpack


@dataclass(frozen=True)
class Uniform(Codec):
    """2^bits evenly spaced levels from the smallest to the largest element::

        L     = 2^bits − 1
        c     = round((x − min)/s),   s = (max − min)/L         half to even
        C(x)  = min + (max − min)·c/L                           min and max themselves are exact

    Args:
        bits: bits per element, 1 to 8.

    Sent: ``bits`` per element, packed; min and max, in float32 (float64 for float64 tensors).
    When: as the plain baseline. One outlier widens all steps: at 2 bits :class:`Statistical` is much better.
    Cost: a pass for min and max, a pass for the codes.
    Proof: ``test_codecs.py::test_uniform_by_hand`` and ``::test_codecs_agree_with_the_slow_reference``.
    """

    bits: int = 8

    def __post_init__(self) -> None:
        check_integer("Uniform", "bits", self.bits, 1, 8, "For more bits use Cast.")

    @override
    def encode(self, x: Tensor, memory: dict[str, Tensor], generator: torch.Generator) -> Payload:
        values, last = flat(x, self), 2**self.bits - 1
        ends = torch.stack(torch.aminmax(values)) if len(values) else values.new_zeros(2)
        low, high = ends.tolist()
        codes = level_codes(values, low, (high - low) / last, zero=0, highest=last, rounding=Tensor.round_)
        return {"codes": pack(codes, self.bits), "ends": ends}

    @override
    def decode(self, payload: Payload, like: Tensor) -> Tensor:
        low, high = payload["ends"].tolist()
        last = 2**self.bits - 1
        levels = [low + (high - low) * code / last for code in range(last)] + [high]
        table = torch.tensor(levels, dtype=arithmetic(like.dtype), device=payload["codes"].device)
        return shaped(look_up(table, unpack(payload["codes"], like.numel(), self.bits)), like)
