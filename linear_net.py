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

Out of scope: several samples, other losses.
"""
import math
import sys
import time
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import config
import data
import estimate
import param


class Trajectory(NamedTuple):
    f: torch.Tensor             # (steps + 1, ...)
    ntk: torch.Tensor
    loss: torch.Tensor
    diverged_at: torch.Tensor   # (...)


def width_exponents(parameterization, alpha=0.0):
    """Return the exponents of m in the initial f, k_u ‖v‖², k_v ‖u‖² and P.

    u is the input layer and v the readout of param.PARAMETERIZATIONS, under SGD.
    ValueError for an unknown name.
    """
    e = param.exponents(parameterization, "sgd", alpha)
    b, c_in, c_out = e["output"][0], e["input"][1], e["output"][1]
    return 0.5 - b, 1 - 2 * b - c_in, 1 - c_out, -c_in - c_out


def linear_net(width, lr, steps, parameterization, seed=0, alpha=0.0,
               base_width=1, x=1.0, y=1.0, weight_decay=0.0, schedule=None,
               label_noise=0.0, f0=None):
    """Return the Trajectory, in float64 on the CPU.

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
    draws = torch.stack([draw(width, s, steps) for s in seeds.tolist()], dim=-1)
    overlap, u2, v2, *noise = draws[:, of_seed]     # (...) each

    chi = torch.full((steps + 1, *lr.shape), math.nan, dtype=torch.float64)
    ntk = chi.clone()
    chi[0] = (x * size_f * overlap if f0 is None else exact(f0)) - y
    ntk[0] = x * x * (size_v * v2 + base_width * size_u * u2)
    # Iterate the error χ, not f: near y, f loses the digits of χ and would look converged.
    for step in range(steps):
        error, kernel = chi[step], ntk[step]
        step_lr = lr if schedule is None else lr * schedule(step)
        a = 1 - step_lr * decay
        g = step_lr * (error - label_noise * noise[step] if label_noise else error)
        square, pg = a * a, p * g
        pgf = pg * (error + y)
        chi[step + 1] = (square * error - (1 - square) * y
                         + g * (pgf - a * kernel))      # f' - y
        ntk[step + 1] = (square + pg * g) * kernel - 4 * a * pgf

    loss = chi.square() / 2
    diverged = (~loss.isfinite()).cumsum(0) > 0     # (steps + 1, ...)
    diverged_at = torch.where(diverged[-1], diverged.int().argmax(0), -1)
    f, ntk, loss = (values.masked_fill(diverged, math.nan) for values in (chi + y, ntk, loss))
    return Trajectory(f, ntk, loss, diverged_at)


@lru_cache(maxsize=512)     # the only cost that grows with width
def draw(width, seed, steps):
    """Return (3 + steps,): uᵀv / √n, ‖u‖² / n, ‖v‖² / n of u, v ~ N(0, I), and
    every step's N(0, 1).
    """
    generator = torch.Generator().manual_seed(seed)
    normal = partial(torch.randn, generator=generator, dtype=torch.float64)
    if width == math.inf:       # uᵀv / √n ~ N(0, 1); both norms are 1
        return torch.cat([normal(1), torch.ones(2, dtype=torch.float64), normal(steps)])
    u, v = normal(width), normal(width)
    start = torch.stack([u @ v / math.sqrt(width), u @ u / width, v @ v / width])
    return torch.cat([start, normal(steps)])


# ---- measurements: the entries of summary.json ----

BASE_WIDTH = 64                                 # of the warmup; SP's LR has none
LRS = [2 ** (k / 2) for k in range(-44, 5)]     # (K,)
WARMUPS = [(0, 0.0), (32, 0.0), (32, 0.5)]      # (steps at the base width, exponent in m)
ONE_STEP = [("sp", 0.5), ("sp", 1.0), ("sp", 1.5), ("ntp", 0.0)]    # with alpha
TIMES = 1, 4, 16                                # steps before each distance


def ntk_exponent(parameterization, alpha=0.0):
    """Return the exponent of m in λ. A minimum is stable up to lr = 2 / λ."""
    return max(width_exponents(parameterization, alpha)[1:3])


def fit(widths, logs, step=0.0):
    """Return (slope, (low, high)) of logs (S, W), of S seeds, against log width.

    step: spacing of the logs' grid. nan where there is none.
    """
    exponent = estimate.exponent_of(widths, np.exp(logs), np.full(len(widths), step))
    return exponent.slope, exponent.interval if len(logs) > 1 else (math.nan, math.nan)


