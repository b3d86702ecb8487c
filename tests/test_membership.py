"""Do workers leave, join and fail as the cluster's availability says, in every layout, and resumed in every step?"""

import copy
import pickle
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import layouts
import lightning as L
import pytest
import torch
from family import EPOCHS, INNER, INTERVAL, SEED, STEPS, Layers, Save, assert_same_run, several, train
from helpers import Net, assert_equal, differs, loader, regression_data, slow_but, trainer
from reference import shards
from torch import nn

from lightning_diloco import (
    FP4,
    Availability,
    Cluster,
    DataParallel,
    Delayed,
    DesLoc,
    Diloco,
    DilocoCallback,
    DilocoStrategy,
    Eager,
    Edit,
    ErrorFeedback,
    Hierarchical,
    NoLoCo,
    PeriodicAveraging,
    SlowMo,
    Sparta,
    StreamingDiloco,
)

N = 4
OUTER = {"lr": 0.7, "momentum": 0.9, "nesterov": True}
DECAY = 0.9


class Scheduled(Layers):
    """The learning rate falls in every local step."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, DECAY)  # computes from the present rate
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def adamw() -> Scheduled:
    return Scheduled("adamw")


def cluster(events: Any = (), **availability: Any) -> Cluster:
    return Cluster(1.0, bandwidth_gbit_s=1.0, latency_ms=0.0, availability=Availability(events, **availability))


def leave(step: int, worker: int) -> dict[str, Any]:
    return {"kind": "leave", "step": step, "worker": worker}


def join(step: int, worker: int) -> dict[str, Any]:
    return {"kind": "join", "step": step, "worker": worker}


def drop(step: int, worker: int) -> dict[str, Any]:
    return {"kind": "drop", "step": step, "worker": worker}


# ------------------------------------------------------------------------------------------------------- the oracle


class Elastic:
    """DiLoCo whose workers come and go, as nested loops in plain PyTorch.

    Args:
        alive: local step → the workers that take it.
        lost: local step → the workers whose part in the round that ends with it is lost.
        joiner: "fresh", "donor", or "own": the inner state of a joiner that has been there before.
        rollback: whether a round with a lost part fails as a whole.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Sequence[Any]],
        loss: Callable[[nn.Module, Any], Any],
        inner: Callable[[Any], torch.optim.Optimizer],
        alive: Callable[[int], set[int]],
        lost: Callable[[int], set[int]],
        joiner: str,
        rollback: bool,
    ) -> None:
        n = len(batches)
        self.theta = copy.deepcopy(model)
        self.workers = [copy.deepcopy(model) for _ in range(n)]
        self.inner = [inner(w.parameters()) for w in self.workers]
        self.outer = torch.optim.SGD(self.theta.parameters(), **OUTER)
        rate = self.inner[0].param_groups[0]["lr"]
        own, before, been = [0] * n, alive(1), set(alive(1))
        self.history: list[Any] = []
        for t in range(1, len(batches[0]) + 1):
            now = alive(t)
            for w in now - before:
                donor = min(now & before)
                self.workers[w].load_state_dict(self.theta.state_dict())
                if joiner == "donor":
                    self.inner[w].load_state_dict(copy.deepcopy(self.inner[donor].state_dict()))
                    own[w] = own[donor]
                elif joiner == "fresh" or w not in been:
                    self.inner[w], own[w] = inner(self.workers[w].parameters()), 0
            been |= now
            for w in sorted(now):
                self.inner[w].param_groups[0]["lr"] = rate * DECAY ** own[w]
                self.inner[w].zero_grad()
                loss(self.workers[w], batches[w][t - 1]).backward()
                self.inner[w].step()
                own[w] += 1
            if t % INTERVAL == 0 or t == len(batches[0]):
                self.end_round(now, lost(t) & now, rollback)
            before = now
            self.history.append(copy.deepcopy((self.theta.state_dict(), [w.state_dict() for w in self.workers], now)))

    @torch.no_grad()
    def end_round(self, now: set[int], lost: set[int], rollback: bool) -> None:
        there = sorted(now - lost)
        if lost and rollback:
            for w in now:
                self.workers[w].load_state_dict(self.theta.state_dict())
            return
        for name, p in self.theta.named_parameters():
            deltas = [p - dict(self.workers[w].named_parameters())[name] for w in there]
            p.grad = sum(deltas) / len(deltas)
        self.outer.step()
        for w in there:
            self.workers[w].load_state_dict(self.theta.state_dict())


