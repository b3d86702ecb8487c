"""What a user would pick instead of DilocoStrategy, side by side in one run: speed, start-up, memory, lines.

All train the byte GPT of ``examples/byte_gpt.py`` on the same batches: N workers, AdamW with gradients clipped at 1.0,
and every H local steps Nesterov SGD (lr 0.7, momentum 0.9) on the mean of the pseudo-gradients; DDP synchronises every
step instead. The ways are the files of ``ways/``; one whose package isn't installed is left out by name
(torchft: ``pip install torchft``, no dependency of this project). Every run has fresh processes with one thread each.
Ways with one process per worker run like for like with DilocoStrategy in as many processes: N = 2 by default.

* worker-steps/s: a worker-step is one worker's forward, backward and inner step; all of them from the end of the first
  round to the end of the last, outer steps included, over the wall-clock seconds of process 0.
* CPU ms/worker-step: CPU time of all processes in the same span; other people's load counts less.
* start-up: from the launch of the command to the end of the first local step of process 0. Lightning starts its further
  processes itself, one after another; those of the other ways are started side by side, as torchrun would, but without
  its agent. Ways that don't need Lightning don't import it.
* memory: sum over the processes of the peak of resident memory (VmHWM, Linux only; pages of shared libraries count in
  each), at the end of training. torchft's lighthouse, a server that its groups need, is a process, too.
* loss: nats per byte of θ on held-out windows; weights apart: the largest difference of a weight from the first way
  with a loop by hand, none for DDP, which does another thing. Rounding grows in float32, most of all where the outer
  momentum overshoots (H < 50): ``--dtype float64`` tells it from a difference.
* lines: of the way's files, as formatted here, without blank lines, comments, docstrings, and lines marked
  ``# measuring``; model and data are extra.

Medians over the repeats, and the range; the ways take turns. Needs two idle cores: ``python -m
tests.benchmarks.alternatives`` takes five to ten minutes. The exit status is 1 if a way failed.
"""

import argparse
import ast
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WAYS_FOLDER = Path(__file__).parent / "ways"
LIMIT = 300  # seconds that a run may take


@dataclass(frozen=True)
class Way:
    """One row.

    Args:
        processes: None: one per worker.
        launch: who starts its processes: the way "itself", or this script with the environment that torchrun gives to
            the ranks of one job ("ranks") or to torchft's replica "groups" of one process.
        files: the script, and others whose lines count.
        package: what must be installed.
        same: its result is that of DiLoCo.
    """

    processes: int | None
    launch: str
    files: tuple[str, ...]
    package: str = "torch"
    same: bool = True


BY_HAND = "by hand, 1 process"  # its weights are what the others' are compared with
WAYS = {
    "DilocoStrategy, 1 process": Way(1, "itself", ("diloco.py",)),
    "DilocoStrategy, 2 processes": Way(2, "itself", ("diloco.py",)),
    BY_HAND: Way(1, "ranks", ("by_hand.py", "shards.py")),
    "by hand, 2 processes": Way(2, "ranks", ("by_hand_gloo.py", "shards.py")),
    "torchft": Way(None, "groups", ("torchft_diloco.py", "shards.py"), package="torchft"),
    "Lightning DDP": Way(None, "itself", ("ddp.py",), same=False),
}
TASK = ("workers", "interval", "steps", "batch_size", "size", "dtype")  # options that every way is given
MEASURED = ("worker_steps_per_second", "cpu_seconds_per_worker_step", "start_up_seconds", "peak_memory_bytes")
COLUMNS = {  # of the table: title, format, unit
    "worker_steps_per_second": ("worker-steps/s", ".1f", 1),
    "cpu_seconds_per_worker_step": ("CPU ms/worker-step", ".1f", 1e-3),
    "start_up_seconds": ("start-up s", ".1f", 1),
    "peak_memory_bytes": ("memory MB", ".0f", 1e6),
    "loss": ("loss", ".4f", 1),
    "weights_apart": ("weights apart", ".0e", 1),
    "lines": ("lines", "d", 1),
}


def lines(way: Way) -> int:
    """Lines of code of a way's files; see the module's docstring."""
    count = 0
    for name in way.files:
        source = (WAYS_FOLDER / name).read_text()
        strings = [
            n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)
        ]
        docstrings = {number for n in strings for number in range(n.lineno, (n.end_lineno or n.lineno) + 1)}
        for number, line in enumerate(source.splitlines(), start=1):
            code = line.strip()
            count += bool(code) and not code.startswith("#") and "# measuring" not in code and number not in docstrings
    return count


