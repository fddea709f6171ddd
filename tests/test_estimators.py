"""Optimum, edge and their 95 % intervals on simulated sweeps whose exponents are known; and that a search
ends, repeats nothing and finds what the full grid does.

    python -m tests.test_estimators         # coverage, width and bias of every scenario, as a table; minutes
"""
import functools
import math

import numpy as np
import pytest

import analyze
import metrics
import sweep

STEP = math.log(2) / 2
KS = np.arange(-48, 31)                             # lattice points; learning rates 2^(k/2)
LOG_LR = KS * STEP
COLUMNS = {int(k): i for i, k in enumerate(KS)}
GRID = np.arange(-16, 7)                            # the range of a search, before it grows
CHANCE = ("chance", 1.0)
SEARCH = functools.partial(sweep.next_points, grid=range(-16, 7), reach=range(-40, 31),
                           search="coarse-to-fine", chance=9.0)


def cell_on(losses, columns=slice(None)):
    losses = losses[:, columns]
    return {"lr": 2.0 ** (KS[columns] / 2), "losses": losses, "accuracies": 0 * losses, "chance": 9.0}


# ---- coverage, width and bias ----

def landscape(generator, optimum, edge, jitter, curvature=0.03, slopes=None, noise=0.01, above=None,
              cliff=False):
    """Losses (3, K) of three seeds: a parabola, or a rounded V of two slopes, each with its own minimum, or a
    fall to the edge (cliff). Beyond a seed's own edge, jitter its spread, they diverge or lie higher by
    above."""
    edges, noise = edge + generator.normal(0, jitter, (3, 1)), generator.normal(0, noise, (3, len(KS)))
    z = LOG_LR - optimum - generator.normal(0, 0.3, (3, 1))
    if cliff:
        losses = np.maximum(0.01, 0.3 - curvature * (LOG_LR - edge) + noise)
    elif slopes:
        down, up = slopes
        losses = 0.3 + down * np.logaddexp(0, -3 * z) / 3 + up * np.logaddexp(0, 3 * z) / 3 + noise
    else:
        losses = 0.3 + curvature * z ** 2 + noise
    return np.where(LOG_LR > edges, analyze.DIVERGED if above is None else losses + above, losses)


def searched(landscapes, criterion):
    """The cells that a search runs, from narrow to wide."""
    hint, cells = None, []
    for losses in landscapes:
        search = functools.partial(SEARCH, hint=hint)
        known, points = sweep.follow(cell_on(losses), COLUMNS, criterion, search)
        assert not points
        hint = sweep.optimum_and_edge(known)
        cells.append(cell_on(losses, [COLUMNS[k] for k in sorted(known)]))
    return cells


def gridded(landscapes, criterion):
    return [cell_on(losses, (KS >= -24) & (KS <= 14)) for losses in landscapes]


def as_one(landscapes, criterion):
    """A full grid in which every seed has the divergences of all: edge and cliff are those of the mean."""
    diverged = [(losses >= analyze.DIVERGED).any(0) for losses in landscapes]
    return gridded([np.where(at, analyze.DIVERGED, losses) for at, losses in zip(diverged, landscapes)],
                   criterion)


def simulate(kind, how, jitter, gap, repetitions, criterion=CHANCE, **shape):
    """{4: (coverage, mean width, bias, rmse), 5: ...} of the exponent and its interval from so many widths;
    gap: log units from the optimum up to the edge; jitter of the edge: one, or at the narrowest and the
    widest."""
    generator, widths = np.random.default_rng(0), [64 * 2 ** i for i in range(5)]
    told = {4: [], 5: []}
    for _ in range(repetitions):
        truth, offset = generator.uniform(-1.2, -0.3), generator.uniform(-0.5, 0.5)
        optima = [offset + truth * math.log(width / 64) for width in widths]
        landscapes = [landscape(generator, at, at + gap, spread, **shape)
                      for at, spread in zip(optima, np.geomspace(jitter[0], jitter[-1], 5))]
        points = [analyze.points_of(cell, criterion) for cell in how(landscapes, criterion)]
        for count in told:
            slope, (low, high), used = analyze.exponents_of(points[:count], widths[:count])[kind]
            assert used == count
            told[count].append((low <= truth <= high, high - low, slope - truth, (slope - truth) ** 2))
    means = {count: np.mean(values, axis=0) for count, values in told.items()}
    return {count: (*mean[:3], math.sqrt(mean[3])) for count, mean in means.items()}


