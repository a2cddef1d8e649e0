"""Over a study: formulas, and 10,000 simulated studies for each size, coverage and power below.

Simulated are the size of McNemar's test, alone, and of Holm's correction of 15 tests; the coverage
of the intervals of paired proportions, of flips (of one seed and of three), and over seeds and
samples; the power of the smallest difference that one test, one of a corrected family, and a mean
over two tasks can show; and how often a loss at the margin, and none, pass for equivalent. The
bootstrap's coverage is in `test_compare`.
"""

import math
from collections import Counter

import numpy
import pytest
from scipy import stats

from q3q.evaluate.compare import NORMAL_95, _compare_answers, compare, mcnemar, paired_interval
from q3q.evaluate.correction import holm
from q3q.evaluate.equivalence import equivalence, p_of_interval
from q3q.evaluate.flips import Flips, flips
from q3q.evaluate.power import (
    LEVEL,
    POWER,
    effective_discordance,
    effective_questions,
    smallest_difference,
)
from q3q.evaluate.replicates import compare_replicates
from q3q.record import Comparison
from q3q.report.pairs import stratified

STUDIES = 10_000
NOISE = 4 * math.sqrt(LEVEL * (1 - LEVEL) / STUDIES)  # four standard errors of a share of 5 %


def answered(better: int, worse: int, n: int) -> Comparison:
    """Return the comparison of n answers of which two thirds of the equal ones are right."""
    both = (n - better - worse) * 2 // 3
    ours = [1.0] * (both + better) + [0.0] * (n - both - better)
    theirs = [1.0] * both + [0.0] * better + [1.0] * worse + [0.0] * (n - both - better - worse)
    sides = [{str(k): score for k, score in enumerate(side)} for side in (ours, theirs)]
    return compare("who/acc", *sides)


def test_holm_steps_down_and_leaves_a_family_of_one_alone() -> None:
    """The example of Holm's procedure: .01 * 4, .013 * 3, .02 * 2, .04 * 1, never decreasing."""
    found = holm({"a": 0.04, "b": 0.01, "c": 0.013, "d": 0.02})
    assert list(found) == ["a", "b", "c", "d"]
    assert found == pytest.approx({"a": 0.04, "b": 0.04, "c": 0.04, "d": 0.04})
    assert holm({"alone": 0.03}) == {"alone": 0.03}
    assert holm({}) == {}
    assert holm({1: 0.9, 2: 0.8}) == {1: 1.0, 2: 1.0}
    with pytest.raises(ValueError, match="between 0 and 1"):
        holm({"a": math.nan})


def test_holm_agrees_with_statsmodels() -> None:
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    p_values = numpy.random.default_rng(0).uniform(size=40) ** 3
    expected = multitest.multipletests(p_values, method="holm")[1]
    assert list(holm(dict(enumerate(p_values))).values()) == pytest.approx(list(expected))


def test_of_ten_thousand_studies_without_a_difference_five_percent_find_one() -> None:
    """All pairs of six equal methods at one width: 15 tests that share their samples."""
    dice = numpy.random.default_rng(1)
    mean_SM = dice.normal(size=(STUDIES, 6))
    first, second = numpy.triu_indices(6, k=1)
    p_SK = 2 * stats.norm.sf(abs(mean_SM[:, first] - mean_SM[:, second]) / math.sqrt(2))
    alone = float((p_SK.min(axis=1) < LEVEL).mean())
    # Holm's smallest corrected p-value is the smallest of all times their number.
    some = [min(holm(dict(enumerate(p_K))).values()) for p_K in p_SK[:100]]
    assert some == pytest.approx(list(numpy.minimum(1, 15 * p_SK[:100].min(axis=1))))
    corrected = float((15 * p_SK.min(axis=1) < LEVEL).mean())
    assert alone > 0.3
    assert 0.02 < corrected <= LEVEL + NOISE


def pairs_of(
    dice: numpy.random.Generator, n: int, discordance: float, difference: float = 0.0
) -> list[tuple[int, int]]:
    """Draw how many of n answers got better, and how many worse, in each of many studies."""
    shares = [(discordance + difference) / 2, (discordance - difference) / 2, 1 - discordance]
    better_S, worse_S, _ = dice.multinomial(n, shares, size=STUDIES).T.tolist()
    return list(zip(better_S, worse_S, strict=True))


