"""Figures from hand-made and measured summaries: what they show, and what happens where there is nothing."""
import copy
import json
import math
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

import plots

ROOT = Path(__file__).parents[1]
SHARED = {"model": "mlp", "data": "multi_index", "hidden_layers": 2, "layers": 2, "steps": 4,
          "base_width": 256}
CURVE = {"loss": "ce", "param": "sp", "optimizer": "sgd", "alpha": 0.0, "norm_affine": True, "warmup": 0}


def sweep_row(slope=-0.5, widths=(64, 128, 256), **curve):
    """A curve whose edge is 0.5 (n / 64)^slope, on a grid of 12 half octaves, two seeds."""
    lrs = [2 ** (k / 2) for k in range(-10, 2)]
    rows = []
    for width in widths:
        edge = 0.5 * (width / 64) ** slope
        loss = [None if lr > edge else 0.3 + 0.05 * math.log(lr / edge + 1e-9) ** 2 / 4 for lr in lrs]
        rows.append({"lr": lrs, "train_loss": [loss, loss]})
    stable = [max(lr for lr in lrs if lr <= 0.5 * (width / 64) ** slope) for width in widths]
    return {**SHARED, **CURVE, **curve, "widths": list(widths), "optimal_lr": [lr / 2 for lr in stable],
            "max_stable_lr": stable, "min_unstable_lr": [lr * 2 ** 0.5 for lr in stable],
            "optimal_exponent": slope, "optimal_interval": [slope - 0.1, slope + 0.1],
            "max_stable_exponent": slope, "max_stable_interval": [slope - 0.1, slope + 0.1],
            "predicted_max_stable_exponent": slope, "optimum_at_edge": [False] * len(widths),
            "best_train_accuracy": [0.9] * len(widths), "best_train_loss": [0.3] * len(widths),
            "best_val_accuracy": [[0.8, 0.9]] * len(widths), "chance_loss": 0.69, "flags": [], "curves": rows,
            "at_optimum": {name: [[0.1, 0.2]] * len(widths)
                           for name in ("val_loss", "val_accuracy", "logit_rms", "val_ece")}}


def summary_of(*rows, **more):
    return {**SHARED, "command": "python sweep.py", "stable_if": "chance", "runs": 1, "seconds": 1.0,
            "rows": list(rows), **more}


def tracked_summary(hidden_layers=2, alphas=(0.0, 0.5, 1.0), missing=False, steps=4, **curve):
    """Norms n^exponent of a tracked MLP sweep, two seeds; all null where missing."""
    widths, updates, course = [64, 128, 256], [], []
    for alpha, step in ((alpha, step) for alpha in alphas for step in (1, steps)):
        regime = "catastrophic" if alpha < 0.5 else "controlled divergence" if alpha < 1 else "stable"
        key = {**CURVE, "alpha": alpha, **curve, "lr": 0.1, "widths": widths, "step": step,
               "lower_bound": False, "regime": regime}
        kinds = [("effective", i) for i in range(hidden_layers + 1)]
        kinds += [("propagating", i) for i in range(1, hidden_layers + 1)]
        kinds += [("features", i) for i in range(hidden_layers)] + [("logits", hidden_layers + 1)]
        for kind, layer in kinds:
            values = [[None if missing else n ** -alpha for n in widths]] * 2
            updates.append({**key, "kind": kind, "layer": layer, "module": f"layers.{layer}",
                            "values": values, "exponent": None if missing else -alpha, "predicted": -alpha,
                            "interval": [None, None] if missing else [-alpha - 0.1, -alpha + 0.1]})
        if step == 1:
            lines = [[None if missing else 1.0 + n / 64] * steps for n in widths]
            course.append({**CURVE, "alpha": alpha, **curve, "lr": 0.1, "widths": widths,
                           "steps": list(range(1, steps + 1)), "logits_change": lines, "hidden_update": lines,
                           "train_loss": lines})
    shared = {"hidden_layers": hidden_layers, "steps": steps}
    return {**summary_of(), **shared, "updates": updates, "alignment": [], "limit": [], "course": course}


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def texts(figure):
    """Every word of a figure."""
    words = [text.get_text() for text in figure.findobj(plt.Text)]
    return "\n".join(word.replace("−", "-") for word in words if word)


def drawn(summary, folder, *only):
    (folder / "summary.json").write_text(json.dumps(summary))
    return sorted(path.stem for path in plots.draw(folder, only) if path.suffix == ".png")


