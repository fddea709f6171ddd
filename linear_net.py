"""The two-layer linear net of arXiv 2505.22491, Appendix C, in closed form at any width.

    f = x uᵀv    u, v (n,) trained by gradient descent on (f - y)²/2 of one sample (x, y)
    n, n0, m     width, base width, n / n0
    χ = f - y    derivative of the loss
    λ, "ntk"     tangent kernel x²(k_u ‖v‖² + k_v ‖u‖²); k_u, k_v are the LRs' width factors
    a, g, P      1 - lr * weight decay, lr * χ, x² k_u k_v

One step, with the old f and λ on the right, is exactly

    f' = (a² + P g²) f - a g λ          λ' = (a² + P g²) λ - 4 a g P f

for all parameterizations at once, so f and λ stand for all 2n weights.

    python linear_net.py    # largest stable LR, distance to the limit, loss decrease
    path = linear_net(4096, lr=0.1, steps=100,
                      parameterization="mup")       # path.loss (101,)

Needs torch and numpy; can be copied alone. Out of scope: several samples, other losses.
"""
import argparse
import json
import math
import sys
import time
from collections import namedtuple
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch

# Readout std ∝ m^-b, LR of u ∝ m^-c_in, LR of v ∝ m^-c_out.
LINEAR_NET = {                      # (b, c_in, c_out)
    "sp":                          (0.5, 0.0, 0.0),
    "ntp":                         (0.5, 0.0, 1.0),
    "mup":                         (1.0, -1.0, 1.0),
    "sp_full_align":               (0.5, -0.5, 1.0),
    "sp_full_align_large_readout": (0.5, -0.5, 0.5),
}
LinearNet = namedtuple("LinearNet", "f ntk loss diverged_at")


def width_exponents(parameterization, alpha=0.0):
    """Exponents of m in the initial f, k_u ‖v‖², k_v ‖u‖² and P;
    ValueError on an unknown name.
    """
    if parameterization not in LINEAR_NET:
        raise ValueError(f"unknown parameterization {parameterization!r}; "
                         f"choose from {', '.join(LINEAR_NET)}")
    b, c_in, c_out = LINEAR_NET[parameterization]
    return (0.5 - b, 1 - 2 * b - c_in - alpha, 1 - c_out - alpha,
            -c_in - c_out - 2 * alpha)


def linear_net(width, lr, steps, parameterization, seed=0, alpha=0.0,
               base_width=1, x=1.0, y=1.0, weight_decay=0.0, schedule=None,
               label_noise=0.0, f0=None):
    """The trajectory, in float64 on the CPU.

    lr (at base_width, times m^-alpha), seed and weight_decay broadcast to a
    shape (...). schedule(step) multiplies the LR, from step 0; lr *
    weight_decay does not change with width. label_noise: standard deviation of
    noise added to y anew at every step. f0 replaces the initial f that seed
    draws. Returns

        f, ntk, loss   (steps + 1, ...): before every step and after the last;
                       nan once diverged
        diverged_at    (...): first step whose loss, without noise, is not
                       finite; -1 if none

    At base_width 1, ntk is the paper's λ for ntp, mup, and sp with alpha = 1.
    width = math.inf is the limit: f ~ N(0, x²) or 0 at first, a fixed ntk
    unless P > 0. ValueError where there is none (sp needs alpha >= 1), or on an
    unknown name.
    """
    powers = width_exponents(parameterization, alpha)
    if width == math.inf and max(powers) > 0:
        least = alpha + max(powers[1], powers[2], powers[3] / 2)
        raise ValueError(f"{parameterization} with alpha = {alpha:g} "
                         f"has no infinite-width limit; use alpha >= {least:g}")
    size_f, size_v, size_u, size_p = (
        float(width / base_width) ** power for power in powers)
    p = x * x * size_p

    exact = partial(torch.as_tensor, dtype=torch.float64)
    lr, decay, seed = torch.broadcast_tensors(
        exact(lr), exact(weight_decay), torch.as_tensor(seed))
    seeds, of_seed = seed.unique(return_inverse=True)
    drawn = torch.stack([draw(width, s, steps) for s in seeds.tolist()], dim=-1)
    overlap, u2, v2, *noise = drawn[:, of_seed]     # (...) each

    chi = torch.full((steps + 1, *lr.shape), math.nan, dtype=torch.float64)
    ntk = chi.clone()
    chi[0] = (x * size_f * overlap if f0 is None else exact(f0)) - y
    ntk[0] = x * x * (size_v * v2 + base_width * size_u * u2)
    # χ is the state: f, rounded, would rest at an unstable y
    for step in range(steps):
        error, kernel = chi[step], ntk[step]
        now = lr if schedule is None else lr * schedule(step)
        a = 1 - now * decay
        g = now * (error - label_noise * noise[step] if label_noise else error)
        square, pg = a * a, p * g
        pgf = pg * (error + y)
        chi[step + 1] = (square * error - (1 - square) * y
                         + g * (pgf - a * kernel))      # f' - y
        ntk[step + 1] = (square + pg * g) * kernel - 4 * a * pgf

    loss = chi.square() / 2
    bad = (~loss.isfinite()).cumsum(0) > 0
    diverged_at = torch.where(bad[-1], bad.int().argmax(0), -1)
    f, ntk, loss = (values.masked_fill(bad, math.nan) for values in (chi + y, ntk, loss))
    return LinearNet(f, ntk, loss, diverged_at)


