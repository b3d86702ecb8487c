"""Lightning's DDP: a process per worker, synchronised in every step."""

import lightning as L
from measuring import Task, run  # measuring
from torch.utils.data import DataLoader


def train(task: Task) -> L.LightningModule:  # measuring
    model = task.model()
    limits = {"max_steps": task.steps, "gradient_clip_val": 1.0}
    trainer = L.Trainer(strategy="ddp", devices=task.processes, **limits, **task.quiet)
    trainer.fit(model, DataLoader(task.data, task.batch_size, shuffle=True, drop_last=True))
    return model  # measuring


if __name__ == "__main__":  # measuring
    run(train)  # measuring
