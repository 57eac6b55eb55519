"""A log of a plant in which the recipe that a unit is given shows in a later alarm of that unit."""

# Three tokens a line: gap, origin (a unit, or something else in the plant), template.

import math

import numpy as np

PAD, GAPS, LINE = 2, 3, 3
ALARM_GAP = PAD  # an alarm has the time stamp of the line before it


class PlantedLog:
    """Tokens and where the links are.

    Attributes:
        ids: int32 [t].
        vocabulary: how many ids there are.
        causes, effects: int64 [L], the template of each recipe and that of the alarm that it decides about.
    """

    def __init__(self, tokens, seed, units=48, recipes=16, nearest=8, farthest=3000, given=0.3):
        random = np.random.default_rng(seed)
        origin = PAD + GAPS
        recipe = origin + units + 4  # four origins write lines that say nothing
        alarm, other = recipe + recipes, recipe + 2 * recipes
        self.vocabulary = other + 4
        lines = tokens // LINE
        ids = np.empty((lines, LINE), np.int32)
        due, causes, effects = {}, [], []
        for line in range(lines):
            late = [u for u, (when, _) in due.items() if when <= line]
            idle = [u for u in range(units) if u not in due]
            gap = ALARM_GAP + 1 + int(random.integers(GAPS - 1))
            if late:
                who = late[int(random.integers(len(late)))]
                before = due.pop(who)[1]
                ids[line] = ALARM_GAP, origin + who, alarm + ids[before, 2] - recipe
                causes.append(before * LINE + 2)
                effects.append(line * LINE + 2)
            elif idle and random.random() < given:
                who = idle[int(random.integers(len(idle)))]
                lag = math.exp(random.uniform(math.log(nearest), math.log(farthest)))
                due[who] = line + max(1, round(lag / LINE)), line
                ids[line] = gap, origin + who, recipe + int(random.integers(recipes))
            else:
                who = int(random.integers(4))
                ids[line] = gap, origin + units + who, other + who
        self.ids = ids.reshape(-1)
        self.causes, self.effects = np.array(causes, np.int64), np.array(effects, np.int64)

    def rows(self, length):
        """Rows of ``length`` tokens, as `log_rows` makes them; templates alone are labels."""
        labels = np.where(np.arange(len(self.ids)) % LINE == LINE - 1, self.ids, -100)
        parts = [slice(at, at + length) for at in range(0, len(self.ids) - length + 1, length)]
        return [{"input_ids": self.ids[part], "labels": labels[part]} for part in parts]
