"""Executable theory. pytest test_regimes.py takes about a minute on two cores; each test is named for its claim.

Reference checks state an independent computation in the test (written out, from torch.optim, or from another package,
skipped where that is absent). Behaviour checks measure a regime, and show that the neighbouring exponent would fail.
"""
import contextlib
import gzip
import io
import json
import math
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import train            # before torch: it fixes how MKL sums
import torch
import torch.nn as nn
import torch.nn.functional as F

import models
import param
import plots
import sweep

HERE = Path(__file__).parent
HALF = 0.5
torch.set_num_threads(1)        # the nets here are tiny; threads would only wait for each other


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------------------------------------------
# Theory: the predictor against the paper's statements

@pytest.mark.parametrize("loss, optimizer, hidden_layers, trainable, alpha", [
    ("ce", "sgd", 3, "all", 0.5), ("ce", "sgd", 7, "all", 0.5), ("brier", "sgd", 3, "all", 0.5), ("mse", "sgd", 3, "all", 1.0),
    ("ce", "sgd", 1, "all", 0.0), ("mse", "sgd", 1, "all", 1.0), ("ce", "adam", 3, "all", 1.0),
    ("ce", "sgd", 3, "readout", -math.inf), ("mse", "sgd", 3, "readout", 1.0),
])
def test_proposition_1_largest_stable_exponents_of_sp(loss, optimizer, hidden_layers, trainable, alpha):
    assert param.max_stable_alpha("sp", optimizer, loss, hidden_layers, trainable) == alpha


@pytest.mark.parametrize("alpha, regime_ce, regime_mse", [
    (0.25, "catastrophic", "catastrophic"), (0.5, "controlled divergence", "catastrophic"),
    (0.75, "controlled divergence", "catastrophic"), (1.0, "stable", "stable"), (1.25, "stable", "stable")])
def test_proposition_1_the_middle_regime_exists_for_bounded_derivatives_only(alpha, regime_ce, regime_mse):
    assert param.predict("sp", "sgd", "ce", alpha).regime == regime_ce
    assert param.predict("sp", "sgd", "mse", alpha).regime == regime_mse


def test_proposition_2_hidden_layers_learn_features_at_alpha_one_half_and_the_input_layer_does_not():
    later = param.predict("sp", "sgd", "ce", alpha=HALF, hidden_layers=4, step=2)
    assert later.features == [-1.0, 0.0, 0.0, 0.0]
    assert later.effective == [-1.0, 0.0, 0.0, 0.0, 0.5]
    assert later.propagating == [-1.0, 0.0, 0.0, 0.5]
    assert later.logits == 0.5


@pytest.mark.parametrize("optimizer", param.OPTIMIZERS)
def test_mup_is_stable_and_learns_features_in_every_layer(optimizer):
    prediction = param.predict("mup", optimizer, "mse", step=2)
    assert prediction.regime == "stable" and set(prediction.features) == {0.0} and prediction.logits == 0.0
    assert param.max_stable_alpha("mup", optimizer, "mse") == 0.0


def test_sp_full_align_sits_at_the_edge_of_controlled_divergence():
    prediction = param.predict("sp_full_align", "sgd", "ce", step=2)
    assert set(prediction.features) == {0.0} and prediction.logits == 0.5
    assert prediction.regime == "controlled divergence" and param.max_stable_alpha("sp_full_align", "sgd", "ce") == 0.0


def test_ntp_is_stable_and_its_features_vanish():
    prediction = param.predict("ntp", "sgd", "mse", step=2)
    assert prediction.regime == "stable" and max(prediction.features) == -0.5 and prediction.logits == 0.0


# ------------------------------------------------------------------------------------------------------------------
# Parameterizations: against the base width, abc symmetry, and muP written out

def plain_training(forward, weights, lrs, x, y, steps, optimizer="sgd", eps=None):
    """Logits after `steps` full-batch steps of SGD or Adam, written out; one LR and ε per tensor."""
    weights = [w.clone().requires_grad_() for w in weights]
    groups = [{"params": [w], "lr": lr, "eps": e} for w, lr, e in zip(weights, lrs, eps or [1e-8] * len(weights))]
    steps_of = torch.optim.SGD(groups, lr=0) if optimizer == "sgd" else torch.optim.Adam(groups)
    for _ in range(steps):
        steps_of.zero_grad()
        F.cross_entropy(forward(weights, x), y).backward()
        steps_of.step()
    return forward(weights, x).detach()


def relu_net(multipliers):
    def forward(weights, x):
        for multiplier, w in zip(multipliers[:-1], weights[:-1]):
            x = torch.relu(multiplier * x @ w.T)
        return multipliers[-1] * x @ weights[-1].T
    return forward


def batch(d_in=12, classes=3, size=32, seed=5):
    generator = seeded(seed)
    return (torch.randn(size, d_in, generator=generator, dtype=torch.float64),
            torch.randint(classes, (size,), generator=generator))


def net_and_base(width, base_width, bias=False, d_in=12, classes=3, dtype=torch.float64):
    return (models.MLP(d_in, width, 3, classes, bias=bias).to(dtype), models.MLP(d_in, base_width, 3, classes, bias=bias).to(dtype))


