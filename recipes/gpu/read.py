"""Read what ``recipes/gpu/run.sh OUT`` left: a table, the result file with its plot, and what misses the targets by
which limit.

``python recipes/gpu/read.py OUT`` writes recipes/results/gpu-CARD.json and .svg (those of a dry run go to OUT) and
prints the rows for the README; ``--table`` prints the short table only.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels" / "torch-ext")]
RESULTS = ROOT / "recipes" / "results"
STAGES = ("limits", "models", "causes", "launches")

# (what, benchmark, tokens, share kept or None, figure, at least): the aims for an H100 or H200 in bfloat16 with head
# dim 128
TARGETS = (
    ("dense share at 32k", "dense share", 32768, None, "share", 0.8),
    ("prefill at 32k, 10 % kept, router included", "attention", 32768, 0.1, "speedup_with_router", 4.0),
    ("prefill at 64k, 10 % kept, router included", "attention", 65536, 0.1, "speedup_with_router", 6.0),
    ("prefill at 128k, 10 % kept, router included", "attention", 131072, 0.1, "speedup_with_router", 6.0),
    ("forward and backward at 32k, 10 % kept", "backward", 32768, 0.1, "speedup_with_router", 2.5),
    ("forward and backward at 64k, 5 % kept", "backward", 65536, 0.05, "speedup_with_router", 4.0),
    ("forward and backward at 128k, 5 % kept", "backward", 131072, 0.05, "speedup_with_router", 5.1),
    ("decode at 32k, 4096 kept", "decode", 32768, None, "speedup_with_router", 2.0),
    ("decode at 128k, 4096 kept", "decode", 131072, None, "speedup_with_router", 5.0),
)


def read(folder: Path) -> dict[str, Any]:
    """All that a run left in ``folder``; a stage that left nothing is missing.

    Raises:
        SystemExit: there is no machine.json: the folder holds no run.
    """
    if not (folder / "machine.json").exists():
        raise SystemExit(f"{folder} holds no machine.json: it is no result of recipes/gpu/run.sh")
    results: dict[str, Any] = {"machine": json.loads((folder / "machine.json").read_text())}
    for stage in STAGES:
        if (path := folder / f"{stage}.json").exists():
            results[stage] = json.loads(path.read_text())
    if (log := folder / "right.log").exists():
        results["right"] = read_log(log.read_text())
    return results


def read_log(text: str) -> dict[str, Any]:
    """Counts and failed tests of a pytest log, also of one that was cut off."""
    outcomes = re.findall(
        r"\b(PASSED|FAILED|ERROR|SKIPPED)\b.* (tests/\S+)|(tests/\S+::\S+.*?) (PASSED|FAILED|ERROR|SKIPPED)", text
    )
    counts: dict[str, int] = {}
    failed = []
    for first, name, other, last in outcomes:
        outcome = first or last
        counts[outcome.lower()] = counts.get(outcome.lower(), 0) + 1
        if outcome in ("FAILED", "ERROR"):
            failed.append(name or other)
    finished = re.search(r"^=+ .*\b(passed|failed|error)\b.* in [\d.]+s", text, re.MULTILINE) is not None
    return {"counts": counts, "failed": sorted(set(failed)), "finished": finished}


def rows(results: dict[str, Any], stage: str) -> list[dict[str, Any]]:
    return list(results.get(stage, {}).get("rows", []))


def table(results: dict[str, Any]) -> list[str]:
    """A line for each row."""
    machine = results["machine"]
    lines = [f"card: {machine.get('card', 'none')}{' (dry run)' if machine['dry'] else ''}"]
    if "right" in results:
        right = results["right"]
        lines.append(f"right: {right['counts']}{'' if right['finished'] else ', CUT OFF'}")
        lines += [f"  FAILED {name}" for name in right["failed"]]
    else:
        lines.append("right: not run")
    for stage in STAGES:
        if stage not in results:
            lines.append(f"{stage}: not run")
            continue
        lines.append(f"{stage}: {results[stage]['seconds']:.0f} s, {len(results[stage]['rows'])} rows")
        lines += [f"  {row['entry']}: {figure(row)}" for row in results[stage]["rows"]]
        lines += [f"  FAILED {row['entry']}: {row['error'][:160]}" for row in results[stage]["failed"]]
        lines += [f"  not run: {label}" for label in results[stage]["not_run"]]
    return lines


def figure(row: dict[str, Any]) -> str:
    """The figures of a row that matter most."""
    kind = row["benchmark"]
    if kind == "ceilings":
        return f"{row['bytes_per_s'] / 1e12:.2f} TB/s, {row['flops_per_s'] / 1e12:.0f} TFLOP/s"
    if kind == "dense share":
        return f"{row['share']['median']:.2f} of {row['baseline']}"
    if kind == "router":
        return f"router {row['times']['router']['median_s'] * 1e3:.2f} ms, {row['router_share']:.2f} of the whole"
    if kind in ("attention", "backward", "decode"):
        parts = [
            f"{row['speedup_with_router']['median']:.2f}x of {row['ideal_speedup']:.2f}x possible, over "
            f"{row['baseline']}"
        ]
        parts += [f"attention alone {row['speedup']['median']:.2f}x"] if "speedup" in row else []
        parts += [f"{row['peak_memory_bytes'] / 2**20:.0f} MB"] if row.get("peak_memory_bytes") is not None else []
        if "graphed" in row:
            times = {name: times["median_s"] * 1e6 for name, times in row["graphed"].items()}
            parts.append(f"as a graph {times['with router']:.0f} us, best dense {times['best dense']:.0f} us")
        return ", ".join(parts)
    if kind == "model":
        return (
            f"prefill {row['prefill_speedup']:.2f}x, decode {row['decode_speedup']:.2f}x "
            f"({row['decode_speedup_over_best_dense']:.2f}x)"
        )
    if kind == "training":
        return (
            f"{row['speedup']['sparse']['median']:.2f}x, peak memory {row['memory_over_stock']['sparse']:.2f} of stock"
        )
    if kind == "generate":
        return f"first token {row['first_token_speedup']:.2f}x, a token {row['token_speedup']:.2f}x"
    if kind == "distilling":
        return f"{row['minutes']:.0f} min for {row['windows']} windows"
    if kind == "counters":
        return f"{len(row.get('kernels', []))} kernels read, least {row['least_bytes'] / 2**20:.0f} MB"
    return f"{row['proposed']}: {row['best_s'] * 1e3:.2f} ms, the table's {row['table_s'] * 1e3:.2f} ms"


def chosen(results: dict[str, Any], benchmark: str, length: int, density: float | None) -> dict[str, Any] | None:
    """The row of a target."""
    for row in rows(results, "limits"):
        if (
            row["benchmark"] == benchmark
            and row["length"] == length
            and (density is None or row.get("density") == density)
        ):
            return row
    return None


def misses(results: dict[str, Any]) -> list[str]:
    """For each target what was reached, and where it is missed by which of the two limits the kernel is held."""
    ceilings = next((row for row in rows(results, "limits") if row["benchmark"] == "ceilings"), None)
    lines = []
    for what, benchmark, length, density, key, wanted in TARGETS:
        row = chosen(results, benchmark, length, density)
        if row is None:
            lines.append(f"{what}: not measured (wanted {wanted:g})")
        elif row[key]["median"] < wanted:
            lines.append(f"{what}: {row[key]['median']:.2f}, wanted {wanted:g}{_limit(row, ceilings)}")
    return lines


def _limit(row: dict[str, Any], ceilings: dict[str, Any] | None) -> str:
    """Which of the two, moving bytes or arithmetic, holds a row's sparse attention, and how much of that limit it
    reaches.
    """
    if ceilings is None or "attention" not in row.get("times", {}):
        return ""
    seconds = row["times"]["attention"]["median_s"]
    passes = 3.5 if row["benchmark"] == "backward" else 1.0  # products of a backward pass: five to the forward's two
    pairs = row["length"] * (row["length"] + 1) / 2 / row["ideal_speedup"]
    arithmetic = passes * 4 * row["batch"] * row["heads"] * row["head_dim"] * pairs / ceilings["flops_per_s"]
    width = 4 if row["dtype"] == "float32" else 2
    tokens = passes * row["batch"] * row["length"] * row["head_dim"] * width
    moving = tokens * 2 * (row["heads"] + row["groups"]) / ceilings["bytes_per_s"]
    name, floor = max((("arithmetic", arithmetic), ("moving bytes", moving)), key=lambda limit: limit[1])
    return f"; its floor is {name}, {floor * 1e3:.2f} ms, of which it reaches {floor / seconds:.2f}"


def write(results: dict[str, Any], folder: Path) -> Path:
    """The result file and its plot; those of a dry run beside what they were read from."""
    from hf_sparse_attn.system.files import write_json

    machine = results["machine"]
    card = "dry" if machine["dry"] else re.sub(r"[^a-z0-9]+", "-", machine["card"].lower()).strip("-")
    path = (folder if machine["dry"] else RESULTS) / f"gpu-{card}.json"
    write_json(path, {**results, "misses": misses(results)})
    drawn = [row for row in rows(results, "limits") if row["benchmark"] == "attention"]
    if drawn:
        from hf_sparse_attn.benchmarks.plot import plot_speedups

        try:
            plot_speedups(path.with_suffix(".svg"), drawn)
        except ModuleNotFoundError as error:  # the machine with the GPU need not have what draws
            print(f"no plot: {error}", file=sys.stderr)
    return path


def readme_rows(results: dict[str, Any]) -> list[str]:
    """Rows of a Markdown table: tokens, share kept, speed-up of attention alone and with its router, share of what is
    possible, memory.
    """
    lines = [
        "| | tokens | kept | attention alone | with router | of the possible | memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows(results, "limits"):
        if row["benchmark"] in ("attention", "backward", "decode"):
            alone = f"{row['speedup']['median']:.2f}x" if "speedup" in row else ""
            memory = "" if row.get("peak_memory_bytes") is None else f"{row['peak_memory_bytes'] / 2**20:.0f} MB"
            kept = f"{row['keys']} keys" if row["keys"] else f"{row['density']:.0%}"
            lines.append(
                f"| {row['benchmark']} | {row['length']} | {kept} | {alone} | "
                f"{row['speedup_with_router']['median']:.2f}x "
                f"| {row['share_of_ideal_with_router']:.2f} | {memory} |"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="OUT")
    parser.add_argument("--table", action="store_true", help="print the short table only")
    arguments = parser.parse_args()
    results = read(arguments.folder)
    if not arguments.table:
        path = write(results, arguments.folder)
        print(
            "\n".join(
                [
                    f"written: {path.name}",
                    "",
                    *readme_rows(results),
                    "",
                    "targets that are missed:",
                    *misses(results),
                    "",
                ]
            )
        )
    print("\n".join(table(results)))


if __name__ == "__main__":
    main()
