"""The error of a codec, added to the next tensor that is sent.

Seide et al. 2014; Karimireddy et al., arXiv 1901.09847; in DiLoCo: SparseLoCo, arXiv 2508.15706.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_diloco.codecs.base import Codec, Payload, arithmetic, check_real


@dataclass(frozen=True)
class ErrorFeedback(Codec):
    """Adds a codec's past errors to its input::

        a  = β·e + x                          e = 0 at first; one e per worker and tensor
        send C(a)
        e ← a − decode(C(a))

    e is kept in float32 for half types and float32, in float64 for float64: small errors would vanish in bfloat16.
    With β = 1, Σ sent + e = Σ x: nothing is lost, only late.

    Args:
        codec: the codec that compresses a; it must not keep memory itself.
        decay: β in (0, 1]. SparseLoCo: 0.95, the default here.

    Sent: the payload of ``codec``.
    When: with 2 bits, :class:`TopK` and :class:`RandomK` always. Feed it Δ, not lr·Δ: an outer optimizer multiplies by
    lr itself.
    Cost: a copy of the model per worker in memory; three passes and a decoding.
    Proof: ``test_codecs.py::test_error_feedback_telescopes`` and ``::test_error_feedback_by_hand``.
    """

    remembers: ClassVar[bool] = True

    codec: Codec
    decay: float = 0.95

    def __post_init__(self) -> None:
        if not isinstance(self.codec, Codec):
            raise ValueError(
                f"ErrorFeedback: `codec` (={self.codec!r}) must be a codec. Give an object, for example FP4()."
            )
        if self.codec.remembers:
            raise ValueError(
                f"ErrorFeedback: `codec` (={self.codec!r}) must not keep errors itself. One ErrorFeedback,"
                " around all, is enough."
            )
        if isinstance(self.decay, bool) or not isinstance(self.decay, int | float) or not 0 < self.decay <= 1:
            raise ValueError(
                f"ErrorFeedback: `decay` (={self.decay!r}) must be a number in (0, 1]: the part of the error that is"
                f" kept. Without error feedback use {self.codec!r} itself."
            )
        object.__setattr__(self, "decay", float(self.decay))  # 1 and 1.0 are the same setting

    @override
    def encode(self, x: Tensor, memory: dict[str, Tensor], generator: torch.Generator) -> Payload:
        check_real(x, self)
        error = memory.get("error")
        if error is None:
            form = torch.contiguous_format
            error = x.detach().to(arithmetic(x.dtype), copy=True, memory_format=form)
            memory["error"] = error
        else:
            error.mul_(self.decay).add_(x.detach())  # two roundings: add_(alpha=β) fuses them on some processors
        payload = self.codec.encode(error, memory, generator)
        error.sub_(self.codec.decode(payload, like=error))
        return payload

    @override
    def decode(self, payload: Payload, like: Tensor) -> Tensor:
        return self.codec.decode(payload, like)
