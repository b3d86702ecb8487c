"""The mean of what the payloads of a tensor decode to, and its statistics, in bounded memory.

Owns when a payload is decoded. Does not own codecs (``codecs/``), the transport of payloads (``payloads.py``), nor the
arithmetic of a mean (``means.py``). Imports nothing of Lightning.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_diloco.codecs.base import Codec, Payload, arithmetic
from lightning_diloco.comm.means import PieceMeans, Row, pieces_of
from lightning_diloco.comm.statistics import MeanStatistics


class DecodedMean:
    """Means of decoded payloads of n workers, tensor by tensor.

    Args:
        codec: decodes the payloads.
        count: n ≥ 1.
        weights: a number for each worker, not all zero; default 1 each.
    """

    def __init__(self, codec: Codec, count: int, weights: Sequence[float] | None) -> None:
        self._codec, self._count, self._weights = codec, count, weights
        self._total = count if weights is None else sum(weights)
        self._means: dict[tuple[torch.dtype, torch.device], PieceMeans] = {}

    def of(
        self,
        name: str,
        payloads: Sequence[Payload],
        like: Tensor,
        statistics: MeanStatistics | None,
        part: tuple[int, int],
        most: int,
    ) -> Tensor:
        """The mean, in the dtype of decoded tensors and the shape of ``like``.

        Args:
            name: name of the tensor.
            payloads: one of each worker, in the workers' order.
            like: a tensor with the shape, dtype and device of what was encoded.
            statistics: measures the decoded values and their mean.
            part: first and last + 1 flat element that this process measures.
            most: decoded elements that may be held at a time, those of all workers together. If the tensor is too large
                for that, workers are added one by one, and decoded once more for their inner products.
        """
        held = max(1, most // max(1, like.numel()))
        if held >= self._count:
            return self._of_all(name, [self._decode(payload, like) for payload in payloads], like, statistics, part)
        return self._one_by_one(name, payloads, like, held, statistics, part)

    def _decode(self, payload: Payload, like: Tensor) -> Tensor:
        return self._codec.decode(payload, like).view(-1)

    def _of_all(
        self,
        name: str,
        rows: Sequence[Tensor],
        like: Tensor,
        statistics: MeanStatistics | None,
        part: tuple[int, int],
    ) -> Tensor:
        key = arithmetic(like.dtype), like.device
        if key not in self._means:
            self._means[key] = PieceMeans(self._count, self._weights, *key)
        start, stop = part
        mean = torch.empty_like(rows[0])
        for begin, end, measure in ((0, start, None), (start, stop, statistics), (stop, len(mean), None)):
            within = slice(begin, end)
            self._means[key].take([Row(row[within]) for row in rows], mean[within], name, begin, measure)
        return mean.view(like.shape)

    def _one_by_one(
        self,
        name: str,
        payloads: Sequence[Payload],
        like: Tensor,
        held: int,
        statistics: MeanStatistics | None,
        part: tuple[int, int],
    ) -> Tensor:
        mean = self._sum_up(payloads, like, hide_equal=False)
        if not _finite(mean):  # ∞ − ∞: hide where all hold the same ∞
            mean = self._sum_up(payloads, like, hide_equal=True)
        if statistics is not None and part[0] < part[1]:
            statistics.add_products(name, self._products(name, payloads, like, held, statistics, part))
            statistics.add_square(name, statistics.square_of(name, part[0], mean[slice(*part)]))
        return mean.view(like.shape)

    def _sum_up(self, payloads: Sequence[Payload], like: Tensor, hide_equal: bool) -> Tensor:
        """``x_0 − (Σ_{i>0} (x_0 − x_i)) / n``, the same bits as :class:`PieceMeans`."""
        first = self._decode(payloads[0], like)
        shift: Tensor | None = None
        for i, payload in enumerate(payloads[1:], start=1):
            values = self._decode(payload, like)
            for piece in pieces_of(values):
                x, x_0 = values[piece], first[piece]
                equal = (x == x_0) & x.isinf() if hide_equal else None
                torch.sub(x_0, x, out=x)
                if equal is not None:
                    x.masked_fill_(equal, 0)
                if self._weights is not None:
                    x *= self._weights[i]
                if shift is not None:
                    shift[piece].add_(x)
            shift = values if shift is None else shift
        return first if shift is None else torch.sub(first, shift.div_(self._total), out=first)

    def _products(
        self,
        name: str,
        payloads: Sequence[Payload],
        like: Tensor,
        held: int,
        statistics: MeanStatistics,
        part: tuple[int, int],
    ) -> Tensor:
        """Inner products of all pairs, with ``held`` + 1 decoded tensors in memory."""
        n, within = len(payloads), slice(*part)
        products = torch.zeros(n, n, dtype=torch.float64)
        rows: list[Tensor] = []
        for begin in range(0, n, held):
            block = list(range(begin, min(begin + held, n)))
            rows.clear()  # before the next are decoded
            rows += (self._decode(payloads[i], like)[within] for i in block)
            products[begin : begin + len(block), begin : begin + len(block)] = statistics.products_of(
                name, part[0], rows
            )
            for j in range(begin + len(block), n):
                found = statistics.products_of(name, part[0], [*rows, self._decode(payloads[j], like)[within]])
                products[begin : begin + len(block), j] = found[:-1, -1]
                products[j, begin : begin + len(block)] = found[-1, :-1]
        return products


def _finite(tensor: Tensor) -> bool:
    return math.isfinite(tensor.sum())
