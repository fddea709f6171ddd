"""From result rows to optimum, stability edge, exponents with intervals, tables and
summary.json; nothing is trained.

    python analyze.py out/headline              # the table and summary.json of a sweep again
    python analyze.py out/headline --stable-if accuracy=0.8     # by another criterion
    summary = summary_of("out/headline")        # or of a list of rows

    curve   one value of each setting in config.CURVE
    cell    one curve at one width: losses (S, K) of S seeds at K learning rates
    edge    stability edge, the largest stable learning rate
    W       widths

Optimum, edge and exponents come from estimate.py, predictions from `param.predict`.
"""
import itertools
import json
import math
import os
import re
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

import config as settings
import data
import estimate
import param
import stack
from config import CURVE, GRID, RESULTS, SETTINGS, VALIDATION, InputError, curve_of
from estimate import DIVERGED, RULES, local_slopes, verdict

# Settings that summary.json repeats for titles.
SHOWN = ("model", "data", "hidden_layers", "layers", "steps", "base_width")
# What the row of a run holds.
ROW = (*SETTINGS, *RESULTS, "failed", "chance_loss", "shape_info", "seconds")


def criteria_help():
    return "; ".join(f"{name} (X = {x:g}): {description}"
                     for name, (x, description) in estimate.CRITERIA.items())


def as_floats(values):
    """Return a float array, None as nan."""
    return np.array(values, dtype=float)


# ---- result files ----

def key_of(row):
    """Return what identifies a row: a run's id, or (id, step, module) of a tracked module."""
    return (row["id"], row["step"], row["module"]) if "step" in row else row["id"]


def read_rows(out, files="runs*.jsonl", repair=False):
    """Return {key: row} of all such files in a folder. InputError names a line that is no row.

    A last line without its end was cut by a kill and does not count. repair: cut it
    off the file too, where nobody else may be writing.
    """
    rows = {}
    for path in sorted(Path(out).glob(files)):
        content = path.read_bytes()
        whole = content[:content.rfind(b"\n") + 1]
        if repair and whole != content:
            print(f"{path}: dropped a half-written last line; its run is done again",
                  file=sys.stderr)
            os.truncate(path, len(whole))
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                row = json.loads(line)
                rows[key_of(row)] = row
            except (ValueError, KeyError, TypeError):
                raise InputError(f"{path}:{number} is not a result row; "
                                 "remove that line, or use another --out") from None
            missing = [name for name in ROW if name not in row and "step" not in row]
            if missing:
                raise InputError(f"{path}:{number} lacks {missing[0]}: another version wrote it; "
                                 "analyze it with that one, or use another --out")
    return rows


# ---- the rows of summary.json ----

def parse_criterion(text):
    """Return (name, X) of "name" or "name=X". InputError."""
    name, _, x = text.partition("=")
    if name not in estimate.CRITERIA:
        raise InputError(f"stable-if is {text!r}; choose from {', '.join(estimate.CRITERIA)}, "
                         "with =X for another threshold")
    try:
        threshold = float(x or estimate.CRITERIA[name][0])
    except ValueError:
        threshold = math.nan
    if not math.isfinite(threshold):
        raise InputError(f"stable-if is {text!r}; the part behind = must be a number")
    return name, threshold


def default_criterion(config):
    """Return the criterion for text, where a constant predictor's loss is so high that
    nothing seems unstable, and for all other data."""
    return "learned" if settings.is_text(config) else "chance"


def order_of(curve):
    """Return a curve's place in tables: names in the order of their own tables."""
    values = dict(zip(CURVE, curve))
    return (list(param.PARAMETERIZATIONS).index(values["param"]), values["alpha"],
            param.OPTIMIZERS[::-1].index(values["optimizer"]), not values["norm_affine"],
            values["warmup"], values["lr_factor"], list(stack.LOSSES).index(values["loss"]))


