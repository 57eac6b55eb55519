"""The residual of a forecaster that was trained on other data: TimesFM by Transformers, from a local folder."""

# Shapes: T steps, C channels, n context, h horizon of the model, B windows in a batch.

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from ..timeline import Array, Timeline
from .detector_base import ChannelDetector, StateScaler, robust_spread

MOST_CHANNELS = 8
BATCH = 32


class PretrainedForecaster(ChannelDetector):
    """Largest residual of TimesFM's forecasts over the channels, each made from the steps before its window.

    Args:
        checkpoint: folder with a checkpoint of TimesFM for `TimesFmModelForPrediction`; None: none is at hand.
    """

    name = "pretrained forecaster residual"

    def __init__(self, checkpoint: str | Path | None = None) -> None:
        self.checkpoint = checkpoint

    def unavailable(self, timeline: Timeline) -> str | None:
        if self.checkpoint is None:
            return "no checkpoint of TimesFM was named"
        if not Path(self.checkpoint).is_dir():
            return f"{self.checkpoint} is no folder with a checkpoint"
        return super().unavailable(timeline)

    def fit(self, train: Timeline) -> PretrainedForecaster:
        from transformers import TimesFmModelForPrediction

        self.model = TimesFmModelForPrediction.from_pretrained(self.checkpoint).eval()
        self.scaler = StateScaler().fit(train)
        self.channels = np.argsort(-train.observed.sum(0), kind="stable")[:MOST_CHANNELS]
        self.spread = robust_spread(self._residual(train))
        return self

    def scores(self, timeline: Timeline) -> Array:
        largest: Array = np.nan_to_num(self._residual(timeline) / self.spread, nan=0.0).max(1)
        return largest

    @torch.no_grad()
    def _residual(self, timeline: Timeline) -> Array:
        """Absolute residuals float64 [T, channels], NaN before the first forecast and where nothing was observed."""
        config = self.model.config
        z = self.scaler.z(timeline)[:, self.channels]
        known, residual = np.nan_to_num(z, nan=0.0), np.full(z.shape, np.nan)
        origins = range(config.context_length, len(z), config.horizon_length)
        windows = [(origin, n) for n in range(z.shape[1]) for origin in origins]
        for at in range(0, len(windows), BATCH):
            batch = windows[at : at + BATCH]
            past = np.stack([known[origin - config.context_length : origin, n] for origin, n in batch])
            inputs = list(torch.as_tensor(past, dtype=torch.float32, device=self.model.device))
            forecasts = self.model(past_values=inputs, freq=[0] * len(batch)).mean_predictions.cpu().double().numpy()
            for (origin, n), forecast in zip(batch, forecasts, strict=True):
                true = z[origin : origin + config.horizon_length, n]
                residual[origin : origin + len(true), n] = np.abs(true - forecast[: len(true)])
        return residual
