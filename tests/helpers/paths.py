"""Where the repository's folders are."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "recipes"
RESULTS = RECIPES / "results"
DATA = ROOT.parent / "shared" / "data"  # logs and series that are not ours: tests of them skip where they are absent
