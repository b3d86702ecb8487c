"""How long a run would take: simulated machines, links, and a clock. Imports nothing of the rest of the package."""

from lightning_diloco.cluster.availability import Availability, Event
from lightning_diloco.cluster.clock import Clock
from lightning_diloco.cluster.cluster import NETWORKS, Cluster
from lightning_diloco.cluster.patterns import PATTERNS, Pattern
from lightning_diloco.cluster.replay import WorkerSeconds
from lightning_diloco.cluster.schedule import Attendance, Schedule
from lightning_diloco.cluster.tally import Tally

__all__ = [
    "NETWORKS",
    "PATTERNS",
    "Attendance",
    "Availability",
    "Clock",
    "Cluster",
    "Event",
    "Pattern",
    "Schedule",
    "Tally",
    "WorkerSeconds",
]
