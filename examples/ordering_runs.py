"""What ``orderings.py`` trains: two tasks and their runs, of which a claim compares a few.

Runs have four workers (N), rounds of 20 local steps (H) and the outer optimizer SGD with learning rate 0.7 and Nesterov
momentum 0.5, batches of 8 images or 4 windows per worker and step, unless their entry says otherwise. Momentum 0.5
because the published 0.9 is made for many more rounds than fit into an hour; where a paper's claim is about the outer
momentum, both are there.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import lightning as L
from byte_gpt import ByteGPT, LibraryText
from digits import DigitsCNN, DigitsData
from typing_extensions import override

from lightning_diloco import (
    FP4,
    Cast,
    Cluster,
    DataParallel,
    Delayed,
    DelayedNesterov,
    DilocoCallback,
    DilocoStrategy,
    DropOut,
    Eager,
    ErrorFeedback,
    Int8,
    RandomK,
    Statistical,
    StreamingDiloco,
    SyncAlgorithm,
    TopK,
    Uniform,
)
from lightning_diloco.comparison import Run
from lightning_diloco.partitions import Dirichlet

PAPER = {"lr": 0.7, "momentum": 0.9, "nesterov": True}
SHORT = {"lr": 0.7, "momentum": 0.5, "nesterov": True}
AVERAGE = {"lr": 1.0}
BASE: dict[str, Any] = {"num_nodes": 4, "diloco_interval": 20, "outer_optimizer_kwargs": SHORT}
LONG = 3
"""A long run has this many times the steps."""
STEP_SECONDS = [1.0, 4 / 3, 2.0, 4.0]
"""Of asynchronous workers: in four seconds they make 4, 3, 2 and 1 steps."""


class MeanCosine(L.Callback):
    """Logs, with every validation, the mean over the outer steps so far of the cosine between workers' Δ_i."""

    @override
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        reports = trainer.strategy.reports if isinstance(trainer.strategy, DilocoStrategy) else []
        cosines = [report.cosine for report in reports if report.cosine is not None]
        if cosines:
            pl_module.log("cosine", sum(cosines) / len(cosines))


class Partly(SyncAlgorithm):
    """DiLoCo in which some layers are never synchronised: every worker trains its own.

    θ of these layers stays as it was at the beginning. Others therefore see the mean of the workers, which for the
    synchronised layers is θ, and for the rest the kindest choice of a single model.

    Args:
        never: beginnings of the names of parameters that stay at home; none: DiLoCo.
    """

    outer_defaults = StreamingDiloco.outer_defaults
    published: ClassVar[Literal["outer", "average"]] = "average"

    def __init__(self, never: Sequence[str] = ()) -> None:
        self.never = tuple(never)

    @override
    def after_inner_step(self, step: int) -> None:
        ctx = self.ctx
        if ctx.due(step):
            ctx.send([name for name in ctx.names if not name.startswith(self.never)], ctx.delta)
        for transfer in ctx.arrived():
            ctx.outer.step(transfer.names, transfer.mean)
            ctx.merge(transfer.workers, transfer.names, ctx.outer.tensors)


def asynchronous(outer: dict[str, Any], lr: float, **arguments: Any) -> DilocoStrategy:
    """Four workers of different speeds; nobody waits, and messages take no time."""
    return DilocoStrategy(
        len(STEP_SECONDS),
        BASE["diloco_interval"],
        algorithm=DelayedNesterov(**arguments),
        outer_optimizer_kwargs={**outer, "lr": lr},
        cluster=Cluster(step_seconds=STEP_SECONDS, bandwidth_gbit_s=1, latency_ms=0),
    )


