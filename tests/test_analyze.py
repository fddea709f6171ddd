"""analyze.py: optimum, edge, flags and tables of rows that exist already, and its script.

Made-up rows have a known optimum and edge; the rest are sweeps of networks that train in seconds.
"""
import io
import itertools
import json
import math
import re
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

import analyze
import config as settings
import estimate
import plots
import sweep
import train
from config import CURVE, GRID, RESULTS, SETTINGS, VALIDATION, InputError, curve_of
from conftest import call

MAIN = {"sweep.py": sweep.main, "analyze.py": analyze.main}


def run_script(script, *flags):
    """Run a script's main in this process, as its command line would call it.

    Returns an object with returncode, stdout and stderr.
    """
    return call(lambda: settings.command_line(MAIN[script]), script, *flags)


def run_sweep(out, *flags):
    """Run python sweep.py with these flags, in words, and --out."""
    done = run_script("sweep.py", *" ".join(flags).split(), "--out", out)
    assert done.returncode == 0, done.stderr
    return done


def refused(*flags):
    """Return the one line with which analyze.py refuses these flags."""
    done = run_script("analyze.py", *flags)
    line, = done.stderr.splitlines()
    assert done.returncode == 2 and not done.stdout
    return line


def summary_of(out):
    return json.loads((out / "summary.json").read_text())


# ---- made-up rows: optimum and edge ----

CHANCE = 0.7
SHAPE_INFO = {"hidden_tensors": 2, "uneven": False, "roles_given": False}


def row_of(loss, /, accuracy=0.9, failed=None, **run):
    """Return a result row with this final loss, None if the run diverged."""
    config = settings.configure(run)
    finished = loss is not None and not failed
    results = {**dict.fromkeys(RESULTS), "final_train_loss": loss,
               "train_accuracy": accuracy if finished else None,
               "diverged_at": None if finished or failed else 3}
    results |= {name: loss if finished else None for name in VALIDATION}
    return {"id": settings.run_id(config), **config, **results, "failed": failed, "chance_loss": CHANCE,
            "shape_info": None if failed else SHAPE_INFO, "seconds": 1.0}


def rows_of(losses, widths=(8, 16), **run):
    """Return rows of losses[seed][i] at LRs 0.1, 0.2, 0.4, ..., the same at every width."""
    return [row_of(loss, width=width, seed=seed, lr=0.1 * 2 ** i, **run)
            for width in widths for seed, line in enumerate(losses) for i, loss in enumerate(line)]


STEP = math.log(2) / 2          # of parabola_rows


def parabola_rows(width, optimum, edges, **run):
    """Return rows of one seed for each edge, whose losses are a parabola in log LR up to its edge, and
    diverged above."""
    rows = []
    for k in range(-20, 10):
        log_lr = k * STEP
        for seed, edge in enumerate(edges):
            loss = 0.3 + 0.03 * (log_lr - optimum) ** 2 if log_lr <= edge else None
            rows.append(row_of(loss, width=width, seed=seed, lr=math.exp(log_lr), **run))
    return rows


def power_law_rows(exponent=-0.5, widths=(64, 256, 1024), gap=2.5, **run):
    """Return rows of three seeds whose edge follows a power law of width, with the middle of its bracket half
    a step below 1 at width 64, and whose optimum lies `gap` steps below that middle."""
    rows = []
    for width in widths:
        middle = -0.5 * STEP + exponent * math.log(width / 64)
        rows += parabola_rows(width, middle - gap * STEP, 3 * [middle], **run)
    return rows


def written(out, rows):
    """Write rows to a folder, and return it."""
    out.mkdir(exist_ok=True)
    train.append_rows(out / "runs.jsonl", rows)
    return out


def test_optimum_and_edge_of_noiseless_losses_are_exact():
    optima, edges = np.array([[-2.0, -0.9], [-2.0, -0.9]]).T - [0, math.log(2)]
    row, = analyze.summarize(parabola_rows(64, optima[0], 3 * [edges[0]])
                             + parabola_rows(256, optima[1], 3 * [edges[1]]))
    assert row["widths"] == [64, 256]
    assert np.log(row["optimal_lr"]) == pytest.approx(optima, abs=1e-9)
    assert row["optimal_exponent"] == pytest.approx(-0.5, abs=1e-9)
    assert row["max_stable_exponent"] == pytest.approx(-0.5, abs=1e-9)
    for stable, unstable, edge in zip(row["max_stable_lr"], row["min_unstable_lr"], edges):
        assert math.log(stable) <= edge < math.log(unstable)
        assert unstable / stable == pytest.approx(math.sqrt(2))
    assert row["flags"] == []


def test_every_seed_has_its_own_edge_and_one_diverged_seed_moves_their_mean_down():
    own = [analyze.summarize(parabola_rows(64, -2.0, [edge]))[0] for edge in (-0.9, -1.5, -0.9)]
    row, = analyze.summarize(parabola_rows(64, -2.0, [-0.9, -1.5, -0.9]))
    for name in ("max_stable_lr", "min_unstable_lr"):
        logs = [math.log(of_seed[name][0]) for of_seed in own]
        assert logs[1] < logs[0] == logs[2]
        assert math.log(row[name][0]) == pytest.approx(sum(logs) / 3)


def test_an_lr_at_which_one_seed_diverged_is_not_optimal():
    row, = analyze.summarize(rows_of([[0.5, 0.4, 0.1, None], [0.5, 0.4, None, None]]))
    assert row["best_train_loss"] == [0.4, 0.4]
    assert max(row["optimal_lr"]) < 0.3


@pytest.mark.parametrize("name, limit", [
    ("chance=0.05", 0.41), ("best+1=0.2", 0.5), ("learned=0.05", 0.3 + 0.05 * 7.9), ("accuracy=0.5", None)])
def test_stability_criteria(name, limit):
    lr = np.exp(np.arange(-6.0, 0.0, 0.5))
    losses = 0.3 + 0.05 * (np.log(lr) + 4) ** 2
    accuracies = np.where(lr > math.exp(-1.2), 0.4, 0.9)
    cell = {"lr": lr, "losses": losses[None], "accuracies": accuracies[None], "chance": 8.2}
    stable, = analyze.stability(cell, analyze.parse_criterion(name))
    by_hand = losses < limit if limit else accuracies > 0.5
    assert (stable == by_hand).all()
    assert 0 < stable.sum() < len(lr)


