"""Executable theory. pytest test_regimes.py takes about a minute on two cores; each test is named for its claim.

Reference checks state an independent computation in the test (written out, from torch.optim, or from another package,
skipped where that is absent). Behaviour checks measure a regime, and show that the neighbouring exponent would fail.
"""
import contextlib
import copy
import functools
import gzip
import hashlib
import http.server
import io
import itertools
import json
import math
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import train            # before torch: it fixes how MKL sums
import torch
import torch.nn as nn
import torch.nn.functional as F

import metrics
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
# GPT

def gpt_and_base(width=64, base_width=32, dtype=torch.float64, seed=0, **kwargs):
    """Two layers, context 16, heads of 16; norm gains away from one, lest a gain left out pass."""
    model, base = (models.GPT(23, n, 2, 16, head_dim=16, **kwargs).to(dtype) for n in (width, base_width))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")     # at the base width
        param.init_(model, base, "sp", seeded(seed))
    for gains in (p for p in model.parameters() if p.ndim == 1):
        gains.data += 0.3 * torch.randn(gains.shape, generator=seeded(seed + 1), dtype=torch.float64).to(dtype)
    return model, base


def some_tokens(*shape, seed=2):
    return torch.randint(23, shape, generator=seeded(seed))


def plain_gpt_cross_entropy(weights, tokens, head_dim=16, qk_norm=True, theta=10000.0):
    """Per-token cross-entropy (B, T) of next-token prediction on tokens (B, T + 1), from a dict of weights, all written out."""
    def norm(name, x):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weights.get(name + ".weight", 1.0)

    def turned(x):                                                          # (B, T, H, K): pairs as complex numbers
        r, t = head_dim // 8, torch.arange(x.shape[1], dtype=torch.float64)
        angle = t[:, None] * theta ** (-torch.arange(r, dtype=torch.float64) / r)
        z = torch.complex(x[..., :r], x[..., r:2 * r]) * torch.exp(1j * angle)[:, None, :].to(x.dtype.to_complex())
        return torch.cat([z.real, z.imag, x[..., 2 * r:]], dim=-1)

    x = weights["embedding.weight"][tokens[:, :-1]]
    batch, length, width = x.shape
    for block in ("blocks.0.", "blocks.1."):
        h = norm(block + "norm_attention", x) @ weights[block + "attention.qkv.weight"].T
        q, k, v = (part.reshape(batch, length, -1, head_dim) for part in h.split(width, dim=-1))
        if qk_norm:
            q, k = norm(block + "attention.norm_q", q), norm(block + "attention.norm_k", k)
        scores = torch.einsum("bqhd,bkhd->bhqk", turned(q), turned(k)) / math.sqrt(head_dim)
        weight = scores.exp() * torch.ones(length, length, dtype=x.dtype).tril()
        attended = torch.einsum("bhqk,bkhd->bqhd", weight / weight.sum(-1, keepdim=True), v).reshape(batch, length, width)
        up = norm(block + "norm_mlp", x) @ weights[block + "up.weight"].T
        gelu = up * (1 + torch.erf(up / math.sqrt(2))) / 2
        x = x + attended @ weights[block + "attention.proj.weight"].T + gelu @ weights[block + "down.weight"].T
    logits = norm("norm", x) @ weights["readout.weight"].T
    return logits.exp().sum(-1).log() - logits.gather(-1, tokens[:, 1:, None]).squeeze(-1)


def cross_entropy_of_tokens(model, tokens):
    return F.cross_entropy(model(tokens[:, :-1]).transpose(1, 2), tokens[:, 1:], reduction="none")


@pytest.mark.parametrize("norm_affine", [True, False])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_gpt_is_the_decoder_written_out(norm_affine, qk_norm):
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        model, _ = gpt_and_base(dtype=dtype, norm_affine=norm_affine, qk_norm=qk_norm)
        weights, tokens = dict(model.named_parameters()), some_tokens(4, 13)        # fewer tokens than the context
        ours, written_out = cross_entropy_of_tokens(model, tokens), plain_gpt_cross_entropy(weights, tokens, qk_norm=qk_norm)
        torch.testing.assert_close(ours, written_out, rtol=tolerance, atol=tolerance)
        assert (ours - plain_gpt_cross_entropy(weights, tokens, qk_norm=qk_norm, theta=100.0)).abs().max() > 1e-3
    assert all(("norm" in name) == (p.ndim == 1) for name, p in weights.items())
    assert sum(p.ndim == 1 for p in weights.values()) == norm_affine * (5 + 4 * qk_norm)
    for ours, theirs in zip(*(torch.autograd.grad(loss.mean(), list(weights.values())) for loss in (ours, written_out))):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_gpt_is_causal():
    model, tokens = gpt_and_base()[0], some_tokens(3, 16)
    other = tokens.clone()
    other[:, 9] = (tokens[:, 9] + 1) % 23
    change = (model(tokens) - model(other)).abs().amax(dim=(0, 2))                  # (T,)
    assert change[:9].max() < 1e-12 and change[9:].min() > 1e-3


def test_gpt_is_one_function_on_the_meta_device_under_vmap_compile_autocast_and_inference():
    model, tokens = gpt_and_base(dtype=torch.float32)[0], some_tokens(3, 12)
    expected, weights = model(tokens), {name: p.detach() for name, p in model.named_parameters()}
    models._ROTARY_TABLES.clear()
    with torch.inference_mode():            # the first to make the table, which must serve training all the same
        assert torch.equal(model(tokens), expected)
    table = models.rotary_table(16, 4, tokens.device, torch.float32)
    torch.autograd.grad(model(tokens).sum(), list(model.parameters()))
    with torch.device("meta"):
        meta = models.GPT(23, 64, 2, 16, head_dim=16)
    assert torch.equal(torch.func.functional_call(meta, weights, (tokens,)), expected)
    fresh = copy.deepcopy(meta).to_empty(device="cpu")
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(tokens), expected)
    stacked = {name: torch.stack([w, w + 0.01]) for name, w in weights.items()}
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):        # the CPU's fused kernel has no vmap
        both = torch.func.vmap(lambda w: torch.func.functional_call(meta, w, (tokens,)))(stacked)
    shifted = torch.func.functional_call(meta, {name: w[1] for name, w in stacked.items()}, (tokens,))
    torch.testing.assert_close(both, torch.stack([expected, shifted]), rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert 0 < (model(tokens) - expected).abs().max() < 0.05 * expected.abs().max()
    assert 0 < (copy.deepcopy(model).bfloat16()(tokens) - expected).abs().max() < 0.05 * expected.abs().max()
    assert models.rotary_table(16, 4, tokens.device, torch.float32)[0] is table[0]  # made once, for all of these
    assert list(models._ROTARY_TABLES) == [(16, 4, tokens.device, torch.float32)]
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(tokens), expected)
    models._ROTARY_TABLES.clear()           # a table made while compiling is kept as well: one more compilation, then no other
    assert torch.equal(compiled(tokens), expected) and torch.equal(compiled(tokens), expected)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(compiled(tokens), expected)


ROLES_OF_GPT = {"embedding.weight": "input", "readout.weight": "output", "norm.weight": "vector"} | {
    f"blocks.{block}.{name}.weight": role for block in range(2) for name, role in [
        ("norm_attention", "vector"), ("attention.qkv", "hidden"), ("attention.norm_q", "vector"), ("attention.norm_k", "vector"),
        ("attention.proj", "hidden"), ("norm_mlp", "vector"), ("up", "hidden"), ("down", "hidden")]}


def test_roles_of_gpt_and_the_gains_that_heads_share_follow_alpha_alone():
    model, base = gpt_and_base(64, 16)
    assert param.infer_roles(model, base.to("meta")) == ROLES_OF_GPT
    for optimizer, c in [("sgd", -1), ("adam", 0)]:
        groups = param.param_groups(model, base, "mup", optimizer, 1.0, alpha=HALF)
        lr = {name: group["lr"] for group in groups for name in group["names"]}
        assert lr["norm.weight"] == pytest.approx(4 ** -(c + HALF))
        assert lr["blocks.0.attention.norm_q.weight"] == pytest.approx(4 ** -HALF)      # of fixed size: m = 1, c does not act


@pytest.mark.parametrize("optimizer", param.OPTIMIZERS)
def test_all_parameterizations_of_gpt_coincide_at_the_base_width_and_nowhere_else(optimizer):
    def trained_gpt(name, width):
        model, base = gpt_and_base(width, 32)
        param.init_(model, base, name, seeded(0), overrides=ROLES_OF_GPT)
        groups = param.param_groups(model, base, name, optimizer, 0.01, overrides=ROLES_OF_GPT)
        steps_of = {"sgd": torch.optim.SGD, "adam": torch.optim.AdamW}[optimizer](groups)
        tokens = some_tokens(4, 17)
        for _ in range(3):
            steps_of.zero_grad()
            cross_entropy_of_tokens(model, tokens).mean().backward()
            steps_of.step()
        return model(tokens[:, :-1]).detach()

    at_base, wide = ({name: trained_gpt(name, width) for name in param.PARAMETERIZATIONS} for width in (32, 64))
    assert all(torch.equal(logits, at_base["sp"]) for logits in at_base.values())
    names = list(wide)
    assert all((wide[a] - wide[b]).abs().max() > 1e-4 for i, a in enumerate(names) for b in names[:i])


def test_every_weight_of_gpt_is_measured():
    for norm_affine, modules in ((True, 19), (False, 10)):
        model, reference = (gpt_and_base(norm_affine=norm_affine)[0] for _ in range(2))
        tokens = some_tokens(3, 12)
        for p in model.parameters():
            p.data += 0.02 * torch.randn(p.shape, generator=seeded(7), dtype=p.dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("error")                                          # nothing is left out
            rows = metrics.refined_coordinate_check(model, reference, tokens)
        assert len(rows) == modules == sum(1 for _ in model.parameters())
        assert all(row["effective"] > 0 for row in rows.values())
        assert all(row["propagating"] > 0 for name, row in rows.items() if name not in ("embedding", "blocks.0.norm_attention"))
        assert metrics.refined_coordinate_check(torch.compile(model, backend="eager"), reference, tokens) == rows


@pytest.mark.parametrize("parameterization, optimizer", [("sp", "sgd"), ("sp", "adam"), ("mup", "sgd"), ("mup", "adam")])
def test_first_step_exponents_of_gpt_are_the_predicted_ones(parameterization, optimizer):
    """Of all matrices. The backward signal passes a small readout here, so that logits of order one bend nothing."""
    widths, effective = (64, 128, 256, 512), {}
    lr, make = {"sgd": (0.1, torch.optim.SGD), "adam": (1e-5, torch.optim.Adam)}[optimizer]
    for width in widths:
        model, base = models.GPT(23, width, 2, 16), models.GPT(23, 64, 2, 16)
        std = {"input": 1.0, "output": 0.05 / 8}
        param.init_(model, base, parameterization, seeded(0), gain=1.0, std=std, overrides=ROLES_OF_GPT)
        reference, tokens = copy.deepcopy(model), some_tokens(8, 17) % 8            # a third of the tokens occur
        cross_entropy_of_tokens(model, tokens).mean().backward()
        make(param.param_groups(model, base, parameterization, optimizer, lr, eps=1e-20, overrides=ROLES_OF_GPT)).step()
        for name, row in metrics.refined_coordinate_check(model, reference, tokens[:, :-1]).items():
            effective.setdefault(name, []).append(row["effective"])
    first, hidden, *_, last = param.predict(parameterization, optimizer, "ce").effective
    predicted = {"input": first, "hidden": hidden, "output": last}
    for name, norms in effective.items():
        role = ROLES_OF_GPT[name + ".weight"]
        if role != "vector":
            assert abs(metrics.fit_exponent(widths, norms)[0] - predicted[role]) < 0.2, name


@pytest.mark.parametrize("sizes, words", [
    ({"width": 48}, "width 48 is no multiple of head_dim 32; choose"),
    ({"head_dim": 4}, "head_dim 4 is no multiple of 8.*choose 8"),
    ({"layers": 0}, "at least one: .*layers 0"), ({"vocab_size": 0}, "vocab_size 0"), ({"context": 0}, "context 0"),
    ({"width": -32}, "width -32"), ({"head_dim": 0}, "head_dim 0")])
def test_impossible_gpts_are_refused_with_the_remedy(sizes, words):
    with pytest.raises(ValueError, match=words):
        models.GPT(**{"vocab_size": 23, "width": 64, "layers": 2, "context": 16} | sizes)


def test_more_tokens_than_context_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match="17 tokens exceed context 16; .* context=17"):
        gpt_and_base()[0](some_tokens(2, 17))


# ------------------------------------------------------------------------------------------------------------------
# Models that nobody here wrote

