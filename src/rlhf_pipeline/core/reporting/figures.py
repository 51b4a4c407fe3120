"""The report's figures, as SVG that stands in a page: small, one thought each, text kept as text.

Widths are those of a phone's column. Reward models keep one colour and one marker throughout (blue and gold, then
others that colour-blind people tell apart); policies over which a quantity runs go from light to dark.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Floats = npt.NDArray[np.float64]
Row = Mapping[str, Any]

COLORS = ("#1f6fb2", "#c98500", "#7a4fa3", "#3f8f6b", "#b3446c")
MARKERS = ("o", "s", "^", "D", "v")
INK, QUIET, GRID, START = "#26241f", "#6d6a62", "#e6e2d8", "#8d8a83"
WIDTH, HEIGHT = 350, 245
"""Points, which are the CSS pixels of the SVG's own size."""
STYLE = {
    "svg.fonttype": "none",
    "font.size": 11,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": QUIET,
    "axes.labelcolor": QUIET,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "text.color": INK,
    "lines.linewidth": 2,
    "lines.markersize": 6,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


def color_of(models: Sequence[str], name: str) -> str:
    return COLORS[list(models).index(name) % len(COLORS)]


def marker_of(models: Sequence[str], name: str) -> str:
    return MARKERS[list(models).index(name) % len(MARKERS)]


def shades(count: int) -> list[str]:
    """`count` blues from light to dark."""
    from matplotlib.colors import LinearSegmentedColormap, to_hex

    scale = LinearSegmentedColormap.from_list("shades", ["#9dc3e6", "#1f6fb2", "#0b2f52"])
    return [to_hex(scale(k / max(1, count - 1))) for k in range(count)] if count > 1 else [COLORS[0]]


# Making SVG


def draw(paint: Any, *, alt: str, height: int = HEIGHT) -> str:
    """What `paint(axes)` draws on empty axes, as an <svg> element whose `alt` says in words what is to be seen."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with mpl.rc_context({**STYLE, "svg.hashsalt": alt}):
        figure = Figure(figsize=(WIDTH / 72, height / 72), layout="constrained")
        FigureCanvasSVG(figure)
        paint(figure.add_subplot())
        return to_svg(figure, alt)


def to_svg(figure: Figure, alt: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", text)  # names of groups: many figures stand in one page
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    return text.replace("<svg ", f'<svg role="img" aria-label="{html.escape(alt, quote=True)}" ', 1)


def label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Write (x, y, text, color) beside the ends of lines, moved apart where they would touch."""
    low, high = axes.get_ylim()
    gap = 0.085 * (high - low)
    places: list[float] = []
    for _, y, text, color in sorted(ends, key=lambda end: end[1]):
        place = max(y, places[-1] + gap) if places else y
        places.append(place)
        axes.annotate(
            text,
            (max(end[0] for end in ends), place),
            xytext=(9, 0),
            textcoords="offset points",
            color=color,
            fontweight="bold",
            va="center",
            annotation_clip=False,
        )


def reach(mean: Floats, low: Floats, high: Floats) -> Floats:
    """(2, n): how far bars go below and above; a percentile interval need not hold its estimate."""
    return np.maximum(np.stack([mean - low, high - mean]), 0)


def whole_numbers(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))


# Rewards


def gains(rows: Sequence[Row], models: Sequence[str], unit: Mapping[str, float], ylabel: str) -> str:
    """Each reward model's gain over the start, by iteration, with its 95 % interval as a band. Rows have iterations."""

    def paint(axes: Axes) -> None:
        xs = [row["iteration"] for row in rows]
        ends = []
        for name in models:
            color = color_of(models, name)
            items = [row[f"gain_{name}"] or {"mean": 0.0, "low": 0.0, "high": 0.0} for row in rows]
            mean, low, high = (np.array([item[key] for item in items]) / unit[name] for key in ("mean", "low", "high"))
            axes.fill_between(xs, low, high, color=color, alpha=0.16, linewidth=0)
            axes.plot(xs, mean, color=color, marker=marker_of(models, name))
            ends.append((xs[-1], mean[-1], name, color))
        axes.axhline(0, color=QUIET, linewidth=1)
        axes.set(xlabel="iteration", ylabel=ylabel, title="Gain over the start")
        whole_numbers(axes)
        label_ends(axes, ends)

    return draw(paint, alt=f"Gain over the start per iteration by {' and '.join(models)}, with 95 % bands.")


