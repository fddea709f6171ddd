"""Optimal learning rate, stability edge and their width exponents, from the losses
of any learning-rate sweep (arXiv 2505.22491: Haas, Bordt, von Luxburg, Vankadara).

    S seeds   K learning rates, ascending   W widths
    stability edge   the largest stable learning rate; every seed has its own
    optimum          the learning rate of lowest loss
    exponent         p in LR ∝ width^p, so that -0.5 means n^-1/2

    widths = [64, 128, 256, 512]
    points = []
    for lr, losses in sweep:                    # lr (K,), losses (S, K), nan where diverged
        stable = stable_runs(losses, "chance", chance=0.69)             # bool (S, K)
        points.append(optimum_and_edge(lr, losses, stable))
    edge = exponents_of(widths, points)["max_stable"]
    print(edge.slope, edge.interval)            # with a 95 % interval
    print(at_width(4096, widths, points, predicted=-0.5)["recommended"])

Needs numpy only; can be copied alone. Out of scope: anything but power laws.
"""
import math
from functools import cache
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

CRITERIA = {    # name: (default threshold X, description)
    "chance":   (1.0, "loss below X times a constant predictor's"),
    "accuracy": (0.3, "train accuracy above X"),
    "best+1":   (1.0, "loss within X of the lowest at that width and seed"),
    "learned":  (0.5, "at most the share X of what was learned (constant predictor's loss "
                      "minus the lowest at that width and seed) is lost"),
}
# The loss of a diverged run, so that means over seeds stay numbers.
DIVERGED = 1e30
# The confidence at which a curvature is used, and at which the search for it ends.
CURVED, CERTAIN = 0.99, 0.9999


# ---- one width: which runs are stable, optimum and edge of every seed ----

def as_losses(losses):
    """Return the losses as floats, DIVERGED where one is None or not finite."""
    losses = np.array(losses, dtype=float)
    return np.where(np.isfinite(losses), losses, DIVERGED)


def stable_runs(losses, criterion="chance", x=None, chance=math.nan, accuracies=None):
    """Return which runs (S, K) are stable by a criterion of CRITERIA.

    A seed is judged by its own losses (S, K) alone, or by its accuracies (S, K). x is the
    threshold, by default the criterion's own; `chance` is the loss of the best constant
    predictor. KeyError for another criterion.
    """
    losses, x = as_losses(losses), CRITERIA[criterion][0] if x is None else x
    if criterion == "accuracy":
        stable = np.asarray(accuracies, dtype=float) > x
    elif criterion == "best+1":
        stable = losses < losses.min(1, keepdims=True) + x
    elif criterion == "learned":
        best = losses.min(1, keepdims=True)
        stable = losses < best + x * (chance - best)
    else:
        stable = losses < x * chance
    return stable & (losses < DIVERGED)


def edges(losses, stable):
    """Return for each seed the columns (largest stable LR, smallest unstable LR).

    The stable range is contiguous and begins at the seed's lowest loss. The pair
    is (None, None) if that is not stable, and (last, None) if nothing above it
    is unstable. losses, stable (S, K).
    """
    brackets = []
    for best, ok in zip(losses.argmin(1), stable):
        above = next((k for k in range(best, len(ok)) if not ok[k]), None)
        if above == best:
            brackets.append((None, None))
        else:
            brackets.append((len(ok) - 1 if above is None else above - 1, above))
    return brackets


class Parabola(NamedTuple):
    """y_s = a (x - vertex_s)² + c_s of S seeds over K columns."""
    a: float
    a_error: float          # standard error of a
    mean_error: float       # standard error of the difference of two columns' means
    vertices: np.ndarray    # (S,)
    vertex_error: float     # what the error of a does to all vertices together
    freedom: int

    def is_curved(self, level):
        """Whether the curvature is positive at this confidence."""
        return self.a > t_quantile(level, self.freedom) * self.a_error

    def clearly_positive(self, difference, level):
        """Whether a difference of two columns' means is positive at this confidence."""
        return difference > t_quantile(level, self.freedom) * self.mean_error


