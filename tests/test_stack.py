"""stack.py against torch, one run at a time: losses, constant predictors, optimizers, any module."""
import copy
import itertools
import textwrap
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import param
import stack
from stack import (
    LOSSES,
    Rule,
    advance,
    constant_loss,
    constant_loss_of_targets,
    drop_,
    make,
    mlp_network,
    module_network,
)

CE, MSE, PLAIN = LOSSES["ce"], LOSSES["mse"], Rule("sgd")


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def labels(*shape, classes=3):
    return torch.randint(classes, shape, generator=seeded(0))


def close(a, b, tolerance=1e-12):
    return torch.allclose(a, b, rtol=tolerance, atol=1e-12)


# ---- losses: logits z (N, C), targets y (N,) -> a number, or one per sample ----

def one_hot(z, y):
    return F.one_hot(y, z.shape[-1]).to(z)


def squared(z, y, reduction="mean"):
    return nn.MSELoss(reduction=reduction)(z, one_hot(z, y))


def squared_of_softmax(z, y, reduction="mean"):
    return squared(z.softmax(-1), y, reduction)


def huber(z, y, reduction="mean", delta=1.0):
    return F.huber_loss(z, one_hot(z, y), reduction=reduction, delta=delta)


def margin(z, y, reduction="mean", p=1, margin=1.0):
    return F.multi_margin_loss(z, y, p=p, margin=margin, reduction=reduction)


def ce(z, y, reduction="mean", smoothing=0.0):
    return F.cross_entropy(z, y, reduction=reduction, label_smoothing=smoothing)


# name: (torch's, its likeliest confusions)
TORCH = {
    "ce":            (ce, [{"reduction": "sum"}, {"smoothing": 0.3}]),
    "mse":           (squared, [{"reduction": "sum"}]),
    "brier":         (squared_of_softmax, [{"reduction": "sum"}]),
    "huber":         (huber, [{"reduction": "sum"}, {"delta": 2.0}]),
    "hinge":         (margin, [{"reduction": "sum"}, {"margin": 2.0}, {"p": 2}]),
    "squared_hinge": (partial(margin, p=2), [{"reduction": "sum"}, {"margin": 2.0}, {"p": 1}]),
}
OPTIONS = [(name, {}) for name in TORCH]
OPTIONS += [("huber", {"delta": 0.3}), ("huber", {"delta": 10.0})]


def is_derivative(chi, loss, z, y):
    """Is chi the derivative of each sample's loss, of which `loss` is the mean?"""
    z = z.clone().requires_grad_()
    gradient, = torch.autograd.grad(loss(z, y) * len(y), z)
    return close(chi, gradient)


def test_the_tables_of_losses_have_the_same_names():
    assert LOSSES.keys() == param.LOSS_PROPERTIES.keys() == TORCH.keys()


@pytest.mark.parametrize("name, options", OPTIONS, ids=str)
def test_losses_and_derivatives_are_torchs_and_not_their_neighbours(name, options):
    reference, confusions = TORCH[name]
    reference = partial(reference, **options)
    logits, y = 2 * normal(2, 8, 4), labels(2, 8, classes=4)            # two replicas
    losses, chi = LOSSES[name](logits, y, **options)
    assert losses.shape == (2, 8) and chi.shape == (2, 8, 4)
    for r in range(2):
        mean = losses[r].mean().item()
        assert mean == pytest.approx(reference(logits[r], y[r]).item(), rel=1e-12)
        assert is_derivative(chi[r], reference, logits[r], y[r])
        for confusion in confusions:
            wrong = partial(reference, **confusion)
            # the right one agrees to 1e-12: a mean of eight samples may come near another's by chance
            assert abs(wrong(logits[r], y[r]).item() / mean - 1) > 1e-6
            assert not is_derivative(chi[r], wrong, logits[r], y[r])


@pytest.mark.parametrize("name", LOSSES)
def test_derivatives_are_bounded_and_vanish_as_params_table_says(name):
    def largest(logits, y):
        return LOSSES[name](logits, y)[1].abs().max().item()

    (logits, y), properties = (normal(16, 4), labels(16, classes=4)), param.LOSS_PROPERTIES[name]
    assert (largest(1e6 * logits, y) < 2 * largest(1e3 * logits, y) + 1) == properties.bounded
    saturated = torch.tensor([[0.0, 1e3]])
    assert (largest(saturated, torch.tensor([0])) < 1e-6) == properties.vanishes


