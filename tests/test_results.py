"""Do counters, reports and histories come back from started processes, as a notebook needs them?"""

from typing import Any

import lightning as L
import pytest
from family import Layers, seen
from helpers import loader, regression_data, trainer

from lightning_diloco import DilocoCallback, DilocoStrategy


class Tally(DilocoCallback):
    """Remembers more than a pipe holds."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[str] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.steps.append(f"{trainer.global_step}".zfill(20_000))

    def fit_results(self) -> list[str]:
        return self.steps

    def load_fit_results(self, data: list[str]) -> None:
        self.steps = data


def fit(devices: int = 1, steps: int = 9, **strategy: Any) -> tuple[DilocoStrategy, Tally, L.Trainer]:
    L.seed_everything(5, verbose=False)
    diloco, tally = DilocoStrategy(2, 4, **strategy), Tally()
    t = trainer(diloco, devices=devices, max_steps=steps, callbacks=[tally])
    t.fit(Layers(), loader(regression_data(96)))
    return diloco, tally, t


class Predicting(Layers):
    def forward(self, x: Any) -> Any:  # of a pair
        return self.layers[0](x[0])


@pytest.mark.processes
@pytest.mark.usefixtures("_copies")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_what_the_processes_counted_is_here(method: Any) -> None:
    expected, tally, _ = fit()
    found, theirs, _ = fit(2, start_method=method)
    assert (found.local_steps, found.outer_steps) == (expected.local_steps, expected.outer_steps) == (9, 3)
    assert found.ledger == expected.ledger
    assert found.ledger.total_bytes == 3 * sum(p.nbytes for p in Layers().parameters())
    assert [seen(r) for r in found.reports] == [seen(r) for r in expected.reports]
    assert [r.step for r in found.reports] == [4, 8, 9]
    assert found.reports[0].drift == pytest.approx(expected.reports[0].drift)
    assert theirs.steps == tally.steps
    assert len(theirs.steps) == 9
    with pytest.raises(RuntimeError) as caught:
        found.outer_state_dict()
    assert str(caught.value) == (
        f"The workers live in the processes that this one started (`start_method` is '{method}'; in notebooks that is"
        " 'fork'), and ended with them. Ask in a callback or hook of the fit. Here are `local_steps`, `outer_steps`,"
        " `reports` and `ledger`."
    )
    # another use of the processes keeps the results of the fit, and a new fit replaces them
    trainer(found, devices=2).predict(Predicting(), loader(regression_data(8), shuffle=False))
    assert (found.local_steps, len(found.reports)) == (9, 3)
    again = trainer(found, devices=2, max_steps=4)
    again.fit(Layers(), loader(regression_data(96)))
    assert (found.local_steps, [r.step for r in found.reports]) == (4, [4])


class Failing(Layers):
    def on_train_start(self) -> None:
        raise ValueError("ill")


@pytest.mark.processes
def test_after_an_error_there_are_no_results_of_an_earlier_fit() -> None:
    found, _, _ = fit(2, start_method="fork")
    with pytest.raises(Exception, match="ill"):
        trainer(found, devices=2, max_steps=4).fit(Failing(), loader(regression_data(96)))
    assert (found.local_steps, found.outer_steps, found.reports) == (0, 0, [])


def test_reports_are_those_of_one_fit_and_cant_be_changed() -> None:
    strategy = DilocoStrategy(2, 4)
    assert strategy.reports == []
    for steps in (9, 5):
        t = trainer(strategy, max_steps=steps)
        t.fit(Layers(), loader(regression_data(96)))
        strategy.reports.clear()
        assert [(r.step, r.outer_step, r.kind) for r in strategy.reports] == [
            (4, 1, "round"), *([(8, 2, "round"), (9, 3, "flush")] if steps == 9 else [(5, 2, "flush")])
        ]  # fmt: skip


def test_reports_exist_in_the_plain_run_too() -> None:
    strategy = DilocoStrategy(1, 4, outer_optimizer_kwargs={"lr": 1.0})
    trainer(strategy, max_steps=6).fit(Layers(), loader(regression_data(96)))
    assert [r.step for r in strategy.reports] == [4, 6]
