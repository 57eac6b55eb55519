"""What a LongLink sequence holds: its settings, its tokens, and the links of each family."""

from __future__ import annotations

from dataclasses import dataclass

FAMILIES = ("delayed", "two_hops", "conjunction", "lag", "count", "null", "counterfactual")
PAD, MISSING, FIRST = 0, 1, 2


class LongLinkError(ValueError):
    """Settings or files of LongLink that cannot be used; the message says which, what is allowed, and what to do."""


@dataclass(frozen=True)
class LongLinkConfig:
    """Settings of a LongLink set. Lengths and distances are in tokens.

    Of every family a sequence asks ``links`` times for a value that stands far before the question:

    * delayed: key with value, later the key is asked.
    * two_hops: key with another key, that one with a value, later the first key is asked.
    * conjunction: key with a value, twice; the answer is the sum modulo the number of values.
    * lag: a level shift of one sensor; the next sensor follows after a lag that is the same in the whole sequence, give
    or take ``jitter``.
    * count: how often an event happened, modulo nothing: 0 to ``values`` − 1 times. Expected weak: no single block
    holds the answer.
    * null: as delayed, but what stands at the cause belongs to other keys and the answers are random.
    * counterfactual: as delayed, in pairs that differ in the value of one cause, and in its answer.

    Raises:
        LongLinkError: a setting is impossible.
    """

    family: str = "delayed"
    length: int = 1024
    sequences: int = 64
    links: int = 8  # that are asked for, of every sequence
    distractors: int = 4  # look-alike causes whose keys are never asked
    keys: int = 16
    values: int = 4
    background: int = 32  # kinds of tokens that mean nothing
    min_distance: int = 64  # from the first cause to the question; log-uniform up to max_distance
    max_distance: int | None = None  # None = as far as the length allows
    first: int = 64  # slots at the start without causes: where sink tokens are, which every selection keeps
    unseen: tuple[int, int] | None = None  # distances that are left out, [from, to)
    only_unseen: bool = False  # nothing but these
    strength: float = 1.0  # probability that the answer is the planted one; else it is uniform
    corruption: float = 0.0  # share of causes whose value is replaced by a uniform one
    missing: float = 0.0  # share of the tokens that are missing, questions and answers aside
    jitter: int = 0  # of the lag, tokens to either side

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            self._refuse("family", f"one of {', '.join(FAMILIES)}")
        for name, least in (
            ("length", 16),
            ("sequences", 1),
            ("links", 1),
            ("distractors", 0),
            ("values", 2),
            ("background", 1),
            ("jitter", 0),
        ):
            if getattr(self, name) < least:
                self._refuse(name, f"an integer >= {least}")
        for name in ("strength", "corruption", "missing"):
            if not 0 <= getattr(self, name) <= 1:
                self._refuse(name, "a share in [0, 1]")
        # slots behind ``first``, without the last question and its answer
        room = self.length - 2 - self.first
        if not 2 <= self.min_distance <= self.longest <= room:
            self._refuse(
                "min_distance", f">= 2 and, with max_distance ({self.longest}), up to length − 2 − first = {room}"
            )
        if self.keys < self.needed_keys:
            self._refuse("keys", f">= {self.needed_keys}: every link and distractor of a sequence has its own")
        if self.family == "count" and (self.corruption or self.missing):
            self._refuse(
                "family", "another one with corruption or missing tokens: a count has no ceiling in closed form then"
            )
        if self.family == "counterfactual" and self.sequences % 2:
            self._refuse("sequences", "even for the counterfactual family: they come in pairs")
        if self.only_unseen and self.unseen is None:
            self._refuse("only_unseen", "false, or give unseen a range of distances")
        if self.unseen is not None and not self.unseen[0] < self.unseen[1]:
            self._refuse("unseen", "a range [from, to) of distances")

    def _refuse(self, name: str, allowed: str) -> None:
        raise LongLinkError(f"LongLink's {name} is {getattr(self, name)!r}: must be {allowed}")

    @property
    def longest(self) -> int:
        """The longest distance."""
        return self.length - 2 - self.first if self.max_distance is None else self.max_distance

    @property
    def needed_keys(self) -> int:
        """Keys of a sequence that must differ: two hops and null use a second one for each link."""
        return self.links * (2 if self.family in ("two_hops", "null") else 1) + self.distractors

    @property
    def tokens(self) -> Tokens:
        return Tokens(self.keys, self.values, self.background)


@dataclass(frozen=True)
class Tokens:
    """Ids of the tokens; each names one event with its parameters."""

    keys: int
    values: int
    background: int

    # ids in a row: pad, missing, background, causes, second values, hops, events, questions, answers
    def cause(self, key: int, value: int) -> int:
        """A key gets a value; a sensor shifts by one."""
        return FIRST + self.background + key * self.values + value

    def second(self, key: int, value: int) -> int:
        """The other value of a conjunction."""
        return self.cause(self.keys, 0) + key * self.values + value

    def hop(self, key: int, other: int) -> int:
        """A key refers to another."""
        return self.second(self.keys, 0) + key * self.keys + other

    def event(self, key: int) -> int:
        """Something happens that is counted."""
        return self.hop(self.keys, 0) + key

    def ask(self, key: int) -> int:
        """The value of a key is asked; its answer is the next token."""
        return self.event(self.keys) + key

    def value(self, value: int) -> int:
        """An answer."""
        return self.ask(self.keys) + value

    @property
    def count(self) -> int:
        """Size of the vocabulary."""
        return self.value(self.values)