def gpt2(width, tied=False):
    """transformers' GPT-2: Conv1D weights are (fan_in, fan_out), q, k, v are one tensor; heads of 8."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=96, n_positions=16, n_embd=width, n_layer=1, n_head=width // 8, bos_token_id=0,
                                     eos_token_id=0, tie_word_embeddings=tied)
    return transformers.GPT2LMHeadModel(config)


#                         role, init std at width 64 of base 32 under mup, LR under mup with Adam in units of the base LR
GPT2_UNDER_MUP = {"wte": ("input", math.sqrt(2), 1.0), "wpe": ("input", math.sqrt(2), 1.0),
                  "c_attn": ("hidden", math.sqrt(2 / 64), 0.5), "attn.c_proj": ("hidden", math.sqrt(2 / 64), 0.5),
                  "c_fc": ("hidden", math.sqrt(2 / 64), 0.5), "mlp.c_proj": ("hidden", math.sqrt(2 / 256), 0.5),
                  "lm_head": ("output", math.sqrt(2 / 32) / 2, 0.5)}


def test_gpt2_of_transformers_gets_the_tables_roles_stds_and_lrs():
    model, base = gpt2(64), gpt2(32).to("meta")
    param.init_(model, base, "mup", seeded(0))
    roles, plan = param.infer_roles(model, base), param.plan(model, base, "mup", "adam", 0.01)
    lrs = {name: group["lr"] for group in param.param_groups(model, base, "mup", "adam", 0.01) for name in group["names"]}
    matched = []
    for name, p in model.named_parameters():
        key = next((key for key in GPT2_UNDER_MUP if name.endswith(key + ".weight")), None)
        role, std, lr = GPT2_UNDER_MUP.get(key, ("vector", None, 1.0))
        assert (roles[name], lrs[name]) == (role, pytest.approx(0.01 * lr)), name
        if std is None:
            assert p.ndim == 1 and torch.equal(p, torch.full_like(p, float(name.endswith("weight")))), name
        else:
            matched.append(key)
            assert p.std().item() == pytest.approx(std, rel=0.08), name             # 1024 draws at least
            assert re.search(rf"^{re.escape(name)} +\S+ +{role} +2 +{std:.4g} +{0.01 * lr:g} ", plan, re.MULTILINE), name
    assert sorted(matched) == sorted(GPT2_UNDER_MUP)


def test_gpt2_of_transformers_trains_on_those_groups_as_plain_compiled_or_reloaded():
    def numbers(net):
        return [{**group, "params": None, "names": None} for group in param.param_groups(net, base, "mup", "adam", 0.01)]

    model, reloaded, compiled, base = gpt2(64), gpt2(64), torch.compile(gpt2(64)), gpt2(32).to("meta")
    param.init_(model, base, "mup", seeded(0), std={"transformer.wte.weight": 0.1, "transformer.wpe.weight": 0.2})
    param.init_(compiled, base, "mup", seeded(0), std={"transformer.wte.weight": 0.1, "_orig_mod.transformer.wpe.weight": 0.2})
    reloaded.load_state_dict(model.state_dict())
    for other in (reloaded, compiled):
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters())) and numbers(other) == numbers(model)
    optimizer = torch.optim.AdamW(param.param_groups(model, base, "mup", "adam", 0.01, weight_decay=0.1))
    tokens, losses = some_tokens(4, 16), []
    for _ in range(3):
        optimizer.zero_grad()
        losses.append(model(tokens, labels=tokens).loss)
        losses[-1].backward()
        optimizer.step()
    assert losses[2] < losses[1] < losses[0]
    assert all((a != b).any() for a, b in zip(model.parameters(), reloaded.parameters()))


def test_gpt2_of_transformers_with_tied_embeddings_is_refused_with_the_remedy():
    model, base = gpt2(64, tied=True), gpt2(32, tied=True)
    for call in (lambda: param.infer_roles(model, base), lambda: param.init_(model, base, "mup"),
                 lambda: param.param_groups(model, base, "mup", "adam", 0.01),
                 lambda: param.plan(model, base, "mup", "adam", 0.01)):
        with pytest.raises(ValueError, match="wte.weight .* lm_head.weight .* tie_word_embeddings=False"):
            call()


def test_a_convolutional_net_with_batch_norm_trains_on_its_groups_compiled_or_not():
    x, y, losses = torch.randn(8, 3, 8, 8, generator=seeded(1)), torch.arange(8), []
    for wrap in (lambda net: net, lambda net: torch.compile(net, backend="eager")):
        model, base = wrap(Convolutional(32)), Convolutional(16).to("meta")
        param.init_(model, base, "mup", seeded(0))
        optimizer = torch.optim.AdamW(param.param_groups(model, base, "mup", "adam", 0.01))
        losses.append([])
        for _ in range(3):
            optimizer.zero_grad()
            losses[-1].append(F.cross_entropy(model(x), y))
            losses[-1][-1].backward()
            optimizer.step()
    assert losses[0] == losses[1] and losses[0][2] < losses[0][0]


def test_transposed_convolutions_have_their_fan_in_first():
    def decoder(width, groups=1):
        return nn.Sequential(nn.ConvTranspose2d(5, width, 3), nn.ConvTranspose2d(width, 2 * width, 3, groups=groups),
                             nn.ConvTranspose2d(2 * width, 3, 3))
    model = param.init_(decoder(64), decoder(16).to("meta"), "mup", seeded(0))
    assert list(param.infer_roles(model, decoder(16)).values()) == ["input", "vector", "hidden", "vector", "output", "vector"]
    for layer, std in zip(model, (math.sqrt(2 / 45), math.sqrt(2 / (64 * 9)), math.sqrt(2 / (32 * 9)) / 4)):
        assert layer.weight.std().item() == pytest.approx(std, rel=0.05)
    with pytest.raises(ValueError, match="1.weight .* pass overrides"):             # depthwise, (width, 2, 3, 3)
        param.infer_roles(decoder(64, groups=64), decoder(16, groups=16))


@pytest.mark.parametrize("file", ["param.py", "models.py", "metrics.py"])
def test_library_files_import_torch_and_the_standard_library_only(file):
    imported = re.findall(r"^\s*(?:from|import) ([A-Za-z_]+)", (HERE / file).read_text(), re.MULTILINE)
    assert "torch" in imported and set(imported) <= {"torch", *sys.stdlib_module_names}


def test_param_copied_alone_beside_a_transformers_model_works(tmp_path):
    pytest.importorskip("transformers")
    shutil.copy(HERE / "param.py", tmp_path)
    (tmp_path / "use.py").write_text(
        "import importlib.util, torch, transformers, param\n"
        "assert not any(importlib.util.find_spec(name) for name in ('train', 'models', 'metrics'))\n"
        "make = lambda width: transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=96, n_positions=16, n_embd=width,\n"
        "    n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0, tie_word_embeddings=False))\n"
        "model, base = make(32), make(16).to('meta')\n"
        "param.init_(model, base, 'mup')\n"
        "torch.optim.AdamW(param.param_groups(model, base, 'mup', 'adam', lr=0.01))\n"
        "print(param.plan(model, base, 'mup', 'adam', lr=0.01))\n")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "use.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert re.search(r"lm_head.weight +96x32 +output +2 ", done.stdout)


# ------------------------------------------------------------------------------------------------------------------
# The regimes, measured: exponents of the first update against param.predict

def first_step_exponents(parameterization, optimizer, alpha, widths=(128, 256, 512, 1024), seeds=3, hidden_layers=4):
    """Measured width exponents {"effective": [layer], "propagating": [layer]} of one step on multi-index data, n0 = 256.

    The readout starts at a twentieth of its size at every width, and three quarters of a batch are of one class. Neither
    changes an exponent. The first takes away the part that initial logits of order one, shrinking with width in muP,
    have in the softmax's derivative; without the second the classes' updates of the readout cancel but for fluctuations.
    """
    norms = {"effective": [], "propagating": []}
    for seed in range(seeds):
        x, y = train.multi_index(256, seeded(100 + seed))
        chosen = torch.cat([(y == 1).nonzero()[:48], (y == 0).nonzero()[:16]]).squeeze(1)
        x, y = x[chosen], y[chosen]
        for width in widths:
            with torch.device("meta"):
                base = models.MLP(100, 256, hidden_layers, 2)
                roles = param.infer_roles(models.MLP(100, 512, hidden_layers, 2), base)
                model = models.MLP(100, width, hidden_layers, 2)
            model = param.init_(model.to_empty(device="cpu"), base, parameterization, seeded(seed),
                                std={"output": 0.05 * math.sqrt(2 / 256)}, overrides=roles)
            reference = copy.deepcopy(model)
            groups = param.param_groups(model, base, parameterization, optimizer, 0.1 if optimizer == "sgd" else 1e-3, alpha,
                                        eps=1e-12, overrides=roles)
            F.cross_entropy(model(x), y).backward()
            {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimizer](groups).step()
            checked = list(metrics.refined_coordinate_check(model, reference, x).values())
            for kind, rows in norms.items():
                rows.append([row[kind] for row in checked])
    return {kind: [metrics.fit_exponent(widths, np.array(rows).reshape(seeds, len(widths), -1)[..., layer])[0]
                   for layer in range(kind == "propagating", hidden_layers + 1)] for kind, rows in norms.items()}


@pytest.mark.parametrize("parameterization, optimizer, alpha", [
    ("sp", "sgd", 0.0), ("sp", "sgd", 0.25), ("sp", "sgd", 0.5), ("sp", "sgd", 0.75), ("sp", "sgd", 1.0), ("sp", "adam", 1.0),
    ("ntp", "sgd", 0.0), ("mup", "sgd", 0.0), ("sp_full_align", "sgd", 0.0), ("mup", "adam", 0.0)])
def test_first_step_exponents_are_the_predicted_ones(parameterization, optimizer, alpha):
    measured = first_step_exponents(parameterization, optimizer, alpha)

    def errors(alpha):
        predicted = param.predict(parameterization, optimizer, "ce", alpha, hidden_layers=4)
        return {kind: np.array(measured[kind]) - getattr(predicted, kind) for kind in measured}

    right = errors(alpha)
    assert max(np.abs(error).max() for error in right.values()) < 0.15, right
    for wrong in (alpha - 0.25, alpha + 0.25):
        assert min(np.abs(error).min() for error in errors(wrong).values()) > 0.1     # no layer fits the neighbouring exponent
        assert max(np.abs(error).max() for error in errors(wrong).values()) > 0.15


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


@pytest.mark.parametrize("variant", [{"weight_decay": 0.1, "clip": 0.5}, {"bias": True, "param": "mup"}], ids=["clip", "bias"])
def test_wide_layers_under_adam_are_those_of_torch_optim(variant, small_data):
    wide = dict(SMALL, width=300, steps=10, optimizer="adam", dtype="float64", **variant)       # wide enough for the fused kernel
    runs = [dict(wide, lr=lr, seed=seed) for lr in (0.003, 0.001) for seed in (0, 3)]
    for run, row in zip(runs, train.train(runs, small_data[torch.float64])):
        for name, value in alone(run, small_data[torch.float64]).items():
            assert row[name] == pytest.approx(value, rel=1e-10), name


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


GPT_RUN = {"model": "gpt", "width": 32, "base_width": 16, "head_dim": 16, "context": 8, "layers": 1, "steps": 12, "batch_size": 4,
           "val_size": 5, "warmup": 3}


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    """A file of bytes in which the next one mostly follows from the last."""
    generator, path = np.random.default_rng(0), tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes((np.cumsum(generator.choice([1, 1, 1, 5], 4000)) % 64).astype(np.uint8).tobytes())
    return path


@pytest.mark.parametrize("variant", [{}, {"optimizer": "adam", "lr": 0.02}, {"optimizer": "adam", "lr": 0.02, "accumulate": 2, "param": "mup"},
                                     {"optimizer": "adam", "norm_affine": False, "qk_norm": False, "lr": 0.02}], ids=str)
def test_a_gpts_run_is_a_plain_loop_with_torch_optim(variant, text_file):
    run = train.configure({**GPT_RUN, "lr": 0.5, "data": str(text_file), "vocab_size": 256, "dtype": "float64", **variant})
    row, = train.train([run])
    tokens = torch.from_numpy(np.fromfile(text_file, np.uint8).astype(np.int64))
    model, base = (models.GPT(256, width, 1, 8, 16, run["norm_affine"], run["qk_norm"]).double() for width in (32, 16))
    param.init_(model, base, run["param"], seeded(0), gain=1.0)
    groups = param.param_groups(model, base, run["param"], run["optimizer"], run["lr"], weight_decay=run["weight_decay"], eps=run["eps"])
    optimizer = torch.optim.SGD(groups) if run["optimizer"] == "sgd" else torch.optim.AdamW(groups, betas=(0.9, 0.95))
    order, losses = seeded(1), []
    for starts in torch.randint(3600 - 8, (12, 4), generator=order):         # the last tenth of the file validates
        windows = torch.stack([tokens[start:start + 9] for start in starts])
        for group in optimizer.param_groups:
            group["lr"] = train.schedule(len(losses), run) * group["base_lr"]
        loss = F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        if run["clip"]:
            nn.utils.clip_grad_norm_(model.parameters(), run["clip"])
        optimizer.step()
        losses.append(loss.item())
    assert row["final_train_loss"] == pytest.approx(losses[-1], rel=1e-10)
    val = torch.stack([tokens[3600 + start:3609 + start] for start in torch.linspace(0, 400 - 9, 5).long()])
    loss = F.cross_entropy(model(val[:, :-1]).flatten(0, 1), val[:, 1:].flatten())
    assert row["val_loss"] == pytest.approx(loss.item(), rel=1e-10) and row["val_ece"] is None


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_stacked_gpts_are_those_alone_and_bfloat16_is_close(text_file):
    runs = [dict(GPT_RUN, data=str(text_file), lr=lr, seed=seed) for lr in (0.2, 0.5) for seed in (0, 1)]
    together = train.train(runs)
    for run, row in zip(runs, together):
        only, = train.train([run])
        assert row["id"] == only["id"] and row["final_train_loss"] == pytest.approx(only["final_train_loss"], rel=1e-5)
    half, = train.train([dict(runs[0], dtype="bfloat16")])
    assert half["final_train_loss"] != together[0]["final_train_loss"]
    assert half["final_train_loss"] == pytest.approx(together[0]["final_train_loss"], rel=0.02)


def test_a_gpt_learns_the_standard_library_well_below_its_bytes_unigram_entropy():
    row, = train.train([{"model": "gpt", "width": 32, "optimizer": "adam", "lr": 0.03, "steps": 60, "layers": 1}])
    assert 3.0 < row["chance_loss"] < 3.5 and row["val_loss"] < row["chance_loss"] - 0.4, (row["val_loss"], row["chance_loss"])


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


def simulated_cell(centre, edge, generator, seeds=3, curvature=0.03, noise=0.01, jitter=0.3, ks=range(-30, 10), low=3):
    """A parabola in log LR with noisy losses, the optimum and the edge of every seed jittered; loss beyond chance above.
    The LRs begin a factor exp(low) below the optimum."""
    log_lr = np.array([k * math.log(SQRT2) for k in ks])
    own = generator.normal(0, jitter, (2, seeds, 1))
    losses = 0.3 + curvature * (log_lr - centre - own[0]) ** 2 + generator.normal(0, noise, (seeds, len(log_lr)))
    keep = log_lr > centre - low
    losses = np.where(log_lr > edge + own[1], sweep.DIVERGED, losses)[:, keep]
    return {"lr": np.exp(log_lr[keep]), "losses": losses, "accuracies": np.zeros_like(losses), "chance": 9.0}


def searched(cells, ks):
    """Cells with only the LRs that the search would have run, one width after the other."""
    hint, parts, column = None, [], {k: i for i, k in enumerate(ks)}
    for cell in cells:
        known, points = sweep.replay(cell, column, ("chance", 1.0),
                                     lambda known, hint=hint: sweep.wanted(known, -16, 6, "coarse-to-fine", 4, hint))
        assert not points
        hint, ran = sweep.outcome(known)[:2], [column[k] for k in sorted(known)]
        parts.append({**cell, "lr": cell["lr"][ran], "losses": cell["losses"][:, ran], "accuracies": cell["accuracies"][:, ran]})
    return parts


@pytest.mark.parametrize("kind", ["grid", "coarse-to-fine"])
def test_the_95_percent_intervals_cover_the_truth_in_90_to_99_percent_of_simulated_sweeps(kind):
    generator, widths, repetitions, ks = np.random.default_rng(0), [64, 128, 256, 512], 500, range(-32, 23)
    covered, missed_by_half = dict.fromkeys(("optimal", "max_stable"), 0), dict.fromkeys(("optimal", "max_stable"), 0)
    for _ in range(repetitions):
        truth, offset = generator.uniform(-1.2, -0.3), generator.uniform(-0.5, 0.5)
        centres = [offset + truth * math.log(width / 64) for width in widths]
        if kind == "grid":
            cells = [simulated_cell(centre, centre + 1.5, generator) for centre in centres]
        else:
            cells = searched([simulated_cell(centre, centre + 1.5, generator, ks=ks, low=math.inf) for centre in centres], ks)
        fits, _ = sweep.exponents_of(cells, widths, ("chance", 1.0), resamples=400)
        for name, (_, (low, high)) in fits.items():
            covered[name] += low <= truth <= high
            missed_by_half[name] += low <= truth - 0.5 <= high
    for name in covered:
        assert 0.90 <= covered[name] / repetitions <= 0.99, (name, covered[name])
        assert missed_by_half[name] / repetitions < 0.2         # and it is no interval that covers everything


def test_a_resample_that_is_stable_up_to_the_highest_lr_has_its_edge_above_it():
    def cell(*top):
        losses = np.array([[0.5, 0.4, 0.3, value] for value in top])
        return {"lr": 2.0 ** (np.arange(4) / 2), "losses": losses, "accuracies": 0 * losses, "chance": 9.0}

    both, one = cell(sweep.DIVERGED, sweep.DIVERGED), cell(sweep.DIVERGED, 0.35)
    # Half a step at either width, in slopes of 1/2 a step: the grid's part. A quarter of the resamples has the stable seed twice:
    # a step, widened by sqrt(2), on top of it.
    for second, reach in ((both, 0.39), (one, 0.5 * math.sqrt(2) + 0.3)):
        fits, _ = sweep.exponents_of([both, second], [64, 128], ("chance", 1.0))
        slope, (low, high) = fits["max_stable"]
        assert slope == pytest.approx(0.0) and high == pytest.approx(reach, abs=0.05) and low == pytest.approx(-0.39, abs=0.05)


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
            full, coarse = search("grid", cell_at, -16, 6, hint), search("coarse-to-fine", cell_at, -16, 6, hint)
            assert full[0] >= 23        # a grid is a grid, whatever the narrower widths found
            assert abs(full[1] - coarse[1]) <= 1 and abs(full[2] - coarse[2]) <= 1
            runs["grid"] += full[0]
            runs["coarse-to-fine"] += coarse[0]
            hint = coarse[1:]
    assert runs["coarse-to-fine"] <= 0.35 * runs["grid"]


def test_a_search_finds_its_way_from_any_hint_also_where_all_is_unstable():
    generator = np.random.default_rng(0)
    for _ in range(100):
        optimum, gap = generator.uniform(-12, 3), generator.uniform(0.5, 6)
        far = generator.normal(0, 0.1, 100)         # above the edge losses are finite, without order, and not stable

        def cell_at(k):
            return (0.3 + 0.01 * (k - optimum) ** 2, True) if k < optimum + gap else (5 + far[k + 50], False)
        full = search("grid", cell_at, -16, 6)
        for off in (-12, -5, -1, 3, 8, 15):
            hint = full[1] + off, full[1] + off + generator.integers(-1, 6)
            found = search("coarse-to-fine", cell_at, -16, 6, hint)
            assert abs(full[1] - found[1]) <= 1 and abs(full[2] - found[2]) <= 1


def rows_on(landscape, runs, failed=lambda width, k: False):
    """Result rows of runs whose loss and divergence landscape(width, k) gives as (loss, stable); failed: out of memory."""
    rows = {}
    for run in runs:
        width, k = run["width"], round(2 * math.log2(run["lr"]))
        loss, stable = landscape(width, k)
        row = {**run, "id": train.run_id(run), "failed": "out of memory" if failed(width, k) else None, "chance_loss": 9.0,
               "diverged_at": None if stable else 1, "final_train_loss": loss if stable else None, "train_accuracy": 0.0,
               **dict.fromkeys(train.VALIDATION)}
        rows[row["id"]] = row
    return rows


def swept_landscape(landscape, *flags, failed=lambda width, k: False):
    """([widths asked for in each round], {width: LRs of its rows as lattice points}) of a whole search on a landscape."""
    args, given, curves = sweep.parse(["--widths", "8", "16", "32", "--base-width", "8", "--seeds", "2", "--loss", "ce", *flags])
    rounds, rows = [], {}
    while missing := sweep.missing_runs(args, given, curves, rows):
        rounds.append(sorted({run["width"] for run in missing}))
        rows.update(rows_on(landscape, missing, failed))
    points = {width: {round(2 * math.log2(row["lr"])) for row in rows.values() if row["width"] == width} for width in args["widths"]}
    return rounds, points


def test_a_width_is_searched_around_what_the_narrower_one_ended_with():
    def landscape(width, k):
        edge = {8: -1, 16: -3, 32: -5}[width]
        return 0.3 + 0.01 * (k - edge + 2) ** 2, k <= edge

    rounds, points = swept_landscape(landscape)
    assert [len(of_round) for of_round in rounds] == [1] * len(rounds) and rounds == sorted(rounds)
    assert points[8] >= set(range(-16, 7, sweep.COARSE)) and points[8] >= {-4, -3, -2, -1, 0}
    assert points[16] == {-5, -4, -3, -2, 0} | {-6} and points[32] == {-7, -6, -5, -4, -2} | {-8}      # around the last, a step down
    rounds, points = swept_landscape(landscape, "--search", "grid")
    assert rounds == [[8, 16, 32]] and points[8] == points[16] == points[32] == set(range(-16, 7))


def test_the_progress_line_tells_the_time_left_from_what_runs_took(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    args, given, curves = sweep.parse(["--widths", "8", "16", "32", "--base-width", "8", "--seeds", "2", "--loss", "ce", "--search", "grid"])
    clock, rows = [0.0], {}
    monkeypatch.setattr(sweep.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(sys, "stderr", Terminal())
    report = sweep.progress_line(args, given, curves, rows)
    for i in range(46 + 23):            # all of width 8 at a second each, half of width 16 at three: 2 s pass for each
        rows[i] = {"width": 8 if i < 46 else 16, "seconds": 1.0 if i < 46 else 3.0}
    clock[0] = 2.0 * (46 + 3 * 23)
    report(16)
    size = {width: train.replica_size(sweep.runs_of(given, curves[0], width, 1.0, 1)[0])[0] for width in (16, 32)}
    left = 2 * 3.0 * (23 + 46 * size[32] / size[16])
    assert sys.stderr.getvalue().strip() == f"69/138 runs, width 16, 0.3 runs/s, {left // 60:.0f}:{left % 60:02.0f} left"


@pytest.mark.parametrize("failed, stable", [
    (lambda width, k: width == 8, True), (lambda width, k: width == 8 and k == -5, True), (lambda width, k: False, False)],
    ids=["out of memory", "a later point out of memory", "nothing stable"])
def test_a_width_without_an_outcome_gives_no_hint(failed, stable):
    _, points = swept_landscape(lambda width, k: (0.3 + 0.01 * (k + 4) ** 2, k <= -2 and (width > 8 or stable)), failed=failed)
    assert points[16] >= set(range(-16, 7, sweep.COARSE)) and {-5, -4, -3, -2, -1} <= points[16]
    assert points[32] == {-6, -5, -4, -3, -2, -1}


def test_a_hint_where_nothing_is_stable_asks_for_no_more_than_the_grid():
    known, points = {}, {None}
    while points:
        points = sweep.wanted(known, -16, 6, "coarse-to-fine", sweep.EXTENSIONS, hint=(-3, -3))
        known.update((k, (5 + 0.01 * (k + 9) ** 2, False)) for k in points)
    assert min(known) == -16 and len(known) <= 23


def test_a_hint_far_above_the_edge_finds_down_under_a_criterion_relative_to_the_best():
    generator = np.random.default_rng(0)
    for _ in range(50):
        ks = range(-60, 40)
        losses = np.array([[2.3 + 0.01 * (k + 9) ** 2 if k <= -6 else 6 + generator.normal(0, 0.2) for k in ks]])
        cell = {"lr": 2.0 ** (np.array(ks) / 2), "losses": losses, "accuracies": 0 * losses, "chance": 3.2}
        known, _ = sweep.replay(cell, {k: i for i, k in enumerate(ks)}, ("best+1", 1.0),
                                lambda known: sweep.wanted(known, -16, 6, "coarse-to-fine", 4, (0, 1), 3.2))
        assert sweep.outcome(known) == (-9, -6, -5)


@pytest.mark.parametrize("kind", ["grid", "coarse-to-fine"])
def test_the_search_ends_with_the_same_points_wherever_it_was_cut_and_whatever_else_is_there(kind):
    generator = np.random.default_rng(0)

    def finish(landscape, done, cut=False):
        while True:
            ks = sorted(done)
            losses = np.array([[landscape[k] for k in ks]])
            cell = {"lr": 2.0 ** (np.array(ks) / 2), "losses": losses, "accuracies": 0 * losses, "chance": 9.0}
            known, points = sweep.replay(cell, {k: i for i, k in enumerate(ks)}, ("best+1", 1.0),
                                         lambda known: sweep.wanted(known, -16, 6, kind, sweep.EXTENSIONS))
            missing = sorted(points - done)
            if not missing:
                return set(known)
            done |= set(generator.choice(missing, generator.integers(1, len(missing) + 1), replace=False).tolist() if cut else missing)

    for _ in range(40):
        optimum, edge = generator.uniform(-20, 8), generator.uniform(1, 5)
        landscape = {k: 0.3 + 0.01 * (k - optimum) ** 2 + generator.normal(0, 0.05) if k < optimum + edge else sweep.DIVERGED
                     for k in range(-100, 100)}
        whole = finish(landscape, set())
        assert finish(landscape, set(), cut=True) == whole
        assert finish(landscape, {-17, -5, -3, 0, 2, 30}, cut=True) == whole


def test_a_grid_grows_where_the_optimum_lies_outside():
    for kind in ("grid", "coarse-to-fine"):
        for optimum in (-30, 14):
            runs, best, edge = search(kind, lambda k: (abs(k - optimum) + 0.1, k < optimum + 3), -16, 6)
            assert best == optimum and edge == optimum + 2
        assert search(kind, lambda k: (-k, True), -4, 4)[0] < 100       # no bound at all: it ends
        runs, best, _ = search(kind, lambda k: (abs(k - 3.3), True), -16, 6)
        assert best == 3        # refined although nothing is unstable
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


def test_lines_of_loss_against_lr_stop_where_the_search_left_a_gap(swept):
    summary = json.loads((swept[0] / "summary.json").read_text())
    summary["rows"] = summary["rows"][:1]
    for curve, lr in zip(summary["rows"][0]["curves"], ([0.01, 0.02, 0.04, 1.0, 2.0], [0.01, 0.1, 1.0])):
        curve.update(lr=lr, train_loss=[[0.5] * len(lr)] * 2)
    figure = plots.lr_transfer(summary)
    lines = [line.get_xdata().tolist() for line in figure.axes[0].get_lines() if line.get_marker() == "o" and len(line.get_xdata())]
    assert lines == [[0.01, 0.02, 0.04], [1.0, 2.0], [0.01, 0.1, 1.0]]      # evenly spaced, however wide: no gap
    plots.plt.close(figure)


def test_a_sweep_prints_predictions_beside_measurements_and_writes_its_files(swept):
    out, done = swept
    assert done.returncode == 0, done.stderr
    for words in ("predicted", "max-stable", "optimal", "-0.50", "-1.00"):
        assert words in done.stdout
    summary = json.loads((out / "summary.json").read_text())
    assert [row["predicted_max_stable_exponent"] for row in summary["rows"]] == [-0.5, -1.0]
    assert summary["runs"] == len((out / "runs.jsonl").read_text().splitlines()) and "sweep.py" in summary["command"]
    for name in ("lr_transfer", "exponents", "optimal_lr"):
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
    flags = [part for name in train.SETTINGS if not isinstance(row[name], bool) for part in (f"--{name.replace('_', '-')}", row[name])]
    alone_row = json.loads(run_script("train.py", *flags).stdout)
    assert results(alone_row) == results(row)


def test_runs_that_coincide_at_the_base_width_are_trained_once(tmp_path, monkeypatch):
    trained, real = [], train.train
    monkeypatch.setattr(train, "train", lambda runs, *args, **kwargs: trained.extend(runs) or real(runs, *args, **kwargs))
    flags = [*TINY[:TINY.index("--seeds")], "--seeds", "1", "--lrs", "0.1", "--param", "sp", "mup", "--loss", "ce"]
    assert run_script("sweep.py", *flags, "--out", tmp_path, "--no-plots").returncode == 0
    rows = {(row["width"], row["param"]): row for row in sweep.read_rows(tmp_path).values()}
    assert len(rows) == 4 and [(run["width"], run["param"]) for run in trained] == [(8, "sp"), (16, "sp"), (16, "mup")]
    alone_row, = real([{name: rows[8, "mup"][name] for name in train.SETTINGS}])
    assert results(alone_row) == results(rows[8, "mup"])


def test_tracked_norms_are_those_of_the_run_alone(small_data):
    run, tracked = dict(SMALL, lr=0.3, steps=1, seed=3, dtype="float64"), []
    train.train([dict(run, lr=0.1), run], small_data[torch.float64], track=1, tracked=tracked)
    splits = small_data[torch.float64]
    base = models.MLP(100, 16, 2, 2)
    model = param.init_(models.MLP(100, 24, 2, 2).double(), base, "sp", seeded(3))
    reference = copy.deepcopy(model)
    index = torch.randint(len(splits.x), (16,), generator=seeded(4))
    F.cross_entropy(model(splits.x[index]), splits.y[index]).backward()
    torch.optim.SGD(param.param_groups(model, base, "sp", "sgd", 0.3)).step()
    model.zero_grad()
    expected = metrics.refined_coordinate_check(model, reference, splits.x_val[:16])
    F.cross_entropy(model(splits.x_val[:16]), splits.y_val[:16]).backward()
    mine = [row for row in tracked if row["id"] == train.run_id(train.configure(run))]
    assert [row["module"] for row in mine] == [*expected, ""]
    for row in mine[:-1]:
        assert {key: row[key] for key in expected[row["module"]]} == pytest.approx(expected[row["module"]], rel=1e-5)
        assert row["gradient"] == pytest.approx(model.get_submodule(row["module"]).weight.grad.norm().item(), rel=1e-5)
    assert np.shape(mine[-1]["softmax"]) == (16, 2)


def test_a_tracked_sweep_sets_measured_exponents_beside_predicted_ones(tmp_path):
    flags = [*TINY[:TINY.index("--lr-range")], "--steps", "25", "--lrs", "0.1", "--alpha", "0", "0.5", "1", "--track", "10", "--loss", "ce"]
    done = run_script("sweep.py", *flags, "--out", tmp_path, "--no-plots")
    assert done.returncode == 0 and "measured (predicted)" in done.stdout, done.stderr
    plots.draw(tmp_path, ["regimes", "limit"])
    tracks = sweep.read_rows(tmp_path, "track*.jsonl")
    assert sorted({step for _, step, _ in tracks}) == [*range(1, 21), 25]
    assert len(tracks) == 12 * 21 * 4       # runs, steps, three modules and the logits
    updates = json.loads((tmp_path / "summary.json").read_text())["updates"]
    assert {entry["kind"] for entry in updates} == {"effective", "propagating", "features", "logits"}
    assert all(entry["exponent"] is not None for entry in updates if entry["step"] == 1 and (entry["kind"], entry["layer"]) != ("propagating", 0))
    assert (tmp_path / "figures" / "regimes.png").exists() and (tmp_path / "figures" / "limit.png").exists()


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
    ("sweep.py", ["--width", "64"], "--width"),
    ("sweep.py", ["--track", "-1"], "track is -1"),
    ("train.py", ["--track", "5"], "--out DIR"),
    ("sweep.py", ["--out", "/dev/null/x"], "/dev/null"),
    ("train.py", ["--width", "-4"], "width is -4"),
    ("train.py", ["--steps", "0"], "steps is 0"),
    ("train.py", ["--warmup", "300"], "longer than the run"),
    ("train.py", ["--batch-size", "30000"], "batch_size is 30000"),
    ("train.py", ["--momentum", "1"], "momentum is 1.0"),
    ("train.py", ["--device", "cuda:99"], "not there"),
    ("train.py", ["--seed", "x"], "invalid int"),
    ("plots.py", ["/nonexistent"], "run python sweep.py"),
    ("plots.py", [], "usage: python plots.py"),
    ("sweep.py", ["--widths"], "--widths: expected at least one"),
    ("sweep.py", ["--widths", "8", "-8"], "width is -8"),
    ("sweep.py", ["--widths", "99999999999999999999"], "from 1 to 2^31 - 1"),
    ("sweep.py", ["--widths", "nan"], "--widths: invalid int"),
    ("sweep.py", ["--widths", "2000000000"], "out of memory; use a smaller width"),
    ("sweep.py", ["--base-width", "0"], "base_width is 0"),
    ("sweep.py", ["--seeds", "-1"], "seeds is -1"),
    ("sweep.py", ["--seeds", "two"], "--seeds: invalid int"),
    ("sweep.py", ["--lrs", "0"], "lr is 0.0; it must be a positive number"),
    ("sweep.py", ["--lrs", "inf"], "lr is inf"),
    ("sweep.py", ["--lrs", "tenth"], "--lrs: invalid float"),
    ("sweep.py", ["--lrs", "0.1", "--lr-range", "0.1", "1"], "give one of them"),
    ("sweep.py", ["--lr-range", "nan", "1"], "lr-range is [nan, 1.0]"),
    ("sweep.py", ["--lr-range", "0", "1"], "two positive numbers"),
    ("sweep.py", ["--lr-range", "1"], "--lr-range: expected 2"),
    ("sweep.py", ["--lr-step", "1.0000000000000002"], "from 1.01 to 1000"),
    ("sweep.py", ["--lr-step", "nan"], "lr-step is nan"),
    ("sweep.py", ["--lr-step", "inf"], "lr-step is inf"),
    ("sweep.py", ["--stable-if", "chance=nan"], "must be a number"),
    ("sweep.py", ["--stack", "0"], "stack is '0'; it must be auto or a whole number"),
    ("sweep.py", ["--stack", "²"], "stack is '²'; it must be auto or a whole number"),
    ("sweep.py", ["--scale", "gpu"], "choose from 'cpu', 'paper'"),
    ("sweep.py", ["--optimizer", "lion"], "one of sgd, adam"),
    ("sweep.py", ["--model", "resnet"], "one of mlp, gpt"),
    ("sweep.py", ["--trainable", "nothing"], "one of all, readout"),
    ("sweep.py", ["--activation", "gelu"], "activation is 'gelu'"),
    ("sweep.py", ["--dtype", "float16"], "one of float32"),
    ("sweep.py", ["--decay", "linear"], "one of none, cosine"),
    ("sweep.py", ["--hidden-layers", "0"], "hidden_layers is 0"),
    ("sweep.py", ["--alpha", "5000"], "a number from -10 to 10"),
    ("sweep.py", ["--alpha", "nan"], "alpha is nan"),
    ("sweep.py", ["--device", "cpu:"], "choose auto, cpu, cuda"),
    ("sweep.py", ["--device", "cuda:x"], "choose auto, cpu, cuda"),
    ("sweep.py", ["--track", "often"], "--track: invalid int"),
    ("sweep.py", ["--wdiths", "8"], "unrecognized arguments: --wdiths"),
    ("sweep.py", ["--loss", "ce", "hinge"], "loss is 'hinge'"),
    ("sweep.py", ["--data", ""], "data is ''"),
    ("sweep.py", ["--model", "gpt", "--widths", "32", "48"], "width is 48; for model gpt it must be a multiple of head_dim = 32"),
    ("sweep.py", ["--model", "gpt", "--base-width", "40"], "base_width is 40; for model gpt it must be a multiple"),
    ("sweep.py", ["--model", "gpt", "--head-dim", "12", "--widths", "24", "--base-width", "24", "--val-size", "1"], "choose 8, 16, 32"),
    ("sweep.py", ["--model", "gpt", "--data", "mnist"], "a file or folder of text"),
    ("sweep.py", ["--model", "gpt", "--data", "nowhere.txt"], "no file or folder; choose stdlib"),
    ("train.py", ["--model", "gpt", "--context", "0"], "context is 0"),
    ("train.py", ["--model", "gpt", "--layers", "0"], "layers is 0"),
    ("train.py", ["--model", "gpt", "--head-dim", "0"], "head_dim is 0"),
    ("train.py", ["--model", "gpt", "--context", "99999999"], "context 99999999 needs more"),
    ("train.py", ["--model", "gpt", "--vocab-size", "100"], "outside the vocabulary of 100"),
    ("train.py", ["--model", "gpt", "--vocab-size", "-1"], "vocab_size is -1"),
    ("train.py", ["--widths", "8"], "unrecognized arguments: --widths"),
    ("train.py", ["--steps", "1e3"], "--steps: invalid int"),
    ("train.py", ["--steps", "2000000000", "--batch-size", "20000"], "out of memory; use a smaller width, batch size, number of steps"),
    ("train.py", ["--lr", "0"], "lr is 0.0"),
    ("train.py", ["--batch-size", "0"], "batch_size is 0"),
    ("train.py", ["--batch-size", "64", "--accumulate", "3"], "a multiple of accumulate = 3"),
    ("train.py", ["--accumulate", "0"], "accumulate is 0"),
    ("train.py", ["--train-size", "0"], "train_size is 0"),
    ("train.py", ["--val-size", "0"], "val_size is 0"),
    ("train.py", ["--seed", "-1"], "seed is -1"),
    ("train.py", ["--seed", "9223372036854775807"], "seed is 9223372036854775807"),
    ("train.py", ["--data-seed", "-1"], "data_seed is -1"),
    ("train.py", ["--weight-decay", "-0.1"], "weight_decay is -0.1"),
    ("train.py", ["--clip", "nan"], "clip is nan"),
    ("train.py", ["--beta1", "1"], "beta1 is 1.0"),
    ("train.py", ["--beta2", "-1"], "beta2 is -1.0"),
    ("train.py", ["--eps", "0"], "eps is 0.0"),
    ("train.py", ["--warmup", "-1"], "warmup is -1"),
    ("train.py", ["--readout-scale", "-1"], "readout_scale is -1.0"),
    ("train.py", ["--checkpoint", "5"], "--out DIR"),
    ("train.py", ["--checkpoint", "-1"], "checkpoint is -1"),
    ("train.py", ["--out", "/dev/null/x"], "cannot be made a folder"),
    ("train.py", ["--out", "/proc/x"], "cannot be made a folder"),
    ("train.py", ["--device", "gpu"], "choose auto, cpu, cuda"),
])
def test_bad_input_ends_with_one_line_and_exit_code_2(script, flags, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run_script(script, *flags)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and words in done.stderr, done.stderr
    assert not done.stdout and not list(tmp_path.rglob("*.*"))


def test_scripts_end_the_same_way_from_a_shell(tmp_path):
    calls = [[sys.executable, HERE / script, flag, "nan"] for script, flag in
             (("sweep.py", "--lr-step"), ("train.py", "--lr"), ("plots.py", "--figure"))]
    for call in [subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path) for call in calls]:
        out, err = call.communicate()
        assert call.returncode == 2 and len(err.splitlines()) == 1 and not out, err


def test_a_contradicting_or_damaged_result_folder_is_refused(swept, tmp_path):
    out, _ = swept
    done = run_script("sweep.py", *TINY, "--steps", "21", "--out", out)
    assert done.returncode == 2 and "steps = 20, not 21" in done.stderr
    (tmp_path / "runs.jsonl").write_text("{}\n")
    done = run_script("sweep.py", *TINY, "--out", tmp_path)
    assert done.returncode == 2 and "runs.jsonl:1" in done.stderr


# ------------------------------------------------------------------------------------------------------------------
# Faults: text files, downloads, cut files, memory, interruptions. Those that need processes to kill: .ci/test_faults.py

def write_bin(path, tokens, shard=False, magic=20240520, version=1, count=None):
    """A .bin file of uint16 tokens: nanoGPT's, or with llm.c's header."""
    header = struct.pack("<256i", magic, version, len(tokens) if count is None else count, *[0] * 253) if shard else b""
    path.write_bytes(header + np.asarray(tokens, "<u2").tobytes())


def tokens_of(splits):
    """The whole training stream, read as windows of one token."""
    return splits.x.windows(torch.arange(len(splits.x)), 1).flatten().numpy()


def test_windows_of_a_text_file_are_slices_of_its_bytes_and_its_last_tenth_validates(tmp_path):
    content = np.random.default_rng(0).integers(0, 256, 1003, dtype=np.uint8)
    content.tofile(tmp_path / "text")
    splits = train.load_text(str(tmp_path / "text"), context=8, val_size=7)
    assert splits.classes == 256 and (tokens_of(splits) == content[:903]).all()
    starts = torch.tensor([[0, 5], [894, 17]])
    assert (splits.x.windows(starts, 9).numpy() == [[content[s:s + 9] for s in row] for row in starts.tolist()]).all()
    val_starts = [int(s) for s in torch.linspace(0, 100 - 9, 7).long()]
    assert (splits.x_val.numpy() == [content[903 + s:903 + s + 8] for s in val_starts]).all()
    assert (splits.y_val.numpy() == [content[903 + s + 1:903 + s + 9] for s in val_starts]).all()


def test_of_a_folder_of_text_every_tenth_file_validates_and_windows_run_across_files(tmp_path):
    texts = [bytes([65 + i]) * (3 + i) for i in range(21)]
    (tmp_path / "b").mkdir()
    for i, text in enumerate(texts):
        (tmp_path / ("b" if i > 12 else "") / f"{i:02}.txt").write_bytes(text)
    (tmp_path / ".hidden").write_bytes(b"not read"), (tmp_path / "07.empty").write_bytes(b"")
    splits = train.load_text(str(tmp_path), context=4)
    stream = np.frombuffer(b"".join(text for i, text in enumerate(texts) if i not in (9, 19)), np.uint8)
    assert (tokens_of(splits) == stream).all() and len(splits.x) == len(stream)
    windows = splits.x.windows(torch.arange(len(stream) - 19), 20).numpy()          # most span several files
    assert (windows == np.lib.stride_tricks.sliding_window_view(stream, 20)).all()
    assert set(splits.x_val.flatten().tolist()) == {65 + 9, 65 + 19}


def test_windows_run_across_shards_and_the_vocabulary_is_found_given_or_refused(tmp_path):
    generator = np.random.default_rng(1)
    shards = [generator.integers(0, 5000, size) for size in (40, 0, 3, 200)]
    for i, tokens in enumerate(shards):
        write_bin(tmp_path / f"fineweb_train_{i:06}.bin", tokens, shard=True)
    write_bin(tmp_path / "fineweb_val_000000.bin", [4999, *range(60)], shard=True)
    splits, stream = train.load_text(str(tmp_path), context=16), np.concatenate(shards)
    assert splits.classes == 5000 and (tokens_of(splits) == stream).all()
    windows = splits.x.windows(torch.arange(len(stream) - 16), 17).numpy()
    assert (windows == np.lib.stride_tricks.sliding_window_view(stream, 17)).all()
    assert train.load_text(str(tmp_path), context=16, vocab_size=50304).classes == 50304
    with pytest.raises(ValueError, match="outside the vocabulary of 4999; give --vocab-size, or 0"):
        train.load_text(str(tmp_path), context=16, vocab_size=4999)
    small = train.load_text(str(tmp_path), context=16, vocab_size=5000)
    small.x.vocabulary = int(stream.max())          # a token that only the training files hold
    with pytest.raises(ValueError, match=f"token {stream.max()} in .*fineweb_train"):
        tokens_of(small)


def test_a_nanogpt_bin_file_is_uint16_without_a_header(tmp_path):
    tokens = np.random.default_rng(2).integers(0, 50257, 500)
    write_bin(tmp_path / "train.bin", tokens)
    write_bin(tmp_path / "val.bin", tokens[:50])
    splits = train.load_text(str(tmp_path), context=8)
    assert (tokens_of(splits) == tokens).all() and splits.classes == tokens.max() + 1
    assert (train.load_text(str(tmp_path / "train.bin"), context=8).x.windows(torch.tensor([3]), 8).numpy() == tokens[3:11]).all()
    counts = np.bincount(tokens, minlength=splits.classes) / 500
    assert np.allclose(splits.x.frequencies.numpy(), counts) and train.chance_loss("ce", splits.x, splits.classes) == pytest.approx(
        -(counts[counts > 0] * np.log(counts[counts > 0])).sum())


@pytest.mark.parametrize("name", ["text", "tokens.bin"])
def test_of_a_file_larger_than_memory_only_the_windows_asked_for_are_read(tmp_path, name):
    with open(tmp_path / name, "wb") as file:       # sparse: it takes no room on the disk, but would in memory
        file.truncate(2 ** 40)
        file.seek(2 ** 39)
        file.write(np.arange(64, dtype="u1" if name == "text" else "<u2").tobytes())
    splits = train.load_text(str(tmp_path / name), context=32, vocab_size=256)
    start = 2 ** 39 if name == "text" else 2 ** 38
    assert (splits.x.windows(torch.tensor([start]), 64).numpy() == np.arange(64)).all()
    assert train.chance_loss("ce", splits.x, 256) == 0.0        # of the first 16M tokens, all zero


def test_at_one_seed_every_width_and_lr_reads_the_same_tokens(monkeypatch):
    seen, windows = {}, train.Tokens.windows
    for width, lr, seed in ((8, 0.1, 0), (16, 0.1, 0), (8, 0.3, 0), (8, 0.1, 1)):
        config = train.configure(dict(TINY_GPT, width=width, lr=lr, seed=seed))
        splits, read = train.load_splits(config, None, "cpu"), seen.setdefault((width, lr, seed), [])
        with monkeypatch.context() as patch:
            patch.setattr(train.Tokens, "windows", lambda self, starts, length: read.append(starts.tolist()) or windows(self, starts, length))
            train.train([config], splits)
    assert len(seen[8, 0.1, 0]) == TINY_GPT["steps"]
    assert seen[8, 0.1, 0] == seen[16, 0.1, 0] == seen[8, 0.3, 0] != seen[8, 0.1, 1]


TINY_GPT = dict(model="gpt", width=16, base_width=8, head_dim=8, layers=1, context=8, steps=7, batch_size=4, val_size=4, warmup=2, lr=0.1,
                data=__file__)


@pytest.fixture
def mirror(monkeypatch):
    """A web server on the loopback, serving files[name]; of those in `cut` it sends half and hangs up."""
    files, cut = {}, set()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.rpartition("/")[2]
            if name not in files:
                return self.send_error(404)
            self.send_response(200)
            self.send_header("Content-Length", str(len(files[name])))
            self.end_headers()
            self.wfile.write(files[name][:len(files[name]) // 2] if name in cut else files[name])

        def log_message(self, *args):
            pass

    monkeypatch.setenv("no_proxy", "*")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/"

        def publish(name, packed, md5=None, url=url):
            files.update(packed)
            sums = {file: md5 or hashlib.md5(content).hexdigest() for file, content in packed.items()}
            monkeypatch.setitem(train._FILES, name, (train._FILES[name][0], url, sums, ()))
        yield SimpleNamespace(publish=publish, cut=cut)
        server.shutdown()


def zipped_mnist(folder):
    folder.mkdir()
    write_mnist(folder, zipped=True)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def archive(members):
    """A .tar.gz of (TarInfo or name, bytes)."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for info, content in members:
            info = tarfile.TarInfo(info) if isinstance(info, str) else info
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return packed.getvalue()


