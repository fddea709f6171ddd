"""The paper's statements as tests: `pytest test_regimes.py` checks in seconds
that the regimes hold here.

arXiv 2505.22491 (Haas, Bordt, von Luxburg, Vankadara): Proposition 1 (which
learning rates ∝ n^-α are stable), Proposition 2 (which layers then learn
features), Proposition C.3 (the loss decrease of one step). First exactly, in the
table of param.py; then measured, on real networks; last the stability edge
itself.

Measured exponents are random, so every bound lies at least four standard
deviations from the mean over a hundred shifts of all seeds, and what a wrong
exponent would give at least four beyond the bound; comments tell mean ± standard
deviation. `python test_regimes.py 100` measures them again, in half an hour.

    n, n0     width, base width
    α         LR ∝ n^-α on top of the parameterization
    sp        standard parameterization, one global LR: its edge is α = 1/2
              under cross-entropy, 1 under MSE
    effective, propagating      updates ΔW x and W0 Δx, as in metrics.py

Needs requirements.txt only. The tests of the files themselves are in tests/.
"""
import copy
import math
import os
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import estimate
import linear_net
import metrics
import models
import param
import stack

# the nets here are small; threads would only wait for each other
torch.set_num_threads(1)


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
    ("ce", "sgd", 3, ("output",), -math.inf),
    ("mse", "sgd", 3, ("output",), 1.0),
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


# ---- real networks: data, training and what is measured ----

# Measurements fluctuate from seed to seed as n^-1/2, so a width n is averaged
# over UNITS / n seeds: every width is then known equally well, at equal cost.
UNITS = 3072
WIDTHS = (128, 256, 512, 1024)
BASE_WIDTH = 256
HIDDEN_LAYERS = 3
SHIFT = 0           # of all seeds; `main` measures with a hundred of them
RECORDS = []        # what `agrees` compared: (test, measured, predicted, bound, wrong)


def seeded(seed):
    return torch.Generator().manual_seed(seed + SHIFT)


def check(measured, low, high, *wrong):
    """Assert that every measured value lies between its bounds, and that each
    wrong hypothesis predicts values outside of them."""
    measured, low, high, *wrong = map(torch.as_tensor, (measured, low, high, *wrong))
    test = os.environ["PYTEST_CURRENT_TEST"].partition("::")[2].partition(" ")[0]
    RECORDS.append((test, measured, low, high, wrong))
    assert ((low < measured) & (measured < high)).all()
    for other in wrong:
        assert ((other < low) | (other > high)).all()


def around(predicted, bound):
    predicted = torch.as_tensor(predicted)
    return predicted - bound, predicted + bound


def multi_index(size, generator):
    """x ~ N(0, I_100), y = [relu(x1) + relu(x2) > relu(x3) + relu(x4)]:
    two balanced classes."""
    x = torch.randn(size, 100, generator=generator)
    z = torch.relu(x[:, :4])
    return x, (z[:, 0] + z[:, 1] > z[:, 2] + z[:, 3]).long()


def uneven_batch(seed):
    """64 samples, three quarters of one class: of a balanced batch the readout
    updates of the two classes all but cancel."""
    x, y = multi_index(256, seeded(seed))
    rows = torch.cat([(y == 1).nonzero()[:48], (y == 0).nonzero()[:16]]).squeeze(1)
    return x[rows], y[rows]


def squared_error(logits, y):
    return F.mse_loss(logits, F.one_hot(y, 2).to(logits))


LOSS = {"ce": F.cross_entropy, "mse": squared_error}
CHANCE = {"ce": math.log(2), "mse": 0.25}       # loss of the best constant


def mlp_and_optimizer(width, seed, parameterization, optimizer, lr, alpha,
                      hidden_layers=HIDDEN_LAYERS):
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


