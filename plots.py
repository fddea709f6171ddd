"""Figures from result files alone: python plots.py out/NAME [FIGURE ...]
draws what summary.json shows.

Each function takes the summary and returns a matplotlib figure, or raises
Absent; `--help` lists them. Figures and propositions are those of arXiv
2505.22491. Needs numpy and matplotlib only.

    n width   α exponent in LR ∝ n^-α   S seeds   W widths   K LRs   T steps
    edge: between the largest stable and the smallest unstable LR
"""
import json
import sys
import textwrap
import traceback
from itertools import cycle, product
from pathlib import Path

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator

STYLE = {
    "figure.constrained_layout.use": True, "savefig.dpi": 160,
    "font.size": 10, "axes.titlesize": 10.5, "figure.titlesize": 10.5,
    "legend.fontsize": 8.5, "legend.frameon": False,
    "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.alpha": 0.2,
    "lines.linewidth": 1.4, "lines.markersize": 4.5,
}
# The colour-blind-safe set of Okabe and Ito.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# Every colour solid, then every colour dashed, and so on.
LOOKS = (plt.cycler(linestyle=("-", "--", ":", "-."))
         * plt.cycler(color=COLOURS))
DASHED = {"color": "0.35", "linestyle": "--", "linewidth": 1.1, "zorder": 1}
TRAINED = LinearSegmentedColormap.from_list("trained", ("#0B4F8A", "#6FB1D6", "#E3F0F4"))
# Places of a legend.
BESIDE = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)}
BELOW = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.2)}
REGIMES = {
    "catastrophic": "#F7DAD3",
    "controlled divergence": "#FBF1CC",
    "stable": "#DDEEE3",
}
UPDATES = {
    "effective": "effective ΔW x",
    "propagating": "propagating W₀ Δx",
}
ALIGNMENTS = {
    "operator_update": "ΔW and x",
    "operator_propagating": "W₀ and Δx",
}
COURSE = {
    "logits_change": "logits' change (RMS)",
    "hidden_update": "hidden effective\nupdate (RMS)",
    "train_loss": "train loss",
}
NAMES = {
    "ce": "CE", "mse": "MSE", "brier": "Brier",
    "huber": "Huber", "hinge": "hinge", "squared_hinge": "squared hinge",
    "sgd": "SGD", "adam": "Adam",
    "sp": "SP", "ntp": "NTP", "mup": "µP",
    "sp_full_align": "SP-full-align",
    "sp_full_align_large_readout": "SP-full-align (large readout)",
}
# The settings of a curve; "lr" if tracked.
CURVE = ("loss", "param", "optimizer", "alpha", "norm_affine", "warmup", "lr")
WORDS = {           # how a setting is written, if not by its name
    "alpha": lambda value: f"α = {value:g}",
    "norm_affine": lambda value: "" if value else "no norm gains",
    "warmup": lambda count: f"{count} warmup steps" if count else "no warmup",
    "lr": lambda value: f"LR {value:g}",
    "step": lambda count: counted(count, "step"),
}


class PlotError(ValueError):
    """What a user can mend: a folder, a figure's name, a summary."""


class Absent(PlotError):
    """The summary has not what a figure shows."""


def some(rows, least=1):
    if len(rows) < least:
        raise Absent("the summary holds nothing of it")
    return rows


def named(value):
    return NAMES.get(value, value)


def counted(count, noun):
    return f"{count} {noun}{'s' * (count > 1)}"


def words(row, keys):
    said = (WORDS.get(key, named)(row[key]) for key in keys if row.get(key) is not None)
    return ", ".join(filter(None, said))


def unique(rows, key):
    return list(dict.fromkeys(row.get(key) for row in rows))


def differing(rows):
    return [key for key in CURVE if len(unique(rows, key)) > 1]


def name_of(row, rows):
    """The settings that tell a curve from the others, or its loss."""
    return words(row, differing(rows) or ["loss"])


def setting(summary, rows=()):
    """What all runs share, and the settings on which `rows` agree."""
    model, hidden = summary["model"], counted(summary["hidden_layers"], "hidden layer")
    size = {"mlp": hidden, "gpt": f"GPT, {summary['layers']} layers"}.get(model, model)
    said = [summary["data"].replace("_", "-"), size, counted(summary["steps"], "step")]
    if rows:
        said.append(words(rows[0], [key for key in CURVE if key not in differing(rows)]))
    return ", ".join(said).replace(", no warmup", "")       # the default: unsaid


def scaled(row, exponent):
    """' × (n / n0)^exponent', empty without one."""
    return f" × (n / {row['base_width']})$^{{{exponent:g}}}$" if exponent else ""


def signed(value):
    if value is None:
        return "?"
    return f"{value:.2f}".replace("-0.00", "0.00").replace("-", "−")


def power(exponent):
    return f"$n^{{{signed(exponent)}}}$"


def fitted(row, prefix=""):
    """'n^exponent [interval]', empty where nothing was fitted."""
    exponent, (low, high) = row[prefix + "exponent"], row[prefix + "interval"]
    within = f" [{signed(low)}, {signed(high)}]" if low is not None else ""
    return "" if exponent is None else power(exponent) + within


