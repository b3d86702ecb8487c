"""One thread for everything: two on a loaded machine stall tens of times slower, and results must not depend on it."""

import gc
import logging
import os
from functools import cache

os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

torch.set_num_threads(1)
gc.disable()  # until the tests are imported: half a million objects that stay


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Under pytest-xdist a process runs neighbouring tests: what one has cached serves the next."""
    if getattr(config.option, "numprocesses", None) and config.option.dist == "no":
        config.option.dist = "worksteal"


def pytest_collection_finish() -> None:
    from lightning.fabric.utilities import registry  # not above: its loggers are to find pytest's handlers

    registry.entry_points = cache(registry.entry_points)  # every Trainer reads the metadata of all installed packages
    gc.freeze()  # so that no collection visits what was imported
    gc.enable()
    gc.set_threshold(20_000, 50, 50)  # a tenth of the time went into looking at 700 young objects at a time


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests of others' projects run only where ``-m`` names them. An ``-m`` in ``addopts`` would yield to any other."""
    if "third_party" not in config.option.markexpr:
        left_out = [item for item in items if item.get_closest_marker("third_party")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(autouse=True)
def _isolated(tmp_path, monkeypatch):
    """Each test starts from the same seed, writes into its own folder, and leaves no trace in the environment.

    Lightning's loggers have the level that they have after an import: a script's ``main`` may have silenced them.
    """
    monkeypatch.chdir(tmp_path)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.INFO)
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.delenv(name, raising=False)
    torch.default_generator.manual_seed(0)  # torch.manual_seed queues a traceback per kind of accelerator, too
    before = dict(os.environ)
    yield
    torch.set_default_dtype(torch.float32)
    for name in os.environ.keys() - before.keys():  # Lightning's launchers set ranks and addresses
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture
def _copies(monkeypatch):
    """Instead of a new Python this process starts a copy of itself."""
    from warm import start_copies

    start_copies(monkeypatch.setattr)
