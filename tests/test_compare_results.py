"""Are a comparison's table and figure those of its numbers, and does the command line make the same from YAML?"""

import json
import math
import sys
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from comparisons import Data, Drawn, quiet
from matplotlib import pyplot
from matplotlib.axes import Axes
from processes import script

import lightning_diloco.__main__ as command_line
from lightning_diloco import Cluster, DataParallel, StreamingDiloco
from lightning_diloco.comparison import Comparison, Run, command

ROOT = Path(__file__).parent.parent
LOSSES = {"one worker": [2.0, 4.0, 6.0], "50 % & more|less": [1.0, 4.5, 5.0], "H=5_x": [3.0, 5.0, 7.0]}


def rows(name: str, seed: int, loss: float, sent: int) -> list[dict[str, Any]]:
    """Validations at steps 10 and 20, and after the fit."""
    many = name != "one worker"
    common = {"run": name, "seed": seed, "num_nodes": 4 if many else 1, "diloco_interval": 5 if many else None}
    made = []
    for step, final, value in ((10, False, loss + 3), (20, False, loss + 100), (20, True, loss)):
        size = {"step": step, "samples": 8 * step * (4 if many else 1), "bytes": sent * step, "seconds": step + seed}
        size["simulated_seconds"] = step / 2 if many else math.nan
        made.append(
            {**common, **size, "final": final, "train_loss": loss / 2, "val_loss": value, "val_acc": value / 10}
        )
    return made


@pytest.fixture
def fake() -> Comparison:
    sent = dict(zip(LOSSES, (0, 50, 100), strict=True))
    made = [
        r for name, losses in LOSSES.items() for s, loss in enumerate(losses) for r in rows(name, s, loss, sent[name])
    ]
    return Comparison(pd.DataFrame(made).astype({"diloco_interval": "Int64"}))


# -------------------------------------------------------------------------------------------- the table


def test_the_table_has_means_spreads_and_paired_differences(fake: Comparison) -> None:
    table = fake.table("val_loss", against="one worker", format=".2f")
    by_run = {name: np.array(losses) for name, losses in LOSSES.items()}
    for name, losses in by_run.items():
        found, apart = table.data.loc[name], losses - by_run["one worker"]
        assert found["val_loss", "mean"] == pytest.approx(losses.sum() / 3, abs=1e-12)
        assert found["val_loss", "sd"] == pytest.approx(math.sqrt(((losses - losses.mean()) ** 2).sum() / 2), abs=1e-12)
        assert found["val_loss", "difference"] == pytest.approx(apart.sum() / 3, abs=1e-12)
        assert found["val_loss", "sd of difference"] == pytest.approx(np.std(apart, ddof=1), abs=1e-12)
    assert table.to_markdown() == (
        "| run               |   N |   H | samples | bytes per worker |    val_loss | val_loss − one worker |\n"
        "|-------------------|----:|----:|--------:|-----------------:|------------:|----------------------:|\n"
        "| one worker        |   1 |   – |     160 |                0 | 4.00 ± 2.00 |                     – |\n"
        "| 50 % & more\\|less |   4 |   5 |     640 |            1,000 | 3.50 ± 2.18 |          -0.50 ± 0.87 |\n"
        "| H=5_x             |   4 |   5 |     640 |            2,000 | 5.00 ± 2.00 |          +1.00 ± 0.00 |"
    )
    assert str(table) == table._repr_markdown_() == table.to_markdown()
    assert table.to_latex() == "\n".join(
        [
            r"\begin{tabular}{lrrrrrr}",
            r"\toprule",
            r"run & N & H & samples & bytes per worker & val\_loss & val\_loss $-$ one worker \\",
            r"\midrule",
            r"one worker & 1 & -- & 160 & 0 & 4.00 $\pm$ 2.00 & -- \\",
            r"50 \% \& more|less & 4 & 5 & 640 & 1,000 & 3.50 $\pm$ 2.18 & $-$0.50 $\pm$ 0.87 \\",
            r"H=5\_x & 4 & 5 & 640 & 2,000 & 5.00 $\pm$ 2.00 & +1.00 $\pm$ 0.00 \\",
            r"\bottomrule",
            r"\end{tabular}",
        ]
    )


def test_formats_per_metric_and_all_metrics(fake: Comparison) -> None:
    table = fake.table(format={"val_acc": ".1%"})
    assert table.header[5:] == ["val_loss", "val_acc"]
    assert table.rows[0][5:] == ["4.0000 ± 2.0000", "40.0% ± 20.0%"]
    assert fake.metrics == ["val_loss", "val_acc"]
    assert repr(fake) == "Comparison of 3 runs, 3 seeds: one worker, 50 % & more|less, H=5_x"


