"""Changes of a sensor's unit: a jump that a conversion between two known units explains in level and in spread."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .channel_series import Floats, Ints, true_stretches


@dataclass(frozen=True)
class Conversion:
    """``new = factor * old + shift``."""

    old: str
    new: str
    factor: float
    shift: float = 0.0

    def back(self, values: Floats) -> Floats:
        return (values - self.shift) / self.factor

    @property
    def inverse(self) -> Conversion:
        return Conversion(self.new, self.old, 1 / self.factor, -self.shift / self.factor)


# factors below 3 without a shift are left out: a change of the process explains them as well
_FORTH = (
    Conversion("°C", "°F", 1.8, 32.0),
    Conversion("°C", "K", 1.0, 273.15),
    Conversion("°F", "K", 1 / 1.8, 459.67 / 1.8),
    Conversion("bar", "kPa", 100.0),
    Conversion("bar", "psi", 14.503774),
    Conversion("psi", "kPa", 6.894757),
    Conversion("MPa", "psi", 145.03774),
    Conversion("MPa", "bar", 10.0),
    Conversion("in", "mm", 25.4),
    Conversion("m/s", "km/h", 3.6),
    Conversion("gal", "L", 3.785412),
    Conversion("m³/h", "L/min", 100 / 6),
    Conversion("k", "1", 1000.0),  # kPa and Pa, kW and W, mm and µm
    Conversion("M", "1", 1e6),
    Conversion("bar", "Pa", 1e5),
)
SIGN = Conversion("+", "-", -1.0)
CONVERSIONS = (*_FORTH, *(conversion.inverse for conversion in _FORTH), SIGN)
FACTORS = np.array([conversion.factor for conversion in CONVERSIONS])
SHIFTS = np.array([conversion.shift for conversion in CONVERSIONS])

WINDOWS = (50, 100, 400)  # readings on each side whose spreads are compared
NEXT = 25  # readings on each side that must join after conversion
LEAST_SIDE = 50  # readings on each side of a change
LARGE = 8.0  # a jump against the usual step, at least
MOST_JUMPS = 400  # that are looked at, the largest
UNSEEN = 3.0  # times as large as nearly all others a jump must be
REVERSED = 1.5  # the same of a change of sign: a machine that is switched off jumps half as far
OTHER_JUMPS = 4  # as large, at most
LONGER = 3.0  # times as long as at any other time values must stay in that range
JOINS = 5.0  # usual steps within which both sides join after conversion
SPREADS = 1.4  # factor within which the ratio of spreads is that of the units
LEAST_FACTOR = 10.0  # of a change that was not seen itself
SAME_LEVEL = 0.1  # its level to a tenth
LEVEL = 4.0  # a level must be as many spreads away from zero for a factor to show in it
MOST_CHANGES = 20  # in one channel


@dataclass(frozen=True)
class UnitChange:
    """Readings ``stretch`` lie in another unit than those before it.

    ``factor`` and ``shift`` lead from the unit of the first reading to that of the stretch.
    """

    stretch: slice
    conversion: Conversion
    factor: float
    shift: float


def find_unit_changes(values: Floats) -> list[UnitChange]:
    """Stretches of ``values`` (n,) in another unit than the first reading, in order.

    A candidate is a jump far above the usual step. It is a change of unit if one of `CONVERSIONS` makes the two sides
    join, the spread around the level changes by the same factor, and there are not several jumps of this size: a change
    of the process changes the level alone, or comes again. Of several conversions that of the smallest misfit counts.
    """
    values = values.copy()
    changes: list[tuple[int, Conversion]] = []
    for _ in range(MOST_CHANGES):
        change = _first_change(values)
        if change is None:
            break
        changes.append(change)
        values[change[0] :] = change[1].back(values[change[0] :])
    return _stretches(sorted(changes, key=lambda change: change[0]), len(values))


def _stretches(changes: list[tuple[int, Conversion]], count: int) -> list[UnitChange]:
    """From change to change, leaving out where the first unit is back."""
    found, factor, shift = [], 1.0, 0.0
    for number, (start, conversion) in enumerate(changes):
        factor, shift = conversion.factor * factor, conversion.factor * shift + conversion.shift
        stop = changes[number + 1][0] if number + 1 < len(changes) else count
        if abs(factor - 1) > 1e-6 or abs(shift) > 1e-6:
            found.append(UnitChange(slice(start, stop), conversion, factor, shift))
    return found


def _first_change(values: Floats) -> tuple[int, Conversion] | None:
    """The first reading in another unit, and how it came to be."""
    if len(values) < 2 * LEAST_SIDE:
        return None
    jumps = np.abs(np.diff(_without_spikes(values)))
    usual = float(np.median(jumps[jumps > 0])) if jumps.any() else 0.0
    places = np.flatnonzero(jumps >= max(LARGE * usual, 1e-12)) + 1
    places = places[(places >= LEAST_SIDE) & (places <= len(values) - LEAST_SIDE)]
    if len(places) > MOST_JUMPS:
        places = np.sort(places[np.argsort(-jumps[places - 1], kind="stable")[:MOST_JUMPS]])
    for at in places.tolist():
        matches = sorted((misfit, number) for number, misfit in _matches(values, at))
        matches = [match for match in matches if _unlike_others(values, jumps, at, CONVERSIONS[match[1]])]
        if matches:
            return at, CONVERSIONS[matches[0][1]]
    return _changed_at_rest(values, places)


def _changed_at_rest(values: Floats, places: Ints) -> tuple[int, Conversion] | None:
    """A change while the machine rested at zero shows when it is switched next: everything before is far smaller than
    everything after, or the other way round.
    """
    size = np.abs(values)
    before = np.maximum.accumulate(size)
    after = np.maximum.accumulate(size[::-1])[::-1]
    for at in places.tolist():
        large = np.median(size[at : at + NEXT]) >= LEAST_FACTOR / 2 * before[at - 1]
        small = np.median(size[at - NEXT : at]) >= LEAST_FACTOR / 2 * after[at]
        if not (large or small):
            continue
        sides = [side[np.abs(side) > 0.2 * np.abs(side).max()] for side in (values[:at], values[at:])]
        if min(len(side) for side in sides) < LEAST_SIDE:
            continue
        ratio = float(np.median(sides[1]) / np.median(sides[0]))
        steps = _step(sides[1]) / max(_step(sides[0]), 1e-300)
        for conversion in CONVERSIONS:
            factor = conversion.factor
            if conversion.shift == 0 and max(factor, 1 / factor) >= LEAST_FACTOR and ratio > 0:
                close = abs(np.log(ratio / factor)) < SAME_LEVEL and 1 / SPREADS < steps / factor < SPREADS
                if close:
                    return at, conversion
    return None


def _unlike_others(values: Floats, jumps: Floats, at: int, conversion: Conversion) -> bool:
    """Whether the jump before ``at`` stands out: a machine that is switched jumps by as much again and again.

    Either hardly any other jump is as large. Or hardly any is with both sides in the unit of smaller numbers, and
    values stay for longer in their range after the jump than at any other time; the first unit may return with the
    next large jump.
    """
    jump, factor = float(jumps[at - 1]), abs(conversion.factor)
    least = jump / (REVERSED if conversion is SIGN else UNSEEN)
    before, after = jumps[: at - 1], jumps[at:]
    if int(np.sum(before >= least) + np.sum(after >= least)) <= OTHER_JUMPS:
        return True
    if factor > 1:
        return int(np.sum(before >= least) + np.sum(after >= least * factor)) <= OTHER_JUMPS
    large = np.flatnonzero(after >= least)
    back = at + int(large[0]) + 1 if len(large) else len(values)
    rest = np.concatenate((values[:at], values[back:]))
    low, high = np.quantile(values[at:back], [0.01, 0.99])
    visits = true_stretches((rest >= low) & (rest <= high))
    longest = max((visit.stop - visit.start for visit in visits), default=0)
    others = np.sum(before * factor >= least) + np.sum(jumps[back:] * factor >= least)
    return bool(back - at >= LONGER * longest and others <= OTHER_JUMPS)


def first_unit(values: Floats, changes: Sequence[UnitChange]) -> Floats:
    """``values`` (n,) with every stretch in another unit put back into that of the first reading."""
    restored = values.copy() if changes else values
    for change in changes:
        restored[change.stretch] = (values[change.stretch] - change.shift) / change.factor
    return restored


def _without_spikes(values: Floats) -> Floats:
    """Median of three neighbours, the ends as they are: a spike of one reading is no level."""
    a, b, c = values[:-2], values[1:-1], values[2:]
    middle = np.maximum(np.minimum(a, b), np.minimum(np.maximum(a, b), c))
    return np.concatenate((values[:1], middle, values[-1:]))


def _step(values: Floats, order: int = 1) -> float:
    """Usual step between neighbours, (n,): a mean, as most coarse values do not move, without the largest twentieth,
    as machines are switched.
    """
    steps = np.sort(np.abs(np.diff(values, order)))
    return float(steps[: max(1, int(0.95 * len(steps)))].mean())


def _noise(values: Floats) -> float:
    """Spread around a level that may rise or fall, (n,): what second differences leave."""
    return max(_step(values, 2), 1e-300)


def _matches(values: Floats, at: int) -> Iterator[tuple[int, float]]:
    """Conversions that explain the jump before ``at``, by number, each with its misfit: 0 is perfect."""
    before, after = values[at - NEXT : at], values[at : at + NEXT]
    if np.ptp(before) == 0 or np.ptp(after) == 0:
        return  # a constant has no spread to compare
    # medians of five, brought to the moment of the jump along their slope
    near_before = float(np.median(before[-5:]) + 3 * np.median(np.diff(before[-5:])))
    near_after = float(np.median(after[:5]) - 2 * np.median(np.diff(after[:5])))
    # rounding hides steps below the resolution
    moves = np.abs(np.diff(before))
    step_before, step_after = max(_step(before), float(moves[moves > 0].min()) / 2), _step(after)
    tolerances = JOINS * np.maximum(step_before * np.abs(FACTORS), step_after)
    misfits = np.abs(near_after - (FACTORS * near_before + SHIFTS)) / tolerances
    # the conversion must say more of the jump than nothing at all
    tells = abs(near_after - near_before) > 2 * tolerances
    level = min(abs(near_before) / before.std(), abs(near_after) / after.std())
    informative = (SHIFTS != 0) | (level > LEVEL)
    candidates = np.flatnonzero((misfits < 1) & tells & informative)
    if len(candidates) == 0:
        return
    # over a short and a long stretch: the machine may be switched in one of them
    ratios = [_noise(values[at : at + width]) / _noise(values[max(0, at - width) : at]) for width in WINDOWS]
    for number in candidates.tolist():
        off = min(abs(float(np.log(ratio / abs(FACTORS[number])))) for ratio in ratios)
        if off < np.log(SPREADS):
            yield number, float(misfits[number]) + off
