"""Is a coded mean what its codec and the formula say, bit for bit, in every layout of workers over processes?"""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import slow_but
from processes import run
from torch import Tensor

from lightning_diloco.codecs import FP4, Cast, Codec, ErrorFeedback, Identity, Int8, RandomK, Statistical, TopK
from lightning_diloco.codecs.base import payload_bytes
from lightning_diloco.comm import means
from lightning_diloco.comm.channel import Channel
from lightning_diloco.comm.means import Differences, mean_of
from lightning_diloco.comm.statistics import MeanStatistics, lengths, norm_and_cosine
from lightning_diloco.comm.tensors import bitwise_equal
from lightning_diloco.comm.world import World

SHAPES = {"embedding": (19, 8), "scalar": (), "none": (0, 4), "matrix": (8, 24), "bias": (3,)}
CODECS: list[Codec] = [
    Identity(), Cast(), Int8(), FP4(), ErrorFeedback(FP4(), 0.9), ErrorFeedback(Statistical(2)), TopK(16, 3),
    ErrorFeedback(TopK(16, 3, Statistical(2))), ErrorFeedback(RandomK(0.2)), RandomK(0.5),
]  # fmt: skip


CROSSING: list[Codec] = [ErrorFeedback(FP4(), 0.9), ErrorFeedback(RandomK(0.3, Statistical(2)))]


def models(count: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {n: torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for n, s in SHAPES.items()}
        for _ in range(count)
    ]


class Run:
    """Several coded means one after the other, with the memory and the random numbers of every worker."""

    def __init__(self, codec: Codec, workers: Sequence[int]) -> None:
        self.codec = codec
        self.memory: dict[tuple[int, str], dict[str, Tensor]] = {}
        self.generators = {w: torch.Generator().manual_seed(100 + w) for w in workers}

    def memory_of(self, worker: int, name: str) -> dict[str, Tensor]:
        return self.memory.setdefault((worker, name), {})


def by_the_book(
    run: Run, held: Sequence[Mapping[str, Tensor]], workers: Sequence[int], weights: Mapping[int, float] | None = None
) -> tuple[dict[str, Tensor], int, dict[str, list[Tensor]]]:
    """Everything decoded, then the mean by its formula."""
    sent, result, rows = dict.fromkeys(workers, 0), {}, {}
    for name in SHAPES:
        decoded = []
        for w in sorted(workers):
            x = held[w][name]
            payload = run.codec.encode(x, run.memory_of(w, name), run.generators[w])
            sent[w] += payload_bytes(payload)
            decoded.append(run.codec.decode(payload, x))
        rows[name] = decoded
        shift = torch.zeros_like(decoded[0])
        for w, x in list(zip(sorted(workers), decoded, strict=True))[1:]:
            shift = shift + (x - decoded[0]) * (1 if weights is None else weights[w])
        total = len(workers) if weights is None else sum(weights.values())
        result[name] = decoded[0] + shift / total
    return result, max(sent.values()), rows