def test_a_single_seed_has_no_spread_and_the_table_says_so(fake: Comparison) -> None:
    single = Comparison(fake.data[fake.data["seed"] == 1])
    assert single.table("val_loss", "one worker").rows[2][5:] == ["5.0000 (1 seed)", "+1.0000 (1 seed)"]


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (
            lambda c: c.table("loss"),
            "`metrics` names 'loss'; there are 'val_loss', 'val_acc', 'train_loss', 'seconds', 'simulated_seconds'.",
        ),
        (lambda c: c.table(against="two"), "`against` names the run 'two'; there are 'one worker', '50 % & more|less'"),
        (lambda c: c.plot("loss"), "`y` names 'loss'; there are"),
        (
            lambda c: c.plot("val_loss", "simulated_seconds", runs=["one worker"]),
            "`x` is 'simulated_seconds', but no run has a clock. Give `compare` a `cluster`, as in",
        ),
        (
            lambda c: c.plot("val_loss", "time"),
            "`x` (='time') must be one of 'step', 'samples', 'bytes', 'seconds', 's",
        ),
        (lambda c: c.plot("val_loss", runs=["two"]), "`runs` names the run 'two'; there are"),
    ],
)
def test_what_is_not_there_is_named(ask: Any, words: str, fake: Comparison) -> None:
    with pytest.raises(ValueError) as caught:
        ask(fake)
    assert str(caught.value).startswith(words)


# -------------------------------------------------------------------------------------------- the figure


def lines(ax: Axes) -> dict[str, tuple[list[float], list[float]]]:
    """x and y of every line of the figure, by its label."""
    return {str(line.get_label()): (list(line.get_xdata()), list(line.get_ydata())) for line in ax.lines}


@pytest.mark.parametrize(
    ("x", "at"),
    [
        ("step", [10, 20]),
        ("samples", [320, 640]),
        ("seconds", [11, 21]),
        ("bytes", [1000, 2000]),
        ("simulated_seconds", [5, 10]),
    ],
)
def test_the_figure_has_the_means_and_their_spread(x: Any, at: list[float], fake: Comparison) -> None:
    ax = fake.plot("val_loss", x)
    found = lines(ax)
    assert found["H=5_x"] == (at, [8.0, 5.0])  # at the last step the validation after the fit
    (band,) = [c for c, line in zip(ax.collections[::-1], ax.lines[::-1], strict=False) if line.get_label() == "H=5_x"]
    assert np.ptp(band.get_paths()[0].vertices[:, 1]) == pytest.approx(3 + 2 * 2.0)  # from 5 − 2 to 8 + 2
    level = {"bytes": " (sends nothing)", "simulated_seconds": " (has no clock)"}.get(x, "")
    one = f"one worker{level}"
    assert found[one][1] == ([4.0, 4.0] if level else [7.0, 4.0])
    assert ax.get_xscale() == ("log" if x == "bytes" else "linear")
    assert [t.get_text() for t in ax.get_legend().get_texts()] == [one, "50 % & more|less", "H=5_x"]
    assert ax.get_ylabel() == "val_loss (mean ± sd of 3 seeds)"
    ax.figure.savefig("figure.png")
    assert Path("figure.png").stat().st_size > 5000
    assert not pyplot.get_fignums()


def test_a_choice_of_runs_on_axes_of_ones_own(fake: Comparison) -> None:
    ax = fake.plot("train_loss", runs=["H=5_x", "one worker"])
    assert fake.plot("val_loss", runs=["one worker"], ax=ax) is ax
    assert [line.get_label() for line in ax.lines] == ["H=5_x", "one worker", "one worker"]


# -------------------------------------------------------------------------------------------- the command line


CONFIG: dict[str, Any] = {
    "model": {"class_path": "comparisons.Drawn", "init_args": {"dropout": 0.1}},
    "data": {"class_path": "comparisons.Data", "init_args": {"batch_size": 4}},
    "trainer": {
        "accelerator": "cpu",
        "max_steps": 6,
        "val_check_interval": 3,
        "check_val_every_n_epoch": None,
        "callbacks": [{"class_path": "GradientAccumulationScheduler", "init_args": {"scheduling": {0: 2}}}],
    },
    "runs": {
        "one worker": "plain",
        "all": "DataParallel",
        "average": {
            "grid": {"num_nodes": 2, "diloco_interval": [2, 5], "outer_optimizer_kwargs": {"lr": 1.0}},
        },
        "streaming": {
            "num_nodes": 2,
            "diloco_interval": 4,
            "algorithm": {"class_path": "StreamingDiloco", "init_args": {"fragments": 2}},
            "outer_optimizer_cls": {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.01}},
        },
        "other": {"strategy": {"num_nodes": 2, "diloco_interval": 2}, "times": 2, "module": {"dropout": 0.0}},
    },
    "seeds": [4, 5],
    "folder": "out",
    "against": "one worker",
    "x": "bytes",
}  # fmt: skip