def link(name, target, kind):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_downloads_with_the_right_checksum_are_used_and_kept(tmp_path, mirror):
    mirror.publish("mnist", zipped_mnist(tmp_path / "source"))
    first = train.load_data("mnist", tmp_path / "data")
    mirror.publish("mnist", {}, url="http://127.0.0.1:1/")      # not asked again
    assert torch.equal(first.x, train.load_data("mnist", tmp_path / "data").x)
    assert sorted(path.name for path in (tmp_path / "data").rglob("*.*")) == sorted(f"{name}.gz" for name in train._IDX)


@pytest.mark.parametrize("fault, words", [("wrong checksum", "has MD5"), ("cut", "IncompleteRead"), ("refused", "refused"), ("absent", "404")])
def test_a_failed_download_leaves_one_line_and_no_file(tmp_path, mirror, fault, words):
    files = zipped_mnist(tmp_path / "source")
    mirror.publish("mnist", {} if fault == "absent" else files, "0" * 32 if fault == "wrong checksum" else None,
                   **({"url": "http://127.0.0.1:1/"} if fault == "refused" else {}))
    if fault == "cut":
        mirror.cut.update(files)
    if fault == "absent":
        train._FILES["mnist"][2].update(dict.fromkeys(files, "0" * 32))
    done = run_script("train.py", "--data", "mnist", "--data-dir", tmp_path / "data")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and words in done.stderr and "--data-dir" in done.stderr, done.stderr
    assert not list((tmp_path / "data").rglob("*.*"))