def cell_of(rows, curve, width, seeds):
    """Return a cell: lr (K,), losses, accuracies and validation (S, K), chance.

    LRs that lack one of the seeds are left out.
    """
    row_at = {(row["lr"], row["seed"]): row for row in rows
              if row["width"] == width and curve_of(row) == curve and not row["failed"]}
    lrs = [lr for lr in sorted({lr for lr, _ in row_at})
           if all((lr, seed) in row_at for seed in range(seeds))]

    def column(name):
        return as_floats([[row_at[lr, seed][name] for lr in lrs] for seed in range(seeds)])

    return {
        "lr": np.array(lrs),
        "losses": estimate.as_losses(column("final_train_loss")),
        "accuracies": np.nan_to_num(column("train_accuracy")),
        "chance": row_at[lrs[0], 0]["chance_loss"] if lrs else math.nan,
        **{name: column(name) for name in (*VALIDATION, "initial_sharpness")},
    }


def stability(cell, criterion):
    return estimate.stable_runs(cell["losses"], *criterion, cell["chance"], cell["accuracies"])


def shared_settings(rows):
    """Return the settings that all rows have in common. InputError where they differ.

    Where Adam on text has its own defaults, only rows of the same optimizer must agree.
    """
    shared = [name for name in SETTINGS if name not in GRID]
    for name in shared:
        values = {(row["optimizer"] if name in settings.ADAM_ON_TEXT else "", row[name])
                  for row in rows}
        if len(values) > len(dict(values)):
            values = " and ".join(sorted({repr(row[name]) for row in rows}))
            raise InputError(f"the rows have {name} = {values}; "
                             "analyze the rows of one sweep at a time")
    return {name: rows[0][name] for name in shared}


def shape_info_of(rows):
    """Return what predictions must know of the models; a failed run has nothing of it."""
    infos = [row["shape_info"] for row in rows if row["shape_info"]]
    return {**infos[0], "uneven": any(info["uneven"] for info in infos)} if infos else {}


def summarize(rows, criterion="chance"):
    """Return the rows of summary.json, one per curve, from result rows."""
    criterion, shared = parse_criterion(criterion), shared_settings(rows)
    shape_info, seeds = shape_info_of(rows), 1 + max(row["seed"] for row in rows)
    summary = []
    for curve in sorted(set(map(curve_of, rows)), key=order_of):
        of_curve = [row for row in rows if curve_of(row) == curve]
        cells = {width: cell_of(of_curve, curve, width, seeds)
                 for width in sorted({row["width"] for row in of_curve})}
        cells = {width: cell for width, cell in cells.items() if len(cell["lr"])}
        failed = sorted({row["width"] for row in of_curve if row["failed"]})
        if cells:
            summary.append(summarize_curve(dict(zip(CURVE, curve)), list(cells),
                                           list(cells.values()), failed, criterion,
                                           shared, shape_info))
    return data.null_if_not_finite(summary)


def summarize_curve(curve, widths, cells, failed, criterion, shared, shape_info):
    """Return a row of summary.json, from one cell per width; failed: widths out of memory."""
    stable = [stability(cell, criterion) for cell in cells]
    points = [estimate.optimum_and_edge(cell["lr"], cell["losses"], of_cell)
              for cell, of_cell in zip(cells, stable)]
    exponents = estimate.exponents_of(widths, points)
    # hidden_layers: one more than hidden matrices
    predicted = curve["alpha"] - param.max_trainable_alpha(
        curve["param"], curve["optimizer"], curve["loss"], 1 + shape_info["hidden_tensors"],
        settings.trained_roles(curve))
    predicted_up_to = predicted + 0.5 * final_gain_lifts_edge(curve, shared)
    finished = [np.where(cell["losses"] < DIVERGED, cell["losses"], math.nan) for cell in cells]
    # a column (an LR) per width, by means over seeds
    best = [cell["losses"].mean(0).argmin() for cell in cells]
    most_accurate = [np.nan_to_num(cell["val_accuracy"]).mean(0).argmax() for cell in cells]

    def lrs(name):
        return [float(np.exp(getattr(point, name).mean())) for point in points]

    def values(name, columns):
        """[W][S], of one column per width."""
        return [cell[name][:, k].tolist() for cell, k in zip(cells, columns)]

    fits = {}
    for kind, fit in exponents.items():
        fits |= {f"{kind}_exponent": fit.slope, f"{kind}_interval": fit.interval,
                 f"{kind}_verdict": verdict(predicted, fit.interval, predicted_up_to)}
    return {
        **{name: shared[name] for name in SHOWN},
        **curve,
        "widths": widths,
        "optimal_lr": lrs("optimal"),
        "max_stable_lr": lrs("stable"),
        "min_unstable_lr": lrs("unstable"),
        **fits,
        "predicted_max_stable_exponent": predicted,
        "predicted_up_to": predicted_up_to,
        **local_slopes(widths, points),
        "optimum_at_edge": [point.at_last_stable for point in points],
        "best_train_accuracy": [float(cell["accuracies"].mean(0).max()) for cell in cells],
        "best_train_loss": [float(losses.mean(0)[k]) for losses, k in zip(finished, best)],
        "best_val_accuracy": values("val_accuracy", most_accurate),
        "at_optimum": {name: values(name, best) for name in VALIDATION},
        "chance_loss": cells[0]["chance"],
        "edge_times_sharpness": edge_times_sharpness(widths, points, cells),
        "flags": (flags_of(points, exponents, cells, widths, failed, criterion)
                  + assumptions(shared, shape_info)),
        "curves": [{"lr": cell["lr"].tolist(), "train_loss": losses.tolist(),
                    "stable": of_cell.tolist()}
                   for cell, losses, of_cell in zip(cells, finished, stable)],
    }


