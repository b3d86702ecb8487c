"""Learning rates of workers that don't step together: each follows the schedule on its own local steps.

Owns the record of what schedulers and callbacks have changed between turns, and the rule by which workers adopt it: a
change that was made when the run had taken k local steps is a worker's when it has taken k local steps itself. Does not
own the changes' discovery, nor the values in the optimizers (``optimizers.py``). Imports nothing of Lightning.

The live optimizers show the latest values between turns, whichever worker's state they hold: a scheduler computes the
next learning rate from the present one.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lightning_diloco.comm.tensors import copied

Control = list[dict[str, Any]]


class Change(NamedTuple):
    """Entries of an optimizer's group that were changed.

    Attributes:
        step: local steps that the run had taken.
        position: of the optimizer, or of the scheduler that workers step.
        group: of the optimizer.
        values: the entries.
    """

    step: int
    position: int
    group: int
    values: dict[str, Any]


class OwnSteps:
    """Local steps of each worker, and the changes that each has adopted.

    Args:
        num_workers: N.
        restarts: whether workers may start anew, and need all changes from the beginning.

    Attributes:
        steps: local steps of the run.
        counts: of each worker: those that its inner optimizer state has seen.
        initial: control state of the optimizers before the first local step.
    """

    def __init__(self, num_workers: int, restarts: bool = True) -> None:
        self._restarts = restarts
        self.steps, self.counts = 0, [0] * num_workers
        self.initial: list[Control] = []
        self._changes: list[Change] = []
        self._latest: dict[tuple[int, int], dict[str, Any]] = {}  # (position, group) → values
        self._adopted = [0] * num_workers

    def stepped(self, workers: Iterable[int]) -> None:
        """The run has taken a local step, in which ``workers`` stepped."""
        self.steps += 1
        for w in workers:
            self.counts[w] += 1

    def take_back(self, counts: Sequence[int]) -> None:
        """The last local step doesn't count: an error came between."""
        self.steps -= 1
        self.counts = list(counts)

    def note(self, position: int, group: int, values: dict[str, Any]) -> None:
        """A change was found."""
        self._changes.append(Change(self.steps, position, group, values))
        self._latest.setdefault((position, group), {}).update(values)

    def due(self, worker: int) -> Iterator[Change]:
        """The changes that ``worker`` adopts now; each once."""
        while self._adopted[worker] < len(self._changes):
            change = self._changes[self._adopted[worker]]
            if change.step > self.counts[worker]:
                return
            self._adopted[worker] += 1
            yield change
            self._drop()

    def _drop(self) -> None:
        """Forgets the changes that all have adopted."""
        past = 0 if self._restarts else min(self._adopted)
        del self._changes[:past]
        self._adopted = [adopted - past for adopted in self._adopted]

    def shown(self, worker: int, position: int, control: Control) -> Control:
        """``control`` of ``worker``, with the latest values if it has not adopted all."""
        if self._adopted[worker] == len(self._changes):
            return control
        return [{**values, **copied(self._latest.get((position, g), {}))} for g, values in enumerate(control)]

    def restart(self, worker: int) -> None:
        """``worker`` has taken no local step yet."""
        self.counts[worker] = self._adopted[worker] = 0

    def follow(self, worker: int, donor: int) -> None:
        """``worker`` takes over the state of ``donor``, which has adopted all that is due."""
        self.counts[worker], self._adopted[worker] = self.counts[donor], self._adopted[donor]

    def forget(self) -> None:
        """Other optimizers are live: what was changed in the former ones is no longer to be adopted."""
        self._changes.clear()
        self._latest.clear()
        self._adopted = [0] * len(self._adopted)

    # ---------------------------------------------------------------------------------------- files

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors, for a file."""
        changes = [list(copied(change, plain=True)) for change in self._changes]
        return {
            "steps": self.steps,
            "counts": list(self.counts),
            "adopted": list(self._adopted),
            "changes": changes,
            "initial": copied(self.initial, plain=True),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from :meth:`state_dict`; workers that it doesn't have have kept up with the run."""
        n, known = len(self.counts), len(state["counts"])
        self.steps = state["steps"]
        self.initial = copied(state["initial"])
        self.forget()
        for change in state["changes"]:
            self._changes.append(Change(*copied(change)))
            self._latest.setdefault((change[1], change[2]), {}).update(copied(change[3]))
        self.counts = [*state["counts"][:n], *[self.steps] * max(0, n - known)]
        self._adopted = [*state["adopted"][:n], *[len(self._changes)] * max(0, n - known)]


def apply(change: Change, control: Sequence[Control]) -> None:
    """Writes a change into a worker's control state."""
    of_optimizer = control[change.position]
    while len(of_optimizer) <= change.group:
        of_optimizer.append({})
    of_optimizer[change.group].update(copied(change.values))