def test_a_hostile_archive_writes_nothing_outside_its_folder_and_is_never_unpickled(tmp_path, mirror, monkeypatch):
    monkeypatch.chdir(tmp_path)
    secret, record = tmp_path / "secret", np.full(3073, 7, np.uint8).tobytes()
    secret.write_bytes(record)

    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "executed"), "w")

    hostile = [("../../evil", b"x"), (str(tmp_path / "absolute"), b"x"), ("data_batch_1", pickle.dumps(Evil())),
               (link("data_batch_2.bin", str(secret), tarfile.SYMTYPE), b""), (link("data_batch_3.bin", "../../secret", tarfile.LNKTYPE), b""),
               (link("x/test_batch.bin", "/dev/zero", tarfile.CHRTYPE), b"")]
    good = [(f"../cifar/{name}", record) for name in train._CIFAR]      # known by name: kept, in the folder
    mirror.publish("cifar10", {"cifar-10-binary.tar.gz": archive(hostile + good)})
    splits = train.load_data("cifar10", tmp_path / "a" / "b" / "data")
    assert splits.x.shape == (5, 3072) and splits.y.tolist() == [7] * 5
    here = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if not path.is_dir()}
    assert here == {"secret", *(f"a/b/data/cifar10/{name}" for name in train._CIFAR)}
    assert not any(path.is_symlink() for path in tmp_path.rglob("*")) and not (tmp_path / "executed").exists()
    mirror.publish("cifar10", {"cifar-10-binary.tar.gz": archive(hostile)})
    done = run_script("train.py", "--data", "cifar10", "--data-dir", tmp_path / "c")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "data_batch_1.bin" in done.stderr, done.stderr


def test_a_last_line_cut_at_any_byte_is_dropped_with_a_word_and_the_rows_before_it_stay(swept, tmp_path, capsys):
    lines = (swept[0] / "runs.jsonl").read_bytes().splitlines(keepends=True)[:2]
    content, ids, path = b"".join(lines), [json.loads(line)["id"] for line in lines], tmp_path / "runs.jsonl"
    for cut in range(len(content) + 1):
        path.write_bytes(content[:cut])
        rows, whole = list(sweep.read_rows(tmp_path)), content[:cut].count(b"\n")
        kept = b"".join(lines[:whole])
        assert rows == ids[:whole] and path.read_bytes() == kept
        assert ("dropped a half-written last line" in capsys.readouterr().err) == (len(kept) < cut)


@pytest.mark.parametrize("garbage", [b"\x00" * 30, b"{", b"[1]", b"null", b"", b"\xff\xfe", b'{"id": 1', b'"id"', b'{"lr": 0.1}'])
def test_garbage_between_rows_is_refused_with_its_file_and_line(swept, tmp_path, garbage):
    first, second = (swept[0] / "runs.jsonl").read_bytes().splitlines(keepends=True)[:2]
    (tmp_path / "runs-rank1.jsonl").write_bytes(first + garbage + b"\n" + second)
    with pytest.raises(ValueError, match="runs-rank1.jsonl:2 is not a result row; remove that line"):
        sweep.read_rows(tmp_path)
    assert (tmp_path / "runs-rank1.jsonl").read_bytes() == first + garbage + b"\n" + second


FEW = [*TINY[:TINY.index("--lr-range")], "--lrs", "0.1", "0.2", "0.4", "--loss", "ce", "--steps", "8", "--no-plots"]

def first_bytes(path, count):
    path.write_bytes(path.read_bytes()[:count])


def mnist(spoil, zipped=False):
    def prepare(folder, _):
        write_mnist(folder, zipped=zipped)
        spoil(folder)
        return "train.py", ["--data", "mnist", "--data-dir", folder]
    return prepare


def cifar(size=3, label=3, without=None):
    def prepare(folder, _):
        for name in train._CIFAR:
            (folder / name).write_bytes(bytes([label, *bytes(3072)]) * size)
        if without:
            (folder / without).unlink()
        else:
            first_bytes(folder / "data_batch_5.bin", 3073 * size - 5 * (label == 3))
        return "sweep.py", ["--data", "cifar10", "--data-dir", folder, "--out", folder]
    return prepare


def text(write, *flags, data=""):
    def prepare(folder, _):
        write(folder)
        return "train.py", ["--model", "gpt", "--context", "32", "--data", folder / data, *flags]
    return prepare


