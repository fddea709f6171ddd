"""analyze.py: optimum, edge, flags and tables of rows that are already there, and its script.

Made-up rows have a known optimum and edge; the rest are sweeps of networks that train in seconds.
"""
import itertools
import json
import math
import re
import warnings

import numpy as np
import pytest

import train        # before torch: it asks for reproducible products

import analyze
import plots
import sweep
from conftest import call

MAIN = {"sweep.py": sweep.main, "analyze.py": analyze.main}


def run_script(script, *flags):
    """The script's main in this process, as its command line would call it: returncode, stdout, stderr."""
    return call(lambda: train.command_line(MAIN[script]), script, *flags)


def run_sweep(out, *flags):
    """python sweep.py with these flags, in words, and --out."""
    done = run_script("sweep.py", *" ".join(flags).split(), "--out", out)
    assert done.returncode == 0, done.stderr
    return done


def summary_of(out):
    return json.loads((out / "summary.json").read_text())


# ---- made-up rows: optimum and edge ----

CHANCE = 0.7


def row_of(loss, accuracy=0.9, failed=None, **settings):
    """A result row; loss None: diverged."""
    config = train.configure(settings)
    ended = loss is not None and not failed
    results = {"final_train_loss": loss, "train_accuracy": accuracy if ended else None,
               "diverged_at": None if ended or failed else 3, "failed": failed}
    results |= {name: loss if ended else None for name in train.VALIDATION}
    return {"id": train.run_id(config), **config, **results, "chance_loss": CHANCE, "seconds": 1.0}


def rows_of(losses, widths=(8, 16)):
    """Rows of losses[seed][i] at LRs 0.1, 0.2, 0.4, ..., the same at every width."""
    return [row_of(loss, width=width, seed=seed, lr=0.1 * 2 ** i)
            for width in widths for seed, line in enumerate(losses) for i, loss in enumerate(line)]


def parabola_rows(width, optimum, edges):
    """One seed for each edge: losses are a parabola in log LR up to its edge, and diverged above."""
    rows = []
    for k in range(-14, 10):
        log_lr = k * math.log(2) / 2
        for seed, edge in enumerate(edges):
            loss = 0.3 + 0.03 * (log_lr - optimum) ** 2 if log_lr <= edge else None
            rows.append(row_of(loss, width=width, seed=seed, lr=math.exp(log_lr)))
    return rows


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
    ("chance=0.05", 0.41), ("best+1=0.2", 0.5), ("1.2x", 0.36), ("accuracy=0.5", None)])
def test_stability_criteria(name, limit):
    lr = np.exp(np.arange(-6.0, 0.0, 0.5))
    losses = 0.3 + 0.05 * (np.log(lr) + 4) ** 2
    accuracies = np.where(lr > math.exp(-1.2), 0.4, 0.9)
    cell = {"lr": lr, "losses": losses[None], "accuracies": accuracies[None], "chance": 8.2}
    stable, = analyze.stability(cell, analyze.criterion_of(name))
    by_hand = losses < limit if limit else accuracies > 0.5
    assert (stable == by_hand).all()
    assert 0 < stable.sum() < len(lr)


def test_a_criterion_has_a_default_threshold_and_unknown_ones_are_refused():
    assert analyze.criterion_of("accuracy") == ("accuracy", 0.3)
    assert analyze.criterion_of("best+1=2") == ("best+1", 2.0)
    for text, words in (("finite", "choose from chance"), ("chance=nan", "must be a number")):
        with pytest.raises(ValueError, match=words):
            analyze.criterion_of(text)


def test_learning_rates_that_lack_a_seed_or_failed_are_left_out():
    rows = rows_of([[0.5, 0.4, 0.5], [0.5, 0.4, 0.5]], widths=[8])
    rows[0] = row_of(None, failed="out of memory", width=8, seed=0, lr=0.1)
    curve = analyze.curve_of(rows[0])
    assert analyze.cell_of(rows[:-1], curve, 8, seeds=2)["lr"].tolist() == [0.2]
    assert analyze.cell_of(rows[:-1], curve, 8, seeds=1)["lr"].tolist() == [0.2, 0.4]
    assert analyze.cell_of(rows, curve, 16, seeds=1)["lr"].tolist() == []


def test_a_row_of_the_summary_tells_every_seeds_validation_at_the_optimum():
    row, = analyze.summarize(rows_of([[0.5, 0.4, 0.6, None], [0.6, 0.3, 0.7, 0.5]]))
    assert row["at_optimum"]["val_loss"] == [[0.4, 0.3], [0.4, 0.3]]
    assert row["best_train_loss"] == pytest.approx([0.35, 0.35])
    assert row["curves"][0]["train_loss"] == [[0.5, 0.4, 0.6, None], [0.6, 0.3, 0.7, 0.5]]
    assert row["chance_loss"] == CHANCE


