"""A custom model, FILE.py:FUNCTION: what is built, initialized, trained, tracked and refused."""
import importlib
import json
import math
import random
import re
import sys
import textwrap
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import analyze
import data
import models
import param
import stack
import sweep
import train
from config import InputError, command_line, configure
from conftest import call

TINY = {"train_size": 200, "val_size": 40, "batch_size": 16, "steps": 10, "base_width": 8}
TINY_FLAGS = [part for name, value in TINY.items() for part in (f"--{name.replace('_', '-')}", value)]
HEADER = """
import random

import numpy as np
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn


"""
NET = """
    def build(width, shape):
        return nn.Sequential(nn.Linear(shape.inputs, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(),
                             nn.Linear(width, shape.classes))
"""


def forget_modules_of(folder):
    """Let the next import read a folder's files anew."""
    for name, module in list(sys.modules.items()):
        module_spec = vars(module).get("__spec__")
        if module_spec is not None:
            # a folder without __init__.py has no file
            places = [module_spec.origin, *(module_spec.submodule_search_locations or ())]
            if any(place and Path(place).is_relative_to(folder) for place in places):
                del sys.modules[name]
    importlib.invalidate_caches()
    models.load_custom.cache_clear()
    models._import_file.cache_clear()
    train._shapes_only.cache_clear()


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Return write(code, name="net", function="build") -> "FILE.py:FUNCTION", imported anew."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write(code, name="net", function="build"):
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(HEADER + textwrap.dedent(code))
        forget_modules_of(tmp_path)
        return f"{path}:{function}"

    yield write
    forget_modules_of(tmp_path)


def run_sweep(*flags):
    return call(lambda: command_line(sweep.main), "sweep.py", "--no-plots", *TINY_FLAGS, *flags)


def run_train(*flags):
    return call(lambda: command_line(train.main), "train.py", *TINY_FLAGS, *flags)


def results(row):
    left_out = ("id", "model", "code", "init", "seconds")
    return {key: value for key, value in row.items() if key not in left_out}


def sorted_rows(out):
    return sorted(map(str, map(results, analyze.read_rows(out).values())))


# ---- the same results as the library's own models ----

@pytest.mark.parametrize("settings", [
    dict(lr=0.5), dict(lr=0.02, optimizer="adam", param="mup"), dict(lr=0.1, loss="mse", dtype="float64"),
    dict(lr=0.1, clip=0.5, momentum=0.9, weight_decay=0.01, readout_scale=0.1)])
def test_our_mlp_in_a_file_has_the_rows_of_our_mlp(write, settings):
    spec = write("def build(width):\n    from models import MLP\n    return MLP(100, width, 3, 2)")
    for seed in range(2):
        run = {**TINY, **settings, "width": 24, "seed": seed}
        (ours,), (theirs,), (as_built,) = (train.train({**run, **other}) for other in (
            {}, {"model": spec, "init": "he"}, {"model": spec}))
        names = ("final_train_loss", "val_loss", "logit_rms")
        expected = {name: ours[name] for name in names}
        assert {name: theirs[name] for name in names} == pytest.approx(expected, rel=1e-5)
        # torch.nn's own initialization is another one
        assert {name: as_built[name] for name in names} != pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("init", ["he", "own"])
def test_our_gpt_in_a_file_has_the_rows_of_our_gpt(write, init):
    spec = write("""
        from models import GPT

        def build(width, shape):
            assert shape.text
            return GPT(shape.classes, width, layers=1, context=shape.inputs, head_dim=8)
    """)
    gpt = dict(model="gpt", layers=1, head_dim=8, width=16, base_width=8, context=8, steps=9, warmup=2,
               val_size=4, lr=0.01, optimizer="adam", param="mup", init=init)
    ours, = train.train([gpt])
    theirs, = train.train([{**gpt, "model": spec, "data": "stdlib"}])
    assert results(ours) == results(theirs)
    assert ours["clip"] == theirs["clip"] == 1.0         # text has the same defaults under every model


def test_outputs_with_logits_are_unwrapped_and_buffers_stay_the_models_own(write):
    spec = write("""
        from types import SimpleNamespace

        class Net(nn.Module):
            def __init__(self, width, scale):
                super().__init__()
                self.a, self.b = nn.Linear(100, width, bias=False), nn.Linear(width, 2, bias=False)
                self.register_buffer("scale", torch.tensor(scale))
                self.register_buffer("count", torch.tensor(3), persistent=False)
                self.register_buffer("absent", None)

            def forward(self, x):
                return SimpleNamespace(logits=self.b(self.a(x).relu()) * self.scale * (self.count - 2))

        def build(width):
            return Net(width, 1.0)

        def halved(width):
            return Net(width, 0.5)
    """)
    run = dict(TINY, width=16, lr=0.1, init="he")
    plain, = train.train([dict(run, hidden_layers=1)])
    one, = train.train([dict(run, model=spec)])
    half, = train.train([dict(run, model=spec.replace(":build", ":halved"))])
    assert one["val_loss"] == pytest.approx(plain["val_loss"], rel=1e-5) != half["val_loss"]
    tracked = []
    train.train([dict(run, model=spec)], track=1, tracked=tracked)
    assert {row["module"] for row in tracked} == {"a", "b", ""}


# ---- models of many kinds against torch.optim, one run at a time ----