def shard(**header):
    def write(folder):
        write_bin(folder / "a_train.bin", range(100), shard=True, **header)
        write_bin(folder / "a_val.bin", range(100), shard=True)
    return write


def result_folder(spoil, script="sweep.py", *flags):
    """A finished sweep, spoiled."""
    def prepare(folder, out):
        for name in ("config.json", "runs.jsonl", "summary.json"):
            (folder / name).write_bytes((out / name).read_bytes())
        spoil(folder)
        return script, [folder, *flags] if script == "plots.py" else [*TINY, "--out", folder, *flags]
    return prepare


def checkpoint(spoil):
    """A run of which only a spoiled checkpoint is left."""
    def prepare(folder, _):
        config = train.configure(dict(width=8, steps=4, train_size=100))
        path = folder / f"checkpoint-{train.run_id(config)}.pt"
        train.train([config], checkpoint=path, every=2)
        spoil(path)
        return "train.py", ["--width", 8, "--steps", 4, "--train-size", 100, "--out", folder, "--checkpoint", 2]
    return prepare


class Boom:
    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


DAMAGED_FILES = {
    "idx truncated": (mnist(lambda d: truncate(d / "train-images-idx3-ubyte")), "where its header says"),
    "idx empty": (mnist(lambda d: (d / "train-images-idx3-ubyte").write_bytes(b"")), "magic 0x803"),
    "idx header cut": (mnist(lambda d: first_bytes(d / "train-images-idx3-ubyte", 9)), "magic 0x803"),
    "idx of labels for images": (mnist(lambda d: (d / "train-labels-idx1-ubyte").replace(d / "train-images-idx3-ubyte")), "magic 0x803|offline"),
    "idx too long": (mnist(lambda d: (d / "t10k-labels-idx1-ubyte").write_bytes((d / "t10k-labels-idx1-ubyte").read_bytes() + b"x")), "where its header"),
    "idx without images": (mnist(lambda d: write_mnist(d, images=np.zeros((0, 28, 28), np.uint8), labels=np.zeros(0, np.uint8))), "0 images"),
    "idx labels out of range": (mnist(lambda d: write_mnist(d, np.zeros((9, 28, 28), np.uint8), np.full(9, 10, np.uint8))), "classes 0 to 9"),
    "idx of other images": (mnist(lambda d: write_mnist(d, np.zeros((9, 8, 8), np.uint8), np.zeros(9, np.uint8))), "784 values"),
    "idx counts differ": (mnist(lambda d: write_mnist(d, labels=np.zeros(9, np.uint8))), "30 images but 9 labels"),
    "idx is a folder": (mnist(lambda d: [(d / "train-images-idx3-ubyte").unlink(), (d / "train-images-idx3-ubyte").mkdir()]), "directory"),
    "idx missing": (mnist(lambda d: (d / "t10k-labels-idx1-ubyte").unlink()), "put train-images"),
    "gz truncated": (mnist(lambda d: truncate(d / "train-images-idx3-ubyte.gz"), True), "is damaged"),
    "gz no gz": (mnist(lambda d: (d / "train-images-idx3-ubyte.gz").write_bytes(b"plain"), True), "is damaged"),
    "gz garbled": (mnist(lambda d: (d / "train-images-idx3-ubyte.gz").write_bytes((d / "train-images-idx3-ubyte.gz").read_bytes()[:99] + bytes(99)), True), "damaged"),
    "gz empty": (mnist(lambda d: (d / "train-images-idx3-ubyte.gz").write_bytes(b""), True), "magic 0x803"),
    "cifar truncated": (cifar(), "no multiple of 3073"),
    "cifar empty": (cifar(size=0, label=0), "no multiple of 3073"),
    "cifar labels out of range": (cifar(label=10), "classes 0 to 9"),
    "cifar missing": (cifar(without="test_batch.bin"), "put data_batch_1.bin"),
    "text empty": (text(lambda d: (d / "a").write_bytes(b""), data="a"), "0 tokens to train on"),
    "text too short": (text(lambda d: (d / "a").write_bytes(b"abc" * 11), data="a"), "30 tokens to train on; context 32 needs more"),
    "text folder empty": (text(lambda d: None), "0 tokens to train on"),
    "text folder of one file": (text(lambda d: (d / "a").write_bytes(b"abc" * 1000)), "every tenth text file validates"),
    "text vocabulary": (text(lambda d: (d / "a").write_bytes(b"abc" * 1000), "--vocab-size", "99", data="a"), "outside the vocabulary of 99"),
    "bin odd": (text(lambda d: (d / "a.bin").write_bytes(bytes(1001)), data="a.bin"), "has an even number"),
    "bin empty": (text(lambda d: (d / "a.bin").write_bytes(b""), data="a.bin"), "0 tokens to train on"),
    "bin vocabulary": (text(lambda d: write_bin(d / "a.bin", range(1000)), "--vocab-size", "900", data="a.bin"), "outside the vocabulary of 900"),
    "shard truncated": (text(lambda d: [shard()(d), truncate(d / "a_train.bin")]), "count bytes"),
    "shard too long": (text(shard(count=90)), "count bytes"),
    "shard header cut": (text(lambda d: [shard()(d), first_bytes(d / "a_train.bin", 100)]), "count bytes"),
    "shard of another version": (text(shard(version=2)), "count bytes"),
    "shard of uint32": (text(shard(magic=20240801)), "has 20240520, 1, count"),
    "shards without validation": (text(lambda d: [shard()(d), (d / "a_val.bin").unlink()]), "with val in their names"),
    "out is a file": (result_folder(lambda d: None, "sweep.py", "--out", __file__), "cannot be made a folder"),
    "config damaged": (result_folder(lambda d: truncate(d / "config.json")), "config.json is damaged"),
    "config no table": (result_folder(lambda d: (d / "config.json").write_text("[1, 2]")), "config.json is damaged"),
    "config contradicts": (result_folder(lambda d: None, "sweep.py", "--batch-size", "9"), "batch_size = 8, not 9"),
    "rows garbled": (result_folder(lambda d: (d / "runs.jsonl").write_bytes(b"garbage\n" + (d / "runs.jsonl").read_bytes())), "runs.jsonl:1"),
    "rows are a folder": (result_folder(lambda d: [(d / "runs.jsonl").unlink(), (d / "runs.jsonl").mkdir()]), "directory"),
    "tracks garbled": (result_folder(lambda d: [(d / "track.jsonl").write_text("{}\n"), (d / "config.json").unlink()], "sweep.py", "--track", "5"), "track.jsonl:1"),
    "no summary": (result_folder(lambda d: (d / "summary.json").unlink(), "plots.py"), "run python sweep.py --out"),
    "summary truncated": (result_folder(lambda d: truncate(d / "summary.json"), "plots.py"), "summary.json is damaged"),
    "summary null": (result_folder(lambda d: (d / "summary.json").write_text("null"), "plots.py"), "summary.json is damaged"),
    "summary without rows": (result_folder(lambda d: (d / "summary.json").write_text("{}"), "plots.py"), "summary.json is damaged"),
    "summary of odd rows": (result_folder(lambda d: (d / "summary.json").write_text('{"rows": [1]}'), "plots.py"), "summary.json is damaged"),
    "figure unknown": (result_folder(lambda d: None, "plots.py", "lr_transfr"), "unknown figure 'lr_transfr'; choose from lr_transfer"),
    "figure not measured": (result_folder(lambda d: None, "plots.py", "alignment"), "'alignment' cannot be drawn"),
    "figures is a file": (result_folder(lambda d: (d / "figures").write_text(""), "plots.py"), "figures"),
    "checkpoint empty": (checkpoint(lambda path: path.write_bytes(b"")), "is damaged; remove it to begin that run anew"),
    "checkpoint cut": (checkpoint(lambda path: first_bytes(path, path.stat().st_size // 2)), "is damaged"),
    "checkpoint of garbage": (checkpoint(lambda path: path.write_bytes(b"garbage" * 99)), "is damaged"),
    "checkpoint of code": (checkpoint(lambda path: torch.save(Boom(), path)), "is damaged"),
    "checkpoint of another kind": (checkpoint(lambda path: torch.save(torch.ones(3), path)), "is damaged"),
    "checkpoint of a part": (checkpoint(lambda path: torch.save({"ids": [path.stem[-16:]]}, path)), "is damaged"),
    "checkpoint of another run": (checkpoint(lambda path: torch.save({"ids": ["0" * 16]}, path)), "belongs to another run"),
    "checkpoint is a folder": (checkpoint(lambda path: [path.unlink(), path.mkdir()]), "directory"),
}


@pytest.mark.parametrize("name", DAMAGED_FILES)
def test_damaged_files_end_with_one_line_and_exit_code_2(name, swept, tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("offline")
    monkeypatch.setattr(train.urllib.request, "urlopen", offline)
    prepare, words = DAMAGED_FILES[name]
    script, flags = prepare(tmp_path, swept[0])
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    done = run_script(script, *flags)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and re.search(words, done.stderr), done.stderr
    after = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    assert not done.stdout and all(after[path] == content for path, content in before.items())
    new = {path.name: after[path] for path in after.keys() - before.keys()}         # of a sweep: its settings and no row
    assert new.keys() <= {"config.json", "runs.jsonl"} and not new.get("runs.jsonl")


def test_a_sweep_that_ended_before_its_first_row_leaves_a_folder_that_contradicts_nothing(tmp_path):
    assert run_script("sweep.py", *FEW, "--batch-size", "301", "--out", tmp_path).stderr.count("at most the 300 training samples") == 1
    assert run_script("sweep.py", *FEW, "--out", tmp_path).returncode == 0


def test_a_head_that_does_not_divide_the_default_width_is_no_error(tmp_path):
    args, given, curves = sweep.parse(["--model", "gpt", "--head-dim", "24", "--widths", "48", "96", "--base-width", "48"])
    assert args["widths"] == [48, 96] and len(curves) == 1 and sweep.runs_of(given, curves[0], 96, 0.1, 1)[0]["width"] == 96


@pytest.mark.parametrize("most, error", [
    (4, torch.OutOfMemoryError("CUDA out of memory")), (2, MemoryError()),
    (1, RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"))])
def test_stacks_that_do_not_fit_are_halved_and_the_rows_stay_the_same(tmp_path, monkeypatch, most, error):
    def tight(runs, *args, **kwargs):
        if len(runs) > most:
            if kwargs["tracked"] is not None:
                kwargs["tracked"].append({"id": "half done", "step": 1, "layer": 0})
            raise error
        return whole(runs, *args, **kwargs)

    whole = train.train
    track = ["--track", "4", "--steps", "2"]
    assert run_script("sweep.py", *FEW, *track, "--out", tmp_path / "free").returncode == 0
    monkeypatch.setattr(train, "train", tight)
    sweep.say_once.cache_clear()
    done = run_script("sweep.py", *FEW, *track, "--out", tmp_path / "tight")
    assert done.returncode == 0 and "width 16: out of memory for 6 runs at once; going on with 3" in done.stderr, done.stderr
    assert sorted_rows(tmp_path / "tight") == sorted_rows(tmp_path / "free")
    tracks = [sweep.read_rows(tmp_path / name, "track*.jsonl") for name in ("free", "tight")]
    assert tracks[0].keys() == tracks[1].keys()


@pytest.mark.parametrize("too_wide", [8, 16])
def test_runs_that_fit_nowhere_become_flagged_rows_and_are_not_tried_again(tmp_path, monkeypatch, too_wide):
    def tight(runs, *args, **kwargs):
        calls.append(runs)
        if runs[0]["width"] >= too_wide:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(runs, *args, **kwargs)

    calls, whole = [], train.train
    monkeypatch.setattr(train, "train", tight)
    done = run_script("sweep.py", *FEW, "--out", tmp_path)
    rows = sweep.read_rows(tmp_path)
    assert done.returncode == 0 and len(rows) == 12 and "out of memory" in done.stdout, done.stderr
    assert {row["width"] for row in rows.values() if row["failed"] == "out of memory"} == {w for w in (8, 16) if w >= too_wide}
    assert all(row["final_train_loss"] is None for row in rows.values() if row["failed"])
    flags = [flag for row in json.loads((tmp_path / "summary.json").read_text())["rows"] for flag in row["flags"]]
    assert ("width 16: out of memory" in flags) == (too_wide == 16)
    content = (tmp_path / "runs.jsonl").read_bytes()
    calls.clear()
    again = run_script("sweep.py", *FEW, "--out", tmp_path)
    assert again.returncode == 0 and not calls and (tmp_path / "runs.jsonl").read_bytes() == content and "out of memory" in again.stdout


def test_one_failed_run_does_not_keep_wider_networks_waiting(tmp_path, monkeypatch):
    def tight(runs, *args, **kwargs):
        if any((run["width"], run["lr"], run["seed"]) == (8, 0.25, 1) for run in runs):
            raise MemoryError
        return whole(runs, *args, **kwargs)

    whole = train.train
    monkeypatch.setattr(train, "train", tight)
    done = run_script("sweep.py", *TINY, "--loss", "ce", "--lr-range", "0.25", "4", "--no-plots", "--out", tmp_path)
    rows = sweep.read_rows(tmp_path).values()
    assert done.returncode == 0 and sum(bool(row["failed"]) for row in rows) == 1, done.stderr
    row, = json.loads((tmp_path / "summary.json").read_text())["rows"]
    assert row["widths"] == [8, 16] and None not in row["optimal_lr"] and "width 8: out of memory" in row["flags"]


def flags_of(settings):
    """The command line of these settings."""
    return [part for name, value in settings.items() for flag in [name.replace("_", "-")]
            for part in ([f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", value])]


@pytest.mark.parametrize("settings", [
    dict(TINY_GPT, optimizer="adam", lr=0.003, norm_affine=False, accumulate=2),
    dict(width=16, base_width=8, hidden_layers=2, steps=7, batch_size=8, train_size=100, val_size=20, momentum=0.9, lr=0.3)], ids=["gpt", "mlp"])
def test_training_continued_from_a_checkpoint_gives_the_row_to_the_last_bit(tmp_path, monkeypatch, settings):
    def interrupted(path, state):
        save(path, state)
        if state["done"] == 4:
            raise KeyboardInterrupt

    def counted(*args):
        steps.append(args)
        return batch(*args)

    flags = [*flags_of(settings), "--track", 3]
    undisturbed = run_script("train.py", *flags, "--out", tmp_path / "a")
    assert undisturbed.returncode == 0, undisturbed.stderr
    save, batch, steps, out = train.save_checkpoint, train.batch, [], tmp_path / "b"
    with monkeypatch.context() as patch:
        patch.setattr(train, "save_checkpoint", interrupted)
        cut = run_script("train.py", *flags, "--checkpoint", 2, "--out", out)
    assert cut.returncode == 130 and "goes on from" in cut.stderr and len(cut.stderr.split("\n\n")[-1].splitlines()) <= 2 and not cut.stdout
    assert [path.suffix for path in out.iterdir()] == [".pt"]
    monkeypatch.setattr(train, "batch", counted)
    continued = run_script("train.py", *flags, "--checkpoint", 2, "--out", out)
    assert len(steps) == 3 and results(json.loads(continued.stdout)) == results(json.loads(undisturbed.stdout))
    assert sweep.read_rows(out, "track*.jsonl") == sweep.read_rows(tmp_path / "a", "track*.jsonl") != {}
    assert sorted(path.name[:5] for path in out.iterdir()) == ["runs-", "track"]
    again = run_script("train.py", *flags, "--checkpoint", 2, "--out", out)
    assert len(steps) == 3 and again.stdout == continued.stdout


@pytest.mark.parametrize("settings", [dict(TINY_GPT, batch_size=8, clip=1.0), dict(SMALL, lr=0.3), dict(SMALL, bias=True, optimizer="adam", lr=0.01)],
                         ids=["gpt", "mlp", "biases"])
def test_accumulated_gradients_are_those_of_the_whole_batch(settings):
    config = train.configure(dict(settings, dtype="float64"))
    splits = train.load_splits(config, None, "cpu")
    (whole,), (parts,) = (train.train([dict(config, accumulate=n)], splits) for n in (1, 4))
    for name in ("final_train_loss", "train_accuracy", "val_loss", "logit_rms"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-10)


@pytest.mark.parametrize("threads", [1, 2, 3, 16])
@pytest.mark.parametrize("settings", [{}, {"optimizer": "adam"}, {"hidden_layers": 7}, {"model": "gpt"}], ids=str)
def test_stacks_hold_every_run_once_share_them_evenly_and_keep_to_the_memory_that_is_stated(monkeypatch, threads, settings):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    size = functools.cache(lambda width, whole=train.replica_size: whole(train.configure(dict(settings, width=width))))
    monkeypatch.setattr(train, "replica_size", lambda run: size(run["width"]))      # all that its runs differ in but the seed
    together = []
    for width, count, shares in itertools.product((32, 128, 512, 4096), (1, 7, 46, 200), (1, 3)):
        runs = [train.configure(dict(settings, width=width, seed=seed)) for seed in range(count)]
        parts = list(train.stacks(runs, "cpu", "auto", shares))
        assert sum(parts, []) == runs and all(parts) and len(parts) >= min(shares, count // threads)
        longest = max(map(len, parts))
        assert longest == 1 or (longest <= 64 and (longest + 1) * train.replica_size(runs[0])[1] <= train.CPU_MEMORY)
        assert longest - min(map(len, parts)) < max(2, 2 * threads)
        together.append(longest)
    assert max(together) == 1 if "model" in settings else max(together) > threads       # a GPT's attention loses in a stack


def test_both_ways_to_take_an_adamw_step_agree_for_every_replica():
    runs = [train.configure(dict(SMALL, optimizer="adam", dtype="float64", lr=lr, weight_decay=0.1, eps=eps, param=param))
            for lr, eps, param in ((0.01, 1e-8, "sp"), (0.1, 1e-3, "mup"), (0.01, 1e-8, "sp"))]
    fused, foreach = (train.stack_runs(runs, *train.build(runs[0]), "cpu", torch.float64) for _ in range(2))
    for step in range(4):
        grads = [torch.randn(w.shape, generator=seeded(step), dtype=torch.float64) for w in fused["weights"]]
        train.fused_adamw_(fused, [g.clone() for g in grads], runs[0], 0.5, step)
        train.foreach_adamw_(foreach, grads, runs[0], 0.5, step)
        for kind in ("weights", "first", "second"):
            for a, b in zip(fused[kind], foreach[kind]):
                assert torch.allclose(a, b, rtol=1e-10, atol=1e-14)


def test_rows_say_where_their_bits_depend_on_the_stack(small_data):
    biased = [dict(SMALL, bias=True, optimizer="adam", lr=lr) for lr in (0.001, 0.01, 0.1)]
    together = train.train(biased, small_data[torch.float32])
    assert all(row["deterministic"] for row in together)
    assert [results(row) for row in together] == [results(train.train([run], small_data[torch.float32])[0]) for run in biased]
    runs = [dict(TINY_GPT, lr=lr, dtype="bfloat16") for lr in (0.1, 0.2)]      # attention takes another path in a stack
    assert [row["deterministic"] for row in train.train(runs)] == [False, False] and train.train(runs[:1])[0]["deterministic"]


def test_ranks_that_torchrun_started_again_share_all_stacks_out_anew(monkeypatch):
    store, stacks = torch.distributed.HashStore(), [[{"width": 8}], [{"width": 16}]]        # the store outlives the ranks
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "any")
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda url: iter([(store, 0, 1)]))
    for attempt in "012":
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        team = sweep.Team()
        assert list(team.share(stacks)) == stacks[::-1] and list(team.share(stacks)) == stacks[::-1]     # two rounds
        team.meet()


def test_every_row_says_where_it_comes_from(swept):
    out, _ = swept
    for id_, row in sweep.read_rows(out).items():
        config = {name: row[name] for name in train.SETTINGS}
        assert row["torch"] == torch.__version__ and row["device"] == "cpu" and row["dtype"] == "float32" and row["deterministic"] is True
        assert id_ == row["id"] == train.run_id(config) and row["commit"] is None or re.fullmatch(r"[0-9a-f]{12}\+?", row["commit"])
    head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=HERE, capture_output=True, text=True)
    assert head.returncode or row["commit"].rstrip("+") == head.stdout.strip()
    assert json.loads((out / "summary.json").read_text())["command"].startswith("python sweep.py --widths 8 16")


def test_a_single_width_has_no_exponent_and_says_so(tmp_path):
    done = run_script("sweep.py", *FEW[:-1], "--widths", "8", "--out", tmp_path)
    assert done.returncode == 0 and "! ce" in done.stdout and "one width: no exponent" in done.stdout, done.stderr
    row, = json.loads((tmp_path / "summary.json").read_text())["rows"]
    assert row["optimal_exponent"] is row["max_stable_exponent"] is None and row["optimal_lr"][0] > 0
    assert (tmp_path / "figures" / "lr_transfer.png").exists()


def test_an_optimum_at_the_grids_edge_is_flagged(tmp_path):
    done = run_script("sweep.py", *FEW, "--lrs", "0.001", "0.002", "--out", tmp_path)
    assert done.returncode == 0 and "width 8: optimum at the grid's edge" in done.stdout, done.stderr


def test_a_sweep_in_which_every_run_diverges_says_so_and_draws_the_others(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        done = run_script("sweep.py", *FEW[:-1], "--lrs", "1e7", "1e8", "--loss", "mse", "--out", tmp_path / "none")
        assert done.returncode == 0 and "width 16: every run diverged" in done.stdout, done.stderr
        both = run_script("sweep.py", *FEW[:-1], "--lrs", "0.1", "0.2", "--alpha", "0", "-10", "--widths", "16", "32", "--loss", "mse", "--out", tmp_path)
    assert both.returncode == 0 and both.stdout.count("every run diverged") == 2 and "exponents.pdf" in both.stdout, both.stderr


# ------------------------------------------------------------------------------------------------------------------
# Measurements

class Block(nn.Module):
    """Embedding, LayerNorm, SDPA, GELU MLP and a readout; linears with biases."""

    def __init__(self, vocabulary=11, width=16):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.norm = nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.readout = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens):
        x = self.embedding(tokens)                                          # (B, T, D)
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, dim=-1))
        attention = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.project(attention)
        x = x + self.down(F.gelu(self.up(x)))
        return self.readout(x)


def net(sizes=(10, 32, 32, 3), bias=True, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    layers = [m for a, b in zip(sizes, sizes[1:]) for m in (nn.Linear(a, b, bias=bias), nn.ReLU())]
    return nn.Sequential(*layers[:-1]).to(dtype)


def trained(model, x, y, lr=0.3, steps=3):
    """(model after a few SGD steps, its reference)"""
    reference = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x).flatten(0, -2), y.flatten()).backward()
        optimizer.step()
    return model, reference


def mlp_pair(dtype=torch.float64, **kwargs):
    model = net(dtype=dtype, **kwargs)
    x = torch.randn(20, model[0].in_features, dtype=dtype)
    return *trained(model, x, torch.arange(20) % 3), x


def block_pair(dtype=torch.float64):
    torch.manual_seed(1)
    tokens = torch.randint(11, (4, 6))
    return *trained(Block().to(dtype), tokens, (tokens + 1) % 11), tokens


def spectrum(values, m, n, seed=0):
    """(m, n) matrix with these singular values and random singular vectors."""
    g = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(k, len(values), generator=g, dtype=torch.float64)).Q for k in (m, n))
    return (u * values) @ v.T


class Quadratic(nn.Module):
    """Two parameter tensors p, q; model(A) is [p, q]^T A [p, q] / 2, whose Hessian is A."""

    def __init__(self, n=40):
        super().__init__()
        self.p, self.q = nn.Parameter(torch.ones(n // 4, 2, dtype=torch.float64)), nn.Parameter(torch.ones(n // 2, dtype=torch.float64))

    def forward(self, a):
        v = torch.cat([self.p.flatten(), self.q])
        return v @ a @ v / 2


def symmetric(eigenvalues, seed=0):
    n = len(eigenvalues)
    q = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).Q
    return (q * eigenvalues) @ q.T


def identity_loss(output, target):
    return output


# --- updates and the refined coordinate check

@pytest.mark.parametrize("pair", [mlp_pair, block_pair])
def test_effective_plus_propagating_is_the_change_of_the_bias_free_output(pair):
    model, reference, x = pair()
    layers, outputs = metrics.updates(model, reference, x), []
    for network in (model, reference):                                      # the modules' own outputs, through hooks of our own
        seen = {}
        handles = [m.register_forward_hook(lambda m, a, out, name=name: seen.__setitem__(name, out.detach().clone()))
                   for name, m in network.named_modules()]
        network(x)
        for handle in handles:
            handle.remove()
        outputs.append({name: seen[name] - (0 if getattr(network.get_submodule(name), "bias", None) is None
                                            else network.get_submodule(name).bias.detach()) for name in layers})
    assert len(layers) == sum(hasattr(m, "weight") for m in model.modules())
    for name, layer in layers.items():
        total = layer.effective if layer.propagating is None else layer.effective + layer.propagating
        change = (outputs[0][name] - outputs[1][name]).flatten(0, -2)
        assert change.norm() > 1e-3
        assert (total - change).norm() <= 1e-12 * outputs[0][name].norm()


def test_refined_coordinate_check_matches_a_direct_computation_per_sample():
    model, reference, x = mlp_pair()
    row = metrics.refined_coordinate_check(model, reference, x)["2"]
    xt, x0 = model[:2](x), reference[:2](x)                                 # (20, 32)
    dw = model[2].weight - reference[2].weight
    rms = lambda v: v.square().mean(dim=-1).sqrt().mean().item()
    expected = {"effective": rms(xt @ dw.T), "propagating": rms((xt - x0) @ reference[2].weight.T),
                "input": rms(xt), "input_change": rms(xt - x0)}
    assert row == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("pair,dtype,tolerance", [(mlp_pair, torch.float64, 1e-10), (mlp_pair, torch.float32, 1e-4),
                                                  (block_pair, torch.float64, 1e-10), (block_pair, torch.float32, 1e-4)])
def test_refined_coordinate_check_agrees_with_torch_module_monitor(pair, dtype, tolerance):
    package = pytest.importorskip("torch_module_monitor")
    from torch_module_monitor.refined_coordinate_check import RefinedCoordinateCheck
    model, reference, x = pair(dtype)
    ours = metrics.refined_coordinate_check(model, reference, x)

    monitor = package.ModuleMonitor(monitor_step_fn=lambda step: True)
    monitor.set_module(model)
    monitor.set_reference_module(reference)
    check = RefinedCoordinateCheck(monitor)
    monitor.begin_step(0)
    with torch.no_grad():
        reference(x), model(x)
    check.refined_coordinate_check()
    monitor.storage.aggregate_step(0)
    theirs = monitor.storage.get_step_metrics(0)

    keys = {"effective": "RCC (W_t-W_0)x_t/{}.weight/l2norm", "propagating": "RCC W_0(x_t-x_0)/{}.weight/l2norm",
            "input": "RCC x_t/{}/l2norm", "input_change": "RCC (x_t-x_0)/{}/l2norm"}
    compared = 0
    for name, row in ours.items():
        module = model.get_submodule(name)
        embedding, norm = isinstance(module, nn.Embedding), isinstance(module, nn.LayerNorm)
        for key, pattern in keys.items():
            if embedding and key != "effective":
                assert math.isnan(row[key])
                continue
            pattern = pattern.replace(".weight", "") if embedding else pattern
            if norm:                                                        # the package names what the gains multiply apart
                pattern = {"input": "RCC (W_t-W_0)x_t/{}.weight/x_t/l2norm",
                           "input_change": "RCC W_0(x_t-x_0)/{}.weight/x_t-x_0/l2norm"}.get(key, pattern)
            matrix = module.weight
            fan_in, fan_out = (matrix.numel(),) * 2 if norm else (matrix.shape[-1], matrix.shape[-1 if embedding else 0])
            fan = fan_out if key in ("effective", "propagating") else fan_in
            expected = theirs[pattern.format(name)] / math.sqrt(fan)
            assert row[key] == pytest.approx(expected, rel=tolerance, abs=1e-15), (name, key)
            compared += 1
    assert compared == 4 * len(ours) - 3 * any(isinstance(m, nn.Embedding) for m in model.modules())


def test_conv1d_of_transformers_and_conv2d_give_what_the_equivalent_linear_gives():
    class Conv1D(nn.Module):
        def __init__(self, n_in, n_out):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(n_in, n_out, dtype=torch.float64)), nn.Parameter(torch.zeros(n_out))

        def forward(self, x):
            return x @ self.weight + self.bias

    torch.manual_seed(0)
    x = torch.randn(5, 6, dtype=torch.float64)
    conv, conv0 = Conv1D(6, 4), Conv1D(6, 4)
    convs = nn.Sequential(nn.Conv2d(6, 4, 1)).double(), nn.Sequential(nn.Conv2d(6, 4, 1)).double()
    linears = nn.Sequential(nn.Linear(6, 4)).double(), nn.Sequential(nn.Linear(6, 4)).double()
    for c, conv2d, linear in zip((conv, conv0), convs, linears):
        linear[0].weight.data = c.weight.data.T.clone()
        conv2d[0].weight.data = c.weight.data.T.clone()[:, :, None, None]
    for measure in (metrics.refined_coordinate_check, metrics.alignment, metrics.layer_statistics):
        expected = measure(*linears, x)["0"]
        assert measure(nn.Sequential(conv), nn.Sequential(conv0), x)["0"] == pytest.approx(expected, rel=1e-6, nan_ok=True)
        assert measure(*convs, x[:, :, None, None])["0"] == pytest.approx(expected, rel=1e-6, nan_ok=True)


def test_conv2d_updates_are_those_of_the_convolution():
    torch.manual_seed(0)
    conv, conv0 = (nn.Sequential(nn.Conv2d(3, 4, (3, 2), stride=2, padding=1, dilation=(1, 2)), nn.ReLU(),
                                 nn.Conv2d(4, 5, 3, padding="valid")).double() for _ in range(2))
    x = torch.randn(2, 3, 9, 11, dtype=torch.float64)
    layer = metrics.updates(conv, conv0, x)["2"]
    change = (conv(x) - conv[2].bias[:, None, None]) - (conv0(x) - conv0[2].bias[:, None, None])    # (B, C, H, W)
    assert torch.allclose(layer.effective + layer.propagating, change.permute(0, 2, 3, 1).flatten(0, 2), atol=1e-12)


def test_rms_norm_gains_are_measured():
    torch.manual_seed(0)
    norm, norm0 = (nn.Sequential(nn.RMSNorm(8, eps=1e-5)).double() for _ in range(2))
    norm[0].weight.data += torch.randn(8)
    x = torch.randn(5, 8, dtype=torch.float64)
    assert torch.allclose(metrics.updates(norm, norm0, x)["0"].effective, norm(x) - norm0(x), atol=1e-14)


def test_a_module_called_twice_is_averaged_over_both_calls():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(input=self.layer(x))                          # keyword arguments are seen too

    torch.manual_seed(0)
    model, reference, x = Twice().double(), Twice().double(), torch.randn(7, 4, dtype=torch.float64)
    rows = torch.cat([x, model.layer(x)])
    expected = (rows @ (model.layer.weight - reference.layer.weight).T).square().mean(dim=1).sqrt().mean().item()
    assert metrics.refined_coordinate_check(model, reference, x)["layer"]["effective"] == pytest.approx(expected, rel=1e-12)


def test_what_is_not_measured_is_named_in_a_warning():
    class Scaled(nn.Linear):                                                # computes something else than W x
        def forward(self, x):
            return 2 * super().forward(x)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused, self.scaled = nn.Linear(3, 3), nn.Linear(3, 3), Scaled(3, 3)

        def forward(self, x):
            return self.scaled(self.used(x))

    model, x = Net(), torch.randn(2, 3)
    with pytest.warns(UserWarning, match=r"unused \(Linear\), scaled \(Scaled\)"):
        result = metrics.refined_coordinate_check(model, copy.deepcopy(model), x)
    assert list(result) == ["used"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics.refined_coordinate_check(*mlp_pair())


def test_models_of_different_width_or_structure_are_refused():
    x = torch.randn(4, 10, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"module '0'.*\(32, 10\).*\(16, 10\)"):
        metrics.refined_coordinate_check(net(), net((10, 16, 16, 3)), x)
    with pytest.raises(ValueError, match="module '4' .* in the model but \\[\\] in the reference"):
        metrics.refined_coordinate_check(net(), net()[:4], x)


def test_tiny_updates_keep_their_digits_in_float32():
    model = net((100, 512, 512, 3), bias=False, dtype=torch.float32)
    reference = copy.deepcopy(model)
    x, dw = torch.randn(8, 100), torch.randn(512, 512)
    model[2].weight.data += 1e-6 * dw
    dw = model[2].weight.double() - reference[2].weight.double()
    exact = (reference[:2](x).double() @ dw.T).square().mean(dim=1).sqrt().mean().item()
    assert metrics.refined_coordinate_check(model, reference, x)["2"]["effective"] == pytest.approx(exact, rel=1e-5)


def test_measuring_leaves_modes_rng_gradients_hooks_and_running_statistics_alone():
    torch.manual_seed(0)

    class Noisy(nn.Module):
        def forward(self, x):
            return x + 0.1 * torch.randn_like(x)                            # draws in evaluation mode too

    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 3), Noisy())
    model[3].eval()                                                         # mixed modes must survive
    reference, x, y = copy.deepcopy(model), torch.randn(10, 6), torch.arange(10) % 3
    model[4].weight.grad = torch.ones(3, 8)
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                                     # BatchNorm is not measured
        rows = metrics.refined_coordinate_check(model, reference, x)
        metrics.alignment(model, reference, x)
        metrics.layer_statistics(model, reference, x)
    metrics.gradient_norms(model, F.cross_entropy, x, y)
    metrics.sharpness(model, F.cross_entropy, x, y)
    metrics.operator_norm(model[0].weight)
    metrics.exponent_interval([1, 2], [[1, 2], [1, 3]])
    assert [m.training for m in model.modules()] == modes and torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model[4].weight.grad, torch.ones(3, 8)) and model[0].weight.grad is None
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())
    assert not any(m._forward_pre_hooks or m._forward_hooks for net in (model, reference) for m in net.modules())
    hidden = model.eval()[:4](x)                                            # without dropout, by the running statistics
    assert rows["4"]["input"] == pytest.approx(hidden.square().mean(dim=1).sqrt().mean().item())