def p_values_of(pairs: list[tuple[int, int]]) -> numpy.typing.NDArray[numpy.float64]:
    """Return McNemar's p-value of each study."""
    of_pair = {pair: mcnemar(*pair)[0] for pair in set(pairs)}
    return numpy.array([of_pair[pair] for pair in pairs])


@pytest.mark.parametrize(
    ("n", "discordance", "least"),
    [(50, 0.1, 0.0), (200, 0.1, 0.02), (1000, 0.1, 0.03), (4000, 0.4, 0.04)],
)
def test_without_a_difference_mcnemar_finds_one_in_at_most_five_percent(
    n: int, discordance: float, least: float
) -> None:
    """The fewer answers flip, the further below: five flips cannot reach 5 % at all."""
    p_S = p_values_of(pairs_of(numpy.random.default_rng(9), n, discordance))
    assert least < (p_S < LEVEL).mean() < LEVEL + NOISE


@pytest.mark.parametrize(
    ("n", "better", "worse", "both"),
    [(30, 0.1, 0.2, 0.6), (100, 0.02, 0.08, 0.6), (400, 0.05, 0.05, 0.85), (400, 0.0, 0.03, 0.9)],
)
def test_newcombes_interval_covers_the_difference_in_95_percent(
    n: int, better: float, worse: float, both: float
) -> None:
    dice = numpy.random.default_rng(10)
    shares = [both, better, worse, 1 - both - better - worse]
    tables = Counter(map(tuple, dice.multinomial(n, shares, size=STUDIES).tolist()))
    missed = 0
    for table, times in tables.items():
        low, high = paired_interval(*table)
        missed += times * (not low <= better - worse <= high)
    assert 0.02 < missed / STUDIES < LEVEL + NOISE


def missed_by_flips(flips_S: list[int], n: int, questions: int, truth: float) -> float:
    """Return the share of studies whose interval of flips is beside the true share."""
    missed = 0
    for flipped, times in Counter(flips_S).items():
        low, high = Flips(flipped, 0, n, n).interval(questions)
        missed += times * (not low <= truth <= high)
    return missed / STUDIES


@pytest.mark.parametrize(
    ("n", "share", "most"),
    [(100, 0.2, 0.065), (400, 0.05, LEVEL + NOISE), (1000, 0.1, LEVEL + NOISE), (100, 0.01, 0.09)],
)
def test_the_interval_of_flips_covers_their_share_in_95_percent(
    n: int, share: float, most: float
) -> None:
    """Wilson's comes near 5 % only on average: whole counts make it miss more or less often.

    Where one answer flips on average, 8 % of studies have three or more, and all of them miss it.
    """
    flips_S = numpy.random.default_rng(11).binomial(n, share, size=STUDIES).tolist()
    assert 0.03 < missed_by_flips(flips_S, n, n, share) < most


def test_the_interval_of_flips_over_seeds_counts_each_question_once() -> None:
    """Of the flips, four in five are of questions that flip with every seed."""
    dice, n, share = numpy.random.default_rng(12), 400, 0.1
    always_S = dice.binomial(n, 0.8 * share, size=STUDIES)
    often = 0.2 * share / (1 - 0.8 * share)
    flips_S = (3 * always_S + dice.binomial(3 * (n - always_S), often)).tolist()
    assert missed_by_flips(flips_S, 3 * n, n, share) < LEVEL + NOISE
    assert missed_by_flips(flips_S, 3 * n, 3 * n, share) > 3 * LEVEL


@pytest.mark.parametrize("tests", [1, 9])
@pytest.mark.parametrize(("n", "discordance"), [(400, 0.2), (1000, 0.1), (4000, 0.05)])
def test_the_smallest_difference_is_found_four_times_in_five(
    n: int, discordance: float, tests: int
) -> None:
    """By one test at 5 %, or by the smallest of nine p-values at the level that Holm gives it."""
    d = smallest_difference(n, discordance, level=LEVEL / tests)
    assert d is not None
    p_S = p_values_of(pairs_of(numpy.random.default_rng(2), n, discordance, d))
    # The continuity correction costs a little of the formula's power.
    assert POWER - 0.04 < (p_S < LEVEL / tests).mean() < POWER + 0.02


