"""What an exchange costs beyond its arithmetic: time against plain PyTorch, and memory against the model.

* time: a table of rows, each a pair of callables that do the same, ours and by hand, on a float32 model like a GPT of
  10.8 M parameters. CPU seconds of the process with one thread; the two take turns, and the ratio of their medians is
  shown. To add a row, write a function that returns a :class:`Pair` and enter it in ``ROWS``.
* memory: the peak of live tensors within one call, beyond what was alive before it (its result included), in models.
  Counted by a ``TorchDispatchMode`` that sees every new storage; payloads and errors that stay are told apart.

Run ``python -m tests.benchmarks.exchange``: a minute or two; ``--only NAME`` for the rows that contain it.
"""

import argparse
import gc
import math
import statistics
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_diloco.algorithms import Diloco, StreamingDiloco, SyncAlgorithm
from lightning_diloco.codecs import FP4, Codec, ErrorFeedback, TopK
from lightning_diloco.comm.channel import Channel
from lightning_diloco.comm.means import Differences
from lightning_diloco.comm.statistics import MeanStatistics, norm_and_cosine
from lightning_diloco.comm.tensors import bitwise_equal
from lightning_diloco.comm.world import World
from lightning_diloco.engine.engine import Engine
from tests.benchmarks.rows import Row

WIDTH, LAYERS = 384, 6
CARRY = (2 << 23) - math.isqrt(2 << 46) - 1  # carries into the exponent where the mantissa exceeds √2
SGD = {"lr": 0.7, "momentum": 0.9, "nesterov": True}


def shapes() -> dict[str, tuple[int, ...]]:
    """50 tensors, 10.8 M elements."""
    d = WIDTH
    found: dict[str, tuple[int, ...]] = {"embedding": (256, d), "positions": (128, d)}
    for i in range(LAYERS):
        found |= {f"{i}.norm1": (d,), f"{i}.norm2": (d,), f"{i}.qkv": (3 * d, d), f"{i}.proj": (d, d)}
        found |= {f"{i}.up": (4 * d, d), f"{i}.up_bias": (4 * d,), f"{i}.down": (d, 4 * d), f"{i}.down_bias": (d,)}
    return found


class Models:
    """θ and N replicas near it."""

    def __init__(self, workers: int, of: Mapping[str, tuple[int, ...]] | None = None) -> None:
        generator = torch.Generator().manual_seed(0)
        of = shapes() if of is None else of
        self.theta = {n: torch.randn(s, generator=generator) for n, s in of.items()}
        self.replicas = [
            {n: t + 0.01 * torch.randn(t.shape, generator=generator) for n, t in self.theta.items()}
            for _ in range(workers)
        ]
        self.start = [{n: t.clone() for n, t in replica.items()} for replica in self.replicas]
        self.published = {n: t.clone() for n, t in self.theta.items()}
        self.parameters = {n: nn.Parameter(t) for n, t in self.theta.items()}
        self.optimizer = torch.optim.SGD(self.parameters.values(), **SGD)

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for t in self.theta.values())

    def drift(self) -> None:
        """The replicas move apart again: not timed."""
        for replica, start in zip(self.replicas, self.start, strict=True):
            for n, t in replica.items():
                t.copy_(start[n])

    @torch.no_grad()
    def step(self, delta: Mapping[str, Tensor]) -> None:
        for n, p in self.parameters.items():
            p.grad = delta[n]
        self.optimizer.step()
        for p in self.parameters.values():
            p.grad = None

    @torch.no_grad()
    def restart(self) -> None:
        for replica in self.replicas:
            for n, t in replica.items():
                t.copy_(self.parameters[n])


@dataclass
class Pair:
    """The same work twice; ``before`` is called before each, and not timed."""

    ours: Callable[[], Any]
    by_hand: Callable[[], Any]
    before: Callable[[], Any]
    goal: str


@torch.no_grad()
def mean_by_hand(models: Models) -> dict[str, Tensor]:
    delta = {}
    for n, p in models.parameters.items():
        x0, *others = (replica[n] for replica in models.replicas)
        delta[n] = p - (x0 + sum(x - x0 for x in others) / len(models.replicas))
    return delta


