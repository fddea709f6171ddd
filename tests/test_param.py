"""param.py: the table against the base width, abc symmetry, muP written out and the package mup; roles,
initial weights, groups and plan of models that nobody here wrote. The regimes are in test_regimes.py.
"""
import ast
import copy
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
import warnings
from datetime import timedelta
from pathlib import Path
from statistics import fmean

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import estimate
import metrics
import models
import param

HERE = Path(__file__).parent.parent
OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
LR = {"sgd": 0.05, "adam": 0.005}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def take_steps(optimizer, loss, steps):
    """Losses before each of `steps` steps."""
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        losses.append(loss())
        losses[-1].backward()
        optimizer.step()
    return losses


def batch(d_in=12, classes=3, size=32, seed=5):
    generator = seeded(seed)
    x = torch.randn(size, d_in, generator=generator, dtype=torch.float64)
    return x, torch.randint(classes, (size,), generator=generator)


def net_and_base(width, base_width, bias=False):
    return [models.MLP(12, n, 3, 3, bias=bias).double() for n in (width, base_width)]


def all_differ(logits):
    names = list(logits)
    return all((logits[a] - logits[b]).abs().max() > 1e-4 for i, a in enumerate(names) for b in names[:i])


# ---- parameterizations: against the base width, abc symmetry, and muP written out ----

def plain_training(multipliers, weights, lrs, steps, optimizer, eps):
    """Logits of a ReLU net with multipliers after full-batch steps; one LR and ε per tensor."""
    x, y = batch()
    weights = [w.clone().requires_grad_() for w in weights]

    def forward():
        h = x
        for multiplier, w in zip(multipliers[:-1], weights[:-1]):
            h = torch.relu(multiplier * h @ w.T)
        return multipliers[-1] * h @ weights[-1].T

    groups = [{"params": [w], "lr": lr, "eps": e} for w, lr, e in zip(weights, lrs, eps)]
    take_steps(OPTIMIZERS[optimizer](groups), lambda: F.cross_entropy(forward(), y), steps)
    return forward().detach()


ROLES_OF_MLP = {"layers.0.weight": "input", "layers.1.weight": "hidden",
                "layers.2.weight": "hidden", "layers.3.weight": "output"}


def trained_logits(parameterization, optimizer, width, steps=5):
    model, base = net_and_base(width, 32)
    param.init_(model, base, parameterization, seeded(0), overrides=ROLES_OF_MLP)
    x, y = batch()
    lr = LR[optimizer]
    groups = param.param_groups(model, base, parameterization, optimizer, lr, overrides=ROLES_OF_MLP)
    take_steps(OPTIMIZERS[optimizer](groups), lambda: F.cross_entropy(model(x), y), steps)
    return model(x).detach()


@pytest.mark.parametrize("optimizer", param.OPTIMIZERS)
def test_all_parameterizations_coincide_at_the_base_width_and_nowhere_else(optimizer):
    for steps in (0, 1, 5):
        logits = [trained_logits(name, optimizer, 32, steps) for name in param.PARAMETERIZATIONS]
        assert all(torch.equal(other, logits[0]) for other in logits)
    assert all_differ({name: trained_logits(name, optimizer, 64) for name in param.PARAMETERIZATIONS})


@pytest.mark.parametrize("optimizer, power", [("sgd", 2), ("adam", 1)])
@pytest.mark.parametrize("layer", [0, 1, 3])
def test_abc_symmetry_leaves_training_unchanged(optimizer, power, layer):
    model, base = net_and_base(64, 16)
    param.init_(model, base, "mup", seeded(0))
    shift, one = 4.0 ** 0.7, [1.0] * 4              # m^θ

    def trained(lr_power, eps_power, shift=shift):  # a + θ, b - θ, c - power θ, ε along with the gradient
        def at_layer(values, factor):
            return [v * factor if i == layer else v for i, v in enumerate(values)]
        weights = at_layer([w.detach() for w in model.parameters()], shift)
        lrs = at_layer([LR[optimizer]] * 4, shift ** lr_power)
        eps = at_layer([1e-3] * 4, shift ** -eps_power)         # large, so that forgetting it would show
        return plain_training(at_layer(one, 1 / shift), weights, lrs, 20, optimizer, eps)

    plain = trained(0, 0, shift=1.0)
    torch.testing.assert_close(trained(power, 1), plain, rtol=1e-10, atol=1e-10)
    assert (trained(power - 1, 1) - plain).abs().max() > 1e-4
    if optimizer == "adam":
        assert (trained(power, 0) - plain).abs().max() > 1e-6


@pytest.mark.parametrize("optimizer", param.OPTIMIZERS)
@pytest.mark.parametrize("width", [8, 64])
def test_mup_is_tensor_programs_v_written_out(optimizer, width):
    """Table 8 of arXiv 2203.03466: readout multiplied by 1/m and of constant variance, LRs as below."""
    m, lr = width / 16, LR[optimizer]
    model, base = net_and_base(width, 16)
    param.init_(model, base, "mup", seeded(0))
    weights = [w.detach().clone() for w in model.parameters()]
    x, y = batch()
    ours = OPTIMIZERS[optimizer](param.param_groups(model, base, "mup", optimizer, lr, eps=1e-30))
    take_steps(ours, lambda: F.cross_entropy(model(x), y), 20)
    lrs = [lr * m, lr, lr, lr * m] if optimizer == "sgd" else [lr, lr / m, lr / m, lr]
    weights[-1] *= m
    theirs = plain_training([1.0, 1.0, 1.0, 1 / m], weights, lrs, 20, optimizer, [1e-30] * 4)
    torch.testing.assert_close(model(x).detach(), theirs, rtol=1e-9, atol=1e-9)
    draws = weights[-1].numel()         # four standard deviations of so many draws' standard deviation
    assert weights[-1].std().item() == pytest.approx(math.sqrt(2 / 16), rel=4 / math.sqrt(2 * draws))


