"""Random runs on random clusters, told to a clock and to the event simulation alike."""

import random
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from event_simulation import EventSimulation

from lightning_diloco.cluster.clock import Clock
from lightning_diloco.cluster.cluster import Cluster
from lightning_diloco.cluster.patterns import Pattern
from lightning_diloco.cluster.schedule import Schedule


def random_cluster(draw: random.Random, n: int, pattern: Pattern | None = None, **others: Any) -> Cluster:
    """Speeds and links of every shape: one number, one per worker, a matrix."""

    def per_link(least: float, most: float, shapes: Sequence[str]) -> Any:
        shape = draw.choice(shapes)
        row = [draw.uniform(least, most) for _ in range(n)]
        matrix = [[draw.uniform(least, most) for _ in range(n)] for _ in range(n)]
        return {"number": draw.uniform(least, most), "row": row, "matrix": matrix}[shape]

    shapes = ["number", "row"] if pattern == "server" else ["number", "row", "matrix"]
    bandwidth = per_link(0.01, 2.0, shapes)
    asymmetric = draw.random() < 0.3 and not (isinstance(bandwidth, list) and isinstance(bandwidth[0], list))
    arguments = {
        "step_seconds": per_link(0.05, 1.0, ["number", "row"]),
        "bandwidth_gbit_s": bandwidth,
        "latency_ms": per_link(0.0, 50.0, shapes),
        "upload_gbit_s": per_link(0.01, 2.0, ["number", "row"]) if asymmetric else None,
        "pattern": pattern,
        "efficiency": draw.choice([1.0, draw.uniform(0.5, 1.0)]),
        "sync_overhead_s": draw.choice([0.0, draw.uniform(0.0, 0.5)]),
        "first_sync_overhead_s": draw.choice([0.0, draw.uniform(0.0, 0.5)]),
        "jitter": draw.choice([0.0, draw.uniform(0.05, 1.0)]),
        "seed": draw.randrange(1000),
    }
    return Cluster(**{**arguments, **others})


def random_groups(draw: random.Random, workers: Sequence[int]) -> list[list[int]]:
    """Everybody, some, or some in several groups."""
    chosen = sorted(draw.sample(workers, draw.randint(1, len(workers)))) if draw.random() < 0.5 else list(workers)
    if draw.random() < 0.6:
        return [chosen]
    draw.shuffle(chosen)
    cuts = sorted(draw.sample(range(1, len(chosen)), draw.randint(0, min(2, len(chosen) - 1))))
    return [chosen[a:b] for a, b in zip([0, *cuts], [*cuts, len(chosen)], strict=True)]