def final_gain_lifts_edge(curve, shared):
    """Return whether the gain of a GPT's final norm trains under Adam in sp, and may shrink
    the logits back: the exponent then lies between the predicted one and 1/2 above it."""
    return (shared["model"] == "gpt" and curve["norm_affine"]
            and (curve["param"], curve["optimizer"]) == ("sp", "adam")
            and all(factor > 0 for pattern, factor in settings.lr_factors(curve).items()
                    if pattern == "vector" or fnmatchcase("norm.weight", pattern)))


def edge_times_sharpness(widths, points, cells):
    """Return the edge times λ0 / 2 at every width, geometric mean over seeds, and its
    exponent: a quadratic model with the initial sharpness λ0 has 1, a catapult a constant.

    None where the sharpness was not measured.
    """
    means = [np.nanmean(sharpness, 1) if np.isfinite(sharpness).any()
             else np.full(len(sharpness), math.nan)
             for sharpness in (cell["initial_sharpness"] for cell in cells)]    # [W] of (S,)
    _, edge, _, gap = estimate.values_of(points)
    values = edge * np.stack(means, -1) / 2                     # (S, W)
    fit = estimate.exponent_of(widths, values, gap)
    if fit.widths_used:
        return {"values": np.exp(np.log(values).mean(0)).tolist(), "exponent": fit.slope,
                "interval": fit.interval}


def assumptions(shared, shape_info):
    """Return what the prediction takes for granted of a custom model, where in doubt."""
    caveats = []
    if settings.is_custom(shared) and shape_info["uneven"]:
        caveats.append("the prediction assumes that all growing dimensions are "
                       "proportional to the width; here some are not")
    if shape_info["roles_given"]:
        caveats.append("the prediction assumes that the roles given are right")
    return caveats


def flags_of(points, exponents, cells, widths, failed, criterion):
    """Return what a reader of the exponents must know, each with its remedy."""
    flags = [f"width {width}: out of memory" for width in failed]
    if max(widths) < 1.1 * min(widths):
        flags.append("widths within a factor of 1.1: no exponent worth the name; "
                     "use --widths farther apart")
    if len(cells[0]["losses"]) == 1:
        flags.append("one seed: the interval knows the scatter around the line only; "
                     "use more --seeds")
    for kind, words in (("max_stable", "edge"), ("optimal", "optimum")):
        used = exponents[kind].widths_used
        if 0 < used < len(widths):
            flags.append(f"{words} from {used} of {len(widths)} widths")
    return flags + [f"width {width}: {flag}" for point, cell, width in zip(points, cells, widths)
                    for flag in flags_of_cell(point, cell, criterion)]


