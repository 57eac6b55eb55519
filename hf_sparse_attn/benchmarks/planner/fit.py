"""Whether a training fits a device, and the longest rows that do."""

from __future__ import annotations

from typing import Any

from .devices import Device
from .plan import TrainingPlan, plan_training

GRAIN, TRIES = 256, 12  # tokens of a step, and plans, in the search for the longest rows
LONGEST = 1 << 21  # tokens: no longer rows are looked for


SLACK = 512 * 1024**2  # bytes on a CPU that must stay free for the process itself


class NotEnoughMemoryError(RuntimeError):
    """A training step that needs more memory than the device has."""


def longest_length(device: Device, most: int = LONGEST, **options: Any) -> int:
    """The longest rows that fit, to a thirty-second, in multiples of 256 tokens up to ``most``; 0 if none do.

    Memory is nearly a straight line in the length, or grows with its square: the next length that is planned is where
    the line through two plans meets what the device has, in turn with the geometric mean of one that fits and one that
    does not.

    ``options`` are those of `plan_training`.
    """
    have = room(device)
    # two lengths, for the first line
    needs = {n: plan_training(device=device, length=n, **options).total_bytes for n in (GRAIN, 16 * GRAIN)}
    for attempt in range(TRIES):
        # the longest that fits, and the shortest that does not; 0 where there is none yet
        low, high = (
            max((n for n, need in needs.items() if need <= have), default=0),
            min((n for n in needs if needs[n] > have), default=0),
        )
        if low >= most or high == GRAIN or (high and high - low <= max(GRAIN, low // 32)):
            break
        # while all fit: through the two longest
        a, b = (low, high) if high else sorted(needs)[-2:]
        guess = a + (have - needs[a]) * (b - a) // (needs[b] - needs[a])
        if high and attempt % 2:
            guess = int((low * high) ** 0.5)
        # a multiple of the grain that was not planned yet, so that the search ends
        guess = max(guess // GRAIN * GRAIN, low + GRAIN)
        guess = min(guess, high - GRAIN if high else most)
        needs[guess] = plan_training(device=device, length=guess, **options).total_bytes
    return max((min(n, most) for n, need in needs.items() if need <= have), default=0)


def room(device: Device) -> int:
    """Bytes that a training step may take."""
    return device.memory_bytes - (SLACK if device.name == "cpu" else 0)


def fits(plan: TrainingPlan, device: Device) -> bool:
    return plan.total_bytes <= room(device)


def check_memory(plan: TrainingPlan, device: Device) -> None:
    """Raise NotEnoughMemoryError, with the way out, if the step of ``plan`` needs more than ``device`` has."""
    if fits(plan, device):
        return
    fixes = ["shorter rows"]
    if plan.batch > 1:
        fixes.append("a smaller batch with accumulation")
    if not plan.settings["gradient_checkpointing"]:
        fixes.append("gradient_checkpointing: true")
    if not plan.settings["chunked_loss"]:
        fixes.append("chunked_loss: true")
    have = room(device)
    raise NotEnoughMemoryError(
        f"a {plan.attention} step on {plan.batch} × {plan.length} tokens needs {plan.total_bytes / 1e9:.1f} GB, "
        f"{device.name} has "
        f"{have / 1e9:.1f} GB: {(plan.total_bytes - have) / 1e9:.1f} GB are missing. Use {', '.join(fixes)}, or a "
        "larger device"
    )
