"""Figures from result files alone: python plots.py out/NAME [FIGURE ...] draws what out/NAME/summary.json can show.

    of an LR sweep        lr_transfer exponents optimal_lr phase bounded losses calibration
    of tracked runs       regimes course updates later_updates alignment limit tensor_kinds      (sweep.py --track)
    of linear_net.py      linear_net

Each function takes the content of summary.json and returns a matplotlib figure; Absent where the summary has not what
it shows. `python plots.py --help` says what that is. Figures and propositions are those of arXiv 2505.22491.

    n width   α exponent in LR ∝ n^-α   S seeds   W widths   K LRs   T steps
    edge: between the largest stable and the smallest unstable LR

Widths are a sequential colour, curves the colour-blind-safe set of Okabe and Ito. Needs numpy and matplotlib only.
"""
import json
import sys
import textwrap
import traceback
from pathlib import Path

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

STYLE = {
    "figure.dpi": 160, "savefig.dpi": 160, "figure.constrained_layout.use": True,
    "font.size": 10, "axes.titlesize": 10.5, "figure.titlesize": 10.5, "legend.fontsize": 8.5,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
    "axes.grid": True, "grid.alpha": 0.25, "grid.linewidth": 0.6, "lines.linewidth": 1.4, "lines.markersize": 4.5,
}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
TRAINED = LinearSegmentedColormap.from_list("trained", ("#0B4F8A", "#6FB1D6", "#E3F0F4"))
REGIMES = {"catastrophic": "#F7DAD3", "controlled divergence": "#FBF1CC", "stable": "#DDEEE3"}
UPDATES = {"effective": "ΔW x", "propagating": "W₀ Δx"}
ALIGNMENTS = {"operator_update": "ΔW and x", "operator_propagating": "W₀ and Δx"}
COURSE = {"logits_change": "logits' change (RMS)", "hidden_update": "hidden effective\nupdate (RMS)",
          "train_loss": "train loss"}
NAMES = {
    "ce": "CE", "mse": "MSE", "brier": "Brier", "huber": "Huber", "hinge": "hinge", "squared_hinge": "squared hinge",
    "sp": "SP", "ntp": "NTP", "mup": "µP", "sp_full_align": "SP-full-align", "sgd": "SGD", "adam": "Adam",
    "sp_full_align_large_readout": "SP-full-align (large readout)",
}
CURVE = ("loss", "param", "optimizer", "alpha", "norm_affine", "warmup")
SETTINGS = CURVE + ("lr",)          # rows of an LR sweep have no "lr", tracked entries do
WORDS = {                           # how a setting is written, if not by its name
    "alpha": lambda value: f"α = {value:g}",
    "norm_affine": lambda value: "" if value else "no norm gains",
    "warmup": lambda value: f"{value} warmup steps" if value else "no warmup",
    "lr": lambda value: f"LR {value:g}",
    "step": lambda value: f"{value} step{'s' * (value > 1)}",
}


class PlotError(ValueError):
    """What a user can mend: a folder, a figure's name, a summary that cannot be drawn."""


class Absent(PlotError):
    """The summary has not what a figure shows."""


def some(entries, least=1):
    if len(entries) < least:
        raise Absent("the summary holds nothing of it")
    return entries


def named(value):
    return NAMES.get(value, str(value))


def words(entry, keys):
    said = [WORDS.get(key, named)(entry[key]) for key in keys if entry.get(key) is not None]
    return ", ".join(word for word in said if word)


def differing(entries):
    return [key for key in SETTINGS if len({entry.get(key) for entry in entries}) > 1]


def name_of(entry, entries):
    """What tells this curve from the others: the settings that differ among them, or its loss."""
    return words(entry, differing(entries) or ["loss"])


def shared(entries):
    """The settings on which all curves agree."""
    hidden = differing(entries) + ["warmup"] * (not entries[0].get("warmup"))
    return words(entries[0], [key for key in SETTINGS if key not in hidden])


def setting(summary, steps=True):
    """What all runs of a sweep have in common."""
    depth = {"mlp": f"{summary['hidden_layers']} hidden layers", "gpt": f"GPT, {summary['layers']} layers"}
    model = depth.get(summary["model"], summary["model"])
    return f"{summary['data'].replace('_', '-')}, {model}" + (f", {summary['steps']} steps" if steps else "")


def signed(value):
    return "?" if value is None else f"{round(value, 2) + 0.0:.2f}".replace("-", "−")         # + 0.0: no minus zero


def power(exponent):
    return f"$n^{{{signed(exponent)}}}$"


def fitted(exponent, interval):
    """'n^exponent [interval]', empty where nothing was fitted."""
    if exponent is None:
        return ""
    low, high = interval
    return power(exponent) + (f" [{signed(low)}, {signed(high)}]" if low is not None else "")


def floats(values):
    """A float array in which null is nan."""
    return np.array(list(values), dtype=float)


def curves(summary):
    """The rows of an LR sweep that have an optimum at all."""
    return some([row for row in summary.get("rows", ()) if any(lr is not None for lr in row["optimal_lr"])])


def tracked(summary, name, mlp=True, **wanted):
    """The entries of a tracked quantity, such as step=1, that have a width at which no seed diverged."""
    found = summary.get(name, ()) if (summary.get("model") == "mlp") == mlp else ()
    found = [entry for entry in found if all(entry[key] == wanted[key] for key in wanted)]
    return some([entry for entry in found if np.isfinite(geometric_mean(entry["values"])).any()])


