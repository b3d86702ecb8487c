"""The folder of a comparison: a file for every finished run, and a description.

Owns the files. ``runs/<name>, seed <seed>.json`` has the rows of a finished run with all that decided them; it appears
complete or not at all. ``comparison.json`` describes the last call, for people.
"""

import json
import os
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from lightning_diloco.comparison.recording import SIMULATED, Row
from lightning_diloco.comparison.runs import file_name
from lightning_diloco.comparison.training import Task

_FORMAT = 1


class Folder:
    """Finished runs on disk.

    Args:
        path: of the folder, which is made if it doesn't exist.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"`folder` (={str(path)!r}) is a file. Name a folder; it is made if it doesn't exist.")
        (self.path / "runs").mkdir(parents=True, exist_ok=True)

    def file(self, task: Task) -> Path:
        """Where the rows of a run are, once it is finished."""
        return self.path / "runs" / f"{file_name(task.name)}, seed {task.seed}.json"

    def save(self, task: Task, rows: Sequence[Row]) -> None:
        """Writes a finished run."""
        content = {
            "format": _FORMAT,
            "run": task.name,
            "seed": task.seed,
            "settings": task.settings,
            "rows": list(rows),
        }
        _write(self.file(task), content)

    def load(self, task: Task) -> list[Row] | None:
        """The rows of a finished run; None if it isn't finished.

        Raises:
            ValueError: the file is of a run with other settings, which are named, or damaged.
        """
        file = self.file(task)
        if not file.exists():
            return None
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            rows, then, form = content["rows"], content["settings"], content["format"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} can't be read ({error!r}). Delete it, and the run is done again.") from error
        if form != _FORMAT:
            raise ValueError(f"{file} has format {form}, and this version reads {_FORMAT}. Take another folder.")
        now = json.loads(json.dumps(task.settings))
        if then != now:
            raise ValueError(
                f"The run {task.name!r} with seed {task.seed} was finished with other settings:"
                f" {'; '.join(_differences(then, now))}. Give the run another name, take another `folder`, or delete"
                f" {file}."
            )
        return [{SIMULATED: float("nan"), **row} for row in rows]  # files from before there were clusters lack it

    def describe(self, tasks: Sequence[Task]) -> None:
        """Writes what is being compared, with the versions in use."""
        versions = {name: metadata.version(name) for name in ("lightning-diloco", "lightning", "torch")}
        runs = {task.name: task.settings for task in tasks}
        seeds = sorted({task.seed for task in tasks})
        _write(self.path / "comparison.json", {"seeds": seeds, "runs": runs, "versions": versions})


def _write(file: Path, content: Any) -> None:
    """Replaces a file in one piece, also for those who are killed or read at the same time."""
    temporary = file.with_name(f"{file.name}.{os.getpid()}.part")
    temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
    os.replace(temporary, file)


def _differences(then: Any, now: Any, where: str = "") -> list[str]:
    """What differs between two plain values.

    >>> _differences({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 4}, "e": 5})
    ['`a.c` was 2 and is 4', '`d` was 3 and is not there', '`e` was not there and is 5']
    """
    if isinstance(then, dict) and isinstance(now, dict):
        found = []
        for key in [*then, *(key for key in now if key not in then)]:
            inside = f"{where}.{key}" if where else key
            if key not in now or key not in then:
                old, new = (repr(side[key]) if key in side else "not there" for side in (then, now))
                found.append(f"`{inside}` was {old} and is {new}")
            else:
                found += _differences(then[key], now[key], inside)
        return found
    return [] if then == now else [f"`{where}` was {then!r} and is {now!r}"]
