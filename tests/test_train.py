"""train.py: rows against torch.optim one run at a time, divergence, GPTs, measurements, files."""
import copy
import itertools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import data
import metrics
import models
import param
import stack
import train
from config import SETTINGS, InputError, command_line, configure, run_id
from stack import LOSSES
from conftest import call

HERE = Path(train.__file__).parent
SMALL = dict(width=24, base_width=16, hidden_layers=2, steps=50,
             batch_size=16, train_size=400, val_size=100)
MLP = dict(width=16, base_width=8, hidden_layers=2, steps=7, momentum=0.9, lr=0.3,
           batch_size=8, train_size=100, val_size=20)
GPT_RUN = dict(model="gpt", width=32, base_width=16, head_dim=16, context=8, layers=1,
               steps=12, batch_size=4, val_size=5, warmup=3)
TINY_GPT = dict(GPT_RUN, width=16, base_width=8, head_dim=8, steps=7, val_size=4,
                warmup=2, lr=0.1, data=__file__)


def results(row):
    """Return what must not change when the same run is done again."""
    row = json.loads(row) if isinstance(row, str) else row
    return {key: value for key, value in row.items() if key != "seconds"}


def flags_of(settings):
    """Return the command line of these settings."""
    flags = []
    for name, value in settings.items():
        name = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{'' if value else 'no-'}{name}")
        else:
            flags += [f"--{name}", value]
    return flags


def run_script(*flags):
    """Run train.py in this process, as its command line would call it."""
    return call(lambda: command_line(train.main), "train.py", *flags)


def lines(folder, pattern):
    """Return all rows in the files of a folder."""
    texts = [path.read_text() for path in sorted(folder.glob(pattern))]
    return [json.loads(line) for text in texts for line in text.splitlines()]


def small_data(dtype):
    return data.load_data("multi_index", dtype=dtype, train_size=400, val_size=100)


@pytest.mark.parametrize("name, allowed, refused", [
    ("width", (1, 2 ** 31 - 1), (0, 2 ** 31, 1.0, True, "1")),
    ("seed", (0, 2 ** 63 - 2), (-1, 2 ** 63 - 1)),
    ("lr", (1e-300, 1e300, 1), (0.0, math.inf, math.nan, True)),
    ("clip", (0.0, 1e300), (-1e-300, math.inf)),
    ("momentum", (0.0, 1 - 2 ** -53), (-1e-300, 1.0)),
    ("alpha", (-10.0, 10.0), (-10.000001, 10.000001)),
    ("bias", (True, False), (0, 1, None)),
    ("data", ("mnist",), ("", 0)),
])
def test_settings_are_allowed_up_to_their_bounds_and_refused_beyond(name, allowed, refused):
    for value in allowed:
        config = configure({name: value})
        assert config[name] == value and type(config[name]) is type(SETTINGS[name][0])
    for value in refused:
        with pytest.raises(InputError, match=f"^{name} is {re.escape(repr(value))}; it must be"):
            configure({name: value})


@pytest.fixture(scope="module")
def f32():
    return small_data(torch.float32)


@pytest.fixture(scope="module")
def f64():
    return small_data(torch.float64)


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    """A file of bytes in which the next one mostly follows from the last."""
    generator, path = np.random.default_rng(0), tmp_path_factory.mktemp("text") / "text.txt"
    text = np.cumsum(generator.choice([1, 1, 1, 5], 4000)) % 64
    path.write_bytes(text.astype(np.uint8).tobytes())
    return path


# ---- the stack's rows against torch.optim, one run at a time ----

def one_hot(z, y):
    return F.one_hot(y, z.shape[-1]).to(z)


def targets(z, y):
    return y if y.is_floating_point() else one_hot(z, y)


def torch_loss(config):
    return {"ce": F.cross_entropy,
            "mse": lambda z, y: F.mse_loss(z, targets(z, y)),
            "brier": lambda z, y: F.mse_loss(z.softmax(-1), one_hot(z, y)),
            "huber": lambda z, y: F.huber_loss(z, targets(z, y), delta=config["huber_delta"]),
            "hinge": F.multi_margin_loss,
            "squared_hinge": lambda z, y: F.multi_margin_loss(z, y, p=2)}[config["loss"]]


def optimizer_of(model, base, config):
    names = ("param", "optimizer", "lr", "alpha", "weight_decay", "eps")
    factors = [pair.split("=") for pair in config["lr_factor"].split()]
    groups = param.param_groups(model, base, *(config[name] for name in names),
                                role_lr={pattern: float(factor) for pattern, factor in factors})
    if config["optimizer"] == "sgd":
        return torch.optim.SGD(groups, momentum=config["momentum"])
    return torch.optim.AdamW(groups, betas=(config["beta1"], config["beta2"]))


def take_step(model, optimizer, loss, step, config):
    for group in optimizer.param_groups:
        group["lr"] = train.lr_factor(step, config) * group["base_lr"]
    optimizer.zero_grad()
    loss.backward()
    if config["clip"]:
        nn.utils.clip_grad_norm_(model.parameters(), config["clip"])
    optimizer.step()