def shared_parabola(x, y):
    """Fit parabolas with one curvature for all seeds by least squares.

    x (K,), y (S, K). Returns a Parabola, or None where no residuals are left.
    """
    seeds, count = y.shape
    freedom = y.size - 2 * seeds - 1
    if count < 3 or freedom < 1:
        return None

    line = x - x.mean()
    skew = (line ** 3).sum() / (line @ line)
    square = line ** 2 - (line ** 2).mean() - skew * line       # orthogonal to 1 and line
    of_seed = np.kron(np.eye(seeds), np.column_stack([np.ones(count), line]))
    design = np.column_stack([of_seed, np.tile(square, seeds)])
    solution = np.linalg.lstsq(design, y.ravel(), rcond=None)[0]
    a, slopes = solution[-1], solution[1:-1:2]
    noise = math.sqrt(np.square(y.ravel() - design @ solution).sum() / freedom)
    a_error = noise / math.sqrt(seeds * (square @ square))

    # The slope of a seed's curve is slope + a (2 line - skew).
    with np.errstate(divide="ignore", invalid="ignore"):        # no curvature, no vertex
        shifts = -slopes / (2 * a)
        vertex_error = abs(shifts.mean() / a) * a_error
    return Parabola(a, a_error, noise * math.sqrt(2 / seeds),
                    x.mean() + skew / 2 + shifts, vertex_error, freedom)


def window(log_lr, losses, usable):
    """Choose the columns around the lowest mean loss to which a parabola is fitted.

    Starts at the lowest mean of losses (S, K) and widens over the usable columns
    (K,), the nearer neighbour first, until the curvature is certain. Ends also
    at a mean that is certainly above the lowest. Returns (first column, last
    column, Parabola or None, whether LRs below the first column are missing).
    """
    mean = losses.mean(0)
    fit = None
    best = first = last = int(mean.argmin())

    def ends_at(k):
        return fit and fit.clearly_positive(mean[k] - mean[best], CERTAIN)

    while not (fit and fit.is_curved(CERTAIN)):
        neighbours = [k for k, end in ((first - 1, first), (last + 1, last))
                      if 0 <= k < len(mean) and usable[k] and not ends_at(end)]
        if not neighbours:
            return first, last, fit, first == 0 and not ends_at(first)
        nearest = min(neighbours, key=lambda k: abs(log_lr[k] - log_lr[best]))
        first, last = min(first, nearest), max(last, nearest)
        fit = shared_parabola(log_lr[first:last + 1], losses[:, first:last + 1])
    return first, last, fit, False


class Point(NamedTuple):
    """Optimum and stability edge at one width, natural logs of learning rates."""
    optimal: np.ndarray     # (S,); nan where every LR had a divergence
    resolution: float       # how far grid and curvature leave the optimum open
    at_last_stable: bool    # whether some seed is unstable at the next LR
    stable: np.ndarray      # (S,) largest stable LR of each seed, nan where missing
    unstable: np.ndarray    # (S,) smallest unstable LR of each seed, nan where missing


def optimum_and_edge(lr, losses, stable):
    """Return the Point of one width; lr (K,), losses and stable (S, K)."""
    losses, log_lr = as_losses(losses), np.log(np.asarray(lr, dtype=float))
    brackets = [[math.nan if k is None else log_lr[k] for k in pair]
                for pair in edges(losses, stable)]
    return Point(*optimum(log_lr, losses, stable), *np.array(brackets).T)


def optimum(log_lr, losses, stable):
    """Return (log optimal LRs (S,), resolution, whether it is the last stable LR).

    The optima are the vertices of the parabola in `window`. Their resolution is
    the vertices' error and, as no loss is a parabola, half a grid step. Without
    a curvature every seed has its own argmin, known to a step where a cliff
    follows, else to the range of LRs whose mean is not clearly above the lowest.
    """
    mean = losses.mean(0)
    best = int(mean.argmin())
    argmins = log_lr[losses.argmin(1)]
    step = min(np.diff(log_lr), default=math.nan)
    if losses[:, best].max() >= DIVERGED:
        return np.full(len(losses), math.nan), math.nan, False

    # cliff (K,): LRs that are unstable for a seed that is stable at the lowest mean
    cliff = (stable[:, [best]] & ~stable).any(0)
    at_last_stable = bool(cliff[best + 1:best + 2].any())
    first, last, fit, _ = window(log_lr, losses, ~cliff & (losses < DIVERGED).all(0))
    if (fit and fit.is_curved(CURVED)
            and log_lr[first] <= fit.vertices.mean() <= log_lr[last]):
        # sqrt(12), since an even spread over a width of sqrt(12) has deviation 1
        resolution = math.hypot(step / 2, math.sqrt(12) * fit.vertex_error)
        return fit.vertices, resolution, at_last_stable
    if at_last_stable:
        return argmins, step, at_last_stable
    low = [log_lr[k] for k in range(first, last + 1)
           if not (fit and fit.clearly_positive(mean[k] - mean[best], CURVED))]
    return argmins, max(step, np.ptp(low)), at_last_stable