KINDS = '''
class Net(nn.Module):
    def __init__(self, width, outputs=2):
        super().__init__()
        self.up, self.hidden = nn.Linear(100, width), nn.Linear(width, width)
        self.out = nn.Linear(width, outputs)

    def features(self, x):
        return self.hidden(self.up(x).relu()).relu()

    def forward(self, x):
        return self.out(self.features(x))


class KeepsActivations(Net):
    def forward(self, x):
        self.last_features = self.features(x)
        self.history = [*getattr(self, "history", []), self.last_features.mean()]
        return self.out(self.last_features)


class KeepsByAHook(Net):
    def __init__(self, width):
        super().__init__(width)
        self.kept = {}
        self.up.register_forward_hook(lambda module, args, output: self.kept.update(up=output))


class SkipsExperts(Net):
    def __init__(self, width):
        super().__init__(width)
        self.router = nn.Linear(width, 9)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(9))

    def features(self, x):
        h = super().features(x)
        weight, expert_of = self.router(h).softmax(-1).max(-1)
        mixed = torch.zeros_like(h)
        for i in expert_of.unique().tolist():
            rows = (expert_of == i).nonzero()[:, 0]
            mixed = mixed.index_put((rows,), weight[rows, None] * self.experts[i](h[rows]))
        return mixed


class NeverUsesALayer(Net):
    def __init__(self, width):
        super().__init__(width)
        self.unused = nn.Linear(width, width)


class LearnedScalar(Net):
    def __init__(self, width):
        super().__init__(width)
        self.log_temperature = nn.Parameter(torch.tensor(0.3))

    def forward(self, x):
        return super().forward(x) / self.log_temperature.exp()


class SharedLayer(Net):
    def __init__(self, width):
        super().__init__(width)
        self.again = self.hidden

    def forward(self, x):
        return self.out(self.again(self.features(x)).relu())


class RandomFeatures(Net):
    def __init__(self, width):
        super().__init__(width)
        self.register_buffer("directions", torch.randn(100, 100) / 10)

    def features(self, x):
        return super().features(torch.cos(x @ self.directions))


class SignsOfNumpy(Net):
    def __init__(self, width):
        super().__init__(width)
        self.signs = np.random.choice([-1.0, 1.0], 100)

    def features(self, x):
        return super().features(x * torch.as_tensor(self.signs, dtype=x.dtype))


class OrderOfPython(Net):
    def __init__(self, width):
        super().__init__(width)
        self.order = random.sample(range(100), 50) * 2

    def features(self, x):
        return super().features(x[..., self.order])


class FixedLinear(Net):
    def __init__(self, width):
        super().__init__(width)
        self.fixed = nn.Linear(100, 100, bias=False)
        weight = self.fixed.weight.detach()
        del self.fixed.weight
        self.fixed.register_buffer("weight", weight)

    def features(self, x):
        return super().features(self.fixed(x))


class PReLUs(Net):
    def __init__(self, width):
        super().__init__(width)
        self.act = nn.PReLU(width)

    def features(self, x):
        return self.act(self.hidden(self.act(self.up(x))))


class ComplexBuffer(Net):
    """Turns pairs of inputs, as rotary embeddings that are written with complex numbers do."""
    def __init__(self, width):
        super().__init__(width)
        self.register_buffer("turn", torch.polar(torch.ones(50), torch.arange(50.0)))

    def features(self, x):
        real, imaginary = x[..., ::2], x[..., 1::2]
        cos, sin = self.turn.real, self.turn.imag
        turned = real * cos - imaginary * sin, real * sin + imaginary * cos
        return super().features(torch.cat(turned, -1))


class Parameters(Net):
    def __init__(self, width):
        super().__init__(width)
        self.mixers = nn.ParameterList(torch.randn(width, width) / width ** 0.5 for _ in range(2))

    def features(self, x):
        h = super().features(x)
        for mixer in self.mixers:
            h = (h @ mixer).relu()
        return h


class Recurrent(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.lstm, self.out = nn.LSTM(10, width, batch_first=True), nn.Linear(width, 2)

    def forward(self, x):
        return self.out(self.lstm(x.unflatten(-1, (10, 10)))[0][:, -1])


class Attends(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.attention = nn.Linear(10, width), nn.MultiheadAttention(width, 2, batch_first=True)
        self.out = nn.Linear(width, 2)

    def forward(self, x):
        h = self.up(x.unflatten(-1, (10, 10)))
        return self.out(self.attention(h, h, h, need_weights=False)[0].mean(1))


class Convolves(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv, self.group = nn.Conv1d(10, width, 3), nn.GroupNorm(2, width)
        self.norm, self.out = nn.InstanceNorm1d(width, affine=True), nn.Linear(width, 2)

    def forward(self, x):
        return self.out(self.group(self.norm(self.conv(x.unflatten(-1, (10, 10))))).relu().mean(-1))


class Checkpoints(Net):
    def forward(self, x):
        return self.out(torch.utils.checkpoint.checkpoint(self.features, x, use_reentrant=False))


class BranchesOnData(Net):
    def features(self, x):
        h = super().features(x)
        return h if x.sum() > 0 else 2 * h


def of_any_options(width, **options):
    return Net(width, **options)


def with_an_optional_shape(width, shape=None):
    assert shape is None
    return Net(width)


def batch_norm(width):
    return nn.Sequential(nn.Linear(100, width), nn.BatchNorm1d(width, track_running_stats=False), nn.ReLU(),
                         nn.Linear(width, 2))


def dropout_of_zero(width):
    return nn.Sequential(nn.Linear(100, width), nn.Dropout(0.0), nn.ReLU(), nn.Linear(width, 2))


def half_precision(width):
    return Net(width).half()


class MasksPadding(nn.Module):
    """The mean over the tokens before that are no padding (0) is 0/0 for a batch of zeros."""
    def __init__(self, width):
        super().__init__()
        self.embedding, self.hidden = nn.Embedding(128, width, padding_idx=0), nn.Linear(width, width)
        self.out = nn.Linear(width, 128)

    def forward(self, tokens):
        is_token = (tokens > 0).unsqueeze(-1).to(self.out.weight)
        mean = (self.embedding(tokens) * is_token).cumsum(1) / is_token.cumsum(1)
        return self.out(self.hidden(mean).relu())


class MultiQuery(nn.Module):
    """All heads share one key and one value, whose size does not grow."""
    def __init__(self, width):
        super().__init__()
        self.embedding, self.q = nn.Embedding(128, width), nn.Linear(width, width)
        self.k, self.v, self.proj = nn.Linear(width, 4), nn.Linear(width, 4), nn.Linear(width, width)
        self.out = nn.Linear(width, 128)

    def forward(self, tokens):
        x = self.embedding(tokens)
        q = self.q(x).unflatten(-1, (-1, 4)).transpose(1, 2)            # (B, heads, T, 4)
        scores = q @ self.k(x)[:, None].mT / 2
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        attended = scores.masked_fill(later, -torch.inf).softmax(-1) @ self.v(x)[:, None]
        return self.out(x + self.proj(attended.transpose(1, 2).flatten(2)))
'''
STACKED = ("Net", "KeepsActivations", "KeepsByAHook", "NeverUsesALayer", "LearnedScalar", "SharedLayer",
           "RandomFeatures", "SignsOfNumpy", "OrderOfPython", "FixedLinear", "PReLUs", "ComplexBuffer",
           "Parameters", "Convolves", "of_any_options", "with_an_optional_shape", "batch_norm",
           "dropout_of_zero", "half_precision")
ONE_BY_ONE = ("SkipsExperts", "Recurrent", "Attends", "BranchesOnData", "Checkpoints")     # vmap refuses them
OF_TEXT = ("MasksPadding", "MultiQuery")


@pytest.fixture
def text_file(tmp_path):
    """Return a file of tokens from 1 to 127; a batch of zeros never occurs."""
    tokens = np.random.default_rng(0).integers(1, 128, 2000)
    tokens[0] = 127
    np.save(tmp_path / "tokens.npy", tokens)
    return str(tmp_path / "tokens.npy")


def settings_of(kind, text_file):
    """Return the settings under which a kind of model trains; 257 samples validate in two chunks."""
    if kind in OF_TEXT:
        return dict(TINY, data=text_file, context=8, warmup=0, decay="none", batch_size=4)
    return dict(TINY, batch_size=2 if kind == "SkipsExperts" else 4, val_size=257)


def alone(run, splits):
    """Return (last training loss, validation loss) by a plain loop with torch.optim."""
    config = configure(run)
    with train.seeded(data.stream_seed(config["seed"], "build")):
        model = models.load_custom(config["model"]).build(config["width"])
    model.double()
    optimizer = torch.optim.SGD(model.parameters(), config["lr"])
    order = data.stream(config["seed"], "batches")

    def loss_of(x, y):
        return F.cross_entropy(model(x).flatten(0, -2), y.flatten())

    for _ in range(config["steps"]):
        x, y = splits.batch(torch.randint(splits.samples, (config["batch_size"],), generator=order))
        optimizer.zero_grad()
        loss = loss_of(x, y)
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        chunks = zip(splits.x_val.tensor_split(2), splits.y_val.tensor_split(2))
        losses = [loss_of(x, y).item() * y.numel() / splits.y_val.numel() for x, y in chunks]
    return loss.item(), sum(losses)


