"""The next-token loss a part of the tokens at a time, so that the logits of all tokens never exist.

At 16k tokens and 49k words the float32 logits, their softmax and their gradient would take 9.7 GB; a part of 256 MB at
a time costs no more arithmetic: the gradient of each part is computed with it and kept at the size of the hidden
states.
"""

# Shapes: n tokens of all rows, d hidden size.

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention.gradients import Carried, carry
from ..config import IGNORE_INDEX
from .late_logits import LateLogits

LOGITS_BYTES = 1 << 28  # float32 logits that may exist at a time
CHECK_TOKENS = 16
UNDO = "_chunked_loss"  # attribute of a model that holds what was there before
TOLERANCE = 1e-3  # relative; bf16 logits of a few tokens


class _Head:
    """The output layer of a model, which passes hidden states through while the model's forward is to make
    no logits.
    """

    def __init__(self, model: Any) -> None:
        self.layer: nn.Module = model.get_output_embeddings()
        # a forward set on the instance, as by hooks of other libraries, is put back by `whole_loss`
        self.before = self.layer.__dict__.get("forward")
        self.own, self.through = self.layer.forward, False
        self.layer.forward = self._forward
        self.returns_dict = bool(getattr(model.config, "return_dict", True))
        self.chunk = max(1, LOGITS_BYTES // (4 * int(model.config.get_text_config().vocab_size)))

    def _forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden if self.through else self.own(hidden, *args, **kwargs)

    # loss = Σ_i −log softmax(W h_i)[y_i] / num_items
    # a sum over tokens: chunks of it change nothing but rounding
    def loss(self, hidden: Tensor, labels: Tensor, num_items: Tensor | int | None, ignore_index: int) -> Tensor:
        """Mean cross-entropy (the sum over ``num_items`` if given) of ``hidden`` [n, d] against shifted
        ``labels`` [n].
        """
        # called from within the model's forward, where the layer still passes hidden states through
        self.through = False
        # an output layer that is trained, or shares trained embeddings, has gradients in every chunk, too
        weights = [p for p in self.layer.parameters() if p.requires_grad]
        count = (labels != ignore_index).sum() if num_items is None else num_items
        divisor = torch.as_tensor(count, device=hidden.device, dtype=torch.float32).clamp(min=1)
        total, carried, of_hidden = hidden.new_zeros((), dtype=torch.float32), Carried(divisor), []
        wanted = torch.is_grad_enabled() and (hidden.requires_grad or bool(weights))
        for h, target in zip(hidden.split(self.chunk), labels.split(self.chunk), strict=True):
            # autograd ends at the leaf: the logits of a chunk are freed before those of the next one exist
            with torch.set_grad_enabled(wanted):
                leaf = h.detach().requires_grad_(wanted)
                loss = F.cross_entropy(self.layer(leaf).float(), target, ignore_index=ignore_index, reduction="sum")
            total += loss.detach()
            if wanted:
                first, *others = torch.autograd.grad(loss, [leaf, *weights])
                of_hidden.append(first)
                carried.add(others, weights)
        if not wanted:
            return total / divisor
        # sums over tokens: `carry` divides them by its weight, the divisor
        carried.grads = [torch.cat(of_hidden), *(carried.grads or [])]
        return carry(total / divisor, carried, [hidden, *weights])


def chunk_loss(model: Any) -> Any:
    """Make the forward pass of a causal ``model`` (stock, sparse, or a PeftModel) compute its loss in chunks; returns
    it.

    With ``labels`` the output of a step with gradients has no logits (``None``, and no entry of that name). Without
    gradients, as in ``evaluate`` and ``predict``, it has logits that are made once something reads them. Without labels
    everything is as before. The loss is checked against the model's own on a few tokens, so a model that does more
    between hidden states and loss is refused; a model on the meta device, which has no numbers, is taken as it is.

    Raises:
        ValueError: the model has no output layer, its own loss is another one, or ZeRO-3 sharded its weights, so that
            this is not known.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if base.get_output_embeddings() is None:
        raise ValueError(f"{type(base).__name__} has no output layer over a vocabulary: its loss needs no chunks")
    if getattr(base, UNDO, None) is not None:
        return model
    if hasattr(base.get_output_embeddings().weight, "ds_id"):
        raise ValueError(
            "chunk_loss compares losses before training, which needs whole weights: leave it out under ZeRO-3, or use "
            "FSDP2"
        )
    # the model's own loss is read before its forward is replaced, and must come out again afterwards
    has_numbers = base.device.type != "meta"
    want = _check_loss(base) if has_numbers else 0.0
    forward, own_loss, head = base.forward, base.loss_function, _Head(base)
    setattr(base, UNDO, {"forward": base.__dict__.get("forward"), "loss": own_loss, "head": head})
    base.loss_function = _deferred_loss(head, own_loss)
    base.forward = _without_logits(head, forward)
    got = _check_loss(base) if has_numbers else 0.0
    if not abs(got - want) <= TOLERANCE * abs(want):
        whole_loss(base)
        raise ValueError(
            f"the chunked loss of {type(base).__name__} is {got:.6f} where its own is {want:.6f}: the model changes "
            "its logits "
            "(a soft cap, say) or has a loss of its own. Train it without the chunked loss"
        )
    return model


def whole_loss(model: Any) -> Any:
    """Undo `chunk_loss`, if it was called; returns the model."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = base.__dict__.pop(UNDO, None)
    if before is not None:
        base.loss_function = before["loss"]
        for module, forward in ((base, before["forward"]), (before["head"].layer, before["head"].before)):
            module.__dict__.pop("forward")
            if forward is not None:
                module.forward = forward
    return model


def _without_logits(head: _Head, forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def forward_in_chunks(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("labels") is None:
            return forward(*args, **kwargs)
        # always as a dict, in which hidden states stand in the place of the logits
        return_dict = kwargs.pop("return_dict", None)
        head.through = True
        try:
            out = forward(*args, **kwargs, return_dict=True)
        finally:
            head.through = False
        values = dict(out.items())
        hidden = values.pop("logits")
        if not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
            values["logits"] = LateLogits(head.own, hidden)
        out = type(out)(**values)
        return out if (head.returns_dict if return_dict is None else return_dict) else out.to_tuple()

    return forward_in_chunks


def _deferred_loss(head: _Head, loss_function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def loss_in_chunks(
        logits: Tensor,
        labels: Tensor | None,
        vocab_size: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = IGNORE_INDEX,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if not head.through:
            options = {
                "num_items_in_batch": num_items_in_batch,
                "ignore_index": ignore_index,
                "shift_labels": shift_labels,
                **kwargs,
            }
            return loss_function(logits=logits, labels=labels, vocab_size=vocab_size, **options)
        # logits at position t predict token t + 1, and the last position predicts none
        if shift_labels is None:
            assert labels is not None
            shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        return head.loss(
            logits.flatten(0, -2), shift_labels.flatten().to(logits.device), num_items_in_batch, ignore_index
        )

    return loss_in_chunks


@torch.no_grad()
def _check_loss(model: Any) -> float:
    training = model.training
    model.eval()
    try:
        # seeded and on the CPU: the same tokens at both calls, on every device, and the global generator stays as it is
        vocabulary = int(model.config.get_text_config().vocab_size)
        generator = torch.Generator(device="cpu").manual_seed(0)
        ids = torch.randint(vocabulary, (1, CHECK_TOKENS), generator=generator, dtype=torch.int64, device="cpu").to(
            model.device
        )
        return float(model(input_ids=ids, labels=ids, use_cache=False).loss)
    finally:
        model.train(training)