def gains_by_name(rows: Sequence[Row], models: Sequence[str], unit: Mapping[str, float], xlabel: str) -> str:
    """The same for policies that are no sequence: a line of dots each."""

    def paint(axes: Axes) -> None:
        for k, name in enumerate(models):
            items = [row[f"gain_{name}"] for row in rows]
            mean = np.array([item["mean"] for item in items]) / unit[name]
            low, high = (np.array([item[key] for item in items]) / unit[name] for key in ("low", "high"))
            ys = np.arange(len(rows)) + 0.28 * (k - (len(models) - 1) / 2)
            axes.errorbar(
                mean,
                ys,
                xerr=reach(mean, low, high),
                fmt=marker_of(models, name),
                color=color_of(models, name),
                elinewidth=2,
                label=name,
            )
        axes.axvline(0, color=QUIET, linewidth=1)
        axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set(xlabel=xlabel, title="Gain over the start")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3)

    height = max(HEIGHT, 110 + 34 * len(rows))
    return draw(paint, alt=f"Gain over the start of each policy by {' and '.join(models)}.", height=height)


def frontier(rows: Sequence[Row], models: Sequence[str], unit: Mapping[str, float], ylabel: str) -> str:
    """Gain against KL: how much reward a nat of distance bought, and where more distance cost quality."""

    def paint(axes: Axes) -> None:
        ends = []
        sequence = all(row["iteration"] is not None for row in rows)
        for name in models:
            color = color_of(models, name)
            kl = [row["kl"] for row in rows]
            items = [row[f"gain_{name}"] or {"mean": 0.0, "low": 0.0, "high": 0.0} for row in rows]
            mean, low, high = (np.array([item[key] for item in items]) / unit[name] for key in ("mean", "low", "high"))
            axes.errorbar(
                kl,
                mean,
                xerr=[1.96 * row["kl_standard_error"] for row in rows],
                yerr=reach(mean, low, high),
                color=color,
                marker=marker_of(models, name),
                linestyle="-" if sequence else "none",
                elinewidth=1,
            )
            if sequence:
                ends.append((kl[-1] + 1.96 * rows[-1]["kl_standard_error"], mean[-1], name, color))
            for row, x, y in zip(rows[1:], kl[1:], mean[1:], strict=True):
                text = str(row["iteration"]) if sequence else row["name"]
                if sequence and row is rows[-1]:
                    continue  # the reward model's name stands there
                axes.annotate(text, (x, y), xytext=(-5, 5), textcoords="offset points", color=color, ha="right")
        axes.axhline(0, color=QUIET, linewidth=1)
        axes.set(xlabel="KL to the start, nats per response", ylabel=ylabel, title="What distance buys")
        axes.margins(y=0.12)
        label_ends(axes, ends)

    return draw(paint, alt=f"Gain by {' and '.join(models)} against the KL to the start; numbers are iterations.")


def distribution(name: str, color: str, values: Mapping[str, Floats]) -> str:
    """Rewards of all responses: the first policy filled in grey, the second in colour, a third as an outline."""

    def paint(axes: Axes) -> None:
        pooled = np.concatenate(list(values.values()))
        edges = np.linspace(pooled.min(), pooled.max() + 1e-9, 31).tolist()
        looks: list[dict[str, Any]] = [
            {"color": START, "alpha": 0.45, "histtype": "stepfilled"},
            {"color": color, "alpha": 0.6, "histtype": "stepfilled"},
            {"color": INK, "histtype": "step", "linewidth": 1.6},
        ]
        for (policy, rewards), look in zip(values.items(), looks, strict=False):
            axes.hist(rewards, edges, weights=np.full(len(rewards), 100 / len(rewards)), label=policy, **look)
        axes.set(xlabel=f"reward by {name}", ylabel="% of responses", title=f"Rewards by {name}")
        axes.legend(loc="upper left", fontsize=10)
        axes.grid(axis="x", visible=False)

    return draw(paint, alt=f"Histograms of the rewards by {name}: {', '.join(values)}.")


