"""Networks whose width is the only thing that grows, as in arXiv 2505.22491.

    MLP    ReLU network: no biases by default, flattened input, logits out
    GPT    Pythia-like decoder (arXiv 2304.01373): pre-LayerNorm, attention and
           MLP side by side (parallel residual), exact GELU, rotary embedding
           (arXiv 2104.09864) on a quarter of each head, LayerNorm on q and k
           before it, no biases, untied embedding and readout. head_dim is fixed
           and the number of heads grows

    B, T   batch, tokens    D   width    V   vocabulary
    H      heads            K   head_dim, D = H K

Initial weights are those of torch.nn until `param.init_` draws them; the meta
device skips the first draw. Needs torch only; can be copied alone. Not
included: dropout, caches for generation, biases and tied weights in GPT.

    model = MLP(784, width=512, hidden_layers=3, d_out=10)
    model = GPT(vocab_size=256, width=256, layers=4, context=128)
    model = custom_model("net.py:build", 512,
                         Shape(784, 10, text=False))    # a model in a file of yours
"""
import functools
import hashlib
import importlib.util
import inspect
import sys
from pathlib import Path
from typing import NamedTuple
from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F


class MLP(nn.Module):
    """d_in -> width -> ... -> width -> d_out with ReLU; x (B, ...) -> logits (B, d_out).

    hidden_layers counts hidden activations: 7 is the paper's 8-layer MLP.
    ValueError for a size below one.
    """

    def __init__(self, d_in, width, hidden_layers, d_out, bias=False):
        super().__init__()
        sizes = [d_in] + [width] * hidden_layers + [d_out]
        if min(sizes) < 1 or hidden_layers < 1:
            raise ValueError("MLP sizes must be at least one: "
                             f"d_in {d_in}, width {width}, "
                             f"hidden_layers {hidden_layers}, d_out {d_out}")
        self.layers = nn.ModuleList(
            nn.Linear(*fans, bias=bias) for fans in zip(sizes, sizes[1:]))

    def forward(self, x):
        x = x.flatten(1)                    # (B, d_in)
        for layer in self.layers[:-1]:
            x = torch.relu(layer(x))        # (B, width)
        return self.layers[-1](x)           # (B, d_out)


class GPT(nn.Module):
    """Decoder of `layers` blocks; tokens (B, T) with T <= context -> logits (B, T, V).

    norm_affine: every LayerNorm has gains (never biases). qk_norm: q and k are
    normalized over each head, with gains that all heads share. ValueError if
    head_dim does not divide width or is no multiple of 8, for a size below one,
    and for more tokens than context.
    """

    def __init__(self, vocab_size, width, layers, context,
                 head_dim=32, norm_affine=True, qk_norm=True):
        super().__init__()
        if min(vocab_size, width, layers, context, head_dim) < 1:
            raise ValueError("GPT sizes must be at least one: "
                             f"vocab_size {vocab_size}, width {width}, layers {layers}, "
                             f"context {context}, head_dim {head_dim}")
        if head_dim % 8:
            raise ValueError(f"head_dim {head_dim} is no multiple of 8, "
                             "so a quarter of it has no pairs to rotate; "
                             "choose 8, 16, 32")
        if width % head_dim:
            raise ValueError(f"width {width} is no multiple of head_dim {head_dim}; "
                             "choose one that is, or another head_dim")

        self.context = context
        self.rotated = head_dim // 4        # dimensions that rotary embedding turns
        self.embedding = nn.Embedding(vocab_size, width)
        self.blocks = nn.ModuleList(
            Block(width, head_dim, norm_affine, qk_norm) for _ in range(layers))
        self.norm = layer_norm(width, norm_affine)
        self.readout = nn.Linear(width, vocab_size, bias=False)

    def forward(self, tokens):
        length = tokens.shape[-1]
        if length > self.context:
            raise ValueError(f"{length} tokens exceed context {self.context}; "
                             f"pass fewer, or build GPT with context={length}")
        x = self.embedding(tokens)  # (B, T, D)
        dtype = torch.promote_types(x.dtype, torch.float32)
        cos, sin = rotary_table(self.context, self.rotated, x.device, dtype)
        for block in self.blocks:
            x = block(x, cos[:length], sin[:length])
        return self.readout(self.norm(x))  # (B, T, V)


class Block(nn.Module):
    """x + attention(norm(x)) + MLP(norm(x)), each with its own norm;
    x (B, T, D)."""

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
        # Under autocast norms give float32, and q, k, v must agree.
        q = rotate(self.norm_q(q), cos, sin).type_as(v)
        k = rotate(self.norm_k(k), cos, sin).type_as(v)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # (B, H, T, K)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(x.transpose(1, 2).flatten(2))  # (B, T, D)


def layer_norm(size, affine):
    return nn.LayerNorm(size, elementwise_affine=affine, bias=False)


def rotate(x, cos, sin):
    """x (B, T, H, K), entries i, i + r of each head turned by t θ_i;
    cos, sin (T, 1, r)."""
    r = cos.shape[-1]
    # By split, whose backward is one copy.
    a, b, rest = x.split((r, r, x.shape[-1] - 2 * r), dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos, rest), dim=-1)


# No buffers: those would be lost between the meta device and to_empty or
# functional_call.
_ROTARY_TABLES = {}


