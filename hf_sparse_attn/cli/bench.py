"""``hf-sparse-attn bench``: speed and memory against dense attention, output verified first."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from ..system.extras import needs_extra
from .bench_output import bench_table, emit_rows, show_rows
from .options import JsonOption, SavedDtypeOption, TextOption, checked_plot, console, integers, load, windows_of

with needs_extra("cli", "the command line"):
    import typer

bench = typer.Typer(
    help="Speed and memory against dense attention in one run, output verified before it is timed. For a whole GPU "
    "see recipes/gpu."
)

LengthOption = Annotated[str, typer.Option(help="Comma-separated numbers of tokens.")]
KeysOption = Annotated[int, typer.Option(help="Keys kept.")]
DtypesOption = Annotated[str, typer.Option("--dtype", help="Comma-separated: auto, bfloat16, float32, float16.")]
HeadsOption = Annotated[str, typer.Option(help="Query heads / KV heads.")]
HeadDimOption = Annotated[int, typer.Option(help="Dimensions of a head.")]
RepeatsOption = Annotated[
    int | None, typer.Option(help="Alternating rounds; by default 5, and 3 from 32768 tokens on.")
]
PlotOption = Annotated[
    Path | None,
    typer.Option(
        callback=checked_plot, help="Where to draw speed-up against length; by default beside --json, as .svg."
    ),
]

LONG = 32768  # tokens from which on three rounds are enough


@bench.command()
def attention(
    length: LengthOption = "4096,16384,32768",
    keys: KeysOption = 1024,
    dtype: DtypesOption = "auto",
    heads: HeadsOption = "9/3",
    head_dim: HeadDimOption = 64,
    repeats: RepeatsOption = None,
    flex: Annotated[
        bool, typer.Option(help="Also time compiled flex_attention over the same links (compiling takes minutes).")
    ] = False,
    plot: PlotOption = None,
    json_path: JsonOption = None,
) -> None:
    """Prefill of one layer: the attention alone and with its router, against the best dense kernel."""
    from ..benchmarks import bench_attention

    rows = [
        bench_attention(shape, repeats=count, flex=flex)
        for shape, count in _shapes(length, keys, dtype, heads, head_dim, repeats)
    ]
    show_rows(rows, json_path, plot)


@bench.command()
def backward(
    length: LengthOption = "16384",
    keys: KeysOption = 1024,
    dtype: DtypesOption = "auto",
    heads: HeadsOption = "9/3",
    head_dim: HeadDimOption = 64,
    repeats: RepeatsOption = None,
    plot: PlotOption = None,
    json_path: JsonOption = None,
) -> None:
    """Forward and backward pass of one layer against the best dense kernel."""
    from ..benchmarks import bench_backward

    show_rows(
        [bench_backward(s, repeats=count) for s, count in _shapes(length, keys, dtype, heads, head_dim, repeats)],
        json_path,
        plot,
    )


@bench.command()
def decode(
    length: LengthOption = "16384,32768",
    keys: KeysOption = 1024,
    dtype: DtypesOption = "auto",
    heads: HeadsOption = "9/3",
    head_dim: HeadDimOption = 64,
    repeats: Annotated[int, typer.Option(help="Alternating rounds, each with another layer's cache.")] = 20,
    plot: PlotOption = None,
    json_path: JsonOption = None,
) -> None:
    """One query over a cache, selection included, against stock attention and the best dense decode."""
    from ..benchmarks import bench_decode

    show_rows(
        [bench_decode(s, repeats=count) for s, count in _shapes(length, keys, dtype, heads, head_dim, repeats)],
        json_path,
        plot,
    )


@bench.command()
def router(
    length: LengthOption = "16384",
    keys: KeysOption = 1024,
    dtype: DtypesOption = "auto",
    heads: HeadsOption = "9/3",
    head_dim: HeadDimOption = 64,
    index_dim: Annotated[
        str | None, typer.Option(help="Comma-separated ranks of stage 2; by default the head dim.")
    ] = None,
    query_samples: Annotated[
        str, typer.Option(help="Comma-separated numbers of queries that stage 2 scores per tile.")
    ] = "32",
    candidate_factor: Annotated[str, typer.Option(help="Comma-separated: candidates over budget.")] = "3",
    repeats: RepeatsOption = None,
    json_path: JsonOption = None,
) -> None:
    """Time of the router's stages for every combination of rank, queries and candidates."""
    from ..benchmarks import bench_router

    rows = []
    for shape, count in _shapes(length, keys, dtype, heads, head_dim, repeats):
        for rank in integers(index_dim or str(head_dim), "--index-dim"):
            for samples in integers(query_samples, "--query-samples"):
                for factor in _numbers(candidate_factor, "--candidate-factor"):
                    fields = {"index_dim": rank, "query_samples": samples, "candidate_factor": factor}
                    rows.append(bench_router(shape, repeats=count, **fields))
    stages = ("keys", "queries", "select", "router")
    table = bench_table(
        "tokens",
        "dtype",
        "rank",
        "queries",
        "factor",
        *stages,
        "share",
        title="times in ms; share of selection and attention",
    )
    for row in rows:
        ms = (f"{row['times'][name]['median_s'] * 1e3:.1f}" for name in stages)
        sizes = (row["length"], row["dtype"], row["index_dim"], row["query_samples"], f"{row['candidate_factor']}×")
        table.add_row(*map(str, sizes), *ms, f"{row['router_share']:.2f}")
    console.print(table)
    emit_rows(rows, json_path)


