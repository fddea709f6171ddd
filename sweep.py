"""Sweeps the learning rate over widths, and fits how its optimum and its edge scale.

    python sweep.py                         # the headline: CE n^-1/2 against MSE n^-1
    python sweep.py --preset optimal_lr     # Fashion-MNIST, 8-layer MLP (Fig. 1 and 5)
    python sweep.py --widths 64 256 1024 --param sp mup --optimizer adam --lr-range 1e-5 1

One row per run goes to <out>/runs.jsonl as soon as its stack is done; what is
there is not run again, so a killed sweep, started again, goes on. analyze.py
needs nothing but those rows. Figures and propositions: arXiv 2505.22491.

    curve     one (loss, param, optimizer, alpha, ...); on it width, LR and seed vary
    lattice   LRs are step^k for whole k, so that grids of all widths, also
              extended ones, share points
    hint      (optimum, edge) of a narrower width, where the search of a wider one begins
"""
import analyze      # before numpy and torch: it asks for reproducible products
import train

import argparse
import datetime
import fcntl
import functools
import itertools
import json
import math
import os
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch

import data
from analyze import CURVE, GRID, cell_of, curve_of, key_of, read_rows
from train import InputError, Kind

LR_RANGE = {"sgd": (2 ** -8, 2 ** 3), "adam": (2 ** -9, 2 ** -1)}
WIDTHS = [64, 128, 256, 512, 1024]
WIDE = [512, 1024, 2048, 4096]          # where a few steps are all that is trained
PAPER_WIDTHS = [256, 512, 1024, 2048, 4096]
PAPER = dict(widths=PAPER_WIDTHS, seeds=4, hidden_layers=7, steps=937)
GPT = dict(model="gpt", loss="ce", stable_if="best+1")
PAPER_GPT = dict(steps=10_681, layers=6, context=512, batch_size=256, accumulate=8,
                 warmup=700, dtype="bfloat16", base_width=256)
