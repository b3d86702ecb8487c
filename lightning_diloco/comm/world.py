"""The processes of a run: which process hosts which workers, and the collectives between processes.

Owns every call of ``torch.distributed`` except the means and transfers of workers' tensors (``channel.py``) and the
gathering of small objects (``objects.py``). Does not start processes (``_lightning/launching.py``). Imports nothing of
Lightning.

With W processes and N workers either W divides N, and each process hosts N/W workers, or N divides W, and each worker
is a team of k = W/N processes that average their gradients. Process r hosts the workers from ⌊r/k⌋·N/W on (k = 1), or
is number r mod k of worker ⌊r/k⌋'s team. The ranks of a team are consecutive, because torchrun and SLURM give
consecutive ranks to a machine, and the team's all-reduce of every step is the most frequent message.
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
from lightning_diloco.comm.objects import gather_objects
from lightning_diloco.comm.tensors import bytes_of, flat, real_view
from lightning_diloco.comm.waiting import Among, Waiting
from lightning_diloco.comm.watcher import Store, Watcher


class World:
    """W processes for N workers.

    Args:
        num_workers: N ≥ 1.
        rank: this process, 0 ≤ rank < size.
        size: W ≥ 1; W divides N, or N divides W.

    Attributes:
        workers: global ids of the workers hosted here, ascending.
        team: number of processes per worker k (1 unless W > N).
        member: this process's number in its worker's team, from 0.
        device: where this process computes.
        signals: signals that this process has received: "stop" (SIGTERM), "requeue" (SLURM). The other processes learn
            of them at the next synchronisation.
        known_signals: signals that some process has received and that all processes know of.
        waiting: the collective in which this process is blocked, and the time in collectives.
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
        self.waiting = Waiting()
        self.group: Any = None  # torch's default process group at the time of connect()
        self._timeout: timedelta | None = None
        self._control: Any = None
        self._gathered = 0
        self._team_group: Any = None
        self._watcher: Watcher | None = None

    # ---------------------------------------------------------------------------------------- layout

    def host(self, worker: int, member: int = 0) -> int:
        """The process that hosts ``worker`` (the given member of its team)."""
        return worker // self._hosted * self.team + member

    def hosted_by(self, rank: int) -> list[int]:
        """The workers of process ``rank``."""
        return World(self.num_workers, rank, self.size).workers

    @property
    def shards(self) -> int:
        """Number of shards of the data: N·k."""
        return self.num_workers * self.team

    def shard(self, worker: int) -> int:
        """The shard that this process reads for ``worker``: member j of worker w's team reads shard j·N + w."""
        return self.member * self.num_workers + worker

    # ---------------------------------------------------------------------------------------- collectives

    def connect(self, timeout: timedelta | None, settings: dict[str, Any]) -> None:
        """Makes the process groups; torch's default group exists already. All processes call this together.

        Args:
            timeout: how long a process waits for the others; None: torch's default, half an hour.
            settings: settings that must be the same on all processes.

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
            for worker in range(self.num_workers):  # every process makes all groups, since new_group is collective
                group = dist.new_group([self.host(worker, j) for j in range(self.team)], timeout=self._timeout)
                self._team_group = group if worker in self.workers else self._team_group

    def disconnect(self) -> None:
        """Drops the process groups; no collective is possible afterwards."""
        self.group = self._control = self._team_group = None

    def gather_all(self, where: str, value: Any = None, detail: str = "") -> list[Any]:
        """Waits until all processes have called this; returns the ``value`` of every process, by rank.

        Args:
            where: the place in the run, in words that complete "is at …"; must be the same on all processes.
            value: anything picklable and small.
            detail: more about the place, for messages; may differ between processes.

        Raises:
            RuntimeError: a process did not call within the timeout, or called at another place.
        """
        if self.size == 1:
            return [value]
        with self.label_errors(f"{where} {detail}".strip()):
            assert self._control is not None
            assert self._timeout is not None
            number, self._gathered = self._gathered, self._gathered + 1
            seen = gather_objects((where, detail, value), self.rank, self.size, number, self._control, self._timeout)
        if len({place for place, _, _ in seen}) > 1:
            places = "; ".join(f"process {r} is at {f'{at} {more}'.strip()}" for r, (at, more, _) in enumerate(seen))
            raise RuntimeError(
                f"The processes are at different places: {places}. All must take the same steps; look for loaders of"
                " different lengths, and for hooks that stop, validate, save or (with sync_dist=True) log on one"
                " process only."
            )
        return [value for _, _, value in seen]

    @contextmanager
    def label_errors(self, where: str, among: Among = "all") -> Iterator[None]:
        """The block is a collective: adds the place in the run, ``where``, to its error, and counts its time."""
        try:
            with self.waiting.at(where, among):
                yield
        except RuntimeError as error:
            raise RuntimeError(
                f"Process {self.rank} of {self.size} failed at {where}. If another process has exited or hangs"
                f" (`timeout` = {self._timeout}), see its output. {error}"
            ) from error

    def watch(self, store: Store, after: float, say: Callable[[str], None]) -> None:
        """From now on, ``say`` is called with the processes for which this process waits longer than ``after`` s."""
        self.rest()
        team = [self.host(self.workers[0], j) for j in range(self.team)]
        self._watcher = Watcher(self.waiting, self.rank, {"all": range(self.size), "team": team}, store, after, say)
        self._watcher.start()

    def rest(self) -> None:
        """Ends :meth:`watch`."""
        if self._watcher is not None:
            self._watcher.stop()
            self._watcher = None

    def gather_signals(self, where: str) -> None:
        """Tells all processes which signals any process has received."""
        self.learn_signals(self.gather_all(where, self.signals))

    def learn_signals(self, gathered: Iterable[set[str]]) -> None:
        """Notes the signals of every process, which all processes have gathered."""
        self.known_signals = set().union(*gathered)

    @property
    def stopping(self) -> bool:
        """Whether all processes know that some process has received SIGTERM."""
        return "stop" in self.known_signals

    def check_equal(self, where: str, value: dict[str, Any]) -> None:
        """Checks that ``value`` is equal on all processes.

        Raises:
            ValueError: names the differing entry, the process and both values.
        """
        gathered = self.gather_all(where, value)
        first = gathered[0]
        for rank, given in enumerate(gathered):
            for key in first | given:
                if given.get(key) != first.get(key):
                    raise ValueError(
                        f"The processes were started with different settings: `{key}` is {first.get(key)!r} on"
                        f" process 0 and {given.get(key)!r} on process {rank}. Start the same script with the same"
                        " arguments everywhere."
                    )

    def decided_by_first(self, decide: Callable[[], Any]) -> Any:
        """Calls ``decide`` on process 0; all processes return its result, or raise its exception."""
        if self.size == 1:
            return decide()
        outcome: list[Any] = [None, None]
        if self.rank == 0:
            try:
                outcome = [decide(), None]
            except Exception as error:
                # an error that stayed on process 0 would leave the others waiting in the broadcast below
                outcome = [None, error if _can_pickle(error) else RuntimeError(f"{type(error).__name__}: {error}")]
        with self.label_errors("a decision of process 0"):
            dist.broadcast_object_list(outcome, src=0, group=self._control)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def gather_to_first(self, value: Any) -> list[Any]:
        """The ``value`` of every process, by rank, on process 0; an empty list on the others."""
        if self.size == 1:
            return [value]
        packed = io.BytesIO()
        torch.save(value, packed)  # pickle can't serialise tensors of every dtype
        gathered: list[Any] | None = [None] * self.size if self.rank == 0 else None
        with self.label_errors("a collection by process 0"):
            dist.gather_object(packed.getvalue(), gathered, dst=0, group=self._control)
        return [torch.load(io.BytesIO(data), weights_only=False) for data in gathered or []]

    # ---------------------------------------------------------------------------------------- inside a team

    @torch.no_grad()
    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """``p.grad`` becomes the mean over the worker's team.

        A missing gradient counts as zero, unless it is missing on all processes of the team.

        Args:
            parameters: the same on all processes of the team; those without ``requires_grad`` are left out.

        Raises:
            RuntimeError: a gradient is sparse.
        """
        if self.team == 1:
            return
        trainable = [p for p in parameters if p.requires_grad]
        for p in trainable:
            if p.grad is not None and p.grad.is_sparse:
                raise RuntimeError(
                    f"A parameter of shape {tuple(p.shape)} has a sparse gradient, which a worker's {self.team}"
                    " processes can't average. Use `sparse=False`, or at most as many processes as workers."
                )
        for bucket in _buckets(trainable, means.CHUNK):
            # A process can't skip a missing gradient, since the others wait for its part of the all-reduce: zeros go
            # into the sum, and a flag per parameter tells all processes whether any process has that gradient.
            flags = bucket[0].new_tensor([p.grad is not None for p in bucket], dtype=bucket[0].dtype.to_real())
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
            pieces = [flat(t) for t in [*gradients, flags]]
            together = torch.cat(pieces).div_(self.team)
            with self.label_errors("the mean of gradients in a worker's team", "team"):
                dist.all_reduce(together, group=self._team_group)
            *averages, present = torch.split(together, [t.numel() for t in pieces])
            for p, gradient, mean, any_has in zip(bucket, gradients, averages, present.tolist(), strict=True):
                if any_has:
                    p.grad = gradient
                    real_view(gradient).copy_(mean.view_as(real_view(gradient)))

    @torch.no_grad()
    def team_mean(self, value: Tensor) -> Tensor:
        """The mean over the worker's team, as a new tensor."""
        mean = value.detach() / self.team
        if self.team > 1:
            with self.label_errors("the mean of losses in a worker's team", "team"):
                dist.all_reduce(mean, group=self._team_group)
        return mean

    def broadcast_in_team(self, tensors: Iterable[Tensor]) -> None:
        """Copies the tensors of the team's first process to the others in place, as DDP does with buffers."""
        if self.team > 1:
            self._broadcast(tensors, self.host(self.workers[0]), "the buffers of a worker's team", self._team_group)

    def broadcast(self, tensors: Iterable[Tensor], source: int, where: str) -> None:
        """Copies the tensors of process ``source`` to all processes in place; ``where`` as in :meth:`gather_all`."""
        if self.size > 1:
            self._broadcast(tensors, source, where, None)

    @torch.no_grad()
    def _broadcast(self, tensors: Iterable[Tensor], source: int, where: str, group: Any) -> None:
        for tensor in tensors:
            values = tensor.contiguous()
            if values.numel():
                with self.label_errors(where, "all" if group is None else "team"):
                    dist.broadcast(bytes_of(values), source, group=group)
            if values is not tensor:
                tensor.copy_(values)


def check_layout(num_workers: int, size: int, started_by: str = "") -> None:
    """Whether ``size`` processes can share ``num_workers`` workers evenly.

    Args:
        num_workers: N.
        size: W.
        started_by: who asked for W processes, for the message.

    Raises:
        ValueError: neither number is a multiple of the other.
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
    """Groups of parameters of the same dtype and device, of at most ``most`` elements or a single larger parameter."""
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


def _can_pickle(error: Exception) -> bool:
    """Whether an exception survives pickling; a class with an ``__init__`` of other arguments may not."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return False
    return True
