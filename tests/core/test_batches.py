import itertools
import random

import numpy as np
import pytest
import torch

from rlhf_pipeline.core.batches import MicroBatch, collate, plan_calls


def test_a_row_is_prompt_and_response_without_a_gap_then_padding():
    """Row 0: prompt 5 6 7, response 8 9. Row 1: prompt 1, response 2; width 5. The token before row 0's first
    response token is at 0*5+2, before row 1's at 1*5+0."""
    batch = collate([[5, 6, 7], [1]], [[8, 9], [2]], fill_id=4)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9], [1, 2, 4, 4, 4]]
    assert batch.prompt_lengths.tolist() == [3, 1]
    assert batch.response_lengths.tolist() == [2, 1]
    assert batch.positions.tolist() == [2, 3, 5]
    assert batch.labels.tolist() == [8, 9, 2]
    assert batch.rows.tolist() == [0, 0, 1]
    assert batch.packing is None
    assert {value.dtype for value in vars(batch).values() if isinstance(value, torch.Tensor)} == {torch.int64}


def test_a_packed_batch_is_one_row_without_padding():
    """The same two sequences end to end: places 0 to 4, then 0 and 1; the second begins at 5, its prompt's token
    predicts the response's."""
    batch = collate([[5, 6, 7], [1]], [[8, 9], [2]], packed=True)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 1, 2]]
    assert batch.position_ids is not None
    assert batch.packing is not None
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1]]
    assert batch.packing.boundaries.tolist() == [0, 5, 7]
    assert batch.packing.boundaries.dtype == torch.int32
    assert batch.packing.longest == 5
    assert batch.packing.expand is None
    assert batch.positions.tolist() == [2, 3, 5]
    assert batch.labels.tolist() == [8, 9, 2]
    assert batch.rows.tolist() == [0, 0, 1]


def test_a_prompt_that_sequences_share_stands_in_a_packed_row_once():
    """End to end the sequences are 5 6 8 9 | 7 4 | 5 6 3: nine tokens, of which 5 6 come again at places 6 and 7. Seven
    are in the row; the last prompt token predicts both 8 and 3, the one before the response 4 is at place 4."""
    batch = collate([[5, 6], [7], np.array([5, 6], dtype=np.int32)], [[8, 9], [4], [3]], packed=True)
    assert batch.input_ids.tolist() == [[5, 6, 8, 9, 7, 4, 3]]
    assert batch.position_ids is not None
    assert batch.packing is not None
    assert batch.packing.expand is not None
    assert batch.packing.keep is not None
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert batch.packing.boundaries.tolist() == [0, 4, 6, 9]
    assert batch.packing.expand.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 6]
    assert batch.packing.keep.tolist() == [0, 1, 2, 3, 4, 5, 8]
    assert batch.positions.tolist() == [1, 2, 4, 1]
    assert batch.labels.tolist() == [8, 9, 4, 3]
    assert batch.rows.tolist() == [0, 0, 1, 2]


def test_an_empty_response_has_no_labels_and_an_empty_prompt_is_refused():
    batch = collate([[5, 6], [7], [8]], [[], [9], []])
    assert (batch.positions.tolist(), batch.labels.tolist(), batch.rows.tolist()) == ([2], [9], [1])
    with pytest.raises(ValueError, match="prompt 1 of the batch has no tokens"):
        collate([[5], []], [[6], [7]])


def test_a_plan_by_hand():
    """Pairs 0..4 of widths 10 9 2 2 3, two sequences each, at most 40 tokens a call. Sorted, 2 2 3 | 9 10 are
    two groups within it, of 3 * 2 * 3 = 18 and 2 * 2 * 10 = 40 tokens. So two ranks make one call each."""
    lengths = [[10, 4], [3, 9], [2, 2], [1, 2], [3, 3]]
    assert plan_calls(lengths, world_size=2, max_tokens=40) == [
        [MicroBatch((0, 1), 1.0, 40)],
        [MicroBatch((4, 3, 2), 1.0, 18)],
    ]


def test_a_packed_plan_counts_real_tokens():
    """The same pairs of 14 12 4 3 6 tokens in all, packed: 3 4 6 12 | 14 would be two groups within 25 tokens, but
    3 4 6 | 12 | 14 and then 3 4 | 6 | 12 | 14 are as many calls as four ranks make anyway, and no group is dearer
    than the 14 of the longest pair alone."""
    lengths = [[10, 4], [3, 9], [2, 2], [1, 2], [3, 3]]
    plan = plan_calls(lengths, world_size=4, max_tokens=25, packed=True)
    assert [[call.tokens for call in calls] for calls in plan] == [[14], [12], [7], [6]]
    [[one], [other]] = plan_calls(lengths, world_size=2, max_tokens=40, packed=True)
    assert (one.tokens, other.tokens) == (25, 14)


