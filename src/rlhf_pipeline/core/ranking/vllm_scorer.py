"""Sequence classifiers in vLLM: for reward models that it has code for, the same rewards to rounding."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_pipeline.core import vllm_engine
from rlhf_pipeline.core.command import WorkFailed
from rlhf_pipeline.core.ranking.network_scorers import (
    Encoded,
    Row,
    Score,
    ScoringOptions,
    encode_rows,
    finite,
    resolve_dtype,
)

if TYPE_CHECKING:
    from rlhf_pipeline.core.chat import Chat

LINEAR_HEAD = {"score.weight", "score.bias"}
"""The head that vLLM puts on a language model: one linear layer at the last token."""
MEMORY_SHARE = 0.9
"""Of a GPU, for all engines on it together."""
LAUNCHER = ("TORCHELASTIC_USE_AGENT_STORE", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
"""Variables of a launcher in which vLLM's one process would see a process group to join."""
VISIBLE = "CUDA_VISIBLE_DEVICES"


def refusal(head: Collection[str], *, armorm: bool, trust_remote_code: bool) -> str | None:
    """Why vLLM can't run a reward model whose head has these tensors; None if it can, should it know the backbone."""
    if armorm:
        return "it is an ArmoRM, whose gate reads a token of the prompt, and vLLM reads the last token alone"
    if not set(head) <= LINEAR_HEAD:
        return f"its reward head is {', '.join(sorted(head))}, and vLLM's is one linear layer named score"
    if trust_remote_code:
        return "vLLM runs its own code, not the repo's that --trust_remote_code asks for"
    return None


class VllmClassifier:
    """A reward model with a linear head `score` in vLLM's pooling runner: the raw logit at the last token.

    A prompt is computed once for its responses where it fills a block of vLLM's prefix cache (16 tokens on a GPU, 128
    on a CPU). Raises WorkFailed if vLLM refuses the model or the machine.
    """

    objectives: tuple[str, ...] = ()
    has_coefficients = False

    def __init__(self, folder: Path, chat: Chat, options: ScoringOptions, engine: dict[str, Any]):
        self._chat = chat
        self.engine = engine
        self._llm = _start(folder, options, engine["max_length"])
        vllm_engine.wake_when_dead(self._llm.llm_engine.engine_core)

    def score(self, rows: Sequence[Row]) -> list[Score]:
        """Raises WorkFailed when the engine dies or fails."""
        scores, waiting = encode_rows(rows, self._encode, self.engine["max_length"])
        together = sorted(waiting, key=lambda i: waiting[i].ids)  # responses that share a prompt, one after another
        logits = self._logits([waiting[i].ids for i in together])
        scores |= {i: finite(logit - self.engine["reward_offset"]) for i, logit in zip(together, logits, strict=True)}
        return [scores[i] for i in range(len(rows))]

    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()

    def _encode(self, row: Row) -> Encoded | str:
        return Encoded(self._chat.conversation_ids(row["prompt"], row["response"]))

    def _logits(self, conversations: Sequence[list[int]]) -> list[float]:
        if not conversations:
            return []  # which vLLM refuses
        from vllm import PoolingParams
        from vllm.inputs import TokensPrompt
        from vllm.v1.engine.exceptions import EngineDeadError

        prompts = [TokensPrompt(prompt_token_ids=ids) for ids in conversations]
        raw = PoolingParams(use_activation=False)  # by default a classifier of one label gets a sigmoid
        try:
            outputs = self._llm.encode(prompts, pooling_params=raw, pooling_task="classify", use_tqdm=False)
        except (EngineDeadError, RuntimeError) as error:  # RuntimeError: out of memory, or a worker process is gone
            raise WorkFailed(
                f"vLLM has stopped working ({type(error).__name__}: {error}); what is finished is kept: "
                "run the same command again."
            ) from error
        return [float(output.outputs.data) for output in outputs]


def _start(folder: Path, options: ScoringOptions, max_length: int) -> Any:
    on_cpu = vllm_engine.set_environment()
    given: dict[str, Any] = {}
    if options.batch_tokens is not None:
        given["max_num_batched_tokens"] = options.batch_tokens
    with _alone_on(options.device):
        from vllm import LLM

        try:
            return LLM(
                str(folder),
                runner="pooling",
                convert="classify",
                model_impl="vllm",
                dtype=str(resolve_dtype(options)).removeprefix("torch."),  # its "auto" would round float32
                hf_overrides={"head_dtype": options.head_dtype},
                max_model_len=max_length,
                enable_prefix_caching=True,
                enforce_eager=on_cpu,
                gpu_memory_utilization=MEMORY_SHARE / options.engines,
                use_tqdm_on_load=False,
                **given,
            )
        except (RuntimeError, ValueError) as error:
            raise WorkFailed(f"vLLM can't start on {folder}: {error}") from error


@contextlib.contextmanager
def _alone_on(device: str) -> Iterator[None]:
    """An environment in which vLLM sees this process's GPU alone, and nothing of the launcher that started it."""
    before = {name: os.environ.pop(name, None) for name in (*LAUNCHER, VISIBLE)}
    visible, index = before[VISIBLE], device.partition(":")[2]
    if index:
        os.environ[VISIBLE] = visible.split(",")[int(index)] if visible else index
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
