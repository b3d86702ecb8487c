"""The report of an arrival: what a callback and the loggers learn of an outer step. Imports nothing of Lightning."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class LayerReport:
    """The numbers of an :class:`OuterStepReport` for a part of the tensors that were sent.

    Attributes:
        pseudo_gradient_norm: as there, and so are ``cosine``, ``norms``, ``cosines_with_mean``, ``norm_ratio``,
            ``update_norm``, ``outer_norm`` and ``momentum_cosine``.
        drift: mean over the participants of ‖Δ_i‖ / ‖θ‖, with Δ_i as decoded by the receiver and θ before the step.
    """

    pseudo_gradient_norm: float | None
    drift: float | None
    cosine: float | None
    norms: tuple[float, ...]
    cosines_with_mean: tuple[float, ...]
    norm_ratio: float | None
    update_norm: float | None
    outer_norm: float | None
    momentum_cosine: float | None


@dataclass(frozen=True)
class OuterStepReport:
    """A transfer that has arrived, in numbers.

    Attributes:
        step: local steps done when it arrived, from 1.
        outer_step: arrivals so far, from 1.
        kind: "round"; "flush" at the end of training.
        pseudo_gradient_norm: ‖Δ‖₂ of the mean that arrived, over the tensors that were sent (of several groups of
            workers: the mean of their norms); None without ``diagnostics``.
        drift: per worker ‖θ_i − θ‖₂ / ‖θ‖₂ over these tensors when it was sent, with θ as it was before the outer step
            (the bare distance where ‖θ‖ = 0; NaN for a worker whose values were not finite, None for one that was not
            there); empty for other kinds of tensors than weights and Δ, and without ``diagnostics``.
        cosine: mean over pairs of workers of the cosine between what they sent, as decoded by the receiver (zeros count
            as orthogonal to all); None with fewer than two participants, and without ``diagnostics``. See
            ``cosine_weighted``.
        payload_bytes: bytes that each worker sent, in one direction, off the packed payload: the transfer, and the
            buffers and inner states that were synchronised along with it; 0 of a single worker, who has nobody to
            send to. What that means on the wire: :meth:`~lightning_diloco.comm.ledger.Ledger.wire_bytes`.
        participants: global ids of the workers in the mean.
        seconds: wall-clock time of sending and taking in.
        sent_step: local steps done when it was sent; ``step`` unless the algorithm delays transfers.
        tag: the algorithm's word for the transfer ("fragment 0", …), or None.
        names: number of tensors that were sent.
        cosine_weighted: whether ``cosine`` weights the pairs by their norms, ‖Δ_i‖·‖Δ_j‖. So it is for an uncoded
            transfer with ``reduction="all_reduce"`` over several processes, where nobody sees two workers' messages:
            it is then (n² ‖Δ‖² − Σ ‖Δ_i‖²) / Σ_{i≠j} ‖Δ_i‖ ‖Δ_j‖, the plain mean if all norms are equal. (In a
            weighted mean w_i ‖Δ_i‖ takes the place of ‖Δ_i‖, and Σ w_i that of n.)
        norms: ‖Δ_i‖ of each participant, as decoded by the receiver.
        cosines_with_mean: cosine of each participant's Δ_i with Δ.
        cosine_matrix: pairwise cosines of the participants; None with ``cosine_weighted``, and for several groups.
        norm_ratio: mean of the norms over the norm of the mean, Σ w_i ‖Δ_i‖ / (Σ w_i · ‖Δ‖) ≥ 1: 1 if all workers moved
            the same way, √n if at right angles; None for ‖Δ‖ = 0.
        update_norm: ‖θ_new − θ_old‖ over these tensors in this local step; None where others see the mean of the
            replicas instead of θ (``published = "average"``), and in the plain run.
        outer_norm: ‖θ‖ over these tensors after the step; None as ``update_norm``.
        momentum_cosine: cosine of Δ with the outer optimizer's momentum before the step (``momentum_buffer`` or
            ``exp_avg``, over the tensors that have one); None without.
        outer_lr: learning rate of the outer optimizer's first group in this step; None without one.
        layers: the same numbers by layer. A layer is what shares the module path up to its first number (``net.0``,
            ``blocks.3``), or without a number the path of the parameter's module; with more than 20 layers, runs of
            successive layers.
        samples: samples that all workers have trained on so far; None if a batch doesn't show how many it has.
        train_losses: per worker, its mean training loss since the last report; None for a worker that had none (its
            ``training_step`` returned no scalar), empty where nobody notes losses.
        inner_seconds: wall-clock seconds of this process in the workers' turns since the last report (reports of the
            same step share them), without waiting; None if unknown.
        waiting_seconds: seconds that this process has spent in collectives since then; see ``strategy.times``.
        simulated_seconds: how long the run has taken so far on the cluster; None without one, as all that follows.
        compute_utilisation: the fraction of their time that the cluster's workers have computed so far.
        alive: how many of the workers that were to send were there when the transfer was sent.
        participating: how many of them took part; those whose part is in the mean are ``participants``.
        lost_steps: local steps that have not reached the others so far, since a worker left or a transfer failed; of
            all workers.
        join_bytes: bytes that joining workers have received so far.
    """

    step: int
    outer_step: int
    kind: str
    pseudo_gradient_norm: float | None
    drift: tuple[float | None, ...]
    cosine: float | None
    payload_bytes: int
    participants: tuple[int, ...]
    seconds: float
    sent_step: int = 0
    tag: str | None = None
    names: int = 0
    cosine_weighted: bool = False
    norms: tuple[float, ...] = ()
    cosines_with_mean: tuple[float, ...] = ()
    cosine_matrix: tuple[tuple[float, ...], ...] | None = None
    norm_ratio: float | None = None
    update_norm: float | None = None
    outer_norm: float | None = None
    momentum_cosine: float | None = None
    outer_lr: float | None = None
    layers: Mapping[str, LayerReport] = field(default_factory=dict, hash=False)
    samples: int | None = None
    train_losses: tuple[float | None, ...] = ()
    inner_seconds: float | None = None
    waiting_seconds: float | None = None
    simulated_seconds: float | None = None
    compute_utilisation: float | None = None
    alive: int | None = None
    participating: int | None = None
    lost_steps: int | None = None
    join_bytes: int | None = None
