"""ArmoRM, the tutorial's reward model, on transformers' own Llama: no remote code, any batch size.

Wang, Xiong, Xie, Zhao and Zhang 2024, "Interpretable Preferences via Multi-Objective Reward Modeling and
Mixture-of-Experts", arXiv 2406.12845. The last token's hidden state is mapped linearly to 19 objective
rewards; the hidden state at the end of the prompt decides, through a small network, how much each of them
counts.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from rlhf_pipeline.core.weights import check_head_shapes, check_none_missing, read_tensors, tensor_files

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaModel

OBJECTIVES = (
    "helpsteer-helpfulness",
    "helpsteer-correctness",
    "helpsteer-coherence",
    "helpsteer-complexity",
    "helpsteer-verbosity",
    "ultrafeedback-overall_score",
    "ultrafeedback-instruction_following",
    "ultrafeedback-truthfulness",
    "ultrafeedback-honesty",
    "ultrafeedback-helpfulness",
    "beavertails-is_safe",
    "prometheus-score",
    "argilla-overall_quality",
    "argilla-judge_lm",
    "code-complexity",
    "code-style",
    "code-explanation",
    "code-instruction-following",
    "code-readability",
)
"""The published model's objectives, in the order of its rows."""


class ArmoOutput(NamedTuple):
    """`score` (B,); `objectives` and `coefficients` (B, K), K objectives; score = (objectives *
    coefficients).sum(1).
    """

    score: Tensor
    objectives: Tensor
    coefficients: Tensor


class Gating(nn.Module):
    """Softmax over a ReLU network of the prompt's hidden state, times a learned scale (section 3 of the
    paper).
    """

    def __init__(self, hidden_size: int, width: int, hidden_layers: int, objectives: int, temperature: float):
        super().__init__()
        widths = [hidden_size, *[width] * hidden_layers, objectives]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.logit_scale = nn.Parameter(torch.ones(1))
        self.temperature = temperature

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, H) -> (B, K)."""
        for layer in self.layers[:-1]:
            hidden = layer(hidden).relu()
        return torch.softmax(self.layers[-1](hidden) / self.temperature, dim=1) * self.logit_scale[0]


class ArmoHead(nn.Module):
    """Regression, gating and reward transform; the names of its tensors are the checkpoint's."""

    reward_transform_matrix: Tensor

    def __init__(self, config: LlamaConfig):
        super().__init__()
        objectives = getattr(config, "num_objectives", len(OBJECTIVES))
        self.names = OBJECTIVES if objectives == len(OBJECTIVES) else tuple(f"objective_{k}" for k in range(objectives))
        self.regression_layer = nn.Linear(config.hidden_size, objectives, bias=False)
        self.register_buffer("reward_transform_matrix", torch.eye(objectives))
        self.gating = Gating(
            config.hidden_size,
            width=getattr(config, "gating_hidden_dim", 1024),
            hidden_layers=getattr(config, "gating_n_hidden", 3),
            objectives=objectives,
            temperature=getattr(config, "gating_temperature", 10.0),
        )

    def forward(self, last_hidden: Tensor, gate_hidden: Tensor) -> ArmoOutput:
        """Two (B, H) hidden states, in any dtype, -> ArmoOutput in the head's dtype."""
        dtype = self.regression_layer.weight.dtype
        objectives = self.regression_layer(last_hidden.to(dtype))
        gate = self.gating(gate_hidden.to(dtype))
        score = (gate * (objectives @ self.reward_transform_matrix)).sum(1)
        return ArmoOutput(score, objectives, gate @ self.reward_transform_matrix.T)


class ArmoModel(nn.Module):
    def __init__(self, backbone: LlamaModel, head: ArmoHead):
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, input_ids: Tensor, lengths: Tensor, gate_positions: Tensor) -> ArmoOutput:
        """`input_ids` (B, T), right-padded with any id; `lengths` (B,); `gate_positions` (B,), see
        `find_gate`.

        No attention mask: under a causal one no token sees the padding on its right, and without a second
        mask the attention runs in its fastest kernel.
        """
        hidden = self.backbone(input_ids=input_ids, use_cache=False).last_hidden_state
        rows = torch.arange(len(hidden), device=hidden.device)
        return self.head(hidden[rows, lengths - 1], hidden[rows, gate_positions])


def load_armorm(folder: Path, *, dtype: torch.dtype, head_dtype: torch.dtype, device: str) -> ArmoModel:
    """The model in `folder`, laid out as the published checkpoint: Llama tensors `model.*` and the head's
    beside them.

    The checkpoint keeps its head in float32, and so should `head_dtype`; the published code casts it to
    bfloat16, whose spacing near a reward of 0.15 is 0.001, enough to make ties common. Raises BadUse, before
    reading any weight, if the head's tensors are missing or of other shapes.
    """
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig.from_pretrained(folder)
    with torch.device("meta"):
        head = ArmoHead(config)
    files = tensor_files(folder)
    check_head_shapes(folder, files, {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()})
    head.load_state_dict(read_tensors(files, head.state_dict()), assign=True)

    class Backbone(LlamaModel):
        _keys_to_ignore_on_load_unexpected: ClassVar = [f"^{re.escape(name)}$" for name in head.state_dict()]

    backbone, report = Backbone.from_pretrained(
        folder,
        config=config,
        dtype=dtype,
        device_map={"": device},
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
    )
    check_none_missing(folder, report["missing_keys"])
    return ArmoModel(backbone, head.to(device, head_dtype)).eval()


def header_pattern(prompt_ids_of_a: Sequence[int], prompt_ids_of_b: Sequence[int]) -> tuple[int, ...]:
    """What the template puts after any last user turn: its closing token and the assistant's header.

    Taken from the tokenizer as the common end of two rendered prompts whose texts end differently. In Llama
    3: <|eot_id|> <|start_header_id|> assistant <|end_header_id|> \\n\\n, the published code's fixed ids.
    """
    length = 0
    for a, b in zip(reversed(prompt_ids_of_a), reversed(prompt_ids_of_b), strict=False):
        if a != b:
            break
        length += 1
    return tuple(prompt_ids_of_a[len(prompt_ids_of_a) - length :])


def find_gate(prompt_ids: Sequence[int], pattern: Sequence[int]) -> int | None:
    """Index of the first token of the pattern's last occurrence in the rendered prompt, header included; None
    without.

    The published code looks through prompt and response, so a response that quotes a header moves the gate
    behind itself; searching the prompt alone gives the same index for every other conversation.
    """
    for start in range(len(prompt_ids) - len(pattern), -1, -1):
        if tuple(prompt_ids[start : start + len(pattern)]) == tuple(pattern):
            return start
    return None
