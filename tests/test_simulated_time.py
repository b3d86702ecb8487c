"""Is the clock of a fit right: against closed forms, event by event, in every layout, resumed, and does it disturb?"""

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from event_simulation import EventSimulation
from family import Layers, Save, assert_same_run, several, train
from helpers import Net, loader, regression_data, trainer
from said import said

from lightning_diloco import (
    FP4,
    Cluster,
    DataParallel,
    Diloco,
    DilocoCallback,
    DilocoStrategy,
    ErrorFeedback,
    PostLocalSGD,
    Robust,
    StreamingDiloco,
    Table,
    TrimmedMean,
)
from lightning_diloco.cluster.planning import Plan, simulated_seconds

STEP, MBIT, LATENCY = 0.1, 1e-3, 2.0
N, H = 3, 4


def ring(nbytes: float, n: int = N, gbit_s: float = MBIT) -> float:
    """2(n−1)/n of the bytes over the link, and 2(n−1) hops: written down again."""
    return 2 * (n - 1) / n * nbytes * 8 / (gbit_s * 1e9) + 2 * (n - 1) * LATENCY / 1000


def cluster(**options: Any) -> Cluster:
    return Cluster(**{"step_seconds": STEP, "bandwidth_gbit_s": MBIT, "latency_ms": LATENCY, **options})


def fit(steps: int = 10, module: Any = None, callbacks: Any = (), **options: Any) -> DilocoStrategy:
    L.seed_everything(3, verbose=False)
    strategy = DilocoStrategy(**{"num_nodes": N, "diloco_interval": H, "cluster": cluster(), **options})
    t = trainer(strategy, max_epochs=-1, max_steps=steps, callbacks=[*callbacks])
    t.fit(module or Net(batch_norm=False), loader())
    return strategy


def model_bytes(strategy: DilocoStrategy) -> int:
    return sum(t.nbytes for t in strategy.outer_state_dict().values())


# ------------------------------------------------------------------------------------------------- closed forms


def test_diloco_and_data_parallelism() -> None:
    strategy = fit()
    clock, transfer = strategy.clock, ring(model_bytes(strategy))
    assert clock.seconds == pytest.approx(10 * STEP + 3 * transfer, abs=1e-9)
    assert clock.compute_utilisation == pytest.approx(10 * STEP / (10 * STEP + 3 * transfer), abs=1e-9)
    assert clock.data_parallel.seconds == pytest.approx(10 * (STEP + transfer), abs=1e-9)
    for worker in clock.workers:
        assert (worker.computing, worker.waiting) == (pytest.approx(10 * STEP, abs=1e-9), 0.0)
        assert worker.link == pytest.approx(3 * transfer, abs=1e-9)
    seconds = [r.simulated_seconds for r in strategy.reports]
    assert seconds == pytest.approx([k * H * STEP + k * transfer for k in (1, 2)] + [clock.seconds], abs=1e-9)


def test_a_run_of_data_parallelism_takes_what_the_comparison_says() -> None:
    clock = fit(algorithm=DataParallel()).clock
    assert clock.seconds == pytest.approx(clock.data_parallel.seconds, abs=1e-9)
    assert clock.seconds == fit().clock.data_parallel.seconds


def test_the_slowest_worker_decides() -> None:
    strategy = fit(8, cluster=cluster(step_seconds=[0.1, 0.3, 0.2]))
    transfer = ring(model_bytes(strategy))
    assert strategy.clock.seconds == pytest.approx(8 * 0.3 + 2 * transfer, abs=1e-9)
    assert [w.waiting for w in strategy.clock.workers] == pytest.approx([8 * 0.2, 0, 8 * 0.1], abs=1e-9)


@pytest.mark.parametrize("gbit_s", [1e-4, 1e-3, 1e-2])
def test_overlap_hides_exactly_the_smaller_of_its_steps_and_the_transfer(gbit_s: float) -> None:
    """One fragment, H = 8, τ = 3: whatever is left of the transfer after three steps is waited for."""
    options: dict[str, Any] = {"diloco_interval": 8, "cluster": cluster(bandwidth_gbit_s=gbit_s)}
    strategy = fit(16, algorithm=StreamingDiloco(1, delay=3), final_sync=False, **options)
    transfer = ring(model_bytes(strategy), gbit_s=gbit_s)
    hidden = min(3 * STEP, transfer)
    assert strategy.clock.seconds == pytest.approx(16 * STEP + transfer - hidden, abs=1e-9)


