"""Width-scaling exponents: one table, and the initial weights, learning rates
and predictions it implies (arXiv 2505.22491: Haas, Bordt, von Luxburg,
Vankadara).

    n, n0   width and base width; m = n / n0, also below one. All coincides at m = 1.
    b       initial std = (std at n0) * m^-b
    c       LR = base LR * m^-(c + alpha)
    alpha   global exponent, for every tensor
    γ       Adam's ε = (ε at n0) * m^-γ
    roles   input (only fan-out grows with width), hidden (both),
            output (only fan-in), vector (biases, norm gains)

No multipliers in the forward pass. By abc symmetry, a multiplier n^-a with std
n^-b and LR n^-c trains alike under a+θ, b-θ, c-2θ (SGD) or c-θ (Adam with ε
along): a = 0 is general.

    base = MLP(784, 256, 3, 10)             # same architecture at the base width
    init_(model, base, "mup", generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(param_groups(model, base, "mup", "sgd", lr=0.1))
    print(plan(model, base, "mup", "sgd", lr=0.1))      # once: is anything scaled?

Schedules: group["lr"] = schedule(step) * group["base_lr"]. Needs torch only;
can be copied alone. Out of scope: depth scaling, and attention logits where
d_head grows with width (mup needs sqrt(d0)/d_head).
"""
import math
import warnings
from collections import namedtuple
from types import SimpleNamespace

from torch import nn

ROLES = ("input", "hidden", "output", "vector")

PARAMETERIZATIONS = {
    #            (input, hidden, output, vector)
    "sp": {                                 # standard: He init, one global LR
        "b":        (0.0, 0.5, 0.5, 0.0),
        "sgd":      (0.0, 0.0, 0.0, 0.0),
        "adam":     (0.0, 0.0, 0.0, 0.0),
        "adam_eps": (0.5, 0.5, 0.0, 0.5)},
    "ntp": {                                # neural tangent, one LR before multipliers
        "b":        (0.0, 0.5, 0.5, 0.0),
        "sgd":      (0.0, 1.0, 1.0, 0.0),
        "adam":     (0.0, 0.5, 0.5, 0.0),
        "adam_eps": (0.5, 0.5, 0.0, 0.5)},
    "mup": {                                # maximal update, arXiv 2203.03466
        "b":        (0.0, 0.5, 1.0, 0.0),
        "sgd":      (-1., 0.0, 1.0, -1.),
        "adam":     (0.0, 1.0, 1.0, 0.0),
        "adam_eps": (1.0, 1.0, 0.0, 1.0)},
    "sp_full_align": {                      # Everett et al., arXiv 2407.05872
        "b":        (0.0, 0.5, 0.5, 0.0),
        "sgd":      (-.5, 0.5, 1.0, -.5),
        "adam":     (0.0, 1.0, 1.0, 0.0),
        "adam_eps": (0.5, 0.5, 0.0, 0.5)},
    "sp_full_align_large_readout": {
        "b":        (0.0, 0.5, 0.5, 0.0),
        "sgd":      (-.5, 0.5, 0.5, -.5),
        "adam":     (0.0, 1.0, 0.5, 0.0),
        "adam_eps": (0.5, 0.5, 0.0, 0.5)},
}
OPTIMIZERS = ("sgd", "adam")
TRAINABLE = {"all": ROLES, "readout": ("output",)}

# Of dloss/dlogits: is it bounded, and does it vanish where softmax saturates
# on a wrong class?
Loss = namedtuple("Loss", "bounded vanishes")
LOSSES = {
    #                    (bounded, vanishes)
    "ce":            Loss(True, False),
    "mse":           Loss(False, False),
    "brier":         Loss(True, True),
    "huber":         Loss(True, False),
    "hinge":         Loss(True, False),
    "squared_hinge": Loss(False, False),
}


def _choose(kind, value, allowed):
    if value not in allowed:
        raise ValueError(f"unknown {kind} {value!r}; choose from {', '.join(allowed)}")
    return value


def exponents(parameterization, optimizer, alpha=0.0):
    """{role: (b, c)} of the table above; alpha is added to every c.

    ValueError on an unknown name.
    """
    row = PARAMETERIZATIONS[
        _choose("parameterization", parameterization, PARAMETERIZATIONS)]
    rates = row[_choose("optimizer", optimizer, OPTIMIZERS)]
    return {role: (b, c + alpha) for role, b, c in zip(ROLES, row["b"], rates)}