@lru_cache(maxsize=512)     # the only cost that grows with width
def draw(width, seed, steps):
    """(3 + steps,): uᵀv / √n, ‖u‖² / n, ‖v‖² / n of u, v ~ N(0, I);
    every step's N(0, 1).
    """
    generator = torch.Generator().manual_seed(seed)
    normal = partial(torch.randn, generator=generator, dtype=torch.float64)
    if width == math.inf:       # uᵀv / √n ~ N(0, 1); both norms are 1
        return torch.cat([normal(1), torch.ones(2, dtype=torch.float64), normal(steps)])
    u, v = normal(width), normal(width)
    start = torch.stack([u @ v / math.sqrt(width), u @ u / width, v @ v / width])
    return torch.cat([start, normal(steps)])


# ---- exponents with intervals ----

def t_quantile(freedom, level=0.95):
    """t with P(|T| < t) = level for Student's T, to 1e-4 relative, from the
    density ∝ cos(θ)^(freedom - 1) of the angle θ = atan(T / √freedom).
    """
    edges = np.linspace(0, math.pi / 2, 10_001)
    middles = (edges[1:] + edges[:-1]) / 2
    mass = np.cumsum(np.cos(middles) ** (freedom - 1))
    angle = np.interp(level, mass / mass[-1], edges[1:])
    return math.sqrt(freedom) * math.tan(angle)


def fit_exponent(widths, logs, step=0.0):
    """(slope, [low, high]) of logs (S, W), of S seeds, against log width;
    95 % interval.

    Least squares on the means over seeds: slope = Σ w mean has variance
    (s²/S + step²/12) Σ w². s²: variance over seeds, pooled within widths;
    step: spacing of the logs' grid; W (S - 1) degrees of freedom. nan where
    there is none.
    """
    seeds, count = logs.shape
    slope, none = math.nan, [math.nan, math.nan]
    if count < 2:
        return slope, none

    centred = np.log(widths) - np.log(widths).mean()
    weights = centred / (centred ** 2).sum()
    slope = float(weights @ logs.mean(0))
    if seeds < 2:
        return slope, none

    variance = logs.var(0, ddof=1).mean() / seeds + step ** 2 / 12
    error = math.sqrt(variance * (weights ** 2).sum())
    half = t_quantile(count * (seeds - 1)) * error
    return slope, [slope - half, slope + half]


# ---- measurements: the entries of summary.json ----

