"""Tensors as numbers and as bits: copied, compared, hashed, and viewed as bytes for ``torch.distributed``.

Owns nothing but these functions. Imports nothing of Lightning.
"""

import copy
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def copied(value: Any, device: torch.device | None = None, plain: bool = False) -> Any:
    """A deep copy of nested state that shares no tensor with ``value``.

    Args:
        value: tensors in dicts, lists and tuples; dict keys stay the same objects, other values are deep-copied.
        device: move tensors there, except tensors of at most one element (step counters), which move to the CPU only.
        plain: dicts of a subclass become plain dicts, so that files load with ``weights_only=True``.
    """
    if isinstance(value, Tensor):
        clone = value.detach().clone()
        moves = device is not None and (value.numel() > 1 or device.type == "cpu")
        return clone.to(device) if moves else clone
    if type(value) is dict or (plain and isinstance(value, dict)):
        return {k: copied(v, device, plain) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(copied(v, device, plain) for v in value)
    return copy.deepcopy(value)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested dicts, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(item)


def bitwise_equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal bit for bit (NaN equals the same NaN, 0.0 differs from -0.0)."""
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    if not (a.is_floating_point() or a.is_complex()):
        return torch.equal(a, b)
    a, b = real_view(a), real_view(b)
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.view(integer), b.view(integer))


def real_view(tensor: Tensor) -> Tensor:
    """Complex numbers as pairs of real numbers."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def flat(tensor: Tensor) -> Tensor:
    """Flattened real numbers, in the logical order of the elements; a view where the memory has that order."""
    return real_view(tensor).reshape(-1)


def bytes_of(tensor: Tensor) -> Tensor:
    """The bytes of a contiguous tensor, as a view: every back end can send bytes, but not every dtype."""
    return tensor.view(-1).view(torch.uint8)


def digest(tensor: Tensor, reference: Tensor | None) -> bytes:
    """A hash of the tensor's bits; empty if they equal the reference's."""
    if reference is not None and bitwise_equal(tensor, reference):
        return b""
    data = bytes_of(tensor.detach().cpu().contiguous()).numpy()
    return hashlib.blake2b(data.tobytes(), digest_size=16).digest()


def checksum(tensors: Mapping[str, Tensor]) -> int:
    """A number that almost surely differs between tensors that differ in a bit."""
    total = 0
    for n, t in tensors.items():
        data = bytes_of(t.detach().contiguous())
        whole = data[: len(data) // 4 * 4].view(torch.int32)
        total = (total * 31 + int(whole.sum(dtype=torch.int64)) + int(data[len(whole) * 4 :].sum()) + len(n)) % 2**63
    return total
