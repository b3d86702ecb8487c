"""The format of ``checkpoint["diloco"]``: its keys, and the checks before a run resumes.

:class:`RunState` and the classes in it are the list of keys that packing, checking and applying share. Worker ids are
global; tensors are copies. Does not own packing (``checkpoint.py``). Imports nothing of Lightning.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from typing_extensions import NotRequired, TypedDict

from lightning_diloco.comm.tensors import bitwise_equal

VERSION = 4
_DAMAGED = "the file is damaged. Resume from another file."
GROUPING = "parameters of the outer optimizer"  # the entry of a run's settings that maps each name to its group

Packed = dict[str, Any]
WEIGHTS = "weights"
AVAILABILITY = "availability of the cluster"
SPEEDS = "speeds of the cluster"
_BEFORE = {WEIGHTS: "uniform", AVAILABILITY: "None", SPEEDS: "None"}  # what runs had before there were these settings


class StreamState(TypedDict):
    """torch's generators."""

    cpu: Tensor
    cuda: Tensor | None


class MemberState(TypedDict):
    """What each process of a worker's team has."""

    random: StreamState | None  # None: N = 1
    gradients: dict[str, Tensor]  # accumulated since the last step


class WorkerState(MemberState):
    """A worker."""

    parameters: dict[str, Tensor] | None  # None: equal to θ
    buffers: dict[str, dict[str, Tensor | None]]  # submodule → name → value
    inner: list[dict[Any, Any]]  # per optimizer: position of the parameter → its state
    control: list[Any]  # per optimizer or scheduler
    scaler: Packed | None
    memory: Packed  # anchor, slots and the codecs' memory: see state/memory.py
    team: NotRequired[list[MemberState]]  # the further processes of the worker's team


class OuterState(TypedDict):
    """θ and the outer optimizer."""

    names: list[list[str]]  # per group of the outer optimizer
    parameters: Any  # dict[str, Tensor]; in files a list of names if ``state_dict`` holds the values
    buffers: dict[str, dict[str, Tensor | None]]
    optimizer: Packed


class OptimizerDict(TypedDict):
    """``Optimizer.state_dict()``."""

    state: Packed
    param_groups: list[Packed]


class LedgerState(TypedDict):
    """What the workers have sent, a row per transfer."""

    what: list[str]
    steps: Tensor
    bytes: Tensor
    participants: Tensor
    dense: Tensor  # bytes of the mean
    gathered: NotRequired[Tensor]  # whether every message had to reach whoever averages; missing: none had
    part: NotRequired[Tensor]  # of the workers that sent at this time; missing: all of them


class LoaderState(TypedDict):
    """The position in the data."""

    epoch: int
    consumed: int  # batches of the epoch that each worker has trained on
    cycles: bool  # whether shorter loaders start again
    loaders: int
    places: NotRequired[list[list[int]]]  # per worker: epoch, and batches of it; of workers that don't step together


class TornState(TypedDict):
    """A step that an error interrupted."""

    workers: list[int]  # those that are done with the batch, which isn't in local_steps
    stepped: bool  # whether an optimizer has stepped in it
    outer_step: bool  # whether the outer step was under way


class RunState(TypedDict):
    """A run between turns."""

    version: int
    settings: Packed  # what the run must be resumed with: the algorithm and the outer optimizer, with their arguments
    num_workers: int
    interval: int
    seed: int
    local_steps: int
    origin: int  # the local step from which rounds are counted
    round_start: int
    outstanding: bool  # whether a flush has something to do
    apart: bool  # whether a worker's trainable parameters differ from θ
    buffers_at: int  # local step of the last synchronisation of buffers
    outer_steps: int
    torn: TornState
    ledger: LedgerState
    outer: OuterState
    transfers: list[Packed]  # under way
    machines: Packed | None  # clock and tally of the simulated cluster
    own_steps: Packed | None  # of workers that don't step together
    last_sent: dict[str, int]  # stream of transfers → local step
    ever_sent: list[str]  # parameters whose weights, or Δ, workers have sent
    memos: dict[str, dict[str, Tensor]]
    random: StreamState  # process 0's own torch generators
    workers: dict[int, WorkerState]
    loader: LoaderState | None  # None: the user's loaders are served as they are
    samples: int | None  # that all workers have trained on; None: unknown
    entries: dict[str, int]  # how many keys and items each of these had, at all levels


