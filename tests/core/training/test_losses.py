"""Every loss against arithmetic by hand, finite differences, and TRL where TRL has it."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import tyro
from torch import Tensor

from rlhf_pipeline.core.command import BadUse, what_fields
from rlhf_pipeline.core.training.losses import (
    Dpo,
    Ipo,
    Kto,
    Loss,
    Orpo,
    Pairs,
    Rebel,
    Simpo,
    Sppo,
    check_values,
    with_sft_term,
)

ALL = [Rebel(eta=10.0), Dpo(beta=0.3), Ipo(), Simpo(), Kto(), Orpo(), Sppo(beta=0.05)]
LN3 = math.log(3)


def name_of(loss: Loss) -> str:
    return type(loss).__name__


def make_pairs(**values: Any) -> Pairs:
    """Pairs in float64 from lists; what is not given is 0, and lengths are 1."""
    tensors = {
        name: torch.tensor(value, dtype=torch.float64) if isinstance(value, list) else value
        for name, value in values.items()
    }
    zeros = torch.zeros(len(next(iter(tensors.values()))), dtype=torch.float64)
    given = {"chosen_length": zeros + 1, "rejected_length": zeros + 1, **tensors}
    per_pair = [field.name for field in dataclasses.fields(Pairs) if field.name.split("_")[0] != "mismatched"]
    return Pairs(**{name: zeros for name in per_pair if name != "rewards"} | given)


def random_pairs(size: int = 8, seed: int = 0) -> Pairs:
    """Pairs as a Llama gives them: about a nat per token, some hundred tokens, ArmoRM's rewards."""
    draw = torch.Generator().manual_seed(seed)

    def normal(mean: float, deviation: float, *shape: int) -> Tensor:
        return mean + deviation * torch.randn(*shape or (size,), generator=draw, dtype=torch.float64)

    lengths = torch.randint(20, 400, (2, size), generator=draw).double()
    reference = -lengths * normal(0.9, 0.1, 2, size)
    rewards = normal(0.15, 0.02, size, 5)
    return Pairs(
        chosen_logp=reference[0] + normal(0, 3),
        rejected_logp=reference[1] + normal(0, 3),
        chosen_reference_logp=reference[0],
        rejected_reference_logp=reference[1],
        chosen_length=lengths[0],
        rejected_length=lengths[1],
        chosen_reward=rewards.max(1).values,
        rejected_reward=rewards.min(1).values,
        rewards=rewards,
        mismatched_log_ratio=0.7,
    )


def expect(losses: Tensor, values: list[float]) -> None:
    torch.testing.assert_close(losses, torch.tensor(values, dtype=torch.float64), rtol=1e-12, atol=1e-12)


# By hand


def test_rebel_is_the_squared_distance_of_the_gap_from_eta_times_the_margin() -> None:
    """With D_w = -10 + 12 = 2 and D_l = -15 + 14 = -1 the gap is 3.

    Margin .2, eta 10: (3 - 2)^2 = 1. Margin 0 (a tie): 3^2 = 9. Margin -.1: (3 + 1)^2 = 16.
    """
    pairs = make_pairs(
        chosen_logp=[-10.0] * 3,
        chosen_reference_logp=[-12.0] * 3,
        rejected_logp=[-15.0] * 3,
        rejected_reference_logp=[-14.0] * 3,
        chosen_reward=[0.5, 0.5, 0.5],
        rejected_reward=[0.3, 0.5, 0.6],
    )
    expect(Rebel(eta=10)(pairs), [1, 9, 16])


def test_rebel_is_eta_squared_times_the_form_of_the_paper() -> None:
    """(gap - eta m)^2 = eta^2 (gap / eta - m)^2."""
    pairs, eta = random_pairs(), 37.0
    paper = (pairs.log_ratio_gap / eta - pairs.reward_margin) ** 2
    torch.testing.assert_close(Rebel(eta=eta)(pairs), eta**2 * paper)


