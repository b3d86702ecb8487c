"""Memory of a worker, and many workers in one process. Each figure comes from a process of its own. Linux only.

* memory per extra worker: growth of the peak, outer steps included, fitted over N = 2, 4, 8, over a worker's
  parameters and inner optimizer state (byte GPT, 19 MB);
* N = 64 of a model of 10 M parameters: the whole process over N · (parameters + inner state) + two models; the peak
  of an outer step beyond the memory around it, in models; and the CPU time per worker-step (the mean without the
  first step) over that of N = 1, and over that of a hand-written loop, which holds 64 models with their states.

These processes keep freed memory until the last step, whose memory is measured. By itself glibc gives that of a large
model's gradients back to the system in some runs and not in others, whichever code has allocated it, and then up to a
third of a step goes into page faults.
"""

import ctypes
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import lightning as L
import torch

from lightning_diloco import DilocoStrategy
from tests.benchmarks.rows import Row, forget_peak, memory
from tests.benchmarks.workloads import LARGE, SMALL, Marks, gpt, looped, mean_seconds, quiet, text, trainer

MANY = {1: 64, 8: 12, 64: 5}  # workers → local steps, ten to thirty seconds


class Watch(Marks):
    """Also the memory around the outer step that the last step ends with."""

    before = peak = 0

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == trainer.max_steps - 1:
            keep_freed(2**17)
            self.before = memory("VmRSS")

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        super().on_train_batch_end()
        self.peak = memory("VmHWM")


def measure(workers: int, interval: int, steps: int, options: tuple[str, ...]) -> dict[str, float]:
    """A fit that ends with an outer step."""
    quiet()
    torch.set_num_threads(1)
    watch = Watch(time.process_time)
    averaging = {"lr": 1.0} if workers == 1 else None  # one worker, plain average: the plain run
    strategy = DilocoStrategy(num_nodes=workers, diloco_interval=interval, outer_optimizer_kwargs=averaging)
    t = trainer(strategy, steps, callbacks=watch, gradient_clip_val=1.0)
    module, data = gpt(options), text(options)
    bare = memory("VmRSS")

    class OuterPeak(L.Callback):
        """The peak from the last worker's step on, whose activations are gone by then."""

        def on_before_optimizer_step(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == steps - 1 and trainer.strategy.current_worker == workers - 1:
                forget_peak()

    if interval > 2:
        t.callbacks.append(OuterPeak())
    t.fit(module, data)
    state = [tensor for values in t.optimizers[0].state.values() for tensor in values.values()]
    model = sum(p.nbytes for p in module.parameters())
    return {
        "worker": model + sum(s.nbytes for s in state),
        "model": model,
        "bare": bare,
        "before": watch.before,
        "peak": watch.peak,
        "step": mean_seconds(watch.marks[:-1]),
    }


def by_hand(workers: int, steps: int) -> float:
    """Seconds of a step of as many large models in plain PyTorch."""
    quiet()
    torch.set_num_threads(1)
    return mean_seconds(looped(partial(gpt, LARGE), text(LARGE), workers, steps, clip=1.0))


def measured(function: Callable[..., Any], *arguments: Any) -> Any:
    """In a process of its own, forked from one that has imported everything and done nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with context.Pool(1) as pool:
        return pool.apply(_with_freed_memory_kept, (function, *arguments))


def _with_freed_memory_kept(function: Callable[..., Any], *arguments: Any) -> Any:
    keep_freed(2**31 - 1)
    return function(*arguments)


def keep_freed(most: int) -> None:
    """At most so many bytes at the end of glibc's heap from now on; the rest goes back to the system."""
    libc, trim_threshold, mmap_threshold = ctypes.CDLL(None), -1, -3  # of <malloc.h>
    assert libc.mallopt(trim_threshold, most) == libc.mallopt(mmap_threshold, 2**25) == 1, "glibc refuses"
    libc.malloc_trim(most)


def rows(repeats: int) -> Iterator[Row]:
    counts, slopes, states = (2, 4, 8), [], []
    for _ in range((repeats + 1) // 2):  # each starts three processes
        found = [measured(measure, n, 2, 4, SMALL) for n in counts]
        slopes.append(statistics.linear_regression(counts, [f["peak"] for f in found]).slope / 1e6)
        states.append(found[0]["worker"] / 1e6)
    yield Row("memory per extra worker, peak", "parameters + inner state", slopes, states, "MB", 1.03)
    many = {n: measured(measure, n, steps, steps, LARGE) for n, steps in MANY.items()}
    last = max(MANY)
    most = many[last]
    total = most["before"] - most["bare"]
    outer = most["peak"] - most["before"] - most["model"]  # the first outer step's momentum stays
    expected = last * most["worker"] + 2 * most["model"]
    name = f"N = {last}, {most['model'] / 4e6:.1f} M parameters"
    yield Row(
        f"memory, {name}", f"{last} × (parameters + state) + 2 models", [total / 1e9], [expected / 1e9], "GB", 1.03
    )
    yield Row(f"peak of an outer step, {name}", "a model", [outer / 1e6], [most["model"] / 1e6], "MB", 2.0)
    steps = {n: 1000 * found["step"] / n for n, found in many.items()}
    name = f"worker-step, {most['model'] / 4e6:.1f} M parameters, N = "
    for n in sorted(MANY)[1:]:
        yield Row(f"{name}{n}", "N = 1", [steps[n]], [steps[1]], "ms", 1.05)
    hand = 1000 * measured(by_hand, last, MANY[last] - 1) / last  # all but the step that ends with an outer step
    yield Row(f"{name}{last}", "hand-written loop", [steps[last]], [hand], "ms")
