"""Figures of a comparison: a metric over steps, samples, bytes, seconds, with its spread over seeds.

Owns the drawing. It uses matplotlib's objects only: no window opens, and no figure stays behind in ``pyplot``.
"""

from collections.abc import Sequence
from typing import Any, Literal

from lightning_diloco.comparison.requirements import needed

X = Literal["step", "samples", "bytes", "seconds", "simulated_seconds"]
_LABELS = {
    "step": "local steps of a worker",
    "samples": "samples, all workers together",
    "bytes": "bytes sent per worker",
    "seconds": "seconds of training, workers in turn",
    "simulated_seconds": "seconds of training on the cluster, simulated",
}
_LEVELS = {"bytes": "sends nothing", "simulated_seconds": "has no clock"}
# Okabe and Ito's colours, which colour-blind readers can tell apart, in the order of their contrast to white
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLES = ("-", "--", ":", "-.")


def draw(frame: Any, y: str, x: X, runs: Sequence[str], ax: Any = None) -> Any:
    """Draws a line of means and a band of ± one standard deviation per run.

    Args:
        frame: the comparison's DataFrame.
        y: a column of ``frame``.
        x: the column below it.
        runs: whom to draw, in this order.
        ax: matplotlib Axes to draw on; None: those of a new figure.

    Returns:
        The Axes.
    """
    if ax is None:
        ax = needed("matplotlib.figure", "A figure").Figure(figsize=(6.4, 4.0), layout="constrained").subplots()
    # at the last step of a fit the validation after it takes the place of the last one within it
    frame = frame.drop_duplicates(["run", "seed", "step"], keep="last")
    for i, name in enumerate(runs):
        look = {"color": _COLOURS[i % len(_COLOURS)], "linestyle": _STYLES[i // len(_COLOURS) % len(_STYLES)]}
        seeds = frame[frame["run"] == name].groupby("step")
        mean, sd, at = seeds[y].mean(), seeds[y].std(ddof=1).fillna(0.0), seeds[x].mean()
        nowhere = x in _LEVELS and not at.iloc[-1] > 0  # no place on the axis: the level that others are compared with
        if nowhere:
            ax.axhline(mean.iloc[-1], label=f"{name} ({_LEVELS[x]})", lw=1.5, **look)
            ax.axhspan(mean.iloc[-1] - sd.iloc[-1], mean.iloc[-1] + sd.iloc[-1], color=look["color"], alpha=0.15, lw=0)
            continue
        shown = at > 0 if x == "bytes" else at >= 0
        mean, sd, at = mean[shown], sd[shown], at[shown]
        ax.plot(at.to_numpy(), mean.to_numpy(), label=name, lw=1.5, marker="o", ms=3, **look)  # one point is seen, too
        lower, upper = (mean - sd).to_numpy(), (mean + sd).to_numpy()
        ax.fill_between(at.to_numpy(), lower, upper, color=look["color"], alpha=0.15, lw=0)
    if x == "bytes":
        ax.set_xscale("log")
    ax.set_xlabel(_LABELS[x])
    seeds_in = frame["seed"].nunique()
    ax.set_ylabel(y if seeds_in < 2 else f"{y} (mean ± sd of {seeds_in} seeds)")
    ax.grid(alpha=0.25, lw=0.5)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    ax.legend(frameon=False, fontsize="small")
    return ax
