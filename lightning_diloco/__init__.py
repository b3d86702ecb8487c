"""DiLoCo on PyTorch Lightning: ``Trainer(strategy=DilocoStrategy(num_nodes=4, diloco_interval=500))``.

Reading order: ``strategy`` → ``_lightning/fitting`` → ``fit`` → ``_lightning/loops`` → ``_lightning/turns`` →
``engine/engine`` → ``engine/turns`` → ``state/live_module`` → ``state/replicas`` → ``state/worker`` →
``engine/synchronisation`` → ``algorithms/base`` → ``algorithms/diloco`` → ``algorithms/context`` →
``algorithms/sending`` → ``comm/channel`` → ``comm/means`` → ``state/outer`` → ``state/policies`` → ``comm/world``.
Importing the package registers ``Trainer(strategy="diloco")``.
"""

from lightning.pytorch.strategies import StrategyRegistry

from lightning_diloco.algorithms import (
    GPA,
    Aggregate,
    CentredClipping,
    Corrupt,
    DataParallel,
    Delayed,
    DelayedNesterov,
    DeMo,
    DesLoc,
    Diloco,
    DropOut,
    Eager,
    Edit,
    FedAdagrad,
    FedAdam,
    FedYogi,
    GeometricMedian,
    Hierarchical,
    Krum,
    NoLoCo,
    OuterStepReport,
    Participation,
    PeriodicAveraging,
    PostLocalSGD,
    Robust,
    SlowMo,
    SparseLoCo,
    Sparta,
    StreamingDiloco,
    SyncAlgorithm,
    Table,
    Transfer,
    TrimmedMean,
)
from lightning_diloco.callback import DilocoCallback
from lightning_diloco.cluster import Availability, Cluster
from lightning_diloco.codecs import (
    DCT,
    FP4,
    Cast,
    Codec,
    ErrorFeedback,
    Identity,
    Int8,
    RandomK,
    Statistical,
    TopK,
    Uniform,
)
from lightning_diloco.comparison import compare
from lightning_diloco.reporting.hints import DilocoHint
from lightning_diloco.simulator.facade import DilocoSimulator
from lightning_diloco.simulator.metrics import EvalStats, TrainStats
from lightning_diloco.strategy import DilocoStrategy

__version__ = "0.1.0"
__all__ = [
    "DCT",
    "FP4",
    "GPA",
    "Aggregate",
    "Availability",
    "Cast",
    "CentredClipping",
    "Cluster",
    "Codec",
    "Corrupt",
    "DataParallel",
    "DeMo",
    "Delayed",
    "DelayedNesterov",
    "DesLoc",
    "Diloco",
    "DilocoCallback",
    "DilocoHint",
    "DilocoSimulator",
    "DilocoStrategy",
    "DropOut",
    "Eager",
    "Edit",
    "ErrorFeedback",
    "EvalStats",
    "FedAdagrad",
    "FedAdam",
    "FedYogi",
    "GeometricMedian",
    "Hierarchical",
    "Identity",
    "Int8",
    "Krum",
    "NoLoCo",
    "OuterStepReport",
    "Participation",
    "PeriodicAveraging",
    "PostLocalSGD",
    "RandomK",
    "Robust",
    "SlowMo",
    "SparseLoCo",
    "Sparta",
    "Statistical",
    "StreamingDiloco",
    "SyncAlgorithm",
    "Table",
    "TopK",
    "TrainStats",
    "Transfer",
    "TrimmedMean",
    "Uniform",
    "compare",
]

StrategyRegistry.register(
    DilocoStrategy.strategy_name,
    DilocoStrategy,
    description="DiLoCo: N workers that synchronise every H local steps (defaults: N = 4, H = 500)",
    override=True,
)