def test_among_nine_changes_holm_finds_the_only_one_as_often_as_its_level_says() -> None:
    dice = numpy.random.default_rng(13)
    d = smallest_difference(1000, 0.1, level=LEVEL / 9)
    assert d is not None
    p_S = p_values_of(pairs_of(dice, 1000, 0.1, d))
    others_SK = dice.uniform(size=(STUDIES, 8))

    def found(study: int) -> bool:
        family = [p_S[study], *others_SK[study].tolist()]
        return holm(dict(enumerate(family)))[0] < LEVEL

    alone = numpy.flatnonzero(p_S < LEVEL / 9).tolist()
    assert all(found(study) for study in alone[:200])
    # Here it depends on the others.
    between = numpy.flatnonzero((p_S >= LEVEL / 9) & (p_S < LEVEL)).tolist()
    late = sum(found(study) for study in between)
    assert late > 0
    assert POWER - 0.04 < (len(alone) + late) / STUDIES < POWER + 0.02


def compared(better: int, worse: int, n: int) -> Comparison:
    """Return what `answered` does, for many tables."""
    both = (n - better - worse) * 2 // 3
    counts = (both, better, worse, n - both - better - worse)
    right = ([1, 1, 0, 0], [1, 0, 1, 0])
    sides = (numpy.repeat(numpy.array(side, bool), counts) for side in right)
    return _compare_answers("who/acc", *sides)


def test_a_mean_over_two_unequal_tasks_shows_what_its_effective_questions_say() -> None:
    """A task of 100 questions, of which 30 % flip, and one of 1,000, of which 10 % do."""
    dice, counts, shares = numpy.random.default_rng(14), (100, 1000), (0.3, 0.1)
    questions, discordance = effective_questions(counts), effective_discordance(shares, counts)
    d = smallest_difference(questions, discordance)
    assert d is not None
    for truth, least, most in ((0.0, 0.03, LEVEL + NOISE), (d, POWER - 0.04, POWER + 0.03)):
        tasks, ends = list[list[Comparison]](), []
        for n, share in zip(counts, shares, strict=True):
            pair_UK, of_study_S = numpy.unique(
                pairs_of(dice, n, share, truth), axis=0, return_inverse=True
            )
            own = [compared(better, worse, n) for better, worse in pair_UK.tolist()]
            ends.append(numpy.array([(c.difference, c.low, c.high) for c in own])[of_study_S])
            tasks.append([own[table] for table in of_study_S[:50]])
        ends_KS3 = numpy.array(ends)
        mean_S = ends_KS3[:, :, 0].mean(axis=0)
        reach_2S = numpy.hypot(*(ends_KS3[:, :, 1:] - ends_KS3[:, :, :1])).T / len(counts)
        p_S = 2 * stats.norm.sf(abs(mean_S) * NORMAL_95 / numpy.where(mean_S > 0, *reach_2S))
        assert least < (p_S < LEVEL).mean() < most
        missed_S = (truth < mean_S - reach_2S[0]) | (truth > mean_S + reach_2S[1])
        assert missed_S.mean() < LEVEL + NOISE
        parts_of = zip(*tasks, strict=True)
        for parts, p, mean in zip(parts_of, p_S[:50], mean_S[:50], strict=True):
            found = stratified(parts)
            assert found is not None
            assert (found.difference, found.p_value) == pytest.approx((mean, min(1, p)))
        assert mean_S.var() == pytest.approx((discordance - truth**2) / questions, rel=0.06)


def test_a_suite_too_small_for_any_difference_says_so() -> None:
    assert [smallest_difference(n, 0.1) for n in (1, 2, 3, 20)] == [None] * 4
    assert smallest_difference(2, 0.0) is None
    for n, discordance in ((0, 0.1), (100, 1.1)):
        with pytest.raises(ValueError, match="impossible"):
            smallest_difference(n, discordance)


def test_several_tasks_tell_as_much_as_all_their_questions_where_they_are_alike() -> None:
    assert effective_questions([200] * 4) == pytest.approx(800)
    assert effective_questions([100]) == 100
    assert effective_questions([10, 1000]) < 40 + 1  # the small task decides
    assert effective_discordance([0.1, 0.3], [200, 200]) == pytest.approx(0.2)
    assert effective_discordance([0.1, 0.3], [10, 1000]) == pytest.approx(0.1, abs=0.002)