def free_port() -> int:
    """Below the ports that Linux gives to sockets that ask for any, since it is taken seconds later."""
    while True:
        port = random.randrange(10_000, 32_000)
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port


@contextlib.contextmanager
def started(errors: Path, environment: dict[str, str], command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a session of its own; what is left of the session is killed at the end, whatever happened."""
    with errors.open("wb") as file:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def last_error(folder: Path) -> str:
    """The last line of the processes' output that reads like an exception, or else the last line."""
    found = [line for file in sorted(folder.glob("*.err")) for line in file.read_text(errors="replace").splitlines()]
    found = [line.strip() for line in found if line.strip()] or ["no output"]
    return ([line for line in found if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)] or found)[-1]


def environments(way: Way, processes: int) -> list[dict[str, str]]:
    """Of the processes that this script starts."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE")}
    inherited |= {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    if way.launch == "itself":
        return [inherited]
    if way.launch == "ranks":
        size = {"WORLD_SIZE": str(processes)}
        return [inherited | size | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "TORCHFT_LIGHTHOUSE": f"http://127.0.0.1:{free_port()}"}
    return [inherited | alone | {"REPLICA_GROUP_ID": str(group)} for group in range(processes)]


def measure(way: Way, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One run in fresh processes, which leave their results in ``folder``; RuntimeError says what failed."""
    processes = way.processes or args.workers
    task = {**{name: getattr(args, name) for name in TASK}, "processes": processes, "folder": str(folder)}
    results = [folder / f"{rank}.json" for rank in range(processes)]
    with contextlib.ExitStack() as stack:
        running: list[subprocess.Popen[bytes]] = []
        lighthouse: list[subprocess.Popen[bytes]] = []
        launched = time.monotonic()
        for rank, environment in enumerate(environments(way, processes)):
            if way.launch == "groups" and not lighthouse:
                address = environment["TORCHFT_LIGHTHOUSE"].removeprefix("http://")
                command = [str(Path(sys.executable).with_name("torchft_lighthouse")), "--bind", address]
                command += ["--min_replicas", str(processes)]
                lighthouse.append(stack.enter_context(started(folder / "lighthouse.err", environment, command)))
            command = [sys.executable, str(WAYS_FOLDER / way.files[0]), json.dumps({**task, "launched": launched})]
            running.append(stack.enter_context(started(folder / f"{rank}.err", environment, command)))
        while not all(file.exists() for file in results):
            over = [p.poll() is not None and not file.exists() for p, file in zip(running, results, strict=False)]
            if any(over):
                time.sleep(0.5)  # the error of another process may be the cause, and on its way
                raise RuntimeError(last_error(folder))
            if time.monotonic() > launched + LIMIT:
                raise RuntimeError(f"not ready after {LIMIT} s; the last line: {last_error(folder)}")
            time.sleep(0.05)
        measured = [json.loads(file.read_text()) for file in results]
        peaks = [one["peak_memory_bytes"] for one in measured] + [peak_memory(p.pid) for p in lighthouse]
    cpu_seconds = sum(one["cpu_seconds_per_worker_step"] for one in measured)
    memory = None if None in peaks else sum(peaks)
    return {**measured[0], "cpu_seconds_per_worker_step": cpu_seconds, "peak_memory_bytes": memory}