def real_targets(*shape):
    return 3 * normal(*shape, seed=7)


REAL = {"mse": (F.mse_loss, {}), "huber": (F.huber_loss, {"delta": 0.7})}


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("shape", [(8, 4), (8, 1), (3, 5, 4)], ids=str)
def test_mse_and_huber_of_real_valued_targets_and_their_derivatives_are_torchs(name, shape):
    reference, options = REAL[name]
    outputs, y = normal(2, *shape).requires_grad_(), real_targets(2, *shape)        # two replicas
    losses, chi = LOSSES[name](outputs.detach(), y, **options)
    expected = reference(outputs, y, reduction="none", **options)
    assert losses.shape == (2, *shape[:-1]) and close(losses, expected.mean(-1))
    gradient, = torch.autograd.grad(expected.mean(-1).sum(), outputs)
    assert close(chi, gradient) and chi.abs().max() > 0.1


@pytest.mark.parametrize("name", REAL)
def test_classes_are_one_hot_targets(name):
    logits, y = normal(8, 4), labels(8, classes=4)
    for a, b in zip(LOSSES[name](logits, y), LOSSES[name](logits, one_hot(logits, y))):
        assert close(a, b)


# ---- the best constant predictor ----

def per_sample(name, options):
    reference = partial(TORCH[name][0], **options, reduction="none")

    def loss(z, y):
        losses = reference(z, y)
        return losses if losses.ndim == 1 else losses.mean(-1)
    return loss


def lowest_of_constants(loss, p, restarts=6, steps=600):
    """The lowest expected loss over constant logits (C,): Adam, a falling LR, random starts."""
    classes = len(p)
    z = (3 * normal(restarts, 1, classes)).requires_grad_()
    y = torch.arange(classes).repeat(restarts)
    lowest = torch.full((restarts,), torch.inf, dtype=torch.float64)
    optimizer = torch.optim.Adam([z], betas=(0.8, 0.95))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.6 * 1e-4 ** (step / steps)
        optimizer.zero_grad()
        rows = z.expand(-1, classes, -1).flatten(0, 1)              # (restarts * C, C)
        expected = loss(rows, y).view(restarts, classes) @ p
        expected.sum().backward()
        optimizer.step()
        lowest = lowest.minimum(expected.detach())
    return lowest.min().item()


FREQUENCIES = [
    (0.8, 0.2), (0.5, 0.3, 0.2), (0.27, 0.2, 0.15, 0.1, 0.08, 0.07, 0.05, 0.04, 0.03, 0.01),
    (0.24, 0.17, 0.015, 0.005, 0.57), (0.25, 0.25, 0.25, 0.25), (0.97, 0.01, 0.01, 0.01),
    (0.4, 0.35, 0.25, 0.0)]


@pytest.mark.parametrize("p", FREQUENCIES, ids=str)
@pytest.mark.parametrize("name, options", OPTIONS, ids=str)
def test_the_best_constant_predictor_is_the_one_that_a_search_finds(name, options, p):
    p = torch.tensor(p, dtype=torch.float64)
    best = constant_loss(LOSSES[name], p, **options)
    lowest = lowest_of_constants(per_sample(name, options), p)
    assert best <= lowest + 1e-9                                    # nothing is better
    assert best == pytest.approx(lowest, rel=1e-4)
    reordered = constant_loss(LOSSES[name], p.flip(0), **options)
    assert reordered == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("name, options", OPTIONS, ids=str)
def test_of_two_classes_it_is_the_lowest_of_a_fine_grid(name, options):
    p, line = torch.tensor([0.7, 0.3]).double(), torch.linspace(-2, 2, 201).double()
    z, loss = torch.cartesian_prod(line, line), per_sample(name, options)
    grid = sum(p[c] * loss(z, torch.full((len(z),), c)) for c in (0, 1))
    best = constant_loss(LOSSES[name], p, **options)
    assert grid.min().item() - 1e-3 < best <= grid.min().item() + 1e-9


def test_a_class_that_never_occurs_costs_no_cross_entropy():
    two, three = torch.tensor([0.7, 0.3]), torch.tensor([0.7, 0.3, 0.0])
    assert constant_loss(CE, two) == constant_loss(CE, three)


def random_frequencies(seed):
    """Of 3 to 5 classes, from even to one class that nearly always occurs."""
    p = torch.rand(3 + seed % 3, generator=seeded(seed), dtype=torch.float64) ** (1 + seed % 6)
    return p / p.sum()


