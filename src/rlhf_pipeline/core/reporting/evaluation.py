"""From the responses of several policies and their rewards to the numbers that say which policy is better.

The first policy is the baseline. Every policy has answered the same prompts; a prompt that one of them could not
answer is left out of all, and out of the numbers of a reward model that gave none of a policy's responses to it a
reward. Numbers with an uncertainty treat the prompts as the sample (core/stats.py).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rlhf_pipeline.core import schema, stats, storage
from rlhf_pipeline.core.command import BadUse, WorkFailed

Floats = npt.NDArray[np.float64]

RESPONSES = "responses"
LOG_PROBS = "log_probs"
RESULTS = "results.json"
ENSEMBLE = "ensemble"
FEWEST_PROMPTS = 2
"""A single prompt shows no spread."""


@dataclass(frozen=True)
class Answers:
    """P prompts, a policy's N responses to each, and what is known of these."""

    policy: str
    prompt_ids: tuple[str, ...]
    prompts: tuple[Any, ...]
    categories: tuple[str | None, ...]
    texts: tuple[tuple[str, ...], ...]
    """(P, N)"""
    lengths: Floats
    """(P, N) tokens"""
    truncated: npt.NDArray[np.bool_]
    """(P, N)"""
    rewards: dict[str, Floats]
    """{reward model: (P, N)}, nan where it gave none"""
    log_ratios: Floats | None
    """(P, N) nats: log-prob under the policy minus log-prob under the baseline"""

    def take(self, rows: Sequence[int]) -> Answers:
        """Those of some prompts, in the order of `rows`."""
        index = list(rows)
        return dataclasses.replace(
            self,
            prompt_ids=tuple(self.prompt_ids[i] for i in index),
            prompts=tuple(self.prompts[i] for i in index),
            categories=tuple(self.categories[i] for i in index),
            texts=tuple(self.texts[i] for i in index),
            lengths=self.lengths[index],
            truncated=self.truncated[index],
            rewards={name: values[index] for name, values in self.rewards.items()},
            log_ratios=None if self.log_ratios is None else self.log_ratios[index],
        )


# Reading


def log_prob(i: int) -> str:
    return f"response_{i}_logp"


def start_log_prob(i: int) -> str:
    return f"response_{i}_start_logp"


def read_answers(folder: Path, policy: str, reward_models: Sequence[str]) -> Answers:
    """What an evaluation folder holds of one policy: <folder>/<policy>/{responses, <reward model>, log_probs}."""
    home = folder / policy
    source = open_part(home / RESPONSES)
    count = schema.count_responses(source.columns)
    rows = list(source.rows())
    logs = open_part(home / LOG_PROBS) if (home / LOG_PROBS).is_dir() else None
    return Answers(
        policy=policy,
        prompt_ids=tuple(row[schema.PROMPT_ID] for row in rows),
        prompts=tuple(row[schema.PROMPT] for row in rows),
        categories=tuple(None if (name := row.get(schema.CATEGORY)) is None else str(name) for row in rows),
        texts=tuple(tuple(row[schema.response(i)] for i in range(count)) for row in rows),
        lengths=np.array([[len(row[schema.response_tokens(i)]) for i in range(count)] for row in rows], np.float64),
        truncated=np.array([[row[schema.response_finish_reason(i)] == "length" for i in range(count)] for row in rows]),
        rewards={name: read_numbers(open_part(home / name), schema.response_reward, count) for name in reward_models},
        log_ratios=None
        if logs is None
        else read_numbers(logs, log_prob, count) - read_numbers(logs, start_log_prob, count),
    )


def open_part(folder: Path) -> storage.Source:
    return storage.open_source(str(folder.resolve()), flag="--output")


def read_numbers(source: storage.Source, column: Any, count: int) -> Floats:
    """(P, N) of the columns column(0), column(1), ...; null as nan."""
    names = [column(i) for i in range(count)]
    return np.array([[row[name] for name in names] for row in source.rows(names)], np.float64)


