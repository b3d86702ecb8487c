"""Does a comparison train what it says, under the same conditions, and does it survive being killed?"""

import dataclasses
import functools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pandas as pd
import pytest
import torch
from comparisons import RUNS, TRAINER, Data, Drawn, Dying, Failing, Witness, data, quiet
from helpers import assert_same, differs, trainer
from lightning.pytorch.callbacks import EarlyStopping
from processes import script, start_script

from lightning_diloco import Cluster, DataParallel, Diloco, DilocoCallback, DilocoStrategy, StreamingDiloco
from lightning_diloco.comparison import Comparison, Run, comparing, grid
from lightning_diloco.partitions import ByKey, ByLabel, Dirichlet

DILOCO = {"num_nodes": 2, "diloco_interval": 4}


@pytest.fixture(autouse=True)
def _started_scripts_find_comparisons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


def assert_equal_but_for_time(a: Comparison, b: Comparison) -> None:
    """Bit for bit."""
    frames = [comparison.data.drop(columns="seconds") for comparison in (a, b)]
    pd.testing.assert_frame_equal(*frames, check_exact=True)


# -------------------------------------------------------------------------------------------- the same run by hand


class Curve(L.Callback):
    """The losses, read where a script would read them."""

    def __init__(self) -> None:
        self.val: list[float] = []
        self.train: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.train.append(float(outputs["loss"]))

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.val.append(float(trainer.callback_metrics["val_loss"]))


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("arguments", [None, {"num_nodes": 3, "diloco_interval": 4}], ids=["plain", "diloco"])
def test_a_run_is_the_run_of_a_script_bit_for_bit(arguments: Any, accumulate: int) -> None:
    """14 steps, validations after steps 5, 10 (batches, with accumulation) and after the fit."""
    settings = {**TRAINER, "accumulate_grad_batches": accumulate}
    frame = quiet(runs={"it": "plain" if arguments is None else arguments}, seeds=[11], trainer=settings).data

    L.seed_everything(11, verbose=False)
    model, (train, val) = Drawn(), data()
    curve, strategy = Curve(), "auto" if arguments is None else DilocoStrategy(**arguments)
    by_hand = trainer(strategy, **settings, max_epochs=None, callbacks=[curve])
    by_hand.fit(model, train, val)
    by_hand.validate(model, val, verbose=False)

    n = 1 if arguments is None else 3
    batches = [5, 10, 14] if accumulate == 1 else [5, 10, 15, 20, 25, 28]
    expected_steps = [5, 10, 14] if accumulate == 1 else [2, 5, 7, 10, 12, 14]
    assert frame["val_loss"].tolist() == curve.val
    assert frame["final"].tolist() == [False] * (len(batches) - 1) + [True]
    assert frame["step"].tolist() == expected_steps
    assert frame["samples"].tolist() == [8 * n * b for b in batches]  # 96 samples: no batch is short
    means = [accumulate * np.mean(curve.train[a:b]) for a, b in zip([0, *batches], batches, strict=False)]
    np.testing.assert_allclose(frame["train_loss"], means, rtol=1e-12)
    sent = sum(p.nbytes for p in model.parameters()) + 8 * 8 + 0 if n > 1 else 0  # and BatchNorm's two means
    assert frame["bytes"].tolist()[-1] == (by_hand.strategy.ledger.total_bytes if n > 1 else 0)
    assert frame["bytes"].tolist() == [
        sent * sum(s >= due for due in (4, 8, 12)) + sent * (s == 14) for s in expected_steps
    ]
    assert (frame["seconds"].diff().dropna() >= 0).all()
    assert frame["seconds"].iloc[0] > 0
    assert set(frame["num_nodes"]) == {n}
    assert frame["diloco_interval"].isna().all() if n == 1 else set(frame["diloco_interval"]) == {4}


def test_this_process_is_left_as_it_was() -> None:
    random.seed(3)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    quiet(runs={"it": DILOCO})
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])
    assert "PL_GLOBAL_SEED" not in os.environ


