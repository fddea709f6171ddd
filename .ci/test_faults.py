"""Sweeps and runs that are killed, interrupted, cut, starved of disk or shared out end with the rows of one left alone.

pytest .ci/test_faults.py takes about four minutes on two cores: real processes, real signals, at seeded random moments. A
Forked process is one that skips the seconds of imports. Every test ends in `compare`, which counts rows lost, duplicated
and different; the last prints the table.
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

HERE = Path(__file__).parent.parent
sys.path.insert(0, str(HERE))
import train        # before torch: it fixes how MKL sums
import torch

import sweep

torch.set_num_threads(1)
SWEEP = ["sweep.py", "--widths", "8", "16", "32", "--base-width", "16", "--hidden-layers", "2", "--steps", "20", "--loss", "ce",
         "--train-size", "500", "--val-size", "100", "--batch-size", "16", "--seeds", "2", "--lr-range", "0.03", "8", "--stack", "2", "--no-plots"]
GPT = dict(model="gpt", data=str(HERE / "test_regimes.py"), width=16, base_width=16, head_dim=8, layers=1, context=16, steps=60, batch_size=12,
           val_size=8, optimizer="adam", lr=0.01)
MLP = dict(width=32, base_width=16, hidden_layers=2, steps=30, batch_size=12, train_size=500, val_size=100, lr=0.3)
RANDOM = random.Random(0)
TABLE = []          # (fault, times, lost, duplicated, different)


def torchrun(ranks, command, *flags):
    """The same command under torchrun."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "--monitor-interval", "0.1", *flags, *command]


class Forked:
    """A child of this process that runs a script's main, with the part of Popen's interface that is needed here."""

    def __init__(self, command, errors):
        self.returncode, self.pid = None, os.fork()
        if self.pid == 0:
            code = 1
            try:
                signal.signal(signal.SIGINT, signal.default_int_handler)
                os.dup2(errors.fileno(), 2)
                sys.stderr, sys.stdout, sys.argv = open(2, "w"), open(os.devnull, "w"), command
                os.chdir(HERE)
                train.command_line({"sweep.py": sweep.main, "train.py": train.main}[command[0]])
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
    """The running process of a command with --out; its standard error in <out>.err. Nothing of it outlives the block."""
    environment, command = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}, [*command, "--out", str(out)]
    with open(f"{out}.err", "w") as errors:
        process = Forked(command, errors) if command[0].endswith(".py") else subprocess.Popen(
            command, cwd=HERE, env=environment, stdout=subprocess.DEVNULL, stderr=errors)
    try:
        yield process
    finally:
        kill_all(process)


def kill_all(process):
    for pid in [] if process.poll() is not None else [process.pid, *descendants(process.pid)]:
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


def wait_for(condition, process):
    """Until the condition holds or the process has ended."""
    while not condition() and process.poll() is None:
        time.sleep(0.01)


def count(out):
    """Whole lines in the files of a sweep."""
    return sum(path.read_bytes().count(b"\n") for path in out.glob("runs*.jsonl"))


def lines_of(out):
    return [json.loads(line) for path in sorted(out.glob("runs*.jsonl")) for line in path.read_text().splitlines()]


def without_seconds(row):
    return {key: value for key, value in row.items() if key != "seconds"}


@functools.cache
def alone():
    """(rows by id, summary, its file's lines, seconds) of the sweep left alone."""
    out = Path(tempfile.mkdtemp()) / "alone"
    start = time.monotonic()
    code, errors = finish(SWEEP, out)
    assert code == 0, errors
    result = ({row["id"]: without_seconds(row) for row in lines_of(out)}, json.loads((out / "summary.json").read_text())["rows"],
              (out / "runs.jsonl").read_bytes().splitlines(keepends=True), time.monotonic() - start)
    shutil.rmtree(out.parent)
    return result


def compare(fault, times, out):
    """Counts in TABLE what a finished folder has other than the sweep left alone, and asserts that it is nothing."""
    (expected, summary, *_), rows = alone(), lines_of(out)
    found = {row["id"]: without_seconds(row) for row in rows}
    lost, duplicated = len(expected.keys() - found.keys()), len(rows) - len(found)
    different = sum(row != expected.get(id_) for id_, row in found.items())
    TABLE.append((fault, times, lost, duplicated, different))
    assert (lost, duplicated, different) == (0, 0, 0), TABLE[-1]
    assert json.loads((out / "summary.json").read_text())["rows"] == summary
    assert not list(out.glob("*.part")) or fault.startswith(("SIGKILL", "torchrun"))


