"""Does TensorBoard read back what is documented, at the right steps, with the right values?"""

import io
import json
import re
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import yaml
from helpers import Net, loader, trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from processes import free_port, run
from telemetry import LAYERS, expected, joined, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import metadata

from lightning_diloco import Availability, Cast, Cluster, DilocoCallback, DilocoStrategy, DropOut, StreamingDiloco
from lightning_diloco.reporting.metrics import OF_CLUSTER, SCALARS

COUNTERS = {"diloco/outer_step", "diloco/samples", "diloco/comm_bytes"}
CLUSTER = Cluster(step_seconds=0.1, bandwidth_gbit_s=0.001, latency_ms=5)
SECONDS = {"diloco/inner_seconds", "diloco/waiting_seconds", "diloco/outer_seconds"}


def board(folder: Path) -> EventAccumulator:
    (file,) = folder.glob("events.out.tfevents.*")
    return EventAccumulator(str(file), size_guidance={"scalars": 0, "images": 0, "tensors": 0}).Reload()


def points(events: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events.Scalars(tag)]


def close(found: list[tuple[int, float]], wanted: list[tuple[int, float]], what: str) -> None:
    """TensorBoard stores float32."""
    assert [step for step, _ in found] == [step for step, _ in wanted], what
    assert [v for _, v in found] == pytest.approx([v for _, v in wanted], rel=1e-6, abs=1e-7), what


def check_board(run_of: dict[str, Any], options: dict[str, Any] | None = None, pairs: bool = True) -> set[str]:
    """Every scalar that was written, but the seconds, is the one that is expected; returns the tags."""
    events, wanted = board(run_of["folder"]), expected(run_of, **options or {}, pairs=pairs)
    ends = [arrival["report"].step - 1 for arrival in run_of["arrived"]]
    tags = set(events.Tags()["scalars"])
    curves: dict[str, list[tuple[int, float]]] = {}
    for step, row in zip(ends, wanted, strict=True):
        for tag, value in row.items():
            if tag != "matrix" and tag not in COUNTERS:
                curves.setdefault(tag, []).append((step, value))
    losses = [row.get("diloco/train_loss") for row in wanted]
    pairs_of = list(zip(run_of["arrived"], losses, strict=True))
    curves["diloco_by_samples/train_loss"] = [(a["seen"], loss) for a, loss in pairs_of if loss is not None]
    curves["diloco_by_bytes/train_loss"] = [(a["bytes"], loss) for a, loss in pairs_of if loss is not None]
    validations = [(step, row["val_loss"]) for step, row in run_of["rows"] if "val_loss" in row]
    workers = 1 + max(run_of["sent"][0]["weights"])
    curves["diloco_by_samples/val_loss"] = [(workers * 4 * (step + 1), value) for step, value in validations]
    entries = [(e.local_step, e.payload_bytes) for e in run_of["ledger"].entries]
    sent = [(sum(n for at, n in entries if at <= step + 1), value) for step, value in validations]
    curves["diloco_by_bytes/val_loss"] = [(n, value) for n, value in sent if n]
    curves["val_loss"] = validations
    assert tags - SECONDS - {"epoch"} == curves.keys()
    for tag, curve in curves.items():
        close(points(events, tag), curve, tag)
    seconds = points(events, "diloco/outer_seconds")
    close(seconds, [(s, a["report"].seconds) for s, a in zip(ends, run_of["arrived"], strict=True)], "seconds")
    return tags


def test_every_tag_has_the_right_steps_and_values(tmp_path: Path) -> None:
    run_of = train(tmp_path)
    check_board(run_of)
    # three rounds of 8 bytes per parameter, running mean and variance: both axes are those of the closed forms
    size = 8 * sum(v.numel() for k, v in run_of["weights"].items() if "num_batches" not in k)
    events = board(run_of["folder"])
    assert [s for s, _ in points(events, "diloco_by_bytes/train_loss")] == [size, 2 * size, 3 * size]
    assert [s for s, _ in points(events, "diloco_by_samples/train_loss")] == [4 * 4 * t for t in (3, 6, 8)]
    assert [s for s, _ in points(events, "diloco/drift")] == [2, 5, 7]