@pytest.mark.slow
def test_all_runs_start_alike_and_read_alike() -> None:
    Witness.seen.clear()
    quiet(Witness, seeds=2)
    first, second = (dict(zip(RUNS, Witness.seen[i : i + len(RUNS)], strict=True)) for i in (0, len(RUNS)))
    for of_seed in (first, second):
        for weights, _ in of_seed.values():
            assert_same(weights, of_seed["one worker"][0])
        reads = {name: batches for name, (_, batches) in of_seed.items()}
        assert len(reads["short"]) == 2 * 14
        assert sorted(reads["short"]) == sorted(reads["long"]) == sorted(reads["all"])
        for worker in (0, 1):
            orders = [[x for w, x in reads[name] if w == worker] for name in ("short", "long", "all")]
            assert orders[0] == orders[1] == orders[2]
        assert len(reads["longer"]) == 2 * 14
        # of the first epoch; torch's generator, from which plain runs draw, serves dropout and validations, too
        assert reads["longer"][:12] == reads["one worker"][:12]
    assert differs(first["short"][0], second["short"][0])
    assert first["short"][1] != second["short"][1]


def test_nothing_is_shared_between_runs() -> None:
    """The objects in the arguments are copied for every run: algorithms, and callbacks with a memory."""
    algorithm, stopping = StreamingDiloco(fragments=2), EarlyStopping("val_loss", patience=0, min_delta=100.0)
    runs = {name: {**DILOCO, "algorithm": algorithm} for name in ("a", "b")}
    frame = quiet(runs=runs, trainer={**TRAINER, "callbacks": [stopping]}).data
    assert frame["step"].tolist() == 2 * [5, 10, 10]  # the second validation is no better by 100
    assert frame[frame["run"] == "a"]["val_loss"].tolist() == frame[frame["run"] == "b"]["val_loss"].tolist()
    assert not hasattr(algorithm, "ctx")
    assert stopping.wait_count == 0


@pytest.mark.slow
def test_datamodules_and_arguments_of_a_run() -> None:
    runs = {
        "as it is": Run(DILOCO),
        "as it was": DILOCO,
        "other": Run(DILOCO, trainer={"max_steps": 6}, module={"dropout": 0.0}, data={"batch_size": 4}),
    }
    frame = quiet(data=Data, runs=runs).data
    curves = {name: part["val_loss"].tolist() for name, part in frame.groupby("run")}
    assert curves["as it is"] == curves["as it was"] == quiet(runs={"it": DILOCO}, folder="b").data["val_loss"].tolist()
    assert frame[frame["run"] == "other"]["step"].tolist() == [5, 6]
    assert frame[frame["run"] == "other"]["samples"].tolist() == [2 * 4 * 5, 2 * 4 * 6]
    by_hand = quiet(
        functools.partial(Drawn, dropout=0.0), functools.partial(Data, 4), {"it": DILOCO}, folder="c",
        trainer={**TRAINER, "max_steps": 6},
    )  # fmt: skip
    assert curves["other"] == by_hand.data["val_loss"].tolist()


def test_the_same_samples_with_epochs_are_the_same_epochs() -> None:
    settings = {"max_epochs": 2, "accelerator": "cpu"}
    frame = quiet(runs={"one": "same samples", "many": DILOCO}, trainer=settings).data
    assert frame[frame["run"] == "one"]["step"].tolist() == [12, 24, 24]
    assert frame[frame["run"] == "many"]["step"].tolist() == [6, 12, 12]
    assert frame[frame["run"] == "one"]["samples"].tolist() == frame[frame["run"] == "many"]["samples"].tolist()


# -------------------------------------------------------------------------------------------- simulated seconds

CLUSTER = Cluster(step_seconds=0.25, bandwidth_gbit_s=0.001, latency_ms=2)  # a megabit is a second
PARAMETERS = 4 * (4 * 8 + 8 + 8 + 8 + 1)  # bytes of a layer from 4 to 8, BatchNorm's weight and bias, a layer to 1
MEANS = 4 * 2 * 8  # of BatchNorm's statistics


def ring(nbytes: int, workers: int, megabits: float = 1.0) -> float:
    """Seconds of a mean over a ring: 2(N−1)/N of the bytes out of each, in 2(N−1) hops of 2 ms."""
    return 2 * (workers - 1) / workers * 8 * nbytes / (megabits * 1e6) + 2 * (workers - 1) * 2e-3


def simulated(frame: pd.DataFrame, run: str) -> list[float]:
    return frame[frame["run"] == run]["simulated_seconds"].tolist()