def floats(values):
    """A float array in which null is nan."""
    return np.array(list(values), dtype=float)


def where(rows, **wanted):
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def curves(summary):
    """The rows of an LR sweep with an optimum at all; their exponent is the
    edge's."""
    rows = [row for row in summary.get("rows", ())
            if np.isfinite(floats(row["optimal_lr"])).any()]
    return some([{**row, "exponent": row["max_stable_exponent"],
                  "interval": row["max_stable_interval"],
                  "predicted": row["predicted_max_stable_exponent"]} for row in rows])


def tracked(summary, name, mlp=True, **wanted):
    """The rows of a tracked quantity, such as step=1, with a width where no
    seed diverged."""
    found = where(summary.get(name, ()), **wanted)
    if (summary.get("model") == "mlp") != mlp:
        found = []
    return some([row for row in found if np.isfinite(geometric_mean(row["values"])).any()])


def groups(rows, *free):
    """Lists of the rows that agree on every setting but the free ones."""
    found = {}
    for row in rows:
        key = tuple(row.get(name) for name in CURVE if name not in free)
        found.setdefault(key, []).append(row)
    return list(found.values())


def widest_group(rows, *free):
    """The group with most values of the first free setting."""
    return max(groups(rows, *free), key=lambda group: len(unique(group, free[0])))


def geometric_mean(values):
    """(S, W) -> (W,) over the seeds; nan where a seed has no positive value."""
    values = floats(values)
    return np.exp(np.log(np.where(values > 0, values, np.nan)).mean(0))


def fit_line(widths, values, exponent):
    """value ~ width^exponent through the geometric mean of the values (W,)."""
    logs = exponent * np.log(widths)
    return np.exp(np.nanmean(np.log(values) - logs) + logs)


def slope(widths, values):
    """Least-squares exponent of value ~ width^exponent; None below two widths."""
    ok = np.isfinite(values)
    return (np.polyfit(np.log(widths)[ok], np.log(values[ok]), 1)[0]
            if ok.sum() > 1 else None)


def edge_of(row):
    """(W,) geometric means of the edge's bracket."""
    return np.sqrt(floats(row["max_stable_lr"]) * floats(row["min_unstable_lr"]))


def panels(count, width, height, columns=3, ylabel="", **kwargs):
    """(fig, axes (rows, columns)) of `width` by `height` inches; those beyond
    `count` hidden."""
    columns = min(count, columns)
    rows = -(-count // columns)
    size = width * columns + 0.6, height * rows + 0.4
    fig, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, **kwargs)
    plt.setp(axes[:, 0], ylabel=ylabel)
    plt.setp(axes.flat[count:], visible=False)
    return fig, axes


def layer_panels(summary, rows, kinds, height):
    """(fig, {kind: axes of the layers}); those without a row are hidden."""
    layers = summary["hidden_layers"] + 1
    fig, axes = panels(2 * layers, 2.75, height, layers)
    for line, (kind, symbol) in zip(axes, kinds.items()):
        for layer, ax in enumerate(line):
            name = "readout" if layer == layers - 1 else f"layer {layer + 1}"
            ax.set(title=f"{name}: {symbol}",
                   visible=bool(where(rows, kind=kind, layer=layer)))
    return fig, dict(zip(kinds, axes))


def finish(fig, title, legend=None):
    """The title in lines that fit, height for long legends, one legend of all
    if it has a title."""
    lines = [len(ax.get_legend().texts) for ax in fig.axes if ax.get_legend()]
    height = 0.2 * max(lines, default=0) + 2.4          # inches a panel
    fig.set_figheight(max(fig.get_figheight(), height * fig.axes[0].get_gridspec().nrows))
    fig.suptitle(even_lines(title, int(12.5 * fig.get_figwidth())))

    handles = {}        # {label: handle}; of several, the first panel's
    for ax in fig.axes[::-1]:
        handles.update(zip(*ax.get_legend_handles_labels()[::-1]))
    if legend:
        fig.legend(handles.values(), handles, title=legend, loc="outside right center")
    return fig


def even_lines(text, most):
    """The text in as few lines of at most so many characters as it needs,
    about equally long."""
    each = (textwrap.wrap(text, size, break_on_hyphens=False, break_long_words=False)
            for size in range(1, most + 1))
    # Of the wraps with fewest lines, min takes the first: the narrowest.
    return "\n".join(min(each, key=len))


def loss_colour(loss):
    """The same in every figure; black if it has no name."""
    return COLOURS[list(NAMES).index(loss) % 7] if loss in NAMES else COLOURS[-1]


def width_looks(rows):
    """{width: its colour and label}, dark is wide."""
    widths = sorted({width for row in rows for width in row["widths"]})
    colours = plt.cm.viridis_r(np.linspace(0.12, 1.0, len(widths)))
    return {width: {"color": color, "label": f"{width}"}
            for width, color in zip(widths, colours)}


