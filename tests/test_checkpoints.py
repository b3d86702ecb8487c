"""Is an interrupted run, resumed from its file, the uninterrupted run, bit for bit?"""

import copy
import random
from collections.abc import Iterator
from contextlib import nullcontext
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from helpers import assert_same, copy_of, loader, regression_data, slow_but, trainer
from lightning.pytorch.plugins import MixedPrecision
from observers import Memory
from projects import Project
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_diloco import Diloco, DilocoStrategy
from lightning_diloco.arguments import plain_value
from lightning_diloco.engine import file_format as checkpoint_format

SEED = 5
DAMAGED = r"the file is damaged\. Resume from another file\."


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
    inner = strategy._engine.context.inner
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


@pytest.mark.parametrize("name", slow_but({"validation"}, SETTINGS))
def test_interrupted_is_uninterrupted(name: str) -> None:
    setting, epochs = SETTINGS[name], 3 if name == "default" else 2
    hook = "on_validation_end" if name == "validation" else "on_train_batch_end"
    undisturbed, journal, draws = run(setting, [], max_epochs=epochs)
    saving, _, _ = run(setting, [Save(hook, set(range(1, 99)))], max_epochs=epochs)
    assert_equal(saving, undisturbed)  # saving changes nothing
    files = sorted(Path().glob("*.ckpt"), key=lambda p: int(p.stem))
    assert len(files) >= 4
    for file in files:
        checkpoint = torch.load(file, weights_only=True)
        resumed, later, later_draws = run(setting, [], ckpt_path=file, seed=99, max_epochs=epochs)
        assert_equal(resumed, undisturbed)
        assert later == journal[len(journal) - len(later) :]
        assert later_draws == draws[len(draws) - len(later_draws) :]
        assert len(later) < len(journal)
        assert checkpoint["diloco"]["version"] == 4


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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
@pytest.mark.parametrize("name", DATA)
def test_every_kind_of_loader_goes_on_where_it_was(name: str) -> None:
    undisturbed, journal, _ = run(DATA[name], [])
    run(DATA[name], [Save("on_train_batch_end", {2, 3, 7, 9})])
    for file in sorted(Path().glob("*.ckpt")):
        resumed, later, _ = run(DATA[name], [], ckpt_path=file, seed=99)
        assert later == journal[len(journal) - len(later) :]
        assert_equal(resumed, undisturbed)


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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
                inner = trainer.strategy._engine.context.inner
                starts.append([len(w.states[0]) for w in inner.workers.values()])
                theta = trainer.strategy.outer_state_dict()
                for w in trainer.strategy.local_workers:
                    assert_same(trainer.strategy.worker_state_dict(w), theta)

        with pytest.warns(UserWarning, match=f"^Resuming 3 workers as {workers}: new workers start from θ"):
            result, _, _ = run({"strategy": {"num_nodes": workers}}, [Look()], ckpt_path="8.ckpt")
        assert starts == [[6] * min(workers, 3) + [0] * (workers - 3)]
        assert result["counters"][0] > 8


@pytest.mark.slow
def test_another_seed_goes_on_with_the_files_streams_and_the_files_shards() -> None:
    undisturbed, _, _ = run({}, [])
    run({}, [Save("on_train_batch_end", {6})])
    resumed, _, _ = run({}, [], ckpt_path="6.ckpt", seed=1234)
    assert_equal(resumed, undisturbed)


class Mixing(Diloco):
    """An algorithm with an argument under another name, and state that changes during the run."""

    def __init__(self, share: float = 0.5, packer: Any = None) -> None:
        self._share, self.packer, self.rounds = share, packer, 0

    def after_inner_step(self, step):
        super().after_inner_step(step)
        self.rounds += len(self.ctx.taken)


class Packer:
    def __init__(self, bits: int) -> None:
        self.bits = bits


