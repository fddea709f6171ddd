"""Trains one stack of runs, from settings to result rows;
one run is a stack of one.

    settings -> param.param_groups -> a learning rate per replica and tensor
             -> stack.advance -> one row per run

Runs of the same shape, data and loss train as one stack (stack.py), each with
its own seed and learning rates, and each ends with the row it would have alone.
A run whose loss is no longer finite is recorded and leaves the stack.

    python train.py --width 512 --lr 0.1                # prints the row of one run
    torchrun --nproc-per-node 2 train.py --model gpt    # a share of each batch per rank
    rows = train([{"width": 512, "lr": lr} for lr in (0.1, 0.2)])

At one seed every width and learning rate starts from the same generator and
sees the same batches. Departure from the paper: batches are drawn with
replacement. Out of scope: data augmentation.
"""
import os
import sys
SAME_BITS = "torch" not in sys.modules or "MKL_CBWR" in os.environ
# before torch loads MKL: same bits in any stack
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

import argparse
import contextlib
import copy
import difflib
import fnmatch
import functools
import hashlib
import json
import math
import platform
import re
import subprocess
import time
import warnings
from collections import namedtuple
from operator import itemgetter
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import torch

import data
import metrics
import models
import param
import stack
from data import InputError


# ---- settings: every scientific setting of a run, with its one default ----

# What a setting may be: its type, the rule in words, and the rule.
Kind = namedtuple("Kind", "type words holds", defaults=(lambda v: True,))
COUNT = Kind(int, "a whole number, at least 1", lambda v: 1 <= v < 2 ** 31)
WHOLE = Kind(int, "a whole number, at least 0", lambda v: 0 <= v < 2 ** 63 - 1)
POSITIVE = Kind(float, "a positive number", lambda v: 0 < v < math.inf)
NONNEGATIVE = Kind(float, "a number, at least 0", lambda v: 0 <= v < math.inf)
FRACTION = Kind(float, "a number in [0, 1)", lambda v: 0 <= v < 1)
EXPONENT = Kind(float, "a number from -10 to 10", lambda v: -10 <= v <= 10)
FLAG = Kind(bool, "true or false")
TEXT = Kind(str, "a name", bool)
WORDS = Kind(str, "words")
NETWORK = Kind(str, "mlp, gpt or FILE.py:FUNCTION",
               lambda v: v in ("mlp", "gpt") or ":" in v)


def one_of(names):
    return Kind(str, "one of " + ", ".join(names), lambda v: v in names)


SETTINGS = {    # name: (default, kind, help)
    "model": ("mlp", NETWORK,
              "mlp, gpt, or FILE.py:FUNCTION: build(width), or build(width, shape), "
              "in a file of yours, that returns a torch module"),
    "width": (256, COUNT, "hidden units"),
    "base_width": (256, COUNT, "width at which all parameterizations coincide"),
    "hidden_layers": (3, COUNT, "hidden activations; 7 is the paper's 8-layer MLP"),
    "activation": ("relu", one_of(models.ACTIVATIONS), "nonlinearity"),
    "bias": (False, FLAG, "biases, initially zero"),
    "layers": (2, COUNT, "gpt: decoder layers"),
    "context": (32, COUNT, "text: tokens of a sample"),
    "head_dim": (32, COUNT, "gpt: size of an attention head, at every width"),
    "norm_affine": (True, FLAG, "gpt: trainable gains of LayerNorm"),
    "qk_norm": (True, FLAG, "gpt: LayerNorm on queries and keys"),
    "init": ("he", one_of(("he", "own")),
             "he: normal, variance 2 / fan-in (text: 1 / fan-in); "
             "own: as the network is built, with each tensor's RMS at the base width"),
    "roles": ("", WORDS, "NAME=ROLE ... where shapes do not tell; NAME may have * and ?, "
              f"ROLE is one of {', '.join(param.ROLES)}"),
    "code": ("", WORDS, "hash of FILE.py and of the files beside it that it imports"),
    "trainable": ("all", one_of(param.TRAINABLE), "readout: random features"),

    "data": ("multi_index", TEXT,
             f"{', '.join(data.SHAPES)}; "
             "text: stdlib (sources of Python's standard library), "
             "or a file or folder of text or .bin tokens"),
    "vocab_size": (0, WHOLE, "text: tokens; 0 is as many as the data has"),
    "train_size": (20_000, COUNT, "multi_index: training samples"),
    "val_size": (1_000, COUNT, "validation samples"),
    "data_seed": (0, WHOLE, "multi_index: seed of the samples"),
    "loss": ("ce", one_of(stack.LOSSES), "loss"),
    "huber_delta": (1.0, POSITIVE, "huber: error at which its derivative stops growing"),
    "label_smoothing": (0.0, FRACTION, "ce: share of the target that all classes have alike"),

    "param": ("sp", one_of(param.PARAMETERIZATIONS), "parameterization"),
    "alpha": (0.0, EXPONENT, "every LR times (width / base width)^-alpha"),
    "readout_scale": (1.0, NONNEGATIVE,
                      "factor on the readout's initial weights, at every width"),
    "optimizer": ("sgd", one_of(param.OPTIMIZERS), "optimizer; adam is AdamW"),
    "lr": (0.1, POSITIVE, "learning rate at the base width"),
    "momentum": (0.0, FRACTION, "SGD: momentum"),
    "beta1": (0.9, FRACTION, "Adam: decay of the first moment"),
    "beta2": (0.95, FRACTION, "Adam: decay of the second moment"),
    "eps": (1e-8, POSITIVE, "Adam: ε at the base width"),
    "weight_decay": (0.0, NONNEGATIVE, "lr * weight decay per step does not change with width"),
    "clip": (0.0, NONNEGATIVE, "largest gradient norm over all tensors; 0 is no clipping"),

    "steps": (400, COUNT, "optimizer steps"),
    "batch_size": (64, COUNT, "samples a step"),
    "accumulate": (1, COUNT, "gradient accumulation: parts of a batch"),
    "warmup": (0, WHOLE, "steps of linear warmup"),
    "decay": ("none", one_of(("none", "cosine")),
              "cosine: to a tenth of the LR at the last step"),
    "seed": (0, WHOLE, "seed of initialization and data order"),
    "dtype": ("float32", one_of(("float32", "tf32", "float64", "bfloat16")),
              "tf32: products in TF32 on CUDA; bfloat16: by autocast"),
}
# The defaults that differ on text, the paper's.
ON_TEXT = dict(data="stdlib", base_width=64, batch_size=8, val_size=128,
               decay="cosine", warmup=10)
