"""Measurements of width scaling: pure functions of modules and tensors, floats out.

The refined coordinate check of Haas, Bordt, von Luxburg, Vankadara, "On the Surprising Effectiveness of Large Learning
Rates under Standard Width Scaling" (arXiv 2505.22491) splits the change of a layer's output exactly in two,

    W_t x_t - W_0 x_0  =  (W_t - W_0) x_t  +  W_0 (x_t - x_0)          effective update + propagating update.

    W_0, x_0    a module's weight and input in `reference`, a copy of the model taken at initialization
    W_t, x_t    the same in `model`, now;  dW = W_t - W_0,  dx = x_t - x_0;  biases are left out throughout
    rms(v)      |v|_2 / sqrt(k) for v in R^k, per sample (or token), then averaged over samples
    |W|_op      operator (spectral) norm;  |W|_F Frobenius norm
    chi         dloss_i/dlogits of sample i

    reference = copy.deepcopy(model); ...train...; print(refined_coordinate_check(model, reference, x))

Measured are nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm, nn.Conv2d and transformers' Conv1D, in any nn.Module
that accepts model(x). Every measurement runs in evaluation mode, and leaves training mode, RNG, .grad and hooks as they
were. A diverged model gives nan. Out of scope: attention scores, sharded models. Needs torch >= 2.4.
"""
import math
import warnings
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


# ---- the two updates of every module, from one forward pass of each model ----

class Layer(NamedTuple):
    """One module at one batch. Rows are samples, tokens or (Conv2d) image patches, of all the module's calls."""
    w0: torch.Tensor                        # (fan_out, fan_in); a norm's gains (fan,); Embedding (vocabulary, fan_out)
    dw: torch.Tensor                        # W_t - W_0
    x: torch.Tensor                         # x_t (N, fan_in); norms: the normalised input; Embedding: token ids (N,)
    dx: Optional[torch.Tensor]              # x_t - x_0; None for an Embedding
    effective: torch.Tensor                 # dW x_t (N, fan_out)
    propagating: Optional[torch.Tensor]     # W_0 dx (N, fan_out); None for an Embedding


def updates(model, reference, x):
    """{module name: Layer}: the effective and propagating update vectors, to be shared by the measurements below.

    They are computed as products with dW and dx, in at least float32, not as differences of outputs, which lose the
    digits of updates that are small at large width. A module called several times has the rows of all its calls. What
    owns parameters but is never called, or is of a kind not measured, is left out and named in a warning. ValueError
    where the two models differ in modules, shapes or number of calls. reference: a model, or capture(reference, x).
    """
    model = _eager(model)
    now, then, layers = capture(model, x), reference if isinstance(reference, dict) else capture(reference, x), {}
    for name in now | then:
        shapes = [[tuple(tensor.shape) for tensor in side.get(name, ())] for side in (now, then)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"module {name!r} has [weight, inputs] of shapes {shapes[0]} in the model but {shapes[1]} "
                             "in the reference: pass a copy of the same architecture and width, with the same calls")
        (w, xt), (w0, x0) = now[name], then[name]
        embedding = not xt.is_floating_point()
        dw, dx = w - w0, None if embedding else xt - x0
        layers[name] = Layer(w0, dw, xt, dx, _multiply(dw, xt), None if embedding else _multiply(w0, dx))
    left_out = [f"{name or 'the model itself'} ({type(module).__name__})" for name, module in model.named_modules()
                if name not in now and next(module.parameters(recurse=False), None) is not None]
    if left_out:
        warnings.warn(f"not measured, as never called or of an unknown kind: {', '.join(left_out)}", stacklevel=3)
    return layers


def capture(model, x):
    """{module name: (weight, input rows)} of one forward pass; of a reference that is measured against often, taken once."""
    model = _eager(model)
    weights = {name: _weight(module) for name, module in model.named_modules() if _weight(module) is not None}
    rows, handles = {}, []

    def keep(name, module, args, kwargs):               # a copy, since what follows may work in place
        rows.setdefault(name, []).append(_rows(module, args[0] if args else next(iter(kwargs.values()))).clone())

    try:
        for name in weights:
            hook = partial(keep, name)
            handles.append(model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True))
        with _undisturbed(model), torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return {name: (weights[name], torch.cat(calls)) for name, calls in rows.items()}