ROLES_OF_MLP = {"layers.0.weight": "input", "layers.1.weight": "hidden", "layers.2.weight": "hidden", "layers.3.weight": "output"}


def trained_logits(parameterization, optimizer, width, base_width, steps=5, lr=0.05):
    model, base = net_and_base(width, base_width)
    param.init_(model, base, parameterization, seeded(0), overrides=ROLES_OF_MLP)
    groups = param.param_groups(model, base, parameterization, optimizer, lr if optimizer == "sgd" else lr / 10, overrides=ROLES_OF_MLP)
    steps_of = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimizer](groups)
    x, y = batch()
    for _ in range(steps):
        steps_of.zero_grad()
        F.cross_entropy(model(x), y).backward()
        steps_of.step()
    return model(x).detach()


@pytest.mark.parametrize("optimizer", param.OPTIMIZERS)
def test_all_parameterizations_coincide_at_the_base_width_and_nowhere_else(optimizer):
    for steps in (0, 1, 5):
        logits = {name: trained_logits(name, optimizer, 32, 32, steps) for name in param.PARAMETERIZATIONS}
        for other in logits.values():
            torch.testing.assert_close(other, logits["sp"], rtol=0, atol=0)
    wide = {name: trained_logits(name, optimizer, 64, 32) for name in param.PARAMETERIZATIONS}
    names = list(wide)
    for i, name in enumerate(names):
        for other in names[:i]:
            assert (wide[name] - wide[other]).abs().max() > 1e-4, f"{name} trains as {other}"


@pytest.mark.parametrize("optimizer, power", [("sgd", 2), ("adam", 1)])
@pytest.mark.parametrize("layer", [0, 1, 3])
def test_abc_symmetry_leaves_training_unchanged(optimizer, power, layer):
    m, theta = 4.0, 0.7
    model, base = net_and_base(64, 16)
    param.init_(model, base, "mup", seeded(0))
    weights = [w.detach() for w in model.parameters()]
    x, y = batch()
    lr = 0.05 if optimizer == "sgd" else 0.005
    lrs, eps = [lr] * 4, [1e-3] * 4         # a large ε, so that forgetting it would show
    plain = plain_training(relu_net([1.0] * 4), weights, lrs, x, y, 20, optimizer, eps)

    def shifted(lr_power, eps_power):       # a + θ, b - θ, c - power θ, ε along with the gradient
        return plain_training(relu_net([m ** -theta if l == layer else 1.0 for l in range(4)]),
                              [w * m ** theta if l == layer else w for l, w in enumerate(weights)],
                              [v * m ** (lr_power * theta) if l == layer else v for l, v in enumerate(lrs)], x, y, 20, optimizer,
                              [v * m ** -(eps_power * theta) if l == layer else v for l, v in enumerate(eps)])

    torch.testing.assert_close(shifted(power, 1), plain, rtol=1e-10, atol=1e-10)
    assert (shifted(power - 1, 1) - plain).abs().max() > 1e-4
    if optimizer == "adam":
        assert (shifted(power, 0) - plain).abs().max() > 1e-6


@pytest.mark.parametrize("optimizer", param.OPTIMIZERS)
@pytest.mark.parametrize("width", [8, 64])
def test_mup_is_tensor_programs_v_written_out(optimizer, width):
    """Table 8 of arXiv 2203.03466: readout multiplied by 1/m and of constant variance, LRs as below."""
    base_width = 16
    m = width / base_width
    model, base = net_and_base(width, base_width)
    param.init_(model, base, "mup", seeded(0))
    weights = [w.detach().clone() for w in model.parameters()]
    lr, x, y = (0.05 if optimizer == "sgd" else 0.005), *batch()
    torch_optimizer = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimizer]
    ours = torch_optimizer(param.param_groups(model, base, "mup", optimizer, lr, eps=1e-30))
    for _ in range(20):
        ours.zero_grad()
        F.cross_entropy(model(x), y).backward()
        ours.step()
    lrs = [lr * m, lr, lr, lr * m] if optimizer == "sgd" else [lr, lr / m, lr / m, lr]
    written_out = plain_training(relu_net([1.0, 1.0, 1.0, 1 / m]), weights[:-1] + [weights[-1] * m], lrs, x, y, 20, optimizer, [1e-30] * 4)
    torch.testing.assert_close(model(x).detach(), written_out, rtol=1e-9, atol=1e-9)
    assert abs(weights[-1].std().item() / (math.sqrt(2 / base_width) / m) - 1) < 0.2       # 24 or 192 draws


