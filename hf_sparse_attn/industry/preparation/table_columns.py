"""What the columns of a table hold, told from their names and from a sample of their values."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ...system.extras import needs_extra
from ..errors import PlantDataError
from .ingest_settings import Form, IngestSettings
from .numeric_stamps import split_numbers, units_of
from .stamp_shapes import shape_of

with needs_extra("industry", "data of plants"):
    import polars as pl

LOOKED_AT = 40  # values of a column
MOST = 0.8  # share of them that tell what a column holds
NUMBER = re.compile(r"[+-]?(?:\d{1,3}(?:[., ']\d{3})+(?:[.,]\d+)?|\d+(?:[.,]\d*)?|[.,]\d+)(?:[eE][+-]?\d+)?")
NAMES = {  # role: words of a name that tell it
    "time": "time timestamp datetime date ts epoch zeit datum uhrzeit zeitstempel 日時 時刻 日付 時間",
    "channel": "tag tagname tagid channel sensor sensorid sensorname point pointname pointid variable parameter signal "
    "item metric measurement attribute messstelle kanal タグ タグ名 チャンネル 信号 信号名 項目 項目名 センサ センサー",
    "value": "value val reading wert messwert 値 測定値 計測値",
    "unit": "unit units uom eu einheit 単位",
    "quality": "quality status qual confidence questionable substituted annotated 品質 ステータス",
    "asset": "asset machine equipment device turbine plant engine pump anlage maschine 機器 設備 装置 号機 機械",
    "text": "message msg text description event log body content メッセージ 内容 説明 イベント",
    "level": "level severity priority loglevel severitytext レベル 重要度",
    "origin": "source origin component logger node host hostname service module facility 発生元",
}
WORDS = {role: frozenset(words.split()) for role, words in NAMES.items()}
WAYS = [
    "name the column of the time: --column time=NAME (two of them: time=DATE+CLOCK)",
    "name the form: --form csv-wide, csv-long or csv-events",
    "leave the file out",
]


@dataclass(frozen=True)
class Columns:
    """Columns of a table by what they hold, as numbers from 0."""

    form: Form
    time: tuple[int, ...]  # one, or a date and a time of day
    values: tuple[int, ...] = ()  # of a wide table
    roles: Mapping[str, int] = field(default_factory=dict)  # of a long table and of events; "asset" of any
    has_numbers: bool = True  # whether any of the values looks like a number


def words_of(name: str) -> set[str]:
    """The words of a name, in lower case: ``WindTurbine_name`` has wind, turbine and name."""
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    words = re.findall(r"[^\W\d_]+", apart.lower())
    return {*words, "".join(words)}


def kind_of(values: Sequence[str]) -> str:
    """What most values of a column are: stamp, date, clock, epoch, number, text, or empty."""
    held = [value.strip() for value in values if value.strip()][:LOOKED_AT]
    if not held:
        return "empty"
    shapes = [None if NUMBER.fullmatch(text) else shape_of(text) for text in held]
    full = sum(shape is not None and shape.has_date and shape.has_clock for shape in shapes)
    dates = sum(shape is not None and shape.has_date and not shape.has_clock for shape in shapes)
    clocks = sum(shape is not None and not shape.has_date for shape in shapes)
    numbers = sum(NUMBER.fullmatch(text) is not None for text in held)
    if full + dates >= MOST * len(held):
        return "stamp" if full >= dates else "date"
    if clocks >= MOST * len(held):
        return "clock"
    if numbers >= MOST * len(held):
        units = units_of(split_numbers(pl.Series("text", held))["whole"])
        return "epoch" if len(units) - units.null_count() >= MOST * len(held) else "number"
    return "text"


def columns_of(
    names: Sequence[str], samples: Sequence[Sequence[str]], settings: IngestSettings, file: str, prefix: str = "csv"
) -> Columns | None:
    """What the columns hold; None if the table has no time.

    Args:
        names: of the columns.
        samples: some values of each.
        settings: what the user says of them.
        file: named in errors.
        prefix: of the form: csv or parquet.

    Raises:
        PlantDataError: a column that is named is not there, several may be the time, or the form is unclear.
    """
    kinds = [kind_of(values) for values in samples]
    time = _time(names, kinds, settings, file)
    if not time:
        return None
    roles = _roles(names, kinds, set(time), settings, file)
    form = _form(prefix, names, samples, kinds, time, roles, settings)
    if form.endswith("wide"):
        other = {*time, *({roles["asset"]} if "asset" in roles else ())}
        values = tuple(
            at for at in range(len(names)) if at not in other and (kinds[at] != "empty" or names[at].strip())
        )
        has_numbers = any(kinds[at] in ("number", "epoch") for at in values)
        return Columns(form, time, values, {role: at for role, at in roles.items() if role == "asset"}, has_numbers)
    return Columns(form, time, (), _complete(form, names, samples, kinds, time, roles, file))


def column_named(name: str, names: Sequence[str], file: str) -> int:
    """Number of a column that the user names, by name or by number from 1. Raises PlantDataError."""
    plain = [each.strip() for each in names]
    if name in plain:
        return plain.index(name)
    if name.isdigit() and 1 <= int(name) <= len(names):
        return int(name) - 1
    raise PlantDataError(
        f"has no column {name!r}",
        [
            f"name one of {', '.join(repr(each) for each in plain[:20])}",
            f"give a number from 1 to {len(names)}",
            "leave the option out",
        ],
        file=file,
    )


def _time(names: Sequence[str], kinds: Sequence[str], settings: IngestSettings, file: str) -> tuple[int, ...]:
    if named := settings.columns.get("time"):
        if named in (name.strip() for name in names) or "+" not in named:
            return (column_named(named, names, file),)
        return tuple(column_named(part, names, file) for part in named.split("+"))
    called = [bool(words_of(name) & WORDS["time"]) for name in names]
    stamps = [at for at, kind in enumerate(kinds) if kind == "stamp"]
    if len(stamps) > 1:
        exact = [at for at in stamps if "".join(sorted(words_of(names[at]), key=len)[-1:]) in WORDS["time"]]
        if len(exact) != 1:
            raise PlantDataError(
                f"has several columns of time stamps: {', '.join(names[at] for at in stamps[:5])}", WAYS, file=file
            )
        return (exact[0],)
    if stamps:
        return (stamps[0],)
    dates = [at for at, kind in enumerate(kinds) if kind == "date"]
    clocks = [at for at, kind in enumerate(kinds) if kind == "clock"]
    if dates:
        return (dates[0], clocks[0]) if len(clocks) == 1 else (dates[0],)
    epochs = [at for at, kind in enumerate(kinds) if kind == "epoch"]
    # what is called a time, or stands first without a name: other numbers may look like days or seconds
    likely = [at for at in epochs if called[at]] or [at for at in epochs[:1] if at == 0 and not names[0].strip()]
    # 20240131 and a time of day
    return (likely[0], *(clocks if len(clocks) == 1 else ())) if likely else ()


def _roles(
    names: Sequence[str], kinds: Sequence[str], time: set[int], settings: IngestSettings, file: str
) -> dict[str, int]:
    roles: dict[str, int] = {}
    for role in ("value", "unit", "quality", "channel", "asset", "text", "level", "origin"):
        if named := settings.columns.get(role):
            roles[role] = column_named(named, names, file)
    if settings.asset_column:
        roles["asset"] = column_named(settings.asset_column, names, file)
    for role, words in WORDS.items():
        if role in roles or role == "time":
            continue
        free = [at for at in range(len(names)) if at not in time and at not in roles.values()]
        fitting = [at for at in free if words_of(names[at]) & words and _may_hold(role, kinds[at])]
        if fitting:
            roles[role] = fitting[0]
    return roles


def _may_hold(role: str, kind: str) -> bool:
    return kind in ("number", "epoch", "text", "empty") if role in ("value", "channel", "quality") else kind == "text"


def _form(
    prefix: str,
    names: Sequence[str],
    samples: Sequence[Sequence[str]],
    kinds: Sequence[str],
    time: tuple[int, ...],
    roles: Mapping[str, int],
    settings: IngestSettings,
) -> Form:
    if settings.form is not None and settings.form.startswith(prefix):
        return settings.form
    rest = [at for at in range(len(names)) if at not in time]
    numbers = [at for at in rest if kinds[at] in ("number", "epoch")]
    texts = [at for at in rest if kinds[at] == "text"]
    if "value" in roles and ("channel" in roles or texts):
        tags = roles.get("channel", next((at for at in texts if at not in roles.values()), None))
        if tags is not None and len([at for at in numbers if at not in (tags, *roles.values())]) == 0:
            return f"{prefix}-long"  # type: ignore[return-value]
    # one number beside a text that repeats: a tag, if the table has no names or times repeat, too; else a state
    repeats = [at for at in texts if len({*samples[at]}) < 0.5 * len(samples[at])]
    clock = samples[time[-1]]
    tagged = names[0] == "column 1" or len({*clock}) < 0.9 * len(clock)
    if len(numbers) == 1 and repeats and tagged and "asset" not in roles and len(rest) <= 4:
        return f"{prefix}-long"  # type: ignore[return-value]
    if "text" in roles and not numbers:
        return f"{prefix}-events"  # type: ignore[return-value]
    return f"{prefix}-wide"  # type: ignore[return-value]


def _complete(
    form: Form,
    names: Sequence[str],
    samples: Sequence[Sequence[str]],
    kinds: Sequence[str],
    time: tuple[int, ...],
    roles: Mapping[str, int],
    file: str,
) -> dict[str, int]:
    """The roles with those that a form cannot do without."""
    complete = dict(roles)
    needed = ("channel", "value") if form.endswith("long") else ("text",)
    for role in needed:
        free = [at for at in range(len(names)) if at not in time and at not in complete.values()]
        wanted = ("number", "epoch") if role == "value" else ("text",)
        fitting = [at for at in free if kinds[at] in wanted]
        fitting.sort(key=lambda at: -len({*samples[at]}) if role == "channel" else 0)
        if role not in complete and not fitting:
            raise PlantDataError(
                f"is read as {form}, and no column can be its {role}: there are {', '.join(names[:20])}",
                [f"name it: --column {role}=NAME", *WAYS[1:]],
                file=file,
            )
        complete.setdefault(role, fitting[0] if fitting else -1)
    return complete
