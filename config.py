"""Every setting of a run: its default, its check and its help; the identity of a
run; and what the command lines of all scripts share.

    config    dict {name: value} of all settings, as `configure` completes it
    curve     the settings in CURVE: a sweep varies width, LR and seed along each curve
    text      data of tokens, which a network reads one window at a time

    configure({"width": 512, "lr": 0.1})        # -> config; InputError for a bad value

A setting has one default, here. Library functions take it as an argument.
"""
import argparse
import contextlib
import difflib
import functools
import hashlib
import json
import math
import os
import platform
import re
import subprocess
import sys
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple
from collections.abc import Callable

import torch

import data
import models
import param
import stack
from data import InputError


# ---- what a setting may be ----

class Check(NamedTuple):
    """The type of a setting, the rule in words, and the rule."""
    type: type
    description: str
    is_valid: Callable = lambda value: True


POSITIVE_INT = Check(int, "a whole number, at least 1", lambda v: 1 <= v < 2 ** 31)
NON_NEGATIVE_INT = Check(int, "a whole number, at least 0", lambda v: 0 <= v < 2 ** 63 - 1)
POSITIVE = Check(float, "a positive number", lambda v: 0 < v < math.inf)
NON_NEGATIVE = Check(float, "a number, at least 0", lambda v: 0 <= v < math.inf)
FRACTION = Check(float, "a number in [0, 1)", lambda v: 0 <= v < 1)
EXPONENT = Check(float, "a number from -10 to 10", lambda v: -10 <= v <= 10)
FLAG = Check(bool, "true or false")
NAME = Check(str, "a name", bool)
STRING = Check(str, "words")
MODEL = Check(str, "mlp, gpt or FILE.py:FUNCTION", lambda v: v in ("mlp", "gpt") or ":" in v)


def one_of(names):
    return Check(str, "one of " + ", ".join(names), lambda v: v in names)