def _weight(module):
    """The weight that multiplies _rows(module, x); None if the module's output (bias aside) is not that product.

    Kinds are told by the class's forward, lest a subclass that computes something else pass for its parent. To measure
    a class of your own, add it here and, where its input is not a plain vector, to _rows.
    """
    weight, forward = getattr(module, "weight", None), type(module).forward
    if not isinstance(weight, torch.Tensor):
        return None
    weight = _wide(weight.detach())
    if forward in (nn.Linear.forward, nn.Embedding.forward):
        return weight
    if forward in (nn.LayerNorm.forward, nn.RMSNorm.forward):
        return weight.flatten()
    if forward is nn.Conv2d.forward:
        plain = module.groups == 1 and module.padding_mode == "zeros" and module.padding != "same"
        return weight.flatten(1) if plain else None                         # (C_out, C_in kh kw)
    return weight.T if type(module).__name__ == "Conv1D" and weight.ndim == 2 else None     # transformers': (in, out)


def _rows(module, x):
    """What the weight multiplies, (N, fan_in); token ids (N,) for an Embedding."""
    if isinstance(module, nn.Embedding):
        return x.flatten()
    x = _wide(x)
    if isinstance(module, nn.Conv2d):
        padding = 0 if module.padding == "valid" else module.padding
        patches = F.unfold(x, module.kernel_size, module.dilation, padding, module.stride)  # (B, C_in kh kw, patches)
        return patches.transpose(1, 2).flatten(0, 1)
    if isinstance(module, nn.LayerNorm):
        x = F.layer_norm(x, module.normalized_shape, eps=module.eps)
    elif isinstance(module, nn.RMSNorm):
        x = F.rms_norm(x, module.normalized_shape, eps=module.eps)
    return x.reshape(-1, _weight(module).shape[-1])


def _multiply(weight, rows):
    if not rows.is_floating_point():
        return weight[rows]                                                 # Embedding: one-hot rows
    rows = rows.to(weight.dtype)
    return rows * weight if weight.ndim == 1 else rows @ weight.T


def _wide(tensor):
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _eager(model):
    return getattr(model, "_orig_mod", model)           # compiled code skips new hooks and has no second derivative


@contextmanager
def _undisturbed(model):
    """Evaluation mode inside; every submodule's own mode and the RNG state as before after it."""
    modes = {module: module.training for module in model.modules()}
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    try:
        for module in modes:
            module.training = False
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


# ---- refined coordinate check, alignment, statistics of layers and logits ----

def refined_coordinate_check(model, reference, x, layers=None):
    """{module name: {"effective", "propagating", "input", "input_change"}}: rms of dW x_t, W_0 dx, x_t and dx.

    These are the `.weight` norms of the package torch-module-monitor, divided by sqrt(fan_out), sqrt(fan_in). The input
    is what the weight multiplies: after normalisation for a norm's gains, the patch for a Conv2d. An Embedding has an
    effective update only: nan. `layers`: the result of updates(model, reference, x), where it is at hand.
    """
    layers = updates(model, reference, x) if layers is None else layers
    return _floats({name: {"effective": _rms(layer.effective), "propagating": _rms(layer.propagating),
                           "input": None if layer.dx is None else _rms(layer.x), "input_change": _rms(layer.dx)}
                    for name, layer in layers.items()})


def alignment(model, reference, x, layers=None, reference_norms=None):
    """{module name: {"rms_update", "operator_update", "operator_propagating"}}, per sample, averaged; 1 is the most:

        |dW x_t| / (|dW|_F |x_t|),     |dW x_t| / (|dW|_op |x_t|),     |W_0 dx| / (|W_0|_op |dx|).

    Samples with a zero denominator do not count; where all have one (dW = 0 at initialization, dx = 0 in the first
    layer) the ratio is undefined: nan. An Embedding has one-hot inputs, |x_t| = 1, and no propagating update: nan.
    `reference_norms`: a dict that the caller keeps, {} at first, so that each |W_0|_op is computed only once.
    """
    layers, rows = updates(model, reference, x) if layers is None else layers, {}
    reference_norms = {} if reference_norms is None else reference_norms
    for name, layer in layers.items():
        update = layer.effective.norm(dim=-1)                               # (N,)
        size = torch.ones_like(update) if layer.dx is None else layer.x.norm(dim=-1)
        rows[name] = {"rms_update": _mean_ratio(update, layer.dw.norm() * size),
                      "operator_update": _mean_ratio(update, operator_norm(layer.dw) * size),
                      "operator_propagating": None}
        if layer.dx is not None:
            if name not in reference_norms:
                reference_norms[name] = operator_norm(layer.w0)
            largest = reference_norms[name] * layer.dx.norm(dim=-1)
            rows[name]["operator_propagating"] = _mean_ratio(layer.propagating.norm(dim=-1), largest)
    return _floats(rows)


