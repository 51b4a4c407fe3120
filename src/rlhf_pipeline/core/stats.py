"""What a table of results says and how sure it is of it; numpy only.

Responses to one prompt are alike, so whatever has an uncertainty takes its values by prompt (for each prompt a
number or a sequence of them, or an array (prompts, responses)) and treats the prompts as the sample: every prompt
counts the same, and intervals come from resampling prompts. A value that is nan raises ValueError.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
ByPrompt = Sequence[float | Sequence[float] | Floats] | Floats

RESAMPLES = 2000
DRAWN_AT_ONCE = 1_000_000
"""Row indices of the resamples that are in memory together."""
RIDGE = 1e-3


@dataclass(frozen=True)
class Interval:
    """A mean, or another estimate, and the bounds of its confidence interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Estimate:
    """An estimate, by which estimator, and its standard error over prompts."""

    estimator: str
    value: float
    standard_error: float


# Means and differences


def prompt_means(values: ByPrompt) -> Floats:
    """(prompts,) the mean of each prompt's values. Raises ValueError for a prompt without values or with nan."""
    rows = [np.atleast_1d(np.asarray(of_prompt, np.float64)) for of_prompt in values]
    if any(row.size == 0 or np.isnan(row).any() for row in rows):
        raise ValueError("a prompt has no values, or nan among them")
    return np.array([row.mean() for row in rows])


def mean_interval(values: ByPrompt, *, confidence: float = 0.95, seed: int = 0) -> Interval:
    """The mean over prompts with a bootstrap interval: prompts resampled, percentiles.

    Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13. Raises ValueError for fewer than two
    prompts, which do not show their spread.
    """
    means = prompt_means(values)
    return _bootstrap(lambda rows: means[rows].mean(axis=-1), len(means), confidence, seed)


def difference_interval(values: ByPrompt, baseline: ByPrompt, *, confidence: float = 0.95, seed: int = 0) -> Interval:
    """The mean of values minus baseline, paired: prompt i of both is the same prompt, drawn for both or neither."""
    _check_same_prompts(values, baseline)
    return mean_interval(prompt_means(values) - prompt_means(baseline), confidence=confidence, seed=seed)


def win_rate(values: ByPrompt, baseline: ByPrompt, *, confidence: float = 0.95, seed: int = 0) -> Interval:
    """How often a response beats the baseline's to the same prompt, from 0 to 1; a tie counts half."""
    return mean_interval(win_shares(values, baseline), confidence=confidence, seed=seed)


def win_shares(values: ByPrompt, baseline: ByPrompt) -> Floats:
    """(prompts,) the share of each prompt's pairs (response, baseline response) that the response wins; ties half."""
    _check_same_prompts(values, baseline)
    margins = [np.subtract.outer(ours, theirs) for ours, theirs in zip(values, baseline, strict=True)]
    return prompt_means([(np.sign(margin).ravel() + 1) / 2 for margin in margins])


def _check_same_prompts(values: ByPrompt, baseline: ByPrompt) -> None:
    if len(values) != len(baseline):
        raise ValueError(f"{len(values)} prompts against {len(baseline)} of the baseline")


def _bootstrap(
    statistic: Callable[[npt.NDArray[np.int64]], npt.ArrayLike], size: int, confidence: float, seed: int
) -> Interval:
    """`statistic` of rows 0 to size - 1, and percentiles of what it gives for rows drawn with replacement.

    statistic: of row indices (..., size) gives (...).
    """
    if size < 2:
        raise ValueError(f"an interval needs at least 2 prompts, not {size}")
    generator = np.random.default_rng(seed)
    at_once = max(1, DRAWN_AT_ONCE // size)
    counts = [min(at_once, RESAMPLES - start) for start in range(0, RESAMPLES, at_once)]
    drawn = np.concatenate([statistic(generator.integers(size, size=(count, size))) for count in counts])
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(np.asarray(statistic(np.arange(size)))), float(low), float(high))


# Shares


