"""config.py and the command lines of all scripts: what flags mean, and how bad input is refused.

Bad input of every script ends with one line that names the value and the remedy, and exit code 2.
"""
import multiprocessing
import os
import re
import runpy
import struct
import subprocess
import sys
import urllib.request
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import analyze
import config
import data
import linear_net
import models
import param
import sweep
import train
from conftest import call

HERE = Path(train.__file__).parent
MAIN = {
    "sweep.py": partial(config.command_line, sweep.main),
    "train.py": partial(config.command_line, train.main),
    "analyze.py": partial(config.command_line, analyze.main),
    "linear_net.py": partial(config.command_line, linear_net.main),
    "plots.py": partial(runpy.run_path, str(HERE / "plots.py"), run_name="__main__"),
    "bench.py": partial(runpy.run_path, str(HERE / "tests" / "bench.py"), run_name="__main__"),
}
SWEEP = ("--widths 8 16 --base-width 8 --hidden-layers 2 --steps 8 --train-size 300 --val-size 50 "
         "--batch-size 8 --seeds 1 --lrs 0.1 0.2 0.4 --loss ce --no-plots").split()
# What a script may print before its error: the data that it read and, if a sweep, what it was to do.
BEFORE_AN_ERROR = re.compile(r"(data: [^\n]*\n)?(headline: mlp on [^\n]*, into [^\n]*\n)?")


def run_script(script, *flags):
    """Run a script in this process, as its command line would call it."""
    return call(MAIN[script], script, *flags)


def refused(words, script, *flags):
    """Require that the script ends with exit code 2 and one line of these words on standard error."""
    done = run_script(script, *flags)
    assert done.returncode == 2 and not done.stdout and done.stderr.endswith("\n"), done.stderr
    *before, line = done.stderr.splitlines(keepends=True)
    assert line.startswith(f"{script}: ") and re.search(words, line), done.stderr
    assert BEFORE_AN_ERROR.fullmatch("".join(before)) and (script == "sweep.py" or len(before) < 2), before


# ---- flags ----