def layer_statistics(model, reference, x, layers=None):
    """{module name: {"output", "output_change", "dead_inputs"}}: rms of W_t x_t and of W_t x_t - W_0 x_0, and the
    fraction of input units that are exactly zero for every sample: of dead ReLUs before (nan for an Embedding).

    Activations after the nonlinearity are the next module's "input" in the refined coordinate check.
    """
    layers = updates(model, reference, x) if layers is None else layers
    return _floats({name: {
        "output": _rms(layer.effective + _multiply(layer.w0, layer.x)),
        "output_change": _rms(layer.effective if layer.dx is None else layer.effective + layer.propagating),
        "dead_inputs": None if layer.dx is None else (layer.x == 0).all(dim=0).float().mean(),
    } for name, layer in layers.items()})


def gradient_norms(model, loss_fn, x, y):
    """{parameter name: |dloss/dW|_F} of the scalar loss_fn(model(x), y), for every trainable parameter."""
    parameters, gradients = _gradients(model, loss_fn, x, y)
    return _floats({"": {name: gradient.norm() for name, gradient in zip(parameters, gradients)}})[""]


def logit_statistics(logits, targets, loss_fn):
    """{"rms", "margin", "chi"} of logits (..., K) at class indices (...), averaged over samples.

    margin: true logit minus the largest other. chi: rms over classes of dloss_i/dlogits, where loss_fn(logits, targets)
    is the mean over samples of loss_i.
    """
    _check_classes(logits, targets)
    logits, index = _wide(logits.detach()).requires_grad_(), targets.unsqueeze(-1)
    with torch.enable_grad():
        chi, = torch.autograd.grad(loss_fn(logits, targets), logits)
    logits, chi = logits.detach(), chi * targets.numel()                    # undo the mean's 1/N
    margin = logits.gather(-1, index).squeeze(-1) - logits.scatter(-1, index, -math.inf).amax(dim=-1)
    return _floats({"": {"rms": _rms(logits), "margin": margin.mean(), "chi": _rms(chi)}})[""]


def _check_classes(logits, targets):
    if targets.shape != logits.shape[:-1] or targets.numel() == 0:
        raise ValueError(f"logits {tuple(logits.shape)} with targets {tuple(targets.shape)}: "
                         "need (..., K) with class indices (...)")


def _rms(rows):
    return None if rows is None else rows.norm(dim=-1).mean() / math.sqrt(rows.shape[-1])


def _mean_ratio(numerator, denominator):
    counts = denominator != 0                                               # nan counts: divergence must show
    return torch.where(counts, numerator / denominator, 0).sum() / counts.sum()


def _floats(rows):
    """{name: {key: 0-d tensor, or None for nan}} as floats, in one transfer from the device."""
    values = [value for row in rows.values() for value in row.values() if value is not None]
    numbers = iter(torch.stack(values).tolist() if values else ())
    return {name: {key: math.nan if value is None else next(numbers) for key, value in row.items()}
            for name, row in rows.items()}


# ---- largest eigenvalues: operator norm and sharpness ----

def operator_norm(weight, tolerance=1e-3, max_steps=300):
    """Largest singular value of a matrix, to 1e-3 relative or better, as a float; never a full SVD.

    Block Lanczos (power iteration that keeps its past iterates) on W^T W or W W^T, whichever is smaller, until the
    residual is below `tolerance` relative. Deterministic, without the global RNG. A vector stands for a diagonal matrix
    (a norm's gains); more than two dimensions are flattened to (fan_out, rest). nan where W is not finite.
    """
    weight = _wide(weight.detach())
    scale = weight.abs().max()
    if weight.ndim < 2:
        return scale.item()
    matrix = weight.flatten(1)
    matrix = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T     # (larger, smaller)
    unit = scale.clamp_min(torch.finfo(weight.dtype).tiny)                  # squares of tiny updates would underflow

    def gram(rows):                                                         # (b, smaller)
        return (rows @ matrix.T / unit) @ matrix / unit

    # Two vectors: one that happens to miss the top direction may settle on the next (seen in 1 of 2000 dense spectra).
    square = _top_eigenvalue(gram, matrix.shape[1], scale, tolerance, max_steps, block=2)
    return scale.item() * math.sqrt(max(square, 0.0))