@pytest.mark.parametrize("kind", [*STACKED, *ONE_BY_ONE, *OF_TEXT])
def test_models_of_every_kind_train_as_torch_optim_trains_them(write, text_file, kind):
    spec = write(KINDS, function=kind)
    run = dict(settings_of(kind, text_file), model=spec, width=8, dtype="float64", seed=2)
    runs = [dict(run, lr=lr) for lr in (0.2, 0.05)]
    splits = data.load(configure(run))
    if kind in ONE_BY_ONE:
        with pytest.raises(train.CannotStack, match="cannot train as one stack"):
            train.train(runs, splits)
        rows = [row for run in runs for row in train.train(run, splits)]
    else:
        rows = train.train(runs, splits)
    for run, row in zip(runs, rows):
        last, validation = alone(run, splits)
        assert row["final_train_loss"] == pytest.approx(last, rel=1e-10)
        assert row["val_loss"] == pytest.approx(validation, rel=1e-10)


@pytest.mark.parametrize("kind", [*STACKED, *ONE_BY_ONE, *OF_TEXT])
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_models_of_every_kind_train_in_a_sweep(write, text_file, tmp_path, kind):
    settings = [part for name, value in settings_of(kind, text_file).items()
                for part in (f"--{name.replace('_', '-')}", value)]
    ran = run_sweep("--model", write(KINDS, function=kind), *settings, "--widths", 8, 16, "--seeds", 2,
                    "--lrs", 0.05, 0.2, "--loss", "ce", "--out", tmp_path / "out")
    assert ran.returncode == 0, ran.stderr
    rows = list(analyze.read_rows(tmp_path / "out").values())
    assert len(rows) == 8 and all(row["final_train_loss"] > 0 and row["val_loss"] > 0 for row in rows)
    assert ran.stderr.count("they train one by one") == (kind in ONE_BY_ONE)


def test_a_model_of_real_valued_targets_learns_how_many_there_are(write, tmp_path):
    x = np.random.default_rng(0).normal(size=(100, 6))
    np.savez(tmp_path / "table.npz", x=x, y=x[:, :3] ** 2)
    run = dict(TINY, model=write(NET), data=str(tmp_path / "table.npz"), loss="mse", width=16)
    row, = train.train(run)
    assert row["train_accuracy"] is row["val_accuracy"] is row["val_ece"] is None
    targets = data.load(configure(run)).y
    assert row["chance_loss"] == pytest.approx(targets.var(0, correction=0).mean().item(), rel=1e-5)
    with pytest.raises(InputError, match=r"must make \(16, 3\)"):
        train.train(dict(run, model=write(KINDS.replace("100, width", "6, width"), function="Net")))


# ---- what build draws ----

@pytest.mark.parametrize("kind", ["Net", "RandomFeatures", "SignsOfNumpy", "OrderOfPython", "FixedLinear"])
@pytest.mark.parametrize("init", ["own", "he"])
def test_whatever_build_draws_follows_the_seed_and_leaves_the_generators(write, kind, init):
    run = dict(TINY, model=write(KINDS, function=kind), init=init, width=16)
    np.random.seed(1)
    random.seed(1)
    before = torch.get_rng_state(), str(np.random.get_state()), random.getstate()
    first, = train.train(dict(run, seed=3))
    after = torch.get_rng_state(), str(np.random.get_state()), random.getstate()
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
    torch.rand(3), np.random.rand(3), random.random()
    beside, again = train.train([dict(run, seed=3, lr=0.3), dict(run, seed=3)])
    other, = train.train(dict(run, seed=4))
    assert results(first) == results(again) != results(other)
    assert first["val_loss"] not in (beside["val_loss"], other["val_loss"])


@pytest.mark.parametrize("kind", ["RandomFeatures", "SignsOfNumpy", "OrderOfPython"])
def test_buffers_and_attributes_of_two_seeds_differ_with_the_same_weights_and_batches(write, kind):
    built = []
    for seed in range(2):
        run = configure(dict(TINY, model=write(KINDS, function=kind), seed=seed))
        built.append(train.build_network(run, 8, models.Shape(100, 2, False)))
    drawn = [net.directions if kind == "RandomFeatures" else torch.tensor(
        net.signs if kind == "SignsOfNumpy" else net.order) for net in built]
    assert not torch.equal(*drawn)


def test_runs_of_two_seeds_never_share_a_stack(write):
    run = dict(TINY, model=write(KINDS, function="RandomFeatures"), width=8)
    with pytest.raises(InputError, match="share a stack at one seed only, since build may draw buffers"):
        train.train([dict(run, seed=0), dict(run, seed=1)])
    runs = [configure(dict(run, lr=lr, seed=seed)) for lr in (0.1, 0.2, 0.3) for seed in range(2)]
    batches = list(sweep.stacks(runs, train.shape_of(runs[0]), size=4))
    assert sorted([run["seed"] for run in batch] for batch in batches) == [[0, 0, 0], [1, 1, 1]]
    ours = [configure({**run, "model": "mlp", "init": "he", "code": ""}) for run in runs]
    assert {run["seed"] for run in next(sweep.stacks(ours, train.shape_of(ours[0]), size=4))} == {0, 1}


# ---- initial weights ----

def initial_weights(spec, width, **settings):
    """Return ({parameter name: initial weights}, {parameter name: role}) of one run."""
    run = configure({**TINY, "model": spec, "width": width, **settings})
    splits = data.load(run)
    shape = train.shape_of(run, splits)
    model, roles, _ = train.build(run, shape)
    base = train.shapes_only(run, run["base_width"], shape)
    names = [name for name, _ in model.named_parameters()]
    return dict(zip(names, train.initial_weights(run, base, roles, splits))), roles


def test_at_the_base_width_the_initial_weights_are_the_models_own(write):
    spec = write(NET)
    weights, _ = initial_weights(spec, 8, seed=3, param="mup")
    with train.seeded(data.stream_seed(3, "build")):
        theirs = models.custom_model(spec, 8, models.Shape(100, 2, False))
    assert all(torch.equal(weights[name], w) for name, w in theirs.named_parameters())
    other, _ = initial_weights(spec, 8, seed=4, param="mup")
    assert not torch.equal(weights["0.weight"], other["0.weight"])
    he, _ = initial_weights(spec, 8, seed=3, param="mup", init="he")
    assert not torch.equal(weights["0.weight"], he["0.weight"])


@pytest.mark.parametrize("name", param.PARAMETERIZATIONS)
def test_at_other_widths_every_tensors_rms_scales_as_its_role_says(write, name):
    spec = write(NET)
    base, _ = initial_weights(spec, 8, param=name)
    weights, roles = initial_weights(spec, 32, param=name)
    assert set(roles.values()) == {"input", "hidden", "output", "vector"}
    for key, w in weights.items():
        b = param.exponents(name, "sgd")[roles[key]][0]
        rms, at_base = (tensor.square().mean().sqrt().item() for tensor in (w, base[key]))
        ratio = 1.0 if key == "4.bias" else 4.0         # the readout's bias has no width
        assert rms == pytest.approx(at_base * ratio ** -b, rel=1e-5)
    hidden = weights["2.weight"]
    assert hidden.abs().max() < 1.05 * math.sqrt(3) * hidden.square().mean().sqrt()     # uniform still


