"""The outer model θ and the outer optimizer that moves it.

Owns θ's values, the outer optimizer with its state, and the rule when an outer step is a plain average. Does not
compute the pseudo-gradient (``channel.py``, ``algorithms/``) nor own the live module (``live_module.py``). Imports
nothing of Lightning.
"""

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_diloco.comm.means import Differences
from lightning_diloco.state.replicas import Layout, ModelState

_MOMENTA = ("momentum_buffer", "exp_avg")

OuterFactory = Callable[[Iterable[nn.Parameter]], Optimizer]

StateOf = dict[str, Tensor]
"""The outer optimizer's state for a parameter: key → tensor."""


class Outer:
    """θ and its optimizer.

    Args:
        layout: the module's layout.
        start: the values θ starts from; copied.
        factory: builds the outer optimizer from θ's trainable parameters, in the layout's order.

    Attributes:
        observer: is told Δ, and the optimizer's momenta by name, before the optimizer steps; None: nobody is.
    """

    def __init__(self, layout: Layout, start: ModelState, factory: OuterFactory) -> None:
        self.state = layout.copy_of(start)
        # the same storage: a step of the optimizer writes θ itself
        self.parameters = {n: nn.Parameter(t, requires_grad=False) for n, t in self.state.tensors.items()}
        self.observer: Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], None] | None = None
        self._trainable = layout.trainable
        for name in self._trainable:
            self.parameters[name].requires_grad_()
        nothing = [] if self._trainable else [nn.Parameter(torch.zeros(0))]  # torch's optimizers refuse an empty list
        self.optimizer = factory([self.parameters[n] for n in self._trainable] + nothing)
        if nothing:
            self.refresh_trainable(layout)
        optimized = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        left_out = [n for n in self._trainable if id(self.parameters[n]) not in optimized]
        if left_out:
            raise ValueError(
                f"The outer optimizer {type(self.optimizer).__name__} leaves out {', '.join(left_out)}, which would"
                " never move. Give the optimizer all parameters that its factory is called with."
            )

    @property
    def names(self) -> list[str]:
        """The parameters that the outer optimizer moves: those that require a gradient."""
        return list(self._trainable)

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """Parameter name → θ's tensor."""
        return self.state.tensors

    @property
    def is_plain_average(self) -> bool:
        """Whether an outer step assigns the mean of the replicas: SGD(lr=1) without momentum, weight decay or maximize.

        Computed at every call, since schedules may change the outer learning rate. The mean is assigned because SGD's
        ``θ − (θ − θ_i)`` differs from ``θ_i`` in floating point.
        """
        return is_plain_average(self.optimizer)

    @torch.no_grad()
    def step(self, names: Iterable[str], delta: Mapping[str, Tensor]) -> None:
        """Steps the outer optimizer with ``θ.grad = Δ``; only ``names`` have a gradient and move.

        A plain average assigns the mean of the weights, where Δ is known as θ minus that mean.

        Args:
            names: parameters that take part.
            delta: mean pseudo-gradient Δ = mean_i(θ − θ_i), old minus new, in the shapes of θ.
        """
        if isinstance(delta, FromMeanOfWeights) and self.is_plain_average:
            self.assign(delta.take(names))
            return
        if self.observer is not None:
            names = list(names)
            self.observer(delta, self._momenta(names))
        for name in names:
            p = self.parameters[name]
            p.grad = delta[name].to(p.dtype)  # means of half types are float32
        self.optimizer.step()
        for p in self.parameters.values():  # torch's optimizers skip parameters without a gradient in the next step
            p.grad = None

    @torch.no_grad()
    def step_apart(
        self, names: Iterable[str], delta: Mapping[str, Tensor], values: dict[str, Tensor], state: dict[str, StateOf]
    ) -> None:
        """As :meth:`step`, for a worker that has outer values of its own: ``values`` move instead of θ.

        Args:
            names: parameters that take part.
            delta: the worker's pseudo-gradient.
            values: parameter name → tensor; written in place.
            state: parameter name → the outer optimizer's state for these values; empty at first. Written in place.

        Raises:
            TypeError: the optimizer keeps something in its state that is neither a tensor nor a number.
        """
        names = list(names)
        own, observer, kept = self.optimizer.state, self.observer, {n: self.parameters[n].data for n in names}
        self.optimizer.state, self.observer = defaultdict(dict), None
        try:
            for n in names:
                self.parameters[n].data = values[n]
                if state.get(n):
                    self.optimizer.state[self.parameters[n]] = {k: self._placed(k, v) for k, v in state[n].items()}
            self.step(names, delta)
            for n in names:
                found = self.optimizer.state.get(self.parameters[n], {})
                state[n] = {key: _as_tensor(self.optimizer, key, value) for key, value in found.items()}
        finally:
            self.optimizer.state, self.observer = own, observer
            for n, data in kept.items():
                self.parameters[n].data = data

    def _placed(self, key: str, value: Tensor) -> Tensor:
        """Torch's optimizers want their counters on the CPU, wherever a file or a move has put them."""
        on_device = any(g.get("capturable") or g.get("fused") for g in self.optimizer.param_groups)
        return value.cpu() if key == "step" and not on_device else value

    def _momenta(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Name → the momentum that torch's optimizers keep of a parameter, of those that have one."""
        found = {}
        for name in names:
            state = self.optimizer.state.get(self.parameters[name], {})
            for key in _MOMENTA:
                if isinstance(state.get(key), Tensor) and state[key].shape == self.parameters[name].shape:
                    found[name] = state[key]
                    break
        return found

    @torch.no_grad()
    def restart_momentum(self) -> None:
        """The outer optimizer's momenta (``momentum_buffer``, ``exp_avg``) become 0; the rest of its state stays."""
        for state in self.optimizer.state.values():
            for key in _MOMENTA:
                if isinstance(state.get(key), Tensor):
                    state[key].zero_()

    @property
    def versions(self) -> dict[str, tuple[int, ...]]:
        """Parameter name → a value that changes whenever θ's tensor is written to."""
        return {n: (t._version, self.parameters[n]._version, id(t)) for n, t in self.state.tensors.items()}

    @torch.no_grad()
    def assign(self, values: Mapping[str, Tensor]) -> None:
        """Sets θ to ``values``, bit for bit (up to the rounding of float32 means to half types)."""
        for name, value in values.items():
            self.state.tensors[name].copy_(value)

    def relayout(self, old: Layout, layout: Layout, present: ModelState) -> None:
        """Changes to ``layout``: remaining parameters keep their values and state, new ones start at ``present``."""
        self.state = layout.copy_of(layout.carried(old, self.state, present))
        # parameters stay the same objects, because the optimizer's state is keyed by them
        kept = {name: self.parameters[before] for name, before in layout.previous_names(old).items()}
        self.parameters = {
            name: kept.get(name, nn.Parameter(tensor, requires_grad=False))
            for name, tensor in self.state.tensors.items()
        }
        for name, p in self.parameters.items():
            p.data = self.state.tensors[name]
        self.refresh_trainable(layout)

    def refresh_trainable(self, layout: Layout) -> None:
        """Follows ``requires_grad``: unfrozen parameters join the first group, frozen parameters leave theirs."""
        # An unfrozen parameter that stayed out would be set back to θ at every synchronisation, and its training lost.
        # A frozen parameter leaves with its momentum, which would be stale when the parameter is unfrozen again.
        self._trainable = layout.trainable
        wanted = {id(self.parameters[n]): self.parameters[n] for n in self._trainable}
        present = set()
        for group in self.optimizer.param_groups:
            for p in [p for p in group["params"] if id(p) not in wanted]:
                self.optimizer.state.pop(p, None)
            group["params"] = [p for p in group["params"] if id(p) in wanted]
            present |= {id(p) for p in group["params"]}
        self.optimizer.param_groups[0]["params"] += [p for key, p in wanted.items() if key not in present]
        for name, p in self.parameters.items():
            p.requires_grad_(name in self._trainable)

    def to(self, device: torch.device) -> None:
        """Moves θ and the outer optimizer's state."""
        self.state.to(device)
        for name, tensor in self.state.tensors.items():
            self.parameters[name].data = tensor
        for state in self.optimizer.state.values():
            for key, value in state.items():
                if isinstance(value, Tensor):
                    state[key] = value.to(device)

    def state_bytes(self) -> int:
        """Bytes of the outer optimizer's state."""
        values: list[Any] = [v for s in self.optimizer.state.values() for v in s.values()]
        return sum(v.nbytes for v in values if isinstance(v, Tensor))


def _as_tensor(optimizer: Optimizer, key: str, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (int, float)):
        return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else torch.int64)
    raise TypeError(
        f"The outer optimizer {type(optimizer).__name__} keeps a {type(value).__name__} as {key!r} in its state, which"
        " can't be kept for every worker. Use an outer optimizer whose state has tensors and numbers only."
    )


