"""Sweeps and runs that are killed, interrupted, starved of disk or shared out end with the rows of one left
alone.

    pytest -m faults tests/test_faults.py       # about two minutes: real processes and signals

Moments are random, but seeded. A Forked process is one that skips the seconds of imports. Every test ends in
`compare`, which counts rows lost, duplicated and different; the last test prints the table.
"""
import contextlib
import functools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import pytest

import train        # before torch: it asks for reproducible products
import torch

import sweep

pytestmark = pytest.mark.faults
torch.set_num_threads(1)

HERE = Path(train.__file__).parent
MAIN = {"sweep.py": sweep.main, "train.py": train.main}
SWEEP = ["sweep.py", *"--widths 8 16 32 --base-width 16 --hidden-layers 2 --steps 20 --batch-size 16".split(),
         *"--loss ce --train-size 500 --val-size 100 --seeds 2 --lr-range 0.03 8".split(),
         *"--stack 2 --no-plots".split()]
GPT = dict(model="gpt", data=str(HERE / "test_regimes.py"), width=16, base_width=16, head_dim=8, layers=1,
           context=16, steps=60, batch_size=12, val_size=8, optimizer="adam", lr=0.01)
MLP = dict(width=32, base_width=16, hidden_layers=2, steps=30, batch_size=12, train_size=500, val_size=100,
           lr=0.3)
RANDOM = random.Random(0)
TABLE = []          # (fault, times, lost, duplicated, different)


# ---- processes ----

def torchrun(ranks, command, *flags):
    """The same command under torchrun."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
            "--monitor-interval", "0.1", *flags, *command]


class Forked:
    """A child of this process that runs a script's main, with as much of Popen's interface as is needed."""

    def __init__(self, command, errors):
        self.returncode, self.pid = None, os.fork()
        if self.pid == 0:
            code = 1
            try:
                signal.signal(signal.SIGINT, signal.default_int_handler)
                os.dup2(errors.fileno(), 2)
                sys.stderr, sys.stdout, sys.argv = open(2, "w"), open(os.devnull, "w"), command
                os.chdir(HERE)
                train.command_line(MAIN[command[0]])
                code = 0
            except SystemExit as end:
                code = end.code
            except BaseException:
                traceback.print_exc()
            finally:        # whatever happens, this child must not go on as pytest
                with contextlib.suppress(Exception):
                    sys.stderr.flush()
                os._exit(code if isinstance(code, int) else 1)

    def poll(self):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout=math.inf):
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("forked", timeout)
            time.sleep(0.002)

    def send_signal(self, number):
        os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


@contextlib.contextmanager
def started(command, out):
    """The running process of a command with --out; its standard error in <out>.err. Nothing of it outlives
    the block."""
    command = [*command, "--out", str(out)]
    quiet = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    with open(f"{out}.err", "w") as errors:
        if command[0] in MAIN:
            process = Forked(command, errors)
        else:
            process = subprocess.Popen(command, cwd=HERE, env=quiet, stdout=subprocess.DEVNULL, stderr=errors)
    try:
        yield process
    finally:
        kill_all(process)


def kill_all(process):
    if process.poll() is None:
        for pid in [process.pid, *descendants(process.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    process.wait()


def finish(command, out):
    """Runs to the end; returns (exit code, lines on standard error)."""
    with started(command, out) as process:
        process.wait(300)
    return process.returncode, errors_of(out)


def errors_of(out):
    return [line for line in Path(f"{out}.err").read_text().splitlines() if line.strip()]


def descendants(pid):
    """Process ids of children and their children, torchrun's ranks among them."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for parent in found:
        found += [child for child, of in parents.items() if of == parent]
    return found[1:]


def is_rank(pid):
    with contextlib.suppress(OSError):
        return b"sweep.py" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def wait_for(condition, process):
    """Until the condition holds or the process has ended."""
    while not condition() and process.poll() is None:
        time.sleep(0.01)


# ---- what a folder holds, beside that of the sweep left alone ----

def count(out):
    """Whole lines in the files of a sweep."""
    return sum(path.read_bytes().count(b"\n") for path in out.glob("runs*.jsonl"))


def lines_of(out):
    files = sorted(out.glob("runs*.jsonl"))
    return [json.loads(line) for path in files for line in path.read_text().splitlines()]