def run(config: dict[str, Any], *args: str) -> Comparison:
    Path("config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    comparison = command_line.main(["compare", "--config=config.yaml", "--progress_bar=false", *args])
    assert isinstance(comparison, Comparison)
    return comparison


@cache
def by_hand() -> Comparison:
    """The same in Python: the first test that asks trains it."""
    import torch
    from lightning.pytorch.callbacks import GradientAccumulationScheduler

    average = {"num_nodes": 2, "outer_optimizer_kwargs": {"lr": 1.0}}
    streaming = {"num_nodes": 2, "diloco_interval": 4, "algorithm": StreamingDiloco(2)}
    runs = {
        "one worker": "plain",
        "all": {"num_nodes": 2, "algorithm": DataParallel()},
        "average, H=2": {**average, "diloco_interval": 2},
        "average, H=5": {**average, "diloco_interval": 5},
        "streaming": {**streaming, "outer_optimizer_cls": torch.optim.Adam, "outer_optimizer_kwargs": {"lr": 0.01}},
        "other": Run({"num_nodes": 2, "diloco_interval": 2}, times=2, module={"dropout": 0.0}),
    }
    trainer = {**CONFIG["trainer"], "callbacks": GradientAccumulationScheduler({0: 2})}
    module, data = partial(Drawn, dropout=0.1), partial(Data, batch_size=4)
    return quiet(module, data, runs, trainer=trainer, seeds=[4, 5], folder="by hand")


@pytest.mark.slow
def test_yaml_makes_the_same_numbers_table_and_figure(capsys: Any) -> None:
    comparison, expected = run(CONFIG), by_hand()
    frames = [c.data.drop(columns="seconds") for c in (comparison, expected)]
    pd.testing.assert_frame_equal(*frames, check_exact=True)
    table = expected.table(against="one worker")
    assert Path("out/table.md").read_text() == f"{table.to_markdown()}\n"
    assert Path("out/table.tex").read_text() == f"{table.to_latex()}\n"
    assert Path("out/figure.svg").read_text().count("<svg") == 1
    read = pd.read_csv("out/data.csv")
    np.testing.assert_array_equal(read["val_loss"], comparison.data["val_loss"])
    out = capsys.readouterr().out
    assert out == f"{table}\n\nout: table.md, table.tex, figure.svg, data.csv\n"
    written = json.loads(Path("out/comparison.json").read_text())
    arguments = {"num_nodes": 2, "outer_optimizer_kwargs": {"lr": 1.0}, "diloco_interval": 5}
    strategy = {"class_path": "lightning_diloco.DilocoStrategy", "init_args": arguments}
    assert written["runs"]["average, H=5"]["strategy"] == str(strategy)


@pytest.mark.slow
def test_numbers_of_the_command_line_are_those_of_yaml() -> None:
    run(CONFIG, "--trainer.max_steps=4", "--trainer.val_check_interval=2")
    run({**CONFIG, "trainer": {**CONFIG["trainer"], "max_steps": 4, "val_check_interval": 2}})  # the same runs


@pytest.mark.slow
def test_a_cluster_in_yaml_is_that_of_all_runs_but_those_with_one_of_their_own() -> None:
    own = {"class_path": "lightning_diloco.cluster.Cluster.low", "init_args": {"step_seconds": 2.0}}
    runs = {
        "plain": "plain",
        "all": "DataParallel",
        "grid": {"grid": {"num_nodes": 2, "diloco_interval": [2, 5]}},
        "own": {"num_nodes": 2, "diloco_interval": 2, "cluster": own},
        "run": {"strategy": {"num_nodes": 2, "diloco_interval": 2}, "times": 2},
    }
    cluster = {"step_seconds": 0.5, "bandwidth_gbit_s": 0.001, "latency_ms": 4}
    trainer = {**CONFIG["trainer"], "callbacks": []}
    options = {"seeds": [4], "x": "simulated_seconds", "metrics": ["val_loss"], "against": None}
    frame = run({**CONFIG, "runs": runs, "cluster": cluster, "trainer": trainer, **options}).data

    in_python = {
        "plain": "plain",
        "all": "DataParallel",
        "grid, H=2": {"num_nodes": 2, "diloco_interval": 2},
        "grid, H=5": {"num_nodes": 2, "diloco_interval": 5},
        "own": {"num_nodes": 2, "diloco_interval": 2, "cluster": Cluster.low(2.0)},
        "run": Run({"num_nodes": 2, "diloco_interval": 2}, times=2),
    }
    module, data = partial(Drawn, dropout=0.1), partial(Data, batch_size=4)
    expected = quiet(
        module, data, in_python, trainer=trainer, seeds=[4], folder="by hand", cluster=Cluster(**cluster)
    ).data
    pd.testing.assert_frame_equal(*(f.drop(columns="seconds") for f in (frame, expected)), check_exact=True)
    last = frame[frame["final"]].set_index("run")["simulated_seconds"]
    assert last.notna().tolist() == [False, True, True, True, True, True]
    assert 12 < last["own"] < 12.2 < 13
    assert last["grid, H=5"] < last["grid, H=2"] < last["all"] < last["run"] - 2
    assert Path("out/figure.svg").read_text().count("<svg") == 1


@pytest.mark.slow
@pytest.mark.processes
def test_yaml_with_several_processes() -> None:
    comparison = run(CONFIG, "--processes=2")
    pd.testing.assert_frame_equal(
        comparison.data.drop(columns="seconds"), by_hand().data.drop(columns="seconds"), check_exact=True
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"runs": {"a": {"num_node": 2}}}, "`runs['a']`: "),
        ({"runs": {"a": {"num_nodes": 0}}}, "`runs['a']`: "),
        ({"runs": {"a": {"times": 2, "num_nodes": 3}}}, "a run has strategy, times, trainer, module, data."),
        ({"runs": {"a": {"grid": {"num_nodes": [2]}, "times": 2}}}, "beside `grid` there can be nothing else."),
        ({"runs": {"a": "ddp"}}, "`runs['a']` (='ddp') must be 'plain'"),
        ({"trainer": {"max_step": 3}}, "max_step"),
        ({"model": {"class_path": "comparisons.Missing"}}, "comparisons.Missing"),
        ({"model": {"class_path": "comparisons.Drawn", "init_args": {"drop": 0.1}}}, "drop"),
        ({"seed": 3}, "seed"),
        ({"seeds": 0}, "`seeds` (=0) must be their number"),
        ({"metrics": ["loss"]}, "`metrics` names 'loss'"),
    ],
)
def test_mistakes_in_yaml_are_named(change: Any, words: str, capsys: Any) -> None:
    short = {**CONFIG, "runs": {"a": "plain"}, "seeds": 1}
    del short["against"]
    with pytest.raises(SystemExit) as stopped:
        run({**short, **change})
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert words in error[error.index("error: ") :]