PRESETS = {     # name: (what it shows, flags, flags that --scale paper changes)
    "headline": (
        "CE against MSE on generated data",
        dict(),
        PAPER),
    "course": (
        "logits, hidden updates and loss over the first steps: the mechanism",
        dict(loss=["ce", "mse", "huber"], alpha=0.5, widths=[*WIDTHS[1:], 2048],
             hidden_layers=4, lrs=[0.1], steps=100, seeds=5, track=5),
        dict(widths=PAPER_WIDTHS, hidden_layers=7)),
    "phase": (
        "loss over LR and width as a map, full grid",
        dict(loss=["ce", "mse", "huber"], widths=[*WIDTHS, 2048], hidden_layers=4, seeds=1,
             search="grid", lr_range=[2 ** -7, 4.0]),
        dict(PAPER, widths=[*PAPER_WIDTHS, 8192], seeds=1)),
    "bounded": (
        "six losses: does a bounded derivative decide?",
        dict(loss=["ce", "hinge", "huber", "squared_hinge", "mse", "brier"]),
        PAPER),
    "optimal_lr": (
        "CE against MSE on Fashion-MNIST (paper: MNIST), 8-layer MLP (Fig. 1)",
        dict(data="fashion_mnist", hidden_layers=7, steps=240, widths=[*WIDTHS[1:], 2048],
             seeds=2, lr_range=[2 ** -9, 1.0], stable_if="accuracy"),
        dict(PAPER, data="mnist", widths=[*PAPER_WIDTHS, 8192, 16384],
             lr_range=[2 ** -12, 4.0])),
    "lr_transfer": (
        "loss against LR in four parameterizations, full grid (Fig. 5)",
        dict(param=["sp", "ntp", "mup", "sp_full_align"], loss="ce", widths=WIDTHS[:4],
             steps=1500, search="grid", lr_range=[2 ** -5, 4.0]),
        dict(PAPER, data="mnist", lr_range=None, stable_if="accuracy")),
    "losses": (
        "best accuracy of CE, MSE and Brier in three parameterizations (Fig. 7)",
        dict(data="fashion_mnist", loss=["ce", "mse", "brier"], seeds=2,
             param=["sp", "mup", "sp_full_align"], widths=[64, 256, 1024], base_width=64,
             stable_if="accuracy"),
        dict(PAPER, widths=[*PAPER_WIDTHS, 8192], base_width=256)),
    "regimes": (
        "exponents of updates against α (Propositions 1 and 2)",
        dict(alpha=[-0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25], widths=WIDE, seeds=8,
             lrs=[0.005], readout_scale=0.05, steps=4, track=1),
        dict(hidden_layers=7, steps=10, seeds=4)),
    "updates": (
        "update norms of every layer against width (Fig. 4)",
        dict(curves=[dict(alpha=0.5), dict(param="mup"), dict(param="sp_full_align")],
             loss="ce", widths=WIDE, seeds=8, lrs=[0.1], readout_scale=0.05, steps=10,
             track=1),
        dict(hidden_layers=7, steps=100, seeds=4, track=10)),
    "alignment": (
        "alignment over training (Fig. 2)",
        dict(alpha=0.5, loss="ce", hidden_layers=4, lrs=[0.1], steps=200, track=20,
             alignment=True),
        dict(PAPER, data="mnist", track=50)),
    "limit": (
        "distance to the widest network, and the features' change (Proposition 2)",
        dict(alpha=[0.5, 1.0], loss="ce", widths=WIDTHS[1:], lrs=[0.1], steps=100, track=10),
        dict(PAPER, widths=[*PAPER_WIDTHS, 8192], track=50)),
    "gpt": (
        "a GPT under SGD and Adam, with and without norm gains (Fig. 6)",
        dict(GPT, widths=[32, 64, 128, 256], steps=450, batch_size=4, curves=[
            dict(optimizer="sgd"),
            dict(optimizer="adam"),
            dict(optimizer="adam", norm_affine=False),
            dict(optimizer="adam", param="mup"),
            dict(optimizer="adam", param="sp_full_align")]),
        dict(PAPER_GPT, widths=[256, 1024, 4096])),
    "gpt_small": (
        "a small grid of it; the default of --model gpt",
        dict(GPT, widths=[32, 64, 128], seeds=2, steps=100, optimizer="adam"),
        dict(PAPER_GPT, widths=[256, 1024])),
    "gpt_updates": (
        "update norms of every tensor of a GPT against width",
        dict(model="gpt", loss="ce", optimizer="adam", param=["sp", "mup", "sp_full_align"],
             widths=[*WIDTHS[2:], 2048, 4096], batch_size=2, lrs=[0.001], warmup=0,
             decay="none", steps=4, track=1),
        dict(widths=PAPER_WIDTHS, base_width=256, layers=6, context=512, batch_size=64)),
}
COARSE = 4              # lattice steps between points of the coarse grid:
                        # a factor 4 at the default step
EXTENSIONS = 6          # coarse steps by which a grid may grow beyond either end
FARTHER = 3             # a point beside an optimum is at most this many times
                        # as far from it as the last one
FARTHEST = 16           # lattice steps below a flat optimum at which the search
                        # for its curvature ends
CPU_MEMORY = 2 ** 30    # bytes for a stack of several replicas on the CPU,
                        # and one more replica being drawn


# ---- which learning rates a cell still needs ----

def lattice(args, curve):
    """(the grid, a range of lattice points; {lattice point: LR} of all to which it
    may grow)."""
    if args["lrs"]:
        lrs = sorted(set(args["lrs"]))
        return range(len(lrs)), dict(enumerate(lrs))
    ends = args["lr_range"] or LR_RANGE[dict(zip(CURVE, curve))["optimizer"]]
    octaves = round(math.log2(args["lr_step"]), 12)     # of sqrt(2) a half, exactly
    low, high = (round(math.log2(lr) / octaves) for lr in ends)
    reach = range(low - EXTENSIONS * COARSE, high + EXTENSIONS * COARSE + 1)
    return range(low, high + 1), {k: 2.0 ** (k * octaves) for k in reach}


