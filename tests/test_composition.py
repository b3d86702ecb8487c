"""Do streaming, a codec with error feedback and lost transfers make one run, through files, processes and YAML?"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import codec_reference as slow
import pytest
import torch
import yaml
from family import (
    INNER,
    STEPS,
    WORKERS,
    Layers,
    Run,
    Save,
    assert_agrees,
    assert_same_reports,
    assert_same_run,
    batches_of,
    by_numbers,
    layers,
    several,
    start,
    train,
)
from helpers import assert_equal, loader, regression_data, slow_but
from oracles import Oracle

import lightning_diloco.__main__ as command_line
from lightning_diloco import DataParallel, Diloco, DilocoStrategy, DropOut, ErrorFeedback, StreamingDiloco, Table
from lightning_diloco.codecs import FP4, Int8

FRAGMENTS = [layers(0, 2), layers(1, 3)]  # of four and of three tensors: a report tells which by their number


def composition() -> dict[str, Any]:
    return {
        "algorithm": StreamingDiloco(2, delay=2, alpha=0.25),
        "codec": ErrorFeedback(FP4(), 0.9),
        "participation": DropOut(0.4),
    }


def composed(folder: Path, **settings: Any) -> Run:
    return train(folder, **{"make": partial(Layers, "adamw"), **composition(), **settings})


def oracle_of(run: Run) -> Oracle:
    """The oracle whose transfers have the participants that the run reports, and nobody where it reports nothing."""
    rows = {(r.sent_step, {4: 0, 3: 1}[r.names]): list(r.participants) for r in run.reports}
    assert len(rows) == len(run.reports)
    lost: list[tuple[int, int]] = []

    def participants(step: int, fragment: int) -> list[int]:
        if (step, fragment) not in rows:
            lost.append((step, fragment))
        return rows.get((step, fragment), [])

    outer = partial(torch.optim.SGD, lr=0.4, momentum=0.9, nesterov=True)
    twin = Oracle(
        start(),
        WORKERS,
        Layers.loss,
        INNER["adamw"],
        outer,
        6,
        fragments=FRAGMENTS,
        delay=2,
        alpha=0.25,
        codec=by_numbers(slow.fp4),
        decay=0.9,
        participants=participants,
    )
    twin.train(batches_of(WORKERS)).flush()
    assert len(lost) <= 1  # .4⁴ = 2.6 % for each
    assert len(rows) >= 5
    assert 1 <= sum(WORKERS - len(row) for row in rows.values()) <= 16
    return twin


@pytest.mark.slow
def test_the_composition_agrees_with_the_one_oracle(tmp_path: Path) -> None:
    run = composed(tmp_path)
    assert_agrees(run, oracle_of(run))


@pytest.mark.processes
@pytest.mark.parametrize("size", slow_but([2], [2, 4]))
def test_any_number_of_processes_gives_the_same_bits(size: int, tmp_path: Path) -> None:
    (several_,) = several(tmp_path, size, [{"make": partial(Layers, "adamw"), **composition()}])
    assert_agrees(several_, oracle_of(several_))
    assert_same_run(several_, composed(tmp_path), measured=1e-9)


# ------------------------------------------------------------------------------------------------------------- resume


def assert_goes_on(resumed: Run, whole: Run, step: int, measured: float = 0.0) -> None:
    """From ``step`` on, the run that wasn't interrupted."""
    assert_equal(resumed.history, whole.history[step:], f"history from step {step}")
    for field in ("theta", "workers", "module", "bytes", "whats", "steps"):
        assert_equal(getattr(resumed, field), getattr(whole, field), f"{field}, resumed at {step}")
    assert_same_reports(resumed.reports, [r for r in whole.reports if r.step > step], measured)


@pytest.mark.slow
@pytest.mark.parametrize("step", range(1, 19))
def test_a_run_resumes_at_every_step(step: int, tmp_path: Path) -> None:
    """Fragment 0 is on its way after steps 6, 7, 12, 13 and 18, fragment 1 after 9, 10, 15 and 16."""
    whole = composed(tmp_path, callbacks=[Save([step], tmp_path)])
    resumed = composed(tmp_path, resume=tmp_path / f"{step}.ckpt", seed=99)
    assert_goes_on(resumed, whole, step)
    assert resumed.steps[0] == STEPS