EVENTS = {
    "one leaves": [leave(4, 2)],
    "worker 0 leaves and comes back": [leave(4, 0), join(9, 0)],
    "one comes late": [join(8, 3)],
    "two come and go": [leave(3, 1), join(10, 1), leave(5, 2), join(14, 2), leave(15, 1)],
    "all of a process": [leave(5, 2), leave(7, 3), join(9, 3), join(16, 2)],
    "at the ends of rounds": [leave(7, 1), join(13, 1)],
}
LOST = [drop(6, 1), drop(12, 0), drop(12, 3)]


def alive_by(events: Sequence[dict[str, Any]]) -> Callable[[int], set[int]]:
    def alive(step: int) -> set[int]:
        here = {w for w in range(N) if next((e["kind"] for e in events if e.get("worker") == w), "") != "join"}
        for e in sorted(events, key=lambda e: e["step"]):
            if e["step"] <= step and e["kind"] in ("leave", "join"):
                here ^= {e["worker"]}
        return here

    return alive


def oracle(
    events: Sequence[dict[str, Any]], joiner: str = "fresh", rollback: bool = False, losses: Any = ()
) -> Elastic:
    data = regression_data(96, dtype=torch.float64).tensors
    of_workers = shards(data, N, 4, EPOCHS, SEED)
    return Elastic(
        adamw().double(),
        [batches[:STEPS] for batches in of_workers],
        lambda model, batch: model.loss(batch),
        INNER["adamw"],
        alive_by(events),
        lambda t: {e["worker"] for e in losses if e["step"] == t},
        joiner,
        rollback,
    )


def assert_agrees(run: Any, expected: Elastic) -> None:
    for t, ((theta, workers), (theta_x, workers_x, now)) in enumerate(zip(run.history, expected.history, strict=True)):
        if t == STEPS - 1:  # the run's last round ends after the hook
            break
        for name, value in theta_x.items():
            torch.testing.assert_close(theta[name], value, rtol=0, atol=1e-12, msg=f"θ {name} after step {t + 1}")
            for w in now:
                where = f"worker {w}'s {name} after step {t + 1}"
                torch.testing.assert_close(workers[w][name], workers_x[w][name], rtol=0, atol=1e-12, msg=where)
    for name, value in expected.theta.state_dict().items():
        torch.testing.assert_close(run.theta[name], value, rtol=0, atol=1e-12)


@pytest.mark.parametrize("joiner", slow_but(["fresh"], ["fresh", "donor", "own"]))
@pytest.mark.parametrize("events", EVENTS.values(), ids=EVENTS)
def test_workers_come_and_go_as_in_the_oracle(events: Any, joiner: str, tmp_path: Path) -> None:
    options = {"keep_state": True} if joiner == "own" else {"joiner": joiner}
    run = train(tmp_path, make=adamw, cluster=cluster(events, **options))
    assert_agrees(run, oracle(events, joiner))


@pytest.mark.parametrize("on_failure", ["survivors", "rollback"])
def test_lost_parts_as_in_the_oracle(on_failure: str, tmp_path: Path) -> None:
    events = EVENTS["worker 0 leaves and comes back"]
    run = train(tmp_path, make=adamw, cluster=cluster([*events, *LOST], on_failure=on_failure))
    assert_agrees(run, oracle(events, rollback=on_failure == "rollback", losses=LOST))


# ------------------------------------------------------------------------------------- layouts, resumed in every step