def width_axis(ax, widths, legend=None, yscale="log", **kwargs):
    """Ticks at the widths, every other or as powers of two where they crowd;
    a legend if asked."""
    widths = sorted(set(map(int, widths)), reverse=True)
    doubling = widths[0] > 5000 and all(width.bit_count() == 1 for width in widths)
    ax.set(**{"xscale": "log", "yscale": yscale, "xlabel": "width n", **kwargs})
    ax.xaxis.set_major_locator(FixedLocator(widths[::1 if len(widths) <= 7 else 2]))
    ax.xaxis.set_major_formatter(
        lambda value, _: (f"$2^{{{np.log2(value):.0f}}}$" if doubling
                          else f"{value:g}"))
    ax.set_xticks([], minor=True)

    if yscale == "log":
        low, high = ax.get_ylim()
        if high < 1.1 * low:            # constant to rounding
            ax.set_ylim(low / 1.5, high * 1.5)
        log_ticks(ax.yaxis)
    if legend and ax.lines:
        ax.legend(**legend)


def log_ticks(axis):
    """Plain labels where a log axis spans less than two decades, the closer
    the shorter it is."""
    low, high = axis.get_view_interval()
    axis.set_minor_formatter("")
    if high >= 100 * low:
        return
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    if high < 4 * low:
        axis.set_major_locator(MaxNLocator(4, steps=(1, 2, 5, 10)))
    else:
        axis.set_major_locator(LogLocator(10, (1, 2, 5) if high < 30 * low else (1, 3)))


def trend(ax, widths, values, exponent, label, color,
          linestyle="-", marker="o", predicted=None):
    """Points (W,), a fit through them if there is one, a predicted slope
    above."""
    ink = dict(color=color, marker=marker, mfc="white", mew=1.3)
    ax.plot(widths, values, zorder=3, **ink, ls="none")
    if exponent is not None:
        ax.plot(widths, fit_line(widths, values, exponent), color=color, ls=linestyle)
    # The legend shows point and line in one.
    ax.plot([], label=label, **ink, ls="none" if exponent is None else linestyle)
    if predicted is not None and np.isfinite(values).any():
        ax.plot(widths, 1.5 * fit_line(widths, values, predicted), **DASHED)


def seeds_trend(ax, widths, values, label, **style):
    """A dot per seed (S, W), a fit through the geometric means, its exponent
    in the label."""
    mean, dots = geometric_mean(values), floats(values).T
    if (dots > 0).any():
        exponent = slope(widths, mean)
        ax.plot(widths, np.where(dots > 0, dots, np.nan), "o",
                color=style["color"], ms=3, alpha=0.5)
        label += "" if exponent is None else f": {power(exponent)}"
        trend(ax, widths, mean, exponent, label, **style)


def exponent_points(ax, x, rows, ticks=0.0, **kwargs):
    """Measured exponents at x (N,), 95 % intervals as bars, predictions as
    ticks of a length."""
    numbers = ([row["exponent"], *row["interval"], row["predicted"]] for row in rows)
    y, low, high, predicted = floats(numbers).T
    ax.errorbar(x, y, (y - low, high - y), fmt="o", mfc="white", elinewidth=1, **kwargs)
    if ticks:
        ax.hlines(predicted, x - ticks / 2, x + ticks / 2,
                  color=kwargs["color"], lw=2.4, alpha=0.45)


def loss_line(ax, lr, losses, edge, color, label):
    """Seed mean of losses (S, K) against LR, a band over the seeds, the edge
    dotted.

    The line stops where a seed diverged and at gaps that a search left.
    """
    ok = np.flatnonzero(np.isfinite(losses).all(0))
    gaps = np.diff(np.log(lr)[ok])
    # A search's coarse points are factors of 4 apart: no gap.
    wide = gaps > max(np.log(4.1), 1.5 * np.median(gaps) if gaps.size else 0.0)
    ax.plot([], "o-", ms=2.6, color=color, label=label)
    for part in np.split(ok, np.flatnonzero(wide) + 1):
        values = losses[:, part]
        ax.plot(lr[part], values.mean(0), "o-", ms=2.6, color=color, zorder=3)
        ax.fill_between(lr[part], values.min(0), values.max(0),
                        color=color, alpha=0.18, lw=0)
    ax.axvline(edge, color=color, ls=":", lw=1)


def lr_transfer(summary):
    """loss against LR, a line per width; also rescaled by the prediction if few (Fig. 5)"""
    rows = curves(summary)
    few, looks = len(rows) <= 4, width_looks(rows)
    count, columns = len(rows) * (1 + few), len(rows) if few else 3
    fig, axes = panels(count, 3.3, 2.8, columns, "final train loss")
    for ax, row in zip(axes.flat, rows):
        ax.set_title(name_of(row, rows))
        loss_panel(ax, row, 0.0, looks)
    if few:
        for ax, row in zip(axes[1], rows):
            loss_panel(ax, row, row["predicted"] or 0.0, looks)
    title = (f"{setting(summary)}. Dotted: stability edge. "
             "Dashed: constant predictor")
    return finish(fig, title, legend="width")


