"""Are hints given where a run will probably regret something, once, with the way out, and nowhere else?"""

import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers import Net, assert_same, copy_of, loader, regression_data, trainer
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.callbacks import LearningRateFinder
from processes import run
from torch.utils.data import DataLoader, IterableDataset

from lightning_diloco import DataParallel, DilocoCallback, DilocoHint, DilocoStrategy, PeriodicAveraging
from lightning_diloco._lightning import process
from lightning_diloco.reporting import hints


@pytest.fixture(autouse=True)
def _a_fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hints, "_given", set())


def given(act: Callable[[], Any]) -> list[str]:
    """The hints that a call gives."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DilocoHint)
        act()
    found = [str(w.message) for w in caught if issubclass(w.category, DilocoHint)]
    assert all(text.startswith("DiLoCo hint: ") for text in found)  # pyproject.toml goes by these words
    return [text.removeprefix("DiLoCo hint: ") for text in found]


def fit(strategy: DilocoStrategy, module: Any = None, data: Any = None, **kwargs: Any) -> list[str]:
    return given(lambda: trainer(strategy, **kwargs).fit(module or Net(), loader() if data is None else data))


MILD = {"lr": 0.7, "momentum": 0.5, "nesterov": True}

# -------------------------------------------------------------------------------------------- H


@pytest.mark.parametrize(("flushes", "words"), [(True, "only once, at its end"), (False, "never")])
def test_rounds_longer_than_the_run(flushes: bool, words: str) -> None:
    assert fit(DilocoStrategy(2, 41, final_sync=flushes), max_steps=40, max_epochs=-1) == [
        "`diloco_interval` (=41) is larger than the run of 40 local steps: the workers synchronise"
        f" {words}. Choose a smaller one, for example 4, or train longer."
    ]


def test_a_round_as_long_as_the_run_is_a_round() -> None:
    assert fit(DilocoStrategy(2, 8, outer_optimizer_kwargs=MILD), max_steps=8) == []


@pytest.mark.parametrize(("algorithm", "expected"), [(PeriodicAveraging(), 2), (DataParallel(), 1)])
def test_algorithms_without_an_outer_optimizer(algorithm: Any, expected: int) -> None:
    """Both may read a shard several times; data parallelism has no rounds that could be too long."""
    found = fit(DilocoStrategy(2, 100, algorithm=algorithm, partition=parts(30, 12)), max_steps=12)
    assert ["is larger than the run" in text for text in found] == [True, False][-expected:]


# -------------------------------------------------------------------------------------------- outer momentum


class Pull(L.LightningModule):
    """A weight that inner steps move to ``at``, wherever they start: Δ_i = θ − at."""

    def __init__(self, at: float) -> None:
        super().__init__()
        self.at, self.weight = at, torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return 0.5 * (self.weight - self.at).square().sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def expected_cosines(outer: dict[str, Any], rounds: int) -> list[float]:
    """Of a single weight a cosine is a sign: Δ = θ − 1 against the momentum, by hand."""
    theta, momentum, signs = 0.0, None, []
    for _ in range(rounds):
        delta = theta - 1.0
        if momentum is not None:
            signs.append(math.copysign(1.0, delta * momentum))
        momentum = delta if momentum is None else outer["momentum"] * momentum + delta
        theta -= outer["lr"] * (delta + outer["momentum"] * momentum if outer.get("nesterov") else momentum)
    return signs


NESTEROV = {"lr": 0.7, "momentum": 0.9, "nesterov": True}
GENTLE = {"lr": 0.1, "momentum": 0.1, "nesterov": True}


@pytest.mark.parametrize(("outer", "fires"), [(NESTEROV, True), (GENTLE, False)])
def test_a_momentum_that_overshoots(outer: dict[str, Any], fires: bool) -> None:
    """θ starts at 0, the workers pull to 1, and momentum 0.9 carries θ far past 1 and back."""
    signs = expected_cosines(outer, 12)
    low = [sum(sign < hints.BOUND for sign in signs[:n]) for n in range(12)]  # after n + 1 of 12 rounds
    due = [n for n in range(hints.LEAST, 12) if low[n] / n * (n + 1) / 12 > hints.SHARE]
    found = fit(DilocoStrategy(2, 2, outer_optimizer_kwargs=outer), Pull(1.0), max_steps=24, max_epochs=-1)
    assert bool(due) == bool(found) == fires
    if fires:
        n = due[0]
        assert found == [
            f"the outer momentum of 0.9 overshoots: until local step {2 * (n + 1)} the mean pseudo-gradient had a"
            f" cosine below 0.3 with it at {low[n]} of {n} outer steps. Short runs like that often ended worse than"
            " with a smaller momentum, or with a plain average. Compare with `outer_optimizer_kwargs={'lr': 0.7,"
            " 'momentum': 0.5, 'nesterov': True}` and with `{'lr': 1.0}`."
        ]


@pytest.mark.parametrize(
    "arguments",
    [
        {"outer_optimizer_kwargs": {"lr": 1.0}},
        {"outer_optimizer_cls": torch.optim.Adam, "outer_optimizer_kwargs": {"lr": 1.0}},
        {"algorithm": PeriodicAveraging()},
        {"num_nodes": 1},
        {"diagnostics": False},
        {"diloco_interval": 1},  # 24 rounds: more than the measured runs had
    ],
    ids=lambda x: "-".join(x),
)
def test_runs_whose_momentum_is_not_judged(arguments: dict[str, Any]) -> None:
    strategy = DilocoStrategy(**{"num_nodes": 2, "diloco_interval": 2, **arguments})
    assert fit(strategy, Pull(1.0), max_steps=24, max_epochs=-1) == []


def test_the_bound_and_the_share_of_rounds() -> None:
    below, at = hints.BOUND - 0.01, hints.BOUND
    assert hints.overshoots([at] * 5 + [below] * 4, progress=1.0)
    assert not hints.overshoots([at] * 6 + [below] * 4, progress=1.0)
    assert hints.overshoots([below] * 5, progress=0.41)
    assert not hints.overshoots([below] * 5, progress=0.39)
    assert not hints.overshoots([below] * (hints.LEAST - 1), progress=1.0)


def test_the_momentum_that_counts() -> None:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "momentum": m} for m in (0.5, 0.85)]
    assert hints.momentum_of(torch.optim.SGD(groups, lr=1.0)) == 0.85
    assert hints.momentum_of(torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))])) == 0.0


# -------------------------------------------------------------------------------------------- shards


def parts(*sizes: int) -> Callable[..., list[range]]:
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return lambda dataset, n: [range(s, s + size) for s, size in zip(starts, sizes, strict=True)]


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((30, 12, 40), "worker 1's shard of 12 samples is read 3.33 times in every epoch"),
        ((40, 20, 30), "worker 1's shard of 20 samples is read 2 times in every epoch"),
        ((40, 21, 30), None),
        ((32, 32, 32), None),
    ],
)
def test_a_shard_that_is_read_several_times(sizes: Sequence[int], words: str | None) -> None:
    strategy = DilocoStrategy(3, 4, outer_optimizer_kwargs=MILD, partition=parts(*sizes))
    rest = (
        ": an epoch is as long as the longest shard, of 40. Return lists of similar length from `partition` if that"
        " isn't meant."
    )
    assert fit(strategy, data=loader(regression_data(96))) == ([words + rest] if words else [])


# -------------------------------------------------------------------------------------------- machines


class Waits(Exception):
    """Where the process would wait for others."""


def start_on_two_machines(monkeypatch: pytest.MonkeyPatch, **kwargs: Any) -> Callable[[], None]:
    def wait(*args: Any, **kwargs: Any) -> None:
        raise Waits

    def start() -> None:
        t = trainer(DilocoStrategy(2, 4), num_nodes=2, max_steps=4, **kwargs)
        with pytest.raises(Waits):
            t.fit(Net(), loader())

    monkeypatch.setattr(process, "_init_dist_connection", wait)
    for name in ("NODE_RANK", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    return start


def test_a_trainer_that_would_wait_for_machines_nobody_has_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    start = start_on_two_machines(monkeypatch)
    monkeypatch.setenv("MASTER_PORT", "29511")
    assert given(start) == [
        "`Trainer(num_nodes=2)` is the number of machines, and this process now waits at 127.0.0.1:29511 for those"
        " of the others, since no cluster environment (torchrun, SLURM, …) nor NODE_RANK is set. Simulated workers are"
        " `DilocoStrategy(num_nodes=2)`, which needs no second machine. On several machines start the script"
        " on each, with torchrun, or with NODE_RANK, MASTER_ADDR and MASTER_PORT in the environment."
    ]


@pytest.mark.parametrize("name", ["NODE_RANK", "GROUP_RANK", "MASTER_ADDR"])
def test_announced_machines(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    start = start_on_two_machines(monkeypatch)
    monkeypatch.setenv(name, "127.0.0.1" if name == "MASTER_ADDR" else "0")
    assert given(start) == []


def test_machines_of_a_cluster_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    start = start_on_two_machines(monkeypatch, plugins=TorchElasticEnvironment())
    for key, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "29511"}.items():
        monkeypatch.setenv(key, value)
    assert given(start) == []


# -------------------------------------------------------------------------------------------- when and to whom


@pytest.mark.slow
def test_each_once_per_process() -> None:
    for expected in (2, 0):
        uneven = parts(30, 12)
        found = fit(DilocoStrategy(2, 100, partition=uneven), max_steps=12)
        assert len(found) == expected  # no round, and a shard that is read several times
    assert len(fit(DilocoStrategy(2, 2), Pull(1.0), max_steps=24, max_epochs=-1)) == 1  # another one


@pytest.mark.parametrize(
    ("strategy", "kwargs"),
    [
        (DilocoStrategy(2, 2), {"callbacks": DilocoCallback(hints=False)}),
        (DilocoStrategy(2, 40), {"callbacks": DilocoCallback(hints=False)}),
        (DilocoStrategy(2, 2), {"fast_dev_run": 24}),
        (DilocoStrategy(2, 40), {"fast_dev_run": 3}),
        (DilocoStrategy(1, 40, outer_optimizer_kwargs={"lr": 1.0}), {"callbacks": DilocoCallback()}),
    ],
    ids=["hints=False", "hints=False, long rounds", "fast_dev_run", "fast_dev_run, long rounds", "plain run"],
)
def test_silence(strategy: DilocoStrategy, kwargs: dict[str, Any]) -> None:
    assert fit(strategy, Pull(1.0), **{"max_steps": 24, "max_epochs": -1, **kwargs}) == []


class Tunable(Net):
    def __init__(self) -> None:
        super().__init__()
        self.lr = 1e-3

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


@pytest.mark.slow
def test_a_tuners_trial_is_not_the_run() -> None:
    """A trial of 20 steps would be shorter than a round; the run isn't."""
    finder = LearningRateFinder(num_training_steps=20, early_stop_threshold=None)
    strategy = DilocoStrategy(2, 30, outer_optimizer_kwargs=MILD)
    found = given(
        lambda: trainer(strategy, max_steps=60, max_epochs=-1, callbacks=finder, enable_checkpointing=True).fit(
            Tunable(), loader()
        )
    )
    assert found == []
    assert strategy.local_steps == 60


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter([regression_data(64)[i] for i in range(64)])


