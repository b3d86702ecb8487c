"""What really crosses between two processes: Lightning's DDP against DiLoCo, the same script and the same byte GPT.

Counts what each training process writes to its sockets (Linux: ``/proc/self/io``), from the first batch to the end of
the fit, and sets it beside the closed form: an average over W processes moves 2(W−1)/W of the model's bytes out of each
of them, for DDP at every step, for DiLoCo every H steps. DiLoCo's few hundred bytes more per round are agreements.

Run ``python examples/traffic.py``. It starts the second process itself; one worker per process.
"""

import argparse
import logging
import warnings
from pathlib import Path

import byte_gpt
import lightning as L
import torch

from lightning_diloco import DilocoStrategy

STATISTICS = Path("/proc/self/io")


def written() -> int:
    """Bytes that this process has written so far, to sockets and files; during these fits it writes no files."""
    rows = dict(row.split(": ") for row in STATISTICS.read_text().splitlines())
    return int(rows["wchar"])


class Count(L.Callback):
    """Bytes written between the first batch and the end of training, the last outer step included."""

    def on_train_batch_start(self, trainer, *_) -> None:
        if trainer.global_step == 0:
            self.before = written()

    def on_train_end(self, *_) -> None:
        self.sent = written() - self.before


def fit(strategy: str | DilocoStrategy, args: argparse.Namespace) -> tuple[int, int, bool]:
    """Bytes sent by this process, bytes of the model, and whether this process is the one to print."""
    model, data = byte_gpt.build(args)
    count = Count()
    trainer = L.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=args.processes,
        max_steps=args.steps,
        callbacks=count,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, data.train_dataloader())
    return count.sent, sum(p.nbytes for p in model.parameters()), trainer.is_global_zero


def main() -> None:
    """Trains twice and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2, help="W, processes and workers (default: 2)")
    parser.add_argument("--interval", type=int, default=20, help="H, local steps per round (default: 20)")
    parser.add_argument("--steps", type=int, default=100, help="local steps of each run (default: 100)")
    own = parser.parse_args()
    if not STATISTICS.exists():
        parser.error(f"bytes are counted by {STATISTICS}, which only Linux has")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\.")
    args = byte_gpt.parse(["--megabytes", "0.3", "--layers", "2", "--width", "64"])
    args.processes, args.steps = own.processes, own.steps
    diloco = DilocoStrategy(num_nodes=own.processes, diloco_interval=own.interval)
    rounds = -(-own.steps // own.interval)
    rows = []
    for name, strategy, exchanges in (("DDP", "ddp", own.steps), (f"DiLoCo, H = {own.interval}", diloco, rounds)):
        sent, size, prints = fit(strategy, args)
        expected = exchanges * 2 * (own.processes - 1) / own.processes * size
        rows.append((name, exchanges, sent, expected, sent / own.steps))
    if prints:
        print(f"{'':<18}{'exchanges':>10}{'bytes sent':>14}{'closed form':>14}{'bytes per local step':>22}")
        for name, exchanges, sent, expected, per_step in rows:
            print(f"{name:<18}{exchanges:>10}{sent:>14,}{expected:>14,.0f}{per_step:>22,.0f}")
        print(f"DiLoCo sends 1/{rows[0][4] / rows[1][4]:.1f} of DDP's bytes per local step.")
    torch.distributed.destroy_process_group()  # it began with DDP, which leaves it to the end of Python


if __name__ == "__main__":
    main()
