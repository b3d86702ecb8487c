"""Do the further members of the family compute what their papers say?

Two processes, a resume, and what projects bring along are in test_every_algorithm.py.
"""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from cases import CASES, QUICK, assert_agrees
from family import Run, assert_same_run, several, train
from helpers import slow_but


@cache
def in_one_process(name: str) -> tuple[Run, Any]:
    """The run, and the oracle's: the first test that asks trains them."""
    return train(Path(), **CASES[name].settings), CASES[name].oracle()


@pytest.mark.parametrize("name", slow_but(QUICK, CASES))
def test_every_algorithm_agrees_with_its_oracle(name: str) -> None:
    assert_agrees(*in_one_process(name))


@pytest.mark.processes
@pytest.mark.slow
def test_two_processes_agree_with_the_oracle_and_with_one(tmp_path: Path) -> None:
    """The cases that aren't in test_every_algorithm.py."""
    names = [name for name, case in CASES.items() if case.num_workers > 1 and "," in name]
    for name, result in zip(names, several(tmp_path, 2, [CASES[name].settings for name in names]), strict=True):
        one, oracle = in_one_process(name)
        assert_agrees(result, oracle)
        assert_same_run(result, one, measured=1e-9)
