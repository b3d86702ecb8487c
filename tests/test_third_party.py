"""Does a project that somebody else wrote on Lightning train, unmodified? Run with ``pytest -m third_party``."""

from typing import Any

import lightning as L
import pytest
import torch
from helpers import trainer

from lightning_diloco import DilocoStrategy

pytestmark = [pytest.mark.third_party, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("model", ["TemporalFusionTransformer", "DeepAR", "NBeats"])
def test_pytorch_forecasting_learns_under_four_workers(model: str) -> None:
    forecasting = pytest.importorskip("pytorch_forecasting")
    from pytorch_forecasting.data.examples import generate_ar_data

    L.seed_everything(1, verbose=False)
    data = generate_ar_data(seasonality=10.0, timesteps=120, n_series=20, seed=1)
    data["static"] = "2"
    normalizer = forecasting.data.NaNLabelEncoder().fit(data["series"])
    common: dict[str, Any] = {
        "time_idx": "time_idx",
        "target": "value",
        "group_ids": ["series"],
        "max_encoder_length": 20,
        "max_prediction_length": 5,
        "time_varying_unknown_reals": ["value"],
        "categorical_encoders": {"series": normalizer},
    }
    if model == "TemporalFusionTransformer":
        common |= {"static_categoricals": ["static"], "add_relative_time_idx": True}
    training = forecasting.TimeSeriesDataSet(data[lambda x: x.time_idx < 100], **common)
    validation = forecasting.TimeSeriesDataSet.from_dataset(training, data, min_prediction_idx=100)
    train_loader = training.to_dataloader(train=True, batch_size=16, num_workers=0)
    val_loader = validation.to_dataloader(train=False, batch_size=64, num_workers=0)
    cls = getattr(forecasting, model)
    options = {"hidden_size": 8} if model != "NBeats" else {"widths": [16, 64]}
    module = cls.from_dataset(training, learning_rate=1e-2, log_interval=-1, **options)

    def loss() -> float:
        return trainer().validate(module, val_loader, verbose=False)[0]["val_loss"]

    before = loss()
    strategy = DilocoStrategy(num_nodes=4, diloco_interval=5)
    t = trainer(strategy, max_steps=40, gradient_clip_val=0.1, enable_checkpointing=False)
    t.fit(module, train_loader, val_loader)
    assert (strategy.local_steps, strategy.outer_steps) == (40, 8)
    assert loss() < 0.9 * before
    assert all(torch.isfinite(p).all() for p in module.parameters())
