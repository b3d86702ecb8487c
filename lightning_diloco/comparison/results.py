"""The result of a comparison: its numbers, its table, its figure.

Owns the DataFrame and the questions to it. Tables are made in ``tables.py``, figures in ``figures.py``.
"""

from collections.abc import Mapping, Sequence
from typing import Any, get_args

from lightning_diloco.comparison.figures import X, draw
from lightning_diloco.comparison.recording import COLUMNS, SIMULATED
from lightning_diloco.comparison.tables import Table, make_table


class Comparison:
    """What :func:`~lightning_diloco.compare` returns.

    Attributes:
        data: a pandas DataFrame with a row per run, seed and validation, in the order of the runs. Columns:

            ====================  ======================================================================
            ``run``, ``seed``
            ``num_nodes``         N; 1 for a plain Trainer
            ``diloco_interval``   H; missing for a plain Trainer and for data parallelism
            ``step``              local steps of a worker
            ``samples``           samples that all workers together have trained on
            ``bytes``             bytes that a worker has sent, in one direction: the ledger's total
            ``seconds``           seconds of training so far, without validations, on this machine, where the workers
                                  of a run take turns (and other runs may run beside it)
            ``simulated_seconds`` seconds that training would have taken so far on the run's ``cluster``, without
                                  validations: ``strategy.clock.seconds``. Missing for runs without a cluster, as plain
                                  Trainers are. With measured steps, up to the last synchronisation
            ``final``             whether the validation came after the fit, with the outer model θ; those during the
                                  fit see the strategy's ``eval_weights``
            ``train_loss``        mean over workers and over the local steps since the validation before
            ====================  ======================================================================

            and a column per metric that the validation logs.
        metrics: names of the metrics.
        runs: names of the runs.
    """

    def __init__(self, data: Any) -> None:
        self.data = data
        self.metrics = [name for name in data.columns if name not in COLUMNS]
        self.runs = list(dict.fromkeys(data["run"]))

    def table(
        self,
        metrics: str | Sequence[str] | None = None,
        against: str | None = None,
        format: str | Mapping[str, str] = ".4f",
    ) -> Table:
        """The metrics after the fits: mean ± standard deviation over the seeds.

        Args:
            metrics: columns of ``data``; None: all metrics of the validation.
            against: name of a run; adds the mean ± standard deviation of each seed's difference from it. Seeds share
                initial weights and data, so that differences vary less than the metrics.
            format: format specification of Python's for a number, or one per metric, as ``{"val_acc": ".2%"}``.

        Raises:
            ValueError: there is no such metric or run.
        """
        chosen = self.metrics if metrics is None else [metrics] if isinstance(metrics, str) else list(metrics)
        for metric in chosen:
            self._check_column("metrics", metric)
        if against is not None:
            self._check_run("against", against)
        formats = {m: format if isinstance(format, str) else format.get(m, ".4f") for m in chosen}
        return make_table(self.data, chosen, against, formats)

    def plot(self, y: str, x: X = "step", runs: Sequence[str] | None = None, ax: Any = None) -> Any:
        """Draws a metric: a line of means over the seeds, and a band of ± one standard deviation, per run.

        Where only some seeds got as far, the mean is over those. Over ``bytes``, on a logarithmic axis, runs that send
        nothing are level lines at their last value, as are runs without a clock over ``simulated_seconds``.

        Args:
            y: ``train_loss`` or a metric of the validation.
            x: "step", "samples", "bytes", "seconds" (measured on this machine) or "simulated_seconds" (on the runs'
                clusters).
            runs: names of the runs to draw, in their order; None: all.
            ax: matplotlib Axes to draw on; None: those of a new figure.

        Returns:
            The Axes; ``axes.figure.savefig("comparison.svg")`` writes the figure, ``axes.figure`` shows it in a
            notebook.

        Raises:
            ValueError: there is no such metric, axis or run, or no run has simulated seconds.
        """
        self._check_column("y", y)
        if x not in get_args(X):
            raise ValueError(f"`x` (={x!r}) must be one of {', '.join(map(repr, get_args(X)))}.")
        for run in runs or ():
            self._check_run("runs", run)
        chosen = self.runs if runs is None else runs
        if x == SIMULATED and self.data[self.data["run"].isin(chosen)][x].isna().all():
            raise ValueError(
                "`x` is 'simulated_seconds', but no run has a clock. Give `compare` a `cluster`, as in"
                " `compare(..., cluster=Cluster(step_seconds=0.1, bandwidth_gbit_s=1, latency_ms=20))`."
            )
        return draw(self.data, y, x, chosen, ax)

    def __repr__(self) -> str:
        return f"Comparison of {len(self.runs)} runs, {self.data['seed'].nunique()} seeds: {', '.join(self.runs)}"

    def _check_column(self, argument: str, name: Any) -> None:
        choices = [*self.metrics, "train_loss", "seconds", SIMULATED]
        if name not in choices:
            raise ValueError(f"`{argument}` names {name!r}; there are {', '.join(map(repr, choices))}.")

    def _check_run(self, argument: str, name: Any) -> None:
        if name not in self.runs:
            raise ValueError(f"`{argument}` names the run {name!r}; there are {', '.join(map(repr, self.runs))}.")
