"""How many files of the package a training step goes through: what a reader has to open to follow it."""

from __future__ import annotations

import pytest
import torch
from helpers.ways import files_entered
from transformers import TrainingArguments

from hf_sparse_attn import SparseTrainer, SparseTrainingConfig

MOST_FILES = 16  # those of a forward pass among them


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_training_step_goes_through_few_files(sparse_llama, real_budget, token_ids, tmp_path):
    model = sparse_llama(real_budget)
    ids = token_ids(1, 200)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, report_to=[], disable_tqdm=True, use_cpu=True, save_strategy="no"
    )
    rows = [{"input_ids": row, "labels": row} for row in ids]
    trainer = SparseTrainer(
        model, arguments, train_dataset=rows, sparse_training=SparseTrainingConfig(kl_tile_share=4, dense_every=0)
    )
    trainer.train()
    model.train()
    losses = []
    files = files_entered(
        lambda: losses.append(trainer.training_step(model, {"input_ids": ids, "labels": ids.clone()}))
    )
    assert bool(torch.isfinite(losses[0])) and trainer._statistics[-1].kl > 0
    assert [file for file in files if file.startswith("training/")] == [
        *("training/trainer.py", "training/objective.py", "training/config.py", "training/router_loss.py"),
    ]
    assert len(files) <= MOST_FILES, files
