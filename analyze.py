"""From result rows to optimum, stability edge, exponents with intervals, tables
and summary.json; nothing is trained.

    python analyze.py out/headline  # the table and summary.json of a sweep again
    python analyze.py out/headline --stable-if accuracy=0.8
                                    # under another criterion of stability

    curve            one value of each setting in CURVE
    cell             one curve at one width: losses (S, K) of S seeds at K learning rates
    optimal LR       vertex of a parabola in log LR through the losses around
                     their lowest mean
    max-stable LR    end of the contiguous stable range above the optimum: a
                     bracket of two LRs
    exponents        of LR against width, -0.5 is n^-1/2: least squares of the
                     seeds' mean log LR on log width, with 95 % intervals from
                     the seeds' spread and the grid's step

Predictions come from `param.predict`, measured exponents of updates from
`metrics.fit_exponent`.
"""
import train        # before numpy and torch: it asks for reproducible products

import itertools
import json
import math
import os
import re
import sys
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np

import data
import metrics
import param
from train import InputError, finite

# Settings that tell one curve from another, and those that vary within a sweep.
CURVE = ("loss", "param", "optimizer", "alpha", "norm_affine", "warmup")
GRID = ("width", "lr", "seed") + CURVE
curve_of = itemgetter(*CURVE)           # a row's curve, a tuple
# Repeated in summary.json.
SHOWN = ("model", "data", "hidden_layers", "layers", "steps", "base_width")
CRITERIA = {    # name: (default X, words)
    "chance":   (1.0, "loss below X times a constant predictor's"),
    "accuracy": (0.3, "train accuracy above X"),
    "best+1":   (1.0, "loss within X of the lowest at that width and seed"),
    "1.2x":     (1.2, "loss within X times that lowest one"),
}
# The infinite loss of a diverged run, so that means stay numbers.
DIVERGED = 1e30
# Confidence at which a curvature counts, and ends the search for it.
CURVED, CERTAIN = 0.99, 0.9999


def criteria_help():
    return "; ".join(f"{name} (X = {x:g}): {words}"
                     for name, (x, words) in CRITERIA.items())


# ---- result files ----

def key_of(row):
    """What identifies a row: a run's id, or (id, step, module) of a tracked
    module."""
    return (row["id"], row["step"], row["module"]) if "step" in row else row["id"]


def read_rows(out, files="runs*.jsonl", mend=True):
    """{key: row} of all such files in a folder. InputError names a line that is
    no row.

    A last line without its end was cut by a kill: dropped, with a word, where
    nobody else may be writing (mend).
    """
    rows = {}
    for path in sorted(Path(out).glob(files)):
        content = path.read_bytes()
        whole = content[:content.rfind(b"\n") + 1]
        if mend and whole != content:
            print(f"{path}: dropped a half-written last line; its run is done again",
                  file=sys.stderr)
            os.truncate(path, len(whole))
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                row = json.loads(line)
                if "step" not in row:
                    curve_of(row), row["width"], row["lr"], row["seed"]     # else KeyError
                rows[key_of(row)] = row
            except (ValueError, KeyError, TypeError):
                raise InputError(f"{path}:{number} is not a result row; "
                                 "remove that line, or use another --out") from None
    return rows


