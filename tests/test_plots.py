"""plots.py: what figures of made-up and measured summaries show, and what happens where there is nothing."""
import copy
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

import analyze
import config
import plots
import sweep

ROOT = Path(__file__).parents[1]
SHARED = {"model": "mlp", "data": "multi_index", "hidden_layers": 2, "layers": 2, "steps": 4,
          "base_width": 256}
CURVE = {"loss": "ce", "param": "sp", "optimizer": "sgd", "alpha": 0.0, "norm_affine": True, "warmup": 0,
         "lr_factor": ""}


def sweep_row(slope=-0.5, widths=(64, 128, 256), **curve):
    """Return a curve whose edge is 0.5 (n / 64)^slope, on a grid of 12 half octaves, two seeds."""
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
    """Return the summary of a tracked MLP sweep, norms n^exponent of two seeds; all null where missing."""
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


def limit_rows(*curves, layers=(1, 2)):
    """Return spreads 0.4 (n / 64)^-1/2 of the kernels of hidden layers, for curves {setting: value}."""
    widths = [64, 128, 256]
    return [{**CURVE, **curve, "lr": 0.1, "widths": widths, "layer": layer, "module": f"layers.{layer}",
             "step": 4, "values": [0.4 * (64 / n) ** 0.5 for n in widths], "exponent": -0.5,
             "interval": [-0.6, -0.4], "predicted": -0.5, "change": [[0.2, 0.1, None], [0.4, 0.1, 0.3]]}
            for curve in curves for layer in layers]


def texts(figure):
    """Return every word of a figure."""
    words = [text.get_text() for text in figure.findobj(Text)]
    return "\n".join(word.replace("−", "-") for word in words if word)


def drawn(summary, folder, *only):
    """Return the names of the figures that a summary has.

    Their files stay empty, since layouts take most of the time.
    """
    (folder / "summary.json").write_text(json.dumps(summary))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda figure, file: file.touch())
        return sorted(path.stem for path in plots.draw(folder, only=only) if path.suffix == ".png")


def test_exponents_stand_in_the_legend_and_the_title_says_what_the_bars_are():
    shown = texts(plots.exponents(summary_of(sweep_row(), sweep_row(-1.0, loss="mse"))))
    assert "CE" in shown and "MSE" in shown
    assert "n^{-0.50}" in shown and "n^{-1.00}" in shown and "[-0.60, -0.40]" in shown
    assert "smallest unstable" in shown.replace("\n", " ") and "brackets: 95 %" not in shown
    local = texts(plots.exponents(summary_of({**sweep_row(), "local_max_stable": [-0.25, None]})))
    assert "-0.25" in local and "-0.25" not in shown


@pytest.mark.parametrize("inches", [2.0, 3.0, 4.5, 9.0])
@pytest.mark.parametrize("title", [
    "a title of six short words", "a nine-letter-word that stays whole, SP-full-align and x-y-z too",
    "Operator-norm alignment after 10 steps, one-hidden-layer nets on multi-index, a_long_name_" + 40 * "x"])
def test_a_title_has_the_lines_that_it_needs_and_its_words_are_not_cut(inches, title):
    figure = Figure(figsize=(inches, 2))
    figure.subplots()
    shown = plots.finish(figure, title).get_suptitle()
    assert shown.split() == title.split()
    most, lines = int(12.5 * inches), shown.splitlines()
    assert all(len(line) <= most or " " not in line for line in lines)
    assert all(len(f"{line} {below.split()[0]}") > most for line, below in zip(lines, lines[1:]))


def test_lines_of_loss_against_lr_have_a_point_wherever_all_seeds_ended():
    row = sweep_row(widths=(64, 128))
    row["curves"][0].update(lr=[0.01, 0.02, 0.04, 1.0],
                            train_loss=[[0.5, 0.4, 0.4, None], [0.5, 0.4, 0.6, 0.6]])
    row["curves"][1].update(lr=[0.01, 0.1], train_loss=[[0.5, 0.6], [0.7, 0.8]])
    ax = plots.lr_transfer(summary_of(row)).axes[0]
    lines = [line for line in ax.lines if line.get_marker() == "o" and len(line.get_xdata())]
    assert [list(line.get_xdata()) for line in lines] == [[0.01, 0.02, 0.04], [0.01, 0.1]]
    np.testing.assert_allclose(lines[0].get_ydata(), [0.5, 0.4, 0.5])
    np.testing.assert_allclose(lines[1].get_ydata(), [0.6, 0.7])


def test_a_sweep_of_one_width_or_of_many_curves_is_drawn_whole(tmp_path):
    rows = [sweep_row(alpha=k / 10) for k in range(9)]
    assert [ax.get_title() for ax in plots.lr_transfer(summary_of(*rows)).axes] == [
        f"α = {k / 10:g}" for k in range(9)]
    alone = sweep_row(widths=(64,))
    for name in ("optimal", "max_stable"):
        alone.update({f"{name}_exponent": None, f"{name}_interval": [None, None]})
    assert drawn(summary_of(alone), tmp_path) == ["exponents", "lr_transfer"]
    plots.draw(tmp_path)
    for path in (tmp_path / "figures").iterdir():
        assert path.suffix in (".png", ".pdf") and path.stat().st_size > 5_000