@pytest.mark.slow
def test_simulated_seconds_are_those_of_plain_arithmetic() -> None:
    """T · steps + transfers · seconds of a ring, at steps 5, 10 and, after the flush, 14; synchronous, so exactly."""
    own = Cluster(step_seconds=1.0, bandwidth_gbit_s=0.01, latency_ms=2)
    runs = {
        "plain": "plain",
        "longer": "same samples",
        "all": "DataParallel",
        "diloco": {**DILOCO, "buffers": "local"},
        "means": {**DILOCO, "num_nodes": 2},
        "own": {**DILOCO, "buffers": "local", "cluster": own},
        "none": Run(DILOCO, trainer={"max_steps": 5}),
        "one": {"num_nodes": 1, "diloco_interval": 4},
    }
    frame = quiet(runs=runs, cluster=CLUSTER).data
    delta, means = ring(PARAMETERS, 2), ring(MEANS, 2)
    of_gradients = [0.25 * s + s * delta for s in (5, 10, 14)]
    exact = {"rel": 0, "abs": 1e-12}
    assert simulated(frame, "diloco") == pytest.approx([1.25 + delta, 2.5 + 2 * delta, 3.5 + 4 * delta], **exact)
    both = delta + means
    assert simulated(frame, "means") == pytest.approx([1.25 + both, 2.5 + 2 * both, 3.5 + 4 * both], **exact)
    of_gradients[-1] += means  # its one synchronisation of buffers, at the end
    assert simulated(frame, "all") == pytest.approx(of_gradients, **exact)
    faster = ring(PARAMETERS, 2, megabits=10)
    assert simulated(frame, "own") == pytest.approx([5 + faster, 10 + 2 * faster, 14 + 4 * faster], **exact)
    assert simulated(frame, "one") == pytest.approx([1.25, 2.5, 3.5], **exact)
    assert np.isnan(simulated(frame, "plain")).all()
    assert np.isnan(simulated(frame, "longer")).all()


def test_the_cluster_changes_no_other_number() -> None:
    with_cluster, without = quiet(runs={"a": DILOCO}, cluster=CLUSTER), quiet(runs={"a": DILOCO}, folder="b")
    assert without.data["simulated_seconds"].isna().all()
    assert_equal_but_for_time(
        *(Comparison(c.data.drop(columns="simulated_seconds")) for c in (with_cluster, without)),
    )


def test_a_run_is_reused_on_an_equal_cluster_only(monkeypatch: pytest.MonkeyPatch) -> None:
    quiet(runs={"a": DILOCO}, cluster=CLUSTER)
    monkeypatch.setattr(comparing, "train", lambda *_: pytest.fail("trained again"))
    quiet(runs={"a": DILOCO}, cluster=dataclasses.replace(CLUSTER))
    quiet(runs={"a": {**DILOCO, "cluster": CLUSTER}})
    with pytest.raises(ValueError, match="was finished with other settings") as caught:
        quiet(runs={"a": DILOCO}, cluster=dataclasses.replace(CLUSTER, latency_ms=3))
    then = "'Cluster(step_seconds=0.25, bandwidth_gbit_s=0.001, latency_ms=2.0)'"
    assert f"`strategy.cluster` was {then} and is {then.replace('2.0', '3.0')}. " in str(caught.value)


def test_runs_that_were_finished_before_there_were_clusters_are_loaded() -> None:
    quiet(runs={"a": DILOCO})
    (file,) = Path("comparison/runs").glob("*.json")
    content = json.loads(file.read_text())
    for row in content["rows"]:
        del row["simulated_seconds"]
    file.write_text(json.dumps(content))
    frame = quiet(runs={"a": DILOCO}).data
    assert frame["simulated_seconds"].isna().all()
    assert frame["step"].tolist() == [5, 10, 14]


