"""Measurements of width scaling: modules and tensors in, floats out.

The refined coordinate check of arXiv 2505.22491 (Haas, Bordt, von Luxburg,
Vankadara) splits the change of a layer's output in an effective and a
propagating update,

    W_t x_t - W_0 x_0  =  (W_t - W_0) x_t  +  W_0 (x_t - x_0).

    W_0, x_0  a module's weight and input in `reference`, a copy from initialization
    W_t, x_t  the same in `model`; dW = W_t - W_0, dx = x_t - x_0; biases left out
    rms(v)    |v|_2 / sqrt(k) for v in R^k, per sample or token, averaged over them
    |W|_op    operator (spectral) norm
    chi       dloss_i/dlogits of sample i

    reference = copy.deepcopy(model)
    ...  # training
    print(refined_coordinate_check(model, reference, x))

x is what the model takes: a tensor, a tuple of arguments or a dict of keyword
arguments. Measured are nn.Linear, Embedding, LayerNorm, RMSNorm, Conv2d,
transformers' Conv1D and other packages' RMSNorms, in evaluation mode. Modes,
buffers, random generators, .grad and hooks stay as they were. A diverged model
gives nan. Needs torch >= 2.4 only; can be copied alone. Out of scope: attention
scores, sharded models.
"""
import inspect
import math
import warnings
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


# ---- the two updates of every module, from one forward pass of each model ----

class Layer(NamedTuple):
    """One module at one batch: N samples, tokens or patches, of all its calls."""
    w0: Tensor                      # (fan_out, fan_in); gains (fan,); Embedding (V, fan_out)
    dw: Tensor                      # W_t - W_0
    x: Tensor                       # x_t (N, fan_in), normalized for gains; token ids (N,)
    dx: Tensor | None               # x_t - x_0; None for an Embedding
    effective: Tensor               # dW x_t (N, fan_out)
    propagating: Tensor | None      # W_0 dx (N, fan_out); None for an Embedding


def updates(model, reference, x):
    """Return {module name: Layer}, for the measurements below to share.

    Products with dW and dx are taken in float32 or wider, as differences of
    outputs lose the digits of small updates. Rows are paired in the order in which
    a module sees them; warns of modules that see more or fewer in the reference, or
    are not measured for other reasons. ValueError where weights differ in shape.
    reference: a model, or capture(reference, x).
    """
    model = _uncompiled(model)
    now = capture(model, x)
    then = reference if isinstance(reference, dict) else capture(reference, x)
    layers = {}
    for name, (w, xt) in now.items():
        w0, x0 = then.get(name, (w, None))
        if w.shape != w0.shape:
            raise ValueError(
                f"module {name!r} has a weight of shape {tuple(w.shape)} "
                f"in the model but {tuple(w0.shape)} in the reference: "
                "pass a copy of the same architecture and width")
        if x0 is None or len(xt) != len(x0):
            continue                # the warning below names it
        dw, dx, propagating = w - w0, None, None
        if xt.is_floating_point():
            dx = xt - x0
            propagating = _multiply(w0, dx)
        layers[name] = Layer(w0, dw, xt, dx, _multiply(dw, xt), propagating)

    left_out = ", ".join(_left_out(model, layers))
    if left_out:
        warnings.warn("not measured, as never called or not on as many samples as in the "
                      f"reference, or of an unknown kind: {left_out}", stacklevel=3)
    return layers


def capture(model, x):
    """Return {module name: (weight, input rows)} of one forward pass.

    The weights share the parameters' memory: of a model that trains on, capture a copy.
    """
    model = _uncompiled(model)
    weights, rows = {}, {}

    def keep(name, module, args, kwargs):
        weight = _weight(module)
        if weight is not None:
            weights[name] = weight
            module_input, *_ = *args, *kwargs.values()
            # a copy, since what follows may work in place
            rows.setdefault(name, []).append(_rows(module, weight, module_input).clone())

    with ExitStack() as hooks, _undisturbed(model) as forward, torch.no_grad():
        for name, module in model.named_modules():
            hook = partial(keep, name)
            hooks.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))
        forward(x)
    return {name: (weights[name], torch.cat(calls)) for name, calls in rows.items()}


