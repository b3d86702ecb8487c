"""Do combinations hold that no paper writes down?"""

from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import pytest
import torch
from fits import Plain, fit
from helpers import assert_same, copy_of

from lightning_diloco import (
    FP4,
    DataParallel,
    Diloco,
    DropOut,
    ErrorFeedback,
    Participation,
    PostLocalSGD,
    Statistical,
    StreamingDiloco,
    SyncAlgorithm,
    Table,
)

LAYERS = [["net.0"], ["net.3"]]


class Save(L.Callback):
    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def assert_all_equal(strategy: Any, module: Any) -> None:
    for w in range(strategy.num_workers):
        assert_same(strategy.worker_state_dict(w), copy_of(module.state_dict()))


# ---------------------------------------------------------------------------------------- data parallelism


class NaNGradient(Plain):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        bad = self.trainer.strategy.current_worker == 0 and batch_idx == 3
        return loss * torch.nan if bad else loss


@pytest.mark.filterwarnings("ignore:`training_step` returned")
def test_a_gradient_that_is_not_finite_does_not_part_the_workers() -> None:
    with pytest.warns(
        UserWarning, match=r"^Worker 0 is left out of a mean at local step 4: its gradients are not finite"
    ):
        strategy, module, reports = fit(DataParallel(), NaNGradient(), nonfinite="skip")
    assert [r.participants for r in reports][3] == (1, 2)
    assert_all_equal(strategy, module)
    with pytest.raises(
        RuntimeError, match=r"^The gradients of worker 0 are not finite at local step 4 .* They hold NaN"
    ):
        fit(DataParallel(), NaNGradient())


def test_data_parallelism_cannot_resume_with_more_workers(tmp_path: Path) -> None:
    path = tmp_path / "3.ckpt"
    fit(DataParallel(), callbacks=[Save(3, path)])
    with pytest.raises(
        ValueError, match=r"^`num_nodes` \(=4\) differs from the 3 workers of the checkpoint, and DataP"
    ):
        fit(DataParallel(), ckpt=path, num_nodes=4)


def test_a_single_worker_codes_its_gradients_too_and_sends_them_to_nobody() -> None:
    dense, plain, _ = fit(DataParallel(), num_nodes=1)
    packed, coarse, _ = fit(DataParallel(), num_nodes=1, codec=Statistical(1))
    assert any(not torch.equal(a, b) for a, b in zip(plain.parameters(), coarse.parameters(), strict=True))
    assert dense.ledger.total_bytes == packed.ledger.total_bytes == 0
    _, same, _ = fit(num_nodes=1, outer_optimizer_kwargs={"lr": 1.0})
    assert_same(copy_of(plain.state_dict()), copy_of(same.state_dict()))


def test_options_without_effect_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^`inner_state` \(='reset'\) has no effect with DataParallel"):
        fit(DataParallel(), inner_state="reset")
    with pytest.raises(
        ValueError, match=r"^StreamingDiloco: `fragments` \(=2\) must be at most `diloco_interval` \(=1\)"
    ):
        fit(StreamingDiloco(2, delay=0), diloco_interval=1)


# ---------------------------------------------------------------------------------------- several sends in a step


class InTwoParts(Diloco):
    def after_inner_step(self, step):
        ctx = self.ctx
        if ctx.due(step):
            for part in (ctx.names[:2], ctx.names[2:]):
                ctx.send(part, ctx.delta)
        for transfer in ctx.arrived():
            ctx.outer.step(transfer.names, transfer.mean)
            ctx.merge(transfer.workers, transfer.names, ctx.outer.tensors)


def test_two_sends_of_a_step_under_one_tag_are_both_flushed() -> None:
    """In any round, and in the last: together they are Diloco."""
    parts, module, reports = fit(InTwoParts(), steps=5)
    whole, other, _ = fit(steps=5)
    assert_same(copy_of(module.state_dict()), copy_of(other.state_dict()))
    assert [(r.step, r.names) for r in reports] == [(3, 2), (3, 2), (5, 2), (5, 2)]
    assert parts.ledger.total_bytes == whole.ledger.total_bytes


def test_sends_without_a_tag_draw_apart() -> None:
    _, _, reports = fit(InTwoParts(), steps=30, participation=DropOut(0.5), num_nodes=4)
    drawn: dict[int, list[Any]] = {}
    for report in reports:
        drawn.setdefault(report.step, []).append(report.participants)
    assert any(pair[0] != pair[1] for pair in drawn.values() if len(pair) == 2)