@bench.command()
def model(
    folder: Annotated[str, typer.Argument(help="Hub id or local folder of a sparse model.")],
    text: TextOption,
    length: LengthOption = "16384",
    keys: KeysOption = 1024,
    decode_tokens: Annotated[int, typer.Option(help="Decode steps of each kind.")] = 8,
    dtype: SavedDtypeOption = "auto",
    json_path: JsonOption = None,
) -> None:
    """Prefill and decode of a whole model against the stock model and the best dense decode."""
    import torch

    from ..benchmarks import bench_model

    loaded, tokenizer = load(folder, dtype, "")
    rows = []
    for n in integers(length, "--length"):
        # two tokens a step: best dense and sparse steps take turns on one cache
        need = n + 2 * decode_tokens
        # windows of 1024 tokens side by side, cut to the length
        ids = torch.cat([w.ids for w in windows_of(text, tokenizer, 1024, -(-need // 1024), loaded)], 1)[:, :need]
        rows.append(bench_model(loaded, ids, keys, decode_tokens=decode_tokens))
    table = bench_table("tokens", "dtype", "prefill", "decode", "decode over best dense")
    for row in rows:
        speedups = (
            f"{row[name]:.2f}×" for name in ("prefill_speedup", "decode_speedup", "decode_speedup_over_best_dense")
        )
        table.add_row(str(row["length"]), row["dtype"], *speedups)
    console.print(table)
    emit_rows(rows, json_path)


def _shapes(
    length: str, keys: int, dtype: str, heads: str, head_dim: int, repeats: int | None
) -> Iterator[tuple[Any, int]]:
    """Every layer that the options ask for, with its number of rounds; checked before the first is run."""
    import torch

    from ..benchmarks import LayerShape
    from ..system.precision import resolve

    query_heads, groups = _heads(heads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # auto is resolved before, so that the rows name what was measured
    names = [str(resolve(name.strip(), device)).removeprefix("torch.") for name in dtype.split(",")]
    shapes = [
        LayerShape(n, keys, dtype=name, heads=query_heads, groups=groups, head_dim=head_dim, device=device)
        for name in names
        for n in integers(length, "--length")
    ]
    # impossible sizes are found before the first is measured
    for shape in shapes:
        _ = shape.config  # raises for impossible sizes
    for shape in shapes:
        console.print(f"{shape.length} tokens, {shape.dtype} …", highlight=False)
        yield shape, repeats or (3 if shape.length >= LONG else 5)


def _heads(text: str) -> tuple[int, int]:
    parts = text.split("/")
    if (
        len(parts) != 2
        or not all(part.strip().isdigit() and int(part) for part in parts)
        or int(parts[0]) % int(parts[1])
    ):
        raise ValueError(
            f"--heads is {text!r}: must be query heads / KV heads, the first a multiple of the second, e.g. 9/3"
        )
    return int(parts[0]), int(parts[1])


def _numbers(text: str, option: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"{option} is {text!r}: must be numbers separated by commas") from error