def test_a_coded_payload_is_gathered() -> None:
    strategy = fit(codec=FP4())
    sent = strategy.ledger.entries[0].payload_bytes
    gather = (N - 1) * (sent * 8 / (MBIT * 1e9) + LATENCY / 1000)
    assert strategy.clock.seconds == pytest.approx(10 * STEP + 3 * gather, abs=1e-9)


def test_buffers_are_sent_beside_the_weights() -> None:
    strategy = fit(8, module=Net())
    kinds = [(e.what, e.payload_bytes) for e in strategy.ledger.entries]
    assert {what for what, _ in kinds} == {"delta", "buffers"}
    assert strategy.clock.seconds == pytest.approx(8 * STEP + sum(ring(b) for _, b in kinds), abs=1e-9)


def test_a_single_worker_only_computes() -> None:
    plain = fit(num_nodes=1, outer_optimizer_kwargs={"lr": 1.0})
    assert plain._is_plain_run
    assert (plain.clock.seconds, plain.clock.compute_utilisation) == (pytest.approx(1.0), 1.0)


def test_the_first_transfer_opens_connections() -> None:
    extra = fit(cluster=cluster(first_sync_overhead_s=5.0, sync_overhead_s=0.25)).clock.seconds
    assert extra - fit().clock.seconds == pytest.approx(5.0 + 3 * 0.25, abs=1e-9)


@pytest.mark.parametrize("fragments", [1, 2])
@pytest.mark.parametrize("delay", [0, 2])
def test_a_plan_without_a_run_says_the_same(fragments: int, delay: int) -> None:
    """Fragments of equal size: every layer of the model is alike."""
    make = Layers(sizes=(4, 4, 4), bias=False)
    algorithm = StreamingDiloco(fragments, delay=delay, alpha=0.0)
    strategy = DilocoStrategy(N, 6, algorithm=algorithm, cluster=cluster())
    torch.manual_seed(1)
    trainer(strategy, max_epochs=-1, max_steps=20).fit(make, loader(regression_data(features=4)))
    plan = Plan(
        parameters=32,
        step_seconds=STEP,
        steps=20,
        workers=N,
        latency_ms=LATENCY,
        interval=6,
        fragments=fragments,
        overlap_steps=delay,
    )
    assert strategy.clock.seconds == pytest.approx(simulated_seconds(plan, MBIT), abs=1e-9)


# ------------------------------------------------------------------------------------------------- event by event


def test_a_streaming_run_event_by_event() -> None:
    """What the run's reports say was sent and taken in, replayed by the event simulation on uneven machines."""
    steps = [0.1, 0.17, 0.12]
    algorithm = StreamingDiloco(3, delay=2, alpha=0.5, first_sync="staggered")
    machines = cluster(step_seconds=steps, bandwidth_gbit_s=[1e-3, 4e-4, 2e-3])
    strategy = fit(17, Layers(), algorithm=algorithm, diloco_interval=5, cluster=machines, final_sync=False)
    sent: dict[int, list[tuple[Any, int]]] = {}
    taken: dict[int, list[Any]] = {}
    transfers = {}
    for r in strategy.reports:
        key = (r.tag, r.sent_step)
        sent.setdefault(r.sent_step, []).append((key, r.payload_bytes))
        taken.setdefault(r.step, []).append(key)
        transfers[key] = ([0, 1, 2], ring(r.payload_bytes, gbit_s=4e-4))
    programs: list[list[tuple]] = [[] for _ in steps]
    for w, program in enumerate(programs):
        for t in range(1, 18):
            program.append(("computing", steps[w]))
            program.extend(("post", key) for key, _ in sent.get(t, []))
            program.extend(("wait", key) for key in taken.get(t, []))
    expected = EventSimulation(programs, transfers)
    assert len(strategy.reports) == 9  # what is sent later doesn't arrive, and nobody waits for it
    for mine, clock in zip(strategy.clock.workers, expected.clocks, strict=True):
        assert mine.seconds == pytest.approx(clock, abs=1e-9)
    for mine, theirs in zip(strategy.clock.workers, expected.seconds, strict=True):
        assert [mine.computing, mine.waiting, mine.link] == pytest.approx(
            [theirs["computing"], theirs["waiting"], theirs["link"]], abs=1e-9
        )


