"""metrics.py against independent computations: written out here, by autograd or by other packages."""
import copy
import importlib
import math
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import metrics
import models
import stack


class Block(nn.Module):
    """Embedding, LayerNorm, SDPA, GELU MLP and a readout; linears with biases."""

    def __init__(self, vocabulary=11, width=16):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.readout = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens):
        x = self.embedding(tokens)  # (B, T, D)
        heads = self.qkv(self.norm(x)).chunk(3, dim=-1)
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in heads)
        attention = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(attention.transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(x)))
        return self.readout(x)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def rms(v):
    return v.square().mean(dim=-1).sqrt().mean().item()


def net(sizes=(10, 32, 32, 3), bias=True, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    layers = []
    for fan_in, fan_out in zip(sizes, sizes[1:]):
        layers += [nn.Linear(fan_in, fan_out, bias=bias), nn.ReLU()]
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


def perturbed(model, scale=0.1):
    """(model with every parameter moved, its reference)"""
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p += scale * torch.randn(p.shape, generator=seeded(p.numel())).to(p.dtype)
    return model, reference


def spectrum(values, m, n, seed=0):
    """(m, n) matrix with these singular values and random singular vectors."""
    g, rank = seeded(seed), len(values)
    u = torch.linalg.qr(torch.randn(m, rank, generator=g, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(n, rank, generator=g, dtype=torch.float64)).Q
    return (u * values) @ v.T


def symmetric(eigenvalues):
    n = len(eigenvalues)
    q = torch.linalg.qr(normal(n, n)).Q
    return (q * eigenvalues) @ q.T


def test_metrics_imports_torch_and_the_standard_library_only():
    text = Path(metrics.__file__).read_text()
    imported = set(re.findall(r"^\s*(?:from|import) ([A-Za-z_]+)", text, re.MULTILINE))
    assert "torch" in imported and imported <= {"torch", *sys.stdlib_module_names}


# ---- updates and the refined coordinate check

def bias_free_outputs(network, x, names):
    """{name: output of a module less its bias}, through hooks of the test's own; x: tensor or keywords."""
    seen, handles = {}, []

    def keep(name):
        def hook(module, args, output):
            if isinstance(output, torch.Tensor):
                seen[name] = output.detach().clone()
        return hook

    for name, module in network.named_modules():
        handles.append(module.register_forward_hook(keep(name)))
    network(**x) if isinstance(x, dict) else network(x)
    for handle in handles:
        handle.remove()
    for name in names:
        bias = getattr(network.get_submodule(name), "bias", None)
        if bias is not None:
            across = (-1, 1, 1) if isinstance(network.get_submodule(name), nn.Conv2d) else (-1,)
            seen[name] -= bias.detach().view(across)
    return seen


@pytest.mark.parametrize("pair", [mlp_pair, block_pair])
def test_effective_plus_propagating_is_the_change_of_the_bias_free_output(pair):
    model, reference, x = pair()
    layers = metrics.updates(model, reference, x)
    outputs = [bias_free_outputs(network, x, layers) for network in (model, reference)]
    assert len(layers) == sum(hasattr(m, "weight") for m in model.modules())
    for name, layer in layers.items():
        total = layer.effective
        if layer.propagating is not None:
            total = total + layer.propagating
        change = (outputs[0][name] - outputs[1][name]).flatten(0, -2)
        assert change.norm() > 1e-3
        assert (total - change).norm() <= 1e-12 * outputs[0][name].norm()


def test_refined_coordinate_check_matches_a_direct_computation_per_sample():
    model, reference, x = mlp_pair()
    row = metrics.refined_coordinate_check(model, reference, x)["2"]
    xt, x0 = model[:2](x), reference[:2](x)  # (20, 32)
    dw = model[2].weight - reference[2].weight
    expected = {"effective": rms(xt @ dw.T),
                "propagating": rms((xt - x0) @ reference[2].weight.T),
                "input": rms(xt),
                "input_change": rms(xt - x0)}
    assert row == pytest.approx(expected, rel=1e-12)


MONITOR = {
    "effective": "RCC (W_t-W_0)x_t/{}.weight/l2norm",
    "propagating": "RCC W_0(x_t-x_0)/{}.weight/l2norm",
    "input": "RCC x_t/{}/l2norm",
    "input_change": "RCC (x_t-x_0)/{}/l2norm",
}
MONITOR_OF_NORMS = MONITOR | {  # what the gains multiply
    "input": "RCC (W_t-W_0)x_t/{}.weight/x_t/l2norm",
    "input_change": "RCC W_0(x_t-x_0)/{}.weight/x_t-x_0/l2norm",
}


def monitored(model, reference, x):
    """{key: L2 norm} of the package torch-module-monitor."""
    package = pytest.importorskip("torch_module_monitor")
    from torch_module_monitor.refined_coordinate_check import RefinedCoordinateCheck
    monitor = package.ModuleMonitor(monitor_step_fn=lambda step: True)
    monitor.set_module(model)
    monitor.set_reference_module(reference)
    check = RefinedCoordinateCheck(monitor)
    monitor.begin_step(0)
    with torch.no_grad():
        reference(x)
        model(x)
    check.refined_coordinate_check()
    monitor.storage.aggregate_step(0)
    return monitor.storage.get_step_metrics(0)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize("pair", [mlp_pair, block_pair])
def test_refined_coordinate_check_agrees_with_torch_module_monitor(pair, dtype, tolerance):
    model, reference, x = pair(dtype)
    ours = metrics.refined_coordinate_check(model, reference, x)
    theirs, compared = monitored(model, reference, x), 0
    for name, row in ours.items():
        module = model.get_submodule(name)
        keys, fan_out, fan_in = MONITOR, module.weight.shape[0], module.weight.shape[-1]
        if isinstance(module, nn.LayerNorm):
            keys = MONITOR_OF_NORMS
        if isinstance(module, nn.Embedding):
            assert all(math.isnan(row[key]) for key in MONITOR if key != "effective")
            keys, fan_out = {"effective": "RCC (W_t-W_0)x_t/{}/l2norm"}, module.weight.shape[1]
        for key, pattern in keys.items():
            fan = fan_out if key in ("effective", "propagating") else fan_in
            expected = theirs[pattern.format(name)] / math.sqrt(fan)
            assert row[key] == pytest.approx(expected, rel=tolerance, abs=1e-15), (name, key)
            compared += 1
    embeddings = sum(isinstance(module, nn.Embedding) for module in model.modules())
    assert compared == 4 * len(ours) - 3 * embeddings and embeddings == (pair is block_pair)


class Conv1D(nn.Module):
    """As transformers has it: weight (in, out)."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_in, n_out, dtype=torch.float64))
        self.bias = nn.Parameter(torch.zeros(n_out))

    def forward(self, x):
        return x @ self.weight + self.bias


def test_conv1d_of_transformers_and_conv2d_give_what_the_equivalent_linear_gives():
    torch.manual_seed(0)
    x = torch.randn(5, 6, dtype=torch.float64)
    conv1ds, conv2ds, linears = [], [], []  # (model, reference) of each
    for _ in range(2):
        conv1ds.append(nn.Sequential(Conv1D(6, 4)))
        conv2ds.append(nn.Sequential(nn.Conv2d(6, 4, 1)).double())
        linears.append(nn.Sequential(nn.Linear(6, 4)).double())
        weight = conv1ds[-1][0].weight.data.T.clone()
        linears[-1][0].weight.data = weight
        conv2ds[-1][0].weight.data = weight.clone()[:, :, None, None]
    for measure in (metrics.refined_coordinate_check, metrics.alignment):
        expected = pytest.approx(measure(*linears, x)["0"], rel=1e-6, nan_ok=True)
        assert measure(*conv1ds, x)["0"] == expected
        assert measure(*conv2ds, x[:, :, None, None])["0"] == expected


def test_conv2d_updates_are_those_of_the_convolution():
    torch.manual_seed(0)
    first = nn.Conv2d(3, 4, (3, 2), stride=2, padding=1, dilation=(1, 2))
    last = nn.Conv2d(4, 5, 3, padding="valid")
    conv, conv0 = perturbed(nn.Sequential(first, nn.ReLU(), last).double())
    x = torch.randn(2, 3, 9, 11, dtype=torch.float64)
    layers = metrics.updates(conv, conv0, x)
    outputs, outputs0 = (bias_free_outputs(network, x, layers) for network in (conv, conv0))
    for name, layer in layers.items():
        change = outputs[name] - outputs0[name]  # (B, C, H, W)
        rows = change.permute(0, 2, 3, 1).flatten(0, 2)
        assert torch.allclose(layer.effective + layer.propagating, rows, atol=1e-12)


def test_rms_norm_gains_are_measured():
    torch.manual_seed(0)
    norm, norm0 = perturbed(nn.Sequential(nn.RMSNorm(8, eps=1e-5)).double(), scale=1)
    x = torch.randn(5, 8, dtype=torch.float64)
    effective = metrics.updates(norm, norm0, x)["0"].effective
    assert torch.allclose(effective, norm(x) - norm0(x), atol=1e-14)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(input=self.layer(x))  # keyword arguments are seen too


def test_a_module_called_twice_is_averaged_over_both_calls():
    torch.manual_seed(0)
    model, reference, x = Twice().double(), Twice().double(), torch.randn(7, 4, dtype=torch.float64)
    rows = torch.cat([x, model.layer(x)])
    expected = rms(rows @ (model.layer.weight - reference.layer.weight).T)
    row = metrics.refined_coordinate_check(model, reference, x)["layer"]
    assert row["effective"] == pytest.approx(expected, rel=1e-12)


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)  # not W x


class PartlyMeasured(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused, self.scaled = nn.Linear(3, 3), nn.Linear(3, 3), Scaled(3, 3)

    def forward(self, x):
        return self.scaled(self.used(x))


def test_what_is_not_measured_is_named_in_a_warning():
    model, x = PartlyMeasured(), torch.randn(2, 3)
    with pytest.warns(UserWarning, match=r"unused \(Linear\), scaled \(Scaled\)"):
        result = metrics.refined_coordinate_check(model, copy.deepcopy(model), x)
    assert list(result) == ["used"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics.refined_coordinate_check(*mlp_pair())


def test_models_of_different_width_are_refused():
    x = torch.randn(4, 10, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"module '0'.*\(32, 10\).*\(16, 10\)"):
        metrics.refined_coordinate_check(net(), net((10, 16, 16, 3)), x)


class Routed(nn.Module):
    """Rows go to one expert if their gate is positive and to the other if not."""

    def __init__(self):
        super().__init__()
        self.gate, self.first, self.second = (nn.Linear(2, k, bias=False) for k in (1, 4, 4))

    def forward(self, x):
        gate = self.gate(x)[:, 0]
        return torch.cat([expert(rows) for expert, rows in (
            (self.first, x[gate > 0]), (self.second, x[gate <= 0])) if len(rows)])


@pytest.mark.parametrize("rows, left_out", [
    ([[1, 1], [1, -1], [-1, -1]], ["first (Linear), second (Linear)"]),
    ([[1, -1], [1, -1]], ["first (Linear), second (Linear)"]),
    ([[1, 1], [-1, -1], [2, 1]], []),
])
def test_an_expert_of_another_number_of_samples_than_in_the_reference_is_named_and_left_out(rows, left_out):
    torch.manual_seed(0)
    model, reference = perturbed(Routed())
    model.gate.weight.data = torch.tensor([[1.0, 0.0]])         # the first of a row's two entries decides
    reference.gate.weight.data = torch.tensor([[0.0, 1.0]])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layers = metrics.updates(model, reference, torch.tensor(rows).float())
    assert list(layers) == (["gate"] if left_out else ["gate", "first", "second"])
    assert [str(warning.message).partition("unknown kind: ")[2] for warning in caught] == left_out


def test_a_module_that_the_reference_lacks_is_named_and_left_out():
    with pytest.warns(UserWarning, match=r"unknown kind: 4 \(Linear\)$"):
        assert list(metrics.updates(net(), net()[:4], normal(4, 10))) == ["0", "2"]


def test_tiny_updates_keep_their_digits_in_float32():
    model = net((100, 512, 512, 3), bias=False, dtype=torch.float32)
    reference = copy.deepcopy(model)
    x, dw = torch.randn(8, 100), torch.randn(512, 512)
    model[2].weight.data += 1e-6 * dw
    dw = model[2].weight.double() - reference[2].weight.double()
    exact = rms(reference[:2](x).double() @ dw.T)
    row = metrics.refined_coordinate_check(model, reference, x)["2"]
    assert row["effective"] == pytest.approx(exact, rel=1e-5)


class Translator(nn.Module):
    """An encoder-decoder: the target's tokens read the mean of the source's."""

    def __init__(self, width=8):
        super().__init__()
        self.source, self.target = nn.Embedding(7, width), nn.Embedding(5, width)
        self.encoder, self.mix = nn.Linear(width, width), nn.Linear(2 * width, width, bias=False)
        self.readout = nn.Linear(width, 5)

    def hidden(self, source, target, scale=1.0):
        code = torch.tanh(self.encoder(self.source(source))).mean(1, keepdim=True)
        target = self.target(target)
        return torch.tanh(scale * self.mix(torch.cat([code.expand_as(target), target], dim=-1)))

    def forward(self, source, target, *, scale=1.0):
        return self.readout(self.hidden(source, target, scale))


def translator_pair():
    torch.manual_seed(0)
    model, reference = perturbed(Translator().double())
    return model, reference, torch.randint(7, (3, 6)), torch.randint(5, (3, 4))


def test_a_models_arguments_may_be_a_tuple_or_a_dict_of_keywords():
    model, reference, source, target = translator_pair()
    forms = (source, target), {"source": source, "target": target}, {"target": target, "source": source}
    rows = metrics.refined_coordinate_check(model, reference, forms[0])
    assert list(rows) == ["source", "encoder", "target", "mix", "readout"]
    ht, h0 = (network.hidden(source, target) for network in (model, reference))
    dw, w0 = model.readout.weight - reference.readout.weight, reference.readout.weight
    assert rows["readout"] == pytest.approx(
        {"effective": rms(ht @ dw.T), "propagating": rms((ht - h0) @ w0.T), "input": rms(ht),
         "input_change": rms(ht - h0)}, rel=1e-12)
    aligned = metrics.alignment(model, reference, forms[0])
    sharp = metrics.sharpness(model, F.mse_loss, forms[0], torch.zeros(3, 4, 5).double())
    for x in forms[1:]:
        assert metrics.refined_coordinate_check(model, reference, x) == rows
        for name, row in metrics.alignment(model, reference, x).items():
            assert row == pytest.approx(aligned[name], nan_ok=True, rel=1e-12, abs=0), name
        assert metrics.sharpness(model, F.mse_loss, x, torch.zeros(3, 4, 5).double()) == sharp > 0
    doubled = metrics.refined_coordinate_check(model, reference, {**forms[1], "scale": 2.0})
    assert doubled["readout"]["input"] == pytest.approx(rms(model.hidden(source, target, 2.0)), rel=1e-12)
    assert doubled["mix"] == rows["mix"] and doubled["readout"] != rows["readout"]


@pytest.mark.parametrize("tied", [False, True])
def test_t5_of_transformers_is_measured_from_keyword_arguments(tied):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model, reference = perturbed(transformers.T5ForConditionalGeneration(transformers.T5Config(
        vocab_size=13, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0,
        tie_word_embeddings=tied)).double().eval())
    x = {"input_ids": torch.randint(13, (2, 7), generator=seeded(0)),
         "decoder_input_ids": torch.randint(13, (2, 5), generator=seeded(1))}
    with warnings.catch_warnings():
        warnings.simplefilter("error")      # nothing is left out but what is never called
        warnings.filterwarnings("ignore", r"not measured, as never called .*: shared \(Embedding\)$")
        layers = metrics.updates(model, reference, x)
    outputs = [bias_free_outputs(network, x, layers) for network in (model, reference)]
    called = {name for name, module in model.named_modules() if list(module.parameters(recurse=False))}
    assert layers.keys() == called - {"shared"}
    for name, layer in layers.items():
        total = layer.effective if layer.propagating is None else layer.effective + layer.propagating
        change = (outputs[0][name] - outputs[1][name]).flatten(0, -2)
        assert change.norm() > 1e-3, name
        tolerance = 1e-6 if name.endswith("layer_norm") else 1e-10      # T5's norms square in float32
        assert (total - change).norm() <= tolerance * outputs[0][name].norm(), name


@pytest.mark.parametrize("bias", [True, False])
def test_a_weight_that_is_a_buffer_is_not_measured_as_it_does_not_train(bias):
    torch.manual_seed(0)
    fixed = nn.Linear(4, 3, bias=bias)
    weight = fixed.weight.detach()
    del fixed.weight
    fixed.register_buffer("weight", weight)
    model, reference = perturbed(nn.Sequential(fixed, nn.Linear(3, 2)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert list(metrics.updates(model, reference, torch.randn(5, 4))) == ["1"]
    assert [str(warning.message).endswith("unknown kind: 0 (Linear)") for warning in caught] == [True] * bias


# ---- what a measurement leaves alone

class Noisy(nn.Module):
    def forward(self, x):
        return x + 0.1 * torch.randn_like(x)  # draws in evaluation mode too


class Counting(nn.Module):
    """Buffers that change in evaluation mode too: one in place, one by assignment."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(3))

    def forward(self, x):
        self.calls += 1
        self.last = x.detach().mean(dim=0)
        return x * self.calls


def measure_all(model, reference, x, y):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # BatchNorm is not measured
        rows = metrics.refined_coordinate_check(model, reference, x)
        metrics.alignment(model, reference, x)
    metrics.sharpness(model, F.cross_entropy, x, y)
    metrics.operator_norm(next(model.parameters()))
    return rows


def test_measuring_leaves_modes_rng_gradients_hooks_and_running_statistics_alone():
    torch.manual_seed(0)
    hidden = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.ReLU()
    model = nn.Sequential(*hidden, nn.Linear(8, 3), Noisy())
    model[3].eval()  # mixed modes must survive
    reference, x, y = copy.deepcopy(model), torch.randn(10, 6), torch.arange(10) % 3
    model[4].weight.grad = torch.ones(3, 8)
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    rows = measure_all(model, reference, x, y)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model[4].weight.grad, torch.ones(3, 8)) and model[0].weight.grad is None
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())
    for m in [*model.modules(), *reference.modules()]:
        assert not m._forward_pre_hooks and not m._forward_hooks
    hidden = model.eval()[:4](x)  # no dropout, running statistics
    assert rows["4"]["input"] == pytest.approx(rms(hidden))