def test_the_hinges_best_constant_is_the_lowest_over_small_whole_numbers():
    for p in map(random_frequencies, range(30)):
        classes = len(p)
        z = torch.tensor([*itertools.product(range(-classes + 1, 1), repeat=classes)]).double()
        expected = sum(p[c] * margin(z, torch.full((len(z),), c), reduction="none") for c in range(classes))
        assert constant_loss(LOSSES["hinge"], p) == pytest.approx(expected.min().item(), rel=1e-12)


def test_the_hinge_of_uneven_classes_is_the_value_computed_by_hand():
    """Logits 0 for the class of 0.57, -1 for those of 0.24 and 0.17, -2 for the others. A sample of the first
    violates no margin, of the next two the first's by 2 and the other's by 1, of the last two all four."""
    p = torch.tensor([0.24, 0.17, 0.015, 0.005, 0.57], dtype=torch.float64)
    by_hand = (0.24 * (2 + 1) + 0.17 * (2 + 1) + (0.015 + 0.005) * (3 + 2 + 2 + 1)) / 5
    assert by_hand == pytest.approx(0.278)
    assert constant_loss(LOSSES["hinge"], p) == pytest.approx(by_hand, rel=1e-12)


def test_the_squared_hinge_of_even_classes_is_that_of_equal_logits():
    for classes in (2, 3, 10):
        p = torch.full((classes,), 1 / classes)
        assert constant_loss(LOSSES["squared_hinge"], p) == pytest.approx((classes - 1) / classes)
    # two classes: logits z and -z, p (1 - 2z)² + (1 - p) (1 + 2z)² is lowest at 2z = 2p - 1
    p = 0.8
    lowest = (p * (2 - 2 * p) ** 2 + (1 - p) * (2 * p) ** 2) / 2
    assert constant_loss(LOSSES["squared_hinge"], torch.tensor([p, 1 - p])) == pytest.approx(lowest, rel=1e-7)


class LargestTensor(TorchDispatchMode):
    """Records the largest number of elements of what any operation returns."""
    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("name", LOSSES)
def test_of_fifty_thousand_classes_no_table_of_pairs_is_made(name):
    classes = 50_000
    p = 1 / torch.arange(1, classes + 1, dtype=torch.float64)           # Zipf's law, as of tokens
    p /= p.sum()
    even = torch.full((classes,), 1 / classes, dtype=torch.float64)
    with LargestTensor() as largest:
        best, of_even = constant_loss(LOSSES[name], p), constant_loss(LOSSES[name], even)
    assert classes <= largest.elements <= classes + 1
    variance = (1 - p.square().sum().item()) / classes
    exact = {"ce": -(p * p.log()).sum().item(), "mse": variance, "brier": variance, "huber": variance / 2}
    if name in exact:
        assert best == pytest.approx(exact[name], rel=1e-9, abs=0)
    else:
        assert 0 < best < 0.3 * of_even and of_even == pytest.approx(1 - 1 / classes, rel=1e-9)


@pytest.mark.parametrize("outputs", [1, 3])
def test_of_real_valued_targets_mse_has_their_variance(outputs):
    y = real_targets(200, outputs) ** 2
    variance = y.var(0, correction=0).mean().item()
    assert constant_loss_of_targets(MSE, y) == pytest.approx(variance, rel=1e-9)
    assert constant_loss_of_targets(MSE, y.float()) == pytest.approx(variance, rel=1e-6)
    assert constant_loss_of_targets(MSE, torch.full((9, outputs), 3.0)) == 0


@pytest.mark.parametrize("delta", [0.01, 0.3, 1.0, 30.0])
def test_of_real_valued_targets_hubers_best_constant_is_where_the_clipped_errors_cancel(delta):
    y, expected = real_targets(200, 3) ** 3, []
    for column in y.T:
        low, high = column.min(), column.max()
        for _ in range(100):                    # bisection: the mean derivative grows with the constant
            middle = (low + high) / 2
            positive = (middle - column).clamp(-delta, delta).mean() > 0
            low, high = (low, middle) if positive else (middle, high)
        expected.append(F.huber_loss(middle.expand(200), column, delta=delta).item())
    best = constant_loss_of_targets(partial(LOSSES["huber"], delta=delta), y)
    assert best == pytest.approx(sum(expected) / 3, rel=1e-6)