def test_a_criterion_has_a_default_threshold_and_unknown_ones_are_refused():
    assert analyze.parse_criterion("accuracy") == ("accuracy", 0.3)
    assert analyze.parse_criterion("learned") == ("learned", 0.5)
    assert analyze.parse_criterion("best+1=2") == ("best+1", 2.0)
    for text, words in (("finite", "choose from chance"), ("1.2x", "choose from chance"),
                        ("chance=nan", "must be a number")):
        with pytest.raises(InputError, match=words):
            analyze.parse_criterion(text)


def test_learning_rates_that_lack_a_seed_or_failed_are_left_out():
    rows = rows_of([[0.5, 0.4, 0.5], [0.5, 0.4, 0.5]], widths=[8])
    rows[0] = row_of(None, failed="out of memory", width=8, seed=0, lr=0.1)
    curve = curve_of(rows[0])
    assert analyze.cell_of(rows[:-1], curve, 8, seeds=2)["lr"].tolist() == [0.2]
    assert analyze.cell_of(rows[:-1], curve, 8, seeds=1)["lr"].tolist() == [0.2, 0.4]
    assert analyze.cell_of(rows, curve, 16, seeds=1)["lr"].tolist() == []


def test_a_row_of_the_summary_has_every_seeds_validation_at_the_optimum():
    row, = analyze.summarize(rows_of([[0.5, 0.4, 0.6, None], [0.6, 0.3, 0.7, 0.5]]))
    assert row["at_optimum"]["val_loss"] == [[0.4, 0.3], [0.4, 0.3]]
    assert row["best_train_loss"] == pytest.approx([0.35, 0.35])
    assert row["curves"][0]["train_loss"] == [[0.5, 0.4, 0.6, None], [0.6, 0.3, 0.7, 0.5]]
    assert row["curves"][0]["stable"] == [[True, True, True, False], [True, True, False, True]]
    assert row["chance_loss"] == CHANCE


def test_curves_stand_in_the_order_of_their_tables_whatever_the_order_of_rows():
    rows = [row for param in ("sp", "mup") for loss in ("ce", "mse")
            for row in rows_of([[0.5, 0.4, 0.5, None]] * 2, param=param, loss=loss)]
    for ordered in (rows, rows[::-1]):
        assert [(row["param"], row["loss"]) for row in analyze.summarize(ordered)] == [
            ("sp", "ce"), ("sp", "mse"), ("mup", "ce"), ("mup", "mse")]


def test_slopes_between_widths_and_what_the_grid_lets_them_be_known_to():
    step, widths = math.log(2) / 2, [64, 128, 512]
    points = [estimate.Point(None, None, False, np.full(3, edge - step / 2), np.full(3, edge + step / 2))
              for edge in (0.0, -0.5 * math.log(2), -2.5 * math.log(2))]
    local = analyze.local_slopes(widths, points)
    assert local["local_max_stable"] == pytest.approx([-0.5, -1.0])
    one = math.sqrt(2 / 12) * step / math.log(2)        # the difference of two uniform ones, over an octave
    assert local["local_resolution"] == pytest.approx([one, one / 2])


def test_the_edge_times_the_initial_sharpness_and_its_exponent():
    rows = [dict(row, initial_sharpness=3.0 * row["width"] ** 0.25)
            for row in power_law_rows(widths=(64, 256))]
    product = analyze.summarize(rows)[0]["edge_times_sharpness"]
    edges = math.exp(-0.5 * STEP) * np.array([1.0, 0.5])
    assert product["values"] == pytest.approx(edges * 3.0 * np.array([64, 256]) ** 0.25 / 2)
    assert product["exponent"] == pytest.approx(-0.25)
    assert product["interval"][0] < -0.25 < product["interval"][1]
    line, = re.findall("edge x initial sharpness.*", analyze.exponent_table(analyze.summarize(rows)))
    assert "; exponent -0.25 [" in line
    row, = summary = analyze.summarize(power_law_rows(widths=(64, 256)))
    assert row["edge_times_sharpness"] is None and "sharpness" not in analyze.exponent_table(summary)


# ---- flags ----

def cell_of(*losses):
    """Return a cell of LRs 1, 2, 4, ... from lists of losses, None where a run diverged."""
    losses = estimate.as_losses(losses)
    lr = 2.0 ** np.arange(losses.shape[1])
    return {"lr": lr, "losses": losses, "accuracies": 0 * losses, "chance": 9.0}


def flags_of(*cells, criterion=("chance", 1.0)):
    """Return the flags of cells at widths 64, 128, ..."""
    points = [estimate.optimum_and_edge(cell["lr"], cell["losses"], analyze.stability(cell, criterion))
              for cell in cells]
    widths = [64 * 2 ** i for i in range(len(cells))]
    exponents = estimate.exponents_of(widths, points)
    return analyze.flags_of(points, exponents, cells, widths, [], criterion)


def test_a_width_that_does_not_count_is_flagged_with_the_reason_and_the_remedy():
    good, slow = cell_of(*[[0.5, 0.4, 0.5, None]] * 2), cell_of([9.8, 9.5, 9.9, None], [9.8, 8.5, 9.9, None])
    assert flags_of(good, good, good, good) == []
    flag = "no stable LR for 1 of 2 seeds under chance=1 " \
           "(lowest mean loss 9 for a constant predictor's 9); more --steps, or another --stable-if"
    assert flags_of(good, slow, good, slow) == [
        "edge from 2 of 4 widths", f"width 128: {flag}", f"width 512: {flag}"]
    flags = flags_of(good, good, slow, criterion=("accuracy", 0.3))
    assert "width 64: no stable LR for 2 of 2 seeds under accuracy=0.3; " \
           "more --steps, or another --stable-if" in flags
    above = cell_of([0.5, 0.4, 0.5, None], [0.5, 0.4, 0.5, 0.6])
    assert flags_of(good, above, good) == [
        "edge from 2 of 3 widths",
        "width 128: nothing unstable up to LR 8 for 1 of 2 seeds; widen --lr-range"]
    none = cell_of([0.5, None], [None, 0.5])
    assert flags_of(good, good, none) == [
        "edge from 2 of 3 widths", "optimum from 2 of 3 widths",
        "width 256: at every LR at least one of 2 seeds diverged; use lower --lrs"]


def test_an_optimum_and_an_edge_that_are_hardly_known_are_flagged():
    words = "is known to a factor of {} only; more --seeds, or LRs between"
    flat, sharp = cell_of(*[[0.4] * 6 + [None]] * 2), cell_of(*[[0.5, 0.4, 0.5, None]] * 2)
    assert [flag for flag in flags_of(flat, sharp) if "known" in flag] == [
        f"width 64: the optimal LR {words.format(32)}"]
    sharp["lr"] = 10.0 ** np.arange(4)
    assert flags_of(sharp, sharp) == [f"width {width}: the edge {words.format(10)}" for width in (64, 128)]


