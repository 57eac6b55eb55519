"""The sensors of a machine: what they depend on, in which unit, range and resolution they record."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .plant_settings import PlantSettings
from .random_streams import stream

POWER, OIL, PRESSURE, VIBRATION = "power", "oil_temperature", "pressure", "vibration"


@dataclass(frozen=True)
class Sensor:
    """One sensor. Its value is base + gain · load (0 to 1, delayed) + ambient · (outdoor temperature − 15 °C) + noise.

    Attributes:
        name: as the historian's column has it.
        tag: as the process data system has it.
        tau: seconds after which it has followed a step of the load by 63 %.
        noise: standard deviation of its noise, an autoregression of first order.
        memory: coefficient of that.
        decimals: it records in steps of 10 to the power of minus this.
        low, high: limits of its range, on which it saturates.
    """

    name: str
    tag: str
    unit: str
    base: float
    gain: float
    tau: float
    ambient: float
    noise: float
    memory: float
    decimals: int
    low: float
    high: float


CATALOGUE = (
    Sensor(POWER, "MOT.PWR", "kW", 2.0, 120.0, 20, 0.0, 0.4, 0.2, 1, 0.0, 160.0),
    Sensor(OIL, "OIL.TMP", "°C", 28.0, 34.0, 1500, 0.5, 0.25, 0.9, 1, -20.0, 120.0),
    Sensor(PRESSURE, "HYD.PRS", "bar", 1.2, 6.5, 60, 0.0, 0.06, 0.7, 2, 0.0, 10.0),
    Sensor(VIBRATION, "BRG.VIB", "mm/s", 0.3, 3.4, 90, 0.0, 0.14, 0.5, 2, 0.0, 6.0),
    Sensor("flow", "CLG.FLW", "l/min", 4.0, 46.0, 240, 0.1, 0.7, 0.6, 1, 0.0, 60.0),
    Sensor("speed", "MOT.SPD", "rpm", -30.0, 1900.0, 40, 0.0, 6.0, 0.3, 0, 0.0, 1800.0),
    Sensor("bearing_temperature", "BRG.TMP", "°C", 22.0, 41.0, 2700, 0.7, 0.3, 0.9, 1, -20.0, 150.0),
    Sensor("ambient_temperature", "AMB.TMP", "°C", 15.0, 0.0, 60, 1.0, 0.15, 0.9, 1, -30.0, 50.0),
    Sensor("torque", "MOT.TRQ", "Nm", 10.0, 610.0, 30, 0.0, 4.0, 0.3, 0, 0.0, 800.0),
    Sensor("coolant_temperature", "CLG.TMP", "°C", 18.0, 17.0, 900, 0.6, 0.2, 0.9, 1, -20.0, 90.0),
    Sensor("current", "MOT.CUR", "A", 3.0, 210.0, 20, 0.0, 0.9, 0.2, 1, 0.0, 250.0),
    Sensor("inlet_pressure", "CLG.PRS", "bar", 2.8, -0.7, 180, 0.0, 0.03, 0.8, 2, 0.0, 6.0),
)
# what a change of unit makes of a value: the unit, factor and summand
CONVERSIONS = {"°C": ("°F", 1.8, 32.0), "bar": ("kPa", 100.0, 0.0)}


def sensors_of(settings: PlantSettings, asset: str) -> tuple[list[Sensor], list[Sensor]]:
    """(sensors of the historian's wide table, sensors of the process data system) of an asset.

    Both record the power: the clocks of the two can be compared by it.
    """
    random = stream(settings.seed, "sensors", asset)
    kinds = [CATALOGUE[number % len(CATALOGUE)] for number in range(settings.channels)]
    sensors = []
    for number, kind in enumerate(kinds):
        copy = number // len(CATALOGUE)
        suffix = f"_{copy + 1}" if copy else ""
        gain, noise = random.uniform(0.93, 1.0), random.uniform(0.8, 1.2)
        sensors.append(
            replace(
                kind,
                name=kind.name + suffix,
                tag=kind.tag + suffix,
                gain=kind.gain * gain,
                noise=kind.noise * noise,
            )
        )
    wide = len(sensors) - max(1, len(sensors) // 4)
    return sensors[:wide], [sensors[0], *sensors[wide:]]
