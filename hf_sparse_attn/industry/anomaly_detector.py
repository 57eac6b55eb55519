"""A detector of PyOD's interface: how much a causal language model is surprised by rows of tokens."""

# Shapes: n rows, L tokens of a row, B rows of a batch.

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np
import torch
from transformers import PreTrainedModel

from ..evaluation.divergence import token_losses
from ..system.extras import needs_extra
from .errors import PlantDataError

with needs_extra("industry", "a detector of PyOD's interface"):
    from pyod.models.base import BaseDetector
    from sklearn.utils.validation import check_is_fitted

if TYPE_CHECKING:
    from datasets import Dataset

Array = np.ndarray[Any, np.dtype[Any]]
Rows: TypeAlias = "Array | Sequence[Sequence[int]] | Dataset"
GroupKey = tuple[str | None, int | None]  # operating state and hour of the week; None: all of them

LEAST_ROWS = 30  # of a state and hour of the week, below which all rows of the state stand, then all rows
HOURS_OF_WEEK = 168


class SurpriseDetector(BaseDetector):  # type: ignore[misc]
    """Scores a row by the mean negative log-likelihood (nats a token) that a causal model gives its tokens.

    ``fit`` trains no weights: it sets the threshold, and with ``baseline`` the median and the median absolute deviation
    of the surprise by operating state and hour of the week, which scores are then measured in.
    Works wherever PyOD's detectors do: ``fit``, ``decision_function``, ``decision_scores_``, ``labels_``,
    ``threshold_``, ``predict``, ``predict_proba``.

    Args:
        model: a causal language model, e.g. from
            ``AutoModelForCausalLM.from_pretrained(…, sparse_attention=…)``.
        contamination: share of anomalies in what is fitted, in (0, 0.5]; sets the threshold.
        scored_tokens: how many tokens at the end of a row are scored, the rest is context; None: all but the first.
        baseline: rows need a ``state`` and a ``time``, so X is a `datasets.Dataset`.
        batch_size: rows of equal length that are run together.

    X is int [n, L], a list of rows of token ids, or a `datasets.Dataset` with the column ``input_ids`` and, for the
    baseline, ``state`` and ``time`` (datetime, ISO 8601, or ns since 1970; UTC).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        contamination: float = 0.1,
        scored_tokens: int | None = None,
        baseline: bool = False,
        batch_size: int = 8,
    ) -> None:
        super().__init__(contamination=contamination)
        self.model = model
        self.scored_tokens = scored_tokens
        self.baseline = baseline
        self.batch_size = batch_size

    def fit(self, X: Rows, y: object = None) -> SurpriseDetector:
        """Set baseline, threshold and labels from rows of mostly normal operation; ``y`` is ignored.

        Raises:
            PlantDataError: as `surprise`; there are no rows.
        """
        self._set_n_classes(None)
        losses = self.surprise(X)
        if not len(losses):
            raise PlantDataError("no rows to fit on", ["give rows of normal operation"])
        if self.baseline:
            self.levels_ = _levels(losses, *_moments(X))
        self.decision_scores_ = self._against_baseline(losses, X)
        self._process_decision_scores()
        return self

    def decision_function(self, X: Rows) -> Array:
        """Scores float64 [n], higher is more abnormal.

        Raises:
            PlantDataError: as `surprise`.
            NotFittedError: `fit` was not called.
        """
        check_is_fitted(self, ["decision_scores_", "threshold_", "labels_"])
        return self._against_baseline(self.surprise(X), X)

    def predict_proba(self, X: Rows, method: str = "linear", return_confidence: bool = False) -> Any:
        """Chances [n, 2] of normal and abnormal, as PyOD's; a list of rows of different lengths is taken too."""
        if not hasattr(X, "shape"):
            rows = np.empty(len(X), object)
            rows[:] = [list(row) for row in X]
            X = rows
        return super().predict_proba(X, method=method, return_confidence=return_confidence)

    def score_dataset(self, dataset: Dataset) -> Dataset:
        """The same dataset with the columns ``anomaly_score`` and ``anomaly`` (0 or 1, by the threshold).

        Raises:
            PlantDataError: as `surprise`.
        """
        scores = self.decision_function(dataset)
        flags = (scores > self.threshold_).astype(np.int64)
        return dataset.add_column("anomaly_score", scores.tolist()).add_column("anomaly", flags.tolist())

    @torch.no_grad()
    def surprise(self, X: Rows) -> Array:
        """Mean negative log-likelihood in nats a token of every row, float64 [n], without the baseline.

        Raises:
            PlantDataError: a row has fewer than two tokens, a token that the model does not know, or no token ids.
        """
        rows = _token_rows(X, self.model.config.get_text_config().vocab_size)
        by_length: dict[int, list[int]] = defaultdict(list)
        for n, row in enumerate(rows):
            by_length[len(row)].append(n)
        losses, training = np.empty(len(rows)), self.model.training
        self.model.eval()
        try:
            # rows of one length need no padding, which a model could see
            for numbers in by_length.values():
                for at in range(0, len(numbers), self.batch_size):
                    batch = numbers[at : at + self.batch_size]
                    losses[batch] = self._batch_losses(np.stack([rows[n] for n in batch]))
        finally:
            self.model.train(training)
        return losses

    # −1/k Σ_i log p(x_i | x_<i) over the last k tokens of the row
    def _batch_losses(self, batch: Array) -> list[float]:
        ids = torch.as_tensor(batch, dtype=torch.int64, device=self.model.device)
        scored = min(self.scored_tokens or ids.shape[1], ids.shape[1] - 1)
        hidden = self.model.base_model(ids, use_cache=False).last_hidden_state
        return [
            float(token_losses(self.model, states[None, -scored - 1 : -1], row[None, -scored:]).mean())
            for states, row in zip(hidden, ids, strict=True)
        ]

    def _against_baseline(self, losses: Array, X: Rows) -> Array:
        if not self.baseline:
            return losses
        states, hours = _moments(X)
        center, scale = np.array(
            [
                self.levels_.get((s, h)) or self.levels_.get((s, None)) or self.levels_[None, None]
                for s, h in zip(states, hours, strict=True)
            ]
        ).T
        scores: Array = (losses - center) / scale
        return scores


