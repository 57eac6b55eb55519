"""Probability of a failure within a horizon, from a model's states: a logistic regression fitted on the training
period.
"""

# Shapes: T steps, S segments, d hidden size, F failures.

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...system.extras import needs_extra
from ..errors import PlantDataError
from ..representation.token_stream import TokenStream
from .stream_reading import Reading, read
from .surprise_baseline import grid_step

with needs_extra("industry", "failure ahead"):
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import average_precision_score
    from sklearn.pipeline import Pipeline, make_pipeline
    from sklearn.preprocessing import StandardScaler

MOST_ITERATIONS = 2000


@dataclass(frozen=True, eq=False)
class FailureLabels:
    """What each step of a grid is for the task.

    Attributes:
        ahead: bool [T], a failure starts within the horizon after the end of the step.
        known: bool [T], it can be told: no failure lasts in the step, and the horizon lies within the record or a
            failure starts in it.
        train, test: bool [T], the steps to fit on and to judge on, all of them known. The horizon of a training step
            ends with the training period: what happens later is not learnt from.
    """

    ahead: NDArray[np.bool_]
    known: NDArray[np.bool_]
    train: NDArray[np.bool_]
    test: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class FailureAhead:
    """What was predicted.

    Attributes:
        probabilities: float64 [T], of every step; also of those that are not judged.
        average_precision: of the test steps (scikit-learn's), None where all or none of them have a failure ahead.
        base_rate: share of test steps with a failure ahead: what random scores reach.
        steps: how many test steps.
        failures: runs of them with a failure ahead: as many cases stand behind the number, not the steps.
    """

    probabilities: NDArray[np.float64]
    average_precision: float | None
    base_rate: float
    steps: int
    failures: int


def step_states(
    model: Any,
    stream: TokenStream,
    grid_times: NDArray[np.int64],
    reading: Reading | None = None,
    *,
    bos: int | None = None,
) -> NDArray[np.float32]:
    """Mean of the last hidden states of the tokens of each step, float32 [T, d].

    A token belongs to the step in which its segment ends. A step without tokens has the states of the last one that
    had some, zeros before the first: what was not said changes nothing that is known.

    Args:
        model: a causal language model.
        stream: of one asset.
        grid_times: int64 [T], starts of the steps of a regular grid, such as ``Timeline.times``.
        reading: how the model attends.
        bos: the token that rows were made with, if they were.

    Raises:
        PlantDataError: the grid is not regular, or the model lacks routers or tokens.
    """
    step = grid_step(grid_times)
    firsts = stream.segments["first"].to_numpy()
    steps = (stream.segments["stop"].to_numpy() - 1 - grid_times[0]) // step
    sums, counts = None, np.zeros(len(grid_times), np.int64)
    for window in read(model, stream.ids, reading or Reading(), bos=bos):
        tokens = np.arange(window.first, window.stop, dtype=np.int64)
        at = steps[np.searchsorted(firsts, tokens, side="right") - 1]
        tokens, at = (part[(at >= 0) & (at < len(grid_times))] for part in (tokens, at))
        hidden = window.states(tokens).float().cpu()
        if sums is None:
            sums = torch.zeros(len(grid_times), hidden.shape[1], dtype=torch.float32, device="cpu")
        sums.index_add_(0, torch.from_numpy(at), hidden)
        np.add.at(counts, at, 1)
    if sums is None:
        raise PlantDataError("the stream holds no token", ["name an asset that has logs or sensors"])
    means = sums.numpy() / np.maximum(counts, 1)[:, None].astype(np.float32)
    # the last step with tokens, −1 before the first
    last = np.maximum.accumulate(np.where(counts > 0, np.arange(len(counts)), -1))
    states: NDArray[np.float32] = np.where(last[:, None] >= 0, means[last], np.float32(0))
    return states


# ahead_t = some failure starts in [end_t, end_t + horizon)
def failure_labels(
    grid_times: NDArray[np.int64],
    failures: NDArray[np.int64],
    horizon: int,
    *,
    train_end: int,
    test_start: int,
) -> FailureLabels:
    """Labels of the steps of a regular grid.

    Args:
        grid_times: int64 [T], starts in nanoseconds since 1970.
        failures: int64 [F, 2], start and end (excluded) of each.
        horizon: in nanoseconds.
        train_end, test_start: of the split, in nanoseconds since 1970.

    Raises:
        PlantDataError: the grid is not regular, the horizon is not positive, or a failure ends before it starts.
    """
    step = grid_step(grid_times)
    failures = np.asarray(failures, np.int64).reshape(-1, 2)
    if horizon <= 0 or (failures[:, 0] >= failures[:, 1]).any() or test_start < train_end:
        raise PlantDataError(
            f"a horizon of {horizon} ns, failures of which {int((failures[:, 0] >= failures[:, 1]).sum())} end before "
            f"they start, training to {train_end} and evaluation from {test_start}",
            [
                "give the horizon as a positive time",
                "give start and end of each failure",
                "give the split in its order",
            ],
        )
    ends = grid_times + step
    starts = np.sort(failures[:, 0])
    ahead = np.searchsorted(starts, ends + horizon) > np.searchsorted(starts, ends)
    lasting = np.zeros(len(grid_times), bool)
    for start, stop in failures:
        lasting |= (grid_times < stop) & (ends > start)
    record_end = ends[-1]
    known = ~lasting & (ahead | (ends + horizon <= record_end))
    train = known & (ends + horizon <= train_end)
    return FailureLabels(ahead, known, train, known & (grid_times >= test_start))


def failure_ahead(states: NDArray[np.float32], labels: FailureLabels) -> FailureAhead:
    """Fit a logistic regression on the states [T, d] of the training steps, and judge it on the test steps.

    Raises:
        PlantDataError: the training steps do not have both kinds, the test holds no step, or the shapes differ.
    """
    kinds = np.unique(labels.ahead[labels.train])
    if len(states) != len(labels.ahead) or len(kinds) < 2 or not labels.test.any():
        raise PlantDataError(
            f"{len(states)} states for {len(labels.ahead)} steps, {int(labels.train.sum())} of them to train on, of "
            f"which {int(labels.ahead[labels.train].sum())} have a failure ahead, and {int(labels.test.sum())} to test",
            ["take a longer training period", "take a longer horizon", "pool assets of one kind"],
        )
    # standardised: the penalty is to weigh all dimensions alike
    model: Pipeline = make_pipeline(StandardScaler(), LogisticRegression(max_iter=MOST_ITERATIONS))
    model.fit(states[labels.train], labels.ahead[labels.train])
    probabilities = model.predict_proba(states)[:, 1].astype(np.float64)
    truth = labels.ahead[labels.test]
    both = 0 < truth.sum() < len(truth)
    precision = float(average_precision_score(truth, probabilities[labels.test])) if both else None
    runs = int(truth[0]) + int((np.diff(truth.astype(np.int8)) == 1).sum())
    return FailureAhead(probabilities, precision, float(truth.mean()), len(truth), runs)
