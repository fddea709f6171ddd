"""Optimum, edge and their intervals on simulated sweeps whose exponents are known; and that a search ends,
repeats nothing and finds what the full grid does."""
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
CHANCE = ("chance", 1.0)
SEARCH = functools.partial(sweep.next_points, low=-16, high=6, search="coarse-to-fine", extensions=6,
                           chance=9.0)


def cell_on(losses, columns=slice(None)):
    losses = losses[:, columns]
    return {"lr": 2.0 ** (KS[columns] / 2), "losses": losses, "accuracies": 0 * losses, "chance": 9.0}


def landscape(generator, optimum, edge, jitter, curvature=0.03, noise=0.01, above=None, cliff=False):
    """Losses (3, K): a parabola with its own vertex for every seed, or a fall to the edge (cliff); beyond a
    seed's own edge (spread by jitter) they diverge, or lie higher by `above`."""
    edges, noise = edge + generator.normal(0, jitter, (3, 1)), generator.normal(0, noise, (3, len(KS)))
    if cliff:
        losses = np.maximum(0.01, 0.3 - curvature * (LOG_LR - edge) + noise)
    else:
        own = optimum + generator.normal(0, 0.3, (3, 1))
        losses = 0.3 + curvature * (LOG_LR - own) ** 2 + noise
    return np.where(LOG_LR > edges, analyze.DIVERGED if above is None else losses + above, losses)


def searched(landscapes, criterion):
    """The cells that a search runs, from narrow to wide."""
    hint, cells, columns = None, [], {int(k): i for i, k in enumerate(KS)}
    for losses in landscapes:
        search = functools.partial(SEARCH, hint=hint)
        known, points = sweep.follow(cell_on(losses), columns, criterion, search)
        assert not points
        hint = sweep.optimum_and_edge(known)
        cells.append(cell_on(losses, [columns[k] for k in sorted(known)]))
    return cells


def gridded(landscapes, criterion):
    return [cell_on(losses, KS >= -28) for losses in landscapes]


def simulate(kind, how, count, jitter, gap, criterion=CHANCE, repetitions=120, **shape):
    """(coverage, mean width, bias) of the 95 % interval; the optimum lies `gap` log units below the edge."""
    generator, widths = np.random.default_rng(0), [64 * 2 ** i for i in range(count)]
    errors, sizes, covered = [], [], 0
    for _ in range(repetitions):
        truth, offset = generator.uniform(-1.2, -0.3), generator.uniform(-0.5, 0.5)
        jitters = np.geomspace(jitter[0], jitter[-1], count)
        optima = [offset + truth * math.log(width / 64) for width in widths]
        landscapes = [landscape(generator, at, at + gap, j, **shape) for at, j in zip(optima, jitters)]
        points = [analyze.points_of(cell, criterion) for cell in how(landscapes, criterion)]
        slope, (low, high), used = analyze.exponents_of(points, widths)[kind]
        assert used == count
        errors.append(slope - truth)
        sizes.append(high - low)
        covered += low <= truth <= high
    return covered / repetitions, np.mean(sizes), np.mean(errors)


SCENARIOS = {       # (kind, how, jitter of the edge, gap, shape, (width of the interval at 4 widths, at 5))
    "edge": ("max_stable", searched, [0.3], 1.5, {}, (0.70, 0.47)),
    "edge, grid": ("max_stable", gridded, [0.3], 1.5, {}, (0.70, 0.47)),
    "edge, jitter falls with width": ("max_stable", gridded, [0.6, 0.1], 1.5, {}, (0.80, 0.52)),
    "edge, best+1": ("max_stable", searched, [0.3], 5.0, dict(criterion=("best+1", 1.0), above=2.0),
                     (0.70, 0.47)),
    "sharp optimum": ("optimal", searched, [0.3], 1.5, dict(curvature=0.3), (0.70, 0.46)),
    "flat optimum": ("optimal", searched, [0.3], 3.0, dict(curvature=0.01), (0.80, 0.54)),
    "optimum at a cliff": ("optimal", searched, [0.3], 0.0, dict(curvature=0.05, cliff=True), (0.74, 0.52)),
}


@pytest.mark.parametrize("count", [4, 5])
@pytest.mark.parametrize("name", SCENARIOS)
def test_the_95_percent_intervals_cover_the_exponent_without_bias_and_are_no_wider_than_need_be(name, count):
    kind, how, jitter, gap, shape, widths = SCENARIOS[name]
    repetitions = 600 if how is gridded else 120            # a search takes longer to simulate
    coverage, width, bias = simulate(kind, how, count, jitter, gap, repetitions=repetitions, **shape)
    assert coverage >= 0.92
    assert width <= widths[count - 4]
    assert abs(bias) <= 0.05


def test_the_edge_of_the_mean_in_place_of_every_seeds_is_biased_where_their_spread_changes_with_width():
    def lowest(landscapes, criterion):          # every seed with the divergences of all
        return gridded([np.where((losses >= analyze.DIVERGED).any(0), analyze.DIVERGED, losses)
                        for losses in landscapes], criterion)

    _, _, bias = simulate("max_stable", lowest, 4, [0.6, 0.1], 1.5)
    assert bias > 0.1


