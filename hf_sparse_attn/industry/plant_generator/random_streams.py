"""Independent random numbers for every part of a plant, by name."""

from __future__ import annotations

import hashlib

import numpy as np


def stream(seed: int, *names: object) -> np.random.Generator:
    """The generator of one part; the same seed and names give the same numbers on every machine.

    Parts that are drawn chunk by chunk have a stream each and draw nothing else from it: then the size of a chunk does
    not matter.
    """
    key = hashlib.sha256("/".join(map(str, names)).encode()).digest()
    words = tuple(int.from_bytes(key[at : at + 4], "little") for at in range(0, 16, 4))
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=words)))