def summary_of(out):
    return json.loads((out / "summary.json").read_text())["rows"]


def results(row):
    """All but the time it took, and the commit, which may change while these minutes pass."""
    return {key: value for key, value in row.items() if key not in ("seconds", "commit")}


@functools.cache
def alone():
    """(rows by id, summary, its file's lines, seconds) of the sweep left alone."""
    out, start = Path(tempfile.mkdtemp()) / "alone", time.monotonic()
    code, errors = finish(SWEEP, out)
    took = time.monotonic() - start
    assert code == 0, errors
    rows = {row["id"]: results(row) for row in lines_of(out)}
    result = rows, summary_of(out), (out / "runs.jsonl").read_bytes().splitlines(keepends=True), took
    shutil.rmtree(out.parent)
    return result


def compare(fault, times, out):
    """Counts in TABLE what a finished folder has other than the sweep left alone, and asserts that it is
    nothing."""
    (expected, summary, *_), rows = alone(), lines_of(out)
    found = {row["id"]: results(row) for row in rows}
    lost, duplicated = len(expected.keys() - found.keys()), len(rows) - len(found)
    different = sum(row != expected.get(id) for id, row in found.items())
    TABLE.append((fault, times, lost, duplicated, different))
    assert (lost, duplicated, different) == (0, 0, 0), TABLE[-1]
    assert summary_of(out) == summary
    assert not list(out.glob("*.part")) or fault.startswith(("SIGKILL", "torchrun"))


# ---- one process ----

def strike(command, out, hit, latest):
    """Starts the command and calls hit(process) after a random time; whether it hit before the end."""
    with started(command, out) as process:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(RANDOM.uniform(0, latest))
        struck = process.poll() is None
        if struck:
            hit(process)
    return struck


def until(times, command, hit, folder, fault, latest=None):
    """Hits sweeps at random moments, each started again in its folder until it ends, until so many hits have
    landed."""
    hits, attempt = 0, 0
    while hits < times:
        out, before, attempt = folder / f"{attempt}", hits, attempt + 1
        folder.mkdir(exist_ok=True)
        while hits < times and strike(command, out, hit, latest or alone()[3]):
            hits += 1
        code, errors = finish(command, out)
        assert code == 0, errors
        compare(fault, hits - before, out)


def test_a_killed_sweep_started_again_ends_with_the_same_rows(tmp_path):
    until(20, SWEEP, lambda process: process.kill(), tmp_path / "forked", "SIGKILL")


def test_a_sweep_killed_from_its_start_up_on_ends_with_the_same_rows(tmp_path):
    start = time.monotonic()
    subprocess.run([sys.executable, "-c", "import sweep"], cwd=HERE, check=True)
    latest, command = time.monotonic() - start + alone()[3], [sys.executable, *SWEEP]
    until(2, command, lambda process: process.kill(), tmp_path, "SIGKILL, start-up included", latest)


def test_an_interrupted_sweep_says_how_to_go_on(tmp_path):
    out, times = tmp_path / "out", 0
    for _ in range(4):
        with started(SWEEP, out) as process:
            rows = count(out)
            wait_for(lambda: count(out) > rows, process)
            time.sleep(RANDOM.uniform(0, 0.05))
            process.send_signal(signal.SIGINT)
            process.wait(60)
        errors = errors_of(out)
        assert process.returncode == 130, errors
        assert "interrupted" in errors[-1] and "the same command goes on" in errors[-1]
        assert len(errors) <= 3             # what it does, and how many runs were found
        assert "Traceback" not in "".join(errors)
        times += 1
    assert finish(SWEEP, out)[0] == 0
    compare("SIGINT", times, out)


def test_a_sweep_whose_last_line_was_cut_ends_with_the_same_rows(tmp_path):
    lines = alone()[2]
    last = len(lines) * 2 // 3
    for i, cut in enumerate((1, RANDOM.randrange(2, len(lines[last]) - 1), len(lines[last]) - 1)):
        out = tmp_path / f"{i}"
        out.mkdir()
        (out / "runs.jsonl").write_bytes(b"".join(lines[:last]) + lines[last][:cut])
        code, errors = finish(SWEEP, out)
        assert code == 0
        assert any("dropped a half-written last line" in line for line in errors[:2]), errors
        compare("last line cut", 1, out)


