"""Are the machines as described: their steps, their links, transfers over them, and what is refused?"""

import copy
import math
import pickle
import statistics
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.cli import LightningArgumentParser

from lightning_diloco.arguments import plain_value
from lightning_diloco.cluster import NETWORKS, PATTERNS, Cluster
from lightning_diloco.cluster.patterns import default_pattern, hops, sent_bytes

GBIT = 125_000_000  # bytes


def cluster(**others: Any) -> Cluster:
    return Cluster(**{"step_seconds": 0.5, "bandwidth_gbit_s": 1, "latency_ms": 0, **others})


# ------------------------------------------------------------------------------------------------ transfers


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_bytes_and_hops_are_those_of_a_collective_done_by_hand(workers: int) -> None:
    """Chunks of a ring, counted one by one; an all-gather passes every payload on; a server gets and gives one."""
    ring = 0.0
    for _ in ("reduce-scatter", "all-gather"):
        for _ in range(workers - 1):
            ring += 840 / workers
    assert sent_bytes("ring", 840, workers) == pytest.approx(ring, rel=1e-15)
    assert (hops("ring", workers), hops("all_gather", workers)) == (2 * (workers - 1), workers - 1)
    assert sent_bytes("all_gather", 840, workers) == 840 * len([w for w in range(workers) if w != 0])
    assert (sent_bytes("server", 840, workers), hops("server", workers)) == (840, 1)


@pytest.mark.parametrize(
    ("pattern", "workers", "gbit", "hops_on_the_way"),
    [
        ("ring", 4, 1.5, 6),
        ("ring", 2, 1, 2),
        ("all_gather", 4, 3, 3),
        ("pairs", 2, 1, 1),
        ("server", 4, 2, 2),
        ("server", 1, 2, 2),
    ],
)
def test_seconds_over_equal_links(pattern: Any, workers: int, gbit: float, hops_on_the_way: int) -> None:
    """A payload of 1 Gbit at 1 Gbit/s."""
    ids = list(range(workers))
    assert cluster().transfer_seconds(GBIT, ids, pattern) == pytest.approx(gbit, rel=1e-12)
    assert cluster(bandwidth_gbit_s=4).transfer_seconds(GBIT, ids, pattern) == pytest.approx(gbit / 4, rel=1e-12)
    assert cluster(efficiency=0.5).transfer_seconds(GBIT, ids, pattern) == pytest.approx(gbit * 2, rel=1e-12)
    late = cluster(latency_ms=100).transfer_seconds(GBIT, ids, pattern)
    assert late == pytest.approx(gbit + 0.1 * hops_on_the_way, rel=1e-12)
    costly = cluster(sync_overhead_s=0.25, first_sync_overhead_s=3)
    assert costly.transfer_seconds(GBIT, ids, pattern) == pytest.approx(gbit + 0.25, rel=1e-12)
    assert costly.transfer_seconds(GBIT, ids, pattern, first=True) == pytest.approx(gbit + 3.25, rel=1e-12)


@pytest.mark.parametrize("pattern", ["ring", "all_gather", "pairs"])
def test_a_worker_alone_has_nothing_to_send(pattern: Any) -> None:
    costly = cluster(latency_ms=100, sync_overhead_s=1, first_sync_overhead_s=1)
    assert costly.transfer_seconds(GBIT, [0], pattern, first=True) == 0


def test_the_slowest_link_decides() -> None:
    """Links of workers 0, 1, 2: 4, 2, 8 Gbit/s, 30, 10, 20 ms; worker 1 is in every ring but that of 0 and 2."""
    mixed = cluster(bandwidth_gbit_s=[4, 2, 8], latency_ms=[30, 10, 20])
    assert mixed.transfer_seconds(GBIT, [0, 1, 2], "ring") == pytest.approx(4 / 3 / 2 + 4 * 0.03, rel=1e-12)
    assert mixed.transfer_seconds(GBIT, [0, 2], "ring") == pytest.approx(1 / 4 + 2 * 0.03, rel=1e-12)
    assert mixed.transfer_seconds(GBIT, [1, 2], "pairs") == pytest.approx(1 / 2 + 0.02, rel=1e-12)
    assert mixed.transfer_seconds(GBIT, [0, 1, 2], "server") == pytest.approx(2 * (1 / 2 + 0.01), rel=1e-12)
    assert mixed.transfer_seconds(GBIT, [0, 2], "all_gather") == pytest.approx(1 / 4 + 0.03, rel=1e-12)
    small = mixed.transfer_seconds(125, [0, 1, 2], "server")  # 1 kbit: the latency of worker 0 decides
    assert small == pytest.approx(2 * (1e-6 / 4 + 0.03), rel=1e-12)