@pytest.mark.parametrize("optimizer", param.OPTIMIZERS)
def test_mup_equals_the_package_mup(optimizer):
    mup = pytest.importorskip("mup")

    class Net(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.body = nn.ModuleList(nn.Linear(d_in, width) for d_in in (12, width, width))
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
    lr = LR[optimizer]
    ours = OPTIMIZERS[optimizer](param.param_groups(model, base, "mup", optimizer, lr, eps=1e-30))
    if optimizer == "sgd":
        reference = mup.MuSGD(theirs.parameters(), lr=lr)
    else:
        reference = mup.MuAdam(theirs.parameters(), lr=lr, eps=1e-30)
    take_steps(ours, lambda: F.cross_entropy(model(x), y), 20)
    take_steps(reference, lambda: F.cross_entropy(theirs(x), y), 20)
    torch.testing.assert_close(model(x), theirs(x), rtol=1e-9, atol=1e-9)


def test_lr_times_weight_decay_does_not_change_with_width():
    model, base = net_and_base(64, 16, bias=True)
    for name in param.PARAMETERIZATIONS:
        for group in param.param_groups(model, base, name, "adam", lr=0.3, alpha=0.7, weight_decay=0.1):
            assert math.isclose(group["lr"] * group["weight_decay"], 0.03)
            assert group["base_lr"] == group["lr"]


def test_role_lr_multiplies_at_every_width_and_leaves_the_decay_of_others():
    model, base = net_and_base(64, 16)
    plain, tuned = (param.param_groups(model, base, "mup", "sgd", 0.1, weight_decay=0.1, role_lr=role_lr)
                    for role_lr in (None, {"output": 3.0, "input": 0.0}))
    factors = [b["lr"] / a["lr"] for a, b in zip(plain, tuned)]
    assert factors == pytest.approx([0.0, 1.0, 3.0])
    assert [g["weight_decay"] for g in plain] == [g["weight_decay"] for g in tuned]


def test_widths_below_the_base_width_continue_the_same_power_law():
    base, lrs = models.MLP(12, 32, 3, 3), []
    for width in (8, 16, 64):
        groups = param.param_groups(models.MLP(12, width, 3, 3), base, "mup", "adam", lr=1.0, alpha=0.5)
        lrs.append(groups[1]["lr"])
    assert lrs == pytest.approx([4 ** 1.5, 2 ** 1.5, 2 ** -1.5])


# ---- what the predictions need of a loss, and say beyond the paper ----

TORCH_LOSSES = {
    "ce": F.cross_entropy,
    "mse": lambda z, y: F.mse_loss(z, F.one_hot(y, 3).to(z)),
    "brier": lambda z, y: F.mse_loss(z.softmax(-1), F.one_hot(y, 3).to(z)),
    "huber": lambda z, y: F.huber_loss(z, F.one_hot(y, 3).to(z)),
    "hinge": F.multi_margin_loss,
    "squared_hinge": lambda z, y: F.multi_margin_loss(z, y, p=2),
}


@pytest.mark.parametrize("name", param.LOSS_PROPERTIES)
def test_a_losss_derivative_grows_or_vanishes_on_wrong_logits_as_the_table_says(name):
    sizes = []
    for scale in (1e3, 1e4):
        logits = torch.tensor([[1.0, 0.2, -1.0]], dtype=torch.float64).mul(scale).requires_grad_()
        chi, = torch.autograd.grad(TORCH_LOSSES[name](logits, torch.tensor([2])), logits)
        sizes.append(chi.abs().max().item())
    assert (sizes[1] < 2) == param.LOSS_PROPERTIES[name].bounded
    assert (sizes[1] < 1e-6) == param.LOSS_PROPERTIES[name].vanishes
    if not param.LOSS_PROPERTIES[name].bounded:
        assert sizes[1] / sizes[0] == pytest.approx(10, rel=0.01)


@pytest.mark.parametrize("name, stable, trainable", [
    ("ce", 0.5, 0.5), ("huber", 0.5, 0.5), ("hinge", 0.5, 0.5), ("brier", 0.5, 1.0),
    ("mse", 1.0, 1.0), ("squared_hinge", 1.0, 1.0)])
def test_brier_alone_stays_stable_where_it_cannot_train(name, stable, trainable):
    assert param.max_stable_alpha("sp", "sgd", name) == stable
    assert param.max_trainable_alpha("sp", "sgd", name) == trainable


def test_under_brier_only_diverging_logits_move_what_trains():
    assert param.max_stable_alpha("mup", "sgd", "brier") == 0.0
    assert param.max_trainable_alpha("mup", "sgd", "brier") == 0.0
    assert param.max_trainable_alpha("sp", "sgd", "brier", trainable=("output",)) == 1.0
    assert param.max_trainable_alpha("sp", "sgd", "ce", trainable=("output",)) == -math.inf
    assert param.max_trainable_alpha("sp_full_align", "sgd", "brier") == 0.5
    assert param.max_trainable_alpha("sp", "adam", "brier") == 1.5


@pytest.mark.parametrize("optimizer, roles, ce, mse", [
    ("sgd", ("input", "output", "vector"), 0.0, 1.0), ("sgd", ("output", "vector"), -math.inf, 1.0),
    ("sgd", ("input",), -0.5, 0.0),
    ("adam", ("input", "output", "vector"), 0.0, 0.0), ("adam", ("output", "vector"), -math.inf, -math.inf),
    ("adam", ("input",), 0.0, 0.0)])
def test_frozen_roles_move_the_edge_of_sp(optimizer, roles, ce, mse):
    for loss, alpha in (("ce", ce), ("mse", mse)):
        assert param.max_stable_alpha("sp", optimizer, loss, trainable=roles) == alpha
    assert param.max_stable_alpha("sp", optimizer, "ce", trainable=param.ROLES) == param.max_stable_alpha(
        "sp", optimizer, "ce")
    frozen = param.predict("sp", optimizer, "ce", trainable=roles)
    exponents = dict(zip(("input", "hidden", "hidden", "output"), frozen.effective))
    assert {role for role, power in exponents.items() if power == -math.inf} == exponents.keys() - set(roles)


def test_roles_that_train_may_come_in_any_collection():
    for roles in (["input"], {"input"}, {"input": 1.0}, {"input": 1.0}.keys()):
        assert param.max_stable_alpha("sp", "sgd", "mse", trainable=roles) == 0.0
    assert param.predict("sp", "sgd", "mse", alpha=-0.5, trainable=["input"]).regime == "catastrophic"


def test_diverging_logits_feed_back_under_sgd_only():
    assert param.max_stable_alpha("sp", "adam", "mse") == 1.0 == param.max_stable_alpha("sp", "adam", "ce")
    assert param.predict("sp", "adam", "mse", alpha=1.0).regime == "controlled divergence"
    assert param.predict("sp", "adam", "mse", alpha=1.0).logits == 0.5
    assert param.predict("sp", "adam", "mse", alpha=0.75).regime == "catastrophic"


def test_only_later_steps_of_a_catastrophic_regime_are_lower_bounds():
    for step, alpha, loss, expected in [(2, 0.0, "mse", True), (1, 0.0, "mse", False), (2, 0.5, "mse", True),
                                        (2, 0.5, "ce", False), (2, 1.0, "mse", False)]:
        assert param.predict("sp", "sgd", loss, alpha, step=step).lower_bound is expected


# ---- roles, initial weights and plan ----

class Convolutional(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3)
        self.body = nn.Conv2d(width, 2 * width, 3)
        self.norm = nn.BatchNorm2d(2 * width)
        self.readout = nn.Linear(2 * width, 10)

    def forward(self, x):
        x = torch.relu(self.norm(self.body(torch.relu(self.stem(x)))))
        return self.readout(x.mean((2, 3)))


def test_roles_are_read_from_shapes():
    roles = param.infer_roles(Convolutional(32), Convolutional(16).to("meta"))
    assert roles == {
        "stem.weight": "input", "stem.bias": "vector", "body.weight": "hidden", "body.bias": "vector",
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
    lrs = [[group["lr"] for group in param.param_groups(net, base, "mup", "sgd", 0.1)]
           for net in (model, torch.compile(again))]
    assert lrs[0] == lrs[1]


def test_a_readout_of_standard_deviation_zero_is_zero_and_nothing_else_is():
    model, base = net_and_base(64, 16)
    param.init_(model, base, "mup", seeded(0), std={"output": 0.0})
    assert [bool(w.any()) for w in model.parameters()] == [True, True, True, False]


def test_tied_embeddings_are_refused_with_the_remedy():
    def tied(width):
        net = nn.ModuleDict({"embedding": nn.Embedding(50, width), "body": nn.Linear(width, width),
                             "readout": nn.Linear(width, 50)})
        net["readout"].weight = net["embedding"].weight
        return net
    with pytest.raises(ValueError, match="untie"):
        param.infer_roles(tied(32), tied(16))


def test_nothing_scaling_is_said_loudly():
    model, base = net_and_base(32, 32)
    for call in (lambda: param.infer_roles(model, base), lambda: param.init_(model, base, "mup"),
                 lambda: param.param_groups(model, base, "mup", "sgd", 0.1)):
        with pytest.warns(UserWarning, match="NOTHING SCALES") as caught:
            call()
        assert caught[0].filename == __file__           # points at the caller
    heading, loud, columns, *_ = param.plan(model, base, "mup", "sgd", 0.1).splitlines()
    assert heading == "mup, sgd, lr 0.1, alpha 0"
    assert loud.startswith("NOTHING SCALES") and columns.startswith("tensor ")
    assert "NOTHING SCALES" not in param.plan(*net_and_base(64, 32), "mup", "sgd", 0.1)


def test_plan_is_the_table_of_what_init_and_groups_do():
    model, base = (models.MLP(12, width, 2, 3, bias=True) for width in (64, 16))
    plan = param.plan(model, base, "mup", "adam", 0.01, weight_decay=0.1, eps=1e-8, std={"output": 0.5})
    assert plan == """\
mup, adam, lr 0.01, alpha 0
tensor           shape  role    m  init std  lr      weight decay  eps
layers.0.weight  64x12  input   4  0.4082    0.01    0.1           2.5e-09
layers.0.bias    64     vector  4  as built  0.01    0.1           2.5e-09
layers.1.weight  64x64  hidden  4  0.1768    0.0025  0.4           2.5e-09
layers.1.bias    64     vector  4  as built  0.01    0.1           2.5e-09
layers.2.weight  3x64   output  4  0.125     0.0025  0.4           1e-08
layers.2.bias    3      vector  1  as built  0.01    0.1           1e-08"""
    last = param.plan(model, base, "sp", "sgd", 0.01, alpha=0.5).splitlines()[-1]
    assert last.split() == ["layers.2.bias", "3", "vector", "1", "as", "built", "0.005", "0", "-"]


@pytest.mark.parametrize("call, words", [
    (lambda m, b: param.exponents("muP", "sgd"), "choose from sp, ntp, mup"),
    (lambda m, b: param.exponents("mup", "lion"), "choose from sgd, adam"),
    (lambda m, b: param.predict("sp", "sgd", "nll"),
     "unknown loss 'nll'; choose from ce, mse, brier, huber, hinge, squared_hinge"),
    (lambda m, b: param.max_trainable_alpha("sp", "sgd", "nll"), "choose from ce, mse, brier"),
    (lambda m, b: param.predict("sp", "sgd", "ce", hidden_layers=0), "at least one hidden activation"),
    (lambda m, b: param.predict("sp", "sgd", "ce", trainable=("head",)),
     "unknown role in trainable: 'head'; choose from input, hidden, output, vector"),
    (lambda m, b: param.infer_roles(m, models.MLP(12, 16, 2, 3)), "same depth"),
    (lambda m, b: param.infer_roles(m, b, {"layer.0.weight": "input"}), "no parameter of the model"),
    (lambda m, b: param.infer_roles(m, b, {"layers.0.weight": "middle"}),
     "choose from input, hidden, output, vector"),
    (lambda m, b: param.infer_roles(*(nn.ParameterList([torch.zeros(4, n)]) for n in (8, 4))), "overrides"),
    (lambda m, b: param.init_(m, b, "sp", std={"readout": 1.0}), "name or role in std: 'readout'"),
    (lambda m, b: param.param_groups(m, b, "sp", "sgd", 0.1, role_lr={"readout": 2.0}),
     "role_lr names 'readout', .* roles: input, hidden, output, vector"),
    (lambda m, b: param.param_groups(nn.LSTM(4, 64), nn.LSTM(2, 16), "sp", "sgd", 0.1, alpha=0.5),
     r"one width ratio, but tensors scale by \[2.0, 4.0\]"),
])
def test_errors_name_the_value_and_the_remedy(call, words):
    with pytest.raises(ValueError, match=words):
        call(*net_and_base(64, 16))


# ---- GPT ----

def gpt_and_base(width=64, base_width=32):
    """Two layers, context 16, heads of 16; norm gains away from one, lest a gain left out pass."""
    model, base = (models.GPT(23, n, 2, 16, head_dim=16).double() for n in (width, base_width))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")     # at the base width
        param.init_(model, base, "sp", seeded(0))
    for gains in (p for p in model.parameters() if p.ndim == 1):
        gains.data += 0.3 * torch.randn(gains.shape, generator=seeded(1), dtype=torch.float64)
    return model, base


def some_tokens(*shape):
    return torch.randint(23, shape, generator=seeded(2))


def cross_entropy_of_tokens(model, tokens):
    return F.cross_entropy(model(tokens[:, :-1]).transpose(1, 2), tokens[:, 1:])


ROLES_OF_BLOCK = {
    "norm_attention": "vector", "attention.qkv": "hidden", "attention.norm_q": "vector",
    "attention.norm_k": "vector", "attention.proj": "hidden", "norm_mlp": "vector", "up": "hidden",
    "down": "hidden"}
ROLES_OF_GPT = {"embedding.weight": "input", "readout.weight": "output", "norm.weight": "vector"}
ROLES_OF_GPT |= {f"blocks.{i}.{name}.weight": role for i in range(2) for name, role in ROLES_OF_BLOCK.items()}


def test_roles_of_gpt_and_the_gains_that_heads_share_follow_alpha_alone():
    model, base = gpt_and_base(64, 16)
    assert param.infer_roles(model, base.to("meta")) == ROLES_OF_GPT
    for optimizer, c in [("sgd", -1), ("adam", 0)]:
        groups = param.param_groups(model, base, "mup", optimizer, 1.0, alpha=0.5)
        lr = {name: group["lr"] for group in groups for name in group["names"]}
        assert lr["norm.weight"] == pytest.approx(4 ** -(c + 0.5))
        assert lr["blocks.0.attention.norm_q.weight"] == pytest.approx(4 ** -0.5)       # fixed size: no c


@pytest.mark.parametrize("optimizer", param.OPTIMIZERS)
def test_all_parameterizations_of_gpt_coincide_at_the_base_width_and_nowhere_else(optimizer):
    def trained_gpt(name, width):
        model, base = gpt_and_base(width, 32)
        param.init_(model, base, name, seeded(0), overrides=ROLES_OF_GPT)
        groups = param.param_groups(model, base, name, optimizer, 0.01, overrides=ROLES_OF_GPT)
        tokens = some_tokens(4, 17)
        steps_of = {"sgd": torch.optim.SGD, "adam": torch.optim.AdamW}[optimizer](groups)
        take_steps(steps_of, lambda: cross_entropy_of_tokens(model, tokens), 3)
        return model(tokens[:, :-1]).detach()

    at_base = [trained_gpt(name, 32) for name in param.PARAMETERIZATIONS]
    assert all(torch.equal(logits, at_base[0]) for logits in at_base)
    assert all_differ({name: trained_gpt(name, 64) for name in param.PARAMETERIZATIONS})


@pytest.mark.parametrize("parameterization, optimizer",
                         [("sp", "sgd"), ("sp", "adam"), ("mup", "sgd"), ("mup", "adam")])
def test_first_step_exponents_of_gpt_are_the_predicted_ones(parameterization, optimizer):
    """Of all matrices. The readout is small, so that initial logits of order one bend nothing. A width n
    is averaged over 1024 / n seeds: over 24 seeds the errors are then at most 0.04 ± 0.05, a bound of 0.25
    is four standard deviations away, and the neighbouring exponent, 0.5 off, four more."""
    widths, logs = (64, 128, 256, 512), {}
    lr, std = {"sgd": 0.1, "adam": 1e-5}[optimizer], {"input": 1.0, "output": 0.05 / 8}
    roles, tokens = ROLES_OF_GPT, some_tokens(8, 17) % 8                # a third of the tokens occur
    for width in widths:
        for seed in range(1024 // width):
            model, base = models.GPT(23, width, 2, 16), models.GPT(23, 64, 2, 16)
            param.init_(model, base, parameterization, seeded(seed), gain=1.0, std=std, overrides=roles)
            groups = param.param_groups(model, base, parameterization, optimizer, lr, eps=1e-20,
                                        overrides=roles)
            reference = copy.deepcopy(model)
            cross_entropy_of_tokens(model, tokens).backward()
            OPTIMIZERS[optimizer](groups).step()
            for name, row in metrics.refined_coordinate_check(model, reference, tokens[:, :-1]).items():
                logs.setdefault(name, {}).setdefault(width, []).append(math.log(row["effective"]))
    first, hidden, *_, last = param.predict(parameterization, optimizer, "ce").effective
    predicted = {"input": first, "hidden": hidden, "output": last}
    matrices = [name for name in logs if roles[name + ".weight"] != "vector"]
    assert len(matrices) == 10
    for name in matrices:
        means = [math.exp(fmean(logs[name][width])) for width in widths]
        slope = estimate.fit_exponent(widths, means)[0]
        assert abs(slope - predicted[roles[name + ".weight"]]) < 0.25, name


# ---- models that nobody here wrote ----

def gpt2(width, tied=False):
    """transformers' GPT-2: Conv1D weights are (fan_in, fan_out), q, k, v are one tensor; heads of 8."""
    transformers = pytest.importorskip("transformers")
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=96, n_positions=16, n_embd=width, n_layer=1, n_head=width // 8,
        bos_token_id=0, eos_token_id=0, tie_word_embeddings=tied, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))


# role, init std at width 64 of base 32 under mup, LR under mup with Adam in units of the base LR
GPT2_UNDER_MUP = {
    "wte":         ("input", math.sqrt(2), 1.0),
    "wpe":         ("input", math.sqrt(2), 1.0),
    "c_attn":      ("hidden", math.sqrt(2 / 64), 0.5),
    "attn.c_proj": ("hidden", math.sqrt(2 / 64), 0.5),
    "c_fc":        ("hidden", math.sqrt(2 / 64), 0.5),
    "mlp.c_proj":  ("hidden", math.sqrt(2 / 256), 0.5),
    "lm_head":     ("output", math.sqrt(2 / 32) / 2, 0.5)}


def test_gpt2_of_transformers_gets_the_tables_roles_stds_and_lrs():
    model, base = gpt2(64), gpt2(32).to("meta")
    param.init_(model, base, "mup", seeded(0))
    roles, plan = param.infer_roles(model, base), param.plan(model, base, "mup", "adam", 0.01)
    groups, matched = param.param_groups(model, base, "mup", "adam", 0.01), []
    lrs = {name: group["lr"] for group in groups for name in group["names"]}
    for name, p in model.named_parameters():
        key = next((key for key in GPT2_UNDER_MUP if name.endswith(key + ".weight")), None)
        role, std, lr = GPT2_UNDER_MUP.get(key, ("vector", None, 1.0))
        assert (roles[name], lrs[name]) == (role, pytest.approx(0.01 * lr)), name
        if std is None:
            assert p.ndim == 1 and torch.equal(p, torch.full_like(p, float(name.endswith("weight")))), name
            continue
        matched.append(key)
        assert p.std().item() == pytest.approx(std, rel=0.08), name                 # 1024 draws at least
        row = rf"^{re.escape(name)} +\S+ +{role} +2 +{std:.4g} +{0.01 * lr:g} "
        assert re.search(row, plan, re.MULTILINE), name
    assert sorted(matched) == sorted(GPT2_UNDER_MUP)


def test_gpt2_of_transformers_trains_on_those_groups_as_plain_compiled_or_reloaded():
    def numbers(net):
        groups = param.param_groups(net, base, "mup", "adam", 0.01)
        return [{**group, "params": None, "names": None} for group in groups]

    model, reloaded, compiled, base = gpt2(64), gpt2(64), torch.compile(gpt2(64)), gpt2(32).to("meta")
    wte, wpe = "transformer.wte.weight", "transformer.wpe.weight"
    param.init_(model, base, "mup", seeded(0), std={wte: 0.1, wpe: 0.2})
    param.init_(compiled, base, "mup", seeded(0), std={wte: 0.1, "_orig_mod." + wpe: 0.2})
    reloaded.load_state_dict(model.state_dict())
    for other in (reloaded, compiled):
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))
        assert numbers(other) == numbers(model)
    optimizer = torch.optim.AdamW(param.param_groups(model, base, "mup", "adam", 0.01, weight_decay=0.1))
    tokens = some_tokens(4, 16)
    losses = take_steps(optimizer, lambda: model(tokens, labels=tokens).loss, 3)
    assert losses[2] < losses[1] < losses[0]
    assert all((a != b).any() for a, b in zip(model.parameters(), reloaded.parameters()))