@pytest.mark.parametrize("losses, flag, unknown", [
    ([[0.5, 0.4, 0.5, None]] * 2, None, []),
    ([[0.4, 0.5, None]] * 2, "optimum at the grid's edge", []),
    ([[0.5, 0.4, 0.5]] * 2, "nothing unstable up to LR 0.4", ["min_unstable_lr"]),
    ([[0.9, 0.8, 0.9]] * 2, "no stable LR", ["max_stable_lr", "min_unstable_lr"]),
    ([[None, None]] * 2, "at every LR at least one of 2 seeds diverged",
     ["optimal_lr", "max_stable_lr", "min_unstable_lr", "best_train_loss"]),
    ([[0.5, None], [None, 0.5]], "at every LR at least one of 2 seeds diverged",
     ["optimal_lr", "min_unstable_lr", "best_train_loss"]),
], ids=["none", "grid's edge", "nothing unstable", "no stable LR", "all diverged", "one seed diverged"])
def test_flags_say_why_a_number_is_missing_or_not_to_be_trusted(losses, flag, unknown):
    row, = summary = analyze.summarize(rows_of(losses))
    for width, line in zip((8, 16), row["flags"]):
        assert line.startswith(f"width {width}: {flag}")
    assert len(row["flags"]) == (2 if flag else 0)
    for name in ("optimal_lr", "max_stable_lr", "min_unstable_lr", "best_train_loss"):
        assert (row[name] == [None, None]) == (name in unknown), name
    json.dumps(summary, allow_nan=False)

    lines = analyze.exponent_table(summary).splitlines()
    cells = [line.split()[3:] for line in lines if line.split()[3:4] in (["8"], ["16"])]
    sloped = "min_unstable_lr" not in unknown               # the edge's slope from the width before
    assert [len(cell) for cell in cells] == [5, 5 + 3 * sloped]  # width, optimum, loss, bracket, slope ± x
    assert all(cell[:5].count("-") == len(unknown) for cell in cells)
    assert sum(line.startswith("! ") for line in lines) == len(row["flags"])


def test_one_seed_one_width_and_runs_out_of_memory_are_flagged():
    rows = rows_of([[0.5, 0.4, 0.5, None]], widths=[8])
    rows.append(row_of(None, failed="out of memory", width=16, lr=0.1))
    row, = analyze.summarize(rows)
    for words in ("no exponent worth the name", "one seed", "width 16: out of memory"):
        assert sum(words in flag for flag in row["flags"]) == 1


@pytest.mark.parametrize("widths, close", [([100], True), ([100, 109], True), ([100, 111], False),
                                           ([100, 105, 120], False)])
def test_widths_within_a_factor_of_1_1_are_flagged(widths, close):
    row, = analyze.summarize(rows_of([[0.5, 0.4, 0.5, None]] * 2, widths))
    assert row["flags"] == close * ["widths within a factor of 1.1: no exponent worth the name; "
                                    "use --widths farther apart"]


# ---- the verdict ----

def test_the_verdict_is_held_missed_or_undecided():
    nan = math.nan
    for predicted, interval, verdict in (
            (-0.5, (-0.7, -0.25), "held"), (-0.5, (-0.5, -0.25), "held"), (-0.25, (-0.75, -0.25), "held"),
            (-0.5, (-0.8, -0.25), "undecided"), (0.0, (-5.0, 5.0), "undecided"),
            (-0.5, (-0.49, -0.25), "missed"), (-0.5, (-0.9, -0.51), "missed"), (-2.0, (-1.0, 1.0), "missed"),
            (nan, (-0.7, -0.25), None), (-math.inf, (-0.7, -0.25), None), (-0.5, (nan, nan), None)):
        assert analyze.verdict(predicted, interval) == verdict


POINTER = "Missed: see \"Why don't I see a shift?\" in README.md"


def test_verdicts_stand_beside_the_exponents_and_what_missed_is_pointed_to_the_reasons():
    """The prediction for CE in SP is -1/2."""
    held, = analyze.summarize(power_law_rows())
    missed, = analyze.summarize(power_law_rows(exponent=-1, widths=(64, 128, 256)))
    jitter = np.array([-1.2, 0.0, 1.2])
    undecided, = analyze.summarize([
        row for width, sign in ((64, 1), (256, -1))
        for row in parabola_rows(width, -1.5 - math.log(width / 64) / 2,
                                 -0.1 - math.log(width / 64) / 2 + sign * jitter)])
    assert [row["predicted_max_stable_exponent"] for row in (held, missed, undecided)] == [-0.5] * 3
    assert (held["max_stable_verdict"], held["optimal_verdict"]) == ("held", "held")
    assert (missed["max_stable_verdict"], missed["optimal_verdict"]) == ("missed", "missed")
    assert undecided["max_stable_verdict"] == "undecided"
    only_edge = {**held, "max_stable_verdict": "missed"}
    only_optimum = {**held, "optimal_verdict": "missed"}

    def first_lines(*summary):
        return analyze.exponent_table(summary).splitlines()[3:]

    for rows, pointed in (([held], False), ([undecided], False), ([missed], True), ([held, missed], True),
                          ([only_edge], True), ([only_optimum], True)):
        lines = first_lines(*rows)
        for row, line in zip(rows, lines):
            verdicts = [word for word in line.split() if word in ("held", "missed", "undecided")]
            assert verdicts == [row["max_stable_verdict"], row["optimal_verdict"]]
        assert (lines[len(rows)] == POINTER) == pointed and lines.count(POINTER) == pointed
    readme = Path(analyze.__file__).with_name("README.md").read_text()
    assert "\n## Why don't I see a shift?\n" in readme


# ---- learning rates at widths that were not swept, or left out ----

