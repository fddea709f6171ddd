"""CUDA without a GPU, and the tests that need one.

Fake tensors have a device and shapes, but no values. An operation on tensors of two devices raises by
itself, and so does one that waits for a value (.item(), .tolist(), a boolean index). So they show that a step
stays on the device. They need a CUDA build of torch, but no GPU:

    pip install torch==2.14.1                       # in a virtual environment of its own, with numpy, pytest
    python -m pytest tests/test_cuda.py -rs         # with a GPU only the other dtype of a case is skipped

autograd's backward pass needs a real device; here it gives gradients of the right shapes instead.
"""
import contextlib
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException, FakeTensorDeviceMismatchError, FakeTensorMode)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import analyze
import data
import metrics
import models
import stack
import sweep
import train
from config import configure

HERE = Path(sweep.__file__).parent
built = pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="needs a CUDA build of torch")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

MLP = dict(width=16, base_width=8, hidden_layers=2, steps=3, batch_size=4, train_size=64, val_size=16, lr=0.1)
GPT = dict(model="gpt", layers=1, width=16, base_width=8, head_dim=8, context=8, steps=3, batch_size=4,
           warmup=0, val_size=4, lr=0.01)
ADAM = dict(optimizer="adam", weight_decay=0.1, clip=1.0)
CASES = [
    *(dict(MLP, loss=loss, optimizer=optimizer) for loss in stack.LOSSES for optimizer in ("sgd", "adam")),
    *(dict(MLP, **settings) for settings in (
        dict(momentum=0.9), dict(weight_decay=0.1), dict(clip=1.0), ADAM, dict(accumulate=2), dict(bias=True),
        dict(bias=True, **ADAM), dict(dtype="bfloat16"), dict(dtype="bfloat16", **ADAM), dict(dtype="tf32"),
        dict(dtype="float64"), dict(lr_factor="input=0 hidden=0"), dict(lr_factor="layers.1.*=2"))),
    *(dict(GPT, **settings) for settings in (
        dict(), dict(momentum=0.9), ADAM, dict(dtype="bfloat16"), dict(dtype="bfloat16", **ADAM),
        dict(accumulate=2), dict(norm_affine=False), dict(qk_norm=False))),
]


def name_of(settings):
    first = MLP if settings.get("model") != "gpt" else GPT
    return "-".join(f"{key}={value}" for key, value in settings.items() if first.get(key) != value)


class OnOneDevice(TorchDispatchMode):
    """Counts operations, and raises where one on CUDA is given a tensor of the CPU, a number in it too."""
    count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kinds = {leaf.device.type for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        copies = op in (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)
        assert len(kinds) < 2 or copies, f"{op} on {kinds}"
        self.count += "cuda" in kinds
        return op(*args, **(kwargs or {}))


@pytest.fixture
def fake(monkeypatch):
    """Make all tensors fake, and gradients without a backward pass."""
    monkeypatch.setattr(torch.autograd, "grad", lambda outputs, inputs, *_, **__: [
        torch.empty_like(tensor) for tensor in inputs])
    # a fake parameter cannot be converted in place, since the mode holds weak references to it
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, dtype: models.set_parameters(
        module, [weights.detach().to(dtype) for weights in module.parameters()]))
    # a table of fake tensors would last into the tests on a GPU
    monkeypatch.setattr(models, "_ROTARY_TABLES", {})
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def config_and_shape(settings):
    """Return (config, what its data ask of a model); text has the 256 values of a byte."""
    config = dict(configure(settings), vocab_size=256)
    is_text = config["model"] == "gpt"
    return config, models.Shape(config["context"], 256, True) if is_text else train.shape_of(config)


def fake_stack(settings, count):
    """Return (replicas, stacked model, rule, x, y) on CUDA, none of which has values."""
    config, shape = config_and_shape(settings)
    with torch.utils._python_dispatch._disable_current_modes():         # shapes are real
        template, _, _ = train.build(config, shape)
    rule, dtype = train.rule_of(config), train.weight_dtype(config)
    weights = [[torch.empty(w.shape, dtype=dtype) for w in template.parameters()]] * count
    replicas = stack.make(template, weights, [0.1] * count, 0.1, moments=rule.moments, device="cuda",
                          dtype=dtype)
    size = (count, config["batch_size"], shape.inputs)
    x = torch.zeros(size, dtype=torch.long if shape.text else dtype, device="cuda")
    y = torch.zeros(size if shape.text else size[:2], dtype=torch.long, device="cuda")
    return replicas, train.stacked_model(config, template, replicas, x, y), rule, x, y


