"""Write what docs/ and README.md take from code and results, or check that it is up to date.

python docs/generate.py            # writes
python docs/generate.py --check    # exit code 1 and the names of what is out of date
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "docs"), str(ROOT), str(ROOT / "kernels" / "torch-ext")]

# ruff: noqa: E402  the path comes first
from builder import architectures_page, cli_page, readme_figures, results_page, selectors_table, settings_tables
from builder.markdown import replace_block


def pages() -> dict[Path, str]:
    """Every generated page, and every page with generated blocks, as it should be."""
    docs = ROOT / "docs"
    pages_by_name = {
        docs / "architectures.md": architectures_page.page(),
        docs / "cli.md": cli_page.page(),
        docs / "results.md": results_page.page(),
    }
    blocks = {
        ROOT / "README.md": {"figures": readme_figures.lines()},
        docs / "concepts.md": {"settings": settings_tables.sparse_attention()},
        docs / "selectors.md": {"selectors": selectors_table.lines()},
        docs / "training.md": {
            "distillation": settings_tables.distillation(),
            "joint stage": settings_tables.joint_stage(),
        },
    }
    for path, lines in blocks.items():
        text = path.read_text()
        for name, block in lines.items():
            text = replace_block(text, name, block)
        pages_by_name[path] = text
    return pages_by_name


def main() -> int:
    """Exit code: 1 if ``--check`` finds a page that is out of date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, say what is out of date")
    check = parser.parse_args().check
    stale = {path: text for path, text in pages().items() if not path.exists() or path.read_text() != text}
    for path, text in stale.items():
        if check:
            print(f"{path.relative_to(ROOT)} is out of date: run python docs/generate.py", file=sys.stderr)
        else:
            path.write_text(text)
            print(f"written: {path.relative_to(ROOT)}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
