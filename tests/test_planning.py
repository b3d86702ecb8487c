"""Do the planning functions agree with closed forms, a simulation step by step, real runs' ledgers, and by hand?"""

import math
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers import trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_diloco.__main__ as command_line
from lightning_diloco import Diloco, DilocoStrategy, StreamingDiloco
from lightning_diloco.cluster import Cluster
from lightning_diloco.cluster.planning import (
    Plan,
    bandwidth_for,
    compute_utilisation,
    simulated_seconds,
    transfer_seconds,
)

BASE: dict[str, Any] = {"parameters": 1e9, "step_seconds": 0.1, "steps": 1000, "workers": 4, "latency_ms": 0.0}


def step_by_step(plan: Plan, transfer: float) -> tuple[float, int]:
    """Seconds and number of transfers, by a loop over local steps as ``StreamingDiloco`` runs them."""
    now = link_free = 0.0
    gap = plan.interval // plan.fragments
    sent_at = [0] * plan.fragments
    needed: list[tuple[int, float]] = []
    count = 0

    def send() -> None:
        nonlocal link_free, count
        link_free = max(now, link_free) + transfer + (plan.first_sync_overhead_s if count == 0 else 0)
        count += 1

    for step in range(1, plan.steps + 1):
        now += plan.step_seconds
        for p in range(plan.fragments):
            done = step - p * gap
            if done > 0 and done % plan.interval == 0:
                send()
                needed.append((step + plan.overlap_steps, link_free))
                sent_at[p] = step
        for due, arrival in needed:
            if due == step:
                now = max(now, arrival)
    now = max([now, *(arrival for _, arrival in needed)])  # the flush takes in what is under way
    for p in range(plan.fragments):
        if not sent_at[p] or sent_at[p] + plan.overlap_steps < plan.steps:  # it has moved since it was taken over
            send()
    return max(now, link_free), count


def drawn(seed: int) -> tuple[Plan, float]:
    """A random plan, and a bandwidth at which it is neither idle nor stuck."""
    draw = random.Random(seed)
    interval = draw.choice([1, 2, 7, 20])
    plan = Plan(
        parameters=draw.uniform(1e6, 1e9),
        step_seconds=draw.uniform(0.01, 2),
        steps=draw.randint(1, 150),
        workers=draw.randint(2, 9),
        latency_ms=draw.choice([0.0, 30.0]),
        interval=interval,
        fragments=draw.randint(1, interval),
        overlap_steps=draw.choice([0, draw.randint(0, interval - 1)]),
        bits_per_value=draw.choice([32, 16, 4]),
        pattern=draw.choice([None, "ring", "server", "all_gather"]),
        efficiency=draw.choice([1.0, 0.8]),
        sync_overhead_s=draw.choice([0.0, 0.02]),
        first_sync_overhead_s=draw.choice([0.0, 0.5]),
    )
    return plan, plan.parameters * plan.bits_per_value / 1e9 / plan.step_seconds * 10 ** draw.uniform(-2, 1)


@pytest.mark.parametrize("seed", range(150))
def test_the_functions_agree_with_a_simulation_step_by_step(seed: int) -> None:
    plan, bandwidth = drawn(seed)
    expected, count = step_by_step(plan, transfer_seconds(plan, bandwidth))
    assert simulated_seconds(plan, bandwidth) == pytest.approx(expected, rel=1e-12)
    assert plan.transfers == count
    assert compute_utilisation(plan, bandwidth) == pytest.approx(plan.steps * plan.step_seconds / expected, rel=1e-12)


@pytest.mark.parametrize("seed", range(150))
def test_bandwidth_for_is_the_inverse_and_utilisation_rises_with_bandwidth(seed: int) -> None:
    plan, bandwidth = drawn(seed)
    curve = [compute_utilisation(plan, bandwidth * 1.3**i) for i in range(-10, 11)]
    assert curve == sorted(curve)
    limit = compute_utilisation(plan, bandwidth * 1e15)
    for share in (0.01, 0.3, 0.5, 0.9, 0.99, 0.9999):
        if share < limit:
            found = bandwidth_for(share, plan)
            assert compute_utilisation(plan, found) == pytest.approx(share, rel=1e-10)
            assert compute_utilisation(plan, 0.99 * found) < share