ADAM_ON_TEXT = dict(eps=1e-12, weight_decay=0.1, clip=1.0)
# What may differ within one stack;
# everything else is shape, data, loss or schedule.
PER_REPLICA = ("lr", "seed", "param", "alpha", "weight_decay", "eps",
               "trainable", "readout_scale")
# What the functions of param.py take, in their order.
scaling = itemgetter("param", "optimizer", "lr", "alpha", "weight_decay", "eps")


def is_text(config):
    """Does the network read tokens?"""
    # a list, as a value not yet checked may have no hash
    return config["data"] not in list(data.SHAPES)


def is_own(config):
    """Is the network a user's?"""
    return ":" in config["model"]


def configure(run):
    """A run's settings, defaults filled in.

    InputError names a bad value and what is allowed.
    """
    for name in run:
        if name not in SETTINGS:
            raise InputError(f"unknown setting {name!r}; "
                             f"choose from {', '.join(SETTINGS)}")

    config = {name: default for name, (default, _, _) in SETTINGS.items()}
    asked = {**config, **run}
    if asked["model"] == "gpt" and "data" not in run or is_text(asked):
        config.update(ON_TEXT)
        if asked["optimizer"] == "adam":
            config.update(ADAM_ON_TEXT)
    config.update(run)
    if isinstance(config["model"], str) and is_own(config):
        with refusing():
            config["code"] = models.load(config["model"]).digest
        config["init"] = run.get("init", "own")

    for name, (_, kind, _) in SETTINGS.items():
        value = config[name]
        fits = isinstance(value, (int, float) if kind.type is float else kind.type)
        # to isinstance True is an int too
        fits = (fits and isinstance(value, bool) == (kind is FLAG)
                and kind.holds(value))
        require(config, name, fits, kind.words)
        config[name] = kind.type(value)
    check_together(config)
    return config


def check_together(config):
    """InputError for settings that do not fit one another."""
    model, parts, head = itemgetter("model", "accumulate", "head_dim")(config)
    require(config, "batch_size", config["batch_size"] % parts == 0,
            f"a multiple of accumulate = {parts}")
    require(config, "warmup", config["warmup"] <= config["steps"],
            f"at most steps = {config['steps']}")
    require(config, "data", model != "mlp" or not is_text(config),
            f"one of {', '.join(data.SHAPES)} for model mlp")
    require(config, "data", model != "gpt" or is_text(config),
            "text for model gpt: stdlib, or a file or folder of text or tokens")
    for name in ("width", "base_width"):
        require(config, name, model != "gpt" or config[name] % head == 0,
                f"a multiple of head_dim = {head} for model gpt")


def require(config, name, holds, words):
    if not holds:
        raise InputError(f"{name} is {config[name]!r}; it must be {words}")


