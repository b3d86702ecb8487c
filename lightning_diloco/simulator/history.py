"""The history of a run of the simulator: what :meth:`DilocoSimulator.train` returns.

Owns the table and the figure that are made of it. Does not own the statistics (``metrics.py``,
``algorithms/report.py``) nor their collection (``callback.py``).
Imports nothing of Lightning; pandas and matplotlib only when they are needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_diloco.algorithms import OuterStepReport
from lightning_diloco.simulator.metrics import EvalStats, TrainStats

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class History:
    """A run, step by step; of a resumed run, from the resumption on.

    Attributes:
        train: statistics of every local step.
        eval: statistics of every evaluation of the outer model; none without ``eval_dataset``.
        outer: reports of all outer steps.
    """

    train: list[TrainStats] = field(default_factory=list)
    eval: list[EvalStats] = field(default_factory=list)
    outer: list[OuterStepReport] = field(default_factory=list)

    def __repr__(self) -> str:
        parts = [f"{len(self.train)} local steps", f"{len(self.outer)} outer steps", f"{len(self.eval)} evaluations"]
        losses = [f"{name} {rows[-1].loss:.4g}" for name, rows in (("train", self.train), ("eval", self.eval)) if rows]
        return f"History({', '.join(parts)}{'; last losses: ' * bool(losses)}{', '.join(losses)})"

    def to_pandas(self) -> pd.DataFrame:
        """A row per local step; columns of what happens in some steps only are NaN in the others.

        Columns: ``train_loss``, ``epoch``, ``eval_loss``, ``eval_accuracy``, ``eval_perplexity``, and of the outer step
        (of the last, if several transfers arrive in a step) ``outer_step``, ``pseudo_gradient_norm``, ``drift`` (mean
        over the workers), ``cosine``, and ``payload_bytes`` (of all of them).

        Raises:
            ModuleNotFoundError: pandas isn't installed.
        """
        rows: dict[int, dict[str, float | None]] = {}
        for t in self.train:
            rows.setdefault(t.local_step, {}).update(train_loss=t.loss, epoch=t.epoch)
        for e in self.eval:
            found = {"eval_loss": e.loss, "eval_accuracy": e.accuracy, "eval_perplexity": e.perplexity}
            rows.setdefault(e.local_step, {}).update(found)
        for r in self.outer:
            row = rows.setdefault(r.step, {})
            drifts = [d for d in r.drift if d is not None]
            drift = sum(drifts) / len(drifts) if drifts else None
            row.update(outer_step=r.outer_step, pseudo_gradient_norm=r.pseudo_gradient_norm, drift=drift)
            row.update(cosine=r.cosine, payload_bytes=(row.get("payload_bytes") or 0) + r.payload_bytes)
        pandas = _needed("pandas", self.to_pandas)
        index = pandas.Index(sorted(rows), name="local_step")
        columns = ["train_loss", "epoch", "eval_loss", "eval_accuracy", "eval_perplexity"]
        columns += ["outer_step", "pseudo_gradient_norm", "drift", "cosine", "payload_bytes"]
        data = {name: [rows[step].get(name) for step in index] for name in columns}
        frame: pd.DataFrame = pandas.DataFrame(data, index=index, dtype="float64")
        return frame

    def plot(self) -> Figure:
        """Losses over the local steps, with the outer steps as thin lines, and accuracies where there are any.

        A notebook shows it after ``%matplotlib inline``; elsewhere ``history.plot().savefig("run.png")``.

        Raises:
            ModuleNotFoundError: matplotlib isn't installed.
        """
        figure: Figure = _needed("matplotlib.figure", self.plot).Figure(figsize=(9, 3.2), layout="constrained")
        accuracies = [(e.local_step, e.accuracy) for e in self.eval if e.accuracy is not None]
        axes = figure.subplots(1, 2 if accuracies else 1, squeeze=False)[0]
        for ax in axes:
            for report in self.outer:
                ax.axvline(report.step, color="0.9", linewidth=0.8, zorder=0)
            ax.set_xlabel("local steps")
        axes[0].plot(
            [t.local_step for t in self.train], [t.loss for t in self.train], label="training, mean of workers"
        )
        if self.eval:
            axes[0].plot([e.local_step for e in self.eval], [e.loss for e in self.eval], "o-", label="evaluation of θ")
        axes[0].set_ylabel("loss")
        axes[0].legend()
        if accuracies:
            axes[1].plot(*zip(*accuracies, strict=True), "o-", color="C1")
            axes[1].set_ylabel("accuracy of θ")
        return figure


def _needed(module: str, method: Callable[[], Any]) -> Any:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        package = module.split(".")[0]
        raise ModuleNotFoundError(
            f"`History.{method.__name__}` needs {package}. Install it: `pip install 'lightning-diloco[compare]'`."
        ) from error