def test_more_lines_than_there_are_colours_look_different():
    rows = [sweep_row(param=name, alpha=k / 10) for k in range(6) for name in ("sp", "mup")]
    ax, _ = plots.calibration(summary_of(*rows)).axes
    handles, labels = ax.get_legend_handles_labels()
    assert len(labels) == 12 > len(plots.COLOURS)
    assert len({(handle.get_color(), handle.get_linestyle()) for handle in handles}) == 12


def test_the_phase_map_tells_cells_apart_without_colour_and_needs_a_grid(tmp_path):
    low = sweep_row()
    low["curves"][0]["train_loss"] = [[0.8, 0.8] + losses[2:] for losses in low["curves"][0]["train_loss"]]
    figure = plots.phase(summary_of(low, sweep_row(-1.0, loss="mse")))
    shown = texts(figure)
    assert all(word in shown for word in ("diverged", "at or above chance", "optimum", "predicted slope"))
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


def test_the_map_has_a_mark_per_diverged_cell_a_hatch_per_cell_at_chance_and_the_edge():
    row = sweep_row(-1.0)
    row["curves"][1]["train_loss"] = [[0.7, *losses[1:]] for losses in row["curves"][1]["train_loss"]]
    ax = plots.phase(summary_of(row)).axes[0]
    gone = sum(loss is None for curve in row["curves"] for loss in curve["train_loss"][0])
    assert sum(line.get_marker() == "x" for line in ax.lines if len(line.get_xdata())) == gone > 3
    hatched = [cell for cell in ax.collections if cell.get_hatch() and cell.get_paths()]
    assert len(hatched) == 1 and hatched[0].get_paths()[0].vertices[:, 1].min() < row["curves"][1]["lr"][0]
    optimum, = (line for line in ax.lines if line.get_label() == "optimum")
    assert list(optimum.get_ydata()) == row["optimal_lr"]
    stairs, = (patch for patch in ax.patches if patch.get_label() == "stability edge")
    np.testing.assert_allclose(stairs.get_data().values, [lr * 2 ** 0.25 for lr in row["max_stable_lr"]])
    slope, = (line for line in ax.lines if line.get_label() == "predicted slope")
    fall = np.diff(np.log(slope.get_ydata())) / np.diff(np.log(slope.get_xdata()))
    np.testing.assert_allclose(fall, -1.0)


@pytest.mark.parametrize("spoil", [
    lambda row: row.update(sweep_row(widths=(64, 128))),                # two widths
    lambda row: row["curves"][0]["lr"].__setitem__(3, 0.1)])            # unequal steps
def test_no_map_without_three_widths_of_equal_steps(spoil):
    row = sweep_row()
    for curve in row["curves"]:
        curve["lr"] = list(curve["lr"])
    plots.phase(summary_of(row))
    spoil(row)
    with pytest.raises(plots.Absent):
        plots.phase(summary_of(row))


def test_bounded_sets_every_exponent_beside_its_prediction():
    rows = [sweep_row(slope, loss=loss) for loss, slope in (("mse", -1.0), ("ce", -0.5), ("huber", -0.5))]
    outlier = sweep_row(-0.5, loss="brier")
    outlier.update(max_stable_exponent=-1.4, max_stable_interval=[-1.6, -1.3])
    unfitted = sweep_row(-1.0, loss="hinge")
    unfitted.update(max_stable_exponent=None, max_stable_interval=[None, None],
                    predicted_max_stable_exponent=None)
    left, right = plots.bounded(summary_of(*rows, outlier, unfitted)).axes
    places = [tick.get_text() for tick in left.get_xticklabels()]
    points = {places[int(line.get_xdata()[0])]: line.get_ydata()[0] for line in left.lines
              if line.get_marker() == "o"}
    assert points["Brier"] == -1.4 and points["MSE"] == -1.0 and np.isnan(points["hinge"])
    dashed = {line.get_ydata()[0] for line in left.lines if line.get_linestyle() == "--"}
    assert {-0.5, -1.0} == {value for value in dashed if np.isfinite(value)}
    assert sorted(right.get_legend_handles_labels()[1]) == ["Brier", "CE", "Huber", "MSE", "hinge"]
    assert right.get_title().startswith("width 256")


def blown_up(entry, last):
    """A course that leaves every panel after `last` steps."""
    for name in ("logits_change", "hidden_update", "train_loss"):
        steps = len(entry["steps"])
        entry[name] = [[*[1.0] * last, 1e9, *[None] * (steps - last - 1)] for _ in entry["widths"]]
    return entry


def test_course_has_a_column_per_loss_and_a_line_per_width():
    summary = tracked_summary(alphas=(0.5,), loss="ce", steps=8)
    summary["course"] += tracked_summary(alphas=(0.5,), loss="mse", steps=8)["course"]
    blown_up(summary["course"][1], 1)
    figure = plots.course(summary)
    shown = texts(figure)
    assert len(figure.axes) == 6
    assert "CE" in shown and "MSE" in shown and "logits' change" in shown
    assert all(str(width) in shown for width in (64, 128, 256))
    for ax in figure.axes:
        assert ax.get_ylim()[1] < 1e8           # a blow-up does not flatten the other lines


