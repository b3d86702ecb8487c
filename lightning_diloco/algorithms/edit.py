"""EDiT's protections (Cheng et al., arXiv 2412.07210), and restarts of the outer momentum (arXiv 2605.28585).

Around any averaging algorithm, in this order, each only if asked for::

    t ≤ R_w·H                        data parallelism; rounds of the algorithm follow
    of Δ_i, tensor by tensor         z = (‖Δ_i‖ − μ)/σ over the worker's earlier norms;  Δ_i ← 0 where z > threshold
    weights of the mean              w_i = softmax(−‖Δ_i‖/T) over the workers
    of the mean                      Δ ← Δ · min(1, max_norm/‖Δ‖)
    after every R-th round           the outer optimizer's momentum ← 0

μ and σ² are moving averages, μ ← (1−a)·μ + a·‖Δ_i‖ and σ² ← (1−a)·(σ² + a·(‖Δ_i‖ − μ_old)²), of norms that were not
outliers; the first norm is μ. EDiT's values: max_norm 10, threshold 3, a = 0.02, filter_warmup 120.

Owned here: ``slot(i, "norms: …")``: μ, σ² and the number of norms, per tensor.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor
from typing_extensions import override

from lightning_diloco.algorithms.around import Around
from lightning_diloco.algorithms.base import SyncAlgorithm
from lightning_diloco.algorithms.data_parallel import average_gradients
from lightning_diloco.algorithms.order import Order
from lightning_diloco.algorithms.transfer import Transfer
from lightning_diloco.comm.statistics import euclidean_norm


class Edit(Around):
    """An averaging algorithm with protections: ``Edit(Diloco(), max_norm=10.0, temperature=1.0)``.

    They act on transfers of Δ ("delta"); norms are over the tensors of a transfer, a fragment for example. Reports have
    the norm of the mean before it is clipped.

    Args:
        algorithm: what is protected; see :class:`~lightning_diloco.algorithms.Around`.
        warmup_rounds: R_w ≥ 0, rounds of data parallelism at the start of training.
        max_norm: largest norm > 0 of the mean Δ; None: any.
        temperature: T > 0, in the units of ‖Δ_i‖; smaller ones trust only the workers that moved least; None: equal
            weights, or those of the strategy.
        threshold: z > 0 from which a tensor's Δ_i counts as 0; None: no filter.
        decay: a in (0, 1), the weight of the latest norm.
        filter_warmup: norms of a tensor that are only noted, ≥ 2, before the filter acts.
        restart_every: R ≥ 1, rounds, those of the warm-up included, after which momentum starts anew; None: never.

    Raises:
        ValueError: an argument is out of its range, or is for Δ, which the algorithm doesn't send; when training
            starts: ``restart_every`` of an algorithm without outer optimizer; when sending: ``temperature`` together
            with the strategy's ``weights="samples"``.

    When: data or machines of very different quality; learning rates that are too high for DiLoCo alone.
    Cost: two passes over Δ_i for the norms; three numbers per tensor and worker.
    Proof: ``test_edit.py``; without arguments it is the algorithm itself, bit for bit.
    """

    def __init__(
        self,
        algorithm: SyncAlgorithm,
        warmup_rounds: int = 0,
        max_norm: float | None = None,
        temperature: float | None = None,
        threshold: float | None = None,
        decay: float = 0.02,
        filter_warmup: int = 120,
        restart_every: int | None = None,
    ) -> None:
        super().__init__(algorithm)
        for name, count, least in (
            ("warmup_rounds", warmup_rounds, 0),
            ("filter_warmup", filter_warmup, 2),
            ("restart_every", 1 if restart_every is None else restart_every, 1),
        ):
            if isinstance(count, bool) or not isinstance(count, int) or count < least:
                raise ValueError(f"Edit: `{name}` (={count!r}) must be an integer ≥ {least}.")
        for name, value, most in (
            ("max_norm", max_norm, math.inf),
            ("temperature", temperature, math.inf),
            ("threshold", threshold, math.inf),
            ("decay", decay, 1.0),
        ):
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (number and 0 < value < most):
                rule = "a number > 0" if most == math.inf else "a number between 0 and 1"
                raise ValueError(f"Edit: `{name}` (={value!r}) must be {rule}.")
        if self.sends != "delta" and (max_norm, temperature, threshold) != (None, None, None):
            inside = type(algorithm).__name__
            raise ValueError(
                f"Edit: `max_norm`, `temperature` and `threshold` act on Δ, but `algorithm` (={inside}) sends"
                f" {self.sends}. Leave them out."
            )
        self.warmup_rounds, self.max_norm, self.temperature = warmup_rounds, max_norm, temperature
        self.threshold, self.decay, self.filter_warmup = threshold, decay, filter_warmup
        self.restart_every = restart_every

    @override
    def setup(self) -> None:
        super().setup()
        if self.restart_every is not None and self.outer_defaults is None:
            raise ValueError(
                f"Edit: `restart_every` (={self.restart_every}) has no effect, since {type(self.algorithm).__name__}"
                " has no outer optimizer. Leave it out."
            )

    # ---------------------------------------------------------------------------------------- steps

    @property
    @override
    def looks_at_gradients(self) -> bool:
        return self.warmup_rounds > 0 or super().looks_at_gradients

    def _warms_up(self, step: int) -> bool:
        return step <= self.warmup_rounds * self.ctx.interval

    @override
    def needs_gradients(self, step: int) -> bool:
        return self._warms_up(step) or super().needs_gradients(step)

    @override
    def before_inner_step(self, step: int) -> None:
        if self._warms_up(step):
            average_gradients(self)
        else:
            super().before_inner_step(step)

    @override
    def after_inner_step(self, step: int) -> None:
        ctx = self.ctx
        if self._warms_up(step):
            ctx.outer.assign(ctx.common_weights())
            return
        super().after_inner_step(step)
        rounds = (step - ctx.origin) // ctx.interval
        if self.restart_every and ctx.due(step) and not ctx.flushing and rounds % self.restart_every == 0:
            ctx.outer.restart_momentum()

    @override
    def flush(self, step: int) -> None:
        if not self._warms_up(step):
            super().flush(step)

    # ---------------------------------------------------------------------------------------- what is sent

    @override
    def revise(self, order: Order) -> Order:
        if order.what != "delta" or (self.threshold is None and self.temperature is None):
            return order
        outliers = {w: self._outliers(order, w) for w in self.ctx.local_workers} if self.threshold else {}
        filtered = replace(order, read=lambda w: _Without(order.read(w), outliers.get(w, set())), assigns=False)
        if self.temperature is None:
            return filtered
        if self.ctx.channel.weights is not None:
            raise ValueError(
                f"Edit: `temperature` (={self.temperature}) weights workers by their norms, the strategy's `weights` by"
                " their samples. Use one of them."
            )
        here = {w: euclidean_norm(filtered.read(w), order.names) for w in self.ctx.local_workers}
        norms = {w: norm for w, norm in self.ctx.numbers("the norms", here).items() if math.isfinite(norm)}
        least = min(norms.values(), default=0.0)
        weights = {w: math.exp((least - norm) / self.temperature) for w, norm in norms.items()}
        # one that isn't finite is sent all the same, for the check that says so
        return replace(filtered, weights={w: weights.get(w, 1.0) for w in self.ctx.workers})

    @override
    def amend(self, order: Order, transfer: Transfer) -> None:
        if order.what != "delta" or self.max_norm is None:
            return
        for i, mean in enumerate(transfer.means):
            norm = euclidean_norm(mean, order.names)
            if norm > self.max_norm:
                transfer.means[i] = {n: mean[n] * (self.max_norm / norm) for n in order.names}

    def _outliers(self, order: Order, worker: int) -> set[str]:
        """The tensors whose Δ_i is far larger than before; notes the norms of the others."""
        assert self.threshold is not None
        ctx, delta, found = self.ctx, order.read(worker), set()
        mean, variance, count = (ctx.slot(worker, f"norms: {what}", like={}) for what in ("mean", "variance", "count"))
        for n in order.names:
            norm = torch.linalg.vector_norm(delta[n], dtype=torch.float64).cpu()
            if not norm.isfinite():
                continue  # the check of what is sent says so
            known = count.get(n, torch.zeros(())).item()
            if not known:
                mean[n], variance[n], count[n] = norm, torch.zeros_like(norm), torch.ones_like(norm)
                continue
            gap, sigma = (norm - mean[n].cpu()).item(), math.sqrt(variance[n].item())
            if known >= self.filter_warmup and gap > self.threshold * sigma > 0:
                found.add(n)
                continue
            variance[n].add_(self.decay * gap**2).mul_(1 - self.decay)
            mean[n].add_(self.decay * gap)
            count[n].add_(1)
        return found


class _Without(Mapping[str, Tensor]):
    """Tensors, some of which count as 0."""

    def __init__(self, tensors: Mapping[str, Tensor], left_out: set[str]) -> None:
        self._tensors, self._left_out = tensors, left_out

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        return torch.zeros_like(tensor) if name in self._left_out else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
