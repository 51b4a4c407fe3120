"""Responses from a policy: token ids in, token ids out, by vLLM or by transformers.

Both samplers take requests one by one from an iterator and give samples as they finish, in any order. What a
request gets depends on its prompt and its seed, not on the requests beside it, so that a killed run may ask
for the rest alone.
"""

from __future__ import annotations

import copy
import hashlib
import json
import multiprocessing
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rlhf_pipeline.core import vllm_engine
from rlhf_pipeline.core.command import How, What, WorkFailed, die_with_parent

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FinishReason = Literal["stop", "length"]

QUEUE_DEPTH = 3
"""Requests that vLLM holds, in multiples of max_num_seqs: one runs and two wait, since all that run may
finish in one step, and vLLM's own process works on while this one writes."""
CPU_BATCHED_TOKENS = 4096
"""Prompt tokens that vLLM computes in one step on CPU, if the longest prompt allows."""

MAX_ROWS = 256
"""Responses that the transformers sampler computes at the same time, unless max_num_seqs says otherwise."""
CPU_CACHE_BYTES = 4 * 1024**3
"""What their keys and values may take on CPU, if all of them grew to the longest. On a GPU: half of the free
memory."""
LOOK_AHEAD = 4096
"""Requests among which it looks for prompts of like length."""


@dataclass(frozen=True)
class Request:
    """One response wanted. `key` comes back in its sample. prompt: text or messages, where there are no ids."""

    key: int
    prompt_ids: tuple[int, ...]
    seed: int
    prompt: Any = None

    @property
    def engine_seed(self) -> int:
        """31 bits that belong to the seed and the prompt, which is what an engine is given.

        generate gives response i of every prompt the same seed. An engine that got that alone would draw the same
        noise for all prompts: their first tokens would agree, and means over prompts would not settle.
        """
        digest = hashlib.sha256(repr((self.seed, self.prompt_ids or self.prompt)).encode()).digest()
        return int.from_bytes(digest[:4], "big") >> 1


@dataclass(frozen=True)
class Sample:
    """One response as sampled.

    token_ids: with the stop id if one was emitted. text: token_ids without it, special tokens left out.
    token_logps: natural-log probabilities of token_ids at temperature 1 and without top-p, if asked for.
    error: why there is no response; then text and finish_reason are None. Only an endpoint has such.
    """

    key: int
    token_ids: list[int]
    text: str | None
    finish_reason: FinishReason | None
    token_logps: list[float] | None = None
    error: str | None = None


@dataclass(frozen=True)
class SamplingSettings:
    """temperature 0 is greedy; max_tokens counts new tokens, the stop id included; any of stop_ids ends a
    response; token_logps asks for the sampled tokens' log-probabilities.
    """

    temperature: float = 0.8
    top_p: float = 0.9
    max_tokens: int = 2048
    stop_ids: tuple[int, ...] = ()
    token_logps: bool = False


@dataclass(frozen=True)
class EngineOptions:
    dtype: What[Literal["auto", "float32", "bfloat16", "float16"]] = "auto"
    """Numbers the policy computes with; auto: those its checkpoint is stored in."""
    quantization: What[str | None] = None
    """A quantization method of vLLM's, for example fp8."""
    max_model_len: How[int | None] = None
    """Longest prompt + response, in tokens. Default: the model's window, or less if the prompts need less."""
    max_num_seqs: How[int | None] = None
    """Responses computed at the same time. Default: the engine's choice."""
    gpu_memory_utilization: How[float] = 0.9
    """Share of each GPU's memory that vLLM takes."""
    enforce_eager: How[bool] = False
    """Do not let vLLM compile the model (on CPU it never does)."""
    distributed_executor_backend: How[Literal["mp", "ray"] | None] = None
    """How vLLM starts the processes of one model. ray: on the machines of a Ray cluster that is up; see
    docs/generate.md."""


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], finish_reason: FinishReason) -> str:
    """The text of a response: without the stop id that ended it, and without special tokens."""
    kept = token_ids[:-1] if finish_reason == "stop" else token_ids
    text = tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return str(text)


# vLLM