@pytest.mark.parametrize("last", [1, 3])
def test_a_line_that_leaves_the_course_is_marked_at_its_step(last):
    summary = tracked_summary(alphas=(0.5,), steps=8)
    summary["course"].append(blown_up(tracked_summary(alphas=(0.5,), loss="mse", steps=8)["course"][0], last))
    calm, blown = plots.course(summary).axes[:2]

    def marks(ax):
        return [line for line in ax.lines if line.get_marker() == "^"]

    assert not marks(calm) and len(marks(blown)) == 3
    for mark in marks(blown):
        assert list(mark.get_xdata()) == [last + 1] and mark.get_ydata()[0] == blown.get_ylim()[1]
    assert "n^{0.6" in texts(calm.figure)       # (1 + n / 64) over 64..256, at the first step


def test_course_of_a_net_without_hidden_matrices_has_two_rows():
    summary = tracked_summary(hidden_layers=1, alphas=(0.5,), steps=8)
    entry, = summary["course"]
    entry["hidden_update"] = [[None] * 8] * 3
    assert len(plots.course(summary).axes) == 2
    for name in ("logits_change", "train_loss"):
        entry[name] = [[None] * 8] * 3
    with pytest.raises(plots.Absent):
        plots.course(summary)


@pytest.mark.parametrize("hidden_layers", [1, 2, 3])
def test_regimes_and_updates_of_any_depth(hidden_layers, tmp_path):
    names = drawn(tracked_summary(hidden_layers), tmp_path)
    assert {"regimes", "updates", "later_updates"} <= set(names)


def test_regimes_are_not_drawn_for_a_gpt(tmp_path):
    assert "regimes" not in drawn({**tracked_summary(), "model": "gpt"}, tmp_path)


def test_limit_has_a_line_per_hidden_layer_and_names_its_curves():
    curves = [dict(alpha=0.5), dict(alpha=1.0), dict(alpha=0.5, param="mup")]
    summary = {**summary_of(), "limit": limit_rows(*curves)}
    left, right = plots.limit(summary).axes
    assert left.get_legend_handles_labels()[1] == [
        "SP, α = 0.5: −0.50, −0.50", "SP, α = 1: −0.50, −0.50", "µP, α = 0.5: −0.50, −0.50"]
    dashed, = (line for line in left.lines if line.get_linestyle() == "--")
    fall = np.diff(np.log(dashed.get_ydata())) / np.diff(np.log(dashed.get_xdata()))
    np.testing.assert_allclose(fall, -0.5)
    points = [line for line in left.lines if line.get_linestyle() == "None" and len(line.get_xdata())]
    assert len(points) == 6
    for line in points:
        np.testing.assert_allclose(line.get_ydata(), [0.4, 0.4 / 2 ** 0.5, 0.2])
    assert {(line.get_color(), line.get_marker()) for line in points} == {
        (color, marker) for color in plots.COLOURS[:3] for marker in "os"}
    changes = [line for line in right.lines if len(line.get_xdata())]
    assert len(changes) == 6
    for line in changes:
        np.testing.assert_allclose(line.get_ydata(), [0.3, 0.1, 0.3])      # means of the seeds that have one
    assert right.get_legend_handles_labels()[1] == ["hidden layer 1", "hidden layer 2"]


def test_limit_is_not_drawn_without_kernels(tmp_path):
    assert "limit" not in drawn(tracked_summary(), tmp_path)
    assert "limit" in drawn({**tracked_summary(), "limit": limit_rows(dict(alpha=0.5))}, tmp_path)


def test_updates_are_labelled_by_what_differs_and_name_the_lr():
    summary = tracked_summary(alphas=(0.0,), param="mup")
    summary["updates"] += tracked_summary(alphas=(0.0,), param="sp_full_align")["updates"]
    for figure in (plots.updates(summary), plots.later_updates(summary)):
        for ax in figure.axes:
            labels = ax.get_legend_handles_labels()[1]
            assert not ax.get_visible() or [label.partition(":")[0] for label in labels] == [
                "µP", "SP-full-align"]
        assert "LR 0.1" in texts(figure) and sum(ax.get_visible() for ax in figure.axes) == 5


def test_updates_that_are_there_after_the_first_step_alone_are_drawn_alone(tmp_path):
    summary = tracked_summary()
    for entry in summary["updates"]:
        if entry["step"] > 1:
            entry.update(values=[[None] * 3] * 2, exponent=None, interval=[None, None])
    names = drawn(summary, tmp_path)
    assert "updates" in names and "later_updates" not in names


def test_alignment_has_a_line_per_width_and_names_its_curve():
    key = {**CURVE, "alpha": 0.5, "lr": 0.1, "widths": [64, 128], "steps": [1, 2, 3, 4, 8, 12]}
    entries = [{**key, "layer": layer, "module": f"layers.{layer}", "kind": kind,
                "values": [[0.5] * 6 if layer or kind == "operator_update" else [None] * 6] * 2}
               for layer in range(3) for kind in ("operator_update", "operator_propagating")]
    others = [{**entry, "lr": 0.2} for entry in entries]
    figure = plots.alignment({**summary_of(), "steps": 12, "alignment": entries + others})
    shown = [ax for ax in figure.axes if ax.get_visible()]
    assert len(shown) == 5 and all(len(ax.lines) == 2 for ax in shown)
    assert "α = 0.5, LR 0.1" in texts(figure).replace("\n", " ")


