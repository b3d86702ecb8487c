"""Does the study of published orderings judge as it says, and are its claims complete?"""

import importlib
import math
import re
from pathlib import Path
from types import ModuleType

import lightning as L
import pytest
import torch

from lightning_diloco import DilocoStrategy

EXAMPLES = Path(__file__).parents[1] / "examples"
QUIET = {"accelerator": "cpu", "enable_checkpointing": False, "enable_progress_bar": False}
OFFSETS = [0.0, 50.0, -30.0, 10.0, -20.0]  # what a seed adds to all runs: far more than any effect below


@pytest.fixture
def judging(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("scipy")
    return imported("judging", monkeypatch)


def imported(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """As when a script of the folder is run: its neighbours are modules."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module(name)


def judged(judging, comparison, a, b):
    return judging.judge(comparison, {"a": a, "b": b}.__getitem__)


def pair(effect: float, noise: float = 0.0) -> tuple[list[float], list[float]]:
    """Two runs around 100 with a large common offset per seed; b − a is ``effect`` ± noise, with mean ``effect``."""
    a = [100 + offset - sum(OFFSETS) / 5 for offset in OFFSETS]
    return a, [x + effect + noise * e for x, e in zip(a, (1, -1, 2, -2, 0), strict=True)]


def test_the_interval_is_students(judging):
    """Five numbers with standard deviation 1: t(0.975, 4) = 2.776; the table's value, not scipy's."""
    found = judging.interval_of([10 + x / math.sqrt(2.5) for x in (-2, -1, 0, 1, 2)])
    assert found.effect == pytest.approx(10)
    assert found.high - found.effect == pytest.approx(2.7764 / math.sqrt(5), rel=1e-4)
    assert found.effect - found.low == pytest.approx(found.high - found.effect)


def test_the_effect_is_how_much_higher_b_is_in_per_cent_of_a(judging):
    found = judged(judging, judging.lower("a", "b"), [1.0, 3.0], [1.5, 3.7]).found
    assert found.effect == pytest.approx(100 * 0.6 / 2.0)
    found = judged(judging, judging.lower("a", "b", relative=False), [-0.5, 0.5], [0.5, 1.7]).found
    assert found.effect == pytest.approx(1.1)  # the mean of a is 0


@pytest.mark.parametrize(
    ("make", "effect", "noise", "verdict"),
    [
        ("lower", 1.0, 0.1, "holds"),
        ("lower", 0.1, 1.0, "undecided"),
        ("lower", -1.0, 0.1, "doesn't"),
        ("lower", 0.0, 0.0, "doesn't"),  # the same run twice isn't lower
        ("much_lower", 3.0, 0.1, "holds"),
        ("much_lower", 1.0, 0.1, "doesn't"),
        ("much_lower", 2.0, 0.1, "undecided"),
        ("at_most", 0.0, 0.1, "holds"),
        ("at_most", -0.9, 0.01, "holds"),
        ("at_most", -1.0, 0.1, "undecided"),
        ("at_most", -2.0, 0.1, "doesn't"),
        ("about_equal", 0.0, 0.0, "holds"),
        ("about_equal", -1.5, 0.1, "holds"),
        ("about_equal", 0.0, 2.0, "undecided"),
        ("about_equal", 3.0, 0.1, "doesn't"),
        ("about_equal", -3.0, 0.1, "doesn't"),
    ],
)
def test_verdicts(judging, make, effect, noise, verdict):
    a, b = pair(effect, noise)
    assert judged(judging, getattr(judging, make)("a", "b"), a, b).verdict == verdict


def test_a_mild_rise_is_a_bound_from_above_only(judging):
    for effect, verdict in ((4.0, "holds"), (-50.0, "holds"), (5.0, "undecided"), (6.0, "doesn't")):
        assert judged(judging, judging.not_far_above("a", "b", 5.0), *pair(effect, 0.1)).verdict == verdict


def test_what_a_seed_adds_to_both_runs_doesnt_matter(judging):
    a, b = pair(1.0, 0.1)
    plain = [100.0 for _ in a]
    same = judged(judging, judging.lower("a", "b"), plain, [p + y - x for p, x, y in zip(plain, a, b, strict=True)])
    found = judged(judging, judging.lower("a", "b"), a, b)
    assert found.found.low == pytest.approx(same.found.low)
    assert found.verdict == "holds"
    shuffled = judged(judging, judging.lower("a", "b"), a, b[1:] + b[:1])  # seeds that don't belong together
    assert shuffled.found.effect == pytest.approx(1.0)
    assert shuffled.verdict == "undecided"


def test_a_single_seed_decides_nothing(judging):
    for comparison in (judging.lower("a", "b"), judging.about_equal("a", "b")):
        assert judged(judging, comparison, [1.0], [2.0]).verdict == "undecided"


def test_several_comparisons_must_all_hold_and_one_refutes(judging):
    holds = judged(judging, judging.lower("a", "b"), *pair(1.0, 0.1))
    amply = judged(judging, judging.lower("a", "b"), *pair(5.0, 0.1))
    undecided = judged(judging, judging.lower("a", "b"), *pair(0.1, 1.0))
    wrong = judged(judging, judging.lower("a", "b"), *pair(-1.0, 0.1))
    assert judging.verdict_of([holds, amply]) == "holds"
    assert judging.verdict_of([holds, undecided]) == "undecided"
    assert judging.verdict_of([holds, wrong, undecided]) == "doesn't"
    assert judging.decisive([amply, holds]) is holds
    assert judging.decisive([holds, undecided]) is undecided
    assert judging.decisive([holds, wrong, undecided]) is wrong
    assert [c.text for c in judging.in_order(judging.at_most, ["a", "b", "c"])] == ["a ≤ b", "b ≤ c"]


# -------------------------------------------------------------------------------------------- claims and runs

PUBLISHED = ["A1", "A2", "A3", "A4", "A6", "A7", "A8", "A9", "A10", "A13", "A14", "A15", "A18"]


@pytest.fixture
def orderings(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    for needed in ("scipy", "sklearn", "pandas", "matplotlib"):
        pytest.importorskip(needed)
    return imported("orderings", monkeypatch)


def test_there_are_thirteen_claims_with_sources(orderings):
    assert [claim.id for claim in orderings.CLAIMS] == PUBLISHED
    for claim in orderings.CLAIMS:
        assert claim.trials
        assert all(re.fullmatch(r"\d{4}\.\d{5}", source) for source in claim.source.split(", "))


def test_claims_compare_runs_that_exist_and_each_run_serves_a_claim(orderings):
    used = {name: set() for name in orderings.TASKS}
    for claim in orderings.CLAIMS:
        places = [(trial.task, trial.variant, trial.times) for trial in claim.trials]
        assert len(set(places)) == len(places)
        for trial in claim.trials:
            assert re.search("batch", trial.setting), "which batch is fixed decides the sign of more workers"
            assert {c.a for c in trial.comparisons} | {c.b for c in trial.comparisons} <= set(trial.values)
            used[trial.task] |= {value.run for value in trial.values.values()}
    for name, task in orderings.TASKS.items():
        runs = set(task.runs(task.steps))
        assert used[name] == runs  # no run without a claim


def test_split_batches_have_the_same_total(orderings):
    for task in orderings.TASKS.values():
        runs, batch = task.runs(task.steps), task.data.keywords["batch_size"]
        for n in (2, 8):
            run = runs[f"N={n}, total batch of four"]
            assert run.strategy["num_nodes"] == n
            assert n * run.data["batch_size"] == 4 * batch


def test_a_layer_that_never_synchronises_differs_between_workers(orderings, monkeypatch):
    runs = imported("ordering_runs", monkeypatch)
    strategy = DilocoStrategy(2, 2, algorithm=runs.Partly(["net.3"]), outer_optimizer_kwargs={"lr": 1.0})
    trainer = L.Trainer(strategy=strategy, max_steps=4, logger=False, **QUIET)
    trainer.fit(runs.DigitsCNN(lr=2e-3), runs.DigitsData(8).train_dataloader())
    theta, first, second = strategy.outer_state_dict(), *(strategy.worker_state_dict(w) for w in (0, 1))
    for name in ("net.0.weight", "net.7.weight"):
        assert torch.equal(first[name], second[name])
    assert not torch.equal(first["net.3.weight"], second["net.3.weight"])
    mean = (first["net.3.weight"] + second["net.3.weight"]) / 2
    torch.testing.assert_close(trainer.model.net[3].weight, mean)
    assert theta.keys() == first.keys()


@pytest.mark.slow
def test_a_quick_study_judges_what_it_has_trained_and_is_taken_up_again(orderings, tmp_path, capsys):
    argv = ["--only", "A9", "A18", "--quick", "--seeds", "1", "--divide-steps", "20"]
    argv += ["--folder", str(tmp_path / "runs"), "--figures", str(tmp_path / "figures")]
    findings = orderings.main(argv)
    out = capsys.readouterr().out
    assert [found.claim.id for found in findings] == ["A9", "A9", "A18"]
    assert all(len(values) == 1 for found in findings for values in found.numbers.values())
    assert "too small to decide" in out
    assert (tmp_path / "figures" / "tables.md").read_text() in out
    for found in findings:
        assert f"| {found.title} |" in " ".join(out.split())
        assert all(str(one) in out for one in found.judged)
    for name in ("A9", "A18"):
        assert f">{name}: " in (tmp_path / "figures" / f"{name}.svg").read_text()
    # θ of the last synchronisation, the mean, and one replica are different models in mid-round
    assert len({tuple(values) for values in findings[2].numbers.values()}) == 3

    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").rglob("*seed*.json")}
    assert len(files) == 6
    orderings.main([*argv, "--only", "A9"])
    assert {file: file.stat().st_mtime_ns for file in files} == files  # nothing was trained again