def run_id(config):
    """A hash of the full configuration."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


# ---- from settings to a stack ----

@contextlib.contextmanager
def refusing():
    """What a network refuses (ValueError) becomes a line for its user."""
    try:
        yield
    except ValueError as error:
        raise InputError(str(error)) from None


def shape_of(config):
    """What the data ask of a network."""
    if is_text(config):
        # 256 tokens, as of bytes, until the data are read
        return models.Shape(config["context"], config["vocab_size"] or 256, True)
    return models.Shape(*data.SHAPES[config["data"]], False)


def network(config, width, own=models.own):
    """The network at a width, initialized as it does itself."""
    shape = shape_of(config)
    if is_own(config):
        return own(config["model"], width, shape)
    if config["model"] == "gpt":
        sizes = itemgetter("layers", "context", "head_dim",
                           "norm_affine", "qk_norm")(config)
        return models.GPT(shape.classes, width, *sizes)
    return models.MLP(shape.inputs, width, config["hidden_layers"], shape.classes,
                      config["activation"], config["bias"])


def build(config, device="cpu"):
    """(model, its base, {parameter name: role}), on the meta device:
    only shapes matter here.

    The buffers of a user's network are its own, on the device. InputError.
    """
    width, base_width = config["width"], config["base_width"]
    # the last tells roles at the base width too
    widths = width, base_width, 2 * base_width
    with refusing(), torch.device("cpu" if is_own(config) else "meta"):
        model, base, wider = (network(config, width, models.own_shapes) for width in widths)
        model = copy.deepcopy(model)    # own_shapes hands out the same one again
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
                dtype = (weight_dtype(config) if buffer.is_floating_point()
                         else buffer.dtype)
                module._buffers[name] = buffer.to(device, dtype)
        return model, base, roles_of(config, wider, base)


def description(config, model, base, roles):
    """What a prediction must know of the network, for its rows."""
    width, base_width = config["width"], config["base_width"]
    pairs = zip(model.parameters(), base.parameters())
    sizes = [pair for w, w0 in pairs for pair in zip(w.shape, w0.shape)]
    told = config["roles"] or is_own(config) and models.load(config["model"]).roles
    return {"hidden_tensors": list(roles.values()).count("hidden"),
            # a size that changes, but not as the width does
            "uneven": any(n != n0 and n * base_width != n0 * width for n, n0 in sizes),
            "roles_given": bool(told)}


def roles_of(config, model, base):
    """{parameter name: role}, from shapes where neither --roles nor
    the network's file tells it.
    """
    names = [name for name, _ in model.named_parameters()]
    told = models.load(config["model"]).roles if is_own(config) else {}
    if callable(told):
        told = {name: told(name) for name in names if told(name)}
    told = {**told, **dict(word.rpartition("=")[::2] for word in config["roles"].split())}

    overrides = {}
    for pattern, role in told.items():
        found = fnmatch.filter(names, pattern)
        if not found:
            known = ", ".join(names)
            raise ValueError(f"roles name {pattern!r}, which is no parameter; "
                             f"choose from {known}")
        overrides.update(dict.fromkeys(found, role))

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            roles = param.infer_roles(model, base, overrides)
    except ValueError as error:
        # param.py's remedy is for its callers; here it is a flag
        what, untold, _ = str(error).partition("; pass overrides=")
        if not untold:
            raise
        raise ValueError(f"{what}; give it a role by --roles NAME=ROLE, "
                         "or by roles = {NAME: ROLE} in its file; "
                         f"roles: {', '.join(param.ROLES)}") from None
    if set(roles.values()) == {"vector"}:
        raise ValueError(f"no parameter of {config['model']} becomes larger "
                         "with its width")
    return roles


def weight_dtype(config):
    """bfloat16 is autocast's: weights and data stay float32."""
    return torch.float64 if config["dtype"] == "float64" else torch.float32


def loss_of(config):
    """The stack.Loss of a run, with its options set."""
    loss = stack.LOSSES[config["loss"]]
    options = {key: config[setting] for key, setting in loss.options.items()}
    function, constant = (functools.partial(part, **options) for part in loss[:2])
    return stack.Loss(function, constant)


def chance_loss(config, splits):
    """Loss of the best constant predictor;
    for text under cross-entropy the unigram entropy.
    """
    return loss_of(config).constant(splits.frequencies)


def network_of(config, model):
    """How this model's logits and gradients are computed."""
    loss = loss_of(config).function
    if (config["model"] == "mlp" and not config["bias"]
            and config["dtype"] != "bfloat16"):
        return stack.mlp_network(loss, config["activation"] == "relu")
    return stack.module_network(model, loss, alone=better_alone(config))


def better_alone(config):
    """Does a run that is alone in its stack train without vmap?

    Attention and convolutions are faster so; other networks give the same rows
    in any stack.
    """
    return is_text(config) or tried(config) != "stacked"


def stackable(config):
    """Can vmap run the network at all?"""
    return tried(config) != "one by one"


def tried(config):
    """How runs of a network train:
    "stacked", with "convolutions", or "one by one".
    """
    if is_own(config):
        return _tried(config["model"], config["base_width"], shape_of(config))
    return "stacked"


@functools.cache
def _tried(spec, width, shape):
    model = models.own(spec, width, shape)
    x = torch.zeros(2, 2, shape.inputs, dtype=torch.long if shape.text else torch.float32)
    y = (x if shape.text else x[..., 0]).long()             # (R, B, ...)
    weights = [w.detach().expand(2, *w.shape) for w in model.parameters()]
    try:
        stack.module_network(model, stack.ce).gradients(weights, x, y)
    except Exception as error:      # whatever vmap, or the network within it, raises
        words = re.split(r"\n|\. ", str(error).strip())[0]
        print(f"{spec} cannot be stacked, so its runs train one by one: {words}",
              file=sys.stderr)
        return "one by one"
    convolves = any(isinstance(module, torch.nn.modules.conv._ConvNd)
                    for module in model.modules())
    return "convolutions" if convolves else "stacked"


