"""Sweeps that are killed, interrupted, out of disk space or shared out over ranks end with the rows of an
undisturbed one.

    pytest -m faults tests/test_faults.py       # about two minutes: real processes and signals

Moments are random, but seeded. A Forked process skips the seconds of imports. Every test ends in `compare`,
which counts the rows that are missing, duplicated and different; the last test prints the table.
"""
import contextlib
import functools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import pytest

import torch

import config
import sweep
import train

pytestmark = pytest.mark.faults
torch.set_num_threads(1)

HERE = Path(train.__file__).parent
MAIN = {"sweep.py": sweep.main, "train.py": train.main}
SWEEP = ["sweep.py", *"--widths 8 16 32 --base-width 16 --hidden-layers 2 --steps 20 --batch-size 16".split(),
         *"--loss ce --train-size 500 --val-size 100 --seeds 2 --lr-range 0.03 8".split(),
         *"--stack 2 --no-plots".split()]
RANDOM = random.Random(0)
TABLE = []          # (fault, times, missing, duplicated, different)


# ---- processes ----

def torchrun(ranks, command, *flags):
    """Return the same command under torchrun."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
            "--monitor-interval", "0.1", *flags, *command]


class Forked:
    """A child of this process that runs a script's main, with the part of Popen's interface that we need."""

    def __init__(self, command, errors):
        self.returncode, self.pid = None, os.fork()
        if self.pid == 0:
            code = 1
            try:
                signal.signal(signal.SIGINT, signal.default_int_handler)
                os.dup2(errors.fileno(), 2)
                sys.stderr, sys.stdout, sys.argv = open(2, "w"), open(os.devnull, "w"), command
                os.chdir(HERE)
                config.command_line(MAIN[command[0]])
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
    """Yield the running process of a command with --out, its standard error in <out>.err.

    Nothing of it outlives the block.
    """
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
    """Run a command to its end, and return (exit code, lines on standard error)."""
    with started(command, out) as process:
        process.wait(300)
    return process.returncode, errors_of(out)


def errors_of(out):
    return [line for line in Path(f"{out}.err").read_text().splitlines() if line.strip()]


def descendants(pid):
    """Return the process ids of children and their children, torchrun's ranks among them."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    family = [pid]
    for parent in family:
        family += [child for child, of in parents.items() if of == parent]
    return family[1:]


def is_rank(pid):
    with contextlib.suppress(OSError):
        return b"sweep.py" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def wait_for(condition, process):
    """Wait until the condition holds or the process has ended."""
    while not condition() and process.poll() is None:
        time.sleep(0.01)


# ---- what a folder holds, beside that of the undisturbed sweep ----

def count(out):
    """Return the number of whole lines in the files of a sweep."""
    return sum(path.read_bytes().count(b"\n") for path in out.glob("runs*.jsonl"))


def lines_of(out):
    files = sorted(out.glob("runs*.jsonl"))
    return [json.loads(line) for path in files for line in path.read_text().splitlines()]


def summary_of(out):
    return json.loads((out / "summary.json").read_text())["rows"]


def results(row):
    """Return all but the time it took, and the commit, which may change while these minutes pass."""
    return {key: value for key, value in row.items() if key not in ("seconds", "commit")}


@functools.cache
def alone():
    """Return (rows by id, summary, its file's lines, seconds) of the undisturbed sweep."""
    out, start = Path(tempfile.mkdtemp()) / "alone", time.monotonic()
    code, errors = finish(SWEEP, out)
    took = time.monotonic() - start
    assert code == 0, errors
    rows = {row["id"]: results(row) for row in lines_of(out)}
    result = rows, summary_of(out), (out / "runs.jsonl").read_bytes().splitlines(keepends=True), took
    shutil.rmtree(out.parent)
    return result


def compare(fault, times, out):
    """Count in TABLE how a finished folder differs from the undisturbed sweep, and require no difference."""
    (expected, summary, *_), rows = alone(), lines_of(out)
    row_of = {row["id"]: results(row) for row in rows}
    missing, duplicated = len(expected.keys() - row_of.keys()), len(rows) - len(row_of)
    different = sum(row != expected.get(id) for id, row in row_of.items())
    TABLE.append((fault, times, missing, duplicated, different))
    assert (missing, duplicated, different) == (0, 0, 0), TABLE[-1]
    assert summary_of(out) == summary
    assert not list(out.glob("*.part")) or fault.startswith(("SIGKILL", "torchrun"))


# ---- one process ----

def strike(command, out, hit, latest):
    """Start the command, call hit(process) after a random time, and return whether it was still running."""
    with started(command, out) as process:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(RANDOM.uniform(0, latest))
        struck = process.poll() is None
        if struck:
            hit(process)
    return struck


