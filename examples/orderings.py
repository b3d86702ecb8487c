"""Do thirteen published orderings of the DiLoCo family come out here? A table of verdicts, and a figure per claim.

The claims are in ``claims.py``, the runs that they compare in ``ordering_runs.py``, and the rule that decides in
``judging.py``. A run serves all claims that name it. The tasks are the CNN of ``digits.py`` (500 local steps) and a
small byte GPT (2 blocks of width 48, 300 steps). Within a seed all runs start from the same weights.

Needs the extras ``examples`` and ``compare``. ``python examples/orderings.py --processes 2`` takes one to one and a
half hours on two cores; ``--quick`` takes some four minutes there, with a fifth of the steps, two seeds and the digits
alone: it shows that all runs work, and decides nothing. Finished runs stay in the folder: started again, the script
goes on where it was.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from claims import CLAIMS, Claim, Trial
from judging import MUCH, SLACK, Judged, decisive, judge, verdict_of
from ordering_figures import draw
from ordering_runs import TASKS, trainer_arguments

from lightning_diloco import compare
from lightning_diloco.comparison import Comparison, Table

QUICK_TASKS, QUICK_SEEDS, QUICK_DIVISOR = ("digits",), 2, 5
TOO_SMALL = (
    "This was --quick: two seeds and a fifth of the steps show that everything runs. They are too small to decide any"
    " claim."
)


class Finding(NamedTuple):
    """A trial of a claim, with the numbers by label, seed by seed, and its comparisons judged."""

    claim: Claim
    trial: Trial
    title: str
    numbers: dict[str, list[float]]
    judged: list[Judged]


def main(argv: list[str] | None = None) -> list[Finding]:
    """Trains what isn't finished, prints the tables, draws the figures, and returns what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ids = [claim.id for claim in CLAIMS]
    parser.add_argument("--only", nargs="+", choices=ids, default=ids, metavar="A1", help="claims; default: all")
    parser.add_argument("--quick", action="store_true", help="a look in four minutes, too small to decide")
    parser.add_argument("--seeds", type=int, help=f"default: 5; with --quick {QUICK_SEEDS}")
    parser.add_argument("--divide-steps", type=int, help=f"shorter runs; default: 1, with --quick {QUICK_DIVISOR}")
    parser.add_argument("--processes", type=int, default=1, help="runs at a time")
    parser.add_argument("--folder", type=Path, default=Path("runs/orderings"), help="of the finished runs")
    parser.add_argument("--figures", type=Path, default=Path("runs/orderings"), help="folder to draw into")
    args = parser.parse_args(argv)
    divisor = args.divide_steps or (QUICK_DIVISOR if args.quick else 1)
    seeds = args.seeds or (QUICK_SEEDS if args.quick else 5)
    folder = args.folder if divisor == 1 else args.folder / f"steps divided by {divisor}"

    chosen = [claim for claim in CLAIMS if claim.id in args.only]
    trials = [
        (claim, trial) for claim in chosen for trial in claim.trials if trial.task in QUICK_TASKS or not args.quick
    ]
    results = {}
    for name in dict.fromkeys(trial.task for _, trial in trials):
        steps = TASKS[name].steps // divisor
        runs = TASKS[name].runs(steps)
        needed = {value.run for _, trial in trials if trial.task == name for value in trial.values.values()}
        print(f"{TASKS[name].title}: {len(needed)} runs, {steps} steps, seeds: {seeds}", flush=True)
        results[name] = compare(
            TASKS[name].module,
            TASKS[name].data,
            {run: spec for run, spec in runs.items() if run in needed},
            trainer=trainer_arguments(TASKS[name], steps),
            folder=folder / name,
            seeds=seeds,
            processes=args.processes,
        )
    findings = [finding(claim, trial, results[trial.task], divisor) for claim, trial in trials]
    for claim in chosen:
        draw([found for found in findings if found.claim is claim], args.figures / f"{claim.id}.svg")
    text = report(findings, results) + (f"\n{TOO_SMALL}\n" if args.quick else "")
    print(f"\n{text}\nA figure per claim is in {args.figures}.")
    (args.figures / "tables.md").write_text(text, encoding="utf-8")
    return findings


def finding(claim: Claim, trial: Trial, comparison: Comparison, divisor: int = 1) -> Finding:
    """The verdicts of a trial."""
    numbers = {}
    for label, value in trial.values.items():
        rows = comparison.data[comparison.data["run"] == value.run]
        last = rows[rows["final"] == value.final].groupby("seed").last()
        numbers[label] = [float(number) for number in last[value.metric]]
    task = TASKS[trial.task]
    title = f"{task.title}, {trial.times * (task.steps // divisor)} steps" + (trial.variant and f", {trial.variant}")
    return Finding(claim, trial, title, numbers, [judge(one, numbers.__getitem__) for one in trial.comparisons])


def report(findings: Sequence[Finding], results: dict[str, Comparison]) -> str:
    """The table of verdicts, the table of all comparisons, and a table of runs per task."""
    verdicts, details = [], []
    for found in findings:
        decides = decisive(found.judged)
        held = sum(one.verdict == "holds" for one in found.judged)
        count = f"{held} of {len(found.judged)}"
        verdict = f"**{verdict_of(found.judged)}**"
        start = [found.claim.id, found.claim.text, found.claim.source, found.title]
        verdicts.append([*start, f"{decides.comparison.text}: {decides}", count, verdict])
        place = f"{found.title}; {found.trial.setting}"
        details += [[found.claim.id, place, one.comparison.text, str(one), one.verdict] for one in found.judged]
    parts = [
        f"The effect is how much higher the second run's final loss is than the first's, in per cent (of cosines: the"
        f" difference), with the 95 % interval of paired differences over seeds. ≪: by more than {MUCH:g} %; ≈: within"
        f" {MUCH:g} %; ≤: up to {SLACK:g} % in the wrong direction.",
        table(["claim", "", "source", "where", "what decides, effect", "hold", "verdict"], verdicts),
        "All comparisons:",
        table(["claim", "where", "comparison", "effect", "verdict"], details),
        *(
            f"{TASKS[name].title}, {TASKS[name].unit}, mean ± standard deviation over seeds:\n\n"
            f"{comparison.table('val_loss')}"
            for name, comparison in results.items()
        ),
    ]
    return "\n\n".join(parts) + "\n"


def table(header: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    return Table(header, rows, None).to_markdown()


if __name__ == "__main__":
    main()
