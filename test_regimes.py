"""The paper's statements as tests: `pytest test_regimes.py` checks in seconds
that the regimes hold here.

arXiv 2505.22491 (Haas, Bordt, von Luxburg, Vankadara): Proposition 1 (which
learning rates ∝ n^-α are stable), Proposition 2 (which layers then learn
features), Proposition C.3 (the loss decrease of one step). First exactly, in the
table of param.py; then measured, on real networks; last the stability edge
itself. Every measurement also shows that a neighbouring exponent would fail.

    n, n0     width, base width
    α         LR ∝ n^-α on top of the parameterization
    sp        standard parameterization, one global LR: its edge is α = 1/2
              under cross-entropy, 1 under MSE
    effective, propagating      updates ΔW x and W0 Δx, as in metrics.py

Needs requirements.txt only. The tests of the files themselves are in tests/.
"""
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import linear_net
import metrics
import models
import param

# the nets here are small; threads would only wait for each other
torch.set_num_threads(1)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# ---- the table: Propositions 1 and 2, exactly ----

@pytest.mark.parametrize("loss, optimizer, hidden_layers, trainable, alpha", [
    ("ce", "sgd", 3, "all", 0.5),
    ("ce", "sgd", 7, "all", 0.5),
    ("brier", "sgd", 3, "all", 0.5),
    ("huber", "sgd", 3, "all", 0.5),
    ("hinge", "sgd", 3, "all", 0.5),
    ("mse", "sgd", 3, "all", 1.0),
    ("squared_hinge", "sgd", 3, "all", 1.0),
    ("ce", "sgd", 1, "all", 0.0),
    ("mse", "sgd", 1, "all", 1.0),
    ("ce", "adam", 3, "all", 1.0),
    ("mse", "adam", 3, "all", 1.0),
    ("ce", "sgd", 3, "readout", -math.inf),
    ("mse", "sgd", 3, "readout", 1.0),
])
def test_proposition_1_largest_stable_exponents_of_sp(
        loss, optimizer, hidden_layers, trainable, alpha):
    assert param.max_stable_alpha("sp", optimizer, loss, hidden_layers, trainable) == alpha


@pytest.mark.parametrize("alpha, regime_ce, regime_mse", [
    (0.25, "catastrophic", "catastrophic"),
    (0.5, "controlled divergence", "catastrophic"),
    (0.75, "controlled divergence", "catastrophic"),
    (1.0, "stable", "stable"),
    (1.25, "stable", "stable"),
])
def test_proposition_1_the_middle_regime_exists_for_bounded_derivatives_only(
        alpha, regime_ce, regime_mse):
    assert param.predict("sp", "sgd", "ce", alpha).regime == regime_ce
    assert param.predict("sp", "sgd", "mse", alpha).regime == regime_mse


def test_proposition_2_at_alpha_one_half_hidden_layers_learn_features_the_input_layer_does_not():
    # layers 1 (input), 2 to 4 (hidden), 5 (readout); propagating from 2 on
    later = param.predict("sp", "sgd", "ce", alpha=0.5, hidden_layers=4, step=2)
    assert later.features == [-1.0, 0.0, 0.0, 0.0]
    assert later.effective == [-1.0, 0.0, 0.0, 0.0, 0.5]
    assert later.propagating == [-1.0, 0.0, 0.0, 0.5]
    assert later.logits == 0.5


@pytest.mark.parametrize("optimizer", param.OPTIMIZERS)
def test_mup_is_stable_and_learns_features_in_every_layer(optimizer):
    prediction = param.predict("mup", optimizer, "mse", step=2)
    assert prediction.regime == "stable"
    assert set(prediction.features) == {0.0}
    assert prediction.logits == 0.0
    assert param.max_stable_alpha("mup", optimizer, "mse") == 0.0


def test_sp_full_align_sits_at_the_edge_of_controlled_divergence():
    prediction = param.predict("sp_full_align", "sgd", "ce", step=2)
    assert prediction.regime == "controlled divergence"
    assert set(prediction.features) == {0.0}
    assert prediction.logits == 0.5
    assert param.max_stable_alpha("sp_full_align", "sgd", "ce") == 0.0