def win_rates(rows: Sequence[Row], models: Sequence[str]) -> str:
    """Wins against the start: filled as they are, hollow at equal length."""

    def paint(axes: Axes) -> None:
        for k, name in enumerate(models):
            color, marker = color_of(models, name), marker_of(models, name)
            for filled, prefix in ((True, "win_rate"), (False, "length_controlled_win_rate")):
                items = [row[f"{prefix}_{name}"] for row in rows]
                mean, low, high = (100 * np.array([item[key] for item in items]) for key in ("mean", "low", "high"))
                ys = np.arange(len(rows)) + 0.36 * (k - (len(models) - 1) / 2) + (-0.08 if filled else 0.08)
                axes.errorbar(
                    mean,
                    ys,
                    xerr=reach(mean, low, high),
                    fmt=marker,
                    color=color,
                    markerfacecolor=color if filled else "white",
                    elinewidth=1.6,
                    label=name if filled else f"{name}, equal length",
                )
        axes.axvline(50, color=QUIET, linewidth=1)
        axes.set_yticks(range(len(rows)), [short(row) for row in rows])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set(xlabel="% of comparisons won", title="Wins against the start", xlim=(None, 101))
        axes.legend(loc="upper center", bbox_to_anchor=(0.45, -0.18), ncols=2, fontsize=10)

    height = 150 + 44 * len(rows)
    return draw(paint, alt="Win rates against the start, and at equal length, with 95 % intervals.", height=height)


def short(row: Row) -> str:
    return row["name"] if row["iteration"] in (None, 0) else f"iteration {row['iteration']}"


def lengths(name: str, values: Mapping[str, tuple[Floats, Floats]], color: str) -> str:
    """Mean reward by length, over eighths of each policy's responses: {policy: (lengths, rewards)}."""

    def paint(axes: Axes) -> None:
        looks = ((START, "o", "-"), (color, "s", "-"), (INK, "^", "--"))
        for (policy, (length, reward)), (ink, marker, style) in zip(values.items(), looks, strict=False):
            groups = np.array_split(np.argsort(length, kind="stable"), min(8, len(length)))
            xs = np.array([length[group].mean() for group in groups])
            ys = np.array([reward[group].mean() for group in groups])
            axes.plot(xs, ys, color=ink, marker=marker, linestyle=style, markersize=5, label=policy)
        axes.set(xlabel="tokens of the response", ylabel=f"mean reward by {name}", title="Length against reward")
        axes.legend(fontsize=10)

    return draw(paint, alt=f"Mean reward by {name} against the length of the response: {', '.join(values)}.")


def categories(rows: Sequence[tuple[str, Mapping[str, Mapping[str, float]]]], models: Sequence[str], title: str) -> str:
    """Gains by category: (category, {reward model: interval}) each."""

    def paint(axes: Axes) -> None:
        for k, name in enumerate(models):
            mean, low, high = (np.array([item[name][key] for _, item in rows]) for key in ("mean", "low", "high"))
            ys = np.arange(len(rows)) + 0.3 * (k - (len(models) - 1) / 2)
            axes.errorbar(
                mean,
                ys,
                xerr=reach(mean, low, high),
                fmt=marker_of(models, name),
                color=color_of(models, name),
                elinewidth=1.6,
                markersize=5,
                label=name,
            )
        axes.axvline(0, color=QUIET, linewidth=1)
        axes.set_yticks(range(len(rows)), [name for name, _ in rows])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set(xlabel="gain over the start", title=title)
        axes.legend(loc="upper center", bbox_to_anchor=(0.4, -0.1), ncols=3, fontsize=10)

    height = 110 + 28 * len(rows)
    return draw(paint, alt=f"{title}, with 95 % intervals: {', '.join(name for name, _ in rows)}.", height=height)


def health(rows: Sequence[Row]) -> str:
    """Signs of decay over the iterations: repeated sentences and truncated responses, in per cent."""

    def paint(axes: Axes) -> None:
        xs = [row["iteration"] for row in rows]
        ends = []
        for key, label, color, marker in (
            ("repeated", "repeated", COLORS[4], "o"),
            ("truncated", "cut off", COLORS[2], "s"),
        ):
            ys = [100 * row[key] for row in rows]
            axes.plot(xs, ys, color=color, marker=marker)
            ends.append((xs[-1], ys[-1], label, color))
        axes.set(xlabel="iteration", ylabel="%", title="Repeated sentences, truncated responses")
        axes.set_ylim(bottom=0, top=max(2.0, axes.get_ylim()[1]))
        whole_numbers(axes)
        label_ends(axes, ends)

    return draw(paint, alt="Share of repeated sentences and of truncated responses per iteration.")


