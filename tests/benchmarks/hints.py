"""When does DiLoCo's outer momentum end worse than a plain average? The runs on which the rule of the hint stands.

A grid of short runs of two projects, the digits CNN and a small byte GPT, over rounds, H, N, the outer optimizer and
the inner schedule. Every configuration is compared, seed by seed, with the plain average (``{"lr": 1.0}``) of the same
project, N, H, steps and schedule: same initial weights, same order of the data. A run's result is the validation loss
of θ after the last round. A configuration counts as *worse* if the mean difference over the seeds is above their
standard deviation (the spread), and the table says what the hint does:

* hit: worse, and the hint fires; miss: worse, and it is silent;
* false alarm: it fires, but the configuration isn't worse; silent: neither.

The hint fires if the cosine of Δ with the outer momentum is below its bound in too many of the rounds; the table has
their share in per cent, the median of the seeds. Rows without a momentum are not judged.

Every finished configuration is appended to a file at once; one that is in the file isn't repeated. ``--table`` prints
the table of what is in the file, as Markdown, and runs nothing.

Run ``python tests/benchmarks/hints.py``: some minutes on one core.
"""

import argparse
import copy
import importlib
import json
import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler

from lightning_diloco import DilocoStrategy
from lightning_diloco.reporting import hints

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
digits = importlib.import_module("digits")
byte_gpt = importlib.import_module("byte_gpt")

PLAIN = "plain average"
OUTER = {  # outer SGD
    "lr 0.7, momentum 0.9": {"lr": 0.7, "momentum": 0.9, "nesterov": True},  # the default
    "lr 0.4, momentum 0.9": {"lr": 0.4, "momentum": 0.9, "nesterov": True},
    "lr 0.7, momentum 0.5": {"lr": 0.7, "momentum": 0.5, "nesterov": True},
    "lr 0.7, momentum 0": {"lr": 0.7},
    PLAIN: {"lr": 1.0},
}
CLIP = 1.0  # norm of a worker's gradient at most
GPT = "--layers 1 --width 32 --heads 2 --context 16 --megabytes 0.5 --lr 3e-3"  # arguments of examples/byte_gpt.py


class Setting(NamedTuple):
    """What a configuration and its plain average have in common."""

    project: str
    schedule: str  # of the inner learning rate
    workers: int
    interval: int
    steps: int

    @property
    def rounds(self) -> int:
        return self.steps // self.interval


LENGTHS = [(10, 100), (10, 200), (5, 100), (20, 100), (20, 200), (2, 200)]  # H, local steps
SETTINGS = [
    *(Setting(p, s, 4, *length) for length in LENGTHS for p in ("digits", "byte GPT") for s in ("constant", "cosine")),
    *(Setting(p, "constant", n, 10, 100) for p in ("digits", "byte GPT") for n in (2, 8)),
]
FEWER = ("lr 0.4, momentum 0.9", "lr 0.7, momentum 0")  # only in a length
CONFIGURATIONS = [
    (setting, outer)
    for setting in SETTINGS
    for outer in OUTER
    if outer not in FEWER or (setting.workers == 4 and setting[3:] == (10, 100))
]


# -------------------------------------------------------------------------------------------- the two projects


class Digits(digits.DigitsCNN):
    """The digits CNN with a constant or a cosine learning rate."""

    def __init__(self, schedule: str) -> None:
        super().__init__(lr=2e-3)
        self.schedule = schedule

    def configure_optimizers(self) -> Any:
        return with_schedule(super().configure_optimizers(), self.schedule, self.trainer.estimated_stepping_batches)


def with_schedule(optimizer: torch.optim.Optimizer, schedule: str, steps: int) -> Any:
    if schedule == "constant":
        return optimizer
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cosine, "interval": "step"}}


@cache
def data_of(project: str) -> L.LightningDataModule:
    if project == "digits":
        return digits.DigitsData(batch_size=8)
    return byte_gpt.build(byte_gpt.parse(GPT.split()))[1]


def model_of(setting: Setting, seed: int) -> L.LightningModule:
    """A model as ``seed`` makes it; the byte GPT's cosine is its own, after a warm-up."""
    L.seed_everything(seed, verbose=False)
    if setting.project == "digits":
        return Digits(setting.schedule)
    args = byte_gpt.parse(GPT.split())
    model = byte_gpt.ByteGPT(args.layers, args.width, args.heads, args.context, args.lr)
    if setting.schedule == "constant":
        model.configure_optimizers = lambda: torch.optim.AdamW(model.parameters(), lr=model.lr, weight_decay=0.1)
    return model


# -------------------------------------------------------------------------------------------- runs, all at once