@pytest.mark.parametrize("lr", [1.0, 0.999])
def test_pseudo_gradients_that_are_applied_one_after_the_other_add_up(lr: float) -> None:
    """θ − lr·Δ_0 − lr·Δ_1, also where the first alone would have been assigned."""
    found: list[float] = []

    class OneByOne(Diloco):
        def after_inner_step(self, step):
            ctx = self.ctx
            if step == 3:
                delta = [{n: t.clone() for n, t in ctx.delta(w).items()} for w in range(2)]
                theta = {n: ctx.outer.tensors[n].clone() for n in ctx.names}
                for w in range(2):
                    ctx.send(ctx.names, ctx.delta, workers=[w], tag=str(w))
                for transfer in ctx.arrived():
                    ctx.outer.step(transfer.names, transfer.mean)
                for n in ctx.names:
                    expected = theta[n] - lr * delta[0][n] - lr * delta[1][n]
                    found.append((ctx.outer.tensors[n] - expected).abs().max().item())

    fit(OneByOne(), num_nodes=2, steps=3, outer_optimizer_kwargs={"lr": lr}, final_sync=False)
    assert max(found) < 1e-12


def test_the_same_can_be_sent_twice_in_a_step() -> None:
    class Twice(Diloco):
        def after_inner_step(self, step):
            ctx = self.ctx
            if step == 3:
                for _ in range(2):
                    ctx.send(ctx.names, ctx.delta)
            assert len(ctx.arrived()) == (2 if step == 3 else 0)
            assert ctx.waiting == []

    _, _, reports = fit(Twice(), steps=4, final_sync=False)
    assert [r.step for r in reports] == [3, 3]


def test_nobody_is_nobody() -> None:
    class Nobody(Diloco):
        def after_inner_step(self, step):
            transfer = self.ctx.send(self.ctx.names, self.ctx.delta, workers=[])
            assert (transfer.workers, transfer.means, self.ctx.waiting) == ([], [], [])

    strategy, _, reports = fit(Nobody(), final_sync=False)
    assert (strategy.ledger.total_bytes, reports) == (0, [])


def test_an_algorithm_that_asks_before_it_sends_loses_nothing_in_a_flush() -> None:
    class AsksFirst(Diloco):
        def after_inner_step(self, step):
            ctx = self.ctx
            for transfer in ctx.arrived():
                ctx.outer.step(transfer.names, transfer.mean)
                ctx.merge(transfer.workers, transfer.names, ctx.outer.tensors)
            if ctx.due(step):
                ctx.send(ctx.names, ctx.delta, delay=1)

    strategy, module, reports = fit(AsksFirst(), steps=5)
    assert [(r.sent_step, r.step, r.kind) for r in reports] == [(3, 4, "round"), (5, 5, "flush")]
    assert strategy._engine.context.waiting == []
    assert_all_equal(strategy, module)


def test_inner_states_are_averaged_once_per_parameter_and_step() -> None:
    class WithMoments(Diloco):
        def after_inner_step(self, step):
            ctx = self.ctx
            if ctx.due(step):
                ctx.send(ctx.names, ctx.delta)
                ctx.send(ctx.names, lambda w: ctx.inner_state(w, "exp_avg"), what="exp_avg", tag="moments")
            for transfer in ctx.arrived():
                if transfer.what != "exp_avg":
                    ctx.outer.step(transfer.names, transfer.mean)
                    ctx.merge(transfer.workers, transfer.names, ctx.outer.tensors)

    strategy, module, _ = fit(WithMoments(), inner_state="average", steps=3)
    size = 8 * sum(p.numel() for p in module.parameters())
    found = [(e.what, e.payload_bytes) for e in strategy.ledger.entries]
    assert [what for what, _ in found].count("inner_state") == 1
    assert ("exp_avg", size) in found


# ---------------------------------------------------------------------------------------- not finite


class Spoilt(Plain):
    """A matrix of worker 1 is NaN at step 3."""

    def training_step(self, batch, batch_idx):
        if self.trainer.strategy.current_worker == 1 and batch_idx == 2:
            self.net[0].weight.data.fill_(torch.nan)
        return super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:Worker 1 is left out")
@pytest.mark.parametrize("delay", [0, 1])
def test_a_worker_recovers_whatever_the_fragments(delay: int) -> None:
    """Had only the fragment been put right, the worker's other one would have spoilt it again."""
    algorithm = StreamingDiloco(2, delay=delay, alpha=0.5, pattern=LAYERS)
    _, _, reports = fit(algorithm, Spoilt(), nonfinite="skip", steps=8)
    assert [r.participants for r in reports if 1 not in r.participants] == [(0, 2)] * (1 + delay)


@pytest.mark.filterwarnings("ignore:Worker 3 is left out")
def test_a_worker_that_is_left_out_takes_its_own_groups_mean() -> None:
    class Pairs(SyncAlgorithm):
        published = "average"

        def after_inner_step(self, step):
            ctx = self.ctx
            if step == 3:
                for tensor in ctx.replicas.tensors(3).values():
                    tensor.fill_(torch.nan)
                ctx.send(ctx.names, ctx.weights, groups=[[0, 1], [2, 3]], what="weights")
            for transfer in ctx.arrived():
                for w in transfer.workers:
                    ctx.merge([w], transfer.names, transfer.mean_of(w))

    strategy, _, _ = fit(Pairs(), num_nodes=4, nonfinite="skip", steps=3, final_sync=False)
    workers = [strategy.worker_state_dict(w) for w in range(4)]
    assert_same(workers[0], workers[1])
    assert_same(workers[2], workers[3])
    assert not torch.equal(workers[0]["net.0.weight"], workers[2]["net.0.weight"])


