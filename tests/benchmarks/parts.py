"""Where the time of a step goes: microseconds per worker-step, by part, of a tiny model and N = 16.

Parts are measured by wrapping the functions in which they happen, each without the parts inside it, by the process's
CPU time; the wrappers themselves cost about half a microsecond each. What is left of the step is Lightning's loop and
ours around the turns, paid once per step and so divided by N here.

The hand-written loop's forward, backward and arithmetic are the same calls of torch, and yet faster: where other code
runs between them, Lightning's or any, they find the processor's caches cold.
"""

import importlib
import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import lightning as L
import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader

from lightning_diloco._lightning.loops import DilocoEpochLoop
from lightning_diloco._lightning.results import WorkerResults
from lightning_diloco._lightning.turns import WorkerTurns
from lightning_diloco.engine.turns import Turns
from lightning_diloco.strategy import DilocoStrategy
from tests.benchmarks.workloads import WARM_UP, Classifier, images, local_steps, mlp, trainer

WORKERS, STEPS = 16, 40
LOOP, TURN = "Lightning's loop, hooks of callbacks", "swap of the worker's state, its place in the logs"

PARTS: tuple[tuple[Any, str, str], ...] = (  # class, function, part
    (DilocoEpochLoop, "advance", LOOP),
    (CombinedLoader, "__next__", "fetching a batch"),
    (WorkerTurns, "transfer", "moving the batch to the device"),
    (WorkerTurns, "turn", TURN),
    (Turns, "row", TURN),
    (WorkerTurns, "run", "Lightning's closure and optimizer wrappers"),
    (Classifier, "training_step", "forward pass"),
    (L.LightningModule, "log", "self.log"),
    (WorkerResults, "fold", "self.log"),
    (DilocoStrategy, "backward", "backward pass"),
    (torch.optim.AdamW, "zero_grad", "zero_grad"),
    (importlib.import_module("torch.optim.adam"), "adam", "optimizer's arithmetic"),
)


class Clock:
    """CPU seconds by part; a part that begins inside another stops the other's."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = [defaultdict(float)]
        self.running: list[str] = []
        self.at = 0.0

    def switch(self) -> None:
        now = time.process_time()
        if self.running:
            self.steps[-1][self.running[-1]] += now - self.at
        self.at = now

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self.switch()
        self.running.append(name)
        try:
            yield
        finally:
            self.switch()
            self.running.pop()

    def wrapped(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        if hasattr(function, "__wrapped__") and function.__name__ in ("turn", "row"):  # a context manager: its two ends

            @contextmanager
            def around(*args: Any, **kwargs: Any) -> Iterator[None]:
                manager = function(*args, **kwargs)
                with self.part(name):
                    manager.__enter__()
                with ExitStack() as stack:

                    def leave(*error: Any) -> Any:
                        with self.part(name):
                            return manager.__exit__(*error)

                    stack.push(leave)
                    yield

            return around

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return timed


def profile() -> dict[str, float]:
    """Part → microseconds per worker-step, the median over the steps."""
    clock = Clock()

    class Cut(L.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            clock.switch()
            clock.steps.append(defaultdict(float))

    with ExitStack() as stack:
        for owner, name, part in PARTS:
            stack.enter_context(mock.patch.object(owner, name, clock.wrapped(getattr(owner, name), part)))
        trainer(local_steps(WORKERS), WARM_UP + STEPS, callbacks=Cut()).fit(mlp(), images())
    steps = clock.steps[WARM_UP:-1]
    names = dict.fromkeys(part for *_, part in PARTS)
    return {n: 1e6 * statistics.median(step[n] for step in steps) / WORKERS for n in names}


def by_hand() -> dict[str, float]:
    """The same of the hand-written loop."""
    models = [mlp() for _ in range(WORKERS)]
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3) for m in models]
    batches = itertools.chain.from_iterable(itertools.repeat(images()))
    steps: list[dict[str, float]] = []
    for _ in range(WARM_UP + STEPS):
        steps.append(defaultdict(float))
        for model, optimizer in zip(models, optimizers, strict=True):
            marks = [time.process_time()]
            batch = next(batches)
            marks.append(time.process_time())
            loss = model.loss(batch)
            marks.append(time.process_time())
            optimizer.zero_grad()
            marks.append(time.process_time())
            loss.backward()
            marks.append(time.process_time())
            optimizer.step()
            marks.append(time.process_time())
            names = ("fetching a batch", "forward pass", "zero_grad", "backward pass", "optimizer's arithmetic")
            for name, (a, b) in zip(names, itertools.pairwise(marks), strict=True):
                steps[-1][name] += b - a
    return {n: 1e6 * statistics.median(step[n] for step in steps[WARM_UP:]) / WORKERS for n in steps[-1]}


def table() -> str:
    ours, hand = profile(), by_hand()
    lines = [f"µs per worker-step, MLP 784-128-10, batch 16, N = {WORKERS}{'':<14}ours  by hand"]
    for name, value in sorted(ours.items(), key=lambda item: -item[1]):
        lines.append(f"{name:<60}{value:>8.0f}{hand.get(name, 0):>9.0f}")
    lines.append(f"{'all':<60}{sum(ours.values()):>8.0f}{sum(hand.values()):>9.0f}")
    return "\n".join(lines)
