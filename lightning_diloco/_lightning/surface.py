"""The private surface of Lightning, and of torch's DataLoader, on which this folder depends.

Owns the tables of private functions and attributes, and their check before every run. Every use of a private name in
this folder has an entry here (a test compares them), except imported classes and constants: Python's ImportError names
those. The reason of each use stands beside the use; public names of private classes are listed, too.
"""

import inspect
from collections.abc import Callable
from functools import cache
from importlib import metadata
from operator import attrgetter
from types import ModuleType
from typing import Any

import torch
from lightning.fabric.utilities import data, distributed
from lightning.fabric.utilities import logger as fabric_logger
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from lightning.pytorch.loops.fetchers import _DataLoaderIterDataFetcher
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.optimization.automatic import _AutomaticOptimization
from lightning.pytorch.loops.optimization.manual import _ManualOptimization
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher, _SubprocessScriptLauncher
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.connectors import data_connector
from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector
from lightning.pytorch.trainer.connectors.data_connector import _DataConnector
from lightning.pytorch.trainer.connectors.logger_connector import result
from lightning.pytorch.trainer.connectors.logger_connector.logger_connector import _LoggerConnector
from lightning.pytorch.trainer.connectors.logger_connector.result import (
    _Metadata,
    _ResultCollection,
    _ResultMetric,
    _Sync,
)
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.distributed import distributed_c10d
from torch.utils import _pytree
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _BaseDataLoaderIter

_SUPPORTED = {"lightning": "lightning>=2.6,<2.7", "torch": "torch>=2.4"}