@pytest.mark.slow
def test_with_a_codec_and_drop_out_and_in_fragments(tmp_path: Path) -> None:
    check_board(
        train(tmp_path / "codec", make=lambda: {"codec": Cast("bf16")}),
        {"decode": lambda x: x.bfloat16().double()},
    )
    check_board(train(tmp_path / "drop", make=lambda: {"participation": DropOut(0.5)}))
    streaming = lambda: {"algorithm": StreamingDiloco(2, delay=1), "final_sync": False}  # noqa: E731
    check_board(train(tmp_path / "streaming", make=streaming))


@pytest.mark.processes
def test_over_two_processes_the_first_one_writes(tmp_path: Path) -> None:
    ranks = run(lambda: train(tmp_path, 2), 2, out=tmp_path / "results")
    assert check_board(joined(ranks)) >= {f"diloco_workers/norm/worker_{w}" for w in range(4)}


# ---------------------------------------------------------------------------------------- what is documented


def documented() -> dict[str, str]:
    """Tag as the class's table has it → what the table says."""
    text = DilocoCallback.__doc__ or ""
    rows = text[text.index("====") : text.index("The values go straight")]
    return dict(re.findall(r"^ +``(\S+)`` +(\S.*)$", rows, re.MULTILINE))


def test_the_clusters_numbers_are_those_of_the_reports(tmp_path: Path) -> None:
    """Worker 1 is away from step 2 to 4, and worker 2's part in the last transfer is lost."""
    events = [
        {"kind": "leave", "step": 2, "worker": 1},
        {"kind": "join", "step": 5, "worker": 1},
        {"kind": "drop", "step": 8, "worker": 2},
    ]
    run_of = train(tmp_path, make=lambda: {"cluster": replace(CLUSTER, availability=Availability(events))})
    found = board(run_of["folder"])
    wanted = {
        "alive": [3, 4, 4],
        "participating": [3, 4, 4],
        "committed": [3, 4, 3],
        "lost_steps": [1, 1, 1],
    }
    for name, values in wanted.items():
        close(points(found, f"diloco/{name}"), list(zip([2, 5, 7], values, strict=True)), name)
    reports = [arrival["report"] for arrival in run_of["arrived"]]
    for name in ("compute_utilisation", "join_bytes"):
        close(points(found, f"diloco/{name}"), [(r.step - 1, getattr(r, name)) for r in reports], name)
    assert reports[0].join_bytes == 0 < reports[1].join_bytes
    in_csv = [row["diloco/simulated_seconds"] for _, row in run_of["rows"] if "diloco/simulated_seconds" in row]
    assert in_csv == pytest.approx([r.simulated_seconds for r in reports], rel=1e-12)


def test_the_table_lists_exactly_what_is_written(tmp_path: Path) -> None:
    run_of = train(tmp_path, make=lambda: {"cluster": CLUSTER})
    events = board(run_of["folder"])
    in_rows = {tag for _, row in run_of["rows"] for tag in row if tag.startswith("diloco")}
    written = in_rows | {t for t in events.Tags()["scalars"] if t.startswith("diloco")} | set(events.Tags()["images"])
    general = set()
    for tag in written:
        tag = re.sub(r"^diloco_layers/\w+/.+", "diloco_layers/<quantity>/<layer>", tag)
        tag = re.sub(r"worker_[1-9]\d*$", "worker_0", tag)
        general.add(tag.replace("val_loss", "train_loss"))
    table = documented()
    assert {t.replace("…", "worker_0") for t in table} == general
    quantities = (DilocoCallback.__doc__ or "").split("of every layer: ")[1].split("``")[0]
    assert set(re.findall(r"\w+", quantities)) == {t.split("/")[1] for t in written if t.startswith("diloco_layers")}
    for tag, words in table.items():  # what TensorBoard alone has, and what it lacks, is said
        assert ("TensorBoard only" in words) == (tag.startswith("diloco_by") or tag == "diloco/cosine_matrix"), tag
    assert {*SCALARS, *OF_CLUSTER} == {tag for tag in table if tag.startswith("diloco/")} - {"diloco/cosine_matrix"}
    guide = (Path(__file__).parents[1] / "examples" / "guides" / "tensorboard.md").read_text()
    assert set(re.findall(r"^\| `(diloco\S+)`", guide, re.MULTILINE)) == set(table)