def per_kind(lr: float) -> Any:
    def make(parameters):
        parameters = list(parameters)
        groups = [{"params": parameters[:1], "lr": 0.5}, {"params": parameters[1:], "lr": lr}]
        return torch.optim.SGD([g for g in groups if g["params"]])

    return make


ADAM = torch.optim.Adam


OTHERS: list[tuple[dict[str, Any], dict[str, Any], list[str]]] = [  # what wrote the file, what resumes it, words
    (
        {},
        {"outer_optimizer_cls": ADAM},
        ["`outer_optimizer_cls` is SGD in the file and Adam now", "lr=0.7", "lr=0.001"],
    ),
    ({"outer_optimizer_cls": ADAM}, {}, ["`outer_optimizer_cls` is Adam in the file and SGD now"]),
    (
        {},
        {"outer_optimizer_kwargs": {"lr": 1.0}},
        ["`outer_optimizer_kwargs` is lr=0.7, momentum=0.9, nesterov=True", "in the file and lr=1.0, momentum=0"],
    ),
    ({}, {"outer_optimizer_cls": lambda p: torch.optim.SGD(p, lr=0.3)}, ["lr=0.7", "lr=0.3"]),
    (
        {"outer_optimizer_cls": per_kind(0.3)},
        {"outer_optimizer_cls": per_kind(0.4)},
        ["'lr': 0.3", "'lr': 0.4", "group 1"],
    ),
    ({}, {"algorithm": Mixing()}, ["`algorithm` is Diloco in the file and test_checkpoints.Mixing now"]),
    (
        {"algorithm": Mixing(0.2)},
        {"algorithm": Mixing(0.3)},
        ["is share=0.2, packer=None in", "share=0.3, packer=None now"],
    ),
    (
        {"algorithm": Mixing(packer=Packer(4))},
        {"algorithm": Mixing(packer=Packer(8))},
        ["{'class': 'test_checkpoints.Packer', 'bits': 4}", "'bits': 8"],
    ),
]


def halves(first: bool) -> Any:
    """A factory of two outer groups of the same settings; ``first`` puts the first parameter alone, else the last."""

    def make(parameters: Any) -> torch.optim.Optimizer:
        listed = list(parameters)
        cut = 1 if first else len(listed) - 1
        groups = [{"params": part} for part in (listed[:cut], listed[cut:]) if part]
        return torch.optim.SGD(groups, lr=0.5)

    return make


@pytest.mark.parametrize("first", [True, False])
def test_parameters_in_another_group_of_the_outer_optimizer_are_refused(first: bool) -> None:
    run({"strategy": {"outer_optimizer_cls": halves(True)}}, [Save("on_train_batch_end", {7})])
    resume = partial(run, {"strategy": {"outer_optimizer_cls": halves(first)}}, [], ckpt_path="7.ckpt")
    if first:
        resume()
        return
    with pytest.raises(ValueError, match=r"`parameters of the outer optimizer` is .*='group 1'.* in the file and .*"):
        resume()