def test_rescale_keeps_constants_and_is_idempotent():
    def net(width):
        torch.manual_seed(0)
        layers = torch.nn.Linear(5, width), torch.nn.LayerNorm(width), torch.nn.Linear(width, 3)
        torch.nn.init.zeros_(layers[2].weight)
        return torch.nn.Sequential(*layers)

    model, base = net(32), net(8)
    param.rescale_(model, base, "mup")
    once = {name: w.clone() for name, w in model.named_parameters()}
    assert once["1.weight"].eq(1).all() and once["2.weight"].eq(0).all()
    param.rescale_(model, base, "mup")
    assert all(torch.allclose(w, once[name], rtol=1e-6) for name, w in model.named_parameters())
    with pytest.raises(ValueError, match="unknown parameterization"):
        param.rescale_(model, base, "muP")
    compiled = net(32)
    param.rescale_(torch.compile(compiled), base, "mup")        # other names, never run
    assert all(torch.equal(w, once[name]) for name, w in compiled.named_parameters())
    base[0].weight.data.fill_(3.0)              # constant in one of the two: nothing to go by
    param.rescale_(model, base, "mup")
    assert torch.allclose(model[0].weight, once["0.weight"])


@pytest.mark.parametrize("width", [8, 16])
def test_under_init_he_vectors_that_are_neither_bias_nor_gain_start_as_built(write, width):
    spec = write(KINDS, function="PReLUs")
    weights, roles = initial_weights(spec, width, init="he", seed=1)
    assert roles["act.weight"] == "vector" and weights["act.weight"].eq(0.25).all()
    assert all(weights[f"{name}.bias"].eq(0).all() for name in ("up", "hidden", "out"))
    generator = data.stream(1, "weights")
    for name, fan_in, m in (("up", 100, 1), ("hidden", 8, width / 8), ("out", 8, width / 8)):
        std = (2 / fan_in / m) ** 0.5
        drawn = torch.empty(weights[f"{name}.weight"].shape).normal_(0, std, generator=generator)
        torch.testing.assert_close(weights[f"{name}.weight"], drawn, rtol=1e-5, atol=0)
    rows = [train.train(dict(TINY, model=spec, init="he", width=width, seed=1))[0] for _ in range(2)]
    assert results(rows[0]) == results(rows[1]) and rows[0]["final_train_loss"] > 0


TIED = """
    class Net(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.a, self.b = nn.Linear(100, width, bias=False), nn.Linear(width, width, bias=False)
            self.c, self.d = nn.Linear(width, width, bias=False), nn.Linear(width, 2, bias=False)
            self.c.weight = self.b.weight

        def forward(self, x):
            return self.d(self.c(self.b(self.a(x))))

    def build(width):
        return Net(width)
"""


@pytest.mark.parametrize("width", [8, 16])
def test_a_tied_tensor_stays_one_in_every_place_at_the_base_width_too(write, width):
    spec = write(TIED)
    weights, roles = initial_weights(spec, width, init="he")
    assert list(weights) == ["a.weight", "b.weight", "d.weight"]
    assert roles == {"a.weight": "input", "b.weight": "hidden", "d.weight": "output"}
    tracked = []
    row, = train.train([dict(TINY, model=spec, width=width, lr=0.1, steps=1)], track=1, tracked=tracked)
    effective = {line["module"]: line["effective"] for line in tracked if line["module"]}
    assert list(effective) == ["a", "b", "c", "d"] and all(update > 0 for update in effective.values())
    assert row["val_loss"] > 0
    net = models.custom_model(spec, width, models.Shape(100, 2, False))
    models.set_parameters(net, [torch.full_like(w, i) for i, w in enumerate(net.parameters())])
    assert net.b.weight is net.c.weight and net.c.weight.eq(1).all() and net.d.weight.eq(2).all()


# ---- roles and predictions ----

TOKEN = """
    class Net(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.cls = nn.Parameter(torch.randn(1, 2, width))
            self.a, self.b = nn.Linear(100, width), nn.Linear(width, 2)

        def forward(self, x):
            return self.b((self.a(x) + self.cls.sum(1)).relu())

    def build(width):
        return Net(width)
"""


@pytest.mark.parametrize("roles_in_file", ['roles = {"cls": "input"}', 'roles = {"c*": "input"}'])
def test_roles_that_shapes_do_not_tell_stand_in_the_file(write, roles_in_file):
    _, roles = initial_weights(write(textwrap.dedent(TOKEN) + roles_in_file), 16)
    assert roles == {"cls": "input", "a.weight": "input", "a.bias": "vector", "b.weight": "output",
                     "b.bias": "vector"}


@pytest.mark.parametrize("roles_in_file", ['{"cls": "input"}', '{"cls": "input", "c*": "hidden"}'])
@pytest.mark.parametrize("flag", ["cls=vector", "c?s=vector"])
def test_roles_on_the_command_line_come_before_those_in_the_file(write, roles_in_file, flag):
    spec = write(f"{textwrap.dedent(TOKEN)}roles = {roles_in_file}")
    _, roles = initial_weights(spec, 16, roles=f"{flag} a.bias=vector")
    assert roles["cls"] == "vector"


def test_roles_are_part_of_a_rows_settings_and_the_table_says_what_it_assumes(write, tmp_path):
    ran = run_sweep("--model", write(TOKEN), "--roles", "cls=vector", "a.bias=vector", "--widths", 8, 16,
                    "--lrs", 0.1, 0.2, "--seeds", 1, "--out", tmp_path / "out")
    assert ran.returncode == 0 and "assumes that the roles given are right" in ran.stdout
    assert {row["roles"] for row in analyze.read_rows(tmp_path / "out").values()} == {
        "cls=vector a.bias=vector"}


def test_predictions_know_whether_there_is_a_hidden_matrix(write, tmp_path):
    shallow = write("def build(width):\n    return nn.Sequential(nn.Linear(100, width), nn.ReLU(),"
                    " nn.Linear(width, 2))", "shallow")
    for spec, predicted in ((shallow, 0.0), (write(NET), -0.5)):
        out = tmp_path / str(predicted)
        ran = run_sweep("--model", spec, "--widths", 8, 16, "--lrs", 0.1, 0.2, "--seeds", 1, "--loss", "ce",
                        "--track", 1, "--steps", 4, "--out", out)
        assert ran.returncode == 0, ran.stderr
        summary = json.loads((out / "summary.json").read_text())
        row, = summary["rows"]
        assert row["predicted_max_stable_exponent"] == predicted
        first, *hidden, readout = [entry["predicted"] for entry in summary["updates"]
                                   if (entry["kind"], entry["step"], entry["lr"]) == ("effective", 1, 0.1)]
        assert (first, readout) == (-0.5, 1.0) and hidden == [0.5] * (predicted == -0.5)
        assert not any("the prediction assumes" in flag for flag in row["flags"])