def flags_of_cell(point, cell, criterion):
    """Return why a cell's optimum or edge is missing or uncertain, and what to do."""
    lrs, losses, (name, x) = cell["lr"], cell["losses"], criterion
    seeds, mean = len(losses), losses.mean(0)
    if not (losses < DIVERGED).all(0).any():
        return [f"at every LR at least one of {seeds} seeds diverged; use lower --lrs"]

    flags = []
    if mean.argmin() in (0, len(lrs) - 1):
        flags.append("optimum at the grid's edge; widen --lr-range")
    missing = np.isnan(point.stable).sum()
    if missing:
        lowest = (f" (lowest mean loss {mean.min():.3g} for a constant predictor's "
                  f"{cell['chance']:.3g})" if name == "chance" else "")
        flags.append(f"no stable LR for {missing} of {seeds} seeds under {name}={x:g}{lowest}; "
                     "more --steps, or another --stable-if")
    above = np.isnan(point.unstable).sum() - missing
    if above:
        flags.append(f"nothing unstable up to LR {lrs[-1]:.3g} for {above} of {seeds} seeds; "
                     "widen --lr-range")
    bracket = (point.unstable - point.stable).mean()
    for words, size in (("the optimal LR", point.resolution), ("the edge", bracket)):
        if size > math.log(5):
            flags.append(f"{words} is known to a factor of {math.exp(size):.2g} only; "
                         "more --seeds, or LRs between")
    return flags


# ---- learning rates at widths that were not swept, or left out ----

def points_of(row):
    """Return the estimate.Point of every width of a row of summary.json."""
    return [estimate.optimum_and_edge(curve["lr"], curve["train_loss"], np.array(curve["stable"]))
            for curve in row["curves"]]


def rates_at(summary_rows, widths):
    """Return the "at" of summary.json: optimum, stability edge and the recommended learning
    rate of every curve at widths that need not have been swept, see estimate.at_width."""
    return data.null_if_not_finite([
        {**{name: row[name] for name in CURVE}, "width": width,
         **estimate.at_width(width, row["widths"], points_of(row),
                             row["predicted_max_stable_exponent"])}
        for row in summary_rows for width in widths])


def left_out(summary_rows, count):
    """Return what rules for the learning rate, read off the narrower widths, do at the
    `count` widest ones: a dict per curve, width and rule, see estimate.left_out."""
    return [{**{name: row[name] for name in CURVE}, **result} for row in summary_rows
            for result in estimate.left_out(
                row["widths"], points_of(row), row["curves"], count,
                row["predicted_max_stable_exponent"])]


# ---- tracked runs ----

def summarize_tracks(rows, tracks):
    """Return {"updates": their exponents, "alignment": over the steps, "course": logits,
    hidden updates and loss over the steps, "limit": spread of the features' kernels},
    lists with entries for every curve and LR."""
    shared, shape_info = shared_settings(rows), shape_info_of(rows)
    widths, seeds = sorted({row["width"] for row in rows}), 1 + max(row["seed"] for row in rows)
    steps = sorted({step for _, step, _ in tracks})
    modules = {}                # {run: {module: role}}, in the model's order
    for row in sorted(tracks.values(), key=lambda row: row["layer"]):
        modules.setdefault(row["id"], {})[row["module"]] = row["role"]

    summary = {"updates": [], "alignment": [], "course": [], "limit": []}
    curves = sorted(set(map(curve_of, rows)), key=order_of)
    for curve, lr in itertools.product(curves, sorted({row["lr"] for row in rows})):
        ids = {(row["seed"], row["width"]): row["id"] for row in rows
               if curve_of(row) == curve and row["lr"] == lr}
        roles = next((modules[id] for id in ids.values() if id in modules), None)
        if roles is None:
            continue

        def values(step, module, quantity):
            """[S][W] of one tracked quantity, None where a run has none."""
            return [[tracks.get((ids.get((seed, width)), step, module), {}).get(quantity)
                     for width in widths] for seed in range(seeds)]

        of_curve = dict(zip(CURVE, curve))
        entries = {
            "updates": update_exponents(values, of_curve, widths, shared, shape_info, roles),
            "alignment": alignment_course(values, roles, steps),
            "course": [{"steps": steps, **course(values, roles, steps)}],
            "limit": kernel_spreads(values, widths, roles, shared["steps"]),
        }
        for name in summary:
            summary[name] += [{**of_curve, "lr": lr, "widths": widths, **entry}
                              for entry in entries[name]]
    return data.null_if_not_finite(summary)