def test_ntp_is_stable_and_its_features_vanish():
    prediction = param.predict("ntp", "sgd", "mse", step=2)
    assert prediction.regime == "stable"
    assert max(prediction.features) == -0.5
    assert prediction.logits == 0.0


# ---- real networks: data and training ----

def multi_index(size, generator):
    """x ~ N(0, I_100), y = [relu(x1) + relu(x2) > relu(x3) + relu(x4)]:
    two balanced classes."""
    x = torch.randn(size, 100, generator=generator)
    z = torch.relu(x[:, :4])
    return x, (z[:, 0] + z[:, 1] > z[:, 2] + z[:, 3]).long()


def uneven_batch(seed):
    """64 samples, three quarters of one class: else the readout updates of the
    classes all but cancel."""
    x, y = multi_index(256, seeded(seed))
    chosen = torch.cat([(y == 1).nonzero()[:48], (y == 0).nonzero()[:16]]).squeeze(1)
    return x[chosen], y[chosen]


def squared_error(logits, y):
    return F.mse_loss(logits, F.one_hot(y, 2).to(logits))


LOSS = {"ce": F.cross_entropy, "mse": squared_error}
CHANCE = {"ce": math.log(2), "mse": 0.25}       # loss of the best constant
BASE_WIDTH = 256


def mlp_and_optimizer(width, seed, parameterization, optimizer, lr, alpha, hidden_layers=4):
    """The readout starts at a twentieth of its size at every width. That changes
    no exponent, and keeps initial logits, of order one and shrinking with width
    in mup, out of the softmax's derivative.
    """
    sizes = BASE_WIDTH, 2 * BASE_WIDTH, width
    with torch.device("meta"):      # where no weights are drawn
        base, wider, model = (models.MLP(100, n, hidden_layers, 2) for n in sizes)
    # a model of base width beside base would show no roles, twice it does
    roles, model = param.infer_roles(wider, base), model.to_empty(device="cpu")
    param.init_(model, base, parameterization, seeded(seed), overrides=roles,
                std={"output": 0.05 * math.sqrt(2 / BASE_WIDTH)})
    rule = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimizer]
    return model, rule(param.param_groups(
        model, base, parameterization, optimizer, lr, alpha, eps=1e-12, overrides=roles))


def updates_of_steps(loss, width, seed, steps, parameterization="sp",
                     optimizer="sgd", lr=0.1, alpha=0.0):
    """After every step: "effective" of layers 1 to 5 and "propagating" of 2 to 5,
    tensors (steps, layers)."""
    x, y = uneven_batch(100 + seed)
    model, rule = mlp_and_optimizer(width, seed, parameterization, optimizer, lr, alpha)
    reference, norms = copy.deepcopy(model), {"effective": [], "propagating": []}
    for _ in range(steps):
        rule.zero_grad()
        LOSS[loss](model(x), y).backward()
        rule.step()
        rows = metrics.refined_coordinate_check(model, reference, x).values()
        norms["effective"].append([row["effective"] for row in rows])
        norms["propagating"].append([row["propagating"] for row in rows][1:])
    return {kind: torch.tensor(values) for kind, values in norms.items()}


def width_exponents(widths, norms):
    """Slopes (...) of norms, one tensor (...) for each seed and, within it, each
    width."""
    norms = torch.stack(norms).double().unflatten(
        0, (-1, len(widths)))                           # (S, W, ...)
    slopes = [metrics.fit_exponent(widths, column)[0]
              for column in norms.flatten(2).unbind(-1)]
    return torch.tensor(slopes).view(norms.shape[2:])


# ---- the regimes, measured: updates of the first and of later steps ----

