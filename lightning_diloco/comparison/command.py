"""``python -m lightning_diloco compare``: a comparison described in YAML.

Owns the command line of comparisons. Model, data, Trainer and strategies are written as for LightningCLI, by class path
and arguments; each run makes them afresh from there.
"""

import argparse
import copy
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import lightning as L
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace

from lightning_diloco.cluster import Cluster
from lightning_diloco.comparison.comparing import compare
from lightning_diloco.comparison.requirements import needed
from lightning_diloco.comparison.results import Comparison
from lightning_diloco.comparison.runs import Run, grid
from lightning_diloco.strategy import DilocoStrategy

_DESCRIPTION = """\
Trains several runs with several seeds under the same conditions, and writes table.md, table.tex, figure.svg and
data.csv into the folder. Started again after an interruption, it goes on where it was. For example:

  python -m lightning_diloco compare --config examples/configs/compare_digits.yaml --seeds 2

A run is one of, under its name in `runs`:

  plain                          one worker, without DilocoStrategy
  same samples                   one worker that trains on as many samples as the N workers of the other runs
  DataParallel                   as many data-parallel workers as the other runs have
  {num_nodes: 4, ...}            arguments of DilocoStrategy
  {grid: {num_nodes: 4, diloco_interval: [5, 20], ...}}
                                 a run for each combination of the arguments that are lists
  {strategy: {...}, times: 1, trainer: {...}, module: {...}, data: {...}}
                                 arguments of DilocoStrategy; how many times as long; arguments of its own for Trainer,
                                 model and data
"""


@dataclass(frozen=True)
class Configured:
    """Makes an object, or the arguments of a class, from YAML; can be sent to other processes.

    Args:
        base: what the object must be an instance of; with ``arguments_only`` the class whose arguments these are.
        config: class path and arguments, or the arguments.
        arguments_only: return the arguments in place of an object.
    """

    base: type
    config: Mapping[str, Any]
    arguments_only: bool = False

    def __call__(self, **changes: Any) -> Any:
        name, parser = self.base.__name__, ArgumentParser(exit_on_error=False)
        if self.arguments_only:
            config = {**self.config, **changes}
            parser.add_class_arguments(self.base, name, fail_untyped=False, instantiate=False)
        else:
            config = {**self.config, "init_args": {**(self.config.get("init_args") or {}), **changes}}
            parser.add_subclass_arguments(self.base, name)
        instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # until jsonargparse 4.48
        try:
            made = instantiate(parser.parse_object({name: copy.deepcopy(config)}))[name]
        except argparse.ArgumentError as error:
            raise ValueError(str(error)) from error
        return {key: made[key] for key in config} if self.arguments_only else made

    def __repr__(self) -> str:
        return f"{self.config}"