def alignment_course(values, roles, steps):
    """Yield seed means [W][T] of both alignments of every module."""
    for layer, name in enumerate(filter(None, roles)):
        for kind in ("operator_update", "operator_propagating"):
            norms = as_floats([values(step, name, kind) for step in steps])     # (T, S, W)
            if np.isnan(norms).all() and layer == 0 and kind == "operator_update":
                return              # tracked without alignment
            yield {"layer": layer, "module": name, "kind": kind,
                   "steps": steps, "values": norms.mean(1).T.tolist()}


def course(values, roles, steps):
    """Return geometric means over seeds, and over hidden layers, [W][T]."""
    def means(modules, quantity):
        norms = as_floats([[values(step, module, quantity) for module in modules]
                           for step in steps])              # (T, modules, S, W)
        return np.exp(np.log(norms).mean((1, 2))).T.tolist() if modules else []

    with np.errstate(divide="ignore", invalid="ignore"):
        return {"logits_change": means([""], "change"),
                "hidden_update": means([name for name in roles if roles[name] == "hidden"],
                                       "effective"),
                "train_loss": means([""], "loss")}


def kernel_spreads(values, widths, roles, step):
    """Yield for every layer of hidden features the relative spread of their kernels over
    initializations (W,) and its exponent, and the features' relative change |Δh| / |h|
    (S, W) (Proposition 2)."""
    for layer, name in enumerate(filter(None, roles)):
        kernels = values(step, name, "kernel")              # [S][W], upper triangles
        if layer == 0 or any(kernel is None for line in kernels for kernel in line):
            continue
        spread = estimate.relative_spread(as_floats(kernels))       # (W,)
        fit = estimate.exponent_of(widths, spread[None], np.zeros(len(widths)))
        change, features = (as_floats(values(step, name, quantity))
                            for quantity in ("input_change", "input"))
        yield {"layer": layer, "module": name, "step": step, "values": spread.tolist(),
               "exponent": fit.slope, "interval": fit.interval, "predicted": -0.5,
               "change": (change / features).tolist()}


def predicted_updates(curve, model, shape_info, step, roles):
    """Return [(kind, layer, predicted exponent)] of every module, and the prediction.

    Of a GPT by role: the residual stream carries every layer's change, but only
    the embedding's into the first block; a gain multiplies coordinates, as an
    input weight does; and the final norm caps what the readout sees.
    """
    predicted = param.predict(
        curve["param"], curve["optimizer"], curve["loss"], curve["alpha"],
        1 + shape_info["hidden_tensors"], settings.trained_roles(curve), step)
    effective, propagating, features = (predicted.effective, predicted.propagating,
                                        predicted.features)
    names = [name for name in roles if name]
    if model == "mlp":
        readout = propagating[-1]
        entries = [(kind, i, exponent) for kind, first, exponents in (
            ("effective", 0, effective), ("propagating", 1, propagating), ("features", 0, features))
            for i, exponent in enumerate(exponents, first)]
    else:
        e = param.exponents(curve["param"], curve["optimizer"])     # (init, LR) by role
        readout = min(propagating[-1], 1 - e["output"][0])
        of_role = {
            "input": effective[0],
            "hidden": effective[1] if len(effective) > 2 else math.nan,
            "output": effective[-1],
            "vector": effective[0] + e["input"][1] - e["vector"][1],
        }
        handed_on = {
            "hidden": propagating[-2] if len(propagating) > 1 else math.nan,
            "output": readout,
            "vector": features[-1],
        }
        in_first_block = re.compile(r"blocks\.0\.(norm_attention|attention\.qkv|norm_mlp|up)")
        entries = [("effective", i, of_role[roles[name]]) for i, name in enumerate(names)]
        entries += [("propagating", i, features[0] if in_first_block.fullmatch(name)
                     else handed_on[roles[name]])
                    for i, name in enumerate(names) if roles[name] in handed_on]
    return [*entries, ("logits", len(names), max(effective[-1], readout))], predicted


