"""Rules by which a run ends early, on numbers chosen so that each rule's arithmetic can be seen."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf_pipeline.core.command import BadUse
from rlhf_pipeline.core.iteration import stopping
from rlhf_pipeline.core.iteration.stopping import Rules, first_stop


def row(name: str, gold: float, **numbers: float | None) -> dict[str, Any]:
    usual: dict[str, float | None] = {"kl": 0.5, "length": 10.0, "repeated": 0.0, "truncated": 0.0}
    return {"name": name, "gold": {"mean": gold}, **usual, **numbers}


ROWS = [
    row("sft", -0.25, kl=None),
    row("iteration_1", 0.25, kl=1.0, length=12.0),
    row("iteration_2", 0.5, kl=2.5, length=15.0, repeated=0.02),
    row("iteration_3", 0.375, kl=4.0, length=25.0, repeated=0.02, truncated=0.1),
]


def stopped_at(**rules: float) -> int | None:
    stop = first_stop(Rules(**rules), ROWS, "gold")  # type: ignore[arg-type]
    return stop.iteration if stop else None


def test_a_fall_counts_from_the_best_policy_so_far() -> None:
    """From .5 to .375 is a fall of .125; until then the reward only rose."""
    assert stopped_at(reward_fall=0.0) == 3
    assert stopped_at(reward_fall=0.12) == 3
    assert stopped_at(reward_fall=0.125) is None


def test_the_kl_budget_is_passed_at_its_first_iteration() -> None:
    assert [stopped_at(kl=limit) for limit in (0.9, 1.0, 2.4, 4.0)] == [1, 2, 2, None]


def test_length_is_a_factor_of_the_starting_policys() -> None:
    """12, 15 and 25 tokens against 10."""
    assert [stopped_at(length=limit) for limit in (1.1, 1.4, 1.5, 2.4, 2.5)] == [1, 2, 3, 3, None]


def test_shares_have_a_limit_each() -> None:
    assert [stopped_at(repeated=limit) for limit in (0.0, 0.01, 0.02)] == [2, 2, None]
    assert [stopped_at(truncated=limit) for limit in (0.05, 0.1)] == [3, None]


def test_the_reasons_name_number_limit_and_flag() -> None:
    stop = first_stop(Rules(length=2, reward_fall=0.1), ROWS, "gold")
    assert stop is not None and stop.reasons == (
        "gold fell to 0.375, 0.125 below iteration_2's 0.5 (--stop.reward_fall 0.1)",
        "responses are 2.50 times as long as sft's, 25.0 against 10.0 tokens (--stop.length 2)",
    )


def test_the_best_policy_is_one_of_those_before_a_rule_fired() -> None:
    """The length rule of 1.4 fires after iteration 2, whose reward is the highest: iteration 1 is the best left."""
    stop = first_stop(Rules(length=1.4), ROWS, "gold")
    assert stopping.best(ROWS, "gold", stop) == 1
    assert stopping.best(ROWS, "gold", None) == 2


def test_without_limits_there_are_no_rules() -> None:
    assert not Rules(reward="gold").are_set and Rules(kl=0.0).are_set


def test_the_reward_model_to_believe_judges_unless_another_is_named() -> None:
    assert stopping.judge_of(Rules(), ["proxy", "gold", "other"]) == "gold"
    assert stopping.judge_of(Rules(), ["proxy"]) == "proxy"
    assert stopping.judge_of(Rules(reward="other"), ["proxy", "gold", "other"]) == "other"
    with pytest.raises(BadUse, match=r"--stop\.reward x is none of evaluate's reward models proxy, gold"):
        stopping.judge_of(Rules(reward="x"), ["proxy", "gold"])


@pytest.mark.parametrize(("name", "value"), [("kl", -1.0), ("length", 0.5), ("truncated", 1.0), ("repeated", -0.1)])
def test_limits_that_can_not_be_meant_are_refused(name: str, value: float) -> None:
    with pytest.raises(BadUse, match=rf"--stop\.{name} is {value:g}; expected"):
        stopping.check_values(Rules(**{name: value}))  # type: ignore[arg-type]
