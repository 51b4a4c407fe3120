"""Losses of chosen/rejected pairs: one frozen dataclass per paper, its hyper-parameters the fields.

A loss maps `Pairs` to one value per pair; train takes their mean. Log-probs are sums over a response's
tokens, in nats. Each class says what train must hand over beyond the policy's log-probs and the lengths:

    needs_reference     log-probs under the reference
    needs_rewards       the reward model's numbers, not only which response they chose
    needs_all_rewards   the rewards of all N responses to a prompt
    needs_mismatched    the mean log_ratio of mismatched prompts and responses

A loss that lacks what it needs raises ValueError. In the docstrings L is a response's log-prob, D its
log_ratio, |y| its length in tokens and r its reward; w marks the chosen response, l the rejected one; s is
the sigmoid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_pipeline.core.command import BadUse, What

V = TypeVar("V")
LARGEST_MEAN_LOGP = -1e-6
"""A mean log-prob nearer to 0 is a rounding error of float32, and odds of probability 1 are infinite."""


@dataclass(frozen=True)
class Pairs:
    """What a loss may see of B pairs. Tensors are (B,) float32 unless said."""

    chosen_logp: Tensor
    """nats, under the policy, with gradient"""
    rejected_logp: Tensor
    chosen_length: Tensor
    """tokens, at least 1"""
    rejected_length: Tensor
    chosen_reward: Tensor
    """reward units"""
    rejected_reward: Tensor
    chosen_reference_logp: Tensor | None = None
    """nats, under the reference"""
    rejected_reference_logp: Tensor | None = None
    rewards: Tensor | None = None
    """(B, N) rewards of all responses to the prompt, those two among them; NaN where one has none"""
    mismatched_log_ratio: float | None = None
    """nats: the mean over the whole update, on all ranks, of its prompts with responses to other prompts"""

    @property
    def chosen_log_ratio(self) -> Tensor:
        return self.chosen_logp - _given(self.chosen_reference_logp, "chosen_reference_logp")

    @property
    def rejected_log_ratio(self) -> Tensor:
        return self.rejected_logp - _given(self.rejected_reference_logp, "rejected_reference_logp")

    @property
    def log_ratio_gap(self) -> Tensor:
        return self.chosen_log_ratio - self.rejected_log_ratio

    @property
    def reward_margin(self) -> Tensor:
        return self.chosen_reward - self.rejected_reward

    @property
    def chosen_mean_logp(self) -> Tensor:
        """nats per token"""
        return _per_token(self.chosen_logp, self.chosen_length)

    @property
    def rejected_mean_logp(self) -> Tensor:
        """nats per token"""
        return _per_token(self.rejected_logp, self.rejected_length)


@dataclass(frozen=True)
class Rebel:
    """(D_w - D_l - eta (r_w - r_l))^2: regress the log_ratio_gap on eta times the reward_margin.

    Gao et al. 2024 (REBEL, arXiv 2404.16767), algorithm 1, has ((D_w - D_l) / eta - (r_w - r_l))^2. This is
    the form of the authors' code, eta^2 times the paper's: the same minimum, but gradients that Adam's
    epsilon does not swallow at a large eta.
    """

    needs_reference: ClassVar[bool] = True
    needs_rewards: ClassVar[bool] = True
    needs_all_rewards: ClassVar[bool] = False
    needs_mismatched: ClassVar[bool] = False

    eta: What[float] = 1e6
    """Nats of log_ratio_gap asked for per unit of reward_margin; the authors' 1e6 is far out of reach."""
    target_gap: What[float | None] = None
    """Instead of eta: nats of log_ratio_gap asked of a pair with the mean reward_margin, for example 3."""

    def __call__(self, pairs: Pairs) -> Tensor:
        """(B,). Raises ValueError while target_gap still waits to become an eta."""
        if self.target_gap is not None:
            raise ValueError("target_gap must be turned into eta = target_gap / mean reward_margin first")
        return (pairs.log_ratio_gap - self.eta * pairs.reward_margin) ** 2


