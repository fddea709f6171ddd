"""Figures from result files alone: python plots.py out/NAME draws everything that out/NAME/summary.json can show.

    lr_transfer   loss against LR, and against LR rescaled by the predicted exponent, one line per width (Fig. 5)
    exponents     optimal and largest stable LR against width, with fits and the predicted slope (Fig. 5, right)
    optimal_lr    optimal LR against width with fits, beside n^-1/2 and n^-1 (Fig. 1)

Figure numbers are those of arXiv 2505.22491. Each function takes the rows of summary.json (sweep.py writes them) and
returns a matplotlib figure. Widths are a sequential colour, curves the colour-blind-safe set of Okabe and Ito.
Needs numpy and matplotlib only.
"""
import json
import sys
from pathlib import Path

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

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


def setting(row):
    """The title line of a sweep: what all its curves share."""
    return f"{row['data'].replace('_', '-')}, {row['hidden_layers']} hidden layers, {row['steps']} steps"


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


def lr_transfer(rows):
    """Loss against LR (top) and against LR x (n / n0)^(predicted exponent) (bottom), one column per curve."""
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
        low = np.nanmin(seen)
        for axis in column:
            axis.axhline(row["chance_loss"], color="0.5", linewidth=0.9, linestyle="--")
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(LogLocator(base=10, numticks=12))
            axis.set_ylim(low - 0.06 * (row["chance_loss"] - low), row["chance_loss"] + 0.12 * (row["chance_loss"] - low))
        column[0].set_title(name_of(row, rows))
        column[0].set_xlabel("learning rate")
        column[1].set_xlabel(f"learning rate × (n / {row['base_width']})$^{{{-predicted:g}}}$" if predicted else "learning rate")
    for axis in axes[:, 0]:
        axis.set_ylabel("final train loss")
        axis.annotate("constant predictor", (0.02, rows[0]["chance_loss"]), xycoords=("axes fraction", "data"), fontsize=8,
                      color="0.4", va="bottom", xytext=(0, 1), textcoords="offset points")
    axes[0, -1].legend(*axes[0, 0].get_legend_handles_labels(), title="width", loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.suptitle(f"{setting(rows[0])}; dotted: stability edge", fontsize=10.5)
    return figure


def exponents(rows):
    """Optimal LR (filled) and the bracket of the largest stable one (bars) against width, one panel per curve."""
    figure, axes = plt.subplots(1, len(rows), figsize=(3.7 * len(rows) + 0.4, 3.9), sharey=True, squeeze=False)
    for axis, row, colour in zip(axes[0], rows, np.resize(COLOURS, len(rows))):
        widths, optimal, stable, unstable = (floats(row[key]) for key in ("widths", "optimal_lr", "max_stable_lr", "min_unstable_lr"))
        edge, predicted = np.sqrt(stable * unstable), row["predicted_max_stable_exponent"]
        legend = []
        if np.isfinite(edge).any():
            legend.append((axis.errorbar(widths, edge, [edge - stable, unstable - edge], color=colour, fmt="none", capsize=3, elinewidth=1.6),
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
    figure.suptitle(f"{setting(rows[0])} (brackets: 95 % intervals)", fontsize=10.5)
    return figure


def fitted(row, name):
    """': n^exponent [interval]' for a legend, empty where nothing was fitted."""
    slope, (low, high) = row[f"{name}_exponent"], row[f"{name}_interval"]
    return "" if slope is None else f" {power(slope)}" + ("" if low is None else f" [{low:.2f}, {high:.2f}]".replace("-", "−"))


def optimal_lr(rows):
    """Optimal LR against width for every curve, fits through them, and the slopes n^-1/2 and n^-1 for the eye."""
    figure, axis = plt.subplots(figsize=(5.4, 4.0))
    every = np.unique(np.concatenate([row["widths"] for row in rows])).astype(float)
    for row, colour in zip(rows, np.resize(COLOURS, len(rows))):
        widths, optimal = floats(row["widths"]), floats(row["optimal_lr"])
        if np.isfinite(optimal).any():
            axis.plot(widths, optimal, "o", color=colour, markersize=5, label=name_of(row, rows) + fitted(row, "optimal"))
            if row["optimal_exponent"] is not None:
                axis.plot(widths, fit_line(widths, optimal, row["optimal_exponent"]), color=colour, linewidth=1.2)
    top = 1.7 * max(np.nanmax(floats(row["optimal_lr"]) * np.sqrt(np.array(row["widths"]) / every[0])) for row in rows)
    for exponent, style in ((-0.5, "--"), (-1.0, "-.")):
        axis.plot(every, top * (every / every[0]) ** exponent, color="0.45", linestyle=style, linewidth=1.1,
                  label=f"slope {power(exponent)}")
    axis.set(xscale="log", yscale="log", xlabel="width n", ylabel="optimal learning rate", title=setting(rows[0]))
    octaves(axis.xaxis, every)
    axis.legend(fontsize=8.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


FIGURES = {"lr_transfer": lr_transfer, "exponents": exponents, "optimal_lr": optimal_lr}


def draw(out, only=None):
    """Draws the figures of a result folder into <out>/figures as PNG and PDF; returns their paths. ValueError if it holds none."""
    path = Path(out) / "summary.json"
    if not path.exists():
        raise ValueError(f"{path} is not there; run python sweep.py --out {out} first")
    rows = [row for row in json.loads(path.read_text())["rows"] if any(lr is not None for lr in row["optimal_lr"])]
    if not rows:
        return []
    unknown = [name for name in only or () if name not in FIGURES]
    if unknown:
        raise ValueError(f"unknown figure {unknown[0]!r}; choose from {', '.join(FIGURES)}")
    folder, written = Path(out) / "figures", []
    folder.mkdir(exist_ok=True)
    for name in only or FIGURES:
        with plt.rc_context(STYLE):
            figure = FIGURES[name](rows)
            for ending in ("png", "pdf"):
                written.append(folder / f"{name}.{ending}")
                figure.savefig(written[-1])
            plt.close(figure)
    return written


def main():
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        raise ValueError("usage: python plots.py RESULT_FOLDER [FIGURE ...]; figures: " + ", ".join(FIGURES))
    for path in draw(sys.argv[1], sys.argv[2:]):
        print(path)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"plots.py: {error}", file=sys.stderr)
        sys.exit(2)
