"""Measurements of width scaling: modules and tensors in, floats out.

The refined coordinate check of arXiv 2505.22491 (Haas, Bordt, von Luxburg,
Vankadara) splits the change of a layer's output in an effective and a
propagating update,

    W_t x_t - W_0 x_0  =  (W_t - W_0) x_t  +  W_0 (x_t - x_0).

    W_0, x_0  a module's weight and input in `reference`, a copy from initialization
    W_t, x_t  the same in `model`; dW = W_t - W_0, dx = x_t - x_0; biases left out
    rms(v)    |v|_2 / sqrt(k) for v in R^k, per sample or token, averaged over them
    |W|_op    operator (spectral) norm; |W|_F Frobenius norm
    chi       dloss_i/dlogits of sample i

    reference = copy.deepcopy(model)
    ...  # training
    print(refined_coordinate_check(model, reference, x))

Measured are nn.Linear, Embedding, LayerNorm, RMSNorm, Conv2d, transformers'
Conv1D and other packages' RMSNorms, in any module that takes model(x), in
evaluation mode. Modes, buffers, RNG, .grad and hooks stay as they were. A
diverged model gives nan. Needs torch >= 2.4 only; can be copied alone. Out of
scope: attention scores, sharded models.
"""
import copy
import inspect
import math
import warnings
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from statistics import NormalDist
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
    x: Tensor                       # x_t (N, fan_in), normalised for gains; token ids (N,)
    dx: "Tensor | None"             # x_t - x_0; None for an Embedding
    effective: Tensor               # dW x_t (N, fan_out)
    propagating: "Tensor | None"    # W_0 dx (N, fan_out); None for an Embedding


def updates(model, reference, x):
    """{module name: Layer}, for the measurements below to share.

    Products with dW and dx in float32 or wider: differences of outputs lose the
    digits of small updates. Warns of modules with parameters that are not
    measured. ValueError where the models differ in modules, shapes or number of
    calls. reference: a model, or capture(reference, x).
    """
    model = _eager(model)
    now = capture(model, x)
    then = reference if isinstance(reference, dict) else capture(reference, x)
    layers = {}
    for name in now | then:
        sides = now.get(name, ()), then.get(name, ())
        ours, theirs = ([tuple(tensor.shape) for tensor in side] for side in sides)
        if ours != theirs:
            raise ValueError(
                f"module {name!r} has [weight, inputs] of shapes {ours} "
                f"in the model but {theirs} in the reference: "
                "pass a copy of the same architecture and width")
        (w, xt), (w0, x0) = sides
        dw, dx, propagating = w - w0, None, None
        if xt.is_floating_point():
            dx = xt - x0
            propagating = _multiply(w0, dx)
        layers[name] = Layer(w0, dw, xt, dx, _multiply(dw, xt), propagating)

    left_out = ", ".join(_left_out(model, layers))
    if left_out:
        message = f"not measured, as never called or of an unknown kind: {left_out}"
        warnings.warn(message, stacklevel=3)
    return layers


def capture(model, x):
    """{module name: (weight, input rows)} of one forward pass, for many updates.

    The weights share the parameters' memory: of a model that trains on, capture a copy.
    """
    model = _eager(model)
    weights, rows = {}, {}

    def keep(name, module, args, kwargs):
        weight = _weight(module)
        if weight is not None:
            weights[name] = weight
            given, *_ = *args, *kwargs.values()
            # what follows may work in place
            row = _rows(module, weight, given).clone()
            rows.setdefault(name, []).append(row)

    with ExitStack() as hooks, _undisturbed(model) as forward, torch.no_grad():
        for name, module in model.named_modules():
            hook = partial(keep, name)
            hooks.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))
        forward(x)
    return {name: (weights[name], torch.cat(calls)) for name, calls in rows.items()}


