"""Hints: what a run will probably regret, said once per process, each with the way out.

Owns the rules and the words. The rule about the outer momentum is measured: ``tests/benchmarks/hints.py`` makes the
table of ``examples/guides/reports.md``. Imports nothing of Lightning.
"""

from collections.abc import Iterator, Sequence

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.optim import Optimizer

from lightning_diloco.reporting.plan import Plan

BOUND = 0.3  # of the cosine of Δ with the outer momentum
SHARE = 0.4  # of a run's rounds; with more of them below BOUND, runs of the table ended worse than a plain average
LEAST = 3  # rounds
MOST = 20  # rounds of the longest runs of the table; of longer ones the rule says nothing
_given: set[str] = set()  # names of the hints that this process has given


class DilocoHint(UserWarning):
    """Advice about a run that is allowed, and probably not meant. Begins with "DiLoCo hint: "."""


def give(name: str, text: str) -> None:
    """Warns on process 0, the first time that this process gives the hint ``name``."""
    if name not in _given:
        _given.add(name)
        rank_zero_warn(f"DiLoCo hint: {text}", category=DilocoHint, stacklevel=4)


def momentum_of(optimizer: Optimizer) -> float:
    """The largest momentum of torch's SGD; 0 for other optimizers."""
    if not isinstance(optimizer, torch.optim.SGD):
        return 0.0
    return max(float(group["momentum"]) for group in optimizer.param_groups)


def overshoots(cosines: Sequence[float], progress: float) -> bool:
    """Whether the outer momentum carries θ past the point that the workers aim at, for too large a part of the run.

    Args:
        cosines: of Δ with the outer momentum before the step, of the rounds so far that had a momentum.
        progress: part of the run that is done, from 0 to 1.
    """
    return len(cosines) >= LEAST and _low(cosines) * progress > SHARE * len(cosines)


def _low(cosines: Sequence[float]) -> int:
    return sum(cosine < BOUND for cosine in cosines)


def about_momentum(momentum: float, step: int, cosines: Sequence[float]) -> tuple[str, str]:
    """Name and text of the hint about an outer momentum that overshoots, see :func:`overshoots`."""
    return (
        "momentum",
        f"the outer momentum of {momentum:g} overshoots: until local step {step} the mean pseudo-gradient had a cosine"
        f" below {BOUND} with it at {_low(cosines)} of {len(cosines)} outer steps. Short runs like that often ended"
        " worse than with a smaller momentum, or with a plain average. Compare with `outer_optimizer_kwargs={'lr': 0.7,"
        " 'momentum': 0.5, 'nesterov': True}` and with `{'lr': 1.0}`.",
    )


def about_run(plan: Plan, has_rounds: bool = True) -> Iterator[tuple[str, str]]:
    """Name and text of the hints about a run of several workers that is about to begin.

    Args:
        plan: of the run.
        has_rounds: whether the workers synchronise by rounds; algorithms that average gradients do otherwise.
    """
    h = plan.interval
    if plan.rounds == 0 and has_rounds:
        steps = (plan.steps or 0) - plan.origin
        sends = "only once, at its end" if plan.flushes else "never"
        yield (
            "no round",
            f"`diloco_interval` (={h}) is larger than the run of {steps} local steps: the workers synchronise {sends}."
            f" Choose a smaller one, for example {max(2, steps // 10)}, or train longer.",
        )
    if plan.repeated is not None:
        worker, samples, longest = plan.repeated
        yield (
            "repeated shard",
            f"worker {worker}'s shard of {samples} samples is read {longest / samples:.3g} times in every epoch: an"
            f" epoch is as long as the longest shard, of {longest}. Return lists of similar length from `partition` if"
            " that isn't meant.",
        )


def about_machines(machines: int, address: str) -> tuple[str, str]:
    """Name and text of the hint about a Trainer that is about to wait for other machines that nobody has announced."""
    return (
        "machines",
        f"`Trainer(num_nodes={machines})` is the number of machines, and this process now waits at {address} for those"
        " of the others, since no cluster environment (torchrun, SLURM, …) nor NODE_RANK is set. Simulated workers are"
        f" `DilocoStrategy(num_nodes={machines})`, which needs no second machine. On several machines start the script"
        " on each, with torchrun, or with NODE_RANK, MASTER_ADDR and MASTER_PORT in the environment.",
    )
