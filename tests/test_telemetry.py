"""Are all numbers of an outer step right, in every layout, and does measuring them change nothing?"""

import weakref
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import numpy as np
import pytest
import telemetry
import torch
from helpers import Net, assert_same, loader, regression_data, slow_but, trainer
from processes import run
from telemetry import expected, joined, train

from lightning_diloco import (
    Cast,
    DilocoCallback,
    DilocoStrategy,
    DropOut,
    OuterStepReport,
    StreamingDiloco,
    SyncAlgorithm,
)
from lightning_diloco.algorithms.layers import layer_groups
from lightning_diloco.reporting.metrics import SCALARS
from lightning_diloco.state.outer import Outer

UNKNOWN = {"diloco/outer_seconds", "diloco/inner_seconds", "diloco/waiting_seconds", "diloco/comm_bytes"}


class Weighted(SyncAlgorithm):
    """A mean with weights."""

    WEIGHTS: ClassVar = {0: 1.0, 1: 2.0, 2: 0.5, 3: 4.0}

    def after_inner_step(self, step):
        ctx = self.ctx
        if ctx.due(step):
            ctx.send(ctx.names, ctx.delta, weights=self.WEIGHTS)
        for transfer in ctx.arrived():
            ctx.outer.step(transfer.names, transfer.mean)
            ctx.merge(transfer.workers, transfer.names, ctx.outer.tensors)


SIZES = {0: 10, 1: 40, 2: 16, 3: 30}  # of the workers' shards of 96 samples


def uneven(dataset: Any, workers: int) -> list[range]:
    ends = np.cumsum([SIZES[w] for w in range(workers)]).tolist()
    return [range(end - SIZES[w], end) for w, end in enumerate(ends)]


def bfloat16(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.bfloat16).double()


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "Nesterov": (lambda: {}, {}),
    "plain average": (lambda: {"outer_optimizer_kwargs": {"lr": 1.0}}, {}),
    "AdamW": (lambda: {"outer_optimizer_cls": torch.optim.AdamW, "outer_optimizer_kwargs": {"lr": 0.1}}, {}),
    "codec": (lambda: {"codec": Cast("bf16")}, {"decode": bfloat16}),
    "drop-out": (lambda: {"participation": DropOut(0.5)}, {}),
    "weights": (lambda: {"algorithm": Weighted()}, {"weights": Weighted.WEIGHTS}),
    "samples": (lambda: {"weights": "samples", "partition": uneven}, {"weights": SIZES}),
    "streaming": (lambda: {"algorithm": StreamingDiloco(2, delay=1), "final_sync": False}, {}),
    "streaming, half": (lambda: {"algorithm": StreamingDiloco(3, 0, alpha=0.5), "final_sync": False}, {}),
    "one worker": (lambda: {"num_nodes": 1}, {}),
}


def check(run_of: dict[str, Any], options: dict[str, Any], **more: Any) -> None:
    rows = [row for _, row in run_of["rows"] if "diloco/outer_step" in row]
    wanted = expected(run_of, **options, **more)
    assert len(rows) == len(wanted) > 1
    for row, want, arrival in zip(rows, wanted, run_of["arrived"], strict=True):
        matrix, report = want.pop("matrix"), arrival["report"]
        assert row.keys() - UNKNOWN == want.keys()
        for tag, value in want.items():
            assert row[tag] == pytest.approx(value, rel=1e-12, abs=1e-12), tag
        assert row["diloco/comm_bytes"] == arrival["bytes"]
        assert row["diloco/outer_seconds"] == report.seconds > 0
        assert row["diloco/inner_seconds"] == report.inner_seconds
        assert row["diloco/waiting_seconds"] == report.waiting_seconds
        if more.get("pairs", True):
            assert np.allclose(report.cosine_matrix, matrix, rtol=0, atol=1e-12)
            assert not report.cosine_weighted
        else:
            assert (report.cosine_matrix, report.cosine_weighted) == (None, True)
    found, spent = [arrival["report"] for arrival in run_of["arrived"]], run_of["times"]
    assert 0 < found[0].inner_seconds <= sum(r.inner_seconds for r in found) <= spent.inner
    waiting = sum(r.waiting_seconds for r in found)
    assert 0 < waiting <= spent.waiting if run_of["processes"] > 1 else waiting == spent.waiting == 0


@pytest.mark.parametrize("case", CASES)
def test_every_number_is_that_of_the_workers_weights(case: str, tmp_path: Path) -> None:
    make, options = CASES[case]
    check(train(tmp_path, make=make), options)


@pytest.mark.processes
@pytest.mark.parametrize("case", slow_but(["codec", "streaming"], ["Nesterov", *list(CASES)[1:-1]]))
def test_every_number_is_the_same_over_two_processes(case: str, tmp_path: Path) -> None:
    make, options = CASES[case]
    out = tmp_path / "results"
    check(joined(run(lambda: train(tmp_path, 2, make), 2, out=out)), options)