@pytest.mark.parametrize("parameterization, optimizer, alpha", [
    ("sp", "sgd", 0.0),
    ("sp", "sgd", 0.25),
    ("sp", "sgd", 0.5),
    ("sp", "sgd", 0.75),
    ("sp", "sgd", 1.0),
    ("sp", "adam", 1.0),
    ("ntp", "sgd", 0.0),
    ("mup", "sgd", 0.0),
    ("sp_full_align", "sgd", 0.0),
    ("mup", "adam", 0.0),
])
def test_first_step_exponents_are_the_predicted_ones(parameterization, optimizer, alpha):
    widths, lr = (128, 256, 512, 1024), {"sgd": 0.1, "adam": 1e-3}[optimizer]
    runs = [updates_of_steps("ce", width, seed, 1, parameterization, optimizer, lr, alpha)
            for seed in range(2) for width in widths]

    measured = {kind: width_exponents(widths, [run[kind][0] for run in runs])
                for kind in runs[0]}

    def errors(alpha):
        predicted = param.predict(parameterization, optimizer, "ce", alpha, hidden_layers=4)
        return torch.cat([
            measured["effective"] - torch.tensor(predicted.effective),
            measured["propagating"] - torch.tensor(predicted.propagating)]).abs()

    assert errors(alpha).max() < 0.15
    for wrong in (alpha - 0.25, alpha + 0.25):
        assert errors(wrong).min() > 0.1    # no layer fits the neighbouring exponent
        assert errors(wrong).max() > 0.15


def exponents_of_later_steps(loss, alpha, lr=0.1):
    """Exponents (steps, layers) of both updates, for three steps in sp; nan once
    a run diverged."""
    widths, exponents = (128, 256, 512, 1024), {}
    runs = [updates_of_steps(loss, width, seed, 3, lr=lr, alpha=alpha)
            for seed in range(2) for width in widths]
    for kind in ("effective", "propagating"):
        norms = torch.stack([run[kind] for run in runs])    # (runs, steps, layers)
        finite = norms.isfinite().all(0)
        slopes = width_exponents(widths, list(norms.where(finite, 1.0)))
        exponents[kind] = slopes.where(finite, math.nan)
    return exponents


def test_controlled_divergence_under_ce_logits_jump_with_width_and_hidden_updates_do_not():
    measured = exponents_of_later_steps("ce", 0.5)
    logits = torch.stack([measured["effective"][0, -1], measured["propagating"][0, -1]])
    assert (logits - 0.5).abs().max() < 0.15
    # the input layer and the hidden ones, at every step
    assert (measured["effective"][:, 0] + 1).abs().max() < 0.25
    assert measured["effective"][:, 1:-1].abs().max() < 0.25


def test_under_mse_the_same_jump_feeds_back_and_hidden_updates_blow_up():
    measured = exponents_of_later_steps("mse", 0.5)["effective"]
    assert measured[0, 1:-1].abs().max() < 0.15     # at first as under ce
    hidden = measured[2, 1:-1]
    assert ((hidden > 1) | hidden.isnan()).all()
    prediction = param.predict("sp", "sgd", "mse", 0.5, hidden_layers=4, step=3)
    assert prediction.lower_bound and prediction.effective[1:-1] == [0.0, 0.0, 0.0]


def test_under_mse_at_alpha_one_nothing_grows_with_width():
    measured = exponents_of_later_steps("mse", 1.0, lr=0.01)["effective"]
    assert measured[:, :-1].max() < -0.25       # features vanish, every step
    assert measured[:, -1].abs().max() < 0.25                               # logits


# ---- Proposition C.3: the loss decrease of one step ----

# parameterization, α, exponent of the change: a rise where it is above zero
C3 = [("sp", 0.5, 1.0), ("sp", 1.0, 0.0), ("sp", 1.5, -0.5), ("ntp", 0.0, 0.0)]


def predicted_decrease(parameterization, alpha, hidden_layers):
    """As the logits' update while that does not grow; beyond, the loss rises as
    its square."""
    told = param.predict(parameterization, "sgd", "mse", alpha, hidden_layers)
    logits = max(told.effective[-1], told.propagating[-1])
    return max(logits, 2 * logits)


