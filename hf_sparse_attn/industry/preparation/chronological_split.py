"""Training before evaluation, and a gap between them that no context reaches across."""

from __future__ import annotations

from ..dataset import Split
from ..errors import PlantDataError
from .channel_series import SECOND, iso_utc

LEAST_SHARE = 0.1  # of the record, for evaluation


def chronological_split(start: int, end: int, context: float, train_share: float) -> Split:
    """Split a record by time: ``train_share`` of what the gap leaves for training, the rest for evaluation.

    Args:
        start, end: first and last time, nanoseconds since 1970 in UTC.
        context: seconds that a model looks back; the gap is as long, so that no evaluated context holds training data.
        train_share: between 0 and 1.

    Raises:
        PlantDataError: the gap leaves less than a tenth of the record for either side.
    """
    duration = (end - start) / SECOND
    usable = duration - context
    shorter = min(train_share, 1 - train_share) * usable
    if duration <= 0 or shorter < LEAST_SHARE * duration:
        least = context / (1 - LEAST_SHARE / min(train_share, 1 - train_share)) if 0.1 < train_share < 0.9 else None
        raise PlantDataError(
            f"the record is {_days(duration)} long: training, a gap of the context's {_days(context)} and evaluation"
            f" do not fit, each side needs {LEAST_SHARE:.0%} of the record",
            [
                "give files that reach further back" + ("" if least is None else f", {_days(least)} in all"),
                "plan a shorter context",
                "train on all of it and evaluate on a record of another time or machine",
            ],
        )
    train_end = start + int(train_share * usable * SECOND)
    return Split(iso_utc(train_end), iso_utc(train_end + int(context * SECOND)), context)


def _days(seconds: float) -> str:
    return f"{seconds / 86400:.1f} days" if seconds >= 86400 else f"{seconds / 3600:.1f} hours"