def strike(command, out, hit, latest):
    """Starts the command and calls hit(process) after a random time; whether it hit before the end."""
    with started(command, out) as process:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(RANDOM.uniform(0, latest))
        struck = process.poll() is None
        if struck:
            hit(process)
    return struck


def until(times, command, hit, tmp_path, fault, latest=None):
    """Hits sweeps at random moments, each started again in its folder until it ends, until so many hits have landed."""
    hits, attempt = 0, 0
    while hits < times:
        out, before, attempt = tmp_path / f"{attempt}", hits, attempt + 1
        out.parent.mkdir(exist_ok=True)
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
    until(3, [sys.executable, *SWEEP], lambda process: process.kill(), tmp_path, "SIGKILL, start-up included",
          time.monotonic() - start + alone()[3])


def test_an_interrupted_sweep_says_how_to_go_on(tmp_path):
    out, times = tmp_path / "out", 0
    for _ in range(4):
        with started(SWEEP, out) as process:
            rows = count(out)
            wait_for(lambda: count(out) > rows, process)
            time.sleep(RANDOM.uniform(0, 0.1))
            process.send_signal(signal.SIGINT)
            process.wait(60)
        errors = errors_of(out)
        assert process.returncode == 130 and "interrupted" in errors[-1] and "the same command goes on" in errors[-1], errors
        assert len(errors) <= 2 and not any("Traceback" in line for line in errors)        # the other: how many runs were found
        times += 1
    assert finish(SWEEP, out)[0] == 0
    compare("SIGINT", times, out)


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_sweep_shared_out_over_ranks_has_the_same_rows(tmp_path, ranks):
    code, errors = finish(torchrun(ranks, SWEEP), tmp_path / "out")
    assert code == 0 and len(list((tmp_path / "out").glob("runs*.jsonl"))) == ranks, errors
    compare(f"none, {ranks} ranks", 1, tmp_path / "out")


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_killed_rank_is_started_again_by_torchrun(tmp_path, ranks):
    out, command = tmp_path / "out", torchrun(ranks, SWEEP, "--max-restarts", "3")
    with started(command, out) as process:
        wait_for(lambda: count(out) > 4, process)
        workers = [pid for pid in descendants(process.pid) if b"sweep.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        os.kill(RANDOM.choice(workers), signal.SIGKILL)
        process.wait(200)
    assert process.returncode == 0 and len(workers) == ranks and any("runs found, going on" in line for line in errors_of(out)), errors_of(out)
    compare(f"one of {ranks} ranks killed", 1, out)


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_killed_torchrun_started_again_ends_with_the_same_rows(tmp_path, ranks):
    out, command = tmp_path / "out", torchrun(ranks, SWEEP)
    with started(command, out) as process:
        wait_for(lambda: count(out) > RANDOM.randrange(1, 30), process)
        kill_all(process)
    assert 0 < count(out) < len(alone()[0])
    code, errors = finish(command, out)
    assert code == 0, errors
    compare(f"torchrun of {ranks} ranks killed", 1, out)


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
        for pid in orphans:
            with contextlib.suppress(OSError):
                if b"sweep.py" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)
    compare("torchrun killed, its ranks left", 1, out)


def test_a_full_disk_ends_with_one_line_and_the_sweep_goes_on_when_there_is_room(tmp_path):
    disk, out = tmp_path / "disk", tmp_path / "out"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("a small disk can be mounted by root alone")
    try:
        (disk / "out").mkdir()
        out.symlink_to(disk / "out")        # what it says on standard error goes elsewhere
        (disk / "filler").write_bytes(bytes(36 * 1024))
        code, errors = finish(SWEEP, out)
        assert code == 2 and len(errors) == 1 and "No space left" in errors[0], errors
        assert 0 < count(out) < len(alone()[0])
        (disk / "filler").unlink()
        subprocess.run(["mount", "-o", "remount,size=1m", disk], check=True)
        assert finish(SWEEP, out)[0] == 0
        compare("full disk", 1, out)
        shutil.rmtree(disk / "out")
        (disk / "out").mkdir()
        (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - 16 * 1024))
        code, errors = finish(["train.py", "--width", "64", "--steps", "20", "--checkpoint", "5"], out)
        assert code == 2 and len(errors) == 1 and "checkpoint" in errors[0], errors
        assert not list(out.iterdir())
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_sweep_whose_last_line_was_cut_ends_with_the_same_rows(tmp_path):
    lines = alone()[2]
    last = len(lines) * 2 // 3
    for i, cut in enumerate((1, RANDOM.randrange(2, len(lines[last]) - 1), len(lines[last]) - 1)):
        out = tmp_path / f"{i}"
        out.mkdir()
        (out / "runs.jsonl").write_bytes(b"".join(lines[:last]) + lines[last][:cut])
        code, errors = finish(SWEEP, out)
        assert code == 0 and "dropped a half-written last line" in errors[0], errors
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
    error, = (tmp_path / "second.err").read_text().splitlines()
    assert second.returncode == 2 and "another sweep is writing" in error and first.returncode == 0
    compare("second sweep on the folder", 1, out)


