"""What is measured of a transfer when it is sent: norms, cosines and drifts, of all that is sent and layer by layer.

Owns the way from the sums of each process to the transfer's numbers. Does not own the sums (``comm/statistics.py``),
the formulas (``comm/likeness.py``), nor what is measured on arrival (``engine/telemetry.py``). Imports nothing of
Lightning.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lightning_diloco.algorithms.layers import layer_groups
from lightning_diloco.algorithms.order import Order
from lightning_diloco.algorithms.transfer import Transfer
from lightning_diloco.comm.channel import Channel
from lightning_diloco.comm.likeness import Likeness, Scalars, of_products, of_scalars, scalars_of
from lightning_diloco.comm.statistics import MeanStatistics, Parts, euclidean_norm, joined_parts, total_of
from lightning_diloco.state.outer import Outer
from lightning_diloco.state.replicas import Layout, Replicas

WHOLE = "all layers"
"""What the numbers of all layers together are called beside those of the layers."""


class SendingMeter:
    """Measures what workers send.

    Args:
        replicas: the workers' replicas.
        outer: θ.
        channel: the processes.
    """

    def __init__(self, replicas: Replicas, outer: Outer, channel: Channel) -> None:
        self._replicas, self._outer, self._channel = replicas, outer, channel
        self._layers: tuple[Layout, dict[str, str]] | None = None

    @property
    def layers(self) -> dict[str, str]:
        """Parameter name → the group of layers by which reports are broken down."""
        layout = self._replicas.layout
        if self._layers is None or self._layers[0] is not layout:
            self._layers = layout, layer_groups([name for name, _ in layout.module.named_parameters()])
        return self._layers[1]

    def gather(
        self, order: Order, transfer: Transfer, statistics: Sequence[MeanStatistics], coded: bool
    ) -> list[tuple[list[Parts], dict[int, Scalars]]]:
        """What each process has measured, per group of workers and of single workers; all processes call it together.

        Args:
            order: what is sent.
            transfer: with the means.
            statistics: per group, what has passed through this process.
            coded: whether a codec has packed what was sent.
        """
        here = [s.parts() for s in statistics], {} if coded else self._scalars(order, transfer)
        return self._channel.world.gather_all(f"measuring {order.where}", here)

    def _scalars(self, order: Order, transfer: Transfer) -> dict[int, Scalars]:
        """Of the workers hosted here, where an all-reduce has let nobody see what single workers send."""
        world, theta = self._channel.world, self._outer.tensors
        if world.size == 1 or self._channel.ordered or world.member:
            return {}
        return {
            w: scalars_of(order.as_delta(theta, order.read(w)), order.as_delta(theta, mean), self._layers_of(order))
            for group, mean in zip(transfer.groups, transfer.means, strict=True)
            for w in group
            if w in world.workers
        }

    def _layers_of(self, order: Order) -> dict[str, str]:
        """The same for the tensors of an order; those that are no parameters have no layer."""
        return {name: self.layers.get(name, "") for name in order.names}

    def measure(
        self,
        order: Order,
        transfer: Transfer,
        known: Mapping[int, float],
        measured: Sequence[tuple[Sequence[Parts], Mapping[int, Scalars]]],
    ) -> None:
        """Puts norms, cosines and drift into the transfer.

        Args:
            order: what is sent.
            transfer: with the means.
            known: worker → norm of what the worker sends, or would, of those that are known already.
            measured: of every process; see :meth:`gather`.
        """
        scalars = {w: found for _, of_process in measured for w, found in of_process.items()}
        shares = self._channel.weights if order.weights is None else order.weights
        norm_of, by_layer = dict(known), dict[str, list[Likeness]]()
        for i, group in enumerate(transfer.groups):
            weights = [1.0 if shares is None else float(shares[w]) for w in group]
            parts = joined_parts(of_process[i] for of_process, _ in measured)
            for layer, (square, products) in {**parts, WHOLE: total_of(parts)}.items():
                of_layer = (
                    of_products(square, products, weights)
                    if products is not None
                    else of_scalars(square, [_of_layer(scalars[w], layer) for w in group if w in scalars], weights)
                )
                by_layer.setdefault(layer, []).append(of_layer)
            norm_of = {**dict(zip(group, by_layer[WHOLE][-1].norms, strict=False)), **norm_of}
        senders = [w for group in transfer.groups for w in group]
        transfer.likeness = {layer: _as_values(found, senders) for layer, found in by_layer.items()}
        transfer.norm, transfer.cosine = (transfer.likeness[WHOLE][key] for key in ("norm", "cosine"))
        if order.of_weights:
            self._measure_drift(order, transfer, norm_of)

    def _measure_drift(self, order: Order, transfer: Transfer, norm_of: Mapping[int, float]) -> None:
        theta, names = self._outer.tensors, dict[str, list[str]]()
        for name, layer in self._layers_of(order).items():
            if name in theta:
                names.setdefault(layer, []).append(name)
        lengths = {layer: euclidean_norm(theta, of_layer) for layer, of_layer in names.items()}
        scale = math.hypot(*lengths.values()) or 1.0
        transfer.drift = tuple(
            norm_of.get(w, math.nan) / scale if w in self._channel.workers else None
            for w in range(self._channel.world.num_workers)
        )
        for layer, values in transfer.likeness.items():
            if layer != WHOLE and values["norms"]:
                values["drift"] = sum(values["norms"]) / len(values["norms"]) / (lengths.get(layer) or 1.0)


def _of_layer(scalars: Scalars, layer: str) -> tuple[float, float]:
    """‖Δ_i‖² and ⟨Δ_i, Δ⟩ of a layer, or of all together."""
    found = list(scalars.values()) if layer == WHOLE else [scalars[layer]]
    return sum(square for square, _ in found), sum(dot for _, dot in found)


def _as_values(groups: Sequence[Likeness], senders: Sequence[int]) -> dict[str, Any]:
    """The likenesses in several groups of workers as one, in plain values; workers in ascending order."""

    def mean(values: Iterable[float | None]) -> float | None:
        found = [v for v in values if v is not None]
        return sum(found) / len(found) if found else None

    def of_workers(values: Sequence[Sequence[float]]) -> list[float]:
        flat = [v for of_group in values for v in of_group]
        return [v for _, v in sorted(zip(senders, flat, strict=True))] if len(flat) == len(senders) else []

    return {
        "norm": mean(g.norm for g in groups),
        "norms": of_workers([g.norms for g in groups]),
        "with_mean": of_workers([g.with_mean for g in groups]),
        "matrix": [list(row) for row in groups[0].matrix] if len(groups) == 1 and groups[0].matrix else None,
        "cosine": mean(g.cosine for g in groups),
        "weighted": any(g.weighted for g in groups),
        "norm_ratio": mean(g.norm_ratio for g in groups),
        "drift": None,
    }
