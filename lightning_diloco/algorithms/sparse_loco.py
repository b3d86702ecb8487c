"""SparseLoCo (Sarfi et al., arXiv 2508.15706): DiLoCo with sparse, two-bit pseudo-gradients.

Every H completed local steps::

    a_i = β·e_i + (θ − θ_i)         error feedback, one e_i per worker and tensor
    Ĉ_i = 2 bits of the 64 largest elements of every 4096        e_i ← a_i − Ĉ_i
    θ   ← θ − (1/N) Σ_i Ĉ_i         outer SGD, lr 1, no momentum: error feedback takes its place
    θ_i ← θ
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from lightning_diloco.algorithms.diloco import Diloco
from lightning_diloco.codecs import Codec, ErrorFeedback, Statistical, TopK


class SparseLoCo(Diloco):
    """DiLoCo with the paper's codec, ``ErrorFeedback(TopK(4096, 64, Statistical(2)), 0.95)``, and outer SGD with lr 1.

    The paper's H is 30, which the strategy's ``diloco_interval`` sets. ``DilocoStrategy(codec=)`` replaces the codec.

    When: the link is the bottleneck.
    Cost: 146.29 times fewer bytes than float32 on whole chunks of 4096; one model per worker for the errors; the
    selection of the largest elements is slow on a CPU.
    Proof: ``test_family.py``, ``test_codecs.py::test_sparseloco_sends_112_bytes_per_chunk``.
    """

    outer_defaults: ClassVar[Mapping[str, Any] | None] = {"lr": 1.0}
    codec: Codec | None = ErrorFeedback(TopK(4096, 64, Statistical(2)), 0.95)
