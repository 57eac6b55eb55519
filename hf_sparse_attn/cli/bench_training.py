"""``hf-sparse-attn bench training``: training steps against stock, and with ``--plan`` their memory and time before
anyone pays.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from ..system.extras import needs_extra
from .bench import LengthOption, PlotOption
from .bench_output import bench_table, emit_rows, plot_path
from .options import JsonOption, SavedDtypeOption, console, integers, load, saved_dtype, windows_of

with needs_extra("cli", "the command line"):
    import typer


def training(
    folder: Annotated[str, typer.Argument(help="Hub id or local folder of a sparse model; of --plan any model's.")],
    text: Annotated[
        str | None, typer.Option("--text", help="Comma-separated sources, see docs/data.md; not needed for --plan.")
    ] = None,
    length: LengthOption = "2048,4096,8192",
    keys: Annotated[int | None, typer.Option(help="Keys kept; by default as the model's settings say.")] = None,
    density: Annotated[
        float | None, typer.Option(help="Share of the visible keys that is kept, instead of --keys.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Timed steps of each kind; one more measures memory.")] = 3,
    batch: Annotated[int, typer.Option(help="Rows of a step.")] = 1,
    lora_rank: Annotated[int, typer.Option(help="Rank of LoRA.")] = 8,
    target_modules: Annotated[
        str, typer.Option(help="Comma-separated modules that LoRA goes on.")
    ] = "q_proj,k_proj,v_proj,o_proj",
    gradient_checkpointing: Annotated[bool, typer.Option(help="Recompute each layer in the backward pass.")] = True,
    chunked_loss: Annotated[bool, typer.Option(help="Never hold the logits of all tokens.")] = True,
    dense_every: Annotated[int, typer.Option(help="Every this-many-th step of the recipe runs dense; 0 = none.")] = 4,
    eager: Annotated[bool, typer.Option(help="Also measure stock eager attention, up to 4096 tokens.")] = False,
    padded: Annotated[bool, typer.Option(help="Also compare a padded batch with the same documents packed.")] = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="Only predict memory and time, from the model's config alone.")
    ] = False,
    gpu: Annotated[
        str, typer.Option(help="Device of --plan, e.g. H100-80GB or RTX4090-24GB; cpu is measured here.")
    ] = "cpu",
    dtype: SavedDtypeOption = "auto",
    plot: PlotOption = None,
    json_path: JsonOption = None,
) -> None:
    """Training steps of a whole model, sparse against stock; with --plan what they will need on a device."""
    from ..training.config import AdaptationConfig

    names = tuple(name.strip() for name in target_modules.split(","))
    options: dict[str, Any] = {
        "gradient_checkpointing": gradient_checkpointing,
        "chunked_loss": chunked_loss,
        "dense_every": dense_every,
    }
    config = AdaptationConfig(rank=lora_rank, target_modules=names, batch_size=batch, **options)
    lengths, budget = integers(length, "--length"), _budget(keys, density)
    for option, value in (*(("--length", n) for n in lengths), ("--steps", steps)):
        if value < 1:
            raise ValueError(f"{option} is {value}: must be >= 1")
    if plan:
        # a plan runs no step: an option of steps that is given is a mistake
        ignored = {"--text": text is not None, "--eager": eager, "--plot": plot is not None}
        if any(ignored.values()):
            raise ValueError(
                f"{', '.join(name for name, given in ignored.items() if given)}: --plan measures nothing; leave these "
                "out"
            )
        _plan(folder, lengths, budget, config, gpu, dtype, padded, json_path)
        return
    if gpu != "cpu":
        raise ValueError(f"--gpu {gpu} is the device of --plan: ask for --plan, or leave it out to measure here")
    if text is None:
        raise ValueError("--text is missing: name the texts to train on, or ask for --plan")
    rows = []
    for row in _measure(folder, text, lengths, budget, config, steps, dtype, eager, padded):
        rows.append(row)
        if json_path != "-":  # a long row that is interrupted must not cost those before it
            emit_rows(rows, json_path)
    if json_path == "-":
        emit_rows(rows, json_path)
    _draw(plot, json_path, rows)


def _draw(plot: Path | None, json_path: str | None, rows: list[dict[str, Any]]) -> None:
    from ..benchmarks.plot import plot_training

    plot = plot_path(plot, json_path)
    if plot is not None:
        plot_training(plot, rows)


def _budget(keys: int | None, density: float | None) -> dict[str, Any]:
    from ..config import fixed_budget

    if keys is not None and density is not None:
        raise ValueError("--keys and --density exclude each other: give one of them")
    if keys is not None:
        return fixed_budget(keys)
    return {} if density is None else {"density": density, "max_keys": None, "mass_threshold": None}


def _measure(
    folder: str,
    text: str,
    lengths: list[int],
    budget: dict[str, Any],
    config: Any,
    steps: int,
    dtype: str,
    eager: bool,
    padded: bool,
) -> Iterator[dict[str, Any]]:
    """The row of each length, shown as it is made."""
    import torch

    from ..benchmarks import TrainingShape, bench_training
    from ..benchmarks.planner.check import compare_plan, device_here, faster_here

    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded, tokenizer = load(folder, dtype, "", device)
    loaded.to(device)
    for n in lengths:
        console.print(f"{n} tokens …", highlight=False)
        # one step's windows more than are timed: they warm up and measure memory
        rows = [w.ids for w in windows_of(text, tokenizer, n, config.batch_size * (steps + 1), loaded)]
        windows = [torch.cat(rows[at : at + config.batch_size]) for at in range(0, len(rows), config.batch_size)]
        # a CPU's rates before the steps and after them: a moment in which others used it does not count
        before = device_here(loaded, config)
        row = bench_training(loaded, windows, TrainingShape(budget, config, eager, padded))
        row["plan"] = None
        if before is not None:
            try:
                row["plan"] = compare_plan(loaded, faster_here(before, loaded, config), row, config)
            except ValueError as error:  # the times that were measured stand without it
                console.print(f"no plan to compare with: {error}", markup=False, highlight=False)
        _show(row)
        yield row


def _show(row: dict[str, Any]) -> None:
    table = bench_table(
        "kind",
        "s a step",
        "min–max",
        "tokens/s",
        "over stock",
        "MB",
        "loss",
        title=f"{row['length']} tokens, {row['dtype']}",
    )
    # the recipe's step is an average of two kinds
    kinds = row["kinds"] | ({"recipe": row["recipe"]} if row["recipe"]["dense_every"] else {})
    for name, figures in kinds.items():
        speedup = row["speedup"].get(name)
        memory = f"{figures['peak_memory_bytes'] / 2**20:.0f}" if "peak_memory_bytes" in figures else ""
        loss = f"{figures['loss_first']:.4f} → {figures['loss_last']:.4f}" if "loss_first" in figures else ""
        span = f"{figures['min_s']:.2f}–{figures['max_s']:.2f}"
        over = f"{speedup['median']:.2f}× ({speedup['min']:.2f}–{speedup['max']:.2f})" if speedup else ""
        table.add_row(name, f"{figures['median_s']:.2f}", span, f"{figures['tokens_per_s']:.0f}", over, memory, loss)
    for name, figures in row.get("layouts", {}).items():
        span = f"{figures['min_s']:.2f}–{figures['max_s']:.2f}"
        table.add_row(
            name,
            f"{figures['median_s']:.2f}",
            span,
            f"{figures['tokens_per_s']:.0f}",
            "",
            f"{figures['peak_memory_bytes'] / 2**20:.0f}",
            "",
        )
    console.print(table)
    console.print(
        f"KL: {row['kl_share']:.1%} of a sparse step; MB: peak of a step above weights and states; recipe: its "
        "average step"
    )
    for name, figures in (row["plan"] or {}).items():
        memory, time = figures["memory_error"], figures["time_error"]
        console.print(f"plan, {name}: memory {memory:+.1%}, time {time:+.1%} of the measured", highlight=False)


def _plan(
    folder: str,
    lengths: list[int],
    budget: dict[str, Any],
    config: Any,
    gpu: str,
    dtype: str,
    padded: bool,
    json_path: str | None,
) -> None:
    from transformers import AutoConfig

    from ..benchmarks.planner.check import named_device
    from ..benchmarks.planner.fit import fits, longest_length, room
    from ..benchmarks.planner.plan import plan_training
    from ..config import SparseAttentionConfig
    from ..system.precision import resolve

    # the GPU may be elsewhere: what this processor multiplies does not matter
    model, where = AutoConfig.from_pretrained(folder), "cpu" if gpu == "cpu" else "planned"
    kind = saved_dtype(model, dtype, where) or resolve("auto", where)
    # the folder's own settings, with the budget that was asked for over them
    sparse = SparseAttentionConfig.coerce(getattr(model, "sparse_attention", None) or {}).changed(**budget)
    device = named_device(gpu, model, kind, config)
    options = {
        "config": model,
        "batch": config.batch_size,
        "dtype": kind,
        "sparse_attention": sparse,
        "training": config,
        "padded": padded,
    }
    table = bench_table(
        "tokens",
        "kind",
        "weights",
        "LoRA, routers, states",
        "step",
        "GB",
        "fits",
        "s a step",
        "tokens/s",
        title=device.name,
    )
    rows = []
    for n in lengths:
        for attention in ("sparse", "dense", "stock"):
            plan = plan_training(device=device, length=n, attention=attention, **options)
            fit = fits(plan, device)
            others = plan.static_bytes - plan.static["weights"]
            sizes = (f"{x / 1e9:.2f}" for x in (plan.static["weights"], others, plan.peak_bytes, plan.total_bytes))
            verdict = "yes" if fit else f"{(plan.total_bytes - room(device)) / 1e9:.1f} GB missing"
            table.add_row(str(n), attention, *sizes, verdict, f"{plan.seconds:.3g}", f"{plan.tokens_per_s:.0f}")
            rows.append({"benchmark": "plan", **plan.to_dict(), "fits": fit, "room_bytes": room(device)})
    console.print(table)
    longest = {attention: longest_length(device, attention=attention, **options) for attention in ("sparse", "stock")}
    console.print(
        f"longest rows that fit: {longest['sparse']} tokens sparse, {longest['stock']} stock; {device.note}",
        highlight=False,
    )
    emit_rows(rows, json_path, longest=longest, device=device.name, assumptions=device.note)