def test_kinds_of_tensor_of_a_gpt_stand_beside_their_predictions():
    modules = ("embedding", "blocks.0.up", "blocks.1.up", "readout")
    updates = [{**CURVE, "optimizer": "adam", "param": name, "lr": 0.001, "widths": [64, 128], "step": 1,
                "module": module, "layer": layer, "kind": kind, "values": [[1.0, 2.0]] * 2, "exponent": 0.9,
                "interval": [0.8, 1.0], "predicted": 1.0, "regime": "stable"}
               for name in ("sp", "mup") for layer, module in enumerate(modules)
               for kind in ("effective", "propagating")]
    figure = plots.tensor_kinds({**summary_of(), "model": "gpt", "updates": updates})
    assert [tick.get_text() for tick in figure.axes[1].get_xticklabels()] == ["embedding", "up", "readout"]
    for ax in figure.axes:
        assert ax.get_legend_handles_labels()[1] == ["SP", "µP"]
        ticks = [line for line in ax.collections if line.get_linewidth()[0] > 2]
        assert sum(len(line.get_segments()) for line in ticks) == 2 * len(modules)


def closed_form():
    """A summary of linear_net.py."""
    widths = [2 ** k for k in range(6, 21, 2)]

    def line(slope):
        return [float(n) ** slope for n in widths]

    shared = {"widths": widths, "interval": [-1.1, -0.9]}
    edges = [{**shared, "param": "sp", "warmup": warmup, "warmup_exponent": growth, "base_width": 64,
              "max_stable_lr": line(slope), "min_unstable_lr": line(slope), "exponent": slope,
              "predicted": slope, "flags": []} for warmup, growth, slope in ((0, 0, -1), (32, 0.5, -0.5))]
    distance = [{**shared, "param": name, "step": step, "values": [line(-0.5)] * 2, "exponent": -0.5,
                 "predicted": -0.5} for name in ("mup", "ntp") for step in (1, 4)]
    one_step = [{**shared, "param": "sp", "alpha": alpha, "values": [line(2 - 2 * alpha)] * 2,
                 "exponent": 2 - 2 * alpha, "predicted": 2 - 2 * alpha} for alpha in (0.5, 1.0)]
    return {"command": "python linear_net.py", "seconds": 1.0,
            "linear_net": {"edges": edges, "distance": distance, "one_step": one_step}}


def test_a_summary_of_the_linear_net_gives_its_own_figure_alone(tmp_path):
    assert drawn(closed_form(), tmp_path) == ["linear_net"]
    axes = plots.linear_net(closed_form()).axes
    labels = [[label.partition(": ")[0] for label in ax.get_legend_handles_labels()[1]] for ax in axes]
    assert labels[0] == ["SP, no warmup", "SP, 32 warmup steps × (n / 64)$^{0.5}$"]
    assert labels[1:] == [["µP, 1 step", "µP, 4 steps", "NTP, 1 step", "NTP, 4 steps"],
                          ["SP, α = 0.5", "SP, α = 1"]]
    for ax, dashed in zip(axes, (2, 1, 2)):     # one predicted slope for all distances
        assert sum(line.get_linestyle() == "--" for line in ax.lines) == dashed


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
    shown = texts(plots.exponents(summary_of(sweep_row(param="mine"), sweep_row(loss="focal"))))
    assert "mine" in shown and "focal" in shown


@pytest.mark.parametrize("key, values, words", [
    ("param", ("mup", "sp_full_align"), ("µP", "SP-full-align")),
    ("norm_affine", (True, False), ("no norm gains",)),
    ("alpha", (0.0, 0.5), ("α = 0", "α = 0.5")),
    ("warmup", (0, 10), ("no warmup", "10 warmup steps"))])
def test_curves_are_labelled_by_what_differs(key, values, words):
    shown = texts(plots.exponents(summary_of(*(sweep_row(**{key: value}) for value in values))))
    assert all(word in shown for word in words)


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


def boxes_of(figure):
    """Return [(text, its box in pixels)] of all that is seen: no ticks beyond an axis, no hidden panels."""
    figure.draw_without_rendering()
    unseen = {text for ax in figure.axes if not ax.get_visible() for text in ax.findobj(Text)}
    for axis in (axis for ax in figure.axes for axis in (ax.xaxis, ax.yaxis)):
        low, high = sorted(axis.get_view_interval())
        for tick in axis.get_major_ticks() + axis.get_minor_ticks():
            if not low <= tick.get_loc() <= high:
                unseen |= {tick.label1, tick.label2}
    visible = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    return [(text.get_text(), text.get_window_extent()) for text in visible if text not in unseen]