@pytest.mark.parametrize(
    ("runs", "cluster", "words"),
    [
        ({"a": "plain"}, 3, "`cluster` (=3) must be an instance of Cluster, like Cluster.low(step_seconds=0.1), or"),
        (
            {"a": "plain"},
            CLUSTER,
            "`cluster` (=Cluster(step_seconds=0.25, bandwidth_gbit_s=0.001, latency_ms=2.0)) has no effect: no run"
            " takes it. Plain runs have no clock; a run with arguments of DilocoStrategy has one.",
        ),
        (
            {"a": Run(functools.partial(DilocoStrategy, 2))},
            CLUSTER,
            "`runs['a']`: its strategy comes from a callable, which `cluster` can't be passed on to. Make it with a"
            " `cluster` there, or write the strategy as a dict.",
        ),
        (
            {"a": DILOCO},
            Cluster([1, 2, 3], 1, 0),
            "`runs['a']`: Cluster: `step_seconds` has 3 numbers, but there are 2 workers. Give one number for all",
        ),
    ],
)  # fmt: skip
def test_clusters_that_fit_no_run_are_refused(runs: Any, cluster: Any, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        quiet(runs=runs, cluster=cluster)
    assert str(caught.value).startswith(words)
    assert not finished()


def test_a_callable_with_a_cluster_of_its_own_stays_as_it_is() -> None:
    made = functools.partial(DilocoStrategy, 2, 4, buffers="local", cluster=CLUSTER)
    frame = quiet(runs={"a": Run(made), "b": DILOCO}, cluster=Cluster(1, 1, 0)).data
    assert simulated(frame, "a")[0] == pytest.approx(1.25 + ring(PARAMETERS, 2), abs=1e-12)


# -------------------------------------------------------------------------------------------- what is on disk


SCRIPT = """
import sys
from comparisons import Dying, quiet
if __name__ == "__main__":
    quiet(Dying, seeds=3, runs={"one worker": "plain", "two": {"num_nodes": 2, "diloco_interval": 4}},
          processes=int(sys.argv[1]))
"""


def finished() -> set[str]:
    return {path.name for path in Path("comparison/runs").glob("*.json")}


@pytest.mark.slow
@pytest.mark.processes
def test_a_comparison_killed_twice_is_that_of_one_never_killed() -> None:
    runs = {"one worker": "plain", "two": DILOCO}
    whole = quiet(Dying, seeds=3, runs=runs, folder="whole")

    Path("script.py").write_text(SCRIPT)
    Path("die").touch()  # inside a run: in a step of seed 1
    first = script("script.py", "1")
    assert first.returncode == -signal.SIGKILL
    assert finished() == {"one worker, seed 0.json", "two, seed 0.json"}

    Path("stay").touch()
    second = start_script("script.py", "1")  # killed between two runs, or early in one
    while len(finished()) < 4:
        assert second.is_alive()
        time.sleep(0.01)
    second.kill()
    second.join()
    Path("stay").unlink()
    assert len(finished()) == 4
    written = {name: (Path("comparison/runs") / name).stat().st_mtime_ns for name in finished()}

    resumed = quiet(Dying, seeds=3, runs=runs)
    assert_equal_but_for_time(resumed, whole)
    assert len(finished()) == 6
    for name, at in written.items():
        assert (Path("comparison/runs") / name).stat().st_mtime_ns == at, f"{name} was trained again"


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.usefixtures("_copies")
def test_several_processes_give_the_same_numbers_and_outlive_a_killed_one() -> None:
    runs = {"one worker": "plain", "two": DILOCO}
    alone = quiet(Dying, seeds=3, runs=runs, folder="alone")
    Path("die").touch()
    with pytest.raises(
        RuntimeError, match=r"^1 of 6 runs have failed: 'one worker' with seed 1: The process ended"
    ) as e:
        quiet(Dying, seeds=3, runs=runs, processes=2)
    assert "(exit code -9) without a result" in str(e.value)
    assert finished() == {f"{name}, seed {seed}.json" for name in runs for seed in range(3)} - {
        "one worker, seed 1.json"
    }
    assert_equal_but_for_time(quiet(Dying, seeds=3, runs=runs, processes=2), alone)


SLOW = """
import signal
from comparisons import Slow, quiet
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
    quiet(Slow, seeds=4, runs={"one worker": "plain"}, processes=2)
"""


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_the_one_that_started_it(how: signal.Signals) -> None:
    Path("script.py").write_text(SLOW)
    started = start_script("script.py")
    while len(found := list(Path().glob("process *"))) < 2:
        assert started.is_alive()
        time.sleep(0.05)
    os.kill(started.pid, how)
    try:
        started.join(60)
        assert started.exitcode
    finally:
        started.kill()
    deadline = time.monotonic() + 60
    for pid in (int(path.name.split()[1]) for path in found):
        while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not Path(f"/proc/{pid}").exists()


@pytest.mark.slow
@pytest.mark.processes
def test_a_script_without_the_guard_is_told() -> None:
    code = SCRIPT.replace('if __name__ == "__main__":', "if True:")
    Path("script.py").write_text(code)
    done = script("script.py", "2")
    assert done.returncode == 1
    assert 'must do so under `if __name__ == "__main__":`' in done.stderr


@pytest.mark.slow
def test_finished_runs_are_loaded_and_further_ones_added(monkeypatch: pytest.MonkeyPatch) -> None:
    quiet(runs={"a": "plain"}, seeds=[0, 7])
    description = json.loads(Path("comparison/comparison.json").read_text())
    assert description["seeds"] == [0, 7]
    assert description["runs"]["a"]["trainer"]["max_steps"] == 14
    whole = quiet(runs={"b": DILOCO, "a": "plain"}, seeds=[0, 7, 2], folder="whole")
    trained: list[tuple[str, int]] = []
    train = comparing.train
    monkeypatch.setattr(comparing, "train", lambda t, p: (trained.append((t.name, t.seed)), train(t, p))[1])
    assert_equal_but_for_time(quiet(runs={"b": DILOCO, "a": "plain"}, seeds=[0, 7, 2]), whole)
    assert trained == [("b", 0), ("b", 7), ("b", 2), ("a", 2)]
    assert list(whole.data["run"].unique()) == ["b", "a"]
    assert not list(Path("comparison/runs").glob("*.part"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"runs": {"a": {**DILOCO, "diloco_interval": 5}}}, "`strategy.diloco_interval` was 4 and is 5"),
        (
            {"runs": {"a": {**DILOCO, "algorithm": DataParallel()}}},
            "`strategy.algorithm` was not there and is 'DataParallel()'",
        ),
        ({"runs": {"a": Run(DILOCO, times=2)}}, "`times` was 1 and is 2"),
        ({"trainer": {**TRAINER, "max_steps": 15}}, "`trainer.max_steps` was 14 and is 15"),
        (
            {"module": functools.partial(Drawn, 0.3)},
            "`module` was 'comparisons.Drawn' and is ['comparisons.Drawn', [0.3], {}]",
        ),
        ({"data": Data}, "`data` was 'comparisons.data' and is 'comparisons.Data'"),
        ({"runs": {"a": Run(DILOCO, data={"n": 1})}}, "`arguments of data.n` was not there and is 1"),
    ],
)  # fmt: skip
def test_a_finished_run_with_other_settings_is_an_error_that_names_them(change: Any, words: str) -> None:
    quiet(runs={"a": DILOCO})
    with pytest.raises(ValueError) as caught:
        quiet(**{"runs": {"a": DILOCO}, **change})
    assert str(caught.value) == (
        f"The run 'a' with seed 0 was finished with other settings: {words}. Give the run another name, take another"
        " `folder`, or delete comparison/runs/a, seed 0.json."
    )


