"""Several runs at a time, each in a process of its own.

Owns the processes: they are started afresh (spawn), use one thread each, take one run after the other, and end with the
process that started them, however that ends.
"""

import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from lightning_diloco.comparison.folder import Folder
from lightning_diloco.comparison.training import Task, train

Report = Callable[[Task, float | str], None]
"""Called with the completed part of a run, 0 to 1 (finished, and on disk), or with the text of its error."""


def train_in_processes(tasks: Sequence[Task], folder: Folder, processes: int, report: Report) -> None:
    """Trains the runs, ``processes`` at a time; every finished run is in the folder.

    Raises:
        ValueError: something can't be sent to another process; names it.
    """
    left = [(task, _packed(task)) for task in reversed(tasks)]
    workers = [_Process(folder) for _ in range(min(processes, len(tasks)))]
    try:
        for worker in workers:
            worker.take(*left.pop())
        while busy := {worker.connection: worker for worker in workers if worker.task is not None}:
            for connection in wait(list(busy)):
                worker = busy[connection]  # type: ignore[index]
                task, said = worker.answer()
                report(task, said)
                if worker.task is None and left:
                    if not worker.process.is_alive():
                        workers.remove(worker)
                        workers.append(worker := _Process(folder))
                    worker.take(*left.pop())
    finally:
        for worker in workers:
            worker.end()


_ENDED = (
    "The process ended (exit code {}) without a result: see its output. A script that calls `compare` with `processes`"
    ' > 1 must do so under `if __name__ == "__main__":`.'
)


class _Process:
    """A process that trains one run after the other."""

    def __init__(self, folder: Folder) -> None:
        context = multiprocessing.get_context("spawn")
        self.task: Task | None = None
        self.started = False
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, folder))
        threads = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"  # read when the new process loads its libraries
        try:
            self.process.start()
        finally:
            if threads is None:
                del os.environ["OMP_NUM_THREADS"]
            else:
                os.environ["OMP_NUM_THREADS"] = threads
        theirs.close()  # so that the end of the process is the end of the connection

    def take(self, task: Task, message: bytes) -> None:
        self.task = task
        with contextlib.suppress(ConnectionError):  # of a process that has ended, as its answer says
            self.connection.send_bytes(message)

    def answer(self) -> tuple[Task, float | str]:
        """What the process says of its run, which is over if ``task`` is None then.

        Raises:
            RuntimeError: the process has ended before it took a run, and so would any other.
        """
        assert self.task is not None
        task = self.task
        try:
            said: float | str = self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            said = _ENDED.format(self.process.exitcode)
            if not self.started:
                raise RuntimeError(said) from None
        self.started = True
        if said == 1.0 or isinstance(said, str):
            self.task = None
        return task, said

    def end(self) -> None:
        self.connection.close()  # an idle process ends
        if self.task is not None:
            self.process.kill()  # Lightning would answer a SIGTERM at the end of a batch, and may wait for another
        self.process.join()


def _serve(connection: Connection, folder: Folder) -> None:
    """The life of a process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the one that started them decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    while True:
        try:
            message = connection.recv_bytes()
        except EOFError:
            return
        try:
            connection.send(0.0)
            task: Task = pickle.loads(message)
            folder.save(task, train(task, lambda part: connection.send(min(part, 0.999))))
            answer: float | str = 1.0
        except Exception:
            answer = traceback.format_exc()
        connection.send(answer)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _packed(task: Task) -> bytes:
    parts = {"module": task.module, "data": task.data, "trainer": task.trainer, f"runs[{task.name!r}]": task.run}
    for name, part in parts.items():
        error = _hindrance(part)
        if error is not None:
            raise ValueError(
                f"`{name}` (={part!r}) can't be sent to another process: {error}. With `processes` > 1, functions and"
                " classes must stand at the top level of a module, like `functools.partial(MyModule, lr=0.1)`. Or use"
                " `processes=1`."
            ) from error
    return pickle.dumps(task)


def _hindrance(value: Any) -> Exception | None:
    try:
        pickle.dumps(value)
    except Exception as error:  # pickle has no common class for them
        return error
    return None