def share_interval(
    outcomes: npt.ArrayLike, groups: npt.ArrayLike, weights: npt.ArrayLike | None = None, *, confidence: float = 0.95
) -> Interval:
    """The weighted mean of (n,) outcomes from 0 to 1, such as right or wrong, with an interval that fits into 0 to 1.

    groups (n,): outcomes of one group, such as the pairs of one prompt, are alike. Wilson's interval (1927) for as many
    independent outcomes as have the variance found between groups, at most n; after Dean and Pagano 2015, "Evaluating
    Confidence Interval Methods for Binomial Proportions in Clustered Surveys". Unlike a bootstrap it does not shrink
    to a point where all outcomes are right. Raises ValueError for none.
    """
    x = np.asarray(outcomes, np.float64)
    w = np.ones_like(x) if weights is None else np.asarray(weights, np.float64)
    if x.size == 0:
        raise ValueError("a share of no outcomes")
    p = float(w @ x / w.sum())
    _, group = np.unique(np.asarray(groups), return_inverse=True)
    count = int(group.max()) + 1
    deviations = np.bincount(group, w * (x - p)) / w.sum()
    variance = float(deviations @ deviations) * count / max(count - 1, 1) * (x.size - 1) / x.size
    sizes = np.bincount(group, w)
    independent = p * (1 - p) / variance if variance > 0 else float(sizes.sum() ** 2 / (sizes @ sizes))
    n = min(independent, x.size)
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return Interval(p, max(0.0, middle - half), min(1.0, middle + half))


# Distance from the reference


def kl_k1(log_ratios: ByPrompt) -> Estimate:
    """KL(policy || reference), nats per response: the mean log_ratio of responses sampled from the policy.

    k1 of Schulman 2020, "Approximating KL Divergence": unbiased; by chance it can be negative.
    """
    return _estimate("k1", prompt_means(log_ratios))


def kl_k3(log_ratios: ByPrompt) -> Estimate:
    """KL(policy || reference), nats per response: the mean of exp(-log_ratio) - 1 + log_ratio, never negative.

    k3 of Schulman 2020, "Approximating KL Divergence": unbiased, and steadier than k1 while log_ratios are well below
    1 nat. Where whole responses differ by several nats it hangs on the rare ones with a strongly negative log_ratio,
    and a sample without them gives too little: read it beside k1 and both standard errors.
    """
    ratios = [np.asarray(of_prompt, np.float64) for of_prompt in log_ratios]
    return _estimate("k3", prompt_means([np.expm1(-ratio) + ratio for ratio in ratios]))


def _estimate(estimator: str, means: Floats) -> Estimate:
    if len(means) < 2:
        raise ValueError(f"a standard error needs at least 2 prompts, not {len(means)}")
    return Estimate(estimator, float(means.mean()), float(means.std(ddof=1) / math.sqrt(len(means))))


# Tests and correlations


def sign_test(wins: int, losses: int) -> float:
    """Two-sided p-value of so many wins and losses, ties left out, if each were the toss of a fair coin.

    Exact: the share of the 2^n outcomes that are split at least as unevenly (Dixon and Mood 1946).
    """
    total = wins + losses
    ways, tail = 1, 0
    for k in range(min(wins, losses) + 1):
        tail += ways
        ways = ways * (total - k) // (k + 1)
    return min(1.0, 2 * tail / 2**total)


def pearson(x: npt.ArrayLike, y: npt.ArrayLike) -> float:
    """Linear correlation of two (n,), from -1 to 1; nan, as it is undefined, where one of them is constant."""
    a, b = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if a.min() == a.max() or b.min() == b.max():
        return math.nan
    a, b = a - a.mean(), b - b.mean()
    return float(a @ b / math.sqrt((a @ a) * (b @ b)))


def spearman(x: npt.ArrayLike, y: npt.ArrayLike) -> float:
    """Correlation of the ranks of two (n,); equal values share the mean of their ranks."""
    return pearson(_ranks(x), _ranks(y))


def _ranks(values: npt.ArrayLike) -> Floats:
    _, inverse, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


# Text


