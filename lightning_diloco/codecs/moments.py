"""Mean, standard deviation and means of bins, with the same bits whatever the number of threads.

torch splits the sum of a whole tensor over its threads, so that the last bits depend on their number; processes on one
machine often have fewer each. Here every row of fixed length is summed by one thread, in float64, and the rows in
order.
"""

import math

import torch
from torch import Tensor

from lightning_diloco.codecs.base import pieces

ROW = 1 << 12
"""Elements that are summed in one go."""


def mean_and_sigma(x: Tensor) -> tuple[float, float]:
    """Mean and standard deviation √(Σ(x − mean)²/n) of a flat tensor; (0, 0) if it is empty.

    The sums are of x − x_0, so that equal elements have exactly themselves as mean and 0 as deviation.
    """
    if not len(x):
        return 0.0, 0.0
    first, total, squares = float(x[0]), 0.0, 0.0
    for piece in pieces(len(x), x.device):
        shifted = x[piece].to(torch.float64, copy=True).sub_(first)
        total += _sum(shifted)
        squares += _sum(shifted.square_())
    shift = total / len(x)
    return first + shift, math.sqrt(max(squares / len(x) - shift * shift, 0.0))


def bin_means(x: Tensor, codes: Tensor, bins: int) -> Tensor:
    """Mean of the elements of each code, in the dtype of ``x``; 0 for a code that no element has."""
    sums = x.new_zeros(bins, dtype=torch.float64)
    counts = x.new_zeros(bins, dtype=torch.int64)
    for piece in pieces(len(x), x.device):
        index = codes[piece].int()
        sums.index_add_(0, index, x[piece].double())  # unlike bincount with weights, allowed in deterministic mode
        counts += torch.bincount(index, minlength=bins)
    return (sums / counts.clamp_(min=1)).to(x.dtype)


def _sum(x: Tensor) -> float:
    whole = len(x) // ROW * ROW
    rows = x[:whole].view(-1, ROW).sum(1).tolist()
    return float(sum(rows)) + float(x[whole:].sum())
