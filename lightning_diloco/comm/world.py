"""The processes that share the workers, this one's place among them, and the ways in which they talk.

Owns the layout (who hosts which worker) and every call of ``torch.distributed`` but the exchange of tensors between
workers, which is ``comm.py``'s. Does not start processes (``_lightning/launching.py``). Imports nothing of Lightning.

With W processes and N workers either W divides N, and each process hosts N/W workers, or N divides W, and each worker
is a team of k = W/N processes that average their gradients. Process r hosts the workers from ⌊r/k⌋·N/W on (k = 1), or
is number r mod k of worker ⌊r/k⌋'s team: a worker's team is contiguous, so that it shares a machine if it can.
"""

import io
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_diloco.comm import means
from lightning_diloco.comm.tensors import bytes_of, flat, real_view


class World:
    """W processes for N workers.

    Args:
        num_workers: N ≥ 1.
        rank: this process, 0 ≤ rank < size.
        size: W ≥ 1; divides N, or N divides it.

    Attributes:
        workers: global ids of the workers hosted here, ascending.
        team: number of processes per worker k (1 unless W > N).
        member: this process's number in its worker's team, from 0.
        device: where this process computes.
        signals: what this process was told from outside: "stop" (SIGTERM), "requeue" (SLURM). The others hear of it at
            the next synchronisation.
        known_signals: what some process was told, and all know.
    """

    def __init__(self, num_workers: int, rank: int = 0, size: int = 1) -> None:
        check_layout(num_workers, size)
        self.num_workers, self.rank, self.size = num_workers, rank, size
        self.team = max(1, size // num_workers)
        self.member = rank % self.team
        self._hosted = max(1, num_workers // size)
        first = rank // self.team * self._hosted
        self.workers = list(range(first, first + self._hosted))
        self.signals: set[str] = set()
        self.known_signals: set[str] = set()
        self.device = torch.device("cpu")
        self.group: Any = None  # torch's default process group, as it was when this world was connected
        self._timeout: timedelta | None = None
        self._control: Any = None
        self._team_group: Any = None

    # ---------------------------------------------------------------------------------------- who hosts what

    def host(self, worker: int, member: int = 0) -> int:
        """The process that hosts ``worker`` (the given member of its team)."""
        return worker // self._hosted * self.team + member

    def hosted_by(self, rank: int) -> list[int]:
        """The workers of process ``rank``."""
        return World(self.num_workers, rank, self.size).workers

    @property
    def shards(self) -> int:
        """Into how many parts the data is sharded: N·k."""
        return self.num_workers * self.team

    def shard(self, worker: int) -> int:
        """Which part of the data this process reads for ``worker``: member j of worker w's team reads j·N + w."""
        return self.member * self.num_workers + worker

    # ---------------------------------------------------------------------------------------- talking

    def connect(self, timeout: timedelta | None, settings: dict[str, Any]) -> None:
        """Opens this world's channels; torch's process group exists already. All processes call it together.

        Args:
            timeout: how long a process waits for the others; None: torch's default, half an hour.
            settings: what must be the same on all processes.

        Raises:
            ValueError: the settings differ.
        """
        if self.size == 1 or self._control is not None:
            return
        self.group = dist.group.WORLD
        self._timeout = timeout or dist.distributed_c10d.default_pg_timeout
        self._control = dist.new_group(backend="gloo", timeout=self._timeout)
        self.check_equal("the start", settings)
        if self.team > 1:
            for worker in range(self.num_workers):
                group = dist.new_group([self.host(worker, j) for j in range(self.team)], timeout=self._timeout)
                self._team_group = group if worker in self.workers else self._team_group

    def disconnect(self) -> None:
        """Lets go of its channels; nobody can talk afterwards."""
        self.group = self._control = self._team_group = None

    def gather_all(self, where: str, value: Any = None, detail: str = "") -> list[Any]:
        """Waits until all processes are here; returns every process's ``value``, by rank.

        Args:
            where: the place in the run, in words that complete "is at …"; must be the same for all.
            value: anything picklable and small.
            detail: more about the place, for messages; may differ.

        Raises:
            RuntimeError: a process did not come within the timeout, or came from another place.
        """
        if self.size == 1:
            return [value]
        seen: list[Any] = [None] * self.size
        with self.label_errors(f"{where} {detail}".strip()):
            # first a barrier that tells process 0 who is missing
            dist.monitored_barrier(group=self._control, timeout=self._timeout, wait_all_ranks=True)
            dist.all_gather_object(seen, (where, detail, value), group=self._control)
        if len({place for place, _, _ in seen}) > 1:
            places = "; ".join(f"process {r} is at {' '.join(theirs[:2]).strip()}" for r, theirs in enumerate(seen))
            raise RuntimeError(
                f"The processes are at different places: {places}. All must take the same steps; look for loaders of"
                " different lengths, and for hooks that stop, validate, save or (with sync_dist=True) log on one"
                " process only."
            )
        return [theirs for _, _, theirs in seen]

    @contextmanager
    def label_errors(self, where: str) -> Iterator[None]:
        """Inside, processes exchange something; if that fails, the error says where it was."""
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"Process {self.rank} of {self.size} waited for the others at {where}, in vain: one has ended or hangs"
                f" (at most `timeout` = {self._timeout} was waited). Its own output tells why. {error}"
            ) from error

    def gather_signals(self, where: str) -> None:
        """All learn what one of them was told."""
        self.known_signals = set().union(*self.gather_all(where, self.signals))

    @property
    def stopping(self) -> bool:
        """Whether some process was told to end, and all know it."""
        return "stop" in self.known_signals

    def check_equal(self, where: str, value: dict[str, Any]) -> None:
        """Checks that all processes were given the same.

        Raises:
            ValueError: names the entry, the process and both values.
        """
        gathered = self.gather_all(where, value)
        for rank, theirs in enumerate(gathered):
            for key in gathered[0] | theirs:
                if theirs.get(key) != gathered[0].get(key):
                    raise ValueError(
                        f"The processes were started with different settings: `{key}` is {gathered[0].get(key)!r} on"
                        f" process 0 and {theirs.get(key)!r} on process {rank}. Start the same script with the same"
                        " arguments everywhere."
                    )

    def decided_by_first(self, decide: Callable[[], Any]) -> Any:
        """What ``decide`` returns on process 0; if it raises there, all raise."""
        if self.size == 1:
            return decide()
        outcome: list[Any] = [None, None]
        if self.rank == 0:
            try:
                outcome = [decide(), None]
            except Exception as error:
                outcome = [None, error if _travels(error) else RuntimeError(f"{type(error).__name__}: {error}")]
        with self.label_errors("a decision of the first process"):
            dist.broadcast_object_list(outcome, src=0, group=self._control)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def gather_to_first(self, value: Any) -> list[Any]:
        """Every process's ``value``, by rank, on process 0; an empty list elsewhere."""
        if self.size == 1:
            return [value]
        packed = io.BytesIO()
        torch.save(value, packed)  # pickle alone can't do tensors of every dtype
        gathered: list[Any] | None = [None] * self.size if self.rank == 0 else None
        with self.label_errors("a collection by the first process"):
            dist.gather_object(packed.getvalue(), gathered, dst=0, group=self._control)
        return [torch.load(io.BytesIO(theirs), weights_only=False) for theirs in gathered or []]

    # ---------------------------------------------------------------------------------------- inside a team

    @torch.no_grad()
    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """``p.grad`` becomes its mean over the worker's team; a missing one counts as zero unless all lack it.

        Args:
            parameters: the same on all members; those without ``requires_grad`` are left out.

        Raises:
            RuntimeError: a gradient is sparse.
        """
        if self.team == 1:
            return
        held = [p for p in parameters if p.requires_grad]
        for p in held:
            if p.grad is not None and p.grad.is_sparse:
                raise RuntimeError(
                    f"A parameter of shape {tuple(p.shape)} has a sparse gradient, which a worker's {self.team}"
                    " processes can't average. Use `sparse=False`, or at most as many processes as workers."
                )
        for some in _buckets(held, means.CHUNK):
            has = torch.tensor([p.grad is not None for p in some], dtype=some[0].dtype.to_real(), device=some[0].device)
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in some]
            pieces = [flat(t) for t in [*gradients, has]]
            together = torch.cat(pieces).div_(self.team)
            with self.label_errors("the mean of its team's gradients"):
                dist.all_reduce(together, group=self._team_group)
            *averages, present = torch.split(together, [t.numel() for t in pieces])
            for p, gradient, mean, somewhere in zip(some, gradients, averages, present.tolist(), strict=True):
                if somewhere:
                    p.grad = gradient
                    real_view(gradient).copy_(mean.view_as(real_view(gradient)))

    @torch.no_grad()
    def team_mean(self, value: Tensor) -> Tensor:
        """The mean over the worker's team, as a new tensor."""
        mean = value.detach() / self.team
        if self.team > 1:
            with self.label_errors("the mean of its team's losses"):
                dist.all_reduce(mean, group=self._team_group)
        return mean

    def broadcast_in_team(self, tensors: Iterable[Tensor]) -> None:
        """The team's first member's values become gathered's, in place, as DDP does with buffers."""
        if self.team > 1:
            self._broadcast(tensors, self.host(self.workers[0]), "the buffers of its team", self._team_group)

    def broadcast(self, tensors: Iterable[Tensor], source: int, where: str) -> None:
        """Process ``source``'s values become gathered's, in place; ``where`` as in :meth:`gather_all`."""
        if self.size > 1:
            self._broadcast(tensors, source, where, None)

    @torch.no_grad()
    def _broadcast(self, tensors: Iterable[Tensor], source: int, where: str, group: Any) -> None:
        for tensor in tensors:
            values = tensor.contiguous()
            if values.numel():
                with self.label_errors(where):
                    dist.broadcast(bytes_of(values), source, group=group)
            if values is not tensor:
                tensor.copy_(values)