SETTINGS = {    # name: (default, check, help)
    "model": ("mlp", MODEL,
              "mlp, gpt, or FILE.py:FUNCTION: build(width), or build(width, shape), "
              "in a file of yours, that returns a torch module"),
    "width": (256, POSITIVE_INT, "hidden units"),
    "base_width": (256, POSITIVE_INT, "width at which all parameterizations coincide"),
    "hidden_layers": (3, POSITIVE_INT, "hidden activations; 7 is the paper's 8-layer MLP"),
    "bias": (False, FLAG, "biases, initially zero"),
    "layers": (2, POSITIVE_INT, "gpt: decoder layers"),
    "context": (32, POSITIVE_INT, "text: tokens of a sample"),
    "head_dim": (32, POSITIVE_INT, "gpt: size of an attention head, at every width"),
    "norm_affine": (True, FLAG, "gpt: trainable gains of LayerNorm"),
    "qk_norm": (True, FLAG, "gpt: LayerNorm on queries and keys"),
    "init": ("he", one_of(("he", "own")),
             "he: normal, variance 2 / fan-in (text: 1 / fan-in); "
             "own: as the model is built, with each tensor's RMS at the base width"),
    "roles": ("", STRING, "NAME=ROLE ... where shapes do not tell; NAME may have * and ?, "
              f"ROLE is one of {', '.join(param.ROLES)}"),
    "code": ("", STRING, "hash of FILE.py and of the modules that it imports from its folder"),
    "lr_factor": ("", STRING, "PATTERN=X ...: factor on the LR of a role or of the parameters "
                  "so named; 0 freezes (input=0 hidden=0 vector=0 trains the readout alone)"),

    "data": ("multi_index", NAME,
             f"{', '.join(data.SHAPES)}; FILE.npz with arrays x, y, perhaps x_val, y_val; "
             "FILE.py:FUNCTION that returns them; text: stdlib (sources of Python's "
             "standard library), or a file or folder of text, .bin or .npy tokens"),
    "data_hash": ("", STRING, "hash of the data's content"),
    "vocab_size": (0, NON_NEGATIVE_INT, "text: tokens; 0 is as many as the data has"),
    "train_size": (20_000, POSITIVE_INT, "multi_index: training samples"),
    "val_size": (1_000, POSITIVE_INT, "multi_index, images, text: validation samples"),
    "data_seed": (0, NON_NEGATIVE_INT, "seed of generated samples and of a validation split"),
    "loss": ("ce", one_of(stack.LOSSES), "loss"),
    "huber_delta": (1.0, POSITIVE, "huber: error at which its derivative stops growing"),

    "param": ("sp", one_of(param.PARAMETERIZATIONS), "parameterization"),
    "alpha": (0.0, EXPONENT, "every LR times (width / base width)^-alpha"),
    "readout_scale": (1.0, NON_NEGATIVE,
                      "factor on the readout's initial weights, at every width"),
    "optimizer": ("sgd", one_of(param.OPTIMIZERS), "optimizer; adam is AdamW"),
    "lr": (0.1, POSITIVE, "learning rate at the base width"),
    "momentum": (0.0, FRACTION, "SGD: momentum"),
    "beta1": (0.9, FRACTION, "Adam: decay of the first moment"),
    "beta2": (0.95, FRACTION, "Adam: decay of the second moment"),
    "eps": (1e-8, POSITIVE, "Adam: ε at the base width"),
    "weight_decay": (0.0, NON_NEGATIVE, "lr * weight decay per step does not change with width"),
    "clip": (0.0, NON_NEGATIVE, "largest gradient norm over all tensors; 0 is no clipping"),

    "steps": (400, POSITIVE_INT, "optimizer steps"),
    "batch_size": (64, POSITIVE_INT, "samples a step"),
    "accumulate": (1, POSITIVE_INT, "gradient accumulation: parts of a batch"),
    "warmup": (0, NON_NEGATIVE_INT, "steps of linear warmup"),
    "decay": ("none", one_of(("none", "cosine")),
              "cosine: to a tenth of the LR at the last step"),
    "seed": (0, NON_NEGATIVE_INT, "seed of initialization and data order"),
    "same_batches": (False, FLAG, "every seed sees the batches of seed 0"),
    "sharpness": (False, FLAG, "measure the loss's largest Hessian eigenvalue at initialization"),
    "dtype": ("float32", one_of(("float32", "tf32", "float64", "bfloat16")),
              "tf32: products in TF32 on CUDA; bfloat16: by autocast"),
}
# The paper's defaults on text, where they differ.
ON_TEXT = dict(data="stdlib", base_width=64, batch_size=8, val_size=128, decay="cosine", warmup=10)
ADAM_ON_TEXT = dict(eps=1e-12, weight_decay=0.1, clip=1.0)
# Only these may differ within one stack; all others are shape, data, loss or schedule.
PER_REPLICA = ("lr", "seed", "param", "alpha", "weight_decay", "eps", "lr_factor", "readout_scale")
# Settings of several words NAME=VALUE.
PAIRS = ("roles", "lr_factor")
# Settings that tell one curve from another, and all that vary within a sweep.
CURVE = ("loss", "param", "optimizer", "alpha", "norm_affine", "warmup", "lr_factor")
GRID = ("width", "lr", "seed") + CURVE
curve_of = itemgetter(*CURVE)           # the curve of a run or a row, a tuple
# What a run ends with, null where it diverged or failed.
VALIDATION = ("val_loss", "val_accuracy", "logit_rms", "val_ece")
RESULTS = ("final_train_loss", "train_accuracy", *VALIDATION, "initial_sharpness", "diverged_at")
# The arguments of param.param_groups and param.plan, in their order.
param_args = itemgetter("param", "optimizer", "lr", "alpha", "weight_decay", "eps")


def is_text(config):
    """Whether the network reads tokens."""
    # a value that is not yet checked may be no string
    return isinstance(config["data"], str) and data.is_text(config["data"])