def key_of(entry, *free):
    return tuple(entry.get(key) for key in SETTINGS if key not in free)


def distinct(entries, *free):
    """The keys of the curves among the entries, in order."""
    return list(dict.fromkeys(key_of(entry, *free) for entry in entries))


def widest_group(entries, *free):
    """The entries that agree on all but the free settings, with as many values of the first of these as there are."""
    groups = [[entry for entry in entries if key_of(entry, *free) == key] for key in distinct(entries, *free)]
    return max(groups, key=lambda group: len({entry[free[0]] for entry in group}))


def geometric_mean(values):
    """(S, W) -> (W,) over the seeds; nan where a seed has no positive value."""
    values = floats(values)
    ok = (np.isfinite(values) & (values > 0)).all(0)
    return np.where(ok, np.exp(np.log(np.where(ok, values, 1.0)).mean(0)), np.nan)


def fit_line(widths, values, exponent, at=None):
    """Points of value ~ width^exponent through the geometric mean of the values, at the widths or elsewhere."""
    ok = np.isfinite(values)
    centre = np.log(values[ok]).mean() - exponent * np.log(widths[ok]).mean()
    return np.exp(centre + exponent * np.log(widths if at is None else at))


def slope(widths, values):
    """Exponent of value ~ width^exponent by least squares; None with fewer than two widths."""
    ok = np.isfinite(values)
    return np.polyfit(np.log(widths[ok]), np.log(values[ok]), 1)[0] if ok.sum() > 1 else None


def edge_of(row):
    """(W,) geometric means of the edge's bracket."""
    return np.sqrt(floats(row["max_stable_lr"]) * floats(row["min_unstable_lr"]))


def panels(rows, columns, width, height, **kwargs):
    """(figure, axes (rows, columns)) of panels `width` by `height` inches."""
    size = width * columns + 0.6, height * rows + 0.4
    return plt.subplots(rows, columns, figsize=size, squeeze=False, **kwargs)


