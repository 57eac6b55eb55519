"""Stage B: LoRA on the backbone and the routers together, with the sparse forward pass, by `SparseTrainer`.

Loss = task loss + ``kl_weight`` · KL. The router's inputs are detached: routers learn from the KL only, the backbone
from the task only. A share of the steps runs dense, so that gradients also reach links that the routers would cut.
"""

# Shapes: N tokens of a row.

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..models.adapters import lora_config
from ..models.attach import is_of_router
from ..system.files import write_json
from ..system.locks import sole_use
from .chunked_loss import chunk_loss, whole_loss
from .config import AdaptationConfig, SparseTrainingConfig
from .distributed import from_main, rank_and_size
from .run_identity import differences, model_identity, rows_hash, weights_hash

logger = logging.getLogger(__name__)


# of Trainer's log rows, where they have them
LOGGED = (
    "kl",
    "kept_mass",
    "recovered_share",
    "router_entropy",
    "density",
    "grad_norm",
    "tokens_per_second",
    "peak_memory_bytes",
)


# W' = W + (alpha / rank) · B A, with B = 0 at the start: LoRA, Hu et al. 2021, arXiv:2106.09685
def add_lora(
    model: PreTrainedModel,
    config: AdaptationConfig,
    task_type: str | None = "CAUSAL_LM",
    new_tokens: Sequence[int] = (),
) -> Any:
    """A PeftModel of the sparse ``model``: LoRA on ``target_modules``, the routers trained and saved with
    the adapter, as are the rows of ``new_tokens`` in the input and the output embeddings.
    """
    from peft import get_peft_model  # heavy, and needed in this stage only

    options: dict[str, Any] = {"target_modules": list(config.target_modules), "task_type": task_type}
    if new_tokens:
        options["trainable_token_indices"] = {name: sorted(new_tokens) for name in _embedding_names(model)}
    return get_peft_model(model, lora_config(model, r=config.rank, lora_alpha=config.alpha, **options))


def _embedding_names(model: PreTrainedModel) -> list[str]:
    """Module names of the input embeddings and, untied, of the output embeddings."""
    given, output = model.get_input_embeddings(), model.get_output_embeddings()
    layers = [given] if output is None or output.weight is given.weight else [given, output]
    return [next(name for name, module in model.named_modules() if module is layer) for layer in layers]


def adapt(
    model: PreTrainedModel,
    rows: Any,
    config: AdaptationConfig | None = None,
    *,
    steps: int | None = None,
    folder: str | Path | None = None,
    task_type: str | None = "CAUSAL_LM",
    new_tokens: Sequence[int] = (),
    progress: bool = True,
) -> tuple[Any, list[dict[str, Any]]]:
    """Train LoRA and routers of ``model`` on ``rows``, e.g. of `hf_sparse_attn.data.training_rows`.

    Args:
        rows: a dataset (or list) of rows of one length: ``input_ids`` [N], ``labels`` [N] (default: the same) and what
            else the model's forward takes; a streaming dataset needs ``steps``.
        steps: optimiser steps; by default one epoch of ``rows``.
        folder: where checkpoints go, and the adapter in the end; a run that was stopped continues from the last
            complete one.
        task_type: of PEFT; None for models that are no language models.
        new_tokens: ids whose embeddings are trained too, such as those that a vocabulary was extended by.

    Returns:
        (the PeftModel, one log row per step). Call ``merge_and_unload()`` on it for a plain sparse model.

    Raises:
        ValueError: no rows, or ``folder`` holds a run of another model, other rows, other settings or another number of
            steps.
        FolderInUseError: another process trains in ``folder``.
        NonFiniteLossError: a loss that is NaN or infinite.
    """
    config = config or AdaptationConfig()
    steps = _check_rows(rows, config, steps)
    # LoRA's first weights are drawn from the global generator
    torch.manual_seed(config.seed)
    peft_model = add_lora(model, config, task_type, new_tokens)
    use_cache = getattr(model.config, "use_cache", None)
    if folder is None:
        with tempfile.TemporaryDirectory() as output:
            log = _train(peft_model, rows, config, steps, Path(output), saved=False, progress=progress)
    else:
        with sole_use(folder) if rank_and_size()[0] == 0 else nullcontext():
            log = _train_or_load(peft_model, rows, config, steps, Path(folder), progress)
    peft_model.eval()
    if use_cache is not None:
        model.config.use_cache = use_cache  # Trainer turns it off, and it would be saved so
    return peft_model, log


def _train_or_load(
    model: Any, rows: Any, config: AdaptationConfig, steps: int, folder: Path, progress: bool
) -> list[dict[str, Any]]:
    """The log of the training that ``folder`` holds, done as far as it is not;
    Trainer itself would train one step too many at the end.
    """
    _claim(folder, model, rows, config, steps)
    # written last: where it is, the adapter is whole
    finished = folder / "log.json"
    if finished.exists():
        model.load_adapter(str(folder / "adapter"), "default")
        return json.loads(finished.read_text())  # type: ignore[no-any-return]
    log = _train(model, rows, config, steps, folder, saved=True, progress=progress)
    if rank_and_size()[0] == 0:
        write_json(finished, log, finite=False)
    return log


