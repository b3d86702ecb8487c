"""The interface of a codec, and the conventions that all codecs share.

Owns the class :class:`Codec`, the dtype of the arithmetic, and the cutting of a tensor into pieces that stay in the
cache. Owns no compression.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

Payload = dict[str, Tensor]
"""Name → packed tensor: all that crosses the wire for a tensor of a worker."""

PIECE = 1 << 17
"""Elements that a codec converts at a time on a CPU: its few temporaries stay in the second-level cache."""


class Codec(ABC):
    """Packs a tensor of a worker, and unpacks it where it arrives.

    A codec is an immutable value: two codecs with the same arguments are equal, and ``repr`` shows all arguments.
    Runs are compared and saved by it. Whatever has to outlive an encoding is in ``memory``.

    Codecs take real floating-point tensors of any shape and strides. Half types and float32 are computed in float32,
    float64 in float64. NaN and infinity are the engine's to refuse before it encodes; a codec that gets them ends
    normally with values that mean nothing.
    """

    lossless: ClassVar[bool] = False
    """Whether decoding gives the tensor back bit for bit."""

    remembers: ClassVar[bool] = False
    """Whether the codec keeps something in ``memory`` from call to call, element by element."""

    @abstractmethod
    def encode(self, x: Tensor, memory: dict[str, Tensor], generator: torch.Generator) -> Payload:
        """The payload for ``x``, which is not changed and shares no storage with it.

        Args:
            x: a real floating-point tensor.
            memory: state of this worker and this tensor. Empty before the first call; the engine keeps and saves it.
            generator: on the CPU, seeded by the engine from (run seed, tag, step, worker).

        Raises:
            TypeError: ``x`` is complex, or of integers.
        """

    @abstractmethod
    def decode(self, payload: Payload, like: Tensor) -> Tensor:
        """A new contiguous tensor: the receiver's estimate of ``x``. A pure function of its arguments.

        Args:
            payload: from :meth:`encode` of an equal codec, on the device of ``like``.
            like: a tensor with shape, dtype and device of ``x``; its values are not read, so it may be expanded.

        Returns:
            float32 for half types and float32, since means are accumulated in it; float64 for float64.
        """


def payload_bytes(payload: Payload) -> int:
    """Bytes that a payload takes on the wire."""
    return sum(t.numel() * t.element_size() for t in payload.values())


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a tensor is compressed in and decoded to."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_real(x: Tensor, codec: Codec) -> None:
    """Raises unless ``x`` holds real floating-point numbers."""
    if not x.is_floating_point():
        raise TypeError(
            f"{codec!r} was given a tensor of {x.dtype}. Codecs compress real floating-point tensors."
            + (" Make two real parameters of it (torch.view_as_real), or use no codec." if x.is_complex() else "")
        )


def flat(x: Tensor, codec: Codec) -> Tensor:
    """The elements in logical order, one dimension, dtype of the arithmetic; shares ``x``'s memory where it can."""
    check_real(x, codec)
    return x.detach().reshape(-1).to(arithmetic(x.dtype))


def shaped(values: Tensor, like: Tensor) -> Tensor:
    """Flat values in the shape of ``like``, in the dtype of the arithmetic."""
    return values.to(arithmetic(like.dtype)).view(like.shape)


def pieces(size: int, device: torch.device) -> Iterator[slice]:
    """Slices that cover ``size`` elements; a single slice on an accelerator, where launches cost more than memory."""
    step = PIECE if device.type == "cpu" else max(size, 1)
    for start in range(0, size, step):
        yield slice(start, min(size, start + step))


def check_integer(codec: str, name: str, value: object, low: int, high: int | None, advice: str) -> None:
    """Raises unless ``value`` is an integer within the bounds."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        bounds = f"≥ {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{codec}: `{name}` (={value!r}) must be an integer {bounds}. {advice}")


def check_values(codec: str, values: object) -> None:
    """Raises unless ``values`` is None or a codec that works on values whose positions change from call to call."""
    if values is None:
        return
    if not isinstance(values, Codec):
        raise ValueError(
            f"{codec}: `values` (={values!r}) must be a codec, or None to send the values as they are. Give an object,"
            " for example Statistical(2)."
        )
    if values.remembers:
        raise ValueError(
            f"{codec}: `values` (={values!r}) must not keep an error per position, since the positions change from"
            f" call to call. Wrap the whole codec: ErrorFeedback({codec}(…))."
        )


def encode_values(
    codec: Codec | None, values: Tensor, dtype: torch.dtype, memory: dict[str, Tensor], generator: torch.Generator
) -> Payload:
    """The payload for selected values, under separate names; without a codec, the values in ``dtype``."""
    if codec is None:
        return {"values": values.to(dtype)}
    return {f"values.{name}": t for name, t in codec.encode(values, memory, generator).items()}


def decode_values(codec: Codec | None, payload: Payload, count: int, like: Tensor) -> Tensor:
    """The ``count`` values of :func:`encode_values`, in the dtype of the arithmetic."""
    placeholder = like.new_empty((), dtype=arithmetic(like.dtype)).expand(count)
    if codec is None:
        return shaped(payload["values"], placeholder)
    inner = {name.removeprefix("values."): t for name, t in payload.items() if name.startswith("values.")}
    return codec.decode(inner, placeholder)
