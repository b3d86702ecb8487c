"""What TensorBoard alone can show: axes other than the step, images, charts with several curves, the page HParams.

Owns the tags, colours and charts. Does not own the values (``metrics.py``) nor when they are logged (``callback.py``).

What is written goes through torch's ``SummaryWriter``, which needs Pillow for images (TensorBoard depends on it).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_diloco.reporting.metrics import COUNTERS, OF_LAYERS, OF_WORKERS

BY_SAMPLES, BY_BYTES = "diloco_by_samples", "diloco_by_bytes"
MATRIX = "diloco/cosine_matrix"
METRICS = ("diloco/train_loss",)  # columns of the page HParams, beside those that the module has

_PIXELS = 256  # edge of an image
_POSITIVE, _NEGATIVE = np.array([178.0, 24.0, 43.0]), np.array([33.0, 102.0, 172.0])


def log_scalars(logger: TensorBoardLogger, metrics: Mapping[str, float], step: int) -> None:
    """Logs metrics without the counters, whose charts would be straight lines."""
    logger.log_metrics({tag: value for tag, value in metrics.items() if tag not in COUNTERS}, step=step)


def log_by_axes(logger: TensorBoardLogger, metrics: Mapping[str, float], samples: int | None, total_bytes: int) -> None:
    """Logs metrics once more, with the samples that were seen, and the bytes that were sent, in place of the step.

    Args:
        logger: the logger.
        metrics: name → value.
        samples: that all workers have trained on; None: unknown, and that axis is left out.
        total_bytes: that a worker has sent; 0: nothing was, and that axis is left out.
    """
    for section, position in ((BY_SAMPLES, samples), (BY_BYTES, total_bytes or None)):
        if position is not None and metrics:
            logger.log_metrics({f"{section}/{name}": value for name, value in metrics.items()}, step=position)


def log_matrix(logger: TensorBoardLogger, matrix: Sequence[Sequence[float]], step: int) -> None:
    """Logs pairwise cosines as an image."""
    logger.experiment.add_image(MATRIX, picture(matrix), step, dataformats="HWC")


def picture(matrix: Sequence[Sequence[float]]) -> Any:
    """Values from −1 (blue) over 0 (white) to 1 (red) as squares: uint8, [height, width, 3]; grey where not a number.

    >>> picture([[1.0, 0.0], [0.0, -1.0]])[::128, ::128].tolist()
    [[[178, 24, 43], [255, 255, 255]], [[255, 255, 255], [33, 102, 172]]]
    """
    values = np.asarray(matrix, dtype=float)
    known = np.nan_to_num(values.clip(-1, 1))[..., None]
    colours = 255 + np.abs(known) * (np.where(known > 0, _POSITIVE, _NEGATIVE) - 255)
    colours[np.isnan(values)] = 128
    edge = max(1, _PIXELS // len(values))
    return np.rint(colours).astype(np.uint8).repeat(edge, 0).repeat(edge, 1)


def log_layout(logger: TensorBoardLogger, workers: bool, layers: bool) -> None:
    """Puts the curves of all workers, and those of all layers, on a chart per quantity: the page Custom Scalars."""
    layout = {}
    if workers:
        layout["DiLoCo: workers"] = _charts("diloco_workers", OF_WORKERS)
    if layers:
        layout["DiLoCo: layers"] = _charts("diloco_layers", OF_LAYERS)
    if layout:
        logger.experiment.add_custom_scalars(layout)


def _charts(section: str, quantities: Sequence[str]) -> dict[str, list[Any]]:
    # a regular expression, matched from the start of a tag; the logger may put a prefix of its own before ours
    return {quantity: ["Multiline", [f"(.*-)?{section}/{quantity}/.*"]] for quantity in quantities}


def log_hyperparameters(logger: TensorBoardLogger, ours: Mapping[str, Any], flat: Mapping[str, Any]) -> None:
    """Makes a row of the page HParams.

    TensorBoard takes the first hyperparameters of a run: a second row for the same run would be ignored, as would the
    row that ``log_hyperparams`` writes for the module's. So the row has them all, and is written before.

    Args:
        logger: the logger.
        ours: the strategy's, for the logger's ``hparams.yaml``.
        flat: those of module and datamodule, and the strategy's: name → number, string or bool.
    """
    from torch.utils.tensorboard.summary import hparams

    logger.hparams.update(ours)
    metrics = dict.fromkeys([*METRICS, *(["hp_metric"] if len(flat) > len(ours) else [])], 0)
    writer = logger.experiment.file_writer
    if writer is not None:
        for summary in hparams(dict(flat), metrics):  # type: ignore[no-untyped-call]
            writer.add_summary(summary)