@pytest.mark.slow
def test_saving_changes_nothing(tmp_path: Path) -> None:
    assert_same_run(composed(tmp_path, callbacks=[Save(range(1, STEPS), tmp_path)]), composed(tmp_path))


@pytest.mark.slow
def test_a_resumed_run_resumes(tmp_path: Path) -> None:
    whole = composed(tmp_path, callbacks=[Save([7], tmp_path)])
    composed(tmp_path, resume=tmp_path / "7.ckpt", callbacks=[Save([10], tmp_path)])
    assert_goes_on(composed(tmp_path, resume=tmp_path / "10.ckpt"), whole, 10)


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize(("source", "target"), [(1, 2), (2, 1), (2, 2), (2, 4), (4, 1)])
def test_a_file_resumes_in_any_layout(source: int, target: int, tmp_path: Path) -> None:
    form: dict[str, Any] = {"make": partial(Layers, "adamw")}
    (whole,) = several(tmp_path, source, [{**form, **composition(), "callbacks": [Save([7, 10], tmp_path)]}])
    again = tmp_path / "again"
    again.mkdir()
    steps = (7, 10)
    runs = several(again, target, [{**form, **composition(), "resume": tmp_path / f"{s}.ckpt"} for s in steps])
    for step, resumed in zip(steps, runs, strict=True):
        assert_goes_on(resumed, whole, step, measured=1e-9)


CHANGES: dict[str, tuple[dict[str, Any], str]] = {  # what is given on resume, and the argument that is named
    "another decay": ({"codec": ErrorFeedback(FP4(), 0.8)}, "codec"),
    "another codec": ({"codec": Int8()}, "codec"),
    "no codec": ({"codec": None}, "codec"),
    "another p": ({"participation": DropOut(0.3)}, "participation"),
    "a table": ({"participation": Table({6: [0]})}, "participation"),
    "everybody": ({"participation": None}, "participation"),
    "another delay": ({"algorithm": StreamingDiloco(2, delay=1, alpha=0.25)}, "delay"),
    "another alpha": ({"algorithm": StreamingDiloco(2, delay=2, alpha=0.5)}, "alpha"),
    "more fragments": ({"algorithm": StreamingDiloco(3, delay=2, alpha=0.25)}, "fragments"),
    "another pattern": ({"algorithm": StreamingDiloco(2, delay=2, alpha=0.25, pattern="sequential")}, "pattern"),
    "another start": ({"algorithm": StreamingDiloco(2, delay=2, alpha=0.25, first_sync="staggered")}, "first_sync"),
    "another algorithm": ({"algorithm": Diloco()}, "algorithm"),
    "data parallel": ({"algorithm": DataParallel()}, "algorithm"),
}


@pytest.mark.parametrize("name", slow_but({"another decay", "everybody", "another delay"}, CHANGES))
def test_another_argument_on_resume_is_named(name: str, tmp_path: Path) -> None:
    given, text = CHANGES[name]
    composed(tmp_path, steps=7, callbacks=[Save([7], tmp_path)])
    with pytest.raises(ValueError, match=text):
        composed(tmp_path, steps=9, resume=tmp_path / "7.ckpt", **given)


def test_a_codec_may_not_appear_on_resume(tmp_path: Path) -> None:
    train(tmp_path, steps=7, callbacks=[Save([7], tmp_path)])
    for given, text in (({"codec": FP4()}, "codec"), ({"participation": DropOut(0.5)}, "participation")):
        with pytest.raises(ValueError, match=text):
            train(tmp_path, steps=9, resume=tmp_path / "7.ckpt", **given)


# --------------------------------------------------------------------------------------------------------------- YAML

