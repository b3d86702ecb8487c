"""Is every use of Lightning's private API in one place, and does it fail loudly when Lightning changes?"""

import ast
import re
import sys
from importlib import metadata
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning
import pytest
from helpers import Net, loader, trainer
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import lightning_diloco
from lightning_diloco import DilocoStrategy
from lightning_diloco._lightning import loops, surface

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


@pytest.mark.slow
def test_only_the_shell_imports_lightning() -> None:
    for path in PACKAGE.rglob("*.py"):
        lightning = {m for m, _ in imports(path) if m.split(".")[0] in ("lightning", "pytorch_lightning")}
        shell = path.parent.name in ("_lightning", "simulator", "reporting", "comparison")
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
    cluster.inputs cluster.availability cluster.presence cluster.schedule cluster.tally cluster.patterns cluster.cluster
    cluster.timeline cluster.replay cluster.pace cluster.clock cluster.layer_model cluster.planning cluster.calibration
    cluster.command cluster
    codecs.base codecs.levels codecs.moments codecs.packing codecs.identity codecs.cast codecs.int8 codecs.fp4
    codecs.uniform codecs.statistical codecs.topk codecs.randomk codecs.dct
    codecs.error_feedback codecs
    comm.tensors comm.means comm.statistics comm.likeness comm.ledger comm.waiting comm.watcher comm.objects comm.world
    comm.payloads comm.slices comm.team comm.decoded comm.channel comm.messages
    state.randomness state.replicas state.worker state.own_steps state.optimizers state.outer state.policies
    state.live_module state.memory state.checks state.guard
    algorithms.report algorithms.layers algorithms.deltas algorithms.transfer algorithms.machines
    algorithms.participation algorithms.aggregates algorithms.order
    algorithms.measuring algorithms.aggregating algorithms.sending algorithms.context
    algorithms.base algorithms.around algorithms.robust
    algorithms.diloco algorithms.periodic_averaging algorithms.data_parallel algorithms.post_local_sgd
    algorithms.sparse_loco algorithms.streaming algorithms.eager algorithms.sparta algorithms.no_loco algorithms.des_loc
    algorithms.slow_mo algorithms.hierarchical algorithms.gpa algorithms.fed_opt algorithms.demo algorithms.edit
    algorithms.delayed_nesterov algorithms
    engine.file_format engine.checkpoint engine.joining engine.places engine.progress engine.times engine.turns
    engine.telemetry engine.synchronisation engine.views engine.engine
    partitions.draws partitions.labels partitions.rules partitions
    arguments reporting.metrics reporting.tensorboard reporting.plan reporting.hints
    reporting.cores reporting.summary callback reporting.progress reporting fit
    _lightning.reclassed _lightning.surface _lightning.hooks _lightning.hyperparameters _lightning.trainer_state
    _lightning.io _lightning.rounds
    _lightning.grouping _lightning.samplers _lightning.tracing _lightning.reading
    _lightning.own_pace _lightning.loaders _lightning.data
    _lightning.planning _lightning.connectors _lightning.results _lightning.turns _lightning.optimization
    _lightning.evaluation _lightning.loops
    _lightning.installation _lightning.launching _lightning.trainers _lightning.ranks _lightning.process
    _lightning.collectives _lightning.shortcuts _lightning.team _lightning.fitting
    strategy
    simulator.metrics simulator.history simulator.module simulator.callback simulator.facade simulator
    comparison.requirements comparison.runs comparison.recording comparison.training comparison.folder
    comparison.processes comparison.tables comparison.figures comparison.results comparison.comparing comparison
    lightning_diloco as_pytorch_lightning comparison.command __main__
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


OURS = {  # private names of ours that Lightning's sources happen to have, too
    "_batches", "_connector", "_loader", "_lock", "_log", "_prefix", "_rank", "_sampler", "_start_method", "_sync",
    "_timeout", "_trace",
    "_class_path",  # a key that LightningCLI puts among hyperparameters; no attribute
}  # fmt: skip
IN_THE_TABLES = {name for _, name in surface.SIGNATURES} | {
    name for names in (*surface.ATTRIBUTES.values(), *surface.EXAMPLES.values(), surface.OF_MODULES) for name in names
}