def rule_of(config):
    return stack.Rule(config["optimizer"],
                      config["momentum"], config["beta1"], config["beta2"],
                      config["weight_decay"] > 0, config["clip"])


def replica_init(run, model, base, roles, dtype):
    """A run's initial weights, [shape] in the model's order, on the CPU,
    from its seed alone.
    """
    if run["init"] == "own":
        fresh, built = (as_built(run, run[width]).to(dtype)
                        for width in ("width", "base_width"))
        param.rescale_(fresh, built, run["param"], roles)
    else:
        empty = [torch.empty(w.shape, dtype=dtype) for w in model.parameters()]
        fresh = models.put(copy.deepcopy(model), empty)
        generator = torch.Generator().manual_seed(run["seed"])
        param.init_(fresh, base, run["param"], generator,
                    gain=gain_of(run), overrides=roles)
    for name, weights in fresh.named_parameters():
        if roles[name] == "output":
            weights.data.mul_(run["readout_scale"])
    return [weights.detach() for weights in fresh.parameters()]


def as_built(run, width):
    """The network at a width as it initializes itself,
    from the run's seed alone.
    """
    with torch.random.fork_rng(devices=[]), refusing():
        torch.manual_seed(run["seed"])
        return network(run, width)


def gain_of(config):
    """He's for ReLU; the inputs of a decoder's layers are normalized."""
    return 1.0 if is_text(config) else math.sqrt(2)


def plan(run):
    """param.plan of one run: a table of what it draws and trains with."""
    model, base, roles = build(run)
    std = (param.own_stds(as_built(run, run["base_width"]))
           if run["init"] == "own" else None)
    return param.plan(model, base, *scaling(run), role_lr=role_lr(run),
                      gain=gain_of(run), overrides=roles, std=std)


def role_lr(run):
    """Factor on every role's LR: 0 for those that stay as they are."""
    trained = param.TRAINABLE[run["trainable"]]
    return {role: float(role in trained) for role in param.ROLES}


def stack_of(runs, model, base, roles, device, dtype):
    """The stack of R runs, each drawn and scaled by its own settings."""
    draws = [itemgetter("seed", "param", "readout_scale")(run) for run in runs]

    def initial():
        for r, run in enumerate(runs):
            first = draws.index(draws[r])       # has the same initial weights
            yield first if first < r else replica_init(run, model, base, roles, dtype)

    groups = [param.param_groups(model, base, *scaling(run),
                                 role_lr=role_lr(run), overrides=roles)
              for run in runs]

    def per_tensor(key):        # [{parameter name: value} per run]
        return [{name: group[key] for group in of_run for name in group["names"]}
                for of_run in groups]

    values = map(per_tensor, ("lr", "weight_decay", "eps"))
    return stack.make(model, initial(), *values, rule_of(runs[0]).moments, device, dtype)


def data_order(runs, samples, config, device):
    """(sample indices (seeds, steps, B), the row of each run in them (R,)),
    from each seed alone.
    """
    size, order = (config["steps"], config["batch_size"]), []
    seeds = sorted({run["seed"] for run in runs})
    for seed in seeds:
        # apart from the initialization's
        generator = torch.Generator().manual_seed(seed + 1)
        order.append(torch.randint(samples, size, generator=generator))
    rows = [seeds.index(run["seed"]) for run in runs]
    return torch.stack(order).to(device), torch.tensor(rows, device=device)


def schedule(step, config):
    """Factor on every LR at a step, from zero:
    linear warmup, then constant or cosine to a tenth.
    """
    warmup = config["warmup"]
    if step < warmup:
        return (step + 1) / warmup
    if config["decay"] == "none":
        return 1.0
    progress = (step - warmup) / max(1, config["steps"] - warmup - 1)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