def loss_panel(ax, row, exponent, looks):
    """Losses of one curve against LR × (n / n0)^-exponent."""
    low, chance = np.inf, row["chance_loss"]
    for width, curve, edge in zip(row["widths"], row["curves"], edge_of(row)):
        factor = (width / row["base_width"]) ** -exponent
        losses = floats(curve["train_loss"])            # (S, K)
        loss_line(ax, floats(curve["lr"]) * factor, losses, edge * factor, **looks[width])
        low = np.nanmin(losses, initial=low)
    ax.set(xscale="log", xlabel="learning rate" + scaled(row, -exponent))
    log_ticks(ax.xaxis)
    ax.axhline(chance, **DASHED)
    ax.set_ylim(low - 0.05 * chance, 1.25 * chance)


def exponents(summary):
    """optimal and largest stable LR against width, fits and predicted slope (Fig. 5, right)"""
    rows = curves(summary)
    fig, axes = panels(len(rows), 3.4, 3.6, ylabel="learning rate", sharey="row")
    for ax, row, color in zip(axes.flat, rows, cycle(COLOURS)):
        edge, widths, predicted = edge_of(row), row["widths"], row["predicted"]
        if np.isfinite(edge).any():
            bars = (edge - floats(row["max_stable_lr"]),
                    floats(row["min_unstable_lr"]) - edge)
            ax.errorbar(widths, edge, bars, color=color, fmt="none",
                        capsize=3, elinewidth=1.6,
                        label=f"largest stable LR {fitted(row)}")
            trend(ax, widths, edge, row["exponent"], None, color,
                  marker="", predicted=predicted)
            ax.plot([], **DASHED, label=f"predicted slope {power(predicted)}")

        label = f"optimal LR {fitted(row, 'optimal_')}"
        trend(ax, widths, floats(row["optimal_lr"]), row["optimal_exponent"],
              label, color, ":")
        width_axis(ax, widths, BELOW, title=name_of(row, rows))
        ax.margins(x=0.08, y=0.12)

        # The edge's slope from each width to the next.
        for low, high, local in zip(widths, widths[1:], row.get("local_max_stable", ())):
            if local is not None:
                ax.text(np.sqrt(low * high), 0.02, signed(local),
                        ha="center", fontsize=8, color="0.35",
                        transform=ax.get_xaxis_transform())
    return finish(fig, f"{setting(summary)}. "
                       "Bars: largest stable to smallest unstable LR. "
                       "Legend: exponent [95 % interval]. "
                       "At the bottom: the edge's slopes")


def optimal_lr(summary):
    """optimal LR against width with fits, beside n^-1/2 and n^-1 (Fig. 1)"""
    rows = curves(summary)
    fig, ((ax,),) = panels(1, 6.6, 3.6, ylabel="optimal learning rate")
    for row, look in zip(rows, LOOKS()):
        label = f"{name_of(row, rows)} {fitted(row, 'optimal_')}"
        trend(ax, row["widths"], floats(row["optimal_lr"]),
              row["optimal_exponent"], label, **look)

    # The slopes to compare with, above and below all points.
    widths, best = np.hstack([floats([row["widths"], row["optimal_lr"]]) for row in rows])
    every = np.unique(widths)
    for exponent, style, extreme, off in (
            (-0.5, "--", np.nanmax, 1.7),
            (-1.0, "-.", np.nanmin, 0.6)):
        line = off * extreme(best * widths ** -exponent) * every ** exponent
        ax.plot(every, line, style, color="0.45", label=f"slope {power(exponent)}")
    width_axis(ax, every, BESIDE)
    return finish(fig, setting(summary))


def regular(row):
    """Whether there are three widths or more with eight LRs or more in equal
    steps: a grid."""
    steps = [np.diff(np.log(curve["lr"])) for curve in row["curves"]]
    equal = (len(step) > 6 and np.ptp(step) < 0.01 * step.mean() for step in steps)
    return len(steps) > 2 and all(equal)


def relative_loss(row, curve):
    """(K,) seed-mean losses over the constant predictor's; infinite where a
    seed diverged."""
    return (np.nan_to_num(floats(curve["train_loss"]).mean(0), nan=np.inf)
            / row["chance_loss"])


def phase(summary):
    """a grid of LRs at every width: trains, at chance or diverges; the edge as a staircase"""
    rows = some([row for row in curves(summary) if regular(row)])
    fig, axes = panels(len(rows), 3.5, 4.1, ylabel="learning rate", sharey=True)
    low = min(relative_loss(row, curve).min() for row in rows for curve in row["curves"])
    norm = Normalize(low, 1.0)
    for ax, row in zip(axes.flat, rows):
        phase_map(ax, row, norm)
        slopes = (f"edge {power(row['exponent'])}, "
                  f"predicted {power(row['predicted'])}")
        width_axis(ax, row["widths"], title=f"{name_of(row, rows)}\n{slopes}")
    colours = plt.cm.ScalarMappable(norm, TRAINED)
    fig.colorbar(colours, ax=axes, label="loss / constant predictor's", shrink=0.6)
    fig.legend(*axes[0, 0].get_legend_handles_labels(),
               loc="outside lower center", ncols=min(len(rows) + 1, 3))
    return finish(fig, setting(summary))


