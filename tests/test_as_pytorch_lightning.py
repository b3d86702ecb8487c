"""Do projects that import ``pytorch_lightning`` train under DilocoStrategy, and does it say so where they don't?

The alias changes a process for good. So every test runs in a forked process, or in a new Python.
"""

import copy
import importlib
import importlib.util
import os
import pickle
import runpy
import sys
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning as L
import pytest
import torch
from helpers import assert_same, regression_data
from processes import in_a_process, script

from lightning_diloco import DilocoStrategy

ROOT = Path(__file__).parents[1]


def alias() -> None:
    importlib.import_module("lightning_diloco.as_pytorch_lightning")


# ------------------------------------------------------------------------------------------------ the names


@pytest.mark.processes
def test_every_module_is_the_same_object_under_both_names(tmp_path: Path) -> None:
    """Walks the tree of the other package, which differs from Lightning's by its ``__about__`` and ``__version__``."""
    folder = Path(L.__file__).parents[1]

    def walk() -> list[str]:
        warnings.simplefilter("ignore")  # of modules that nobody imports otherwise
        alias()
        wrong = []
        for package, real in (("pytorch_lightning", "lightning.pytorch"), ("lightning_fabric", "lightning.fabric")):
            for i, file in enumerate(sorted((folder / package).rglob("*.py"))):
                name = ".".join(file.relative_to(folder).with_suffix("").parts).removesuffix(".__init__")
                if name.endswith("__setup__"):
                    continue  # packaging's
                ours = real + name.removeprefix(package)
                if name.endswith(("__about__", "__version__")):
                    ours = "lightning." + name.rpartition(".")[2]
                pair = [name, ours][:: 1 if i % 2 else -1]  # in either order
                first, second = (importlib.import_module(n) for n in pair)
                if first is not second or first.__name__ != ours or first.__spec__.name != ours:
                    wrong.append(name)
        return [*wrong, str(len([n for n in sys.modules if n.startswith("pytorch_lightning")]) > 100)]

    assert in_a_process(walk, tmp_path) == ["True"]


@pytest.mark.processes
def test_every_way_to_import_gives_the_same_module(tmp_path: Path) -> None:
    def ways() -> list[Any]:
        alias()
        importlib.reload(importlib.import_module("lightning_diloco.as_pytorch_lightning"))  # twice is harmless
        import lightning_fabric
        import pytorch_lightning as pl
        import pytorch_lightning.callbacks.early_stopping as early_stopping
        from lightning_fabric.utilities.seed import seed_everything
        from pytorch_lightning.callbacks import EarlyStopping
        from pytorch_lightning.utilities.types import STEP_OUTPUT

        assert pl is L.pytorch
        assert lightning_fabric is L.fabric
        assert EarlyStopping is early_stopping.EarlyStopping is L.pytorch.callbacks.EarlyStopping
        assert seed_everything is L.seed_everything
        assert STEP_OUTPUT is L.pytorch.utilities.types.STEP_OUTPUT
        assert importlib.import_module("pytorch_lightning.loops.fit_loop") is L.pytorch.loops.fit_loop
        assert importlib.import_module(".loops", "pytorch_lightning") is L.pytorch.loops
        assert importlib.util.find_spec("pytorch_lightning") is not None
        assert importlib.util.find_spec("pytorch_lightning.strategies.ddp") is not None
        assert importlib.util.find_spec("pytorch_lightning.nothing") is None
        with pytest.raises(ModuleNotFoundError, match=r"No module named 'pytorch_lightning\.nothing'"):
            importlib.import_module("pytorch_lightning.nothing")
        made = sys.modules["lightning.pytorch.made"] = ModuleType("made")  # as Lightning does for old checkpoints
        assert importlib.import_module("pytorch_lightning.made") is made
        assert pickle.loads(pickle.dumps(EarlyStopping)) is EarlyStopping
        assert pickle.loads(b"cpytorch_lightning.callbacks.early_stopping\nEarlyStopping\n.") is EarlyStopping
        assert copy.deepcopy(pl.Trainer) is L.Trainer
        versions = [metadata.version(n) for n in ("pytorch-lightning", "pytorch_lightning", "lightning_fabric")]
        return [pl.__version__, importlib.import_module("pytorch_lightning.__version__").version, *versions]

    assert in_a_process(ways, tmp_path) == [L.__version__] * 5


