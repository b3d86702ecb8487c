"""``checkpoint["diloco"]``: everything that a run with workers has beyond what Lightning saves.

Owns the format: packing, checking, applying; all of it tensors and plain Python, so that files load with
``weights_only=True``. Does not own files (``_lightning/io.py``) nor what Lightning saves itself (module, worker 0's
optimizer state, loops). Imports nothing of Lightning.

Format version 1: :class:`RunState`, whose classes are the one list of keys that packing, checking and applying share.
Worker ids are global; tensors are copies.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from typing_extensions import NotRequired, TypedDict

from lightning_diloco.algorithms.base import SyncAlgorithm
from lightning_diloco.algorithms.context import SyncContext
from lightning_diloco.comm.channel import Exchange, Ledger
from lightning_diloco.comm.means import mean_of
from lightning_diloco.comm.tensors import bitwise_equal, copied
from lightning_diloco.comm.world import World
from lightning_diloco.state.replicas import Layout, ModelState, put_buffer
from lightning_diloco.state.worker import OptimizerState, Worker

VERSION = 1
GROUPING = "parameters of the outer optimizer"  # the entry of a run's settings that maps each name to its group

Packed = dict[str, Any]

_copied = partial(copied, plain=True)


class StreamState(TypedDict):
    """torch's generators."""

    cpu: Tensor | None
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
    slots: dict[str, dict[str, Tensor]]
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


class ExchangesState(TypedDict):
    """What the workers have sent, a row per exchange."""

    what: list[str]
    steps: Tensor
    bytes: Tensor


class LoaderState(TypedDict):
    """The position in the data."""

    epoch: int
    consumed: int  # batches of the epoch that each worker has trained on
    cycles: bool  # whether shorter loaders start again
    loaders: int


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
    round_start: int
    outer_steps: int
    torn: TornState
    exchanges: ExchangesState
    outer: OuterState
    algorithm: Packed
    random: StreamState  # process 0's own torch generators
    workers: dict[int, WorkerState]
    loader: LoaderState | None  # None: the user's loaders are served as they are
    entries: dict[str, int]  # how many keys and items each of these had, at all levels


def pack(
    context: SyncContext,
    algorithm: SyncAlgorithm,
    seed: int,
    random: Packed,
    pending: Callable[[ModelState], ModelState],
) -> Packed:
    """The state of a run between turns, as copies.

    All processes call it together; what process 0 returns has all workers, and lacks what :func:`complete` adds.

    Args:
        context: the run's workers, θ and counters.
        algorithm: the run's algorithm.
        seed: the run's seed.
        random: the state of the process's own generators.
        pending: gives a state with what others have written into the module and no worker has taken over yet.
    """
    layout, outer = context.replicas.layout, context.outer
    theta = pending(outer.state)
    names = {id(p): n for n, p in outer.parameters.items()}
    groups = outer.optimizer.param_groups
    return {
        "version": VERSION,
        "num_workers": context.num_workers,
        "interval": context.interval,
        "seed": seed,
        "local_steps": context.local_steps,
        "round_start": context.round_start,
        "outer_steps": context.outer_steps,
        "exchanges": _pack_ledger(context.ledger),
        "outer": {
            "names": [[names[id(p)] for p in group["params"]] for group in groups],
            "parameters": _copied(theta.tensors),
            "buffers": _pack_buffers(layout, theta),
            "optimizer": _copied(outer.optimizer.state_dict()),
        },
        "algorithm": _copied(algorithm.state_dict()),
        "random": random,
        "workers": _pack_workers(context, theta.tensors, pending),
    }