# ---- predictions: exponents of m for the size of updates, features and logits ----

def predict(parameterization, optimizer, loss, alpha=0.0,
            hidden_layers=3, trainable="all", step=1):
    """Width exponents under full alignment, and the regime (Propositions 1 and 2).

    hidden_layers counts hidden activations, one more than hidden matrices.
    trainable: "all" or "readout" (random features). step 1 is the first update;
    later, the backward signal also passes the readout's update. ValueError on
    unknown names. Returns an object with
        .effective    [layer 1, ..., readout]   ΔW x; -inf where never updated
        .propagating  [layer 2, ..., readout]   W0 Δx
        .features     [hidden activation 1, ..., hidden_layers]   Δx
        .logits       the logits, initial ones included
        .regime       "stable", "controlled divergence" or "catastrophic", of all steps
        .lower_bound  True at later steps of a catastrophic regime, where divergence feeds
                      back (mse, sp, alpha = 0: hidden updates n^1.98 at step 4, for n^1)

    In a GPT normalizations hand on inputs of order one: growing features are not
    catastrophic, and the readout's propagating exponent is at most 1 - b_out.
    """
    e = exponents(parameterization, optimizer, alpha)
    bounded = LOSSES[_choose("loss", loss, LOSSES)].bounded
    trained = TRAINABLE[_choose("trainable", trainable, TRAINABLE)]
    if hidden_layers < 1:
        raise ValueError(
            f"hidden_layers is {hidden_layers}; choose at least one hidden activation")
    b = {role: b for role, (b, _) in e.items()}
    c = {role: c if role in trained else math.inf for role, (_, c) in e.items()}

    # Backward through the readout: its initial entries, later on its update too.
    backward = -b["output"] if step <= 1 else -min(b["output"], c["output"])
    if optimizer == "adam":
        backward = 0.0                          # divided away

    # Proposition 2: a layer learns features at exponent 0. sp, SGD, alpha = 1/2:
    # all but the first.
    update_in = backward - c["input"]           # fixed fan-in
    update_hidden = 1 + backward - c["hidden"]  # n aligned terms
    update_out = 1 - c["output"]                # n aligned terms, dloss/dlogits of order one
    deeper = hidden_layers - 1
    effective = [update_in] + [update_hidden] * deeper + [update_out]
    features = [update_in] + [max(update_in, update_hidden)] * deeper
    propagating = [0.5 - b["hidden"] + delta for delta in features[:-1]]  # sqrt(n) terms
    propagating.append(1 - b["output"] + features[-1])  # W0, Δx aligned: n terms
    logits = max(0.5 - b["output"], update_out, propagating[-1])

    # Proposition 1, the regime: later steps have the larger exponents and decide.
    # Diverging logits feed back through an unbounded derivative under SGD only:
    # Adam divides its size away.
    feeds_back = logits > 0 and not bounded and optimizer == "sgd"
    if step <= 1:
        later = predict(parameterization, optimizer, loss, alpha,
                        hidden_layers, trainable, step=2)
        regime = later.regime
    elif features[-1] > 0 or feeds_back:
        regime = "catastrophic"
    else:
        regime = "controlled divergence" if logits > 0 else "stable"
    return SimpleNamespace(
        effective=effective, propagating=propagating, features=features,
        logits=logits, regime=regime, lower_bound=step > 1 and regime == "catastrophic")


def max_stable_alpha(parameterization, optimizer, loss, hidden_layers=3, trainable="all"):
    """Smallest alpha whose regime is not catastrophic:
    the maximal stable LR falls as n^-alpha.

    Proposition 1: sp, SGD, deep: 1/2 under ce, 1 under mse (Adam: 1 under
    both). -inf: no bound (only the readout trains, ce); data that are not
    separable still set an edge.
    """
    return _smallest_alpha(
        False, parameterization, optimizer, loss, hidden_layers, trainable)


def max_trainable_alpha(parameterization, optimizer, loss,
                        hidden_layers=3, trainable="all"):
    """Smallest alpha at which a network is stable and trains:
    differs under brier only.

    Where logits diverge, softmax saturates and wrong samples cease to pull
    (under Adam below its ε), though nothing blows up. sp, SGD, deep, brier: 1,
    not 1/2. Ours, not the paper's.
    """
    return _smallest_alpha(
        True, parameterization, optimizer, loss, hidden_layers, trainable)


