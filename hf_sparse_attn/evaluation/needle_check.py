"""Does a sparse model still find what stands far back? Facts in long texts, read under dense and sparse attention."""

# Shapes: N tokens of a haystack, P of them prefilled.

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from ..architectures.cache_arguments import MODEL_ARGUMENT
from ..attention.call import Selector, SparseCall, learned_selector
from ..config import SparseAttentionConfig
from ..data.planted_facts import Haystack, PlantedFact, haystacks
from ..models.attach import no_routers, routers
from ..models.convert import sparse_attention_as
from ..models.layer_numbers import sparse_sites
from ..system.progress import counted
from ..training.mass_threshold import KeptKeys
from ..training.passes import backbone
from .needle_report import NeedleReading, NeedleReport, Remedy

FACTS = 5  # of a length
LENGTHS = (2, 4)  # times the keys below which nothing is cut: what is asked for by default
MORE_CANDIDATES, MORE_KEYS = 4, 2  # times as many, when the questions of lost facts are read again

Answer = tuple[float, bool]  # log-loss (nats a token), and whether each token is the most likely one


def default_text() -> str:
    """English prose that is part of Python: its language reference.

    Raises:
        ValueError: this Python was installed without it.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ValueError(
            "this Python has no pydoc_data, the text that facts are planted in by default: give a text of your own"
        ) from error
    return "\n\n".join(topics[name] for name in sorted(topics))


@torch.no_grad()
def needle_check(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    lengths: Sequence[int] | None = None,
    facts: int = FACTS,
    seed: int = 0,
    text: str | None = None,
    selector: Selector = learned_selector,
    progress: bool = True,
) -> NeedleReport:
    """Plant facts in a text at evenly spread depths, and ask for them under dense and under sparse attention.

    As in generation the prompt is routed in query tiles and the answer token by token; all questions of a length go on
    from one prefill, which is cut where a query tile ends. Another fact stands before each question as an example.
    Questions of facts that are lost are read again with more candidates, and with more keys, which tells what to raise.
    Chat templates are not used.

    Args:
        model: a sparse causal language model, its routers trained or not; it runs with its own settings.
        lengths: tokens of prompt and answer together; None for those of `default_lengths`.
        facts: of each length.
        seed: of words and numbers.
        text: what the facts stand in; None for `default_text`.
        selector: makes the selections in place of the model's routers.
        progress: show how many facts are read.

    Raises:
        ValueError: the model is no sparse causal language model, a length runs dense or is beyond its positions, or
            the tokenizer cannot tell facts (see `FactTokenizer`).
        SourceError: the text, or a length, is too short for the facts.
    """
    config = _checked(model)
    chosen = default_lengths(model) if lengths is None else sorted(set(lengths))
    if not chosen or chosen[0] < 1:
        raise ValueError(f"lengths is {lengths}: give at least one number of tokens")
    _check_positions(model, chosen[-1])
    made = haystacks(default_text() if text is None else text, tokenizer, chosen, facts, seed)
    for haystack in made:
        _check_length(haystack, config)
    calibrated = getattr(model, "calibration", None) is not None
    # a calibration's budgets are not those of the settings
    trials = [] if calibrated else more_of_both(config)
    training, reader = model.training, _Reader(model, selector, trials, progress)
    model.eval()
    try:
        for haystack in made:
            reader.read(haystack)
    finally:
        model.train(training)
    lost = len(reader.lost)
    remedies = tuple(Remedy(trial, reader.found_again[at], lost) for at, trial in enumerate(trials) if lost)
    return NeedleReport(tuple(reader.readings), reader.kept, config, calibrated, remedies)


def default_lengths(model: PreTrainedModel) -> list[int]:
    """Twice and four times the keys from which on anything is cut, as far as the model's positions reach."""
    config, most = routers(model)[0].config, _positions(model)
    least = max(config.dense_below, config.min_keys)
    return sorted({times * least if most is None else min(times * least, most) for times in LENGTHS})


def more_of_both(config: SparseAttentionConfig) -> list[dict[str, Any]]:
    """Changes of the settings with which stage 1 passes more on, and with which more keys are kept."""
    candidates = {"candidate_factor": MORE_CANDIDATES * config.candidate_factor}
    if config.mass_threshold is not None:
        return [candidates, {"mass_threshold": config.mass_threshold / MORE_KEYS}]
    most = {} if config.max_keys is None else {"max_keys": MORE_KEYS * config.max_keys}
    keys = {"density": min(1.0, MORE_KEYS * config.density), "min_keys": MORE_KEYS * config.min_keys, **most}
    return [candidates, keys]


def _checked(model: PreTrainedModel) -> SparseAttentionConfig:
    if not routers(model):
        raise ValueError(no_routers(model))
    causal = all(getattr(site, "is_causal", True) for site in sparse_sites(model))
    if not causal or not model.can_generate():
        raise ValueError(
            f"{type(model).__name__} is no causal language model, which could be asked for the facts of a text: load "
            "one with AutoModelForCausalLM"
        )
    return routers(model)[0].config


