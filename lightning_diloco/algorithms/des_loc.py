"""DES-LOC: weights and both moments of Adam are averaged at periods of their own (Iacob et al., arXiv 2505.22549).

In local step t::

    t mod K_u = 0:   m_i ← (1/N) Σ_i m_i       first moments,  K_u = 3·K_x in the paper
    t mod K_v = 0:   v_i ← (1/N) Σ_i v_i       second moments, K_v = 6·K_x
    t mod K_x = 0:   θ   ← (1/N) Σ_i θ_i;  θ_i ← θ             K_x is H

Step counters of the inner optimizer stay each worker's own, and so does everything else in its state.
"""

from typing_extensions import override

from lightning_diloco.algorithms.periodic_averaging import PeriodicAveraging


class DesLoc(PeriodicAveraging):
    """Periodic averaging of the weights, and at longer periods of the inner optimizer's moments.

    Args:
        exp_avg_interval: K_u ≥ 1, local steps between averages of "exp_avg"; None: 3·H.
        exp_avg_sq_interval: K_v ≥ 1, local steps between averages of "exp_avg_sq"; None: 6·H.

    Raises:
        ValueError: a period is no integer ≥ 1; when training starts: ``inner_state`` is not "keep".
        RuntimeError: in the first average of moments: the inner optimizer has none of that name.

    When: inner Adam or AdamW whose moments part between workers, as in long rounds or on non-iid data.
    Cost: the model's bytes every H, K_u and K_v steps: 1.5 times those of periodic averaging with the defaults.
    Proof: ``test_variants.py``, ``test_des_loc.py``; with endless periods it is periodic averaging bit for bit.
    """

    def __init__(self, exp_avg_interval: int | None = None, exp_avg_sq_interval: int | None = None) -> None:
        for name, value in (("exp_avg_interval", exp_avg_interval), ("exp_avg_sq_interval", exp_avg_sq_interval)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(
                    f"DesLoc: `{name}` (={value!r}) must be an integer ≥ 1, in local steps, or None for the paper's"
                    " multiple of `diloco_interval`."
                )
        self.exp_avg_interval, self.exp_avg_sq_interval = exp_avg_interval, exp_avg_sq_interval

    @override
    def setup(self) -> None:
        policy = self.ctx.sender.policies.inner_state
        if policy != "keep":
            raise ValueError(
                f"`inner_state` (={policy!r}) would undo the periods of DesLoc, which averages inner states itself. Use"
                " `inner_state='keep'`."
            )

    @override
    def after_inner_step(self, step: int) -> None:
        ctx = self.ctx
        periods = {
            "exp_avg": self.exp_avg_interval or 3 * ctx.interval,
            "exp_avg_sq": self.exp_avg_sq_interval or 6 * ctx.interval,
        }
        for key, period in periods.items():
            if (step - ctx.origin) % period == 0:
                self._average(key)
        super().after_inner_step(step)

    def _average(self, key: str) -> None:
        """The workers' entries ``key`` become their mean."""
        ctx = self.ctx
        names = ctx.names_with_state(key)
        if not names:
            raise RuntimeError(
                f"DesLoc averages the entry {key!r} of the inner optimizer's state, but the optimizer keeps none. Use"
                " Adam, AdamW or another optimizer with both moments."
            )
        ctx.send(names, lambda w: ctx.inner_state(w, key), what=key, tag=key)
        for transfer in ctx.arrived(key):
            for w in [w for w in transfer.workers if w in ctx.local_workers]:
                state = ctx.inner_state(w, key)
                for n in transfer.names:
                    state[n].copy_(transfer.mean[n])
