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

We use no multipliers in the forward pass. This loses nothing: with a multiplier
n^-a, (a, b, c) and (a+θ, b-θ, c-2θ) train identically under SGD, and so do
(a, b, c) and (a+θ, b-θ, c-θ) under Adam, with ε scaled along.

    base = MLP(784, 256, 3, 10)             # same architecture at the base width
    init_(model, base, "mup", generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(param_groups(model, base, "mup", "sgd", lr=0.1))
    print(plan(model, base, "mup", "sgd", lr=0.1))      # once: is anything scaled?

Schedules: group["lr"] = schedule(step) * group["base_lr"]. Needs torch only;
can be copied alone. Out of scope: depth scaling, and attention logits where
d_head grows with width (mup needs sqrt(d0)/d_head).
"""
import math
import re
import warnings
from fnmatch import fnmatchcase
from types import SimpleNamespace
from typing import NamedTuple

import torch
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


class LossProperties(NamedTuple):
    """What a prediction needs to know of dloss/dlogits."""
    bounded: bool
    vanishes: bool      # where the softmax saturates on a wrong class


LOSS_PROPERTIES = {
    #                              (bounded, vanishes)
    "ce":            LossProperties(True, False),
    "mse":           LossProperties(False, False),
    "brier":         LossProperties(True, True),
    "huber":         LossProperties(True, False),
    "hinge":         LossProperties(True, False),
    "squared_hinge": LossProperties(False, False),
}


def _check_name(kind, name, allowed):
    if name not in allowed:
        raise ValueError(f"unknown {kind} {name!r}; choose from {', '.join(allowed)}")
    return name


def exponents(parameterization, optimizer, alpha=0.0):
    """Return {role: (b, c)} of the table above; alpha is added to every c.

    ValueError for an unknown name.
    """
    row = PARAMETERIZATIONS[
        _check_name("parameterization", parameterization, PARAMETERIZATIONS)]
    rates = row[_check_name("optimizer", optimizer, OPTIMIZERS)]
    return {role: (b, c + alpha) for role, b, c in zip(ROLES, row["b"], rates)}


# ---- predictions: exponents of m for the size of updates, features and logits ----

def predict(parameterization, optimizer, loss, alpha=0.0,
            hidden_layers=3, trainable="all", step=1):
    """Return width exponents under full alignment, and the regime (Propositions 1 and 2).

    hidden_layers counts hidden activations, one more than hidden matrices.
    trainable: "all", or the roles that train: ("output",) are random features.
    step 1 is the first update; later, the backward signal also passes the
    readout's update. ValueError for unknown names. Returns an object with
        .effective    [layer 1, ..., readout]   ΔW x; -inf where never updated
        .propagating  [layer 2, ..., readout]   W0 Δx
        .features     [hidden activation 1, ..., hidden_layers]   Δx
        .logits       the logits, initial ones included
        .regime       "stable", "controlled divergence" or "catastrophic", of all steps
        .lower_bound  True at later steps of a catastrophic regime, where divergence feeds
                      back (mse, sp, alpha = 0: hidden updates n^1.98 at step 4, for n^1)

    In a GPT normalizations hand on inputs of order one: growing features are not
    catastrophic, and the readout's propagating exponent is at most 1 - b_out. Gains
    have no exponent here: where the final norm's gain trains under Adam, it may shrink
    the logits back, and the largest stable LR of sp falls between n^-1 and n^-1/2.

    Under Adam, "controlled divergence" says that features do not blow up, under any
    loss: the updates' size does not depend on the derivative. The loss itself may
    grow with the logits; under mse, sp, alpha = 1 it does so as n at the first step.
    """
    e = exponents(parameterization, optimizer, alpha)
    bounded = LOSS_PROPERTIES[_check_name("loss", loss, LOSS_PROPERTIES)].bounded
    trained = ROLES if trainable == "all" else [
        _check_name("role in trainable:", role, ROLES) for role in trainable]
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
    """Return the smallest alpha that is not catastrophic: the maximal stable LR falls as n^-alpha.

    Proposition 1: sp, SGD, deep: 1/2 under ce, 1 under mse (Adam: 1 under
    both). -inf: no bound (only the readout trains, ce); data that are not
    separable still set an edge.
    """
    return _smallest_alpha(False, parameterization, optimizer, loss, hidden_layers, trainable)


def max_trainable_alpha(parameterization, optimizer, loss, hidden_layers=3, trainable="all"):
    """Return the smallest alpha at which a network is stable and trains: differs under brier only.

    Where logits diverge, the softmax saturates and wrong samples cease to pull
    (under Adam below its ε), though nothing blows up. sp, SGD, deep, brier: 1,
    not 1/2. Ours, not the paper's.
    """
    return _smallest_alpha(True, parameterization, optimizer, loss, hidden_layers, trainable)


def _smallest_alpha(trains, parameterization, optimizer, loss, hidden_layers, trainable):
    """Bisect for the smallest alpha that is stable, and trains if asked for.

    All exponents fall with alpha. -inf: every alpha is; inf: none is.
    """
    def holds(alpha):
        later = predict(parameterization, optimizer, loss, alpha,
                        hidden_layers, trainable, step=2)
        saturated = trains and LOSS_PROPERTIES[loss].vanishes and later.logits > 0
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

class ScalingRecord(NamedTuple):
    """What the shapes beside the base model's say of one tensor."""
    name: str
    short_name: str             # without the prefixes of wrappers
    tensor: torch.Tensor
    role: str
    m: float                    # width ratio of the dimension that the role reads
    m_in: float                 # width ratios of fan-in and fan-out
    m_out: float
    base_std: "float | None"    # std at the base width with gain 1; None: unknown fan-in
    owner: nn.Module


# The dimensions (fan-out, fan-in) of weights, by class name, so that no package
# need be imported.
_FAN_DIMS = {
    **dict.fromkeys(("Linear", "Conv1d", "Conv2d", "Conv3d", "MultiheadAttention",
                     "RNNBase", "RNNCellBase"), (0, 1)),
    **dict.fromkeys(("Embedding", "EmbeddingBag", "Conv1D"), (1, 0)),   # transformers' Conv1D
    **dict.fromkeys(("ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"), (1, 0))}

# torch.nn.utils' hooks and parametrizations that replace a weight's scale.
_RESCALING = {"WeightNorm", "_WeightNorm", "SpectralNorm", "_SpectralNorm", "_Orthogonal"}

# What torch.compile, FSDP and activation checkpointing put into a parameter's name.
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")

_NOTHING_SCALES = (
    "NOTHING SCALES: model and base have the same shapes. "
    "Pass the same architecture at another width as base, "
    "or, at the base width itself, roles as overrides")


def _strip_wrappers(names):
    """Return {name: the name without the prefixes of wrappers}."""
    stripped = {name: name for name in names}
    for wrapper in _WRAPPERS:
        stripped = {name: short.replace(wrapper, "") for name, short in stripped.items()}
    while stripped and all(short.startswith("module.") for short in stripped.values()):  # DDP
        stripped = {name: short.removeprefix("module.") for name, short in stripped.items()}
    return stripped


def _fan_dims(owner, name):
    """Return the dimensions (fan-out, fan-in) of a layer's own weight matrix, else None."""
    leaf = name.rpartition(".")[2]
    if not re.fullmatch(r"weight|weight_[ih][hr].*|.+_proj_weight", leaf):
        return None         # what a subclass adds: adapters, scales
    if getattr(owner, "transposed", False) and owner.groups > 1:
        return None         # (in, out / groups): the fan-in, in / groups, is no dimension
    classes = [cls.__name__ for cls in type(owner).__mro__]
    return next((_FAN_DIMS[cls] for cls in classes if cls in _FAN_DIMS), None)


def _base_std(tensor, owner, dims):
    """Return fan-in^-1/2, the fan-in as in torch.nn.init, but 1 for tables: they pick a row.

    None where the fan-in is not known.
    """
    if tensor.ndim <= 1 or dims is None:
        return None
    if isinstance(owner, (nn.Embedding, nn.EmbeddingBag)):
        return 1.0
    return (tensor.shape[dims[1]] * math.prod(tensor.shape[2:])) ** -0.5


def _infer_role(tensor, ratios, owner, dims):
    """Return the role of a tensor by the dimensions that scale; None where they do not tell."""
    scaling = sum(ratio != 1 for ratio in ratios)
    is_norm = re.search(r"Norm(\dd)?$", type(owner).__name__)
    is_gain = dims is None and (is_norm or sum(size > 1 for size in tensor.shape) <= 1)
    if tensor.ndim <= 1 or scaling == 0 or is_gain:
        return "vector"         # also of fixed shape (a readout's bias): m = 1
    if scaling > 1:
        return "hidden"
    if dims is None:
        return None
    return "input" if ratios[dims[0]] != 1 else "output"


def _ratios_of_role(role, tensor, ratios, dims):
    """Return (m, m_in, m_out) of a tensor whose dimensions scale by these ratios."""
    largest = max((ratio for ratio in ratios if ratio != 1), default=1.0,
                  key=lambda ratio: abs(math.log(ratio)))       # also where m < 1
    if tensor.ndim <= 1 or role == "vector":
        return largest, 1.0, largest
    fan_out, fan_in = dims or (0, 1)
    m_in, m_out = ratios[fan_in], ratios[fan_out]
    m = m_out if role == "input" else m_in
    if dims is None and m == 1:     # of unknown layout: the other dimension scales
        m = largest
    return (m, m_in, m_out) if dims else (m, m, m)


class _TiedReadoutInput:
    """The forward pre-hook of tie_: multiplies a readout's input."""
    factor = 1.0

    def __call__(self, module, args):
        return (args[0] * self.factor, *args[1:])


def _tied_input(module):
    """Return the hook that tie_ put on a readout, else None."""
    hooks = module._forward_pre_hooks.values()
    return next((hook for hook in hooks if isinstance(hook, _TiedReadoutInput)), None)


def _refuse_rescaled(name, owner):
    attached = [*owner.children(), *owner._forward_pre_hooks.values()]
    rescaling = {type(part).__name__ for part in attached} & _RESCALING
    if rescaling:
        raise ValueError(
            f"{name}: {rescaling.pop().lstrip('_')} replaces the scale that init_ draws; "
            "use torch.nn.utils' remove_weight_norm or remove_spectral_norm, "
            "or parametrize.remove_parametrizations")


def _matches(patterns, name, role=None):
    """Return those of the patterns that match a parameter's name, or are its role."""
    return [pattern for pattern in patterns if pattern == role or fnmatchcase(name, pattern)]


def _scaling_records(model, base, overrides):
    """Return a ScalingRecord for every parameter of model: how all below read shapes.

    Warns the caller's caller if nothing scales and no roles are given.
    """
    tensors, base_tensors = (dict(net.named_parameters(remove_duplicate=False))
                             for net in (model, base))
    short_names = _strip_wrappers(tensors)
    base_tensors = {short: base_tensors[name]
                    for name, short in _strip_wrappers(base_tensors).items()}
    modules = dict(model.named_modules(remove_duplicate=False))
    overrides = {short_names.get(key, key): role for key, role in (overrides or {}).items()}
    for pattern, role in overrides.items():
        _check_name(f"role of {pattern}:", role, ROLES)

    records, unknown, used = {}, [], set()      # records by id: a tied tensor has one
    for name, tensor in tensors.items():
        short_name = short_names[name]
        base_tensor = base_tensors.pop(short_name, None)
        if base_tensor is None or base_tensor.ndim != tensor.ndim:
            raise ValueError(
                f"{name} {tuple(tensor.shape)} has no counterpart in base; "
                "pass the same architecture at another width (same depth, same names)")
        owner = modules[name.rpartition(".")[0]]
        if _tied_input(owner):      # the tensor has the role of the embedding
            continue
        _refuse_rescaled(name, owner)
        dims = _fan_dims(owner, name)
        ratios = [n / n0 for n, n0 in zip(tensor.shape, base_tensor.shape)]
        patterns = _matches(overrides, short_name)
        used.update(patterns)
        if not patterns and id(tensor) in records and all(ratio == 1 for ratio in ratios):
            continue                # at the base width another name's role is all there is
        role = (overrides[patterns[-1]] if patterns     # the last one counts
                else _infer_role(tensor, ratios, owner, dims))
        if role is None:
            unknown.append(f"{name} {tuple(tensor.shape)} in a {type(owner).__name__}")
            continue
        record = ScalingRecord(
            name, short_name, tensor, role, *_ratios_of_role(role, tensor, ratios, dims),
            _base_std(base_tensor, owner, dims), owner)
        first = records.setdefault(id(tensor), record)
        if first.role != role:
            readout = name.rpartition(".")[0]
            raise ValueError(
                f"{first.name} ({first.role}) and {name} ({role}) are one tied tensor; untie "
                f"them (model.{readout}.weight = torch.nn.Parameter(model.{readout}.weight"
                f".detach().clone())), or call param.tie_(model, model.{readout})")

    if unknown:
        raise ValueError("cannot tell fan-in from fan-out of " + "; ".join(unknown)
                         + ". Pass overrides={NAME_OR_PATTERN: role}, "
                         f"role one of {', '.join(ROLES)}")
    left_over = [*(overrides.keys() - used), *base_tensors]
    if left_over:
        raise ValueError(f"no parameter of the model is called {', '.join(left_over)}")
    if all(r.m == 1 for r in records.values()) and not overrides:
        warnings.warn(_NOTHING_SCALES, stacklevel=3)
    return list(records.values())


def infer_roles(model, base, overrides=None):
    """Return {parameter name: role}, by shapes beside base's,
    the same architecture at another width.

    base may live on the meta device. Fan-in and fan-out are known for nn.Linear,
    nn.Conv*, one-group nn.ConvTranspose*, nn.Embedding(Bag), torch's recurrent
    layers and MultiheadAttention, and transformers' Conv1D. Gains of norms, and
    whatever has one dimension beside ones, are vectors. Of any other tensor two
    scaling dimensions make it hidden; where one does, give overrides={name or
    pattern: role}.

    ValueError if the architectures differ, if input and output cannot be told
    apart (all such tensors are listed), if one tied tensor has two roles (see
    tie_), or under weight_norm and its like. Warns if nothing scales.
    """
    return {r.name: r.role for r in _scaling_records(model, base, overrides)}


def tie_(model, readout):
    """Let an embedding and a readout share their weight, and return model.

    The tensor has the role of the embedding, input, and init_, rescale_ and
    param_groups set the factor m^(b_in - b_out) by which a forward pre-hook
    multiplies the readout's input: n0/n in mup, as the package mup's
    MuSharedReadout does, and sqrt(n0/n) in sp. readout: the module, whose weight
    is the embedding's. Idempotent. ValueError where it shares no weight.
    """
    names = [name for name, p in model.named_parameters(remove_duplicate=False)
             if p is getattr(readout, "weight", None)]
    if len(names) < 2:
        raise ValueError(f"the weight of {type(readout).__name__} is no tied tensor of the "
                         "model; pass the readout whose weight is the embedding's")
    if not _tied_input(readout):
        readout.register_forward_pre_hook(_TiedReadoutInput())
    return model


def _scale_tied_readouts(model, records, parameterization):
    e = exponents(parameterization, "sgd")
    for module in model.modules():
        hook = _tied_input(module)
        if hook:
            m = next(r.m for r in records if r.tensor is module.weight)
            hook.factor = m ** (e["input"][0] - e["output"][0])


# ---- initial weights and learning rates ----

def _init_stds(records, parameterization, gain, std):
    """Return the standard deviation of each record at the model's width.

    None where init_ leaves the tensor as it was built, nan for a matrix whose
    fan-in is not known. Arguments as in init_.
    """
    short_names = {r.name: r.short_name for r in records}
    std = {short_names.get(key, key): value for key, value in (std or {}).items()}
    for key in std:
        _check_name("name or role in std:", key, (*ROLES, *short_names.values()))
    e, stds = exponents(parameterization, "sgd"), []
    for r in records:
        at_base = std.get(r.short_name)
        if at_base is None and r.role != "vector" and r.tensor.requires_grad:
            at_base = math.nan if r.base_std is None else std.get(r.role, gain * r.base_std)
        stds.append(None if at_base is None else at_base * r.m ** -e[r.role][0])
    return stds


def init_(model, base, parameterization, generator=None, gain=2 ** 0.5, std=None,
          overrides=None):
    """Draw the weight matrices of model in place, N(0, std²), and return model. Idempotent.

    std = m^-b * gain / sqrt(base fan-in); gain sqrt(2) is He's for ReLU, an
    embedding has fan-in 1. std={name or role: value at the base width} replaces
    either. Drawn are the weight matrices of layers whose fan-in is known, and
    tensors named in std; biases of those layers and padding rows become 0. All
    else (gains, scales, temperatures, frozen parameters) stays as it was built.
    ValueError for other matrices, since nothing says how to draw them.

    Draws on the generator's device in the order of model.named_parameters(): a
    CPU generator gives the same weights anywhere, sharded by fully_shard too.
    """
    records = _scaling_records(model, base, overrides)
    stds = _init_stds(records, parameterization, gain, std)
    unknown = [f"{r.name} {tuple(r.tensor.shape)} in a {type(r.owner).__name__}"
               for r, size in zip(records, stds) if size is not None and math.isnan(size)]
    if unknown:
        raise ValueError(f"unknown fan-in of {'; '.join(unknown)}. Give std={{NAME: value at the "
                         "base width}, or the role vector to leave a tensor as it is built, "
                         "or use rescale_")
    _scale_tied_readouts(model, records, parameterization)
    for r, size in zip(records, stds):
        tensor = r.tensor.data
        if size is not None:
            device = tensor.device if generator is None else generator.device
            drawn = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            drawn.normal_(0, size, generator=generator)
            if getattr(r.owner, "padding_idx", None) is not None:
                drawn[r.owner.padding_idx] = 0
            _copy_whole(tensor, drawn)
        elif (tensor.ndim == 1 and r.tensor.requires_grad
              and _fan_dims(r.owner, r.name.replace("bias", "weight"))):
            tensor.zero_()      # the bias of a layer that is drawn
    return model


def _copy_whole(tensor, whole):
    """Copy a whole tensor, or of a sharded one (fully_shard's) this rank's part."""
    if hasattr(tensor, "placements"):
        from torch.distributed.tensor import distribute_tensor
        whole = distribute_tensor(whole.to(tensor.device), tensor.device_mesh,
                                  tensor.placements, src_data_rank=None)
    tensor.copy_(whole)


def built_stds(base):
    """Return {name: RMS} of the weights that base was built with; constant ones are left out."""
    weights = dict(base.named_parameters())
    weights = {short: weights[name].detach() for name, short in _strip_wrappers(weights).items()}
    return {name: w.square().mean().sqrt().item() for name, w in weights.items()
            if w.numel() and w.min() < w.max()}


def rescale_(model, base, parameterization, overrides=None):
    """Keep the model's own initialization: scale every weight, as built, to m^-b times
    its RMS in base, which must hold its weights, and return model.

    Constant tensors stay. Idempotent.
    """
    records = _scaling_records(model, base, overrides)
    _scale_tied_readouts(model, records, parameterization)
    e, now, at_base = exponents(parameterization, "sgd"), built_stds(model), built_stds(base)
    for r in records:
        if r.short_name in now and r.short_name in at_base:
            r.tensor.data.mul_(at_base[r.short_name] * r.m ** -e[r.role][0] / now[r.short_name])
    return model


def param_groups(model, base, parameterization, optimizer, lr, alpha=0.0,
                 weight_decay=0.0, eps=1e-8, role_lr=None, overrides=None):
    """Return parameter groups for torch.optim, one per role and width ratio.
    Plain numbers, no tags.

    lr, weight_decay and eps are the values at the base width. Each group has
    params, names, role, lr and base_lr (equal), weight_decay (lr * weight_decay
    does not change with width) and eps. role_lr={role or name pattern: factor}
    multiplies LRs at every width; 0 freezes. Weight decay is for SGD and AdamW:
    Adam adds it to gradients, which in mup shrink with width. m^-alpha uses the
    model's one width ratio, for tensors of fixed shape too. Where fan-in and
    fan-out of a matrix grow by different factors, mup's LR under SGD is
    proportional to m_out / m_in. ValueError there for parameterizations other
    than sp and mup and for alpha other than 0, and for unknown names.
    """
    records, role_lr = _scaling_records(model, base, overrides), role_lr or {}
    _scale_tied_readouts(model, records, parameterization)
    if any(key in ROLES for key in role_lr) and all(r.role == "vector" for r in records):
        raise ValueError("role_lr needs roles: " + _NOTHING_SCALES)
    ratios = sorted({ratio for r in records for ratio in (r.m, r.m_out)} - {1.0}) or [1.0]
    if alpha != 0 and len(ratios) > 1:
        raise ValueError(f"alpha needs one width ratio, but tensors scale by {ratios}; "
                         "widen every dimension together or use alpha=0")

    e, groups, used = exponents(parameterization, optimizer), {}, set()
    gamma = dict(zip(ROLES, PARAMETERIZATIONS[parameterization]["adam_eps"]))
    for r in records:
        width_factor = r.m ** -e[r.role][1] * ratios[0] ** -alpha       # m^-(c + alpha)
        if r.role == "hidden" and r.m_in != r.m_out:
            if parameterization not in ("sp", "mup"):
                raise ValueError(f"{r.name}: fan-in grows {r.m_in:g} times and fan-out "
                                 f"{r.m_out:g} times, for which {parameterization} has no "
                                 "learning rate; use sp or mup")
            if (parameterization, optimizer) == ("mup", "sgd"):
                width_factor = r.m_out / r.m_in
        patterns = _matches(role_lr, r.short_name, r.role)
        used.update(patterns)
        factor = math.prod(role_lr[pattern] for pattern in patterns)
        group_lr = lr * width_factor * factor
        group = groups.setdefault((r.role, r.m, width_factor, factor), {
            "params": [], "names": [], "role": r.role, "lr": group_lr, "base_lr": group_lr,
            "weight_decay": weight_decay / width_factor,
            "eps": eps * r.m ** -gamma[r.role]})
        group["params"].append(r.tensor)
        group["names"].append(r.name)
    for pattern in role_lr.keys() - used - set(ROLES):
        raise ValueError(f"role_lr names {pattern!r}, which is neither a role of the model's "
                         f"tensors nor a parameter; roles: {', '.join(ROLES)}")
    return list(groups.values())


def plan(model, base, parameterization, optimizer, lr, alpha=0.0,
         weight_decay=0.0, eps=1e-8, role_lr=None,
         gain=2 ** 0.5, overrides=None, std=None):
    """Return a table of every tensor to read before training;
    arguments as in init_ and param_groups.

    Says so below its heading when nothing scales.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        records = _scaling_records(model, base, overrides)
        groups = param_groups(model, base, parameterization, optimizer, lr, alpha,
                              weight_decay, eps, role_lr, overrides)
    group_of = {name: group for group in groups for name in group["names"]}

    rows = [("tensor", "shape", "role", "m", "init std", "lr", "weight decay", "eps")]
    for r, size in zip(records, _init_stds(records, parameterization, gain, std)):
        group = group_of[r.name]
        rows.append((
            r.name, "x".join(map(str, r.tensor.shape)), r.role, f"{r.m:g}",
            "as built" if size is None else f"{size:.4g}",      # nan: init_ asks for it
            f"{group['lr']:.4g}", f"{group['weight_decay']:.4g}",
            f"{group['eps']:.3g}" if optimizer == "adam" else "-"))

    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [f"{parameterization}, {optimizer}, lr {lr:g}, alpha {alpha:g}"]
    if any(str(warning.message) == _NOTHING_SCALES for warning in caught):
        lines.append(_NOTHING_SCALES)
    lines += ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join(lines)
