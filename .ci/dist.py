"""Build sdist and wheel twice, each time in a clean clone, and keep them in dist/ if both builds have the same bytes.

python .ci/dist.py [--no-isolation]     # make dist
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def build(folder: Path, options: list[str]) -> dict[str, str]:
    """Clone the last commit into ``folder`` and build there: sha256 by file name."""
    subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", str(ROOT), str(folder)], check=True)
    subprocess.run([sys.executable, "-m", "build", *options, str(folder)], check=True, stdout=subprocess.DEVNULL)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted((folder / "dist").iterdir())}


def main() -> int:
    """Exit code: 1 if the two builds differ."""
    if subprocess.run(
        ["git", "-C", str(ROOT), "status", "--porcelain"], capture_output=True, text=True, check=True
    ).stdout:
        print("changes that are not committed are left out: the packages are those of the last commit", file=sys.stderr)
    with tempfile.TemporaryDirectory() as temporary:
        first, second = Path(temporary) / "first", Path(temporary) / "another" / "second"
        hashes, again = (build(folder, sys.argv[1:]) for folder in (first, second))
        if hashes != again:
            print(f"two builds of one commit differ:\n{hashes}\n{again}", file=sys.stderr)
            return 1
        shutil.rmtree(ROOT / "dist", ignore_errors=True)
        shutil.copytree(first / "dist", ROOT / "dist")
    print("\n".join(f"{digest}  dist/{name}" for name, digest in hashes.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
