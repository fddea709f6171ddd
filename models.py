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
    model = own("net.py:build", 512,
                Shape(784, 10, text=False))     # a network in a file of yours
"""
import contextlib
import functools
import hashlib
import importlib.util
import inspect
import modulefinder
import sys
import traceback
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

ACTIVATIONS = {"relu": torch.relu, "identity": lambda x: x}


class MLP(nn.Module):
    """d_in -> width -> ... -> width -> d_out; x (B, ...) -> logits (B, d_out).

    hidden_layers counts hidden activations: 7 is the paper's 8-layer MLP.
    activation "identity" gives the deep linear net. ValueError on another, or a
    size below one.
    """

    def __init__(self, d_in, width, hidden_layers, d_out, activation="relu", bias=False):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}; "
                             f"choose from {', '.join(ACTIVATIONS)}")
        sizes = [d_in] + [width] * hidden_layers + [d_out]
        if min(sizes) < 1 or hidden_layers < 1:
            raise ValueError("MLP sizes must be at least one: "
                             f"d_in {d_in}, width {width}, "
                             f"hidden_layers {hidden_layers}, d_out {d_out}")
        self.activation = activation
        self.layers = nn.ModuleList(
            nn.Linear(*fans, bias=bias) for fans in zip(sizes, sizes[1:]))

    def forward(self, x):
        x = x.flatten(1)  # (B, d_in)
        for layer in self.layers[:-1]:
            x = ACTIVATIONS[self.activation](layer(x))  # (B, width)
        return self.layers[-1](x)  # (B, d_out)


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
        self.rotated = head_dim // 4  # dimensions that rotary embedding turns
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


# ---- networks of your own ----
# "FILE.py:FUNCTION" names build(width) or build(width, shape).

class Shape(NamedTuple):
    """What the data ask of a network: floats (B, inputs) -> logits (B, classes);
    of text, token ids (B, inputs) -> logits (B, inputs, classes)."""
    inputs: int
    classes: int
    text: bool


class Source(NamedTuple):
    path: Path
    build: object       # build(width) or build(width, shape) -> nn.Module
    roles: object       # {parameter name or pattern: role}, or name -> role or None
    digest: str         # of the file, and of those beside it that it imports


@functools.cache
def load(spec):
    """The Source of "FILE.py:FUNCTION", read once.

    ValueError: there is none, or it raises.
    """
    file, _, name = spec.rpartition(":")
    path = Path(file).resolve()
    if not path.is_file():
        raise ValueError(f"model is {spec!r}, and {file} is no file; "
                         "give FILE.py:FUNCTION")

    with _blaming(path):
        # The file and those beside it that it imports, found without running them.
        finder = modulefinder.ModuleFinder([str(path.parent)])
        finder.run_script(str(path))
        files = {name: Path(part.__file__)
                 for name, part in finder.modules.items() if part.__file__}
        for part, beside in files.items():
            loaded = getattr(sys.modules.get(part), "__file__", None)
            if part != "__main__" and loaded and Path(loaded).resolve() != beside:
                raise ImportError(f"{beside.name} bears the name of {loaded}, "
                                  "loaded before; rename it")

        sys.path.append(str(path.parent))
        found = importlib.util.spec_from_file_location(f"own_{path.stem}", path)
        module = sys.modules[found.name] = importlib.util.module_from_spec(found)
        found.loader.exec_module(module)

    if not callable(getattr(module, name, None)):
        known = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise ValueError(f"model is {spec!r}, and {file} has no function {name!r}; "
                         f"it has {', '.join(known) or 'none'}")
    roles = getattr(module, "roles", {})
    if not (isinstance(roles, dict) or callable(roles)):
        raise ValueError(f"roles in {file} is a {type(roles).__name__}; "
                         "it must be a dict, or a function of a parameter's name")
    content = b"".join(files[part].read_bytes() for part in sorted(files))
    return Source(path, getattr(module, name), roles,
                  hashlib.sha256(content).hexdigest()[:16])


@contextlib.contextmanager
def _blaming(path):
    """What a file raises becomes a ValueError of one line,
    with the line in that file."""
    try:
        yield
    except Exception as error:
        line = getattr(error, "lineno", None) or 1  # of a file that does not parse
        for frame in traceback.extract_tb(error.__traceback__):
            if frame.filename == str(path):
                line = frame.lineno
        *_, last = "", *str(error).strip().splitlines()
        raise ValueError(
            f"{path.name}:{line}: {type(error).__name__}: {last.strip()}") from error


def own(spec, width, shape):
    """The network that a file builds, as it initializes it, in evaluation mode;
    outputs with .logits (transformers') are unwrapped. ValueError: what the
    file raises, and what a stack of replicas cannot train (state outside the
    weights).
    """
    source = load(spec)
    with _blaming(source.path):
        needed = [p for p in inspect.signature(source.build).parameters.values()
                  if p.default is p.empty]
        model = source.build(width, shape) if len(needed) > 1 else source.build(width)
    if not isinstance(model, nn.Module):
        raise ValueError(f"{spec} built a {type(model).__name__} at width {width}, "
                         "and no nn.Module")

    for name, module in model.named_modules():
        kind = f"{name or 'the model'} is a {type(module).__name__}"
        if getattr(module, "running_mean", None) is not None:
            raise ValueError(
                f"{kind}, whose running statistics all replicas of a stack would share; "
                "use LayerNorm, GroupNorm or track_running_stats=False")
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            raise ValueError(
                f"{kind} with p = {module.p}, "
                "which draws other numbers in a stack than alone; "
                "build the model with p = 0")
    for name, weights in model.named_parameters():
        if not weights.requires_grad:
            raise ValueError(f"{name} has requires_grad=False; register it as a buffer")

    model.register_forward_hook(
        lambda module, args, output: getattr(output, "logits", output))
    return model.eval()


@functools.lru_cache(64)
def own_shapes(spec, width, shape):
    """The same, its weights on the meta device, tried on two samples.

    ValueError unless logits are finite, of the right shape, and depend on every parameter.
    """
    model = own(spec, width, shape)
    expected = (2, shape.inputs, shape.classes) if shape.text else (2, shape.classes)
    with _blaming(load(spec).path), torch.random.fork_rng(devices=[]):
        x = (torch.zeros(2, shape.inputs, dtype=torch.long) if shape.text
             else torch.randn(2, shape.inputs))
        logits = model(x)

    if not isinstance(logits, torch.Tensor) or logits.shape != expected:
        got = tuple(getattr(logits, "shape", ())) or type(logits).__name__
        raise ValueError(f"{spec} made {got} of a batch {tuple(x.shape)}; "
                         f"it must make logits {expected}")
    if not logits.isfinite().all():
        raise ValueError(f"{spec} makes logits that are not finite at width {width}, "
                         "before any training")
    weights = dict(model.named_parameters())
    grads = torch.autograd.grad(logits.sum(), list(weights.values()), allow_unused=True)
    for name, grad in zip(weights, grads):
        if grad is None:
            raise ValueError(f"the logits of {spec} do not depend on {name}; remove it")
    return put(model, [w.detach().to("meta") for w in weights.values()])


def put(model, weights):
    """The model with these tensors as its parameters, in their order: no copy,
    of any device and dtype, in every place where a tied one is used."""
    new = {id(old): nn.Parameter(w) for old, w in zip(model.parameters(), weights)}
    for module in model.modules():
        module._parameters.update({
            name: new[id(old)]
            for name, old in module._parameters.items() if old is not None})
    return model
