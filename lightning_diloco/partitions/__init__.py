"""Which samples each worker owns: arguments for ``DilocoStrategy(partition=...)``.

Callables ``(dataset, num_workers) →`` a list of indices per worker. Every sample goes to exactly one worker, no worker
is without samples, and the same seed gives the same lists in all versions of Python, NumPy and torch.
"""

from lightning_diloco.partitions.rules import ByKey, ByLabel, BySize, Dirichlet

__all__ = ["ByKey", "ByLabel", "BySize", "Dirichlet"]
