"""A byte-level GPT trained by DiLoCo on the source text of Python's own standard library.

Model, optimizer and learning-rate schedule are those of an ordinary LightningModule; ``--plain`` trains it with an
ordinary Trainer. Batch size and steps are per worker either way, so N workers read N times as much text. Nothing is
downloaded; the last 5 % of the text is held out.

Run ``python examples/byte_gpt.py`` (1 M parameters, 4 workers: 2 minutes on one CPU core; ``--plain``: half a minute),
then ``tensorboard --logdir runs/byte_gpt``. Every name in ``DEFAULTS`` is an option: ``--layers 2 --width 64`` is fast.
On a run of some hundred steps, rounds of fewer than about 20 make DiLoCo's outer momentum overshoot: try
``--outer-momentum 0.5``, or a plain average with ``--outer-lr 1 --outer-momentum 0``. With ``--seeds 3`` the table has
mean ± standard deviation.
"""

import argparse
import logging
import math
import statistics
import sysconfig
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from lightning_diloco import DilocoStrategy


class Block(nn.Module):
    """Causal self-attention and a feed-forward network, each on a normalised input and added to it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (batch, heads, context, width / heads)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class ByteGPT(L.LightningModule):
    """Predicts the next byte; the head's weights are the embedding's.

    Args:
        layers: number of blocks.
        width: size of a position's representation, a multiple of ``heads``.
        heads: attention heads per block.
        context: bytes that a prediction can see at most.
        lr: peak learning rate of AdamW, after a warm-up and before a cosine.
    """

    def __init__(self, layers: int, width: int, heads: int, context: int, lr: float) -> None:
        super().__init__()
        self.lr = lr
        self.embedding, self.position = nn.Embedding(256, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02)
        self.head.weight = self.embedding.weight

    def forward(self, text: Tensor) -> Tensor:
        x = self.embedding(text) + self.position.weight[: text.shape[1]]
        return self.head(self.norm(self.blocks(x)))

    def loss(self, window: Tensor) -> Tensor:
        """Nats per byte of windows of shape (batch, context + 1), uint8."""
        text = window.long()
        return F.cross_entropy(self(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())

    def training_step(self, window: Tensor, batch_idx: int) -> Tensor:
        loss = self.loss(window)
        self.log("train_loss", loss)  # of this process's workers; sync_dist=True would exchange at every step
        return loss

    def validation_step(self, window: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.loss(window), sync_dist=True)

    def configure_optimizers(self) -> Any:
        decayed = {"params": [p for p in self.parameters() if p.ndim == 2]}
        others = {"params": [p for p in self.parameters() if p.ndim < 2], "weight_decay": 0.0}
        optimizer = torch.optim.AdamW([decayed, others], lr=self.lr, weight_decay=0.1)
        steps = self.trainer.estimated_stepping_batches
        warmup = max(1, steps // 10)

        def factor(step: int) -> float:  # linear warm-up into a cosine that ends at a tenth
            return min(1.0, (step + 1) / warmup) * (0.55 + 0.45 * math.cos(math.pi * min(1.0, step / steps)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Windows(Dataset[Tensor]):
    """Pieces of ``length`` bytes of a text, one starting every ``stride`` bytes."""

    def __init__(self, text: Tensor, length: int, stride: int) -> None:
        self.text, self.length, self.stride = text, length, stride

    def __len__(self) -> int:
        return (len(self.text) - self.length) // self.stride + 1

    def __getitem__(self, index: int) -> Tensor:
        return self.text[index * self.stride :][: self.length]


def standard_library(megabytes: float) -> Tensor:
    """The first bytes of Python's sources in the order of their paths, without installed packages and tests."""
    size, text = int(megabytes * 1e6), bytearray()
    for path in sources(Path(sysconfig.get_path("stdlib"))):
        text += path.read_bytes()
        if len(text) >= size:
            break
    return torch.frombuffer(text[:size], dtype=torch.uint8)


def sources(folder: Path) -> Iterator[Path]:
    """The text's files in a folder."""
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.name not in {"site-packages", "dist-packages", "test", "tests", "idle_test"}:
            yield from sources(path)
        elif path.suffix == ".py":
            yield path


