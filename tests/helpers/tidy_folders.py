"""Folders of prepared data made for tests: a machine that switches between off and on, its sensors and its logs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import polars as pl
from scipy.signal import lfilter

from hf_sparse_attn.industry.dataset import EVENTS, READINGS, Channel, Manifest, Source

START = int(np.datetime64("2024-03-01T00:00:00", "ns").astype(np.int64))
SECOND = 10**9
DAY = 86400


def autoregression(rng, count, phi, scale=1.0):
    """AR(1) of standard deviation ``scale``, shape (count,)."""
    noise = rng.normal(size=count) * np.sqrt(1 - phi**2)
    noise[0] = rng.normal()
    return scale * lfilter([1.0], [1.0, -phi], noise)


def on_off(rng, seconds, mean_on=6 * 3600, mean_off=2 * 3600):
    """0 while the machine is off and 1 while it is on, at each of the ascending ``seconds`` (n,)."""
    switches, at = [], seconds[0]
    state = bool(rng.random() < 0.7)
    first = state
    while at < seconds[-1]:
        at += (mean_on if state else mean_off) * rng.uniform(0.5, 1.5)
        switches.append(at)
        state = not state
    count = np.searchsorted(switches, seconds, side="right")
    return ((count % 2 == 0) == first).astype(float)


@dataclass
class Sensor:
    """A channel to be written: seconds since START, values, file."""

    name: str
    seconds: np.ndarray
    values: np.ndarray
    source: str = "sensors.csv"
    unit: str | None = None


@dataclass
class Plant:
    """Sensors and log lines (seconds, text, file) of one asset."""

    sensors: list[Sensor] = field(default_factory=list)
    lines: list[tuple[float, str, str]] = field(default_factory=list)

    def write(self, folder, asset="press", zone="Asia/Tokyo"):
        """Write the folder of prepared data; rows stand by time in each file, as a logger writes them."""
        paths = list(dict.fromkeys([*(s.source for s in self.sensors), *(path for _, _, path in self.lines)]))
        channels = [Channel(asset, s.name, paths.index(s.source), unit=s.unit) for s in self.sensors]
        manifest = Manifest(
            [asset], [Source(path, "csv-long", "00", 0, 0) for path in paths], channels, {"ingest": {"zone": zone}}
        )
        place = folder / "assets" / asset
        place.mkdir(parents=True)
        if self.sensors:
            self._readings(paths).write_parquet(place / "readings.parquet")
        if self.lines:
            self._events(paths).write_parquet(place / "events.parquet")
        manifest.write(folder)
        return manifest

    def _readings(self, paths):
        frames = [
            pl.DataFrame(
                {
                    "time": START + np.rint(s.seconds * SECOND).astype(np.int64),
                    "channel": np.full(len(s.seconds), number),
                    "value": s.values,
                    "quality": np.zeros(len(s.seconds), np.int64),
                    "source": np.full(len(s.seconds), paths.index(s.source)),
                    "line": np.zeros(len(s.seconds), np.int64),
                }
            )
            for number, s in enumerate(self.sensors)
        ]
        frame = pl.concat(frames).sort("source", "time", maintain_order=True)
        line = pl.int_range(2, pl.len() + 2).over("source")
        return frame.with_columns(line=line, value=pl.col("value").fill_nan(None)).cast(dict(READINGS))

    def _events(self, paths):
        rows = [
            (START + round(at * SECOND), "plc", "INFO", text, None, None, 0, paths.index(path), number)
            for number, (at, text, path) in enumerate(self.lines, 1)
        ]
        schema = {**EVENTS, "time": pl.Int64(), "quality": pl.Int64(), "source": pl.Int64(), "line": pl.Int64()}
        return pl.DataFrame(rows, schema=schema, orient="row").cast(dict(EVENTS))


def clean_plant(seed, *, days=30, interval=60.0, load_levels=(1.0, 0.8)):
    """Five quantised sensors of a machine that is off at times: current, temperature, pressure, vibration, a room's
    temperature with its day; in two files."""
    rng = np.random.default_rng(seed)
    seconds = np.arange(0, days * DAY, interval)
    on = on_off(rng, seconds)
    count = len(seconds)
    keep = np.exp(-interval / 1800)
    warm = lfilter([1 - keep], [1, -keep], on)
    room = 20 + 4 * np.sin(2 * np.pi * seconds / DAY) + autoregression(rng, count, 0.999, 1.0)
    slow = autoregression(rng, count, 0.98)
    current = on * (30 + 2 * slow + autoregression(rng, count, 0.3, 0.8))
    values = {
        "current": np.round(np.maximum(current, 0), 1),
        "oil temperature": np.round(room + 35 * warm + autoregression(rng, count, 0.9, 0.3), 1),
        "pressure": np.round(1 + on * (5 + 0.1 * slow) + rng.normal(size=count) * 0.02, 2),
        "vibration": np.round(
            np.abs(on * (2 + autoregression(rng, count, 0.5, 0.3)) + rng.normal(size=count) * 0.05), 3
        ),
        "room temperature": np.round(room, 1),
    }
    files = {"vibration": "vibration.csv", "room temperature": "vibration.csv"}
    return Plant([Sensor(name, seconds, v, files.get(name, "sensors.csv")) for name, v in values.items()])


def without(sensor, start, seconds):
    """A gap of so many seconds from ``start`` on."""
    kept = (sensor.seconds < start) | (sensor.seconds >= start + seconds)
    return replace(sensor, seconds=sensor.seconds[kept], values=sensor.values[kept])


def changed(sensor, start, seconds, change):
    """Values in a stretch replaced by what ``change`` makes of them."""
    values = sensor.values.copy()
    inside = (sensor.seconds >= start) & (sensor.seconds < start + seconds)
    values[inside] = change(values[inside])
    return replace(sensor, values=values)


def stuck(sensor, start, seconds):
    return changed(sensor, start, seconds, lambda values: np.full_like(values, values[0]))


def flat(sensor, start, seconds, share=0.05):
    """Moves ``share`` as much around its mean, not rounded."""
    return changed(sensor, start, seconds, lambda values: values.mean() + share * (values - values.mean()))


def saturated(sensor, start, seconds, quantile=0.6):
    """Cut off above a quantile of the stretch."""
    return changed(sensor, start, seconds, lambda values: np.minimum(values, np.quantile(values, quantile)))


def shifted(sensor, seconds):
    """Stamps of a clock that is ahead."""
    return replace(sensor, seconds=sensor.seconds + seconds)