def test_inputs_are_kept_as_they_were_when_the_module_saw_them():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4, bias=False)

        def forward(self, x):
            x = x.clone()
            x += self.layer(x)
            return x

    torch.manual_seed(0)
    model, reference, x = InPlace().double(), InPlace().double(), torch.randn(7, 4, dtype=torch.float64)
    expected = (x @ (model.layer.weight - reference.layer.weight).T).square().mean(dim=1).sqrt().mean().item()
    assert metrics.refined_coordinate_check(model, reference, x)["layer"]["effective"] == pytest.approx(expected, rel=1e-12)


def test_a_failing_forward_leaves_no_hooks_and_the_training_mode():
    model = net()
    with pytest.raises(RuntimeError):
        metrics.refined_coordinate_check(model, copy.deepcopy(model), torch.randn(4, 7, dtype=torch.float64))
    assert not any(m._forward_pre_hooks or m._forward_pre_hooks_with_kwargs for m in model.modules())
    assert all(m.training for m in model.modules())


# --- alignment

def test_alignment_matches_exact_norms():
    model, reference, x = mlp_pair()
    row = metrics.alignment(model, reference, x)["2"]
    dw, w0 = model[2].weight - reference[2].weight, reference[2].weight
    xt, dx = model[:2](x), model[:2](x) - reference[:2](x)
    update, size = (xt @ dw.T).norm(dim=1), xt.norm(dim=1)
    expected = {"rms_update": (update / (dw.norm() * size)).mean().item(),
                "operator_update": (update / (torch.linalg.matrix_norm(dw, 2) * size)).mean().item(),
                "operator_propagating": ((dx @ w0.T).norm(dim=1) / (torch.linalg.matrix_norm(w0, 2) * dx.norm(dim=1))).mean().item()}
    assert row == pytest.approx(expected, rel=1e-3)
    assert row["rms_update"] == pytest.approx(expected["rms_update"], rel=1e-12)


