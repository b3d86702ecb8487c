"""Does every algorithm of the family compute what its paper says? In float64, against the oracles, at every step."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar

import codec_reference as slow
import pytest
import torch
from family import (
    INNER,
    INTERVAL,
    NAMES,
    STEPS,
    WORKERS,
    Layers,
    assert_agrees,
    assert_same_run,
    batches_of,
    by_numbers,
    largest,
    layers,
    several,
    start,
    train,
)
from helpers import assert_equal, differs, regression_data, slow_but, trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from oracles import DataParallel as DataParallelOracle
from oracles import Oracle, joined
from oracles import PostLocalSGD as PostLocalOracle
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_diloco import (
    DataParallel,
    Diloco,
    DilocoStrategy,
    ErrorFeedback,
    PeriodicAveraging,
    PostLocalSGD,
    SparseLoCo,
    StreamingDiloco,
)
from lightning_diloco.codecs import FP4, Codec, Identity, Int8, Payload, Statistical, TopK

SGD, ADAM = torch.optim.SGD, torch.optim.Adam
# the strategy's arguments, and the same optimizer as the oracle makes it
NESTEROV: Any = {}, partial(SGD, lr=0.7, momentum=0.9, nesterov=True)
NESTEROV_04: Any = {}, partial(SGD, lr=0.4, momentum=0.9, nesterov=True)
MEAN: Any = {"outer_optimizer_kwargs": {"lr": 1.0}}, partial(SGD, lr=1.0)
HALF: Any = {"outer_optimizer_kwargs": {"lr": 0.5}}, partial(SGD, lr=0.5)
OUTER_ADAM: Any = (
    {"outer_optimizer_cls": ADAM, "outer_optimizer_kwargs": {"lr": 0.1, "eps": 0.1}},
    partial(ADAM, lr=0.1, eps=0.1),
)
# the codec, and what the oracle does instead: C, β
FOUR_BITS: Any = FP4(), {"codec": by_numbers(slow.fp4)}
EIGHT_BITS: Any = Int8(), {"codec": by_numbers(slow.int8)}
TWO_BITS_KEPT: Any = (
    ErrorFeedback(Statistical(2), 1.0),
    {"codec": by_numbers(lambda x: slow.statistical(x, 2)), "decay": 1.0},
)
LARGEST_KEPT: Any = ErrorFeedback(TopK(6, 2), 0.9), {"codec": largest((2, 3), 2), "decay": 0.9}
PRESET: Any = {"codec": largest((64, 64), 64, lambda x: slow.statistical(x, 2)), "decay": 0.95}

PATTERNS: dict[str, tuple[int, Any, list[list[str]]]] = {  # fragments, pattern, and what it should mean
    "strided": (2, "strided", [layers(0, 2), layers(1, 3)]),
    "strided 4": (4, "strided", [layers(0), layers(1), layers(2), layers(3)]),
    "sequential": (2, "sequential", [layers(0, 1), layers(2, 3)]),
    "lists": (
        3,
        [["layers.3", "layers.0.bias"], ["layers.1.weight"], ["layers.0.weight", "layers.1.bias", "layers.2"]],
        [
            ["layers.0.bias", *layers(3)],
            ["layers.1.weight"],
            ["layers.0.weight", "layers.1.bias", *layers(2)],
        ],
    ),
}


@dataclass
class Case:
    """A run: the arguments of the strategy, and the oracle for the same."""

    strategy: Callable[[], dict[str, Any]]
    oracle: Callable[[], Any]
    inner: str = "sgd"
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        return {"make": partial(Layers, self.inner), **self.more, **self.strategy()}


def diloco(outer: Any, inner: str = "sgd", codec: Any = None, final_sync: bool = True, **strategy: Any) -> Case:
    """Plain DiLoCo."""
    arguments, make_outer = outer
    ours, theirs = codec or (None, {})

    def oracle() -> Oracle:
        twin = Oracle(start(), WORKERS, Layers.loss, INNER[inner], make_outer, INTERVAL, **theirs)
        twin.train(batches_of(WORKERS))
        return twin.flush() if final_sync else twin

    return Case(lambda: {**arguments, "codec": ours, "final_sync": final_sync, **strategy}, oracle, inner)


def streaming(
    pattern: str,
    delay: int,
    alpha: float,
    first_sync: Any = "paper",
    outer: Any = NESTEROV_04,
    inner: str = "sgd",
    codec: Any = None,
    num_workers: int = WORKERS,
    steps: int = STEPS,
) -> Case:
    fragments, given, names = PATTERNS[pattern]
    arguments, make_outer = outer
    ours, theirs = codec or (None, {})

    def strategy() -> dict[str, Any]:
        algorithm = StreamingDiloco(fragments, delay=delay, alpha=alpha, pattern=given, first_sync=first_sync)
        return {**arguments, "codec": ours, "algorithm": algorithm}

    def oracle() -> Oracle:
        form: dict[str, Any] = {"fragments": names, "delay": delay, "alpha": alpha, "first_sync": first_sync}
        twin = Oracle(start(), num_workers, Layers.loss, INNER[inner], make_outer, INTERVAL, **form, **theirs)
        return twin.train(batches_of(num_workers, steps)).flush()

    return Case(strategy, oracle, inner, {"num_workers": num_workers, "steps": steps})


def data_parallel(inner: str, codec: Any = None, clip: float | None = None) -> Case:
    ours, theirs = codec or (None, {})

    def oracle() -> DataParallelOracle:
        return DataParallelOracle(start(), batches_of(WORKERS), Layers.loss, INNER[inner], clip=clip, **theirs)

    more = {"options": {"gradient_clip_val": clip}}
    return Case(lambda: {"codec": ours, "algorithm": DataParallel()}, oracle, inner, more)


def post_local(inner: str, switch: int, final_sync: bool = True) -> Case:
    def oracle() -> PostLocalOracle:
        form = (INNER[inner], switch, INTERVAL, final_sync)
        return PostLocalOracle(start(), batches_of(WORKERS), Layers.loss, *form)

    return Case(lambda: {"algorithm": PostLocalSGD(switch), "final_sync": final_sync}, oracle, inner)


def sparseloco() -> Case:
    """On a model with matrices of 120 and 160 elements: 64 of them are sent."""
    make = partial(Layers, "adamw", (3, 40, 4, 1))

    def oracle() -> Oracle:
        outer = partial(SGD, lr=1.0)
        twin = Oracle(make().double(), WORKERS, Layers.loss, INNER["adamw"], outer, INTERVAL, **PRESET)
        return twin.train(batches_of(WORKERS)).flush()

    return Case(lambda: {"algorithm": SparseLoCo()}, oracle, more={"make": make})


CASES: dict[str, Case] = {
    "DiLoCo, Nesterov": diloco(NESTEROV, "adamw"),
    "DiLoCo, mean": diloco(MEAN, "adamw", final_sync=False),
    "DiLoCo, SGD .5": diloco(HALF),
    "DiLoCo, Adam": diloco(OUTER_ADAM, "adamw"),
    "DiLoCo, FP4": diloco(NESTEROV, "adamw", FOUR_BITS),
    "DiLoCo, FP4, SGD 1": diloco(MEAN, codec=FOUR_BITS),
    "DiLoCo, Int8": diloco(NESTEROV, codec=EIGHT_BITS),
    "DiLoCo, 2 bits, error feedback": diloco(NESTEROV, "adamw", TWO_BITS_KEPT),
    "DiLoCo, top-k, error feedback": diloco(HALF, codec=LARGEST_KEPT),
    "streaming, FP4": streaming("lists", 1, 0.5, codec=FOUR_BITS),
    "streaming, top-k, error feedback": streaming("strided", 2, 0.0, "staggered", codec=LARGEST_KEPT, inner="adamw"),
    "streaming, Adam": streaming("sequential", 1, 0.25, outer=OUTER_ADAM),
    "streaming, mean": streaming("strided 4", 0, 0.0, outer=MEAN, inner="adamw"),
    "streaming, one worker": streaming("strided", 1, 0.5, num_workers=1),
    "data parallel": data_parallel("adamw"),
    "data parallel, clipped": data_parallel("sgd", clip=0.2),
    "data parallel, FP4": data_parallel("sgd", FOUR_BITS),
    "periodic averaging": diloco(({}, MEAN[1]), "adamw", algorithm=PeriodicAveraging()),
    "periodic averaging, FP4": diloco(({}, MEAN[1]), codec=FOUR_BITS, algorithm=PeriodicAveraging()),
    "post-local SGD": post_local("adamw", 5),
    "post-local SGD, no final sync": post_local("sgd", 8, final_sync=False),
    "post-local SGD, never local": post_local("sgd", STEPS + 1),
    "SparseLoCo": sparseloco(),
}
QUICK = {
    "DiLoCo, Nesterov",
    "DiLoCo, 2 bits, error feedback",
    "streaming, FP4",
    "data parallel, clipped",
    "periodic averaging",
    "post-local SGD",
    "SparseLoCo",
}

STREAMING = list(itertools.product(PATTERNS, (0, 1, 5), (0.0, 0.5, 1.0), ("paper", "staggered")))
QUICK_STREAMING = [("strided 4", 5, 0.5, "paper"), ("lists", 1, 0.0, "staggered")]


@cache
def in_one_process(name: str) -> tuple[Any, Any]:
    """The run, and the oracle's: the first test that asks trains them."""
    return train(Path(), **CASES[name].settings), CASES[name].oracle()


