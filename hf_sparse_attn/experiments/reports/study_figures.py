"""Plots of studies: ablation, planted links, robustness, calibration."""

from __future__ import annotations

from typing import Any

import numpy as np

from .figures import COLOURS, OTHER, Rows, figure, legend


def ablation_plot(table: Rows) -> str:
    """What every level changes: KL from dense above the default's with its interval, and time over the default's."""
    rows = [row for row in table if not row["default"]]
    # the first level stands at the top
    place = [len(rows) - 1 - at for at in range(len(rows))]
    colours = {"better": "#0b6e4f", "worse": "#b03060", "no difference shown": OTHER}

    def draw(quality: Any, time: Any) -> None:
        for at, row in zip(place, rows, strict=True):
            above = row["kl_above"]
            quality.plot([above["low"], above["high"]], [at, at], color=colours[row["verdict"]], lw=2)
            quality.plot(above["mean"], at, "o", ms=4, color=colours[row["verdict"]])
            if "over_default" in row:
                time.plot([row["over_default"]["min"], row["over_default"]["max"]], [at, at], color=OTHER, lw=2)
                time.plot(row["over_default"]["median"], at, "o", ms=4, color="#444444")
        for axis, zero, label in (
            (quality, 0, "KL above the default's (nats a token)"),
            (time, 1, "time, over the default's"),
        ):
            axis.axvline(zero, color="#444444", lw=0.8)
            axis.set_xlabel(label)
            axis.set_ylim(-0.7, len(rows) - 0.3)  # a row without a time must not shift the others
        quality.set_xscale("symlog", linthresh=0.01)
        quality.xaxis.set_major_formatter("{x:g}")
        quality.set_yticks(place, [f"{row['factor']}: {row['level']}" for row in rows])
        time.set_yticks(place, [])

    return figure(draw, width=11, height=1 + 0.26 * len(rows), columns=2)


def answer_plot(answers: Rows) -> str:
    """Log-loss of answers above dense attention's with its interval, by selection, a mark for each task."""
    sparse = [row for row in answers if row["keys"] is not None]
    names = list(dict.fromkeys((row["selection"], row["keys"], row["length"]) for row in sparse))
    tasks = list(dict.fromkeys(row["task"] for row in sparse))
    # budgets and lengths are named where there are several
    several = [len({row[key] for row in sparse}) > 1 for key in ("keys", "length")]
    labels = [name + f", {keys} keys" * several[0] + f" of {length}" * several[1] for name, keys, length in names]

    def draw(axis: Any) -> None:
        for at, task in enumerate(tasks):
            rows = [row for row in sparse if row["task"] == task]
            # the first selection stands at the top, the tasks of one close together
            y = [-names.index((r["selection"], r["keys"], r["length"])) - 0.5 * at / len(tasks) for r in rows]
            above = [row["loss_above_dense"] for row in rows]
            line = axis.plot([a["mean"] for a in above], y, "os^Dv<>"[at % 7], ms=4, label=task)[0]
            axis.hlines(y, [a["low"] for a in above], [a["high"] for a in above], color=line.get_color(), lw=1.5)
        axis.axvline(0, color="#444444", lw=0.8)
        axis.set_xscale("symlog", linthresh=0.1)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_xlabel("log-loss of the answer above dense attention's (nats a token)")
        axis.set_yticks([-at - 0.2 for at in range(len(names))], labels)
        legend(axis, 4)

    return figure(draw, height=1.4 + (0.25 + 0.1 * len(tasks)) * len(names))


def distance_plot(answers: Rows) -> str:
    """Normalised accuracy of a LongLink study against the distance of the links, by selection."""

    def draw(axis: Any) -> None:
        for row in answers:
            octaves = [octave for octave in row["by_distance"] if octave["normalised"] is not None]
            # the geometric middle of an octave
            x = [(octave["from"] * octave["to"]) ** 0.5 for octave in octaves]
            style = (
                {"color": "#111111", "ls": "--"}
                if row["selection"] == "dense"
                else {"color": COLOURS.get(row["selection"], OTHER)}
            )
            axis.plot(
                x, [octave["normalised"] for octave in octaves], marker="o", ms=3, label=row["selection"], **style
            )
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_xlabel("distance (tokens)")
        axis.set_ylabel("accuracy, 0 = chance,\n1 = ceiling")
        legend(axis)

    return figure(draw)