@pytest.mark.parametrize("last", [nn.Identity, Counting])
def test_measuring_leaves_buffers_alone_that_change_when_weights_are_read_or_in_evaluation(last):
    torch.manual_seed(0)
    first = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 8))
    model = nn.Sequential(first, nn.ReLU(), nn.Linear(8, 3), last()).train()
    reference, x, y = copy.deepcopy(model), torch.randn(10, 6), torch.arange(10) % 3
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    assert "0.parametrizations.weight.0._u" in buffers
    measure_all(model, reference, x, y)
    for network in (model, reference):
        assert all(torch.equal(b, buffers[name]) for name, b in network.named_buffers())


@pytest.mark.parametrize("root", [False, True])
def test_a_parametrized_weight_is_the_one_that_evaluation_mode_has(root):
    torch.manual_seed(0)
    first = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 8, bias=False))
    model, reference = perturbed(first if root else nn.Sequential(first))
    x = torch.randn(10, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # its parametrization is not left out
        layer, = metrics.updates(model, reference, x).values()
    expected = model.eval()(x) - reference.eval()(x)
    assert expected.norm() > 0.1 and torch.allclose(layer.effective, expected, atol=1e-6)


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
    model, reference = InPlace().double(), InPlace().double()
    x = torch.randn(7, 4, dtype=torch.float64)
    expected = rms(x @ (model.layer.weight - reference.layer.weight).T)
    row = metrics.refined_coordinate_check(model, reference, x)["layer"]
    assert row["effective"] == pytest.approx(expected, rel=1e-12)


def test_a_failing_forward_leaves_no_hooks_and_the_training_mode():
    model = net()
    with pytest.raises(RuntimeError):
        x = torch.randn(4, 7, dtype=torch.float64)
        metrics.refined_coordinate_check(model, copy.deepcopy(model), x)
    for m in model.modules():
        assert not m._forward_pre_hooks and not m._forward_pre_hooks_with_kwargs
        assert m.training


# ---- alignment

def test_alignment_matches_exact_norms():
    model, reference, x = mlp_pair()
    row = metrics.alignment(model, reference, x)["2"]
    dw, w0 = model[2].weight - reference[2].weight, reference[2].weight
    xt, dx = model[:2](x), model[:2](x) - reference[:2](x)
    update, size = (xt @ dw.T).norm(dim=1), xt.norm(dim=1)
    norm, norm0 = torch.linalg.matrix_norm(dw, 2), torch.linalg.matrix_norm(w0, 2)
    propagating = (dx @ w0.T).norm(dim=1) / (norm0 * dx.norm(dim=1))
    expected = {"operator_update": (update / (norm * size)).mean().item(),
                "operator_propagating": propagating.mean().item()}
    assert row == pytest.approx(expected, rel=1e-3)


def test_alignment_of_a_rank_one_update_along_its_input_is_one():
    model = net((10, 32, 3), bias=False)
    reference, x = copy.deepcopy(model), torch.randn(1, 10, dtype=torch.float64)
    model[0].weight.data += torch.outer(torch.randn(32, dtype=torch.float64), x[0])
    row = metrics.alignment(model, reference, x)["0"]
    assert row["operator_update"] == pytest.approx(1, rel=1e-6)


def test_alignment_at_initialization_is_nan_and_samples_without_input_do_not_count():
    model, x = net((4, 8, 3), bias=False), torch.randn(5, 4, dtype=torch.float64)
    reference = copy.deepcopy(model)
    rows = metrics.alignment(model, reference, x).values()
    assert all(math.isnan(v) for row in rows for v in row.values())
    model[0].weight.data += 1
    with_zero = torch.cat([x, torch.zeros(3, 4, dtype=torch.float64)])
    expected = metrics.alignment(model, reference, x)["0"]
    assert metrics.alignment(model, reference, with_zero)["0"] == pytest.approx(expected, nan_ok=True)


def test_alignment_and_check_reuse_one_capture_and_the_reference_norms():
    model, reference, x = block_pair()
    layers, norms = metrics.updates(model, reference, x), {}
    first = metrics.alignment(model, reference, x, layers=layers, norm_cache=norms)
    for name, row in metrics.alignment(model, reference, x).items():
        assert row == pytest.approx(first[name], nan_ok=True)
    exact = torch.linalg.matrix_norm(reference.up.weight, 2).item()
    assert norms["up"] == pytest.approx(exact, rel=1e-3)
    norms["up"] *= 2  # a looked-up norm is used
    again = metrics.alignment(model, reference, x, layers=layers, norm_cache=norms)
    half = first["up"]["operator_propagating"] / 2
    assert again["up"]["operator_propagating"] == pytest.approx(half)


def test_a_diverged_model_gives_nan_not_an_error():
    model, reference, x = mlp_pair()
    model[2].weight.data[0, 0] = math.nan
    assert math.isnan(metrics.refined_coordinate_check(model, reference, x)["2"]["effective"])
    assert math.isnan(metrics.alignment(model, reference, x)["2"]["operator_update"])
    assert math.isnan(metrics.sharpness(model, F.cross_entropy, x, torch.arange(20) % 3))
    x[0] = math.nan  # one sample is enough
    assert math.isnan(metrics.alignment(model, reference, x)["0"]["operator_update"])


# ---- what is tracked of one step

def tracked(model, reference, x, y, **kwargs):
    with torch.no_grad():
        logits = reference(x)
    return list(metrics.measurements(model, reference, x, y, stack.LOSSES["ce"], logits, **kwargs))


@pytest.mark.parametrize("captured", [True, False])
@pytest.mark.parametrize("aligned", [True, False])
def test_measurements_are_a_row_per_module_and_one_of_the_logits(captured, aligned):
    model, reference, x = mlp_pair()
    y, cache = torch.arange(20) % 3, {}
    with torch.no_grad():
        logits, logits0 = model(x), reference(x)
    start = metrics.capture(reference, x) if captured else reference
    *rows, last = metrics.measurements(model, start, x, y, stack.LOSSES["ce"], logits0,
                                       norm_cache=cache if aligned else None)
    check = metrics.refined_coordinate_check(model, reference, x)
    alignment = metrics.alignment(model, reference, x)
    for layer, (name, row) in enumerate(zip(["0", "2", "4"], rows, strict=True)):
        expected = {"layer": layer, **check[name], **(alignment[name] if aligned else {})}
        assert row.pop("module") == name
        assert row == pytest.approx(expected, nan_ok=True, rel=1e-12, abs=0)
    assert list(cache) == (["0", "2", "4"] if aligned else [])
    chi = logits.softmax(-1) - F.one_hot(y, 3)
    expected = {"layer": 3, "loss": F.cross_entropy(logits, y).item(), "change": rms(logits - logits0),
                "rms": rms(logits), "chi": rms(chi)}
    assert last.pop("module") == ""
    assert last == pytest.approx(expected, rel=1e-12)


def test_measurements_of_tokens_are_means_over_all_of_them():
    model, reference, tokens = block_pair()
    targets = (tokens + 1) % 11
    *rows, last = tracked(model, reference, tokens, targets)
    assert [row["module"] for row in rows] == list(metrics.updates(model, reference, tokens))
    with torch.no_grad():
        logits, logits0 = model(tokens), reference(tokens)
    chi = logits.softmax(-1) - F.one_hot(targets, 11)
    expected = {"loss": ce_of_tokens(logits, targets).item(), "change": rms((logits - logits0).flatten(0, 1)),
                "rms": rms(logits.flatten(0, 1)), "chi": rms(chi.flatten(0, 1))}
    assert {key: last[key] for key in expected} == pytest.approx(expected, rel=1e-12)


def test_measurements_take_the_arguments_that_the_model_takes():
    model, reference, source, target = translator_pair()
    logits = reference(source, target).detach()
    for x in ((source, target), {"target": target, "source": source}):
        *rows, last = metrics.measurements(model, reference, x, target, stack.LOSSES["ce"], logits)
        assert [row["module"] for row in rows] == ["source", "encoder", "target", "mix", "readout"]
        assert last["rms"] == pytest.approx(rms(model(source, target).flatten(0, 1)), rel=1e-12)


def test_measurements_are_taken_in_evaluation_mode_and_leave_buffers_and_generators_alone():
    torch.manual_seed(0)
    hidden = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)
    model = nn.Sequential(*hidden, nn.Linear(8, 3), Counting(), Noisy())
    reference, x, y = copy.deepcopy(model), torch.randn(10, 6), torch.arange(10) % 3
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")     # BatchNorm is not measured
        list(metrics.measurements(model, reference, x, y, stack.LOSSES["ce"], torch.zeros(10, 3), {}))
    assert torch.equal(torch.get_rng_state(), state) and all(module.training for module in model.modules())
    for network in (model, reference):
        assert all(torch.equal(b, buffers[name]) for name, b in network.named_buffers())


