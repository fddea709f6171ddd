"""Figures from result files alone: python plots.py out/NAME draws everything that out/NAME/summary.json can show.

    lr_transfer   loss against LR, and against LR rescaled by the predicted exponent, one line per width (Fig. 5)
    exponents     optimal and largest stable LR against width, with fits and the predicted slope (Fig. 5, right)
    optimal_lr    optimal LR against width with fits, beside n^-1/2 and n^-1 (Fig. 1)
    regimes       measured exponents of logits and updates against α on the predicted lines (Propositions 1 and 2)
    updates       effective and propagating updates of every layer against width (Fig. 4)
    alignment     operator-norm alignment over training steps, one line per width (Fig. 2)
    limit         distance of the softmax outputs to the widest network's, and the features' change (Proposition 2)

Figure numbers are those of arXiv 2505.22491. Each function takes the summary.json that sweep.py writes, and returns a
matplotlib figure. The last four need a sweep with --track. Widths are a sequential colour, curves the colour-blind-safe
set of Okabe and Ito.
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


def name_of(row, rows):
    """What tells this curve from the others: its loss, and parameterization and optimizer where they differ."""
    keys = ["loss"] + [key for key in ("param", "optimizer", "alpha") if len({other[key] for other in rows}) > 1]
    return ", ".join(NAMES.get(row[key], f"α = {row[key]}") for key in keys)


def setting(summary):
    """The title line of a sweep: what all its curves share."""
    return f"{summary['data'].replace('_', '-')}, {summary['hidden_layers']} hidden layers, {summary['steps']} steps"


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


def power(exponent):
    return f"$n^{{{exponent:.2f}}}$".replace("-", "−")


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
    """Loss against LR (top) and against LR x (n / n0)^(predicted exponent) (bottom), one column per curve."""
    rows = curves(summary)
    figure, axes = plt.subplots(2, len(rows), figsize=(3.9 * len(rows) + 0.9, 5.6), squeeze=False)
    shades = plt.get_cmap("viridis_r")(np.linspace(0.12, 1.0, max(len(row["widths"]) for row in rows)))
    for column, row in zip(axes.T, rows):
        predicted = row["predicted_max_stable_exponent"]
        for i, (width, curve) in enumerate(zip(row["widths"], row["curves"])):
            losses = np.array([floats(seed) for seed in curve["train_loss"]])           # (S, K)
            ok = np.isfinite(losses).all(0)         # an LR at which a seed diverged has no mean
            for axis, exponent in zip(column, (0.0, predicted or 0.0)):
                lr = np.array(curve["lr"]) * (width / row["base_width"]) ** -exponent
                axis.plot(lr[ok], losses[:, ok].mean(0), marker="o", markersize=2.6, color=shades[i], label=f"{width}", zorder=3)
                axis.fill_between(lr[ok], losses[:, ok].min(0), losses[:, ok].max(0), color=shades[i], alpha=0.18, linewidth=0)
                if row["min_unstable_lr"][i] is not None:
                    edge = np.sqrt(row["max_stable_lr"][i] * row["min_unstable_lr"][i]) * (width / row["base_width"]) ** -exponent
                    axis.axvline(edge, color=shades[i], linewidth=1.0, linestyle=":")
        seen = np.concatenate([floats(np.ravel(curve["train_loss"])) for curve in row["curves"]])
        low, chance = np.nanmin(seen), row["chance_loss"]
        top = max(chance + 0.12 * (chance - low), min(np.nanmax(seen), 1.7 * chance))
        for axis in column:
            axis.axhline(chance, color="0.5", linewidth=0.9, linestyle="--")
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(LogLocator(base=10, numticks=12))
            axis.set_ylim(low - 0.06 * (top - low), top)
        column[0].set_title(name_of(row, rows))
        column[0].set_xlabel("learning rate")
        column[1].set_xlabel(f"learning rate × (n / {row['base_width']})$^{{{-predicted:g}}}$" if predicted else "learning rate")
    for axis in axes[:, 0]:
        axis.set_ylabel("final train loss")
    axes[0, -1].legend(*axes[0, 0].get_legend_handles_labels(), title="width", loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.suptitle(f"{setting(summary)}. Dotted: stability edge. Dashed: constant predictor", fontsize=10.5)
    return figure


def exponents(summary):
    """Optimal LR (circles) and the bracket of the largest stable one (bars) against width, one panel per curve."""
    rows = curves(summary)
    figure, axes = plt.subplots(1, len(rows), figsize=(3.7 * len(rows) + 0.4, 3.9), sharey=True, squeeze=False)
    for axis, row, colour in zip(axes[0], rows, np.resize(COLOURS, len(rows))):
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
    low, high = axes[0, 0].get_ylim()
    axes[0, 0].set_ylim(low / (high / low) ** 0.35, high)          # room for the legends
    axes[0, 0].set_ylabel("learning rate")
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
    return tuple(entry[name] for name in ("loss", "param", "optimizer", "alpha", "lr"))


def curve_keys(entries):
    return list(dict.fromkeys(map(curve_key, entries)))


def updates(summary):
    """Effective (top) and propagating (bottom) updates of every layer after the first step; measured and predicted exponent."""
    entries = [entry for entry in summary["updates"] if entry["step"] == 1 and entry["loss"] == summary["updates"][0]["loss"]]
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
                                  label=f"α = {entry['alpha']:g}: {entry['exponent']:+.2f} ({entry['predicted']:+.2f})"
                                  .replace("-", "−"))
        axis.set(xscale="log", yscale="log", xlabel="width n" if i == 1 or j == 0 else "")
        octaves(axis.xaxis, entries[0]["widths"])
        axis.set_visible(bool(axis.lines))
        low, high = axis.get_ylim()
        axis.set_ylim(low, high * (high / low) ** 0.5)          # room for the legend
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.legend(fontsize=7.5, loc="upper left", borderaxespad=0.1, handlelength=1.2) if axis.get_legend_handles_labels()[1] else None
        name = "readout" if layer == layers[-1] else f"layer {layer + 1}"
        axis.set_title(f"{name}: {'ΔW x' if kind == 'effective' else 'W₀ Δx'}")
    axes[0, 0].set_ylabel("RMS, effective update")
    axes[1, min(1, len(layers) - 1)].set_ylabel("RMS, propagating update")
    names = ", ".join(NAMES[value] for value in keys[0][:3])
    figure.suptitle(f"{names}, after one step. Exponent measured (predicted)", fontsize=10.5)
    return figure


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


# figure: (function, can this summary show it?)
FIGURES = {
    "lr_transfer": (lr_transfer, curves),
    "exponents": (exponents, curves),
    "optimal_lr": (optimal_lr, curves),
    "regimes": (regimes, lambda summary: len({entry["alpha"] for entry in summary.get("updates", ())}) > 2),
    "updates": (updates, lambda summary: summary.get("updates")),
    "alignment": (alignment, lambda summary: summary.get("alignment") and len(summary["alignment"][0]["steps"]) > 5),
    "limit": (limit, lambda summary: summary.get("limit") and summary["steps"] > 20),
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