def private_names(path: Path) -> tuple[set[str], set[str]]:
    """Private names that a file uses on objects or imports as functions, and those that it defines."""
    used, defined = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            used.add(node.attr)
            if isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name) and node.value.id == "self":
                defined.add(node.attr)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            used.add(node.name)  # which may override
            defined.add(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            used.add(node.target.id)
            defined.add(node.target.id)
        elif isinstance(node, ast.Assign):
            defined |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            used |= set() if node.value.endswith("_") else {node.value}  # getattr's and the like; not prefixes
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("lightning_diloco"):
            functions = {alias.name for alias in node.names if alias.name.islower()}
            used |= functions if "._" in (node.module or "") else {f for f in functions if f.startswith("_")}
    return {n for n in used if n[:2] != "__"}, defined


def adapters() -> list[Path]:
    return [path for path in sorted((PACKAGE / "_lightning").glob("*.py")) if path.name != "surface.py"]


@pytest.mark.slow
def test_every_private_name_in_use_is_in_the_tables() -> None:
    of_lightning: set[str] = set()
    for part in ("pytorch", "fabric"):
        for path in Path(lightning.__file__).parent.joinpath(part).rglob("*.py"):
            of_lightning |= set(re.findall(r"\b_[A-Za-z]\w*", path.read_text()))
    defined = set().union(*(private_names(path)[1] for path in PACKAGE.rglob("*.py")))
    for path in adapters():
        private = {n for n in private_names(path)[0] if n.startswith("_")}
        missing = {n for n in private if n in of_lightning or n not in defined} - IN_THE_TABLES - OURS - {"_exit"}
        assert not missing, f"{path.name} uses {missing}; add them to surface.py"


def test_every_name_in_the_tables_is_in_use() -> None:
    used = set().union(*(private_names(path)[0] for path in adapters()))
    assert not IN_THE_TABLES - used
    assert not OURS - used


@pytest.fixture(autouse=True)
def _not_verified_yet() -> None:
    surface.verify_installed.cache_clear()


def connected() -> tuple[Net, Any]:
    model, t = Net(), trainer(DilocoStrategy(num_nodes=2), max_steps=1)
    model.trainer = t
    return model, t


def test_the_installed_lightning_is_the_one_this_was_written_for() -> None:
    surface.verify(connected()[0])


@pytest.mark.parametrize(
    ("owner", "name"), surface.SIGNATURES, ids=[f"{owner.__name__}.{name}" for owner, name in surface.SIGNATURES]
)
def test_a_changed_private_function_is_named(owner: Any, name: str, monkeypatch: Any) -> None:
    model, t = connected()
    with monkeypatch.context() as patch:  # Lightning's handling of the error calls some of these functions
        patch.setattr(owner, name, lambda self, something_new: None)
        with pytest.raises(RuntimeError) as caught:
            surface.verify(model) if isinstance(owner, ModuleType) else t.fit(model, loader())
    assert f"has changed `{owner.__name__}.{name}`: expected the parameters" in str(caught.value)
    assert "found ('self', 'something_new')" in str(caught.value)
    package = (owner if isinstance(owner, ModuleType) else sys.modules[owner.__module__]).__name__.split(".")[0]
    assert f"needs {package}>=2." in str(caught.value)


@pytest.mark.parametrize(("place", "name"), [(p, n) for p, names in surface.ATTRIBUTES.items() for n in names])
def test_a_missing_private_attribute_of_the_trainer_is_named(place: str, name: str, monkeypatch: Any) -> None:
    model, _ = connected()
    holder = attrgetter(place)(model)
    remove(holder, name, monkeypatch)
    with pytest.raises(RuntimeError) as caught:
        surface.verify(model)
    assert str(caught.value) == missing_attribute(type(holder), name)


@pytest.mark.parametrize(("make", "name"), [(m, n) for m, names in surface.EXAMPLES.items() for n in names])
def test_a_missing_private_attribute_of_what_a_run_makes_is_named(make: Any, name: str, monkeypatch: Any) -> None:
    model, _ = connected()
    holder = make()
    remove(holder, name, monkeypatch)
    monkeypatch.setattr(surface, "EXAMPLES", {lambda: holder: surface.EXAMPLES[make]})
    with pytest.raises(RuntimeError) as caught:
        surface.verify(model)
    assert str(caught.value) == missing_attribute(type(holder), name)


def test_a_module_without_a_trainer_attribute_is_named() -> None:
    model, _ = connected()
    del model._trainer
    with pytest.raises(RuntimeError, match="has changed `LightningModule`: it has no attribute `_trainer`"):
        surface.verify(model)


def remove(holder: Any, name: str, monkeypatch: Any) -> None:
    """Takes an attribute from an object, or from its class."""
    if name in vars(holder):
        del vars(holder)[name]
    for cls in type(holder).__mro__:
        if name in vars(cls):
            monkeypatch.delattr(cls, name)


def missing_attribute(owner: type, name: str) -> str:
    package, needs = ("torch", ">=2.4") if owner.__module__.startswith("torch.") else ("lightning", ">=2.6,<2.7")
    return (
        f"{package} {metadata.version(package)} has changed `{owner.__name__}`: it has no attribute `{name}`."
        f" lightning_diloco works inside Lightning's loops and needs {package}{needs}; install that, or a"
        " lightning_diloco made for yours."
    )


def test_a_fit_checks_before_it_trains() -> None:
    model, t = Net(), trainer(DilocoStrategy(num_nodes=2), max_steps=1)
    del t.fit_loop.epoch_loop._warning_cache
    with pytest.raises(RuntimeError, match="`_TrainingEpochLoop`: it has no attribute `_warning_cache`"):
        t.fit(model, loader())


def test_replaced_loops_are_refused() -> None:
    class Foreign(_TrainingEpochLoop):
        pass

    t = trainer(DilocoStrategy(num_nodes=2), max_steps=1)
    t.fit_loop.epoch_loop.__class__ = Foreign
    with pytest.raises(
        MisconfigurationException,
        match=r"The Trainer's loops were replaced: found .*Foreign in place of Lightning's loop\.",
    ):
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