def test_a_second_sweep_on_one_folder_is_refused_and_the_first_is_undisturbed(tmp_path):
    out = tmp_path / "out"
    with started(SWEEP, out) as first:
        wait_for(lambda: count(out), first)
        os.kill(first.pid, signal.SIGSTOP)      # so that it is still there
        with open(tmp_path / "second.err", "w+") as errors:
            second = Forked([*SWEEP, "--out", str(out)], errors)
            second.wait(60)
        os.kill(first.pid, signal.SIGCONT)
        first.wait(120)
    *_, error = (tmp_path / "second.err").read_text().splitlines()
    assert second.returncode == 2 and "another sweep is writing" in error
    assert first.returncode == 0
    compare("second sweep on the folder", 1, out)


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk can be mounted by root alone")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_ends_with_one_line_and_the_sweep_goes_on_when_there_is_room(small_disk, tmp_path):
    out, filler = tmp_path / "out", small_disk / "filler"
    (small_disk / "out").mkdir()
    out.symlink_to(small_disk / "out")          # what it says on standard error goes elsewhere
    filler.write_bytes(bytes(36 * 1024))
    code, errors = finish(SWEEP, out)
    assert code == 2 and "No space left" in errors[-1], errors
    assert len(errors) <= 2                     # the other: what it does
    assert 0 < count(out) < len(alone()[0])
    filler.unlink()
    subprocess.run(["mount", "-o", "remount,size=1m", small_disk], check=True)
    assert finish(SWEEP, out)[0] == 0
    compare("full disk", 1, out)

    shutil.rmtree(small_disk / "out")
    (small_disk / "out").mkdir()
    filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - 16 * 1024))
    code, errors = finish(["train.py", "--width", "64", "--steps", "20", "--checkpoint", "5"], out)
    assert code == 2 and len(errors) == 1 and "checkpoint" in errors[0], errors
    assert not list(out.iterdir())


# ---- ranks ----

def test_a_sweep_shared_out_over_ranks_has_the_same_rows(tmp_path):
    out, ranks = tmp_path / "out", 3
    code, errors = finish(torchrun(ranks, SWEEP), out)
    assert code == 0, errors
    assert len(list(out.glob("runs*.jsonl"))) == ranks
    compare(f"none, {ranks} ranks", 1, out)


def test_a_killed_rank_is_started_again_by_torchrun(tmp_path):
    out, ranks = tmp_path / "out", 2
    with started(torchrun(ranks, SWEEP, "--max-restarts", "3"), out) as process:
        wait_for(lambda: count(out) > 4, process)
        workers = [pid for pid in descendants(process.pid) if is_rank(pid)]
        os.kill(RANDOM.choice(workers), signal.SIGKILL)
        process.wait(200)
    errors = errors_of(out)
    assert process.returncode == 0 and len(workers) == ranks, errors
    assert any("runs found, going on" in line for line in errors)
    compare(f"one of {ranks} ranks killed", 1, out)


def test_a_killed_torchrun_started_again_ends_with_the_same_rows(tmp_path):
    out, command = tmp_path / "out", torchrun(3, SWEEP)
    with started(command, out) as process:
        wait_for(lambda: count(out) > RANDOM.randrange(1, 30), process)
        kill_all(process)
    assert 0 < count(out) < len(alone()[0])
    code, errors = finish(command, out)
    assert code == 0, errors
    compare("torchrun of 3 ranks killed", 1, out)


def test_ranks_that_outlive_their_torchrun_do_not_write_beside_their_successors(tmp_path):
    out, command = tmp_path / "out", torchrun(2, SWEEP)
    with started(command, out) as process:
        wait_for(lambda: count(out), process)
        orphans = descendants(process.pid)
        process.kill()
        process.wait()
    try:
        code, errors = finish(command, out)
        while code:         # refused as long as an orphan holds its file
            assert any("another sweep is writing" in line for line in errors), errors
            code, errors = finish(command, out)
    finally:
        for pid in filter(is_rank, orphans):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
    compare("torchrun killed, its ranks left", 1, out)


# ---- train.py ----

def command_of(settings):
    flags = [(f"--{name.replace('_', '-')}", str(value)) for name, value in settings.items()]
    return ["train.py", *(part for flag in flags for part in flag)]