def command_of(settings):
    return ["train.py", *(str(part) for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", value))]


@pytest.mark.parametrize("settings, ranks", [(MLP, 2), (MLP, 3), (GPT, 2), (GPT, 3)], ids=["mlp-2", "mlp-3", "gpt-2", "gpt-3"])
def test_data_parallel_training_has_the_losses_of_one_process(tmp_path, settings, ranks):
    code, errors = finish(torchrun(ranks, command_of(settings)), tmp_path / "out")
    assert code == 0, errors
    row, (expected,) = lines_of(tmp_path / "out")[0], train.train([settings])
    assert row["id"] == expected["id"] and not row["deterministic"]
    for name in ("final_train_loss", "train_accuracy", "val_loss", "logit_rms"):
        assert row[name] == pytest.approx(expected[name], rel=1e-4)
    TABLE.append((f"none, train.py on {ranks} ranks (to rounding)", 1, 0, 0, 0))


def test_a_killed_run_goes_on_from_its_checkpoint_to_the_same_bits(tmp_path):
    out, command, settings = tmp_path / "out", [*command_of(dict(GPT, steps=400)), "--checkpoint", "20"], dict(GPT, steps=400)
    times, seen = 0, b""
    while times < 3:
        with started(command, out) as process:
            wait_for(lambda: any(path.read_bytes() != seen for path in out.glob("checkpoint*.pt")), process)
            time.sleep(RANDOM.uniform(0, 0.1))
            assert process.poll() is None, "too fast to be killed"
            process.kill()
        seen, times = next(out.glob("checkpoint*.pt")).read_bytes(), times + 1
    assert finish(command, out)[0] == 0
    expected, rows = train.train([settings])[0], lines_of(out)
    TABLE.append(("SIGKILL of train.py --checkpoint", times, 1 - len(rows), 0, int(without_seconds(rows[0]) != without_seconds(expected))))
    assert [without_seconds(row) for row in rows] == [without_seconds(expected)]
    assert [path.suffix for path in out.iterdir()] == [".jsonl"]


MEASURE_MEMORY = """
import json, sys
import train, torch
torch.set_num_threads(2)

def resident(kind):
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(kind))

run, splits = json.loads(sys.argv[1]), train.load_data("multi_index", val_size=300)
train.train([dict(run, width=8)], splits)                       # what libraries keep for themselves
open("/proc/self/clear_refs", "w").write("5")                   # the peak begins anew
before, (_, memory) = resident("VmRSS"), train.replica_size(train.configure(run))
stack = next(train.stacks([train.configure(dict(run, lr=lr, seed=i)) for i, lr in enumerate([1e-3, 1e9, 1e-3, 1e-3])]))
rows = train.train(stack, splits)
print(json.dumps([len(stack), resident("VmHWM") - before, memory, 4 * train.replica_size(stack[0])[0],
                  sum(row["diverged_at"] is not None for row in rows), train.CPU_MEMORY]))
"""


@pytest.mark.parametrize("settings", [
    dict(width=4096), dict(width=2048, momentum=0.9, weight_decay=0.1, clip=1.0, accumulate=2), dict(width=2048, optimizer="adam"),
    dict(width=4096, optimizer="adam", hidden_layers=2)], ids=lambda settings: "-".join(map(str, settings.values())))
def test_the_memory_of_a_stack_stays_within_what_is_stated(settings):
    told = json.dumps(dict(settings, steps=6))
    result = subprocess.run([sys.executable, "-c", MEASURE_MEMORY, told], cwd=HERE, capture_output=True, text=True)
    replicas, peak, memory, weights, diverged, budget = json.loads(result.stdout)
    assert replicas * weights < peak < (replicas + 1) * memory      # one more than its replicas while they are drawn
    if replicas > 1:
        assert (replicas + 1) * memory <= budget and diverged       # a replica left, and the others were copied
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
