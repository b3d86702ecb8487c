"""Do robust means withstand as many attackers as their papers say, and compute what they say without any?"""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from family import (
    INTERVAL,
    TOLERANCE,
    Breaks,
    Run,
    Save,
    assert_same_run,
    difference,
    several,
    start,
    train,
    unequal,
)
from helpers import assert_equal
from torch import Tensor

from lightning_diloco import (
    FP4,
    CentredClipping,
    Corrupt,
    DataParallel,
    Diloco,
    DropOut,
    Eager,
    ErrorFeedback,
    GeometricMedian,
    Hierarchical,
    Krum,
    PeriodicAveraging,
    Robust,
    Sparta,
    StreamingDiloco,
    SyncAlgorithm,
    TrimmedMean,
)
from lightning_diloco.algorithms import Aggregate

RULES: dict[str, Aggregate] = {
    "trimmed": TrimmedMean(2),
    "median": GeometricMedian(),
    "clipping": CentredClipping(2.0),
    "Krum": Krum(2),
    "Multi-Krum": Krum(2, 4),
}


def rows_of(values: Sequence[Sequence[float]]) -> list[dict[str, Tensor]]:
    """Messages of two tensors: the first number, and the others."""
    return [
        {"a": torch.tensor(row[:1], dtype=torch.float64), "b": torch.tensor(row[1:], dtype=torch.float64)}
        for row in values
    ]


def joined(message: dict[str, Tensor]) -> list[float]:
    return torch.cat([message["a"], message["b"]]).tolist()


def honest(seed: int, n: int, size: int = 5) -> list[list[float]]:
    generator = torch.Generator().manual_seed(seed)
    center = torch.randn(size, generator=generator, dtype=torch.float64)
    return (center + 0.3 * torch.randn(n, size, generator=generator, dtype=torch.float64)).tolist()


# ------------------------------------------------------------------------------------------------ by other ways


def distance(a: Sequence[float], b: Sequence[float]) -> float:
    return math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)))


def slow_trimmed(rows: list[list[float]], f: int) -> list[float]:
    return [sum(sorted(column)[f : len(rows) - f]) / (len(rows) - 2 * f) for column in zip(*rows, strict=True)]


def slow_krum(rows: list[list[float]], f: int, select: int) -> list[float]:
    scores = []
    for i, row in enumerate(rows):
        squares = sorted(distance(row, other) ** 2 for j, other in enumerate(rows) if j != i)
        scores.append((sum(squares[: len(rows) - f - 2]), i))
    chosen = [rows[i] for _, i in sorted(scores)[:select]]
    return [sum(column) / select for column in zip(*chosen, strict=True)]


def slow_clipping(rows: list[list[float]], radius: float, v: list[float]) -> list[float]:
    for _ in range(3):
        steps = []
        for row in rows:
            scale = min(1.0, radius / distance(row, v))
            steps.append([scale * (x - y) for x, y in zip(row, v, strict=True)])
        v = [y + sum(column) / len(rows) for y, column in zip(v, zip(*steps, strict=True), strict=True)]
    return v