SIGNATURES: dict[tuple[type | ModuleType, str], tuple[str, ...]] = {
    (_FitLoop, "setup_data"): ("self",),
    (_FitLoop, "on_run_start"): ("self",),
    (_FitLoop, "on_advance_start"): ("self",),
    (_FitLoop, "on_advance_end"): ("self",),
    (_FitLoop, "on_run_end"): ("self",),
    (_TrainingEpochLoop, "advance"): ("self", "data_fetcher"),
    (_TrainingEpochLoop, "update_lr_schedulers"): ("self", "interval", "update_plateau_schedulers"),
    (_TrainingEpochLoop, "_build_kwargs"): ("self", "kwargs", "batch", "batch_idx"),
    (_TrainingEpochLoop, "_should_accumulate"): ("self",),
    (_TrainingEpochLoop, "_num_ready_batches_reached"): ("self",),
    (_TrainingEpochLoop, "_should_check_val_fx"): ("self", "data_fetcher"),
    (_EvaluationLoop, "run"): ("self", "args", "kwargs"),  # as its decorator shows them
    (_EvaluationLoop, "setup_data"): ("self",),
    (_EvaluationLoop, "_evaluation_step"): ("self", "batch", "batch_idx", "dataloader_idx", "dataloader_iter"),
    (_EvaluationLoop, "increment_progress_to_evaluation_end"): ("self",),
    (_AutomaticOptimization, "run"): ("self", "optimizer", "batch_idx", "kwargs"),
    (_AutomaticOptimization, "_make_closure"): ("self", "kwargs", "optimizer", "batch_idx"),
    (_AutomaticOptimization, "_optimizer_step"): ("self", "batch_idx", "train_step_and_backward_closure"),
    (_AutomaticOptimization, "_training_step"): ("self", "kwargs"),
    (_AutomaticOptimization, "_on_before_zero_grad"): ("self", "optimizer"),
    (_AutomaticOptimization, "_optimizer_zero_grad"): ("self", "batch_idx", "optimizer"),
    (_ManualOptimization, "run"): ("self", "kwargs"),
    (_LoggerConnector, "on_batch_start"): ("self", "batch", "dataloader_idx"),
    (_LoggerConnector, "on_batch_end"): ("self",),
    (_LoggerConnector, "epoch_end_reached"): ("self",),
    (_LoggerConnector, "log_eval_end_metrics"): ("self", "metrics"),
    (_LoggerConnector, "log_metrics"): ("self", "metrics", "step"),
    (_LoggerConnector, "update_train_step_metrics"): ("self",),
    (_ResultCollection, "update_metrics"): ("self", "key", "value", "batch_size"),
    (_ResultCollection, "metrics"): ("self", "on_step"),
    (_ResultCollection, "valid_items"): ("self",),
    (_ResultCollection, "reset"): ("self", "metrics", "fx"),
    (Precision, "_wrap_closure"): ("self", "model", "optimizer", "closure"),
    (Precision, "_after_closure"): ("self", "model", "optimizer"),
    (_DataConnector, "_requires_distributed_sampler"): ("self", "dataloader"),
    (_DataConnector, "_resolve_sampler"): ("self", "dataloader", "shuffle", "mode"),
    (_SignalConnector, "_sigterm_notifier_fn"): ("self", "signum", "_"),
    (_SignalConnector, "_slurm_sigusr_handler_fn"): ("self", "signum", "_"),
    (_SubprocessScriptLauncher, "_call_children_scripts"): ("self",),
    (_MultiProcessingLauncher, "launch"): ("self", "function", "args", "trainer", "kwargs"),
    (_MultiProcessingLauncher, "get_extra_results"): ("self", "trainer"),
    (_MultiProcessingLauncher, "update_main_process_results"): ("self", "trainer", "extra"),
    (_AcceleratorConnector, "_lazy_init_strategy"): ("self",),
    (LightningModule, "_on_before_batch_transfer"): ("self", "batch", "dataloader_idx"),
    (Strategy, "_configure_launcher"): ("self",),
    (call, "_call_callback_hooks"): ("trainer", "hook_name", "args", "monitoring_callbacks", "kwargs"),
    (call, "_call_lightning_module_hook"): ("trainer", "hook_name", "args", "pl_module", "kwargs"),
    (call, "_call_strategy_hook"): ("trainer", "hook_name", "args", "kwargs"),
    (data, "_set_sampler_epoch"): ("dataloader", "epoch"),
    (data_connector, "_get_distributed_sampler"): ("dataloader", "shuffle", "overfit_batches", "mode", "kwargs"),
    (distributed, "_all_gather_ddp_if_available"): ("tensor", "group", "sync_grads"),
    (distributed, "_destroy_dist_connection"): (),
    (distributed, "_get_default_process_group_backend_for_device"): ("device",),
    (distributed, "_init_dist_connection"): (
        "cluster_environment",
        "torch_distributed_backend",
        "global_rank",
        "world_size",
        "kwargs",
    ),
    (distributed, "_sync_ddp_if_available"): ("result", "group", "reduce_op"),
    (fabric_logger, "_convert_params"): ("params",),
    (fabric_logger, "_flatten_dict"): ("params", "delimiter", "parent_key"),
    (fabric_logger, "_sanitize_params"): ("params",),
    (result, "_get_default_dtype"): (),
    (distributed_c10d, "_get_default_store"): (),
    (DataLoader, "_get_iterator"): ("self",),
    (_BaseDataLoaderIter, "_reset"): ("self", "loader", "first_iter"),
    (_pytree, "tree_leaves"): ("tree", "is_leaf"),
    (_pytree, "tree_map"): ("func", "tree", "rests", "is_leaf"),
    (_pytree, "tree_unflatten"): ("leaves", "treespec"),
}

OF_MODULES = ("_trainer",)

ATTRIBUTES: dict[str, tuple[str, ...]] = {  # an object of the run, as the module reaches it → its attributes
    "_trainer": (
        "_accelerator_connector",
        "_data_connector",
        "_logger_connector",
        "_signal_connector",
        "_val_check_time_interval",
        "overfit_batches",
    ),
    "_trainer._accelerator_connector": ("_num_nodes_flag", "_parallel_devices", "use_distributed_sampler"),
    "_trainer._logger_connector": (
        "_callback_metrics",
        "_current_fx",
        "_first_loop_iter",
        "_logged_metrics",
        "_progress_bar_metrics",
        "should_update_logs",
    ),
    "_trainer._signal_connector": ("received_sigterm",),
    "_trainer.fit_loop": ("_combined_loader", "_data_fetcher", "_restarting", "epoch_loop", "epoch_progress", "skip"),
    "_trainer.fit_loop.epoch_loop": (
        "_batches_that_stepped",
        "_results",
        "_skip_next_val",
        "_warning_cache",
        "automatic_optimization",
        "batch_progress",
        "manual_optimization",
        "restarted_on_last",
        "val_loop",
    ),
    "_trainer.fit_loop.epoch_loop._results": ("batch", "batch_size"),
    "_trainer.fit_loop.epoch_loop.automatic_optimization": ("_skip_backward", "optim_progress", "output_result_cls"),
    "_trainer.fit_loop.epoch_loop.manual_optimization": ("optim_step_progress",),
    "_trainer.fit_loop.epoch_loop.val_loop": (
        "_combined_loader",
        "_last_val_dl_reload_epoch",
        "_max_batches",
        "_results",
        "_seen_batches_per_dataloader",
        "inference_mode",
        "restarted_mid_evaluation",
        "restarting",
        "skip",
    ),
}

