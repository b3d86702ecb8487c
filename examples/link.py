"""Is the simulated time right? Two processes on a real, shaped link, and the prediction of a Cluster beside it.

Joins two network namespaces by a virtual cable, shapes both ends to a rate with a token bucket (``tc … tbf``), trains
models in two processes, one per namespace, and measures the seconds from one outer step to the next. A
:class:`lightning_diloco.Cluster` predicts them: H local steps of the measured length, then the transfer. It has two
constants, ``efficiency`` (what headers and TCP leave of the rate) and ``sync_overhead_s`` (what an outer step costs
beside the transfer). They are fitted on the slowest and the fastest rate, and hold for all rates and both models.

Run ``python examples/link.py`` as root on Linux; it needs ``ip`` and ``tc`` (package iproute2). Where namespaces can't
be made it says so, claims nothing, and exits with 0. About five minutes on two idle cores; on busy ones the length of a
local step varies within a run, and no model of the link can be judged.
"""

import argparse
import json
import logging
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import byte_gpt
import lightning as L
import torch

from lightning_diloco import Cluster, DilocoStrategy
from lightning_diloco.cluster.calibration import MeasuredTransfer, calibrate

ENDS = ("diloco-a", "diloco-b")  # the namespaces
CABLES = ("diloco-va", "diloco-vb")
ADDRESSES = ("10.197.31.1", "10.197.31.2")
PORT = "29531"
MODELS = {"byte GPT": (5, 128), "20 MB model": (6, 256)}  # layers, width
OPTIONS = ["--context", "32", "--batch-size", "4", "--megabytes", "1"]


def run(*command: str) -> None:
    """Runs a command; raises with its output if it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"`{' '.join(command)}` failed: {done.stderr.strip() or done.stdout.strip()}")


@contextmanager
def cable() -> Iterator[None]:
    """Two namespaces, joined; they are removed at the end."""
    (a, b), (cable_a, cable_b) = ENDS, CABLES
    try:
        for end in ENDS:
            run("ip", "netns", "add", end)
        peer = ("peer", "name", cable_b, "netns", b)
        run("ip", "link", "add", cable_a, "netns", a, "type", "veth", *peer)
        for end, name, address in zip(ENDS, CABLES, ADDRESSES, strict=True):
            run("ip", "-n", end, "addr", "add", f"{address}/24", "dev", name)
            run("ip", "-n", end, "link", "set", "lo", "up")
            run("ip", "-n", end, "link", "set", name, "up")
        yield
    finally:
        for end in ENDS:
            subprocess.run(["ip", "netns", "del", end], capture_output=True)


def shape(mbit_s: float) -> None:
    """Lets each end send ``mbit_s`` at most; the bucket holds what is sent between two ticks of the kernel's clock."""
    burst = max(64_000, int(mbit_s * 1e6 / 8 * 0.004))
    for end, name in zip(ENDS, CABLES, strict=True):
        rate = ("rate", f"{mbit_s:g}mbit", "burst", f"{burst}b", "latency", "50ms")
        run("tc", "-n", end, "qdisc", "replace", "dev", name, "root", "tbf", *rate)


class Watch(L.Callback):
    """When local steps end."""

    def __init__(self, interval: int) -> None:
        self.interval = interval
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.ends.append(time.perf_counter())

    def measured(self) -> list[tuple[float, float]]:
        """(seconds of a local step, seconds of the round), round by round, from one outer step to the next."""
        h = self.interval
        rounds = []
        for last in range(h - 1, len(self.ends) - h, h):  # the first round opens connections, and isn't measured
            ends = self.ends[last : last + h + 1]
            steps = [b - a for a, b in pairwise(ends[:-1])]  # without the last one, which has the outer step
            rounds.append((statistics.fmean(steps), ends[-1] - ends[0]))
        return rounds