def test_sending_may_be_slower_than_receiving() -> None:
    home = cluster(bandwidth_gbit_s=[1, 2], upload_gbit_s=[0.5, 0.1])
    assert home.link(0, 1) == (0.5, 0)
    assert home.link(1, 0) == (0.1, 0)
    assert home.transfer_seconds(GBIT, [0, 1], "pairs") == pytest.approx(10, rel=1e-12)
    assert home.transfer_seconds(GBIT, [0, 1], "server") == pytest.approx(10 + 1, rel=1e-12)
    assert home.transfer_seconds(GBIT, [0], "server") == pytest.approx(2 + 1, rel=1e-12)
    assert cluster(upload_gbit_s=4).link(0, 1) == (1, 0)


def test_a_matrix_is_read_from_sender_to_receiver() -> None:
    """Row: sends. The ring 0 → 1 → 2 → 0 has 1, 2, 4 Gbit/s; the other way round 8, 16, 32."""
    bandwidths = [[0, 1, 8], [32, 0, 2], [4, 16, 0]]
    latencies = [[0, 10, 50], [70, 0, 20], [30, 60, 0]]
    directed = cluster(bandwidth_gbit_s=bandwidths, latency_ms=latencies)
    assert (directed.link(0, 1), directed.link(1, 0)) == ((1, 10), (32, 70))
    assert directed.transfer_seconds(GBIT, [0, 1, 2], "ring") == pytest.approx(4 / 3 / 1 + 4 * 0.03, rel=1e-12)
    assert directed.transfer_seconds(GBIT, [2, 1, 0], "ring") == pytest.approx(4 / 3 / 8 + 4 * 0.07, rel=1e-12)
    assert directed.transfer_seconds(GBIT, [0, 1], "pairs") == pytest.approx(max(1 + 0.01, 1 / 32 + 0.07), rel=1e-12)
    small = directed.transfer_seconds(125_000, [0, 1], "pairs")  # 1 Mbit: the latency from 1 to 0 decides
    assert small == pytest.approx(1e-3 / 32 + 0.07, rel=1e-12)


@pytest.mark.parametrize(
    ("coded", "group_size", "expected"),
    [(False, None, "ring"), (True, None, "all_gather"), (False, 2, "pairs"), (True, 2, "pairs"), (False, 3, "ring")],
)
def test_the_pattern_follows_the_kind_of_transfer_unless_it_is_given(
    coded: bool, group_size: int | None, expected: str
) -> None:
    assert default_pattern(coded, group_size) == expected
    assert cluster().pattern_for(coded, group_size) == expected
    assert cluster(pattern="server").pattern_for(coded, group_size) == "server"


# ------------------------------------------------------------------------------------------------ steps


def test_seconds_of_a_step() -> None:
    assert cluster().seconds_of_step(worker=3, step=7) == 0.5
    assert cluster(step_seconds=[0.5, 2]).seconds_of_step(1, 1) == 2
    assert cluster(step_seconds="measured").with_step_seconds([1, 3]).seconds_of_step(1, 1) == 3


def test_jitter_is_a_seeded_lognormal_factor_with_mean_one() -> None:
    noisy = cluster(jitter=0.3)
    draws = [noisy.seconds_of_step(w, s) for w in range(12) for s in range(1000)]
    logs = [math.log(x / 0.5) for x in draws]
    assert statistics.fmean(draws) == pytest.approx(0.5, rel=0.01)
    assert statistics.fmean(logs) == pytest.approx(-0.045, abs=0.01)
    assert statistics.stdev(logs) == pytest.approx(0.3, rel=0.02)
    assert len(set(draws)) == len(draws)
    assert sum((x > 0) == (y > 0) for x, y in zip(logs[:1000], logs[1000:2000], strict=True)) == pytest.approx(500, 60)
    again = cluster(jitter=0.3)
    assert again.seconds_of_step(3, 5) == draws[3005]  # whoever asks, in whatever order
    assert replace(again, seed=1).seconds_of_step(3, 5) != draws[3005]


