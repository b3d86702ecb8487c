"""Synchronisation algorithms: one paper, one file."""

from lightning_diloco.algorithms.base import SyncAlgorithm
from lightning_diloco.algorithms.data_parallel import DataParallel
from lightning_diloco.algorithms.diloco import Diloco
from lightning_diloco.algorithms.participation import DropOut, Participation, Table
from lightning_diloco.algorithms.periodic_averaging import PeriodicAveraging
from lightning_diloco.algorithms.post_local_sgd import PostLocalSGD
from lightning_diloco.algorithms.report import OuterStepReport
from lightning_diloco.algorithms.sparse_loco import SparseLoCo
from lightning_diloco.algorithms.streaming import StreamingDiloco
from lightning_diloco.algorithms.transfer import Transfer

__all__ = [
    "DataParallel",
    "Diloco",
    "DropOut",
    "OuterStepReport",
    "Participation",
    "PeriodicAveraging",
    "PostLocalSGD",
    "SparseLoCo",
    "StreamingDiloco",
    "SyncAlgorithm",
    "Table",
    "Transfer",
]