# ---- another width: optimum, edge and the learning rate to use ----

class Extrapolation(NamedTuple):
    """A learning rate at a width that was not swept, and its 95 % prediction interval."""
    lr: float
    low: float
    high: float


def at_width(width, widths, points, predicted=None):
    """Return {"optimal", "max_stable", "recommended"} at a width that was not swept.

    The first two are {"predicted": Extrapolation, "fitted": Extrapolation}, by the
    exponent that theory predicts (None: by the fitted one alone) and by the fitted
    one, from the Point of every swept width. The recommended learning rate is the
    lower of the two optima, but not above what a new seed survives: the lower end of
    the edge's interval, by the predicted exponent if there is one. That interval widens
    where the widths disagree with it. nan where an optimum or the edge is unknown.
    """
    optima, edges, resolution, gap = values_of(points)
    result = {}
    for kind, *values in (("optimal", optima, resolution), ("max_stable", edges, gap)):
        result[kind] = {"fitted": extrapolate(width, widths, *values)}
        if predicted is not None:
            result[kind]["predicted"] = extrapolate(width, widths, *values, predicted)
    edge = result["max_stable"]
    bounds = [edge.get("predicted", edge["fitted"]).low,
              *(extrapolation.lr for extrapolation in result["optimal"].values())]
    return {**result, "recommended": float(np.min(bounds))}     # nan if one is


def extrapolate(width, widths, values, log_resolution, exponent=None, level=0.95):
    """Return the Extrapolation of values (S, W) to a width, for what a new seed there shows.

    A line through the means of logs, of the given exponent or a fitted one, weights
    the widths by c_w. The interval is Student's t on the variance
    max(v, step² / 12) + v max(1, sum_w c_w²) / S + sum_w c_w² step_w² / 12: a new
    seed's and the fit's. v: variance of the seeds at a width, of W (S - 1) degrees, or
    that of all residuals from the line where it is larger. Values are known to
    log_resolution (W,), whose mean stands for the step at the new width.
    """
    used = usable(values)
    if used.sum() < 2:
        return Extrapolation(math.nan, math.nan, math.nan)
    log_n, logs = _logs(np.asarray(widths)[used], values[:, used])
    seeds, count = logs.shape
    weights, distance = np.full(count, 1 / count), math.log(width) - log_n.mean()
    if exponent is None:
        slope_weights = _slope_weights(log_n)
        weights, exponent = weights + distance * slope_weights, slope_weights @ logs.mean(0)
        free = logs.size - 2
    else:
        free = logs.size - 1
    middle = logs.mean() + exponent * distance

    residuals = logs - logs.mean() - exponent * (log_n - log_n.mean())
    variance, freedom = (residuals ** 2).sum() / max(free, 1), free
    if seeds > 1 and logs.var(0, ddof=1).mean() >= variance:
        variance, freedom = logs.var(0, ddof=1).mean(), count * (seeds - 1)
    steps = log_resolution[used]
    total = (max(variance, np.mean(steps) ** 2 / 12)
             + variance * max(1.0, weights @ weights) / seeds + weights ** 2 @ steps ** 2 / 12)
    half = t_quantile((1 + level) / 2, max(freedom, 1)) * math.sqrt(total)
    return Extrapolation(*(math.exp(middle + offset) for offset in (0, -half, half)))


# Rules for the learning rate at a width that was left out.
RULES = ("same rate", "n^-1", "predicted exponent", "fitted exponent", "recommended")