def test_exponents_stand_in_the_legend_and_the_title_says_what_the_bars_are():
    said = texts(plots.exponents(summary_of(sweep_row(), sweep_row(-1.0, loss="mse"))))
    assert "CE" in said and "MSE" in said
    assert "n^{-0.50}" in said and "n^{-1.00}" in said and "[-0.60, -0.40]" in said
    assert "smallest unstable" in said and "brackets: 95 %" not in said


def test_lines_of_loss_against_lr_stop_where_the_search_left_a_gap():
    def longest(row):
        figure = plots.lr_transfer(summary_of(row))
        return max(len(line.get_xdata()) for line in figure.axes[0].lines)

    whole, gap = sweep_row(widths=(64, 128)), sweep_row(widths=(64, 128))
    for curve in gap["curves"]:
        keep = [0, 1, 2, 8, 9]
        curve["lr"] = [curve["lr"][k] for k in keep]
        curve["train_loss"] = [[loss[k] for k in keep] for loss in curve["train_loss"]]
    assert longest(whole) >= 8 and longest(gap) == 3


def test_the_phase_map_tells_cells_apart_without_colour_and_needs_a_grid(tmp_path):
    low = sweep_row()
    low["curves"][0]["train_loss"] = [[0.8, 0.8] + losses[2:] for losses in low["curves"][0]["train_loss"]]
    figure = plots.phase(summary_of(low, sweep_row(-1.0, loss="mse")))
    said = texts(figure)
    assert all(word in said for word in ("diverged", "at or above chance", "optimum", "predicted slope"))
    few = sweep_row()
    for curve in few["curves"]:
        curve["lr"], curve["train_loss"] = curve["lr"][:3], [losses[:3] for losses in curve["train_loss"]]
    assert "phase" not in drawn(summary_of(few), tmp_path)


def test_bounded_sorts_six_losses_by_what_theory_says(tmp_path):
    slopes = {"mse": -1.0, "ce": -0.5, "squared_hinge": -1.0, "hinge": -0.5, "huber": -0.5}
    figure = plots.bounded(summary_of(*(sweep_row(slope, loss=loss) for loss, slope in slopes.items())))
    ticks = [tick.get_text().replace("\n", " ") for tick in figure.axes[0].get_xticklabels()]
    assert set(ticks[:3]) == {"CE", "hinge", "Huber"} and set(ticks[3:]) == {"MSE", "squared hinge"}
    assert "bounded" not in drawn(summary_of(sweep_row(), sweep_row(-1.0, loss="mse")), tmp_path)


def test_course_has_a_column_per_loss_and_a_line_per_width():
    summary = tracked_summary(alphas=(0.5,), loss="ce", steps=8)
    summary["course"] += tracked_summary(alphas=(0.5,), loss="mse", steps=8)["course"]
    blown = summary["course"][1]
    for name in ("logits_change", "hidden_update", "train_loss"):
        blown[name] = [[1.0, 1e9, *[None] * 6] for _ in blown["widths"]]
    figure = plots.course(summary)
    said = texts(figure)
    assert len(figure.axes) == 6 and "CE" in said and "MSE" in said and "logits' change" in said
    assert all(str(width) in said for width in (64, 128, 256))
    for ax in figure.axes:
        assert ax.get_ylim()[1] < 1e8           # a blow-up does not flatten the other lines


@pytest.mark.parametrize("hidden_layers", [1, 2, 3])
def test_regimes_and_updates_of_any_depth(hidden_layers, tmp_path):
    names = drawn(tracked_summary(hidden_layers), tmp_path)
    assert {"regimes", "updates", "later_updates"} <= set(names)


def test_regimes_are_not_drawn_for_a_gpt(tmp_path):
    assert "regimes" not in drawn({**tracked_summary(), "model": "gpt"}, tmp_path)


def test_where_all_is_null_nothing_is_drawn_and_nothing_fails(tmp_path):
    assert drawn(tracked_summary(missing=True), tmp_path) == []
    row = sweep_row()
    for key in ("optimal_lr", "max_stable_lr", "min_unstable_lr"):
        row[key] = [None] * 3
    assert drawn(summary_of(row), tmp_path) == []