@pytest.mark.parametrize("settings, ranks", [(MLP, 3), (GPT, 2)], ids=["mlp-3", "gpt-2"])
def test_data_parallel_training_has_the_losses_of_one_process(tmp_path, settings, ranks):
    code, errors = finish(torchrun(ranks, command_of(settings)), tmp_path / "out")
    assert code == 0, errors
    row, (expected,) = lines_of(tmp_path / "out")[0], train.train([settings])
    assert row["id"] == expected["id"] and not row["deterministic"]
    for name in ("final_train_loss", "train_accuracy", "val_loss", "logit_rms"):
        assert row[name] == pytest.approx(expected[name], rel=1e-4)
    TABLE.append((f"none, train.py on {ranks} ranks (to rounding)", 1, 0, 0, 0))


def test_a_killed_run_goes_on_from_its_checkpoint_to_the_same_bits(tmp_path):
    out, settings = tmp_path / "out", dict(GPT, steps=400)
    command = [*command_of(settings), "--checkpoint", "20"]
    times, seen = 0, b""
    while times < 3:
        with started(command, out) as process:
            wait_for(lambda: any(path.read_bytes() != seen for path in out.glob("checkpoint*.pt")), process)
            time.sleep(RANDOM.uniform(0, 0.1))
            assert process.poll() is None, "too fast to be killed"
            process.kill()
        seen, times = next(out.glob("checkpoint*.pt")).read_bytes(), times + 1
    assert finish(command, out)[0] == 0
    expected = results(train.train([settings])[0])
    rows = [results(row) for row in lines_of(out)]
    TABLE.append(("SIGKILL of train.py --checkpoint", times, 1 - len(rows), 0, int(rows[0] != expected)))
    assert rows == [expected]
    assert [path.suffix for path in out.iterdir()] == [".jsonl"]


# ---- memory ----

MEASURE_MEMORY = """
import json, sys
import train, torch
import data, sweep
torch.set_num_threads(2)

def resident(kind):
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(kind))

run, splits = json.loads(sys.argv[1]), data.load_data("multi_index", val_size=300)
train.train([dict(run, width=8)], splits)                       # what libraries keep for themselves
config = train.configure(run)
open("/proc/self/clear_refs", "w").write("5")                   # the peak begins anew
before, (_, memory) = resident("VmRSS"), sweep.replica_size(config)
stack = next(sweep.stacks([dict(config, lr=lr, seed=i) for i, lr in enumerate([1e-3, 1e9, 1e-3, 1e-3])]))
rows = train.train(stack, splits)
diverged = sum(row["diverged_at"] is not None for row in rows)
weights = 4 * sweep.replica_size(stack[0])[0]
print(json.dumps([len(stack), resident("VmHWM") - before, memory, weights, diverged, sweep.CPU_MEMORY]))
"""


@pytest.mark.parametrize("settings", [
    dict(width=4096),
    dict(width=2048, momentum=0.9, weight_decay=0.1, clip=1.0, accumulate=2),
    dict(width=2048, optimizer="adam"),
    dict(width=4096, optimizer="adam", hidden_layers=2),
], ids=lambda settings: "-".join(map(str, settings.values())))
def test_the_memory_of_a_stack_stays_within_what_is_stated(settings):
    command = [sys.executable, "-c", MEASURE_MEMORY, json.dumps(dict(settings, steps=6))]
    result = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    replicas, peak, memory, weights, diverged, budget = json.loads(result.stdout)
    assert replicas * weights < peak < (replicas + 1) * memory      # one more while they are drawn
    if replicas > 1:
        assert (replicas + 1) * memory <= budget
        assert diverged                         # a replica left, and the others were copied
    else:
        assert 3 * memory > budget


def test_no_row_was_lost_duplicated_or_different(capsys):
    faults = {}
    for fault, *counts in TABLE:
        faults[fault] = [a + b for a, b in zip(faults.get(fault, [0] * 4), counts)]
    with capsys.disabled():
        print(f"\n\n{'fault':44}{'times':>6}{'lost':>6}{'duplicated':>12}{'different':>11}")
        for fault, counts in faults.items():
            print("{:44}{:6}{:6}{:12}{:11}".format(fault, *counts))
    assert TABLE and not any(sum(counts[1:]) for counts in faults.values())
