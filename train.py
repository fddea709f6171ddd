"""Trains a batch of runs as one stack, from settings to result rows.

    settings -> a learning rate per replica and tensor -> stack.advance -> one row per run

Runs of the same shape, data and loss train as one stack (stack.py), each with its own
seed and learning rates, and each ends with the row it would have alone. A run whose
loss is no longer finite is recorded and leaves the stack.

    python train.py --width 512 --lr 0.1                # prints the row of one run
    rows = train([{"width": 512, "lr": lr} for lr in (0.1, 0.2)])

At one seed every width and learning rate starts from the same generator and sees the
same batches. Departure from the paper: batches are drawn with replacement. Out of
scope: data augmentation; checkpoints within a run; one run on several devices (use
param.py in a trainer with FSDP).
"""
import os
if __name__ == "__main__":      # before torch loads MKL: the same bits in any stack
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

import contextlib
import copy
import functools
import json
import math
import random
import re
import sys
import time
import traceback
import warnings
from operator import itemgetter
from pathlib import Path
from statistics import fmean

import numpy as np
import torch

import config as settings
import data
import metrics
import models
import param
import stack
from config import (PER_REPLICA, RESULTS, VALIDATION, InputError, chance_loss, configure,
                    declared_roles, gain_of, is_custom, loss_function, param_args, precision,
                    provenance, require, rule_of, run_id, weight_dtype)


def train(runs, splits=None, device="cpu", data_dir=None, progress=None,
          track=0, tracked=None, alignment=False, kernels=False):
    """Train runs as one stack and return one row (dict) per run, in their order.

    runs: a dict of settings or a list of them, missing ones at their defaults; only
    PER_REPLICA may differ. splits: from data.load, loaded if absent.
    progress(step, replicas still training) is called at times. track = N appends to the
    list `tracked` what metrics.measurements returns after each of the first 20 steps,
    every N-th and the last; alignment, and kernels (an MLP's, at the last step), add to it.

    A row holds the settings, their id, results and provenance. final_train_loss and
    train_accuracy are means over the last tenth of the steps, the results in VALIDATION are
    over the validation samples; chance_loss is a constant predictor's. diverged_at is the
    first step, from zero, whose loss is not finite (the number of steps if only the last
    update blew up); results are then null. InputError for bad settings, or runs that
    cannot share a stack.
    """
    start = time.perf_counter()
    batch, config, splits = prepare(runs, splits, device, data_dir)
    template, roles, shape_info = build(config, shape_of(config, splits), device)
    replicas = make_replicas(batch, template, roles, splits, device)
    order, row_of = data_order(batch, splits, config)
    model = stacked_model(config, template, replicas, *splits.batch(order[row_of, 0]))
    rule = rule_of(config)
    record = Record(batch, replicas, device)
    tracker = (Tracker(record, replicas, template, roles, splits, config, alignment, kernels)
               if track else None)
    sharpness = initial_sharpness(replicas, template, splits, config)
    steps = config["steps"]
    look_every = 5 if torch.device(device).type == "cpu" else 25
    batch_rows = row_of     # the row in order of each replica still in the stack

    with torch.no_grad(), precision(config, device):
        for step in range(steps):
            # take one optimizer step of every replica in the stack
            x, y = splits.batch(order[batch_rows, step])
            means = stack.advance(replicas, x, y, model, rule, step, lr_factor(step, config),
                                  config["accumulate"],
                                  accuracy=step >= record.late and not splits.is_real_valued)
            record.add(step, means)

            # measure every module, where asked for
            done = step + 1
            if tracker and (done <= 20 or done % track == 0 or done == steps):
                tracked += tracker.measure(done)

            # drop diverged replicas, now and then only: reading the losses waits for the device
            if done % look_every == 0 or done == steps:
                stack.drop_(replicas, record.drop_diverged(replicas, done))
                batch_rows = row_of[record.alive.to(row_of.device)]
                if progress:
                    progress(done, len(record.alive))
                if len(record.alive) == 0:
                    break
        validation = evaluate(model, replicas, record, splits, config)

    shared = {"chance_loss": chance_loss(config, splits), "shape_info": shape_info,
              **provenance(device),
              "seconds": round((time.perf_counter() - start) / len(batch), 4)}
    return result_rows(batch, record, validation, sharpness, shared)


