"""sweep.py: which LRs a search asks for, which runs train together, and what a result folder goes through.

Searches run on made-up landscapes {k: (loss, stable)} over points k of the LR grid, sweeps on networks that
train in seconds. Sweeps that are killed, interrupted or shared out over processes are in test_faults.py.
"""
import importlib.util
import io
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import analyze
import config
import data
import estimate
import models
import param
import sweep
import train
from config import SETTINGS, InputError, configure
from conftest import call

HERE = Path(sweep.__file__).parent
MAIN = {"sweep.py": sweep.main, "train.py": train.main, "analyze.py": analyze.main}
KINDS = pytest.mark.parametrize("kind", ["grid", "coarse-to-fine"])
NO_TRACKING = {"track": 0, "alignment": False, "kernels": False}


def run_script(script, *flags):
    """Run a script's main in this process, as its command line would call it."""
    return call(lambda: config.command_line(MAIN[script]), script, *flags)


def run_sweep(out, *flags):
    """Run sweep.py with these flags, in words, and --out."""
    return run_script("sweep.py", *" ".join(flags).split(), "--out", out)


def parse(*flags):
    return sweep.parse(" ".join(map(str, flags)).split())


def results(row):
    return {key: value for key, value in row.items() if key != "seconds"}


def sorted_rows(out):
    return sorted((results(row) for row in analyze.read_rows(out).values()), key=lambda row: row["id"])


def summary_of(out):
    return json.loads((out / "summary.json").read_text())


