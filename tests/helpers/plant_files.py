"""Files of a plant for tests of prep: written in a form, read again, and looked up line by line."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from helpers.paths import DATA

from hf_sparse_attn.industry.dataset import PlantDataset
from hf_sparse_attn.industry.preparation.ingest import ingest
from hf_sparse_attn.industry.preparation.ingest_settings import IngestSettings


def shared_file(name):
    """A file of real data; the test is skipped where it is not there."""
    path = DATA / name
    if not path.is_file():
        pytest.skip(f"{name} is not here")
    return path


def read(folder, *paths, **settings):
    """(dataset, findings) of files, prepared in a new folder below ``folder``."""
    out = folder / f"out{len(list(folder.glob('out*')))}"
    out.mkdir()
    manifest, findings = ingest([str(path) for path in paths], out, IngestSettings(**settings))
    manifest.write(out)
    return PlantDataset(out), findings


def rows(data, asset=None):
    """Readings as they stand, with the name of their channel."""
    asset = asset or data.manifest.assets[0]
    names = pl.DataFrame(
        {"channel": range(len(data.manifest.channels)), "name": [each.name for each in data.manifest.channels]},
        schema={"channel": pl.UInt16, "name": pl.String},
    )
    return data.readings(asset, in_order=False).collect().join(names, on="channel", how="left", maintain_order="left")


def times(data, asset=None):
    """Times of readings, or of events, as ISO texts in the order of the file."""
    asset = asset or data.manifest.assets[0]
    frame = data.readings(asset, in_order=False).collect()
    if frame.is_empty():
        frame = data.events(asset, in_order=False).collect()
    return frame["time"].dt.strftime("%Y-%m-%dT%H:%M:%S%.f").to_list()


def kinds(findings):
    return [each.kind for each in findings]


def of_kind(findings, kind):
    return [each for each in findings if each.kind == kind]


def write(path, lines, encoding="utf-8", end="\n"):
    path.write_bytes("".join(line + end for line in lines).encode(encoding))
    return path


def stamps(count, start="2024-01-15T00:00:00", step="1m", form="%Y-%m-%d %H:%M:%S"):
    """Texts of a regular clock."""
    first = pl.Series([start]).str.to_datetime()[0]
    clock = pl.datetime_range(first, first + pl.duration(days=400), step, eager=True).head(count)
    return clock.dt.strftime(form).to_list()


def values(count, seed=0):
    return np.round(np.random.default_rng(seed).normal(50, 10, count), 4).tolist()