def test_an_interval_that_knows_nothing_of_the_grids_step_covers_too_rarely(monkeypatch):
    plain = metrics.exponent_interval
    monkeypatch.setattr(metrics, "exponent_interval",
                        lambda *args, resolution, **kwargs: plain(*args, **kwargs))
    coverage, _, _ = simulate("max_stable", gridded, 4, [0.02], 1.5)
    assert coverage < 0.8


# ---- exact cases ----

def test_without_noise_optimum_and_edge_are_exact():
    def losses(edge):
        parabola = 0.3 + 0.1 * (LOG_LR - edge + 2) ** 2
        return np.where(LOG_LR > edge, analyze.DIVERGED, parabola)[None].repeat(3, 0)

    cells = [cell_on(losses(edge)) for edge in (0.1, 0.1 - 2 * STEP, 0.1 - 4 * STEP)]
    points = [analyze.points_of(cell, CHANCE) for cell in cells]
    fits = analyze.exponents_of(points, [64, 128, 256])
    assert fits["max_stable"][0] == pytest.approx(-1) and fits["optimal"][0] == pytest.approx(-1)
    assert points[0]["optimal"] == pytest.approx([-1.9] * 3)
    assert np.exp(points[0]["unstable"] - points[0]["stable"]) == pytest.approx([math.sqrt(2)] * 3)
    assert points[0]["stable"][0] <= 0.1 < points[0]["unstable"][0] and not points[0]["at_edge"]


def test_an_optimum_beside_a_divergence_is_the_last_stable_rate_and_says_so():
    falling = np.where(LOG_LR > 0.1, analyze.DIVERGED, 2 - 0.1 * LOG_LR)[None].repeat(2, 0)
    point = analyze.points_of(cell_on(falling), CHANCE)
    assert point["at_edge"] and point["optimal"] == pytest.approx(point["stable"])


def test_a_width_counts_where_every_seed_has_an_edge():
    values = np.log([[1.0, 0.5, np.nan, 0.125], [1.0, 0.5, 0.25, 0.125]])
    slope, interval, used = analyze.exponent_of([64, 128, 256, 512], values, np.full(4, STEP))
    assert slope == pytest.approx(-1) and used == 3 and interval[0] < -1 < interval[1]
    slope, interval, used = analyze.exponent_of([64, 128], values[:, 2:], np.full(2, STEP))
    assert math.isnan(slope) and used == 1


# ---- the search ----

def random_landscape(generator):
    optimum, gap = generator.uniform(-6, 2), generator.uniform(0, 4)
    shape = dict(curvature=10 ** generator.uniform(-3, 0), noise=10 ** generator.uniform(-3, -1),
                 above=generator.choice([None, 0.5, 20.0]), cliff=bool(generator.integers(2)))
    return landscape(generator, optimum, optimum + gap, generator.choice([0.01, 0.3, 1.0]), **shape)


def test_a_search_ends_repeats_nothing_and_brackets_every_seeds_edge_to_one_step():
    generator, columns = np.random.default_rng(1), {int(k): i for i, k in enumerate(KS)}
    lows, highs = SEARCH.keywords["low"] - 24, SEARCH.keywords["high"] + 24
    for _ in range(300):
        losses, asked = random_landscape(generator), []
        hint = None if generator.random() < 0.5 else tuple(sorted(generator.integers(-16, 7, 2).tolist()))

        def search(known, hint=hint, asked=asked):
            points = SEARCH(known, hint=hint)
            assert not points & known.keys() and len(asked) < 60
            asked.append(points)
            return points

        known, points = sweep.follow(cell_on(losses), columns, CHANCE, search)
        assert not points and all(lows <= k <= highs for k in known)
        ks, seen, stable = sweep.table_of(known)
        for edge, above in analyze.edges(seen, stable):
            assert edge is None or above is None or ks[above] - ks[edge] == 1


def test_a_search_finds_the_full_grids_optimum_and_edge_with_at_most_half_of_its_runs():
    generator, runs, grid_runs, misses = np.random.default_rng(2), 0, 0, 0
    for _ in range(40):
        optimum, widths = generator.uniform(-4, -1), range(4)
        landscapes = [landscape(generator, optimum - 0.7 * i, optimum + 1.5 - 0.7 * i, 0.3, curvature=0.1)
                      for i in widths]
        for few, all_ in zip(searched(landscapes, CHANCE), gridded(landscapes, CHANCE)):
            found, true = (analyze.points_of(cell, CHANCE) for cell in (few, all_))
            misses += abs(found["optimal"].mean() - true["optimal"].mean()) > STEP
            misses += np.abs(found["stable"] - true["stable"]).max() > 1e-9
            runs, grid_runs = runs + len(few["lr"]), grid_runs + 23
    assert misses <= 0.03 * 320 and runs <= 0.5 * grid_runs
