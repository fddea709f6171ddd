"""Width-scaling exponents: one table, and the initial weights, learning rates and predictions it implies.

Companion to arXiv 2505.22491 (Haas, Bordt, von Luxburg, Vankadara), Propositions 1 and 2 in `predict`.

    n, n0   width and base width; m = n / n0, which may be below one. Everything coincides at m = 1.
    b       initialization: std = (std at n0) * m^-b        c   learning rate: LR = base LR * m^-(c + alpha)
    alpha   global exponent on top of c for every tensor    γ   Adam's ε = (ε at n0) * m^-γ
    roles   input (only fan-out grows with width), hidden (both), output (only fan-in), vector (biases, norm gains)

All parameterizations are written without multipliers in the forward pass: by abc symmetry, a multiplier n^-a with
std n^-b and LR n^-c trains identically under a+θ, b-θ, c-2θ (SGD) or c-θ (Adam with ε along), so a = 0 loses nothing.

    base = MLP(784, 256, 3, 10)                                      # same architecture at the base width
    init_(model, base, "mup", generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(param_groups(model, base, "mup", "sgd", lr=0.1))
    print(plan(model, base, "mup", "sgd", lr=0.1))                   # look at it once: is anything scaled?

This file needs torch only and can be copied alone. Schedules: group["lr"] = schedule(step) * group["base_lr"].
Out of scope: depth scaling, and attention logits where d_head grows with width (mup then needs sqrt(d0)/d_head).
"""
import math
import warnings
from collections import namedtuple
from types import SimpleNamespace

import torch.nn as nn

ROLES = ("input", "hidden", "output", "vector")

#                                    (input, hidden, output, vector)
PARAMETERIZATIONS = {
    "sp":                          {"b":        (0.0, 0.5, 0.5, 0.0),       # standard: He init, one global LR
                                    "sgd":      (0.0, 0.0, 0.0, 0.0),
                                    "adam":     (0.0, 0.0, 0.0, 0.0),
                                    "adam_eps": (0.5, 0.5, 0.0, 0.5)},
    "ntp":                         {"b":        (0.0, 0.5, 0.5, 0.0),       # neural tangent, one LR before multipliers
                                    "sgd":      (0.0, 1.0, 1.0, 0.0),
                                    "adam":     (0.0, 0.5, 0.5, 0.0),
                                    "adam_eps": (0.5, 0.5, 0.0, 0.5)},
    "mup":                         {"b":        (0.0, 0.5, 1.0, 0.0),       # maximal update, arXiv 2203.03466
                                    "sgd":      (-1., 0.0, 1.0, -1.),
                                    "adam":     (0.0, 1.0, 1.0, 0.0),
                                    "adam_eps": (1.0, 1.0, 0.0, 1.0)},
    "sp_full_align":               {"b":        (0.0, 0.5, 0.5, 0.0),       # Everett et al., arXiv 2407.05872
                                    "sgd":      (-.5, 0.5, 1.0, -.5),
                                    "adam":     (0.0, 1.0, 1.0, 0.0),
                                    "adam_eps": (0.5, 0.5, 0.0, 0.5)},
    "sp_full_align_large_readout": {"b":        (0.0, 0.5, 0.5, 0.0),
                                    "sgd":      (-.5, 0.5, 0.5, -.5),
                                    "adam":     (0.0, 1.0, 0.5, 0.0),
                                    "adam_eps": (0.5, 0.5, 0.0, 0.5)},
}
OPTIMIZERS = ("sgd", "adam")
BOUNDED_DERIVATIVE = {"ce": True, "mse": False, "brier": True}      # is |dloss/dlogits| bounded, whatever the logits?
TRAINABLE = {"all": ROLES, "readout": ("output",)}


def _choose(kind, value, allowed):
    if value not in allowed:
        raise ValueError(f"unknown {kind} {value!r}; choose from {', '.join(allowed)}")
    return value


def exponents(parameterization, optimizer, alpha=0.0):
    """{role: (b, c)} of the table above; alpha is added to every c. ValueError on an unknown name."""
    row = PARAMETERIZATIONS[_choose("parameterization", parameterization, PARAMETERIZATIONS)]
    c = row[_choose("optimizer", optimizer, OPTIMIZERS)]
    return {role: (row["b"][i], c[i] + alpha) for i, role in enumerate(ROLES)}


# ------------------------------------------------------------------------------------------------------------------
# Predictions: exponents of m for the size of updates, features and logits