def complete(state: Packed, settings: Packed, loader: Packed | None, state_dict: Mapping[str, Any]) -> Packed:
    """The state as a file holds it: θ is left out where the file's ``state_dict`` holds the same tensors."""
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
        raise ValueError(f"{source} lacks {', '.join(missing)} in its DiLoCo state: the file is damaged.")
    missing = list(_missing_beside(checkpoint, state))
    if missing:
        raise ValueError(f"{source} lacks {', '.join(missing)}: the file is damaged.")
    lost = [w for w in range(state["num_workers"]) if w not in state["workers"]]
    if lost:
        raise ValueError(
            f"{source} was written by {state['num_workers']} workers, but the state of worker"
            f" {', '.join(map(str, lost))} is missing: the file is damaged."
        )
    incomplete = [key for key, size in state["entries"].items() if _entries(state[key]) < size]
    if incomplete or len(state["entries"]) < len(RunState.__required_keys__) - 1:
        raise ValueError(
            f"{source} lacks entries of {', '.join(incomplete) or 'entries'} in its DiLoCo state: the file is damaged."
        )
    if state["torn"]["outer_step"]:
        raise ValueError(
            f"{source} was saved when the outer step after local step {state['local_steps'] + 1} had been interrupted,"
            " and its θ may be half moved. Resume from the last file before it."
        )
    done = state["local_steps"] - state["round_start"] + bool(state["torn"]["workers"])
    if num_workers != state["num_workers"] and done:
        raise ValueError(
            f"`num_nodes` (={num_workers}) differs from the {state['num_workers']} workers of {source}, which was saved"
            f" {done} local steps into a round. The number of workers can change only at a synchronisation: resume"
            f" from a checkpoint of local step {state['round_start']} or {state['round_start'] + state['interval']}."
        )
    check_settings(state["settings"], settings, source)


