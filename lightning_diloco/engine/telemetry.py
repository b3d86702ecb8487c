"""What an outer step did to θ, and what workers have trained on, in numbers.

Owns the measurements on arrival, and the count of samples and losses. Those of sending are in
``algorithms/measuring.py``, the report is made in ``synchronisation.py``. Reads only: nothing that is measured changes
a run. Imports nothing of Lightning.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_diloco.algorithms.measuring import WHOLE
from lightning_diloco.algorithms.report import LayerReport
from lightning_diloco.algorithms.transfer import Transfer
from lightning_diloco.comm.likeness import inner_products
from lightning_diloco.comm.means import Differences
from lightning_diloco.comm.statistics import euclidean_norm
from lightning_diloco.comm.world import World
from lightning_diloco.state.outer import Outer

Products = tuple[float, float, float]  # ⟨Δ, Δ⟩, ⟨Δ, m⟩, ⟨m, m⟩


class OuterStepMeter:
    """Measures the steps of the outer optimizer.

    Args:
        outer: θ and its optimizer, which the meter observes.
    """

    def __init__(self, outer: Outer) -> None:
        self._outer = outer
        self._seen: list[tuple[Mapping[str, Tensor], dict[str, Products]]] = []
        outer.observer = self._observe

    def _observe(self, delta: Mapping[str, Tensor], momenta: Mapping[str, Tensor]) -> None:
        self._seen.append((delta, {name: inner_products(delta, momenta, name) for name in momenta}))

    def forget(self) -> None:
        """A local step has ended."""
        self._seen.clear()

    def layers(
        self, transfer: Transfer, layers: Mapping[str, str], before: Mapping[str, Tensor] | None
    ) -> dict[str, LayerReport]:
        """The numbers of a transfer that was taken in, by layer, and of all layers together as ``WHOLE``.

        Args:
            transfer: what has arrived.
            layers: parameter name → layer.
            before: θ before the step; None: unknown.
        """
        names: dict[str, list[str]] = {}
        for name in transfer.names:
            names.setdefault(layers.get(name, ""), []).append(name)
        theta, momenta = self._outer.tensors, self._compared(transfer)
        known = before is not None and all(n in theta and n in before for n in transfer.names)
        updates, norms = dict[str, float](), dict[str, float]()
        for layer, of_layer in names.items() if known else ():
            assert before is not None
            updates[layer] = euclidean_norm(Differences(of_layer, theta, before), of_layer)
            norms[layer] = euclidean_norm(theta, of_layer)
        found = {}
        for layer, measured in transfer.likeness.items():
            whole = layer == WHOLE
            of_layer = transfer.names if whole else names.get(layer, [])
            found[layer] = LayerReport(
                pseudo_gradient_norm=measured["norm"],
                drift=measured["drift"],
                cosine=measured["cosine"],
                norms=tuple(measured["norms"]),
                cosines_with_mean=tuple(measured["with_mean"]),
                norm_ratio=measured["norm_ratio"],
                update_norm=math.hypot(*updates.values()) if whole and known else updates.get(layer),
                outer_norm=math.hypot(*norms.values()) if whole and known else norms.get(layer),
                momentum_cosine=_cosine([momenta[n] for n in of_layer if n in momenta]),
            )
        return found

    def _compared(self, transfer: Transfer) -> dict[str, Products]:
        """Per tensor, Δ and momentum: of the steps with this transfer's mean, else of all steps since."""
        own = [found for delta, found in self._seen if any(delta is mean for mean in transfer.means)]
        chosen = own or [found for _, found in self._seen]
        return {name: products for found in chosen for name, products in found.items()}


def _cosine(products: Sequence[Products]) -> float | None:
    """The cosine of Δ with the momentum; None without a momentum, 0 where one of the two is 0."""
    if not products:
        return None
    own, dot, momentum = (sum(column) for column in zip(*products, strict=True))
    return dot / math.sqrt(own) / math.sqrt(momentum) if own and momentum else 0.0


class Seen:
    """What the workers of this process have trained on.

    Args:
        workers: global ids of the workers hosted here.
    """

    def __init__(self, workers: Sequence[int]) -> None:
        self._workers = workers
        self._before: int | None = 0  # of the run that was resumed, all workers
        self._here: int | None = 0
        self._losses: dict[int, tuple[Any, int]] = {}  # worker → sum, count

    def note(self, worker: int, samples: int | None, loss: Tensor | None) -> None:
        """A worker has trained on a batch.

        Args:
            worker: global id.
            samples: how many samples; None: unknown, and the total is from then on.
            loss: the training loss, of a single element; None: there was none.
        """
        self._here = None if samples is None or self._here is None else self._here + samples
        if loss is not None:
            # on an accelerator the sum stays there: reading a number would wait for it
            value = float(loss) if loss.device.type == "cpu" else loss.detach().float().reshape(())
            total, count = self._losses.get(worker, (0.0, 0))
            self._losses[worker] = total + value, count + 1

    def samples(self, world: World) -> int | None:
        """Samples that all workers have trained on; all processes call this together."""
        return self._total(world.gather_all("counting samples", self._here))

    def take(self, world: World) -> tuple[int | None, tuple[float | None, ...]]:
        """Samples so far, and each worker's mean loss since the last call; all processes call this together."""
        here = {w: (float(total), count) for w, (total, count) in self._losses.items()}
        self._losses.clear()
        gathered = world.gather_all("collecting training losses", (self._here, here))
        losses: list[float | None] = []
        for w in range(world.num_workers):
            of_worker = [losses[w] for _, losses in gathered if w in losses]  # of each member of its team
            count = sum(n for _, n in of_worker)
            losses.append(sum(total for total, _ in of_worker) / count if count else None)
        return self._total([here for here, _ in gathered]), tuple(losses)

    def _total(self, of_processes: Sequence[int | None]) -> int | None:
        counts = [self._before, *of_processes]
        return None if None in counts else sum(n for n in counts if n is not None)

    def resume(self, samples: int | None) -> None:
        """The run goes on where ``samples`` had been seen."""
        self._before = samples
