"""Are the oracles right? By whole numbers, and against each other; none of the package's code runs here."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from oracles import DataParallel, Oracle, PostLocalSGD, by_row, joined
from reference import Reference, shards
from torch import Tensor, nn

MEAN = partial(torch.optim.SGD, lr=1.0)
NESTEROV = partial(torch.optim.SGD, lr=0.5, momentum=0.5, nesterov=True)
OUTER = {
    "mean": MEAN,
    "nesterov": partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True),
    "adam": partial(torch.optim.Adam, lr=0.1, eps=0.1),
}


class Walk(nn.Module):
    """Two scalars; a batch (x, y) moves them by x and y when the inner optimizer is SGD with lr 1."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.b = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return -(self.a * x + self.b * y)


def walk(steps: int, *moves: tuple[float, float]) -> list[list[tuple[float, float]]]:
    """Each worker's batches: the same move in every step."""
    return [[move] * steps for move in moves]


def oracle(num_workers: int, outer: Any, interval: int, **kwargs: Any) -> Oracle:
    return Oracle(Walk(), num_workers, Walk.loss, MEAN, outer, interval, **kwargs)


def values(run: Any, name: str) -> list[list[float]]:
    """[θ, θ_0, θ_1, …] after every step."""
    return [[s[name].item() for s in (theta, *workers)] for theta, workers in run.history]


# ------------------------------------------------------------------------------------------------ by whole numbers


def test_plain_averaging_by_hand():
    # Workers move by 1 and 3: after two steps (2, 6), mean 4; then (6, 10), mean 8; a fifth step: (9, 11), mean 10.
    run = oracle(2, MEAN, 2).train(walk(5, (1, 0), (3, 0)))
    assert values(run, "a") == [[0, 1, 3], [4, 4, 4], [4, 5, 7], [8, 8, 8], [8, 9, 11]]
    run.flush()
    assert [m.a.item() for m in (run.theta, *run.workers)] == [10, 10, 10]
    assert [(s.step, s.arrived, s.kind) for s in run.sent] == [(2, 2, "round"), (4, 4, "round"), (5, 5, "flush")]
    assert run.flush().sent[3:] == []


def test_nesterov_by_hand():
    # Δ = −4 in every round. buffer −4: θ = 0 + .5(4 + 2) = 3; buffer −2 − 4 = −6: θ = 3 + .5(4 + 3) = 6.5
    run = oracle(2, NESTEROV, 2).train(walk(4, (1, 0), (3, 0)))
    assert [row[0] for row in values(run, "a")] == [0, 3, 3, 6.5]


@pytest.mark.parametrize(
    ("first_sync", "expected"), [("paper", [[4, 8, 12], [6, 10]]), ("staggered", [[2, 6, 10], [4, 8, 12]])]
)
def test_when_fragments_are_sent(first_sync, expected):
    run = oracle(1, MEAN, 4, fragments=[["a"], ["b"]], first_sync=first_sync).train(walk(12, (1, 1)))
    assert [[s.step for s in run.sent if s.fragment == p] for p in (0, 1)] == expected


def test_uneven_fragments_are_sent_in_their_turn():
    # H = 7, P = 2: ⌊7/2⌋ = 3
    run = oracle(1, MEAN, 7, fragments=[["a"], ["b"]]).train(walk(18, (1, 1)))
    assert [[s.step for s in run.sent if s.fragment == p] for p in (0, 1)] == [[7, 14], [10, 17]]
    run = oracle(1, MEAN, 7, fragments=[["a"], ["b"]], first_sync="staggered").train(walk(18, (1, 1)))
    assert [[s.step for s in run.sent if s.fragment == p] for p in (0, 1)] == [[3, 10, 17], [7, 14]]