@pytest.mark.parametrize("optimizer", param.OPTIMIZERS)
def test_mup_equals_the_package_mup(optimizer):
    mup = pytest.importorskip("mup")

    class Net(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.body = nn.ModuleList([nn.Linear(12, width), nn.Linear(width, width), nn.Linear(width, width)])
            self.readout = mup.MuReadout(width, 3)

        def forward(self, x):
            for layer in self.body:
                x = torch.relu(layer(x))
            return self.readout(x)

    theirs = Net(64).double()
    mup.set_base_shapes(theirs, Net(16).double(), delta=Net(32).double())
    model, base = net_and_base(64, 16, bias=True)
    param.init_(model, base, "mup", seeded(0))
    with torch.no_grad():
        for layer, own in zip([*theirs.body, theirs.readout], model.layers):
            layer.weight.copy_(own.weight * (64 / 16 if layer is theirs.readout else 1.0))
            layer.bias.copy_(own.bias)
    x, y = batch()
    lr = 0.05 if optimizer == "sgd" else 0.005
    groups = param.param_groups(model, base, "mup", optimizer, lr, eps=1e-30)
    pairs = [(model, {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimizer](groups)),
             (theirs, mup.MuSGD(theirs.parameters(), lr=lr) if optimizer == "sgd" else mup.MuAdam(theirs.parameters(), lr=lr, eps=1e-30))]
    for _ in range(20):
        for net, steps_of in pairs:
            steps_of.zero_grad()
            F.cross_entropy(net(x), y).backward()
            steps_of.step()
    torch.testing.assert_close(model(x), theirs(x), rtol=1e-9, atol=1e-9)


def test_lr_times_weight_decay_does_not_change_with_width():
    model, base = net_and_base(64, 16, bias=True)
    for name in param.PARAMETERIZATIONS:
        for group in param.param_groups(model, base, name, "adam", lr=0.3, alpha=0.7, weight_decay=0.1):
            assert math.isclose(group["lr"] * group["weight_decay"], 0.03)
            assert group["base_lr"] == group["lr"]


def test_widths_below_the_base_width_continue_the_same_power_law():
    base = models.MLP(12, 32, 3, 3)
    lrs = [param.param_groups(models.MLP(12, width, 3, 3), base, "mup", "adam", lr=1.0, alpha=HALF)[1]["lr"] for width in (8, 16, 64)]
    assert lrs == pytest.approx([4 ** 1.5, 2 ** 1.5, 2 ** -1.5])


# ------------------------------------------------------------------------------------------------------------------
# Roles of any model

class Convolutional(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3)
        self.body = nn.Conv2d(width, 2 * width, 3)
        self.norm = nn.BatchNorm2d(2 * width)
        self.readout = nn.Linear(2 * width, 10)

    def forward(self, x):
        return self.readout(torch.relu(self.norm(self.body(torch.relu(self.stem(x))))).mean((2, 3)))


def test_roles_are_read_from_shapes():
    roles = param.infer_roles(Convolutional(32), Convolutional(16).to("meta"))
    assert roles == {"stem.weight": "input", "stem.bias": "vector", "body.weight": "hidden", "body.bias": "vector",
                     "norm.weight": "vector", "norm.bias": "vector", "readout.weight": "output", "readout.bias": "vector"}
    model = param.init_(Convolutional(64), Convolutional(16).to("meta"), "mup", seeded(0))
    assert model.body.weight.std().item() == pytest.approx(math.sqrt(2 / (64 * 9)), rel=0.05)
    assert model.readout.weight.std().item() == pytest.approx(math.sqrt(2 / 32) / 4, rel=0.1)


def test_initialization_is_idempotent_and_survives_state_dict_and_compile():
    model, base = net_and_base(64, 16)
    param.init_(model, base, "mup", seeded(0))
    once = [w.detach().clone() for w in model.parameters()]
    again = models.MLP(12, 64, 3, 3).double()
    again.load_state_dict(model.state_dict())
    param.init_(again, base, "mup", seeded(0))
    assert all(torch.equal(a, b) for a, b in zip(once, again.parameters()))
    compiled = torch.compile(again)
    assert [g["lr"] for g in param.param_groups(compiled, base, "mup", "sgd", 0.1)] == \
        [g["lr"] for g in param.param_groups(model, base, "mup", "sgd", 0.1)]


def test_tied_embeddings_are_refused_with_the_remedy():
    def tied(width):
        net = nn.ModuleDict({"embedding": nn.Embedding(50, width), "body": nn.Linear(width, width), "readout": nn.Linear(width, 50)})
        net["readout"].weight = net["embedding"].weight
        return net
    with pytest.raises(ValueError, match="untie"):
        param.infer_roles(tied(32), tied(16))


def test_nothing_scaling_is_said_loudly():
    model, base = net_and_base(32, 32)
    for call in (lambda: param.infer_roles(model, base), lambda: param.param_groups(model, base, "mup", "sgd", 0.1)):
        with pytest.warns(UserWarning, match="NOTHING SCALES"):
            call()
    assert "NOTHING SCALES" in param.plan(model, base, "mup", "sgd", 0.1)
    assert "NOTHING SCALES" not in param.plan(*net_and_base(64, 32), "mup", "sgd", 0.1)


@pytest.mark.parametrize("call, words", [
    (lambda m, b: param.exponents("muP", "sgd"), "choose from sp, ntp, mup"),
    (lambda m, b: param.exponents("mup", "lion"), "choose from sgd, adam"),
    (lambda m, b: param.predict("sp", "sgd", "hinge"), "choose from ce, mse, brier"),
    (lambda m, b: param.infer_roles(m, models.MLP(12, 16, 2, 3)), "same depth"),
    (lambda m, b: param.infer_roles(m, b, {"layer.0.weight": "input"}), "no parameter of the model"),
    (lambda m, b: param.infer_roles(m, b, {"layers.0.weight": "middle"}), "choose from input, hidden, output, vector"),
    (lambda m, b: param.infer_roles(nn.ParameterList([torch.zeros(4, 8)]), nn.ParameterList([torch.zeros(4, 4)])), "overrides"),
    (lambda m, b: param.param_groups(m, b, "sp", "sgd", 0.1, role_lr={"readout": 2.0}), "choose from input"),
    (lambda m, b: models.MLP(12, 0, 3, 3), "at least one"),
    (lambda m, b: models.MLP(12, 8, 3, 3, activation="gelu"), "choose from relu, identity"),
])
def test_library_errors_name_the_value_and_the_remedy(call, words):
    with pytest.raises(ValueError, match=words):
        call(*net_and_base(64, 16))


# ------------------------------------------------------------------------------------------------------------------
# The stack: against torch.optim, one run at a time

SMALL = {"width": 24, "base_width": 16, "hidden_layers": 2, "train_size": 400, "val_size": 100, "steps": 50, "batch_size": 16}


@pytest.fixture(scope="module")
def small_data():
    return {dtype: train.load_data("multi_index", dtype=dtype, train_size=400, val_size=100) for dtype in (torch.float32, torch.float64)}


def alone(run, splits):
    """The row's results for one run, by a plain loop over an nn.Module with torch.optim on param_groups."""
    config = train.configure(run)
    dtype = splits.x.dtype
    model = models.MLP(100, config["width"], config["hidden_layers"], 2, config["activation"], config["bias"]).to(dtype)
    base = models.MLP(100, config["base_width"], config["hidden_layers"], 2, config["activation"], config["bias"])
    param.init_(model, base, config["param"], seeded(config["seed"]))
    groups = param.param_groups(model, base, config["param"], config["optimizer"], config["lr"], config["alpha"], config["weight_decay"], config["eps"])
    optimizer = (torch.optim.SGD(groups, momentum=config["momentum"]) if config["optimizer"] == "sgd" else
                 torch.optim.AdamW(groups, betas=(config["beta1"], config["beta2"])))
    order, losses, hits = seeded(config["seed"] + 1), [], []
    loss_of = {"ce": F.cross_entropy, "mse": lambda f, y: F.mse_loss(f, F.one_hot(y, 2).to(f)),
               "brier": lambda f, y: F.mse_loss(f.softmax(-1), F.one_hot(y, 2).to(f))}[config["loss"]]
    for step in range(config["steps"]):
        index = torch.randint(len(splits.x), (config["batch_size"],), generator=order)
        for group in optimizer.param_groups:
            group["lr"] = train.schedule(step, config) * group["base_lr"]
        logits = model(splits.x[index])
        loss = loss_of(logits, splits.y[index])
        optimizer.zero_grad()
        loss.backward()
        if config["clip"]:
            nn.utils.clip_grad_norm_(model.parameters(), config["clip"])
        optimizer.step()
        losses.append(loss.item())
        hits.append((logits.argmax(1) == splits.y[index]).double().mean().item())
    logits = model(splits.x_val).detach()
    tenth = config["steps"] // 10
    return {"final_train_loss": np.mean(losses[-tenth:]), "train_accuracy": np.mean(hits[-tenth:]),
            "val_loss": loss_of(logits, splits.y_val).item(), "logit_rms": logits.square().mean(1).sqrt().mean().item(),
            "val_accuracy": (logits.argmax(1) == splits.y_val).double().mean().item()}


VARIANTS = [{}, {"loss": "mse"}, {"loss": "brier"}, {"momentum": 0.9, "lr": 0.02}, {"optimizer": "adam", "lr": 0.005},
            {"optimizer": "adam", "lr": 0.005, "weight_decay": 0.1, "eps": 1e-3}, {"weight_decay": 0.1}, {"momentum": 0.9, "weight_decay": 0.1, "lr": 0.02},
            {"warmup": 20}, {"warmup": 5, "decay": "cosine"}, {"clip": 0.5}, {"param": "mup", "alpha": 0.25}, {"bias": True},
            {"bias": True, "optimizer": "adam", "lr": 0.005, "param": "mup"}, {"activation": "identity", "lr": 0.02}]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: ",".join(f"{k}={x}" for k, x in v.items()) or "plain")