def peak_memory(pid: int) -> int | None:
    """VmHWM of a process in bytes, where Linux tells it."""
    status = Path(f"/proc/{pid}/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return 1024 * int(found[1]) if found else None


def missing(way: Way) -> str | None:
    """Why a way can't run here."""
    found = importlib.util.find_spec(way.package)
    return None if found else f"not installed (pip install {way.package})"


def apart(weights: dict[str, Path]) -> dict[str, float]:
    """Largest difference of a weight from the loop by hand in one process, of every way that does the same."""
    import torch

    loaded = {name: torch.load(file) for name, file in weights.items() if WAYS[name].same and BY_HAND in weights}
    return {
        name: max((a.double() - b.double()).abs().max().item() for a, b in zip(found, loaded[BY_HAND], strict=True))
        for name, found in loaded.items()
    }


def cell(column: str, value: Any) -> str:
    """A number, or the median of several and their range."""
    _, form, unit = COLUMNS[column]
    values = [v / unit if unit != 1 else v for v in (value if isinstance(value, list) else [value]) if v is not None]
    if not values:
        return "—"
    spread = f" ({min(values):{form}} … {max(values):{form}})" if len(values) > 1 else ""
    return f"{statistics.median(values):{form}}{spread}"


def table(rows: list[dict[str, Any]]) -> str:
    head = ["way", "N", "processes", *(title for title, _, _ in COLUMNS.values())]
    names = ("way", "workers", "processes")
    lines = [head, *([*(str(row[n]) for n in names), *(cell(c, row[c]) for c in COLUMNS)] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [[text.rjust(width) for text, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join("  ".join([line[0].ljust(widths[0]), *wide[1:]]) for line, wide in zip(lines, padded, strict=True))


def machine() -> dict[str, Any]:
    versions = {}
    for package in ("torch", "lightning", "torchft"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {"platform": platform.platform(), "cores": os.cpu_count(), "python": platform.python_version(), **versions}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="N, an even number (2)")
    parser.add_argument("--interval", type=int, default=50, help="H (50)")
    parser.add_argument("--steps", type=int, default=100, help="local steps: a multiple of H, two rounds or more (100)")
    parser.add_argument("--batch-size", type=int, default=4, help="windows per worker and step (4)")
    parser.add_argument("--size", choices=["1M", "tiny"], default="1M", help="parameters of the model")
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    parser.add_argument("--repeats", type=int, default=3, help="runs of every way (3)")
    parser.add_argument("--only", action="append", metavar="NAME", help="ways whose name contains it; may be repeated")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers of every run")
    args = parser.parse_args(argv)
    if args.workers < 2 or args.workers % 2:
        parser.error(f"--workers (={args.workers}) must be even: two processes share them")
    if args.interval < 1 or args.steps % args.interval or args.steps < 2 * args.interval:
        parser.error(f"--steps (={args.steps}) must be a multiple of --interval (={args.interval}), two rounds or more")
    if args.repeats < 1:
        parser.error(f"--repeats (={args.repeats}) must be 1 or more")
    args.ways = [n for n in WAYS if not args.only or any(only.lower() in n.lower() for only in args.only)]
    if not args.ways:
        parser.error(f"--only (={args.only}) matches none of {', '.join(WAYS)}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Measures and prints; returns the exit status."""
    args = parse(argv)
    left_out = {name: reason for name in args.ways if (reason := missing(WAYS[name]))}
    failed: dict[str, str] = {}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in args.ways if name not in left_out}
    with tempfile.TemporaryDirectory(prefix="alternatives_", ignore_cleanup_errors=True) as root:
        for repeat in range(args.repeats):
            for i, name in enumerate(runs):
                (folder := Path(root) / f"{repeat}-{i}").mkdir()
                try:
                    if name not in failed:
                        runs[name].append({**measure(WAYS[name], args, folder), "weights": folder / "weights.pt"})
                        print(f"{repeat + 1}/{args.repeats} {name}", file=sys.stderr, flush=True)
                except (RuntimeError, OSError) as error:
                    failed[name] = str(error)
        runs = {name: found for name, found in runs.items() if name not in failed}
        differences = apart({name: found[0]["weights"] for name, found in runs.items()})
    rows = []
    for name, found in runs.items():
        row = {"way": name, "workers": args.workers, "processes": WAYS[name].processes or args.workers}
        row |= {column: [run[column] for run in found] for column in MEASURED}
        row |= {"loss": found[0]["loss"], "weights_apart": differences.get(name), "lines": lines(WAYS[name])}
        rows.append(row)
    if rows:
        print(table(rows))
    for name, reason in {**left_out, **{name: f"failed: {error}" for name, error in failed.items()}}.items():
        print(f"{name}: {reason}")
    settings = {name: getattr(args, name) for name in (*TASK, "repeats")}
    print("; ".join(f"{name} {value}" for name, value in {**settings, **machine()}.items()))
    if args.json:
        found = {"settings": settings, "machine": machine(), "rows": rows, "left_out": left_out, "failed": failed}
        args.json.write_text(json.dumps(found, indent=2) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))  # unwinds, so that no process is left
    sys.exit(main())
