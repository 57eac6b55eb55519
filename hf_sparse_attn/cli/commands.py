"""Command line ``hf-sparse-attn``: run, ablate, distill, eval, lm-eval, calibrate, synth, card, bench, architectures,
doctor, prep, pilot.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from ..system.extras import MissingExtraError, needs_extra
from ..system.progress import step
from .bench import bench
from .bench_training import training
from .doctor import doctor
from .measure import calibrate, evaluate, harness
from .options import DtypeOption, JsonOption, TextOption, checked_output, console, emit, load, reserving, windows_of
from .plant_data import prep
from .plant_pilot import pilot
from .synthesis import synth

with needs_extra("cli", "the command line"):
    import typer
    from rich.markup import escape

OutOption = Annotated[
    Path | None, typer.Option(help="Folder of the run; default runs/<recipe name>, with -smoke for --smoke.")
]
SmokeOption = Annotated[
    bool, typer.Option("--smoke", help="At reduced size, on two cores in minutes, as the recipe says.")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Change a key: 'data.train=[my.log]'. Can be repeated.")
]

NetworkOption = Annotated[
    bool,
    typer.Option(
        "--allow-network", help="Let the recipe push or report what is trained (push_to_hub, report_to and the like)."
    ),
]
RECIPE = "A recipe: a YAML file, or the name of one of this package, such as demo."

app = typer.Typer(
    add_completion=False, no_args_is_help=True, help="Learnable two-stage sparse attention for pretrained models."
)
bench.command()(training)
app.add_typer(bench, name="bench")
app.command(name="eval")(evaluate)
app.command(name="lm-eval")(harness)
app.command()(calibrate)
app.command()(synth)
app.command()(doctor)
app.command()(prep)
app.command()(pilot)


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help=RECIPE)],
    out: OutOption = None,
    smoke: SmokeOption = False,
    changes: SetOption = None,
    network: NetworkOption = False,
    json_path: JsonOption = None,
) -> None:
    """Run a recipe: convert, distil, fine-tune, evaluate, measure, save, reload. Continues an interrupted run.

    Runs distributed by ``accelerate launch -m hf_sparse_attn.cli run RECIPE``.
    """
    _run(recipe, out, smoke, changes, json_path, network=network)


@app.command()
def ablate(
    recipe: Annotated[
        Path,
        typer.Argument(
            help="A recipe of task ablation: a YAML file, or the name of one of this package, e.g. ablation."
        ),
    ],
    out: OutOption = None,
    smoke: SmokeOption = False,
    changes: SetOption = None,
    network: NetworkOption = False,
    json_path: JsonOption = None,
) -> None:
    """Change one factor of the sparse attention at a time and say what that does to quality, time and memory.

    A model and text of one's own: --set model.source=FOLDER --set 'data.train=[a.txt]' --set 'data.eval=[b.txt]'.
    """
    _run(recipe, out, smoke, changes, json_path, task="ablation", network=network)


def _run(
    recipe: Path,
    out: Path | None,
    smoke: bool,
    changes: list[str] | None,
    json_path: str | None,
    task: str | None = None,
    network: bool = False,
) -> None:
    from ..experiments.recipe import RecipeError, load_recipe
    from ..experiments.run import run_recipe

    loaded = load_recipe(recipe, smoke=smoke, changes=changes or (), network=network)
    if task not in (None, loaded.task):
        raise RecipeError(
            f"{recipe} is of task {loaded.task}, this verb runs those of task {task}: use hf-sparse-attn run {recipe}"
        )
    # a reduced run has a folder of its own: the other's results would not fit its recipe
    emit(run_recipe(loaded, out or Path("runs") / (loaded.name + "-smoke" * smoke)), json_path)


@app.command()
@reserving("out")
def distill(
    model: Annotated[str, typer.Argument(help="Hub id or local folder of a stock or sparse model.")],
    out: Annotated[Path, typer.Argument(help="Folder to save the sparse model in.")],
    text: TextOption,
    sparse: Annotated[
        str, typer.Option(help="Fields of SparseAttentionConfig, e.g. 'min_keys: 1024, max_keys: 1024'.")
    ] = "",
    context: Annotated[int, typer.Option(help="Tokens of a training window.")] = 4096,
    batches: Annotated[int, typer.Option(help="Training windows.")] = 16,
    dtype: DtypeOption = "auto",
    json_path: JsonOption = None,
) -> None:
    """Train the routers of a model on its own dense attention and save it; resumes from OUT/distill.pt."""
    from ..data.sources import free_bytes
    from ..data.windows import batches as to_batches
    from ..system.precision import resolve
    from ..training.distillation import distill as train

    loaded, tokenizer = load(model, resolve(dtype, "cpu"), sparse)
    # a full disk is found before the routers are trained
    size = sum(weight.numel() * weight.element_size() for weight in loaded.parameters())
    if free_bytes(out) < size:
        raise ValueError(
            f"{out} has {free_bytes(out) >> 20} MB free, the model needs {size >> 20} MB: make room, or name another "
            "folder"
        )
    rows = windows_of(text, tokenizer, context, batches, loaded)
    report = train(loaded, to_batches(rows), checkpoint=out / "distill.pt")
    loaded.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "distill.pt").unlink()
    emit(report.to_dict(), json_path)


@app.command()
def card(
    folder: Annotated[Path, typer.Argument(help="Folder of a saved sparse model; the card becomes its README.md.")],
    results: Annotated[Path, typer.Option(help="JSON that the verb run, eval, lm-eval or doctor --needles wrote.")],
    base: Annotated[
        str | None, typer.Option(help="Hub id or folder of the base model, if the results do not name it.")
    ] = None,
    json_path: JsonOption = None,
) -> None:
    """Write the model card of a saved model, rendered from its results."""
    from ..data.sources import model_licence
    from ..experiments.reports.model_card import write_card
    from ..system.files import read_json
    from ..system.outputs import check_output

    if "sparse_attention" not in read_json(folder / "config.json"):
        raise ValueError(f"{folder} holds no sparse model: its config.json has no sparse_attention")
    check_output(folder / "README.md")
    values = read_json(results)
    if base is not None:
        # a base that the results name comes before this one
        values = {"base": {"source": base, "license": model_licence(base)}, **values}
    emit(write_card(folder / "README.md", values).data.to_dict(), json_path)


@app.command()
def architectures(
    model_type: Annotated[
        str | None, typer.Argument(help="One model type, e.g. falcon; without it, all that are installed.")
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option(callback=checked_output, help="Write the table as a page to this path.")
    ] = None,
    json_path: JsonOption = None,
) -> None:
    """Which model types of the installed Transformers are supported, and why others are refused."""
    from ..architectures.table import STATES, as_json, as_markdown, compatibility, compatibility_table, count_states
    from ..system.files import write_text

    rows = compatibility_table() if model_type is None else [compatibility(model_type)]
    if markdown is not None:
        write_text(markdown, as_markdown(rows))
    if len(rows) == 1:
        console.print(
            f"{rows[0].model_type}: {rows[0].state}. {rows[0].note}", highlight=False, markup=False, soft_wrap=True
        )
    else:
        console.print(", ".join(f"{count_states(rows)[state]} {state}" for state in STATES), highlight=False)
    emit(as_json(rows), json_path)


def guarded(command: Callable[[], Any]) -> int:
    """Run ``command``; a user's mistake becomes one paragraph on standard error and exit code 1, a missing extra the
    same and 2.
    """
    try:
        command()
    except (ValueError, ImportError, OSError, RuntimeError) as error:
        # a user's mistake needs no traceback, unless it is asked for
        if os.environ.get("HF_SPARSE_ATTN_DEBUG"):
            raise
        console.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        return 2 if isinstance(error, MissingExtraError) else 1
    except KeyboardInterrupt:
        console.print("stopped; run the same command again to continue")
        # 128 + SIGINT, as shells have it
        return 130
    return 0


def printable_everywhere() -> None:
    """Signs that the terminal does not have are printed as '?': no help and no result is lost for a dash."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def main() -> None:
    """Entry point of ``hf-sparse-attn``."""
    import warnings

    from transformers.utils import logging

    # peft asks transformers for a property that the newest versions call by another name
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    printable_everywhere()
    # where there is no terminal it says now and then that the verb goes on
    with step(" ".join(sys.argv[1:2])):
        code = guarded(app)
    sys.exit(code)
