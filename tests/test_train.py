"""train.py: rows against torch.optim one run at a time, divergence, GPTs, checkpoints, files."""
import copy
import json
import math
import re
import subprocess
from pathlib import Path

import train            # before torch: it fixes how MKL sums
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import data
import metrics
import models
import param
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


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def results(row):
    """What must not change when the same run is done again."""
    row = json.loads(row) if isinstance(row, str) else row
    return {key: value for key, value in row.items() if key != "seconds"}


def flags_of(settings):
    """The command line of these settings."""
    flags = []
    for name, value in settings.items():
        name = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{'' if value else 'no-'}{name}")
        else:
            flags += [f"--{name}", value]
    return flags


def run_script(*flags):
    """train.py in this process, as its command line would call it: returncode, stdout, stderr."""
    return call(lambda: train.command_line(train.main), "train.py", *flags)


def lines(folder, pattern):
    """All rows in the files of a folder."""
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
        config = train.configure({name: value})
        assert config[name] == value and type(config[name]) is type(train.SETTINGS[name][0])
    for value in refused:
        with pytest.raises(train.InputError, match=f"^{name} is {re.escape(repr(value))}; it must be"):
            train.configure({name: value})


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


def torch_loss(config):
    return {"ce": F.cross_entropy,
            "mse": lambda z, y: F.mse_loss(z, one_hot(z, y)),
            "brier": lambda z, y: F.mse_loss(z.softmax(-1), one_hot(z, y)),
            "huber": lambda z, y: F.huber_loss(z, one_hot(z, y), delta=config["huber_delta"]),
            "hinge": F.multi_margin_loss,
            "squared_hinge": lambda z, y: F.multi_margin_loss(z, y, p=2)}[config["loss"]]


def optimizer_of(model, base, config):
    names = ("param", "optimizer", "lr", "alpha", "weight_decay", "eps")
    groups = param.param_groups(model, base, *(config[name] for name in names))
    if config["optimizer"] == "sgd":
        return torch.optim.SGD(groups, momentum=config["momentum"])
    return torch.optim.AdamW(groups, betas=(config["beta1"], config["beta2"]))


def take_step(model, optimizer, loss, step, config):
    for group in optimizer.param_groups:
        group["lr"] = train.schedule(step, config) * group["base_lr"]
    optimizer.zero_grad()
    loss.backward()
    if config["clip"]:
        nn.utils.clip_grad_norm_(model.parameters(), config["clip"])
    optimizer.step()