@pytest.mark.processes
@pytest.mark.parametrize(
    "case", slow_but(["samples"], ["Nesterov", "plain average", "weights", "samples", "drop-out", "streaming"])
)
def test_an_all_reduce_leaves_the_numbers_of_single_workers_and_a_weighted_cosine(case: str, tmp_path: Path) -> None:
    make, options = CASES[case]
    settings = lambda: {**make(), "reduction": "all_reduce"}  # noqa: E731
    check(joined(run(lambda: train(tmp_path, 2, settings), 2, out=tmp_path / "results")), options, pairs=False)


@pytest.mark.processes
@pytest.mark.parametrize("reduction", ["ordered", "all_reduce"])
def test_the_members_of_a_team_are_one_worker(reduction: str, tmp_path: Path) -> None:
    """Two workers of two processes each: losses and samples are those of all members."""
    make = lambda: {"num_nodes": 2, "reduction": reduction}  # noqa: E731
    whole = joined(run(lambda: train(tmp_path, 4, make), 4, out=tmp_path / "results"))
    check(whole, {}, pairs=reduction == "ordered")
    assert [a["report"].samples for a in whole["arrived"]] == [4 * 4 * t for t in (3, 6, 8)]


def test_equal_norms_make_the_weighted_cosine_the_plain_mean() -> None:
    from lightning_diloco.comm.likeness import of_products, of_scalars

    rows = torch.randn(5, 30, dtype=torch.float64)
    rows /= rows.norm(dim=1, keepdim=True)
    mean = rows.mean(0)
    plain = of_products(float(mean @ mean), rows @ rows.T, [1.0] * 5)
    scalars = [(float(row @ row), float(row @ mean)) for row in rows]
    weighted = of_scalars(float(mean @ mean), scalars, [1.0] * 5)
    assert weighted.cosine == pytest.approx(plain.cosine, abs=1e-12)
    assert weighted.norms == pytest.approx(plain.norms, abs=1e-12)
    assert weighted.with_mean == pytest.approx(plain.with_mean, abs=1e-12)
    assert weighted.norm_ratio == pytest.approx(plain.norm_ratio, abs=1e-12)
    zeros = of_scalars(0.0, [(0.0, 0.0)] * 2, [1.0, 1.0])
    assert (zeros.cosine, zeros.with_mean, zeros.norm_ratio) == (0.0, (0.0, 0.0), None)


SWITCHES = ("workers", "layers", "images", "layout", "hyperparameters", "axes")


def test_what_is_reported_changes_no_bit(tmp_path: Path) -> None:
    """All reports on, with a callback that reads every Δ_i; all off; and no measurements at all."""
    on = train(tmp_path / "on")
    off = train(tmp_path / "off", make=lambda: {"switches": dict.fromkeys(SWITCHES, False)})
    bare = train(tmp_path / "bare", make=lambda: {"diagnostics": False})
    assert_same(on["weights"], off["weights"])
    assert_same(on["weights"], bare["weights"])
    logged = {tag for _, row in off["rows"] for tag in row if tag.startswith("diloco")}
    assert logged == set(SCALARS)
    assert {tag for _, row in bare["rows"] for tag in row if tag.startswith("diloco")} == {
        "diloco/outer_step", "diloco/comm_bytes", "diloco/outer_seconds", "diloco/inner_seconds",
        "diloco/waiting_seconds",
    }  # fmt: skip


@pytest.mark.parametrize("switch", ["workers", "layers"])
def test_a_switch_turns_off_its_part_and_nothing_else(switch: str, tmp_path: Path) -> None:
    every = {tag for _, row in train(tmp_path / "on")["rows"] for tag in row}
    less = {tag for _, row in train(tmp_path, make=lambda: {"switches": {switch: False}})["rows"] for tag in row}
    assert every - less == {tag for tag in every if tag.startswith(f"diloco_{switch}/")} != set()
    assert not less - every


def test_every_scalar_can_be_monitored(tmp_path: Path) -> None:
    callback = DilocoCallback(callback_metrics=SCALARS)
    strategy = DilocoStrategy(num_nodes=2, diloco_interval=2)
    t = trainer(strategy, callbacks=[callback], max_steps=4, max_epochs=-1)
    t.fit(Net(), loader())
    assert set(SCALARS) <= t.callback_metrics.keys()
    assert t.callback_metrics["diloco/outer_step"] == 2
    assert t.callback_metrics["diloco/comm_bytes"] == strategy.ledger.total_bytes
    assert t.callback_metrics["diloco/samples"] == 2 * 4 * 4