def assert_legible(figure):
    """Require that no label leaves the figure, and that no two lie over one another."""
    width, height = figure.canvas.get_width_height()
    boxes = boxes_of(figure)
    for i, (text, box) in enumerate(boxes):
        assert box.x0 > -3 and box.x1 < width + 3 and box.y0 > -3 and box.y1 < height + 3, text
        for other, there in boxes[:i]:
            across = min(box.x1, there.x1) - max(box.x0, there.x0)
            down = min(box.y1, there.y1) - max(box.y0, there.y0)
            assert min(across, down) < 2, (text, other)


@pytest.mark.parametrize("name", sorted(path.parent.name for path in ROOT.glob("assets/*/summary.json")))
def test_labels_of_a_committed_figure_are_neither_cut_off_nor_over_one_another(name):
    summary = json.loads((ROOT / "assets" / name / "summary.json").read_text())
    names = {path.stem for path in (ROOT / "assets" / name / "figures").glob("*.png")}
    if any("exponent" not in row for row in summary.get("limit", ())):
        names -= {"limit"}              # written before the spread of kernels had an exponent
    for figure in sorted(names):
        with matplotlib.rc_context(plots.STYLE):
            assert_legible(plots.FIGURES[figure](copy.deepcopy(summary)))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("figure, summary", [
    ("limit", {**summary_of(), "limit": limit_rows(*({"alpha": k / 10} for k in range(6)))}),
    ("linear_net", closed_form()),
    ("calibration", summary_of(*(sweep_row(param=name, alpha=k / 18)
                                 for k in range(9) for name in ("sp", "mup")))),
    ("binding", summary_of(*(sweep_row(lr_factor=factors, loss=loss) for loss in ("ce", "mse")
                             for factors in ("", "input=0", "hidden=0", "output=0", "hidden=0 input=0")))),
    ("lr_transfer", summary_of(*(sweep_row(alpha=k / 18) for k in range(5)))),
    ("exponents", summary_of(sweep_row(0.0, widths=[2 ** k for k in range(8, 17)]))),
    ("exponents", summary_of(*(sweep_row(0.0, param=name) for name in ("sp", "mup")))),
    ("phase", summary_of(sweep_row())), ("phase", summary_of(sweep_row(), sweep_row(-1.0, loss="mse"))),
    ("updates", tracked_summary(hidden_layers=1)),
    ("updates", tracked_summary(alphas=[k / 20 for k in range(1, 10)])),
    ("bounded", summary_of(*(sweep_row(loss=loss) for loss in list(plots.NAMES)[:6]))),
    ("course", tracked_summary(alphas=(0.5,), steps=8)), ("regimes", tracked_summary(hidden_layers=1))])
def test_labels_stay_legible_with_one_panel_and_with_many_curves(figure, summary):
    with matplotlib.rc_context(plots.STYLE):
        assert_legible(plots.FIGURES[figure](summary))


def test_labels_that_lie_over_one_another_are_found():
    figure = Figure()
    ax = figure.subplots()
    ax.text(0.5, 0.5, "one")
    assert_legible(figure)
    ax.text(0.5, 0.5, "two")
    with pytest.raises(AssertionError):
        assert_legible(figure)


def test_equal_optima_of_all_widths_leave_an_axis_to_read_them_from():
    row = sweep_row()
    row.update(optimal_lr=[0.1] * 3, optimal_exponent=1e-17, max_stable_lr=[None] * 3,
               min_unstable_lr=[None] * 3, max_stable_exponent=None, max_stable_interval=[None, None])
    ax, = plots.exponents(summary_of(row)).axes
    low, high = ax.get_ylim()
    assert low < 0.09 and high > 0.11
    assert [label.split(" $")[0] for label in ax.get_legend_handles_labels()[1]] == ["optimal LR"]


def test_regimes_show_measured_exponents_on_predicted_lines():
    summary = tracked_summary(alphas=(0.0, 0.25, 0.5, 1.0))
    figure = plots.regimes(summary)
    assert [ax.get_title() for ax in figure.axes] == ["CE, after 1 step", "CE, after 4 steps"]
    ax = figure.axes[0]
    labels = ax.get_legend_handles_labels()[1]
    assert sorted(labels) == ["hidden updates", "input update", "logits' change", "output update"]
    lines = [line for line in ax.lines if len(line.get_xdata()) == 4 and line.get_linestyle() == "-"]
    assert len(lines) == 4 and all(list(line.get_ydata()) == [0.0, -0.25, -0.5, -1.0] for line in lines)
    assert {"catastrophic", "controlled\ndivergence", "stable"} == {text.get_text() for text in ax.texts}
    assert "LR 0.1 × (n / 256)" in texts(figure).replace("\n", " ")


def test_binding_sets_the_exponents_of_frozen_roles_beside_their_predictions():
    rows = [sweep_row(slope, lr_factor=factors, loss=loss) for loss, slopes in (
        ("ce", (-0.5, -0.5, 0.0)), ("mse", (-1.0, -0.75, -1.0)))
        for slope, factors in zip(slopes, ("", "input=0", "hidden=0 norm.weight=0"))]
    ax, = plots.binding(summary_of(*rows)).axes
    assert [tick.get_text().split("\n") for tick in ax.get_xticklabels()] == [
        ["all", "trained"], ["input", "frozen"], ["hidden and", "norm.weight", "frozen"]]
    handles, labels = ax.get_legend_handles_labels()
    assert labels == ["CE", "MSE"]
    assert [list(handle[0].get_ydata()) for handle in handles] == [[-0.5, -0.5, 0.0], [-1.0, -0.75, -1.0]]
    with pytest.raises(plots.Absent):
        plots.binding(summary_of(*rows[:2]))


