"""Gradients of a worker that has several processes (a team): each process's become the mean over the team.

Owns *when* the mean is due: once per forward and backward pass. Does not own the mean (``world.py``) nor the hooks of
Lightning in which passes end (``_lightning/team.py``). Imports nothing of Lightning.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from lightning_diloco.comm.world import World


class TeamGradients:
    """Whether the gradients of the present pass are means already.

    Args:
        world: the processes.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self._averaged = False
        self._computed_before = False

    @contextmanager
    def one_pass(self, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
        """Inside is one forward and backward pass, at whose end the gradients are means over the worker's team."""
        self._averaged = False
        yield
        if not (self._averaged or self._computed_before):
            self.average(parameters)  # no backward pass here (the loss was None), but perhaps on another member

    @contextmanager
    def computed_before(self) -> Iterator[None]:
        """Inside, closures only return a loss that was computed before: there is nothing to average."""
        self._computed_before = True
        try:
            yield
        finally:
            self._computed_before = False

    def average(self, parameters: Iterable[nn.Parameter]) -> None:
        """The backward pass has ended."""
        self.world.average_gradients(parameters)
        self._averaged = True
