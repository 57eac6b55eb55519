"""The verb synth: data whose long-range links are known because they were planted."""

from __future__ import annotations

import re
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Annotated

from ..system.extras import needs_extra
from .measured_tables import print_links
from .options import JsonOption, checked_plot, command_line, console, emit, reserving, sparse_options, yaml_fields

with needs_extra("cli", "the command line"):
    import typer

SMALL_SPARSE = "block_size: 16, query_tile: 16, sink: 16, local: 16, dense_below: 0, min_keys: 160, max_keys: 160"


@reserving("out")
def synth(
    out: Annotated[Path, typer.Argument(help="Folder to write the set into.")],
    settings: Annotated[
        str,
        typer.Option(
            "--set",
            help="Fields of LongLinkConfig, e.g. 'family: two_hops, keys: 20'; of PlantSettings for --plant, e.g. "
            "'days: 90, faults: all'.",
        ),
    ] = "",
    seed: Annotated[int, typer.Option(help="The same seed and settings give the same bytes.")] = 0,
    plant: Annotated[
        bool,
        typer.Option("--plant", help="Write the raw exports of a plant in place of a LongLink set; needs [industry]."),
    ] = False,
    learn: Annotated[
        bool, typer.Option("--learn", help="Train a small model on such sets, distil its routers, and measure them.")
    ] = False,
    sparse: Annotated[str, typer.Option(help="Fields of SparseAttentionConfig for --learn.")] = SMALL_SPARSE,
    report: Annotated[
        Path | None, typer.Option(callback=checked_plot, help="Write what --learn found as one HTML page to this path.")
    ] = None,
    json_path: JsonOption = None,
) -> None:
    """Make a LongLink set: sequences with planted long-range links, as datasets, with a table of the links.

    With --learn also shows what a small model and its routers make of such sets, dense and under every selection.
    With --plant instead logs and sensor records of machines, with failures whose causes lie minutes to weeks before
    and with faults of the data, and truth.json, which says where all of these stand.
    """
    if plant:
        refused = {"--learn": learn, "--report": report is not None, "--sparse": sparse != SMALL_SPARSE}
        for option in (name for name, given in refused.items() if given):
            raise ValueError(f"{option} is about LongLink sets: leave it out, or --plant")
        _write_plant(out, settings, seed, json_path)
        return
    _make_longlink(out, settings, seed, learn, sparse, report, json_path)


def _write_plant(out: Path, settings: str, seed: int, json_path: str | None) -> None:
    from ..industry.plant_generator.plant_settings import PlantSettings
    from ..industry.plant_generator.plant_writer import write_plant
    from ..system.progress import duration

    # the field null is a name here, and no value to YAML
    chosen = yaml_fields(re.sub(r"(^|,)(\s*)null(\s*:)", r"\1\2'null'\3", settings), "--set")
    known = [field.name for field in fields(PlantSettings) if field.name != "seed"]
    for name in chosen:
        if name == "seed":
            raise ValueError(f"--set {settings!r} holds the seed: give it as --seed")
        if name not in known:
            raise ValueError(f"--set {settings!r} holds {name}, which a plant has not: it has {', '.join(known)}")
    config = PlantSettings(seed=seed, **chosen)
    truth = write_plant(out, config)
    links = "causes that lead to nothing" if config.null else f"causes about {duration(truth.lag_s)} before failures"
    console.print(
        f"{config.assets} x {config.days} days, {truth.rows} lines: {len(truth.failures)} failures, {links}, "
        f"{len(truth.findings)} data faults; {out}",
        markup=False,
        highlight=False,
    )
    counts = {name: len(getattr(truth, name)) for name in ("sources", "causes", "failures", "distractors", "findings")}
    emit(
        {"settings": truth.settings, "folder": str(out), "lines": truth.rows, "lag_s": truth.lag_s, **counts}, json_path
    )


def _make_longlink(
    out: Path,
    settings: str,
    seed: int,
    learn: bool,
    sparse: str,
    report: Path | None,
    json_path: str | None,
) -> None:
    from ..config import SparseAttentionConfig
    from ..experiments.longlink.export import save
    from ..experiments.longlink.families import LongLinkConfig
    from ..experiments.longlink.learning import EVALUATED, LearningConfig, with_routers
    from ..experiments.longlink.learning import learn as train
    from ..experiments.longlink.planting import plant as planted
    from ..experiments.longlink.study import study
    from ..experiments.reports.html_report import write_longlink_report
    from ..system.environment import Cost, environment

    if report is not None and not learn:
        raise ValueError("--report shows what --learn found: give both")
    try:
        # an unknown field is a TypeError of the class
        config = LongLinkConfig(**yaml_fields(settings, "--set"))
    except TypeError as error:
        raise ValueError(f"--set {settings!r}: {error}") from error
    save(planted(config, seed), out)
    console.print(
        f"{config.sequences} sequences of {config.length} tokens, {config.links} links each: {out}", markup=False
    )
    if not learn:
        emit({"config": asdict(config), "seed": seed, "folder": str(out)}, json_path)
        return
    learning = LearningConfig.up_to(config.length, seed)
    with Cost() as cost:
        model = train(config, learning)
        with_routers(model, SparseAttentionConfig.from_dict(sparse_options(sparse)), config, learning)
        # sets that the model did not learn from: a training keeps to its seed's multiple of EVALUATED
        results = study(model, config, EVALUATED * (seed + 7))
    document = {
        "command": command_line(),
        "environment": environment(),
        "sparse_attention": model.config.sparse_attention,
        **cost.figures,
    }
    print_links(results)
    document |= results
    emit(document, json_path, None if report is None else partial(write_longlink_report, report, document))
