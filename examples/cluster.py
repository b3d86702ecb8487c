"""What would DiLoCo gain on slow links, and what does it lose when messages get lost? A figure and a table.

**Links** (``--only links``): a byte GPT (2 blocks of width 64, 0.12 M parameters, 300 local steps) is trained by four
data-parallel workers, and by four DiLoCo workers with rounds of H = 5, 20 and 100 local steps. Each is trained once per
seed: links change how long a run takes, not its numbers. Its seconds on other links are those of a clock that is told
the same steps and transfers. Assumed are 10 ms for a local step, a ring all-reduce, and 0.1 ms of latency per hop; the
bytes are those that the runs have sent. The last panel holds the same model of the links against public measurements of
36 runs (``tests/data/measured_sync_times.csv``).

**Drop-outs** (``--only drop``): DiLoCo with H = 10 on the same task, where each worker's part in a synchronisation is
lost with probability 0, 0.1, 0.3 and 0.5, drawn anew for every seed. The mean is then over the others, and the worker
goes on from its own weights.

Needs the extras ``examples`` and ``compare``. With ``--processes 2``, on two cores that were also busy otherwise, the
figure took 15 minutes, and the table, with ``--seeds 5``, 18. Finished runs stay in the folder: started again, the
script goes on where it was.
"""

import argparse
import csv
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib.pyplot as plt
import torch
from byte_gpt import ByteGPT, LibraryText

from lightning_diloco import Availability, Cluster, DataParallel, DilocoStrategy, compare
from lightning_diloco.cluster import Clock
from lightning_diloco.cluster.calibration import MeasuredTransfer, calibrate
from lightning_diloco.cluster.planning import Plan, compute_utilisation
from lightning_diloco.comparison import Comparison, Run, Table, grid

STEP_SECONDS, LATENCY_MS = 0.01, 0.1
BANDWIDTHS = (0.05, 1.0, 10.0)  # Gbit/s
DROP_RATES = (0.0, 0.1, 0.3, 0.5)
SHARED = {  # of all runs; the published momentum, 0.9, is made for longer ones
    "outer_optimizer_kwargs": {"lr": 0.7, "momentum": 0.5, "nesterov": True},
    "diagnostics": False,
}
MEASURED = Path(__file__).parent.parent / "tests" / "data" / "measured_sync_times.csv"
COLORS = ("#000000", "#D55E00", "#009E73", "#0072B2")

module = partial(ByteGPT, layers=2, width=64, heads=4, context=64, lr=2e-3)
data = partial(LibraryText, context=64, batch_size=4, megabytes=4.0)


def links(gbit_s: float) -> Cluster:
    """Four equal workers on links of ``gbit_s``."""
    return Cluster(STEP_SECONDS, gbit_s, LATENCY_MS)


def dropping(rate: float, workers: int) -> DilocoStrategy:
    """A strategy whose losses are drawn with the run's seed, which torch has been given by then."""
    availability = Availability(drop_rate=rate, seed=torch.initial_seed() % 2**32)
    cluster = Cluster(STEP_SECONDS, 1.0, LATENCY_MS, availability=availability)
    return DilocoStrategy(workers, 10, cluster=cluster, **SHARED)


def seconds_after(steps: int, workers: int, interval: int, nbytes: int, cluster: Cluster) -> list[float]:
    """Simulated seconds after each local step, with a mean of ``nbytes`` every ``interval`` steps and at the end."""
    clock, everybody, found = Clock(cluster, workers), list(range(workers)), [0.0]
    for step in range(1, steps + 1):
        clock.step(step, everybody)
        if step % interval == 0 or step == steps:
            clock.send("mean", nbytes, [everybody], step, cluster.pattern_for(coded=False))
            clock.arrive("mean", everybody, step)
        found.append(clock.seconds)
    return found


def curves(comparison: Comparison, cluster: Cluster) -> dict[str, tuple[list[float], list[float], list[float]]]:
    """Per run seconds on ``cluster``, and mean and standard deviation of the loss over the seeds, by validation."""
    found = {}
    for name in comparison.runs:
        rows = comparison.data[comparison.data["run"] == name].drop_duplicates(["seed", "step"], keep="last")
        seconds = seconds_after(*shape(comparison, name), cluster)
        by_step = rows.groupby("step")["val_loss"]
        spread = by_step.std(ddof=1).fillna(0.0)
        found[name] = [seconds[step] for step in spread.index], list(by_step.mean()), list(spread)
    return found