def predict(parameterization, optimizer, loss, alpha=0.0, hidden_layers=3, trainable="all", step=1):
    """Width exponents under full alignment, and the training regime (Propositions 1 and 2).

    hidden_layers counts hidden activations: the network has hidden_layers - 1 hidden matrices. trainable is "all" or
    "readout" (random features). step = 1 asks for the first update, from the initial readout; a larger step for the
    later ones, whose backward signal also passes the readout's update. A quantity that is never updated has -inf.

    Returns an object with
        .effective    [layer 1, ..., readout]   ΔW x
        .propagating  [layer 2, ..., readout]   W0 Δx
        .features     [hidden activation 1, ..., hidden_layers]   Δx
        .logits       the logits themselves, initial ones included
        .regime       "stable", "controlled divergence" or "catastrophic", of training as a whole (any step)
    ValueError on unknown names or hidden_layers < 1.
    """
    e = exponents(parameterization, optimizer, alpha)
    _choose("loss", loss, BOUNDED_DERIVATIVE)
    trained = TRAINABLE[_choose("trainable", trainable, TRAINABLE)]
    if hidden_layers < 1:
        raise ValueError(f"hidden_layers is {hidden_layers}; a width needs at least one hidden activation")
    b = {role: e[role][0] for role in ROLES}
    c = {role: e[role][1] if role in trained else math.inf for role in ROLES}       # never updated: m^-inf

    # The backward signal is one entry of the readout: its initial value, and from the second step on its update too.
    # Adam divides it away.
    backward = -b["output"] if step <= 1 else -min(b["output"], c["output"])
    if optimizer == "adam":
        backward = 0.0
    update_in = backward - c["input"]               # fixed fan-in
    update_hidden = 1 + backward - c["hidden"]      # n aligned terms
    update_out = 1 - c["output"]                    # n aligned terms, dloss/dlogits of order one

    features = [update_in] + [max(update_in, update_hidden)] * (hidden_layers - 1)
    propagating = [0.5 - b["hidden"] + delta for delta in features[:-1]]            # W0 independent of Δx: sqrt(n) terms
    propagating.append(1 - b["output"] + features[-1])                              # W0 aligned with Δx: n terms
    logits = max(0.5 - b["output"], update_out, propagating[-1])

    if step <= 1:       # exponents grow from the first to the later steps, so the later ones decide
        regime = predict(parameterization, optimizer, loss, alpha, hidden_layers, trainable, step=2).regime
    elif features[-1] > 0 or (logits > 0 and not BOUNDED_DERIVATIVE[loss]):
        regime = "catastrophic"
    else:
        regime = "controlled divergence" if logits > 0 else "stable"
    return SimpleNamespace(effective=[update_in] + [update_hidden] * (hidden_layers - 1) + [update_out],
                           propagating=propagating, features=features, logits=logits, regime=regime)


def max_stable_alpha(parameterization, optimizer, loss, hidden_layers=3, trainable="all"):
    """Smallest alpha whose regime is not catastrophic: the maximal stable LR falls as n^-alpha. -inf: no bound.

    Found by bisection, since every exponent of `predict` decreases in alpha. Proposition 1: sp, SGD, deep: 1/2 under
    CE and 1 under MSE.
    """
    def stable(alpha):
        return predict(parameterization, optimizer, loss, alpha, hidden_layers, trainable).regime != "catastrophic"

    low, high = -64.0, 64.0
    if stable(low):
        return -math.inf
    if not stable(high):
        return math.inf
    while high - low > 2 ** -40:        # dyadic throughout: half-integers come out exact
        middle = (low + high) / 2
        low, high = (low, middle) if stable(middle) else (middle, high)
    return high


# ------------------------------------------------------------------------------------------------------------------
# Roles and multipliers of any model, from shapes alone

# One tensor of a model: m is the ratio to the base width along the dimension its role reads (hidden: fan-in),
# base_std its He standard deviation at the base width with gain 1.
Scaled = namedtuple("Scaled", "name tensor role m base_std owner")

# Which dimensions are (fan-out, fan-in), by class name, so that no package need be imported.
_FAN_DIMS = {"Linear": (0, 1), "Conv1d": (0, 1), "Conv2d": (0, 1), "Conv3d": (0, 1), "Embedding": (1, 0), "Conv1D": (1, 0),
             "ConvTranspose1d": (1, 0), "ConvTranspose2d": (1, 0), "ConvTranspose3d": (1, 0)}
_COMPILED = "_orig_mod."        # torch.compile prefixes names with it

_NOTHING_SCALES = ("NOTHING SCALES: model and base have the same shapes, so every parameterization is the standard one "
                   "here. Pass the same architecture at another width as base, or, at the base width itself, roles as overrides")


def _fan_dims(owner):
    if getattr(owner, "transposed", False) and owner.groups > 1:
        return None         # (in, out / groups): the fan-in, in / groups, is no dimension
    return next((_FAN_DIMS[cls.__name__] for cls in type(owner).__mro__ if cls.__name__ in _FAN_DIMS), None)