@pytest.mark.parametrize("of", [ByKey, functools.partial(ByLabel, None), functools.partial(Dirichlet, 1.0, True)])
def test_labels_and_keys_decide_a_run_though_a_repr_hides_them(of: Any) -> None:
    def with_keys(parts: int) -> dict[str, Any]:
        return {"runs": {"a": {**DILOCO, "partition": of(torch.arange(96) % parts)}}}

    quiet(**with_keys(2))
    quiet(**with_keys(2))  # the same
    with pytest.raises(ValueError, match=r"was finished with other settings: `strategy\.partition"):
        quiet(**with_keys(3))


def test_names_of_runs_become_names_of_files() -> None:
    quiet(runs={"a/b: 100 %": "plain", "H=2 (θ)": "plain"})
    assert finished() == {"a%2Fb%3A 100 %25, seed 0.json", "H=2 (%CE%B8), seed 0.json"}


def test_validations_on_further_weights_are_columns_and_plain_runs_have_none() -> None:
    callback = DilocoCallback(validate_on=("outer", 0))
    frame = quiet(runs={"a": DILOCO, "b": "plain"}, trainer={**TRAINER, "callbacks": [callback]}).data
    further = ["val_loss/outer", "val_loss/worker_0"]
    during = frame[(frame["run"] == "a") & ~frame["final"]]
    assert during[further].notna().all(axis=None)
    assert (during["val_loss/outer"] != during["val_loss/worker_0"]).all()
    assert frame[(frame["run"] == "b") | frame["final"]][further].isna().all(axis=None)


