"""Where a figure comes from: the file, its date, its machine, its settings and the command that makes it again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "recipes" / "results"
INSTRUCTIONS = "AVX-512"  # of files older than the field: LOG.md names the machine
OLD_DEFAULTS = {"sink": 64, "local": 128}  # until 2026-11-26
# files that record no settings of their own, made before the defaults changed (commit ee51218)
BEFORE = {"ablation", "attention", "backward", "decode", "model", "router", "training"}
TODAY = {"sink": 16, "local": 64}
BENCHMARKS = {"attention", "backward", "decode", "router"}


def read(name: str) -> dict[str, Any]:
    """The results file ``name``."""
    return json.loads((RESULTS / f"{name}.json").read_text())  # type: ignore[no-any-return]


def names() -> list[str]:
    """All results files, by name."""
    return sorted(path.stem for path in RESULTS.glob("*.json"))


def settings(name: str, results: dict[str, Any]) -> dict[str, int]:
    """``sink`` and ``local`` of the sparse attention that was measured."""
    runs = results.get("runs") or [{}]
    fitted = results.get("calibration", {}).get("made_with", {})
    places = (results, results.get("answer", {}), results.get("study", {}), runs[0])
    values = [place["sparse_attention"] for place in places if "sparse_attention" in place]
    values += [fitted["settings"]] if "settings" in fitted else []
    recorded = values[0] if values else OLD_DEFAULTS if name in BEFORE else TODAY
    return {key: recorded[key] for key in ("sink", "local")}


def with_todays_defaults(name: str, results: dict[str, Any]) -> bool:
    """Whether a file was measured with the defaults of this version."""
    return settings(name, results) == TODAY


def command(name: str, results: dict[str, Any]) -> str | None:
    """The command that makes the file again, as far as the file tells."""
    if "command" in results:
        return str(results["command"]).replace("cli.py", "hf-sparse-attn", 1)
    if "recipe" in results:
        return f"hf-sparse-attn run {results['recipe']['name']}{' --smoke' if results.get('smoke') else ''}"
    rows = results.get("rows") or [{}]
    kind = rows[0].get("benchmark")
    if kind in BENCHMARKS:
        lengths = ",".join(dict.fromkeys(str(row["length"]) for row in rows))
        dtypes = ",".join(dict.fromkeys(row["dtype"] for row in rows))
        return f"hf-sparse-attn bench {kind} --length {lengths} --keys {rows[0]['keys']} --dtype {dtypes}"
    if kind == "training":
        return "hf-sparse-attn bench training MODEL --text TEXT --keys 1024"
    return (
        f"hf-sparse-attn bench model MODEL --text TEXT --keys {rows[0]['keys']}"
        if "decode_speedup" in rows[0]
        else None
    )


def machine(results: dict[str, Any]) -> str:
    """Processor, instruction set and threads."""
    environment = results["environment"]
    threads = environment["threads"]
    instructions = environment.get("instruction_set", INSTRUCTIONS)
    return f"{environment['cpu']}, {instructions}, {threads} thread{'' if threads == 1 else 's'}"


def lines(name: str, results: dict[str, Any]) -> list[str]:
    """A paragraph that says where the figures of a file come from."""
    environment, kept = results["environment"], settings(name, results)
    packages = environment["packages"]
    old = "" if kept != OLD_DEFAULTS else ", the defaults until 2026-11-26"
    facts = [
        f"`recipes/results/{name}.json`",
        environment["time"][:10],
        machine(results),
        f"torch {packages['torch']}, Transformers {packages['transformers']}",
        f"`sink` {kept['sink']} and `local` {kept['local']}{old}",
    ]
    facts += [f"commit {environment['commit'][:9]}"] if environment.get("commit") else []
    facts += ["a run at reduced size (`--smoke`)"] if results.get("smoke") else []
    notes = command(name, results)
    return [" · ".join(facts), "", *([f"```sh\n{notes}\n```", ""] if notes else [])]
