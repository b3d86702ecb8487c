"""Packs the state of a run for ``checkpoint["diloco"]``, and applies it to an engine.

All of it is tensors and plain Python, so that files load with ``weights_only=True``. Does not own the format
(``file_format.py``), files (``_lightning/io.py``), nor the entries that Lightning saves (module, worker 0's optimizer
state, loops). Imports nothing of Lightning.
"""

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_diloco.algorithms.context import SyncContext
from lightning_diloco.algorithms.transfer import Transfer
from lightning_diloco.comm.ledger import Ledger, LedgerEntry
from lightning_diloco.comm.means import mean_of
from lightning_diloco.comm.tensors import bitwise_equal, copied
from lightning_diloco.comm.world import World
from lightning_diloco.engine.file_format import VERSION, LedgerState, MemberState, Packed, RunState, WorkerState
from lightning_diloco.state.replicas import Layout, ModelState, put_buffer
from lightning_diloco.state.worker import OptimizerState, Worker, parameters_of

_copied = partial(copied, plain=True)


def pack(
    context: SyncContext,
    seed: int,
    random: Packed,
    pending: Callable[[ModelState], ModelState],
    changed: Collection[str],
) -> Packed:
    """The state of a run between turns, as copies.

    All processes call it together. The result on process 0 has all workers; ``file_format.complete`` adds the rest.

    Args:
        context: the run's workers, θ and counters.
        seed: the run's seed.
        random: states of the process's generators.
        pending: gives a state with the outside changes that no worker has adopted yet.
        changed: the parameters that these changes touch.
    """
    layout, outer = context.replicas.layout, context.outer
    theta = pending(outer.state)
    names = {id(p): n for n, p in outer.parameters.items()}
    groups = outer.optimizer.param_groups
    workers = _pack_workers(context, theta.tensors, pending, changed)
    return {
        "version": VERSION,
        "num_workers": context.num_workers,
        "interval": context.interval,
        "seed": seed,
        "local_steps": context.local_steps,
        "origin": context.origin,
        "round_start": context.round_start,
        "outstanding": context.outstanding,
        "outer_steps": context.outer_steps,
        "ledger": _pack_ledger(context.ledger),
        "outer": {
            "names": [[names[id(p)] for p in group["params"]] for group in groups],
            "parameters": _copied(theta.tensors),
            "buffers": _pack_buffers(layout, theta),
            "optimizer": _copied(outer.optimizer.state_dict()),
        },
        "transfers": [t.state_dict() for t in context.waiting],
        "machines": context.machines.state_dict(),
        "own_steps": None if context.inner.own_steps is None else context.inner.own_steps.state_dict(),
        "last_sent": dict(context.last_sent),
        "ever_sent": sorted(context.ever_sent),
        "memos": _copied(context.memory.packed_memos(changed)),
        "random": random,
        "workers": workers,
        "apart": any(
            worker["parameters"] is not None
            and not all(bitwise_equal(worker["parameters"][n].cpu(), theta.tensors[n].cpu()) for n in context.names)
            for w, worker in workers.items()
            if w in context.workers
        ),
    }


@torch.no_grad()
def apply(state: RunState, context: SyncContext) -> None:
    """Continues where :func:`pack` was called; the caller publishes θ.

    Workers that the file doesn't have start from θ with fresh inner state, with a warning.

    Raises:
        ValueError: the module's parameters are not the file's.
    """
    layout, outer = context.replicas.layout, context.outer
    _check_parameters(state["outer"]["parameters"], outer.tensors)
    context.local_steps, context.step = state["local_steps"], state["local_steps"]
    context.outer_steps, context.last_sent = state["outer_steps"], dict(state["last_sent"])
    context.ever_sent, context.origin = set(state["ever_sent"]), state["origin"]
    if context.interval != state["interval"]:  # rounds of the new length are counted from the last synchronisation
        synchronised = [at for stream, at in context.last_sent.items() if not stream.startswith("gradients")]
        context.origin = max(synchronised) if len(synchronised) == 1 else state["round_start"]
    context.channel.ledger = _unpack_ledger(state["ledger"])
    device = context.channel.world.device
    context.waiting = [Transfer.from_state_dict(t, device) for t in state["transfers"]]
    context.machines.load_state_dict(state["machines"], context.local_steps, context.waiting)
    if context.inner.own_steps is not None and state["own_steps"] is not None:
        context.inner.own_steps.load_state_dict(state["own_steps"])
    context.memory.unpack_memos(state["memos"], device)
    outer.assign(state["outer"]["parameters"])
    _unpack_buffers(layout, outer.state, state["outer"]["buffers"])
    for group, names in zip(outer.optimizer.param_groups, state["outer"]["names"], strict=True):
        group["params"] = [outer.parameters[n] for n in names]
    outer.optimizer.load_state_dict(_copied(state["outer"]["optimizer"]))
    workers = state["workers"]
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
            _assign(context, w, outer.tensors)
            _unpack_buffers(layout, context.replicas.states[w], state["outer"]["buffers"])
            context.inner.workers[w].reset_inner_state(context.inner.initial)


# -------------------------------------------------------------------------------------------- workers


def _pack_workers(
    context: SyncContext,
    theta: Mapping[str, Tensor],
    pending: Callable[[ModelState], ModelState],
    changed: Collection[str],
) -> dict[int, Packed]:
    world = context.channel.world
    packed = {w: _pack_worker(context, w, theta, pending(context.replicas.states[w]), changed) for w in world.workers}
    if world.size == 1:
        return packed
    world.gather_all(f"a checkpoint after {context.local_steps} local steps")
    if world.member > 0:
        packed = {w: {key: worker[key] for key in MemberState.__required_keys__} for w, worker in packed.items()}
    workers: dict[int, Packed] = {}
    for of_process in world.gather_to_first(_copied(packed, torch.device("cpu"))):
        for w, worker in of_process.items():
            if w in workers:
                workers[w].setdefault("team", []).append(worker)
            else:
                workers[w] = worker
    return workers