# ---- from settings to a stack ----

def prepare(runs, splits, device, data_dir):
    """Return (the config of every run, the config that all share, data)."""
    batch = [configure(run) for run in ([runs] if isinstance(runs, dict) else runs)]
    config = batch[0]
    for name in config:
        if name not in PER_REPLICA and any(run[name] != config[name] for run in batch):
            raise InputError(f"runs of one stack must share {name}; "
                             f"only {', '.join(PER_REPLICA)} may differ")

    if is_custom(config) and len({run["seed"] for run in batch}) > 1:
        raise InputError("runs of a custom model share a stack at one seed only, "
                         "since build may draw buffers and attributes")

    splits = data.load(config, data_dir, device) if splits is None else splits
    batch = [settings.of_data(run, splits) for run in batch]
    # a stack has weight decay if any of its runs does
    config = dict(batch[0], weight_decay=max(run["weight_decay"] for run in batch))
    return batch, config, splits


def shape_of(config, splits=None):
    """Return what the data ask of a model, a models.Shape; named data need no splits."""
    if splits is None:
        return models.Shape(*data.SHAPES[config["data"]], False)
    if splits.y is None:
        return models.Shape(config["context"], splits.outputs, True)
    return models.Shape(splits.x.shape[1], splits.outputs, False)


@contextlib.contextmanager
def as_input_error():
    """Turn what models.py and param.py refuse into a line for the user.

    Other errors are the model's own, and keep their traceback.
    """
    try:
        yield
    except ValueError as error:
        raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
        if raised_in not in (models.__file__, param.__file__):
            raise
        words = str(error).replace("overrides={NAME_OR_PATTERN: role}", "--roles NAME=ROLE")
        raise InputError(words) from None


def build_network(config, width, shape):
    """Return the model at a width as it initializes itself, from the run's seed alone."""
    with seeded(data.stream_seed(config["seed"], "build")):
        if config["model"] == "mlp":
            layers, bias = config["hidden_layers"], config["bias"]
            return models.MLP(shape.inputs, width, layers, shape.outputs, bias)
        if config["model"] == "gpt":
            sizes = itemgetter("layers", "context", "head_dim", "norm_affine", "qk_norm")(config)
            return models.GPT(shape.outputs, width, *sizes)
        return models.custom_model(config["model"], width, shape)