@pytest.mark.parametrize("interval", [1, 10, 300])
def test_the_closed_forms_of_the_scaling_laws_paper(interval: int) -> None:
    """2503.09799, Appendix A: all-reduce over R: 2·N_bits/W·(1 − 1/R) + ε, in every step or every H steps.

    The paper's ε is that of a whole all-reduce; a ring has 2(R − 1) hops.
    """
    n_bits, bandwidth, latency, steps, workers = 1e9 * 32, 10e9, 1e-2, 900, 8
    all_reduce = 2 * n_bits / bandwidth * (1 - 1 / workers) + latency
    plan = Plan(1e9, 0.1, steps, workers, latency_ms=1e3 * latency / (2 * (workers - 1)), interval=interval)
    expected = steps * 0.1 + steps / interval * all_reduce
    assert simulated_seconds(plan, 10) == pytest.approx(expected, rel=1e-12)
    assert compute_utilisation(plan, 10) == pytest.approx(90 / expected, rel=1e-12)
    streaming = replace(plan, fragments=min(interval, 5), latency_ms=0)
    assert simulated_seconds(streaming, 10) == pytest.approx(expected - steps / interval * latency, rel=1e-12)


@pytest.mark.parametrize(("megabits", "overlap"), [(1, 1), (99, 1), (130, 1), (250, 1), (130, 3), (350, 3), (50, 3)])
def test_overlap_hides_the_smaller_of_its_steps_and_the_transfer(megabits: float, overlap: int) -> None:
    """Transfers further apart than they take; two workers, 1 Gbit/s: a transfer takes ``megabits`` / 1000 s."""
    without = Plan(megabits * 1e6 / 32, 0.1, 200, 2, 0, interval=10)
    seconds, transfers = megabits / 1e3, 20
    assert transfer_seconds(without, 1) == pytest.approx(seconds, rel=1e-12)
    saved = simulated_seconds(without, 1) - simulated_seconds(replace(without, overlap_steps=overlap), 1)
    assert saved == pytest.approx((transfers - 1) * min(overlap * 0.1, seconds), rel=1e-9)  # nothing hides the last


def test_limits() -> None:
    plan = Plan(**BASE, interval=10, fragments=5, overlap_steps=2)
    for some in (plan, replace(plan, overlap_steps=0), replace(plan, interval=1, fragments=1, overlap_steps=0)):
        assert compute_utilisation(some, 1e15) == pytest.approx(1, abs=1e-9)
        link_alone = some.transfers * transfer_seconds(some, 1e-6)
        assert simulated_seconds(some, 1e-6) == pytest.approx(link_alone, rel=1e-6)
    slow = replace(plan, latency_ms=1e3)  # six hops of 1 s, one after another from the end of step 10 on
    assert simulated_seconds(slow, 1e15) == pytest.approx(10 * 0.1 + slow.transfers * 6, rel=1e-12)
    assert bandwidth_for(0.9, replace(plan, efficiency=0.5)) == pytest.approx(2 * bandwidth_for(0.9, plan), rel=1e-12)


def test_bytes_are_those_of_the_patterns() -> None:
    """1e9 float32 values: 4 GB; 1,000 steps with H = 300: after 300, 600, 900 and at the end."""
    plan = Plan(**BASE, interval=300)
    assert (plan.rounds, plan.transfers, plan.payload_bytes) == (4, 4, 16e9)
    for pattern, factor in {"ring": 1.5, "server": 1, "all_gather": 3}.items():
        assert replace(plan, pattern=pattern).wire_bytes == factor * 16e9
    four_bits = replace(plan, bits_per_value=4)
    assert (four_bits.payload_bytes, four_bits.wire_bytes, four_bits.wire_pattern) == (2e9, 6e9, "all_gather")
    assert replace(plan, bits_per_value=16).wire_pattern == "ring"


