"""The pseudo-gradients of single workers, for a look before they are averaged.

Owns what a callback can read, and for how long. Sends nothing (``sending.py``). Imports nothing of Lightning.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor

from lightning_diloco.comm.world import World


class PseudoGradients:
    """The Δ_i of a transfer, before they are averaged: what ``DilocoCallback.on_before_outer_step`` receives.

    Each tensor is computed when it is read, as a new tensor; nothing is kept. Readable only inside the hook: afterwards
    the workers have moved on.

    Attributes:
        step: local steps done.
        tag: the algorithm's word for the transfer ("fragment 0", …), or None.
        names: the parameters that are sent.
        workers: global ids of the workers that take part.
        local_workers: those of them that this process hosts: their Δ_i can be read here.
    """

    def __init__(
        self,
        step: int,
        tag: str | None,
        names: Sequence[str],
        workers: Sequence[int],
        world: World,
        read: Callable[[int], Mapping[str, Tensor]],
    ) -> None:
        self.step, self.tag, self.names, self.workers = step, tag, tuple(names), tuple(workers)
        self.local_workers = tuple(w for w in workers if w in world.workers)
        self._world, self._read, self._readable = world, read, False

    def delta(self, worker: int) -> Mapping[str, Tensor]:
        """Parameter name → Δ_i = θ − θ_i of ``worker`` before any codec, each computed when read.

        Algorithms with anchors of each worker's own measure from those instead of θ.

        Raises:
            ValueError: the worker takes no part, or another process hosts it.
            RuntimeError: the hook is over.
        """
        if worker not in self.workers:
            raise ValueError(f"Worker {worker!r} takes no part in this transfer; {list(self.workers)} do.")
        if worker not in self.local_workers:
            raise ValueError(
                f"Worker {worker} is hosted by process {self._world.host(worker)}; this is process {self._world.rank}."
                " Read the workers in `deltas.local_workers`; the hook is called on every process."
            )
        return _Lazy(self, worker)

    @contextmanager
    def readable(self) -> Iterator[None]:
        """Inside, Δ_i can be read."""
        self._readable = True
        try:
            yield
        finally:
            self._readable = False

    def read(self, worker: int, name: str) -> Tensor:
        """A tensor of a worker; :meth:`delta` is for people."""
        if not self._readable:
            raise RuntimeError(
                f"The Δ_i of local step {self.step} can be read inside `on_before_outer_step` only: by now the workers"
                " have moved on. Copy there what you need later."
            )
        if name not in self.names:
            raise KeyError(name)
        return self._read(worker)[name].clone()


class _Lazy(Mapping[str, Tensor]):
    """Name → Δ_i of a worker, computed when read."""

    def __init__(self, of: PseudoGradients, worker: int) -> None:
        self._of, self._worker = of, worker

    def __getitem__(self, name: str) -> Tensor:
        return self._of.read(self._worker, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._of.names)

    def __len__(self) -> int:
        return len(self._of.names)
