"""Half precision on the wire."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_diloco.codecs.base import Codec, Payload, flat, shaped

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Cast(Codec):
    """Sends each element in half precision::

        C(x) = clamp(round to nearest even (x), −max, max)      max: the largest finite number of the dtype

    Float16 ends at 65504 and loses bits below 6.1e-5; larger elements are sent as ±65504, where a bare cast would send
    infinity.

    Args:
        dtype: "bf16" (8 bits of range, 8 of precision) or "fp16" (5 and 11).

    Sent: 2 bytes per element.
    When: first thing to try; bf16 for tensors of any scale, fp16 where elements lie between 1e-4 and 1e4.
    Cost: a pass.
    Proof: ``test_codecs.py::test_cast_rounds_to_nearest_even_and_saturates``.
    """

    dtype: Literal["bf16", "fp16"] = "bf16"

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise ValueError(
                f"Cast: `dtype` (={self.dtype!r}) must be 'bf16' or 'fp16'. For fewer bits use Int8, FP4, Uniform or"
                " Statistical."
            )

    @override
    def encode(self, x: Tensor, memory: dict[str, Tensor], generator: torch.Generator) -> Payload:
        dtype = _DTYPES[self.dtype]
        largest = torch.finfo(dtype).max
        return {"values": flat(x, self).to(dtype, copy=True).clamp_(-largest, largest)}

    @override
    def decode(self, payload: Payload, like: Tensor) -> Tensor:
        return shaped(payload["values"], like)
