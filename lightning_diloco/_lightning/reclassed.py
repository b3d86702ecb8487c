"""Live objects of Lightning that have a class of ours for a while: their name stays, and copies are Lightning's.

Private because Lightning's profilers, logs and messages name loops by their class, which has no public name.
"""

import inspect
from typing import Any

from typing_extensions import override


class Reclassed:
    """Mixed in before the class of Lightning's that a subclass extends; copies and pickles have Lightning's class."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.__name__ = cls.__qualname__ = _lightnings(cls).__name__

    @override
    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(max(2, protocol))
        _, (_, *arguments), state, *contents = reduced
        if isinstance(state, dict):
            state = {name: value for name, value in state.items() if name not in _annotations(type(self))}
        return _new, (_lightnings(type(self)), *arguments), state, *contents


def give_back(holder: Any) -> None:
    """Restores Lightning's class, and removes the attributes that ours has added."""
    if isinstance(holder, Reclassed):
        for name in _annotations(type(holder)):
            vars(holder).pop(name, None)
        holder.__class__ = _lightnings(type(holder))


def _new(cls: type, *arguments: Any) -> Any:
    return cls.__new__(cls, *arguments)  # pickle's constructor insists on the class that the object has


def _lightnings(cls: type) -> type:
    return next(base for base in cls.__mro__ if base.__module__.startswith("lightning."))


def _annotations(cls: type) -> set[str]:
    """The attributes that a class of ours declares for itself."""
    ours = [base for base in cls.__mro__ if issubclass(base, Reclassed)]
    return {name for base in ours for name in inspect.get_annotations(base)}