@pytest.mark.parametrize("name", slow_but(QUICK, CASES))
def test_every_algorithm_agrees_with_its_oracle(name: str) -> None:
    assert_agrees(*in_one_process(name))


@pytest.mark.parametrize("form", slow_but(QUICK_STREAMING, STREAMING), ids=str)
def test_streaming_agrees_with_its_oracle(form: tuple[str, int, float, str], tmp_path: Path) -> None:
    pattern, delay, alpha, first_sync = form
    case = streaming(pattern, delay, alpha, first_sync, inner=("sgd", "adamw")[delay % 2])
    assert_agrees(train(tmp_path, **case.settings), case.oracle())


@pytest.mark.parametrize("delay", [0, 2])
@pytest.mark.parametrize("steps", slow_but([INTERVAL], [1, INTERVAL - 1, INTERVAL, INTERVAL + 1, 2 * INTERVAL]))
def test_a_fit_of_any_length_sends_every_fragment_in_the_end(steps: int, delay: int, tmp_path: Path) -> None:
    """After H steps the first fragment has just been sent, and the others never: the flush sends them."""
    case = streaming("strided 4", delay, 0.0, steps=steps)
    assert_agrees(train(tmp_path, **case.settings), case.oracle())


TWO_PROCESSES = {
    "the families": ["streaming, FP4", "data parallel", "post-local SGD"],
    "DiLoCo": [n for n in CASES if n.startswith("DiLoCo")],
    "streaming": [n for n in CASES if n.startswith("streaming") and "one worker" not in n],
    "others": [n for n in CASES if not n.startswith(("DiLoCo", "streaming"))],
}


