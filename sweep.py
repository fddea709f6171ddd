"""Sweeps the learning rate over widths, and fits how its optimum and its stability
edge (the largest stable learning rate) scale.

    python sweep.py                         # the headline: CE n^-1/2 against MSE n^-1
    python sweep.py --preset optimal_lr     # Fashion-MNIST, 8-layer MLP (Fig. 1 and 5)
    python sweep.py --widths 64 256 1024 --param sp mup --optimizer adam --lr-range 1e-5 1

One row per run goes to <out>/runs.jsonl as soon as its stack has finished. A run
that is there is not run again, so an interrupted sweep resumes when the same
command is run again. analyze.py needs nothing but those rows. Figures and
propositions: arXiv 2505.22491.

    curve     one (loss, param, optimizer, alpha, ...); on it width, LR and seed vary
    LR grid   LRs are step^k for whole k, so that grids of all widths, also
              extended ones, share points k
    hint      (optimum, edge) of a narrower width, where the search of a wider one begins
    rank      one of the processes that torchrun started, or the only one
"""
import os
if __name__ == "__main__":      # before torch loads MKL: the same bits in any stack
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

import argparse
import datetime
import functools
import itertools
import json
import math
import re
import sys
import time
from pathlib import Path

try:
    import fcntl
except ImportError:             # Windows
    import msvcrt
    fcntl = None
import numpy as np
import torch

import analyze
import config as settings
import data
import estimate
import train
from analyze import cell_of, key_of, read_rows
from config import CURVE, GRID, Check, InputError, checked, curve_of

LR_RANGE = {"sgd": (2 ** -8, 2 ** 3), "adam": (2 ** -9, 2 ** -1)}
WIDTHS = [64, 128, 256, 512, 1024]
WIDE = [512, 1024, 2048, 4096]          # where a few steps are all that is trained
PAPER_WIDTHS = [256, 512, 1024, 2048, 4096]
PAPER = dict(widths=PAPER_WIDTHS, seeds=4, hidden_layers=7, steps=937)
GPT = dict(model="gpt", loss="ce")
PAPER_GPT = dict(steps=10_681, layers=6, context=512, batch_size=256, accumulate=8,
                 warmup=700, dtype="bfloat16", base_width=256)
