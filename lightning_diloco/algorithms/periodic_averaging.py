"""Periodic averaging: FedAvg with all clients (McMahan et al., arXiv 1602.05629), local SGD (Stich, arXiv 1805.09767).

Every H completed local steps::

    θ   ← (1/N) Σ_i θ_i       the mean itself, bit for bit; with a lossy codec θ − (1/N) Σ_i C(θ − θ_i)
    θ_i ← θ
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from lightning_diloco.algorithms.diloco import Diloco


class PeriodicAveraging(Diloco):
    """DiLoCo without an outer optimizer: workers take the mean of their weights.

    The strategy's ``outer_optimizer_cls`` and ``outer_optimizer_kwargs`` must be left out.

    When: as the baseline that an outer optimizer has to beat; for short runs, where momentum has no time to build up.
    Cost: the model's bytes per worker and direction every H steps.
    Proof: ``test_family.py``; with H = 1 and inner SGD it is data parallelism (``test_invariants.py``).
    """

    outer_defaults: ClassVar[Mapping[str, Any] | None] = None