def alone(run, splits):
    """The row's results for one run, by a plain loop with torch.optim on param_groups."""
    config = train.configure(run)
    shape = config["hidden_layers"], 2, config["activation"], config["bias"]
    model, base = (models.MLP(100, config[name], *shape) for name in ("width", "base_width"))
    param.init_(model.to(splits.x.dtype), base, config["param"], seeded(config["seed"]))
    optimizer, loss_of = optimizer_of(model, base, config), torch_loss(config)
    order, losses, hits = seeded(config["seed"] + 1), [], []
    for step in range(config["steps"]):
        index = torch.randint(len(splits.x), (config["batch_size"],), generator=order)
        logits = model(splits.x[index])
        loss = loss_of(logits, splits.y[index])
        take_step(model, optimizer, loss, step, config)
        losses.append(loss.item())
        hits.append((logits.argmax(1) == splits.y[index]).double().mean().item())
    logits = model(splits.x_val).detach()
    tenth = max(1, config["steps"] // 10)
    return {"final_train_loss": np.mean(losses[-tenth:]), "train_accuracy": np.mean(hits[-tenth:]),
            "val_loss": loss_of(logits, splits.y_val).item(),
            "logit_rms": logits.square().mean(1).sqrt().mean().item(),
            "val_accuracy": (logits.argmax(1) == splits.y_val).double().mean().item()}


ADAM = dict(optimizer="adam", lr=0.005)
VARIANTS = [
    {}, dict(loss="mse"), dict(loss="brier"), dict(loss="hinge"), dict(loss="squared_hinge"),
    dict(loss="huber", huber_delta=0.3), dict(activation="identity", lr=0.02), dict(bias=True),
    dict(momentum=0.9, lr=0.02), dict(momentum=0.9, weight_decay=0.1, lr=0.02), dict(weight_decay=0.1),
    ADAM, dict(ADAM, weight_decay=0.1, eps=1e-3), dict(ADAM, bias=True, param="mup"),
    dict(warmup=20), dict(warmup=5, decay="cosine"), dict(clip=0.5), dict(param="mup", alpha=0.25)]


def same_as_alone(runs, splits, tolerance):
    for run, row in zip(runs, train.train(runs, splits)):
        for name, value in alone(run, splits).items():
            assert row[name] == pytest.approx(value, rel=tolerance), (name, run)


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
    """Two runs that share a stack, of settings drawn at random."""
    generator = np.random.default_rng(seed)

    def one(*values):
        return values[generator.integers(len(values))]

    optimizer, highest = one(("sgd", 0.03), ("adam", 0.003))
    shared = dict(
        SMALL, dtype="float64", optimizer=optimizer, momentum=one(0.0, 0.8), eps=1e-4,
        width=one(8, 17, 40), hidden_layers=one(1, 2, 3), bias=one(True, False),
        activation=one("relu", "identity"), loss=one(*LOSSES), huber_delta=one(0.5, 1.0),
        steps=one(1, 4, 9), batch_size=one(8, 24), accumulate=one(1, 2), clip=one(0.0, 0.3),
        warmup=one(0, 1), decay=one("none", "cosine"))
    return [dict(shared, seed=seed, lr=highest * float(generator.uniform(0.1, 1)),
                 param=one(*param.PARAMETERIZATIONS), alpha=one(0.0, 0.5),
                 weight_decay=one(0.0, 0.1)) for seed in (0, 3)]


@pytest.mark.parametrize("seed", range(10))
def test_any_settings_together_train_as_torch_optim_trains_them(seed, f64):
    same_as_alone(drawn_at_random(seed), f64, 1e-12)


@pytest.mark.parametrize("variant", [{}, {"optimizer": "adam", "lr": 0.01}], ids=["sgd", "adam"])
def test_a_row_does_not_depend_on_its_stack_to_the_last_bit(variant, f32):
    # wide enough that cores share a product of one replica
    wide, lr = dict(SMALL, width=1024, steps=5, **variant), variant.get("lr", 0.1)
    runs = [dict(wide, lr=lr * factor, seed=seed) for factor in (0.3, 0.1) for seed in (0, 1)]
    torch.set_num_threads(2)
    try:
        together = train.train(runs, f32)
        by_one = [train.train([run], f32)[0] for run in runs]
    finally:
        torch.set_num_threads(1)
    assert all(row["diverged_at"] is None and row["deterministic"] for row in together)
    assert [results(row) for row in together] == [results(row) for row in by_one]


@pytest.mark.parametrize("threads, size, deterministic", [
    (1, dict(width=16), True), (2, dict(width=16), False), (2, dict(width=64), True),
    (2, dict(width=64, batch_size=8), False), (2, dict(width=64, batch_size=32, accumulate=4), False)])
def test_products_too_small_for_two_threads_are_not_called_deterministic(threads, size, deterministic, f32):
    torch.set_num_threads(threads)
    try:
        row, = train.train([{**SMALL, "batch_size": 16, "steps": 2, **size}], f32)
    finally:
        torch.set_num_threads(1)
    assert row["deterministic"] is (deterministic and train.SAME_BITS and torch.backends.mkl.is_available())


# LRs of SGD well inside the stable range. Over thirty shifts (GPT: eight) the ratio of the loss to that of a
# network that does not move is at most 0.45 ± 0.11 for the MLP; for the GPT at most 0.57 ± 0.03, and 0.81 ± 0.04
# under brier with SGD, whose derivative is a mean over 256 tokens' probabilities. One would be no fall.
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
    train.train([dict(SMALL, steps=12, lr=lr) for lr in (0.1, 1e9)], f32,
                progress=lambda step, alive: seen.append((step, alive)))
    assert seen == [(5, 1), (10, 1), (12, 1)]


def test_divergence_is_a_row_and_does_not_touch_its_neighbours(f32):
    run, lrs = dict(SMALL, loss="mse"), [0.1, 1e4, 0.05, 1e30]
    rows = train.train([dict(run, lr=lr) for lr in lrs], f32)
    assert [row["diverged_at"] is None for row in rows] == [True, False, True, False]
    assert 0 < rows[3]["diverged_at"] <= rows[1]["diverged_at"] < 10
    for name in ("final_train_loss", "val_loss", "logit_rms"):
        assert rows[1][name] is rows[3][name] is None
    calm = train.train([dict(run, lr=lr) for lr in (0.1, 0.05)], f32)
    assert [results(row) for row in calm] == [results(rows[0]), results(rows[2])]
    json.dumps(rows, allow_nan=False)


def test_diverged_at_is_the_first_step_whose_loss_is_not_finite(f32):
    run = dict(SMALL, lr=30.0, loss="mse", hidden_layers=1)     # at step 3 in each of a hundred shifts

    def diverged_at(steps):
        return train.train([dict(run, steps=steps)], f32)[0]["diverged_at"]

    at = diverged_at(run["steps"])
    assert at > 1 and diverged_at(at) in (None, at)     # no loss before it was
    assert diverged_at(at + 1) == at


def test_readout_only_training_leaves_the_features(f32):
    runs = [dict(SMALL, trainable="readout", lr=lr) for lr in (1e-9, 0.1)]
    rows = train.train(runs, f32)
    assert rows[1]["final_train_loss"] < rows[0]["final_train_loss"] - 0.05
    everything, = train.train([dict(SMALL, lr=0.1)], f32)
    assert abs(everything["val_loss"] - rows[1]["val_loss"]) > 1e-3
    tracked = []
    train.train(runs[1:], f32, track=50, tracked=tracked)
    moved = [row["effective"] for row in tracked if row["step"] == 50 and row["module"]]
    assert moved[0] == moved[1] == 0 < moved[2]


def test_every_width_and_lr_sees_the_same_batches():
    def batches(*runs):
        runs = [train.configure(dict(SMALL, **run)) for run in runs]
        order, row_of = train.data_order(runs, 400, runs[0], "cpu")
        return order[row_of]                                        # (R, steps, B)

    first, second, third = batches({"seed": 0}, {"seed": 1}, {"seed": 1, "lr": 0.3})
    assert first.shape == (50, 16) and not torch.equal(first, second)
    assert torch.equal(second, third) and torch.equal(second, batches({"seed": 1, "width": 48})[0])


def test_at_one_seed_every_width_and_lr_reads_the_same_tokens(monkeypatch):
    seen, windows = {}, data.Tokens.windows

    def reading(tokens, starts, length):
        read.append(starts.tolist())
        return windows(tokens, starts, length)

    for width, lr, seed in ((8, 0.1, 0), (16, 0.1, 0), (8, 0.3, 0), (8, 0.1, 1)):
        config = train.configure(dict(TINY_GPT, width=width, lr=lr, seed=seed))
        splits, read = data.load(config), seen.setdefault((width, lr, seed), [])
        with monkeypatch.context() as patch:
            patch.setattr(data.Tokens, "windows", reading)
            train.train([config], splits)
    assert len(seen[8, 0.1, 0]) == TINY_GPT["steps"]
    assert seen[8, 0.1, 0] == seen[16, 0.1, 0] == seen[8, 0.3, 0] != seen[8, 0.1, 1]


def test_chance_is_the_loss_of_the_best_constant_for_these_data_and_settings(f64, text_file):
    p = f64.y.double().mean().item()
    entropy = -p * math.log(p) - (1 - p) * math.log(1 - p)

    def chance(**settings):
        return train.chance_loss(train.configure(settings), f64)

    assert chance(loss="ce") == pytest.approx(entropy, rel=1e-12)
    assert chance(loss="mse") == chance(loss="brier") == pytest.approx(p * (1 - p), rel=1e-12)
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
    with pytest.raises(data.InputError, match=words):
        train.train(runs)


# ---- GPTs ----

FAST_ADAM = dict(optimizer="adam", lr=0.02)


@pytest.mark.parametrize("variant", [
    {}, FAST_ADAM, dict(FAST_ADAM, accumulate=2, param="mup"),
    dict(FAST_ADAM, norm_affine=False, qk_norm=False)], ids=named)
def test_a_gpts_run_is_a_plain_loop_with_torch_optim(variant, text_file):
    run = dict(GPT_RUN, lr=0.5, data=str(text_file), vocab_size=256, dtype="float64")
    run = train.configure({**run, **variant})
    row, = train.train([run])
    tokens = torch.from_numpy(np.fromfile(text_file, np.uint8).astype(np.int64))
    model, base = (models.GPT(256, width, 1, 8, 16, run["norm_affine"], run["qk_norm"]).double()
                   for width in (32, 16))
    param.init_(model, base, run["param"], seeded(0), gain=1.0)
    optimizer, losses = optimizer_of(model, base, run), []

    def loss_on(starts):
        windows = torch.stack([tokens[start:start + 9] for start in starts])
        return F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())

    for starts in torch.randint(3600 - 8, (12, 4), generator=seeded(1)):    # the file's last tenth validates
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
    run, tracked = dict(SMALL, lr=0.3, steps=1, seed=3, dtype="float64"), []
    x, y = f64.x_val[:16], f64.y_val[:16]
    train.train([dict(run, lr=0.1), run], f64, track=1, tracked=tracked)
    base = models.MLP(100, 16, 2, 2)
    model = param.init_(models.MLP(100, 24, 2, 2).double(), base, "sp", seeded(3))
    reference = copy.deepcopy(model)
    index = torch.randint(len(f64.x), (16,), generator=seeded(4))
    F.cross_entropy(model(f64.x[index]), f64.y[index]).backward()
    torch.optim.SGD(param.param_groups(model, base, "sp", "sgd", 0.3)).step()
    model.zero_grad()
    expected = metrics.refined_coordinate_check(model, reference, x)
    F.cross_entropy(model(x), y).backward()
    mine = [row for row in tracked if row["id"] == train.run_id(train.configure(run))]
    assert [row["module"] for row in mine] == [*expected, ""]
    assert [row["role"] for row in mine] == ["input", "hidden", "output", "logits"]
    assert [(row["step"], row["layer"]) for row in mine] == [(1, layer) for layer in range(4)]
    for row in mine[:-1]:
        norms = expected[row["module"]]
        assert {key: row[key] for key in norms} == pytest.approx(norms, rel=1e-5)
        gradient = model.get_submodule(row["module"]).weight.grad.norm().item()
        assert row["gradient"] == pytest.approx(gradient, rel=1e-5)
    assert np.shape(mine[-1]["softmax"]) == (16, 2)
    with torch.no_grad():
        change = model(x) - reference(x)
    rms = change.square().mean(1).sqrt().mean().item()
    assert mine[-1]["change"] == pytest.approx(rms, rel=1e-5)


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
    plain, tracked = (train.train(runs, f32, track=track, tracked=[]) for track in (0, 7))
    assert [results(row) for row in plain] == [results(row) for row in tracked]


