"""Trainer's progress as the bar of all long work."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from ..system.progress import bar


class BarCallback(TrainerCallback):
    """A bar with the last loss, on the main process only."""

    def __init__(self, shown: bool = True) -> None:
        self.shown = shown

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress = bar(self.shown and state.is_world_process_zero)
        self.task = self.progress.add_task(
            "LoRA + routers", total=state.max_steps, completed=state.global_step, info=""
        )
        self.progress.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "task_loss" in logs:
            info = f"loss {logs['task_loss']:.3f}, KL {logs.get('kl', 0):.3f}, {logs['tokens_per_second']:.0f} tokens/s"
            self.progress.update(self.task, info=info)

    def close(self) -> None:
        """End the bar, also after an error."""
        if hasattr(self, "progress"):
            self.progress.stop()
