"""Does what stands around an algorithm hold for every algorithm: reports, files, flush, policies, outside changes?"""

import warnings
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import pytest
import torch
from fits import Plain, fit
from helpers import Net, assert_same, copy_of
from lightning.pytorch.loggers import CSVLogger
from processes import outcomes, start

from lightning_diloco import (
    FP4,
    DataParallel,
    Diloco,
    DropOut,
    ErrorFeedback,
    Identity,
    PeriodicAveraging,
    StreamingDiloco,
    SyncAlgorithm,
    Table,
)

# ---------------------------------------------------------------------------------------- θ and who sees it


class Quietly(SyncAlgorithm):
    """θ follows worker 0; nothing is ever sent."""

    def after_inner_step(self, step):
        self.ctx.outer.assign({n: self.ctx.weights(0)[n] for n in self.ctx.names})


def test_theta_that_moves_without_a_report_is_published() -> None:
    seen: list[Any] = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            assert_same(copy_of(pl_module.state_dict()), trainer.strategy.worker_state_dict(0))
            seen.append(copy_of(pl_module.state_dict()))

    strategy, module, reports = fit(Quietly(), callbacks=[Watch()])
    assert (reports, len(seen)) == ([], 6)
    assert_same(copy_of(module.state_dict()), strategy.worker_state_dict(0))


class Never(SyncAlgorithm):
    def after_inner_step(self, step):
        pass


def test_a_run_that_ends_with_the_model_it_started_from_says_so() -> None:
    with pytest.warns(UserWarning, match=r"The fit ends with the model that it began with: Never never moved θ"):
        fit(Never())
    with pytest.warns(UserWarning, match=r"Diloco never moved θ in 6 local steps\. Did nobody take part\?"):
        fit(participation=DropOut(1))
    with warnings.catch_warnings(record=True) as caught:
        fit()
        fit(diloco_interval=10, final_sync=False)  # as asked for
    assert not [w for w in caught if "never moved" in str(w.message)]