# ---- where rows come from ----

def test_every_row_says_where_it_comes_from(f32):
    rows = train.train([dict(SMALL, steps=2, lr=lr) for lr in (0.1, 0.2)], f32)
    for row in rows:
        config = {name: row[name] for name in train.SETTINGS}
        assert row["torch"] == torch.__version__
        assert row["device"] == "cpu" and row["dtype"] == "float32"
        assert row["deterministic"] is True and row["id"] == train.run_id(config)
        assert row["commit"] is None or re.fullmatch(r"[0-9a-f]{12}\+?", row["commit"])
    command = ["git", "rev-parse", "--short=12", "HEAD"]
    head = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)
    assert head.returncode or row["commit"].rstrip("+") == head.stdout.strip()
    assert rows[0]["id"] != rows[1]["id"] and rows[0]["failed"] is None


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_rows_say_where_their_bits_depend_on_the_stack(f32):
    biased = [dict(SMALL, bias=True, optimizer="adam", lr=lr) for lr in (0.001, 0.01, 0.1)]
    together = train.train(biased, f32)
    assert all(row["deterministic"] for row in together)
    by_one = [train.train([run], f32)[0] for run in biased]
    assert [results(row) for row in together] == [results(row) for row in by_one]
    runs = [dict(TINY_GPT, lr=lr, dtype="bfloat16") for lr in (0.1, 0.2)]
    # in a stack attention takes another path
    assert [row["deterministic"] for row in train.train(runs)] == [False, False]
    assert train.train(runs[:1])[0]["deterministic"]