@pytest.mark.processes
@pytest.mark.parametrize("group", slow_but({"the families"}, TWO_PROCESSES))
def test_two_processes_agree_with_the_oracle_and_with_one(group: str, tmp_path: Path) -> None:
    names = TWO_PROCESSES[group]
    for name, result in zip(names, several(tmp_path, 2, [CASES[name].settings for name in names]), strict=True):
        one, oracle = in_one_process(name)
        assert_agrees(result, oracle)
        assert_same_run(result, one, measured=1e-9)


@pytest.mark.processes
@pytest.mark.slow
def test_streaming_in_four_processes(tmp_path: Path) -> None:
    case = streaming("lists", 3, 0.5, "staggered", codec=FOUR_BITS)
    (four,) = several(tmp_path, 4, [case.settings])
    assert_agrees(four, case.oracle())
    assert_same_run(four, train(tmp_path, **case.settings), measured=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("interval", [1, 2, 3, 5, 7])
def test_streaming_with_other_intervals(interval: int, tmp_path: Path) -> None:
    for first_sync in ("paper", "staggered"):
        fragments, delay = min(2, interval), min(1, interval - 1)
        ours = train(
            tmp_path,
            interval=interval,
            algorithm=StreamingDiloco(fragments, delay=delay, alpha=0.5, first_sync=first_sync),
        )
        names = PATTERNS["strided"][2] if fragments == 2 else [NAMES]
        form: dict[str, Any] = {"fragments": names, "delay": delay, "alpha": 0.5, "first_sync": first_sync}
        twin = Oracle(start(), WORKERS, Layers.loss, INNER["sgd"], NESTEROV_04[1], interval, **form)
        assert_agrees(ours, twin.train(batches_of(WORKERS)).flush())


@pytest.mark.slow
def test_rounds_start_anew_after_a_flush(tmp_path: Path) -> None:
    """A fit of two epochs, and one that takes its file up and trains for two more."""
    outer = NESTEROV_04[1]
    form: dict[str, Any] = {"fragments": PATTERNS["strided"][2], "delay": 1, "alpha": 0.5}
    twin = Oracle(start(), WORKERS, Layers.loss, INNER["adamw"], outer, 5, **form)
    batches = batches_of(WORKERS, 24)
    twin.train([own[:12] for own in batches]).flush().train([own[12:] for own in batches]).flush()

    settings: dict[str, Any] = {"interval": 5, "make": partial(Layers, "adamw"), "steps": -1}
    algorithm, file = partial(StreamingDiloco, 2, delay=1, alpha=0.5), tmp_path / "end.ckpt"
    first = train(tmp_path, algorithm=algorithm(), options={"max_epochs": 2}, end=file, **settings)
    second = train(tmp_path, algorithm=algorithm(), resume=file, **settings)
    both = replace(second, history=first.history + second.history, reports=first.reports + second.reports)
    assert_agrees(both, twin)


# ------------------------------------------------------------------------------------------------ what is equal to what


@pytest.mark.slow
@pytest.mark.parametrize("first_sync", ["paper", "staggered"])
@pytest.mark.parametrize("outer", ["nesterov", "mean", "adam"])
@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true"])
def test_streaming_of_a_single_fragment_is_diloco_bit_for_bit(first_sync, outer, precision, tmp_path):
    arguments = {
        "nesterov": {"outer_optimizer_kwargs": {"lr": 0.7, "momentum": 0.9, "nesterov": True}},
        "mean": MEAN[0],
        "adam": OUTER_ADAM[0],
    }[outer]
    dtype = torch.float64 if precision == "64-true" else torch.float32
    settings: dict[str, Any] = {
        "data": regression_data(96, dtype=dtype),
        "options": {"precision": precision},
        **arguments,
    }
    algorithm = StreamingDiloco(1, delay=0, alpha=0.0, first_sync=first_sync)
    ours = train(tmp_path, algorithm=algorithm, **settings)
    plain = train(tmp_path, algorithm=Diloco(), **settings)
    for run in (ours, plain):
        run.reports = [replace(report, tag=None) for report in run.reports]
    assert_same_run(ours, plain)
    assert len(ours.reports) == 4


@pytest.mark.slow
def test_alpha_1_is_independent_training_bit_for_bit(tmp_path: Path) -> None:
    ours = train(tmp_path, algorithm=StreamingDiloco(2, delay=1, alpha=1.0))
    alone = train(tmp_path, interval=1000, final_sync=False)
    assert_equal([w for _, w in ours.history], [w for _, w in alone.history])
    assert_equal(ours.workers, alone.workers)
    assert differs(ours.theta, alone.theta)


NOTHING_LOST: dict[str, Callable[[], dict[str, Any]]] = {
    "nesterov": dict,
    "streaming": lambda: {"algorithm": StreamingDiloco(2, delay=2, alpha=0.5)},
    "data parallel": lambda: {"algorithm": DataParallel()},
    "mean": lambda: MEAN[0],
    "periodic averaging": lambda: {"algorithm": PeriodicAveraging()},
}
# a TopK that sends all doesn't know that it loses nothing, and θ − mean Δ isn't the mean to the last bit
PAIRS = [(Identity(), name) for name in NOTHING_LOST] + [(TopK(16, 16), name) for name in list(NOTHING_LOST)[:3]]


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_a_codec_that_loses_nothing_is_none_bit_for_bit(pair: tuple[Codec, str], tmp_path: Path) -> None:
    codec, setting = pair
    settings = {"data": regression_data(96), "options": {"precision": "32-true"}, "make": partial(Layers, "adamw")}
    ours = train(tmp_path, codec=codec, **settings, **NOTHING_LOST[setting]())
    plain = train(tmp_path, **settings, **NOTHING_LOST[setting]())
    assert_same_run(ours, plain, measured=1e-6, trace=codec.lossless)
    assert (ours.bytes > plain.bytes) == (not codec.lossless)  # indices


@pytest.mark.slow
def test_data_parallel_is_a_plain_run_on_joined_batches(tmp_path: Path) -> None:
    """With Lightning's clipping in both, of the mean gradient."""
    options: dict[str, Any] = {"gradient_clip_val": 0.2, "precision": "64-true", "max_steps": STEPS}
    ours = train(tmp_path, algorithm=DataParallel(), make=partial(Layers, "adamw"), options=options)
    module = Layers("adamw")
    t = trainer(**{**options, "max_epochs": 1})
    t.fit(module, DataLoader(joined(batches_of(WORKERS)), batch_size=None, shuffle=False))  # type: ignore[arg-type]
    for name, value in module.state_dict().items():
        torch.testing.assert_close(ours.theta[name], value, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_data_parallel_accumulates(tmp_path: Path) -> None:
    options = {"accumulate_grad_batches": 2}
    ours = train(tmp_path, algorithm=DataParallel(), options=options, steps=9)
    pairs = [list(zip(own[0::2], own[1::2], strict=True)) for own in batches_of(WORKERS, 18)]

    def loss(model: Any, pair: Any) -> Tensor:
        return (model.loss(pair[0]) + model.loss(pair[1])) / 2

    ours.history = ours.history[1::2]
    assert_agrees(ours, DataParallelOracle(start(), pairs, loss, INNER["sgd"]))


# --------------------------------------------------------------------------------------------------------- fragments


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    return [name for name in before if not torch.equal(before[name], after[name])]


@pytest.mark.parametrize("pattern", ["strided", "sequential"])
@pytest.mark.parametrize("fragments", slow_but([3], [1, 2, 3, 4]))
def test_each_parameter_is_in_one_fragment_with_its_layer(pattern: Any, fragments: int, tmp_path: Path) -> None:
    ours = train(
        tmp_path,
        steps=12,
        interval=12,
        algorithm=StreamingDiloco(fragments, delay=0, pattern=pattern, first_sync="staggered"),
    )
    thetas = [start().state_dict(), *(theta for theta, _ in ours.history)]
    seen = [names for a, b in itertools.pairwise(thetas) if (names := moved(a, b))]
    assert len(seen) == fragments
    assert sorted(itertools.chain(*seen)) == sorted(NAMES)
    numbers = [sorted({int(name.split(".")[1]) for name in names}) for names in seen]
    assert sorted(itertools.chain(*numbers)) == [0, 1, 2, 3]
    if pattern == "strided":
        assert numbers == [list(range(p, 4, fragments)) for p in range(fragments)]
    else:
        assert list(itertools.chain(*numbers)) == [0, 1, 2, 3]
        assert {len(n) for n in numbers} <= {4 // fragments, -(-4 // fragments)}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"fragments": 0}, "fragments"),
        ({"fragments": 2.5}, "fragments"),
        ({"fragments": True}, "fragments"),
        ({"fragments": 2, "delay": -1}, "delay"),
        ({"fragments": 2, "delay": 0.5}, "delay"),
        ({"fragments": 2, "alpha": 1.5}, "alpha"),
        ({"fragments": 2, "alpha": -0.1}, "alpha"),
        ({"fragments": 2, "alpha": float("nan")}, "alpha"),
        ({"fragments": 2, "pattern": "random"}, "pattern"),
        ({"fragments": 2, "first_sync": "never"}, "first_sync"),
        ({"fragments": 2, "pattern": [["layers.0"]]}, "pattern|fragments"),  # one list, two fragments
        # these need the model, or H
        ({"fragments": 5}, "fragments"),
        ({"fragments": 2, "delay": INTERVAL}, "delay"),
        ({"fragments": 2, "pattern": [["layers.0", "layers.1"], ["layers.2"]]}, r"layers\.3\.weight"),  # left out
        (
            {"fragments": 2, "pattern": [["layers.0", "layers.1"], ["layers.1.bias", "layers.2", "layers.3"]]},
            r"layers\.1\.bias",  # twice
        ),
        ({"fragments": 2, "pattern": [["layers.0", "layers.1", "nothing"], ["layers.2", "layers.3"]]}, "nothing"),
        ({"fragments": 2, "pattern": [["layers"], []]}, "pattern|fragment"),  # an empty fragment
    ],
    ids=str,
)
def test_wrong_arguments_of_streaming_are_named(arguments: dict[str, Any], text: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, MisconfigurationException), match=text):
        train(tmp_path, steps=1, algorithm=StreamingDiloco(**arguments))