def test_offsets_of_many_fragments_are_multiples_of_a_whole_number():
    # H = 6, P = 4: ⌊6/4⌋ = 1, so 6, 7, 8, 9; in the other order ⌊6(p + 1)/4⌋
    for first_sync, expected in (("paper", [6, 7, 8, 9]), ("staggered", [1, 3, 4, 6])):
        fragments = [[name] for names in FRAGMENTS for name in names]
        run = Oracle(Layers(), 1, Layers.loss, INNER, MEAN, 6, fragments=fragments, first_sync=first_sync)
        run.train(batches(1))
        assert [next(s.step for s in run.sent if s.fragment == p) for p in range(4)] == expected


def test_streaming_by_hand():
    # H = 4, τ = 1, α = .5; a moves by 1 and 3, b by 2 and 2.
    # a, sent after 4 steps: (4, 12), mean 8; arrives at 5, when the workers are at (5, 15): (6.5, 11.5).
    #    Sent after 8: (9.5, 20.5), mean 15; at 9 the workers are at (10.5, 23.5): (12.75, 19.25).
    # b, sent after 6: (12, 12); arrives at 7, when they are at 14: (13, 13). Sent after 10: 19; at 11: 21 → 20.
    run = oracle(2, MEAN, 4, fragments=[["a"], ["b"]], delay=1, alpha=0.5).train(walk(11, (1, 2), (3, 2)))
    a, b = values(run, "a"), values(run, "b")
    assert a[3:9] == [[0, 4, 12], [8, 6.5, 11.5], [8, 7.5, 14.5], [8, 8.5, 17.5], [8, 9.5, 20.5], [15, 12.75, 19.25]]
    assert b[5:8] == [[0, 12, 12], [12, 13, 13], [12, 15, 15]]
    assert b[9:11] == [[12, 19, 19], [19, 20, 20]]


def test_delta_is_measured_before_the_arrival_of_the_same_step():
    # a is sent at 2 and 4, τ = 2: at 4 θ is still 0, so Δ = −4, and then the 2 of step 2 arrives
    run = oracle(1, MEAN, 2, delay=2).train(walk(4, (1, 0)))
    assert [s.mean["a"].item() for s in run.sent] == [-2, -4]
    assert values(run, "a")[3] == [2, 2]


def test_a_flush_by_hand():
    # As in streaming by hand, ended after 6 steps with b just sent: 12 arrives at once, 12 → .5·12 + .5·12.
    # a has trained since step 4: (7.5, 14.5), mean 11, taken in with α: (9.25, 12.75).
    run = oracle(2, MEAN, 4, fragments=[["a"], ["b"]], delay=1, alpha=0.5).train(walk(6, (1, 2), (3, 2))).flush()
    assert [m.a.item() for m in (run.theta, *run.workers)] == [11, 9.25, 12.75]
    assert [m.b.item() for m in (run.theta, *run.workers)] == [12, 12, 12]
    assert [(s.step, s.arrived, s.fragment, s.kind) for s in run.arrived] == [
        (4, 5, 0, "round"),
        (6, 6, 1, "round"),
        (6, 6, 0, "flush"),
    ]


def test_a_flush_sends_nothing_twice_and_nothing_for_nothing():
    # with α the workers stay apart after the round of the last step
    run = oracle(2, MEAN, 4, alpha=0.5).train(walk(4, (1, 2), (3, 2)))
    assert values(run, "a")[-1] == [8, 6, 10]
    assert [s.kind for s in run.flush().sent] == ["round"]
    # fragment b never moves
    run = oracle(2, MEAN, 4, fragments=[["a"], ["b"]]).train(walk(3, (1, 0), (3, 0))).flush()
    assert [(s.step, s.fragment) for s in run.sent] == [(3, 0)]


def test_a_flush_starts_the_rounds_anew():
    run = oracle(2, MEAN, 4, fragments=[["a"], ["b"]]).train(walk(5, (1, 2), (3, 2))).flush()
    run.train(walk(8, (1, 2), (3, 2)))
    assert [(s.step, s.fragment) for s in run.sent] == [(4, 0), (5, 0), (5, 1), (9, 0), (11, 1), (13, 0)]