def test_the_draws_are_the_same_everywhere() -> None:
    """Numbers of this version, so that a schedule means the same on another machine."""
    drawn = [cluster(jitter=0.5, seed=3).seconds_of_step(w, s) for w, s in [(0, 1), (1, 1), (0, 2)]]
    assert drawn == pytest.approx([0.4477474794987104, 0.38097441732933457, 0.4414330031781098], rel=1e-12)


# ------------------------------------------------------------------------------------------------ as a value


def test_presets_are_the_published_networks() -> None:
    """2503.09799, Appendix A: 400 Gbit/s and 1e-4 s, 100 and 1e-3, 10 and 1e-2."""
    assert NETWORKS == {"high": (400, 0.1), "medium": (100, 1), "low": (10, 10)}
    for name in ("high", "medium", "low"):
        preset = getattr(Cluster, name)([1, 2])
        assert preset == Cluster([1, 2], *NETWORKS[name])
    two = Cluster.datacentres(0.1, workers=[2, 1], within="high", across="low")
    two.check(3)
    assert (two.link(0, 1), two.link(1, 2), two.link(2, 0)) == ((400, 0.1), (10, 10), (10, 10))


def test_a_cluster_reads_well_and_evaluates_to_itself() -> None:
    plain = cluster()
    assert repr(plain) == "Cluster(step_seconds=0.5, bandwidth_gbit_s=1.0, latency_ms=0.0)"
    full = cluster(step_seconds=[1, 2], upload_gbit_s=0.5, pattern="ring", efficiency=0.9, jitter=0.1, seed=4)
    assert repr(full) == (
        "Cluster(step_seconds=(1.0, 2.0), bandwidth_gbit_s=1.0, latency_ms=0.0, upload_gbit_s=0.5, pattern='ring',"
        " efficiency=0.9, jitter=0.1, seed=4)"
    )
    for value in (plain, full, Cluster.datacentres("measured", [1, 2])):
        assert eval(repr(value)) == value
        assert pickle.loads(pickle.dumps(value)) == copy.deepcopy(value) == value
        assert plain_value(value) == repr(value)  # what runs are compared by


def test_arrays_and_integers_are_the_same_setting_as_floats() -> None:
    for other in (np.array([1, 2]), torch.tensor([1.0, 2.0]), (1, 2), [np.float32(1), 2]):
        assert cluster(step_seconds=other) == cluster(step_seconds=[1.0, 2.0])
    assert cluster(bandwidth_gbit_s=torch.ones(2, 2)) == cluster(bandwidth_gbit_s=[[1, 1], [1, 1]])
    assert cluster(seed=np.int64(3)) == cluster(seed=3)


def test_it_is_made_from_yaml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # of Lightning's own use of it
    parser = LightningArgumentParser()
    parser.add_class_arguments(Cluster, "cluster")
    given = {
        "cluster": {
            "step_seconds": "measured",
            "bandwidth_gbit_s": [[1, 2], [3, 4]],
            "latency_ms": [5, 6.5],
            "pattern": "ring",
            "jitter": 0.1,
        }
    }
    made = parser.instantiate_classes(parser.parse_object(given)).cluster
    assert made == Cluster("measured", [[1, 2], [3, 4]], [5, 6.5], pattern="ring", jitter=0.1)