SETTINGS: dict[str, dict[str, Any]] = {
    "diloco": {"cluster": cluster([*EVENTS["all of a process"], *LOST])},
    "donor": {"cluster": cluster(EVENTS["all of a process"], joiner="donor")},
    "own": {"cluster": cluster([*EVENTS["two come and go"], *LOST], keep_state=True, on_failure="rollback")},
    "drawn": {"cluster": cluster(leave_rate=0.1, join_rate=0.3, drop_rate=0.2, seed=4)},
    "partitions": {"cluster": cluster(partition_rate=0.2, partition_steps=4, seed=1)},
    "streaming": {
        "algorithm": StreamingDiloco(2, delay=2, alpha=0.5),
        "codec": ErrorFeedback(FP4()),
        "cluster": cluster([*EVENTS["all of a process"], drop(8, 0)], on_failure="rollback"),
    },
    "average": {"algorithm": PeriodicAveraging(), "cluster": cluster(EVENTS["all of a process"])},
    "data parallel": {
        "algorithm": DataParallel(),
        "cluster": cluster([*EVENTS["all of a process"], *LOST], joiner="donor"),
    },
    "eager": {"algorithm": Eager(), "cluster": cluster([*EVENTS["all of a process"], *LOST])},
    "delayed": {"algorithm": Delayed(), "cluster": cluster(EVENTS["all of a process"], on_failure="rollback")},
    "sparta": {"algorithm": Sparta(0.3, beside=Diloco()), "cluster": cluster([*EVENTS["all of a process"], *LOST])},
    "pairs": {"algorithm": NoLoCo(), "cluster": cluster([*EVENTS["all of a process"], *LOST], joiner="donor")},
    "moments": {"algorithm": DesLoc(2, 3), "cluster": cluster([*EVENTS["all of a process"], *LOST])},
    "slow momentum": {"algorithm": SlowMo(0.5), "cluster": cluster([*EVENTS["all of a process"], *LOST])},
    "groups": {
        "algorithm": Hierarchical(2, [[0, 2], [1, 3]]),
        "cluster": cluster([*EVENTS["all of a process"], *LOST]),
    },
    "edit": {"algorithm": Edit(Diloco(), temperature=1.0), "cluster": cluster([*EVENTS["all of a process"], *LOST])},
    "averaged inner state": {"inner_state": "average", "cluster": cluster([*EVENTS["all of a process"], *LOST])},
}


@pytest.mark.processes
@pytest.mark.slow
def test_two_processes_give_the_same_bits(tmp_path: Path) -> None:
    settings = [{"make": adamw, **s} for s in SETTINGS.values()]
    for name, of_two, of_settings in zip(SETTINGS, several(tmp_path, 2, settings), settings, strict=True):
        print(name)
        assert_same_run(of_two, train(tmp_path, **of_settings), measured=1e-9)


@pytest.mark.parametrize("name", slow_but(["drawn"], SETTINGS))
def test_resumed_in_any_step(name: str, tmp_path: Path) -> None:
    settings = {"make": adamw, **SETTINGS[name]}
    whole = train(tmp_path, callbacks=[Save(range(1, STEPS), tmp_path)], **settings)
    for step in range(1, STEPS, 1 if name == "diloco" else 3):
        rest = train(tmp_path, resume=tmp_path / f"{step}.ckpt", **settings)
        assert rest.theta.keys() == whole.theta.keys()
        for key, value in whole.theta.items():
            assert torch.equal(rest.theta[key], value), f"resumed in step {step}"
        assert rest.bytes == whole.bytes
        last, of_whole = rest.reports[-1], whole.reports[-1]
        for field in ("simulated_seconds", "compute_utilisation", "lost_steps", "join_bytes", "alive"):
            assert getattr(last, field) == getattr(of_whole, field), f"{field}, resumed in step {step}"


