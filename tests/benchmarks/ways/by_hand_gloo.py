"""Plain PyTorch in several processes: each has N/W models, and the outer step averages over all."""

import copy

import torch
import torch.distributed as dist
from measuring import Task, run  # measuring
from shards import batches


def train(task: Task) -> torch.nn.Module:  # measuring
    dist.init_process_group("gloo")
    own = task.workers // dist.get_world_size()
    first = own * dist.get_rank()
    theta = task.model()
    replicas = [copy.deepcopy(theta) for _ in range(own)]
    optimizers = [replica.configure_optimizers() for replica in replicas]
    outer = torch.optim.SGD(theta.parameters(), lr=0.7, momentum=0.9, nesterov=True)
    shards = [batches(task.data, task.batch_size, worker, task.workers) for worker in range(first, first + own)]
    for step in range(1, task.steps + 1):
        for replica, optimizer, shard in zip(replicas, optimizers, shards, strict=True):
            optimizer.zero_grad()
            replica.loss(next(shard)).backward()
            torch.nn.utils.clip_grad_norm_(replica.parameters(), 1.0)
            optimizer.step()
        if step % task.interval == 0:
            with torch.no_grad():
                for p, *copies in zip(theta.parameters(), *(r.parameters() for r in replicas), strict=True):
                    p.grad = sum(p - c for c in copies) / task.workers
                    dist.all_reduce(p.grad)
            outer.step()
            for replica in replicas:
                replica.load_state_dict(theta.state_dict())
        task.mark()  # measuring
    dist.destroy_process_group()
    return theta  # measuring


if __name__ == "__main__":  # measuring
    run(train)  # measuring
