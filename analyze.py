"""From result rows to optimum, stability edge, exponents with intervals, tables and summary.json; nothing
is trained.

    python analyze.py out/headline                          # the table of a sweep again, and its summary.json
    python analyze.py out/headline --stable-if accuracy=0.8     # under another criterion of stability

    curve            one value of each setting in CURVE; its exponent is of LR against width: -0.5 means n^-1/2
    cell             one curve at one width: losses (S, K) of S seeds at K learning rates
    optimal LR       argmin of the seed-mean final train loss, refined by a parabola in log LR
    max-stable LR    end of the contiguous stable range above the optimum: a bracket, and its geometric mean

Predictions come from `param.predict`, measured exponents of updates from `metrics.fit_exponent`.
"""
import train        # before numpy and torch: it asks for reproducible products

import itertools
import json
import math
import os
import re
import sys
from pathlib import Path

import numpy as np

import data
import metrics
import param
from train import InputError, finite

# Settings that tell one curve from another, and those that vary within a sweep.
CURVE = ("loss", "param", "optimizer", "alpha", "norm_affine", "warmup")
GRID = ("width", "lr", "seed") + CURVE
CRITERIA = {    # name: (default X, stable(mean final train loss, mean accuracy, lowest mean loss, chance, X), words)
    "chance":   (1.0, lambda loss, accuracy, best, chance, x: loss < x * chance,
                 "loss below X times a constant predictor's"),
    "accuracy": (0.3, lambda loss, accuracy, best, chance, x: accuracy > x, "train accuracy above X"),
    "best+1":   (1.0, lambda loss, accuracy, best, chance, x: loss < best + x, "loss within X of the width's lowest"),
    "1.2x":     (1.2, lambda loss, accuracy, best, chance, x: loss < x * best, "loss within X times the lowest"),
}
DIVERGED = 1e30         # stands for the infinite loss of a diverged run, so that weighted means stay numbers


# ---- result files ----

def key_of(row):
    """What identifies a row: a run's id, or (id, step, module) of a tracked module."""
    return (row["id"], row["step"], row["module"]) if "step" in row else row["id"]


def read_rows(out, files="runs*.jsonl", mend=True):
    """{key: row} of every runs*.jsonl in a folder, or of its track*.jsonl.

    A last line without its end was cut by a kill: dropped, with a word, where nobody else may be writing
    (mend). InputError names any other line that is no row.
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
                raise InputError(f"{path}:{number} is not a result row; remove that line, "
                                 "or use another --out") from None
    return rows


def write_json(path, value):
    """Writes whole or not at all."""
    with data.whole_file(path) as file:
        file.write((json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


# ---- from rows to an optimum and a stability edge ----

def curve_of(row):
    return tuple(row[name] for name in CURVE)


def criterion_of(text):
    """(name, X) of "name" or "name=X". InputError."""
    name, _, x = text.partition("=")
    if name not in CRITERIA:
        raise InputError(f"stable-if is {text!r}; choose from {', '.join(CRITERIA)}, with =X for another threshold")
    try:
        threshold = float(x) if x else CRITERIA[name][0]
    except ValueError:
        threshold = math.nan
    if not math.isfinite(threshold):
        raise InputError(f"stable-if is {text!r}; the part behind = must be a number")
    return name, threshold


def cell_of(rows, curve, width, seeds):
    """Results of one curve at one width: lr (K,), losses, accuracies and validation (S, K), chance; LRs
    lacking a seed are left out."""
    by_lr = {}
    for row in rows:
        if curve_of(row) == curve and row["width"] == width and row["seed"] < seeds and not row["failed"]:
            by_lr.setdefault(row["lr"], {})[row["seed"]] = row
    lrs = sorted(lr for lr, of_seed in by_lr.items() if len(of_seed) == seeds)
    table = [[by_lr[lr][seed] for lr in lrs] for seed in range(seeds)]      # (S, K)
    ok = np.array([[row["diverged_at"] is None for row in line] for line in table], dtype=bool).reshape(seeds, len(lrs))

    def column(name, diverged):
        values = [[diverged if row[name] is None else row[name] for row in line] for line in table]
        return np.array(values).reshape(ok.shape)

    return {"lr": np.array(lrs), "losses": np.where(ok, column("final_train_loss", DIVERGED), DIVERGED),
            "accuracies": column("train_accuracy", 0.0), "chance": table[0][0]["chance_loss"] if lrs else math.nan,
            **{name: column(name, math.nan) for name in train.VALIDATION}}


def stability(cell, weights, criterion):
    """Seed-weighted mean losses and whether they count as stable, both (B, K); weights (B, S), rows summing
    to one."""
    name, x = criterion
    loss, accuracy = weights @ cell["losses"], weights @ cell["accuracies"]
    stable = CRITERIA[name][1](loss, accuracy, loss.min(1, keepdims=True), cell["chance"], x)
    return loss, stable & (loss < DIVERGED / 1e6)


def locate(cell, weights, criterion):
    """Optimum and stability edge of a cell, for B ways of weighting its S seeds.

    Returns arrays (B,): index of the optimum, log optimal LR, log largest stable LR, log smallest unstable
    LR; nan where there is none (nothing stable, or nothing unstable above the optimum).
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
    return (best, np.where(low < DIVERGED / 1e6, log_best, np.nan), log_stable,
            np.where(found, log_lr[first], np.nan))