def test_another_lambda_is_another_factory() -> None:
    quiet(runs={"a": "plain"}, module=lambda: Drawn(dropout=0.1))
    quiet(runs={"a": "plain"}, module=lambda: Drawn(dropout=0.1))
    with pytest.raises(ValueError, match="was finished with other settings: `module"):
        quiet(runs={"a": "plain"}, module=lambda: Drawn(dropout=0.3))


def test_a_damaged_file_is_named() -> None:
    quiet(runs={"a": "plain"})
    Path("comparison/runs/a, seed 0.json").write_text("{")
    with pytest.raises(ValueError, match=r"^comparison/runs/a, seed 0\.json can't be read \(.*\)\. Delete it, and the"):
        quiet(runs={"a": "plain"})


@pytest.mark.slow
def test_a_run_that_fails_is_named_and_the_others_go_on(capsys: Any) -> None:
    with pytest.raises(RuntimeError) as caught:
        quiet(Failing, seeds=3, runs={"a": "plain", "b": DILOCO})
    assert str(caught.value) == (
        "2 of 6 runs have failed: 'a' with seed 1: ArithmeticError: out of luck; 'b' with seed 1: ArithmeticError: out"
        " of luck. The others are in comparison: the same call trains the failed ones again, and a call without them"
        " returns the others."
    )
    assert finished() == {f"{name}, seed {seed}.json" for name in "ab" for seed in (0, 2)}
    assert "a, seed 1, has failed:\nTraceback (most recent call last):" in capsys.readouterr().err
    assert len(quiet(Failing, seeds=[0, 2], runs={"a": "plain", "b": DILOCO}).data) == 12


# -------------------------------------------------------------------------------------------- what it says


def test_lightning_is_quiet_and_the_bar_counts(capfd: Any) -> None:
    quiet(runs={"a": "plain", "b": DILOCO}, progress_bar=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert all("compare:" in line for line in err.replace("\r", "\n").splitlines() if line.strip())
    assert "2.0/2 runs" in err


NEITHER = "must be 'plain', 'same samples', 'DataParallel', a dict with arguments of DilocoStrategy, or a"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"runs": {}}, r"`runs` \(={}\) must be a dict from names to runs"),
        ({"runs": {"a": "ddp"}}, rf"`runs\['a'\]` \(='ddp'\) {NEITHER}"),
        ({"runs": {"a": DilocoStrategy()}}, rf"`runs\['a'\]` \(=.*\) {NEITHER}"),
        ({"runs": {"a": {"interval": 3}}}, r"`runs\['a'\]`: .*unexpected keyword argument 'interval'"),
        ({"runs": {"a": {"num_nodes": 0}}}, r"`runs\['a'\]`: `num_nodes` \(=0\) must be an integer ≥ 1"),
        ({"runs": {"a": Run(times=0)}}, r"`runs\['a'\]`: `times` \(=0\) must be an integer ≥ 1"),
        ({"runs": {"a": Run(DilocoStrategy())}}, r"A strategy object serves a single fit"),
        ({"runs": {"a": Run(trainer={"strategy": "ddp"})}}, r"`trainer` \(of the run 'a'\) has 'strategy' \(='ddp'\)"),
        ({"runs": {" ": "plain"}}, r"names must be strings with a visible character"),
        ({"runs": {"θ" * 40: "plain"}}, r"which makes a file's name of 240 characters; at most 200 fit"),
        (
            {"runs": {"a": "same samples", "b": {"num_nodes": 2}, "c": {"num_nodes": 3}}},
            r"^`runs\['a'\]` \(='same samples'\) takes the number of workers from the other runs, which have 2 and 3\."
            r" Write it out: `Run\(times=N\)`\.$",
        ),
        (
            {"runs": {"a": "DataParallel", "b": "plain"}},
            r"which have no workers\. Write it out: `dict\(num_nodes=N, algorithm=DataParallel\(\)\)`\.$",
        ),
        ({"module": Drawn()}, r"`module` \(=Drawn object\) must be a callable that makes it"),
        ({"data": Data()}, r"`data` \(=Data object\) must be a callable that makes it"),
        ({"seeds": 0}, r"`seeds` \(=0\) must be their number, at least 1, or a list of them"),
        ({"seeds": [1, 1]}, r"`seeds` \(=\[1, 1\]\) must be different integers from 0"),
        ({"seeds": [-1]}, r"`seeds` \(=\[-1\]\) must be different integers from 0"),
        ({"processes": 0}, r"`processes` \(=0\) must be an integer ≥ 1: the number of runs at a time"),
        ({"trainer": 3}, r"`trainer` \(=3\) must be a dict with arguments of Lightning's Trainer"),
        ({"trainer": {"devices": 2}}, r"a run of a comparison takes place in one process on one device"),
        ({"trainer": {"num_nodes": 2}}, r"a run of a comparison takes place in one process on one device"),
        ({"trainer": {"fast_dev_run": True}}, r"`fast_dev_run` \(=True\), with which nothing is logged"),
        ({"trainer": {"logger": True}}, r"Give a logger object, or leave it out"),
        ({"folder": __file__}, r"`folder` \(=.*\) is a file"),
        ({"module": lambda: Drawn(), "processes": 2}, r"`module` \(=<function .*can't be sent to another process"),
        (
            {"runs": {"a": {**DILOCO, "partition": lambda dataset, n: []}}, "processes": 2},
            r"`runs\['a'\]` \(=Run\(.*can't be sent to another process",
        ),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named_before_anything_is_trained(change: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        quiet(**{"runs": {"a": "plain"}, **change})
    assert not finished()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"module": lambda: torch.nn.Linear(1, 1)}, "`module` must return a LightningModule; it returned Linear"),
        ({"data": lambda: data()[0]}, "`data` must return a LightningDataModule, or a pair of loaders"),
        ({"data": lambda: (data()[0], [])}, "The validation has logged nothing to compare"),
    ],
)
def test_factories_that_make_something_else_are_told(change: Any, words: str) -> None:
    with pytest.raises(RuntimeError, match=words):
        quiet(**{"runs": {"a": "plain"}, **change})


