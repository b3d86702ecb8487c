"""Streaming DiLoCo (Douillard et al., arXiv 2501.18512): fragments of the model take turns, overlapped with training.

Fragment p has the offset t_p. In every local step t::

    (t − t_p) mod H == 0:       send Δ_{i,p} = θ_p − θ_{i,p}                     packed per worker, then averaged
    (t − t_p − τ) mod H == 0:   θ̃_p     = OuterOpt(θ_p, Δ_p sent τ steps ago)
                                θ_{i,p} ← α·θ_{i,p} + (1−α)·θ̃_p;   θ_p ← θ̃_p     the anchor is θ̃_p, not the mixture

What is due is sent before what has arrived is applied. All fragments have one outer optimizer object, which moves only
the parameters of the fragment: as if each had its own.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

from typing_extensions import override

from lightning_diloco.algorithms.base import SyncAlgorithm
from lightning_diloco.algorithms.layers import layer_of

Pattern = Literal["strided", "sequential"]
FirstSync = Literal["paper", "staggered"]


class StreamingDiloco(SyncAlgorithm):
    """DiLoCo in fragments, with overlap.

    The model is cut into layers: a layer is what shares the module path up to its first number (``blocks.3`` of
    ``blocks.3.mlp.weight``), or, without a number, the path of the parameter's module.

    Args:
        fragments: P ≥ 1, at most the number of layers. The paper: one per three transformer layers.
        delay: τ in [0, H): local steps that a transfer takes, while training goes on. The paper: 1, at most 5.
        alpha: α in [0, 1]: weight of a worker's own parameters when it takes over a fragment. The paper: 0 or 0.5.
        pattern: "strided" (layer l belongs to fragment l mod P; the paper's default), "sequential" (runs of layers of
            about equal number), or the fragments themselves: per fragment a list of parameters, or of modules whose
            parameters are meant, by name.
        first_sync: "paper": t_p = p·⌊H/P⌋, and fragment p is first sent H + t_p local steps after training (or the last
            flush) began; "staggered", as in torchft: t_p = ⌊(p+1)·H/P⌋, first sent at t_p.

    Raises:
        ValueError: an argument is out of its range; when training starts: more fragments than layers, τ ≥ H, or a
            parameter that is in no fragment, or in several.

    The outer optimizer's default is the paper's: Nesterov with lr 0.4 and momentum 0.9. The paper sends four bits:
    ``DilocoStrategy(codec=FP4())``.

    When: the link can't move a whole model at once; with τ > 0 it works while the workers compute.
    Cost: DiLoCo's bytes, ⌈1/P⌉ of them at a time; transfers under way are in memory.
    Proof: ``test_family.py``, ``test_composition.py``; P = 1, τ = 0, α = 0 is Diloco bit for bit.
    """

    outer_defaults: ClassVar[Mapping[str, Any] | None] = {"lr": 0.4, "momentum": 0.9, "nesterov": True}

    def __init__(
        self,
        fragments: int,
        delay: int = 1,
        alpha: float = 0.0,
        pattern: Pattern | Sequence[Sequence[str]] = "strided",
        first_sync: FirstSync = "paper",
    ) -> None:
        for name, value, least in (("fragments", fragments, 1), ("delay", delay, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"StreamingDiloco: `{name}` (={value!r}) must be an integer ≥ {least}.")
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 <= alpha <= 1:
            raise ValueError(f"StreamingDiloco: `alpha` (={alpha!r}) must be a number from 0 to 1.")
        if first_sync not in get_args(FirstSync):
            raise ValueError(f"StreamingDiloco: `first_sync` (={first_sync!r}) must be 'paper' or 'staggered'.")
        if isinstance(pattern, str) and pattern not in get_args(Pattern):
            raise ValueError(
                f"StreamingDiloco: `pattern` (={pattern!r}) must be 'strided', 'sequential', or a list of names per"
                " fragment."
            )
        if not isinstance(pattern, str) and len(pattern) != fragments:
            raise ValueError(
                f"StreamingDiloco: `pattern` lists {len(pattern)} fragments, but `fragments` is {fragments}. Give the"
                " same number."
            )
        self.fragments, self.delay, self.alpha = fragments, delay, alpha
        self.pattern, self.first_sync = pattern, first_sync

    @override
    def setup(self) -> None:
        interval = self.ctx.interval
        if self.delay >= interval:
            raise ValueError(
                f"StreamingDiloco: `delay` (={self.delay}) must be less than `diloco_interval` (={interval}):"
                " a fragment has to arrive before it is sent again."
            )
        if self.fragments > interval:
            raise ValueError(
                f"StreamingDiloco: `fragments` (={self.fragments}) must be at most `diloco_interval` (={interval}):"
                " each has a local step of its own in a round."
            )
        self._fragments()  # errors belong here, not into the first round

    @override
    def after_inner_step(self, step: int) -> None:
        ctx = self.ctx
        for p in range(self.fragments):
            if ctx.due(step, offset=self._offset(p)):
                names = [n for n in self._fragments()[p] if n in ctx.names]
                if names:  # a fragment may be frozen
                    ctx.send(names, ctx.delta, delay=self.delay, tag=f"fragment {p}")
        for transfer in ctx.arrived():
            ctx.outer.step(transfer.names, transfer.mean)
            ctx.merge(transfer.workers, transfer.names, ctx.outer.tensors, alpha=self.alpha)

    def _offset(self, p: int) -> int:
        interval = self.ctx.interval
        if self.first_sync == "paper":
            return p * (interval // self.fragments)
        return (p + 1) * interval // self.fragments - interval

    def _fragments(self) -> list[list[str]]:
        """The parameters of each fragment, frozen ones too: (un)freezing must not move others to another fragment."""
        names = self.ctx.parameters
        if not isinstance(self.pattern, str):
            return _listed(names, self.ctx.names, self.pattern)
        layers: dict[str, list[str]] = {}
        for name in names:
            layers.setdefault(layer_of(name), []).append(name)
        if len(layers) < self.fragments:
            raise ValueError(
                f"StreamingDiloco: `fragments` (={self.fragments}) is more than the model's {len(layers)} layers"
                f" ({', '.join(layers)}). Use fewer, or list the parameters of each fragment in `pattern`."
            )
        fragments: list[list[str]] = [[] for _ in range(self.fragments)]
        for i, of_layer in enumerate(layers.values()):
            p = i % self.fragments if self.pattern == "strided" else i * self.fragments // len(layers)
            fragments[p] += of_layer
        return fragments


def _listed(names: Sequence[str], trainable: Sequence[str], pattern: Sequence[Sequence[str]]) -> list[list[str]]:
    def meant(entry: str) -> list[str]:
        found = [n for n in names if n == entry or n.startswith(f"{entry}.")]
        if not found:
            raise ValueError(
                f"StreamingDiloco: {entry!r} in `pattern` names no parameter, nor a module that has one. The"
                f" parameters are {', '.join(names)}."
            )
        return found

    fragments = [[n for entry in entries for n in meant(entry)] for entries in pattern]
    for name in [n for n in names if n in trainable or any(n in fragment for fragment in fragments)]:
        places = [str(p) for p, fragment in enumerate(fragments) for n in fragment if n == name]
        if len(places) != 1:
            where = f"fragments {', '.join(places)}" if places else "no fragment"
            raise ValueError(
                f"StreamingDiloco: {name!r} is in {where} of `pattern`. Every trainable parameter must be in one"
                " fragment, once, by its own name or that of a module around it."
            )
    if [] in fragments:
        raise ValueError(f"StreamingDiloco: fragment {fragments.index([])} of `pattern` (={pattern!r}) is empty.")
    return fragments
