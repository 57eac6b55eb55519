"""What the log lines of a plant say: templates with parameters, who writes them, where and in which state."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

from .operating_schedule import STATES

TEXT, JSON, OTEL = range(3)  # the log that a line goes to
SLOTS = 3  # parameters of a template, at most
PARAMETER = re.compile(r"\{(\w+)\}")
WILDCARD = "<*>"  # a parameter in log.record.template

# kind of a parameter: the words that it can be; hex ids by a multiplicative hash (Knuth, TAOCP 3, 6.4)
WORDS: dict[str, tuple[str, ...]] = {
    "int": tuple(map(str, range(1000))),
    "ms": tuple(map(str, range(1, 5000))),
    "real": tuple(f"{number / 100:.2f}" for number in range(1, 3000)),
    "hex": tuple(f"0x{number * 2_654_435_761 % 2**32:08x}" for number in range(1, 4097)),
    "node": tuple(f"R{rack:02d}-M{middle}-N{node}" for rack in range(4) for middle in range(2) for node in range(4)),
    "user": ("operator1", "operator2", "shift-lead", "service", "scada"),
    "program": tuple(f"P{number}" for number in (104, 117, 118, 122, 240, 241, 305, 310, 377)),
    "state": STATES,
}

# log | level | component | letters of the states in which it is frequent (i, s, l, m; - = all) | text
BACKGROUND = """
t|INFO|controller|l|cycle {int} finished in {ms} ms
t|INFO|controller|l|part {int} accepted, deviation {real} um
t|INFO|controller|l|part {int} rejected, deviation {real} um
t|INFO|controller|l|program {program} loaded by {user}
t|INFO|controller|l|program {program} step {int} done
t|INFO|controller|l|feed rate set to {int} percent
t|INFO|controller|l|tool {int} changed in {ms} ms
t|INFO|controller|l|tool {int} wear {real} percent
t|INFO|controller|-|heartbeat from {node} in {ms} ms
t|INFO|controller|-|watchdog of {node} reset
t|INFO|controller|-|parameter set {hex} read by {user}
t|INFO|controller|m|parameter {int} changed from {real} to {real}
t|INFO|controller|s|axis {int} referenced in {ms} ms
t|INFO|controller|s|drive {int} enabled
t|INFO|controller|s|safety circuit {int} closed
t|INFO|controller|s|warm-up stage {int} reached at {real} degrees
t|INFO|controller|s|homing of axis {int} finished with offset {real} um
t|INFO|controller|i|drive {int} disabled
t|INFO|controller|i|standby entered by {user}
t|INFO|controller|i|energy saving level {int} active
t|INFO|controller|m|door {int} opened by {user}
t|INFO|controller|m|door {int} closed by {user}
t|INFO|controller|m|jog of axis {int} by {user}
t|INFO|controller|m|output {int} forced by {user}
t|WARNING|controller|l|cycle time {ms} ms above target {ms} ms
t|WARNING|controller|l|queue of station {int} has {int} parts
t|WARNING|controller|-|answer of {node} took {ms} ms
t|WARNING|controller|-|clock of {node} differs by {ms} ms
t|WARNING|controller|s|drive {int} not ready after {ms} ms
t|WARNING|controller|m|override of interlock {int} by {user}
t|ERROR|controller|l|part {int} lost at station {int}
t|ERROR|controller|-|checksum of block {hex} does not match
t|ERROR|controller|-|no answer of {node} within {ms} ms
t|INFO|hydraulics|l|pump {int} on, pressure {real} bar
t|INFO|hydraulics|l|pump {int} off, pressure {real} bar
t|INFO|hydraulics|l|valve {int} switched in {ms} ms
t|INFO|hydraulics|l|accumulator charged to {real} bar
t|INFO|hydraulics|-|filter difference {real} bar
t|INFO|hydraulics|-|oil level {int} mm
t|INFO|hydraulics|s|pressure built up in {ms} ms
t|WARNING|hydraulics|l|valve {int} switched late by {ms} ms
t|WARNING|hydraulics|l|pressure ripple {real} bar
t|WARNING|hydraulics|-|filter difference {real} bar near limit
t|ERROR|hydraulics|l|pump {int} did not reach {real} bar
t|INFO|vision|l|image {hex} taken in {ms} ms
t|INFO|vision|l|image {hex} judged good with score {real}
t|INFO|vision|l|image {hex} judged bad with score {real}
t|INFO|vision|s|camera {int} calibrated, error {real} px
t|WARNING|vision|l|image {hex} too dark, exposure {ms} us
t|WARNING|vision|l|frame of camera {int} dropped
t|ERROR|vision|-|camera {int} not reachable
j|INFO|maintenance|-|inspection round {int} finished by {user}
j|INFO|maintenance|-|work order {hex} opened by {user}
j|INFO|maintenance|-|work order {hex} closed by {user} after {int} min
j|INFO|maintenance|m|lubrication of point {int} done
j|INFO|maintenance|m|belt {int} tightened to {real} N
j|INFO|maintenance|m|sensor {int} replaced on {node}
j|INFO|maintenance|m|filter cartridge {int} replaced
j|INFO|maintenance|m|oil sample {hex} taken
j|INFO|maintenance|m|firmware of {node} updated to {real}
j|WARNING|maintenance|-|work order {hex} overdue by {int} h
j|WARNING|maintenance|-|spare part {int} below minimum stock
j|INFO|quality|l|sample {hex} measured, value {real}
j|INFO|quality|l|lot {hex} released by {user}
j|WARNING|quality|l|lot {hex} held by {user}
j|INFO|quality|l|control chart {int} updated
j|INFO|logistics|l|pallet {hex} left station {int}
j|INFO|logistics|l|material {hex} booked, {int} pieces
j|WARNING|logistics|l|material {hex} missing at station {int}
o|INFO|gateway|-|session {hex} opened by {user}
o|INFO|gateway|-|session {hex} closed after {ms} ms
o|INFO|gateway|-|{int} values sent to {node} in {ms} ms
o|INFO|gateway|-|buffer holds {int} values
o|INFO|gateway|-|subscription {hex} renewed
o|INFO|gateway|l|recipe {hex} requested by {node}
o|INFO|gateway|l|order {hex} started on {node}
o|INFO|gateway|l|order {hex} finished on {node} with {int} parts
o|INFO|gateway|i|polling slowed down to {ms} ms
o|INFO|gateway|s|connection to {node} up
o|WARNING|gateway|-|certificate of {node} expires in {int} days
o|WARNING|gateway|-|value of tag {int} is {int} s old
o|WARNING|gateway|-|retry {int} of message {hex}
o|WARNING|gateway|-|round trip to {node} took {ms} ms
o|ERROR|gateway|-|connection to {node} lost
o|ERROR|gateway|-|message {hex} dropped after {int} retries
o|ERROR|gateway|-|write of tag {int} refused by {node}
"""

# lines with a time of their own: role, then as above
PLANTED = """
state|t|INFO|controller|operating state changed to {state}
job begins|t|INFO|backup|backup job {int} started
job counts|t|INFO|backup|backup copied {int} files to {node}
job ends|t|INFO|backup|backup job {int} finished in {ms} ms
valve|t|INFO|service|valve service performed on {node} with part TYPE-B
valve look-alike|t|INFO|service|valve service performed on {node} with part TYPE-A
seal|j|INFO|maintenance|seal kit of {node} replaced, batch K7
seal look-alike|j|INFO|maintenance|seal kit of {node} replaced, batch K4
overheating|t|ERROR|hydraulics|valve {int} deviates by {real} percent from set point
overheating|o|ERROR|gateway|temperature alarm of {node}: {real} degrees above limit
overheating|t|ERROR|hydraulics|oil cooler {int} at full power, flow {real} l/min
warning|t|WARNING|drive|bearing noise {real} above baseline at {node}
trip|t|ERROR|drive|drive {int} tripped, code {hex}
trip|o|ERROR|gateway|vibration alarm of {node}: {real} mm/s
trip|t|ERROR|drive|emergency ramp of drive {int} took {ms} ms
"""
LETTERS = {"i": 0, "s": 1, "l": 2, "m": 3}


@dataclass(frozen=True)
class Template:
    """A text with parameters; ``frequent`` is the state in which it is written most, None = it is the same in all."""

    log: int
    level: str
    component: str
    frequent: int | None
    text: str
    role: str | None = None

    @property
    def parameters(self) -> list[str]:
        """Kinds of its parameters, in order."""
        return PARAMETER.findall(self.text)

    @property
    def pieces(self) -> list[str]:
        """What stands around the parameters; ``SLOTS`` + 1 texts."""
        pieces = PARAMETER.sub("\0", self.text).split("\0")
        return pieces + [""] * (SLOTS + 1 - len(pieces))

    @property
    def masked(self) -> str:
        """As OpenTelemetry's ``log.record.template`` has it."""
        return PARAMETER.sub(WILDCARD, self.text)


@cache
def templates() -> tuple[Template, ...]:
    """All templates; those without a role come first."""
    logs = {"t": TEXT, "j": JSON, "o": OTEL}
    background = [line.split("|") for line in BACKGROUND.strip().splitlines()]
    planted = [line.split("|") for line in PLANTED.strip().splitlines()]
    return (
        *(Template(logs[log], level, who, LETTERS.get(state), text) for log, level, who, state, text in background),
        *(Template(logs[log], level, who, None, text, role) for role, log, level, who, text in planted),
    )


@cache
def numbers_of(role: str) -> tuple[int, ...]:
    """Numbers of the templates of a role."""
    return tuple(number for number, template in enumerate(templates()) if template.role == role)
