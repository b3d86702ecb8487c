"""Does the simulator refuse wrong input with words that help?"""

import inspect
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from simulators import Log, classes, simulator, trained
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset, IterableDataset

from lightning_diloco import DilocoSimulator
from lightning_diloco.simulator.facade import _STRATEGY_ARGUMENTS, _TRAINER_ARGUMENTS
from lightning_diloco.simulator.module import SimulatorModule


class Pictures(Dataset[Any]):
    def __len__(self) -> int:
        return 120

    def __getitem__(self, index: int) -> Any:
        return {"image": torch.full((4,), float(index)), "label": index % 3}


def test_other_batches_get_an_error_that_says_what_to_do_and_that_works() -> None:
    for data, size in ((Pictures(), "dict of 2 items"), (classes(120).tensors[0], "Tensor")):
        with pytest.raises(MisconfigurationException) as caught:
            trained(train_dataset=data)
        assert str(caught.value) == (
            f"The dataset's batches are a {size}, but must be pairs `(x, y)`. For other batches, override"
            " `split(self, batch)` in a subclass of lightning_diloco.simulator.SimulatorModule so that it returns"
            " `(x, y)`, and set `module_cls` to that subclass in a subclass of DilocoSimulator."
        )

    class Labelled(SimulatorModule):
        def split(self, batch: Any) -> tuple[Any, Any]:
            return batch["image"], batch["label"]

    class PictureSimulator(DilocoSimulator):
        module_cls = Labelled

    log = Log()
    s = simulator(PictureSimulator, train_dataset=Pictures(), eval_dataset=Pictures(), **log.hooks())
    s.train()
    assert len(log.train) == 10
    assert log.eval[-1].accuracy is not None


def test_a_loss_that_is_not_one_number_is_refused() -> None:
    for loss_fn, found in (
        (lambda output, y: F.cross_entropy(output, y, reduction="none"), "a tensor of shape (4,)"),
        (lambda output, y: 1.0, "float"),
    ):
        with pytest.raises(MisconfigurationException) as caught:
            trained(loss_fn=loss_fn)
        assert str(caught.value) == (
            f"`loss_fn` returned {found}, but must return a tensor with a single number: the mean over the batch."
        )


def test_before_training_there_is_nothing_to_look_at() -> None:
    for name in ("model", "trainer", "strategy"):
        with pytest.raises(RuntimeError, match=r"exist from the first call of `train\(\)` on\."):
            getattr(simulator(), name)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(classes(100))

    def __repr__(self) -> str:
        return "Stream()"


COUNT = "`{0}` (={1!r}) must be an integer ≥ 1: the number of {2}."