# ---- training: any module against torch.optim, one run at a time ----

class Net(nn.Module):
    """No network of this repository: biases, a norm, a bare gain and a smooth activation."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(6, 8), nn.LayerNorm(8)
        self.gain, self.last = nn.Parameter(torch.linspace(0.5, 1.5, 8)), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.norm(self.first(x))) * self.gain)


class Bare(nn.Module):
    """A bias-free MLP; without a norm, large learning rates diverge."""

    def __init__(self):
        super().__init__()
        layers = [nn.Linear(n, m, bias=False) for n, m in ((6, 8), (8, 8), (8, 3))]
        self.layers = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])

    def forward(self, x):
        return self.layers(x)


class Tied(Bare):
    """Two layers share one weight."""

    def __init__(self):
        super().__init__()
        self.layers.insert(4, nn.Linear(8, 8, bias=False))
        self.layers[4].weight = self.layers[2].weight


def nets(count, kind=Net):
    models = []
    for seed in range(count):
        torch.manual_seed(seed)
        models.append(kind().double())
    return models


def stack_of(models, lrs, rule=PLAIN, **decay):
    weights = [list(model.parameters()) for model in models]
    return make(models[0], weights, lrs, **decay, moments=rule.moments, dtype=torch.float64)


def batches(steps, *shape):
    """x (steps, *shape, 6), y (steps, *shape)."""
    return normal(steps, *shape, 6), labels(steps, *shape)


def run_alone(model, optimizer, loss, x, y, clip=0.0):
    """Losses of a plain loop over steps; the model is trained in place."""
    losses = []
    for x_step, y_step in zip(x, y):
        optimizer.zero_grad()
        losses.append(loss(model(x_step).flatten(0, -2), y_step.flatten()))
        losses[-1].backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return [value.item() for value in losses]


def same_weights(runs, position, model):
    pairs = zip(runs["weights"], model.parameters())
    return all(close(stacked[position], weights, 1e-10) for stacked, weights in pairs)


SGD, ADAMW = torch.optim.SGD, torch.optim.AdamW
RULES = {   # name: (rule, torch.optim's, decay and ε)
    "sgd": (PLAIN, SGD, {}),
    "momentum": (Rule("sgd", momentum=0.9), partial(SGD, momentum=0.9), {}),
    "momentum, decay, clip": (
        Rule("sgd", momentum=0.9, decay=True, clip=0.5), partial(SGD, momentum=0.9), {"weight_decay": 0.1}),
    "adamw": (
        Rule("adam", beta1=0.8, beta2=0.9), partial(ADAMW, betas=(0.8, 0.9)),
        {"weight_decay": 0.0, "eps": 1e-3}),
    "adamw, decay, clip": (
        Rule("adam", decay=True, clip=0.5), partial(ADAMW, betas=(0.9, 0.95)),
        {"weight_decay": 0.1, "eps": 1e-6}),
}
LRS = [0.1, 0.02, 0.003]


@pytest.mark.parametrize("shape", [(16,), (4, 5)], ids=["samples", "tokens"])
@pytest.mark.parametrize("name", RULES)
def test_a_stack_of_any_module_trains_as_torch_optim_trains_each_alone(name, shape):
    rule, optimizer, decay = RULES[name]
    models = nets(3)
    runs, network = stack_of(models, LRS, rule, **decay), module_network(models[0], CE)
    x, y = batches(5, 3, *shape)
    losses = [advance(runs, x[step], y[step], network, rule, step)[0].tolist() for step in range(5)]
    logits = network.forward(runs["weights"], x[0])                 # (R, *shape, C)
    for r, model in enumerate(models):
        solver = optimizer(model.parameters(), LRS[r], **decay)
        alone = run_alone(model, solver, F.cross_entropy, x[:, r], y[:, r], rule.clip)
        assert [step[r] for step in losses] == pytest.approx(alone, rel=1e-12)
        assert same_weights(runs, r, model) and close(logits[r], model(x[0, r]), 1e-10)


def test_the_usage_in_the_header_runs_and_does_what_it_says():
    usage, = (block for block in stack.__doc__.split("\n\n") if "nets = " in block)
    x, y = normal(3, 16, 6).float(), labels(3, 16)
    names = {**vars(stack), "Net": Net, "lrs": LRS, "steps": 5, "x": x, "y": y}
    exec(textwrap.dedent(usage), names)
    for r, model in enumerate(names["nets"]):
        solver = SGD(model.parameters(), LRS[r], momentum=0.9)
        *_, last = run_alone(model, solver, F.cross_entropy, [x[r]] * 5, [y[r]] * 5)
        assert names["loss"][r].item() == pytest.approx(last, rel=1e-5)
        assert torch.allclose(names["logits"][r], model(x[r]), rtol=1e-4, atol=1e-5)


def test_every_tensor_has_its_own_lr_decay_and_eps_in_every_replica():
    model, rule = nets(1)[0], Rule("adam", decay=True)
    names = [name for name, _ in model.named_parameters()]
    groups = [[{"lr": 0.01 * (r + 1) * (i + 1), "weight_decay": 0.1 * (i % 3), "eps": 10.0 ** -(r + i)}
               for i in range(len(names))] for r in range(2)]
    of_tensor = {key: [{name: group[key] for name, group in zip(names, of_run)} for of_run in groups]
                 for key in ("lr", "weight_decay", "eps")}
    initial = [list(model.parameters()), 0]                         # replica 1 starts as replica 0
    runs = make(model, initial, **of_tensor, moments=2, dtype=torch.float64)
    network, (x, y) = module_network(model, MSE), batches(4, 2, 16)
    for step in range(4):
        advance(runs, x[step], y[step], network, rule, step, factor=0.5)
    for r in range(2):
        own = copy.deepcopy(model)
        pairs = zip(groups[r], own.parameters())
        halved = [dict(group, params=[w], lr=group["lr"] / 2) for group, w in pairs]
        run_alone(own, ADAMW(halved, betas=(0.9, 0.95)), squared, x[:, r], y[:, r])
        assert same_weights(runs, r, own)


@pytest.mark.parametrize("name", RULES)
def test_replicas_that_diverge_leave_and_the_others_train_on_as_if_alone(name):
    rule, optimizer, decay = RULES[name]
    models, lrs = nets(4, Bare), [0.03, 1e200, 0.01, 1e250]
    runs, network = stack_of(models, lrs, rule, **decay), module_network(models[0], MSE)
    (x, y), alive = batches(6, 4, 16), torch.arange(4)
    for step in range(6):
        loss, = advance(runs, x[step, alive], y[step, alive], network, rule, step)
        drop_(runs, loss.isfinite())
        alive = alive[loss.isfinite()]
    assert alive.tolist() == [0, 2]
    kept = {"weights", "lr", "weight_decay", "eps", "first", "second"} & runs.keys()
    assert len(kept) == 4 + rule.moments
    assert all(len(tensor) == 2 for key in kept for tensor in runs[key])
    for position, r in enumerate(alive.tolist()):
        solver = optimizer(models[r].parameters(), lrs[r], **decay)
        run_alone(models[r], solver, squared, x[:, r], y[:, r], rule.clip)
        assert same_weights(runs, position, models[r])


@pytest.mark.parametrize("name", LOSSES)
def test_the_mlps_written_out_backward_pass_is_autograds(name):
    model, loss = Bare().double(), LOSSES[name]
    weights = [normal(2, *w.shape, seed=i) for i, w in enumerate(model.parameters())]
    x, y, lr = normal(2, 16, 6), labels(2, 16), [0.1, 0.2, 0.3]
    written, automatic = mlp_network(loss), module_network(model, loss)
    assert close(written.forward(weights, x), automatic.forward(weights, x))
    grads, losses, logits = automatic.gradients(weights, x, y)
    mine, *others = written.gradients(weights, x, y, None)
    assert all(close(a, b) for a, b in zip([*mine, *others], [*grads, losses, logits]))
    expected = [w - step * g for w, step, g in zip(weights, lr, grads)]
    assert all(close(a, b) for a, b in zip(written.sgd_step(weights, x, y, lr), (losses, logits)))
    assert all(close(w, then) for w, then in zip(weights, expected))


def sharper(logits, y):
    """A user's loss: the fourth power of the errors, summed over classes, and its derivative."""
    error = logits - one_hot(logits, y)
    return error.pow(4).sum(-1), 4 * error.pow(3)