def dense(workers: int, measured: bool, goal: str) -> Pair:
    """Mean of Δ, SGD, N copies, and θ published with a comparison."""
    ours, hand = Models(workers), Models(workers)
    channel, names = Channel(World(workers), lambda: 0), list(ours.theta)

    def step() -> None:
        found = MeanStatistics() if measured else None
        theta = ours.theta
        ours.step(channel.mean(names, lambda w: Differences(names, theta, ours.replicas[w]), statistics=found))
        ours.restart()
        for n, t in ours.published.items():
            if not bitwise_equal(t, theta[n]):
                t.copy_(theta[n])
        if found is not None:
            norm_and_cosine([found.parts()])

    def step_by_hand() -> None:
        hand.step(mean_by_hand(hand))
        hand.restart()

    def before() -> None:
        ours.drift()
        hand.drift()

    return Pair(step, step_by_hand, before, goal)


def mean_only(workers: int, measured: bool, goal: str) -> Pair:
    """The mean of Δ alone."""
    models = Models(workers)
    channel, names = Channel(World(workers), lambda: 0), list(models.theta)

    def ours() -> None:
        found = MeanStatistics() if measured else None
        channel.mean(names, lambda w: Differences(names, models.theta, models.replicas[w]), statistics=found)

    return Pair(ours, lambda: mean_by_hand(models), lambda: None, goal)


def fp4_codes(a: Tensor) -> tuple[Tensor, int]:
    """E3M0 codes, by the bits of the elements: a sign and three bits of exponent."""
    exponent = int(torch.ceil(torch.log2(a.abs().amax())))
    bits = a.view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    base = exponent - 7 + 127
    code = (((magnitude + CARRY) >> 23) - base).clamp_(0, 7)
    code = torch.maximum(code, (magnitude >= (base << 23)).int())
    return (code | ((bits >> 28) & 8)).to(torch.uint8), exponent