def test_gpt2_of_transformers_with_tied_embeddings_is_refused_with_the_remedy():
    model, base = gpt2(64, tied=True), gpt2(32, tied=True)
    for call in (lambda: param.infer_roles(model, base), lambda: param.init_(model, base, "mup"),
                 lambda: param.param_groups(model, base, "mup", "adam", 0.01),
                 lambda: param.plan(model, base, "mup", "adam", 0.01)):
        with pytest.raises(ValueError, match=r"wte.weight .* lm_head.weight .* untie them .* or call "
                           r"param.tie_\(model, model.lm_head\)$"):
            call()


def test_a_convolutional_net_with_batch_norm_trains_on_its_groups_compiled_or_not():
    x, y, losses = torch.randn(8, 3, 8, 8, generator=seeded(1)), torch.arange(8), []
    for wrap in (lambda net: net, lambda net: torch.compile(net, backend="eager")):
        model, base = wrap(Convolutional(32)), Convolutional(16).to("meta")
        param.init_(model, base, "mup", seeded(0))
        optimizer = torch.optim.AdamW(param.param_groups(model, base, "mup", "adam", 0.01))
        losses.append(take_steps(optimizer, lambda net=model: F.cross_entropy(net(x), y), 3))
    assert losses[0] == losses[1] and losses[0][2] < losses[0][0]


