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
    """The figures that a summary has; their files stay empty, since layouts take most of the time."""
    (folder / "summary.json").write_text(json.dumps(summary))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plt.Figure, "savefig", lambda figure, file: file.touch())
        return sorted(path.stem for path in plots.draw(folder, only) if path.suffix == ".png")


def test_exponents_stand_in_the_legend_and_the_title_says_what_the_bars_are():
    said = texts(plots.exponents(summary_of(sweep_row(), sweep_row(-1.0, loss="mse"))))
    assert "CE" in said and "MSE" in said
    assert "n^{-0.50}" in said and "n^{-1.00}" in said and "[-0.60, -0.40]" in said
    assert "smallest unstable" in said.replace("\n", " ") and "brackets: 95 %" not in said
    local = texts(plots.exponents(summary_of({**sweep_row(), "local_max_stable": [-0.25, None]})))
    assert "-0.25" in local and "-0.25" not in said


@pytest.mark.parametrize("most, lines", [
    (40, ["a title of six short words"]), (25, ["a title of six", "short words"]),
    (10, ["a title of", "six short", "words"])])
def test_a_title_has_as_few_lines_as_it_needs_and_no_lone_word_in_the_last(most, lines):
    assert plots.even_lines("a title of six short words", most) == "\n".join(lines)


def test_a_titles_words_are_not_cut():
    assert plots.even_lines("a nine-letter-word", 16) == "a\nnine-letter-word"


def test_lines_of_loss_against_lr_stop_where_the_search_left_a_gap():
    row = sweep_row(widths=(64, 128))
    evenly = [0.01, 0.1, 1.0]                   # however wide the steps, no gap
    for curve, lrs in zip(row["curves"], ([0.01, 0.02, 0.04, 1.0, 2.0], evenly)):
        curve.update(lr=lrs, train_loss=[[0.5] * len(lrs)] * 2)
    ax = plots.lr_transfer(summary_of(row)).axes[0]
    points = [line.get_xdata() for line in ax.lines if line.get_marker() == "o"]
    assert [list(x) for x in points if len(x)] == [[0.01, 0.02, 0.04], [1.0, 2.0], evenly]


def test_a_sweep_of_one_width_or_of_many_curves_is_drawn_whole(tmp_path):
    rows = [sweep_row(alpha=k / 10) for k in range(9)]
    assert [ax.get_title() for ax in plots.lr_transfer(summary_of(*rows)).axes] == [
        f"α = {k / 10:g}" for k in range(9)]
    looks = {(line.get_color(), line.get_linestyle())
             for line in plots.optimal_lr(summary_of(*rows)).axes[0].lines
             if line.get_label().startswith("α")}
    assert len(looks) == 9                      # more than there are colours
    alone = sweep_row(widths=(64,))
    for name in ("optimal", "max_stable"):
        alone.update({f"{name}_exponent": None, f"{name}_interval": [None, None]})
    assert drawn(summary_of(alone), tmp_path) == ["exponents", "lr_transfer", "optimal_lr"]
    plots.draw(tmp_path)
    for path in (tmp_path / "figures").iterdir():
        assert path.suffix in (".png", ".pdf") and path.stat().st_size > 5_000


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
    said = texts(figure)
    assert len(figure.axes) == 6 and "CE" in said and "MSE" in said and "logits' change" in said
    assert all(str(width) in said for width in (64, 128, 256))
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


def with_limits(lrs, steps=30, **curve):
    """A tracked sweep over LRs and three α, with distances to the widest net."""
    summary = {**summary_of(), "steps": steps, "updates": [], "alignment": [], "limit": []}
    for lr in lrs:
        for loss in ("ce", "mse"):
            part = tracked_summary(steps=steps, loss=loss, **curve)
            summary["updates"] += [{**entry, "lr": lr} for entry in part["updates"]]
            for alpha in (0.0, 0.5, 1.0):
                key = {**CURVE, "loss": loss, "alpha": alpha, **curve, "lr": lr, "widths": [64, 128, 256]}
                summary["limit"].append({**key, "steps": steps, "values": [[0.4, 0.2, 0.0]] * 2})
    return summary