@pytest.mark.slow
def test_resumed_from_a_file_between_a_join_and_its_step(tmp_path: Path) -> None:
    class Early(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 8 and not (tmp_path / "early.ckpt").exists():
                trainer.save_checkpoint(tmp_path / "early.ckpt")

    settings: dict[str, Any] = {"make": adamw, "cluster": cluster([leave(4, 0), join(9, 0)])}
    whole = train(tmp_path, callbacks=[Early()], **settings)
    rest = train(tmp_path, resume=tmp_path / "early.ckpt", **settings)
    assert_same_run(replace(rest, history=[], reports=[]), replace(whole, history=[], reports=[]))
    assert rest.reports[-1].join_bytes == whole.reports[-1].join_bytes
    assert rest.reports[-1].simulated_seconds == whole.reports[-1].simulated_seconds


def test_data_parallel_workers_stay_the_same(tmp_path: Path) -> None:
    run = train(tmp_path, make=adamw, **SETTINGS["data parallel"])
    alive = alive_by(EVENTS["all of a process"])
    for t, (theta, workers) in enumerate(run.history, start=1):
        for w in alive(t):
            for name, value in theta.items():
                assert torch.equal(workers[w][name], value), (t, w, name)


# ------------------------------------------------------------------------------------------------------- reports


def fit(cluster: Cluster, steps: int = 12, **options: Any) -> DilocoStrategy:
    L.seed_everything(3, verbose=False)
    strategy = DilocoStrategy(num_nodes=N, diloco_interval=4, cluster=cluster, **options)
    trainer(strategy, max_epochs=-1, max_steps=steps).fit(Net(batch_norm=False), loader())
    return strategy


def test_reports_count_alive_participating_and_committed_workers_apart() -> None:
    groups = [[0, 1, 2], [3]]
    events = [leave(2, 1), join(9, 1), drop(4, 0), {"kind": "partition", "step": 12, "groups": groups}, drop(12, 2)]
    strategy = fit(cluster(events))
    counts = [(r.alive, r.participating, r.participants) for r in strategy.reports]
    assert counts == [(3, 3, (2, 3)), (3, 3, (0, 2, 3)), (4, 3, (0, 1))]
    tally = strategy.tally
    assert (tally.transfers, tally.alive, tally.participating, tally.committed, tally.joins) == (3, 10, 9, 7, 1)
    assert tally.lost_steps == 1  # worker 1's first; worker 0's of the first round arrive with the second
    drifts = [[d is None for d in r.drift] for r in strategy.reports]
    assert drifts == [[False, True, False, False], [False, True, False, False], [False] * 4]


def test_a_join_moves_five_models() -> None:
    events = [leave(6, 3), join(9, 3)]
    strategy = fit(cluster(events, joiner="donor"))
    model = sum(p.nbytes for p in strategy._engine.module.parameters())
    counters = 4 * len(list(strategy._engine.module.parameters()))  # AdamW's
    assert strategy.tally.join_bytes == 5 * model + counters
    assert fit(cluster(events)).tally.join_bytes == 3 * model
    assert strategy.clock.workers[3].absent == pytest.approx(3.0 + strategy.clock.workers[0].link / 3)


def test_a_round_that_is_rolled_back_costs_its_time_and_bytes() -> None:
    strategy = fit(cluster([drop(8, 1)], on_failure="rollback"))
    assert [r.step for r in strategy.reports] == [4, 12]
    assert (strategy.tally.failed, strategy.tally.lost_steps) == (1, 4 * N)
    whole = fit(cluster())
    assert strategy.ledger.total_bytes == whole.ledger.total_bytes
    assert strategy.clock.seconds == whole.clock.seconds


def test_codecs_remember_nothing_of_a_round_that_is_rolled_back() -> None:
    kept = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            codecs = trainer.strategy._engine.context.memory.codecs
            kept.append({key: {n: t.clone() for n, t in of_tensor.items()} for key, of_tensor in codecs.items()})

    strategy = DilocoStrategy(
        N, 4, cluster=cluster([drop(8, 1)], on_failure="rollback"), codec=ErrorFeedback(FP4()), final_sync=False
    )
    trainer(strategy, max_epochs=-1, max_steps=12, callbacks=[Look()]).fit(Net(batch_norm=False), loader())
    assert kept[3]
    for key, of_tensor in kept[3].items():
        for n, t in of_tensor.items():
            assert torch.equal(kept[7][key][n], t)
    assert any(not torch.equal(kept[11][key][n], t) for key, of_tensor in kept[3].items() for n, t in of_tensor.items())


def test_a_worker_that_is_absent_draws_nothing_and_runs_no_hook() -> None:
    seen: list[tuple[int, int]] = []

    class Looks(Net):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            seen.append((self.trainer.strategy.local_steps, self.trainer.strategy.current_worker))

    strategy = DilocoStrategy(num_nodes=2, diloco_interval=4, cluster=cluster([leave(3, 0), join(5, 0)]))
    trainer(strategy, max_epochs=-1, max_steps=5).fit(Looks(batch_norm=False), loader())
    assert [s for s, w in seen if w == 0] == [0, 1, 4]
    assert [s for s, w in seen if w == 1] == [0, 1, 2, 3, 4]


def test_batch_norm_buffers_of_those_who_are_there() -> None:
    strategy = DilocoStrategy(num_nodes=2, diloco_interval=2, cluster=cluster([leave(3, 0)]))
    module = Net()
    trainer(strategy, max_epochs=-1, max_steps=4).fit(module, loader())
    there = strategy.worker_state_dict(1)
    for name, value in strategy.outer_state_dict().items():
        if "running" in name:
            assert torch.equal(value, there[name])
    with strategy.weights("average"):
        for name, value in module.state_dict().items():
            assert torch.equal(value, there[name]), name


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("availability", "way"),
    [
        ({"events": [leave(4, 1)]}, "use `joiner='donor'`"),
        ({"drop_rate": 0.5, "joiner": "donor", "on_failure": "rollback"}, "use `on_failure='survivors'`"),
        ({"partition_rate": 0.5, "partition_steps": 2, "joiner": "donor"}, "leave partitions out"),
    ],
)
def test_data_parallelism_refuses_what_parts_its_workers(availability: Any, way: str) -> None:
    with pytest.raises(ValueError, match=r"DataParallel averages gradients") as e:
        fit(cluster(**availability), algorithm=DataParallel())
    assert way in str(e.value)