def sharpness(model, loss_fn, x, y, preconditioner=None, tolerance=1e-4, max_steps=200):
    """Largest (most positive) Hessian eigenvalue of the scalar loss_fn(model(x), y) over the trainable parameters.

    With `preconditioner` P > 0, {parameter name: tensor} or a list in the order of the trainable parameters, that of
    P^-1/2 H P^-1/2; for Adam P = sqrt(v / (1 - beta2^t)) + eps (Cohen et al., arXiv 2207.14484). Lanczos on Hessian-
    vector products until the residual is below `tolerance` relative; each of at most `max_steps` steps keeps one vector
    of the parameters' size. BatchNorm counts by its running statistics. ValueError for a loss that is not a scalar, or
    a preconditioner that does not fit or is not positive.
    """
    parameters, gradients = _gradients(model, loss_fn, x, y, create_graph=True)
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    scale = 1.0 if preconditioner is None else _inverse_root(preconditioner, parameters)
    if not flat.requires_grad:                                              # the loss is linear in the parameters
        return 0.0

    def hessian(rows):                                                      # (1, parameters)
        products = torch.autograd.grad(flat, list(parameters.values()), scale * rows[0], retain_graph=True,
                                       materialize_grads=True)
        return scale * torch.cat([product.flatten() for product in products])[None]

    return _top_eigenvalue(hessian, len(flat), flat.detach(), tolerance, max_steps, block=1)


def _gradients(model, loss_fn, x, y, create_graph=False):
    """({name: trainable parameter}, their gradients); .grad is not touched."""
    model = _eager(model)
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    # Fused attention kernels have no second derivative.
    with _undisturbed(model), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        loss = loss_fn(model(x), y)
        if loss.ndim != 0:
            raise ValueError(f"loss_fn must return a scalar, not shape {tuple(loss.shape)}: reduce it, by its mean say")
        return parameters, torch.autograd.grad(loss, list(parameters.values()), create_graph=create_graph,
                                               materialize_grads=True)


def _inverse_root(preconditioner, parameters):
    """P^-1/2, flattened in the order of the parameters."""
    if not isinstance(preconditioner, dict):
        preconditioner = dict(zip(parameters, preconditioner))
    for name, parameter in parameters.items():
        entry = preconditioner.get(name)
        if entry is None or entry.shape != parameter.shape or not (entry > 0).all():
            raise ValueError(f"preconditioner of {name!r} must be a positive tensor of shape {tuple(parameter.shape)}")
    return torch.cat([preconditioner[name].detach().flatten() for name in parameters]).rsqrt()


def _top_eigenvalue(multiply, n, like, tolerance, max_steps, block):
    """Largest eigenvalue of a symmetric map A on R^n, given as multiply(rows (b, n)) -> (b, n).

    Block Lanczos with full reorthogonalisation: V (k, n), with orthonormal rows, grows by A times its newest block. The
    top eigenvalue of T = V A V^T, with eigenvector s, is off an eigenvalue of A by at most the residual |L^T s_newest|,
    where L Q is what the newest block's image has outside V. Read every fourth row: the only transfers from the device.
    """
    generator = torch.Generator(like.device).manual_seed(0)
    noise = partial(torch.randn, generator=generator, device=like.device, dtype=like.dtype)
    eps, limit, size, largest = torch.finfo(like.dtype).eps, min(n, max_steps), 0, like.new_zeros(())
    basis, t = like.new_empty(min(n, 16), n), like.new_zeros(limit, limit + block)
    new = _orthonormal(noise(min(block, limit), n))[0]
    while True:
        newest, size = slice(size, size + len(new)), size + len(new)
        if size > len(basis):
            basis = torch.cat([basis, torch.empty_like(basis)])
        basis[newest] = new
        v, image = basis[:size], multiply(new)                              # (size, n), (b, n)
        t[newest, :size] = image @ v.T
        largest = torch.maximum(largest, image.norm())
        # Where A maps V into itself only rounding is left outside: noise of that size gives a fresh direction then.
        outside = image - t[newest, :size] @ v + 8 * eps / math.sqrt(n) * largest * noise(len(new), n)
        new, t[newest, size:size + len(new)] = _orthonormal(outside)
        if size % 4 == 0 or size == limit:
            corner = t[:size, :size + len(new)].cpu().double()
            if not corner.isfinite().all():
                return math.nan
            values, vectors = torch.linalg.eigh(corner[:, :size])           # reads T's lower triangle
            value, residual = values[-1].item(), (vectors[newest, -1] @ corner[newest, size:]).norm().item()
            if size == n or residual <= max(tolerance * abs(value), 16 * eps * values.abs().max().item()):
                return value
            if size == limit:
                warnings.warn(f"eigenvalue {value:.3g} has residual {residual:.1g}: raise {max_steps=}", stacklevel=3)
                return value
        new = _orthonormal(new - new @ v.T @ v)[0][:limit - size]           # again, since rounding left some of V in it