def _train(
    model: Any, rows: Any, config: AdaptationConfig, steps: int, folder: Path, *, saved: bool, progress: bool
) -> list[dict[str, Any]]:
    """Train to the end, from the last complete checkpoint in ``folder`` if there is one;
    the log's rows of all steps.
    """
    from .progress_callback import BarCallback  # Trainer is heavy, and needed in this stage only
    from .trainer import last_checkpoint

    trainer = make_trainer(model, rows, config, steps, str(folder), saved=saved, progress=progress)
    checkpoint = last_checkpoint(folder, below=steps)
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    finally:
        # also after an error the model leaves with the forward that it came with
        trainer.pop_callback(BarCallback).close()
        whole_loss(model)
    if saved:
        trainer.save_model(str(folder / "adapter"))
    # the last row of Trainer's history sums up the run and has no "loss"
    return [log_row(row, config) for row in trainer.state.log_history if "loss" in row]


def _check_rows(rows: Any, config: AdaptationConfig, steps: int | None) -> int:
    """The number of optimiser steps."""
    if not hasattr(rows, "__len__"):
        if steps is None:
            raise ValueError("rows are a stream, whose length is not known: give steps")
        return steps
    if not len(rows):
        raise ValueError("adapt got no rows: give at least one document")
    return steps or max(1, len(rows) // (config.batch_size * config.accumulation))


def make_trainer(
    model: Any, rows: Any, config: AdaptationConfig, steps: int, folder: str, *, saved: bool, progress: bool
) -> Any:
    """The `SparseTrainer` of `adapt`."""
    from transformers import PrinterCallback, TrainingArguments

    from .progress_callback import BarCallback
    from .trainer import SparseTrainer

    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        learning_rate=config.lr,
        max_grad_norm=config.max_grad_norm,
        save_strategy="steps" if saved else "no",
        save_steps=config.save_every,
        seed=config.seed,
        disable_tqdm=True,
        **_checkpointing(model, config),
        # what a run does unless training_arguments say otherwise: a constant rate, a log row a step, no reports
        **{
            **{
                "lr_scheduler_type": "constant",
                "logging_steps": 1,
                "report_to": [],
                "save_total_limit": 2,
                "dataloader_pin_memory": False,
            },
            **config.training_arguments,
        },
    )
    if config.chunked_loss and model.get_output_embeddings() is not None:
        chunk_loss(model)
    trainer = SparseTrainer(model, arguments, collate_rows, rows, sparse_training=config)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(BarCallback(progress))
    return trainer


def _checkpointing(model: Any, config: AdaptationConfig) -> dict[str, Any]:
    from transformers import TrainingArguments

    if config.offload_activations and not torch.accelerator.is_available():
        raise ValueError("lora.offload_activations needs a GPU: on a CPU activations are in its memory already")
    if not (config.gradient_checkpointing and getattr(model, "supports_gradient_checkpointing", False)):
        return {}
    # before 5.23
    name = (
        "activation_checkpointing"
        if hasattr(TrainingArguments, "activation_checkpointing")
        else "gradient_checkpointing"
    )
    # the reentrant kind drops the gradient that the KL is handed on by
    options = {"use_reentrant": False, **({"offload": True} if config.offload_activations else {})}
    return {name: True, f"{name}_kwargs": options}


def collate_rows(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """A batch of rows of one length; ``labels`` are ``input_ids`` where there are none."""
    batch = {name: torch.stack([torch.as_tensor(row[name], device="cpu") for row in rows]) for name in rows[0]}
    return {**({"labels": batch["input_ids"]} if "input_ids" in batch else {}), **batch}


def log_row(row: Mapping[str, Any], config: SparseTrainingConfig) -> dict[str, Any]:
    """What a run records of a step, from Trainer's log."""
    step = int(row["step"])
    measured = {name: row[name] for name in LOGGED if name in row}
    return {"step": step, "dense": config.is_dense(step - 1), "loss": row["task_loss"], **measured}


def _claim(folder: Path, model: Any, rows: Any, config: AdaptationConfig, steps: int) -> None:
    """Raise ValueError if ``folder`` holds the checkpoints of another run;
    the main process looks, whose weights are whole.
    """
    different = from_main(_claimed_by_another(folder, model, rows, config, steps) if rank_and_size()[0] == 0 else None)
    if different:
        raise ValueError(
            f"{folder} holds checkpoints of another run, different in {different}: remove it or give another folder"
        )


def _claimed_by_another(folder: Path, model: Any, rows: Any, config: AdaptationConfig, steps: int) -> str:
    """In what the run that ``folder`` belongs to is another one; it belongs to this one if that is nothing."""
    frozen = weights_hash(
        (name, p) for name, p in model.named_parameters() if not p.requires_grad and not is_of_router(name)
    )
    # names and shapes only: values of what is trained change with every step
    learned = [[name, list(p.shape)] for name, p in model.named_parameters() if p.requires_grad]
    claims = {
        "settings": {**asdict(config), "steps": steps},
        "the model's frozen weights": frozen,
        **model_identity(model),
        "what is trained": hashlib.sha256(json.dumps(learned).encode()).hexdigest(),
        "the rows": rows_hash(rows),
    }
    # compared with what JSON makes of the claims, in which tuples are lists
    known = folder / "run.json"
    if known.exists() and (different := differences(json.loads(known.read_text()), json.loads(json.dumps(claims)))):
        return different
    write_json(known, claims)
    return ""
