"""Is an interrupted run, resumed from its file, the uninterrupted run, bit for bit?"""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers import Net, assert_same, copy_of, loader, regression_data, trainer
from lightning.pytorch.plugins import MixedPrecision
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_diloco import DilocoStrategy

SEED = 5


class Project(Net):
    """Dropout, BatchNorm, a schedule per step, and a journal of the batches, losses and random numbers it saw."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(dropout=0.4, **kwargs)
        self.journal: list[Any] = []

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return [optimizer], [{"scheduler": lr_scheduler.StepLR(optimizer, 3, 0.8), "interval": "step"}]

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        worker = getattr(self.trainer.strategy, "current_worker", None)
        self.journal.append(
            (self.trainer.global_step, worker, batch[0].sum().item(), loss.item(), torch.rand(()).item())
        )
        return loss


class Manual(Project):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        first = torch.optim.SGD(self.net[0].parameters(), lr=0.1, momentum=0.9)
        second = torch.optim.Adam(self.net[-1].parameters(), lr=0.01)
        return [first, second], [lr_scheduler.StepLR(first, 3, 0.5)]

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
        self.lr_schedulers().step()


class Global(L.Callback):
    """Draws from the process's own stream after every batch."""

    def __init__(self) -> None:
        self.draws: list[tuple[int, float]] = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.draws.append((trainer.global_step, torch.rand(()).item()))


class Save(L.Callback):
    """Saves in the named hook after the named batches (counted over the whole run)."""

    def __init__(self, hook: str, batches: set[int]) -> None:
        self.batches, self.count = batches, 0
        setattr(self, hook, self.save)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.count = trainer.fit_loop.epoch_loop.total_batch_idx + 1

    def save(self, trainer, pl_module, *_):
        if self.count in self.batches and not trainer.sanity_checking:
            trainer.save_checkpoint(f"{self.count}.ckpt")


def everything(t: Any, module: Any, draws: Global) -> dict[str, Any]:
    strategy = t.strategy
    inner = strategy.engine.context.inner
    return {
        "module": copy_of(module.state_dict()),
        "outer": strategy.outer_state_dict(),
        "workers": [strategy.worker_state_dict(w) for w in strategy.local_workers],
        "inner": repr([[list(s.values()) for s in w.states] for w in inner.workers.values()]),
        "control": repr([w.control for w in inner.workers.values()]),
        "streams": repr([None if w.stream is None else w.stream.cpu_state.tolist() for w in inner.workers.values()]),
        "scalers": repr([None if w.scaler is None else w.scaler.state_dict() for w in inner.workers.values()]),
        "outer state": repr(list(strategy.outer_optimizer.state_dict()["state"].values())),
        "counters": (strategy.local_steps, strategy.outer_steps, strategy.ledger, t.global_step, t.current_epoch),
        "random": torch.get_rng_state().tolist(),
    }


def assert_equal(a: dict[str, Any], b: dict[str, Any]) -> None:
    for key in ("module", "outer"):
        assert_same(a[key], b[key])
    for x, y in zip(a["workers"], b["workers"], strict=True):
        assert_same(x, y)
    for key in ("inner", "control", "streams", "scalers", "outer state", "counters", "random"):
        assert a[key] == b[key], key


def scaled() -> dict[str, Any]:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**15, growth_interval=3)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=scaler)]}


SETTINGS: dict[str, dict[str, Any]] = {  # strategy arguments, Trainer options, module, loader options
    "default": {},
    "two workers": {"strategy": {"num_nodes": 2, "diloco_interval": 3}},
    "plain average": {"strategy": {"outer_optimizer_kwargs": {"lr": 1.0}}},
    "outer adam": {"strategy": {"outer_optimizer_cls": torch.optim.Adam}},
    "every step": {"strategy": {"diloco_interval": 1}},
    "local buffers": {"strategy": {"buffers": "local", "inner_state": "reset", "eval_weights": "outer"}},
    "first buffers": {"strategy": {"buffers": "first", "inner_state": "average", "eval_weights": "worker"}},
    "no final sync": {"strategy": {"final_sync": False}},
    "processes": {"loader": {"num_workers": 2}},
    "accumulate": {"options": lambda: {"accumulate_grad_batches": 2}},
    "16-mixed": {"options": scaled},
    "16-mixed accumulate": {"options": lambda: {**scaled(), "accumulate_grad_batches": 2}},
    "manual": {"module": Manual},
    "validation": {"options": lambda: {"val_check_interval": 2}},
}