PRESETS = {     # name: (what it shows, flags, flags that --scale paper changes)
    "headline": ("CE against MSE on generated data",
        dict(),
        PAPER),
    "course": ("logits, hidden updates and loss over the first steps: the mechanism",
        dict(loss=["ce", "mse", "huber"], alpha=0.5, widths=[*WIDTHS[1:], 2048],
             hidden_layers=4, lrs=[0.1], readout_scale=0.05, steps=100, seeds=5, track=5),
        dict(widths=PAPER_WIDTHS, hidden_layers=7)),
    "phase": ("loss over LR and width as a map, full grid",
        dict(loss=["ce", "mse", "huber"], widths=[*WIDTHS, 2048], hidden_layers=4, seeds=1,
             search="grid", lr_range=[2 ** -7, 4.0]),
        dict(PAPER, widths=[*PAPER_WIDTHS, 8192], seeds=1)),
    "bounded": ("six losses: does a bounded derivative decide?",
        dict(loss=["ce", "hinge", "huber", "squared_hinge", "mse", "brier"]),
        PAPER),
    "optimal_lr": ("CE against MSE on Fashion-MNIST (paper: MNIST), 8-layer MLP (Fig. 1)",
        dict(data="fashion_mnist", hidden_layers=7, steps=240, widths=[*WIDTHS[1:], 2048],
             seeds=2, lr_range=[2 ** -9, 1.0], stable_if="accuracy"),
        dict(PAPER, data="mnist", widths=[*PAPER_WIDTHS, 8192, 16384],
             lr_range=[2 ** -12, 4.0])),
    "lr_transfer": ("loss against LR in four parameterizations, full grid (Fig. 5)",
        dict(param=["sp", "ntp", "mup", "sp_full_align"], loss="ce", widths=WIDTHS[:4],
             train_size=200_000, decay="cosine", steps=1500, search="grid",
             lr_range=[2 ** -5, 4.0]),
        dict(PAPER, data="mnist", lr_range=None, stable_if="accuracy")),
    "losses": ("best accuracy of CE, MSE and Brier in three parameterizations (Fig. 7)",
        dict(data="fashion_mnist", loss=["ce", "mse", "brier"], seeds=2,
             param=["sp", "mup", "sp_full_align"], widths=[64, 256, 1024], base_width=64,
             stable_if="accuracy"),
        dict(PAPER, widths=[*PAPER_WIDTHS, 8192], base_width=256)),
    "regimes": ("exponents of updates against α (Propositions 1 and 2)",
        dict(alpha=[-0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25], widths=WIDE, seeds=8,
             lrs=[0.005], readout_scale=0.05, steps=4, track=1),
        dict(hidden_layers=7, steps=10, seeds=4)),
    "updates": ("update norms of every layer against width (Fig. 4)",
        dict(curves=[dict(alpha=0.5), dict(param="mup"), dict(param="sp_full_align")],
             loss="ce", widths=WIDE, seeds=8, lrs=[0.1], readout_scale=0.05, steps=10,
             track=1),
        dict(hidden_layers=7, steps=100, seeds=4, track=10)),
    "alignment": ("alignment over training (Fig. 2)",
        dict(alpha=0.5, loss="ce", hidden_layers=4, lrs=[0.1], steps=200, track=20,
             alignment=True),
        dict(PAPER, data="mnist", track=50)),
    "limit": ("spread of the features' kernels over initializations (Proposition 2)",
        dict(curves=[dict(alpha=0.5), dict(alpha=1.0), dict(param="mup")], loss="ce",
             widths=[*WIDTHS[1:], 2048], seeds=6, lrs=[0.1], readout_scale=0.05, steps=4,
             track=1, kernels=True, same_batches=True),
        dict(widths=[*PAPER_WIDTHS, 8192])),
    "binding": ("edge exponents with one role frozen in turn",
        dict(curves=[dict(lr_factor=frozen) for frozen in
                     ("", "input=0", "hidden=0", "output=0", "hidden=0 input=0",
                      "hidden=0 output=0")],
             stable_if="accuracy=0.6"),
        PAPER),
    "gpt_binding": ("the same for the norm gains of a GPT under Adam",
        dict(GPT, optimizer="adam", widths=[32, 64, 128, 256], steps=450, batch_size=4, curves=[
            dict(lr_factor=frozen) for frozen in
            ("", "blocks.*norm*=0", "norm.weight=0", "vector=0")]),
        dict(PAPER_GPT, widths=[256, 1024, 4096])),
    "gpt": ("a GPT under SGD and Adam, with and without norm gains (Fig. 6)",
        dict(GPT, widths=[32, 64, 128, 256], steps=450, batch_size=4, curves=[
            dict(optimizer="sgd"),
            dict(optimizer="adam"),
            dict(optimizer="adam", norm_affine=False),
            dict(optimizer="adam", param="mup"),
            dict(optimizer="adam", param="sp_full_align")]),
        dict(PAPER_GPT, widths=[256, 1024, 4096])),
    "gpt_small": ("a small grid of it; the default of --model gpt",
        dict(GPT, widths=[32, 64, 128], seeds=2, steps=100, optimizer="adam"),
        dict(PAPER_GPT, widths=[256, 1024])),
    "gpt_updates": ("update norms of every tensor of a GPT against width",
        dict(model="gpt", loss="ce", optimizer="adam", param=["sp", "mup", "sp_full_align"],
             widths=[*WIDTHS[2:], 2048, 4096], batch_size=2, lrs=[0.001], warmup=0,
             decay="none", steps=4, track=1),
        dict(widths=PAPER_WIDTHS, base_width=256, layers=6, context=512, batch_size=64)),
}
COARSE_STEP = 4         # grid points between points of the coarse grid:
                        # a factor 4 at the default step