SCENARIOS = {       # (kind, how, jitter, gap, shape, largest width of the interval from 4 widths and from 5)
    "edge, search": ("max_stable", searched, [0.3], 1.5, {}, (0.70, 0.47)),
    "edge, full grid": ("max_stable", gridded, [0.3], 1.5, {}, (0.70, 0.47)),
    "edge, jitter from 0.6 to 0.1 with width, full grid":
        ("max_stable", gridded, [0.6, 0.1], 1.5, {}, (0.80, 0.52)),
    "edge, `best+1`, optimum 5 log units below, search":
        ("max_stable", searched, [0.3], 5.0, dict(criterion=("best+1", 1.0), above=2.0), (0.70, 0.47)),
    "optimum, sharp, search": ("optimal", searched, [0.3], 1.5, dict(curvature=0.3), (0.62, 0.42)),
    "optimum, flat, search": ("optimal", searched, [0.3], 3.0, dict(curvature=0.01), (0.75, 0.50)),
    "optimum, flatter, search": ("optimal", searched, [0.3], 3.0, dict(curvature=0.003), (1.05, 0.68)),
    "optimum between two slopes, search":
        ("optimal", searched, [0.3], 3.0, dict(slopes=(0.04, 0.1)), (0.62, 0.42)),
    "optimum at a cliff, search":
        ("optimal", searched, [0.3], 0.0, dict(curvature=0.05, cliff=True), (0.74, 0.52)),
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_95_percent_intervals_cover_the_exponent_without_bias_and_are_no_wider_than_need_be(name):
    """Of 600 repetitions the least coverage is 0.935, the largest bias 0.015 and the largest error 0.195, so
    that 120 repetitions have at least 0.935 ± 0.023 and at most 0.015 ± 0.018."""
    kind, how, jitter, gap, shape, widths = SCENARIOS[name]
    found = simulate(kind, how, jitter, gap, 120, **shape)
    for (coverage, width, bias, _), largest in zip(found.values(), widths):
        assert coverage >= 0.84
        assert width <= largest
        assert abs(bias) <= 0.09


def test_the_edge_of_the_mean_in_place_of_every_seeds_is_biased_where_their_spread_changes_with_width():
    _, _, bias, _ = simulate("max_stable", as_one, [0.6, 0.1], 1.5, 120)[4]         # 0.19 ± 0.02
    assert bias > 0.09


def test_one_cliff_for_all_seeds_hides_their_spread():
    shape = dict(curvature=0.05, cliff=True)
    assert simulate("optimal", as_one, [0.3], 0.0, 200, **shape)[5][0] < 0.88       # 0.74 ± 0.03, else 0.98


def test_an_interval_that_knows_nothing_of_the_grids_step_covers_too_rarely(monkeypatch):
    plain = metrics.exponent_interval
    monkeypatch.setattr(metrics, "exponent_interval",
                        lambda *args, resolution, **kwargs: plain(*args, **kwargs))
    assert simulate("max_stable", gridded, [0.02], 1.5, 60)[4][0] < 0.6             # 0.28 ± 0.06, else 1


def test_a_flat_optimum_needs_the_points_that_make_its_curvature_certain(monkeypatch):
    monkeypatch.setattr(analyze, "CERTAIN", 0.6)
    monkeypatch.setattr(analyze, "CURVED", 0.6)
    coverage, _, bias, _ = simulate("optimal", searched, [0.3], 3.0, 160, curvature=0.003)[4]
    assert coverage < 0.7           # 0.45 ± 0.04, else 0.96
    # 0.24 ± 0.03 (else 0.01 ± 0.02), towards where the narrower width was searched
    assert bias > 0.1


def test_losses_without_curvature_give_an_interval_that_says_so(monkeypatch):
    def width_of_interval():
        return simulate("optimal", gridded, [0.3], 3.0, 40, curvature=0.0003)[4][:2]

    coverage, width = width_of_interval()
    assert coverage >= 0.92 and width > 4.6                                         # 1.0, 6.2 ± 0.3
    plain = analyze.optimum
    monkeypatch.setattr(analyze, "optimum", lambda *cell: (plain(*cell)[0], STEP, False))
    assert width_of_interval()[1] < 4.1                                             # 2.9 ± 0.2


# ---- single cells ----

def cell_of(*losses):
    """A cell of LRs 1, 2, 4, ...; None: diverged."""
    losses = np.array([[analyze.DIVERGED if y is None else y for y in line] for line in losses], dtype=float)
    lr = 2.0 ** np.arange(losses.shape[1])
    return {"lr": lr, "losses": losses, "accuracies": 0 * losses, "chance": 9.0}


def test_without_noise_optimum_and_edge_are_exact():
    def losses(edge):
        parabola = 0.3 + 0.1 * (LOG_LR - edge + 2) ** 2
        return np.where(LOG_LR > edge, analyze.DIVERGED, parabola)[None].repeat(3, 0)

    cells = [cell_on(losses(edge)) for edge in (0.1, 0.1 - 2 * STEP, 0.1 - 4 * STEP)]
    points = [analyze.points_of(cell, CHANCE) for cell in cells]
    fits = analyze.exponents_of(points, [64, 128, 256])
    assert fits["max_stable"][0] == pytest.approx(-1) and fits["optimal"][0] == pytest.approx(-1)
    assert points[0]["optimal"] == pytest.approx([-1.9] * 3)
    assert points[0]["within"] == pytest.approx(STEP / 2)
    assert np.exp(points[0]["unstable"] - points[0]["stable"]) == pytest.approx([math.sqrt(2)] * 3)
    assert points[0]["stable"][0] <= 0.1 < points[0]["unstable"][0] and not points[0]["at_edge"]


def test_the_parabola_has_one_curvature_a_vertex_for_each_seed_and_the_errors_of_least_squares():
    generator, x = np.random.default_rng(0), np.array([-2.0, -1.0, 0.0, 0.5, 3.0])
    own = np.array([-0.5, 0.0, 1.0])
    exact = analyze.shared_parabola(x, 0.2 * (x - own[:, None]) ** 2 + [[1], [2], [3]])
    assert exact.a == pytest.approx(0.2) and exact.vertices == pytest.approx(own)
    assert exact.a_error == pytest.approx(0, abs=1e-12)

    def noisy():
        return analyze.shared_parabola(x, 0.2 * (x - own[:, None]) ** 2 + generator.normal(0, 0.05, (3, 5)))

    fits = [noisy() for _ in range(2000)]
    curvatures = [fit.a for fit in fits]
    assert np.mean(curvatures) == pytest.approx(0.2, abs=1e-3)
    assert np.mean([fit.a_error ** 2 for fit in fits]) == pytest.approx(np.var(curvatures), rel=0.1)
    assert np.mean([fit.mean_error ** 2 for fit in fits]) == pytest.approx(0.05 ** 2 * 2 / 3, rel=0.05)
    # what the curvature's error does to all vertices alike is part of their mean's variance, not all of it
    together = np.var([fit.vertices.mean() for fit in fits])
    assert 0 < np.mean([fit.vertex_error ** 2 for fit in fits]) < together


def test_a_curvature_needs_residuals():
    assert analyze.shared_parabola(np.arange(3.0), np.array([[1.0, 0.0, 1.0]])) is None
    assert analyze.shared_parabola(np.arange(2.0), np.ones((3, 2))) is None
    fit = analyze.shared_parabola(np.arange(4.0), np.array([[4.0, 1.0, 0.0, 1.0]]))
    assert fit.vertices == pytest.approx([2])


def test_an_optimum_beside_a_divergence_is_every_seeds_last_stable_rate_and_says_so():
    falling = np.where(LOG_LR > np.array([[0.1], [1.2]]), analyze.DIVERGED, 2 - 0.1 * LOG_LR)
    point = analyze.points_of(cell_on(falling), CHANCE)
    assert point["at_edge"] and point["optimal"] == pytest.approx(point["stable"])
    assert point["optimal"][1] - point["optimal"][0] == pytest.approx(3 * STEP)
    assert point["within"] == pytest.approx(STEP)


def test_losses_that_fall_ever_more_slowly_up_to_a_cliff_have_their_optimum_there_and_not_beyond():
    losses = np.where(LOG_LR > 0.1, analyze.DIVERGED, 1 + np.exp(-LOG_LR / 3))[None].repeat(3, 0)
    noise = np.random.default_rng(0).normal(0, 1e-3, losses.shape)
    first, last, fit, _ = analyze.window(LOG_LR, losses + noise, losses[0] < 9)
    assert fit.a > 0 and fit.vertices.min() > 0.5
    optimal, within, at_edge = analyze.optimum(LOG_LR, losses + noise, losses < 9)
    assert at_edge and optimal == pytest.approx([0] * 3) and within == pytest.approx(STEP)
    losses = np.where(LOG_LR > 0.1, analyze.DIVERGED, 1 - 0.01 * LOG_LR)[None].repeat(3, 0)
    losses[:, KS == 0] -= 0.01          # so at all of three hundred shifts
    assert np.ptp(analyze.window(LOG_LR, losses + 5 * noise, losses[0] < 9)[:2]) > 2
    assert analyze.optimum(LOG_LR, losses + 5 * noise, losses < 9)[1:] == (pytest.approx(STEP), True)


def test_the_window_of_an_optimum_never_reaches_across_a_cliff():
    noise = np.random.default_rng(0).normal(0, 1e-3, (3, 8))
    losses = np.array([0.9, 0.7, 0.5, 0.31, 0.30, 0.31, 60.0, 50.0]) + noise
    unstable = losses > 9
    first, last, fit, _ = analyze.window(np.arange(8.0), losses, ~unstable.any(0))
    assert last <= 5
    assert analyze.optimum(np.arange(8.0), losses, ~unstable)[0] == pytest.approx([4] * 3, abs=0.5)
    across = analyze.shared_parabola(np.arange(8.0)[first:], losses[:, first:])
    assert across.vertices.mean() < 3


@pytest.mark.parametrize("losses, optimal, within", [
    ([[0.4, 0.4, 0.4]] * 2, 0.0, 2.0),                          # a plateau: anywhere on it
    ([[0.5, 0.4, 0.4, 0.5]] * 2, 1.5, 0.5),                     # a tie: between
    ([[0.5, 0.4]] * 3, 1.0, 1.0),                               # two LRs alone
    ([[0.5]] * 3, 0.0, math.nan),                               # one
    ([[0.5, 0.4, 0.5]], 1.0, 2.0),                              # one seed: three LRs leave no residuals
    ([[None, None]] * 2, math.nan, math.nan),
    ([[0.5, None], [None, 0.5]], math.nan, math.nan),
], ids=["plateau", "tie", "two LRs", "one LR", "one seed", "all diverged", "one seed diverged everywhere"])
def test_cells_that_tell_little_have_an_optimum_as_uncertain_as_it_is(losses, optimal, within):
    with np.errstate(all="raise"):
        point = analyze.points_of(cell_of(*losses), CHANCE)
    assert point["optimal"] / math.log(2) == pytest.approx([optimal] * len(losses), nan_ok=True)
    assert point["within"] / math.log(2) == pytest.approx(within, nan_ok=True)


def test_an_edge_is_contiguous_from_the_seeds_own_lowest_loss_up():
    losses = np.array([[3, 1, 2, 9, 2], [1, 2, 2, 2, 2], [9, 9, 9, 9, 9], [2, 2, 9, 1, 9]])
    stable = losses < 9
    assert analyze.edges(losses, stable) == [(2, 3), (4, None), (None, None), (3, 4)]


def test_a_width_counts_where_every_seed_has_an_edge():
    values = np.array([[1.0, 0.5, np.nan, 0.125], [1.0, 0.5, 0.25, 0.125]])
    slope, interval, used = analyze.exponent_of([64, 128, 256, 512], values, np.full(4, STEP))
    assert slope == pytest.approx(-1) and used == 3 and interval[0] < -1 < interval[1]
    slope, interval, used = analyze.exponent_of([64, 128], values[:, 2:], np.full(2, STEP))
    assert math.isnan(slope) and used == 1


def test_a_hole_in_one_seeds_bracket_widens_the_interval_by_its_share():
    def interval(hole):
        unstable = np.full(3, STEP)
        points = [{"optimal": 0 * unstable, "within": STEP, "stable": stable, "unstable": unstable}
                  for stable in (np.array([-hole, 0, 0]), np.zeros(3))]
        low, high = analyze.exponents_of(points, [64, 128])["max_stable"][1]
        return high - low

    assert interval(0) < interval(3 * STEP) < interval(9 * STEP)
    # no seed's edge lies elsewhere, so the mean's moves by a third of the hole at most
    spread = np.var([STEP / 2 - 9 * STEP / 2, STEP / 2, STEP / 2], ddof=1)
    variance = 2 * (spread / 2 / 3) + (4 * STEP) ** 2 / 12 + STEP ** 2 / 12
    expected = 2 * metrics.t_quantile(0.975, 2) * math.sqrt(variance) / math.log(2)
    assert interval(9 * STEP) == pytest.approx(expected)


# ---- flags ----

def flags_of(*cells, criterion=CHANCE):
    points = [analyze.points_of(cell, criterion) for cell in cells]
    widths = [64 * 2 ** i for i in range(len(cells))]
    fits = analyze.exponents_of(points, widths)
    return analyze.flags_of(points, fits, cells, widths, [], criterion)


def test_a_width_that_does_not_count_is_said_with_the_reason_and_the_remedy():
    good, slow = cell_of(*[[0.5, 0.4, 0.5, None]] * 2), cell_of([9.8, 9.5, 9.9, None], [9.8, 8.5, 9.9, None])
    assert flags_of(good, good, good, good) == []
    said = "no stable LR for 1 of 2 seeds: no loss below 1 x the constant predictor's 9 (lowest mean 9); " \
           "more --steps, or --stable-if chance=2"
    assert flags_of(good, slow, good, slow) == [
        "edge from 2 of 4 widths", f"width 128: {said}", f"width 512: {said}"]
    flags = flags_of(good, good, slow, criterion=("accuracy", 0.3))
    assert "width 64: no stable LR for 2 of 2 seeds under accuracy=0.3; " \
           "more --steps, or another --stable-if" in flags
    above = cell_of([0.5, 0.4, 0.5, None], [0.5, 0.4, 0.5, 0.6])
    assert flags_of(good, above, good) == [
        "edge from 2 of 3 widths", "width 128: nothing unstable up to LR 8 for 1 of 2 seeds"]
    none = cell_of([0.5, None], [None, 0.5])
    assert flags_of(good, good, none)[:2] == ["edge from 2 of 3 widths", "optimum from 2 of 3 widths"]


def test_an_optimum_and_an_edge_that_are_hardly_known_are_flagged():
    words = "is known to a factor of {} only; more --seeds, or LRs between"
    flat, sharp = cell_of(*[[0.4] * 6 + [None]] * 2), cell_of(*[[0.5, 0.4, 0.5, None]] * 2)
    told = [f"width 64: the optimal LR {words.format(32)}"]
    assert [flag for flag in flags_of(flat, sharp) if "known" in flag] == told
    sharp["lr"] = 10.0 ** np.arange(4)
    told = [f"width {width}: the edge {words.format(10)}" for width in (64, 128)]
    assert flags_of(sharp, sharp) == told


# ---- the search ----

def random_landscape(generator):
    optimum, gap = generator.uniform(-6, 2), generator.uniform(0, 4)
    shape = dict(curvature=10 ** generator.uniform(-3, 0), noise=10 ** generator.uniform(-3, -1),
                 above=generator.choice([None, 0.5, 20.0]), cliff=bool(generator.integers(2)))
    return landscape(generator, optimum, optimum + gap, generator.choice([0.01, 0.3, 1.0]), **shape)


def random_search(generator):
    hint = None if generator.random() < 0.5 else tuple(sorted(generator.integers(-16, 7, 2).tolist()))
    return functools.partial(SEARCH, hint=hint)


def test_a_search_ends_repeats_nothing_and_brackets_every_seeds_edge_to_one_step():
    generator, reach = np.random.default_rng(1), range(-16 - 24, 6 + 24 + 1)
    for _ in range(300):
        losses, plain, rounds = random_landscape(generator), random_search(generator), []

        def search(known):
            points = plain(known)
            assert not points & known.keys() and len(rounds) < 60
            rounds.append(points)
            return points

        known, points = sweep.follow(cell_on(losses), COLUMNS, CHANCE, search)
        assert not points and known.keys() <= set(reach)
        ks, seen, stable = sweep.table_of(known)
        for edge, above in analyze.edges(seen, stable):
            assert edge is None or above is None or ks[above] - ks[edge] == 1


def test_a_search_of_several_seeds_goes_the_same_way_wherever_it_was_cut_and_whatever_else_is_there():
    generator = np.random.default_rng(3)
    for _ in range(40):
        losses, search = random_landscape(generator), random_search(generator)
        whole, _ = sweep.follow(cell_on(losses), COLUMNS, CHANCE, search)
        done, points = set(generator.choice(KS, 15, replace=False).tolist()), True
        while points:
            ks = sorted(done)
            known, points = sweep.follow(cell_on(losses, [COLUMNS[k] for k in ks]),
                                         {k: i for i, k in enumerate(ks)}, CHANCE, search)
            done |= set(sorted(points - done)[:2])
        assert known.keys() == whole.keys()


def test_a_search_finds_the_full_grids_optimum_and_edge_with_at_most_half_of_its_runs():
    generator, runs, cells, misses = np.random.default_rng(2), 0, 0, 0
    for _ in range(40):
        optimum, curvature = generator.uniform(-4, -1), 10 ** generator.uniform(-1.5, 0)
        optima = optimum - 0.7 * np.arange(4)
        landscapes = [landscape(generator, at, at + 1.5, 0.3, curvature=curvature) for at in optima]
        for few, every in zip(searched(landscapes, CHANCE), gridded(landscapes, CHANCE)):
            found, true = (analyze.points_of(cell, CHANCE) for cell in (few, every))
            assert found["stable"] == pytest.approx(true["stable"])
            misses += abs(found["optimal"].mean() - true["optimal"].mean()) > STEP
            runs, cells = runs + len(few["lr"]), cells + 1
    assert misses <= 0.03 * cells
    assert runs <= 0.5 * cells * len(GRID)


@pytest.mark.parametrize("curvature, low, high", [
    (1.0, 1.5, 2.5),            # 2 at every seed
    (0.01, 3.5, 8.0),           # 5.4 ± 0.4, means of 40 seeds
    (0.003, 10.0, 15.0),        # 12.5 ± 0.5
    (0.0, 15.3, 16.1),          # 15.9 ± 0.13
])
def test_the_flatter_the_optimum_the_farther_below_it_is_searched_and_no_farther_than_that(curvature, low, high):
    search, depths = functools.partial(SEARCH, hint=(0, 5)), []
    for seed in range(40):
        losses = 0.3 + curvature * LOG_LR ** 2 + np.random.default_rng(seed).normal(0, 0.01, (3, len(KS)))
        losses[:, KS > 6] = analyze.DIVERGED
        known, _ = sweep.follow(cell_on(losses), COLUMNS, CHANCE, search)
        depths.append(sweep.optimum_and_edge(known)[0] - min(known))
    assert low < np.mean(depths) < high
    assert max(depths) <= sweep.FARTHEST


def test_a_flat_optimum_far_above_the_lowest_rate_asks_for_no_more_below():
    far = 0
    for seed in range(100):
        losses = 0.3 + np.random.default_rng(seed).normal(0, 0.01, (3, len(KS)))
        losses[:, KS > 5] = analyze.DIVERGED
        known, _ = sweep.follow(cell_on(losses), COLUMNS, CHANCE, SEARCH)
        if sweep.optimum_and_edge(known)[0] - sweep.FARTHEST > GRID[0]:
            far += 1
            assert min(known) == GRID[0]
    assert far >= 12                # 32 ± 5


# ---- the table ----

def main():
    print("| scenario | 4 widths | 5 widths |\n|---|---|---|")
    for name, (kind, how, jitter, gap, shape, _) in SCENARIOS.items():
        found = simulate(kind, how, jitter, gap, 600, **shape)
        told = [f"{coverage:.3f} / {width:.2f}, {bias:+.2f}, {rmse:.3f}"
                for coverage, width, bias, rmse in found.values()]
        print(f"| {name} | {' | '.join(told)} |", flush=True)


if __name__ == "__main__":
    main()


def test_slopes_between_widths_and_what_the_grid_lets_them_be_known_to():
    step, widths = math.log(2) / 2, [64, 128, 512]
    points = [{"stable": np.full(3, edge - step / 2), "unstable": np.full(3, edge + step / 2)}
              for edge in (0.0, -0.5 * math.log(2), -2.5 * math.log(2))]
    local = analyze.local_slopes(widths, points)
    assert local["local_max_stable"] == pytest.approx([-0.5, -1.0])
    one = math.sqrt(2 / 12) * step / math.log(2)        # the difference of two uniform ones, over an octave
    assert local["local_resolution"] == pytest.approx([one, one / 2])