def complete(state: Packed, settings: Packed, loader: LoaderState | None, state_dict: Mapping[str, Any]) -> Packed:
    """The state for a file: θ is left out where the file's ``state_dict`` holds the same tensors."""
    theta = state["outer"]["parameters"]
    if all(isinstance(state_dict.get(n), Tensor) and bitwise_equal(state_dict[n], t) for n, t in theta.items()):
        state["outer"]["parameters"] = sorted(theta)
    state |= {"settings": settings, "loader": loader}
    return state | {"entries": {key: _entries(value) for key, value in state.items()}}


def check(checkpoint: Mapping[str, Any], num_workers: int, settings: Packed, source: str) -> None:
    """Whether a file can be resumed with N = ``num_workers`` and ``settings``; before anything is touched.

    Raises:
        ValueError: another format version, missing entries or workers, another N in the middle of a round, another
            algorithm or outer optimizer, or other arguments of them.
    """
    state = checkpoint["diloco"]
    version = state.get("version")
    if "version" in state and version != VERSION:
        raise ValueError(
            f"{source} has the DiLoCo format version {version!r}; this lightning_diloco reads version {VERSION}."
            " Resume with the version that wrote it."
        )
    missing = list(_missing(state))
    if missing:
        raise ValueError(f"{source} lacks {', '.join(missing)} in its DiLoCo state: {_DAMAGED}")
    missing = list(_missing_beside(checkpoint, state))
    if missing:
        raise ValueError(f"{source} lacks {', '.join(missing)}: {_DAMAGED}")
    lost = [w for w in range(state["num_workers"]) if w not in state["workers"]]
    if lost:
        raise ValueError(
            f"{source} was written by {state['num_workers']} workers, but the state of worker"
            f" {', '.join(map(str, lost))} is missing: {_DAMAGED}"
        )
    incomplete = [key for key, size in state["entries"].items() if _entries(state[key]) < size]
    if incomplete or len(state["entries"]) < len(RunState.__required_keys__) - 1:
        raise ValueError(
            f"{source} lacks entries of {', '.join(incomplete) or 'entries'} in its DiLoCo state: {_DAMAGED}"
        )
    if state["torn"]["outer_step"]:
        raise ValueError(
            f"{source} was saved when the outer step after local step {state['local_steps'] + 1} had been interrupted,"
            " and its θ may be half moved. Resume from the last file before it."
        )
    done = state["local_steps"] - state["round_start"] + bool(state["torn"]["workers"])
    torn = bool(state["torn"]["workers"])
    if num_workers != state["num_workers"] and (state["outstanding"] or state["apart"] or torn):
        whole = done and not state["transfers"] and len(state["last_sent"]) < 2  # everything is sent at once
        place = f"{done} local steps into a round" if whole else "with transfers under way or workers apart"
        steps = f"of local step {state['round_start']} or {state['round_start'] + state['interval']}"
        raise ValueError(
            f"`num_nodes` (={num_workers}) differs from the {state['num_workers']} workers of {source}, which was saved"
            f" {place}. The number of workers can change only at a synchronisation: resume from a checkpoint"
            f" {steps if whole else 'that was saved when all workers had just taken θ, as at the end of a fit'}."
        )
    check_settings(state["settings"], settings, source)