def phase_map(ax, row, norm):
    """Cells that train in colour, at chance hatched, diverged crossed."""
    widths, edge = floats(row["widths"]), edge_of(row)
    steps = np.sqrt(widths[1:] / widths[:-1])           # half a cell's width
    bounds = [widths[0] / steps[0], *widths[:-1] * steps, widths[-1] * steps[-1]]
    chance = dict(fc="0.94", ec="0.6", hatch="////", lw=0)
    gone = dict(color="0.6", marker="x", ls="none", mew=0.9)
    for width, curve, *sides in zip(widths, row["curves"], bounds, bounds[1:]):
        half = np.sqrt(curve["lr"][1] / curve["lr"][0])
        for rate, value in zip(curve["lr"], relative_loss(row, curve)):
            if np.isinf(value):
                ax.plot(width, rate, **gone)
                cell = dict(fc="none", lw=0)
            elif value >= 1:
                cell = chance
            else:
                cell = dict(fc=TRAINED(norm(value)), ec="face", lw=0.3)
            ax.fill_between(sides, rate / half, rate * half, **cell)
    ax.fill_between([], [], **chance, label="at or above chance")
    ax.plot([], **gone, label="diverged")

    best = floats(row["optimal_lr"])
    ax.plot(widths, best, "o", color="black", mfc="white", zorder=5, label="optimum")
    ax.stairs(edge, bounds, baseline=None, color="black", lw=2.2, zorder=3,
              label="stability edge")
    if row["predicted"] is not None and np.isfinite(edge).any():
        line = fit_line(widths, edge, row["predicted"])
        ax.plot(widths, line, "--", color=COLOURS[1], lw=2, zorder=4,
                label="predicted slope")
    ax.margins(0)
    ax.grid(False)


def bounded(summary):
    """edge exponents of four losses or more beside predictions; the loss at the widest net"""
    rows = some(widest_group(curves(summary), "loss"), least=4)
    rows = sorted(rows, key=lambda row: -(row["predicted"] or 0.0))
    fig, ((left, right),) = panels(2, 4.6, 3.4)
    for place, row in enumerate(rows):
        color, curve = loss_colour(row["loss"]), row["curves"][-1]
        exponent_points(left, floats([place]), [row], ticks=0.7, color=color, capsize=3)
        left.axhline(*floats([row["predicted"]]), **DASHED)     # None: no line
        values = relative_loss(row, curve)[None]                # (1, K)
        loss_line(right, floats(curve["lr"]), values, edge_of(row)[-1],
                  color, named(row["loss"]))

    left.set_xticks(range(len(rows)),
                    [named(row["loss"]).replace(" ", "\n") for row in rows])
    left.set(ylabel="exponent of the largest stable LR",
             title="ticks: predicted, bars: 95 % intervals")
    left.grid(axis="x", visible=False)
    right.axhline(1.0, **DASHED)
    right.set(xscale="log", xlabel="learning rate", ylabel="loss / constant predictor's",
              title=f"width {rows[0]['widths'][-1]}; dotted: stability edge")
    right.set_ylim(top=1.25)
    log_ticks(right.xaxis)
    return finish(fig, setting(summary, rows), legend="loss")


def losses(summary):
    """best validation accuracy over LR against width, a line per loss (Fig. 7)"""
    rows = curves(summary)
    names, each = some(unique(rows, "loss"), least=3), groups(rows, "loss")
    told = [key for key in differing(rows) if key != "loss"] or ["param"]
    fig, axes = panels(len(each), 3.2, 3.1,
                       ylabel="best validation accuracy (%)", sharey=True)
    for ax, group in zip(axes.flat, each):
        for row in group:
            seeds = 100 * floats(row["best_val_accuracy"])          # (W, S)
            mean = seeds.mean(1)
            bars = mean - seeds.min(1), seeds.max(1) - mean
            # The losses side by side, 5 % apart.
            beside = 1.05 ** (names.index(row["loss"]) - (len(names) - 1) / 2)
            ax.errorbar(floats(row["widths"]) * beside, mean, bars, fmt="o-", capsize=2.5,
                        color=loss_colour(row["loss"]), label=named(row["loss"]))
        width_axis(ax, group[0]["widths"], yscale="linear", title=words(group[0], told))
    return finish(fig, f"{setting(summary)}. "
                       "Points: means, bars: ranges of the seeds",
                  legend="loss")


def calibration(summary):
    """expected calibration error and logits at the optimal LR against width, under CE"""
    rows = [row for row in curves(summary) if (row["model"], row["loss"]) == ("mlp", "ce")]
    some(unique(rows, "param"), least=2)
    fig, axes = panels(2, 5.2, 3.2)
    measures = {"val_ece": "expected calibration error", "logit_rms": "RMS of the logits"}
    for ax, (key, ylabel) in zip(axes.flat, measures.items()):
        for row, look in zip(rows, LOOKS()):
            values = floats(row["at_optimum"][key]).T           # (S, W)
            seeds_trend(ax, row["widths"], values, name_of(row, rows), **look)
        width_axis(ax, width_looks(rows), BESIDE, ylabel=ylabel)
    return finish(fig, f"{setting(summary, rows)} at the optimal LR; "
                       "a dot per seed")