def doubled(logits, y):
    """Reports cross-entropy, but descends twice as fast: the derivative is the function's own word."""
    losses, chi = stack.ce(logits, y)
    return losses, 2 * chi


def fourth_power(z, y):
    return (z - one_hot(z, y)).pow(4).sum(-1).mean()


NETWORKS = {
    "module": module_network,
    "alone": partial(module_network, alone=True),
    "mlp": lambda model, loss: mlp_network(loss),
}


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("loss, of_torch, speed", [
    (sharper, fourth_power, 1), (doubled, F.cross_entropy, 2)])
def test_a_users_loss_trains_with_its_own_derivative(kind, loss, of_torch, speed):
    model, = nets(1, Bare)
    (x, y), runs = batches(6, 1, 16), stack_of([model], 0.05)
    network = NETWORKS[kind](copy.deepcopy(model), loss)
    losses = [advance(runs, x[step], y[step], network, PLAIN)[0].item() for step in range(6)]
    alone = run_alone(model, SGD(model.parameters(), speed * 0.05), of_torch, x[:, 0], y[:, 0])
    assert losses == pytest.approx(alone, rel=1e-12)


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("name", REAL)
def test_a_stack_trains_on_real_valued_targets_as_torch_does(kind, name):
    reference, options = REAL[name]
    models, x, y = nets(1, Bare), normal(6, 1, 16, 6), real_targets(6, 1, 16, 3)
    runs = stack_of(models, 0.05)
    network = NETWORKS[kind](copy.deepcopy(models[0]), partial(LOSSES[name], **options))
    losses = [advance(runs, x[step], y[step], network, PLAIN)[0].item() for step in range(6)]
    alone, solver = [], SGD(models[0].parameters(), 0.05)
    for x_step, y_step in zip(x, y):
        solver.zero_grad()
        alone.append(reference(models[0](x_step[0]), y_step[0], **options))
        alone[-1].backward()
        solver.step()
    assert losses == pytest.approx([value.item() for value in alone], rel=1e-12)
    assert same_weights(runs, 0, models[0])