def align(answers: Sequence[Answers]) -> list[Answers]:
    """The answers to the prompts that every policy has answered, in the baseline's order."""
    places = [{prompt_id: row for row, prompt_id in enumerate(item.prompt_ids)} for item in answers]
    shared = [prompt_id for prompt_id in answers[0].prompt_ids if all(prompt_id in place for place in places)]
    if len(shared) < FEWEST_PROMPTS:
        raise BadUse(
            f"{len(shared)} prompts were answered by every policy; at least {FEWEST_PROMPTS} are needed to compare "
            "them: pass more with --prompts."
        )
    return [item.take([place[name] for name in shared]) for item, place in zip(answers, places, strict=True)]


# An ensemble


def with_ensemble(answers: Sequence[Answers], members: Sequence[str]) -> list[Answers]:
    """`answers` with one more reward: the mean of its members', each in standard deviations from the baseline's mean.

    A response that a member gave no reward has none. Raises WorkFailed for a member that gives all the baseline's
    responses the same reward, and so has no scale.
    """
    scales = {name: (np.nanmean(values), np.nanstd(values)) for name, values in answers[0].rewards.items()}
    for name in members:
        if not scales[name][1] > 0:
            raise WorkFailed(
                f"reward model {name} gives every response of {answers[0].policy} the same reward, so it has no scale "
                "to average on: leave it out of --ensemble."
            )

    def joint(item: Answers) -> Floats:
        parts = [(item.rewards[name] - scales[name][0]) / scales[name][1] for name in members]
        return np.asarray(np.mean(parts, axis=0), np.float64)

    return [dataclasses.replace(item, rewards={**item.rewards, ENSEMBLE: joint(item)}) for item in answers]


# Results


def compare(answers: Sequence[Answers]) -> dict[str, Any]:
    """The results of aligned `answers`, the baseline's first, as JSON values. docs/evaluate.md explains each."""
    baseline = answers[0]
    usable = {name: scored_prompts(answers, name) for name in baseline.rewards}
    for name, rows in usable.items():
        if len(rows) < FEWEST_PROMPTS:
            raise WorkFailed(f"reward model {name} scored responses of every policy for {len(rows)} prompts only.")
    return {
        "baseline": baseline.policy,
        "reward_models": list(baseline.rewards),
        "prompts": len(baseline.prompt_ids),
        "responses_per_prompt": len(baseline.texts[0]),
        "prompts_scored": {name: len(rows) for name, rows in usable.items()},
        "baseline_std": {name: float(np.nanstd(values)) for name, values in baseline.rewards.items()},
        "policies": [describe(item, answers[:position], usable) for position, item in enumerate(answers)],
    }


def scored_prompts(answers: Sequence[Answers], reward_model: str) -> list[int]:
    """Rows in which every policy has at least one reward."""
    scored = [~np.isnan(item.rewards[reward_model]).all(axis=1) for item in answers]
    return [int(row) for row in np.flatnonzero(np.logical_and.reduce(scored))]


def describe(item: Answers, earlier: Sequence[Answers], usable: dict[str, list[int]]) -> dict[str, Any]:
    """One policy's numbers, and how it compares with each policy before it."""
    texts = [text for of_prompt in item.texts for text in of_prompt]
    return {
        "name": item.policy,
        "responses": len(texts),
        "rewards": {name: interval(stats.mean_interval(values_of(item, name, rows))) for name, rows in usable.items()},
        "against": {
            other.policy: {name: versus(item, other, name, rows, full=k == 0) for name, rows in usable.items()}
            for k, other in enumerate(earlier)
        },
        "kl": kl_of(item, is_start=not earlier),
        "length": float(stats.prompt_means(item.lengths).mean()),
        "truncated": float(item.truncated.mean()),
        "repeated": stats.repeated_sentence_share(texts),
        "distinct_2": stats.distinct_2([text.split() for text in texts]),
        "correlations": [correlation(item, *pair) for pair in combinations(usable, 2)],
        "unscored": {name: int(np.isnan(item.rewards[name]).sum()) for name in usable},
        "categories": by_category(item, earlier[0] if earlier else None, usable),
    }