def _smallest_alpha(trains, parameterization, optimizer, loss, hidden_layers, trainable):
    """By bisection, as all exponents fall with alpha.
    -inf: it always holds, inf: never."""
    def holds(alpha):
        later = predict(parameterization, optimizer, loss, alpha,
                        hidden_layers, trainable, step=2)
        saturated = trains and LOSSES[loss].vanishes and later.logits > 0
        return later.regime != "catastrophic" and not saturated

    low, high = -64.0, 64.0
    if holds(low):
        return -math.inf
    if not holds(high):
        return math.inf
    while high - low > 2 ** -40:
        # Dyadic throughout: half-integers come out exact.
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


# ---- roles and width ratios of any model, from shapes alone ----

# m: ratio to the base width along the dimension that the role reads (input:
# fan-out, else fan-in). base_std: standard deviation at the base width, with
# gain 1.
Scaled = namedtuple("Scaled", "name tensor role m base_std owner")

# The dimensions (fan-out, fan-in), by class name, so that no package need be
# imported.
_FAN_DIMS = {
    **dict.fromkeys(("Linear", "Conv1d", "Conv2d", "Conv3d"), (0, 1)),
    **dict.fromkeys(("Embedding", "EmbeddingBag", "Conv1D"), (1, 0)),  # transformers' Conv1D
    **dict.fromkeys(("ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"), (1, 0))}

# torch.nn.utils' hooks and parametrizations that replace a weight's scale.
_RESCALING = {"WeightNorm", "_WeightNorm", "SpectralNorm", "_SpectralNorm", "_Orthogonal"}

_NOTHING_SCALES = (
    "NOTHING SCALES: model and base have the same shapes. "
    "Pass the same architecture at another width as base, "
    "or, at the base width itself, roles as overrides")


def _plain(name):
    """A parameter's name without torch.compile's prefix."""
    return name.replace("_orig_mod.", "")


def _fan_dims(owner):
    if getattr(owner, "transposed", False) and owner.groups > 1:
        # (in, out / groups): the fan-in, in / groups, is no dimension.
        return None
    names = [cls.__name__ for cls in type(owner).__mro__]
    return next((_FAN_DIMS[name] for name in names if name in _FAN_DIMS), None)


def _fan_in(tensor, owner):
    """Summands behind one output, as in torch.nn.init,
    but 1 for tables: they pick a row."""
    if tensor.ndim <= 1 or isinstance(owner, (nn.Embedding, nn.EmbeddingBag)):
        return 1
    fan_in = (_fan_dims(owner) or (0, 1))[1]
    return tensor.shape[fan_in] * math.prod(tensor.shape[2:])


def _role_and_ratio(name, tensor, base_tensor, owner, role):
    """(role, m) of one tensor;
    role None (no override) is read off the dimensions that scale."""
    ratios = [n / n0 for n, n0 in zip(tensor.shape, base_tensor.shape)]
    scaling = [ratio for ratio in ratios if ratio != 1]
    dims = _fan_dims(owner)
    if role is None:
        if tensor.ndim <= 1 or not scaling:
            role = "vector"         # also of fixed shape (a readout's bias): m = 1
        elif len(scaling) > 1:
            role = "hidden"
        elif dims is None:
            raise ValueError(
                "cannot tell fan-in from fan-out of "
                f"{name} {tuple(tensor.shape)} in a {type(owner).__name__}; "
                f"pass overrides={{{name!r}: 'input'}} "
                "(or 'output', 'hidden', 'vector')")
        else:
            role = "input" if ratios[dims[0]] != 1 else "output"

    _choose(f"role of {name}:", role, ROLES)
    largest = max(scaling, default=1.0,
                  key=lambda ratio: abs(math.log(ratio)))  # also where m < 1
    if tensor.ndim <= 1 or role == "vector":
        return role, largest
    fan_out, fan_in = dims or (0, 1)
    m = ratios[fan_out if role == "input" else fan_in]
    # Of unknown layout, and fixed where it was read: the other dimension scales.
    return role, largest if dims is None and m == 1 else m


def _refuse_rescaled(name, owner):
    attached = [*owner.children(), *owner._forward_pre_hooks.values()]
    found = {type(part).__name__ for part in attached} & _RESCALING
    if found:
        raise ValueError(
            f"{name}: {found.pop().lstrip('_')} replaces the scale that init_ draws; "
            "use torch.nn.utils' remove_weight_norm or remove_spectral_norm, "
            "or parametrize.remove_parametrizations")