# ---- a step ----

@built
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("settings", CASES, ids=name_of)
def test_a_step_stays_on_the_device_and_waits_for_nothing(fake, settings, count):
    replicas, model, rule, x, y = fake_stack(settings, count)
    config = configure(settings)
    with OnOneDevice() as mode, torch.no_grad(), train.precision(config, "cuda"):
        for step in range(2):
            means = stack.advance(replicas, x, y, model, rule, step, 0.5, config["accumulate"], step > 0)
    assert mode.count > 20
    assert [mean.shape for mean in means] == [(count,)] * 2
    tensors = [tensor for tensors in replicas.values() for tensor in tensors if tensor is not None]
    assert {tensor.device.type for tensor in [*means, *tensors]} == {"cuda"}
    assert {w.dtype for w in replicas["weights"]} == {train.weight_dtype(config)}


@built
def test_fakes_would_show_a_step_that_leaves_the_device_or_waits_for_it(fake):
    replicas, model, rule, x, y = fake_stack(MLP, 2)
    with pytest.raises(FakeTensorDeviceMismatchError), torch.no_grad():
        stack.advance(replicas, torch.empty(x.shape), y, model, rule)
    with pytest.raises(DataDependentOutputException):
        replicas["weights"][0].sum().item()
    with pytest.raises(AssertionError, match="cpu"), OnOneDevice():
        replicas["weights"][0].mul_(torch.empty(()))        # torch itself allows a number of the CPU


@built
@pytest.mark.parametrize("settings", [MLP, dict(GPT)], ids=["mlp", "gpt"])
def test_tracking_measures_on_the_device(fake, settings, monkeypatch):
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: contextlib.nullcontext())     # a driver's
    config, shape = config_and_shape(settings)
    with torch.utils._python_dispatch._disable_current_modes():
        template, roles, _ = train.build(config, shape)
    model, reference = (train.build_network(config, config["width"], shape) for _ in range(2))
    for network in (model, reference):
        models.set_parameters(network, [torch.empty(w.shape, device="cuda") for w in template.parameters()])
    x = torch.zeros(4, shape.inputs, dtype=torch.long if shape.text else torch.float32, device="cuda")
    layers = metrics.updates(model, reference, x)
    assert {f"{name}.weight" for name in layers} == set(roles)
    tensors = [tensor for layer in layers.values() for tensor in layer if tensor is not None]
    assert {tensor.device.type for tensor in tensors} == {"cuda"}


# ---- a whole run ----

@built
@pytest.mark.parametrize("settings", CASES, ids=name_of)
def test_a_run_waits_for_the_device_first_when_it_looks_for_divergence(fake, settings, monkeypatch):
    (config, shape), windows = config_and_shape(settings), []
    x, y = (torch.zeros(16, *size, dtype=dtype, device="cuda") for size, dtype in (
        ((shape.inputs,), torch.long if shape.text else train.weight_dtype(config)),
        ((shape.inputs,) if shape.text else (), torch.long)))
    if shape.text:          # its tokens lie in files
        monkeypatch.setattr(data.Splits, "batch", lambda self, index: windows.append(index) or (
            torch.zeros(*index.shape, shape.inputs, dtype=torch.long, device="cuda"),) * 2)
        tokens = type("Tokens", (), {"__len__": lambda self: 999})()
        splits = data.Splits(tokens, None, x, y, 256)
    else:
        splits = data.Splits(x, y, x, y, shape.outputs)
    with pytest.raises(DataDependentOutputException) as waited:
        train.train([dict(settings, seed=seed) for seed in range(2)], splits, "cuda")
    ours = [entry for entry in waited.traceback if Path(entry.path).parent == HERE]
    assert ours[-1].name == "drop_diverged" and ours[-1].frame.f_locals["done"] == settings["steps"]
    assert {index.device.type for index in windows} <= {"cpu"}


# ---- precision: any build of torch ----