def update_exponents(values, curve, widths, shared, shape_info, roles):
    """Yield measured exponents, with intervals, beside predicted ones, at the first and
    the last step: effective and propagating updates of every module, the change
    of an MLP's features and of the logits."""
    names = [*filter(None, roles), ""]          # "" stands for the logits
    quantities = {"features": "input_change", "logits": "change"}
    for step in sorted({1, shared["steps"]}):
        entries, predicted = predicted_updates(curve, shared["model"], shape_info, step, roles)
        for kind, layer, exponent in entries:
            # a feature is the next module's input
            module = names[layer + (kind == "features")]
            norms = as_floats(values(step, module, quantities.get(kind, kind)))     # (S, W)
            fit = estimate.exponent_of(widths, norms, np.zeros(len(widths)), equal_noise=False)
            yield {
                "module": names[layer], "step": step, "kind": kind, "layer": layer,
                "values": norms.tolist(), "exponent": fit.slope, "interval": fit.interval,
                "widths_used": fit.widths_used, "predicted": exponent,
                "lower_bound": predicted.lower_bound, "regime": predicted.regime,
            }


# ---- tables ----

def label_columns(entries, always):
    """Return (head, label(entry)): columns of the settings that differ among entries,
    or are always shown."""
    names = [name for name in (*CURVE, "lr")
             if name in always or len({entry.get(name) for entry in entries}) > 1]
    sizes = {name: 2 + max(len(name), *(len(str(entry[name])) for entry in entries))
             for name in names}
    head = "".join(f"{name:{size}}" for name, size in sizes.items())
    return head, lambda entry: "".join(f"{str(entry[name]):{size}}"
                                       for name, size in sizes.items())


def number(value, spec="+.2f"):
    return "-" if value is None else format(value, spec)


def exponent_table(summary):
    """Return predicted beside measured exponents with verdicts, then the LRs behind them."""
    def measured(row, kind):
        low, high = map(number, row[f"{kind}_interval"])
        interval = "" if low == "-" else f" [{low}, {high}]"
        return f"{number(row[f'{kind}_exponent'])}{interval} {row[f'{kind}_verdict'] or ''}"

    head, label = label_columns(summary, CURVE[:3])
    lines = ["Exponents of LR against width, with 95 % intervals", "",
             f"{head}{'predicted':>12}   {'max-stable':32}optimal"]
    for row in summary:
        predicted = number(row["predicted_max_stable_exponent"])
        if row["predicted_up_to"] != row["predicted_max_stable_exponent"]:
            predicted = f"{predicted}..{number(row['predicted_up_to'])}"
        cliffs, count = sum(row["optimum_at_edge"]), len(row["widths"])
        cliffs = f"  (the last stable LR at {cliffs} of {count} widths)" if cliffs else ""
        lines.append(f"{label(row)}{'no bound' if predicted == '-' else predicted:>12}   "
                     f"{measured(row, 'max_stable'):32}{measured(row, 'optimal')}{cliffs}")
    if any("missed" in (row["max_stable_verdict"], row["optimal_verdict"]) for row in summary):
        lines.append("Missed: see \"Why don't I see a shift?\" in README.md")

    lines += ["", f"{head}{'width':>6}  optimal LR  loss there  stable up to  unstable from  "
                  "slope from the width before"]
    for row in summary:
        for i, width in enumerate(row["widths"]):
            line = f"{label(row)}{width:6}"
            for key, size in (("optimal_lr", 10), ("best_train_loss", 10),
                              ("max_stable_lr", 12), ("min_unstable_lr", 13)):
                line += f"  {number(row[key][i], '.3g'):>{size}}"
            if i and row["local_max_stable"][i - 1] is not None:
                line += (f"  {number(row['local_max_stable'][i - 1])} "
                         f"± {row['local_resolution'][i - 1]:.2f}")
            lines.append(line)

    for row in summary:
        if row["edge_times_sharpness"]:
            product = row["edge_times_sharpness"]
            values = ", ".join(number(value, ".3g") for value in product["values"])
            low, high = map(number, product["interval"])
            lines.append(f"{label(row)}edge x initial sharpness / 2: {values}; "
                         f"exponent {number(product['exponent'])} [{low}, {high}]")

    chances = {row["loss"]: row["chance_loss"] for row in summary}
    unigram = (" (the tokens' unigram entropy)"
               if "ce" in chances and settings.is_text(summary[0]) else "")
    chances = ", ".join(f"{loss} {value:.3g}" for loss, value in chances.items())
    lines += ["", f"A constant predictor's loss: {chances}{unigram}"]
    lines += [f"! {label(row).strip()}: {flag}" for row in summary for flag in row["flags"]]
    return "\n".join(lines)