def _scaled(model, base, overrides):
    """[Scaled] for every parameter of model:
    the reading of shapes that all below share.

    Warns the caller's caller if nothing scales and no roles are given.
    """
    roles = {_plain(name): role for name, role in (overrides or {}).items()}
    base_tensors = {_plain(name): p
                    for name, p in base.named_parameters(remove_duplicate=False)}
    modules = dict(model.named_modules(remove_duplicate=False))

    records = {}        # by id: a tied tensor is one record
    for name, tensor in model.named_parameters(remove_duplicate=False):
        base_tensor = base_tensors.pop(_plain(name), None)
        if base_tensor is None or base_tensor.ndim != tensor.ndim:
            raise ValueError(
                f"{name} {tuple(tensor.shape)} has no counterpart in base; "
                "pass the same architecture at another width (same depth, same names)")
        owner = modules[name.rpartition(".")[0]]
        _refuse_rescaled(name, owner)
        role, m = _role_and_ratio(
            name, tensor, base_tensor, owner, roles.pop(_plain(name), None))
        record = Scaled(name, tensor, role, m, _fan_in(base_tensor, owner) ** -0.5, owner)
        first = records.setdefault(id(tensor), record)
        if first.role != role:
            raise ValueError(
                f"{first.name} ({first.role}) and {name} ({role}) are one tied tensor; "
                "untie them (transformers: tie_word_embeddings=False)")

    if roles or base_tensors:       # what no parameter of the model has popped
        raise ValueError(
            "no parameter of the model is called "
            f"{', '.join([*roles, *base_tensors])}")
    if all(r.m == 1 for r in records.values()) and not overrides:
        warnings.warn(_NOTHING_SCALES, stacklevel=3)
    return list(records.values())


def infer_roles(model, base, overrides=None):
    """{parameter name: role}, by shapes beside base's,
    the same architecture at another width.

    base may live on the meta device. Fan-in and fan-out are known for
    nn.Linear, nn.Conv*, one-group nn.ConvTranspose*, nn.Embedding(Bag) and
    transformers' Conv1D. All else is read as (fan_out, fan_in, ...): hidden
    where two dimensions scale; where one does, give overrides={name: role}. A
    matrix stored the other way round, or a table that is a bare nn.Parameter,
    needs its std given to init_ as well.

    ValueError if the architectures differ, input and output cannot be told
    apart, one tied tensor has two roles, or under weight_norm and its like.
    Warns if nothing scales.
    """
    return {r.name: r.role for r in _scaled(model, base, overrides)}


# ---- initial weights and learning rates ----

def _init_stds(records, parameterization, gain, std):
    """Standard deviation of each record at the model's width;
    arguments as in init_."""
    std = {_plain(key): value for key, value in (std or {}).items()}
    for key in std:
        _choose("name or role in std:", key, (*ROLES, *(_plain(r.name) for r in records)))
    e, stds = exponents(parameterization, "sgd"), []
    for r in records:
        at_base = std.get(_plain(r.name), std.get(r.role, gain * r.base_std))
        stds.append(at_base * r.m ** -e[r.role][0])
    return stds


def init_(model, base, parameterization, generator=None, zero_readout=False,
          gain=2 ** 0.5, std=None, overrides=None):
    """Draws every weight of model in place, N(0, std²), and returns model.
    Twice is as once.

    std = m^-b * gain / sqrt(base fan-in); gain sqrt(2) is He's for ReLU, an
    embedding has fan-in 1. std={name or role: value at the base width} replaces
    either. Biases and padding rows become 0, norm gains 1, other vectors stay.
    Draws on the generator's device in the order of model.named_parameters(): a
    CPU generator gives the same weights anywhere.
    """
    records = _scaled(model, base, overrides)
    if zero_readout and not any(r.role == "output" for r in records):
        raise ValueError("zero_readout needs an output tensor: " + _NOTHING_SCALES)
    for r, size in zip(records, _init_stds(records, parameterization, gain, std)):
        tensor = r.tensor.data
        if tensor.ndim > 1:
            device = tensor.device if generator is None else generator.device
            drawn = tensor.new_empty(tensor.shape, device=device)
            tensor.copy_(drawn.normal_(0, size, generator=generator))
            if zero_readout and r.role == "output":
                tensor.zero_()
            if getattr(r.owner, "padding_idx", None) is not None:
                tensor[r.owner.padding_idx] = 0
        elif "bias" in r.name.rpartition(".")[2]:       # also bias_ih_l0 of an LSTM
            tensor.zero_()
        elif "Norm" in type(r.owner).__name__:
            tensor.fill_(1.0)
    return model