class _Help(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the lines of the description."""


def main(args: Sequence[str] | None = None) -> Comparison:
    """Runs the comparison that ``args`` describe, prints the table, and writes table, figure and data.

    Args:
        args: what stands behind ``compare``; None: the process's own arguments.

    Raises:
        SystemExit: the arguments don't fit.
    """
    parser = _parser()
    given = parser.parse_args(args)
    try:
        for module, purpose in (("pandas", "`compare`"), ("matplotlib", "The figure")):
            needed(module, purpose)
        comparison = compare(
            Configured(L.LightningModule, _plain(given.model)),
            Configured(L.LightningDataModule, _plain(given.data)),
            _runs(given.runs, given.cluster),
            trainer=Configured(L.Trainer, _plain(given.trainer), arguments_only=True),
            folder=given.folder,
            seeds=given.seeds,
            processes=given.processes,
            progress_bar=given.progress_bar,
            cluster=_cluster(given.cluster),
        )
        table = comparison.table(given.metrics, given.against, given.format)
        y = given.metrics[0] if given.metrics else comparison.metrics[0]
        axes = comparison.plot(y, given.x)
    except (ValueError, ModuleNotFoundError) as error:
        parser.error(str(error))
    folder = Path(given.folder)
    (folder / "table.md").write_text(f"{table.to_markdown()}\n", encoding="utf-8")
    (folder / "table.tex").write_text(f"{table.to_latex()}\n", encoding="utf-8")
    comparison.data.to_csv(folder / "data.csv", index=False)
    axes.figure.savefig(folder / "figure.svg")
    print(table)
    print(f"\n{folder}: table.md, table.tex, figure.svg, data.csv")
    return comparison


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m lightning_diloco compare", description=_DESCRIPTION, formatter_class=_Help)
    parser.add_argument("--config", action="config", help="YAML file with the arguments below")
    parser.add_subclass_arguments(L.LightningModule, "model", required=True, help="class path and arguments")
    parser.add_subclass_arguments(L.LightningDataModule, "data", required=True, help="class path and arguments")
    # `dict`, not `dict[str, Any]`: for Any, jsonargparse completes whatever looks like a class path with arguments
    parser.add_argument("--runs", type=dict, required=True, help="what to compare, by name; see above")
    parser.add_argument(
        "--trainer", type=dict, required=True, help="arguments of Lightning's Trainer, the same for all runs"
    )
    parser.add_argument("--folder", type=str, required=True, help="of the finished runs, table and figure")
    parser.add_argument("--seeds", type=int | list[int], default=5, help="how many, from 0, or which")
    parser.add_argument("--processes", type=int, default=1, help="how many runs are trained at a time")
    parser.add_argument("--progress_bar", type=bool, default=True, help="show how many runs are finished")
    parser.add_argument(
        "--metrics", type=list[str] | None, default=None, help="for the table, the first for the figure; default: all"
    )
    parser.add_argument("--against", type=str | None, default=None, help="run from which differences are taken")
    parser.add_argument("--format", type=str | dict[str, str], default=".4f", help="of numbers, or one per metric")
    parser.add_argument(
        "--x",
        type=Literal["step", "samples", "bytes", "seconds", "simulated_seconds"],
        default="step",
        help="axis of the figure",
    )
    parser.add_argument(
        "--cluster",
        type=Cluster | None,
        default=None,
        help="simulated machines of the runs that have none of their own",
    )
    return parser


def _plain(config: Any) -> dict[str, Any]:
    """A part of the configuration as a dict of plain values; the command line gives numbers as strings."""
    values = dict(config.as_dict() if isinstance(config, Namespace) else config)
    return {name: _parsed(value) if isinstance(value, str) else value for name, value in values.items()}


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _cluster(given: Namespace | None) -> Cluster | None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--cluster", type=Cluster | None)
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # until jsonargparse 4.48
    parsed = parser.parse_object({"cluster": None if given is None else given.as_dict()})
    return cast("Cluster | None", instantiate(parsed).cluster)


def _runs(given: Mapping[str, Any], cluster: Namespace | None) -> dict[str, Any]:
    """The runs of ``compare``, whose strategies are made from YAML."""
    shared = {} if cluster is None else {"cluster": cluster.as_dict()}
    runs: dict[str, Any] = {}
    for name, spec in given.items():
        if not isinstance(spec, Mapping):
            runs[name] = spec
        elif "grid" in spec:
            if len(spec) > 1:
                raise ValueError(f"`runs[{name!r}]` has {sorted(spec)}: beside `grid` there can be nothing else.")
            runs |= {label: Run(_strategy(label, shared | made)) for label, made in grid(name, **spec["grid"]).items()}
        elif spec.keys() & {"strategy", "times", "trainer", "module"} or isinstance(spec.get("data"), Mapping):
            unknown = spec.keys() - set(inspect.signature(Run).parameters)
            if unknown:
                raise ValueError(
                    f"`runs[{name!r}]` has {sorted(unknown)}; a run has strategy, times, trainer, module, data."
                )
            strategy = spec.get("strategy")
            runs[name] = Run(**{**spec, "strategy": None if strategy is None else _strategy(name, shared | strategy)})
        else:
            runs[name] = Run(_strategy(name, shared | dict(spec)))
    return runs


def _strategy(name: str, arguments: Mapping[str, Any]) -> Configured:
    made = Configured(DilocoStrategy, {"class_path": "lightning_diloco.DilocoStrategy", "init_args": dict(arguments)})
    try:
        made()
    except ValueError as error:
        raise ValueError(f"`runs[{name!r}]`: {error}") from error
    return made