class FromMeanOfWeights(Differences):
    """The mean Δ as θ − mean of the workers' weights, each tensor computed when read, until θ takes the mean."""

    _taken = False

    def __getitem__(self, name: str) -> Tensor:
        if self._taken:
            raise RuntimeError(
                "θ is the mean of the workers' weights by now, and no longer what this Δ was measured from. Read"
                " `transfer.mean` before `ctx.outer.step`."
            )
        return super().__getitem__(name)

    def take(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The means of the weights; Δ is lost."""
        self._taken = True
        return {n: self.subtrahend[n] for n in names}


def is_plain_average(optimizer: Optimizer) -> bool:
    """Whether ``optimizer``'s step on Δ assigns the mean of the replicas; see :attr:`Outer.is_plain_average`."""
    return type(optimizer) is torch.optim.SGD and all(  # a subclass may step in another way
        group["lr"] == 1 and group["momentum"] == 0 and group["weight_decay"] == 0 and not group["maximize"]
        for group in optimizer.param_groups
    )


def trial_optimizer(factory: OuterFactory) -> Optimizer:
    """The outer optimizer of a dummy matrix, so that wrong arguments fail before training starts.

    Raises:
        TypeError: the factory makes no torch optimizer, or the optimizer's step needs a closure.
    """
    optimizer = factory([nn.Parameter(torch.zeros(2, 2))])  # Muon takes matrices only
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"the factory returned a {type(optimizer).__name__}; it must return a torch.optim.Optimizer")
    if needs_closure(optimizer):
        raise TypeError(
            f"{type(optimizer).__name__}.step needs a closure, which an outer step doesn't have. Use an optimizer whose"
            " step needs none."
        )
    return optimizer


def needs_closure(optimizer: Any) -> bool:
    """Whether ``optimizer.step()`` requires a closure that evaluates the model again (LBFGS)."""
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty
