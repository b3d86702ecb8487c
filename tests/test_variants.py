"""Do the further members of the family compute what their papers say?

Two processes, a resume, and what projects bring along are in test_every_algorithm.py.
"""

from pathlib import Path

import pytest
from cases import CASES, QUICK, assert_agrees
from family import assert_same_run, several, train
from helpers import slow_but


@pytest.mark.parametrize("name", slow_but(QUICK, CASES))
def test_every_algorithm_agrees_with_its_oracle(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    assert_agrees(train(tmp_path, **case.settings), case.oracle())


@pytest.mark.processes
@pytest.mark.slow
def test_two_processes_agree_with_the_oracle_and_with_one(tmp_path: Path) -> None:
    """The cases that aren't in test_every_algorithm.py."""
    cases = [case for name, case in CASES.items() if case.num_workers > 1 and "," in name]
    two = several(tmp_path, 2, [case.settings for case in cases])
    for case, result in zip(cases, two, strict=True):
        assert_agrees(result, case.oracle())
        assert_same_run(result, train(tmp_path, **case.settings), measured=1e-9)