# ---------------------------------------------------------------------------------------- samples and losses


class Reports(DilocoCallback):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[OuterStepReport] = []

    def on_outer_step(self, trainer, pl_module, report):
        self.found.append(report)


def reports(module: Any, data: Any = None, strategy: Any = None, **kwargs: Any) -> list[OuterStepReport]:
    callback = Reports()
    t = trainer(
        strategy or DilocoStrategy(num_nodes=2, diloco_interval=2),
        callbacks=[callback],
        **{"max_steps": 4, "max_epochs": -1, **kwargs},
    )
    t.fit(module, data or loader(), ckpt_path=kwargs.pop("ckpt_path", None))
    return callback.found


def test_losses_under_accumulation_are_those_of_the_batches() -> None:
    """Lightning divides the loss by the number of batches; a report doesn't."""
    losses: list[float] = []

    class Constant(Net):
        def training_step(self, batch, batch_idx):
            losses.append(float(len(losses)))
            return self.loss(batch) * 0 + losses[-1]

    first, second = reports(Constant(), accumulate_grad_batches=3, max_steps=4)
    assert len(losses) == 24
    for report, part in ((first, losses[:12]), (second, losses[12:])):
        assert report.train_losses == pytest.approx((np.mean(part[0::2]), np.mean(part[1::2])), rel=1e-6)
    assert (first.samples, second.samples) == (48, 96)


def test_batches_of_any_shape_and_steps_without_a_loss() -> None:
    class Odd(Net):
        def training_step(self, batch, batch_idx):
            if self.trainer.strategy.current_worker == 1:
                return None
            return super().training_step((batch["x"]["y"], batch["z"]), batch_idx)

    rows = [{"x": {"y": x}, "z": y} for x, y in regression_data(40)]
    (report,) = reports(Odd(batch_norm=False), loader(rows, 5), max_steps=2)
    assert report.samples == 20
    assert report.train_losses[0] is not None
    assert report.train_losses[1] is None

    class Opaque(Net):
        def training_step(self, batch, batch_idx):
            return self.loss(next(iter(loader(regression_data(8)))))

    (report,) = reports(Opaque(), loader(list("abcdefghijklmnop"), 2), max_steps=2)
    assert report.samples is None
    assert None not in report.train_losses


def test_a_resumed_run_counts_samples_on(tmp_path: Path) -> None:
    whole = reports(Net(), max_steps=6)

    def resume(steps: int, path: Any) -> list[OuterStepReport]:
        callback = Reports()
        strategy = DilocoStrategy(num_nodes=2, diloco_interval=2)
        t = trainer(strategy, callbacks=[callback], max_steps=steps, max_epochs=-1)
        t.fit(Net(), loader(), ckpt_path=path)
        t.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return callback.found

    resume(4, None)
    assert [r.samples for r in whole] == [16, 32, 48]
    (last,) = resume(6, tmp_path / "4.ckpt")
    assert last.samples == 48
    ledger = torch.load(tmp_path / "6.ckpt", weights_only=True)["diloco"]["ledger"]
    assert set(ledger["participants"].tolist()) == {2}


def test_a_fit_starts_counting_afresh() -> None:
    strategy = DilocoStrategy(num_nodes=2, diloco_interval=2)
    for _ in range(2):
        assert [r.samples for r in reports(Net(), strategy=strategy, max_steps=4)] == [16, 32]


# ---------------------------------------------------------------------------------------- before an outer step


def test_what_can_be_read_before_an_outer_step_can_not_be_read_afterwards() -> None:
    kept: list[Any] = []

    class Keeps(DilocoCallback):
        def on_before_outer_step(self, trainer, pl_module, deltas):
            assert deltas.local_workers == deltas.workers == (0, 1)
            kept.append(deltas)
            kept.append(deltas.delta(1))
            with pytest.raises(ValueError, match=r"^Worker 2 takes no part in this transfer; \[0, 1\] do\.$"):
                deltas.delta(2)
            with pytest.raises(KeyError):
                deltas.delta(0)["typo"]
            deltas.delta(0)["net.0.bias"].fill_(torch.nan)  # a tensor of the reader's

    strategy = DilocoStrategy(num_nodes=2, diloco_interval=2)
    trainer(strategy, callbacks=[Keeps()], max_steps=2, max_epochs=-1).fit(Net(), loader())
    deltas, of_worker = kept
    assert len(of_worker) == len(deltas.names) == 6
    for read in (lambda: of_worker["net.0.bias"], lambda: deltas.delta(0)["net.0.bias"]):
        with pytest.raises(RuntimeError) as caught:
            read()
        assert str(caught.value) == (
            "The Δ_i of local step 2 can be read inside `on_before_outer_step` only: by now the workers have moved on."
            " Copy there what you need later."
        )


