"""What is compared: the description of a run, its short forms, and grids of runs.

Owns the arguments of a run and their checks. Doesn't train (``training.py``) and doesn't store (``folder.py``).
"""

import copy
import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import quote

from torch.optim import Optimizer

from lightning_diloco.algorithms import DataParallel
from lightning_diloco.arguments import as_integer, check_count, check_instance, plain_value
from lightning_diloco.cluster import Cluster
from lightning_diloco.strategy import DilocoStrategy

PLAIN, SAME_SAMPLES, DATA_PARALLEL = "plain", "same samples", "DataParallel"
_FORMS = (
    f"'{PLAIN}', '{SAME_SAMPLES}', '{DATA_PARALLEL}', a dict with arguments of DilocoStrategy, or a"
    " lightning_diloco.comparison.Run"
)
_LONGEST = 200  # characters of a name of a file, of 255 that file systems allow, with seed and ending
Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """A run of a comparison, where the short forms of :func:`~lightning_diloco.compare` don't say enough.

    Args:
        strategy: arguments of :class:`~lightning_diloco.DilocoStrategy`, copied for every seed, or a callable that
            makes the strategy; None: a plain Trainer, one worker.
        times: the run is this many times as long: multiplies the Trainer's ``max_steps``, ``min_steps`` and a
            ``val_check_interval`` in steps. ``max_epochs`` stays as it is.
        trainer: arguments of the Trainer in place of the comparison's.
        module: keyword arguments for the comparison's module factory.
        data: keyword arguments for the comparison's data factory.
    """

    strategy: Arguments | Callable[[], DilocoStrategy] | None = None
    times: int = 1
    trainer: Arguments = field(default_factory=dict)
    module: Arguments = field(default_factory=dict)
    data: Arguments = field(default_factory=dict)

    def make_strategy(self) -> DilocoStrategy | None:
        """A new strategy, which shares nothing with that of another run; None for a plain Trainer."""
        if self.strategy is None:
            return None
        if isinstance(self.strategy, Mapping):
            return DilocoStrategy(**copy.deepcopy(dict(self.strategy)))
        made = self.strategy()
        if not isinstance(made, DilocoStrategy):
            raise ValueError(f"`strategy` (={self.strategy!r}) must return a DilocoStrategy, not {made!r}.")
        return made

    def plain(self) -> dict[str, Any]:
        """The arguments as plain values, as files keep them."""
        parts = {"strategy": self.strategy, "times": self.times, "trainer": self.trainer}
        return {name: plain_value(part) for name, part in {**parts, "module": self.module, "data": self.data}.items()}


def workers_and_interval(run: Run) -> tuple[int, int | None]:
    """N and H; H is None for runs that have no rounds: the plain Trainer and data parallelism."""
    strategy = run.make_strategy()
    if strategy is None:
        return 1, None
    settings = strategy._settings
    return settings.num_workers, None if isinstance(settings.algorithm, DataParallel) else settings.interval


def file_name(name: str) -> str:
    """The name of a run as it stands in names of files."""
    return quote(name, safe=" ,=+()")


def checked_runs(runs: Any, cluster: Cluster | None = None) -> dict[str, Run]:
    """The runs by name, with short forms written out, each tried once.

    Args:
        runs: the argument of :func:`~lightning_diloco.compare`.
        cluster: of the runs with arguments of DilocoStrategy that have none of their own.

    Raises:
        ValueError: a run or an argument of a run is none; names the run. Or no run takes the ``cluster``.
    """
    check_instance("cluster", cluster, Cluster, "Cluster.low(step_seconds=0.1)")
    if not isinstance(runs, Mapping) or not runs:
        raise ValueError(f"`runs` (={runs!r}) must be a dict from names to runs, of which each is {_FORMS}.")
    checked: dict[str, Run] = {}
    for name, spec in runs.items():
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"`runs` has the name {name!r}; names must be strings with a visible character.")
        if len(file_name(name)) > _LONGEST:
            raise ValueError(
                f"`runs` has the name {name!r}, which makes a file's name of {len(file_name(name))} characters; at most"
                f" {_LONGEST} fit."
            )
        if not isinstance(spec, (Run, Mapping)) and spec not in (PLAIN, SAME_SAMPLES, DATA_PARALLEL):
            raise ValueError(f"`runs[{name!r}]` (={spec!r}) must be {_FORMS}.")
        if isinstance(spec, Mapping):
            spec = Run(dict(spec))
        if isinstance(spec, Run):
            _check(name, spec)
            checked[name] = spec if cluster is None else _on_cluster(name, spec, cluster)
    for name, spec in runs.items():
        if spec == PLAIN:
            checked[name] = Run()
        elif spec == SAME_SAMPLES:
            checked[name] = Run(times=_common_workers(name, spec, checked))
        elif spec == DATA_PARALLEL:
            num_nodes = _common_workers(name, spec, checked)
            checked[name] = Run({"num_nodes": num_nodes, "algorithm": DataParallel()})
            checked[name] = checked[name] if cluster is None else _on_cluster(name, checked[name], cluster)
    if cluster is not None and all(run.strategy is None for run in checked.values()):
        raise ValueError(
            f"`cluster` (={cluster!r}) has no effect: no run takes it. Plain runs have no clock; a run with arguments"
            " of DilocoStrategy has one."
        )
    return {name: checked[name] for name in runs}


