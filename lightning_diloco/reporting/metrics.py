"""The names and values of what is logged of an outer step.

Owns the tags, and how a report becomes numbers under them. Does not own loggers (``callback.py``), nor what TensorBoard
alone has (``tensorboard.py``). Imports nothing of Lightning.
"""

from collections.abc import Mapping, Sequence

from lightning_diloco.algorithms.report import LayerReport, OuterStepReport

SCALARS = (
    "diloco/pseudo_gradient_norm",
    "diloco/update_norm",
    "diloco/outer_norm",
    "diloco/drift",
    "diloco/cosine",
    "diloco/norm_ratio",
    "diloco/momentum_cosine",
    "diloco/train_loss",
    "diloco/outer_lr",
    "diloco/inner_seconds",
    "diloco/outer_seconds",
    "diloco/waiting_seconds",
    "diloco/outer_step",
    "diloco/samples",
    "diloco/comm_bytes",
)
"""A value per outer step."""

OF_CLUSTER = (
    "diloco/simulated_seconds",
    "diloco/compute_utilisation",
    "diloco/alive",
    "diloco/participating",
    "diloco/committed",
    "diloco/lost_steps",
    "diloco/join_bytes",
)
"""A value per outer step more, with a simulated cluster."""

COUNTERS = ("diloco/outer_step", "diloco/samples", "diloco/comm_bytes", "diloco/simulated_seconds")
"""Of these, those that only grow: TensorBoard gets no chart of them."""

OF_WORKERS = ("drift", "norm", "cosine_with_mean", "train_loss")
"""A value per worker, as ``diloco_workers/<quantity>/worker_<i>``."""

OF_LAYERS = (
    "pseudo_gradient_norm",
    "update_norm",
    "outer_norm",
    "drift",
    "cosine",
    "cosine_with_mean",
    "norm_ratio",
    "momentum_cosine",
)
"""A value per layer, as ``diloco_layers/<quantity>/<layer>``."""


def scalars(report: OuterStepReport, total_bytes: int) -> dict[str, float]:
    """Tag out of :data:`SCALARS` and :data:`OF_CLUSTER` → value, of those that the report has.

    Args:
        report: the outer step.
        total_bytes: the ledger's total.
    """
    values = {
        "pseudo_gradient_norm": report.pseudo_gradient_norm,
        "update_norm": report.update_norm,
        "outer_norm": report.outer_norm,
        "drift": _mean([drift for drift in report.drift if drift is not None]),
        "cosine": report.cosine,
        "norm_ratio": report.norm_ratio,
        "momentum_cosine": report.momentum_cosine,
        "train_loss": train_loss(report),
        "outer_lr": report.outer_lr,
        "inner_seconds": report.inner_seconds,
        "outer_seconds": report.seconds,
        "waiting_seconds": report.waiting_seconds,
        "outer_step": report.outer_step,
        "samples": report.samples,
        "comm_bytes": total_bytes,
        "simulated_seconds": report.simulated_seconds,
        "compute_utilisation": report.compute_utilisation,
        "alive": report.alive,
        "participating": report.participating,
        "committed": None if report.alive is None else len(report.participants),
        "lost_steps": report.lost_steps,
        "join_bytes": report.join_bytes,
    }
    return {tag: float(value) for tag, value in _tagged("diloco", values).items() if value is not None}


def train_loss(report: OuterStepReport) -> float | None:
    """The mean of the workers' mean training losses; None if no worker had any."""
    return _mean([loss for loss in report.train_losses if loss is not None])


def of_workers(report: OuterStepReport) -> dict[str, float]:
    """Tag → value for every worker of a report, ``diloco_workers/<quantity>/worker_<i>``."""
    values: dict[str, dict[int, float | None]] = {
        "drift": dict(enumerate(report.drift)),
        "norm": dict(zip(report.participants, report.norms, strict=False)),
        "cosine_with_mean": dict(zip(report.participants, report.cosines_with_mean, strict=False)),
        "train_loss": dict(enumerate(report.train_losses)),
    }
    return {
        f"diloco_workers/{quantity}/worker_{w}": value
        for quantity in OF_WORKERS
        for w, value in values[quantity].items()
        if value is not None
    }


def of_layers(report: OuterStepReport) -> dict[str, float]:
    """Tag → value for every layer of a report, ``diloco_layers/<quantity>/<layer>``."""
    found: dict[str, float] = {}
    for layer, numbers in report.layers.items():
        values = {quantity: _of_layer(numbers, quantity) for quantity in OF_LAYERS}
        found |= {f"diloco_layers/{q}/{layer}": v for q, v in values.items() if v is not None}
    return found


def _of_layer(numbers: LayerReport, quantity: str) -> float | None:
    if quantity == "cosine_with_mean":
        return _mean(numbers.cosines_with_mean)
    value: float | None = getattr(numbers, quantity)
    return value


def _tagged(section: str, values: Mapping[str, float | None]) -> dict[str, float | None]:
    return {f"{section}/{name}": value for name, value in values.items()}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