def regimes(summary):
    """exponents of logits and effective updates against α, on predicted lines (Prop. 1, 2)"""
    shown = widest_group(tracked(summary, "updates"), "alpha", "loss")
    some(unique(shown, "alpha"), least=3)
    names, steps = unique(shown, "loss"), unique(shown, "step")
    fig, axes = panels(len(steps) * len(names), 4.2, 3.2, len(names),
                       "width exponent", sharex=True, sharey=True)
    plt.setp(axes[-1], xlabel="α (learning rate ∝ $n^{-α}$)")
    for ax, (step, loss) in zip(axes.flat, product(steps, names)):
        here = where(shown, step=step, loss=loss)
        shade_regimes(ax, {row["alpha"]: row["regime"] for row in here})
        exponents_over_alpha(ax, here, summary["hidden_layers"])
        ax.set_title(f"{named(loss)}, after {counted(step, 'step')}", pad=24)

    predicted = [row["predicted"] for row in shown if row["predicted"] is not None] or [0.0]
    axes[0, 0].set_ylim(min(predicted) - 0.25, min(max(predicted), 1.6) + 0.75)
    title = (f"{setting(summary, shown)} "
             f"× (n / {summary['base_width']})$^{{-α}}$")
    # Where divergence feeds back, later steps have but lower bounds.
    bound = any(row.get("lower_bound") for row in shown)
    below = "\n(later steps, red:\nlower bounds)" if bound else ""
    return finish(fig, title, legend=f"lines: predicted{below}\npoints: measured")


def shade_regimes(ax, regime):
    """The background in the colour of each α's regime, its name above;
    regime: {α: name}."""
    alphas, names = zip(*sorted(regime.items()))
    # A regime reaches up to the first α of the next.
    bounds = [alphas[0] - 0.08, *alphas[1:], alphas[-1] + 0.08]
    for name in dict.fromkeys(names):
        low = bounds[names.index(name)]
        high = bounds[len(names) - names[::-1].index(name)]
        ax.axvspan(low, high, color=REGIMES[name], lw=0, zorder=0)
        ax.text((low + high) / 2, 1.01, name.replace(" ", "\n"),
                transform=ax.get_xaxis_transform(),
                ha="center", va="bottom", fontsize=7.5, color="0.35")
    ax.axhline(0, color="0.4", lw=0.8)
    ax.set_xlim(bounds[0], bounds[-1])


def exponents_over_alpha(ax, rows, readout):
    """The four kinds of change in an MLP whose readout is layer `readout`."""
    series = {
        "logits' change": ("logits", [readout + 1]),
        "output update": ("effective", [readout]),
        "hidden updates": ("effective", range(1, readout)),
        "input update": ("effective", [0]),
    }
    for i, (label, (kind, layers)) in enumerate(series.items()):
        chosen = [row for row in where(rows, kind=kind) if row["layer"] in layers]
        line = {row["alpha"]: row["predicted"] for row in chosen}
        ax.plot(list(line), floats(line.values()), color=COLOURS[i])
        measured = [row for row in chosen if row["exponent"] is not None]
        if measured:
            x = (floats(row["alpha"] for row in measured)
                 + 0.02 * (1.5 - i))                    # side by side
            exponent_points(ax, x, measured, color=COLOURS[i], label=label)


def course(summary):
    """logits' change, hidden update and loss over the first steps, a line per width"""
    rows = some([row for row in summary.get("course", ()) if len(row["steps"]) > 5])
    rows = widest_group(rows, "loss")
    lines = {kind: floats(line for row in rows for line in row[kind])
             for kind in COURSE}                        # (N, T) each
    kinds = some([kind for kind in COURSE if (lines[kind][:, 0] > 0).any()])
    fig, axes = panels(len(kinds) * len(rows), 2.9, 2.2, len(rows),
                       sharex=True, sharey="row")
    looks = width_looks(rows)
    for ax, (kind, row) in zip(axes.flat, product(kinds, rows)):
        values, (low, top) = floats(row[kind]), course_range(lines[kind])
        for width, line in zip(row["widths"], values):          # values (W, T)
            course_line(ax, row["steps"], line, top, **looks[width])
        first = slope(row["widths"], geometric_mean([values[:, 0]]))
        if first is not None and kind != "train_loss":
            ax.text(0.97, 0.95, f"step 1: {power(first)}",
                    transform=ax.transAxes, ha="right", va="top")
        ax.set(xscale="log", yscale="log",
               xlim=(0.8, 1.2 * row["steps"][-1]), ylim=(low, top),
               xlabel="step", ylabel=COURSE[kind], title=named(row["loss"]))
        log_ticks(ax.xaxis)
        ax.label_outer()
    plt.setp(axes[1:], title="")
    title = (f"{setting(summary, rows)}. "
             "Triangles: beyond the panel or not finite")
    return finish(fig, title, legend="width")