def last_tenth(steps):
    """The step from which on losses and accuracies count."""
    return steps - max(1, steps // 10)


# ---- training ----

VALIDATION = ("val_loss", "val_accuracy", "logit_rms", "val_ece")
RESULTS = ("final_train_loss", "train_accuracy", *VALIDATION, "diverged_at")


def train(runs, splits=None, device="cpu", data_dir=None, progress=None,
          track=0, tracked=None, alignment=False, checkpoint=None, every=0):
    """Trains runs as one stack and returns one row (dict) per run, in their order.

    runs: dicts of SETTINGS, missing ones at their defaults; only PER_REPLICA may differ.
    splits: from data.load, loaded if absent. progress(step, replicas still training) is
    called at times. track = N appends to `tracked` what `tracker` measures after each of
    the first 20 steps, every N-th and the last. checkpoint: a path, written every so
    many steps; if it is there, training goes on from it. Under torch.distributed every
    rank takes an equal share of each batch.

    A row holds the settings, their id, results and provenance. final_train_loss and
    train_accuracy are means over the last tenth of the steps, VALIDATION those over the
    validation samples; chance_loss is a constant predictor's. diverged_at is the first
    step, from zero, whose loss is not finite (steps, if only the last update blew up);
    results are then null. InputError on bad settings, or runs that cannot share a stack.
    """
    start, (rank, ranks) = time.perf_counter(), team()
    runs, config, splits = prepare(runs, splits, device, data_dir, ranks)
    model, base, roles = build(config, device)
    network, rule, steps = network_of(config, model), rule_of(config), config["steps"]
    order_device = "cpu" if splits.y is None else splits.x.device  # text is read on the CPU
    order, row_of = data_order(runs, splits.samples, config, order_device)
    order = order[..., rank::ranks]
    replicas = stack_of(runs, model, base, roles, device, weight_dtype(config))
    state = begin(runs, replicas, device, track, tracked)
    if track:
        measure = tracker(state, model, roles, splits, config, alignment)
    if checkpoint and checkpoint.exists():
        load_checkpoint(checkpoint, state, device)
    rows, checked = row_of[state.alive.to(order_device)], state.done
    check_every = 5 if torch.device(device).type == "cpu" else 25  # checks wait for the device

    with torch.no_grad(), precision(config, device):
        for step in range(checked, steps):
            x, y = splits.batch(order[rows, step])
            means = stack.advance(
                state.stack, x, y, network, rule, step, schedule(step, config),
                parts=config["accumulate"], accuracy=step >= last_tenth(steps),
                average=average_ if ranks > 1 else None)
            for record, values in zip((state.losses, state.hits), means):
                record[step, state.alive] = values
            done = state.done = step + 1
            last, due = done == steps, every and done % every == 0
            if track and (done <= 20 or done % track == 0 or last):
                measure()
            if last or due or done % check_every == 0:
                let_go(state, checked, last)
                rows, checked = row_of[state.alive.to(order_device)], done
                if progress:
                    progress(done, len(rows))
                if len(rows) == 0:
                    break
                if checkpoint and due and not last and rank == 0:
                    save_checkpoint(checkpoint, vars(state))
        finals = evaluate(network, state, splits, config) if len(rows) else {}
    origin = {"chance_loss": chance_loss(config, splits),
              "network": description(config, model, base, roles), **provenance(device),
              "seconds": round((time.perf_counter() - start) / len(runs), 4)}
    return finished_rows(runs, state, finals, origin, ranks)


def team():
    """(rank, ranks) of torch.distributed, (0, 1) without it."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


@contextlib.contextmanager
def precision(config, device):
    """How matrix products are rounded; torch's own setting comes back at the end."""
    before = torch.get_float32_matmul_precision()
    half = config["dtype"] == "bfloat16"
    try:
        if config["dtype"] == "tf32":
            torch.set_float32_matmul_precision("high")
        with torch.autocast(torch.device(device).type, torch.bfloat16, half,
                            cache_enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def prepare(runs, splits, device, data_dir, ranks):
    """(settings of every run, those of the stack, data). InputError as train says."""
    runs = [configure(run) for run in runs]
    for name in runs[0]:
        if name not in PER_REPLICA and any(run[name] != runs[0][name] for run in runs):
            raise InputError(f"runs of one stack must share {name}; "
                             f"only {', '.join(PER_REPLICA)} may differ")

    splits = data.load(runs[0], data_dir, device) if splits is None else splits
    if is_text(runs[0]):
        runs = [dict(run, vocab_size=splits.classes) for run in runs]
    # a stack has weight decay if any of its runs does
    config = dict(runs[0], weight_decay=max(run["weight_decay"] for run in runs))

    size, shares = config["batch_size"], ranks * config["accumulate"]
    require(config, "batch_size", size <= splits.samples,
            f"at most the {splits.samples} training samples")
    require(config, "batch_size", size % shares == 0,
            f"a multiple of {ranks} ranks times accumulate = {config['accumulate']}")
    return runs, config, splits


def begin(runs, replicas, device, track, tracked):
    """The state of a stack that has made no step; what a checkpoint keeps."""
    losses = replicas["weights"][0].new_full((runs[0]["steps"], len(runs)), math.nan)
    return SimpleNamespace(
        ids=[run_id(run) for run in runs], track=track, tracked=tracked,
        done=0, stack=replicas,
        alive=torch.arange(len(runs), device=device),       # replicas still training
        diverged_at=[None] * len(runs),
        losses=losses, hits=torch.zeros_like(losses))               # (steps, R)


def let_go(state, checked, last):
    """Records the replicas that diverged since step `checked`,
    and drops them from the stack.

    The last update of a run shows in no loss: after it the weights count as one more step.
    """
    alive, done = state.alive, state.done
    bad = ~state.losses[checked:done, alive].isfinite()     # (steps, alive)
    if last:
        finite_weights = [w.flatten(1).isfinite().all(1) for w in state.stack["weights"]]
        bad = torch.cat([bad,                               # (steps + 1, alive)
                         ~torch.stack(finite_weights).all(0)[None]])
    stays = ~bad.any(0)
    if stays.all():
        return
    if checked == 0 and bad[0].any():
        raise InputError("the loss is not finite before the first update; "
                         "mend the initial weights, or use another --readout-scale")
    first = checked + bad.int().argmax(0)
    for replica, step in torch.stack([alive, first], 1)[~stays].tolist():
        state.diverged_at[replica] = step
    state.alive = alive[stays]
    stack.drop_(state.stack, stays)


def average_(tensors):
    """Averages tensors over the ranks of torch.distributed,
    in place, as one message.
    """
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    torch.distributed.all_reduce(flat)
    flat /= torch.distributed.get_world_size()
    for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
        tensor.copy_(mean.view_as(tensor))


def evaluate(network, state, splits, config):
    """{replica: {name in VALIDATION: value}}, means over the validation samples.

    logit_rms is the RMS over classes; val_ece, the expected calibration error,
    is null for text.
    """
    loss, text, count = loss_of(config).function, is_text(config), len(state.alive)
    chunk, sums, kept = 256, 0, []
    if text:
        chunk = max(config["batch_size"] // config["accumulate"], 2048 // config["context"])
    for x, y in zip(splits.x_val.split(chunk), splits.y_val.split(chunk)):
        x, y = (part.expand(count, *part.shape) for part in (x, y))
        logits = network.forward(state.stack["weights"], x)     # (R, chunk, ..., C)
        per_sample = (loss(logits, y)[0],
                      logits.argmax(-1) == y,
                      logits.square().mean(-1).sqrt())
        sums += torch.stack([values.double().flatten(1).sum(1)
                             for values in per_sample])         # (3, R)
        kept += [] if text else [logits]

    means, errors = (sums / splits.y_val.numel()).T.tolist(), [None] * count
    if not text:
        errors = [metrics.expected_calibration_error(z, splits.y_val)
                  for z in torch.cat(kept, 1)]
    rows = (finite(dict(zip(VALIDATION, [*row, error])))
            for row, error in zip(means, errors))
    return dict(zip(state.alive.tolist(), rows))


# ---- result rows ----

def finite(value):
    """The same, with null (None) for every number that is not finite: strict JSON."""
    return json.loads(json.dumps(value), parse_constant=lambda constant: None)


def finished_rows(runs, state, finals, origin, ranks):
    """The rows of a stack that has ended; finals: {replica: validation}."""
    config = runs[0]
    # a small product alone is shared out otherwise by several threads, whatever
    # MKL promises (measured)
    small = min(config["width"] // 2, config["batch_size"] // config["accumulate"]) < 16
    differs = (len(runs) > 1 if better_alone(config)
               else small and torch.get_num_threads() > 1)
    origin["deterministic"] &= ranks == 1 and not differs

    late = last_tenth(config["steps"])
    losses, hits = (record[late:].T.tolist()                # (R, late steps)
                    for record in (state.losses, state.hits))
    rows = []
    for r, (run, at) in enumerate(zip(runs, state.diverged_at)):
        results = {**dict.fromkeys(RESULTS), "diverged_at": at}
        if at is None:
            results.update(finals[r], final_train_loss=fmean(losses[r]),
                           train_accuracy=fmean(hits[r]))
        rows.append({"id": state.ids[r], **run, **results, "failed": None, **origin})
    return rows


def failed_row(run, reason, device):
    """The row of a run that could not be trained at all."""
    return {"id": run_id(run), **run, **dict.fromkeys(RESULTS), "failed": reason,
            "chance_loss": None, "network": None, **provenance(device), "seconds": 0.0}


@functools.cache
def provenance(device):
    """Versions, device, git commit of this file ("+" if the tree was changed),
    and whether the same run gives the same bits here whatever shares its stack.

    MKL promises that on the CPU (if this file came before torch), CUDA does not.
    """
    describe = "git describe --always --dirty=+ --abbrev=12 --exclude=*".split()
    try:
        ran = subprocess.run(describe, cwd=Path(__file__).parent,
                             capture_output=True, text=True)
        commit = ran.stdout.strip() or None
    except OSError:
        commit = None
    kind = torch.device(device).type
    return {"python": platform.python_version(), "torch": torch.__version__,
            "device": torch.cuda.get_device_name(device) if kind == "cuda" else kind,
            "commit": commit,
            "deterministic": (kind == "cpu" and torch.backends.mkl.is_available()
                              and SAME_BITS)}


def tracker(state, model, roles, splits, config, alignment):
    """measure(): appends to state.tracked a dict per replica and module: its id,
    the step and `measurements` on the first batch_size validation samples, the
    same for every run.
    """
    x, y = (part[:config["batch_size"]] for part in (splits.x_val, splits.y_val))
    module, loss_and_chi = copy.deepcopy(model), loss_of(config).function

    def loss(logits, y):
        return loss_and_chi(logits, y)[0].mean()

    def weights_of(position):
        return [w[position] for w in state.stack["weights"]]

    before = []                 # training goes on in the weights: these are copies
    with torch.no_grad():
        for r in state.alive.tolist():
            models.put(module, [w.clone() for w in weights_of(r)])
            before.append((metrics.capture(module, x), module(x), {} if alignment else None))

    @torch.autocast(x.device.type, enabled=False)
    def measure():
        softmax = state.done == config["steps"] and y.ndim == 1
        for position, r in enumerate(state.alive.tolist()):
            models.put(module, weights_of(position))
            for row in measurements(module, roles, x, y, loss, *before[r], softmax):
                state.tracked.append({"id": state.ids[r], "step": state.done,
                                      **finite(row)})

    return measure


def measurements(module, roles, x, y, loss, reference, initial_logits, norms, softmax):
    """Yields a dict per module: module, layer (from 0, in the model's order),
    role, refined coordinate check, layer statistics, alignments if there are
    norms (see metrics.alignment), gradient norm.

    And one for the logits, module "": loss, change (rms), rms, margin, chi, and
    softmax outputs if asked for.
    """
    layers = metrics.updates(module, reference, x)
    given = module, reference, x, layers
    check = metrics.refined_coordinate_check(*given)
    statistics = metrics.layer_statistics(*given)
    aligned = {} if norms is None else metrics.alignment(*given, norms)
    parameters = list(module.parameters())
    with torch.enable_grad():
        logits = module(x)
        value = loss(logits, y)
        gradients = torch.autograd.grad(value, parameters)

    # tied ones once
    of_weight = dict(zip(parameters, zip(roles.values(), gradients)))
    for layer, name in enumerate(layers):
        role, gradient = of_weight[module.get_submodule(name).weight]
        yield {"module": name, "layer": layer, "role": role,
               **check[name], **statistics[name], **aligned.get(name, {}),
               "gradient": gradient.norm().item()}

    logits = logits.detach()
    change = (logits - initial_logits).square().mean(-1).sqrt().mean()
    row = {"module": "", "layer": len(layers), "role": "logits",
           "loss": value.item(), "change": change.item(),
           **metrics.logit_statistics(logits, y, loss)}
    yield {**row, "softmax": logits.softmax(-1).tolist()} if softmax else row


# ---- files ----

def lines_of(rows):
    return "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)


def append_rows(path, rows):
    """Appends whole lines, and returns once they are on the disk."""
    with open(path, "a") as file:
        file.write(lines_of(rows))
        file.flush()
        os.fsync(file.fileno())


def make_folder(path):
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"out is {path}, which cannot be made a folder "
                         f"({error.strerror}); name another with --out") from None


def save_checkpoint(path, state):
    """Writes whole or not at all;
    the data order follows from the seed and the step.
    """
    with data.whole_file(path) as file:
        try:
            torch.save({**state, "stack": stack.state(state["stack"])}, file)
        except RuntimeError as error:       # how torch says that the disk is full
            raise OSError(f"{path} could not be written; make room, "
                          "or train without --checkpoint") from error


def load_checkpoint(path, state, device):
    """Sets a begun state to what was saved.

    InputError if that is damaged or of other runs.
    """
    with open(path, "rb") as file:
        try:
            saved = dict(torch.load(file, map_location=device, weights_only=True))
            saved = {name: saved[name] for name in vars(state)}
        except Exception:           # a damaged file raises all kinds
            raise InputError(f"{path} is damaged; "
                             "remove it to begin that run anew") from None
    if saved["ids"] != state.ids:
        raise InputError(f"{path} belongs to another run; "
                         "remove it, or use another --out")
    if saved["track"] != state.track:
        raise InputError(f"{path} was begun with --track {saved['track']}, "
                         f"not {state.track}; go on with that, or remove it")
    if state.track:
        state.tracked[:] = saved["tracked"]     # the caller's list
    vars(state).update(saved, tracked=state.tracked)


# ---- command line, shared by the scripts ----

class Parser(argparse.ArgumentParser):
    """argparse with errors of one line that name the remedy, and flags spelled out."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message):
        unknown = re.match(r"unrecognized arguments: (--\S+)", message)
        if unknown:
            near = difflib.get_close_matches(
                unknown[1], self._option_string_actions, 1, 0.75)
            message += f"; did you mean {near[0]}?" if near else "; see --help"
        if re.search(r"invalid \w+ value: '.*,.*'", message):
            message += "; separate values by spaces"
        self.exit(2, f"{self.prog}: {message}\n")


def add_flags(parser, several=(), without=(), defaults=()):
    """A flag for every setting, None where it is not given,
    and those that all scripts share.

    several: settings that take a list; without: those without a flag;
    defaults: {name: words}, those that a script replaces.
    """
    add = parser.add_argument_group("settings of a run").add_argument
    for name, (default, kind, text) in SETTINGS.items():
        if name in (*without, "code"):          # the file tells its code
            continue
        words = dict(defaults).get(name, "none" if default == "" else default)
        for where, values in (("text", ON_TEXT), ("text adam", ADAM_ON_TEXT),
                              ("FILE.py", {"init": "own"})):
            if name in values:
                words = f"{words}; {where}: {values[name]}"
        choices = f"{kind.words}; " if kind.words.startswith("one of") else ""
        options = {"help": f"{choices}{text} (default {words})".replace("%", "%%")}
        if kind is FLAG:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options.update(type=kind.type,
                           metavar={str: "NAME", int: "N", float: "X"}[kind.type],
                           nargs="+" if name in (*several, "roles") else None)
        add("--" + name.replace("_", "-"), **options)
    add("--plan", action="store_true",
        help="print every tensor's role, initial standard deviation and LR, and stop; "
        "look at it before you train a network of yours")

    add = parser.add_argument_group("measurements and machine").add_argument
    add("--track", type=int, default=0, metavar="N",
        help="measure every module in the first 20 steps, then every N-th, "
        "into track*.jsonl of --out; 0 is never (default 0)")
    add("--alignment", action="store_true",
        help="with --track: operator-norm alignments too, at twice the cost")
    add("--data-dir", metavar="DIR",
        help="folder of the data files (default $DATA_DIR, ./data)")
    add("--device", default="auto",
        help="auto, cpu, cuda or cuda:N; "
        "under torchrun each rank takes its own (default auto)")


def choose_device(name):
    """torch's name of a device; auto takes CUDA where there is one, and ranks
    of torchrun take the CUDA devices of their node in turn.

    InputError if it is not there.
    """
    count = torch.cuda.device_count()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{int(os.environ['LOCAL_RANK']) % max(1, count)}"
    kind = re.fullmatch(r"cpu|cuda(:(\d+))?", name)
    if not kind:
        raise InputError(f"device is {name!r}; choose auto, cpu, cuda or cuda:N")
    if name != "cpu" and int(kind[2] or 0) >= count:
        raise InputError(f"device {name} is not there ({count} CUDA devices); "
                         "use --device auto")
    return name


def command_line(main):
    """Runs main; bad input ends with one line and exit code 2,
    an interrupt with 130.
    """
    try:
        return main()
    except BrokenPipeError:             # whoever read the output, head say, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt as interrupt:
        print(f"\n{str(interrupt) or 'interrupted; the same command goes on'}",
              file=sys.stderr)
        sys.exit(130)
    except (InputError, OSError) as error:
        words = " ".join(str(error).split())
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        words = ("out of memory; use a smaller width, batch size, "
                 "number of steps or --stack")
    print(f"{Path(sys.argv[0]).name}: {words}", file=sys.stderr)
    sys.exit(2)


def out_of_memory(error):
    # the CPU's are plain RuntimeErrors
    words = "DefaultCPUAllocator|Storage size calculation overflowed"
    return (isinstance(error, (MemoryError, torch.OutOfMemoryError))
            or bool(re.search(words, str(error))))


def parse():
    """(settings of the run, the other flags)."""
    parser = Parser(description="Train one network and print its row as JSON. "
                    "Under torchrun: data-parallel.")
    add_flags(parser)
    add = parser.add_argument_group("results").add_argument
    add("--out", type=Path, metavar="DIR",
        help="also write the row to DIR/runs-ID.jsonl; "
        "a run found there is not run again")
    add("--checkpoint", type=int, default=0, metavar="N",
        help="every N steps write DIR/checkpoint-ID.pt, to go on from; "
        "0 is never (default 0)")
    args = vars(parser.parse_args())
    for name in ("track", "checkpoint"):
        fits = args[name] > 0 and args["out"] or args[name] == 0
        require(args, name, fits, "at least 0, with a folder for it: --out DIR")
    config = configure(settings_given(args))
    build(config)       # says what does not fit before anything is loaded
    return config, SimpleNamespace(**args)


def settings_given(args):
    """{setting: value} of those that the command line names."""
    given = {name: args[name] for name in SETTINGS if args.get(name) is not None}
    if "roles" in given:
        given["roles"] = " ".join(given["roles"])
    return given


def main():
    config, args = parse()
    if args.plan:
        return print(plan(config))
    device, every = choose_device(args.device), args.checkpoint
    leader = os.environ.get("RANK", "0") == "0"
    splits, tracked = data.load(config, args.data_dir, device), []
    if is_text(config):
        config["vocab_size"] = splits.classes

    out, key = args.out or Path(), run_id(config)
    file, tracks = out / f"runs-{key}.jsonl", out / f"track-{key}.jsonl"
    checkpoint = out / f"checkpoint-{key}.pt"
    if args.out and file.exists() and (tracks.exists() or not args.track):
        if leader:
            print(f"{file} is there: not run again", file=sys.stderr)
            print(file.read_text(), end="")
        return
    if args.out:
        make_folder(out)
    if "TORCHELASTIC_RUN_ID" in os.environ:         # set by torchrun
        torch.distributed.init_process_group(
            "nccl" if device.startswith("cuda") else "gloo")

    def progress(step, alive):
        if leader and (sys.stderr.isatty() or step == config["steps"]):
            print(f"\rstep {step}/{config['steps']}", end="", file=sys.stderr, flush=True)

    try:
        row, = train([config], splits, device, None, progress,
                     args.track, tracked, args.alignment,
                     checkpoint if every else None, every)
    except KeyboardInterrupt:
        goes_on = "begins anew (--checkpoint N would keep what is done)"
        if every and checkpoint.exists():
            goes_on = f"goes on from {checkpoint}"
        raise KeyboardInterrupt(f"interrupted; the same command {goes_on}") from None

    if leader:
        at = row["diverged_at"]
        print("" if at is None else f"\ndiverged at step {at}", file=sys.stderr)
        # the row last: it says that all is done
        for path, rows in ((tracks, tracked), (file, [row])):
            if args.out and rows:
                with data.whole_file(path) as target:
                    target.write(lines_of(rows).encode())
        if args.out:
            checkpoint.unlink(missing_ok=True)
        print(lines_of([row]), end="")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    command_line(main)