def test_help_mentions_comparisons_and_reads_well(capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["python -m lightning_diloco"])
    for args in (["--help"], ["compare", "--help"]):
        with pytest.raises(SystemExit) as stopped:
            command_line.main(args)
        assert stopped.value.code == 0
    first, second = capsys.readouterr().out.split("usage: python -m lightning_diloco compare")
    assert "`compare`" in first
    assert "python -m lightning_diloco compare --help" in " ".join(first.split())
    assert "\n  python -m lightning_diloco compare --config examples/configs/compare_digits.yaml --seeds 2\n" in second
    for name in (
        "model",
        "data",
        "trainer",
        "runs",
        "seeds",
        "processes",
        "folder",
        "metrics",
        "against",
        "format",
        "x",
        "cluster",
    ):
        assert f"--{name}" in second
    assert command._DESCRIPTION.strip() in second


@pytest.mark.slow
@pytest.mark.processes
def test_the_configuration_of_the_examples(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    config = ROOT / "examples" / "configs" / "compare_digits.yaml"
    short = {**yaml.safe_load(config.read_text())["trainer"], "max_steps": 4, "val_check_interval": 2}
    command = ["-m", "lightning_diloco", "compare", f"--config={config}", f"--folder={tmp_path / 'out'}"]
    more = [f"--trainer={json.dumps(short)}", "--seeds=1", "--processes=1"]
    done = script(*command, *more, folder=ROOT, out=tmp_path)
    assert done.returncode == 0, done.stderr
    names = [line.split("|")[1].strip() for line in done.stdout.splitlines()[2:8]]
    assert names == [
        "one worker",
        "one worker, same samples",
        "data parallel",
        "plain average",
        "DiLoCo, H=20",
        "DiLoCo, H=100",
    ]
