"""linear_net.py: closed form against gradient descent, limits, Proposition C.3, edges, command line."""
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import config
import linear_net as net
import param
from linear_net import linear_net

WIDTHS = [4 ** k for k in range(4, 9)]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def slope_of(widths, values):
    """Log-log slope of values (W,) or, over their mean logs, (S, W)."""
    logs = np.log(np.atleast_2d(values)).mean(0)
    return np.polyfit(np.log(widths), logs, 1)[0]


# ---- the net ----

def warmup_and_cosine(step, steps=50, warmup=10):
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / (steps - warmup - 1)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


def explicit(run, alpha, base_width, weight_decay, schedule, steps, x=1.3, y=0.7):
    """(f, loss) before every step and after the last, up to divergence, of torch.optim.SGD and param."""
    parameterization, width, lr, seed = run
    model, base, other = (
        nn.Sequential(nn.Linear(1, n, bias=False), nn.Linear(n, 1, bias=False)).double()
        for n in (width, base_width, 2 * base_width))
    roles = param.infer_roles(other, base)
    param.init_(model, base, parameterization, seeded(seed), gain=1.0, overrides=roles)
    groups = param.param_groups(model, base, parameterization, "sgd", lr, alpha, weight_decay,
                                overrides=roles)
    optimizer, path = torch.optim.SGD(groups), []
    for step in range(steps + 1):
        f = model(torch.full((1, 1), x, dtype=torch.float64)).squeeze()
        loss = (f - y) ** 2 / 2
        path.append((f.item(), loss.item()))
        if not loss.isfinite():
            break
        for group in optimizer.param_groups:
            group["lr"] = schedule(step) * group["base_lr"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return torch.tensor(path, dtype=torch.float64).T


@pytest.mark.parametrize("weight_decay, schedule", [(0.0, lambda step: 1.0), (0.1, warmup_and_cosine)])
@pytest.mark.parametrize("name", param.PARAMETERIZATIONS)
def test_the_linear_net_is_gradient_descent_with_the_exponents_of_param(name, weight_decay, schedule):
    lrs, diverged = [0.01, 0.1, 4.0], 0
    for width, base_width, alpha in ((64, 1, 0.0), (200, 16, 0.5)):
        path = linear_net(width, lrs, 50, name, [[0], [3]], alpha, base_width, 1.3, 0.7, weight_decay,
                          schedule)
        assert path.f.shape == path.ntk.shape == path.loss.shape == (51, 2, 3)
        for s, i in np.ndindex(2, 3):
            run = name, width, lrs[i], (0, 3)[s]
            f, loss = explicit(run, alpha, base_width, weight_decay, schedule, 50)
            last = len(loss) if loss[-1].isfinite() else len(loss) - 1
            assert path.diverged_at[s, i].item() == (-1 if last == 51 else last)
            assert ((path.f[:last, s, i] - f[:last]).abs() <= 1e-9 * f[:last].abs().clamp_min(1)).all()
            torch.testing.assert_close(path.loss[:last, s, i], loss[:last], rtol=1e-8, atol=1e-9)
            assert path.f[last:, s, i].isnan().all()
            diverged += last < 51
    assert 2 <= diverged <= 8       # of 12: the equality covers runs that blow up


def test_label_noise_moves_the_gradient_and_not_the_loss():
    """Written out with u and v: seed 5 draws u, v, then the noise on y of every step."""
    generator, exact = seeded(5), {"dtype": torch.float64}
    u, v = (torch.randn(30, generator=generator, **exact) for _ in range(2))
    noise, v = 0.3 * torch.randn(20, generator=generator, **exact), v / math.sqrt(30)
    path = linear_net(30, 0.002, 20, "sp", 5, label_noise=0.3)
    for step in range(20):
        assert path.f[step].item() == pytest.approx((u @ v).item(), rel=1e-9)
        assert path.loss[step].item() == pytest.approx((u @ v - 1).square().item() / 2, rel=1e-9)
        gradient = u @ v - (1 + noise[step])
        u, v = u - 0.002 * gradient * v, v - 0.002 * gradient * u
    assert not torch.equal(path.f, linear_net(30, 0.002, 20, "sp", 5).f)


def test_the_ntk_is_the_gradient_kernel_with_the_learning_rates_width_factors():
    for name, k_u, k_v, std in (("sp", 1, 1, 8), ("ntp", 1, 1 / 64, 8), ("mup", 64, 1 / 64, 64)):
        generator = seeded(2)
        u, v = (torch.randn(64, generator=generator, dtype=torch.float64) for _ in range(2))
        start = linear_net(64, 0.1, 1, name, seed=2, x=1.3)
        ntk = 1.3 ** 2 * (k_u * (v @ v) / std ** 2 + k_v * (u @ u))
        assert start.f[0].item() == pytest.approx(1.3 * (u @ v / std).item(), rel=1e-12)
        assert start.ntk[0].item() == pytest.approx(ntk.item(), rel=1e-12)


@pytest.mark.parametrize("name, alpha", [("mup", 0.0), ("ntp", 0.0), ("sp", 1.0)])
def test_the_linear_net_approaches_its_infinite_width_limit_as_one_over_root_n(name, alpha):
    seeds = torch.arange(24)
    for same_start in (True, False):
        distances = []
        for width in WIDTHS:
            path = linear_net(width, 0.1, 8, name, seeds, alpha)
            f0 = path.f[0] if same_start and name != "mup" else None
            limit = linear_net(math.inf, 0.1, 8, name, seeds, alpha, f0=f0)
            distances.append((path.f - limit.f)[8].abs())
        slope = slope_of(WIDTHS, torch.stack(distances, -1))
        if same_start or name == "mup":
            assert abs(slope + 0.5) < 0.1       # neither n^-1 nor n^0
        else:
            assert abs(slope) < 0.2             # another draw of the random initial f is no limit


def test_the_limits_of_the_linear_net():
    lazy, feature = linear_net(math.inf, 0.1, 9, "ntp"), linear_net(math.inf, 0.1, 9, "mup")
    assert (lazy.ntk == 2).all() and lazy.f[0] != 0
    linear_regression = (lazy.f[0] - 1) * 0.8 ** torch.arange(10).double()
    torch.testing.assert_close(lazy.f - 1, linear_regression)
    assert feature.f[0] == 0 and feature.ntk[0] == 2 and feature.ntk[9] > 2.1
    assert (linear_net(math.inf, 0.1, 9, "sp", alpha=1.0).ntk == 1).all()
    for alpha in (0.0, 0.5):
        with pytest.raises(ValueError, match="use alpha >= 1"):
            linear_net(math.inf, 0.1, 9, "sp", alpha=alpha)
    with pytest.raises(ValueError, match="choose from sp, ntp, mup"):
        linear_net(64, 0.1, 9, "muP")


def test_an_unstable_minimum_of_the_linear_net_is_left():
    """In float64, f itself comes to rest exactly at y = 1 in a slow warmup, at many times the stable LR."""
    width, lr, steps, warmup = 4096, 20 / 4096, 3000, 1000

    def schedule(step):
        return min(1.0, (step + 1) / warmup)

    path = linear_net(width, lr, steps, "sp", schedule=schedule)
    f, ntk = path.f[0].item(), path.ntk[0].item()
    for step in range(steps):
        g = lr * schedule(step) * (f - 1)
        f, ntk = f * (1 + g * g) - g * ntk, ntk * (1 + g * g) - 4 * g * f
    assert f == 1 and lr * ntk > 10
    assert path.diverged_at > 0


def test_one_learning_rate_diverges_in_sp_and_not_in_mup_at_width_4096():
    for name, expected in (("sp", [True, True, False, False]), ("mup", [True] * 4)):
        path = linear_net(4096, [1e-4, 1e-4, 0.1, 0.1], 40, name, [0, 1, 0, 1])
        assert (path.diverged_at < 0).tolist() == expected
        assert path.loss[-1].isfinite().tolist() == expected


def logits_change(name, alpha):
    predicted = param.predict(name, "sgd", "mse", alpha, hidden_layers=1)
    return max(predicted.effective[-1], predicted.propagating[-1])


def predicted_decrease(name, alpha):
    """The squared loss doubles the exponent of a logits' change that diverges."""
    return max(logits_change(name, alpha), 2 * logits_change(name, alpha))


@pytest.mark.parametrize("name, alpha, exponent", [
    ("sp", 0.5, 1.0), ("sp", 1.0, 0.0), ("sp", 1.5, -0.5), ("ntp", 0.0, 0.0)])
def test_proposition_c3_loss_decrease_of_the_linear_net_after_one_step(name, alpha, exponent):
    losses = [linear_net(width, 0.5, 1, name, torch.arange(32), alpha).loss for width in WIDTHS]
    slope = slope_of(WIDTHS, [(loss[1] - loss[0]).abs().median().item() for loss in losses])
    assert predicted_decrease(name, alpha) == exponent
    assert abs(slope - exponent) < 0.15
    for other in (alpha - 0.25, alpha + 0.25):
        assert abs(slope - predicted_decrease(name, other)) > 0.15
    assert all((loss[1] < loss[0]).all() for loss in losses) == (exponent <= 0)


@pytest.mark.parametrize("name", param.PARAMETERIZATIONS)
def test_the_ntks_exponent_is_the_predicted_change_of_the_logits_and_sets_the_edge(name):
    for alpha in (0.0, 0.25, 1.0):
        assert net.ntk_exponent(name, alpha) == logits_change(name, alpha)
    ntk = [linear_net(width, 0.1, 0, name, torch.arange(8)).ntk[0].mean().item() for width in WIDTHS]
    assert slope_of(WIDTHS, ntk) == pytest.approx(net.ntk_exponent(name), abs=0.05)
    if name in ("sp", "ntp", "mup"):
        assert net.ntk_exponent(name) == param.max_stable_alpha(name, "sgd", "mse", hidden_layers=1)


# ---- exponents with intervals ----

def test_the_interval_is_that_of_the_seeds_slopes_and_the_grids_step_widens_it():
    """Two widths, log width apart by 1: each seed's slope is the difference of its two logs."""
    widths, logs = [1.0, math.e], np.array([[0.0, 1.0], [0.2, 1.6]])        # slopes 1 and 1.4
    for step in (0.0, 0.3):
        slope, (low, high) = net.fit(widths, logs, step)
        half = 12.7062 * math.sqrt(0.08 / 2 + 2 * step ** 2 / 12)       # Student's t of one degree of freedom
        assert slope == pytest.approx(1.2)
        assert (low, high) == (pytest.approx(slope - half, rel=1e-4), pytest.approx(slope + half, rel=1e-4))


def test_one_width_has_no_exponent_and_one_seed_no_interval():
    slope, interval = net.fit([8], np.ones((3, 1)))
    assert np.isnan(slope) and np.isnan(interval).all()
    slope, interval = net.fit([8, 16, 32], np.log([[1.0, 2.0, 4.0]]))
    assert slope == pytest.approx(1) and np.isnan(interval).all()


# ---- the stability edge ----

def test_every_seeds_bracket_holds_the_largest_stable_lr_below_the_first_unstable_one(monkeypatch):
    monkeypatch.setattr(net, "LRS", net.LRS[24:40])

    def diverges(lr, seed):
        run = linear_net(256, lr, 100, "sp", seed, base_width=64, label_noise=0.01,
                         schedule=lambda step: min(1.0, (step + 1) / 8))
        return run.diverged_at.item() >= 0

    stable, unstable = net.bracket(256, 100, 3, 0.01, warmup=8)
    for seed in range(3):
        first = next(k for k, lr in enumerate(net.LRS) if diverges(lr, seed))
        assert np.exp(stable[seed]) == pytest.approx(net.LRS[first - 1])
        assert np.exp(unstable[seed]) == pytest.approx(net.LRS[first])


def test_a_stable_lr_above_an_unstable_one_is_not_the_edge(monkeypatch):
    """LRs 1, 3 and 5 are stable for the first seed; none is for the second, and all are for the third."""
    diverged_at = torch.tensor([[-1, 7, -1, 7, -1], [7, 7, 7, 7, 7], [-1, -1, -1, -1, -1]]).T
    monkeypatch.setattr(net, "LRS", [1.0, 2.0, 3.0, 4.0, 5.0])
    factors = []

    def trained(*_, schedule, label_noise):
        factors.append([schedule(step) for step in range(4)])
        return net.Trajectory(None, None, None, diverged_at)

    monkeypatch.setattr(net, "linear_net", trained)
    net.bracket(64, 10, 3, 0.0, warmup=2)
    stable, unstable = net.bracket(64, 10, 3, 0.0, warmup=0)
    assert factors == [[0.5, 1, 1, 1], [1, 1, 1, 1]]
    np.testing.assert_allclose(np.exp(stable), [1.0, np.nan, 5.0])
    np.testing.assert_allclose(np.exp(unstable), [2.0, 1.0, np.nan])


def test_a_width_without_an_edge_is_flagged_and_left_out(monkeypatch):
    monkeypatch.setattr(net, "LRS", net.LRS[14:32])                     # 2^-15 to 2^-6.5
    entry = net.stability_edge([64, 1024, 4096, 2 ** 14], 300, 2, 0.01, 0, 0.0)
    assert entry["flags"] == ["width 64: no edge from LR 3.05e-05 to 0.011, left out of the fit"]
    assert np.isnan(entry["min_unstable_lr"]).tolist() == [True, False, False, False]
    assert entry["max_stable_lr"][0] == pytest.approx(net.LRS[-1])      # stable up to the highest
    assert abs(entry["exponent"] + 1) < 0.15


def test_a_warmup_as_long_as_the_run_is_no_flag():
    for steps, flags in ((7, 2), (8, 1)):
        assert len(net.stability_edge([256], steps, 1, 0.0, 4, 0.5)["flags"]) == flags


def test_measured_values_are_those_of_the_trajectories():
    widths, seeds = [16, 64], torch.arange(32)
    for name in ("mup", "ntp"):
        for entry in net.distances(widths, name):
            for i, width in enumerate(widths):
                path = linear_net(width, 0.1, entry["step"], name, seeds)
                start = torch.zeros(32).double() if name == "mup" else path.f[0]
                limit = linear_net(math.inf, 0.1, entry["step"], name, seeds, f0=start)
                away = (path.f - limit.f)[-1].abs()
                np.testing.assert_allclose(np.array(entry["values"])[:, i], away, rtol=1e-9)
    loss = linear_net(64, 0.5, 1, "sp", seeds, alpha=1.0).loss
    values = np.array(net.one_step(widths, "sp", 1.0)["values"])
    np.testing.assert_allclose(values[:, 1], (loss[1] - loss[0]).abs(), rtol=1e-9)


@pytest.mark.parametrize("noise, exponent, predicted", [
    (0.0, 0.5, -1.0), (0.01, 0.0, -1.0), (0.01, 0.5, -0.5), (0.01, 2.0, 0.0)])
def test_the_prediction_follows_the_warmup_with_label_noise_only(noise, exponent, predicted):
    assert net.stability_edge([64], 2, 1, noise, 1, exponent)["predicted"] == predicted


# ---- the command line ----

def run(tmp_path, *arguments):
    """Return (exit code, summary or None) of the script, in this process."""
    flags = [*map(str, arguments), "--out", str(tmp_path / "out")]
    try:
        config.command_line(lambda: net.main(flags))
        code = 0
    except SystemExit as end:
        code = end.code
    file = tmp_path / "out" / "summary.json"
    return code, json.loads(file.read_text(), parse_constant=pytest.fail) if file.exists() else None


def test_the_script_finds_slope_minus_one_unless_the_warmup_grows_with_width(tmp_path):
    command = [net.__file__, *"--widths 1024 64 16384 --steps 600 --seeds 2 --out out".split()]
    done = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert done.stdout.endswith("\npython plots.py out\n")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["summary.json"]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text(), parse_constant=pytest.fail)
    assert summary["command"] == " ".join(["python", *command]) and summary["seconds"] > 0
    entries = summary["linear_net"]
    edges = {(edge["warmup"], edge["warmup_exponent"]): edge for edge in entries["edges"]}
    assert list(edges) == [(0, 0.0), (32, 0.0), (32, 0.5)]
    assert [edge["predicted"] for edge in edges.values()] == [-1.0, -1.0, -0.5]
    for edge in edges.values():
        low, high = edge["interval"]
        assert abs(edge["exponent"] - edge["predicted"]) < 0.15 and low < edge["exponent"] < high
        assert f"{edge['predicted']:+.2f}   {edge['exponent']:+.2f} [{low:+.2f}, {high:+.2f}]" in done.stdout
        assert (edge["param"], edge["base_width"], edge["flags"]) == ("sp", 64, [])
        assert edge["widths"] == [64, 1024, 16384]
        for stable, unstable in zip(edge["max_stable_lr"], edge["min_unstable_lr"]):
            assert unstable / stable == pytest.approx(math.sqrt(2))
    assert [(entry["param"], entry["step"]) for entry in entries["distance"]] == [
        (name, step) for name in ("mup", "ntp") for step in (1, 4, 16)]
    assert [(entry["param"], entry["alpha"], entry["predicted"]) for entry in entries["one_step"]] == [
        ("sp", 0.5, 1.0), ("sp", 1.0, 0.0), ("sp", 1.5, -0.5), ("ntp", 0.0, 0.0)]
    for entry in entries["distance"] + entries["one_step"]:
        low, high = entry["interval"]
        assert np.shape(entry["values"]) == (32, 3) and low < entry["exponent"] < high
        assert abs(entry["exponent"] - entry["predicted"]) < 0.25       # three widths


