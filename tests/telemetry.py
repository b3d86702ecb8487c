"""What a run reports, and the same recomputed from the workers' weights by plain arithmetic in float64."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from helpers import Net, copy_of, loader, regression_data, trainer
from lightning.pytorch.loggers import TensorBoardLogger
from observers import Memory
from torch import Tensor

from lightning_diloco import DilocoCallback, DilocoStrategy

LAYERS = {"net.0": ["net.0.weight", "net.0.bias"], "net.1": ["net.1.weight", "net.1.bias"]}
LAYERS["net.4"] = ["net.4.weight", "net.4.bias"]


class Noting(Net):
    """Notes which worker had which loss on how many samples."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, float, int]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.seen.append((self.trainer.strategy.current_worker, loss.item(), len(batch[0])))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)


class Capture(DilocoCallback):
    """Weights around every outer step, as the public interface of the strategy shows them."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.sent: list[dict[str, Any]] = []
        self.arrived: list[dict[str, Any]] = []
        self._before: dict[str, Any] = {}
        self._consumed = 0

    def _look(self, trainer: L.Trainer, module: Any) -> None:
        strategy: Any = trainer.strategy
        params = [p for group in strategy.outer_optimizer.param_groups for p in group["params"]]
        names = [n for n, p in module.named_parameters() if p.requires_grad]
        momenta = {}
        for n, p in zip(names, params, strict=True):
            state = strategy.outer_optimizer.state.get(p, {})
            found = state.get("momentum_buffer", state.get("exp_avg"))
            if found is not None:
                momenta[n] = found.clone()
        self._before = {"theta": strategy.outer_state_dict(), "momenta": momenta}

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        self._look(trainer, module)

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        self._look(trainer, module)

    def on_before_outer_step(self, trainer: L.Trainer, module: Any, deltas: Any) -> None:
        strategy: Any = trainer.strategy
        weights = {w: strategy.worker_state_dict(w) for w in strategy.local_workers}
        theta = strategy.outer_state_dict()
        for w in deltas.local_workers:
            assert list(deltas.delta(w)) == list(deltas.names)
            for n, delta in deltas.delta(w).items():
                assert torch.equal(delta, theta[n] - weights[w][n])
        self.sent.append(
            {"step": deltas.step, "tag": deltas.tag, "names": deltas.names, "workers": deltas.workers}
            | {"theta": theta, "weights": weights}
        )

    def on_outer_step(self, trainer: L.Trainer, module: Any, report: Any) -> None:
        strategy: Any = trainer.strategy
        losses, self._consumed = module.seen[self._consumed :], len(module.seen)
        self.arrived.append(
            {"report": report, "losses": losses, "seen": sum(n for *_, n in module.seen), **self._before}
            | {"after": strategy.outer_state_dict(), "logging_step": trainer.global_step - 1}
            | {"lr": strategy.outer_optimizer.param_groups[0]["lr"], "bytes": strategy.ledger.total_bytes}
        )


def train(folder: Path, devices: int = 1, make: Callable[[], dict[str, Any]] = dict, **kwargs: Any) -> dict[str, Any]:
    """Everything that a run reports, and what there is to recompute it from, of this process."""
    L.seed_everything(5, verbose=False)
    settings = make()
    switches = settings.pop("switches", {})
    strategy = DilocoStrategy(**{"num_nodes": 4, "diloco_interval": 3, **settings})
    module, capture, memory = Noting(), Capture(**switches), Memory()
    board = TensorBoardLogger(folder, name=None, version="run")
    t = trainer(
        strategy,
        devices=devices,
        precision="64-true",
        logger=[memory, board],
        callbacks=[capture],
        **{"max_steps": 8, "max_epochs": -1, "log_every_n_steps": 50, "val_check_interval": 3, **kwargs},
    )
    data = regression_data(96, dtype=torch.float64)
    t.fit(module, loader(data, 4), loader(regression_data(8, seed=9, dtype=torch.float64), 4, shuffle=False))
    return {
        "sent": capture.sent,
        "arrived": capture.arrived,
        "rows": memory.rows,
        "layers": LAYERS,
        "weights": copy_of(module.state_dict()),
        "ledger": strategy.ledger,
        "times": strategy.times,
        "processes": devices,
        "folder": folder / "run",
    }


def joined(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """One result from those of all processes: process 0's, with the weights and losses of all workers."""
    whole = dict(ranks[0])
    for i, record in enumerate(whole["sent"]):
        record["weights"] = {w: s for rank in ranks for w, s in rank["sent"][i]["weights"].items()}
    for i, record in enumerate(whole["arrived"]):
        record["losses"] = [x for rank in ranks for x in rank["arrived"][i]["losses"]]
        record["seen"] = sum(rank["arrived"][i]["seen"] for rank in ranks)
    return whole


