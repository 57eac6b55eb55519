"""Whether sparse attention works under a Transformers that it was not tested with:
tried on a tiny random model, once for each version.
"""

from __future__ import annotations

import itertools
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from threading import RLock
from typing import Any
from unittest.mock import patch

import torch
import transformers
from hf_sparse_attn_kernels import BlockSelection
from torch import Tensor, nn

from ..architectures.cache_arguments import MODEL_ARGUMENT
from ..architectures.versions import SUPPORTED_TRANSFORMERS, advice, is_tested, tested_range
from ..attention.cache import SparseCacheLayerMixin
from ..attention.call import SparseCall
from ..router.module import RoutingInputs, SparseRouter
from .self_test_results import keep, kept_pass, newest_pass

# No end-of-sequence token, so that generation has its full length. The weights are ten times as large as usual:
# with small ones attention is nearly uniform, and a wrong selection would hardly show in the logits.
MODEL: dict[str, Any] = {
    **{"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.2},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None},
}
SPARSE: dict[str, Any] = {
    "block_size": 16,
    "query_tile": 16,
    "sink": 16,
    "local": 16,
    "dense_below": 0,
    "query_samples": 8,
    "index_dim": 8,
}
# every block is kept under the first budget, 80 of up to 150 keys under the second
EVERY_BLOCK = {**SPARSE, "density": 1.0, "min_keys": 80}
BUDGET = {**SPARSE, "density": 0.05, "min_keys": 80, "candidate_factor": 1.5}
LENGTH, PROMPT = 150, 141  # whole blocks and a partial one; the prompt ends within a block
TOLERANCE = 1e-4  # of the largest value, in float32

_TESTING = RLock()  # the test makes sparse models, too: in its own thread that must not start it again
_passed: set[str] = set()
_running = False


class SelfTestError(RuntimeError):
    """Sparse attention does not work under the installed Transformers."""


class Models:
    """A stock model, and sparse ones with its weights: every block kept, and a budget that cuts most of a text."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.stock = transformers.LlamaForCausalLM(transformers.LlamaConfig(**MODEL)).eval()
        self.kept, self.cut = (self._sparse(settings) for settings in (EVERY_BLOCK, BUDGET))
        self.ids = torch.randint(3, 97, (2, LENGTH), dtype=torch.int64, device="cpu")

    def _sparse(self, settings: dict[str, Any]) -> Any:
        config = transformers.AutoConfig.for_model("llama", **MODEL, sparse_attention=settings)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        # not strict: the stock model has no routers
        model.load_state_dict(self.stock.state_dict(), strict=False)
        for router in _routers(model):
            for weight in router.parameters():  # away from their untrained start
                weight.add_(torch.randn_like(weight), alpha=0.1)
        return model


def require_self_test() -> None:
    """Under a Transformers that was not tested: run the self-test unless this version has passed it before.

    Raises:
        SelfTestError: it failed; the message holds what differed and the newest version that works.
    """
    if is_tested() or transformers.__version__ in _passed:
        return
    with _TESTING:
        if _running or kept_pass():
            return
        failed = run_self_test()
    if failed:
        raise SelfTestError(
            f"no sparse model can be made under transformers {transformers.__version__}, which is not one of the "
            "versions that "
            f"hf_sparse_attn was tested with ({tested_range()}), and in which its self-test failed:\n  "
            + "\n  ".join(failed)
            + f"\nInstall the newest version that works: {advice(newest_pass(SUPPORTED_TRANSFORMERS[1]))}. "
            "`hf-sparse-attn doctor` runs the test again"
        )


def run_self_test() -> list[str]:
    """Try what a sparse model needs of Transformers, on the CPU: what differed, nothing if all is well. The result is
    kept.

    Whatever the caller has set (default dtype and device, random state, inference mode) neither matters nor is changed.
    """
    global _running
    with _TESTING, _undisturbed():
        _running = True
        try:
            failed = _differences()
        finally:
            _running = False
        keep(failed)
        (_passed.discard if failed else _passed.add)(transformers.__version__)
    return failed


def _differences() -> list[str]:
    try:
        models = Models()
    except Exception as error:  # whatever a new version does
        return [f"a sparse model cannot be made: {type(error).__name__}: {error}"]
    failed = []
    for check in CHECKS:
        try:
            differences = check(models)
        except Exception as error:
            differences = f"{type(error).__name__}: {error}"
        if differences:
            failed.append(f"{(check.__doc__ or '').rstrip('.')}: {differences}")
    return failed


class _Selections(SparseCall):
    """Notes the selections of a pass."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[BlockSelection] = []

    def on_selection(self, router: SparseRouter, inputs: RoutingInputs, selection: BlockSelection) -> None:
        self.seen.append(selection)


def _every_block_kept(models: Models) -> str:
    """With every block kept, through the sparse path, a model has the logits of the stock one."""
    call = _Selections()
    got, seen = models.kept(input_ids=models.ids, sparse_call=call).logits, call.seen
    layers = int(MODEL["num_hidden_layers"])
    if len(seen) < layers or any(int(one.kept().sum(-1).max()) != one.grid.blocks for one in seen):
        return f"the sparse path ran {len(seen)} times in {layers} layers, or left blocks out"
    return _apart(got, models.stock(input_ids=models.ids).logits) or _apart(
        models.kept(input_ids=models.ids).logits, got
    )


def _padded(models: Models) -> str:
    """A row with padding has the logits that it has without."""
    mask = torch.ones_like(models.ids)
    mask[1, :30] = 0
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    got = models.cut(input_ids=models.ids, attention_mask=mask, position_ids=position_ids).logits
    return _apart(got[0], _alone(models, models.ids[:1])) or _apart(got[1, 30:], _alone(models, models.ids[1:, 30:]))


def _packed(models: Models) -> str:
    """Packed documents have the logits that they have alone."""
    # positions that begin again at 0 are how packed documents are told
    cuts = (0, 60, LENGTH)
    position_ids = torch.cat([torch.arange(length, dtype=torch.int64, device="cpu") for length in (60, LENGTH - 60)])[
        None
    ]
    got = models.cut(input_ids=models.ids[:1], position_ids=position_ids, use_cache=False).logits[0]
    return next(
        (
            difference
            for a, b in itertools.pairwise(cuts)
            if (difference := _apart(got[a:b], _alone(models, models.ids[:1, a:b])))
        ),
        "",
    )


def _cached(models: Models) -> str:
    """Decoding with a cache has the logits of a forward pass without."""
    want = models.cut(input_ids=models.ids, use_cache=False, sparse_call=SparseCall(decode_from=PROMPT)).logits
    # without a difference to dense the comparison below would prove nothing
    if not _apart(want, models.stock(input_ids=models.ids).logits):
        return "a budget that cuts most of the text changes nothing"
    for cache in (
        transformers.DynamicCache(config=models.cut.config),
        transformers.StaticCache(models.cut.config, LENGTH),
    ):
        got = [models.cut(input_ids=models.ids[:, :PROMPT], **{MODEL_ARGUMENT: cache}).logits]
        got += [
            models.cut(input_ids=models.ids[:, at : at + 1], **{MODEL_ARGUMENT: cache}).logits
            for at in range(PROMPT, LENGTH)
        ]
        if difference := _apart(torch.cat(got, 1), want):
            return f"{type(cache).__name__}: {difference}"
        if not all(isinstance(layer, SparseCacheLayerMixin) and all(layer.summarised) for layer in cache.layers):
            return f"{type(cache).__name__}: its layers were not given summaries"
    return ""


def _generated(models: Models) -> str:
    """With every block kept, generation gives the tokens of the stock model."""
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    prompt = models.ids[:, :PROMPT]
    mask = torch.ones_like(prompt)
    want = models.stock.generate(prompt, attention_mask=mask, **options)
    for extra in ({}, {"use_cache": False}, {"num_beams": 2}):
        stock = (
            want if "num_beams" not in extra else models.stock.generate(prompt, attention_mask=mask, **options, **extra)
        )
        if not torch.equal(models.kept.generate(prompt, attention_mask=mask, **options, **extra), stock):
            return f"other tokens{f' with {extra}' if extra else ''}"
    return ""


def _saved(models: Models) -> str:
    """A saved model is loaded as it was, and as the stock model where this package is not asked for."""
    want = _alone(models, models.ids)
    with tempfile.TemporaryDirectory() as folder:
        models.cut.save_pretrained(folder)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        stock = transformers.LlamaForCausalLM.from_pretrained(folder).eval()
    if type(loaded) is not type(models.cut) or any(router.fresh for router in _routers(loaded)):
        return f"a {type(loaded).__name__} was loaded, or its routers were not"
    difference = _apart(loaded(input_ids=models.ids).logits, want)
    return difference or _apart(stock(input_ids=models.ids).logits, models.stock(input_ids=models.ids).logits)


CHECKS: tuple[Callable[[Models], str], ...] = (_every_block_kept, _padded, _packed, _cached, _generated, _saved)


def _alone(models: Models, ids: Tensor) -> Tensor:
    """Logits of the cut model, of one row without the row's dimension."""
    logits: Tensor = models.cut(input_ids=ids, use_cache=False).logits
    return logits[0] if len(ids) == 1 else logits


def _apart(got: Tensor, want: Tensor) -> str:
    """How far logits are from what they should be, "" where they are no further than rounding takes them."""
    if got.shape != want.shape:
        return f"logits {tuple(got.shape)} instead of {tuple(want.shape)}"
    share = float((got - want).abs().max() / want.abs().max())
    return "" if share <= TOLERANCE else f"logits differ by {share:.1e} of the largest"


def _routers(model: nn.Module) -> list[SparseRouter]:
    return [module for module in model.modules() if isinstance(module, SparseRouter)]


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Round the test: on the CPU, in float32, without gradients and without a word, whatever the caller has set."""
    dtype, bars = torch.get_default_dtype(), transformers.utils.logging.is_progress_bar_enabled()
    verbosity = transformers.utils.logging.get_verbosity()
    with ExitStack() as stack:
        stack.callback(torch.set_default_dtype, dtype)
        stack.callback(transformers.utils.logging.set_verbosity, verbosity)
        if bars:
            stack.callback(transformers.utils.logging.enable_progress_bar)
        torch.set_default_dtype(torch.float32)
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        for context in (
            torch.random.fork_rng(devices=[]),
            torch.device("cpu"),
            torch.inference_mode(False),
            torch.no_grad(),
        ):
            stack.enter_context(context)
        stack.enter_context(torch.autocast("cpu", enabled=False))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        # of several processes the first alone would load weights
        stack.enter_context(patch.dict(os.environ, FSDP_CPU_RAM_EFFICIENT_LOADING="false"))
        yield
