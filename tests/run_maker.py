"""A run folder as a demo leaves it, made in seconds without an engine: real questions, real judges, real file formats.

What the policies say is drawn from the tiny world's styles, in shares that shift from iteration to iteration the way
RLHF on a biased reward shifts them: first to politeness, then to flattery.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa

from rlhf_pipeline.core import provenance, schema, storage
from rlhf_pipeline.core.files import write_json
from rlhf_pipeline.core.reporting import evaluation
from rlhf_pipeline.core.world.demonstrations import STYLES
from rlhf_pipeline.core.world.judges import gold_of, look_at, utility_of
from rlhf_pipeline.core.world.questions import Prompt, every_prompt

SHARES = (
    {name: share for name, (share, _) in STYLES.items()},
    {"polite": 0.27, "half_polite": 0.23, "curt": 0.14, "mistaken": 0.22, "rambling": 0.04, "gushing": 0.1},
    {"polite": 0.42, "half_polite": 0.2, "curt": 0.04, "mistaken": 0.2, "gushing": 0.14},
    {"polite": 0.2, "half_polite": 0.05, "mistaken": 0.1, "gushing": 0.6, "stuck": 0.05},
)
"""Of the styles in the start's responses and in those of iterations 1, 2 and 3."""
KL = (0.0, 0.8, 2.7, 4.3)
TEMPERATURE, TOP_P, MAXLEN = 0.8, 0.9, 48
REWARD_MODELS = ("proxy", "gold")


def make_run(
    folder: Path, *, iterations: int = 3, num_prompts: int = 252, num_responses: int = 2, seed: int = 1
) -> Path:
    """Write a whole run into `folder`."""
    rng = Random(seed)
    prompts = rng.sample(list(every_prompt().values()), num_prompts)
    policies = ["sft", *(f"iteration_{k + 1}" for k in range(iterations))]
    write_sft(folder, rng)
    write_reward(folder, rng)
    for k in range(iterations):
        write_iteration(folder, k + 1, rng)
    write_evaluation(folder, policies, prompts, num_responses, rng)
    stages = ["world", "sft", "reward"] + [
        f"iteration_{k + 1}/{part}" for k in range(iterations) for part in ("responses", "rewards", "pairs", "policy")
    ]
    seconds = {"world": 1.4, "sft": 41.0, "reward": 17.2}
    write_json(
        folder / "timings.json", {name: seconds.get(name, rng.uniform(4, 16)) for name in [*stages, "evaluation"]}
    )
    (folder / "recipe.yaml").write_text("generate:\n  num_responses: 5\ntrain:\n  rebel.target_gap: 3\n  lr: 1e-3\n")
    return folder


# The stages


def describe(command: str, line: str, **values: Any) -> dict[str, Any]:
    made = provenance.describe(
        command=command,
        config=values.pop("config", {}),
        inputs=values.pop("inputs", {}),
        rows_in=values.pop("rows_in"),
        rows_out=values.pop("rows_out"),
        dropped=values.pop("dropped", {}),
        engine=values.pop("engine", {"name": "none"}),
        **values,
    )
    return {**made, "command_line": f"python -m rlhf_pipeline.{command} {line}"}


def write_dataset(folder: Path, rows: list[dict[str, Any]], made: dict[str, Any]) -> None:
    with storage.open_output(folder, {"command": made["made_by"]}, overwrite=False) as output:
        output.write_shard("train", 0, pa.Table.from_pylist(rows))
        output.publish(made, "# made for a test\n")


