"""The reward report, on rewards small enough to be counted by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rlhf_pipeline.core.ranking import reward_report
from rlhf_pipeline.core.ranking.reward_report import Rewards

NAN = float("nan")
REWARDS = np.array(
    [
        [1.0, 3.0, 2.0],
        [4.0, 4.0, 1.0],  # two share the best
        [5.0, NAN, 5.0],  # all equal, one missing
        [NAN, NAN, 9.0],  # one alone compares with nothing
    ]
)
LENGTHS = np.array([[10.0, 30.0, 20.0], [40.0, 40.0, 10.0], [7.0, 7.0, 9.0], [5.0, NAN, 90.0]])
ERRORS = [("p2", 1, "too long: 9 tokens"), ("p3", 0, "too long: 8 tokens"), ("p3", 1, "empty response")]


def test_numbers_are_those_counted_by_hand() -> None:
    """9 rewards, sum 34. Three prompts compare: best 3, 4, 5; worst 1, 1, 5; margins 2, 3, 0."""
    report = reward_report.make(Rewards(REWARDS, LENGTHS, errors=ERRORS))
    assert (report["prompts"], report["responses"], report["nulls"]) == (4, 12, 3)
    assert report["null_reasons"] == {"too long": 2, "empty response": 1}
    assert report["mean"] == pytest.approx(34 / 9)
    assert (report["min"], report["max"]) == (1.0, 9.0)
    assert (report["best_of_n"], report["worst_of_n"]) == (pytest.approx(4.0), pytest.approx(7 / 3))
    assert report["margin"]["mean"] == pytest.approx(5 / 3)
    assert report["margin"]["percentiles"]["p50"] == 2.0
    assert (report["ties"], report["all_equal"]) == (2, 1)
    assert report["mean_by_response"] == [pytest.approx(10 / 3), pytest.approx(3.5), pytest.approx(17 / 4)]


def test_spread_within_a_prompt_leaves_out_differences_between_prompts() -> None:
    """Deviations from each prompt's mean: -1, 1, 0; 1, 1, -2; 0, 0. Their squares sum to 8, over 8
    responses.
    """
    report = reward_report.make(Rewards(REWARDS, LENGTHS))
    assert report["std_within_prompt"] == pytest.approx(math.sqrt(8 / 8))


def test_length_correlation_is_one_where_reward_is_length() -> None:
    assert reward_report.make(Rewards(LENGTHS / 10, LENGTHS))["length_correlation"] == pytest.approx(1.0)


def test_length_correlation_within_a_prompt_leaves_out_differences_between_prompts() -> None:
    """The longer prompt's responses all get more, yet within each prompt the longer response gets less."""
    rewards = np.array([[2.0, 1.0], [12.0, 11.0]])
    lengths = np.array([[10.0, 20.0], [110.0, 120.0]])
    report = reward_report.make(Rewards(rewards, lengths))
    assert report["length_correlation"] > 0.9
    assert report["length_correlation_within_prompt"] == pytest.approx(-1.0)


def test_what_has_no_meaning_is_none_and_every_line_can_still_be_printed() -> None:
    nothing = np.full((2, 2), NAN)
    report = reward_report.make(Rewards(nothing, nothing, errors=[("p", 0, "empty response")] * 4))
    for name in ("mean", "std", "min", "best_of_n", "length_correlation", "std_within_prompt"):
        assert report[name] is None
    assert report["margin"] == {"mean": None, "percentiles": dict.fromkeys(("p5", "p25", "p50", "p75", "p95"))}
    assert any("no reward: 4 of 4 responses, 4 empty response" in line for line in reward_report.lines(report))


def test_objectives_report_their_mean_and_their_correlation_with_the_reward() -> None:
    rewards = np.array([[1.0, 2.0], [3.0, NAN]])
    objectives = {"same": rewards * 2, "opposite": -rewards, "constant": np.where(np.isnan(rewards), NAN, 5.0)}
    report = reward_report.make(Rewards(rewards, np.ones((2, 2)), objectives=objectives))["objectives"]
    assert report["same"] == {"mean": pytest.approx(4.0), "correlation": pytest.approx(1.0)}
    assert report["opposite"] == {"mean": pytest.approx(-2.0), "correlation": pytest.approx(-1.0)}
    assert report["constant"] == {"mean": 5.0, "correlation": None}


def test_disagreement_counts_prompts_where_members_choose_another_best() -> None:
    """Prompt 0: both choose 1. Prompt 1: they differ. Prompt 2: b did not score response 1, so 0 and 2
    compare.

    Standard deviations of two members are half their distances: 0, 0; 1, 1; 0, 0.5.
    """
    a = np.array([[1.0, 2.0, NAN], [1.0, 3.0, NAN], [1.0, 9.0, 2.0]])
    b = np.array([[1.0, 2.0, NAN], [3.0, 1.0, NAN], [1.0, NAN, 3.0]])
    found = reward_report.disagreement(np.stack([a, b]))
    assert found["other_best"] == 1
    assert found["std_over_members"] == pytest.approx(2.5 / 6)
