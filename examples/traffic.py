"""What really crosses between two processes: Lightning's DDP against DiLoCo, dense and in four bits, on one byte GPT.

Counts what each training process writes to its sockets (Linux: ``/proc/self/io``), from the first batch to the end of
the fit, and sets it beside the closed form: an average over W processes moves 2(W−1)/W of the model's bytes out of each
of them, for DDP at every step, for DiLoCo every H steps. With a codec each process sends its payload to the W−1 others:
in four bits and with W = 2 an eighth of the dense bytes. DiLoCo's few kilobytes more per round are agreements.

Run ``python examples/traffic.py``. It starts the second process itself; one worker per process.
"""

import argparse
import logging
import warnings
from pathlib import Path

import byte_gpt
import lightning as L
import torch

from lightning_diloco import FP4, DilocoStrategy

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


def fit(strategy: str | DilocoStrategy, args: argparse.Namespace) -> tuple[int, list[int], bool]:
    """Bytes sent by this process, elements of the model's parameters, and whether this process is the one to print."""
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
    return count.sent, [p.numel() for p in model.parameters()], trainer.is_global_zero


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
    size, interval, rounds = own.processes, own.interval, -(-own.steps // own.interval)
    runs = (
        ("DDP", "ddp", own.steps),
        (f"DiLoCo, H = {interval}", DilocoStrategy(size, interval), rounds),
        (f"DiLoCo, H = {interval}, 4 bits", DilocoStrategy(size, interval, codec=FP4()), rounds),
    )
    rows = []
    for name, strategy, transfers in runs:
        sent, elements, prints = fit(strategy, args)
        dense = 2 * (size - 1) / size * 4 * sum(elements)
        packed = (size - 1) * sum(-(-n // 2) + 2 for n in elements)  # two elements to a byte, and a scale per tensor
        expected = transfers * (packed if "bits" in name else dense)
        rows.append((name, transfers, sent, expected, sent / own.steps))
    if prints:
        print(f"{'':<24}{'transfers':>10}{'bytes sent':>14}{'closed form':>14}{'bytes per local step':>22}")
        for name, transfers, sent, expected, per_step in rows:
            print(f"{name:<24}{transfers:>10}{sent:>14,}{expected:>14,.0f}{per_step:>22,.0f}")
        less, least = rows[0][4] / rows[1][4], rows[1][4] / rows[2][4]
        print(f"DiLoCo sends 1/{less:.1f} of DDP's bytes per local step, and in four bits 1/{least:.1f} of that.")
    torch.distributed.destroy_process_group()  # it began with DDP, which leaves it to the end of Python


if __name__ == "__main__":
    main()