def values_of(item: Answers, reward_model: str, rows: Sequence[int]) -> list[Floats]:
    """For each prompt of `rows` the rewards that there are."""
    return [of_prompt[~np.isnan(of_prompt)] for of_prompt in item.rewards[reward_model][list(rows)]]


def versus(item: Answers, other: Answers, reward_model: str, rows: Sequence[int], *, full: bool) -> dict[str, Any]:
    """`item` against `other` by one reward model; `full`: the win rate at equal length as well.

    Every response is compared with every response of the other policy to the same prompt. The sign test takes a
    prompt as won if more of these comparisons are won than lost.
    """
    ours, theirs = values_of(item, reward_model, rows), values_of(other, reward_model, rows)
    shares = stats.win_shares(ours, theirs)
    wins, losses = int((shares > 0.5).sum()), int((shares < 0.5).sum())
    result = {
        "difference": interval(stats.difference_interval(ours, theirs)),
        "win_rate": interval(stats.win_rate(ours, theirs)),
        "sign_test": {
            "wins": wins,
            "losses": losses,
            "ties": len(shares) - wins - losses,
            "p": stats.sign_test(wins, losses),
        },
    }
    if full:
        longer = mean_characters(item, rows) - mean_characters(other, rows)
        result["length_controlled_win_rate"] = interval(stats.length_controlled_win_rate(shares, longer))
    return result


def mean_characters(item: Answers, rows: Sequence[int]) -> Floats:
    return stats.prompt_means([[len(text) for text in item.texts[row]] for row in rows])


def kl_of(item: Answers, *, is_start: bool) -> dict[str, Any] | None:
    """KL(policy || baseline) by two estimators, nats per response; None where there are no log-probs."""
    if is_start:
        return {name: {"value": 0.0, "standard_error": 0.0} for name in ("k1", "k3")}
    if item.log_ratios is None:
        return None
    estimates = (stats.kl_k1(item.log_ratios), stats.kl_k3(item.log_ratios))
    return {
        estimate.estimator: {"value": finite(estimate.value), "standard_error": finite(estimate.standard_error)}
        for estimate in estimates
    }


def correlation(item: Answers, first: str, second: str) -> dict[str, Any]:
    """Between two reward models, over the responses that both gave a reward."""
    both = ~(np.isnan(item.rewards[first]) | np.isnan(item.rewards[second]))
    x, y = item.rewards[first][both], item.rewards[second][both]
    enough = len(x) > 1
    return {
        "between": [first, second],
        "pearson": finite(stats.pearson(x, y)) if enough else None,
        "spearman": finite(stats.spearman(x, y)) if enough else None,
    }


def by_category(item: Answers, baseline: Answers | None, usable: dict[str, list[int]]) -> dict[str, Any]:
    """{category: numbers} for the categories with enough prompts, in alphabetical order."""
    names = sorted({name for name in item.categories if name is not None})
    table = {}
    for category in names:
        rows = {name: [row for row in every if item.categories[row] == category] for name, every in usable.items()}
        if min(map(len, rows.values())) < FEWEST_PROMPTS:
            continue
        table[category] = {
            "prompts": item.categories.count(category),
            "rewards": {name: interval(stats.mean_interval(values_of(item, name, rows[name]))) for name in usable},
            "gains": None
            if baseline is None
            else {
                name: interval(
                    stats.difference_interval(values_of(item, name, rows[name]), values_of(baseline, name, rows[name]))
                )
                for name in usable
            },
        }
    return table


def interval(value: stats.Interval) -> dict[str, float]:
    return dataclasses.asdict(value)


def finite(value: float) -> float | None:
    """None for what JSON can't say: a correlation of constants, an estimate beyond all bounds."""
    return value if math.isfinite(value) else None
