"""Does every rule of `lightning_diloco.partitions` give each sample to one worker, as it says, for ever?"""

import hashlib
import math
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers import Net, loader, regression_data, trainer
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

import lightning_diloco.__main__ as command_line
from lightning_diloco import DilocoStrategy
from lightning_diloco.partitions import ByKey, ByLabel, BySize, Dirichlet
from lightning_diloco.partitions.draws import apportioned, dirichlet, log_gamma_draw, shuffle, uniforms
from lightning_diloco.partitions.rules import _Taker

SIZES = [28, 20, 28, 20, 24]  # of the classes
LABELS = [c for k in range(28) for c in range(5) if k < SIZES[c]]


def by_label(labels: Any = LABELS) -> TensorDataset:
    return TensorDataset(torch.arange(len(labels)), torch.tensor(labels))


def mixed_key(dataset: Any, index: int) -> Any:
    return "many" if index % 2 else index % 7


RULES: dict[str, Any] = {
    "labels": ByLabel(),
    "runs": ByLabel(shards_per_worker=2),
    "one run": ByLabel(shards_per_worker=1, seed=3),
    "Dirichlet": Dirichlet(0.3),
    "nearly one class": Dirichlet(1e-9),
    "nearly iid": Dirichlet(1e6),
    "unequal Dirichlet": Dirichlet(0.3, equal=False),
    "nearly nothing": Dirichlet(1e-9, equal=False, seed=1),
    "power law": BySize(power=2),
    "steep power law": BySize(power=50),
    "flat power law": BySize(power=0),
    "keys": ByKey(mixed_key),
}


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("name", RULES)
def test_every_sample_goes_to_exactly_one_worker_and_every_worker_has_one(name: str, workers: int) -> None:
    parts = RULES[name](by_label(), workers)
    assert len(parts) == workers
    assert all(parts)
    assert sorted(i for part in parts for i in part) == list(range(120))
    assert all(part == sorted(part) for part in parts)
    assert all(type(i) is int for part in parts for i in part)


@pytest.mark.parametrize("name", ["Dirichlet", "unequal Dirichlet", "nearly nothing", "power law", "steep power law"])
def test_as_many_workers_as_samples(name: str) -> None:
    assert sorted(RULES[name](by_label(LABELS[:6]), 6)) == [[i] for i in range(6)]


GOLDEN = {
    "labels": "98a950a7d5f0323b",
    "runs": "1082e4ff541533cb",
    "one run": "0fffb9ff20081afa",
    "Dirichlet": "3f2e1e7c73c85f4f",
    "nearly one class": "b28f7851c7ef62e1",
    "nearly iid": "c8379d3c6b9d3051",
    "unequal Dirichlet": "b4b14a4934dd33a4",
    "nearly nothing": "3cf66bc4e9a0627c",
    "power law": "80ba50c2a38794b4",
    "steep power law": "9cabd2354c8aba3b",
    "flat power law": "6332a4b4d7e65a4d",
    "keys": "e062cffbfe73964b",
}


@pytest.mark.parametrize("name", RULES)
def test_the_lists_are_the_same_for_ever(name: str) -> None:
    """Recorded once, with Python 3.11, torch 2.13; whoever changes them, changes published experiments."""
    found = [RULES[name](by_label(), workers) for workers in (3, 4)]
    assert hashlib.sha256(repr(found).encode()).hexdigest()[:16] == GOLDEN[name]


def test_global_generators_neither_matter_nor_move() -> None:
    expected = Dirichlet(0.3)(by_label(), 3)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
    states = random.getstate(), torch.get_rng_state()
    assert Dirichlet(0.3)(by_label(), 3) == expected
    assert states[0] == random.getstate()
    assert torch.equal(states[1], torch.get_rng_state())
    assert Dirichlet(0.3, seed=1)(by_label(), 3) != expected


# ------------------------------------------------------------------------------------------------ the rules


def counts(parts: list[list[int]], labels: Any = LABELS) -> list[list[int]]:
    classes = sorted(set(labels))
    return [[sum(labels[i] == c for i in part) for c in classes] for part in parts]


