"""Is every use of Lightning's private API in one place, and does it fail loudly when Lightning changes?"""

import ast
from pathlib import Path
from typing import Any

import pytest
from helpers import Net, loader, trainer
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import lightning_diloco
from lightning_diloco import DilocoStrategy
from lightning_diloco._lightning import installation, loops

PACKAGE = Path(lightning_diloco.__file__).parent
MAY_IMPORT_LIGHTNING = {"strategy.py", "fit.py", "callback.py", "__init__.py", "__main__.py", "as_pytorch_lightning.py"}


def imports(path: Path) -> set[tuple[str, str]]:
    """(module, name) of every import in a file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {(node.module or "", alias.name) for alias in node.names}
    return found


def test_only_the_shell_imports_lightning() -> None:
    for path in PACKAGE.rglob("*.py"):
        lightning = {m for m, _ in imports(path) if m.split(".")[0] in ("lightning", "pytorch_lightning")}
        shell = path.parent.name in ("_lightning", "simulator")
        shell = shell or (path.parent == PACKAGE and path.name in MAY_IMPORT_LIGHTNING)
        assert shell or not lightning, f"{path.name} imports {lightning}"


def test_only_the_adapters_import_private_names_or_touch_private_attributes() -> None:
    attributes = (
        "_accelerator_connector",
        "_logger_connector",
        "_data_connector",
        "_results",
        "_active_loop",
        "_batches",
    )
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name == "_lightning":
            continue
        private = {(m, n) for m, n in imports(path) if m.startswith("lightning.") and (n.startswith("_") or "._" in m)}
        assert not private, f"{path.name}: {private}"
        assert not any(f".{a}" in path.read_text() for a in attributes), path.name


LAYERS = """
    comm.tensors comm.means comm.world comm.team comm.channel
    state.randomness state.replicas state.worker state.optimizers state.outer state.policies state.live_module
    state.checks state.guard
    algorithms.report algorithms.context algorithms.base algorithms.diloco algorithms
    engine.checkpoint engine.progress engine.views engine.engine
    arguments callback fit
    _lightning.reclassed _lightning.hooks _lightning.trainer_state _lightning.io _lightning.samplers _lightning.data
    _lightning.connectors _lightning.results _lightning.loops _lightning.installation _lightning.launching
    _lightning.trainers _lightning.process _lightning.team _lightning.fitting
    strategy
    simulator.metrics simulator.module simulator.callback simulator.facade simulator
    lightning_diloco as_pytorch_lightning __main__
    comm state engine _lightning
"""


def test_every_module_imports_only_modules_before_it() -> None:
    """The modules in the order in which a reader can read them; an import inside a function counts as any other."""
    rank = {name: i for i, name in enumerate(LAYERS.split())}
    seen = set()
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        own = ".".join(part for part in parts if part != "__init__") or "lightning_diloco"
        seen.add(own)
        for module, name in imports(path):
            if module.split(".")[0] != "lightning_diloco":
                continue
            target = ".".join(module.split(".")[1:])
            inside = f"{target}.{name}".strip(".")
            target = inside if inside in rank else target or "lightning_diloco"
            assert rank[target] < rank[own], f"{own} imports {target}, which comes after it"
    assert seen == set(rank)


def test_the_installed_lightning_is_the_one_this_was_written_for() -> None:
    installation.verify()


@pytest.mark.parametrize(("owner", "method"), installation._SIGNATURES)
def test_a_changed_or_missing_private_method_is_named(owner: type, method: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(owner, method, lambda self, something_new: None)
    with pytest.raises(RuntimeError) as caught:
        trainer(DilocoStrategy(num_nodes=2), max_steps=1).fit(Net(), loader())
    assert f"has changed `{owner.__name__}.{method}`: expected the parameters" in str(caught.value)
    assert "found ('self', 'something_new')" in str(caught.value)
    assert "needs lightning>=2.6,<2.7" in str(caught.value)


def test_replaced_loops_are_refused() -> None:
    class Foreign(_TrainingEpochLoop):
        pass

    t = trainer(DilocoStrategy(num_nodes=2), max_steps=1)
    t.fit_loop.epoch_loop.__class__ = Foreign
    with pytest.raises(MisconfigurationException, match=r"The Trainer's loops were replaced: found a .*Foreign where"):
        t.fit(Net(), loader())


def test_loops_of_other_trainers_are_untouched() -> None:
    other = trainer(max_steps=1)
    seen: list[Any] = []

    class Look(Net):
        def training_step(self, batch, batch_idx):
            seen.append((type(self.trainer.fit_loop), type(other.fit_loop)))
            return super().training_step(batch, batch_idx)

    trainer(DilocoStrategy(num_nodes=2), max_steps=1).fit(Look(), loader())
    assert {a for a, _ in seen} == {loops.DilocoFitLoop}
    assert {b for _, b in seen} == {type(other.fit_loop)}
