"""Fields -> numbers: decimal commas, groups of thousands, and what is no number."""

from __future__ import annotations

from ...system.extras import needs_extra

with needs_extra("industry", "data of plants"):
    import polars as pl


def numbers(fields: pl.Series, decimal: str) -> tuple[pl.Series, pl.Series]:
    """(value of each field, null where it holds no finite number; whether it holds something else than a number).

    An empty field is neither: nothing was written down. 1.234 between decimal commas, and 1,234 between decimal
    points, may be a thousand times as much: it is no number.

    Args:
        fields: text, or numbers as they are typed.
        decimal: the mark before the fraction, "." or ",".
    """
    name = fields.name
    if fields.dtype.is_numeric() or fields.dtype == pl.Boolean:
        values = fields.cast(pl.Float64)
        return _finite(values), (fields.is_not_null() & _finite(values).is_null()).fill_null(False)
    texts = fields.cast(pl.String)
    other = "," if decimal == "." else "."
    plain = texts if decimal == "." else texts.str.replace(",", ".", literal=True)
    if decimal == ",":
        plain = plain.zip_with(
            ~texts.str.contains(".", literal=True).fill_null(False), pl.Series([None], dtype=pl.String)
        )
    values = _finite(plain.cast(pl.Float64, strict=False))
    rest = values.is_null() & texts.is_not_null() & (texts != "")
    if rest.any():
        values = values.zip_with(~rest, _cleaned(texts, decimal, other))
        rest = values.is_null() & texts.is_not_null() & (texts.str.strip_chars() != "")
    return values.alias(name), rest.fill_null(False)


def number_of(field: str, decimal: str) -> float | None:
    """The number that one field holds."""
    value: float | None = numbers(pl.Series("field", [field], dtype=pl.String), decimal)[0][0]
    return value


def _finite(values: pl.Series) -> pl.Series:
    return values.zip_with(values.is_finite().fill_null(False), pl.Series([None], dtype=pl.Float64))


def _cleaned(texts: pl.Series, decimal: str, other: str) -> pl.Series:
    """Numbers with white space, a minus of typography, groups, or the other mark before the fraction."""
    column = pl.col("text").str.strip_chars().str.replace("\u2212", "-", literal=True)
    column = column.str.replace_all("[' \u00a0\u202f]", "")
    last_is_decimal = column.str.contains(rf"\{other}.*\{decimal}")
    grouped = column.str.contains(rf"^[+-]?\d{{1,3}}(?:\{other}\d{{3}})+(?:\{decimal}\d*)?(?:[eE][+-]?\d+)?$")
    only_other = column.str.contains(other, literal=True) & ~column.str.contains(decimal, literal=True)
    # one mark with three digits behind it can be read in two ways
    unclear = only_other & grouped
    number = (
        pl.when(unclear)
        .then(None)
        .when(grouped & last_is_decimal)
        .then(column.str.replace_all(other, "", literal=True).str.replace(decimal, ".", literal=True))
        .when(only_other & column.str.contains(rf"^[+-]?\d*\{other}\d+(?:[eE][+-]?\d+)?$"))
        .then(column.str.replace(other, ".", literal=True))
        .when(~column.str.contains(other, literal=True))
        .then(column.str.replace(decimal, ".", literal=True))
    )
    # polars reads nan and inf as numbers: `_finite` takes them out
    return _finite(texts.alias("text").to_frame().select(number.cast(pl.Float64, strict=False).alias("n"))["n"])