def alone(run, splits):
    """Return the row's results for one run, by a plain loop with torch.optim on param_groups."""
    config = configure(run)
    shape = config["hidden_layers"], splits.outputs, config["bias"]
    model, base = (models.MLP(splits.x.shape[1], config[name], *shape) for name in ("width", "base_width"))
    model = model.to(splits.x.dtype)
    param.init_(model, base, config["param"], data.stream(config["seed"], "weights"))
    model.layers[-1].weight.data.mul_(config["readout_scale"])
    optimizer, loss_of = optimizer_of(model, base, config), torch_loss(config)
    order, losses, accuracies = data.stream(config["seed"], "batches"), [], []

    def accuracy(logits, y):
        return None if y.is_floating_point() else (logits.argmax(1) == y).double().mean().item()

    for step in range(config["steps"]):
        index = torch.randint(len(splits.x), (config["batch_size"],), generator=order)
        logits = model(splits.x[index])
        loss = loss_of(logits, splits.y[index])
        take_step(model, optimizer, loss, step, config)
        losses.append(loss.item())
        accuracies.append(accuracy(logits, splits.y[index]))
    logits = model(splits.x_val).detach()
    tenth = max(1, config["steps"] // 10)
    return {"final_train_loss": np.mean(losses[-tenth:]),
            "train_accuracy": None if splits.is_real_valued else np.mean(accuracies[-tenth:]),
            "val_loss": loss_of(logits, splits.y_val).item(),
            "logit_rms": logits.square().mean(1).sqrt().mean().item(),
            "val_accuracy": accuracy(logits, splits.y_val)}


ADAM = dict(optimizer="adam", lr=0.005)
VARIANTS = [
    {}, dict(loss="mse"), dict(loss="brier"), dict(loss="hinge"), dict(loss="squared_hinge"),
    dict(loss="huber", huber_delta=0.3), dict(readout_scale=0.3), dict(bias=True),
    dict(lr_factor="output=0.5 layers.1.weight=0 layers.[02].*=2"), dict(ADAM, lr_factor="hidden=0"),
    dict(momentum=0.9, lr=0.02), dict(momentum=0.9, weight_decay=0.1, lr=0.02), dict(weight_decay=0.1),
    ADAM, dict(ADAM, weight_decay=0.1, eps=1e-3), dict(ADAM, bias=True, param="mup"),
    dict(warmup=20), dict(warmup=5, decay="cosine"), dict(clip=0.5), dict(param="mup", alpha=0.25)]


def same_as_alone(runs, splits, tolerance):
    for run, row in zip(runs, train.train(runs, splits)):
        for name, value in alone(run, splits).items():
            expected = None if value is None else pytest.approx(value, rel=tolerance)
            assert row[name] == expected, (name, run)


def named(variant):
    return ",".join(f"{key}={value}" for key, value in variant.items()) or "plain"


@pytest.mark.parametrize("variant", VARIANTS, ids=named)
@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-10), ("float32", 2e-5)])
def test_a_stacked_run_is_the_run_alone_with_torch_optim(variant, dtype, tolerance, f32, f64):
    settings, lr = dict(SMALL, dtype=dtype, **variant), variant.get("lr", 0.1)
    runs = [dict(settings, lr=lr * factor, seed=seed) for factor in (1.0, 0.5) for seed in (0, 3)]
    same_as_alone(runs, f64 if dtype == "float64" else f32, tolerance)


@pytest.mark.parametrize("variant", [
    dict(weight_decay=0.1, clip=0.5), dict(bias=True, param="mup")], ids=named)
def test_wide_layers_under_adam_are_those_of_torch_optim(variant, f64):
    wide = dict(SMALL, width=300, steps=10, optimizer="adam", dtype="float64", **variant)
    runs = [dict(wide, lr=lr, seed=seed) for lr in (0.003, 0.001) for seed in (0, 3)]
    same_as_alone(runs, f64, 1e-10)


def drawn_at_random(seed):
    """Return two runs that share a stack, of settings drawn at random."""
    generator = np.random.default_rng(seed)

    def one(*values):
        return values[generator.integers(len(values))]

    optimizer, highest = one(("sgd", 0.03), ("adam", 0.003))
    shared = dict(
        SMALL, dtype="float64", optimizer=optimizer, momentum=one(0.0, 0.8), eps=1e-4,
        width=one(8, 17, 40), hidden_layers=one(1, 2, 3), bias=one(True, False),
        loss=one(*LOSSES), huber_delta=one(0.5, 1.0),
        steps=one(1, 4, 9), batch_size=one(8, 24), accumulate=one(1, 2), clip=one(0.0, 0.3),
        warmup=one(0, 1), decay=one("none", "cosine"))
    return [dict(shared, seed=seed, lr=highest * float(generator.uniform(0.1, 1)),
                 param=one(*param.PARAMETERIZATIONS), alpha=one(0.0, 0.5), weight_decay=one(0.0, 0.1),
                 lr_factor=one("", "input=0.5 layers.1.*=2")) for seed in (0, 3)]


@pytest.mark.parametrize("seed", range(10))
def test_any_settings_together_train_as_torch_optim_trains_them(seed, f64):
    same_as_alone(drawn_at_random(seed), f64, 1e-12)


@pytest.mark.parametrize("samples", [255, 257, 513, 600])
def test_validation_in_chunks_is_that_of_all_samples_at_once(samples):
    run = dict(SMALL, dtype="float64", steps=3, val_size=samples)
    same_as_alone([run], data.load(configure(run)), 1e-12)