def _pack_worker(
    context: SyncContext, w: int, theta: Mapping[str, Tensor], state: ModelState, changed: Collection[str]
) -> Packed:
    layout, replica, worker = context.replicas.layout, state.tensors, context.inner.workers[w]
    names = {id(p): n for n, p in layout.parameters.items()}
    stream = worker.stream
    return {
        "parameters": None if all(bitwise_equal(replica[n], theta[n]) for n in theta) else _copied(replica),
        "buffers": _pack_buffers(layout, state),
        "inner": [pack_inner(o, s) for o, s in zip(context.inner.live, worker.states, strict=True)],
        "control": _copied(worker.control),
        "scaler": None if worker.scaler is None else _copied(worker.scaler.state_dict()),
        "random": None if stream is None else {"cpu": stream.cpu_state.clone(), "cuda": _copied(stream.cuda_state)},
        "gradients": {names[id(p)]: g.detach().clone() for p, g in worker.gradients.items() if id(p) in names},
        "memory": _copied(_pack_memory(context, w, state, changed)),
    }


def _pack_memory(context: SyncContext, w: int, state: ModelState, changed: Collection[str]) -> Packed:
    packed = context.memory.packed(w, changed)
    if packed["anchor"] is not None:
        packed["anchor"] = {**packed["anchor"], **{n: state.tensors[n] for n in changed}}
    return packed


def _unpack_worker(packed: WorkerState, context: SyncContext, w: int) -> None:
    layout, worker = context.replicas.layout, context.inner.workers[w]
    values = context.outer.tensors if packed["parameters"] is None else packed["parameters"]
    _assign(context, w, values)
    _unpack_buffers(layout, context.replicas.states[w], packed["buffers"])
    _unpack_control(worker, packed["control"])
    for state, optimizer, saved in zip(worker.states, context.inner.live, packed["inner"], strict=True):
        unpack_inner(optimizer, state, saved)
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
    context.memory.unpack(w, packed["memory"], context.channel.world.device)


def _assign(context: SyncContext, w: int, values: Mapping[str, Tensor]) -> None:
    for n, tensor in context.replicas.tensors(w).items():
        tensor.copy_(values[n])


def _of_member(packed: WorkerState, world: World) -> MemberState:
    """The entries of this member of a worker's team; for a team of another size, the nearest thing."""
    team: list[MemberState] = [packed, *packed.get("team", [])]
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


def pack_inner(optimizer: Any, state: OptimizerState) -> dict[Any, Any]:
    """Inner state with parameters by their position in the optimizer, other keys as they are."""
    return {key: _copied(values) for key, values in _by_position(optimizer, state).items()}


def _by_position(optimizer: Any, state: OptimizerState) -> dict[Any, Any]:
    position = {id(p): i for i, p in enumerate(parameters_of(optimizer))}
    entries = {position.get(id(key), key): values for key, values in state.items()}
    return {key: values for key, values in entries.items() if values != {}}  # looking for an entry leaves an empty one


def unpack_inner(optimizer: Any, state: OptimizerState, saved: Mapping[Any, Any]) -> None:
    """The reverse of :func:`pack_inner`."""
    parameters = parameters_of(optimizer)
    state.clear()
    for key, values in saved.items():
        owner = parameters[key] if isinstance(key, int) else key
        device = owner.device if isinstance(owner, Tensor) else None
        state[owner] = _copied(values, device)


# -------------------------------------------------------------------------------------------- tensors


def _pack_buffers(layout: Layout, state: ModelState) -> dict[str, dict[str, Tensor | None]]:
    return {name: _copied(buffers) for name, buffers in zip(layout.module_names, state.buffers, strict=True) if buffers}


def _unpack_buffers(layout: Layout, state: ModelState, saved: Mapping[str, Mapping[str, Tensor | None]]) -> None:
    for name, buffers in zip(layout.module_names, state.buffers, strict=True):
        for k, b in saved.get(name, {}).items():
            present = buffers.get(k)
            put_buffer(buffers, k, b if b is None or present is None else b.to(present.device))


def _pack_ledger(ledger: Ledger) -> LedgerState:
    packed: LedgerState = {
        "what": [e.what for e in ledger.entries],
        "steps": torch.tensor([e.local_step for e in ledger.entries], dtype=torch.int64),
        "bytes": torch.tensor([e.payload_bytes for e in ledger.entries], dtype=torch.int64),
        "participants": torch.tensor([e.participants for e in ledger.entries], dtype=torch.int64),
        "dense": torch.tensor([e.dense_bytes for e in ledger.entries], dtype=torch.int64),
    }
    if any(e.gathered for e in ledger.entries):
        packed["gathered"] = torch.tensor([e.gathered for e in ledger.entries], dtype=torch.bool)
    if any(e.part != 1 for e in ledger.entries):
        packed["part"] = torch.tensor([e.part for e in ledger.entries], dtype=torch.float64)
    return packed


def _unpack_ledger(saved: LedgerState) -> Ledger:
    count = len(saved["what"])
    columns = [saved[key].tolist() for key in ("bytes", "participants", "dense")]
    columns.append(saved["gathered"].tolist() if "gathered" in saved else [False] * count)
    columns.append(saved["part"].tolist() if "part" in saved else [1.0] * count)
    rows = zip(saved["steps"].tolist(), saved["what"], *columns, strict=True)
    return Ledger([LedgerEntry(*row) for row in rows])


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
