"""Values of an asset's sensors, chunk by chunk in time: load and weather, what follows from them, and noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ...system.extras import needs_extra
from .machine_channels import Sensor, sensors_of
from .operating_schedule import IDLE, Schedule
from .plant_settings import DAY, PlantSettings
from .random_streams import stream

with needs_extra("industry", "generated plants"):
    import polars as pl

Floats = npt.NDArray[np.float64]
Times = npt.NDArray[np.int64]  # milliseconds since 1970, UTC

LOAD_TAU = 45.0  # seconds in which the load follows its set point
LOAD_NOISE, LOAD_MEMORY = 0.035, 600.0  # standard deviation under load; seconds
WEATHER_NOISE, WEATHER_MEMORY = 3.0, 1.5 * DAY  # °C; seconds
DAILY_SWING, WARMEST_HOUR = 5.0, 13.5  # °C; of the day in UTC


@dataclass(frozen=True)
class Excursion:
    """A planted deviation of one sensor: it rises, stays and falls; times in milliseconds, ``amount`` in its unit."""

    channel: str
    start: int
    rise: int
    hold: int
    fall: int
    amount: float

    @property
    def end(self) -> int:
        return self.start + self.rise + self.hold + self.fall


@dataclass
class Filter:
    """y = memory · y before + (1 − memory) · x, over chunks: the last y is kept."""

    memory: float
    last: float

    def __call__(self, values: Floats) -> Floats:
        series = pl.Series(np.concatenate([[self.last], values]))
        smooth = series.ewm_mean(alpha=1 - self.memory, adjust=False).to_numpy()[1:]
        self.last = float(smooth[-1])
        return smooth


@dataclass
class Noise:
    """An autoregression of first order with standard deviation 1."""

    memory: float
    random: np.random.Generator
    filter: Filter = field(init=False)

    def __post_init__(self) -> None:
        self.filter = Filter(self.memory, float(self.random.standard_normal()) * self._ratio)

    @property
    def _ratio(self) -> float:
        # the variance of y is (1 − memory)² / (1 − memory²) times that of x
        return float(((1 - self.memory) / (1 + self.memory)) ** 0.5)

    def __call__(self, count: int) -> Floats:
        return self.filter(self.random.standard_normal(count)) / self._ratio


class Signals:
    """What the two systems record of an asset.

    The load and the weather are followed on a grid of ``step`` seconds, finer than the sensors' interval, so that two
    systems that sample at different moments see one signal.
    """

    def __init__(
        self, settings: PlantSettings, asset: str, schedule: Schedule, excursions: Sequence[Excursion]
    ) -> None:
        self.settings, self.schedule, self.excursions = settings, schedule, excursions
        self.wide, self.long = sensors_of(settings, asset)
        self.every = max(part for part in range(1, 7) if settings.interval % part == 0)
        self.step = settings.interval // self.every
        hours = np.arange(0, DAY, self.step) / 3600
        self._daily = DAILY_SWING * np.cos(2 * np.pi * (hours - WARMEST_HOUR) / 24)
        seed = settings.seed
        self._load_noise = Noise(_memory(LOAD_MEMORY, self.step), stream(seed, "load", asset))
        # one weather for the plant
        self._weather = Noise(_memory(WEATHER_MEMORY, self.step), stream(seed, "weather"))
        self._load = Filter(_memory(LOAD_TAU, self.step), 0.0)
        self._follow = {s.name: Filter(_memory(s.tau, self.step), 0.0) for s in self._all()}
        self._noises = {
            (system, s.name): Noise(s.memory, stream(seed, "noise", asset, system, s.name))
            for system, sensors in (("wide", self.wide), ("long", self.long))
            for s in sensors
        }
        self._jitter = stream(seed, "sampling", asset)
        # the first point of the grid; each chunk hands its last one on
        self._edge = self._latent(np.array([settings.begin]))

    def _all(self) -> list[Sensor]:
        return [*self.wide, *self.long[1:]]

    def chunk(self, begin: int, end: int) -> tuple[Times, dict[str, Floats], Times, npt.NDArray[np.int64], Floats]:
        """Readings from ``begin`` to ``end`` (seconds, whole intervals), which follows on the chunk before.

        Returns:
            times and values by name of the wide table; times, numbers of tags and values of the other system, by time.
        """
        new = self._latent(np.arange(begin + self.step, end + 1, self.step))
        fine = {name: np.concatenate([self._edge[name], values]) for name, values in new.items()}
        self._edge = {name: values[-1:] for name, values in new.items()}
        times = np.arange(begin, end, self.settings.interval) * 1000
        wide = {s.name: self._recorded(s, "wide", times, fine[s.name][: -1 : self.every]) for s in self.wide}
        return times, wide, *self._long_form(begin, times, fine)

    def _latent(self, seconds: Times) -> dict[str, Floats]:
        """Values of every sensor without noise at points of the fine grid."""
        stretch = self.schedule.at(seconds)
        running = np.where(self.schedule.states[stretch] == IDLE, 0.05, 1.0)
        load = self._load(self.schedule.levels[stretch])
        load = load + LOAD_NOISE * running * self._load_noise(len(seconds))
        outdoors = self._daily[(seconds % DAY) // self.step] + WEATHER_NOISE * self._weather(len(seconds))
        return {s.name: s.base + s.gain * self._follow[s.name](load) + s.ambient * outdoors for s in self._all()}

    def _long_form(
        self, begin: int, times: Times, fine: dict[str, Floats]
    ) -> tuple[Times, npt.NDArray[np.int64], Floats]:
        # each tag is read once an interval, at any moment of it
        late = np.floor(self._jitter.random((len(times), len(self.long))) * self.settings.interval * 1000)
        moments = times[:, None] + late.astype(np.int64)
        values = np.empty(moments.shape)
        for column, sensor in enumerate(self.long):
            # whole numbers: a fraction would round otherwise in a longer chunk
            before, rest = np.divmod(moments[:, column] - begin * 1000, self.step * 1000)
            signal, part = fine[sensor.name], rest / (self.step * 1000)
            between = signal[before] * (1 - part) + signal[before + 1] * part
            values[:, column] = self._recorded(sensor, "long", moments[:, column], between)
        order = np.argsort(moments, axis=1, kind="stable")
        by_time = np.take_along_axis(values, order, axis=1).ravel()
        return np.sort(moments, axis=1).ravel(), order.ravel().astype(np.int64), by_time

    def _recorded(self, sensor: Sensor, system: str, times: Times, signal: Floats) -> Floats:
        """With noise and what was planted, within the range, in steps of the resolution."""
        values = signal + sensor.noise * self._noises[system, sensor.name](len(signal))
        for excursion in self.excursions:
            if excursion.channel == sensor.name and excursion.start < times[-1] and excursion.end > times[0]:
                ends = np.cumsum([excursion.start, excursion.rise, excursion.hold, excursion.fall])
                values = values + excursion.amount * np.interp(times, ends, [0.0, 1.0, 1.0, 0.0])
        # adding zero turns −0.0, which no system exports, into 0.0
        recorded = np.round(np.clip(values, sensor.low, sensor.high), sensor.decimals) + 0.0
        return np.asarray(recorded, dtype=np.float64)


def _memory(seconds: float, step: float) -> float:
    return float(np.exp(-step / seconds))