class WithCluster:
    """Something that takes a cluster, as a strategy does."""

    def __init__(self, cluster: Cluster | None = None) -> None:
        self.cluster = cluster


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"step_seconds": 1, "bandwidth_gbit_s": 2, "latency_ms": 3}, Cluster(1, 2, 3)),
        ({"class_path": "lightning_diloco.cluster.Cluster.low", "init_args": {"step_seconds": 1}}, Cluster.low(1)),
        (
            {
                "class_path": "lightning_diloco.cluster.Cluster.datacentres",
                "init_args": {"step_seconds": "measured", "workers": [1, 2], "across": "medium"},
            },
            Cluster.datacentres("measured", [1, 2], across="medium"),
        ),
    ],
)
def test_an_argument_for_a_cluster_takes_yaml_and_presets(
    given: dict[str, Any], expected: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    parser = LightningArgumentParser()
    parser.add_class_arguments(WithCluster, "strategy")
    made = parser.instantiate_classes(parser.parse_object({"strategy": {"cluster": given}})).strategy
    assert made.cluster == expected


# ------------------------------------------------------------------------------------------------ what is refused

POSITIVE, NOT_NEGATIVE = "must be a finite number > 0", "must be a finite number ≥ 0"
OR_A_LIST = ", or a list with one per worker."


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *[
            ({name: value}, f"Cluster: `{name}` (={value!r}) {POSITIVE}{OR_A_LIST}")
            for name in ("step_seconds", "bandwidth_gbit_s")
            for value in (0, -1, math.inf, math.nan, None, True)
        ],
        *[
            ({"latency_ms": value}, f"Cluster: `latency_ms` (={value!r}) {NOT_NEGATIVE}{OR_A_LIST}")
            for value in (-0.1, math.inf, None, "10 ms")
        ],
        ({"upload_gbit_s": 0}, f"Cluster: `upload_gbit_s` (=0) {POSITIVE}{OR_A_LIST}"),
        ({"step_seconds": [1, 0]}, f"Cluster: `step_seconds[1]` (=0) {POSITIVE}."),
        ({"bandwidth_gbit_s": [[1, math.nan], [1, 1]]}, f"Cluster: `bandwidth_gbit_s[0][1]` (=nan) {POSITIVE}."),
        ({"bandwidth_gbit_s": [[-1, 1], [1, 1]]}, f"Cluster: `bandwidth_gbit_s[0][0]` (=-1) {NOT_NEGATIVE}."),
        (
            {"step_seconds": "fast"},
            "Cluster: `step_seconds` (='fast') must be a number of seconds, a list with one per worker, or 'measured'.",
        ),
        (
            {"step_seconds": []},
            "Cluster: `step_seconds` (=[]) must be one number or a list with one number per worker.",
        ),
        (
            {"step_seconds": [[1, 2], [3, 4]]},
            "Cluster: `step_seconds` (=[[1, 2], [3, 4]]) must be one number or a list with one number per worker.",
        ),
        (
            {"latency_ms": [[1, 2], [3]]},
            "Cluster: `latency_ms` has 2 rows of lengths [2, 1]. A matrix must be square: row i, column j is the link"
            " from worker i to worker j.",
        ),
        (
            {"latency_ms": [[1, 2], 3]},
            "Cluster: `latency_ms` has 2 rows of lengths [2, 'no list']. A matrix must be square: row i, column j is"
            " the link from worker i to worker j.",
        ),
        (
            {"upload_gbit_s": 1, "bandwidth_gbit_s": [[1, 2], [3, 4]]},
            "Cluster: `upload_gbit_s` can't be combined with a matrix of `bandwidth_gbit_s`, which has both directions"
            " already: row i, column j is the link from worker i to worker j.",
        ),
        (
            {"pattern": "star"},
            "Cluster: `pattern` (='star') must be one of 'ring', 'server', 'all_gather', 'pairs', or None.",
        ),
        (
            {"pattern": "server", "latency_ms": [[1, 2], [3, 4]]},
            "Cluster: `pattern` is 'server', but `latency_ms` is a matrix between workers, which has no link to a"
            " server. Give one number, or one per worker.",
        ),
        ({"efficiency": 0}, "Cluster: `efficiency` (=0) must be a number > 0 and ≤ 1."),
        ({"efficiency": 1.01}, "Cluster: `efficiency` (=1.01) must be a number > 0 and ≤ 1."),
        ({"sync_overhead_s": -1}, f"Cluster: `sync_overhead_s` (=-1) {NOT_NEGATIVE}."),
        ({"first_sync_overhead_s": math.nan}, f"Cluster: `first_sync_overhead_s` (=nan) {NOT_NEGATIVE}."),
        ({"jitter": math.inf}, f"Cluster: `jitter` (=inf) {NOT_NEGATIVE}."),
        ({"seed": 1.5}, "Cluster: `seed` (=1.5) must be an integer ≥ 0."),
        ({"seed": -1}, "Cluster: `seed` (=-1) must be an integer ≥ 0."),
    ],
)
def test_what_is_no_cluster_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        cluster(**arguments)
    assert str(error.value) == message