def row_panels(count, width, height, **kwargs):
    """The same for `count` panels, three in a row; those left over are not shown."""
    figure, axes = panels(-(-count // 3), min(count, 3), width, height, **kwargs)
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    return figure, axes


def layer_panels(entries, kinds, layers, height):
    """(figure, {(kind, layer): axis}): a row per kind, a column per layer, shown where there is an entry."""
    figure, axes = panels(2, layers, 2.75, height)
    shown = {(entry["kind"], entry["layer"]) for entry in entries}
    found = {}
    for row, (kind, symbol) in zip(axes, kinds.items()):
        for layer, axis in enumerate(row):
            axis.set_visible((kind, layer) in shown)
            axis.set_title(f"{'readout' if layer == layers - 1 else f'layer {layer + 1}'}: {symbol}")
            found[kind, layer] = axis
    return figure, {place: axis for place, axis in found.items() if place in shown}


def finish(figure, title, legend=None):
    """The title, in lines that fit; with a legend's title, also one legend of all labels at the right."""
    figure.suptitle(textwrap.fill(title, int(12 * figure.get_figwidth()), break_on_hyphens=False))
    if legend is not None:
        handles = {}
        for axis in figure.axes[::-1]:
            handles.update(zip(*axis.get_legend_handles_labels()[::-1]))
        figure.legend(handles.values(), handles, title=legend, loc="outside right center")
    return figure


def look(i):
    """Colour and line style of curve i; all differ up to 28."""
    return {"color": COLOURS[i % 7], "linestyle": ("-", "--", ":", "-.")[i // 7 % 4]}


def loss_colour(loss):
    """The same in every figure; a loss without a name comes behind the named six."""
    return COLOURS[[*list(NAMES)[:6], loss].index(loss)]


def shades(widths):
    """{width: colour}, dark is wide."""
    widths = sorted(set(widths))
    return dict(zip(widths, plt.get_cmap("viridis_r")(np.linspace(0.12, 1.0, len(widths)))))


def width_axis(axis, widths, yscale="log", legend=None, **labels):
    """Log axes with ticks at the widths; every other one, or powers of two, where they would crowd."""
    widths = sorted(set(map(int, widths)), reverse=True)
    doubling = widths[0] > 5000 and all(width & (width - 1) == 0 for width in widths)
    axis.set(**{"xscale": "log", "yscale": yscale, "xlabel": "width n", **labels})
    axis.xaxis.set_major_locator(FixedLocator(widths[::1 if len(widths) <= 7 else 2]))
    axis.xaxis.set_major_formatter(FuncFormatter(
        lambda value, _: f"$2^{{{np.log2(value):.0f}}}$" if doubling else f"{value:g}"))
    axis.xaxis.set_minor_locator(NullLocator())
    if yscale == "log":
        log_ticks(axis.yaxis)
    if legend == "beside" and axis.get_legend_handles_labels()[1]:
        axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


def log_ticks(axis):
    """Plain labels at 1, 2 and 5 where a log axis spans less than two decades, closer ones on a short one."""
    low, high = axis.get_view_interval()
    if high / low < 100:
        close = MaxNLocator(4, steps=(1, 2, 5, 10))
        axis.set_major_locator(close if high / low < 4 else LogLocator(10, (1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def trend(axis, widths, values, exponent, label, color, linestyle="-", marker="o", predicted=None):
    """Points, the fit through them if there is one, and a predicted slope above them."""
    widths, ink = floats(widths), dict(color=color, marker=marker, markerfacecolor="white", markeredgewidth=1.3)
    axis.plot(widths, values, zorder=3, **ink, linestyle="none")
    if exponent is not None:
        axis.plot(widths, fit_line(widths, values, exponent), color=color, linestyle=linestyle)
    axis.plot([], [], label=label, **ink, linestyle="none" if exponent is None else linestyle)
    if predicted is not None and np.isfinite(values).any():
        axis.plot(widths, 1.5 * fit_line(widths, values, predicted), "--", color="0.35", linewidth=1.1, zorder=1)


def seeds_trend(axis, widths, values, label, color, linestyle):
    """A point per seed, the fit through the seeds' geometric means, its exponent in the label; values (S, W)."""
    mean = geometric_mean(values)
    exponent = slope(floats(widths), mean)
    axis.plot(widths, floats(values).T, "o", color=color, markersize=3, alpha=0.5)
    if exponent is not None:
        axis.plot(widths, fit_line(floats(widths), mean, exponent), color=color, linestyle=linestyle)
        label += f": {power(exponent)}"
    axis.plot([], [], "o", markersize=3, color=color, linestyle=linestyle, label=label)


def exponent_points(axis, x, entries, **kwargs):
    """Measured exponents at x, their 95 % intervals as bars."""
    y = floats(entry["exponent"] for entry in entries)
    ends = floats(entry["interval"] for entry in entries)
    axis.errorbar(x, y, np.abs(ends.T - y), fmt="o", markersize=4, markerfacecolor="white", elinewidth=1, **kwargs)


def loss_line(axis, lr, losses, edge, label, color):
    """Seed mean of losses (S, K) against LR, the range over seeds as a band, the edge dotted.

    A search leaves gaps between LRs, across which a line would tell nothing: it stops there, and where a seed diverged.
    """
    ok = np.flatnonzero(np.isfinite(losses).all(0))
    gaps = np.diff(np.log(lr)[ok])
    usual = 1.5 * np.median(gaps) if gaps.size else 0.0
    axis.plot([], [], "o-", markersize=2.6, color=color, label=label)
    for part in np.split(ok, np.flatnonzero(gaps > max(np.log(4.1), usual)) + 1):
        values = losses[:, part]
        axis.plot(lr[part], values.mean(0), "o-", markersize=2.6, color=color, zorder=3)
        axis.fill_between(lr[part], values.min(0), values.max(0), color=color, alpha=0.18, linewidth=0)
    if np.isfinite(edge):
        axis.axvline(edge, color=color, linewidth=1.0, linestyle=":")


def lr_transfer(summary):
    """loss against LR, also × (n / n0)^-(predicted exponent) for up to four curves; a line per width (Fig. 5)"""
    rows = curves(summary)
    if len(rows) <= 4:
        figure, axes = panels(2, len(rows), 3.3, 2.7)
        columns = axes.T
    else:
        figure, axes = row_panels(len(rows), 3.3, 2.9)
        columns = axes.reshape(-1, 1)
    colours = shades(width for row in rows for width in row["widths"])
    for column, row in zip(columns, rows):
        column[0].set_title(name_of(row, rows))
        for axis, exponent in zip(column, (0.0, row["predicted_max_stable_exponent"] or 0.0)):
            loss_panel(axis, row, exponent, colours)
    for axis in axes[:, 0]:
        axis.set_ylabel("final train loss")
    title = f"{setting(summary)}. Dotted: stability edge. Dashed: constant predictor"
    return finish(figure, title, legend="width")


def loss_panel(axis, row, exponent, colours):
    """Losses of one curve against LR × (n / n0)^-exponent."""
    for width, curve, edge in zip(row["widths"], row["curves"], edge_of(row)):
        factor = (width / row["base_width"]) ** -exponent
        lr, losses = floats(curve["lr"]) * factor, floats(curve["train_loss"])
        loss_line(axis, lr, losses, edge * factor, f"{width}", colours[width])
    scaled = f" × (n / {row['base_width']})$^{{{-exponent:g}}}$" if exponent else ""
    axis.set(xscale="log", xlabel="learning rate" + scaled)
    log_ticks(axis.xaxis)

    seen = np.concatenate([floats(curve["train_loss"]).ravel() for curve in row["curves"]])
    low, chance = np.nanmin(seen), row["chance_loss"]
    top = max(chance + 0.12 * (chance - low), min(np.nanmax(seen), 1.7 * chance))
    axis.axhline(chance, color="0.5", linewidth=0.9, linestyle="--")
    axis.set_ylim(low - 0.06 * (top - low), top)


def exponents(summary):
    """optimal and largest stable LR against width, with fits and the predicted slope (Fig. 5, right)"""
    rows = curves(summary)
    figure, axes = row_panels(len(rows), 3.7, 3.6, sharey="row")
    for i, (axis, row) in enumerate(zip(axes.flat, rows)):
        color, edge, widths = COLOURS[i % 7], edge_of(row), floats(row["widths"])
        measured, predicted = row["max_stable_exponent"], row["predicted_max_stable_exponent"]
        if np.isfinite(edge).any():
            bars = edge - floats(row["max_stable_lr"]), floats(row["min_unstable_lr"]) - edge
            axis.errorbar(widths, edge, bars, color=color, fmt="none", capsize=3, elinewidth=1.6,
                          label=f"largest stable LR {fitted(measured, row['max_stable_interval'])}")
            if measured is not None:
                axis.plot(widths, fit_line(widths, edge, measured), color=color)
            if predicted is not None:
                axis.plot(widths, 1.9 * fit_line(widths, edge, predicted), "--", color="0.35",
                          label=f"predicted slope {power(predicted)}")
        label = f"optimal LR {fitted(row['optimal_exponent'], row['optimal_interval'])}"
        trend(axis, widths, floats(row["optimal_lr"]), row["optimal_exponent"], label, color, ":")
        width_axis(axis, widths, title=name_of(row, rows))
        axis.legend(loc="lower left", fontsize=8)
        axis.margins(x=0.08)
    for axis in axes[:, 0]:
        low, high = axis.get_ylim()
        axis.set_ylim(low / (high / low) ** 0.4, high)             # room for the legends
        axis.set_ylabel("learning rate")
    return finish(figure, f"{setting(summary)}. Bars: from the largest stable to the smallest unstable LR. "
                          "Legend: exponent [95 % interval]")


def optimal_lr(summary):
    """optimal LR against width with fits, beside n^-1/2 and n^-1 (Fig. 1)"""
    rows = curves(summary)
    figure, ((axis,),) = panels(1, 1, 6.6, 3.6)
    every = np.unique(np.concatenate([row["widths"] for row in rows])).astype(float)
    for i, row in enumerate(rows):
        label = f"{name_of(row, rows)} {fitted(row['optimal_exponent'], row['optimal_interval'])}"
        trend(axis, row["widths"], floats(row["optimal_lr"]), row["optimal_exponent"], label, **look(i))
    # The reference slopes touch no data: one above all points, one below.
    for exponent, style, extreme, factor in ((-0.5, "--", np.nanmax, 1.7), (-1.0, "-.", np.nanmin, 1 / 1.7)):
        levels = [extreme(floats(row["optimal_lr"]) * floats(row["widths"]) ** -exponent) for row in rows]
        axis.plot(every, factor * extreme(levels) * every ** exponent, style, color="0.45", linewidth=1.1,
                  label=f"slope {power(exponent)}")
    width_axis(axis, every, legend="beside", ylabel="optimal learning rate")
    return finish(figure, setting(summary))


def regular(row):
    """Indices of the widths with eight LRs or more in equal steps, as a grid has."""
    steps = [np.diff(np.log(curve["lr"])) for curve in row["curves"]]
    return [i for i, step in enumerate(steps) if len(step) > 6 and np.ptp(step) < 0.01 * step.mean()]


def relative_loss(row, i):
    """(K,) seed-mean losses at width i over the constant predictor's; infinite where a seed diverged."""
    losses = floats(row["curves"][i]["train_loss"]).mean(0)
    return np.nan_to_num(losses, nan=np.inf) / row["chance_loss"]


def phase(summary):
    """what a grid of LRs does at every width: trains, stays at chance or diverges; the edge as a staircase"""
    rows = some([row for row in curves(summary) if len(regular(row)) > 2])
    figure, axes = row_panels(len(rows), 3.5, 4.1, sharey=True)
    norm = Normalize(min(relative_loss(row, i).min() for row in rows for i in regular(row)), 1.0)
    for axis, row in zip(axes.flat, rows):
        phase_map(axis, row, norm)
        measured, predicted = row["max_stable_exponent"], row["predicted_max_stable_exponent"]
        said = f"edge {power(measured)}, predicted {power(predicted)}"
        width_axis(axis, row["widths"], title=f"{name_of(row, rows)}\n{said}")
    for axis in axes[:, 0]:
        axis.set_ylabel("learning rate")
    figure.colorbar(plt.cm.ScalarMappable(norm, TRAINED), ax=axes, label="loss / a constant predictor's", shrink=0.6)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return finish(figure, setting(summary))


def phase_map(axis, row, norm):
    """Cells that train in colour, those at chance hatched, those that diverged crossed out."""
    chosen, predicted = regular(row), row["predicted_max_stable_exponent"]
    widths, edge, best = (floats(values)[chosen] for values in (row["widths"], edge_of(row), row["optimal_lr"]))
    middles = np.sqrt(widths[1:] * widths[:-1])
    bounds = np.concatenate([[widths[0] ** 2 / middles[0]], middles, [widths[-1] ** 2 / middles[-1]]])
    chance = dict(facecolor="0.94", edgecolor="0.6", hatch="////", linewidth=0)
    for i, width, *sides in zip(chosen, widths, bounds, bounds[1:]):
        lr, values = floats(row["curves"][i]["lr"]), relative_loss(row, i)
        cells = np.append(lr, lr[-1] ** 2 / lr[-2]) * np.sqrt(lr[0] / lr[1])            # (K + 1,) borders
        trained = np.ma.masked_where(values >= 1.0, values)[:, None]
        axis.pcolormesh(sides, cells, trained, cmap=TRAINED, norm=norm, rasterized=True)
        for k in np.flatnonzero((values >= 1.0) & np.isfinite(values)):
            axis.fill_between(sides, *cells[k:k + 2], **chance)
        gone = lr[np.isinf(values)]
        axis.plot(np.full(len(gone), width), gone, "x", color="0.6", markersize=4, markeredgewidth=0.9)
    axis.fill_between([], [], **chance, label="at or above chance")
    axis.plot([], [], "x", color="0.6", label="diverged")
    axis.plot(widths, best, "o", color="black", markerfacecolor="white", zorder=5, label="optimum")
    axis.stairs(edge, bounds, baseline=None, color="black", linewidth=2.2, zorder=3, label="stability edge")
    if predicted is not None and np.isfinite(edge).any():
        line = fit_line(widths, edge, predicted, at=bounds)
        axis.plot(bounds, line, "--", color=COLOURS[1], linewidth=2, zorder=4, label="predicted slope")
    axis.set_xlim(bounds[[0, -1]])
    axis.grid(False)


def bounded(summary):
    """edge exponents of four losses or more beside their predictions; the loss at the widest net"""
    rows = some(widest_group(curves(summary), "loss"), least=4)
    rows = sorted(rows, key=lambda row: row["predicted_max_stable_exponent"] or 0.0)
    figure, ((left, right),) = panels(1, 2, 4.4, 3.4)
    for place, row in enumerate(rows):
        color, predicted = loss_colour(row["loss"]), row["predicted_max_stable_exponent"]
        measured, interval = row["max_stable_exponent"], floats(row["max_stable_interval"])
        if predicted is not None:
            left.axvline(predicted, color="0.45", linestyle="--", linewidth=1.0, zorder=1)
            left.plot(predicted, place, "D", color=color, markersize=9, alpha=0.35, markeredgewidth=0)
        if measured is not None:
            left.errorbar(measured, place, xerr=np.abs(interval - measured)[:, None], fmt="o", color=color, capsize=3,
                          markerfacecolor="white")
        lr, values = floats(row["curves"][-1]["lr"]), relative_loss(row, -1)[None]
        loss_line(right, lr, values, edge_of(row)[-1], named(row["loss"]), color)
    left.set_yticks(range(len(rows)), [named(row["loss"]) for row in rows])
    left.set(xlabel="exponent of the largest stable LR", title="diamonds: predicted; bars: 95 % intervals")
    left.invert_yaxis()
    left.grid(axis="y", visible=False)
    right.axhline(1.0, color="0.5", linewidth=0.9, linestyle="--")
    right.set(xscale="log", xlabel="learning rate", ylabel="loss / a constant predictor's",
              title=f"width {rows[0]['widths'][-1]}; dotted: stability edge")
    right.set_ylim(top=1.25)
    log_ticks(right.xaxis)
    return finish(figure, f"{setting(summary)}, {shared(rows)}", legend="loss")


def losses(summary):
    """best validation accuracy over LR against width, a line per loss (Fig. 7)"""
    rows = curves(summary)
    names = some(list(dict.fromkeys(row["loss"] for row in rows)), least=3)
    others = distinct(rows, "loss")
    told = [key for key in differing(rows) if key != "loss"] or ["param"]
    figure, axes = row_panels(len(others), 3.2, 3.1, sharey=True)
    for row in rows:
        axis = axes.flat[others.index(key_of(row, "loss"))]
        seeds = 100 * floats(row["best_val_accuracy"])          # (W, S)
        count = seeds.shape[1]
        bars = t_quantile(count - 1) * seeds.std(1, ddof=1) / np.sqrt(count) if count > 1 else None
        beside = 1.05 ** (names.index(row["loss"]) - (len(names) - 1) / 2)      # lest the bars hide each other
        axis.errorbar(floats(row["widths"]) * beside, seeds.mean(1), bars, fmt="o-", capsize=2.5,
                      color=loss_colour(row["loss"]), label=named(row["loss"]))
        width_axis(axis, row["widths"], yscale="linear", title=words(row, told))
    for axis in axes[:, 0]:
        axis.set_ylabel("best validation accuracy (%)")
    return finish(figure, f"{setting(summary)}. Bars: 95 % intervals over seeds", legend="loss")


def t_quantile(freedom):
    """97.5 % quantile of Student's t."""
    table = (np.nan, 12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306)
    return table[freedom] if freedom < len(table) else 1.96 + 2.5 / freedom


def calibration(summary):
    """expected calibration error and logits at the optimal LR against width, under cross-entropy"""
    rows = [row for row in curves(summary) if (row["model"], row["loss"]) == ("mlp", "ce")]
    some({row["param"] for row in rows}, least=2)
    figure, axes = panels(1, 2, 5.2, 3.2)
    ylabels = {"val_ece": "expected calibration error", "logit_rms": "RMS of the logits"}
    for axis, (key, ylabel) in zip(axes.flat, ylabels.items()):
        for i, row in enumerate(rows):
            seeds_trend(axis, row["widths"], floats(row["at_optimum"][key]).T, name_of(row, rows), **look(i))
        width_axis(axis, {width for row in rows for width in row["widths"]}, legend="beside", ylabel=ylabel)
    return finish(figure, f"{setting(summary)}, {shared(rows)}: at the optimal learning rate; a point per seed")


def regimes(summary):
    """exponents of logits and effective updates against α, on the predicted lines (Propositions 1 and 2)"""
    shown = widest_group(tracked(summary, "updates"), "alpha", "loss")
    some({entry["alpha"] for entry in shown}, least=3)
    names, steps = (list(dict.fromkeys(entry[key] for entry in shown)) for key in ("loss", "step"))
    figure, axes = panels(len(steps), len(names), 4.2, 3.2, sharex=True, sharey=True)
    for i, step in enumerate(steps):
        for j, loss in enumerate(names):
            here = [entry for entry in shown if (entry["step"], entry["loss"]) == (step, loss)]
            shade_regimes(axes[i, j], {entry["alpha"]: entry["regime"] for entry in here})
            exponents_over_alpha(axes[i, j], here, summary["hidden_layers"])
            axes[i, j].set_title(f"{named(loss)}, after {WORDS['step'](step)}")
            axes[-1, j].set_xlabel("α (learning rate ∝ $n^{-α}$)")
        axes[i, 0].set_ylabel("width exponent")
    predicted = [entry["predicted"] for entry in shown if entry["predicted"] is not None] or [0.0]
    axes[0, 0].set_ylim(min(predicted) - 0.25, min(max(predicted), 1.6) + 0.75)
    title = f"{setting(summary)}, {shared(shown)} × (n / {summary['base_width']})$^{{-α}}$"
    return finish(figure, title, legend="lines: predicted\npoints: measured")


def shade_regimes(axis, regime):
    """The background in the colour of each α's regime, with its name; regime: {α: name}."""
    alphas = sorted(regime)
    starts, ends = [alphas[0] - 0.08] + alphas[1:], alphas[1:] + [alphas[-1] + 0.08]
    for name in dict.fromkeys(regime.values()):
        inside = [i for i, alpha in enumerate(alphas) if regime[alpha] == name]
        low, high = starts[inside[0]], ends[inside[-1]]
        axis.axvspan(low, high, color=REGIMES.get(name, "0.95"), linewidth=0, zorder=0)
        axis.text((low + high) / 2, 1.0, name.replace(" ", "\n"), transform=axis.get_xaxis_transform(), ha="center",
                  va="top", fontsize=7.5, color="0.35")
    axis.axhline(0, color="0.4", linewidth=0.8)
    axis.set_xlim(starts[0], ends[-1])


def exponents_over_alpha(axis, entries, readout):
    """The four kinds of change in an MLP whose readout is layer `readout`."""
    series = {
        "logits' change": ("logits", [readout + 1], 0.012), "output update": ("effective", [readout], -0.012),
        "hidden updates": ("effective", range(1, readout), 0.0), "input update": ("effective", [0], 0.0),
    }
    for color, (label, (kind, layers, shift)) in zip(COLOURS, series.items()):
        chosen = [entry for entry in entries if entry["kind"] == kind and entry["layer"] in layers]
        line = {entry["alpha"]: entry["predicted"] for entry in chosen}
        axis.plot(list(line), floats(line.values()), color=color, linewidth=1.3, zorder=2)
        measured = [entry for entry in chosen if entry["exponent"] is not None]
        if measured:
            x = floats(entry["alpha"] for entry in measured) + shift
            exponent_points(axis, x, measured, color=color, label=label, zorder=3)


def course(summary):
    """logits' change, hidden update and loss over the first steps, a line per width: the mechanism"""
    entries = [entry for entry in summary.get("course", ()) if (floats(entry["train_loss"]) > 0).any()]
    entries = widest_group(some(entries), "loss")
    kinds = [kind for kind in COURSE if any((floats(entry[kind]) > 0).any() for entry in entries)]
    colours = shades(width for entry in entries for width in entry["widths"])
    figure, axes = panels(len(kinds), len(entries), 2.9, 2.2, sharex=True, sharey="row")
    for row, kind in zip(axes, kinds):
        low, top = course_range([line for entry in entries for line in floats(entry[kind])])
        row[0].set(xscale="log", yscale="log", ylim=(low, top), ylabel=COURSE[kind])
        for axis, last, entry in zip(row, axes[-1], entries):
            values = floats(entry[kind])            # (W, T)
            for width, line in zip(entry["widths"], values):
                course_line(axis, floats(entry["steps"]), line, top, color=colours[width], label=f"{width}")
            first = slope(floats(entry["widths"]), geometric_mean([values[:, 0]]))
            if first is not None and kind != "train_loss":
                axis.text(0.97, 0.95, f"step 1: {power(first)}", transform=axis.transAxes, ha="right", va="top")
            axis.set_title(named(entry["loss"]) if kind == kinds[0] else "")
            last.set_xlabel("step")
    title = f"{setting(summary)}, {shared(entries)}. Triangles: beyond the panel, or no longer finite"
    return finish(figure, title, legend="width")


def course_range(lines):
    """(low, top) of a row of panels: the whole of the lines that settle, the start of those that do not."""
    lines = np.array([line for line in lines if line[0] > 0])
    settled = [line.max() for line in lines if line.max() < 1e4 * line[0]]         # nan is not settled
    top = 3 * max(settled + list(lines[:, 0]))
    return lines[(lines > 0) & (lines < top)].min() / 1.5, top


def course_line(axis, steps, values, top, **kwargs):
    """A line (T,) until it is above `top` or no longer finite, and a mark at the step where it is."""
    beyond = np.flatnonzero(~(values < top))
    end = beyond[0] if beyond.size else len(values)
    axis.plot(steps[:end + 1], np.append(values[:end], [top] * (beyond.size > 0)), linewidth=1.2, **kwargs)
    if 0 < end < len(values):
        axis.plot(steps[end], top, "^", color=kwargs["color"], markersize=5, clip_on=False, zorder=4)


def updates(summary, step=1):
    """effective and propagating updates of every layer against width, after the first step (Fig. 4)"""
    entries = some([entry for entry in tracked(summary, "updates", step=step) if entry["kind"] in UPDATES])
    entries = [entry for entry in entries if all(entry[key] == entries[0][key] for key in ("loss", "lr"))]
    entries = [entry for entry in entries if entry["alpha"] in (0.0, 0.5, 1.0)] or entries
    keys = distinct(entries)
    shown = [entry for entry in entries if key_of(entry) in keys[:6]]
    figure, axes = layer_panels(shown, UPDATES, summary["hidden_layers"] + 1, 2.6)
    for entry in shown:
        axis = axes[entry["kind"], entry["layer"]]
        label = f"{name_of(entry, shown)}: {signed(entry['exponent'])} ({signed(entry['predicted'])})"
        trend(axis, entry["widths"], geometric_mean(entry["values"]), entry["exponent"], label,
              **look(keys.index(key_of(entry))))
        axis.set_yscale("log")
    for (kind, layer), axis in axes.items():
        low, high = axis.get_ylim()
        axis.set_ylim(low, high * (high / low) ** (0.15 + 0.13 * len(keys[:6])))        # room for the legend
        axis.legend(fontsize=7.5, loc="upper left", borderaxespad=0.1, handlelength=1.2)
        width_axis(axis, shown[0]["widths"], ylabel=f"RMS, {kind} update" if layer == (kind == "propagating") else "",
                   xlabel="width n" if kind == "propagating" or layer == 0 else "")
    when = f"{setting(summary, steps=False)}, {shared(shown)}, after {WORDS['step'](step)}"
    some_of = f" First {len(keys[:6])} of {len(keys)} curves" if len(keys) > 6 else ""
    return finish(figure, f"{when}. Exponent measured (predicted).{some_of}")


def later_updates(summary):
    """the same after the last step"""
    return updates(summary, some([summary.get("steps", 1)] * (summary.get("steps", 1) > 1))[0])


def alignment(summary):
    """operator-norm alignment of ΔW with x, and of W0 with Δx, over training steps; a line per width (Fig. 2)"""
    entries = summary.get("alignment", ()) if summary.get("model") == "mlp" else ()
    entries = [entry for entry in entries if len(entry["steps"]) > 5 and (floats(entry["values"]) > 0).any()]
    curve = [entry for entry in entries if key_of(entry) == key_of(entries[0])]
    figure, axes = layer_panels(some(curve), ALIGNMENTS, summary["hidden_layers"] + 1, 2.3)
    colours = shades(curve[0]["widths"])
    for entry in curve:
        axis, below = axes[entry["kind"], entry["layer"]], entry["kind"] == "operator_propagating"
        for width, values in zip(entry["widths"], floats(entry["values"])):
            axis.plot(entry["steps"], values, color=colours[width], label=f"{width}")
        axis.set(xscale="log", ylim=(0, 1.05), ylabel="alignment" if entry["layer"] == below else "",
                 xlabel="step" if below or not entry["layer"] else "")
    return finish(figure, f"{setting(summary)}, {shared(curve)}. Operator-norm alignment", legend="width")


def limit(summary):
    """softmax outputs' distance to the widest network's, and the features' change, against width (Proposition 2)"""
    entries = some(tracked(summary, "limit") * (summary["steps"] > 20))
    last = dict(step=summary["steps"], kind="features", layer=summary["hidden_layers"] - 1)
    changes = {key_of(entry): entry["values"] for entry in tracked(summary, "updates", **last)}
    rates = list(dict.fromkeys(entry["lr"] for entry in entries))
    order = distinct(entries, "lr")
    figure, axes = panels(len(rates), 2, 5.2, 3.3)
    for (left, right), lr in zip(axes, rates):
        here, title = [entry for entry in entries if entry["lr"] == lr], f"LR {lr:g}" if len(rates) > 1 else ""
        for entry in here:
            label, style = name_of(entry, here), look(order.index(key_of(entry, "lr")))
            nearer = floats(entry["values"])[:, :-1]                # the widest's own distance is 0
            seeds_trend(left, entry["widths"][:-1], nearer, label, **style)
            if key_of(entry) in changes:
                seeds_trend(right, entry["widths"], changes[key_of(entry)], label, **style)
        width_axis(left, entry["widths"][:-1], legend="beside", title=title,
                   ylabel="distance of softmax outputs\nto the widest network's")
        width_axis(right, entry["widths"], legend="beside", title=title,
                   ylabel="change of the last\nhidden features (RMS)")
    return finish(figure, f"{setting(summary)}, {shared(entries)}; a point per seed")


def tensor_kinds(summary):
    """exponents of a GPT's updates after one step by kind of tensor, over the layers"""
    entries = tracked(summary, "updates", mlp=False, step=1)
    entries = some([entry for entry in entries if entry["kind"] in UPDATES and entry["exponent"] is not None])
    tensors = list(dict.fromkeys(entry["module"].rpartition(".")[2] for entry in entries))
    keys = distinct(entries)
    space = min(0.26, 0.8 / len(keys))
    figure, axes = panels(2, 1, 0.78 * len(tensors) + 1.8, 2.6, sharex=True)
    for axis, (kind, symbol) in zip(axes.flat, UPDATES.items()):
        for i, key in enumerate(keys):
            here = [entry for entry in entries if (key_of(entry), entry["kind"]) == (key, kind)]
            if here:
                x = floats(tensors.index(entry["module"].rpartition(".")[2]) for entry in here)
                x += space * (i - (len(keys) - 1) / 2)
                axis.hlines([entry["predicted"] for entry in here], x - 0.46 * space, x + 0.46 * space,
                            color=COLOURS[i % 7], linewidth=2.4, alpha=0.45)
                exponent_points(axis, x, here, color=COLOURS[i % 7], label=name_of(here[0], entries))
        axis.axhline(0, color="0.4", linewidth=0.8)
        axis.set(title=f"{kind} updates {symbol}", ylabel="width exponent")
        axis.grid(axis="x", visible=False)
    axes[1, 0].set_xticks(range(len(tensors)), [tensor.replace("_", "\n") for tensor in tensors])
    title = f"{setting(summary, steps=False)}, {shared(entries)}, after one step"
    return finish(figure, title, legend="ticks: predicted\npoints: measured")


def linear_net(summary):
    """closed-form linear net: largest stable LR, distance to the limit, loss decrease after a step (C.2-C.4)"""
    some(summary.get("linear_net", ()))
    titles = {"edges": "largest stable learning rate", "distance": "distance of f to its infinite-width limit",
              "one_step": "|loss decrease| after one step"}
    figure, axes = panels(1, 3, 3.4, 4.6)
    for axis, (part, title) in zip(axes.flat, titles.items()):
        entries, drawn = summary["linear_net"][part], set()
        for i, entry in enumerate(entries):
            values = edge_of(entry) if part == "edges" else geometric_mean(entry["values"])
            label = warmup_of(entry) if part == "edges" else words(entry, ("param", "alpha", "step"))
            label += f": {fitted(entry['exponent'], entry['interval'])}"
            predicted = None if entry["predicted"] in drawn else entry["predicted"]
            drawn.add(predicted)
            trend(axis, entry["widths"], values, entry["exponent"], label, COLOURS[i % 7], marker="os^Dv"[i % 5],
                  predicted=predicted)
        width_axis(axis, entries[0]["widths"], title=title)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16))
    return finish(figure, "Closed-form linear net f = x uᵀv, one sample, squared loss. Lines: fits, with 95 % intervals. "
                          "Dashed: predicted slopes")


def warmup_of(entry):
    exponent = entry["warmup_exponent"]
    growing = f" $(n/{entry['base_width']})^{{{exponent:g}}}$" if exponent else ""
    return f"{entry['warmup']}{growing} warmup steps" if entry["warmup"] else "no warmup"


FIGURES = {figure.__name__: figure for figure in (
    lr_transfer, exponents, optimal_lr, phase, bounded, losses, calibration, regimes, course, updates, later_updates,
    alignment, limit, tensor_kinds, linear_net)}


def read(path):
    if not path.exists():
        raise PlotError(f"{path} is not there; run python sweep.py --out {path.parent} first")
    try:
        summary = json.loads(path.read_text())
        if "linear_net" not in summary:
            for row in summary["rows"]:
                row["optimal_lr"], row["curves"]
    except (ValueError, LookupError, TypeError):
        raise PlotError(f"{path} is damaged; the command that wrote it writes it again, and runs nothing twice") from None
    return summary


def draw(out, only=None):
    """Draws what a result folder can show, or the figures of `only`, into <out>/figures as PNG and PDF; the paths.

    PlotError where summary.json is missing or damaged, or a figure unknown, and, when all others are drawn, where one
    cannot be; the traceback of an unexpected error is on standard error then.
    """
    unknown = [name for name in only or () if name not in FIGURES]
    if unknown:
        raise PlotError(f"unknown figure {unknown[0]!r}; choose from {', '.join(FIGURES)}")
    path = Path(out) / "summary.json"
    summary, written, failed = read(path), [], []
    for name in only or FIGURES:
        try:
            written += save(FIGURES[name], summary, path.parent / "figures" / name)
        except Absent as error:
            failed += [f"{name!r} cannot be drawn: {error}"] if only else []
        except OSError:
            raise
        except Exception as error:
            traceback.print_exc()
            failed.append(f"{name!r} cannot be drawn: {type(error).__name__}")
        finally:
            plt.close("all")
    if failed:
        raise PlotError(f"{path}: {'; '.join(failed)}; {len(written) // 2} other figures are drawn")
    return written


def save(function, summary, path):
    """Paths of the PNG and the PDF of one figure."""
    with plt.rc_context(STYLE):
        figure = function(summary)
        path.parent.mkdir(exist_ok=True)
        paths = [path.with_suffix(ending) for ending in (".png", ".pdf")]
        for path in paths:
            figure.savefig(path)
    return paths


def main():
    usage = "usage: python plots.py RESULT_FOLDER [FIGURE ...]; figures: " + ", ".join(FIGURES)
    if sys.argv[1:2] in (["-h"], ["--help"]):
        print(usage)
        for name, function in FIGURES.items():
            print(f"    {name:14} {function.__doc__.splitlines()[0]}")
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
