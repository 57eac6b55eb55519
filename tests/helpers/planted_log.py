"""A log of a plant in which a recipe that a unit is given shows in an alarm of that unit, tokens later."""

# Four tokens a line: gap, origin (the unit), template, parameter.

import math

import numpy as np

PAD, GAPS, LINE = 2, 4, 4


class PlantedLog:
    """Tokens and where the links are.

    Attributes:
        ids: int32 [t].
        vocabulary: how many ids there are.
        causes, effects: int64 [L], the parameter token of each recipe and of the alarm that repeats it.
    """

    def __init__(self, tokens, seed, units=48, recipes=16, nearest=8, farthest=3000, alarms=0.25):
        random = np.random.default_rng(seed)
        unit, template = PAD + GAPS, PAD + GAPS + units
        parameter = template + 6  # two templates of links, four of others
        self.vocabulary = parameter + recipes
        lines = tokens // LINE
        ids = np.empty((lines, LINE), np.int32)
        due, given, causes, effects = {}, {}, [], []
        for line in range(lines):
            late = [u for u, when in due.items() if when <= line]
            idle = [u for u in range(units) if u not in due]
            if late:
                who = late[int(random.integers(len(late)))]
                before = given.pop(who)
                what, value = 1, ids[before, 3]
                causes.append(before * LINE + 3)
                effects.append(line * LINE + 3)
                del due[who]
            elif idle and random.random() < alarms:
                who = idle[int(random.integers(len(idle)))]
                what, value = 0, parameter + int(random.integers(recipes))
                lag = math.exp(random.uniform(math.log(nearest), math.log(farthest)))
                given[who], due[who] = line, line + max(1, round(lag / LINE))
            else:
                who, what = int(random.integers(units)), 2 + int(random.integers(4))
                value = parameter + what
            ids[line] = PAD + int(random.integers(GAPS)), unit + who, template + what, value
        self.ids = ids.reshape(-1)
        self.causes, self.effects = np.array(causes, np.int64), np.array(effects, np.int64)

    def rows(self, length):
        """Rows of ``length`` tokens, as `log_rows` makes them; the parameters alone are labels, as nothing tells gaps
        and units here.
        """
        labels = np.where(np.arange(len(self.ids)) % LINE == LINE - 1, self.ids, -100)
        parts = [slice(at, at + length) for at in range(0, len(self.ids) - length + 1, length)]
        return [{"input_ids": self.ids[part], "labels": labels[part]} for part in parts]