@torch.no_grad()
def coded_by_hand(models: Models, errors: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """FP4 with error feedback in plain PyTorch: nothing is packed, counted or measured."""
    delta = {}
    for n, t in models.theta.items():
        decoded = []
        for replica, error in zip(models.replicas, errors, strict=True):
            a = 0.9 * error[n] + (t - replica[n])
            codes, exponent = fp4_codes(a)
            levels = [0.0, *(2.0 ** (exponent - 7 + c) for c in range(1, 8))]
            table = torch.tensor(levels + [-level for level in levels])
            decoded.append(table[codes.int()])
            error[n] = a - decoded[-1]
        delta[n] = decoded[0] + sum(x - decoded[0] for x in decoded[1:]) / len(decoded)
    return delta


def coded(workers: int, measured: bool, goal: str) -> Pair:
    """The mean of what four bits with error feedback decode to."""
    models = Models(workers)
    channel, names = Channel(World(workers), lambda: 0), list(models.theta)
    memories: dict[tuple[int, str], dict[str, Tensor]] = {}
    generators = [torch.Generator().manual_seed(w) for w in range(workers)]
    errors = [{n: torch.zeros_like(t) for n, t in models.theta.items()} for _ in range(workers)]

    def ours() -> dict[str, Tensor]:
        return channel.coded_mean(
            names,
            lambda w: Differences(names, models.theta, models.replicas[w]),
            ErrorFeedback(FP4(), 0.9),
            lambda w, n: memories.setdefault((w, n), {}),
            generators.__getitem__,
            statistics=MeanStatistics() if measured else None,
        )[0]

    def by_hand() -> dict[str, Tensor]:
        return coded_by_hand(models, errors)

    torch.testing.assert_close(ours(), by_hand())  # the same work
    return Pair(ours, by_hand, lambda: None, goal)


class Named(nn.Module):
    """Parameters under the names of :func:`shapes`."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name.replace(".", "_"), nn.Parameter(tensor.clone()))


class Running:
    """An engine whose workers have just drifted apart; its inner optimizer never steps."""

    def __init__(self, workers: int, algorithm: SyncAlgorithm, measured: bool, interval: int = 1) -> None:
        self.models = Models(workers)
        module = Named(self.models.theta)
        self.engine = Engine(
            module,
            [torch.optim.SGD(module.parameters(), lr=0.1)],
            num_workers=workers,
            interval=interval,
            algorithm=algorithm,
            outer_factory=partial(torch.optim.SGD, **SGD),
            diagnostics=measured,
        )

    def drift(self) -> None:
        for w, start in enumerate(self.models.start):
            for tensor, value in zip(self.engine.context.weights(w).values(), start.values(), strict=True):
                tensor.copy_(value)

    def steps(self, count: int = 1) -> None:
        for _ in range(count):
            self.engine.progress.stepped = True
            self.engine.end_step()


def whole(workers: int, measured: bool, goal: str) -> Pair:
    """An outer step of Diloco through the engine, the report and the published θ included."""
    ours, hand = Running(workers, Diloco(), measured), Models(workers)

    def by_hand() -> None:
        hand.step(mean_by_hand(hand))
        hand.restart()

    def before() -> None:
        ours.drift()
        hand.drift()

    return Pair(ours.steps, by_hand, before, goal)


FRAGMENTS = 24


def streaming(workers: int, measured: bool, goal: str) -> Pair:
    """A round of 24 fragments, one per local step."""
    hand = Models(workers)
    names = [n.replace(".", "_") for n in hand.theta]
    pattern = [names[p::FRAGMENTS] for p in range(FRAGMENTS)]
    algorithm = StreamingDiloco(FRAGMENTS, delay=0, pattern=pattern)
    ours = Running(workers, algorithm, measured, interval=FRAGMENTS)
    ours.steps(FRAGMENTS)  # the first round is that of fragment 0 alone

    @torch.no_grad()
    def by_hand() -> None:
        whole = list(hand.theta)
        for p in range(FRAGMENTS):
            for n in whole[p::FRAGMENTS]:
                x0, *others = (replica[n] for replica in hand.replicas)
                mean = x0 + sum(x - x0 for x in others) / len(hand.replicas)
                hand.parameters[n].grad = hand.parameters[n] - mean
            hand.optimizer.step()
            for n in whole[p::FRAGMENTS]:
                hand.parameters[n].grad = None
                for replica in hand.replicas:
                    replica[n].copy_(hand.parameters[n])

    def before() -> None:
        ours.drift()
        hand.drift()

    return Pair(partial(ours.steps, FRAGMENTS), by_hand, before, goal)


class Mask(SyncAlgorithm):
    """SPARTA: in every step all workers take the mean of a random part of the weights, the same part for all."""

    published = "average"

    def __init__(self, p: float) -> None:
        self.p = p

    def after_inner_step(self, step: int) -> None:
        ctx = self.ctx
        generator, theta = ctx.random("mask"), ctx.outer.tensors
        sizes = {n: theta[n].numel() for n in ctx.names}
        index = {
            n: torch.randint(size, (max(1, int(self.p * size)),), generator=generator) for n, size in sizes.items()
        }

        def selected(worker: int) -> dict[str, Tensor]:
            return {n: ctx.weights(worker)[n].view(-1).index_select(0, index[n]) for n in ctx.names}

        ctx.send(ctx.names, selected, what="weights at a mask")
        for transfer in ctx.arrived():
            ctx.merge(transfer.workers, transfer.names, transfer.mean, index=index)


def mask(workers: int, measured: bool, goal: str) -> Pair:
    """A step that averages 0.5 % of the weights, against a whole outer step of ours."""
    ours, diloco = Running(workers, Mask(0.005), measured, interval=10**6), Running(workers, Diloco(), measured)

    def before() -> None:
        ours.drift()
        diloco.drift()

    return Pair(ours.steps, diloco.steps, before, goal)


ROWS: dict[str, Callable[[], Pair]] = {
    f"{what}{', measured' if measured else ''}, N = {workers}": partial(row, workers, measured, goals[measured])
    for what, row, goals in (
        ("mean of Δ", mean_only, ("no goal", "no goal")),
        ("dense outer step", dense, ("goal ≤ 1.5", "goal ≤ 2.0")),
        ("FP4 with error feedback", coded, ("goal ≤ 1.3", "no goal")),
        ("Diloco outer step", whole, ("goal ≤ 1.5", "goal ≤ 2.0")),
        ("streaming, a round of 24 fragments", streaming, ("goal ≤ 1.6", "no goal")),
        ("mask of 0.5 % / Diloco outer step", mask, ("goal ≤ 0.15", "goal ≤ 0.15")),
    )
    for workers in (4, 16)
    for measured in (False, True)
}


def timed(pair: Pair, repeats: int) -> tuple[list[float], list[float]]:
    """Lets both take turns; CPU milliseconds of ours and by hand."""
    seconds: dict[str, list[float]] = {"ours": [], "by_hand": []}
    for repeat in range(repeats + 1):
        for which in ("ours", "by_hand") if repeat % 2 else ("by_hand", "ours"):
            pair.before()
            start = time.process_time()
            getattr(pair, which)()
            seconds[which].append(1e3 * (time.process_time() - start))
    return seconds["ours"][1:], seconds["by_hand"][1:]


def compare(name: str, make: Callable[[], Pair], repeats: int) -> None:
    """Prints the ratio of their medians."""
    pair = make()
    ours, hand = map(statistics.median, timed(pair, repeats))
    print(f"{name:<46}{ours / hand:>8.2f}   {pair.goal}; {ours:.0f} ms against {hand:.0f} ms", flush=True)


class Peak(TorchDispatchMode):
    """Counts the bytes of live storages that were made inside."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.live = self.most = 0
        self._seen = {t.untyped_storage()._cdata for t in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._seen or not storage.nbytes():
            return
        self._seen.add(key)
        self.live += storage.nbytes()
        self.most = max(self.most, self.live)
        weakref.finalize(storage, self._gone, key, storage.nbytes())

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


def peak(what: str, workers: int, of: Mapping[str, tuple[int, ...]], goal: str) -> None:
    """Prints the peak of a mean with statistics, beyond what is alive before it."""
    models = Models(workers, of)
    channel, names = Channel(World(workers), lambda: 0), list(models.theta)
    memories: dict[tuple[int, str], dict[str, Tensor]] = {}
    codecs: dict[str, Codec] = {"FP4 with error feedback": ErrorFeedback(FP4(), 0.9), "TopK": TopK()}

    def read(worker: int) -> Mapping[str, Tensor]:
        return Differences(names, models.theta, models.replicas[worker])

    def call() -> Any:
        found = MeanStatistics()
        if what not in codecs:
            return channel.mean(names, read, statistics=found)
        generator = torch.Generator()
        return channel.coded_mean(
            names,
            read,
            codecs[what],
            lambda w, n: memories.setdefault((w, n), {}),
            lambda _: generator,
            statistics=found,
        )

    call()  # errors are there afterwards
    known = [t for values in [models.theta, *models.replicas, *memories.values()] for t in values.values()]
    with Peak(known) as counted:
        call()
    kind = "one giant tensor" if len(of) < 3 else f"{len(of)} tensors"
    print(
        f"{f'peak, {what}, N = {workers}, {kind}':<64}{counted.most / models.bytes:>6.2f} models   {goal}", flush=True
    )


def rows(repeats: int) -> Iterator[Row]:
    """The outer steps of the engine, for the table of ``python -m tests.benchmarks``."""
    for workers in (4, 16):
        for measured in (True, False):
            gc.collect()
            ours, hand = timed(whole(workers, measured, ""), repeats)
            name = f"outer step, 10.8 M, N = {workers}, {'with' if measured else 'without'} diagnostics"
            goal = 2.0 if measured else 1.5
            yield Row(name, "mean, Nesterov, copies by hand", ours, hand, "ms", goal)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="part of the names of rows")
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name, make in ROWS.items():
        if args.only in name:
            gc.collect()
            compare(name, make, args.repeats)
    for what in ("dense", "FP4 with error feedback", "TopK"):
        for workers in (4, 8):
            if args.only in f"peak, {what}, N = {workers}":
                peak(what, workers, shapes(), "goal ≤ 1.3")
                peak(what, workers, {"embedding": (8192, 512), "bias": (512,)}, "bounded whatever N")


if __name__ == "__main__":
    main()