def shape(comparison: Comparison, name: str) -> tuple[int, int, int, int]:
    """Local steps, workers, H (1 for data parallelism) and bytes of a transfer of a run."""
    rows = comparison.data[comparison.data["run"] == name]
    last = rows[rows["final"]].iloc[0]
    steps, workers = int(last["step"]), int(last["num_nodes"])
    interval = 1 if rows["diloco_interval"].isna().all() else int(last["diloco_interval"])
    return steps, workers, interval, int(last["bytes"]) // -(-steps // interval)


def main(argv: list[str] | None = None) -> dict[str, Comparison]:
    """Trains what isn't finished, prints tables, draws the figure, and returns the comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("links", "drop"), help="one of the two parts; default: both")
    parser.add_argument("--workers", type=int, default=4, help="N")
    parser.add_argument("--intervals", type=int, nargs="+", default=[5, 20, 100], help="H: local steps per round")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=1, help="runs at a time")
    parser.add_argument("--steps", type=int, default=300, help="local steps")
    parser.add_argument("--folder", type=Path, default=Path("runs/cluster"), help="of the finished runs")
    parser.add_argument("--figure", type=Path, default=Path("runs/cluster.svg"), help="file to draw into")
    args = parser.parse_args(argv)
    if not 1 <= len(args.intervals) < len(COLORS):
        parser.error(f"--intervals takes 1 to {len(COLORS) - 1} numbers: there is a colour for each")

    def train(part: str, runs: dict[str, Any], validations: int, **options: Any) -> Comparison:
        settings = {"val_check_interval": max(1, args.steps // validations), "check_val_every_n_epoch": None}
        trainer = {"accelerator": "cpu", "max_steps": args.steps, "gradient_clip_val": 1.0, **settings}
        common = {"trainer": trainer, "seeds": args.seeds, "processes": args.processes}
        return compare(module, data, runs, folder=args.folder / part, **common, **options)

    results = {}
    if args.only in (None, "links"):
        parallel = {"num_nodes": args.workers, "algorithm": DataParallel(), "diagnostics": False}
        diloco = grid("DiLoCo", num_nodes=args.workers, diloco_interval=args.intervals, **SHARED)
        results["links"] = train("links", {"data parallel": parallel, **diloco}, validations=15, cluster=links(1.0))
        print(f"\n{seconds_table(results['links'])}\n")
        draw(results["links"], args.figure)
        print(f"drawn into {args.figure}")
    if args.only in (None, "drop"):
        dropped = {f"{rate:.0%} lost": Run(partial(dropping, rate, args.workers)) for rate in DROP_RATES}
        results["drop"] = train("drop", dropped, validations=1)
        print(f"\n{results['drop'].table('val_loss', against='0% lost')}\n")
    return results


def seconds_table(comparison: Comparison) -> Table:
    """The loss after training, and the run's seconds on each of the links."""
    table = comparison.table("val_loss", against="data parallel")
    header = [*table.header, *(f"s at {gbit_s:g} Gbit/s" for gbit_s in BANDWIDTHS)]
    on = [curves(comparison, links(gbit_s)) for gbit_s in BANDWIDTHS]
    rows = [[*row, *(f"{found[row[0]][0][-1]:.2f}" for found in on)] for row in table.rows]
    return Table(header, rows, table.data)


# -------------------------------------------------------------------------------------------- the figure


