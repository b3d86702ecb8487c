"""No compression."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_diloco.codecs.base import Codec, Payload, flat, shaped


@dataclass(frozen=True)
class Identity(Codec):
    """Sends the tensor as it is: C(x) = x, in the dtype of x.

    When: as the baseline of a comparison; a run with it equals a run without a codec bit for bit.
    Cost: the dense bytes, and a copy.
    Proof: ``test_codecs.py::test_identity_gives_every_bit_back``.
    """

    lossless: ClassVar[bool] = True

    @override
    def encode(self, x: Tensor, memory: dict[str, Tensor], generator: torch.Generator) -> Payload:
        return {"values": flat(x, self).to(x.dtype, copy=True)}

    @override
    def decode(self, payload: Payload, like: Tensor) -> Tensor:
        return shaped(payload["values"].clone(), like)
