"""Does the notebook run from top to bottom, with two processes at its end, and are its claims true?"""

import os
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "examples" / "diloco.ipynb"


def read() -> Any:
    return pytest.importorskip("nbformat").read(NOTEBOOK, as_version=4)


def test_the_notebook_is_short_and_clean() -> None:
    notebook = read()
    assert len(notebook.cells) <= 20
    assert all(c.outputs == [] and c.execution_count is None for c in notebook.cells if c.cell_type == "code")
    code = "\n".join(c.source for c in notebook.cells if c.cell_type == "code")
    assert '"devices": 2' in code
    assert code.count("assert ") >= 6


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_notebook_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its cells hold assertions; the outputs are those that it speaks of."""
    for package in ("nbclient", "ipykernel", "sklearn", "pandas", "matplotlib"):
        pytest.importorskip(package)
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = read()
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    said = "".join(o.text for o in outputs if o.get("name") == "stderr")
    assert not [line for line in said.splitlines() if line and "treespec" not in line]  # Lightning's own use of torch
    text = "".join(o.get("text", "") for o in outputs)
    one, four = map(float, re.search(r"one worker: (\d+\.\d)%, four workers: (\d+\.\d)%", text).groups())  # type: ignore[union-attr]
    assert four > 85
    assert one > 75
    assert text.count("History(200 local steps, 10 outer steps, 10 evaluations;") == 2  # one process, two processes
    assert sum("image/png" in o.get("data", {}) for o in outputs) == 3
