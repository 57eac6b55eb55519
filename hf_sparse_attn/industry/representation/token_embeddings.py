"""A model and its tokenizer extended by a vocabulary of logs; each new embedding starts from those of its text."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import PlantDataError
from .log_vocabulary import KEY, LogVocabulary
from .text_tokens import TextEncoder

SMALLEST_SHARE = 0.9  # of a model's embeddings have a token; models pad their vocabulary by 3 % at most


def extend_model(model: Any, tokenizer: PreTrainedTokenizerBase, vocabulary: LogVocabulary) -> list[int]:
    """Add the vocabulary to model and tokenizer, in place; both are then saved and loaded as ever.

    The row of a new token in the input and the output embeddings is the mean of the rows of its text's tokens, that of
    a token without a text the mean of all rows (Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language
    Models"). The config keeps the digest under ``log_vocabulary``. Nothing changes where the model has this vocabulary.

    Args:
        model: a causal language model, sparse or not; of a `peft.PeftModel` the base model is extended. Its adapter
            trains the new rows only with ``trainable_token_indices`` or ``modules_to_save``: extend first, then add it.
        tokenizer: that of the model; a fast one.
        vocabulary: the tokens.

    Returns:
        The token ids, in the order of the vocabulary.

    Raises:
        PlantDataError: model or tokenizer hold another vocabulary of logs, the tokenizer is that of another model, or
            the model has no embeddings that can be extended. Nothing is changed then.
    """
    base: PreTrainedModel = model.get_base_model() if hasattr(model, "peft_config") else model
    known = getattr(base.config, KEY, None)
    if known is not None:
        _refuse_another(known, vocabulary)
        return [int(number) for number in vocabulary.ids(tokenizer)]
    weights = _weights(base)
    rows = weights[0].shape[0]
    _refuse_foreign(base, tokenizer, rows)
    encoder = TextEncoder(tokenizer)
    texts = [ids for ids, _ in encoder(vocabulary.descriptions)]
    old = len(tokenizer)
    vocabulary.add_to(tokenizer)
    ids = vocabulary.ids(tokenizer)
    means = [_means(weight, texts, old) for weight in weights]
    if len(tokenizer) > rows:  # a model may have spare rows
        base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        for weight, mean in zip(_weights(base), means, strict=True):
            weight[torch.from_numpy(ids).long().to(weight.device)] = mean.to(weight)
    entry = {"digest": vocabulary.digest, "tokens": len(vocabulary)}
    for config in {id(c): c for c in (base.config, base.config.get_text_config())}.values():
        setattr(config, KEY, entry)
    return [int(number) for number in ids]


def _weights(model: PreTrainedModel) -> list[Tensor]:
    """Input embeddings [tokens, dim], output embeddings where they are others, and their bias [tokens] if any."""
    ways = ["load the model without quantising its embeddings (llm_int8_skip_modules)", "use a causal language model"]
    given, output = model.get_input_embeddings(), model.get_output_embeddings()
    if output is None:
        raise PlantDataError(f"{type(model).__name__} has no language model head to extend", ways[1:])
    for layer, kind in ((given, nn.Embedding), (output, nn.Linear)):
        # an adapter on the embeddings stands in front of the layer
        if any(hasattr(layer, name) for name in ("base_layer", "modules_to_save", "original_module")):
            raise PlantDataError(
                "an adapter is on the embeddings already",
                ["extend the base model first, then add the adapter", "merge the adapter: merge_and_unload()"],
            )
        if not isinstance(layer, kind) or not layer.weight.is_floating_point():
            held = getattr(getattr(layer, "weight", None), "dtype", None)
            raise PlantDataError(f"the embeddings ({type(layer).__name__}, {held}) cannot be extended", ways)
    tied = output.weight is given.weight
    return [given.weight, *([] if tied else [output.weight]), *([] if output.bias is None else [output.bias])]


def _means(weight: Tensor, texts: list[Any], old: int) -> Tensor:
    """The mean of each text's rows; float32 [texts, dim], of a bias [texts]."""
    known = weight.detach()[:old]
    whole = known.mean(0, dtype=torch.float32)
    rows = [torch.from_numpy(ids).long().to(known.device) for ids in texts]
    return torch.stack([known[row].float().mean(0) if len(row) else whole for row in rows])


def _refuse_another(known: dict[str, Any], vocabulary: LogVocabulary) -> None:
    if known.get("digest") != vocabulary.digest:
        raise PlantDataError(
            f"the model holds another vocabulary of logs ({str(known.get('digest'))[:12]}…, this is "
            f"{vocabulary.digest[:12]}…), whose tokens mean other things",
            ["use the vocabulary that was saved with it: LogVocabulary.load(FOLDER)", "extend the base model instead"],
        )


def _refuse_foreign(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Raise PlantDataError where the tokenizer cannot be that of the model."""
    ways = ["load the tokenizer from the folder of the model", "name the model that this tokenizer belongs to"]
    if tokenizer.init_kwargs.get(KEY) is not None:
        raise PlantDataError(
            "the tokenizer holds a vocabulary of logs, the model does not",
            ["load the model that was saved with the tokenizer", "load the tokenizer of the base model"],
        )
    size = len(tokenizer)
    if size > rows or size < SMALLEST_SHARE * rows:
        grow = ["if it is the model's own: model.resize_token_embeddings(len(tokenizer))"] if size > rows else []
        raise PlantDataError(f"the tokenizer has {size} tokens, the model embeddings for {rows}", [*ways, *grow])
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    special = added | set(tokenizer.all_special_ids)
    config = model.config.get_text_config()
    for name in ("bos_token_id", "eos_token_id"):
        held = getattr(config, name, None)
        for number in np.atleast_1d([] if held is None else held).astype(int):
            if number not in special:
                token = tokenizer.convert_ids_to_tokens(int(number))
                raise PlantDataError(f"{name} {number} of the model is the token {token!r} of the tokenizer", ways)