def test_a_published_mean_is_what_validation_files_and_the_fit_give(tmp_path: Path) -> None:
    class Apart(Never):
        published = "average"

    class Save(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == 4:
                trainer.save_checkpoint(tmp_path / "4.ckpt")
                workers = [trainer.strategy.worker_state_dict(w) for w in range(3)]
                means.append({k: v + (workers[1][k] - v + workers[2][k] - v) / 3 for k, v in workers[0].items()})

    means: list[Any] = []
    strategy, module, _ = fit(Apart(), callbacks=[Save()], eval_weights="outer")
    saved = torch.load(tmp_path / "4.ckpt", weights_only=True)["state_dict"]
    workers = [strategy.worker_state_dict(w) for w in range(3)]
    for key, value in module.state_dict().items():
        torch.testing.assert_close(value, sum(w[key] for w in workers) / 3, rtol=0, atol=1e-12)
        torch.testing.assert_close(saved[key], means[0][key], rtol=0, atol=1e-12)
        assert torch.equal(strategy.outer_state_dict()[key], value)


# ---------------------------------------------------------------------------------------- files


class Counting(Diloco):
    """Keeps a count in a memo, and each worker's last Δ in a slot."""

    def after_inner_step(self, step):
        ctx = self.ctx
        ctx.memo("steps").setdefault("count", torch.zeros((), dtype=torch.int64)).add_(1)
        for w in ctx.local_workers:
            for name, slot in ctx.slot(w, "last").items():
                slot.copy_(ctx.delta(w)[name])
        super().after_inner_step(step)


class SaveAt(L.Callback):
    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
@pytest.mark.parametrize("lr", [1.0, 0.7])
def test_a_single_worker_with_another_algorithm_keeps_its_state_in_files(lr: float, tmp_path: Path) -> None:
    """With lr 1 the outer step is a plain average: of plain Diloco that would be the plain run."""
    settings = {"num_nodes": 1, "outer_optimizer_kwargs": {"lr": lr}, "samples": 16}  # an epoch has four batches
    path = tmp_path / "4.ckpt"
    whole, module, _ = fit(Counting(), callbacks=[SaveAt(4, path)], **settings)
    assert torch.load(path, weights_only=True)["diloco"]["memos"]["steps"]["count"] == 4
    resumed, again, _ = fit(Counting(), ckpt=path, **settings)
    assert_same(copy_of(again.state_dict()), copy_of(module.state_dict()))
    memory, restored = whole._engine.context.memory, resumed._engine.context.memory
    assert restored.memos["steps"]["count"] == memory.memos["steps"]["count"] == 6
    assert_same(restored.slots[0, "last"], memory.slots[0, "last"])


def test_only_plain_diloco_is_the_plain_run(tmp_path: Path) -> None:
    plain: dict[str, Any] = {"num_nodes": 1, "outer_optimizer_kwargs": {"lr": 1.0}}
    runs = {
        "plain": plain,
        "codec": {**plain, "codec": Identity()},
        "participation": {**plain, "participation": Table({1: [0]})},
        "another": {"num_nodes": 1, "algorithm": PeriodicAveraging()},
        "subclass": {**plain, "algorithm": Counting()},
    }
    for name, settings in runs.items():
        fit(callbacks=[SaveAt(4, tmp_path / name)], **settings)
    states = {name: torch.load(tmp_path / name, weights_only=True) for name in runs}
    assert {name for name, state in states.items() if "diloco" not in state} == {"plain"}


# ---------------------------------------------------------------------------------------- flush


def test_a_round_that_ends_at_the_last_step_does_not_keep_the_rest_from_being_sent() -> None:
    """Fragment 0 is sent at 3 and 6, fragment 1 at 4: the flush after step 6 sends fragment 1 only."""
    algorithm = StreamingDiloco(2, delay=0, pattern=[["net.0"], ["net.3"]])
    strategy, module, reports = fit(algorithm)
    assert [(r.tag, r.sent_step, r.kind) for r in reports] == [
        ("fragment 0", 3, "round"),
        ("fragment 1", 4, "round"),
        ("fragment 0", 6, "round"),
        ("fragment 1", 6, "flush"),
    ]
    for w in range(3):
        assert_same(strategy.worker_state_dict(w), copy_of(module.state_dict()))


def test_a_flush_takes_in_what_is_under_way_and_sends_nothing_twice() -> None:
    strategy, _, reports = fit(StreamingDiloco(1, delay=2))
    assert [(r.sent_step, r.step, r.kind) for r in reports] == [(3, 5, "round"), (6, 6, "flush")]
    assert strategy._engine.context.waiting == []
    assert [r.sent_step for r in fit(steps=6)[2]] == [3, 6]


# ---------------------------------------------------------------------------------------- policies


def test_inner_state_of_a_fragment_only() -> None:
    """`inner_state="reset"`: with every fragment Adam forgets that fragment's moments, and no others."""
    steps: list[int] = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            state = trainer.strategy._engine.context.inner.workers[1].states[0]
            steps.append(sum(int(s["step"]) for s in state.values()))

    algorithm = StreamingDiloco(2, delay=0, pattern=[["net.0"], ["net.3"]])
    fit(algorithm, callbacks=[Watch()], inner_state="reset", final_sync=False)
    assert steps == [4, 8, 6, 2, 6, 4]  # 4 parameters, of which 2 start anew at 3, 4 and 6


def test_buffers_are_synchronised_once_per_round() -> None:
    algorithm = StreamingDiloco(2, delay=0, pattern=[["net.0"], ["net.1", "net.4"]])
    strategy, _, _ = fit(algorithm, Net(), steps=12, final_sync=False)
    entries = [(e.local_step, e.what) for e in strategy.ledger.entries]
    assert [at for at, what in entries if what == "buffers"] == [3, 6, 9, 12]
    assert [at for at, what in entries if what == "delta"] == [3, 4, 6, 7, 9, 10, 12]


def test_a_worker_that_takes_no_part_keeps_weights_buffers_and_inner_state() -> None:
    seen: list[Any] = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 3:
                strategy = trainer.strategy
                state = strategy._engine.context.inner.workers[2].states[0]
                seen.append((strategy.worker_state_dict(0), strategy.worker_state_dict(2), len(state)))

    fit(module=Net(), callbacks=[Watch()], participation=Table({3: [0, 1]}), inner_state="reset", steps=3)
    ((taken, left, states),) = seen
    assert states > 0
    for key in ("net.0.weight", "net.1.running_mean"):
        assert not torch.equal(taken[key], left[key])


# ---------------------------------------------------------------------------------------- not finite


class Breaks(Plain):
    """Worker 1's first layer becomes infinite at step 3."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.trainer.strategy.current_worker == 1 and self.trainer.strategy.local_steps == 2:
            self.net[0].weight.data[0, 0] = float("inf")

    def training_step(self, batch, batch_idx):
        if self.trainer.strategy.current_worker == 1 and batch_idx == 2:
            self.net[0].weight.data[0, 0] = float("nan")
        return super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:Worker 1 is left out")
@pytest.mark.parametrize("codec", [None, ErrorFeedback(FP4(), 0.9)], ids=["dense", "4 bits"])
@pytest.mark.parametrize("diagnostics", [True, False])
def test_a_worker_that_is_not_finite_is_left_out_before_anything_is_packed(codec: Any, diagnostics: bool) -> None:
    seen: list[Any] = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            memory = trainer.strategy._engine.context.memory
            seen.append({key for key, kept in memory.codecs.items() if kept})

    strategy, module, reports = fit(
        module=Breaks(), callbacks=[Watch()], nonfinite="skip", codec=codec, diagnostics=diagnostics
    )
    assert [r.participants for r in reports] == [(0, 2), (0, 1, 2)]
    assert {w for w, _, _ in seen[2]} == (set() if codec is None else {0, 2})
    assert all(torch.isfinite(t).all() for t in module.state_dict().values())
    for w in range(3):
        assert_same(strategy.worker_state_dict(w), copy_of(module.state_dict()))
    with pytest.raises(RuntimeError, match=r"^The pseudo-gradient of worker 1 is not finite at local step 3 \(1 of 3"):
        fit(module=Breaks(), codec=codec, diagnostics=diagnostics)


@pytest.mark.filterwarnings("ignore:Worker 1 is left out")
def test_only_the_fragment_that_is_not_finite_lacks_the_worker() -> None:
    class BreaksOnce(Breaks):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if self.trainer.strategy.current_worker == 1 and batch_idx == 2:  # only the first layer is spoilt
                self.net[3].weight.data.nan_to_num_()
            return loss

        def on_before_optimizer_step(self, optimizer):
            for p in self.net[3].parameters():
                p.grad = torch.nan_to_num(p.grad)

    algorithm = StreamingDiloco(2, delay=0, alpha=0.5, pattern=[["net.0"], ["net.3"]])
    strategy, _, reports = fit(algorithm, BreaksOnce(), steps=4, nonfinite="skip", final_sync=False)
    assert [(r.tag, r.participants) for r in reports] == [("fragment 0", (0, 2)), ("fragment 1", (0, 1, 2))]
    assert all(torch.isfinite(t).all() for t in strategy.worker_state_dict(1).values())


def test_complex_parameters_and_codecs_are_refused_by_name() -> None:
    class Complex(Plain):
        def __init__(self) -> None:
            super().__init__(lambda p: torch.optim.SGD(p, lr=0.1))
            self.phase = torch.nn.Parameter(torch.ones(2, dtype=torch.complex128))

        def loss(self, batch):
            return super().loss(batch) + self.phase.abs().sum() * 0.01

    fit(module=Complex())
    with pytest.raises(ValueError, match=r"^'phase' holds torch.complex128, which FP4\(\) can't pack"):
        fit(module=Complex(), codec=FP4())


# ---------------------------------------------------------------------------------------- bytes and reports


def test_comm_bytes_is_the_ledgers_total(tmp_path: Path) -> None:
    """Fragment 0 arrives in step 5, when fragment 1 has been sent: its bytes count, though no report has come."""
    logger = CSVLogger(tmp_path)
    algorithm = StreamingDiloco(2, delay=2, pattern=[["net.0"], ["net.3"]])
    strategy, _, reports = fit(algorithm, steps=5, final_sync=False, options={"logger": logger}, num_nodes=2)
    rows = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("diloco/comm_bytes")
    logged = [float(row.split(",")[column]) for row in rows[1:] if row.split(",")[column]]
    size = 8 * sum(p.numel() for p in Plain().parameters())
    assert (logged, strategy.ledger.total_bytes) == ([size], size)
    assert [(r.tag, r.payload_bytes < size) for r in reports] == [("fragment 0", True)]


def test_without_diagnostics_nothing_is_measured_and_nothing_else_changes() -> None:
    for codec in (None, FP4()):
        on, module, measured = fit(codec=codec)
        off, other, bare = fit(codec=codec, diagnostics=False)
        assert_same(copy_of(module.state_dict()), copy_of(other.state_dict()))
        assert on.ledger.total_bytes == off.ledger.total_bytes
        assert all(r.pseudo_gradient_norm and r.cosine and len(r.drift) == 3 for r in measured)
        assert [(r.pseudo_gradient_norm, r.cosine, r.drift) for r in bare] == [(None, None, ())] * 2


@pytest.mark.parametrize("codec", [None, Identity(), FP4()], ids=["dense", "identity", "4 bits"])
def test_norm_cosine_and_drift_of_every_arrival(codec: Any) -> None:
    """Recomputed from the workers' weights right before the outer step; cosine and norm are those of what arrives."""
    expected: list[Any] = []

    class Watch(Diloco):
        def after_inner_step(self, step):
            ctx, row = self.ctx, None
            if ctx.due(step):
                pack = (lambda x: x) if codec is None else (lambda x: codec.decode(codec.encode(x, {}, None), x))
                delta = [torch.cat([pack(d).flatten() for d in ctx.delta(w).values()]) for w in range(3)]
                true = [torch.cat([d.flatten() for d in ctx.delta(w).values()]) for w in range(3)]
                theta = torch.cat([ctx.outer.tensors[n].flatten() for n in ctx.names]).norm()
                cosines = [torch.cosine_similarity(delta[i], delta[j], 0) for i, j in ((0, 1), (0, 2), (1, 2))]
                norm = (sum(delta) / 3).norm()
                row = [norm, sum(cosines) / 3, *(t.norm() / theta for t in true)]
            super().after_inner_step(step)
            expected.extend([row] * len(ctx.taken))

    _, _, reports = fit(Watch(), codec=codec)
    found = [[r.pseudo_gradient_norm, r.cosine, *r.drift] for r in reports]
    torch.testing.assert_close(
        torch.tensor(found, dtype=torch.float64), torch.tensor(expected).double(), rtol=1e-10, atol=1e-12
    )


def test_data_parallelism_reports_every_step() -> None:
    strategy, module, reports = fit(DataParallel())
    size = 8 * sum(p.numel() for p in module.parameters())
    assert [(r.step, r.sent_step, r.tag, r.payload_bytes, r.drift) for r in reports] == [
        (t, t, "gradients", size, ()) for t in range(1, 7)
    ]
    assert [(e.local_step, e.what) for e in strategy.ledger.entries] == [(t, "gradients") for t in range(1, 7)]


def test_data_parallelism_with_workers_left_out_keeps_them_equal() -> None:
    """Whole numbers: gradients are worker + 1; all; 0 and 2; nobody; worker 1 alone. lr 1, θ from 0."""

    class Whole(Plain):
        def __init__(self) -> None:
            super().__init__(lambda p: torch.optim.SGD(p, lr=1.0))
            self.net = torch.nn.Linear(1, 1, bias=False)
            self.net.weight.data.zero_()

        def training_step(self, batch, batch_idx):
            return (self.trainer.strategy.current_worker + 1) * self.net.weight.sum()

    seen: list[Any] = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            workers = [trainer.strategy.worker_state_dict(w)["net.weight"].item() for w in range(3)]
            seen.append([pl_module.net.weight.item(), *workers])

    table = Table({2: [0, 2], 3: [], 4: [1]})
    _, _, reports = fit(DataParallel(), Whole(), steps=4, callbacks=[Watch()], participation=table)
    assert seen == [[-2.0] * 4, [-4.0] * 4, [-4.0] * 4, [-6.0] * 4]
    assert [r.participants for r in reports] == [(0, 1, 2), (0, 2), (1,)]


# ---------------------------------------------------------------------------------------- outside changes


def test_weights_written_from_outside_rebase_anchors_memory_and_transfers() -> None:
    """A callback writes zeros into the first layer while its Δ is under way, and errors are remembered."""
    seen: dict[str, Any] = {}

    class Own(StreamingDiloco):
        anchors = "own"

        def after_inner_step(self, step):
            super().after_inner_step(step)
            for w in self.ctx.local_workers:
                for slot in self.ctx.slot(w, "mine").values():
                    slot.fill_(1.0)

    class Write(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == 4:
                with torch.no_grad():
                    pl_module.net[0].weight.zero_()

    class Ask(Plain):
        def training_step(self, batch, batch_idx):
            if batch_idx == 4 and self.trainer.strategy.current_worker == 0:
                ctx = self.trainer.strategy._engine.context
                name, other = "net.0.weight", "net.0.bias"
                transfer = ctx.waiting[0]
                seen["mean"] = [transfer.mean[n].abs().sum().item() for n in (name, other)]
                seen["anchors"] = [[ctx.anchor(w)[n].abs().sum().item() for w in range(3)] for n in (name, other)]
                seen["slots"] = [[ctx.slot(w, "mine")[n].abs().sum().item() for w in range(3)] for n in (name, other)]
                seen["errors"] = {(w, n) for w, _, n in ctx.memory.codecs}
            return super().training_step(batch, batch_idx)

    fit(Own(1, delay=2), Ask(), callbacks=[Write()], codec=ErrorFeedback(FP4()), steps=5)
    assert seen["mean"][0] == 0 < seen["mean"][1]
    assert seen["anchors"][0] == [0, 0, 0]
    assert all(x > 0 for x in seen["anchors"][1])
    assert seen["slots"] == [[0, 0, 0], [8, 8, 8]]
    assert {n for _, n in seen["errors"]} == {"net.0.bias", "net.3.weight", "net.3.bias"}


# ---------------------------------------------------------------------------------------- settings


class Share(Diloco):
    def __init__(self, share: float) -> None:
        self.share = share


DIFFERENT: dict[str, Any] = {
    "arguments of the algorithm": lambda rank: {"algorithm": Share(0.5 + rank)},
    "codec": lambda rank: {"codec": ErrorFeedback(FP4(), 0.5 + rank / 4)},
    "participation": lambda rank: {"participation": Table({3: [rank]})},
}


@pytest.mark.processes
@pytest.mark.parametrize("name", DIFFERENT)
def test_processes_with_different_arguments_are_told(name: str, tmp_path: Path) -> None:
    import os

    def run() -> None:
        rank = int(os.environ["LOCAL_RANK"])
        fit(num_nodes=2, options={"devices": 2}, **DIFFERENT[name](rank))

    results = outcomes(start(run, 2, (), tmp_path), tmp_path)
    for outcome in results:
        assert outcome is not None
        assert outcome[0] == "raised"
        assert f"different settings: `{name}` is" in outcome[1]


class Classy(Diloco):
    outer_defaults: ClassVar = {"lr": 1.0, "momentum": 0.5}


def test_an_algorithms_own_codec_gives_way_to_the_strategys() -> None:
    class Packed(Classy):
        codec = FP4()

    packed, _, _ = fit(Packed())
    dense, module, _ = fit(Packed(), codec=Identity())
    plain, other, _ = fit(Classy())
    assert packed.ledger.total_bytes < dense.ledger.total_bytes / 8 == plain.ledger.total_bytes / 8
    assert_same(copy_of(module.state_dict()), copy_of(other.state_dict()))
