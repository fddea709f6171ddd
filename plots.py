"""Figures from result files alone: python plots.py out/NAME [out/OTHER ...] [FIGURE ...]
draws what summary.json shows; several sweeps go into one figure, told apart by
the settings in which they differ.

Each function takes a summary (analyze.summary_of) and returns a matplotlib
figure, or raises Absent; `--help` lists them. Figures and propositions are those of
arXiv 2505.22491. Needs numpy and matplotlib only; can be copied alone.

    n width   α exponent in LR ∝ n^-α   S seeds   W widths   K LRs   T steps
    stability edge: between the largest stable and the smallest unstable LR
"""
import functools
import json
import sys
import textwrap
import traceback
from itertools import cycle, product
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import colormaps, cycler
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator

STYLE = {
    "savefig.dpi": 160,
    "font.size": 10, "axes.titlesize": 10.5, "figure.titlesize": 10.5,
    "legend.fontsize": 8.5, "legend.frameon": False,
    "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.alpha": 0.2,
    "lines.linewidth": 1.4, "lines.markersize": 4.5,
}
# The colour-blind-safe set of Okabe and Ito.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# Every colour solid, then every colour dashed, and so on.
LINE_STYLES = cycler(linestyle=("-", "--", ":", "-.")) * cycler(color=COLOURS)
DASHED = {"color": "0.35", "linestyle": "--", "linewidth": 1.1, "zorder": 1}
TRAINED = LinearSegmentedColormap.from_list("trained", ("#0B4F8A", "#6FB1D6", "#E3F0F4"))
# Places of a legend.
BESIDE = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)}
BELOW = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.2)}
REGIMES = {"catastrophic": "#F7DAD3", "controlled divergence": "#FBF1CC", "stable": "#DDEEE3"}
UPDATES = {"effective": "effective ΔW x", "propagating": "propagating W₀ Δx"}
ALIGNMENTS = {"operator_update": "ΔW and x", "operator_propagating": "W₀ and Δx"}
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
# Settings of a sweep, and settings of its curves ("lr" where updates are tracked).
SWEEP = ("model", "data", "hidden_layers", "layers", "steps", "base_width", "sweep")
CURVE = ("loss", "param", "optimizer", "alpha", "norm_affine", "warmup", "lr_factor", "lr")
LABELS = {          # how a setting is written, if not by its name
    "alpha": lambda value: f"α = {value:g}",
    "norm_affine": lambda value: "" if value else "no norm gains",
    "warmup": lambda count: f"{count} warmup steps" if count else "no warmup",
    "lr": lambda value: f"LR {value:g}",
    "lr_factor": lambda factors: f"LR factors {factors}" if factors else "",
    "step": lambda count: counted(count, "step"),
    "steps": lambda count: counted(count, "step"),
    "layers": lambda count: f"GPT, {counted(count, 'layer')}",
    "hidden_layers": lambda count: counted(count, "hidden layer"),
    "base_width": lambda width: f"base width {width}",
}
FIGURES = {}        # {name: figure function}, as @figure registers them


class PlotError(ValueError):
    """What a user can fix: a folder, a figure's name, a summary."""


class Absent(PlotError):
    """The summary has not what a figure shows."""


def figure(function):
    """Register a figure function, and draw it in our style wherever it is called."""
    @functools.wraps(function)
    def in_style(*args, **kwargs):
        with matplotlib.rc_context(STYLE):
            return function(*args, **kwargs)

    FIGURES[function.__name__] = in_style
    return in_style


# ---- rows, and how they are named ----

def require_rows(rows, least=1):
    if len(rows) < least:
        raise Absent("the summary holds nothing of it")
    return rows


def counted(count, noun):
    return f"{count} {noun}{'s' * (count > 1)}"


def label_of(key, value):
    """Return how the value of a setting is written; a $ of a path is no mathematics."""
    text = LABELS[key](value) if key in LABELS else NAMES.get(value, str(value))
    return text.replace("$", r"\$").replace("_", "-") if key in ("data", "model", "sweep") else text


def describe(row, keys):
    """Return the values of these settings, those that are written at all."""
    labels = (label_of(key, value_of(row, key)) for key in keys
              if value_of(row, key) is not None)
    return ", ".join(filter(None, labels))


def value_of(row, key):
    """Return a setting's value; a tracked row's list of steps is none."""
    return None if isinstance(row.get(key), list) else row.get(key)


def unique(rows, key):
    return list(dict.fromkeys(value_of(row, key) for row in rows))


def differing(rows):
    """Return the settings that tell the rows apart."""
    return [key for key in (*SWEEP, *CURVE) if len(unique(rows, key)) > 1]


def curve_label(row, rows):
    """Return the settings that tell a curve from the others, or its loss."""
    return describe(row, differing(rows) or ["loss"])


def shared_label(summary, rows=()):
    """Return what all runs share, and the settings on which `rows` agree."""
    kind = {"mlp": "hidden_layers", "gpt": "layers"}.get(summary["model"], "model")
    keys = ["data", kind, "steps", *(CURVE if rows else ())]
    varying = differing(rows or summary.get("rows", ()))
    shared = describe({**summary, **(rows[0] if rows else {})},
                      [key for key in keys if key not in varying])
    return shared.replace(", no warmup", "")        # the default