@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-10), ("float32", 2e-5)])
def test_a_stacked_run_is_the_run_alone_with_torch_optim(variant, dtype, tolerance, small_data):
    splits = small_data[getattr(torch, dtype)]
    lr = variant.get("lr", 0.1)
    runs = [dict(SMALL, dtype=dtype, **dict(variant, lr=lr * factor, seed=seed)) for factor in (1.0, 0.5) for seed in (0, 3)]
    for run, row in zip(runs, train.train(runs, splits)):
        for name, value in alone(run, splits).items():
            assert row[name] == pytest.approx(value, rel=tolerance), name


def results(row):
    return {key: value for key, value in row.items() if key != "seconds"}


@pytest.mark.parametrize("variant", [{}, {"optimizer": "adam", "lr": 0.01}], ids=["sgd", "adam"])
def test_a_row_does_not_depend_on_its_stack_to_the_last_bit(variant, small_data):
    wide = dict(SMALL, width=1024, steps=5)         # wide enough for a product of one replica to be shared between cores
    lrs = [variant.get("lr", 0.1) * factor for factor in (0.3, 0.1)]
    runs = [dict(wide, **dict(variant, lr=lr, seed=seed)) for lr in lrs for seed in (0, 1)]
    torch.set_num_threads(2)
    try:
        together = train.train(runs, small_data[torch.float32])
        by_one = [train.train([run], small_data[torch.float32])[0] for run in runs]
    finally:
        torch.set_num_threads(1)
    assert all(row["diverged_at"] is None for row in together)
    assert [results(row) for row in together] == [results(row) for row in by_one]


