"""Figures from result files alone: python plots.py out/NAME draws everything that out/NAME/summary.json can show.

    lr_transfer   loss against LR, and against LR rescaled by the predicted exponent, one line per width (Fig. 5)
    exponents     optimal and largest stable LR against width, with fits and the predicted slope (Fig. 5, right)
    optimal_lr    optimal LR against width with fits, beside n^-1/2 and n^-1 (Fig. 1)
    regimes       measured exponents of logits and updates against α on the predicted lines (Propositions 1 and 2)
    updates       effective and propagating updates of every layer against width, after the first step (Fig. 4)
    later_updates the same after the last step
    alignment     operator-norm alignment over training steps, one line per width (Fig. 2)
    limit         distance of the softmax outputs to the widest network's, and the features' change (Proposition 2)
    losses        best validation accuracy over LR against width for every loss and parameterization (Fig. 7)
    calibration   expected calibration error and logits at the optimal LR against width
    tensor_kinds  exponents of a GPT's updates by kind of tensor
    linear_net    closed-form linear net: largest stable LR, distance to the limit, loss decrease after a step (C.2-C.4)

Figure numbers are those of arXiv 2505.22491. Each function takes the summary.json that sweep.py writes, and returns a
matplotlib figure. regimes to limit, and tensor_kinds, need a sweep with --track. Widths are a sequential colour, curves the
colour-blind-safe set of Okabe and Ito.
Needs numpy and matplotlib only.
"""
import json
import sys
from pathlib import Path

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
NAMES = {"ce": "CE", "mse": "MSE", "brier": "Brier", "sp": "SP", "ntp": "NTP", "mup": "µP", "sp_full_align": "SP-full-align",
         "sp_full_align_large_readout": "SP-full-align (large readout)", "sgd": "SGD", "adam": "Adam"}
STYLE = {"figure.dpi": 160, "savefig.dpi": 160, "font.size": 10, "axes.spines.top": False, "axes.spines.right": False,
         "axes.grid": True, "grid.alpha": 0.25, "grid.linewidth": 0.6, "legend.frameon": False, "lines.linewidth": 1.6,
         "axes.titlesize": 10.5, "figure.constrained_layout.use": True}


CURVE = {"loss": NAMES.get, "param": NAMES.get, "optimizer": NAMES.get, "alpha": lambda value: f"α = {value:g}",
         "norm_affine": lambda value: "" if value else "no norm gains"}         # how a value is written


def name_of(row, rows):
    """What tells this curve from the others: the settings that differ among them, or its loss."""
    keys = [key for key in CURVE if len({str(other.get(key)) for other in rows}) > 1] or ["loss"]
    words = [CURVE[key](row[key]) for key in keys] + ([warmup(row)] if len(set(map(warmup, rows))) > 1 else [])
    return ", ".join(word for word in words if word)


def warmup(row):
    steps, exponent = row.get("warmup", 0), row.get("warmup_exponent", 0)
    growing = f" $(n/{row.get('base_width')})^{{{exponent:g}}}$" if exponent else ""
    return f"{steps}{growing} warmup steps" if steps else "no warmup"


def setting(summary):
    """The title line of a sweep: what all its curves share."""
    layers = f"GPT, {summary['layers']} layers" if summary["model"] == "gpt" else f"{summary['hidden_layers']} hidden layers"
    return f"{summary['data'].replace('_', '-')}, {layers}, {summary['steps']} steps"