def test_rates_at_another_width_are_those_of_the_power_law():
    summary = analyze.summarize(power_law_rows()
                                + power_law_rows(loss="mse", exponent=-1, widths=(64, 128, 256)))
    at = analyze.rates_at(summary, [4096, 128])
    json.dumps(at, allow_nan=False)
    assert [(entry["loss"], entry["width"]) for entry in at] == [
        ("ce", 4096), ("ce", 128), ("mse", 4096), ("mse", 128)]
    for entry in at:
        edge = math.exp(-0.5 * STEP) * (entry["width"] / 64) ** (-0.5 if entry["loss"] == "ce" else -1)
        for how in ("predicted", "fitted"):
            for kind, expected in (("max_stable", edge), ("optimal", edge * math.exp(-2.5 * STEP))):
                lr, low, high = entry[kind][how]
                assert lr == pytest.approx(expected)
                assert low < lr < high and high / lr == pytest.approx(lr / low)
        optima = [entry["optimal"][how][0] for how in ("predicted", "fitted")]
        assert entry["recommended"] == min(entry["max_stable"]["predicted"][1], *optima)

    head, *lines = analyze.rates_table(at).splitlines()[3:]
    assert len(lines) == 2 * len(at)
    for entry, pair in zip(at, zip(lines[::2], lines[1::2])):
        for how, line in zip(("predicted", "fitted"), pair):
            assert line.split()[:5] == [entry["loss"], "sp", "sgd", str(entry["width"]), how]
            for kind in ("optimal", "max_stable"):
                assert "{:.3g} [{:.3g}, {:.3g}]".format(*entry[kind][how]) in line
        assert pair[0].split()[-1] == f"{entry['recommended']:.3g}" and pair[1].rstrip().endswith("]")


@pytest.mark.parametrize("settings, predicted", [
    ({}, (-1.0, -0.5)),
    ({"lr_factor": "blocks.*norm*=0"}, (-1.0, -0.5)),       # the final norm's gain still trains
    ({"lr_factor": "norm.weight=0"}, (-1.0, -1.0)),
    ({"lr_factor": "vector=0"}, (-1.0, -1.0)),
    ({"norm_affine": False}, (-1.0, -1.0)),
    ({"param": "mup"}, (0.0, 0.0)),
    ({"optimizer": "sgd"}, (-0.5, -0.5)),
])
def test_the_final_gain_of_a_gpt_under_adam_may_lift_the_edge_by_root_n(settings, predicted):
    rows = power_law_rows(model="gpt", data="stdlib", exponent=-0.75, **{"optimizer": "adam", **settings})
    row, = analyze.summarize(rows)
    low, high = row["predicted_max_stable_exponent"], row["predicted_up_to"]
    assert (low, high) == predicted
    verdict = "held" if low < -0.75 < high else "missed"
    assert row["max_stable_verdict"] == verdict
    shown = f"{low:+.2f}" if low == high else f"{low:+.2f}..{high:+.2f}"
    assert shown in analyze.exponent_table([row]).splitlines()[3].split()


def test_the_criterion_is_learned_on_text_and_chance_elsewhere_unless_named():
    for run, criterion in (({}, "chance"), (dict(model="gpt", data="stdlib"), "learned")):
        rows = power_law_rows(**run)
        assert analyze.summary_of(rows)["stable_if"] == criterion
        assert analyze.summary_of(rows, "best+1")["stable_if"] == "best+1"


def test_rates_without_a_prediction_or_an_edge_are_left_open():
    row, = analyze.summarize(power_law_rows())
    unpredicted, = analyze.rates_at([{**row, "predicted_max_stable_exponent": None}], [4096])
    assert set(unpredicted["optimal"]) == set(unpredicted["max_stable"]) == {"fitted"}
    assert unpredicted["recommended"] <= unpredicted["max_stable"]["fitted"][1]
    assert analyze.rates_table([unpredicted]).splitlines()[-2].split()[4:7] == ["predicted", "-", "-"]
    row["curves"] = [{name: [values[0]] if name == "lr" else [line[:1] for line in values]
                      for name, values in curve.items()} for curve in row["curves"]]
    points, = analyze.rates_at([row], [4096])           # one LR a width: optima without a resolution
    assert points["optimal"]["fitted"][1:] == [None, None]
    assert analyze.rates_table([points]).splitlines()[-1].split()[4:] == ["fitted", "-", "-"]
    nothing, = analyze.rates_at(analyze.summarize(rows_of([[None, None]] * 2)), [4096])
    assert nothing["optimal"]["fitted"] == nothing["max_stable"]["fitted"] == [None] * 3
    assert nothing["recommended"] is None
    assert analyze.rates_table([nothing]).splitlines()[-1].split()[4:] == ["fitted", "-", "-"]


def test_rules_for_the_rate_at_a_width_that_was_left_out():
    """From 256 to 4096 the edge falls by a factor of 4, which is four steps, and the optimum lies 2.5 steps
    below it."""
    rows = power_law_rows(widths=(64, 256, 4096))
    results = {result["rule"]: result for result in analyze.left_out(analyze.summarize(rows), 1)}
    assert tuple(results) == analyze.RULES
    assert all(result["width"] == 4096 and result["loss"] == "ce" for result in results.values())
    optimum = math.exp(-3 * STEP) / 2                       # at 256
    at, = analyze.rates_at(analyze.summarize([row for row in rows if row["width"] < 4096]), [4096])
    for rule, lr in (("same rate", optimum), ("n^-1", optimum / 16), ("predicted exponent", optimum / 4),
                     ("fitted exponent", optimum / 4), ("recommended", at["recommended"])):
        assert results[rule]["lr"] == pytest.approx(lr)
    assert at["recommended"] < at["max_stable"]["fitted"][0]
    assert [rule for rule, result in results.items() if not result["stable"]] == ["same rate"]

    for rule in ("predicted exponent", "fitted exponent"):
        assert results[rule]["loss_above_best"] == pytest.approx(0, abs=1e-9)
    n_to_minus_1 = 0.03 * (4 * STEP) ** 2 / 0.3             # four steps below the optimum
    assert results["n^-1"]["loss_above_best"] == pytest.approx(n_to_minus_1)

    lines = analyze.left_out_table(results.values()).splitlines()[4:]
    assert [line.split("  ")[0] for line in lines] == list(analyze.RULES)
    assert lines[0].split()[2:] == ["1", "of", "1", "-"]
    assert lines[1].split()[1:] == ["0", "of", "1", f"{100 * n_to_minus_1:.1f}", "%"]