def _check(name: str, run: Run) -> None:
    for part in ("trainer", "module", "data"):
        if not isinstance(getattr(run, part), Mapping):
            raise ValueError(f"`runs[{name!r}]`: `{part}` (={getattr(run, part)!r}) must be a dict.")
    if not isinstance(run.strategy, (Mapping, type(None))) and not callable(run.strategy):
        raise ValueError(
            f"`runs[{name!r}]`: `strategy` (={run.strategy!r}) must be a dict with arguments of DilocoStrategy, a"
            " callable that makes one, or None. A strategy object serves a single fit, and every seed needs a new one."
        )
    try:
        check_count("times", run.times, "lengths of the comparison's run")
        run.make_strategy()
    except (TypeError, ValueError) as error:
        raise ValueError(f"`runs[{name!r}]`: {error}") from error


def _on_cluster(name: str, run: Run, cluster: Cluster) -> Run:
    """The run on ``cluster``, unless it has one of its own, or None; plain runs are as they were."""
    if run.strategy is None:
        return run
    if isinstance(run.strategy, Mapping):
        on_cluster = replace(run, strategy={"cluster": cluster, **run.strategy})
        _check(name, on_cluster)
        return on_cluster
    strategy = run.make_strategy()
    if strategy is None or strategy._settings.cluster is None:
        raise ValueError(
            f"`runs[{name!r}]`: its strategy comes from a callable, which `cluster` can't be passed on to. Make it with"
            " a `cluster` there, or write the strategy as a dict."
        )
    return run


def _common_workers(name: str, form: str, runs: Mapping[str, Run]) -> int:
    """N of the runs that are written out, for the forms that don't say it."""
    counts = {n for n, _ in map(workers_and_interval, runs.values()) if n > 1}
    if len(counts) == 1:
        return counts.pop()
    written = "`Run(times=N)`" if form == SAME_SAMPLES else "`dict(num_nodes=N, algorithm=DataParallel())`"
    raise ValueError(
        f"`runs[{name!r}]` (={form!r}) takes the number of workers from the other runs, which have"
        f" {' and '.join(map(str, sorted(counts))) or 'no workers'}. Write it out: {written}."
    )


_SHORT = {"num_nodes": "N", "diloco_interval": "H"}


def grid(label: str = "", **arguments: Any) -> dict[str, dict[str, Any]]:
    """Named runs for all combinations of the arguments of DilocoStrategy that are lists.

    >>> list(grid("plain average", num_nodes=[2, 4], diloco_interval=[5, 20], outer_optimizer_kwargs={"lr": 1.0}))
    ['plain average, N=2, H=5', 'plain average, N=2, H=20', 'plain average, N=4, H=5', 'plain average, N=4, H=20']
    >>> list(grid(num_nodes=4, outer_optimizer_kwargs=[None, {"lr": 0.7, "momentum": 0.5}]))
    ['outer_optimizer_kwargs=default', 'lr=0.7 momentum=0.5']

    Args:
        label: beginning of the names.
        arguments: of :class:`~lightning_diloco.DilocoStrategy`. A list, tuple or range is varied and stands in the
            names: by its value, an algorithm or optimizer by its class; everything else is the same in all runs.

    Returns:
        A part of the ``runs`` of :func:`~lightning_diloco.compare`, as a dict from names to arguments.

    Raises:
        ValueError: an argument is unknown, a list is empty, or two runs would have the same name.
    """
    known = list(inspect.signature(DilocoStrategy).parameters)
    for name, value in arguments.items():
        if name not in known:
            raise ValueError(
                f"`grid` was given {name!r}, which DilocoStrategy doesn't have; it has {', '.join(known)}."
            )
        if _is_axis(value) and not len(value):
            raise ValueError(f"`grid`: the list of `{name}` is empty.")
    axes = {name: list(value) for name, value in arguments.items() if _is_axis(value)}
    fixed = {name: value for name, value in arguments.items() if name not in axes}
    runs: dict[str, dict[str, Any]] = {}
    for combination in itertools.product(*axes.values()):
        varied = dict(zip(axes, combination, strict=True))
        name = ", ".join(filter(None, [label, *(_named(n, v) for n, v in varied.items())]))
        if name in runs or not name:
            raise ValueError(
                f"`grid` would make {'two runs' if name else 'a run'} with the name {name!r}. Make a grid for each,"
                " with a `label` of its own."
            )
        runs[name] = {**fixed, **varied}
    return runs


def _is_axis(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _named(name: str, value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{k}={v}" for k, v in value.items())
    if value is None or isinstance(value, (str, bool)) or as_integer(value) is not None:
        return f"{_SHORT.get(name, name)}={'default' if value is None else value}"
    if isinstance(value, type) and issubclass(value, Optimizer):
        return value.__name__
    return type(value).__name__ if not hasattr(value, "__qualname__") else str(value.__qualname__)
