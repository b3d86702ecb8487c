"""Synchronisation algorithms: one paper, one file."""

from lightning_diloco.algorithms.base import SyncAlgorithm
from lightning_diloco.algorithms.diloco import Diloco
from lightning_diloco.algorithms.report import OuterStepReport

__all__ = ["Diloco", "OuterStepReport", "SyncAlgorithm"]