def _weight(module):
    """Return the weight matrix W of a module that computes W x + bias, else None.

    The class's forward tells the kind, since a subclass may compute something
    else. A class of your own goes here and, if its input is no plain vector, into
    _rows.
    """
    weight, forward = getattr(module, "weight", None), type(module).forward
    if not isinstance(weight, Tensor) or "weight" in module._buffers:   # those are not trained
        return None
    weight = _at_least_float32(weight.detach())
    if forward in (nn.Linear.forward, nn.Embedding.forward):
        return weight
    if forward in (nn.LayerNorm.forward, nn.RMSNorm.forward):
        return weight.flatten()
    if forward is nn.Conv2d.forward:
        zeros = module.padding_mode == "zeros" and module.padding != "same"
        plain = zeros and module.groups == 1
        return weight.flatten(1) if plain else None         # (C_out, C_in kh kw)
    if type(module).__name__ == "Conv1D" and weight.ndim == 2:
        return weight.T                                     # transformers': (in, out)
    return weight if _is_rms_norm(module) else None


def _is_rms_norm(module):
    """Whether the module computes weight * x / rms(x), as Llama's, Qwen's and T5's do.

    Gemma's has 1 + weight. Other gains and inputs than the model's own tell them
    apart, as those may hide it.
    """
    is_named_so = type(module).__name__.endswith(("RMSNorm", "T5LayerNorm"))
    if not is_named_so or [tensor.ndim for tensor in module.parameters(recurse=False)] != [1]:
        return False
    if len(inspect.signature(module.forward).parameters) > 1:
        return False                            # a gate, a residual

    weight = module.weight
    gains = torch.linspace(1, 2, len(weight), device=weight.device)
    x = 3 * gains - 4                           # of both signs, mean not zero
    x = torch.stack([x, 1e-3 * x])[None]        # (1, 2, fan), small for eps to show
    module._parameters["weight"] = nn.Parameter(gains)
    try:
        with torch.no_grad():
            return torch.allclose(module.forward(x), gains * _over_rms(module, x), rtol=1e-5)
    except (RuntimeError, IndexError, TypeError):           # made for images, say
        return False
    finally:
        module._parameters["weight"] = weight


def _over_rms(norm, x):
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return F.rms_norm(x, norm.weight.shape, eps=eps)


def _rows(module, weight, x):
    """Return what the weight multiplies, (N, fan_in); token ids (N,) for an Embedding."""
    if isinstance(module, nn.Embedding):
        return x.flatten()
    x = _at_least_float32(x)
    if isinstance(module, nn.Conv2d):
        padding = 0 if module.padding == "valid" else module.padding
        patches = F.unfold(x, module.kernel_size, module.dilation,
                           padding, module.stride)          # (B, C_in kh kw, patches)
        return patches.transpose(1, 2).flatten(0, 1)
    if isinstance(module, nn.LayerNorm):
        x = F.layer_norm(x, module.normalized_shape, eps=module.eps)
    elif weight.ndim == 1:
        x = _over_rms(module, x)
    return x.reshape(-1, weight.shape[-1])


def _multiply(weight, rows):
    if not rows.is_floating_point():
        return weight[rows]         # an Embedding's rows are one-hot
    rows = rows.to(weight.dtype)
    return rows * weight if weight.ndim == 1 else rows @ weight.T


def _left_out(model, layers):
    for name, module in model.named_modules():
        # What a parametrization owns (spectral_norm's) is measured as its module's weight.
        owner = f".{name}".partition(".parametrizations.")[0][1:]
        if owner not in layers and any(True for _ in module.parameters(recurse=False)):
            yield f"{name or 'the model itself'} ({type(module).__name__})"


def _at_least_float32(tensor):
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _uncompiled(model):     # compiled code skips later hooks and has no second derivative
    return getattr(model, "_orig_mod", model)