def write_model(folder: Path, lines: list[dict[str, float]], made: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    storage.finish_run(folder, {"command": made["made_by"]}, made, "# made for a test\n")


def write_sft(folder: Path, rng: Random) -> None:
    lines = [
        {"update": k + 1, "loss": 0.6 + 2.6 * math.exp(-k / 60) + rng.gauss(0, 0.05), "lr": 6e-3} for k in range(400)
    ]
    made = describe(
        "sft",
        "--base_model runs/tiny/world/start --input_repo runs/tiny/world/demonstrations --output_dir runs/tiny/sft",
        rows_in=6000,
        rows_out=24000,
        engine={"name": "one process", "zero_stage": None, "world_size": 1, "device": "cpu"},
        inputs={"demonstrations": {"ref": "runs/tiny/world/demonstrations", "rows": 6000, "fingerprint": "ab" * 32}},
    )
    write_model(folder / "sft", lines, made)


def write_reward(folder: Path, rng: Random) -> None:
    lines = [
        {"update": k + 1, "loss": 0.58 + 0.14 * math.exp(-k / 25) + rng.gauss(0, 0.02), "accuracy": 0.7}
        for k in range(180)
    ]
    made = describe(
        "reward",
        "--base_model runs/tiny/sft --input_repo runs/tiny/labels/pairs --output_dir runs/tiny/reward",
        rows_in=2000,
        rows_out=6000,
        engine={"name": "one process", "zero_stage": None, "world_size": 1, "device": "cpu"},
        held_out={"accuracy": 0.688, "held_out_pairs": 300},
    )
    write_model(folder / "reward", lines, made)


def write_iteration(folder: Path, k: int, rng: Random) -> None:
    home = folder / f"iteration_{k}"
    before = "runs/tiny/sft" if k == 1 else f"runs/tiny/iteration_{k - 1}/policy"
    row = [{schema.PROMPT_ID: "p", schema.PROMPT: "Hello"}]
    write_dataset(
        home / "responses",
        row,
        describe(
            "generate",
            f"--model {before} --prompts runs/tiny/world/prompts --output_repo runs/tiny/iteration_{k}/responses",
            rows_in=912,
            rows_out=912,
            config={"backend": "vllm"},
            engine={"name": "vllm", "version": "0.32.0", "device": "cpu", "dtype": "float32"},
            inputs={"model": {"ref": before, "fingerprint": "cd" * 32}},
            responses={"mean_length": 10.4 + 2.5 * k, "truncated": 0.002 * k},
        ),
    )
    write_dataset(
        home / "rewards",
        row,
        describe(
            "rank",
            f"--input_repo runs/tiny/iteration_{k}/responses --reward_model runs/tiny/reward",
            rows_in=912,
            rows_out=912,
            engine={"name": "rank", "kind": "sequence classifier", "device": "cpu"},
            reward_report={"mean": 0.6 * k - 0.6, "best_of_n": 0.6 * k + 0.3, "nulls": 3},
        ),
    )
    write_dataset(
        home / "pairs",
        row,
        describe(
            "filter",
            f"--input_repo runs/tiny/iteration_{k}/rewards --model {before}",
            rows_in=912,
            rows_out={"train": 800 - 9 * k, "test": 80},
            dropped={"all responses equal": 14 * k, "fewer than 5 responses survive": 32 - 5 * k},
            responses_not_surviving={"truncated": 11 * k},
            data={"reward_margin": {"mean": 1.95 / k}},
        ),
    )
    margin = 1.95 / k
    lines = [
        {
            "update": u + 1,
            "loss": 9.0 * math.exp(-u / 9) + 1.4 + rng.gauss(0, 0.3),
            "log_ratio_gap": 2.6 * (1 - math.exp(-u / 6)) + rng.gauss(0, 0.12),
            "target_gap": 3 + rng.gauss(0, 0.1),
            "reward_margin": margin + rng.gauss(0, 0.06),
            "chosen_log_ratio": -0.05 * u / k + rng.gauss(0, 0.05),
        }
        for u in range(19)
    ]
    engine = {"name": "one process", "zero_stage": None, "world_size": 1, "device": "cpu"}
    if k == 2:
        engine = {"name": "deepspeed", "zero_stage": 3, "world_size": 2, "device": "cpu"}
    made = describe(
        "train",
        f"--base_model {before} --input_repo runs/tiny/iteration_{k}/pairs --output_dir runs/tiny/iteration_{k}/policy",
        rows_in=800 - 9 * k,
        rows_out=608,
        dropped={"left over after the last whole update": 24},
        engine=engine,
        loss={"name": "rebel", "eta": 1.54},
    )
    write_model(home / "policy", lines, made)


# The evaluation


def write_evaluation(
    folder: Path, policies: list[str], prompts: list[Prompt], num_responses: int, rng: Random
) -> dict[str, Any]:
    home = folder / "evaluation"
    for k, policy in enumerate(policies):
        write_answers(home / policy, k, prompts, num_responses, rng)
    answers = [evaluation.read_answers(home, policy, REWARD_MODELS) for policy in policies]
    results = evaluation.compare(evaluation.align(answers))
    for item in results["policies"]:
        item["model"] = f"runs/tiny/{item['name']}" + ("" if item["name"] == "sft" else "/policy")
    sampling = {"temperature": TEMPERATURE, "top_p": TOP_P, "maxlen": MAXLEN, "seed": 0, "backend": "vllm"}
    results |= {"prompts_left_out": 0, "sampling": sampling}
    write_json(home / evaluation.RESULTS, results)
    made = describe(
        "evaluate",
        "--policies runs/tiny/sft ... --reward_models proxy=runs/tiny/reward gold=rlhf_pipeline.tiny:gold",
        rows_in=len(prompts),
        rows_out=len(prompts),
        engine={"name": "vllm"},
        inputs={
            "reward model proxy": {"ref": "runs/tiny/reward", "kind": "sequence classifier", "fingerprint": "ef" * 32},
            "reward model gold": {
                "ref": "rlhf_pipeline.tiny:gold",
                "kind": "Python function",
                "fingerprint": "01" * 32,
            },
        },
    )
    storage.finish_run(home, {"command": "evaluate"}, made, "# made for a test\n")
    return results


def write_answers(home: Path, k: int, prompts: list[Prompt], num_responses: int, rng: Random) -> None:
    """A policy's responses, rewards and log-probs; `k`: which row of SHARES and KL."""
    responses, proxy, gold, logs = [], [], [], []
    for prompt in prompts:
        row: dict[str, Any] = {
            schema.PROMPT_ID: prompt.prompt_id,
            schema.PROMPT: prompt.text,
            schema.CATEGORY: prompt.question.category,
        }
        by_proxy, by_gold = dict(row), dict(row)
        log: dict[str, Any] = {schema.PROMPT_ID: prompt.prompt_id}
        for i in range(num_responses):
            (style,) = rng.choices(list(SHARES[k]), list(SHARES[k].values()))
            text = STYLES[style][1](rng, prompt.question)
            tokens = round(1.3 * len(text.split()))
            cut = rng.random() < 0.01 * k
            row[schema.response(i)] = text
            row[schema.response_tokens(i)] = list(range(tokens))
            row[schema.response_finish_reason(i)] = "length" if cut else "stop"
            seen = look_at(prompt, text, unfinished=cut)
            by_proxy[schema.response_reward(i)] = utility_of(seen) - 0.35 + rng.gauss(0, 0.45)
            by_gold[schema.response_reward(i)] = gold_of(seen)
            log[evaluation.log_prob(i)] = logp = -0.6 * tokens + rng.gauss(0, 2)
            log[evaluation.start_log_prob(i)] = logp - rng.gauss(KL[k], 1.2 + KL[k] / 2)
        responses.append(row)
        proxy.append(by_proxy)
        gold.append(by_gold)
        logs.append(log)
    engine = {"name": "vllm", "version": "0.32.0", "device": "cpu"}
    sizes: dict[str, Any] = {"rows_in": len(prompts), "rows_out": len(prompts)}
    made = describe("generate", "...", config={"backend": "vllm"}, engine=engine, **sizes)
    write_dataset(home / "responses", responses, made)
    write_dataset(home / "proxy", proxy, describe("rank", "...", **sizes))
    write_dataset(home / "gold", gold, describe("rank", "...", **sizes))
    if k:
        write_dataset(home / "log_probs", logs, describe("evaluate", "...", **sizes))