BASE_WIDTH = 64                                 # of the warmup; SP's LR has none
LRS = [2 ** (k / 2) for k in range(-44, 5)]     # (K,)
WARMUPS = [(0, 0.0), (32, 0.0), (32, 0.5)]      # (steps at the base width, exponent in m)
ONE_STEP = [("sp", 0.5), ("sp", 1.0), ("sp", 1.5), ("ntp", 0.0)]    # with alpha
TIMES = 1, 4, 16                                # steps before each distance


def ntk_exponent(parameterization, alpha=0.0):
    """Exponent of m in λ. A minimum is stable up to lr = 2 / λ."""
    return max(width_exponents(parameterization, alpha)[1:3])


def bracket(width, steps, seeds, label_noise, warmup):
    """Logs (S,) of the largest stable LR below the first unstable one,
    and (S,) of that one.

    nan beyond LRS. Only divergence is unstable: a late catapult raises the loss
    for a while.
    """
    def schedule(step):
        return min(1.0, (step + 1) / max(1, warmup))

    lrs = torch.tensor(LRS, dtype=torch.float64)[:, None]
    path = linear_net(width, lrs, steps, "sp", torch.arange(seeds),
                      schedule=schedule, label_noise=label_noise)
    # how many LRs are stable below the first unstable one
    first = (path.diverged_at < 0).int().cumprod(0).sum(0).numpy()      # (S,)
    padded = np.array([math.nan, *np.log(LRS), math.nan])
    return padded[first], padded[first + 1]


def stability_edge(widths, steps, seeds, label_noise, warmup, exponent):
    """Largest stable LR of SP against width,
    after warmup * m^exponent steps of linear warmup.

    With noise, χ grows as soon as lr λ > 2 and λ falls while the LR rises: the
    LR's growth per step stays bounded. Without noise χ is too small by then,
    and the LR itself counts.
    """
    growth = exponent if label_noise else 0.0
    flags, brackets = [], []
    for width in widths:
        longest = round(warmup * (width / BASE_WIDTH) ** exponent)
        if longest > steps:
            flags.append(f"width {width}: {longest} warmup steps, "
                         f"but {steps} steps in all")
        brackets.append(bracket(width, steps, seeds, label_noise, longest))
        if np.isnan(brackets[-1]).any():
            flags.append(f"width {width}: no edge "
                         f"from LR {LRS[0]:.3g} to {LRS[-1]:.3g}, "
                         "left out of the fit")

    stable, unstable = np.array(brackets).transpose(1, 2, 0)    # (S, W) each
    middle = (stable + unstable) / 2
    found = np.isfinite(middle).all(0)
    step = math.log(LRS[1] / LRS[0])
    slope, interval = fit_exponent(np.array(widths)[found], middle[:, found], step)

    if math.isnan(slope):
        flags.append("fewer than two widths: no exponent")
    elif seeds < 2:
        flags.append("one seed: no interval")
    return {"param": "sp", "warmup": warmup, "warmup_exponent": exponent,
            "base_width": BASE_WIDTH, "widths": widths,
            "max_stable_lr": np.exp(stable.mean(0)).tolist(),
            "min_unstable_lr": np.exp(unstable.mean(0)).tolist(),
            "exponent": slope, "interval": interval,
            "predicted": min(0.0, growth - ntk_exponent("sp")), "flags": flags}


def with_exponent(entry, widths, values, predicted):
    """The entry, with values, a list over widths of (S,), and their exponent."""
    values = torch.stack(values, dim=-1).numpy()    # (S, W)
    slope, interval = fit_exponent(widths, np.log(values))
    return {**entry, "widths": widths, "values": values.tolist(),
            "exponent": slope, "interval": interval, "predicted": predicted}


def distances(widths, parameterization, seeds=32, lr=0.1):
    """Entries of |f - its infinite-width limit from the same initial f|
    (from 0 for mup).
    """
    every, paths = torch.arange(seeds), []
    for width in widths:
        f = linear_net(width, lr, max(TIMES), parameterization, every).f
        start = 0.0 if parameterization == "mup" else f[0]
        limit = linear_net(math.inf, lr, max(TIMES), parameterization, every, f0=start).f
        paths.append((f - limit).abs())     # (steps + 1, S)
    return [with_exponent({"param": parameterization, "step": step}, widths,
                          [path[step] for path in paths], predicted=-0.5) for step in TIMES]