def test_one_width_and_one_seed_are_flagged_and_null(tmp_path, capsys):
    code, summary = run(tmp_path, "--widths", 256, "--steps", 20)
    edge, entry = summary["linear_net"]["edges"][1], summary["linear_net"]["distance"][0]
    assert code == 0 and edge["exponent"] is entry["exponent"] is None
    assert edge["interval"] == entry["interval"] == [None, None]
    flags = ["width 256: 32 warmup steps, but 20 steps in all", "fewer than two widths: no exponent"]
    assert edge["flags"] == flags and "\n".join(f"! {flag}" for flag in flags) in capsys.readouterr().out
    code, summary = run(tmp_path, "--widths", 64, 256, "--steps", 100, "--seeds", 1, "--label-noise", 0)
    edge = summary["linear_net"]["edges"][2]
    assert edge["flags"] == ["one seed: no interval"] and edge["interval"] == [None, None]
    assert edge["exponent"] is not None and edge["predicted"] == -1.0


@pytest.mark.parametrize("arguments, words", [
    (["--widths", 0], "widths is 0; it must be from 1 to 2^26"),
    (["--widths", 64, 2 ** 26 + 1], "widths is 67108865; it must be from 1 to 2^26"),
    (["--widths", "wide"], "--widths: invalid int value: 'wide'"),
    (["--steps", 0], "steps is 0; it must be a whole number, at least 1"),
    (["--seeds", -1], "seeds is -1; it must be a whole number, at least 1"),
    (["--steps", 10 ** 6], "steps times seeds is 4000000; it must be at most 10^6"),
    (["--seeds", 1.5], "--seeds: invalid int value: '1.5'"),
    (["--label-noise", "nan"], "label_noise is nan; it must be a number, at least 0"),
    (["--label-noise", "-1"], "label_noise is -1.0; it must be a number, at least 0"),
    (["--label-noise", "inf"], "label_noise is inf; it must be a number, at least 0"),
    (["--width", 64], "unrecognized arguments: --width 64; did you mean --widths?")])
def test_bad_input_is_one_line_on_standard_error_and_exit_code_2(arguments, words, tmp_path, capsys):
    assert run(tmp_path, *arguments) == (2, None)
    out, err = capsys.readouterr()
    assert words in err and err.count("\n") == 1 and err.endswith("\n") and not out
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_one_line_and_exit_code_2(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "out").write_text("a file")
    assert run(tmp_path / "out") == (2, None)
    out, err = capsys.readouterr()
    assert "File exists" in err and err.count("\n") == 1 and not out


def test_an_interrupt_writes_nothing(tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(net, "one_step", interrupted)
    assert run(tmp_path, "--widths", 64, "--steps", 2) == (130, None)
    assert capsys.readouterr().err == "\ninterrupted\n"


def test_linear_net_imports_nothing_that_trains():
    text = Path(net.__file__).read_text()
    imported = set(re.findall(r"^\s*(?:from|import) ([A-Za-z_]+)", text, re.MULTILINE))
    assert imported - sys.stdlib_module_names == {"torch", "numpy", "config", "data", "estimate", "param"}
