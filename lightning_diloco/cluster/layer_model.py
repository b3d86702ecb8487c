"""Compute utilisation where a step is more than one number: layer by layer, as in Streaming DiLoCo's simulation.

Owns the model behind the table of bandwidths in 2501.18512. A worker computes the layers one after another, and one
link carries the reductions one after another, in the order in which they are queued (L layers, T seconds per step)::

    forward of layer 0, …, L−1                      T/3L each
    backward of layer L−1, …, 0:  activations       T/3L, not for layer 0, whose inputs need no gradient
                                  weights           T/3L; then the layer's reduction is queued, if its fragment is due
    a reduction                                     parameters/L · bits / bandwidth
    forward of layer l in step s + 1 + τ            waits for the reduction of layer l queued in step s

Layer l belongs to fragment p = l mod P, which is due in the steps p·⌊H/P⌋, p·⌊H/P⌋ + H, and so on. Data parallelism is
H = 1 and P = 1, DiLoCo P = 1. Utilisation is the share of time that computes, in the steady state.

Unlike :mod:`~lightning_diloco.cluster.planning`, reductions overlap with the backward pass that is still under way, and
the traffic of a reduction is parameters · bits, whatever the number of workers: that is how the published table counts.
"""

import math
from dataclasses import dataclass

from lightning_diloco.cluster import inputs

GRID_GBIT_S: tuple[float, ...] = tuple(10 ** (-1 + 4 * i / 49) for i in range(50))
"""Bandwidths of the published table: ``logspace(-1, 3, 50)``."""


@dataclass(frozen=True)
class LayerModel:
    """A model, a machine, and how the model is synchronised.

    Args:
        layers: L ≥ 1, all alike.
        step_seconds: T, seconds of a local step with 3·L equal parts; the one that layer 0 doesn't need is left out.
        parameters: of the whole model.
        bits: per parameter on the link. The published table: 16, and 4 for FP4.
        interval: H ≥ 1, local steps per round.
        fragments: P, from 1 to the number of layers and to H.
        overlap_steps: τ, from 0 to H − 1: steps during which a fragment may travel.
        bits_factor: multiplies the bits. 1 is the model as published; 0.85 was fitted by us to the published table.

    Raises:
        ValueError: a number is out of its range.
    """

    layers: int
    step_seconds: float
    parameters: float
    bits: float
    interval: int
    fragments: int = 1
    overlap_steps: int = 0
    bits_factor: float = 1.0

    def __post_init__(self) -> None:
        for name, least in (("layers", 1), ("interval", 1), ("fragments", 1), ("overlap_steps", 0)):
            inputs.count("LayerModel", name, getattr(self, name), least)
        for name in ("step_seconds", "parameters", "bits", "bits_factor"):
            inputs.number("LayerModel", name, getattr(self, name))
        inputs.check_schedule("LayerModel", self.interval, self.fragments, self.overlap_steps)
        if self.fragments > self.layers:
            raise ValueError(
                f"LayerModel: `fragments` (={self.fragments}) must be at most `layers` (={self.layers}): a fragment has"
                " one layer at least."
            )

    def compute_utilisation(self, bandwidth_gbit_s: float) -> float:
        """Share of the time that computes, in the steady state, with a link of so many 10⁹ bits per second.

        >>> model = LayerModel(layers=24, step_seconds=0.1, parameters=1e9, bits=16, interval=100)
        >>> round(model.compute_utilisation(1.4), 2)
        0.46
        """
        inputs.number("LayerModel", "bandwidth_gbit_s", bandwidth_gbit_s)
        part = self.step_seconds / (3 * self.layers)
        reduction = self.parameters / self.layers * self.bits * self.bits_factor / (bandwidth_gbit_s * 1e9)
        computing = self.interval * (self.step_seconds - part)
        return computing / _seconds_per_round(self, part, reduction)

    def bandwidth_for(self, utilisation: float) -> float:
        """The smallest bandwidth of :data:`GRID_GBIT_S` with this compute utilisation, or a higher one.

        >>> model = LayerModel(layers=24, step_seconds=0.1, parameters=1e9, bits=16, interval=100)
        >>> round(model.bandwidth_for(0.5), 1)
        1.7

        Raises:
            ValueError: ``utilisation`` is no number between 0 and 1, or none of the bandwidths reaches it.
        """
        inputs.number("LayerModel", "utilisation", utilisation, "fraction")
        low, high = 0, len(GRID_GBIT_S)
        while low < high:  # utilisation rises with the bandwidth
            middle = (low + high) // 2
            if self.compute_utilisation(GRID_GBIT_S[middle]) >= utilisation:
                high = middle
            else:
                low = middle + 1
        if high == len(GRID_GBIT_S):
            best = self.compute_utilisation(GRID_GBIT_S[-1])
            raise ValueError(
                f"LayerModel: `utilisation` (={utilisation}) isn't reached with {GRID_GBIT_S[-1]:,.0f} Gbit/s, the"
                f" largest bandwidth of the grid, which gives {best:.4f}. Ask for less."
            )
        return GRID_GBIT_S[high]


def _seconds_per_round(model: LayerModel, part: float, reduction: float) -> float:
    """Seconds of H steps once rounds repeat: runs rounds until what is under way looks as it did some rounds before."""
    layers, interval, gap = model.layers, model.interval, model.interval // model.fragments
    fragments = {p * gap: [*range(p, layers, model.fragments)] for p in range(model.fragments)}
    now, link_free = 0.0, 0.0  # ends of what computes and of what the link carries
    under_way: dict[int, dict[int, float]] = {}  # step that waits → layer → end of its reduction
    states: list[tuple[float, ...]] = []
    starts: list[float] = []
    tolerance = 1e-12 * (interval * layers * (3 * part + reduction))
    for first in range(0, 200 * interval, interval):
        state = (link_free, *(end for step in sorted(under_way) for end in under_way[step].values()))
        states.append(tuple(max(end - now, 0.0) for end in state))
        starts.append(now)
        for k in range(1, min(8, len(states))):
            if _close(states[-1], states[-1 - k], tolerance):
                return (now - starts[-1 - k]) / k
        for step in range(first, first + interval):
            forwarded = 0
            for layer, end in sorted(under_way.pop(step, {}).items()):
                now = max(now + (layer - forwarded) * part, end)
                forwarded = layer
            now += (layers - forwarded) * part
            for layer in reversed(fragments.get(step - first, [])):
                done = now + (2 * (layers - layer) - (layer == 0)) * part
                link_free = max(link_free, done) + reduction
                under_way.setdefault(step + 1 + model.overlap_steps, {})[layer] = link_free
            now += (2 * layers - 1) * part
    return (now - starts[len(starts) // 2]) / (len(starts) - len(starts) // 2)


def _close(a: tuple[float, ...], b: tuple[float, ...], tolerance: float) -> bool:
    return len(a) == len(b) and all(math.isclose(x, y, rel_tol=0, abs_tol=tolerance) for x, y in zip(a, b, strict=True))
