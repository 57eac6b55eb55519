"""Making LongLink sequences: bit-identical for the same settings and seed, whatever the number of sequences."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ...config import IGNORE_INDEX
from .families import FIRST, MISSING, LongLinkConfig, LongLinkError

TRIES = 200  # of placing a link


@dataclass(frozen=True)
class Link:
    """A planted link: slots of its ``causes`` and of the question (``effect``, whose answer is the next token), and
    what was planted.
    """

    sequence: int
    family: str
    causes: tuple[int, ...]
    effect: int
    distance: int  # from the first cause to the question
    key: int
    value: int  # what the causes say, before any is replaced
    answer: int  # what stands behind the question


@dataclass(frozen=True)
class Planted:
    """Sequences: ``input_ids`` and ``labels`` int64 [sequences, length] (−100 but for the answers), and their links."""

    config: LongLinkConfig
    seed: int
    input_ids: np.ndarray
    labels: np.ndarray
    links: tuple[Link, ...]


def plant(config: LongLinkConfig, seed: int) -> Planted:
    """All sequences of a set.

    Raises:
        LongLinkError: the links do not fit into the length.
    """
    sequences = [_Sequence(config, seed, index) for index in range(config.sequences)]
    ids, labels = (np.stack([getattr(one, name) for one in sequences]) for name in ("ids", "labels"))
    return Planted(config, seed, ids, labels, tuple(link for one in sequences for link in one.links))


class _Sequence:
    """One sequence while it is made."""

    def __init__(self, config: LongLinkConfig, seed: int, index: int) -> None:
        paired = config.family == "counterfactual"
        self.config, self.index = config, index
        # both sequences of a pair draw the same numbers
        self.rng = np.random.default_rng([seed, index // 2 if paired else index])
        self.shift = index % 2 if paired else 0  # of the first link's value
        self.ids = self.rng.integers(FIRST, FIRST + config.background, config.length)
        self.lost = self.rng.random(config.length) < config.missing
        self.labels = np.full(config.length, IGNORE_INDEX, dtype=np.int64)
        self.free = np.arange(config.length) >= config.first
        self.links: list[Link] = []
        # in this order: keys that are asked, keys that they refer to (two hops, null), those of distractors
        keys = self.rng.permutation(config.keys).tolist()
        lag = self._distance(half=True)
        for at in range(config.links):
            self._plant(keys, at, lag)
        for key in keys[config.needed_keys - config.distractors : config.needed_keys]:
            self._distract(key)
        # questions and answers are never lost
        self.ids[
            self.lost
            & (self.labels == IGNORE_INDEX)
            & ~np.isin(np.arange(config.length), [link.effect for link in self.links])
        ] = MISSING

    def _distance(self, half: bool = False) -> int:
        """A distance; at most ``half`` of the longest where all links of a sequence must find room at the same one."""
        config = self.config
        longest = max(config.longest // 2, config.min_distance) if half else config.longest
        for _ in range(TRIES):
            # log-uniform: every doubling of the distance is as likely as any other
            low, high = math.log(config.min_distance), math.log(longest + 1)
            distance = int(math.exp(self.rng.uniform(low, high)))
            unseen = config.unseen is not None and config.unseen[0] <= distance < config.unseen[1]
            if unseen == config.only_unseen:
                return min(distance, longest)
        raise LongLinkError(
            f"LongLink's unseen distances {config.unseen} leave hardly one between {config.min_distance} and "
            f"{config.longest}"
        )

    def _plant(self, keys: list[int], at: int, lag: int) -> None:
        config, rng = self.config, self.rng
        key, value = keys[at], int(rng.integers(config.values))
        other = keys[config.links + at] if config.family in ("two_hops", "null") else key
        if at == 0:
            value = (value + self.shift) % config.values
        causes, effect = self._place(self._causes_needed(value), lag)
        self._write(causes, key, other, value)
        holds = config.family != "null" and rng.random() < config.strength
        # drawn in any case, so that another strength changes nothing else of a sequence
        answer, random = value, int(rng.integers(config.values))
        if not holds:
            answer = random
        # the next sensor follows the one that shifted
        queried_key = (key + 1) % config.keys if config.family == "lag" else key
        self.ids[effect], self.ids[effect + 1] = config.tokens.ask(queried_key), config.tokens.value(answer)
        self.labels[effect + 1] = self.ids[effect + 1]
        self.links.append(
            Link(self.index, config.family, causes, effect, effect - causes[0], queried_key, value, answer)
        )

    def _causes_needed(self, value: int) -> int:
        if self.config.family == "count":
            # a count of 0 has a slot, too, in which nothing is written
            return max(value, 1)
        return 2 if self.config.family in ("two_hops", "conjunction") else 1

    def _place(self, count: int, lag: int) -> tuple[tuple[int, ...], int]:
        """Free slots of ``count`` causes, rising, and of the question; the slot behind it is free, too.
        All are taken.
        """
        config, rng = self.config, self.rng
        for _ in range(TRIES):
            wanted = (
                lag + int(rng.integers(-config.jitter, config.jitter + 1))
                if config.family == "lag"
                else self._distance()
            )
            # jitter may lead out of the sequence
            distance = min(max(wanted, 1), config.length - 2 - config.first)
            effect = int(rng.integers(config.first + distance, config.length - 1))
            # the first cause at that distance, the others between it and the question
            gaps = (
                [distance, *rng.choice(np.arange(1, distance), count - 1, replace=False).tolist()]
                if count <= distance
                else []
            )
            slots = sorted(effect - gap for gap in gaps)
            if len(slots) == count and self.free[[*slots, effect, effect + 1]].all():
                self.free[[*slots, effect, effect + 1]] = False
                return tuple(slots), effect
        raise LongLinkError(
            f"{config.links} links do not fit into {config.length} tokens at distances from {config.min_distance} to "
            f"{config.longest}: "
            "ask for fewer links, or for longer sequences"
        )

    def _write(self, causes: tuple[int, ...], key: int, other: int, value: int) -> None:
        config, tokens, family = self.config, self.config.tokens, self.config.family
        if family == "count":
            self.ids[list(causes)] = tokens.event(key) if value else self.ids[list(causes)]
        elif family == "two_hops":
            order = self.rng.permutation(2)  # either may come first
            self.ids[causes[order[0]]] = tokens.hop(key, other)
            self.ids[causes[order[1]]] = tokens.cause(other, self._seen(value))
        elif family == "conjunction":
            # two values whose sum modulo ``values`` is the answer
            first = int(self.rng.integers(config.values))
            self.ids[causes[0]] = tokens.cause(key, self._seen(first))
            self.ids[causes[1]] = tokens.second(key, self._seen((value - first) % config.values))
        else:
            self.ids[causes[0]] = tokens.cause(other if family == "null" else key, self._seen(value))

    def _seen(self, value: int) -> int:
        # both drawn in any case, so that another share changes nothing else of a sequence
        replaced, random = self.rng.random() < self.config.corruption, int(self.rng.integers(self.config.values))
        return random if replaced else value

    def _distract(self, key: int) -> None:
        slots = self.free.nonzero()[0]
        if not len(slots):
            raise LongLinkError(
                f"{self.config.distractors} distractors do not fit into {self.config.length} tokens: ask for fewer"
            )
        at = int(self.rng.choice(slots))
        self.free[at] = False
        tokens, value = self.config.tokens, int(self.rng.integers(self.config.values))
        self.ids[at] = tokens.event(key) if self.config.family == "count" else tokens.cause(key, value)