def width_factor(row, exponent):
    """Return ' × (n / n0)^exponent', empty without one."""
    return f" × (n / {row['base_width']})$^{{{exponent:g}}}$" if exponent else ""


def signed(value):
    if value is None:
        return "?"
    return f"{value:.2f}".replace("-0.00", "0.00").replace("-", "−")


def power(exponent):
    return f"$n^{{{signed(exponent)}}}$"


def fitted(row, prefix=""):
    """Return 'n^exponent [interval]', empty where nothing was fitted."""
    exponent, (low, high) = row[prefix + "exponent"], row[prefix + "interval"]
    interval = f" [{signed(low)}, {signed(high)}]" if low is not None else ""
    return "" if exponent is None else power(exponent) + interval


def as_floats(values):
    """Return a float array in which null is nan."""
    return np.array(list(values), dtype=float)


def rows_with(rows, **settings):
    return [row for row in rows if all(row[key] == value for key, value in settings.items())]


def sweep_rows(summary):
    """Return the rows of an LR sweep with an optimum; their exponent is the stability edge's."""
    return require_rows([{**row, "exponent": row["max_stable_exponent"],
                          "interval": row["max_stable_interval"],
                          "predicted": row["predicted_max_stable_exponent"]}
                         for row in summary.get("rows", ())
                         if np.isfinite(as_floats(row["optimal_lr"])).any()])


def tracked_rows(summary, name, mlp=True, **settings):
    """Return the rows of a tracked quantity, such as step=1, with a width where all seeds ended."""
    rows = rows_with(summary.get(name, ()), **settings)
    if (summary.get("model") == "mlp") != mlp:
        rows = []
    if len(unique(rows, "hidden_layers")) > 1:
        raise Absent("the networks differ in depth, so that their layers do not match")
    return require_rows([row for row in rows
                         if np.isfinite(geometric_mean(row["values"])).any()])


def groups(rows, *free):
    """Return lists of the rows that agree on every setting but the free ones."""
    of_key = {}
    for row in rows:
        key = tuple(value_of(row, name) for name in (*SWEEP, *CURVE) if name not in free)
        of_key.setdefault(key, []).append(row)
    return list(of_key.values())


def widest_group(rows, *free):
    """Return the group with most values of the first free setting."""
    return max(groups(rows, *free), key=lambda group: len(unique(group, free[0])))


def geometric_mean(values):
    """(S, W) -> (W,) over the seeds; nan where a seed has no positive value."""
    values = as_floats(values)
    return np.exp(np.log(np.where(values > 0, values, np.nan)).mean(0))


def fit_line(widths, values, exponent):
    """Return value ~ width^exponent through the geometric mean of the values (W,)."""
    logs = exponent * np.log(widths)
    return np.exp(np.nanmean(np.log(values) - logs) + logs)


def slope(widths, values):
    """Return the least-squares exponent of value ~ width^exponent; None below two widths."""
    ok = np.isfinite(values)
    return (np.polyfit(np.log(widths)[ok], np.log(values[ok]), 1)[0] if ok.sum() > 1 else None)


def edge_of(row):
    """Return (W,) geometric means of the stability edge's bracket."""
    return np.sqrt(as_floats(row["max_stable_lr"]) * as_floats(row["min_unstable_lr"]))


# ---- panels, axes and lines ----

