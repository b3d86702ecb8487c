"""The context of an algorithm: what it can read, send, take in, write and remember.

Owns the clock of the rounds, the transfers that are under way, and :meth:`SyncContext.merge`, the only place that
writes trainable parameters of replicas during training. Does not own how a transfer is made (``sending.py``), the outer
step (``state/outer.py``), nor what follows from an arrival (``engine/synchronisation.py``). Imports nothing of
Lightning.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lightning_diloco.algorithms.aggregates import Aggregate
from lightning_diloco.algorithms.machines import Machines
from lightning_diloco.algorithms.order import Order, Read
from lightning_diloco.algorithms.sending import Sender
from lightning_diloco.algorithms.transfer import Transfer
from lightning_diloco.codecs import Codec
from lightning_diloco.comm.channel import Channel
from lightning_diloco.comm.ledger import Ledger
from lightning_diloco.comm.means import Differences
from lightning_diloco.comm.tensors import bitwise_equal
from lightning_diloco.state.memory import Memory
from lightning_diloco.state.optimizers import InnerOptimizers
from lightning_diloco.state.outer import Outer
from lightning_diloco.state.replicas import Layout, Replicas


@dataclass
class SyncContext:
    """The view of the engine that an algorithm works with.

    Everything about single workers (``weights``, ``delta``, ``gradients``, ``slot``, …) can be asked for the workers
    that this process hosts, ``local_workers``. :meth:`send`, :meth:`arrived` and :meth:`merge` are called on all
    processes alike.

    Attributes:
        outer: θ and the outer optimizer: ``outer.tensors``, ``outer.step(names, Δ)``, ``outer.assign(values)``.
        machines: the simulated machines.
        interval: H.
        num_workers: N.
        local_steps: completed local steps.
        step: the local step that is under way, from 1.
        origin: the local step from which rounds are counted: 0, or that of the last flush.
        outer_steps: arrivals so far.
        waiting: the transfers under way, in the order sent.
        taken: the transfers that have arrived in this step.
        changes: what algorithms around others make of an order before, and of its transfer after sending.
        unsent: an algorithm's own answer whether workers have stepped since they last sent; None: rounds tell.
        alone: workers whose values were not finite, with nobody else in their transfer.
    """

    replicas: Replicas
    outer: Outer
    channel: Channel
    inner: InnerOptimizers
    memory: Memory
    sender: Sender
    machines: Machines
    interval: int
    num_workers: int
    local_steps: int = 0
    step: int = 0
    origin: int = 0
    outer_steps: int = 0
    waiting: list[Transfer] = field(default_factory=list)
    taken: list[Transfer] = field(default_factory=list)
    merged: set[str] = field(default_factory=set)  # parameters that workers have taken over in this step
    last_sent: dict[str, int] = field(default_factory=dict)  # stream → the step in which it was last sent
    ever_sent: set[str] = field(default_factory=set)  # parameters whose weights, or Δ, workers have sent
    changes: list[tuple[Callable[[Order], Order], Callable[[Order, Transfer], None]]] = field(default_factory=list)
    unsent: Callable[[], bool] | None = None
    alone: list[int] = field(default_factory=list)
    _flushing: bool = False
    _moved_late: bool = False
    _sent_in_step: dict[tuple[str, int], int] = field(default_factory=dict)  # (stream, step) → how many orders
    _sent_before_flush: dict[str, int] = field(default_factory=dict)
    _round_ends: bool | None = None  # while flushing: the answer of `due`

    # ---------------------------------------------------------------------------------------- reading

    @property
    def workers(self) -> list[int]:
        """Global ids of the workers that are there: all, unless the cluster's availability says otherwise."""
        return self.channel.workers

    @property
    def local_workers(self) -> list[int]:
        """Those of ``workers`` that this process hosts, whose tensors can be read and written; there may be none."""
        return self.channel.here

    @property
    def names(self) -> list[str]:
        """The trainable parameters."""
        return self.outer.names

    @property
    def parameters(self) -> list[str]:
        """All parameters of the module, frozen ones too; tied ones once."""
        return [name for name, _ in self.replicas.layout.module.named_parameters()]

    @property
    def ledger(self) -> Ledger:
        """What has been sent."""
        return self.channel.ledger

    def weights(self, worker: int) -> Mapping[str, Tensor]:
        """θ_i: parameter name → tensor; not to be written to (:meth:`merge` does that)."""
        return self.replicas.tensors(worker)

    def common_weights(self) -> Mapping[str, Tensor]:
        """The trainable parameters of workers that all hold the same, on every process; called on all alike."""
        return self.channel.common(self.names, self.replicas.tensors, like=self.outer.tensors)

    def anchor(self, worker: int) -> Mapping[str, Tensor]:
        """The value from which the worker measures Δ_i: θ, or with ``anchors = "own"`` what it last took over."""
        return self.memory.anchors[worker] if self.memory.own_anchors else self.outer.tensors

    def delta(self, worker: int) -> Mapping[str, Tensor]:
        """Δ_i = anchor − θ_i over the trainable parameters, in the parameters' dtype, each computed when asked for."""
        return Differences(self.names, self.anchor(worker), self.replicas.tensors(worker))

    def gradients(self, worker: int) -> dict[str, Tensor]:
        """With ``needs_gradients``, in ``before_inner_step``: the gradients with which the worker is about to step.

        The tensors themselves: writing to them changes the step. Parameters that got a gradient on any worker, see
        :meth:`names_with_gradients`, have one on all: zeros where the backward pass left none.
        """
        kept, parameters = self.inner.workers[worker].gradients, self.replicas.layout.parameters
        return {n: kept[p] for n, p in parameters.items() if p in kept}

    def names_with_gradients(self) -> list[str]:
        """The parameters that any worker has a gradient of in this step."""
        layout = self.replicas.layout
        here = {
            n for w in self.local_workers for n, p in layout.parameters.items() if p in self.inner.workers[w].gradients
        }
        found = set().union(*self.channel.world.gather_all(f"the gradients of local step {self.step}", here))
        names = [n for n in layout.names if n in found]
        for w in self.local_workers:
            gradients = self.inner.workers[w].gradients
            for n in names:
                p = layout.parameters[n]
                if p not in gradients:
                    gradients[p] = torch.zeros_like(p)
                if gradients[p].is_sparse:
                    raise RuntimeError(
                        f"The gradient of {n!r} is sparse, which workers can't average. Use `sparse=False`."
                    )
        return names

    def inner_state(self, worker: int, key: str) -> dict[str, Tensor]:
        """Parameter name → an entry of the inner optimizer's state, such as "exp_avg"; the tensors themselves."""
        names = {p: n for n, p in self.replicas.layout.parameters.items()}
        states = (item for state in self.inner.workers[worker].states for item in state.items())
        return {names[p]: values[key] for p, values in states if p in names and key in values}

    def names_with_state(self, key: str) -> list[str]:
        """The trainable parameters for which the inner optimizers of all workers keep ``key``; a collective."""
        here = set(self.names).intersection(*(self.inner_state(w, key) for w in self.local_workers))
        found = self.channel.world.gather_all(f"the inner states {key!r} of local step {self.step}", here)
        return [n for n in self.names if all(n in names for names in found)]

    def numbers(self, what: str, here: Mapping[int, float]) -> dict[int, float]:
        """Worker → number, of all workers, from those of ``local_workers``; a collective."""
        found: dict[int, float] = {}
        for of_process in self.channel.world.gather_all(f"{what} of local step {self.step}", dict(here)):
            found |= of_process
        return dict(sorted(found.items()))

    def inner_lr(self, worker: int) -> float:
        """The learning rate of the first group of the worker's first inner optimizer."""
        return float(self.inner.workers[worker].control[0][0]["lr"])

    def random(self, tag: str, worker: int | None = None) -> torch.Generator:
        """A CPU generator seeded from (run seed, tag, step, worker): the same on all processes and after a resume."""
        return self.sender.random(tag, self.step, worker)

    # ---------------------------------------------------------------------------------------- rounds

    def due(self, step: int, offset: int = 0) -> bool:
        """Whether a round ends: H local steps after training, or the last flush, began, and every H steps from then on.

        Args:
            step: the local step that is under way.
            offset: shifts all ends by that many local steps.
        """
        if self._round_ends is not None:
            return self._round_ends
        done = step - self.origin - offset
        return done > 0 and done % self.interval == 0

    @property
    def round_start(self) -> int:
        """``local_steps`` when the present round began."""
        return self.origin + (self.local_steps - self.origin) // self.interval * self.interval

    @property
    def flushing(self) -> bool:
        """Whether training is ending, and this is the last chance to send."""
        return self._flushing

    @property
    def outstanding(self) -> bool:
        """Whether something is under way, or workers have stepped since they last sent."""
        if self.unsent is not None:
            return bool(self.waiting) or self._moved_late or self.unsent()
        recent = {s: at for s, at in self.last_sent.items() if at > self.local_steps - 2 * self.interval}
        of_weights = [at for stream, at in recent.items() if not stream.startswith("gradients")]
        latest = min(of_weights or recent.values(), default=self.origin)
        if of_weights and not self.ever_sent >= set(self.names):  # fragments whose first turn is still to come
            latest = self.origin
        return bool(self.waiting) or self._moved_late or max(latest, self.origin) < self.local_steps

    # ---------------------------------------------------------------------------------------- sending, arriving

    def send(
        self,
        names: Sequence[str],
        read: Read,
        *,
        workers: Iterable[int] | None = None,
        groups: Iterable[Iterable[int]] | None = None,
        weights: Mapping[int, float] | None = None,
        delay: int = 0,
        tag: str | None = None,
        what: str = "delta",
        codec: Codec | None = None,
        everybody: bool = False,
        aggregate: Aggregate | None = None,
        fresh: bool = False,
    ) -> Transfer:
        """Workers send tensors, which are averaged; the means arrive ``delay`` local steps later.

        In this order: who takes part (``participation``) → are these tensors of these workers finite (``nonfinite``) →
        encoding, tensor by tensor → means → ledger. Send before you apply what has arrived: a Δ_i refers to the anchor.

        Args:
            names: names of the tensors, in the same order on all processes.
            read: gives worker i's tensors, for example :meth:`delta`; called for ``local_workers`` only.
            workers: who sends, of those that are there; default all of them.
            groups: disjoint groups of workers, instead of ``workers``: means are taken within each (gossip).
            weights: worker → weight ≥ 0 in the mean; default: those of the strategy's ``weights``.
            delay: local steps from sending to arrival, ≥ 0; 0: the transfer arrives at once.
            tag: a word by which :meth:`arrived` finds the transfer, and by which codecs tell streams apart.
            what: kind of the tensors, for the ledger: "delta", "weights", "gradients", or a word of your own. Norm,
                cosine and drift of "weights" are those of θ − weights.
            codec: packs this transfer, instead of the run's codec; ``Identity()``: unpacked.
            everybody: ``participation`` leaves nobody out: for the second part of a message that has arrived in part.
            aggregate: a robust rule that takes the place of the mean; None: the mean.
            fresh: these workers are known to have stepped since they last sent; else a flush finds out.

        Returns:
            The transfer; without ``means``, and not under way, if nobody takes part, or if a flush finds that these
            workers have not stepped since they last sent this.

        Raises:
            ValueError: a wrong delay, wrong workers or groups, or numbers that a codec can't pack.
            RuntimeError: values are not finite, see :class:`~lightning_diloco.DilocoStrategy`.
        """
        if isinstance(delay, bool) or not isinstance(delay, int) or delay < 0:
            raise ValueError(f"`delay` (={delay!r}) must be an integer ≥ 0: local steps from sending to arrival.")
        if workers is not None and groups is not None:
            raise ValueError(
                f"`workers` (={workers!r}) and `groups` (={groups!r}) can't be combined. Give one of them."
            )
        absent = set(range(self.num_workers)).difference(self.workers)
        wanted = [list(self.workers if workers is None else workers)] if groups is None else groups
        order = Order(
            names=list(names),
            read=read,
            groups=[[w for w in group if w not in absent] for group in wanted],
            weights=weights,
            step=self.step,
            delay=0 if self._flushing else delay,
            tag=tag,
            what=what,
            codec=codec,
            everybody=everybody,
            aggregate=aggregate,
            assigns=groups is None and aggregate is None and self._may_assign(list(names), read, delay, what),
        )
        count = self._sent_in_step.get((order.stream, self.step), 0)
        self._sent_in_step = {k: n for k, n in self._sent_in_step.items() if k[1] == self.step}
        self._sent_in_step[order.stream, self.step] = count + 1
        order = replace(order, again=f", {count}" if count and not self._flushing else "", count=count)
        if self._flushing and not fresh and not self._has_news(order):
            return Transfer(order.names, [], sent=self.step, due=self.step, tag=tag, what=what)
        for revise, _ in self.changes:
            order = revise(order)
        transfer = self.sender.send(order)
        for _, amend in self.changes if transfer.means else ():
            amend(order, transfer)
        if transfer.means:
            self.last_sent[order.stream] = self.step
            if order.of_weights:
                self.ever_sent |= set(order.names)
            self.waiting.append(transfer)
        elif transfer.on_links:  # a part was lost, or all: it was sent all the same
            self.last_sent[order.stream] = self.step
        if not transfer.means:
            self.alone += transfer.rejected
        if transfer.rolled_back and order.of_weights:
            for w in [w for w in transfer.rolled_back if w in self.local_workers]:
                self.merge([w], [n for n in order.names if n in self.names], self.anchor(w))
        return transfer

    def _may_assign(self, names: Sequence[str], read: Read, delay: int, what: str) -> bool:
        """Whether θ will be the mean of the weights, so that this mean can be sent in place of Δ's, bit for bit."""
        shared = not self.memory.own_anchors and not any(set(names) & set(t.names) for t in self.waiting)
        known = what == "delta" and read == self.delta and delay == 0
        return shared and known and self.outer.is_plain_average

    def _has_news(self, order: Order) -> bool:
        """While flushing: whether workers have stepped since they last sent this, and differ from their anchors."""
        sent_at = self._sent_before_flush.get(order.stream, self.origin)
        if self._round_ends is False or (sent_at >= self.step and not self._moved_late):
            return False  # whatever a flush sends, it sends once: when rounds end
        known = set(order.names) & set(self.names)
        here = len(known) == len(order.names) and all(
            bitwise_equal(self.weights(w)[n], self.anchor(w)[n]) for w in self.local_workers for n in known
        )
        # agreed between the processes, since the sending that follows is a collective
        return not all(self.channel.world.gather_all(f"the end of training after {self.step} local steps", here))

    def arrived(self, tag: str | None = None) -> list[Transfer]:
        """The transfers that arrive in this step, in the order sent; each is handed out once.

        Args:
            tag: only those sent with this tag; None: all.
        """
        landing = self._flushing and self._round_ends is False
        here = [t for t in self.waiting if (t.due <= self.step or landing) and tag in (None, t.tag)]
        self.waiting = [t for t in self.waiting if t not in here]
        self.taken += here
        for transfer in here:
            takers = transfer.workers if transfer.what != "gradients" else self.workers
            self.machines.arrive(transfer, [w for w in takers if w in self.workers], self.step)
        return here

    @torch.no_grad()
    def merge(
        self,
        workers: Iterable[int],
        names: Iterable[str],
        values: Mapping[str, Tensor],
        alpha: float = 0.0,
        index: Mapping[str, Tensor] | None = None,
    ) -> None:
        """``θ_i ← α·θ_i + (1−α)·values`` and ``anchor_i ← values`` for each of the workers.

        Args:
            workers: which workers; those hosted elsewhere are left to their process.
            names: which parameters.
            values: parameter name → target, in the parameter's shape (with ``index``: one value per position).
            alpha: weight of the local value, 0 ≤ α ≤ 1; 0 copies, so that not even a NaN of the replica survives.
                Workers that were left out because their values were not finite always copy.
            index: parameter name → positions in the flattened parameter, int64; the others stay as they are.
        """
        if not 0 <= alpha <= 1:
            raise ValueError(f"`alpha` (={alpha}) must lie between 0 (take the values) and 1 (keep the replica).")
        names = list(names)
        self.sender.writing = True
        self.merged.update(names)
        rejected = {w for t in self.taken for w in t.rejected}
        for w in [w for w in workers if w in self.local_workers]:
            put = _copy if alpha == 0 or w in rejected else _mix(alpha)
            targets = [(self.replicas.tensors(w), put)]
            if self.memory.own_anchors:
                targets.append((self.memory.anchors[w], _copy))
            for tensors, write in targets:
                for n in names:
                    if index is None:
                        write(tensors[n], values[n])
                    else:
                        _scatter(tensors[n], index[n], values[n], write)

    def renew(self, transfer: Transfer) -> None:
        """The workers that a transfer has left out as not finite start anew at once, with a fresh inner state.

        For algorithms that give workers new weights before a transfer arrives: with the old inner state these would not
        be finite for long.
        """
        here = [w for w in transfer.rejected if w in self.local_workers]
        for w in here:
            self.inner.workers[w].reset_inner_state(self.inner.initial)
        if here:
            self.inner.activate_first()  # else what the optimizers still hold would be an outside change
        transfer.renewed = True

    # ---------------------------------------------------------------------------------------- own outer values

    def share(self, transfer: Transfer, worker: int) -> float:
        """The weight of a worker's tensors in the mean of a transfer that named no ``weights``; 0 if it has none."""
        group = next((g for g in transfer.groups if worker in g), [])
        weights = self.channel.weights or dict.fromkeys(group, 1.0)
        return weights[worker] / sum(weights[w] for w in group) if group else 0.0

    def emphasis(self, worker: int) -> float:
        """The worker's weight in means that name none, over the mean weight of those that are there."""
        weights = self.channel.weights
        if weights is None:
            return 1.0
        return weights[worker] * len(self.workers) / sum(weights[w] for w in self.workers)

    def outer_step(self, worker: int, names: Sequence[str], delta: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The worker's own outer step: from its anchor, with a state of the outer optimizer that only it has.

        For algorithms with ``anchors = "own"``. θ stays; :meth:`merge` takes the result over.

        Args:
            worker: hosted here.
            names: parameters that take part.
            delta: the pseudo-gradient that the worker applies.

        Returns:
            Parameter name → the worker's new outer value.
        """
        values = {n: self.anchor(worker)[n].clone() for n in names}
        state: dict[str, dict[str, Tensor]] = {n: {} for n in names}
        started = self.slot(worker, "outer state", like={})
        for key in [name for w, name in self.memory.slots if w == worker and name.startswith("outer state/")]:
            slot = self.slot(worker, key, like={})
            for n in [n for n in names if n in slot and started.get(n, slot[n]).any()]:
                state[n][key.partition("/")[2]] = slot[n]
        self.outer.step_apart(names, delta, values, state)
        for n, of_name in state.items():
            started[n] = torch.ones((), device=values[n].device)
            for key, value in of_name.items():
                self.slot(worker, f"outer state/{key}", like={})[n] = value
        return values

    # ---------------------------------------------------------------------------------------- memory

    def slot(self, worker: int, name: str, like: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Tensors of a worker under a name of yours, zeros at first: shaped like its parameters, or like ``like``.

        They are in checkpoints, move with the run, and entries of a parameter that is written from outside start anew.
        """
        return self.memory.slot(worker, name, like)

    def memo(self, name: str) -> dict[str, Tensor]:
        """As :meth:`slot`, once for all workers: write the same on all processes. Empty at first."""
        return self.memory.memo(name)

    # ---------------------------------------------------------------------------------------- flush

    def land(self) -> None:
        """First part of a flush: everything under way arrives, and no round ends."""
        self._round_ends = False

    def end_rounds(self) -> None:
        """Second part of a flush: every round ends, and what is sent arrives at once."""
        self._round_ends = True

    def flush(self, flush: Callable[[int], None], moved_late: bool) -> None:
        """Lets the algorithm flush; afterwards rounds are counted from here.

        Args:
            flush: the algorithm's.
            moved_late: whether workers have moved since the last local step was counted.
        """
        self._flushing, self._moved_late, self._sent_before_flush = True, moved_late, dict(self.last_sent)
        try:
            flush(self.step)
        finally:
            self._flushing, self._moved_late, self._round_ends = False, False, None
        self.origin = self.local_steps

    # ---------------------------------------------------------------------------------------- outside changes

    def rebase(self, written: Mapping[str, Tensor]) -> None:
        """Parameters were written from outside: the transfers under way follow."""
        for transfer in self.waiting:
            transfer.rebase(written)

    def relayout(self, old: Layout, layout: Layout) -> None:
        """Parameters came, went or were renamed: transfers under way carry those that are still there."""
        renamed = {before: name for name, before in layout.previous_names(old).items()}
        for t in self.waiting:
            kept = [n for n in t.names if n not in old.parameters or n in renamed]
            t.names = [renamed.get(n, n) for n in kept]
            t.means = [{renamed.get(n, n): mean[n] for n in kept} for mean in t.means]


def _copy(target: Tensor, value: Tensor) -> None:
    target.copy_(value)


def _mix(alpha: float) -> Callable[[Tensor, Tensor], None]:
    def mix(target: Tensor, value: Tensor) -> None:
        target.mul_(alpha).add_(value, alpha=1 - alpha)

    return mix


def _scatter(target: Tensor, index: Tensor, values: Tensor, write: Callable[[Tensor, Tensor], None]) -> None:
    flattened = target.view(-1) if target.is_contiguous() else target.reshape(-1)
    selected = values.to(target.dtype)
    if write is not _copy:
        selected = flattened.index_select(0, index)
        write(selected, values)
    flattened.scatter_(0, index, selected)
    if flattened.data_ptr() != target.data_ptr():
        target.copy_(flattened.view(target.shape))
