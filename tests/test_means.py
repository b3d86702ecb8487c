"""Is the mean exact where all tensors are equal, and taken in pieces of bounded size?"""

import itertools
import math
from typing import Any

import pytest
import torch
from helpers import Net, assert_same, copy_of, loader, regression_data, trainer
from observers import Track
from torch import Tensor, nn

from lightning_diloco import DilocoStrategy
from lightning_diloco.comm import means
from lightning_diloco.comm.channel import Channel
from lightning_diloco.comm.likeness import inner_products
from lightning_diloco.comm.means import Differences, mean_of
from lightning_diloco.comm.statistics import MeanStatistics, all_finite, euclidean_norm, lengths, norm_and_cosine
from lightning_diloco.comm.tensors import bitwise_equal, flat
from lightning_diloco.comm.world import World


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 6, 7, 8])
def test_the_mean_of_identical_tensors_is_the_tensor(count, dtype):
    """x_0 + (Σ_{i>0}(x_i − x_0))/N: exact when all are equal; a plain sum / N is not, for N = 3, 5, 6, 7."""
    x = (torch.randn(1000, dtype=torch.complex64 if dtype.is_complex else torch.float64) * 100).to(dtype)
    tensors = [x.clone() for _ in range(count)]
    accumulated = torch.float32 if dtype.itemsize == 2 else dtype
    for weights in (None, [1.0] * count, [0.1 * (i + 1) for i in range(count)], [0.0] * (count - 1) + [0.3]):
        mean = mean_of(tensors, weights)
        assert mean.dtype == accumulated
        assert torch.equal(mean, x.to(accumulated))
        assert mean.untyped_storage().data_ptr() not in {t.untyped_storage().data_ptr() for t in tensors}
    assert all(torch.equal(t, x) for t in tensors)


