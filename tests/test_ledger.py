"""What is a message, what crosses the wire, and what does a single worker send?"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Net, loader, trainer

from lightning_diloco import (
    FP4,
    Cast,
    DataParallel,
    Diloco,
    DilocoCallback,
    DilocoStrategy,
    DropOut,
    Robust,
    SyncAlgorithm,
    TrimmedMean,
)
from lightning_diloco.comm.ledger import Ledger, LedgerEntry


def fit(resume: Path | None = None, end: Path | None = None, **settings: Any) -> tuple[Any, list[Any]]:
    reports: list[Any] = []

    class Keep(DilocoCallback):
        def on_outer_step(self, trainer, pl_module, report):
            reports.append(report)

    strategy = DilocoStrategy(**{"num_nodes": 4, "diloco_interval": 2, **settings})
    t = trainer(strategy, callbacks=[Keep()], max_steps=4 if resume is None else 6, max_epochs=-1)
    t.fit(Net(batch_norm=False), loader(), ckpt_path=resume)
    if end is not None:
        t.save_checkpoint(end)
    return strategy, reports


SIZE = 4 * (3 * 8 + 8 + 8 + 1)  # bytes of the module's parameters


@pytest.mark.parametrize("settings", [{}, {"codec": FP4()}, {"inner_state": "average"}], ids=str)
def test_a_single_worker_has_nobody_to_send_to(settings: dict[str, Any]) -> None:
    strategy, reports = fit(num_nodes=1, **settings)
    assert [r.payload_bytes for r in reports] == [0, 0]
    assert all(r.pseudo_gradient_norm > 0 and r.update_norm > 0 for r in reports)
    assert (strategy.ledger.total_bytes, strategy.ledger.entries) == (0, [])
    assert strategy.ledger.wire_bytes("ring") == (0, 0)


def test_the_wire_of_a_dense_run() -> None:
    """Two rounds of P bytes among four workers: a ring moves 2·3/4 of P, an all-gather 3 P, a server P and P."""
    strategy, reports = fit()
    ledger = strategy.ledger
    assert [r.payload_bytes for r in reports] == [SIZE, SIZE]
    assert ledger.entries == [LedgerEntry(step, "delta", SIZE, 4, SIZE) for step in (2, 4)]
    assert ledger.total_bytes == 2 * SIZE
    assert ledger.wire_bytes("ring") == (3 * SIZE, 3 * SIZE)
    assert ledger.wire_bytes("all_gather") == (6 * SIZE, 6 * SIZE)
    assert ledger.wire_bytes("server") == (2 * SIZE, 2 * SIZE)
    assert ledger.wire_bytes("server").sent == ledger.total_bytes


def test_the_wire_of_a_coded_run() -> None:
    """Halves up, whole numbers down; codes can't be summed on the way."""
    strategy, _ = fit(codec=Cast("bf16"), num_nodes=2)
    ledger = strategy.ledger
    assert ledger.entries == [LedgerEntry(step, "delta", SIZE // 2, 2, SIZE, gathered=True) for step in (2, 4)]
    assert ledger.wire_bytes("server") == (SIZE, 2 * SIZE)
    assert ledger.wire_bytes("all_gather") == (SIZE, SIZE)
    with pytest.raises(ValueError) as caught:
        ledger.wire_bytes("ring")
    assert str(caught.value) == (
        "`pattern` (='ring') sums what workers send on the way, which is impossible with the coded 'delta' of local"
        " step 2. Use 'all_gather' or 'server'."
    )
    with pytest.raises(ValueError) as caught:
        ledger.wire_bytes("tree")
    assert str(caught.value) == "`pattern` (='tree') must be one of 'ring', 'all_gather', 'server'."


@pytest.mark.parametrize(("make", "what", "first"), [(Diloco, "delta", 2), (DataParallel, "gradients", 1)])
def test_the_wire_of_robust_means(make: Callable[[], SyncAlgorithm], what: str, first: int, tmp_path: Path) -> None:
    """As many bytes as without, but everybody needs all of them; a file remembers that."""
    file = tmp_path / "end.ckpt"
    strategy, _ = fit(algorithm=Robust(make(), TrimmedMean(1)), end=file)
    count = 4 // first
    resumed, _ = fit(algorithm=Robust(make(), TrimmedMean(1)), resume=file)
    assert resumed.ledger.entries[: len(strategy.ledger.entries)] == strategy.ledger.entries
    for ledger in (strategy.ledger, Ledger(resumed.ledger.entries[:count])):
        assert ledger.entries[0] == LedgerEntry(first, what, SIZE, 4, SIZE, gathered=True)
        assert ledger.wire_bytes("all_gather") == (3 * count * SIZE, 3 * count * SIZE)
        assert ledger.wire_bytes("server") == (count * SIZE, count * SIZE)
        with pytest.raises(ValueError) as caught:
            ledger.wire_bytes("ring")
        assert str(caught.value) == (
            "`pattern` (='ring') sums what workers send on the way, which is impossible with the coded or robustly"
            f" averaged {what!r} of local step {first}. Use 'all_gather' or 'server'."
        )


def test_only_participants_share_a_ring() -> None:
    strategy, reports = fit(participation=DropOut(0.5))
    counts = [len(r.participants) for r in reports]
    assert [e.participants for e in strategy.ledger.entries] == counts != [4, 4]
    assert strategy.ledger.wire_bytes("all_gather").sent == sum((n - 1) * SIZE for n in counts)


def test_bytes_on_the_wire_are_rounded_up_per_message() -> None:
    ledger = Ledger([LedgerEntry(1, "delta", 10, 3, 10)] * 2)  # 2·2/3·10 = 13.3
    assert ledger.wire_bytes("ring") == (28, 28)


def test_the_formulas_are_those_of_messages_that_really_travel() -> None:
    """A ring all-reduce and a ring all-gather, message by message, as in the papers."""
    n, size = 5, 40
    values = [torch.randint(100, (size,)) for _ in range(n)]
    chunks = [list(v.clone().chunk(n)) for v in values]
    sent = [0] * n
    for phase in range(2):
        for step in range(n - 1):
            moving = [(i - step + phase) % n for i in range(n)]
            messages = [chunks[i][moving[i]].clone() for i in range(n)]
            for i in range(n):
                to, at = (i + 1) % n, moving[i]
                chunks[to][at] = messages[i] + chunks[to][at] if phase == 0 else messages[i]
                sent[i] += messages[i].numel()
    assert all(torch.equal(torch.cat(own), torch.stack(values).sum(0)) for own in chunks)
    ledger = Ledger([LedgerEntry(1, "delta", size, n, size)])
    assert sent == [ledger.wire_bytes("ring").sent] * n
    sent, known = [0] * n, [{i} for i in range(n)]
    for step in range(n - 1):
        for i in range(n):
            known[(i + 1) % n].add((i - step) % n)
            sent[i] += size
    assert known == [set(range(n))] * n
    assert sent == [ledger.wire_bytes("all_gather").sent] * n