def test_divergence_is_a_row_and_does_not_touch_its_neighbours(small_data):
    lrs = [0.1, 1e4, 0.05, 1e30]
    rows = train.train([dict(SMALL, lr=lr, loss="mse") for lr in lrs], small_data[torch.float32])
    assert [row["diverged_at"] is None for row in rows] == [True, False, True, False]
    assert 0 < rows[3]["diverged_at"] <= rows[1]["diverged_at"] < 10
    assert all(rows[i][name] is None for i in (1, 3) for name in ("final_train_loss", "val_loss", "logit_rms"))
    calm = train.train([dict(SMALL, lr=lr, loss="mse") for lr in (0.1, 0.05)], small_data[torch.float32])
    assert [results(row) for row in calm] == [results(rows[0]), results(rows[2])]
    json.dumps(rows, allow_nan=False)


def test_diverged_at_is_the_first_step_whose_loss_is_not_finite(small_data):
    run = dict(SMALL, lr=30.0, loss="mse")
    row, = train.train([run], small_data[torch.float32])
    finite = train.train([dict(run, steps=row["diverged_at"])], small_data[torch.float32])[0]
    assert row["diverged_at"] > 1 and finite["diverged_at"] in (None, row["diverged_at"])      # no loss before it was
    assert train.train([dict(run, steps=row["diverged_at"] + 1)], small_data[torch.float32])[0]["diverged_at"] == row["diverged_at"]


def test_readout_only_training_leaves_the_features(small_data):
    rows = train.train([dict(SMALL, trainable="readout", lr=lr) for lr in (1e-9, 0.1)], small_data[torch.float32])
    assert rows[1]["final_train_loss"] < rows[0]["final_train_loss"] - 0.05
    everything, = train.train([dict(SMALL, lr=0.1)], small_data[torch.float32])
    assert abs(everything["val_loss"] - rows[1]["val_loss"]) > 1e-3


@pytest.mark.parametrize("loss, reference", [
    ("ce", F.cross_entropy), ("mse", lambda f, y: nn.MSELoss()(f, F.one_hot(y, 4).double())),
    ("brier", lambda f, y: nn.MSELoss()(f.softmax(-1), F.one_hot(y, 4).double()))])
def test_losses_are_torchs_means_and_their_derivatives_are_bounded_as_the_table_says(loss, reference):
    generator = seeded(0)
    logits, y = torch.randn(2, 8, 4, generator=generator, dtype=torch.float64), torch.randint(4, (2, 8), generator=generator)
    per_sample, chi = train.loss_and_derivative(loss, logits, y)
    for replica in range(2):
        assert per_sample[replica].mean().item() == pytest.approx(reference(logits[replica], y[replica]).item(), rel=1e-12)
    largest = [train.loss_and_derivative(loss, scale * logits, y)[1].abs().max().item() for scale in (1e3, 1e6)]
    assert (largest[1] < 2 * largest[0] + 1) == param.BOUNDED_DERIVATIVE[loss]


def test_chance_is_the_best_constant_predictor():
    y = torch.tensor([0, 0, 0, 1])
    p = torch.tensor([0.75, 0.25], dtype=torch.float64)
    assert train.chance_loss("ce", y, 2) == pytest.approx(train.ce(p.log().expand(4, 2), y).mean().item())
    assert train.chance_loss("mse", y, 2) == pytest.approx(train.mse(p.expand(4, 2), y).mean().item())
    assert train.chance_loss("mse", y, 2) < train.mse((p + 0.01).expand(4, 2), y).mean().item()


def test_every_width_and_lr_sees_the_same_batches():
    config = train.configure(SMALL)
    first, other = (train.data_order(seeds, 400, config, "cpu") for seeds in ([0, 1], [1]))
    assert torch.equal(first[1], other[0]) and not torch.equal(first[0], first[1])


# ------------------------------------------------------------------------------------------------------------------
# Data files