def test_whole_classes_balance_the_workers() -> None:
    """The largest first: classes 0 and 2 (28 samples), 4 (24), then 1 and 3 (20), each to the emptiest worker."""
    assert [LABELS.count(c) for c in range(5)] == SIZES
    assert counts(ByLabel()(by_label(), 3)) == [[28, 0, 0, 20, 0], [0, 0, 28, 0, 0], [0, 20, 0, 0, 24]]


def test_runs_of_sorted_samples_have_few_classes() -> None:
    """10 workers × 2 runs of 6 samples; a run of 6 out of classes of at least 20 has at most two classes."""
    parts = ByLabel(shards_per_worker=2)(by_label(), 10)
    assert [len(part) for part in parts] == [12] * 10
    ordered = sorted(range(120), key=lambda i: LABELS[i])
    runs = [set(ordered[k : k + 6]) for k in range(0, 120, 6)]
    for part in parts:
        assert sum(run <= set(part) for run in runs) == 2
    sequential = [sorted(ordered[12 * w : 12 * w + 12]) for w in range(10)]
    assert parts != sequential


def test_a_large_alpha_is_iid_and_a_small_one_is_not() -> None:
    labels = [i % 10 for i in range(4000)]
    iid = np.array(counts(Dirichlet(1e6)(by_label(labels), 8), labels))
    skewed = np.array(counts(Dirichlet(0.1)(by_label(labels), 8), labels))
    assert iid.sum(1).tolist() == skewed.sum(1).tolist() == [500] * 8
    assert abs(iid - 50).max() < 5 * math.sqrt(500 * 0.1 * 0.9)
    assert (skewed.max(1) > 200).sum() >= 6


def test_classes_are_chosen_in_the_datasets_proportions() -> None:
    """α → 0, two workers, a class of 90 %: they choose different classes with probability 2 · 0.9 · 0.1."""
    labels = [0] * 18 + [1] * 2
    found = [counts(Dirichlet(1e-9, seed=seed)(by_label(labels), 2), labels) for seed in range(400)]
    apart = sum([0, 2] in [[0, c] for _, c in parts] and [10, 0] in parts for parts in found)
    assert apart / 400 == pytest.approx(0.18, abs=5 * math.sqrt(0.18 * 0.82 / 400))


def test_a_worker_goes_on_with_the_likeliest_class_that_is_left() -> None:
    taker, classes = _Taker([-2e9, 0.0, -3e9, -1e9]), [[0, 1], [2, 3], [4, 5], [6, 7]]
    for _ in range(8):
        taker.take(classes, uniforms(0, "test"))
    assert taker.taken == [3, 2, 7, 6, 1, 0, 5, 4]


def test_the_unequal_ones_split_each_class_in_the_drawn_shares() -> None:
    """Shares of a class of 10 000 samples, against a Dirichlet's moments: mean 1/N, variance (N−1)/(N²(Nα+1))."""
    labels = [i % 200 for i in range(40_000)]
    shares = np.array(counts(Dirichlet(0.5, equal=False)(by_label(labels), 4), labels)) / 200
    assert shares.sum(0) == pytest.approx(1)
    variance = 3 / (16 * 3)
    assert shares.mean() == pytest.approx(0.25)
    assert shares.mean(1) == pytest.approx(0.25, abs=4 * math.sqrt(variance / 200))
    assert shares.var() == pytest.approx(variance, rel=0.25)


def test_by_size() -> None:
    parts = BySize([1, 2, 5])(by_label(), 3)
    assert [len(p) for p in parts] == [15, 30, 75]
    assert parts[0] != list(range(15))
    assert [len(p) for p in BySize([1e-9, 1, 1])(by_label(), 3)] == [1, 59, 60]
    assert [len(p) for p in BySize(power=1)(by_label(), 3)] == [65, 33, 22]  # 120 · (6, 3, 2)/11 = 65.5, 32.7, 21.8
    assert [len(p) for p in BySize(power=0)(by_label([0] * 8), 3)] == [3, 3, 2]


