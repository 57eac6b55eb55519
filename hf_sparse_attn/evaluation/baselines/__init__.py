"""Selections to compare the router with, all at equal budget and with the same forced links.

A selector of one's own is a class beside these: derive it from `BlockSelector`, decorate it with `register_selector`.
"""

from .block_selector import BlockSelector, ScoringCall, SelectorError
from .equal_budget import selection_calls
from .first_stages import FirstStage, MeanAndSpread, MeansOfFour, NoFirstStage, PooledStage, SampledQueries, SignBits
from .key_bounds import MeanStd, MinMax, QuerySelector
from .reference_selectors import ORACLE_TILES, Oracle, RandomBlocks, WindowAndSink
from .registry import make_selectors, register_selector, selector_names, unregister_selector
from .router_selectors import MeanPool, StageOne, TwoStages, Untrained

_selectors: tuple[type, ...] = (
    *(Oracle, TwoStages, StageOne, Untrained, MeanPool, MinMax, MeanStd, WindowAndSink, RandomBlocks),
    *(PooledStage, MeansOfFour, MeanAndSpread, SignBits, NoFirstStage),  # compared where they are named
)
for _selector in _selectors:
    register_selector(_selector)  # in the order of tables

__all__ = [
    "ORACLE_TILES",
    "BlockSelector",
    "FirstStage",
    "MeanAndSpread",
    "MeanPool",
    "MeanStd",
    "MeansOfFour",
    "MinMax",
    "NoFirstStage",
    "Oracle",
    "PooledStage",
    "QuerySelector",
    "RandomBlocks",
    "SampledQueries",
    "ScoringCall",
    "SelectorError",
    "SignBits",
    "StageOne",
    "TwoStages",
    "Untrained",
    "WindowAndSink",
    "make_selectors",
    "register_selector",
    "selection_calls",
    "selector_names",
    "unregister_selector",
]