def course_range(lines):
    """(low, top) for lines (N, T): all that settle, the start of most others."""
    lines = lines[lines[:, 0] > 0]
    first = lines[:, 0]
    # A line with nan is not calm.
    calm = lines[lines.max(1) < 1e4 * first].max(initial=first.min())
    top = 3 * np.sqrt(calm * max(calm, first.max()))
    return lines[(lines > 0) & (lines < top)].min() / 1.5, top


def course_line(ax, steps, values, top, **kwargs):
    """A line (T,) until it is above `top` or not finite, and a mark at the
    step where it is."""
    end = np.argmax([*~(values < top), True])           # T if it never is
    ax.plot(steps[:end + 1], [*values[:end], top][:len(steps)], **kwargs)
    if end < len(steps) and np.isfinite(values[0]):
        ax.plot(steps[end], top, "^", color=kwargs["color"], ms=5, clip_on=False, zorder=4)


def updates(summary, step=1):
    """effective and propagating updates by layer against width, after step 1 (Fig. 4)"""
    rows = [row for row in tracked(summary, "updates", step=step) if row["kind"] in UPDATES]
    rows = where(some(rows), loss=rows[0]["loss"], lr=rows[0]["lr"])
    rows = [row for row in rows if row["alpha"] in (0.0, 0.5, 1.0)] or rows
    fig, axes = layer_panels(summary, rows, UPDATES, 3.0)
    for curve, look in zip(groups(rows), LOOKS()):
        for row in curve:
            ax, exponent = axes[row["kind"]][row["layer"]], row["exponent"]
            label = (f"{name_of(row, rows)}: {signed(exponent)} "
                     f"({signed(row['predicted'])})")
            trend(ax, row["widths"], geometric_mean(row["values"]), exponent, label, **look)
            width_axis(ax, row["widths"], BELOW)
    title = (f"{setting(summary, rows)}. "
             f"RMS of the updates after {counted(step, 'step')}")
    return finish(fig, f"{title}; exponents: measured (predicted)")


def later_updates(summary):
    """the same after the last step"""
    some(range(summary.get("steps", 0)), least=2)
    return updates(summary, summary["steps"])


def alignment(summary):
    """operator-norm alignment of ΔW with x, W0 with Δx over steps, a line per width (Fig. 2)"""
    rows = summary.get("alignment", ()) if summary.get("model") == "mlp" else ()
    rows = [row for row in rows
            if len(row["steps"]) > 5 and (floats(row["values"]) > 0).any()]
    curve = groups(some(rows))[0]
    fig, axes = layer_panels(summary, curve, ALIGNMENTS, 2.3)
    for row in curve:
        ax = axes[row["kind"]][row["layer"]]
        ax.set(xscale="log", ylim=(0, 1.05), xlabel="step")
        for look, values in zip(width_looks(curve).values(),
                                floats(row["values"])):         # (W, T)
            ax.plot(row["steps"], values, **look)
        log_ticks(ax.xaxis)
    return finish(fig, f"{setting(summary, curve)}. Operator-norm alignment",
                  legend="width")


def limit(summary):
    """softmax outputs' distance to the widest network's, and the features' change (Prop. 2)"""
    rows = tracked(summary, "limit")
    rates, steps = unique(rows, "lr"), summary["steps"]
    layer = summary["hidden_layers"] - 1
    some(range(steps), least=21)
    changes = where(summary["updates"], step=steps, kind="features", layer=layer)
    ylabel = "distance of softmax outputs\nto the widest network's"
    fig, axes = panels(2 * len(rates), 5.2, 3.3, 2, ylabel)
    for curve, look in zip(groups(rows, "lr"), LOOKS()):
        for row in curve:
            left, right = axes[rates.index(row["lr"])]
            label, widths = name_of(row, where(rows, lr=row["lr"])), row["widths"]
            nearer = floats(row["values"])[:, :-1]          # the widest's is 0
            change = where(changes, **{key: row[key] for key in CURVE})[0]
            seeds_trend(left, widths[:-1], nearer, label, **look)
            seeds_trend(right, widths, change["values"], label, **look)

    for (left, right), lr in zip(axes, rates):
        title = f"LR {lr:g}" if len(rates) > 1 else ""
        ylabel = "change of the last\nhidden features (RMS)"
        width_axis(left, widths[:-1], BESIDE, title=title)
        width_axis(right, widths, BESIDE, title=title, ylabel=ylabel)
    return finish(fig, f"{setting(summary, rows)}; a dot per seed")