def test_each_of_several_left_out_widths_is_predicted_from_the_narrower_ones():
    summary = analyze.summarize(power_law_rows(widths=(64, 128, 256, 1024)))
    results = analyze.left_out(summary, 2)
    assert [(result["width"], result["rule"]) for result in results] == [
        (width, rule) for width in (256, 1024) for rule in analyze.RULES]
    optimum = math.exp(-3 * STEP) / math.sqrt(2)            # at 128
    for result in results:
        if result["rule"] == "same rate":
            assert result["lr"] == pytest.approx(optimum)
        if result["rule"] == "n^-1":
            assert result["lr"] == pytest.approx(optimum * 128 / result["width"])
    # 2.5 steps below the edge at 128 are 1.5 steps below the one at 256, and half a step above that at 1024
    assert [result["stable"] for result in results if result["rule"] == "same rate"] == [True, False]
    lines = analyze.left_out_table(results).splitlines()
    assert lines[4].split()[2:5] == ["1", "of", "2"]
    # without two narrower widths that have an optimum nothing is predicted
    assert analyze.left_out(analyze.summarize(power_law_rows(widths=(64, 256))), 1) == []


def falling_rows(edge_of_width):
    """Return rows of three seeds whose losses fall by 0.01 per log LR up to the edge, and diverge above."""
    return [row_of(0.3 - 0.01 * k * STEP if k <= edge else None, width=width, seed=seed,
                   lr=math.exp(k * STEP))
            for width, edge in edge_of_width.items() for k in range(-12, 5) for seed in range(3)]


def test_a_rule_that_meets_the_last_stable_rate_has_the_loss_there():
    """The rate may lie above it by a rounding error, and below the edge, in the middle of the bracket."""
    results = analyze.left_out(analyze.summarize(falling_rows({64: 0, 256: -2, 1024: -4, 4096: -6})), 1)
    of_rule = {result["rule"]: result for result in results}
    for rule in ("predicted exponent", "fitted exponent"):
        assert of_rule[rule]["lr"] == pytest.approx(math.exp(-6 * STEP))
        assert of_rule[rule]["stable"] and of_rule[rule]["loss_above_best"] == pytest.approx(0, abs=1e-9)


def test_where_all_runs_of_the_left_out_width_diverged_every_rule_is_unstable():
    rows = falling_rows({64: 0, 256: -2, 1024: -13})
    results = analyze.left_out(analyze.summarize(rows), 1)
    assert results and not any(result["stable"] for result in results)
    assert all(math.isnan(result["loss_above_best"]) for result in results)
    assert re.search(r"same rate +1 of 1 +-\n", analyze.left_out_table(results))


def test_where_nothing_is_unstable_at_the_left_out_width_every_rate_of_the_grid_is_stable():
    results = analyze.left_out(analyze.summarize(falling_rows({64: 0, 256: -2, 1024: 4})), 1)
    assert results and all(result["stable"] for result in results)


# ---- tracked updates ----

def update(**entry):
    curve = dict(zip(CURVE, ("ce", "sp", "sgd", 0.0, True, 0, "")))
    return {**curve, "lr": 0.1, "widths": [8, 16], "widths_used": 2, "kind": "effective",
            "module": "layers.0", "layer": 0, "step": 1, "exponent": 0.25, "predicted": 0.5,
            "lower_bound": False, **entry}


def test_the_table_of_updates_keeps_gains_and_learning_rates_apart():
    values = list(itertools.product((True, False), (0.1, 0.2)))
    updates = [update(norm_affine=gains, lr=lr, exponent=i) for i, (gains, lr) in enumerate(values)]
    head, *lines = analyze.update_table(updates).splitlines()[-5:]
    assert {"norm_affine", "lr"} <= set(head.split())
    for i, ((gains, lr), line) in enumerate(zip(values, lines)):
        assert {str(gains), str(lr)} <= set(line.split())
        assert f"{i:+.2f} (+0.50)" in line


ROLES = {"layers.0": "input", "layers.1": "hidden", "layers.2": "output", "": "logits"}


def tracked_runs(widths=(64, 128, 256)):
    """Return (rows, tracks) of two seeds of an MLP after one step, whose norms are exact power laws."""
    rows = [dict(row_of(0.5, width=width, seed=seed, lr=0.1, hidden_layers=2, steps=1),
                 shape_info={**SHAPE_INFO, "hidden_tensors": 1}) for width in widths for seed in range(2)]
    tracks = {}
    for row, (layer, (module, role)) in itertools.product(rows, enumerate(ROLES.items())):
        norms = {kind: (1 + row["seed"]) * (1 + layer) * row["width"] ** -0.3
                 for kind in ("effective", "propagating", "input_change", "input", "change", "loss")}
        track = {"id": row["id"], "step": 1, "role": role, "module": module, "layer": layer, **norms}
        tracks[analyze.key_of(track)] = track
    return rows, tracks


def without(tracks, rows, run):
    """Return the tracks of all runs but the ones with these settings; no settings, all tracks."""
    ids = {row["id"] for row in rows if run and all(row[name] == value for name, value in run.items())}
    return {key: track for key, track in tracks.items() if track["id"] not in ids}


@pytest.mark.parametrize("missing, used, exponent", [
    ({}, 3, -0.3), ({"width": 128}, 2, -0.3), ({"width": 256, "seed": 1}, 2, -0.3), ({"seed": 1}, 0, None)],
    ids=["none", "a width", "a seed at a width", "a seed"])
def test_exponents_of_updates_say_from_how_many_widths_they_come(missing, used, exponent):
    rows, tracks = tracked_runs()
    updates = analyze.summarize_tracks(rows, without(tracks, rows, missing))["updates"]
    assert {(entry["kind"], entry["module"]) for entry in updates} == {
        *((kind, module) for kind in ("effective", "propagating", "features")
          for module in ("layers.0", "layers.1", "layers.2")),
        ("logits", "")} - {("propagating", "layers.0"), ("features", "layers.2")}
    for entry in updates:
        assert entry["widths_used"] == used and entry["widths"] == [64, 128, 256]
        assert entry["exponent"] == (None if exponent is None else pytest.approx(exponent))
    lines = analyze.update_table(updates).splitlines()[3:]
    if used == 0:
        assert lines == []
        return
    line, = lines
    assert line.count("-0.30") == 4
    assert line.endswith("  ! from 2 of 3 widths") if used < 3 else "!" not in line


def test_a_module_that_does_not_move_at_one_width_counts_there_for_its_row_too():
    rows, tracks = tracked_runs()
    for row in rows:
        if row["width"] == 128:
            tracks[row["id"], 1, "layers.1"]["effective"] = 0.0
    updates = analyze.summarize_tracks(rows, tracks)["updates"]
    assert {(entry["kind"], entry["module"]) for entry in updates if entry["widths_used"] == 2} == {
        ("effective", "layers.1")}
    assert analyze.update_table(updates).splitlines()[-1].endswith("  ! from 2 of 3 widths")