def batches_of(setting: Setting, seeds: int) -> Iterator[Any]:
    """For every local step the batches of all seeds' workers, stacked: seed 0's workers first."""
    data = data_of(setting.project)
    given = data.train_dataloader()
    dataset, size, n = given.dataset, given.batch_size, setting.workers
    whole = DataLoader(dataset, len(dataset))
    everything = next(iter(whole))
    tensors = everything if isinstance(everything, list) else [everything]
    samplers = [DistributedSampler(dataset, n, worker, seed=seed) for seed in range(seeds) for worker in range(n)]
    step, epoch = 0, 0
    while True:
        for sampler in samplers:
            sampler.set_epoch(epoch)
        orders = torch.tensor([list(sampler) for sampler in samplers])
        pieces = [piece for piece in orders.split(size, dim=1) if not given.drop_last or piece.shape[1] == size]
        for piece in pieces:
            yield [t[piece] for t in tensors]
            step += 1
            if step == setting.steps:
                return
        epoch += 1


def loss_of(model: nn.Module, parameters: dict[str, Tensor], batch: list[Tensor]) -> Tensor:
    if len(batch) == 2:
        images, labels = batch
        return F.cross_entropy(functional_call(model, parameters, (images,)), labels)
    text = batch[0].long()
    logits = functional_call(model, parameters, (text[:, :-1],))
    return F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())


def train(setting: Setting, outer: str, seeds: int) -> tuple[list[float], list[list[float]]]:
    """For every seed the validation loss of θ after the last round, and the cosine of Δ with the momentum per round."""
    models = [model_of(setting, seed) for seed in range(seeds)]
    inner = [model.net if setting.project == "digits" else model for model in models]  # what maps inputs to logits
    n, base = setting.workers, copy.deepcopy(inner[0])
    theta = {name: nn.Parameter(t.detach()) for name, t in stack_module_state(inner)[0].items()}
    workers = {name: nn.Parameter(t.detach().repeat_interleave(n, dim=0)) for name, t in theta.items()}
    optimizer, scheduler = inner_optimizer(setting, models[0], inner[0], workers)
    outer_optimizer = torch.optim.SGD(theta.values(), **OUTER[outer])
    cosines: list[list[float]] = [[] for _ in range(seeds)]
    gradients = vmap(grad(lambda p, batch: loss_of(base, p, batch)))
    for step, batch in enumerate(batches_of(setting, seeds), start=1):
        clipped = clip(gradients({name: p.detach() for name, p in workers.items()}, batch))
        for name, p in workers.items():
            p.grad = clipped[name]
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        if step % setting.interval == 0:
            with torch.no_grad():
                for name, p in theta.items():
                    p.grad = p - workers[name].unflatten(0, (seeds, n)).mean(1)
                for s, cosine in enumerate(cosines_with_momentum(outer_optimizer, seeds)):
                    cosines[s].append(cosine)
                outer_optimizer.step()
                for name, p in theta.items():
                    workers[name].copy_(p.repeat_interleave(n, dim=0))
    with torch.no_grad():
        losses = [validation_loss(setting, base, {k: p[s] for k, p in theta.items()}) for s in range(seeds)]
    return losses, cosines


def cosines_with_momentum(optimizer: torch.optim.Optimizer, seeds: int) -> list[float]:
    """For every seed the cosine of Δ with the outer momentum before the step; none before the second round."""
    pairs = [(p.grad, state["momentum_buffer"]) for p, state in optimizer.state.items() if "momentum_buffer" in state]
    if not pairs or pairs[0][1] is None:
        return []
    deltas, momenta = (torch.cat([t.reshape(seeds, -1) for t in tensors], 1) for tensors in zip(*pairs, strict=True))
    return F.cosine_similarity(deltas, momenta).tolist()


def inner_optimizer(setting: Setting, module: L.LightningModule, model: nn.Module, stacked: dict[str, Any]) -> Any:
    """The module's own optimizer and schedule, over the stacked parameters."""
    module.trainer = L.Trainer(max_steps=setting.steps, max_epochs=-1, **QUIET)
    configured = module.configure_optimizers()
    scheduler = None
    if isinstance(configured, dict):
        configured, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    names = {id(p): name for name, p in model.named_parameters()}
    for group in configured.param_groups:
        group["params"] = [stacked[names[id(p)]] for p in group["params"]]
    return configured, scheduler


def clip(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """As ``gradient_clip_val``, for each model of the stack."""
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients.values()]).norm(dim=0)
    factor = (CLIP / (norms + 1e-6)).clamp(max=1.0)
    return {name: g * factor.reshape(-1, *[1] * (g.ndim - 1)) for name, g in gradients.items()}


