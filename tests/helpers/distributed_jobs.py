"""What test_distributed.py runs in several processes: python distributed_jobs.py JSON, a list of [job, arguments]."""

from __future__ import annotations

import json
import logging
import os
import runpy
import signal
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import GradientAccumulationPlugin, ParallelismConfig
from peft import get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, set_seed

import hf_sparse_attn
from hf_sparse_attn import SparseObjective, SparseTrainingConfig, lora_config
from hf_sparse_attn.training.distributed import process_state

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def rows(count):
    return [torch.randint(3, 97, (160,), generator=torch.Generator().manual_seed(seed)) for seed in range(count)]


def load(folder, settings):
    model = AutoModelForCausalLM.from_pretrained(folder, sparse_attention=settings, dtype=torch.float32)
    set_seed(0)
    return model


def recipe(name, arguments):
    """A script of recipes/, as a user starts it."""
    sys.argv = [name, *arguments]
    runpy.run_path(str(RECIPES / name), run_name="__main__")


def killed(name, arguments, step):
    """The same, but the last process dies at ``step``."""
    forward = SparseObjective.forward

    def fatal(self, at, steps):
        if at == step and int(os.environ["RANK"]) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return forward(self, at, steps)

    SparseObjective.forward = fatal
    recipe(name, arguments)


def full(folder, settings, out):
    """Two steps of all weights; then the model is saved whole, with its logits."""
    process_state()
    accelerator = Accelerator(gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1))
    model = load(folder, settings)
    objective = SparseObjective(model, SparseTrainingConfig(router_lr=5e-3, anneal={"density": (0.5, 0.05)}))
    optimizer = torch.optim.AdamW(objective.parameter_groups(1e-3))
    loader = torch.utils.data.DataLoader(rows(4), 1)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    model.train()
    for step, ids in enumerate(loader):
        forward = objective.forward(step, 2)
        loss = model(input_ids=ids, labels=ids, use_cache=False, sparse_call=forward).loss
        accelerator.backward(loss + forward.kl_loss())
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=rows(1)[0][None], use_cache=False).logits
    accelerator.save_state(f"{out}/state")
    state = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(out, state_dict=state)
        torch.save(logits.float(), f"{out}/logits.pt")


def plain(folder, settings, out):
    """Trainer without the routers' piece."""
    process_state()
    arguments = TrainingArguments(
        out,
        max_steps=3,
        per_device_train_batch_size=1,
        report_to=[],
        save_strategy="no",
        accelerator_config={"use_configured_state": True},
    )
    model = load(folder, settings)
    model = get_peft_model(model, lora_config(model, r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    said = []
    logging.getLogger("hf_sparse_attn.attention.gradients").addFilter(
        lambda record: said.append(record.getMessage()) or True
    )
    data = [{"input_ids": ids, "labels": ids} for ids in rows(6)]
    Trainer(model, arguments, train_dataset=data).train()
    moved = [name for name, p in model.named_parameters() if not torch.equal(p.detach(), before[name])]
    write(out, {"said": said, "moved": moved})


def distill(folder, settings, out, batches):
    """Distillation of the batches that all processes know, with a checkpoint."""
    process_state()
    model = load(folder, settings)
    for router in hf_sparse_attn.routers(model):
        router.fresh = False
    ids = rows(sum(batches))
    todo = [{"input_ids": torch.stack([ids.pop(0) for _ in range(size)])} for size in batches]
    report = hf_sparse_attn.distill(model, todo, checkpoint=f"{out}/distill.pt", progress=False)
    rank = os.environ.get("RANK", "0")
    torch.save({n: p.detach() for n, p in model.named_parameters() if ".router." in n}, f"{out}/routers-{rank}.pt")
    write(out, {"log": report.log, "resumed_at": report.resumed_at})


def chunked(folder, settings, out):
    """What chunk_loss says where DeepSpeed shards the weights as they are loaded."""
    process_state()
    # turns ZeRO-3 on
    _accelerator = Accelerator(gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1))
    try:
        hf_sparse_attn.chunk_loss(load(folder, settings))
    except ValueError as error:
        write(out, str(error))


def split(folder, settings, out):
    """What is said to sequences and layers that are split over processes."""
    process_state()
    said = {}
    for name, config in (("context", ParallelismConfig(cp_size=2)), ("sequence", ParallelismConfig(sp_size=2))):
        accelerator = Accelerator()
        accelerator.state.parallelism_config = config
        model = load(folder, settings)
        for what, call in (
            ("objective", lambda m: SparseObjective(m)),
            ("forward", lambda m: m(input_ids=rows(1)[0][None])),
        ):
            try:
                call(model)
            except ValueError as error:
                said[f"{name} {what}"] = str(error)
        accelerator.state.parallelism_config = None
    write(out, said)


def write(out, value):
    if int(os.environ.get("RANK", "0")) == 0:
        (Path(out) / "result.json").write_text(json.dumps(value))


if __name__ == "__main__":
    torch.set_num_threads(1)
    # the jobs share one
    end, torch.distributed.destroy_process_group = torch.distributed.destroy_process_group, lambda *_: None
    for job, arguments in json.loads(sys.argv[1]):
        globals()[job](**arguments)
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        end()