def own_stds(base):
    """{name: RMS} of the weights that base was built with;
    constant ones are left out."""
    weights = {_plain(name): w.detach() for name, w in base.named_parameters()}
    return {name: w.square().mean().sqrt().item() for name, w in weights.items()
            if (w != w.flatten()[0]).any()}


def rescale_(model, base, parameterization, overrides=None):
    """The model's own initialization kept: scales every weight, as built, to
    m^-b times its RMS in base, which must hold its weights, and returns model.
    Constant tensors stay. Twice is as once.
    """
    records = _scaled(model, base, overrides)
    now, at_base = own_stds(model), own_stds(base)
    for r, wanted in zip(records, _init_stds(records, parameterization, 1.0, at_base)):
        name = _plain(r.name)
        if name in now and name in at_base:
            r.tensor.data.mul_(wanted / now[name])
    return model


def param_groups(model, base, parameterization, optimizer, lr, alpha=0.0,
                 weight_decay=0.0, eps=1e-8, role_lr=None, overrides=None):
    """Parameter groups for torch.optim, one per role and width ratio.
    Plain numbers, no tags.

    lr, weight_decay and eps are the values at the base width. Each group has
    params, names, role, lr and base_lr (equal), weight_decay (lr * weight_decay
    does not change with width) and eps. role_lr={role: factor} multiplies LRs
    at every width (0 freezes a role). Weight decay is for SGD and AdamW: Adam
    adds it to gradients, which in mup shrink with width. m^-alpha uses the
    model's one width ratio, for tensors of fixed shape too. ValueError if
    tensors disagree on it and alpha is not 0, and for unknown names.
    """
    records, role_lr = _scaled(model, base, overrides), role_lr or {}
    for role in role_lr:
        _choose("role", role, ROLES)
    if role_lr and all(r.role == "vector" for r in records):
        raise ValueError("role_lr needs roles: " + _NOTHING_SCALES)
    ratios = sorted({r.m for r in records} - {1.0}) or [1.0]
    if alpha != 0 and len(ratios) > 1:
        raise ValueError(f"alpha needs one width ratio, but tensors scale by {ratios}; "
                         "widen every dimension together or use alpha=0")

    e, groups = exponents(parameterization, optimizer), {}
    gamma = dict(zip(ROLES, PARAMETERIZATIONS[parameterization]["adam_eps"]))
    for r in records:
        width_factor = r.m ** -e[r.role][1] * ratios[0] ** -alpha   # m^-(c + alpha)
        group_lr = lr * width_factor * role_lr.get(r.role, 1.0)
        group = groups.setdefault((r.role, r.m), {
            "params": [], "names": [], "role": r.role, "lr": group_lr, "base_lr": group_lr,
            "weight_decay": weight_decay / width_factor,
            "eps": eps * r.m ** -gamma[r.role]})
        group["params"].append(r.tensor)
        group["names"].append(r.name)
    return list(groups.values())


def plan(model, base, parameterization, optimizer, lr, alpha=0.0,
         weight_decay=0.0, eps=1e-8, role_lr=None,
         gain=2 ** 0.5, overrides=None, std=None):
    """A table of every tensor to read before training;
    arguments as in init_ and param_groups.

    Says so below its heading when nothing scales.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        records = _scaled(model, base, overrides)
        groups = param_groups(
            model, base, parameterization, optimizer, lr, alpha,
            weight_decay, eps, role_lr, overrides)
    group_of = {name: group for group in groups for name in group["names"]}

    rows = [("tensor", "shape", "role", "m", "init std", "lr", "weight decay", "eps")]
    for r, size in zip(records, _init_stds(records, parameterization, gain, std)):
        group = group_of[r.name]
        rows.append((
            r.name, "x".join(map(str, r.tensor.shape)), r.role, f"{r.m:g}",
            f"{size:.4g}" if r.tensor.ndim > 1 else "-",
            f"{group['lr']:.4g}", f"{group['weight_decay']:.4g}",
            f"{group['eps']:.3g}" if optimizer == "adam" else "-"))

    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [f"{parameterization}, {optimizer}, lr {lr:g}, alpha {alpha:g}"]
    if any(str(warning.message) == _NOTHING_SCALES for warning in caught):
        lines.append(_NOTHING_SCALES)
    lines += ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join(lines)