def check_layout(num_workers: int, size: int, started_by: str = "") -> None:
    """Whether ``size`` processes can share ``num_workers`` workers evenly.

    Args:
        num_workers: N.
        size: W.
        started_by: what asked for W processes, for the message.

    Raises:
        ValueError: neither is a multiple of the other.
    """
    if size % num_workers and num_workers % size:
        fits = [w for w in range(1, 2 * max(size, num_workers) + 1) if w % num_workers == 0 or num_workers % w == 0]
        below, above = max(w for w in fits if w < size), min(w for w in fits if w > size)
        raise ValueError(
            f"{size} processes{started_by} can't share {num_workers} workers (`DilocoStrategy(num_nodes="
            f"{num_workers})`) evenly: one number must be a multiple of the other. Start {below} or {above} processes,"
            f" or simulate {size} workers."
        )


def _buckets(parameters: Sequence[nn.Parameter], most: int) -> Iterator[list[nn.Parameter]]:
    """Parameters of one dtype and device, with ``most`` elements together unless a single one has more."""
    for key in dict.fromkeys((p.dtype, p.device) for p in parameters):
        bucket: list[nn.Parameter] = []
        size = 0
        for p in [p for p in parameters if (p.dtype, p.device) == key]:
            if bucket and size + p.numel() > most:
                yield bucket
                bucket, size = [], 0
            bucket.append(p)
            size += p.numel()
        yield bucket


def _travels(error: Exception) -> bool:
    """Whether an exception survives pickling; those with constructors of their own may not."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return False
    return True