def test_a_run_of_unknown_length_is_not_judged() -> None:
    assert fit(DilocoStrategy(2, 400), data=DataLoader(Stream(), batch_size=4), max_epochs=1) == []


def test_numbers_do_not_depend_on_hints() -> None:
    results = []
    for asked in (True, False):
        L.seed_everything(1, verbose=False)
        module = Net(dropout=0.5)
        strategy = DilocoStrategy(2, 100, partition=parts(30, 12))
        found = fit(strategy, module, max_steps=12, callbacks=DilocoCallback(hints=asked))
        assert len(found) == 2 * asked
        results.append(copy_of(module.state_dict()))
    assert_same(*results)


@pytest.mark.processes
def test_process_0_hints_for_all(tmp_path: Path) -> None:
    def hint() -> list[str]:
        return fit(DilocoStrategy(2, 2), Pull(1.0), max_steps=24, max_epochs=-1, devices=2, default_root_dir=tmp_path)

    first, second = run(hint, 2, out=tmp_path / "out")
    assert (len(first), second) == (1, [])


# -------------------------------------------------------------------------------------------- the measured table


def test_the_guides_table_is_that_of_the_rule() -> None:
    guide = (Path(__file__).parents[1] / "examples" / "guides" / "reports.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in re.findall(r"^\| (?:digits|byte GPT) .*", guide, re.MULTILINE)]
    counts = dict.fromkeys(["hit", "miss", "false alarm", "silent", "no momentum"], 0)
    for _, _, _, interval, steps, rounds, outer, difference, worse, cosine, word in rows:
        assert int(rounds) == int(steps) // int(interval)
        mean, spread = map(float, difference.split(" ± "))
        assert abs(mean - spread) < 0.001 or (worse == "yes") == (mean > spread)
        counts[word] += 1
        if outer.endswith("momentum 0"):
            assert (cosine.strip(), word) == ("", "no momentum")
            continue
        fires = float(cosine) > 100 * hints.SHARE
        expected = ("hit" if fires else "miss") if worse == "yes" else ("false alarm" if fires else "silent")
        assert word == expected
    said = " ".join(guide.split())
    judged = len(rows) - counts["no momentum"]
    assert f"the table below: {len(rows)} short configurations" in said
    assert (
        f"Of {judged} configurations with a momentum: {counts['hit']} hits, {counts['miss']} misses,"
        f" {counts['false alarm']} false alarms, {counts['silent']} rightly silent."
    ) in said
    assert f"is below {hints.BOUND} in more than {100 * hints.SHARE:.0f} % of" in said
    assert judged >= 30