def write_mnist(folder, images=None, labels=None, zipped=False):
    generator = np.random.default_rng(0)
    for prefix, size in (("train", 30), ("t10k", 10)):
        pixels = generator.integers(0, 256, (size, 28, 28), dtype=np.uint8) if images is None else images
        classes = np.arange(size, dtype=np.uint8) % 10 if labels is None else labels
        for name, content in ((f"{prefix}-images-idx3-ubyte", struct.pack(">4i", 0x803, *pixels.shape) + pixels.tobytes()),
                              (f"{prefix}-labels-idx1-ubyte", struct.pack(">2i", 0x801, len(classes)) + classes.tobytes())):
            if zipped:
                (folder / f"{name}.gz").write_bytes(gzip.compress(content))
            else:
                (folder / name).write_bytes(content)


@pytest.mark.parametrize("zipped", [False, True])
def test_idx_files_are_read_plain_and_gzipped(tmp_path, zipped):
    write_mnist(tmp_path, zipped=zipped)
    splits = train.load_data("mnist", tmp_path, val_size=7)
    assert splits.x.shape == (30, 784) and splits.x_val.shape == (7, 784) and splits.classes == 10
    assert splits.y.tolist() == [i % 10 for i in range(30)]
    assert abs(splits.x.mean().item()) < 1e-5 and splits.x.std().item() == pytest.approx(1, abs=1e-4)


def test_cifar_records_are_read(tmp_path):
    records = np.zeros((4, 3073), dtype=np.uint8)
    records[:, 0], records[:, 1] = [3, 1, 4, 1], 255
    for name in train._CIFAR:
        (tmp_path / name).write_bytes(records.tobytes())
    splits = train.load_data("cifar10", tmp_path)
    assert splits.x.shape == (20, 3072) and splits.y.tolist() == [3, 1, 4, 1] * 5 and (splits.x[:, 0] > splits.x[:, 1]).all()


def truncate(path):
    path.write_bytes(path.read_bytes()[:-5])


@pytest.mark.parametrize("spoil, words", [
    (lambda d: truncate(d / "train-images-idx3-ubyte"), "where its header says"),
    (lambda d: (d / "train-images-idx3-ubyte").write_bytes(b""), "magic 0x803"),
    (lambda d: (d / "t10k-labels-idx1-ubyte").write_bytes(b"not an IDX file"), "magic 0x801"),
    (lambda d: write_mnist(d, labels=np.full(30, 11, dtype=np.uint8)), "classes 0 to 9|images but"),
    (lambda d: write_mnist(d, images=np.zeros((30, 5, 5), dtype=np.uint8)), "784 values|images but"),
])
def test_damaged_files_are_named(tmp_path, spoil, words):
    write_mnist(tmp_path)
    spoil(tmp_path)
    with pytest.raises(ValueError, match=words):
        train.load_data("mnist", tmp_path)


def test_truncated_gzip_is_named(tmp_path):
    write_mnist(tmp_path, zipped=True)
    truncate(tmp_path / "train-images-idx3-ubyte.gz")
    with pytest.raises(ValueError, match="train-images-idx3-ubyte.gz is damaged"):
        train.load_data("mnist", tmp_path)