def validation_loss(setting: Setting, base: nn.Module, parameters: dict[str, Tensor]) -> float:
    """As Lightning logs it: the mean over batches, weighted by their sizes."""
    total = samples = 0.0
    for batch in data_of(setting.project).val_dataloader():
        batch = batch if isinstance(batch, list) else [batch]
        total += len(batch[0]) * loss_of(base, parameters, batch).item()
        samples += len(batch[0])
    return total / samples


QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def by_the_package(setting: Setting, outer: str, seed: int) -> float:
    """The same by DilocoStrategy."""
    model, data = model_of(setting, seed), data_of(setting.project)
    strategy = DilocoStrategy(setting.workers, setting.interval, outer_optimizer_kwargs=OUTER[outer])
    trainer = L.Trainer(
        strategy=strategy, max_steps=setting.steps, gradient_clip_val=CLIP, limit_val_batches=0, **QUIET
    )
    trainer.fit(model, data)
    trainer.limit_val_batches = 1.0
    (metrics,) = trainer.validate(model, data, verbose=False)
    return float(metrics["val_loss"])


# -------------------------------------------------------------------------------------------- command line


def finished(results: Path) -> tuple[dict[Any, list[float]], dict[Any, list[list[float]]]]:
    """Losses and cosines of the configurations in the file."""
    lines = results.read_text().splitlines() if results.exists() else []
    rows = {(Setting(*row["setting"]), row["outer"]): row for row in map(json.loads, lines)}
    return {key: row["losses"] for key, row in rows.items()}, {key: row["cosines"] for key, row in rows.items()}


def table(done: dict[Any, list[float]], cosines: dict[Any, list[list[float]]]) -> Iterator[str]:
    """The table of the guide, row by row, and the totals."""
    names = ("project", "schedule", "N", "H", "steps", "rounds", "outer SGD", "difference", "worse", "low", "hint")
    yield f"| {' | '.join(names)} |"
    yield "|---" * len(names) + "|"
    counts: dict[str, int] = dict.fromkeys([*WORDS.values(), NO_MOMENTUM], 0)
    rows = [c for c in CONFIGURATIONS if c[1] != PLAIN and c in done and (c[0], PLAIN) in done]
    for setting, outer in rows:
        pairs = zip(done[setting, outer], done[setting, PLAIN], strict=True)
        differences = [loss - plain for loss, plain in pairs]
        mean, spread = statistics.mean(differences), statistics.stdev(differences)
        worse, word, low = mean > spread, NO_MOMENTUM, ""
        if "momentum" in OUTER[outer]:
            share = statistics.median(map(share_of_low, cosines[setting, outer]))
            word, low = WORDS[worse, share > hints.SHARE], f"{100 * share:.0f}"
        counts[word] += 1
        cells = [*setting, setting.rounds, outer, f"{mean:+.3f} ± {spread:.3f}", "yes" if worse else "no", low, word]
        yield f"| {' | '.join(map(str, cells))} |"
    yield ""
    yield ", ".join(f"{number} × {word}" for word, number in counts.items())


def share_of_low(cosines: list[float]) -> float:
    """The share of the rounds with a momentum in which the cosine is below the hint's bound."""
    return statistics.mean(cosine < hints.BOUND for cosine in cosines)


WORDS = {(True, True): "hit", (True, False): "miss", (False, True): "false alarm", (False, False): "silent"}
NO_MOMENTUM = "no momentum"
CHECKED = [
    (Setting("digits", "constant", 4, 5, 20), "lr 0.7, momentum 0.9"),
    (Setting("digits", "cosine", 2, 10, 60), "lr 0.7, momentum 0.5"),
    (Setting("byte GPT", "cosine", 4, 5, 20), PLAIN),
]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--results", type=Path, default=Path(tempfile.gettempdir()) / "lightning_diloco_hints.jsonl")
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--check", action="store_true", help="compare with the package")
    args = parser.parse_args(argv)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if args.check:
        for setting, outer in CHECKED:
            print(setting, outer, train(setting, outer, 1)[0], by_the_package(setting, outer, 0), flush=True)
        return
    done, cosines = finished(args.results)
    if args.table:
        print("\n".join(table(done, cosines)))
        return
    for setting, outer in CONFIGURATIONS:
        if (setting, outer) not in done:
            start = time.perf_counter()
            losses, cosines = train(setting, outer, args.seeds)
            row = {"setting": setting, "outer": outer, "losses": losses, "cosines": cosines}
            with args.results.open("a") as file:
                file.write(json.dumps({**row, "seconds": round(time.perf_counter() - start, 1)}) + "\n")


if __name__ == "__main__":
    main()
