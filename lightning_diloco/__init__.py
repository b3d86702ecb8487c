"""DiLoCo on PyTorch Lightning: ``Trainer(strategy=DilocoStrategy(num_nodes=4, diloco_interval=500))``.

Reading order: ``strategy`` → ``_lightning/fitting`` → ``fit`` → ``_lightning/loops`` → ``_lightning/turns`` →
``engine/engine`` → ``state/live_module`` → ``state/replicas`` → ``state/worker`` → ``algorithms/base`` →
``algorithms/diloco`` → ``algorithms/context`` → ``state/outer`` → ``state/policies`` → ``comm/channel`` →
``comm/means`` → ``comm/world``. Importing the package registers ``Trainer(strategy="diloco")``.
"""

from lightning.pytorch.strategies import StrategyRegistry

from lightning_diloco.algorithms import Diloco, OuterStepReport, SyncAlgorithm
from lightning_diloco.callback import DilocoCallback
from lightning_diloco.simulator.facade import DilocoSimulator
from lightning_diloco.simulator.metrics import EvalStats, TrainStats
from lightning_diloco.strategy import DilocoStrategy

__version__ = "0.1.0"
__all__ = [
    "Diloco",
    "DilocoCallback",
    "DilocoSimulator",
    "DilocoStrategy",
    "EvalStats",
    "OuterStepReport",
    "SyncAlgorithm",
    "TrainStats",
]

StrategyRegistry.register(
    DilocoStrategy.strategy_name,
    DilocoStrategy,
    description="DiLoCo: N workers that synchronise every H local steps (defaults: N = 4, H = 500)",
    override=True,
)
