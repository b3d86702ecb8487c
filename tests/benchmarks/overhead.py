"""What DiLoCo costs beyond its N workers: time per step and memory per worker, as ratios taken in one run.

* step time: a Lightning step with N workers against N times the plain Trainer's, from end of step to end of step, in
  blocks that alternate between the two in one process with one thread. CPU time of the process, so that other people's
  load counts less; a block gives the median of its steps, a pair of blocks a ratio, and the median of those is shown.
  No outer step falls into a timed step: its cost is told apart. A tiny model shows the fixed cost of a worker's turn.
* memory: growth of a process per worker beyond the second, fitted over N = 2, 4, 8 with a process each, against a
  worker's parameters and inner optimizer state; between steps, and at the peak, which includes outer steps. Linux only.

Run ``python tests/benchmarks/overhead.py``: about two minutes; ``--only time`` or ``--only memory`` for a half.
"""

import argparse
import importlib
import itertools
import json
import logging
import re
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

import lightning as L
import torch

from lightning_diloco import DilocoCallback, DilocoStrategy

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
byte_gpt = importlib.import_module("byte_gpt")

MODELS = {  # arguments of examples/byte_gpt.py
    "1 M parameters": "--megabytes 0.3",
    "tiny": "--megabytes 0.3 --layers 1 --width 16 --heads 2 --context 16",
    "20 MB": "--megabytes 0.3 --layers 6 --width 256 --heads 4 --context 16 --batch-size 1",
}
WARM_UP = 4  # steps at the start of a block that aren't timed


class Watch(DilocoCallback):
    """CPU seconds at the end of every step, seconds of every outer step, resident memory after the last step."""

    def __init__(self) -> None:
        super().__init__()
        self.marks: list[float] = []
        self.outer: list[float] = []
        self.resident = 0

    def setup(self, trainer, pl_module, stage) -> None:
        pass  # a plain Trainer is watched too

    def on_train_batch_end(self, trainer, *_) -> None:
        self.marks.append(time.process_time())
        if trainer.global_step == trainer.max_steps:
            self.resident = memory("VmRSS")

    def on_outer_step(self, trainer, pl_module, report) -> None:
        self.outer.append(report.seconds)

    def step(self) -> float:
        marks = self.marks[WARM_UP:]
        return statistics.median(b - a for a, b in itertools.pairwise(marks))


def fit(
    model: L.LightningModule, loader: object, strategy: str | DilocoStrategy, steps: int
) -> tuple[Watch, L.Trainer]:
    watch = Watch()
    trainer = L.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        gradient_clip_val=1.0,
        callbacks=watch,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, loader)
    return watch, trainer


def report(what: str, ratio: float, remark: str) -> None:
    print(f"{what:<58}{ratio:>8.3f}   {remark}", flush=True)


def compare_time(name: str, workers: int, blocks: int, steps: int, goal: str) -> None:
    """Alternates blocks of plain and DiLoCo steps of one model."""
    model, data = byte_gpt.build(byte_gpt.parse(MODELS[name].split()))
    loader = data.train_dataloader()
    ratios, plain_steps, outer = [], [], []
    for block in range(blocks):
        runs = {"auto": workers * steps, DilocoStrategy(num_nodes=workers, diloco_interval=10**9): steps}
        order = list(runs) if block % 2 else list(runs)[::-1]
        watches = {strategy: fit(model, loader, strategy, WARM_UP + runs[strategy])[0] for strategy in order}
        plain, diloco = (watches[strategy] for strategy in runs)
        ratios.append(diloco.step() / (workers * plain.step()))
        plain_steps.append(plain.step())
        outer += diloco.outer  # the flush at the end
    step = statistics.median(plain_steps)
    low, _, high = statistics.quantiles(ratios, n=4)
    remark = f"{goal}; half of the blocks in {low:.3f} … {high:.3f}; plain step {1e3 * step:.2f} ms"
    report(f"step time, {name}, N = {workers}, over N plain steps", statistics.median(ratios), remark)
    report(f"one outer step, {name}, over one plain step", statistics.median(outer) / step, "once every H steps")


def memory(field: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process in bytes; unlike ``ru_maxrss`` not inherited from the parent."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def measure_memory(workers: int) -> dict[str, int]:
    """Memory of this process in two rounds of two steps, and what one worker has to hold."""
    model, data = byte_gpt.build(byte_gpt.parse(MODELS["20 MB"].split()))
    loader = data.train_dataloader()
    averaging = {"lr": 1.0} if workers == 1 else None  # one worker, plain average: the plain run
    strategy = DilocoStrategy(num_nodes=workers, diloco_interval=2, outer_optimizer_kwargs=averaging)
    watch, trainer = fit(model, loader, strategy, steps=4)
    state = [tensor for values in trainer.optimizers[0].state.values() for tensor in values.values()]
    worker = sum(t.nbytes for t in [*model.parameters(), *state])
    return {"between steps": watch.resident, "peak": memory("VmHWM"), "worker": worker}


def compare_memory() -> None:
    """One process per number of workers, and the slopes of their memory."""
    found = {}
    for workers in (1, 2, 4, 8):
        command = [sys.executable, __file__, "--measure-memory", str(workers)]
        found[workers] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    for what in ("between steps", "peak"):
        slope = statistics.linear_regression([2, 4, 8], [found[n][what] for n in (2, 4, 8)]).slope
        each = ", ".join(f"{found[n][what] / 1e6:.0f}" for n in found)
        worker = found[1]["worker"]
        remark = f"goal ≤ 1.1; {slope / 1e6:.1f} MB over {worker / 1e6:.1f} MB; N = 1, 2, 4, 8: {each} MB"
        report(f"memory {what} per extra worker, over its state", slope / worker, remark)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["time", "memory"])
    parser.add_argument("--workers", type=int, default=4, help="N of the step times")
    parser.add_argument("--blocks", type=int, default=12, help="pairs of blocks")
    parser.add_argument(
        "--steps", type=int, default=12, help="steps in a block of DiLoCo; a plain one has N times as many"
    )
    parser.add_argument("--measure-memory", type=int, metavar="N", help=argparse.SUPPRESS)  # what compare_memory starts
    args = parser.parse_args(argv)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if args.measure_memory:
        print(json.dumps(measure_memory(args.measure_memory)))
        return
    if args.only != "memory":
        compare_time("1 M parameters", args.workers, args.blocks, args.steps, "goal ≤ 1.05")
        compare_time("tiny", args.workers, args.blocks, 5 * args.steps, "no goal")
    if args.only != "time":
        compare_memory()


if __name__ == "__main__":
    main()
