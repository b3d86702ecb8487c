"""The reduction of the values that N workers log to a single value.

Owns folding the values of a step, and the optional per-worker copies. Epoch values need nothing: Lightning
accumulates them over all calls of ``self.log``, weighted by each worker's batch size.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.trainer.connectors.logger_connector.logger_connector import _LoggerConnector
from lightning.pytorch.trainer.connectors.logger_connector.result import (
    _get_default_dtype,
    _ResultCollection,
)
from torch import Tensor
from typing_extensions import override

from lightning_diloco._lightning.reclassed import Reclassed
from lightning_diloco.comm.world import World


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
        self._by_worker = {w: _ResultCollection(training=True) for w in world.workers} if per_worker else {}

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
            gathered = self._world.gather_all("self.log(..., sync_dist=True)", numbers)
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