class VllmSampler:
    """A vLLM engine over a model folder; `tensor_parallel_size` GPUs, or groups of CPU cores, work as one.

    dtype and max_model_len: what `options` say, resolved. Raises WorkFailed if vLLM refuses the model or the machine.
    """

    def __init__(
        self,
        model: Path,
        tokenizer: PreTrainedTokenizerBase,
        settings: SamplingSettings,
        options: EngineOptions,
        *,
        dtype: str,
        max_model_len: int,
        tensor_parallel_size: int = 1,
        batch_invariant: bool = False,
    ):
        on_cpu = vllm_engine.set_environment(tensor_parallel_size, batch_invariant=batch_invariant)
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        self.tokenizer = tokenizer
        self._params = SamplingParams(
            temperature=settings.temperature,
            top_p=settings.top_p,
            max_tokens=settings.max_tokens,
            stop_token_ids=list(settings.stop_ids),
            ignore_eos=True,  # vLLM would add the eos id of config.json to ours
            logprobs=0 if settings.token_logps else None,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        self._engine = _start_vllm(
            vllm_arguments(
                model,
                options,
                on_cpu=on_cpu,
                dtype=dtype,
                max_model_len=max_model_len,
                tensor_parallel_size=tensor_parallel_size,
            )
        )
        self._step_under_way: object = None
        vllm_engine.wake_when_dead(self._engine.engine_core, lambda: self._step_under_way)
        config = self._engine.vllm_config
        self.max_num_seqs: int = config.scheduler_config.max_num_seqs
        self.fewest_waiting: int | None = None
        """Fewest requests that waited for a place while the iterator still had some."""
        self.engine = _describe_vllm(config, on_cpu, batch_invariant)

    @property
    def unfinished(self) -> int:
        """Requests that run or wait."""
        return self._engine.get_num_unfinished_requests()

    def sample(self, requests: Iterable[Request]) -> Iterator[Sample]:
        """Samples as they finish. Raises WorkFailed when the engine dies, fails or hangs."""
        left = iter(requests)
        while self._fill(left) or self.unfinished:
            yield from self.step()

    def add(self, request: Request) -> None:
        """Queue a request. Raises WorkFailed when the engine has died."""
        from vllm.inputs import TokensPrompt

        own = copy.copy(self._params)  # vLLM makes itself a deep copy
        own.seed = request.engine_seed
        with vllm_engine.explained():
            self._engine.add_request(str(request.key), TokensPrompt(prompt_token_ids=list(request.prompt_ids)), own)

    def step(self) -> list[Sample]:
        """One more token for all that run; what finished with it. Raises WorkFailed as `sample` does."""
        self._step_under_way = object()
        try:
            with vllm_engine.explained():
                return [self._to_sample(output) for output in self._engine.step()]
        finally:
            self._step_under_way = None

    def close(self) -> None:
        self._engine.engine_core.shutdown()

    def _fill(self, left: Iterator[Request]) -> bool:
        """Queue requests up to QUEUE_DEPTH; False when there were none left."""
        queued = self.unfinished
        waiting = max(queued - self.max_num_seqs, 0)
        wanted = QUEUE_DEPTH * self.max_num_seqs - queued
        added = 0
        for request in islice(left, max(wanted, 0)):
            self.add(request)
            added += 1
        if added and queued and (self.fewest_waiting is None or waiting < self.fewest_waiting):
            self.fewest_waiting = waiting
        return added > 0

    def _to_sample(self, output: Any) -> Sample:
        result = output.outputs[0]
        token_ids = list(result.token_ids)
        logps = None
        if result.logprobs is not None:
            logps = [float(at[token].logprob) for at, token in zip(result.logprobs, token_ids, strict=True)]
        text = decode(self.tokenizer, token_ids, result.finish_reason)
        return Sample(int(output.request_id), token_ids, text, result.finish_reason, logps)


def vllm_arguments(
    model: Path,
    options: EngineOptions,
    *,
    on_cpu: bool,
    dtype: str,
    max_model_len: int,
    tensor_parallel_size: int = 1,
) -> dict[str, Any]:
    """What vLLM's engine is started with."""
    arguments = {
        **asdict(options),
        "model": str(model),
        "dtype": dtype,
        "max_model_len": max_model_len,
        "tensor_parallel_size": tensor_parallel_size,
        "enforce_eager": options.enforce_eager or on_cpu,
        "skip_tokenizer_init": True,
        "generation_config": "vllm",  # not the model's: the settings are all that counts
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    if on_cpu:
        # vLLM 0.32 rewinds the generator of a request whose prompt it cut in two, and a CPU generator can't be rewound.
        tokens = max(max_model_len, CPU_BATCHED_TOKENS)
        arguments |= {"enable_chunked_prefill": False, "max_num_batched_tokens": tokens}
    return arguments


def _start_vllm(arguments: dict[str, Any]) -> Any:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.llm_engine import LLMEngine

    try:
        return LLMEngine.from_engine_args(EngineArgs(**arguments), usage_context=UsageContext.LLM_CLASS)
    except (RuntimeError, ValueError) as error:
        raise WorkFailed(f"vLLM can't start on {arguments['model']}: {error}") from error


def checkpoint_dtype(model: Path) -> str:
    """The dtype a model folder is stored in; vLLM's own "auto" would round a float32 policy to 16 bits."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    return str(config.get("dtype") or config.get("torch_dtype") or "auto")


def end_with_parent() -> None:
    """vLLM's plugin, named in pyproject.toml: its core process ends when the one that started it is killed.

    vLLM 0.32 alone would leave it behind, with the GPUs' memory.
    """
    if vllm_engine.ENDS_WITH_PARENT in os.environ and multiprocessing.parent_process() is not None:
        die_with_parent()


def _describe_vllm(config: Any, on_cpu: bool, batch_invariant: bool) -> dict[str, Any]:
    import vllm

    return {
        "name": "vllm",
        "version": vllm.__version__,
        "device": "cpu" if on_cpu else _gpu_name(),
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
        "quantization": config.model_config.quantization,
        "tensor_parallel_size": config.parallel_config.tensor_parallel_size,
        "max_model_len": config.model_config.max_model_len,
        "max_num_seqs": config.scheduler_config.max_num_seqs,
        "batch_invariant": batch_invariant,
    }


def _gpu_name() -> str:
    import torch

    return torch.cuda.get_device_name()


# transformers


class TransformersSampler:
    """Samples from a loaded model, for machines without vLLM.

    Prompts of like length share a batch, and a prompt is computed once for all its responses.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: SamplingSettings,
        *,
        max_model_len: int,
        max_num_seqs: int | None = None,
    ):
        import transformers

        self.model = model.eval()
        self.tokenizer = tokenizer
        self.settings = settings
        self.max_model_len = max_model_len
        self.max_num_seqs = max_num_seqs or rows_that_fit(model, max_model_len)
        self.engine = {
            "name": "transformers",
            "version": transformers.__version__,
            "device": "cpu" if model.device.type == "cpu" else _gpu_name(),
            "dtype": str(model.dtype).removeprefix("torch."),
            "max_model_len": max_model_len,
            "max_num_seqs": self.max_num_seqs,
        }

    def sample(self, requests: Iterable[Request]) -> Iterator[Sample]:
        """Samples as they finish, batch by batch. Prompts must be shorter than max_model_len."""
        left = iter(requests)
        while ahead := list(islice(left, LOOK_AHEAD)):
            for batch in _batches(ahead, self.max_num_seqs):
                yield from self._sample_batch(batch)

    def _sample_batch(self, requests: Sequence[Request]) -> Iterator[Sample]:
        from rlhf_pipeline.core.generation.decoding import Row, decode_batch

        settings = self.settings
        rows = [
            Row(
                request.key,
                request.prompt_ids,
                request.engine_seed,
                max_tokens=min(settings.max_tokens, self.max_model_len - len(request.prompt_ids)),
            )
            for request in requests
        ]
        for row in decode_batch(
            self.model,
            rows,
            temperature=settings.temperature,
            top_p=settings.top_p,
            stop_ids=settings.stop_ids,
            want_logps=settings.token_logps,
        ):
            finish_reason: FinishReason = "stop" if row.stopped else "length"
            text = decode(self.tokenizer, row.token_ids, finish_reason)
            logps = row.logps if settings.token_logps else None
            yield Sample(row.key, row.token_ids, text, finish_reason, logps)

    def close(self) -> None:
        """Nothing to shut down; the memory goes with the model."""


def rows_that_fit(model: PreTrainedModel, length: int) -> int:
    """How many sequences of `length` tokens may have their keys and values in memory, at most MAX_ROWS."""
    import torch

    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * heads * size * model.dtype.itemsize
    memory = CPU_CACHE_BYTES
    if model.device.type == "cuda":
        memory = torch.cuda.mem_get_info(model.device)[0] // 2
    return max(1, min(MAX_ROWS, memory // (per_token * length)))


def _batches(requests: Sequence[Request], size: int) -> Iterator[list[Request]]:
    """At most `size` requests at a time whose prompts have one padded width, those of one prompt together."""
    from rlhf_pipeline.core.generation.decoding import padded_width

    ordered = sorted(requests, key=lambda request: (padded_width(len(request.prompt_ids)), request.prompt_ids))
    for _, group in groupby(ordered, key=lambda request: padded_width(len(request.prompt_ids))):
        while batch := list(islice(group, size)):
            yield batch
