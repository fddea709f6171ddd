"""Sweeps the learning rate over widths, and fits how the optimal and the largest stable one scale.

    python sweep.py                             # the headline on generated data: CE n^-1/2 against MSE n^-1
    python sweep.py --preset optimal_lr         # Fashion-MNIST, 8-layer MLP (arXiv 2505.22491, Fig. 1 and 5)
    python sweep.py --widths 64 256 1024 --param sp mup --optimizer adam --lr-range 1e-5 1

One row per run goes to <out>/runs.jsonl as soon as its stack is done; what is there is not run again, so a
killed sweep started again goes on. analyze.py then needs nothing but those rows.

    curve     one (loss, param, optimizer, alpha, ...): a network's settings but width, learning rate and seed
    lattice   LRs are step^k for whole k, so grids of different widths, and extended grids, share their points
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
from train import InputError

LR_RANGE = {"sgd": (2 ** -8, 2 ** 3), "adam": (2 ** -9, 2 ** -1)}
WIDTHS = [64, 128, 256, 512, 1024]
WIDE = [512, 1024, 2048, 4096]          # where a few steps are all that is trained
PAPER_WIDTHS = [256, 512, 1024, 2048, 4096]
SIX = ["ce", "hinge", "huber", "squared_hinge", "mse", "brier"]
THREE = [dict(alpha=0.5), dict(param="mup"), dict(param="sp_full_align")]
FIVE = [dict(optimizer="sgd"), dict(optimizer="adam"), dict(optimizer="adam", norm_affine=False),
        dict(optimizer="adam", param="mup"), dict(optimizer="adam", param="sp_full_align")]
PAPER_GPT = dict(steps=10_681, layers=6, context=512, batch_size=256, accumulate=8, warmup=700,
                 dtype="bfloat16", base_width=256)
PRESETS = {     # name: (what it shows, flags, flags that --scale paper changes)
    "headline": (
        "CE against MSE on generated data",
        dict(),
        dict(widths=PAPER_WIDTHS, seeds=4, hidden_layers=7, steps=937)),
    "course": (
        "logits, hidden updates and loss over the first steps: the mechanism",
        dict(loss=["ce", "mse", "huber"], alpha=[0.5], widths=[*WIDTHS[1:], 2048], hidden_layers=4, lrs=[0.1],
             steps=100, seeds=5, track=5),
        dict(widths=PAPER_WIDTHS, hidden_layers=7)),
    "phase": (
        "loss over LR and width as a map, full grid",
        dict(loss=["ce", "mse", "huber"], widths=[*WIDTHS, 2048], hidden_layers=4, seeds=1, search="grid",
             lr_range=[2 ** -7, 4.0]),
        dict(widths=[*PAPER_WIDTHS, 8192], hidden_layers=7, steps=937)),
    "bounded": (
        "six losses: does a bounded derivative decide?",
        dict(loss=SIX),
        dict(widths=PAPER_WIDTHS, seeds=4, hidden_layers=7, steps=937)),
    "optimal_lr": (
        "CE against MSE on Fashion-MNIST (paper: MNIST), 8-layer MLP (Fig. 1)",
        dict(data="fashion_mnist", hidden_layers=7, steps=300, widths=[128, 256, 512, 1024, 2048], seeds=2,
             lr_range=[2 ** -9, 1.0], stable_if="accuracy"),
        dict(data="mnist", steps=937, widths=[*PAPER_WIDTHS, 8192, 16384], seeds=4,
             lr_range=[2 ** -12, 4.0])),
    "lr_transfer": (
        "loss against LR in four parameterizations, full grid (Fig. 5)",
        dict(param=["sp", "ntp", "mup", "sp_full_align"], loss=["ce"], widths=WIDTHS[:4], hidden_layers=4,
             search="grid", lr_range=[2 ** -5, 4.0]),
        dict(data="mnist", hidden_layers=7, steps=937, seeds=4, widths=PAPER_WIDTHS, lr_range=None,
             stable_if="accuracy")),
    "losses": (
        "best accuracy of CE, MSE and Brier in three parameterizations (Fig. 7)",
        dict(data="fashion_mnist", loss=["ce", "mse", "brier"], param=["sp", "mup", "sp_full_align"],
             widths=[64, 256, 1024], base_width=64, steps=600, seeds=2,
             stable_if="accuracy"),
        dict(hidden_layers=7, widths=[*PAPER_WIDTHS, 8192], base_width=256, steps=937, seeds=4)),
    "regimes": (
        "exponents of updates against α (Propositions 1 and 2)",
        dict(alpha=[-0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25], widths=WIDE, seeds=8, lrs=[0.005],
             readout_scale=0.05, steps=4, track=1),
        dict(hidden_layers=7, steps=10, seeds=4)),
    "updates": (
        "update norms of every layer against width (Fig. 4)",
        dict(curves=THREE, loss=["ce"], widths=WIDE, seeds=8, lrs=[0.1], steps=10, track=1),
        dict(hidden_layers=7, steps=100, seeds=4, track=10)),
    "alignment": (
        "alignment over training (Fig. 2)",
        dict(alpha=[0.5], loss=["ce"], hidden_layers=4, lrs=[0.1], steps=200, track=20, alignment=True),
        dict(data="mnist", widths=PAPER_WIDTHS, hidden_layers=7, steps=937, seeds=4, track=50)),
    "limit": (
        "distance to the widest network, and the features' change (Proposition 2)",
        dict(alpha=[0.5, 1.0], loss=["ce"], widths=WIDTHS[1:], lrs=[0.1], steps=100,
             track=10),
        dict(widths=[*PAPER_WIDTHS, 8192], hidden_layers=7, steps=937, seeds=4, track=50)),
    "gpt": (
        "a GPT under SGD and Adam, with and without norm gains (Fig. 6)",
        dict(model="gpt", loss=["ce"], widths=[32, 64, 128, 256], seeds=2, steps=450, stable_if="best+1",
             curves=FIVE),
        dict(PAPER_GPT, widths=[256, 1024, 4096], seeds=3)),
    "gpt_small": (
        "a small grid of it; the default of --model gpt",
        dict(model="gpt", loss=["ce"], widths=[32, 64, 128], seeds=2, steps=100, optimizer=["adam"],
             stable_if="best+1"),
        dict(PAPER_GPT, widths=[256, 1024])),
    "gpt_updates": (
        "update norms of every tensor of a GPT against width",
        dict(model="gpt", loss=["ce"], optimizer=["adam"], param=["sp", "mup", "sp_full_align"],
             widths=[*WIDTHS[1:], 2048], lrs=[0.001], warmup=[0], decay="none", steps=4, track=1),
        dict(widths=PAPER_WIDTHS, base_width=256, layers=6, context=512, batch_size=64)),
}
COARSE = 4              # lattice steps between points of the coarse grid: a factor 4 at the default step
EXTENSIONS = 6          # coarse steps by which a grid may grow beyond either end
FARTHER = 3             # a point beside an optimum is at most this many times as far from it as the last one
FARTHEST = 16           # lattice steps below a flat optimum at which the search for its curvature ends
CPU_MEMORY = 2 ** 30    # bytes for a stack of several replicas on the CPU, and one more replica being drawn


# ---- which learning rates a cell still needs ----

def lattice(args, optimizer):
    """(LR of a lattice point k, lowest k, highest k, coarse steps by which the grid may grow)."""
    if args["lrs"]:
        lrs = sorted(set(args["lrs"]))
        return lrs.__getitem__, 0, len(lrs) - 1, 0
    octaves = round(math.log2(args["lr_step"]), 12)     # sqrt(2) is half an octave, not 0.5000000000000001
    low, high = (round(math.log2(lr) / octaves) for lr in args["lr_range"] or LR_RANGE[optimizer])
    return lambda k: 2.0 ** (k * octaves), low, high, EXTENSIONS


def next_points(known, low, high, search, extensions, hint=None, chance=math.inf):
    """Lattice points to run next, a set; empty when the cell is done. A pure function of what is known.

    known: {k: (losses (S,), stable (S,))} of S seeds. grid: all of low..high. coarse-to-fine: every
    COARSE-th point, or a few around hint = (optimum, edge) of a narrower width; then halves of the gaps
    beside the optimum, and of every seed's bracket of its edge, down to one step, and ever farther points
    until the curvature around the optimum is certain (analyze.window). Where the optimum lies at an end, or
    nothing above it is unstable for some seed, the grid grows; downwards also where all runs diverged, or
    where those at a hint learned nothing: none is stable and below chance, a constant predictor's loss.
    """
    grid, reach = search == "grid", set(range(low - extensions * COARSE, high + extensions * COARSE + 1))
    start = set(range(low, high + 1, 1 if grid else COARSE))
    grown = range(1, COARSE + 1) if grid else (COARSE,)
    hint = None if grid else hint
    if hint:
        optimum, edge = hint
        start, grown = reach & {optimum - 2, optimum - 1, optimum, edge - 1, edge + 1}, (1,)
    if not start <= known.keys():
        return start - known.keys()

    ks, losses, stable = table_of(known)
    best, brackets = int(losses.mean(0).argmin()), analyze.edges(losses, stable)
    diverged = not (losses < analyze.DIVERGED).all(0).any()
    lost = hint and ks[0] > low and not (stable & (losses < chance)).any()
    want = {ks[0] - i for i in grown} & reach if best == 0 or diverged or lost else set()
    unbounded = any(edge is not None and above is None for edge, above in brackets)
    if not diverged and (best == len(ks) - 1 or unbounded):
        want |= {ks[-1] + i for i in grown} & reach
    if want or grid or diverged:
        return want
    want = {(ks[best] + k) // 2 for k in ks[best - 1:best] + ks[best + 1:best + 2]}
    want |= {(ks[edge] + ks[above]) // 2 for edge, above in brackets if above is not None}
    if want <= known.keys():
        first, last, _, open = analyze.window(np.array(ks, float), losses, stable.all(0))
        away = [abs(k - ks[best]) for k in ks]
        for k in range(first, last):
            near, far = sorted(away[k:k + 2])
            if far > FARTHER * near > 0:
                want.add((ks[k] + ks[k + 1]) // 2)
        if open and want <= known.keys() and away[0] < FARTHEST:
            want.add(ks[best] - min(FARTHER * away[0], FARTHEST))
    return want & reach - known.keys()


def table_of(known):
    """(lattice points in order, losses (S, K), stable (S, K))."""
    ks = sorted(known)
    return ks, *(np.stack([np.atleast_1d(known[k][i]) for k in ks], 1) for i in (0, 1))


def optimum_and_edge(known):
    """(optimum, edge) as lattice points, the edge that of the first seed to lose stability."""
    ks, losses, stable = table_of(known)
    best = int(losses.mean(0).argmin())
    last = min((edge for edge, _ in analyze.edges(losses, stable) if edge is not None), default=best)
    return ks[best], max(ks[best], ks[last])


def follow(cell, column_of, criterion, search):
    """(what the search knows, points it asks for next), the search started anew and shown only what it
    asked for.

    So it takes the same path whatever else is in the folder, and wherever it was interrupted. column_of:
    {k: column}.
    """
    known = {}
    while (points := search(known)) and points <= column_of.keys():
        known = seen_alone(cell, column_of, known.keys() | points, criterion)
    return known, points


def seen_alone(cell, column_of, ks, criterion):
    """{k: (losses (S,), stable (S,))} of lattice points ks, as if no others had been run."""
    columns = [column_of[k] for k in sorted(ks)]
    seen = {**cell, "losses": cell["losses"][:, columns], "accuracies": cell["accuracies"][:, columns]}
    return dict(zip(sorted(ks), zip(seen["losses"].T, analyze.stability(seen, criterion).T)))


def missing_runs(args, given, curves, rows):
    """The runs that come next: of a grid all, of a search those of every curve's narrowest unfinished
    width; none at the end."""
    missing = []
    for curve in curves:
        lr_of, low, high, extensions = lattice(args, curve[CURVE.index("optimizer")])
        k_of = {lr_of(k): k for k in range(low - extensions * COARSE, high + extensions * COARSE + 1)}
        hint = None
        for width in args["widths"]:
            cell = cell_of(rows.values(), curve, width, args["seeds"])
            done = {k_of[lr]: i for i, lr in enumerate(cell["lr"].tolist()) if lr in k_of}
            search = functools.partial(next_points, low=low, high=high, search=args["search"],
                                       extensions=extensions, hint=hint, chance=cell["chance"])
            known, points = follow(cell, done, args["criterion"], search)
            asked = [runs_of(given, curve, width, lr_of(k), args["seeds"]) for k in sorted(points)]
            new = [run for runs in asked for run in runs if train.run_id(run) not in rows]
            missing += new
            if args["search"] != "grid" and new:
                break           # wider nets wait for what is found here, which tells where to look
            stable_somewhere = any(stable.any() for _, stable in known.values())
            if not points and stable_somewhere:         # no hint from a cell with failed runs
                hint = optimum_and_edge(known)
    return missing


def runs_of(given, curve, width, lr, seeds):
    return [train.configure({**given, **dict(zip(CURVE, curve)), "width": width, "lr": lr, "seed": seed})
            for seed in range(seeds)]


# ---- which runs train together ----

def replica_size(config):
    """(parameters, bytes of memory) of one replica: weights, optimizer state, gradients, activations and
    batches."""
    model, _, _ = train.build(config)
    parameters = sum(p.numel() for p in model.parameters())
    rule = train.rule_of(config)
    fused = rule.plain and train.network_of(config, model).descend is not None
    size = train.weight_dtype(config).itemsize
    kept = sum(sum(p.shape) for p in model.parameters()) * (2 if config["dtype"] == "bfloat16" else size)
    kept *= samples_of(config) // config["accumulate"]          # activations, about
    if fused:
        return parameters, kept + size * parameters
    # weights, their state, gradients; then a part's pass and its gradients, or the optimizer's scratch space
    more = kept + size * parameters * (config["accumulate"] > 1)
    scratch = size * parameters * (2 if rule.optimizer == "adam" else 0)
    return parameters, size * parameters * (2 + rule.moments) + max(more, scratch)


def samples_of(config):
    """Samples of a step, or tokens."""
    return config["batch_size"] * (config["context"] if train.is_text(config) else 1)


def most_replicas(config, device, memory=None):
    """(largest stack, the number of replicas that it is a multiple of), from width and device; memory: bytes
    free on a CUDA device, asked for if absent."""
    parameters, size = replica_size(config)
    if memory or torch.device(device).type == "cuda":               # half of the free memory
        return max(1, min(256, (memory or torch.cuda.mem_get_info(device)[0]) // 2 // size)), 1
    if train.better_alone(config):                  # stacked attention loses on the CPU
        return 1, 1
    threads = torch.get_num_threads()               # they share a stack's products out by replicas
    in_cache = threads * max(1, 2 ** 19 // parameters)          # 2 MB of weights a thread, or one replica
    most = max(1, min(64, in_cache, CPU_MEMORY // size - 1))
    return most, threads if most >= threads else 1


def stacks(runs, device="cpu", size="auto", shares=1, memory=None):
    """Groups configurations into lists that `train` can take, each of at most `size` runs (auto:
    most_replicas), and enough of them for `shares` ranks."""
    groups = {}
    for run in runs:
        shared = tuple(run[name] for name in train.SETTINGS if name not in train.PER_REPLICA)
        groups.setdefault((*shared, run["weight_decay"] > 0), []).append(run)       # decay rounds otherwise
    for group in groups.values():
        most, unit = most_replicas(group[0], device, memory) if size == "auto" else (size, 1)
        if most > 1 and not train.stackable(group[0]):
            most, unit = 1, 1
        units = math.ceil(len(group) / unit)
        parts = max(math.ceil(units / max(1, most // unit)), min(shares, units))
        bounds = [min(len(group), unit * (units * i // parts)) for i in range(parts + 1)]       # equal sizes
        yield from (group[a:b] for a, b in zip(bounds, bounds[1:]))


def train_or_halve(stack, splits, device, tracked, **tracking):
    """train.train; a stack that does not fit into memory is halved, a single run that does not becomes a
    row saying so."""
    try:
        return train.train(stack, splits, device, tracked=tracked, **tracking)
    except (RuntimeError, MemoryError) as error:
        if not train.out_of_memory(error):
            raise
    tracked.clear()
    width, half = stack[0]["width"], len(stack) // 2
    if half == 0:
        say_once(f"width {width}: out of memory for a single run; it becomes a row without results")
        return [train.failed_row(stack[0], "out of memory", device)]
    say_once(f"width {width}: out of memory for {len(stack)} runs at once; going on with {half}")
    parts = []
    for part in (stack[:half], stack[half:]):
        own = []
        parts += train_or_halve(part, splits, device, own, **tracking)
        tracked += own
    return parts


@functools.cache
def say_once(text):
    print(f"\n{text}", file=sys.stderr)


class Team:
    """The ranks that torchrun started, which share the stacks of a round out by a counter on its store. One
    process alone is a team of one. Ranks need a common result folder; each writes its own files in it."""

    def __init__(self):
        self.store, self.rank, self.size, self.round, self.meetings = None, 0, 1, 0, 0
        if "TORCHELASTIC_RUN_ID" in os.environ:
            store, self.rank, self.size = next(torch.distributed.rendezvous("env://"))
            # ranks that torchrun started again find the store of those before them, with their counters in it
            attempt = f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
            self.store = torch.distributed.PrefixStore(attempt, store)
            self.store.set_timeout(datetime.timedelta(days=365))        # a rank that dies ends the others

    def share(self, stacks):
        """The stacks that fall to this rank, one by one, widest first: whoever is free takes the next."""
        if self.store is None:
            yield from stacks
            return
        stacks, self.round = sorted(stacks, key=lambda stack: -stack[0]["width"]), self.round + 1
        while (i := self.store.add(f"round {self.round}", 1) - 1) < len(stacks):
            yield stacks[i]

    def meet(self):
        """Waits until every rank is here."""
        if self.store is not None:
            self.meetings += 1
            if self.store.add(f"meeting {self.meetings}", 1) == self.size:
                self.store.set(f"met {self.meetings}", "")
            self.store.wait([f"met {self.meetings}"])

    def exchange(self, out, rows):
        """Adds the rows that others wrote; nobody writes meanwhile."""
        if self.store is not None:
            self.meet()
            rows.update(read_rows(out, mend=False))
            self.meet()


def run_missing(args, given, curves, device, rows, tracks, team, splits=None):
    """Runs what is missing, round by round, and appends each stack's rows to the files and to rows and
    tracks."""
    report = progress_line(args, given, curves, rows)
    while missing := missing_runs(args, given, curves, rows):
        for stack in team.share(stacks(missing, device, args["stack"], team.size)):
            if splits is None:
                splits = data.load(stack[0], args["data_dir"], device)
            tracked = []
            done = train_or_halve(stack, splits, device, tracked, track=args["track"],
                                  alignment=args["alignment"])
            if tracked:         # first, so that a run whose row is there is tracked
                train.append_rows(args["out"] / rows_file("track", team.rank), tracked)
            train.append_rows(args["out"] / rows_file("runs", team.rank), done)
            rows.update((key_of(row), row) for row in done)
            tracks.update((key_of(row), row) for row in tracked)
            report(stack[0]["width"])
        team.exchange(args["out"], rows)


# ---- the result folder, and what is said on the way ----

def rows_file(kind, rank):
    """The file into which a rank of torchrun writes its rows; rank 0's is that of a sweep without
    torchrun."""
    return f"{kind}-rank{rank}.jsonl" if rank else f"{kind}.jsonl"


def open_folder(out, rank=0):
    """A lock on this rank's file of rows: close it to let go. InputError if another sweep holds it."""
    train.make_folder(out)
    file = open(out / rows_file("runs", rank), "a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"another sweep is writing to {out}; wait for it, or use another --out") from None
    return file


def check_folder(out, rows, given, track):
    """Refuses a folder whose rows have other settings than this sweep would give them, and writes
    config.json."""
    settled = {}
    for row in rows.values():
        curve = curve_of(row)
        if curve not in settled:
            config = train.configure({**given, **dict(zip(CURVE, curve))})
            settled[curve] = {name: config[name] for name in config if name not in GRID}
        for name, value in settled[curve].items():
            if row.get(name, value) != value:
                said = f"{name} = {row[name]!r}, not {value!r}"
                if name == "code":
                    said = f"another version of {row['model']}, or of a file beside it that it imports"
                raise InputError(f"{out} holds runs with {said}; use another --out")
    path = out / "config.json"
    try:
        before = json.loads(path.read_text()).get("track", track) if rows and path.exists() else track
    except (ValueError, AttributeError):
        raise InputError(f"{path} is damaged; remove it, if the rows beside it are of this sweep, "
                         "or use another --out") from None
    if before != track:
        raise InputError(f"{out} holds runs with track = {before!r}, not {track!r}; use another --out")
    analyze.write_json(path, {**given, "track": track})


def planned_lrs(args, curve, i):
    """LRs of the i-th width, about: a search takes half the grid at the narrowest width, a quarter at the
    others."""
    _, low, high, _ = lattice(args, curve[CURVE.index("optimizer")])
    count = high - low + 1
    return count if args["search"] == "grid" else (count + 1) // 2 if i == 0 else (count + 3) // 4


def progress_line(args, given, curves, rows):
    """report(width) -> a line on standard error: rewritten in place on a terminal, else one a minute.

    The time left goes by what runs of each width took so far; a width without any costs as its parameters do.
    """
    size, planned, start, shown = {}, {}, time.monotonic(), [0.0]
    for i, width in enumerate(args["widths"]):
        size[width] = replica_size(runs_of(given, curves[0], width, 1.0, 1)[0])[0]
        planned[width] = sum(args["seeds"] * planned_lrs(args, curve, i) for curve in curves)

    def seconds():
        """{width: seconds of each of its runs}."""
        return {width: [row["seconds"] for row in rows.values() if row["width"] == width] for width in size}

    before = sum(seconds().values(), [])

    def report(width):
        elapsed, ran, left = time.monotonic() - start, seconds(), 0.0
        if not sys.stderr.isatty() and elapsed - shown[0] < 60:
            return
        every = sum(ran.values(), [])
        for w in planned:
            like = min((v for v in ran if ran[v]), key=lambda v: abs(math.log(v / w)))
            left += max(0, planned[w] - len(ran[w])) * np.mean(ran[like]) * size[w] / size[like]
        spent = sum(every) - sum(before)
        left *= elapsed / spent if spent > 0 else 1.0
        total = sum(max(planned[w], len(ran[w])) for w in planned)
        pace = (len(every) - len(before)) / elapsed
        line = (f"{len(every)}/{total} runs, width {width}, {pace:.1f} runs/s, "
                f"{left // 60:.0f}:{left % 60:02.0f} left")
        if sys.stderr.isatty():
            print(f"\r{line:70}", end="", file=sys.stderr, flush=True)
        else:
            shown[0] = elapsed
            print(line, file=sys.stderr, flush=True)

    return report


def print_plans(args, given, curves):
    """param.plan of every width, once for curves that draw and train alike."""
    lr = args["lrs"][0] if args["lrs"] else train.SETTINGS["lr"][0]
    plans = {train.plan(run): run["width"] for width in args["widths"] for curve in curves
             for run in runs_of(given, curve, width, lr, 1)}
    for table, width in plans.items():
        print(f"width {width}: {table}\n")


def dry_run(args, given, curves, device):
    """Prints what the sweep would cost; times nothing but a second of matrix products."""
    n = 1024
    a = torch.randn(n, n, device=device)
    start, products = time.perf_counter(), 0
    while time.perf_counter() - start < 1 or not products:
        products += 1
        (a @ a).sum().item()
    rate, total = products * 2 * n ** 3 / (time.perf_counter() - start), 0
    memory, too_wide = int(args["memory"] * 2 ** 30), []
    there = memory or memory_of(device)
    print(f"{'width':>6} {'runs':>6} {'parameters':>13} {'stack':>6} {'stack memory':>13} {'one run':>13} "
          f"{'operations':>11}")
    for i, width in enumerate(args["widths"]):
        runs = [run for curve in curves
                for run in runs_of(given, curve, width, 1.0, args["seeds"]) * planned_lrs(args, curve, i)]
        parameters, one = map(max, zip(*(replica_size(runs_of(given, curve, width, 1.0, 1)[0])
                                         for curve in curves)))
        stack = max(len(part) for part in stacks(runs, device, args["stack"], memory=memory))
        too_wide += [width] if one > there else []
        operations = 6.0 * parameters * len(runs) * runs[0]["steps"] * samples_of(runs[0])
        total += operations
        print(f"{width:6} {len(runs):6} {parameters:13,} {stack:6} {stack * one / 2 ** 20:9,.0f} MiB "
              f"{one / 2 ** 20:9,.0f} MiB {operations:11.2e}")
    for width in too_wide:
        print(f"! width {width}: a single run does not fit into {there / 2 ** 30:.3g} GiB; use a larger "
              "--accumulate")
    print(f"{total:.2e} operations, {duration(total / rate)} at this machine's {rate / 1e9:.0f} GFLOP/s "
          "(diverging runs stop early, small matrices are slower, and a search may need more or fewer runs)")


def memory_of(device):
    """Bytes that the device has."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def duration(seconds):
    """In the unit that a person would use."""
    for unit, size in (("years", 365.25 * 86400), ("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.0f} seconds"


# ---- command line ----

def sweep_flags(parser):
    add = parser.add_argument_group("sweep").add_argument
    add("--preset", metavar="NAME", help="see below (default headline, with --model gpt gpt_small)")
    add("--scale", default="cpu", choices=("cpu", "paper"),
        help="cpu: two cores; paper: the paper's sizes, for CUDA (default cpu)")
    add("--widths", type=int, nargs="+", metavar="N", default=WIDTHS,
        help=f"widths (default {' '.join(map(str, WIDTHS))})")
    add("--seeds", type=int, default=3, metavar="N", help="seeds 0 to N-1 (default 3)")
    add("--lrs", type=float, nargs="+", metavar="X", help="exactly these LRs, instead of a range")
    add("--lr-range", type=float, nargs=2, metavar=("LO", "HI"), help="range of LRs; grows where the optimum "
        "or the edge lies outside (default 2^-8 2^3, Adam 2^-9 2^-1)")
    add("--lr-step", type=float, default=math.sqrt(2), metavar="F",
        help="ratio of neighbouring LRs (default sqrt 2)")
    add("--search", default="coarse-to-fine", choices=("coarse-to-fine", "grid"),
        help="LRs to run: around optimum and edge, or all (default coarse-to-fine)")
    add("--stable-if", default="chance", metavar="NAME[=X]",
        help=f"{analyze.criteria_help()} (default chance)")
    add("--out", metavar="DIR", help="result folder (default out/PRESET and the settings given)")
    add("--no-plots", action="store_true", help="no figures")
    add("--dry-run", action="store_true", help="say what would be run, and run nothing")
    add("--memory", type=float, default=0.0, metavar="GiB",
        help="with --dry-run: memory of a CUDA device that is not here (default: that of --device)")
    add("--stack", default="auto", metavar="N", help="most replicas trained at once (default auto)")


def parse(argv=None):
    """(args, settings given for every run, curves); a preset replaces defaults, flags on the command line
    replace both."""
    presets = "\n".join(f"  {name:12} {words}" for name, (words, _, _) in PRESETS.items())
    parser = train.Parser(description=__doc__.splitlines()[0], epilog=f"presets:\n{presets}",
                          formatter_class=argparse.RawDescriptionHelpFormatter)
    sweep_flags(parser)
    train.add_flags(parser, several=CURVE, without=("width", "lr", "seed"), defaults={"loss": "ce mse"})
    chosen, _ = parser.parse_known_args(argv)
    text = chosen.model == "gpt" or chosen.model and chosen.data and train.is_text(vars(chosen))
    name = chosen.preset or ("gpt_small" if text else "headline")
    if name not in PRESETS:
        raise InputError(f"unknown preset {name!r}; choose from {', '.join(PRESETS)}")
    _, flags, of_paper = PRESETS[name]
    preset = {"preset": name, "curves": [{}], "loss": ["ce", "mse"], **flags,
              **(of_paper if chosen.scale == "paper" else {})}
    if chosen.lr_range:
        preset.pop("lrs", None)         # a range on the command line replaces a preset's list
    parser.set_defaults(**preset)
    args = vars(parser.parse_args(argv))
    args["out"] = Path(args["out"] or default_out(name, vars(chosen)))
    check_args(args, chosen)
    args["criterion"] = analyze.criterion_of(args["stable_if"])
    args["widths"] = sorted(set(args["widths"]))
    args["search"] = "grid" if args["lrs"] else args["search"]
    given = {name: value for name, value in train.settings_given(args).items() if name not in GRID}
    given["width"] = args["widths"][0]      # the default may be no multiple of --head-dim
    curves = curves_of(args, given)
    for curve, width, lr in itertools.product(curves, args["widths"], args["lrs"] or [1.0]):
        runs_of(given, curve, width, lr, 1)
    for width in args["widths"]:
        train.build(*runs_of(given, curves[0], width, 1.0, 1))
    return args, given, curves


def default_out(preset, chosen):
    """out/PRESET, and the settings given: other curves do not overwrite a preset's summary."""
    parts = [preset]
    for name, value in chosen.items():
        if name in train.SETTINGS and value not in (None, "gpt", "mlp"):
            value = "-".join(map(str, value if isinstance(value, list) else [value]))
            parts.append(re.sub(r"[^\w.+-]+", "_", f"{name}-{value}"))
    return "out/" + "_".join(parts)


def check_args(args, chosen):
    """InputError for flags of the sweep that are out of range; turns --stack into a number."""
    stack, lr_range = args["stack"], args["lr_range"]
    for wrong, words in (
            (args["seeds"] < 1, f"seeds is {args['seeds']}; it must be at least 1"),
            (args["track"] < 0, f"track is {args['track']}; it must be at least 0"),
            (not 0 <= args["memory"] < math.inf, f"memory is {args['memory']}; it must be a number of GiB"),
            (not 1.01 <= args["lr_step"] <= 1000,
             f"lr-step is {args['lr_step']}; it must be a number from 1.01 to 1000"),
            (chosen.lrs and chosen.lr_range,
             f"lrs is {chosen.lrs} and lr-range is {chosen.lr_range}; give one of them"),
            (lr_range and not 1e-30 < lr_range[0] < lr_range[1] < 1e30,
             f"lr-range is {lr_range}; it must be two numbers, the lower one first, within 1e-30 and 1e30"),
            (stack != "auto" and not (stack.isdecimal() and int(stack)),
             f"stack is {stack!r}; it must be auto or a whole number, at least 1")):
        if wrong:
            raise InputError(words)
    args["stack"] = stack if stack == "auto" else int(stack)


def curves_of(args, given):
    """Values of CURVE, one tuple per curve: those of the preset, crossed with the lists given, loss in the
    innermost loop."""
    lists = {name: args[name] if isinstance(args[name], list) else [args[name]]
             for name in CURVE[::-1] if args[name] is not None}
    found = []
    for preset, values in itertools.product(args["curves"], itertools.product(*lists.values())):
        found.append(curve_of(train.configure({**given, **preset, **dict(zip(lists, values))})))
    return list(dict.fromkeys(found))


def main():
    args, given, curves = parse()
    out, device, splits = args["out"], train.choose_device(args["device"]), None
    first, = runs_of(given, curves[0], given["width"], 1.0, 1)
    if train.is_text(first):            # the data tell the vocabulary, which is part of a run's identity
        splits = data.load(first, args["data_dir"], device)
        given["vocab_size"] = splits.classes
    team = Team()
    if args["plan"]:
        return print_plans(args, given, curves)
    if args["dry_run"]:
        return dry_run(args, given, curves, device)
    with open_folder(out, team.rank):
        rows = read_rows(out) if team.rank == 0 else {}
        tracks = read_rows(out, "track*.jsonl") if args["track"] and team.rank == 0 else {}
        if team.rank == 0:
            check_folder(out, rows, given, args["track"])
            print(f"{args['preset']}: {first['model']} on {first['data']}, {len(curves)} curves, widths "
                  f"{' '.join(map(str, args['widths']))}, {args['seeds']} seeds, {first['steps']} steps, "
                  f"{args['search']} over LRs, into {out}", file=sys.stderr)
        if rows:
            print(f"{out}: {len(rows)} runs found, going on", file=sys.stderr)
        team.exchange(out, rows)
        try:
            run_missing(args, given, curves, device, rows, tracks, team, splits)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"interrupted: {len(rows)} finished runs are kept in {out}; "
                                    "the same command goes on") from None
        print(file=sys.stderr)
        if team.rank != 0:
            return
        if team.size > 1 and args["track"]:
            tracks = read_rows(out, "track*.jsonl")
        command = " ".join(["python", *sys.argv])
        analyze.report(out, list(rows.values()), tracks, args["stable_if"], command, curves, args["widths"],
                       args["seeds"])
    if not args["no_plots"]:
        import plots        # matplotlib takes a second to load
        try:
            print(*plots.draw(out), sep="\n")
        except plots.PlotError as error:
            raise InputError(str(error)) from None


if __name__ == "__main__":
    train.command_line(main)
