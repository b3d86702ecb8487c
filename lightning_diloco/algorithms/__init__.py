"""Synchronisation algorithms: one paper, one file."""

from lightning_diloco.algorithms.aggregates import Aggregate, CentredClipping, GeometricMedian, Krum, TrimmedMean
from lightning_diloco.algorithms.around import Around
from lightning_diloco.algorithms.base import SyncAlgorithm
from lightning_diloco.algorithms.data_parallel import DataParallel
from lightning_diloco.algorithms.delayed_nesterov import DelayedNesterov
from lightning_diloco.algorithms.demo import DeMo
from lightning_diloco.algorithms.des_loc import DesLoc
from lightning_diloco.algorithms.diloco import Diloco
from lightning_diloco.algorithms.eager import Delayed, Eager
from lightning_diloco.algorithms.edit import Edit
from lightning_diloco.algorithms.fed_opt import FedAdagrad, FedAdam, FedYogi
from lightning_diloco.algorithms.gpa import GPA
from lightning_diloco.algorithms.hierarchical import Hierarchical
from lightning_diloco.algorithms.no_loco import NoLoCo
from lightning_diloco.algorithms.participation import DropOut, Participation, Table
from lightning_diloco.algorithms.periodic_averaging import PeriodicAveraging
from lightning_diloco.algorithms.post_local_sgd import PostLocalSGD
from lightning_diloco.algorithms.report import OuterStepReport
from lightning_diloco.algorithms.robust import Corrupt, Robust
from lightning_diloco.algorithms.slow_mo import SlowMo
from lightning_diloco.algorithms.sparse_loco import SparseLoCo
from lightning_diloco.algorithms.sparta import Sparta
from lightning_diloco.algorithms.streaming import StreamingDiloco
from lightning_diloco.algorithms.transfer import Transfer

__all__ = [
    "GPA",
    "Aggregate",
    "Around",
    "CentredClipping",
    "Corrupt",
    "DataParallel",
    "DeMo",
    "Delayed",
    "DelayedNesterov",
    "DesLoc",
    "Diloco",
    "DropOut",
    "Eager",
    "Edit",
    "FedAdagrad",
    "FedAdam",
    "FedYogi",
    "GeometricMedian",
    "Hierarchical",
    "Krum",
    "NoLoCo",
    "OuterStepReport",
    "Participation",
    "PeriodicAveraging",
    "PostLocalSGD",
    "Robust",
    "SlowMo",
    "SparseLoCo",
    "Sparta",
    "StreamingDiloco",
    "SyncAlgorithm",
    "Table",
    "Transfer",
    "TrimmedMean",
]