def test_a_failed_row_has_the_columns_of_any_other(f32):
    run = train.configure(dict(SMALL, steps=2))
    row, = train.train([run], f32)
    failed = train.failed_row(run, "out of memory", "cpu")
    assert list(failed) == list(row) and failed["id"] == row["id"]
    assert failed["failed"] == "out of memory"
    assert failed["final_train_loss"] is failed["val_loss"] is failed["diverged_at"] is None


# ---- the script: files, checkpoints, gradient accumulation ----

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


def test_under_torchrun_a_finished_runs_row_is_printed_by_one_rank_alone(tmp_path, monkeypatch):
    flags = [*flags_of(MLP), "--out", tmp_path]
    row = run_script(*flags).stdout
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "any")
    printed = []
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        done = run_script(*flags)
        assert done.returncode == 0
        printed.append((done.stdout, done.stderr.count("not run again")))
    assert printed == [(row, 1), ("", 0)]


def interrupted_after(steps, patch):
    """Ends training at the checkpoint of that many steps, as Ctrl-C would."""
    def interrupting(path, state):
        save(path, state)
        if state["done"] == steps:
            raise KeyboardInterrupt

    save = train.save_checkpoint
    patch.setattr(train, "save_checkpoint", interrupting)


@pytest.mark.parametrize("settings", [
    dict(TINY_GPT, optimizer="adam", lr=0.003, norm_affine=False, accumulate=2), MLP], ids=["gpt", "mlp"])
