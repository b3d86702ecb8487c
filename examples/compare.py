"""Does DiLoCo pay on short runs? Two tasks, twelve runs, five seeds: the figure and the tables of the README.

The tasks are those of ``digits.py`` and ``byte_gpt.py`` (here with 2 blocks of width 64 and 300 local steps). Each is
trained by one worker, by one worker that sees as many samples as four, by four data-parallel workers, and by four
DiLoCo workers with rounds of H = 5, 20 and 100 local steps and three outer optimizers: DiLoCo's own (SGD with learning
rate 0.7 and Nesterov momentum 0.9), the same with momentum 0.5, and a plain average. Within a seed all of them start
from the same weights.

Needs the extras ``examples`` and ``compare``. Run ``python examples/compare.py --only digits --seeds 2`` for a first
look. Everything takes some twenty minutes on two cores with ``--processes 2``. Finished runs stay in the folder:
started again, the script goes on where it was.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
from byte_gpt import ByteGPT, LibraryText
from digits import DigitsCNN, DigitsData

from lightning_diloco import compare
from lightning_diloco.comparison import Comparison, grid

OUTER = {
    "DiLoCo's default": None,
    "momentum 0.5": {"lr": 0.7, "momentum": 0.5, "nesterov": True},
    "plain average": {"lr": 1.0},
}
BASELINES = {"one worker": "plain", "one worker, same samples": "same samples", "data parallel": "DataParallel"}


class Task(NamedTuple):
    """What is trained, and which metric of the validation tells how well."""

    title: str
    module: Any
    data: Any
    trainer: dict[str, Any]
    metric: str
    unit: str


def settings(steps: int) -> dict[str, Any]:
    """Arguments of the Trainer: ten validations."""
    return {
        "accelerator": "cpu",
        "max_steps": steps,
        "val_check_interval": steps // 10,
        "check_val_every_n_epoch": None,
    }


TASKS = {
    "digits": Task(
        "CNN on handwritten digits",
        partial(DigitsCNN, lr=2e-3),
        partial(DigitsData, batch_size=8),
        settings(500),
        "val_loss",
        "test loss",
    ),
    "byte_gpt": Task(
        "byte GPT, 0.1 M parameters",
        partial(ByteGPT, layers=2, width=64, heads=4, context=64, lr=2e-3),
        partial(LibraryText, context=64, batch_size=4, megabytes=4.0),
        {**settings(300), "gradient_clip_val": 1.0},
        "val_loss",
        "validation loss, nats per byte",
    ),
}


def runs(workers: int, intervals: list[int]) -> dict[str, Any]:
    """The baselines, and every outer optimizer with every H."""
    made: dict[str, Any] = dict(BASELINES)
    for label, arguments in OUTER.items():
        made |= grid(label, num_nodes=workers, diloco_interval=intervals, outer_optimizer_kwargs=arguments)
    return made


def main(argv: list[str] | None = None) -> dict[str, Comparison]:
    """Trains what isn't finished, prints a table per task, draws the figure, and returns the comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=TASKS, help="one of the tasks; default: both")
    parser.add_argument("--workers", type=int, default=4, help="N")
    parser.add_argument("--intervals", type=int, nargs="+", default=[5, 20, 100], help="H: local steps per round")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=1, help="runs at a time")
    parser.add_argument("--folder", type=Path, default=Path("runs/compare"), help="of the finished runs")
    parser.add_argument("--figure", type=Path, default=Path("runs/compare.svg"), help="file to draw into")
    parser.add_argument("--steps", type=int, help="local steps; default: 500 (digits), 300 (byte GPT)")
    args = parser.parse_args(argv)

    results = {}
    for name, task in TASKS.items():
        if args.only in (None, name):
            results[name] = compare(
                task.module,
                task.data,
                runs(args.workers, args.intervals),
                trainer={**task.trainer, **(settings(args.steps) if args.steps else {})},
                folder=args.folder / name,
                seeds=args.seeds,
                processes=args.processes,
            )
            table = results[name].table(task.metric, against="data parallel")
            print(f"\n{title(task, args.steps)}: {task.unit}\n\n{table}\n")
    draw(results, args.figure, args.steps)
    print(f"drawn into {args.figure}")
    return results


def title(task: Task, steps: int | None) -> str:
    """What is trained, and for how many local steps."""
    return f"{task.title}, {steps or task.trainer['max_steps']} steps"


def draw(results: dict[str, Comparison], file: Path, steps: int | None) -> None:
    """Loss after training over bytes sent: a panel per task."""
    with plt.rc_context({"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "lightning_diloco"}):
        wide = len(results) > 1
        size = (4.2 * len(results), 3.9 if wide else 4.6)
        figure, axes = plt.subplots(1, len(results), figsize=size, squeeze=False, layout="constrained")
        for ax, (name, comparison) in zip(axes[0], results.items(), strict=True):
            panel(ax, TASKS[name], comparison, title(TASKS[name], steps))
        labels, columns = axes[0][0].get_legend_handles_labels(), 3 if wide else 1
        figure.legend(*labels, loc="outside lower center", ncols=columns, frameon=False)
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None, dpi=150)
        plt.close(figure)


def panel(ax: Any, task: Task, comparison: Comparison, title: str) -> None:
    """A point per run, mean ± standard deviation over the seeds; runs that send nothing are level lines."""
    last = comparison.data[comparison.data["final"]]
    runs = last.groupby("run", sort=False)
    mean, sd, sent = runs[task.metric].mean(), runs[task.metric].std(ddof=1).fillna(0.0), runs["bytes"].mean() / 1e6
    for name, color, style in (("one worker", "#777777", "--"), ("one worker, same samples", "black", ":")):
        ax.axhline(mean[name], color=color, ls=style, lw=1.2, label=f"{name} (sends nothing)")
        ax.axhspan(mean[name] - sd[name], mean[name] + sd[name], color=color, alpha=0.12, lw=0)
    look = {"ms": 4, "lw": 1.2, "capsize": 2}
    sides = (0.95, 1.0, 1.05)  # so that bars don't hide each other: all three have sent the same
    for label, color, marker, side in zip(OUTER, ("#D55E00", "#0072B2", "#009E73"), "os^", sides, strict=True):
        names = [name for name in mean.index if name.startswith(label)]
        at = sent[names] * side
        ax.errorbar(at, mean[names], sd[names], color=color, marker=marker, label=f"outer: {label}", **look)
    name = "data parallel"
    ax.errorbar(sent[name], mean[name], sd[name], color="#CC79A7", marker="D", label=name, **{**look, "ls": ""})
    interval = last.drop_duplicates("run").set_index("run")["diloco_interval"]
    for name in (name for name in mean.index if name.startswith("DiLoCo's default")):
        ax.annotate(
            f"H = {interval[name]}", (sent[name], 0.97), xycoords=("data", "axes fraction"), ha="center", va="top"
        )
    ax.margins(x=0.1, y=0.12)
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set_xlabel("megabytes sent per worker")
    ax.set_ylabel(task.unit)
    ax.set_title(title, fontsize=9)
    ax.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