def one_step(widths, parameterization, alpha, seeds=32, lr=0.5):
    """Entry of |loss decrease| after one step (Proposition C.3)."""
    every, decreases = torch.arange(seeds), []
    for width in widths:
        before, after = linear_net(width, lr, 1, parameterization, every, alpha).loss
        decreases.append((after - before).abs())
    change = ntk_exponent(parameterization, alpha)
    predicted = max(change, 2 * change)     # f² where f diverges
    return with_exponent({"param": parameterization, "alpha": alpha}, widths,
                         decreases, predicted)


def measure(widths, steps, seeds, label_noise):
    """Yields (kind, entry)."""
    for warmup in WARMUPS:
        yield "edges", stability_edge(widths, steps, seeds, label_noise, *warmup)
    for parameterization in ("mup", "ntp"):
        for entry in distances(widths, parameterization):
            yield "distance", entry
    for parameterization, alpha in ONE_STEP:
        yield "one_step", one_step(widths, parameterization, alpha)


# ---- command line ----

def table_row(kind, entry):
    name = f"{kind:10}{entry['param']}"
    for key in ("warmup", "warmup_exponent", "step", "alpha"):
        if key in entry:
            name += f", {key} {entry[key]:g}"
    slope, (low, high) = entry["exponent"], entry["interval"]
    found = "-" if math.isnan(slope) else f"{slope:+.2f}"
    if not math.isnan(low):
        found += f" [{low:+.2f}, {high:+.2f}]"
    flags = [f"! {flag}" for flag in entry.get("flags", [])]
    return "\n".join([f"{name:48}{entry['predicted']:+9.2f}   {found}", *flags])


def write_json(path, value):
    """Strict JSON, null for numbers that are not finite; whole or not at all."""
    value = json.loads(json.dumps(value), parse_constant=lambda name: None)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(json.dumps(value, indent=1) + "\n")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")
    add = parser.add_argument
    add("--widths", type=int, nargs="+", default=[4 ** k for k in range(3, 11)],
        help="default 4^3 to 4^10")
    add("--steps", type=int, default=5000, help="at the stability edge; default 5000")
    add("--seeds", type=int, default=4,
        help="at the stability edge, 32 elsewhere; default 4")
    add("--label-noise", type=float, default=0.01,
        help="standard deviation, at the stability edge; default 0.01")
    add("--out", type=Path, default=Path("out/linear_net"), help="default out/linear_net")
    args = parser.parse_args(arguments)

    for width in args.widths:
        if not 1 <= width <= 2 ** 26:       # u and v are drawn: 1 GB
            parser.error(f"--widths {width}: choose from 1 to 2^26")
    if (args.steps < 1 or args.seeds < 1
            or args.steps * args.seeds > 10 ** 6):      # 4 GB
        parser.error(f"--steps {args.steps} --seeds {args.seeds}: "
                     "choose from 1 up, with a product of at most 10^6")
    if not 0 <= args.label_noise < math.inf:
        parser.error(f"--label-noise {args.label_noise}: "
                     "choose a finite number from 0 up")
    return parser, args


def main(arguments=None):
    parser, args = parse(arguments)
    begin, found = time.perf_counter(), {}
    widths = sorted(set(args.widths))
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        print(f"{'Exponents against width':48}predicted   measured, 95 % interval")
        for kind, entry in measure(widths, args.steps, args.seeds, args.label_noise):
            found.setdefault(kind, []).append(entry)
            print(table_row(kind, entry), flush=True)
        write_json(args.out / "summary.json", {
            "command": " ".join(["python", *sys.argv]),
            "seconds": round(time.perf_counter() - begin, 1), "linear_net": found})
    except OSError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, "\ninterrupted; nothing was written\n")
    print(f"\npython plots.py {args.out}")


if __name__ == "__main__":
    main()