def _positions(model: PreTrainedModel) -> int | None:
    """Most tokens that the model was made for; None where its config does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _check_positions(model: PreTrainedModel, length: int) -> None:
    most = _positions(model)
    if most is not None and length > most:
        raise ValueError(
            f"a length of {length} tokens is beyond the {most} positions of this model "
            "(max_position_embeddings): dense attention is no measure there. Give shorter lengths"
        )


def _check_length(haystack: Haystack, config: SparseAttentionConfig) -> None:
    if prefilled(haystack, config.query_tile) < max(config.dense_below, 1):
        # the tiles that are prefilled, one that is not, and question and answer
        tiles = -(-max(config.dense_below, 1) // config.query_tile) + 1
        least = tiles * config.query_tile + haystack.length - len(haystack.ids)
        raise ValueError(
            f"a length of {haystack.length} tokens is too short: this model runs inputs of fewer than "
            f"dense_below={config.dense_below} tokens dense, so that nothing would be sparse. Give at least {least} "
            "tokens, or a lower dense_below"
        )


def prefilled(haystack: Haystack, query_tile: int) -> int:
    """Tokens that all questions have in common and that end with a query tile.

    At least a tile of the text is left, so that text and question are routed as the end of a prompt is, not singly.
    """
    return (len(haystack.ids) - query_tile) // query_tile * query_tile


class _Reader:
    """Reads all facts of haystacks under both; ``found_again`` counts those of ``lost`` that each trial finds."""

    def __init__(
        self, model: PreTrainedModel, selector: Selector, trials: Sequence[dict[str, Any]], progress: bool
    ) -> None:
        self.model, self.selector, self.trials, self.progress = model, selector, trials, progress
        self.readings: list[NeedleReading] = []
        self.lost: list[NeedleReading] = []
        self.kept: dict[int, float | None] = {}
        self.found_again = [0] * len(trials)

    def read(self, haystack: Haystack) -> None:
        prompt = _Prompt(self.model, haystack, SparseCall(dense=True))
        dense = [prompt.answer(fact) for fact in self._counted(haystack, "dense")]
        # the dense cache is not needed any more
        del prompt
        meter = KeptKeys(prefilled(haystack, routers(self.model)[0].config.query_tile), selector=self.selector)
        prompt = _Prompt(self.model, haystack, meter)
        sparse = [prompt.answer(fact) for fact in self._counted(haystack, "sparse")]
        self.kept[haystack.length] = meter.mean()
        lost = []
        for fact, one, other in zip(haystack.facts, dense, sparse, strict=True):
            self.readings.append(_reading(haystack, fact, one, other))
            if one[1] and not other[1]:
                self.lost.append(self.readings[-1])
                lost.append(fact)
        prompt.call = SparseCall(selector=self.selector)
        for at, trial in enumerate(self.trials if lost else ()):
            with sparse_attention_as(self.model, **trial):
                self.found_again[at] += sum(prompt.answer(fact)[1] for fact in lost)

    def _counted(self, haystack: Haystack, name: str) -> Any:
        return counted(haystack.facts, f"facts in {haystack.length} tokens, {name}", self.progress)


def _reading(haystack: Haystack, fact: PlantedFact, dense: Answer, sparse: Answer) -> NeedleReading:
    prompt = len(haystack.ids) + len(fact.question)
    return NeedleReading(
        length=haystack.length,
        depth=fact.start / prompt,
        distance=prompt - fact.start - fact.number_at,
        word=fact.word,
        number=fact.number,
        dense=dense[0],
        sparse=sparse[0],
        found_dense=dense[1],
        found_sparse=sparse[1],
    )


class _Prompt:
    """A haystack whose first P tokens were read under ``call``, and questions that go on from there."""

    def __init__(self, model: PreTrainedModel, haystack: Haystack, call: SparseCall) -> None:
        self.model, self.call, self.tile = model, call, routers(model)[0].config.query_tile
        self.cache = DynamicCache(config=model.config)
        ids = haystack.ids.to(model.device)
        self.rest = ids[prefilled(haystack, self.tile) :]
        # without its head: nobody reads logits of the haystack
        before = ids[None, : len(ids) - len(self.rest)]
        backbone(model)(before, **{MODEL_ARGUMENT: self.cache}, use_cache=True, sparse_call=call)

    def answer(self, fact: PlantedFact) -> Answer:
        """Log-loss of the answer, and whether greedy decoding would give it."""
        # a copy: not every kind of cache layer can be cropped
        cache = copy.deepcopy(self.cache)
        question, answer = fact.question.to(self.model.device), fact.answer.to(self.model.device)
        logits = [self._logits(torch.cat([self.rest, question]), cache)[-1:]]
        # a call with fewer new tokens than a query tile routes each of them singly, as decoding does
        for part in answer[:-1].split(max(1, self.tile - 1)) if len(answer) > 1 else ():
            logits.append(self._logits(part, cache))
        scores = torch.cat(logits).float()
        return float(F.cross_entropy(scores, answer)), bool((scores.argmax(-1) == answer).all())

    def _logits(self, ids: Tensor, cache: DynamicCache) -> Tensor:
        """Logits [n, vocabulary] of ``ids`` [n] behind what is in ``cache``; of the whole model, which may scale
        or cap them.
        """
        logits: Tensor = self.model(ids[None], **{MODEL_ARGUMENT: cache}, use_cache=True, sparse_call=self.call).logits
        return logits[0]
