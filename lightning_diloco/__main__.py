"""``python -m lightning_diloco``: a LightningCLI with DilocoStrategy at hand.

Owns the command line only. Model and data are any LightningModule and LightningDataModule, named by class path::

    python -m lightning_diloco fit --config examples/configs/digits.yaml --trainer.strategy.diloco_interval 20
    python -m lightning_diloco fit --trainer.strategy.help DilocoStrategy
"""

from lightning.pytorch.cli import LightningCLI
from lightning_utilities.core.imports import RequirementCache

import lightning_diloco  # noqa: F401 (registers the strategy)

_REQUIREMENT = RequirementCache("jsonargparse[signatures]>=4.39")


def main(args: list[str] | None = None) -> LightningCLI:
    """Runs the subcommand in ``args``.

    Args:
        args: what stands behind the program's name; None: the process's own arguments.

    Raises:
        SystemExit: the arguments don't fit, or jsonargparse is missing.
    """
    if not _REQUIREMENT:
        raise SystemExit(
            'The command line needs jsonargparse. Install it with: pip install "lightning-diloco[cli]"'
            f"\n({_REQUIREMENT})"
        )
    return LightningCLI(
        subclass_mode_model=True,
        subclass_mode_data=True,
        parser_kwargs={
            "prog": "python -m lightning_diloco",
            "description": "Trains and evaluates any LightningModule on any LightningDataModule, named by class path:"
            " Lightning's command line, with DilocoStrategy among the strategies.",
            "fit": {
                "description": "Trains a model, with N simulated DiLoCo workers under `--trainer.strategy"
                " DilocoStrategy`; `--trainer.strategy.help DilocoStrategy` lists the strategy's arguments."
            },
        },
        args=args,
    )


if __name__ == "__main__":
    main()
