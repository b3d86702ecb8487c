"""Payloads of codecs on their way between processes.

Owns the layout of the bytes. Does not own what they mean (``codecs/``) nor the mean of what they decode to
(``channel.py``). Imports nothing of Lightning.

A process sends, for a group of tensors, one run of bytes: a table (worker, and per payload tensor its name, dtype and
shape), then the payload tensors, each at a multiple of 16 bytes. First all processes tell each other the length of
their table and of their run, since payloads of different workers may differ in size.
"""

import math
import pickle
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_diloco.codecs.base import Payload
from lightning_diloco.comm.tensors import bytes_of
from lightning_diloco.comm.world import World

_ALIGNMENT = 16  # bytes: a view as complex128 needs as many

Table = dict[int, list[list[tuple[str, torch.dtype, tuple[int, ...]]]]]  # worker → for each tensor its payload's


def gathered(
    world: World, payloads: Mapping[int, Sequence[Payload]], device: torch.device, where: str
) -> dict[int, list[Payload]]:
    """All workers' payloads, on every process; all processes call this together.

    The members of a team encode the same values: each process gathers from the members with its own number.

    Args:
        world: the processes.
        payloads: worker hosted here → its payloads for a group of tensors; empty if none takes part.
        device: where the tensors are.
        where: the place in the run, for error messages.
    """
    if world.size == 1:
        return {worker: list(of_worker) for worker, of_worker in payloads.items()}
    table: Table = {
        worker: [[(name, t.dtype, tuple(t.shape)) for name, t in payload.items()] for payload in of_worker]
        for worker, of_worker in payloads.items()
    }
    head = pickle.dumps(table) if table else b""
    tensors = [t for of_worker in payloads.values() for payload in of_worker for t in payload.values()]
    run = torch.zeros(
        _aligned(len(head)) + sum(_aligned(t.numel() * t.itemsize) for t in tensors), dtype=torch.uint8, device=device
    )
    run[: len(head)] = torch.tensor(list(head), dtype=torch.uint8)
    at = _aligned(len(head))
    for tensor in tensors:
        data = bytes_of(tensor.to(device).contiguous())
        run[at : at + len(data)] = data
        at += _aligned(len(data))
    lengths = [torch.zeros(2, dtype=torch.int64, device=device) for _ in range(world.size)]
    with world.label_errors(where):
        dist.all_gather(lengths, torch.tensor([len(head), len(run)], device=device))
    heads, runs = zip(*(of_process.tolist() for of_process in lengths), strict=True)
    peers = [rank for rank in range(world.size) if rank % world.team == world.member]
    to_receive = [runs[rank] if rank in peers else 0 for rank in range(world.size)]
    to_send = [len(run) if rank in peers else 0 for rank in range(world.size)]
    received = run.new_empty(sum(to_receive))
    with world.label_errors(where):
        dist.all_to_all_single(received, run.repeat(len(peers)), to_receive, to_send)
    result: dict[int, list[Payload]] = {}
    for rank, part in enumerate(torch.split(received, to_receive)):
        if len(part):
            result |= _unpacked(part, heads[rank])
    return result


def _unpacked(run: Tensor, head: int) -> dict[int, list[Payload]]:
    table: Table = pickle.loads(bytes(run[:head].tolist()))
    at = _aligned(head)

    def tensor(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        nonlocal at
        size = math.prod(shape) * dtype.itemsize
        at += _aligned(size)
        return run[at - _aligned(size) :][:size].view(dtype).view(shape)

    return {
        worker: [{name: tensor(dtype, shape) for name, dtype, shape in payload} for payload in of_worker]
        for worker, of_worker in table.items()
    }


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
