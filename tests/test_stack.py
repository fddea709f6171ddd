"""stack.py against torch, one run at a time: losses and their derivatives, constant predictors, optimizers, any module."""
import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import param
import stack
from stack import LOSSES, Rule, advance, drop_, make, mlp_network, module_network

torch.set_num_threads(1)        # the nets here are tiny; threads would only wait for each other


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def labels(classes, *shape, seed=0):
    return torch.randint(classes, shape, generator=seeded(seed))


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


squared_margin = functools.partial(margin, p=2)

# name: (torch's, its likeliest confusions)
TORCH = {
    "ce":            (F.cross_entropy, [{"reduction": "sum"}]),
    "mse":           (squared, [{"reduction": "sum"}]),
    "brier":         (squared_of_softmax, [{"reduction": "sum"}]),
    "huber":         (huber, [{"reduction": "sum"}, {"delta": 2.0}]),
    "hinge":         (margin, [{"reduction": "sum"}, {"margin": 2.0}, {"p": 2}]),
    "squared_hinge": (squared_margin, [{"reduction": "sum"}, {"margin": 2.0}, {"p": 1}]),
}
OPTIONS = [(name, {}) for name in TORCH] + [("huber", {"delta": delta}) for delta in (0.3, 10.0)]


def agree(chi, loss, logits, y):
    """Is chi the derivative of each sample's loss, and no other number times it?"""
    z = logits.clone().requires_grad_()
    gradient, = torch.autograd.grad(loss(z, y) * len(y), z)
    return torch.allclose(chi, gradient, rtol=1e-12, atol=1e-12)


def test_the_tables_of_losses_have_the_same_names():
    assert LOSSES.keys() == param.LOSSES.keys() == TORCH.keys()


@pytest.mark.parametrize("name, options", OPTIONS, ids=str)
def test_losses_and_derivatives_are_torchs_and_not_their_neighbours(name, options):
    reference, others = TORCH[name]
    logits, y = 2 * normal(2, 8, 4), labels(4, 2, 8)                # two replicas
    losses, chi = LOSSES[name].function(logits, y, **options)
    assert losses.shape == (2, 8) and chi.shape == (2, 8, 4)
    for r in range(2):
        right = functools.partial(reference, **options)
        assert losses[r].mean().item() == pytest.approx(right(logits[r], y[r]).item(), rel=1e-12)
        assert agree(chi[r], right, logits[r], y[r])
        for neighbour in others:
            wrong = functools.partial(reference, **{**options, **neighbour})
            assert abs(wrong(logits[r], y[r]).item() / losses[r].mean().item() - 1) > 0.01
            assert not agree(chi[r], wrong, logits[r], y[r])


@pytest.mark.parametrize("name", LOSSES)
def test_derivatives_are_bounded_and_vanish_as_params_table_says(name):
    logits, y = normal(16, 4), labels(4, 16)
    sizes = [LOSSES[name].function(scale * logits, y)[1].abs().max().item() for scale in (1e3, 1e6)]
    assert (sizes[1] < 2 * sizes[0] + 1) == param.LOSSES[name].bounded
    saturated = LOSSES[name].function(torch.tensor([[0.0, 1e3]]), torch.tensor([0]))[1].abs().max().item()
    assert (saturated < 1e-6) == param.LOSSES[name].vanishes


def lowest_of_constants(loss, p, restarts=6, steps=600):
    """The lowest expected loss over constant logits (C,), found by Adam with a falling LR from random starts."""
    classes = len(p)
    z = (3 * normal(restarts, 1, classes)).requires_grad_()
    y, lowest = torch.arange(classes).repeat(restarts), torch.full((restarts,), torch.inf, dtype=torch.float64)
    optimizer = torch.optim.Adam([z], betas=(0.8, 0.95))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.3 * 1e-4 ** (step / steps)
        optimizer.zero_grad()
        losses = loss(z.expand(-1, classes, -1).flatten(0, 1), y).view(restarts, classes) @ p
        losses.sum().backward()
        optimizer.step()
        lowest = lowest.minimum(losses.detach())
    return lowest.min().item()


def per_sample(name, options):
    reference = functools.partial(TORCH[name][0], **options, reduction="none")

    def loss(z, y):
        losses = reference(z, y)
        return losses if losses.ndim == 1 else losses.mean(-1)
    return loss


