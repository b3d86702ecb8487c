"""Tables of a comparison: mean ± standard deviation over seeds, paired differences, as Markdown and LaTeX.

Owns the arithmetic of the table and its text. The frame that it reads is that of
:class:`~lightning_diloco.comparison.Comparison`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_diloco.comparison.requirements import needed


@dataclass(frozen=True)
class Table:
    """The runs of a comparison side by side; ``print`` shows it as Markdown.

    Attributes:
        header: names of the columns.
        rows: texts of the cells, row by row.
        data: the same as numbers: a DataFrame with a row per run, and the columns ``(metric, "mean" | "sd")`` and
            ``(metric, "difference" | "sd of difference")``.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    data: Any

    def to_markdown(self) -> str:
        """A pipe table whose columns are aligned in the text, too."""
        cells = [[cell.replace("|", "\\|") for cell in row] for row in (self.header, *self.rows)]
        widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["| " + " | ".join(_aligned(row, widths)) + " |" for row in cells]
        rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
        return "\n".join([lines[0], rule, *lines[1:]])

    def to_latex(self) -> str:
        """A ``tabular`` with the rules of the package booktabs."""
        lines = [" & ".join(map(_escaped, row)) + r" \\" for row in (self.header, *self.rows)]
        begin = rf"\begin{{tabular}}{{l{'r' * (len(self.header) - 1)}}}"
        return "\n".join([begin, r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule", r"\end{tabular}"])

    def __str__(self) -> str:
        return self.to_markdown()

    def _repr_markdown_(self) -> str:
        """For notebooks."""
        return self.to_markdown()


def make_table(frame: Any, metrics: Sequence[str], against: str | None, formats: Mapping[str, str]) -> Table:
    """The table of the last validations, the runs in their order in ``frame``.

    Args:
        frame: the comparison's DataFrame.
        metrics: columns of ``frame``.
        against: the run from which each seed's differences are taken; None: no differences.
        formats: format specification of each metric.
    """
    pandas = needed("pandas", "A table")
    frame = frame[frame["final"]]
    names = list(dict.fromkeys(frame["run"]))
    header = ["run", "N", "H", "samples", "bytes per worker"]
    rows = []
    for name in names:
        first = frame[frame["run"] == name].iloc[0]
        mean = frame[frame["run"] == name][["samples", "bytes"]].mean()
        interval = "–" if pandas.isna(first["diloco_interval"]) else str(int(first["diloco_interval"]))
        sizes = ["–" if pandas.isna(mean[column]) else f"{mean[column]:,.0f}" for column in ("samples", "bytes")]
        rows.append([name, str(first["num_nodes"]), interval, *sizes])
    numbers: dict[tuple[str, str], Any] = {}
    for metric in metrics:
        form = formats[metric]
        by_seed = frame.pivot(index="seed", columns="run", values=metric)[names]
        numbers[metric, "mean"], numbers[metric, "sd"] = by_seed.mean(), by_seed.std(ddof=1)
        header.append(metric)
        for row in rows:
            row.append(_spread(by_seed[row[0]], form))
        if against is not None:
            apart = by_seed.sub(by_seed[against], axis=0)
            numbers[metric, "difference"], numbers[metric, "sd of difference"] = apart.mean(), apart.std(ddof=1)
            header.append(f"{metric} − {against}")
            for row in rows:
                row.append("–" if row[0] == against else _spread(apart[row[0]], f"+{form}"))
    return Table(header, rows, pandas.DataFrame(numbers, index=pandas.Index(names, name="run")))


def _spread(values: Any, form: str) -> str:
    """Mean ± standard deviation over seeds; with a single seed it says so."""
    values = values.dropna()
    if not len(values):
        return "–"
    spread = f" ± {values.std(ddof=1):{form.removeprefix('+')}}" if len(values) > 1 else " (1 seed)"
    return f"{values.mean():{form}}{spread}"


def _aligned(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    pairs = zip(row, widths, strict=True)
    return [cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(pairs)]


_LATEX = {
    **{c: f"\\{c}" for c in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{"±": r"$\pm$", "−": "$-$", "–": "--", "θ": r"$\theta$", "Δ": r"$\Delta$"},
}


def _escaped(cell: str) -> str:
    signs = re.sub(r"(?<![\w.])-(?=\d)", "−", cell)
    return "".join(_LATEX.get(character, character) for character in signs)