def run(setting: dict[str, Any], callbacks: list[Any], ckpt_path: Any = None, seed: int = SEED, **more: Any) -> Any:
    L.seed_everything(seed, verbose=False)
    module, draws = setting.get("module", Project)(), Global()
    strategy = DilocoStrategy(**{"num_nodes": 3, "diloco_interval": 4, **setting.get("strategy", {})})
    options = {"max_epochs": 3, **setting.get("options", dict)(), **more}
    t = trainer(strategy, callbacks=[draws, *callbacks], **options)
    data = setting.get("data", loader)(
        regression_data(45), 3, **setting.get("loader", {})
    )  # 5 batches for each of 3 workers
    t.fit(module, data, loader(regression_data(8), shuffle=False), ckpt_path=ckpt_path)
    return everything(t, module, draws), module.journal, draws.draws


@pytest.mark.parametrize("name", SETTINGS)
def test_interrupted_is_uninterrupted(name: str) -> None:
    setting = SETTINGS[name]
    hook = "on_validation_end" if name == "validation" else "on_train_batch_end"
    undisturbed, journal, draws = run(setting, [])
    saving, _, _ = run(setting, [Save(hook, set(range(1, 99)))])
    assert_equal(saving, undisturbed)  # saving changes nothing
    files = sorted(Path().glob("*.ckpt"), key=lambda p: int(p.stem))
    assert len(files) >= 4
    for file in files:
        checkpoint = torch.load(file, weights_only=True)
        resumed, later, later_draws = run(setting, [], ckpt_path=file, seed=99)
        assert_equal(resumed, undisturbed)
        assert later == journal[len(journal) - len(later) :]
        assert later_draws == draws[len(draws) - len(later_draws) :]
        assert len(later) < len(journal)
        assert checkpoint["diloco"]["version"] == 1


@pytest.mark.parametrize("num_nodes", [1, 3])
@pytest.mark.parametrize(
    ("hook", "limits"),
    [
        ("on_train_batch_end", {"max_steps": 7}),
        ("on_train_epoch_end", {"max_epochs": 3}),
        ("on_validation_end", {"max_epochs": 3}),
    ],
)
def test_the_last_outer_step_is_made_up_for(hook: str, limits: dict[str, int], num_nodes: int) -> None:
    """A file of the last local step has the outer step on the partial round before it, where Lightning sees no work."""
    setting: dict[str, Any] = {"strategy": {"num_nodes": num_nodes}, "data": loader}
    undisturbed, journal, _ = run(setting, [Save(hook, set(range(1, 99)))], **limits)
    last = max(Path().glob("*.ckpt"), key=lambda p: int(p.stem))
    ended: list[int] = []
    counts = L.pytorch.callbacks.LambdaCallback(on_train_end=lambda t, m: ended.append(t.strategy.outer_steps))
    resumed, later, _ = run(setting, [counts], ckpt_path=last, **limits)
    for result in (resumed, undisturbed):
        result["counters"] = result["counters"][:-1]  # max_steps has cut an epoch short, which isn't taken up again
        if num_nodes == 1:
            result["random"] = None  # the process's own, which Lightning doesn't save
    assert_equal(resumed, undisturbed)
    assert not later
    assert len(journal) % (4 * num_nodes)
    assert ended == [undisturbed["counters"][1]]  # callbacks see the end of training, with θ in the module


class Stream:
    """Batches without a length, dealt one by one."""

    def __init__(self, dataset: Any, batch_size: int, **_: Any) -> None:
        self.batches = list(zip(*(t.split(batch_size) for t in dataset.tensors), strict=True))

    def __iter__(self):
        return iter(self.batches)


def combined(dataset: Any, batch_size: int, **_: Any) -> Any:
    """A long and a short loader; the short one starts again in the middle of the epoch."""
    from lightning.pytorch.utilities import CombinedLoader

    short = TensorDataset(*(t[:18] for t in dataset.tensors))
    return CombinedLoader({"long": loader(dataset, 3), "short": loader(short, 3)}, "max_size_cycle")