def test_workers_that_do_not_exist() -> None:
    with pytest.raises(ValueError, match="there is no worker 4"):
        DilocoStrategy(num_nodes=4, cluster=cluster([leave(3, 4)]))


def test_a_file_is_resumed_with_its_availability(tmp_path: Path) -> None:
    train(tmp_path, callbacks=[Save([4], tmp_path)], cluster=cluster([leave(8, 1)]))
    with pytest.raises(ValueError, match="`availability of the cluster` is Availability"):
        train(tmp_path, resume=tmp_path / "4.ckpt", cluster=cluster())
    with pytest.raises(ValueError, match="`availability of the cluster` is Availability"):
        train(tmp_path, resume=tmp_path / "4.ckpt")


def test_plain_diloco_without_events_is_untouched(tmp_path: Path) -> None:
    assert_same_run(train(tmp_path, algorithm=Diloco()), train(tmp_path, cluster=cluster()))


# ------------------------------------------------------------------- what absent workers must not touch


def test_a_clock_with_a_schedule_can_be_copied() -> None:
    clock = fit(cluster([leave(2, 1), join(6, 1)])).clock
    assert pickle.loads(pickle.dumps(clock)).workers == clock.workers


@pytest.mark.processes
@pytest.mark.slow
def test_metrics_validation_and_buffers_in_two_processes(tmp_path: Path) -> None:
    """Values with sync_dist, BatchNorm, and a validation while a process hosts nobody who is there."""
    events = [leave(2, 2), leave(3, 3), join(6, 3), join(8, 2)]
    options: dict[str, Any] = {
        "strategy": {"cluster": cluster(events)},
        "precision": "64-true",
        "val_check_interval": 2,
    }
    (tmp_path / "one").mkdir()
    one, two = layouts.train(tmp_path / "one", 1, **options), layouts.layout(tmp_path, 2, **options)
    for key in ("theta", "workers", "module", "bytes"):
        assert_equal(two[key], one[key], key)
    assert two["steps"] == [pytest.approx(step, rel=1e-12) for step in one["steps"]]
    assert [list(e) for e in two["epochs"]] == [list(e) for e in one["epochs"]]
    for mine, theirs in zip(two["epochs"], one["epochs"], strict=True):
        if "val_loss" in mine:
            assert mine == pytest.approx(theirs, rel=1e-12)


def test_an_absent_worker_is_validated_as_it_left() -> None:
    strategy = DilocoStrategy(3, 4, cluster=cluster([leave(3, 0)]))
    seen: list[dict[str, float]] = []

    class Look(DilocoCallback):
        def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
            if not trainer.sanity_checking:
                seen.append({k: float(v) for k, v in trainer.callback_metrics.items()})

    look = Look(validate_on=[0, 1])
    t = trainer(strategy, max_epochs=-1, max_steps=6, callbacks=[look], val_check_interval=2)
    t.fit(Net(batch_norm=False), loader(), loader(regression_data(12, seed=9), shuffle=False))
    at_2, at_4, at_6 = (metrics["val_loss/worker_0"] for metrics in seen)
    assert at_2 == at_4 == at_6
    assert len({metrics["val_loss/worker_1"] for metrics in seen}) == 3


def test_a_sender_that_has_left_counts_no_more_when_its_transfer_arrives() -> None:
    strategy = DilocoStrategy(3, 4, algorithm=Delayed(), cluster=cluster([leave(5, 0)]), final_sync=False)
    trainer(strategy, max_epochs=-1, max_steps=8).fit(Net(), loader())
    theta = strategy.outer_state_dict()["net.1.running_mean"]
    kept = [strategy.worker_state_dict(w)["net.1.running_mean"] for w in range(3)]
    assert torch.equal(kept[1], theta)
    assert torch.equal(kept[2], theta)
    assert not torch.equal(kept[0], theta)
    assert strategy.clock.workers[0].waiting == 0.0


