"""The reduction of the values that N workers log to a single value.

Owns folding the values of a step, and the optional per-worker copies. Epoch values need nothing: Lightning
accumulates them over all calls of ``self.log``, weighted by each worker's batch size.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from lightning.pytorch.trainer.connectors.logger_connector.logger_connector import _LoggerConnector
from lightning.pytorch.trainer.connectors.logger_connector.result import (
    _get_default_dtype,
    _Metadata,
    _ResultCollection,
    _ResultMetric,
    _Sync,
)
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from lightning_diloco._lightning.reclassed import Reclassed, give_back
from lightning_diloco.comm.world import World


class Logged(NamedTuple):
    """What a process has of a key, as plain values for the others.

    Attributes:
        meta: how it is logged.
        sync: whether it is reduced over the processes.
        updated: whether a worker of the process has logged it in this epoch.
        value: accumulated; None: a metric object of the module.
        samples: that it is a mean of, if it is one.
        latest: value of the last step.
    """

    meta: dict[str, Any]
    sync: dict[str, Any]
    updated: bool
    value: float | None
    samples: int | None
    latest: Any


class WorkerMetric(Reclassed, _ResultMetric):
    """A logged value that is moved to a device only if it isn't there.

    Lightning moves it at every ``self.log``, and walks through all of its attributes to do so: a third of the call.
    """

    @override
    def to(self, *args: Any, **kwargs: Any) -> Any:
        if self.is_tensor and not kwargs and args == (self.value.device,):
            latest = self._forward_cache
            if latest is None or latest.device == self.value.device:
                return self
        return super().to(*args, **kwargs)


class WorkerResults(Reclassed, _ResultCollection):
    """Lightning's collection of logged values, which knows the worker that has its turn.

    Private because no public hook sees several values of a key within a step: ``_ResultMetric._forward_cache`` keeps
    the last value only. The live object is re-classed, so its attributes come from :meth:`prepare`.
    """

    _worker: int | None
    _step_values: dict[str, dict[int, Any]]
    _world: World
    _reduce: Callable[..., Any]
    uneven: bool  # whether processes may host no worker that is there, and so no value of a key
    _borrowed: set[str]  # keys that no worker of this process has logged in this epoch
    _shown: int | None  # the worker whose values are shown after the turns: the first that had one
    _visited: str  # which metric Lightning is reducing, in words
    _by_worker: dict[int, _ResultCollection]
    _connector: _LoggerConnector
    _before: dict[str, Any] | None  # the step values that a pass over the workers began with; None between passes
    _dicts_before: list[dict[str, Any]]
    _dicts_after: list[dict[str, Any]]

    def prepare(self, world: World, per_worker: bool, connector: _LoggerConnector) -> None:
        """Called once after re-classing; ``per_worker`` keeps a complete collection for each worker too."""
        self._worker = None
        self._step_values = {}
        self._world = world
        self._connector = connector
        self._before = None
        self._visited = "by a hook"
        self.uneven = False
        self._shown = None
        self._borrowed = set()
        self._by_worker = {w: _ResultCollection(training=True) for w in world.workers} if per_worker else {}

    @override
    def __setitem__(self, key: str, metric: Any) -> None:
        metric.__class__ = WorkerMetric
        super().__setitem__(key, metric)

    def give_back_metrics(self) -> None:
        """The logged values are Lightning's again, for after the fit."""
        for metric in self.values():
            give_back(metric)

    @contextmanager
    def turn(self, worker: int, batch: Any) -> Iterator[None]:
        """Inside, ``worker`` logs, about ``batch`` (from which Lightning reads the batch size).

        ``trainer.callback_metrics`` and its like show the values from before the turns, and those that ``worker`` has
        logged; from the last turn to :meth:`fold`, the first worker's.
        """
        self._worker = worker
        several = len(self._world.workers) > 1
        self._shown = worker if self._shown is None else self._shown
        if several:
            self._hide_other_workers(worker)
        outside = self.batch, self.batch_size
        for collection in self._collections(worker):
            collection.batch, collection.batch_size = batch, None
        try:
            yield
        finally:
            if several and worker == self._shown:
                self._dicts_after = [dict(metrics) for metrics in self._metric_dicts]
            self._worker = None
            self.batch, self.batch_size = outside

    @property
    def _metric_dicts(self) -> list[dict[str, Any]]:
        """Lightning's dicts of metrics, which grow whenever the Trainer's properties are read."""
        connector = self._connector
        return [connector._callback_metrics, connector._logged_metrics, connector._progress_bar_metrics]

    def _hide_other_workers(self, worker: int) -> None:
        if self._before is None:
            self._before = {key: metric._forward_cache for key, metric in self.items()}
            self._dicts_before = self._dicts_after = [dict(metrics) for metrics in self._metric_dicts]
        for key, metric in self.items():
            metric._forward_cache = self._step_values.get(key, {}).get(worker, self._before.get(key))
        _refill(self._metric_dicts, self._dicts_before)

    @override
    def log(self, fx: str, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        if self._world.size > 1 and kwargs.get("sync_dist"):
            self._reduce, kwargs["sync_dist_fn"] = kwargs["sync_dist_fn"], self._reduce_outside_turns
        super().log(fx, name, value, *args, **kwargs)
        if self._worker in self._by_worker and isinstance(value, Tensor):
            # a worker's value isn't reduced over processes; without this function Lightning would advise sync_dist
            alone = {"sync_dist": True, "sync_dist_fn": _unreduced}
            self._by_worker[self._worker].log(fx, name, value, *args, **{**kwargs, **alone})

    @override
    def update_metrics(self, key: str, value: Any, batch_size: int) -> None:
        if key in self._borrowed:  # from another process; from now on there is something of this one's own
            self._borrowed.discard(key)
            if self[key].is_tensor:
                self[key].reset()
        super().update_metrics(key, value, batch_size)
        cache = self[key]._forward_cache
        if self._worker is not None and self[key].meta.on_step and isinstance(cache, Tensor):
            self._step_values.setdefault(key, {})[self._worker] = cache

    def _reduce_outside_turns(self, value: Any, *args: Any, **kwargs: Any) -> Any:
        """``sync_dist=True``: step values wait for :meth:`fold`, which reduces those of all workers in worker order."""
        if self._worker is not None:
            return value
        return self._reduce(value, *args, **kwargs, what=f"of what is logged {self._visited} with sync_dist=True")

    @override
    def valid_items(self) -> Any:
        """Sorted, so that all processes reduce the metrics in the same order; workers may log in different orders."""
        items = super().valid_items()
        for key, metric in sorted(items, key=lambda item: item[0]) if self._world.size > 1 else items:
            self._visited = f"as {key}"
            yield key, metric
        self._visited = "by a hook"

    def fold(self) -> None:
        """After the workers' turns: the step value of a key becomes its reduction over the workers that logged it."""
        shared = {key: list(v.values()) for key, v in self._step_values.items() if self[key].meta.sync.should}
        if self._world.size > 1 and (shared or self.uneven):
            numbers = {key: [v.tolist() for v in values] for key, values in shared.items()}
            logged = {key: self._logged(key) for key in self} if self.uneven else {}
            of_processes = self._world.gather_all("self.log(..., sync_dist=True)", (numbers, logged))
            self._borrow([theirs for _, theirs in of_processes])
            gathered = [numbers for numbers, _ in of_processes]
            for key in [key for key in dict.fromkeys(k for found in gathered for k in found) if key in self]:
                numbers_of_key = [v for of_process in gathered for v in of_process.get(key, [])]
                like = shared[key][0] if key in shared else self[key]._forward_cache
                options = {"dtype": mean_type(like).dtype, "device": like.device}
                shared[key] = [torch.tensor(v, **options) for v in numbers_of_key]
        for key in dict.fromkeys([*self._step_values, *shared]):
            metric, values = self[key], shared.get(key) or list(self._step_values[key].values())
            metric._forward_cache = values[0] if len(values) == 1 else _reduced(values, metric.meta)
        self._step_values = {}
        self._shown = None
        if self._before is not None:
            self._before = None
            _refill(self._metric_dicts, self._dicts_after)

    def _logged(self, key: str) -> Logged:
        metric = self[key]
        value, count, latest = metric.value, getattr(metric, "cumulated_batch_size", None), metric._forward_cache
        of_object = metric.value.update_called if isinstance(metric.value, Metric) else metric.update_called
        meta = {
            f.name: getattr(metric.meta, f.name) for f in fields(metric.meta) if f.name not in ("reduce_fx", "_sync")
        }
        return Logged(
            meta={**meta, "reduce_fx": metric.meta.reduce_fx.__name__},
            sync={"should": metric.meta.sync.should, "rank_zero_only": metric.meta.sync.rank_zero_only},
            updated=of_object and not metric.has_reset and key not in self._borrowed,
            value=value.tolist() if metric.is_tensor else None,
            samples=None if count is None else count.tolist(),
            latest=latest.tolist() if isinstance(latest, Tensor) else None,
        )

    def _borrow(self, of_processes: Sequence[Mapping[str, Logged]]) -> None:
        """What no worker of this process has logged in this epoch is what the first process has whose workers did.

        Else callbacks would find a metric on some processes only. A value that is reduced over the processes stays
        empty here, and a metric object of the module is found in the module: it reduces itself.
        """
        mine = of_processes[self._world.rank] if of_processes else {}
        for key in dict.fromkeys(key for theirs in of_processes for key in theirs):
            given = next((theirs[key] for theirs in of_processes if key in theirs and theirs[key].updated), None)
            if given is None or (key in mine and mine[key].updated):
                continue
            trainer = self._connector.trainer
            if key not in self:
                synced = given.sync["should"]
                if synced:
                    self._reduce = trainer.strategy.reduce
                meta = _Metadata(**given.meta)
                reduce = self._reduce_outside_turns if synced else trainer.strategy.reduce
                meta.sync = _Sync(fn=reduce, rank_zero_only=given.sync["rank_zero_only"])
                meta.sync.should = synced
                self[key] = _ResultMetric(meta, given.value is not None).to(self._world.device)
            metric = self[key]
            metric.has_reset, metric._computed = False, None
            if given.value is None:
                metric.value = attrgetter(given.meta["metric_attribute"])(trainer.lightning_module)
            elif not given.sync["should"]:
                metric.value = torch.full_like(metric.value, given.value)
                if given.samples is not None:
                    metric.cumulated_batch_size = torch.full_like(metric.cumulated_batch_size, given.samples)
            if given.latest is not None:
                metric._forward_cache = torch.tensor(given.latest, device=self._world.device)
            self._borrowed.add(key)

    def worker_values(self, on_step: bool) -> Mapping[str, float]:
        """``key/worker_i`` → value, for all workers and all keys meant for loggers."""
        if not self._by_worker:
            return {}
        values = {
            f"{name}/worker_{w}": float(value)
            for w, results in self._by_worker.items()
            for name, value in results.metrics(on_step)["log"].items()
        }
        gathered = self._world.gather_all("DilocoCallback(per_worker=True)", values)
        by_key: dict[str, list[float]] = {}
        for key, value in (item for of_process in gathered for item in of_process.items()):
            by_key.setdefault(key, []).append(value)  # a value of each member of the worker's team
        return {key: sum(each) / len(each) for key, each in by_key.items()}

    @override
    def reset(self, metrics: bool | None = None, fx: str | None = None) -> None:
        super().reset(metrics, fx)
        self._borrowed = {key for key in self._borrowed if key in self and not self[key].has_reset}
        for results in self._by_worker.values():
            results.reset(metrics, fx)

    def _collections(self, worker: int) -> list[_ResultCollection]:
        return [self, *([self._by_worker[worker]] if worker in self._by_worker else [])]


def _unreduced(value: Any, *_: Any, **__: Any) -> Any:
    return value


def _refill(live: list[dict[str, Any]], contents: list[dict[str, Any]]) -> None:
    """Writes ``contents`` into the live dicts, to which other objects refer."""
    for shown, content in zip(live, contents, strict=True):
        shown.clear()
        shown.update(content)


def mean_type(value: Tensor) -> Tensor:
    """``value`` in a type that has a mean, by Lightning's rule for numbers that are logged."""
    return value if value.is_floating_point() else value.to(_get_default_dtype())


def _reduced(values: Sequence[Tensor], meta: Any) -> Tensor:
    """The reduction of ``self.log(reduce_fx=)`` over the workers' values of a step."""
    stacked = torch.stack([mean_type(v).to(values[0].device) for v in values])
    if meta.is_mean_reduction:
        return stacked.mean(0)
    if meta.is_max_reduction:
        return stacked.amax(0)
    return stacked.amin(0) if meta.is_min_reduction else stacked.sum(0)