def variety(rows: Sequence[Row]) -> str:
    """Mean length and distinct-2 over the iterations, each against its start."""

    def paint(axes: Axes) -> None:
        xs = [row["iteration"] for row in rows]
        ends = []
        for key, label, color, marker in (("length", "length", INK, "o"), ("distinct_2", "distinct-2", COLORS[3], "D")):
            ys = [row[key] / rows[0][key] for row in rows]
            axes.plot(xs, ys, color=color, marker=marker)
            ends.append((xs[-1], ys[-1], label, color))
        axes.axhline(1, color=QUIET, linewidth=1)
        axes.set(xlabel="iteration", ylabel="times the start's", title="Length and variety")
        axes.set_ylim(bottom=0)
        whole_numbers(axes)
        label_ends(axes, ends)

    return draw(paint, alt="Mean length and distinct-2 of the responses per iteration, relative to the start.")


# Training


def training(title: str, ylabel: str, series: Mapping[str, Sequence[tuple[float, float]]], *, log: bool = False) -> str:
    """A quantity over the updates: {name: (update, value) ...}; a name that ends with " target" is dashed."""

    def paint(axes: Axes) -> None:
        plain = [name for name in series if not name.endswith(" target")]
        color = dict(zip(plain, shades(len(plain)), strict=True))
        for name, points in series.items():
            xs, ys = zip(*points, strict=True)
            base = name.removesuffix(" target")
            dashed = name != base
            axes.plot(
                xs,
                ys,
                color=color[base],
                linestyle="--" if dashed else "-",
                linewidth=1.2 if dashed else 1.8,
                marker="" if len(xs) > 25 or dashed else ".",
                label=None if dashed else name,
            )
        if log:
            axes.set_yscale("log")
        axes.set(xlabel="update", ylabel=ylabel, title=title)
        whole_numbers(axes)
        if len(plain) > 1:
            axes.legend(fontsize=10)

    return draw(paint, alt=f"{title} over the updates: {', '.join(series)}.")


# Several runs


def frontiers(runs: Mapping[str, Sequence[Row]], groups: Mapping[str, str], model: str) -> str:
    """Every run's path of gain by one reward model against KL; runs of one group, which `groups` names, look alike."""
    names = list(dict.fromkeys(groups.values()))

    def paint(axes: Axes) -> None:
        labelled: set[str] = set()
        for run, rows in runs.items():
            k = names.index(groups[run])
            means = [(row[f"gain_{model}"] or {"mean": 0.0})["mean"] for row in rows]
            axes.plot(
                [row["kl"] for row in rows],
                means,
                color=COLORS[k % len(COLORS)],
                marker=MARKERS[k % len(MARKERS)],
                label=None if groups[run] in labelled else groups[run],
                markersize=5,
            )
            labelled.add(groups[run])
        axes.axhline(0, color=QUIET, linewidth=1)
        axes.set(xlabel="KL to the start, nats per response", ylabel=f"gain by {model}", title=f"Gain by {model}")
        axes.legend(loc="upper center", bbox_to_anchor=(0.45, -0.2), ncols=2, fontsize=10)

    height = HEIGHT + 14 * ((len(names) + 1) // 2)
    return draw(paint, alt=f"Gain by {model} against KL for the runs {', '.join(runs)}.", height=height)


def best_of_runs(rows: Sequence[tuple[str, Mapping[str, float]]], model: str) -> str:
    """The gain of each run's best policy by the judge: (run, interval) each."""

    def paint(axes: Axes) -> None:
        mean, low, high = (np.array([item[key] for _, item in rows]) for key in ("mean", "low", "high"))
        axes.errorbar(mean, np.arange(len(rows)), xerr=reach(mean, low, high), fmt="s", color=COLORS[1], elinewidth=2)
        axes.axvline(0, color=QUIET, linewidth=1)
        axes.set_yticks(range(len(rows)), [name for name, _ in rows])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set(xlabel=f"gain by {model} over the run's start", title=f"Each run's best policy by {model}")

    return draw(paint, alt=f"Gain by {model} of each run's best policy.", height=max(150, 90 + 30 * len(rows)))