FREQUENCIES = [(0.8, 0.2), (0.5, 0.3, 0.2), (0.27, 0.2, 0.15, 0.1, 0.08, 0.07, 0.05, 0.04, 0.03, 0.01)]


@pytest.mark.parametrize("p", FREQUENCIES, ids=len)
@pytest.mark.parametrize("name, options", OPTIONS, ids=str)
def test_the_best_constant_predictor_is_the_one_that_a_search_finds(name, options, p):
    p = torch.tensor(p, dtype=torch.float64)
    best, found = LOSSES[name].constant(p, **options), lowest_of_constants(per_sample(name, options), p)
    assert best <= found + 1e-9             # nothing is better
    assert best == pytest.approx(found, rel=2e-4)
    assert LOSSES[name].constant(p.flip(0), **options) == pytest.approx(best, rel=1e-9)     # classes have no order


@pytest.mark.parametrize("name, options", OPTIONS, ids=str)
def test_of_two_classes_the_best_constant_predictor_is_the_lowest_of_a_fine_grid(name, options):
    p, line = torch.tensor([0.7, 0.3], dtype=torch.float64), torch.linspace(-2, 2, 201, dtype=torch.float64)
    z = torch.cartesian_prod(line, line)
    loss = per_sample(name, options)
    grid = sum(p[c] * loss(z, torch.full((len(z),), c)) for c in (0, 1))
    best = LOSSES[name].constant(p, **options)
    assert grid.min().item() - 1e-3 < best <= grid.min().item() + 1e-9


def test_a_class_that_never_occurs_costs_no_cross_entropy():
    two, three = (LOSSES["ce"].constant(torch.tensor(p)) for p in ([0.7, 0.3], [0.7, 0.3, 0.0]))
    assert two == three


# ---- training: any module against torch.optim, one run at a time ----

class Net(nn.Module):
    """No network of this repository: biases, a norm, a bare gain and a smooth activation."""

    def __init__(self, d_in=6, classes=3):
        super().__init__()
        self.first, self.norm = nn.Linear(d_in, 8), nn.LayerNorm(8)
        self.gain, self.last = nn.Parameter(torch.linspace(0.5, 1.5, 8)), nn.Linear(8, classes)

    def forward(self, x):
        return self.last(torch.tanh(self.norm(self.first(x))) * self.gain)