class Raises:
    """Answers no question."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no ==")

    __hash__ = object.__hash__


class Slots:
    __slots__ = ("x",)


def recursive() -> list[Any]:
    items: list[Any] = [1]
    items.append(items)
    return items


VALUES = {
    "numpy generator": (np.random.default_rng, "Generator(PCG64)"),
    "numpy state": (np.random.RandomState, "RandomState(MT19937)"),
    "torch generator": (torch.Generator, "Generator"),
    "python generator": (random.Random, "random.Random"),
    "keys": (
        lambda: {(lambda: 1): 1, Slots(): 2, torch.mean: 3, np.random.default_rng(): 4},
        {
            "test_checkpoints.<lambda>.<locals>.<lambda>": 1,
            "test_checkpoints.Slots": 2,
            "_VariableFunctionsClass.mean": 3,
            "Generator(PCG64)": 4,
        },
    ),
    "method": (lambda: torch.Tensor.mean, "TensorBase.mean"),
    "classes with tolist": (lambda: [torch.Tensor, np.ndarray], ["Tensor", "numpy.ndarray"]),
    "meta": (lambda: torch.zeros(2, device="meta"), "tensor(..., device='meta', size=(2,))"),
    "many dimensions": (lambda: torch.ones((1,) * 8), [[[[[[[[1.0]]]]]]]]),
    "recursive": (recursive, [1, [1, [1, [1, [1, [1, "list"]]]]]]),
    "raises": (
        lambda: {"a": Raises(), "b": [Raises()]},
        {"a": "test_checkpoints.Raises", "b": ["test_checkpoints.Raises"]},
    ),
    "too large": (lambda: Fraction(10**400), "fractions.Fraction"),
}


@pytest.mark.parametrize("name", VALUES)
def test_every_value_has_a_description_that_is_the_same_in_every_process(name: str) -> None:
    make, expected = VALUES[name]
    objects = [make() for _ in range(2)]  # at two addresses
    assert [plain_value(o) for o in objects] == [expected] * 2


def test_sparse_tensors_have_a_description() -> None:
    one, other = (plain_value(torch.tensor([0.0, x]).to_sparse()) for x in (1.0, 2.0))
    assert isinstance(one, str)
    assert one != other


@pytest.mark.parametrize(
    ("file", "now", "same"),
    [
        ("__main__.Mean", "train.Mean", True),
        ("train.Mean", "__main__.Mean", True),
        ("__main__.Mean", "src.train.Mean", True),
        ("__main__.SGD", "SGD", False),  # torch's
        ("train.Mean", "other.Mean", False),
    ],
)
def test_a_class_of_the_script_is_the_class_of_the_imported_script(file: str, now: str, same: bool) -> None:
    settings = [{"algorithm": name, "arguments of the algorithm": {"of": [name, 1]}} for name in (file, now)]
    with nullcontext() if same else pytest.raises(ValueError, match="was written with other settings"):
        checkpoint_format.check_settings(*settings, "The file")


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize(("wrote", "resumes", "words"), OTHERS)
def test_another_algorithm_or_outer_optimizer_is_refused_by_name(wrote: Any, resumes: Any, words: Any) -> None:
    run({"strategy": wrote}, [Save("on_train_batch_end", {7})])
    module = Project()
    before = copy_of(module.state_dict())
    strategy = DilocoStrategy(num_nodes=3, diloco_interval=4, **resumes)
    with pytest.raises(ValueError, match=r"^The checkpoint.* was written with other settings") as caught:
        trainer(strategy).fit(module, loader(), ckpt_path="7.ckpt")
    assert all(word in str(caught.value) for word in words), str(caught.value)
    if "group 1" not in words:  # groups are known when the module is
        assert_same(copy_of(module.state_dict()), before)
    trainer(strategy).test(
        Evaluated(), loader(shuffle=False), ckpt_path="7.ckpt", verbose=False
    )  # looks at the weights only


class Evaluated(Project):
    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.loss(batch))


@pytest.mark.slow
def test_arguments_that_mean_the_same_resume() -> None:
    """Defaults that are named, numbers of other types, another object, and schedules that changed the live values."""

    class Schedule(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.strategy.outer_optimizer.param_groups[0]["lr"] *= 0.99

    algorithm = Mixing(0.25, Packer(4))
    undisturbed, _, _ = run({"strategy": {"algorithm": Mixing(0.25, Packer(4))}}, [Schedule()])
    run({"strategy": {"algorithm": algorithm}}, [Schedule(), Save("on_train_batch_end", {7, 9})])
    assert algorithm.rounds > 0
    named = {
        "outer_optimizer_cls": torch.optim.SGD,
        "outer_optimizer_kwargs": {"lr": np.float64(0.7), "momentum": 0.9, "nesterov": True, "weight_decay": 0},
    }
    partly = {"outer_optimizer_cls": partial(torch.optim.SGD, lr=0.7, nesterov=True, momentum=0.9)}
    for same, more in (
        (algorithm, {}),
        (Mixing(np.float32(0.25), Packer(4)), named),
        (Mixing(0.25, Packer(4)), partly),
    ):
        for file in ("7.ckpt", "9.ckpt"):
            resumed, _, _ = run({"strategy": {"algorithm": same, **more}}, [Schedule()], ckpt_path=file, seed=99)
            assert_equal(resumed, undisturbed)


@pytest.mark.slow
def test_the_ways_on_that_the_error_names() -> None:
    run({}, [Save("on_train_batch_end", {7})])

    class Slower(L.Callback):
        def on_train_start(self, trainer, pl_module):
            trainer.strategy.outer_optimizer.param_groups[0]["lr"] = 0.1

        def on_train_end(self, trainer, pl_module):
            self.group = trainer.strategy.outer_optimizer.param_groups[0]

    slower = Slower()
    first, _, _ = run({}, [])
    resumed, _, _ = run({}, [slower], ckpt_path="7.ckpt")
    assert (slower.group["lr"], slower.group["momentum"]) == (0.1, 0.9)
    assert not all(torch.equal(resumed["module"][k], v) for k, v in first["module"].items())
    module = Project.load_from_checkpoint("7.ckpt")
    strategy = DilocoStrategy(num_nodes=2, diloco_interval=4, outer_optimizer_cls=torch.optim.Adam)
    trainer(strategy, max_steps=5).fit(module, loader())
    assert type(strategy.outer_optimizer) is torch.optim.Adam


# -------------------------------------------------------------------------------------------- files


@pytest.mark.slow
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
                steps = [int(s["step"]) for s in trainer.strategy._engine.context.inner.workers[w].states[0].values()]
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
    with pytest.warns(UserWarning, match="ended before the epoch ended"):
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


@pytest.mark.slow
def test_damaged_and_foreign_files_are_refused_and_leave_the_run_untouched() -> None:
    run({}, [Save("on_train_batch_end", {7})])

    def refused(path: str, message: str, error: Any = ValueError, module: Any = None) -> None:
        fresh = module or Project()
        before = copy_of(fresh.state_dict())
        with pytest.raises(error, match=message):
            trainer(DilocoStrategy(num_nodes=3, diloco_interval=4), max_epochs=3).fit(fresh, loader(), ckpt_path=path)
        assert_same(copy_of(fresh.state_dict()), before)

    refused(
        damaged(lambda c: c["diloco"].update(version=3)),
        r"^The checkpoint damaged.ckpt has the DiLoCo format version 3; this lightning_diloco reads version 4\.",
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


def keys_of(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every key and item, at all levels."""
    if isinstance(value, (dict, list)):
        for key, child in list(value.items() if isinstance(value, dict) else enumerate(value)):
            yield (*path, key)
            yield from keys_of(child, (*path, key))


