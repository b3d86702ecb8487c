"""What does each codec send, and what arrives?"""

import ast
import itertools
import math
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import codec_reference as reference
import numpy as np
import pytest
import torch
from torch import Tensor
from twins import cosines

import lightning_diloco.codecs
from lightning_diloco.codecs import (
    DCT,
    FP4,
    Cast,
    Codec,
    ErrorFeedback,
    Identity,
    Int8,
    Payload,
    RandomK,
    Statistical,
    TopK,
    Uniform,
    payload_bytes,
)
from lightning_diloco.codecs.base import PIECE
from lightning_diloco.codecs.moments import mean_and_sigma
from lightning_diloco.codecs.packing import pack, packed_bytes, unpack

SHAPES = [(), (0,), (1,), (2,), (7,), (0, 3), (1, 6), (5, 9), (3, 4, 5), (2, 3, 1, 4)]
STATELESS = [
    Identity(),
    Cast("bf16"),
    Cast("fp16"),
    Int8(),
    FP4(),
    *map(Uniform, range(1, 9)),
    *map(Statistical, range(1, 9)),
    TopK(16, 3),
    TopK(16, 3, Statistical(2)),
    TopK(6, 6, FP4()),
    RandomK(0.3),
    RandomK(0.3, Int8()),
    DCT(4, 3),
    DCT(3, 2, Int8()),
]
CODECS = [*STATELESS, *map(ErrorFeedback, STATELESS)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sent(codec: Codec, x: Tensor, seed: int = 0) -> Payload:
    return codec.encode(x, {}, generator(seed))


def through(codec: Codec, x: Tensor, seed: int = 0) -> Tensor:
    return codec.decode(sent(codec, x, seed), x)


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit."""
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and a.contiguous().numpy().tobytes() == b.contiguous().numpy().tobytes()
    )


# --- by hand ---------------------------------------------------------------------------------------------------------


def test_fp4_by_hand():
    # max 8 = 2^3: levels ±{1/8, 1/4, 1/2, 1, 2, 4, 8}; below 1/16: 0. 2√2 = 2.828…
    x = torch.tensor([8, -4, 3, 2.83, 2.82, -1.5, 1.4, 0.125, 0.0625, 0.0624, 0, -0.07, -0.01])
    expected = torch.tensor([8, -4, 4, 4, 2, -2, 1, 0.125, 0.125, 0, 0, -0.125, -0.0])
    assert same(through(FP4(), x), expected)
    # max 5: the power of two above it is 8; 5 < 4√2 < 6
    assert through(FP4(), torch.tensor([5.0, -0.06])).tolist() == [4, 0]
    assert through(FP4(), torch.tensor([6.0, -0.0625])).tolist() == [8, -0.125]


def test_fp4_packs_two_to_a_byte():
    payload = sent(FP4(), torch.tensor([8, -4, 0.125, 0, -8]))
    # codes 7, 8 + 6, 1, 0, 8 + 7; byte i holds code i in its low half, code 3 + i in its high half
    assert payload["codes"].tolist() == [7 + 16 * 0, 14 + 16 * 15, 1]
    assert payload["exponent"].tolist() == [3]
    assert payload_bytes(payload) == 3 + 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fp4_at_the_ends_of_the_dtype(dtype):
    info = torch.finfo(dtype)
    bias = 127 if dtype == torch.float32 else 1023
    top = 2.0**bias
    x = torch.tensor([info.max, -top, top / 64, top / 128, top / 129], dtype=dtype)
    assert through(FP4(), x).tolist() == [top, -top, top / 64, top / 64, 0]
    # the levels stay normal numbers: E ≥ 8 − bias; its half is the smallest normal number
    x = torch.tensor([info.tiny, -info.tiny / 2, info.smallest_normal * 2], dtype=dtype)
    assert through(FP4(), x).tolist() == [2 * info.tiny, 0, 2 * info.tiny]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fp4_rounds_at_the_square_root_of_two(dtype):
    near = torch.tensor(2**0.5, dtype=dtype)
    around = [torch.nextafter(near, torch.zeros_like(near)), near, torch.nextafter(near, near + 1)]
    results = [through(FP4(), torch.stack([near.new_tensor(8.0), v]))[1].item() for v in around]
    assert results == [2 if Fraction(v.item()) ** 2 > 2 else 1 for v in around]
    assert {1, 2} == set(results)


def test_int8_by_hand():
    # mean 0, σ 1: step 12/256 = .046875; 1/.046875 = 21.33 → 21 steps
    assert through(Int8(), torch.tensor([1.0, -1.0])).tolist() == [0.984375, -0.984375]
    # mean 1, σ 8: step .375; 65 is 8 σ away and clipped to 127 steps; 0 is 2.67 steps below the mean → 3
    x = torch.tensor([65.0] + [0.0] * 64)
    assert through(Int8(), x).tolist() == [1 + 127 * 0.375] + [1 - 3 * 0.375] * 64
    payload = sent(Int8(), x)
    assert payload["codes"].tolist() == [255] + [125] * 64
    assert (payload["mean"].tolist(), payload["scale"].tolist()) == ([1.0], [0.375])
    assert sent(Int8(), -x)["codes"].tolist() == [0] + [131] * 64


def test_uniform_by_hand():
    # min −1, max 2, three steps of 1; ties to the even code
    x = torch.tensor([-1, 0, 0.9, 2, -0.5, 0.5])
    assert through(Uniform(2), x).tolist() == [-1, 0, 1, 2, -1, 1]
    payload = sent(Uniform(2), x[:4])
    assert payload["codes"].tolist() == [0 + (1 << 2) + (2 << 4) + (3 << 6)]
    assert payload["ends"].tolist() == [-1, 2]


def test_statistical_by_hand():
    # mean 0, σ 1, edges −1.5, 0, 1.5; a bin holds its lower edge: bins 3, 1, 2, 1, 2; means −1, .25, 1.5
    x = torch.tensor([1.5, -1.5, 0.5, -0.5, 0])
    payload = sent(Statistical(2), x)
    assert reference.unpack(payload["codes"].tolist(), 5, 2) == [3, 1, 2, 1, 2]
    assert payload["means"].tolist() == [0, -1, 0.25, 1.5]
    assert through(Statistical(2), x).tolist() == [1.5, -1, 0.25, -1, 0.25]
    assert through(Statistical(2), x + 10).tolist() == [11.5, 9, 10.25, 9, 10.25]
    # mean 1, σ 8, bins of 12: 65 lies beyond and belongs to the last; 0 is just below the mean
    payload = sent(Statistical(2), torch.tensor([65.0] + [0.0] * 64))
    assert reference.unpack(payload["codes"].tolist(), 65, 2) == [3] + [1] * 64
    assert payload["means"].tolist() == [0, 0, 0, 65]


def test_topk_by_hand():
    x = torch.tensor([[1, -2, 3, 0], [0, 1, -1, 4], [-9, 8, 0, 0], [7, 6, 0.5, -0.6]])
    payload = sent(TopK(4, 1), x)  # blocks of 2 × 2; magnitudes decide
    assert payload["values"].tolist() == [-2, 4, -9, torch.tensor(-0.6).item()]
    assert reference.unpack(payload["indices"].tolist(), 4, 2) == [1, 3, 0, 3]
    expected = torch.tensor([[0, -2, 0, 0], [0, 0, 0, 4], [-9, 0, 0, 0], [0, 0, 0, -0.6]])
    assert same(through(TopK(4, 1), x), expected)
    flat = torch.tensor([1.0, -3, 2, 0, 5, -6, 4, 0.1, -0.2, 0.1])  # runs of 4, 4 and 2
    assert through(TopK(4, 1), flat).tolist() == [0, -3, 0, 0, 0, -6, 0, 0, torch.tensor(-0.2).item(), 0]
    assert same(through(TopK(4, 2), flat)[8:], flat[8:])
    # 3 × 3 in blocks of 2 × 2: the edges are 2 × 1, 1 × 2 and 1 × 1
    x = torch.tensor([[1.0, 2, -9], [3, -4, 5], [6, -7, 8]])
    assert through(TopK(4, 1), x).tolist() == [[0, 0, -9], [0, -4, 0], [0, -7, 8]]
    # chunk 6 in blocks of 2 × 3, chunk 5 in blocks of 1 × 5
    x = torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, -8]])
    assert through(TopK(6, 1), x).tolist() == [[0, 0, 0, 0], [0, 0, 7, -8]]
    assert through(TopK(5, 1), x).tolist() == [[0, 0, 0, 4], [0, 0, 0, -8]]


def test_cast_rounds_to_nearest_even_and_saturates():
    ulp = 2.0**-7
    x = torch.tensor([1 + ulp / 2, 1 + 1.5 * ulp, 1 + 0.6 * ulp, -3.0])
    assert through(Cast("bf16"), x).tolist() == [1, 1 + 2 * ulp, 1 + ulp, -3]
    assert through(Cast("fp16"), torch.tensor([7e4, -1e30, 65504.0])).tolist() == [65504, -65504, 65504]
    largest = torch.finfo(torch.bfloat16).max
    assert through(Cast("bf16"), torch.tensor([torch.finfo(torch.float32).max])).item() == largest


def test_error_feedback_by_hand():
    # FP4 of [4, 3] is [4, 4]
    codec, memory = ErrorFeedback(FP4(), 0.5), {}
    x = torch.tensor([4.0, 3.0])
    arrived = codec.decode(codec.encode(x, memory, generator()), x)
    assert (arrived.tolist(), memory["error"].tolist()) == ([4, 4], [0, -1])
    # a = .5·[0, −1] + [4, 3] = [4, 2.5] → [4, 2], e = [0, .5]
    arrived = codec.decode(codec.encode(x, memory, generator()), x)
    assert (arrived.tolist(), memory["error"].tolist()) == ([4, 2], [0, 0.5])
    # a = [4, 3.25] → [4, 4]
    arrived = codec.decode(codec.encode(x, memory, generator()), x)
    assert (arrived.tolist(), memory["error"].tolist()) == ([4, 4], [0, -0.75])


# --- against the slow reference --------------------------------------------------------------------------------------

REFERENCES: list[tuple[Codec, Callable[[Any], Any]]] = [
    (FP4(), reference.fp4),
    (Int8(), reference.int8),
    *((Uniform(b), lambda x, b=b: reference.uniform(x, b)) for b in range(1, 9)),
    *((Statistical(b), lambda x, b=b: reference.statistical(x, b)) for b in range(1, 9)),
]
TOPK_REFERENCES: list[tuple[TopK, tuple[int, int], Callable[[Any], Any] | None]] = [
    (TopK(16, 3), (4, 4), None),
    (TopK(6, 2), (2, 3), None),
    (TopK(5, 5), (1, 5), None),
    (TopK(8, 2, Statistical(2)), (2, 4), lambda x: reference.statistical(x, 2)),
    (TopK(4096, 64, FP4()), (64, 64), reference.fp4),
]


def sample(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Normal numbers with a mean, at a scale that differs from seed to seed."""
    g = generator(seed)
    return ((torch.randn(shape, generator=g, dtype=torch.float64) + 0.3 * (seed % 2)) * 10.0 ** (-seed % 7 - 3)).to(
        dtype
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("codec", "slow"), REFERENCES, ids=lambda c: repr(c) if isinstance(c, Codec) else "")
def test_codecs_agree_with_the_slow_reference(codec, slow, dtype):
    for seed, shape in enumerate([*SHAPES, (40,), (13, 11)]):
        x = sample(shape, dtype, seed)
        wide = x.to(torch.float64 if dtype == torch.float64 else torch.float32)
        expected = torch.tensor(np.array(slow(list(wide.reshape(-1).numpy())), dtype=wide.numpy().dtype)).view(shape)
        if dtype == torch.float64:  # sums differ in the last bit
            torch.testing.assert_close(through(codec, x), expected, rtol=1e-12, atol=1e-18)
        else:
            assert same(through(codec, x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("codec", "block", "values"), TOPK_REFERENCES, ids=lambda c: repr(c) if isinstance(c, Codec) else ""
)
def test_topk_agrees_with_the_slow_reference(codec, block, values, dtype):
    for seed, shape in enumerate([(1,), (7,), (50,), (1, 6), (5, 9), (8, 12), (66, 65), (3, 4, 5), (0, 4), ()]):
        g = generator(seed)
        size = math.prod(shape)  # distinct magnitudes: ties are torch's choice
        x = (torch.randperm(size, generator=g) + 1) * (torch.randint(2, (size,), generator=g) * 2 - 1)
        x = (x.double() / (256 if size <= 256 else 8192)).view(shape)
        if size > 256 and (dtype == torch.bfloat16 or codec.chunk < 4096):  # not distinct there; slow
            continue
        x = x.to(dtype)
        wide = x.to(torch.float64 if dtype == torch.float64 else torch.float32)
        expected = torch.tensor(reference.topk(wide.numpy(), block, codec.k, values))
        if dtype == torch.float64:
            torch.testing.assert_close(through(codec, x), expected, rtol=1e-12, atol=1e-18)
        else:
            assert same(through(codec, x), expected)


@pytest.mark.parametrize("inner", [FP4(), Uniform(3), TopK(16, 3)], ids=repr)
def test_error_feedback_agrees_with_a_loop(inner):
    codec, memory, error = ErrorFeedback(inner, 0.9), {}, np.zeros((5, 9))
    for t in range(5):
        x = sample((5, 9), torch.float64, t)
        total = 0.9 * error + x.numpy()
        if isinstance(inner, TopK):
            decoded = reference.topk(total, (4, 4), 3, None)
        else:
            slow = reference.fp4 if isinstance(inner, FP4) else lambda v: reference.uniform(v, 3)
            decoded = np.array(slow(list(total.reshape(-1)))).reshape(5, 9)
        arrived = codec.decode(codec.encode(x, memory, generator()), x)
        assert arrived.numpy().tobytes() == decoded.tobytes()
        error = total - decoded
        assert memory["error"].numpy().tobytes() == error.tobytes()


@pytest.mark.parametrize("bits", range(1, 17))
def test_packing_against_single_bits(bits):
    for count in [*range(18), 100]:
        codes = torch.randint(2**bits, (count,), generator=generator(count))
        packed = pack(codes, bits)
        assert packed.dtype == torch.uint8
        assert len(packed) == packed_bytes(count, bits)
        assert 0 <= len(packed) - math.ceil(count * bits / 8) <= 2
        assert reference.unpack(packed.tolist(), count, bits) == codes.tolist()
        assert unpack(packed, count, bits).tolist() == codes.tolist()


def test_two_indices_of_twelve_bits_take_three_bytes():
    # the low bytes, then both high halves in one byte
    assert pack(torch.tensor([0xABC, 0x123]), 12).tolist() == [0xBC, 0x23, 0x1A]


# --- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codec", "closed_form"),
    [
        (Identity(), lambda n: 4 * n),
        (Cast(), lambda n: 2 * n),
        (Int8(), lambda n: n + 8),
        (FP4(), lambda n: math.ceil(n / 2) + 2),
        *((Uniform(b), lambda n, b=b: packed_bytes(n, b) + 8) for b in range(1, 9)),
        *((Statistical(b), lambda n, b=b: packed_bytes(n, b) + 4 * 2**b) for b in range(1, 9)),
        (TopK(16, 3), lambda n: sum(3 if n - s >= 3 else n - s for s in range(0, n, 16)) * 4),
        (RandomK(0.25), lambda n: min(n, max(1, round(n / 4))) * 4 + 8),
        (ErrorFeedback(FP4()), lambda n: math.ceil(n / 2) + 2),
    ],
    ids=lambda c: repr(c) if isinstance(c, Codec) else "",
)
def test_bytes_are_the_closed_form(codec, closed_form):
    for n in (0, 1, 2, 15, 16, 17, 33, 1024):
        payload = sent(codec, torch.randn(n, generator=generator()))
        indices = payload.pop("indices", torch.empty(0))
        assert payload_bytes(payload) == closed_form(n)
        assert len(indices) == packed_bytes(closed_form(n) // 4, 4) if isinstance(codec, TopK) else len(indices) == 0


def test_bits_that_fill_bytes_leave_no_gap():
    for bits in range(1, 9):
        assert len(sent(Uniform(bits), torch.randn(64))["codes"]) == 8 * bits


@pytest.mark.parametrize("shape", [(128, 192), (6 * 4096,), (6, 16, 256)])
def test_sparseloco_sends_112_bytes_per_chunk(shape):
    codec = TopK(chunk=4096, k=64, values=Statistical(2))
    payload = sent(codec, torch.randn(shape, generator=generator()))
    # 64 indices of 12 bits and 64 values of 2 bits per chunk; four means per tensor
    assert {n: t.numel() * t.element_size() for n, t in payload.items()} == {
        "indices": 6 * 96,
        "values.codes": 6 * 16,
        "values.means": 16,
    }
    assert payload_bytes(payload) == 6 * 112 + 16
    assert round(4 * 4096 / 112, 2) == 146.29


# --- properties ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", CODECS, ids=repr)
def test_any_shape_and_dtype_comes_back_in_its_shape(codec):
    for shape, dtype in itertools.product(SHAPES, [torch.float32, torch.float64, torch.bfloat16, torch.float16]):
        x, memory = sample(shape, dtype, 1), {}
        before = x.clone()
        for _ in range(2):
            payload = codec.encode(x, memory, generator())
            assert same(x.float(), before.float())
            assert all(
                t.untyped_storage().data_ptr() != x.untyped_storage().data_ptr() for t in payload.values() if t.numel()
            )
            placeholder = x.new_empty(()).expand(shape)
            for like in (x, placeholder, placeholder.to("meta")):
                y = codec.decode(payload, like)
                assert y.shape == x.shape
                assert y.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
                assert y.device == x.device
                assert y.is_contiguous()
            copy = {n: t.clone() for n, t in payload.items()}
            y.fill_(7)
            assert all(torch.equal(copy[n], t) for n, t in payload.items())


@pytest.mark.parametrize("codec", STATELESS, ids=repr)
def test_strides_do_not_matter(codec):
    x = sample((2, 3, 4, 5), torch.float32, 2)
    assert same(through(codec, x.to(memory_format=torch.channels_last)), through(codec, x))
    matrix = sample((6, 9), torch.float32, 2)
    assert same(through(codec, matrix.t().contiguous().t()), through(codec, matrix))
    assert same(through(codec, matrix[:, ::2]), through(codec, matrix[:, ::2].contiguous()))
    expanded = sample((1, 4), torch.float32, 3).expand(3, 4)
    if not isinstance(codec, TopK):  # equal magnitudes: torch's choice
        assert same(through(codec, expanded), through(codec, expanded.contiguous()))
    parameter = torch.nn.Parameter(matrix.clone())
    assert not through(codec, parameter).requires_grad


@pytest.mark.parametrize("codec", [Identity(), TopK(16, 16), TopK(4096, 4096), RandomK(1.0)], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_identity_gives_every_bit_back(codec, dtype):
    for seed, shape in enumerate([*SHAPES, (70, 65)]):
        x = sample(shape, dtype, seed)
        x.view(-1)[:1] = -0.0
        wide = x.to(torch.float64 if dtype == torch.float64 else torch.float32)
        assert same(through(codec, x), wide)
        assert through(codec, x).data_ptr() != x.data_ptr() or not x.numel()
    assert Identity.lossless
    assert not any(type(c).lossless for c in STATELESS[1:])


@pytest.mark.parametrize(
    "codec",
    [
        Identity(),
        Cast("bf16"),
        Cast("fp16"),
        FP4(),
        *map(Uniform, range(1, 9)),
        Statistical(1),  # two bins, split at the mean, which their means keep
        TopK(16, 3),
        TopK(16, 3, FP4()),
        RandomK(0.3),  # with the same seed
    ],
    ids=repr,
)
def test_quantising_twice_changes_nothing(codec):
    for seed in range(30):
        once = through(codec, sample((17, 5), torch.float32, seed))
        twice = through(codec, once)
        if isinstance(codec, Statistical):
            torch.testing.assert_close(twice, once, rtol=1e-6, atol=0)
        else:
            assert torch.equal(twice, once)


@pytest.mark.parametrize(
    "codec", [Identity(), Cast("bf16"), FP4(), TopK(16, 3), TopK(16, 3, FP4()), RandomK(0.3)], ids=repr
)
def test_signs_survive(codec):
    for seed in range(10):
        x = sample((50,), torch.float32, seed)
        y = through(codec, x)
        assert (x * y >= 0).all()
        assert same(through(codec, -x) + 0.0, -y + 0.0)


@pytest.mark.parametrize("codec", STATELESS, ids=repr)
def test_zeros_and_constants(codec):
    assert torch.equal(through(codec, torch.zeros(37)), torch.zeros(37))
    if isinstance(codec, Identity | Int8 | Uniform | Statistical):
        for value in (0.1, -3e-5, 1e30):
            for dtype in (torch.float32, torch.float64):
                x = torch.full((PIECE + 37,), value, dtype=dtype)
                exact = dtype == torch.float32 or not isinstance(codec, Statistical)
                torch.testing.assert_close(through(codec, x), x, rtol=0 if exact else 1e-11, atol=0)  # a sum of 131109


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_statistical_keeps_the_mean(bits):
    for seed in range(5):
        x = sample((1000,), torch.float64, seed)
        assert through(Statistical(bits), x).mean().item() == pytest.approx(x.mean().item(), rel=1e-12)


def test_padding_never_enters_statistics():
    x = sample((6,), torch.float32, 1) + 5  # chunks of 4 and 2
    assert torch.equal(through(TopK(4, 4, Statistical(2)), x), through(Statistical(2), x))
    x = sample((3, 5), torch.float32, 1) + 5
    assert torch.equal(through(TopK(16, 16, Statistical(3)), x), through(Statistical(3), x))


@pytest.mark.slow
@pytest.mark.parametrize("fraction", [0.3, 0.75, 1.0])
def test_randomk_sends_each_element_equally_often(fraction):
    x, draws = torch.ones(10), 1500
    masks = torch.stack([through(RandomK(fraction), x, seed) for seed in range(draws)])
    count = round(10 * fraction)
    assert (masks.sum(1) == count).all()
    p = count / 10
    assert ((masks.mean(0) - p).abs() < 5 * math.sqrt(p * (1 - p) / draws) + 1e-9).all()
    assert torch.equal(through(RandomK(fraction), x, 3), through(RandomK(fraction), x, 3))


def test_randomk_draws_from_the_generator():
    x, g = torch.ones(1000), generator()
    first, second = (RandomK(0.1).encode(x, {}, g) for _ in range(2))
    assert first["seed"].item() != second["seed"].item()
    assert set(first) == {"seed", "values"}
    assert RandomK(0.1).decode(first, x).sum() == 100


@pytest.mark.parametrize("inner", STATELESS, ids=repr)
def test_error_feedback_telescopes(inner):
    codec, memory, g = ErrorFeedback(inner, decay=1.0), {}, generator()
    total = arrived = torch.zeros(9, 7, dtype=torch.float64)
    for t in range(20):
        x = torch.randn(9, 7, generator=generator(t), dtype=torch.float64)
        total = total + x
        arrived = arrived + codec.decode(codec.encode(x, memory, g), x)
    torch.testing.assert_close(arrived + memory["error"], total, rtol=0, atol=1e-12)


def test_error_feedback_accumulates_in_float32():
    # Top-1 always sends the 256; the small element waits. In bfloat16 its sum would stop at 256 · 2^-9.
    codec, memory = ErrorFeedback(TopK(4, 1), decay=1.0), {}
    x = torch.tensor([256, 2.0**-9, 0, 0], dtype=torch.bfloat16)
    for _ in range(300):
        codec.encode(x, memory, generator())
    assert memory["error"].dtype == torch.float32
    assert memory["error"].tolist() == [0, 300 * 2.0**-9, 0, 0]
    memory = {}
    codec.encode(x.double(), memory, generator())
    assert memory["error"].dtype == torch.float64


def test_error_feedback_brings_two_bits_closer():
    x = sample((1000,), torch.float64, 0)
    codec, memory, arrived = ErrorFeedback(Statistical(2), 1.0), {}, torch.zeros(1000, dtype=torch.float64)
    for _ in range(20):
        arrived += codec.decode(codec.encode(x, memory, generator()), x) / 20
    assert (arrived - x).norm() < 0.2 * (through(Statistical(2), x) - x).norm()


@pytest.mark.parametrize("codec", [Int8(), FP4(), Uniform(3), Statistical(2), TopK(16, 3, FP4())], ids=repr)
def test_half_types_are_computed_in_float32(codec):
    x = sample((64,), torch.bfloat16, 1)
    assert same(through(codec, x), through(codec, x.float()))
    assert payload_bytes(sent(codec, x)) == payload_bytes(sent(codec, x.float()))


@pytest.mark.parametrize("codec", [Int8(), FP4(), Uniform(2), Statistical(2), TopK(values=Statistical(2))], ids=repr)
def test_pieces_and_threads_do_not_change_a_bit(codec):
    x = sample((600, 601), torch.float64, 1) + 0.1  # several pieces; float32 would round differences away
    threads = torch.get_num_threads()
    try:
        payloads = []
        for n in (1, 3):
            torch.set_num_threads(n)
            payloads.append(sent(codec, x))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(t, payloads[1][n]) for n, t in payloads[0].items())


def test_moments_do_not_depend_on_threads():
    tensors = [torch.randn(PIECE, generator=generator(seed), dtype=torch.float64) + 0.3 for seed in range(10)]
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append([mean_and_sigma(x) for x in tensors])
    finally:
        torch.set_num_threads(threads)
    assert results[0] == results[1] == results[2]


def test_long_tensors_agree_with_short_ones():
    x = sample((3 * PIECE + 5,), torch.float32, 1)
    x[0], x[1] = -1e4, 1e4
    for codec in (FP4(), Uniform(5)):  # elementwise once the ends are known
        tail = torch.cat([x[:2], x[-100:]])
        assert torch.equal(through(codec, x)[-100:], through(codec, tail)[2:])
    mean, sigma = x.double().mean().item(), x.double().std(correction=0).item()
    payload = sent(Int8(), x)
    assert payload["mean"].item() == pytest.approx(mean, rel=1e-6)
    assert payload["scale"].item() == pytest.approx(12 * sigma / 256, rel=1e-6)
    means = sent(Statistical(2), x)["means"].double()
    edges = [-math.inf, mean - 1.5 * sigma, mean, mean + 1.5 * sigma, math.inf]
    for i in range(4):
        members = x.double()[(x >= edges[i]) & (x < edges[i + 1])]
        assert means[i].item() == pytest.approx(members.mean().item(), rel=1e-4)


@pytest.mark.parametrize("codec", CODECS, ids=repr)
def test_numbers_that_are_not_finite_end_normally(codec):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        largest = torch.finfo(dtype).max
        for bad in ([math.nan], [math.inf], [-math.inf, math.inf], [math.nan, -math.inf], [largest, -largest]):
            x = torch.cat([torch.tensor(bad, dtype=dtype), torch.ones(20, dtype=dtype)])
            assert through(codec, x).shape == x.shape


# --- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", CODECS, ids=repr)
def test_only_real_numbers(codec):
    memory: dict[str, Tensor] = {}
    for dtype in (torch.complex64, torch.int32, torch.bool):
        text = f"{codec!r} was given a tensor of {dtype}. Codecs compress real floating-point tensors."
        with pytest.raises(TypeError, match=re.escape(text)):
            codec.encode(torch.ones(3, dtype=dtype), memory, generator())
    assert memory == {}


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda: Cast("fp8"),
            "Cast: `dtype` (='fp8') must be 'bf16' or 'fp16'. For fewer bits use Int8, FP4, Uniform or",
        ),
        (lambda: Uniform(0), "Uniform: `bits` (=0) must be an integer from 1 to 8. For more bits use Cast."),
        (lambda: Uniform(True), "Uniform: `bits` (=True) must be an integer from 1 to 8."),
        (lambda: Statistical(9), "Statistical: `bits` (=9) must be an integer from 1 to 8. For more bits use Cast."),
        (lambda: Statistical(2.0), "Statistical: `bits` (=2.0) must be an integer from 1 to 8."),
        (lambda: TopK(1, 1), "TopK: `chunk` (=1) must be an integer ≥ 2. SparseLoCo uses 4096."),
        (lambda: TopK(8, 9), "TopK: `k` (=9) must be an integer from 1 to 8. A chunk has 8 elements (`chunk`)."),
        (lambda: TopK(8, 0), "TopK: `k` (=0) must be an integer from 1 to 8."),
        (
            lambda: TopK(values="fp4"),
            "TopK: `values` (='fp4') must be a codec, or None to send the values as they are.",
        ),
        (lambda: TopK(values=ErrorFeedback(FP4())), "Wrap the whole codec: ErrorFeedback(TopK(…))."),
        (lambda: RandomK(values=ErrorFeedback(FP4())), "Wrap the whole codec: ErrorFeedback(RandomK(…))."),
        (
            lambda: RandomK(0),
            "RandomK: `fraction` (=0) must be a number in (0, 1]: the part of the elements that is sent.",
        ),
        (lambda: RandomK(1.5), "RandomK: `fraction` (=1.5) must be a number in (0, 1]"),
        (
            lambda: ErrorFeedback("fp4"),
            "ErrorFeedback: `codec` (='fp4') must be a codec. Give an object, for example FP4().",
        ),
        (
            lambda: ErrorFeedback(ErrorFeedback(FP4())),
            "must not keep errors itself. One ErrorFeedback, around all, is enough.",
        ),
        (
            lambda: ErrorFeedback(FP4(), 0),
            "`decay` (=0) must be a number in (0, 1]: the part of the error that is kept.",
        ),
        (lambda: ErrorFeedback(FP4(), 1.01), "Without error feedback use FP4() itself."),
        (lambda: ErrorFeedback(FP4(), math.nan), "ErrorFeedback: `decay` (=nan) must be a number in (0, 1]"),
    ],
)
def test_wrong_arguments_are_named(make, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        make()


def test_codecs_are_values():
    codec = ErrorFeedback(TopK(4096, 64, values=Statistical(2)), decay=0.9)
    text = "ErrorFeedback(codec=TopK(chunk=4096, k=64, values=Statistical(bits=2)), decay=0.9)"
    assert repr(codec) == text
    assert eval(text) == codec
    assert hash(eval(text)) == hash(codec)
    assert len({repr(c) for c in CODECS}) == len(CODECS)
    with pytest.raises(AttributeError):
        codec.decay = 1.0  # type: ignore[misc]


@pytest.mark.parametrize("codec", CODECS, ids=repr)
def test_yaml_nests_codecs(codec):
    jsonargparse = pytest.importorskip("jsonargparse")

    def plain(value: Any) -> Any:
        if not isinstance(value, Codec):
            return value
        path = f"lightning_diloco.codecs.{type(value).__name__}"
        arguments = {n: plain(v) for n, v in vars(value).items()}
        return {"class_path": path, "init_args": arguments} if arguments else {"class_path": path}

    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--codec", type=Codec)
    text = parser.dump(parser.parse_object({"codec": plain(codec)}))
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # the latter in older versions
    assert instantiate(parser.parse_string(text)).codec == codec


def test_codecs_import_torch_alone():
    for path in Path(lightning_diloco.codecs.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or "."] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                allowed = {"abc", "collections", "dataclasses", "math", "torch", "typing", "typing_extensions"}
                assert name.split(".")[0] in allowed or name.startswith("lightning_diloco.codecs"), (path, name)


def test_every_codec_names_tests_that_exist():
    here = Path(__file__).read_text(encoding="utf-8")
    for name in lightning_diloco.codecs.__all__:
        item = getattr(lightning_diloco.codecs, name)
        if isinstance(item, type) and issubclass(item, Codec) and item is not Codec:
            proofs = re.findall(r"::(test_\w+)", item.__doc__ or "")
            assert proofs, name
            assert all(f"def {proof}(" in here for proof in proofs), name


# --- the cosine transform --------------------------------------------------------------------------------------------


DCT_SHAPES = [(12,), (7,), (1,), (8, 6), (5, 7), (4, 3, 2), (1, 9), (), (0,), (0, 4), (3, 0)]


@pytest.mark.parametrize("shape", DCT_SHAPES, ids=str)
@pytest.mark.parametrize(("chunk", "k"), [(4, 3), (1, 1), (3, 100), (64, 2)])
def test_dct_agrees_with_the_slow_one(shape: tuple[int, ...], chunk: int, k: int) -> None:
    torch.manual_seed(sum(shape))
    x = torch.randn(shape, dtype=torch.float64)
    codec = DCT(chunk, k)
    payload = codec.encode(x, {}, generator())
    decoded = codec.decode(payload, x)
    if x.numel():
        torch.testing.assert_close(decoded, cosines(x, chunk, k), rtol=0, atol=1e-12)
    assert decoded.shape == x.shape
    if k == 100:  # all coefficients: nothing is lost
        torch.testing.assert_close(decoded, x, rtol=0, atol=1e-12)
    again = codec.decode(codec.encode(decoded, {}, generator()), x)
    torch.testing.assert_close(again, decoded, rtol=0, atol=1e-12)


def test_dct_by_hand() -> None:
    """Of (1, 3) the orthonormal coefficients are 4/√2 and −2/√2; the larger alone is the mean of both."""
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.tensor([1.0, 3.0], dtype=dtype)
        assert DCT(2, 1).decode(DCT(2, 1).encode(x, {}, generator()), x).tolist() == pytest.approx([2.0, 2.0], rel=1e-2)
    with pytest.raises(TypeError, match="real floating-point"):
        DCT().encode(torch.ones(2, dtype=torch.complex64), {}, generator())
    with pytest.raises(ValueError, match=r"^DCT: `chunk` \(=0\)"):
        DCT(0)
    with pytest.raises(ValueError, match=r"^DCT: `values` \(=ErrorFeedback.*\) must not keep an error"):
        DCT(values=ErrorFeedback(FP4()))


def test_dct_sends_an_index_of_twelve_bits_per_coefficient() -> None:
    """Two blocks of 64 × 64 send 32 coefficients each: four bytes for a value, twelve bits for an index."""
    payload = DCT().encode(torch.randn(64, 128), {}, generator())
    assert payload_bytes(payload) == 2 * 32 * 4 + 2 * 32 * 12 // 8
    quarter = DCT(values=FP4()).encode(torch.randn(64, 128), {}, generator())
    assert payload_bytes(quarter) == 2 * 32 // 2 + 2 + 2 * 32 * 12 // 8
