"""The live inner optimizers: the optimizer objects that the training loop steps, with the active worker's state.

Owns the live optimizers between turns: outside changes of them are adopted by every worker, and a validation gets
copies. Does not own a worker's state (``worker.py``) nor the order of turns (``engine.py``). Imports nothing of
Lightning.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_diloco.comm.channel import Channel
from lightning_diloco.comm.tensors import bitwise_equal, copied
from lightning_diloco.state.own_steps import OwnSteps, apply
from lightning_diloco.state.randomness import RandomStream
from lightning_diloco.state.replicas import is_floating
from lightning_diloco.state.worker import (
    Control,
    Groups,
    OptimizerState,
    ScalerOwner,
    Schedule,
    Worker,
    copy_state,
    flatten_optimizers,
    parameters_of,
)


class InnerOptimizers:
    """The live inner optimizers, and the state of each worker of this process.

    Args:
        optimizers: the optimizers that the training loop steps.
        scaler_owner: holder of the gradient scaler, or None.
        streams: global id of each worker hosted here → its random stream (None: the process's generators).
        schedulers: LR schedulers that the workers step themselves (manual optimization); each worker has a state of
            them.
        initial: optimizer states right after ``configure_optimizers``; default: the present ones.
        own_steps: lets each worker follow learning rates on its own local steps; None: all step together.
    """

    def __init__(
        self,
        optimizers: Sequence[Any],
        scaler_owner: ScalerOwner | None,
        streams: Mapping[int, RandomStream | None],
        schedulers: Sequence[Any] = (),
        initial: Sequence[OptimizerState] | None = None,
        own_steps: OwnSteps | None = None,
    ) -> None:
        self.own_steps = own_steps
        self.live = flatten_optimizers(optimizers)
        self._outermost, self._schedulers = list(optimizers), list(schedulers)
        self._controls: list[Groups | Schedule] = [*map(Groups, self.live), *map(Schedule, schedulers)]
        self._scaler_owner = scaler_owner
        self._streams = streams
        self.workers: dict[int, Worker] = {}
        self._sandboxed = False
        self._given_initial = initial
        self._stateful_groups: dict[int, str] = {}  # id of an optimizer → a group entry that step() changed
        self.start_from_live()

    @property
    def first(self) -> Worker:
        """The worker whose state is in the live optimizers between turns."""
        return next(iter(self.workers.values()))

    def start_from_live(self) -> None:
        """Every worker starts from the optimizers' present state; before the first step only."""
        self.initial = self._given_initial or [copy_state(o.state) for o in self.live]
        for i, (w, stream) in enumerate(self._streams.items()):
            self.workers[w] = Worker(self.live, self._controls, self._scaler_owner, stream, original=i == 0)
        self._known_control = [c.read() for c in self._controls]
        if self.own_steps is not None:
            self.own_steps.initial = copied(self._known_control)

    def knows(self, optimizer: Any) -> bool:
        """Whether the training loop steps ``optimizer``."""
        return any(optimizer is known for known in self.live)

    def are_others(self, optimizers: Sequence[Any], schedulers: Sequence[Any]) -> bool:
        """Whether these differ from the live optimizers, or from the schedulers that workers step."""
        return _differ(optimizers, self._outermost) or _differ(schedulers, self._schedulers)

    def replace(self, optimizers: Sequence[Any], schedulers: Sequence[Any]) -> None:
        """Makes these live: workers keep their states of optimizers that stay, and start new optimizers afresh."""
        self.adopt_outside_changes()
        old, initial, holders = self.live, self.initial, [*self.live, *self._schedulers]
        self.live, self._outermost = flatten_optimizers(optimizers), list(optimizers)
        self._schedulers = list(schedulers)
        self._controls = [*map(Groups, self.live), *map(Schedule, schedulers)]
        kept = [(o, _position(old, o)) for o in self.live]
        self.initial = [copy_state(o.state) if i is None else initial[i] for o, i in kept]
        for worker in self.workers.values():
            states, control = worker.states, worker.control
            worker.states = [
                states[i] if i is not None else o.state if worker is self.first else copy_state(o.state)
                for o, i in kept
            ]
            worker.control = [
                c.read() if (i := _position(holders, h)) is None else control[i]
                for h, c in zip([*self.live, *schedulers], self._controls, strict=True)
            ]
            worker.follow(self.live, self._controls)
        if self.own_steps is not None:
            self.own_steps.forget()
            self.own_steps.initial = [c.read() for c in self._controls]
        self.activate_first()

    def random_state_kept(self) -> AbstractContextManager[None]:
        """The process's generators are afterwards as before; the workers' turns inside set them to their own states."""
        return nullcontext() if self.first.stream is None else self.first.stream.outside_kept()

    def activate_first(self) -> None:
        """Puts the first worker's state into the optimizers and the scaler's owner, after a turn."""
        self.first.activate()
        for position in range(len(self._controls)):
            self._show(position)
        self._known_control = [c.read() for c in self._controls]

    def _show(self, position: int) -> None:
        """The live groups have the latest values, also if the first worker has not come so far."""
        if self.own_steps is not None:
            first, worker = next(iter(self.workers.items()))
            self._controls[position].write(self.own_steps.shown(first, position, worker.control[position]))

    def start_anew(self, worker: int) -> None:
        """A worker has fresh inner state, and follows learning rates from the beginning."""
        assert self.own_steps is not None
        self.workers[worker].reset_inner_state(self.initial)
        self.workers[worker].control = copied(self.own_steps.initial)

    def adopt_outside_changes(self) -> None:
        """Writes changes that schedulers and callbacks made between turns into the state of every worker."""
        first = self.first
        for position, optimizer in enumerate(self.live):
            if optimizer.state is not first.states[position]:  # Optimizer.load_state_dict makes a new one
                for w in self.workers.values():
                    w.states[position] = optimizer.state if w is first else copy_state(optimizer.state)
        for position, holder in enumerate(self._controls):
            live, before = holder.read(), self._known_control[position]
            # Only changed entries are copied. The live optimizers show the first worker's control state; copied as a
            # whole it would overwrite learning rates that the other workers have set in their turns.
            for g, values in enumerate(live):
                known = before[g] if g < len(before) else {}
                changed = {k: v for k, v in values.items() if k not in known or not _same_value(v, known[k])}
                own, grown = self.own_steps, g >= len(before)
                if own is not None and grown:  # a new group is everybody's at once: optimizers must fit their state
                    own.initial[position].append(copied(values))
                elif own is not None and changed:
                    own.note(position, g, changed)
                for w in self.workers.values() if own is None or grown else ():
                    if g == len(w.control[position]):
                        w.control[position].append({})
                    w.control[position][g].update(changed)
            for w in self.workers.values():
                del w.control[position][len(live) :]
            self._known_control[position] = live
        if self.own_steps is not None:
            for i in range(len(self.own_steps.counts)):  # all processes know how far every worker is
                for change in self.own_steps.due(i):
                    if i in self.workers:
                        apply(change, self.workers[i].control)

    def watch_groups(self) -> list[Any]:
        """Notices optimizers whose ``step`` changes their groups from now on; returns the hooks' handles."""
        handles = []
        for optimizer in self.live:
            if hasattr(optimizer, "register_step_pre_hook"):
                before: list[Control] = []  # a stack: a step that calls super().step() runs the hooks twice
                handles += [
                    optimizer.register_step_pre_hook(lambda o, *_, before=before: before.append(Groups(o).read())),
                    optimizer.register_step_post_hook(partial(self._after_step, before)),
                ]
        return handles

    def _after_step(self, before: list[Control], optimizer: Any, *_: Any) -> None:
        for was, now in zip(before.pop(), Groups(optimizer).read(), strict=False):
            for key, value in now.items():
                if key not in was or not _same_value(value, was[key]):
                    self._stateful_groups.setdefault(id(optimizer), key)

    @contextmanager
    def first_activated(self) -> Iterator[None]:
        """Inside, the live optimizers have the first worker's state; afterwards their previous state."""
        if not self._sandboxed:
            self.adopt_outside_changes()
        states, control = [o.state for o in self.live], [c.read() for c in self._controls]
        self.first.activate()
        try:
            yield
        finally:
            for optimizer, state in zip(self.live, states, strict=True):
                optimizer.state = state
            for holder, values in zip(self._controls, control, strict=True):
                holder.write(values)

    def with_modes(self) -> Any:
        """An optimizer with separate weights for evaluation, like schedule-free ones; None if there is none."""
        return next((optimizer for optimizer in self.live if _has_modes(optimizer)), None)

    @contextmanager
    def sandbox(self, channel: Channel) -> Iterator[None]:
        """For an evaluation: inside, the optimizers have copies of their state, which are dropped afterwards.

        Optimizers with ``train()`` and ``eval()`` have the mean of the workers' states. Control state that is written
        inside (learning rates, schedulers) is adopted by every worker, as between turns.
        """
        # Schedule-free optimizers compute the evaluation weights out of the live weights and their state. An evaluation
        # of the replicas' mean needs the states' mean; a worker's state would mix that worker's iterate into the mean.
        self.adopt_outside_changes()
        for position, optimizer in enumerate(self.live):
            optimizer.state = copy_state(optimizer.state)
            if _has_modes(optimizer):
                there = channel.here
                states = {i: [copy_state(self.workers[i].states[position])] for i in there}
                average_inner_state(channel, [optimizer], states, least=1)
                optimizer.state = states[there[0]][0] if there else optimizer.state
        self._sandboxed = True
        try:
            yield
        finally:
            self._sandboxed = False
            for position, optimizer in enumerate(self.live):
                optimizer.state = self.first.states[position]
                if _has_modes(optimizer):  # undoes eval() without train(), and other writes of hooks to these groups
                    self._controls[position].write(self.first.control[position])
                    self._show(position)
            self.adopt_outside_changes()

    def check_averageable(self, policy: str) -> None:
        """Refuses inner states without a meaningful reset or mean; to be called after the first step."""
        for optimizer in self.live:
            if id(optimizer) in self._stateful_groups:
                raise ValueError(
                    f"`inner_state` (={policy!r}) needs an inner optimizer that keeps its state in `state`;"
                    f" {type(optimizer).__name__} keeps {self._stateful_groups[id(optimizer)]!r} in its `param_groups`."
                    " Use `inner_state='keep'`."
                )
            for values in optimizer.state.values():
                for key, value in values.items() if isinstance(values, dict) else ():
                    if isinstance(value, (list, tuple)):
                        raise ValueError(
                            f"`inner_state` (={policy!r}) needs an inner optimizer whose state is tensors and numbers;"
                            f" {type(optimizer).__name__} keeps a {type(value).__name__} under {key!r}."
                            " Use `inner_state='keep'`."
                        )


@torch.no_grad()
def average_inner_state(
    channel: Channel,
    optimizers: Sequence[Any],
    states: Mapping[int, Sequence[OptimizerState]],
    least: int = 2,
    only: Collection[Any] | None = None,
) -> int:
    """Averages, in place, the floating tensors with ``least`` elements or more; returns bytes sent per worker.

    Args:
        channel: reaches the workers of other processes.
        optimizers: the live optimizers, for the order of their parameters.
        states: for each participant hosted here, the state of each optimizer. An entry that some workers lack (of a
            parameter that never had a gradient there) is averaged over the workers that have the entry.
        least: elements that a tensor must have; 2 leaves step counters alone.
        only: the parameters whose state is averaged; None: all.
    """
    entries = {w: _averageable(optimizers, state, least, only) for w, state in states.items()}
    local = {w: {name: (t.shape, t.dtype) for name, t in found.items()} for w, found in entries.items()}
    # A mean is a collective over all processes. Processes whose workers have different entries would wait for each
    # other in different means, so all processes first learn which workers have which entries.
    gathered = channel.world.gather_all("a mean of inner optimizer states", local)
    shapes = {w: found for process in gathered for w, found in process.items()}
    holders: dict[str, list[int]] = {}
    for w in sorted(shapes):
        for name in shapes[w]:
            holders.setdefault(name, []).append(w)
    device = channel.world.device
    sent = 0
    for group in dict.fromkeys(map(tuple, holders.values())):
        names = [n for n, workers in holders.items() if tuple(workers) == group]
        first = {n: shapes[group[0]][n] for n in names}
        like = {n: torch.empty(shape, dtype=dtype, device=device) for n, (shape, dtype) in first.items()}
        means = channel.mean(names, entries.__getitem__, group, like=like)
        for w in [w for w in group if w in entries]:
            for n in names:
                entries[w][n].copy_(means[n])
        sent += sum(t.nbytes for t in like.values())
    return sent


def _averageable(
    optimizers: Sequence[Any], states: Sequence[OptimizerState], least: int, only: Collection[Any] | None
) -> dict[str, Tensor]:
    """Key → tensor; the key has the positions of optimizer and parameter, and so is the same on all processes."""
    found: dict[str, Tensor] = {}
    for o, (optimizer, state) in enumerate(zip(optimizers, states, strict=True)):
        for position, parameter in enumerate(parameters_of(optimizer)):
            values = state.get(parameter) if only is None or parameter in only else None
            for key, value in values.items() if isinstance(values, dict) else ():
                if isinstance(value, Tensor) and value.numel() >= least and is_floating(value):
                    found[f"{o}/{position}/{key}"] = value
    return found


def _position(objects: Sequence[Any], wanted: Any) -> int | None:
    return next((i for i, o in enumerate(objects) if o is wanted), None)


def _differ(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) != len(b) or any(x is not y for x, y in zip(a, b, strict=True))


def _has_modes(optimizer: Any) -> bool:
    """Whether the optimizer switches between training and evaluation weights, like schedule-free ones."""
    return callable(getattr(optimizer, "eval", None)) and callable(getattr(optimizer, "train", None))


def _same_value(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or bitwise_equal(a, b)
    return a is b or (type(a) is type(b) and bool(a == b))