@pytest.mark.parametrize("seed", range(4))
def test_rules_agree_with_slow_ones(seed: int) -> None:
    values = honest(seed, 8)
    rows = rows_of(values)
    assert joined(TrimmedMean(2)(rows, {})) == pytest.approx(slow_trimmed(values, 2), abs=1e-12)
    for select in (1, 3):
        assert joined(Krum(2, select)(rows, {})) == pytest.approx(slow_krum(values, 2, select), abs=1e-12)
    memory: dict[str, Tensor] = {}
    expected = [0.0] * 5
    for again in range(3):  # from the last result each time
        values = honest(seed + again, 8)
        expected = slow_clipping(values, 0.5, expected)
        assert joined(CentredClipping(0.5)(rows_of(values), memory)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_the_geometric_median_is_where_no_step_shortens_the_way(seed: int) -> None:
    values = honest(seed, 7)
    found = joined(GeometricMedian(10_000, 1e-12)(rows_of(values), {}))

    def total(z: Sequence[float]) -> float:
        return sum(distance(row, z) for row in values)

    pull = [sum((row[k] - found[k]) / distance(row, found) for row in values) for k in range(5)]
    assert math.hypot(*pull) < 1e-5
    for k, step in itertools.product(range(5), (-1e-3, 1e-3)):
        assert total(found) < total([*found[:k], found[k] + step, *found[k + 1 :]])


def test_the_geometric_median_leaves_a_message_that_it_starts_at() -> None:
    """The medians of the coordinates are (0, 0), where the two others pull by more than 1: 2·cos 56.3° = 1.11."""
    x, y = joined(GeometricMedian(10_000, 1e-12)(rows_of([[0.0, 0.0], [5.0, -1.0], [-1.0, 5.0]]), {}))
    pull = [0.0, 0.0]
    for a, b in ((0.0, 0.0), (5.0, -1.0), (-1.0, 5.0)):
        length = math.hypot(a - x, b - y)
        pull = [pull[0] + (a - x) / length, pull[1] + (b - y) / length]
    assert math.hypot(*pull) < 1e-6
    held = joined(GeometricMedian()(rows_of([[0.0, 0.0], [3.0, -1.0], [-1.0, 3.0]]), {}))
    assert held == pytest.approx([0.0, 0.0], abs=1e-12)  # 126.9° > 120°


def test_the_geometric_median_of_three_on_a_line_is_the_middle_one() -> None:
    rows = rows_of([[0.0, 0.0], [1.0, 1.0], [100.0, 100.0]])
    assert joined(GeometricMedian()(rows, {})) == pytest.approx([1.0, 1.0], abs=1e-6)
    same = rows_of([[3.0, 4.0]] * 3)
    for rule in (GeometricMedian(), TrimmedMean(1), CentredClipping(100.0)):
        assert joined(rule(same, {})) == pytest.approx([3.0, 4.0], abs=1e-12)


# ---------------------------------------------------------------------------------------------- breakdown points


ATTACKS: dict[str, Callable[[list[float]], list[float]]] = {
    "flipped": lambda row: [-10.0 * x for x in row],
    "huge": lambda row: [1e9] * len(row),
    "huge and opposed": lambda row: [(-1e9) ** (k % 2 + 1) for k in range(len(row))],
}


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("rule", RULES)
def test_as_many_attackers_as_the_rule_is_for_cannot_move_it_far(rule: str, attack: str) -> None:
    """Whoever the two of eight are, the result stays as near as the honest ones are to each other."""
    for seed, bad in itertools.product(range(3), itertools.combinations(range(8), 2)):
        values = honest(seed, 8)
        good = [row for i, row in enumerate(values) if i not in bad]
        center = [sum(column) / len(good) for column in zip(*good, strict=True)]
        spread = max(distance(row, center) for row in good)
        sent = [ATTACKS[attack](row) if i in bad else row for i, row in enumerate(values)]
        memory = {"a": torch.tensor(center[:1]).double(), "b": torch.tensor(center[1:]).double()}
        result = joined(RULES[rule](rows_of(sent), memory if rule == "clipping" else {}))
        # clipping lets each attacker pull by its radius once per iteration
        bound = 2 * spread if rule != "clipping" else 3 * 2.0 * 2 / 8 + spread
        assert distance(result, center) <= bound
        mean = [sum(column) / 8 for column in zip(*sent, strict=True)]
        assert distance(mean, center) > distance(result, center)


@pytest.mark.parametrize(
    ("rule", "bad"), [(TrimmedMean(2), 3), (GeometricMedian(), 5), (Krum(2), 5), (TrimmedMean(1), 2)], ids=str
)
def test_more_attackers_than_that_move_it_anywhere(rule: Aggregate, bad: int) -> None:
    values = honest(0, 8)
    result = joined(rule(rows_of([[1e9 + 0.01 * i] * 5 if i < bad else row for i, row in enumerate(values)]), {}))
    assert distance(result, [0.0] * 5) > 1e7


# ------------------------------------------------------------------------------------------------------------- runs


def robust(rule: Aggregate, algorithm: SyncAlgorithm | None = None, bad: Sequence[int] = ()) -> Robust:
    algorithm = algorithm or Diloco()
    return Robust(Corrupt(algorithm, bad) if bad else algorithm, rule)


@pytest.mark.slow
@pytest.mark.parametrize(
    "algorithm", [Diloco, partial(StreamingDiloco, 2, delay=2), DataParallel], ids=["diloco", "streaming", "gradients"]
)
def test_a_rule_that_lets_all_through_is_the_mean(algorithm: Any, tmp_path: Path) -> None:
    """Clipping at an endless radius, in a single iteration."""
    ours = train(tmp_path, algorithm=robust(CentredClipping(1e12, 1), algorithm()))
    plain = train(tmp_path, algorithm=algorithm())
    for (theta, workers), (expected, others) in zip(ours.history, plain.history, strict=True):
        assert difference(theta, expected) <= TOLERANCE
        assert max(difference(workers[w], others[w]) for w in range(4)) <= TOLERANCE
    assert (ours.bytes, ours.whats) == (plain.bytes, plain.whats)
    for x, y in zip(ours.reports, plain.reports, strict=True):
        assert x.pseudo_gradient_norm == pytest.approx(y.pseudo_gradient_norm, rel=1e-9)
        assert x.cosine == pytest.approx(y.cosine, rel=1e-9)


def far(run: Run) -> float:
    return difference(run.module, start().state_dict())


@pytest.mark.slow
def test_an_attacker_spoils_the_mean_and_not_the_rules(tmp_path: Path) -> None:
    """Worker 0 of five turns its Δ round, ten times as long: 2 to 1 against the others."""
    settings: dict[str, Any] = {"num_workers": 5, "steps": 3 * INTERVAL}
    clean = train(tmp_path, algorithm=Diloco(), **settings)
    spoilt = train(tmp_path, algorithm=Corrupt(Diloco(), [0]), **settings)
    for rule in (TrimmedMean(1), GeometricMedian(), Krum(1), CentredClipping(0.3)):
        ours = train(tmp_path, algorithm=robust(rule, bad=[0]), **settings)
        assert difference(ours.module, clean.module) < 0.5 * difference(spoilt.module, clean.module), rule


def test_corrupt_workers_send_what_they_are_told_to(tmp_path: Path) -> None:
    """−1 times its own Δ for one of four, outer SGD(1): θ − (Δ_0 + Δ_2 + Δ_3 − Δ_1)/4."""
    once: dict[str, Any] = {"steps": INTERVAL, "outer_optimizer_kwargs": {"lr": 1.0}, "final_sync": False}
    ours = train(tmp_path, algorithm=Corrupt(Diloco(), [1], -1.0), **once)
    alone = train(tmp_path, interval=1000, steps=INTERVAL, final_sync=False)
    before, workers = start().state_dict(), alone.history[-1][1]
    for name, value in ours.theta.items():
        deltas = [before[name] - workers[w][name] for w in range(4)]
        expected = before[name] - (deltas[0] - deltas[1] + deltas[2] + deltas[3]) / 4
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-12)
    grouped = train(tmp_path, algorithm=Corrupt(Hierarchical(2, 1), [1], -1.0), steps=2, final_sync=False)
    apart = train(tmp_path, interval=1000, steps=2, final_sync=False).history[-1][1]
    for name, value in grouped.history[-1][1][0].items():  # weights, mirrored at θ
        moved = [apart[w][name] - before[name] for w in range(4)]
        expected = before[name] + (moved[0] - moved[1] + moved[2] + moved[3]) / 4
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-12)