class Both(Project):
    def loss(self, batch):
        return (
            super().loss(batch["long"]) + super().loss(batch["short"])
            if isinstance(batch, dict)
            else super().loss(batch)
        )

    def training_step(self, batch, batch_idx):
        worker = self.trainer.strategy.current_worker
        loss = self.loss(batch)
        sums = [batch[k][0].sum().item() for k in ("long", "short")]
        self.journal.append((self.trainer.global_step, worker, *sums, loss.item()))
        return loss


def weighted(dataset: Any, batch_size: int, **_: Any) -> DataLoader:
    """A sampler of the user's, whose draws are random."""
    sampler = torch.utils.data.WeightedRandomSampler(torch.arange(1.0, 46), 45)
    return DataLoader(dataset, batch_size, sampler=sampler)


def stateful(dataset: Any, batch_size: int, **_: Any) -> Any:
    return StatefulDataLoader(dataset, batch_size, shuffle=True)


DATA = {
    "stream": {"data": Stream},
    "combined": {"data": combined, "module": Both},
    "weighted": {"data": weighted},
    "stateful": {"data": stateful},
    "partition": {"strategy": {"partition": lambda d, n: [list(range(w, len(d), n)) for w in range(n)]}},
    "dealt batches": {"options": lambda: {"use_distributed_sampler": False}},
    "limited": {"options": lambda: {"limit_train_batches": 3}},
}


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
@pytest.mark.parametrize("name", DATA)
def test_every_kind_of_loader_goes_on_where_it_was(name: str) -> None:
    undisturbed, journal, _ = run(DATA[name], [])
    run(DATA[name], [Save("on_train_batch_end", {2, 3, 7, 9})])
    for file in sorted(Path().glob("*.ckpt")):
        resumed, later, _ = run(DATA[name], [], ckpt_path=file, seed=99)
        assert later == journal[len(journal) - len(later) :]
        assert_equal(resumed, undisturbed)


@pytest.mark.parametrize(
    "hook",
    ["on_train_epoch_end", "on_validation_start", "on_validation_batch_end", "on_validation_end", "on_train_batch_end"],
)
@pytest.mark.parametrize("limit", [{}, {"max_steps": 14}, {"max_steps": 13, "max_epochs": -1}], ids=str)
def test_the_boundary_between_epochs(limit: dict[str, int], hook: str) -> None:
    """With `max_steps` Lightning itself runs an empty epoch after a file of a complete one, and skips its data."""
    undisturbed, journal, _ = run({}, [], **limit)
    run({}, [Save(hook, {5, 10})], **limit)
    files = sorted(Path().glob("*.ckpt"))
    assert len(files) == 2
    for file in files:
        resumed, later, _ = run({}, [], ckpt_path=file, seed=99, **limit)
        assert later == journal[len(journal) - len(later) :]
        assert_equal(resumed, undisturbed)


def test_one_worker_keeps_the_outer_state_and_is_else_as_exact_as_lightning() -> None:
    """Lookahead with momentum, not shuffled (N = 1 leaves the user's loader alone), at ends of epochs."""
    setting = {
        "strategy": {"num_nodes": 1, "diloco_interval": 4},
        "loader": {"shuffle": False},
        "module": lambda: Project(batch_norm=False),
    }
    setting["module"] = lambda: Quiet()
    undisturbed, _, _ = run(setting, [])
    run(setting, [Save("on_train_epoch_end", {15, 30})])
    for file in sorted(Path().glob("*.ckpt")):
        resumed, _, _ = run(setting, [], ckpt_path=file)
        for key in ("module", "outer"):
            assert_same(resumed[key], undisturbed[key])
        assert resumed["outer state"] == undisturbed["outer state"]
        assert resumed["counters"] == undisturbed["counters"]


class Quiet(Project):
    """Without randomness."""

    def __init__(self) -> None:
        super().__init__()
        self.net[3].p = 0.0


def test_a_plain_run_adds_nothing_to_its_files() -> None:
    setting = {"strategy": {"num_nodes": 1, "outer_optimizer_kwargs": {"lr": 1.0}}}
    run(setting, [Save("on_train_batch_end", {3})])
    assert "diloco" not in torch.load("3.ckpt", weights_only=True)


# -------------------------------------------------------------------------------------------- other N, other H