def test_flips_count_each_direction_and_their_share_among_right_answers() -> None:
    baseline = dict(zip("abcdefgh", (1, 1, 1, 1, 0, 0, 0, 0), strict=True))
    ours = dict(zip("abcdefgh", (1, 1, 1, 0, 1, 1, 0, 0), strict=True))
    found = flips(ours, baseline)
    assert found == Flips(lost=1, won=2, right=4, n=8)
    assert (found.share, found.lost_of_right) == (3 / 8, 1 / 4)
    low, high = found.interval(found.n)
    assert low < 3 / 8 < high
    assert found + found == Flips(2, 4, 8, 16)
    assert Flips(0, 0, 0, 5).lost_of_right is None
    assert flips({"a": 0.5}, {"a": 1.0}) is None
    assert flips({"a": 1.0}, {"b": 1.0}) is None


def test_equivalence_needs_a_paired_interval_and_a_margin_above_zero() -> None:
    found = answered(8, 10, 1000)
    assert (equivalence(found, 0.02) or 0.0) < LEVEL < (equivalence(found, 0.005) or 0.0)
    bare = Comparison(
        metric="m", difference=0.0, low=None, high=None, distinguishable=False, p_value=None, n=3,
        test="none",
    )  # fmt: skip
    assert equivalence(bare, 0.1) is None
    for margin in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="above zero"):
            equivalence(found, margin)


def test_equivalence_of_losses_agrees_with_two_t_tests_of_scipy() -> None:
    dice = numpy.random.default_rng(3)
    for centre in (0.0, 0.01, 0.02):
        ours_N, theirs_N = dice.normal(centre, 0.1, 400), numpy.zeros(400)
        sides = [{str(k): float(x) for k, x in enumerate(side)} for side in (ours_N, theirs_N)]
        found = equivalence(compare("perplexity/x", *sides, ratio=True), 0.03)
        above = stats.ttest_1samp(ours_N, -0.03, alternative="greater").pvalue
        below = stats.ttest_1samp(ours_N, 0.03, alternative="less").pvalue
        assert found == pytest.approx(max(above, below), rel=0.25, abs=1e-3)


def test_equivalence_over_seeds_is_two_t_tests_of_the_seeds() -> None:
    """Samples that all differ by the same leave three seeds, whose tails are long."""
    loss_S, question_N = numpy.array([0.011, 0.012, 0.013]), numpy.linspace(1, 2, 50)
    found = compare_replicates("m", [loss_S[:, None] + question_N], [question_N[None]])
    for margin in (0.02, 0.03, 0.05):
        above = stats.ttest_1samp(loss_S, -margin, alternative="greater").pvalue
        below = stats.ttest_1samp(loss_S, margin, alternative="less").pvalue
        assert equivalence(found, margin) == pytest.approx(max(above, below))
    equal = [numpy.ones((3, 10))]
    assert equivalence(compare_replicates("m", equal, equal), 0.01) == 0.0


def test_ten_thousand_studies_at_the_margin_pass_for_equivalent_in_five_to_six_percent() -> None:
    """The loss is exactly the margin; then, at no loss, the test finds equivalence.

    A p-value that is read off a 95 % interval is not quite that of the 90 % interval.
    """
    dice, n, margin = numpy.random.default_rng(4), 1000, 0.03
    shares = {}
    for loss in (margin, 0.0):
        passed = 0
        for (better, worse), times in Counter(pairs_of(dice, n, 0.06, -loss)).items():
            both = (n - better - worse) * 2 // 3
            low, high = paired_interval(both, better, worse, n - both - better - worse)
            found = Comparison(
                metric="m", difference=(better - worse) / n, low=low, high=high,
                distinguishable=False, p_value=None, n=n, test="Newcombe",
            )  # fmt: skip
            p_value = equivalence(found, margin)
            passed += times * (p_value is not None and p_value < LEVEL)
        shares[loss] = passed / STUDIES
    assert 0.05 < shares[margin] < LEVEL + NOISE + 0.005
    assert shares[0.0] > 0.95