@contextmanager
def _undisturbed(model):
    """Yield x -> model(x) in evaluation mode on copies of the buffers.

    Modes and random generators are restored.
    """
    model = _uncompiled(model)
    modes = {module: module.training for module in model.modules()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    devices = {tensor.device for tensor in model.parameters() if tensor.is_cuda}

    def forward(x):
        if isinstance(x, dict):
            return torch.func.functional_call(model, buffers, kwargs=x)
        return torch.func.functional_call(model, buffers, x)    # one argument, or a tuple of them

    try:
        for module in modes:
            module.training = False
        with torch.random.fork_rng(devices=devices):
            yield forward
    finally:
        for module, mode in modes.items():
            module.training = mode


# ---- refined coordinate check, alignment, and all that is tracked of one step ----

def refined_coordinate_check(model, reference, x, layers=None):
    """Return {module name: {"effective", "propagating", "input", "input_change"}}.

    The rms of dW x_t, W_0 dx, x_t and dx: torch-module-monitor's `.weight`
    norms over sqrt(fan_out), sqrt(fan_in). The input is what the weight
    multiplies. An Embedding has an effective update only, else nan. `layers`:
    updates(model, reference, x).
    """
    return {name: {
        "effective": _rms(layer.effective),
        "propagating": _rms(layer.propagating),
        "input": _rms(layer.x),
        "input_change": _rms(layer.dx),
    } for name, layer in (layers or updates(model, reference, x)).items()}


def alignment(model, reference, x, layers=None, norm_cache=None):
    """Return {module name: {"operator_update", "operator_propagating"}}, at most 1:

        |dW x_t| / (|dW|_op |x_t|)  and  |W_0 dx| / (|W_0|_op |dx|),

    averaged over samples. Zero denominators do not count; nan where all are, as
    at initialization or for dx in the first layer. An Embedding's inputs are
    one-hot, |x_t| = 1, and do not change: nan. `norm_cache`: a dict, {} at
    first, that keeps each |W_0|_op.
    """
    norms, rows = {} if norm_cache is None else norm_cache, {}
    for name, layer in (layers or updates(model, reference, x)).items():
        update = layer.effective.norm(dim=-1)       # (N,)
        size, propagating = torch.ones_like(update), math.nan
        if layer.dx is not None:
            size = layer.x.norm(dim=-1)
            if name not in norms:
                norms[name] = operator_norm(layer.w0)
            largest = norms[name] * layer.dx.norm(dim=-1)
            propagating = _mean_ratio(layer.propagating.norm(dim=-1), largest)
        rows[name] = {
            "operator_update": _mean_ratio(update, operator_norm(layer.dw) * size),
            "operator_propagating": propagating,
        }
    return rows


def measurements(model, reference, x, y, loss, initial_logits, norm_cache=None, kernels=False):
    """Yield what a sweep tracks: a dict per module, and one for the logits.

    reference: capture(model, x) at initialization. loss(logits, y) -> (loss per
    sample, chi). A module's dict has its name as "module", its place in the
    model's order as "layer", the refined coordinate check and, if there is a
    norm_cache, the alignments; kernels adds the upper triangle of h h^T / k of its
    inputs h (N, k), from the second module on. The logits' dict, of module "", has
    the mean loss, the rms of the logits' change since initial_logits, of the logits
    and of chi.
    """
    layers = updates(model, reference, x)
    check = refined_coordinate_check(model, reference, x, layers)
    aligned = ({} if norm_cache is None
               else alignment(model, reference, x, layers, norm_cache))
    for layer, name in enumerate(layers):
        row = {"module": name, "layer": layer, **check[name], **aligned.get(name, {})}
        if kernels and layer > 0:
            h = layers[name].x
            kernel = (h @ h.T / h.shape[1])[torch.triu_indices(len(h), len(h)).unbind()]
            row["kernel"] = [float(f"{entry:.6g}") for entry in kernel.tolist()]
        yield row

    with _undisturbed(model) as forward, torch.no_grad():
        logits = forward(x)
        losses, chi = loss(logits, y)
    change = (logits - initial_logits).square().mean(-1).sqrt().mean()
    yield {"module": "", "layer": len(layers), "loss": losses.mean().item(),
           "change": change.item(), "rms": _rms(logits), "chi": _rms(chi)}


def _rms(rows):
    """Return the mean over rows (..., k) of their rms; nan for an Embedding's token ids."""
    if rows is None or not rows.is_floating_point():
        return math.nan
    return (rows.norm(dim=-1).mean() / math.sqrt(rows.shape[-1])).item()


def _mean_ratio(numerator, denominator):
    counts = denominator != 0       # nan counts: divergence must show
    ratios = torch.where(counts, numerator / denominator, 0)
    return (ratios.sum() / counts.sum()).item()


# ---- largest eigenvalues: operator norm and sharpness ----

def operator_norm(weight):
    """Return the largest singular value of a matrix, to 1e-3 relative or better.

    Lanczos on the smaller of W^T W and W W^T, never a full SVD; deterministic. A
    vector stands for a diagonal matrix (gains); more dimensions are flattened to
    (fan_out, rest). nan or inf where W is not finite.
    """
    weight = _at_least_float32(weight.detach())
    scale = weight.abs().max()
    if weight.ndim < 2 or not 0 < scale < math.inf:
        return scale.item()
    matrix = weight.flatten(1) / scale      # squares of 1e36 or 1e-42 would leave float32
    if matrix.shape[0] < matrix.shape[1]:
        matrix = matrix.T           # (larger, smaller)
    square = _largest_eigenvalue(lambda v: (matrix @ v) @ matrix, matrix[0])
    return scale.item() * math.sqrt(max(square, 0.0))


def sharpness(model, loss_fn, x, y):
    """Return the largest (most positive) Hessian eigenvalue of loss_fn(model(x), y).

    Over the trainable parameters, by Lanczos to 1e-3 relative; a step is one
    product with the Hessian. ValueError for a loss that is not a scalar.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]

    def gradient(output, *args, **kwargs):      # flat
        grads = torch.autograd.grad(output, parameters, *args, **kwargs, materialize_grads=True)
        return torch.cat([grad.flatten() for grad in grads])

    # Fused attention kernels have no second derivative.
    with _undisturbed(model) as forward, torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        loss = loss_fn(forward(x), y)
        if loss.ndim != 0:
            raise ValueError(
                f"loss_fn must return a scalar, not shape {tuple(loss.shape)}: "
                "take its mean, say")
        flat = gradient(loss, create_graph=True)
    if not flat.requires_grad:      # the loss is linear in the parameters
        return 0.0
    return _largest_eigenvalue(lambda v: gradient(flat, v, retain_graph=True), flat.detach())


def _largest_eigenvalue(multiply, like, tolerance=1e-4, max_steps=300):
    """Return the largest eigenvalue of a symmetric map v -> multiply(v) on vectors like `like`.

    Lanczos with full reorthogonalization: V (k, n) has orthonormal rows that span
    the images of a random start, and T = V A V^T is tridiagonal, with diagonal α
    and β beside it. T's largest eigenvalue is off by at most β_k |s|, with s the
    last entry of its eigenvector. Where β_k is rounding error, V is all that the
    map can reach. At least 24 steps are taken, since a start that all but misses the
    largest direction converges to the next one first. nan where the map is not finite.
    """
    n, eps = len(like), torch.finfo(like.dtype).eps
    generator = torch.Generator(like.device).manual_seed(0)
    v = torch.randn(n, generator=generator, device=like.device, dtype=like.dtype)
    basis = like.new_empty(min(n, max_steps), n)
    alphas, betas = [], [v.norm().item()]
    for k in range(len(basis)):
        basis[k] = v / betas[-1]
        v = multiply(basis[k])
        alpha, known = basis[k] @ v, basis[:k + 1]
        for _ in range(2):          # since rounding leaves some of V the first time
            v = v - (known @ v) @ known
        alpha, beta = torch.stack([alpha, v.norm()]).tolist()
        if not math.isfinite(alpha + beta):
            return math.nan
        alphas.append(alpha)
        betas.append(beta)

        is_closed = beta <= 8 * eps * math.sqrt(n) * max(map(abs, alphas + betas[1:]))
        if is_closed or k % 4 == 3 or k == len(basis) - 1:
            t = torch.diag(torch.tensor(alphas, dtype=torch.float64))
            t += torch.diag(torch.tensor(betas[1:-1], dtype=torch.float64), -1)
            values, vectors = torch.linalg.eigh(t)          # reads the lower triangle
            largest, residual = values[-1].item(), beta * abs(vectors[-1, -1].item())
            if is_closed or k >= 23 and residual <= tolerance * abs(largest):
                return largest
    if n > max_steps:
        warnings.warn(f"eigenvalue {largest:.3g} has residual {residual:.1g} after "
                      f"{max_steps} steps", stacklevel=3)
    return largest


# ---- calibration ----

def expected_calibration_error(logits, targets, bins=15):
    """Return sum_b (n_b / N) |accuracy_b - confidence_b| (Guo et al., arXiv 1706.04599).

    logits (..., K), class indices (...). Bin b holds the n_b samples whose top
    softmax probability lies in ((b-1)/bins, b/bins].
    """
    if targets.shape != logits.shape[:-1] or targets.numel() == 0:
        raise ValueError(
            f"logits {tuple(logits.shape)} with targets {tuple(targets.shape)}: "
            "need (..., K) with class indices (...)")
    probabilities = _at_least_float32(logits.detach()).flatten(0, -2).softmax(dim=-1)
    confidence, prediction = probabilities.max(dim=-1)  # (N,)
    excess = (prediction == targets.flatten()).to(confidence) - confidence
    edges = torch.linspace(0, 1, bins + 1, dtype=confidence.dtype, device=confidence.device)
    bin_of = torch.bucketize(confidence, edges[1:-1])
    sums = excess.new_zeros(bins).index_add_(0, bin_of, excess)
    return (sums.abs().sum() / len(excess)).item()