def test_dpo_is_the_log_loss_of_beta_times_the_gap() -> None:
    """At beta = 1/2 gaps of 0, 2 ln 3, -2 ln 3 give s = 1/2, 3/4, 1/4: losses ln 2, ln 4/3, ln 4.

    Smoothed by .1 the second is .9 ln 4/3 + .1 ln 4.
    """
    pairs = make_pairs(
        chosen_logp=[-4.0, -4.0 + 2 * LN3, -4.0],
        chosen_reference_logp=[-4.0] * 3,
        rejected_logp=[-7.0, -7.0, -7.0 + 2 * LN3],
        rejected_reference_logp=[-7.0] * 3,
    )
    expect(Dpo(beta=0.5)(pairs), [math.log(2), math.log(4 / 3), math.log(4)])
    smoothed = Dpo(beta=0.5, label_smoothing=0.1)(pairs)[1]
    assert smoothed.item() == pytest.approx(0.9 * math.log(4 / 3) + 0.1 * math.log(4), rel=1e-12)


def test_ipo_asks_for_a_gap_of_one_over_two_beta() -> None:
    """D_w = 6 over 2 tokens, D_l = -4 over 4 tokens; beta .1 asks for 5.

    Per token: 3 - (-1) = 4, (4 - 5)^2 = 1. Summed: 6 - (-4) = 10, (10 - 5)^2 = 25.
    """
    pairs = make_pairs(
        chosen_logp=[-4.0],
        chosen_reference_logp=[-10.0],
        chosen_length=[2.0],
        rejected_logp=[-12.0],
        rejected_reference_logp=[-8.0],
        rejected_length=[4.0],
    )
    expect(Ipo(beta=0.1)(pairs), [1])
    expect(Ipo(beta=0.1, length_normalize=False)(pairs), [25])


def test_simpo_compares_mean_log_probs_after_a_margin() -> None:
    """beta 2, ratio 1/2. Means -1 and -1.5 are just even: ln 2.

    Means -1 and -1.5 - ln(3) / 2 lead by ln(3) / 2 more: -log s(ln 3) = ln 4/3.
    """
    pairs = make_pairs(
        chosen_logp=[-3.0, -5.0],
        chosen_length=[3.0, 5.0],
        rejected_logp=[-6.0, 4 * (-1.5 - LN3 / 2)],
        rejected_length=[4.0, 4.0],
    )
    expect(Simpo(beta=2, gamma_beta_ratio=0.5)(pairs), [math.log(2), math.log(4 / 3)])


def test_kto_measures_each_response_from_z_which_is_never_negative() -> None:
    """beta 1/2, z 1. D_w = 1 + 2 ln 3: 1 - s(ln 3) = 1/4. D_l = 1 + 2 ln 3: 1 - s(-ln 3) = 3/4.

    Weights 1 and 2: (1/4 + 2 * 3/4) / 2 = 7/8. A mismatched mean of -5 counts as z = 0: then D_w = D_l = 0
    gives (1/2 + 2 * 1/2) / 2 = 3/4.
    """
    loss = Kto(beta=0.5, desirable_weight=1, undesirable_weight=2)
    moved = [1 + 2 * LN3]
    expect(loss(make_pairs(chosen_logp=moved, rejected_logp=moved, mismatched_log_ratio=1.0)), [7 / 8])
    expect(loss(make_pairs(chosen_logp=[0.0], rejected_logp=[0.0], mismatched_log_ratio=-5.0)), [3 / 4])


def test_kto_does_not_take_an_undefined_z_for_zero() -> None:
    pairs = make_pairs(chosen_logp=[0.0], rejected_logp=[0.0], mismatched_log_ratio=math.nan)
    assert Kto()(pairs).isnan().all()


def test_orpo_adds_the_log_odds_ratio_to_the_likelihood_of_the_chosen() -> None:
    """Mean probabilities 3/4 and 1/4: odds 3 and 1/3, ratio 9, -log s(ln 9) = ln 10/9; likelihood ln 4/3."""
    pairs = make_pairs(
        chosen_logp=[2 * math.log(3 / 4)],
        chosen_length=[2.0],
        rejected_logp=[5 * math.log(1 / 4)],
        rejected_length=[5.0],
    )
    expect(Orpo(odds_weight=0.5)(pairs), [math.log(4 / 3) + 0.5 * math.log(10 / 9)])