def test_the_spread_of_kernels_over_initializations_by_hand():
    """The kernels K_s = K + s D / n^(1/2) of three seeds s = -1, 0, 1 spread by |D| / |K| n^(-1/2)."""
    rows = [row_of(0.5, width=width, seed=seed, lr=0.1, hidden_layers=2, steps=1)
            for width in (64, 256) for seed in range(3)]
    kernel, change = np.array([[2.0, 1.0, 0.5], [1.0, 3.0, -1.0], [0.5, -1.0, 1.0]]), np.zeros((3, 3))
    change[0, 1] = change[1, 0] = change[2, 2] = 1.0
    tracks = {}
    for row, (layer, (module, role)) in itertools.product(rows, enumerate(ROLES.items())):
        of_seed = kernel + (row["seed"] - 1) * change / row["width"] ** 0.5
        track = {"id": row["id"], "step": 1, "role": role, "module": module, "layer": layer,
                 "input": 4.0, "input_change": 1.0 + row["seed"]}
        if role in ("hidden", "output"):
            track["kernel"] = of_seed[np.triu_indices(3)].tolist()
        tracks[analyze.key_of(track)] = track
    entries = analyze.summarize_tracks(rows, tracks)["limit"]
    assert [entry["module"] for entry in entries] == ["layers.1", "layers.2"]
    for entry in entries:
        spread = np.linalg.norm(change) / np.linalg.norm(kernel)
        assert entry["values"] == pytest.approx([spread / 8, spread / 16])
        assert entry["exponent"] == pytest.approx(-0.5) and entry["predicted"] == -0.5
        assert entry["change"] == [[0.25, 0.25], [0.5, 0.5], [0.75, 0.75]]


# ---- result files ----

def test_a_last_line_cut_anywhere_is_dropped_with_a_word_and_the_rows_before_it_stay(tmp_path, capsys):
    rows = [row_of(0.5, width=8), row_of(None, width=16)]
    lines = [json.dumps(row).encode() + b"\n" for row in rows]
    content, path = b"".join(lines), tmp_path / "runs.jsonl"
    ends = {len(lines[0]) + shift for shift in (-1, 0, 1)} | {len(content) - 1, len(content)}
    for cut in sorted({*range(0, len(content), 9), *ends}):
        path.write_bytes(content[:cut])
        whole = content[:cut].count(b"\n")
        kept = b"".join(lines[:whole])
        assert list(analyze.read_rows(tmp_path, repair=True)) == [row["id"] for row in rows[:whole]]
        assert path.read_bytes() == kept
        assert ("dropped a half-written last line" in capsys.readouterr().err) == (len(kept) < cut)


def test_a_half_written_line_is_left_alone_while_others_may_be_writing(tmp_path, capsys):
    (tmp_path / "runs.jsonl").write_text(json.dumps(row_of(0.5)) + '\n{"id": "0')
    assert len(analyze.read_rows(tmp_path)) == 1
    assert (tmp_path / "runs.jsonl").read_text().endswith('{"id": "0')
    assert not capsys.readouterr().err


@pytest.mark.parametrize("garbage", [
    b"\x00" * 30, b"{", b"[1]", b"null", b"", b"\xff\xfe", b'{"id": 1', b'"id"', b'{"lr": 0.1}'])
def test_garbage_between_rows_is_refused_with_its_file_and_line(tmp_path, garbage):
    first, second = (json.dumps(row_of(0.5, width=width)).encode() + b"\n" for width in (8, 16))
    path = tmp_path / "runs-rank1.jsonl"
    path.write_bytes(first + garbage + b"\n" + second)
    with pytest.raises(InputError, match="runs-rank1.jsonl:2 is not a result row; remove that line"):
        analyze.read_rows(tmp_path)
    assert path.read_bytes() == first + garbage + b"\n" + second


@pytest.mark.parametrize("name", [*RESULTS, "failed", "chance_loss", "shape_info", "seconds", *SETTINGS])
def test_a_row_that_lacks_a_setting_or_a_result_is_refused_in_one_line(tmp_path, name):
    whole, short = rows_of([[0.5, 0.4]], widths=[8])
    del short[name]
    written(tmp_path, [whole, short])
    assert refused(tmp_path) == (
        f"analyze.py: {tmp_path}/runs.jsonl:2 lacks {name}: another version wrote it; "
        "analyze it with that one, or use another --out")
    assert not (tmp_path / "summary.json").exists()


def test_a_row_with_an_id_and_nothing_else_is_refused_too(tmp_path):
    written(tmp_path, [row_of(0.5), {"id": "0"}])
    assert "runs.jsonl:2 lacks model" in refused(tmp_path)


@pytest.mark.parametrize("name", [name for name in SETTINGS if name not in GRID])
def test_rows_that_differ_in_a_setting_of_the_whole_sweep_are_refused_by_its_name(name):
    first, *others = rows_of([[0.5, 0.4, 0.5, None]] * 2)
    value = first[name]
    other = not value if isinstance(value, bool) else value + (" or else" if isinstance(value, str) else 1)
    for function in (analyze.summarize, analyze.summary_of):
        with pytest.raises(InputError) as error:
            function([dict(first, **{name: other}), *others])
        assert str(error.value) in {
            f"the rows have {name} = {a!r} and {b!r}; analyze the rows of one sweep at a time"
            for a, b in itertools.permutations((value, other))}


def test_on_text_the_defaults_of_adam_may_differ_from_those_of_sgd():
    rows = [row for optimizer in ("sgd", "adam")
            for row in rows_of([[0.5, 0.4, 0.5, None]] * 2, (32, 64), model="gpt", optimizer=optimizer)]
    assert {(row["optimizer"], row["eps"], row["clip"]) for row in rows} == {
        ("sgd", 1e-8, 0.0), ("adam", 1e-12, 1.0)}
    assert [row["optimizer"] for row in analyze.summary_of(rows)["rows"]] == ["adam", "sgd"]
    with pytest.raises(InputError, match="eps = 1e-06 and 1e-08 and 1e-12"):
        analyze.summarize([*rows, dict(rows[-1], eps=1e-6)])


# ---- the summary ----