@pytest.mark.parametrize("variant", [
    dict(width=1024), dict(width=1024, optimizer="adam", lr=0.01), dict(bias=True, optimizer="adam", lr=0.01),
], ids=named)
def test_a_row_does_not_depend_on_its_stack_to_the_last_bit(variant, f32):
    # at width 1024 cores share a product of one replica
    shared, lr = dict(SMALL, steps=5, **variant), variant.get("lr", 0.1)
    runs = [dict(shared, lr=lr * factor, seed=seed) for factor in (0.3, 0.1) for seed in (0, 1)]
    torch.set_num_threads(2 if "width" in variant else 1)
    try:
        together = train.train(runs, f32)
        by_one = [train.train([run], f32)[0] for run in runs]
    finally:
        torch.set_num_threads(1)
    assert all(row["diverged_at"] is None for row in together)
    assert [results(row) for row in together] == [results(row) for row in by_one]


def test_a_run_may_be_a_dict_and_its_numbers_those_of_numpy(f32):
    run = dict(SMALL, steps=3, lr=0.25, seed=2, bias=True)
    of_numpy = dict(run, width=np.int64(24), steps=np.int32(3), lr=np.float32(0.25), seed=np.uint8(2),
                    bias=np.bool_(True), loss=np.str_("ce"), alpha=np.float64(0))
    row, = train.train(of_numpy, f32)
    assert configure(of_numpy) == configure(run) and row["id"] == run_id(configure(run))
    assert all(type(value) is type(SETTINGS[name][0]) for name, value in configure(of_numpy).items())
    expected, = train.train([run], f32)
    assert results(row) == results(expected)
    for name, value in (("width", np.float64(24)), ("width", np.bool_(True)), ("lr", np.float32("nan"))):
        with pytest.raises(InputError, match=f"^{name} is .*; it must be"):
            train.train({**run, name: value}, f32)


@pytest.mark.parametrize("warmup, decay, factors", [
    (0, "none", [1, 1, 1, 1, 1, 1, 1]), (2, "none", [1 / 2, 1, 1, 1, 1, 1, 1]),
    (0, "cosine", [1, 0.1 + 0.45 * (1 + math.sqrt(3) / 2), 0.775, 0.55, 0.325,
                   0.1 + 0.45 * (1 - math.sqrt(3) / 2), 0.1]),
    (4, "cosine", [1 / 4, 1 / 2, 3 / 4, 1, 1, 0.55, 0.1]), (7, "cosine", [i / 7 for i in range(1, 8)])])
def test_the_schedule_is_linear_warmup_then_constant_or_cosine_to_a_tenth(warmup, decay, factors):
    config = configure(dict(steps=7, warmup=warmup, decay=decay))
    assert [train.lr_factor(step, config) for step in range(7)] == pytest.approx(factors, rel=1e-12)


# LRs of SGD well inside the stable range. Over thirty shifts (GPT: eight) the ratio of the loss to that of a
# network that does not move is at most 0.47 ± 0.08 for the MLP; for the GPT at most 0.57 ± 0.04, and
# 0.81 ± 0.04 under brier with SGD, whose derivative is a mean over 256 tokens' probabilities. One would be no
# fall.
FALLING_LR = {
    "mlp": dict(ce=0.2, mse=0.1, brier=1.0, huber=0.2, hinge=0.2, squared_hinge=0.05),
    "gpt": dict(ce=0.3, mse=5.0, brier=2000.0, huber=5.0, hinge=1.5, squared_hinge=0.3)}