def is_custom(config):
    """Whether the network comes from a file of the user."""
    return ":" in config["model"]


def configure(run):
    """Return the complete config of a run: its settings, with defaults filled in.

    InputError names a bad value and what is allowed.
    """
    for name in run:
        if name not in SETTINGS:
            raise InputError(f"unknown setting {name!r}; choose from {', '.join(SETTINGS)}")

    config = {name: default for name, (default, _, _) in SETTINGS.items()}
    asked = {**config, **run}
    if asked["model"] == "gpt" and "data" not in run or is_text(asked):
        config.update(ON_TEXT)
        if asked["optimizer"] == "adam":
            config.update(ADAM_ON_TEXT)
    config.update(run)
    if isinstance(config["model"], str) and is_custom(config):
        try:
            config["code"] = models.load_custom(config["model"]).digest
        except ValueError as error:
            raise InputError(str(error)) from None
        config["init"] = run.get("init", "own")

    for name, (_, check, _) in SETTINGS.items():
        config[name] = checked(name, config[name], check)
    check_together(config)
    return config


def checked(name, value, check):
    """Return the value of a setting as a plain bool, int, float or str."""
    if hasattr(value, "item"):          # a number of numpy's
        value = value.item()
    fits = isinstance(value, (int, float) if check.type is float else check.type)
    # to isinstance True is an int too
    fits = fits and isinstance(value, bool) == (check is FLAG) and check.is_valid(value)
    require(fits, name, value, check.description)
    return check.type(value)


def check_together(config):
    """Raise InputError for settings that do not fit one another."""
    model, batch_size, parts, head_dim = itemgetter(
        "model", "batch_size", "accumulate", "head_dim")(config)
    text = is_text(config)
    require(batch_size % parts == 0, "batch_size", batch_size,
            f"a multiple of accumulate = {parts}")
    require(config["warmup"] <= config["steps"], "warmup", config["warmup"],
            f"at most steps = {config['steps']}")
    require(model != "mlp" or not text, "data", config["data"],
            f"one of {', '.join(data.SHAPES)}, FILE.npz or FILE.py:FUNCTION for model mlp")
    require(model != "gpt" or text, "data", config["data"],
            "text for model gpt: stdlib, or a file or folder of text or tokens")
    for pattern, factor in pairs(config["lr_factor"]).items():
        require(is_factor(factor), "lr_factor", f"{pattern}={factor}",
                "PATTERN=X with a number X, at least 0")
    for pattern, role in pairs(config["roles"]).items():
        require(role in param.ROLES, "roles", f"{pattern}={role}",
                f"NAME=ROLE with one of {', '.join(param.ROLES)}")
    for name in ("width", "base_width"):
        require(model != "gpt" or config[name] % head_dim == 0, name, config[name],
                f"a multiple of head_dim = {head_dim} for model gpt")


def require(holds, name, value, description):
    """Raise InputError unless the rule on a setting holds."""
    if not holds:
        raise InputError(f"{name} is {value!r}; it must be {description}")


def pairs(words):
    """Return {name: value} of a setting's words NAME=VALUE, as strings."""
    return dict(word.rpartition("=")[::2] for word in words.split())


def is_factor(text):
    try:
        return 0 <= float(text) < math.inf
    except ValueError:
        return False


def lr_factors(config):
    """Return {role or name pattern: factor} of a run."""
    return {pattern: float(factor) for pattern, factor in pairs(config["lr_factor"]).items()}


def trained_roles(config):
    """Return the roles that train, for param.predict; names that are frozen do not count."""
    frozen = [role for role, factor in lr_factors(config).items() if factor == 0]
    return tuple(role for role in param.ROLES if role not in frozen)


# ---- what settings stand for ----

def loss_function(config):
    """Return the loss of stack.LOSSES with its options set."""
    loss = stack.LOSSES[config["loss"]]
    if config["loss"] == "huber":
        return functools.partial(loss, delta=config["huber_delta"])
    return loss


