"""A cluster's constants from measured transfers.

Owns the fit only. What a transfer takes beside the formula of its pattern is put into constants of
:class:`~lightning_diloco.cluster.Cluster`::

    seconds = formula(bytes, workers, bandwidth) / efficiency  [+ sync_overhead_s]  [+ first_sync_overhead_s, once]

``efficiency`` is fitted in ratios: the geometric mean over settings (bandwidth, bytes, workers) of formula / median of
the measured seconds, so that slow links don't outvote fast ones, nor many repeats few. On public measurements
(``tests/test_measured_links.py``) it predicts transfers at a bandwidth that the fit has not seen within 8 %, and
``sync_overhead_s`` doesn't help; small transfers, where agreements and copies count, need it.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean, median

from lightning_diloco.cluster import inputs
from lightning_diloco.cluster.patterns import Pattern, seconds

Setting = tuple[float, int, float]  # bytes, workers, Gbit/s


@dataclass(frozen=True)
class MeasuredTransfer:
    """A transfer among equal workers over equal links.

    Args:
        seconds: from when the last worker was ready until all had the mean.
        nbytes: payload of each participant in one direction.
        workers: participants, ≥ 2.
        bandwidth_gbit_s: of each link and direction, 10⁹ bits per second.
        first: whether it was the first of its run, and also opened connections.

    Raises:
        ValueError: a number is out of its range.
    """

    seconds: float
    nbytes: float
    workers: int
    bandwidth_gbit_s: float
    first: bool = False

    def __post_init__(self) -> None:
        for name in ("seconds", "nbytes", "bandwidth_gbit_s"):
            inputs.number("MeasuredTransfer", name, getattr(self, name))
        inputs.count("MeasuredTransfer", "workers", self.workers, least=2)

    @property
    def setting(self) -> Setting:
        """What transfers have in common that should take equally long."""
        return self.nbytes, self.workers, self.bandwidth_gbit_s


@dataclass(frozen=True)
class Calibration:
    """Constants for :class:`~lightning_diloco.cluster.Cluster`, under the names of its arguments."""

    efficiency: float
    sync_overhead_s: float
    first_sync_overhead_s: float


def calibrate(
    transfers: Iterable[MeasuredTransfer],
    pattern: Pattern = "ring",
    latency_ms: float = 0.0,
    with_overhead: bool = False,
) -> Calibration:
    """Fits the constants to measured transfers.

    >>> slow, fast = MeasuredTransfer(2.0, 125_000_000, 2, 1), MeasuredTransfer(0.2, 125_000_000, 2, 10)
    >>> calibrate([slow, fast, MeasuredTransfer(2.5, 125_000_000, 2, bandwidth_gbit_s=1, first=True)])
    Calibration(efficiency=0.5, sync_overhead_s=0.0, first_sync_overhead_s=0.5)

    Args:
        transfers: what was measured, all with the same pattern.
        pattern: how the means crossed.
        latency_ms: of a hop; it is not fitted.
        with_overhead: whether ``sync_overhead_s`` is fitted, too, by least squares of the relative errors and not
            below 0; it needs two settings that differ in bandwidth or size. False: it is 0.

    Returns:
        The constants. ``first_sync_overhead_s`` is the median over first transfers of what they took longer than the
        others in their setting (if there are none: than what the other constants give), and 0 without any.

    Raises:
        ValueError: there are no transfers that were not first, or too few settings, or they took less time than the
            bandwidth allows.
    """
    transfers = list(transfers)
    later: dict[Setting, list[float]] = {}
    for transfer in transfers:
        if not transfer.first:
            later.setdefault(transfer.setting, []).append(transfer.seconds)
    if len(later) < (2 if with_overhead else 1):
        raise ValueError(
            f"calibrate: `transfers` has {len(later)} settings (bytes, workers, bandwidth) with a transfer that wasn't"
            f" the first of its run; {'two' if with_overhead else 'one'} or more are needed."
        )
    points = []  # (seconds over the link by the formula, measured without latency)
    for setting, measured in later.items():
        whole, over_link = (seconds(pattern, *setting, latency_ms=ms) for ms in (latency_ms, 0.0))
        usual_seconds, waiting = median(measured), whole - over_link
        points.append((over_link, usual_seconds - waiting))
        if usual_seconds <= waiting:
            raise ValueError(
                f"calibrate: transfers of {setting[0]:,.0f} bytes took {usual_seconds:.6g} s, but their latency alone"
                f" is {waiting:.6g} s. Check `latency_ms` (={latency_ms}) and `pattern` (={pattern!r})."
            )
    slope, overhead = _line(points) if with_overhead else (0.0, 0.0)
    if overhead <= 0:
        slope, overhead = math.exp(fmean(math.log(y / x) for x, y in points)), 0.0
    efficiency = 1 / slope if slope > 0 else math.inf
    if efficiency > 1.01:
        raise ValueError(
            f"calibrate: the transfers took {1 / efficiency:.3g} of the time that {pattern!r} needs at the bandwidth"
            " given. Check `bandwidth_gbit_s`, `nbytes` (of one participant in one direction) and `pattern`."
        )
    efficiency = min(efficiency, 1.0)  # up to the precision of a measurement

    def usual(transfer: MeasuredTransfer) -> float:
        if transfer.setting in later:
            return median(later[transfer.setting])
        nbytes, workers, gbit_s = transfer.setting
        return seconds(pattern, nbytes, workers, gbit_s * efficiency, latency_ms) + overhead

    more = [transfer.seconds - usual(transfer) for transfer in transfers if transfer.first]
    return Calibration(efficiency, overhead, max(0.0, median(more)) if more else 0.0)


def _line(points: list[tuple[float, float]]) -> tuple[float, float]:
    """The a and b for which the squares of (a·x + b) / y − 1 over the points (x, y) have the least sum."""
    u, v = [x / y for x, y in points], [1 / y for _, y in points]
    uu, uv, vv = (sum(p * q for p, q in zip(a, b, strict=True)) for a, b in ((u, u), (u, v), (v, v)))
    determinant = uu * vv - uv * uv
    if determinant <= 1e-9 * uu * vv:
        raise ValueError(
            "calibrate: `with_overhead` needs transfers of different bytes or bandwidths: all of these need the same"
            " seconds by the formula, so that an overhead can't be told from a slow link."
        )
    return (vv * sum(u) - uv * sum(v)) / determinant, (uu * sum(v) - uv * sum(u)) / determinant