def test_alignment_of_a_rank_one_update_along_its_input_is_one():
    model = net((10, 32, 3), bias=False)
    reference, x = copy.deepcopy(model), torch.randn(1, 10, dtype=torch.float64)
    model[0].weight.data += torch.outer(torch.randn(32, dtype=torch.float64), x[0])
    row = metrics.alignment(model, reference, x)["0"]
    assert row["rms_update"] == pytest.approx(1, rel=1e-12) and row["operator_update"] == pytest.approx(1, rel=1e-6)


def test_alignment_at_initialization_is_nan_and_samples_without_input_do_not_count():
    model, x = net((4, 8, 3), bias=False), torch.randn(5, 4, dtype=torch.float64)
    reference = copy.deepcopy(model)
    assert all(math.isnan(v) for row in metrics.alignment(model, reference, x).values() for v in row.values())
    model[0].weight.data += 1
    with_zero = torch.cat([x, torch.zeros(3, 4, dtype=torch.float64)])
    assert metrics.alignment(model, reference, with_zero)["0"] == pytest.approx(metrics.alignment(model, reference, x)["0"], nan_ok=True)


def test_alignment_and_check_reuse_one_capture_and_the_reference_norms():
    model, reference, x = block_pair()
    layers, norms = metrics.updates(model, reference, x), {}
    first = metrics.alignment(model, reference, x, layers=layers, reference_norms=norms)
    for name, row in metrics.alignment(model, reference, x).items():
        assert row == pytest.approx(first[name], nan_ok=True)
    assert norms["up"] == pytest.approx(torch.linalg.matrix_norm(reference.up.weight, 2).item(), rel=1e-3)
    norms["up"] *= 2                                                        # a looked-up norm is used, not computed again
    halved = metrics.alignment(model, reference, x, layers=layers, reference_norms=norms)
    assert halved["up"]["operator_propagating"] == pytest.approx(first["up"]["operator_propagating"] / 2)


def test_a_diverged_model_gives_nan_not_an_error():
    model, reference, x = mlp_pair()
    model[2].weight.data[0, 0] = math.nan
    rows = metrics.refined_coordinate_check(model, reference, x), metrics.alignment(model, reference, x)
    assert math.isnan(rows[0]["2"]["effective"]) and math.isnan(rows[1]["2"]["operator_update"])
    assert math.isnan(metrics.sharpness(model, F.cross_entropy, x, torch.arange(20) % 3))


# --- operator norm

ILL = 1 - 1e-3 * torch.arange(300, dtype=torch.float64)
OPERATORS = {
    "gaussian": torch.randn(256, 256, generator=torch.Generator().manual_seed(1), dtype=torch.float64),
    "tall": torch.randn(300, 40, generator=torch.Generator().manual_seed(2), dtype=torch.float64),
    "wide": torch.randn(2, 400, generator=torch.Generator().manual_seed(3), dtype=torch.float64),
    "rank one": spectrum(torch.tensor([3.0], dtype=torch.float64), 100, 200),
    "ill separated": spectrum(ILL, 300, 320),
    "edge with a lone top": spectrum(torch.cat([torch.tensor([1.003]), torch.linspace(0, 1, 299) ** 0.1]).double(), 300, 300),
    "all equal": torch.eye(64, dtype=torch.float64),
    "tiny": 1e-30 * torch.randn(64, 64, generator=torch.Generator().manual_seed(4), dtype=torch.float64),
    "huge": 1e30 * torch.randn(64, 64, generator=torch.Generator().manual_seed(5), dtype=torch.float64),
    "one by one": torch.tensor([[-2.0]], dtype=torch.float64),
    "decaying": spectrum(10.0 ** -torch.arange(20, dtype=torch.float64), 200, 150),
}


@pytest.mark.parametrize("kind", ["identity", "projector", "rank one", "two values"])
def test_the_largest_eigenvalue_survives_krylov_spaces_that_close_at_once(kind):
    for n in (2, 3, 4, 5, 6, 8, 12, 33, 64):
        diagonal = {"identity": torch.ones(n), "projector": (torch.arange(n) < n // 2).float(),
                    "rank one": (torch.arange(n) == 0).float(), "two values": 1 + 0.5 * (torch.arange(n) == 0)}[kind]
        for scale in (1, 0.3, 1.7, -0.3):
            for block in (1, 2):
                matrix = scale * diagonal
                found = metrics._top_eigenvalue(lambda rows: rows * matrix, n, matrix, 1e-4, 100, block)
                assert found == pytest.approx(matrix.max().item(), rel=1e-5, abs=1e-6)


def test_two_starting_vectors_find_a_direction_that_one_all_but_misses():
    g = torch.Generator().manual_seed(3535)                                 # one such spectrum among seeds 0..3999
    n = int(torch.randint(20, 200, (1,), generator=g))
    values = torch.rand(n, generator=g, dtype=torch.float64) ** 3
    assert metrics.operator_norm(values.diag()) == pytest.approx(values.max().item(), rel=1e-3)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_operator_norm_is_within_a_thousandth_of_the_exact_norm(name, dtype):
    matrix = OPERATORS[name].to(dtype)
    exact = torch.linalg.matrix_norm(matrix.double(), ord=2).item()
    for weight in (matrix, matrix.T):
        assert metrics.operator_norm(weight) == pytest.approx(exact, rel=1e-3)


def test_operator_norm_over_many_random_spectra():
    for seed in range(60):
        g = torch.Generator().manual_seed(seed)
        m, n = torch.randint(20, 200, (2,), generator=g).tolist()
        values = torch.rand(min(m, n), generator=g, dtype=torch.float64) ** [0.02, 0.1, 0.5, 3][seed % 4]
        assert metrics.operator_norm(spectrum(values, m, n, seed)) == pytest.approx(values.max().item(), rel=1e-3)


def test_operator_norm_of_zero_gains_convolutions_bfloat16_and_nan():
    assert metrics.operator_norm(torch.zeros(5, 7)) == 0.0
    assert metrics.operator_norm(torch.tensor([1.0, -3.0])) == 3.0
    conv = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    assert metrics.operator_norm(conv) == pytest.approx(torch.linalg.matrix_norm(conv.flatten(1), 2).item(), rel=1e-3)
    half = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert metrics.operator_norm(half) == pytest.approx(torch.linalg.matrix_norm(half.float(), 2).item(), rel=1e-3)
    assert math.isnan(metrics.operator_norm(torch.tensor([[1.0, math.nan], [0.0, 1.0]])))


def test_operator_norm_is_deterministic_and_warns_when_it_stops_early():
    weight = OPERATORS["gaussian"]
    torch.manual_seed(1)
    first = metrics.operator_norm(weight)
    torch.manual_seed(2)
    assert metrics.operator_norm(weight) == first
    with pytest.warns(UserWarning, match="raise max_steps"):
        metrics.operator_norm(weight, max_steps=4)


# --- layer and logit statistics, gradients

def test_layer_statistics_count_dead_units_and_the_output_change():
    model, reference, x = mlp_pair()
    model[2].weight.data[:8], model[2].bias.data[:8] = 0, -1                # eight of 32 units dead
    stats = metrics.layer_statistics(model, reference, x)["4"]
    dead = (model[:4](x) == 0).all(dim=0)
    assert stats["dead_inputs"] == pytest.approx(dead.double().mean().item()) and 8 <= dead.sum() < 32
    output, output0 = model[:4](x) @ model[4].weight.T, reference[:4](x) @ reference[4].weight.T
    assert stats["output"] == pytest.approx(output.square().mean(dim=1).sqrt().mean().item())
    assert stats["output_change"] == pytest.approx((output - output0).square().mean(dim=1).sqrt().mean().item())


def test_gradient_norms_are_those_of_backward():
    model, _, x = mlp_pair()
    y = torch.arange(20) % 3
    norms = metrics.gradient_norms(model, F.cross_entropy, x, y)
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    assert norms == pytest.approx({name: p.grad.norm().item() for name, p in model.named_parameters()}, rel=1e-12)


def test_logit_statistics_against_the_closed_forms_of_cross_entropy_and_mse():
    logits = torch.randn(6, 2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)     # (B, T, V)
    targets = torch.arange(12).view(6, 2) % 5
    onehot = F.one_hot(targets, 5).double()
    rms = lambda v: v.square().mean(dim=-1).sqrt().mean().item()
    stats = metrics.logit_statistics(logits, targets, lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten()))
    margin = ((logits * onehot).sum(-1) - (logits - 1e9 * onehot).amax(-1)).mean().item()
    assert stats == pytest.approx({"rms": rms(logits), "margin": margin, "chi": rms(logits.softmax(-1) - onehot)}, rel=1e-9)
    mse = metrics.logit_statistics(logits, targets, lambda z, y: F.mse_loss(z, F.one_hot(y, 5).double()))
    assert mse["chi"] == pytest.approx(rms(2 / 5 * (logits - onehot)), rel=1e-12)


# --- sharpness

SPECTRA = {"positive": torch.linspace(0.1, 3, 40), "negative dominant": torch.cat([-torch.linspace(1, 100, 39), torch.tensor([1.0])]),
           "all negative": -torch.linspace(0.5, 50, 40), "top is zero": torch.cat([torch.zeros(3), -torch.linspace(1, 9, 37)]),
           "ill separated": torch.cat([3 - 1e-3 * torch.arange(30), -torch.linspace(1, 5, 10)])}


@pytest.mark.parametrize("name", SPECTRA)
def test_sharpness_is_the_most_positive_eigenvalue(name):
    values = SPECTRA[name].double()
    found = metrics.sharpness(Quadratic(), identity_loss, symmetric(values), None)
    assert found == pytest.approx(values.max().item(), rel=1e-2, abs=1e-9)


def exact_hessian(model, loss_fn, x, y):
    shapes = {name: p.detach() for name, p in model.named_parameters()}
    def loss(flat):
        parts = flat.split([p.numel() for p in shapes.values()])
        return loss_fn(torch.func.functional_call(model, {n: q.view_as(p) for (n, p), q in zip(shapes.items(), parts)}, (x,)), y)
    return torch.func.hessian(loss)(torch.cat([p.flatten() for p in shapes.values()]))


@pytest.mark.parametrize("sign", [1, -1])
def test_sharpness_of_a_small_net_is_within_one_percent_of_the_exact_hessian(sign):
    model, _, x = mlp_pair(sizes=(6, 12, 12, 3))
    y = torch.arange(20) % 3
    loss_fn = lambda logits, targets: sign * F.cross_entropy(logits, targets)   # -1: a negative-dominant spectrum
    eigenvalues = torch.linalg.eigvalsh(exact_hessian(model, loss_fn, x, y))
    assert metrics.sharpness(model, loss_fn, x, y) == pytest.approx(eigenvalues[-1].item(), rel=1e-2)
    single = metrics.sharpness(copy.deepcopy(model).float(), loss_fn, x.float(), y)
    assert single == pytest.approx(eigenvalues[-1].item(), rel=1e-2)


def test_preconditioned_sharpness_is_that_of_the_similar_matrix():
    model, _, x = mlp_pair(sizes=(6, 12, 3))
    y, g = torch.arange(20) % 3, torch.Generator().manual_seed(0)
    p = {name: 10 ** torch.randn(q.shape, generator=g, dtype=torch.float64) for name, q in model.named_parameters()}
    flat = torch.cat([q.flatten() for q in p.values()])
    hessian = exact_hessian(model, F.cross_entropy, x, y)
    exact = torch.linalg.eigvals(hessian / flat[:, None]).real.max().item()     # P^-1 H has the same eigenvalues
    for given in (p, list(p.values())):
        assert metrics.sharpness(model, F.cross_entropy, x, y, preconditioner=given) == pytest.approx(exact, rel=1e-2)
    with pytest.raises(ValueError, match="'2.bias' must be a positive tensor"):
        metrics.sharpness(model, F.cross_entropy, x, y, preconditioner={**p, "2.bias": torch.zeros(3)})


def test_sharpness_of_attention_and_of_losses_that_are_linear_or_not_scalar():
    model, _, tokens = block_pair()
    loss_fn = lambda logits, targets: F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert metrics.sharpness(model, loss_fn, tokens, tokens) > 0            # double backward through SDPA
    linear = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        assert metrics.sharpness(linear, lambda z, y: z.sum(), torch.randn(2, 3), None) == 0.0
    with pytest.raises(ValueError, match="must return a scalar"):
        metrics.sharpness(linear, lambda z, y: z, torch.randn(2, 3), None)


# --- calibration

def test_calibration_error_against_hand_counts():
    def logits(confidence):                                                 # two classes, class 0 predicted
        return torch.tensor([[math.log(c / (1 - c)), 0.0] for c in confidence], dtype=torch.float64)

    ece = metrics.expected_calibration_error(logits([0.9, 0.9, 0.6, 0.6]), torch.tensor([0, 1, 0, 0]), bins=10)
    assert ece == pytest.approx(0.5 * abs(0.5 - 0.9) + 0.5 * abs(1.0 - 0.6))
    near = metrics.expected_calibration_error(logits([0.95, 0.95, 0.85, 0.85]), torch.tensor([0, 1, 0, 0]), bins=10)
    assert near == pytest.approx(0.5 * abs(0.5 - 0.95) + 0.5 * abs(1.0 - 0.85))
    merged = metrics.expected_calibration_error(logits([0.9, 0.9, 0.6, 0.6]), torch.tensor([0, 1, 0, 0]), bins=1)
    assert merged == pytest.approx(abs(0.75 - 0.75))


def test_a_calibrated_model_has_small_calibration_error_and_doubling_its_logits_does_not():
    g = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(40_000, 5, generator=g)
    targets = torch.multinomial(logits.softmax(dim=-1), 1, generator=g).squeeze(1)
    assert metrics.expected_calibration_error(logits, targets) < 0.015
    assert metrics.expected_calibration_error(2 * logits, targets) > 0.05


# --- exponents