class Bare(nn.Module):
    """Without a norm, so that a large learning rate has no bound."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 8, bias=False), nn.ReLU(),
                                    nn.Linear(8, 3, bias=False))

    def forward(self, x):
        return self.layers(x)


def nets(count, kind=Net):
    found = []
    for seed in range(count):
        torch.manual_seed(seed)
        found.append(kind().double())
    return found


def weights_of(models):
    return [list(model.parameters()) for model in models]


def run_alone(model, optimizer, loss, batches, clip=0.0):
    """Losses of a plain loop; the model is trained in place."""
    losses = []
    for x, y in batches:
        optimizer.zero_grad()
        logits = model(x)
        losses.append(loss(logits.flatten(0, -2), y.flatten()))
        losses[-1].backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return [value.item() for value in losses]


RULES = {   # name: (rule, torch.optim's, decay and ε)
    "sgd": (Rule("sgd"), torch.optim.SGD, {}),
    "momentum": (Rule("sgd", momentum=0.9), functools.partial(torch.optim.SGD, momentum=0.9), {}),
    "momentum, decay, clip": (Rule("sgd", momentum=0.9, decay=True, clip=0.5),
                              functools.partial(torch.optim.SGD, momentum=0.9), {"weight_decay": 0.1}),
    "adamw": (Rule("adam", beta1=0.8, beta2=0.9), functools.partial(torch.optim.AdamW, betas=(0.8, 0.9)),
              {"weight_decay": 0.0, "eps": 1e-3}),
    "adamw, decay, clip": (Rule("adam", decay=True, clip=0.5), functools.partial(torch.optim.AdamW, betas=(0.9, 0.95)),
                           {"weight_decay": 0.1, "eps": 1e-6}),
}
LRS = [0.1, 0.02, 0.003]


@pytest.mark.parametrize("shape", [(16,), (4, 5)], ids=["samples", "tokens"])
@pytest.mark.parametrize("name", RULES)
def test_a_stack_of_any_module_trains_as_torch_optim_trains_each_alone(name, shape):
    rule, optimizer, decay = RULES[name]
    models = nets(3)
    runs = make(models[0], weights_of(models), LRS, **decay, moments=rule.moments, dtype=torch.float64)
    network = module_network(models[0], LOSSES["ce"].function)
    x, y = normal(5, 3, *shape, 6), labels(3, 5, 3, *shape)                         # steps, R, ...
    losses = [advance(runs, x[step], y[step], network, rule, step)[0].tolist() for step in range(5)]
    logits = network.forward(runs["weights"], x[0])
    for r, model in enumerate(models):
        batches = list(zip(x[:, r], y[:, r]))
        alone = run_alone(model, optimizer(model.parameters(), LRS[r], **decay), F.cross_entropy, batches, rule.clip)
        assert [step[r] for step in losses] == pytest.approx(alone, rel=1e-12)
        for stacked, weights in zip(runs["weights"], model.parameters()):
            assert torch.allclose(stacked[r], weights, rtol=1e-10, atol=1e-12)
        assert torch.allclose(logits[r], model(x[0, r]), rtol=1e-10, atol=1e-12)


def test_every_tensor_has_its_own_lr_decay_and_eps_in_every_replica():
    models, rule = nets(2), Rule("adam", decay=True)
    names = [name for name, _ in models[0].named_parameters()]
    groups = [[{"lr": 0.01 * (r + 1) * (i + 1), "weight_decay": 0.1 * (i % 3), "eps": 10.0 ** -(r + i)}
               for i in range(len(names))] for r in range(2)]
    of_tensor = {key: [dict(zip(names, (group[key] for group in of_run))) for of_run in groups]
                 for key in ("lr", "weight_decay", "eps")}
    runs = make(models[0], [*weights_of(models[:1]), 0], **of_tensor, moments=2, dtype=torch.float64)
    models[1].load_state_dict(models[0].state_dict())               # replica 1 starts as replica 0
    network, (x, y) = module_network(models[0], LOSSES["mse"].function), (normal(4, 2, 16, 6), labels(3, 4, 2, 16))
    for step in range(4):
        advance(runs, x[step], y[step], network, rule, step, factor=0.5)
    for r, model in enumerate(models):
        halved = [dict(group, params=[w], lr=group["lr"] / 2) for group, w in zip(groups[r], model.parameters())]
        run_alone(model, torch.optim.AdamW(halved, betas=(0.9, 0.95)), squared, zip(x[:, r], y[:, r]))
        for stacked, weights in zip(runs["weights"], model.parameters()):
            assert torch.allclose(stacked[r], weights, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", RULES)
def test_replicas_that_diverge_leave_and_the_others_train_on_as_if_alone(name):
    rule, optimizer, decay = RULES[name]
    models, lrs = nets(4, Bare), [0.03, 1e200, 0.01, 1e250]
    runs = make(models[0], weights_of(models), lrs, **decay, moments=rule.moments, dtype=torch.float64)
    network, alive = module_network(models[0], LOSSES["mse"].function), torch.arange(4)
    x, y = normal(6, 4, 16, 6), labels(3, 6, 4, 16)
    for step in range(6):
        loss, = advance(runs, x[step, alive], y[step, alive], network, rule, step)
        drop_(runs, loss.isfinite())
        alive = alive[loss.isfinite()]
    assert alive.tolist() == [0, 2]
    assert all(len(tensor) == 2 for key in stack.state(runs) for tensor in runs[key])
    for position, r in enumerate(alive.tolist()):
        solver = optimizer(models[r].parameters(), lrs[r], **decay)
        run_alone(models[r], solver, squared, zip(x[:, r], y[:, r]), rule.clip)
        for stacked, weights in zip(runs["weights"], models[r].parameters()):
            assert torch.allclose(stacked[position], weights, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("name", LOSSES)
def test_the_mlps_written_out_backward_pass_is_autograds(name, relu):
    model = Bare().double()
    if not relu:
        model.layers = nn.Sequential(*(layer for layer in model.layers if isinstance(layer, nn.Linear)))
    weights = [normal(2, *w.shape, seed=i) for i, w in enumerate(model.parameters())]
    x, y, loss = normal(2, 16, 6), labels(3, 2, 16), LOSSES[name].function
    written, automatic = mlp_network(loss, relu), module_network(model, loss)
    for mine, other in zip(written.gradients(weights, x, y, None), automatic.gradients(weights, x, y)):
        for a, b in zip(mine, other):
            assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)
    assert torch.allclose(written.forward(weights, x), automatic.forward(weights, x), rtol=1e-12, atol=1e-12)
    lr, (grads, losses, _) = [0.1, 0.2, 0.3], automatic.gradients(weights, x, y)
    expected = [w - step * g for w, step, g in zip(weights, lr, grads)]
    assert torch.allclose(written.descend(weights, x, y, lr)[0], losses, rtol=1e-12)
    for w, then in zip(weights, expected):
        assert torch.allclose(w, then, rtol=1e-12, atol=1e-12)


def sharper(logits, y):
    """A user's loss: the fourth power of the errors, summed over classes, and its derivative."""
    error = logits - one_hot(logits, y)
    return error.pow(4).sum(-1), 4 * error.pow(3)


