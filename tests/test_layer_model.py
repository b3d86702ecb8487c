"""Does the model by layers agree with a graph of tasks, and with the published table of bandwidths?"""

import math
import random
from itertools import pairwise
from pathlib import Path

import pytest

from lightning_diloco.cluster.layer_model import GRID_GBIT_S, LayerModel

SHARES = (0.5, 0.8, 0.9, 0.95, 0.99)
MODELS = {"1B": (24, 0.1, 1e9), "10B": (48, 0.8, 1e10), "100B": (108, 4.9, 1e11)}  # layers, seconds, parameters
# 2501.18512: Gbit/s for 50, 80, 90, 95 and 99 % compute utilisation; H = 100, three layers per fragment
PUBLISHED = """
data parallel  86.8 152.6 184.2 222.3 569.0  104.8 222.3 222.3 268.3 471.5  184.2 323.8 390.7 390.7 471.5
DiLoCo         1.4 6.2 13.3 23.3 86.8        1.7 7.5 16.0 33.9 104.8        3.0 11.0 23.3 49.4 184.2
streaming      1.4 5.2 9.1 16.0 28.1         1.7 5.2 9.1 13.3 19.3          2.4 6.2 9.1 11.0 19.3
overlap 1      1.4 4.3 6.2 9.1 11.0          1.7 3.6 5.2 6.2 7.5            1.7 3.6 4.3 5.2 5.2
overlap 1, FP4 .4 .9 1.7 2.0 3.0             .4 .9 1.4 1.4 1.7              .5 .9 1.1 1.1 1.4
"""
ROWS = {line[:14].strip(): [float(x) for x in line[14:].split()] for line in PUBLISHED.strip().splitlines()}