LENGTH = (
    "`{0}` (=Stream()) must be a dataset with `__len__` and `__getitem__`. Streams work with a DilocoStrategy in your"
    " own Trainer."
)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"num_nodes": 0}, COUNT.format("num_nodes", 0, "simulated workers")),
    ({"diloco_interval": 0}, COUNT.format("diloco_interval", 0, "local steps between outer steps")),
    ({"batch_size": 2.5}, COUNT.format("batch_size", 2.5, "samples per worker and step")),
    ({"num_epochs": 0}, COUNT.format("num_epochs", 0, "passes over `train_dataset`")),
    ({"max_local_step": 0}, COUNT.format("max_local_step", 0, "local steps at most")),
    ({"eval_iters": 0}, COUNT.format("eval_iters", 0, "batches per evaluation")),
    (
        {"ckpt_interval": 0, "save_dir": "x"},
        COUNT.format("ckpt_interval", 0, "outer steps between checkpoints"),
    ),
    ({"cosine_anneal": 1}, "`cosine_anneal` (=1) must be True or False."),
    ({"model_cls": "resnet"}, "`model_cls` (='resnet') must be a class derived from "),
    (
        {"optimizer_cls": "adam"},
        "`optimizer_cls` (='adam') must be a class derived from torch.optim.optimizer.Optimizer.",
    ),
    ({"save_dir": 3}, "`save_dir` (=3) must be the path of a folder, or None."),
    ({"save_dir": ""}, "`save_dir` (='') must be the path of a folder, or None."),
    ({"save_dir": __file__}, f"`save_dir` (={__file__!r}) is a file. Name a folder; it is made if it doesn't exist."),
    ({"loss_fn": "mse"}, "`loss_fn` (='mse') must be a callable `(model(x), y) -> loss`."),
    (
        {"train_loss_hook": 3},
        "`train_loss_hook` (=3) must be a callable that takes the statistics, or None.",
    ),
    (
        {"eval_loss_hook": print},
        "`eval_loss_hook` was given without `eval_dataset` and would never be called. Give both.",
    ),
    ({"ckpt_interval": 2}, "`ckpt_interval` (=2) was given without `save_dir`. Give the folder of the files."),
    ({"seed": -1}, "`seed` (=-1) must be an integer from 0 to 2**32 - 1, or None."),
    ({"train_dataset": Stream()}, LENGTH.format("train_dataset")),
    ({"eval_dataset": Stream()}, LENGTH.format("eval_dataset")),
    ({"eval_dataset": classes(0)}, "`eval_dataset` is empty. Leave the argument out, or give a dataset with samples."),
    (
        {"train_dataset": classes(11)},
        "The run would have no step: `num_epochs` (=1) times 11 samples are fewer than `batch_size` (=4) times"
        " `num_nodes` (=3). Lower `batch_size` or `num_nodes`, or raise `num_epochs`.",
    ),
    ({"model_kwargs": [1]}, "`model_kwargs` (=[1]) must be a dict or None."),
    (
        {"model_kwargs": {"widht": 3}},
        "`model_kwargs` (={'widht': 3}) doesn't fit Classifier: got an unexpected keyword argument 'widht'.",
    ),
    (
        {"optimizer_kwargs": {"learning_rate": 3}},
        "`optimizer_kwargs` (={'learning_rate': 3}) doesn't fit AdamW: got an unexpected keyword argument"
        " 'learning_rate'.",
    ),
    (
        {"model_cls": nn.Linear, "model_kwargs": {"in_features": 4}},
        "`model_kwargs` (={'in_features': 4}) doesn't fit Linear: missing a required argument: 'out_features'.",
    ),
    ({"strategy_kwargs": {"buffer": "first"}}, "`strategy_kwargs` (={'buffer': 'first'}) doesn't fit DilocoStrategy: "),
    (
        {"strategy_kwargs": {"num_nodes": 3}},
        "`strategy_kwargs` has 'num_nodes' (=3), which is decided by the simulator's argument of the same name. Leave"
        " 'num_nodes' out.",
    ),
    ({"strategy_kwargs": {"buffers": "typo"}}, "`buffers` (='typo') must be one of 'average', 'first', 'local'."),
    ({"outer_optimizer_kwargs": {"lr": -1.0}}, "The outer optimizer can't be built: "),
    ({"trainer_kwargs": {"max_step": 3}}, "`trainer_kwargs` (="),
    (
        {"trainer_kwargs": {"max_steps": 3}},
        "`trainer_kwargs` has 'max_steps' (=3), which is decided by `max_local_step`. Leave 'max_steps' out.",
    ),
    (
        {"trainer_kwargs": {"strategy": "ddp"}},
        "`trainer_kwargs` has 'strategy' (='ddp'), which is decided by `strategy_kwargs`. Leave 'strategy' out.",
    ),
    (
        {"trainer_kwargs": {"limit_val_batches": 3}},
        "`trainer_kwargs` has 'limit_val_batches' (=3), which is decided by `eval_iters`. Leave 'limit_val_batches'"
        " out.",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=lambda x: "-".join(x) if isinstance(x, dict) else "")
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        simulator(**arguments)
    assert str(caught.value).startswith(message) if message.endswith((" ", "(=")) else str(caught.value) == message


@pytest.mark.parametrize("name", [*_TRAINER_ARGUMENTS, *_STRATEGY_ARGUMENTS])
def test_what_the_simulator_decides_can_t_be_given_twice(name: str) -> None:
    where = "trainer_kwargs" if name in _TRAINER_ARGUMENTS else "strategy_kwargs"
    with pytest.raises(
        ValueError, match=rf"^`{where}` has '{name}' \(=1\), which is decided by .*\. Leave '{name}' out\.$"
    ):
        simulator(**{where: {name: 1}})


def test_defaults() -> None:
    defaults = {
        k: p.default for k, p in inspect.signature(DilocoSimulator).parameters.items() if p.default is not p.empty
    }
    assert {k: v for k, v in defaults.items() if v is not None} == {
        "optimizer_cls": torch.optim.AdamW,
        "outer_optimizer_cls": torch.optim.SGD,
        "num_epochs": 1,
        "cosine_anneal": False,
        "eval_iters": 50,
        "quiet": False,
    }
    outer = trained(max_local_step=1).strategy.outer_optimizer.defaults
    assert [outer[k] for k in ("lr", "momentum", "nesterov")] == [0.7, 0.9, True]


def test_an_unknown_argument_is_refused_with_its_name() -> None:
    with pytest.raises(TypeError, match="'num_node'"):
        simulator(num_node=4)