def test_a_group_that_is_added_is_everybodys_at_once() -> None:
    class Grows(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 3:
                pl_module.late.requires_grad_(True)
                trainer.optimizers[0].add_param_group({"params": [pl_module.late], "lr": 0.5})

    class Late(Net):
        def __init__(self) -> None:
            super().__init__(batch_norm=False)
            self.late = nn.Parameter(torch.zeros(1), requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + self.late

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.net.parameters(), lr=0.01)

    strategy = DilocoStrategy(3, 4, cluster=cluster([leave(3, 1), join(7, 1)]))
    trainer(strategy, max_epochs=-1, max_steps=8, callbacks=[Grows()]).fit(Late(), loader())
    assert [g["lr"] for g in strategy._engine.context.inner.workers[1].control[0]] == [0.01, 0.5]


def test_learning_rates_are_the_same_until_something_happens() -> None:
    class Warms(Net):
        def optimizer_step(self, epoch: Any, batch_idx: int, optimizer: Any, *args: Any, **kwargs: Any) -> None:
            if self.trainer.global_step < 4:
                optimizer.param_groups[0]["lr"] = 0.1 * (1 + self.trainer.global_step)
            super().optimizer_step(epoch, batch_idx, optimizer, *args, **kwargs)

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, DECAY)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    weights = []
    for machines in (None, cluster(), cluster([leave(90, 1)])):
        L.seed_everything(3, verbose=False)
        strategy = DilocoStrategy(2, 4, cluster=machines)
        trainer(strategy, max_epochs=-1, max_steps=9).fit(Warms(batch_norm=False), loader())
        weights.append(strategy.outer_state_dict())
    assert_equal(weights[1], weights[0])
    assert_equal(weights[2], weights[0])


def test_an_exchange_of_elements_that_fails_leaves_the_weights() -> None:
    seen: list[Any] = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            seen.append([trainer.strategy.worker_state_dict(w) for w in range(2)])

    machines = cluster([drop(5, 1)], on_failure="rollback")
    first = Net(batch_norm=False)
    strategy = DilocoStrategy(2, 4, algorithm=Sparta(0.3), cluster=machines)
    trainer(strategy, max_epochs=-1, max_steps=5, callbacks=[Look()]).fit(first, loader())
    initial = Net(batch_norm=False).state_dict()
    assert all(not torch.equal(worker[name], initial[name]) for worker in seen[4] for name in initial)
    assert (strategy.tally.failed, strategy.tally.lost_steps) == (1, 0)


def test_delayed_workers_return_to_the_theta_that_has_arrived() -> None:
    seen: dict[int, Any] = {}

    class Look(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            s = trainer.strategy
            seen[trainer.global_step] = s.outer_state_dict(), [s.worker_state_dict(w) for w in range(2)]

    machines = cluster([drop(8, 1)], on_failure="rollback")
    strategy = DilocoStrategy(2, 4, algorithm=Delayed(), cluster=machines)
    trainer(strategy, max_epochs=-1, max_steps=9, callbacks=[Look()]).fit(Net(batch_norm=False), loader())
    theta, workers = seen[8]
    assert differs(theta, seen[7][0])
    for worker in workers:
        assert_equal(worker, theta)


def test_a_round_that_is_lost_in_the_end_is_not_sent_again() -> None:
    strategy = DilocoStrategy(2, 4, cluster=cluster([drop(8, 0), drop(8, 1)]))
    trainer(strategy, max_epochs=-1, max_steps=8).fit(Net(), loader())
    assert (strategy.tally.transfers, strategy.outer_steps) == (2, 1)
    first, second = (strategy.worker_state_dict(w)["net.1.running_mean"] for w in range(2))
    assert not torch.equal(first, second)  # nor their buffers


def test_a_step_that_an_error_tears_is_told_once(tmp_path: Path) -> None:
    class Fails(DilocoCallback):
        def on_before_outer_step(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.strategy.local_steps == 8 and not (tmp_path / "torn.ckpt").exists():
                raise RuntimeError("ill")

        def on_exception(self, trainer: L.Trainer, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / "torn.ckpt")

    def run(ckpt: Path | None) -> DilocoStrategy:
        strategy = DilocoStrategy(2, 4, cluster=cluster())
        t = trainer(strategy, max_epochs=-1, max_steps=12, callbacks=[Fails()])
        t.fit(Net(batch_norm=False), loader(), ckpt_path=ckpt)
        return strategy

    with pytest.raises(RuntimeError, match="ill"), pytest.warns(UserWarning, match="Local step 8 was interrupted"):
        run(None)
    clock = run(tmp_path / "torn.ckpt").clock
    assert [w.computing for w in clock.workers] == [12.0, 12.0]
    assert clock.data_parallel.workers[0].computing == 12.0
