"""Comparisons: several runs and seeds under the same conditions, as a table and a figure.

``compare`` trains them (``comparing.py``) and returns a ``Comparison`` (``results.py``); ``Run`` and ``grid`` say what
is compared (``runs.py``). pandas and matplotlib are imported where they are needed, not with the package.
"""

from lightning_diloco.comparison.comparing import compare
from lightning_diloco.comparison.results import Comparison
from lightning_diloco.comparison.runs import Run, grid
from lightning_diloco.comparison.tables import Table

__all__ = ["Comparison", "Run", "Table", "compare", "grid"]