def test_absent_files_say_which_files_go_where(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no network")
    monkeypatch.setattr(train.urllib.request, "urlopen", offline)
    with pytest.raises(ValueError, match="train-images-idx3-ubyte.*--data-dir"):
        train.load_data("mnist", tmp_path)


def test_a_download_with_a_wrong_checksum_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(train.urllib.request, "urlopen", lambda *args, **kwargs: contextlib.closing(io.BytesIO(b"something else")))
    with pytest.raises(ValueError, match="MD5"):
        train.load_data("mnist", tmp_path)
    assert not list(tmp_path.rglob("*.gz*"))


# ------------------------------------------------------------------------------------------------------------------
# The sweep: optimum, edge, intervals, search, resuming

SQRT2 = math.sqrt(2)


def simulated_cell(centre, edge, generator, seeds=3, curvature=0.03, noise=0.01, jitter=0.3, ks=range(-30, 10)):
    """A parabola in log LR with noisy losses, the optimum and the edge of every seed jittered; loss beyond chance above."""
    log_lr = np.array([k * math.log(SQRT2) for k in ks])
    own = generator.normal(0, jitter, (2, seeds, 1))
    losses = 0.3 + curvature * (log_lr - centre - own[0]) ** 2 + generator.normal(0, noise, (seeds, len(log_lr)))
    keep = log_lr > centre - 3
    losses = np.where(log_lr > edge + own[1], sweep.DIVERGED, losses)[:, keep]
    return {"lr": np.exp(log_lr[keep]), "losses": losses, "accuracies": np.zeros_like(losses), "chance": 9.0}


def test_the_95_percent_intervals_cover_the_truth_in_90_to_99_percent_of_simulated_sweeps():
    generator, widths, repetitions = np.random.default_rng(0), [64, 128, 256, 512], 500
    covered, missed_by_half = dict.fromkeys(("optimal", "max_stable"), 0), dict.fromkeys(("optimal", "max_stable"), 0)
    for _ in range(repetitions):
        truth, offset = generator.uniform(-1.2, -0.3), generator.uniform(-0.5, 0.5)
        centres = [offset + truth * math.log(width / 64) for width in widths]
        cells = [simulated_cell(centre, centre + 1.5, generator) for centre in centres]
        fits, _ = sweep.exponents_of(cells, widths, ("chance", 1.0), SQRT2, resamples=400)
        for name, (_, (low, high)) in fits.items():
            covered[name] += low <= truth <= high
            missed_by_half[name] += low <= truth - 0.5 <= high
    for name in covered:
        assert 0.90 <= covered[name] / repetitions <= 0.99, (name, covered[name])
        assert missed_by_half[name] / repetitions < 0.2         # and it is no interval that covers everything


def test_optimum_and_edge_of_a_noiseless_cell_are_exact():
    generator = np.random.default_rng(0)
    cell = simulated_cell(-2.0, -0.9, generator, noise=0, jitter=0)
    _, optimum, stable, unstable = (value[0] for value in sweep.locate(cell, np.full((1, 3), 1 / 3), ("chance", 1.0)))
    assert optimum == pytest.approx(-2.0, abs=1e-9)
    assert stable <= -0.9 < unstable and unstable - stable == pytest.approx(math.log(SQRT2))


def test_one_diverged_seed_makes_an_lr_unstable():
    cell = simulated_cell(-2.0, -0.9, np.random.default_rng(0), noise=0, jitter=0)
    cell["losses"][1, np.log(cell["lr"]) > -1.5] = sweep.DIVERGED
    _, _, stable, unstable = (value[0] for value in sweep.locate(cell, np.full((1, 3), 1 / 3), ("chance", 1.0)))
    assert stable < -1.5 < unstable


@pytest.mark.parametrize("name, expected", [("chance=0.05", 0.41), ("best+1=0.2", 0.5), ("1.2x", 0.36), ("accuracy=0.5", -1.0)])
def test_stability_criteria(name, expected):
    lr = np.exp(np.arange(-6.0, 0.0, 0.5))
    losses = 0.3 + 0.05 * (np.log(lr) + 4) ** 2
    cell = {"lr": lr, "losses": losses[None], "accuracies": np.where(lr > math.exp(-1.2), 0.4, 0.9)[None], "chance": 8.2}
    _, stable = sweep.stability(cell, np.ones((1, 1)), sweep.criterion(name))
    by_hand = cell["accuracies"][0] > 0.5 if name.startswith("accuracy") else losses < expected
    assert (stable[0] == by_hand).all() and 0 < stable.sum() < len(lr)


def search(kind, cell_at, low, high, hint=None):
    """(runs, k of the optimum, k of the edge) of a search on a known landscape {k: (loss, stable)}."""
    known = {}
    while points := sweep.wanted(known, low, high, kind, sweep.EXTENSIONS, hint):
        known.update((k, cell_at(k)) for k in points)
    best = min(known, key=lambda k: known[k][0])
    return len(known), best, max(k for k in known if known[k][1] and all(known[j][1] for j in known if best <= j <= k))


def test_coarse_to_fine_finds_the_full_grids_optimum_and_edge_with_at_most_half_its_runs():
    generator, runs = np.random.default_rng(0), {"grid": 0, "coarse-to-fine": 0}
    for _ in range(200):
        centre, gap, slope, hint = generator.uniform(-8, 3), generator.uniform(0.5, 4), generator.uniform(0.8, 2.2), None
        for width in range(4):
            optimum, edge = centre - slope * width, centre - slope * width + gap

            def cell_at(k):
                return (0.3 + 0.01 * (k - optimum) ** 2, True) if k < edge else (sweep.DIVERGED, False)
            full, coarse = search("grid", cell_at, -16, 6), search("coarse-to-fine", cell_at, -16, 6, hint)
            assert abs(full[1] - coarse[1]) <= 1 and abs(full[2] - coarse[2]) <= 1
            runs["grid"] += full[0]
            runs["coarse-to-fine"] += coarse[0]
            hint = coarse[1:]
    assert runs["coarse-to-fine"] <= runs["grid"] / 2


def test_a_grid_grows_where_the_optimum_lies_outside():
    for kind in ("grid", "coarse-to-fine"):
        for optimum in (-30, 14):
            runs, best, edge = search(kind, lambda k: (abs(k - optimum) + 0.1, k < optimum + 3), -16, 6)
            assert best == optimum and edge == optimum + 2
        assert search(kind, lambda k: (-k, True), -4, 4)[0] < 100       # no bound at all: it ends
        assert not sweep.wanted({k: (sweep.DIVERGED, False) for k in range(-100, 100)}, -16, 6, kind, sweep.EXTENSIONS)


TINY = ["--widths", "8", "16", "--base-width", "8", "--hidden-layers", "2", "--steps", "20", "--train-size", "300", "--val-size", "50",
        "--batch-size", "8", "--seeds", "2", "--lr-range", "0.05", "4", "--loss", "ce", "mse"]


MAIN = {"sweep.py": sweep.main, "train.py": train.main, "plots.py": plots.main}


def run_script(script, *flags):
    """The script's main in this process, as its command line would call it: returncode, stdout, stderr."""
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = [script, *map(str, flags)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            train.command_line(MAIN[script])
        code = 0
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv = argv
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def sorted_rows(out):
    return sorted((results(row) for row in sweep.read_rows(out).values()), key=lambda row: row["id"])


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    out = tmp_path_factory.mktemp("sweep")
    return out, run_script("sweep.py", *TINY, "--out", out)


def test_a_sweep_prints_predictions_beside_measurements_and_writes_its_files(swept):
    out, done = swept
    assert done.returncode == 0, done.stderr
    for words in ("predicted", "max-stable", "optimal", "-0.50", "-1.00"):
        assert words in done.stdout
    summary = json.loads((out / "summary.json").read_text())
    assert [row["predicted_max_stable_exponent"] for row in summary["rows"]] == [-0.5, -1.0]
    assert summary["runs"] == len((out / "runs.jsonl").read_text().splitlines()) and "sweep.py" in summary["command"]
    for name in plots.FIGURES:
        assert (out / "figures" / f"{name}.png").stat().st_size > 10_000 and (out / "figures" / f"{name}.pdf").exists()


def test_a_finished_sweep_runs_nothing_again_and_a_cut_one_ends_with_the_same_rows(swept, tmp_path):
    out, _ = swept
    content = (out / "runs.jsonl").read_bytes()
    (tmp_path / "config.json").write_bytes((out / "config.json").read_bytes())
    (tmp_path / "runs.jsonl").write_bytes(content[:len(content) * 2 // 5])
    again = run_script("sweep.py", *TINY, "--out", tmp_path, "--no-plots")
    assert again.returncode == 0 and "half-written" in again.stderr
    assert sorted_rows(tmp_path) == sorted_rows(out)
    before = (tmp_path / "runs.jsonl").read_bytes()
    run_script("sweep.py", *TINY, "--out", tmp_path, "--no-plots")
    assert (tmp_path / "runs.jsonl").read_bytes() == before


def test_rows_are_those_of_train_py(swept):
    out, _ = swept
    row = max(sweep.read_rows(out).values(), key=lambda row: (row["width"], -row["lr"]))
    flags = [part for name in train.SETTINGS if name != "bias" for part in (f"--{name.replace('_', '-')}", row[name])]
    alone_row = json.loads(run_script("train.py", *flags).stdout)
    assert results(alone_row) == results(row)


@pytest.mark.parametrize("script, flags, words", [
    ("sweep.py", ["--preset", "headlin"], "choose from headline"),
    ("sweep.py", ["--widths", "0"], "width is 0"),
    ("sweep.py", ["--widths", "64.5"], "invalid int"),
    ("sweep.py", ["--lrs", "-0.1"], "lr is -0.1"),
    ("sweep.py", ["--lrs", "nan"], "lr is nan"),
    ("sweep.py", ["--lr-range", "1", "0.1"], "lower one first"),
    ("sweep.py", ["--lr-step", "1"], "lr-step is 1.0"),
    ("sweep.py", ["--seeds", "0"], "seeds is 0"),
    ("sweep.py", ["--loss", "hinge"], "loss is 'hinge'; it must be one of ce, mse, brier"),
    ("sweep.py", ["--param", "muP"], "one of sp, ntp, mup"),
    ("sweep.py", ["--search", "random"], "coarse-to-fine"),
    ("sweep.py", ["--stable-if", "accuracy=high"], "must be a number"),
    ("sweep.py", ["--stable-if", "finite"], "choose from chance"),
    ("sweep.py", ["--stack", "-3"], "stack is '-3'"),
    ("sweep.py", ["--device", "tpu"], "choose auto, cpu, cuda"),
    ("sweep.py", ["--data", "imagenet"], "one of multi_index, mnist"),
    ("sweep.py", ["--lr", "0.1"], "--lr"),
    ("sweep.py", ["--out", "/dev/null/x"], "/dev/null"),
    ("train.py", ["--width", "-4"], "width is -4"),
    ("train.py", ["--steps", "0"], "steps is 0"),
    ("train.py", ["--warmup", "300"], "longer than the run"),
    ("train.py", ["--batch-size", "30000"], "batch_size is 30000"),
    ("train.py", ["--momentum", "1"], "momentum is 1.0"),
    ("train.py", ["--device", "cuda:99"], "not there"),
    ("train.py", ["--seed", "x"], "invalid int"),
    ("plots.py", ["/nonexistent"], "run python sweep.py"),
])
def test_bad_input_ends_with_one_line_and_exit_code_2(script, flags, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run_script(script, *flags)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and words in done.stderr, done.stderr
    assert not done.stdout and not list(tmp_path.rglob("*.*"))


def test_scripts_end_the_same_way_from_a_shell(tmp_path):
    for script, flag in (("sweep.py", "--lr-step"), ("train.py", "--lr"), ("plots.py", "--figure")):
        done = subprocess.run([sys.executable, HERE / script, flag, "nan"], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and not done.stdout, done.stderr


def test_a_contradicting_or_damaged_result_folder_is_refused(swept, tmp_path):
    out, _ = swept
    done = run_script("sweep.py", *TINY, "--steps", "21", "--out", out)
    assert done.returncode == 2 and "steps = 20, not 21" in done.stderr
    (tmp_path / "runs.jsonl").write_text("{}\n")
    done = run_script("sweep.py", *TINY, "--out", tmp_path)
    assert done.returncode == 2 and "runs.jsonl:1" in done.stderr