def bracket(width, steps, seeds, label_noise, warmup):
    """Return logs (S,) of the largest stable LR below the first unstable one,
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
    """Return the entry of SP's largest stable LR against width,
    after warmup * m^exponent steps of linear warmup.

    With noise, χ grows as soon as lr λ > 2 and λ falls while the LR rises: the
    LR's growth per step stays bounded. Without noise χ is too small by then,
    and the LR itself counts.
    """
    growth = exponent if label_noise else 0.0
    flags, brackets = [], []
    for width in widths:
        warmup_steps = round(warmup * (width / BASE_WIDTH) ** exponent)
        if warmup_steps > steps:
            flags.append(f"width {width}: {warmup_steps} warmup steps, "
                         f"but {steps} steps in all")
        brackets.append(bracket(width, steps, seeds, label_noise, warmup_steps))
        if np.isnan(brackets[-1]).any():
            flags.append(f"width {width}: no edge "
                         f"from LR {LRS[0]:.3g} to {LRS[-1]:.3g}, "
                         "left out of the fit")

    stable, unstable = np.array(brackets).transpose(1, 2, 0)    # (S, W) each
    slope, interval = fit(widths, (stable + unstable) / 2, math.log(LRS[1] / LRS[0]))
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
    """Return the entry, with values, a list over widths of (S,), and their exponent."""
    values = torch.stack(values, dim=-1).numpy()    # (S, W)
    slope, interval = fit(widths, np.log(values))
    return {**entry, "widths": widths, "values": values.tolist(),
            "exponent": slope, "interval": interval, "predicted": predicted}


def distances(widths, parameterization, seeds=32, lr=0.1):
    """Return entries of |f - its infinite-width limit from the same initial f|
    (from 0 for mup).
    """
    all_seeds, paths = torch.arange(seeds), []
    for width in widths:
        f = linear_net(width, lr, max(TIMES), parameterization, all_seeds).f
        start = 0.0 if parameterization == "mup" else f[0]
        limit = linear_net(math.inf, lr, max(TIMES), parameterization, all_seeds, f0=start).f
        paths.append((f - limit).abs())     # (steps + 1, S)
    return [with_exponent({"param": parameterization, "step": step}, widths,
                          [path[step] for path in paths], predicted=-0.5) for step in TIMES]


def one_step(widths, parameterization, alpha, seeds=32, lr=0.5):
    """Return the entry of |loss decrease| after one step (Proposition C.3)."""
    all_seeds, decreases = torch.arange(seeds), []
    for width in widths:
        before, after = linear_net(width, lr, 1, parameterization, all_seeds, alpha).loss
        decreases.append((after - before).abs())
    change = ntk_exponent(parameterization, alpha)
    predicted = max(change, 2 * change)     # f² where f diverges
    return with_exponent({"param": parameterization, "alpha": alpha}, widths,
                         decreases, predicted)


def measure(widths, steps, seeds, label_noise):
    """Yield (kind, entry)."""
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
    measured = "-" if math.isnan(slope) else f"{slope:+.2f}"
    if not math.isnan(low):
        measured += f" [{low:+.2f}, {high:+.2f}]"
    flags = [f"! {flag}" for flag in entry.get("flags", [])]
    return "\n".join([f"{name:48}{entry['predicted']:+9.2f}   {measured}", *flags])


CHECKS = {
    "widths": config.Check(int, "from 1 to 2^26", lambda n: 1 <= n <= 2 ** 26),  # u, v: 1 GB
    "steps": config.POSITIVE_INT,
    "seeds": config.POSITIVE_INT,
    "label_noise": config.NON_NEGATIVE,
}


def main(argv=None):
    parser = config.Parser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--widths", type=config.whole_number, nargs="+",
        default=[4 ** k for k in range(3, 11)], help="default 4^3 to 4^10")
    add("--steps", type=config.whole_number, default=5000,
        help="at the stability edge; default 5000")
    add("--seeds", type=config.whole_number, default=4,
        help="at the stability edge, 32 elsewhere; default 4")
    add("--label-noise", type=config.number, default=0.01,
        help="standard deviation, at the stability edge; default 0.01")
    add("--out", type=Path, default=Path("out/linear_net"), help="default out/linear_net")
    args = parser.parse_args(argv)
    for name, check in CHECKS.items():
        values = getattr(args, name)
        for value in values if isinstance(values, list) else [values]:
            config.checked(name, value, check)
    config.require(args.steps * args.seeds <= 10 ** 6, "steps times seeds",
                   args.steps * args.seeds, "at most 10^6")       # 4 GB

    args.out.mkdir(parents=True, exist_ok=True)
    start, entries, widths = time.perf_counter(), {}, sorted(set(args.widths))
    print(f"{'Exponents against width':48}predicted   measured, 95 % interval")
    for kind, entry in measure(widths, args.steps, args.seeds, args.label_noise):
        entries.setdefault(kind, []).append(entry)
        print(table_row(kind, entry), flush=True)
    data.write_json(args.out / "summary.json", {
        "command": " ".join(["python", *sys.argv]),
        "seconds": round(time.perf_counter() - start, 1), "linear_net": entries})
    print(f"\npython plots.py {args.out}")


if __name__ == "__main__":
    config.command_line(main)
