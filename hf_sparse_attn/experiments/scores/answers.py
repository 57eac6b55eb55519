"""How well answers are found: log-loss and share of right tokens, under several selections."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from ...attention.call import Selector, SparseCall
from ...config import fixed_budget
from ...data.questions import Question
from ...evaluation.baselines import selection_calls
from ...evaluation.metrics import AnswerMatch
from ...evaluation.statistics import loss_above
from ...models.convert import sparse_attention_as

Row = dict[str, Any]  # what one question gave under one selection


@torch.no_grad()
def read_answer(model: PreTrainedModel, question: Question, call: SparseCall) -> tuple[float, list[int]]:
    """(mean negative log-likelihood in nats of the answer's tokens, the tokens that are the most likely ones in their
    places).
    """
    ids = question.input_ids[None].to(model.device)
    # a token is predicted one place before it
    at = (question.labels >= 0).nonzero()[:, 0]
    hidden = model.base_model(ids, use_cache=False, sparse_call=call).last_hidden_state[0, at - 1]
    logits, target = model.get_output_embeddings()(hidden).float(), question.labels[at].to(hidden.device)
    loss = torch.nn.functional.cross_entropy(logits, target)
    return float(loss), logits.argmax(-1).tolist()


def evaluate_answers(
    model: PreTrainedModel,
    questions: Sequence[Question],
    budgets: Sequence[int],
    selectors: Mapping[str, Selector],
    *,
    done: Sequence[Row] = (),
    on_row: Callable[[Row], None] | None = None,
) -> list[Row]:
    """Every question densely and under every selection at every budget (keys): one row each.

    Rows in ``done``, those of an earlier call that was stopped, are not read again; ``on_row`` is called after each new
    one.
    """
    have = {_key(row): row for row in done}
    rows: list[Row] = []
    for question in questions:
        for keys, name, call in selection_calls(budgets, selectors):
            row: Row = {
                "task": question.task,
                "document": question.document,
                "length": len(question.input_ids),
                "keys": keys,
                "selection": name,
            }
            if _key(row) not in have:
                with sparse_attention_as(model, **fixed_budget(keys)):
                    loss, predicted = read_answer(model, question, call)
                answer = question.labels[question.labels >= 0].tolist()
                row |= {"distance": question.distance, "loss": loss, "predicted": predicted, "answer": answer}
                if on_row is not None:
                    on_row(row)
            rows.append(have.get(_key(row), row))
    return rows


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("task", "document", "length", "keys", "selection"))


def answer_table(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Means over questions by task, length, budget and selection, with their number and the standard error of the
    accuracy.

    ``accuracy`` is the share of right tokens, ``exact`` that of answers whose tokens are all right, which is what
    greedy decoding would give. ``below_dense`` is how much less of them than dense attention, ``loss_above_dense``
    (nats a token of the answer) how much more log-loss; both with a 95 % interval over resampled questions, paired.
    """
    cells: dict[tuple[str, int, int | None, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        cells.setdefault((row["task"], row["length"], row["keys"], row["selection"]), []).append(row)
    scores = {cell: _scores(answers) for cell, answers in cells.items()}
    losses = {cell: np.array([row["loss"] for row in answers]) for cell, answers in cells.items()}
    exact = {cell: (np.array(score["shares"]) == 1).astype(float) for cell, score in scores.items()}
    table = []
    for cell, score in scores.items():
        task, length, keys, selection = cell
        dense = (task, length, None, "dense")
        means = {
            "loss": float(losses[cell].mean()),
            **{name: score[name] for name in ("accuracy", "accuracy_error", "exact")},
        }
        # below: dense − own, of exact answers; above: own − dense, of log-loss
        below, above = loss_above(exact[dense], exact[cell]), loss_above(losses[cell], losses[dense])
        named = {"task": task, "length": length, "keys": keys, "selection": selection, "n": score["n"]}
        table.append({**named, **means, "below_dense": below, "loss_above_dense": above})
    return table


def _scores(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    metric = AnswerMatch()
    metric.add_batch(predictions=[row["predicted"] for row in rows], references=[row["answer"] for row in rows])
    scores: dict[str, Any] = metric.compute()
    return scores
