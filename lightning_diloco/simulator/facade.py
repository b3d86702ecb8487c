"""DilocoSimulator: DiLoCo for people with an ``nn.Module`` and a dataset.

Owns the simulator's arguments: their checks, and their translation into a Trainer, a DilocoStrategy, a module
(``module.py``) and a callback (``callback.py``). Has no training logic.
"""

import copy
import inspect
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, ClassVar

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint, ProgressBar, TQDMProgressBar
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_diloco.arguments import as_integer, check_bool, check_count
from lightning_diloco.simulator.callback import SimulatorCallback, set_level
from lightning_diloco.simulator.history import History
from lightning_diloco.simulator.metrics import EvalStats, TrainStats
from lightning_diloco.simulator.module import SimulatorModule
from lightning_diloco.state.randomness import seed_variables_kept
from lightning_diloco.strategy import DilocoStrategy

_STRATEGY_ARGUMENTS = ("num_nodes", "diloco_interval", "outer_optimizer_cls", "outer_optimizer_kwargs")
_TRAINER_ARGUMENTS = {
    "strategy": "`strategy_kwargs`",
    "max_steps": "`max_local_step`",
    "max_epochs": "`num_epochs`",
    "fast_dev_run": "`max_local_step`",
    "enable_checkpointing": "`save_dir`",
    "limit_val_batches": "`eval_iters`",
    "val_check_interval": "`diloco_interval` (the outer model is evaluated after every outer step)",
    "check_val_every_n_epoch": "`diloco_interval` (the outer model is evaluated after every outer step)",
    "num_sanity_val_steps": "the simulator: it has no sanity check",
}