def test_sppo_regresses_each_response_on_its_own_win_probability() -> None:
    """Rewards ln 3, 0 and one missing. P_w = (3/4 + 1/2) / 2 = 5/8, P_l = (1/4 + 1/2) / 2 = 3/8.

    beta 1/8 asks for (5/8 - 1/2) * 8 = 1 and -1: with D_w = 2 and D_l = -3, (1 + 4) / 2 = 5/2. Rewards and
    temperature both doubled leave it as it is.
    """
    for scale in (1, 2):
        pairs = make_pairs(
            chosen_logp=[2.0],
            rejected_logp=[-3.0],
            chosen_reward=[scale * LN3],
            rejected_reward=[0.0],
            rewards=[[0.0, math.nan, scale * LN3]],
        )
        expect(Sppo(beta=1 / 8, reward_temperature=scale)(pairs), [5 / 2])


def test_the_sft_term_is_the_negative_mean_log_prob_of_the_chosen() -> None:
    """Loss 3, log-prob -8 over 4 tokens, weight .5: 3 + .5 * 2 = 4."""
    pairs = make_pairs(chosen_logp=[-8.0], chosen_length=[4.0])
    expect(with_sft_term(torch.tensor([3.0]).double(), pairs, 0.5), [4])


# Gradients


@pytest.mark.parametrize("loss", [*ALL, Ipo(length_normalize=False), Dpo(label_smoothing=0.2)], ids=name_of)
def test_gradients_agree_with_finite_differences(loss: Loss) -> None:
    pairs = random_pairs()

    def of_logps(chosen: Tensor, rejected: Tensor) -> Tensor:
        moved = dataclasses.replace(pairs, chosen_logp=chosen, rejected_logp=rejected)
        return with_sft_term(loss(moved), moved, 0.3)

    logps = (pairs.chosen_logp.clone().requires_grad_(), pairs.rejected_logp.clone().requires_grad_())
    assert torch.autograd.gradcheck(of_logps, logps, eps=1e-6, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("loss", ALL, ids=name_of)
def test_a_step_down_the_gradient_prefers_the_chosen_response(loss: Loss) -> None:
    """At equal log-probs and a positive margin every one of these losses raises chosen against rejected."""
    chosen, rejected = (torch.full((1,), -20.0, dtype=torch.float64, requires_grad=True) for _ in range(2))
    pairs = make_pairs(
        chosen_logp=chosen,
        rejected_logp=rejected,
        chosen_reference_logp=[-20.0],
        rejected_reference_logp=[-20.0],
        chosen_length=[20.0],
        rejected_length=[20.0],
        chosen_reward=[1.0],
        rewards=[[1.0, 0.0]],
        mismatched_log_ratio=0.0,
    )
    loss(pairs).sum().backward()
    assert chosen.grad is not None and rejected.grad is not None
    assert chosen.grad.item() < 0 < rejected.grad.item()


# What each loss reads

READS: dict[type, set[str]] = {
    Rebel: {"reference", "reward"},
    Dpo: {"reference"},
    Ipo: {"reference", "length"},
    Simpo: {"length"},
    Kto: {"reference", "mismatched_log_ratio"},
    Orpo: {"length"},
    Sppo: {"reference", "reward", "rewards"},
}
INPUTS = {
    "reference": ("chosen_reference_logp", "rejected_reference_logp"),
    "length": ("chosen_length", "rejected_length"),
    "reward": ("chosen_reward", "rejected_reward"),
    "rewards": ("rewards",),
    "mismatched_log_ratio": ("mismatched_log_ratio",),
}


@pytest.mark.parametrize("loss", ALL, ids=name_of)
@pytest.mark.parametrize("kind", INPUTS)
def test_a_loss_reads_what_its_formula_has_and_nothing_else(loss: Loss, kind: str) -> None:
    """What it must not read may be NaN without a trace; each thing that it does read changes every value."""
    pairs = random_pairs()
    for name in INPUTS[kind]:
        value = getattr(pairs, name)
        if kind in READS[type(loss)]:
            changed = dataclasses.replace(pairs, **{name: value * 1.5 + 0.1})
            assert not torch.isclose(loss(changed), loss(pairs), rtol=1e-6, atol=0).any(), name
        else:
            hidden = dataclasses.replace(pairs, **{name: value * math.nan})
            assert torch.equal(loss(hidden), loss(pairs)), name


@pytest.mark.parametrize("loss", ALL, ids=name_of)
def test_a_loss_declares_what_it_reads(loss: Loss) -> None:
    reads = READS[type(loss)]
    assert loss.needs_reference == ("reference" in reads)
    assert loss.needs_rewards == ("reward" in reads)
    assert loss.needs_all_rewards == ("rewards" in reads)
    assert loss.needs_mismatched == ("mismatched_log_ratio" in reads)


@pytest.mark.parametrize(
    ("loss", "name"),
    [
        (Rebel(), "chosen_reference_logp"),
        (Dpo(), "rejected_reference_logp"),
        (Ipo(), "chosen_reference_logp"),
        (Kto(), "mismatched_log_ratio"),
        (Sppo(), "rewards"),
    ],
)
def test_a_loss_without_what_it_needs_says_what_is_missing(loss: Loss, name: str) -> None:
    without: dict[str, Any] = {name: None}
    with pytest.raises(ValueError, match=f"needs {name}"):
        loss(dataclasses.replace(random_pairs(), **without))


@pytest.mark.parametrize("loss", [Ipo(), Simpo(), Orpo()], ids=name_of)
def test_an_empty_response_is_an_error_where_a_loss_divides_by_its_length(loss: Loss) -> None:
    pairs = dataclasses.replace(random_pairs(2), rejected_length=torch.tensor([7.0, 0.0]).double())
    with pytest.raises(ValueError, match="without tokens"):
        loss(pairs)


# Numbers


@pytest.mark.parametrize("loss", [Rebel(eta=1e6), *ALL[1:]], ids=name_of)
def test_float32_gives_what_float64_gives(loss: Loss) -> None:
    """Also REBEL at the authors' eta of 1e6: losses of about 1e9, gradients of about 1e5."""
    values, gradients = [], []
    for dtype in (torch.float64, torch.float32):
        pairs = in_dtype(random_pairs(64), dtype)
        logps = [logp.requires_grad_() for logp in (pairs.chosen_logp, pairs.rejected_logp)]
        losses = loss(pairs)
        assert losses.dtype == dtype
        values.append(losses.double().detach())
        gradients.append(torch.stack([grad.double() for grad in torch.autograd.grad(losses.sum(), logps)]))
    torch.testing.assert_close(values[1], values[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)


def in_dtype(pairs: Pairs, dtype: torch.dtype) -> Pairs:
    values: dict[str, Any] = {field.name: getattr(pairs, field.name) for field in dataclasses.fields(pairs)}
    values |= {name: value.to(dtype) for name, value in values.items() if isinstance(value, Tensor)}
    return Pairs(**values)


@pytest.mark.parametrize("loss", [*ALL, Rebel(eta=1e6)], ids=name_of)
@pytest.mark.parametrize("logp", [0.0, 1e-7, -1e-9, -1e5])
def test_extreme_log_probs_give_finite_losses_and_gradients(loss: Loss, logp: float) -> None:
    """Certain responses, also those that rounding makes more than certain, and hopeless ones; margin 0."""
    logps = torch.tensor([[logp], [-3.0]], dtype=torch.float32)
    for chosen, rejected in ((0, 1), (1, 0), (0, 0)):
        leaf = logps.clone().requires_grad_()
        ends = {"chosen_logp": leaf[chosen], "rejected_logp": leaf[rejected]}
        pairs = make_pairs(**ends, rewards=[[0.0, 0.0]], mismatched_log_ratio=0.0)
        losses = loss(in_dtype(pairs, torch.float32))
        assert losses.isfinite().all()
        assert torch.autograd.grad(losses.sum(), leaf)[0].isfinite().all()


def test_orpo_keeps_its_digits_where_probabilities_are_near_one() -> None:
    """p = 1 - 1e-4 and 1 - 2e-4 to first order: odds 1e4 and 5e3, ratio 2, -log s(ln 2) = ln 3/2."""
    pairs = make_pairs(chosen_logp=[-1e-4], rejected_logp=[-2e-4])
    loss = Orpo(odds_weight=1)(in_dtype(pairs, torch.float32))
    assert loss.item() == pytest.approx(1e-4 + math.log(1.5), abs=2e-5)


# Hyper-parameters


def test_rebel_does_not_run_while_its_target_gap_is_unresolved() -> None:
    with pytest.raises(ValueError, match="target_gap"):
        Rebel(target_gap=3.0)(random_pairs())


@pytest.mark.parametrize(
    ("loss", "flag"),
    [
        (Dpo(beta=0.0), "--x.beta is 0.0"),
        (Ipo(beta=-0.1), "--x.beta is -0.1"),
        (Rebel(eta=math.inf), "--x.eta is inf"),
        (Rebel(target_gap=0.0), "--x.target_gap is 0.0"),
        (Dpo(label_smoothing=0.5), "--x.label_smoothing is 0.5"),
        (Kto(undesirable_weight=-1.0), "--x.undesirable_weight is -1.0"),
        (Sppo(reward_temperature=math.nan), "--x.reward_temperature is nan"),
    ],
)
def test_a_hyper_parameter_outside_its_range_is_refused_by_its_flag(loss: Loss, flag: str) -> None:
    with pytest.raises(BadUse, match=flag):
        check_values(loss, "--x")


@pytest.mark.parametrize("loss", [*ALL, Kto(desirable_weight=0.0), Simpo(gamma_beta_ratio=0.0)], ids=name_of)
def test_sensible_hyper_parameters_pass(loss: Loss) -> None:
    check_values(loss, "--x")


def test_losses_are_flags_of_a_command_and_part_of_what_a_run_is() -> None:
    @dataclasses.dataclass(frozen=True)
    class Config:
        dpo: Dpo = Dpo()
        ipo: Ipo = Ipo()

    args = ["--dpo.beta", "0.3", "--ipo.no_length_normalize"]
    config = tyro.cli(Config, args=args, use_underscores=True, config=(tyro.conf.FlagCreatePairsOff,))
    assert what_fields(config) == {
        "dpo.beta": 0.3,
        "dpo.label_smoothing": 0.0,
        "ipo.beta": 0.1,
        "ipo.length_normalize": False,
    }


# TRL


@pytest.fixture(scope="module")
def trl() -> SimpleNamespace:
    """TRL's loss functions, called unbound on an object that has only what they look at."""
    pytest.importorskip("trl", reason="TRL is a development dependency")
    from trl import DPOTrainer, KTOTrainer
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    return SimpleNamespace(dpo=DPOTrainer, kto=KTOTrainer, cpo=CPOTrainer, orpo=ORPOTrainer)


def trl_self(**settings: Any) -> Any:
    """What the compute methods of TRL's trainers look at; gathering over one process is the identity."""
    accelerator = SimpleNamespace(device=torch.device("cpu"), gather=identity, gather_for_metrics=identity)
    return SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=accelerator,
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **settings,
    )


def identity(tensor: Tensor) -> Tensor:
    return tensor


def trl_outputs(logps: Tensor, lengths: Tensor) -> tuple[dict[str, Tensor], Callable[..., Any]]:
    """(inputs, model) in which responses with these lengths, after one prompt token, have these log-probs."""
    mask = torch.arange(int(lengths.max()) + 1)[None] - 1 < lengths[:, None]
    mask[:, 0] = False
    spread = (logps / lengths)[:, None] * mask[:, 1:]
    zeros = torch.zeros_like(spread)
    model = SimpleNamespace(log_probs=spread, entropy=zeros, mean_logits=zeros, is_top1=mask[:, 1:])
    ids = torch.ones(mask.shape, dtype=torch.long)
    inputs = {"input_ids": ids, "attention_mask": ids, "completion_mask": mask.long()}
    return inputs, lambda **kwargs: model


def trl_pair_loss(trainer: Any, pairs: Pairs, **settings: Any) -> list[float]:
    """DPOTrainer's loss of each pair; it knows only means, so pairs go in one by one."""
    losses = []
    for i in range(len(pairs.chosen_logp)):
        logps = torch.stack([pairs.chosen_logp[i], pairs.rejected_logp[i]])
        inputs, model = trl_outputs(logps, torch.stack([pairs.chosen_length[i], pairs.rejected_length[i]]))
        inputs["ref_chosen_logps"] = _given(pairs.chosen_reference_logp)[i : i + 1]
        inputs["ref_rejected_logps"] = _given(pairs.rejected_reference_logp)[i : i + 1]
        myself = trl_self(
            ld_alpha=None, f_divergence_type="reverse_kl", loss_weights=[1.0], use_weighting=False, **settings
        )
        losses.append(float(trainer._compute_loss(myself, model, inputs, False)))
    return losses


def _given(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def agree(losses: Tensor, theirs: Any) -> None:
    torch.testing.assert_close(losses.double(), torch.as_tensor(theirs).double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("beta", [0.01, 0.1, 0.5])
def test_dpo_and_ipo_agree_with_trl(trl: SimpleNamespace, beta: float) -> None:
    pairs = random_pairs()
    agree(Dpo(beta=beta)(pairs), trl_pair_loss(trl.dpo, pairs, beta=beta, loss_types=["sigmoid"]))
    agree(Ipo(beta=beta)(pairs), trl_pair_loss(trl.dpo, pairs, beta=beta, loss_types=["ipo"]))


def test_label_smoothing_agrees_with_trl(trl: SimpleNamespace) -> None:
    """TRL keeps it in CPO, which is DPO of a difference of two log-probs; here they are the gap and 0."""
    pairs = random_pairs()
    myself = trl_self(beta=0.1, label_smoothing=0.2, loss_type="sigmoid", alpha=0.0)
    theirs = trl.cpo.cpo_loss(myself, pairs.log_ratio_gap, torch.zeros(8).double())[0]
    agree(Dpo(beta=0.1, label_smoothing=0.2)(pairs), theirs)


def test_simpo_agrees_with_trl(trl: SimpleNamespace) -> None:
    """TRL's simpo_gamma is absolute: beta 10 and ratio .3 are gamma 3."""
    pairs = random_pairs()
    myself = trl_self(beta=10.0, simpo_gamma=3.0, label_smoothing=0.0, loss_type="simpo", alpha=0.0)
    agree(Simpo()(pairs), trl.cpo.cpo_loss(myself, pairs.chosen_mean_logp, pairs.rejected_mean_logp)[0])


def test_the_odds_ratio_of_orpo_agrees_with_trl(trl: SimpleNamespace) -> None:
    """TRL returns beta log s(log odds ratio), in float32, and subtracts it from the likelihood term later."""
    pairs = random_pairs()
    theirs = trl.orpo.odds_ratio_loss(trl_self(beta=0.7), pairs.chosen_mean_logp, pairs.rejected_mean_logp)[0]
    agree(Orpo(odds_weight=0.7)(pairs) + pairs.chosen_mean_logp, -theirs.double())


def test_sppo_of_a_sure_winner_agrees_with_trl(trl: SimpleNamespace) -> None:
    """TRL's hard form takes the winner's probability for 1: at beta 0.2 it asks for (1 - 1/2) / 0.2 = 2.5 nats. Here
    a winner of two beats itself half the time: (3/4 - 1/2) / 0.1 is the same. TRL adds the squares, we average."""
    pairs = random_pairs()
    rewards = torch.tensor([[60.0, -60.0]]).double().expand(8, 2)
    pairs = dataclasses.replace(pairs, chosen_reward=rewards[:, 0], rejected_reward=rewards[:, 1], rewards=rewards)
    theirs = trl_pair_loss(trl.dpo, pairs, beta=0.2, loss_types=["sppo_hard"])
    agree(2 * Sppo(beta=0.1)(pairs), theirs)


@pytest.mark.parametrize("mismatched", [1.3, -0.4])
def test_kto_agrees_with_trl(trl: SimpleNamespace, mismatched: float) -> None:
    pairs = dataclasses.replace(random_pairs(), mismatched_log_ratio=mismatched)
    losses = []
    for i in range(8):
        logps = torch.stack([pairs.chosen_logp[i], pairs.rejected_logp[i]])
        inputs, model = trl_outputs(logps, torch.stack([pairs.chosen_length[i], pairs.rejected_length[i]]))
        inputs["label"] = torch.tensor([True, False])
        references = (_given(pairs.chosen_reference_logp)[i], _given(pairs.rejected_reference_logp)[i])
        inputs["ref_logps"] = torch.stack(references)
        inputs["ref_KL_logps"] = torch.zeros(2).double()
        myself = trl_self(
            beta=0.1,
            desirable_weight=1.1,
            undesirable_weight=0.9,
            loss_type="kto",
            calculate_KL=True,
            _compute_kl_logps=lambda model, batch: torch.full((2,), mismatched).double(),
        )
        losses.append(float(trl.kto._compute_loss(myself, model, inputs, False)))
    agree(Kto(beta=0.1, desirable_weight=1.1, undesirable_weight=0.9)(pairs), losses)