@pytest.mark.parametrize("parameterization, alpha, exponent", C3)
def test_proposition_c3_loss_decrease_of_the_linear_net_after_one_step(
        parameterization, alpha, exponent):
    widths, seeds, changes = [4 ** k for k in range(4, 9)], torch.arange(32), []
    for width in widths:
        loss = linear_net.linear_net(width, 0.5, 1, parameterization, seeds, alpha).loss
        changes.append(loss[1] - loss[0])
    assert all((change < 0).all() for change in changes) == (exponent <= 0)

    slope = metrics.fit_exponent(
        widths, [change.abs().median().item() for change in changes])[0]
    assert predicted_decrease(parameterization, alpha, 1) == exponent
    assert abs(slope - exponent) < 0.15
    for wrong in (alpha - 0.25, alpha + 0.25):
        assert abs(slope - predicted_decrease(parameterization, wrong, 1)) > 0.15


@pytest.mark.parametrize("parameterization, alpha, exponent", C3)
def test_proposition_c3_loss_decrease_of_the_mlp_after_one_step(
        parameterization, alpha, exponent):
    widths, changes = (128, 256, 512, 1024), []
    # far beyond the edge, or well within it
    lr = 0.25 if exponent > 0 else 4e-4
    x, y = uneven_batch(7)
    for seed in range(5):
        for width in widths:
            model, optimizer = mlp_and_optimizer(
                width, seed, parameterization, "sgd", lr, alpha, 3)
            model, x = model.double(), x.double()
            before = squared_error(model(x), y)
            before.backward()
            optimizer.step()
            changes.append(squared_error(model(x), y).item() - before.item())
    changes = torch.tensor(changes).view(5, len(widths))
    assert ((changes < 0) == (exponent <= 0)).all()

    slope = metrics.fit_exponent(widths, changes.abs())[0]
    assert predicted_decrease(parameterization, alpha, 3) == exponent
    assert abs(slope - exponent) < 0.2      # widths to 1024 only
    for wrong in (alpha - 0.5, alpha + 0.5):
        assert abs(slope - predicted_decrease(parameterization, wrong, 3)) > 0.3


# ---- the edge itself, in plain torch: nn.Module, torch.optim and param_groups ----

def net(width):
    """Four hidden layers."""
    layers = [nn.Linear(100, width, bias=False), nn.ReLU()]
    for _ in range(3):
        layers += [nn.Linear(width, width, bias=False), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 2, bias=False))


def trains(loss, width, lr, seed, steps=200):
    """Does the loss stay finite, and end (mean of the last tenth) below a constant
    predictor's?"""
    model, base = net(width), net(32).to("meta")
    param.init_(model, base, "sp", seeded(seed), std={"output": 0.05 * math.sqrt(2 / 32)})
    optimizer = torch.optim.SGD(param.param_groups(model, base, "sp", "sgd", lr))
    data, total = seeded(100 + seed), 0.0
    for step in range(steps):
        x, y = multi_index(64, data)
        value = LOSS[loss](model(x), y)
        if not value.isfinite():
            return False
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        if step >= 0.9 * steps:
            total += value.item()
    return total / (0.1 * steps) < CHANCE[loss]


def edge(loss, width, seed):
    """log2 of the largest LR that trains, by bisection to a factor sqrt(2) between
    2^-7 and 2."""
    low, high = -14, 2              # half octaves
    while high - low > 1:
        middle = (low + high) // 2
        low, high = ((middle, high)
                     if trains(loss, width, 2 ** (middle / 2), seed)
                     else (low, middle))
    return (low + high) / 4         # the middle of the two, in octaves


def test_the_edge_falls_as_root_n_under_ce_and_as_n_under_mse():
    widths, slopes = (64, 128, 512), {}
    for loss in LOSS:
        edges = [[2 ** edge(loss, width, seed) for width in widths] for seed in range(2)]
        slopes[loss] = metrics.fit_exponent(widths, edges)[0]
        # the edge falls as n^-α: within 0.25, so the other loss's α fails
        assert abs(slopes[loss] + param.max_stable_alpha("sp", "sgd", loss)) < 0.25, slopes
    assert slopes["mse"] < slopes["ce"] - 0.25
