"""train: what it refuses, what its numbers are, and that cutting, launching and killing do not change them."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from conftest import PROMPTS, REPO
from rlhf_pipeline import train
from rlhf_pipeline.core import storage
from rlhf_pipeline.core.command import BadUse, WorkFailed
from rlhf_pipeline.core.progress import amount, duration, read_metrics
from rlhf_pipeline.core.training import memory
from rlhf_pipeline.core.training.losses import Dpo, Rebel
from rlhf_pipeline.train import Config, RunFlags
from tiny_pairs import make_rows, write_pairs

RATE = 1e-3


@pytest.fixture(scope="module")
def pairs(tiny_policy, tmp_path_factory) -> Path:

    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs", tiny_policy, PROMPTS)


@pytest.fixture
def here(pairs, tiny_policy, tmp_path, monkeypatch):
    """`here(output="a", **fields)`: train in this process; returns (folder, metrics)."""
    before = signal.getsignal(signal.SIGTERM)

    def run(output: str = "policy", **fields: Any) -> tuple[Path, list[dict[str, float]]]:
        places = {"input_repo": str(pairs), "output_dir": str(tmp_path / output), "base_model": str(tiny_policy)}
        defaults = {"batch_size": 8, "lr": RATE, "rebel": Rebel(target_gap=3.0)}
        folder = train.main(Config(**{**places, **defaults, **fields}))
        return folder, read_metrics(folder / "metrics.jsonl")

    yield run
    signal.signal(signal.SIGTERM, before)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def held_out_logps(folder: Path, pairs: Path) -> torch.Tensor:
    """Per-token log-probs of the test pairs' chosen responses, by transformers alone."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    found = []
    for row in storage.open_source(str(pairs), flag="--x", split="test").rows():
        prompt = row["prompt_tokens"][-row["prompt_length"] :]
        response = row["chosen_tokens"][: row["chosen_length"]]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].double()
        found.append(logits.log_softmax(-1)[torch.arange(len(response)), torch.tensor(response)])
    return torch.cat(found)


def test_before_the_first_update_log_ratios_are_zero_and_the_loss_is_the_squared_target(here, pairs):
    """REBEL's loss at log_ratio_gap 0 is (eta x margin)^2; with target_gap 3, eta = 3 / mean margin."""
    _, metrics = here(batch_size=24, warmup_ratio=0.0)
    rows = list(storage.open_source(str(pairs), flag="--x").rows(["chosen_reward", "rejected_reward"]))
    margins = np.array([row["chosen_reward"] - row["rejected_reward"] for row in rows])
    expected = ((3.0 / margins.mean() * margins) ** 2).mean()
    assert metrics[0]["chosen_log_ratio"] == pytest.approx(0, abs=1e-5)
    assert metrics[0]["log_ratio_gap"] == pytest.approx(0, abs=1e-5)
    assert metrics[0]["loss"] == pytest.approx(expected, rel=1e-5)
    assert metrics[0]["target_gap"] == pytest.approx(3.0, rel=1e-6)


def test_the_first_update_moves_the_gap_towards_the_margin(here):
    """All pairs in each of two updates: the second sees, on the same pairs, what the first has done."""
    _, metrics = here(batch_size=24, epochs=2.0, warmup_ratio=0.0, lr=1e-4)
    assert metrics[1]["log_ratio_gap"] > 0.05
    assert metrics[1]["loss"] < metrics[0]["loss"]


def test_a_target_is_called_reachable_or_saturated(here, capsys):
    """3 nats are within reach at this learning rate. The authors' eta asks for a million times the margin."""
    folder, metrics = here("near", warmup_ratio=0.0, epochs=4.0)
    assert metrics[-1]["kl"] == pytest.approx(
        -(metrics[-1]["chosen_log_ratio"] + metrics[-1]["rejected_log_ratio"]) / 2
    )
    assert "reachable: eta holds the policy back" in capsys.readouterr().out
    assert "reachable" in (folder / "README.md").read_text()
    here("far", warmup_ratio=0.0, rebel=Rebel())
    assert "saturated: the learning rate alone sets the pace" in capsys.readouterr().out