class DilocoSimulator:
    """Trains an ``nn.Module`` with DiLoCo on N simulated workers.

    A facade: :meth:`train` builds a LightningModule, a ``Trainer(devices=1, logger=False)`` and a
    :class:`~lightning_diloco.DilocoStrategy` and calls ``trainer.fit``; see ``trainer_kwargs``. Each call trains a
    new model; modules in ``model_kwargs``, and a ``loss_fn`` that is a module, are copied. The run takes
    exactly ``total`` = min(max_local_step, num_epochs · len(train_dataset) // (batch_size · num_nodes)) local steps; a
    worker's short last batch of an epoch is kept. Data is loaded in the process itself.

    Args:
        model_cls: class of the model, or any callable that makes it: a function, a lambda, a partial. What a callable
            other than a class returns is copied, since every run trains a new model.
        model_kwargs: arguments for ``model_cls``; default none.
        num_nodes: simulated workers N ≥ 1.
        diloco_interval: local steps H ≥ 1 between synchronisations.
        batch_size: samples per worker and step, and per batch of an evaluation. (With more processes than workers: per
            process and step, as everywhere.)
        loss_fn: called as ``loss_fn(model(x), y)``; returns a single number, the mean over the batch.
        train_dataset: pairs ``(x, y)``, with a length. For other items see
            :class:`lightning_diloco.simulator.SimulatorModule`.
        eval_dataset: the outer model is evaluated on it after every outer step; results go to ``eval_loss_hook``, to
            the Trainer's loggers and to ``trainer.callback_metrics`` (``eval_loss``, ``eval_accuracy``,
            ``eval_perplexity``). Training is undisturbed.
        optimizer_cls: inner optimizer.
        optimizer_kwargs: arguments for ``optimizer_cls``; default none.
        outer_optimizer_cls: outer optimizer.
        outer_optimizer_kwargs: arguments for ``outer_optimizer_cls``. None: for exactly ``torch.optim.SGD`` lr 0.7,
            momentum 0.9, nesterov; for other classes the class's defaults.
        num_epochs: passes over ``train_dataset``.
        max_local_step: cap on the local steps.
        cosine_anneal: take the inner learning rate to 0 along a cosine over the ``total`` local steps.
        eval_iters: batches per evaluation, the first ones of ``eval_dataset``, at most all.
        ckpt_interval: outer steps between checkpoint files, ``step=000500.ckpt`` after local step 500.
        save_dir: folder of checkpoint files, the last ``final.ckpt``. Files of the same name are replaced. None: no
            file is written.
        train_loss_hook: called with a :class:`~lightning_diloco.TrainStats` after each local step.
        eval_loss_hook: called with an :class:`~lightning_diloco.EvalStats` after each evaluation. At the same step
            ``train_loss_hook`` is called first, and the checkpoint is written last. Hooks run on process 0 only. An
            exception of a hook stops the run; ``simulator.trainer.should_stop = True`` ends the run early, with the
            last outer step and file.
        strategy_kwargs: further arguments of DilocoStrategy. ``eval_weights`` defaults to "outer" here, so that files
            contain the evaluated weights.
        trainer_kwargs: further arguments of Lightning's Trainer, for example ``callbacks`` (the same objects in every
            run, so they keep their state from run to run) or ``precision``.
        quiet: no progress bar, no summaries and no log lines of Lightning (warnings and errors remain). In
            ``trainer_kwargs`` single ones can be switched on again.
        seed: given to ``lightning.seed_everything`` before the model is built, so that runs repeat bit for bit. None:
            generators are used as they are found.

    Attributes:
        total: local steps of a run.

    Raises:
        ValueError: an argument is out of range, unknown or given twice, or the run would have no step.
    """

    module_cls: ClassVar[type[SimulatorModule]] = SimulatorModule

    def __init__(
        self,
        model_cls: Callable[..., nn.Module],
        model_kwargs: dict[str, Any] | None = None,
        *,
        num_nodes: int,
        diloco_interval: int,
        batch_size: int,
        loss_fn: Callable[..., Tensor],
        train_dataset: Dataset[Any],
        eval_dataset: Dataset[Any] | None = None,
        optimizer_cls: type[Optimizer] = torch.optim.AdamW,
        optimizer_kwargs: dict[str, Any] | None = None,
        outer_optimizer_cls: type[Optimizer] = torch.optim.SGD,
        outer_optimizer_kwargs: dict[str, Any] | None = None,
        num_epochs: int = 1,
        max_local_step: int | None = None,
        cosine_anneal: bool = False,
        eval_iters: int = 50,
        ckpt_interval: int | None = None,
        save_dir: str | os.PathLike[str] | None = None,
        train_loss_hook: Callable[[TrainStats], None] | None = None,
        eval_loss_hook: Callable[[EvalStats], None] | None = None,
        strategy_kwargs: dict[str, Any] | None = None,
        trainer_kwargs: dict[str, Any] | None = None,
        seed: int | None = None,
        quiet: bool = False,
    ) -> None:
        _check_maker(model_cls)
        _check_class("optimizer_cls", optimizer_cls, Optimizer)
        num_nodes = check_count("num_nodes", num_nodes, "simulated workers")
        diloco_interval = check_count("diloco_interval", diloco_interval, "local steps between outer steps")
        batch_size = check_count("batch_size", batch_size, "samples per worker and step")
        num_epochs = check_count("num_epochs", num_epochs, "passes over `train_dataset`")
        eval_iters = check_count("eval_iters", eval_iters, "batches per evaluation")
        if max_local_step is not None:
            max_local_step = check_count("max_local_step", max_local_step, "local steps at most")
        if ckpt_interval is not None:
            ckpt_interval = check_count("ckpt_interval", ckpt_interval, "outer steps between checkpoints")
        cosine_anneal = check_bool("cosine_anneal", cosine_anneal)
        quiet = check_bool("quiet", quiet)
        if isinstance(loss_fn, type):
            raise ValueError(f"`loss_fn` (={loss_fn!r}) is a class. Pass an instance: `{loss_fn.__name__}()`.")
        if not callable(loss_fn):
            raise ValueError(f"`loss_fn` (={loss_fn!r}) must be a callable `(model(x), y) -> loss`.")
        for name, hook in (("train_loss_hook", train_loss_hook), ("eval_loss_hook", eval_loss_hook)):
            if hook is not None and not callable(hook):
                raise ValueError(f"`{name}` (={hook!r}) must be a callable that takes the statistics, or None.")
        if eval_loss_hook is not None and eval_dataset is None:
            raise ValueError("`eval_loss_hook` was given without `eval_dataset` and would never be called. Give both.")
        if ckpt_interval is not None and save_dir is None:
            raise ValueError(
                f"`ckpt_interval` (={ckpt_interval}) was given without `save_dir`. Give the folder of the files."
            )
        given_seed, seed = seed, as_integer(seed)
        if given_seed is not None and (seed is None or not 0 <= seed < 2**32):
            raise ValueError(f"`seed` (={given_seed!r}) must be an integer from 0 to 2**32 - 1, or None.")
        self._model_kwargs = _checked_kwargs("model_kwargs", model_kwargs, model_cls)
        self._optimizer_kwargs = _checked_kwargs("optimizer_kwargs", optimizer_kwargs, optimizer_cls, [])
        reserved = dict.fromkeys(_STRATEGY_ARGUMENTS, "the simulator's argument of the same name")
        self._strategy_kwargs = {
            "num_nodes": num_nodes,
            "diloco_interval": diloco_interval,
            "outer_optimizer_cls": outer_optimizer_cls,
            "outer_optimizer_kwargs": outer_optimizer_kwargs,
            "eval_weights": "outer",
            **_checked_kwargs("strategy_kwargs", strategy_kwargs, DilocoStrategy, reserved=reserved),
        }
        self._trainer_kwargs = _checked_kwargs("trainer_kwargs", trainer_kwargs, L.Trainer, reserved=_TRAINER_ARGUMENTS)
        DilocoStrategy(**self._strategy_kwargs)  # checks the arguments; every run makes a new strategy
        samples = _checked_length("train_dataset", train_dataset)
        self.total = num_epochs * samples // (batch_size * num_nodes)
        if max_local_step is not None:
            self.total = min(max_local_step, self.total)
        if self.total == 0:
            raise ValueError(
                f"The run would have no step: `num_epochs` (={num_epochs}) times {samples} samples are fewer than"
                f" `batch_size` (={batch_size}) times `num_nodes` (={num_nodes}). Lower `batch_size` or `num_nodes`, or"
                " raise `num_epochs`."
            )
        if eval_dataset is not None and _checked_length("eval_dataset", eval_dataset) == 0:
            raise ValueError("`eval_dataset` is empty. Leave the argument out, or give a dataset with samples.")
        self._model_cls, self._optimizer_cls, self._loss_fn = model_cls, optimizer_cls, loss_fn
        self._train_dataset, self._eval_dataset = train_dataset, eval_dataset
        self._batch_size, self._cosine_anneal = batch_size, cosine_anneal
        self._eval_iters, self._ckpt_interval = eval_iters, ckpt_interval
        self._save_dir = None if save_dir is None else _checked_folder("save_dir", save_dir)
        self._train_loss_hook, self._eval_loss_hook = train_loss_hook, eval_loss_hook
        self._seed, self._quiet = seed, quiet
        self._run: tuple[SimulatorModule, L.Trainer, DilocoStrategy] | None = None

    def train(self, ckpt_path: str | os.PathLike[str] | None = None) -> History:
        """Trains a new model, or continues from a checkpoint file.

        Returns:
            Losses, evaluations and outer steps, also where the run has started processes of its own.

        Args:
            ckpt_path: a file written by an earlier run of the same model. With N ≥ 2 workers a resumed run equals the
                uninterrupted run bit for bit, including the outer step on a partial round. A longer run (larger
                ``num_epochs``) resumes ``final.ckpt`` with a new pass; a run of the same length has nothing left to do.
        """
        with seed_variables_kept(), _silence() if self._quiet else nullcontext():
            if self._seed is not None:
                L.seed_everything(self._seed, verbose=False)
            return self._fit(None if ckpt_path is None else os.fspath(ckpt_path))

    def _fit(self, ckpt_path: str | None) -> History:
        originals = {**self._model_kwargs, "": self._loss_fn}
        shared: dict[int, Any] = {}  # modules are copied: else the next run would start from this run's weights
        copies = {k: copy.deepcopy(v, shared) if isinstance(v, nn.Module) else v for k, v in originals.items()}
        loss_fn = copies.pop("")
        model = _made(self._model_cls, copies)
        strategy = DilocoStrategy(**self._strategy_kwargs)
        cosine_steps = self.total if self._cosine_anneal else None
        module = self.module_cls(model, loss_fn, self._optimizer_cls, self._optimizer_kwargs, cosine_steps)
        given = self._trainer_kwargs.get("callbacks") or []
        callback = self._callback()
        callbacks = [*(given if isinstance(given, (list, tuple)) else [given]), callback]
        silent = {"enable_progress_bar": False, "enable_model_summary": False} if self._quiet else {}
        options = {"devices": 1, "logger": False, **silent, **self._trainer_kwargs, "callbacks": callbacks}
        if not options.keys() & {"enable_progress_bar", "barebones"} and not any(
            isinstance(c, ProgressBar) for c in callbacks
        ):
            callbacks.append(TQDMProgressBar())  # Rich's shows an unlimited number of epochs as -2
        trainer = L.Trainer(
            strategy=strategy,
            max_steps=self.total,
            max_epochs=-1,  # `total` ends the run, even if a pass is shorter than usual
            enable_checkpointing=any(isinstance(c, Checkpoint) for c in callbacks),
            **options,
        )
        self._run = module, trainer, strategy
        loader = DataLoader(self._train_dataset, self._batch_size, shuffle=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The 'train_dataloader' does not have many workers")  # it has no argument
            trainer.fit(module, loader, ckpt_path=ckpt_path)
        return replace(callback.history, outer=strategy.reports)

    def __repr__(self) -> str:
        model = getattr(self._model_cls, "__name__", repr(self._model_cls))
        samples = len(self._train_dataset)  # type: ignore[arg-type]
        what = f"{model} on {samples:,} samples, batches of {self._batch_size:,}, {self.total:,} local steps"
        strategy = DilocoStrategy(**self._strategy_kwargs) if self._run is None else self.strategy
        return f"<{type(self).__name__} of {what}, {strategy!r}>"

    @property
    def model(self) -> nn.Module:
        """The model of the present or last run; after the run, with the weights of θ."""
        return self._present_run[0].model

    @property
    def trainer(self) -> L.Trainer:
        """The Trainer of the present or last run."""
        return self._present_run[1]

    @property
    def strategy(self) -> DilocoStrategy:
        """The strategy of the present or last run: workers' weights, bytes sent, outer optimizer."""
        return self._present_run[2]

    @property
    def _present_run(self) -> tuple[SimulatorModule, L.Trainer, DilocoStrategy]:
        if self._run is None:
            raise RuntimeError("`model`, `trainer` and `strategy` exist from the first call of `train()` on.")
        return self._run

    def _callback(self) -> "SimulatorCallback":
        data = self._eval_dataset
        batches = None if data is None else DataLoader(data, self._batch_size)
        return SimulatorCallback(
            self._train_loss_hook,
            self._eval_loss_hook,
            batches,
            self._eval_iters,
            self._ckpt_interval,
            self._save_dir,
            self._cosine_anneal,
            self._quiet,
        )


@contextmanager
def _silence() -> Iterator[None]:
    """Lightning's loggers pass errors only; afterwards their levels are restored."""
    before = set_level(logging.ERROR)
    try:
        yield
    finally:
        set_level(*before)


def _check_maker(model_cls: Any) -> None:
    if isinstance(model_cls, nn.Module):
        raise ValueError(
            f"`model_cls` (={type(model_cls).__name__}(...)) is a model, and must be a callable that makes it. Pass its"
            " class, or `lambda: model`, of which every run trains a copy."
        )
    if not callable(model_cls) or (isinstance(model_cls, type) and not issubclass(model_cls, nn.Module)):
        raise ValueError(
            f"`model_cls` (={model_cls!r}) must be a class derived from torch.nn.Module, or a callable that makes a"
            " module."
        )


def _made(model_cls: Callable[..., nn.Module], arguments: Mapping[str, Any]) -> nn.Module:
    model = model_cls(**arguments)
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"`model_cls` (={model_cls!r}) returned a {type(model).__name__}, but must make a torch.nn.Module."
        )
    return model if isinstance(model_cls, type) else copy.deepcopy(model)  # it may be the last run's