@pytest.mark.parametrize("losses, flag, unknown", [
    ([[0.5, 0.4, 0.5, None]] * 2, None, []),
    ([[0.4, 0.5, None]] * 2, "optimum at the grid's edge", []),
    ([[0.5, 0.4, 0.5]] * 2, "nothing unstable up to LR 0.4", ["min_unstable_lr"]),
    ([[0.9, 0.8, 0.9]] * 2, "no stable LR", ["max_stable_lr", "min_unstable_lr"]),
    ([[None, None]] * 2, "every run diverged",
     ["optimal_lr", "max_stable_lr", "min_unstable_lr", "best_train_loss"]),
    ([[0.5, None], [None, 0.5]], "at every LR at least one of 2 seeds diverged",
     ["optimal_lr", "min_unstable_lr", "best_train_loss"]),
], ids=lambda value: value if isinstance(value, str) else "")
def test_flags_say_why_a_number_is_missing_or_not_to_be_trusted(losses, flag, unknown):
    row, = summary = analyze.summarize(rows_of(losses))
    for width, told in zip((8, 16), row["flags"]):
        assert told.startswith(f"width {width}: {flag}")
    assert len(row["flags"]) == (2 if flag else 0)
    for name in ("optimal_lr", "max_stable_lr", "min_unstable_lr", "best_train_loss"):
        assert (row[name] == [None, None]) == (name in unknown), name
    json.dumps(summary, allow_nan=False)

    lines = analyze.table(summary).splitlines()
    cells = [line.split()[3:] for line in lines if line.split()[3:4] in (["8"], ["16"])]
    sloped = "min_unstable_lr" not in unknown               # the edge's slope from the width before
    assert [len(cell) for cell in cells] == [5, 5 + 3 * sloped]  # width, optimum, loss, bracket, slope ± x
    assert all(cell[:5].count("-") == len(unknown) for cell in cells)
    assert sum(line.startswith("! ") for line in lines) == len(row["flags"])


def test_one_seed_one_width_and_runs_out_of_memory_are_flagged():
    rows = rows_of([[0.5, 0.4, 0.5, None]], widths=[8])
    rows.append(row_of(None, failed="out of memory", width=16, lr=0.1))
    row, = analyze.summarize(rows)
    for words in ("one width: no exponent", "one seed", "width 16: out of memory"):
        assert sum(words in flag for flag in row["flags"]) == 1


def test_a_summary_can_be_limited_to_curves_widths_and_seeds():
    rows = rows_of([[0.5, 0.4, 0.5, None], [0.7, 0.6, 0.7, None]])
    rows += [dict(row, param="mup") for row in rows]
    assert [row["param"] for row in analyze.summarize(rows)] == ["sp", "mup"]
    row, = analyze.summarize(rows, curves=[analyze.curve_of(rows[-1])], widths=[16], seeds=1)
    assert (row["param"], row["widths"], row["best_train_loss"]) == ("mup", [16], [0.4])


def update(**told):
    entry = dict(zip(analyze.CURVE, ("ce", "sp", "sgd", 0.0, True, 0)))
    return {**entry, "lr": 0.1, "kind": "effective", "module": "layers.0", "layer": 0, "step": 1,
            "exponent": 0.25, "predicted": 0.5, "lower_bound": False, **told}


def test_the_table_of_updates_tells_gains_and_learning_rates_apart():
    values = list(itertools.product((True, False), (0.1, 0.2)))
    updates = [update(norm_affine=gains, lr=lr, exponent=i) for i, (gains, lr) in enumerate(values)]
    head, *lines = analyze.update_table(updates).splitlines()[-5:]
    assert {"norm_affine", "lr"} <= set(head.split())
    for i, ((gains, lr), line) in enumerate(zip(values, lines)):
        assert {str(gains), str(lr)} <= set(line.split())
        assert f"{i:+.2f} (+0.50)" in line


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
        assert list(analyze.read_rows(tmp_path)) == [row["id"] for row in rows[:whole]]
        assert path.read_bytes() == kept
        said = capsys.readouterr().err
        assert ("dropped a half-written last line" in said) == (len(kept) < cut)


def test_a_half_written_line_is_left_alone_while_others_may_be_writing(tmp_path, capsys):
    (tmp_path / "runs.jsonl").write_text(json.dumps(row_of(0.5)) + '\n{"id": "0')
    assert len(analyze.read_rows(tmp_path, mend=False)) == 1
    assert (tmp_path / "runs.jsonl").read_text().endswith('{"id": "0')
    assert not capsys.readouterr().err


@pytest.mark.parametrize("garbage", [
    b"\x00" * 30, b"{", b"[1]", b"null", b"", b"\xff\xfe", b'{"id": 1', b'"id"', b'{"lr": 0.1}',
    b'{"id": "0"}'])
def test_garbage_between_rows_is_refused_with_its_file_and_line(tmp_path, garbage):
    first, second = (json.dumps(row_of(0.5, width=width)).encode() + b"\n" for width in (8, 16))
    path = tmp_path / "runs-rank1.jsonl"
    path.write_bytes(first + garbage + b"\n" + second)
    with pytest.raises(ValueError, match="runs-rank1.jsonl:2 is not a result row; remove that line"):
        analyze.read_rows(tmp_path)
    assert path.read_bytes() == first + garbage + b"\n" + second


