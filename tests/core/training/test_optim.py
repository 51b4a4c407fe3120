import pytest
import torch

from rlhf_pipeline.core.training.optim import OptimizerName, learning_rate, make_optimizer, set_learning_rate


@pytest.mark.parametrize(("total", "ratio"), [(400, 0.1), (7, 0.5), (19, 0.1), (10, 0.0), (1, 0.1), (3, 1.0)])
def test_the_cosine_schedule_is_the_one_of_transformers(total, ratio):
    from transformers import get_cosine_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-7)
    scheduler = get_cosine_schedule_with_warmup(optimizer, int(total * ratio), total)
    expected = []
    for _ in range(total):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    ours = [learning_rate(update, total, peak=3e-7, warmup_ratio=ratio) for update in range(total)]
    assert ours == pytest.approx(expected, rel=1e-12, abs=1e-20)


def test_warm_up_starts_at_zero_and_the_constant_schedule_stays_at_the_peak():
    """20 updates, warm-up over int(20 * 0.1) = 2 of them: 0, half, then the peak."""
    rates = [learning_rate(k, 20, peak=1.0, warmup_ratio=0.1, schedule="constant") for k in range(20)]
    assert rates == [0.0, 0.5, *[1.0] * 18]


def test_a_first_step_by_hand():
    """After one step m / sqrt(v) is the gradient's sign, so a weight of 1 loses lr = 0.1; AdamW first takes
    lr * weight_decay = 0.1 * 0.2 of it."""
    expected_weights: dict[OptimizerName, float] = {"adamw": 1.0 - 0.02 - 0.1, "adam": 1.0 - 0.1}
    for kind, expected in expected_weights.items():
        weight, frozen = (
            torch.nn.Parameter(torch.ones(1)),
            torch.nn.Parameter(torch.ones(1), requires_grad=False),
        )
        optimizer = make_optimizer([weight, frozen], lr=1.0, weight_decay=0.2, kind=kind)
        set_learning_rate(optimizer, 0.1)
        weight.grad = torch.full((1,), 0.5)
        optimizer.step()
        assert weight.item() == pytest.approx(expected, abs=1e-6)
        assert optimizer.param_groups[0]["params"] == [weight]