def test_fit_exponent_recovers_a_power_law_exactly():
    widths = [64, 128, 512, 1024]
    slope, intercept = metrics.fit_exponent(widths, [3 * n**-0.5 for n in widths])
    assert slope == pytest.approx(-0.5, abs=1e-12) and intercept == pytest.approx(math.log(3), abs=1e-11)
    factors = torch.rand(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.1
    factors = factors / factors.log().mean(dim=0).exp()                     # the seeds' geometric mean is 3 n^-1/2
    values = factors * 3 * torch.tensor(widths, dtype=torch.float64) ** -0.5
    assert metrics.fit_exponent(widths, values) == pytest.approx((slope, intercept), abs=1e-11)


@pytest.mark.parametrize("widths,values,message", [
    ([1, 2, 3], [1.0, math.nan, 2.0], "nan"), ([1, 2], [1.0, math.inf], "inf"), ([1, 2], [[1.0, 2.0], [-3.5, 1.0]], "-3.5"),
    ([1, 2], [0.0, 1.0], r"\[0.0\]"), ([8, 8], [1.0, 2.0], "two distinct widths"), ([1, 2, 3], [1.0, 2.0], "need")])
def test_values_without_an_exponent_are_refused_and_named(widths, values, message):
    for fit in (metrics.fit_exponent, metrics.exponent_interval):
        with pytest.raises(ValueError, match=message):
            fit(widths, values)


@pytest.mark.parametrize("seeds,count", [(3, 5), (3, 3), (2, 5), (5, 4), (1, 5)])
def test_exponent_interval_covers_the_exponent_about_as_often_as_it_says(seeds, count):
    widths = 64 * 2.0 ** torch.arange(count, dtype=torch.float64)
    g, trials, covered = torch.Generator().manual_seed(seeds * 10 + count), 400, 0
    for trial in range(trials):
        noise = 0.2 * torch.randn(seeds, count, generator=g, dtype=torch.float64)
        low, high = metrics.exponent_interval(widths, (noise - 0.5 * widths.log()).exp(), resamples=400, seed=trial)
        covered += low <= -0.5 <= high
    assert 0.91 <= covered / trials <= 0.995                                # four standard errors about 0.95: 0.045


def test_exponent_interval_without_spread_is_the_point_and_the_grids_resolution_widens_it():
    widths = [64, 128, 256, 512]
    values = [[n**-0.5 for n in widths]] * 3
    assert metrics.exponent_interval(widths, values) == pytest.approx((-0.5, -0.5), abs=1e-12)
    low, high = metrics.exponent_interval(widths, values, resolution=2.0)
    log_n = torch.tensor(widths).double().log()
    spread = (math.log(2) / math.sqrt(12)) / (log_n - log_n.mean()).norm().item()   # standard deviation of the slope
    assert high - low == pytest.approx(2 * 1.96 * spread, rel=0.1) and low < -0.5 < high
    assert all(math.isnan(v) for v in metrics.exponent_interval([1, 2], [1.0, 2.0]))


# --- other people's models

def test_gpt2_of_transformers_is_measured_whole():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=13, n_positions=8, n_embd=16, n_layer=1, n_head=2, tie_word_embeddings=False)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    reference, tokens = copy.deepcopy(model), torch.randint(13, (2, 8))
    for p in model.parameters():
        p.data += 0.01 * torch.randn(p.shape)
    with warnings.catch_warnings():
        warnings.simplefilter("error")                                      # nothing is left out
        rows = metrics.refined_coordinate_check(model, reference, tokens)
    assert len(rows) == sum(name.endswith("weight") for name, _ in model.named_parameters())
    assert all(row["effective"] > 0 for row in rows.values()) and rows["transformer.h.0.attn.c_attn"]["propagating"] > 0


def test_a_compiled_model_is_measured_under_the_names_of_the_plain_one():
    model, reference, x = mlp_pair()
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    plain = metrics.refined_coordinate_check(model, reference, x)
    assert metrics.refined_coordinate_check(compiled, reference, x) == plain


# ------------------------------------------------------------------------------------------------------------------
# Closed-form linear net

def explicit_linear_net(run, alpha, base_width, weight_decay, schedule, steps, x=1.3, y=0.7):
    """(f, loss) before every step and after the last, up to divergence: torch.optim.SGD on nn.Linear with param's table."""
    parameterization, width, lr, seed = run
    net, base, other = (models.MLP(1, n, 1, 1, activation="identity").double() for n in (width, base_width, 2 * base_width))
    roles = param.infer_roles(other, base)
    param.init_(net, base, parameterization, seeded(seed), gain=1.0, overrides=roles)
    groups = param.param_groups(net, base, parameterization, "sgd", lr, alpha, weight_decay, overrides=roles)
    optimizer, path = torch.optim.SGD(groups), []
    for step in range(steps + 1):
        f = net(torch.full((1, 1), x, dtype=torch.float64)).squeeze()
        path.append((f.item(), ((f - y) ** 2 / 2).item()))
        if not math.isfinite(path[-1][1]):
            break
        for group in optimizer.param_groups:
            group["lr"] = schedule(step) * group["base_lr"]
        optimizer.zero_grad()
        ((f - y) ** 2 / 2).backward()
        optimizer.step()
    return torch.tensor(path, dtype=torch.float64).T


@pytest.mark.parametrize("weight_decay, scheduled", [(0.0, False), (0.1, True)])
@pytest.mark.parametrize("parameterization", models.LINEAR_NET)
def test_the_linear_net_is_gradient_descent_with_the_exponents_of_param(parameterization, weight_decay, scheduled):
    config = train.configure({"steps": 50, "warmup": 10, "decay": "cosine"})
    schedule = (lambda step: train.schedule(step, config)) if scheduled else (lambda step: 1.0)
    lrs, diverged = [0.01, 0.1, 4.0], 0
    for width, base_width, alpha in ((64, 1, 0.0), (200, 16, 0.5)):
        path = models.linear_net(width, lrs, 50, parameterization, [[0], [3]], alpha, base_width, 1.3, 0.7, weight_decay, schedule)
        assert path.f.shape == path.ntk.shape == path.loss.shape == (51, 2, 3)
        for (s, seed), (i, lr) in ((a, b) for a in enumerate((0, 3)) for b in enumerate(lrs)):
            f, loss = explicit_linear_net((parameterization, width, lr, seed), alpha, base_width, weight_decay, schedule, 50)
            last = len(loss) if loss[-1].isfinite() else len(loss) - 1
            assert path.diverged_at[s, i].item() == (-1 if last == 51 else last)
            assert ((path.f[:last, s, i] - f[:last]).abs() <= 1e-9 * f[:last].abs().clamp_min(1)).all()
            torch.testing.assert_close(path.loss[:last, s, i], loss[:last], rtol=1e-8, atol=1e-9)
            assert path.f[last:, s, i].isnan().all()
            diverged += last < 51
    assert 2 <= diverged <= 8       # of 12: the equality covers runs that blow up


def test_the_linear_nets_exponents_are_those_of_param():
    for name in param.PARAMETERIZATIONS:
        e = param.exponents(name, "sgd")
        assert models.LINEAR_NET[name] == (e["output"][0], e["input"][1], e["output"][1])


def test_the_ntk_is_the_gradient_kernel_with_the_learning_rates_width_factors():
    for name, k_u, k_v, std in (("sp", 1, 1, 8), ("ntp", 1, 1 / 64, 8), ("mup", 64, 1 / 64, 64)):
        generator = seeded(2)
        u, v = (torch.randn(64, generator=generator, dtype=torch.float64) for _ in range(2))
        start = models.linear_net(64, 0.1, 1, name, seed=2, x=1.3)
        assert start.f[0].item() == pytest.approx(1.3 * (u @ v / std).item(), rel=1e-12)
        assert start.ntk[0].item() == pytest.approx(1.3 ** 2 * (k_u * (v @ v) / std ** 2 + k_v * (u @ u)).item(), rel=1e-12)


@pytest.mark.parametrize("parameterization, alpha", [("mup", 0.0), ("ntp", 0.0), ("sp", 1.0)])
def test_the_linear_net_approaches_its_infinite_width_limit_as_one_over_root_n(parameterization, alpha):
    widths, seeds = [4 ** k for k in range(4, 9)], torch.arange(24)
    for start in (True, False):
        distances = []
        for width in widths:
            path = models.linear_net(width, 0.1, 8, parameterization, seeds, alpha)
            f0 = path.f[0] if start and parameterization != "mup" else None
            limit = models.linear_net(math.inf, 0.1, 8, parameterization, seeds, alpha, f0=f0)
            distances.append((path.f - limit.f)[8].abs())
        slope = metrics.fit_exponent(widths, torch.stack(distances, -1))[0]
        if start or parameterization == "mup":
            assert abs(slope + 0.5) < 0.1                       # neither n^-1 nor n^0
        else:
            assert abs(slope) < 0.2                             # another draw of the random initial f is no limit


def test_the_limits_of_the_linear_net():
    lazy, feature = models.linear_net(math.inf, 0.1, 9, "ntp"), models.linear_net(math.inf, 0.1, 9, "mup")
    assert (lazy.ntk == 2).all() and lazy.f[0] != 0
    torch.testing.assert_close(lazy.f - 1, (lazy.f[0] - 1) * 0.8 ** torch.arange(10).double())         # linear regression
    assert feature.f[0] == 0 and feature.ntk[0] == 2 and feature.ntk[9] > 2.1
    assert (models.linear_net(math.inf, 0.1, 9, "sp", alpha=1.0).ntk == 1).all()
    for alpha in (0.0, 0.5):
        with pytest.raises(ValueError, match="use alpha >= 1"):
            models.linear_net(math.inf, 0.1, 9, "sp", alpha=alpha)
    with pytest.raises(ValueError, match="choose from sp, ntp, mup"):
        models.linear_net(64, 0.1, 9, "muP")


def test_an_unstable_minimum_of_the_linear_net_is_left():
    """In float64, f itself comes to rest exactly at y = 1 during a slow warmup, at LRs whose sharpness is many times 2 / LR."""
    width, lr, steps, warmup = 4096, 20 / 4096, 3000, 1000
    path = models.linear_net(width, lr, steps, "sp", schedule=lambda step: min(1.0, (step + 1) / warmup))
    f, ntk = path.f[0].item(), path.ntk[0].item()
    for step in range(steps):
        g = lr * min(1.0, (step + 1) / warmup) * (f - 1)
        f, ntk = f * (1 + g * g) - g * ntk, ntk * (1 + g * g) - 4 * g * f
    assert f == 1 and lr * ntk > 10
    assert path.diverged_at > 0


C3 = [("sp", 0.5, 1.0), ("sp", 1.0, 0.0), ("sp", 1.5, -0.5), ("ntp", 0.0, 0.0)]     # the squared loss doubles 1/2


def predicted_decrease(parameterization, alpha, hidden_layers):
    logits = max(getattr(param.predict(parameterization, "sgd", "mse", alpha, hidden_layers), kind)[-1]
                 for kind in ("effective", "propagating"))
    return max(logits, 2 * logits)


@pytest.mark.parametrize("parameterization, alpha, exponent", C3)
def test_proposition_c3_loss_decrease_of_the_linear_net_after_one_step(parameterization, alpha, exponent):
    widths, seeds = [4 ** k for k in range(4, 9)], torch.arange(32)
    losses = [models.linear_net(width, 0.5, 1, parameterization, seeds, alpha).loss for width in widths]
    slope = metrics.fit_exponent(widths, torch.stack([(loss[1] - loss[0]).abs().median() for loss in losses]))[0]
    assert predicted_decrease(parameterization, alpha, 1) == exponent
    assert abs(slope - exponent) < 0.15
    for other in (alpha - 0.25, alpha + 0.25):
        assert abs(slope - predicted_decrease(parameterization, other, 1)) > 0.15
    assert all((loss[1] < loss[0]).all() for loss in losses) == (exponent <= 0)


@pytest.mark.parametrize("parameterization, alpha, exponent", C3)
def test_proposition_c3_loss_decrease_of_the_mlp_after_one_step(parameterization, alpha, exponent):
    """Small readout and unequal classes as in first_step_exponents: so labels, not random initial logits, set the loss."""
    widths, decreases = (128, 256, 512, 1024), []
    x, y = train.multi_index(256, seeded(7))
    chosen = torch.cat([(y == 1).nonzero()[:48], (y == 0).nonzero()[:16]]).squeeze(1)
    x, y = x[chosen].double(), F.one_hot(y[chosen]).double()
    lr = 0.5 if exponent > 0 else 0.003                         # far beyond the edge, or well within it
    for seed in range(3):
        for width in widths:
            model, base = net_and_base(width, 64, d_in=100, classes=2)
            param.init_(model, base, parameterization, seeded(seed), std={"output": 0.05 * math.sqrt(2 / 64)})
            before = F.mse_loss(model(x), y)
            before.backward()
            torch.optim.SGD(param.param_groups(model, base, parameterization, "sgd", lr, alpha)).step()
            decreases.append(before.item() - F.mse_loss(model(x), y).item())
    decreases = torch.tensor(decreases).view(3, len(widths))
    assert ((decreases > 0) == (exponent <= 0)).all()
    slope = metrics.fit_exponent(widths, decreases.abs().median(0).values)[0]
    assert abs(slope - exponent) < 0.2                          # widths to 1024 only
    for other in (alpha - 0.5, alpha + 0.5):
        assert abs(slope - predicted_decrease(parameterization, other, 3)) > 0.3


FAST = ["--model", "linear_net", "--widths", "64", "1024", "16384", "--steps", "600", "--seeds", "2",
        "--lrs", *(2 ** (k / 2) for k in range(-32, -2))]


def test_a_sweep_of_the_linear_net_finds_slope_minus_one_unless_the_warmup_grows_with_width(tmp_path):
    done = run_script("sweep.py", *FAST, "--out", tmp_path)
    assert done.returncode == 0 and "warmup_exponent" in done.stdout, done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    found = {(row["warmup"], row["warmup_exponent"]): row for row in summary["rows"]}
    assert list(found) == [(0, 0.0), (32, 0.0), (32, 0.5)]
    assert [row["predicted_max_stable_exponent"] for row in found.values()] == [-1.0, -1.0, -0.5]
    for row in found.values():
        assert abs(row["max_stable_exponent"] - row["predicted_max_stable_exponent"]) < 0.15
        assert row["optimal_lr"] == [None] * 3 and not row["flags"]
    assert {entry["param"] for entry in summary["linear_net"]["distance"]} == {"mup", "ntp"}
    assert [path.name for path in sorted((tmp_path / "figures").iterdir())] == ["linear_net.pdf", "linear_net.png"]


def test_rows_of_the_linear_net_are_its_trajectories(tmp_path):
    fixed = {**train.FIXED["linear_net"], "model": "linear_net", "width": 4096, "base_width": 1, "steps": 40}
    runs = [dict(fixed, param=name, lr=lr, seed=seed) for name in ("sp", "mup") for lr in (1e-4, 0.1) for seed in (0, 1)]
    rows = train.train(runs)
    for run, row in zip(runs, rows):
        path = models.linear_net(4096, run["lr"], 40, run["param"], run["seed"])
        last = path.diverged_at.item()
        assert row["diverged_at"] == (None if last < 0 else last)
        assert row["final_train_loss"] == (pytest.approx(path.loss[36:40].mean().item()) if last < 0 else None)
        assert row["val_loss"] is None and row["chance_loss"] == 0.5 and row["id"] == train.run_id(train.configure(run))
    assert [row["diverged_at"] is None for row in rows] == [True, True, False, False, True, True, True, True]
    for setting, words in (({"loss": "ce"}, "needs loss = 'mse'"), ({"optimizer": "adam"}, "needs optimizer = 'sgd'")):
        with pytest.raises(ValueError, match=words):
            train.train([{**fixed, **setting}])
    with pytest.raises(ValueError, match="no modules to track"):
        train.train([fixed], track=1)


# --- the README

def test_the_readmes_table_is_the_one_in_param():
    def numbers(values):
        return ", ".join({0: "0", 0.5: "½", 1: "1", -0.5: "-½", -1: "-1"}[value] for value in values)
    readme = (HERE / "README.md").read_text()
    for name, row in param.PARAMETERIZATIONS.items():
        line = f"| `{name}` | {numbers(row['b'][:3])} | {numbers(row['sgd'])} | {numbers(row['adam'])} | {numbers(row['adam_eps'])} |"
        assert line in readme


def test_every_flag_in_the_readme_exists():
    known = {"--nproc-per-node", "--nnodes", "--max-restarts"}      # torchrun's
    for script in MAIN:
        known |= set(re.findall(r"--[a-z][a-z0-9-]+", run_script(script, "--help").stdout))
    for flag in set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", (HERE / "README.md").read_text())):
        assert flag in known, flag