def convolutions(kind, width, groups=1):
    return nn.Sequential(kind(5, width, 3), kind(width, 2 * width, 3, groups=groups), kind(2 * width, 3, 3))


@pytest.mark.parametrize("kind, d", [
    (nn.Conv1d, 1), (nn.Conv2d, 2), (nn.Conv3d, 3),
    (nn.ConvTranspose1d, 1), (nn.ConvTranspose2d, 2), (nn.ConvTranspose3d, 3)])
def test_convolutions_have_their_fan_in_second_and_transposed_ones_first(kind, d):
    model, base = convolutions(kind, 64), convolutions(kind, 16).to("meta")
    param.init_(model, base, "mup", seeded(0))
    roles = list(param.infer_roles(model, base).values())
    assert roles == ["input", "vector", "hidden", "vector", "output", "vector"]
    stds = math.sqrt(2 / (5 * 3 ** d)), math.sqrt(2 / (64 * 3 ** d)), math.sqrt(2 / (32 * 3 ** d)) / 4
    for layer, std in zip(model, stds):
        assert layer.weight.std().item() == pytest.approx(std, rel=0.05)


def test_transposed_convolutions_in_groups_need_a_role():
    deep, base = (convolutions(nn.ConvTranspose2d, n, groups=n) for n in (64, 16))
    with pytest.raises(ValueError, match=r"1.weight .* Pass overrides"):        # depthwise, (width, 2, 3, 3)
        param.infer_roles(deep, base)


class Attending(nn.Module):
    """Keys and values of fixed size 100, so that their matrices grow in fan-out only."""

    def __init__(self, width):
        super().__init__()
        self.net = nn.MultiheadAttention(width, 4, kdim=100, vdim=100)


@pytest.mark.parametrize("make, names", [
    (lambda n: nn.ModuleDict({"net": nn.LSTM(100, n)}), ["net.weight_ih_l0"]),
    (lambda n: nn.ModuleDict({"net": nn.GRU(100, n, bidirectional=True)}),
     ["net.weight_ih_l0", "net.weight_ih_l0_reverse"]),
    (lambda n: nn.ModuleDict({"net": nn.LSTMCell(100, n)}), ["net.weight_ih"]),
    (Attending, ["net.k_proj_weight", "net.v_proj_weight"])],
    ids=["LSTM", "GRU", "LSTMCell", "MultiheadAttention"])
def test_recurrent_nets_and_attention_tell_fan_in_from_fan_out(make, names):
    model, base = make(64), make(16)
    overrides, roles = dict.fromkeys(names, "input"), param.infer_roles(model, base)
    assert roles == param.infer_roles(model, base, overrides)
    overridden = param.init_(make(64), base, "mup", seeded(0), overrides=overrides)
    param.init_(model, base, "mup", seeded(0))
    weights = dict(model.named_parameters())
    assert all(torch.equal(w, weights[name]) for name, w in overridden.named_parameters())
    for name in names:
        assert weights[name].std().item() == pytest.approx(math.sqrt(2 / 100), rel=0.05), name
    hidden = next(name for name in weights if name.endswith(("weight_hh_l0", "weight_hh", "q_proj_weight")))
    assert weights[hidden].std().item() == pytest.approx(math.sqrt(2 / 64), rel=0.05)
    assert roles[hidden] == "hidden" and all(roles[name] == "input" for name in names)


def test_the_ratio_of_a_hidden_matrix_of_an_unknown_module_is_its_fan_ins():
    plan = param.plan(nn.LSTM(32, 64), nn.LSTM(16, 16), "mup", "adam", 0.01)
    ratios = {line.split()[0]: line.split()[3] for line in plan.splitlines()[2:]}
    assert ratios == {"weight_ih_l0": "2", "weight_hh_l0": "4", "bias_ih_l0": "4", "bias_hh_l0": "4"}


