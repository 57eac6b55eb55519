"""What the runs of all tasks share: distilled routers, then LoRA with sparse or dense attention on the same rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ...models.adapters import load_adapter
from ...models.convert import mark_trained
from ...system.files import copied_folder
from ...training.config import AdaptationConfig
from ...training.distillation import distill
from ...training.lora import adapt
from ...training.router_state import load_routers, save_routers
from ..steps import Run, Step


class TrainingRun(Run):
    """A run that trains; a task says which model, which batches and which rows."""

    task_type: str | None = "CAUSAL_LM"  # of PEFT

    def _training_steps(self) -> list[Step]:
        """What comes before a task measures its result."""
        compare = self.recipe.compare
        return [
            Step("convert", self._convert),
            Step("distill", self._distill, everywhere=True),
            *([Step("before", self._before)] if compare["before"] else []),
            *([Step("reference", self._reference, everywhere=True)] if compare["dense_lora"] else []),
            Step("lora", self._lora, everywhere=True),
        ]

    def _convert(self) -> dict[str, Any]:
        """The base model -> an ordinary checkpoint in ``state/base``."""
        raise NotImplementedError

    def _before(self) -> dict[str, Any]:
        """What is measured of the distilled model."""
        raise NotImplementedError

    def _reference(self) -> dict[str, Any]:
        """What is measured of dense LoRA on the same rows."""
        raise NotImplementedError

    def _lora(self) -> dict[str, Any]:
        """The joint stage, and the run's model."""
        raise NotImplementedError

    def _base(self) -> PreTrainedModel:
        """The converted model with untrained routers, in eval mode."""
        raise NotImplementedError

    def _distillation_batches(self) -> tuple[list[dict[str, Tensor]], list[str]]:
        """(batches, names of what they were made of)."""
        raise NotImplementedError

    def _rows(self) -> Any:
        """The training rows of the joint stage."""
        raise NotImplementedError

    def _save_companions(self) -> None:
        """Put what belongs to the saved model beside it, e.g. its tokenizer."""

    def _distill(self) -> dict[str, Any]:
        model = self._base()
        todo, documents = self._distillation_batches()
        report = distill(model, todo, self.recipe.distillation, checkpoint=self.state / "distill.pt")
        if self.processes.is_main_process:
            save_routers(model, self.state / "routers.safetensors")
        return {**report.to_dict(), "context": self.recipe.distill["context"], "documents": documents}

    def _distilled(self) -> PreTrainedModel:
        model = self._base()
        load_routers(model, self.state / "routers.safetensors")
        return model

    def _adapted(self, name: str, config: AdaptationConfig) -> tuple[PreTrainedModel, list[dict[str, Any]]]:
        """(the distilled model with the trained LoRA merged, the training log); every process trains."""
        folder = self.state / name
        _, log = adapt(
            self._distilled(),
            self._rows(),
            config,
            steps=self.recipe.lora["steps"],
            folder=folder,
            task_type=self.task_type,
        )
        # from the file: the same weights in every process
        return load_adapter(self._distilled(), folder / "adapter").merge_and_unload().eval(), log

    def _adapted_densely(self) -> tuple[PreTrainedModel, list[dict[str, Any]]]:
        """The yardstick: LoRA with dense attention on the same rows."""
        # dense in every step and without KL: plain LoRA
        return self._adapted("reference", replace(self.recipe.adaptation, dense_every=1, kl_weight=0.0, anneal={}))

    def _save(self, model: PreTrainedModel) -> None:
        """The run's model and adapter, in the folder of the run."""
        if self.recipe.lora["steps"]:
            copied_folder(self.state / "lora" / "adapter", self.folder / "adapter")
        mark_trained(model)
        model.save_pretrained(self.folder / "model")
        self._save_companions()