@pytest.mark.parametrize("switch", [-1, 1.5, True, None])
def test_wrong_arguments_of_post_local_sgd_are_named(switch: Any) -> None:
    with pytest.raises(ValueError, match=r"`switch` \(="):
        PostLocalSGD(switch)


@pytest.mark.parametrize("make", [DataParallel, PeriodicAveraging, lambda: PostLocalSGD(3)])
def test_an_outer_optimizer_that_nobody_would_use_is_refused(make: Any) -> None:
    with pytest.raises((ValueError, MisconfigurationException), match="outer_optimizer_kwargs"):
        DilocoStrategy(2, 2, outer_optimizer_kwargs={"lr": 1.0}, algorithm=make())


# ------------------------------------------------------------------------------------------------------------- bytes

CHUNKS = partial(Layers, "sgd", (64, 64, 128, 64), False)  # 1, 2 and 2 blocks of 64 × 64
DENSE = 5 * 4096 * 4


def wide_run(folder: Path, steps: int = 12, **settings: Any) -> Any:
    """In float32, on matrices of whole chunks, for two rounds."""
    settings = {"make": CHUNKS, "num_workers": 2, "options": {"precision": "32-true"}, "final_sync": False, **settings}
    return train(folder, steps=steps, data=regression_data(96, features=64), **settings)