def chance_loss(config, splits):
    """Return the best constant predictor's loss; for text under CE the unigram entropy."""
    if splits.is_real_valued:
        return stack.constant_loss_of_targets(loss_function(config), splits.y)
    return stack.constant_loss(stack.LOSSES[config["loss"]], splits.frequencies,
                               delta=config["huber_delta"])


def rule_of(config):
    return stack.Rule(config["optimizer"], config["momentum"], config["beta1"],
                      config["beta2"], config["weight_decay"] > 0, config["clip"])


def weight_dtype(config):
    """bfloat16 is autocast's: weights and data stay float32."""
    return torch.float64 if config["dtype"] == "float64" else torch.float32


@contextlib.contextmanager
def precision(config, device):
    """Set how matrix products are rounded; torch's own setting comes back at the end."""
    before = torch.get_float32_matmul_precision()
    try:
        if config["dtype"] == "tf32":
            torch.set_float32_matmul_precision("high")
        with torch.autocast(torch.device(device).type, torch.bfloat16,
                            config["dtype"] == "bfloat16", cache_enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def gain_of(config):
    """He's for ReLU; the inputs of a decoder's layers are normalized."""
    return 1.0 if is_text(config) else math.sqrt(2)


def declared_roles(config):
    """Return {parameter name or pattern: role} of the model's file and of --roles."""
    roles = dict(models.load_custom(config["model"]).roles) if is_custom(config) else {}
    for name, role in pairs(config["roles"]).items():
        roles.pop(name, None)       # of several patterns that fit a name the last one counts
        roles[name] = role
    return roles


def of_data(config, splits):
    """Return the config with what the data tell of themselves, which identifies a run too.

    InputError where settings do not fit the data.
    """
    require(config["batch_size"] <= splits.samples, "batch_size", config["batch_size"],
            f"at most the {splits.samples} training samples")
    require(not splits.is_real_valued or config["loss"] in ("mse", "huber"),
            "loss", config["loss"], "mse or huber, since the targets are real-valued")
    vocab_size = splits.outputs if splits.y is None else config["vocab_size"]
    return dict(config, vocab_size=vocab_size, data_hash=splits.digest)


def run_id(config):
    """Return a hash of the full config, which identifies a run."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


@functools.cache
def provenance(device):
    """Return versions, device and git commit of this file ("+" if the tree was changed)."""
    describe = "git describe --always --dirty=+ --abbrev=12 --exclude=*".split()
    try:
        commit = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True,
                                text=True).stdout.strip() or None
    except OSError:         # no git
        commit = None
    is_cuda = torch.device(device).type == "cuda"
    return {"python": platform.python_version(), "torch": torch.__version__,
            "device": torch.cuda.get_device_name(device) if is_cuda else "cpu",
            "commit": commit}


# ---- command line, shared by the scripts ----

# What other programs call our flags.
SYNONYMS = {"--schedule": "--decay", "--cosine": "--decay cosine", "--epochs": "--steps",
            "--depth": "--hidden-layers or --layers"}


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line that name the remedy, and flags spelled out."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)
        # argparse reads -1e-3 as a flag
        self._negative_number_matcher = re.compile(r"^-(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$", re.I)

    def parse_args(self, argv=None):
        args, unknown = self.parse_known_args(argv)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}; "
                       f"{self._remedy(unknown[0].partition('=')[0], argv)}")
        return args

    def _remedy(self, word, argv):
        known = self._option_string_actions
        near = SYNONYMS.get(word) or "".join(difflib.get_close_matches(word, known, 1, 0.75))
        if near:
            return f"did you mean {near}?"
        # the flag before the last place of a word that is none
        words = list(sys.argv[1:] if argv is None else argv)[::-1]
        place = words.index(word) if word in words else len(words)
        flag = next((flag for flag in words[place:] if flag in known), None)
        if flag and known[flag].nargs is None and not word.startswith("-"):
            return f"{flag} takes one value"
        return "see --help"

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def whole_number(text):
    """An argparse type whose error tells how values are separated."""
    return _number(int, text)


def number(text):
    """An argparse type whose error tells how values are separated."""
    return _number(float, text)


def _number(kind, text):
    try:
        return kind(text)
    except ValueError:
        remedy = "; separate values by spaces" if "," in text else ""
        raise argparse.ArgumentTypeError(
            f"invalid {kind.__name__} value: {text!r}{remedy}") from None


def add_flags(parser, several=(), without=(), defaults=()):
    """Add a flag for every setting, None where the user gives none, and those that
    all scripts share.

    several: settings that take a list; without: settings without a flag;
    defaults: {name: words}, the defaults that a script replaces.
    """
    add = parser.add_argument_group("settings of a run").add_argument
    for name, (default, check, text) in SETTINGS.items():
        if name in (*without, "code", "data_hash"):     # the files tell them
            continue
        words = dict(defaults).get(name, "none" if default == "" else default)
        for where, values in (("text", ON_TEXT), ("text adam", ADAM_ON_TEXT),
                              ("FILE.py", {"init": "own"})):
            if name in values:
                words = f"{words}; {where}: {values[name]}"
        choices = f"{check.description}; " if check.description.startswith("one of") else ""
        options = {"help": f"{choices}{text} (default {words})".replace("%", "%%")}
        if check is FLAG:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options.update(type={str: str, int: whole_number, float: number}[check.type],
                           metavar={str: "NAME", int: "N", float: "X"}[check.type],
                           nargs="+" if name in (*several, *PAIRS) else None)
        add("--" + name.replace("_", "-"), **options)
    add("--plan", action="store_true",
        help="print every tensor's role, initial standard deviation and LR, and stop; "
        "look at it before you train a model of your own")

    add = parser.add_argument_group("measurements and machine").add_argument
    add("--track", type=whole_number, default=0, metavar="N",
        help="measure every module in the first 20 steps, then every N-th, "
        "into track*.jsonl of --out; 0 is never (default 0)")
    add("--alignment", action="store_true",
        help="with --track: operator-norm alignments too, at twice the cost")
    add("--kernels", action="store_true",
        help="with --track, mlp: kernels h h^T / n of the hidden features after the last step")
    add("--data-dir", metavar="DIR", help="folder of the data files (default $DATA_DIR, ./data)")
    add("--device", default="auto",
        help="auto, cpu, cuda or cuda:N; under torchrun each rank takes its own (default auto)")


def settings_of_flags(args):
    """Return {setting: value} of those that the user gave on the command line."""
    settings = {name: args[name] for name in SETTINGS if args.get(name) is not None}
    return {name: " ".join(value) if name in PAIRS else value for name, value in settings.items()}


def choose_device(name):
    """Return torch's name of a device.

    auto takes CUDA where there is one, and the ranks of torchrun take the CUDA
    devices of their node in turn. InputError if the device does not exist.
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
        raise InputError(f"device {name} does not exist ({count} CUDA devices); use --device auto")
    return name


def command_line(main):
    """Run main; bad input ends with one line and exit code 2, an interrupt with 130."""
    for stream in (sys.stdout, sys.stderr):     # a console may know no Δ
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        return main()
    except BrokenPipeError:             # whoever read the output, head say, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt as interrupt:
        print(f"\n{str(interrupt) or 'interrupted'}", file=sys.stderr)
        sys.exit(130)
    except (InputError, OSError) as error:
        message = " ".join(str(error).split())
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        message = ("out of memory; use a smaller width, batch size, number of steps or --stack")
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(2)


def is_out_of_memory(error):
    # the CPU's are plain RuntimeErrors
    words = "DefaultCPUAllocator|Storage size calculation overflowed"
    return (isinstance(error, (MemoryError, torch.OutOfMemoryError))
            or bool(re.search(words, str(error))))