class Halves(L.LightningModule):
    """Two layers with equally many parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.layers(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("steps", [3, 5, 7, 10, 12, 23])
@pytest.mark.parametrize(("fragments", "overlap"), [(1, 0), (2, 0), (2, 1), (2, 4)])
def test_a_real_run_sends_what_the_plan_says(steps: int, fragments: int, overlap: int) -> None:
    algorithm = Diloco() if fragments == 1 else StreamingDiloco(fragments, overlap)
    strategy = DilocoStrategy(num_nodes=2, diloco_interval=5, algorithm=algorithm)
    data = DataLoader(TensorDataset(torch.ones(64, 4)), batch_size=1)
    trainer(strategy, max_epochs=1, max_steps=steps).fit(Halves(), data)
    plan = Plan(32, 0.1, steps, 2, 0, interval=5, fragments=fragments, overlap_steps=overlap)
    entries = [entry for entry in strategy.ledger.entries if entry.payload_bytes]
    assert strategy.ledger.total_bytes == plan.payload_bytes
    assert [entry.local_step for entry in entries] == list(plan._sent())


def test_equal_workers_of_a_cluster_have_the_plans_transfers() -> None:
    cluster = Cluster(0.1, bandwidth_gbit_s=2, latency_ms=5, efficiency=0.9, sync_overhead_s=0.1)
    for pattern in ("ring", "server", "all_gather"):
        plan = Plan(1e6, 0.1, 10, 4, 5, pattern=pattern, efficiency=0.9, sync_overhead_s=0.1)
        expected = cluster.transfer_seconds(4_000_000, range(4), pattern)
        assert transfer_seconds(plan, 2) == pytest.approx(expected, rel=1e-12)


# ------------------------------------------------------------------------------------------------ the command line

COMMAND = "plan --parameters 1e9 --step-seconds 0.1 --bandwidth-gbit-s 1 --interval 100 --workers 4 --steps 10000"


def test_the_printed_plan_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    """A ring of four sends 1.5 · 32 Gbit = 48 Gbit per synchronisation, 48 s; 10,000 steps take 1,000 s.

    Data parallel: 10,000 · 48 s + 1,000 s = 481,000 s. At u it may spend 0.1 s · (1/u − 1) per step on 48 Gbit: 480
    Gbit/s for 50 %, and 4, 9, 19, 99 times that. DiLoCo: 100 · 48 s + 1,000 s = 5,800 s; a hundredth of the bandwidth.

    Ten fragments, every tenth step one of 4.8 Gbit. 990 of them, sent after steps 100 to 9,990, hide a step of 0.1 s.
    The one after step 10,000 and the nine that have moved since then are waited for: 1,000 + 990 · (R − 0.1) + 10 · R
    seconds, 5,701 for R = 4.8. At u that is 1,000 / u: R = 1.099, 0.349, …, and 4.8 / R Gbit/s. Four bits in an
    all-gather: 3 · 0.4 Gbit, a quarter of 4.8 Gbit: R = 1.2 and 2,101 s; a quarter of the bandwidths.
    """
    assert command_line.main(f"{COMMAND} --fragments 10 --overlap 1".split()) is None
    assert capsys.readouterr().out == (
        """\
1,000,000,000 parameters, 4 workers, 10,000 local steps of 0.1 s, which take 1,000 s without communication
links: 1 Gbit/s, 0 ms

                                                                                           Gbit/s for a utilisation of
                         bits  pattern     rounds   GB sent    seconds  utilisation   50%    80%    90%    95%     99%