def test_a_rule_that_starts_at_0_starts_at_theta(tmp_path: Path) -> None:
    """Three times 0.05 from θ at most, whether Δ or groups' weights are sent; groups remember apart."""
    before = start().state_dict()
    seen: list[dict[str, Any]] = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            seen.append({k: dict(memo) for k, memo in trainer.strategy._engine.context.memory.memos.items()})

    def length(state: dict[str, Tensor]) -> float:
        return math.hypot(*(float((t - before[n]).norm()) for n, t in state.items()))

    plain = train(tmp_path, algorithm=robust(CentredClipping(0.05), PeriodicAveraging()), steps=INTERVAL)
    assert 0.01 < length(plain.theta) <= 0.15 + TOLERANCE
    settings: dict[str, Any] = {"steps": 2, "final_sync": False, "callbacks": [Watch()]}
    groups = train(tmp_path, algorithm=robust(CentredClipping(0.05), Hierarchical(2)), **settings)
    assert sorted(seen[-1]) == ["aggregate of weights/group, 0", "aggregate of weights/group, 2"]
    alone = train(tmp_path, interval=1000, steps=2, final_sync=False).history[-1][1]
    for first in (0, 2):
        moved = [torch.cat([(alone[w][n] - before[n]).flatten() for n in before]).tolist() for w in (first, first + 1)]
        found = torch.cat([(groups.history[-1][1][first][n] - before[n]).flatten() for n in before]).tolist()
        assert found == pytest.approx(slow_clipping(moved, 0.05, [0.0] * len(found)), abs=1e-12)
        worker = groups.history[-1][1][first]
        assert 0.01 < length(worker) <= 0.15 + TOLERANCE
        assert_equal(worker, groups.history[-1][1][first + 1])
        for name, value in seen[-1][f"aggregate of weights/group, {first}"].items():
            torch.testing.assert_close(value, worker[name] - before[name], rtol=0, atol=1e-12)


