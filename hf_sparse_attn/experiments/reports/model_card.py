"""The model card, rendered from results alone, with the metadata that the Hub reads."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ...architectures.versions import SUPPORTED_TRANSFORMERS
from ...system.files import write_text
from .rendering import render

TAGS = ("hf-sparse-attn", "sparse-attention")
SOURCE = re.compile(r"(?P<label>[\w-]+=)?(?P<rest>(?P<kind>(pypi|deb|hub|new):)?.*)", re.DOTALL)
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
PIPELINES = {
    **dict.fromkeys(("causal_lm", "questions"), "text-generation"),
    **{"classification": "text-classification", "forecasting": "time-series-forecasting"},
}
LOADING = {  # (class to import from transformers, what loads the model)
    **dict.fromkeys(("causal_lm", "questions"), ("AutoModelForCausalLM", "AutoModelForCausalLM")),
    "classification": ("AutoModelForSequenceClassification", "AutoModelForSequenceClassification"),
    "forecasting": ("PatchTSTForPrediction", "hf_sparse_attn.sparse_class(PatchTSTForPrediction)"),
}
OWN = ("dense", "two stages")  # selections that are this model; the others are what it is compared with


@dataclass(frozen=True)
class Base:
    """The model that was made sparse; what is not known is None."""

    name: str | None  # for people
    hub_id: str | None
    licence: str | None


def _template() -> Traversable:
    packaged = files("hf_sparse_attn").joinpath("model_cards", "template.md.jinja")
    # the source tree
    return packaged if packaged.is_file() else Path(__file__).parents[3] / "model_cards" / "template.md.jinja"


def base_of(results: Mapping[str, Any]) -> Base:
    """The base model, as the recipe names it; its licence also from what the run found in its card."""
    model = results.get("recipe", {}).get("model", results.get("base", {}))
    source = model.get("hub_id") or model.get("source")
    # a folder of that name is no id of the Hub
    hub_id = source if source and HUB_ID.fullmatch(source) and not Path(source).exists() else None
    licence = model.get("license") or results.get("convert", {}).get("license")
    return Base(model.get("name") or hub_id or (source and without_folders(source)), hub_id, licence)


def without_folders(source: str) -> str:
    """A source of texts or of a model as others may see it:
    of a path, which says something of the machine only, the last part.
    """
    match = SOURCE.fullmatch(source)
    assert match is not None
    if match["kind"]:
        return source
    path, mark, member = match["rest"].partition("::")
    return f"{match['label'] or ''}{PurePosixPath(path.replace(chr(92), '/')).name}{mark}{member}"


def one_line(value: Any) -> Any:
    """All texts in ``value`` on one line each: a line end would start another line of the card, or end its metadata."""
    if isinstance(value, str):
        return " ".join(value.split())
    if isinstance(value, Mapping):
        return {key: one_line(part) for key, part in value.items()}
    return [one_line(part) for part in value] if isinstance(value, list | tuple) else value


def as_text(value: Any) -> Any:
    """All texts in ``value`` so that Markdown shows them as they are:
    no HTML, no links, no further cells of a table.
    """
    if isinstance(value, str):
        # `](` would make a link, a backtick code
        escaped = html.escape(value, quote=False).replace("](", "]\\(").replace("`", "\\`")
        return re.sub(r"(?<!\\)\|", r"\\|", escaped)
    if isinstance(value, Mapping):
        return {key: as_text(part) for key, part in value.items()}
    return [as_text(part) for part in value] if isinstance(value, list | tuple) else value


def _texts(windows: list[dict[str, Any]], length: int | None = None) -> str:
    """The documents that windows (of one length) were cut from, each once."""
    return ", ".join(dict.fromkeys(w["document"].split("[")[0] for w in windows if length in (None, w["length"])))


def eval_results(table: list[dict[str, Any]], windows: list[dict[str, Any]]) -> list[EvalResult]:
    """What was measured of this model, dense and sparse, as entries of the metadata."""
    results: dict[tuple[Any, ...], EvalResult] = {}

    def add(row: dict[str, Any], kind: str, name: str, value: float, **more: float) -> None:
        budget = "dense" if row["keys"] is None else f"{row['keys']} keys"
        results.setdefault(
            (row["length"], row["keys"], kind, name),  # the dense row stands before each budget
            EvalResult(
                task_type="text-generation",
                dataset_type="text",
                dataset_name=_texts(windows, row["length"]),
                dataset_config=f"{row['length']} tokens",
                metric_type=kind,
                metric_name=f"{name}, {budget}",
                metric_value=round(value, 4),
                metric_args={"keys": row["keys"], "windows": row["n"], **{k: round(v, 4) for k, v in more.items()}},
            ),
        )

    for row in (row for row in table if row["selection"] in OWN):
        for path in ("prefill", "decode"):
            if path in row:
                add(row, "log-loss", f"log-loss at {path}", row[path])
            if f"{path}_share" in row:
                share = row[f"{path}_share"]
                interval = {end: share[end] for end in ("low", "high") if row["n"] > 1}  # of one window there is none
                add(
                    row,
                    "share-of-oracle",
                    f"share of the way from window to oracle at {path}",
                    share["share"],
                    **interval,
                )
        if "recovered_share" in row:
            add(row, "recovered-share", "recovered share of softmax mass", row["recovered_share"]["share"])
    return list(results.values())


def model_card(results: Mapping[str, Any], name: str) -> ModelCard:
    """The card of results of a run, or of the verbs ``eval``, ``lm-eval`` and ``doctor --needles``; ``name`` is what
    those without a recipe call the model.

    Raises:
        ValueError: the results lack something that a card must say, or are of a task that leaves no model.
    """
    task = results.get("recipe", {}).get("task", "causal_lm")
    if task not in PIPELINES:
        raise ValueError(
            f"a run of task {task} leaves no model behind, so there is nothing to make a card of; its report is "
            "report.html"
        )
    results = one_line(results)
    # a run has quality as a step, what the verb eval wrote is it
    quality = results.get("quality", results)
    # results of other verbs have no windows of text
    apart = "tables" in results or ("needles" in results and quality is results and "table" not in results)
    needed = (*(() if apart else (("table", quality), ("windows", quality))), ("environment", results))
    missing = [key for key, where in needed if key not in where]
    if missing:
        raise ValueError(
            f"these results hold no {' and no '.join(missing)}: a card is made from what the verbs run, eval, lm-eval "
            "and doctor --needles write"
        )
    base, table, windows = base_of(results), quality.get("table", []), quality.get("windows", [])
    name = results["recipe"]["name"] if "recipe" in results else one_line(name)
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=PIPELINES[task],
        license=base.licence,
        base_model=base.hub_id,
        tags=list(TAGS),
        model_name=name,
        eval_results=eval_results(table, windows) or None,
    )
    steps = {name: value for name, value in results.items() if isinstance(value, dict) and "seconds" in value}
    sources = results.get("recipe", {}).get("data", {})
    shown = as_text(
        {
            "name": name,
            "base": vars(base),
            "results": results,
            "table": table,
            "tables": results.get("tables", []),
            "texts": _texts(windows),
            "training": [without_folders(source) for source in sources.get("train", ())],
            "evaluation": [without_folders(source) for source in sources.get("eval", ())],
            "comparison": results.get("comparison"),
            "answers": quality.get("answers"),
            "needles": results.get("needles"),
        }
    )
    text = render(
        _template(),
        metadata=data.to_yaml(),
        **shown,
        sparse=results["answer"]["sparse_attention"] if "answer" in results else results["sparse_attention"],
        loading=LOADING[task],
        longest=max((row["length"] for row in table), default=0),
        speed=results.get("speed", {}).get("model"),
        steps={name: step["seconds"] for name, step in steps.items()},
        energy=_energy(list(steps.values())),
        transformers=SUPPORTED_TRANSFORMERS,
    )
    return ModelCard(text)


def _energy(steps: list[dict[str, Any]]) -> float | None:
    """Joules of all steps; None unless it was measured in each."""
    joules = [step.get("cpu_energy_joules") for step in steps]
    return None if not joules or None in joules else sum(joules)  # type: ignore[arg-type]


def write_card(path: str | Path, results: Mapping[str, Any]) -> ModelCard:
    """Write the `model_card` of ``results``; no figure in it is typed by hand.
    Raises ValueError as `model_card` does.
    """
    card = model_card(results, Path(path).absolute().parent.name)
    write_text(path, str(card))
    return card
