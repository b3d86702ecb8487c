"""Do the ways of the benchmark of alternatives do the same, and does it say what it left out and what failed?"""

import ast
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import psutil
import pytest
from processes import script

BENCHMARKS = Path(__file__).parent / "benchmarks"
TINY = ["--size", "tiny", "--workers", "2", "--steps", "4", "--interval", "2", "--repeats", "1"]
COLUMNS = {
    *("way", "workers", "processes", "worker_steps_per_second", "cpu_seconds_per_worker_step", "start_up_seconds"),
    *("peak_memory_bytes", "loss", "weights_apart", "lines"),
}


ONE = '''"""A way,

in three lines."""

import torch
from measuring import run  # measuring


def train():
    """And one."""
    # not this
    torch.ones(
        1)  # but this
    mark()  # measuring
'''


FAILS = """
import os, pathlib, time
if os.environ["RANK"] == "1":
    while not pathlib.Path(__file__).with_name("process").exists():
        time.sleep(0.05)
    raise ValueError("no luck")
pathlib.Path(__file__).with_name("process").write_text(str(os.getpid()))
time.sleep(300)
"""


@pytest.fixture
def alternatives(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    path = BENCHMARKS / "alternatives.py"
    spec = importlib.util.spec_from_file_location("alternatives", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "alternatives", module)  # its dataclass looks there
    spec.loader.exec_module(module)
    return module


def of_command(mark: str) -> list[psutil.Process]:
    return [p for p in psutil.process_iter(["cmdline"]) if mark in " ".join(p.info["cmdline"] or [])]


@pytest.mark.slow
@pytest.mark.processes
def test_every_way_ends_at_the_same_weights(tmp_path: Path) -> None:
    file = str(BENCHMARKS / "alternatives.py")
    done = script(file, *TINY, "--dtype", "float64", "--json", "found.json", limit=400)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())

    rows = {row["way"]: row for row in found["rows"]}
    ours, by_hand = "DilocoStrategy, {}", "by hand, {}"
    same = [way.format(processes) for way in (ours, by_hand) for processes in ("1 process", "2 processes")]
    if importlib.util.find_spec("torchft"):
        same.append("torchft")
        assert found["left_out"] == {}
    else:
        assert found["left_out"] == {"torchft": "not installed (pip install torchft)"}
        assert "torchft: not installed (pip install torchft)" in done.stdout.splitlines()
    assert list(rows) == [*same, "Lightning DDP"]
    assert [row["processes"] for row in rows.values()] == [1, 2, 1, 2, *(2,) * (len(rows) - 4)]
    for row in rows.values():
        assert row.keys() == COLUMNS
        for column in ("worker_steps_per_second", "cpu_seconds_per_worker_step", "start_up_seconds"):
            assert len(row[column]) == 1
            assert row[column][0] > 0
    for name in same:
        assert rows[name]["weights_apart"] < 1e-12
        assert rows[name]["loss"] == pytest.approx(rows["by hand, 1 process"]["loss"], rel=1e-12)
    assert rows["Lightning DDP"]["weights_apart"] is None
    assert rows["Lightning DDP"]["loss"] != pytest.approx(rows["by hand, 1 process"]["loss"], rel=1e-6)
    table = done.stdout.splitlines()
    assert [line.split("  ")[0] for line in table[: len(rows) + 1]] == ["way", *rows]


def test_what_is_not_installed_is_left_out_by_name(
    alternatives: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(alternatives.importlib.util, "find_spec", lambda name: None)
    assert alternatives.main(["--only", "TORCHFT", "--json", str(tmp_path / "found.json")]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "torchft: not installed (pip install torchft)"
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["rows"], found["failed"]) == ([], {})
    assert found["left_out"] == {"torchft": "not installed (pip install torchft)"}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--workers", "3"], "--workers (=3) must be even: two processes share them"),
        (["--steps", "7", "--interval", "2"], "--steps (=7) must be a multiple of --interval (=2), two rounds or more"),
        (["--steps", "2", "--interval", "2"], "--steps (=2) must be a multiple of --interval (=2), two rounds or more"),
        (["--only", "horovod"], "--only (=['horovod']) matches none of DilocoStrategy, 1 process, "),
    ],
)
def test_options(alternatives: ModuleType, argv: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"):
        alternatives.parse(argv)
    assert message in capsys.readouterr().err


def test_lines_are_those_of_code(alternatives: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Four: the import, the head of the function, and a call over two lines."""
    (tmp_path / "one.py").write_text(ONE)
    monkeypatch.setattr(alternatives, "WAYS_FOLDER", tmp_path)
    assert alternatives.lines(alternatives.Way(1, "itself", ("one.py",))) == 4
    assert alternatives.lines(alternatives.Way(1, "itself", ("one.py", "one.py"))) == 8


def test_lines_are_marked_where_they_measure(alternatives: ModuleType) -> None:
    """The task's model, data and settings are what a user has, too; the rest of the module is the benchmark's."""
    of_the_user = {"model", "data", "batch_size", "workers", "processes", "interval", "steps", "quiet"}
    for file in {name for way in alternatives.WAYS.values() for name in way.files}:
        source = (alternatives.WAYS_FOLDER / file).read_text()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "task" and node.attr not in of_the_user:
                assert "# measuring" in source.splitlines()[node.lineno - 1], f"{file}, line {node.lineno}"


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.usefixtures("_copies")
def test_a_failure_is_told_and_the_others_go_on(
    alternatives: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    way = tmp_path / "way.py"
    way.write_text(FAILS)
    fails = {"by hand, 2 processes": alternatives.Way(2, "ranks", (str(way),))}
    monkeypatch.setattr(alternatives, "WAYS", fails | {"by hand, 1 process": alternatives.WAYS["by hand, 1 process"]})
    assert alternatives.main([*TINY, "--only", "by hand", "--json", str(tmp_path / "found.json")]) == 1
    assert "by hand, 2 processes: failed: ValueError: no luck" in capsys.readouterr().out.splitlines()
    found = json.loads((tmp_path / "found.json").read_text())
    assert [row["way"] for row in found["rows"]] == ["by hand, 1 process"]
    assert found["failed"] == {"by hand, 2 processes": "ValueError: no luck"}
    (process,) = map(int, (tmp_path / "process").read_text().split())
    assert not psutil.pid_exists(process)


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_no_process_is_left_after_a_signal(number: int, tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}  # its name is in every process's command
    command = [sys.executable, BENCHMARKS / "alternatives.py", "--only", "Strategy, 2", "--steps", "100000"]
    started = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while len(of_command(str(tmp_path))) < 2:
        assert time.monotonic() < deadline, "the second process hasn't started"
        assert started.poll() is None
        time.sleep(0.2)
    started.send_signal(number)
    _, errors = started.communicate(timeout=60)
    assert started.returncode == 128 + number, errors
    assert not re.search("Traceback", errors)
    while of_command(str(tmp_path)):  # the second process has been killed, and may still be on the list
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert not list(tmp_path.glob("alternatives_*"))