def common_runs(batch_size: int, fragments: int, never: str) -> dict[str, Any]:
    """The runs that both tasks have."""
    streaming = {"num_nodes": 4, "diloco_interval": 30}
    codecs = {
        "bf16": Cast("bf16"),
        "int8": Int8(),
        "fp4": FP4(),
        "2 bits over 6σ": Statistical(2),
        "2 bits over 6σ, error feedback": ErrorFeedback(Statistical(2)),
        "2 bits from least to most": Uniform(2),
        "2 bits from least to most, error feedback": ErrorFeedback(Uniform(2)),
        "random 1/8": RandomK(1 / 8),
        "largest 6 of 64": TopK(64, 6),
    }
    return {
        "momentum 0.5": BASE,
        "momentum 0.9": {**BASE, "outer_optimizer_kwargs": PAPER},
        "plain average": {**BASE, "outer_optimizer_kwargs": AVERAGE},
        "momentum 0.9, long": Run({**BASE, "outer_optimizer_kwargs": PAPER}, times=LONG),
        "plain average, long": Run({**BASE, "outer_optimizer_kwargs": AVERAGE}, times=LONG),
        **{
            f"momentum 0.9, H={interval}": {**BASE, "diloco_interval": interval, "outer_optimizer_kwargs": PAPER}
            for interval in (1, 5, 10, 30, 100)
        },
        "data parallel": {"num_nodes": 4, "algorithm": DataParallel()},
        "N=2, total batch of four": Run({**BASE, "num_nodes": 2}, data={"batch_size": 2 * batch_size}),
        "N=8, total batch of four": Run({**BASE, "num_nodes": 8}, data={"batch_size": batch_size // 2}),
        **{name: {**BASE, "codec": codec} for name, codec in codecs.items()},
        **{
            f"streaming, τ={delay}": {**streaming, "algorithm": StreamingDiloco(fragments, delay)}
            for delay in (0, 1, 5, 10)
        },
        "all layers": {**streaming, "algorithm": Partly()},
        "one layer never": {**streaming, "algorithm": Partly([never])},
        **{
            f"{algorithm.__name__.lower()}, momentum {outer['momentum']}": {
                **BASE,
                "algorithm": algorithm(),
                "outer_optimizer_kwargs": outer,
            }
            for algorithm in (Eager, Delayed)
            for outer in (PAPER, SHORT)
        },
    }


def digits_runs(steps: int) -> dict[str, Any]:
    """The runs of the CNN; ``steps`` is the length of most of them."""
    validated = DilocoCallback(validate_on=("outer", 0), summary=False, hints=False, progress_bar=False)
    in_mid_round = {"val_check_interval": steps - BASE["diloco_interval"] // 2, "callbacks": [validated]}
    share = sum(STEP_SECONDS[0] / seconds for seconds in STEP_SECONDS) / len(STEP_SECONDS)
    as_many_in_all = {"max_steps": round(steps / share), "val_check_interval": round(steps / share)}
    workers = len(STEP_SECONDS)
    apart = Dirichlet(0.1)
    return {
        **common_runs(batch_size=8, fragments=3, never="net.3"),
        "one worker": "plain",
        "N=8": {**BASE, "num_nodes": 8},
        "N=16": {**BASE, "num_nodes": 16},
        "N=4, non-iid": {**BASE, "partition": apart},
        "N=8, non-iid": {**BASE, "num_nodes": 8, "partition": apart},
        **{f"{p:.0%} lost": {**BASE, "participation": DropOut(p)} for p in (0.1, 0.3, 0.5)},
        "validated in mid-round": Run(BASE, trainer=in_mid_round),
        **{
            f"{name}, momentum {outer['momentum']}": Run(
                partial(asynchronous, outer, outer["lr"] / per_round, **arguments), trainer=as_many_in_all
            )
            for outer in (PAPER, SHORT)
            for name, per_round, arguments in (
                ("asynchronous", workers, {"buffer_size": 1, "dylu": False}),
                ("delayed Nesterov, DyLU", 1, {}),
            )
        },
    }


def byte_gpt_runs(steps: int) -> dict[str, Any]:
    """The runs of the byte GPT."""
    return common_runs(batch_size=4, fragments=3, never="blocks.1")


class Task(NamedTuple):
    """What is trained, for how many local steps, and in which runs."""

    title: str
    unit: str
    steps: int
    runs: Callable[[int], dict[str, Any]]
    module: Callable[..., L.LightningModule]
    data: Callable[..., Any]
    trainer: dict[str, Any]


TASKS = {
    "digits": Task(
        "CNN on digits",
        "test loss",
        500,
        digits_runs,
        partial(DigitsCNN, lr=2e-3),
        partial(DigitsData, batch_size=8),
        {},
    ),
    "byte_gpt": Task(
        "byte GPT",
        "validation loss, nats per byte",
        300,
        byte_gpt_runs,
        partial(ByteGPT, layers=2, width=48, heads=4, context=32, lr=3e-3),
        partial(LibraryText, context=32, batch_size=4, megabytes=4.0),
        {"gradient_clip_val": 1.0},
    ),
}


def trainer_arguments(task: Task, steps: int) -> dict[str, Any]:
    """Of the Trainer: validations after the last step, and after the fit."""
    return {
        **{"accelerator": "cpu", "max_steps": steps, "val_check_interval": steps, "check_val_every_n_epoch": None},
        **{"callbacks": [MeanCosine()], **task.trainer},
    }
