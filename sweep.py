"""Sweeps the learning rate over widths, and fits how the optimal and the largest stable one scale.

    python sweep.py                                 # the headline on generated data: CE n^-1/2 against MSE n^-1
    python sweep.py --preset optimal_lr             # Fashion-MNIST, 8-layer MLP (Fig. 1 and 5 of arXiv 2505.22491)
    python sweep.py --widths 64 256 1024 --param sp mup --optimizer adam --lr-range 1e-5 1 --out out/adam

One row per run goes to <out>/runs.jsonl as soon as its stack is done; what is there is not run again, so a killed sweep
started again goes on. `summarize` then needs nothing but those rows.

    curve            one (loss, param, optimizer, alpha, warmup); its exponent is of LR against width: -0.5 means n^-1/2
    optimal LR       argmin of the seed-mean final train loss, refined by a parabola in log LR
    max-stable LR    end of the contiguous stable range above the optimum: a bracket, and its geometric mean
    lattice          LRs are step^k for whole k, so grids of different widths, and extended grids, share their points
"""
import datetime
import fcntl
import functools
import itertools
import json
import math
import os
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch

import metrics
import models
import param
import train

# Settings that tell one curve from another, and those that vary within a sweep.
CURVE = ("loss", "param", "optimizer", "alpha", "norm_affine", "warmup", "warmup_exponent")
GRID = ("width", "lr", "seed") + CURVE
LR_RANGE = {"sgd": (2 ** -8, 2 ** 3), "adam": (2 ** -9, 2 ** -1)}

# The closed-form net: constant LR, a fixed warmup, and one that grows as n^1/2.
LINEAR_NET = dict(model="linear_net", label_noise=0.01, seeds=4, base_width=64, lrs=[2 ** (k / 2) for k in range(-44, 5)],
                  stable_if="chance=1e12")      # a late catapult raises the loss for a while: only divergence counts
PRESETS = {     # name: {scale: flags}
    "headline": {
        "cpu": dict(hidden_layers=4, steps=100, widths=[64, 128, 256, 512, 1024], loss=["ce", "mse"], seeds=3),
        "paper": dict(widths=[256, 512, 1024, 2048, 4096], loss=["ce", "mse"], seeds=4, hidden_layers=7, steps=937)},
    "optimal_lr": {
        "cpu": dict(data="fashion_mnist", hidden_layers=7, steps=150, batch_size=128, widths=[128, 256, 512, 1024],
                    loss=["ce", "mse"], seeds=3, lr_range=[2 ** -9, 1.0], stable_if="accuracy"),
        "paper": dict(data="mnist", hidden_layers=7, steps=937, widths=[256, 512, 1024, 2048, 4096, 8192, 16384],
                      loss=["ce", "mse"], seeds=4, lr_range=[2 ** -12, 4.0], stable_if="accuracy")},
    "lr_transfer": {
        "cpu": dict(param=["sp", "ntp", "mup", "sp_full_align"], hidden_layers=4, steps=100, widths=[64, 128, 256, 512], seeds=3,
                    search="grid", lr_range=[2 ** -5, 2.0]),
        "paper": dict(param=["sp", "ntp", "mup", "sp_full_align"], data="mnist", hidden_layers=7, steps=937, seeds=4, search="grid",
                      widths=[256, 512, 1024, 2048, 4096], stable_if="accuracy")},
    "losses": {
        "cpu": dict(data="fashion_mnist", loss=["ce", "mse", "brier"], param=["sp", "mup", "sp_full_align"], widths=[64, 128, 256, 512],
                    base_width=64, steps=200, seeds=3, stable_if="accuracy"),
        "paper": dict(data="fashion_mnist", loss=["ce", "mse", "brier"], param=["sp", "mup", "sp_full_align"], hidden_layers=7,
                      widths=[256, 512, 1024, 2048, 4096, 8192], steps=937, seeds=4, stable_if="accuracy")},
    "updates": {
        "cpu": dict(curves=[dict(alpha=0.5), dict(param="mup"), dict(param="sp_full_align")], widths=[128, 256, 512, 1024],
                    lrs=[0.1], steps=10, seeds=3, track=1),
        "paper": dict(curves=[dict(alpha=0.5), dict(param="mup"), dict(param="sp_full_align")], hidden_layers=7, steps=100, seeds=4,
                      widths=[256, 512, 1024, 2048, 4096], lrs=[0.1], track=10)},
    "alignment": {
        "cpu": dict(alpha=[0.5], widths=[64, 128, 256, 512, 1024], lrs=[0.1], steps=200, seeds=3, track=20),
        "paper": dict(alpha=[0.5], data="mnist", widths=[256, 512, 1024, 2048, 4096], hidden_layers=7, lrs=[0.1], steps=937, seeds=4,
                      track=50)},
    "regimes": {
        "cpu": dict(loss=["ce", "mse"], alpha=[-0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25], widths=[128, 256, 512, 1024],
                    lrs=[0.005], readout_scale=0.05, steps=4, seeds=3, track=1),
        "paper": dict(loss=["ce", "mse"], alpha=[-0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25], widths=[256, 512, 1024, 2048, 4096],
                      hidden_layers=7, lrs=[0.005], readout_scale=0.05, steps=10, seeds=4, track=1)},
    "gpt": {
        "cpu": dict(model="gpt", widths=[32, 64, 128, 256], seeds=3, steps=150, stable_if="best+1", curves=[
            dict(optimizer="sgd"), dict(optimizer="adam"), dict(optimizer="adam", norm_affine=False),
            dict(optimizer="adam", param="mup"), dict(optimizer="adam", param="sp_full_align")]),
        "paper": dict(model="gpt", widths=[256, 1024, 4096], seeds=3, steps=10_681, layers=6, context=512, head_dim=32, batch_size=256,
                      accumulate=8, warmup=700, dtype="bfloat16", base_width=256, stable_if="best+1", curves=[
            dict(optimizer="sgd"), dict(optimizer="adam"), dict(optimizer="adam", norm_affine=False),
            dict(optimizer="adam", param="mup"), dict(optimizer="adam", param="sp_full_align")])},
    "gpt_small": {
        "cpu": dict(model="gpt", widths=[32, 64, 128], seeds=2, steps=100, optimizer=["adam"], stable_if="best+1"),
        "paper": dict(model="gpt", widths=[256, 1024], seeds=2, steps=10_681, layers=6, context=512, batch_size=256, accumulate=8,
                      warmup=700, dtype="bfloat16", base_width=256, optimizer=["adam"], stable_if="best+1")},
    "gpt_updates": {
        "cpu": dict(model="gpt", optimizer=["adam"], param=["sp", "mup", "sp_full_align"], widths=[64, 128, 256, 512], lrs=[0.001],
                    warmup=0, decay="none", steps=4, seeds=3, track=1),
        "paper": dict(model="gpt", optimizer=["adam"], param=["sp", "mup", "sp_full_align"], widths=[256, 512, 1024, 2048, 4096],
                      base_width=256, layers=6, context=512, batch_size=64, warmup=0, decay="none", lrs=[0.001], steps=4, seeds=3, track=1)},
    "limit": {
        "cpu": dict(alpha=[0.5, 1.0], widths=[128, 256, 512, 1024], lrs=[0.1], steps=100, seeds=3, track=10),
        "paper": dict(alpha=[0.5, 1.0], widths=[256, 512, 1024, 2048, 4096, 8192], hidden_layers=7, lrs=[0.1], steps=937,
                      seeds=4, track=50)},
    "linear_net": {     # at the narrowest width, where all parameterizations coincide, both warmups are equally long
        "cpu": dict(LINEAR_NET, widths=[4 ** k for k in range(3, 11)], steps=5000, stack="256",
                    curves=[{}, dict(warmup=32), dict(warmup=32, warmup_exponent=0.5)]),
        "paper": dict(LINEAR_NET, widths=[2 ** k for k in range(6, 21)], steps=100_000, stack="64",
                      curves=[{}, dict(warmup=512), dict(warmup=512, warmup_exponent=0.5)])},
}
DEFAULT_PRESET = {"mlp": "headline", "gpt": "gpt_small", "linear_net": "linear_net"}
CRITERIA = {    # name: (default X, stable(mean final train loss, mean train accuracy, lowest mean loss, chance loss, X), words)
    "chance": (1.0, lambda loss, accuracy, best, chance, x: loss < x * chance, "loss below X times a constant predictor's"),
    "accuracy": (0.3, lambda loss, accuracy, best, chance, x: accuracy > x, "train accuracy above X"),
    "best+1": (1.0, lambda loss, accuracy, best, chance, x: loss < best + x, "loss within X of the width's lowest"),
    "1.2x": (1.2, lambda loss, accuracy, best, chance, x: loss < x * best, "loss within X times the width's lowest"),
}
DIVERGED = 1e30         # stands for the infinite loss of a diverged run, so that weighted means stay numbers
COARSE = 4              # lattice steps between the points of the coarse grid: a factor 4 at the default step sqrt(2)
EXTENSIONS = 6          # coarse steps by which a grid may grow beyond either end


