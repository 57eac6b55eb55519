"""A `SparseCall` made of functions, for tests that note what passes by."""

from __future__ import annotations

from hf_sparse_attn import SparseCall


class Watching(SparseCall):
    """Calls ``document(router, inputs)`` and ``selection(router, inputs, selection)`` where they are given."""

    def __init__(self, document=None, selection=None, **options):
        super().__init__(**options)
        self.document, self.selection = document, selection

    def on_document(self, router, inputs):
        if self.document is not None:
            self.document(router, inputs)

    def on_selection(self, router, inputs, selection):
        if self.selection is not None:
            self.selection(router, inputs, selection)