def draw(comparison: Comparison, file: Path) -> None:
    """Loss over simulated seconds, a panel per bandwidth; below, utilisation over bandwidth, here and as measured."""
    with plt.rc_context({"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "lightning_diloco"}):
        figure = plt.figure(figsize=(9.6, 6.6), layout="constrained")
        above, below = figure.subfigures(2, 1, height_ratios=(1, 1))
        panels = above.subplots(1, len(BANDWIDTHS), sharey=True)
        for ax, gbit_s in zip(panels, BANDWIDTHS, strict=True):
            losses(ax, comparison, gbit_s)
        panels[-1].legend(frameon=False)
        panels[0].set_ylabel("validation loss, nats per byte")
        here, measured = below.subplots(1, 2, sharey=True)
        utilisation_here(here, comparison)
        utilisation_measured(measured)
        here.set_ylabel("compute utilisation, %")
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None, dpi=150)
        plt.close(figure)


def losses(ax: Any, comparison: Comparison, gbit_s: float) -> None:
    """Means over the seeds, and a band of ± one standard deviation."""
    for (name, (at, mean, sd)), color in zip(curves(comparison, links(gbit_s)).items(), COLORS, strict=False):
        ax.plot(at, mean, color=color, lw=1.3, marker="o", ms=2.5, label=name)
        lower, upper = ([m + side * s for m, s in zip(mean, sd, strict=True)] for side in (-1, 1))
        ax.fill_between(at, lower, upper, color=color, alpha=0.15, lw=0)
    ax.set_title(f"{gbit_s:g} Gbit/s", fontsize=9)
    ax.set_xscale("log")
    ax.set_xlim(0.1, 60)  # the same in all panels
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_formatter("")
    ax.set_xlabel(f"simulated seconds, {1e3 * STEP_SECONDS:g} ms per step assumed")
    ax.spines[["top", "right"]].set_visible(False)


def utilisation_here(ax: Any, comparison: Comparison) -> None:
    """Of the runs above, over the bandwidth of their links."""
    at = bandwidths(0.01, 100)
    for name, color in zip(comparison.runs, COLORS, strict=False):
        steps, workers, interval, nbytes = shape(comparison, name)
        plan = Plan(nbytes / 4, STEP_SECONDS, steps, workers, LATENCY_MS, interval)
        ax.plot(at, [100 * compute_utilisation(plan, gbit_s) for gbit_s in at], color=color, lw=1.3, label=name)
    for gbit_s in BANDWIDTHS:
        ax.axvline(gbit_s, color="#bbbbbb", lw=0.8, zorder=0)
    size = f"{workers} workers, {nbytes / 4e6:.2f} M parameters, {1e3 * STEP_SECONDS:g} ms per step (assumed)"
    axis(ax, f"the runs above\n{size}")


def utilisation_measured(ax: Any) -> None:
    """The model, with two constants fitted to all of the measured runs, and the medians over their repeats."""
    with open(MEASURED) as file:
        runs = [{key: float(value or "nan") for key, value in row.items()} for row in csv.DictReader(file)]
    transfers = [
        MeasuredTransfer(run[column], 4 * run["parameters"], 4, run["bandwidth_mbit_s"] / 1e3, first=first)
        for run in runs
        for column, first in (("first_sync_s", True), ("later_sync_s_median", False))
        if run[column] > 0
    ]
    fitted, at = calibrate(transfers), bandwidths(0.05, 20)
    for interval, color in zip((1, 8, 32, 128), COLORS, strict=True):
        same = [run for run in runs if run["interval"] == interval]
        step_seconds = median(run["compute_s_total"] / run["measured_steps"] for run in same)
        computing, syncs = same[-1]["measured_steps"] * step_seconds, int(same[-1]["syncs"])
        first = fitted.first_sync_overhead_s * same[-1]["first_sync_included"]
        modelled = []
        for gbit_s in at:
            cluster = Cluster(step_seconds, gbit_s, latency_ms=0, efficiency=fitted.efficiency)
            sending = first + syncs * cluster.transfer_seconds(4 * same[-1]["parameters"], range(4), "ring")
            modelled.append(100 * computing / (computing + sending))
        ax.plot(at, modelled, color=color, lw=1.3)
        points = {run["bandwidth_mbit_s"] / 1e3: [] for run in same}
        for run in same:
            points[run["bandwidth_mbit_s"] / 1e3].append(100 * run["compute_utilisation"])
        label = f"H = {interval}" if interval > 1 else "H = 1, every step"
        look = {"ls": "", "marker": "o", "ms": 5, "mfc": "white", "mew": 1.3}
        ax.plot(list(points), [median(values) for values in points.values()], color=color, label=label, **look)
    axis(ax, "measured runs of others: circles; the same model: lines\n4 workers, 30.8 M parameters, 26 ms per step")


def bandwidths(least: float, most: float) -> list[float]:
    """Gbit/s, evenly in the logarithm."""
    return [least * (most / least) ** (i / 100) for i in range(101)]


def axis(ax: Any, title: str) -> None:
    """Percent over bandwidth."""
    ax.set_title(title, fontsize=9)
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_formatter("")
    ax.set_xlabel("Gbit/s of every link")
    ax.set_ylim(0, 100)
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