@pytest.mark.parametrize("lrs", [(0.1,), (0.1, 0.2, 0.4)])
def test_limit_shows_all_curves_apart_and_names_every_lr(lrs):
    figure = plots.limit(with_limits(lrs))
    assert len(figure.axes) == 2 * len(lrs)
    for ax in figure.axes:
        handles, labels = ax.get_legend_handles_labels()
        assert len({label.partition(":")[0] for label in labels}) == 6
        assert len({(handle.get_color(), handle.get_linestyle()) for handle in handles}) == 6
    assert all(f"LR {lr:g}" in texts(figure) for lr in lrs)
    assert "n^{-1.00}" in texts(figure)         # distances 0.4 and 0.2 at n and 2 n


def test_limit_of_features_that_do_not_change_keeps_the_distances(tmp_path):
    summary = with_limits((0.1,))
    for entry in summary["updates"]:
        if entry["kind"] != "logits":
            entry.update(values=[[0.0] * 3] * 2, exponent=None, interval=[None, None])
    assert "limit" in drawn(summary, tmp_path)
    distances, changes = plots.limit(summary).axes
    assert distances.lines and not changes.lines


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


def boxes_of(figure):
    """[(text, its box in pixels)] of all that is seen: not the ticks beyond an axis, nor hidden panels."""
    figure.draw_without_rendering()
    unseen = {text for ax in figure.axes if not ax.get_visible() for text in ax.findobj(plt.Text)}
    for axis in (axis for ax in figure.axes for axis in (ax.xaxis, ax.yaxis)):
        low, high = sorted(axis.get_view_interval())
        for tick in axis.get_major_ticks() + axis.get_minor_ticks():
            if not low <= tick.get_loc() <= high:
                unseen |= {tick.label1, tick.label2}
    found = [text for text in figure.findobj(plt.Text) if text.get_visible() and text.get_text().strip()]
    return [(text.get_text(), text.get_window_extent()) for text in found if text not in unseen]


def assert_legible(figure):
    """No label leaves the figure, no two lie over one another."""
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
    for path in (ROOT / "assets" / name / "figures").glob("*.png"):
        with plt.rc_context(plots.STYLE):
            assert_legible(plots.FIGURES[path.stem](copy.deepcopy(summary)))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("figure, summary", [
    ("limit", with_limits((0.1, 0.2, 0.4))), ("linear_net", closed_form()),
    ("optimal_lr", summary_of(*(sweep_row(alpha=k / 18) for k in range(18)))),
    ("lr_transfer", summary_of(*(sweep_row(alpha=k / 18) for k in range(5)))),
    ("exponents", summary_of(sweep_row(0.0, widths=[2 ** k for k in range(8, 17)]))),
    ("exponents", summary_of(*(sweep_row(0.0, param=name) for name in ("sp", "mup")))),
    ("phase", summary_of(sweep_row())), ("phase", summary_of(sweep_row(), sweep_row(-1.0, loss="mse"))),
    ("updates", tracked_summary(hidden_layers=1)),
    ("updates", tracked_summary(alphas=[k / 20 for k in range(1, 10)])),
    ("bounded", summary_of(*(sweep_row(loss=loss) for loss in list(plots.NAMES)[:6]))),
    ("course", tracked_summary(alphas=(0.5,), steps=8)), ("regimes", tracked_summary(hidden_layers=1))])
def test_labels_stay_legible_with_one_panel_and_with_many_curves(figure, summary):
    with plt.rc_context(plots.STYLE):
        assert_legible(plots.FIGURES[figure](summary))


def test_labels_that_lie_over_one_another_are_found():
    figure, ax = plt.subplots()
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

    refused = {"alignment": "cannot be drawn", "nonsense": "choose from"}
    started = {figure: subprocess.Popen([sys.executable, ROOT / "plots.py", tmp_path, figure],
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
               for figure in ("exponents", *refused)}
    said = {figure: process.communicate() for figure, process in started.items()}
    assert said["exponents"][0].split() == [
        str(tmp_path / "figures" / f"exponents.{ending}") for ending in ("png", "pdf")]
    for figure, words in refused.items():
        out, err = said[figure]
        assert started[figure].returncode == 2 and words in err and len(err.splitlines()) == 1


def test_help_says_what_every_figure_shows():
    done = subprocess.run([sys.executable, str(ROOT / "plots.py"), "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    for name, figure in plots.FIGURES.items():
        assert f"    {name:14} {figure.__doc__}\n" in done.stdout