data parallel            32    ring        10,000  60,000.0  481,000.0         0.2%   480  1,920  4,320  9,120  47,520
DiLoCo, H = 100          32    ring           100     600.0    5,800.0        17.2%  4.80   19.2   43.2   91.2     475
streaming, 10 fragments  32    ring           100     600.0    5,800.0        17.2%  4.80   19.2   43.2   91.2     475
+ overlap of 1 step      32    ring           100     600.0    5,701.0        17.5%  4.37   13.8   22.8   31.7    44.0
+ 4 bits                 4     all_gather     100     150.0    2,101.0        47.6%  1.09   3.44   5.71   7.91    11.0
"""
    )


def test_the_guides_plan_is_what_its_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    guide = (Path(__file__).parent.parent / "examples" / "guides" / "clock.md").read_text()
    command = re.search(r"^```sh plan\npython -m lightning_diloco (.*?)\n```$", guide, re.MULTILINE)[1]
    command_line.main(command.split())
    assert f"```text plan\n{capsys.readouterr().out}```\n" in guide


def test_the_plan_with_overheads_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    """H = 2: five rounds of 1.5 · 32 Mbit at 0.8 Gbit/s, 0.06 s, of 6 · 10 ms and 0.1 s, once 1 s; and 1 s of steps."""
    args = "plan --parameters 1e6 --step-seconds 0.1 --bandwidth-gbit-s 1 --interval 2 --steps 1e1 --latency-ms 10"
    more = "--efficiency 0.8 --sync-overhead-s 0.1 --first-sync-overhead-s 1"
    command_line.main(f"{args} {more}".split())
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == (
        "links: 1 Gbit/s, 10 ms; transfers get 80.0% of the bandwidth; 0.1 s more per transfer, 1 s more for the first"
    )
    never = " never" * 5
    assert " ".join(lines[5].split()) == f"data parallel 32 ring 10 0.1 4.2 23.8%{never}"
    assert " ".join(lines[6].split()) == f"DiLoCo, H = 2 32 ring 5 0.0 3.1 32.3%{never}"
    assert lines[7].startswith("streaming, 2 fragments")


def test_a_plan_needs_no_extra(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command_line, "_REQUIREMENT", False)  # as if jsonargparse were missing
    monkeypatch.setattr("sys.argv", ["python -m lightning_diloco", *COMMAND.split()])
    assert command_line.main() is None
    assert "data parallel" in capsys.readouterr().out


def test_help_says_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        command_line.main(["plan", "--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    for option in ("--parameters N ", "--interval H ", "--overlap TAU ", "--latency-ms MS "):
        assert option in printed
    for column in ("GB sent", "seconds", "utilisation", "Gbit/s for"):
        assert f"\n  {column}  " in printed


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--parameters", "-1", "Plan: `parameters` (=-1.0) must be a finite number > 0."),
        ("--parameters", "nan", "Plan: `parameters` (=nan) must be a finite number > 0."),
        ("--bandwidth-gbit-s", "0", "simulated_seconds: `bandwidth_gbit_s` (=0.0) must be a finite number > 0."),
        ("--workers", "1", "Plan: `workers` (=1) must be an integer ≥ 2."),
        ("--workers", "2.5", "argument --workers: '2.5' is no whole number"),
        ("--efficiency", "1.1", "Plan: `efficiency` (=1.1) must be a number > 0 and ≤ 1."),
        (
            "--fragments",
            "101",
            "Plan: `fragments` (=101) must be at most `interval` (=100): each has a local step of its own in a round.",
        ),
        (
            "--overlap",
            "100",
            "Plan: `overlap_steps` (=100) must be less than `interval` (=100): a fragment has to arrive before it is"
            " sent again.",
        ),
        (
            "--pattern",
            "pairs",
            "`pattern` is 'pairs', but 4 workers take part in one mean. Pairs need groups of two; for means over more"
            " workers use 'ring', 'server' or 'all_gather'.",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    option: str, value: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        command_line.main([*COMMAND.split(), option, value])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.endswith(f"error: {message}\n")


def test_a_utilisation_out_of_reach_is_refused() -> None:
    """Six hops of 10 ms for each step of 0.1 s: at most 1/1.6."""
    plan = Plan(**{**BASE, "latency_ms": 10})
    with pytest.raises(ValueError) as error:
        bandwidth_for(0.7, plan)
    assert str(error.value) == (
        "bandwidth_for: `utilisation` (=0.7) must be less than 0.625, which latency and overheads leave to a link of"
        " any bandwidth."
    )
    with pytest.raises(ValueError, match="must be less than 1, which"):
        bandwidth_for(1, Plan(**BASE))
    for wrong in (0, -0.5, 1.5, math.nan, "half"):
        with pytest.raises(ValueError, match=r"must be a number > 0 and ≤ 1\.$"):
            bandwidth_for(wrong, plan)