def without(checkpoint: dict[str, Any], path: tuple[Any, ...]) -> dict[str, Any]:
    changed = copy.copy(checkpoint)
    holder: Any = changed
    for key in path[:-1]:
        holder[key] = copy.copy(holder[key])
        holder = holder[key]
    del holder[path[-1]]
    return changed


@pytest.mark.parametrize("setting", ["default", "16-mixed accumulate", "manual"])
def test_a_file_that_lacks_any_of_its_keys_is_damaged(setting: str) -> None:
    run(SETTINGS[setting], [Save("on_train_batch_end", {7, 8})])
    strategy = DilocoStrategy(num_nodes=3, diloco_interval=4)
    for file in ("7.ckpt", "8.ckpt"):
        checkpoint = torch.load(file, weights_only=True)
        checkpoint_format.check(checkpoint, 3, strategy._settings.configured, "The file")
        paths = list(keys_of(checkpoint["diloco"], ("diloco",)))
        assert len(paths) > 250
        for path in [*paths, ("state_dict",), ("optimizer_states",), ("loops",), ("loops", "fit_loop", "state_dict")]:
            with pytest.raises(ValueError, match=rf"^The file .*: {DAMAGED}$") as caught:
                checkpoint_format.check(without(checkpoint, path), 3, strategy._settings.configured, "The file")
            named = [str(key) for key in path if not isinstance(key, int)]
            assert any(key in str(caught.value) for key in named[1:] or named), (path, str(caught.value))
    theta = checkpoint["diloco"]["outer"]["parameters"]
    assert isinstance(theta, list)
    with pytest.raises(ValueError, match=rf"^The file lacks state_dict/{theta[0]}: {DAMAGED}$"):
        checkpoint_format.check(
            without(checkpoint, ("state_dict", theta[0])), 3, strategy._settings.configured, "The file"
        )


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (("diloco", "ledger"), "lacks ledger in its DiLoCo state"),
        (("diloco", "version"), "lacks version in its DiLoCo state"),
        (("diloco", "outer", "names"), "lacks outer.names in its DiLoCo state"),
        (("diloco", "workers", 2, "random", "cpu"), r"lacks workers\[2\].random.cpu in its DiLoCo state"),
        (("diloco", "workers", 1, "parameters", "net.0.bias"), "lacks entries of workers in its DiLoCo state"),
        (("diloco", "settings", "outer_optimizer_cls"), "lacks entries of settings in its DiLoCo state"),
        (("loops",), "lacks loops/fit_loop/state_dict"),
    ],
    ids=str,
)
def test_fit_says_which_key_a_damaged_file_lacks(path: tuple[Any, ...], message: str) -> None:
    run({}, [Save("on_train_batch_end", {7})])
    torch.save(without(torch.load("7.ckpt", weights_only=True), path), "damaged.ckpt")
    module = Project()
    before = copy_of(module.state_dict())
    with pytest.raises(ValueError, match=rf"^The checkpoint damaged.ckpt {message}: {DAMAGED}$"):
        trainer(DilocoStrategy(num_nodes=3, diloco_interval=4)).fit(module, loader(), ckpt_path="damaged.ckpt")
    assert_same(copy_of(module.state_dict()), before)


