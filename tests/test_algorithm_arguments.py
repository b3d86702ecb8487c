"""Are wrong arguments of algorithms, and settings that they can't serve, named?"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from family import train

from lightning_diloco import (
    FP4,
    GPA,
    DataParallel,
    DeMo,
    DesLoc,
    Eager,
    ErrorFeedback,
    FedAdagrad,
    FedAdam,
    FedYogi,
    Hierarchical,
    NoLoCo,
    SlowMo,
    Sparta,
    StreamingDiloco,
)

REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: Sparta(1.5), r"^Sparta: `p` \(=1.5\) must be a number from 0"),
    (lambda: Sparta(True), r"^Sparta: `p` \(=True\)"),
    (lambda: Sparta(float("nan")), r"^Sparta: `p` \(=nan\)"),
    (lambda: Sparta(0.1, 0), r"^Sparta: `every` \(=0\) must be an integer ≥ 1"),
    (lambda: Sparta(0.1, beside=Eager()), r"^Sparta: `beside` \(=Eager\) must measure Δ_i from θ"),
    (lambda: Sparta(0.1, beside=Sparta()), r"^Sparta: `beside` \(=Sparta\)"),
    (lambda: Sparta(0.1, beside=DataParallel()), r"^Sparta: `beside` \(=DataParallel\)"),
    (lambda: NoLoCo(-0.1), r"^NoLoCo: `lr` \(=-0.1\) must be a number ≥ 0"),
    (lambda: NoLoCo(momentum=1), r"^NoLoCo: `momentum` \(=1\) must be a number from 0 to below 1"),
    (lambda: NoLoCo(gamma="0.1"), r"^NoLoCo: `gamma` \(='0.1'\) must be a number ≥ 0"),
    (lambda: NoLoCo(group=1), r"^NoLoCo: `group` \(=1\) must be an integer ≥ 2"),
    (lambda: SlowMo(1.0), r"^SlowMo: `beta` \(=1.0\) must be a number from 0 to below 1"),
    (lambda: SlowMo(0.5, 0), r"^SlowMo: `alpha` \(=0\) must be a number > 0"),
    (lambda: Hierarchical(0), r"^Hierarchical: `every` \(=0\) must be an integer ≥ 1"),
    (lambda: Hierarchical(2, 0), r"^Hierarchical: `groups` \(=0\) must be a number of groups ≥ 1"),
    (lambda: Hierarchical(2, [[0], []]), r"^Hierarchical: `groups` \(=\[\[0\], \[\]\]\) must be a number"),
    (lambda: GPA(1.0), r"^GPA: `mu_x` \(=1.0\) must be a number from 0 to below 1"),
    (lambda: GPA(0.9, -1), r"^GPA: `mu_y` \(=-1\) must be a number from 0 to 1"),
    (lambda: FedAdam([torch.nn.Parameter(torch.ones(1))], -1.0), r"^FedAdam: `lr` \(=-1.0\) must be ≥ 0"),
    (lambda: FedYogi([torch.nn.Parameter(torch.ones(1))], 0.1, (0.9, 1.0)), r"^FedYogi: `betas` \(=\(0.9, 1.0\)\)"),
    (lambda: FedAdagrad([torch.nn.Parameter(torch.ones(1))], 0.1, tau=0.0), r"^FedAdagrad: `tau` \(=0.0\) must be > 0"),
    (lambda: DeMo(clip=0), r"^DeMo: `clip` \(=0\) must be a number > 0"),
    (lambda: DeMo(k=0), r"^DCT: `k` \(=0\) must be an integer ≥ 1"),
    (lambda: DeMo(1.5), r"^ErrorFeedback: `decay` \(=1.5\) must be a number in \(0, 1\]"),
    (lambda: DesLoc(0), r"^DesLoc: `exp_avg_interval` \(=0\) must be an integer ≥ 1"),
    (lambda: DesLoc(None, 2.5), r"^DesLoc: `exp_avg_sq_interval` \(=2.5\) must be an integer ≥ 1"),
]


@pytest.mark.parametrize(("make", "text"), REFUSED, ids=[text for _, text in REFUSED])
def test_wrong_arguments_are_named(make: Callable[[], Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()


REFUSED_LATER: list[tuple[Callable[[], dict[str, Any]], str]] = [
    (lambda: {"algorithm": Sparta(), "inner_state": "reset"}, r"^`inner_state` \(='reset'\) would touch"),
    (lambda: {"algorithm": Hierarchical(6)}, r"^Hierarchical: `every` \(=6\) must be less than `diloco_interval`"),
    (lambda: {"algorithm": Hierarchical(2, 5)}, r"^Hierarchical: `groups` \(=5\) must put each of the workers 0 to 3"),
    (lambda: {"algorithm": Hierarchical(2, [[0, 1], [1, 2, 3]])}, r"^Hierarchical: `groups` \(=.*\) must put each"),
    (lambda: {"algorithm": GPA(), "eval_weights": "outer"}, r"^GPA trains a single worker, but `num_nodes` is 4"),
    (lambda: {"algorithm": GPA(), "num_workers": 1}, r"^`eval_weights` \(='average'\) would show where"),
    (lambda: {"algorithm": NoLoCo(group=5)}, r"^NoLoCo: `group` \(=5\) must be at most `num_nodes` \(=4\)"),
    (lambda: {"algorithm": DesLoc(), "inner_state": "average"}, r"^`inner_state` \(='average'\) would undo"),
    (lambda: {"algorithm": Sparta(), "codec": ErrorFeedback(FP4())}, r"^`codec` \(=ErrorFeedback.*\) keeps an error"),
    (
        lambda: {"algorithm": Sparta(beside=StreamingDiloco(99))},
        r"^StreamingDiloco: `fragments` \(=99\) must be at most `diloco_interval`",
    ),
]


@pytest.mark.parametrize(("settings", "text"), REFUSED_LATER, ids=[text for _, text in REFUSED_LATER])
def test_settings_that_an_algorithm_cannot_serve_are_named(
    settings: Callable[[], dict[str, Any]], text: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=text):
        train(tmp_path, steps=1, **settings())
