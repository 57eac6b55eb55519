"""What answers are scored by, as metrics of the library evaluate:
they need no network, and one process needs no files.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, ClassVar

import datasets
import evaluate
import numpy as np

INTEGER, NUMBER = datasets.Value("int64"), datasets.Value("float64")


class ArrayMetric(evaluate.Metric):  # type: ignore[misc]
    """A metric of ``columns``, whose batches stay in memory unless several processes fill it together
    (``num_process``).
    """

    columns: ClassVar[dict[str, Any]]

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"keep_in_memory": options.get("num_process", 1) == 1, **options})

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features(self.columns)
        description = inspect.cleandoc(str(self.__doc__))
        return evaluate.MetricInfo(
            description=description,
            citation="hf_sparse_attn",
            inputs_description=", ".join(features),
            features=features,
        )


class AnswerMatch(ArrayMetric):
    """Answers of one or more tokens each: ``predictions`` and ``references`` are rows of as many tokens.

    ``shares`` holds the share of right tokens of every answer, ``accuracy`` their mean, ``accuracy_error`` its standard
    error (None of one answer), ``exact`` the share of answers whose tokens are all right.
    """

    columns: ClassVar[dict[str, Any]] = {
        "predictions": datasets.Sequence(INTEGER),
        "references": datasets.Sequence(INTEGER),
    }

    def _compute(self, predictions: Sequence[Sequence[int]], references: Sequence[Sequence[int]]) -> dict[str, Any]:
        for at, (predicted, right) in enumerate(zip(predictions, references, strict=True)):
            if len(predicted) != len(right) or not right:
                raise ValueError(
                    f"answer {at} has {len(right)} tokens and a prediction of {len(predicted)}: give as many, at "
                    "least one"
                )
        rows = zip(predictions, references, strict=True)
        shares = np.array([np.mean(np.asarray(predicted) == np.asarray(right)) for predicted, right in rows])
        # standard error of the mean, s / √n with n − 1 under the root of s
        error = float(shares.std(ddof=1) / len(shares) ** 0.5) if len(shares) > 1 else None
        means = {"accuracy": float(shares.mean()), "accuracy_error": error, "exact": float((shares == 1).mean())}
        return {**means, "n": len(shares), "shares": shares.tolist()}