def update_exponents(loss, steps, parameterization="sp", optimizer="sgd",
                     lr=0.1, alpha=0.0):
    """Measured width exponents, [layer][step], of the effective updates of every
    layer, then of the propagating ones from layer 2 on; nan where a run diverged."""
    means = []
    for width in WIDTHS:
        norms = []
        for seed in range(UNITS // width):
            x, y = uneven_batch(1000 + seed)
            model, rule = mlp_and_optimizer(width, seed, parameterization, optimizer, lr, alpha)
            reference = copy.deepcopy(model)
            for _ in range(steps):
                rule.zero_grad()
                LOSS[loss](model(x), y).backward()
                rule.step()
                rows = metrics.refined_coordinate_check(model, reference, x).values()
                norms.append([row["effective"] for row in rows]
                             + [row["propagating"] for row in rows][1:])
        logs = torch.tensor(norms).double().log().view(-1, steps, len(norms[0]))
        means.append(logs.mean(0))                      # (steps, layers)
    means = torch.stack(means).permute(2, 1, 0)         # (layers, steps, W)
    return [[exponent_of_logs(WIDTHS, logs) for logs in layer] for layer in means]


def exponent_of_logs(widths, logs):
    """Slope of mean logs (W,) against log width; nan where one is not finite."""
    if not logs.isfinite().all():
        return math.nan
    return estimate.fit_exponent(widths, logs.exp().numpy())[0]


def predicted_updates(*settings, step=1, **options):
    """What update_exponents should measure, [layer], by the theory."""
    prediction = param.predict(*settings, hidden_layers=HIDDEN_LAYERS, step=step, **options)
    return prediction.effective + prediction.propagating


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
def test_measured_first_step_exponents_are_the_predicted_ones(
        parameterization, optimizer, alpha):
    # error of the worst layer: SGD 0.016 ± 0.037, Adam 0.031 ± 0.015
    lr = {"sgd": 0.1, "adam": 1e-3}[optimizer]
    measured = update_exponents("ce", 1, parameterization, optimizer, lr, alpha)

    def predicted(alpha):
        return predicted_updates(parameterization, optimizer, "ce", alpha)

    check([layer[0] for layer in measured], *around(predicted(alpha), 0.25),
          predicted(alpha - 0.5), predicted(alpha + 0.5))


def test_measured_updates_under_ce_at_one_half_logits_jump_with_width_hidden_layers_do_not():
    *effective, logits, _, _, through_w0 = update_exponents("ce", 3, lr=0.1, alpha=0.5)
    check([logits[0], through_w0[0]], *around(0.5, 0.25), 0.0, 1.0)         # 0.49 ± 0.04
    # controlled divergence: the input layer and the hidden ones at every step
    predicted = torch.tensor([[-1.0] * 3, [0.0] * 3, [0.0] * 3])
    # the worst layer and step: 0.07 ± 0.04 for 0
    check(effective, *around(predicted, 0.25), predicted - 0.5, predicted + 0.5)


def test_measured_updates_under_mse_at_one_half_the_jump_feeds_back_and_hidden_layers_blow_up():
    measured = update_exponents("mse", 3, lr=0.1, alpha=0.5)
    first, last = ([layer[step] for layer in measured[1:HIDDEN_LAYERS]] for step in (0, 2))
    check(first, *around(0.0, 0.25), -0.5, 0.5)         # 0.01 ± 0.03, at first as under ce
    prediction = param.predict("sp", "sgd", "mse", 0.5, HIDDEN_LAYERS, step=3)
    assert prediction.lower_bound and prediction.effective[1:-1] == [0.0, 0.0]
    # 0.99 ± 0.05 and 2.85 ± 0.16, where ce has 0.06 ± 0.03
    check([2.0 if math.isnan(slope) else slope for slope in last], 0.75, math.inf, 0.0)


def test_measured_updates_under_mse_at_one_features_vanish_and_logits_keep_their_size():
    # the worst layer and step: 0.01 ± 0.03 for 0
    measured = update_exponents("mse", 3, lr=0.003, alpha=1.0)[:HIDDEN_LAYERS + 1]
    predicted = torch.tensor([[-1.5] * 3, [-0.5] * 3, [-0.5] * 3, [0.0] * 3])
    check(measured, *around(predicted, 0.25), predicted - 0.5, predicted + 0.5)


# ---- Proposition C.3: the loss decrease of one step ----

# parameterization, α, exponent of the change: a rise where it is above zero
C3 = [("sp", 0.5, 1.0), ("sp", 1.0, 0.0), ("sp", 1.5, -0.5), ("ntp", 0.0, 0.0)]


def predicted_decrease(parameterization, alpha, hidden_layers):
    """As the logits' update while that does not grow; beyond, the loss rises as
    its square."""
    prediction = param.predict(parameterization, "sgd", "mse", alpha, hidden_layers)
    logits = max(prediction.effective[-1], prediction.propagating[-1])
    return max(logits, 2 * logits)


def test_proposition_c3_has_the_exponents_of_the_predicted_logits():
    for parameterization, alpha, exponent in C3:
        for hidden_layers in (1, 3):
            assert predicted_decrease(parameterization, alpha, hidden_layers) == exponent


@pytest.mark.parametrize("parameterization, alpha, exponent", C3)
def test_measured_loss_decrease_of_the_linear_net_after_one_step(
        parameterization, alpha, exponent):
    widths, seeds, changes = [4 ** k for k in range(4, 8)], torch.arange(256) + SHIFT, []
    for width in widths:
        loss = linear_net.linear_net(width, 0.5, 1, parameterization, seeds, alpha).loss
        changes.append(loss[1] - loss[0])
    assert all((change < 0).all() for change in changes) == (exponent <= 0)
    # 1.06, 0.00, -0.50 and 0.00, each ± 0.04
    logs = torch.stack(changes).abs().log().median(1).values
    check(exponent_of_logs(widths, logs), *around(exponent, 0.25),
          *(predicted_decrease(parameterization, alpha + off, 1) for off in (-0.5, 0.5)))


@pytest.mark.parametrize("parameterization, alpha, exponent", C3)
def test_measured_loss_decrease_of_the_mlp_after_one_step(parameterization, alpha, exponent):
    # 1.05 ± 0.05, 0.02, -0.47 and 0.02 ± 0.035; far beyond the edge, or well within it
    lr, logs = 0.25 if exponent > 0 else 4e-4, []
    for width in WIDTHS:
        changes = []
        for seed in range(2 * UNITS // width):
            x, y = uneven_batch(1000 + seed)
            model, optimizer = mlp_and_optimizer(
                width, seed, parameterization, "sgd", lr, alpha)
            model, x = model.double(), x.double()
            before = squared_error(model(x), y)
            before.backward()
            optimizer.step()
            changes.append(squared_error(model(x), y).item() - before.item())
        changes = torch.tensor(changes)
        assert ((changes < 0) == (exponent <= 0)).all()
        logs.append(changes.abs().log().mean())
    check(exponent_of_logs(WIDTHS, torch.stack(logs)), *around(exponent, 0.25),
          *(predicted_decrease(parameterization, alpha + off, HIDDEN_LAYERS)
            for off in (-0.5, 0.5)))


# ---- the stability edge itself ----

EDGE_WIDTHS, EDGE_UNITS, EDGE_STEPS = (64, 128, 256, 512), 3072, 50


def survives(loss, width, seeds, lrs):
    """Whether each replica's loss stays finite and ends (mean of the last tenth)
    below twice a constant predictor's: bool (R,). One stack trains all seeds."""
    base, model = models.MLP(100, 32, 3, 2), models.MLP(100, width, 3, 2)
    initial, data = [], []
    for seed in seeds:
        param.init_(model, base, "sp", seeded(seed), std={"output": 0.05 * math.sqrt(2 / 32)})
        initial.append([weights.detach().clone() for weights in model.parameters()])
        data.append(multi_index(EDGE_STEPS * 32, seeded(1000 + seed)))
    x, y = (torch.stack(part).unflatten(1, (EDGE_STEPS, 32)) for part in zip(*data))

    replicas = stack.make(model, initial, lrs)
    network, rule = stack.mlp_network(stack.LOSSES[loss]), stack.Rule("sgd")
    losses = torch.full((EDGE_STEPS, len(seeds)), math.inf)
    alive = torch.arange(len(seeds))
    with torch.no_grad():
        for step in range(EDGE_STEPS):
            losses[step, alive], = stack.advance(
                replicas, x[alive, step], y[alive, step], network, rule, step)
            keep = losses[step, alive] < 1e4 * CHANCE[loss]
            stack.drop_(replicas, keep)
            alive = alive[keep]
            if len(alive) == 0:
                break
    return losses[-EDGE_STEPS // 10:].mean(0) < 2 * CHANCE[loss]


def log_edges(loss, width, seeds):
    """Natural logs (R,) of every seed's largest LR that survives, by bisection
    to a factor sqrt(2) between 2^-6 and 4."""
    low, high = (torch.full((len(seeds),), k) for k in (-12, 4))    # half octaves
    while (high - low).max() > 1:
        middle = (low + high) // 2
        stable = survives(loss, width, seeds, (2.0 ** (middle / 2)).tolist())
        low, high = torch.where(stable, middle, low), torch.where(stable, high, middle)
    return (low + high) / 4 * math.log(2)


def test_measured_edge_falls_as_root_n_under_ce_and_as_n_under_mse():
    slopes = []         # -0.60 ± 0.03 and -0.90 ± 0.03
    for loss in LOSS:
        logs = [log_edges(loss, width, range(EDGE_UNITS // width)).mean()
                for width in EDGE_WIDTHS]
        slopes.append(exponent_of_logs(EDGE_WIDTHS, torch.stack(logs)))
    predicted = [-param.max_stable_alpha("sp", "sgd", loss) for loss in LOSS]
    check(slopes, *around(predicted, 0.25), predicted[::-1])


def test_at_one_learning_rate_in_plain_torch_ce_trains_a_wide_net_and_mse_blows_up():
    # Over 100 shifts the log2 edges at width 512 lie at -1.68 ± 0.18 (ce) and
    # -4.71 ± 0.14 (mse), the rate at -3, and ce's last losses at 0.45 ± 0.03.
    def net(width):
        layers = [nn.Linear(100, width, bias=False)]
        for _ in range(2):
            layers += [nn.ReLU(), nn.Linear(width, width, bias=False)]
        return nn.Sequential(*layers, nn.ReLU(), nn.Linear(width, 2, bias=False))

    last = {}
    for loss in LOSS:
        model, base = net(512), net(32)
        param.init_(model, base, "sp", seeded(0), std={"output": 0.05 * math.sqrt(2 / 32)})
        optimizer = torch.optim.SGD(param.param_groups(model, base, "sp", "sgd", lr=2 ** -3))
        data, losses = seeded(1000), []
        for _ in range(100):
            x, y = multi_index(64, data)
            losses.append(LOSS[loss](model(x), y))
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
        last[loss] = torch.stack(losses[-10:]).mean().item()
    assert last["ce"] < CHANCE["ce"]
    assert not math.isfinite(last["mse"])


def main():
    """Print the worst entry of every check over so many shifts of all seeds."""
    import test_regimes             # the module whose tests pytest runs, not this script
    trials, only = int(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "measured"
    for trial in range(trials):
        test_regimes.SHIFT = 100_003 * trial
        pytest.main(["-q", "-p", "no:cacheprovider", "--no-header", "--tb=no", "-k", only,
                     __file__])
    of_test = {}
    for test, *values in test_regimes.RECORDS:
        of_test.setdefault(test, []).append(values)
    for test, records in of_test.items():
        print(test)
        checks = len(records) // trials         # of one test
        for i in range(checks):
            measured, low, high, wrong = zip(*records[i::checks])
            values = torch.stack(measured).double().flatten(1)              # (trials, entries)
            low, high, *wrong = (torch.broadcast_to(bound, measured[0].shape).flatten()
                                 for bound in (low[0], high[0], *wrong[0]))
            mean, sd = values.mean(0), values.std(0)
            margin = torch.minimum(mean - low, high - mean) / sd
            bias = torch.nan_to_num(mean - (low + high) / 2, neginf=0.0)
            beyond = [torch.maximum(low - other - bias, other + bias - high) / sd
                      for other in wrong]
            for k in range(len(mean)) if len(mean) < 3 else [margin.argmin()]:
                nearest = torch.stack(beyond).min()
                print(f"    {mean[k]:+.3f} ± {sd[k]:.3f} in ({low[k]:+.3f}, {high[k]:+.3f}), by "
                      f"{margin[k]:.1f} sd; wrong exponents {nearest:.1f} sd beyond")


if __name__ == "__main__":
    main()
