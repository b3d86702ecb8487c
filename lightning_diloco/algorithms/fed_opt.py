"""FedOpt's server optimizers: FedAdam, FedYogi, FedAdagrad (Reddi et al., arXiv 2003.00295, Algorithm 2).

As outer optimizers, without bias correction; g is Δ, old minus new, where the paper has new minus old and adds::

    m ← β₁·m + (1 − β₁)·g                                          m starts at 0
    v ← v + g²                               FedAdagrad            v starts at τ²
    v ← v − (1 − β₂)·g²·sign(v − g²)         FedYogi
    v ← β₂·v + (1 − β₂)·g²                   FedAdam
    θ ← θ − η·m / (√v + τ)

The paper's defaults: β₁ = 0.9 (0 for FedAdagrad), β₂ = 0.99, τ = 1e-3; η is tuned.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override


class _ServerOptimizer(Optimizer):
    """m and v, and the step; a subclass has the rule for v."""

    def __init__(self, params: Iterable[Any], lr: float, betas: tuple[float, float], tau: float) -> None:
        name = type(self).__name__
        for argument, value, fine, rule in (
            ("lr", lr, lr >= 0, "be ≥ 0"),
            ("betas", betas, all(0 <= beta < 1 for beta in betas), "lie in [0, 1)"),
            ("tau", tau, tau > 0, "be > 0: v starts at tau²"),
        ):
            if not fine:
                raise ValueError(f"{name}: `{argument}` (={value!r}) must {rule}.")
        super().__init__(params, {"lr": lr, "betas": betas, "tau": tau})

    def _second(self, v: Tensor, square: Tensor, beta: float) -> None:
        """Moves v, given g²."""
        raise NotImplementedError

    @override
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """A step on the present gradients; parameters without one rest."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            (beta, beta_2), tau = group["betas"], group["tau"]
            for p in [p for p in group["params"] if p.grad is not None]:
                state = self.state[p]
                if not state:
                    state["exp_avg"] = torch.zeros_like(p)
                    state["exp_avg_sq"] = torch.full_like(p, tau * tau)
                m, v = state["exp_avg"], state["exp_avg_sq"]
                m.mul_(beta).add_(p.grad, alpha=1 - beta)
                self._second(v, p.grad.square(), beta_2)
                p.addcdiv_(m, v.sqrt().add_(tau), value=-group["lr"])
        return loss


class FedAdam(_ServerOptimizer):
    """FedOpt's Adam, for ``DilocoStrategy(outer_optimizer_cls=FedAdam, outer_optimizer_kwargs={"lr": 0.01})``.

    Args:
        params: parameters, or groups of them.
        lr: η ≥ 0.
        betas: β₁ and β₂ in [0, 1).
        tau: τ > 0, the degree of adaptivity.

    Raises:
        ValueError: an argument is out of its range.

    When: pseudo-gradients of very different size from tensor to tensor.
    Cost: two more models, once.
    Proof: ``test_variants.py``, ``test_fed_opt.py``; it isn't torch's Adam, which corrects the bias and starts v at 0.
    """

    def __init__(
        self, params: Iterable[Any], lr: float, betas: tuple[float, float] = (0.9, 0.99), tau: float = 1e-3
    ) -> None:
        super().__init__(params, lr, betas, tau)

    @override
    def _second(self, v: Tensor, square: Tensor, beta: float) -> None:
        v.mul_(beta).add_(square, alpha=1 - beta)


class FedYogi(_ServerOptimizer):
    """FedOpt's Yogi: v grows at most by (1 − β₂)·g² in a step, also where g² is much larger than v.

    Args:
        params: parameters, or groups of them.
        lr: η ≥ 0.
        betas: β₁ and β₂ in [0, 1).
        tau: τ > 0, the degree of adaptivity.

    Raises:
        ValueError: an argument is out of its range.

    When: as FedAdam, if Δ is sparse or jumps; the paper finds it the most robust of the three.
    Cost: two more models, once.
    Proof: ``test_variants.py``, ``test_fed_opt.py``.
    """

    def __init__(
        self, params: Iterable[Any], lr: float, betas: tuple[float, float] = (0.9, 0.99), tau: float = 1e-3
    ) -> None:
        super().__init__(params, lr, betas, tau)

    @override
    def _second(self, v: Tensor, square: Tensor, beta: float) -> None:
        v.sub_(square * (v - square).sign(), alpha=1 - beta)


class FedAdagrad(_ServerOptimizer):
    """FedOpt's Adagrad: v only grows, so that steps become shorter and shorter.

    Args:
        params: parameters, or groups of them.
        lr: η ≥ 0.
        beta: β₁ in [0, 1).
        tau: τ > 0, the degree of adaptivity.

    Raises:
        ValueError: an argument is out of its range.

    When: sparse features; convex problems.
    Cost: two more models, once.
    Proof: ``test_variants.py``, ``test_fed_opt.py``.
    """

    def __init__(self, params: Iterable[Any], lr: float, beta: float = 0.0, tau: float = 1e-3) -> None:
        super().__init__(params, lr, (beta, 0.0), tau)

    @override
    def _second(self, v: Tensor, square: Tensor, beta: float) -> None:
        v.add_(square)