def test_dimensions_that_do_not_grow_with_the_width_are_flagged(write, tmp_path):
    spec = write("""
        def build(width):
            inner = 3 * width + 5
            return nn.Sequential(nn.Linear(100, width), nn.ReLU(), nn.Linear(width, inner), nn.ReLU(),
                                 nn.Linear(inner, 2))
    """)
    ran = run_sweep("--model", spec, "--widths", 8, 16, "--lrs", 0.1, 0.2, "--seeds", 1, "--out", tmp_path)
    assert ran.returncode == 0 and "proportional to the width; here some are not" in ran.stdout


def test_a_plan_shows_every_tensor_at_every_width_and_trains_nothing(write, tmp_path):
    ran = run_sweep("--model", write(NET), "--widths", 8, 32, "--param", "sp", "mup", "--plan", "--out",
                    tmp_path / "out")
    assert ran.returncode == 0 and not (tmp_path / "out").exists()
    assert ran.stdout.count("width 8: sp") == ran.stdout.count("width 32: mup") == 1
    tables = ran.stdout.split("width ")
    hidden = {table.split(":")[0]: line.split() for table in tables if "mup" in table
              for line in table.splitlines() if line.startswith("2.weight")}
    assert hidden["8"][2:4] == ["hidden", "1"] and hidden["32"][2:4] == ["hidden", "4"]
    assert float(hidden["32"][4]) == pytest.approx(float(hidden["8"][4]) / 2, rel=1e-3)
    one = call(lambda: command_line(train.main), "train.py", "--width", 32, "--plan")
    assert one.returncode == 0 and "layers.0.weight" in one.stdout and "0.1414" in one.stdout
    frozen = call(lambda: command_line(train.main), "train.py", "--plan", "--lr-factor", "input=0",
                  "hidden=0")
    lrs = {line.split()[0]: line.split()[5] for line in frozen.stdout.splitlines() if ".weight" in line}
    assert lrs == {"layers.0.weight": "0", "layers.1.weight": "0", "layers.2.weight": "0",
                   "layers.3.weight": "0.1"}


@pytest.mark.parametrize("lr_factor, frozen", [
    ("hidden=0", {"hidden"}), ("up.*=0", {"up"}), ("hidden.weight=0 output=0", {"hidden", "out"})])
def test_lr_factor_freezes_a_role_or_parameters_of_a_custom_model(write, lr_factor, frozen):
    tracked = []
    run = dict(TINY, model=write(KINDS, function="Net"), width=16, steps=3, lr_factor=lr_factor)
    train.train(run, track=1, tracked=tracked)
    moved = {row["module"]: row["effective"] for row in tracked if row["step"] == 3 and row["module"]}
    assert {module for module, update in moved.items() if update == 0} == frozen and len(moved) == 3


# ---- readout_scale ----

READOUTS = KINDS + '''

class Routes(Net):
    def __init__(self, width):
        super().__init__(width)
        self.router = nn.Linear(width, 4)

    def features(self, x):
        h = super().features(x)
        return h * self.router(h).softmax(-1).max(-1, keepdim=True).values


class Readout(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, width) / width)

    def forward(self, x):
        return x @ self.weight.T


class OwnReadout(Routes):
    """The readout is a module that is no layer of torch.nn."""
    def __init__(self, width):
        super().__init__(width)
        self.out = Readout(width)


class PlainParameter(Routes):
    """The readout is a parameter of the model itself, whose layers are called after it is."""
    def __init__(self, width):
        super().__init__(width)
        self.out = None
        self.weight = nn.Parameter(torch.randn(2, width) / width)

    def forward(self, x):
        return self.features(x) @ self.weight.T


def without_readout(width):
    return nn.Sequential(nn.Linear(100, 2 * width), nn.Unflatten(-1, (2, width)), nn.AdaptiveAvgPool1d(1),
                         nn.Flatten())
'''


@pytest.mark.parametrize("kind, readout", [
    ("Net", "out.weight"), ("Routes", "out.weight"), ("MultiQuery", "out.weight"),
    ("OwnReadout", "out.weight"), ("PlainParameter", "weight")])
@pytest.mark.parametrize("init", ["own", "he"])
def test_readout_scale_acts_on_the_layer_that_makes_the_output_only(write, text_file, kind, readout, init):
    if init == "he" and kind in ("OwnReadout", "PlainParameter"):
        pytest.skip("init_ does not draw matrices of unknown layers")
    declared = {"OwnReadout": "out.weight=output", "PlainParameter": "weight=output"}.get(kind, "")
    settings = dict(settings_of(kind, text_file), init=init, roles=declared)
    spec = write(READOUTS, function=kind)
    plain, roles = initial_weights(spec, 16, **settings)
    scaled, _ = initial_weights(spec, 16, readout_scale=0.25, **settings)
    of_role = [name for name, role in roles.items() if role == "output"]
    assert len(of_role) == {"Net": 1, "MultiQuery": 3}.get(kind, 2)
    assert {name for name in plain if not torch.equal(plain[name], scaled[name])} == {readout}
    assert torch.equal(scaled[readout], 0.25 * plain[readout])


def test_readout_scale_is_refused_for_a_model_without_a_readout(write):
    run = dict(TINY, model=write(READOUTS, function="without_readout"), width=16)
    assert train.train(run)[0]["final_train_loss"] > 0
    with pytest.raises(InputError, match="readout_scale is 0.5; it must be 1 for a model without a readout"):
        train.train(dict(run, readout_scale=0.5))


# ---- stacks ----

def test_a_model_that_vmap_refuses_is_one_line_of_train_and_trains_one_by_one_in_a_sweep(write, tmp_path):
    spec = write("""
        class Net(nn.Sequential):
            def forward(self, x):
                return super().forward(x) * (1.0 if x.sum().item() > 0 else 0.5)

        def build(width):
            return Net(nn.Linear(100, width), nn.ReLU(), nn.Linear(width, 2))
    """)
    run = dict(TINY, model=spec, width=16)
    with pytest.raises(InputError) as refusal:
        train.train([dict(run, lr=0.1), dict(run, lr=0.2)])
    words = rf"runs of {re.escape(spec)} cannot train as one stack \(vmap: [^\n]*\); use --stack 1"
    assert re.fullmatch(words, str(refusal.value))
    ran = run_sweep("--model", spec, "--widths", 16, "--lrs", 0.1, 0.2, "--stack", 4, "--out", tmp_path)
    assert ran.returncode == 0 and ran.stderr.count("they train one by one") == 1
    rows = list(analyze.read_rows(tmp_path).values())
    assert len(rows) == 12 and all(row["final_train_loss"] for row in rows)
    alone_row, = train.train(configure({**run, "lr": 0.2, "seed": 2, "loss": "mse"}))
    assert results(alone_row) in list(map(results, rows))
    with_stack_1 = run_sweep("--model", spec, "--widths", 16, "--lrs", 0.1, 0.2, "--stack", 1, "--out",
                             tmp_path / "one")
    assert with_stack_1.returncode == 0 and "one by one" not in with_stack_1.stderr
    assert sorted_rows(tmp_path / "one") == sorted_rows(tmp_path)


