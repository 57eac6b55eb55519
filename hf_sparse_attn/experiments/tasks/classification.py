"""Task ``classification``: long documents into classes, by an encoder whose positions are extended if need be."""

from __future__ import annotations

import copy
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from ...data.sources import local_model, model_licence
from ...system.files import replaced_folder
from ..recipe import RecipeError
from ..rows.class_labels import LabelledWindow, classes_of, labelled_windows, read_labelled, split_labelled
from ..scores.task_scores import Row, class_score, class_table, evaluate_rows
from .selection_scores import TaskRun

# of attention weights, which sparse attention does not have
DROPOUTS = ("attention_probs_dropout_prob", "attention_dropout")
MOST_WINDOWS = 4  # of a document: long ones must not outweigh the others


class ClassificationRun(TaskRun):
    """A row is a window of a document; documents that train are not evaluated."""

    task_type = "SEQ_CLS"
    model_class = AutoModelForSequenceClassification
    score = staticmethod(class_score)

    def _convert(self) -> dict[str, Any]:
        source, gguf = local_model(self.recipe.model["source"])
        if gguf:
            raise RecipeError(
                f"{self.recipe.model['source']} is a GGUF file: classification takes a checkpoint of Transformers"
            )
        tokenizer = AutoTokenizer.from_pretrained(source)
        _, _, classes = self._documents
        names = {"id2label": dict(enumerate(classes)), "label2id": {name: i for i, name in enumerate(classes)}}
        torch.manual_seed(self.recipe.seed)  # of the new head
        model = AutoModelForSequenceClassification.from_pretrained(
            source, dtype=self.dtype, num_labels=len(classes), **names
        )
        before = model.config.max_position_embeddings
        model = extended_positions(model, self._one_length())
        for name in DROPOUTS:
            if hasattr(model.config, name):
                setattr(model.config, name, 0.0)
        # the tokenizer would warn, or cut, at the base model's length
        tokenizer.model_max_length = max(self._one_length(), before)
        with replaced_folder(self.state / "base") as temporary:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
        train, evaluated = self._windows
        counts = {
            kind: np.bincount([w.label for w in rows], minlength=len(classes)).tolist()
            for kind, rows in (("train", train), ("eval", evaluated))
        }
        licence = self.recipe.model["license"] or model_licence(self.recipe.model["source"])
        known = {"license": licence, "classes": classes, "windows": counts, "positions_before": before}
        return {**known, "parameters": sum(p.numel() for p in model.parameters())}

    @cached_property
    def _documents(self) -> tuple[list[Any], list[Any], list[str]]:
        """(what trains, what is evaluated, the classes)."""
        data = self.recipe.data
        train = read_labelled(data["train"], data["label"])
        if data["split"] is not None:
            train, evaluated = split_labelled(train, data["split"], self.recipe.seed)
        else:
            evaluated = read_labelled(data["eval"], data["label"])
        return train, evaluated, classes_of(train)

    @cached_property
    def _windows(self) -> tuple[list[LabelledWindow], list[LabelledWindow]]:
        tokenizer, (train, evaluated, classes) = AutoTokenizer.from_pretrained(self.state / "base"), self._documents
        return (
            labelled_windows(train, tokenizer, self._one_length(), classes, MOST_WINDOWS),
            labelled_windows(evaluated, tokenizer, self._one_length(), classes, MOST_WINDOWS),
        )

    def _rows(self) -> list[dict[str, Tensor]]:
        """As many rows as the steps take, every class as often as the others."""
        settings, adaptation = self.recipe.lora, self.recipe.adaptation
        count = settings["steps"] * adaptation.batch_size * adaptation.accumulation * self.processes.num_processes
        generator = np.random.default_rng(self.recipe.seed)
        windows = self._windows[0]
        by_class = [[w for w in windows if w.label == label] for label in sorted({w.label for w in windows})]
        orders: list[list[int]] = [[] for _ in by_class]
        rows = []
        # classes in turn, each in an order of its own, anew when all of its windows were taken
        for i in range(count):
            at = i % len(by_class)
            orders[at] = orders[at] or generator.permutation(len(by_class[at])).tolist()
            rows.append(by_class[at][orders[at].pop()].row())
        return rows

    def _distillation_batches(self) -> tuple[list[dict[str, Tensor]], list[str]]:
        # windows without padding
        full = [w for w in self._windows[0] if bool(w.attention_mask.all())]
        count = self.recipe.distill["batches"]
        if len(full) < count:
            raise RecipeError(
                f"distill.batches is {count}, but only {len(full)} windows that train are {self._one_length()} tokens "
                "long"
            )
        chosen = [full[i] for i in np.random.default_rng(self.recipe.seed).permutation(len(full))[:count]]
        return [{"input_ids": w.input_ids[None]} for w in chosen], [w.name for w in chosen]

    def _evaluation_rows(self) -> list[tuple[str, Row]]:
        """So many windows as the recipe says, the classes in the proportion that they have."""
        windows = self._windows[1]
        chosen = np.random.default_rng(self.recipe.seed).permutation(len(windows))[: self.recipe.quality[0].windows]
        return [(windows[i].name, windows[i].row()) for i in sorted(chosen)]

    def _evaluate(self, model: PreTrainedModel) -> dict[str, Any]:
        """Also what the model finds that reads no more than its base model could."""
        result, short = super()._evaluate(model), self._load("convert")["positions_before"]
        if short < self._one_length():
            # what is by token is cut; the label has no dimension
            rows = [
                (name, {key: x[:short] if x.ndim else x for key, x in row.items()})
                for name, row in self._evaluation_rows()
            ]
            result["short_scores"] = evaluate_rows(model, rows, class_score, (), {})
            result["short"] = short
        return result

    def _save_companions(self) -> None:
        AutoTokenizer.from_pretrained(self.state / "base").save_pretrained(self.folder / "model")

    def tables(self, results: dict[str, Any]) -> list[dict[str, Any]]:
        classes = results["convert"]["classes"]
        labels = [s["label"] for s in results["evaluation"]["scores"] if s["selection"] == "dense"]
        # what the largest class would get if it were always the answer
        most = np.bincount(labels).max() / len(labels)
        rows = [["largest class", "", str(len(labels)), "", f"{most:.3f}", ""]]
        for title, name in (("before", "before"), ("dense LoRA", "reference"), ("", "evaluation")):
            for row in class_table(results.get(name, {}).get("scores", []), len(classes)):
                rows.append(_cells(f"{row['selection']}{', ' if title else ''}{title}", row))
        for row in class_table(results["evaluation"].get("short_scores", []), len(classes)):
            rows.append(_cells(f"dense, first {results['evaluation']['short']} tokens only", row))
        known = (
            f"Windows of at most {self._one_length()} tokens of documents that did not train; classes: "
            f"{', '.join(classes)}."
        )
        columns = ["selection", "keys", "n", "log-loss", "accuracy ± standard error", "macro F1"]
        return [{"title": "Classes", "note": known, "columns": columns, "rows": rows}]