def panels(count, width, height, columns=3, ylabel="", **kwargs):
    """Return (fig, axes (rows, columns)); a panel has `width` by `height` inches."""
    columns = min(count, columns)
    rows = -(-count // columns)
    fig = Figure(figsize=(width * columns + 0.6, height * rows + 0.4), layout="constrained")
    axes = fig.subplots(rows, columns, squeeze=False, **kwargs)
    for ax in axes[:, 0]:
        ax.set_ylabel(ylabel)
    for ax in axes.flat[count:]:
        ax.set_visible(False)
    return fig, axes


def layer_panels(summary, rows, kinds, height):
    """Return (fig, {kind: axes of the layers}); those without a row are hidden."""
    layers = summary["hidden_layers"] + 1
    fig, axes = panels(2 * layers, 2.75, height, layers)
    for line, (kind, symbol) in zip(axes, kinds.items()):
        for layer, ax in enumerate(line):
            name = "readout" if layer == layers - 1 else f"layer {layer + 1}"
            ax.set(title=f"{name}: {symbol}",
                   visible=bool(rows_with(rows, kind=kind, layer=layer)))
    return fig, dict(zip(kinds, axes))


def finish(fig, title, legend=None):
    """Add the title in lines that fit, height for long legends, and one legend of all
    if it has a title; return the figure."""
    lines = [len(ax.get_legend().texts) for ax in fig.axes if ax.get_legend()]
    height = 0.2 * max(lines, default=0) + 2.4          # inches a panel
    fig.set_figheight(max(fig.get_figheight(), height * fig.axes[0].get_gridspec().nrows))
    fig.suptitle(textwrap.fill(title, int(12.5 * fig.get_figwidth()), break_long_words=False,
                               break_on_hyphens=False))

    handles = {}        # {label: handle}; of several, the first panel's
    for ax in fig.axes[::-1]:
        handles.update(zip(*ax.get_legend_handles_labels()[::-1]))
    if legend:
        fig.legend(handles.values(), handles, title=legend, loc="outside right center")
    return fig


def loss_colour(loss):
    """Return the colour of a loss, the same in every figure; black if it has no name."""
    return COLOURS[list(NAMES).index(loss) % 7] if loss in NAMES else COLOURS[-1]


def width_styles(rows):
    """Return {width: its colour and label}, dark is wide."""
    widths = sorted({width for row in rows for width in row["widths"]})
    colours = colormaps["viridis_r"](np.linspace(0.12, 1.0, len(widths)))
    return {width: {"color": color, "label": f"{width}"} for width, color in zip(widths, colours)}


def width_axis(ax, widths, legend=None, yscale="log", **kwargs):
    """Set ticks at the widths, every other or as powers of two where they crowd, and a
    legend if asked."""
    widths = sorted(set(map(int, widths)), reverse=True)
    doubling = widths[0] > 5000 and all(width.bit_count() == 1 for width in widths)
    ax.set(**{"xscale": "log", "yscale": yscale, "xlabel": "width n", **kwargs})
    ax.xaxis.set_major_locator(FixedLocator(widths[::1 if len(widths) <= 7 else 2]))
    ax.xaxis.set_major_formatter(
        lambda value, _: f"$2^{{{np.log2(value):.0f}}}$" if doubling else f"{value:g}")
    ax.set_xticks([], minor=True)

    if yscale == "log":
        low, high = ax.get_ylim()
        if high < 1.1 * low:            # constant to rounding
            ax.set_ylim(low / 1.5, high * 1.5)
        log_ticks(ax.yaxis)
    if legend and ax.lines:
        ax.legend(**legend)


def log_ticks(axis):
    """Set plain labels where a log axis spans less than two decades, closer on a shorter one."""
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
    """Draw points (W,), a fit through them if there is one, and a predicted slope above."""
    ink = dict(color=color, marker=marker, mfc="white", mew=1.3)
    ax.plot(widths, values, zorder=3, **ink, ls="none")
    if exponent is not None:
        ax.plot(widths, fit_line(widths, values, exponent), color=color, ls=linestyle)
    # The legend shows point and line in one.
    ax.plot([], label=label, **ink, ls="none" if exponent is None else linestyle)
    if predicted is not None and np.isfinite(values).any():
        ax.plot(widths, 1.5 * fit_line(widths, values, predicted), **DASHED)


def exponent_points(ax, x, rows, ticks=0.0, **kwargs):
    """Draw measured exponents at x (N,), 95 % intervals as bars, and predictions as ticks."""
    numbers = ([row["exponent"], *row["interval"], row["predicted"]] for row in rows)
    y, low, high, predicted = as_floats(numbers).T
    ax.errorbar(x, y, (y - low, high - y), fmt="o", mfc="white", elinewidth=1, **kwargs)
    if ticks:
        ax.hlines(predicted, x - ticks / 2, x + ticks / 2,
                  color=kwargs["color"], lw=2.4, alpha=0.45)


def categories(ax, labels):
    """Name the places 0, 1, ... of the x axis."""
    ax.set_xticks(range(len(labels)), labels)
    ax.grid(axis="x", visible=False)


def beside(i, count, space):
    """Return by how much the i-th of `count` series lies beside the middle."""
    return space * (i - (count - 1) / 2)


def loss_line(ax, lr, losses, edge, color, label):
    """Draw the seed mean of losses (S, K) against LR, a band over the seeds, and the
    stability edge dotted; the line ends where a seed diverged."""
    ok = np.isfinite(losses).all(0)
    values = losses[:, ok]
    ax.plot(lr[ok], values.mean(0), "o-", ms=2.6, color=color, label=label, zorder=3)
    ax.fill_between(lr[ok], values.min(0), values.max(0), color=color, alpha=0.18, lw=0)
    ax.axvline(edge, color=color, ls=":", lw=1)


# ---- sweeps of the learning rate ----

@figure
def lr_transfer(summary):
    """loss against LR, a line per width; also rescaled by the prediction if few (Fig. 5)"""
    rows = sweep_rows(summary)
    few, styles = len(rows) <= 4, width_styles(rows)
    count, columns = len(rows) * (1 + few), len(rows) if few else 3
    fig, axes = panels(count, 3.3, 2.8, columns, "final train loss")
    for ax, row in zip(axes.flat, rows):
        ax.set_title(curve_label(row, rows))
        loss_panel(ax, row, 0.0, styles)
    for ax, row in zip(axes[1] if few else (), rows):
        loss_panel(ax, row, row["predicted"] or 0.0, styles)
    return finish(fig, f"{shared_label(summary)}. Dotted: stability edge. "
                       "Dashed: constant predictor", legend="width")


def loss_panel(ax, row, exponent, styles):
    """Draw the losses of one curve against LR × (n / n0)^-exponent."""
    low, chance = np.inf, row["chance_loss"]
    for width, curve, edge in zip(row["widths"], row["curves"], edge_of(row)):
        factor = (width / row["base_width"]) ** -exponent
        losses = as_floats(curve["train_loss"])            # (S, K)
        loss_line(ax, as_floats(curve["lr"]) * factor, losses, edge * factor, **styles[width])
        low = np.nanmin(losses, initial=low)
    ax.set(xscale="log", xlabel="learning rate" + width_factor(row, -exponent))
    log_ticks(ax.xaxis)
    ax.axhline(chance, **DASHED)
    ax.set_ylim(low - 0.05 * chance, 1.25 * chance)


@figure
def exponents(summary):
    """optimal and largest stable LR against width, fits and predicted slope (Fig. 5, right)"""
    rows = sweep_rows(summary)
    fig, axes = panels(len(rows), 3.4, 3.6, ylabel="learning rate", sharey="row")
    for ax, row, color in zip(axes.flat, rows, cycle(COLOURS)):
        edge, widths, predicted = edge_of(row), row["widths"], row["predicted"]
        if np.isfinite(edge).any():
            bars = (edge - as_floats(row["max_stable_lr"]),
                    as_floats(row["min_unstable_lr"]) - edge)
            ax.errorbar(widths, edge, bars, color=color, fmt="none",
                        capsize=3, elinewidth=1.6,
                        label=f"largest stable LR {fitted(row)}")
            trend(ax, widths, edge, row["exponent"], None, color,
                  marker="", predicted=predicted)
            ax.plot([], **DASHED, label=f"predicted slope {power(predicted)}")

        label = f"optimal LR {fitted(row, 'optimal_')}"
        trend(ax, widths, as_floats(row["optimal_lr"]), row["optimal_exponent"],
              label, color, ":")
        beyond = fan(ax, row, summary["at"], color) if summary.get("at") else []
        width_axis(ax, [*widths, *beyond], BELOW, title=curve_label(row, rows))
        ax.margins(x=0.08, y=0.12)

        # The edge's slope from each width to the next, where there is room.
        if not beyond:
            for low, high, local in zip(widths, widths[1:], row.get("local_max_stable", ())):
                if local is not None:
                    ax.text(np.sqrt(low * high), 0.02, signed(local),
                            ha="center", fontsize=8, color="0.35",
                            transform=ax.get_xaxis_transform())
    last = ("Shaded: 95 % prediction intervals of the edge; dotted: of the optimum."
            if summary.get("at") else "At the bottom: the edge's slopes.")
    title = (f"{shared_label(summary)}. Bars: largest stable to smallest unstable LR. "
             f"Legend: exponent [95 % interval]. {last}")
    return finish(fig, title)


def fan(ax, row, at, color):
    """Draw 95 % prediction intervals at other widths and the recommended rates; return
    those widths."""
    here = rows_with(at, **{key: row[key] for key in (*SWEEP, *CURVE)
                            if key in row and key in at[0]})
    widths = [entry["width"] for entry in here]
    if not here:
        return widths
    for kind, hatch, alpha in (("max_stable", None, 0.25), ("optimal", "....", 0.0)):
        rates = as_floats(entry[kind].get("predicted", entry[kind]["fitted"]) for entry in here)
        ax.fill_between(widths, rates[:, 1], rates[:, 2], fc=(*to_rgb(color), alpha), ec=color,
                        hatch=hatch, lw=0.5, zorder=0)
    ax.plot(widths, as_floats(entry["recommended"] for entry in here), "*", color="black",
            ms=9, zorder=5, label="recommended")
    return widths


def regular(row):
    """Whether there are three widths or more with eight LRs or more in equal steps: a grid."""
    steps = [np.diff(np.log(curve["lr"])) for curve in row["curves"]]
    equal = (len(step) > 6 and np.ptp(step) < 0.01 * step.mean() for step in steps)
    return len(steps) > 2 and all(equal)


def relative_loss(row, curve):
    """Return (K,) seed-mean losses over the constant predictor's; inf where a seed diverged."""
    losses = as_floats(curve["train_loss"]).mean(0)
    return np.nan_to_num(losses, nan=np.inf) / row["chance_loss"]


@figure
def phase(summary):
    """a grid of LRs at every width: trains, at chance or diverges; the edge as a staircase"""
    rows = require_rows([row for row in sweep_rows(summary) if regular(row)])
    fig, axes = panels(len(rows), 3.5, 4.1, ylabel="learning rate", sharey=True)
    low = min(relative_loss(row, curve).min() for row in rows for curve in row["curves"])
    norm = Normalize(low, 1.0)
    for ax, row in zip(axes.flat, rows):
        phase_map(ax, row, norm)
        slopes = f"edge {power(row['exponent'])}, predicted {power(row['predicted'])}"
        width_axis(ax, row["widths"], title=f"{curve_label(row, rows)}\n{slopes}")
    colours = ScalarMappable(norm, TRAINED)
    fig.colorbar(colours, ax=axes, label="loss / constant predictor's", shrink=0.6)
    fig.legend(*axes[0, 0].get_legend_handles_labels(),
               loc="outside lower center", ncols=min(len(rows) + 1, 3))
    return finish(fig, shared_label(summary))


def phase_map(ax, row, norm):
    """Draw cells that train in colour, at chance hatched, diverged crossed."""
    widths, edge = as_floats(row["widths"]), edge_of(row)
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

    best = as_floats(row["optimal_lr"])
    ax.plot(widths, best, "o", color="black", mfc="white", zorder=5, label="optimum")
    ax.stairs(edge, bounds, baseline=None, color="black", lw=2.2, zorder=3,
              label="stability edge")
    if row["predicted"] is not None and np.isfinite(edge).any():
        line = fit_line(widths, edge, row["predicted"])
        ax.plot(widths, line, "--", color=COLOURS[1], lw=2, zorder=4, label="predicted slope")
    ax.margins(0)
    ax.grid(False)


@figure
def bounded(summary):
    """edge exponents of four losses or more beside predictions; the loss at the widest net"""
    rows = require_rows(widest_group(sweep_rows(summary), "loss"), least=4)
    rows = sorted(rows, key=lambda row: -(row["predicted"] or 0.0))
    fig, ((left, right),) = panels(2, 4.6, 3.4)
    for place, row in enumerate(rows):
        color, curve = loss_colour(row["loss"]), row["curves"][-1]
        exponent_points(left, as_floats([place]), [row], ticks=0.7, color=color, capsize=3)
        left.axhline(*as_floats([row["predicted"]]), **DASHED)     # None: no line
        values = relative_loss(row, curve)[None]                # (1, K)
        loss_line(right, as_floats(curve["lr"]), values, edge_of(row)[-1],
                  color, label_of("loss", row["loss"]))

    categories(left, [label_of("loss", row["loss"]).replace(" ", "\n") for row in rows])
    left.set(ylabel="exponent of the largest stable LR",
             title="ticks: predicted, bars: 95 % intervals")
    right.axhline(1.0, **DASHED)
    right.set(xscale="log", xlabel="learning rate", ylabel="loss / constant predictor's",
              title=f"width {rows[0]['widths'][-1]}; dotted: stability edge")
    right.set_ylim(top=1.25)
    log_ticks(right.xaxis)
    return finish(fig, shared_label(summary, rows), legend="loss")


@figure
def losses(summary):
    """best validation accuracy over LR against width, a line per loss (Fig. 7)"""
    rows = sweep_rows(summary)
    losses_shown = require_rows(unique(rows, "loss"), least=3)
    each = groups(rows, "loss")
    title_keys = [key for key in differing(rows) if key != "loss"] or ["param"]
    fig, axes = panels(len(each), 3.2, 3.1, ylabel="best validation accuracy (%)", sharey=True)
    for ax, group in zip(axes.flat, each):
        for row in group:
            seeds = 100 * as_floats(row["best_val_accuracy"])          # (W, S)
            mean = seeds.mean(1)
            bars = mean - seeds.min(1), seeds.max(1) - mean
            # The losses side by side, 5 % apart.
            place = losses_shown.index(row["loss"])
            factor = 1.05 ** beside(place, len(losses_shown), 1)
            ax.errorbar(as_floats(row["widths"]) * factor, mean, bars, fmt="o-", capsize=2.5,
                        color=loss_colour(row["loss"]), label=label_of("loss", row["loss"]))
        width_axis(ax, group[0]["widths"], yscale="linear", title=describe(group[0], title_keys))
    return finish(fig, f"{shared_label(summary)}. Points: means, bars: ranges of the seeds",
                  legend="loss")


@figure
def calibration(summary):
    """expected calibration error and logits at the optimal LR against width, under CE"""
    rows = [row for row in sweep_rows(summary) if (row["model"], row["loss"]) == ("mlp", "ce")]
    require_rows(unique(rows, "param"), least=2)
    fig, axes = panels(2, 5.2, 3.2)
    measures = {"val_ece": "expected calibration error", "logit_rms": "RMS of the logits"}
    for ax, (key, ylabel) in zip(axes.flat, measures.items()):
        for row, style in zip(rows, LINE_STYLES()):
            widths, dots = row["widths"], as_floats(row["at_optimum"][key])        # (W, S)
            mean = geometric_mean(dots.T)
            exponent = slope(widths, mean)
            if (dots > 0).any():
                label = curve_label(row, rows) + ("" if exponent is None
                                                  else f": {power(exponent)}")
                ax.plot(widths, np.where(dots > 0, dots, np.nan), "o", color=style["color"],
                        ms=3, alpha=0.5)
                trend(ax, widths, mean, exponent, label, **style)
        width_axis(ax, width_styles(rows), BESIDE, ylabel=ylabel)
    return finish(fig, f"{shared_label(summary, rows)} at the optimal LR; a dot per seed")


@figure
def regimes(summary):
    """exponents of logits and effective updates against α, on predicted lines (Prop. 1, 2)"""
    shown = widest_group(tracked_rows(summary, "updates"), "alpha", "loss")
    require_rows(unique(shown, "alpha"), least=3)
    losses_shown, steps = unique(shown, "loss"), unique(shown, "step")
    fig, axes = panels(len(steps) * len(losses_shown), 4.2, 3.2, len(losses_shown),
                       "width exponent", sharex=True, sharey=True)
    for ax in axes[-1]:
        ax.set_xlabel("α (learning rate ∝ $n^{-α}$)")
    for ax, (step, loss) in zip(axes.flat, product(steps, losses_shown)):
        here = rows_with(shown, step=step, loss=loss)
        shade_regimes(ax, {row["alpha"]: row["regime"] for row in here})
        exponents_over_alpha(ax, here, summary["hidden_layers"])
        ax.set_title(f"{label_of('loss', loss)}, after {counted(step, 'step')}", pad=24)

    predicted = [row["predicted"] for row in shown if row["predicted"] is not None] or [0.0]
    axes[0, 0].set_ylim(min(predicted) - 0.25, min(max(predicted), 1.6) + 0.75)
    title = (f"{shared_label(summary, shown)} "
             f"× (n / {summary['base_width']})$^{{-α}}$")
    # Where divergence feeds back, later steps have but lower bounds.
    bound = any(row.get("lower_bound") for row in shown)
    below = "\n(later steps, red:\nlower bounds)" if bound else ""
    return finish(fig, title, legend=f"lines: predicted{below}\npoints: measured")


def shade_regimes(ax, regime):
    """Colour the background by each α's regime, its name above; regime: {α: name}."""
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
    """Draw the four kinds of change in an MLP whose readout is layer `readout`."""
    series = {
        "logits' change": ("logits", [readout + 1]),
        "output update": ("effective", [readout]),
        "hidden updates": ("effective", range(1, readout)),
        "input update": ("effective", [0]),
    }
    for i, (label, (kind, layers)) in enumerate(series.items()):
        of_kind = [row for row in rows_with(rows, kind=kind) if row["layer"] in layers]
        line = {row["alpha"]: row["predicted"] for row in of_kind}
        ax.plot(list(line), as_floats(line.values()), color=COLOURS[i])
        measured = [row for row in of_kind if row["exponent"] is not None]
        if measured:
            x = as_floats(row["alpha"] for row in measured) - beside(i, 4, 0.02)
            exponent_points(ax, x, measured, color=COLOURS[i], label=label)


@figure
def course(summary):
    """logits' change, hidden update and loss over the first steps, a line per width"""
    rows = require_rows([row for row in summary.get("course", ()) if len(row["steps"]) > 5])
    rows = widest_group(rows, "loss")
    lines = {kind: as_floats(line for row in rows for line in row[kind])
             for kind in COURSE}                        # (N, T) each
    kinds = require_rows([kind for kind in COURSE if (lines[kind][:, 0] > 0).any()])
    fig, axes = panels(len(kinds) * len(rows), 2.9, 2.2, len(rows), sharex=True, sharey="row")
    styles = width_styles(rows)
    for ax, (kind, row) in zip(axes.flat, product(kinds, rows)):
        values, (low, top) = as_floats(row[kind]), course_range(lines[kind])
        for width, line in zip(row["widths"], values):          # values (W, T)
            course_line(ax, row["steps"], line, top, **styles[width])
        # the logits jump in one of the first steps, hidden updates are predicted for the first
        early = 3 if kind == "logits_change" else 1
        exponent = slope(row["widths"], geometric_mean([values[:, :early].max(1)]))
        if exponent is not None and kind != "train_loss":
            label = f"largest of\nthe first {early}" if early > 1 else "step 1"
            ax.text(0.97, 0.95, f"{label}: {power(exponent)}",
                    transform=ax.transAxes, ha="right", va="top")
        ax.set(xscale="log", yscale="log",
               xlim=(0.8, 1.2 * row["steps"][-1]), ylim=(low, top),
               xlabel="step", ylabel=COURSE[kind], title=label_of("loss", row["loss"]))
        log_ticks(ax.xaxis)
        ax.label_outer()
    for ax in axes[1:].flat:
        ax.set_title("")
    return finish(fig, f"{shared_label(summary, rows)}. "
                       "Triangles: beyond the panel or not finite", legend="width")


def course_range(lines):
    """Return (low, top) for lines (N, T): all that settle, the start of most others."""
    lines = lines[lines[:, 0] > 0]
    first = lines[:, 0]
    # A line with nan is not calm.
    calm = lines[lines.max(1) < 1e4 * first].max(initial=first.min())
    top = 3 * np.sqrt(calm * max(calm, first.max()))
    return lines[(lines > 0) & (lines < top)].min() / 1.5, top


def course_line(ax, steps, values, top, **kwargs):
    """Draw a line (T,), and a mark where it ends: at a step above `top` or not finite."""
    end = np.argmax([*~(values < top), True])           # T if it never is
    ax.plot(steps[:end + 1], [*values[:end], top][:len(steps)], **kwargs)
    if end < len(steps) and np.isfinite(values[0]):
        ax.plot(steps[end], top, "^", color=kwargs["color"], ms=5, clip_on=False, zorder=4)


@figure
def updates(summary, step=1):
    """effective and propagating updates by layer against width, after step 1 (Fig. 4)"""
    rows = [row for row in tracked_rows(summary, "updates", step=step) if row["kind"] in UPDATES]
    rows = rows_with(require_rows(rows), loss=rows[0]["loss"], lr=rows[0]["lr"])
    rows = [row for row in rows if row["alpha"] in (0.0, 0.5, 1.0)] or rows
    fig, axes = layer_panels(summary, rows, UPDATES, 3.0)
    for curve, style in zip(groups(rows), LINE_STYLES()):
        for row in curve:
            ax, exponent = axes[row["kind"]][row["layer"]], row["exponent"]
            label = f"{curve_label(row, rows)}: {signed(exponent)} ({signed(row['predicted'])})"
            trend(ax, row["widths"], geometric_mean(row["values"]), exponent, label, **style)
            width_axis(ax, row["widths"], BELOW)
    return finish(fig, f"{shared_label(summary, rows)}. RMS of the updates after "
                       f"{counted(step, 'step')}; exponents: measured (predicted)")


@figure
def later_updates(summary):
    """the same after the last step"""
    require_rows(range(summary.get("steps", 0)), least=2)
    return updates(summary, summary["steps"])


@figure
def alignment(summary):
    """operator-norm alignment of ΔW with x, W0 with Δx over steps, a line per width (Fig. 2)"""
    rows = summary.get("alignment", ()) if summary.get("model") == "mlp" else ()
    rows = [row for row in rows
            if len(row["steps"]) > 5 and (as_floats(row["values"]) > 0).any()]
    curve = groups(require_rows(rows))[0]
    fig, axes = layer_panels(summary, curve, ALIGNMENTS, 2.3)
    for row in curve:
        ax = axes[row["kind"]][row["layer"]]
        ax.set(xscale="log", ylim=(0, 1.05), xlabel="step")
        for style, values in zip(width_styles(curve).values(), as_floats(row["values"])):  # (W, T)
            ax.plot(row["steps"], values, **style)
        log_ticks(ax.xaxis)
    return finish(fig, f"{shared_label(summary, curve)}. Operator-norm alignment", legend="width")


@figure
def limit(summary):
    """spread of the features' kernels over initializations, and the features' change (Prop. 2)"""
    rows = require_rows(summary.get("limit", ()))
    fig, ((left, right),) = panels(2, 4.6, 3.4)
    for curve, color in zip(groups(rows), cycle(COLOURS)):
        exponents_shown = ", ".join(signed(row["exponent"]) for row in curve)
        label = f"{describe(curve[0], differing(rows) or ['alpha'])}: {exponents_shown}"
        for row, marker in zip(curve, cycle("os^Dv")):
            trend(left, row["widths"], as_floats(row["values"]), row["exponent"],
                  label if row is curve[0] else None, color, marker=marker)
            change = np.nanmean(as_floats(row["change"]), 0)
            right.plot(row["widths"], change, color=color, marker=marker, mfc="white")
            if color == COLOURS[0]:
                right.plot([], color="0.35", marker=marker, mfc="white", ls="none",
                           label=f"hidden layer {row['layer']}")
    widths = rows[0]["widths"]
    width_axis(left, widths, {"title": "exponents by layer"},
               ylabel="relative spread of kernels\nover initializations")
    line = fit_line(widths, as_floats(rows[0]["values"]), -0.5)
    left.plot(widths, 1.6 * line, **DASHED)
    width_axis(right, widths, BESIDE, ylabel="relative change of features")
    return finish(fig, f"{shared_label(summary, rows)}. Dashed: $n^{{-1/2}}$")


@figure
def binding(summary):
    """edge exponents with the learning rate of one role or tensor frozen in turn, and predicted"""
    rows = sweep_rows(summary)
    frozen = require_rows(unique(rows, "lr_factor"), least=3)
    keys = [key for key in differing(rows) if key != "lr_factor"]
    each = groups(rows, "lr_factor")
    fig, ((ax,),) = panels(1, 1.3 * len(frozen) + 1.5, 3.4,
                           ylabel="exponent of the largest stable LR")
    for i, group in enumerate(each):
        space = 0.7 / len(each)
        x = as_floats(frozen.index(row["lr_factor"]) for row in group)
        exponent_points(ax, x + beside(i, len(each), space), group, ticks=0.9 * space,
                        color=COLOURS[i % 7], capsize=3, label=describe(group[0], keys or ["loss"]))
    ax.axhline(0, color="0.4", lw=0.8)
    # an interval may be as wide as it likes; all points and predictions are in view
    shown = as_floats([row[key] for row in rows] for key in ("exponent", "predicted"))
    ax.set_ylim(np.nanmin(shown) - 0.7, np.nanmax(shown) + 0.7)
    names = [value.replace("=0", "").replace(" ", " and\n") for value in frozen]
    categories(ax, [f"{name}\nfrozen" if name else "all\ntrained" for name in names])
    return finish(fig, shared_label(summary, rows), legend="ticks: predicted\nbars: 95 % intervals")


@figure
def tensor_kinds(summary):
    """exponents of a GPT's updates after one step by kind of tensor, over the layers"""
    rows = tracked_rows(summary, "updates", mlp=False, step=1)
    rows = require_rows([row for row in rows
                 if row["kind"] in UPDATES and row["exponent"] is not None])
    # A tensor's kind is the end of its module's name: up of blocks.1.up.
    tensors = list(dict.fromkeys(row["module"].split(".")[-1] for row in rows))
    each = groups(rows)
    space = min(0.26, 0.8 / len(each))
    fig, axes = panels(2, 0.78 * len(tensors) + 1.8, 2.6, 1, "width exponent", sharex=True)
    for ax, (kind, symbol) in zip(axes.flat, UPDATES.items()):
        for i, curve in enumerate(each):
            here = rows_with(curve, kind=kind)
            if here:
                x = as_floats(tensors.index(row["module"].split(".")[-1]) for row in here)
                exponent_points(ax, x + beside(i, len(each), space), here, ticks=0.9 * space,
                                color=COLOURS[i % 7], label=curve_label(here[0], rows))
        ax.axhline(0, color="0.4", lw=0.8)
        ax.set_title(symbol)
        categories(ax, [tensor.replace("_", "\n") for tensor in tensors])
    return finish(fig, f"{shared_label(summary, rows)}. Updates of one step",
                  legend="ticks: predicted\npoints: measured")


@figure
def linear_net(summary):
    """closed-form linear net: largest stable LR, distance to limit, one-step loss (C.2-C.4)"""
    parts = require_rows(summary.get("linear_net", ()))
    titles = {
        "edges": "largest stable learning rate",
        "distance": "distance to the infinite-width limit",
        "one_step": "|loss decrease| after one step",
    }
    fig, axes = panels(3, 3.4, 4.6)
    for ax, (part, title) in zip(axes.flat, titles.items()):
        for i, row in enumerate(parts[part]):
            name = describe(row, ("param", "alpha", "step", "warmup"))
            name += width_factor(row, row.get("warmup_exponent"))
            name += f": {fitted(row)}"
            values = (edge_of(row) if part == "edges" else geometric_mean(row["values"]))
            # The distances share one prediction.
            predicted = None if part == "distance" and i else row["predicted"]
            trend(ax, row["widths"], values, row["exponent"], name,
                  COLOURS[i % 7], marker="os^Dv"[i % 5], predicted=predicted)
        width_axis(ax, row["widths"], BELOW, title=title)
    return finish(fig, "Closed-form linear net f = x uᵀv, one sample, squared loss. "
                       "Lines: fits, with 95 % intervals. Dashed: predicted slopes")


# ---- result folders ----

def load_summary(out):
    """Return the summary of a result folder; PlotError if it is missing or damaged."""
    path = Path(out) / "summary.json"
    if not path.exists():
        raise PlotError(f"{path} is missing; run python sweep.py --out {out} first")
    try:
        summary = json.loads(path.read_text())
        sound = ("linear_net" in summary or all("curves" in row for row in summary["rows"]))
    except (ValueError, LookupError, TypeError):
        sound = False
    if not sound:
        raise PlotError(f"{path} is damaged; its command writes it again, and runs nothing twice")
    return summary


def merge(summaries):
    """Return one summary of several, {name: summary}: each row has its sweep's settings and,
    where those do not tell the sweeps apart, its sweep's name."""
    settings = {sweep: {name: summary.get(name) for name in SWEEP[:-1]}
                for sweep, summary in summaries.items()}
    if len({tuple(values.values()) for values in settings.values()}) < len(summaries):
        for sweep, values in settings.items():
            values["sweep"] = sweep
    merged = dict(next(iter(summaries.values())))
    for key in ("rows", "updates", "alignment", "course", "limit", "at"):
        merged[key] = [{**settings[sweep], **row} for sweep, summary in summaries.items()
                       for row in summary.get(key, ())]
    return merged


def draw(*outs, only=()):
    """Draw all that result folders can show together, or the figures in `only`, into the
    first one's figures/; return the paths, PNG and PDF.

    PlotError without a sound summary.json, for an unknown figure and, with the others drawn,
    for one that cannot be; an unexpected error's traceback is on standard error.
    """
    for name in only:
        if name not in FIGURES:
            raise PlotError(f"unknown figure {name!r}; choose from {', '.join(FIGURES)}")
    outs = [Path(out) for out in outs]
    short = len({out.name for out in outs}) == len(outs)
    summaries = {out.name if short else str(out): load_summary(out) for out in outs}
    summary = merge(summaries) if len(outs) > 1 else next(iter(summaries.values()))
    folder = outs[0] / "figures"
    if len(outs) > 1:
        folder /= "with_" + "_".join(out.name for out in outs[1:])

    written, failed = [], []
    for name in only or FIGURES:
        try:
            fig = FIGURES[name](summary)
            folder.mkdir(exist_ok=True, parents=True)
            with matplotlib.rc_context(STYLE):
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
    if failed:
        raise PlotError(f"{', '.join(summaries)}: {'; '.join(failed)}")
    return written


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    usage = ("usage: python plots.py RESULT_FOLDER [RESULT_FOLDER ...] [FIGURE ...]; figures: "
             + ", ".join(FIGURES))
    if argv[:1] in (["-h"], ["--help"]):
        print(usage, *(f"    {name:14} {function.__doc__}"
                       for name, function in FIGURES.items()), sep="\n")
    elif not argv or argv[0].startswith("-"):
        raise PlotError(usage)
    else:
        folders = [word for i, word in enumerate(argv) if i == 0 or Path(word).is_dir()]
        print(*draw(*folders, only=[word for word in argv if word not in folders]), sep="\n")


if __name__ == "__main__":
    try:
        main()
    except (PlotError, OSError) as error:
        print(f"plots.py: {error}", file=sys.stderr)
        sys.exit(2)
