"""Task ``longlink``: a small model learns planted links, its routers are distilled, and both are studied."""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForCausalLM

from ..longlink.families import LongLinkConfig
from ..longlink.learning import EVALUATED, LearningConfig, learn, with_routers
from ..longlink.study import study
from ..reports.html_report import write_longlink_report
from ..steps import Run, Step


class LongLinkRun(Run):
    """The verb ``synth --learn`` in steps that can be continued, for lengths at which each takes a while."""

    def steps(self) -> list[Step]:
        self.config = LongLinkConfig(**self.recipe.longlink)
        self.learning = LearningConfig.up_to(self.config.length, self.recipe.seed)
        return [Step("learn", self._learn), Step("routers", self._routers), Step("study", self._study)]

    def finish(self, results: dict[str, Any]) -> None:
        steps = [results[step.name] for step in self.steps()]
        # of the whole run: the sum of the times, the largest peak
        cost = {
            "seconds": sum(s["seconds"] for s in steps),
            "peak_process_bytes": max(s["peak_process_bytes"] for s in steps),
        }
        command = f"hf-sparse-attn run recipes/{self.recipe.name}.yaml"
        document = {**results["study"], **cost, "environment": results["environment"], "command": command}
        write_longlink_report(self.folder / "report.html", document)

    def _learn(self) -> dict[str, Any]:
        learn(self.config, self.learning).save_pretrained(self.state / "dense")
        return {"stages": [vars(stage) for stage in self.learning.stages]}

    def _routers(self) -> dict[str, Any]:
        model = AutoModelForCausalLM.from_pretrained(self.state / "dense").eval()
        with_routers(model, self.recipe.sparse_attention, self.config, self.learning).save_pretrained(
            self.state / "sparse"
        )
        return {"batches": self.learning.distilled}

    def _study(self) -> dict[str, Any]:
        model = AutoModelForCausalLM.from_pretrained(self.state / "sparse").eval()
        return {
            "sparse_attention": model.config.sparse_attention,
            **study(model, self.config, EVALUATED * (self.recipe.seed + 7)),
        }