def doubled(logits, y):
    """Reports cross-entropy, but descends twice as fast: the derivative is the function's own word."""
    losses, chi = stack.ce(logits, y)
    return losses, 2 * chi


@pytest.mark.parametrize("network_of", [lambda model, loss: module_network(model, loss),
                                        lambda model, loss: module_network(model, loss, alone=True),
                                        lambda model, loss: mlp_network(loss)], ids=["module", "alone", "mlp"])
@pytest.mark.parametrize("loss, of_torch, speed", [
    (sharper, lambda z, y: (z - one_hot(z, y)).pow(4).sum(-1).mean(), 1), (doubled, F.cross_entropy, 2)])
def test_a_users_loss_trains_with_its_own_derivative(network_of, loss, of_torch, speed):
    model, = nets(1, Bare)
    x, y, rule = normal(6, 1, 16, 6), labels(3, 6, 1, 16), Rule("sgd")
    runs = make(model, weights_of([model]), 0.05, dtype=torch.float64)
    network = network_of(copy.deepcopy(model), loss)
    losses = [advance(runs, x[step], y[step], network, rule, step)[0].item() for step in range(6)]
    alone = run_alone(model, torch.optim.SGD(model.parameters(), speed * 0.05), of_torch, zip(x[:, 0], y[:, 0]))
    assert losses == pytest.approx(alone, rel=1e-12)


def test_a_single_replica_leaves_the_model_as_it_was_found():
    model, = nets(1)
    before, state = list(model.parameters()), copy.deepcopy(model.state_dict())
    network, x, y = module_network(model, LOSSES["ce"].function, alone=True), normal(1, 4, 6), labels(3, 1, 4)
    weights = [normal(1, *w.shape, seed=1) for w in before]

    def untouched():
        same = all(a is b for a, b in zip(model.parameters(), before))
        return same and all(torch.equal(state[name], value) for name, value in model.state_dict().items())

    logits = network.forward(weights, x)
    grads, losses, _ = network.gradients(weights, x, y)
    assert untouched() and all(w.grad is None for w in before)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        network.forward(weights, x[..., :5])
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        network.gradients(weights, x[..., :5], y)
    assert untouched()

    # the same numbers as in a stack, and the model can be copied and stacked as ever
    stacked = module_network(copy.deepcopy(model), LOSSES["ce"].function, alone=True)
    twice = [w.expand(2, *w.shape[1:]) for w in weights]
    both, per_sample_losses, _ = stacked.gradients(twice, x.expand(2, -1, -1), y.expand(2, -1))
    assert torch.allclose(stacked.forward(twice, x.expand(2, -1, -1)), logits.expand(2, -1, -1), rtol=1e-12)
    assert torch.allclose(per_sample_losses, losses.expand(2, -1), rtol=1e-12)
    for two, one in zip(both, grads):
        assert torch.allclose(two, one.expand_as(two), rtol=1e-12, atol=1e-14)
    assert not torch.allclose(logits[0], model(x[0]))


class Tied(Bare):
    def __init__(self):
        super().__init__()
        self.layers[2].weight = nn.Parameter(torch.randn(8, 8))
        self.layers.insert(4, nn.Linear(8, 8, bias=False))
        self.layers[4].weight = self.layers[2].weight