def test_h_may_change_and_the_round_ends_at_the_next_multiple_counted_from_its_start() -> None:
    from lightning_diloco import DilocoCallback

    run({}, [Save("on_train_batch_end", {7})])  # H = 4: a round began at 4
    for interval, expected in ((2, [8, 10, 12, 14, 15]), (5, [9, 14, 15]), (1, [8, 9, 10, 11, 12, 13, 14, 15])):
        steps: list[int] = []

        class Look(DilocoCallback):
            def on_outer_step(self, trainer, pl_module, report, steps=steps):
                steps.append(report.step)

        run({"strategy": {"diloco_interval": interval}}, [Look()], ckpt_path="7.ckpt")
        assert steps == expected


def test_n_may_change_at_a_synchronisation_only() -> None:
    run({}, [Save("on_train_batch_end", {7, 8})])
    with pytest.raises(ValueError) as caught:
        run({"strategy": {"num_nodes": 4}}, [], ckpt_path="7.ckpt")
    assert str(caught.value) == (
        "`num_nodes` (=4) differs from the 3 workers of The checkpoint 7.ckpt, which was saved 3 local steps into a"
        " round. The number of workers can change only at a synchronisation: resume from a checkpoint of local step 4"
        " or 8."
    )
    for workers in (2, 4):
        starts: list[Any] = []

        class Look(L.Callback):
            def on_train_start(self, trainer, pl_module, starts=starts):
                inner = trainer.strategy.engine.context.inner
                starts.append([len(w.states[0]) for w in inner.workers.values()])
                theta = trainer.strategy.outer_state_dict()
                for w in trainer.strategy.local_workers:
                    assert_same(trainer.strategy.worker_state_dict(w), theta)

        with pytest.warns(UserWarning, match=f"^Resuming 3 workers as {workers}: new workers start from θ"):
            result, _, _ = run({"strategy": {"num_nodes": workers}}, [Look()], ckpt_path="8.ckpt")
        assert starts == [[6] * min(workers, 3) + [0] * (workers - 3)]
        assert result["counters"][0] > 8


def test_another_seed_goes_on_with_the_files_streams_and_the_files_shards() -> None:
    undisturbed, _, _ = run({}, [])
    run({}, [Save("on_train_batch_end", {6})])
    resumed, _, _ = run({}, [], ckpt_path="6.ckpt", seed=1234)
    assert_equal(resumed, undisturbed)


# -------------------------------------------------------------------------------------------- files


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_files_of_other_strategies_start_all_workers_from_them_and_ours_resume_elsewhere() -> None:
    module = Project()
    plain = trainer(max_epochs=1)
    plain.fit(module, loader())
    plain.save_checkpoint("plain.ckpt")
    starts: list[Any] = []

    class Look(L.Callback):
        def on_train_start(self, trainer, pl_module):
            for w in trainer.strategy.local_workers:
                starts.append(trainer.strategy.worker_state_dict(w))
                steps = [int(s["step"]) for s in trainer.strategy.engine.context.inner.workers[w].states[0].values()]
                assert steps == [24] * 6

    strategy = DilocoStrategy(num_nodes=3, diloco_interval=4)
    trainer(strategy, max_epochs=2, callbacks=[Look()]).fit(Project(), loader(), ckpt_path="plain.ckpt")
    assert len(starts) == 3
    for start in starts:
        assert_same(start, copy_of(module.state_dict()))
    assert strategy.local_steps == 8

    run({}, [Save("on_train_batch_end", {7})])
    saved = torch.load("7.ckpt", weights_only=True)
    other = Project()
    with pytest.warns(UserWarning, match="Please add the following callbacks.*DilocoCallback"):
        trainer(max_epochs=2).fit(other, loader(), ckpt_path="7.ckpt")
    loaded = Project.load_from_checkpoint("7.ckpt")
    assert_same(copy_of(loaded.state_dict()), saved["state_dict"])
    steps = {int(s["step"]) for s in saved["optimizer_states"][0]["state"].values()}
    assert steps == {7}


def damaged(change: Any) -> str:
    checkpoint = torch.load("7.ckpt", weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, "damaged.ckpt")
    return "damaged.ckpt"


