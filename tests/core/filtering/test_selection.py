"""Which responses survive and which pairs they make, on tables worked out by hand."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest

from rlhf_pipeline.core.filtering.selection import Outcome, Response, Rules, select

RULES = Rules(maxlen=10, min_responses=5)


def responses(rewards: list[float | None], texts: str = "abcde", **at: dict[str, Any]) -> list[Response]:
    """Five responses with these rewards; r3={"length": 11} changes the fourth."""
    plain = [Response(text, reward, 4, False) for text, reward in zip(texts, rewards, strict=True)]
    return [dataclasses.replace(response, **at.get(f"r{i}", {})) for i, response in enumerate(plain)]


def outcome(rewards: list[float | None], texts: str = "abcde", **flags: Any) -> Outcome:
    return select(responses(rewards, texts), dataclasses.replace(RULES, **flags), "p")


REWARDS: list[float | None] = [2.0, 5.0, 1.0, 4.5, 3.0]


@pytest.mark.parametrize(
    ("flags", "pairs"),
    [
        ({}, {(1, 2)}),
        ({"min_margin": 4.0, "max_margin": 4.0}, {(1, 2)}),
        ({"select": "best_next"}, {(1, 3)}),
        ({"select": "best_next", "min_margin": 0.5}, {(1, 3)}),
        ({"select": "best_next", "min_margin": 0.6}, {(1, 4)}),
        ({"select": "best_next", "min_margin": 2.5, "max_margin": 3.5}, {(1, 0)}),
        ({"select": "all_pairs"}, {(1, 3), (1, 4), (1, 0), (1, 2), (3, 4), (3, 0), (3, 2), (4, 0), (4, 2), (0, 2)}),
        ({"select": "all_pairs", "min_margin": 3.0}, {(1, 0), (1, 2), (3, 2)}),
        ({"select": "all_pairs", "max_margin": 1.0}, {(1, 3), (4, 0), (0, 2)}),
        ({"select": "best_random", "min_margin": 2.5, "max_margin": 3.5}, {(1, 0)}),
    ],
)  # fmt: skip
def test_the_pairs_of_a_prompt(flags, pairs):
    """Best is response 1 with 5, then 3 (4.5), 4 (3), 0 (2), 2 (1)."""
    found = outcome(REWARDS, **flags)
    assert set(found.pairs) == pairs
    assert len(found.pairs) == len(pairs)
    assert found.reason is None


@pytest.mark.parametrize(
    ("rewards", "texts", "flags", "reason"),
    [
        ([1.0] * 5, "abcde", {}, "tied"),
        ([1.0] * 5, "abcde", {"select": "all_pairs"}, "tied"),
        ([2.0, 1.0, 1.5, 1.5, 1.5], "aabcd", {}, "same_text"),
        (REWARDS, "abcde", {"min_margin": 4.1}, "margin_too_small"),
        (REWARDS, "abcde", {"max_margin": 3.9}, "margin_too_large"),
        (REWARDS, "abcde", {"select": "best_next", "min_margin": 4.1}, "margin_too_small"),
        (REWARDS, "aaaaa", {"select": "best_random"}, "same_text"),
    ],
)
def test_why_a_prompt_has_no_pair(rewards, texts, flags, reason):
    found = outcome(rewards, texts, **flags)
    assert (found.pairs, found.reason, found.faults) == ((), reason, {})


def test_of_equal_rewards_the_first_response_counts_as_with_numpy():
    found = outcome([1.0, 3.0, 1.0, 3.0, 2.0])
    assert found.pairs == ((1, 0),)
    assert (found.tied_best, found.tied_worst) == (True, True)
    found = outcome([1.0, 3.0, 2.0, 2.0, 2.0])
    assert (found.tied_best, found.tied_worst) == (False, False)


def test_equal_texts_are_passed_over_where_another_pair_is_possible():
    rewards: list[float | None] = [5.0, 4.0, 3.0, 2.0, 1.0]
    assert outcome(rewards, "aabcd", select="best_next").pairs == ((0, 2),)
    assert (0, 1) not in outcome(rewards, "aabcd", select="all_pairs").pairs
    assert len(outcome(rewards, "aabcd", select="all_pairs").pairs) == 9


def test_best_against_random_takes_each_worse_one_about_equally_often():
    """400 prompts, 4 candidates of chance 1/4: 100 expected each, standard deviation 8.7; 60 is 4.6 of them away."""
    rules = dataclasses.replace(RULES, select="best_random")
    drawn = [select(responses(REWARDS), rules, f"prompt {k}").pairs[0] for k in range(400)]
    counts = Counter(rejected for _, rejected in drawn)
    assert {chosen for chosen, _ in drawn} == {1}
    assert set(counts) == {0, 2, 3, 4}
    assert min(counts.values()) > 60
    again = [select(responses(REWARDS), rules, f"prompt {k}").pairs[0] for k in range(400)]
    other = dataclasses.replace(rules, seed=1)
    assert again == drawn
    assert [select(responses(REWARDS), other, f"prompt {k}").pairs[0] for k in range(400)] != drawn


FAULTS = [
    ("r1", {"reward": None}, "without_reward", {"null_reward": -1.0}),
    ("r1", {"reward": float("nan")}, "without_reward", {"null_reward": -1.0}),
    ("r0", {"truncated": True}, "truncated", {"keep_truncated": True}),
    ("r0", {"text": " \n"}, "empty", {"keep_empty": True}),
    ("r0", {"length": 11}, "too_long", {"maxlen": 11}),
]


@pytest.mark.parametrize(("which", "change", "fault", "lifted"), FAULTS)
def test_one_fault_drops_the_prompt_and_each_rule_has_its_flag(which, change, fault, lifted):
    faulty = responses(REWARDS, **{which: change})
    dropped = select(faulty, RULES, "p")
    assert (dropped.pairs, dropped.reason) == ((), f"response_{fault}")
    assert dropped.faults == {int(which[1]): fault}
    assert dropped.liftable
    kept = select(faulty, dataclasses.replace(RULES, min_responses=4), "p")
    assert kept.pairs == (((3, 2) if which == "r1" else (1, 2)),)
    assert kept.faults == dropped.faults
    assert select(faulty, dataclasses.replace(RULES, **lifted), "p").pairs


def test_a_response_that_the_template_can_not_encode_does_not_survive():
    assert select(responses(REWARDS, r0={"length": None}), RULES, "p").reason == "response_not_encodable"


def test_a_response_at_the_limit_survives():
    assert select(responses(REWARDS, r0={"length": 10}), RULES, "p").pairs == ((1, 2),)


def test_a_null_reward_with_a_value_can_be_the_worst():
    assert select(responses([2.0, 3.0, None, 4.0, 2.5]), dataclasses.replace(RULES, null_reward=-9.0), "p").pairs == (
        (3, 2),
    )


def test_a_prompt_without_a_pair_of_survivors_is_not_liftable():
    """Two survivors with equal rewards, then one survivor."""
    tied = responses([1.0, 1.0, None, None, None])
    assert not select(tied, RULES, "p").liftable
    assert not select(responses([1.0, None, None, None, None]), RULES, "p").liftable
    assert select(responses([1.0, 2.0, None, None, None]), RULES, "p").liftable