def test_the_summary_of_rows_is_that_of_their_folder_but_for_the_command(tmp_path):
    rows = power_law_rows()
    of_rows = analyze.summary_of(rows, "learned=0.9", "one command")
    of_folder = analyze.summary_of(written(tmp_path, rows), "learned=0.9", "another command")
    assert of_rows.pop("command") == "one command" and of_folder.pop("command") == "another command"
    assert of_rows == of_folder
    assert of_rows["stable_if"] == "learned=0.9" and of_rows["runs"] == len(rows) == of_rows["seconds"]
    assert len(of_rows["rows"]) == 1
    assert analyze.summary_of(iter(rows), "learned=0.9")["rows"] == of_rows["rows"]
    assert str(tmp_path) not in json.dumps(of_rows)
    assert analyze.summary_of(str(tmp_path), "learned=0.9")["rows"] == of_rows["rows"]
    with pytest.raises(InputError, match="holds no runs"):
        analyze.summary_of(tmp_path / "elsewhere")


class ClosedPipe(io.StringIO):
    def write(self, text):
        raise BrokenPipeError


def test_the_summary_is_written_before_anything_is_printed(tmp_path, monkeypatch):
    written(tmp_path, power_law_rows())
    expected = analyze.summary_of(tmp_path, command="a command")
    expected["at"] = analyze.rates_at(expected["rows"], [4096])
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", ClosedPipe())
        with pytest.raises(BrokenPipeError):
            analyze.report(tmp_path, "chance", "a command", [4096])
    assert summary_of(tmp_path) == expected


@pytest.mark.parametrize("lrs", [1, 2])
def test_one_learning_rate_alone_has_no_optimum_and_no_edge(tmp_path, capsys, lrs):
    written(tmp_path, rows_of([[0.3, 0.2][:lrs]]))
    analyze.report(tmp_path, "chance", "a command")
    printed = capsys.readouterr().out
    assert bool(summary_of(tmp_path)["rows"]) == ("Exponents of LR" in printed) == (lrs > 1)
    assert printed.startswith("No results: a single learning rate") == (lrs == 1)


# ---- sweeps of small networks ----

SMALL = "--base-width 8 --hidden-layers 2 --train-size 300 --val-size 50 --batch-size 8 --seeds 2"
FEW = f"{SMALL} --widths 8 16 --steps 8 --lrs 0.1 0.2 0.4 --loss ce"


def test_a_single_width_has_no_exponent_and_says_so(tmp_path):
    done = run_sweep(tmp_path, FEW, "--widths 8")
    assert "! ce" in done.stdout and "no exponent worth the name" in done.stdout
    row, = summary_of(tmp_path)["rows"]
    assert row["optimal_exponent"] is row["max_stable_exponent"] is None
    assert row["optimal_lr"][0] > 0
    assert (tmp_path / "figures" / "lr_transfer.png").exists()


def test_an_optimum_at_the_grids_edge_is_flagged(tmp_path):
    done = run_sweep(tmp_path, FEW, "--lrs 0.001 0.002 --no-plots")
    assert "width 8: optimum at the grid's edge" in done.stdout