def test_damaged_and_foreign_files_are_refused_and_leave_the_run_untouched() -> None:
    run({}, [Save("on_train_batch_end", {7})])

    def refused(path: str, message: str, error: Any = ValueError, module: Any = None) -> None:
        fresh = module or Project()
        before = copy_of(fresh.state_dict())
        with pytest.raises(error, match=message):
            trainer(DilocoStrategy(num_nodes=3, diloco_interval=4), max_epochs=3).fit(fresh, loader(), ckpt_path=path)
        assert_same(copy_of(fresh.state_dict()), before)

    refused(
        damaged(lambda c: c["diloco"].update(version=2)),
        r"^The checkpoint damaged.ckpt has the DiLoCo format version 2; this lightning_diloco reads version 1\.",
    )
    refused(
        damaged(lambda c: c["diloco"]["workers"].pop(1)),
        r"^The checkpoint damaged.ckpt was written by 3 workers, but the state of worker 1 is missing",
    )
    refused(
        damaged(lambda c: c["diloco"].pop("outer")), r"^The checkpoint damaged.ckpt lacks outer in its DiLoCo state"
    )
    content = Path("7.ckpt").read_bytes()
    Path("half.ckpt").write_bytes(content[: len(content) // 2])
    refused("half.ckpt", r"^The checkpoint half.ckpt can't be read: it is truncated, or no checkpoint")
    Path("text.ckpt").write_text("hello")
    refused("text.ckpt", r"^The checkpoint text.ckpt can't be read: it is truncated, or no checkpoint")
    refused("none.ckpt", "none.ckpt", FileNotFoundError)
    with pytest.raises(ValueError, match=r"^Parameter 'surplus' is only in the checkpoint\."):
        trainer(DilocoStrategy(num_nodes=3), max_epochs=3).fit(
            Project(),
            loader(),
            ckpt_path=damaged(lambda c: c["diloco"]["outer"]["parameters"].update(surplus=torch.ones(1))),
        )


def test_saving_inside_a_workers_turn_is_refused() -> None:
    class Saves(Project):
        def on_train_batch_end(self, *_):
            self.trainer.save_checkpoint("x.ckpt")

    with pytest.raises(RuntimeError, match=r"^A checkpoint can't be saved inside worker 0's turn, in which"):
        trainer(DilocoStrategy(num_nodes=2), max_steps=2).fit(Saves(), loader())
    assert not list(Path().glob("*.ckpt*"))


def test_files_hold_their_tensors_and_nothing_else() -> None:
    class Wide(Project):
        def __init__(self) -> None:
            super().__init__()
            self.wide = torch.nn.Linear(300, 300)

    run({"module": Wide}, [Save("on_train_batch_end", {7})])

    def tensors(value: Any) -> int:
        if isinstance(value, torch.Tensor):
            return value.nbytes
        children = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
        return sum(tensors(child) for child in children)

    checkpoint = torch.load("7.ckpt", weights_only=True)
    size, held = Path("7.ckpt").stat().st_size, tensors(checkpoint)
    assert held <= size < 1.05 * held + 100_000
    wide = 300 * 301 * 4  # state_dict, θ, outer momentum, 3 replicas; `wide` has no gradient, so no inner state
    assert 6 * wide < size < 6.5 * wide


def test_workers_equal_to_theta_are_left_out() -> None:
    run({}, [Save("on_train_batch_end", {7, 8})])
    apart, together = (torch.load(f"{s}.ckpt", weights_only=True)["diloco"] for s in (7, 8))
    assert all(w["parameters"] is not None for w in apart["workers"].values())
    assert all(w["parameters"] is None for w in together["workers"].values())
    assert isinstance(together["outer"]["parameters"], list), "θ is the mean of the replicas, which state_dict holds"
    assert isinstance(apart["outer"]["parameters"], dict)


def test_asynchronous_writing_snapshots_the_state() -> None:
    from lightning.pytorch.plugins import AsyncCheckpointIO

    undisturbed, _, _ = run({}, [])
    run({"options": lambda: {"plugins": [AsyncCheckpointIO()]}}, [Save("on_train_batch_end", {3, 6, 9})])
    for step in (3, 6, 9):
        resumed, _, _ = run({}, [], ckpt_path=f"{step}.ckpt")
        assert_equal(resumed, undisturbed)


def test_the_bytes_that_callbacks_log_go_on_counting() -> None:
    from test_logging import Memory

    whole = Memory()
    run({}, [], logger=whole)
    run({}, [Save("on_train_batch_end", {9})])
    resumed = Memory()
    run({}, [], ckpt_path="9.ckpt", logger=resumed)
    after = resumed.of("diloco/comm_bytes")
    assert len(after) == 2
    assert after == whole.of("diloco/comm_bytes")[-2:]
    assert resumed.of("diloco/outer_step") == whole.of("diloco/outer_step")[-2:]