def _token_rows(X: Rows, vocabulary: int) -> list[Array]:
    """Rows of token ids, int64 [L] each."""
    if hasattr(X, "column_names"):
        X = _column(X, "input_ids")
    rows = []
    for n, row in enumerate(X):
        ids = np.asarray(row)
        if ids.ndim != 1 or len(ids) < 2 or not np.issubdtype(ids.dtype, np.integer):
            raise PlantDataError(
                f"row {n} of {ids.dtype} and shape {ids.shape} is no row of at least two token ids",
                ["give whole numbers", "drop rows of one token", "tokenise text first"],
            )
        if ids.min() < 0 or ids.max() >= vocabulary:
            raise PlantDataError(
                f"row {n} has token ids from {ids.min()} to {ids.max()}, the model knows 0 to {vocabulary - 1}",
                ["tokenise with this model's tokenizer", "resize the model's embeddings", "drop padding of -100"],
            )
        rows.append(ids.astype(np.int64))
    return rows


def _column(X: Rows, name: str) -> Sequence[Any]:
    """A column of a `datasets.Dataset`. Raises PlantDataError if X is none or has no such column."""
    names = getattr(X, "column_names", ())
    if name not in names:
        raise PlantDataError(
            f"{type(X).__name__} with the columns {', '.join(names) or '(none)'} has no {name}",
            ["give a datasets.Dataset with that column", "rename the one that holds it", "set baseline=False"],
            column=name,
        )
    column: Sequence[Any] = cast("Dataset", X)[name]
    return column


def _moments(X: Rows) -> tuple[list[str], list[int]]:
    """(Operating state, hour of the week from Monday 0:00 UTC) of every row."""
    states, times = _column(X, "state"), _column(X, "time")
    return [str(state) for state in states], [_hour_of_week(time, n) for n, time in enumerate(times)]


def _hour_of_week(time: object, row: int) -> int:
    try:
        # without a zone it is UTC; numpy knows no zones
        moment = datetime.fromisoformat(time) if isinstance(time, str) else time
        if isinstance(moment, datetime):
            moment = np.datetime64((moment - (moment.utcoffset() or moment - moment)).replace(tzinfo=None))
        hours = int(np.datetime64(moment, "ns").astype("datetime64[h]").astype(np.int64))  # type: ignore[call-overload]
    except (ValueError, TypeError) as error:
        raise PlantDataError(
            f"row {row} has the time {time!r}", ["give ISO 8601", "give datetimes", "give ns since 1970"], column="time"
        ) from error
    # 1970 began on a Thursday
    return (hours + 72) % HOURS_OF_WEEK


# center = median, scale = 1.4826 · median absolute deviation, of a group and never below that of all rows / 10
def _levels(losses: Array, states: list[str], hours: list[int]) -> dict[GroupKey, tuple[float, float]]:
    groups: dict[GroupKey, list[int]] = defaultdict(list)
    for n, (state, hour) in enumerate(zip(states, hours, strict=True)):
        groups[state, hour].append(n)
        groups[state, None].append(n)
    center = float(np.median(losses))
    overall = 1.4826 * float(np.median(np.abs(losses - center))) or float(losses.std()) or 1.0
    levels: dict[GroupKey, tuple[float, float]] = {(None, None): (center, overall)}
    for key, numbers in groups.items():
        if len(numbers) >= LEAST_ROWS:
            part = losses[numbers]
            middle = float(np.median(part))
            levels[key] = middle, max(1.4826 * float(np.median(np.abs(part - middle))), overall / 10)
    return levels
