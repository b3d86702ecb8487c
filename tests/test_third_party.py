"""Does a project that somebody else wrote on Lightning train, unmodified? Run with ``pytest -m third_party``."""

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers import trainer
from processes import in_a_process

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


@pytest.mark.processes
def test_neuralforecast_which_builds_its_trainer_of_pytorch_lightning_inside_trains(tmp_path: Path) -> None:
    """N = 1 with plain average forecasts the very numbers that it forecasts without the strategy."""
    if importlib.util.find_spec("neuralforecast") is None:
        pytest.skip("needs the extra `third-party`")

    def forecast() -> Any:
        importlib.import_module("lightning_diloco.as_pytorch_lightning")
        import numpy as np
        import pandas as pd
        from neuralforecast import NeuralForecast
        from neuralforecast.models import NHITS

        noise = np.random.default_rng(0)
        days = pd.date_range("2020-01-01", periods=120, freq="D")
        waves = [np.sin(np.arange(120) / 7 + i) + 0.1 * noise.normal(size=120) for i in range(8)]
        data = pd.concat([pd.DataFrame({"unique_id": f"{i}", "ds": days, "y": wave}) for i, wave in enumerate(waves)])

        def fit(**kwargs: Any) -> tuple[Any, Any]:
            quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
            options = {"max_steps": 30, "batch_size": 2, "val_check_steps": 10, "accelerator": "cpu", "devices": 1}
            model = NHITS(h=5, input_size=20, **options, **quiet, **kwargs)
            forecasts = NeuralForecast([model], freq="D")
            forecasts.fit(data, val_size=10)
            used = forecasts.models[0].trainer_kwargs.get("strategy")  # a copy of the one given
            return torch.tensor(forecasts.predict()["NHITS"].to_numpy()), used

        without, _ = fit()
        plain, _ = fit(strategy=DilocoStrategy(1, 10, outer_optimizer_kwargs={"lr": 1.0}))
        three, strategy = fit(strategy=DilocoStrategy(3, 10))
        return without, plain, three, (strategy.local_steps, strategy.outer_steps)

    without, plain, three, steps = in_a_process(forecast, tmp_path)
    assert torch.equal(without, plain)
    assert steps == (30, 3)
    assert not torch.equal(without, three)
    assert (without - three).abs().max() < 0.5  # of waves from -1 to 1
