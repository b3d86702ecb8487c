"""``python -m lightning_diloco``: a LightningCLI with DilocoStrategy at hand, comparisons, and plans without a run.

Owns the command line only; those of ``compare`` and ``plan`` are in ``comparison/`` and ``cluster/``. Model and data
are any LightningModule and LightningDataModule, named by class path::

    python -m lightning_diloco fit --config examples/configs/digits.yaml --trainer.strategy.diloco_interval 20
    python -m lightning_diloco fit --trainer.strategy.help DilocoStrategy
    python -m lightning_diloco compare --config examples/configs/compare_digits.yaml
    python -m lightning_diloco plan --parameters 1e9 --step-seconds 0.1 --bandwidth-gbit-s 1
"""

import sys

from lightning.pytorch.cli import LightningCLI
from lightning_utilities.core.imports import RequirementCache

import lightning_diloco  # noqa: F401 (registers the strategy)
from lightning_diloco.cluster import command as plan
from lightning_diloco.comparison import Comparison

_REQUIREMENT = RequirementCache("jsonargparse[signatures]>=4.39")


def main(args: list[str] | None = None) -> LightningCLI | Comparison | None:
    """Runs the subcommand in ``args``: one of Lightning's, ``compare`` or ``plan``.

    Args:
        args: what stands behind the program's name; None: the process's own arguments.

    Returns:
        Lightning's command line after it ran, or the comparison; None after ``plan``.

    Raises:
        SystemExit: the arguments don't fit, or jsonargparse is missing.
    """
    given = sys.argv[1:] if args is None else args
    if given[:1] == ["plan"]:
        plan.main(given[1:])
        return None
    if not _REQUIREMENT:
        raise SystemExit(
            'The command line needs jsonargparse. Install it with: pip install "lightning-diloco[cli]"'
            f"\n({_REQUIREMENT})"
        )
    if given[:1] == ["compare"]:
        from lightning_diloco.comparison import command  # needs jsonargparse

        return command.main(given[1:])
    return LightningCLI(
        subclass_mode_model=True,
        subclass_mode_data=True,
        parser_kwargs={
            "prog": "python -m lightning_diloco",
            "description": "Trains and evaluates any LightningModule on any LightningDataModule, named by class path:"
            " Lightning's command line, with DilocoStrategy among the strategies. Two further subcommands:"
            " `compare` trains several runs with several seeds and makes a table and a figure of them; `plan` says how"
            " long a run would take, and which bandwidth it needs; see `python -m lightning_diloco compare --help`.",
            "fit": {
                "description": "Trains a model, with N simulated DiLoCo workers under `--trainer.strategy"
                " DilocoStrategy`; `--trainer.strategy.help DilocoStrategy` lists the strategy's arguments."
            },
        },
        args=args,
    )


if __name__ == "__main__":
    main()