def test_the_list_of_keys_is_that_of_the_files() -> None:
    run({}, [Save("on_train_batch_end", {7})])
    state = torch.load("7.ckpt", weights_only=True)["diloco"]
    levels: list[tuple[Any, Any]] = [
        (checkpoint_format.RunState, state),
        (checkpoint_format.OuterState, state["outer"]),
        (checkpoint_format.OptimizerDict, state["outer"]["optimizer"]),
        (checkpoint_format.LedgerState, state["ledger"]),
        (checkpoint_format.LoaderState, state["loader"]),
        (checkpoint_format.StreamState, state["random"]),
        (checkpoint_format.WorkerState, state["workers"][2]),
        (checkpoint_format.StreamState, state["workers"][2]["random"]),
    ]
    for keys, found in levels:
        assert found.keys() == keys.__required_keys__


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


@pytest.mark.slow
def test_asynchronous_writing_snapshots_the_state() -> None:
    from lightning.pytorch.plugins import AsyncCheckpointIO

    undisturbed, _, _ = run({}, [])
    run({"options": lambda: {"plugins": [AsyncCheckpointIO()]}}, [Save("on_train_batch_end", {3, 6, 9})])
    for step in (3, 6, 9):
        resumed, _, _ = run({}, [], ckpt_path=f"{step}.ckpt")
        assert_equal(resumed, undisturbed)


@pytest.mark.slow
def test_the_bytes_that_callbacks_log_go_on_counting() -> None:
    whole = Memory()
    run({}, [], logger=whole)
    run({}, [Save("on_train_batch_end", {9})])
    resumed = Memory()
    run({}, [], ckpt_path="9.ckpt", logger=resumed)
    after = resumed.of("diloco/comm_bytes")
    assert len(after) == 2
    assert after == whole.of("diloco/comm_bytes")[-2:]
    assert resumed.of("diloco/outer_step") == whole.of("diloco/outer_step")[-2:]