class LibraryText(L.LightningDataModule):
    """Overlapping, shuffled windows of the text for training, and some 128 windows spread over its held-out last 5 %.

    Args:
        context: bytes of a window, less the one to be predicted last.
        batch_size: windows per worker and step.
        megabytes: how much of the text is used.
    """

    def __init__(self, context: int, batch_size: int, megabytes: float) -> None:
        super().__init__()
        self.batch_size = batch_size
        text, length = standard_library(megabytes), context + 1
        split = int(0.95 * len(text))
        self.train_data = Windows(text[:split], length, stride=max(1, context // 4))
        self.val_data = Windows(text[split:], length, stride=max(length, (len(text) - split - length) // 127))

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(self.train_data, self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(self.val_data, self.batch_size)


def build(args: argparse.Namespace) -> tuple[ByteGPT, LibraryText]:
    """The model and its data."""
    L.seed_everything(args.seed, verbose=False)
    data = LibraryText(args.context, args.batch_size, args.megabytes)
    return ByteGPT(args.layers, args.width, args.heads, args.context, args.lr), data


DEFAULTS = {
    **{"layers": 5, "width": 128, "heads": 4, "context": 64},
    **{"batch_size": 4, "workers": 4, "interval": 50, "steps": 500, "lr": 1e-3},  # batch, interval, steps: per worker
    **{"devices": 1, "machines": 1, "accelerator": "auto"},  # the workers are dealt over devices · machines processes
    **{"outer_lr": 0.7, "outer_momentum": 0.9},  # of the outer SGD with Nesterov momentum
    **{"precision": "32-true", "megabytes": 4.0, "seed": 0, "seeds": 1, "logdir": "runs/byte_gpt"},
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line: every name in ``DEFAULTS`` is an option, and ``--plain`` is a flag."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plain", action="store_true", help="one worker and an ordinary Trainer")
    for name, default in DEFAULTS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default, help=f"{default}")
    args = parser.parse_args(argv)
    if args.seeds > 1 and args.devices * args.machines > 1:  # further processes start at the first seed
        parser.error("several seeds need a single process: leave out --seeds, or --devices and --machines")
    return args


def train(args: argparse.Namespace) -> dict[str, float]:
    """Trains one model and returns what there is to say of it."""
    model, data = build(args)
    outer = {"lr": args.outer_lr, "momentum": args.outer_momentum, "nesterov": args.outer_momentum > 0}
    trainer = L.Trainer(
        strategy="auto" if args.plain else DilocoStrategy(args.workers, args.interval, outer_optimizer_kwargs=outer),
        accelerator=args.accelerator,
        devices=args.devices,
        num_nodes=args.machines,
        max_steps=args.steps,
        precision=args.precision,
        gradient_clip_val=1.0,
        val_check_interval=max(1, args.steps // 10),
        check_val_every_n_epoch=None,
        logger=TensorBoardLogger(args.logdir, name="plain" if args.plain else "diloco", version=f"seed {args.seed}"),
        log_every_n_steps=10,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    start = time.perf_counter()
    trainer.fit(model, data)
    seconds = time.perf_counter() - start
    (metrics,) = trainer.validate(model, data, verbose=False)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "val_loss": metrics["val_loss"],  # nats per byte
        "bits_per_byte": metrics["val_loss"] / math.log(2),
        "bytes_sent_per_worker": 0 if args.plain else trainer.strategy.ledger.total_bytes,
        "seconds": seconds,
    }


def main(argv: list[str] | None = None) -> list[dict[str, float]]:
    """Trains with every seed, prints the result and returns it, seed by seed."""
    args = parse(argv)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\.")  # advice on loader workers; its own deprecations
    seeds = range(args.seed, args.seed + args.seeds)
    results = [train(argparse.Namespace(**{**vars(args), "seed": seed})) for seed in seeds]
    if rank_zero_only.rank == 0:
        for name in results[0]:
            values = [result[name] for result in results]
            mean, differ = statistics.mean(values), len(set(values)) > 1
            print(f"{name:<22}{round(mean, 4):>12,}" + (f" ± {statistics.stdev(values):.4f}" if differ else ""))
    return results


if __name__ == "__main__":
    main()
