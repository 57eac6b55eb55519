"""Which keys of a recipe each task reads; a recipe that states another one is refused, and a run does not see it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

EVERY = frozenset({"name", "task", "seed", "smoke", "model.dtype", "sparse_attention"})
_MODEL = frozenset({"packages", "model.source", "model.name", "model.license"})
_DISTILLED = frozenset({"distill.context", "distill.batches", "distill.settings"})
_TRAINED = _MODEL | _DISTILLED | {"lora.context", "lora.steps", "lora.settings"}
_COMPARED = frozenset({"compare.before", "compare.dense_lora"})
_WINDOWS = frozenset({"quality.length", "quality.windows", "quality.budgets"})
_TEXTS = frozenset({"data.train", "data.eval", "data.split"})
_PACKED = frozenset({"data.end_of_text"})
_SPEED = frozenset(f"speed.{key}" for key in ("length", "keys", "decode_tokens", "repeats", "attention_repeats"))
_SERIES = ("time", "time_format", "machine", "channels", "patch", "horizon", "period", "pretrain", "model")
_CARD = frozenset({"model.hub_id"})
_LANGUAGE = _TRAINED | _CARD | _TEXTS | _PACKED | _COMPARED | _WINDOWS | _SPEED
_LANGUAGE |= {"distill.packed", "quality.decode_tokens", "quality.selections", "prompt", "max_new_tokens"}
_STREAMED = frozenset({"lora.packed", "data.streaming"})
_FITTED = frozenset({"data.fit", "quality.fit_windows"})
_SCORED = _TRAINED | _CARD | _COMPARED | _WINDOWS | {"quality.selections"}

READS: dict[str, frozenset[str]] = {
    "causal_lm": EVERY | _LANGUAGE | _STREAMED | _FITTED | {"minutes"},
    "questions": EVERY | _LANGUAGE | {"data.questions"},
    "classification": EVERY | _SCORED | _TEXTS | {"data.label"},
    "forecasting": EVERY | _SCORED | {"data.train", "data.split"} | {f"series.{key}" for key in _SERIES},
    "ablation": EVERY
    | _TRAINED
    | _TEXTS
    | _PACKED
    | _STREAMED
    | _FITTED
    | _WINDOWS
    | {f"ablate.{key}" for key in ("factors", "seeds", "full", "repeats")},
    "robustness": EVERY | _MODEL | _DISTILLED | _WINDOWS | {"robustness.domains", "robustness.contexts"},
    "longlink": EVERY | {"longlink"},
}


def stated(values: Mapping[str, Any], known: Mapping[str, Any]) -> Iterator[str]:
    """The keys that ``values`` set, as ``section.key`` where ``known``, the defaults, has a section of fixed keys."""
    for name, value in values.items():
        if name == "smoke":
            yield from stated(value, known)
        elif name == "quality":
            # a list: every key of its entries once
            yield from sorted({f"{name}.{key}" for entry in value for key in entry})
        elif isinstance(known.get(name), dict) and known[name]:
            yield from (f"{name}.{key}" for key in value)
        else:
            yield name


def check_read(keys: Iterable[str], task: str) -> None:
    """Raise ValueError for a key among ``keys`` that ``task`` does not read."""
    for key in keys:
        if key in READS[task]:
            continue
        section = key.partition(".")[0]
        sections = sorted(name for name in READS[task] if name.partition(".")[0] == section)
        others = [name for name, reads in READS.items() if key in reads]
        raise ValueError(
            f"{key} is stated, but task {task!r} does not read it: remove it, or set task to one that reads it: "
            f"{', '.join(others)}. "
            f"{task} reads {', '.join(sections) if sections else f'nothing of {section}'}; all its keys: "
            f"{', '.join(sorted(READS[task]))}"
        )


def read_by(task: str, values: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` whose sections hold only the keys that ``task`` reads, so that reading another one is an error."""
    return {
        # sections of fixed keys are cut down; those that take any key stay whole
        name: {key: part for key, part in value.items() if f"{name}.{key}" in READS[task]}
        if isinstance(known.get(name), dict) and known[name]
        else value
        for name, value in values.items()
    }
