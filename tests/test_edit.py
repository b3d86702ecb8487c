"""Do EDiT's protections do what they say, one by one and together, in several processes and after a resume?"""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import twins
from cases import assert_agrees
from family import (
    INNER,
    INTERVAL,
    STEPS,
    WORKERS,
    Breaks,
    Layers,
    Save,
    assert_same_run,
    batches_of,
    difference,
    several,
    start,
    train,
    unequal,
)
from helpers import assert_equal, slow_but

from lightning_diloco import (
    FP4,
    Corrupt,
    DataParallel,
    Diloco,
    Eager,
    Edit,
    Krum,
    PeriodicAveraging,
    Robust,
    Sparta,
    StreamingDiloco,
    SyncAlgorithm,
)

NESTEROV = partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True)
FILTER: dict[str, Any] = {"threshold": 1.2, "decay": 0.3, "filter_warmup": 3}

# Edit's arguments, what the oracle calls them, the interval, and steps
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], int, int]] = {
    "nothing": ({}, {}, INTERVAL, STEPS),
    "warm-up": ({"warmup_rounds": 1}, {"warmup": 1}, INTERVAL, STEPS),
    "never local": ({"warmup_rounds": 9}, {"warmup": 9}, INTERVAL, STEPS),
    "clipped": ({"max_norm": 0.2}, {"max_norm": 0.2}, INTERVAL, STEPS),
    "softmax": ({"temperature": 0.05}, {"temperature": 0.05}, INTERVAL, STEPS),
    "filtered": (FILTER, FILTER, 2, STEPS),
    "restarted": ({"restart_every": 2}, {"restart": 2}, 3, STEPS),
    "all": (
        {"warmup_rounds": 2, "max_norm": 0.1, "temperature": 0.1, "restart_every": 3, **FILTER},
        {"warmup": 2, "max_norm": 0.1, "temperature": 0.1, "restart": 3, **FILTER},
        2,
        STEPS,
    ),
}


def settings_of(name: str) -> dict[str, Any]:
    arguments, _, interval, steps = CASES[name]
    algorithm = Edit(Diloco(), **arguments)
    return {"algorithm": algorithm, "interval": interval, "steps": steps, "make": partial(Layers, "adamw")}


@cache
def in_one_process(name: str) -> tuple[Any, twins.Edit]:
    """The run, and the oracle's: the first test that asks trains them."""
    return train(Path(), **settings_of(name)), oracle_of(name)


def oracle_of(name: str) -> twins.Edit:
    _, options, interval, steps = CASES[name]
    twin = twins.Edit(start(), WORKERS, Layers.loss, INNER["adamw"], interval, outer=NESTEROV, **options)
    twin.train(batches_of(WORKERS, steps))
    return twin


@pytest.mark.parametrize("name", slow_but({"all"}, CASES))
def test_protections_agree_with_the_oracle(name: str) -> None:
    ours, twin = in_one_process(name)
    assert_agrees(ours, twin)
    if "threshold" in CASES[name][0]:  # the filter has had something to do, and not always
        steps = {step for step, _, _ in twin.outliers}
        assert 0 < len(twin.outliers) < len(steps) * WORKERS * 7


@pytest.mark.parametrize("options", [FILTER, {"temperature": 0.05}, {"max_norm": 0.1}], ids=str)
def test_protections_of_a_plain_average_agree_with_the_oracle(options: dict[str, Any], tmp_path: Path) -> None:
    """Where θ would become the mean of the weights itself."""
    twin = twins.Edit(start(), WORKERS, Layers.loss, INNER["sgd"], 2, outer=partial(torch.optim.SGD, lr=1.0), **options)
    twin.train(batches_of(WORKERS, STEPS))
    assert_agrees(train(tmp_path, algorithm=Edit(PeriodicAveraging(), **options), interval=2), twin)


@pytest.mark.processes
@pytest.mark.slow
def test_two_processes_agree_with_the_oracle_and_with_one(tmp_path: Path) -> None:
    two = several(tmp_path, 2, [settings_of(name) for name in CASES])
    for name, result in zip(CASES, two, strict=True):
        one, oracle = in_one_process(name)
        assert_agrees(result, oracle)
        assert_same_run(result, one, measured=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 4, 8, 11])
def test_a_run_resumes(step: int, tmp_path: Path) -> None:
    whole = train(tmp_path, **settings_of("all"), callbacks=[Save([step], tmp_path)])
    resumed = train(tmp_path, **settings_of("all"), resume=tmp_path / f"{step}.ckpt", seed=99)
    assert_equal(resumed.history, whole.history[step:])
    for of_run in ("theta", "workers", "module", "bytes", "steps"):
        assert_equal(getattr(resumed, of_run), getattr(whole, of_run), of_run)


@pytest.mark.slow
@pytest.mark.parametrize("make", [Diloco, partial(StreamingDiloco, 2, delay=1), PeriodicAveraging, DataParallel])
def test_without_arguments_it_is_the_algorithm_bit_for_bit(make: Callable[[], SyncAlgorithm], tmp_path: Path) -> None:
    assert_same_run(train(tmp_path, algorithm=Edit(make())), train(tmp_path, algorithm=make()))


