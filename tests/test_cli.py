"""Does the strategy work by name, from the command line and from YAML, and does the command line speak for itself?"""

import inspect
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from lightning_utilities.core.imports import RequirementCache
from processes import script

import lightning_diloco.__main__ as command_line
from lightning_diloco import Availability, Cluster, Diloco, DilocoStrategy

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(set((ROOT / "examples" / "configs").glob("*.yaml")) - {ROOT / "examples/configs/compare_digits.yaml"})
STRATEGY = "--trainer.strategy"
BORING = "--model=lightning.pytorch.demos.boring_classes.BoringModel"
QUIET = [
    "--seed_everything=1",
    "--trainer.accelerator=cpu",
    "--trainer.logger=false",
    "--trainer.enable_checkpointing=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]


@pytest.fixture(autouse=True)
def _from_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if started in the repository, whose ``examples`` are then importable, and without pytest's arguments."""
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.setattr(sys, "argv", ["python -m lightning_diloco"])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # of Lightning's own use of it


def fit(*args: str) -> DilocoStrategy:
    """The strategy after ``python -m lightning_diloco fit`` with these arguments."""
    strategy = command_line.main(["fit", *args, *QUIET]).trainer.strategy
    assert isinstance(strategy, DilocoStrategy)
    return strategy


def printed_config(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        command_line.main(["fit", *args, "--print_config"])
    assert stopped.value.code == 0
    return capsys.readouterr().out


def refusal(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        command_line.main(["fit", *args, *QUIET])
    assert stopped.value.code == 2
    return capsys.readouterr().err


def config(tmp_path: Path, **strategy: Any) -> str:
    """A YAML file with these ``init_args`` of the strategy."""
    path = tmp_path / "given.yaml"
    given = {"class_path": "lightning_diloco.DilocoStrategy", "init_args": strategy}
    path.write_text(yaml.safe_dump({"trainer": {"strategy": given}}))
    return f"--config={path}"


# -------------------------------------------------------------------------------------------- ways to name it


def test_by_class_name_and_arguments() -> None:
    options = [STRATEGY, "DilocoStrategy", f"{STRATEGY}.num_nodes", "3", f"{STRATEGY}.diloco_interval", "5"]
    strategy = fit(BORING, "--trainer.max_steps=12", *options)
    assert (strategy.num_workers, strategy.local_steps, strategy.outer_steps) == (3, 12, 3)


def test_by_registered_name() -> None:
    strategy = fit(BORING, "--trainer.max_steps=2", f"{STRATEGY}=diloco")
    assert (strategy.num_workers, strategy.local_steps, strategy.outer_steps) == (4, 2, 1)


def test_existing_scripts_need_no_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """A LightningCLI of somebody else's, whose script imports the package, in the ordinary, not the subclass mode."""
    from lightning.pytorch.demos.boring_classes import BoringModel

    options = [f"{STRATEGY}=DilocoStrategy", f"{STRATEGY}.num_nodes=2", f"{STRATEGY}.diloco_interval=2"]
    cli = LightningCLI(BoringModel, args=["fit", *QUIET, "--trainer.max_steps=5", *options])
    assert (cli.trainer.strategy.num_workers, cli.trainer.strategy.outer_steps) == (2, 3)


OUTER: list[tuple[dict[str, Any], type, dict[str, Any]]] = [
    ({}, torch.optim.SGD, {"lr": 0.7, "momentum": 0.9, "nesterov": True}),
    ({"outer_optimizer_cls": "torch.optim.SGD"}, torch.optim.SGD, {"lr": 0.7, "momentum": 0.9, "nesterov": True}),
    (
        {"outer_optimizer_cls": "torch.optim.SGD", "outer_optimizer_kwargs": {"lr": 0.5}},
        torch.optim.SGD,
        {"lr": 0.5, "momentum": 0.0, "nesterov": False},
    ),
    ({"outer_optimizer_cls": "torch.optim.Adam"}, torch.optim.Adam, {"lr": 0.001}),
    (
        {"outer_optimizer_cls": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.25, "momentum": 0.5}}},
        torch.optim.SGD,
        {"lr": 0.25, "momentum": 0.5, "nesterov": False},
    ),
    ({"outer_optimizer_cls": "SGD"}, torch.optim.SGD, {"lr": 0.001, "momentum": 0.0}),  # a callable: torch's defaults
]


@pytest.mark.parametrize(("arguments", "cls", "group"), OUTER, ids=lambda x: str(x) if isinstance(x, dict) else "")
def test_the_outer_optimizer_in_yaml(
    arguments: dict[str, Any], cls: type, group: dict[str, Any], tmp_path: Any
) -> None:
    strategy = fit(config(tmp_path, num_nodes=2, **arguments), BORING, "--trainer.max_steps=1")
    assert type(strategy.outer_optimizer) is cls
    assert group.items() <= strategy.outer_optimizer.param_groups[0].items()


class Twice(Diloco):
    """Synchronises ``times`` times as often as asked.

    Args:
        times: how many times.
    """

    def __init__(self, times: int = 2) -> None:
        self.times = times

    def after_inner_step(self, step: int) -> None:
        ctx = self.ctx
        if step % (ctx.interval // self.times) == 0:
            ctx.send(ctx.names, ctx.delta)
        for transfer in ctx.arrived():
            ctx.outer.step(transfer.names, transfer.mean)
            ctx.merge(transfer.workers, transfer.names, ctx.outer.tensors)


def test_a_nested_algorithm_and_a_partition_in_yaml(tmp_path: Path) -> None:
    nested = {"class_path": f"{__name__}.Twice", "init_args": {"times": 3}}
    options = config(
        tmp_path, num_nodes=2, diloco_interval=6, algorithm=nested, partition=f"{__name__}.halves", final_sync=False
    )
    assert fit(options, BORING, "--trainer.max_steps=7").outer_steps == 3


def halves(dataset: Any, num_workers: int) -> list[list[int]]:
    return [list(range(w, len(dataset), num_workers)) for w in range(num_workers)]


@pytest.mark.slow
def test_the_guides_cluster_and_availability_in_yaml(tmp_path: Path) -> None:
    """Parsed and run: a worker is away from step 8 to 16, so that two of six rings have four hops in place of six."""
    guide = (ROOT / "examples" / "guides" / "clock.md").read_text()
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", guide, re.MULTILINE | re.DOTALL)
    path = tmp_path / "given.yaml"
    path.write_text(block)
    strategy = fit(f"--config={path}", BORING)
    events = [{"kind": "leave", "step": 8, "worker": 3}, {"kind": "join", "step": 17, "worker": 3}]
    availability = Availability(events, drop_rate=0.1, joiner="donor")
    assert strategy.clock.cluster == Cluster(0.1, 1, 20, availability=availability)
    assert [report.alive for report in strategy.reports] == [4, 3, 3, 4, 4, 4]
    assert strategy.tally.joins == 1
    assert strategy.tally.committed < strategy.tally.participating == 22
    assert [spent.computing for spent in strategy.clock.workers] == pytest.approx([3.0, 3.0, 3.0, 2.1])
    assert strategy.clock.seconds == pytest.approx(3.0 + (4 * 6 + 2 * 4 + 1) * 0.02, abs=1e-4)  # and a hop for joining


# -------------------------------------------------------------------------------------------- what it says


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_print_config_comes_back_as_it_was(path: Path, tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("sklearn")
    overriding = [f"{STRATEGY}.num_nodes=7", f"{STRATEGY}.eval_weights=outer"]
    first = printed_config(capsys, f"--config={path}", *overriding)
    again = tmp_path / "again.yaml"
    again.write_text(first)
    assert printed_config(capsys, f"--config={again}") == first
    arguments = yaml.safe_load(first)["trainer"]["strategy"]["init_args"]
    given = yaml.safe_load(path.read_text())["trainer"]["strategy"]["init_args"]
    assert arguments["num_nodes"] == 7
    assert arguments["eval_weights"] == "outer"
    assert arguments["diloco_interval"] == given["diloco_interval"]


@pytest.mark.slow
def test_a_misspelt_key_is_refused_with_its_name(tmp_path: Path, capsys: Any) -> None:
    said = refusal(capsys, BORING, f"{STRATEGY}=DilocoStrategy", f"{STRATEGY}.diloco_intervall=5")
    assert "Option 'diloco_intervall' is not accepted" in said
    said = refusal(capsys, BORING, config(tmp_path, num_node=5))
    assert "Option 'num_node' is not accepted" in said
    nested = {"class_path": f"{__name__}.Twice", "init_args": {"time": 3}}
    assert "'time'" in refusal(capsys, BORING, config(tmp_path, algorithm=nested))


def test_bad_values_are_refused_in_the_strategys_words() -> None:
    with pytest.raises(
        ValueError, match=r"`num_nodes` \(=0\) must be an integer ≥ 1: the number of simulated workers."
    ):
        fit(BORING, f"{STRATEGY}=DilocoStrategy", f"{STRATEGY}.num_nodes=0")


def test_help_explains_every_argument(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        command_line.main(["fit", f"{STRATEGY}.help=DilocoStrategy"])
    out = " ".join(capsys.readouterr().out.split())
    assert "Trains N DiLoCo workers inside an ordinary ``Trainer.fit``" in out
    assert ":class:" not in out
    options = out.split(f" {STRATEGY}.")[1:]
    for name in inspect.signature(DilocoStrategy).parameters:
        (text,) = [o for o in options if o.startswith((f"{name} ", f"{name}+ ")) and "(type:" in o]
        said = text[: text.index("(type:")].split(maxsplit=2)  # name, placeholder, explanation
        assert len(said) == 3, f"{name}: {text}"


def test_without_jsonargparse_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command_line, "_REQUIREMENT", RequirementCache("jsonargparse>=1000"))
    with pytest.raises(SystemExit) as stopped:
        command_line.main(["fit", "--help"])
    assert str(stopped.value.code).startswith(
        'The command line needs jsonargparse. Install it with: pip install "lightning-diloco[cli]"\n'
    )


# -------------------------------------------------------------------------------------------- the configurations

SHORT = {  # what makes a configuration quick, without changing what it is about
    "digits": [],
    "byte_gpt": ["--data.megabytes=0.05", "--model.layers=1"],
}


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_the_configurations_run(path: Path) -> None:
    pytest.importorskip("sklearn")
    short = ["--trainer.max_steps=7", "--trainer.val_check_interval=5", f"{STRATEGY}.diloco_interval=3"]
    strategy = fit(f"--config={path}", *short, *SHORT[path.stem])
    assert (strategy.num_workers, strategy.local_steps, strategy.outer_steps) == (4, 7, 3)
    assert torch.isfinite(torch.cat([p.flatten() for p in strategy.outer_state_dict().values()])).all()


@pytest.mark.slow
@pytest.mark.processes
def test_the_command_of_the_readme(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    command = "python -m lightning_diloco fit --config examples/configs/digits.yaml"
    assert command in (ROOT / "README.md").read_text()
    more = [*QUIET, "--trainer.max_steps=3", f"--trainer.default_root_dir={tmp_path}"]
    done = script(*command.split()[1:], *more, folder=ROOT, out=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "`max_steps=3` reached" in done.stdout + done.stderr