@pytest.mark.processes
def test_modules_run_by_name_and_the_about_is_an_attribute(tmp_path: Path) -> None:
    def ask() -> list[str]:
        alias()
        import pytorch_lightning as pl

        again = runpy.run_module("pytorch_lightning.utilities.seed")
        assert again["__name__"] == "pytorch_lightning.utilities.seed"
        assert runpy.run_module("lightning_fabric.utilities.seed", run_name="__main__")["__name__"] == "__main__"
        with pytest.raises(ImportError, match=r"No module named pytorch_lightning\.nothing"):
            runpy.run_module("pytorch_lightning.nothing")
        return [pl.__about__.__name__, importlib.import_module("lightning_fabric").__about__.__name__]

    assert in_a_process(ask, tmp_path) == ["lightning.__about__"] * 2


@pytest.mark.processes
def test_the_other_package_need_not_be_installed(tmp_path: Path) -> None:
    def without() -> tuple[str, str]:
        class Refuse:
            @staticmethod
            def find_spec(name: str, *args: Any) -> None:
                if name.split(".")[0] in ("pytorch_lightning", "lightning_fabric"):
                    raise ModuleNotFoundError(f"{name} was looked for elsewhere")

        sys.meta_path.insert(0, Refuse)
        alias()
        pl = importlib.import_module("pytorch_lightning")
        sampler = importlib.import_module("lightning_fabric.utilities.distributed").DistributedSamplerWrapper
        return pl.Trainer.__module__, sampler.__module__

    assert in_a_process(without, tmp_path) == (L.Trainer.__module__, "lightning.fabric.utilities.distributed")


@pytest.mark.processes
@pytest.mark.parametrize("name", ["pytorch_lightning", "lightning_fabric", "lightning_fabric.utilities.apply_func"])
def test_too_late_is_an_error_that_changes_nothing(name: str, tmp_path: Path) -> None:
    package = name.split(".")[0]

    def late() -> Any:
        before = importlib.import_module(name)
        if name != package:
            del sys.modules[package]  # as after an import that failed halfway
        finders = list(sys.meta_path)
        with pytest.raises(ImportError) as caught:
            alias()
        with pytest.raises(ImportError):  # not only the first time
            alias()
        assert sys.modules[name] is before
        assert sys.meta_path == finders
        return str(caught.value)

    real = package.replace("_", ".") if package == "lightning_fabric" else "lightning.pytorch"
    assert in_a_process(late, tmp_path) == (
        f"`{package}` was imported before `lightning_diloco.as_pytorch_lightning`, and can't become a name of `{real}`"
        " any more: its classes may be in use. Put `import lightning_diloco.as_pytorch_lightning` above every import"
        f" of `{package}` and of packages that import it: at the top of the script that is started, or in the first"
        " cell of a notebook after restarting its kernel."
    )


# ------------------------------------------------------------------------------------------------ training

PROJECT = """
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)

    def training_step(self, batch, batch_idx):
        loss = torch.nn.functional.mse_loss(self.layer(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

class Forecaster:
    '''A package that builds the Trainer inside.'''
    def __init__(self, **trainer_kwargs):
        self.trainer_kwargs = trainer_kwargs

    def fit(self, dataset, folder):
        pl.seed_everything(5, verbose=False)
        self.module = Module()
        self.trainer = pl.Trainer(
            accelerator="cpu", max_epochs=2, logger=False, enable_progress_bar=False, enable_model_summary=False,
            callbacks=[ModelCheckpoint(folder)], **self.trainer_kwargs,
        )
        self.trainer.fit(self.module, torch.utils.data.DataLoader(dataset, 4, shuffle=True))
        return self
"""