def next_points(known, grid, reach, search, hint=None, chance=math.inf):
    """Lattice points to run next, a set; empty when the cell is done. A pure
    function of what is known.

    known: {k: (losses (S,), stable (S,))} of S seeds. search "grid": the whole grid.
    coarse-to-fine: every COARSE-th point, or a few around hint = (optimum, edge)
    of a narrower width; then halves of the gaps beside the optimum and at every
    seed's edge, and ever farther points until the curvature around the optimum is
    certain (analyze.window). The grid grows, within reach, where the optimum lies
    at an end, or nothing above it is unstable for some seed; downwards also where
    all runs diverged, or none at a hint is stable and below chance, a constant
    predictor's loss.
    """
    reach = set(reach)
    if search == "grid":
        start, steps = grid, range(1, COARSE + 1)
    elif hint:
        optimum, edge = hint
        start, steps = [optimum - 2, optimum - 1, optimum, edge - 1, edge + 1], [1]
    else:
        start, steps = grid[::COARSE], [COARSE]
    want = reach.intersection(start) - known.keys()
    if want:
        return want

    # does the grid grow?
    ks, losses, stable = table_of(known)
    best, brackets = int(losses.mean(0).argmin()), analyze.edges(losses, stable)
    diverged = not (losses < analyze.DIVERGED).all(0).any()
    lost = hint and ks[0] > grid[0] and not (stable & (losses < chance)).any()
    if best == 0 or diverged or lost:
        want.update(ks[0] - i for i in steps)
    if not diverged and len(ks) - 1 in (best, *(edge for edge, _ in brackets)):
        want.update(ks[-1] + i for i in steps)
    want &= reach
    if want or search == "grid" or diverged:
        return want

    # halves of gaps; of a gap of one step its lower end, which is known
    middles = [(a + b) // 2 for a, b in itertools.pairwise(ks)]
    want.update(middles[max(best - 1, 0):best + 1])
    want.update(middles[edge] for edge, above in brackets if above is not None)

    # then the curvature around the optimum
    if want <= known.keys():
        first, last, _, open = analyze.window(np.array(ks), losses, stable.all(0))
        away = [abs(k - ks[best]) for k in ks]
        for k in range(first, last):
            near, far = sorted(away[k:k + 2])
            if far > FARTHER * near > 0:
                want.add(middles[k])
        if open and want <= known.keys() and away[0] < FARTHEST:
            want.add(ks[best] - min(FARTHER * away[0], FARTHEST))
    return want & reach - known.keys()


def table_of(known):
    """(lattice points in order, losses (S, K), stable (S, K))."""
    ks = sorted(known)
    losses, stable = zip(*(known[k] for k in ks))
    return ks, np.column_stack(losses), np.column_stack(stable)


def optimum_and_edge(known):
    """(optimum, edge) as lattice points, the edge that of the first seed to lose
    stability."""
    ks, losses, stable = table_of(known)
    best = int(losses.mean(0).argmin())
    edges = [edge for edge, _ in analyze.edges(losses, stable) if edge is not None]
    return ks[best], ks[max(best, min(edges, default=best))]


def follow(cell, column_of, criterion, search):
    """(what the search knows, points it asks for next).
    column_of: {k: column of the cell}.

    It starts anew and is shown only what it asked for, so that it takes the same
    path whatever else is in the folder, and wherever it was cut.
    """
    known = {}
    while (points := search(known)) and points <= column_of.keys():
        ks = sorted(known.keys() | points)
        columns = [column_of[k] for k in ks]
        seen = {name: cell[name][:, columns]
                for name in ("losses", "accuracies")}       # (S, K)
        stable = analyze.stability({**cell, **seen}, criterion)
        known = dict(zip(ks, zip(seen["losses"].T, stable.T)))
    return known, points


def missing_runs(args, given, curves, rows):
    """The runs that come next: of a grid all, of a search those of every curve's
    narrowest unfinished width."""
    missing = []
    for curve in curves:
        grid, lr_of = lattice(args, curve)
        k_of = {lr: k for k, lr in lr_of.items()}
        hint = None
        for width in args["widths"]:
            cell = cell_of(rows.values(), curve, width, args["seeds"])
            column_of = {k_of[lr]: i for i, lr in enumerate(cell["lr"].tolist())
                         if lr in k_of}

            def search(known):
                return next_points(known, grid, lr_of, args["search"], hint, cell["chance"])

            known, points = follow(cell, column_of, args["criterion"], search)
            new = [run for k in sorted(points)
                   for run in runs_of(given, curve, width, lr_of[k], args["seeds"])
                   if train.run_id(run) not in rows]
            missing += new
            if new and args["search"] != "grid":
                break           # what is found here tells where to look at wider nets
            # no hint from a cell with failed runs
            if not points and any(stable.any() for _, stable in known.values()):
                hint = optimum_and_edge(known)
    return missing


def run_of(given, curve, width, lr=1.0, seed=0):
    return train.configure({**given, **dict(zip(CURVE, curve)),
                            "width": width, "lr": lr, "seed": seed})


def runs_of(given, curve, width, lr, seeds):
    return [run_of(given, curve, width, lr, seed) for seed in range(seeds)]


def planned_runs(args, given, curves):
    """{width: its runs, about}: a search takes half the grid at the narrowest
    width, then a quarter."""
    planned = {}
    for width in args["widths"]:
        share = 1 if args["search"] == "grid" else 4 if planned else 2
        planned[width] = []
        for curve in curves:
            count = math.ceil(len(lattice(args, curve)[0]) / share)
            planned[width] += count * runs_of(given, curve, width, 1.0, args["seeds"])
    return planned


# ---- which runs train together ----

def replica_size(config):
    """(parameters, bytes of all that one replica takes while it trains)."""
    model, _, _ = train.build(config)
    rule, size = train.rule_of(config), train.weight_dtype(config).itemsize
    shapes = [p.shape for p in model.parameters()]
    parameters = sum(map(math.prod, shapes))
    weights = size * parameters
    # about: of a matrix what goes in and what comes out
    activations = sum(map(sum, shapes)) * (2 if config["dtype"] == "bfloat16" else size)
    activations *= samples_of(config) // config["accumulate"]
    if rule.plain and train.network_of(config, model).descend:  # without gradients
        return parameters, weights + activations

    # weights, gradients, moments; then a part's pass and its gradients, or the
    # optimizer's scratch space
    part = activations + weights * (config["accumulate"] > 1)
    scratch = 2 * weights * (rule.optimizer == "adam")
    return parameters, weights * (2 + rule.moments) + max(part, scratch)


def samples_of(config):
    """Samples of a step, or tokens."""
    return config["batch_size"] * (config["context"] if train.is_text(config) else 1)


def most_replicas(config, device, memory=None):
    """(replicas of the largest stack, the unit of which it is a multiple);
    memory: bytes free on a CUDA device, asked for if absent."""
    parameters, size = replica_size(config)
    if memory or torch.device(device).type == "cuda":
        free = memory or torch.cuda.mem_get_info(device)[0]
        return max(1, min(256, free // 2 // size)), 1
    if train.better_alone(config):                  # stacked attention loses on the CPU
        return 1, 1
    # threads share a stack's products out by replicas, so each is to find its own
    # in its cache: 2 MB of weights a thread, or one replica
    threads = torch.get_num_threads()
    in_cache = threads * max(1, 2 ** 19 // parameters)
    most = max(1, min(64, in_cache, CPU_MEMORY // size - 1))
    return most, threads if most >= threads else 1


def stacks(runs, device="cpu", size="auto", shares=1, memory=None):
    """Lists of runs that train.train can take, each of at most `size`
    (auto: most_replicas), and enough of them for `shares` ranks."""
    groups = {}
    for run in runs:
        shared = [run[name] for name in train.SETTINGS if name not in train.PER_REPLICA]
        # decay rounds otherwise
        groups.setdefault((*shared, run["weight_decay"] > 0), []).append(run)
    for group in groups.values():
        most, unit = (most_replicas(group[0], device, memory)
                      if size == "auto" else (size, 1))
        if most > 1 and not train.stackable(group[0]):
            most, unit = 1, 1

        # parts of equal sizes, in whole units
        units = math.ceil(len(group) / unit)
        parts = max(math.ceil(units / (most // unit)), min(shares, units))
        bounds = [min(len(group), unit * (units * i // parts))
                  for i in range(parts + 1)]
        yield from (group[a:b] for a, b in itertools.pairwise(bounds))


def train_or_halve(stack, splits, device, tracked, **tracking):
    """train.train; a stack that does not fit into memory is halved, a single run
    becomes a row saying so."""
    before = len(tracked)
    try:
        return train.train(stack, splits, device, tracked=tracked, **tracking)
    except (RuntimeError, MemoryError) as error:
        if not train.out_of_memory(error):
            raise
    del tracked[before:]
    width, half = stack[0]["width"], len(stack) // 2
    if half == 0:
        say_once(f"width {width}: out of memory for a single run; "
                 "it becomes a row without results")
        return [train.failed_row(stack[0], "out of memory", device)]
    say_once(f"width {width}: out of memory for {len(stack)} runs at once; "
             f"going on with {half}")
    return [row for part in (stack[:half], stack[half:])
            for row in train_or_halve(part, splits, device, tracked, **tracking)]


@functools.cache
def say_once(text):
    print(f"\n{text}", file=sys.stderr)


class Team:
    """The ranks that torchrun started, or one process alone. They need a common
    result folder, in which each writes its own files."""

    def __init__(self):
        self.store, self.rank, self.size, self.calls = None, 0, 1, itertools.count()
        if "TORCHELASTIC_RUN_ID" in os.environ:
            store, self.rank, self.size = next(torch.distributed.rendezvous("env://"))
            # ranks that torchrun started again find the store of those before
            # them, with their counters in it
            attempt = f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
            self.store = torch.distributed.PrefixStore(attempt, store)
            # as good as no limit: a rank that dies ends the others
            self.store.set_timeout(datetime.timedelta(days=365))

    def share(self, stacks):
        """The stacks that fall to this rank, widest first: whoever is free takes
        the next."""
        if self.store is None:
            yield from stacks
            return
        stacks = sorted(stacks, key=lambda stack: -stack[0]["width"])
        counter = f"stacks {next(self.calls)}"
        while (i := self.store.add(counter, 1) - 1) < len(stacks):
            yield stacks[i]

    def meet(self):
        """Waits until every rank is here."""
        meeting = next(self.calls)
        self.store.set(f"{meeting} {self.rank}", "")
        self.store.wait([f"{meeting} {rank}" for rank in range(self.size)])

    def exchange(self, out, rows):
        """Adds the rows that others wrote; nobody writes meanwhile."""
        if self.store is not None:
            self.meet()
            rows.update(read_rows(out, mend=False))
            self.meet()


def run_missing(args, given, curves, device, rows, team, load):
    """Runs what is missing, round by round, and adds each stack's rows to the
    files and to rows."""
    report = progress_line(args, given, curves, rows)
    while missing := missing_runs(args, given, curves, rows):
        for stack in team.share(stacks(missing, device, args["stack"], team.size)):
            tracked = []
            done = train_or_halve(stack, load(), device, tracked, track=args["track"],
                                  alignment=args["alignment"])
            # tracks first: a run's row says that all of it is there
            for kind, new in (("track", tracked), ("runs", done)):
                if new:
                    train.append_rows(args["out"] / rows_file(kind, team.rank), new)
            rows.update((key_of(row), row) for row in done)
            report(stack[0]["width"])
        team.exchange(args["out"], rows)


# ---- the result folder, and what is said on the way ----

def rows_file(kind, rank):
    """Where a rank writes its rows; rank 0, and a sweep without torchrun, into
    runs.jsonl."""
    return f"{kind}-rank{rank}.jsonl" if rank else f"{kind}.jsonl"


def open_folder(out, rank=0):
    """A lock on this rank's file of rows, until closed. InputError if another
    sweep holds it."""
    train.make_folder(out)
    file = open(out / rows_file("runs", rank), "a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"another sweep is writing to {out}; "
                         "wait for it, or use another --out") from None
    return file


def check_folder(out, rows, given, track):
    """Refuses a folder with rows of other settings than this sweep's, and writes
    config.json."""
    def refuse(words):
        raise InputError(f"{out} holds runs with {words}; use another --out")

    expected = functools.cache(lambda curve: run_of(given, curve, given["width"]))
    for row in rows.values():
        for name, value in expected(curve_of(row)).items():
            if name in GRID or row.get(name) == value:
                continue
            if name == "code":
                refuse(f"another version of {row['model']}, "
                       "or of a file beside it that it imports")
            refuse(f"{name} = {row.get(name)!r}, not {value!r}")

    # track is no setting of a run, so the rows do not tell it
    path = out / "config.json"
    try:
        before = (json.loads(path.read_text()).get("track", track)
                  if rows and path.exists() else track)
    except (ValueError, AttributeError):
        raise InputError(f"{path} is damaged; remove it, "
                         "if the rows beside it are of this sweep, "
                         "or use another --out") from None
    if before != track:
        refuse(f"track = {before!r}, not {track!r}")
    analyze.write_json(path, {**given, "track": track})


def progress_line(args, given, curves, rows):
    """report(width) -> a line on standard error: rewritten in place on a terminal,
    else one a minute.

    The time left goes by what runs of each width took, at a width without any by
    those of the nearest one.
    """
    planned, before = planned_runs(args, given, curves), set(rows)
    start = shown = time.monotonic()

    def report(width):
        nonlocal shown
        now, terminal = time.monotonic(), sys.stderr.isatty()
        if not terminal and now - shown < 60:
            return

        shown, done, left = now, 0, 0.0
        took = {w: [row["seconds"] for row in rows.values() if row["width"] == w]
                for w in planned}
        missing = {w: max(0, len(planned[w]) - len(took[w])) for w in planned}
        for w, more in missing.items():
            near = min((v for v in took if took[v]), key=lambda v: abs(math.log(v / w)))
            # measured: n while kernels are small, n^2 where products fill the machine
            left += more * np.mean(took[near]) * (w / near) ** 1.5
            done += len(took[w])
        # from seconds of training to seconds of this clock
        new = [row["seconds"] for key, row in rows.items() if key not in before]
        elapsed = now - start
        left *= elapsed / sum(new) if sum(new) > 0 else 1.0

        line = (f"{done}/{done + sum(missing.values())} runs, width {width}, "
                f"{len(new) / elapsed:.1f} runs/s, "
                f"{left // 60:.0f}:{left % 60:02.0f} left")
        line, end = (f"\r{line:70}", "") if terminal else (line, "\n")
        print(line, end=end, file=sys.stderr, flush=True)

    return report


def print_plans(args, given, curves):
    """param.plan of every width, once for curves that draw and train alike."""
    lr = args["lrs"][0] if args["lrs"] else train.SETTINGS["lr"][0]
    plans = {train.plan(run_of(given, curve, width, lr)): width
             for width in args["widths"] for curve in curves}
    for table, width in plans.items():
        print(f"width {width}: {table}\n")


def dry_run(args, given, curves, device):
    """Prints what the sweep would cost; times nothing but a second of matrix
    products."""
    n = 1024
    a = torch.randn(n, n, device=device)
    start, products = time.perf_counter(), 0
    while time.perf_counter() - start < 1 or not products:
        products += 1
        (a @ a).sum().item()
    rate, total = products * 2 * n ** 3 / (time.perf_counter() - start), 0

    memory, too_wide = int(args["memory"] * 2 ** 30), []
    there = memory or memory_of(device)
    columns = "{:>6} {:>6} {:>13} {:>6} {:>13} {:>13} {:>11}".format
    print(columns("width", "runs", "parameters", "stack",
                  "stack memory", "one run", "operations"))
    for width, runs in planned_runs(args, given, curves).items():
        sizes = [replica_size(run_of(given, curve, width)) for curve in curves]
        parameters, one = map(max, zip(*sizes))
        stack = max(map(len, stacks(runs, device, args["stack"], memory=memory)))
        if one > there:
            too_wide.append(width)
        # 2 a weight and sample forward, 4 backward
        operations = 6.0 * parameters * len(runs) * runs[0]["steps"] * samples_of(runs[0])
        total += operations
        sizes = [f"{size / 2 ** 20:,.0f} MiB" for size in (stack * one, one)]
        print(columns(width, len(runs), f"{parameters:,}", stack,
                      *sizes, f"{operations:.2e}"))

    for width in too_wide:
        print(f"! width {width}: a single run does not fit into "
              f"{there / 2 ** 30:.3g} GiB; use a larger --accumulate")
    print(f"{total:.2e} operations, {duration(total / rate)} "
          f"at this machine's {rate / 1e9:.0f} GFLOP/s "
          "(diverging runs stop early, small matrices are slower, "
          "and a search may need more or fewer runs)")


def memory_of(device):
    """Bytes that the device has."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def duration(seconds):
    """In the unit that a person would use."""
    for unit, size in (("years", 365.25 * 86400), ("days", 86400),
                       ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.0f} seconds"


# ---- command line ----

def sweep_flags(parser):
    group = parser.add_argument_group("sweep")
    add = group.add_argument
    add("--preset", choices=PRESETS, metavar="NAME",
        help="see below (default headline, with --model gpt gpt_small)")
    add("--scale", default="cpu", choices=("cpu", "paper"),
        help="cpu: two cores; paper: the paper's sizes, for CUDA (default cpu)")
    add("--widths", type=int, nargs="+", metavar="N", default=WIDTHS,
        help=f"widths (default {' '.join(map(str, WIDTHS))})")
    add("--seeds", type=int, default=3, metavar="N", help="seeds 0 to N-1 (default 3)")
    lrs = group.add_mutually_exclusive_group().add_argument
    lrs("--lrs", type=float, nargs="+", metavar="X", help="exactly these LRs")
    lrs("--lr-range", type=float, nargs=2, metavar=("LO", "HI"),
        help="range of LRs; grows where the optimum or the edge lies outside "
        "(default 2^-8 2^3, Adam 2^-9 2^-1)")
    add("--lr-step", type=float, default=math.sqrt(2), metavar="F",
        help="ratio of neighbouring LRs (default sqrt 2)")
    add("--search", default="coarse-to-fine", choices=("coarse-to-fine", "grid"),
        help="LRs to run: around optimum and edge, or all (default coarse-to-fine)")
    add("--stable-if", default="chance", metavar="NAME[=X]",
        help=f"{analyze.criteria_help()} (default chance)")
    add("--out", metavar="DIR",
        help="result folder (default out/PRESET and the settings given)")
    add("--no-plots", action="store_true", help="no figures")
    add("--dry-run", action="store_true", help="say what would be run, and run nothing")
    add("--memory", type=float, default=0.0, metavar="GiB",
        help="with --dry-run: memory of a CUDA device that is not here "
        "(default: that of --device)")
    add("--stack", default="auto", metavar="N",
        help="most replicas trained at once (default auto)")


def parse(argv=None):
    """(args, settings given for every run, curves); a preset replaces defaults,
    flags replace both."""
    presets = "\n".join(f"  {name:12} {words}" for name, (words, _, _) in PRESETS.items())
    parser = train.Parser(description=__doc__.splitlines()[0],
                          epilog=f"presets:\n{presets}",
                          formatter_class=argparse.RawDescriptionHelpFormatter)
    sweep_flags(parser)
    train.add_flags(parser, several=CURVE, without=("width", "lr", "seed"),
                    defaults={"loss": "ce mse"})

    # a first reading finds the preset, a second puts the flags over its defaults
    chosen, _ = parser.parse_known_args(argv)
    text = (chosen.model == "gpt"
            or chosen.model and chosen.data and train.is_text(vars(chosen)))
    name = chosen.preset or ("gpt_small" if text else "headline")
    _, flags, of_paper = PRESETS[name]
    parser.set_defaults(preset=name, curves=[{}], loss=["ce", "mse"])
    parser.set_defaults(**flags)
    if chosen.scale == "paper":
        parser.set_defaults(**of_paper)
    if chosen.lr_range:
        parser.set_defaults(lrs=None)       # a range replaces a preset's list
    args = vars(parser.parse_args(argv))

    args["out"] = Path(args["out"] or default_out(name, vars(chosen)))
    check_args(args)
    args["criterion"] = analyze.criterion_of(args["stable_if"])
    args["widths"] = sorted(set(args["widths"]))
    if args["lrs"]:
        args["search"] = "grid"
    given = {name: value for name, value in train.settings_given(args).items()
             if name not in GRID}
    given["width"] = args["widths"][0]      # the default may be no multiple of --head-dim
    curves = curves_of(args, given)

    # InputError now, and not after hours, for what no run accepts
    for curve, width, lr in itertools.product(curves, args["widths"], args["lrs"] or [1.0]):
        run_of(given, curve, width, lr)
    for width in args["widths"]:
        train.build(run_of(given, curves[0], width))
    return args, given, curves


def as_list(value):
    return value if isinstance(value, list) else [value]


def default_out(preset, chosen):
    """out/PRESET, and the settings given: other curves do not overwrite a preset's
    summary."""
    parts = [preset]
    for name, value in chosen.items():
        if name in train.SETTINGS and value not in (None, "gpt", "mlp"):
            parts.append("-".join(map(str, [name, *as_list(value)])))
    return "out/" + re.sub(r"[^\w.+-]+", "_", "_".join(parts))


CHECKS = {      # flags of the sweep
    "seeds": train.COUNT,
    "track": train.WHOLE,
    "memory": train.NONNEGATIVE,
    "lr_step": Kind(float, "a number from 1.01 to 1000", lambda v: 1.01 <= v <= 1000),
    "lr_range": Kind(list, "two numbers, the lower one first, within 1e-30 and 1e30",
                     lambda v: not v or 1e-30 < v[0] < v[1] < 1e30),
    "stack": Kind(str, "auto or a whole number, at least 1",
                  lambda v: v == "auto" or v.isdecimal() and int(v)),
}


def check_args(args):
    """InputError for flags of the sweep that are out of range; turns --stack into
    a number."""
    for name, kind in CHECKS.items():
        train.require(args, name, kind.holds(args[name]), kind.words)
    if args["stack"] != "auto":
        args["stack"] = int(args["stack"])


def curves_of(args, given):
    """Values of CURVE, a tuple per curve: the preset's, crossed with the lists
    given, loss innermost."""
    lists = {name: as_list(args[name]) for name in CURVE[::-1] if args[name] is not None}
    runs = [train.configure({**given, **preset, **dict(zip(lists, values))})
            for preset, values in itertools.product(
                args["curves"], itertools.product(*lists.values()))]
    return list(dict.fromkeys(map(curve_of, runs)))


def main():
    args, given, curves = parse()
    out, track, device = args["out"], args["track"], train.choose_device(args["device"])
    first = run_of(given, curves[0], given["width"])
    load = functools.cache(lambda: data.load(first, args["data_dir"], device))
    if train.is_text(first):
        # the data tell the vocabulary, which is part of a run's identity
        given["vocab_size"] = load().classes
    if args["plan"]:
        return print_plans(args, given, curves)
    if args["dry_run"]:
        return dry_run(args, given, curves, device)

    team = Team()
    leads, rows = team.rank == 0, {}
    with open_folder(out, team.rank):
        if leads:
            rows = read_rows(out)
            if track:
                # sound, and whole, before more is appended
                read_rows(out, "track*.jsonl")
            check_folder(out, rows, given, track)
            print(f"{args['preset']}: {first['model']} on {first['data']}, "
                  f"{len(curves)} curves, widths {' '.join(map(str, args['widths']))}, "
                  f"{args['seeds']} seeds, {first['steps']} steps, "
                  f"{args['search']} over LRs, into {out}", file=sys.stderr)
        if rows:
            print(f"{out}: {len(rows)} runs found, going on", file=sys.stderr)
        team.exchange(out, rows)
        try:
            run_missing(args, given, curves, device, rows, team, load)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"interrupted: {len(rows)} finished runs are kept in {out}; "
                "the same command goes on") from None
        print(file=sys.stderr)

        if not leads:
            return
        tracks = read_rows(out, "track*.jsonl", mend=False) if track else {}
        command = " ".join(["python", *sys.argv])
        analyze.report(out, list(rows.values()), tracks, args["stable_if"], command,
                       curves, args["widths"], args["seeds"])
    if not args["no_plots"]:
        import plots        # matplotlib takes a second to load
        try:
            print(*plots.draw(out), sep="\n")
        except plots.PlotError as error:
            raise InputError(str(error)) from None


if __name__ == "__main__":
    train.command_line(main)