def test_embeddings_are_tables_whose_padding_stays_zero_and_bare_parameters_need_their_std():
    class Tables(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.tokens = nn.Embedding(500, width, padding_idx=0)
            self.bag = nn.EmbeddingBag(500, width, padding_idx=499)
            self.positions = nn.Parameter(torch.zeros(500, width))

    model, base = Tables(64), Tables(16)
    for _ in range(2):
        param.init_(model, base, "mup", seeded(0), std={"positions": 0.02}, overrides={"positions": "input"})
    assert [bool(row.any()) for row in (model.tokens.weight[0], model.bag.weight[499])] == [False, False]
    assert (model.tokens.weight[1:] != 0).all() and (model.bag.weight[:499] != 0).all()
    stds = [weight.std().item() for weight in model.parameters()]       # positions first
    assert stds == pytest.approx([0.02, math.sqrt(2), math.sqrt(2)], rel=0.03)
    groups = param.param_groups(model, base, "mup", "sgd", 0.1, overrides={"positions": "input"})
    assert [(group["role"], group["lr"]) for group in groups] == [("input", pytest.approx(0.4))]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_all_biases_of_recurrent_nets_are_zero(kind):
    model, base = kind(64, 64, num_layers=2), kind(16, 16, num_layers=2)
    param.init_(model, base, "mup", seeded(0))
    for name, p in model.named_parameters():
        assert bool(p.any()) == name.startswith("weight"), name


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("normalize, words", [
    (nn.utils.weight_norm, "WeightNorm .*remove_weight_norm"),
    (nn.utils.parametrizations.weight_norm, "WeightNorm .*remove_parametrizations"),
    (nn.utils.spectral_norm, "SpectralNorm"), (nn.utils.parametrizations.spectral_norm, "SpectralNorm"),
    (nn.utils.parametrizations.orthogonal, "Orthogonal")])
def test_weights_whose_scale_is_replaced_are_refused_with_the_remedy(normalize, words):
    def net(width):
        return nn.Sequential(nn.Linear(12, width), nn.ReLU(), normalize(nn.Linear(width, 3)))
    model, base = net(64), net(16)
    for call in (lambda: param.init_(model, base, "mup"), lambda: param.infer_roles(model, base),
                 lambda: param.param_groups(model, base, "mup", "sgd", 0.1)):
        with pytest.raises(ValueError, match=words):
            call()


# ---- what stands in no list: parameters of every kind beside a layer ----

class Beside(nn.Module):
    """A layer, and a parameter of its own as its author built it."""

    def __init__(self, width, tensor):
        super().__init__()
        self.layer, self.own = nn.Linear(width, width), nn.Parameter(tensor)


KEPT = {    # name: (the tensor at a width, the role that shapes do not tell)
    "length of ScaleNorm":      (lambda n: torch.tensor(n ** 0.5), None),
    "length of ScaleNorm, (1,)": (lambda n: torch.tensor([n ** 0.5]), None),
    "gain of GRN":              (lambda n: torch.linspace(0, 1, n).view(1, 1, 1, n), None),
    "temperature":              (lambda n: torch.tensor([[2.3]]), None),
    "temperatures of heads":    (lambda n: torch.linspace(1, 2, n // 8).view(-1, 1, 1), None),
    "layer scale":              (lambda n: torch.full((n, 1, 1), 1e-6), None),
    "class token":              (lambda n: torch.linspace(-1, 1, n).view(1, 1, n), None),
    "slopes of PReLU":          (lambda n: torch.full((n,), 0.25), None),
    "A_log":                    (lambda n: torch.arange(1.0, 9.0).log().repeat(n, 1), "vector"),
    "table of offsets":         (lambda n: torch.linspace(0, 1, 35).view(5, 7), None),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_is_no_matrix_of_a_layer_stays_as_its_author_built_it(name):
    tensor_at, role = KEPT[name]
    model, base = Beside(64, tensor_at(64)), Beside(32, tensor_at(32)).to("meta")
    overrides = {} if role is None else {"own": role}
    if role:
        with pytest.raises(ValueError, match=r"fan-in from fan-out of own \(64, 8\) in a Beside"):
            param.infer_roles(model, base)
    param.init_(model, base, "mup", seeded(0), overrides=overrides)
    assert torch.equal(model.own, tensor_at(64))
    assert (model.layer.weight.std() / 64 ** -0.5).item() == pytest.approx(2 ** 0.5, rel=0.1)
    assert param.infer_roles(model, base, overrides)["own"] == "vector"
    plan = param.plan(model, base, "mup", "sgd", 0.1, overrides=overrides).splitlines()
    row, = (line for line in plan if line.startswith("own "))
    assert " as built " in row
    param.rescale_(model, Beside(32, tensor_at(32)), "sp", overrides)
    # a table whose mean square depends on its width is brought to that of the base width
    torch.testing.assert_close(model.own / model.own.norm(), tensor_at(64) / tensor_at(64).norm())


class GainOnePlusWeight(nn.Module):
    """A norm whose gain is 1 + weight, as Gemma's."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))


class GemmaRMSNorm(GainOnePlusWeight):
    pass


@pytest.mark.parametrize("make", [
    GainOnePlusWeight, GemmaRMSNorm, nn.LayerNorm, lambda n: nn.LayerNorm((4, 4)), nn.RMSNorm, nn.BatchNorm1d,
    lambda n: nn.GroupNorm(4, n), lambda n: nn.InstanceNorm2d(n, affine=True),
    lambda n: nn.LayerNorm((n, 4, 4))],
    ids=["1 + weight", "GemmaRMSNorm", "LayerNorm", "LayerNorm((4, 4))", "RMSNorm", "BatchNorm", "GroupNorm",
         "InstanceNorm", "LayerNorm((n, 4, 4))"])
@pytest.mark.parametrize("altered", [False, True])
def test_gains_and_biases_of_norms_stay_as_built_or_as_they_are(make, altered):
    model, base = (nn.Sequential(nn.Conv2d(3, n, 3), make(n), nn.Conv2d(n, n, 1)) for n in (64, 32))
    if altered:
        with torch.no_grad():
            for p in model[1].parameters():
                p.uniform_(-1, 1, generator=seeded(1))
    before = copy.deepcopy(model[1].state_dict())
    param.init_(model, base.to("meta"), "mup", seeded(0))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model[1].state_dict().items())
    roles = param.infer_roles(model, base)
    assert {role for name, role in roles.items() if name.startswith("1.")} == {"vector"}
    assert not model[0].bias.any() and not model[2].bias.any()


class NormedLinear(nn.Module):
    """A classifier of normalized features; the norm is in its name only."""

    def __init__(self, d_in, d_out):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d_in, d_out))


def test_a_matrix_in_a_class_that_is_named_after_a_norm_is_no_gain():
    model, base = (nn.Sequential(nn.Linear(10, n), NormedLinear(n, n)) for n in (64, 32))
    assert param.infer_roles(model, base)["1.weight"] == "hidden"


class Extended(nn.Linear):
    """A linear layer with one more parameter, as adapters have it."""

    def __init__(self, width, name, tensor):
        super().__init__(width, width)
        self.register_parameter(name, nn.Parameter(tensor))


@pytest.mark.parametrize("name, shape_at, role", [
    ("lora_A", lambda n: (4, n), "vector"), ("lora_B", lambda n: (n, 4), "vector"),
    ("magnitude", lambda n: (n,), None), ("weight_scale", lambda n: (n, 1), None),
    ("bias_scale", lambda n: (n,), None)])
def test_what_a_subclass_of_a_layer_adds_stays_as_built(name, shape_at, role):
    model, base = (nn.Sequential(nn.Linear(10, n), Extended(n, name, torch.ones(shape_at(n))))
                   for n in (64, 32))
    if role:
        with pytest.raises(ValueError, match=rf"1.{name} \(.*\) in a Extended.*Pass overrides="):
            param.init_(model, base, "mup")
    param.init_(model, base, "mup", seeded(0), overrides=role and {f"1.{name}": role})
    assert (getattr(model[1], name) == 1).all() and (model[1].weight != 1).all() and not model[1].bias.any()


def test_adapters_that_are_named_in_std_are_drawn():
    model, base = (nn.Sequential(Extended(n, "lora_A", torch.ones(400, n))) for n in (64, 32))
    param.init_(model, base, "mup", seeded(0), std={"0.lora_A": 0.3}, overrides={"*.lora_A": "output"})
    assert model[0].lora_A.std().item() == pytest.approx(0.3 / 2, rel=0.03)         # mup: m^-1


@pytest.mark.parametrize("frozen", ["1.weight", "1.bias", "0.weight"])
def test_a_frozen_parameter_stays(frozen):
    model, base = (nn.Sequential(nn.Linear(10, n), nn.Linear(n, n), nn.Linear(n, 2)) for n in (64, 32))
    tensor = model.get_parameter(frozen).requires_grad_(False).fill_(0.5)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    param.init_(model, base, "mup", seeded(0))
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert (tensor == 0.5).all() and set(changed) == before.keys() - {frozen}


class Unlisted(nn.Module):
    """Matrices whose fan-in shapes do not tell: heads by einsum, a bilinear form, experts, and a table."""

    def __init__(self, width, dim=8, experts=4):
        super().__init__()
        self.embed = nn.Linear(10, width)
        self.heads = nn.Parameter(torch.randn(width // dim, width, dim) * width ** -0.5)
        self.merge = nn.Parameter(torch.randn(width // dim, dim, width) * width ** -0.5)
        self.form = nn.Bilinear(width, width, width, bias=False)
        self.up = nn.Parameter(torch.randn(experts, width, 4 * width) * width ** -0.5)
        self.router = nn.Parameter(torch.randn(width, experts) * width ** -0.5)
        self.positions = nn.Parameter(torch.randn(1, 12, width))


ROLES_OF_UNLISTED = {"router": "output", "positions": "input"}


def test_all_tensors_that_need_a_role_are_listed_at_once():
    with pytest.raises(ValueError) as error:
        param.infer_roles(Unlisted(64), Unlisted(32))
    assert str(error.value) == (
        "cannot tell fan-in from fan-out of router (64, 4) in a Unlisted; positions (1, 12, 64) in a "
        "Unlisted. Pass overrides={NAME_OR_PATTERN: role}, role one of input, hidden, output, vector")
    roles = param.infer_roles(Unlisted(64), Unlisted(32), ROLES_OF_UNLISTED)
    assert [roles[name] for name in ("heads", "merge", "form.weight", "up")] == ["hidden"] * 4
    groups = param.param_groups(Unlisted(64), Unlisted(32), "mup", "adam", 1.0, overrides=ROLES_OF_UNLISTED)
    lrs = {name: group["lr"] for group in groups for name in group["names"]}
    assert {name: lrs[name] for name in ("heads", "merge", "form.weight", "up", "router", "positions")} == {
        "heads": 0.5, "merge": 0.5, "form.weight": 0.5, "up": 0.5, "router": 0.5, "positions": 1.0}


def test_matrices_of_unknown_fan_in_are_refused_by_name_left_drawn_or_rescaled():
    model, base = Unlisted(64), Unlisted(32)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"unknown fan-in of heads \(8, 64, 8\) in a Unlisted; merge .*; up "
                       r"\(4, 64, 256\) .*; router .*; positions .*; form.weight \(64, 64, 64\) in a "
                       r"Bilinear. Give std=\{NAME: value at the base width\}, or the role vector .* or use "
                       r"rescale_$"):
        param.init_(model, base, "sp", overrides=ROLES_OF_UNLISTED)
    # nothing is half drawn
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())

    left = dict.fromkeys(("heads", "merge", "form.*", "router", "positions"), "vector")
    param.init_(model, base, "sp", seeded(0), std={"up": 0.25}, overrides=left)
    changed = {name for name, w in model.state_dict().items() if not torch.equal(w, before[name])}
    assert changed == {"embed.weight", "embed.bias", "up"}
    assert model.up.std().item() == pytest.approx(0.25 * 2 ** -0.5, rel=0.02)               # 2^16 draws

    directions = {name: F.normalize(w.flatten(), dim=0) for name, w in model.state_dict().items()}
    for _ in range(2):          # idempotent
        param.rescale_(model, base, "mup", ROLES_OF_UNLISTED)
        for name, power in [("heads", 0.5), ("merge", 0.5), ("form.weight", 0.5), ("up", 0.5),
                            ("router", 1.0), ("positions", 0.0), ("embed.weight", 0.0)]:
            sizes = [net.get_parameter(name).square().mean().sqrt().item() for net in (model, base)]
            assert sizes[0] == pytest.approx(2 ** -power * sizes[1], rel=1e-5), name
            direction = F.normalize(model.get_parameter(name).detach().flatten(), dim=0)
            torch.testing.assert_close(direction, directions[name])


def test_overrides_are_names_or_patterns_and_the_last_match_counts():
    def net(width):
        return nn.ModuleDict({"tables": nn.ParameterList(torch.ones(7, width) for _ in range(3)),
                              "body": nn.Linear(width, width)})

    model, base = net(64), net(32)
    roles = param.infer_roles(model, base, {"tables.*": "input", "tables.1": "vector"})
    assert roles == {"tables.0": "input", "tables.1": "vector", "tables.2": "input", "body.weight": "hidden",
                     "body.bias": "vector"}
    assert set(param.infer_roles(model, base, {"tables.1": "vector", "*": "output"}).values()) == {"output"}
    overrides = {"tables.[01]": "output", "tables.?": "vector", "tables.2": "input"}
    roles = param.infer_roles(model, base, overrides)
    assert [roles[f"tables.{i}"] for i in range(3)] == ["vector", "vector", "input"]
    with pytest.raises(ValueError, match="no parameter of the model is called table.*"):
        param.infer_roles(model, base, {"tables.*": "input", "table.*": "output"})
    with pytest.raises(ValueError, match=r"unknown role of tables.\*: 'middle'; choose from input, hidden"):
        param.infer_roles(model, base, {"tables.*": "middle"})


def test_learning_rates_have_factors_by_role_and_by_name_pattern_at_every_width():
    model, base = gpt_and_base(64, 32)
    arguments = model, base, "mup", "sgd", 0.1
    factors = {"hidden": 0.5, "blocks.0.*": 3.0, "*.up.weight": 0.0, "norm.weight": 7.0}
    both = [param.param_groups(*arguments, weight_decay=0.1, role_lr=role_lr) for role_lr in (None, factors)]
    plain, tuned = ({name: group for group in groups for name in group["names"]} for groups in both)
    assert plain.keys() == tuned.keys() == dict(model.named_parameters()).keys()
    for name, group in tuned.items():
        factor = ((0.5 if group["role"] == "hidden" else 1) * (3 if name.startswith("blocks.0.") else 1)
                  * (0 if name.endswith(".up.weight") else 1) * (7 if name == "norm.weight" else 1))
        assert group["lr"] == group["base_lr"] == pytest.approx(factor * plain[name]["lr"]), name
        assert group["weight_decay"] == plain[name]["weight_decay"], name
    plan = param.plan(*arguments, role_lr=factors)
    assert re.search(r"^norm.weight +64 +vector +2 +as built +1.4 ", plan, re.MULTILINE)
    for bad in ("norm.bias", "block.*"):
        with pytest.raises(ValueError, match=f"role_lr names '{re.escape(bad)}', which is neither a role"):
            param.param_groups(*arguments, role_lr={**factors, bad: 2.0})


# ---- sizes that grow by different factors ----

class Uneven(nn.Module):
    """Hidden widths n and n²/16, so that one matrix grows faster in fan-out, the other in fan-in."""

    def __init__(self, width, readout=nn.Linear):
        super().__init__()
        sizes = 12, width, width ** 2 // 16, width
        self.body = nn.ModuleList(nn.Linear(*fans) for fans in zip(sizes, sizes[1:]))
        self.readout = readout(width, 3)

    def forward(self, x):
        for layer in self.body:
            x = torch.relu(layer(x))
        return self.readout(x)


@pytest.mark.parametrize("optimizer, lrs", [
    ("sgd", [4, 4, 1 / 4, 1 / 4]), ("adam", [1, 1 / 4, 1 / 16, 1 / 4])])
def test_mup_of_sizes_that_grow_unevenly_equals_the_package_mup(optimizer, lrs):
    mup = pytest.importorskip("mup")
    theirs = Uneven(64, mup.MuReadout).double()
    mup.set_base_shapes(theirs, Uneven(16, mup.MuReadout).double(), delta=Uneven(32, mup.MuReadout).double())
    model, base = Uneven(64).double(), Uneven(16).double()
    param.init_(model, base, "mup", seeded(0))
    with torch.no_grad():
        for a, b in zip(theirs.parameters(), model.parameters()):
            a.copy_(b * (4 if a is theirs.readout.weight else 1))
    x, y = batch()
    lr = LR[optimizer]
    groups = param.param_groups(model, base, "mup", optimizer, lr, eps=1e-30)
    reference = (mup.MuSGD(theirs.parameters(), lr=lr) if optimizer == "sgd"
                 else mup.MuAdam(theirs.parameters(), lr=lr, eps=1e-30))
    take_steps(OPTIMIZERS[optimizer](groups), lambda: F.cross_entropy(model(x), y), 20)
    take_steps(reference, lambda: F.cross_entropy(theirs(x), y), 20)
    torch.testing.assert_close(model(x), theirs(x), rtol=1e-9, atol=1e-9)
    of_name = {name: group["lr"] / lr for group in groups for name in group["names"]}
    names = [*(f"body.{i}.weight" for i in range(3)), "readout.weight"]
    assert [of_name[name] for name in names] == pytest.approx(lrs)


@pytest.mark.parametrize("optimizer", param.OPTIMIZERS)
def test_other_parameterizations_refuse_sizes_that_grow_unevenly_by_name_but_sp(optimizer):
    model, base = Uneven(64), Uneven(16)
    for name in param.PARAMETERIZATIONS.keys() - {"sp", "mup"}:
        for call in (param.param_groups, param.plan):
            with pytest.raises(ValueError, match="^body.1.weight: fan-in grows 4 times and fan-out 16 times, "
                               f"for which {name} has no learning rate; use sp or mup$"):
                call(model, base, name, optimizer, 0.1)
    assert {group["lr"] for group in param.param_groups(model, base, "sp", optimizer, 0.1)} == {0.1}
    for name in ("sp", "mup"):
        with pytest.raises(ValueError, match=r"needs one width ratio, but tensors scale by \[4.0, 16.0\]"):
            param.param_groups(model, base, name, optimizer, 0.1, alpha=0.5)


# ---- wrappers, shards, and tensors under two names ----

class Wrapper(nn.Module):
    """A module under an attribute, as DDP and activation checkpointing hold it."""

    def __init__(self, net, attribute="module"):
        super().__init__()
        setattr(self, attribute, net)


def wrapped_body(net, wrap):
    net.layers[1] = wrap(net.layers[1])
    return net


WRAPPERS = {
    "DDP": Wrapper,
    "DDP twice": lambda net: Wrapper(Wrapper(net)),
    "FSDP": lambda net: Wrapper(wrapped_body(net, lambda layer: Wrapper(layer, "_fsdp_wrapped_module")),
                                "_fsdp_wrapped_module"),
    "checkpoint": lambda net: wrapped_body(net, lambda layer: Wrapper(layer, "_checkpoint_wrapped_module")),
    "compiled DDP": lambda net: Wrapper(Wrapper(net), "_orig_mod"),
    "DDP of a compiled one": lambda net: Wrapper(Wrapper(net, "_orig_mod")),
    "DDP of checkpoints": lambda net: Wrapper(
        wrapped_body(net, lambda layer: Wrapper(layer, "_checkpoint_wrapped_module"))),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_are_read_as_what_they_wrap(name):
    plain_base, overrides = net_and_base(64, 16)[1], {"layers.3.weight": "vector"}
    plain = net_and_base(64, 16)[0]
    wrapped = WRAPPERS[name](copy.deepcopy(plain))
    long_names = [long for long, _ in wrapped.named_parameters()]
    assert long_names[1] != "layers.1.weight"
    for base in (plain_base, WRAPPERS[name](copy.deepcopy(plain_base))):
        roles = param.infer_roles(wrapped, base)
        assert list(roles) == long_names
        assert list(roles.values()) == list(param.infer_roles(plain, base).values())
        for short, long in zip(("layers.1.weight", "layers.0.weight"), long_names[1::-1]):
            for key in (short, long):
                param.init_(plain, base, "mup", seeded(0), std={short: 0.1}, overrides=overrides)
                param.init_(wrapped, base, "mup", seeded(0), std={key: 0.1},
                            overrides={long_names[3]: "vector"})
                assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), wrapped.parameters()))
        of_plain, of_wrapped = (param.param_groups(net, base, "mup", "sgd", 0.1, role_lr={"layers.1.*": 3.0})
                                for net in (plain, wrapped))
        assert [group["lr"] for group in of_plain] == [group["lr"] for group in of_wrapped]
    built = WRAPPERS[name](net_and_base(16, 16)[0])
    assert list(param.built_stds(built)) == [short for short, _ in plain.named_parameters()]


def test_a_child_that_is_called_module_is_no_wrapper():
    def net(width):
        return nn.ModuleDict({"module": nn.Linear(10, width), "head": nn.Linear(width, 2)})

    model, base = net(64), net(32)
    assert param.infer_roles(model, base, {"module.weight": "hidden"})["module.weight"] == "hidden"
    param.init_(model, base, "mup", seeded(0), std={"module.weight": 0.0})
    assert not model["module"].weight.any() and model["head"].weight.all()


class Sequence(nn.Module):
    """An embedding of `tokens` rows, a body, a norm and a readout of `classes` rows."""

    def __init__(self, width, tokens=8, classes=4, padding_idx=None):
        super().__init__()
        self.embedding = nn.Embedding(tokens, width, padding_idx)
        self.body, self.norm = nn.Linear(width, width), nn.LayerNorm(width)
        self.readout = nn.Linear(width, classes)


SHARDED = {     # name: (function of param, arguments of Sequence)
    "init_": ("init_", {}),
    "init_, sizes that two ranks do not divide": ("init_", {"tokens": 7, "classes": 3}),
    "init_, a padding row": ("init_", {"padding_idx": 0}),
    "rescale_": ("rescale_", {}),
    "rescale_, sizes that two ranks do not divide": ("rescale_", {"tokens": 7, "classes": 3}),
    "init_, DDP": ("init_", {}),
}


def compare_shards(rank, folder):
    """Write {name: what is wrong, or nothing} of SHARDED as rank 0 or 1 of two processes."""
    from torch.distributed.fsdp import fully_shard
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2,
                            timeout=timedelta(seconds=60))
    outcomes = {}
    for name, (function, sizes) in SHARDED.items():
        torch.manual_seed(0)
        whole, base = Sequence(18, **sizes).double(), Sequence(6, **sizes).double()
        sharded = copy.deepcopy(whole)
        if name.endswith("DDP"):
            sharded = nn.parallel.DistributedDataParallel(sharded)
        else:
            for module in (sharded.body, sharded):
                fully_shard(module)
        generator = {"generator": seeded(1)} if function == "init_" else {}
        try:
            getattr(param, function)(whole, base, "mup", **generator)
            getattr(param, function)(sharded, base, "mup", **generator and {"generator": seeded(1)})
        except Exception as error:          # both ranks raise it
            outcomes[name] = f"{type(error).__name__}: {error}"
            continue
        weights = [getattr(w, "full_tensor", lambda w=w: w)() for w in sharded.parameters()]
        lrs = [[group["lr"] for group in param.param_groups(net, base, "mup", "sgd", 0.1)]
               for net in (whole, sharded)]
        outcomes[name] = [key for (key, a), b in zip(whole.named_parameters(), weights)
                          if not torch.allclose(a, b, rtol=1e-12, atol=0)] + ["lr"] * (lrs[0] != lrs[1])
    dist.destroy_process_group()
    (folder / f"{rank}.json").write_text(json.dumps(outcomes))


@pytest.fixture(scope="module")
def outcomes_of_shards(tmp_path_factory):
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("needs gloo")
    if not hasattr(pytest.importorskip("torch.distributed.fsdp"), "fully_shard"):
        pytest.skip("needs fully_shard")
    folder = tmp_path_factory.mktemp("shards")
    torch.multiprocessing.spawn(compare_shards, (folder,), nprocs=2)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", SHARDED)
def test_a_sharded_model_is_drawn_and_rescaled_as_the_whole_one(outcomes_of_shards, name):
    assert [outcomes[name] for outcomes in outcomes_of_shards] == [[], []]


class Shared(nn.Module):
    """One hidden layer under two names."""

    def __init__(self, width):
        super().__init__()
        self.up, self.first, self.readout = nn.Linear(10, width), nn.Linear(width, width), nn.Linear(width, 2)
        self.second = self.first


@pytest.mark.parametrize("names", [["first"], ["first", "second"]], ids=str)
def test_a_tensor_under_two_names_has_the_role_of_the_first_at_the_base_width(names):
    overrides = {"up.weight": "input", "readout.weight": "output"}
    overrides |= {f"{name}.weight": "hidden" for name in names}
    roles = param.infer_roles(Shared(64), Shared(32), overrides)
    assert roles == {
        "up.weight": "input", "up.bias": "vector", "first.weight": "hidden", "first.bias": "vector",
        "readout.weight": "output", "readout.bias": "vector"}
    assert param.infer_roles(Shared(32), Shared(32), overrides) == roles
    model = param.init_(Shared(32), Shared(32), "mup", seeded(0), overrides=overrides)
    groups = param.param_groups(model, Shared(32), "mup", "sgd", 0.1, overrides=overrides)
    assert sorted(name for group in groups for name in group["names"]) == sorted(roles)


def test_a_tensor_under_two_names_has_one_role():
    overrides = {"first.weight": "hidden", "second.weight": "output"}
    for width in (32, 64):
        with pytest.raises(ValueError, match=r"first.weight \(hidden\) and second.weight \(output\) are one"):
            param.infer_roles(Shared(width), Shared(32), overrides)


# ---- tied embeddings ----

class Tied(nn.Module):
    """An embedding and a readout of one tensor; `readout(embedding)` makes the latter."""

    def __init__(self, width, readout=None):
        super().__init__()
        self.embedding, self.body = nn.Embedding(23, width), nn.Linear(width, width)
        self.readout = nn.Linear(width, 23, bias=False) if readout is None else readout(self.embedding)
        self.readout.weight = self.embedding.weight

    def forward(self, tokens):
        return self.readout(torch.tanh(self.body(self.embedding(tokens))))


def tied_and_base(width=64, base_width=16):
    model, base = Tied(width).double(), Tied(base_width).double()
    return param.tie_(model, model.readout), base


@pytest.mark.parametrize("optimizer", param.OPTIMIZERS)
def test_a_tied_readout_is_the_package_mups_shared_one(optimizer):
    mup = pytest.importorskip("mup")

    def shared(width):
        return Tied(width, lambda embedding: mup.MuSharedReadout(embedding.weight, bias=False)).double()

    theirs = shared(64)
    mup.set_base_shapes(theirs, shared(16), delta=shared(32))
    model, base = tied_and_base()
    param.init_(model, base, "mup", seeded(0))
    theirs.load_state_dict(model.state_dict())
    tokens, lr = some_tokens(4, 17), LR[optimizer]
    groups = param.param_groups(model, base, "mup", optimizer, lr, eps=1e-30)
    reference = (mup.MuSGD(theirs.parameters(), lr=lr) if optimizer == "sgd"
                 else mup.MuAdam(theirs.parameters(), lr=lr, eps=1e-30))
    before = model(tokens).detach()
    torch.testing.assert_close(before, theirs(tokens), rtol=1e-12, atol=1e-12)
    take_steps(OPTIMIZERS[optimizer](groups), lambda: cross_entropy_of_tokens(model, tokens), 20)
    take_steps(reference, lambda: cross_entropy_of_tokens(theirs, tokens), 20)
    torch.testing.assert_close(model(tokens), theirs(tokens), rtol=1e-9, atol=1e-9)
    assert (model(tokens) - before).abs().max() > 0.1


@pytest.mark.parametrize("parameterization, factor", [
    ("sp", 0.5), ("ntp", 0.5), ("mup", 0.25), ("sp_full_align", 0.5), ("sp_full_align_large_readout", 0.5)])
@pytest.mark.parametrize("call", [
    lambda model, base, name: param.init_(model, base, name, seeded(0)), param.rescale_,
    lambda model, base, name: param.param_groups(model, base, name, "adam", 0.1)],
    ids=["init_", "rescale_", "param_groups"])
def test_a_tied_readouts_input_is_multiplied_by_the_readouts_missing_exponent(call, parameterization, factor):
    model, base = tied_and_base(64, 16)
    x = torch.randn(3, 64, dtype=torch.float64, generator=seeded(1))
    for _ in range(2):                      # idempotent
        param.tie_(model, model.readout)
        call(model, base, parameterization)
        for net in (model, copy.deepcopy(model)):
            torch.testing.assert_close(net.readout(x), factor * x @ net.embedding.weight.T)
    roles = {"embedding.weight": "input", "body.weight": "hidden", "body.bias": "vector"}
    assert param.infer_roles(model, base) == roles
    assert len(param.plan(model, base, parameterization, "adam", 0.1).splitlines()) == 2 + len(roles)


def test_a_tied_readout_is_left_alone_at_the_base_width():
    model, base = tied_and_base(16, 16)
    x = torch.randn(3, 16, dtype=torch.float64, generator=seeded(1))
    overrides = {"embedding.weight": "input", "body.weight": "hidden"}
    param.init_(model, base, "mup", seeded(0), overrides=overrides)
    torch.testing.assert_close(model.readout(x), x @ model.embedding.weight.T, rtol=0, atol=0)


def test_what_is_not_tied_is_refused():
    untied, other = Tied(16), Tied(16)
    untied.readout.weight = nn.Parameter(untied.readout.weight.detach().clone())
    for readout in (untied.readout, other.readout, untied.body, nn.ReLU()):
        with pytest.raises(ValueError, match=f"weight of {type(readout).__name__} is no tied tensor of the"):
            param.tie_(untied, readout)
        assert not readout._forward_pre_hooks


@pytest.mark.parametrize("optimizer", param.OPTIMIZERS)
def test_gpt2_of_transformers_with_tied_embeddings_trains_when_tie_is_called(optimizer):
    model, base = gpt2(64, tied=True), gpt2(32, tied=True).to("meta")
    param.tie_(model, model.lm_head)
    param.init_(model, base, "mup", seeded(0), std={"transformer.wte.weight": 0.1})
    assert model.lm_head.weight is model.transformer.wte.weight
    roles = param.infer_roles(model, base)
    assert roles["transformer.wte.weight"] == "input" and "lm_head.weight" not in roles
    tokens, groups = some_tokens(4, 16), param.param_groups(model, base, "mup", optimizer, LR[optimizer])
    losses = take_steps(OPTIMIZERS[optimizer](groups), lambda: model(tokens, labels=tokens).loss, 3)
    assert losses[2] < losses[1] < losses[0]


# ---- copied alone ----

# What a file may import besides the standard library.
ALLOWED = {"param": {"torch"}, "models": {"torch"}, "metrics": {"torch"}, "stack": {"torch"},
           "data": {"torch", "numpy"}, "estimate": {"numpy"}, "plots": {"numpy", "matplotlib"}}


@pytest.mark.parametrize("name", ALLOWED)
def test_each_library_file_imports_alone_in_an_empty_folder(name, tmp_path, monkeypatch):
    source = HERE / f"{name}.py"
    if not source.exists():
        pytest.skip(f"{name}.py is not there")
    imported = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.partition(".")[0])
    assert ALLOWED[name] & imported and imported <= ALLOWED[name] | sys.stdlib_module_names
    shutil.copy(source, tmp_path)
    ours = {path.stem for path in HERE.glob("*.py")} | {"torch", "numpy", "matplotlib"}
    for other in ours - ALLOWED[name]:
        monkeypatch.setitem(sys.modules, other, None)       # importing it is an ImportError
    elsewhere = [folder for folder in sys.path if Path(folder or ".").resolve() != HERE]
    monkeypatch.setattr(sys, "path", [str(tmp_path), *elsewhere])
    spec = importlib.util.spec_from_file_location(f"{name}_alone", tmp_path / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert [path.name for path in tmp_path.iterdir() if path.suffix] == [f"{name}.py"]


def test_param_copied_alone_beside_a_transformers_model_works(tmp_path):
    pytest.importorskip("transformers")
    shutil.copy(HERE / "param.py", tmp_path)
    (tmp_path / "use.py").write_text("""
import importlib.util, torch, transformers, param
assert not any(importlib.util.find_spec(name) for name in ('train', 'models', 'metrics'))
def make(width):
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=96, n_positions=16, n_embd=width, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0,
        tie_word_embeddings=False))
model, base = make(32), make(16).to('meta')
param.init_(model, base, 'mup')
torch.optim.AdamW(param.param_groups(model, base, 'mup', 'adam', lr=0.01))
print(param.plan(model, base, 'mup', 'adam', lr=0.01))
""")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "use.py"], cwd=tmp_path, env=environment, timeout=300, check=False,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"lm_head.weight +96x32 +output +2 ", done.stdout)


def test_the_readmes_table_is_the_one_in_param():
    def numbers(values):
        return ", ".join({0: "0", 0.5: "½", 1: "1", -0.5: "-½", -1: "-1"}[value] for value in values)
    readme = (HERE / "README.md").read_text()
    for name, row in param.PARAMETERIZATIONS.items():
        cells = [f"`{name}`", *map(numbers, (row["b"][:3], row["sgd"], row["adam"], row["adam_eps"]))]
        assert f"| {' | '.join(cells)} |" in readme
