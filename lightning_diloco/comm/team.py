"""When the processes of a worker's team average their gradients: once per forward and backward pass.

Does not own the mean (``world.py``) nor the hooks of Lightning in which passes end (``_lightning/team.py``). Imports
nothing of Lightning.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from lightning_diloco.comm.world import World


class TeamGradients:
    """Averages the gradients of every pass over the worker's team exactly once.

    Args:
        world: the processes.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self._averaged = False
        self._computed_before = False

    @contextmanager
    def one_pass(self, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
        """The block is a forward and backward pass; afterwards the gradients are means over the worker's team."""
        self._averaged = False
        yield
        # Without a backward pass (the loss was None) this process must join the all-reduce all the same: another
        # process of the team may have a loss, and would wait for this process until the timeout.
        if not (self._averaged or self._computed_before):
            self.average(parameters)

    @contextmanager
    def computed_before(self) -> Iterator[None]:
        """Inside, closures return a loss whose gradients are averaged already; passes average nothing."""
        self._computed_before = True
        try:
            yield
        finally:
            self._computed_before = False

    def average(self, parameters: Iterable[nn.Parameter]) -> None:
        """Averages the gradients at the end of a backward pass."""
        self.world.average_gradients(parameters)
        self._averaged = True