@contextlib.contextmanager
def seeded(seed):
    """Seed torch's, numpy's and Python's generators, and restore them at the end."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed % 2 ** 32)
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)


def shapes_only(config, width, shape):
    """Return the model at a width, its parameters on the meta device, from a cache: do not
    change it."""
    names = ("model", "code", "hidden_layers", "bias", "layers", "context", "head_dim",
             "norm_affine", "qk_norm")
    with as_input_error():
        return _shapes_only(tuple((name, config[name]) for name in names), width, shape)


@functools.lru_cache(64)
def _shapes_only(items, width, shape):
    config = dict(items, seed=0)
    with torch.device("cpu" if is_custom(config) else "meta"):
        return to_meta_(build_network(config, width, shape))


def to_meta_(model):
    return models.set_parameters(model, [w.detach().to("meta") for w in model.parameters()])


def cast_(model, dtype, device="cpu"):
    """Move a model, and give its real numbers this dtype; complex buffers keep theirs."""
    return model._apply(lambda t: t.to(device, dtype if t.is_floating_point() else t.dtype))


def build(config, shape, device="cpu"):
    """Return (model, {parameter name: role}, shape_info) at the config's width.

    The model's parameters lie on the meta device, since the stack holds the weights; a
    custom model's buffers are on the device. shape_info is what a prediction must know
    of the model.
    InputError for what the model refuses.
    """
    width, base_width = config["width"], config["base_width"]
    model, base = (shapes_only(config, n, shape) for n in (width, base_width))
    # roles need two widths, and the width may equal the base width
    roles = roles_of(config, shapes_only(config, 2 * base_width, shape), base)
    sizes = [pair for w, w0 in zip(model.parameters(), base.parameters())
             for pair in zip(w.shape, w0.shape)]
    shape_info = {
        "hidden_tensors": list(roles.values()).count("hidden"),
        # a size that changes, but not as the width does
        "uneven": any(n != n0 and n * base_width != n0 * width for n, n0 in sizes),
        "roles_given": bool(declared_roles(config))}

    if is_custom(config):
        with as_input_error():
            model = cast_(build_network(config, width, shape), weight_dtype(config), device)
        to_meta_(model)
    else:
        model = copy.deepcopy(model)        # the cached one stays on the meta device
    return model, roles, shape_info


def roles_of(config, model, base):
    """Return {parameter name: role}, from shapes where they are not declared."""
    with as_input_error(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        roles = param.infer_roles(model, base, declared_roles(config))
    require(set(roles.values()) != {"vector"}, "model", config["model"],
            "one whose parameters become larger with its width")
    return roles


def make_replicas(batch, model, roles, splits, device):
    """Return the stack of R runs, each drawn and scaled by its own settings."""
    base = shapes_only(batch[0], batch[0]["base_width"], shape_of(batch[0], splits))
    draws = [itemgetter("seed", "param", "readout_scale")(run) for run in batch]

    def initial():
        for r, run in enumerate(batch):
            twin = draws.index(draws[r])        # the first run with the same initial weights
            yield twin if twin < r else initial_weights(run, base, roles, splits)

    with as_input_error():
        groups = [param.param_groups(model, base, *param_args(run), overrides=roles,
                                     role_lr=settings.lr_factors(run)) for run in batch]

    def per_tensor(key):        # [{parameter name: value} per run]
        return [{name: group[key] for group in of_run for name in group["names"]}
                for of_run in groups]

    values = map(per_tensor, ("lr", "weight_decay", "eps"))
    return stack.make(model, initial(), *values, rule_of(batch[0]).moments, device,
                      weight_dtype(batch[0]))


def initial_weights(run, base, roles, splits):
    """Return a run's initial weights, [shape] in the model's order, on the CPU."""
    shape, dtype = shape_of(run, splits), weight_dtype(run)
    with as_input_error():
        model = cast_(build_network(run, run["width"], shape), dtype)
        if run["init"] == "own":
            base = cast_(build_network(run, run["base_width"], shape), dtype)
            param.rescale_(model, base, run["param"], roles)
        else:
            generator = data.stream(run["seed"], "weights")
            param.init_(model, base, run["param"], generator, gain_of(run), overrides=roles)
    order = try_model(model, run, splits) if is_custom(run) else roles
    if run["readout_scale"] != 1:
        readout = [name for name in order if roles.get(name) == "output"][-1:]
        require(readout, "readout_scale", run["readout_scale"], "1 for a model without a readout")
        model.get_parameter(readout[0]).data.mul_(run["readout_scale"])
    return [weights.detach() for weights in model.parameters()]


@torch.no_grad()
def try_model(model, run, splits):
    """Return the parameters' names in the order in which the model uses them.

    InputError unless two passes over a batch of the data give the same finite outputs of
    the right shape, and leave buffers and torch's generator as they were.
    """
    order = []
    for prefix, module in model.named_modules():
        names = [f"{prefix}.{name}".lstrip(".") for name in module._parameters]
        module.register_forward_hook(lambda module, args, output, names=names: order.extend(names))
    x, _ = splits.batch(torch.arange(run["batch_size"], device=index_device(splits)))
    x = x.cpu()
    before = [torch.get_rng_state(), *(buffer.clone() for buffer in model.buffers())]
    outputs, again = model(x), model(x)
    after = [torch.get_rng_state(), *model.buffers()]

    expected = (len(x), *((run["context"],) if splits.y is None else ()), splits.outputs)
    spec, shape = run["model"], tuple(getattr(outputs, "shape", ())) or type(outputs).__name__
    if shape != expected:
        raise InputError(f"{spec} made {shape} of a batch {tuple(x.shape)}; "
                         f"it must make {expected}")
    if not outputs.isfinite().all():
        raise InputError(f"{spec} makes outputs that are not finite at width {run['width']}, "
                         "before any training")
    if not torch.equal(outputs, again) or not all(map(torch.equal, before, after)):
        raise InputError(f"{spec} draws random numbers or changes a buffer in forward, so that "
                         "two passes over a batch differ; a run must follow from its seed")
    return order


def plan(run, splits=None):
    """Return param.plan of one run: a table of what it draws and trains with."""
    run, shape = configure(run), shape_of(run, splits)
    model, roles, _ = build(run, shape)
    std = (param.built_stds(build_network(run, run["base_width"], shape))
           if run["init"] == "own" else None)
    with as_input_error():
        return param.plan(model, shapes_only(run, run["base_width"], shape), *param_args(run),
                          role_lr=settings.lr_factors(run), gain=gain_of(run),
                          overrides=roles, std=std)


def trains_alone(config, model):
    """Whether a stack of one bypasses vmap: for text and convolutions, which vmap slows down."""
    convolves = any(isinstance(module, torch.nn.modules.conv._ConvNd) for module in model.modules())
    return settings.is_text(config) or convolves


class CannotStack(InputError):
    """vmap refuses the model, so that its runs must train one by one."""


def stacked_model(config, model, replicas, x, y):
    """Return how this model's logits and gradients are computed, a stack.StackedModel.

    A custom model is tried on a batch x, y. CannotStack if vmap refuses a stack of several.
    """
    loss, count = loss_function(config), len(replicas["weights"][0])
    if config["model"] == "mlp" and not config["bias"] and config["dtype"] != "bfloat16":
        return stack.mlp_network(loss)
    alone = trains_alone(config, model)
    stacked = stack.module_network(model, loss, alone)
    if is_custom(config) and not (alone and count == 1):
        try:
            stacked.gradients(replicas["weights"], x, y)
        except Exception as error:      # vmap's, or the model's own, which a run alone will show
            if settings.is_out_of_memory(error):
                raise
            if count > 1:
                reason = re.split(r"\n|\. ", str(error).strip())[0]
                raise CannotStack(f"runs of {config['model']} cannot train as one stack "
                                  f"({reason}); use --stack 1") from error
            return stack.module_network(model, loss, alone=True)
    return stacked


def index_device(splits):
    """Return where indices of samples lie: with the data, for text on the CPU."""
    return "cpu" if splits.y is None else splits.x.device


def data_order(batch, splits, config):
    """Return (sample indices (seeds, steps, B), the row of each run in them (R,)).

    A seed's order follows from the seed alone.
    """
    device, size = index_device(splits), (config["steps"], config["batch_size"])
    seed_of = [0 if run["same_batches"] else run["seed"] for run in batch]
    seeds = sorted(set(seed_of))
    order = [torch.randint(splits.samples, size, generator=data.stream(seed, "batches"))
             for seed in seeds]
    rows = [seeds.index(seed) for seed in seed_of]
    return torch.stack(order).to(device), torch.tensor(rows, device=device)


# ---- in the loop ----

def lr_factor(step, config):
    """Return the factor on every LR at a step, counted from zero."""
    warmup = config["warmup"]
    if step < warmup:
        return (step + 1) / warmup
    if config["decay"] == "none":
        return 1.0
    progress = (step - warmup) / max(1, config["steps"] - warmup - 1)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


class Record:
    """The losses and accuracies of a batch of runs, and which of them still train."""

    def __init__(self, batch, replicas, device):
        size = batch[0]["steps"], len(batch)
        self.ids = [run_id(run) for run in batch]
        self.alive = torch.arange(len(batch), device=device)    # replicas still training
        self.diverged_at = [None] * len(batch)
        self.losses = replicas["weights"][0].new_full(size, math.nan)   # (steps, R)
        self.accuracies = torch.zeros_like(self.losses)
        self.late = size[0] - max(1, size[0] // 10)     # results are means from this step on
        self.checked = 0                                # steps already searched for nan

    def add(self, step, means):
        for values, of_steps in zip(means, (self.losses, self.accuracies)):
            of_steps[step, self.alive] = values

    def drop_diverged(self, replicas, done):
        """Record the replicas that diverged since the last look, and return a mask (alive,)
        of those to keep.

        No loss follows the last update, so after it the weights count as one more step.
        """
        losses = self.losses[self.checked:done, self.alive]     # (steps, alive)
        bad = ~losses.isfinite()
        if done == len(self.losses):
            finite = [w.reshape(len(w), -1).isfinite().all(1) for w in replicas["weights"]]
            bad = torch.cat([bad, ~torch.stack(finite).all(0)[None]])
        keep = ~bad.any(0)
        if not keep.all():
            if self.checked == 0 and bad[0].any():
                raise InputError("the loss is not finite before the first update; "
                                 "fix the initial weights, or use another --readout-scale")
            first = self.checked + bad.int().argmax(0)
            for replica, step in torch.stack([self.alive, first], 1)[~keep].tolist():
                self.diverged_at[replica] = step
            self.alive = self.alive[keep]
        self.checked = done
        return keep


def first_samples(splits, config):
    """Return the first batch of validation samples (x, y), on which modules are measured."""
    return splits.x_val[:config["batch_size"]], splits.y_val[:config["batch_size"]]


class Tracker:
    """Measures every module of every replica on the first validation samples."""

    def __init__(self, record, replicas, model, roles, splits, config, alignment, kernels):
        self.record, self.replicas, self.model = record, replicas, model
        self.x, self.y = first_samples(splits, config)
        self.loss = loss_function(config)
        self.step_of_kernels = config["steps"] if kernels and config["model"] == "mlp" else None
        self.role_of = {name.rpartition(".")[0]: role for name, role in roles.items()
                        if name.endswith("weight")} | {"": "logits"}
        self.initial = {}
        with torch.no_grad():
            for r in record.alive.tolist():
                # copies, since training updates the weights in place
                models.set_parameters(model, [w[r].clone() for w in replicas["weights"]])
                self.initial[r] = (metrics.capture(model, self.x), model(self.x),
                                   {} if alignment else None)

    def measure(self, done):
        """Return a dict per replica and module, see metrics.measurements."""
        rows = []
        with torch.autocast(self.x.device.type, enabled=False):
            for position, r in enumerate(self.record.alive.tolist()):
                models.set_parameters(self.model, [w[position] for w in self.replicas["weights"]])
                reference, logits, norm_cache = self.initial[r]
                rows += [{"id": self.record.ids[r], "step": done,
                          "role": self.role_of.get(row["module"]), **row}
                         for row in metrics.measurements(
                             self.model, reference, self.x, self.y, self.loss, logits,
                             norm_cache, kernels=done == self.step_of_kernels)]
        return data.null_if_not_finite(rows)


def initial_sharpness(replicas, model, splits, config):
    """Return the sharpness of every replica, None where it is not asked for."""
    if not config["sharpness"]:
        return [None] * len(replicas["weights"][0])
    loss, values = loss_function(config), []
    for weights in zip(*replicas["weights"]):
        models.set_parameters(model, [w.clone() for w in weights])
        values.append(metrics.sharpness(model, lambda z, y: loss(z, y)[0].mean(),
                                        *first_samples(splits, config)))
    return values


def evaluate(model, replicas, record, splits, config):
    """Return {replica: {name in VALIDATION: value}} over the validation samples.

    logit_rms is the RMS over outputs. Real-valued targets have no accuracy and no
    calibration error, and text has no calibration error.
    """
    count, text, real_valued = len(record.alive), splits.y is None, splits.is_real_valued
    if count == 0:
        return {}
    chunk = max(config["batch_size"] // config["accumulate"],
                2048 // config["context"]) if text else 256
    loss, sums, all_logits = loss_function(config), 0, []
    chunks = math.ceil(len(splits.x_val) / chunk)
    for x, y in zip(splits.x_val.tensor_split(chunks), splits.y_val.tensor_split(chunks)):
        x, y = (part.expand(count, *part.shape) for part in (x, y))
        logits = model.forward(replicas["weights"], x)          # (R, chunk, ..., C)
        losses = loss(logits, y)[0]
        hits = torch.zeros_like(losses) if real_valued else logits.argmax(-1) == y
        sums += torch.stack([values.double().flatten(1).sum(1) for values in
                             (losses, hits, logits.square().mean(-1).sqrt())])  # (3, R)
        all_logits += [] if text else [logits]

    samples = splits.y_val.numel() // (splits.outputs if real_valued else 1)
    results = {}
    for position, (r, means) in enumerate(zip(record.alive.tolist(), (sums / samples).T.tolist())):
        row = dict(zip(VALIDATION, [*means, None]))
        if real_valued:
            row["val_accuracy"] = None
        elif not text:
            row["val_ece"] = metrics.expected_calibration_error(
                torch.cat([logits[position] for logits in all_logits]), splits.y_val)
        results[r] = data.null_if_not_finite(row)
    return results


# ---- result rows ----

def result_rows(batch, record, validation, sharpness, shared):
    """Return the rows of a batch that has ended; validation: {replica: results}."""
    losses, accuracies = (of_steps[record.late:].T.tolist()     # (R, late steps)
                          for of_steps in (record.losses, record.accuracies))
    rows = []
    for r, (run, at) in enumerate(zip(batch, record.diverged_at)):
        results = {**dict.fromkeys(RESULTS), "diverged_at": at,
                   "initial_sharpness": data.null_if_not_finite(sharpness[r])}
        if at is None:
            results.update(validation[r], final_train_loss=fmean(losses[r]))
            if results["val_accuracy"] is not None:
                results["train_accuracy"] = fmean(accuracies[r])
        rows.append({"id": record.ids[r], **run, **results, "failed": None, **shared})
    return rows


def failed_row(run, reason, device):
    """Return the row of a run that could not be trained at all."""
    return {"id": run_id(run), **run, **dict.fromkeys(RESULTS), "failed": reason,
            "chance_loss": None, "shape_info": None, **provenance(device), "seconds": 0.0}


# ---- command line ----

def lines_of(rows):
    return "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)


def append_rows(path, rows):
    """Append whole lines, and return once they are on the disk."""
    with open(path, "a") as file:
        file.write(lines_of(rows))
        file.flush()
        os.fsync(file.fileno())


def main(argv=None):
    parser = settings.Parser(description="Train one network and print its row as JSON.")
    settings.add_flags(parser)
    parser.add_argument("--out", type=Path, metavar="DIR",
                        help="also write the row to DIR/runs-ID.jsonl; "
                        "a run that is there is not run again")
    args = parser.parse_args(argv)
    require(args.track == 0 or args.track > 0 and args.out, "track", args.track,
            "at least 0, with a folder for it: --out DIR")
    if "TORCHELASTIC_RUN_ID" in os.environ:         # set by torchrun
        raise InputError("train.py trains one run in one process; "
                         "share the runs of a sweep with torchrun sweep.py")
    config = configure(settings.settings_of_flags(vars(args)))
    device = settings.choose_device(args.device)
    splits, tracked = data.load(config, args.data_dir, device), []
    config = settings.of_data(config, splits)
    if args.plan:
        return print(plan(config, splits))
    print(splits.describe(), file=sys.stderr)

    key = run_id(config)
    file, tracks = ((args.out or Path()) / f"{kind}-{key}.jsonl" for kind in ("runs", "track"))
    if args.out and file.exists() and (tracks.exists() or not args.track):
        print(f"{file} exists: not run again", file=sys.stderr)
        return print(file.read_text(), end="")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)

    def progress(step, alive):
        if sys.stderr.isatty() or step == config["steps"]:
            print(f"\rstep {step}/{config['steps']}", end="", file=sys.stderr, flush=True)

    try:
        row, = train(config, splits, device, None, progress, args.track, tracked,
                     args.alignment, args.kernels)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; the same command begins the run anew") from None
    at = row["diverged_at"]
    print("" if at is None else f"\ndiverged at step {at}", file=sys.stderr)
    # the row last: it says that all is done
    for path, rows in ((tracks, tracked), (file, [row])):
        if args.out and rows:
            with data.whole_file(path) as target:
                target.write(lines_of(rows).encode())
    print(lines_of([row]), end="")


if __name__ == "__main__":
    settings.command_line(main)