# ------------------------------------------------------------------------------------------------------------------
# Result files

def key_of(row):
    """What identifies a row: a run's id, or (id, step, layer) of a tracked module."""
    return (row["id"], row["step"], row["layer"]) if "step" in row else row["id"]


def read_rows(out, files="runs*.jsonl", mend=True):
    """{key: row} of every runs*.jsonl in a folder, or of its track*.jsonl.

    A last line without its end was cut by a kill: dropped, with a word, where nobody else may be writing (mend). ValueError
    names any other line that is no row.
    """
    rows = {}
    for path in sorted(Path(out).glob(files)):
        content = path.read_bytes()
        whole = content[:content.rfind(b"\n") + 1]
        if len(whole) < len(content) and mend:
            print(f"{path}: dropped a half-written last line; its run is done again", file=sys.stderr)
            os.truncate(path, len(whole))
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                row = json.loads(line)
                rows[key_of(row)] = row
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{path}:{number} is not a result row; remove that line, or use another --out") from None
    return rows


def write_json(path, value):
    """Writes whole or not at all."""
    with train.whole_file(path) as file:
        file.write((json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def rows_file(kind, rank):
    """The file into which a rank of torchrun writes its rows; rank 0's is that of a sweep without torchrun."""
    return f"{kind}-rank{rank}.jsonl" if rank else f"{kind}.jsonl"


def open_folder(out, fixed, rank=0):
    """Checks that out holds runs of the same fixed settings, if any, and returns a lock on this rank's file: close it to let go."""
    train.make_folder(out)
    file = open(out / rows_file("runs", rank), "a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another sweep is writing to {out}; wait for it, or use another --out") from None
    if rank:
        return file
    config = out / "config.json"
    if any(path.stat().st_size for path in out.glob("runs*.jsonl")) and config.exists():       # a folder without rows contradicts nothing
        try:
            before = dict(json.loads(config.read_text()))
        except (ValueError, TypeError):
            raise ValueError(f"{config} is damaged; remove it, if the rows beside it are of this sweep, or use another --out") from None
        changed = [name for name in fixed if name in before and before[name] != fixed[name]]
        if changed:
            raise ValueError(f"{out} holds runs with {changed[0]} = {before.get(changed[0])!r}, not {fixed[changed[0]]!r}; "
                             "use another --out")
    else:
        write_json(config, fixed)
    return file


# ------------------------------------------------------------------------------------------------------------------
# From rows to an optimum, a stability edge and their exponents

def cell_of(rows, curve, width, seeds):
    """Results of one curve at one width: lr (K,), losses and accuracies (S, K), chance; LRs lacking a seed are left out."""
    by_lr = {}
    for row in rows:
        if tuple(row[name] for name in CURVE) == curve and row["width"] == width and row["seed"] < seeds and not row["failed"]:
            by_lr.setdefault(row["lr"], {})[row["seed"]] = row
    lrs = sorted(lr for lr, of_seed in by_lr.items() if len(of_seed) == seeds)
    table = [[by_lr[lr][seed] for lr in lrs] for seed in range(seeds)]      # (S, K)
    ok = np.array([[row["diverged_at"] is None for row in line] for line in table], dtype=bool).reshape(seeds, len(lrs))

    def column(name, diverged):
        return np.array([[diverged if row[name] is None else row[name] for row in line] for line in table]).reshape(ok.shape)

    return {"lr": np.array(lrs), "losses": np.where(ok, column("final_train_loss", DIVERGED), DIVERGED),
            "accuracies": column("train_accuracy", 0.0), **{name: column(name, math.nan) for name in train.VALIDATION},
            "chance": table[0][0]["chance_loss"] if lrs else math.nan}


def stability(cell, weights, criterion):
    """Seed-weighted mean losses and whether they count as stable, both (B, K); weights (B, S), rows summing to one."""
    name, x = criterion
    loss, accuracy = weights @ cell["losses"], weights @ cell["accuracies"]
    stable = CRITERIA[name][1](loss, accuracy, loss.min(1, keepdims=True), cell["chance"], x)
    return loss, stable & (loss < DIVERGED / 1e6)


def locate(cell, weights, criterion):
    """Optimum and stability edge of a cell, for B ways of weighting its S seeds.

    Returns arrays (B,): index of the optimum, log optimal LR, log largest stable LR, log smallest unstable LR; nan where
    there is none (nothing stable, or nothing unstable above the optimum).
    """
    loss, stable = stability(cell, weights, criterion)
    log_lr, rows, last = np.log(cell["lr"]), np.arange(len(weights)), len(cell["lr"]) - 1
    best = loss.argmin(1)
    low = loss[rows, best]

    # Vertex of the parabola through the minimum and its neighbours, no further than half-way to either.
    left, right = best.clip(1) - 1, (best + 1).clip(max=last)
    d0, d1 = log_lr[best] - log_lr[left], log_lr[right] - log_lr[best]
    s0, s1 = loss[rows, left] - low, loss[rows, right] - low                # both >= 0
    inside = (best > 0) & (best < last) & (np.maximum(s0, s1) < DIVERGED / 1e6) & (s0 + s1 > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        shift = (d1 ** 2 * s0 - d0 ** 2 * s1) / (2 * (d1 * s0 + d0 * s1))
    log_best = log_lr[best] + np.where(inside, shift.clip(-d0 / 2, d1 / 2), 0.0)

    above = ~stable & (np.arange(last + 1) >= best[:, None])
    first = above.argmax(1)                                                 # first unstable LR from the optimum up
    found = above.any(1) & stable[rows, best]
    log_stable = np.where(found, log_lr[first.clip(1) - 1], np.where(stable[rows, best], log_lr[last], np.nan))
    return best, np.where(low < DIVERGED / 1e6, log_best, np.nan), log_stable, np.where(found, log_lr[first], np.nan)


def fit_slope(widths, log_lrs):
    """Least-squares slope of log LR (W,) or (W, B) against log width, over the widths that have one; nan below two."""
    log_widths = np.log(widths)
    have = np.isfinite(log_lrs)
    if log_lrs.ndim == 2 and (len(widths) < 2 or not have.all()):
        return np.array([fit_slope(widths, column) for column in log_lrs.T])
    if log_lrs.ndim == 1 and have.sum() < 2:
        return math.nan
    keep = have if log_lrs.ndim == 1 else slice(None)
    return np.polyfit(log_widths[keep], log_lrs[keep], 1)[0]


def bootstrap_weights(seeds, resamples, generator):
    """Weights (B, S) of a bootstrap over seeds."""
    return generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples) / seeds


def exponents_of(cells, widths, criterion, resamples=2000):
    """Optimal and max-stable exponents of one curve with 95 % intervals, from its cells, one per width.

    Every resample draws the seeds of each width anew, and within the grid's resolution a point: uniform in log LR within
    half a step to the optimum's neighbours, and within the edge's bracket. With few seeds resampling is too narrow by
    sqrt(S/(S-1)) (the variance of a mean of S is estimated from S - 1), so the seeds' part of each deviation is widened by that.

    Returns {"optimal": (slope, [lo, hi]), "max_stable": (slope, [lo, hi])}, nan where there is none, and the points (W, 4).
    """
    generator = np.random.default_rng(0)
    seeds = len(cells[0]["losses"])
    points, draws = [], {"optimal": [], "max_stable": []}
    for cell in cells:
        point = [value[0] for value in locate(cell, np.full((1, seeds), 1 / seeds), criterion)]
        _, best, stable, unstable = locate(cell, bootstrap_weights(seeds, resamples, generator), criterion)
        if math.isfinite(point[3]):     # the edge of a resample that is stable up to the highest LR is in the next gap, as wide as the last
            unstable = np.where(np.isnan(unstable), stable + np.log(cell["lr"][-1] / cell["lr"][-2]), unstable)
        widen = math.sqrt(seeds / max(1, seeds - 1))
        within = generator.uniform(-0.5, 0.5, (2, resamples))
        middle, edge = (point[2] + point[3]) / 2, (stable + unstable) / 2
        gaps = np.diff(np.log(cell["lr"]))[max(0, point[0] - 1):point[0] + 1]       # to the optimum's neighbours
        draws["optimal"].append(point[1] + widen * (best - point[1]) + within[0] * gaps.max(initial=0.0))
        draws["max_stable"].append(middle + widen * (edge - middle) + within[1] * (unstable - stable))
        points.append(point)
    points = np.array(points)
    slopes = {"optimal": fit_slope(widths, points[:, 1]), "max_stable": fit_slope(widths, points[:, 2:].mean(1))}
    result = {}
    for name, slope in slopes.items():
        sampled = fit_slope(widths, np.array(draws[name]))
        result[name] = slope, np.nanquantile(sampled, [0.025, 0.975]) if np.isfinite(sampled).any() else np.full(2, math.nan)
    return result, points


def number(value):
    """A JSON number, or None for nan and infinity."""
    return float(value) if math.isfinite(value) else None


def depth(config):
    """Hidden activations as param.predict counts them: a GPT's embedding, one per decoder layer, and what the readout sees."""
    return config["layers"] + 2 if config["model"] == "gpt" else config["hidden_layers"]


def summarize(rows, curves, widths, seeds, criterion, shared):
    """The rows of summary.json, from result rows alone; shared holds the fixed settings."""
    summary = []
    for curve in curves:
        told = dict(zip(CURVE, curve))
        found = [(cell, width) for width in widths if len((cell := cell_of(rows, curve, width, seeds))["lr"])]
        if not found:
            continue
        cells, present = zip(*found)
        fits, points = exponents_of(cells, present, criterion)
        predicted = told["alpha"] - param.max_stable_alpha(told["param"], told["optimizer"], told["loss"], depth(shared), shared["trainable"])
        if shared["model"] == "linear_net" and shared["label_noise"]:       # then the LR's growth per step is what counts
            predicted = min(0.0, predicted + told["warmup_exponent"])
        flags = ["one width: no exponent"] if len(present) == 1 else []
        flags += ["one seed: the interval is the grid's resolution"] if seeds == 1 else []
        failed = sorted({row["width"] for row in rows if row["failed"] and tuple(row[name] for name in CURVE) == curve})
        flags += [f"width {width}: out of memory" for width in failed]
        for (best, optimal, stable, unstable), cell, width in zip(points, cells, present):
            if math.isnan(optimal):
                flags.append(f"width {width}: every run diverged")
            else:
                flags += [f"width {width}: optimum at the grid's edge"] * (best in (0, len(cell["lr"]) - 1))
                flags += [f"width {width}: no stable LR"] * math.isnan(stable)
            if not math.isnan(stable) and math.isnan(unstable):
                flags.append(f"width {width}: nothing unstable up to LR {cell['lr'][-1]:.3g}")
        if shared["model"] == "linear_net":     # a range of LRs fits the one sample: no optimum
            flags = [flag for flag in flags if "optimum" not in flag]
            points[:, 1], fits["optimal"] = math.nan, (math.nan, [math.nan] * 2)
        lrs = np.exp(points[:, 1:])
        at_optimum = {name: [train.finite(cell[name][:, int(best)].tolist()) for (best, *_), cell in zip(points, cells)]
                      for name in train.VALIDATION}                                             # [W][S]
        best = [np.nan_to_num(cell["val_accuracy"]).mean(0).argmax() for cell in cells]
        summary.append({
            **{key: shared[key] for key in ("model", "data", "base_width", "hidden_layers", "steps")},
            **dict(zip(CURVE, curve)), "widths": list(present),
            "optimal_lr": [number(v) for v in lrs[:, 0]], "max_stable_lr": [number(v) for v in lrs[:, 1]],
            "min_unstable_lr": [number(v) for v in lrs[:, 2]],
            "optimal_exponent": number(fits["optimal"][0]), "optimal_interval": [number(v) for v in fits["optimal"][1]],
            "max_stable_exponent": number(fits["max_stable"][0]), "max_stable_interval": [number(v) for v in fits["max_stable"][1]],
            "predicted_max_stable_exponent": number(predicted),
            "best_train_accuracy": [number(cell["accuracies"].mean(0).max()) for cell in cells],
            "best_train_loss": [number(cell["losses"].mean(0).min()) for cell in cells],
            "best_val_accuracy": [train.finite(cell["val_accuracy"][:, k].tolist()) for cell, k in zip(cells, best)],     # [W][S]
            "at_optimum": at_optimum, "chance_loss": cells[0]["chance"], "flags": flags,
            "curves": [{"lr": cell["lr"].tolist(),
                        "train_loss": [[number(v) if v < DIVERGED else None for v in line] for line in cell["losses"]]} for cell in cells],
        })
    return summary


def table(summary):
    """Predicted beside measured exponents, then the LRs behind them."""
    def measured(row, name):
        slope, (low, high) = row[f"{name}_exponent"], row[f"{name}_interval"]
        return "-" if slope is None else f"{slope:+.2f} [{low:+.2f}, {high:+.2f}]" if low is not None else f"{slope:+.2f}"

    def lr(value):
        return "-" if value is None else f"{value:.3g}"

    named = [name for name in CURVE if name in CURVE[:3] or len({row[name] for row in summary}) > 1]
    sizes = {name: max(len(name), *(len(str(row[name])) for row in summary)) for name in named}

    def name_of(row):
        return "".join(f"{row[name]!s:{size + 2}}" for name, size in sizes.items())

    head = name_of({name: name for name in named})
    lines = ["Exponents of LR against width, with 95 % intervals", "",
             f"{head}{'predicted':>10}   {'max-stable':22}optimal"]
    for row in summary:
        predicted = row["predicted_max_stable_exponent"]
        lines.append(f"{name_of(row)}{'no bound' if predicted is None else f'{predicted:+.2f}':>10}   "
                     f"{measured(row, 'max_stable'):22}{measured(row, 'optimal')}")
    lines += ["", f"{head}{'width':>6}  {'optimal LR':>10}  {'loss there':>10}  stable up to  unstable from"]
    for row in summary:
        for i, width in enumerate(row["widths"]):
            lines.append(f"{name_of(row)}{width:6}  {lr(row['optimal_lr'][i]):>10}  {lr(row['best_train_loss'][i]):>10}  "
                         f"{lr(row['max_stable_lr'][i]):>12}  {lr(row['min_unstable_lr'][i]):>13}")
    chances = {row["loss"]: row["chance_loss"] for row in summary}
    lines += ["", "A constant predictor's loss: " + ", ".join(f"{loss} {value:.3g}" for loss, value in chances.items())
              + (" (the tokens' unigram entropy)" if "ce" in chances and summary[0]["model"] == "gpt" else "")]
    lines += [f"! {name_of(row).strip()}: {flag}" for row in summary for flag in row["flags"]]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------------
# From tracked runs to the exponents of updates, alignment and the distance to the widest network

def summarize_tracks(rows, tracks, curves, widths, seeds, shared):
    """{"updates": exponents of every update at the first and the last step, "alignment": its course over the steps,
    "limit": distances to the widest network}, each a list with one entry or more per curve and LR."""
    summary = {"updates": [], "alignment": [], "limit": []}
    names = {row["layer"]: row["module"] for row in sorted(tracks.values(), key=lambda row: row["layer"])}    # logits last
    steps, logits = sorted({step for _, step, _ in tracks}), max(names, default=0)
    for curve, lr in itertools.product(curves, sorted({row["lr"] for row in rows})):
        ids = {(row["seed"], row["width"]): row["id"] for row in rows
               if tuple(row[name] for name in CURVE) == curve and row["lr"] == lr}

        def values(step, layer, quantity, missing=None):
            """[S][W] of one tracked quantity."""
            return [[tracks.get((ids.get((seed, width)), step, layer), {}).get(quantity, missing) for width in widths]
                    for seed in range(seeds)]

        key = {**dict(zip(CURVE, curve)), "lr": lr, "widths": list(widths)}
        for entry in update_exponents(values, dict(zip(CURVE, curve)), widths, shared, names):
            summary["updates"].append({**key, "module": names[entry["layer"]], **entry})
        for layer, kind in itertools.product(range(logits), ("operator_update", "operator_propagating")):
            course = [np.array(values(step, layer, kind), dtype=float).mean(0) for step in steps]               # [T] (W,)
            summary["alignment"].append({**key, "layer": layer, "module": names[layer], "kind": kind, "steps": steps,
                                         "values": [train.finite(line) for line in np.transpose(course).tolist()]})
        softmax = values(shared["steps"], logits, "softmax", [[math.nan]])
        distance = [train.finite([rms_distance(output, of_seed[-1]) for output in of_seed]) for of_seed in softmax]
        summary["limit"].append({**key, "steps": shared["steps"], "values": distance})
    return summary


def rms_distance(outputs, others):
    return float(np.sqrt(np.mean((np.array(outputs, dtype=float) - np.array(others, dtype=float)) ** 2)))


def predicted_updates(curve, shared, step, names):
    """[(kind, layer, tracked module, tracked quantity, predicted exponent)] of every module, from param.predict.

    Of a GPT by role: the residual stream carries every layer's change, but only the embedding's into the first block; a
    gain multiplies coordinates, as an input weight does.
    """
    told = {name: curve[name] for name in ("optimizer", "loss", "alpha")}
    predicted = param.predict(curve["param"], **told, hidden_layers=depth(shared), trainable=shared["trainable"], step=step)
    change = max(predicted.effective[-1], predicted.propagating[-1])            # of the logits, without their initial value
    logits = ("logits", max(names), max(names), "change", change)
    if shared["model"] == "mlp":
        hidden = shared["hidden_layers"]
        return ([("effective", layer, layer, "effective", predicted.effective[layer]) for layer in range(hidden + 1)]
                + [("propagating", layer, layer, "propagating", predicted.propagating[layer - 1]) for layer in range(1, hidden + 1)]
                + [("features", layer, layer + 1, "input_change", predicted.features[layer]) for layer in range(hidden)]
                + [logits]), predicted.regime
    c = {role: pair[1] for role, pair in param.exponents(curve["param"], curve["optimizer"]).items()}
    effective = {"input": predicted.effective[0], "hidden": predicted.effective[1], "output": predicted.effective[-1],
                 "vector": predicted.effective[0] + c["input"] - c["vector"]}
    propagating = {"hidden": predicted.propagating[-2], "output": predicted.propagating[-1], "vector": predicted.features[-1]}
    _, _, role_of = train.build(train.configure({**{name: shared[name] for name in shared if name in train.SETTINGS}, **curve}))
    entries = []
    for layer, name in names.items():
        role = role_of.get(f"{name}.weight")
        if role:
            entries.append(("effective", layer, layer, "effective", effective[role]))
        if role in propagating:
            first = re.fullmatch(r"blocks\.0\.(norm_attention|attention\.qkv|norm_mlp|up)", name)
            entries.append(("propagating", layer, layer, "propagating", predicted.features[0] if first else propagating[role]))
    return [*entries, logits], predicted.regime


def update_exponents(values, curve, widths, shared, names):
    """Measured exponents, with intervals, beside those of param.predict: effective and propagating updates of every module,
    the change of every feature (an MLP module's input) and of the logits, at the first and the last step."""
    entries = []
    for step in sorted({1, shared["steps"]}):
        tracked, regime = predicted_updates(curve, shared, step, names)
        for kind, layer, module, quantity, exponent in tracked:
            norms = np.array(values(step, module, quantity), dtype=float)       # (S, W), null becomes nan
            entry = {"step": step, "kind": kind, "layer": layer, "values": [train.finite(line) for line in norms.tolist()],
                     "exponent": None, "interval": [None, None], "predicted": number(exponent), "regime": regime}
            usable = (np.isfinite(norms) & (norms > 0)).all(0)
            if usable.sum() > 1:
                measured = np.array(widths)[usable], norms[:, usable]
                entry["exponent"] = metrics.fit_exponent(*measured)[0]
                entry["interval"] = train.finite(list(metrics.exponent_interval(*measured)))
            entries.append(entry)
    return entries


def linear_net_measurements(widths, seeds=32, times=(1, 4, 16), one_step_lr=0.5):
    """{"distance": [..], "one_step": [..]}: of the closed-form linear net at base width 1, with exponents and intervals.

    distance: |f - its infinite-width limit from the same initial f| after some steps at LR 0.1 (mup's initial f is 0 in the
    limit). one_step: |loss decrease| after one step; where f diverges with width, the squared loss changes twice as fast.
    """
    result, every = {"distance": [], "one_step": []}, torch.arange(seeds)

    def entry(values, predicted):
        return {"widths": list(widths), "values": values, "exponent": metrics.fit_exponent(widths, values)[0],
                "interval": list(metrics.exponent_interval(widths, values)), "predicted": predicted}

    for parameterization in ("mup", "ntp"):
        distances = []
        for width in widths:
            path = models.linear_net(width, 0.1, max(times), parameterization, every)
            limit = models.linear_net(math.inf, 0.1, max(times), parameterization, every,
                                      f0=0.0 if parameterization == "mup" else path.f[0])
            distances.append((path.f - limit.f).abs()[list(times)])
        for step, values in zip(times, torch.stack(distances, -1).tolist()):                # [seed][width]
            result["distance"].append({"param": parameterization, "step": step, **entry(values, -0.5)})
    for parameterization, alpha in (("sp", 0.5), ("sp", 1.0), ("sp", 1.5), ("ntp", 0.0)):
        losses = [models.linear_net(width, one_step_lr, 1, parameterization, every, alpha).loss for width in widths]
        logits = param.predict(parameterization, "sgd", "mse", alpha, hidden_layers=1).effective[-1]
        values = torch.stack([(loss[1] - loss[0]).abs() for loss in losses], -1).tolist()
        result["one_step"].append({"param": parameterization, "alpha": alpha, **entry(values, max(logits, 2 * logits))})
    return result


def update_table(updates):
    """Predicted beside measured exponents of the effective updates, from input to readout, and of the logits' change."""
    def words(values):
        values = [value for value in values if value is not None]
        return f"{sum(values) / len(values):+.2f}" if values else "-"

    lines, groups, kinds = [], {}, {}
    for entry in updates:
        if entry["kind"] in ("effective", "logits"):
            kind = "logits" if entry["kind"] == "logits" else entry["module"].removeprefix("layers.").rpartition(".")[2]
            kinds[kind] = max(len(kind), 13)
            curve = " ".join(str(entry[name]) for name in ("loss", "param", "optimizer"))
            group = groups.setdefault(f"{curve} α={entry['alpha']:<5g} step {entry['step']:<4}", {})
            group.setdefault(kind, []).append(entry)
    for name, of_kind in groups.items():
        cells = [f"{words(e['exponent'] for e in entries)} ({words(e['predicted'] for e in entries)})".rjust(kinds[kind])
                 for kind, entries in of_kind.items()]
        lines.append(f"{name} {'  '.join(cells)}")
    head = "  ".join(kind.rjust(size) for kind, size in kinds.items())
    return "\n".join(["Exponents of effective updates ΔW x and of the logits' change against width: measured (predicted), means over "
                      "tensors of a kind", "", " " * max(map(len, groups)) + " " + head, *lines])


# ------------------------------------------------------------------------------------------------------------------
# Search: which LRs a cell still needs

def lattice(args, optimizer):
    """(LR of a lattice point k, lowest k, highest k, coarse steps by which the grid may grow)."""
    if args["lrs"]:
        lrs = sorted(set(args["lrs"]))
        return lrs.__getitem__, 0, len(lrs) - 1, 0
    octaves = round(math.log2(args["lr_step"]), 12)         # sqrt(2) is half an octave, not 0.5000000000000001
    low, high = (round(math.log2(lr) / octaves) for lr in args["lr_range"] or LR_RANGE[optimizer])
    return lambda k: 2.0 ** (k * octaves), low, high, EXTENSIONS


def wanted(known, low, high, search, extensions, hint=None, chance=math.inf):
    """Lattice points to run next, a set; empty when the cell is done. A pure function of what is known.

    known: {k: (mean loss, stable)}. grid: all of low..high. coarse-to-fine: every COARSE-th point, or a few around
    hint = (optimum, edge) of a narrower width; then halves of the gaps beside the optimum, and of the edge's bracket, down
    to one step. Where the optimum lies at an end, or nothing above it is unstable, the grid grows; downwards also where all
    runs diverged, or where those at a hint learned nothing: none is stable and below chance, a constant predictor's loss.
    """
    grid, reach = search == "grid", set(range(low - extensions * COARSE, high + extensions * COARSE + 1))
    start, grown = set(range(low, high + 1, 1 if grid else COARSE)), range(1, COARSE + 1) if grid else (COARSE,)
    hint = None if grid else hint
    if hint:
        optimum, edge = hint
        start, grown = reach & {optimum - 2, optimum - 1, optimum, edge - 1, edge + 1}, (1,)
    if not start <= known.keys():
        return start - known.keys()

    ks, (best, edge, above) = sorted(known), outcome(known)
    diverged = known[best][0] >= DIVERGED / 1e6
    lost = hint and ks[0] > low and not any(stable and loss < chance for loss, stable in known.values())
    want = {ks[0] - i for i in grown} & reach if best == ks[0] or diverged or lost else set()
    if not diverged and (best == ks[-1] or (known[best][1] and above is None)):
        want |= {ks[-1] + i for i in grown} & reach
    if want or grid or diverged:
        return want
    i = ks.index(best)
    want = {(best + k) // 2 for k in ks[max(0, i - 1):i] + ks[i + 1:i + 2]}
    if above is not None:
        want.add((edge + above) // 2)
    return want - known.keys()


def outcome(known):
    """(optimum, last point below the smallest unstable one above it, that one or None) of {k: (mean loss, stable)}."""
    best = min(sorted(known), key=lambda k: known[k][0])
    above = min((k for k in known if k > best and not known[k][1]), default=None)
    return best, max(k for k in known if best <= k and (above is None or k < above)), above


def run_grid(args, given, curves, device, rows, tracks, team, splits=None):
    """Runs what is missing, round by round, and appends each stack's rows to the files and to rows and tracks."""
    report = progress_line(args, given, curves, rows)
    while missing := missing_runs(args, given, curves, rows):
        twins = {}          # of runs that coincide in a round one is trained, unless they are tracked
        for run in missing:
            twins.setdefault(train.run_id(run if args["track"] else coincident(run)), []).append(run)
        firsts = {train.run_id(runs[0]): runs for runs in twins.values()}
        for stack in team.share(train.stacks([runs[0] for runs in twins.values()], device, args["stack"], team.size)):
            if splits is None:
                splits = train.load_splits(stack[0], args["data_dir"], device)
            tracked = []
            done = train_or_halve(stack, splits, device, args["track"], tracked)
            done = [{**row, **run, "id": train.run_id(run)} for row in done for run in firsts[row["id"]]]
            if tracked:         # first, so that a run whose row is there is tracked; a reader takes the newer of two
                train.append_rows(args["out"] / rows_file("track", team.rank), tracked)
            train.append_rows(args["out"] / rows_file("runs", team.rank), done)
            rows.update((key_of(row), row) for row in done)
            tracks.update((key_of(row), row) for row in tracked)
            report(stack[0]["width"])
        team.exchange(args["out"], rows)


def missing_runs(args, given, curves, rows):
    """The runs that come next: of a grid all, of a search those of every curve's narrowest unfinished width; none at the end."""
    missing = []
    for curve in curves:
        lr_of, low, high, extensions = lattice(args, curve[CURVE.index("optimizer")])
        k_of = {lr_of(k): k for k in range(low - extensions * COARSE, high + extensions * COARSE + 1)}
        hint = None
        for width in args["widths"]:
            cell = cell_of(rows.values(), curve, width, args["seeds"])
            done = {k_of[lr]: i for i, lr in enumerate(cell["lr"].tolist()) if lr in k_of}
            known, points = replay(cell, done, args["criterion"], lambda known: wanted(
                known, low, high, args["search"], extensions, hint, cell["chance"]))
            new = [run for k in sorted(points) for run in runs_of(given, curve, width, lr_of(k), args["seeds"])
                   if train.run_id(run) not in rows]
            missing += new
            if args["search"] != "grid" and new:
                break           # wider nets wait for what is found here, which tells where to look
            if not points and any(stable for _, stable in known.values()):     # no hint from a cell with failed runs
                hint = outcome(known)[:2]
    return missing


def coincident(run):
    """The run whose row this one shares to the last bit: at the base width all parameterizations are one."""
    return {**run, "param": "sp", "alpha": 0.0} if run["width"] == run["base_width"] else run


def replay(cell, done, criterion, search):
    """(what the search knows, points it asks for next), the search started anew and shown only what it asked for.

    So it takes the same path whatever else is in the folder, and wherever it was interrupted. done: {k: column of cell}.
    """
    known = {}
    while (points := search(known)) and points <= done.keys():
        known = shown(cell, done, known.keys() | points, criterion)
    return known, points


def shown(cell, done, ks, criterion):
    """{k: (mean loss, stable)} of lattice points ks, as if no others had been run."""
    columns, seeds = [done[k] for k in sorted(ks)], len(cell["losses"])
    seen = {**cell, "losses": cell["losses"][:, columns], "accuracies": cell["accuracies"][:, columns]}
    loss, stable = stability(seen, np.full((1, seeds), 1 / seeds), criterion)
    return dict(zip(sorted(ks), zip(loss[0], stable[0])))


def train_or_halve(stack, splits, device, track, tracked):
    """train.train; a stack that does not fit into memory is halved, a single run that does not becomes a row saying so."""
    try:
        return train.train(stack, splits, device, track=track, tracked=tracked)
    except (RuntimeError, MemoryError) as error:
        if not train.out_of_memory(error):
            raise
    tracked.clear()
    width, half = stack[0]["width"], len(stack) // 2
    if half == 0:
        say_once(f"width {width}: out of memory for a single run; it becomes a row without results")
        return [train.failed_row(stack[0], "out of memory", device)]
    say_once(f"width {width}: out of memory for {len(stack)} runs at once; going on with {half}")
    parts = []
    for part in (stack[:half], stack[half:]):
        own = []
        parts += train_or_halve(part, splits, device, track, own)
        tracked += own
    return parts


@functools.cache
def say_once(text):
    print(f"\n{text}", file=sys.stderr)


class Team:
    """The ranks that torchrun started, which share the stacks of a round out by a counter on its store. One process alone
    is a team of one. Ranks need a common result folder; each writes its own files in it."""

    def __init__(self):
        self.store, self.rank, self.size, self.round, self.meetings = None, 0, 1, 0, 0
        if "TORCHELASTIC_RUN_ID" in os.environ:
            store, self.rank, self.size = next(torch.distributed.rendezvous("env://"))
            # ranks that torchrun started again find the store of those before them, with their counters in it
            self.store = torch.distributed.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            self.store.set_timeout(datetime.timedelta(days=365))        # a rank that dies ends the others through torchrun

    def share(self, stacks):
        """The stacks that fall to this rank, one by one, widest first: whoever is free takes the next."""
        if self.store is None:
            yield from stacks
            return
        stacks, self.round = sorted(stacks, key=lambda stack: -stack[0]["width"]), self.round + 1
        while (i := self.store.add(f"round {self.round}", 1) - 1) < len(stacks):
            yield stacks[i]

    def meet(self):
        """Waits until every rank is here."""
        if self.store is not None:
            self.meetings += 1
            if self.store.add(f"meeting {self.meetings}", 1) == self.size:
                self.store.set(f"met {self.meetings}", "")
            self.store.wait([f"met {self.meetings}"])

    def exchange(self, out, rows):
        """Adds the rows that others wrote; nobody writes meanwhile."""
        if self.store is not None:
            self.meet()
            rows.update(read_rows(out, mend=False))
            self.meet()


def runs_of(given, curve, width, lr, seeds):
    return [train.configure({**given, **dict(zip(CURVE, curve)), "width": width, "lr": lr, "seed": seed}) for seed in range(seeds)]


def progress_line(args, given, curves, rows):
    """report(width) -> a line on standard error: rewritten in place on a terminal, else one a minute.

    The time left goes by what runs of each width took so far; a width without any is taken to cost as its parameters do.
    """
    size, planned = {}, {}
    for i, width in enumerate(args["widths"]):
        size[width] = train.replica_size(runs_of(given, curves[0], width, 1.0, 1)[0])[0]
        planned[width] = sum(args["seeds"] * expected_lrs(args, curve, i) for curve in curves)
    start, shown = time.monotonic(), [0.0]

    def tally():
        """{width: seconds of each of its runs}, how many runs, how many seconds."""
        ran = {width: [row["seconds"] for row in rows.values() if row["width"] == width] for width in size}
        return ran, sum(map(len, ran.values())), sum(map(sum, ran.values()))

    _, done_before, spent_before = tally()

    def report(width):
        elapsed = time.monotonic() - start
        if not sys.stderr.isatty() and elapsed - shown[0] < 60:
            return
        (ran, done, spent), left = tally(), 0.0
        for w in planned:
            like = min((v for v in ran if ran[v]), key=lambda v: abs(math.log(v / w)))
            left += max(0, planned[w] - len(ran[w])) * np.mean(ran[like]) * size[w] / size[like]
        left *= elapsed / (spent - spent_before) if spent > spent_before else 1.0
        total, pace = sum(max(planned[w], len(ran[w])) for w in planned), (done - done_before) / elapsed
        line = f"{done}/{total} runs, width {width}, {pace:.1f} runs/s, {left // 60:.0f}:{left % 60:02.0f} left"
        if sys.stderr.isatty():
            print(f"\r{line:70}", end="", file=sys.stderr, flush=True)
        else:
            shown[0] = elapsed
            print(line, file=sys.stderr, flush=True)

    return report


def expected_lrs(args, curve, i):
    """LRs of the i-th width, about: of a coarse-to-fine search half the grid at the narrowest, a quarter at the others."""
    _, low, high, _ = lattice(args, curve[CURVE.index("optimizer")])
    count = high - low + 1
    return count if args["search"] == "grid" else (count + 1) // 2 if i == 0 else (count + 3) // 4


# ------------------------------------------------------------------------------------------------------------------
# Command line

def criterion(text):
    name, _, x = text.partition("=")
    if name not in CRITERIA:
        raise ValueError(f"stable-if is {text!r}; choose from {', '.join(CRITERIA)}, with =X for another threshold")
    try:
        threshold = float(x) if x else CRITERIA[name][0]
    except ValueError:
        threshold = math.nan
    if not math.isfinite(threshold):
        raise ValueError(f"stable-if is {text!r}; the part behind = must be a number")
    return name, threshold


def parse(argv=None):
    """(args, settings given for every run, curves); a preset replaces defaults, flags on the command line replace both."""
    parser = train.Parser(description=__doc__.splitlines()[0])
    group = parser.add_argument_group("sweep")
    group.add_argument("--preset", metavar="NAME", help=f"one of {', '.join(PRESETS)} (default {', '.join(DEFAULT_PRESET.values())}, by --model)")
    group.add_argument("--scale", default="cpu", choices=("cpu", "paper"), help="cpu: two cores; paper: the paper's sizes (default cpu)")
    group.add_argument("--widths", type=int, nargs="+", metavar="N", help="widths")
    group.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 to N-1 (default 3)")
    group.add_argument("--lrs", type=float, nargs="+", metavar="X", help="exactly these LRs, instead of a range")
    group.add_argument("--lr-range", type=float, nargs=2, metavar=("LO", "HI"),
                       help="range of LRs; grows where the optimum or the edge lies outside (default 2^-8 2^3, Adam 2^-9 2^-1)")
    group.add_argument("--lr-step", type=float, default=math.sqrt(2), metavar="F", help="ratio of neighbouring LRs (default sqrt 2)")
    group.add_argument("--search", default="coarse-to-fine", choices=("coarse-to-fine", "grid"),
                       help="LRs to run (default coarse-to-fine)")
    group.add_argument("--stable-if", default="chance", metavar="NAME[=X]",
                       help="; ".join(f"{name} (X = {x:g}): {words}" for name, (x, _, words) in CRITERIA.items()) + " (default chance)")
    group.add_argument("--out", metavar="DIR", help="result folder (default out/PRESET)")
    group.add_argument("--no-plots", action="store_true", help="no figures")
    group.add_argument("--dry-run", action="store_true", help="say what would be run, and run nothing")
    group.add_argument("--stack", default="auto", metavar="N", help="most replicas trained at once (default auto)")
    train.add_flags(parser, several=CURVE, without=("width", "lr", "seed"))

    chosen, _ = parser.parse_known_args(argv)
    name = chosen.preset or DEFAULT_PRESET.get(chosen.model, "headline")
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; choose from {', '.join(PRESETS)}")
    preset = {"preset": name, "curves": [{}], **PRESETS[name][chosen.scale]}
    if chosen.lr_range:
        preset.pop("lrs", None)         # a range on the command line replaces a preset's list
    parser.set_defaults(**preset)
    args = vars(parser.parse_args(argv))
    args["out"] = Path(args["out"] or f"out/{args['preset']}")
    args["criterion"] = criterion(args["stable_if"])
    args["widths"] = sorted(set(args["widths"]))
    if args["seeds"] < 1:
        raise ValueError(f"seeds is {args['seeds']}; it must be at least 1")
    if args["track"] < 0:
        raise ValueError(f"track is {args['track']}; it must be at least 0")
    if not 1.01 <= args["lr_step"] <= 1000:
        raise ValueError(f"lr-step is {args['lr_step']}; it must be a number from 1.01 to 1000")
    if chosen.lrs and chosen.lr_range:
        raise ValueError(f"lrs is {chosen.lrs} and lr-range is {chosen.lr_range}; give one of them")
    if args["lr_range"] and not 1e-30 < args["lr_range"][0] < args["lr_range"][1] < 1e30:
        raise ValueError(f"lr-range is {args['lr_range']}; it must be two positive numbers, the lower one first, within 1e-30 and 1e30")
    if args["stack"] != "auto" and not (args["stack"].isdecimal() and int(args["stack"])):
        raise ValueError(f"stack is {args['stack']!r}; it must be auto or a whole number, at least 1")
    args["stack"] = args["stack"] if args["stack"] == "auto" else int(args["stack"])
    args["search"] = "grid" if args["lrs"] else args["search"]
    given = {name: args[name] for name in train.SETTINGS if name not in GRID and args[name] is not None}
    given["width"] = args["widths"][0]      # the default may be no multiple of --head-dim
    curves = curves_of(args, given)
    for curve, width, lr in itertools.product(curves, args["widths"], args["lrs"] or [1.0]):
        runs_of(given, curve, width, lr, 1)
    for width in args["widths"]:
        train.build(*runs_of(given, curves[0], width, 1.0, 1))
    return args, given, curves


def curves_of(args, given):
    """Values of CURVE, one tuple per curve: those of the preset, crossed with the lists given, loss in the innermost loop."""
    lists = {name: args[name] if isinstance(args[name], list) else [args[name]] for name in CURVE[::-1] if args[name] is not None}
    found = []
    for preset, values in itertools.product(args["curves"], itertools.product(*lists.values())):
        config = train.configure({**given, **preset, **dict(zip(lists, values))})
        found.append(tuple(config[name] for name in CURVE))
    return list(dict.fromkeys(found))


def shared_settings(given, curves):
    """The settings on which all runs agree."""
    first, *others = [train.configure({**given, **dict(zip(CURVE, curve))}) for curve in curves]
    return {name: value for name, value in first.items() if name not in GRID and all(other[name] == value for other in others)}


def dry_run(args, given, curves, device):
    """Prints what the sweep would cost; times nothing but a second of matrix products."""
    n = 1024
    a = torch.randn(n, n, device=device)
    start, products = time.perf_counter(), 0
    while time.perf_counter() - start < 1 or not products:
        products += 1
        (a @ a).sum().item()
    rate, total = products * 2 * n ** 3 / (time.perf_counter() - start), 0
    print(f"{len(curves)} curves, {args['seeds']} seeds, LRs {args['search']}")
    print(f"{'width':>6} {'runs':>6} {'parameters':>11} {'stack':>6} {'stack memory':>13} {'operations':>11}")
    for i, width in enumerate(args["widths"]):
        runs = [run for curve in curves for run in runs_of(given, curve, width, 1.0, args["seeds"]) * expected_lrs(args, curve, i)]
        parameters, memory = train.replica_size(runs[0])
        stack = max(len(part) for part in train.stacks(runs, device, args["stack"]))
        operations = 6.0 * parameters * len(runs) * runs[0]["steps"] * train.samples_of(runs[0])
        total += operations
        print(f"{width:6} {len(runs):6} {parameters:11,} {stack:6} {stack * memory / 2 ** 20:10.0f} MiB {operations:11.2e}")
    print(f"{total:.2e} operations, {total / rate / 60:.1f} minutes at this machine's {rate / 1e9:.0f} GFLOP/s "
          "(diverging runs stop early, small matrices are slower, and a search may need more or fewer runs)")


def main():
    args, given, curves = parse()
    device, splits = train.choose_device(args["device"]), None
    if given.get("model") == "gpt":         # the data tell the vocabulary, which is part of a run's identity
        splits = train.load_splits(*runs_of(given, curves[0], given["width"], 1.0, 1), args["data_dir"], device)
        given["vocab_size"] = splits.classes
    if args["dry_run"]:
        return dry_run(args, given, curves, device)
    team, shared = Team(), shared_settings(given, curves)
    with open_folder(args["out"], {**shared, "track": args["track"]}, team.rank):
        found = read_rows(args["out"]) if team.rank == 0 else {}
        rows = {key: row for key, row in found.items() if all(row.get(name) == shared[name] for name in shared)}
        tracks = read_rows(args["out"], "track*.jsonl") if args["track"] and team.rank == 0 else {}
        if rows:
            print(f"{args['out']}: {len(rows)} runs found, going on", file=sys.stderr)
        team.exchange(args["out"], rows)
        try:
            run_grid(args, given, curves, device, rows, tracks, team, splits)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"interrupted: {len(rows)} finished runs are kept in {args['out']}; the same command goes on") from None
        print(file=sys.stderr)
        if team.rank != 0:
            return
        if team.size > 1 and args["track"]:
            tracks = read_rows(args["out"], "track*.jsonl")
        write_summary(args, curves, rows, tracks, shared)
    if not args["no_plots"]:
        import plots        # matplotlib takes a second to load
        for path in plots.draw(args["out"]):
            print(path)


def write_summary(args, curves, rows, tracks, shared):
    """Prints predicted beside measured exponents and writes summary.json."""
    found = list(rows.values())
    summary = {"command": " ".join(["python"] + sys.argv), "stable_if": args["stable_if"], "runs": len(rows),
               "seconds": round(sum(row["seconds"] for row in found), 1),
               **{name: shared[name] for name in ("model", "data", "hidden_layers", "layers", "steps", "base_width")}, "rows": []}
    if len(args["lrs"] or "") != 1:         # one LR alone has no optimum and no edge
        summary["rows"] = summarize(found, curves, args["widths"], args["seeds"], args["criterion"], shared)
        print(table(summary["rows"]) if summary["rows"] else "No results.")
        for curve in curves:
            if not any(tuple(row[name] for name in CURVE) == curve for row in summary["rows"]):
                print(f"! {' '.join(map(str, curve[:3]))}: every run was out of memory; use smaller widths or batches")
    if args["track"]:
        summary.update(summarize_tracks(found, tracks, curves, args["widths"], args["seeds"], shared))
        print(update_table(summary["updates"]))
    if shared["model"] == "linear_net" and len(args["widths"]) > 1:
        summary["linear_net"] = linear_net_measurements(args["widths"])
    write_json(args["out"] / "summary.json", summary)


if __name__ == "__main__":
    train.command_line(main)
