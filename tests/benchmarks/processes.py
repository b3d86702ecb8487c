"""What a second process brings on CPUs, and what it costs to start it.

* The byte GPT of 1 M parameters, N = 4, in one process and in two (``Trainer(devices=2)``) with one thread each; a
  hand-written loop that steps two models in each of two processes, without Lightning, is the bound. Wall-clock time
  from the end of a local step to the end of the next, the fastest tenth. An outer step falls into no timed step.
* Start-up: the time from the command to the end of the first step beyond that of one process, for a process that runs
  the script once more when the fit begins ("popen", the default of scripts), for two that ``torchrun`` starts at the
  same time, and for a copy of the process ("fork"). A started script imports everything again: so the times stand
  beside how long Python takes for ``import lightning`` alone.

Needs two idle cores. All processes are started afresh for every repeat, and the ways take turns.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator

import lightning as L
import torch

from lightning_diloco import DilocoStrategy
from tests.benchmarks.rows import Row, result, start
from tests.benchmarks.workloads import WARM_UP, Marks, gpt, looped, quiet, seconds_per_step, text, trainer

WORKERS, STEPS = 4, 24
WAYS = {"one": (1, "popen", STEPS), "two": (2, "popen", STEPS), "torchrun": (2, "popen", 1), "fork": (2, "fork", 1)}
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


class Report(Marks):
    """Prints the seconds per local step, and the time of the first one's end; the process that started others can't."""

    def __init__(self) -> None:
        super().__init__(time.time)

    def on_train_end(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.is_global_zero:
            step = seconds_per_step(self.marks) if len(self.marks) > STEPS // 2 else 0.0
            print(json.dumps({"step": step, "first": self.marks[0]}), flush=True)


def lightning(devices: int, method: str, steps: int) -> None:
    module, data = gpt(), text()
    strategy = DilocoStrategy(WORKERS, 10**6, final_sync=False, start_method=method)
    trainer(strategy, steps, devices=devices, gradient_clip_val=1.0, callbacks=Report()).fit(module, data)


def by_hand() -> None:
    marks = looped(gpt, text(), WORKERS // 2, WARM_UP + STEPS, clip=1.0, clock=time.perf_counter)
    print(json.dumps({"step": seconds_per_step(marks)}), flush=True)


def rows(repeats: int) -> Iterator[Row]:
    steps: dict[str, list[float]] = {"one": [], "two": [], "hand": []}
    first: dict[str, list[float]] = {way: [] for way in WAYS}
    imports: list[float] = []
    for _ in range((repeats + 1) // 2):  # each starts Python ten times, most of whose time is imports
        for name, way in WAYS.items():
            begun = time.time()
            measured = result(start("processes", *way, launcher=TORCHRUN if name == "torchrun" else ()))
            first[name].append(measured["first"] - begun)
            if name in steps:
                steps[name].append(1000 * measured["step"])
        pair = [start("processes", "hand") for _ in range(2)]
        steps["hand"].append(max(1000 * result(p)["step"] for p in pair))
        begun = time.time()
        subprocess.run([sys.executable, "-c", "import lightning"], check=True)
        imports.append(time.time() - begun)
    name = "step, byte GPT 1 M, N = 4, two processes"
    yield Row(name, "hand-written, two processes", steps["two"], steps["hand"], "ms", 1.06)
    yield Row(name, "one process", steps["two"], steps["one"], "ms", 0.50)
    for way, what in (
        ("two", 'script started once more ("popen")'),
        ("torchrun", "both scripts started by torchrun"),
        ("fork", 'copy of the process ("fork")'),
    ):
        beyond = [two - one for two, one in zip(first[way], first["one"], strict=True)]
        yield Row(f"second process, {what}", "`import lightning`", beyond, imports, "s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("way", nargs="+", metavar="DEVICES METHOD STEPS | hand")
    way = parser.parse_args().way
    quiet()
    torch.set_num_threads(1)
    if way == ["hand"]:
        by_hand()
    else:
        lightning(int(way[0]), way[1], int(way[2]))


if __name__ == "__main__":
    main()
