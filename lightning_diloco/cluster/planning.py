"""Seconds, bytes and compute utilisation of a run that nobody has started: equal workers, equal links, no faults.

Owns pure functions of a :class:`Plan`. What they assume:

* All workers take ``step_seconds`` for every local step, and have equal links: nobody waits for a slower one.
* A step is indivisible: gradients of data parallelism are sent after the backward pass
  (:mod:`~lightning_diloco.cluster.layer_model` overlaps them with it).
* Every link carries one transfer at a time, in the order in which they are sent.
* Fragments have equal sizes. Fragment p is sent H + p·⌊H/P⌋ local steps after training began, and every H steps from
  then on, as :class:`~lightning_diloco.StreamingDiloco` does; at the end what is under way arrives, and then fragments
  that have moved since they were taken over are sent (``final_sync``, α = 0).
* With overlap τ, workers go on while a fragment travels, and wait for it at the end of the τ-th step after the one that
  sent it, if it has not arrived.

With a transfer's seconds R (:mod:`~lightning_diloco.cluster.patterns`), T seconds per step and no overlap::

    data parallelism    steps · (T + R)
    DiLoCo              steps · T + ⌈steps / H⌉ · R
    P fragments         DiLoCo's bytes, P times as many transfers (and latencies) of 1/P of the size

and with overlap, as long as transfers are shorter than τ·T and than the gap between two of them, steps · T and what the
last round has still to send.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from lightning_diloco.cluster import inputs, patterns
from lightning_diloco.cluster.patterns import Pattern


@dataclass(frozen=True)
class Plan:
    """What workers compute and send; only the bandwidth is left open.

    Data parallelism is ``interval=1``, DiLoCo ``fragments=1, overlap_steps=0``.

    Args:
        parameters: of the model.
        step_seconds: T, of a local step.
        steps: local steps of the run.
        workers: N ≥ 2; a single worker has nobody to send to.
        latency_ms: of one hop.
        interval: H, local steps per round.
        fragments: P, from 1 to H.
        overlap_steps: τ, from 0 to H − 1.
        bits_per_value: 32 for float32; 4 for FP4 (its scales, two bytes per tensor, are not counted).
        pattern: None: a ring for 16 bits or more; less comes from a codec, whose payloads can't be added on the way and
            are gathered from all.
        efficiency: fraction of the bandwidth that transfers get, > 0 and ≤ 1.
        sync_overhead_s: seconds that each transfer takes beside the link.
        first_sync_overhead_s: seconds more for the first transfer.

    Raises:
        ValueError: a number is out of its range.
    """

    parameters: float
    step_seconds: float
    steps: int
    workers: int
    latency_ms: float
    interval: int = 1
    fragments: int = 1
    overlap_steps: int = 0
    bits_per_value: float = 32.0
    pattern: Pattern | None = None
    efficiency: float = 1.0
    sync_overhead_s: float = 0.0
    first_sync_overhead_s: float = 0.0

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("workers", 2), ("interval", 1), ("fragments", 1), ("overlap_steps", 0)):
            inputs.count("Plan", name, getattr(self, name), least)
        for name in ("parameters", "step_seconds", "bits_per_value"):
            inputs.number("Plan", name, getattr(self, name))
        for name in ("latency_ms", "sync_overhead_s", "first_sync_overhead_s"):
            inputs.number("Plan", name, getattr(self, name), "not negative")
        inputs.number("Plan", "efficiency", self.efficiency, "fraction")
        inputs.check_schedule("Plan", self.interval, self.fragments, self.overlap_steps)
        patterns.hops(self.wire_pattern, self.workers)  # whether there is such a pattern, for so many workers

    @property
    def wire_pattern(self) -> Pattern:
        """``pattern``, or what ``bits_per_value`` suggests."""
        return self.pattern or patterns.default_pattern(coded=self.bits_per_value < 16)

    @property
    def rounds(self) -> int:
        """How often the whole model is synchronised: ⌈steps / H⌉."""
        return -(-self.steps // self.interval)

    @property
    def transfers(self) -> int:
        """How many transfers there are, each of a fragment."""
        return sum(max(0, self._sent_by(p)) + self._is_left(p) for p in range(self.fragments))

    @property
    def payload_bytes(self) -> float:
        """Payload of a worker in one direction, over the whole run: what the ledger of a run counts."""
        return self.transfers * self._transfer_bytes

    @property
    def wire_bytes(self) -> float:
        """Bytes that each worker sends over the whole run, and as many that it receives."""
        return patterns.sent_bytes(self.wire_pattern, self.payload_bytes, self.workers)

    @property
    def _transfer_bytes(self) -> float:
        return self.parameters * self.bits_per_value / 8 / self.fragments

    @property
    def _fixed_seconds(self) -> float:
        """Seconds of a transfer with a link of any bandwidth."""
        legs = 2 if self.wire_pattern == "server" else 1
        return self.sync_overhead_s + legs * patterns.hops(self.wire_pattern, self.workers) * self.latency_ms / 1e3

    def _sent(self) -> Iterator[int]:
        """The local step after which each transfer is sent, ascending."""
        for start in range(self.interval, self.steps + 1, self.interval):
            for p in range(self.fragments):
                if start + self._offset(p) <= self.steps:
                    yield start + self._offset(p)
        for p in range(self.fragments):
            if self._is_left(p):
                yield self.steps

    def _offset(self, p: int) -> int:
        return p * (self.interval // self.fragments)

    def _sent_by(self, p: int) -> int:
        """How often fragment ``p`` is sent before the end."""
        return (self.steps - self._offset(p)) // self.interval

    def _is_left(self, p: int) -> bool:
        """Whether fragment ``p`` has moved at the end since it was last taken over, so that it is sent once more."""
        sent = self._sent_by(p)
        return sent < 1 or sent * self.interval + self._offset(p) + self.overlap_steps < self.steps


def transfer_seconds(plan: Plan, bandwidth_gbit_s: float) -> float:
    """R, seconds of a transfer: of the model, or of a fragment."""
    inputs.number("transfer_seconds", "bandwidth_gbit_s", bandwidth_gbit_s)
    gbit_s = bandwidth_gbit_s * plan.efficiency
    over_link = patterns.seconds(plan.wire_pattern, plan._transfer_bytes, plan.workers, gbit_s, plan.latency_ms)
    return plan.sync_overhead_s + over_link


def simulated_seconds(plan: Plan, bandwidth_gbit_s: float) -> float:
    """Seconds that the run takes, its last synchronisation included.

    >>> ten = Plan(parameters=1e9, step_seconds=0.1, steps=10_000, workers=2, latency_ms=0, interval=100)
    >>> simulated_seconds(ten, bandwidth_gbit_s=1)  # 10,000 · 0.1 s + 100 · 32 Gbit at 1 Gbit/s
    4200.0

    Args:
        plan: the run.
        bandwidth_gbit_s: 10⁹ bits per second of each link and direction.

    Raises:
        ValueError: ``bandwidth_gbit_s`` is no finite number > 0.
    """
    inputs.number("simulated_seconds", "bandwidth_gbit_s", bandwidth_gbit_s)
    return _seconds(plan, transfer_seconds(plan, bandwidth_gbit_s))[0]


def compute_utilisation(plan: Plan, bandwidth_gbit_s: float) -> float:
    """Share of the run's seconds in which workers compute: steps · T / :func:`simulated_seconds`."""
    inputs.number("compute_utilisation", "bandwidth_gbit_s", bandwidth_gbit_s)
    return plan.steps * plan.step_seconds / simulated_seconds(plan, bandwidth_gbit_s)