def test_tf32_is_set_while_a_run_trains_and_reset_afterwards(monkeypatch):
    assert torch.get_float32_matmul_precision() == "highest"
    precisions, original = [], stack.advance

    def advance(*args, **kwargs):
        precisions.append(torch.get_float32_matmul_precision())
        return original(*args, **kwargs)

    monkeypatch.setattr(stack, "advance", advance)
    row, = train.train([dict(MLP, dtype="tf32")])
    assert row["dtype"] == "tf32" and set(precisions) == {"high"}
    assert torch.get_float32_matmul_precision() == "highest"
    torch.set_float32_matmul_precision("medium")            # a user's own setting
    try:
        precisions.clear()
        train.train([MLP])
        assert set(precisions) == {"medium"} == {torch.get_float32_matmul_precision()}
    finally:
        torch.set_float32_matmul_precision("highest")


# ---- a GPU: these have not been run yet ----

def rows_on(device, runs, **kwargs):
    return train.train(runs, device=device, **kwargs)


def assert_close(ours, theirs, rel, also=()):
    for a, b in zip(ours, theirs):
        assert a["diverged_at"] == b["diverged_at"]
        for key in ("final_train_loss", "val_loss", "logit_rms", *also):
            assert a[key] == pytest.approx(b[key], rel=rel)


@gpu
@pytest.mark.parametrize("dtype, rel", [("float32", 1e-3), ("float64", 1e-9)])
@pytest.mark.parametrize("settings", CASES, ids=name_of)
def test_rows_on_cuda_are_those_of_the_cpu(settings, dtype, rel):
    if settings.get("dtype", dtype) != dtype:
        pytest.skip("the dtype is part of the case")
    runs = [dict(settings, dtype=dtype, lr=lr, steps=20) for lr in (0.01, 0.05)]
    assert_close(rows_on("cuda", runs), rows_on("cpu", runs), rel)


@gpu
def test_runs_that_diverge_on_cuda_leave_at_the_step_they_leave_on_the_cpu():
    runs = [dict(MLP, width=64, loss="mse", steps=60, lr=lr) for lr in (0.01, 5.0, 50.0)]
    ours, theirs = rows_on("cuda", runs), rows_on("cpu", runs)
    assert [row["diverged_at"] for row in ours] == [row["diverged_at"] for row in theirs]
    assert ours[0]["diverged_at"] is None and ours[2]["diverged_at"] is not None


@gpu
@pytest.mark.parametrize("settings", [MLP, dict(MLP, bias=True, **ADAM), GPT, dict(GPT, **ADAM)], ids=name_of)
def test_a_stack_on_cuda_has_the_rows_of_its_runs_alone(settings):
    runs = [dict(settings, dtype="float64", lr=lr, seed=seed) for lr in (0.01, 0.03) for seed in (0, 1)]
    assert_close(rows_on("cuda", runs), [rows_on("cuda", [run])[0] for run in runs], 1e-9)


@gpu
def test_a_stack_of_gpts_in_bfloat16_is_within_three_per_cent_of_float32():
    runs = [dict(GPT, width=64, base_width=64, head_dim=32, steps=60, lr=lr, **ADAM) for lr in (0.003, 0.01)]
    half = rows_on("cuda", [dict(run, dtype="bfloat16") for run in runs])
    assert_close([dict(row, logit_rms=0) for row in half],
                 [dict(row, logit_rms=0) for row in rows_on("cuda", runs)], 0.03)


@gpu
def test_tf32_is_close_to_float32_and_not_the_same():
    run = dict(MLP, width=512, base_width=512, steps=50)
    (tf32,), (full,) = rows_on("cuda", [dict(run, dtype="tf32")]), rows_on("cuda", [run])
    assert tf32["final_train_loss"] == pytest.approx(full["final_train_loss"], rel=0.02)
    assert tf32["final_train_loss"] != full["final_train_loss"]


