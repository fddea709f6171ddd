"""sweep.py: which LRs a search asks for, which runs train together, and what a result folder goes through.

Searches run on made-up landscapes {k: (loss, stable)} over lattice points k, sweeps on networks that train
in seconds. Those that are killed, interrupted or shared out over processes: test_faults.py.
"""
import contextlib
import functools
import io
import itertools
import json
import math
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import train        # before torch: it asks for reproducible products
import torch

import analyze
import param
import plots
import sweep

HERE = Path(sweep.__file__).parent
MAIN = {"sweep.py": sweep.main, "train.py": train.main, "analyze.py": analyze.main, "plots.py": plots.main}
KINDS = pytest.mark.parametrize("kind", ["grid", "coarse-to-fine"])
torch.set_num_threads(1)        # the nets here are tiny; threads would only wait for each other


def run_script(script, *flags):
    """The script's main in this process, as its command line would call it: returncode, stdout, stderr."""
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = [script, *map(str, flags)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            train.command_line(MAIN[script])
        code = 0
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv = argv
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def results(row):
    return {key: value for key, value in row.items() if key != "seconds"}


def sorted_rows(out):
    return sorted((results(row) for row in analyze.read_rows(out).values()), key=lambda row: row["id"])


def summary_of(out):
    return json.loads((out / "summary.json").read_text())


# ---- the search of one cell, on landscapes cell_at(k) -> (loss, stable), of one seed or arrays of several ----

DIVERGED = analyze.DIVERGED


def search(kind, cell_at, low=-16, high=6, hint=None, extensions=sweep.EXTENSIONS, chance=math.inf):
    """{k: (loss, stable)} of every point that a search asked for; none may be asked for twice."""
    known = {}
    while points := sweep.next_points(known, low, high, kind, extensions, hint, chance):
        assert not points & known.keys()
        known.update((k, cell_at(k)) for k in points)
    return known


def found(known):
    """(optimum, edge) of one seed, told without sweep.py."""
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
            for a, b in zip(found(full), found(coarse)):
                assert abs(a - b) <= 1
            runs["grid"] += len(full)
            runs["coarse-to-fine"] += len(coarse)
            hint = found(coarse)
            assert hint == sweep.optimum_and_edge(coarse)
    assert runs["coarse-to-fine"] <= 0.35 * runs["grid"]


def test_a_search_finds_its_way_from_any_hint_also_where_all_is_unstable():
    generator = np.random.default_rng(0)
    for _ in range(100):
        optimum, gap = generator.uniform(-12, 3), generator.uniform(0.5, 6)
        far = generator.normal(0, 0.1, 100)     # above the edge losses are finite, without order, and not stable

        def cell_at(k):
            return (0.3 + 0.01 * (k - optimum) ** 2, True) if k < optimum + gap else (5 + far[k + 50], False)

        full = found(search("grid", cell_at))
        for off in (-12, -5, -1, 3, 8, 15):
            hint = full[0] + off, full[0] + off + generator.integers(-1, 6)
            coarse = found(search("coarse-to-fine", cell_at, hint=hint))
            assert abs(full[0] - coarse[0]) <= 1 and abs(full[1] - coarse[1]) <= 1


def random_landscape(generator, seeds):
    """{k: (losses (S,), stable (S,))} without any order, some of it diverged."""
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
        reach = range(low - extensions * sweep.COARSE, high + extensions * sweep.COARSE + 1)
        optimum = int(generator.integers(reach[0], reach[-1] + 1))
        hint = (optimum, int(generator.integers(optimum, reach[-1] + 1))) if generator.random() < 0.5 else None
        chance = generator.uniform(0, 9)
        known = search(kind, landscape.get, low, high, hint, extensions, chance)
        assert known.keys() <= set(reach)

        ks, losses, stable = sweep.table_of(known)
        if (losses >= DIVERGED).any(0).all():
            assert ks[0] == reach[0]                # no LR at which every seed ended, and it went down to the end
            continue
        best = sweep.optimum_and_edge(known)[0]
        assert {best - 1, best + 1} & set(reach) <= known.keys()
        for edge, above in analyze.edges(losses, stable):
            assert above is None or ks[above] - ks[edge] == 1
            assert edge is None or above is not None or ks[edge] == reach[-1]


def test_a_hint_where_nothing_is_stable_asks_for_no_more_than_the_grid():
    known = search("coarse-to-fine", lambda k: (5 + 0.01 * (k + 9) ** 2, False), hint=(-3, -3))
    assert min(known) == -16 and len(known) <= 23


def cell_on(losses, ks, chance):
    """The cell of one seed with these losses {k: loss}."""
    values = np.array([[losses[k] for k in ks]])
    return {"lr": 2.0 ** (np.array(ks) / 2), "losses": values, "accuracies": 0 * values, "chance": chance}


def test_a_hint_far_above_the_edge_finds_down_under_a_criterion_relative_to_the_best():
    generator, ks = np.random.default_rng(0), range(-60, 40)
    for _ in range(50):
        losses = {k: 2.3 + 0.01 * (k + 9) ** 2 if k <= -6 else 6 + generator.normal(0, 0.2) for k in ks}
        known, _ = sweep.follow(
            cell_on(losses, ks, 3.2), {k: i for i, k in enumerate(ks)}, ("best+1", 1.0),
            lambda known: sweep.next_points(known, -16, 6, "coarse-to-fine", 4, (0, 1), 3.2))
        assert sweep.optimum_and_edge(known)[:2] == (-9, -6)
        assert not known[-5][1]


@KINDS
def test_the_search_ends_with_the_same_points_wherever_it_was_cut_and_whatever_else_is_there(kind):
    generator = np.random.default_rng(0)

    def finish(landscape, done, cut=False):
        while True:
            ks = sorted(done)
            known, points = sweep.follow(
                cell_on(landscape, ks, 9.0), {k: i for i, k in enumerate(ks)}, ("best+1", 1.0),
                lambda known: sweep.next_points(known, -16, 6, kind, sweep.EXTENSIONS))
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
        assert found(known) == (optimum, optimum + 2)
    assert len(search(kind, lambda k: (-k, True), -4, 4)) < 100         # no bound at all: it ends
    known = search(kind, lambda k: (abs(k - 3.3), True))
    assert found(known)[0] == 3         # refined although nothing is unstable
    nothing = {k: (DIVERGED, False) for k in range(-100, 100)}
    assert not sweep.next_points(nothing, -16, 6, kind, sweep.EXTENSIONS)


def test_every_seeds_edge_is_bracketed_between_neighbouring_points():
    edges = np.array([-3, 1, 4])

    def cell_at(k):
        stable = k <= edges
        return np.where(stable, 0.3 + 0.01 * (k + 6) ** 2, DIVERGED), stable

    known = search("coarse-to-fine", cell_at)
    assert {-3, -2, 1, 2, 4, 5} <= known.keys()
    assert sweep.optimum_and_edge(known)[:2] == (-6, -3)        # the first seed's to lose stability


# ---- the search of all widths ----

def rows_on(landscape, runs, failed=lambda width, k: False):
    """Result rows of runs whose loss and divergence landscape(width, k) gives as (loss, stable)."""
    rows = {}
    for run in runs:
        width, k = run["width"], round(2 * math.log2(run["lr"]))
        loss, stable = landscape(width, k)
        row = {**run, "id": train.run_id(run), "failed": "out of memory" if failed(width, k) else None,
               "chance_loss": 9.0, "diverged_at": None if stable else 1, "seconds": 1.0,
               "final_train_loss": loss if stable else None, "train_accuracy": 0.0,
               **dict.fromkeys(train.VALIDATION)}
        rows[row["id"]] = row
    return rows


THREE_WIDTHS = ["--widths", "8", "16", "32", "--base-width", "8", "--seeds", "2", "--loss", "ce"]


def swept_landscape(landscape, *flags, failed=lambda width, k: False):
    """([widths asked for in each round], {width: lattice points of its rows}) of a whole search."""
    args, given, curves = sweep.parse([*THREE_WIDTHS, *flags])
    rounds, rows = [], {}
    while missing := sweep.missing_runs(args, given, curves, rows):
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
    assert points[8] >= set(range(-16, 7, sweep.COARSE)) and points[8] >= {-4, -3, -2, -1, 0}
    assert points[16] == {-5, -4, -3, -2, 0} | {-6}         # around the last, and a step down
    assert points[32] == {-7, -6, -5, -4, -2} | {-8}
    rounds, points = swept_landscape(landscape, "--search", "grid")
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
    assert points[16] >= set(range(-16, 7, sweep.COARSE)) and {-5, -4, -3, -2, -1} <= points[16]
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
    """(report, [seconds on the clock]) of a grid of 23 LRs, two seeds and three widths."""
    args, given, curves = sweep.parse([*THREE_WIDTHS, "--search", "grid"])
    clock = [0.0]
    monkeypatch.setattr(sweep.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(sys, "stderr", stream)
    return sweep.progress_line(args, given, curves, rows), clock


def test_the_progress_line_tells_the_time_left_from_what_runs_took(monkeypatch):
    rows = {}
    report, clock = progress(monkeypatch, Terminal(), rows)
    for i in range(46 + 23):        # all of width 8 at a second each, half of width 16 at three
        rows[i] = {"width": 8 if i < 46 else 16, "seconds": 1.0 if i < 46 else 3.0}
    clock[0] = 2.0 * (46 + 3 * 23)                          # two seconds pass for each of theirs
    report(16)
    size = {width: 100 * width + 3 * width ** 2 + 2 * width for width in (16, 32)}
    left = 2 * 3.0 * (23 + 46 * size[32] / size[16])
    line = f"69/138 runs, width 16, 0.3 runs/s, {left // 60:.0f}:{left % 60:02.0f} left"
    assert sys.stderr.getvalue().strip() == line


def test_where_no_terminal_is_the_progress_line_comes_once_a_minute(monkeypatch):
    rows = {0: {"width": 8, "seconds": 1.0}}
    report, clock = progress(monkeypatch, io.StringIO(), rows)
    for i, (clock[0], lines) in enumerate(((59.0, 0), (60.0, 1), (100.0, 1), (121.0, 2))):
        rows[i + 1] = {"width": 8, "seconds": 1.0}
        report(8)
        assert len(sys.stderr.getvalue().splitlines()) == lines


# ---- which runs train together ----

@pytest.mark.parametrize("threads", [1, 2, 3, 16])
@pytest.mark.parametrize("settings", [{}, {"optimizer": "adam"}, {"hidden_layers": 7}, {"model": "gpt"}], ids=str)
def test_stacks_hold_every_run_once_share_them_evenly_and_keep_to_the_memory_that_is_stated(
        monkeypatch, threads, settings):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    whole = sweep.replica_size
    size = functools.cache(lambda width: whole(train.configure(dict(settings, width=width))))
    monkeypatch.setattr(sweep, "replica_size", lambda run: size(run["width"]))      # seeds make no difference
    together = []
    for width, count, shares in itertools.product((32, 128, 512, 4096), (1, 7, 46, 200), (1, 3)):
        runs = [train.configure(dict(settings, width=width, seed=seed)) for seed in range(count)]
        parts = list(sweep.stacks(runs, "cpu", "auto", shares))
        assert sum(parts, []) == runs and all(parts)
        assert len(parts) >= min(shares, count // threads)
        longest = max(map(len, parts))
        assert longest == 1 or (longest <= 64 and (longest + 1) * size(width)[1] <= sweep.CPU_MEMORY)
        assert longest - min(map(len, parts)) < max(2, 2 * threads)
        together.append(longest)
    if "model" in settings:
        assert max(together) == 1           # attention loses in a stack
    else:
        assert max(together) > threads


def test_runs_share_a_stack_only_where_train_allows_it():
    differing = [dict(lr=0.2), dict(seed=1), dict(param="mup", alpha=0.5), dict(loss="mse"), dict(width=32),
                 dict(weight_decay=0.1), dict(optimizer="adam")]
    runs = [train.configure({"width": 16, "base_width": 16, **run}) for run in ({}, *differing)]
    parts = list(sweep.stacks(runs))
    assert [len(part) for part in parts] == [4, 1, 1, 1, 1]
    assert list(sweep.stacks(runs[:4], size=3)) == [runs[:2], runs[2:4]]
    assert [len(part) for part in sweep.stacks(runs[:4], size=1)] == [1, 1, 1, 1]


def test_a_stack_on_a_cuda_device_takes_half_of_the_free_memory(monkeypatch):
    config = train.configure({"width": 1024})
    memory = sweep.replica_size(config)[1]
    for free, most in ((20.5 * memory, 10), (1.5 * memory, 1), (1e6 * memory, 256)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free), None))
        assert sweep.most_replicas(config, "cuda:0") == (most, 1)


def team_of(monkeypatch, ranks, store=None):
    """The teams of ranks that meet at one store."""
    store = store or torch.distributed.HashStore()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "any")
    teams = []
    for rank in range(ranks):
        monkeypatch.setattr(torch.distributed, "rendezvous", lambda url: iter([(store, rank, ranks)]))
        teams.append(sweep.Team())
    return teams


