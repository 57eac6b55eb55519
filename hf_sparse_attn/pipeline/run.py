"""The main job, step by step: convert, distil, fine-tune, evaluate, measure, save, reload, answer.

Every step leaves a file in the run's folder and is skipped when that file is there, so an interrupted run continues
where it stopped. A run folder belongs to one recipe: with a changed recipe it is refused.
"""

from __future__ import annotations

import gc
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..attending import SparseCall
from ..conversion import mark_trained
from ..data.sources import free_bytes, local_model, model_licence, read_documents
from ..data.windows import batches, token_windows
from ..environment import environment
from ..evaluation.quality import WindowResult, evaluate_windows, window_losses
from ..evaluation.selectors import fresh_routers, standard_selectors
from ..evaluation.shares import quality_table
from ..files import replaced_folder, write_atomically, write_json
from ..profiling import LayerShape, bench_attention, bench_model
from ..training.adaptation import adapt
from ..training.distillation import distill, load_router_state, router_state
from .card import write_card
from .recipe import Recipe, RecipeError
from .report import write_report

LEAST_FREE_BYTES = 3 << 30  # a run holds two copies of a small model and its checkpoints


class Run:
    """One run of a recipe in ``folder``; call `main`."""

    def __init__(self, recipe: Recipe, folder: Path, console: Console) -> None:
        self.recipe, self.folder, self.console = recipe, folder, console
        self.state = folder / "state"
        self.dtype: torch.dtype = getattr(torch, recipe.model["dtype"])

    def main(self) -> dict[str, Any]:
        """Run what is not done yet; returns the results, which are also in ``results.json``."""
        self._claim_folder()
        torch.manual_seed(self.recipe.seed)
        started = time.monotonic()
        for name, step in (
            ("convert", self._convert),
            ("distill", self._distill),
            ("lora", self._lora),
            ("quality", self._quality),
            ("speed", self._speed),
            ("answer", self._answer),
        ):
            self._step(name, step)
        results = self._results()
        write_json(self.folder / "results.json", results)
        write_report(self.folder / "report.html", results)
        write_card(self.folder / "model" / "README.md", results)
        minutes = (time.monotonic() - started) / 60
        self.console.print(f"[bold]done in {minutes:.1f} min[/]: {self.folder}/report.html, results.json, model/")
        return results

    def _claim_folder(self) -> None:
        known = self.state / "recipe.json"
        if known.exists() and json.loads(known.read_text()) != self.recipe.raw:
            raise RecipeError(
                f"{self.folder} holds a run of another recipe (or the recipe was changed): remove the folder or give another --out"
            )
        if free_bytes(self.folder) < LEAST_FREE_BYTES:
            raise RecipeError(f"less than {LEAST_FREE_BYTES >> 30} GB are free for {self.folder}: free some space or give another --out")
        write_json(known, self.recipe.raw)

    def _step(self, name: str, step: Callable[[], dict[str, Any]]) -> None:
        done = self.state / f"{name}.json"
        if done.exists():
            self.console.print(f"[dim]{name}: done before[/]")
            return
        self.console.print(f"[bold cyan]{name}[/]")
        start = time.monotonic()
        result = step()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        write_json(done, {"seconds": time.monotonic() - start, "peak_process_bytes": peak, **result})
        gc.collect()

    def _load(self, name: str) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads((self.state / f"{name}.json").read_text())
        return loaded

    # -- steps -----------------------------------------------------------------------------------------------------

    def _convert(self) -> dict[str, Any]:
        """Base checkpoint -> ordinary checkpoint in the run's folder."""
        source, gguf = local_model(self.recipe.model["source"])
        extra = {"gguf_file": gguf} if gguf else {}
        tokenizer = AutoTokenizer.from_pretrained(source, **extra)
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **extra)
        if gguf:  # otherwise save_pretrained refuses: the quantiser's config would be written for plain weights
            model.hf_quantizer.remove_quantization_config(model)
        model = model.to(self.dtype)
        model.config.dtype = self.dtype
        with replaced_folder(self.state / "base") as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        licence = self.recipe.model["license"] or model_licence(self.recipe.model["source"])
        return {"parameters": sum(p.numel() for p in model.parameters()), "license": licence}

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(self.state / "base")

    def _base(self) -> PreTrainedModel:
        model = AutoModelForCausalLM.from_pretrained(self.state / "base", sparse_attention=self.recipe.sparse_attention, dtype=self.dtype)
        return model.eval()  # type: ignore[no-any-return]

    def _train_windows(self, context: int, count: int) -> Any:
        documents = read_documents(self.recipe.data["train"])
        return token_windows(documents, self._tokenizer(), context, count, self.recipe.sparse_attention.block_size)

    def _distill(self) -> dict[str, Any]:
        settings = self.recipe.distill
        model = self._base()
        windows = self._train_windows(settings["context"], settings["batches"])
        report = distill(model, batches(windows), self.recipe.distillation, checkpoint=self.state / "distill.pt")
        write_atomically(self.state / "routers.safetensors", lambda path: save_file(router_state(model), path))
        return {**report.to_dict(), "context": settings["context"], "documents": [w.document for w in windows]}

    def _distilled(self) -> PreTrainedModel:
        model = self._base()
        load_router_state(model, load_file(self.state / "routers.safetensors"))
        return model

    def _lora(self) -> dict[str, Any]:
        """LoRA + routers, merged, saved as the run's model; with 0 steps the distilled model is saved as it is."""
        settings, model = self.recipe.lora, self._distilled()
        result: dict[str, Any] = {"steps": settings["steps"], "context": settings["context"], "log": []}
        if settings["steps"]:
            probe = self._eval_windows(settings["context"], 1)[0]
            windows = self._train_windows(settings["context"], settings["steps"])
            result["before"], _ = window_losses(model, probe.ids, SparseCall(), 0)
            rows = [{"input_ids": window.ids[0]} for window in windows]
            adapted, result["log"] = adapt(model, rows, self.recipe.adaptation, folder=self.state / "lora")
            adapted.save_pretrained(self.folder / "adapter")
            model = adapted.merge_and_unload().eval()
            result["after"], _ = window_losses(model, probe.ids, SparseCall(), 0)
            result["probe"] = probe.document
        mark_trained(model)
        model.save_pretrained(self.folder / "model")
        self._tokenizer().save_pretrained(self.folder / "model")
        return result

    def _eval_windows(self, length: int, count: int) -> Any:
        documents = read_documents(self.recipe.data["eval"])
        return token_windows(documents, self._tokenizer(), length, count, self.recipe.sparse_attention.block_size)

    def _model(self) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(self.folder / "model").eval()  # type: ignore[no-any-return]

    def _quality(self) -> dict[str, Any]:
        model, partial = self._model(), self.state / "quality.partial.json"
        done = [WindowResult(**r) for r in json.loads(partial.read_text())] if partial.exists() else []
        selectors = standard_selectors(fresh_routers(model))
        for entry in self.recipe.quality:
            windows = self._eval_windows(entry.length, entry.windows)
            chosen = {name: selectors[name] for name in entry.selections}

            def note(result: WindowResult) -> None:
                done.append(result)
                write_json(partial, [r.to_dict() for r in done])
                self.console.print(f"  {result.line()}", markup=False)

            evaluate_windows(model, windows, entry.budgets, chosen, decode_tokens=entry.decode_tokens, done=list(done), on_result=note)
        return {"windows": [r.to_dict() for r in done], "table": quality_table(done)}

    def _speed(self) -> dict[str, Any]:
        settings = self.recipe.speed
        if not settings["length"]:
            return {}
        shape = LayerShape(settings["length"], settings["keys"], dtype=self.recipe.model["dtype"])
        attention = bench_attention(shape, repeats=settings["attention_repeats"])
        need = settings["length"] + 2 * settings["decode_tokens"]  # sparse and best dense steps take turns
        ids = torch.cat([w.ids for w in self._eval_windows(2048, -(-need // 2048))], 1)[:, :need]
        model = bench_model(self._model(), ids, settings["keys"], decode_tokens=settings["decode_tokens"], repeats=settings["repeats"])
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
        self.console.print(f"  {self.recipe.prompt}", end="", markup=False, highlight=False)
        self.console.print(answer, style="bold", markup=False, highlight=False)
        return {**result, "prompt": self.recipe.prompt, "answer": answer}

    def _results(self) -> dict[str, Any]:
        steps = {name: self._load(name) for name in ("convert", "distill", "lora", "quality", "speed", "answer")}
        return {"recipe": self.recipe.raw, "environment": environment(), "seed": self.recipe.seed, **steps}


def run_recipe(recipe: Recipe, folder: str | Path, console: Console | None = None) -> dict[str, Any]:
    """Run ``recipe`` in ``folder``, continuing an interrupted run; returns the results.

    Raises:
        RecipeError: the folder holds a run of another recipe, or the disk is nearly full.
        SourceError: a model or text cannot be read.
    """
    return Run(recipe, Path(folder), console or Console(stderr=True)).main()
