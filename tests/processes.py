"""Runs a function in several forked processes that Lightning takes for those of one machine, or of several.

And scripts, in processes that a server forks, which has imported Lightning: a new Python takes seconds for that.
"""

import atexit
import contextlib
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from warm import run_script, start_copies

FORK = multiprocessing.get_context("fork")
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["lightning.pytorch.demos.boring_classes", "lightning_diloco"])
LIMIT = 120  # seconds that a set of processes may take


def free_port() -> int:
    """A free port below those that Linux gives to sockets that ask for any; each call draws anew, whatever the seed.

    Several pytest processes and their gloo sockets run side by side: a port that Linux had chosen might be given away
    again before the process group listens on it.
    """
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port


def environment(rank: int, size: int, port: int, machines: int = 1) -> dict[str, str]:
    """What a launcher tells the process with global rank ``rank`` of ``size``, spread over ``machines``."""
    per_machine = size // machines
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank % per_machine),
        "NODE_RANK": str(rank // per_machine),
    }


def _child(function: Callable[..., Any], rank: int, size: int, port: int, machines: int, args: Any, out: Path) -> None:
    os.environ.update(environment(rank, size, port, machines))
    torch.set_num_threads(1)
    try:
        outcome = ("returned", function(*args))
    except BaseException as error:
        outcome = ("raised", f"{type(error).__name__}: {error}")
        traceback.print_exc()
    torch.save(outcome, out / f"rank{rank}.tmp")
    os.rename(out / f"rank{rank}.tmp", out / f"rank{rank}.pt")
    os._exit(0 if outcome[0] == "returned" else 1)


def start(function: Callable[..., Any], size: int, args: Any, out: Path, machines: int = 1) -> list[Any]:
    """The processes, started."""
    out.mkdir(parents=True, exist_ok=True)
    port = free_port()
    children: list[Any] = [
        FORK.Process(target=_child, args=(function, rank, size, port, machines, args, out)) for rank in range(size)
    ]
    for child in children:
        child.start()
    return children


def outcomes(children: list[Any], out: Path, limit: float = LIMIT) -> list[tuple[str, Any] | None]:
    """By rank: ("returned", value), ("raised", "Type: message"), or None for a process that was killed."""
    deadline = time.monotonic() + limit
    for child in children:
        child.join(max(0.1, deadline - time.monotonic()))
    hanging = [rank for rank, child in enumerate(children) if child.is_alive()]
    for child in children:
        child.kill()
        child.join()
    assert not hanging, f"ranks {hanging} hang"
    files = [out / f"rank{rank}.pt" for rank in range(len(children))]
    return [torch.load(f, weights_only=False) if f.exists() else None for f in files]


def run(function: Callable[..., Any], size: int, *args: Any, out: Path, machines: int = 1) -> list[Any]:
    """What ``function(*args)`` returns on every rank; with size 1 it runs here."""
    if size == 1:
        return [function(*args)]
    results = outcomes(start(function, size, args, out, machines), out)
    failed = {rank: outcome for rank, outcome in enumerate(results) if outcome is None or outcome[0] != "returned"}
    assert not failed, failed
    return [outcome[1] for outcome in results if outcome is not None]


def in_a_process(function: Callable[[], Any], out: Path) -> Any:
    """What ``function()`` returns in one forked process: for what changes a process for good."""
    (outcome,) = outcomes(start(function, 1, (), out), out)
    assert outcome is not None, "the process was killed"
    kind, value = outcome
    assert kind == "returned", value
    return value


def _script(arguments: list[str], folder: Path, out: Path, environment: dict[str, str], copies: bool) -> None:
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(out / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND), descriptor)
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which the server ignores
    if copies:
        start_copies()
    try:
        run_script(arguments, environment)
    finally:
        atexit._run_exitfuncs()


def start_script(
    *arguments: str,
    folder: Path | None = None,
    out: Path | None = None,
    environment: Mapping[str, str] | None = None,
    copies: bool = True,
) -> Any:
    """A process that does what ``python`` with these arguments does in a folder, its output in files in ``out``.

    Those that it starts are ``copies``, if so; see ``warm.py``.
    """
    folder = folder or Path.cwd()
    args = (list(arguments), folder, out or folder, dict(os.environ if environment is None else environment), copies)
    process = SERVER.Process(target=_script, args=args)
    process.start()
    return process


def script(*arguments: str, limit: float = LIMIT, **options: Any) -> subprocess.CompletedProcess[str]:
    """The same, when it has ended."""
    process = start_script(*arguments, **options)
    process.join(limit)
    if process.is_alive():
        process.kill()
        process.join()
    out = options.get("out") or options.get("folder") or Path.cwd()
    said = [(out / name).read_text() for name in ("stdout", "stderr")]
    return subprocess.CompletedProcess(arguments, process.exitcode, *said)
