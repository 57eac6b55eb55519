"""Task ``robustness``: routers on kinds of text and at lengths that they were not trained on."""

from __future__ import annotations

from functools import partial
from typing import Any

from ...attention.call import Selector, SparseCall, learned_selector
from ...config import fixed_budget
from ...data.text_documents import read_documents
from ...data.windows import Window, batches, token_windows
from ...evaluation.baselines import make_selectors
from ...evaluation.divergence import last_hidden, predictions
from ...models.convert import sparse_attention_as
from ...training.distillation import distill
from ...training.router_state import load_routers, save_routers
from ..recipe import Quality, RecipeError
from ..reports.html_report import write_robustness_report
from ..rows.time_split import split_texts
from ..scores.robustness import LOWER, UPPER, robustness_table
from ..steps import Step
from .language_model import LanguageRun

TRAINED = 0.7  # of every text; what follows is evaluated
OTHERS = (UPPER, LOWER, "untrained")


class RobustnessRun(LanguageRun):
    """Distils routers on each domain, and on the first at each context, and reads every domain and length with them."""

    def steps(self) -> list[Step]:
        settings, quality = self.recipe.robustness, self.recipe.quality
        self.domains: dict[str, list[str]] = settings["domains"]
        if any(len(entry.budgets) != 1 for entry in quality) or len({entry.length for entry in quality}) != len(
            quality
        ):
            raise RecipeError("robustness has one entry of quality for each length, with one budget")
        self.first, context = next(iter(self.domains)), self.recipe.distill["context"]
        self.contexts = sorted({context, *settings["contexts"]})
        # every domain at the recipe's context, and the first domain at the others
        trained = [
            *((domain, context) for domain in self.domains),
            *((self.first, other) for other in self.contexts if other != context),
        ]
        return [
            Step("convert", self._checkpoint),
            Step("texts", self._split),
            *(Step(f"routers-{domain}-{length}", partial(self._train, domain, length)) for domain, length in trained),
            *(Step(f"domain-{domain}", partial(self._read_domain, domain)) for domain in self.domains),
            *(Step(f"length-{entry.length}", partial(self._read_length, entry)) for entry in quality),
        ]

    def finish(self, results: dict[str, Any]) -> None:
        context = self.recipe.distill["context"]
        results["domains"] = robustness_table(
            [r for domain in self.domains for r in results[f"domain-{domain}"]["readings"]]
        )
        results["lengths"] = robustness_table(
            [r for entry in self.recipe.quality for r in results[f"length-{entry.length}"]["readings"]]
        )
        results["own"] = {domain: _name(domain, context) for domain in self.domains}
        write_robustness_report(self.folder / "report.html", results)

    def _split(self) -> dict[str, Any]:
        return {
            "texts": {
                domain: split_texts(texts, TRAINED, self.state / "texts" / domain)
                for domain, texts in self.domains.items()
            }
        }

    def _windows(self, domain: str, trained: bool, length: int, count: int) -> list[Window]:
        documents = read_documents(self._load("texts")["texts"][domain][0 if trained else 1])
        return token_windows(documents, self._tokenizer(), length, count, self.recipe.sparse_attention.block_size)

    def _train(self, domain: str, context: int) -> dict[str, Any]:
        """As many tokens at every context."""
        settings, file = self.recipe.distill, f"{domain}-{context}"
        windows = self._windows(domain, True, context, max(1, settings["batches"] * settings["context"] // context))
        model = self._base()
        report = distill(model, batches(windows), self.recipe.distillation, checkpoint=self.state / f"{file}.pt")
        save_routers(model, self.state / f"{file}.safetensors")
        return {"documents": [window.document for window in windows], "log": report.log}

    def _read_domain(self, domain: str) -> dict[str, Any]:
        context = self.recipe.distill["context"]
        return self._read(domain, self.recipe.quality[0], [(other, context) for other in self.domains])

    def _read_length(self, entry: Quality) -> dict[str, Any]:
        return self._read(self.first, entry, [(self.first, context) for context in self.contexts])

    def _read(self, domain: str, entry: Quality, trained: list[tuple[str, int]]) -> dict[str, Any]:
        model, keys = self._base(), entry.budgets[0]
        windows = self._windows(domain, False, entry.length, entry.windows)
        # routers take no part in a dense pass: one reading serves all of them
        dense = [last_hidden(model, window.ids, SparseCall(dense=True)) for window in windows]
        readings: list[dict[str, Any]] = []

        def read(name: str, selector: Selector) -> None:
            for window, reference in zip(windows, dense, strict=True):
                hidden = last_hidden(model, window.ids, SparseCall(selector=selector))
                prediction = predictions(model, window.ids, hidden, reference, whole=False)
                known = {
                    "domain": domain,
                    "length": entry.length,
                    "keys": keys,
                    "selection": name,
                    "document": window.document,
                }
                readings.append({**known, "kl": prediction.kl, "loss": prediction.loss})
            self.console.print(f"  {domain}, {entry.length} tokens, {name}: KL {readings[-1]['kl']:.4f}")

        with sparse_attention_as(model, **fixed_budget(keys)):
            selectors = make_selectors(OTHERS)
            for name in OTHERS:
                read(name, selectors[name])
            # one model takes one set of routers after the other
            for other, context in trained:
                load_routers(model, self.state / f"{other}-{context}.safetensors")
                read(_name(other, context), learned_selector)
        return {"readings": readings}


def _name(domain: str, context: int) -> str:
    """What tables call the routers that were trained on a domain at a context."""
    return f"trained on {domain}, {context} tokens"