# ---- names of the user's, several sweeps ----

DOLLARS = [r"C:\$frac$\table.npz", "/home/$me/a$b.npz", "$\\frac$", "$x^^y$", "$", "costs 5$"]


def unescaped_dollars(figure):
    return len(re.findall(r"(?<!\\)[$]", texts(figure)))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("key", ["data", "model"])
@pytest.mark.parametrize("name", DOLLARS)
def test_dollars_in_a_path_are_no_mathematics(key, name):
    row, plain = sweep_row(), sweep_row()
    row[key], plain[key] = name, "plain"
    for function in (plots.lr_transfer, plots.exponents):
        figure = function({**summary_of(row), key: name})
        figure.draw_without_rendering()
        assert name.replace("$", r"\$").replace("_", "-") in texts(figure).replace("\n", " ")
        assert unescaped_dollars(figure) == unescaped_dollars(function({**summary_of(plain), key: "plain"}))


@pytest.mark.filterwarnings("error")
def test_dollars_of_two_sweeps_are_no_mathematics(tmp_path):
    outs = [write_summary(tmp_path / name, summary_of(sweep_row()), data=data)
            for name, data in (("a$b", "$x^^y$"), ("c$^^$d", "$z^^$"), ("e", "$z^^$"))]
    assert plots.draw(*outs[:2], only=["lr_transfer"]) and plots.draw(*outs, only=["lr_transfer"])


def write_summary(folder, summary, **settings):
    """Write the summary.json of a sweep with other settings, and return its folder."""
    folder.mkdir(parents=True)
    summary = {**summary, **settings, "rows": [{**row, **settings} for row in summary["rows"]]}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def figure_of(name, *folders):
    """Return the figure that several folders show together, and the paths of its files."""
    figures = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda figure, file: figures.append(figure))
        paths = plots.draw(*folders, only=[name])
    return figures[0], paths


def titles(figure):
    return [ax.get_title() for ax in figure.axes if ax.get_visible() and ax.get_title()]


@pytest.mark.parametrize("settings, labels, title", [
    ([dict(steps=4), dict(steps=100)], ["4 steps", "100 steps"], "multi-index, 2 hidden layers"),
    ([dict(data="mnist"), dict(data="cifar10")], ["mnist", "cifar10"], "2 hidden layers, 4 steps"),
    ([dict(hidden_layers=2), dict(hidden_layers=7)], ["2 hidden layers", "7 hidden layers"],
     "multi-index, 4 steps"),
    ([dict(steps=4, base_width=64), dict(steps=8, base_width=256)],
     ["4 steps, base width 64", "8 steps, base width 256"], "multi-index, 2 hidden layers. "),
    ([dict(), dict()], ["first", "second"], "multi-index, 2 hidden layers, 4 steps"),
])
def test_several_sweeps_are_told_apart_by_what_differs_or_else_by_their_folders(
        settings, labels, title, tmp_path):
    folders = [write_summary(tmp_path / name, summary_of(sweep_row()), **of_sweep)
               for name, of_sweep in zip(("first", "second"), settings)]
    figure, paths = figure_of("exponents", *folders)
    assert titles(figure) == labels
    assert figure.get_suptitle().replace("\n", " ").startswith(title)
    assert paths == [folders[0] / "figures" / "with_second" / f"exponents.{kind}" for kind in ("png", "pdf")]


def test_sweeps_of_several_curves_name_what_differs_among_all_of_them(tmp_path):
    rows = sweep_row(), sweep_row(-1.0, loss="mse")
    steps_of = {"a": 4, "b": 4, "c": 8}
    folders = [write_summary(tmp_path / name, summary_of(*rows), steps=steps)
               for name, steps in steps_of.items()]
    assert titles(figure_of("exponents", *folders[1:])[0]) == [
        "4 steps, CE", "4 steps, MSE", "8 steps, CE", "8 steps, MSE"]
    figure, paths = figure_of("exponents", *folders)        # two of three share their settings
    assert titles(figure) == [f"{steps} steps, {name}, {loss}"
                              for name, steps in steps_of.items() for loss in ("CE", "MSE")]
    assert paths[0].parent == folders[0] / "figures" / "with_b_c"
    single, _ = figure_of("exponents", folders[0])
    assert titles(single) == ["CE", "MSE"]


def test_folders_of_the_same_name_are_told_apart_by_their_paths(tmp_path):
    folders = [write_summary(tmp_path / name / "run", summary_of(sweep_row())) for name in "xy"]
    figure, _ = figure_of("exponents", *folders)
    assert titles(figure) == [str(folder).replace("_", "-") for folder in folders]


def test_each_of_several_sweeps_shows_its_own_numbers(tmp_path):
    folders = [write_summary(tmp_path / name, summary_of(sweep_row(slope)), steps=steps)
               for name, slope, steps in (("a", -0.5, 4), ("b", -1.0, 8))]
    first, second = figure_of("exponents", *folders)[0].axes
    for ax, exponent in ((first, "n^{−0.50}"), (second, "n^{−1.00}")):
        assert exponent in "".join(text.get_text() for text in ax.get_legend().get_texts())


