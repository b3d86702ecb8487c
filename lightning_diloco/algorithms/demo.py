"""DeMo: decoupled momentum optimisation (Peng, Quesnelle, Kingma, arXiv 2411.19870).

Every local step, with a momentum m_i that workers don't share::

    ∇_i ← ∇_i · min(1, clip/‖∇_i‖)               if asked for; Lightning's clipping would come too late
    m_i ← β·m_i + ∇_i
    q_i = the k largest coefficients of the cosine transform of every block of m_i;   m_i ← m_i − DCT⁻¹(q_i)
    g   = sign((1/N) Σ_i DCT⁻¹(q_i))
    θ_i ← θ_i − lr·g                             inner SGD, without momentum, the same on all workers

m_i is what error feedback keeps of gradients: the lines of m_i and q_i are ``ErrorFeedback(DCT(64, 32), β)``. A
coefficient that a worker doesn't send counts as 0 in the mean. The paper: β = 0.999, blocks of 64 × 64, k = 32.
"""

from typing import ClassVar

from typing_extensions import override

from lightning_diloco.algorithms.data_parallel import DataParallel, average_gradients
from lightning_diloco.codecs import DCT, ErrorFeedback
from lightning_diloco.comm.statistics import euclidean_norm


class DeMo(DataParallel):
    """Data parallelism that sends the fast-moving part of the momentum, and steps by signs.

    The inner optimizer should be ``torch.optim.SGD(parameters, lr)``, with weight decay if you like: it is given signs
    for gradients. ``DilocoStrategy(codec=)`` replaces transform and momentum.

    Args:
        decay: β in (0, 1].
        chunk: longest side of a block, ≥ 1.
        k: coefficients that are sent of each block, ≥ 1.
        clip: largest norm > 0 of a worker's gradient, before it enters the momentum; None: any.

    Raises:
        ValueError: an argument is out of its range.
        MisconfigurationException: the Trainer clips gradients, which would be the signs.

    When: links too slow for data parallelism, in place of rounds.
    Cost: k values and indices per block in every step; one model per worker for m_i; two small products per block.
    Proof: ``test_variants.py``, ``test_demo.py``.
    """

    gradients_are_final: ClassVar[bool] = True

    def __init__(self, decay: float = 0.999, chunk: int = 64, k: int = 32, clip: float | None = None) -> None:
        if clip is not None and (isinstance(clip, bool) or not isinstance(clip, int | float) or not clip > 0):
            raise ValueError(f"DeMo: `clip` (={clip!r}) must be a number > 0, the largest norm of a gradient, or None.")
        self.codec = ErrorFeedback(DCT(chunk, k), decay)
        self.decay, self.chunk, self.k, self.clip = decay, chunk, k, clip

    @override
    def before_inner_step(self, step: int) -> None:
        ctx = self.ctx
        if self.clip is not None:
            for w in ctx.local_workers:
                gradients = ctx.gradients(w)
                norm = euclidean_norm(gradients, list(gradients))
                for gradient in gradients.values():
                    gradient.mul_(min(1.0, self.clip / (norm + 1e-6)))
        average_gradients(self)
        for w in ctx.local_workers:
            for gradient in ctx.gradients(w).values():
                gradient.sign_()
