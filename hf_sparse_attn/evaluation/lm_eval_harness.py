"""Tasks of the lm-evaluation-harness (LongBench, RULER and all others that it knows), under dense attention and several
selections.

The harness' own command, ``lm_eval --model hf``, gives a sparse model right log-likelihoods at ``batch_size=1`` only:
it pads the rows of larger batches on the right and passes no mask, so padding counts as tokens: it is in the query tile
that selects for a row's end.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..attention.call import Selector, SparseCall
from ..config import fixed_budget
from ..models.calibration import made_with
from ..models.convert import sparse_attention_as
from ..system.extras import needs_extra
from ..system.progress import counted
from .baselines import selection_calls
from .statistics import loss_above

Row = dict[str, Any]  # the score of one document under one selection
OTHER_LENGTH = -1  # what the harness' RULER tasks give for the lengths, their metrics, that a document does not have
SEEDS = {f"{what}_random_seed": 0 for what in ("numpy", "torch", "fewshot")}


class HarnessError(ValueError):
    """The harness or a task of it that cannot be used; the message says which, and what to do."""


def load_tasks(
    names: Sequence[str], tokenizer: str, length: int | None = None, seed: int = 0, include: Path | None = None
) -> list[Any]:
    """The harness' tasks of these names, groups and tags; made once, so that every selection answers the same
    questions.

    ``tokenizer`` is a Hub id or folder, ``length`` the tokens of a question for tasks that make their own (RULER; None
    = theirs), ``include`` a folder of tasks of one's own (YAML, as the harness has them).

    Raises:
        MissingExtraError: lm-eval is not installed.
        HarnessError: a name is unknown, or a task cannot be loaded, as without a network.
    """
    with needs_extra("lm-eval", "loading tasks of the harness"):
        from lm_eval.tasks import TaskManager

    made_for: dict[str, Any] = {"pretrained": tokenizer, **({} if length is None else {"max_seq_lengths": [length]})}
    manager = TaskManager(metadata=made_for, include_path=include)
    tasks = []
    for name in names:
        if not manager.match_tasks([name]):
            raise HarnessError(f"lm-eval has no task {name!r}; `lm-eval ls tasks` lists them")
        # tasks that make their questions (RULER) draw from the global generators
        random.seed(seed)
        np.random.seed(seed)
        try:
            tasks += manager.load([name])["tasks"].values()
        except Exception as error:  # whatever a task's own code or the download of its data raises
            raise HarnessError(
                f"task {name} of lm-eval cannot be loaded ({type(error).__name__}: {error}): is its data reachable?"
            ) from error
    return tasks


def harness_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Any],
    limit: int,
    budgets: Sequence[int],
    selectors: Mapping[str, Selector],
    *,
    cache: Path | None = None,
) -> list[Row]:
    """The first ``limit`` documents of every task, densely and under every selection at every budget (keys): one row a
    score.

    Answers are kept in ``cache``, apart for every model, setting and selection, and not made again.

    Raises:
        HarnessError: a task writes answers, but the tokenizer has nothing to end one with.
    """
    if tokenizer.eos_token_id is None and any(task.OUTPUT_TYPE == "generate_until" for task in tasks):
        raise HarnessError(
            f"{type(tokenizer).__name__} has no end-of-sequence token, which tasks that write answers need: set "
            "eos_token"
        )
    with needs_extra("lm-eval", "running tasks of the harness"):
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

    rows: list[Row] = []
    loaded = TaskManager(include_defaults=False)  # one that knows the harness' thousands of tasks takes seconds to make
    for keys, name, call in counted(list(selection_calls(budgets, selectors)), "lm-eval, selections"):
        # of dense attention, without a number of keys, nothing is changed
        with sparse_attention_as(model, **fixed_budget(keys)), _calling(model, call):
            answers = None if cache is None else str(cache / _name(model, call, name, keys))
            # one row at a time: the harness pads larger batches without a mask, see above
            reader = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
            # no bootstrap of the harness: `harness_table` has intervals that are paired with dense attention's
            results = simple_evaluate(
                reader,
                tasks=list(tasks),
                task_manager=loaded,
                limit=limit,
                bootstrap_iters=0,
                use_cache=answers,
                **SEEDS,
            )
        rows += [{"selection": name, "keys": keys, **score} for score in _scores(results["samples"])]
    return rows


@contextmanager
def _calling(model: PreTrainedModel, call: SparseCall) -> Iterator[None]:
    """Every forward pass of ``model`` gets ``call``: the harness and `generate` know of no such argument."""
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "sparse_call": call}), with_kwargs=True
    )
    try:
        yield
    finally:
        hook.remove()


def _name(model: PreTrainedModel, call: SparseCall, selection: str, keys: int | None) -> str:
    """A file name for the answers of this model under a selection:
    another one if weights change, or settings that it depends on.
    """
    identity = made_with(model)
    # dense answers depend neither on routers nor on settings, and stay valid when these change
    if call.dense:
        identity = {name: identity[name] for name in ("version", "backbone")}
    values = json.dumps({**identity, "selection": selection, "keys": keys}, sort_keys=True)
    return hashlib.sha256(values.encode()).hexdigest()[:32]


def _scores(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[Row]:
    for task, documents in samples.items():
        for sample in documents:
            for metric in sample["metrics"]:
                score = sample[metric]
                if isinstance(score, bool | int | float) and not (metric.isdigit() and score == OTHER_LENGTH):
                    name = metric if sample["filter"] == "none" else f"{metric}, {sample['filter']}"
                    yield {"task": task, "metric": name, "document": sample["doc_id"], "score": float(score)}


def harness_table(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Mean scores over documents by task, metric, budget and selection, with their number and standard error.

    ``below_dense`` is how much less than dense attention's, with a 95 % interval over resampled documents, paired.
    """
    cells: dict[tuple[str, str, int | None, str], dict[int, float]] = {}
    for row in rows:
        cells.setdefault((row["task"], row["metric"], row["keys"], row["selection"]), {})[row["document"]] = row[
            "score"
        ]
    table = []
    for (task, metric, keys, selection), by_selection in cells.items():
        scores = np.array(list(by_selection.values()))
        dense = np.array([cells[task, metric, None, "dense"][document] for document in by_selection])
        # standard error of the mean over documents
        error = float(scores.std(ddof=1) / len(scores) ** 0.5) if len(scores) > 1 else None
        cell = {"task": task, "metric": metric, "keys": keys, "selection": selection, "n": len(scores)}
        table.append({**cell, "score": float(scores.mean()), "error": error, "below_dense": loss_above(dense, scores)})
    return table


def harness_tables(table: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The same as tables to print, one of every task and metric, as reports and cards show them."""
    tables: dict[tuple[str, str], list[list[str]]] = {}
    for row in table:
        below = row["below_dense"]
        against = (
            "" if row["selection"] == "dense" else f"{below['mean']:+.3f} [{below['low']:+.3f}, {below['high']:+.3f}]"
        )
        score = f"{row['score']:.3f}" + ("" if row["error"] is None else f" ± {row['error']:.3f}")
        shown = [row["selection"], str(row["keys"] or "all"), str(row["n"]), score, against]
        tables.setdefault((row["task"], row["metric"]), []).append(shown)
    columns = ["selection", "keys", "n", "score", "below dense"]
    note = (
        "The same documents under every selection. ±: standard error over documents. Below dense: how much less of "
        "the score, with a "
        "95 % interval over resampled documents, paired."
    )
    return [
        {"title": f"{task} of lm-eval, {metric}", "note": note, "columns": columns, "rows": rows}
        for (task, metric), rows in tables.items()
    ]