def test_groups_stay_together() -> None:
    writers = [f"writer {i // 7}" for i in range(120)]  # 18 of them, the last with one sample
    parts = ByKey(writers)(by_label(), 4)
    found = [{writers[i] for i in part} for part in parts]
    assert sum(map(len, found)) == len(set.union(*found)) == 18
    assert sorted(map(len, parts)) == [28, 28, 29, 35]


# ------------------------------------------------------------------------------------------------ random numbers


@pytest.mark.parametrize("shape", [0.05, 0.3, 1.0, 2.5, 40.0])
def test_gamma_draws_have_a_gammas_moments(shape: float) -> None:
    """Mean a, variance a, third central moment 2a; and E[log x] = ψ(a)."""
    uniform = uniforms(0, "test")
    logs = torch.tensor([log_gamma_draw(shape, uniform) for _ in range(20_000)], dtype=torch.float64)
    x = logs.exp()
    assert x.mean().item() == pytest.approx(shape, abs=5 * math.sqrt(shape / 20_000))
    assert x.var().item() == pytest.approx(shape, rel=0.25)
    psi = torch.digamma(torch.tensor(shape, dtype=torch.float64)).item()
    spread = torch.polygamma(1, torch.tensor(shape, dtype=torch.float64)).sqrt().item()
    assert logs.mean().item() == pytest.approx(psi, abs=5 * spread / math.sqrt(20_000))


def test_dirichlet_draws_have_a_dirichlets_moments() -> None:
    uniform, parameters = uniforms(1, "test"), [0.2, 0.5, 1.3]
    draws = torch.tensor([dirichlet(parameters, uniform) for _ in range(10_000)], dtype=torch.float64)
    assert draws.sum(1).sub(1).abs().max() < 1e-12
    for k, a in enumerate(parameters):
        variance = a / 2 * (1 - a / 2) / 3
        assert draws[:, k].mean().item() == pytest.approx(a / 2, abs=5 * math.sqrt(variance / 10_000))
        assert draws[:, k].var().item() == pytest.approx(variance, rel=0.1)


def test_shuffling_is_uniform() -> None:
    uniform = uniforms(2, "test")
    seen: dict[tuple[int, ...], int] = {}
    for _ in range(6000):
        items = [0, 1, 2]
        shuffle(items, uniform)
        seen[tuple(items)] = seen.get(tuple(items), 0) + 1
    assert len(seen) == 6
    assert all(abs(n - 1000) < 5 * math.sqrt(1000) for n in seen.values())


def test_apportioning_is_exact() -> None:
    for count in range(30):
        found = apportioned(count, [0.1, 2.0, 0.7])
        assert sum(found) == count
        assert all(abs(f - count * s / 2.8) < 1 for f, s in zip(found, [0.1, 2.0, 0.7], strict=True))


# ------------------------------------------------------------------------------------------------ labels


class Items(Dataset[Any]):
    """Holds its labels in its items only, and counts how often it is read."""

    def __init__(self, labels: Any = LABELS) -> None:
        self.hidden, self.reads = labels, 0

    def __len__(self) -> int:
        return len(self.hidden)

    def __getitem__(self, i: int) -> Any:
        self.reads += 1
        return [0.0] * 3, torch.tensor(self.hidden[i])


class Held(Items):
    def __init__(self, name: str, labels: Any) -> None:
        super().__init__()
        setattr(self, name, labels)


def reversed_subset() -> Any:
    return Subset(Subset(by_label([*LABELS, 9]), list(range(120))), list(reversed(range(120))))


@pytest.mark.parametrize(
    ("make", "labels"),
    [
        (lambda: Held("targets", LABELS), LABELS),
        (lambda: Held("targets", torch.tensor(LABELS)), LABELS),
        (lambda: Held("labels", np.array(LABELS)), LABELS),
        (lambda: Held("labels", ["abcde"[c] for c in LABELS]), LABELS),
        (Items, LABELS),
        (lambda: Held("targets", "of another length"), LABELS),
        (reversed_subset, LABELS[::-1]),
        (
            lambda: ConcatDataset([by_label(LABELS[:50]), Subset(by_label(), range(50, 120))]),
            LABELS,
        ),
        (lambda: Subset(Items(), list(range(60))), LABELS[:60]),
    ],
)
def test_labels_are_found(make: Any, labels: list[int]) -> None:
    assert ByLabel()(make(), 3) == ByLabel()(by_label(labels), 3)