def test_the_p_value_of_an_interval_excludes_zero_when_the_interval_does() -> None:
    assert p_of_interval(0.1, 0.0, 0.3) == pytest.approx(LEVEL, abs=1e-4)
    assert p_of_interval(-0.1, -0.3, 0.0) == pytest.approx(LEVEL, abs=1e-4)
    assert p_of_interval(0.1, 0.01, 0.3) < LEVEL < p_of_interval(0.1, -0.01, 0.3)
    assert p_of_interval(0.0, -1, 1) == 1.0


def replicated(
    dice: numpy.random.Generator, seeds: int, samples: int, of_seed: float, shift: float = 0.0
) -> Comparison:
    """Compare a method of several seeds with a baseline of none, both on the same samples."""
    question_N = dice.normal(size=samples)
    ours = (
        shift
        + of_seed * dice.normal(size=(seeds, 1))
        + 0.3 * dice.normal(size=samples)
        + question_N
        + 0.1 * dice.normal(size=(seeds, samples))
    )
    return compare_replicates("m", [ours], [question_N[None]])


def test_a_single_seed_is_scipys_paired_t_test() -> None:
    dice = numpy.random.default_rng(5)
    ours_N, theirs_N = dice.normal(0.2, 1, 30), dice.normal(size=30)
    found = compare_replicates("m", [ours_N[None]], [theirs_N[None]])
    expected = stats.ttest_rel(ours_N, theirs_N)
    low, high = expected.confidence_interval()
    assert (found.p_value, found.low, found.high) == pytest.approx((expected.pvalue, low, high))


def test_seeds_without_a_spread_of_samples_are_scipys_welch_test() -> None:
    """Samples that all differ by the same leave the seeds' spread alone."""
    dice = numpy.random.default_rng(6)
    ours_S, theirs_S, question_N = dice.normal(size=4), dice.normal(size=6), dice.normal(size=50)
    found = compare_replicates(
        "m", [ours_S[:, None] + question_N], [theirs_S[:, None] + question_N]
    )
    expected = stats.ttest_ind(ours_S, theirs_S, equal_var=False)
    assert found.p_value == pytest.approx(expected.pvalue)


def test_tasks_count_alike_in_a_mean_over_seeds() -> None:
    tasks = [numpy.full((2, 10), 1.0), numpy.full((2, 1000), 0.0)]
    zeros = [numpy.zeros((1, 10)), numpy.zeros((1, 1000))]
    found = compare_replicates("accuracy", tasks, zeros)
    assert (found.difference, found.low, found.high, found.p_value) == (0.5, 0.5, 0.5, 0.0)
    assert found.n == 1010


@pytest.mark.slow
@pytest.mark.parametrize(("seeds", "of_seed"), [(3, 0.0), (3, 0.05), (5, 0.2)])
def test_intervals_over_seeds_and_samples_cover_the_truth_of_ten_thousand_studies(
    seeds: int, of_seed: float
) -> None:
    dice = numpy.random.default_rng(7)
    studies = [replicated(dice, seeds, 60, of_seed) for _ in range(STUDIES)]
    missed = sum(bool(study.distinguishable) for study in studies) / STUDIES
    # Where few seeds spread more than all samples, Satterthwaite's approximation misses 6 %.
    assert 0.01 < missed <= (LEVEL if of_seed < 0.1 else 0.06) + NOISE
    for study in studies[:99]:
        assert study.low is not None
        assert study.high is not None
        assert (study.low > 0 or study.high < 0) == study.distinguishable


def test_an_interval_over_samples_alone_misses_what_the_next_seed_brings() -> None:
    """Why both sources are needed: the mean of three draws, judged by its samples alone."""
    dice = numpy.random.default_rng(8)
    of_seeds_S1 = 0.1 * dice.normal(size=(STUDIES, 3)).mean(axis=1, keepdims=True)
    ours_SN = of_seeds_S1 + 0.3 * dice.normal(size=(STUDIES, 60))
    t_S = ours_SN.mean(axis=1) / ours_SN.std(axis=1, ddof=1) * math.sqrt(60)
    assert (2 * stats.t.sf(abs(t_S), 59) < LEVEL).mean() > 2 * LEVEL
