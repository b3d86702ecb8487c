"""How long a run would take: simulated machines, links, and a clock. Imports nothing of the rest of the package."""

from lightning_diloco.cluster.cluster import NETWORKS, Cluster
from lightning_diloco.cluster.patterns import PATTERNS, Pattern

__all__ = ["NETWORKS", "PATTERNS", "Cluster", "Pattern"]