# ---------------------------------------------------------------------------------------- images


def test_the_matrix_is_a_picture_of_the_cosines(tmp_path: Path) -> None:
    run_of = train(tmp_path)
    events = board(run_of["folder"]).Images("diloco/cosine_matrix")
    assert [event.step for event in events] == [2, 5, 7]
    for event, row in zip(events, expected(run_of), strict=True):
        pixels = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)).convert("RGB")).astype(float)
        assert pixels.shape == (256, 256, 3)
        for i in range(4):
            for j in range(4):
                cosine = row["matrix"][i][j]
                full = np.array([178, 24, 43] if cosine > 0 else [33, 102, 172])
                square = pixels[64 * i : 64 * i + 64, 64 * j : 64 * j + 64]
                assert np.abs(square - (255 + abs(cosine) * (full - 255))).max() <= 0.5 + 1e-9, (i, j)


def test_who_sees_no_pairs_draws_none(tmp_path: Path) -> None:
    assert not board(train(tmp_path, make=lambda: {"num_nodes": 1})["folder"]).Tags()["images"]


# ---------------------------------------------------------------------------------------- custom scalars


def test_the_layout_has_a_chart_per_quantity_with_all_workers(tmp_path: Path) -> None:
    events = board(train(tmp_path)["folder"])
    (tensor,) = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(tensor.tensor_proto.string_val[0])
    charts = {c.title: {chart.title: list(chart.multiline.tag) for chart in c.chart} for c in layout.category}
    assert list(charts) == ["DiLoCo: workers", "DiLoCo: layers"]
    shown: set[str] = set()
    tags = events.Tags()["scalars"]
    for section, title, ends in (
        ("diloco_workers", "DiLoCo: workers", [f"worker_{w}" for w in range(4)]),
        ("diloco_layers", "DiLoCo: layers", list(LAYERS)),
    ):
        for quantity, (pattern,) in charts[title].items():
            matching = {tag for tag in tags if re.match(pattern, tag)}
            assert matching == {f"{section}/{quantity}/{end}" for end in ends}
            assert re.match(pattern, f"mine-{section}/{quantity}/{ends[0]}"), "a prefix of the logger"
            shown |= matching
    assert shown == {tag for tag in tags if tag.startswith(("diloco_workers/", "diloco_layers/"))}


def test_switches_of_what_only_tensorboard_has(tmp_path: Path) -> None:
    off = {"images": False, "layout": False, "hyperparameters": False, "axes": False}
    tags = board(train(tmp_path, make=lambda: {"switches": off})["folder"]).Tags()
    assert not tags["images"]
    assert not tags["tensors"]
    assert "diloco/drift" in tags["scalars"]
    assert not [tag for tag in tags["scalars"] if tag.startswith("diloco_by")]


# ---------------------------------------------------------------------------------------- hyperparameters