def test_matrix_products_stack_and_convolutions_train_alone_on_a_cpu(write):
    matrices = configure({**TINY, "model": write(NET)})
    conv = configure({**TINY, "model": write("""
        def build(width):
            return nn.Sequential(nn.Unflatten(1, (1, 10, 10)), nn.Conv2d(1, width, 3), nn.ReLU(),
                                 nn.Conv2d(width, width, 3), nn.Flatten(), nn.Linear(36 * width, 2))
    """, "conv")})
    shape = train.shape_of(conv)
    assert train.trains_alone(conv, train.build(conv, shape)[0])
    assert not train.trains_alone(matrices, train.build(matrices, shape)[0])
    assert sweep.largest_stack(matrices, shape, "cpu")[0] > 1
    assert sweep.largest_stack(conv, shape, "cpu") == (1, 1)
    runs = [dict(conv, lr=lr) for lr in (0.005, 0.01)]
    for by_itself, stacked in zip([train.train([run])[0] for run in runs], train.train(runs)):
        assert stacked["final_train_loss"] == pytest.approx(by_itself["final_train_loss"], rel=1e-4)
    runs = [dict(matrices, lr=lr) for lr in (0.05, 0.1)]
    for by_itself, stacked in zip([train.train([run])[0] for run in runs], train.train(runs)):
        assert stacked["final_train_loss"] == by_itself["final_train_loss"]     # to the last bit


@pytest.mark.parametrize("after", [1, 3])
def test_a_sweep_that_was_interrupted_ends_with_the_same_rows(write, tmp_path, monkeypatch, after):
    flags = ["--model", write(NET), "--widths", 8, 16, "--seeds", 2, "--loss", "ce"]
    assert run_sweep(*flags, "--out", tmp_path / "a").returncode == 0
    done, original = [], train.train

    def interrupted(*args, **kwargs):
        done.append(1)
        if len(done) > after:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(train, "train", interrupted)
    ran = run_sweep(*flags, "--out", tmp_path / "b")
    assert ran.returncode == 130 and "finished runs are kept" in ran.stderr
    assert 0 < len(sorted_rows(tmp_path / "b")) < len(sorted_rows(tmp_path / "a"))
    monkeypatch.setattr(train, "train", original)
    assert run_sweep(*flags, "--out", tmp_path / "b").returncode == 0
    assert sorted_rows(tmp_path / "b") == sorted_rows(tmp_path / "a")


def test_the_stack_trains_whatever_model_vmap_can(write):
    """models.custom_model and stack.py without a command line."""
    spec, shape = write(NET), models.Shape(100, 2, False)
    torch.manual_seed(0)
    nets = [models.custom_model(spec, 8, shape) for _ in range(2)]
    replicas = stack.make(nets[0], [list(net.parameters()) for net in nets], [0.01, 0.02])
    x, y = torch.randn(2, 4, 100), torch.tensor([[0, 1, 0, 1]] * 2)
    model = stack.module_network(nets[0], stack.ce)
    expected = torch.stack([net(batch) for net, batch in zip(nets, x)])
    assert torch.allclose(model.forward(replicas["weights"], x), expected, atol=1e-6)
    # steps this small descend: over 200 seeds each takes at least 0.3 % off the loss
    before, = stack.advance(replicas, x, y, model, stack.Rule("sgd"))
    after, = stack.advance(replicas, x, y, model, stack.Rule("sgd"), 1)
    assert (after < before).all()


# ---- tracking ----

@pytest.mark.parametrize("kind, modules", [
    ("Net", {"up", "hidden", "out"}), ("FixedLinear", {"up", "hidden", "out"}),
    ("RandomFeatures", {"up", "hidden", "out"}), ("SharedLayer", {"up", "hidden", "out"}),
    ("MultiQuery", {"embedding", "q", "k", "v", "proj", "out"})])
def test_every_layer_whose_weight_trains_is_tracked(write, text_file, kind, modules):
    tracked = []
    run = dict(settings_of(kind, text_file), model=write(KINDS, function=kind), width=16, steps=2)
    row, = train.train(run, track=1, tracked=tracked)
    assert {line["module"] for line in tracked} == {*modules, ""}
    assert {(line["id"], line["step"]) for line in tracked} == {(row["id"], 1), (row["id"], 2)}
    assert all(line["effective"] > 0 for line in tracked if line["module"])
    plain, = train.train(run)
    assert results(row) == results(plain)


LATE = KINDS + """

class CallsALayerLater(Net):
    def __init__(self, width):
        super().__init__(width)
        self.gate, self.expert = nn.Linear(width, 1, bias=False), nn.Linear(width, width)
        nn.init.zeros_(self.gate.weight)

    def features(self, x):
        h = super().features(x)
        gate = self.gate(h)
        rows = gate[:, 0].nonzero()[:, 0]           # none before the first update
        if len(rows):
            h = h.index_put((rows,), self.expert(h[rows]))
        return h * (1 + gate)
"""


def test_an_expert_that_no_sample_reached_at_first_does_not_end_a_tracked_run(write):
    tracked, run = [], dict(TINY, model=write(LATE, function="CallsALayerLater"), width=16, steps=2)
    row, = train.train(run)
    assert row["final_train_loss"] > 0
    measured, = train.train(run, track=1, tracked=tracked)
    assert results(measured) == results(row)
    assert {"up", "hidden", "gate", "out", ""} <= {line["module"] for line in tracked}


# ---- files and what they import ----

PACKAGED = """
    import helper_of_net
    from parts_of_net.layers import hidden

    def build(width):
        assert helper_of_net.x
        return nn.Sequential(nn.Linear(100, width), nn.ReLU(), hidden(width), nn.ReLU(), nn.Linear(width, 2))
"""
LAYERS = "def hidden(width):\n    return nn.Linear(width, width)\n"


@pytest.fixture
def packaged(write):
    """Return the model of a file that imports a module and a folder without __init__.py beside it."""
    write("x = 1", "helper_of_net")
    write(LAYERS, "parts_of_net/layers")
    return write(PACKAGED)


def test_a_folder_beside_the_file_needs_no_init_py(packaged, tmp_path):
    ran = run_sweep("--model", packaged, "--widths", 8, 16, "--lrs", 0.1, "--seeds", 1, "--loss", "ce",
                    "--out", tmp_path / "out")
    assert ran.returncode == 0 and len(analyze.read_rows(tmp_path / "out")) == 2, ran.stderr


@pytest.mark.parametrize("name", ["net", "helper_of_net", "parts_of_net/layers"])
def test_changed_code_never_mixes_with_old_rows(write, packaged, tmp_path, name):
    flags = ["--model", packaged, "--widths", 8, "--lrs", 0.1, "--seeds", 1, "--out", tmp_path / "out"]
    assert run_sweep(*flags).returncode == 0
    digest, before = models.load_custom(packaged).digest, (tmp_path / f"{name}.py").read_text()
    write("x = 2", "unrelated")
    assert models.load_custom(packaged).digest == digest and run_sweep(*flags).returncode == 0
    write(before + "\n# changed\n", name)
    ran = run_sweep(*flags)
    last = ran.stderr.splitlines()[-1]
    assert ran.returncode == 2 and not ran.stdout and last.startswith("sweep.py: ")
    assert "another version of" in last and "use another --out" in last
    (tmp_path / f"{name}.py").write_text(before)
    forget_modules_of(tmp_path)
    assert run_sweep(*flags).returncode == 0


