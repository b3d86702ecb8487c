"""The reference twin: DiLoCo (arXiv 2311.08105, Algorithm 1) as nested loops in plain PyTorch.

Written from the paper alone: N modules made by ``copy.deepcopy``, each with its own inner optimizer and its own list of
batches. It imports nothing of the package and shares no helper with it.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DistributedSampler


def shards(tensors: Sequence[Tensor], num_workers: int, batch_size: int, epochs: int, seed: int) -> list[list[Any]]:
    """Per worker, the batches of all epochs: reshuffled shards of ``DistributedSampler``, cut into slices."""
    batches: list[list[Any]] = [[] for _ in range(num_workers)]
    for worker in range(num_workers):
        sampler = DistributedSampler(tensors[0], num_replicas=num_workers, rank=worker, shuffle=True, seed=seed)
        for epoch in range(epochs):
            sampler.set_epoch(epoch)
            shard = list(sampler)
            for start in range(0, len(shard), batch_size):
                batches[worker].append([t[shard[start : start + batch_size]] for t in tensors])
    return batches


class Reference:
    """Runs on construction; ``history[t - 1]`` holds (θ, [θ_0, …]) as state dicts after local step t, before a flush.

    Args:
        model: where θ and every worker start; not changed.
        batches: one list of batches per worker, all of one length.
        loss: ``(model, batch) → loss``.
        inner: makes an inner optimizer from parameters.
        outer: makes the outer optimizer from parameters; None: θ becomes the mean.
        interval: H.
        final_sync: end with an outer step if the last round is partial.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Sequence[Any]],
        loss: Callable[[nn.Module, Any], Tensor],
        inner: Callable[[Any], Optimizer],
        outer: Callable[[Any], Optimizer] | None,
        interval: int,
        final_sync: bool = True,
    ) -> None:
        self.theta = copy.deepcopy(model)
        self.workers = [copy.deepcopy(model) for _ in batches]
        self.inner = [inner(w.parameters()) for w in self.workers]
        self.outer = outer([p for p in self.theta.parameters() if p.requires_grad]) if outer else None
        self.synced_at: list[int] = []
        self.history: list[tuple[dict[str, Tensor], list[dict[str, Tensor]]]] = []
        for t, step_batches in enumerate(zip(*batches, strict=True), start=1):
            for worker, optimizer, batch in zip(self.workers, self.inner, step_batches, strict=True):
                optimizer.zero_grad()
                loss(worker, batch).backward()
                optimizer.step()
            if t % interval == 0:
                self.synchronise(t)
            self.history.append(copy.deepcopy((self.theta.state_dict(), [w.state_dict() for w in self.workers])))
        if final_sync and t % interval != 0:
            self.synchronise(t)

    @torch.no_grad()
    def synchronise(self, step: int) -> None:
        for p, *replicas in zip(self.theta.parameters(), *(w.parameters() for w in self.workers), strict=True):
            if p.requires_grad and self.outer is not None:
                p.grad = sum(p - r for r in replicas) / len(replicas)
            elif p.requires_grad:
                p.copy_(sum(replicas) / len(replicas))
        if self.outer is not None:
            self.outer.step()
        for buffer, *replicas in zip(self.theta.buffers(), *(w.buffers() for w in self.workers), strict=True):
            buffer.copy_(sum(replicas) / len(replicas) if buffer.is_floating_point() else replicas[0])
        for worker in self.workers:
            worker.load_state_dict(self.theta.state_dict())
        self.synced_at.append(step)
