"""The robust mean of a transfer: from the messages of all workers, on every process.

Does not own the rules (``aggregates.py``), nor when anything is sent (``sending.py``). Imports nothing of Lightning.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from lightning_diloco.algorithms.order import Order, Read
from lightning_diloco.codecs import Codec
from lightning_diloco.comm.channel import Channel
from lightning_diloco.comm.messages import messages
from lightning_diloco.comm.statistics import MeanStatistics
from lightning_diloco.comm.tensors import flat
from lightning_diloco.state.memory import Memory


def aggregated(
    order: Order,
    group: Sequence[int],
    sent: tuple[Read, Mapping[str, Tensor], MeanStatistics | None],
    run: tuple[Channel, Memory, Mapping[str, Tensor]],
    codec: Codec | None,
    generators: Callable[[int], torch.Generator],
) -> tuple[dict[str, Tensor], int]:
    """What ``order.aggregate`` makes of the messages of a group; all processes call it together.

    Args:
        order: what is sent.
        group: the senders.
        sent: gives a worker's tensors; name → a tensor of the right shape, dtype and device; measures the messages.
        run: the processes, the memory, and θ.
        codec: packs the messages; None: they travel as they are.
        generators: worker → the codec's random numbers.

    Returns:
        The robust mean; and the bytes of a packed message, else 0.

    Raises:
        ValueError: too few workers take part, or their messages have weights.
    """
    (read, like, statistics), (channel, memory, theta), rule = sent, run, order.aggregate
    assert rule is not None
    if order.weights is not None or channel.weights is not None:
        raise ValueError(
            f"{rule!r} counts every worker alike, but the means of this run are weighted. Use `weights='uniform'`, and"
            " no `temperature`."
        )
    if len(group) < rule.least():
        raise ValueError(
            f"{rule!r} needs at least {rule.least()} workers, but at {order.where} only {len(group)} take part. Use a"
            " rule for fewer attackers, or let more workers take part."
        )
    memories = partial(memory.codec, order.stream)
    rows, nbytes = messages(channel, order.names, read, group, like, codec, memories, generators)
    of_weights = order.what == "weights"  # rules may start at 0, and know distances from θ then
    if of_weights:
        rows = [{n: t - theta[n] for n, t in row.items()} for row in rows]
    result = rule(rows, memory.memo(f"aggregate of {order.stream}, {group[0]}"))
    if of_weights:
        rows = [{n: t + theta[n] for n, t in row.items()} for row in rows]
        result = {n: t + theta[n] for n, t in result.items()}
    if statistics is not None and channel.world.rank == 0:  # all processes have seen the same
        for n in order.names:
            statistics.add_rows(n, 0, [flat(row[n]) for row in rows])
            statistics.add_square(n, statistics.square_of(n, 0, flat(result[n])))
    return result, nbytes
