"""torchft's DiLoCo: a replica group of one process per worker, without the functions that restore a group's state."""

import itertools
import os

import torch
from measuring import Task, run  # measuring
from shards import batches
from torchft import Manager, ProcessGroupGloo
from torchft.local_sgd import DiLoCo


def train(task: Task) -> torch.nn.Module:  # measuring
    group = int(os.environ["REPLICA_GROUP_ID"])
    model = task.model()
    inner = model.configure_optimizers()
    outer = torch.optim.SGD(model.parameters(), lr=0.7, momentum=0.9, nesterov=True)
    # with init_sync the first quorum would replace what all groups but one have trained in the first round
    settings = {"use_async_quorum": False, "init_sync": False, "replica_id": f"group_{group}"}
    manager = Manager(ProcessGroupGloo(), None, None, min_replica_size=task.workers, **settings)
    shard = batches(task.data, task.batch_size, group, task.workers)
    with DiLoCo(manager, [model], inner, outer, sync_every=task.interval):
        for batch in itertools.islice(shard, task.steps):
            inner.zero_grad()
            model.loss(batch).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            inner.step()
            task.mark()  # measuring
    committed = manager.current_step()  # measuring
    assert committed == task.steps // task.interval, f"{committed} outer steps were committed"  # measuring
    manager.shutdown()
    return model  # measuring


if __name__ == "__main__":  # measuring
    run(train)  # measuring
