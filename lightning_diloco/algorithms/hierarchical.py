"""Hierarchical local SGD: often within a group, rarely among all (Lin et al., arXiv 1808.07217).

A round of all workers has H₂ = H local steps; in local step t::

    t mod H₂ = 0:                Δ = (1/N) Σ_i (θ − θ_i);  θ ← OuterOpt(θ, Δ);  θ_i ← θ
    else, if t mod H₁ = 0:       θ_i ← mean of θ_j over the workers j of i's group

Δ_i refers to θ, however often groups have averaged. The default outer optimizer is DiLoCo's.
"""

from collections.abc import Sequence

from typing_extensions import override

from lightning_diloco.algorithms.diloco import Diloco


class Hierarchical(Diloco):
    """DiLoCo whose groups of workers average their weights within a round.

    Args:
        every: H₁ ≥ 1, local steps between averages within a group; below ``diloco_interval``, which is H₂.
        groups: number of groups, into which successive workers are put as evenly as possible; or the groups themselves:
            lists of workers, which name each once.

    Raises:
        ValueError: an argument is out of its range; when training starts: H₁ ≥ H₂, more groups than workers, or a
            worker in no group or in several.

    When: fast links within a site, slow ones between sites.
    Cost: the model's bytes every H₁ steps within a group, every H₂ steps among all.
    Proof: ``test_variants.py``, ``test_hierarchical.py``; a group for each worker is Diloco bit for bit, a
    single group with the mean as outer step is periodic averaging every H₁ steps.
    """

    def __init__(self, every: int, groups: int | Sequence[Sequence[int]] = 2) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(
                f"Hierarchical: `every` (={every!r}) must be an integer ≥ 1: local steps between averages."
            )
        listed = isinstance(groups, Sequence) and all(isinstance(g, Sequence) and len(g) for g in groups)
        counted = isinstance(groups, int) and not isinstance(groups, bool) and groups >= 1
        if isinstance(groups, str) or not (counted or (listed and groups)):
            raise ValueError(
                f"Hierarchical: `groups` (={groups!r}) must be a number of groups ≥ 1, or lists of workers like"
                " [[0, 1], [2, 3]]."
            )
        self.every, self.groups = every, groups

    @override
    def setup(self) -> None:
        ctx = self.ctx
        if self.every >= ctx.interval:
            raise ValueError(
                f"Hierarchical: `every` (={self.every}) must be less than `diloco_interval` (={ctx.interval}), after"
                " which all workers average anyway."
            )
        groups = self._groups()
        named = list(range(ctx.num_workers)) if not isinstance(self.groups, int) else ctx.workers
        if sorted(w for g in groups for w in g) != named or [] in groups:
            raise ValueError(
                f"Hierarchical: `groups` (={self.groups!r}) must put each of the workers 0 to {ctx.num_workers - 1}"
                " into one group, once, and leave no group empty."
            )

    @override
    def after_inner_step(self, step: int) -> None:
        ctx = self.ctx
        if (step - ctx.origin) % self.every == 0 and not ctx.due(step):
            ctx.send(ctx.names, ctx.weights, groups=self._groups(), what="weights", tag="group")
            for transfer in ctx.arrived("group"):
                for w in transfer.workers:
                    ctx.merge([w], transfer.names, transfer.mean_of(w))
        super().after_inner_step(step)

    def _groups(self) -> list[list[int]]:
        if not isinstance(self.groups, int):
            return [list(group) for group in self.groups]
        n, workers = self.groups, self.ctx.workers
        return [workers[i * len(workers) // n : (i + 1) * len(workers) // n] for i in range(n)]