def bandwidth_for(utilisation: float, plan: Plan) -> float:
    """The bandwidth in Gbit/s that gives this compute utilisation: the inverse of :func:`compute_utilisation`.

    >>> ten = Plan(parameters=1e9, step_seconds=0.1, steps=10_000, workers=2, latency_ms=0, interval=100)
    >>> bandwidth_for(0.5, ten)  # a synchronisation of 32 Gbit may take as long as 100 steps
    3.2

    Args:
        utilisation: > 0 and < 1.
        plan: the run.

    Raises:
        ValueError: ``utilisation`` isn't between 0 and 1, or latency and overheads alone keep the run from it.
    """
    inputs.number("bandwidth_for", "utilisation", utilisation, "fraction")
    computing = plan.steps * plan.step_seconds
    seconds = computing / utilisation
    fixed = plan._fixed_seconds
    least, _ = _seconds(plan, fixed)
    over_link = _transfer_that_takes(plan, seconds) - fixed if seconds > least else 0.0
    if over_link <= 0:
        raise ValueError(
            f"bandwidth_for: `utilisation` (={utilisation}) must be less than {computing / least:.6g}, which latency"
            " and overheads leave to a link of any bandwidth."
        )
    at_1_gbit_s = patterns.seconds(plan.wire_pattern, plan._transfer_bytes, plan.workers, plan.efficiency, 0.0)
    return at_1_gbit_s / over_link


def _seconds(plan: Plan, transfer: float) -> tuple[float, int]:
    """Seconds of the run if each transfer takes so long, and how many transfers are waited for in them, one by one."""
    computing, first = plan.steps * plan.step_seconds, plan.first_sync_overhead_s
    if not plan.overlap_steps:
        return computing + plan.transfers * transfer + first, plan.transfers
    late = (0.0, 0)  # by how much the workers are behind a run that never waits, and the transfers in it
    link_free = (0.0, 0)
    under_way: deque[tuple[int, tuple[float, int]]] = deque()  # local step that needs it, when it arrives
    for step in plan._sent():
        while under_way and under_way[0][0] < step:
            due, (arrival, count) = under_way.popleft()
            late = max(late, (arrival - due * plan.step_seconds, count))
        start, count = max(link_free, (step * plan.step_seconds + late[0], late[1]))
        link_free = (start + transfer + first, count + 1)
        first = 0.0
        under_way.append((step + plan.overlap_steps, link_free))
    for due, (arrival, count) in under_way:  # at the end everything is waited for
        late = max(late, (arrival - min(due, plan.steps) * plan.step_seconds, count))
    return computing + late[0], late[1]


def _transfer_that_takes(plan: Plan, seconds: float) -> float:
    """The seconds of a transfer for which the run takes ``seconds``.

    The run's seconds are a convex function of them, made of straight lines: Newton's steps from above end at the root.
    """
    transfer = seconds
    while True:
        run, count = _seconds(plan, transfer)
        closer = max(0.0, transfer - (run - seconds) / max(count, 1))
        if closer >= transfer:
            return transfer
        transfer = closer