@pytest.fixture
def _package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "forecasting.py").write_text(PROJECT)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.processes
@pytest.mark.usefixtures("_package")
def test_a_package_that_builds_the_trainer_inside_trains(tmp_path: Path) -> None:
    def train() -> Any:
        alias()
        forecasting: Any = importlib.import_module("forecasting")
        states = []
        plain = DilocoStrategy(1, 4, outer_optimizer_kwargs={"lr": 1.0})
        three = DilocoStrategy(3, 4)
        for i, kwargs in enumerate(({}, {"strategy": plain}, {"strategy": three}, {"strategy": "diloco"})):
            forecaster = forecasting.Forecaster(**kwargs).fit(regression_data(), tmp_path / f"{i}")
            states.append({k: v.clone() for k, v in forecaster.module.state_dict().items()})
            (file,) = (tmp_path / f"{i}").iterdir()
            forecasting.Module.load_from_checkpoint(file)
        return states, (three.local_steps, three.outer_steps), forecaster.trainer.strategy.num_workers

    (without, plain, three, four), steps, workers = in_a_process(train, tmp_path)
    assert_same(without, plain)
    assert steps == (16, 4)
    assert workers == 4
    assert not torch.equal(without["layer.weight"], three["layer.weight"])
    assert not torch.equal(three["layer.weight"], four["layer.weight"])


SCRIPT = """
import sys

if __name__ == "__main__":  # so that spawned processes, which read this file, too, don't see the alias here
    import lightning_diloco, lightning_diloco.__main__
    assert not {"pytorch_lightning", "lightning_fabric"} & sys.modules.keys()
    import lightning_diloco.as_pytorch_lightning
    import torch
    from helpers import regression_data
    from forecasting import Forecaster
    torch.set_num_threads(1)
    strategy = lightning_diloco.DilocoStrategy(2, 4, start_method=sys.argv[1])
    forecaster = Forecaster(strategy=strategy, devices=2).fit(regression_data(), "files")
    print("base of the module:", type(forecaster.module).__mro__[1].__module__)
"""


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.usefixtures("_package")
@pytest.mark.parametrize("method", ["popen", "spawn"])
def test_further_processes_have_the_alias_before_they_import_the_project(method: str, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    paths = [str(ROOT), str(ROOT / "tests"), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    done = script("script.py", method, environment=environment, copies=False)
    assert done.returncode == 0, done.stderr
    assert "base of the module: lightning.pytorch.core.module" in done.stdout
    assert [file.name for file in (tmp_path / "files").iterdir()] == ["epoch=1-step=24.ckpt"]


# ------------------------------------------------------------------------------------------------ without the alias


def said_by(make: Callable[[], Any]) -> list[warnings.WarningMessage]:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        make()
    return [w for w in said if "pytorch_lightning" in str(w.message)]


@pytest.mark.processes
def test_without_the_alias_a_strategy_says_once_that_the_other_trainer_refuses_it(tmp_path: Path) -> None:
    def warned() -> Any:
        assert said_by(DilocoStrategy) == []  # nothing of the other package is there
        pl = importlib.import_module("pytorch_lightning")
        (first,) = said_by(lambda: DilocoStrategy(2))
        assert first.filename == __file__
        assert said_by(DilocoStrategy) == []
        with pytest.raises(ValueError, match="You selected an invalid strategy name: `strategy=<") as refused:
            pl.Trainer(strategy=DilocoStrategy(2))
        return str(first.message), str(refused.value)

    message, refusal = in_a_process(warned, tmp_path)
    assert message == (
        "`pytorch_lightning` is imported in this process. Its Trainer takes no DilocoStrategy ('You selected an invalid"
        " strategy name'), and the Trainer of `lightning.pytorch` takes none of its modules. If your code or a package"
        " that builds the Trainer for you uses `pytorch_lightning`, put `import lightning_diloco.as_pytorch_lightning`"
        " above its first import. If only a dependency has imported it, ignore this warning, which comes once."
    )
    assert "`pytorch_lightning.strategies.Strategy`" in refusal


@pytest.mark.processes
def test_with_the_alias_and_in_other_ranks_nothing_is_said(tmp_path: Path) -> None:
    def with_alias() -> list[Any]:
        alias()
        importlib.import_module("pytorch_lightning")
        return said_by(DilocoStrategy)

    def in_another_rank() -> list[Any]:
        importlib.import_module("pytorch_lightning")
        from lightning_utilities.core.rank_zero import rank_zero_only

        rank_zero_only.rank = 1
        return said_by(DilocoStrategy)

    assert in_a_process(with_alias, tmp_path / "a") == []
    assert in_a_process(in_another_rank, tmp_path / "b") == []