def noise_plot(noise: Rows) -> str:
    """Accuracy of a LongLink study along each kind of noise, dense and sparse, under its ceiling."""
    kinds = list(dict.fromkeys(row["noise"] for row in noise))

    def draw(*axes: Any) -> None:
        for axis, kind in zip(axes, kinds, strict=True):
            rows = [row for row in noise if row["noise"] == kind]
            levels = [row["level"] for row in rows]
            axis.plot(levels, [row["ceiling"] for row in rows], color=OTHER, ls=":", label="ceiling")
            for name, style in (
                ("dense", {"color": "#111111", "ls": "--"}),
                ("two stages", {"color": COLOURS["two stages"]}),
            ):
                axis.plot(
                    levels, [row["answers"][name]["accuracy"] for row in rows], marker="o", ms=3, label=name, **style
                )
            axis.plot(
                levels, [row["routing"]["recall"] for row in rows], color="#b03060", marker="x", ms=4, label="recall"
            )
            axis.set_xlabel(kind)
            axis.set_ylim(0, 1.05)
        legend(axes[0])

    return figure(draw, width=2.6 * len(kinds) + 1, columns=len(kinds))


def share_plot(rows: Rows) -> str:
    """How far the KL comes from window + sink to the oracle, against the length, by selection."""
    names = [
        name for name in dict.fromkeys(row["selection"] for row in rows) if name not in ("oracle", "window + sink")
    ]

    def draw(axis: Any) -> None:
        for name in names:
            style = sorted((row for row in rows if row["selection"] == name), key=lambda row: row["length"])
            x, mean = [row["length"] for row in style], [row["share"]["share"] for row in style]
            spread = [
                [m - row["share"]["low"] for m, row in zip(mean, style, strict=True)],
                [row["share"]["high"] - row["share"]["share"] for row in style],
            ]
            # errorbar refuses lengths below 0, which rounding may give
            axis.errorbar(
                x, mean, np.maximum(spread, 0), marker="o", ms=3, capsize=2, label=name, color=COLOURS.get(name)
            )
        axis.set_xscale("log", base=2)
        axis.set_xticks(
            sorted({row["length"] for row in rows}), [str(length) for length in sorted({row["length"] for row in rows})]
        )
        axis.axhline(1, color=OTHER, lw=0.8)
        axis.set_xlabel("tokens")
        axis.set_ylabel("share of the KL, 1 = oracle")
        legend(axis, columns=2)

    return figure(draw)


def budget_plot(calibration: dict[str, Any]) -> str:
    """Shares of the keys (or keys) that a calibration lets every layer and KV head keep, one panel for each length
    bucket.
    """
    in_keys = calibration["mass"] is None
    # a scale of keys ends at the largest budget, one of shares at 1
    most = max(share for rows in calibration["shares"].values() for row in rows for share in row) if in_keys else 1
    ends = calibration["ends"]
    layers = [int(layer) for layer in calibration["shares"]]

    def draw(*axes: Any) -> None:
        for at, axis in enumerate(axes):
            values = np.array([rows[at] for rows in calibration["shares"].values()])
            image = axis.imshow(values.T, vmin=0, vmax=most, aspect="auto", cmap="magma_r")
            axis.set_title(f"up to {ends[at]} keys")
            ticks = range(0, len(layers), max(1, len(layers) // 6))
            axis.set_xticks(list(ticks), [str(layers[tick]) for tick in ticks])
            axis.set_yticks(range(values.shape[1]))
            axis.set_xlabel("layer")
        axes[0].set_ylabel("KV head")
        axes[-1].figure.colorbar(image, ax=axes[-1], label="keys" if in_keys else "share of the keys")

    return figure(draw, width=max(4.5, 2.2 * len(ends) + 1), height=2.6, columns=len(ends))