def test_the_digest_of_a_file_does_not_depend_on_what_was_imported_before(packaged, tmp_path):
    first = models.load_custom(packaged)
    assert models.load_custom(packaged.replace(":build", ":hidden")).digest == first.digest


def test_two_files_of_one_name_are_two_models(write):
    one, two = write(LAYERS + KINDS, "a/net", "Net"), write(NET, "b/net")
    rows = [train.train(dict(TINY, model=spec, width=8))[0] for spec in (one, two, one)]
    assert rows[0]["code"] == rows[2]["code"] != rows[1]["code"]
    assert results(rows[0]) == results(rows[2]) != results(rows[1])


# ---- what is refused ----

BAD = KINDS + '''

def no_module(width):
    return 3

def three(width):
    return Net(width, 3)

def fixed(width):
    return nn.Linear(100, 2)

def batch_norm_with_statistics(width):
    return nn.Sequential(nn.Linear(100, width), nn.BatchNorm1d(width), nn.Linear(width, 2))

def instance_norm_with_statistics(width):
    return nn.Sequential(nn.Linear(100, width), nn.Unflatten(1, (1, -1)),
                         nn.InstanceNorm1d(1, track_running_stats=True), nn.Flatten(), nn.Linear(width, 2))

def dropout(width):
    return nn.Sequential(nn.Linear(100, width), nn.Dropout(0.1), nn.Linear(width, 2))

def alpha_dropout(width):
    return nn.Sequential(nn.Linear(100, width), nn.AlphaDropout(0.1), nn.Linear(width, 2))

def lstm_with_dropout(width):
    net = Recurrent(width)
    net.lstm = nn.LSTM(10, width, 2, batch_first=True, dropout=0.1)
    return net

def gru_with_dropout(width):
    net = Recurrent(width)
    net.lstm = nn.GRU(10, width, 2, batch_first=True, dropout=0.1)
    return net

def attention_with_dropout(width):
    net = Attends(width)
    net.attention = nn.MultiheadAttention(width, 2, dropout=0.1, batch_first=True)
    return net

def encoder_with_dropout(width):
    return nn.Sequential(nn.Linear(100, width), nn.TransformerEncoderLayer(width, 2, width),
                         nn.Linear(width, 2))

def lazy(width):
    return nn.Sequential(nn.LazyLinear(width), nn.ReLU(), nn.Linear(width, 2))

def lazy_convolution(width):
    return nn.Sequential(nn.Unflatten(1, (10, 10)), nn.LazyConv1d(width, 3), nn.Flatten(),
                         nn.Linear(8 * width, 2))

def sparse(width):
    net = MasksPadding(width)
    net.embedding = nn.Embedding(128, width, sparse=True)
    return net

def sparse_bag(width):
    net = MasksPadding(width)
    net.embedding = nn.EmbeddingBag(128, width, sparse=True, mode="sum")
    return net

def complex_weights(width):
    net = Net(width)
    net.phases = nn.Parameter(torch.randn(width, dtype=torch.complex64))
    return net

def weight_norm(width):
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(100, width)), nn.Linear(width, 2))

def huge(width):
    net = Net(width)
    for weights in net.parameters():
        weights.data.mul_(1e30)
    return net

def frozen(width):
    return Net(width).requires_grad_(False)

def not_a_tensor(width):
    return nn.LSTM(100, width, 1)

class NoOutput(Net):
    def forward(self, x):
        super().forward(x)

class OneOutputTooMany(Net):
    def forward(self, x):
        return super().forward(x)[..., None]

class DrawsFromTorch(Net):
    def features(self, x):
        return F.dropout(super().features(x), 0.1)

class DrawsInAttention(Net):
    def features(self, x):
        h = super().features(x)[:, None]
        return F.scaled_dot_product_attention(h, h, h, dropout_p=0.5)[:, 0]

class DrawsFromNumpy(Net):
    def features(self, x):
        return super().features(x) * np.random.rand()

class DrawsFromPython(Net):
    def features(self, x):
        return super().features(x) * random.random()

class DrawsAndDiscards(Net):
    def features(self, x):
        torch.rand(3)
        return super().features(x)

class HasAGenerator(Net):
    def __init__(self, width):
        super().__init__(width)
        self.generator = torch.Generator().manual_seed(0)

    def features(self, x):
        return super().features(x + torch.randn(x.shape, generator=self.generator))

class CountsCalls(Net):
    def __init__(self, width):
        super().__init__(width)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def features(self, x):
        self.calls += 1
        return super().features(x)

class ReplacesABuffer(Net):
    def __init__(self, width):
        super().__init__(width)
        self.register_buffer("mean", torch.zeros(width))

    def features(self, x):
        h = super().features(x)
        self.mean = 0.9 * self.mean + 0.1 * h.detach().mean(0)
        return h

class ChangesAnAttribute(Net):
    calls = 0

    def features(self, x):
        self.calls += 1
        return super().features(x) / self.calls
'''
STATISTICS = ("whose running statistics all replicas of a stack would share; "
              "use LayerNorm, GroupNorm or track_running_stats=False")
DROPOUT = "with dropout, which draws other numbers in a stack than alone; build it without"
SPARSE = "with sparse gradients, which vmap does not know; use sparse=False"
LAZY = "has no shape yet; build the model without lazy modules"
AT_BUILD = {
    "nothing": "has no function 'nothing'; it has of_any_options, with_an_optional_shape, batch_norm",
    "no_module": "built a int at width 8, and no nn.Module",
    "fixed": "one whose parameters become larger with its width",
    "batch_norm_with_statistics": f"1 is a BatchNorm1d {STATISTICS}",
    "instance_norm_with_statistics": f"2 is a InstanceNorm1d {STATISTICS}",
    "dropout": f"1 is a Dropout {DROPOUT}",
    "alpha_dropout": f"1 is a AlphaDropout {DROPOUT}",
    "lstm_with_dropout": f"lstm is a LSTM {DROPOUT}",
    "gru_with_dropout": f"lstm is a GRU {DROPOUT}",
    "attention_with_dropout": f"attention is a MultiheadAttention {DROPOUT}",
    "encoder_with_dropout": f"1.self_attn is a MultiheadAttention {DROPOUT}",
    "lazy": f"0.weight {LAZY}",
    "lazy_convolution": f"1.weight {LAZY}",
    "sparse": f"embedding is a Embedding {SPARSE}",
    "sparse_bag": f"embedding is a EmbeddingBag {SPARSE}",
    "complex_weights": "phases holds torch.complex64; weights must be real numbers",
    "weight_norm": "WeightNorm replaces the scale that init_ draws",
    "frozen": "up.weight has requires_grad=False; register it as a buffer",
}
NOT_REPEATABLE = "so that two passes over a batch differ; a run must follow from its seed"
IN_FORWARD = {
    "three": "made (16, 3) of a batch (16, 100); it must make (16, 2)",
    "OneOutputTooMany": "made (16, 2, 1) of a batch (16, 100); it must make (16, 2)",
    "not_a_tensor": "made tuple of a batch (16, 100); it must make (16, 2)",
    "NoOutput": "made NoneType of a batch (16, 100); it must make (16, 2)",
    "huge": "makes outputs that are not finite at width 8, before any training",
    **dict.fromkeys(("DrawsFromTorch", "DrawsInAttention", "DrawsFromNumpy", "DrawsFromPython",
                     "DrawsAndDiscards", "HasAGenerator", "CountsCalls", "ReplacesABuffer",
                     "ChangesAnAttribute"),
                    f"draws random numbers or changes a buffer in forward, {NOT_REPEATABLE}"),
}