def update_table(updates):
    """Return exponents of effective updates, from input to readout, and of the logits'
    change: means over tensors of a kind."""
    def mean(entries, key):
        values = [entry[key] for entry in entries if entry[key] is not None]
        return number(sum(values) / len(values) if values else None)

    head, label = label_columns(updates, CURVE[:4])
    groups, sizes = {}, {}      # {label: {kind of tensor: entries}}, {kind: size of its column}
    for entry in updates:
        if entry["kind"] in ("effective", "logits"):
            kind = entry["module"].rpartition(".")[2] or "logits"
            sizes[kind] = max(13, len(kind))
            group = groups.setdefault(f"{label(entry)}{entry['step']:<6}", {})
            group.setdefault(kind, []).append(entry)

    lines = ["Exponents of effective updates ΔW x and of the logits' change "
             "against width: measured (predicted), means over tensors of a kind", "",
             f"{head}{'step':6}" + "  ".join(f"{kind:>{size}}" for kind, size in sizes.items())]
    all_widths = max(len(entry["widths"]) for entry in updates)
    for line, of_kind in groups.items():
        used = min(entry["widths_used"] for entries in of_kind.values() for entry in entries)
        if used == 0:
            continue            # an LR that other widths did not run
        for kind, size in sizes.items():
            entries, cell = of_kind.get(kind), ""
            if entries:
                bound = "≥" if entries[0]["lower_bound"] else ""
                cell = f"{mean(entries, 'exponent')} ({bound}{mean(entries, 'predicted')})"
            line += f"{cell:>{size}}  "
        lines.append(line.rstrip() + (f"  ! from {used} of {all_widths} widths"
                                      if used < all_widths else ""))
    return "\n".join(lines)


def rates_table(at):
    """Return the table of "at": learning rates with 95 % prediction intervals."""
    head, label = label_columns(at, CURVE[:3])
    lines = ["",
             "Learning rates at other widths, with 95 % intervals for what a new seed shows", "",
             f"{head}{'width':>6}  {'by exponent':12}{'optimal':30}{'stable up to':30}recommended"]
    for entry in at:
        for how in ("predicted", "fitted"):
            line = f"{label(entry)}{entry['width']:6}  {how:12}"
            for kind in ("optimal", "max_stable"):
                rate = entry[kind].get(how) or [None]
                cell = "-" if None in rate else "{:.3g} [{:.3g}, {:.3g}]".format(*rate)
                line += f"{cell:30}"
            if how == "predicted" and entry["recommended"] is not None:
                line += f"{entry['recommended']:.3g}"
            lines.append(line)
    return "\n".join(lines)


def left_out_table(results):
    """Return for every rule how many left-out widths it is stable at, and the loss it costs."""
    lines = ["", "The learning rate at the widths left out, from the narrower ones", "",
             f"{'rule':22}{'unstable':>14}   loss above the best there (median of the stable)"]
    for rule in RULES:
        of_rule = [result for result in results if result["rule"] == rule]
        stable = [result["loss_above_best"] for result in of_rule if result["stable"]]
        if of_rule:
            lines.append(f"{rule:22}{len(of_rule) - len(stable):>6} of {len(of_rule):<4}   "
                         + (f"{100 * np.median(stable):.1f} %" if stable else "-"))
    return "\n".join(lines)


# ---- summary.json ----

