"""Statistics against arithmetic by hand, simulation with a known answer, and brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from rlhf_pipeline.core import stats
from rlhf_pipeline.core.stats import (
    Interval,
    difference_interval,
    distinct_2,
    fit_logistic,
    kl_k1,
    kl_k3,
    length_controlled_win_rate,
    mean_interval,
    pearson,
    prompt_means,
    repeated_sentence_share,
    sign_test,
    spearman,
    win_rate,
    win_shares,
)


def sample(seed: int, prompts: int = 100, responses: int = 4) -> np.ndarray:
    """(prompts, responses) of mean 0: responses to one prompt share three quarters of their variance."""
    generator = np.random.default_rng(seed)
    return 1.5 * generator.normal(size=(prompts, 1)) + generator.normal(size=(prompts, responses))


# Intervals


def test_a_mean_gives_every_prompt_the_same_weight() -> None:
    """Prompt means 2, 5 and 5 have mean 4; the mean of all six values would be 3.5."""
    values: list[float | list[float]] = [[1.0, 2.0, 3.0], 5.0, [4.0, 6.0]]
    assert prompt_means(values).tolist() == [2, 5, 5]
    assert mean_interval(values).mean == 4


def test_the_interval_covers_the_true_mean_about_95_times_of_100(monkeypatch: pytest.MonkeyPatch) -> None:
    """400 data sets of mean 0. Responses taken for prompts of their own would cover it far less often.

    With m = 4 responses of correlation rho = 2.25 / 3.25 the variance of the mean is 1 + (m - 1) rho = 3.1 times
    that of independent ones, so such intervals are 1.75 times too narrow: coverage P(|Z| < 1.96 / 1.75) = .74.
    """
    monkeypatch.setattr(stats, "RESAMPLES", 500)
    covered = by_response = 0
    for seed in range(400):
        values = sample(1000 + seed)
        covered += contains(mean_interval(values), 0)
        by_response += contains(mean_interval(values.ravel()), 0)
    assert 0.92 < covered / 400 < 0.975
    assert 0.69 < by_response / 400 < 0.79


def contains(interval: Interval, value: float) -> bool:
    return interval.low <= value <= interval.high


def test_an_interval_is_as_wide_as_the_normal_one_of_many_prompts() -> None:
    """10,000 standard normal values: the mean +- 1.96 / 100."""
    values = np.random.default_rng(0).normal(size=10_000)
    interval = mean_interval(values)
    assert interval.mean == pytest.approx(values.mean(), abs=1e-12)
    assert interval.high - interval.low == pytest.approx(2 * 0.0196, rel=0.05)
    narrower = mean_interval(values, confidence=0.5)
    assert narrower.high - narrower.low == pytest.approx(2 * 0.00674, rel=0.08)


def test_an_interval_depends_on_its_seed_alone() -> None:
    values = sample(1)
    assert mean_interval(values, seed=3) == mean_interval(values, seed=3)
    assert mean_interval(values, seed=3) != mean_interval(values, seed=4)


def test_pairing_takes_out_what_the_prompts_have_in_common() -> None:
    """A gain of .1 + noise of .01 on prompts that differ by units is sure when paired."""
    generator = np.random.default_rng(0)
    baseline = 5 * generator.normal(size=(100, 1))
    values = baseline + 0.1 + 0.01 * generator.normal(size=(100, 1))
    interval = difference_interval(values, baseline)
    assert interval.mean == pytest.approx(0.1, abs=0.005)
    assert 0.09 < interval.low < interval.high < 0.11


@pytest.mark.parametrize("values", [[1.0], [[1.0], []], [[1.0], [math.nan]]])
def test_too_few_prompts_empty_prompts_and_nan_have_no_interval(values: list[list[float]]) -> None:
    with pytest.raises(ValueError, match=r"at least 2 prompts|no values"):
        mean_interval(values)


def test_other_prompts_than_the_baselines_are_an_error() -> None:
    with pytest.raises(ValueError, match="3 prompts against 2"):
        difference_interval([1.0, 2.0, 3.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="3 prompts against 2"):
        win_rate([1.0, 2.0, 3.0], [1.0, 2.0])


# Wins


def test_a_win_share_counts_all_pairs_of_responses_and_ties_half() -> None:
    """[1, 2] against [1, 3]: tie, loss, win, loss, so (.5 + 0 + 1 + 0) / 4. Then a tie, then a win."""
    ours, theirs = [[1.0, 2.0], [5.0], [2.0]], [[1.0, 3.0], [5.0], [1.0]]
    assert win_shares(ours, theirs).tolist() == [3 / 8, 1 / 2, 1]
    assert win_rate(ours, theirs).mean == pytest.approx((3 / 8 + 1 / 2 + 1) / 3)


def test_a_win_rate_against_oneself_is_a_half() -> None:
    values = sample(2)
    assert win_rate(values, values) == Interval(0.5, 0.5, 0.5)


# KL


def test_k1_and_k3_of_three_prompts_by_hand() -> None:
    """log_ratios 0 and ln 2; ln 4; -ln 2.

    k1 by prompt: (ln 2) / 2, 2 ln 2, -ln 2, mean ln 2 / 2; deviations 0, 3/2, -3/2 ln 2, so the standard deviation is
    3/2 ln 2 and the standard error that over sqrt 3.
    k3 terms: 0 and 1/2 - 1 + ln 2; 1/4 - 1 + 2 ln 2; 2 - 1 - ln 2. Prompt means ln 2 / 2 - 1/4, 2 ln 2 - 3/4, 1 - ln 2
    sum to 3/2 ln 2.
    """
    ln2 = math.log(2)
    log_ratios = [[0.0, ln2], [2 * ln2], [-ln2]]
    k1, k3 = kl_k1(log_ratios), kl_k3(log_ratios)
    assert (k1.estimator, k3.estimator) == ("k1", "k3")
    assert k1.value == pytest.approx(ln2 / 2)
    assert k1.standard_error == pytest.approx(1.5 * ln2 / math.sqrt(3))
    assert k3.value == pytest.approx(ln2 / 2)


def test_both_estimators_find_the_kl_of_two_gaussians() -> None:
    """KL(N(.3, 1) || N(0, 1)) = .045; log_ratio .3 x - .045. k3 is the surer one of so near a pair."""
    x = np.random.default_rng(0).normal(0.3, 1, size=20_000)
    log_ratios = 0.3 * x - 0.045
    k1, k3 = kl_k1(log_ratios), kl_k3(log_ratios)
    assert k1.value == pytest.approx(0.045, abs=4 * k1.standard_error)
    assert k3.value == pytest.approx(0.045, abs=4 * k3.standard_error)
    assert k3.standard_error < k1.standard_error / 3
    assert k1.standard_error == pytest.approx(0.3 / math.sqrt(20_000), rel=0.05)


# Sign test and correlations


@pytest.mark.parametrize(("wins", "losses"), [(5, 0), (0, 5), (7, 2), (6, 6), (3, 4), (0, 0)])
def test_the_sign_test_counts_outcomes_at_least_as_uneven(wins: int, losses: int) -> None:
    n = wins + losses
    outcomes = [sum(outcome) for outcome in itertools.product((0, 1), repeat=n)]
    as_uneven = sum(abs(2 * heads - n) >= abs(wins - losses) for heads in outcomes)
    assert sign_test(wins, losses) == as_uneven / 2**n


def test_the_sign_test_is_exact_for_many_prompts() -> None:
    """60,000 prompts: near the normal tail with continuity correction, P(|Z| > (300 - 1) / sqrt 60000)."""
    p = sign_test(30_150, 29_850)
    assert p == pytest.approx(math.erfc(299 / math.sqrt(60_000) / math.sqrt(2)), rel=1e-3)
    assert sign_test(60_000, 0) == 0.0


def test_pearson_by_hand() -> None:
    """x - 2 = -1 0 1 and y - 3 = -2 1 1: 3 / sqrt(2 * 6) = sqrt(3) / 2."""
    assert pearson([1, 2, 3], [1, 4, 4]) == pytest.approx(math.sqrt(3) / 2)
    assert pearson([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert math.isnan(pearson([0.1, 0.1, 0.1], [1, 2, 3]))


def test_spearman_is_of_ranks_with_ties_sharing_theirs() -> None:
    """Ranks 1 2.5 2.5 4 and 1 2 3 4: centred -1.5 0 0 1.5 and -1.5 -.5 .5 1.5: 4.5 / sqrt(4.5 * 5)."""
    assert spearman([10, 20, 20, 1000], [0.1, 0.2, 0.3, 0.4]) == pytest.approx(4.5 / math.sqrt(22.5))
    assert spearman([1, 2, 3, 4], [1, 10, 100, 1000]) == pytest.approx(1)


# Text


def test_distinct_2_counts_each_bigram_once() -> None:
    """(a b) (b a) (a b) and (a b): 2 of 4 differ. Bigrams do not reach over the end of a response."""
    assert distinct_2([["a", "b", "a", "b"], ["a", "b"]]) == 2 / 4
    assert distinct_2([[1, 2], [3, 4]]) == 1
    assert distinct_2([[7], []]) == 1


def test_sentences_repeat_within_a_text_only() -> None:
    """One of five sentences: 3.5 does not end one, case and spaces make no difference, the second text is another."""
    texts = ["It is 3.5 km. Go on!  go   ON! Fine", "Fine"]
    assert repeated_sentence_share(texts) == 1 / 5
    assert repeated_sentence_share(["好。好。坏！"]) == 1 / 3
    assert repeated_sentence_share(["", " \n"]) == 0


# Length control


def judged(seed: int, n: int, skill: float, slope: float) -> tuple[np.ndarray, np.ndarray]:
    """(n,) outcomes of a judge who follows the model, and length differences in characters."""
    generator = np.random.default_rng(seed)
    differences = generator.normal(200, 300, size=n)
    logits = skill + slope * np.tanh(differences / differences.std(ddof=1))
    return (generator.random(n) < 1 / (1 + np.exp(-logits))).astype(float), differences


def test_length_control_takes_the_bonus_for_length_off_the_win_rate() -> None:
    """Skill 0 is a win rate of a half at equal length, whatever length brought."""
    preferences, differences = judged(0, 4000, skill=0.0, slope=2.0)
    assert preferences.mean() > 0.6
    interval = length_controlled_win_rate(preferences, differences)
    assert interval.low < 0.5 < interval.high
    assert interval.mean == pytest.approx(0.5, abs=0.04)
    assert interval.high - interval.low < 0.08


def test_equal_lengths_leave_the_plain_win_rate() -> None:
    """RIDGE pulls the logit of 100 outcomes by less than 1e-4."""
    preferences = np.repeat([1.0, 0.5, 0.0], [60, 20, 20])
    interval = length_controlled_win_rate(preferences, np.full(100, 37))
    assert interval.mean == pytest.approx(0.7, abs=1e-4)


def test_a_judge_who_only_looks_at_length_still_gives_a_win_rate() -> None:
    """Longer always wins, so the features separate the outcomes; symmetric lengths leave skill at 0."""
    differences = np.arange(-50, 51) * 10.0
    preferences = (np.sign(differences) + 1) / 2
    assert length_controlled_win_rate(preferences, differences).mean == pytest.approx(0.5, abs=1e-6)
    assert length_controlled_win_rate(np.ones(50), np.arange(50)).mean > 0.99


def test_logistic_weights_are_the_optimum_found_by_brute_force() -> None:
    """A grid of half a million weights, refined around its best, on soft labels."""
    generator = np.random.default_rng(5)
    features = np.stack([np.ones(60), generator.uniform(-1, 1, 60)], axis=1)
    targets = generator.random(60)
    center, width = np.zeros(2), 4.0
    for _ in range(12):
        axis = np.linspace(-width, width, 201)
        grid = center + np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
        logits = grid @ features.T
        likelihood = (np.logaddexp(0, logits) - targets * logits).sum(1)
        center, width = grid[np.argmin(likelihood + stats.RIDGE / 2 * (grid**2).sum(1))], width / 8
    np.testing.assert_allclose(fit_logistic(features, targets), center, atol=1e-6)


def test_logistic_weights_are_found_where_plain_newton_steps_circle() -> None:
    """An outlier of -1000 makes full Newton steps jump to and fro; the optimum has a gradient of 0."""
    features = np.stack([np.ones(42), np.array([-1000.0, 1.0] + [0.0] * 40)], axis=1)
    targets = np.array([1.0, 0.0] + [1.0] * 40)
    weights = fit_logistic(features, targets)
    predicted = (1 + np.tanh(features @ weights / 2)) / 2
    np.testing.assert_allclose(features.T @ (predicted - targets) + stats.RIDGE * weights, 0, atol=1e-6)


def test_preferences_without_their_lengths_are_an_error() -> None:
    with pytest.raises(ValueError, match="3 preferences and 2"):
        length_controlled_win_rate([1, 0, 1], [3, 4])
    with pytest.raises(ValueError, match="nan"):
        length_controlled_win_rate([1, math.nan], [3, 4])


def test_a_share_has_wilsons_interval() -> None:
    """8 of 10: (p + z2/20 -+ z sqrt(p q / 10 + z2/400)) / (1 + z2/10) with z2 = 3.8415 is 0.4902 to 0.9433, the
    textbook's numbers. 10 of 10 leaves room for errors: the lower bound is 1 / (1 + z2/10) = 0.7225."""
    found = stats.share_interval([1] * 8 + [0] * 2, range(10))
    assert (found.mean, found.low, found.high) == pytest.approx((0.8, 0.4902, 0.9433), abs=1e-4)
    sure = stats.share_interval([1] * 10, range(10))
    assert (sure.mean, sure.low, sure.high) == pytest.approx((1.0, 0.7225, 1.0), abs=1e-4)


def test_outcomes_of_one_group_that_agree_count_as_one() -> None:
    """Ten prompts with four equal outcomes each are ten outcomes, but for the factor 10 / 9 of a sample's variance."""
    outcomes, groups = [1] * 32 + [0] * 8, [k // 4 for k in range(40)]
    found, ten = stats.share_interval(outcomes, groups), stats.share_interval([1] * 8 + [0] * 2, range(10))
    assert found.mean == 0.8
    assert (found.low, found.high) == pytest.approx((ten.low, ten.high), abs=0.02)
    assert stats.share_interval(outcomes, range(40)).low > found.low + 0.1


def test_weights_move_a_share() -> None:
    """Right with weight 3, wrong with weight 1: 3/4."""
    assert stats.share_interval([1, 0], [0, 1], [3, 1]).mean == 0.75
    with pytest.raises(ValueError, match="no outcomes"):
        stats.share_interval([], [])
