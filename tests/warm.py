"""Lets a process start others as copies of itself where it would start a new Python, which takes seconds to import.

The copies run the script, or what ``multiprocessing`` sends them, as children with the output and the environment they
were to have and the random numbers of a new Python. But they have all modules that the process has imported, levels of
loggers and filters of warnings included, and its command line. So one test of every way to start processes does without
this, and what a new Python is asked for is asked of a new Python.
"""

import atexit
import contextlib
import multiprocessing.process
import multiprocessing.util
import os
import random
import runpy
import signal
import subprocess
import sys
import threading
import traceback
import types
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch

_spawn = multiprocessing.util.spawnv_passfds


def run_script(arguments: list[str], environment: Mapping[str, str]) -> None:
    """Does what ``python`` with these arguments does in the current folder."""
    os.environ.clear()
    os.environ.update(environment)
    if arguments[0] == "-m":
        sys.argv[:] = arguments[1:]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv[:] = arguments
        path = Path.cwd() / arguments[0]  # absolute: spawned processes read it, too
        sys.path.insert(0, str(path.parent))
        runpy.run_path(str(path), run_name="__main__")


def _run_and_end(run: Callable[[], None], kept: tuple[int, ...] = ()) -> None:
    """In a copy: runs, and ends the process as Python would, whatever happens."""
    status = 1
    try:
        nothing = os.open(os.devnull, os.O_RDWR)
        for descriptor in map(int, os.listdir("/proc/self/fd")):
            if descriptor > 2 and descriptor not in kept:  # not closed: objects that are gone by and by will close it
                with contextlib.suppress(OSError):
                    os.dup2(nothing, descriptor, inheritable=False)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", 1, closefd=False)  # not pytest's
        multiprocessing.process._children.clear()
        multiprocessing.util._finalizer_registry.clear()
        atexit._clear()
        atexit.register(multiprocessing.util._exit_function)
        random.seed()
        numpy.random.seed()  # noqa: NPY002
        torch.default_generator.manual_seed(67280421310721)  # which a new Python has
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        run()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except KeyboardInterrupt:
        traceback.print_exc()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            threading._shutdown()
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


class _Popen(subprocess.Popen):
    """Of a script: a copy that never gets to the new Python."""

    def __init__(self, args: Any, *more: Any, env: Mapping[str, str] | None = None, **options: Any) -> None:
        python, *arguments = ("",) if isinstance(args, str) else map(str, args)
        arguments = arguments[1:] if arguments[:1] == ["-u"] else arguments
        if python == sys.executable and arguments and (arguments[0] == "-m" or arguments[0][0] != "-"):
            run = partial(run_script, arguments, dict(os.environ if env is None else env))
            options["preexec_fn"] = partial(_run_and_end, run)
        super().__init__(args, *more, env=env, **options)


def _copy(path: Any, arguments: list[Any], kept: tuple[int, ...]) -> int:
    """For ``multiprocessing``: a process that runs the code after ``-c``."""
    arguments = [a.decode() if isinstance(a, bytes) else a for a in arguments]
    code = arguments[arguments.index("-c") + 1]
    if "spawn_main" not in code:  # the tracker of shared memory, or the server that forks
        return _spawn(path, arguments, kept)
    if child := os.fork():
        return child
    sys.argv[:] = ["-c", *arguments[arguments.index("-c") + 2 :]]
    sys.modules["__main__"] = types.ModuleType("__main__")
    _run_and_end(partial(exec, code, {}), kept)


def start_copies(set_attribute: Callable[[Any, str, Any], None] = setattr) -> None:
    """From now on, or as long as a ``monkeypatch`` lasts whose ``setattr`` this is."""
    set_attribute(subprocess, "Popen", _Popen)
    set_attribute(multiprocessing.util, "spawnv_passfds", _copy)