def _fan_in(tensor, owner, role):
    """Number of summands behind one output: 1 for tables, whose one-hot input picks a row; else as in torch.nn.init."""
    dims = _fan_dims(owner)
    table = isinstance(owner, nn.Embedding) or (dims is None and role == "input")
    if tensor.ndim <= 1 or table:
        return 1
    return tensor.shape[(dims or (0, 1))[1]] * math.prod(tensor.shape[2:])


def _role_and_ratio(name, tensor, base_tensor, owner, role):
    """(role, m) of one tensor; role may be given (an override), else it is read off the dimensions that scale."""
    ratios = [size / base_size for size, base_size in zip(tensor.shape, base_tensor.shape)]
    scaling = [ratio for ratio in ratios if ratio != 1]
    dims = _fan_dims(owner) if tensor.ndim > 1 else None
    if role is None:
        if tensor.ndim <= 1 or not scaling:
            role = "vector"         # also tensors of fixed shape (a readout's bias): m = 1, no exponent matters
        elif len(scaling) > 1:
            role = "hidden"
        elif dims is None:
            raise ValueError(f"cannot tell fan-in from fan-out of {name} {tuple(tensor.shape)} in a "
                             f"{type(owner).__name__}; pass overrides={{{name!r}: 'input'}} (or 'output', 'hidden', 'vector')")
        else:
            role = "input" if ratios[dims[0]] != 1 else "output"
    _choose(f"role of {name}:", role, ROLES)
    if dims is not None and role != "vector":
        m = ratios[dims[0 if role == "input" else 1]]
    else:
        m = max(scaling, default=1.0, key=lambda ratio: abs(math.log(ratio)))
    return role, m