def distinct_2(responses: Iterable[Sequence[Hashable]]) -> float:
    """Different bigrams divided by all bigrams of the responses, of tokens or words; 1 if none occurs twice.

    After Li et al. 2016 (arXiv 1510.03055), who divide by the number of tokens. It falls as the text grows: compare
    equally many responses of similar length.
    """
    seen: set[tuple[Hashable, Hashable]] = set()
    total = 0
    for response in responses:
        seen.update(pairwise(response))
        total += max(0, len(response) - 1)
    return len(seen) / total if total else 1.0


def repeated_sentence_share(texts: Iterable[str]) -> float:
    """Share of the sentences that stood before in their text, but for case and spaces; 0 where there are none."""
    repeated = total = 0
    for text in texts:
        pieces = (" ".join(piece.casefold().split()) for piece in re.split(r"[.!?]+(?:\s|$)|[。！？\n]+", text))
        sentences = [piece for piece in pieces if piece]
        total += len(sentences)
        repeated += len(sentences) - len(set(sentences))
    return repeated / total if total else 0.0


# Win rate without the help of length


def length_controlled_win_rate(
    preferences: npt.ArrayLike, length_differences: npt.ArrayLike, *, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """The win rate that a logistic regression gives responses as long as the baseline's.

    preferences (n,): the probability or outcome, 0 to 1, that the response beats the baseline's, one per prompt.
    length_differences (n,): length of the response minus the baseline's; AlpacaEval counts characters.

    A preference is modelled as sigmoid(skill + slope * tanh(difference / standard deviation of the differences)), the
    result is sigmoid(skill). Dubois et al. 2024 (Length-Controlled AlpacaEval, arXiv 2404.04475), section 3, less the
    term for an instruction's difficulty, which exists for AlpacaEval's own prompts only, and by maximum likelihood
    instead of its cross-validated L1 penalty. Where all differences are equal it is the plain win rate.
    """
    targets, differences = np.asarray(preferences, np.float64), np.asarray(length_differences, np.float64)
    if len(targets) != len(differences) or np.isnan(targets).any() or np.isnan(differences).any():
        raise ValueError(f"{len(targets)} preferences and {len(differences)} length differences, or nan among them")
    columns = [np.ones_like(targets)]
    if differences.min() < differences.max():
        columns.append(np.tanh(differences / differences.std(ddof=1)))
    features = np.stack(columns, axis=1)

    whole = fit_logistic(features, targets)

    def at_equal_length(rows: npt.NDArray[np.int64]) -> Floats:
        samples = rows.reshape(-1, rows.shape[-1])
        skills = [fit_logistic(features[sample], targets[sample], start=whole)[0] for sample in samples]
        return _sigmoid(skills).reshape(rows.shape[:-1])

    return _bootstrap(at_equal_length, len(targets), confidence, seed)


def fit_logistic(features: Floats, targets: Floats, *, start: Floats | None = None) -> Floats:
    """(k,) weights of the likeliest logistic model of targets (n,), 0 to 1, given features (n, k); by Newton's method.

    The penalty RIDGE / 2 * |weights|^2 keeps them finite where the features separate the targets. `start`: where to
    begin; the objective is convex, so it decides nothing but the time.
    """

    def objective(weights: Floats) -> float:
        logits = features @ weights
        return float((np.logaddexp(0, logits) - targets * logits).sum() + RIDGE / 2 * weights @ weights)

    weights = np.zeros(features.shape[1]) if start is None else start
    while True:
        predicted = _sigmoid(features @ weights)
        gradient = features.T @ (predicted - targets) + RIDGE * weights
        curvature = (features.T * (predicted * (1 - predicted))) @ features + RIDGE * np.eye(len(weights))
        step = np.linalg.solve(curvature, gradient)
        while objective(weights - step) > objective(weights):  # the logistic is flat far out: Newton oversteps there
            step /= 2
        weights = weights - step
        if np.abs(step).max() < 1e-9:
            return weights


def _sigmoid(x: npt.ArrayLike) -> Floats:
    return 0.5 * (1 + np.tanh(0.5 * np.asarray(x, np.float64)))