def test_a_weight_that_two_layers_share_is_one_weight_also_for_a_single_replica():
    model, = nets(1, Tied)
    x, y, rule = normal(5, 1, 16, 6), labels(3, 5, 1, 16), Rule("sgd")
    for alone in (True, False):
        own = copy.deepcopy(model)
        network = module_network(model, LOSSES["ce"].function, alone)
        runs = make(model, weights_of([model]), 0.1, dtype=torch.float64)
        assert len(runs["weights"]) == 3
        losses = [advance(runs, x[step], y[step], network, rule, step)[0].item() for step in range(5)]
        solver = torch.optim.SGD(own.parameters(), 0.1)
        assert losses == pytest.approx(run_alone(own, solver, F.cross_entropy, zip(x[:, 0], y[:, 0])), rel=1e-12)


def test_losses_are_never_taken_in_bfloat16():
    model, = nets(1)
    weights, x = [w[None].bfloat16() for w in model.parameters()], normal(1, 4, 6).bfloat16()
    for alone in (True, False):
        assert module_network(model, LOSSES["ce"].function, alone).forward(weights, x).dtype == torch.float32


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("written", [True, False])
def test_accumulated_gradients_are_those_of_the_whole_batch(name, written):
    rule, _, decay = RULES[name]
    models, loss = nets(2, Bare), LOSSES["ce"].function
    network, x, y = mlp_network(loss) if written else module_network(models[0], loss), normal(3, 2, 12, 6), labels(3, 3, 2, 12)
    made = [make(models[0], weights_of(models), LRS[:2], **decay, moments=rule.moments, dtype=torch.float64) for _ in "ab"]
    for step in range(3):
        whole, parts = (advance(runs, x[step], y[step], network, rule, step, parts=parts, accuracy=True)
                        for runs, parts in zip(made, (1, 4)))
        for a, b in zip(whole, parts):
            assert torch.allclose(a, b, rtol=1e-12)
    for a, b in zip(made[0]["weights"], made[1]["weights"]):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


def test_accuracy_is_the_share_of_right_answers_before_the_step():
    model, = nets(1, Bare)
    x, y = normal(1, 50, 6), labels(3, 1, 50)
    runs = make(model, weights_of([model]), 0.5, dtype=torch.float64)
    right = (model(x[0]).argmax(-1) == y[0]).double().mean().item()
    _, accuracy = advance(runs, x, y, mlp_network(stack.ce), Rule("sgd"), accuracy=True)
    assert accuracy.item() == right and 0 < right < 1
    assert advance(runs, x, y, mlp_network(stack.ce), Rule("sgd"), accuracy=True)[1].item() != right


def test_processes_average_gradients_and_means_before_the_update():
    model, = nets(1, Bare)
    x, y, rule, network = normal(1, 16, 6), labels(3, 1, 16), Rule("sgd"), mlp_network(stack.ce)
    plain, averaged = (make(model, weights_of([model]), lr, dtype=torch.float64) for lr in (0.05, 0.1))
    loss, = advance(plain, x, y, network, rule)
    half, = advance(averaged, x, y, network, rule, average=lambda tensors: [tensor.div_(2) for tensor in tensors])
    assert half.item() == pytest.approx(loss.item() / 2, rel=1e-12)
    for a, b in zip(plain["weights"], averaged["weights"]):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-14)


def test_both_ways_to_take_an_adamw_step_agree_for_every_replica():
    models, rule = nets(3), Rule("adam", decay=True)
    names = [name for name, _ in models[0].named_parameters()]
    lrs = [{name: lr * (1 + i % 2) for i, name in enumerate(names)} for lr in (0.01, 0.1, 0.01)]
    fused, foreach = (make(models[0], weights_of(models), lrs, [0.1, 0.0, 0.1], [1e-8, 1e-3, 1e-8], moments=2,
                           dtype=torch.float64) for _ in range(2))
    for step in range(4):
        grads = [normal(*w.shape, seed=step) for w in fused["weights"]]
        stack.fused_adamw_(fused, [g.clone() for g in grads], rule, 0.5, step)
        stack.foreach_adamw_(foreach, grads, rule, 0.5, step)
        for kind in ("weights", "first", "second"):
            for a, b in zip(fused[kind], foreach[kind]):
                assert torch.allclose(a, b, rtol=1e-10, atol=1e-14)