def check_settings(saved: Packed, given: Packed, source: str) -> None:
    """Whether the run that wrote a file had the settings that are given now.

    Raises:
        ValueError: names those that differ, with both values.
    """
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
        f"{source} was written with another algorithm or outer optimizer: {'; '.join(words)}. Resume with those of the"
        " file. To change a number of the outer optimizer, set `trainer.strategy.outer_optimizer.param_groups` in a"
        " callback's `on_train_start`. To go on with another optimizer or algorithm, start a new fit from the file's"
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
    """Names of the keys that are missing, at every level that :func:`apply` reads."""
    levels: list[tuple[str, Any, Any]] = [
        ("", state, RunState),
        ("torn", state.get("torn"), TornState),
        ("exchanges", state.get("exchanges"), ExchangesState),
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


@torch.no_grad()
def apply(state: Packed, context: SyncContext, algorithm: SyncAlgorithm) -> None:
    """Continues where :func:`pack` was called; the caller publishes θ.

    Workers that the file doesn't have start from θ with fresh inner state, with a warning.

    Raises:
        ValueError: the module's parameters are not the file's.
    """
    layout, outer = context.replicas.layout, context.outer
    _check_parameters(state["outer"]["parameters"], outer.tensors)
    context.local_steps, context.round_start = state["local_steps"], state["round_start"]
    context.outer_steps = state["outer_steps"]
    context.channel.ledger = _unpack_ledger(state["exchanges"])
    outer.assign(state["outer"]["parameters"])
    _unpack_buffers(layout, outer.state, state["outer"]["buffers"])
    for group, names in zip(outer.optimizer.param_groups, state["outer"]["names"], strict=True):
        group["params"] = [outer.parameters[n] for n in names]
    outer.optimizer.load_state_dict(_copied(state["outer"]["optimizer"]))
    algorithm.load_state_dict(state["algorithm"])
    workers: Mapping[int, Packed] = state["workers"]
    if state["num_workers"] != context.num_workers:
        warnings.warn(
            f"Resuming {state['num_workers']} workers as {context.num_workers}: new workers start from θ with fresh"
            " inner optimizer state, and the data is sharded anew.",
            stacklevel=2,
        )
    team = 1 + len(workers[0].get("team", []))
    if team != context.channel.world.team:
        warnings.warn(
            f"Resuming workers of {team} processes each with {context.channel.world.team}: the batch of a worker is now"
            f" {context.channel.world.team} batches of the loader, and the data is sharded anew.",
            stacklevel=2,
        )
    for w in context.replicas.workers:
        if w in workers:
            _unpack_worker(workers[w], context, w)
        else:
            context.restart([w], layout.names, outer.tensors)
            _unpack_buffers(layout, context.replicas.states[w], state["outer"]["buffers"])
            context.inner.workers[w].reset_inner_state(context.inner.initial)


def restore_repeated(state: Packed, state_dict: Mapping[str, Any]) -> None:
    """Puts θ in, where :func:`complete` left it out."""
    theta = state["outer"]["parameters"]
    if isinstance(theta, list):
        state["outer"]["parameters"] = {n: state_dict[n].detach().clone() for n in theta}


# -------------------------------------------------------------------------------------------- workers


def _pack_workers(
    context: SyncContext, theta: Mapping[str, Tensor], pending: Callable[[ModelState], ModelState]
) -> dict[int, Packed]:
    world = context.channel.world
    packed = {w: _pack_worker(context, w, theta, pending(context.replicas.states[w])) for w in world.workers}
    if world.size == 1:
        return packed
    world.gather_all(f"a checkpoint after {context.local_steps} local steps")
    if world.member > 0:
        packed = {w: {key: own[key] for key in MemberState.__required_keys__} for w, own in packed.items()}
    workers: dict[int, Packed] = {}
    for theirs in world.gather_to_first(_copied(packed, torch.device("cpu"))):
        for w, own in theirs.items():
            if w in workers:
                workers[w].setdefault("team", []).append(own)
            else:
                workers[w] = own
    return workers


def _pack_worker(context: SyncContext, w: int, theta: Mapping[str, Tensor], state: ModelState) -> Packed:
    layout, replica, worker = context.replicas.layout, state.tensors, context.inner.workers[w]
    names = {id(p): n for n, p in layout.parameters.items()}
    stream = worker.stream
    return {
        "parameters": None if all(bitwise_equal(replica[n], theta[n]) for n in theta) else _copied(replica),
        "buffers": _pack_buffers(layout, state),
        "inner": [_pack_inner(o, s) for o, s in zip(context.inner.live, worker.states, strict=True)],
        "control": _copied(worker.control),
        "scaler": None if worker.scaler is None else _copied(worker.scaler.state_dict()),
        "random": None if stream is None else {"cpu": stream.cpu_state.clone(), "cuda": _copied(stream.cuda_state)},
        "gradients": {names[id(p)]: g.detach().clone() for p, g in worker.gradients.items() if id(p) in names},
        "slots": {name: _copied(slot) for (i, name), slot in context.replicas.slots.items() if i == w},
    }


def _unpack_worker(packed: Packed, context: SyncContext, w: int) -> None:
    layout, worker = context.replicas.layout, context.inner.workers[w]
    values = context.outer.tensors if packed["parameters"] is None else packed["parameters"]
    context.restart([w], layout.names, values)
    _unpack_buffers(layout, context.replicas.states[w], packed["buffers"])
    _unpack_control(worker, packed["control"])
    for state, optimizer, saved in zip(worker.states, context.inner.live, packed["inner"], strict=True):
        _unpack_inner(optimizer, state, saved)
    if worker.scaler is not None and packed["scaler"] is not None:
        worker.scaler.load_state_dict(packed["scaler"])
    member = _of_member(packed, context.channel.world)
    if worker.stream is not None and member["random"] is not None:
        worker.stream.cpu_state = member["random"]["cpu"].clone()
        if worker.stream.cuda_state is not None and member["random"]["cuda"] is not None:
            worker.stream.cuda_state = member["random"]["cuda"].clone()
    worker.gradients = {
        layout.parameters[n]: g.to(layout.parameters[n].device, copy=True) for n, g in member["gradients"].items()
    }
    for name, saved in packed["slots"].items():
        for n, tensor in context.replicas.slot(w, name).items():
            tensor.copy_(saved[n])


def _of_member(packed: Packed, world: World) -> Packed:
    """What a worker's file says about this member of its team; with another team, what comes nearest."""
    team: list[Packed] = [packed, *packed.get("team", [])]
    if len(team) == world.team:
        return team[world.member]
    means = {n: mean_of([m["gradients"][n] for m in team]) for n in packed["gradients"]}
    gradients = {n: g.to(packed["gradients"][n].dtype) for n, g in means.items()}
    return {"random": packed["random"] if world.member == 0 else None, "gradients": gradients}


def _unpack_control(worker: Worker, saved: Sequence[Any]) -> None:
    if [len(c) for c in saved] != [len(c) for c in worker.control]:
        raise ValueError(
            f"The checkpoint's optimizers have {[len(c) for c in saved]} parameter groups, the module's"
            f" {[len(c) for c in worker.control]}. Configure the optimizers as in the run that wrote it."
        )
    worker.control = _copied(list(saved))


def _pack_inner(optimizer: Any, state: OptimizerState) -> dict[Any, Any]:
    """Inner state with parameters by their position in the optimizer, other keys as they are."""
    return {key: _copied(values) for key, values in _by_position(optimizer, state).items()}


def _by_position(optimizer: Any, state: OptimizerState) -> dict[Any, Any]:
    position = {id(p): i for i, p in enumerate(_parameters_of(optimizer))}
    entries = {position.get(id(key), key): values for key, values in state.items()}
    return {key: values for key, values in entries.items() if values != {}}  # looking for an entry leaves an empty one


def _unpack_inner(optimizer: Any, state: OptimizerState, saved: Mapping[Any, Any]) -> None:
    parameters = _parameters_of(optimizer)
    state.clear()
    for key, values in saved.items():
        owner = parameters[key] if isinstance(key, int) else key
        device = owner.device if isinstance(owner, Tensor) else None
        state[owner] = _copied(values, device)


def _parameters_of(optimizer: Any) -> list[Any]:
    return [p for group in optimizer.param_groups for p in group["params"]]


# -------------------------------------------------------------------------------------------- tensors


def _pack_buffers(layout: Layout, state: ModelState) -> dict[str, dict[str, Tensor | None]]:
    return {name: _copied(own) for name, own in zip(layout.module_names, state.buffers, strict=True) if own}


def _unpack_buffers(layout: Layout, state: ModelState, saved: Mapping[str, Mapping[str, Tensor | None]]) -> None:
    for name, own in zip(layout.module_names, state.buffers, strict=True):
        for k, b in saved.get(name, {}).items():
            present = own.get(k)
            put_buffer(own, k, b if b is None or present is None else b.to(present.device))


def _pack_ledger(ledger: Ledger) -> Packed:
    return {
        "what": [e.what for e in ledger.entries],
        "steps": torch.tensor([e.local_step for e in ledger.entries], dtype=torch.int64),
        "bytes": torch.tensor([e.payload_bytes for e in ledger.entries], dtype=torch.int64),
    }


def _unpack_ledger(saved: Packed) -> Ledger:
    rows = zip(saved["steps"].tolist(), saved["what"], saved["bytes"].tolist(), strict=True)
    return Ledger([Exchange(step, what, sent) for step, what, sent in rows])


def _check_parameters(saved: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> None:
    for name in sorted(saved.keys() | present.keys()):
        if name not in saved or name not in present:
            where = "the module" if name in present else "the checkpoint"
            raise ValueError(
                f"Parameter {name!r} is only in {where}. Resume with the module that wrote the checkpoint."
            )
        if saved[name].shape != present[name].shape:
            raise ValueError(
                f"Parameter {name!r} has the shape {tuple(saved[name].shape)} in the checkpoint and"
                f" {tuple(present[name].shape)} in the module. Resume with the module that wrote the checkpoint."
            )
