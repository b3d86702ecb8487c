"""Lightning's collective operations over the processes of a run: ``barrier``, ``sync_dist`` and their like.

Owns when a collective is left out: in a run of a single process, and in a process that an exception ends, which would
wait for the others until the timeout. Each collective gathers a label first: processes in different collectives get an
error instead of a deadlock. Private because Lightning's rules for ``reduce_op`` have no public name.
"""

from typing import Any

import torch
from lightning.fabric.utilities.distributed import _all_gather_ddp_if_available, _sync_ddp_if_available
from torch import Tensor
from typing_extensions import override

from lightning_diloco._lightning.process import ProcessStrategy

_START_OF_FIT = "run-stage"  # the name of the barrier between the Trainer's set-up, tuners included, and its loops


class CollectiveStrategy(ProcessStrategy):
    """The operations that Lightning, and ``self.log(sync_dist=True)``, call on a strategy."""

    @override
    def barrier(self, *args: Any, **kwargs: Any) -> None:
        if not self._alone:
            self._world.gather_all("a barrier", detail=" ".join(map(repr, args)))  # names may differ
        if args == (_START_OF_FIT,) and self._fit is not None and self._fit.in_trial:
            self._fit.end_trial()

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        if self._world.size == 1 or self._alone:
            return obj
        objects = [obj]
        self._world.gather_all("a broadcast")
        torch.distributed.broadcast_object_list(objects, src)
        return objects[0]

    @override
    def reduce(self, tensor: Any, group: Any | None = None, reduce_op: Any = "mean", what: str = "", **_: Any) -> Any:
        """The mean (or ``reduce_op``) of a tensor over the processes of ``group``; other values come back unchanged.

        ``what`` completes "a reduction …" in the error of processes that are in different collectives.
        """
        if self._world.size == 1 or self._alone or not isinstance(tensor, Tensor):
            return tensor
        self._world.gather_all(f"a reduction {what or '(sync_dist=True does one)'}")
        return _sync_ddp_if_available(tensor, group, reduce_op=reduce_op)

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        if self._world.size == 1 or self._alone:
            return decision
        votes = self.reduce(torch.tensor(int(decision), device=self.root_device), reduce_op="sum")
        return bool(votes == self._world.size) if all else bool(votes)

    @override
    def all_gather(self, tensor: Tensor, group: Any | None = None, sync_grads: bool = False) -> Tensor:
        if self._world.size == 1 or self._alone:
            return tensor
        self._world.gather_all("all_gather")
        return _all_gather_ddp_if_available(tensor, group, sync_grads)

    @property
    def _alone(self) -> bool:
        """Whether an exception ends this process while the others may be anywhere."""
        interrupted = self._trainer_here is not None and self._trainer_here.interrupted
        return interrupted and self._world.size > 1 and not self._world.stopping