def test_held_labels_are_not_read_from_items() -> None:
    dataset = Held("targets", LABELS)
    Dirichlet(0.5)(Subset(dataset, range(100)), 3)
    ByLabel(labels=lambda data, i: data.hidden[i])(dataset, 3)
    assert dataset.reads == 0


@pytest.mark.parametrize("rule", [ByLabel, lambda **k: Dirichlet(0.3, **k)])
def test_labels_can_be_given(rule: Any) -> None:
    expected = rule()(by_label(), 3)
    for labels in (LABELS, torch.tensor(LABELS), np.array(LABELS), tuple(LABELS), lambda data, i: LABELS[i]):
        assert rule(labels=labels)(by_label([0] * 120), 3) == expected


def test_reading_a_large_dataset_for_its_labels_is_said() -> None:
    message = (
        "The labels of Items are found out by reading its 10001 samples, which may take long. Pass them as `labels=`: a"
        " label per sample, or a function `(dataset, index) -> label`."
    )
    with pytest.warns(UserWarning, match=r"^The labels of Items") as caught:
        ByLabel()(Items([i % 3 for i in range(10_001)]), 3)
    assert [str(w.message) for w in caught] == [message]


# ------------------------------------------------------------------------------------------------ errors

WAY = "Give a value per sample, or a function `(dataset, index) -> value`."


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ByLabel(0), "ByLabel: `shards_per_worker` (=0) must be an integer ≥ 1, or None for whole classes."),
        (lambda: ByLabel(seed=1.5), "ByLabel: `seed` (=1.5) must be an integer."),
        (lambda: Dirichlet(0), "Dirichlet: `alpha` (=0) must be a number > 0."),
        (lambda: Dirichlet(float("inf")), "Dirichlet: `alpha` (=inf) must be a number > 0."),
        (lambda: Dirichlet(1, equal=2), "Dirichlet: `equal` (=2) must be True or False."),
        (
            BySize,
            "BySize: give `proportions` (=None), like [1, 2, 5], or `power` (=None), like 1.5: one of the two.",
        ),
        (
            lambda: BySize([1], 1),
            "BySize: give `proportions` (=[1]), like [1, 2, 5], or `power` (=1), like 1.5: one of the two.",
        ),
        (lambda: BySize(power=-1), "BySize: `power` (=-1) must be a number ≥ 0."),
        (lambda: BySize(3), "BySize: `proportions` (=3) must be a list with a number > 0 per worker."),
        (lambda: BySize([1, 0]), "BySize: `proportions` (=[1, 0]) must hold numbers > 0 only."),
        (
            lambda: BySize([1, 2])(by_label(), 3),
            "BySize: `proportions` has 2 numbers, but there are 3 workers. Give one each.",
        ),
        (
            lambda: BySize(power=1)(by_label([0, 1]), 3),
            "BySize(proportions=None, power=1, seed=0): 2 samples are too few for 3 workers: every worker needs one."
            " Use at most 2 workers.",
        ),
        (
            lambda: ByLabel()(by_label(), 6),
            "ByLabel: 5 classes can't be dealt whole to 6 workers, since every worker needs one. Use at most 5 workers,"
            " or `ByLabel(shards_per_worker=2)` or `Dirichlet`.",
        ),
        (
            lambda: ByLabel(50)(by_label(), 3),
            "ByLabel(shards_per_worker=50, seed=0): 120 samples can't be cut into 150 runs (3 workers × 50). Use"
            " fewer.",
        ),
        (
            lambda: ByKey(lambda data, i: 0)(by_label(), 2),
            "ByKey: 1 different keys can't be dealt whole to 2 workers, since every worker needs one. Use at most 1"
            " workers, or a finer key.",
        ),
        (lambda: ByKey([1, 2])(by_label(), 2), f"`key` is 2 values for a dataset with 120 samples. {WAY}"),
        (lambda: ByKey(7)(by_label(), 2), f"`key` is a int for a dataset with 120 samples. {WAY}"),  # type: ignore[arg-type]
        (
            lambda: ByLabel(labels=[[1]] * 120)(by_label(), 2),
            "`labels` of sample 0 is [1], which can't tell groups apart. Values must be numbers, strings or other"
            " hashable values: pass `labels=` with a function `(dataset, index) -> value`.",
        ),
        (
            lambda: Dirichlet(1)(regression_data(4), 2),
            "`labels` of sample 0 is [0.44, which can't tell",
        ),
        (
            lambda: ByLabel()(TensorDataset(torch.zeros(4)), 2),
            "The labels of TensorDataset are unknown: it has no `targets`, and its items are no pairs `(x, label)` but"
            " a tuple. Pass `labels=`: a label per sample, or a function `(dataset, index) -> label`.",
        ),
    ],
)
def test_bad_input_is_an_error(call: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        call()
    if message.endswith("can't tell"):
        assert "can't tell groups apart" in str(caught.value)
    else:
        assert str(caught.value) == message


# ------------------------------------------------------------------------------------------------ use


@pytest.mark.parametrize("name", [name for name in RULES if name != "keys"])
def test_they_can_be_pickled_and_have_a_short_description(name: str) -> None:
    rule = RULES[name]
    assert pickle.loads(pickle.dumps(rule)) == rule
    assert eval(repr(rule)) == rule
    assert "labels" not in repr(ByLabel(labels=LABELS))


def test_a_run_reads_the_lists() -> None:
    class Seeing(Net):
        def training_step(self, batch, batch_idx):
            seen.setdefault(self.trainer.strategy.current_worker, []).extend(batch[0].tolist())
            return super().training_step([torch.randn(len(batch[0]), 3), batch[1][:, None].float()], batch_idx)

    seen: dict[int, list[int]] = {}
    t = trainer(DilocoStrategy(3, 4, partition=ByLabel(), weights="samples"), max_epochs=1)
    t.fit(Seeing(), loader(by_label()))
    parts = ByLabel()(by_label(), 3)
    assert {w: set(indices) for w, indices in seen.items()} == {w: set(part) for w, part in enumerate(parts)}
    assert t.strategy._engine.context.channel.weights == {0: 48, 1: 28, 2: 44}


def first_half(dataset: Any, index: int) -> bool:
    """A key, by its import path."""
    return index < len(dataset) // 2


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"class_path": "lightning_diloco.partitions.Dirichlet", "init_args": {"alpha": 0.5}}, Dirichlet(0.5)),
        ({"class_path": "lightning_diloco.partitions.BySize", "init_args": {"proportions": [1, 3]}}, BySize([1, 3])),
        ({"class_path": "lightning_diloco.partitions.ByLabel"}, ByLabel()),
        (
            {"class_path": "lightning_diloco.partitions.ByKey", "init_args": {"key": "test_partitions.first_half"}},
            ByKey(first_half),
        ),
    ],
)
def test_they_can_be_named_in_a_configuration(
    given: Any, expected: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # of Lightning's own use of it
    monkeypatch.setattr("sys.argv", ["python -m lightning_diloco"])
    arguments = {"num_nodes": 2, "diloco_interval": 2, "partition": given, "weights": "samples"}
    strategy = {"class_path": "lightning_diloco.DilocoStrategy", "init_args": arguments}
    quiet = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    config = {
        "seed_everything": 1,
        "trainer": {"strategy": strategy, "max_steps": 2, "enable_model_summary": False, **quiet},
    }
    (tmp_path / "given.yaml").write_text(yaml.safe_dump(config))
    model = "--model=test_partitions.Labelled"
    made = command_line.main(["fit", f"--config={tmp_path / 'given.yaml'}", model]).trainer.strategy
    assert made._settings.partition == expected
    if isinstance(expected, ByKey):
        assert made._settings.partition.key is first_half
    assert made.local_steps == 2


class Labelled(Net):
    """Has data of its own."""

    def __init__(self) -> None:
        super().__init__()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return super().training_step((x[:, None].float().expand(-1, 3) / 100, y[:, None].float()), batch_idx)

    def train_dataloader(self) -> Any:
        return loader(by_label())