def until(times, command, hit, folder, fault, latest=None):
    """Hit sweeps at random moments, each started again in its folder until it ends, until so many hits have
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


def assert_announced(lines, out):
    """Require that these lines tell the data, what the sweep does and, at most, that it resumes."""
    data, sweep_line, *resuming = lines
    assert data.startswith("data: 500 samples") and sweep_line.endswith(f" over LRs, into {out}")
    assert len(resuming) < 2 and all(line.startswith(f"{out}: resuming after ") for line in resuming)


def test_an_interrupted_sweep_says_how_to_resume_it(tmp_path):
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
        line = f"interrupted: (.*) finished runs are kept in {out}; run the same command again to resume"
        # a stack of two may be in the file, and not yet counted
        assert 0 <= count(out) - int(re.fullmatch(line, errors[-1])[1]) <= 2
        assert_announced(errors[:-1], out)
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
        assert any("dropped a half-written last line" in line for line in errors[1:3]), errors
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


def test_a_full_disk_ends_with_one_line_and_the_sweep_resumes_when_there_is_room(small_disk, tmp_path):
    out, filler = tmp_path / "out", small_disk / "filler"
    (small_disk / "out").mkdir()
    out.symlink_to(small_disk / "out")          # what it says on standard error goes elsewhere
    filler.write_bytes(bytes(36 * 1024))
    code, errors = finish(SWEEP, out)
    assert code == 2 and "No space left" in errors[-1], errors
    assert_announced(errors[:-1], out)
    assert 0 < count(out) < len(alone()[0])
    filler.unlink()
    subprocess.run(["mount", "-o", "remount,size=1m", small_disk], check=True)
    assert finish(SWEEP, out)[0] == 0
    compare("full disk", 1, out)

    shutil.rmtree(small_disk / "out")
    (small_disk / "out").mkdir()
    filler.write_bytes(bytes(shutil.disk_usage(small_disk).free))
    code, errors = finish(["train.py", "--width", "64", "--steps", "20"], out)
    data, step, error = errors
    assert code == 2 and "No space left" in error and error.startswith("train.py: "), errors
    assert data.startswith("data: ") and step == "step 20/20"
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
    assert any("resuming after" in line for line in errors)
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


# ---- memory ----

MEASURE_MEMORY = """
import json, sys
import torch
import data, train
torch.set_num_threads(2)

def resident(kind):
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(kind))

run, splits = json.loads(sys.argv[1]), data.load_data("multi_index", val_size=300)
train.train(dict(run, width=8), splits)                         # what libraries keep for themselves
open("/proc/self/clear_refs", "w").write("5")                   # the peak begins anew
before = resident("VmRSS")
rows = train.train([dict(run, lr=lr, seed=i) for i, lr in enumerate([1e-3, 1e9, 1e-3, 1e-3])], splits)
print(json.dumps([resident("VmHWM") - before, [row["diverged_at"] for row in rows]]))
"""


@pytest.mark.parametrize("settings, copies", [
    (dict(width=2048), 1),                              # the products update the weights
    (dict(width=2048, momentum=0.9, weight_decay=0.1, clip=1.0, accumulate=2), 4),  # momentum, two gradients
    (dict(width=2048, optimizer="adam"), 4),            # two moments, one gradient
], ids=["sgd", "momentum", "adam"])
def test_a_stack_takes_the_memory_of_its_weights_moments_and_gradients(settings, copies):
    command = [sys.executable, "-c", MEASURE_MEMORY, json.dumps(dict(settings, steps=6))]
    gives_back = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}      # what is freed
    result = subprocess.run(command, cwd=HERE, capture_output=True, text=True, env=gives_back)
    peak, diverged_at = json.loads(result.stdout)
    assert diverged_at[1] is not None and diverged_at[::2] == [None, None]
    weights = 4 * (100 * settings["width"] + 2 * settings["width"] ** 2 + 2 * settings["width"])
    # Beside the stack of four are one model while it is drawn, and activations; where a replica leaves, the
    # others are copied tensor after tensor, three halves of a replica at a time.
    assert 4 * copies * weights < peak < (4 * copies + 2.5) * weights


def test_no_row_is_missing_duplicated_or_different(capsys):
    faults = {}
    for fault, *counts in TABLE:
        faults[fault] = [a + b for a, b in zip(faults.get(fault, [0] * 4), counts)]
    with capsys.disabled():
        print(f"\n\n{'fault':44}{'times':>6}{'missing':>9}{'duplicated':>12}{'different':>11}")
        for fault, counts in faults.items():
            print("{:44}{:6}{:9}{:12}{:11}".format(fault, *counts))
    assert TABLE and not any(sum(counts[1:]) for counts in faults.values())