def summary_of(source, stable_if=None, command=None):
    """Return the summary of a result folder, or of rows, that all figures of plots.py take.

    stable_if: a criterion NAME or NAME=X of estimate.CRITERIA, None for the data's own.
    A sweep at a single LR has no optimum and no edge, so its "rows" are empty.
    """
    rows, tracks = source, {}
    if isinstance(source, (str, Path)):
        rows, tracks = read_rows(source).values(), read_rows(source, "track*.jsonl")
        if not rows:
            raise InputError(f"{source} holds no runs*.jsonl with rows; "
                             "name the --out of a sweep")
    rows = list(rows)
    shared = shared_settings(rows)
    stable_if = stable_if or default_criterion(shared)
    return {
        "command": command or " ".join(["python", *sys.argv]),
        "stable_if": stable_if,
        "runs": len(rows),
        "seconds": round(sum(row["seconds"] for row in rows), 1),
        **{name: shared[name] for name in SHOWN},
        "rows": summarize(rows, stable_if) if len({row["lr"] for row in rows}) > 1 else [],
        **(summarize_tracks(rows, tracks) if tracks else {}),
    }


def report(out, stable_if, command, at=()):
    """Write <out>/summary.json, then print its tables."""
    summary = summary_of(out, stable_if, command)
    if at:
        summary["at"] = rates_at(summary["rows"], at)
    data.write_json(Path(out) / "summary.json", summary)
    if summary["rows"]:
        print(exponent_table(summary["rows"]))
    if summary.get("updates"):
        print(update_table(summary["updates"]))
    if not summary["rows"] and not summary.get("updates"):
        print("No results: a single learning rate, or no run that fits into memory.")
    if at:
        print(rates_table(summary["at"]))


def read_summary(out):
    """Return a folder's summary.json, {} without one. InputError if it is damaged."""
    path = Path(out) / "summary.json"
    try:
        return dict(json.loads(path.read_text())) if path.exists() else {}
    except (ValueError, TypeError):
        raise InputError(f"{path} is damaged; remove it: "
                         "the rows are enough to write it again") from None


def print_left_out(outs, stable_if, count):
    """Print what rules for the learning rate do at the widest `count` widths of these folders.

    The summary.json of a folder will do, unless another criterion is asked for.
    """
    rows = []
    for out in outs:
        summary = read_summary(out)
        if not summary.get("rows") or stable_if not in (None, summary["stable_if"]):
            summary = summary_of(out, stable_if)
        rows += [row for row in summary["rows"] if len(row["widths"]) > count + 1]
    if not rows:
        raise InputError(f"leave_out is {count}; at least two widths must remain")
    print(left_out_table(left_out(rows, count)))


def main(argv=None):
    parser = settings.Parser(
        description="The table and summary.json of a sweep again, from its rows alone.")
    add = parser.add_argument
    add("out", type=Path, nargs="+", metavar="OUT",
        help="result folder of a sweep; several with --leave-out, and their summary.json will do")
    add("--stable-if", metavar="NAME[=X]", help=f"{criteria_help()} (default: as before)")
    add("--at", type=settings.whole_number, nargs="+", default=[], metavar="N",
        help="the learning rate at widths that need not have been swept: optimum, stability "
        "edge and recommendation, with intervals")
    add("--leave-out", type=settings.whole_number, default=0, metavar="K",
        help="what rules for the learning rate, read off the narrower widths, "
        "do at the K widest ones")
    add("--no-plots", action="store_true", help="do not draw the figures again")
    args = parser.parse_args(argv)
    for width in args.at:
        settings.checked("at", width, settings.POSITIVE_INT)
    settings.checked("leave_out", args.leave_out, settings.NON_NEGATIVE_INT)
    if args.leave_out:
        return print_left_out(args.out, args.stable_if, args.leave_out)
    if len(args.out) > 1:
        raise InputError(f"{len(args.out)} folders; several are for --leave-out alone")

    out, before = args.out[0], read_summary(args.out[0])
    report(out, args.stable_if or before.get("stable_if"), before.get("command"), args.at)
    if not args.no_plots and (out / "figures").exists():
        draw(out)


def draw(out):
    """Draw the figures of a result folder."""
    import plots        # matplotlib takes a second to load
    try:
        print(*plots.draw(out), sep="\n")
    except plots.PlotError as error:
        raise InputError(str(error)) from None


if __name__ == "__main__":
    settings.command_line(main)
