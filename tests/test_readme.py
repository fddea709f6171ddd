"""What the README says is true of the code: its table, flags, files, commands and snippets."""
import contextlib
import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import config
import param

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
GALLERY = (ROOT / "assets" / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


def block(words):
    (code,) = [code for code in BLOCKS if words in code]
    return code


class MyModel(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(10, width), nn.GELU(), nn.Linear(width, width), nn.GELU(),
                                    nn.Linear(width, 3))

    def forward(self, x):
        return self.layers(x)


def test_the_table_of_exponents_is_the_one_in_param():
    halves = {"0": 0.0, "½": 0.5, "1": 1.0, "-½": -0.5, "-1": -1.0}
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \| (.*?) \| (.*?) \|$", README, re.M)
    assert {name for name, *_ in rows} == set(param.PARAMETERIZATIONS)
    for name, *cells in rows:
        table = param.PARAMETERIZATIONS[name]
        for cell, key in zip(cells, ("b", "sgd", "adam", "adam_eps")):
            values = tuple(halves[word] for word in cell.split(", "))
            assert values == table[key][:len(values)], (name, key)


def test_every_flag_exists():
    scripts = "".join(path.read_text() for path in ROOT.glob("*.py"))
    known = set(re.findall(r"--[a-z][a-z-]+", scripts)) | {"--nproc-per-node"}      # torchrun's
    known |= {"--" + name.replace("_", "-") for name in config.SETTINGS}
    used = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README + GALLERY))
    assert used and used <= known, used - known


def test_every_file_named_exists_and_the_landing_page_is_short():
    for name in re.findall(r"\]\((assets/[^)]+)\)", README):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"\]\(([^)#:]+)\)", GALLERY):
        assert (ROOT / "assets" / name).exists(), name
    for name in re.findall(r"^\| `(\w+\.py)`", README, re.M):
        assert (ROOT / name).exists(), name
    assert len(README.split()) <= 3500


def test_ci_runs_the_test_commands_of_the_readme():
    """`pytest test_regimes.py` after requirements.txt alone, and all that `pytest` runs beside it."""
    ci = (ROOT / ".ci" / "run").read_text()
    commands = {" ".join(command.split()) for command in
                re.findall(r"(?:^ *|`|&& )(pytest[^`]*?)(?=`|\n\n)", README, re.M)}
    steps = set(re.findall(r"^(pytest .*)$", ci, re.M))
    assert commands == {"pytest", "pytest test_regimes.py", "pytest -m faults tests/test_faults.py",
                        "pytest tests/test_cuda.py"}
    # `pytest` alone is test_regimes.py and tests/, in two steps; tests/ has the test of a GPU
    assert steps == commands - {"pytest", "pytest tests/test_cuda.py"} | {"pytest tests"}


def test_an_installation_has_every_file_of_the_library():
    text = (ROOT / "pyproject.toml").read_text()
    modules = re.findall(r'"(\w+)"', re.search(r"py-modules = \[(.*?)\]", text, re.S)[1])
    files = {path.stem for path in ROOT.glob("*.py")} - {"test_regimes"}
    assert set(modules) == files and len(modules) == len(files)


def test_the_idea_in_twenty_lines_finds_the_two_exponents():
    """One seed: over thirty, CE's is -0.63 ± 0.18 and MSE's -1.02 ± 0.09. test_regimes.py averages many."""
    output = io.StringIO()
    torch.set_num_threads(2)
    try:
        with contextlib.redirect_stdout(output):
            exec(block("largest learning rate that is stable"), {})
    finally:
        torch.set_num_threads(1)
    ce, mse = (float(value) for value in re.findall(r"n\^(-?[\d.]+)", output.getvalue()))
    assert -1.36 < ce < 0.1 and -1.39 < mse < -0.65


def test_the_notebook_example_trains_summarizes_and_draws(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output, space = io.StringIO(), {}
    with contextlib.redirect_stdout(output):
        exec(block("analyze.summary_of"), space)
    assert len(space["rows"]) == 8 and "predicted" in output.getvalue()
    (row,) = space["summary"]["rows"]
    assert row["widths"] == [64, 256] and min(row["best_train_loss"]) < row["chance_loss"]
    assert (tmp_path / "loss_against_lr.png").stat().st_size > 10_000


def test_the_example_of_estimate_recommends_a_rate_below_the_edge():
    def my_losses(width, lr):
        """Three seeds whose optimum and edge fall as n^-1/2, 0.3 at width 64."""
        optimum = 0.3 * (width / 64) ** -0.5
        losses = 0.1 + 0.02 * np.log(lr / optimum) ** 2
        return np.where(lr > 2 * optimum, np.nan, np.stack([losses] * 3))

    space = {"print": lambda *words: None, "my_losses": my_losses}
    exec(block("import estimate"), space)
    edge = space["edge"]
    assert edge.interval[0] <= edge.slope <= edge.interval[1]
    at = space["at"]
    assert at["recommended"] < at["max_stable"]["fitted"].lr
    assert at["optimal"]["fitted"].lr == pytest.approx(0.3 / 8, rel=0.5)


@pytest.mark.filterwarnings("error")
def test_one_file_in_a_project_of_ones_own():
    torch.manual_seed(0)
    x, y = torch.randn(32, 10), torch.randint(3, (32,))
    space = {"MyModel": MyModel, "x": x, "y": y, "print": lambda *words: None}
    exec(block("param.rescale_(MyModel(width=512)"), space)
    assert {group["role"] for group in space["groups"]} == set(param.ROLES)
    nn.functional.cross_entropy(space["model"](x), y).backward()
    space["optimizer"].step()
    space["schedule"].step()
    for group in space["optimizer"].param_groups:
        assert group["lr"] == pytest.approx(group["base_lr"] * 0.999)