def test_four_bits_do_not_hide_what_is_not_finite() -> None:
    for bad in (torch.nan, torch.inf, -torch.inf):
        for codec in (FP4(), ErrorFeedback(FP4())):
            x = torch.tensor([1.0, bad, 2.0])
            assert codec.decode(codec.encode(x, {}, torch.Generator()), x).isnan().all()


# ---------------------------------------------------------------------------------------- freezing, rounds, settings


class Unfreezes(L.Callback):
    """The first layer is frozen at first, and again at the end."""

    def on_fit_start(self, trainer, pl_module):
        pl_module.net[0].requires_grad_(False)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        pl_module.net[0].requires_grad_(4 <= trainer.global_step < 9)


@pytest.mark.parametrize("pattern", ["strided", LAYERS])
def test_fragments_stay_the_same_when_parameters_are_frozen_and_thaw(pattern: Any) -> None:
    strategy, _, reports = fit(
        StreamingDiloco(2, delay=0, pattern=pattern), callbacks=[Unfreezes()], steps=14, codec=ErrorFeedback(FP4())
    )
    assert {r.tag for r in reports if r.step <= 4} == {"fragment 1"}
    assert [r.step for r in reports if r.tag == "fragment 1"] == [4, 7, 10, 13, 14]
    assert [r.step for r in reports if r.tag == "fragment 0"] == [6, 9]
    keys = strategy._engine.context.memory.codecs
    assert all((n.startswith("net.0")) == stream.endswith("fragment 0") for _, stream, n in keys)


def test_another_h_counts_from_the_last_synchronisation(tmp_path: Path) -> None:
    """Switch at 1, H = 3: synchronisations at 4 and 7. Resumed from 5 with H = 2: at 6, 8, …"""
    path = tmp_path / "5.ckpt"
    fit(PostLocalSGD(1), steps=7, callbacks=[Save(5, path)])
    _, _, reports = fit(PostLocalSGD(1), steps=9, diloco_interval=2, ckpt=path)
    assert [r.step for r in reports] == [6, 8, 9]


def test_the_number_of_workers_changes_where_all_agree(tmp_path: Path) -> None:
    """After the switch rounds end at 4 and 7, where H alone would not."""
    for step in (4, 5):
        fit(PostLocalSGD(1), steps=7, callbacks=[Save(step, tmp_path / f"{step}.ckpt")])
    with pytest.warns(UserWarning, match="^Resuming 3 workers as 2"):
        fit(PostLocalSGD(1), steps=7, ckpt=tmp_path / "4.ckpt", num_nodes=2)
    with pytest.raises(
        ValueError, match=r"differs from the 3 workers .*, which was saved (with transfers|\d local steps)"
    ):
        fit(PostLocalSGD(1), steps=7, ckpt=tmp_path / "5.ckpt", num_nodes=2)


def test_settings_that_mean_the_same_are_equal() -> None:
    assert repr(ErrorFeedback(FP4(), 1)) == repr(ErrorFeedback(FP4(), 1.0))
    assert repr(DropOut(1)) == repr(DropOut(1.0))
    assert repr(Table({2: [1, 0], 1: ()})) == repr(Table({1: [], 2: [0, 1]}))


def test_weights_and_workers_that_take_no_part() -> None:
    class Weighted(Diloco):
        weights: ClassVar[dict[int, float]] = {0: 1.0, 1: 0.0, 2: 2.0}

        def after_inner_step(self, step):
            ctx = self.ctx
            if ctx.due(step):
                ctx.send(ctx.names, ctx.delta, weights=self.weights)
            for transfer in ctx.arrived():
                ctx.outer.step(transfer.names, transfer.mean)
                ctx.merge(transfer.workers, transfer.names, ctx.outer.tensors)

    class Lacks(Weighted):
        weights: ClassVar[dict[int, float]] = {0: 1.0, 2: 2.0}

    _, _, reports = fit(Weighted(), participation=Table({3: [1], 6: [1, 2]}))
    assert [(r.step, r.participants) for r in reports] == [(6, (1, 2))]
    with pytest.raises(ValueError, match=r"^`weights` \(=\{0: 1.0, 2: 2.0\}\) lacks worker 1\."):
        fit(Lacks())


def test_a_participation_that_answers_nothing_is_named() -> None:
    class Silent(Participation):
        def __repr__(self) -> str:
            return "Silent()"

        def __call__(self, step, workers, generator):
            return None

    with pytest.raises(ValueError, match=r"^Silent\(\) chose None, which must be different workers out of \[0, 1, 2\]"):
        fit(participation=Silent())