def _check_class(name: str, cls: Any, base: type) -> None:
    if not isinstance(cls, type) or not issubclass(cls, base):
        raise ValueError(f"`{name}` (={cls!r}) must be a class derived from {base.__module__}.{base.__qualname__}.")


def _checked_folder(name: str, path: Any) -> str:
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
        raise ValueError(f"`{name}` (={path!r}) must be the path of a folder, or None.")
    if os.path.exists(path) and not os.path.isdir(path):
        raise ValueError(f"`{name}` (={path!r}) is a file. Name a folder; it is made if it doesn't exist.")
    return os.fspath(path)


def _checked_length(name: str, dataset: Any) -> int:
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise ValueError(
            f"`{name}` (={dataset!r}) must be a dataset with `__len__` and `__getitem__`. Streams work with a"
            " DilocoStrategy in your own Trainer."
        )
    return len(dataset)


def _checked_kwargs(
    name: str, kwargs: Any, cls: Callable[..., Any], *args: Any, reserved: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """``kwargs`` as a new dict, if ``cls(*args, **kwargs)`` has such arguments and none of them is reserved."""
    if not isinstance(kwargs, (Mapping, type(None))):
        raise ValueError(f"`{name}` (={kwargs!r}) must be a dict or None.")
    given = dict(kwargs or {})
    for key in given:
        if reserved and key in reserved:
            raise ValueError(
                f"`{name}` has {key!r} (={given[key]!r}), which is decided by {reserved[key]}. Leave {key!r} out."
            )
    try:
        inspect.signature(cls).bind(*args, **given)
    except TypeError as error:
        called = getattr(cls, "__name__", repr(cls))
        raise ValueError(f"`{name}` (={given!r}) doesn't fit {called}: {error}.") from error
    return given