def check_settings(saved: Packed, given: Packed, source: str) -> None:
    """Whether the run that wrote a file had the settings that are given now.

    Raises:
        ValueError: names those that differ, with both values.
    """
    saved = {**_BEFORE, **saved}
    both = {key: (saved.get(key), value) for key, value in given.items()}
    if GROUPING in given:  # of the parameters that were trainable at the start of both runs
        then, now = saved.get(GROUPING, {}), given[GROUPING]
        moved = [name for name in now if name in then and then[name] != now[name]]
        both[GROUPING] = {name: then[name] for name in moved}, {name: now[name] for name in moved}
    different = {key: pair for key, pair in both.items() if not _same(*pair)}
    if not different:
        return
    words = [f"`{key}` is {_shown(then)} in the file and {_shown(now)} now" for key, (then, now) in different.items()]
    raise ValueError(
        f"{source} was written with other settings: {'; '.join(words)}. Resume with those of the"
        " file. To change a number of the outer optimizer, set `trainer.strategy.outer_optimizer.param_groups` in a"
        " callback's `on_train_start`. To go on with other settings, start a new fit from the file's"
        " weights: `module = MyModule.load_from_checkpoint(path); trainer.fit(module, ...)` without `ckpt_path`."
    )


def _same(a: Any, b: Any) -> bool:
    """Whether two plain values are the same; a name in a script is that of the module when the script is imported.

    >>> _same({"cls": "__main__.Mean"}, {"cls": "train.Mean"}), _same("torch.Mean", "train.Mean")
    (True, False)
    """
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(v, b[k]) for k, v in a.items())
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, str) and isinstance(b, str):
        script = "__main__."
        return a == b or any(x.startswith(script) and y.endswith(x[len(script) - 1 :]) for x, y in ((a, b), (b, a)))
    return bool(a == b)


def _shown(value: Any) -> str:
    """Arguments as in a call."""
    return ", ".join(f"{k}={v!r}" for k, v in value.items()) or "(none)" if isinstance(value, dict) else str(value)


def _missing(state: Packed) -> Iterator[str]:
    """Names of the keys that are missing, at every level that ``checkpoint.apply`` reads."""
    levels: list[tuple[str, Any, Any]] = [
        ("", state, RunState),
        ("torn", state.get("torn"), TornState),
        ("ledger", state.get("ledger"), LedgerState),
        ("loader", state.get("loader"), LoaderState),
        ("random", state.get("random"), StreamState),
        ("outer", state.get("outer"), OuterState),
        ("outer.optimizer", state.get("outer", {}).get("optimizer"), OptimizerDict),
    ]
    for w, worker in state.get("workers", {}).items():
        levels.append((f"workers[{w}]", worker, WorkerState))
        members = {f"workers[{w}].team[{i}]": member for i, member in enumerate(worker.get("team", []))}
        levels += [(at, member, MemberState) for at, member in members.items()]
        levels += [
            (f"{at}.random", m.get("random"), StreamState) for at, m in {f"workers[{w}]": worker, **members}.items()
        ]
    for at, found, expected in levels:
        for key in sorted(expected.__required_keys__):
            if found is not None and key not in found:
                yield f"{at}.{key}" if at else key


def _missing_beside(checkpoint: Mapping[str, Any], state: Packed) -> Iterator[str]:
    """Names of Lightning's keys that are missing; a file with a DiLoCo state was written with all of them."""
    paths = [["state_dict"], ["optimizer_states"], ["lr_schedulers"], ["loops", "fit_loop", "state_dict"]]
    theta = state["outer"]["parameters"]
    paths += [["state_dict", n] for n in (theta if isinstance(theta, list) else [])]
    for path in paths:
        found: Any = checkpoint
        for key in path:
            if key not in found:
                yield "/".join(path)
                break
            found = found[key]


def _entries(value: Any) -> int:
    """How many keys and items ``value`` has, at all levels."""
    if not isinstance(value, (dict, list, tuple)):
        return 0
    return len(value) + sum(map(_entries, value.values() if isinstance(value, dict) else value))


def restore_repeated(state: Packed, state_dict: Mapping[str, Any]) -> None:
    """Puts θ in, where :func:`complete` left it out."""
    theta = state["outer"]["parameters"]
    if isinstance(theta, list):
        state["outer"]["parameters"] = {n: state_dict[n].detach().clone() for n in theta}