@pytest.mark.parametrize("name", ["updates", "later_updates", "limit"])
def test_tracked_results_of_several_sweeps_come_together(name, tmp_path):
    summary = {**tracked_summary(alphas=(0.5,)), "limit": limit_rows(dict(alpha=0.5))}
    folders = [write_summary(tmp_path / of_sweep, summary, data=of_sweep) for of_sweep in ("first", "second")]
    ax = figure_of(name, *folders)[0].axes[0]
    assert [label.partition(":")[0] for label in ax.get_legend_handles_labels()[1]] == ["first", "second"]


def test_rates_at_other_widths_are_drawn_beside_their_own_sweep_alone(tmp_path):
    def stars(ax):
        return [list(line.get_ydata()) for line in ax.lines if line.get_marker() == "*"]

    rates = {"fitted": [0.02, 0.01, 0.04], "predicted": [0.02, 0.01, 0.04]}
    at = [{**CURVE, "width": width, "optimal": rates, "max_stable": rates, "recommended": recommended}
          for width, recommended in ((512, 0.03), (1024, 0.02))]
    summaries = {**summary_of(sweep_row()), "at": at}, summary_of(sweep_row())
    folders = [write_summary(tmp_path / name, summary, data=name)
               for name, summary in zip(("first", "second"), summaries)]
    first, = figure_of("exponents", folders[0])[0].axes
    assert stars(first) == [[0.03, 0.02]]
    first, second = figure_of("exponents", *folders)[0].axes
    assert stars(first) == [[0.03, 0.02]] and not stars(second)


def test_layers_of_networks_of_different_depth_are_not_set_side_by_side(tmp_path):
    folders = [write_summary(tmp_path / f"{depth}", tracked_summary(hidden_layers=depth)) for depth in (2, 3)]
    for name in ("updates", "regimes"):
        with pytest.raises(plots.PlotError, match="differ in depth"):
            plots.draw(*folders, only=[name])


def test_the_script_takes_several_folders_and_figures(tmp_path, capsys):
    folders = [write_summary(tmp_path / name, summary_of(sweep_row()), steps=steps)
               for name, steps in (("a", 4), ("b", 8))]
    plots.main([*map(str, folders), "exponents", "lr_transfer"])
    into = folders[0] / "figures" / "with_b"
    assert capsys.readouterr().out.split() == [
        str(into / f"{name}.{kind}") for name in ("exponents", "lr_transfer") for kind in ("png", "pdf")]
    assert sorted(path.name for path in into.iterdir()) == [
        f"{name}.{kind}" for name in ("exponents", "lr_transfer") for kind in ("pdf", "png")]
    with pytest.raises(plots.PlotError, match="summary.json is missing"):
        plots.main([str(folders[0]), str(tmp_path), "exponents"])
    with pytest.raises(plots.PlotError, match="unknown figure '.*/nowhere'"):
        plots.main([str(folders[0]), str(tmp_path / "nowhere")])


# ---- beside the user's own figures ----

DRAW = """
import sys
sys.modules["matplotlib.pyplot"] = None             # importing it raises
import matplotlib
if sys.argv[2:]:
    matplotlib.use(sys.argv[2])
matplotlib.rcParams["font.size"] = 17
before = {key: dict.__getitem__(matplotlib.rcParams, key) for key in matplotlib.rcParams}
import plots
assert len(plots.draw(sys.argv[1], only=["exponents", "lr_transfer"])) == 4
assert {key: dict.__getitem__(matplotlib.rcParams, key) for key in matplotlib.rcParams} == before
"""


