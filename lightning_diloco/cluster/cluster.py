"""The simulated machines: how fast they compute, and what their links are like.

Owns the description and what follows from it alone: seconds of a step, seconds of a transfer. Who waits for whom, and
how long a run takes, is the clock's business.
"""

import hashlib
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from statistics import NormalDist
from typing import Any, Literal, NamedTuple, cast

from lightning_diloco.cluster import inputs
from lightning_diloco.cluster.availability import Availability
from lightning_diloco.cluster.patterns import PATTERNS, Pattern, default_pattern, hops, link_seconds, sent_bytes

NetworkName = Literal["high", "medium", "low"]


class Network(NamedTuple):
    """A published network."""

    bandwidth_gbit_s: float
    latency_ms: float


NETWORKS: dict[NetworkName, Network] = {
    "high": Network(bandwidth_gbit_s=400.0, latency_ms=0.1),
    "medium": Network(bandwidth_gbit_s=100.0, latency_ms=1.0),
    "low": Network(bandwidth_gbit_s=10.0, latency_ms=10.0),
}
"""The networks of 2503.09799, Appendix A, whose latency the paper counts once per all-reduce; here each hop has it."""


@dataclass(frozen=True, repr=False)
class Cluster:
    """Speeds and links of the simulated machines, as plain numbers with their units in the names.

    Every input that has no default must be given: nothing is counted as 0 because nobody said what it is. The published
    networks are :meth:`high`, :meth:`medium`, :meth:`low` and :meth:`datacentres`; ``dataclasses.replace`` changes the
    rest.

    >>> home = Cluster(step_seconds=[0.1, 0.1, 0.2], bandwidth_gbit_s=1, latency_ms=20, upload_gbit_s=0.1)
    >>> home.seconds_of_step(worker=2, step=1)
    0.2
    >>> home.transfer_seconds(1_000_000, workers=[0, 1, 2], pattern="ring")
    0.18666666666666665

    The sum: 2 · 2/3 · 8 Mbit at 100 Mbit/s, and four hops of 20 ms.

    Args:
        step_seconds: seconds of a local step: one number, one per worker, or "measured": the run's own steps
            (the host's time, which runs ahead of a CUDA device's).
        bandwidth_gbit_s: 10⁹ bits per second, in each direction: one number; one per worker, for the link by which a
            worker reaches all others; or a matrix, whose row i, column j is the link from worker i to worker j (the
            diagonal isn't used). A link between two workers is as fast as the slower of their sides.
        latency_ms: milliseconds from sending to arrival, of one hop; the same shapes. Between two workers with
            different latencies the larger one counts.
        upload_gbit_s: the same for sending, where it is slower or faster than receiving: one number or one per
            worker, and ``bandwidth_gbit_s`` is then for receiving. None: both directions alike.
        pattern: how a mean crosses the links: "ring", "server", "all_gather" or "pairs"
            (:mod:`lightning_diloco.cluster.patterns`). None: by kind of transfer: a ring for dense means, an
            all-gather for coded ones, pairs for groups of two. A server stands outside the workers, and its own link
            is never the bottleneck.
        efficiency: fraction of the bandwidth that transfers get, > 0 and ≤ 1. TCP on real links gets 0.87 to 0.98.
        sync_overhead_s: seconds that each transfer takes beside the link: agreements, copies, starting up.
        first_sync_overhead_s: seconds more for the first transfer, which also opens connections.
        jitter: σ of a lognormal factor with mean 1 on the seconds of each step, drawn for each worker and step
            independently. 0: none.
        seed: of the jitter.
        availability: when workers are there, and what is lost; None: always, nothing.

    Raises:
        ValueError: a number is missing, out of bounds, not finite, or a list has the wrong shape.
    """

    step_seconds: float | Sequence[float] | Literal["measured"]
    bandwidth_gbit_s: float | Sequence[float] | Sequence[Sequence[float]]
    latency_ms: float | Sequence[float] | Sequence[Sequence[float]]
    upload_gbit_s: float | Sequence[float] | None = None
    pattern: Pattern | None = None
    efficiency: float = 1.0
    sync_overhead_s: float = 0.0
    first_sync_overhead_s: float = 0.0
    jitter: float = 0.0
    seed: int = 0
    availability: Availability | None = None

    def __post_init__(self) -> None:
        values: dict[str, Any] = {
            "bandwidth_gbit_s": inputs.per_link("Cluster", "bandwidth_gbit_s", self.bandwidth_gbit_s, "positive"),
            "latency_ms": inputs.per_link("Cluster", "latency_ms", self.latency_ms, "not negative"),
            "efficiency": inputs.number("Cluster", "efficiency", self.efficiency, "fraction"),
            "seed": inputs.count("Cluster", "seed", self.seed, least=0),
        }
        for name in ("sync_overhead_s", "first_sync_overhead_s", "jitter"):
            values[name] = inputs.number("Cluster", name, getattr(self, name), "not negative")
        if isinstance(self.step_seconds, str):
            if self.step_seconds != "measured":
                raise ValueError(
                    f"Cluster: `step_seconds` (={self.step_seconds!r}) must be a number of seconds, a list with one per"
                    " worker, or 'measured'."
                )
        else:
            values["step_seconds"] = inputs.per_worker("Cluster", "step_seconds", self.step_seconds, "positive")
        if self.upload_gbit_s is not None:
            values["upload_gbit_s"] = inputs.per_worker("Cluster", "upload_gbit_s", self.upload_gbit_s, "positive")
            if _is_matrix(values["bandwidth_gbit_s"]):
                raise ValueError(
                    "Cluster: `upload_gbit_s` can't be combined with a matrix of `bandwidth_gbit_s`, which has both"
                    " directions already: row i, column j is the link from worker i to worker j."
                )
        if self.availability is not None and not isinstance(self.availability, Availability):
            raise ValueError(
                f"Cluster: `availability` (={self.availability!r}) must be an Availability, like"
                " Availability(drop_rate=0.1), or None."
            )
        if self.pattern is not None and self.pattern not in PATTERNS:
            raise ValueError(
                f"Cluster: `pattern` (={self.pattern!r}) must be one of {', '.join(map(repr, PATTERNS))}, or None."
            )
        for name, value in values.items():
            object.__setattr__(self, name, value)
        if self.pattern == "server":
            self._check_server()

    def __repr__(self) -> str:
        """The call that makes an equal cluster, without the arguments that have their defaults.

        >>> from dataclasses import replace
        >>> replace(Cluster.low(step_seconds=0.1), seed=3)
        Cluster(step_seconds=0.1, bandwidth_gbit_s=10.0, latency_ms=10.0, seed=3)
        """
        said = [f for f in fields(self) if getattr(self, f.name) != f.default]
        return f"{type(self).__name__}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in said)})"

    @classmethod
    def high(cls, step_seconds: float | Sequence[float] | Literal["measured"]) -> "Cluster":
        """Workers on the fast network of 2503.09799, Appendix A: 400 Gbit/s and 0.1 ms."""
        return cls(step_seconds, NETWORKS["high"].bandwidth_gbit_s, NETWORKS["high"].latency_ms)

    @classmethod
    def medium(cls, step_seconds: float | Sequence[float] | Literal["measured"]) -> "Cluster":
        """Workers on the medium network of 2503.09799, Appendix A: 100 Gbit/s and 1 ms."""
        return cls(step_seconds, NETWORKS["medium"].bandwidth_gbit_s, NETWORKS["medium"].latency_ms)

    @classmethod
    def low(cls, step_seconds: float | Sequence[float] | Literal["measured"]) -> "Cluster":
        """Workers on the slow network of 2503.09799, Appendix A: 10 Gbit/s and 10 ms."""
        return cls(step_seconds, NETWORKS["low"].bandwidth_gbit_s, NETWORKS["low"].latency_ms)

    @classmethod
    def datacentres(
        cls,
        step_seconds: float | Sequence[float] | Literal["measured"],
        workers: Sequence[int],
        within: NetworkName = "high",
        across: NetworkName = "low",
    ) -> "Cluster":
        """Workers in several datacentres: one network within each, another one across.

        >>> Cluster.datacentres(0.1, workers=[2, 1], across="medium").bandwidth_gbit_s
        ((400.0, 400.0, 100.0), (400.0, 400.0, 100.0), (100.0, 100.0, 400.0))

        Args:
            step_seconds: as for the class.
            workers: how many workers each datacentre has; they are numbered through.
            within: one of :data:`NETWORKS`.
            across: one of :data:`NETWORKS`.

        Raises:
            ValueError: a datacentre has no worker, or there is no such network.
        """
        for name, network in (("within", within), ("across", across)):
            if network not in NETWORKS:
                raise ValueError(
                    f"Cluster.datacentres: `{name}` (={network!r}) must be one of {', '.join(map(repr, NETWORKS))}."
                )
        sizes = [inputs.count("Cluster.datacentres", f"workers[{i}]", n) for i, n in enumerate(workers)]
        if not sizes:
            raise ValueError(
                f"Cluster.datacentres: `workers` (={workers!r}) must have the number of workers of each datacentre."
            )
        home = [place for place, size in enumerate(sizes) for _ in range(size)]
        networks = [[NETWORKS[within if a == b else across] for b in home] for a in home]
        return cls(
            step_seconds,
            bandwidth_gbit_s=[[network.bandwidth_gbit_s for network in row] for row in networks],
            latency_ms=[[network.latency_ms for network in row] for row in networks],
        )

    def check(self, num_workers: int) -> None:
        """Whether there is a value for each of ``num_workers`` workers.

        Raises:
            ValueError: a list or matrix has another length.
        """
        for name in ("step_seconds", "bandwidth_gbit_s", "latency_ms", "upload_gbit_s"):
            inputs.check_length("Cluster", name, getattr(self, name), num_workers)
        if self.availability is not None:
            self.availability.check(num_workers)

    def with_step_seconds(self, step_seconds: float | Sequence[float]) -> "Cluster":
        """The same cluster with other seconds per step: those that were measured."""
        return replace(self, step_seconds=step_seconds)

    def seconds_of_step(self, worker: int, step: int) -> float:
        """Seconds that ``worker`` computes in local step ``step``: a pure function of (seed, worker, step).

        Raises:
            ValueError: ``step_seconds`` is "measured" and has no numbers yet, or has none for this worker.
        """
        if isinstance(self.step_seconds, str):
            raise ValueError(
                "Cluster: `step_seconds` is 'measured', and nothing was measured yet. Use `with_step_seconds(...)`."
            )
        seconds = self._of("step_seconds", worker)
        if not self.jitter:
            return seconds
        digest = hashlib.blake2b(struct.pack("<QQQ", self.seed, worker, step), digest_size=8, person=b"step_seconds")
        uniform = ((int.from_bytes(digest.digest(), "little") >> 12) + 0.5) / 2**52  # exact, and never 0 or 1
        return seconds * math.exp(self.jitter * NormalDist().inv_cdf(uniform) - self.jitter**2 / 2)

    def pattern_for(self, coded: bool, group_size: int | None = None) -> Pattern:
        """``pattern``; if that is None, the one for the kind of transfer, as ``patterns.default_pattern`` has it."""
        return self.pattern or default_pattern(coded, group_size)

    def transfer_seconds(self, nbytes: float, workers: Sequence[int], pattern: Pattern, first: bool = False) -> float:
        """Seconds from when the last of ``workers`` is ready until all of them have the mean.

        At the bottleneck of the pattern: in a ring of the workers in the order given, the slowest link and the longest
        latency; in pairs the slower direction; at a server the slowest worker up, then the slowest one down. A worker
        that is alone has nothing to send, except to a server: 0 seconds.

        Args:
            nbytes: payload of each participant in one direction, ≥ 0.
            workers: global ids of the participants.
            pattern: one of :data:`~lightning_diloco.cluster.patterns.PATTERNS`.
            first: whether it is the run's first transfer.

        Raises:
            ValueError: there is no such pattern or no worker, or a worker has no link.
        """
        n = len(workers)
        sent, steps = sent_bytes(pattern, nbytes, n), hops(pattern, n)
        overhead = self.sync_overhead_s + (self.first_sync_overhead_s if first else 0.0)
        if pattern == "server":
            self._check_server()
            latencies = [self._of("latency_ms", w) for w in workers]
            up = [self._upload(w) * self.efficiency for w in workers]
            down = [self._of("bandwidth_gbit_s", w) * self.efficiency for w in workers]
            return overhead + sum(
                max(link_seconds(sent, gbit_s, ms) for gbit_s, ms in zip(side, latencies, strict=True))
                for side in (up, down)
            )
        if n == 1:
            return 0.0
        links = list(pairwise([*workers, workers[0]]))
        if pattern == "pairs":
            return overhead + max(link_seconds(sent, *self.link(a, b)) for a, b in links)
        gbit_s, latency_ms = zip(*(self.link(a, b) for a, b in links), strict=True)
        return overhead + link_seconds(sent, min(gbit_s), max(latency_ms), steps)

    def link(self, sender: int, receiver: int) -> tuple[float, float]:
        """(Gbit/s that a transfer gets, latency in ms) from ``sender`` to ``receiver``."""
        if _is_matrix(self.bandwidth_gbit_s):
            gbit_s = self._of("bandwidth_gbit_s", sender, receiver)
        else:
            gbit_s = min(self._upload(sender), self._of("bandwidth_gbit_s", receiver))
        if _is_matrix(self.latency_ms):
            latency_ms = self._of("latency_ms", sender, receiver)
        else:
            latency_ms = max(self._of("latency_ms", sender), self._of("latency_ms", receiver))
        return gbit_s * self.efficiency, latency_ms

    def _upload(self, worker: int) -> float:
        return self._of("bandwidth_gbit_s" if self.upload_gbit_s is None else "upload_gbit_s", worker)

    def _of(self, name: str, *indices: int) -> float:
        value = getattr(self, name)
        for index in indices:
            if isinstance(value, tuple):
                if not 0 <= index < len(value):
                    raise ValueError(
                        f"Cluster: worker {index} has no `{name}`, which has {len(value)}: the workers are 0 to"
                        f" {len(value) - 1}."
                    )
                value = value[index]
        return cast(float, value)

    def _check_server(self) -> None:
        for name in ("bandwidth_gbit_s", "latency_ms"):
            if _is_matrix(getattr(self, name)):
                raise ValueError(
                    f"Cluster: `pattern` is 'server', but `{name}` is a matrix between workers, which has no link to a"
                    " server. Give one number, or one per worker."
                )


def _is_matrix(value: object) -> bool:
    return isinstance(value, tuple) and isinstance(value[0], tuple)