# ---- operator norm

TOP = torch.tensor([1.003], dtype=torch.float64)
EDGE = torch.linspace(0, 1, 299, dtype=torch.float64) ** 0.1
OPERATORS = {
    "gaussian": normal(256, 256, seed=1),
    "tall": normal(300, 40, seed=2),
    "wide": normal(2, 400, seed=3),
    "rank one": spectrum(torch.tensor([3.0], dtype=torch.float64), 100, 200),
    "ill separated": spectrum(1 - 1e-3 * torch.arange(300, dtype=torch.float64), 300, 320),
    "edge with a lone top": spectrum(torch.cat([TOP, EDGE]), 300, 300),
    "all equal": torch.eye(64, dtype=torch.float64),
    "tiny": 1e-30 * normal(64, 64, seed=4),
    "huge": 1e30 * normal(64, 64, seed=5),
    "one by one": torch.tensor([[-2.0]], dtype=torch.float64),
    "decaying": spectrum(10.0 ** -torch.arange(20, dtype=torch.float64), 200, 150),
}
DIAGONALS = {
    "identity": torch.ones,
    "projector": lambda n: (torch.arange(n) < n // 2).float(),
    "rank one": lambda n: (torch.arange(n) == 0).float(),
    "two values": lambda n: 1 + 0.5 * (torch.arange(n) == 0),
}


@pytest.mark.parametrize("kind", DIAGONALS)
def test_the_largest_eigenvalue_survives_krylov_spaces_that_close_at_once(kind):
    for n in (2, 3, 4, 5, 6, 8, 12, 33, 64):
        for scale in (1, 0.3, 1.7, -0.3):
            a = scale * DIAGONALS[kind](n)
            for dtype, error in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
                values = a.to(dtype)
                largest = metrics._largest_eigenvalue(lambda v, a=values: v * a, values)
                expected = pytest.approx(values.max().item(), rel=error, abs=error)
                assert largest == expected, (n, scale, dtype)


@pytest.mark.parametrize("seed", [74, 3364, 3535])
def test_a_direction_that_the_start_all_but_misses_does_not_end_the_iteration_early(seed):
    """Of seeds 0 to 3999 these three had an error above 0.001 when sixteen steps could be enough."""
    g = seeded(seed)
    n = int(torch.randint(20, 200, (1,), generator=g))
    values = torch.rand(n, generator=g, dtype=torch.float64) ** 3
    assert metrics.operator_norm(values.diag()) == pytest.approx(values.max().item(), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", OPERATORS)
def test_operator_norm_is_within_a_thousandth_of_the_exact_norm(name, dtype):
    matrix = OPERATORS[name].to(dtype)
    exact = torch.linalg.matrix_norm(matrix.double(), ord=2).item()
    for weight in (matrix, matrix.T):
        assert metrics.operator_norm(weight) == pytest.approx(exact, rel=1e-3, abs=0)


def test_operator_norm_over_many_random_spectra():
    for seed in range(60):
        g, power = seeded(seed), [0.02, 0.1, 0.5, 3][seed % 4]
        m, n = torch.randint(20, 200, (2,), generator=g).tolist()
        values = torch.rand(min(m, n), generator=g, dtype=torch.float64) ** power
        largest = metrics.operator_norm(spectrum(values, m, n, seed))
        assert largest == pytest.approx(values.max().item(), rel=1e-3)


@pytest.mark.parametrize("scale", [1e36, 1e-42])
@pytest.mark.parametrize("shape", [(64, 64), (300, 3), (3, 300), (1, 7), (7, 1)])
def test_the_operator_norm_survives_the_ends_of_float32(scale, shape):
    weight = (scale * normal(*shape, seed=6)).float()
    exact = torch.linalg.matrix_norm(weight.double(), ord=2).item()
    assert metrics.operator_norm(weight) == pytest.approx(exact, rel=1e-3, abs=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_operator_norm_of_a_matrix_that_is_not_finite_is_nan_or_inf(bad):
    for entry in ((0, 0), (2, 1)):
        weight = torch.ones(3, 4)
        weight[entry] = bad
        assert metrics.operator_norm(weight) == pytest.approx(abs(bad), nan_ok=True)


def test_operator_norm_of_zero_gains_convolutions_bfloat16_and_nan():
    assert metrics.operator_norm(torch.zeros(5, 7)) == 0.0
    assert metrics.operator_norm(torch.tensor([1.0, -3.0])) == 3.0
    conv = torch.randn(4, 3, 3, 3, generator=seeded(0))
    exact = torch.linalg.matrix_norm(conv.flatten(1), 2).item()
    assert metrics.operator_norm(conv) == pytest.approx(exact, rel=1e-3)
    half = torch.randn(64, 64, generator=seeded(0)).bfloat16()
    exact = torch.linalg.matrix_norm(half.float(), 2).item()
    assert metrics.operator_norm(half) == pytest.approx(exact, rel=1e-3)
    assert math.isnan(metrics.operator_norm(torch.tensor([[1.0, math.nan], [0.0, 1.0]])))


def test_operator_norm_is_deterministic_and_warns_when_it_stops_early():
    weight = OPERATORS["gaussian"]
    torch.manual_seed(1)
    first = metrics.operator_norm(weight)
    torch.manual_seed(2)
    assert metrics.operator_norm(weight) == first
    square = weight @ weight.T
    with pytest.warns(UserWarning, match="has residual .* after 4 steps"):
        metrics._largest_eigenvalue(lambda v: square @ v, square[0], max_steps=4)


# ---- sharpness

def ce_of_tokens(logits, targets):
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())



class Quadratic(nn.Module):
    """Two parameter tensors p, q; model(A) is [p, q]^T A [p, q] / 2, whose Hessian is A."""

    def __init__(self, n=40):
        super().__init__()
        self.p = nn.Parameter(torch.ones(n // 4, 2, dtype=torch.float64))
        self.q = nn.Parameter(torch.ones(n // 2, dtype=torch.float64))

    def forward(self, a):
        v = torch.cat([self.p.flatten(), self.q])
        return v @ a @ v / 2


SPECTRA = {
    "positive": torch.linspace(0.1, 3, 40),
    "negative dominant": torch.cat([-torch.linspace(1, 100, 39), torch.ones(1)]),
    "all negative": -torch.linspace(0.5, 50, 40),
    "top is zero": torch.cat([torch.zeros(3), -torch.linspace(1, 9, 37)]),
    "ill separated": torch.cat([3 - 1e-3 * torch.arange(30), -torch.linspace(1, 5, 10)]),
}


@pytest.mark.parametrize("name", SPECTRA)
def test_sharpness_is_the_most_positive_eigenvalue(name):
    values = SPECTRA[name].double()
    largest = metrics.sharpness(Quadratic(), lambda output, target: output, symmetric(values), None)
    assert largest == pytest.approx(values.max().item(), rel=1e-2, abs=1e-9)


@pytest.mark.parametrize("power", [0.02, 0.5, 3, 8])
def test_sharpness_over_many_random_spectra_of_both_signs(power):
    for seed in range(12):
        g, n = seeded(seed), (4, 8, 40, 120)[seed % 4]
        values = torch.rand(n, generator=g, dtype=torch.float64) ** power
        values *= torch.randn(n, generator=g, dtype=torch.float64).sign()
        largest = metrics.sharpness(Quadratic(n), lambda output, target: output, symmetric(values), None)
        assert largest == pytest.approx(values.max().item(), rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("kind", DIAGONALS)
def test_sharpness_survives_krylov_spaces_that_close_at_once(kind):
    for n in (4, 8, 64):
        for scale in (1, 0.3, -0.3):
            a = scale * DIAGONALS[kind](n).double()
            largest = metrics.sharpness(Quadratic(n), lambda output, target: output, a.diag(), None)
            assert largest == pytest.approx(a.max().item(), rel=1e-9, abs=1e-12), (n, scale)


@pytest.mark.parametrize("scale", [1e12, 1e-12])
@pytest.mark.parametrize("name", ["positive", "negative dominant", "all negative", "ill separated"])
def test_sharpness_does_not_depend_on_the_unit_of_the_loss_in_float32(name, scale):
    hessian = (scale * symmetric(SPECTRA[name].double())).float()
    largest = metrics.sharpness(Quadratic().float(), lambda output, target: output, hessian, None)
    assert largest == pytest.approx(scale * SPECTRA[name].max().item(), rel=1e-2, abs=0)


def exact_hessian(model, loss_fn, x, y):
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(flat):
        parts = flat.split([p.numel() for p in parameters.values()])
        weights = {name: part.view_as(parameters[name]) for name, part in zip(parameters, parts)}
        return loss_fn(torch.func.functional_call(model, weights, (x,)), y)

    return torch.func.hessian(loss)(torch.cat([p.flatten() for p in parameters.values()]))


@pytest.mark.parametrize("sign", [1, -1])
def test_sharpness_of_a_small_net_is_within_one_percent_of_the_exact_hessian(sign):
    def loss_fn(logits, targets):
        return sign * F.cross_entropy(logits, targets)  # -1: a negative-dominant spectrum

    model, _, x = mlp_pair(sizes=(6, 12, 12, 3))
    y = torch.arange(20) % 3
    top = torch.linalg.eigvalsh(exact_hessian(model, loss_fn, x, y))[-1].item()
    assert metrics.sharpness(model, loss_fn, x, y) == pytest.approx(top, rel=1e-2)
    single = metrics.sharpness(copy.deepcopy(model).float(), loss_fn, x.float(), y)
    assert single == pytest.approx(top, rel=1e-2)


def test_sharpness_is_right_where_gradients_are_switched_off():
    model, _, x = mlp_pair(sizes=(6, 12, 3))
    y = torch.arange(20) % 3
    on = metrics.sharpness(model, F.cross_entropy, x, y)
    with torch.no_grad():
        assert metrics.sharpness(model, F.cross_entropy, x, y) == on > 0


def test_sharpness_of_attention_and_of_losses_that_are_linear_or_not_scalar():
    model, _, tokens = block_pair()
    assert metrics.sharpness(model, ce_of_tokens, tokens, tokens) > 0  # double backward through SDPA
    linear = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        assert metrics.sharpness(linear, lambda z, y: z.sum(), torch.randn(2, 3), None) == 0.0
    with pytest.raises(ValueError, match="must return a scalar"):
        metrics.sharpness(linear, lambda z, y: z, torch.randn(2, 3), None)


# ---- calibration

def two_classes(*confidence):
    """Logits that predict class 0 with these probabilities."""
    return torch.tensor([[math.log(c / (1 - c)), 0.0] for c in confidence], dtype=torch.float64)


@pytest.mark.parametrize("confidence, bins, expected", [
    ((0.9, 0.6), 10, 0.5 * abs(0.5 - 0.9) + 0.5 * abs(1.0 - 0.6)),
    ((0.95, 0.85), 10, 0.5 * abs(0.5 - 0.95) + 0.5 * abs(1.0 - 0.85)),
    ((0.9, 0.6), 1, abs(0.75 - 0.75)),
])
def test_calibration_error_against_hand_counts(confidence, bins, expected):
    high, low = confidence
    logits, targets = two_classes(high, high, low, low), torch.tensor([0, 1, 0, 0])
    assert metrics.expected_calibration_error(logits, targets, bins) == pytest.approx(expected)


def test_a_calibrated_model_has_small_calibration_error_and_doubling_its_logits_does_not():
    g = seeded(0)
    logits = 2 * torch.randn(40_000, 5, generator=g)
    targets = torch.multinomial(logits.softmax(dim=-1), 1, generator=g).squeeze(1)
    assert metrics.expected_calibration_error(logits, targets) < 0.015
    assert metrics.expected_calibration_error(2 * logits, targets) > 0.05


# ---- other people's models

def transformers_class(family, name):
    """Llama's RMSNorm is transformers.models.llama.modeling_llama.LlamaRMSNorm."""
    pytest.importorskip("transformers")
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    return getattr(module, name)


def causal_lm(family):
    transformers = pytest.importorskip("transformers")
    sizes = dict(vocab_size=13, hidden_size=16, num_attention_heads=2, num_hidden_layers=1,
                 max_position_embeddings=8, tie_word_embeddings=False)
    if family != "gpt2":
        sizes |= dict(num_key_value_heads=1, intermediate_size=32, head_dim=8)
    config = transformers.AutoConfig.for_model(family, **sizes)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("family, query", [
    ("gpt2", "transformer.h.0.attn.c_attn"), ("llama", "model.layers.0.self_attn.q_proj"),
    ("qwen3", "model.layers.0.self_attn.q_proj")])
def test_causal_models_of_transformers_are_measured_whole(family, query):
    model, reference = perturbed(causal_lm(family), scale=0.01)
    tokens = torch.randint(13, (2, 8), generator=seeded(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is left out
        rows = metrics.refined_coordinate_check(model, reference, tokens)
    assert len(rows) == sum(name.endswith("weight") for name, _ in model.named_parameters())
    assert all(row["effective"] > 0 for row in rows.values()) and rows[query]["propagating"] > 0


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("family, name", [
    ("llama", "LlamaRMSNorm"), ("qwen2", "Qwen2RMSNorm"), ("qwen3", "Qwen3RMSNorm"),
    ("mistral", "MistralRMSNorm"), ("t5", "T5LayerNorm"), ("llama4", "Llama4TextRMSNorm")])
def test_rms_norms_of_transformers_are_measured(family, name, dtype, tolerance):
    norm = transformers_class(family, name)(8, eps=1e-3)
    model, reference = perturbed(nn.Sequential(nn.Linear(4, 8), norm).to(dtype))
    x = 0.1 * torch.randn(2, 5, 4, generator=seeded(0)).to(dtype)  # inputs so small that eps counts
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = metrics.updates(model, reference, x)["1"]
    change = (model(x) - reference(x)).flatten(0, 1).float()
    assert layer.effective.norm() > 0.1 and layer.propagating.norm() > 0.1
    assert (layer.effective + layer.propagating - change).norm() < tolerance * change.norm()
    model[1].weight.data.fill_(math.nan)  # still measured when diverged
    row = metrics.refined_coordinate_check(model, reference, x)["1"]
    assert math.isnan(row["effective"]) and not math.isnan(row["propagating"])


class LikeRMSNorm(nn.Module):
    """weight * x / rms(x), with room for what makes it another function."""

    def __init__(self, fan, eps=1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(fan)), eps

    def forward(self, x, eps=None):
        eps = self.eps if eps is None else eps
        return self.weight * x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()


class PlainRMSNorm(LikeRMSNorm):
    def forward(self, x):
        return super().forward(x)


class CentredRMSNorm(LikeRMSNorm):
    def forward(self, x):
        return super().forward(x - x.mean(-1, keepdim=True))


class OtherEpsRMSNorm(LikeRMSNorm):
    def forward(self, x):
        return super().forward(x, 2 * self.eps)


class GatedRMSNorm(LikeRMSNorm):
    def forward(self, x, gate=None):
        return super().forward(x if gate is None else x * gate)


class ImageRMSNorm(LikeRMSNorm):
    def forward(self, x):  # over channels of (B, C, ...)
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class BiasedRMSNorm(LikeRMSNorm):
    def __init__(self, fan):
        super().__init__(fan)
        self.bias = nn.Parameter(torch.zeros(fan))

    def forward(self, x):
        return super().forward(x) + self.bias


class RectifiedRMSNorm(LikeRMSNorm):
    def forward(self, x):
        return super().forward(x.relu())


@pytest.mark.parametrize("kind", [
    CentredRMSNorm, OtherEpsRMSNorm, GatedRMSNorm, ImageRMSNorm, BiasedRMSNorm, RectifiedRMSNorm,
    "GemmaRMSNorm"])
def test_norms_that_are_not_weight_times_x_over_rms_are_left_out_with_a_warning(kind):
    if kind == "GemmaRMSNorm":
        kind = transformers_class("gemma", kind)
    x = torch.randn(5, 8, generator=seeded(0))
    for weight in (0.0, 1.0, math.nan):
        norm = nn.Sequential(kind(8), PlainRMSNorm(8))
        norm[0].weight.data.fill_(weight)
        with pytest.warns(UserWarning, match=rf"unknown kind: 0 \({kind.__name__}\)"):
            assert list(metrics.updates(norm, norm, x)) == ["1"]


def test_a_compiled_model_is_measured_under_the_names_of_the_plain_one():
    model, reference, x = mlp_pair()
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    plain = metrics.refined_coordinate_check(model, reference, x)
    assert metrics.refined_coordinate_check(compiled, reference, x) == plain


@pytest.mark.parametrize("norm_affine, modules", [(True, 19), (False, 10)])
def test_every_weight_of_our_gpt_is_measured(norm_affine, modules):
    def gpt(seed):
        torch.manual_seed(seed)
        return models.GPT(23, 64, 2, 16, head_dim=16, norm_affine=norm_affine).double()

    reference, model = gpt(0), gpt(0)
    tokens = torch.randint(23, (3, 12), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        for p in model.parameters():
            p += 0.02 * torch.randn_like(p)
    with warnings.catch_warnings():
        warnings.simplefilter("error")                          # nothing is left out
        rows = metrics.refined_coordinate_check(model, reference, tokens)
    assert len(rows) == modules == sum(1 for _ in model.parameters())
    assert all(row["effective"] > 0 for row in rows.values())
    unmoved = "embedding", "blocks.0.norm_attention"            # nothing before them changes their input
    if norm_affine:
        assert all(row["propagating"] > 0 for name, row in rows.items() if name not in unmoved)
    compiled = torch.compile(model, backend="eager")
    assert metrics.refined_coordinate_check(compiled, reference, tokens) == rows