def _scaled(model, base, overrides=None):
    """[Scaled] for every parameter of model; the reading of shapes that all public functions share."""
    overrides = {name.replace(_COMPILED, ""): role for name, role in (overrides or {}).items()}
    base_shapes = {name.replace(_COMPILED, ""): p for name, p in base.named_parameters(remove_duplicate=False)}
    modules = dict(model.named_modules(remove_duplicate=False))
    records, seen = [], {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        base_tensor = base_shapes.pop(name.replace(_COMPILED, ""), None)
        if base_tensor is None or base_tensor.ndim != tensor.ndim:
            raise ValueError(f"{name} {tuple(tensor.shape)} has no counterpart in base; "
                             "base must be the same architecture at another width (same depth, same names)")
        owner = modules[name.rpartition(".")[0]]
        role, m = _role_and_ratio(name, tensor, base_tensor, owner, overrides.pop(name.replace(_COMPILED, ""), None))
        if id(tensor) in seen:
            first = seen[id(tensor)]
            if first.role != role:
                raise ValueError(f"{first.name} ({first.role}) and {name} ({role}) are one tied tensor, which has no single "
                                 "role; untie them (transformers: tie_word_embeddings=False)")
            continue
        records.append(Scaled(name, tensor, role, m, _fan_in(base_tensor, owner, role) ** -0.5, owner))
        seen[id(tensor)] = records[-1]
    if overrides or base_shapes:
        raise ValueError(f"no parameter of the model is called {', '.join([*overrides, *base_shapes])}")
    return records


def _warn_if_nothing_scales(records, overrides):
    if all(r.m == 1 for r in records) and not overrides:
        warnings.warn(_NOTHING_SCALES, stacklevel=3)


def infer_roles(model, base, overrides=None):
    """{parameter name: role}, from comparing shapes with base, the same architecture at another width.

    base may live on the meta device. Fan-in and fan-out are known for nn.Linear, nn.Conv*, nn.ConvTranspose* (one group),
    nn.Embedding and transformers' Conv1D; for other tensors of which one dimension scales give overrides={name: role};
    those of which two scale are hidden, and read as (fan_out, fan_in). Tensors of fixed shape count as "vector".

    Raises ValueError if the architectures differ, input and output cannot be told apart, or a tied tensor has two roles
    (an embedding used as readout). Warns if nothing scales.
    """
    records = _scaled(model, base, overrides)
    _warn_if_nothing_scales(records, overrides)
    return {r.name: r.role for r in records}


def _init_stds(records, parameterization, gain, std):
    """{name: standard deviation at the model's width}; arguments as in init_."""
    std = {key.replace(_COMPILED, ""): value for key, value in (std or {}).items()}
    names = {r.name: r.name.replace(_COMPILED, "") for r in records}
    for key in std:
        _choose("name or role in std:", key, (*ROLES, *names.values()))
    e = exponents(parameterization, "sgd")
    return {r.name: std.get(names[r.name], std.get(r.role, gain * r.base_std)) * r.m ** -e[r.role][0] for r in records}


def init_(model, base, parameterization, generator=None, zero_readout=False, gain=math.sqrt(2), std=None, overrides=None):
    """Draws every weight of model in place, N(0, std²), and returns model. Running it twice is running it once.

    std = m^-b * gain / sqrt(base fan-in), gain sqrt(2) being He's for ReLU, the readout included; an nn.Embedding's
    one-hot input has fan-in 1. std={name or role: value at the base width} replaces either. Biases become 0 and
    norm gains 1; other vectors keep their values. zero_readout sets output weights to 0. Weights are drawn on the
    generator's device in the order of model.named_parameters(), so a CPU generator gives the same weights anywhere.
    """
    records = _scaled(model, base, overrides)
    _warn_if_nothing_scales(records, overrides)
    if zero_readout and not any(r.role == "output" for r in records):
        raise ValueError("zero_readout needs an output tensor, and none has that role: " + _NOTHING_SCALES)
    stds = _init_stds(records, parameterization, gain, std)
    for r in records:
        tensor = r.tensor.data
        if tensor.ndim > 1:
            device = tensor.device if generator is None else generator.device
            tensor.copy_(tensor.new_empty(tensor.shape, device=device).normal_(0, stds[r.name], generator=generator))
            if zero_readout and r.role == "output":
                tensor.zero_()
        elif r.name.endswith("bias"):
            tensor.zero_()
        elif "Norm" in type(r.owner).__name__:
            tensor.fill_(1.0)
    return model


def param_groups(model, base, parameterization, optimizer, lr, alpha=0.0, weight_decay=0.0, eps=1e-8, role_lr=None,
                 overrides=None):
    """Parameter groups for torch.optim (SGD, Adam, AdamW), one per role and width ratio. Plain numbers, no tags.

    lr, weight_decay and eps are the values at the base width. Each group has params, names, role, lr and base_lr
    (equal), weight_decay (lr * weight_decay per step does not change with width) and eps. role_lr={role: factor}
    multiplies LRs at every width (tunable constants; 0 freezes a role).

    The global m^-alpha uses the model's one width ratio, tensors of fixed shape included; ValueError if tensors
    disagree on it and alpha is not 0, and for unknown names.
    """
    records = _scaled(model, base, overrides)
    _warn_if_nothing_scales(records, overrides)
    role_lr = dict(role_lr or {})
    for role in role_lr:
        _choose("role", role, ROLES)
    if role_lr and all(r.role == "vector" for r in records):
        raise ValueError("role_lr needs roles: " + _NOTHING_SCALES)
    ratios = sorted({r.m for r in records} - {1.0}) or [1.0]
    if alpha != 0 and len(ratios) > 1:
        raise ValueError(f"alpha needs one width ratio, but tensors scale by {ratios}; widen every dimension together or use alpha=0")
    e = exponents(parameterization, optimizer)
    gamma = dict(zip(ROLES, PARAMETERIZATIONS[parameterization]["adam_eps"]))
    groups = {}
    for r in records:
        if (r.role, r.m) not in groups:
            width_factor = r.m ** -e[r.role][1] * ratios[0] ** -alpha
            group_lr = lr * width_factor * role_lr.get(r.role, 1.0)
            groups[r.role, r.m] = {"params": [], "names": [], "role": r.role, "lr": group_lr, "base_lr": group_lr,
                                   "weight_decay": weight_decay / width_factor, "eps": eps * r.m ** -gamma[r.role]}
        groups[r.role, r.m]["params"].append(r.tensor)
        groups[r.role, r.m]["names"].append(r.name)
    return list(groups.values())


def plan(model, base, parameterization, optimizer, lr, alpha=0.0, weight_decay=0.0, eps=1e-8, role_lr=None,
         gain=math.sqrt(2), overrides=None, std=None):
    """A table to read before training: each tensor's shape, role, width ratio, init std, LR, weight decay and ε.

    Says so in its first line when nothing scales. Arguments as in init_ and param_groups.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        records = _scaled(model, base, overrides)
        groups = param_groups(model, base, parameterization, optimizer, lr, alpha, weight_decay, eps, role_lr, overrides)
    group_of = {name: group for group in groups for name in group["names"]}
    stds = _init_stds(records, parameterization, gain, std)
    rows = [("tensor", "shape", "role", "m", "init std", "lr", "weight decay", "eps")]
    for r in records:
        group = group_of[r.name]
        drawn = f"{stds[r.name]:.4g}" if r.tensor.ndim > 1 else "-"
        rows.append((r.name, "x".join(map(str, r.tensor.shape)), r.role, f"{r.m:g}", drawn, f"{group['lr']:.4g}",
                     f"{group['weight_decay']:.4g}", f"{group['eps']:.3g}" if optimizer == "adam" else "-"))
    columns = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, columns)).rstrip() for row in rows]
    if all(r.m == 1 for r in records):
        lines.insert(0, _NOTHING_SCALES)
    return "\n".join([f"{parameterization}, {optimizer}, lr {lr:g}, alpha {alpha:g}"] + lines)