@pytest.mark.processes
def test_another_processs_workers_are_named(tmp_path: Path) -> None:
    def fit() -> tuple[Any, str]:
        seen: list[Any] = []

        class Look(DilocoCallback):
            def on_before_outer_step(self, trainer, pl_module, deltas):
                other = next(w for w in deltas.workers if w not in deltas.local_workers)
                with pytest.raises(ValueError, match="hosted by process") as caught:
                    deltas.delta(other)
                seen.append((deltas.workers, deltas.local_workers, str(caught.value)))

        strategy = DilocoStrategy(num_nodes=2, diloco_interval=2)
        trainer(strategy, devices=2, callbacks=[Look()], max_steps=2, max_epochs=-1).fit(telemetry.Noting(), loader())
        return seen[0]

    first, second = run(fit, 2, out=tmp_path)
    assert (first[:2], second[:2]) == (((0, 1), (0,)), ((0, 1), (1,)))
    assert first[2] == (
        "Worker 1 is hosted by process 1; this is process 0. Read the workers in `deltas.local_workers`; the hook is"
        " called on every process."
    )


def test_gradients_and_absent_workers_are_no_occasion_for_a_look() -> None:
    from lightning_diloco import DataParallel

    class Look(DilocoCallback):
        def on_before_outer_step(self, trainer, pl_module, deltas):
            raise AssertionError("called")

    for settings in ({"algorithm": DataParallel()}, {"participation": DropOut(1.0)}):
        strategy = DilocoStrategy(num_nodes=2, diloco_interval=2, **settings)
        with pytest.warns(UserWarning, match="Did nobody take part") if "participation" in settings else nullcontext():
            trainer(strategy, callbacks=[Look()], max_steps=2, max_epochs=-1).fit(Net(), loader())
        assert strategy.local_steps == 2


def test_only_one_workers_tensor_is_made_at_a_time() -> None:
    """Δ_i is computed when it is read: looking at nothing computes nothing."""
    from lightning_diloco.comm.means import Differences

    made: list[str] = []
    original = Differences.__getitem__

    class Look(DilocoCallback):
        def on_before_outer_step(self, trainer, pl_module, deltas):
            made.clear()
            mapping = deltas.delta(1)
            assert made == []
            mapping["net.0.bias"]
            assert made == ["net.0.bias"]

    def noting(self: Any, name: str) -> Any:
        made.append(name)
        return original(self, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Differences, "__getitem__", noting)
        strategy = DilocoStrategy(num_nodes=2, diloco_interval=2)
        trainer(strategy, callbacks=[Look()], max_steps=2, max_epochs=-1).fit(Net(), loader())


@pytest.mark.parametrize("diagnostics", [True, False])
def test_the_pseudo_gradient_is_gone_after_its_step(diagnostics: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model's worth of memory, which the workers' next turns can use."""
    seen: list[weakref.ref[torch.Tensor]] = []
    step = Outer.step

    def noted(self: Outer, names: Any, delta: Any) -> None:
        seen.extend(weakref.ref(tensor) for tensor in delta.values())
        step(self, names, delta)

    class Looks(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            alive.append(sum(ref() is not None for ref in seen))

    alive: list[int] = []
    monkeypatch.setattr(Outer, "step", noted)
    strategy = DilocoStrategy(num_nodes=2, diloco_interval=2, diagnostics=diagnostics)
    trainer(strategy, max_steps=6, callbacks=[Looks()]).fit(Net(), loader())
    assert len(seen) == 3 * len(list(Net().parameters()))
    assert alive == [0] * 6


# ---------------------------------------------------------------------------------------- layers


def test_layers_of_a_large_model_are_joined_in_runs() -> None:
    names = ["embedding.weight", *(f"blocks.{i}.{part}" for i in range(30) for part in ("a.weight", "b.bias")), "scale"]
    groups = layer_groups(names)
    assert groups.keys() == set(names)
    assert len(set(groups.values())) == 20
    assert groups["embedding.weight"] == groups["blocks.0.a.weight"] == "embedding-blocks.0"
    assert groups["blocks.1.a.weight"] == groups["blocks.2.b.bias"] == "blocks.1-2"
    assert list(dict.fromkeys(groups.values())) == sorted(set(groups.values()), key=list(groups.values()).index)
    assert layer_groups(["a.weight", "a.bias", "b.0.x", "b.1.x"], most=3) == {
        "a.weight": "a", "a.bias": "a", "b.0.x": "b.0", "b.1.x": "b.1",
    }  # fmt: skip


def test_the_oracle_knows_the_layers_of_the_module() -> None:
    names = [n for n, _ in Net().named_parameters()]
    assert layer_groups(names) == {n: layer for layer, of_layer in telemetry.LAYERS.items() for n in of_layer}
