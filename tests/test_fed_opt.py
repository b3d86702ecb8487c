"""FedOpt's server optimizers: by hand, and in YAML?"""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cases import given
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_diloco import DilocoStrategy, FedAdagrad, FedAdam, FedYogi


def test_server_optimizers_by_hand() -> None:
    """τ = 1, g = 2 and then 1; η = 1; β₁ = 0, so that m = g. v starts at 1.

    Adagrad: v = 5, 6. Adam, β₂ = ½: v = ½ + 2 = 2.5, then 1.25 + ½ = 1.75.
    Yogi, β₂ = ½: v = 1 + ½·4 = 3, as 1 < 4; then 3 − ½·1 = 2.5, as 3 > 1.
    """
    expected = {FedAdagrad: (5.0, 6.0), FedAdam: (2.5, 1.75), FedYogi: (3.0, 2.5)}
    for cls, seconds in expected.items():
        p, other = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
        made: Any = cls([p, other], 1.0, 0.0 if cls is FedAdagrad else (0.0, 0.5), 1.0)
        at = 0.0
        for gradient, v in zip((2.0, 1.0), seconds, strict=True):
            p.grad = torch.full((1,), gradient)
            assert made.step(lambda: 7.0) == 7.0
            at -= gradient / (v**0.5 + 1)
            assert made.state[p]["exp_avg_sq"].item() == pytest.approx(v)
            assert p.item() == pytest.approx(at)
        assert other.item() == 0.0
        assert other not in made.state


@pytest.mark.parametrize("cls", [FedAdam, FedYogi, FedAdagrad])
def test_server_optimizers_need_a_learning_rate(cls: Any) -> None:
    with pytest.raises(ValueError, match=r"The outer optimizer can't be built: .*missing 1 required .* 'lr'"):
        DilocoStrategy(2, 2, outer_optimizer_cls=cls)


def test_server_optimizers_in_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("jsonargparse")
    monkeypatch.setattr(sys, "argv", ["python -m lightning_diloco"])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    path = tmp_path / "given.yaml"
    outer = {"outer_optimizer_cls": "lightning_diloco.FedYogi", "outer_optimizer_kwargs": {"lr": 0.25}}
    strategy = given("DilocoStrategy", num_nodes=2, **outer)
    path.write_text(yaml.safe_dump({"trainer": {"strategy": strategy, "accelerator": "cpu", "logger": False}}))
    cli = LightningCLI(BoringModel, args=[f"--config={path}"], run=False, seed_everything_default=False)
    assert cli.trainer.strategy._settings.outer_factory([torch.nn.Parameter(torch.ones(1))]).defaults == {
        **{"lr": 0.25, "betas": (0.9, 0.99), "tau": 1e-3}
    }