def _weight(module):
    """What multiplies _rows(module, ...);
    None if the output, bias aside, is not that.

    The class's forward tells the kind: a subclass may compute something else.
    Your own class goes here and, if its input is no plain vector, into _rows.
    """
    weight, forward = getattr(module, "weight", None), type(module).forward
    if not isinstance(weight, Tensor):
        return None
    weight = _wide(weight.detach())
    if forward in (nn.Linear.forward, nn.Embedding.forward):
        return weight
    if forward in (nn.LayerNorm.forward, nn.RMSNorm.forward):
        return weight.flatten()
    if forward is nn.Conv2d.forward:
        zeros = module.padding_mode == "zeros" and module.padding != "same"
        plain = zeros and module.groups == 1
        return weight.flatten(1) if plain else None  # (C_out, C_in kh kw)
    if type(module).__name__ == "Conv1D" and weight.ndim == 2:
        return weight.T  # transformers': (in, out)
    return weight if _is_rms_norm(module) else None


def _is_rms_norm(module):
    """Whether it is weight * x / rms(x): Llama's, Qwen's, T5's;
    Gemma's has 1 + weight.

    Asks a copy with other gains and inputs, as a model's state may hide it.
    """
    named = type(module).__name__.endswith(("RMSNorm", "T5LayerNorm"))
    if not named or [tensor.ndim for tensor in module.parameters(recurse=False)] != [1]:
        return False
    if len(inspect.signature(module.forward).parameters) > 1:
        return False  # a gate, a residual

    twin = copy.deepcopy(module).float()
    gains = torch.linspace(1, 2, len(twin.weight), device=twin.weight.device)
    x = 3 * gains - 4  # of both signs, mean not zero
    x = torch.stack([x, 1e-3 * x])[None]  # (1, 2, fan), small for eps to show
    with torch.no_grad():
        twin.weight.copy_(gains)
        try:
            return torch.allclose(twin.forward(x), gains * _over_rms(twin, x), rtol=1e-5)
        except (RuntimeError, IndexError, TypeError):  # made for images, say
            return False


def _over_rms(norm, x):
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return F.rms_norm(x, norm.weight.shape, eps=eps)


def _rows(module, weight, x):
    """What the weight multiplies, (N, fan_in); token ids (N,) for an Embedding."""
    if isinstance(module, nn.Embedding):
        return x.flatten()
    x = _wide(x)
    if isinstance(module, nn.Conv2d):
        padding = 0 if module.padding == "valid" else module.padding
        patches = F.unfold(x, module.kernel_size, module.dilation,
                           padding, module.stride)  # (B, C_in kh kw, patches)
        return patches.transpose(1, 2).flatten(0, 1)
    if isinstance(module, nn.LayerNorm):
        x = F.layer_norm(x, module.normalized_shape, eps=module.eps)
    elif weight.ndim == 1:
        x = _over_rms(module, x)
    return x.reshape(-1, weight.shape[-1])


def _multiply(weight, rows):
    if not rows.is_floating_point():
        return weight[rows]  # Embedding: one-hot rows
    rows = rows.to(weight.dtype)
    return rows * weight if weight.ndim == 1 else rows @ weight.T


def _left_out(model, layers):
    for name, module in model.named_modules():
        # What a parametrization owns (spectral_norm's)
        # is measured as its module's weight.
        owner = f".{name}".partition(".parametrizations.")[0][1:]
        if (owner not in layers
                and next(module.parameters(recurse=False), None) is not None):
            yield f"{name or 'the model itself'} ({type(module).__name__})"


def _wide(tensor):
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _eager(model):  # compiled code skips later hooks and has no second derivative
    return getattr(model, "_orig_mod", model)