def test_a_worker_that_is_left_out_by_hand():
    # Moves 1, 3, 5; H = 2. At 2 worker 1 is left out: mean(2, 10) = 6, and it stays at 6 by chance: then + 2 · 3.
    # At 4 all take part: (8, 12, 16), Δ from θ = 6: −(2 + 6 + 10)/3 = −6. At 6 nobody: (14, 18, 22), θ = 12.
    rows: dict[int, list[int]] = {2: [0, 2], 6: []}
    run = oracle(3, MEAN, 2, participants=by_row(rows)).train(walk(6, (1, 0), (3, 0), (5, 0)))
    assert values(run, "a")[1::2] == [[6, 6, 6, 6], [12, 12, 12, 12], [12, 14, 18, 22]]
    assert [s.step for s in run.sent] == [2, 4]
    assert [(s.step, s.kind) for s in run.flush().sent] == [(2, "round"), (4, "round")]  # 6 was its time
    rows = {2: [1]}
    run = oracle(3, MEAN, 2, participants=by_row(rows)).train(walk(4, (1, 0), (4, 0), (5, 0)))
    # worker 1 alone: θ = 8; others stay at 2 and 10. Then (4, 16, 20), mean 40/3
    assert values(run, "a")[1] == [8, 2, 8, 10]
    assert values(run, "a")[3] == pytest.approx([40 / 3] * 4)


def test_who_misses_the_sending_does_not_take_what_arrives():
    run = oracle(2, MEAN, 2, delay=1, participants=by_row({2: [0]})).train(walk(3, (1, 0), (3, 0)))
    assert values(run, "a")[2] == [2, 2, 9]


def test_error_feedback_by_hand():
    # Rounding to whole tens; a moves by 4 in every round of one step (outer SGD 1, so θ_i = θ after it).
    # β = 1: a = 4 → 0, e = 4; a = 8 → 10, e = −2; a = 2 → 0, e = 2; a = 6 → 10, e = −4; the signs are Δ's.
    run = oracle(1, MEAN, 1, codec=lambda x: (x / 10).round() * 10, decay=1.0).train(walk(4, (4, 0)))
    assert [-s.mean["a"].item() for s in run.sent] == [0, 10, 0, 10]
    assert run.errors[0]["a"].item() == 4
    assert values(run, "a") == [[0, 0], [10, 10], [10, 10], [20, 20]]
    # β = .5: a = 4 → 0; 2 + 4 = 6 → 10, e = −4; −2 + 4 = 2 → 0, e = 2; 1 + 4 = 5 → ties to even: 0
    run = oracle(1, MEAN, 1, codec=lambda x: (x / 10).round() * 10, decay=0.5).train(walk(4, (4, 0)))
    assert [-s.mean["a"].item() for s in run.sent] == [0, 10, 0, 0]


def test_errors_are_each_workers_and_wait_for_it():
    codec = {"codec": lambda x: (x / 10).round() * 10, "decay": 1.0}
    run = oracle(2, MEAN, 1, participants=by_row({2: [0]}), **codec).train(walk(3, (4, 0), (3, 0)))
    # 1: 4 → 0 and 3 → 0, both back to θ = 0.  2: 8 → 10, θ = 10; worker 1 goes on to 3.
    # 3: worker 0: −2 + 4 = 2 → 0; worker 1: θ_1 = 6, Δ = 10 − 6 = 4, so a = −(3 − 4) = 1 → 0
    assert values(run, "a") == [[0, 0, 0], [10, 10, 3], [10, 10, 10]]
    assert [-e["a"].item() for e in run.errors] == [2, -1]


def test_data_parallel_by_hand():
    # The mean gradient −2 moves all by 2; −(3, 4), clipped to norm 1, by (.6, .8).
    run = DataParallel(Walk(), walk(3, (1, 0), (3, 0)), Walk.loss, MEAN)
    assert values(run, "a") == [[2, 2, 2], [4, 4, 4], [6, 6, 6]]
    run = DataParallel(Walk(), walk(2, (1, 0), (5, 8)), Walk.loss, MEAN, clip=1.0)
    assert [values(run, n)[-1][0] for n in "ab"] == pytest.approx([1.2, 1.6], rel=1e-6)
    run = DataParallel(Walk(), walk(2, (1, 0), (4, 0)), Walk.loss, MEAN, codec=lambda x: (x / 2).round() * 2)
    assert values(run, "a")[-1][0] == 4  # 1 → 0, 4 → 4


