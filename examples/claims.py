"""The thirteen published orderings, as comparisons of the runs in ``ordering_runs.py``. Written before any was trained.

Losses are those of θ after the last synchronisation, unless a value says otherwise. A claim may be tried in several
places (trials); each has a verdict of its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from judging import Comparison, about_equal, at_most, in_order, lower, much_lower, not_far_above
from ordering_runs import LONG


@dataclass(frozen=True)
class Value:
    """A number of a run.

    Attributes:
        run: its name.
        metric: column of the comparison's data.
        final: of the validation after the fit; else of the last one before it.
    """

    run: str
    metric: str = "val_loss"
    final: bool = True


@dataclass(frozen=True)
class Trial:
    """A place where a claim is tried.

    Attributes:
        task: name of the task.
        setting: what N, H, outer optimizer and batch are, as far as the labels don't say it.
        values: label → what is compared.
        comparisons: of labels.
        times: how many times the task's steps the runs have.
        variant: what sets it apart from other trials of the claim on the task.
        quantity: what the numbers are; None: the task's loss.
    """

    task: str
    setting: str
    values: Mapping[str, Value]
    comparisons: tuple[Comparison, ...]
    times: int = 1
    variant: str = ""
    quantity: str | None = None


@dataclass(frozen=True)
class Claim:
    """A published ordering, and where it is tried."""

    id: str
    text: str
    source: str
    trials: tuple[Trial, ...] = field(repr=False)


def labelled(named: Mapping[str, str]) -> dict[str, Value]:
    """Label → run, of runs whose final losses are compared."""
    return {label: Value(run) for label, run in named.items()}


PER_WORKER = {"digits": "batch 8 per worker", "byte_gpt": "batch 4 per worker"}
TOTAL = {"digits": "total batch 32 in every run", "byte_gpt": "total batch 16 in every run"}
BOTH = ("digits", "byte_gpt")
MOMENTA = ("0.9", "0.5")


def outer_optimizer(task: str, long: bool = False) -> Trial:
    """Of A1."""
    end = ", long" if long else ""
    return Trial(
        task,
        f"N=4, H=20, {PER_WORKER[task]}",
        labelled({"Nesterov 0.7/0.9": f"momentum 0.9{end}", "SGD(1)": f"plain average{end}"}),
        (lower("Nesterov 0.7/0.9", "SGD(1)"),),
        times=LONG if long else 1,
    )


def intervals(task: str) -> Trial:
    """Of A2."""
    labels = [f"H={interval}" for interval in (1, 5, 10, 30, 100)]
    return Trial(
        task,
        f"N=4, outer 0.7/0.9, {TOTAL[task]}",
        {label: Value(f"momentum 0.9, {label}") for label in labels},
        (*(lower(label, "H=1") for label in labels[1:]), *in_order(at_most, labels[1:])),
    )


def split_batch(task: str) -> Trial:
    """Of A3."""
    split = {f"N={n}": f"N={n}, total batch of four" for n in (2, 8)}
    named = {"DP": "data parallel", "N=2": split["N=2"], "N=4": "momentum 0.5", "N=8": split["N=8"]}
    return Trial(
        task, f"H=20, outer 0.7/0.5, {TOTAL[task]}", labelled(named), in_order(at_most, ["DP", "N=2", "N=4", "N=8"])
    )


def wire(task: str) -> Trial:
    """Of A8."""
    formats = ("bf16", "int8", "fp4")
    return Trial(
        task,
        f"N=4, H=20, outer 0.7/0.5, {PER_WORKER[task]}",
        labelled({"fp32": "momentum 0.5", **{name: name for name in formats}}),
        tuple(about_equal("fp32", name) for name in formats),
    )


def error_feedback(task: str, codec: str) -> Trial:
    """Of A9."""
    return Trial(
        task,
        f"N=4, H=20, outer 0.7/0.5, {PER_WORKER[task]}",
        labelled({"with EF": f"{codec}, error feedback", "without": codec, "fp32": "momentum 0.5"}),
        (much_lower("with EF", "without"),),
        variant=codec,
    )


def compression(task: str) -> Trial:
    """Of A10."""
    return Trial(
        task,
        f"about half a byte per parameter, N=4, H=20, outer 0.7/0.5, {PER_WORKER[task]}",
        labelled({"fp4": "fp4", "top-k": "largest 6 of 64", "random": "random 1/8"}),
        (*in_order(lower, ["fp4", "top-k", "random"]), lower("fp4", "random")),
    )


def streaming(task: str, never: str) -> Trial:
    """Of A13."""
    delays = {f"τ={delay}": f"streaming, τ={delay}" for delay in (0, 1, 5, 10)}
    rest = f"{never} never"
    return Trial(
        task,
        f"3 fragments, N=4, H=30, outer 0.4/0.9, {PER_WORKER[task]}",
        labelled({**delays, "all layers": "all layers", rest: "one layer never"}),
        (*(about_equal("τ=0", label) for label in list(delays)[1:]), much_lower("all layers", rest)),
    )


def overlap(task: str, momentum: str) -> Trial:
    """Of A14."""
    named = {"sync": f"momentum {momentum}"}
    named |= {name: f"{name}, momentum {momentum}" for name in ("eager", "delayed")}
    return Trial(
        task,
        f"N=4, H=20, outer 0.7/{momentum}, {PER_WORKER[task]}",
        labelled(named),
        (at_most("sync", "eager"), much_lower("eager", "delayed")),
        variant=f"outer momentum {momentum}",
    )


def asynchronous(momentum: str) -> Trial:
    """Of A15."""
    named = {"sync": f"momentum {momentum}", "async Nesterov": f"asynchronous, momentum {momentum}"}
    return Trial(
        "digits",
        f"speeds 4:3:2:1, H=20, outer 0.7/{momentum}, batch 8 per worker, as many steps of all workers together",
        labelled({**named, "DN + DyLU": f"delayed Nesterov, DyLU, momentum {momentum}"}),
        (much_lower("sync", "async Nesterov"), about_equal("sync", "DN + DyLU")),
        variant=f"outer momentum {momentum}",
    )


MORE_WORKERS = Trial(
    "digits",
    "H=20, outer 0.7/0.5, batch 8 per worker",
    labelled({"N=16": "N=16", "N=8": "N=8", "N=4": "momentum 0.5", "N=1": "one worker"}),
    in_order(lower, ["N=16", "N=8", "N=4", "N=1"]),
)
COSINES = Trial(
    "digits",
    "non-iid: Dirichlet(0.1) over labels; H=20, outer 0.7/0.5, batch 8 per worker",
    {
        label: Value(run, "cosine")
        for label, run in {
            "N=8, non-iid": "N=8, non-iid",
            "N=4, non-iid": "N=4, non-iid",
            "N=8, iid": "N=8",
            "N=4, iid": "momentum 0.5",
        }.items()
    },
    tuple(
        lower(a, b, relative=False)
        for a, b in (
            ("N=4, non-iid", "N=4, iid"),
            ("N=8, non-iid", "N=8, iid"),
            ("N=8, iid", "N=4, iid"),
            ("N=8, non-iid", "N=4, non-iid"),
        )
    ),
    quantity="mean cosine between workers' Δ",
)
LOST = Trial(
    "digits",
    "N=4, H=20, outer 0.7/0.5, batch 8 per worker",
    labelled({"p=0": "momentum 0.5", **{f"p={p}": f"{p:.0%} lost" for p in (0.1, 0.3, 0.5)}}),
    (*in_order(at_most, ["p=0", "p=0.1", "p=0.3", "p=0.5"]), not_far_above("p=0", "p=0.5", 5.0)),
)
EVALUATED = Trial(
    "digits",
    "10 steps after a synchronisation, N=4, H=20, outer 0.7/0.5, batch 8 per worker",
    {
        "outer": Value("validated in mid-round", "val_loss/outer", final=False),
        "mean": Value("validated in mid-round", final=False),
        "replica": Value("validated in mid-round", "val_loss/worker_0", final=False),
    },
    (at_most("outer", "mean"), lower("mean", "replica")),
)

CLAIMS = (
    Claim(
        "A1",
        "Outer Nesterov is better than plain averaging",
        "2311.08105",
        (*map(outer_optimizer, BOTH), *(outer_optimizer(task, long=True) for task in BOTH)),
    ),
    Claim(
        "A2", "H=1 is worst with momentum 0.9; from 5 on the loss doesn't fall", "2503.09799", (*map(intervals, BOTH),)
    ),
    Claim("A3", "Same data: data parallel ≤ 2 ≤ 4 ≤ 8 workers", "2503.09799", (*map(split_batch, BOTH),)),
    Claim("A4", "Same steps per worker: 16 < 8 < 4 < 1 workers", "2311.08105", (MORE_WORKERS,)),
    Claim("A6", "Cosine lower for non-iid data, and for more workers", "2311.08105", (COSINES,)),
    Claim("A7", "Lost messages: a monotone and mild rise", "2311.08105", (LOST,)),
    Claim("A8", "fp32, bf16, int8 and fp4 end alike", "2501.18512, 2412.01152", (*map(wire, BOTH),)),
    Claim(
        "A9",
        "2 bits need error feedback",
        "2508.15706, 2505.23725",
        tuple(error_feedback(t, c) for t in BOTH for c in ("2 bits over 6σ", "2 bits from least to most")),
    ),
    Claim("A10", "Quantising < top-k < random dropping", "2501.18512", (*map(compression, BOTH),)),
    Claim(
        "A13",
        "Streaming: τ up to 10 costs nothing; layers that never synchronise, much",
        "2501.18512",
        (streaming("digits", "net.3"), streaming("byte_gpt", "blocks.1")),
    ),
    Claim("A14", "Synchronous ≤ eager ≪ delayed", "2502.12996", tuple(overlap(t, m) for t in BOTH for m in MOMENTA)),
    Claim("A15", "Asynchronous Nesterov ≫ synchronous ≈ DN + DyLU", "2401.09135", (*map(asynchronous, MOMENTA),)),
    Claim("A18", "Outer model ≤ mean of replicas < one replica", "2501.18512", (EVALUATED,)),
)
