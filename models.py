"""Networks whose width is the only thing that grows, as in arXiv 2505.22491.

    MLP    ReLU network: no biases by default, flattened input, logits out
    GPT    Pythia-like decoder (arXiv 2304.01373): pre-LayerNorm, attention and MLP side by side
           (parallel residual), exact GELU, rotary embedding (arXiv 2104.09864) on a quarter of
           each head, LayerNorm on q and k before it, no biases, untied embedding and readout.
           head_dim is fixed and the number of heads grows: 1/sqrt(head_dim) is a constant

    B, T   batch, tokens      D   width      V   vocabulary      H   heads      K   head_dim, D = H K

Initial weights are those of torch.nn until `param.init_` draws them; build on the meta device to skip
the first draw. Needs torch only and can be copied alone. Not included: dropout, caches for generation,
biases and tied weights in GPT.

    model = MLP(784, width=512, hidden_layers=3, d_out=10)
    model = GPT(vocab_size=256, width=256, layers=4, context=128)
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

ACTIVATIONS = {"relu": torch.relu, "identity": lambda x: x}


class MLP(nn.Module):
    """d_in -> width -> ... -> width -> d_out; x (B, ...) -> logits (B, d_out).

    hidden_layers counts hidden activations: 1 is the "2-layer MLP", 7 the paper's 8-layer MLP.
    activation "identity" gives the deep linear net.
    ValueError on an unknown activation or a size below one.
    """

    def __init__(self, d_in, width, hidden_layers, d_out, activation="relu", bias=False):
        super().__init__()
        if activation not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ValueError(f"unknown activation {activation!r}; choose from {known}")
        sizes = [d_in] + [width] * hidden_layers + [d_out]
        if min(sizes) < 1 or hidden_layers < 1:
            raise ValueError(f"MLP sizes must be at least one: d_in {d_in}, width {width}, "
                             f"hidden_layers {hidden_layers}, d_out {d_out}")
        self.activation = activation
        self.layers = nn.ModuleList(nn.Linear(fan_in, fan_out, bias=bias)
                                    for fan_in, fan_out in zip(sizes, sizes[1:]))

    def forward(self, x):
        activate = ACTIVATIONS[self.activation]
        x = x.flatten(1)  # (B, d_in)
        for layer in self.layers[:-1]:
            x = activate(layer(x))  # (B, width)
        return self.layers[-1](x)  # (B, d_out)


class GPT(nn.Module):
    """Decoder of `layers` blocks; tokens (B, T) with T <= context -> logits (B, T, V).

    norm_affine: every LayerNorm has gains (never biases). qk_norm: q and k are normalized over each
    head, with gains that all heads share. ValueError if head_dim does not divide width or is no
    multiple of 8 (a quarter of it turns in pairs), for a size below one, and for more tokens than
    context.
    """

    def __init__(self, vocab_size, width, layers, context, head_dim=32, norm_affine=True, qk_norm=True):
        super().__init__()
        if min(vocab_size, width, layers, context, head_dim) < 1:
            raise ValueError(f"GPT sizes must be at least one: vocab_size {vocab_size}, width {width}, "
                             f"layers {layers}, context {context}, head_dim {head_dim}")
        if head_dim % 8:
            raise ValueError(f"head_dim {head_dim} is no multiple of 8, so a quarter of it has no pairs "
                             "to rotate; choose 8, 16, 32")
        if width % head_dim:
            raise ValueError(f"width {width} is no multiple of head_dim {head_dim}; "
                             "choose one that is, or another head_dim")
        self.context = context
        self.rotated = head_dim // 4  # dimensions that rotary embedding turns
        self.embedding = nn.Embedding(vocab_size, width)
        self.blocks = nn.ModuleList(Block(width, head_dim, norm_affine, qk_norm) for _ in range(layers))
        self.norm = layer_norm(width, norm_affine)
        self.readout = nn.Linear(width, vocab_size, bias=False)

    def forward(self, tokens):
        length = tokens.shape[-1]
        if length > self.context:
            raise ValueError(f"{length} tokens exceed context {self.context}; pass fewer, "
                             f"or build GPT with context={length}")
        x = self.embedding(tokens)  # (B, T, D)
        dtype = torch.promote_types(x.dtype, torch.float32)
        cos, sin = rotary_table(self.context, self.rotated, x.device, dtype)
        for block in self.blocks:
            x = block(x, cos[:length], sin[:length])
        return self.readout(self.norm(x))  # (B, T, V)


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
        attended = self.attention(self.norm_attention(x), cos, sin)
        return x + attended + self.down(F.gelu(self.up(self.norm_mlp(x))))


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
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, self.head_dim)).unbind(-3)  # (B, T, H, K)
        q = rotate(self.norm_q(q), cos, sin).type_as(v)  # under autocast norms give float32
        k = rotate(self.norm_k(k), cos, sin).type_as(v)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, K)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(x.transpose(1, 2).flatten(2))  # (B, T, D)


def layer_norm(size, affine):
    return nn.LayerNorm(size, elementwise_affine=affine, bias=False)


def rotate(x, cos, sin):
    """x (B, T, H, K) with entries i, i + r of every head at position t turned by the angle t θ_i.

    cos, sin (T, 1, r).
    """
    r = cos.shape[-1]
    a, b, rest = x.split((r, r, x.shape[-1] - 2 * r), dim=-1)  # split's backward is one copy
    return torch.cat((a * cos - b * sin, a * sin + b * cos, rest), dim=-1).type_as(x)


# No buffers: those would be lost between the meta device and to_empty or functional_call.
_ROTARY_TABLES = {}


def rotary_table(context, dims, device, dtype):
    """cos and sin, each (context, 1, dims / 2), of the angles t θ_i with θ_i = 10000^(-2i / dims).

    Made once per device and dtype.
    """
    key = context, dims, device, dtype
    if key not in _ROTARY_TABLES:
        with torch.inference_mode(False):  # a table made in it could never be trained with
            theta = 10000 ** -(torch.arange(0, dims, 2, device=device, dtype=dtype) / dims)
            position = torch.arange(context, device=device, dtype=dtype)
            angles = position[:, None, None] * theta
            _ROTARY_TABLES[key] = angles.cos(), angles.sin()
    return _ROTARY_TABLES[key]