def assert_same_bits(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape
        assert found[name].dtype == tensor.dtype
        assert bitwise_equal(found[name] + 0.0, tensor + 0.0), name  # the formula as it is written loses the sign of 0


def check_statistics(parts: Sequence[Any], rows: Mapping[str, list[Tensor]], mean: Mapping[str, Tensor]) -> None:
    matrix = torch.stack(
        [torch.cat([row[i].double().view(-1) for row in rows.values()]) for i in range(len(rows["bias"]))]
    )
    norm, cosine = norm_and_cosine(parts)
    norms = matrix.norm(dim=1)
    assert lengths(parts) == pytest.approx(norms.tolist(), rel=1e-6)
    assert norm == pytest.approx(torch.cat([t.double().view(-1) for t in mean.values()]).norm().item(), rel=1e-6)
    if len(matrix) == 1:
        assert cosine is None
    else:
        cosines = (matrix @ matrix.T) / norms / norms[:, None]
        off = cosines[~torch.eye(len(matrix), dtype=torch.bool)]
        assert cosine == pytest.approx(off.mean().item(), abs=1e-6)


@pytest.mark.parametrize("held_back", [False, True], ids=["all decoded", "one by one"])
@pytest.mark.parametrize("dtype", slow_but([torch.float32], [torch.bfloat16, torch.float32, torch.float64]), ids=str)
@pytest.mark.parametrize("codec", CODECS, ids=repr)
def test_in_one_process(codec: Codec, dtype: torch.dtype, held_back: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_diloco.comm.channel._HELD", -0.3 if held_back else 100.0)
    monkeypatch.setattr(means, "PIECE", 16)
    ours, book = Run(codec, range(5)), Run(codec, range(5))
    channel = Channel(World(5), lambda: 0)
    for seed, (workers, weights) in enumerate(
        [(None, None), ([4, 0, 2], None), ([3, 1, 2], {3: 1.0, 1: 5.0, 2: 2.5}), ([2], None), (None, None)]
    ):
        held = models(5, dtype, seed)
        statistics = MeanStatistics()
        found, sent = channel.coded_mean(
            SHAPES, held.__getitem__, codec, ours.memory_of, ours.generators.__getitem__, workers,
            None if weights is None else list(weights.values()), statistics=statistics,
        )  # fmt: skip
        expected, expected_sent, rows = by_the_book(book, held, workers or range(5), weights)
        assert_same_bits(found, expected)
        assert sent == expected_sent
        check_statistics([statistics.parts()], rows, expected)
    assert ours.memory.keys() == book.memory.keys()
    for key, memory in book.memory.items():
        for name, tensor in memory.items():
            assert bitwise_equal(ours.memory[key][name], tensor)
    assert not channel.ledger.entries


def test_without_statistics_or_with_equal_infinities(monkeypatch: pytest.MonkeyPatch) -> None:
    signed = [torch.tensor([-0.0, 0.0]), torch.tensor([0.0, -0.0])]
    held = [{"x": torch.tensor([-0.0, 1.0 + w, -torch.inf, torch.inf if w else 5.0])} for w in range(3)]
    for most in (-1.0, 100.0):
        monkeypatch.setattr("lightning_diloco.comm.channel._HELD", most)
        state = Run(Identity(), range(3))
        mean, sent = Channel(World(3), lambda: 0).coded_mean(
            ["x"], held.__getitem__, Identity(), state.memory_of, state.generators.__getitem__
        )
        assert mean["x"].tolist() == [0.0, 2.0, -torch.inf, torch.inf]
        assert str(mean["x"][0].item()) == "-0.0"
        assert sent == 16
        beside = [{"x": torch.cat([t, torch.tensor([torch.inf])])} for t in signed]
        mean, _ = Channel(World(2), lambda: 0).coded_mean(
            ["x"], beside.__getitem__, Identity(), state.memory_of, state.generators.__getitem__
        )
        assert bitwise_equal(mean["x"][:2], mean_of(signed))


def test_the_dense_mean_is_that_of_identity() -> None:
    theta, held = models(1)[0], models(6, seed=1)

    def read(worker: int) -> Mapping[str, Tensor]:
        return Differences(list(SHAPES), theta, held[worker])

    state, channel = Run(Identity(), range(6)), Channel(World(6), lambda: 0)
    dense, coded = MeanStatistics(), MeanStatistics()
    expected = channel.mean(SHAPES, read, statistics=dense)
    found, _ = channel.coded_mean(
        SHAPES, read, Identity(), state.memory_of, state.generators.__getitem__, statistics=coded
    )
    for name in SHAPES:
        assert bitwise_equal(found[name], expected[name])
    assert norm_and_cosine([coded.parts()]) == pytest.approx(norm_and_cosine([dense.parts()]), rel=1e-6)


def joined(workers: int, size: int) -> World:
    world = World(workers, int(os.environ.get("LOCAL_RANK", 0)), size)
    if size > 1:
        dist.init_process_group("gloo", rank=world.rank, world_size=size)
        world.connect(None, {})
    return world


CASES: list[tuple[list[int] | None, list[float] | None]] = [
    (None, None), ([3, 0], None), ([2, 3], [1.0, 3.0]), ([1], None), ([2, 0, 1], [0.5, 1.0, 4.0]), (None, None)
]  # fmt: skip


def rounds(size: int, workers: int, dtype: torch.dtype, chunk: int) -> Callable[[], list[Any]]:
    def talk() -> list[Any]:
        means.CHUNK = chunk
        world = joined(workers, size)
        channel, found = Channel(world, lambda: 0), []
        for codec in CROSSING:
            state = Run(codec, world.workers)
            for seed, (who, weights) in enumerate(CASES):
                held = models(workers, dtype, seed)
                for w in set(range(workers)) - set(world.workers):
                    held[w] = {}  # nobody reads what is hosted elsewhere
                if who is not None and max(who) >= workers:
                    who, weights = [0], None
                statistics = MeanStatistics()
                mean, sent = channel.coded_mean(
                    SHAPES, held.__getitem__, codec, state.memory_of, state.generators.__getitem__, who, weights,
                    statistics=statistics,
                )  # fmt: skip
                found.append((mean, sent, statistics.parts()))
        return found

    return talk


@pytest.mark.processes
@pytest.mark.parametrize("dtype", slow_but([torch.float32], [torch.float32, torch.bfloat16, torch.float64]), ids=str)
@pytest.mark.parametrize("workers", slow_but([4, 2], [4, 2, 1]))
def test_layouts_agree_to_the_bit(workers: int, dtype: torch.dtype, tmp_path: Path) -> None:
    """With 2 or 4 processes, of 2, 1 or (teams) half a worker or less; groups of one tensor and of several."""
    chunk = means.CHUNK
    try:
        (one,) = run(rounds(1, workers, dtype, chunk), 1, out=tmp_path / "1")
        layouts = {(2, 600): [], (4, chunk): []} if dtype is torch.float32 else {(2, chunk): []}
        for size, most in layouts:
            layouts[size, most] = run(rounds(size, workers, dtype, most), size, out=tmp_path / f"{size}")
    finally:
        means.CHUNK = chunk
    for several in layouts.values():
        for k, (mean, sent, parts) in enumerate(one):
            for of_process in several:
                assert of_process[k][1] == sent
                for name, tensor in mean.items():
                    assert bitwise_equal(of_process[k][0][name], tensor), (k, name)
            gathered = [of_process[k][2] for of_process in several]
            norm, cosine = norm_and_cosine([parts])
            assert norm_and_cosine(gathered) == (
                pytest.approx(norm, rel=1e-6), None if cosine is None else pytest.approx(cosine, abs=1e-6)
            )  # fmt: skip
            assert lengths(gathered) == pytest.approx(lengths([parts]), rel=1e-6)


@pytest.mark.processes
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("weigh", [False, True])
def test_dense_statistics_of_several_processes_add_up(size: int, weigh: bool, tmp_path: Path) -> None:
    """Weights, measured from an origin, in chunks that cut tensors: each process measures its own slices."""
    theta, held, chunk = models(1, seed=5)[0], models(2, seed=6), means.CHUNK

    def talk(size: int) -> list[Any]:
        means.CHUNK = 100
        channel, found = Channel(joined(2, size), lambda: 0), []
        for origin in (None, theta):
            statistics = MeanStatistics(origin)
            mean = channel.mean(SHAPES, held.__getitem__, weights=[1, 3] if weigh else None, statistics=statistics)
            found.append((mean, statistics.parts()))
        return found

    try:
        (one,) = run(talk, 1, 1, out=tmp_path / "1")
    finally:
        means.CHUNK = chunk
    several = run(talk, size, size, out=tmp_path / "several")
    for k, (mean, parts) in enumerate(one):
        assert all(bitwise_equal(of_process[k][0][n], t) for of_process in several for n, t in mean.items())
        gathered = [of_process[k][1] for of_process in several]
        assert norm_and_cosine(gathered) == pytest.approx(norm_and_cosine([parts]), rel=1e-6)
        assert lengths(gathered) == pytest.approx(lengths([parts]), rel=1e-6)


@pytest.mark.processes
def test_payloads_of_different_sizes_and_kinds_cross(tmp_path: Path) -> None:
    class Odd(Codec):
        """A payload of several dtypes and shapes that differs between workers."""

        def encode(self, x: Tensor, memory: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
            count = int(x[0])
            return {
                "complex": torch.full((1, count), 1 + 2j, dtype=torch.complex128),
                "flags": torch.tensor([True] * count),
                "nothing": torch.empty(0, 3, dtype=torch.float16),
                "count": torch.tensor(count),
                "turned": x.expand(2, 3).T.to(torch.bfloat16),
            }

        def decode(self, payload: dict[str, Tensor], like: Tensor) -> Tensor:
            count = int(payload["count"])
            assert payload["complex"].tolist() == [[1 + 2j] * count]
            assert payload["flags"].tolist() == [True] * count
            assert payload["nothing"].shape == (0, 3)
            assert payload["nothing"].dtype == torch.float16
            return payload["turned"][:, 1].float().contiguous()

    def talk() -> tuple[list[float], int]:
        world = joined(4, 2)
        state = Run(Odd(), range(4))
        mean, sent = Channel(world, lambda: 0).coded_mean(
            ["x"], lambda w: {"x": torch.full((3,), float(w))}, Odd(), state.memory_of, state.generators.__getitem__,
            workers=[1, 3, 2],
        )  # fmt: skip
        return mean["x"].tolist(), sent

    assert run(talk, 2, out=tmp_path) == [([2.0] * 3, 3 * 17 + 8 + 12)] * 2