@dataclass(frozen=True)
class Dpo:
    """-log s(beta (D_w - D_l)); with label smoothing e, (1 - e) of it and e of the swapped pair's loss.

    Rafailov et al. 2023 (DPO, arXiv 2305.18290), equation 7. The smoothing is Mitchell's conservative DPO
    (2023, "A note on DPO with noisy preferences and relationship to IPO"). The default beta is what the
    SimPO authors found for Llama-3-8B-Instruct (github.com/princeton-nlp/SimPO); DPO's own is 0.1.
    """

    needs_reference: ClassVar[bool] = True
    needs_rewards: ClassVar[bool] = False
    needs_all_rewards: ClassVar[bool] = False
    needs_mismatched: ClassVar[bool] = False

    beta: What[float] = 0.01
    """Strength with which the policy is held to the reference: a smaller beta lets it move further."""
    label_smoothing: What[float] = 0.0
    """Probability that a pair's label is wrong, below 0.5."""

    def __call__(self, pairs: Pairs) -> Tensor:
        """(B,)"""
        logits = self.beta * pairs.log_ratio_gap
        right, swapped = -F.logsigmoid(logits), -F.logsigmoid(-logits)
        return (1 - self.label_smoothing) * right + self.label_smoothing * swapped


@dataclass(frozen=True)
class Ipo:
    """(D_w - D_l - 1 / (2 beta))^2, each D divided by |y| if `length_normalize`.

    Azar et al. 2023 (IPO, arXiv 2310.12036), equation 17; beta is its tau. The equation as printed has the
    log-probs of whole responses, so sums over tokens (`length_normalize=False`). The mean over tokens, the
    default here, is what TRL computes; its maintainers say that the authors confirmed it as the form behind
    the paper's results.
    """

    needs_reference: ClassVar[bool] = True
    needs_rewards: ClassVar[bool] = False
    needs_all_rewards: ClassVar[bool] = False
    needs_mismatched: ClassVar[bool] = False

    beta: What[float] = 0.1
    """The paper's tau: the gap asked for is 1 / (2 beta) nats, per token if length_normalize."""
    length_normalize: What[bool] = True
    """Log-ratios are means over a response's tokens; without it sums, as the paper's equation reads."""

    def __call__(self, pairs: Pairs) -> Tensor:
        """(B,)"""
        gap = pairs.log_ratio_gap
        if self.length_normalize:
            chosen = _per_token(pairs.chosen_log_ratio, pairs.chosen_length)
            gap = chosen - _per_token(pairs.rejected_log_ratio, pairs.rejected_length)
        return (gap - 1 / (2 * self.beta)) ** 2


@dataclass(frozen=True)
class Simpo:
    """-log s(beta (L_w / |y_w| - L_l / |y_l|) - gamma), gamma = beta gamma_beta_ratio; no reference.

    Meng et al. 2024 (SimPO, arXiv 2405.14734), equation 6. The defaults are the authors' v0.2 for
    Llama-3-8B-Instruct on ArmoRM's labels.
    """

    needs_reference: ClassVar[bool] = False
    needs_rewards: ClassVar[bool] = False
    needs_all_rewards: ClassVar[bool] = False
    needs_mismatched: ClassVar[bool] = False

    beta: What[float] = 10.0
    """Scale of the mean log-probs."""
    gamma_beta_ratio: What[float] = 0.3
    """gamma / beta: the lead in mean log-prob, nats per token, at which a pair counts as even."""

    def __call__(self, pairs: Pairs) -> Tensor:
        """(B,)"""
        gap = pairs.chosen_mean_logp - pairs.rejected_mean_logp
        return -F.logsigmoid(self.beta * (gap - self.gamma_beta_ratio))


@dataclass(frozen=True)
class Kto:
    """Mean of desirable_weight (1 - s(beta (D_w - z))) and undesirable_weight (1 - s(beta (z - D_l))).

    Ethayarajh et al. 2024 (KTO, arXiv 2402.01306), equation 8, with each pair as one desirable and one
    undesirable example. z = max(0, mismatched_log_ratio) estimates KL(policy || reference), without gradient.
    """

    needs_reference: ClassVar[bool] = True
    needs_rewards: ClassVar[bool] = False
    needs_all_rewards: ClassVar[bool] = False
    needs_mismatched: ClassVar[bool] = True

    beta: What[float] = 0.1
    """Risk aversion: how fast the value of a response saturates with its distance from z."""
    desirable_weight: What[float] = 1.0
    """Weight of the chosen responses."""
    undesirable_weight: What[float] = 1.0
    """Weight of the rejected responses."""

    def __call__(self, pairs: Pairs) -> Tensor:
        """(B,)"""
        mismatched = _given(pairs.mismatched_log_ratio, "mismatched_log_ratio")
        z = max(mismatched, 0.0)  # in this order nan stays nan
        desirable = torch.sigmoid(-self.beta * (pairs.chosen_log_ratio - z))
        undesirable = torch.sigmoid(-self.beta * (z - pairs.rejected_log_ratio))
        return (self.desirable_weight * desirable + self.undesirable_weight * undesirable) / 2


