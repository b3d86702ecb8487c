"""The messages of single workers, as they arrive, on every process.

Owns no arithmetic: a message is the mean over its sender alone (``channel.py``). Imports nothing of Lightning.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lightning_diloco.codecs.base import Codec
from lightning_diloco.comm.channel import Channel, Read


def messages(
    channel: Channel,
    names: Sequence[str],
    read: Read,
    workers: Sequence[int],
    like: Mapping[str, Tensor],
    codec: Codec | None,
    memories: Callable[[int, str], dict[str, Tensor]],
    generators: Callable[[int], torch.Generator],
) -> tuple[list[dict[str, Tensor]], int]:
    """What each worker sends, decoded if a codec has packed it; all processes call it together.

    Args:
        channel: the processes.
        names: as in :meth:`Channel.coded_mean`, and so are all others.
        read: gives a worker's tensors.
        workers: the senders.
        like: name → a tensor of the right shape, dtype and device.
        codec: packs; None: tensors travel as they are.
        memories: (worker, name) → what the codec keeps.
        generators: worker → the codec's random numbers.

    Returns:
        The messages, in the order of ``workers``; and the bytes of the longest, 0 without a codec.
    """
    rows, sent = [], 0
    for w in workers:
        if codec is None:
            row, nbytes = channel.mean(names, read, [w], [1.0], like), 0
        else:
            row, nbytes = channel.coded_mean(names, read, codec, memories, generators, [w], [1.0], like)
        rows.append(row)
        sent = max(sent, nbytes)
    return rows, sent