def test_nothing_missing_counts_as_zero() -> None:
    with pytest.raises(TypeError, match="missing 2 required positional arguments: 'bandwidth_gbit_s' and 'latency_ms'"):
        Cluster(0.1)
    with pytest.raises(ValueError) as error:
        cluster(step_seconds="measured").seconds_of_step(0, 1)
    assert str(error.value) == (
        "Cluster: `step_seconds` is 'measured', and nothing was measured yet. Use `with_step_seconds(...)`."
    )


@pytest.mark.parametrize(
    ("arguments", "described"),
    [
        ({"step_seconds": [1, 2]}, "`step_seconds` has 2 numbers"),
        ({"latency_ms": [1] * 4}, "`latency_ms` has 4 numbers"),
        ({"upload_gbit_s": [1]}, "`upload_gbit_s` has 1 numbers"),
        ({"bandwidth_gbit_s": [[1, 2], [3, 4]]}, "`bandwidth_gbit_s` has a 2 × 2 matrix"),
    ],
)
def test_there_is_a_value_for_every_worker(arguments: dict[str, Any], described: str) -> None:
    with pytest.raises(ValueError) as error:
        cluster(**arguments).check(3)
    assert str(error.value) == (
        f"Cluster: {described}, but there are 3 workers. Give one number for all, or a list with 3."
    )
    cluster(**arguments).check(len(next(iter(arguments.values()))))
    cluster().check(3)


def test_a_worker_without_a_link_is_refused() -> None:
    with pytest.raises(ValueError) as error:
        cluster(bandwidth_gbit_s=[1, 2]).transfer_seconds(1, [1, 2], "ring")
    assert str(error.value) == "Cluster: worker 2 has no `bandwidth_gbit_s`, which has 2: the workers are 0 to 1."
    with pytest.raises(ValueError, match=r"^Cluster: worker -1 has no `step_seconds`, which has 2: "):
        cluster(step_seconds=[1, 2]).seconds_of_step(-1, 1)


@pytest.mark.parametrize(
    ("workers", "pattern", "message"),
    [
        ([], "ring", "A transfer has 0 workers; it must have one at least."),
        ([0, 1], "star", f"`pattern` (='star') must be one of {', '.join(map(repr, PATTERNS))}."),
        (
            [0, 1, 2],
            "pairs",
            "`pattern` is 'pairs', but 3 workers take part in one mean. Pairs need groups of two; for means over more"
            " workers use 'ring', 'server' or 'all_gather'.",
        ),
    ],
)
def test_transfers_that_can_not_be_are_refused(workers: list[int], pattern: Any, message: str) -> None:
    with pytest.raises(ValueError) as error:
        cluster().transfer_seconds(1, workers, pattern)
    assert str(error.value) == message


def test_a_matrix_has_no_server() -> None:
    with pytest.raises(
        ValueError, match=r"^Cluster: `pattern` is 'server', but `bandwidth_gbit_s` is a matrix between"
    ):
        cluster(bandwidth_gbit_s=[[1, 2], [3, 4]]).transfer_seconds(1, [0, 1], "server")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"workers": [1], "across": "slow"},
            "Cluster.datacentres: `across` (='slow') must be one of 'high', 'medium', 'low'.",
        ),
        ({"workers": [2, 0]}, "Cluster.datacentres: `workers[1]` (=0) must be an integer ≥ 1."),
        ({"workers": []}, "Cluster.datacentres: `workers` (=[]) must have the number of workers of each datacentre."),
    ],
)
def test_datacentres_that_can_not_be_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        Cluster.datacentres(0.1, **arguments)
    assert str(error.value) == message
