"""DilocoStrategy, in one process or several."""

import lightning as L
from measuring import Task, run  # measuring
from torch.utils.data import DataLoader

from lightning_diloco import DilocoStrategy


def train(task: Task) -> L.LightningModule:  # measuring
    model = task.model()
    strategy = DilocoStrategy(num_nodes=task.workers, diloco_interval=task.interval)
    limits = {"max_steps": task.steps, "gradient_clip_val": 1.0}
    trainer = L.Trainer(strategy=strategy, devices=task.processes, **limits, **task.quiet)
    trainer.fit(model, DataLoader(task.data, task.batch_size, shuffle=True, drop_last=True))
    return model  # measuring


if __name__ == "__main__":  # measuring
    run(train)  # measuring