EXTENSIONS = 6          # coarse steps by which a grid may grow beyond either end
MAX_GAP_RATIO = 3       # a point beside an optimum is at most this many times
                        # as far from it as the last one
MAX_DISTANCE_BELOW = 16     # grid points below a flat optimum at which the search
                            # for its curvature ends


# ---- which learning rates a cell still needs ----

def lr_grid(args, curve):
    """Return (the grid, a range of points k; {k: LR} of all points to which it may grow)."""
    if args["lrs"]:
        lrs = sorted(set(args["lrs"]))
        return range(len(lrs)), dict(enumerate(lrs))
    ends = args["lr_range"] or LR_RANGE[dict(zip(CURVE, curve))["optimizer"]]
    octaves = round(math.log2(args["lr_step"]), 12)     # of sqrt(2) a half, exactly
    low, high = (round(math.log2(lr) / octaves) for lr in ends)
    reach = range(low - EXTENSIONS * COARSE_STEP, high + EXTENSIONS * COARSE_STEP + 1)
    return range(low, high + 1), {k: 2.0 ** (k * octaves) for k in reach}


def next_points(known, grid, reach, search, hint=None, chance=math.inf):
    """Return the set of points to run next, empty when the cell is done. A pure
    function of what is known.

    known: {k: (losses (S,), stable (S,))} of S seeds. search "grid": the whole grid.
    coarse-to-fine: every COARSE_STEP-th point, or a few around hint = (optimum, edge)
    of a narrower width; then halves of the gaps beside the optimum and at every
    seed's edge, and ever farther points until the curvature around the optimum is
    certain (estimate.window). The grid grows, within reach, where the optimum lies
    at an end, or nothing above it is unstable for some seed; downwards also where
    all runs diverged, or none at a hint is stable and below chance, a constant
    predictor's loss.
    """
    reach = set(reach)
    if search == "grid":
        start, steps = grid, range(1, COARSE_STEP + 1)
    elif hint:
        optimum, edge = hint
        start, steps = [optimum - 2, optimum - 1, optimum, edge - 1, edge + 1], [1]
    else:
        start, steps = grid[::COARSE_STEP], [COARSE_STEP]
    new_points = reach.intersection(start) - known.keys()
    if new_points:
        return new_points

    # does the grid grow?
    ks, losses, stable = as_arrays(known)
    best, brackets = int(losses.mean(0).argmin()), estimate.edges(losses, stable)
    all_diverged = not (losses < estimate.DIVERGED).all(0).any()
    hint_is_unstable = hint and ks[0] > grid[0] and not (stable & (losses < chance)).any()
    if best == 0 or all_diverged or hint_is_unstable:
        new_points.update(ks[0] - i for i in steps)
    if not all_diverged and len(ks) - 1 in (best, *(edge for edge, _ in brackets)):
        new_points.update(ks[-1] + i for i in steps)
    new_points &= reach
    if new_points or search == "grid" or all_diverged:
        return new_points

    # halves of gaps; of a gap of one step its lower end, which is known
    middles = [(a + b) // 2 for a, b in itertools.pairwise(ks)]
    new_points.update(middles[max(best - 1, 0):best + 1])
    new_points.update(middles[edge] for edge, above in brackets if above is not None)

    # then the curvature around the optimum
    if new_points <= known.keys():
        first, last, _, extends_below = estimate.window(np.array(ks), losses, stable.all(0))
        away = [abs(k - ks[best]) for k in ks]
        for k in range(first, last):
            near, far = sorted(away[k:k + 2])
            if far > MAX_GAP_RATIO * near > 0:
                new_points.add(middles[k])
        if extends_below and new_points <= known.keys() and away[0] < MAX_DISTANCE_BELOW:
            new_points.add(ks[best] - min(MAX_GAP_RATIO * away[0], MAX_DISTANCE_BELOW))
    return new_points & reach - known.keys()


def as_arrays(known):
    """Return (points in order, losses (S, K), stable (S, K))."""
    ks = sorted(known)
    losses, stable = zip(*(known[k] for k in ks))
    return ks, np.column_stack(losses), np.column_stack(stable)


def optimum_and_edge(known):
    """Return (optimum, edge) as points, the edge that of the first seed to lose stability."""
    ks, losses, stable = as_arrays(known)
    best = int(losses.mean(0).argmin())
    edges = [edge for edge, _ in estimate.edges(losses, stable) if edge is not None]
    return ks[best], ks[max(best, min(edges, default=best))]


def replay_search(cell, column_of, criterion, search):
    """Return (what the search knows, the points it asks for next).

    column_of: {k: column of the cell}. The search starts anew and is shown only
    what it asked for, so that it takes the same path whatever else is in the
    folder, and wherever it was interrupted.
    """
    known = {}
    while (points := search(known)) and points <= column_of.keys():
        ks = sorted(known.keys() | points)
        columns = [column_of[k] for k in ks]
        shown = {name: cell[name][:, columns] for name in ("losses", "accuracies")}     # (S, K)
        stable = analyze.stability({**cell, **shown}, criterion)
        known = dict(zip(ks, zip(shown["losses"].T, stable.T)))
    return known, points


def missing_runs(args, fixed, curves, rows):
    """Return the next runs: a grid's all, a search's of each curve's narrowest unfinished width."""
    missing = []
    for curve in curves:
        grid, lr_of = lr_grid(args, curve)
        k_of = {lr: k for k, lr in lr_of.items()}
        hint = None
        for width in args["widths"]:
            cell = cell_of(rows.values(), curve, width, args["seeds"])
            column_of = {k_of[lr]: i for i, lr in enumerate(cell["lr"].tolist()) if lr in k_of}

            def search(known):
                return next_points(known, grid, lr_of, args["search"], hint, cell["chance"])

            known, points = replay_search(cell, column_of, args["criterion"], search)
            new = [run for k in sorted(points)
                   for run in runs_of(fixed, curve, width, lr_of[k], args["seeds"])
                   if settings.run_id(run) not in rows]
            missing += new
            if new and args["search"] != "grid":
                break           # what is found here tells where to look at wider nets
            # no hint from a cell with failed runs
            if not points and any(stable.any() for _, stable in known.values()):
                hint = optimum_and_edge(known)
    return missing


def run_of(fixed, curve, width, lr=1.0, seed=0):
    return settings.configure({**fixed, **dict(zip(CURVE, curve)),
                               "width": width, "lr": lr, "seed": seed})


def runs_of(fixed, curve, width, lr, seeds):
    return [run_of(fixed, curve, width, lr, seed) for seed in range(seeds)]


def planned_counts(args, curves):
    """Return {width: about how many runs}: a search takes half the grid at the narrowest
    width, then a quarter."""
    counts = {}
    for width in args["widths"]:
        share = 1 if args["search"] == "grid" else 4 if counts else 2
        counts[width] = args["seeds"] * sum(math.ceil(len(lr_grid(args, curve)[0]) / share)
                                            for curve in curves)
    return counts


# ---- which runs train together ----

def parameters_of(config, shape):
    return sum(p.numel() for p in train.build(config, shape)[0].parameters())


def largest_stack(config, shape, device):
    """Return (replicas of the largest stack, the unit of which it is a multiple).

    On CUDA as many as train at all: a stack that does not fit into memory is halved.
    On the CPU threads share a stack's products out by replicas, so each is to find
    its own in its cache: 2 MB of weights a thread, or one replica.
    """
    if torch.device(device).type == "cuda":
        return 256, 1
    model, _, _ = train.build(config, shape)
    if train.trains_alone(config, model):
        return 1, 1
    threads = torch.get_num_threads()
    most = min(64, threads * max(1, 2 ** 19 // parameters_of(config, shape)))
    return most, threads if most >= threads else 1


def stacks(runs, shape, device="cpu", size="auto", ranks=1):
    """Yield lists of runs for train.train, at most `size` each, and enough for all ranks."""
    groups = {}
    for run in runs:
        shared = [run[name] for name in settings.SETTINGS if name not in settings.PER_REPLICA]
        # decay rounds otherwise; a custom model may draw buffers from its seed
        seed = run["seed"] if settings.is_custom(run) else None
        groups.setdefault((*shared, run["weight_decay"] > 0, seed), []).append(run)
    for group in groups.values():
        most, unit = largest_stack(group[0], shape, device) if size == "auto" else (size, 1)
        # parts of equal sizes, in whole units
        units = math.ceil(len(group) / unit)
        parts = max(math.ceil(units / (most // unit)), min(ranks, units))
        bounds = [min(len(group), unit * (units * i // parts)) for i in range(parts + 1)]
        yield from (group[a:b] for a, b in itertools.pairwise(bounds))


def train_or_halve(batch, splits, device, tracked, **tracking):
    """Return train.train's rows; a batch that does not fit into memory is halved, and a
    single run that does not becomes a row that says so."""
    before = len(tracked)
    try:
        return train.train(batch, splits, device, tracked=tracked, **tracking)
    except train.CannotStack as error:
        say_once(f"{str(error).partition(';')[0]}; they train one by one")
        parts = [[run] for run in batch]
    except (RuntimeError, MemoryError) as error:
        if not settings.is_out_of_memory(error):
            raise
        del tracked[before:]
        words, half = f"width {batch[0]['width']}: out of memory for", len(batch) // 2
        if half == 0:
            say_once(f"{words} a single run; it becomes a row without results")
            return [train.failed_row(batch[0], "out of memory", device)]
        say_once(f"{words} {len(batch)} runs at once; continuing with {half}")
        parts = batch[:half], batch[half:]
    return [row for part in parts
            for row in train_or_halve(part, splits, device, tracked, **tracking)]


@functools.cache
def say_once(text):
    print(f"\n{text}", file=sys.stderr)


class Ranks:
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

    def share(self, batches):
        """Yield this rank's batches, widest first: whoever is free takes the next."""
        if self.store is None:
            yield from batches
            return
        batches = sorted(batches, key=lambda batch: -batch[0]["width"])
        counter = f"batches {next(self.calls)}"
        while (i := self.store.add(counter, 1) - 1) < len(batches):
            yield batches[i]

    def meet(self):
        """Wait until every rank is here."""
        meeting = next(self.calls)
        self.store.set(f"{meeting} {self.rank}", "")
        self.store.wait([f"{meeting} {rank}" for rank in range(self.size)])

    def exchange(self, out, rows):
        """Add the rows that others wrote; nobody writes meanwhile."""
        if self.store is not None:
            self.meet()
            rows.update(read_rows(out))
            self.meet()


def run_missing(args, fixed, curves, splits, device, rows, ranks):
    """Run what is missing, round by round, and add each batch's rows to files and to rows."""
    report = progress_line(args, curves, rows)
    shape = train.shape_of(run_of(fixed, curves[0], fixed["width"]), splits)
    while missing := missing_runs(args, fixed, curves, rows):
        for batch in ranks.share(list(stacks(missing, shape, device, args["stack"], ranks.size))):
            tracked = []
            done = train_or_halve(batch, splits, device, tracked, track=args["track"],
                                  alignment=args["alignment"], kernels=args["kernels"])
            # tracks first: a run's row says that all of it is there
            for kind, new in (("track", tracked), ("runs", done)):
                if new:
                    train.append_rows(args["out"] / rows_file(kind, ranks.rank), new)
            rows.update((key_of(row), row) for row in done)
            report(batch[0]["width"])
        ranks.exchange(args["out"], rows)


# ---- the result folder, and what is said on the way ----

def rows_file(kind, rank):
    """Return where a rank writes its rows; rank 0 into runs.jsonl, as without torchrun."""
    return f"{kind}-rank{rank}.jsonl" if rank else f"{kind}.jsonl"


def open_folder(out, rank=0):
    """Return this rank's file of rows, locked until it is closed, or raise InputError."""
    out.mkdir(parents=True, exist_ok=True)
    file = open(out / rows_file("runs", rank), "a")
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            file.seek(2 ** 30)          # a byte that nobody reads
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError:
        file.close()
        raise InputError(f"another sweep is writing to {out}; "
                         "wait for it, or use another --out") from None
    return file


def check_folder(out, rows, fixed, tracking):
    """Refuse a folder with rows of other settings than this sweep's, and write config.json."""
    def refuse(words):
        raise InputError(f"{out} holds runs with {words}; use another --out")

    expected = functools.cache(lambda curve: run_of(fixed, curve, fixed["width"]))
    for row in rows.values():
        for name, value in expected(curve_of(row)).items():
            if name in GRID or row[name] == value:
                continue
            if name == "code":
                refuse(f"another version of {row['model']}, "
                       "or of a module that it imports from its folder")
            if name == "data_hash":
                refuse(f"another content of {row['data']}")
            refuse(f"{name} = {row[name]!r}, not {value!r}")

    # tracking is no setting of a run, so the rows do not tell it
    path = out / "config.json"
    try:
        before = json.loads(path.read_text()) if rows and path.exists() else {}
        before = {name: before.get(name, value) for name, value in tracking.items()}
    except (ValueError, AttributeError):
        raise InputError(f"{path} is damaged; remove it, if the rows beside it are of this sweep, "
                         "or use another --out") from None
    for name, value in tracking.items():
        if before[name] != value:
            refuse(f"{name} = {before[name]!r}, not {value!r}")
    data.write_json(path, {**fixed, **tracking})


def progress_line(args, curves, rows):
    """Return report(width), which prints progress, if not on a terminal once a minute.

    The time left goes by what runs took at each width, or else at the nearest one.
    """
    planned, before = planned_counts(args, curves), set(rows)
    start = shown = time.monotonic()

    def report(width):
        nonlocal shown
        now, terminal = time.monotonic(), sys.stderr.isatty()
        if not terminal and now - shown < 60:
            return

        shown, done, left, missing = now, 0, 0.0, 0
        took = {w: [row["seconds"] for row in rows.values() if row["width"] == w] for w in planned}
        for w, count in planned.items():
            near = min((v for v in took if took[v]), key=lambda v: abs(math.log(v / w)))
            more = max(0, count - len(took[w]))
            # measured: n while kernels are small, n^2 where products fill the machine
            left += more * np.mean(took[near]) * (w / near) ** 1.5
            missing, done = missing + more, done + len(took[w])
        # from seconds of training to seconds of this clock
        new = [row["seconds"] for key, row in rows.items() if key not in before]
        elapsed = now - start
        left = round(left * elapsed / sum(new) if sum(new) > 0 else left)

        line = (f"{done}/{done + missing} runs, width {width}, "
                f"{len(new) / elapsed:.1f} runs/s, {left // 60}:{left % 60:02} left")
        line, end = (f"\r{line:70}", "") if terminal else (line, "\n")
        print(line, end=end, file=sys.stderr, flush=True)

    return report


def print_plans(args, fixed, curves, splits):
    """Print param.plan of every width, once for curves that draw and train the same."""
    lr = args["lrs"][0] if args["lrs"] else settings.SETTINGS["lr"][0]
    for width in args["widths"]:
        runs = {settings.param_args(run): run
                for run in (run_of(fixed, curve, width, lr) for curve in curves)}
        for run in runs.values():
            print(f"width {width}: {train.plan(run, splits)}\n")


def dry_run(args, fixed, curves, shape):
    """Print how many runs and parameters there are at every width."""
    print(f"{'width':>6} {'runs':>6} {'parameters':>13}")
    for width, count in planned_counts(args, curves).items():
        parameters = parameters_of(run_of(fixed, curves[0], width), shape)
        print(f"{width:>6} {count:>6} {parameters:>13,}")
    print("(a search may need more or fewer runs; diverging runs stop early)")


# ---- command line ----

def sweep_flags(parser):
    group = parser.add_argument_group("sweep")
    add = group.add_argument
    add("--preset", choices=PRESETS, metavar="NAME",
        help="see below (default headline, with --model gpt gpt_small)")
    add("--scale", default="cpu", choices=("cpu", "paper"),
        help="cpu: two cores; paper: the paper's sizes, for CUDA (default cpu)")
    add("--widths", type=settings.whole_number, nargs="+", metavar="N", default=WIDTHS,
        help=f"widths (default {' '.join(map(str, WIDTHS))})")
    add("--seeds", type=settings.whole_number, default=3, metavar="N",
        help="how many seeds, from 0 to N-1 (default 3)")
    lrs = group.add_mutually_exclusive_group().add_argument
    lrs("--lrs", type=settings.number, nargs="+", metavar="X", help="exactly these LRs")
    lrs("--lr-range", type=settings.number, nargs=2, metavar=("LO", "HI"),
        help="range of LRs; grows where the optimum or the edge lies outside "
        "(default 2^-8 2^3, Adam 2^-9 2^-1)")
    add("--lr-step", type=settings.number, default=math.sqrt(2), metavar="F",
        help="ratio of neighbouring LRs (default sqrt 2)")
    add("--search", default="coarse-to-fine", choices=("coarse-to-fine", "grid"),
        help="LRs to run: around optimum and edge, or all (default coarse-to-fine)")
    add("--stable-if", metavar="NAME[=X]",
        help=f"{analyze.criteria_help()}; on text learned is the default (default chance)")
    add("--out", metavar="DIR", help="result folder (default out/PRESET and the settings given)")
    add("--no-plots", action="store_true", help="no figures")
    add("--dry-run", action="store_true",
        help="print runs and parameters at every width, and run nothing")
    add("--stack", default="auto", metavar="N", help="most replicas trained at once (default auto)")


def parse(argv=None):
    """Return (args, the settings that all runs share, curves).

    A preset replaces defaults, flags replace both.
    """
    presets = "\n".join(f"  {name:12} {description}"
                        for name, (description, _, _) in PRESETS.items())
    parser = settings.Parser(description=__doc__.partition("\n\n")[0],
                             epilog=f"presets:\n{presets}",
                             formatter_class=argparse.RawDescriptionHelpFormatter)
    sweep_flags(parser)
    settings.add_flags(parser, several=CURVE, without=("width", "lr", "seed"),
                       defaults={"loss": "ce mse"})

    # a first pass finds the preset, a second puts the flags over its defaults
    first_pass, _ = parser.parse_known_args(argv)
    text = (first_pass.model == "gpt" or first_pass.model and first_pass.data
            and data.is_text(first_pass.data))
    name = first_pass.preset or ("gpt_small" if text else "headline")
    _, preset, paper_preset = PRESETS[name]
    parser.set_defaults(preset=name, curves=[{}], loss=["ce", "mse"])
    parser.set_defaults(**preset)
    if first_pass.scale == "paper":
        parser.set_defaults(**paper_preset)
    if first_pass.lr_range:
        parser.set_defaults(lrs=None)       # a range replaces a preset's list
    args = vars(parser.parse_args(argv))

    args["out"] = Path(args["out"] or default_out(name, vars(first_pass)))
    for flag, check in CHECKS.items():
        if args[flag] is not None:
            args[flag] = checked(flag, args[flag], check)
    args["stack"] = args["stack"] if args["stack"] == "auto" else int(args["stack"])
    args["widths"] = sorted(set(args["widths"]))
    if args["lrs"]:
        args["search"] = "grid"
    fixed = {name: value for name, value in settings.settings_of_flags(args).items()
             if name not in GRID}
    fixed["width"] = args["widths"][0]      # the default may be no multiple of --head-dim
    curves = curves_of(args, fixed)

    # InputError now, and not after hours, for what no run accepts
    for curve, width, lr in itertools.product(curves, args["widths"], args["lrs"] or [1.0]):
        run = run_of(fixed, curve, width, lr)
    args["stable_if"] = args["stable_if"] or analyze.default_criterion(run)
    args["criterion"] = analyze.parse_criterion(args["stable_if"])
    return args, fixed, curves


def as_list(value):
    return value if isinstance(value, list) else [value]


def default_out(preset, first_pass):
    """Return out/PRESET_SETTINGS: other curves do not overwrite a preset's summary."""
    parts = [preset]
    for name, value in first_pass.items():
        if name in settings.SETTINGS and value not in (None, "gpt", "mlp"):
            parts.append("-".join(map(str, [name, *as_list(value)])))
    return "out/" + re.sub(r"[^\w.+-]+", "_", "_".join(parts))


CHECKS = {      # flags of the sweep
    "seeds": settings.POSITIVE_INT,
    "track": settings.NON_NEGATIVE_INT,
    "lr_step": Check(float, "a number from 1.01 to 1000", lambda v: 1.01 <= v <= 1000),
    "lr_range": Check(list, "two numbers, the lower one first, within 1e-30 and 1e30",
                      lambda v: 1e-30 < v[0] < v[1] < 1e30),
    "stack": Check(str, "auto or a whole number, at least 1",
                   lambda v: v == "auto" or v.isdecimal() and int(v) > 0),
}


def curves_of(args, fixed):
    """Return the curves: the preset's, crossed with the lists given, loss innermost."""
    lists = {name: as_list(args[name]) for name in CURVE[::-1] if args[name] is not None}
    if "lr_factor" in lists:            # several words of one setting
        lists["lr_factor"] = [" ".join(lists["lr_factor"])]
    runs = [settings.configure({**fixed, **preset, **dict(zip(lists, values))})
            for preset, values in itertools.product(
                args["curves"], itertools.product(*lists.values()))]
    return list(dict.fromkeys(map(curve_of, runs)))


def main(argv=None):
    args, fixed, curves = parse(argv)
    out, device = args["out"], settings.choose_device(args["device"])
    first = run_of(fixed, curves[0], fixed["width"])
    splits = None
    if first["data"] not in data.SHAPES or not args["dry_run"] and not args["plan"]:
        splits = data.load(first, args["data_dir"], device)
        # what the data tell of themselves is part of a run's identity
        fixed.update((name, value) for name, value in settings.of_data(first, splits).items()
                     if first[name] != value)
        print(splits.describe(), file=sys.stderr)
    shape = train.shape_of(first, splits)
    for width in args["widths"]:        # InputError for what the model refuses
        train.build(run_of(fixed, curves[0], width), shape)
    if args["plan"]:
        return print_plans(args, fixed, curves, splits)
    if args["dry_run"]:
        return dry_run(args, fixed, curves, shape)

    ranks, rows = Ranks(), {}
    with open_folder(out, ranks.rank):
        if ranks.rank == 0:
            rows = read_rows(out, repair=True)
            if args["track"]:
                # sound, and whole, before more is appended
                read_rows(out, "track*.jsonl", repair=True)
            tracking = {name: args[name] for name in ("track", "alignment", "kernels")}
            check_folder(out, rows, fixed, tracking)
            print(f"{args['preset']}: {first['model']} on {first['data']}, {len(curves)} curves, "
                  f"widths {' '.join(map(str, args['widths']))}, {args['seeds']} seeds, "
                  f"{first['steps']} steps, {args['search']} over LRs, into {out}", file=sys.stderr)
        if rows:
            print(f"{out}: resuming after {len(rows)} runs", file=sys.stderr)
        ranks.exchange(out, rows)
        try:
            run_missing(args, fixed, curves, splits, device, rows, ranks)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"interrupted: {len(rows)} finished runs are kept in {out}; "
                "run the same command again to resume") from None
        print(file=sys.stderr)
        if ranks.rank == 0:
            command = sys.argv if argv is None else ["sweep.py", *argv]
            analyze.report(out, args["stable_if"], " ".join(["python", *command]))
            if not args["no_plots"]:
                analyze.draw(out)


if __name__ == "__main__":
    settings.command_line(main)