def test_training_continued_from_a_checkpoint_gives_the_row_to_the_last_bit(tmp_path, monkeypatch, settings):
    def counted(*args):
        steps.append(args)
        return batch(*args)

    flags, out = [*flags_of(settings), "--track", 3], tmp_path / "b"
    undisturbed = run_script(*flags, "--out", tmp_path / "a")
    assert undisturbed.returncode == 0, undisturbed.stderr
    batch, steps = data.Splits.batch, []
    with monkeypatch.context() as patch:
        interrupted_after(4, patch)
        cut = run_script(*flags, "--checkpoint", 2, "--out", out)
    assert cut.returncode == 130 and "goes on from" in cut.stderr and not cut.stdout
    assert len(cut.stderr.split("\n\n")[-1].splitlines()) <= 2
    assert [path.suffix for path in out.iterdir()] == [".pt"]
    monkeypatch.setattr(data.Splits, "batch", counted)
    continued = run_script(*flags, "--checkpoint", 2, "--out", out)
    assert len(steps) == 3 and results(continued.stdout) == results(undisturbed.stdout)
    assert lines(out, "track*.jsonl") == lines(tmp_path / "a", "track*.jsonl") != []
    assert sorted(path.name[:5] for path in out.iterdir()) == ["runs-", "track"]
    again = run_script(*flags, "--checkpoint", 2, "--out", out)
    assert len(steps) == 3 and again.stdout == continued.stdout


@pytest.mark.parametrize("begun, goes_on", [(0, 3), (3, 0), (3, 2)])
def test_a_checkpoint_goes_on_only_with_the_track_of_its_beginning(tmp_path, monkeypatch, begun, goes_on):
    flags = [*flags_of(MLP), "--checkpoint", 2, "--out", tmp_path]
    with monkeypatch.context() as patch:
        interrupted_after(4, patch)
        assert run_script(*flags, "--track", begun).returncode == 130
    checkpoint, = tmp_path.iterdir()
    before = checkpoint.read_bytes()
    refused = run_script(*flags, "--track", goes_on)
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1 and not refused.stdout
    assert f"was begun with --track {begun}, not {goes_on}; go on with that, or " in refused.stderr
    assert [*tmp_path.iterdir()] == [checkpoint] and checkpoint.read_bytes() == before
    assert run_script(*flags, "--track", begun).returncode == 0
    assert bool(lines(tmp_path, "track*.jsonl")) == (begun > 0)


@pytest.mark.parametrize("settings", [
    dict(TINY_GPT, batch_size=8, clip=1.0), dict(SMALL, lr=0.3),
    dict(SMALL, bias=True, optimizer="adam", lr=0.01)], ids=["gpt", "mlp", "biases"])
def test_accumulated_gradients_are_those_of_the_whole_batch(settings):
    config = train.configure(dict(settings, dtype="float64"))
    splits = data.load(config)
    (whole,), (parts,) = (train.train([dict(config, accumulate=n)], splits) for n in (1, 4))
    for name in ("final_train_loss", "train_accuracy", "val_loss", "logit_rms"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-10)