def test_a_figure_that_fails_does_not_take_the_others_with_it(tmp_path, monkeypatch, capsys):
    def broken(summary):
        raise IndexError("a bug")

    monkeypatch.setitem(plots.FIGURES, "lr_transfer", broken)
    with pytest.raises(plots.PlotError, match="lr_transfer"):
        drawn(summary_of(sweep_row()), tmp_path)
    assert (tmp_path / "figures" / "exponents.png").exists()
    assert "IndexError: a bug" in capsys.readouterr().err           # with its traceback


def test_a_parameterization_or_loss_without_a_name_is_called_by_its_own():
    said = texts(plots.exponents(summary_of(sweep_row(param="mine"), sweep_row(loss="focal"))))
    assert "mine" in said and "focal" in said


@pytest.mark.parametrize("key, values, words", [
    ("param", ("mup", "sp_full_align"), ("µP", "SP-full-align")),
    ("norm_affine", (True, False), ("no norm gains",)),
    ("alpha", (0.0, 0.5), ("α = 0", "α = 0.5")),
    ("warmup", (0, 10), ("no warmup", "10 warmup steps"))])
def test_curves_are_labelled_by_what_differs(key, values, words):
    said = texts(plots.exponents(summary_of(*(sweep_row(**{key: value}) for value in values))))
    assert all(word in said for word in words)


def test_best_accuracies_of_two_alphas_stand_in_two_panels():
    rows = [sweep_row(loss=loss, alpha=alpha) for loss in ("ce", "mse", "brier") for alpha in (0.0, 0.5)]
    axes = plots.losses(summary_of(*rows)).axes
    assert [ax.get_title() for ax in axes] == ["α = 0", "α = 0.5"]
    for ax in axes:
        assert sorted(ax.get_legend_handles_labels()[1]) == ["Brier", "CE", "MSE"]


def test_calibration_of_one_width_has_no_exponent():
    for widths, count in (((64,), 0), ((64, 128), 4)):
        rows = [sweep_row(param=name, widths=widths) for name in ("sp", "mup")]
        assert texts(plots.calibration(summary_of(*rows))).count("$n^") == count


@pytest.mark.parametrize("name", sorted(path.parent.name for path in ROOT.glob("assets/*/summary.json")))
def test_no_label_of_a_committed_figure_is_cut_off(name, tmp_path):
    summary = json.loads((ROOT / "assets" / name / "summary.json").read_text())
    committed = [path.stem for path in (ROOT / "assets" / name / "figures").glob("*.png")]
    for figure_name in committed:
        with plt.rc_context(plots.STYLE):
            figure = plots.FIGURES[figure_name](copy.deepcopy(summary))
            figure.canvas.draw()
        width, height = figure.canvas.get_width_height()
        for text in figure.findobj(plt.Text):
            if not (text.get_visible() and text.get_text().strip()):
                continue
            box = text.get_window_extent()
            if text.get_clip_on() or not np.isfinite(box.extents).all():
                continue
            tick = any(text in axis.get_ticklabels() for ax in figure.axes for axis in (ax.xaxis, ax.yaxis))
            assert tick or (box.x0 > -3 and box.x1 < width + 3 and box.y0 > -3 and box.y1 < height + 3), text


@pytest.mark.parametrize("spoil, words", [
    (lambda folder: None, "is not there"),
    (lambda folder: (folder / "summary.json").write_text("{"), "damaged"),
    (lambda folder: (folder / "summary.json").write_text('{"rows": [1]}'), "damaged")])
def test_a_folder_without_a_sound_summary_is_refused(spoil, words, tmp_path):
    spoil(tmp_path)
    with pytest.raises(plots.PlotError, match=words):
        plots.draw(tmp_path)
    assert not (tmp_path / "figures").exists()


def test_the_script_draws_what_is_asked_and_names_what_it_cannot(tmp_path):
    (tmp_path / "summary.json").write_text(json.dumps(summary_of(sweep_row())))

    def run(*arguments):
        return subprocess.run([sys.executable, str(ROOT / "plots.py"), str(tmp_path), *arguments],
                              capture_output=True, text=True)

    files = [str(tmp_path / "figures" / f"exponents.{ending}") for ending in ("png", "pdf")]
    assert run("exponents").stdout.split() == files
    for figure, words in (("alignment", "cannot be drawn"), ("nonsense", "choose from")):
        ended = run(figure)
        assert ended.returncode == 2 and words in ended.stderr and len(ended.stderr.splitlines()) == 1