COMPOSED: dict[str, Callable[[], dict[str, Any]]] = {
    "clipping": lambda: {"algorithm": robust(CentredClipping(0.3), bad=[2]), "codec": ErrorFeedback(FP4())},
    "trimmed, streaming": lambda: {"algorithm": robust(TrimmedMean(1), StreamingDiloco(2, delay=2, alpha=0.5), [1])},
    "median, data parallel": lambda: {"algorithm": robust(GeometricMedian(), DataParallel(), [1])},
    "median, dropped": lambda: {"algorithm": robust(GeometricMedian()), "participation": DropOut(0.4)},
    "groups": lambda: {"algorithm": robust(CentredClipping(0.1), Hierarchical(2), [0])},
}


@pytest.mark.processes
@pytest.mark.slow
def test_two_processes_give_the_same_bits(tmp_path: Path) -> None:
    two = several(tmp_path, 2, [make() for make in COMPOSED.values()])
    for make, result in zip(COMPOSED.values(), two, strict=True):
        assert_same_run(result, train(tmp_path, **make()), measured=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPOSED)
def test_a_run_resumes(name: str, tmp_path: Path) -> None:
    whole = train(tmp_path, **COMPOSED[name](), callbacks=[Save([INTERVAL + 1], tmp_path)])
    file = tmp_path / f"{INTERVAL + 1}.ckpt"
    resumed = train(tmp_path, **COMPOSED[name](), resume=file, seed=99)
    assert_equal(resumed.history, whole.history[INTERVAL + 1 :])
    for of_run in ("theta", "workers", "module", "bytes", "steps"):
        assert_equal(getattr(resumed, of_run), getattr(whole, of_run), of_run)


def test_another_rule_on_resume_is_named(tmp_path: Path) -> None:
    train(tmp_path, algorithm=robust(TrimmedMean(1)), callbacks=[Save([7], tmp_path)], steps=7)
    with pytest.raises(ValueError, match="aggregate"):
        train(tmp_path, algorithm=robust(GeometricMedian()), resume=tmp_path / "7.ckpt")