@pytest.mark.slow
def test_fragments_have_filters_of_their_own(tmp_path: Path) -> None:
    """A fragment's weights are by the norms of its tensors, and a codec packs what the filter leaves."""
    algorithm = Edit(StreamingDiloco(2, delay=1, alpha=0.5), temperature=0.1, **FILTER)
    ours = train(tmp_path, algorithm=algorithm, codec=FP4(), interval=3)
    assert {r.tag for r in ours.reports} == {"fragment 0", "fragment 1"}
    plain = train(tmp_path, algorithm=StreamingDiloco(2, delay=1, alpha=0.5), codec=FP4(), interval=3)
    assert ours.bytes == plain.bytes
    assert difference(ours.module, plain.module) > 1e-6


@pytest.mark.slow
def test_a_worker_that_has_moved_far_has_little_weight(tmp_path: Path) -> None:
    """Worker 1 sends ten times its Δ, turned round: at a small temperature the mean is without it."""
    settings: dict[str, Any] = {"steps": INTERVAL, "final_sync": False, "outer_optimizer_kwargs": {"lr": 1.0}}
    spoilt = train(tmp_path, algorithm=Corrupt(Diloco(), [1]), **settings)
    clean = train(tmp_path, algorithm=Diloco(), **settings)
    for outer in (Edit(Corrupt(Diloco(), [1]), temperature=0.1), Corrupt(Edit(Diloco(), temperature=1e9), [1])):
        ours = train(tmp_path, algorithm=outer, **settings)
        near = difference(ours.theta, clean.theta) < 0.2 * difference(spoilt.theta, clean.theta)
        assert near == isinstance(outer, Edit)


@pytest.mark.filterwarnings("ignore:Worker 1 is left out")
def test_a_worker_that_is_not_finite_is_named_or_left_out(tmp_path: Path) -> None:
    def algorithm() -> Edit:
        return Edit(Diloco(), temperature=0.1, max_norm=1.0, threshold=3.0, filter_warmup=2)

    with pytest.raises(RuntimeError, match=r"^The pseudo-gradient of worker 1 is not finite at local step 6"):
        train(tmp_path, algorithm=algorithm(), make=Breaks)
    ours = train(tmp_path, algorithm=algorithm(), make=Breaks, nonfinite="skip")
    assert [r.participants for r in ours.reports[:2]] == [(0, 2, 3), (0, 1, 2, 3)]
    assert all(torch.isfinite(t).all() for t in ours.module.values())


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    wrong: list[tuple[Callable[[], Any], str]] = [
        (lambda: Edit(Eager()), r"^Edit: `algorithm` \(=Eager\) must measure Δ_i from θ"),
        (
            lambda: Edit(DataParallel(), max_norm=1.0),
            r"^Edit: `max_norm`, .* \(=DataParallel\) sends gradients\. Leave",
        ),
        (lambda: Edit(Robust(Sparta(), Krum(1)), threshold=3.0), r"^Robust acts on Δ"),
        (lambda: Edit(Sparta(), temperature=1.0), r"^Edit: `max_norm`, .* but `algorithm` \(=Sparta\) sends elements"),
        (lambda: Edit(Diloco(), -1), r"^Edit: `warmup_rounds` \(=-1\) must be an integer ≥ 0"),
        (lambda: Edit(Diloco(), max_norm=0), r"^Edit: `max_norm` \(=0\) must be a number > 0"),
        (lambda: Edit(Diloco(), temperature=-1.0), r"^Edit: `temperature` \(=-1.0\) must be a number > 0"),
        (lambda: Edit(Diloco(), threshold=True), r"^Edit: `threshold` \(=True\) must be a number > 0"),
        (lambda: Edit(Diloco(), decay=1.0), r"^Edit: `decay` \(=1.0\) must be a number between 0 and 1"),
        (lambda: Edit(Diloco(), filter_warmup=1), r"^Edit: `filter_warmup` \(=1\) must be an integer ≥ 2"),
        (lambda: Edit(Diloco(), restart_every=0), r"^Edit: `restart_every` \(=0\) must be an integer ≥ 1"),
        (
            lambda: train(tmp_path, algorithm=Edit(PeriodicAveraging(), restart_every=2), steps=1),
            r"^Edit: `restart_every` \(=2\) has no effect, since PeriodicAveraging",
        ),
        (
            lambda: train(tmp_path, algorithm=Edit(Diloco(), temperature=1.0), partition=unequal, weights="samples"),
            r"^Edit: `temperature` \(=1.0\) weights workers by their norms",
        ),
        (
            lambda: train(
                tmp_path, algorithm=Edit(Robust(Diloco(), Krum(1)), temperature=1.0), num_workers=5, interval=2, steps=2
            ),
            r"^Krum\(f=1, select=1\) counts every worker alike",
        ),
    ]
    for make, text in wrong:
        with pytest.raises(ValueError, match=text):
            make()
