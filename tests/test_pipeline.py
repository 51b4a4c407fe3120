"""The four stages end to end through their commands and real engines: vLLM, a reward function, ZeRO-3 on two processes,
and vLLM again on what was trained."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from rlhf_pipeline.core.chat import Chat
from rlhf_pipeline.core.storage import open_source

REWARD = '''
def politeness(rows):
    """Longer is better here, and a response that did not end is worth nothing."""
    return [len(row["response"]) / 10 if row["finish_reason"] == "stop" else 0.0 for row in rows]
'''

vllm_only = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here")


@pytest.fixture(scope="module")
def run(tmp_path_factory, run_command, launch, tiny_policy, tiny_prompts) -> Path:
    """The folder of a run: responses, rewards, pairs, policy, and the responses of the policy."""
    folder = tmp_path_factory.mktemp("pipeline")
    (folder / "reward.py").write_text(REWARD)

    def check(result):
        assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]

    sampling = ("--prompts", tiny_prompts, "--maxlen", 32, "--num_responses", 3, "--token_logps")
    check(run_command("generate", "--model", tiny_policy, *sampling, "--output_repo", folder / "responses"))
    reward = ("--reward_model", f"{folder}/reward.py:politeness", "--num_responses", 3)
    check(run_command("rank", "--input_repo", folder / "responses", *reward, "--output_repo", folder / "rewards"))
    shape = ("--num_responses", 3, "--min_responses", 2, "--maxlen", 32, "--maxlen_prompt", 64, "--test_size", 4)
    check(
        run_command(
            "filter",
            "--input_repo",
            folder / "rewards",
            "--model",
            tiny_policy,
            *shape,
            "--output_repo",
            folder / "pairs",
        )
    )
    train = ("--input_repo", folder / "pairs", "--base_model", tiny_policy, "--batch_size", 4, "--lr", 1e-3)
    check(launch(2, "deepspeed_config_stage_3.yaml", "train", *train, "--output_dir", folder / "policy"))
    check(run_command("generate", "--model", folder / "policy", *sampling, "--output_repo", folder / "after"))
    return folder


def provenance(run: Path, name: str) -> dict:
    return json.loads((run / name / "provenance.json").read_text())


@vllm_only
def test_provenance_names_each_engine_and_its_input(run):
    assert provenance(run, "responses")["engine"]["name"] == "vllm"
    assert provenance(run, "rewards")["engine"]["kind"] == "Python function"
    engine = provenance(run, "policy")["engine"]
    assert (engine["name"], engine["zero_stage"], engine["world_size"]) == ("deepspeed", 3, 2)
    assert provenance(run, "after")["engine"]["name"] == "vllm"
    before, after = (provenance(run, name)["inputs"]["model"]["fingerprint"] for name in ("responses", "after"))
    assert before != after
    pairs = open_source(str(run / "pairs"), flag="--x")
    assert provenance(run, "policy")["inputs"]["pairs"]["fingerprint"] == pairs.fingerprint


@vllm_only
def test_the_trained_policy_answers_differently(run):
    before, after = (list(open_source(str(run / name), flag="--x").rows()) for name in ("responses", "after"))
    assert [row["prompt_id"] for row in before] == [row["prompt_id"] for row in after]
    assert sum(a["response_0"] != b["response_0"] for a, b in zip(before, after, strict=True)) > len(before) / 2


@vllm_only
def test_sampled_ids_reach_training_as_they_were_sampled(run):
    responses = {row["prompt_id"]: row for row in open_source(str(run / "responses"), flag="--x").rows()}
    for row in open_source(str(run / "pairs"), flag="--x").rows():
        for side in ("chosen", "rejected"):
            ids = row[f"{side}_tokens"][: row[f"{side}_length"]]
            assert ids == responses[row["prompt_id"]][f"response_{row[f'{side}_index']}_tokens"]


@vllm_only
def test_vllms_log_probs_of_what_it_sampled_are_ours_at_temperature_1(run, tiny_policy):
    from rlhf_pipeline.core.batches import collate
    from rlhf_pipeline.core.logps import install, token_logps
    from rlhf_pipeline.core.models import load_policy

    model, chat = load_policy(tiny_policy, dtype=torch.float32, attn_implementation="sdpa"), Chat.load(tiny_policy)
    install(model)
    rows = list(open_source(str(run / "responses"), flag="--x").rows())
    prompts = chat.encode_prompts([row["prompt"] for row in rows])
    with torch.no_grad():
        ours = token_logps(model, collate(prompts, [row["response_0_tokens"] for row in rows]), 1.0)
    theirs = torch.tensor([logp for row in rows for logp in row["response_0_token_logps"]])
    assert len(theirs) > 100
    assert (ours - theirs).abs().max() < 1e-4
