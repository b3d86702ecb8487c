"""NoLoCo: no all-reduce at all; random pairs of workers gossip (Kolehmainen et al., arXiv 2506.10911).

Every H completed local steps, in random groups g of n workers (the paper: pairs), with slow weights φ_i::

    Δ_i = φ_i − θ_i
    δ_i ← μ·δ_i − η·mean_g(Δ) + γ·(mean_g(φ) − φ_i)        the paper's Δ is new minus old, hence its plus
    φ_i ← φ_i + δ_i;    θ_i ← φ_i

Whoever finds no group, an odd number of workers, goes on without an outer step; its next Δ_i covers both rounds. The
paper's defaults: H = 50, η = 0.7, γ = 0.7, μ = 0.5.

Owned here: ``slot(i, "step")``, δ_i. The slow weights are the workers' own anchors.
"""

from typing import ClassVar, Literal

import torch
from typing_extensions import override

from lightning_diloco.algorithms.base import SyncAlgorithm
from lightning_diloco.codecs import Identity


class NoLoCo(SyncAlgorithm):
    """DiLoCo by gossip: heavy-ball outer steps in random pairs, and a pull towards the peer's slow weights.

    Others see the mean of the workers. A codec packs Δ only. Nobody ever waits for more than ``group`` − 1 others. With
    ``participation`` a worker whose peer is left out steps with its own Δ_i.

    Args:
        lr: η ≥ 0.
        momentum: μ in [0, 1).
        gamma: γ ≥ 0, the pull that keeps the slow weights together.
        group: n ≥ 2, workers in a group. 2 is the paper's; N is DiLoCo with a heavy ball.

    Raises:
        ValueError: an argument is out of its range; when training starts: more workers in a group than there are.

    When: an all-reduce is slow because workers are many, or far from each other.
    Cost: two models (φ and Δ) to n − 1 peers every H steps; per worker two more models, φ_i and δ_i.
    Proof: ``test_variants.py``, ``test_no_loco.py``; n = N is DiLoCo with outer SGD(lr=η, momentum=μ).
    """

    published: ClassVar[Literal["outer", "average"]] = "average"
    anchors: ClassVar[Literal["shared", "own"]] = "own"

    def __init__(self, lr: float = 0.7, momentum: float = 0.5, gamma: float = 0.7, group: int = 2) -> None:
        for name, value, most in (("lr", lr, None), ("momentum", momentum, 1), ("gamma", gamma, None)):
            fine = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < (most or 1e30)
            if not fine:
                bounds = "≥ 0" if most is None else f"from 0 to below {most}"
                raise ValueError(f"NoLoCo: `{name}` (={value!r}) must be a number {bounds}.")
        if isinstance(group, bool) or not isinstance(group, int) or group < 2:
            raise ValueError(f"NoLoCo: `group` (={group!r}) must be an integer ≥ 2: workers that average together.")
        self.lr, self.momentum, self.gamma, self.group = lr, momentum, gamma, group

    @override
    def setup(self) -> None:
        if self.group > self.ctx.num_workers:
            raise ValueError(
                f"NoLoCo: `group` (={self.group}) must be at most `num_nodes` (={self.ctx.num_workers}): with fewer"
                " workers nobody would ever have an outer step."
            )

    @override
    def after_inner_step(self, step: int) -> None:
        ctx = self.ctx
        if not ctx.due(step):
            return
        deltas = ctx.send(ctx.names, ctx.delta, groups=self.groups())
        if not deltas.means:
            return
        # φ goes to those whom Δ has reached; no codec, since what it loses would pull slow weights apart
        slow = ctx.send(
            ctx.names, ctx.anchor, groups=deltas.groups, what="slow weights", codec=Identity(), everybody=True
        )
        ctx.arrived()
        for w in [w for w in deltas.workers if w in ctx.local_workers]:
            phi, delta, near = ctx.anchor(w), deltas.mean_of(w), slow.means[deltas.home[w]]
            moves = ctx.slot(w, "step")
            for n in ctx.names:
                moves[n].mul_(self.momentum).sub_(delta[n], alpha=self.lr).add_(near[n] - phi[n], alpha=self.gamma)
            ctx.merge([w], ctx.names, {n: phi[n] + moves[n] for n in ctx.names})

    def groups(self) -> list[list[int]]:
        """The groups of this round: disjoint, of ``group`` workers each; who is left over, waits."""
        workers = self.ctx.workers
        order = [workers[i] for i in torch.randperm(len(workers), generator=self.ctx.random("groups")).tolist()]
        return [order[i : i + self.group] for i in range(0, len(order) - self.group + 1, self.group)]