def test_ranks_that_torchrun_started_again_share_all_stacks_out_anew(monkeypatch):
    store = torch.distributed.HashStore()           # it outlives the ranks
    stacks = [[{"width": 8}], [{"width": 16}]]
    for attempt in "012":
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        team, = team_of(monkeypatch, 1, store)
        for _ in range(2):                          # rounds
            assert list(team.share(stacks)) == stacks[::-1]
        team.meet()


def test_every_stack_falls_to_one_rank_the_widest_first(monkeypatch):
    stacks = [[{"width": width}] for width in (8, 8, 16, 16, 32)]
    for _ in range(2):
        turns = [team.share(stacks) for team in team_of(monkeypatch, 2)]
        taken = [next(turns[rank])[0]["width"] for rank in (0, 1, 0, 0, 1)]     # whoever is free
        assert taken == [32, 16, 16, 8, 8]
        assert [list(turn) for turn in turns] == [[], []]


def test_ranks_exchange_the_rows_that_each_wrote(monkeypatch, tmp_path):
    def work(team):
        train.append_rows(tmp_path / sweep.rows_file("runs", team.rank), [{"id": str(team.rank)}])
        team.exchange(tmp_path, rows[team.rank])

    rows = [{}, {}]
    threads = [threading.Thread(target=work, args=[team]) for team in team_of(monkeypatch, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert rows[0].keys() == rows[1].keys() == {"0", "1"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs-rank1.jsonl", "runs.jsonl"]


# ---- the command line ----

def test_without_flags_it_is_the_headline():
    args, given, curves = sweep.parse([])
    assert args["preset"] == "headline" and args["out"] == Path("out/headline")
    assert args["widths"] == [64, 128, 256, 512, 1024]
    run, *_ = sweep.runs_of(given, curves[0], 64, 0.1, args["seeds"])
    assert (run["hidden_layers"], run["steps"], run["data"]) == (4, 100, "multi_index")
    assert [curve[:3] for curve in curves] == [("ce", "sp", "sgd"), ("mse", "sp", "sgd")]


@pytest.mark.parametrize("scale", ["cpu", "paper"])
@pytest.mark.parametrize("preset", sweep.PRESETS)
def test_every_preset_parses_builds_and_says_what_its_table_says(preset, scale):
    args, given, curves = sweep.parse(["--preset", preset, "--scale", scale])
    _, flags, of_paper = sweep.PRESETS[preset]
    told = {**flags, **(of_paper if scale == "paper" else {})}
    if told.get("lrs"):
        told["search"] = "grid"
    assert {name: args[name] for name in told} == told

    wanted = [dict(zip(told, values)) for values in itertools.product(
        *(told[name] for name in told if name in sweep.CURVE))] if False else told.get("curves", [{}])
    for settings in wanted:
        assert any(settings.items() <= dict(zip(sweep.CURVE, curve)).items() for curve in curves)
    for i, name in enumerate(sweep.CURVE):
        if name in told:
            assert {curve[i] for curve in curves} >= set(told[name])

    for curve, width in itertools.product(curves, args["widths"]):
        lr_of, low, high, _ = sweep.lattice(args, curve[sweep.CURVE.index("optimizer")])
        runs = sweep.runs_of(given, curve, width, lr_of(low), args["seeds"])
        assert sum(sweep.stacks(runs), []) == runs
        assert low <= high
