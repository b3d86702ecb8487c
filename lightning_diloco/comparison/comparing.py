"""``compare``: trains several runs with several seeds under the same conditions.

Owns the order of events: checks, what is finished already, what is trained, what is returned.
"""

import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning import LightningModule
from tqdm import tqdm

from lightning_diloco.arguments import as_integer, check_bool, check_count
from lightning_diloco.cluster import Cluster
from lightning_diloco.comparison.folder import Folder
from lightning_diloco.comparison.processes import train_in_processes
from lightning_diloco.comparison.recording import COLUMNS, Row
from lightning_diloco.comparison.requirements import needed
from lightning_diloco.comparison.results import Comparison
from lightning_diloco.comparison.runs import Arguments, Run, checked_runs, workers_and_interval
from lightning_diloco.comparison.training import Task, train, trainer_arguments

Spec = str | Mapping[str, Any] | Run


def compare(
    module: Callable[..., LightningModule],
    data: Callable[..., Any],
    runs: Mapping[str, Spec],
    *,
    trainer: Arguments | Callable[[], Arguments],
    folder: str | os.PathLike[str],
    seeds: int | Sequence[int] = 5,
    processes: int = 1,
    progress_bar: bool = True,
    cluster: Cluster | None = None,
) -> Comparison:
    """Trains every run with every seed, and returns their curves, table and figure.

    With a seed, all runs start from the same weights, and runs with the same number N > 1 of workers read the same data
    in the same order. (Runs of one worker shuffle with torch's generator, as a plain Trainer does: their first epochs
    are the same.) A run does what a script does that calls ``L.seed_everything(seed)``, makes module and data, calls
    ``trainer.fit`` and then ``trainer.validate``, with the same numbers, bit for bit. Lightning's output is off, unless
    ``trainer`` says otherwise, and so are this package's lines and hints, unless it has a DilocoCallback. This
    process's random generators are left as they were.

    A finished run is on disk at once. The same call after an interruption loads the finished runs and trains the others
    from their beginning; a call with further runs or seeds adds them. A run whose settings differ from those in the
    folder is an error. Functions and classes count by their names there: after changes of their code take another
    folder.

    A run that fails is reported at once, the others go on, and at the end an error names the failed ones.

    Args:
        module: makes the LightningModule: its class, a function, or ``functools.partial(MyModule, lr=0.1)``.
        data: makes a LightningDataModule, or a pair of loaders for training and validation. A batch is a worker's.
        runs: what to compare, by name. Each is

            * "plain": one worker, a Trainer without this package's strategy,
            * a dict with arguments of :class:`~lightning_diloco.DilocoStrategy`; for many of them see
              :func:`~lightning_diloco.comparison.grid`,
            * "DataParallel": :class:`~lightning_diloco.DataParallel` with as many workers as the other runs,
            * "same samples": one worker that trains on as many samples as the N workers of the other runs: with
              ``max_steps``, N times the steps, with batches of the same size (an epoch has N times the steps of itself;
              ``val_check_interval`` is multiplied as well, and a learning-rate schedule that asks the Trainer for the
              number of steps is stretched),
            * a :class:`~lightning_diloco.comparison.Run`, for a length, or arguments of Trainer, module or data, of its
              own.
        trainer: arguments of Lightning's Trainer for all runs, copied for every run, or a callable that makes them.
            Validations during the fit make the curves: set ``val_check_interval``.
        folder: of the finished runs; one per comparison.
        seeds: how many, from 0, or which.
        processes: how many runs are trained at a time, each in a process with one thread. (In this process, torch uses
            as many threads as it finds, which may change the last bits of a number.)
        progress_bar: show how many runs are finished.
        cluster: the simulated machines of all runs with arguments of DilocoStrategy, and of "DataParallel", that don't
            name a ``cluster`` of their own (None: without one). They then have ``simulated_seconds`` in the data.

    Returns:
        The data, with ``table()`` and ``plot()``.

    Raises:
        ValueError: an argument is wrong; a run in the folder had other settings; module or data can't be sent to
            another process.
        RuntimeError: runs have failed; the others are in the folder.
        ModuleNotFoundError: pandas is missing; the extra ``compare`` has it.
    """
    needed("pandas", "`compare`")
    tasks = _tasks(module, data, checked_runs(runs, cluster), trainer, _checked_seeds(seeds))
    processes = check_count("processes", processes, "runs at a time")
    progress_bar = check_bool("progress_bar", progress_bar)
    home = Folder(folder)
    finished = {i: rows for i, task in enumerate(tasks) if (rows := home.load(task)) is not None}
    left = [task for i, task in enumerate(tasks) if i not in finished]
    home.describe(tasks)
    with _Progress(len(tasks), len(finished), progress_bar) as progress:
        if processes == 1:
            for task in left:
                _train_here(task, home, progress.report)
        elif left:
            train_in_processes(left, home, processes, progress.report)
    if progress.failures:
        named = "; ".join(
            f"{task.name!r} with seed {task.seed}: {text.strip().splitlines()[-1]}" for task, text in progress.failures
        )
        raise RuntimeError(
            f"{len(progress.failures)} of {len(tasks)} runs have failed: {named}. The others are in {home.path}: the"
            " same call trains the failed ones again, and a call without them returns the others."
        )
    return Comparison(_frame(tasks, [finished[i] if i in finished else home.load(t) for i, t in enumerate(tasks)]))