def rotary_table(context, dims, device, dtype):
    """cos, sin (context, 1, dims / 2) of the angles t θ_i,
    θ_i = 10000^(-2i / dims); made once."""
    key = context, dims, device, dtype
    if key not in _ROTARY_TABLES:
        # A table made in inference mode could never be trained with.
        with torch.inference_mode(False):
            theta = 10000 ** -(torch.arange(0, dims, 2, device=device, dtype=dtype) / dims)
            position = torch.arange(context, device=device, dtype=dtype)
            angles = position[:, None, None] * theta
            _ROTARY_TABLES[key] = angles.cos(), angles.sin()
    return _ROTARY_TABLES[key]


# ---- custom models: "FILE.py:FUNCTION" names build(width) or build(width, shape) ----

class Shape(NamedTuple):
    """What the data ask of a model: floats (B, inputs) -> logits (B, outputs);
    for text, token ids (B, inputs) -> logits (B, inputs, outputs)."""
    inputs: int
    outputs: int        # classes, tokens of the vocabulary or real-valued targets
    text: bool

    @property
    def classes(self):
        return self.outputs


class CustomModel(NamedTuple):
    """What the user's file defines."""
    build: Callable         # build(width) or build(width, shape) -> nn.Module
    roles: dict             # {parameter name or pattern: role}
    digest: str             # hash of the file and of what it imports from its folder


@functools.cache
def load_custom(spec):
    """Return the CustomModel of "FILE.py:FUNCTION"; a file is imported once.

    ValueError where there is no such file or function. An error that the file
    itself raises is its author's, and keeps its traceback.
    """
    file, _, name = spec.rpartition(":")
    path = Path(file).resolve()
    if not path.is_file():
        raise ValueError(f"model is {spec!r}, and {file} is no file; "
                         "give FILE.py:FUNCTION")

    module, digest = _import_file(path)
    if not callable(getattr(module, name, None)):
        known = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise ValueError(f"model is {spec!r}, and {file} has no function {name!r}; "
                         f"it has {', '.join(known) or 'none'}")
    roles = getattr(module, "roles", {})
    if not isinstance(roles, dict):
        raise ValueError(f"roles in {file} is a {type(roles).__name__}; "
                         "it must be a dict {parameter name or pattern: role}")
    return CustomModel(getattr(module, name), roles, digest)


@functools.cache
def _import_file(path):
    """Return (the module that a file defines, the digest of a CustomModel)."""
    loaded_before = set(sys.modules)
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(f"custom_{path.stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    imported = [sys.modules[key] for key in sys.modules.keys() - loaded_before]
    files = {Path(part.__file__).resolve() for part in imported
             if getattr(part, "__file__", None)} - {path}
    beside = sorted(file for file in files if file.is_relative_to(path.parent))
    content = b"".join(file.read_bytes() for file in [path, *beside])
    return module, hashlib.sha256(content).hexdigest()[:16]


def custom_model(spec, width, shape):
    """Return the model that the user's file builds, as it initializes it, in evaluation mode.

    Outputs with .logits (transformers') are unwrapped. ValueError for what is no
    module and for what a stack of replicas cannot train: state outside of the
    weights, and random numbers.
    """
    build = load_custom(spec).build
    required = [p for p in inspect.signature(build).parameters.values()
                if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    model = build(width, shape) if len(required) > 1 else build(width)
    if not isinstance(model, nn.Module):
        raise ValueError(f"{spec} built a {type(model).__name__} at width {width}, "
                         "and no nn.Module")

    for name, module in model.named_modules():
        reason = _why_not_stackable(module)
        if reason:
            raise ValueError(f"{name or 'the model'} is a {type(module).__name__} {reason}")
    for name, weights in model.named_parameters():
        if isinstance(weights, nn.parameter.UninitializedParameter):
            raise ValueError(f"{name} has no shape yet; build the model without lazy modules")
        if not weights.requires_grad:
            raise ValueError(f"{name} has requires_grad=False; register it as a buffer")
        if not weights.is_floating_point():
            raise ValueError(f"{name} holds {weights.dtype}; weights must be real numbers")

    model.register_forward_hook(
        lambda module, args, output: getattr(output, "logits", output))
    return model.eval()


def _why_not_stackable(module):
    """Return why a stack of replicas cannot train a module, and the remedy; None if it can."""
    if getattr(module, "running_mean", None) is not None:
        return ("whose running statistics all replicas of a stack would share; "
                "use LayerNorm, GroupNorm or track_running_stats=False")
    has_rate = isinstance(module, (nn.RNNBase, nn.MultiheadAttention))
    if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0 or (
            has_rate and module.dropout > 0):
        return "with dropout, which draws other numbers in a stack than alone; build it without"
    if getattr(module, "sparse", False) is True:
        return "with sparse gradients, which vmap does not know; use sparse=False"
    return None


def set_parameters(model, weights):
    """Make these tensors the model's parameters, in their order, and return the model.

    Nothing is copied: tensors may be of any device and dtype. A tied parameter
    is replaced in every place where it is used.
    """
    new = {id(old): nn.Parameter(w) for old, w in zip(model.parameters(), weights)}
    for module in model.modules():
        module._parameters.update({
            name: new[id(old)]
            for name, old in module._parameters.items() if old is not None})
    return model