def vector(tensors: dict[str, Tensor], names: Any) -> np.ndarray:
    return np.concatenate([tensors[n].double().numpy().ravel() for n in names])


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.sqrt(a @ a) / np.sqrt(b @ b))


def expected(
    run: dict[str, Any],
    decode: Callable[[Tensor], Tensor] = lambda x: x,
    weights: dict[int, float] | None = None,
    pairs: bool = True,
) -> list[dict[str, float]]:
    """Per arrival, tag → value of all that is logged but seconds and bytes; and "matrix".

    Args:
        run: of :func:`train`.
        decode: what a receiver sees of a tensor.
        weights: of the mean.
        pairs: whether somebody sees pairs of workers; else their mean cosine is weighted by norms.
    """
    rows = []
    for k, arrival in enumerate(run["arrived"]):
        report, row = arrival["report"], {}
        (record,) = [s for s in run["sent"] if (s["step"], s["tag"]) == (report.sent_step, report.tag)]
        workers = list(record["workers"])
        theta = record["theta"]
        raw = {w: {n: theta[n] - s[n] for n in record["names"]} for w, s in record["weights"].items()}
        seen = {w: {n: decode(t) for n, t in raw[w].items()} for w in workers}
        share = {w: (weights or {}).get(w, 1.0) for w in workers}
        mean = {n: sum(share[w] * seen[w][n] for w in workers) / sum(share.values()) for n in record["names"]}
        whole = numbers(record["names"], seen, mean, share, arrival, pairs)
        for key, value in whole.items():
            if key in ("norms", "with_mean", "matrix"):
                continue
            row[f"diloco/{key}"] = value
        scale = np.linalg.norm(vector(theta, record["names"]))
        drifts = [np.linalg.norm(vector(raw[w], record["names"])) / scale for w in sorted(raw)]
        row["diloco/drift"] = np.mean(drifts)
        row |= {f"diloco_workers/drift/worker_{w}": drift for w, drift in enumerate(drifts)}
        for key, tag in (("norms", "norm"), ("with_mean", "cosine_with_mean")):
            row |= {f"diloco_workers/{tag}/worker_{w}": v for w, v in zip(workers, whole[key], strict=True)}
        by_worker: dict[int, list[float]] = {}
        for w, loss, _ in arrival["losses"]:
            by_worker.setdefault(w, []).append(loss)
        means = {w: float(np.mean(losses)) for w, losses in by_worker.items()}
        row |= {f"diloco_workers/train_loss/worker_{w}": loss for w, loss in means.items()}
        if means:
            row["diloco/train_loss"] = float(np.mean([means[w] for w in sorted(means)]))
        for layer, of_layer in run["layers"].items():
            names = [n for n in of_layer if n in record["names"]]
            if not names:
                continue
            found = numbers(names, seen, mean, share, arrival, pairs)
            row |= {f"diloco_layers/{q}/{layer}": v for q, v in found.items() if np.isscalar(v)}
            row[f"diloco_layers/cosine_with_mean/{layer}"] = np.mean(found["with_mean"])
            length = np.linalg.norm(vector(theta, names))
            row[f"diloco_layers/drift/{layer}"] = np.mean(found["norms"]) / length
        row |= {"diloco/outer_lr": arrival["lr"], "diloco/outer_step": k + 1, "diloco/samples": arrival["seen"]}
        row["matrix"] = whole["matrix"]
        rows.append(row)
    return rows


def numbers(
    names: Any, seen: dict[int, Any], mean: Any, share: dict[int, float], arrival: dict[str, Any], pairs: bool
) -> dict[str, Any]:
    """The numbers of some of the tensors of a transfer."""
    rows = [vector(seen[w], names) for w in seen]
    norms = [float(np.linalg.norm(row)) for row in rows]
    middle = vector(mean, names)
    matrix = [[cosine(a, b) for b in rows] for a in rows]
    n, w = len(rows), list(share.values())
    off = [(w[i] * norms[i] * w[j] * norms[j], matrix[i][j]) for i in range(n) for j in range(n) if i != j]
    found: dict[str, Any] = {
        "pseudo_gradient_norm": float(np.linalg.norm(middle)),
        "norm_ratio": float(np.average(norms, weights=w) / np.linalg.norm(middle)),
        "update_norm": float(np.linalg.norm(vector(arrival["after"], names) - vector(arrival["theta"], names))),
        "outer_norm": float(np.linalg.norm(vector(arrival["after"], names))),
        "norms": norms,
        "with_mean": [cosine(row, middle) for row in rows],
        "matrix": matrix,
    }
    if n > 1:
        found["cosine"] = float(np.average([c for _, c in off], weights=None if pairs else [s for s, _ in off]))
    momenta = [name for name in names if name in arrival["momenta"]]
    if momenta:
        found["momentum_cosine"] = cosine(vector(mean, momenta), vector(arrival["momenta"], momenta))
    return found
