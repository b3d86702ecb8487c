"""The algorithm's part of a step, and what follows from it: policies, reports, the published model in the live module.

Owns the calls of the algorithm's methods, the report of every arrival, and the rule when buffers are synchronised. Does
not own turns and the count of steps (``engine.py``), nor the policies themselves (``state/policies.py``). Imports
nothing of Lightning.
"""

import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_diloco.algorithms.base import SyncAlgorithm
from lightning_diloco.algorithms.context import SyncContext
from lightning_diloco.algorithms.measuring import WHOLE
from lightning_diloco.algorithms.report import OuterStepReport
from lightning_diloco.algorithms.transfer import Transfer
from lightning_diloco.comm.tensors import bitwise_equal
from lightning_diloco.engine.telemetry import OuterStepMeter
from lightning_diloco.state.live_module import LiveModule
from lightning_diloco.state.policies import PolicyApplication
from lightning_diloco.state.replicas import is_floating


class Synchronisation:
    """Runs an algorithm.

    Args:
        context: the algorithm's context.
        algorithm: decides when workers communicate, what they send, and what each does with what arrives.
        live: the live module.
        policies: for frozen parameters, buffers and inner states.

    Attributes:
        buffers_at: local step of the last synchronisation of buffers.
    """

    def __init__(
        self, context: SyncContext, algorithm: SyncAlgorithm, live: LiveModule, policies: PolicyApplication
    ) -> None:
        self._context, self._algorithm, self._live = context, algorithm, live
        self.policies = policies
        self.buffers_at = 0
        self._meter = OuterStepMeter(context.outer) if context.sender.diagnostics else None
        self._published = context.outer.versions
        self._theta_rests = True
        self._started = 0.0

    @torch.no_grad()
    def before_inner_steps(self) -> None:
        """All backward passes of a step are done, no worker has stepped yet."""
        self._context.step = self._context.local_steps + 1
        self._tell_step()
        self._algorithm.before_inner_step(self._context.step)
        # a file of a step that an error tears now is right, unless codecs have noted what they sent
        codec = self._context.sender.codec
        self._context.sender.writing = self._context.sender.writing and codec is not None and codec.remembers

    @torch.no_grad()
    def after_inner_steps(self) -> Sequence[OuterStepReport]:
        """After the turns of a local step, which has been counted."""
        ctx = self._context
        self._begin()
        self._tell_step()
        sent_before = dict(ctx.last_sent)
        self._algorithm.after_inner_step(ctx.step)
        silent = not ctx.taken and ctx.last_sent == sent_before
        reports = self._conclude("round")
        if silent and ctx.due(ctx.step):  # nothing has told the processes of each other's signals
            ctx.channel.world.gather_signals(f"the end of a round after {ctx.step} local steps")
        if ctx.due(ctx.step):
            self.publish()
        else:  # a mean of all replicas would be dear in every step
            self.publish_theta()
        ctx.sender.writing = False
        return reports

    @torch.no_grad()
    def flush(self, moved_late: bool) -> Sequence[OuterStepReport]:
        """The algorithm's last chance to send and take in; buffers that have changed are synchronised all the same."""
        ctx = self._context
        self._begin()
        ctx.flush(self._algorithm.flush, moved_late)
        reports = self._conclude("flush")
        there = ctx.machines.attendance(ctx.step, ctx.workers).committed
        if not reports and there:
            entries, ctx.channel.part = len(ctx.ledger.entries), 1.0
            self.policies.synchronise_buffers(there)
            sent = sum(entry.payload_bytes for entry in ctx.ledger.entries[entries:])
            ctx.machines.exchange("buffers", sent, there, ctx.step)
        ctx.machines.settle(ctx.channel.world.gather_all)
        self.publish()
        ctx.sender.writing = False
        shows_theta = self._algorithm.published == "outer" and not self._live.is_plain_run
        if ctx.step and self._theta_rests and shows_theta and self._workers_left_theta():
            warnings.warn(
                f"The fit ends with the model that it began with: {type(self._algorithm).__name__} never moved θ in"
                f" {ctx.step} local steps. Did nobody take part? An algorithm that has no use for θ says"
                " `published = 'average'`.",
                stacklevel=5,
            )
        return reports

    def _tell_step(self) -> None:
        """The simulated machines learn of the local step, before anything is sent in it."""
        ctx = self._context
        if ctx.machines.clock is not None:
            ctx.machines.resize(sum(ctx.outer.tensors[n].nbytes for n in ctx.names))
            ctx.machines.step(ctx.step, [w for w in self._algorithm.active(ctx.step) if w in ctx.workers])

    def _workers_left_theta(self) -> bool:
        ctx = self._context
        theta = ctx.outer.tensors
        here = any(not bitwise_equal(ctx.weights(w)[n], theta[n]) for w in ctx.local_workers for n in ctx.names)
        return any(ctx.channel.world.gather_all(f"the end of training after {ctx.step} local steps", here))

    # ---------------------------------------------------------------------------------------- arrivals

    def _begin(self) -> None:
        ctx = self._context
        ctx.step = ctx.local_steps
        self._started, ctx.sender.seconds = time.perf_counter(), 0.0

    def _measured(self, transfer: Transfer) -> dict[str, Any]:
        """What the report says of the arrival of a transfer besides its sending; nothing without diagnostics."""
        if self._meter is None or not transfer.likeness:
            return {}
        # until θ is published, the live module's own tensors hold θ as it was before the step
        shown = self._algorithm.published == "outer" and not self._live.is_plain_run
        before = self._context.replicas.module_state.tensors if shown else None
        layers = self._meter.layers(transfer, self._context.sender.meter.layers, before)
        whole, sent = layers.pop(WHOLE), transfer.likeness[WHOLE]
        return {
            "cosine_weighted": sent["weighted"],
            "norms": whole.norms,
            "cosines_with_mean": whole.cosines_with_mean,
            "cosine_matrix": None if sent["matrix"] is None else tuple(map(tuple, sent["matrix"])),
            "norm_ratio": whole.norm_ratio,
            "update_norm": whole.update_norm,
            "outer_norm": whole.outer_norm,
            "momentum_cosine": whole.momentum_cosine,
            "outer_lr": _lr(self._context.outer.optimizer),
            "layers": layers,
        }

    def _conclude(self, kind: str) -> list[OuterStepReport]:
        ctx = self._context
        overdue = [t for t in ctx.waiting if t.due <= ctx.step]
        if overdue:
            raise RuntimeError(
                f"{type(self._algorithm).__name__} took no notice of a transfer that arrived in local step {ctx.step}"
                f" (sent in step {overdue[0].sent}, tag {overdue[0].tag!r}). Ask for it in `after_inner_step`:"
                " `for transfer in ctx.arrived(): ...`."
            )
        reports = []
        taking_in = time.perf_counter() - self._started - ctx.sender.seconds
        for i, transfer in enumerate(ctx.taken):
            began, entries = time.perf_counter(), len(ctx.ledger.entries)
            self._apply_policies(transfer, at_the_end=kind == "flush" and i == 0)
            beside = sum(entry.payload_bytes for entry in ctx.ledger.entries[entries:])
            ctx.machines.exchange(f"beside {i}", beside, self._there(transfer.senders), ctx.step)
            ctx.outer_steps += 1
            measured = self._measured(transfer)
            reports.append(
                OuterStepReport(
                    step=ctx.step,
                    outer_step=ctx.outer_steps,
                    kind=kind,
                    pseudo_gradient_norm=transfer.norm,
                    drift=transfer.drift,
                    cosine=transfer.cosine,
                    payload_bytes=transfer.nbytes + beside,
                    participants=tuple(transfer.senders),
                    seconds=transfer.seconds + taking_in / len(ctx.taken) + time.perf_counter() - began,
                    sent_step=transfer.sent,
                    tag=transfer.tag,
                    names=len(transfer.names),
                    **measured,
                    **ctx.machines.readings(transfer),
                )
            )
        if ctx.alone:
            self._restart(ctx.alone)
        ctx.taken, ctx.merged, ctx.alone = [], set(), []
        if self._meter is not None:
            self._meter.forget()  # Δ, whose memory the workers' next turns can use
        return reports

    def _apply_policies(self, transfer: Transfer, at_the_end: bool) -> None:
        """Policies apply to the workers and parameters of a transfer; buffers go along with one transfer per round.

        Where workers don't step together every transfer takes them along: θ's become those of all workers by the
        policy, and the senders take these over.
        """
        ctx, apart = self._context, self._algorithm.chooses_workers
        senders, rejected = self._there(transfer.senders), self._there(transfer.rejected)
        ctx.channel.part = len(senders) / len(ctx.workers) if ctx.machines.paced else 1.0
        if senders and (at_the_end or rejected or apart or ctx.step - self.buffers_at >= ctx.interval):
            self.buffers_at = ctx.step
            # before any collective of the policies: all processes must choose the same tensors for it
            survey = self.policies.survey(f"the synchronisation of buffers after {ctx.step} local steps")
            givers = [w for w in ctx.workers if w not in rejected] if apart else senders
            self.policies.synchronise_frozen(givers, survey, rejected, senders)
            self.policies.synchronise_buffers(givers, survey, rejected, senders)
        merged = ctx.merged.intersection(transfer.names)
        ctx.merged -= merged  # each parameter once per step, whatever else was sent under its name
        if merged:
            names = None if ctx.names and merged >= set(ctx.names) else [n for n in transfer.names if n in merged]
            self.policies.synchronise_inner_state(senders, (), names)
        if rejected and transfer.what != "gradients" and not transfer.renewed:
            self._restart(rejected)

    def _there(self, workers: Sequence[int]) -> list[int]:
        """Without those that have left since they sent."""
        return [w for w in workers if w in self._context.workers]

    def _restart(self, workers: Sequence[int]) -> None:
        """Workers whose values were not finite: what is left of them would spoil the rest at the next step."""
        ctx = self._context
        if self._algorithm.published == "outer":
            ctx.merge(workers, ctx.names, ctx.outer.tensors)
            ctx.merged.clear()
        self.policies.synchronise_inner_state((), workers, None)

    # ---------------------------------------------------------------------------------------- what others see

    def published(self) -> Mapping[str, Tensor]:
        """Parameter name → tensor of the model that others see. All processes call it together.

        For algorithms that publish the mean of the replicas, frozen parameters are θ's.
        """
        ctx = self._context
        if self._algorithm.published == "outer":
            return ctx.outer.tensors
        theta = ctx.outer.tensors
        names = [n for n in ctx.names if is_floating(theta[n])]
        mean = ctx.channel.mean(names, ctx.replicas.tensors)
        return {**theta, **{n: t.to(theta[n].dtype) for n, t in mean.items()}}

    def publish(self) -> None:
        """Puts the published model into the live module; all processes call it together."""
        if self._algorithm.published == "outer":
            self.publish_theta()
        elif not self._live.is_plain_run:
            self._live.publish(self.published())
            self._published = self._context.outer.versions

    def publish_theta(self) -> None:
        """Puts what has changed of θ into the live module, whoever has changed it."""
        versions = self._context.outer.versions
        if self._algorithm.published == "outer" and versions != self._published:
            self._theta_rests = False
            theta = self._context.outer.tensors
            self._live.publish({n: theta[n] for n, version in versions.items() if version != self._published.get(n)})
        self._published = versions


def _lr(optimizer: Optimizer) -> float | None:
    lr = optimizer.param_groups[0].get("lr")
    return None if lr is None else float(lr)