def test_cutting_an_update_into_micro_batches_does_not_change_it(here):
    """One pair a call, all pairs in one call, and a budget of 200 tokens: the same losses and gradient norms."""
    runs = [
        here("one")[1],
        here("whole", per_device_train_batch_size=8)[1],
        here("budget", micro_batch_tokens=200)[1],
    ]
    for name in ("loss", "grad_norm", "log_ratio_gap", "chosen_logp"):
        values = np.array([[line[name] for line in run] for run in runs])
        np.testing.assert_allclose(values[1:], values[:1].repeat(2, 0), rtol=2e-4, atol=2e-4, err_msg=name)


def test_gradient_checkpointing_changes_nothing_but_memory(here):
    plain, saving = here("plain")[1], here("saving", gradient_checkpointing=True)[1]
    assert [line["loss"] for line in plain] == pytest.approx([line["loss"] for line in saving], rel=1e-5)


def test_clipping_is_off_by_default_and_bounds_the_step_when_on(here):
    """Gradient norms here are far above 1. With plain Adam a clipped gradient gives the same first step, so compare
    the second: its moments remember how differently two clipped gradients weigh."""
    free, clipped = here("free", epochs=1.0)[1], here("clipped", max_grad_norm=0.001)[1]
    assert free[0]["grad_norm"] > 100
    assert clipped[0]["grad_norm"] == pytest.approx(free[0]["grad_norm"], rel=1e-5)
    assert abs(clipped[-1]["loss"] - free[-1]["loss"]) > 1e-4


def test_what_is_saved_is_the_trained_policy_with_the_starting_models_files(here, tiny_policy, pairs):
    folder, metrics = here(warmup_ratio=0.0)
    for name in ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (folder / name).read_bytes() == (tiny_policy / name).read_bytes()
    moved = (held_out_logps(folder, pairs) - held_out_logps(tiny_policy, pairs)).abs().mean()
    assert moved > 1e-3
    assert not (folder / "checkpoints").exists()
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["engine"]["name"] == "one process" and provenance["temperature"] == 0.8
    assert provenance["inputs"]["model"]["ref"] == str(tiny_policy)
    assert {"test_loss", "test_accuracy"} <= set(metrics[-1])


def test_reference_log_probs_are_those_of_the_starting_policy_at_the_sampling_temperature(here, tiny_policy, pairs):
    """transformers' own logits over 0.8, summed per response, against the table in reference/."""
    from transformers import AutoModelForCausalLM

    folder, _ = here()
    table = list(storage.open_source(str(folder / "reference"), flag="--x", split="test").rows())
    model = AutoModelForCausalLM.from_pretrained(tiny_policy)
    for row, kept in zip(storage.open_source(str(pairs), flag="--x", split="test").rows(), table, strict=True):
        prompt = row["prompt_tokens"][-row["prompt_length"] :]
        for side in ("chosen", "rejected"):
            response = row[f"{side}_tokens"][: row[f"{side}_length"]]
            with torch.no_grad():
                logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].double() / 0.8
            expected = logits.log_softmax(-1)[torch.arange(len(response)), torch.tensor(response)].sum()
            assert kept[f"{side}_logp"] == pytest.approx(float(expected), abs=1e-3)


def test_the_same_run_is_done_and_another_is_refused_naming_what_differs(here):
    folder, _ = here()
    before = (folder / "model.safetensors").stat().st_mtime_ns
    here(save_every=1)
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(BadUse, match=r"another run \(what.lr was 0.001, now 0.002\).*--overwrite"):
        here(lr=2e-3)
    here(lr=2e-3, run=RunFlags(overwrite=True))
    assert (folder / "model.safetensors").stat().st_mtime_ns != before