QUIET = [
    "--trainer.accelerator=cpu",
    "--trainer.logger=false",
    "--trainer.enable_checkpointing=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]
NAMED = {
    "composition": {
        "algorithm": {
            "class_path": "lightning_diloco.StreamingDiloco",
            "init_args": {"fragments": 2, "delay": 2, "alpha": 0.25},
        },
        "codec": {
            "class_path": "lightning_diloco.ErrorFeedback",
            "init_args": {"codec": {"class_path": "lightning_diloco.codecs.FP4"}, "decay": 0.9},
        },
        "participation": {"class_path": "lightning_diloco.DropOut", "init_args": {"p": 0.4}},
    },
    "lists and a table": {
        "algorithm": {
            "class_path": "lightning_diloco.StreamingDiloco",
            "init_args": {
                "fragments": 2,
                "pattern": [["layers.3", "layers.0"], ["layers.1", "layers.2"]],
                "first_sync": "staggered",
            },
        },
        "participation": {
            "class_path": "lightning_diloco.Table",
            "init_args": {"rows": {6: [0, 2], 9: [], 12: [1]}},
        },
    },
}
IN_PYTHON: dict[str, Callable[[], dict[str, Any]]] = {
    "composition": composition,
    "lists and a table": lambda: {
        "algorithm": StreamingDiloco(
            2, pattern=[["layers.3", "layers.0"], ["layers.1", "layers.2"]], first_sync="staggered"
        ),
        "participation": Table({6: [0, 2], 9: [], 12: [1]}),
    },
}


class WithData(Layers):
    def train_dataloader(self) -> Any:
        return loader(regression_data(96, dtype=torch.float64), 4)


def config(folder: Path, name: str) -> str:
    path = folder / "given.yaml"
    arguments = {"num_nodes": 4, "diloco_interval": 6, **NAMED[name]}
    strategy = {"class_path": "lightning_diloco.DilocoStrategy", "init_args": arguments}
    more = {"max_steps": 19, "max_epochs": 4, "precision": "64-true", "devices": 1}
    model = {"class_path": f"{__name__}.WithData", "init_args": {"optimizer": "adamw"}}
    path.write_text(yaml.safe_dump({"seed_everything": 5, "trainer": {"strategy": strategy, **more}, "model": model}))
    return f"--config={path}"


@pytest.fixture
def _command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("jsonargparse")
    monkeypatch.setattr(sys, "argv", ["python -m lightning_diloco"])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # of Lightning's own use of it


@pytest.mark.slow
@pytest.mark.usefixtures("_command_line")
@pytest.mark.parametrize("name", NAMED)
def test_yaml_gives_the_same_run_as_python(name: str, tmp_path: Path) -> None:
    strategy = command_line.main(["fit", config(tmp_path, name), *QUIET]).trainer.strategy
    assert isinstance(strategy, DilocoStrategy)
    run = train(tmp_path, make=partial(Layers, "adamw"), **IN_PYTHON[name]())
    assert_equal(strategy.outer_state_dict(), run.theta)
    assert_equal({w: strategy.worker_state_dict(w) for w in range(WORKERS)}, run.workers)
    assert strategy.ledger.total_bytes == run.bytes
    assert (strategy.local_steps, strategy.outer_steps) == run.steps


@pytest.mark.slow
@pytest.mark.usefixtures("_command_line")
@pytest.mark.parametrize("name", NAMED)
def test_yaml_comes_back_as_it_was(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def printed(given: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            command_line.main(["fit", given, "--print_config"])
        assert stopped.value.code == 0
        return capsys.readouterr().out

    first = printed(config(tmp_path, name))
    again = tmp_path / "again.yaml"
    again.write_text(first)
    assert printed(f"--config={again}") == first
    arguments = yaml.safe_load(first)["trainer"]["strategy"]["init_args"]
    for key, given in NAMED[name].items():
        assert arguments[key]["class_path"].rpartition(".")[2] == given["class_path"].rpartition(".")[2]
        for argument, value in given["init_args"].items():
            found = arguments[key]["init_args"][argument]
            if argument == "codec":
                assert found["class_path"].endswith(".FP4")
            elif argument == "rows":  # YAML's printer writes steps as words
                assert {int(step): row for step, row in found.items()} == value
            else:
                assert found == value
