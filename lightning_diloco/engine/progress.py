"""How far the workers are within a batch, and which of them an error has interrupted.

Owns the rule when a batch is a local step, and the state of a torn step: a file that is saved after an error holds
workers at different steps, and a resumed run finishes the step for the others. Imports nothing of Lightning.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from lightning_diloco.engine.file_format import TornState
from lightning_diloco.state.replicas import ModelState
from lightning_diloco.state.worker import Worker


class BatchProgress:
    """The workers within the present batch.

    Attributes:
        stepped: whether an optimizer has stepped since the last local step was counted.
        done: workers whose ``training_step`` for the batch is over.
        counted: whether the batch has been counted already; further steps of optimizers belong to that local step.
        moved_late: whether there were such further steps since the last local step was counted.
        in_outer_step: whether an error interrupted the outer step.
        exact: whether a run that resumes from a torn step is bit for bit the undisturbed one.
        manual: whether workers may step several times in a batch (manual optimization).
    """

    def __init__(self) -> None:
        self.stepped = False
        self.done: set[int] = set()
        self.counted = False
        self.moved_late = False
        self.in_outer_step = False
        self.exact = True
        self.manual = False
        self._stepped_in_turn = False

    def note_step(self) -> None:
        """An optimizer stepped, or would have, had its scaler let it."""
        if self.counted:
            self.moved_late = True
        else:
            self.stepped = self._stepped_in_turn = True

    def forget(self) -> None:
        """The batch is over: counted as a local step, or without a step."""
        self.stepped, self.exact = False, True
        self.done = set()

    @contextmanager
    def turn(self, worker: int, worker_state: Worker, state: ModelState) -> Iterator[None]:
        """A worker's turn; an error inside leaves the worker as before the turn, as far as that can be done."""
        stream, random = worker_state.stream, None if worker_state.stream is None else worker_state.stream.state
        gradients = dict(worker_state.gradients)
        traces = _traces(gradients, state)
        self._stepped_in_turn = False
        try:
            yield
        except BaseException:
            if self._stepped_in_turn:  # the step can't be taken back
                self.done.add(worker)
                self.exact = self.exact and not self.manual
            elif worker in self.done:
                self.exact = self.exact and not self.manual  # in a later hook, which a resumed run calls again
            else:
                if stream is not None and random is not None:
                    stream.state = random
                worker_state.gradients = gradients
                self.exact = self.exact and _traces(gradients, state) == traces
            raise

    # ---------------------------------------------------------------------------------------- in a checkpoint

    def state_dict(self, local_steps: int, workers: list[int]) -> TornState:
        """The state of a torn step, with a warning that says who has taken it.

        Args:
            local_steps: local steps that were counted.
            workers: global ids of the workers hosted here.
        """
        step = local_steps + 1
        if self.in_outer_step:
            warnings.warn(
                f"The outer step after {step} local steps was interrupted, so θ in the checkpoint may be half moved. No"
                " run can resume from this file; take the last one before it.",
                stacklevel=4,
            )
        elif self.done:
            left = [w for w in workers if w not in self.done]
            exactly = "" if self.exact else " It is not bit for bit the undisturbed run: an error cut a turn short."
            warnings.warn(
                f"Local step {step} was interrupted: the checkpoint holds worker {_listed(sorted(self.done))} after its"
                f" batch and worker {_listed(left)} before it. A run that resumes from the file finishes the step"
                f" first.{exactly}",
                stacklevel=4,
            )
        elif not self.exact:
            warnings.warn(
                f"Local step {step} was interrupted in a worker's turn that had changed gradients or buffers: a run"
                " that resumes from the checkpoint is not bit for bit the undisturbed one.",
                stacklevel=4,
            )
        return {"workers": sorted(self.done), "stepped": self.stepped, "outer_step": self.in_outer_step}

    def load_state_dict(self, state: TornState) -> None:
        """The reverse of :meth:`state_dict`."""
        self.done, self.stepped = set(state["workers"]), state["stepped"]


def _traces(gradients: dict[Any, Tensor], state: ModelState) -> Any:
    return (
        [(id(g), g._version) for g in gradients.values()],
        [(key, id(b), b._version) for key, b in state.named_buffers()],
    )


def _listed(workers: list[int]) -> str:
    return ", ".join(map(str, workers)) or "none"