def _orthonormal(rows):
    """(Q, L) with rows = L Q and orthonormal rows of Q."""
    q, r = torch.linalg.qr(rows.T)
    return q.T, r.T


# ---- calibration and exponents ----

def expected_calibration_error(logits, targets, bins=15):
    """sum_b (n_b / N) |accuracy_b - confidence_b| (Guo et al., arXiv 1706.04599), logits (..., K), class indices (...).

    Bin b holds the n_b samples whose top softmax probability lies in ((b-1)/bins, b/bins].
    """
    _check_classes(logits, targets)
    confidence, prediction = _wide(logits.detach()).flatten(0, -2).softmax(dim=-1).max(dim=-1)     # (N,)
    excess = (prediction == targets.flatten()).to(confidence.dtype) - confidence
    edges = torch.linspace(0, 1, bins + 1, dtype=confidence.dtype, device=confidence.device)
    sums = excess.new_zeros(bins).index_add_(0, torch.bucketize(confidence, edges[1:-1]), excess)
    return (sums.abs().sum() / len(excess)).item()


def fit_exponent(widths, values):
    """(slope, intercept) of least squares on natural logs: values are about exp(intercept) * widths**slope.

    values (W,), or (S, W) for S seeds: then the line is fitted to the mean over seeds of the logs. ValueError for
    values that are not finite and positive, naming them, and for fewer than two distinct widths.
    """
    log_n, logs = _logs(widths, values)
    slope = _slope_weights(log_n) @ logs.mean(dim=0)
    return slope.item(), (logs.mean() - slope * log_n.mean()).item()


def exponent_interval(widths, values, level=0.95, resamples=2000, seed=0, resolution=1.0):
    """Bootstrap interval (low, high) of fit_exponent's slope, for values (S, W) of S seeds.

    Resampling whole seeds covers far too rarely with few of them (three: 74 % in place of 95 %). Instead the logs'
    deviations from their width's mean are pooled and resampled, which takes runs of different widths for independent
    and equally noisy; scaled by sqrt(S W / d), d = W (S-1), for an unbiased variance; and each resample is divided by
    sqrt(chi2_d / d): Student's t in place of the normal. One seed: the deviations are those from the line, d = W-2, and
    (nan, nan) with two widths. `resolution`: factor between neighbours of the grid the values were read from, a number
    or (W,); each resample moves its values uniformly within one such step, in log.
    """
    log_n, logs = _logs(widths, values)
    weights, (seeds, count) = _slope_weights(log_n), logs.shape
    slope, mean = weights @ logs.mean(dim=0), logs.mean(dim=0)
    freedom = count * (seeds - 1)
    if seeds == 1:
        mean, freedom = logs.mean() + slope * (log_n - log_n.mean()), count - 2
    if freedom == 0:
        return math.nan, math.nan
    generator, exact = torch.Generator().manual_seed(seed), {"dtype": torch.float64}
    deviations = (logs - mean).flatten() * math.sqrt(seeds * count / freedom)
    picks = torch.randint(seeds * count, (resamples, seeds, count), generator=generator)
    chi2 = torch.randn(resamples, freedom, generator=generator, **exact).square().sum(dim=1, keepdim=True)
    within_step = torch.rand(resamples, count, generator=generator, **exact) - 0.5
    draws = deviations[picks].mean(dim=1) / (chi2 / freedom).sqrt()                         # (resamples, W)
    draws = draws + within_step * torch.as_tensor(resolution, **exact).log()
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], **exact)
    return tuple((slope + draws @ weights).quantile(tails).tolist())


def _logs(widths, values):
    """Natural logs of widths (W,) and values (S, W), checked, in float64."""
    widths = torch.as_tensor(widths, dtype=torch.float64, device="cpu")
    values = torch.atleast_2d(torch.as_tensor(values, dtype=torch.float64, device="cpu"))
    if widths.ndim != 1 or values.ndim != 2 or values.shape[1] != len(widths) or len(values) == 0:
        raise ValueError(f"widths {tuple(widths.shape)}, values {tuple(values.shape)}: need (W,) and (W,) or (S, W)")
    for name, tensor in (("widths", widths), ("values", values)):
        bad = tensor[~(tensor.isfinite() & (tensor > 0))].tolist()
        if bad:
            raise ValueError(f"{name} must be finite and positive to have an exponent, not {bad}: leave those out")
    if len(widths.unique()) < 2:
        raise ValueError(f"an exponent needs at least two distinct widths, not {widths.tolist()}")
    return widths.log(), values.log()


def _slope_weights(log_n):
    centred = log_n - log_n.mean()
    return centred / (centred @ centred)                                    # slope = weights @ logs