def process(args: argparse.Namespace) -> None:
    """One of the two processes: trains, and writes what it has measured."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    layers, width = MODELS[args.model]
    model, data = byte_gpt.build(byte_gpt.parse([*OPTIONS, "--layers", str(layers), "--width", str(width)]))
    watch = Watch(args.interval)
    strategy = DilocoStrategy(num_nodes=2, diloco_interval=args.interval, diagnostics=False)
    trainer = L.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=1,
        num_nodes=2,
        max_steps=args.interval * (args.rounds + 1),
        limit_val_batches=0,
        callbacks=watch,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, data.train_dataloader())
    payload = strategy.ledger.total_bytes // (args.rounds + 1)
    Path(args.out).write_text(json.dumps({"payload_bytes": payload, "rounds": watch.measured()}))


def measure(model: str, args: argparse.Namespace) -> tuple[int, float, float]:
    """Runs both processes: bytes, and medians over the rounds of the seconds of a local step and of the whole."""
    with tempfile.TemporaryDirectory() as folder:
        started = []
        try:
            for rank, (end, name) in enumerate(zip(ENDS, CABLES, strict=True)):
                place = {"MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": PORT, "GLOO_SOCKET_IFNAME": name}
                place |= {"NODE_RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
                command = ["ip", "netns", "exec", end, sys.executable, __file__, "--out", f"{folder}/{rank}.json"]
                command += ["--model", model, "--interval", str(args.interval), "--rounds", str(args.rounds)]
                started.append(subprocess.Popen(command, env={**os.environ, **place}))
            codes = [p.wait(900) for p in started]
        finally:
            for p in started:
                p.kill()
        if any(codes):
            raise RuntimeError(f"the processes of a run ended with the exit codes {codes}")
        found = [json.loads(Path(f"{folder}/{rank}.json").read_text()) for rank in range(2)]
    pairs = list(zip(*(f["rounds"] for f in found), strict=True))
    steps = [max(step for step, _ in of_round) for of_round in pairs]  # the slower process decides
    return found[0]["payload_bytes"], statistics.median(steps), statistics.median(r for (_, r), _ in pairs)


def report(rows: dict[tuple[str, float], tuple[int, float, float]], args: argparse.Namespace) -> None:
    """Fits the constants on the slowest and the fastest rate, and prints all predictions."""
    h, ends = args.interval, (min(args.rates), max(args.rates))
    transfers = [
        MeasuredTransfer(seconds - h * step, nbytes, 2, rate / 1000)
        for (_, rate), (nbytes, step, seconds) in rows.items()
        if rate in ends
    ]
    fitted = calibrate(transfers, with_overhead=True)
    print(f"\nefficiency {fitted.efficiency:.3f}, sync_overhead_s {fitted.sync_overhead_s:.4f}; H = {h}")
    print("model         Mbit/s        bytes   step s   measured s   simulated s   error")
    for (model, rate), (nbytes, step, seconds) in rows.items():
        cluster = Cluster(
            step_seconds=step,
            bandwidth_gbit_s=rate / 1000,
            latency_ms=0,
            efficiency=fitted.efficiency,
            sync_overhead_s=fitted.sync_overhead_s,
        )
        simulated = h * step + cluster.transfer_seconds(nbytes, [0, 1], "ring")
        error = 100 * (simulated / seconds - 1)
        print(
            f"{model:12}  {rate:6g}  {nbytes:11,}   {step:.4f}   {seconds:10.3f}   {simulated:11.3f}   {error:+.1f} %"
        )


def main(argv: list[str] | None = None) -> None:
    """Measures at every rate, and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=float, nargs="+", default=[50, 200, 1000], help="Mbit/s, two or more")
    parser.add_argument("--interval", type=int, default=10, help="H")
    parser.add_argument("--rounds", type=int, default=9, help="measured rounds per model and rate")
    parser.add_argument("--model", choices=MODELS, help=argparse.SUPPRESS)  # of a process that this script starts
    parser.add_argument("--out", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.out:
        process(args)
        return
    if not all(map(shutil.which, ("ip", "tc"))):
        print("no `ip` and `tc` here: nothing was measured")
        return
    rows = {}
    try:
        with cable():
            shape(args.rates[0])
            for rate in args.rates:
                shape(rate)
                for model in MODELS:
                    rows[model, rate] = measure(model, args)
                    print(f"{model} at {rate:g} Mbit/s: {rows[model, rate][2]:.3f} s per round", flush=True)
    except OSError as error:
        print(f"no network namespaces here: nothing was measured ({error})")
        return
    report(rows, args)


if __name__ == "__main__":
    main()