def _tasks(
    module: Any,
    data: Any,
    named: Mapping[str, Run],
    trainer: Arguments | Callable[[], Arguments],
    seeds: Sequence[int],
) -> list[Task]:
    """All that is to be trained, run by run within each seed, so that an early look has every run."""
    for name, factory in (("module", module), ("data", data)):
        if not callable(factory) or isinstance(factory, LightningModule):
            raise ValueError(
                f"`{name}` (={type(factory).__name__} object) must be a callable that makes it: every run needs a new"
                f" one. Pass the class, a function, or `functools.partial(MyClass, ...)`."
            )
    if not callable(trainer) and not isinstance(trainer, Mapping):
        raise ValueError(f"`trainer` (={trainer!r}) must be a dict with arguments of Lightning's Trainer.")
    tasks = [Task(name, seed, run, module, data, trainer) for seed in seeds for name, run in named.items()]
    for task in tasks[: len(named)]:
        trainer_arguments(task)
    return tasks


def _checked_seeds(seeds: Any) -> list[int]:
    count = as_integer(seeds)
    given = list(range(count)) if count is not None else seeds
    if not isinstance(given, (list, tuple, range)) or not len(given):
        raise ValueError(f"`seeds` (={seeds!r}) must be their number, at least 1, or a list of them.")
    checked = [as_integer(seed) for seed in given]
    if any(seed is None or not 0 <= seed < 2**32 for seed in checked) or len(set(checked)) < len(checked):
        raise ValueError(f"`seeds` (={seeds!r}) must be different integers from 0 to 2**32 - 1.")
    return [seed for seed in checked if seed is not None]


def _train_here(task: Task, folder: Folder, report: Callable[[Task, float | str], None]) -> None:
    try:
        folder.save(task, train(task, lambda part: report(task, min(part, 0.999))))
        report(task, 1.0)
    except Exception:
        report(task, traceback.format_exc())


def _frame(tasks: Sequence[Task], rows_of: Sequence[list[Row] | None]) -> Any:
    """The tidy DataFrame, run by run."""
    pandas = needed("pandas", "`compare`")
    shape = {task.name: workers_and_interval(task.run) for task in tasks}
    order = {name: i for i, name in enumerate(shape)}
    rows = []
    for task, own in sorted(zip(tasks, rows_of, strict=True), key=lambda pair: order[pair[0].name]):
        num_nodes, interval = shape[task.name]
        named = {"run": task.name, "seed": task.seed, "num_nodes": num_nodes, "diloco_interval": interval}
        rows += [{**named, **row} for row in own or ()]
    frame = pandas.DataFrame(rows)
    metrics = [name for name in frame.columns if name not in COLUMNS]
    return frame[[*COLUMNS, *metrics]].astype({"diloco_interval": "Int64"})


class _Progress:
    """The bar, which counts parts of runs, too, and the failures."""

    def __init__(self, total: int, finished: int, visible: bool) -> None:
        layout = "{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total} runs [{elapsed}<{remaining}{postfix}]"
        self._bar = tqdm(
            desc="compare",
            total=total,
            initial=finished,
            bar_format=layout,
            mininterval=0.5,
            disable=not visible,
            file=sys.stderr,
        )
        self._finished, self._parts = finished, dict[tuple[str, int], float]()
        self.failures: list[tuple[Task, str]] = []

    def report(self, task: Task, said: float | str) -> None:
        """See :data:`~lightning_diloco.comparison.processes.Report`."""
        key = (task.name, task.seed)
        if isinstance(said, str):
            self.failures.append((task, said))
            tqdm.write(f"{task.name}, seed {task.seed}, has failed:\n{said}", file=sys.stderr)
        if isinstance(said, str) or said == 1.0:
            self._parts.pop(key, None)
            self._finished += 1
        else:
            self._parts[key] = said
        self._bar.set_postfix_str(", ".join(dict.fromkeys(name for name, _ in self._parts)), refresh=False)
        self._bar.update(self._finished + sum(self._parts.values()) - self._bar.n)

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()