def left_out(widths, points, curves, count, predicted=None):
    """Yield how each of RULES, read off the narrower widths, does at the `count` widest ones.

    A dict per width and rule: "stable", below the edge of every seed there, and
    "loss_above_best", the seeds' mean loss at that rate, interpolated in log LR,
    relative to the lowest one there. points, curves {"lr": (K,), "train_loss": (S, K)}
    of every width; the first two rules start from the widest known optimum.
    """
    known = np.flatnonzero(np.isfinite([point.optimal.mean() for point in points[:-count]]))
    if len(known) < 2:
        return
    start = math.exp(points[known[-1]].optimal.mean())
    for width, point, curve in list(zip(widths, points, curves))[-count:]:
        at = at_width(width, widths[:-count], points[:-count], predicted)
        rates = {"same rate": start, "n^-1": start * widths[known[-1]] / width,
                 "recommended": at["recommended"],
                 **{f"{how} exponent": rate.lr for how, rate in at["optimal"].items()}}
        # Where nothing is unstable, the whole grid is stable.
        edge = np.exp(np.where(np.isnan(point.unstable), point.stable,
                               (point.stable + point.unstable) / 2))        # (S,)
        losses = np.array(curve["train_loss"], dtype=float).mean(0)     # nan: a seed diverged
        finite = np.isfinite(losses)
        log_lr, losses = np.log(curve["lr"])[finite], losses[finite]
        for rule in RULES:
            if rule in rates:
                lr = rates[rule]
                loss = np.interp(math.log(lr), log_lr, losses) if len(losses) else math.nan
                yield {"width": width, "rule": rule, "lr": lr, "stable": bool((lr < edge).all()),
                       "loss_above_best": float(loss / losses.min(initial=math.inf) - 1)}


# ---- all widths: exponents with intervals ----

class Exponent(NamedTuple):
    """The width exponent of a quantity."""
    slope: float            # nan below two usable widths
    interval: tuple         # (low, high), 95 %
    widths_used: int        # widths at which every seed has a value


def exponents_of(widths, points):
    """Return the Exponents {"optimal", "max_stable"} from the Point of every width."""
    optimal, edge, resolution, gap = values_of(points)
    return {"optimal": exponent_of(widths, optimal, resolution),
            "max_stable": exponent_of(widths, edge, gap)}


def values_of(points):
    """Return optimal LRs and edges (S, W) with the sizes (W,) to which their logs are known.

    A seed's edge is the middle of its bracket, known to the bracket's size.
    """
    optimal, stable, unstable = (np.stack([getattr(point, name) for point in points], -1)
                                 for name in ("optimal", "stable", "unstable"))  # (S, W)
    return (np.exp(optimal), np.exp((stable + unstable) / 2),
            np.array([point.resolution for point in points]), (unstable - stable).mean(0))


def usable(values):
    """Return at which widths (W,) the values of all seeds (S, W) are finite and positive."""
    with np.errstate(invalid="ignore"):
        return (np.isfinite(values) & (values > 0)).all(0)


def exponent_of(widths, values, log_resolution, equal_noise=True):
    """Return the Exponent of values (S, W), whose logs are known to log_resolution (W,).

    A width counts where the values of all seeds are finite and positive.
    """
    used = usable(values)
    widths, values = np.asarray(widths)[used], values[:, used]
    if len(set(widths)) < 2:
        return Exponent(math.nan, (math.nan, math.nan), len(widths))
    interval = exponent_interval(widths, values, resolution=np.exp(log_resolution[used]),
                                 equal_noise=equal_noise)
    return Exponent(fit_exponent(widths, values)[0], interval, len(widths))


def fit_exponent(widths, values):
    """Return (slope, intercept) of the least-squares line of log values on log widths.

    The fit is exp(intercept) * widths**slope. values (W,), or (S, W) for S seeds,
    whose mean log is fitted. ValueError for values that are not finite and
    positive, and for fewer than two distinct widths.
    """
    log_n, logs = _logs(widths, values)
    slope = _slope_weights(log_n) @ logs.mean(0)
    return float(slope), float(logs.mean() - slope * log_n.mean())


