"""A local step of N workers against N steps of the plain Trainer, and against a hand-written loop over N models.

CPU seconds of the process with one thread, the fastest tenth of the steps. Per repeat the three take turns, each as a
fit of its own; no outer step falls into a timed step. The plain Trainer pays for fetching, hooks and logging in every
step, N workers once.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tests.benchmarks.rows import Row
from tests.benchmarks.workloads import (
    WARM_UP,
    cnn,
    fitted,
    gpt,
    images,
    local_steps,
    looped,
    mlp,
    seconds_per_step,
    text,
)


@dataclass(frozen=True)
class Case:
    """A model and a number of workers.

    Attributes:
        steps: timed steps of N workers; the plain Trainer takes N times as many.
        goal, goal_by_hand: of the two ratios.
        clip: of the gradients' norm.
    """

    name: str
    make: Callable[[], Any]
    data: Callable[[], Any]
    workers: int
    steps: int
    goal: float
    goal_by_hand: float | None = None
    clip: float = 0.0


CASES = (
    Case("MLP 784-128-10, N = 4", mlp, images, 4, 60, 0.95),
    Case("MLP 784-128-10, N = 16", mlp, images, 16, 24, 0.90, 1.6),
    Case("CNN 106 k, N = 4", cnn, images, 4, 24, 0.98, 1.15),
    Case("CNN 106 k, N = 16", cnn, images, 16, 10, 0.98),
    Case("byte GPT 1 M, N = 4", gpt, text, 4, 8, 1.01, clip=1.0),
)


def rows(repeats: int) -> Iterator[Row]:
    for case in CASES:
        n, data = case.workers, case.data()
        measured: dict[str, list[float]] = {"plain": [], "ours": [], "by hand": []}
        options = {"gradient_clip_val": case.clip} if case.clip else {}

        def measure(which: str, case: Case = case, n: int = n, data: Any = data, options: Any = options) -> float:
            if which == "by hand":
                return seconds_per_step(looped(case.make, data, n, WARM_UP + case.steps, case.clip))
            strategy, steps = ("auto", n * case.steps) if which == "plain" else (local_steps(n), case.steps)
            return (n if which == "plain" else 1) * fitted(case.make(), data, strategy, steps, **options)

        for repeat in range(repeats):
            for which in list(measured) if repeat % 2 else list(measured)[::-1]:
                measured[which].append(1000 * measure(which))
        ours = measured["ours"]
        yield Row(f"step, {case.name}", f"{n} plain Lightning steps", ours, measured["plain"], "ms", case.goal)
        yield Row(f"step, {case.name}", "hand-written loop", ours, measured["by hand"], "ms", case.goal_by_hand)