def test_the_extra_is_named_and_the_package_needs_none_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ModuleNotFoundError) as caught:
        quiet(runs={"a": "plain"})
    assert str(caught.value) == '`compare` needs pandas. Install it with: pip install "lightning-diloco[compare]"'
    assert not Path("comparison").exists()


@pytest.mark.slow
@pytest.mark.processes
def test_importing_the_package_imports_no_pandas() -> None:
    """(torchmetrics imports matplotlib if it is there, so that only the sources tell: no module of ours does.)"""
    code = "import sys, lightning_diloco; sys.exit('pandas' in sys.modules or not callable(lightning_diloco.compare))"
    subprocess.run([sys.executable, "-c", code], check=True)
    for path in Path(comparing.__file__).parent.glob("*.py"):
        assert "import pandas" not in path.read_text()
        assert "import matplotlib" not in path.read_text()


def test_grids_name_their_runs() -> None:
    assert grid("plain average", num_nodes=[2, 4], outer_optimizer_kwargs={"lr": 1.0}) == {
        "plain average, N=2": {"num_nodes": 2, "outer_optimizer_kwargs": {"lr": 1.0}},
        "plain average, N=4": {"num_nodes": 4, "outer_optimizer_kwargs": {"lr": 1.0}},
    }
    assert list(
        grid(
            diloco_interval=range(5, 15, 5),
            algorithm=[Diloco(), DataParallel()],
            outer_optimizer_cls=[torch.optim.SGD, torch.optim.Adam],
        )
    )[:4] == ["H=5, Diloco, SGD", "H=5, Diloco, Adam", "H=5, DataParallel, SGD", "H=5, DataParallel, Adam"]
    assert list(grid(outer_optimizer_kwargs=[None, {"lr": 0.7, "momentum": 0.5}], final_sync=[False])) == [
        "outer_optimizer_kwargs=default, final_sync=False",
        "lr=0.7 momentum=0.5, final_sync=False",
    ]
    assert grid("one", num_nodes=3) == {"one": {"num_nodes": 3}}
    for wrong, words in [
        ({"interval": [1]}, "`grid` was given 'interval', which DilocoStrategy doesn't have"),
        ({"num_nodes": []}, "the list of `num_nodes` is empty"),
        ({"num_nodes": 3}, "`grid` would make a run with the name ''"),
        ({"algorithm": [StreamingDiloco(2), StreamingDiloco(3)]}, "two runs with the name 'StreamingDiloco'"),
    ]:
        with pytest.raises(ValueError, match=words):
            grid(**wrong)