@gpu
def test_a_stack_that_does_not_fit_is_halved(monkeypatch):
    runs = [configure(dict(MLP, width=2048, base_width=256, lr=0.001 * 1.01 ** i)) for i in range(16)]
    splits, tracked, lengths, whole = data.load(runs[0], None, "cuda"), [], [], train.train

    def train_and_count(batch, *args, **kwargs):
        rows = whole(batch, *args, **kwargs)
        lengths.append(len(batch))
        return rows

    monkeypatch.setattr(train, "train", train_and_count)
    replica = 4 * (100 * 2048 + 2048 ** 2 + 2 * 2048)       # bytes of weights
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(12 * replica / torch.cuda.mem_get_info()[1])
    try:
        rows = sweep.train_or_halve(runs, splits, "cuda", tracked)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert len(rows) == 16 and all(row["failed"] is None and row["final_train_loss"] for row in rows)
    assert sum(lengths) == 16 and max(lengths) < 16


@gpu
def test_metrics_on_cuda_are_those_of_the_cpu():
    torch.manual_seed(0)
    model, reference = models.MLP(20, 32, 2, 4), models.MLP(20, 32, 2, 4)
    x, y = torch.randn(16, 20), torch.randint(4, (16,))
    on_cpu = metrics.refined_coordinate_check(model, reference, x), metrics.alignment(model, reference, x)
    sharp = metrics.sharpness(model, torch.nn.functional.cross_entropy, x, y)
    model, reference, x, y = (part.to("cuda") for part in (model, reference, x, y))
    on_gpu = metrics.refined_coordinate_check(model, reference, x), metrics.alignment(model, reference, x)
    for theirs, ours in zip(on_cpu, on_gpu):
        for name, values in theirs.items():
            assert ours[name] == pytest.approx(values, rel=2e-3, nan_ok=True)
    gpu_sharp = metrics.sharpness(model, torch.nn.functional.cross_entropy, x, y)
    assert gpu_sharp == pytest.approx(sharp, rel=1e-2)


@gpu
def test_tracking_on_cuda_gives_the_numbers_of_the_cpu():
    tracked = {device: [] for device in ("cpu", "cuda")}
    for device, rows in tracked.items():
        rows_on(device, [dict(MLP, seed=seed) for seed in range(2)], track=1, tracked=rows, alignment=True)
    for a, b in zip(tracked["cpu"], tracked["cuda"], strict=True):
        assert (a["module"], a["step"]) == (b["module"], b["step"])
        assert a.get("effective", 0.0) == pytest.approx(b.get("effective", 0.0), rel=1e-2)


@gpu
def test_two_ranks_of_a_sweep_share_one_gpu(tmp_path):
    flags = ("--widths 16 32 --base-width 16 --steps 20 --seeds 2 --loss ce --lrs 0.05 0.1 --no-plots "
             "--device cuda:0").split()
    for out, launch in (("one", []), ("two", ["-m", "torch.distributed.run", "--nproc-per-node", "2"])):
        subprocess.run([sys.executable, *launch, "sweep.py", *flags, "--out", tmp_path / out], cwd=HERE,
                       check=True)
    rows = [sorted(analyze.read_rows(tmp_path / out).values(), key=lambda row: row["id"])
            for out in ("one", "two")]
    assert len(rows[0]) == len(rows[1]) == 8
    assert_close(*rows, 1e-3)


def plain_milliseconds(width, device, steps=200):
    """Return the time of a step of the usual loop: torch.nn, torch.optim, one run at a time."""
    model = models.MLP(100, width, 3, 2).to(device)
    optimizer = torch.optim.SGD(model.parameters(), 1e-9)
    x, y = (part.to(device) for part in (torch.randn(64, 100), torch.zeros(64, dtype=torch.long)))
    for step in range(steps + 20):
        if step == 20:
            model(x).sum().item()           # waits for the device
            start = time.perf_counter()
        loss = torch.nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    loss.item()
    return 1e3 * (time.perf_counter() - start) / steps


@gpu
def test_speed_beside_the_products_alone_and_the_plain_loop_is_printed(capsys):
    widths = 64, 256, 1024
    ran = subprocess.run([sys.executable, "tests/bench.py", *map(str, widths), "--device", "cuda"], cwd=HERE,
                         check=True, capture_output=True, text=True)
    with capsys.disabled():
        print("\n" + ran.stdout)
        for width in widths:
            plain = plain_milliseconds(width, "cuda")
            print(f"width {width}: the plain loop takes {plain:.3f} ms per run and step")
    assert ran.stdout.count("|") > 21