class WithHparams(Net):
    def __init__(self, width: int = 8, options: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters()


class Data(L.LightningDataModule):
    def __init__(self, batch_size: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self) -> Any:
        return loader(batch_size=self.hparams.batch_size)


def session(folder: Path) -> dict[str, Any]:
    """The hyperparameters that TensorBoard shows: those it has read first."""
    content = board(folder).PluginTagToContent("hparams")
    info = metadata.parse_session_start_info_plugin_data(content[metadata.SESSION_START_INFO_TAG])
    return {key: getattr(value, value.WhichOneof("kind")) for key, value in info.hparams.items()}


def fit(folder: Path, strategy: Any, module: Any, callbacks: Any = (), **kwargs: Any) -> Path:
    logger = TensorBoardLogger(folder, name=None, version="run")
    t = trainer(strategy, logger=logger, callbacks=list(callbacks), max_steps=4, max_epochs=-1, **kwargs)
    t.fit(module, datamodule=Data())
    return folder / "run"


def test_a_run_has_the_hyperparameters_of_module_data_and_strategy(tmp_path: Path) -> None:
    options = {"depth": {"inner": 3}, "names": ["a", "b"], "flag": True, "missing": None}
    plain = fit(tmp_path / "plain", "auto", WithHparams(16, options))
    diloco = fit(tmp_path / "diloco", DilocoStrategy(num_nodes=2, diloco_interval=2), WithHparams(16, options))
    before, found = session(plain), session(diloco)
    ours = {key.removeprefix("diloco/"): value for key, value in found.items() if key.startswith("diloco/")}
    assert {key: value for key, value in found.items() if not key.startswith("diloco/")} == before
    assert {"width", "options/depth/inner", "batch_size"} <= before.keys()
    assert ours == {
        "num_nodes": 2.0,
        "diloco_interval": 2.0,
        "algorithm": "Diloco()",
        "outer_optimizer_cls": "SGD",
        "outer_lr": 0.7,
        "outer_momentum": 0.9,
        "outer_optimizer_kwargs": ours["outer_optimizer_kwargs"],
        "codec": "None",
        "participation": "None",
        "partition": "None",
        "policies/eval_weights": "average",
        "policies/buffers": "average",
        "policies/inner_state": "keep",
        "policies/nonfinite": "raise",
        "policies/share_frozen": "False",
        "policies/final_sync": "True",
        "policies/reduction": "auto",
        "policies/diagnostics": "True",
        "policies/weights": "uniform",
        "policies/cluster": "None",
    }
    assert "lr=0.7, momentum=0.9, nesterov=True" in ours["outer_optimizer_kwargs"]
    text = yaml.unsafe_load((diloco / "hparams.yaml").read_text())
    assert text["diloco/num_nodes"] == 2
    assert text["width"] == 16
    tags = board(diloco).Tags()["scalars"]
    assert [tag for tag in tags if tag.startswith("hp_")] == ["hp_metric"]  # of Lightning, for the module's


def test_a_module_without_hyperparameters_gets_a_row_and_no_empty_metric(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name=None, version="run")
    t = trainer(DilocoStrategy(num_nodes=2, diloco_interval=2), logger=logger, max_steps=2, max_epochs=-1)
    t.fit(Net(), loader())
    found = session(tmp_path / "run")
    assert found["diloco/num_nodes"] == 2
    assert all(key.startswith("diloco/") for key in found)
    assert "hp_metric" not in board(tmp_path / "run").Tags()["scalars"]


def test_runs_of_all_kinds_have_the_same_columns(tmp_path: Path) -> None:
    """TensorBoard takes the columns from one of the runs."""
    one = fit(tmp_path / "one", DilocoStrategy(num_nodes=2, diloco_interval=2), WithHparams())
    streaming = DilocoStrategy(2, 2, algorithm=StreamingDiloco(2, delay=1), codec=Cast("bf16"))
    other = fit(tmp_path / "other", streaming, WithHparams())
    assert session(one).keys() == session(other).keys()
    found = session(other)
    assert found["diloco/algorithm"].startswith("StreamingDiloco(fragments=2, delay=1, alpha=0.0")
    assert (found["diloco/codec"], found["diloco/outer_lr"]) == ("Cast(dtype='bf16')", 0.4)


def test_other_loggers_get_them_too(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name=None, version="run")
    t = trainer(DilocoStrategy(num_nodes=2, diloco_interval=2), logger=logger, max_steps=2, max_epochs=-1)
    t.fit(WithHparams(), loader())
    text = yaml.unsafe_load((tmp_path / "run" / "hparams.yaml").read_text())
    assert (text["width"], text["diloco/diloco_interval"], text["diloco/outer_momentum"]) == (8, 2, 0.9)


@pytest.mark.parametrize("how", ["switch", "Trainer", "plain run"])
def test_without_them_the_row_is_lightnings(how: str, tmp_path: Path) -> None:
    strategy: Any = DilocoStrategy(num_nodes=2, diloco_interval=2)
    callback = DilocoCallback(hyperparameters=how != "switch")
    if how == "plain run":
        strategy = DilocoStrategy(num_nodes=1, diloco_interval=2, outer_optimizer_kwargs={"lr": 1.0})
    kwargs = {"enable_autolog_hparams": False} if how == "Trainer" else {}
    folder = fit(tmp_path, strategy, WithHparams(), [callback], **kwargs)
    if how == "Trainer":
        assert "hparams" not in board(folder).summary_metadata
        assert not [m for m in board(folder).summary_metadata if "hparams" in m]
    else:
        assert session(folder).keys() == {"width", "options", "batch_size"}


def test_a_tuner_logs_none(tmp_path: Path) -> None:
    class Tunable(Net):
        def __init__(self) -> None:
            super().__init__()
            self.lr = 1e-3

    logger = TensorBoardLogger(tmp_path, name=None, version="run")
    t = trainer(DilocoStrategy(num_nodes=2, diloco_interval=2), logger=logger, max_steps=4, max_epochs=-1)
    L.pytorch.tuner.Tuner(t).lr_find(Tunable(), loader(), num_training=3, update_attr=False)
    assert not list((tmp_path / "run").glob("events*")) or not [
        tag for tag in board(tmp_path / "run").summary_metadata if "hparams" in tag or "diloco" in tag
    ]


@pytest.mark.slow
@pytest.mark.processes
def test_a_real_server_shows_a_row_per_run(tmp_path: Path) -> None:
    for name, interval in (("a", 2), ("b", 4)):
        strategy = DilocoStrategy(num_nodes=2, diloco_interval=interval)
        t = trainer(strategy, logger=TensorBoardLogger(tmp_path, name=None, version=name), max_steps=4, max_epochs=-1)
        t.fit(WithHparams(), datamodule=Data())
    port = free_port()
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(tmp_path), "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        rows = _rows(port, 2)
    finally:
        server.terminate()
        server.wait()
    assert sorted((row["diloco/diloco_interval"], row["width"], row["batch_size"]) for row in rows) == [
        (2, 8, 4), (4, 8, 4),
    ]  # fmt: skip
    assert {row["metric diloco/train_loss"] is not None for row in rows} == {True}


def _rows(port: int, wanted: int) -> list[dict[str, Any]]:
    """What the page HParams asks for."""

    def ask(question: str, body: dict[str, Any]) -> Any:
        url = f"http://127.0.0.1:{port}/data/plugin/hparams/{question}"
        request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)

    deadline = time.monotonic() + 120
    while True:
        try:
            experiment = ask("experiment", {"experimentName": ""})
            columns = [{"metric": m["name"]} for m in experiment.get("metricInfos", [])]
            body = {"experimentName": "", "colParams": columns, "startIndex": 0, "sliceSize": 10}
            body["allowedStatuses"] = ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING"]
            groups = ask("session_groups", body).get("sessionGroups", [])
            if len(groups) == wanted:
                break
        except OSError:
            groups = []
        assert time.monotonic() < deadline, "the server shows no runs"
        time.sleep(0.5)
    return [
        {**g["hparams"], **{f"metric {m['name']['tag']}": m.get("value") for m in g.get("metricValues", [])}}
        for g in groups
    ]