@contextmanager
def _undisturbed(model):
    """x -> model(x) in evaluation mode on copies of the buffers;
    restores modes, RNG.
    """
    modes = {module: module.training for module in model.modules()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    devices = {tensor.device for tensor in model.parameters() if tensor.is_cuda}
    try:
        for module in modes:
            module.training = False
        with torch.random.fork_rng(devices=devices):
            yield lambda x: torch.func.functional_call(model, buffers, (x,))
    finally:
        for module, mode in modes.items():
            module.training = mode


# ---- refined coordinate check, alignment, statistics of layers and logits ----

def refined_coordinate_check(model, reference, x, layers=None):
    """{module name: {"effective", "propagating", "input", "input_change"}}.

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


def alignment(model, reference, x, layers=None, reference_norms=None):
    """{module name: {"rms_update", "operator_update", "operator_propagating"}},
    at most 1:

        |dW x_t| / (|dW|_F |x_t|),  |dW x_t| / (|dW|_op |x_t|),  |W_0 dx| / (|W_0|_op |dx|)

    averaged over samples. Zero denominators do not count; nan where all are, as
    at initialization or for dx in the first layer. An Embedding's inputs are
    one-hot, |x_t| = 1, and do not change: nan. `reference_norms`: a dict, {} at
    first, that keeps each |W_0|_op.
    """
    norms, rows = {} if reference_norms is None else reference_norms, {}
    for name, layer in (layers or updates(model, reference, x)).items():
        update = layer.effective.norm(dim=-1)  # (N,)
        size, propagating = torch.ones_like(update), math.nan
        if layer.dx is not None:
            size = layer.x.norm(dim=-1)
            if name not in norms:
                norms[name] = operator_norm(layer.w0)
            largest = norms[name] * layer.dx.norm(dim=-1)
            propagating = _mean_ratio(layer.propagating.norm(dim=-1), largest)
        rows[name] = {
            "rms_update": _mean_ratio(update, layer.dw.norm() * size),
            "operator_update": _mean_ratio(update, operator_norm(layer.dw) * size),
            "operator_propagating": propagating,
        }
    return rows


def layer_statistics(model, reference, x, layers=None):
    """{module name: {"output", "output_change", "dead_inputs"}}.

    The rms of W_t x_t and of W_t x_t - W_0 x_0; the fraction of inputs that are
    zero for every sample, as of dead ReLUs (nan for an Embedding).
    """
    rows = {}
    for name, layer in (layers or updates(model, reference, x)).items():
        output = layer.effective + _multiply(layer.w0, layer.x)
        change, dead = layer.effective, math.nan
        if layer.dx is not None:
            change = change + layer.propagating
            dead = (layer.x == 0).all(dim=0).float().mean().item()
        rows[name] = {
            "output": _rms(output),
            "output_change": _rms(change),
            "dead_inputs": dead,
        }
    return rows


def logit_statistics(logits, targets, loss_fn):
    """{"rms", "margin", "chi"} of logits (..., K) at class indices (...),
    sample means.

    margin: true logit minus the largest other. chi: rms over classes.
    loss_fn(logits, targets) is the mean of loss_i.
    """
    _check_classes(logits, targets)
    logits = _wide(logits.detach()).requires_grad_()
    with torch.enable_grad():
        chi, = torch.autograd.grad(loss_fn(logits, targets), logits)
    chi = chi * targets.numel()  # undoes the mean's 1/N

    logits, index = logits.detach(), targets.unsqueeze(-1)
    others = logits.scatter(-1, index, -math.inf).amax(dim=-1)
    margin = logits.gather(-1, index).squeeze(-1) - others
    return {
        "rms": _rms(logits),
        "margin": margin.mean().item(),
        "chi": _rms(chi),
    }


def _check_classes(logits, targets):
    if targets.shape != logits.shape[:-1] or targets.numel() == 0:
        raise ValueError(
            f"logits {tuple(logits.shape)} with targets {tuple(targets.shape)}: "
            "need (..., K) with class indices (...)")


def _rms(rows):
    if rows is None or not rows.is_floating_point():  # an Embedding's
        return math.nan
    return (rows.norm(dim=-1).mean() / math.sqrt(rows.shape[-1])).item()


def _mean_ratio(numerator, denominator):
    counts = denominator != 0  # nan counts: divergence must show
    ratios = torch.where(counts, numerator / denominator, 0)
    return (ratios.sum() / counts.sum()).item()


# ---- largest eigenvalues: operator norm and sharpness ----

def operator_norm(weight, tolerance=1e-3, max_steps=300):
    """Largest singular value of a matrix, to 1e-3 relative or better;
    never a full SVD.

    Block Lanczos on the smaller of W^T W, W W^T until the residual is below
    `tolerance` relative. Deterministic. A vector stands for a diagonal matrix
    (gains); more dimensions are flattened to (fan_out, rest). nan where W is
    not finite.
    """
    weight = _wide(weight.detach())
    scale = weight.abs().max()
    if weight.ndim < 2:
        return scale.item()

    matrix = weight.flatten(1)
    if matrix.shape[0] < matrix.shape[1]:
        matrix = matrix.T  # (larger, smaller)
    # Squares of tiny updates would underflow.
    unit = scale.clamp_min(torch.finfo(weight.dtype).tiny)

    def gram(rows):  # (b, smaller)
        return (rows @ matrix.T / unit) @ matrix / unit

    # Two vectors: one may all but miss the top direction
    # (1 of 2000 dense spectra).
    square = _top_eigenvalue(gram, matrix.shape[1], scale, tolerance, max_steps, block=2)
    return scale.item() * math.sqrt(max(square, 0.0))


def sharpness(model, loss_fn, x, y, preconditioner=None, tolerance=1e-4, max_steps=200):
    """Largest (most positive) Hessian eigenvalue of the scalar
    loss_fn(model(x), y).

    Over the trainable parameters. With `preconditioner` P > 0, {name: tensor}
    or a list in their order, that of P^-1/2 H P^-1/2; for Adam
    P = sqrt(v / (1 - beta2^t)) + eps (Cohen et al., arXiv 2207.14484). Lanczos
    until the residual is below `tolerance` relative; a step is one product with
    the Hessian and keeps one vector. ValueError for a loss that is not a
    scalar, or a preconditioner that does not fit or is not positive.
    """
    model = _eager(model)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def gradient(output, *args, **kwargs):  # flat
        return _flatten(torch.autograd.grad(
            output, list(parameters.values()), *args, **kwargs, materialize_grads=True))

    # Fused attention kernels have no second derivative.
    with _undisturbed(model) as forward, torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        loss = loss_fn(forward(x), y)
        if loss.ndim != 0:
            raise ValueError(
                f"loss_fn must return a scalar, not shape {tuple(loss.shape)}: "
                "take its mean, say")
        flat = gradient(loss, create_graph=True)
    scale = (1.0 if preconditioner is None
             else _inverse_root(preconditioner, parameters))
    if not flat.requires_grad:  # the loss is linear in the parameters
        return 0.0

    def hessian(rows):  # (1, parameters)
        return scale * gradient(flat, scale * rows[0], retain_graph=True)[None]

    return _top_eigenvalue(hessian, len(flat), flat.detach(), tolerance, max_steps, block=1)


def _inverse_root(preconditioner, parameters):
    """P^-1/2, flat, in the order of the parameters."""
    if not isinstance(preconditioner, dict):
        preconditioner = dict(zip(parameters, preconditioner))
    for name, parameter in parameters.items():
        entry, shape = preconditioner.get(name), parameter.shape
        if entry is None or entry.shape != shape or not (entry > 0).all():
            raise ValueError(f"preconditioner of {name!r} must be "
                             f"a positive tensor of shape {tuple(shape)}")
    return _flatten(preconditioner[name].detach() for name in parameters).rsqrt()


def _flatten(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


def _top_eigenvalue(multiply, n, like, tolerance, max_steps, block):
    """Largest eigenvalue of a symmetric map A on R^n,
    multiply(rows (b, n)) -> (b, n).

    Block Lanczos, reorthogonalised: V (k, n), of orthonormal rows, grows by A
    times its newest block. The top eigenvalue of T = V A V^T, eigenvector s, is
    off one of A's by at most the residual |L^T s_newest|, where L Q is what the
    newest block's image has outside V. Read every fourth row: that is a
    transfer from the device.
    """
    generator = torch.Generator(like.device).manual_seed(0)
    noise = partial(torch.randn, generator=generator, device=like.device, dtype=like.dtype)
    eps, limit = torch.finfo(like.dtype).eps, min(n, max_steps)
    basis, t = like.new_empty(min(n, 16), n), like.new_zeros(limit, limit + block)
    size, largest = 0, like.new_zeros(())
    new = _orthonormal(noise(min(block, limit), n))[0]
    while True:
        newest, size = slice(size, size + len(new)), size + len(new)
        if size > len(basis):
            basis = torch.cat([basis, torch.empty_like(basis)])
        basis[newest] = new
        v, image = basis[:size], multiply(new)  # (size, n), (b, n)
        t[newest, :size] = image @ v.T
        largest = torch.maximum(largest, image.norm())
        # Where A maps V into itself,
        # noise of rounding's size gives a fresh direction.
        fresh = 8 * eps / math.sqrt(n) * largest * noise(len(new), n)
        outside = image - t[newest, :size] @ v + fresh
        new, t[newest, size:size + len(new)] = _orthonormal(outside)

        if size % 4 == 0 or size == limit:
            corner = t[:size, :size + len(new)].cpu().double()
            if not corner.isfinite().all():
                return math.nan
            # of T: eigh reads the lower triangle
            values, vectors = torch.linalg.eigh(corner[:, :size])
            value = values[-1].item()
            residual = (vectors[newest, -1] @ corner[newest, size:]).norm().item()
            floor = 16 * eps * values.abs().max().item()
            if size == n or residual <= max(tolerance * abs(value), floor):
                return value
            if size == limit:
                message = (f"eigenvalue {value:.3g} has residual {residual:.1g}: "
                           f"raise {max_steps=}")
                warnings.warn(message, stacklevel=3)
                return value

        # Once more, since rounding left some of V in it.
        new = _orthonormal(new - new @ v.T @ v)[0][:limit - size]


def _orthonormal(rows):
    """(Q, L) with rows = L Q and orthonormal rows of Q."""
    q, r = torch.linalg.qr(rows.T)
    return q.T, r.T


# ---- calibration and exponents ----

def expected_calibration_error(logits, targets, bins=15):
    """sum_b (n_b / N) |accuracy_b - confidence_b| (Guo et al., arXiv 1706.04599).

    logits (..., K), class indices (...). Bin b holds the n_b samples whose top
    softmax probability lies in ((b-1)/bins, b/bins].
    """
    _check_classes(logits, targets)
    probabilities = _wide(logits.detach()).flatten(0, -2).softmax(dim=-1)
    confidence, prediction = probabilities.max(dim=-1)  # (N,)
    excess = (prediction == targets.flatten()).to(confidence) - confidence
    edges = torch.linspace(0, 1, bins + 1, dtype=confidence.dtype, device=confidence.device)
    bin_of = torch.bucketize(confidence, edges[1:-1])
    sums = excess.new_zeros(bins).index_add_(0, bin_of, excess)
    return (sums.abs().sum() / len(excess)).item()


def fit_exponent(widths, values):
    """(slope, intercept) of least squares on natural logs:
    exp(intercept) * widths**slope.

    values (W,), or (S, W) for S seeds: the line is fitted to their mean log.
    ValueError for values not finite and positive, or fewer than two distinct
    widths.
    """
    log_n, logs = _logs(widths, values)
    slope = _slope_weights(log_n) @ logs.mean(dim=0)
    return slope.item(), (logs.mean() - slope * log_n.mean()).item()


def exponent_interval(widths, values, level=0.95, resolution=1.0, equal_noise=False):
    """Interval (low, high) of fit_exponent's slope,
    for values (S, W) of S seeds.

    Student's t on the slope's variance,
    sum_w c_w^2 (s_w^2 / S + log(resolution_w)^2 / 12), c its weights. s_w^2:
    variance at a width, of residuals from the means of width and seed, so that
    what a seed does at every width alike counts for nothing; degrees of freedom
    by Welch and Satterthwaite, as widths may not be equally noisy. equal_noise:
    one variance for all widths, (S-1) (W-1) degrees, narrower where seeds are
    few. One seed: residuals from the line, W-2. (nan, nan) where no degree is
    left and the values are exact. resolution: factor between neighbours of the
    values' grid, a number or (W,).
    """
    log_n, logs = _logs(widths, values)
    weights, mean = _slope_weights(log_n), logs.mean(dim=0)
    seeds, count = logs.shape
    slope = (weights @ mean).item()
    if seeds == 1:
        most = count - 2
        residuals = logs - mean.mean() - slope * (log_n - log_n.mean())
        squares = residuals.square().sum().expand(count) / max(most, 1)
    else:
        most = (seeds - 1) * (count - 1)
        residuals = logs - mean - logs.mean(dim=1, keepdim=True) + logs.mean()
        # each width has its share of the (S-1) (W-1) degrees
        squares = residuals.square().sum(dim=0) / ((seeds - 1) * (1 - 1 / count))
    if equal_noise:
        squares = squares.mean().expand(count)

    noise = weights.square() * squares / seeds
    step = torch.as_tensor(resolution, dtype=torch.float64).log()
    variance = (noise + weights.square() * step.square() / 12).sum().item()
    if most < 1 and variance == 0:
        return math.nan, math.nan

    freedom = most if most > 0 else math.inf
    if seeds > 1 and not equal_noise and noise.any():  # Welch and Satterthwaite
        ratio = noise.sum().square() / noise.square().sum()
        freedom = min(most, (seeds - 1) * ratio.item())
    half = t_quantile((1 + level) / 2, freedom) * math.sqrt(variance)
    return slope - half, slope + half


@cache
def t_quantile(probability, freedom):
    """Quantile of Student's t above the median,
    integrated over atan(t / sqrt(freedom)).
    """
    if math.isinf(freedom):
        return NormalDist().inv_cdf(probability)
    step = math.pi / 40_000
    angles = step * torch.arange(20_001, dtype=torch.float64)
    density = angles.cos().clamp_min(0).pow(freedom - 1)
    mass = torch.cat([density.new_zeros(1), torch.cumulative_trapezoid(density)])
    wanted = (2 * probability - 1) * mass[-1]
    at = torch.searchsorted(mass, wanted)
    # linear between the angles
    at = at - (mass[at] - wanted) / (mass[at] - mass[at - 1])
    return math.sqrt(freedom) * math.tan(step * at.item())


def _logs(widths, values):
    """Natural logs of widths (W,) and values (S, W), checked, in float64."""
    exact = partial(torch.as_tensor, dtype=torch.float64, device="cpu")
    widths, values = exact(widths), torch.atleast_2d(exact(values))
    if values.ndim != 2 or widths.shape != values.shape[1:] or len(values) == 0:
        raise ValueError(f"widths {tuple(widths.shape)}, "
                         f"values {tuple(values.shape)}: "
                         "need (W,) and (W,) or (S, W)")
    for name, tensor in (("widths", widths), ("values", values)):
        bad = tensor[~(tensor.isfinite() & (tensor > 0))].tolist()
        if bad:
            raise ValueError(f"{name} must be finite and positive, "
                             f"not {bad}: leave those out")
    if len(widths.unique()) < 2:
        raise ValueError("an exponent needs at least two distinct widths, "
                         f"not {widths.tolist()}")
    return widths.log(), values.log()


def _slope_weights(log_n):
    centred = log_n - log_n.mean()
    return centred / (centred @ centred)  # slope = weights @ logs