EXAMPLES: dict[Callable[[], object], tuple[str, ...]] = {  # makes an object like those of a run → their attributes
    lambda: CombinedLoader([]): ("_iterables", "_mode", "_spec", "flattened"),
    lambda: _DataLoaderIterDataFetcher(): ("_batch", "_batch_idx", "done"),
    lambda: _ResultMetric(_Metadata("training_step", "loss"), is_tensor=True): (
        "_computed",
        "_forward_cache",
        "cumulated_batch_size",
        "has_reset",
        "is_tensor",
        "meta",
        "update_called",
        "value",
    ),
    lambda: _Sync(): ("rank_zero_only", "should"),
    lambda: _Metadata("training_step", "loss"): (
        "is_max_reduction",
        "is_mean_reduction",
        "is_min_reduction",
        "on_step",
        "sync",
    ),
    lambda: LearningRateFinder(): ("_early_exit",),
    lambda: BatchSizeFinder(): ("_early_exit",),
    lambda: LightningDataModule(): ("_log_hyperparams",),
    lambda: SingleDeviceStrategy(): ("_accelerator", "_checkpoint_io", "_launcher", "_precision_plugin"),
    lambda: DataLoader([0]): ("_iterator",),  # type: ignore[arg-type]
    # with a generator of its own: the iterator would draw from the run's
    lambda: iter(DataLoader([0], generator=torch.Generator())): ("_sampler_iter",),  # type: ignore[arg-type]
    lambda: DDPStrategy(): ("_layer_sync",),  # where Lightning puts its SyncBatchNorm plugin
}


def verify(model: LightningModule) -> None:
    """Checks the tables against the installed Lightning and the Trainer of ``model``, which is about to run.

    Raises:
        RuntimeError: a private function has other parameters, or an attribute is missing.
    """
    verify_installed()
    _check_attributes(model, OF_MODULES)
    if model._trainer is not None:  # else the Trainer's connectors are used without a run
        for place, names in ATTRIBUTES.items():
            _check_attributes(attrgetter(place)(model), names)


@cache
def verify_installed() -> None:
    """What doesn't depend on a run: once per process, as it takes 5 ms."""
    for (owner, name), expected in SIGNATURES.items():
        function = getattr(owner, name, None)
        found = None if function is None else tuple(inspect.signature(inspect.unwrap(function)).parameters)
        if found != expected:
            raise _changed(owner, f"`{owner.__name__}.{name}`: expected the parameters {expected}, found {found}")
    for make, names in EXAMPLES.items():
        _check_attributes(make(), names)


def _check_attributes(holder: Any, names: tuple[str, ...]) -> None:
    owner = next(base for base in type(holder).__mro__ if base.__module__.split(".")[0] in _SUPPORTED)
    for name in names:
        if not (hasattr(type(holder), name) or hasattr(holder, name)):  # the class first: a property isn't evaluated
            raise _changed(owner, f"`{owner.__name__}`: it has no attribute `{name}`")


def _changed(owner: type | ModuleType, change: str) -> RuntimeError:
    package = (owner.__name__ if isinstance(owner, ModuleType) else owner.__module__).split(".")[0]
    return RuntimeError(
        f"{package} {metadata.version(package)} has changed {change}. lightning_diloco works inside Lightning's loops"
        f" and needs {_SUPPORTED[package]}; install that, or a lightning_diloco made for yours."
    )