def test_a_sweep_in_which_every_run_diverges_says_so_and_draws_the_others(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        done = run_sweep(tmp_path / "none", FEW, "--loss mse --lrs 1e7 1e8")
        both = run_sweep(tmp_path, FEW, "--loss mse --lrs 0.1 0.2 --alpha 0 -10 --widths 32 64")
    flag = "at every LR at least one of 2 seeds diverged"
    assert f"width 16: {flag}" in done.stdout
    assert both.stdout.count(flag) == 2
    assert "exponents.pdf" in both.stdout


def test_where_one_of_two_seeds_diverges_at_every_lr_the_loss_is_unknown():
    row, = summary = analyze.summarize(rows_of([[None, 0.5], [0.5, None]], widths=[16]))
    assert row["best_train_loss"] == row["optimal_lr"] == [None]
    assert any("width 16: at every LR at least one of 2 seeds diverged" in flag for flag in row["flags"])
    assert re.search(r"ce +sp +sgd +16 +- +- ", analyze.exponent_table(summary))    # optimal LR, loss


def test_a_tracked_sweep_sets_measured_exponents_beside_predicted_ones(tmp_path):
    done = run_sweep(tmp_path, FEW, "--steps 25 --lrs 0.1 --alpha 0 0.5 1 --track 10 --kernels --no-plots")
    assert "measured (predicted)" in done.stdout
    tracks = analyze.read_rows(tmp_path, "track*.jsonl")
    assert sorted({step for _, step, _ in tracks}) == [*range(1, 21), 25]
    assert len(tracks) == 12 * 21 * 4       # runs, steps, three modules and the logits
    updates = summary_of(tmp_path)["updates"]
    assert {entry["kind"] for entry in updates} == {"effective", "propagating", "features", "logits"}
    first = [entry for entry in updates if entry["step"] == 1 and entry["module"] != "layers.0"]
    assert all(entry["exponent"] is not None for entry in first)
    plots.draw(tmp_path, only=["regimes", "limit"])
    for name in ("regimes", "limit"):
        assert (tmp_path / "figures" / f"{name}.png").exists()


def test_tracked_layers_keep_their_names_where_one_curve_has_norm_gains_and_another_has_not(tmp_path):
    text = tmp_path / "text"
    text.write_bytes(bytes(range(32, 96)) * 60)
    done = run_sweep(
        tmp_path, f"--preset gpt --optimizer adam --param sp --data {text} --widths 16 32 --base-width 16",
        "--head-dim 8 --layers 1 --context 8 --batch-size 4 --val-size 4 --seeds 1 --no-plots",
        "--steps 3 --warmup 0 --decay none --lrs 0.001 0.002 --track 1")

    rows = analyze.read_rows(tmp_path).values()
    tracks = analyze.read_rows(tmp_path, "track*.jsonl")
    updates = [entry for entry in summary_of(tmp_path)["updates"] if entry["kind"] == "effective"]
    ids = {(row["norm_affine"], row["lr"], row["width"]): row["id"] for row in rows}
    assert len(ids) == 8
    for entry in updates:
        keys = [(ids[entry["norm_affine"], entry["lr"], width], entry["step"], entry["module"])
                for width in (16, 32)]
        assert entry["values"] == [[tracks[key]["effective"] for key in keys]]
    for gains in (True, False):
        modules = {entry["module"] for entry in updates if entry["norm_affine"] == gains}
        tracked = {module for id, _, module in tracks if id == ids[gains, 0.001, 16]}
        assert modules == tracked - {""}
        assert any("norm" in name for name in modules) == gains

    lines = [line.split() for line in done.stdout.splitlines()]
    for gains, lr, step in itertools.product(("True", "False"), ("0.001", "0.002"), ("1", "3")):
        assert sum({gains, lr, step} <= set(line[4:7]) for line in lines) == 1


# ---- python analyze.py OUT ----

@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """(folder, what was printed) of a sweep of four curves with tracked updates."""
    out = tmp_path_factory.mktemp("sweep")
    done = run_sweep(out, FEW, "--param sp mup --loss ce mse --steps 3 --track 1 --no-plots")
    return out, done.stdout


@pytest.fixture
def copied(swept, tmp_path):
    """A copy of that folder, to be changed."""
    for path in swept[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def contents(out):
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_the_summary_of_a_sweep_is_written_again_from_its_rows_alone(swept, copied, monkeypatch):
    monkeypatch.setattr(train, "train", None)
    done = run_script("analyze.py", copied)
    assert done.returncode == 0, done.stderr
    assert done.stdout == swept[1]
    assert contents(copied) == contents(swept[0])


def test_another_criterion_of_stability_changes_the_edge_and_nothing_else(swept, copied):
    def losses(row):
        return [(curve["lr"], curve["train_loss"]) for curve in row["curves"]]

    before = {curve_of(row): row for row in summary_of(swept[0])["rows"]}
    for criterion, largest in (("accuracy=-1", 0.4), ("accuracy=1", None)):     # every run is stable, or none
        done = run_script("analyze.py", copied, "--stable-if", criterion)
        assert done.returncode == 0, done.stderr
        assert summary_of(copied)["stable_if"] == criterion
        after = {curve_of(row): row for row in summary_of(copied)["rows"]}
        assert list(after) == list(before)
        for name in ("best_train_loss", "at_optimum", "chance_loss"):
            assert [row[name] for row in before.values()] == [row[name] for row in after.values()]
        assert list(map(losses, before.values())) == list(map(losses, after.values()))
        for row in after.values():
            assert row["max_stable_lr"] == [pytest.approx(largest) if largest else None] * 2

    chosen = contents(copied)
    assert run_script("analyze.py", copied).returncode == 0
    assert contents(copied) == chosen                   # the criterion stays that of the last summary
    assert run_script("analyze.py", copied, "--stable-if", "chance").returncode == 0
    assert contents(copied) == contents(swept[0])


def test_rows_without_a_summary_get_one(swept, copied):
    (copied / "summary.json").unlink()
    (copied / "config.json").unlink()
    done = run_script("analyze.py", copied)
    assert done.returncode == 0, done.stderr
    before, after = summary_of(swept[0]), summary_of(copied)
    assert after["command"].startswith("python analyze.py")
    assert after["stable_if"] == "chance"
    assert {**after, "command": before["command"]} == before


def test_rows_of_different_settings_are_refused_with_the_setting(copied):
    row = next(iter(analyze.read_rows(copied).values()))
    train.append_rows(copied / "runs.jsonl", [dict(row, id="another", hidden_layers=3)])
    before = contents(copied)
    assert "hidden_layers = 2 and 3" in refused(copied)
    assert contents(copied) == before


def test_rates_at_other_widths_are_written_to_the_summary_and_printed(tmp_path):
    written(tmp_path, power_law_rows())
    plain = run_script("analyze.py", tmp_path)
    assert "at" not in summary_of(tmp_path)
    done = run_script("analyze.py", tmp_path, "--at", 4096, 100)
    assert done.returncode == 0, done.stderr
    summary = summary_of(tmp_path)
    assert summary["at"] == analyze.rates_at(summary["rows"], [4096, 100])
    assert done.stdout == plain.stdout + analyze.rates_table(summary["at"]) + "\n"
    assert refused(tmp_path, "--at", 0) == "analyze.py: at is 0; it must be a whole number, at least 1"


def test_leaving_widths_out_prints_the_table_of_all_folders_and_writes_nothing(tmp_path):
    ce, mse = (written(tmp_path / loss, power_law_rows(loss=loss)) for loss in ("ce", "mse"))
    before = contents(ce)
    done = run_script("analyze.py", ce, mse, "--leave-out", 1)
    assert done.returncode == 0, done.stderr
    results = [result for loss in ("ce", "mse")
               for result in analyze.left_out(analyze.summarize(power_law_rows(loss=loss)), 1)]
    assert done.stdout == analyze.left_out_table(results) + "\n"
    assert len(results) == 2 * len(analyze.RULES)
    assert contents(ce) == before

    # a summary alone will do
    assert run_script("analyze.py", ce).returncode == run_script("analyze.py", mse).returncode == 0
    for out in (ce, mse):
        (out / "runs.jsonl").unlink()
    assert run_script("analyze.py", ce, mse, "--leave-out", 1).stdout == done.stdout

    assert refused(ce, "--leave-out", 2) == "analyze.py: leave_out is 2; at least two widths must remain"
    assert refused(ce, "--leave-out", -1).startswith("analyze.py: leave_out is -1; it must be a whole number")
    assert refused(ce, mse) == "analyze.py: 2 folders; several are for --leave-out alone"


def test_leaving_widths_out_judges_by_the_criterion_asked_for(tmp_path):
    """At each width the loss is higher by less than 0.005 up to one step above the optimum, and the rate of
    width 256 lies two steps above that of 1024."""
    written(tmp_path, power_law_rows())

    def table(criterion):
        summary = analyze.summarize(power_law_rows(), criterion)
        return analyze.left_out_table(analyze.left_out(summary, 1)) + "\n"

    assert re.search(r"same rate +1 of 1 ", table("best+1=0.005"))
    assert re.search(r"same rate +0 of 1 ", table("chance"))
    flags = ("--leave-out", 1, "--stable-if", "best+1=0.005")
    assert run_script("analyze.py", tmp_path, *flags).stdout == table("best+1=0.005")
    assert run_script("analyze.py", tmp_path).returncode == 0       # the summary's criterion is chance
    assert run_script("analyze.py", tmp_path, "--leave-out", 1).stdout == table("chance")
    assert run_script("analyze.py", tmp_path, *flags).stdout == table("best+1=0.005")


def test_figures_are_drawn_again_where_there_are_some_unless_refused(tmp_path):
    written(tmp_path, power_law_rows(widths=(64, 256)))
    figures = tmp_path / "figures"
    assert "figures" not in run_script("analyze.py", tmp_path).stdout and not figures.exists()
    figures.mkdir()
    assert "figures" not in run_script("analyze.py", tmp_path, "--no-plots").stdout
    assert not list(figures.iterdir())
    assert "lr_transfer.png" in run_script("analyze.py", tmp_path).stdout
    assert (figures / "lr_transfer.png").exists()