def test_post_local_sgd_by_hand():
    # A step of 2; then (3, 5), (4, 8) → 6; then (7, 9) → 8 at the end.
    run = PostLocalSGD(Walk(), walk(4, (1, 0), (3, 0)), Walk.loss, MEAN, switch=1, interval=2)
    assert values(run, "a") == [[2, 2, 2], [2, 3, 5], [6, 6, 6], [6, 7, 9]]
    assert run.theta.a.item() == 8


# ----------------------------------------------------------------------------------------------- against each other


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(2)
            self.first, self.second = nn.Linear(3, 4).double(), nn.Linear(4, 1).double()

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.second(self.first(x).tanh()), y)


FRAGMENTS = [["first.weight", "first.bias"], ["second.weight", "second.bias"]]
INNER = partial(torch.optim.AdamW, lr=0.02, weight_decay=0.1)


def batches(num_workers: int, steps: int = 11) -> list[list[Any]]:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(steps * num_workers * 4, 3, generator=generator, dtype=torch.float64)
    return shards([x, x.sin().sum(1, keepdim=True)], num_workers, 4, epochs=1, seed=1)


def assert_close(ours: Any, twin: Any) -> None:
    torch.testing.assert_close(ours, twin, rtol=0, atol=1e-12)


@pytest.mark.parametrize("outer", OUTER)
@pytest.mark.parametrize("first_sync", ["paper", "staggered"])
def test_a_single_fragment_without_delay_is_the_reference(outer, first_sync):
    run = Oracle(Layers(), 3, Layers.loss, INNER, OUTER[outer], 4, first_sync=first_sync).train(batches(3)).flush()
    twin = Reference(Layers(), batches(3), Layers.loss, INNER, None if outer == "mean" else OUTER[outer], 4)
    assert_close(run.history, twin.history)
    assert_close(run.theta.state_dict(), twin.theta.state_dict())
    assert [s.step for s in run.sent] == twin.synced_at
    assert len(run.history) == 11


@pytest.mark.parametrize("p", [0, 1])
def test_a_fragment_is_a_run_of_its_own(p):
    """Where the inner steps of the fragments don't touch each other, as in a sum of two losses."""
    moves = walk(13, (1, 2), (3, -4), (0, 1))
    first_sync = ("paper", "staggered")[p]  # fragment 0 of the one, fragment 1 of the other: at H, 2H, …
    run = oracle(3, NESTEROV, 4, fragments=[["a"], ["b"]], first_sync=first_sync).train(moves).flush()
    twin = Reference(Walk(), moves, Walk.loss, MEAN, NESTEROV, 4)
    name = "ab"[p]
    assert values(run, name) == values(twin, name)
    assert values(run, "ab"[1 - p]) != values(twin, "ab"[1 - p])


def test_alpha_1_is_independent_training():
    run = Oracle(Layers(), 2, Layers.loss, INNER, OUTER["nesterov"], 3, fragments=FRAGMENTS, delay=2, alpha=1.0)
    run.train(batches(2)).flush()
    for i, own in enumerate(batches(2)):
        model = Layers()
        optimizer = INNER(model.parameters())
        for t, batch in enumerate(own):
            optimizer.zero_grad()
            model.loss(batch).backward()
            optimizer.step()
            assert_close(run.history[t][1][i], model.state_dict())
        assert_close(run.workers[i].state_dict(), model.state_dict())


def test_data_parallel_is_training_on_joined_batches():
    for clip in (None, 0.1):
        several = DataParallel(Layers(), batches(3), Layers.loss, INNER, clip=clip)
        one = DataParallel(Layers(), [joined(batches(3))], Layers.loss, INNER, clip=clip)
        assert_close([theta for theta, _ in several.history], [theta for theta, _ in one.history])
    plain = Reference(Layers(), [joined(batches(3))], Layers.loss, INNER, None, 1)
    unclipped = DataParallel(Layers(), batches(3), Layers.loss, INNER)
    assert_close(unclipped.theta.state_dict(), plain.theta.state_dict())
    assert not torch.equal(unclipped.theta.first.weight, one.theta.first.weight)