def exponent_interval(widths, values, level=0.95, resolution=1.0, equal_noise=False):
    """Return the interval (low, high) of fit_exponent's slope for values (S, W).

    Student's t on the variance of slope = sum_w c_w mean_w, which is
    sum_w c_w² (s_w² / S + log(resolution_w)² / 12).

    s_w²: variance at a width, of residuals from the means of width and seed; what
    a seed does at every width alike does not count. Degrees of freedom are those
    of Welch and Satterthwaite, as widths may not be equally noisy. With
    equal_noise all widths share one variance of (S-1)(W-1) degrees, which is
    narrower where seeds are few. One seed: residuals from the line, W-2 degrees.
    (nan, nan) where no degree is left and the values are exact.
    resolution: factor between neighbours of the values' grid, a number or (W,).
    """
    log_n, logs = _logs(widths, values)
    weights, mean = _slope_weights(log_n), logs.mean(0)
    seeds, count = logs.shape
    slope = float(weights @ mean)
    if seeds == 1:
        most = count - 2
        residuals = logs - mean.mean() - slope * (log_n - log_n.mean())
        variances = np.full(count, np.square(residuals).sum() / max(most, 1))
    else:
        most = (seeds - 1) * (count - 1)
        residuals = logs - mean - logs.mean(1, keepdims=True) + logs.mean()
        # each width has its share of the (S-1)(W-1) degrees
        variances = np.square(residuals).sum(0) / ((seeds - 1) * (1 - 1 / count))
    if equal_noise:
        variances = np.full(count, variances.mean())

    noise = weights ** 2 * variances / seeds
    step = np.log(np.asarray(resolution, dtype=float))
    variance = (noise + weights ** 2 * step ** 2 / 12).sum()
    if most < 1 and not step.any():
        return math.nan, math.nan

    freedom = most if most > 0 else math.inf
    if seeds > 1 and not equal_noise and noise.any():       # Welch and Satterthwaite
        freedom = min(most, (seeds - 1) * noise.sum() ** 2 / (noise ** 2).sum())
    half = t_quantile((1 + level) / 2, float(freedom)) * math.sqrt(variance)
    return float(slope - half), float(slope + half)


def verdict(predicted, interval, up_to=None):
    """Return "held", "missed" or "undecided"; None without prediction or interval.

    up_to: the upper end of a predicted range.
    """
    low, high = interval
    if not math.isfinite(predicted) or not math.isfinite(high - low):
        return None
    if high < predicted or low > (predicted if up_to is None else up_to):
        return "missed"
    return "held" if high - low <= 0.5 else "undecided"


def local_slopes(widths, points):
    """Return {"local_max_stable": the slopes (W - 1,) of the edge's log LR between neighbouring
    widths, "local_resolution": their deviations if an edge lies anywhere in its bracket}."""
    edge = [(point.stable + point.unstable).mean() / 2 for point in points]
    gap = np.array([(point.unstable - point.stable).mean() for point in points])
    ratio = np.diff(np.log(widths))
    deviation = np.hypot(gap[1:], gap[:-1]) / math.sqrt(12) / ratio
    return {"local_max_stable": (np.diff(edge) / ratio).tolist(),
            "local_resolution": deviation.tolist()}


def relative_spread(matrices):
    """Return the spread (W,) of symmetric matrices over S seeds, the root mean square of
    |K_s - mean| / |mean| in Frobenius norm; matrices (S, W, N (N + 1) / 2), upper triangles."""
    size = math.isqrt(2 * matrices.shape[-1])
    # An entry beside the diagonal stands for two.
    weight = (2 - np.eye(size))[np.triu_indices(size)]
    mean = matrices.mean(0)
    squares = ((matrices - mean) ** 2 @ weight).sum(0) / (len(matrices) - 1)
    return np.sqrt(squares / (mean ** 2 @ weight))


@cache
def t_quantile(probability, freedom):
    """Return a quantile of Student's t above the median, to 1e-4 relative.

    Integrates the density of the angle θ = atan(t / sqrt(freedom)), which is
    proportional to cos(θ)^(freedom - 1).
    """
    if math.isinf(freedom):
        return NormalDist().inv_cdf(probability)
    angles = np.linspace(0, math.pi / 2, 20_001)
    density = np.cos(angles).clip(0) ** (freedom - 1)
    mass = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    angle = np.interp((2 * probability - 1) * mass[-1], mass, angles)
    return math.sqrt(freedom) * math.tan(angle)


def _logs(widths, values):
    """Return natural logs of widths (W,) and values (S, W), checked, in float64."""
    widths = np.asarray(widths, dtype=float)
    values = np.atleast_2d(np.asarray(values, dtype=float))
    if values.ndim != 2 or widths.shape != values.shape[1:] or len(values) == 0:
        raise ValueError(f"widths {widths.shape} and values {values.shape} do not match; "
                         "pass (W,) and (W,) or (S, W)")
    for name, array in (("widths", widths), ("values", values)):
        bad = array[~(np.isfinite(array) & (array > 0))].tolist()
        if bad:
            raise ValueError(f"{name} must be finite and positive, not {bad}; "
                             "leave those out")
    if len(set(widths.tolist())) < 2:
        raise ValueError("an exponent needs at least two distinct widths, "
                         f"not {widths.tolist()}")
    return np.log(widths), np.log(values)


def _slope_weights(log_n):
    """Return the weights (W,) of which slope = weights @ logs."""
    centred = log_n - log_n.mean()
    return centred / (centred @ centred)
