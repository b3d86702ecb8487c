"""Codecs as loops over single numbers, written from the equations; shares nothing with the package.

Numbers are numpy scalars of the dtype of the arithmetic, so that each operation rounds as it should; comparisons with
√2 are exact, in fractions.
"""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

Numbers = Sequence[Any]


def moments(x: Numbers) -> tuple[float, float]:
    exact = [Fraction(float(v)) for v in x]
    mean = sum(exact) / len(exact)
    return float(mean), math.sqrt(sum((v - mean) ** 2 for v in exact) / len(exact))


def fp4(x: Numbers) -> list[Any]:
    largest = max((abs(float(v)) for v in x), default=0.0)
    if largest == 0:
        return list(x)
    top = math.floor(math.log2(largest)) - 2  # safely below
    while Fraction(2) ** top < Fraction(largest):
        top += 1
    result = []
    for v in x:
        size = Fraction(abs(float(v)))
        if size < Fraction(2) ** (top - 7):
            level = 0.0
        else:
            # nearest in ratio: the k whose 2^k is within a factor √2, so size² / 4^k lies in (1/2, 2]
            levels = range(top - 6, top + 1)
            level = 2.0 ** min(levels, key=lambda k: max(size / Fraction(2) ** k, Fraction(2) ** k / size))
        result.append(type(v)(math.copysign(level, float(v))))
    return result


def uniform(x: Numbers, bits: int) -> list[Any]:
    if not len(x):
        return []
    kind, last = type(x[0]), 2**bits - 1
    low, high = min(x), max(x)
    step = kind((float(high) - float(low)) / last)
    result = []
    for v in x:
        code = 0 if step == 0 else int(np.rint((v - low) / step))
        code = min(max(code, 0), last)
        result.append(high if code == last else kind(float(low) + (float(high) - float(low)) * code / last))
    return [low if step == 0 else v for v in result]


def int8(x: Numbers) -> list[Any]:
    if not len(x):
        return []
    kind = type(x[0])
    mean, sigma = moments(x)
    offset, scale = kind(mean), kind(12 * sigma / 256)
    result = []
    for v in x:
        code = 0 if scale == 0 else int(np.rint((v - offset) / scale))
        result.append(kind(min(max(code, -128), 127)) * scale + offset)
    return result


def statistical(x: Numbers, bits: int) -> list[Any]:
    if not len(x):
        return []
    kind, bins = type(x[0]), 2**bits
    mean, sigma = moments(x)
    width = kind(6 * sigma / bins)
    codes = []
    for v in x:
        code = 0 if width == 0 else int(np.floor((v - kind(mean)) / width))
        codes.append(min(max(code + bins // 2, 0), bins - 1))
    members: dict[int, list[float]] = {}
    for v, code in zip(x, codes, strict=True):
        members.setdefault(code, []).append(float(v))
    return [kind(float(sum(map(Fraction, members[c])) / len(members[c]))) for c in codes]


def topk(x: np.ndarray, block: tuple[int, int], k: int, values: Callable[[Numbers], Numbers] | None) -> np.ndarray:
    """``block``: height and width for matrices; other shapes are cut into runs of height·width elements."""
    matrix = x if x.ndim == 2 else x.reshape(1, -1)
    height, width = block if x.ndim == 2 else (1, block[0] * block[1])
    places: list[tuple[int, int]] = []
    for top in range(0, matrix.shape[0], height):
        for left in range(0, matrix.shape[1], width):
            cells = [
                (i, j)
                for i in range(top, min(top + height, matrix.shape[0]))
                for j in range(left, min(left + width, matrix.shape[1]))
            ]
            places += sorted(cells, key=lambda cell: -abs(matrix[cell]))[:k]
    chosen: Numbers = [matrix[p] for p in places]
    if values is not None:
        chosen = values(chosen)
    result = np.zeros_like(matrix)
    for place, value in zip(places, chosen, strict=True):
        result[place] = value
    return result.reshape(x.shape)


def unpack(packed: Sequence[int], count: int, bits: int) -> list[int]:
    """The codes, bit by bit, from the layout that ``packing`` documents."""
    codes, start, low = [0] * count, 0, 0
    for width in (8, 8, 4, 2, 1):
        if width > bits - low:
            continue
        size = math.ceil(count * width / 8)
        for n in range(count):
            byte, lane = packed[start + n % size], n // size
            for b in range(width):
                codes[n] += (byte >> (lane * width + b) & 1) << (low + b)
        start, low = start + size, low + width
    assert start == len(packed)
    assert low == bits
    return codes
