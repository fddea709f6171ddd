"""Networks whose width is the only thing that grows, as in arXiv 2505.22491.

    MLP         ReLU network: no biases by default, flattened input, logits out
    GPT         Pythia-like decoder (arXiv 2304.01373): pre-LayerNorm, attention and MLP side by side (parallel residual), exact
                GELU, rotary embedding (arXiv 2104.09864) on a quarter of each head, LayerNorm on q and k before it, no biases,
                untied embedding and readout. head_dim is fixed and the number of heads grows, so 1/sqrt(head_dim) is a constant
    linear_net  the two-layer linear net of the paper's Appendix C, trained in closed form: a width of 10^6 costs what 64 does

    B, T    batch, tokens        D   width        V   vocabulary        H   heads        K   head_dim, D = H K

Initial weights are those of torch.nn until `param.init_` draws them; build on the meta device to skip the first draw.
Needs torch only and can be copied alone. Not included: dropout, caches for generation, biases and tied weights in GPT.

    model = MLP(784, width=512, hidden_layers=3, d_out=10)
    model = GPT(vocab_size=256, width=256, layers=4, context=128)
"""
import math
from collections import namedtuple

import torch
import torch.nn as nn
import torch.nn.functional as F

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


class GPT(nn.Module):
    """Decoder of `layers` blocks; tokens (B, T) with T <= context -> logits (B, T, V).

    norm_affine: every LayerNorm has gains (never biases). qk_norm: q and k are normalized over each head, with gains that
    all heads share. ValueError if head_dim does not divide width or is no multiple of 8 (a quarter of it turns in pairs),
    for a size below one, and for more tokens than context.
    """

    def __init__(self, vocab_size, width, layers, context, head_dim=32, norm_affine=True, qk_norm=True):
        super().__init__()
        if min(vocab_size, width, layers, context, head_dim) < 1:
            raise ValueError(f"GPT sizes must be at least one: vocab_size {vocab_size}, width {width}, layers {layers}, "
                             f"context {context}, head_dim {head_dim}")
        if head_dim % 8:
            raise ValueError(f"head_dim {head_dim} is no multiple of 8, so a quarter of it has no pairs to rotate; choose 8, 16, 32")
        if width % head_dim:
            raise ValueError(f"width {width} is no multiple of head_dim {head_dim}; choose one that is, or another head_dim")
        self.context, self.rotated = context, head_dim // 4
        self.embedding = nn.Embedding(vocab_size, width)
        self.blocks = nn.ModuleList(Block(width, head_dim, norm_affine, qk_norm) for _ in range(layers))
        self.norm = layer_norm(width, norm_affine)
        self.readout = nn.Linear(width, vocab_size, bias=False)

    def forward(self, tokens):
        length = tokens.shape[-1]
        if length > self.context:
            raise ValueError(f"{length} tokens exceed context {self.context}; pass fewer, or build GPT with context={length}")
        x = self.embedding(tokens)                                                          # (B, T, D)
        cos, sin = rotary_table(self.context, self.rotated, x.device, torch.promote_types(x.dtype, torch.float32))
        for block in self.blocks:
            x = block(x, cos[:length], sin[:length])
        return self.readout(self.norm(x))                                                   # (B, T, V)


class Block(nn.Module):
    """x + attention(norm(x)) + MLP(norm(x)), each with its own norm; x (B, T, D)."""

    def __init__(self, width, head_dim, norm_affine, qk_norm):
        super().__init__()
        self.norm_attention = layer_norm(width, norm_affine)
        self.attention = Attention(width, head_dim, norm_affine, qk_norm)
        self.norm_mlp = layer_norm(width, norm_affine)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x, cos, sin):
        return x + self.attention(self.norm_attention(x), cos, sin) + self.down(F.gelu(self.up(self.norm_mlp(x))))


class Attention(nn.Module):
    """Causal multi-head attention; x (B, T, D) -> (B, T, D)."""

    def __init__(self, width, head_dim, norm_affine, qk_norm):
        super().__init__()
        self.head_dim = head_dim
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.norm_q = layer_norm(head_dim, norm_affine) if qk_norm else nn.Identity()
        self.norm_k = layer_norm(head_dim, norm_affine) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width, bias=False)

    def forward(self, x, cos, sin):
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, self.head_dim)).unbind(-3)              # (B, T, H, K)
        q, k = rotate(self.norm_q(q), cos, sin).type_as(v), rotate(self.norm_k(k), cos, sin).type_as(v)     # autocast's norms are float32
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)                   # (B, H, T, K)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(x.transpose(1, 2).flatten(2))                                      # (B, T, D)


def layer_norm(size, affine):
    return nn.LayerNorm(size, elementwise_affine=affine, bias=False)


def rotate(x, cos, sin):
    """x (B, T, H, K) with entries i and i + r of every head at position t turned by the angle t θ_i; cos, sin (T, 1, r)."""
    r = cos.shape[-1]
    a, b, rest = x.split((r, r, x.shape[-1] - 2 * r), dim=-1)                               # split's backward is one copy
    return torch.cat((a * cos - b * sin, a * sin + b * cos, rest), dim=-1).type_as(x)


_ROTARY_TABLES = {}     # no buffers: those would be lost between the meta device and to_empty or functional_call


def rotary_table(context, dims, device, dtype):
    """cos and sin (context, 1, dims / 2) of the angles t θ_i, θ_i = 10000^(-2i / dims); made once per device and dtype."""
    key = context, dims, device, dtype
    if key not in _ROTARY_TABLES:
        with torch.inference_mode(False):       # else a table first used there could never be trained with
            theta = 10000 ** -(torch.arange(0, dims, 2, device=device, dtype=dtype) / dims)
            angles = torch.arange(context, device=device, dtype=dtype)[:, None, None] * theta
            _ROTARY_TABLES[key] = angles.cos(), angles.sin()
    return _ROTARY_TABLES[key]


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