def fit_slope(widths, log_lrs):
    """Least-squares slope of log LR (W,) or (W, B) against log width, over the widths that have one; nan
    below two."""
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

    Every resample draws the seeds of each width anew, and within the grid's resolution a point: uniform in
    log LR within half a step to the optimum's neighbours, and within the edge's bracket. With few seeds
    resampling is too narrow by sqrt(S/(S-1)) (the variance of a mean of S is estimated from S - 1), so the
    seeds' part of each deviation is widened by that.

    Returns {"optimal": (slope, [lo, hi]), "max_stable": (slope, [lo, hi])}, nan where there is none, and
    points (W, 4).
    """
    generator = np.random.default_rng(0)
    seeds = len(cells[0]["losses"])
    points, draws = [], {"optimal": [], "max_stable": []}
    for cell in cells:
        point = [value[0] for value in locate(cell, np.full((1, seeds), 1 / seeds), criterion)]
        _, best, stable, unstable = locate(cell, bootstrap_weights(seeds, resamples, generator), criterion)
        if math.isfinite(point[3]):     # the edge of a resample stable up to the highest LR is in the next gap
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
        have = np.isfinite(sampled).any()
        result[name] = slope, np.nanquantile(sampled, [0.025, 0.975]) if have else np.full(2, math.nan)
    return result, points


# ---- the rows of summary.json ----

def depth(config):
    """Hidden activations as param.predict counts them: a GPT's embedding, its decoder layers, what the
    readout sees."""
    return config["layers"] + 2 if config["model"] == "gpt" else config["hidden_layers"]


def shared_settings(rows):
    """The settings on which all rows agree, but for those that a sweep varies."""
    first, *others = rows
    return {name: first[name] for name in train.SETTINGS
            if name not in GRID and all(other[name] == first[name] for other in others)}


def summarize(rows, criterion="chance", curves=None, widths=None, seeds=None):
    """The rows of summary.json, one per curve, from result rows alone.

    curves (tuples of CURVE), widths and seeds (how many): those to report, else all that the rows have.
    """
    curves = list(dict.fromkeys(map(curve_of, rows))) if curves is None else curves
    widths = sorted({row["width"] for row in rows}) if widths is None else widths
    seeds = 1 + max(row["seed"] for row in rows) if seeds is None else seeds
    summary = []
    for curve in curves:
        found = [(cell, width) for width in widths if len((cell := cell_of(rows, curve, width, seeds))["lr"])]
        if found:
            failed = {row["width"] for row in rows if row["failed"] and curve_of(row) == curve}
            summary.append(summarize_curve(curve, *zip(*found), sorted(failed), criterion_of(criterion),
                                           shared_settings(rows)))
    return summary


def summarize_curve(curve, cells, widths, failed, criterion, shared):
    """The summary of one curve from its cells, one per width; failed: widths at which a run did not fit
    into memory."""
    told, seeds = dict(zip(CURVE, curve)), len(cells[0]["losses"])
    fits, points = exponents_of(cells, widths, criterion)
    bound = param.max_stable_alpha(told["param"], told["optimizer"], told["loss"], depth(shared), shared["trainable"])
    lrs = np.exp(points[:, 1:])
    at_optimum = {name: [cell[name][:, int(best)].tolist() for (best, *_), cell in zip(points, cells)]
                  for name in train.VALIDATION}                                             # [W][S]
    most_accurate = [np.nan_to_num(cell["val_accuracy"]).mean(0).argmax() for cell in cells]
    return finite({
        **{key: shared[key] for key in ("model", "data", "base_width", "hidden_layers", "steps")},
        **told, "widths": list(widths),
        **dict(zip(("optimal_lr", "max_stable_lr", "min_unstable_lr"), lrs.T.tolist())),
        "optimal_exponent": float(fits["optimal"][0]), "optimal_interval": fits["optimal"][1].tolist(),
        "max_stable_exponent": float(fits["max_stable"][0]), "max_stable_interval": fits["max_stable"][1].tolist(),
        "predicted_max_stable_exponent": told["alpha"] - bound,
        "best_train_accuracy": [float(cell["accuracies"].mean(0).max()) for cell in cells],
        "best_train_loss": [float(cell["losses"].mean(0).min()) for cell in cells],
        "best_val_accuracy": [cell["val_accuracy"][:, k].tolist() for cell, k in zip(cells, most_accurate)],  # [W][S]
        "at_optimum": at_optimum, "chance_loss": cells[0]["chance"],
        "flags": flags_of(points, cells, widths, seeds, failed),
        "curves": [{"lr": cell["lr"].tolist(), "train_loss": np.where(
            cell["losses"] < DIVERGED, cell["losses"], math.nan).tolist()} for cell in cells]})


def flags_of(points, cells, widths, seeds, failed):
    """What a reader of the exponents must know."""
    flags = ["one width: no exponent"] if len(widths) == 1 else []
    flags += ["one seed: the interval is the grid's resolution"] if seeds == 1 else []
    flags += [f"width {width}: out of memory" for width in failed]
    for (best, optimal, stable, unstable), cell, width in zip(points, cells, widths):
        if math.isnan(optimal):
            flags.append(f"width {width}: every run diverged")
            continue
        flags += [f"width {width}: optimum at the grid's edge"] * (best in (0, len(cell["lr"]) - 1))
        flags += [f"width {width}: no stable LR"] * math.isnan(stable)
        if not math.isnan(stable) and math.isnan(unstable):
            flags.append(f"width {width}: nothing unstable up to LR {cell['lr'][-1]:.3g}")
    return flags


# ---- from tracked runs to the exponents of updates, alignment and the distance to the widest network ----

def summarize_tracks(rows, tracks, curves=None, widths=None, seeds=None):
    """{"updates": exponents of every update at the first and the last step, "alignment": its course over
    the steps, "limit": distances to the widest network, "course": logits, hidden updates and loss over the
    steps}, each a list with one entry or more per curve and LR."""
    curves = list(dict.fromkeys(map(curve_of, rows))) if curves is None else curves
    widths = sorted({row["width"] for row in rows}) if widths is None else widths
    seeds = 1 + max(row["seed"] for row in rows) if seeds is None else seeds
    shared, steps = shared_settings(rows), sorted({step for _, step, _ in tracks})
    modules = {}                # of each run, in the network's order
    for row in sorted(tracks.values(), key=lambda row: row["layer"]):
        modules.setdefault(row["id"], {})[row["module"]] = row["role"]
    summary = {"updates": [], "alignment": [], "limit": [], "course": []}
    for curve, lr in itertools.product(curves, sorted({row["lr"] for row in rows})):
        ids = {(row["seed"], row["width"]): row["id"] for row in rows if curve_of(row) == curve and row["lr"] == lr}
        roles = next((modules[id] for id in ids.values() if id in modules), None)
        if roles is None:
            continue

        def values(step, module, quantity, missing=math.nan):
            """[S][W] of one tracked quantity."""
            found = [[tracks.get((ids.get((seed, width)), step, module), {}).get(quantity) for width in widths]
                     for seed in range(seeds)]
            return [[missing if value is None else value for value in line] for line in found]

        told = dict(zip(CURVE, curve))
        key = {**told, "lr": lr, "widths": list(widths)}
        summary["updates"] += [{**key, **entry} for entry in update_exponents(values, told, widths, shared, roles)]
        summary["alignment"] += [{**key, **entry} for entry in alignment_course(values, roles, steps)]
        softmax = values(shared["steps"], "", "softmax", [[math.nan]])
        distance = [[rms_distance(output, of_seed[-1]) for output in of_seed] for of_seed in softmax]
        summary["limit"].append({**key, "steps": shared["steps"], "values": distance})
        summary["course"].append({**key, "steps": steps, **course(values, roles, steps)})
    return finite(summary)


def alignment_course(values, roles, steps):
    """Seed means [W][T] of both alignments of every module."""
    for layer, name in enumerate(name for name in roles if name):
        for kind in ("operator_update", "operator_propagating"):
            means = [np.array(values(step, name, kind)).mean(0) for step in steps]              # [T] (W,)
            yield {"layer": layer, "module": name, "kind": kind, "steps": steps,
                   "values": np.transpose(means).tolist()}


def course(values, roles, steps):
    """Seed means [W][T] of the logits' change, the hidden layers' effective update (their mean) and the
    loss."""
    hidden = [name for name, role in roles.items() if role == "hidden"]
    means = {"logits_change": [np.array(values(step, "", "change")).mean(0) for step in steps],
             "hidden_update": [np.mean([values(step, name, "effective") for name in hidden], axis=(0, 1))
                               if hidden else np.array(values(step, "", "none")).mean(0) for step in steps],
             "train_loss": [np.array(values(step, "", "loss")).mean(0) for step in steps]}
    return {name: np.transpose(lines).tolist() for name, lines in means.items()}


def rms_distance(outputs, others):
    return float(np.sqrt(np.mean((np.array(outputs, dtype=float) - np.array(others, dtype=float)) ** 2)))


def predicted_updates(curve, shared, step, roles):
    """[(kind, layer, module, tracked quantity, predicted exponent)] of every module, from param.predict;
    and the regime.

    Of a GPT by role: the residual stream carries every layer's change, but only the embedding's into the
    first block; a gain multiplies coordinates, as an input weight does.
    """
    told = {name: curve[name] for name in ("optimizer", "loss", "alpha")}
    predicted = param.predict(curve["param"], **told, hidden_layers=depth(shared), trainable=shared["trainable"],
                              step=step)
    change = max(predicted.effective[-1], predicted.propagating[-1])            # of the logits, without their initial value
    names = [name for name in roles if name]
    logits = ("logits", len(names), "", "change", change)
    if shared["model"] == "mlp":
        entries = [("effective", i, name, "effective", predicted.effective[i]) for i, name in enumerate(names)]
        for i, name in enumerate(names[1:]):
            entries.append(("propagating", i + 1, name, "propagating", predicted.propagating[i]))
        for i, name in enumerate(names[1:]):
            entries.append(("features", i, name, "input_change", predicted.features[i]))
        return [*entries, logits], predicted.regime
    c = {role: pair[1] for role, pair in param.exponents(curve["param"], curve["optimizer"]).items()}
    effective = {"input": predicted.effective[0], "hidden": predicted.effective[1], "output": predicted.effective[-1],
                 "vector": predicted.effective[0] + c["input"] - c["vector"]}
    propagating = {"hidden": predicted.propagating[-2], "output": predicted.propagating[-1],
                   "vector": predicted.features[-1]}
    entries = []
    for layer, name in enumerate(names):
        role = roles[name]
        entries.append(("effective", layer, name, "effective", effective[role]))
        if role in propagating:
            first = re.fullmatch(r"blocks\.0\.(norm_attention|attention\.qkv|norm_mlp|up)", name)
            exponent = predicted.features[0] if first else propagating[role]
            entries.append(("propagating", layer, name, "propagating", exponent))
    return [*entries, logits], predicted.regime


def update_exponents(values, curve, widths, shared, roles):
    """Measured exponents, with intervals, beside those of param.predict: effective and propagating updates
    of every module, the change of every feature (an MLP module's input) and of the logits, at the first and
    the last step."""
    names = list(roles)
    for step in sorted({1, shared["steps"]}):
        tracked, regime = predicted_updates(curve, shared, step, roles)
        for kind, layer, module, quantity, exponent in tracked:
            norms = np.array(values(step, module, quantity))                # (S, W)
            entry = {"module": names[layer] if kind != "logits" else "", "step": step, "kind": kind, "layer": layer, "values": norms.tolist(),
                     "exponent": None, "interval": [None, None], "predicted": exponent, "regime": regime}
            usable = (np.isfinite(norms) & (norms > 0)).all(0)
            if usable.sum() > 1:
                measured = np.array(widths)[usable], norms[:, usable]
                entry["exponent"] = metrics.fit_exponent(*measured)[0]
                entry["interval"] = list(metrics.exponent_interval(*measured))
            yield entry


# ---- tables ----

def namer(entries, always=()):
    """(head, name(entry)): columns of the settings that differ among entries, and of those named always."""
    named = [name for name in (*CURVE, "lr") if name in always or len({entry.get(name) for entry in entries}) > 1]
    sizes = {name: max(len(name), *(len(str(entry[name])) for entry in entries)) for name in named}

    def name_of(entry):
        return "".join(f"{entry[name]!s:{size + 2}}" for name, size in sizes.items())

    return name_of({name: name for name in named}), name_of


def table(summary):
    """Predicted beside measured exponents, then the LRs behind them."""
    def measured(row, name):
        slope, (low, high) = row[f"{name}_exponent"], row[f"{name}_interval"]
        if slope is None:
            return "-"
        return f"{slope:+.2f} [{low:+.2f}, {high:+.2f}]" if low is not None else f"{slope:+.2f}"

    def lr(value):
        return "-" if value is None else f"{value:.3g}"

    head, name_of = namer(summary, CURVE[:3])
    lines = ["Exponents of LR against width, with 95 % intervals", "",
             f"{head}{'predicted':>10}   {'max-stable':22}optimal"]
    for row in summary:
        predicted = row["predicted_max_stable_exponent"]
        lines.append(f"{name_of(row)}{'no bound' if predicted is None else f'{predicted:+.2f}':>10}   "
                     f"{measured(row, 'max_stable'):22}{measured(row, 'optimal')}")
    lines += ["", f"{head}{'width':>6}  {'optimal LR':>10}  {'loss there':>10}  stable up to  unstable from"]
    for row in summary:
        for i, width in enumerate(row["widths"]):
            lines.append(f"{name_of(row)}{width:6}  {lr(row['optimal_lr'][i]):>10}  "
                         f"{lr(row['best_train_loss'][i]):>10}  {lr(row['max_stable_lr'][i]):>12}  "
                         f"{lr(row['min_unstable_lr'][i]):>13}")
    chances = {row["loss"]: row["chance_loss"] for row in summary}
    unigram = " (the tokens' unigram entropy)" if "ce" in chances and summary[0]["model"] == "gpt" else ""
    chances = ", ".join(f"{loss} {value:.3g}" for loss, value in chances.items())
    lines += ["", f"A constant predictor's loss: {chances}{unigram}"]
    lines += [f"! {name_of(row).strip()}: {flag}" for row in summary for flag in row["flags"]]
    return "\n".join(lines)


def update_table(updates):
    """Predicted beside measured exponents of the effective updates, from input to readout, and of the
    logits' change."""
    def words(values):
        values = [value for value in values if value is not None]
        return f"{sum(values) / len(values):+.2f}" if values else "-"

    head, name_of = namer(updates, CURVE[:4])
    groups, kinds = {}, {}
    for entry in updates:
        if entry["kind"] in ("effective", "logits"):
            kind = entry["module"].removeprefix("layers.").rpartition(".")[2] or "logits"
            kinds[kind] = max(len(kind), 13)
            group = groups.setdefault(f"{name_of(entry)}{entry['step']:<6}", {})
            group.setdefault(kind, []).append(entry)
    lines = []
    for name, of_kind in groups.items():
        cells = [f"{words(e['exponent'] for e in of_kind[kind])} ({words(e['predicted'] for e in of_kind[kind])})"
                 if kind in of_kind else "" for kind in kinds]
        lines.append((name + "  ".join(cell.rjust(kinds[kind]) for kind, cell in zip(kinds, cells))).rstrip())
    head += f"{'step':6}" + "  ".join(kind.rjust(size) for kind, size in kinds.items())
    return "\n".join(["Exponents of effective updates ΔW x and of the logits' change against width: measured "
                      "(predicted), means over tensors of a kind", "", head, *lines])


# ---- summary.json ----

def report(out, rows, tracks, stable_if, command, curves=None, widths=None, seeds=None):
    """Prints predicted beside measured exponents of rows (and tracks), and writes <out>/summary.json."""
    shared = shared_settings(rows)
    summary = {"command": command, "stable_if": stable_if, "runs": len(rows),
               "seconds": round(sum(row["seconds"] for row in rows), 1),
               **{name: shared[name] for name in ("model", "data", "hidden_layers", "layers", "steps", "base_width")},
               "rows": []}
    if len({row["lr"] for row in rows}) > 1:        # one LR alone has no optimum and no edge
        summary["rows"] = summarize(rows, stable_if, curves, widths, seeds)
        print(table(summary["rows"]) if summary["rows"] else "No results.")
        for curve in curves or ():
            if not any(curve_of(row) == curve for row in summary["rows"]):
                print(f"! {' '.join(map(str, curve[:3]))}: every run was out of memory; use smaller widths or batches")
    if tracks:
        summary.update(summarize_tracks(rows, tracks, curves, widths, seeds))
        print(update_table(summary["updates"]))
    write_json(Path(out) / "summary.json", summary)


def main():
    parser = train.Parser(description="The table and summary.json of a sweep again, from its rows alone.")
    parser.add_argument("out", type=Path, metavar="OUT", help="result folder of a sweep")
    parser.add_argument("--stable-if", metavar="NAME[=X]", help="; ".join(
        f"{name} (X = {x:g}): {words}" for name, (x, _, words) in CRITERIA.items()) + " (default: as before)")
    args = parser.parse_args()
    rows = list(read_rows(args.out, mend=False).values())
    if not rows:
        raise InputError(f"{args.out} holds no runs*.jsonl with rows; name the --out of a sweep")
    summary = args.out / "summary.json"
    before = json.loads(summary.read_text()) if summary.exists() else {}
    stable_if = args.stable_if or before.get("stable_if", "chance")
    criterion_of(stable_if)
    tracks = read_rows(args.out, "track*.jsonl", mend=False)
    report(args.out, rows, tracks, stable_if, before.get("command", " ".join(["python", *sys.argv])))


if __name__ == "__main__":
    train.command_line(main)