def test_check_says_what_memory_and_time_a_run_takes(here, pairs, capsys, tmp_path):
    """At 1000 tokens per second three updates and the reference's forward, a third of an update's work, of all pairs:
    (pairs' tokens x 1 + pairs' tokens / 3) / 1000 seconds. All 24 pairs are in one of the three updates."""
    here(run=RunFlags(check=True), gpus=2, rate="1000", gradient_checkpointing=True)
    said = capsys.readouterr().out
    assert "GiB on each of 2 GPUs, bf16, with gradient checkpointing, attention packed" in said
    for launch in ("one process", "ddp", "zero 2", "zero 3", "zero 3, offload"):
        assert f"{launch:16}" in said
    rows = list(storage.open_source(str(pairs), flag="--x", split="train").rows())
    tokens = sum(2 * row["prompt_length"] + row["chosen_length"] + row["rejected_length"] for row in rows)
    once = sum(row["prompt_length"] for row in rows)
    assert f"{tokens / 3:,.0f} tokens on average, {once / tokens:.0%} fewer with prompts shared" in said
    assert f"{duration(tokens * 4 / 3 / 1000)} at 1,000 tokens per second" in said
    earlier = tmp_path / "metrics.jsonl"
    earlier.write_text('{"update": 1, "tokens_per_second": 500.0}\n')
    assert memory.tokens_per_second(str(earlier)) == 500.0
    here(run=RunFlags(check=True), attn_implementation="sdpa", per_device_train_batch_size=4)
    assert re.search(r"tokens on average, \d+% more with padding; largest call", capsys.readouterr().out)
    with pytest.raises(BadUse, match="--rate is fast; expected tokens per second"):
        here(run=RunFlags(check=True), rate="fast")


def test_check_plans_more_epochs_of_pairs_that_are_fewer_than_an_update(here, capsys):
    """24 pairs, seen twice, are one update of 48."""
    here(run=RunFlags(check=True), batch_size=48, epochs=2.0)
    assert "updates    1 of 48 pairs" in capsys.readouterr().out


def test_a_disk_without_room_is_refused_before_anything_is_loaded(here, tiny_policy, tmp_path, monkeypatch, capsys):
    """The policy, as large as the starting one, and of three checkpoints, 12 bytes for a weight, two at a time."""
    here(run=RunFlags(check=True), save_every=1)
    parameters = sum(tensor.numel() for tensor in weights(tiny_policy).values())
    needed = parameters * (4 + 2 * 12)
    assert f"2 checkpoints of {amount(12 * parameters, 'B')}" in capsys.readouterr().out
    room = {"free": needed - 1}
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(**room))
    with pytest.raises(BadUse, match=r"--output_dir .* its disk has .* free: free some, or name a folder on another"):
        here(save_every=1)
    assert not (tmp_path / "policy").exists()
    room["free"] = needed
    here(run=RunFlags(check=True), save_every=1)
    room["free"] = needed - 12 * parameters  # one checkpoint at the end
    here(run=RunFlags(check=True), save_every=0)


def test_check_writes_nothing(here, tmp_path):
    folder, _ = here("planned", run=RunFlags(check=True))
    assert not folder.exists() and list(tmp_path.iterdir()) == []


def test_a_resumed_run_ends_with_the_same_bits(here, monkeypatch):
    """Stopped after update 2 by a loss that is no number, then run again: as if nothing had happened."""
    whole, metrics = here("whole", save_every=1)
    stopped = 0

    def stop_once(numbers: dict[str, float], folder: Path) -> None:
        nonlocal stopped
        if numbers["update"] == 3 and not stopped:
            stopped = 1
            raise WorkFailed("stopped")

    monkeypatch.setattr(train.checkpoints, "check_finite", stop_once)
    with pytest.raises(WorkFailed, match="stopped"):
        here("cut", save_every=1)
    cut, again = here("cut", save_every=1)
    assert stopped == 1
    assert [line["loss"] for line in again] == [line["loss"] for line in metrics]
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(cut)[name]), name


def test_a_loss_that_is_no_number_any_more_ends_the_run_and_names_the_last_good_state(here, tmp_path):
    """At this learning rate the second update, the first one not at rate 0, throws the weights out of float32."""
    with pytest.raises(
        WorkFailed,
        match=r"update 3 has loss .* and gradient norm nan; the last good state is .*checkpoints/update-2\. Lower",
    ):
        here(lr=1e30, warmup_ratio=0.4, save_every=1)