@pytest.mark.parametrize("backend", [[], ["svg"], ["tkagg"]])
def test_drawing_needs_no_pyplot_and_leaves_backend_and_style_alone(backend, tmp_path):
    folder = write_summary(tmp_path / "out", summary_of(sweep_row()))
    environment = {name: value for name, value in os.environ.items() if name not in ("MPLBACKEND", "DISPLAY")}
    done = subprocess.run([sys.executable, "-c", DRAW, folder, *backend], cwd=ROOT, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(path.stat().st_size > 5_000 for path in (folder / "figures").iterdir())


def test_figures_in_a_notebook_are_not_added_to_those_of_pyplot():
    before, numbers = dict(plt.rcParams), plt.get_fignums()
    figure = plots.exponents(summary_of(sweep_row()))
    assert isinstance(figure, Figure) and plt.get_fignums() == numbers and dict(plt.rcParams) == before


# ---- summaries as analyze.py makes them ----

def result_rows():
    """Return the rows of a grid of LRs for several losses, parameterizations and frozen roles."""
    flags, rows = "--widths 8 16 32 --base-width 8 --lr-range 0.0625 4 --search grid --seeds 2", []
    for curve_flags in ("--loss ce mse brier huber", "--loss ce --param mup",
                        "--loss ce --lr-factor input=0", "--loss ce --lr-factor hidden=0"):
        args, fixed, curves = sweep.parse(f"{flags} {curve_flags}".split())
        for curve in curves:
            grid, lr_of = sweep.lr_grid(args, curve)
            rows += [result_row(run) for width in args["widths"] for k in grid
                     for run in sweep.runs_of(fixed, curve, width, lr_of[k], 2)]
    return rows


def result_row(run):
    """Return a row whose optimum is 0.5 (n / 8)^-1/2 and whose stability edge is twice as high."""
    x = math.log(run["lr"] / (0.5 * (8 / run["width"]) ** 0.5))
    diverged = x > math.log(2) + 0.01 * run["seed"]
    results = dict.fromkeys(config.RESULTS, None if diverged else 0.5 + 0.01 * run["seed"])
    results["final_train_loss"] = None if diverged else 0.3 + 0.05 * x ** 2 + 0.001 * run["seed"]
    results["diverged_at"] = 3 if diverged else None
    return {"id": config.run_id(run), **run, **results, "failed": None, "chance_loss": 1.0, "seconds": 0.1,
            "shape_info": {"hidden_tensors": 2, "uneven": False, "roles_given": False}}


TRACKED = ("--base-width 16 --seeds 2 --steps 6 --batch-size 4 --val-size 16 --loss ce --track 1 --alignment "
           "--kernels --no-plots")


def tracked_folder(tmp_path_factory, *flags):
    folder = tmp_path_factory.mktemp("tracked")
    sweep.main([*TRACKED.split(), *" ".join(flags).split(), "--out", str(folder)])
    return folder


@pytest.fixture(scope="module")
def summaries(tmp_path_factory):
    """Return the summaries of rows, and of the folders of a tracked MLP and of a tracked GPT."""
    mlp = tracked_folder(tmp_path_factory, "--widths 16 32 64 --hidden-layers 2 --train-size 100 --lrs 0.1",
                         "--alpha 0 0.5 1")
    gpt = tracked_folder(tmp_path_factory, f"--model gpt --data {__file__} --widths 16 32 --head-dim 8",
                         "--layers 1 --context 8 --optimizer adam --lrs 0.01 --warmup 0 --param sp mup")
    return [analyze.summary_of(source) for source in (result_rows(), mlp, gpt)]


DRAWN = [       # which figures each of the summaries has
    {"lr_transfer", "exponents", "phase", "bounded", "losses", "calibration", "binding"},
    {"regimes", "course", "updates", "later_updates", "alignment", "limit"},
    {"course", "tensor_kinds"}]


def test_every_figure_function_is_tried_on_a_summary_of_analyze():
    assert set.union(*DRAWN) == plots.FIGURES.keys() - {"linear_net"}       # which has its own summary


@pytest.mark.parametrize("name", plots.FIGURES)
def test_every_figure_function_takes_what_summary_of_returns(name, summaries):
    for summary, expected in zip(summaries, DRAWN):
        if name not in expected:
            with pytest.raises(plots.Absent):
                plots.FIGURES[name](summary)
            continue
        figure = plots.FIGURES[name](summary)
        of_file = plots.FIGURES[name](json.loads(json.dumps(summary)))
        assert sorted(texts(figure).splitlines()) == sorted(texts(of_file).splitlines())
        for ax, ax_of_file in zip(figure.axes, of_file.axes, strict=True):
            for line, line_of_file in zip(ax.lines, ax_of_file.lines, strict=True):
                np.testing.assert_array_equal(line.get_xydata(), line_of_file.get_xydata())
        assert sum(len(ax.lines) + len(ax.collections) for ax in figure.axes) > 3
        figure.draw_without_rendering()


# ---- result folders ----

@pytest.mark.parametrize("spoil, words", [
    (lambda folder: None, "is missing; run python sweep.py --out"),
    (lambda folder: (folder / "summary.json").write_text("{"), "damaged"),
    (lambda folder: (folder / "summary.json").write_text('{"rows": [1]}'), "damaged")])
def test_a_folder_without_a_sound_summary_is_refused(spoil, words, tmp_path):
    spoil(tmp_path)
    with pytest.raises(plots.PlotError, match=words):
        plots.draw(tmp_path)
    assert not (tmp_path / "figures").exists()


def test_the_script_draws_what_is_asked_and_names_what_it_cannot(tmp_path):
    (tmp_path / "summary.json").write_text(json.dumps(summary_of(sweep_row())))
    refused = {"alignment": "cannot be drawn", "nonsense": "choose from"}
    started = {figure: subprocess.Popen([sys.executable, ROOT / "plots.py", tmp_path, figure],
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
               for figure in ("exponents", *refused)}
    streams = {figure: process.communicate() for figure, process in started.items()}
    assert streams["exponents"][0].split() == [
        str(tmp_path / "figures" / f"exponents.{ending}") for ending in ("png", "pdf")]
    for figure, words in refused.items():
        out, err = streams[figure]
        assert started[figure].returncode == 2 and words in err and len(err.splitlines()) == 1


def test_help_says_what_every_figure_shows():
    done = subprocess.run([sys.executable, str(ROOT / "plots.py"), "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    for name, figure in plots.FIGURES.items():
        assert f"    {name:14} {figure.__doc__}\n" in done.stdout
