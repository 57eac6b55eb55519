"""A LongLink set as `datasets`: its sequences and its table of links, in a folder."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
from datasets import Dataset, load_from_disk

from ...system.files import read_json, replaced_folder, write_json
from .families import LongLinkConfig, LongLinkError
from .planting import Link, Planted

SETTINGS = "longlink.json"


def sequences_of(planted: Planted) -> Dataset:
    """``input_ids`` and ``labels`` of every sequence, as a causal language model takes them."""
    return Dataset.from_dict({"input_ids": list(planted.input_ids), "labels": list(planted.labels)})


def links_of(planted: Planted) -> Dataset:
    """One row for every link, see `Link`."""
    rows = [{**asdict(link), "causes": list(link.causes)} for link in planted.links]
    return Dataset.from_list(rows)


def save(planted: Planted, folder: str | Path) -> None:
    """Write ``sequences``, ``links`` and the settings into ``folder``, whose files appear once all of them are
    complete.
    """
    with replaced_folder(folder, SETTINGS) as temporary:
        sequences_of(planted).save_to_disk(temporary / "sequences")
        links_of(planted).save_to_disk(temporary / "links")
        write_json(temporary / SETTINGS, {"seed": planted.seed, "config": asdict(planted.config)})


def load(folder: str | Path) -> Planted:
    """Read what `save` wrote.

    Raises:
        LongLinkError: the folder holds no LongLink set, or not a whole one.
    """
    folder = Path(folder)
    try:
        settings = read_json(folder / SETTINGS)
        sequences, links = (load_from_disk(str(folder / name)) for name in ("sequences", "links"))
        values = settings["config"]
        # JSON knows lists only, and the settings are compared as tuples
        config = LongLinkConfig(**{**values, "unseen": values["unseen"] and tuple(values["unseen"])})
        table = tuple(Link(**{**row, "causes": tuple(row["causes"])}) for row in links)
        ids, labels = (np.array(sequences[name], dtype=np.int64) for name in ("input_ids", "labels"))
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise LongLinkError(
            f"{folder} holds no whole LongLink set ({error}): write it anew with hf-sparse-attn synth"
        ) from error
    if ids.shape != (config.sequences, config.length) or len(table) != config.sequences * config.links:
        raise LongLinkError(
            f"{folder} holds {ids.shape} tokens and {len(table)} links, not what its settings say: write it anew"
        )
    return Planted(config, settings["seed"], ids, labels, table)