def test_the_mean_of_identical_infinities_is_the_infinity():
    """Attention masks hold −inf, running extrema start at ±inf."""
    x = torch.tensor([0.0, -torch.inf, torch.inf])
    assert torch.equal(mean_of([x, x.clone(), x.clone()]), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_mean_of_whole_numbers(dtype):
    """(1 + 4 + 7)/3 = 4; with the weights 1, 2, 1 (also as 3, 6, 3): (1 + 8 + 7)/4 = 4, with 1, 0, 2: 15/3 = 5."""
    tensors = [torch.tensor([x, -x, 10 * x], dtype=dtype) for x in (1.0, 4.0, 7.0)]

    def mean(weights: list[float] | None = None) -> list[float]:
        return mean_of(tensors, weights).tolist()

    assert mean() == mean([1, 1, 1]) == mean([0.5, 0.5, 0.5]) == [4, -4, 40]
    assert mean([1, 2, 1]) == mean([3, 6, 3]) == [4, -4, 40]
    assert mean([1, 0, 2]) == [5, -5, 50]
    assert mean([0, 0, 1]) == [7, -7, 70]
    assert mean([1, 0, 0]) == [1, -1, 10]


def test_a_mean_is_taken_in_pieces_of_bounded_size(monkeypatch):
    """All workers' pseudo-gradients at once would be N more models in memory."""

    class Look(MeanStatistics):
        def add_rows(self, name, start, rows):
            seen.append((*name, start, len(rows[0])))

    def tensors(seed):
        generator = torch.Generator().manual_seed(seed)
        shapes = {"a": (5, 3), "few": (2,), "none": (0, 4), "scalar": ()}
        real = {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}
        return real | {"complex": torch.randn(2, 2, generator=generator, dtype=torch.complex128).T}

    seen, reads, flattened = [], [], []
    theta, held = tensors(9), {w: tensors(w) for w in range(3)}
    names = list(theta)
    over = Channel(World(3), lambda: 0)
    differences = {n: [theta[n] - held[w][n] for w in range(3)] for n in names}
    pairs = [torch.view_as_real(d) for d in differences.pop("complex")]  # so that no layout divides complex numbers
    whole = {n: mean_of(d, [1, 2, 3]) for n, d in differences.items()}
    whole["complex"] = torch.view_as_complex(mean_of(pairs, [1, 2, 3]).contiguous())
    monkeypatch.setattr(means, "PIECE", 4)
    monkeypatch.setattr(means, "SMALL", 0)
    monkeypatch.delattr(Differences, "__getitem__")  # nobody asks for a whole one
    monkeypatch.setattr(Differences, "__abstractmethods__", frozenset())
    monkeypatch.setattr(means, "flat", lambda tensor: flattened.append(tensor) or flat(tensor))
    mean = over.mean(
        names, lambda w: reads.append(w) or Differences(names, theta, held[w]), weights=[1, 2, 3], statistics=Look()
    )
    assert reads == [0, 1, 2]  # each worker is asked once
    assert len(flattened) == 2 * 3 * len(names)  # once each: flattening may copy
    assert_same(mean, whole)
    assert mean["complex"].shape == (2, 2)
    assert seen[:5] == [("a", 0, 4), ("a", 4, 4), ("a", 8, 4), ("a", 12, 3), ("few", 0, 2)]
    assert seen[5:] == [("scalar", 0, 1), ("complex", 0, 4), ("complex", 4, 4)]


@pytest.mark.parametrize("origin", [False, True])
def test_the_rows_of_a_piece_do_not_begin_a_power_of_two_apart(origin, monkeypatch):
    """Else they fall into the same few sets of the processor's cache, and push each other out."""
    seen = []
    products = MeanStatistics._products
    monkeypatch.setattr(
        MeanStatistics, "_products", lambda self, rows: seen.append(rows.stride(0)) or products(self, rows)
    )
    theta, workers = {"w": torch.randn(200_000)}, 16
    replicas = [{"w": torch.randn(200_000)} for _ in range(workers)]

    def read(worker):
        return replicas[worker] if origin else Differences(["w"], theta, replicas[worker])

    Channel(World(workers), lambda: 0).mean(["w"], read, statistics=MeanStatistics(theta if origin else None))
    assert len(seen) > 4
    assert all(stride % 512 for stride in seen)


@pytest.mark.parametrize("origin", [False, True])
def test_small_tensors_that_are_averaged_together_keep_their_bits(origin, monkeypatch):
    """Names, shapes and order, too; what is measured is the same up to the order of sums."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"w": (40, 9), "b": (9,), "none": (0, 2), "s": (), "large": (99, 99), "half": (5,), "z": (3,)}
    kinds = {"half": torch.bfloat16, "z": torch.complex64}

    def tensors():
        made = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
        return {n: t.to(kinds.get(n, t.dtype)) for n, t in made.items()}

    theta, held = tensors(), [tensors() for _ in range(3)]
    read = held.__getitem__ if origin else lambda w: Differences(list(shapes), theta, held[w])
    results = []
    for small in (0, 400):
        monkeypatch.setattr(means, "SMALL", small)
        statistics = MeanStatistics(theta if origin else None)
        mean = Channel(World(3), lambda: 0).mean(shapes, read, weights=[1, 2, 3], statistics=statistics)
        results.append((mean, norm_and_cosine([statistics.parts()]), lengths([statistics.parts()])))
    (one_by_one, *apart), (joined, *together) = results
    assert list(joined) == list(shapes)
    assert_same(joined, one_by_one)
    assert [tuple(t.shape) for t in joined.values()] == list(shapes.values())
    for a, b in zip(apart, together, strict=True):
        assert a == pytest.approx(b, rel=1e-6)


def test_half_types_are_accumulated_in_float32():
    """1 and its neighbour in bfloat16, 1 + 2^-7: the mean of three lies between them, where bfloat16 has nothing."""
    one, next_to_one = torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([1 + 2**-7], dtype=torch.bfloat16)
    assert mean_of([one, one, next_to_one]).item() == pytest.approx(1 + 2**-7 / 3, abs=1e-7)


class Constant(Net):
    """Random numbers and a causal mask as buffers, and as frozen parameters."""

    names = ("rotary", "mask", "frozen", "frozen_mask")

    def __init__(self) -> None:
        super().__init__()
        mask = torch.full((3, 3), -torch.inf).triu(1)
        self.register_buffer("rotary", torch.randn(100))
        self.register_buffer("mask", mask)
        self.frozen = nn.Parameter(torch.randn(100), requires_grad=False)
        self.frozen_mask = nn.Parameter(mask.clone(), requires_grad=False)
        self.validated: list[dict[str, Tensor]] = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated.append(copy_of(self.state_dict()))


@pytest.mark.parametrize("eval_weights", ["average", "outer", "worker"])
def test_what_all_workers_hold_alike_is_left_alone(eval_weights):
    """Tensors bitwise equal on all workers are left alone (else frozen weights and rotary tables would drift)."""
    track, module = Track(), Constant()
    start = copy_of(module.state_dict())
    strategy = DilocoStrategy(3, 2, eval_weights=eval_weights)
    t = trainer(strategy, max_epochs=1, callbacks=[track], num_sanity_val_steps=0, val_check_interval=1)
    t.fit(module, loader(regression_data(36)), loader(regression_data(4), shuffle=False))
    assert len(track.theta) == len(module.validated) == 3
    states = [*track.theta, *track.module, *itertools.chain(*track.workers), copy_of(module.state_dict())]
    for state in [*states, *module.validated]:
        for name in Constant.names:
            assert torch.equal(state[name], start[name]), name


def test_signed_zeros_do_not_depend_on_their_neighbours():
    """A layout cuts other pieces, hence an infinity elsewhere in the piece must not change a bit."""
    tensors = [torch.tensor([-0.0, 0.0, -0.0]), torch.tensor([0.0, -0.0, -0.0])]
    beside = [torch.cat([t, torch.tensor([torch.inf])]) for t in tensors]
    assert bitwise_equal(mean_of(beside)[:3], mean_of(tensors))


def formula(tensors, weights=None):
    """``x_0 + (Σ_{i>0} (x_i − x_0)) / N`` as it is written, with equal elements hidden from ∞ − ∞."""
    first = tensors[0].to(torch.float32 if tensors[0].itemsize < 4 else tensors[0].dtype)
    shift = torch.zeros_like(first)
    for i, tensor in enumerate(tensors[1:], start=1):
        tensor = tensor.to(first.dtype)
        difference = torch.where(tensor == first, 0, tensor - first)
        shift = shift + (difference if weights is None else difference * weights[i])
    mean = first + shift / (len(tensors) if weights is None else sum(weights))
    return torch.where(mean == first, first, mean)


@pytest.mark.parametrize("weights", [None, [1, 2, 3, 0, 4, 5, 6]])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("special", [[], [float("inf")], [float("-inf"), float("inf")], [float("nan")]])
def test_the_mean_is_its_formula_to_the_bit_in_every_piece(monkeypatch, special, dtype, weights):
    monkeypatch.setattr(means, "PIECE", 16)
    generator = torch.Generator().manual_seed(3)
    tensors = [torch.randn(5, 11, generator=generator).to(dtype).T for _ in range(7)]
    for i, tensor in enumerate(tensors):
        tensor[0, :3] = torch.tensor([-0.0, 0.0, 1.0])  # the same for all
        if special:
            tensor[3, 2] = special[0]  # all
            tensor[7, 1] = special[i % len(special)]  # all, or some of each sign
            tensor[9, 4] = special[0] if i == 2 else 0.5  # one
    mean, expected = mean_of(tensors, weights), formula(tensors, weights)
    assert bitwise_equal(mean.nan_to_num(nan=0.0), expected.nan_to_num(nan=0.0))
    assert torch.equal(mean.isnan(), expected.isnan())
    assert str(mean[0, 0].item()) == "-0.0"


def test_norms_and_products_survive_squares_that_float32_cannot_hold():
    for scale, shape in itertools.product((1e30, 1e-30), ((3, 2), (300, 2))):
        size = math.sqrt(shape[0] * shape[1])
        theta, replica = {"a": torch.zeros(shape)}, {"a": torch.full(shape, -3 * scale)}
        norm = euclidean_norm(Differences(["a"], theta, replica), ["a"])
        assert norm == pytest.approx(3 * scale * size, rel=1e-7, abs=0)
        held = [{"a": torch.full(shape, 3 * scale)}, {"a": torch.full(shape, scale)}]
        statistics = MeanStatistics()
        Channel(World(2), lambda: 0).mean(["a"], held.__getitem__, statistics=statistics)
        found, cosine = norm_and_cosine([statistics.parts()])
        assert found == pytest.approx(2 * scale * size, rel=1e-7, abs=0)
        assert cosine == pytest.approx(1.0)
        assert lengths([statistics.parts()]) == pytest.approx([3 * scale * size, scale * size], rel=1e-6, abs=0)


def test_the_length_of_a_tiny_row_beside_a_large_one():
    statistics = MeanStatistics()
    statistics.add_rows("x", 0, torch.stack([torch.full((512,), 1e-25), torch.ones(512)]))
    assert lengths([statistics.parts()]) == pytest.approx([1e-25 * math.sqrt(512), math.sqrt(512)], rel=1e-6, abs=0)


@pytest.mark.parametrize("origin", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["random", "equal", "signs", "opposite"])
def test_statistics_are_those_of_float64(kind, dtype, origin):
    generator = torch.Generator().manual_seed(2)

    def tensor(size):
        if kind == "equal":
            return torch.full((size,), float(torch.rand((), generator=generator)), dtype=torch.float64)
        values = torch.randn(size, generator=generator, dtype=torch.float64)
        return values.sign() * 0.3 if kind == "signs" else values

    sizes = {"large": 200_003, "small": 7, "none": 0, "row": 1024}
    theta = {n: torch.randn(s, generator=generator).to(dtype) for n, s in sizes.items()}
    held = [{n: (theta[n] - 0.1 * tensor(s)).to(dtype) for n, s in sizes.items()} for _ in range(3)]
    if kind == "opposite":
        held[1] = {n: (2 * t - held[0][n]).to(dtype) for n, t in theta.items()}
    statistics = MeanStatistics(theta if origin else None)
    channel = Channel(World(3), lambda: 0)
    read = held.__getitem__ if origin else lambda w: Differences(list(sizes), theta, held[w])
    mean = channel.mean(sizes, read, statistics=statistics)

    def measured(tensors):
        exact = torch.cat([tensors[n].double() for n in sizes])
        return torch.cat([theta[n].double() for n in sizes]) - exact if origin else exact

    whole, rows = measured(mean), torch.stack([measured(read(w)) for w in range(3)])
    norm, cosine = norm_and_cosine([statistics.parts()])
    units = rows / rows.norm(dim=1, keepdim=True)
    products = units @ units.T
    precision = 1e-12 if dtype is torch.float64 else 2e-6
    assert norm == pytest.approx(whole.norm().item(), rel=precision)
    assert cosine == pytest.approx((products.sum() - products.trace()).item() / 6, abs=precision)
    assert lengths([statistics.parts()]) == pytest.approx(rows.norm(dim=1).tolist(), rel=precision)
    assert all(p.dtype == torch.float64 for p in statistics.products.values())
    for w in range(3):
        exact = torch.cat([read(w)[n].double() for n in sizes]).norm().item()
        assert euclidean_norm(read(w), sizes) == pytest.approx(exact, rel=precision)


def test_the_worst_blocks_of_equal_values_stay_within_the_accuracy():
    for count in (2, 4, 7, 16):
        values = torch.rand(count, 1, generator=torch.Generator().manual_seed(count))
        for scale in torch.linspace(0.5, 1.0, 20):
            rows = (values * scale).expand(count, 8192).contiguous()
            statistics = MeanStatistics()
            statistics.add_rows("x", 0, rows)
            exact = rows.double().norm(dim=1).tolist()
            assert lengths([statistics.parts()]) == pytest.approx(exact, rel=2e-6)


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whether_all_are_finite(dtype, monkeypatch):
    monkeypatch.setattr(means, "PIECE", 16)
    largest = torch.finfo(dtype).max
    for size in (1, 16, 100):
        good = {
            "a": torch.full((size,), largest, dtype=dtype),
            "none": torch.empty(0, dtype=dtype),
            "n": torch.ones(3).int(),
        }
        assert all_finite(good, good)  # though their sum is not
        assert all_finite(Differences(["a"], good, {"a": torch.zeros_like(good["a"])}), ["a"])
        assert not all_finite(Differences(["a"], good, {"a": -good["a"]}), ["a"])  # both are finite
        for bad in (math.inf, -math.inf, math.nan):
            good["a"][size - 1] = bad
            assert not all_finite(good, ["a"])
            assert all_finite(good, ["none", "n"])
            assert not all_finite(Differences(["a"], good, good), ["a"])  # ∞ − ∞
            good["a"][size - 1] = 0


def test_nan_and_infinity_propagate_into_statistics():
    held = [{"a": torch.ones(300)}, {"a": torch.ones(300)}]
    for bad in (math.nan, math.inf):
        held[1]["a"][7] = bad
        statistics = MeanStatistics()
        Channel(World(2), lambda: 0).mean(["a"], held.__getitem__, statistics=statistics)
        norm, _ = norm_and_cosine([statistics.parts()])
        first, second = lengths([statistics.parts()])
        assert first == pytest.approx(math.sqrt(300))
        assert not math.isfinite(norm)
        assert not math.isfinite(second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("scales", [(1.0, 1.0), (1e-21, 1e-3), (3e18, 1e16), (0.0, 1.0), (float("nan"), 1.0)], ids=str)
@pytest.mark.parametrize("equal", [True, False])
def test_inner_products_of_two_tensors(dtype: torch.dtype, scales: tuple[float, float], equal: bool) -> None:
    """Over several pieces; also where squares leave the range of float32, and where all elements are equal."""
    size, generator = 200_001, torch.Generator().manual_seed(2)
    x, y, z = (
        scale * (torch.full((size,), 1.1) if equal else torch.randn(size, generator=generator)).to(dtype)
        for scale in (*scales, scales[1])
    )
    found = inner_products({"a": x}, Differences(["a"], {"a": 3 * y}, {"a": z}), "a")
    a, b = x.double(), (3 * y - z).double()
    scale = float(a.norm() * b.norm())
    precision = 1e-12 if dtype is torch.float64 else 2e-6
    assert found[0] == pytest.approx(float(a @ a), rel=precision, abs=0, nan_ok=True)
    assert found[1] == pytest.approx(float(a @ b), abs=precision * scale, nan_ok=True)
    assert found[2] == pytest.approx(float(b @ b), rel=precision, abs=0)