def by_graph(
    layers: int, seconds: float, reduction: float, interval: int, fragments: int, overlap: int, rounds: int = 240
) -> float:
    """Utilisation over the second half of many rounds: every task ends when what it waits for has ended, plus its time.

    Tasks of the machine wait for the one before, reductions for the one before and for their weights' gradient.
    """
    unit = seconds / (3 * layers)
    ends: dict[tuple[str, int, int], float] = {}
    machine = link = half = 0.0
    for step in range(rounds * interval):
        if step == rounds // 2 * interval:
            half = machine
        for layer in range(layers):
            machine = max(machine, ends.get(("reduction", step - 1 - overlap, layer), 0.0)) + unit
        for layer in reversed(range(layers)):
            if layer != 0:
                machine += unit
            machine += unit
            if step % interval == layer % fragments * (interval // fragments):
                link = ends["reduction", step, layer] = max(link, machine) + reduction
    return (rounds - rounds // 2) * interval * unit * (3 * layers - 1) / (machine - half)


def steps_apart(row: str, factor: float = 1.0) -> list[int]:
    """For each entry of a row of the table: how many steps of the grid the model is above it."""
    apart = []
    for m, (layers, seconds, parameters) in enumerate(MODELS.values()):
        model = LayerModel(
            layers,
            seconds,
            parameters,
            bits=4 if "FP4" in row else 16,
            interval=1 if row == "data parallel" else 100,
            fragments=1 if row in ("data parallel", "DiLoCo") else layers // 3,
            overlap_steps=int("overlap" in row),
            bits_factor=factor,
        )
        for share, published in zip(SHARES, ROWS[row][5 * m : 5 * m + 5], strict=True):
            nearest = min(GRID_GBIT_S, key=lambda x: abs(math.log(x / published)))
            assert abs(nearest - published) < 0.06  # the table lies on the grid, and shows one digit of it
            apart.append(GRID_GBIT_S.index(model.bandwidth_for(share)) - GRID_GBIT_S.index(nearest))
    return apart


def test_the_grid_is_the_published_one() -> None:
    assert len(GRID_GBIT_S) == 50
    assert (GRID_GBIT_S[0], GRID_GBIT_S[-1]) == (0.1, 1000)
    ratios = [b / a for a, b in pairwise(GRID_GBIT_S)]
    assert ratios == pytest.approx([10 ** (4 / 49)] * 49, rel=1e-12)


def comparison() -> tuple[str, list[int]]:
    """The table, published and how many steps of the grid our model is above it; and those steps."""
    apart = {row: steps_apart(row) for row in ROWS}
    lines = []
    for m, name in enumerate(MODELS):
        lines.append(f"{name:16}" + "".join(f"{share:.0%}".ljust(11) for share in SHARES).rstrip())
        for row, steps in apart.items():
            entries = list(zip(ROWS[row], steps, strict=True))[5 * m : 5 * m + 5]
            lines.append(f"{row:16}" + "".join(f"{x:g} {d:+d}".ljust(11) for x, d in entries).rstrip())
    return "\n".join(lines), [d for row in apart.values() for d in row]


def test_the_published_table_within_two_steps_of_the_grid() -> None:
    table, differences = comparison()
    print(f"\n{table}")
    assert len(differences) == 75
    assert max(map(abs, differences)) <= 2
    assert sum(abs(d) <= 1 for d in differences) == 73
    assert sum(d == 1 for d in differences) == 68  # as if the table named the bandwidth before the one that suffices


def test_the_guide_has_this_table() -> None:
    guide = Path(__file__).parent.parent / "examples" / "guides" / "clock.md"
    assert f"```text layers\n{comparison()[0]}\n```" in guide.read_text()


def test_a_factor_on_the_bits_brings_every_entry_within_one_step() -> None:
    differences = [d for row in ROWS for d in steps_apart(row, factor=0.85)]
    assert max(map(abs, differences)) == 1
    assert sum(d == 0 for d in differences) == 63


@pytest.mark.parametrize("seed", range(40))
def test_the_model_is_the_graph_of_its_tasks(seed: int) -> None:
    draw = random.Random(seed)
    layers, interval = draw.randint(1, 7), draw.randint(1, 9)
    fragments = draw.randint(1, min(layers, interval))
    overlap = draw.randint(0, interval - 1)
    bandwidth = 10 ** draw.uniform(-1, 2)
    model = LayerModel(layers, 0.5, 1e9, 8, interval, fragments, overlap, bits_factor=draw.choice([0.5, 1.0]))
    reduction = 1e9 / layers * 8 * model.bits_factor / (bandwidth * 1e9)
    expected = by_graph(layers, 0.5, reduction, interval, fragments, overlap)
    assert model.compute_utilisation(bandwidth) == pytest.approx(expected, rel=1e-9)


def test_two_layers_by_hand() -> None:
    """T = 6 s: tasks of 1 s; layer 0 has no backward pass for activations. A reduction takes 10 s.

    A step: forward 0 and 1 at 0 to 2, backward of layer 1 to 4, its reduction 4 to 14; backward of layer 0 to 5, its
    reduction 14 to 24. Forward 0 waits until 24. So a step takes 24 s and computes for 5; in the next one forward 1 is
    not in the way.
    """
    model = LayerModel(layers=2, step_seconds=6, parameters=2e9, bits=10, interval=1)
    assert model.compute_utilisation(1) == pytest.approx(5 / 24, rel=1e-12)
    assert LayerModel(2, 6, 2e9, 10, 1, bits_factor=0.5).compute_utilisation(1) == pytest.approx(5 / 14, rel=1e-12)


def test_limits_and_order() -> None:
    for interval, fragments, overlap in [(1, 1, 0), (10, 1, 0), (10, 4, 0), (10, 4, 3)]:
        model = LayerModel(8, 0.1, 1e9, 16, interval, fragments, overlap)
        curve = [model.compute_utilisation(x) for x in GRID_GBIT_S]
        assert curve == sorted(curve)
        assert model.compute_utilisation(1e12) == pytest.approx(1, abs=1e-6)
        link = interval * 0.1 * (1 - 1 / 24) / 16e3  # the link alone: computing / (16e9 bits at 1e6 bit/s)
        assert model.compute_utilisation(1e-3) == pytest.approx(link, rel=1e-3)
        needed = model.bandwidth_for(0.9)
        below = GRID_GBIT_S[GRID_GBIT_S.index(needed) - 1]
        assert model.compute_utilisation(below) < 0.9 <= model.compute_utilisation(needed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": 0}, "LayerModel: `layers` (=0) must be an integer ≥ 1."),
        ({"step_seconds": math.inf}, "LayerModel: `step_seconds` (=inf) must be a finite number > 0."),
        ({"bits": -4}, "LayerModel: `bits` (=-4) must be a finite number > 0."),
        ({"bits_factor": 0}, "LayerModel: `bits_factor` (=0) must be a finite number > 0."),
        (
            {"fragments": 9},
            "LayerModel: `fragments` (=9) must be at most `layers` (=8): a fragment has one layer at least.",
        ),
        (
            {"fragments": 11},
            "LayerModel: `fragments` (=11) must be at most `interval` (=10): each has a local step of its own in a"
            " round.",
        ),
        (
            {"overlap_steps": 10},
            "LayerModel: `overlap_steps` (=10) must be less than `interval` (=10): a fragment has to arrive before it"
            " is sent again.",
        ),
    ],
)
def test_what_does_not_fit_is_refused(arguments: dict[str, float], message: str) -> None:
    good = {"layers": 8, "step_seconds": 0.1, "parameters": 1e9, "bits": 16, "interval": 10}
    with pytest.raises(ValueError) as error:
        LayerModel(**{**good, **arguments})
    assert str(error.value) == message


def test_a_utilisation_that_the_grid_does_not_reach_is_refused() -> None:
    model = LayerModel(8, 0.1, 1e11, 16, 1)
    with pytest.raises(ValueError) as error:
        model.bandwidth_for(0.99)
    assert str(error.value) == (
        "LayerModel: `utilisation` (=0.99) isn't reached with 1,000 Gbit/s, the largest bandwidth of the grid, which"
        f" gives {model.compute_utilisation(GRID_GBIT_S[-1]):.4f}. Ask for less."
    )
    with pytest.raises(ValueError, match=r"^LayerModel: `bandwidth_gbit_s` \(=0\) must be a finite number > 0\.$"):
        model.compute_utilisation(0)