class Routed(nn.Module):
    """Two experts, for samples whose first entry is positive or not; one without samples is not called."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(6, 3) for _ in range(2))

    def forward(self, x):
        logits = x.new_zeros(len(x), 3)
        for expert, chosen in zip(self.experts, (x[:, 0] > 0, x[:, 0] <= 0)):
            if chosen.any():
                logits = logits.index_add(0, chosen.nonzero().flatten(), expert(x[chosen]))
        return logits


class Idle(nn.Module):
    """A layer, and parameters that no output depends on."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(6, 3) for _ in range(2))
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.experts[0](x)


@pytest.mark.parametrize("kind, alone", [(Routed, True), (Idle, True), (Idle, False)])
@pytest.mark.parametrize("name", ["sgd", "momentum", "adamw"])
def test_parameters_that_a_batch_does_not_reach_have_gradient_zero_and_stay(kind, alone, name):
    rule, _, decay = RULES[name]
    models = nets(1 if alone else 2, kind)
    runs, (x, y) = stack_of(models, [0.1] * len(models), rule, **decay), batches(2, len(models), 16)
    x[..., 0].abs_()
    before = [w.clone() for w in runs["weights"]]
    network = module_network(models[0], CE, alone)
    grads, *_ = network.gradients(runs["weights"], x[0], y[0])
    reached = [name.startswith("experts.0") for name, _ in models[0].named_parameters()]
    assert [bool(g.any()) for g in grads] == reached
    assert all(g.shape == w.shape for g, w in zip(grads, before))
    for step in range(2):
        advance(runs, x[step], y[step], network, rule, step)
    assert [not torch.equal(a, b) for a, b in zip(runs["weights"], before)] == reached


# ---- a single replica, which runs without vmap ----

def test_a_single_replica_leaves_the_model_as_it_was_found():
    model, = nets(1)
    before, state = list(model.parameters()), copy.deepcopy(model.state_dict())
    network, x, y = module_network(model, CE, alone=True), normal(1, 4, 6), labels(1, 4)
    weights = [normal(1, *w.shape, seed=1) for w in before]

    def untouched():
        same = all(a is b and b.grad is None for a, b in zip(model.parameters(), before))
        return same and all(torch.equal(state[name], w) for name, w in model.state_dict().items())

    logits = network.forward(weights, x)
    network.gradients(weights, x, y)
    assert untouched() and not torch.allclose(logits[0], model(x[0]))
    for call in (network.forward, partial(network.gradients, y=y)):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            call(weights, x[..., :5])
        assert untouched()