def test_streaming_sends_as_much_as_diloco_in_smaller_parts(tmp_path: Path) -> None:
    plain = wide_run(tmp_path)
    assert plain.bytes == 2 * DENSE
    equal = partial(Layers, "sgd", (64, 64, 64, 64, 64), False)
    algorithm = StreamingDiloco(4, delay=0, first_sync="staggered")
    ours, whole = wide_run(tmp_path, make=equal, algorithm=algorithm), wide_run(tmp_path, make=equal)
    assert ours.bytes == whole.bytes == 2 * 4 * 4096 * 4
    assert [r.payload_bytes for r in ours.reports] == [4096 * 4] * 8
    assert [r.payload_bytes for r in whole.reports] == [4 * 4096 * 4] * 2


def test_fp4_sends_an_eighth(tmp_path: Path) -> None:
    for algorithm in (Diloco(), StreamingDiloco(3, delay=0, first_sync="staggered")):
        ours = wide_run(tmp_path, codec=FP4(), algorithm=algorithm)
        assert ours.bytes == 2 * (DENSE // 8 + 3 * 2)  # an exponent per tensor
        assert ours.bytes == sum(r.payload_bytes for r in ours.reports)
    assert 2 * DENSE / ours.bytes == pytest.approx(8, rel=1e-3)


def test_sparseloco_sends_146_times_less(tmp_path: Path) -> None:
    ours = wide_run(tmp_path, algorithm=SparseLoCo())
    # per chunk 64 indices of 12 bits and 64 values of 2 bits, per tensor four means
    assert [r.payload_bytes for r in ours.reports] == [5 * 112 + 3 * 16] * 2
    assert ours.bytes == 2 * (5 * 112 + 3 * 16)
    assert 2 * DENSE / (ours.bytes - 2 * 3 * 16) == pytest.approx(146.29, abs=5e-3)


@pytest.mark.slow
def test_data_parallel_sends_gradients_in_every_step(tmp_path: Path) -> None:
    ours = wide_run(tmp_path, algorithm=DataParallel())
    assert set(ours.whats) == {"gradients"}
    assert ours.bytes == 12 * DENSE == INTERVAL * wide_run(tmp_path).bytes
    assert wide_run(tmp_path, codec=FP4(), algorithm=DataParallel()).bytes == 12 * (DENSE // 8 + 3 * 2)
    later = wide_run(tmp_path, algorithm=PostLocalSGD(3), steps=15)
    assert later.bytes == (3 + 2) * DENSE  # after 9 and 15 steps
    assert later.whats[0] == "gradients" != later.whats[-1]
    assert wide_run(tmp_path, algorithm=PeriodicAveraging()).bytes == 2 * DENSE


# ----------------------------------------------------------------------------------------------------- error feedback


@dataclass(frozen=True)
class Watched(Codec):
    """Notes what goes in, what arrives, and the error that is left, tensor by tensor."""

    remembers: ClassVar[bool] = True
    seen: ClassVar[list[tuple[Tensor, Tensor, Tensor]]] = []

    codec: ErrorFeedback

    def encode(self, x: Tensor, memory: dict[str, Tensor], generator: torch.Generator) -> Payload:
        given = x.detach().clone()
        payload = self.codec.encode(x, memory, generator)
        self.seen.append((given, self.codec.decode(payload, given), memory["error"].clone()))
        return payload

    def decode(self, payload: Payload, like: Tensor) -> Tensor:
        return self.codec.decode(payload, like)


@pytest.mark.slow
@pytest.mark.parametrize("streams", [False, True])
def test_error_feedback_telescopes_through_a_run(streams: bool, tmp_path: Path) -> None:
    """With β = 1: Σ sent + e_T = Σ Δ, and with outer SGD(1) θ_0 − θ_T is the mean of what was sent.

    Tensors are told apart by their shapes. Each worker sends each of them once in a round, so that the last N errors
    are those that are left.
    """
    Watched.seen.clear()
    algorithm = StreamingDiloco(2, delay=0, alpha=0.0) if streams else Diloco()
    ours = train(tmp_path, codec=Watched(ErrorFeedback(Statistical(2), 1.0)), algorithm=algorithm, **MEAN[0])
    first = start().state_dict()
    shapes = {p.shape for p in first.values()}
    assert len(shapes) == len(NAMES)
    for name, value in first.items():
        seen = [row for row in Watched.seen if row[0].shape == value.shape]
        assert len(seen) >= 2 * WORKERS
        given, arrived, left = (torch.stack(rows) for rows in zip(*seen, strict=True))
        assert left[-WORKERS:].abs().max() > 1e-4
        torch.testing.assert_close(arrived.sum(0) + left[-WORKERS:].sum(0), given.sum(0), rtol=0, atol=1e-12)
        torch.testing.assert_close(value - ours.theta[name], arrived.sum(0) / WORKERS, rtol=0, atol=1e-12)
