"""A random part of the elements (random dropping in Streaming DiLoCo, arXiv 2501.18512; masks as in SPARTA)."""

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from lightning_diloco.codecs.base import Codec, Payload, arithmetic, check_values, decode_values, encode_values, flat


@dataclass(frozen=True)
class RandomK(Codec):
    """A fresh random part of the elements at every call; all others are 0 at the receiver::

        k     = max(1, round(fraction·n))
        S     = k indices of n                 k equal strata, one index of each, all moved by one random offset mod n
        C(x)  = values(x_S) on S, 0 elsewhere  not scaled by n/k

    Every element is sent with the same probability k/n. Stratified indices take k operations, a permutation takes n.
    Indices don't travel: the receiver draws them again from the seed. Workers get different generators from
    the engine, hence different masks; an element that a worker did not send counts as 0 in the mean.

    Args:
        fraction: of the elements, in (0, 1].
        values: codec for the values that were selected; None: as they are, in the dtype of the tensor.

    Sent: k values; the seed, 8 bytes.
    When: as the control for :class:`TopK`; inside :class:`ErrorFeedback`, or elements are lost for good.
    Cost: proportional to k when encoding; a tensor of zeros when decoding.
    Proof: ``test_codecs.py::test_randomk_sends_each_element_equally_often``.
    """

    fraction: float = 0.01
    values: Codec | None = None

    def __post_init__(self) -> None:
        if isinstance(self.fraction, bool) or not isinstance(self.fraction, int | float) or not 0 < self.fraction <= 1:
            raise ValueError(
                f"RandomK: `fraction` (={self.fraction!r}) must be a number in (0, 1]: the part of the elements that is"
                " sent. For 1 in 100 give 0.01."
            )
        check_values("RandomK", self.values)
        object.__setattr__(self, "fraction", float(self.fraction))  # 1 and 1.0 are the same setting

    @override
    def encode(self, x: Tensor, memory: dict[str, Tensor], generator: torch.Generator) -> Payload:
        values = flat(x, self)
        seed = torch.randint(2**63 - 1, (1,), generator=generator)
        selected = values[self._indices(seed, len(values)).to(x.device)]
        payload = {"seed": seed.to(x.device)}
        return payload | encode_values(self.values, selected, x.dtype, memory, generator)

    @override
    def decode(self, payload: Payload, like: Tensor) -> Tensor:
        device = payload["seed"].device
        indices = self._indices(payload["seed"], like.numel()).to(device)
        result = torch.zeros(like.shape, dtype=arithmetic(like.dtype), device=device)
        result.view(-1)[indices] = decode_values(self.values, payload, len(indices), like)
        return result

    def _indices(self, seed: Tensor, size: int) -> Tensor:
        """Drawn on the CPU, so that sender and receiver agree whatever their devices."""
        count = min(size, max(1, round(self.fraction * size)))
        if not count:
            return torch.empty(0, dtype=torch.int64)
        generator = torch.Generator().manual_seed(int(seed))
        starts = torch.arange(count + 1) * size // count
        lengths = starts.diff()
        within = (torch.rand(count, dtype=torch.float64, generator=generator) * lengths).long()
        return (starts[:-1] + within + torch.randint(size, (1,), generator=generator)) % size
