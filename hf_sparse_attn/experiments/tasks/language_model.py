"""The main job on a language model: convert, distil, fine-tune, evaluate, measure, save, reload, answer."""

from __future__ import annotations

import json
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ...attention.call import SparseCall
from ...benchmarks import LayerShape, bench_attention, bench_model, check_memory, plan_training
from ...benchmarks.planner.check import device_at
from ...data.checkpoints import write_checkpoint
from ...data.sources import SourceError, local_model, model_licence
from ...data.text_documents import read_documents
from ...data.training_data import training_rows
from ...data.windows import batches, token_windows
from ...evaluation.baselines import make_selectors, selector_names
from ...evaluation.quality import WindowResult, evaluate_windows, window_losses
from ...evaluation.statistics import quality_table
from ...system.files import write_json
from ..recipe import Quality
from ..reports.html_report import write_report
from ..reports.model_card import write_card
from ..rows.time_split import split_texts
from ..scores.budget_allocation import Allocations
from ..scores.perplexity import comparison
from ..sizing import MARGIN, at_size, fitted, measured_work, seconds, size_of
from ..steps import Step
from .distil_and_adapt import TrainingRun


class LanguageRun(TrainingRun):
    """Task ``causal_lm``."""

    def steps(self) -> list[Step]:
        convert, *others = self._training_steps()
        return [
            convert,
            *([] if self.recipe.minutes is None else [Step("size", self._size, then=self._sized)]),
            *others,
            Step("quality", self._quality),
            Step("speed", self._speed),
            Step("answer", self._answer),
        ]

    def finish(self, results: dict[str, Any]) -> None:
        windows = {name: results[name]["windows"] for name in ("before", "quality", "reference") if name in results}
        if len(windows) > 1:
            results["comparison"] = comparison(windows["quality"], windows.get("before"), windows.get("reference"))
        write_report(self.folder / "report.html", results)
        write_card(self.folder / "model" / "README.md", results)

    def _checkpoint(self) -> dict[str, Any]:
        """Base checkpoint -> ordinary checkpoint in the run's folder."""
        source, gguf = local_model(self.recipe.model["source"])
        parameters = write_checkpoint(source, gguf, self.state / "base", self.dtype)
        return {
            "parameters": parameters,
            "license": self.recipe.model["license"] or model_licence(self.recipe.model["source"]),
        }

    def _convert(self) -> dict[str, Any]:
        """The checkpoint, the parts of the texts, and what a step of the joint stage needs."""
        checkpoint = self._checkpoint()
        if self.recipe.data["split"] is not None:
            split_texts(self.recipe.data["train"], self.recipe.data["split"], self.state / "texts")
        return {**checkpoint, **self._plan()}

    def _plan(self) -> dict[str, Any]:
        """What a step of the joint stage will need here, by its plan;
        raises NotEnoughMemoryError if that is more than there is.
        """
        settings, adaptation = self.recipe.lora, self.recipe.adaptation
        if not settings["steps"] or self.processes.num_processes > 1:  # what several processes shard is not planned
            return {}
        config = AutoConfig.from_pretrained(self.state / "base")
        device = device_at(torch.device("cuda" if torch.cuda.is_available() else "cpu"), config, self.dtype, adaptation)
        if device is None:
            return {}
        options: dict[str, Any] = {
            "batch": adaptation.batch_size,
            "dtype": self.dtype,
            "sparse_attention": self.recipe.sparse_attention,
        }
        try:
            plan = plan_training(config, device, settings["context"], training=adaptation, **options)
        except ValueError as error:
            self.console.print(f"  no plan of the memory: {error}")
            return {"unplanned": str(error)}
        check_memory(plan, device)
        return {"plan": plan.to_dict()}

    def _size(self) -> dict[str, Any]:
        """The size at which the run ends in the recipe's time, by the rates of this machine."""
        minutes = self.recipe.minutes
        assert minutes is not None
        config = AutoConfig.from_pretrained(self.state / "base")
        try:
            work = measured_work(config, self._load("convert")["parameters"], self.recipe, self.dtype)
            whole = MARGIN * sum(seconds(self.recipe, work).values()) / 60
            recipe, left_out, predicted = fitted(self.recipe, work, minutes)
        except ValueError as error:
            return {"minutes": minutes, "left_out": [], "unsized": str(error), "size": size_of(self.recipe)}
        total = MARGIN * sum(predicted.values()) / 60
        rates = {"products": work.device.products[self.dtype], "attention": work.device.attention[0]}
        known = {
            "minutes": minutes,
            "whole_minutes": whole,
            "predicted_minutes": total,
            "predicted_seconds": predicted,
            "rates": rates,
        }
        return {**known, "left_out": left_out, "size": size_of(recipe)}

    def _sized(self, size: dict[str, Any]) -> None:
        self.recipe = at_size(self.recipe, size["size"])
        if size["left_out"] and self.processes.is_main_process:
            text = (
                f"  all would take {size['whole_minutes']:.0f} min here, so this is left out: "
                f"{'; '.join(size['left_out'])}"
            )
            self.console.print(text)

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(self.state / "base")

    def _base(self) -> PreTrainedModel:
        model = AutoModelForCausalLM.from_pretrained(
            self.state / "base", sparse_attention=self.recipe.sparse_attention, dtype=self.dtype
        )
        return model.eval()  # type: ignore[no-any-return]

    def _sources(self) -> tuple[list[str], list[str]]:
        """(training sources, evaluation sources); with ``data.split`` the parts that the first step made."""
        data, texts = self.recipe.data, self.state / "texts"
        if data["split"] is None:
            return data["train"], data["eval"]
        train, evaluated = (sorted(str(path) for path in (texts / part).iterdir()) for part in ("train", "eval"))
        return train, evaluated

    def _train_windows(self, context: int, count: int) -> Any:
        documents = read_documents(self._sources()[0])
        return token_windows(documents, self._tokenizer(), context, count, self.recipe.sparse_attention.block_size)

    def _distillation_batches(self) -> tuple[list[dict[str, Tensor]], list[str]]:
        """(batches of one row each, names of what they were made of)."""
        settings = self.recipe.distill
        if not settings["packed"]:
            windows = self._train_windows(settings["context"], settings["batches"])
            return batches(windows), [w.document for w in windows]
        rows = self._packed_rows(settings["context"], streaming=True)
        rows_of_batches = [
            {name: row[name][None] for name in ("input_ids", "position_ids")}
            for row in islice(rows, settings["batches"])
        ]
        if len(rows_of_batches) < settings["batches"]:
            raise SourceError(
                f"the texts hold {len(rows_of_batches)} packed rows of {settings['context']} tokens, distill.batches "
                f"asks for {settings['batches']}: "
                "add texts or ask for fewer"
            )
        return rows_of_batches, [f"packed row {i}" for i in range(len(rows_of_batches))]

    def _rows(self) -> Any:
        """The training rows of the joint stage: windows, one epoch of them all of its steps, or packed documents."""
        settings, adaptation = self.recipe.lora, self.recipe.adaptation
        if not settings["packed"]:
            count = settings["steps"] * adaptation.batch_size * adaptation.accumulation * self.processes.num_processes
            return [{"input_ids": window.ids[0]} for window in self._train_windows(settings["context"], count)]
        return self._packed_rows(settings["context"], self.recipe.data["streaming"])

    def _packed_rows(self, context: int, streaming: bool) -> Any:
        with self.processes.main_process_first():  # the others find the tokens in the cache
            return training_rows(
                self._sources()[0],
                self._tokenizer(),
                context,
                block_size=self.recipe.sparse_attention.block_size,
                streaming=streaming,
                seed=self.recipe.seed,
                end_of_text=self.recipe.data["end_of_text"],
                progress=self.processes.is_main_process,
            )

    def _lora(self) -> dict[str, Any]:
        """LoRA + routers, merged, saved as the run's model; with 0 steps the distilled model is saved as it is."""
        settings = self.recipe.lora
        result: dict[str, Any] = {"steps": settings["steps"], "context": settings["context"], "log": []}
        model = self._distilled()
        if settings["steps"]:
            probe = self._eval_windows(settings["context"], 1)[0]
            result["before"], *_ = window_losses(model, probe.ids, SparseCall(), 0)
            model, result["log"] = self._adapted("lora", self.recipe.adaptation)
            result["after"], *_ = window_losses(model, probe.ids, SparseCall(), 0)
            result["probe"] = probe.document
        if self.processes.is_main_process:
            self._save(model)
        return result

    def _save_companions(self) -> None:
        self._tokenizer().save_pretrained(self.folder / "model")

    def _reference(self) -> dict[str, Any]:
        """Dense LoRA, read densely on the windows of the quality step."""
        model, log = self._adapted_densely()
        results = []
        for entry in self.recipe.quality if self.processes.is_main_process else ():
            for window in self._eval_windows(entry.length, entry.windows):
                losses = window_losses(model, window.ids, SparseCall(dense=True), entry.decode_tokens)
                results.append(WindowResult(window.document, entry.length, None, "dense", *losses).to_dict())
        return {"log": log, "windows": results}

    def _before(self) -> dict[str, Any]:
        """The quality step on the model before the joint stage."""
        return self._measure(self._distilled(), "before")

    def _eval_windows(self, length: int, count: int) -> Any:
        documents = read_documents(self._sources()[1])
        return token_windows(documents, self._tokenizer(), length, count, self.recipe.sparse_attention.block_size)

    def _model(self) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(self.folder / "model").eval()  # type: ignore[no-any-return]

    def _quality(self) -> dict[str, Any]:
        return self._measure(self._model(), "quality")

    def _measure(self, model: PreTrainedModel, name: str) -> dict[str, Any]:
        """Every window of the recipe's quality entries under every selection; continues after a stop."""
        partial = self.state / f"{name}.partial.json"
        done = [WindowResult(**r) for r in json.loads(partial.read_text())] if partial.exists() else []
        selectors, varying = make_selectors(selector_names(every=True)), []
        for entry in self.recipe.quality:
            windows = self._eval_windows(entry.length, entry.windows)
            fitted = self._fitted(model, entry) if entry.is_fitted else None
            known = selectors | (fitted.selectors if fitted else {})

            def note(result: WindowResult) -> None:
                done.append(result)
                write_json(partial, [r.to_dict() for r in done], finite=False)
                self.console.print(f"  {result.line()}")

            chosen = {name: known[name] for name in entry.selections}
            evaluate_windows(
                model,
                windows,
                entry.budgets,
                chosen,
                decode_tokens=entry.decode_tokens,
                done=list(done),
                on_result=note,
            )
            if fitted is not None:
                varying.append(
                    {"length": entry.length, "fits": fitted.fits, "times": fitted.times(model, windows[0].ids)}
                )
        measured = {"windows": [r.to_dict() for r in done], "table": quality_table(done)}
        return {**measured, "varying": varying} if varying else measured

    def _fitted(self, model: PreTrainedModel, entry: Quality) -> Allocations:
        """The selections whose average number of keys is fitted, on text that is not measured and where log-loss is
        read.
        """
        return Allocations(model, batches(self._fit_windows(entry)), entry.budgets, entry.length // 2)

    def _fit_windows(self, entry: Quality) -> Any:
        documents = read_documents(self.recipe.data["fit"] or self._sources()[0])
        return token_windows(
            documents, self._tokenizer(), entry.length, entry.fit_windows, self.recipe.sparse_attention.block_size
        )

    def _speed(self) -> dict[str, Any]:
        settings = self.recipe.speed
        if not settings["length"]:
            return {}
        shape = LayerShape(settings["length"], settings["keys"], dtype=str(self.dtype).removeprefix("torch."))
        attention = bench_attention(shape, repeats=settings["attention_repeats"])
        need = settings["length"] + 2 * settings["decode_tokens"]  # sparse and best dense steps take turns
        ids = torch.cat([w.ids for w in self._eval_windows(2048, -(-need // 2048))], 1)[:, :need]
        model = bench_model(
            self._model(), ids, settings["keys"], decode_tokens=settings["decode_tokens"], repeats=settings["repeats"]
        )
        return {"attention": attention, "model": model}

    def _answer(self) -> dict[str, Any]:
        model: Any = self._model()
        tokenizer: Any = self._tokenizer()
        result = {"class": type(model).__name__, "sparse_attention": model.config.sparse_attention}
        if self.recipe.prompt is None:
            return result
        inputs = tokenizer(self.recipe.prompt, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=self.recipe.max_new_tokens, do_sample=False)
        answer = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        self.console.print(f"  {self.recipe.prompt}", end="")
        self.console.print(answer, style="bold")
        return {**result, "prompt": self.recipe.prompt, "answer": answer}
