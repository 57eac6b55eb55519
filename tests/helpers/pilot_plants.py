"""Small plants with a planted lag, or none, for the tests of the pilot."""

from __future__ import annotations

import numpy as np

from hf_sparse_attn.industry.pilot.timeline import Timeline

MINUTE = 60 * 10**9


def poisson_counts(rng, steps, rates):
    """Counts int32 [steps, K] of independent events with ``rates`` an hour of 12 steps."""
    return np.stack([rng.poisson(rate / 12, steps) for rate in rates], 1).astype(np.int32)


def sensors(rng, steps, channels, daily=2.0, memory=0.98):
    """Float64 [steps, channels]: a daily wave and autocorrelated noise of spread 1."""
    from scipy.signal import lfilter

    noise = lfilter([np.sqrt(1 - memory**2)], [1, -memory], rng.standard_normal((steps, channels)), axis=0)
    return daily * np.sin(2 * np.pi * np.arange(steps)[:, None] / 288 + np.arange(channels)) + noise


def plant(seed, *, pairs=20, lag=2000, jitter=0.03, cause="event", linked=True, days=180, kinds=20, channels=4, step=5):
    """A timeline of ``days`` at ``step`` minutes whose ``pairs`` faults follow a cause after about ``lag`` steps.

    Each cause has a look-alike event of another kind at another time and half as many further causes have no effect.
    Not ``linked``: the same numbers of causes and faults at independent times.
    """
    rng = np.random.default_rng(seed)
    steps = days * 1440 // step
    counts = poisson_counts(rng, steps, np.geomspace(0.002, 30, kinds))
    values = sensors(rng, steps, channels)
    causes = rng.integers(0, steps - int(lag * (1 + 4 * jitter)) - 100, pairs)
    lags = np.round(lag * (1 + jitter * rng.standard_normal(pairs))).astype(int)
    effects = causes + lags if linked else rng.integers(0, steps - 100, pairs)
    causes = np.concatenate([causes, rng.integers(0, steps, pairs // 2)])
    if cause == "event":
        np.add.at(counts, (causes, 3), 1)
    else:
        for at in causes:
            values[at : at + 72, 0] += 2.5
    np.add.at(counts, (rng.integers(0, steps, len(causes)), 4), 1)
    effects = np.unique(effects)
    starts = effects[np.append(True, np.diff(effects) > 12)] * step * MINUTE
    hours = np.arange(steps) * step // 60 % 24
    return Timeline(
        asset=f"press-{seed}",
        times=np.arange(steps, dtype=np.int64) * step * MINUTE,
        values=values,
        channels=tuple(f"sensor {n}" for n in range(channels)),
        counts=counts,
        templates=tuple(f"INFO event {n}" for n in range(kinds)),
        faults=np.stack([starts, starts + 12 * step * MINUTE], 1),
        states=((hours >= 6) & (hours < 22)).astype(np.int32),
        state_names=("idle", "load"),
        train_steps=int(steps * 0.6),
        test_from=int(steps * 0.6) + 1440 // step,
    )