def panels(count, width, height, most=3, **kwargs):
    """(figure, axes) of `count` panels, at most `most` in a row; those left over are not shown."""
    columns = min(count, most)
    figure, axes = plt.subplots(-(-count // columns), columns, figsize=(width * columns + 0.6, height * -(-count // columns) + 0.3),
                                squeeze=False, **kwargs)
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    return figure, axes


def curves(summary):
    """The rows of an LR sweep that have an optimum at all."""
    return [row for row in summary["rows"] if any(lr is not None for lr in row["optimal_lr"])]


def floats(values):
    """A float array in which null is nan."""
    return np.array([np.nan if value is None else value for value in values], dtype=float)


def octaves(axis, values):
    """Ticks at the given widths, as plain numbers; every other one where they would crowd."""
    values = sorted(set(values))
    axis.set_major_locator(FixedLocator(values[::-1][::1 if len(values) <= 7 else 2][::-1]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def sparse_decades(axis, span):
    """Labels at 1, 2 and 5 where a log axis spans less than two decades."""
    if span < 100:
        axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def power(exponent):
    return f"$n^{{{round(exponent, 2) + 0.0:.2f}}}$".replace("-", "−")          # + 0.0: no minus zero


def fit_line(widths, values, exponent):
    """Points of value ~ width^exponent through the geometric mean of the values."""
    have = np.isfinite(values)
    centre = np.log(values[have]).mean() - exponent * np.log(widths[have]).mean()
    return np.exp(centre + exponent * np.log(widths))


def geometric_mean(entry):
    """(W,) mean over the seeds of a tracked quantity; nan where a seed has no positive value."""
    values = np.array([floats(line) for line in entry["values"]])           # (S, W)
    ok = (np.isfinite(values) & (values > 0)).all(0)
    return np.where(ok, np.exp(np.log(np.where(values > 0, values, 1.0)).mean(0)), np.nan)


def lr_transfer(summary):
    """Loss against LR, one panel per curve; up to four curves also against LR x (n / n0)^(predicted exponent)."""
    rows = curves(summary)
    if len(rows) <= 4:
        figure, axes = plt.subplots(2, len(rows), figsize=((3.9 if len(rows) < 4 else 3.1) * len(rows) + 0.9, 5.6), squeeze=False)
        pairs = list(zip(axes[0], axes[1]))
    else:
        figure, axes = panels(len(rows), 3.3, 2.9)
        pairs = [(axis,) for axis in axes.flat]
    shades = plt.get_cmap("viridis_r")(np.linspace(0.12, 1.0, max(len(row["widths"]) for row in rows)))
    for pair, row in zip(pairs, rows):
        predicted = row["predicted_max_stable_exponent"]
        for i, (width, curve) in enumerate(zip(row["widths"], row["curves"])):
            losses = np.array([floats(seed) for seed in curve["train_loss"]])           # (S, K)
            ok = np.flatnonzero(np.isfinite(losses).all(0))         # an LR at which a seed diverged has no mean
            gaps = np.diff(np.log(curve["lr"])[ok])                 # a search leaves some, across which a line would tell nothing
            parts = np.split(ok, np.flatnonzero(gaps > max(np.log(4.1), 1.5 * np.median(gaps) if gaps.size else 0.0)) + 1)
            for axis, exponent in zip(pair, (0.0, predicted or 0.0)):
                lr = np.array(curve["lr"]) * (width / row["base_width"]) ** -exponent
                axis.plot([], marker="o", markersize=2.6, color=shades[i], label=f"{width}")
                for part in parts:
                    values = losses[:, part]
                    axis.plot(lr[part], values.mean(0), marker="o", markersize=2.6, color=shades[i], zorder=3)
                    axis.fill_between(lr[part], values.min(0), values.max(0), color=shades[i], alpha=0.18, linewidth=0)
                if row["min_unstable_lr"][i] is not None:
                    edge = np.sqrt(row["max_stable_lr"][i] * row["min_unstable_lr"][i]) * (width / row["base_width"]) ** -exponent
                    axis.axvline(edge, color=shades[i], linewidth=1.0, linestyle=":")
        seen = np.concatenate([floats(np.ravel(curve["train_loss"])) for curve in row["curves"]])
        low, chance = np.nanmin(seen), row["chance_loss"]
        top = max(chance + 0.12 * (chance - low), min(np.nanmax(seen), 1.7 * chance))
        for axis in pair:
            axis.axhline(chance, color="0.5", linewidth=0.9, linestyle="--")
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(LogLocator(base=10, numticks=12))
            sparse_decades(axis.xaxis, np.divide(*axis.get_xlim()[::-1]))
            axis.set_ylim(low - 0.06 * (top - low), top)
            axis.set_xlabel("learning rate")
        pair[0].set_title(name_of(row, rows))
        if len(pair) > 1 and predicted:
            pair[1].set_xlabel(f"learning rate × (n / {row['base_width']})$^{{{-predicted:g}}}$")
    for axis in axes[:, 0]:
        axis.set_ylabel("final train loss")
    handles = axes[0, 0].get_legend_handles_labels()
    if len(rows) == 5:      # the sixth panel's place
        figure.legend(*handles, title="width", loc="lower right", bbox_to_anchor=(0.93, 0.12))
    else:
        axes[0, -1].legend(*handles, title="width", loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.suptitle(f"{setting(summary)}. Dotted: stability edge. Dashed: constant predictor", fontsize=10.5)
    return figure


def exponents(summary):
    """Optimal LR (circles) and the bracket of the largest stable one (bars) against width, one panel per curve."""
    rows = curves(summary)
    figure, axes = panels(len(rows), 3.7, 3.6, sharey="row")
    for axis, row, colour in zip(axes.flat, rows, np.resize(COLOURS, len(rows))):
        widths, optimal, stable, unstable = (floats(row[key]) for key in ("widths", "optimal_lr", "max_stable_lr", "min_unstable_lr"))
        edge, predicted = np.sqrt(stable * unstable), row["predicted_max_stable_exponent"]
        legend = []
        if np.isfinite(edge).any():
            bars = [edge - stable, unstable - edge]
            legend.append((axis.errorbar(widths, edge, bars, color=colour, fmt="none", capsize=3, elinewidth=1.6),
                           "largest stable LR" + fitted(row, "max_stable")))
            if row["max_stable_exponent"] is not None:
                axis.plot(widths, fit_line(widths, edge, row["max_stable_exponent"]), color=colour, linewidth=1.2)
            if predicted is not None:
                line, = axis.plot(widths, 1.9 * fit_line(widths, edge, predicted), color="0.35", linestyle="--", linewidth=1.3)
                legend.append((line, f"predicted slope {power(predicted)}"))
        if np.isfinite(optimal).any():
            points, = axis.plot(widths, optimal, "o", color=colour, markersize=5, markerfacecolor="white", markeredgewidth=1.5)
            legend.append((points, "optimal LR" + fitted(row, "optimal")))
            if row["optimal_exponent"] is not None:
                axis.plot(widths, fit_line(widths, optimal, row["optimal_exponent"]), color=colour, linewidth=1.2, linestyle=":")
        axis.set(xscale="log", yscale="log", xlabel="width n", title=name_of(row, rows))
        octaves(axis.xaxis, row["widths"])
        axis.legend(*zip(*legend), loc="lower left", fontsize=8, bbox_to_anchor=(0, 0)) if legend else None
        axis.margins(x=0.08)
    for axis in axes[:, 0]:
        low, high = axis.get_ylim()
        axis.set_ylim(low / (high / low) ** 0.4, high)             # room for the legends
        axis.set_ylabel("learning rate")
    figure.suptitle(f"{setting(summary)} (brackets: 95 % intervals)", fontsize=10.5)
    return figure


def fitted(row, name):
    """': n^exponent [interval]' for a legend, empty where nothing was fitted."""
    slope, (low, high) = row[f"{name}_exponent"], row[f"{name}_interval"]
    return "" if slope is None else f" {power(slope)}" + ("" if low is None else f" [{low:.2f}, {high:.2f}]".replace("-", "−"))


def optimal_lr(summary):
    """Optimal LR against width for every curve, fits through them, and the slopes n^-1/2 and n^-1 for the eye."""
    rows = curves(summary)
    figure, axis = plt.subplots(figsize=(7.0, 3.9))
    every = np.unique(np.concatenate([row["widths"] for row in rows])).astype(float)
    for row, colour in zip(rows, np.resize(COLOURS, len(rows))):
        widths, optimal = floats(row["widths"]), floats(row["optimal_lr"])
        if np.isfinite(optimal).any():
            axis.plot(widths, optimal, "o", color=colour, markersize=5, label=name_of(row, rows) + fitted(row, "optimal"))
            if row["optimal_exponent"] is not None:
                axis.plot(widths, fit_line(widths, optimal, row["optimal_exponent"]), color=colour, linewidth=1.2)
    # The reference slopes touch no data: one above all points, one below.
    for exponent, style, extreme, factor in ((-0.5, "--", np.nanmax, 1.7), (-1.0, "-.", np.nanmin, 1 / 1.7)):
        level = factor * extreme([extreme(floats(row["optimal_lr"]) * (np.array(row["widths"]) / every[0]) ** -exponent) for row in rows])
        axis.plot(every, level * (every / every[0]) ** exponent, color="0.45", linestyle=style, linewidth=1.1,
                  label=f"slope {power(exponent)}")
    axis.set(xscale="log", yscale="log", xlabel="width n", ylabel="optimal learning rate", title=setting(summary))
    octaves(axis.xaxis, every)
    axis.legend(fontsize=8.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


REGIMES = {"catastrophic": "#F7DAD3", "controlled divergence": "#FBF1CC", "stable": "#DDEEE3"}


def regimes(summary):
    """Exponents of logits and effective updates against α, measured (points, 95 % bars) on predicted (lines)."""
    first = summary["updates"][0]
    shown = [entry for entry in summary["updates"] if all(entry[key] == first[key] for key in ("param", "optimizer", "lr"))]
    losses, steps = (list(dict.fromkeys(entry[key] for entry in shown)) for key in ("loss", "step"))
    figure, axes = plt.subplots(len(steps), len(losses), figsize=(4.3 * len(losses) + 1.2, 3.2 * len(steps) + 0.3),
                                sharex=True, sharey=True, squeeze=False)
    output = summary["hidden_layers"]
    series = {"logits' change": ("logits", [output + 1]), "output update": ("effective", [output]),
              "hidden updates": ("effective", range(1, output)), "input update": ("effective", [0])}
    for (i, step), (j, loss) in ((a, b) for a in enumerate(steps) for b in enumerate(losses)):
        axis, here = axes[i, j], [entry for entry in shown if (entry["step"], entry["loss"]) == (step, loss)]
        alphas = sorted({entry["alpha"] for entry in here})
        regime = {entry["alpha"]: entry["regime"] for entry in here}
        ends = alphas[1:] + [alphas[-1] + 0.08]
        for alpha, end in zip([alphas[0] - 0.08] + alphas[1:], ends):
            axis.axvspan(alpha, end, color=REGIMES[regime[max(alpha, alphas[0])]], linewidth=0, zorder=0)
        for name in dict.fromkeys(regime.values()):
            inside = [(low + high) / 2 for low, high in zip(alphas, ends) if regime[low] == name]
            axis.text(sum(inside) / len(inside), 1.0, name.replace(" ", "\n"), transform=axis.get_xaxis_transform(), ha="center",
                      va="top", fontsize=7.5, color="0.35")
        for (label, (kind, layers)), colour, shift in zip(series.items(), COLOURS, (0.012, -0.012, 0.0, 0.0)):
            chosen = [entry for entry in here if entry["kind"] == kind and entry["layer"] in layers]
            line = {entry["alpha"]: entry["predicted"] for entry in chosen}
            axis.plot(alphas, floats(line[alpha] for alpha in alphas), color=colour, linewidth=1.3, zorder=2)
            measured = [entry for entry in chosen if entry["exponent"] is not None]
            x, y = (np.array([entry[key] for entry in measured], dtype=float) for key in ("alpha", "exponent"))
            bars = np.abs(np.array([floats(entry["interval"]) for entry in measured]).reshape(-1, 2) - y[:, None]).T
            axis.errorbar(x + shift, y, bars, fmt="o", color=colour, markersize=4, markerfacecolor="white", markeredgewidth=1.2,
                          elinewidth=1, label=label, zorder=3)
        axis.axhline(0, color="0.4", linewidth=0.8)
        axis.set_xlim(alphas[0] - 0.08, ends[-1])
        axis.set_title(f"{NAMES[loss]}, after {step} step{'s' if step > 1 else ''}")
        axis.set(xlabel="α (learning rate ∝ $n^{-α}$)" if i == len(steps) - 1 else "", ylabel="width exponent" if j == 0 else "")
    predicted = [entry["predicted"] for entry in shown if entry["predicted"] is not None]
    axes[0, 0].set_ylim(min(predicted) - 0.25, min(max(predicted), 1.6) + 0.75)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center", fontsize=8.5,
                  title="lines: predicted\npoints: measured")
    rate = f"learning rate {first['lr']:g} (n / {summary['base_width']})$^{{-α}}$"
    figure.suptitle(f"{setting(summary)}, {NAMES[first['param']]}, {NAMES[first['optimizer']]}, {rate}", fontsize=10.5)
    return figure


def curve_key(entry):
    """What tells one tracked curve from another."""
    return tuple(entry.get(name) for name in ("loss", "param", "optimizer", "alpha", "lr", "warmup", "warmup_exponent"))


def curve_keys(entries):
    return list(dict.fromkeys(map(curve_key, entries)))


def updates(summary, step=1):
    """Effective (top) and propagating (bottom) updates of every layer after a step; measured and predicted exponent."""
    entries = [entry for entry in summary["updates"] if entry["step"] == step and entry["loss"] == summary["updates"][0]["loss"]]
    keys = [key for key in curve_keys(entries) if key[3] in (0.0, 0.5, 1.0)] or curve_keys(entries)[:3]
    layers = sorted({entry["layer"] for entry in entries if entry["kind"] == "effective"})
    figure, axes = plt.subplots(2, len(layers), figsize=(2.75 * len(layers) + 0.6, 5.6), squeeze=False)
    for (i, kind), (j, layer) in ((a, b) for a in enumerate(("effective", "propagating")) for b in enumerate(layers)):
        axis = axes[i, j]
        for key, colour in zip(keys, COLOURS):
            for entry in entries:
                if (curve_key(entry), entry["kind"], entry["layer"]) == (key, kind, layer):
                    widths, mean = floats(entry["widths"]), geometric_mean(entry)
                    axis.plot(widths[np.isfinite(mean)], mean[np.isfinite(mean)], "o", color=colour, markersize=4)
                    if entry["exponent"] is not None:
                        axis.plot(widths, fit_line(widths, mean, entry["exponent"]), color=colour,
                                  label=f"{name_of(entry, entries)}: {entry['exponent']:+.2f} ({entry['predicted']:+.2f})"
                                  .replace(" -", " −").replace("(-", "(−"))
        axis.set(xscale="log", yscale="log", xlabel="width n" if i == 1 or j == 0 else "")
        octaves(axis.xaxis, entries[0]["widths"])
        axis.set_visible(bool(axis.lines))
        low, high = axis.get_ylim()
        axis.set_ylim(low, high * (high / low) ** 0.5)          # room for the legend
        sparse_decades(axis.yaxis, high / low)
        axis.legend(fontsize=7.5, loc="upper left", borderaxespad=0.1, handlelength=1.2) if axis.get_legend_handles_labels()[1] else None
        name = "readout" if layer == layers[-1] else f"layer {layer + 1}"
        axis.set_title(f"{name}: {'ΔW x' if kind == 'effective' else 'W₀ Δx'}")
    axes[0, 0].set_ylabel("RMS, effective update")
    axes[1, min(1, len(layers) - 1)].set_ylabel("RMS, propagating update")
    title = f"{setting(summary).rpartition(',')[0]}, after {'one step' if step == 1 else f'{step} steps'}. Exponent measured (predicted)"
    figure.suptitle(title, fontsize=10.5)
    return figure


def later_updates(summary):
    """The same after the last step."""
    return updates(summary, summary["steps"])


def alignment(summary):
    """Operator-norm alignment of ΔW with x, and of W0 with Δx, over training steps; one line per width."""
    key = curve_keys(summary["alignment"])[0]
    entries = [entry for entry in summary["alignment"] if curve_key(entry) == key]
    layers = sorted({entry["layer"] for entry in entries})
    figure, axes = plt.subplots(2, len(layers), figsize=(2.6 * len(layers) + 0.9, 4.8), sharex=True, sharey=True, squeeze=False)
    shades = plt.get_cmap("viridis_r")(np.linspace(0.12, 1.0, len(entries[0]["widths"])))
    titles = {"operator_update": "ΔW and x", "operator_propagating": "W₀ and Δx"}
    for entry in entries:
        axis = axes[list(titles).index(entry["kind"]), entry["layer"]]
        for width, values, shade in zip(entry["widths"], entry["values"], shades):
            axis.plot(entry["steps"], floats(values), color=shade, label=f"{width}")
        name = "readout" if entry["layer"] == layers[-1] else f"layer {entry['layer'] + 1}"
        axis.set_title(f"{name}: {titles[entry['kind']]}")
        axis.set(xscale="log", ylim=(0, 1.05), xlabel="step" if entry["kind"] == "operator_propagating" or entry["layer"] == 0 else "")
        axis.set_visible(bool(np.isfinite(np.concatenate([floats(line) for line in entry["values"]])).any()))
    for axis in (axes[0, 0], axes[1, 1] if len(layers) > 1 else axes[1, 0]):
        axis.set_ylabel("alignment")
        axis.yaxis.set_tick_params(labelleft=True)
    axes[0, 0].xaxis.set_tick_params(labelbottom=True)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), title="width", loc="outside right center")
    figure.suptitle(f"{setting(summary)}, {NAMES[key[0]]}, α = {key[3]:g}. Operator-norm alignment", fontsize=10.5)
    return figure


def limit(summary):
    """Distance of the softmax outputs to the widest network's (left), and the last features' change (right), against width."""
    figure, axes = plt.subplots(1, 2, figsize=(8.6, 3.7))
    for key, colour in zip(curve_keys(summary["limit"]), COLOURS):
        label = f"{NAMES[key[0]]}, α = {key[3]:g}"
        last = key, summary["steps"], "features", summary["hidden_layers"] - 1
        change, = [entry for entry in summary["updates"] if (curve_key(entry), entry["step"], entry["kind"], entry["layer"]) == last]
        distance, = [entry for entry in summary["limit"] if curve_key(entry) == key]
        for axis, entry, cut in ((axes[0], distance, -1), (axes[1], change, None)):
            widths, mean = floats(entry["widths"])[:cut], geometric_mean(entry)[:cut]
            ok = np.isfinite(mean)
            if ok.sum() > 1:
                slope = np.polyfit(np.log(widths[ok]), np.log(mean[ok]), 1)[0]
                for line in entry["values"]:
                    axis.plot(widths[ok], floats(line)[:cut][ok], "o", color=colour, markersize=3, alpha=0.5)
                axis.plot(widths[ok], fit_line(widths[ok], mean[ok], slope), color=colour, label=f"{label}: {power(slope)}")
    for axis, ylabel in zip(axes, ("distance of softmax outputs\nto the widest network's", "change of the last hidden features (RMS)")):
        axis.set(xscale="log", yscale="log", xlabel="width n", ylabel=ylabel)
        octaves(axis.xaxis, summary["limit"][0]["widths"][:-1] if axis is axes[0] else summary["limit"][0]["widths"])
        axis.legend(fontsize=8.5) if axis.get_legend_handles_labels()[1] else None
    figure.suptitle(f"{setting(summary)}; one point per seed", fontsize=10.5)
    return figure


def tensor_kinds(summary):
    """Exponents of every tensor's updates by its kind, over the layers: measured (points, 95 % bars) and predicted (ticks)."""
    entries = [entry for entry in summary["updates"] if entry["step"] == 1 and entry["kind"] != "logits"]
    kinds = list(dict.fromkeys(entry["module"].rpartition(".")[2] for entry in entries))
    figure, axes = plt.subplots(2, 1, figsize=(0.78 * len(kinds) + 2.4, 5.6), sharex=True, squeeze=False)
    keys = curve_keys(entries)
    for axis, (kind, title) in zip(axes[:, 0], (("effective", "effective updates ΔW x"), ("propagating", "propagating updates W₀ Δx"))):
        for i, (key, colour) in enumerate(zip(keys, COLOURS)):
            here = [entry for entry in entries if curve_key(entry) == key and entry["kind"] == kind and entry["exponent"] is not None]
            place = np.array([kinds.index(entry["module"].rpartition(".")[2]) for entry in here]) + 0.26 * (i - (len(keys) - 1) / 2)
            axis.hlines([entry["predicted"] for entry in here], place - 0.12, place + 0.12, color=colour, linewidth=2.4, alpha=0.45)
            y = floats(entry["exponent"] for entry in here)
            bars = np.abs(np.array([floats(entry["interval"]) for entry in here]).reshape(-1, 2) - y[:, None]).T
            label = NAMES[key[1]]
            axis.errorbar(place, y, bars, fmt="o", color=colour, markersize=4, markerfacecolor="white", elinewidth=1, label=label)
        axis.axhline(0, color="0.4", linewidth=0.8)
        axis.set(title=title, ylabel="width exponent")
        axis.grid(axis="x", visible=False)
    axes[1, 0].set_xticks(range(len(kinds)), [kind.replace("_", "\n") for kind in kinds])
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center", title="ticks: predicted\npoints: measured")
    figure.suptitle(f"{setting(summary).rpartition(',')[0]}, {NAMES[keys[0][2]]}, after one step", fontsize=10.5)
    return figure


def losses(summary):
    """Best validation accuracy over LR against width, one panel per parameterization, one line per loss (Fig. 7)."""
    rows = curves(summary)
    names = list(dict.fromkeys(row["param"] for row in rows))
    figure, axes = panels(len(names), 3.2, 3.2, sharey=True)
    for row in rows:
        axis, colour = axes.flat[names.index(row["param"])], COLOURS[list(NAMES).index(row["loss"])]
        seeds = np.array([floats(values) for values in row["best_val_accuracy"]])           # (W, S)
        spread = t_quantile(seeds.shape[1] - 1) * seeds.std(1, ddof=1) / np.sqrt(seeds.shape[1]) if seeds.shape[1] > 1 else 0
        beside = {"ce": 1 / 1.05, "mse": 1.0, "brier": 1.05}[row["loss"]]       # lest the bars hide each other
        axis.errorbar(np.array(row["widths"]) * beside, 100 * seeds.mean(1), 100 * spread, fmt="o-", color=colour, capsize=2.5, markersize=4,
                      label=NAMES[row["loss"]])
        axis.set(xscale="log", xlabel="width n", title=NAMES[row["param"]])
        octaves(axis.xaxis, row["widths"])
    axes[0, 0].set_ylabel("best validation accuracy (%)")
    axes[0, 0].legend()
    figure.suptitle(f"{setting(summary)} (bars: 95 % over seeds)", fontsize=10.5)
    return figure


def t_quantile(freedom):
    """97.5 % quantile of Student's t."""
    return floats([np.nan, 12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306])[freedom] if freedom < 9 else 1.96 + 2.5 / freedom


def calibration(summary):
    """Expected calibration error and RMS of the logits at the optimal LR against width, under cross-entropy."""
    rows = [row for row in curves(summary) if row["loss"] == "ce"]
    figure, axes = plt.subplots(1, 2, figsize=(8.2, 3.4))
    for row, colour in zip(rows, COLOURS):
        for axis, key in zip(axes, ("val_ece", "logit_rms")):
            seeds = np.array([floats(values) for values in row["at_optimum"][key]])         # (W, S)
            slope = np.polyfit(np.log(row["widths"]), np.log(seeds.mean(1)), 1)[0]
            axis.plot(row["widths"], seeds, "o", color=colour, markersize=3, alpha=0.5)
            axis.plot(row["widths"], seeds.mean(1), color=colour, label=f"{name_of(row, rows)}: {power(slope)}")
            axis.set(xscale="log", yscale="log", xlabel="width n")
            octaves(axis.xaxis, row["widths"])
            sparse_decades(axis.yaxis, 1)
    for axis, label in zip(axes, ("expected calibration error", "RMS of the logits")):
        axis.set_ylabel(label)
        axis.legend(fontsize=8.5)
    figure.suptitle(f"{setting(summary)}: at the optimal learning rate, CE; one point per seed", fontsize=10.5)
    return figure


def is_mlp(summary):
    return summary["model"] == "mlp"


def linear_net(summary):
    """Largest stable LR, distance to the infinite-width limit and |loss decrease| of one step, against width. Theory dashed."""
    figure, axes = plt.subplots(1, 3, figsize=(10.4, 4.9))
    rows = [row for row in summary["rows"] if row["max_stable_exponent"] is not None]
    for row, colour, marker in zip(rows, np.resize(COLOURS, len(rows)), np.resize(list("os^Dv"), len(rows))):
        widths, stable, unstable = (floats(row[key]) for key in ("widths", "max_stable_lr", "min_unstable_lr"))
        label = (name_of(row, rows).partition(", ")[2] or warmup(row)) + ":\n" + fitted(row, "max_stable").strip()
        measured_and_predicted(axes[0], widths, np.sqrt(stable * unstable), row["max_stable_exponent"],
                               row["predicted_max_stable_exponent"], colour, marker, label)
    measured = summary["linear_net"]
    steps = list(dict.fromkeys(entry["step"] for entry in measured["distance"]))
    shades = dict(zip(steps, plt.get_cmap("viridis_r")(np.linspace(0.2, 0.95, len(steps)))))
    for entry in measured["distance"]:
        plural = "s" if entry["step"] > 1 else ""
        measured_and_predicted(axes[1], floats(entry["widths"]), geometric_mean(entry), entry["exponent"], None,
                               shades[entry["step"]], {"mup": "o", "ntp": "s"}[entry["param"]],
                               f"{NAMES[entry['param']]}, {entry['step']} step{plural}: {power(entry['exponent'])}")
    for entry, colour, marker in zip(measured["one_step"], COLOURS[3:], "os^D"):
        measured_and_predicted(axes[2], floats(entry["widths"]), geometric_mean(entry), entry["exponent"], entry["predicted"], colour,
                               marker, f"{NAMES[entry['param']]}, α = {entry['alpha']:g}: {power(entry['exponent'])} "
                               f"(predicted {power(entry['predicted'])})")
    widths = floats(measured["distance"][0]["widths"])
    lowest = min(np.nanmin(geometric_mean(entry) * np.sqrt(widths)) for entry in measured["distance"])
    axes[1].plot(widths, 0.4 * lowest / np.sqrt(widths), color="0.35", linestyle="--", linewidth=1.1,
                 label=f"predicted slope {power(-0.5)}")
    titles = "largest stable learning rate", "distance of f to its infinite-width limit", "|loss decrease| after one step"
    for axis, title in zip(axes, titles):
        axis.set(xscale="log", yscale="log", xlabel="width n", title=title)
        octaves(axis.xaxis, widths)
        if widths.max() > 5000:         # plain numbers would touch
            axis.xaxis.set_major_locator(LogLocator(base=16, subs=(4.0,)))
            axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"$2^{{{np.log2(value):.0f}}}$"))
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.legend(fontsize=8.5, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    figure.suptitle("Closed-form linear net f = x uᵀv, one sample, squared loss. Lines: fits. Dashed: predicted slopes", fontsize=10.5)
    return figure


def measured_and_predicted(axis, widths, values, exponent, predicted, colour, marker, label):
    """Points and the fit through them; the predicted slope dashed, above both."""
    points = dict(color=colour, marker=marker, markersize=4.5, markerfacecolor="white", markeredgewidth=1.3, linewidth=1.3)
    axis.plot([], [], label=label, **points)
    axis.plot(widths, values, zorder=3, **{**points, "linewidth": 0})
    axis.plot(widths, fit_line(widths, values, exponent), color=colour, linewidth=1.3)
    if predicted is not None:
        axis.plot(widths, 1.5 * fit_line(widths, values, predicted), color="0.35", linestyle="--", linewidth=1.1, zorder=1)


# figure: (function, can this summary show it?)
FIGURES = {
    "lr_transfer": (lr_transfer, curves),
    "exponents": (exponents, curves),
    "optimal_lr": (optimal_lr, curves),
    "regimes": (regimes, lambda summary: len({entry["alpha"] for entry in summary.get("updates", ())}) > 2),
    "updates": (updates, lambda summary: is_mlp(summary) and summary.get("updates")),
    "later_updates": (later_updates, lambda summary: is_mlp(summary) and summary.get("updates") and summary["steps"] > 1),
    "tensor_kinds": (tensor_kinds, lambda summary: not is_mlp(summary) and summary.get("updates")),
    "alignment": (alignment, lambda summary: is_mlp(summary) and summary.get("alignment") and len(summary["alignment"][0]["steps"]) > 5),
    "limit": (limit, lambda summary: is_mlp(summary) and summary.get("limit") and summary["steps"] > 20),
    "losses": (losses, lambda summary: len({row["loss"] for row in curves(summary)}) > 2),
    "calibration": (calibration, lambda summary: is_mlp(summary) and len({row["param"] for row in curves(summary) if row["loss"] == "ce"}) > 1),
    "linear_net": (linear_net, lambda summary: summary.get("linear_net")),
}


def draw(out, only=None):
    """Draws what a result folder can show into <out>/figures as PNG and PDF; returns the paths. ValueError without a summary.json."""
    path = Path(out) / "summary.json"
    if not path.exists():
        raise ValueError(f"{path} is not there; run python sweep.py --out {out} first")
    unknown = [name for name in only or () if name not in FIGURES]
    if unknown:
        raise ValueError(f"unknown figure {unknown[0]!r}; choose from {', '.join(FIGURES)}")
    try:
        summary, folder, written = json.loads(path.read_text()), Path(out) / "figures", []
        drawable = [name for name, (_, possible) in FIGURES.items() if possible(summary)]
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ValueError(f"{path} is damaged; the sweep's command writes it again from its rows, and runs nothing twice") from None
    hidden = [name for name in only or () if name not in drawable]
    if hidden:
        raise ValueError(f"figure {hidden[0]!r} cannot be drawn from {path}, only {', '.join(drawable) or 'none'}")
    folder.mkdir(exist_ok=True)
    for name in drawable:
        if not only or name in only:
            with plt.rc_context(STYLE):
                figure = FIGURES[name][0](summary)
                for ending in ("png", "pdf"):
                    written.append(folder / f"{name}.{ending}")
                    figure.savefig(written[-1])
                plt.close(figure)
    return written


def main():
    usage = "usage: python plots.py RESULT_FOLDER [FIGURE ...]; figures: " + ", ".join(FIGURES)
    if sys.argv[1:2] in (["-h"], ["--help"]):
        print(usage)
    elif len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        raise ValueError(usage)
    else:
        print(*draw(sys.argv[1], sys.argv[2:]), sep="\n")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"plots.py: {error}", file=sys.stderr)
        sys.exit(2)