BAD_FLAGS = {"sweep.py": [
    ("--preset headlin", "choose from '?headline"),
    ("--widths", "--widths: expected at least one"),
    ("--widths 0", "width is 0"),
    ("--widths 8 -8", "width is -8"),
    ("--widths 64.5", "invalid int"),
    ("--widths nan", "--widths: invalid int"),
    ("--widths 64,128", "invalid int value: '64,128'; separate values by spaces"),
    ("--widths 99999999999999999999", "width is 99999999999999999999"),
    ("--widths 2000000000", "out of memory; use a smaller width"),
    ("--width 64", "unrecognized arguments: --width.*did you mean --widths"),
    ("--wdiths 8", "unrecognized arguments: --wdiths.*did you mean --widths"),
    ("--base-width 0", "base_width is 0"),
    ("--lrs -0.1", "lr is -0.1"),
    ("--lrs 0", r"lr is 0.0; it must be a positive number"),
    ("--lrs nan", "lr is nan"),
    ("--lrs inf", "lr is inf"),
    ("--lrs tenth", "--lrs: invalid float"),
    ("--lrs 0.1,0.2", "invalid float value: '0.1,0.2'; separate values by spaces"),
    ("--lrs 0.1 --lr-range 0.1 1", "argument --lr-range: not allowed with argument --lrs"),
    ("--lr 0.1", "unrecognized arguments: --lr .*did you mean --lrs"),
    ("--lr-range 1 0.1", "lower one first"),
    ("--lr-range nan 1", r"lr_range is \[nan, 1.0\]"),
    ("--lr-range 0 1", r"lr_range is \[0.0, 1.0\]; it must be two .*numbers"),
    ("--lr-range 1", "--lr-range: expected 2"),
    ("--lr-step 1", "lr_step is 1.0"),
    ("--lr-step 1.0000000000000002", "from 1.01 to 1000"),
    ("--lr-step nan", "lr_step is nan"),
    ("--lr-step inf", "lr_step is inf"),
    ("--seeds 0", "seeds is 0"),
    ("--seeds -1", "seeds is -1"),
    ("--seeds two", "--seeds: invalid int"),
    ("--seeds 0 1 2", "unrecognized arguments: 1 2; --seeds takes one value$"),
    ("--widths 1 2 --seeds 0 1 2", "unrecognized arguments: 1 2; --seeds takes one value$"),
    ("--schedule cosine", "unrecognized arguments: --schedule .*did you mean --decay[?]$"),
    ("--cosine", "unrecognized arguments: --cosine; did you mean --decay cosine[?]$"),
    ("--epochs 3", "unrecognized arguments: --epochs .*did you mean --steps[?]$"),
    ("--epochs=3", "unrecognized arguments: --epochs=3; did you mean --steps[?]$"),
    ("--depth 3", "unrecognized arguments: --depth .*did you mean --hidden-layers or --layers[?]$"),
    ("--quantum", "unrecognized arguments: --quantum; see --help$"),
    ("--width", "unrecognized arguments: --width; did you mean --widths[?]$"),
    ("--alpha -1e3", "alpha is -1000.0; it must be a number from -10 to 10"),
    ("--lr-factor hidden=fast", "lr_factor is 'hidden=fast'; it must be PATTERN=X with a number X, at least"),
    ("--lr-factor input=2 hidden=-1", "lr_factor is 'hidden=-1'"),
    ("--lr-factor hidden=inf", "lr_factor is 'hidden=inf'"),
    ("--lr-factor hidden", "lr_factor is '=hidden'"),
    ("--roles up.weight=first", "roles is 'up.weight=first'; it must be NAME=ROLE with one of input"),
    ("--loss hinge2", "loss is 'hinge2'; it must be one of ce, mse, brier, huber, hinge, squared_hinge"),
    ("--loss ce hinge2", "loss is 'hinge2'"),
    ("--huber-delta 0", "huber_delta is 0.0; it must be a positive number"),
    ("--huber-delta -1", "huber_delta is -1.0"),
    ("--param muP", "one of sp, ntp, mup"),
    ("--optimizer lion", "one of sgd, adam"),
    ("--model resnet", "it must be mlp, gpt or FILE.py:FUNCTION"),
    ("--dtype float16", "one of float32"),
    ("--decay linear", "one of none, cosine"),
    ("--hidden-layers 0", "hidden_layers is 0"),
    ("--alpha 5000", "a number from -10 to 10"),
    ("--alpha nan", "alpha is nan"),
    ("--search random", "coarse-to-fine"),
    ("--stable-if accuracy=high", "must be a number"),
    ("--stable-if chance=nan", "must be a number"),
    ("--stable-if finite", "choose from chance"),
    ("--stack -3", "stack is '-3'"),
    ("--stack 0", "stack is '0'; it must be auto or a whole number"),
    ("--stack ²", "stack is '²'; it must be auto or a whole number"),
    ("--scale gpu", "choose from '?cpu'?, '?paper'?"),
    ("--device tpu", "choose auto, cpu, cuda"),
    ("--device cpu:", "choose auto, cpu, cuda"),
    ("--device cuda:x", "choose auto, cpu, cuda"),
    ("--data imagenet", "one of multi_index, mnist"),
    ("--data=", "data is ''"),
    ("--track -1", "track is -1"),
    ("--track often", "--track: invalid int"),
    ("--out /dev/null/x", "/dev/null"),
    ("--model gpt --widths 32 48", "width is 48; it must be a multiple of head_dim = 32"),
    ("--model gpt --base-width 40", "base_width is 40; it must be a multiple of head_dim"),
    ("--model gpt --head-dim 12 --widths 24 --base-width 24 --val-size 1", "choose 8, 16, 32"),
    ("--model gpt --data mnist", "a file or folder of text"),
    ("--model gpt --data nowhere.txt", "no file or folder; choose stdlib"),
], "train.py": [
    ("--width -4", "width is -4"),
    ("--widths 8", "unrecognized arguments: --widths.*did you mean --width"),
    ("--steps 0", "steps is 0"),
    ("--steps 1e3", "--steps: invalid int"),
    ("--steps 20000000 --batch-size 20000",
     "out of memory; use a smaller width, batch size, number of steps"),
    ("--steps 200 --warmup 300", "warmup is 300; it must be at most steps = 200"),
    ("--warmup -1", "warmup is -1"),
    ("--batch-size 30000", "batch_size is 30000"),
    ("--batch-size 0", "batch_size is 0"),
    ("--batch-size 64 --accumulate 3", "a multiple of accumulate = 3"),
    ("--accumulate 0", "accumulate is 0"),
    ("--lr 0", "lr is 0.0"),
    ("--loss hinge2", "loss is 'hinge2'; it must be one of ce, mse"),
    ("--huber-delta 0", "huber_delta is 0.0; it must be a positive number"),
    ("--momentum 1", "momentum is 1.0"),
    ("--beta1 1", "beta1 is 1.0"),
    ("--beta2 -1", "beta2 is -1.0"),
    ("--eps 0", "eps is 0.0"),
    ("--weight-decay -0.1", "weight_decay is -0.1"),
    ("--clip nan", "clip is nan"),
    ("--readout-scale -1", "readout_scale is -1.0"),
    ("--train-size 0", "train_size is 0"),
    ("--val-size 0", "val_size is 0"),
    ("--seed x", "invalid int"),
    ("--seed -1", "seed is -1"),
    ("--seed 9223372036854775807", "seed is 9223372036854775807"),
    ("--data-seed -1", "data_seed is -1"),
    ("--device gpu", "choose auto, cpu, cuda"),
    ("--device cuda:99", "device cuda:99 does not exist"),
    ("--track 5", "--out DIR"),
    ("--out /dev/null/x", "Not a directory: .*/dev/null/x"),
    ("--out /proc/x", "No such file or directory: .*/proc/x"),
    ("--model gpt --context 0", "context is 0"),
    ("--model gpt --layers 0", "layers is 0"),
    ("--model gpt --head-dim 0", "head_dim is 0"),
    ("--model gpt --context 99999999", "context 99999999 needs more"),
    ("--model gpt --vocab-size 100", "outside the vocabulary of 100"),
    ("--model gpt --vocab-size -1", "vocab_size is -1"),
], "analyze.py": [
    ("", "arguments are required: OUT"),
    ("/nonexistent", "/nonexistent holds no runs.*jsonl with rows; name the --out of a sweep"),
    ("/nonexistent --stable", "unrecognized arguments: --stable; did you mean --stable-if"),
    ("/nonexistent --at 0", "at is 0; it must be a whole number, at least 1"),
    ("/nonexistent --leave-out -1", "leave_out is -1; it must be a whole number, at least 0"),
    ("/nonexistent /nowhere", "2 folders; several are for --leave-out alone"),
], "plots.py": [
    ("", "usage: python plots.py"),
    ("/nonexistent", "python sweep.py"),
], "linear_net.py": [
    ("--widths 0", "widths is 0; it must be from 1 to"),
    ("--steps 0", "steps is 0; it must be a whole number, at least 1"),
    ("--steps 1000000", "steps times seeds is 4000000; it must be at most 10"),
    ("--label-noise nan", "label_noise is nan; it must be a number, at least 0"),
    ("--width 64", "unrecognized arguments: --width .*did you mean --widths"),
], "bench.py": [
    ("0", "width is 0"),
    ("8 --stack 0", "stack is '0'; it must be auto or a whole number"),
    ("8 --batch-size 30000", "batch_size is 30000; it must be at most the 20000 training samples"),
]}


