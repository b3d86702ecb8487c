"""A run of a comparison with a seed: from the factories to the rows.

Owns the conditions that all runs share. A run is what this script would do, with the same numbers::

    L.seed_everything(seed)
    module, data = module_factory(), data_factory()
    trainer = L.Trainer(**arguments, strategy=DilocoStrategy(...))
    trainer.fit(module, datamodule=data)
    trainer.validate(module, datamodule=data)
"""

import copy
import hashlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import lightning as L
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_diloco.arguments import as_integer, plain_value
from lightning_diloco.callback import DilocoCallback
from lightning_diloco.comparison.recording import COLUMNS, Recorder, Row
from lightning_diloco.comparison.runs import Arguments, Run
from lightning_diloco.state.randomness import seed_variables_kept

QUIET: Arguments = {
    "logger": None,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "devices": 1,
}
"""Arguments of the Trainer unless others are given."""


@dataclass(frozen=True)
class Task:
    """A run with a seed.

    Attributes:
        name: of the run.
        seed: for ``L.seed_everything``, before module and data are made.
        run: what differs from the other runs.
        module: makes the LightningModule.
        data: makes a LightningDataModule, or a pair of loaders for training and validation.
        trainer: arguments of the Trainer, or a callable that makes them.
        settings: all that decides the run's numbers but the seed, as plain values. Functions and classes count by their
            names, lambdas by their code.
    """

    name: str
    seed: int
    run: Run
    module: Callable[..., L.LightningModule]
    data: Callable[..., Any]
    trainer: Arguments | Callable[[], Arguments]
    settings: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        run, trainer = self.run.plain(), self.trainer
        settings = {
            "module": _factory(self.module),
            "arguments of module": run["module"],
            "data": _factory(self.data),
            "arguments of data": run["data"],
            "strategy": run["strategy"],
            "times": run["times"],
            "trainer": plain_value(trainer) if callable(trainer) else plain_value({**trainer, **self.run.trainer}),
        }
        if callable(trainer):
            settings["trainer of the run"] = run["trainer"]
        object.__setattr__(self, "settings", settings)


def _factory(factory: Any) -> Any:
    code = getattr(factory, "__code__", None)
    if code is None or factory.__name__ != "<lambda>":
        return plain_value(factory)
    parts = repr((code.co_code, code.co_names, [c for c in code.co_consts if not hasattr(c, "co_code")]))
    return f"{plain_value(factory)} {hashlib.sha256(parts.encode()).hexdigest()[:16]}"


def train(task: Task, progress: Callable[[float], None]) -> list[Row]:
    """Trains and validates; quiet, and without a trace in the process's random generators and environment.

    Args:
        task: the run.
        progress: called now and then with the completed part of the run, 0 to 1.

    Returns:
        The rows of :class:`~lightning_diloco.comparison.recording.Recorder`.
    """
    with isolate_rng(), seed_variables_kept(), _without_noise():
        L.seed_everything(task.seed, verbose=False)
        module = task.module(**copy.deepcopy(dict(task.run.module)))
        if not isinstance(module, L.LightningModule):
            raise ValueError(f"`module` must return a LightningModule; it returned {module!r}.")
        data = task.data(**copy.deepcopy(dict(task.run.data)))
        loaders = _loaders(data)
        recorder = Recorder(progress)
        trainer = L.Trainer(**_arguments(task, recorder))
        trainer.fit(module, **loaders("train_dataloaders", "val_dataloaders"))
        trainer.validate(module, **loaders(None, "dataloaders"), verbose=False)
    if not any(name not in COLUMNS for row in recorder.rows for name in row):
        raise ValueError(
            "The validation has logged nothing to compare. `data` must have a `val_dataloader`, and the module's"
            " `validation_step` must call `self.log`."
        )
    return recorder.rows


def trainer_arguments(task: Task) -> dict[str, Any]:
    """The arguments of the Trainer, fresh copies, without strategy and recorder.

    Raises:
        ValueError: an argument belongs to the comparison, or would take the run apart.
    """
    given = task.trainer() if callable(task.trainer) else task.trainer
    if not isinstance(given, Mapping):
        raise ValueError(f"`trainer` (={task.trainer!r}) must be a dict with arguments of the Trainer.")
    arguments = {**QUIET, **copy.deepcopy(dict(given)), **copy.deepcopy(dict(task.run.trainer))}
    if "strategy" in arguments:
        raise ValueError(
            f"`trainer` (of the run {task.name!r}) has 'strategy' (={arguments['strategy']!r}), which the runs decide:"
            " give the arguments of DilocoStrategy in `runs`."
        )
    devices, machines = arguments["devices"], arguments.get("num_nodes", 1)
    count = len(devices) if isinstance(devices, (list, tuple)) else as_integer(devices)
    if count != 1 or machines != 1:
        raise ValueError(
            f"`trainer` has `devices` (={devices!r}) and `num_nodes` (={machines!r}), but a run of a comparison takes"
            " place in one process on one device. `compare(processes=)` trains several runs at a time."
        )
    for name in ("fast_dev_run", "barebones"):
        if arguments.get(name):
            raise ValueError(f"`trainer` has `{name}` (={arguments[name]!r}), with which nothing is logged.")
    if arguments["logger"] is True:
        raise ValueError("`trainer` has `logger` (=True). Give a logger object, or leave it out.")
    for name in ("max_steps", "min_steps", "val_check_interval"):
        value = as_integer(arguments.get(name))
        if value is not None and value > 0:
            arguments[name] = value * task.run.times
    return arguments


def _arguments(task: Task, recorder: Recorder) -> dict[str, Any]:
    arguments = trainer_arguments(task)
    logger, callbacks = arguments["logger"] or [], arguments.get("callbacks") or []
    arguments["logger"] = [recorder.logger, *([logger] if isinstance(logger, Logger) else logger)]
    arguments["callbacks"] = [*([callbacks] if isinstance(callbacks, L.Callback) else callbacks), recorder]
    strategy = task.run.make_strategy()
    if strategy is None:
        arguments["callbacks"] = [c for c in arguments["callbacks"] if not isinstance(c, DilocoCallback)]
        return arguments
    if not any(isinstance(callback, DilocoCallback) for callback in arguments["callbacks"]):
        arguments["callbacks"].append(DilocoCallback(summary=False, hints=False, progress_bar=False))
    return {**arguments, "strategy": strategy}


def _loaders(data: Any) -> Callable[[str | None, str], dict[str, Any]]:
    """The data as arguments of ``trainer.fit`` and ``trainer.validate``, by the names of the loaders there."""
    if isinstance(data, L.LightningDataModule):
        return lambda train, val: {"datamodule": data}
    if isinstance(data, (list, tuple)) and len(data) == 2:
        return lambda train, val: {val: data[1], **({train: data[0]} if train else {})}
    raise ValueError(
        "`data` must return a LightningDataModule, or a pair of loaders for training and validation; it returned"
        f" {data!r}."
    )


@contextmanager
def _without_noise() -> Iterator[None]:
    """Inside, Lightning logs errors only, and its advice on loaders and loggers is not repeated for every run."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\.")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
