"""Networks whose width is the only thing that grows.

    MLP         the ReLU network of arXiv 2505.22491: no biases by default, flattened input, logits out
    linear_net  the two-layer linear net of its Appendix C, trained in closed form: a width of 10^6 costs what 64 does

Initial weights are those of nn.Linear until `param.init_` draws them; build on the meta device to skip the first draw.
Needs torch only and can be copied alone.

    model = MLP(784, width=512, hidden_layers=3, d_out=10)
"""
import math
from collections import namedtuple

import torch
import torch.nn as nn

ACTIVATIONS = {"relu": torch.relu, "identity": lambda x: x}


class MLP(nn.Module):
    """d_in -> width -> ... -> width -> d_out with `hidden_layers` hidden activations; x (B, ...) -> logits (B, d_out).

    hidden_layers = 1 is the "2-layer MLP", 7 the paper's 8-layer MLP. activation "identity" gives the deep linear net.
    ValueError on an unknown activation or a size below one.
    """

    def __init__(self, d_in, width, hidden_layers, d_out, activation="relu", bias=False):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}; choose from {', '.join(ACTIVATIONS)}")
        sizes = [d_in] + [width] * hidden_layers + [d_out]
        if min(sizes) < 1 or hidden_layers < 1:
            raise ValueError(f"MLP sizes must be at least one: d_in {d_in}, width {width}, hidden_layers {hidden_layers}, d_out {d_out}")
        self.activation = activation
        self.layers = nn.ModuleList(nn.Linear(fan_in, fan_out, bias=bias) for fan_in, fan_out in zip(sizes, sizes[1:]))

    def forward(self, x):
        x = x.flatten(1)                                    # (B, d_in)
        for layer in self.layers[:-1]:
            x = ACTIVATIONS[self.activation](layer(x))      # (B, width)
        return self.layers[-1](x)                           # (B, d_out)


# Exponents of m = width / base width: readout std ∝ m^-b, LR of u ∝ m^-c_in, LR of v ∝ m^-c_out.
LINEAR_NET = {"sp": (0.5, 0.0, 0.0), "ntp": (0.5, 0.0, 1.0), "mup": (1.0, -1.0, 1.0),       # (b, c_in, c_out)
              "sp_full_align": (0.5, -0.5, 1.0), "sp_full_align_large_readout": (0.5, -0.5, 0.5)}
LinearNet = namedtuple("LinearNet", "f ntk loss diverged_at")


def linear_net(width, lr, steps, parameterization, seed=0, alpha=0.0, base_width=1, x=1.0, y=1.0, weight_decay=0.0,
               schedule=None, label_noise=0.0, f0=None):
    """f = x uᵀv, u, v (width,), trained by gradient descent on (f - y)²/2 in closed form, in float64.

    lr (at base_width, times m^-alpha), seed and weight_decay broadcast to some shape (...). schedule(step) multiplies
    the LR at a step counted from zero; lr * weight_decay does not change with width. label_noise is the standard
    deviation of noise added to y anew at every step. f0 replaces the initial f that seed draws. Returns

        f, ntk, loss   (steps + 1, ...): before every step and after the last; nan from the step of divergence on
        diverged_at    (...): first step whose loss (without the noise) is not finite, -1 if none

    ntk is x²(k_u ‖v‖² + k_v ‖u‖²) with the LRs' width factors k_u, k_v: f changes by -lr (f - y) ntk to first order.
    width = math.inf is the limit: f ~ N(0, x²) or 0 at first, a fixed ntk unless P > 0 below. ValueError where there is
    none (sp needs alpha >= 1), and on an unknown parameterization. Paper, Appendix C; at base_width 1 ntk is its λ for
    ntp, mup and sp with alpha = 1. Seed s draws u / N(0, 1), then v / std, from torch.Generator().manual_seed(s).
    """
    if parameterization not in LINEAR_NET:
        raise ValueError(f"unknown parameterization {parameterization!r}; choose from {', '.join(LINEAR_NET)}")
    b, c_in, c_out = LINEAR_NET[parameterization]
    powers = (0.5 - b, 1 - 2 * b - c_in - alpha, 1 - c_out - alpha, -c_in - c_out - 2 * alpha)
    if width == math.inf and max(powers) > 0:
        least = alpha + max(powers[1], powers[2], powers[3] / 2)
        raise ValueError(f"{parameterization} with alpha = {alpha:g} has no infinite-width limit; use alpha >= {least:g}")
    size_f, size_v, size_u, size_p = (float(width / base_width) ** power for power in powers)

    lr, decay = (torch.as_tensor(value, dtype=torch.float64) for value in (lr, weight_decay))
    lr, decay, seed = torch.broadcast_tensors(lr, decay, torch.as_tensor(seed))
    seeds, of_seed = seed.unique(return_inverse=True)
    overlap, u2, v2, *noise = torch.stack([_linear_net_draw(width, s, steps) for s in seeds.tolist()], -1)[:, of_seed]
    start = x * size_f * overlap if f0 is None else torch.as_tensor(f0, dtype=torch.float64)
    p = x * x * size_p                                              # P = x² k_u k_v
    chi = torch.full((steps + 1, *lr.shape), math.nan, dtype=torch.float64)
    ntk = chi.clone()
    chi[0], ntk[0] = start - y, x * x * (size_v * v2 + base_width * size_u * u2)
    for step in range(steps):       # χ = f - y is the state: rounding f would stop an unstable run at f = y
        now = lr * (1.0 if schedule is None else schedule(step))
        error, kernel = chi[step], ntk[step]
        g = now * (error - label_noise * noise[step] if label_noise else error)
        a = 1 - now * decay
        square, pg = a * a, p * g
        pgf = pg * (error + y)
        chi[step + 1] = square * error - (1 - square) * y + g * (pgf - a * kernel)
        ntk[step + 1] = (square + pg * g) * kernel - 4 * a * pgf
    loss = chi.square() / 2
    bad = (~loss.isfinite()).cumsum(0) > 0
    diverged_at = torch.where(bad[-1], bad.int().argmax(0), -1)
    return LinearNet(*(values.masked_fill(bad, math.nan) for values in (chi + y, ntk, loss)), diverged_at)


def _linear_net_draw(width, seed, steps):
    """(3 + steps,): uᵀv / √n, ‖u‖² / n, ‖v‖² / n of u, v ~ N(0, I), and the label noise of every step."""
    generator = torch.Generator().manual_seed(seed)

    def normal(size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    if width == math.inf:
        return torch.cat([normal(1), torch.ones(2, dtype=torch.float64), normal(steps)])
    u, v = normal(width), normal(width)
    return torch.cat([torch.stack([u @ v / math.sqrt(width), u @ u / width, v @ v / width]), normal(steps)])