@pytest.mark.parametrize("optimizer", param.OPTIMIZERS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("model", ["mlp", "gpt"])
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_every_loss_falls_for_both_models_under_both_optimizers(model, loss, optimizer, text_file):
    mlp = dict(SMALL, steps=100, batch_size=32, train_size=4000, val_size=200)
    gpt = dict(GPT_RUN, data=str(text_file), steps=40, batch_size=16, val_size=32)
    run = dict(mlp if model == "mlp" else gpt, loss=loss, optimizer=optimizer)
    lr = 0.01 if optimizer == "adam" else FALLING_LR[model][loss]
    still, trained = train.train([dict(run, lr=1e-9), dict(run, lr=lr)])
    assert trained["diverged_at"] is None
    for name in ("final_train_loss", "val_loss"):
        assert trained[name] < 0.98 * still[name], (trained[name], still[name])


# ---- divergence, and what a stack shares ----

def test_a_stack_is_looked_at_every_fifth_step_and_at_the_last(f32):
    seen = []
    train.train([dict(SMALL, steps=12, lr=lr) for lr in (0.1, 1e15)], f32,
                progress=lambda step, alive: seen.append((step, alive)))
    assert seen == [(5, 1), (10, 1), (12, 1)]


def test_divergence_is_a_row_and_does_not_touch_its_neighbours(f32):
    # over three hundred seeds the first and the third always stay finite, the others never; at 1e4 some do
    run, lrs = dict(SMALL, loss="mse"), [0.1, 1e8, 0.05, 1e30]
    rows = train.train([dict(run, lr=lr) for lr in lrs], f32)
    assert [row["diverged_at"] is None for row in rows] == [True, False, True, False]
    assert 0 < rows[3]["diverged_at"] <= rows[1]["diverged_at"] < 10
    for name in ("final_train_loss", "val_loss", "logit_rms"):
        assert rows[1][name] is rows[3][name] is None
    calm = train.train([dict(run, lr=lr) for lr in (0.1, 0.05)], f32)
    assert [results(row) for row in calm] == [results(rows[0]), results(rows[2])]
    json.dumps(rows, allow_nan=False)


def test_diverged_at_is_the_first_step_whose_loss_is_not_finite(f32):
    run = dict(SMALL, lr=30.0, loss="mse", hidden_layers=1)     # at step 3 at each of three hundred seeds

    def diverged_at(steps):
        return train.train([dict(run, steps=steps)], f32)[0]["diverged_at"]

    at = diverged_at(run["steps"])
    assert at > 1 and diverged_at(at) in (None, at)     # no loss before it was
    assert diverged_at(at + 1) == at


def test_readout_only_training_leaves_the_features(f32):
    shared = dict(SMALL, width=256, batch_size=200, steps=100, readout_scale=0.05, lr=0.01)
    readout_only = dict(shared, lr_factor="input=0 hidden=0 vector=0")
    tracked = []
    still, trained, everything = train.train([dict(readout_only, lr=1e-9), readout_only, shared], f32,
                                             track=100, tracked=tracked)
    # over 150 seeds the first ratio is 0.764 ± 0.026, the second 0.952 ± 0.007
    assert trained["final_train_loss"] < 0.87 * still["final_train_loss"]
    assert everything["final_train_loss"] < 0.98 * trained["final_train_loss"]
    moved = [row["effective"] for row in tracked
             if row["step"] == 100 and row["module"] and row["id"] == trained["id"]]
    assert moved[0] == moved[1] == 0 < moved[2]


@pytest.mark.parametrize("lr_factor, frozen", [
    ("input=0", {0}), ("hidden=0", {1, 2}), ("output=0", {3}), ("layers.1.weight=0", {1}),
    ("layers.[13].*=0", {1, 3}), ("input=0 layers.2.*=0", {0, 2}), ("vector=0", set())])
@pytest.mark.parametrize("optimizer", param.OPTIMIZERS)
def test_lr_factor_freezes_a_role_or_parameters_by_name(optimizer, lr_factor, frozen, f32):
    run, tracked = dict(SMALL, hidden_layers=3, steps=2, optimizer=optimizer, lr=0.01, weight_decay=0.1), []
    # the neighbour in the stack is not frozen
    train.train([dict(run, lr_factor=lr_factor), run], f32, track=1, tracked=tracked)
    key = run_id(configure(dict(run, lr_factor=lr_factor)))
    moved = {(row["id"], row["layer"]): row["effective"] for row in tracked
             if row["step"] == 2 and row["module"]}
    assert len(moved) == 8
    assert {layer for (id, layer), update in moved.items() if update == 0 and id == key} == frozen
    assert all(update > 0 for (id, _), update in moved.items() if id != key)


def test_a_factor_on_every_role_is_a_factor_on_the_lr(f32):
    roles = " ".join(f"{role}=2" for role in param.ROLES)
    run = dict(SMALL, steps=5, bias=True)
    doubled, twice = train.train([dict(run, lr=0.05, lr_factor=roles), dict(run, lr=0.1)], f32)
    for name in ("final_train_loss", "val_loss", "logit_rms"):
        assert doubled[name] == pytest.approx(twice[name], rel=1e-6)


@pytest.mark.parametrize("lr_factor, words", [
    ("hidden=-1", "lr_factor is 'hidden=-1'; it must be PATTERN=X with a number X, at least 0"),
    ("hidden=inf", "it must be PATTERN=X"), ("hidden=nan", "it must be PATTERN=X"),
    ("hidden", "it must be PATTERN=X"), ("hidden=half", "it must be PATTERN=X"),
    ("readout=0", "names 'readout', which is neither a role of the model's tensors nor a parameter"),
    ("layers.9.*=0", "names 'layers.9.*'")])
def test_factors_that_name_nothing_or_are_no_factors_are_refused(lr_factor, words, f32):
    with pytest.raises(InputError, match=re.escape(words)):
        train.train(dict(SMALL, lr_factor=lr_factor), f32)


def test_every_width_and_lr_sees_the_same_batches(f32):
    def batches(*runs):
        runs = [configure(dict(SMALL, **run)) for run in runs]
        order, row_of = train.data_order(runs, f32, runs[0])
        return order[row_of]                                        # (R, steps, B)

    first, second, third = batches({"seed": 0}, {"seed": 1}, {"seed": 1, "lr": 0.3})
    assert first.shape == (50, 16) and not torch.equal(first, second)
    assert torch.equal(second, third) and torch.equal(second, batches({"seed": 1, "width": 48})[0])
    shared = batches({"seed": 0, "same_batches": True}, {"seed": 1, "same_batches": True})
    assert torch.equal(shared[0], first) and torch.equal(shared[1], first)


def test_at_one_seed_every_width_and_lr_reads_the_same_tokens(monkeypatch):
    seen, windows = {}, data.Tokens.windows

    def reading(tokens, starts, length):
        read.append(starts.tolist())
        return windows(tokens, starts, length)

    for width, lr, seed in ((8, 0.1, 0), (16, 0.1, 0), (8, 0.3, 0), (8, 0.1, 1)):
        config = configure(dict(TINY_GPT, width=width, lr=lr, seed=seed))
        splits, read = data.load(config), seen.setdefault((width, lr, seed), [])
        with monkeypatch.context() as patch:
            patch.setattr(data.Tokens, "windows", reading)
            train.train([config], splits)
    first, *batches = seen[8, 0.1, 0]           # the first batch is read before the loop too
    assert len(batches) == TINY_GPT["steps"] and first == batches[0] != batches[1]
    assert seen[8, 0.1, 0] == seen[16, 0.1, 0] == seen[8, 0.3, 0] != seen[8, 0.1, 1]


def test_weights_samples_and_batches_draw_from_streams_of_their_own(monkeypatch):
    class Recording(torch.Generator):
        def manual_seed(self, seed):
            seeds.append(seed)
            return super().manual_seed(seed)

    monkeypatch.setattr(torch, "Generator", Recording)
    streams = {}
    for seed, data_seed in itertools.product(range(3), range(3)):
        seeds = []
        train.train(dict(SMALL, steps=1, seed=seed, data_seed=data_seed))
        assert len(seeds) == len(set(seeds)) == 3
        streams.setdefault(seed, []).append(set(seeds))
    # the seed and the data's seed have no stream in common, and each keeps its own beside any other
    of_seed = [set.intersection(*sets) for sets in streams.values()]
    assert [len(part) for part in of_seed] == [2, 2, 2]
    assert len(set().union(*(part for sets in streams.values() for part in sets))) == 3 * 2 + 3


def test_streams_of_any_seeds_and_purposes_differ():
    purposes = ("build", "weights", "batches", "samples", "split")
    draws = [torch.rand(4, generator=data.stream(seed, purpose)).tolist()
             for purpose in purposes for seed in (*range(20), 2 ** 63 - 2)]
    assert len(set(map(tuple, draws))) == len(draws)
    assert torch.equal(torch.rand(4, generator=data.stream(3, "weights")),
                       torch.rand(4, generator=data.stream(3, "weights")))


def test_chance_is_the_loss_of_the_best_constant_for_these_data_and_settings(f64, text_file):
    p = f64.y.double().mean().item()
    entropy = -p * math.log(p) - (1 - p) * math.log(1 - p)

    def chance(**settings):
        return train.chance_loss(configure(settings), f64)

    assert chance(loss="ce") == pytest.approx(entropy, rel=1e-12)
    assert chance(loss="mse") == pytest.approx(p * (1 - p), rel=1e-12)
    assert chance(loss="brier") == pytest.approx(p * (1 - p), rel=1e-12)
    # no error of a constant predictor goes beyond delta = 1
    assert chance(loss="huber") == pytest.approx(chance(loss="mse") / 2, rel=1e-6)
    assert chance(loss="huber", huber_delta=0.3) < 0.9 * chance(loss="huber")
    settings = dict(loss="huber", huber_delta=0.3)
    row, = train.train([dict(SMALL, steps=1, dtype="float64", **settings)], f64)
    assert row["chance_loss"] == chance(**settings)

    counts = np.bincount(np.fromfile(text_file, np.uint8)[:3600])
    q = counts[counts > 0] / counts.sum()
    row, = train.train([dict(GPT_RUN, steps=3, data=str(text_file))])
    unigram_entropy = -(q * np.log(q)).sum()
    assert row["chance_loss"] == pytest.approx(unigram_entropy, rel=1e-9)


# ---- real-valued targets ----

@pytest.fixture
def table(tmp_path):
    """Return (FILE.npz, its arrays): targets (N, 2) of five inputs, some far from the others."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(300, 5))
    y = np.stack([x[:, 0] + 0.1 * x[:, 1] ** 2, 3 * np.tanh(x[:, 2]) + 2], axis=1)
    y[:20] *= 4
    arrays = {"x": x[:240], "y": y[:240], "x_val": x[240:], "y_val": y[240:]}
    np.savez(tmp_path / "table.npz", **arrays)
    return str(tmp_path / "table.npz"), arrays


@pytest.mark.parametrize("variant", [
    dict(loss="mse"), dict(loss="huber", huber_delta=0.5), dict(loss="mse", optimizer="adam", lr=0.005)],
    ids=named)
def test_real_valued_targets_train_as_torch_optim_trains_them_and_have_no_accuracy(variant, table):
    run = dict(SMALL, lr=0.02, dtype="float64", data=table[0])
    run.update(variant)
    splits = data.load(configure(run))
    assert splits.outputs == 2
    same_as_alone([dict(run, seed=seed) for seed in (0, 3)], splits, 1e-10)
    row, = train.train(run, splits)
    assert row["train_accuracy"] is row["val_accuracy"] is row["val_ece"] is None


def test_chance_for_real_valued_targets_is_the_variance_under_mse(table):
    file, arrays = table

    def chance(**settings):
        config = configure(dict(SMALL, data=file, dtype="float64", **settings))
        return train.chance_loss(config, data.load(config))

    assert chance(loss="mse") == pytest.approx(arrays["y"].var(axis=0).mean(), rel=1e-12)
    # the best constant under huber lies where the clipped errors sum to zero
    for delta in (0.3, 2.0):
        lowest = []
        for column in arrays["y"].T:
            low, high = column.min(), column.max()
            for _ in range(100):
                middle = (low + high) / 2
                above = np.clip(column - middle, -delta, delta).sum() > 0
                low, high = (middle, high) if above else (low, middle)
            error = np.abs(column - low)
            lowest.append(np.where(error < delta, error ** 2 / 2, delta * (error - delta / 2)).mean())
        assert chance(loss="huber", huber_delta=delta) == pytest.approx(np.mean(lowest), rel=1e-8)


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss not in ("mse", "huber")])
def test_losses_of_classes_are_refused_for_real_valued_targets(loss, table):
    with pytest.raises(InputError, match=f"loss is '{loss}'; it must be mse or huber, since the targets"):
        train.train(dict(SMALL, data=table[0], loss=loss))


def test_a_row_is_identified_by_the_content_of_its_data_too(table):
    file, arrays = table
    run = dict(SMALL, steps=1, loss="mse", data=file)
    first, = train.train(run)
    np.savez(file, **{**arrays, "y": arrays["y"] + 1})
    second, = train.train(run)
    np.savez(file, **arrays)
    third, = train.train(run)
    assert first["data_hash"] == third["data_hash"] != second["data_hash"]
    assert first["id"] == third["id"] != second["id"]


# ---- what is refused ----

@pytest.mark.parametrize("runs, words", [
    ([{"width": 8}, {"width": 16}], "runs of one stack must share width; only lr, seed, param, "),
    ([{"loss": "ce"}, {"loss": "mse"}], "must share loss"),
    ([{"learning_rate": 0.1}], "unknown setting 'learning_rate'; choose from model, width, base_width"),
    ([{"width": 8.0}], "width is 8.0; it must be a whole number, at least 1"),
    ([{"bias": 1}], "bias is 1; it must be true or false"),
    ([{"steps": True}], "steps is True; it must be a whole number"),
    ([{"lr": "0.1"}], "lr is '0.1'; it must be a positive number"),
    ([{"batch_size": 500, "train_size": 400}], "batch_size is 500; it must be at most the 400 training"),
    ([{"steps": 9, "warmup": 10}], "warmup is 10; it must be at most steps = 9"),
])
def test_runs_that_cannot_train_together_or_at_all_are_refused_with_the_remedy(runs, words):
    with pytest.raises(InputError, match=words):
        train.train(runs)


def test_a_loss_that_is_not_finite_before_the_first_update_is_an_error_of_the_settings(f32):
    with pytest.raises(InputError, match="not finite before the first update"):
        train.train(dict(SMALL, loss="mse", readout_scale=1e30), f32)
    row, = train.train(dict(SMALL, loss="mse", lr=1e15), f32)
    assert row["diverged_at"] > 0           # a divergence is a result


# ---- GPTs ----

FAST_ADAM = dict(optimizer="adam", lr=0.02)


@pytest.mark.parametrize("variant", [
    {}, FAST_ADAM, dict(FAST_ADAM, accumulate=2, param="mup"),
    dict(FAST_ADAM, norm_affine=False, qk_norm=False)], ids=named)
def test_a_gpts_run_is_a_plain_loop_with_torch_optim(variant, text_file):
    run = dict(GPT_RUN, lr=0.5, data=str(text_file), vocab_size=256, dtype="float64")
    run = configure({**run, **variant})
    row, = train.train([run])
    tokens = torch.from_numpy(np.fromfile(text_file, np.uint8).astype(np.int64))
    model, base = (models.GPT(256, width, 1, 8, 16, run["norm_affine"], run["qk_norm"]).double()
                   for width in (32, 16))
    param.init_(model, base, run["param"], data.stream(0, "weights"), gain=1.0)
    optimizer, losses = optimizer_of(model, base, run), []

    def loss_on(starts):
        windows = torch.stack([tokens[start:start + 9] for start in starts])
        return F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())

    order = data.stream(0, "batches")
    for starts in torch.randint(3600 - 8, (12, 4), generator=order):        # the file's last tenth validates
        loss = loss_on(starts)
        take_step(model, optimizer, loss, len(losses), run)
        losses.append(loss.item())
    assert row["final_train_loss"] == pytest.approx(losses[-1], rel=1e-10)
    loss = loss_on(3600 + torch.linspace(0, 400 - 9, 5).long())
    assert row["val_loss"] == pytest.approx(loss.item(), rel=1e-10) and row["val_ece"] is None


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_stacked_gpts_are_those_alone_and_bfloat16_is_close(text_file):
    run = dict(GPT_RUN, data=str(text_file))
    runs = [dict(run, lr=lr, seed=seed) for lr in (0.2, 0.5) for seed in (0, 1)]
    together = train.train(runs)
    for run, row in zip(runs, together):
        only, = train.train([run])
        assert row["id"] == only["id"]
        assert row["final_train_loss"] == pytest.approx(only["final_train_loss"], rel=1e-5)
    half, = train.train([dict(runs[0], dtype="bfloat16")])
    assert half["final_train_loss"] != together[0]["final_train_loss"]
    assert half["final_train_loss"] == pytest.approx(together[0]["final_train_loss"], rel=0.02)


def test_a_gpt_learns_the_standard_library_well_below_its_bytes_unigram_entropy():
    run = {"model": "gpt", "width": 32, "optimizer": "adam", "lr": 0.03, "steps": 60, "layers": 1}
    row, = train.train([run])
    assert 3.0 < row["chance_loss"] < 3.5
    assert row["val_loss"] < row["chance_loss"] - 0.4, (row["val_loss"], row["chance_loss"])


# ---- measurements ----

def test_tracked_norms_are_those_of_the_run_alone(f64):
    run, tracked = dict(SMALL, lr=0.3, steps=1, seed=3, dtype="float64", sharpness=True), []
    x, y = f64.x_val[:16], f64.y_val[:16]
    rows = train.train([dict(run, lr=0.1), run], f64, track=1, tracked=tracked, kernels=True)
    base = models.MLP(100, 16, 2, 2)
    model = param.init_(models.MLP(100, 24, 2, 2).double(), base, "sp", data.stream(3, "weights"))
    reference = copy.deepcopy(model)
    sharpness = metrics.sharpness(model, F.cross_entropy, x, y)
    assert [row["initial_sharpness"] for row in rows] == pytest.approx([sharpness] * 2, rel=1e-6)
    index = torch.randint(len(f64.x), (16,), generator=data.stream(3, "batches"))
    F.cross_entropy(model(f64.x[index]), f64.y[index]).backward()
    torch.optim.SGD(param.param_groups(model, base, "sp", "sgd", 0.3)).step()
    expected = metrics.refined_coordinate_check(model, reference, x)
    mine = [row for row in tracked if row["id"] == run_id(configure(run))]
    assert [row["module"] for row in mine] == [*expected, ""]
    assert [row["role"] for row in mine] == ["input", "hidden", "output", "logits"]
    assert [(row["step"], row["layer"]) for row in mine] == [(1, layer) for layer in range(4)]

    features = [None]           # (B, width) behind each hidden layer
    for layer in model.layers[:-1]:
        features.append(layer(x if len(features) == 1 else features[-1]).relu())
    for row, h in zip(mine[:-1], features):
        norms = expected[row["module"]]
        assert {key: row[key] for key in norms} == pytest.approx(norms, rel=1e-5)
        kernel = [] if h is None else (h @ h.T / 24)[np.triu_indices(16)].tolist()
        assert row.get("kernel", []) == pytest.approx(kernel, rel=1e-5, abs=1e-12)
    with torch.no_grad():
        logits, change = model(x), model(x) - reference(x)
        chi = logits.softmax(-1) - one_hot(logits, y)
        loss = F.cross_entropy(logits, y).item()
    assert mine[-1]["loss"] == pytest.approx(loss, rel=1e-5)
    for key, value in (("change", change), ("rms", logits), ("chi", chi)):
        assert mine[-1][key] == pytest.approx(value.square().mean(1).sqrt().mean().item(), rel=1e-5)


def test_roles_of_a_gpts_modules_are_tracked_at_the_base_width_too(text_file):
    tracked = []
    run = dict(GPT_RUN, width=16, data=str(text_file), steps=3)
    row, = train.train([run], track=2, tracked=tracked)
    roles = {line["module"]: line["role"] for line in tracked}
    assert roles.pop("") == "logits"
    assert roles["embedding"] == "input" and roles["readout"] == "output"
    assert {role for name, role in roles.items() if "norm" in name} == {"vector"}
    matrices = [name for name in roles if name.startswith("blocks") and "norm" not in name]
    assert {roles[name] for name in matrices} == {"hidden"}
    assert {(line["id"], line["step"]) for line in tracked} == {(row["id"], step) for step in (1, 2, 3)}


def test_measuring_does_not_change_the_row(f32):
    runs = [dict(SMALL, lr=lr, seed=1) for lr in (0.1, 0.3)]
    everything = dict(track=7, alignment=True, kernels=True)
    plain, tracked = (train.train(runs, f32, tracked=[], **flags) for flags in ({}, everything))
    assert [results(row) for row in plain] == [results(row) for row in tracked]
    sharp = train.train([dict(run, sharpness=True) for run in runs], f32)
    for row, other in zip(plain, sharp):
        assert row["initial_sharpness"] is None and other["initial_sharpness"] > 0
        differing = {key for key in row if results(row).get(key) != results(other).get(key)}
        assert differing == {"id", "sharpness", "initial_sharpness"}


# ---- where rows come from ----

def test_every_row_says_where_it_comes_from(f32):
    rows = train.train([dict(SMALL, steps=2, lr=lr) for lr in (0.1, 0.2)], f32)
    for row in rows:
        config = {name: row[name] for name in SETTINGS}
        assert row["torch"] == torch.__version__
        assert row["python"] == ".".join(map(str, sys.version_info[:3]))
        assert row["device"] == "cpu" and row["dtype"] == "float32"
        assert row["id"] == run_id(config)
        assert row["commit"] is None or re.fullmatch(r"[0-9a-f]{12}\+?", row["commit"])
    command = ["git", "rev-parse", "--short=12", "HEAD"]
    head = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)
    assert head.returncode or row["commit"].rstrip("+") == head.stdout.strip()
    assert rows[0]["id"] != rows[1]["id"] and rows[0]["failed"] is None


def test_a_failed_row_has_the_columns_of_any_other(f32):
    run = configure(dict(SMALL, steps=2))
    row, = train.train([run], f32)
    failed = train.failed_row(run, "out of memory", "cpu")
    assert list(failed) == list(row) and failed["id"] == row["id"]
    assert failed["failed"] == "out of memory"
    assert failed["final_train_loss"] is failed["val_loss"] is failed["diverged_at"] is None


# ---- the script: files, gradient accumulation ----

IMPORTS = """
import importlib, os, sys
import matplotlib, numpy, torch         # these may set what they like

def process():
    return (dict(os.environ), os.getcwd(), list(sys.path), matplotlib.get_backend(auto_select=False),
            {key: matplotlib.rcParams[key] for key in matplotlib.rcParams if key != "backend"},
            torch.get_num_threads(), torch.get_default_dtype(),
            torch.get_float32_matmul_precision(), torch.get_rng_state().tolist(), numpy.geterr(),
            str(numpy.random.get_state()), "matplotlib.pyplot" in sys.modules)

before = process()
for name in sys.argv[1:]:
    importlib.import_module(name)
    for was, now in zip(before, process()):
        assert was == now, (name, was, now)
"""


def test_importing_a_library_file_sets_no_environment_variable_and_no_backend():
    names = [path.stem for path in HERE.glob("*.py") if not path.stem.startswith("test_")]
    assert {"config", "estimate", "plots", "sweep", "train"} <= set(names)
    environment = {name: value for name, value in os.environ.items()
                   if name not in ("MKL_CBWR", "MPLBACKEND")}
    ran = subprocess.run([sys.executable, "-c", IMPORTS, *names], cwd=HERE, env=environment,
                         capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_the_script_prints_the_row_of_train_and_runs_nothing_twice(tmp_path):
    row, = train.train([MLP])
    flags = [*flags_of(MLP), "--out", tmp_path]
    done = run_script(*flags)
    assert done.returncode == 0 and results(done.stdout) == results(row), done.stderr
    assert done.stdout == (tmp_path / f"runs-{row['id']}.jsonl").read_text()
    again = run_script(*flags)
    assert again.stdout == done.stdout and "not run again" in again.stderr
    diverged = run_script(*flags, "--lr", "1e30", "--loss", "mse")
    assert diverged.returncode == 0 and "diverged at step " in diverged.stderr


def test_a_finished_run_trains_again_for_the_track_that_it_lacks(tmp_path):
    flags = [*flags_of(MLP), "--out", tmp_path]
    first = run_script(*flags)
    assert not list(tmp_path.glob("track*"))
    tracked = run_script(*flags, "--track", 5)
    assert tracked.returncode == 0 and results(tracked.stdout) == results(first.stdout)
    assert {row["step"] for row in lines(tmp_path, "track*.jsonl")} == set(range(1, 8))
    assert "not run again" in run_script(*flags, "--track", 5).stderr
    assert "not run again" in run_script(*flags).stderr


def test_rank_and_world_size_without_torchrun_are_those_of_another_program(tmp_path, monkeypatch):
    row = run_script(*flags_of(MLP)).stdout
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    done = run_script(*flags_of(MLP), "--out", tmp_path)
    assert done.returncode == 0 and results(done.stdout) == results(row)
    assert done.stdout == next(tmp_path.glob("runs-*.jsonl")).read_text()


def test_under_torchrun_a_single_run_is_refused_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "any")
    refused = run_script(*flags_of(MLP), "--out", tmp_path / "out")
    assert refused.returncode == 2 and not refused.stdout and not (tmp_path / "out").exists()
    assert refused.stderr == ("train.py: train.py trains one run in one process; "
                              "share the runs of a sweep with torchrun sweep.py\n")


def test_an_interrupted_run_leaves_no_files_and_begins_anew(tmp_path, monkeypatch):
    undisturbed, advance = run_script(*flags_of(MLP), "--track", 3, "--out", tmp_path / "a"), stack.advance

    def interrupting(replicas, x, y, model, rule, step, *args, **kwargs):
        if step == 4:
            raise KeyboardInterrupt
        return advance(replicas, x, y, model, rule, step, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(stack, "advance", interrupting)
        interrupted = run_script(*flags_of(MLP), "--track", 3, "--out", tmp_path / "b")
    assert interrupted.returncode == 130 and not interrupted.stdout
    assert interrupted.stderr.endswith("\ninterrupted; the same command begins the run anew\n")
    assert list((tmp_path / "b").iterdir()) == []
    again = run_script(*flags_of(MLP), "--track", 3, "--out", tmp_path / "b")
    assert results(again.stdout) == results(undisturbed.stdout)
    assert lines(tmp_path / "b", "track*.jsonl") == lines(tmp_path / "a", "track*.jsonl") != []
    assert sorted(path.name[:5] for path in (tmp_path / "b").iterdir()) == ["runs-", "track"]


@pytest.mark.parametrize("settings", [
    dict(TINY_GPT, batch_size=8, clip=1.0), dict(SMALL, lr=0.3),
    dict(SMALL, bias=True, optimizer="adam", lr=0.01)], ids=["gpt", "mlp", "biases"])
def test_accumulated_gradients_are_those_of_the_whole_batch(settings):
    config = configure(dict(settings, dtype="float64"))
    splits = data.load(config)
    (whole,), (parts,) = (train.train([dict(config, accumulate=n)], splits) for n in (1, 4))
    for name in ("final_train_loss", "train_accuracy", "val_loss", "logit_rms"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-10)
