"""Workers that leave and join between local steps, by the availability of the simulated cluster.

Owns what a joiner starts from, and how it gets there from another process. Does not own who joins when
(``cluster/schedule.py``). Imports nothing of Lightning.

A worker that joins before local step t::

    θ_i, anchor     θ; for algorithms that never move θ (``published = "average"``) the donor's weights
    buffers         θ's
    inner state     fresh, the donor's, or its own as it left: with the learning rate of as many local steps
    scaler          the donor's
    slots, codecs   zero: errors and earlier Δ_i belong to a way that it has not gone
    random stream   its own

A worker that leaves keeps what it has, for the case that it comes back with its own state; nobody looks at it until
then. Batches of an absent worker are read and not used: its shard goes on.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_diloco.algorithms.base import SyncAlgorithm
from lightning_diloco.algorithms.context import SyncContext
from lightning_diloco.cluster.availability import Availability
from lightning_diloco.comm.tensors import copied
from lightning_diloco.engine.checkpoint import pack_inner, unpack_inner
from lightning_diloco.state.replicas import copy_buffers, put_buffer


class Membership:
    """The workers that are there.

    Args:
        context: the run's.
        algorithm: says which weights others see.
    """

    def __init__(self, context: SyncContext, algorithm: SyncAlgorithm) -> None:
        self._context, self._algorithm = context, algorithm
        self.follow()

    def follow(self) -> None:
        """Those are there who take the step for which joins and leaves are done; the first, before a run."""
        machines = self._context.machines
        self._context.channel.workers = machines.alive(max(1, machines.entered))

    @torch.no_grad()
    def enter(self, step: int) -> None:
        """Workers leave and join before local step ``step``; once, however often it is called. Collective."""
        ctx, machines = self._context, self._context.machines
        schedule = machines.schedule
        if schedule is None or machines.entered >= step:
            return
        machines.tally.left(schedule.leaves(step))
        joiners = schedule.joins(step)
        donors = {w: schedule.donor(step, w) for w in joiners}
        if joiners:
            machines.settle(ctx.channel.world.gather_all)
            ctx.inner.adopt_outside_changes()
            states = self._states_of(set(donors.values()), f"workers that join before local step {step}")
            weights = {donor: self._weights(donor) for donor in dict.fromkeys(donors.values())}
            for w, donor in donors.items():
                choice = schedule.joiners_state(step, w)
                if w in ctx.channel.world.workers:
                    self._start(w, choice, weights[donor], states[donor])
                self._count(w, donor, choice)
                self._tell(step, w, donor, states[donor]["bytes"], schedule.returns(step, w), schedule.availability)
            ctx.inner.activate_first()
        machines.entered = step
        self.follow()

    # ---------------------------------------------------------------------------------------- what a joiner gets

    def _states_of(self, donors: set[int], where: str) -> dict[int, dict[str, Any]]:
        """The inner states of donors, on every process."""
        ctx = self._context
        world, live = ctx.channel.world, ctx.inner.live
        here = {}
        for d in donors.intersection(world.workers) if world.member == 0 else ():
            worker = ctx.inner.workers[d]
            here[d] = {
                "inner": [pack_inner(o, s) for o, s in zip(live, worker.states, strict=True)],
                "control": copied(worker.control, plain=True),
                "scaler": None if worker.scaler is None else copied(worker.scaler.state_dict(), plain=True),
                "bytes": worker.nbytes()[0],
            }
        if world.size > 1:
            here = copied(here, torch.device("cpu"))
        return {d: state for of_process in world.gather_all(where, here) for d, state in of_process.items()}

    def _weights(self, donor: int) -> Mapping[str, Tensor]:
        ctx = self._context
        if self._algorithm.published == "outer":
            return ctx.outer.tensors
        return ctx.channel.copies_of(donor, ctx.parameters, ctx.replicas.tensors, like=ctx.outer.tensors)

    def _start(self, w: int, choice: str, weights: Mapping[str, Tensor], donor: Mapping[str, Any]) -> None:
        ctx = self._context
        replica, worker = ctx.replicas.states[w], ctx.inner.workers[w]
        for n, t in replica.tensors.items():
            if n in ctx.names or not ctx.sender.policies.share_frozen:
                t.copy_(weights[n])
        for mine, theirs in zip(replica.buffers, copy_buffers(ctx.outer.state.buffers), strict=True):
            for name, value in theirs.items():
                put_buffer(mine, name, value)
        if choice == "fresh":
            ctx.inner.start_anew(w)
        elif choice == "donor":
            for optimizer, state, saved in zip(ctx.inner.live, worker.states, donor["inner"], strict=True):
                unpack_inner(optimizer, state, saved)
            worker.control = copied(donor["control"])
        if worker.scaler is not None and donor["scaler"] is not None:
            worker.scaler.load_state_dict(copy.deepcopy(donor["scaler"]))
        worker.gradients = {}
        ctx.memory.forget(w)

    # ---------------------------------------------------------------------------------------- who must know

    def _count(self, w: int, donor: int, choice: str) -> None:
        own = self._context.inner.own_steps
        assert own is not None
        if choice == "fresh":
            own.restart(w)
        elif choice == "donor":
            own.follow(w, donor)

    def _tell(
        self, step: int, w: int, donor: int, inner_bytes: int, returning: bool, availability: Availability
    ) -> None:
        ctx, machines = self._context, self._context.machines
        theta = ctx.outer.tensors
        weights = sum(t.nbytes for t in theta.values())
        moved = availability.join_bytes(
            weights=weights,
            inner_state=inner_bytes,
            anchor=sum(theta[n].nbytes for n in ctx.names),
            outer_state=ctx.outer.state_bytes(),
            returning=returning,
        )
        machines.join(w, donor, moved, weights + inner_bytes, step)


def check_availability(availability: Availability, algorithm: str, averages_gradients: bool) -> None:
    """Whether an algorithm can go on when workers come and go.

    Raises:
        ValueError: the workers of data parallelism would part.
    """
    if not averages_gradients:
        return
    a = availability
    refused: Sequence[tuple[bool, str]] = (
        (a.joiner != "donor" or a.keep_state, "use `joiner='donor'` without `keep_state`"),
        (a.on_failure == "rollback", "use `on_failure='survivors'`"),
        (bool(a.partition_rate or a.of_kind("partition")), "leave partitions out"),
    )
    ways = [way for wrong, way in refused if wrong]
    if ways:
        raise ValueError(
            f"{algorithm} averages gradients, and its workers must hold the same weights and inner states in every"
            f" step, which the cluster's availability (={a!r}) doesn't keep: {'; '.join(ways)}."
        )