@pytest.mark.parametrize("script, flags, words", [
    (script, flags, words) for script, rows in BAD_FLAGS.items() for flags, words in rows])
def test_bad_input_ends_with_one_line_and_exit_code_2(script, flags, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(words, script, *flags.split())
    assert not list(tmp_path.rglob("*.*"))


def test_scripts_end_the_same_way_from_a_shell(tmp_path):
    flags = {"sweep.py": "--lr-step nan", "train.py": "--lr nan", "analyze.py": "nowhere",
             "plots.py": "--figure nan", "linear_net.py": "--widths nan"}
    started = {script: subprocess.Popen([sys.executable, HERE / script, *words.split()], cwd=tmp_path,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
               for script, words in flags.items()}
    for script, process in started.items():
        out, err = process.communicate()
        assert process.returncode == 2 and len(err.splitlines()) == 1 and not out, (script, err)
        assert err.startswith(f"{script}: ")
    assert not list(tmp_path.iterdir())


def test_a_head_that_does_not_divide_the_default_width_is_no_error():
    flags = "--model gpt --head-dim 24 --widths 48 96 --base-width 48"
    args, fixed, curves = sweep.parse(flags.split())
    assert args["widths"] == [48, 96] and len(curves) == 1
    assert sweep.runs_of(fixed, curves[0], 96, 0.1, 1)[0]["width"] == 96


@pytest.mark.parametrize("word, value", [
    ("-1e-3", -0.001), ("-1E-3", -0.001), ("-2", -2.0), ("-.5", -0.5), ("-1.", -1.0), ("-2.5e+0", -2.5),
    ("-1e-03", -0.001), ("1e-3", 0.001)])
def test_a_negative_number_is_a_value_and_no_flag(word, value):
    _, _, curves = sweep.parse(["--alpha", word, "--loss", "ce"])
    assert [dict(zip(config.CURVE, curve))["alpha"] for curve in curves] == [value]
    _, _, curves = sweep.parse(["--alpha", "0.5", word, "--loss", "ce"])
    assert [dict(zip(config.CURVE, curve))["alpha"] for curve in curves] == [0.5, value]


@pytest.mark.parametrize("flags, word", [
    ("--lr-range 0.1 1 2", "2"), ("--no-plots 3", "3"), ("--bias 1", "1")])
def test_only_a_flag_that_takes_one_value_is_described_so(flags, word):
    done = run_script("sweep.py", *flags.split())
    assert done.returncode == 2 and done.stderr.startswith(f"sweep.py: unrecognized arguments: {word}; ")
    assert "takes one value" not in done.stderr


def test_settings_of_several_words_are_read_by_name():
    run = config.configure({"roles": "a.b=input c=output", "lr_factor": "hidden=0 blocks.*=2 input=1e-1"})
    assert config.pairs(run["roles"]) == {"a.b": "input", "c": "output"}
    assert config.lr_factors(run) == {"hidden": 0.0, "blocks.*": 2.0, "input": 0.1}
    assert config.trained_roles(run) == tuple(role for role in param.ROLES if role != "hidden")
    assert set(config.trained_roles(config.configure({}))) == set(param.ROLES)


# ---- what a user can fix, and what is a bug ----

@pytest.mark.parametrize("error, code, words", [
    (data.InputError("lr is\n nan"), 2, "script.py: lr is nan\n"),
    (OSError(28, "No space left"), 2, "script.py: .*No space left\n"),
    (MemoryError(), 2, "script.py: out of memory; use a smaller width"),
    (torch.OutOfMemoryError("CUDA out of memory"), 2, "script.py: out of memory"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "script.py: out of memory"),
    (KeyboardInterrupt(), 130, "\ninterrupted\n"),
    (KeyboardInterrupt("kept"), 130, "\nkept\n"),
    (ValueError("a bug"), None, ""),
    (RuntimeError("shapes differ"), None, ""),
    (KeyError("width"), None, ""),
])
def test_what_a_user_can_fix_is_one_line_and_a_bug_a_traceback(error, code, words, monkeypatch, capsys):
    def failing():
        raise error

    monkeypatch.setattr(sys, "argv", ["/somewhere/script.py"])
    with pytest.raises(SystemExit if code else type(error)) as end:
        config.command_line(failing)
    err = capsys.readouterr().err
    assert end.value.code == code if code else not err
    assert re.fullmatch(words + (".*\n" if words and not words.endswith("\n") else ""), err)


def test_all_files_mean_the_same_input_error():
    assert config.InputError is train.InputError is sweep.InputError is analyze.InputError is data.InputError
    assert issubclass(data.InputError, ValueError)


@pytest.mark.parametrize("error", [ValueError("a bug"), TypeError("another")])
@pytest.mark.parametrize("script", ["train.py", "sweep.py", "analyze.py"])
def test_a_bug_inside_a_script_keeps_its_traceback(script, error, swept, tmp_path, monkeypatch):
    def failing(*args, **kwargs):
        raise error

    for module, function in ((data, "load"), (param, "max_trainable_alpha")):
        monkeypatch.setattr(module, function, failing)
    flags = {"train.py": [], "sweep.py": [*SWEEP, "--out", tmp_path], "analyze.py": [swept]}[script]
    before = contents(swept)
    with pytest.raises(type(error), match=str(error)):
        run_script(script, *flags)
    assert contents(swept) == before


# ---- files ----

@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """Return the result folder of a finished sweep."""
    out = tmp_path_factory.mktemp("sweep")
    assert run_script("sweep.py", *SWEEP, "--out", out).returncode == 0
    return out


def contents(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def test_a_contradicting_or_damaged_result_folder_is_refused(swept, tmp_path):
    refused("steps = 8, not 21", "sweep.py", *SWEEP, "--steps", "21", "--out", swept)
    (tmp_path / "runs.jsonl").write_text("{}\n")
    refused("runs.jsonl:1", "sweep.py", *SWEEP, "--out", tmp_path)


def test_a_sweep_that_ended_before_its_first_row_leaves_a_folder_that_contradicts_nothing(tmp_path):
    flags = [*SWEEP, "--out", tmp_path]
    done = run_script("sweep.py", *flags, "--batch-size", "301")
    assert done.returncode == 2 and done.stderr.count("at most the 300 training samples") == 1
    assert run_script("sweep.py", *flags).returncode == 0


def edit(file, change):
    """Return a function of a folder that changes the bytes of a file in it, or removes it: change None."""
    def spoil(folder):
        path = folder / file
        path.write_bytes(change(path.read_bytes())) if change else path.unlink()
    return spoil


def half(content):
    return content[:len(content) // 2]


def as_folder(file):
    def spoil(folder):
        (folder / file).unlink()
        (folder / file).mkdir()
    return spoil


def write(file, content):
    return lambda folder: (folder / file).write_bytes(content)


def both(*spoils):
    return lambda folder: [spoil(folder) for spoil in spoils]


def nothing(folder):
    pass


def mnist(spoil):
    """Return a function that writes thirty black images to train on and thirty to validate on, spoiled."""
    def prepare(folder, _):
        images = struct.pack(">4I", 0x803, 30, 28, 28) + bytes(30 * 784)
        labels = struct.pack(">2I", 0x801, 30) + bytes(range(10)) * 3
        for name in ("train", "t10k"):
            (folder / f"{name}-images-idx3-ubyte").write_bytes(images)
            (folder / f"{name}-labels-idx1-ubyte").write_bytes(labels)
        spoil(folder)
        return "train.py", ["--data", "mnist", "--data-dir", folder]
    return prepare


def cifar(spoil):
    def prepare(folder, _):
        for name in [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]:
            (folder / name).write_bytes(bytes([3, *bytes(3072)]) * 3)
        spoil(folder)
        return "sweep.py", ["--data", "cifar10", "--data-dir", folder, "--out", folder]
    return prepare


def text(spoil, file="", *flags):
    def prepare(folder, _):
        spoil(folder)
        return "train.py", ["--model", "gpt", "--context", 32, "--data", folder / file, *flags]
    return prepare


def shards(train_tokens, val="a_val.bin"):
    header = np.array([20240520, 1, 100] + [0] * 253, "<i4").tobytes()
    whole = header + np.arange(100, dtype="<u2").tobytes()
    return both(write("a_train.bin", train_tokens(whole)), write(val, whole))


def folder_of(script, spoil, *flags):
    """Return a function that copies a finished sweep into a folder, and spoils it."""
    def prepare(folder, out):
        for name in ("config.json", "runs.jsonl", "summary.json"):
            (folder / name).write_bytes((out / name).read_bytes())
        spoil(folder)
        return script, [*SWEEP, "--out", folder, *flags] if script == "sweep.py" else [folder, *flags]
    return prepare


resumed, drawn, analyzed = (partial(folder_of, f"{name}.py") for name in ("sweep", "plots", "analyze"))


SUMMARY, RUNS = "summary.json", "runs.jsonl"
DAMAGED_FILES = {
    "idx truncated": (mnist(edit("train-images-idx3-ubyte", half)), "where its header says"),
    "idx missing": (mnist(edit("t10k-labels-idx1-ubyte", None)), "put train-images"),
    "idx is a folder": (mnist(as_folder("train-images-idx3-ubyte")), "directory"),
    "cifar truncated": (cifar(edit("data_batch_5.bin", half)), "no multiple of 3073"),
    "cifar missing": (cifar(edit("test_batch.bin", None)), "put data_batch_1.bin"),
    "text too short": (text(write("a", b"abc" * 11), "a"), "30 tokens to train on; context 32 needs more"),
    "text folder empty": (text(nothing), "0 tokens to train on"),
    "text vocabulary": (text(write("a", b"abc" * 999), "a", "--vocab-size", 99), "the vocabulary of 99"),
    "bin odd": (text(write("a.bin", bytes(1001)), "a.bin"), "has an even number"),
    "shard truncated": (text(shards(half)), "count bytes"),
    "shards without validation": (text(shards(lambda whole: whole, "b.bin")), "with val in their names"),

    "out is a file": (resumed(nothing, "--out", __file__), "File exists: "),
    "config damaged": (resumed(edit("config.json", half)), "config.json is damaged"),
    "config no table": (resumed(write("config.json", b"[1, 2]")), "config.json is damaged"),
    "config contradicts": (resumed(nothing, "--batch-size", 9), "batch_size = 8, not 9"),
    "rows garbled": (resumed(edit(RUNS, lambda rows: b"garbage\n" + rows)), "runs.jsonl:1"),
    "rows are a folder": (resumed(as_folder(RUNS)), "directory"),
    "tracks garbled": (
        resumed(both(write("track.jsonl", b"{}\n"), edit("config.json", None)), "--track", 5),
        "track.jsonl:1"),

    "analyze: rows garbled": (analyzed(edit(RUNS, lambda rows: b"garbage\n" + rows)), "runs.jsonl:1"),
    "analyze: tracks garbled": (analyzed(write("track.jsonl", b"{}\n")), "track.jsonl:1"),
    "analyze: no rows": (analyzed(write(RUNS, b"")), "holds no runs"),
    "analyze: criterion": (analyzed(nothing, "--stable-if", "finite"), "choose from chance"),
    "analyze: summary truncated": (analyzed(edit(SUMMARY, half)), "summary.json is damaged"),
    "analyze: summary null": (analyzed(write(SUMMARY, b"null")), "summary.json is damaged"),

    "no summary": (drawn(edit(SUMMARY, None)), "python sweep.py"),
    "summary truncated": (drawn(edit(SUMMARY, half)), "summary.json is damaged"),
    "summary null": (drawn(write(SUMMARY, b"null")), "summary.json is damaged"),
    "summary without rows": (drawn(write(SUMMARY, b"{}")), "summary.json is damaged"),
    "summary of odd rows": (drawn(write(SUMMARY, b'{"rows": [1]}')), "summary.json is damaged"),
    "figure unknown": (drawn(nothing, "lr_transfr"), "unknown figure 'lr_transfr'; choose from lr_transfer"),
    "figure not measured": (drawn(nothing, "alignment"), "'alignment' cannot be drawn"),
    "figures is a file": (drawn(write("figures", b"")), "figures"),
}


@pytest.mark.parametrize("name", DAMAGED_FILES)
def test_damaged_files_end_with_one_line_and_exit_code_2(name, swept, tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("offline")

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    prepare, words = DAMAGED_FILES[name]
    script, flags = prepare(tmp_path, swept)
    before = contents(tmp_path)
    refused(words, script, *flags)
    after = contents(tmp_path)
    assert all(after[path] == content for path, content in before.items())
    new = {path.name: after[path] for path in after.keys() - before.keys()}
    assert new.keys() <= {"config.json", RUNS} and not new.get(RUNS)      # a sweep's settings, no row


# ---- FILE.py:FUNCTION, also where FILE has a colon of its own ----

NET = """
from torch import nn

def build(width, shape):
    return nn.Sequential(nn.Linear(shape.inputs, width), nn.ReLU(), nn.Linear(width, shape.outputs))
"""
TABLE = """
import numpy as np

def load():
    return np.random.default_rng(0).normal(size=(40, 5)), np.arange(40) % 2
"""


posix = pytest.mark.skipif(os.name == "nt", reason="there a colon cannot be part of a file's name")


@posix
@pytest.mark.parametrize("folder", ["", "C:/nets/", "a:b/c:d/"])
@pytest.mark.parametrize("file", ["net.py", r"C:\nets\net.py", "C:net.py"])
def test_a_spec_is_split_at_its_last_colon(folder, file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    file = folder + file
    Path(file).write_text(NET)
    models.load_custom.cache_clear()
    assert models.load_custom(f"{file}:build").build(8, models.Shape(5, 2, False))[0].out_features == 8

    Path(file).write_text(TABLE)
    spec = f"{file}:load"
    assert not data.is_text(spec)
    assert data.load_data(spec).describe() == "data: 36 samples (5,), 2 classes; 4 to validate"


@posix
def test_a_whole_run_reads_specs_and_files_with_a_colon(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path(r"C:\nets\net.py").write_text(NET)
    Path(r"C:\data\table.py").write_text(TABLE)
    Path(r"D:\letters.txt").write_text("abc" * 999)
    models.load_custom.cache_clear()
    row, = train.train({"model": r"C:\nets\net.py:build", "data": r"C:\data\table.py:load", "width": 8,
                        "base_width": 8, "steps": 1, "batch_size": 4})
    assert row["final_train_loss"] > 0 and row["code"] and row["data_hash"]
    run = config.configure({"model": "gpt", "data": r"D:\letters.txt", "val_size": 4})
    assert data.load(run).describe().startswith("data: 2,698 tokens of a vocabulary of 256; ")


@posix
@pytest.mark.parametrize("spec, words", [
    (r"C:\nets\none.py:build", r"C:\nets\none.py is no file; give FILE.py:FUNCTION"),
    (r"C:\nets\net.py:train", r"C:\nets\net.py has no function 'train'"),
    (r"C:\nets\net.py", "C is no file; give FILE.py:FUNCTION")])
def test_a_spec_of_nothing_is_refused_by_the_names_of_both_parts(spec, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path(r"C:\nets\net.py").write_text(NET)
    models.load_custom.cache_clear()
    with pytest.raises(ValueError, match=re.escape(words)):
        models.load_custom(spec)


# ---- files that are written whole or not at all ----

def test_a_file_that_somebody_reads_is_replaced_as_soon_as_they_are_done(tmp_path, monkeypatch):
    path, replace, waits, refusals = tmp_path / "summary.json", Path.replace, [], [None] * 5
    path.write_text("old")

    def held_open(self, target):
        if refusals:
            refusals.pop()
            assert path.read_text() == "old"
            raise PermissionError(13, "The process cannot access the file")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", held_open)
    monkeypatch.setattr(data.time, "sleep", waits.append)
    with data.whole_file(path) as file:
        file.write(b"new")
    assert path.read_text() == "new" and len(waits) == 5 and min(waits) > 0
    assert [entry.name for entry in tmp_path.iterdir()] == ["summary.json"]


def test_a_file_that_stays_in_use_is_left_as_it_is_and_the_error_shown(tmp_path, monkeypatch):
    path, waits = tmp_path / "summary.json", []
    path.write_text("old")

    def held_open(self, target):
        raise PermissionError(13, "The process cannot access the file")

    monkeypatch.setattr(Path, "replace", held_open)
    monkeypatch.setattr(data.time, "sleep", waits.append)
    with pytest.raises(PermissionError):
        data.write_json(path, {})
    assert path.read_text() == "old" and 1 < sum(waits) < 60            # seconds
    assert [entry.name for entry in tmp_path.iterdir()] == ["summary.json"]


def test_what_ends_by_an_error_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "summary.json"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), data.whole_file(path) as file:
        file.write(b"half")
        file.flush()
        assert path.read_text() == "old"
        raise ZeroDivisionError
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def write_beside_another(path, text, barrier):
    """Write a file while another writer has its own version of it half written."""
    with data.whole_file(path) as file:
        file.write(text[:1])
        file.flush()
        barrier.wait(60)
        file.write(text[1:])


@pytest.mark.skipif(os.name == "nt", reason="needs fork")
def test_two_processes_that_write_one_file_at_once_each_write_a_whole_one(tmp_path):
    def write(text):
        write_beside_another(path, text, barrier)
        (tmp_path / f"done{len(text)}").touch()

    context, path, texts = multiprocessing.get_context("fork"), tmp_path / "summary.json", [
        b"first\n" * 99, b"second\n" * 99]
    barrier = context.Barrier(2)
    writers = [context.Process(target=write, args=(text,)) for text in texts]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert path.read_bytes() in texts
    assert {entry.name for entry in tmp_path.iterdir()} == {"summary.json", "done594", "done693"}
