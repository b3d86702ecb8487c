"""Do the examples run as printed, and do their figures hold?"""

import ast
import importlib.util
import math
import signal
import sys
from pathlib import Path
from types import ModuleType

import lightning as L
import numpy as np
import pytest
import torch
from processes import script
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parameter_bytes(model: torch.nn.Module) -> int:
    """The models of the examples have no buffers; tied weights count once."""
    assert not list(model.buffers())
    return sum(p.nbytes for p in model.parameters())


def scalars(run: Path) -> EventAccumulator:
    """The TensorBoard run in a folder."""
    assert list(run.glob("events.out.tfevents.*"))
    return EventAccumulator(str(run)).Reload()


@pytest.mark.slow
def test_digits_prints_one_table_and_counts_bytes(tmp_path, capsys):
    pytest.importorskip("sklearn")
    digits = load("digits")
    size = ["--workers", "3", "--interval", "24", "--steps", "60", "--seeds", "2", "--logdir", str(tmp_path)]
    rows = digits.main(size)

    table = capsys.readouterr().out.splitlines()
    assert [row.run for row in rows] == ["one worker", "diloco", "data parallel"]
    assert [line.split("  ")[0] for line in table] == ["run", *(row.run for row in rows)]

    L.seed_everything(0, verbose=False)
    model = digits.DigitsCNN(lr=0.1)
    images, labels = next(iter(digits.DigitsData(8).val_dataloader()))
    at_start = torch.nn.functional.cross_entropy(model.net(images), labels).item()
    for row, line in zip(rows, table[1:], strict=True):
        assert all(0.3 < accuracy <= 1 for accuracy in row.accuracy)
        assert all(0 < loss < at_start for loss in row.loss)
        (a, b), sd = row.loss, abs(row.loss[0] - row.loss[1]) / math.sqrt(2)
        assert a != b
        assert f" {(a + b) / 2:.4f} ± {sd:.4f} " in line
    # 60 steps in rounds of 24: two rounds and the flush; a gradient has as many bytes as the parameters
    assert [row.bytes_sent for row in rows] == [0, 3 * parameter_bytes(model), 60 * parameter_bytes(model)]
    for row in rows:
        tags = scalars(tmp_path / row.run / "seed 1").Tags()["scalars"]
        assert {"train_loss", "val_loss", "val_acc"} <= set(tags)
        assert ("diloco/drift" in tags) == (row.run == "diloco")


@pytest.mark.slow
@pytest.mark.parametrize("plain", [False, True])
def test_byte_gpt_learns_and_counts_bytes(plain, tmp_path, capsys):
    byte_gpt = load("byte_gpt")
    size = (
        "--layers 1 --width 32 --heads 2 --context 16 --megabytes 0.05 --workers 2 --interval 10 --steps 25 --lr 3e-3"
    )
    argv = [*size.split(), "--logdir", str(tmp_path), *(["--plain"] if plain else [])]
    (result,) = byte_gpt.main(argv)
    model, data = byte_gpt.build(byte_gpt.parse(argv))
    val = data.val_dataloader()

    out = capsys.readouterr().out
    assert all(name in out for name in result)
    assert result["parameters"] == sum(p.numel() for p in model.parameters())
    assert result["bytes_sent_per_worker"] == (0 if plain else 3 * parameter_bytes(model))
    with torch.no_grad():
        at_start = sum(model.loss(window).item() for window in val) / len(val)
    assert at_start == pytest.approx(math.log(256), abs=0.5)
    assert 0 < result["val_loss"] < at_start - 0.5
    assert result["bits_per_byte"] == pytest.approx(result["val_loss"] / math.log(2))

    events = scalars(tmp_path / ("plain" if plain else "diloco") / "seed 0")
    assert ("diloco/drift" in events.Tags()["scalars"]) != plain
    if not plain:
        assert len(events.Scalars("diloco/drift")) == 3
        assert events.Scalars("diloco_by_bytes/train_loss")[-1].step == result["bytes_sent_per_worker"]


TINY = {
    "digits": "--workers 2 --interval 3 --steps 6 --seeds 2",
    "byte_gpt": "--layers 1 --width 16 --context 8 --megabytes 0.02 --workers 2 --interval 3 --steps 6 --seeds 2",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_the_outer_optimizer_is_an_option(name, tmp_path, capsys):
    """With lr 0 no outer step moves θ, however many there are; the defaults, given, are the defaults."""
    pytest.importorskip("sklearn")
    example = load(name)

    def losses(*options: str) -> list[float]:
        found = example.main([*TINY[name].split(), "--logdir", str(tmp_path), *options])
        return found[1].loss if name == "digits" else [result["val_loss"] for result in found]

    default = losses()
    assert default == losses("--outer-lr", "0.7", "--outer-momentum", "0.9")
    still, plain = losses("--outer-lr", "0"), losses("--outer-lr", "1", "--outer-momentum", "0")
    assert len({tuple(found) for found in (default, still, plain)}) == 3
    assert losses("--seed", "1", "--seeds", "1", "--steps", "3", "--outer-lr", "0") == still[1:]
    assert "±" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["digits", "byte_gpt"])
def test_the_strategy_is_one_line(name):
    source = (EXAMPLES / f"{name}.py").read_text()
    assert source.count("lightning_diloco") == 1
    assert "\nfrom lightning_diloco import DilocoStrategy\n" in source
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    (made,) = [call for call in calls if getattr(call.func, "id", None) == "DilocoStrategy"]
    assert made.lineno == made.end_lineno