def test_ranks_without_a_pair_repeat_the_shortest_at_weight_zero():
    """Three pairs, two ranks, one pair a call: two calls each. The longest two, 9 and 7, go out first, then
    in the other direction 5 to rank 1 and nothing to rank 0."""
    assert plan_calls([5, 9, 7], world_size=2, max_pairs=1) == [
        [MicroBatch((1,), 1.0, 9), MicroBatch((0,), 0.0, 5)],
        [MicroBatch((2,), 1.0, 7), MicroBatch((0,), 1.0, 5)],
    ]


def test_pairs_of_one_length_are_spread_over_ranks_that_would_else_be_idle():
    """Five pairs of 6 tokens, at most 13 a call: groups of 2 2 1 would do, but four ranks must call anyway, so
    one group is split: 2 1 1 1, of 12 6 6 6 tokens."""
    plan = plan_calls([6] * 5, world_size=4, max_tokens=13)
    assert [[call.tokens for call in calls] for calls in plan] == [[12], [6], [6], [6]]
    assert all(call.weight == 1.0 for calls in plan for call in calls)


def test_nothing_to_do_is_no_calls():
    assert plan_calls(np.zeros((0, 2)), world_size=3) == [[], [], []]


def random_cases(count):
    for seed in range(count):
        rng = random.Random(seed)
        sequences = rng.choice([1, 2])
        lengths = [
            [rng.choice([rng.randint(2, 30), rng.randint(2, 700)]) for _ in range(sequences)]
            for _ in range(rng.randint(1, 70))
        ]
        limits = {
            "world_size": rng.choice([1, 2, 3, 8]),
            "max_pairs": rng.choice([None, 1, 2, 5]),
            "max_tokens": rng.choice([None, 100, 1000, 4000]),
        }
        yield lengths, limits


def test_plans_hold_every_pair_once_within_the_budgets_and_keep_ranks_in_step():
    for lengths, limits in random_cases(300):
        ranks = plan_calls(lengths, **limits)
        assert ranks == plan_calls(np.array(lengths), **limits)
        assert len(ranks) == limits["world_size"]
        assert len({len(calls) for calls in ranks}) == 1
        calls = [call for rank in ranks for call in rank]
        counted = [index for call in calls if call.weight == 1.0 for index in call.indices]
        assert sorted(counted) == list(range(len(lengths)))
        for call in calls:
            widest = max(max(lengths[index]) for index in call.indices)
            assert call.tokens == len(lengths[0]) * len(call.indices) * widest
            assert len(call.indices) <= (limits["max_pairs"] or len(lengths))
            assert call.tokens <= (limits["max_tokens"] or call.tokens) or len(call.indices) == 1
        idle = [call for call in calls if call.weight != 1.0]
        assert all(call.weight == 0.0 and len(call.indices) == 1 for call in idle)
        if idle:  # then no other call holds two pairs
            assert {len(call.indices) for call in calls} == {1}


def test_no_plan_within_the_limits_has_fewer_calls():
    """Against all ways to part up to six pairs."""
    for lengths, limits in random_cases(60):
        lengths = lengths[:6]
        fewest = min(
            len(parts)
            for parts in partitions(lengths)
            if all(fits(part, limits["max_pairs"], limits["max_tokens"]) for part in parts)
        )
        calls_per_rank = len(plan_calls(lengths, **limits)[0])
        assert calls_per_rank == -(-fewest // limits["world_size"])


def fits(pairs, max_pairs, max_tokens):
    tokens = len(pairs[0]) * len(pairs) * max(max(pair) for pair in pairs)
    return len(pairs) == 1 or (len(pairs) <= (max_pairs or 6) and tokens <= (max_tokens or tokens))


def partitions(items):
    if not items:
        yield []
        return
    first, rest = items[0], items[1:]
    for chosen in itertools.product([True, False], repeat=len(rest)):
        with_first = [item for item, taken in zip(rest, chosen, strict=True) if taken]
        others = [item for item, taken in zip(rest, chosen, strict=True) if not taken]
        for parts in partitions(others):
            yield [[first, *with_first], *parts]


def test_ranks_work_on_about_the_same_number_of_tokens_at_the_same_time():
    """128 pairs of the tutorial's lengths over 8 ranks: at each call no rank waits for more than a quarter of
    it, all ranks' sums agree to 5 %, and sorting leaves less than 10 % of padding between pairs."""
    rng = np.random.default_rng(0)
    lengths = 200 + np.minimum(rng.gamma(3.0, 150.0, size=(128, 2)).astype(int), 2048)
    ranks = plan_calls(lengths, world_size=8, max_tokens=8192)
    sums = [sum(call.tokens for call in calls) for calls in ranks]
    assert max(sums) < 1.05 * min(sums)
    for together in zip(*ranks, strict=True):
        assert max(call.tokens for call in together) < 1.25 * min(call.tokens for call in together)
    real_pairs = 2 * lengths.max(axis=1).sum()  # a pair's two responses share a width
    assert sum(sums) < 1.1 * real_pairs
