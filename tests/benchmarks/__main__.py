"""What DiLoCo costs on this machine, as ratios: each row with its floor, measured in the same run.

Rows: a local step against the plain Trainer and against a hand-written loop; two processes and their start-up; an outer
step against plain PyTorch; memory per worker, and many workers. ``ratio`` is the median over the repeats, with the
least and the most; behind it stand the medians of the two figures. After the table: where the time of a step goes.

Run ``python -m tests.benchmarks`` on a quiet machine with two cores: five minutes, ten if it is busy.
"""

import argparse
import json
import os
import platform
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import torch

from tests.benchmarks import exchange, memory, parts, processes, steps
from tests.benchmarks.rows import HEADER, Row
from tests.benchmarks.workloads import quiet

GROUPS: dict[str, Callable[[int], Iterator[Row]]] = {
    "steps": steps.rows,
    "processes": processes.rows,
    "exchange": exchange.rows,
    "memory": memory.rows,
}


def machine() -> dict[str, str | int | None]:
    packages = ("torch", "lightning", "torchmetrics", "lightning-diloco")
    return {
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in packages},
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=[*GROUPS, "parts"], help="a part of the table, or where the time goes")
    parser.add_argument(
        "--repeats",
        type=int,
        default=5,
        help="how often each figure is measured; half as often where processes start, and once with the large model",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep every figure of every repeat")
    args = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    about = machine()
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    found: list[Row] = []
    if args.only != "parts":
        print(HEADER)
        for name, rows in GROUPS.items():
            for row in rows(args.repeats) if args.only in (None, name) else ():
                print(row, flush=True)
                found.append(row)
    table = parts.table() if args.only in (None, "parts") else ""
    print(f"\n{table}" if table else "")
    if args.json is not None:
        kept = {"machine": about, "rows": [row.as_json() for row in found], "parts": table.splitlines()}
        args.json.write_text(json.dumps(kept, indent=1))


if __name__ == "__main__":
    main()