@pytest.mark.slow
def test_byte_gpt_holds_out_text_it_never_trains_on():
    byte_gpt = load("byte_gpt")
    _, data = byte_gpt.build(byte_gpt.parse(["--megabytes", "0.05", "--context", "16"]))
    train, val = data.train_dataloader(), data.val_dataloader()
    text = byte_gpt.standard_library(0.05)
    assert len(text) == 50_000
    pieces = train.dataset[len(train.dataset) - 1], val.dataset[0], val.dataset[len(val.dataset) - 1]
    starts = [(len(train.dataset) - 1) * 4, 47_500, 47_500 + (len(val.dataset) - 1) * val.dataset.stride]
    for piece, start in zip(pieces, starts, strict=True):
        assert torch.equal(piece, text[start : start + 17])
    assert starts[0] + 17 <= 47_500
    assert starts[2] + 17 <= 50_000


@pytest.fixture
def cluster_example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(EXAMPLES)
    module = load("cluster")
    monkeypatch.setitem(sys.modules, "cluster", module)  # as when it is run: the folder names its functions
    return module


def test_seconds_on_other_links_are_those_of_the_closed_form(cluster_example: ModuleType) -> None:
    """T per step; a ring of three: 4/3 of the bytes, four hops of 0.1 ms; twelve steps are two rounds and a flush."""
    found = cluster_example.seconds_after(12, 3, 5, 300_000, cluster_example.links(0.01))
    ring = 4 / 3 * 8 * 300_000 / 0.01e9 + 4 * 1e-4
    syncs = [0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 3]
    assert found == pytest.approx([0.01 * step + ring * n for step, n in enumerate(syncs)], rel=0, abs=1e-12)


def test_measured_points_lie_on_the_models_lines(cluster_example: ModuleType) -> None:
    """Within two points of utilisation, with constants fitted to all of them."""
    ax = cluster_example.plt.figure().subplots()
    cluster_example.utilisation_measured(ax)
    lines, circles = ax.lines[::2], ax.lines[1::2]
    assert [line.get_label().split(",")[0] for line in circles] == ["H = 1", "H = 8", "H = 32", "H = 128"]
    for line, points in zip(lines, circles, strict=True):
        assert list(points.get_xdata()) == [0.2, 1.0, 5.0]
        on_line = [float(y) for y in np.interp(np.log(points.get_xdata()), np.log(line.get_xdata()), line.get_ydata())]
        assert on_line == pytest.approx(list(points.get_ydata()), abs=2)
    cluster_example.plt.close("all")


@pytest.mark.slow
def test_the_clusters_figure_has_the_seconds_of_the_runs_and_is_taken_up_again(
    cluster_example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--workers", "2", "--intervals", "2", "3", "--steps", "5", "--seeds", "1"]
    argv += ["--folder", str(tmp_path / "runs"), "--figure", str(tmp_path / "figure.svg")]
    results = cluster_example.main(argv)
    out = capsys.readouterr().out
    data = results["links"].data
    assert list(data["run"].unique()) == ["data parallel", "DiLoCo, H=2", "DiLoCo, H=3"]
    for name in results["links"].runs:
        rows = data[data["run"] == name].drop_duplicates("step", keep="last")  # the validation after the flush
        replayed = cluster_example.seconds_after(
            *cluster_example.shape(results["links"], name), cluster_example.links(1.0)
        )
        assert [replayed[step] for step in rows["step"]] == rows["simulated_seconds"].tolist()  # bit for bit
    assert list(results["drop"].runs) == ["0% lost", "10% lost", "30% lost", "50% lost"]
    assert "| s at 0.05 Gbit/s |" in out
    assert "| val_loss − 0% lost |" in out
    picture = (tmp_path / "figure.svg").read_text()
    assert all(f">{gbit_s:g} Gbit/s<" in picture for gbit_s in cluster_example.BANDWIDTHS)

    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").rglob("*seed*.json")}
    assert len(files) == 3 + 4
    cluster_example.main(argv)
    assert {file: file.stat().st_mtime_ns for file in files} == files  # nothing was trained again


def test_losses_are_drawn_with_the_seed_of_a_run(cluster_example: ModuleType) -> None:
    seeds = []
    for seed in (3, 4, 3):
        L.seed_everything(seed, verbose=False)
        seeds.append(cluster_example.dropping(0.3, 2)._settings.cluster.availability.seed)
    assert seeds == [3, 4, 3]


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="bytes are counted where Linux counts them")
def test_traffic_matches_the_closed_form_and_is_an_hth_of_ddps(tmp_path):
    done = script(str(EXAMPLES / "traffic.py"), "--steps", "40", "--interval", "10", folder=tmp_path)
    assert done.returncode in (0, -signal.SIGABRT), done.stderr  # gloo's threads may abort it after its work
    rows = [line.split() for line in done.stdout.replace(",", "").splitlines()[1:4]]
    for row, transfers, agreements in zip(rows, (40, 4, 4), (0.01, 0.02, 0.2), strict=True):
        assert int(row[-4]) == transfers
        assert int(row[-2]) <= int(row[-3]) <= (1 + agreements) * int(row[-2])
    assert float(rows[0][-1]) / float(rows[1][-1]) == pytest.approx(10, rel=0.03)
    assert int(rows[1][-2]) / int(rows[2][-2]) == pytest.approx(8, rel=0.01)  # four bits