def test_clipping_is_torchs():
    def by_torch(parameters: Any) -> Any:
        parameters = list(parameters)
        optimizer = INNER(parameters)
        optimizer.register_step_pre_hook(lambda *_: nn.utils.clip_grad_norm_(parameters, 0.1) and None)
        return optimizer

    ours = DataParallel(Layers(), batches(3), Layers.loss, INNER, clip=0.1)
    twin = Reference(Layers(), [joined(batches(3))], Layers.loss, by_torch, None, 1)
    assert_close(ours.theta.state_dict(), twin.theta.state_dict())


def test_large_batch_sgd_is_averaging_in_every_step():
    """H = 1, inner SGD, outer SGD(1) ≡ data parallel; with outer Nesterov(1, μ) ≡ data-parallel Nesterov(lr, μ)."""
    run = Oracle(Layers(), 3, Layers.loss, partial(torch.optim.SGD, lr=0.1), MEAN, 1).train(batches(3))
    twin = DataParallel(Layers(), batches(3), Layers.loss, partial(torch.optim.SGD, lr=0.1))
    assert_close(run.history, twin.history)
    outer = partial(torch.optim.SGD, lr=1.0, momentum=0.9, nesterov=True)
    run = Oracle(Layers(), 3, Layers.loss, partial(torch.optim.SGD, lr=0.1), outer, 1).train(batches(3))
    inner = partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True)
    assert_close(run.history, DataParallel(Layers(), batches(3), Layers.loss, inner).history)


def test_post_local_sgd_lies_between_its_ends():
    late = PostLocalSGD(Layers(), batches(3), Layers.loss, INNER, switch=99, interval=4)
    assert_close(late.history, DataParallel(Layers(), batches(3), Layers.loss, INNER).history)
    some = PostLocalSGD(Layers(), batches(3), Layers.loss, INNER, switch=5, interval=4)
    assert_close(some.history[:5], late.history[:5])
    assert not torch.equal(some.history[5][1][0]["first.weight"], some.history[5][1][1]["first.weight"])
    early = PostLocalSGD(Layers(), batches(3), Layers.loss, INNER, switch=0, interval=4)
    twin = Reference(Layers(), batches(3), Layers.loss, INNER, None, 4)
    assert_close(early.history, twin.history)
    assert_close(early.theta.state_dict(), twin.theta.state_dict())


def test_error_feedback_telescopes():
    """Σ sent + e_T = Σ Δ for every worker and tensor, whoever takes part."""

    def half_of_it(x: Tensor) -> Tensor:
        return x * (torch.arange(x.numel(), dtype=x.dtype).view(x.shape) % 2)

    for i in range(2):  # with a single participant in every round the mean is what it sent
        run = Oracle(
            Layers(),
            2,
            Layers.loss,
            INNER,
            OUTER["nesterov"],
            3,
            fragments=FRAGMENTS,
            codec=half_of_it,
            decay=1.0,
            participants=lambda *_, i=i: [i],
        )
        run.train(batches(2)).flush()
        for names in FRAGMENTS:
            for n in names:
                sent = sum(s.mean[n] for s in run.sent if n in s.mean)
                assert_close(sent + run.errors[i][n], run.dense[i][n])
                assert run.errors[i][n].any()
                assert not run.errors[1 - i][n].any()


def test_an_oracle_leaves_its_model_alone():
    model = Layers()
    before = copy.deepcopy(model.state_dict())
    Oracle(model, 2, Layers.loss, INNER, OUTER["nesterov"], 3).train(batches(2)).flush()
    DataParallel(model, batches(2), Layers.loss, INNER)
    PostLocalSGD(model, batches(2), Layers.loss, INNER, 2, 3)
    assert_close(model.state_dict(), before)