def contents(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


# ---- the search of one cell, on landscapes cell_at(k) -> (loss, stable), numbers or arrays (S,) ----

DIVERGED = estimate.DIVERGED
GRID, REACH = range(-16, 7), range(-40, 31)


def search(kind, cell_at, grid=GRID, reach=REACH, hint=None, chance=math.inf):
    """Return {k: (loss, stable)} of every point that a search asked for; none may be asked for twice."""
    known = {}
    while points := sweep.next_points(known, grid, reach, kind, hint, chance):
        assert not points & known.keys()
        known.update((k, cell_at(k)) for k in points)
    return known


def optimum_and_edge(known):
    """Return (optimum, edge) of one seed, computed without sweep.py."""
    best = min(sorted(known), key=lambda k: known[k][0])
    return best, max(k for k in known if known[k][1] and all(known[j][1] for j in known if best <= j <= k))


def test_coarse_to_fine_finds_the_full_grids_optimum_and_edge_with_at_most_half_its_runs():
    generator, runs = np.random.default_rng(0), {"grid": 0, "coarse-to-fine": 0}
    for _ in range(200):
        centre, gap, slope = (generator.uniform(*ends) for ends in ((-8, 3), (0.5, 4), (0.8, 2.2)))
        hint = None
        for width in range(4):
            optimum = centre - slope * width
            edge = optimum + gap

            def cell_at(k):
                return (0.3 + 0.01 * (k - optimum) ** 2, True) if k < edge else (DIVERGED, False)

            full, coarse = (search(kind, cell_at, hint=hint) for kind in runs)
            assert len(full) >= 23      # a grid is a grid, whatever the narrower widths found
            for a, b in zip(optimum_and_edge(full), optimum_and_edge(coarse)):
                assert abs(a - b) <= 1
            runs["grid"] += len(full)
            runs["coarse-to-fine"] += len(coarse)
            hint = optimum_and_edge(coarse)
            assert hint == sweep.optimum_and_edge(coarse)
    assert runs["coarse-to-fine"] <= 0.35 * runs["grid"]


def test_a_search_finds_its_way_from_any_hint_also_where_all_is_unstable():
    generator = np.random.default_rng(0)
    for _ in range(100):
        optimum, gap = generator.uniform(-12, 3), generator.uniform(0.5, 6)
        far = generator.normal(0, 0.1, 100)     # above the edge losses are finite, and without order

        def cell_at(k):
            return (0.3 + 0.01 * (k - optimum) ** 2, True) if k < optimum + gap else (5 + far[k + 50], False)

        full = optimum_and_edge(search("grid", cell_at))
        for off in (-12, -5, -1, 3, 8, 15):
            hint = full[0] + off, full[0] + off + generator.integers(-1, 6)
            coarse = optimum_and_edge(search("coarse-to-fine", cell_at, hint=hint))
            assert abs(full[0] - coarse[0]) <= 1 and abs(full[1] - coarse[1]) <= 1


def random_landscape(generator, seeds):
    """Return {k: (losses (S,), stable (S,))} without any order, some of it diverged."""
    share, likely = generator.uniform(0, 1, 2)
    landscape = {}
    for k in range(-100, 100):
        diverged = generator.random(seeds) < share ** 2
        losses = np.where(diverged, DIVERGED, generator.uniform(0, 9, seeds))
        landscape[k] = losses, ~diverged & (generator.random(seeds) < likely)
    return landscape


@KINDS
def test_on_any_landscape_a_search_ends_asks_for_nothing_twice_and_brackets_what_it_reports(kind):
    generator = np.random.default_rng(0)
    for _ in range(200):
        landscape = random_landscape(generator, seeds=int(generator.integers(1, 4)))
        low, extensions = (int(generator.integers(*ends)) for ends in ((-20, 10), (0, 7)))
        high = low + int(generator.integers(1, 30))
        reach = range(low - extensions * sweep.COARSE_STEP, high + extensions * sweep.COARSE_STEP + 1)
        hint = sorted(generator.integers(reach[0], reach[-1] + 1, 2).tolist())
        hint = tuple(hint) if generator.random() < 0.5 else None
        chance = generator.uniform(0, 9)
        known = search(kind, landscape.get, range(low, high + 1), reach, hint, chance)
        assert known.keys() <= set(reach)

        ks, losses, stable = sweep.as_arrays(known)
        if (losses >= DIVERGED).any(0).all():
            assert ks[0] == reach[0]                # at no LR did every seed end, down to the last
            continue
        best = sweep.optimum_and_edge(known)[0]
        assert best - 1 in known or best == reach[0]
        assert best + 1 in known or best == ks[-1]
        ends = []
        for edge, above in estimate.edges(losses, stable):
            assert above is None or ks[above] - ks[edge] == 1
            ends += [ks[edge]] if edge is not None and above is None else []
        if ends or best == ks[-1]:
            assert ks[-1] > reach[-1] - sweep.COARSE_STEP        # it grew as far as it may
            assert all(end == ks[-1] for end in ends)


def test_a_hint_where_nothing_is_stable_asks_for_no_more_than_the_grid():
    known = search("coarse-to-fine", lambda k: (5 + 0.01 * (k + 9) ** 2, False), hint=(-3, -3))
    assert min(known) == -16 and len(known) <= 23


def cell_on(losses, ks, chance):
    """Return the cell of one seed with these losses {k: loss}."""
    values = np.array([[losses[k] for k in ks]])
    return {"lr": 2.0 ** (np.array(ks) / 2), "losses": values, "accuracies": 0 * values, "chance": chance}


def test_a_hint_far_above_the_edge_finds_down_under_a_criterion_relative_to_the_best():
    generator, ks = np.random.default_rng(0), range(-60, 40)
    for _ in range(50):
        losses = {k: 2.3 + 0.01 * (k + 9) ** 2 if k <= -6 else 6 + generator.normal(0, 0.2) for k in ks}
        known, _ = sweep.replay_search(
            cell_on(losses, ks, 3.2), {k: i for i, k in enumerate(ks)}, ("best+1", 1.0),
            lambda known: sweep.next_points(known, GRID, range(-32, 23), "coarse-to-fine", (0, 1), 3.2))
        assert sweep.optimum_and_edge(known) == (-9, -6)
        assert not known[-5][1]


@KINDS
def test_the_search_ends_with_the_same_points_wherever_it_was_cut_and_whatever_else_is_there(kind):
    generator = np.random.default_rng(0)

    def finish(landscape, done, cut=False):
        while True:
            ks = sorted(done)
            known, points = sweep.replay_search(
                cell_on(landscape, ks, 9.0), {k: i for i, k in enumerate(ks)}, ("best+1", 1.0),
                lambda known: sweep.next_points(known, GRID, REACH, kind))
            missing = sorted(points - done)
            if not missing:
                return set(known)
            if cut:
                count = generator.integers(1, len(missing) + 1)
                missing = generator.choice(missing, count, replace=False).tolist()
            done |= set(missing)

    for _ in range(40):
        optimum, edge = generator.uniform(-20, 8), generator.uniform(1, 5)
        landscape = {k: 0.3 + 0.01 * (k - optimum) ** 2 + generator.normal(0, 0.05)
                     if k < optimum + edge else DIVERGED for k in range(-100, 100)}
        whole = finish(landscape, set())
        assert finish(landscape, set(), cut=True) == whole
        assert finish(landscape, {-17, -5, -3, 0, 2, 30}, cut=True) == whole


@KINDS
def test_a_grid_grows_where_the_optimum_lies_outside(kind):
    for optimum in (-30, 14):
        known = search(kind, lambda k: (abs(k - optimum) + 0.1, k < optimum + 3))
        assert optimum_and_edge(known) == (optimum, optimum + 2)
    assert len(search(kind, lambda k: (-k, True), range(-4, 5), range(-28, 29))) < 100   # it ends
    known = search(kind, lambda k: (abs(k - 3.3), True))
    assert optimum_and_edge(known)[0] == 3         # refined although nothing is unstable
    nothing = {k: (DIVERGED, False) for k in range(-100, 100)}
    assert not sweep.next_points(nothing, GRID, REACH, kind)


def test_every_seeds_edge_is_bracketed_between_neighbouring_points():
    edges = np.array([-3, 1, 4])

    def cell_at(k):
        stable = k <= edges
        return np.where(stable, 0.3 + 0.01 * (k + 6) ** 2, DIVERGED), stable

    known = search("coarse-to-fine", cell_at)
    assert {-3, -2, 1, 2, 4, 5} <= known.keys()
    assert sweep.optimum_and_edge(known) == (-6, -3)        # the first seed's to lose stability


# ---- the search of all widths ----

def rows_on(landscape, runs, failed=lambda width, k: False):
    """Return result rows of runs whose (loss, stable) landscape(width, k) gives."""
    rows = {}
    for run in runs:
        width, k = run["width"], round(2 * math.log2(run["lr"]))
        loss, stable = landscape(width, k)
        row = {**run, "id": config.run_id(run), **dict.fromkeys(config.RESULTS),
               "failed": "out of memory" if failed(width, k) else None,
               "chance_loss": 9.0, "shape_info": None, "diverged_at": None if stable else 1, "seconds": 1.0,
               "final_train_loss": loss if stable else None, "train_accuracy": 0.0}
        rows[row["id"]] = row
    return rows


def calm_rows(*flags):
    """Return rows of one run per curve of a sweep with these flags."""
    args, fixed, curves = parse(*flags)
    runs = [run for curve in curves for run in sweep.runs_of(fixed, curve, args["widths"][0], 1.0, 1)]
    return rows_on(lambda width, k: (0.5, True), runs)


THREE_WIDTHS = "--widths 8 16 32 --base-width 8 --seeds 2 --loss ce"


def swept_landscape(landscape, *flags, failed=lambda width, k: False):
    """Return ([widths asked for in each round], {width: points of its rows}) of a whole search."""
    args, fixed, curves = parse(THREE_WIDTHS, *flags)
    rounds, rows = [], {}
    while missing := sweep.missing_runs(args, fixed, curves, rows):
        rounds.append(sorted({run["width"] for run in missing}))
        rows.update(rows_on(landscape, missing, failed))
        assert len(rounds) < 100
    points = {width: set() for width in args["widths"]}
    for row in rows.values():
        points[row["width"]].add(round(2 * math.log2(row["lr"])))
    return rounds, points


def test_a_width_is_searched_around_what_the_narrower_one_ended_with():
    def landscape(width, k):
        edge = {8: -1, 16: -3, 32: -5}[width]
        return 0.3 + 0.01 * (k - edge + 2) ** 2, k <= edge

    rounds, points = swept_landscape(landscape)
    assert [len(of_round) for of_round in rounds] == [1] * len(rounds) and rounds == sorted(rounds)
    assert points[8] >= set(range(-16, 7, sweep.COARSE_STEP)) and points[8] >= {-4, -3, -2, -1, 0}
    assert points[16] == {-5, -4, -3, -2, 0} | {-6}         # around the last, and a step down
    assert points[32] == {-7, -6, -5, -4, -2} | {-8}
    rounds, points = swept_landscape(landscape, "--search grid")
    assert rounds == [[8, 16, 32]]
    assert points[8] == points[16] == points[32] == set(range(-16, 7))


@pytest.mark.parametrize("failed, stable", [
    (lambda width, k: width == 8, True),
    (lambda width, k: width == 8 and k == -5, True),
    (lambda width, k: False, False),
], ids=["out of memory", "a later point out of memory", "nothing stable"])
def test_a_width_without_an_outcome_gives_no_hint(failed, stable):
    def landscape(width, k):
        return 0.3 + 0.01 * (k + 4) ** 2, k <= -2 and (width > 8 or stable)

    _, points = swept_landscape(landscape, failed=failed)
    assert points[16] >= set(range(-16, 7, sweep.COARSE_STEP)) and {-5, -4, -3, -2, -1} <= points[16]
    assert points[32] == {-6, -5, -4, -3, -2, -1}


def test_a_search_over_widths_ends_on_any_landscape_also_where_runs_fail():
    generator = np.random.default_rng(0)
    for share in (0.0, 0.05, 0.3):
        losses, stable, failed = ({width: generator.random(200) for width in (8, 16, 32)} for _ in range(3))
        swept_landscape(lambda width, k: (9 * losses[width][k + 100], stable[width][k + 100] < 0.7),
                        failed=lambda width, k: failed[width][k + 100] < share)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def progress(monkeypatch, stream, rows):
    """Return (report, [seconds on the clock]) of a grid of 23 LRs, two seeds and three widths."""
    args, fixed, curves = parse(THREE_WIDTHS, "--search grid")
    clock = [0.0]
    monkeypatch.setattr(sweep.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(sys, "stderr", stream)
    return sweep.progress_line(args, curves, rows), clock


def test_the_progress_line_tells_the_time_left_from_what_runs_took(monkeypatch):
    rows = {}
    report, clock = progress(monkeypatch, Terminal(), rows)
    for i in range(46 + 23):        # all of width 8 at a second each, half of width 16 at three
        rows[i] = {"width": 8 if i < 46 else 16, "seconds": 1.0 if i < 46 else 3.0}
    clock[0] = 2.0 * (46 + 3 * 23)                          # two seconds pass for each of theirs
    report(16)
    left = 2 * 3.0 * (23 + 46 * (32 / 16) ** 1.5)
    assert round(left) == 15 * 60 + 19
    assert sys.stderr.getvalue().strip() == "69/138 runs, width 16, 0.3 runs/s, 15:19 left"


@pytest.mark.parametrize("seconds, words", [
    (479.4, "7:59"), (479.6, "8:00"), (59.4, "0:59"), (59.6, "1:00"), (3599.7, "60:00")])
def test_the_seconds_of_the_time_left_stay_below_sixty(seconds, words, monkeypatch):
    rows = {}
    report, clock = progress(monkeypatch, Terminal(), rows)
    rows.update((i, {"width": 8 if i < 46 else 16, "seconds": 1.0}) for i in range(92))
    clock[0] = 92 * seconds / (46 * (32 / 16) ** 1.5)       # 46 runs of width 32 are missing
    report(16)
    assert sys.stderr.getvalue().strip().endswith(f" runs/s, {words} left")


def test_where_no_terminal_is_the_progress_line_comes_once_a_minute(monkeypatch):
    rows = {0: {"width": 8, "seconds": 1.0}}
    report, clock = progress(monkeypatch, io.StringIO(), rows)
    for i, (clock[0], lines) in enumerate(((59.0, 0), (60.0, 1), (100.0, 1), (121.0, 2))):
        rows[i + 1] = {"width": 8, "seconds": 1.0}
        report(8)
        assert len(sys.stderr.getvalue().splitlines()) == lines


# ---- which runs train together ----

def shape_of(run):
    """Return the shape that the data of a run ask for; text has the 256 values of a byte."""
    is_text = config.is_text(run)
    return models.Shape(run["context"], 256, True) if is_text else train.shape_of(run)


@pytest.mark.parametrize("threads", [1, 2, 3, 16, 96])
@pytest.mark.parametrize("settings", [
    {}, {"optimizer": "adam"}, {"hidden_layers": 7}, {"model": "gpt"}], ids=str)
def test_stacks_hold_every_run_once_share_them_evenly_and_keep_to_the_cache(monkeypatch, threads, settings):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    lengths = []
    for width, count, ranks in itertools.product((32, 128, 512, 4096), (1, 7, 46, 200), (1, 3)):
        runs = [configure(dict(settings, width=width, seed=seed)) for seed in range(count)]
        parts = list(sweep.stacks(runs, shape_of(runs[0]), "cpu", "auto", ranks))
        assert sum(parts, []) == runs and all(parts)
        assert len(parts) >= min(ranks, count // threads)
        longest = max(map(len, parts))
        replicas_a_thread = math.ceil(longest / threads)
        parameters = 100 * width + (runs[0]["hidden_layers"] - 1) * width ** 2 + 2 * width
        assert longest <= 64 and (replicas_a_thread == 1 or 4 * replicas_a_thread * parameters <= 2 ** 21)
        assert longest - min(map(len, parts)) < max(2, 2 * threads)
        lengths.append(longest)
    if "model" in settings:
        assert max(lengths) == 1            # attention is slower in a stack
    else:
        assert max(lengths) > min(threads, 45)


def test_runs_share_a_stack_only_where_train_allows_it():
    differing = [dict(lr=0.2), dict(seed=1), dict(param="mup", alpha=0.5), dict(loss="mse"), dict(width=32),
                 dict(weight_decay=0.1), dict(optimizer="adam")]
    runs = [configure({"width": 16, "base_width": 16, **run}) for run in ({}, *differing)]
    shape = shape_of(runs[0])
    assert [len(part) for part in sweep.stacks(runs, shape)] == [4, 1, 1, 1, 1]
    assert list(sweep.stacks(runs[:4], shape, size=3)) == [runs[:2], runs[2:4]]
    assert [len(part) for part in sweep.stacks(runs[:4], shape, size=1)] == [1, 1, 1, 1]


def test_a_stack_of_a_custom_model_has_one_seed():
    model = f"{HERE / 'assets' / 'own' / 'net.py'}:build"
    runs = [configure(dict(model=model, width=32, seed=seed, lr=lr)) for lr in (0.1, 0.2) for seed in (0, 1)]
    assert list(sweep.stacks(runs, shape_of(runs[0]))) == [runs[::2], runs[1::2]]


def test_a_stack_on_a_cuda_device_begins_with_256_replicas():
    runs = [configure(dict(width=1024, seed=seed)) for seed in range(600)]
    assert [len(part) for part in sweep.stacks(runs, shape_of(runs[0]), "cuda:0")] == [200] * 3
    assert [len(part) for part in sweep.stacks(runs[:256], shape_of(runs[0]), "cuda:0")] == [256]


def ranks_at(monkeypatch, count, store=None):
    """Return the ranks that meet at one store."""
    store = store or torch.distributed.HashStore()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "any")
    ranks = []
    for rank in range(count):
        monkeypatch.setattr(torch.distributed, "rendezvous", lambda url: iter([(store, rank, count)]))
        ranks.append(sweep.Ranks())
    return ranks


def test_ranks_that_torchrun_started_again_share_all_stacks_out_anew(monkeypatch):
    store = torch.distributed.HashStore()           # it outlives the ranks
    batches = [[{"width": 8}], [{"width": 16}]]
    for attempt in "012":
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        rank, = ranks_at(monkeypatch, 1, store)
        for _ in range(2):                          # rounds
            assert list(rank.share(batches)) == batches[::-1]
        rank.meet()


def test_every_stack_falls_to_one_rank_the_widest_first(monkeypatch):
    batches = [[{"width": width}] for width in (8, 8, 16, 16, 32)]
    for _ in range(2):
        turns = [rank.share(batches) for rank in ranks_at(monkeypatch, 2)]
        taken = [next(turns[rank])[0]["width"] for rank in (0, 1, 0, 0, 1)]     # whoever is free
        assert taken == [32, 16, 16, 8, 8]
        assert [list(turn) for turn in turns] == [[], []]


def test_ranks_exchange_the_rows_that_each_wrote(monkeypatch, tmp_path):
    def work(rank):
        own = made_up[rank.rank]
        train.append_rows(tmp_path / sweep.rows_file("runs", rank.rank), [own])
        rows[rank.rank][own["id"]] = own
        rank.exchange(tmp_path, rows[rank.rank])

    rows, made_up = [{}, {}], list(calm_rows("--param sp mup --loss ce").values())
    threads = [threading.Thread(target=work, args=[rank]) for rank in ranks_at(monkeypatch, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert rows[0] == rows[1] == {row["id"]: row for row in made_up}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs-rank1.jsonl", "runs.jsonl"]


# ---- the command line ----

def test_without_flags_it_is_the_headline():
    args, fixed, curves = parse()
    assert args["preset"] == "headline" and args["out"] == Path("out/headline")
    assert args["widths"] == [64, 128, 256, 512, 1024]
    run, *_ = sweep.runs_of(fixed, curves[0], 64, 0.1, args["seeds"])
    assert run == configure(dict(width=64))
    assert run["hidden_layers"] == 3 and run["data"] == "multi_index"
    assert [curve[:3] for curve in curves] == [("ce", "sp", "sgd"), ("mse", "sp", "sgd")]


@pytest.mark.parametrize("scale", ["cpu", "paper"])
@pytest.mark.parametrize("preset", sweep.PRESETS)
def test_every_preset_parses_builds_and_does_what_its_table_says(preset, scale):
    args, fixed, curves = parse("--preset", preset, "--scale", scale)
    _, flags, paper_flags = sweep.PRESETS[preset]
    expected = {**flags, **(paper_flags if scale == "paper" else {})}
    if expected.get("lrs"):
        expected["search"] = "grid"
    assert {name: args[name] for name in expected} == expected

    for settings in expected.get("curves", []):
        assert any(settings.items() <= dict(zip(config.CURVE, curve)).items() for curve in curves)
    for i, name in enumerate(config.CURVE):
        if name in expected:
            values = expected[name] if isinstance(expected[name], list) else [expected[name]]
            assert {curve[i] for curve in curves} >= set(values)

    for curve, width in itertools.product(curves, args["widths"]):
        grid, lr_of = sweep.lr_grid(args, curve)
        assert len(grid) and lr_of[grid[0]] <= lr_of[grid[-1]]
        runs = sweep.runs_of(fixed, curve, width, lr_of[grid[0]], args["seeds"])
        assert sum(sweep.stacks(runs, shape_of(runs[0])), []) == runs


def test_flags_replace_a_preset_and_a_preset_replaces_defaults():
    _, fixed, curves = parse("--preset losses --steps 7 --loss huber --param ntp")
    assert fixed["steps"] == 7 and fixed["data"] == "fashion_mnist"
    assert [curve[:2] for curve in curves] == [("huber", "ntp")]
    args, *_ = parse("--preset updates --lr-range 0.1 1")
    assert args["lrs"] is None and args["lr_range"] == [0.1, 1.0]       # it replaces the preset's list
    args, *_ = parse("--model gpt")
    assert args["preset"] == "gpt_small"


def test_several_words_of_lr_factor_are_one_setting_of_every_curve():
    _, _, curves = parse("--lr-factor hidden=0 norm.weight=2 --loss ce mse")
    assert [dict(zip(config.CURVE, curve))["lr_factor"] for curve in curves] == ["hidden=0 norm.weight=2"] * 2
    assert len(set(curves)) == 2


def test_every_choice_of_settings_has_its_own_default_folder():
    choices = ["", "--param mup", "--param mup sp", "--loss ce", "--steps 7", "--alpha 0.5",
               "--weight-decay 0.1", "--data mnist", "--preset limit", "--preset gpt",
               "--preset gpt --no-norm-affine", "--model gpt", "--model gpt --data /a/text",
               "--lr-factor hidden=0", "--lr-factor hidden=0 input=0"]
    outs = [parse(flags)[0]["out"] for flags in choices]
    assert len(set(outs)) == len(outs)
    assert all(out.parent == Path("out") for out in outs)
    assert parse("--widths 32 64")[0]["out"] == outs[0]       # more rows of the same sweep


def help_of(script, monkeypatch):
    """Return {flag: what its help says of the default} of a script."""
    monkeypatch.setenv("COLUMNS", "1000")
    text = run_script(script, "--help").stdout
    return dict(re.findall(r"^  (--[a-z0-9-]+)[^\n]*(?:\n   [^\n]*)?\(default (.*)\)$", text, re.MULTILINE))


@pytest.mark.parametrize("script", ["sweep.py", "train.py"])
def test_the_help_names_the_true_default_of_every_setting_for_each_network_and_optimizer(script, monkeypatch):
    defaults = help_of(script, monkeypatch)
    several = {"loss": parse()[0]["loss"]} if script == "sweep.py" else {}
    for name in SETTINGS:
        if name in ("code", "data_hash") or script == "sweep.py" and name in ("width", "lr", "seed"):
            assert f"--{name.replace('_', '-')}" not in defaults
            continue
        first, *others = defaults[f"--{name.replace('_', '-')}"].split("; ")
        others = dict(words.rsplit(": ", 1) for words in others)
        for model, optimizer in itertools.product(("mlp", "gpt"), param.OPTIMIZERS):
            chosen = {"model": model, "optimizer": optimizer}
            value = configure({k: v for k, v in chosen.items() if k != name})[name]
            value = " ".join(several.get(name, [str(value)])) or "none"
            words = [others[key] for key in (f"text {optimizer}", "text") if model == "gpt" and key in others]
            assert (words or [first])[0] == value, (name, chosen)


def test_the_help_names_the_true_default_of_every_flag_of_a_sweep(monkeypatch):
    defaults, args = help_of("sweep.py", monkeypatch), parse()[0]
    for flag in ("seeds", "scale", "search", "stack", "track", "device", "stable-if"):
        assert defaults[f"--{flag}"] == str(args[flag.replace("-", "_")])
    assert defaults["--widths"] == " ".join(map(str, args["widths"]))
    assert defaults["--lr-step"] == "sqrt 2" and args["lr_step"] == math.sqrt(2)
    assert defaults["--preset"] == "headline, with --model gpt gpt_small"
    sgd, adam = ([2.0 ** int(power) for power in re.findall(r"2\^(-?\d+)", words)]
                 for words in defaults["--lr-range"].split("Adam"))
    assert {"sgd": tuple(sgd), "adam": tuple(adam)} == sweep.LR_RANGE
    thresholds = re.findall(r"(\S+) \(X = (\S+)\)", run_script("sweep.py", "--help").stdout)
    assert {name: (name, float(x)) for name, x in thresholds} == {
        name: analyze.parse_criterion(name) for name in estimate.CRITERIA}


@pytest.mark.parametrize("lrs, shares", [
    ("--lrs 0.1 0.2 0.4", (3, 3, 3)),
    ("--lr-range 0.0625 0.5 --search grid", (7, 7, 7)),
    ("--lr-range 0.0625 0.5", (4, 2, 2)),       # about half of the grid, then a quarter
])
def test_a_dry_run_prints_runs_and_parameters_at_every_width_and_runs_nothing(
        lrs, shares, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "load", None)     # data that have a name are not read
    done = run_sweep(tmp_path / "out", "--widths 256 512 1024 --base-width 512 --hidden-layers 2 --seeds 2",
                     "--loss ce mse --data mnist --dry-run", lrs)
    assert done.returncode == 0 and not done.stderr and not list(tmp_path.iterdir())
    head, *lines, last = done.stdout.splitlines()
    assert head.split() == ["width", "runs", "parameters"]
    assert [line.split() for line in lines] == [
        [str(width), str(2 * 2 * lrs_a_curve), f"{784 * width + width ** 2 + 10 * width:,}"]
        for width, lrs_a_curve in zip((256, 512, 1024), shares)]
    assert last == "(a search may need more or fewer runs; diverging runs stop early)"


# ---- sweeps of small networks, and their folders ----

SMALL = ("--widths 8 16 --base-width 8 --hidden-layers 2 --train-size 300 --val-size 50 --batch-size 8 "
         "--seeds 2")
TINY = f"{SMALL} --steps 20 --lr-range 0.05 4 --loss ce mse"
FEW = f"{SMALL} --steps 8 --lrs 0.1 0.2 0.4 --loss ce --no-plots"


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    out = tmp_path_factory.mktemp("sweep")
    return out, run_sweep(out, TINY)


def test_a_sweep_prints_predictions_beside_measurements_and_writes_its_files(swept):
    out, done = swept
    assert done.returncode == 0, done.stderr
    for words in ("predicted", "max-stable", "optimal", "-0.50", "-1.00"):
        assert words in done.stdout
    summary = summary_of(out)
    assert [row["predicted_max_stable_exponent"] for row in summary["rows"]] == [-0.5, -1.0]
    assert summary["runs"] == len((out / "runs.jsonl").read_text().splitlines())
    assert summary["command"].startswith("python sweep.py --widths 8 16")
    for name in ("lr_transfer", "exponents"):
        assert (out / "figures" / f"{name}.png").stat().st_size > 10_000
        assert (out / "figures" / f"{name}.pdf").exists()


def test_a_sweep_says_on_standard_error_what_data_it_read_and_what_it_does(swept):
    out, done = swept
    lines = done.stderr.splitlines()
    assert lines[0] == "data: 300 samples (100,), 2 classes; 50 to validate"
    assert lines[1] == ("headline: mlp on multi_index, 2 curves, widths 8 16, 2 seeds, 20 steps, "
                        f"coarse-to-fine over LRs, into {out}")
    assert not "".join(lines[2:]).strip()
    assert "data:" not in done.stdout


def test_figures_are_drawn_again_under_another_criterion_where_there_were_any(swept, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(swept[0], out)
    names = {path.name for path in (out / "figures").iterdir()}
    for path in (out / "figures").iterdir():
        path.write_bytes(b"")
    for flags, size in ((("--no-plots",), 0), ((), 5_000)):
        done = run_script("analyze.py", out, "--stable-if", "accuracy=0.9", *flags)
        assert done.returncode == 0, done.stderr
        assert summary_of(out)["stable_if"] == "accuracy=0.9" != summary_of(swept[0])["stable_if"]
        # the names of this sweep's figures are the same under both criteria
        assert {path.name for path in (out / "figures").iterdir() if path.stat().st_size >= size} == names
        assert all(bool(path.stat().st_size) == bool(size) for path in (out / "figures").iterdir())
    shutil.rmtree(out / "figures")
    assert run_script("analyze.py", out, "--stable-if", "accuracy=0.8").returncode == 0
    assert not (out / "figures").exists()


def test_main_of_sweep_and_of_analyze_takes_its_flags_from_python_too(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["notebook", "--no-such-flag"])
    assert sweep.main([*FEW.split(), "--out", str(tmp_path)]) is None
    printed = capsys.readouterr().out
    assert printed.startswith("Exponents of LR against width")
    assert len(analyze.read_rows(tmp_path)) == 12
    assert analyze.main([str(tmp_path), "--no-plots", "--at", "64"]) is None
    again = capsys.readouterr().out
    assert again.startswith(printed.rstrip()) and "Learning rates at other widths" in again
    assert analyze.main([str(tmp_path), "--no-plots"]) is None
    assert capsys.readouterr().out.rstrip() == printed.rstrip()
    with pytest.raises(InputError, match="steps = 8, not 9"):
        sweep.main([*FEW.split(), "--steps", "9", "--out", str(tmp_path)])


def test_a_sweep_from_python_records_its_own_flags_as_its_command(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["notebook"])
    flags = [*FEW.split(), "--steps", "2", "--out", str(tmp_path)]
    sweep.main(flags)
    assert summary_of(tmp_path)["command"].endswith(" ".join(flags))


def test_a_finished_sweep_runs_nothing_again_and_a_cut_one_ends_with_the_same_rows(
        swept, tmp_path, monkeypatch):
    out, _ = swept
    content = (out / "runs.jsonl").read_bytes()
    (tmp_path / "config.json").write_bytes((out / "config.json").read_bytes())
    (tmp_path / "runs.jsonl").write_bytes(content[:len(content) * 2 // 5])
    cut = run_sweep(tmp_path, TINY, "--no-plots")
    assert cut.returncode == 0 and "half-written" in cut.stderr
    assert sorted_rows(tmp_path) == sorted_rows(out)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(train, "train", None)
    assert run_sweep(tmp_path, TINY, "--no-plots").returncode == 0
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_rows_are_those_of_train_py(swept):
    row = max(analyze.read_rows(swept[0]).values(), key=lambda row: (row["width"], -row["lr"]))
    flags = [part for name in SETTINGS if row[name] != "" and not isinstance(row[name], bool)
             for part in (f"--{name.replace('_', '-')}", row[name])]
    assert results(json.loads(run_script("train.py", *flags).stdout)) == results(row)


def test_every_row_says_where_it_comes_from(swept):
    command = ["git", "rev-parse", "--short=12", "HEAD"]
    head = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    for id, row in analyze.read_rows(swept[0]).items():
        assert id == row["id"] == config.run_id({name: row[name] for name in SETTINGS})
        assert (row["torch"], row["device"], row["dtype"]) == (torch.__version__, "cpu", "float32")
        if head.returncode:
            assert row["commit"] is None
        else:
            assert re.fullmatch(head.stdout.strip() + r"\+?", row["commit"])


# At width 257 MKL sums in another order in a stack than alone, unless the scripts ask for one order.
SAME_BITS = "--base-width 64 --hidden-layers 2 --steps 3 --train-size 200 --val-size 50 --batch-size 16"


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="MKL alone sums in one order in any stack")
def test_rows_from_a_shell_are_the_same_bits_in_a_stack_and_alone(tmp_path):
    commands = [f"sweep.py --widths 257 --lrs 0.1 0.2 0.4 --seeds 1 --loss ce --no-plots {SAME_BITS}",
                f"train.py --width 257 --lr 0.2 {SAME_BITS}"]
    environment = {name: value for name, value in os.environ.items() if name != "MKL_CBWR"}
    started = [subprocess.Popen([sys.executable, *command.split(), "--out", tmp_path / str(i)], cwd=HERE,
                                env={**environment, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
                                stderr=subprocess.DEVNULL)
               for i, command in enumerate(commands)]
    assert [process.wait() for process in started] == [0, 0]
    in_stack, alone = (list(analyze.read_rows(tmp_path / folder).values()) for folder in "01")
    assert len(in_stack) == 3 and len(alone) == 1
    assert results(alone[0]) in [results(row) for row in in_stack]


def test_a_sweep_of_other_settings_does_not_write_over_the_first_ones_summary(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for flags in ("", "--param mup"):
        assert run_script("sweep.py", *FEW.split(), *flags.split()).returncode == 0
    folders = [path.parent for path in tmp_path.rglob("summary.json")]
    assert len(folders) == 2
    assert {row["param"] for out in folders for row in summary_of(out)["rows"]} == {"sp", "mup"}


@pytest.mark.parametrize("flags, words", [
    ("--steps 21", "steps = 20, not 21"),
    ("--batch-size 9", "batch_size = 8, not 9"),
    ("--weight-decay 2", "weight_decay = 0.0, not 2.0"),
    ("--clip 1", "clip = 0.0, not 1.0"),
    ("--eps 0.1", "eps = 1e-08, not 0.1"),
    ("--momentum 0.5", "momentum = 0.0, not 0.5"),
    ("--track 5", "track = 0, not 5"),
])
def test_a_folder_with_rows_of_other_settings_is_refused(swept, flags, words):
    refused_folder(swept[0], words, TINY, flags)


def refused_folder(out, words, *flags):
    """Require that a sweep refuses a folder with these words, and leaves it as it is."""
    before = contents(out)
    done = run_sweep(out, *flags)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.splitlines()[-1] == f"sweep.py: {out} holds runs with {words}; use another --out"
    assert contents(out) == before


@pytest.mark.parametrize("first, then, words", [
    ("--alignment", "", "alignment = True, not False"),
    ("", "--alignment", "alignment = False, not True"),
    ("--kernels", "", "kernels = True, not False"),
    ("", "--track 2", "track = 1, not 2"),
])
def test_a_tracked_folder_is_refused_where_other_measurements_are_asked_for(first, then, words, tmp_path):
    flags = f"{FEW} --steps 2 --lrs 0.1 --track 1"
    done = run_sweep(tmp_path, flags, first)
    assert done.returncode == 0, done.stderr
    refused_folder(tmp_path, words, flags, then)
    assert run_sweep(tmp_path, flags, first).returncode == 0


def save_table(path, seed):
    """Write a table of 60 samples whose values follow from the seed."""
    generator = np.random.default_rng(seed)
    np.savez(path, x=generator.normal(size=(60, 5)), y=np.arange(60) % 2)


def save_function(path, seed):
    path.write_text(f"""
import numpy as np

def load():
    return np.random.default_rng({seed}).normal(size=(60, 5)), np.arange(60) % 2
""")


def save_text(path, seed):
    path.write_bytes(np.random.default_rng(seed).integers(97, 123, 2000).astype("u1").tobytes())


@pytest.mark.parametrize("save, file, spec, flags", [
    (save_table, "table.npz", "table.npz", FEW),
    (save_function, "table.py", "table.py:load", FEW),
    (save_text, "letters.txt", "letters.txt",
     "--model gpt --widths 16 --base-width 16 --head-dim 8 --layers 1 --context 8 --val-size 4 --steps 2 "
     "--warmup 0 --lrs 0.01 --seeds 1 --no-plots"),
])
def test_another_content_of_the_same_data_is_refused_and_so_are_other_data(
        save, file, spec, flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    save(tmp_path / file, 0)
    flags = f"{flags} --data {spec}"
    done = run_sweep(out, flags)
    assert done.returncode == 0, done.stderr
    row = next(iter(analyze.read_rows(out).values()))
    assert row["data"] == spec and re.fullmatch("[0-9a-f]{16}", row["data_hash"])

    save(tmp_path / file, 1)
    refused_folder(out, f"another content of {spec}", flags)
    (tmp_path / file).rename(tmp_path / f"other_{file}")
    save(tmp_path / file, 0)
    refused_folder(out, f"data = '{spec}', not 'other_{spec}'", flags.replace(spec, f"other_{spec}"))
    monkeypatch.setattr(train, "train", None)
    assert run_sweep(out, flags).returncode == 0


def check(out, rows, *flags):
    """Call sweep.check_folder for an untracked sweep with these flags."""
    _, fixed, _ = parse(*flags)
    sweep.check_folder(out, rows, fixed, NO_TRACKING)


def test_a_row_that_lacks_a_setting_is_refused_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "train", None)
    row, = calm_rows("--loss ce --widths 8 --base-width 8").values()
    del row["clip"]
    train.append_rows(tmp_path / "runs.jsonl", [row])
    done = run_sweep(tmp_path, FEW)
    assert done.returncode == 2 and not done.stdout
    assert "runs.jsonl:1 lacks clip: another version wrote it" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("model, flags, words", [
    ("mlp", "--weight-decay 2", "weight_decay = 0.0, not 2.0"),
    ("gpt", "--weight-decay 2", "weight_decay = 0.0, not 2.0"),
    ("gpt", "--clip 2", "clip = 0.0, not 2.0"),
    ("gpt", "--eps 1", "eps = 1e-08, not 1.0"),
])
def test_defaults_that_depend_on_the_optimizer_are_compared_with_the_rows(tmp_path, model, flags, words):
    both = f"--model {model} --optimizer sgd adam"
    rows = calm_rows(both)
    check(tmp_path, rows, both)
    check(tmp_path, rows, both, "--widths 32 64 --seeds 5 --alpha 0.5")         # more runs of the same sweep
    with pytest.raises(InputError, match=re.escape(words)):
        check(tmp_path, rows, both, flags)


def test_settings_of_flags_may_equal_the_rows_defaults(tmp_path):
    rows = calm_rows("--model gpt --optimizer adam")
    check(tmp_path, rows, "--model gpt --optimizer adam --weight-decay 0.1 --clip 1")
    with pytest.raises(InputError, match="weight_decay = 0.1, not 0.0"):
        check(tmp_path, rows, "--model gpt --optimizer adam --weight-decay 0")


def refuses_a_second_sweep(module, out):
    """Require that a version of sweep.py locks a rank's file of rows, and no other's, until it is closed."""
    with module.open_folder(out), module.open_folder(out, rank=1):
        for rank in (0, 1):
            with pytest.raises(InputError, match="another sweep is writing to .*; wait for it, or use ano"):
                module.open_folder(out, rank)
    for rank in (0, 1):
        module.open_folder(out, rank).close()


def test_two_sweeps_cannot_write_to_one_file_of_rows(tmp_path):
    refuses_a_second_sweep(sweep, tmp_path)


def test_where_fcntl_is_missing_a_byte_beyond_all_rows_is_locked(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")        # stands in for Windows' locks

    def locking(number, mode, count):
        calls.append((mode, count, os.lseek(number, 0, os.SEEK_CUR)))
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)

    calls, rows = [], list(calm_rows("--loss ce").values())
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(LK_NBLCK=2, locking=locking))
    module_spec = importlib.util.spec_from_file_location("sweep_on_windows", sweep.__file__)
    on_windows = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(on_windows)
    assert sweep.fcntl is fcntl and on_windows.fcntl is None

    refuses_a_second_sweep(on_windows, tmp_path)
    assert len(calls) == 6 and set(calls) == {(2, 1, 2 ** 30)}
    with on_windows.open_folder(tmp_path):
        train.append_rows(tmp_path / "runs.jsonl", rows)
    assert (tmp_path / "runs.jsonl").read_text() == train.lines_of(rows)    # the locked byte is not written


# ---- out of memory ----

@pytest.mark.parametrize("most, error", [
    (4, torch.OutOfMemoryError("CUDA out of memory")),
    (2, MemoryError()),
    (1, RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory")),
], ids=["cuda", "python", "cpu"])
def test_stacks_that_do_not_fit_are_halved_and_the_rows_stay_the_same(tmp_path, monkeypatch, most, error):
    def tight(runs, *args, **kwargs):
        if len(runs) > most:
            kwargs["tracked"].append({"id": "half done", "step": 1, "layer": 0})
            raise error
        return whole(runs, *args, **kwargs)

    whole, flags = train.train, f"{FEW} --track 4 --steps 2"
    assert run_sweep(tmp_path / "free", flags).returncode == 0
    monkeypatch.setattr(train, "train", tight)
    sweep.say_once.cache_clear()
    done = run_sweep(tmp_path / "tight", flags)
    assert done.returncode == 0, done.stderr
    assert "width 16: out of memory for 6 runs at once; continuing with 3" in done.stderr
    assert sorted_rows(tmp_path / "tight") == sorted_rows(tmp_path / "free")
    free, tight = (analyze.read_rows(tmp_path / name, "track*.jsonl") for name in ("free", "tight"))
    assert free.keys() == tight.keys()


@pytest.mark.parametrize("too_wide", [8, 16])
def test_runs_that_fit_nowhere_become_flagged_rows_and_are_not_tried_again(tmp_path, monkeypatch, too_wide):
    def tight(runs, *args, **kwargs):
        calls.append(runs)
        if runs[0]["width"] >= too_wide:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(runs, *args, **kwargs)

    calls, whole = [], train.train
    monkeypatch.setattr(train, "train", tight)
    done = run_sweep(tmp_path, FEW)
    rows = analyze.read_rows(tmp_path).values()
    words = "out of memory" if too_wide == 16 else "No results: a single learning rate, or no run that fits"
    assert done.returncode == 0 and len(rows) == 12 and words in done.stdout, done.stderr
    failed = [row for row in rows if row["failed"] == "out of memory"]
    assert {row["width"] for row in failed} == {width for width in (8, 16) if width >= too_wide}
    assert all(row["final_train_loss"] is None for row in failed)
    flags = [flag for row in summary_of(tmp_path)["rows"] for flag in row["flags"]]
    assert ("width 16: out of memory" in flags) == (too_wide == 16)
    content = (tmp_path / "runs.jsonl").read_bytes()
    calls.clear()
    again = run_sweep(tmp_path, FEW)
    assert again.returncode == 0 and words in again.stdout
    assert not calls and (tmp_path / "runs.jsonl").read_bytes() == content


def test_one_failed_run_does_not_keep_wider_networks_waiting(tmp_path, monkeypatch):
    def tight(runs, *args, **kwargs):
        if any((run["width"], run["lr"], run["seed"]) == (8, 0.25, 1) for run in runs):
            raise MemoryError
        return whole(runs, *args, **kwargs)

    whole = train.train
    monkeypatch.setattr(train, "train", tight)
    done = run_sweep(tmp_path, TINY, "--loss ce --lr-range 0.25 4 --no-plots")
    assert done.returncode == 0, done.stderr
    assert sum(bool(row["failed"]) for row in analyze.read_rows(tmp_path).values()) == 1
    row, = summary_of(tmp_path)["rows"]
    assert row["widths"] == [8, 16] and None not in row["optimal_lr"]
    assert "width 8: out of memory" in row["flags"]


@pytest.mark.parametrize("lrs", ["0.1", "0.1 0.2"])
def test_a_tracked_sweep_of_which_nothing_fits_says_so(tmp_path, monkeypatch, lrs):
    def none(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(train, "train", none)
    sweep.say_once.cache_clear()
    flags = f"--widths 3000000 --track 1 --seeds 1 --steps 1 --loss ce --lrs {lrs}"
    done, again = (run_sweep(tmp_path, flags) for _ in range(2))
    assert done.returncode == 0, done.stderr
    assert "width 3000000: out of memory for a single run" in done.stderr
    for ended in (done, again):
        assert "no run that fits into memory" in ended.stdout
    assert all(row["failed"] == "out of memory" for row in analyze.read_rows(tmp_path).values())