# ---- sweeps of small networks ----

SMALL = "--base-width 8 --hidden-layers 2 --train-size 300 --val-size 50 --batch-size 8 --seeds 2"
FEW = f"{SMALL} --widths 8 16 --steps 8 --lrs 0.1 0.2 0.4 --loss ce"


def test_a_single_width_has_no_exponent_and_says_so(tmp_path):
    done = run_sweep(tmp_path, FEW, "--widths 8")
    assert "! ce" in done.stdout and "one width: no exponent" in done.stdout
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
    assert "width 16: every run diverged" in done.stdout
    assert both.stdout.count("every run diverged") == 2
    assert "exponents.pdf" in both.stdout


def test_where_one_of_two_seeds_diverges_at_every_lr_the_loss_is_unknown():
    row, = summary = analyze.summarize(rows_of([[None, 0.5], [0.5, None]], widths=[16]))
    assert row["best_train_loss"] == row["optimal_lr"] == [None]
    assert any("width 16: at every LR at least one of 2 seeds diverged" in flag for flag in row["flags"])
    assert re.search(r"ce +sp +sgd +16 +- +- ", analyze.table(summary))         # optimal LR, loss there


def test_a_tracked_sweep_sets_measured_exponents_beside_predicted_ones(tmp_path):
    done = run_sweep(tmp_path, FEW, "--steps 25 --lrs 0.1 --alpha 0 0.5 1 --track 10 --no-plots")
    assert "measured (predicted)" in done.stdout
    tracks = analyze.read_rows(tmp_path, "track*.jsonl")
    assert sorted({step for _, step, _ in tracks}) == [*range(1, 21), 25]
    assert len(tracks) == 12 * 21 * 4       # runs, steps, three modules and the logits
    updates = summary_of(tmp_path)["updates"]
    assert {entry["kind"] for entry in updates} == {"effective", "propagating", "features", "logits"}
    first = [entry for entry in updates if entry["step"] == 1 and entry["module"] != "layers.0"]
    assert all(entry["exponent"] is not None for entry in first)
    plots.draw(tmp_path, ["regimes", "limit"])
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
        own = [ids[entry["norm_affine"], entry["lr"], width] for width in (16, 32)]
        assert entry["values"] == [[tracks[id, entry["step"], entry["module"]]["effective"] for id in own]]
    for gains in (True, False):
        told = {entry["module"] for entry in updates if entry["norm_affine"] == gains}
        tracked = {module for id, _, module in tracks if id == ids[gains, 0.001, 16]}
        assert told == tracked - {""}
        assert any("norm" in name for name in told) == gains

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
    before = {analyze.curve_of(row): row for row in summary_of(swept[0])["rows"]}
    for criterion, largest in (("accuracy=-1", 0.4), ("accuracy=1", None)):     # every run is stable, or none
        done = run_script("analyze.py", copied, "--stable-if", criterion)
        assert done.returncode == 0, done.stderr
        assert summary_of(copied)["stable_if"] == criterion
        after = {analyze.curve_of(row): row for row in summary_of(copied)["rows"]}
        for name in ("best_train_loss", "at_optimum", "chance_loss", "curves"):
            assert [row[name] for row in before.values()] == [after[curve][name] for curve in before]
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

    def by_curve(rows):
        return sorted(rows, key=lambda row: (analyze.curve_of(row), row.get("lr")))

    assert by_curve(after["rows"]) == by_curve(before["rows"])
    assert after["runs"] == before["runs"] and len(after["updates"]) == len(before["updates"])


def test_rows_of_different_settings_are_refused_with_the_setting(copied):
    train.append_rows(copied / "runs.jsonl", [row_of(0.5, width=8, hidden_layers=3)])
    before = contents(copied)
    done = run_script("analyze.py", copied)
    assert done.returncode == 2 and not done.stdout
    assert len(done.stderr.splitlines()) == 1 and "hidden_layers" in done.stderr
    assert contents(copied) == before


@pytest.mark.parametrize("lrs", [1, 2])
def test_one_learning_rate_alone_has_no_optimum_and_no_edge(tmp_path, capsys, lrs):
    rows = [{**row, "network": None} for row in rows_of([[0.3, 0.2][:lrs]])]
    analyze.report(tmp_path, rows, {}, "chance", "a command")
    assert bool(summary_of(tmp_path)["rows"]) == ("Exponents of LR" in capsys.readouterr().out) == (lrs > 1)


def test_rows_of_another_version_are_refused_by_name(swept, tmp_path):
    rows = [{key: value for key, value in row.items() if key != "init"}
            for row in analyze.read_rows(swept[0]).values()]
    (tmp_path / "runs.jsonl").write_text(train.lines_of(rows))
    ran = call(lambda: train.command_line(analyze.main), "analyze.py", tmp_path)
    assert ran.returncode == 2 and ran.stderr.startswith(
        "analyze.py: the rows lack init: another version wrote them")
