"""Task ``ablation``: one factor at a time, against the defaults, on the same windows."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from ...attention.call import Selector, SparseCall, learned_selector
from ...config import SparseAttentionConfig, fixed_budget
from ...data.windows import Window, batches
from ...evaluation.baselines import make_selectors
from ...evaluation.divergence import last_hidden
from ...models.attach import routers
from ...training.distillation import distill
from ...training.mass_threshold import AtThreshold
from ...training.router_state import load_routers, save_routers
from ..ablation.costs import Contender, capture, measure
from ..ablation.factors import BASELINE, JOINT_KL, SELECTIONS_OF_STAGES, Level, default_of, levels
from ..ablation.level_table import ablation_table
from ..ablation.readings import read
from ..recipe import RecipeError
from ..reports.html_report import write_ablation_report
from ..scores.budget_allocation import BY_HEAD, FITTED, THRESHOLD, Allocations, ByHead
from ..steps import Step
from .language_model import LanguageRun

DEFAULT = Level(BASELINE, BASELINE)


class AblationRun(LanguageRun):
    """Distils the default routers for every seed, then changes one thing at a time; no model is kept."""

    def steps(self) -> list[Step]:
        settings = self.recipe.ablate
        if len(self.recipe.quality) != 1 or len(self.recipe.quality[0].budgets) != 1:
            raise RecipeError(
                "an ablation has one entry of quality with one budget: quality[0].length, windows, budgets"
            )
        if settings["seeds"] < 1 or settings["repeats"] < 1:
            raise RecipeError(
                f"ablate.seeds is {settings['seeds']} and ablate.repeats {settings['repeats']}: must be >= 1"
            )
        self.levels = levels(settings["factors"], full=settings["full"])
        self._dense: list[Tensor] = []
        joint = bool(self.recipe.lora["steps"]) and (not settings["factors"] or JOINT_KL in settings["factors"])
        return [
            Step("convert", self._convert),
            *(Step(f"routers-{seed}", partial(self._train, DEFAULT, seed)) for seed in range(settings["seeds"])),
            *([Step("fit", self._fit)] if any(level.selection in FITTED for level in self.levels) else []),
            # the default is read like any level: the others are compared with it
            *(Step(level.slug, partial(self._read_level, level)) for level in (DEFAULT, *self.levels)),
            *([Step("joint", self._joint)] if joint else []),
            Step("cost", self._cost),
        ]

    def finish(self, results: dict[str, Any]) -> None:
        read = [
            *(results[level.slug]["readings"] for level in (DEFAULT, *self.levels)),
            results.get("joint", {}).get("readings", []),
        ]
        head_dim = results["cost"]["head_dim"]
        defaults = {
            factor: default_of(factor, self._config(DEFAULT), head_dim)
            for factor in {level.factor for level in self.levels}
        }
        defaults[JOINT_KL] = f"weight {self.recipe.adaptation.kl_weight}"
        results["table"] = ablation_table(
            [r for readings in read for r in readings], results["cost"]["levels"], defaults
        )
        write_ablation_report(self.folder / "report.html", results)

    def _config(self, level: Level) -> SparseAttentionConfig:
        keys = round(level.keys * self.recipe.quality[0].budgets[0])
        return self.recipe.sparse_attention.changed(**{**fixed_budget(keys), **level.sparse})

    def _untrained(self, level: Level) -> PreTrainedModel:
        sparse = self._config(level)
        model = AutoModelForCausalLM.from_pretrained(self.state / "base", sparse_attention=sparse, dtype=self.dtype)
        return model.eval()  # type: ignore[no-any-return]

    def _of_level(self, level: Level, seed: int) -> PreTrainedModel:
        """The model at a level, with routers that were trained for it."""
        model = self._untrained(level)
        name = (level if level.retrains else DEFAULT).slug
        load_routers(model, self.state / f"{name}-{seed}.safetensors")
        return model

    def _distilled(self) -> PreTrainedModel:
        return self._of_level(DEFAULT, 0)

    def _train(self, level: Level, seed: int) -> dict[str, Any]:
        """Distil the routers of a level; every seed has windows and tiles of its own."""
        settings = self.recipe.distill
        count = max(1, round(level.training * settings["batches"]))
        # a range of windows for every seed, as long as the level that trains on most needs it
        most = max([1.0, *(other.training for other in self.levels)])
        span = round(most * settings["batches"])
        windows = self._train_windows(settings["context"], span * self.recipe.ablate["seeds"])[seed * span :][:count]
        model = self._untrained(level)
        config = replace(self.recipe.distillation, seed=self.recipe.seed + seed)
        report = distill(model, batches(windows), config, checkpoint=self.state / f"{level.slug}-{seed}.pt")
        save_routers(model, self.state / f"{level.slug}-{seed}.safetensors")
        return {"documents": [window.document for window in windows], "log": report.log}

    def _windows(self) -> list[Window]:
        entry = self.recipe.quality[0]
        return list(self._eval_windows(entry.length, entry.windows))

    def _read(self, model: PreTrainedModel, call: SparseCall, level: Level, seed: int) -> list[dict[str, Any]]:
        windows = self._windows()
        if not self._dense:  # the same for every level: routers do not take part
            self._dense = [last_hidden(model, window.ids, SparseCall(dense=True)) for window in windows]
        return [reading.to_dict() for reading in read(model, windows, self._dense, call, level, seed)]

    def _read_level(self, level: Level) -> dict[str, Any]:
        readings = []
        for seed in self._seeds(level):
            if level.retrains and not (self.state / f"{level.slug}-{seed}.safetensors").exists():
                self._train(level, seed)
            model = self._of_level(level, seed)
            readings += self._read(model, SparseCall(selector=self._selector(level)), level, seed)
        self.console.print(f"  KL {sum(r['kl'] for r in readings) / len(readings):.4f}")
        return {"readings": readings}

    def _seeds(self, level: Level) -> range:
        """All seeds; one where routers are trained anew or thresholds are fitted, unless the grid is the full one."""
        single = (level.retrains and not self.recipe.ablate["full"]) or level.selection in FITTED
        return range(1 if single else self.recipe.ablate["seeds"])

    def _selector(self, level: Level) -> Selector:
        if level.selection is None:
            return learned_selector
        if level.selection in SELECTIONS_OF_STAGES:
            return make_selectors([level.selection])[level.selection]
        fit = self._load("fit")
        kept = {
            int(layer): torch.tensor(keys, dtype=torch.float64, device="cpu")
            for layer, keys in fit["kept_by_layer_and_head"].items()
        }
        fitted: dict[str, Selector] = {
            THRESHOLD: AtThreshold(fit["threshold"]),
            BY_HEAD: ByHead(kept),
        }
        return fitted[level.selection]

    def _fit(self) -> dict[str, Any]:
        """What the budgets that vary are fitted to, with the routers of the first seed on text that is not measured."""
        entry = self.recipe.quality[0]
        return Allocations(self._distilled(), batches(self._fit_windows(entry)), entry.budgets, entry.length // 2).fits[
            0
        ]

    def _joint(self) -> dict[str, Any]:
        """The joint stage with the routers' KL and without it, each against its own dense reading."""
        adaptation, readings = self.recipe.adaptation, []
        for name, weight in ((BASELINE, adaptation.kl_weight), ("weight 0", 0.0)):
            model, _ = self._adapted(f"joint-{weight}", replace(adaptation, kl_weight=weight))
            windows = self._windows()
            # each stage has changed the model, so that its dense reading is its own
            dense = [last_hidden(model, window.ids, SparseCall(dense=True)) for window in windows]
            readings += [r.to_dict() for r in read(model, windows, dense, SparseCall(), Level(JOINT_KL, name), 0)]
        return {"readings": readings}

    def _cost(self) -> dict[str, Any]:
        contenders, inputs, layers, head_dim = {}, None, 0, 0
        for level in (DEFAULT, *self.levels):
            model = self._of_level(level, 0)
            layer_routers = routers(model)
            # a layer in the middle stands for all
            middle, layers, head_dim = (
                layer_routers[len(layer_routers) // 2],
                len(layer_routers),
                layer_routers[0].head_dim,
            )
            # the default's inputs, for every level
            if inputs is None:
                inputs = capture(model, self._windows()[0].ids, middle.layer)
            share = len(middle.config.dense_layers) / layers
            name = BASELINE if level == DEFAULT else f"{level.factor} {level.name}"
            contenders[name] = Contender(middle, self._selector(level), share)
        assert inputs is not None
        costs = measure(contenders, BASELINE, inputs, layers, self.recipe.ablate["repeats"])
        return {"levels": costs, "layers": layers, "head_dim": head_dim, "tokens": inputs.q.shape[2]}
