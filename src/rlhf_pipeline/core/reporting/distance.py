"""How far a policy has moved: log-probs of its own responses, under it and under the policy it started from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rlhf_pipeline.core import models, provenance, schema, storage
from rlhf_pipeline.core.batches import TokenIds, collate, plan_calls
from rlhf_pipeline.core.chat import Chat
from rlhf_pipeline.core.command import BadUse
from rlhf_pipeline.core.logps import install, response_logps
from rlhf_pipeline.core.progress import bar, say
from rlhf_pipeline.core.reporting.evaluation import LOG_PROBS, RESPONSES, log_prob, open_part, start_log_prob

SPLIT = "train"


@dataclass(frozen=True)
class Policy:
    name: str
    model: models.ModelRef
    fingerprint: str
    chat: Chat
    """That its responses were sampled in."""

    def describe(self) -> dict[str, str]:
        return {"ref": self.model.text, "fingerprint": self.fingerprint}


def write_log_probs(
    home: Path, policy: Policy, start: Policy, *, temperature: float, batch_tokens: int, config: Mapping[str, Any]
) -> None:
    """Write home/log_probs, if it isn't there: of each response in home/responses, under `policy` and under `start`.

    batch_tokens: of one forward pass, padding included. config: for provenance. Raises BadUse where the two policies
    have different tokenizers.
    """
    import pyarrow as pa

    source = open_part(home / RESPONSES)
    inputs = {"responses": source.fingerprint, "policy": policy.fingerprint, "start": start.fingerprint}
    identity = {"command": "evaluate", "what": {"temperature": temperature}, "inputs": inputs}
    with storage.open_output(home / LOG_PROBS, identity, overwrite=False) as output:
        if output.done:
            return
        if policy.chat.tokenizer_hash != start.chat.tokenizer_hash:
            raise BadUse(
                f"{policy.name} and {start.name} have different tokenizers, so there is no KL between them: "
                "pass --no_kl, or another baseline."
            )
        say(f"\nlog-probs of {policy.name}'s responses, under it and under {start.name}")
        ids, prompts, responses = encode(source, policy.chat)
        columns: dict[str, Any] = {schema.PROMPT_ID: ids}
        for model, column in ((policy, log_prob), (start, start_log_prob)):
            with bar(len(responses), "responses", f"under {model.name}") as advance:
                logps = sequence_logps(
                    models.fetch_weights(model.model, flag="--policies"),
                    prompts,
                    responses,
                    temperature=temperature,
                    batch_tokens=batch_tokens,
                    advance=advance,
                )
            table = logps.reshape(len(ids), -1)
            columns |= {column(i): table[:, i] for i in range(table.shape[1])}
        output.write_shard(SPLIT, 0, pa.table(columns))
        made = describe(source, policy, start, config)
        holds = {
            schema.PROMPT_ID: "the prompt's key",
            "response_{i}_logp": f"log-prob of the response under {policy.name}, nats, at temperature {temperature:g}",
            "response_{i}_start_logp": f"the same under {start.name}",
        }
        title = f"Log-probs of {policy.name}'s responses"
        output.publish(made, provenance.card(title=title, provenance=made, splits=[SPLIT], columns=holds))


def encode(source: storage.Source, chat: Chat) -> tuple[list[str], list[list[int]], list[list[int]]]:
    """(prompt_ids (P), prompts' ids and responses' sampled ids, (P * N) each, a prompt's N together)."""
    count = schema.count_responses(source.columns)
    ids: list[str] = []
    prompts: list[list[int]] = []
    responses: list[list[int]] = []
    for rows in source.batches([schema.PROMPT_ID, schema.PROMPT, *map(schema.response_tokens, range(count))]):
        encoded = chat.encode_prompts([row[schema.PROMPT] for row in rows])
        for row, prompt in zip(rows, encoded, strict=True):
            ids.append(row[schema.PROMPT_ID])
            prompts += [prompt] * count
            responses += [row[schema.response_tokens(i)] for i in range(count)]
    return ids, prompts, responses


@torch.no_grad()
def sequence_logps(
    folder: Path,
    prompts: Sequence[TokenIds],
    responses: Sequence[TokenIds],
    *,
    temperature: float,
    batch_tokens: int,
    advance: Callable[[int], None],
) -> npt.NDArray[np.float64]:
    """(n,) natural-log probabilities of whole responses under the policy in `folder`, at a temperature; nats.

    In float32 on CPU, on a GPU in the dtype that the policy is stored in. The model is gone when this returns.
    """
    on_gpu = torch.cuda.is_available()
    dtype = models.stored_dtype(folder) if on_gpu else torch.float32
    attention = models.choose_attention(
        "auto", models.load_config(folder), half_precision=on_gpu and dtype != torch.float32
    )
    device = "cuda" if on_gpu else "cpu"
    model = models.load_policy(folder, dtype=dtype, attn_implementation=attention)
    install(model)
    model.to(device)
    lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
    result = np.zeros(len(lengths))
    for call in plan_calls(lengths, world_size=1, max_tokens=batch_tokens)[0]:
        rows = list(call.indices)
        batch = collate([prompts[i] for i in rows], [responses[i] for i in rows], device=device)
        result[rows] = response_logps(model, batch, temperature).double().cpu().numpy()
        advance(len(rows))
    del model
    if on_gpu:
        torch.cuda.empty_cache()  # for the next model, which may be another process's
    return result


def describe(source: storage.Source, policy: Policy, start: Policy, config: Mapping[str, Any]) -> dict[str, Any]:
    import transformers

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return provenance.describe(
        command="evaluate",
        config=config,
        inputs={
            "responses": provenance.describe_source(source),
            "policy": policy.describe(),
            "start": start.describe(),
        },
        rows_in=source.num_rows,
        rows_out=source.num_rows,
        dropped={},
        engine={"name": "transformers", "version": transformers.__version__, "device": device},
    )