class Scenario:
    """A clock and the programs of the event simulation that say the same; what happens is random.

    Who is there, takes part and is late is random, too, or follows from a schedule.

    Attributes:
        clock: has been told everything.
        run: programs and transfers of the run.
        parallel: those of data parallelism.
    """

    def __init__(
        self,
        seed: int,
        n: int,
        steps: int,
        presence: bool = False,
        record: bool = False,
        schedule: Schedule | None = None,
    ) -> None:
        draw = random.Random(seed)
        pattern: Pattern | None = draw.choice([None, None, "ring", "server", "all_gather"])
        self.n, self.cluster, self.draw = n, random_cluster(draw, n, pattern), draw
        self.lateness: dict[tuple[int, int], float] = {}
        self.gradient_bytes = draw.randrange(1, 10_000_000)
        self.clock = self.new_clock(record)
        self.run: tuple[list[list[tuple]], dict] = ([[] for _ in range(n)], {})
        self.parallel: tuple[list[list[tuple]], dict] = ([[] for _ in range(n)], {})
        self._connected = {"run": set(), "parallel": set()}
        self._due: dict[int, list[tuple[str, list[list[int]]]]] = defaultdict(list)
        self._alive = list(range(n))
        self._presence, self._schedule = presence, schedule
        for step in range(1, steps + 1):
            self.step(step)

    def new_clock(self, record: bool = False) -> Clock:
        return Clock(self.cluster, self.n, gradient_bytes=self.gradient_bytes, late=self.late, record=record)

    def late(self, step: int, worker: int) -> float:
        return self.lateness.get((step, worker), 0.0)

    def step(self, step: int) -> None:
        draw = self.draw
        if self._schedule is not None:
            for w in self._schedule.joins(step):
                self._join(step, w, self._schedule.donor(step, w))
            self._alive = active = self._schedule.alive(step)
            self.lateness |= {(step, w): self._schedule.lateness(step, w) for w in active}
        else:
            active = self._invent(step)
        self.clock.step(step, active)
        for programs, _ in (self.run, self.parallel):
            for w in active:
                programs[w].append(("computing", self.cluster.seconds_of_step(w, step)))
                programs[w].append(("late", self.lateness.get((step, w), 0.0)))
        pattern = self.cluster.pattern or "ring"
        ids = self._post("parallel", f"gradients {step}", self.gradient_bytes, [active], pattern)
        self._wait("parallel", ids, active)
        for i in range(draw.choice([0, 0, 1, 1, 2])):
            groups = random_groups(draw, self._alive)
            if self._schedule is not None:
                groups = [self._schedule.participants(step, list(range(self.n)))]
                if groups == [[]]:
                    continue
            pairs = self.cluster.pattern is None and max(map(len, groups)) <= 2
            pattern = self.cluster.pattern or ("pairs" if pairs else draw.choice(["ring", "all_gather"]))
            key, nbytes = f"{step}/{i}", draw.choice([0, draw.randrange(30_000_000)])
            self.clock.send(key, nbytes, groups, step, pattern)
            ids = self._post("run", key, nbytes, groups, pattern)
            self._due[step + draw.choice([0, 0, 1, 2, 5])].append((key, ids))
        for key, ids in self._due.pop(step, []):
            takers = sorted(draw.sample(self._alive, draw.randint(0, len(self._alive))))
            self.clock.arrive(key, takers, step)
            self._wait("run", ids, takers)

    def _invent(self, step: int) -> list[int]:
        """Somebody joins or leaves, some are late; the workers that take the step."""
        draw, absent = self.draw, [w for w in range(self.n) if w not in self._alive]
        if self._presence and draw.random() < 0.2:
            if absent and draw.random() < 0.5:
                w = draw.choice(absent)
                self._join(step, w, draw.choice(self._alive))
                self._alive = sorted([*self._alive, w])
            elif len(self._alive) > 1:
                self._alive.remove(draw.choice(self._alive))
        some = sorted(draw.sample(self._alive, draw.randint(1, len(self._alive))))
        active = list(self._alive) if draw.random() < 0.8 else some
        self.lateness |= {(step, w): draw.uniform(0.0, 2.0) for w in active if draw.random() < 0.1}
        return active

    def _join(self, step: int, w: int, donor: int) -> None:
        nbytes = {"run": self.draw.randrange(50_000_000), "parallel": self.draw.randrange(50_000_000)}
        self.clock.join(w, donor, nbytes["run"], step, nbytes["parallel"])
        for of, (programs, transfers) in (("run", self.run), ("parallel", self.parallel)):
            self._connected[of].discard(w)
            key = "join", w, step
            transfers[key] = [donor, w], self._seconds(of, nbytes[of], [donor, w], "pairs")
            programs[donor].append(("post", key))
            programs[w] += [("away", key, donor), ("post", key), ("wait", key)]

    def _seconds(self, of: str, nbytes: int, group: Sequence[int], pattern: Pattern) -> float:
        first = any(w not in self._connected[of] for w in group)
        seconds = self.cluster.transfer_seconds(nbytes, group, pattern, first)
        if seconds:
            self._connected[of] |= set(group)
        return seconds

    def _post(self, of: str, key: str, nbytes: int, groups: list[list[int]], pattern: Pattern) -> list[tuple]:
        programs, transfers = getattr(self, of)
        ids = []
        for g, group in enumerate(groups):
            ids.append((key, g))
            transfers[key, g] = group, self._seconds(of, nbytes, group, pattern)
            for w in group:
                programs[w].append(("post", (key, g)))
        return ids

    def _wait(self, of: str, ids: list[tuple], workers: Sequence[int]) -> None:
        programs, transfers = getattr(self, of)
        for w in workers:
            own = [i for i in ids if w in transfers[i][0]]
            programs[w] += [("wait", i) for i in own or ids]

    def simulated(self, of: str) -> EventSimulation:
        """The oracle's answer."""
        return EventSimulation(*getattr(self, of))
