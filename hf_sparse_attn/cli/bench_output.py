"""What the benchmarks print and write: rows, tables, plots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..system.extras import install_command, missing_packages, needs_extra
from .options import console, emit

with needs_extra("cli", "the command line"):
    from rich import box
    from rich.table import Table


def show_rows(rows: list[dict[str, Any]], json_path: str | None, plot: Path | None) -> None:
    from ..benchmarks import crossover

    table = bench_table("tokens", "dtype", "ideal", "alone (share)", "routed (share)", "min–max", "router", "MB")
    for row in rows:
        alone, whole, memory = row.get("speedup"), row["speedup_with_router"], row.get("peak_memory_bytes")
        table.add_row(
            *(str(row["length"]), row["dtype"], f"{row['ideal_speedup']:.2f}"),
            f"{alone['median']:.3g}× ({row['share_of_ideal']:.2f})" if alone else "",
            f"{whole['median']:.3g}× ({row['share_of_ideal_with_router']:.2f})",
            f"{whole['min']:.3g}–{whole['max']:.3g}",
            *(
                f"{row['router_share']:.2f}" if "router_share" in row else "",
                "" if memory is None else f"{memory / 2**20:.0f}",
            ),
        )
    console.print(table)
    for row in rows:
        for key, name in (
            ("flex_speedup", "compiled flex_attention"),
            ("speedup_over_stock", "sparse over stock attention"),
        ):
            if key in row:
                console.print(
                    f"{row['length']} tokens, {row['dtype']}: {name} {row[key]['median']:.2f}×", highlight=False
                )
        for name, times in row.get("speedup_over_peers", {}).items():
            console.print(
                f"{row['length']} tokens, {row['dtype']}: attention alone over {name} {times['median']:.2f}×",
                highlight=False,
            )
        for name, error in row.get("peers_failed", {}).items():
            console.print(
                f"{row['length']} tokens, {row['dtype']}: {name} failed: {error}", highlight=False, markup=False
            )
    baselines = ", ".join(sorted({row["baseline"] for row in rows}))
    console.print(
        f"speed-up over {baselines}, medians; share of the ratio of pairs; router: its share of the time; n in the "
        "JSON",
        highlight=False,
    )
    crossed = crossover(rows)
    for dtype, length in crossed.items():
        shown = length if isinstance(length, str) else f"{length:.0f}"
        console.print(f"{dtype}: faster, router included, from {shown} tokens on", highlight=False)
    emit_rows(rows, json_path, crossover=crossed)
    plot = plot_path(plot, json_path)
    if plot is not None:
        from ..benchmarks.plot import plot_speedups

        plot_speedups(plot, rows)


def beside(json_path: str | None) -> Path | None:
    """Where a plot goes that no option names: beside the file of --json, if that is a file."""
    from ..system.outputs import destination, is_stream

    if json_path in (None, "-") or is_stream(destination(json_path)):
        return None
    path = Path(json_path)
    # the JSON itself may be called .svg
    return path.with_suffix(".svg") if path.suffix != ".svg" else path.with_name(f"{path.name}.svg")


def plot_path(plot: Path | None, json_path: str | None) -> Path | None:
    """The file of --plot, or else one beside that of --json;
    a line says so where nothing is installed that draws this one.
    """
    path = plot or beside(json_path)
    if plot is None and path is not None and (missing := missing_packages("report")):
        console.print(
            f"{path} is not drawn without {', '.join(missing)}: {install_command('report')}",
            markup=False,
            highlight=False,
        )
        return None
    return path


def bench_table(*columns: str, title: str | None = None) -> Table:
    """A table that fits into 80 columns."""
    return Table(*columns, title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)


def emit_rows(rows: list[dict[str, Any]], json_path: str | None, **more: Any) -> None:
    from ..system.environment import environment

    emit({"environment": environment(), **more, "rows": rows}, json_path)