def write_json(path, value):
    """Writes whole or not at all."""
    with data.whole_file(path) as file:
        file.write((json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


# ---- from rows to an optimum and a stability edge ----

def floats(values):
    """A float array, None as nan."""
    return np.array(values, dtype=float)


def criterion_of(text):
    """(name, X) of "name" or "name=X". InputError."""
    name, _, x = text.partition("=")
    if name not in CRITERIA:
        raise InputError(f"stable-if is {text!r}; choose from {', '.join(CRITERIA)}, "
                         "with =X for another threshold")
    try:
        threshold = float(x or CRITERIA[name][0])
    except ValueError:
        threshold = math.nan
    if not math.isfinite(threshold):
        raise InputError(f"stable-if is {text!r}; the part behind = must be a number")
    return name, threshold


def cell_of(rows, curve, width, seeds):
    """lr (K,), losses, accuracies and validation (S, K), chance; LRs lacking a
    seed are left out."""
    found = {(row["lr"], row["seed"]): row for row in rows
             if curve_of(row) == curve and row["width"] == width and not row["failed"]}
    seeds = range(seeds)
    lrs = [lr for lr in sorted({lr for lr, _ in found})
           if all((lr, seed) in found for seed in seeds)]

    def column(name, diverged=math.nan):
        values = floats([[found[lr, seed][name] for lr in lrs] for seed in seeds])
        return np.where(np.isnan(values), diverged, values)

    return {
        "lr": np.array(lrs),
        "losses": column("final_train_loss", DIVERGED),
        "accuracies": column("train_accuracy", 0.0),
        "chance": found[lrs[0], 0]["chance_loss"] if lrs else math.nan,
        **{name: column(name) for name in train.VALIDATION},
    }


def stability(cell, criterion):
    """Which runs (S, K) are stable, told by their own seed's losses alone."""
    name, x = criterion
    losses = cell["losses"]
    best = losses.min(1, keepdims=True)
    limits = {"chance": x * cell["chance"], "best+1": best + x, "1.2x": x * best}
    stable = cell["accuracies"] > x if name == "accuracy" else losses < limits[name]
    return stable & (losses < DIVERGED)


def edges(losses, stable):
    """Of each seed the columns (largest stable LR, smallest unstable one),
    contiguous from its lowest loss up. (None, None): that is not stable;
    (last, None): nothing above is unstable. losses, stable (S, K)."""
    found = []
    for best, ok in zip(losses.argmin(1), stable):
        above = next((k for k in range(best, len(ok)) if not ok[k]), None)
        if above == best:
            found.append((None, None))
        else:
            found.append((len(ok) - 1 if above is None else above - 1, above))
    return found


class Parabola(NamedTuple):
    """y_s = a (x - vertex_s)² + c_s of S seeds over K columns."""
    a: float
    a_error: float          # standard errors: of a
    mean_error: float       # of the difference of two columns' means
    vertices: np.ndarray    # (S,)
    vertex_error: float     # of all vertices alike, due to a's
    freedom: int

    def curved(self, level):
        """Is the curvature above zero at this confidence?"""
        return self.a > metrics.t_quantile(level, self.freedom) * self.a_error

    def apart(self, difference, level):
        """Is a difference of two columns' means above zero?"""
        return difference > metrics.t_quantile(level, self.freedom) * self.mean_error


def shared_parabola(x, y):
    """Least squares, one curvature for all seeds; x (K,), y (S, K). None where
    that leaves no residuals."""
    seeds = len(y)
    freedom = y.size - 2 * seeds - 1
    if len(x) < 3 or freedom < 1:
        return None

    # y_s = mean_s + b_s line + a square
    line = x - x.mean()
    skew = (line ** 3).sum() / (line @ line)
    square = line ** 2 - (line ** 2).mean() - skew * line       # orthogonal to 1 and line
    b = y @ line / (line @ line)                                # (S,)
    a = (y @ square).mean() / (square @ square)
    residuals = y - y.mean(1, keepdims=True) - np.outer(b, line) - a * square
    noise = math.sqrt(np.square(residuals).sum() / freedom)
    a_error = noise / math.sqrt(seeds * (square @ square))

    # the slope b + a (2 line - skew) is zero at line = skew / 2 - b / 2a
    with np.errstate(divide="ignore", invalid="ignore"):        # no curvature: no vertex
        shifts = -b / (2 * a)
        vertex_error = abs(shifts.mean() / a) * a_error
    vertices = x.mean() + skew / 2 + shifts
    return Parabola(a, a_error, noise * math.sqrt(2 / seeds),
                    vertices, vertex_error, freedom)


def window(log_lr, losses, usable):
    """(first, last column, their shared parabola or None, open) around the lowest
    mean loss; losses (S, K).

    Widened over usable columns (K,), the nearer one first, until the curvature is
    certain, but beyond no mean that is certainly above the lowest. open: LRs
    below the first column are missing.
    """
    mean = losses.mean(0)
    fit = None
    best = first = last = int(mean.argmin())

    def ends(k):
        return fit and fit.apart(mean[k] - mean[best], CERTAIN)

    while not (fit and fit.curved(CERTAIN)):
        beside = [k for k, end in ((first - 1, first), (last + 1, last))
                  if 0 <= k < len(mean) and usable[k] and not ends(end)]
        if not beside:
            return first, last, fit, first == 0 and not ends(first)
        nearest = min(beside, key=lambda k: abs(log_lr[k] - log_lr[best]))
        first, last = min(first, nearest), max(last, nearest)
        fit = shared_parabola(log_lr[first:last + 1], losses[:, first:last + 1])
    return first, last, fit, False


def optimum(log_lr, losses, stable):
    """(log optimal LR (S,), width of the interval in which all may be off, is it
    the last stable LR?) of losses (S, K); nan where every LR had a divergence.

    Vertices of the parabola in `window`, off by its error and, as no curve is a
    parabola, by half a step. Without one each seed's own argmin: off by a step at
    a cliff, else by the range of LRs whose mean loss is not above the lowest.
    """
    mean = losses.mean(0)
    best = int(mean.argmin())
    own = log_lr[losses.argmin(1)]
    step = min(np.diff(log_lr), default=math.nan)
    if losses[:, best].max() >= DIVERGED:
        return np.full(len(losses), math.nan), math.nan, False

    first, last, fit, _ = window(log_lr, losses, stable.all(0))
    at_edge = best + 1 < len(log_lr) and not stable[:, best + 1].all()
    if (fit and fit.curved(CURVED)
            and log_lr[first] <= fit.vertices.mean() <= log_lr[last]):
        # sqrt(12): an even spread over this width has that standard error
        return (fit.vertices,
                math.hypot(step / 2, math.sqrt(12) * fit.vertex_error),
                at_edge)
    if at_edge:
        return own, step, at_edge
    low = [log_lr[k] for k in range(first, last + 1)
           if not (fit and fit.apart(mean[k] - mean[best], CURVED))]
    return own, max(step, np.ptp(low)), at_edge


def points_of(cell, criterion):
    """What `optimum` says of a cell, "optimal" (S,), "within" and "at_edge", and
    the log LRs (S,) of each seed's bracket, "stable" and "unstable", nan where
    there is none."""
    stable = stability(cell, criterion)
    log_lr = np.log(cell["lr"])
    optimal, within, at_edge = optimum(log_lr, cell["losses"], stable)
    below, above = np.array([[math.nan if k is None else log_lr[k] for k in pair]
                             for pair in edges(cell["losses"], stable)]).T
    return {"optimal": optimal, "within": within, "at_edge": at_edge,
            "stable": below, "unstable": above}


def exponent_of(widths, values, within, equal_noise=True):
    """(slope, [low, high], widths that count) of values (S, W), their logs known
    within intervals (W,).

    A width counts where all its values are finite and positive; nan below two.
    Interval, equal_noise: metrics.exponent_interval.
    """
    have = (np.isfinite(values) & (values > 0)).all(0)
    known = np.array(widths)[have], values[:, have]
    if len(set(known[0])) < 2:
        return math.nan, [math.nan, math.nan], len(known[0])
    interval = metrics.exponent_interval(*known, resolution=np.exp(within[have]),
                                         equal_noise=equal_noise)
    return metrics.fit_exponent(*known)[0], list(interval), len(known[0])


def exponents_of(points, widths):
    """{"optimal": ..., "max_stable": ...} as exponent_of, from the points of every
    width.

    A bracket counts by its middle, and the middles' mean over seeds is known
    within the mean bracket.
    """
    def column(name):
        return np.stack([point[name] for point in points], -1)              # (S, W) or (W,)
    gaps = column("unstable") - column("stable")
    middles = column("stable") + gaps / 2
    return {"optimal": exponent_of(widths, np.exp(column("optimal")), column("within")),
            "max_stable": exponent_of(widths, np.exp(middles), gaps.mean(0))}


# ---- the rows of summary.json ----

def shared_settings(rows):
    """What all rows have in common: SHOWN and what a prediction must know.
    InputError where they differ.

    depth: param.predict's hidden_layers, one more than hidden matrices. That is
    exact for an MLP; of other networks only counts whether there is any.
    """
    for name in train.SETTINGS:
        if any(name not in row for row in rows):
            raise InputError(f"the rows lack {name}: another version wrote them; "
                             "analyze them with that one, or use another --out")

    shared = {name: rows[0][name] for name in (*SHOWN, "trainable")}
    for name, value in shared.items():
        if any(row[name] != value for row in rows):
            values = " and ".join(sorted({repr(row[name]) for row in rows}))
            raise InputError(f"the rows have {name} = {values}; "
                             "analyze the rows of one sweep at a time")

    # a failed run has none
    networks = [row["network"] for row in rows if row.get("network")]
    first = networks[0] if networks else {"hidden_tensors": 2, "roles_given": False}
    return {**shared,
            "depth": 1 + first["hidden_tensors"],
            "roles_given": first["roles_given"],
            "uneven": any(network["uneven"] for network in networks)}


def asked_or_all(rows, curves=None, widths=None, seeds=None):
    """curves (tuples of CURVE), widths and seeds (how many): those asked for, else
    all there are."""
    if curves is None:
        curves = dict.fromkeys(map(curve_of, rows))
    if widths is None:
        widths = sorted({row["width"] for row in rows})
    if seeds is None:
        seeds = 1 + max(row["seed"] for row in rows)
    return list(map(tuple, curves)), widths, seeds


def summarize(rows, criterion="chance", curves=None, widths=None, seeds=None):
    """The rows of summary.json, one per curve, from result rows; the rest as in
    asked_or_all."""
    curves, widths, seeds = asked_or_all(rows, curves, widths, seeds)
    criterion = criterion_of(criterion)
    shared = shared_settings(rows)
    summary = []
    for curve in curves:
        cells = [cell_of(rows, curve, width, seeds) for width in widths]
        found = [(cell, width) for cell, width in zip(cells, widths) if len(cell["lr"])]
        if found:
            failed = {row["width"] for row in rows
                      if row["failed"] and curve_of(row) == curve}
            summary.append(summarize_curve(curve, *zip(*found), sorted(failed),
                                           criterion, shared))
    return summary


def local_slopes(widths, points):
    """Slopes (W - 1,) of the edge's log LR between widths, from mean brackets, and
    their standard deviations if an edge may lie anywhere in its bracket."""
    edge = [(point["stable"] + point["unstable"]).mean() / 2 for point in points]
    gap = np.array([(point["unstable"] - point["stable"]).mean() for point in points])
    ratio = np.diff(np.log(widths))
    return {"local_max_stable": (np.diff(edge) / ratio).tolist(),
            "local_resolution": (np.hypot(gap[1:], gap[:-1]) / math.sqrt(12)
                                 / ratio).tolist()}


def summarize_curve(curve, cells, widths, failed, criterion, shared):
    """A row of summary.json, from one cell per width; failed: widths that ran out
    of memory."""
    told = dict(zip(CURVE, curve))
    points = [points_of(cell, criterion) for cell in cells]
    fits = exponents_of(points, widths)
    bound = param.max_trainable_alpha(
        told["param"], told["optimizer"], told["loss"],
        shared["depth"], shared["trainable"])
    finished = [np.where(cell["losses"] < DIVERGED, cell["losses"], math.nan)
                for cell in cells]
    # a column (an LR) per width, by means over seeds
    best = [cell["losses"].mean(0).argmin() for cell in cells]
    most_accurate = [np.nan_to_num(cell["val_accuracy"]).mean(0).argmax() for cell in cells]

    def lrs(name):
        return [float(np.exp(point[name].mean())) for point in points]

    def values(name, columns):
        """[W][S], of one column per width."""
        return [cell[name][:, k].tolist() for cell, k in zip(cells, columns)]

    return finite({
        **{name: shared[name] for name in SHOWN},
        **told,
        "widths": list(widths),
        "optimal_lr": lrs("optimal"),
        "max_stable_lr": lrs("stable"),
        "min_unstable_lr": lrs("unstable"),
        "optimal_exponent": fits["optimal"][0],
        "optimal_interval": fits["optimal"][1],
        "max_stable_exponent": fits["max_stable"][0],
        "max_stable_interval": fits["max_stable"][1],
        "predicted_max_stable_exponent": told["alpha"] - bound,
        **local_slopes(widths, points),
        "optimum_at_edge": [point["at_edge"] for point in points],
        "best_train_accuracy": [float(cell["accuracies"].mean(0).max()) for cell in cells],
        "best_train_loss": [float(losses.mean(0)[k]) for losses, k in zip(finished, best)],
        "best_val_accuracy": values("val_accuracy", most_accurate),
        "at_optimum": {name: values(name, best) for name in train.VALIDATION},
        "chance_loss": cells[0]["chance"],
        "flags": (flags_of(points, fits, cells, widths, failed, criterion)
                  + assumptions(shared)),
        "curves": [{"lr": cell["lr"].tolist(), "train_loss": losses.tolist()}
                   for cell, losses in zip(cells, finished)],
    })


def assumptions(shared):
    """What the prediction takes for granted of a user's network, where that is in
    doubt."""
    said = []
    if train.is_own(shared) and shared["uneven"]:
        said.append("the prediction takes all dimensions that grow for "
                    "proportional to the width; here some grow otherwise")
    if shared["roles_given"]:
        said.append("the prediction takes the roles given for right")
    return said


def flags_of(points, fits, cells, widths, failed, criterion):
    """What a reader of the exponents must know."""
    flags = []
    if len(widths) == 1:
        flags.append("one width: no exponent")
    if len(cells[0]["losses"]) == 1:
        flags.append("one seed: the interval knows the scatter around the line only")
    flags += [f"width {width}: out of memory" for width in failed]
    for name, words in (("max_stable", "edge"), ("optimal", "optimum")):
        used = fits[name][2]
        if 0 < used < len(widths):
            flags.append(f"{words} from {used} of {len(widths)} widths")
    for point, cell, width in zip(points, cells, widths):
        flags += [f"width {width}: {words}"
                  for words in flags_of_cell(point, cell, criterion)]
    return flags


def flags_of_cell(point, cell, criterion):
    """Why a cell's optimum or edge is missing or uncertain, and what to do."""
    name, x = criterion
    lrs, losses = cell["lr"], cell["losses"]
    seeds, mean = len(losses), losses.mean(0)
    finished = losses < DIVERGED
    if not finished.any():
        return ["every run diverged; use lower --lrs"]
    if not finished.all(0).any():
        return [f"at every LR at least one of {seeds} seeds diverged; use lower --lrs"]

    flags = []
    if mean.argmin() in (0, len(lrs) - 1):
        flags.append("optimum at the grid's edge; widen --lr-range")
    missing = np.isnan(point["stable"]).sum()
    if missing:
        why, remedy = f" under {name}={x:g}", "another --stable-if"
        if name == "chance":
            why = (f": no loss below {x:g} x the constant predictor's "
                   f"{cell['chance']:.3g} (lowest mean {mean.min():.3g})")
            remedy = f"--stable-if chance={2 * x:g}"
        flags.append(f"no stable LR for {missing} of {seeds} seeds{why}; "
                     f"more --steps, or {remedy}")
    above = np.isnan(point["unstable"]).sum() - missing
    if above:
        flags.append(f"nothing unstable up to LR {lrs[-1]:.3g} "
                     f"for {above} of {seeds} seeds")
    bracket = (point["unstable"] - point["stable"]).mean()
    for words, within in (("the optimal LR", point["within"]), ("the edge", bracket)):
        if within > math.log(5):
            flags.append(f"{words} is known to a factor of {math.exp(within):.2g} only; "
                         "more --seeds, or LRs between")
    return flags


# ---- tracked runs ----

def summarize_tracks(rows, tracks, **asked):
    """{"updates": their exponents, "alignment": over the steps,
    "limit": distances to the widest network,
    "course": logits, hidden updates and loss over the steps},
    lists with entries for every curve and LR; asked: as in asked_or_all."""
    curves, widths, seeds = asked_or_all(rows, **asked)
    shared = shared_settings(rows)
    steps = sorted({step for _, step, _ in tracks})
    modules = {}                # of each run, in the network's order
    for row in sorted(tracks.values(), key=lambda row: row["layer"]):
        modules.setdefault(row["id"], {})[row["module"]] = row["role"]

    summary = {"updates": [], "alignment": [], "limit": [], "course": []}
    for curve, lr in itertools.product(curves, sorted({row["lr"] for row in rows})):
        ids = {(row["seed"], row["width"]): row["id"] for row in rows
               if curve_of(row) == curve and row["lr"] == lr}
        roles = next((modules[id] for id in ids.values() if id in modules), None)
        if roles is None:
            continue

        grid = [[ids.get((seed, width)) for width in widths] for seed in range(seeds)]

        def values(step, module, quantity):
            """[S][W] of one tracked quantity, None where a run has none."""
            return [[tracks.get((id, step, module), {}).get(quantity) for id in line]
                    for line in grid]

        told = dict(zip(CURVE, curve))
        softmax = values(shared["steps"], "", "softmax")
        distance = [[rms_distance(output, of_seed[-1]) for output in of_seed]
                    for of_seed in softmax]
        found = {
            "updates": update_exponents(values, told, widths, shared, roles),
            "alignment": alignment_course(values, roles, steps),
            "limit": [{"steps": shared["steps"], "values": distance}],
            "course": [{"steps": steps, **course(values, roles, steps)}],
        }
        for name, entries in found.items():
            summary[name] += [{**told, "lr": lr, "widths": list(widths), **entry}
                              for entry in entries]
    return finite(summary)


def rms_distance(outputs, others):
    return float(np.sqrt(np.mean((floats(outputs) - floats(others)) ** 2)))


def alignment_course(values, roles, steps):
    """Seed means [W][T] of both alignments of every module."""
    for layer, name in enumerate(filter(None, roles)):
        for kind in ("operator_update", "operator_propagating"):
            means = floats([values(step, name, kind)
                            for step in steps]).mean(1).T       # (W, T)
            if np.isnan(means).all() and layer == 0 and kind == "operator_update":
                return              # tracked without alignment
            yield {"layer": layer, "module": name, "kind": kind,
                   "steps": steps, "values": means.tolist()}


def course(values, roles, steps):
    """Geometric means over seeds, and over hidden layers, [W][T]."""
    hidden = [name for name, role in roles.items() if role == "hidden"]

    def means(modules, quantity):
        norms = floats([[values(step, module, quantity) for module in modules]
                        for step in steps])                 # (T, modules, S, W)
        return np.exp(np.log(norms).mean((1, 2))).T.tolist() if modules else []

    with np.errstate(divide="ignore", invalid="ignore"):
        return {"logits_change": means([""], "change"),
                "hidden_update": means(hidden, "effective"),
                "train_loss": means([""], "loss")}


def predicted_updates(curve, shared, step, roles):
    """[(kind, layer, predicted exponent)] of every module, and the prediction.

    Of a GPT by role: the residual stream carries every layer's change, but only
    the embedding's into the first block; a gain multiplies coordinates, as an
    input weight does; and the final norm caps what the readout sees.
    """
    predicted = param.predict(
        curve["param"], curve["optimizer"], curve["loss"], curve["alpha"],
        shared["depth"], shared["trainable"], step)
    names = [name for name in roles if name]
    effective, features = predicted.effective, predicted.features
    propagating = predicted.propagating
    if shared["model"] == "mlp":
        readout = propagating[-1]
        entries = [("effective", i, exponent) for i, exponent in enumerate(effective)]
        entries += [("propagating", i, exponent)
                    for i, exponent in enumerate(propagating, 1)]
        entries += [("features", i, exponent) for i, exponent in enumerate(features)]
    else:
        e = param.exponents(curve["param"], curve["optimizer"])     # (init, LR) by role
        readout = min(propagating[-1], 1 - e["output"][0])
        of_role = {
            "input": effective[0],
            "hidden": effective[1],
            "output": effective[-1],
            "vector": effective[0] + e["input"][1] - e["vector"][1],
        }
        handed_on = {
            "hidden": propagating[-2:][0],      # the last hidden matrix's, if any
            "output": readout,
            "vector": features[-1],
        }
        entries = [("effective", i, of_role[roles[name]]) for i, name in enumerate(names)]
        for i, name in enumerate(names):
            if roles[name] in handed_on:
                first = re.fullmatch(
                    r"blocks\.0\.(norm_attention|attention\.qkv|norm_mlp|up)", name)
                entries.append(("propagating", i,
                                features[0] if first else handed_on[roles[name]]))
    return [*entries, ("logits", len(names), max(effective[-1], readout))], predicted


def update_exponents(values, curve, widths, shared, roles):
    """Measured exponents, with intervals, beside predicted ones, at the first and
    the last step: effective and propagating updates of every module, the change
    of an MLP's features and of the logits."""
    names = [*filter(None, roles), ""]          # "" stands for the logits
    quantities = {"features": "input_change", "logits": "change"}
    for step in sorted({1, shared["steps"]}):
        entries, predicted = predicted_updates(curve, shared, step, roles)
        for kind, layer, exponent in entries:
            # a feature is the next module's input
            module = names[layer + (kind == "features")]
            norms = floats(values(step, module, quantities.get(kind, kind)))    # (S, W)
            slope, interval, _ = exponent_of(widths, norms, np.zeros(len(widths)),
                                             equal_noise=False)
            yield {
                "module": names[layer],
                "step": step,
                "kind": kind,
                "layer": layer,
                "values": norms.tolist(),
                "exponent": slope,
                "interval": interval,
                "predicted": exponent,
                "lower_bound": predicted.lower_bound,
                "regime": predicted.regime,
            }


# ---- tables ----

def namer(entries, always):
    """(head, name(entry)): columns of the settings that differ among entries, or
    are shown always."""
    head = {name: name for name in (*CURVE, "lr")
            if name in always or len({entry.get(name) for entry in entries}) > 1}
    sizes = {name: 2 + max(len(str(entry[name])) for entry in (head, *entries))
             for name in head}

    def name_of(entry):
        return "".join(str(entry[name]).ljust(size) for name, size in sizes.items())

    return name_of(head), name_of


def number(value, form, absent="-"):
    return absent if value is None else format(value, form)


def table(summary):
    """Predicted beside measured exponents, then the LRs behind them."""
    def measured(row, name):
        low, high = row[f"{name}_interval"]
        interval = "" if low is None else f" [{low:+.2f}, {high:+.2f}]"
        return number(row[f"{name}_exponent"], "+.2f") + interval

    # a line per curve: the exponents
    head, name_of = namer(summary, CURVE[:3])
    lines = ["Exponents of LR against width, with 95 % intervals", "",
             f"{head}{'predicted':>10}   {'max-stable':22}optimal"]
    for row in summary:
        predicted = number(row["predicted_max_stable_exponent"], "+.2f", "no bound")
        cliffs, count = sum(row["optimum_at_edge"]), len(row["widths"])
        cliffs = (f"  (the last stable LR at {cliffs} of {count} widths)"
                  if cliffs else "")
        lines.append(f"{name_of(row)}{predicted:>10}   "
                     f"{measured(row, 'max_stable'):22}"
                     f"{measured(row, 'optimal')}{cliffs}")

    # a line per curve and width: the LRs
    columns = {
        "optimal LR": "optimal_lr",
        "loss there": "best_train_loss",
        "stable up to": "max_stable_lr",
        "unstable from": "min_unstable_lr",
    }
    lines += ["", "  ".join([f"{head}{'width':>6}", *columns,
                             "slope from the width before"])]
    for row in summary:
        for i, width in enumerate(row["widths"]):
            cells = [number(row[key][i], ".3g").rjust(len(title))
                     for title, key in columns.items()]
            slope = row["local_max_stable"][i - 1] if i else None
            if slope is not None:
                cells.append(f"{slope:+.2f} ± {row['local_resolution'][i - 1]:.2f}")
            lines.append("  ".join([f"{name_of(row)}{width:6}", *cells]))

    chances = {row["loss"]: row["chance_loss"] for row in summary}
    unigram = (" (the tokens' unigram entropy)"
               if "ce" in chances and train.is_text(summary[0]) else "")
    chances = ", ".join(f"{loss} {value:.3g}" for loss, value in chances.items())
    lines += ["", f"A constant predictor's loss: {chances}{unigram}"]
    lines += [f"! {name_of(row).strip()}: {flag}"
              for row in summary for flag in row["flags"]]
    return "\n".join(lines)


def update_table(updates):
    """Exponents of effective updates, from input to readout, and of the logits'
    change."""
    def mean(entries, key, bound=""):
        values = [entry[key] for entry in entries if entry[key] is not None]
        return f"{bound}{sum(values) / len(values):+.2f}" if values else "-"

    def cell(entries):
        if not entries:
            return ""
        bound = "≥" if entries[0]["lower_bound"] else ""
        return f"{mean(entries, 'exponent')} ({mean(entries, 'predicted', bound)})"

    head, name_of = namer(updates, CURVE[:4])
    groups, kinds = {}, {}
    for entry in updates:
        if entry["kind"] in ("effective", "logits"):
            kind = (entry["module"].rpartition(".")[2] or "logits").rjust(13)
            group = groups.setdefault(f"{name_of(entry)}{entry['step']:<6}", {})
            group.setdefault(kind, []).append(entry)
            kinds[kind] = len(kind)

    lines = ["Exponents of effective updates ΔW x and of the logits' change "
             "against width: measured (predicted), means over tensors of a kind", "",
             f"{head}{'step':6}{'  '.join(kinds)}"]
    for name, of_kind in groups.items():
        if all(entry["exponent"] is None
               for entries in of_kind.values() for entry in entries):
            continue            # an LR that other widths did not run
        cells = [cell(of_kind.get(kind)).rjust(size) for kind, size in kinds.items()]
        lines.append((name + "  ".join(cells)).rstrip())
    return "\n".join(lines)


# ---- summary.json ----

def report(out, rows, tracks, stable_if, command, curves=None, widths=None, seeds=None):
    """Prints the tables of rows, and of tracks if any, and writes
    <out>/summary.json."""
    shared = shared_settings(rows)
    asked = {"curves": curves, "widths": widths, "seeds": seeds}
    summary = {
        "command": command,
        "stable_if": stable_if,
        "runs": len(rows),
        "seconds": round(sum(row["seconds"] for row in rows), 1),
        **{name: shared[name] for name in SHOWN},
        "rows": [],
        "asked": asked,
    }
    if len({row["lr"] for row in rows}) > 1:    # one LR alone has no optimum and no edge
        summary["rows"] = summarize(rows, stable_if, **asked)
        print(table(summary["rows"]) if summary["rows"] else "No results.")
    for curve in asked_or_all(rows, curves)[0]:
        if all(row["failed"] for row in rows if curve_of(row) == curve):
            print(f"! {' '.join(map(str, curve[:3]))}: every run was out of memory; "
                  "use smaller widths or batches")
    if tracks:
        summary.update(summarize_tracks(rows, tracks, **asked))
        print(update_table(summary["updates"]))
    write_json(Path(out) / "summary.json", summary)


def main():
    parser = train.Parser(
        description="The table and summary.json of a sweep again, from its rows alone.")
    parser.add_argument("out", type=Path, metavar="OUT", help="result folder of a sweep")
    parser.add_argument("--stable-if", metavar="NAME[=X]",
                        help=f"{criteria_help()} (default: as before)")
    args = parser.parse_args()

    rows = list(read_rows(args.out, mend=False).values())
    if not rows:
        raise InputError(f"{args.out} holds no runs*.jsonl with rows; "
                         "name the --out of a sweep")
    summary = args.out / "summary.json"
    try:
        before = dict(json.loads(summary.read_text())) if summary.exists() else {}
    except (ValueError, TypeError):
        raise InputError(f"{summary} is damaged; remove it: "
                         "the rows are enough to write it again") from None

    stable_if = args.stable_if or before.get("stable_if", "chance")
    criterion_of(stable_if)
    tracks = read_rows(args.out, "track*.jsonl", mend=False)
    command = before.get("command", " ".join(["python", *sys.argv]))
    report(args.out, rows, tracks, stable_if, command, **before.get("asked") or {})


if __name__ == "__main__":
    train.command_line(main)