def tensor_kinds(summary):
    """exponents of a GPT's updates after one step by kind of tensor, over the layers"""
    rows = tracked(summary, "updates", mlp=False, step=1)
    rows = some([row for row in rows
                 if row["kind"] in UPDATES and row["exponent"] is not None])
    # A tensor's kind is the end of its module's name: up of blocks.1.up.
    tensors = list(dict.fromkeys(row["module"].split(".")[-1] for row in rows))
    each = groups(rows)
    space = min(0.26, 0.8 / len(each))
    fig, axes = panels(2, 0.78 * len(tensors) + 1.8, 2.6, 1, "width exponent", sharex=True)
    for ax, (kind, symbol) in zip(axes.flat, UPDATES.items()):
        for i, curve in enumerate(each):
            here = where(curve, kind=kind)
            if here:
                x = floats(tensors.index(row["module"].split(".")[-1]) for row in here)
                x += space * (i - (len(each) - 1) / 2)          # side by side
                exponent_points(ax, x, here, ticks=0.9 * space, color=COLOURS[i % 7],
                                label=name_of(here[0], rows))
        ax.axhline(0, color="0.4", lw=0.8)
        ax.set_title(symbol)
        ax.grid(axis="x", visible=False)
    axes[1, 0].set_xticks(range(len(tensors)),
                          [tensor.replace("_", "\n") for tensor in tensors])
    title = f"{setting(summary, rows)}. Updates of one step"
    return finish(fig, title, legend="ticks: predicted\npoints: measured")


def linear_net(summary):
    """closed-form linear net: largest stable LR, distance to limit, one-step loss (C.2-C.4)"""
    parts = some(summary.get("linear_net", ()))
    titles = {
        "edges": "largest stable learning rate",
        "distance": "distance to the infinite-width limit",
        "one_step": "|loss decrease| after one step",
    }
    fig, axes = panels(3, 3.4, 4.6)
    for ax, (part, title) in zip(axes.flat, titles.items()):
        for i, row in enumerate(parts[part]):
            name = words(row, ("param", "alpha", "step", "warmup"))
            name += scaled(row, row.get("warmup_exponent"))
            name += f": {fitted(row)}"
            values = (edge_of(row) if part == "edges"
                      else geometric_mean(row["values"]))
            # The distances share one prediction.
            predicted = None if part == "distance" and i else row["predicted"]
            trend(ax, row["widths"], values, row["exponent"], name,
                  COLOURS[i % 7], marker="os^Dv"[i % 5], predicted=predicted)
        width_axis(ax, row["widths"], BELOW, title=title)
    return finish(fig, "Closed-form linear net f = x uᵀv, one sample, "
                       "squared loss. Lines: fits, with 95 % intervals. "
                       "Dashed: predicted slopes")


FIGURES = {figure.__name__: figure for figure in (
    lr_transfer, exponents, optimal_lr, phase, bounded,
    losses, calibration,
    regimes, course, updates, later_updates, alignment, limit,
    tensor_kinds, linear_net)}


def draw(out, only=None):
    """Draws all that a result folder can show, or `only`, into <out>/figures;
    the paths, PNG and PDF.

    PlotError without a sound summary.json, for an unknown figure and, with
    the others drawn, for one that cannot be; an unexpected error's traceback
    is on standard error.
    """
    path, folder = Path(out) / "summary.json", Path(out) / "figures"
    for name in only or ():
        if name not in FIGURES:
            raise PlotError(f"unknown figure {name!r}; "
                            f"choose from {', '.join(FIGURES)}")
    if not path.exists():
        raise PlotError(f"{path} is not there; "
                        f"run python sweep.py --out {out} first")
    try:
        summary = json.loads(path.read_text())
        sound = ("linear_net" in summary
                 or all("curves" in row for row in summary["rows"]))
    except (ValueError, LookupError, TypeError):
        sound = False
    if not sound:
        raise PlotError(f"{path} is damaged; "
                        "its command writes it again, and runs nothing twice")

    written, failed = [], []
    for name in only or FIGURES:
        try:
            with plt.rc_context(STYLE):
                fig = FIGURES[name](summary)
                folder.mkdir(exist_ok=True)
                for file in (folder / f"{name}.png", folder / f"{name}.pdf"):
                    fig.savefig(file)
                    fig.set_layout_engine("none")       # one layout serves both
                    written.append(file)
        except Absent as error:
            if only:
                failed.append(f"{name!r} cannot be drawn: {error}")
        except OSError:
            raise
        except Exception as error:
            traceback.print_exc()
            failed.append(f"{name!r} cannot be drawn: {type(error).__name__}")
        plt.close("all")
    if failed:
        raise PlotError(f"{path}: {'; '.join(failed)}")
    return written


def main():
    usage = ("usage: python plots.py RESULT_FOLDER [FIGURE ...]; figures: "
             + ", ".join(FIGURES))
    if sys.argv[1:2] in (["-h"], ["--help"]):
        print(usage, *(f"    {name:14} {figure.__doc__}"
                       for name, figure in FIGURES.items()), sep="\n")
    elif len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        raise PlotError(usage)
    else:
        print(*draw(sys.argv[1], sys.argv[2:]), sep="\n")


if __name__ == "__main__":
    try:
        main()
    except (PlotError, OSError) as error:
        print(f"plots.py: {error}", file=sys.stderr)
        sys.exit(2)