@pytest.mark.parametrize("kind", [*AT_BUILD, *IN_FORWARD])
@pytest.mark.parametrize("script", ["sweep.py", "train.py"])
def test_models_that_cannot_be_trained_end_with_one_line(write, tmp_path, kind, script):
    run, widths = (run_sweep, ["--widths", 8, 32]) if script == "sweep.py" else (run_train, ["--width", 8])
    out = tmp_path / "out"
    ran = run("--model", write(BAD, function=kind), *widths, "--out", out)
    *before, last = ran.stderr.splitlines()
    assert ran.returncode == 2 and not ran.stdout and ran.stderr.endswith("\n")
    assert last.startswith(f"{script}: ") and {**AT_BUILD, **IN_FORWARD}[kind] in last, ran.stderr
    assert all(line.startswith(("data: ", "headline: ")) for line in before)
    # a sweep makes its folder once the models can be built
    assert not analyze.read_rows(out) and (not out.exists() or script == "train.py" or kind in IN_FORWARD)


OWN_ERROR = {
    "import": "raise {error}('no such luck')",
    "build": """
def build(width):
    if width > 8:
        raise {error}('no such luck')
    return Net(width)
""",
    "forward": """
class build(Net):
    def forward(self, x):
        raise {error}('no such luck')
"""}


@pytest.mark.parametrize("place, error", [
    ("import", "RuntimeError"), ("import", "KeyError"), ("build", "RuntimeError"), ("build", "ValueError"),
    ("forward", "RuntimeError"), ("forward", "ValueError")])
def test_errors_of_the_users_own_file_keep_their_traceback(write, tmp_path, error, place):
    spec = write(KINDS + "\n\n" + OWN_ERROR[place].format(error=error))
    for run, widths in ((run_sweep, ["--widths", 8, 32]), (run_train, ["--width", 32])):
        with pytest.raises(Exception, match="no such luck") as raised:
            run("--model", spec, *widths, "--out", tmp_path / "out")
        shown = "".join(traceback.format_exception(raised.value))
        assert f'{spec.removesuffix(":build")}", line ' in shown and f"raise {error}(" in shown


def test_a_file_that_does_not_parse_is_pythons_own_error(write):
    spec = write("def build(width):\n    return 1 +\n")
    with pytest.raises(SyntaxError) as raised:
        configure({"model": spec})
    assert raised.value.filename == spec.removesuffix(":build")
    assert raised.value.lineno == 2 + HEADER.count("\n")


def test_a_layer_that_does_not_fit_is_torchs_own_error_at_the_users_line(write):
    spec = write(KINDS + "\n\nclass Wrong(Net):\n    def forward(self, x):\n        return self.out(x)",
                 function="Wrong")
    with pytest.raises(RuntimeError, match=r"shapes cannot be multiplied \(16x100 and 8x2\)") as raised:
        run_train("--model", spec, "--width", 8)
    assert "return self.out(x)" in [frame.line for frame in traceback.extract_tb(raised.tb)]


@pytest.mark.parametrize("flags, words", [
    (["--model", "nowhere.py:build"], "nowhere.py is no file; give FILE.py:FUNCTION"),
    (["--model", "net.py"], "model is 'net.py'; it must be mlp, gpt or FILE.py:FUNCTION"),
    (["--roles", "cls=inpt"], "roles is 'cls=inpt'; it must be NAME=ROLE with one of input, hidden, output"),
    (["--roles", "cls=input", "clz=input"], "no parameter of the model is called clz"),
    (["--roles", "cls"], "roles is '=cls'; it must be NAME=ROLE"),
    ([], "cannot tell fan-in from fan-out of cls (1, 2, 512) in a Net"),
    ([], "--roles NAME=ROLE"),
])
def test_files_and_roles_that_do_not_fit_end_with_one_line(write, flags, words):
    spec = write(TOKEN)
    ran = call(lambda: command_line(sweep.main), "sweep.py", "--model", spec, *flags)
    *before, last = ran.stderr.splitlines()
    assert ran.returncode == 2 and last.startswith("sweep.py: ") and words in last, ran.stderr
    assert all(line.startswith("data: ") for line in before)


@pytest.mark.parametrize("roles, kind", [("['input']", "list"), ("lambda name: 'input'", "function")])
def test_roles_of_another_kind_are_refused(write, roles, kind):
    spec = write(f"{textwrap.dedent(TOKEN)}roles = {roles}")
    with pytest.raises(InputError, match=f"roles in .*net.py is a {kind}; it must be a dict"):
        configure({"model": spec})


# ---- models of other packages ----

LLAMA = """
    from transformers import LlamaConfig, LlamaForCausalLM

    def build(width, shape):
        return LlamaForCausalLM(LlamaConfig(
            vocab_size=shape.classes, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=1,
            num_attention_heads=width // 8, num_key_value_heads=width // 16, use_cache=False,
            max_position_embeddings=shape.inputs, tie_word_embeddings=False))
"""


def test_a_llama_trains_and_is_tracked_without_editing_its_class(write, tmp_path):
    pytest.importorskip("transformers")
    spec, out = write(LLAMA), tmp_path / "out"
    flags = ["--model", spec, "--data", "stdlib", "--context", 8, "--base-width", 16, "--val-size", 8,
             "--widths", 16, 32, 64, "--param", "sp", "mup", "--seeds", 2, "--lrs", 0.001, "--steps", 2,
             "--warmup", 0, "--track", 1]
    ran = call(lambda: command_line(sweep.main), "sweep.py", *flags, "--out", out)
    assert ran.returncode == 0, ran.stderr
    summary = json.loads((out / "summary.json").read_text())
    measured = {(entry["param"], entry["module"].rpartition(".")[2]): (entry["exponent"], entry["predicted"])
                for entry in summary["updates"] if entry["kind"] == "effective" and entry["step"] == 1}
    kinds = {"embed_tokens", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
             "input_layernorm", "post_attention_layernorm", "norm", "lm_head"}
    assert {kind for _, kind in measured} == kinds
    for kind in ("gate_proj", "up_proj", "v_proj"):
        sp, mup = measured["sp", kind], measured["mup", kind]
        assert (sp[1], mup[1]) == (1.0, 0.0)
        # over forty seeds mup's lies at -0.25 ± 0.06 (one seed), sp's above it by one in every seed
        assert abs(mup[0]) < 0.5 and sp[0] - mup[0] == pytest.approx(1, abs=0.05)
    assert "tensor_kinds" in [path.stem for path in (out / "figures").glob("*.png")]


def test_tied_embeddings_of_a_package_are_refused_with_the_remedy(write):
    pytest.importorskip("transformers")
    spec = write(LLAMA.replace("tie_word_embeddings=False", "tie_word_embeddings=True"))
    config = configure(dict(model=spec, data="stdlib", base_width=16, width=32, context=8))
    with pytest.raises(InputError, match="one tied tensor.*untie them"):
        train.build(config, models.Shape(8, 256, True))
