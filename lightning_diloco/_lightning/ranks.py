"""The strategy's ranks and devices.

Owns the numbers by which Lightning and projects tell processes apart. Elsewhere: which process hosts which worker
(``comm/world.py``).
"""

from collections.abc import Callable
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_only
from typing_extensions import override

from lightning_diloco._lightning.trainers import SharedStrategy


class _Assignable:
    """A number that the processes determine, unless it is assigned.

    In Lightning's single-device strategy these numbers are plain attributes, which some projects set. Others read the
    assigned number; the strategy itself goes by its processes.
    """

    def __init__(self, number: Callable[["RankedStrategy"], int]) -> None:
        self._number = number

    def __set_name__(self, owner: type, name: str) -> None:
        self._key = f"_assigned_{name}"

    def __get__(self, strategy: Any, owner: type | None = None) -> Any:
        if strategy is None:
            return self
        return vars(strategy)[self._key] if self._key in vars(strategy) else self._number(strategy)

    def __set__(self, strategy: Any, number: int) -> None:
        vars(strategy)[self._key] = number

    def __delete__(self, strategy: Any) -> None:
        del vars(strategy)[self._key]


class RankedStrategy(SharedStrategy):
    """A strategy for W = devices · machines processes.

    The base is Lightning's strategy for a single device, with the attributes of the parallel strategies added, which
    Lightning looks for by name. Lightning refuses ``torch.compile``d modules under other classes, refuses parallel
    strategies on any Mac with MPS, and counts subclasses of its DDP strategy as distributed even in a single process.
    """

    @property
    def num_processes(self) -> int:
        """Processes on this machine."""
        return max(1, len(self._given.devices))

    @property
    def is_distributed(self) -> bool:
        """Whether there are several processes."""
        return self._processes > 1

    @property
    @override
    def root_device(self) -> torch.device:
        return self._given.devices[self._rank_here] if self._given.devices else torch.device("cpu")

    world_size: int = _Assignable(lambda strategy: strategy._processes)  # type: ignore[assignment]
    global_rank: int = _Assignable(lambda strategy: strategy._rank)  # type: ignore[assignment]
    local_rank: int = _Assignable(lambda strategy: strategy._rank_here)  # type: ignore[assignment]

    @property
    def _processes(self) -> int:
        return self._given.processes

    @property
    def _rank(self) -> int:
        return self.cluster_environment.global_rank() if self.is_distributed and self.cluster_environment else 0

    @property
    def _rank_here(self) -> int:
        return self.cluster_environment.local_rank() if self.is_distributed and self.cluster_environment else 0

    @property
    def node_rank(self) -> int:
        return self.cluster_environment.node_rank() if self.is_distributed and self.cluster_environment else 0

    @property
    @override
    def is_global_zero(self) -> bool:
        return self._rank == 0

    def set_world_ranks(self) -> None:
        """Tells the cluster environment and Lightning's rank-zero decorators the rank of this process."""
        if self.is_distributed and self.cluster_environment is not None:
            self.cluster_environment.set_global_rank(self.node_rank * self.num_processes + self._rank_here)
            self.cluster_environment.set_world_size(self._processes)
            rank_zero_only.rank = self._rank  # type: ignore[attr-defined]