@pytest.mark.filterwarnings("ignore:Worker 1 is left out")
@pytest.mark.parametrize("diagnostics", [True, False])
def test_a_worker_that_is_not_finite_is_found_before_a_rule_hides_it(diagnostics: bool, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"algorithm": robust(TrimmedMean(1)), "make": Breaks, "diagnostics": diagnostics}
    with pytest.raises(RuntimeError, match=r"^The pseudo-gradient of worker 1 is not finite at local step 6"):
        train(tmp_path, **settings)
    ours = train(tmp_path, nonfinite="skip", **settings)
    assert ours.reports[0].participants == (0, 2, 3)


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    wrong: list[tuple[Callable[[], Any], str]] = [
        (lambda: TrimmedMean(0), r"^TrimmedMean: `f` \(=0\) must be an integer ≥ 1"),
        (lambda: Krum(1, 0), r"^Krum: `select` \(=0\)"),
        (lambda: GeometricMedian(0), r"^GeometricMedian: `iterations` \(=0\)"),
        (lambda: GeometricMedian(eps=0.0), r"^GeometricMedian: `eps` \(=0.0\) must be a number > 0"),
        (lambda: CentredClipping(-1.0), r"^CentredClipping: `radius` \(=-1.0\)"),
        (lambda: Robust(Diloco(), "mean"), r"^Robust: `aggregate` \(='mean'\) must be a rule"),  # type: ignore[arg-type]
        (lambda: Robust(Eager(), Krum(1)), r"^Robust: `algorithm` \(=Eager\) must measure Δ_i from θ"),
        (lambda: Robust(Krum(1), Krum(1)), r"^Robust: `algorithm` \(=Krum.*\) must be an algorithm"),  # type: ignore[arg-type]
        (
            lambda: Robust(Sparta(), Krum(1)),
            r"^Robust acts on Δ, weights and gradients, but .* \(=Sparta\) sends ele",
        ),
        (lambda: Corrupt(Robust(Sparta(), Krum(1)), [0]), r"^Robust acts on Δ"),
        (lambda: Corrupt(Sparta(), [0]), r"^Corrupt acts on Δ, .* as in Sparta\(beside=Corrupt\(Diloco\(\), …\)\)\.$"),
        (lambda: Corrupt(Diloco(), [-1]), r"^Corrupt: `workers` \(=\[-1\]\) must be a list of workers"),
        (lambda: Corrupt(Diloco(), [0], True), r"^Corrupt: `scale` \(=True\) must be a number"),
        (lambda: train(tmp_path, algorithm=robust(Krum(1)), steps=1), r"^Robust: Krum.* needs at least 5 workers, but"),
        (lambda: train(tmp_path, algorithm=Corrupt(Diloco(), [4]), steps=1), r"^Corrupt: `workers` \(=\[4\]\) has a"),
        (
            lambda: train(tmp_path, algorithm=robust(TrimmedMean(1)), partition=unequal, weights="samples"),
            r"^TrimmedMean\(f=1\) counts every worker alike, but the means of this run are weighted",
        ),
        (
            lambda: train(tmp_path, algorithm=robust(TrimmedMean(1)), participation=DropOut(0.9), interval=1),
            r"^TrimmedMean\(f=1\) needs at least 3 workers, but at the synchronisation after \d+ local steps only \d",
        ),
    ]
    for make, text in wrong:
        with pytest.raises(ValueError, match=text):
            make()


@pytest.mark.slow
def test_beside_a_robust_algorithm_sparta_exchanges_plainly(tmp_path: Path) -> None:
    """Inside or around it; with p = 0 it is the robust run, bit for bit."""
    alone = train(tmp_path, algorithm=robust(TrimmedMean(1), bad=[1]))
    inside, around = Sparta(0.0, beside=robust(TrimmedMean(1), bad=[1])), Sparta(0.0, beside=Diloco())
    for made in (inside, robust(TrimmedMean(1), around, [1])):
        assert_same_run(train(tmp_path, algorithm=made), alone)
    with pytest.raises(ValueError, match=r"^Robust: Krum.* needs at least 5 workers"):
        train(tmp_path, algorithm=Sparta(0.1, beside=robust(Krum(1))), steps=1)