def _cells(selection: str, row: dict[str, Any]) -> list[str]:
    keys = "" if row["keys"] is None else str(row["keys"])
    accuracy = f"{row['accuracy']:.3f} ± {row['accuracy_error']:.3f}"
    return [selection, keys, str(row["n"]), f"{row['loss']:.4f}", accuracy, f"{row['macro_f1']:.3f}"]


def extended_positions(model: PreTrainedModel, length: int) -> PreTrainedModel:
    """A BERT-like ``model`` with ``length`` positions: its learned ones over and over (Beltagy et al. 2020, Longformer,
    section 5).

    Raises:
        RecipeError: it has fewer positions, and no table of them that could be continued.
    """
    known = model.config.max_position_embeddings
    if known >= length:
        return model
    table = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    if not isinstance(table, nn.Embedding) or table.num_embeddings != known or table.padding_idx is not None:
        raise RecipeError(
            f"{type(model).__name__} reads {known} tokens and has no table of learned positions to continue: lower "
            "the context"
        )
    state = {
        name: value.repeat(-(-length // known), 1)[:length] if value is table.weight else value
        for name, value in model.state_dict(keep_vars=True).items()
    }
    config = copy.deepcopy(model.config)
    config.max_position_embeddings = length
    # made anew, as other buffers follow from the number of positions
    longer: Any = type(model)(config).to(dtype=model.dtype)  # type: ignore[call-arg]
    longer.load_state_dict(state)
    return longer.train(model.training)  # type: ignore[no-any-return]
