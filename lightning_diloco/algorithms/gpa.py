"""GPA: generalised primal averaging (arXiv 2512.17131): DiLoCo's outer momentum for a single worker, in every step.

The gradient is taken at y, the inner optimizer moves z, and x, the average, is the model::

    d = InnerOpt(y, ∇(y)) − y            the step that the inner optimizer takes from y
    z ← z + d
    x ← μ_x·x + (1 − μ_x)·z
    y ← μ_y·x + (1 − μ_y)·z

With μ_x = 0.9^(1/H) the average forgets as fast as DiLoCo's outer momentum 0.9 with rounds of H steps. Published:
μ_y = 0.7, μ_x = 0.9967, which is 0.9^(1/32). The replica holds y, and θ is x.

Owned here: ``slot(0, "z - x")``, from which x = y − (1 − μ_y)(z − x): zero means x = y = z, as at the start.
"""

from typing import ClassVar, Literal

from typing_extensions import override

from lightning_diloco.algorithms.base import SyncAlgorithm


class GPA(SyncAlgorithm):
    """A single worker whose model is an average of its steps.

    There is nothing to send, and ``diloco_interval`` has no part in it. Validations and files must see θ, which is x:
    ``DilocoStrategy(1, eval_weights="outer", algorithm=GPA())``. Weight decay of the inner optimizer acts at y.

    Args:
        mu_x: μ_x in [0, 1): how much of the average stays in a step.
        mu_y: μ_y in [0, 1]: how far from z to x the gradient is taken.

    Raises:
        ValueError: an argument is out of its range; when training starts: more than one worker, or another
            ``eval_weights`` than "outer".

    When: one machine; what DiLoCo with N = 1 gains, without its rounds.
    Cost: no bytes; two more models, y's anchor and z − x.
    Proof: ``test_variants.py``, ``test_gpa.py``; μ_x = μ_y = μ is DiLoCo with H = 1 and Nesterov
    SGD(lr = 1 − μ, momentum = μ).
    """

    anchors: ClassVar[Literal["shared", "own"]] = "own"

    def __init__(self, mu_x: float = 0.9967, mu_y: float = 0.7) -> None:
        if isinstance(mu_x, bool) or not isinstance(mu_x, int | float) or not 0 <= mu_x < 1:
            raise ValueError(f"GPA: `mu_x` (={mu_x!r}) must be a number from 0 to below 1. Published: 0.9967.")
        if isinstance(mu_y, bool) or not isinstance(mu_y, int | float) or not 0 <= mu_y <= 1:
            raise ValueError(f"GPA: `mu_y` (={mu_y!r}) must be a number from 0 to 1. Published: 0.7.")
        self.mu_x, self.mu_y = mu_x, mu_y

    @override
    def setup(self) -> None:
        if self.ctx.num_workers != 1:
            raise ValueError(
                f"GPA trains a single worker, but `num_nodes` is {self.ctx.num_workers}. Use `num_nodes=1`, or Diloco."
            )
        shown = self.ctx.sender.policies.eval_weights
        if shown != "outer":
            raise ValueError(
                f"`eval_weights` (={shown!r}) would show where GPA takes gradients, not the average that it trains."
                " Use `eval_weights='outer'`."
            )

    @override
    def after_inner_step(self, step: int) -> None:
        ctx = self.ctx
        y, delta, apart = ctx.anchor(0), ctx.delta(0), ctx.slot(0, "z - x")
        moved, average = {}, {}
        for n in ctx.names:
            x = y[n] - (1 - self.mu_y) * apart[n]
            z = x + apart[n] - delta[n]
            average[n] = self.mu_x * x + (1 - self.mu_x) * z
            moved[n] = self.mu_y * average[n] + (1 - self.mu_y) * z
            apart[n].copy_(z - average[n])
        ctx.outer.assign(average)
        ctx.merge([0], ctx.names, moved)

    @override
    def flush(self, step: int) -> None:
        """Nothing is ever outstanding."""
