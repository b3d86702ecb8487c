"""Runs a function in several forked processes that Lightning takes for those of one machine, or of several."""

import contextlib
import multiprocessing
import os
import random
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

FORK = multiprocessing.get_context("fork")
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
