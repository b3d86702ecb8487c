"""What algorithms and codecs remember from step to step: anchors, slots, memos, and the memory of codecs.

Owns these tensors, so that files contain them, a move of the run moves them, and an outside change of the weights
reaches them, without a line in an algorithm. Does not know what they mean. Imports nothing of Lightning.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_diloco.comm.tensors import tensors_in
from lightning_diloco.state.replicas import Layout, Replicas

Named = dict[str, Tensor]


class Memory:
    """The memory of a run, for the workers of this process.

    Args:
        replicas: the workers' replicas.
        own_anchors: whether every worker has an anchor of its own, starting at its present weights.

    Attributes:
        anchors: worker → parameter name → the value from which the worker measures Δ_i; empty if all measure from θ.
        slots: (worker, name) → tensors of :meth:`slot`.
        memos: name → tensors of :meth:`memo`.
        codecs: (worker, stream, name of a tensor) → what the codec keeps for it; see
            :meth:`~lightning_diloco.Codec.encode`.
    """

    def __init__(self, replicas: Replicas, own_anchors: bool) -> None:
        self._replicas = replicas
        self.own_anchors = own_anchors
        self.anchors: dict[int, Named] = {}
        self.slots: dict[tuple[int, str], Named] = {}
        self.memos: dict[str, Named] = {}
        self.codecs: dict[tuple[int, str, str], Named] = {}
        if own_anchors:
            self.anchors = {w: {n: t.clone() for n, t in replicas.tensors(w).items()} for w in replicas.workers}

    def slot(self, worker: int, name: str, like: Mapping[str, Tensor] | None = None) -> Named:
        """Tensors of a worker under a name of the algorithm's.

        Args:
            worker: global id, hosted here.
            name: any word.
            like: entries that are still missing become zeros of these shapes and dtypes; default: the worker's
                parameters.
        """
        slot = self.slots.setdefault((worker, name), {})
        for n, t in (self._replicas.tensors(worker) if like is None else like).items():
            if n not in slot:
                slot[n] = torch.zeros_like(t)
        return slot

    def memo(self, name: str) -> Named:
        """Tensors that all workers have in common, under a name of the algorithm's; empty when first asked for."""
        return self.memos.setdefault(name, {})

    def codec(self, stream: str, worker: int, name: str) -> Named:
        """What a codec keeps for a tensor of a worker; ``stream``: what successive transfers have in common."""
        return self.codecs.setdefault((worker, stream, name), {})

    def copy_of_codec(self, stream: str, worker: int, name: str) -> Named:
        """As :meth:`codec`, a copy: what is written to it is not kept."""
        return {key: t.clone() for key, t in self.codecs.get((worker, stream, name), {}).items()}

    def forget(self, worker: int) -> None:
        """A worker starts anew: its slots are zero, its anchor is its weights, and its codecs remember nothing."""
        for (w, _), slot in self.slots.items():
            for t in slot.values() if w == worker else ():
                t.zero_()
        self.codecs = {key: kept for key, kept in self.codecs.items() if key[0] != worker}
        if self.own_anchors:
            for n, t in self._replicas.tensors(worker).items():
                self.anchors[worker][n].copy_(t)

    def rebase(self, written: Mapping[str, Tensor]) -> None:
        """Parameters were written from outside: anchors take the new values, other entries of these names start anew.

        An error, or an earlier Δ_i, belongs to a way that the workers have left.
        """
        changed = written.keys()
        for anchor in self.anchors.values():
            for n in changed & anchor.keys():
                anchor[n].copy_(written[n])
        for slot in (*self.slots.values(), *self.memos.values()):
            for n in changed & slot.keys():
                slot[n].zero_()
        self.codecs = {key: kept for key, kept in self.codecs.items() if key[2] not in changed}

    def relayout(self, old: Layout, layout: Layout) -> None:
        """Parameters came, went, were renamed, reshaped or (un)frozen."""
        before = layout.previous_names(old)
        gone = set(old.names) - set(before.values())

        def carried(tensors: Named) -> Named:
            renamed = {n: tensors[b] for n, b in before.items() if b in tensors and _fits(tensors[b], layout, n)}
            return renamed | {n: t for n, t in tensors.items() if n not in old.parameters and n not in gone}

        self.slots = {key: carried(slot) for key, slot in self.slots.items()}
        self.memos = {key: carried(memo) for key, memo in self.memos.items()}
        after = {b: n for n, b in before.items()}
        self.codecs = {
            (w, stream, after.get(n, n)): kept for (w, stream, n), kept in self.codecs.items() if n not in gone
        }
        if self.own_anchors:
            for w, anchor in self.anchors.items():
                kept = carried(anchor)
                self.anchors[w] = {n: kept.get(n, t.clone()) for n, t in self._replicas.tensors(w).items()}

    def packed(self, worker: int, changed: Collection[str]) -> dict[str, Any]:
        """References to the memory of a worker, for a file.

        Args:
            worker: global id, hosted here.
            changed: parameters with an outside change that isn't adopted yet.
        """
        codec: dict[str, dict[str, Named]] = {}
        for (w, stream, n), kept in self.codecs.items():
            if w == worker and kept and n not in changed:
                codec.setdefault(stream, {})[n] = kept
        return {
            "anchor": self.anchors.get(worker),
            "slots": {name: _anew(slot, changed) for (w, name), slot in self.slots.items() if w == worker},
            "codec": codec,
        }

    def packed_memos(self, changed: Collection[str]) -> dict[str, Named]:
        """The memos, for a file; ``changed`` as in :meth:`packed`."""
        return {name: _anew(memo, changed) for name, memo in self.memos.items()}

    def unpack(self, worker: int, saved: Mapping[str, Any], device: torch.device) -> None:
        """Takes over what :meth:`packed` gave."""
        if saved["anchor"] is not None and self.own_anchors:
            for n, t in saved["anchor"].items():
                self.anchors[worker][n].copy_(t)
        for name, slot in saved["slots"].items():
            self.slots[worker, name] = _on(slot, device)
        for stream, of_stream in saved["codec"].items():
            for n, kept in of_stream.items():
                self.codecs[worker, stream, n] = _on(kept, device)

    def unpack_memos(self, saved: Mapping[str, Named], device: torch.device) -> None:
        """Takes over what :meth:`packed_memos` gave."""
        self.memos = {name: _on(memo, device) for name, memo in saved.items()}

    def to(self, device: torch.device) -> None:
        """Moves everything."""
        for tensors in self._all():
            tensors.update(_on(tensors, device))

    def nbytes(self) -> int:
        """Bytes of everything."""
        return sum(t.nbytes for t in tensors_in(self._all()))

    def _all(self) -> list[Named]:
        return [*self.anchors.values(), *self.slots.values(), *self.memos.values(), *self.codecs.values()]


def _fits(tensor: Tensor, layout: Layout, name: str) -> bool:
    return tensor.shape == layout.parameters[name].shape


def _anew(tensors: Named, changed: Collection[str]) -> Named:
    return {n: torch.zeros_like(t) if n in changed else t for n, t in tensors.items()}


def _on(tensors: Named, device: torch.device) -> Named:
    return {n: t.to(device, copy=True) for n, t in tensors.items()}