@dataclass(frozen=True)
class Orpo:
    """-L_w / |y_w| - odds_weight log s(log odds_w - log odds_l), odds = p / (1 - p), p = exp(L / |y|).

    Hong et al. 2024 (ORPO, arXiv 2403.07691), equations 4 to 7; no reference. The first term is over the
    response; TRL also takes the prompt's tokens there, and divides by the tokens of the batch instead of
    each response's.
    """

    needs_reference: ClassVar[bool] = False
    needs_rewards: ClassVar[bool] = False
    needs_all_rewards: ClassVar[bool] = False
    needs_mismatched: ClassVar[bool] = False

    odds_weight: What[float] = 0.1
    """Weight of the odds ratio next to the likelihood of the chosen response: the paper's lambda."""

    def __call__(self, pairs: Pairs) -> Tensor:
        """(B,)"""
        odds_ratio = _log_odds(pairs.chosen_mean_logp) - _log_odds(pairs.rejected_mean_logp)
        return -pairs.chosen_mean_logp - self.odds_weight * F.logsigmoid(odds_ratio)


@dataclass(frozen=True)
class Sppo:
    """((D_w - (P_w - 1/2) / beta)^2 + (D_l - (P_l - 1/2) / beta)^2) / 2, P_i = mean_j s((r_i - r_j) / T).

    Wu et al. 2024 (SPPO, arXiv 2405.00675), equation 4.7; beta is 1 / eta there. P_i is the probability,
    under Bradley-Terry, that response i beats one of the N of its prompt, itself included. T is 1 in the
    authors' code.
    """

    needs_reference: ClassVar[bool] = True
    needs_rewards: ClassVar[bool] = True
    needs_all_rewards: ClassVar[bool] = True
    needs_mismatched: ClassVar[bool] = False

    beta: What[float] = 0.001
    """A sure winner is asked for a log_ratio of 1 / (2 beta) nats, a sure loser for minus that."""
    reward_temperature: What[float] = 1.0
    """Reward units that make odds of e: 1 fits PairRM; ArmoRM's rewards differ by hundredths."""

    def __call__(self, pairs: Pairs) -> Tensor:
        """(B,)"""
        rewards = _given(pairs.rewards, "rewards")
        chosen_target = (self._win_probability(pairs.chosen_reward, rewards) - 0.5) / self.beta
        rejected_target = (self._win_probability(pairs.rejected_reward, rewards) - 0.5) / self.beta
        chosen = (pairs.chosen_log_ratio - chosen_target) ** 2
        return (chosen + (pairs.rejected_log_ratio - rejected_target) ** 2) / 2

    def _win_probability(self, reward: Tensor, rewards: Tensor) -> Tensor:
        """(B,) from reward (B,) and rewards (B, N)"""
        return torch.sigmoid((reward[:, None] - rewards) / self.reward_temperature).nanmean(dim=1)


Loss = Rebel | Dpo | Ipo | Simpo | Kto | Orpo | Sppo


def with_sft_term(losses: Tensor, pairs: Pairs, weight: float) -> Tensor:
    """(B,) losses + weight times the chosen response's negative log-prob per token.

    The term of iterative reasoning preference optimization: Pang et al. 2024, arXiv 2404.19733, equation 1.
    """
    return losses - weight * pairs.chosen_mean_logp


def check_values(loss: Loss, flag: str) -> None:
    """Raise BadUse for a hyper-parameter outside its range; `flag` is what precedes its name, as "--dpo"."""
    for field in fields(loss):
        value = getattr(loss, field.name)
        if value is None or isinstance(value, bool):
            continue
        if field.name == "label_smoothing":
            expected, fits = "a number from 0 to below 0.5", 0 <= value < 0.5
        elif field.name in ("gamma_beta_ratio", "desirable_weight", "undesirable_weight", "odds_weight"):
            expected, fits = "a finite number, 0 or more", 0 <= value < math.inf
        else:
            expected, fits = "a finite number above 0", 0 < value < math.inf
        if not fits:
            raise BadUse(f"{flag}.{field.name} is {value}; expected {expected}.")


def _given(value: V | None, name: str) -> V:
    if value is None:
        raise ValueError(f"this loss needs {name}, and the Pairs have none")
    return value


def _per_token(values: Tensor, lengths: Tensor) -> Tensor:
    if bool((lengths < 1).any()):
        raise ValueError("a response without tokens has no mean over them; filter drops such pairs")
    return values / lengths


def _log_odds(mean_logp: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = exp(mean_logp); expm1 keeps the digits of 1 - p where p is near 1."""
    logp = mean_logp.clamp(max=LARGEST_MEAN_LOGP)
    return logp - torch.log(-torch.expm1(logp))
