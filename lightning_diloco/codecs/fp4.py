"""Four-bit floating point without a mantissa (Streaming DiLoCo, Douillard et al., arXiv 2501.18512)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from lightning_diloco.codecs.base import Codec, Payload, arithmetic, flat, pieces, shaped
from lightning_diloco.codecs.levels import look_up
from lightning_diloco.codecs.packing import pack, unpack


@dataclass(frozen=True)
class FP4(Codec):
    """E3M0: a sign and three bits of exponent, that is 0 and seven powers of two of either sign::

        2^E   = smallest power of two ≥ max |x|                      one per tensor
        C(x)  = 0                      where |x| < 2^(E−7)           half of the smallest
                sign(x)·2^k            else: k ∈ {E−6, …, E}, the power of two nearest in ratio
                                       (k rises where |x| > √2·2^k; a tie would need |x| = √2·2^k, an irrational number)

    The paper fixes the values {0, ±2^k}, not the scale, which is ours. The sign of an element that becomes 0 is kept.
    E stays within −119 … 127 (−1015 … 1023 in float64), so that every level is a normal number: elements below 1e-38
    become 0.

    A tensor with NaN or infinity decodes to NaN everywhere: no power of two says it.

    Sent: two elements to a byte; E, 2 bytes.
    When: an eighth of the bytes. Streaming DiLoCo uses it without error feedback and measures no loss.
    Cost: a pass for the maximum, a pass of integer operations on the bits of the elements for the codes.
    Proof: ``test_codecs.py::test_fp4_by_hand`` and ``::test_codecs_agree_with_the_slow_reference``.
    """

    @override
    def encode(self, x: Tensor, memory: dict[str, Tensor], generator: torch.Generator) -> Payload:
        values = flat(x, self)
        integer, mantissa, bias = _format(values.dtype)
        exponent = _exponent(values, bias)
        base = min(exponent, bias) - 7 + bias  # biased exponent of the largest power of two with code 0
        half = base << mantissa  # the bits of half of the smallest level
        # The addition carries into the exponent exactly where the mantissa exceeds √2.
        carry = (2 << mantissa) - math.isqrt(2 << 2 * mantissa) - 1
        magnitude = (1 << (integer.itemsize * 8 - 1)) - 1
        codes = torch.empty_like(values, dtype=torch.uint8)
        for piece in pieces(len(values), values.device):
            bits = values[piece].view(integer)
            absolute = bits & magnitude
            code = (absolute + carry).bitwise_right_shift_(mantissa).sub_(base).clamp_(0, 7)
            torch.maximum(code, absolute.ge_(half), out=code)
            codes[piece] = code.bitwise_or_((bits >> (integer.itemsize * 8 - 4)).bitwise_and_(8))
        return {"codes": pack(codes, 4), "exponent": torch.tensor([exponent], dtype=torch.int16, device=x.device)}

    @override
    def decode(self, payload: Payload, like: Tensor) -> Tensor:
        exponent = int(payload["exponent"])
        dtype, device = arithmetic(like.dtype), payload["codes"].device
        if exponent == _NOT_FINITE:
            return torch.full(like.shape, math.nan, dtype=dtype, device=device)
        levels = [0.0, *(math.ldexp(1.0, exponent - 7 + code) for code in range(1, 8))]
        table = torch.tensor(levels + [-level for level in levels], dtype=dtype, device=device)
        return shaped(look_up(table, unpack(payload["codes"], like.numel(), 4)), like)


_NOT_FINITE = 2**14  # in place of an exponent


def _format(dtype: torch.dtype) -> tuple[torch.dtype, int, int]:
    """Integers of the same size, bits of the mantissa, and bias of the exponent."""
    return (torch.int64, 52, 1023) if dtype == torch.float64 else (torch.int32, 23, 127)


def _exponent(values: Tensor, bias: int) -> int:
    """E, such that 2^E is the smallest power of two ≥ max |x|."""
    if not len(values):
        return 0
    low, high = torch.aminmax(values)
    largest = max(-float(low), float(high))
    if not math.isfinite(largest):
        return _NOT_FINITE
    fraction, exponent = math.frexp(largest)
    return min(max(exponent - (fraction == 0.5), 8 - bias), bias)
