"""A facade for users with an ``nn.Module`` and a dataset: :class:`DilocoSimulator`."""

from lightning_diloco.simulator.facade import DilocoSimulator
from lightning_diloco.simulator.history import History
from lightning_diloco.simulator.metrics import EvalStats, TrainStats
from lightning_diloco.simulator.module import SimulatorModule

__all__ = ["DilocoSimulator", "EvalStats", "History", "SimulatorModule", "TrainStats"]