def test_a_worker_that_takes_no_part_does_not_wait() -> None:
    strategy = fit(8, participation=Table({4: [0, 1]}), cluster=cluster(step_seconds=[0.1, 0.1, 0.05]))
    two, three = ring(model_bytes(strategy), 2), ring(model_bytes(strategy))
    left_out = strategy.clock.workers[2]
    assert (left_out.waiting, left_out.link) == (
        pytest.approx(8 * 0.05 + two, abs=1e-9),
        pytest.approx(three, abs=1e-9),
    )
    assert strategy.clock.seconds == pytest.approx(8 * 0.1 + two + three, abs=1e-9)


# ------------------------------------------------------------------------------------------------- measured steps


def test_measured_steps_are_the_median_of_the_runs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns of known lengths: worker w's k-th takes 1 + w + k/100 s on the watch that the engine reads."""
    ticks = {"now": 0.0, "turns": 0}
    monkeypatch.setattr("lightning_diloco.engine.times.perf_counter", lambda: ticks["now"])

    class Takes(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            ticks["now"] += 1 + self.trainer.strategy.current_worker + batch_idx / 100
            return super().training_step(batch, batch_idx)

    strategy = fit(4, module=Takes(batch_norm=False), cluster=cluster(step_seconds="measured"))
    median = 2 + (0.01 + 0.02) / 2  # of 1.00 … 1.03, 2.00 … 2.03, 3.00 … 3.03
    transfer = ring(model_bytes(strategy))
    assert strategy.clock.seconds == pytest.approx(4 * median + transfer, abs=1e-9)


def test_measured_steps_count_also_without_a_last_synchronisation() -> None:
    strategy = fit(6, cluster=cluster(step_seconds="measured"), final_sync=False)
    assert all(w.computing > 0 for w in strategy.clock.workers)
    computing = strategy.clock.workers[0].computing
    assert strategy.clock.seconds == pytest.approx(computing + ring(model_bytes(strategy)), abs=1e-9)


# ------------------------------------------------------------------------------------------------- layouts, files


SETTINGS: dict[str, dict[str, Any]] = {
    "diloco": {"cluster": cluster(step_seconds=[0.1, 0.2, 0.1, 0.1], jitter=0.3)},
    "streaming": {
        "algorithm": StreamingDiloco(2, delay=3, alpha=0.5),
        "codec": ErrorFeedback(FP4()),
        "cluster": cluster(bandwidth_gbit_s=1e-5),
    },
    "post-local": {"algorithm": PostLocalSGD(5), "cluster": cluster()},
}


def spent(run: Any) -> Any:
    last = run.reports[-1]
    return last.simulated_seconds, last.compute_utilisation, [r.simulated_seconds for r in run.reports][-2:]


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_resumed_in_any_step(name: str, tmp_path: Path) -> None:
    whole = train(tmp_path, callbacks=[Save(range(1, 19), tmp_path)], **SETTINGS[name])
    for step in range(1, 19, 2):
        rest = train(tmp_path, resume=tmp_path / f"{step}.ckpt", **SETTINGS[name])
        assert spent(rest)[:2] == spent(whole)[:2], step


@pytest.mark.processes
def test_two_processes_tell_the_same_time(tmp_path: Path) -> None:
    for two, settings in zip(several(tmp_path, 2, list(SETTINGS.values())), SETTINGS.values(), strict=True):
        assert spent(two) == spent(train(tmp_path, **settings))


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_the_clock_changes_no_bit(name: str, tmp_path: Path) -> None:
    without = {key: value for key, value in SETTINGS[name].items() if key != "cluster"}
    assert_same_run(train(tmp_path, **SETTINGS[name]), train(tmp_path, **without))


@pytest.mark.slow
def test_a_file_without_a_clock_begins_one(tmp_path: Path) -> None:
    """A transfer that is under way in the file arrives without a wait: nobody knows when it began."""
    options: dict[str, Any] = {"algorithm": StreamingDiloco(2, delay=3)}
    train(tmp_path, callbacks=[Save([7], tmp_path)], **options)
    rest = train(tmp_path, resume=tmp_path / "7.ckpt", cluster=cluster(), **options)
    assert rest.reports[0].sent_step == 6
    assert rest.reports[0].simulated_seconds == pytest.approx(2 * STEP, abs=1e-9)


@pytest.mark.slow
def test_another_cluster_goes_on_from_the_files_time(tmp_path: Path) -> None:
    whole = train(tmp_path, callbacks=[Save([12], tmp_path)], cluster=cluster())
    rest = train(tmp_path, resume=tmp_path / "12.ckpt", cluster=cluster(step_seconds=10 * STEP))
    more = rest.reports[-1].simulated_seconds - whole.reports[-1].simulated_seconds
    assert more == pytest.approx(7 * 9 * STEP, abs=1e-9)


# ------------------------------------------------------------------------------------------------- what users see


def test_without_a_cluster_there_is_no_clock() -> None:
    strategy = fit(4, cluster=None)
    with pytest.raises(RuntimeError, match=r"There is no simulated cluster\. .*`DilocoStrategy\(cluster="):
        _ = strategy.clock
    with pytest.raises(RuntimeError, match="from `on_train_start` on"):
        _ = DilocoStrategy(cluster=cluster()).clock
    assert strategy.reports[0].simulated_seconds is None


def test_a_cluster_of_another_size_and_no_cluster_at_all() -> None:
    with pytest.raises(ValueError, match="step_seconds"):
        DilocoStrategy(num_nodes=3, cluster=cluster(step_seconds=[0.1, 0.2]))
    with pytest.raises(ValueError, match=r"`cluster` \(=0\.1\) must be"):
        DilocoStrategy(num_nodes=3, cluster=0.1)  # type: ignore[arg-type]


def test_the_last_lines_say_the_time() -> None:
    with said() as lines:
        strategy = fit()
    (line,) = [line for line in lines if "on the cluster" in line]
    seconds, parallel = strategy.clock.seconds, strategy.clock.data_parallel.seconds
    assert line == (
        f"DiLoCo: on the cluster {seconds:.6g} s, {1e2 / seconds:.3g} % of them computing; data parallelism would have"
        f" taken {parallel:.6g} s, {1e2 / parallel:.3g} %."
    )


def test_the_trace_of_a_fit(tmp_path: Path) -> None:
    strategy = fit(callbacks=[DilocoCallback(summary=False)])
    strategy.clock.trace(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    computing = [e for e in events if e["ph"] == "X" and e["name"] == "computing"]
    assert sum(e["dur"] for e in computing) == pytest.approx(N * 10 * STEP * 1e6, abs=1)
    assert len([e for e in events if e["ph"] == "s"]) == 3 * N  # a message per worker and synchronisation


@pytest.mark.processes
@pytest.mark.usefixtures("_copies")
def test_started_processes_hand_the_clock_back(tmp_path: Path) -> None:
    strategy = DilocoStrategy(num_nodes=2, diloco_interval=H, cluster=cluster(), start_method="spawn")
    trainer(strategy, devices=2, max_epochs=-1, max_steps=4).fit(Layers(), loader())
    assert strategy.clock.seconds == strategy.reports[-1].simulated_seconds
    assert strategy.tally.committed == 2


def test_a_robust_mean_needs_every_message() -> None:
    strategy = fit(4, algorithm=Robust(Diloco(), TrimmedMean(1)))
    gather = (N - 1) * (model_bytes(strategy) * 8 / (MBIT * 1e9) + LATENCY / 1000)
    assert strategy.clock.seconds == pytest.approx(4 * STEP + gather, abs=1e-9)
