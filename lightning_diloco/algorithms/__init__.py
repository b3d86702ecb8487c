"""Synchronisation algorithms: one paper, one file."""

from lightning_diloco.algorithms.base import OuterStepReport, SyncAlgorithm
from lightning_diloco.algorithms.diloco import Diloco

__all__ = ["Diloco", "OuterStepReport", "SyncAlgorithm"]
