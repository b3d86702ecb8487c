"""Random numbers that are the same for a seed in all versions of Python, NumPy and torch.

Uniform numbers come from ``random.Random(seed).random()``, whose sequence Python guarantees; everything else is
computed from these here, since the algorithms of libraries may change. Imports nothing of Lightning.
"""

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

from lightning_diloco.state.randomness import derive_seed


def uniforms(seed: int, name: str) -> Callable[[], float]:
    """Numbers in [0, 1), the same for a seed everywhere and for ever."""
    return random.Random(derive_seed(seed, "partition", name)).random


def shuffle(items: list[Any], uniform: Callable[[], float]) -> None:
    """Fisher and Yates, in place."""
    for i in range(len(items) - 1, 0, -1):
        j = int(uniform() * (i + 1))
        items[i], items[j] = items[j], items[i]


def dirichlet(parameters: Sequence[float], uniform: Callable[[], float]) -> list[float]:
    """A draw from Dir(parameters): independent gamma draws over their sum."""
    return shares([log_gamma_draw(a, uniform) for a in parameters])


def shares(logs: Sequence[float]) -> list[float]:
    """Numbers over their sum, from their logarithms: gamma draws of small shapes underflow."""
    largest = max(logs)
    numbers = [math.exp(x - largest) for x in logs]
    return [x / sum(numbers) for x in numbers]


def log_gamma_draw(shape: float, uniform: Callable[[], float]) -> float:
    """The logarithm of a draw from Gamma(shape, 1): Marsaglia & Tsang (2000), with their boost for shapes below 1."""
    if shape < 1:
        return log_gamma_draw(shape + 1, uniform) + math.log(1 - uniform()) / shape
    d = shape - 1 / 3
    c = 1 / math.sqrt(9 * d)
    while True:
        normal = math.sqrt(-2 * math.log(1 - uniform())) * math.cos(2 * math.pi * uniform())  # Box & Muller
        v = (1 + c * normal) ** 3
        if v > 0 and math.log(1 - uniform()) < normal**2 / 2 + d - d * v + d * math.log(v):
            return math.log(d * v)


def apportioned(count: int, shares: Sequence[float]) -> list[int]:
    """``count`` in the proportions of ``shares``, as whole numbers, by largest remainders.

    >>> apportioned(10, [1, 1, 1]), apportioned(7, [0.5, 0.3, 0.2])
    ([4, 3, 3], [4, 2, 1])
    """
    total = sum(shares)
    exact = [count * share / total for share in shares]
    counts = [math.floor(x) for x in exact]
    by_remainder = sorted(range(len(shares)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: count - sum(counts)]:
        counts[i] += 1
    return counts