def test_a_model_that_ran_alone_can_be_copied_and_stacked():
    model, = nets(1)
    x, y = normal(1, 4, 6), labels(1, 4)
    weights = [normal(1, *w.shape, seed=1) for w in model.parameters()]
    grads, losses, logits = module_network(model, CE, alone=True).gradients(weights, x, y)
    network = module_network(copy.deepcopy(model), CE, alone=True)
    twice, x, y = [w.repeat(2, *[1] * (w.ndim - 1)) for w in weights], x.repeat(2, 1, 1), y.repeat(2, 1)
    both, *others = network.gradients(twice, x, y)
    for two, one in zip([*both, *others], [*grads, losses, logits]):
        assert two.shape[0] == 2 and close(two, one.expand_as(two))


@pytest.mark.parametrize("alone", [True, False])
def test_a_weight_that_two_layers_share_is_one_weight(alone):
    model, = nets(1, Tied)
    (x, y), runs = batches(5, 1, 16), stack_of([model], 0.1)
    network = module_network(copy.deepcopy(model), CE, alone)
    assert len(runs["weights"]) == 3
    losses = [advance(runs, x[step], y[step], network, PLAIN)[0].item() for step in range(5)]
    own = run_alone(model, SGD(model.parameters(), 0.1), F.cross_entropy, x[:, 0], y[:, 0])
    assert losses == pytest.approx(own, rel=1e-12)


@pytest.mark.parametrize("alone", [True, False])
def test_losses_are_never_taken_in_bfloat16(alone):
    model, = nets(1)
    weights, x = [w[None].bfloat16() for w in model.parameters()], normal(1, 4, 6).bfloat16()
    assert module_network(model, CE, alone).forward(weights, x).dtype == torch.float32


# ---- one step: accumulation, accuracy, AdamW ----

@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("kind", ["mlp", "module"])
def test_accumulated_gradients_are_those_of_the_whole_batch(name, kind):
    rule, _, decay = RULES[name]
    models = nets(2, Bare)
    network, (x, y) = NETWORKS[kind](models[0], CE), batches(3, 2, 12)
    whole, parts = (stack_of(models, LRS[:2], rule, **decay) for _ in range(2))
    for step in range(3):
        means = advance(whole, x[step], y[step], network, rule, step, accuracy=True)
        of_parts = advance(parts, x[step], y[step], network, rule, step, parts=4, accuracy=True)
        assert all(close(a, b) for a, b in zip(means, of_parts))
    assert all(close(a, b, 1e-10) for a, b in zip(whole["weights"], parts["weights"]))


def test_accuracy_is_the_share_of_right_answers_before_the_step():
    model, = nets(1, Bare)
    x, runs = normal(1, 500, 6), stack_of([model], 100.0)
    y = model(x).argmax(-1)                                 # right for 300 samples, wrong for 200
    y[:, 300:] = (y[:, 300:] + 1) % 3
    before, after = (advance(runs, x, y, mlp_network(CE), PLAIN, accuracy=True)[1] for _ in "ab")
    assert before.item() == 0.6 and abs(after.item() - 0.6) > 0.01


def test_both_ways_to_take_an_adamw_step_agree_for_every_replica():
    models, rule = nets(3), Rule("adam", decay=True)
    names = [name for name, _ in models[0].named_parameters()]
    lrs = [{name: lr * (1 + i % 2) for i, name in enumerate(names)} for lr in (0.01, 0.1, 0.01)]
    decay = {"weight_decay": [0.1, 0.0, 0.1], "eps": [1e-8, 1e-3, 1e-8]}
    fused, foreach = (stack_of(models, lrs, rule, **decay) for _ in range(2))
    for step in range(4):
        grads = [normal(*w.shape, seed=step) for w in fused["weights"]]
        stack.fused_adamw_(fused, [g.clone() for g in grads], rule, 0.5, step)
        stack.foreach_adamw_(foreach, grads, rule, 0.5, step)
        for kind in ("weights", "first", "second"):
            for a, b in zip(fused[kind], foreach[kind]):
                assert torch.allclose(a, b, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("rule, plain, moments", [
    (Rule("sgd"), True, 0), (Rule("sgd", momentum=0.9), False, 1), (Rule("sgd", decay=True), False, 0),
    (Rule("sgd", clip=1.0), False, 0), (Rule("adam"), False, 2)])
def test_sgd_is_plain_without_momentum_decay_and_clipping(rule, plain, moments):
    assert rule.is_plain_sgd is plain and rule.moments == moments
