"""What a reward model is worth on pairs: numbers counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from rlhf_pipeline.core.ranking import pair_accuracy
from rlhf_pipeline.core.ranking.pair_accuracy import Judged

NAN = float("nan")


def judged(margins: list[float], **more: object) -> Judged:
    """Pairs with these margins, each of its own prompt, chosen and rejected of equal length."""
    count = len(margins)
    values: dict[str, object] = {
        "rewards": np.array([[margin, 0.0] for margin in margins]),
        "characters": np.full((count, 2), 10.0),
        "prompt_ids": [f"p{k}" for k in range(count)],
        "subsets": [None] * count,
    }
    return Judged(**(values | more))  # type: ignore[arg-type]


def test_a_tie_counts_half_and_a_pair_without_a_reward_not_at_all() -> None:
    """Right, right, wrong and a tie: 2.5 of 4. The margins 2, 1, -3 and 0 have mean 0."""
    errors = [("p4", "chosen", "too long: 9 tokens")]
    report = pair_accuracy.make(judged([2.0, 1.0, -3.0, 0.0, NAN], errors=errors))
    assert report["accuracy"]["mean"] == 2.5 / 4 and report["ties"] == 1
    assert (report["read"], report["pairs"], report["nulls"]) == (5, 4, {"too long": 1})
    assert report["margin"]["mean"] == 0 and report["margin"]["percentiles"]["p50"] == 0.5
    lines = pair_accuracy.lines(report)
    assert any("62.5 %" in line and "1 ties counted as half" in line for line in lines)
    assert any("no reward: 1 of 5 pairs, 1 too long" in line for line in lines)


def test_a_judge_of_length_is_seen_as_one() -> None:
    """The margin is the difference in length: the longer response wins always, and the chosen one where it is longer.

    Differences 10, 20, -10, -20, 30: right in 3 of 5, exactly as a judge that takes the longer response.
    """
    differences = [10.0, 20.0, -10.0, -20.0, 30.0]
    characters = np.array([[100 + d, 100.0] for d in differences])
    length = pair_accuracy.make(judged(differences, characters=characters))["length"]
    assert length["prefers_longer"]["mean"] == 1.0 and length["always_longer"] == 3 / 5
    assert length["correlation"] == pytest.approx(1.0)
    assert (length["chosen longer"]["accuracy"]["mean"], length["chosen longer"]["pairs"]) == (1.0, 3)
    assert (length["chosen shorter"]["accuracy"]["mean"], length["chosen shorter"]["pairs"]) == (0.0, 2)
    assert [(item["from"], item["accuracy"]["mean"]) for item in length["by_difference"]] == [
        (-20, 0),
        (-10, 0),
        (10, 1),
        (20, 1),
        (30, 1),
    ]


def test_subsets_have_their_own_accuracy_and_members_theirs() -> None:
    objectives = {
        "a": np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]),
        "b": np.array([[0.0, 1.0], [1.0, 0.0], [NAN, 1]]),
    }
    report = pair_accuracy.make(judged([1.0, -1.0, -1.0], subsets=["x", "y", "y"], objectives=objectives))
    assert {name: item["accuracy"]["mean"] for name, item in report["subsets"].items()} == {"x": 1.0, "y": 0.0}
    assert report["objectives"]["a"]["accuracy"]["mean"] == pytest.approx(2 / 3)
    assert (report["objectives"]["b"]["accuracy"]["mean"], report["objectives"]["b"]["pairs"]) == (0.5, 2)
    assert "rewardbench" not in report


def test_rewardbench_weighs_math_as_all_code_and_sections_alike() -> None:
    """Chat: 1 of 2. Reasoning: math 0 of 1, code 3 of 3 over two languages; half each: 1/2 although 3 of 4 are right.

    The score is the mean of both sections, 1/2; over all pairs 4 of 6 are right.
    """
    subsets = ["alpacaeval-easy", "mt-bench-med", "math-prm", "hep-go", "hep-go", "hep-rust"]
    report = pair_accuracy.make(judged([1.0, -1.0, -1.0, 1.0, 1.0, 1.0], subsets=subsets))
    assert report["accuracy"]["mean"] == pytest.approx(4 / 6)
    sections = report["rewardbench"]["sections"]
    assert {name: item["accuracy"]["mean"] for name, item in sections.items()} == {
        "Chat": 0.5,
        "Reasoning": pytest.approx(0.5),
    }
    assert report["rewardbench"]["score"]["accuracy"]["mean"] == pytest.approx(0.5)
    assert any("RewardBench score: 50.0 %" in line for line in pair_accuracy.lines(report))


def test_no_scored_pair_leaves_none_and_every_line_can_still_be_printed() -> None:
    report = pair_accuracy.make(judged([NAN, NAN]))
    assert report["accuracy"] is None and report["margin"]["mean"] is None
    assert any("no reward: 2 of 2 pairs" in line for line in pair_accuracy.lines(report))