def test_accumulation_that_a_launch_config_sets_must_fit_the_batch(here, tmp_path, monkeypatch):
    """Of --batch_size 8 one process makes 8 engine calls of a pair: a config may say so, and nothing else."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(BadUse, match=r"of the accelerate config 4 x 1 pairs x 1 processes is 4, --batch_size is 8"):
        here()
    (tmp_path / "ds.json").write_text('{"gradient_accumulation_steps": 16}')
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "8")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "ds.json"))
    with pytest.raises(BadUse, match=r"of .*/ds.json 16 x 1 pairs x 1 processes is 16, --batch_size is 8"):
        here()
    (tmp_path / "ds.json").write_text('{"gradient_accumulation_steps": "auto"}')
    assert here("fits")[1]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"batch_size": 25}, r"gives 24 pairs, fewer than one update of 25: pass --batch_size 24"),
        ({"batch_size": 0}, r"--batch_size is 0; expected a number above 0"),
        ({"temperature": -1.0}, r"--temperature is -1.0"),
        ({"dpo": Dpo(beta=0.2)}, r"a --dpo flag is set, but --loss is rebel: drop it, or pass --loss dpo"),
        ({"loss": "dpo", "dpo": Dpo(beta=-1.0), "rebel": Rebel()}, r"--dpo.beta is -1.0; expected"),
        ({"gradient_accumulation_steps": 3}, r"--gradient_accumulation_steps 3 x 1 pairs x 1 processes is 3"),
        ({"base_model": "./nowhere"}, r"--base_model ./nowhere: no such folder"),
        ({"input_repo": "./nowhere"}, r"--input_repo ./nowhere does not exist"),
    ],
)
def test_bad_values_are_refused_in_one_sentence_before_a_model_is_loaded(here, fields, sentence, monkeypatch):
    monkeypatch.setattr(train.models, "load_policy", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    with pytest.raises(BadUse, match=sentence):
        here(**fields)


def test_pairs_of_another_tokenizer_are_refused_naming_both(here, tmp_path, tiny_policy):
    from rlhf_pipeline.tiny import build_tokenizer, write_policy_folder

    other = write_policy_folder(
        tmp_path / "other", build_tokenizer(PROMPTS, 400), hidden_size=64, num_layers=1, num_heads=2
    )
    pairs = write_pairs(tmp_path / "pairs", other, PROMPTS)
    with pytest.raises(BadUse, match=r"tokenized with another tokenizer \(\w{12}\) than that of --base_model"):
        train.main(Config(str(pairs), str(tmp_path / "out"), str(tiny_policy)))


def publish(folder: Path, splits: dict[str, list[dict[str, Any]]]) -> str:
    """A dataset that says nothing of what made it. Returns its reference."""
    with storage.open_output(folder, {"rows": str(splits)}, overwrite=False) as output:
        for split, rows in splits.items():
            output.write_shard(split, 0, pa.Table.from_pylist(rows))
        output.publish({}, "")
    return str(folder)


@pytest.fixture
def pairs_with_log_probs(here, pairs, tmp_path):
    """`pairs_with_log_probs(off=0.0)`: the pairs with the reference log-probs of a run, in the published names."""
    folder, _ = here("first")

    def make(off: float = 0.0) -> str:
        splits = {}
        for split in ("train", "test"):
            rows = list(storage.open_source(str(pairs), flag="--x", split=split).rows())
            kept = list(storage.open_source(str(folder / "reference"), flag="--x", split=split).rows())
            splits[split] = [
                {**row, "chosen_logprob": log["chosen_logp"] + off, "reject_logprob": log["rejected_logp"] + off}
                for row, log in zip(rows, kept, strict=True)
            ]
        return publish(tmp_path / f"off_by_{off}", splits)

    return make


def test_log_probs_that_the_pairs_bring_are_the_reference_only_when_asked_for(here, pairs_with_log_probs, capsys):
    brought = pairs_with_log_probs()
    folder, asked = here("asked", input_repo=brought, reference_from_input=True)
    assert not (folder / "reference").exists()
    said = capsys.readouterr().out
    assert "the pairs' columns chosen_logp and rejected_logp (read chosen_logprob as chosen_logp" in said
    folder, computed = here("computed", input_repo=brought)
    assert (folder / "reference").exists()
    assert (
        "(read chosen_logprob as chosen_logp, reject_logprob as rejected_logp) are left alone"
        in capsys.readouterr().out
    )
    assert [line["loss"] for line in asked] == pytest.approx([line["loss"] for line in computed], rel=1e-5)


def test_log_probs_of_another_model_are_refused_unless_told_otherwise(here, pairs_with_log_probs):
    brought = pairs_with_log_probs(off=7.0)
    with pytest.raises(BadUse, match=r"\|log_ratio\| is 7 nats on average, expected at most 1: .* another model's"):
        here("far", input_repo=brought, reference_from_input=True)
    _, metrics = here("told", input_repo=brought, reference_from_input=True, reference_tolerance=8.0)
    assert metrics[0]["chosen_log_ratio"] == pytest.approx(-7, abs=1e-3)


@pytest.mark.parametrize(
    ("loss", "sentence"),
    [
        ("dpo", r"has no columns chosen_logp and rejected_logp \(or chosen_logprob and reject_logprob\)"),
        ("simpo", r"--reference_from_input is set, but --loss simpo has no reference"),
        ("kto", r"lacks the mismatched pairs that --loss kto needs"),
    ],
)
def test_a_reference_that_the_pairs_do_not_have_is_refused(here, loss, sentence):
    with pytest.raises(BadUse, match=sentence):
        here(loss=loss, rebel=Rebel(), reference_from_input=True)


def test_pairs_made_with_a_template_file_need_it_and_the_policy_keeps_it(here, tiny_policy, tmp_path):
    """Another header for the assistant: other ids in every prompt. Loaded anew, the policy speaks by that template."""
    from rlhf_pipeline.core.chat import Chat

    template = tmp_path / "other.jinja"
    own = (tiny_policy / "chat_template.jinja").read_text()
    template.write_text(own.replace("'assistant'", "'helper'").replace("assistant<", "helper<"))
    assert template.read_text() != own
    made_with_it = str(write_pairs(tmp_path / "pairs", tiny_policy, PROMPTS, chat_template=template))
    with pytest.raises(
        BadUse, match=r"tokenized with another chat template .* or pass the --chat_template that it had"
    ):
        here(input_repo=made_with_it)
    folder, _ = here(input_repo=made_with_it, chat_template=str(template))
    assert (folder / "chat_template.jinja").read_bytes() == template.read_bytes()
    assert Chat.load(folder).template_hash == Chat.load(tiny_policy, chat_template=str(template)).template_hash
    with pytest.raises(BadUse, match="tokenized with another chat template"):
        here("without", chat_template=str(template))


def test_pairs_that_do_not_say_what_made_them_are_rendered_again(here, pairs, tmp_path):
    rows = list(storage.open_source(str(pairs), flag="--x").rows())
    rows[2]["prompt"] += " Please."
    with pytest.raises(BadUse, match=r"doesn't say what made it, and its prompt 2 has \d+ tokens, not the \d+ that"):
        here(input_repo=publish(tmp_path / "elsewhere", {"train": rows}))


def test_rewards_that_are_not_finite_are_refused(tmp_path, tiny_policy):

    from rlhf_pipeline.core.chat import Chat
    from tiny_pairs import make_rows

    rows = make_rows(Chat.load(tiny_policy), PROMPTS, 0)
    rows[5]["rejected_reward"] = float("inf")
    with storage.open_output(tmp_path / "pairs", {"x": 1}, overwrite=False) as output:
        output.write_shard("train", 0, pa.Table.from_pylist(rows))
        output.publish({}, "")
    with pytest.raises(BadUse, match=r"1 pairs without a finite reward \(the first: prompt_id p5\)"):
        train.main(Config(str(tmp_path / "pairs"), str(tmp_path / "out"), str(tiny_policy), batch_size=8))


@pytest.mark.parametrize("length", [0, 49])
def test_a_length_that_its_block_can_not_have_is_refused(tmp_path, tiny_policy, length):
    from rlhf_pipeline.core.chat import Chat

    rows = make_rows(Chat.load(tiny_policy), PROMPTS, 0)
    rows[3]["chosen_length"] = length
    with storage.open_output(tmp_path / "pairs", {"x": 1}, overwrite=False) as output:
        output.write_shard("train", 0, pa.Table.from_pylist(rows))
        output.publish({}, "")
    with pytest.raises(BadUse, match=rf"row 3 of --input_repo says that {length} of its 48 tokens are real"):
        train.main(Config(str(tmp_path / "pairs"), str(tmp_path / "out"), str(tiny_policy), batch_size=8))


def test_length_columns_and_padding_agree(tmp_path, tiny_policy):
    """Pairs made elsewhere have no length columns: their padding gives the same tokens."""

    from rlhf_pipeline.core.chat import Chat
    from rlhf_pipeline.core.training.pairs import load_pairs
    from tiny_pairs import make_rows

    chat = Chat.load(tiny_policy)
    rows = make_rows(chat, PROMPTS, 0)
    bare = [{k: v for k, v in row.items() if not k.endswith("_length")} for row in rows]
    loaded = []
    for name, data in (("with", rows), ("without", bare)):
        with storage.open_output(tmp_path / name, {"x": name}, overwrite=False) as output:
            output.write_shard("train", 0, pa.Table.from_pylist(data))
            output.publish({}, "")
        source = storage.open_source(str(tmp_path / name), flag="--x")
        loaded.append(load_pairs(source, pad_id=chat.pad_id, end_ids=chat.end_ids))
    for kind in ("prompt", "chosen", "rejected"):
        for a, b in zip(getattr(loaded[0], kind), getattr(loaded[1], kind), strict=True):
            assert a.tolist() == b.tolist()


def test_the_train_job_of_two_nodes_starts_a_launch_on_each(tmp_path):
    """With srun and scontrol as two nodes would have them: every launch is told the first node and its own number."""
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho node7; echo node8\n")
    (tmp_path / "srun").write_text('#!/bin/sh\nshift; for n in 0 1; do SLURM_NODEID=$n "$@"; done\n')
    for name in ("scontrol", "srun"):
        (tmp_path / name).chmod(0o755)
    job = ["bash", str(REPO / "scripts/slurm/train.sbatch"), "echo", "launch", "--num_processes", "16", "a b"]
    slurm = {"SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[7-8]", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    out = subprocess.run(job, env={**os.environ, **slurm}, capture_output=True, text=True, check=True).stdout
    words = "launch --num_machines 2 --main_process_ip node7 --machine_rank {} --num_processes 16 a b\n"
    assert out == words.format(0) + words.format(1)


def test_zero_3_on_two_processes_equals_one(here, launch, pairs, tiny_policy, tmp_path):
    """Losses to 1e-5 relative and per-token log-probs of held-out responses to 1e-4, gradient norms unclipped.

    AdamW moves a weight whose gradient is nothing but rounding as far as any other: after three updates the test loss
    of one process itself changes by 1e-5 with the size of its calls or the kernel of its attention.
    """
    one, expected = here("one", max_grad_norm=None)
    args = ("--input_repo", pairs, "--base_model", tiny_policy, "--batch_size", 8, "--lr", RATE)
    result = launch(
        2, "deepspeed_config_stage_3.yaml", "train", *args, "--rebel.target_gap", 3, "--output_dir", tmp_path / "two"
    )
    assert result.returncode == 0, result.stderr[-3000:]
    metrics = read_metrics(tmp_path / "two" / "metrics.jsonl")
    for name, rounding in {"loss": 1e-5, "grad_norm": 1e-5, "test_loss": 5e-5}.items():
        ours = [line[name] for line in metrics if name in line]
        assert ours == pytest.approx([line[name] for line in expected if name in line], rel=rounding), name
    assert torch.allclose(held_out_logps(one, pairs), held_out_logps(tmp_path / "two", pairs), atol=1e-4)
    engine = json.loads((tmp_path / "two" / "provenance.json").read_text())["engine"]
    assert (engine["name"], engine["zero_stage"], engine["world_size"]) == ("deepspeed", 3, 2)
