"""evaluate: the numbers it makes of responses and rewards, what it refuses, how it grows and goes on."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from rlhf_pipeline import evaluate, generate, rank
from rlhf_pipeline.core import storage
from rlhf_pipeline.core.command import BadUse, WorkFailed, parse
from rlhf_pipeline.core.files import read_json, write_json
from rlhf_pipeline.core.reporting import evaluation, names, verdict
from rlhf_pipeline.core.reporting.evaluation import Answers
from tiny_reward_models import write_classifier

NAN = float("nan")


def answers(
    policy: str,
    rewards: dict[str, list[list[float]]],
    *,
    ids: tuple[str, ...] | None = None,
    categories: tuple[str | None, ...] | None = None,
    texts: list[list[str]] | None = None,
    log_ratios: list[list[float]] | None = None,
) -> Answers:
    count, width = np.shape(next(iter(rewards.values())))
    ids = ids or tuple(f"p{row}" for row in range(count))
    texts = texts or [["a b c"] * width] * count
    return Answers(
        policy=policy,
        prompt_ids=ids,
        prompts=tuple(f"prompt {name}" for name in ids),
        categories=categories or (None,) * count,
        texts=tuple(map(tuple, texts)),
        lengths=np.array([[len(text.split()) for text in row] for row in texts], float),
        truncated=np.zeros((count, width), bool),
        rewards={name: np.array(values, float) for name, values in rewards.items()},
        log_ratios=None if log_ratios is None else np.array(log_ratios),
    )


# Numbers


def test_prompts_are_paired_by_id_and_those_not_answered_by_all_are_left_out() -> None:
    """b answered p2, p0 and p3; shared are p0 and p2. Differences 10 - 1 and 30 - 3: mean 18."""
    a = answers("a", {"r": [[1.0], [2.0], [3.0]]})
    b = answers("b", {"r": [[30.0], [10.0], [99.0]]}, ids=("p2", "p0", "p3"))
    first, second = evaluation.align([a, b])
    assert first.prompt_ids == second.prompt_ids == ("p0", "p2")
    result = evaluation.compare([first, second])
    assert result["prompts"] == 2
    assert result["policies"][1]["against"]["a"]["r"]["difference"]["mean"] == 18
    assert result["policies"][1]["rewards"]["r"]["mean"] == 20


def test_a_win_rate_compares_all_responses_of_a_prompt() -> None:
    """Prompt 0: {3, 1} against {2, 0} wins 3 of 4. Prompt 1: {5, 5} against {5, 9}: two ties, two losses, 1/4.
    Prompt 2: all equal, 1/2.

    The mean is 1/2. One prompt is won and one lost, so the sign test says nothing: p = 1.
    """
    a = answers("a", {"r": [[2, 0], [5, 9], [1, 1]]})
    b = answers("b", {"r": [[3, 1], [5, 5], [1, 1]]})
    versus = evaluation.compare([a, b])["policies"][1]["against"]["a"]["r"]
    assert versus["win_rate"]["mean"] == 0.5
    assert versus["sign_test"] == {"wins": 1, "losses": 1, "ties": 1, "p": 1.0}


def test_every_policy_is_compared_with_every_earlier_one() -> None:
    results = evaluation.compare([answers(name, {"r": [[k], [2 * k]]}) for k, name in enumerate("abc")])
    assert [list(item["against"]) for item in results["policies"]] == [[], ["a"], ["a", "b"]]
    assert results["policies"][2]["against"]["b"]["r"]["difference"]["mean"] == 1.5
    assert "length_controlled_win_rate" in results["policies"][2]["against"]["a"]["r"]
    assert "length_controlled_win_rate" not in results["policies"][2]["against"]["b"]["r"]


def test_a_response_without_a_reward_counts_nowhere_but_among_the_unscored() -> None:
    """b's prompt 1 has no reward by r at all, so r is judged on prompts 0 and 2: b's means (4 and 8) average 6."""
    a = answers("a", {"r": [[1, 1], [1, 1], [1, 1]]})
    b = answers("b", {"r": [[4, NAN], [NAN, NAN], [7, 9]]})
    results = evaluation.compare([a, b])
    assert results["prompts_scored"] == {"r": 2} and results["prompts"] == 3
    assert results["policies"][1]["rewards"]["r"]["mean"] == 6
    assert results["policies"][1]["unscored"] == {"r": 3}
    with pytest.raises(WorkFailed, match="reward model r scored responses of every policy for 1 prompts only"):
        evaluation.compare([a, answers("b", {"r": [[4, 4], [NAN, NAN], [NAN, NAN]]})])


def test_an_ensemble_averages_standard_deviations_from_the_baselines_mean() -> None:
    """r has mean 1 and deviation 1 on the baseline, s 100 and 50. b's response: (3 - 1) / 1 = 2 and
    (150 - 100) / 50 = 1, together 1.5; without a reward by s there is none."""
    a = answers("a", {"r": [[0], [2]], "s": [[50], [150]]})
    b = answers("b", {"r": [[3], [3]], "s": [[150], [NAN]]})
    joint = evaluation.with_ensemble([a, b], ["r", "s"])[1].rewards["ensemble"]
    assert joint[0, 0] == 1.5 and np.isnan(joint[1, 0])
    flat = answers("a", {"r": [[1], [1]], "s": [[50], [150]]})
    with pytest.raises(WorkFailed, match="r gives every response of a the same reward"):
        evaluation.with_ensemble([flat, b], ["r", "s"])


def test_kl_is_the_mean_log_ratio_and_zero_for_the_start() -> None:
    """Prompt means 1 and 3 nats: k1 is 2 with a standard error of sqrt(2) / sqrt(2) = 1."""
    a = answers("a", {"r": [[0, 1], [1, 0]]})
    b = answers("b", {"r": [[0, 1], [1, 0]]}, log_ratios=[[0.5, 1.5], [2.0, 4.0]])
    start, later = evaluation.compare([a, b])["policies"]
    assert start["kl"]["k1"] == {"value": 0.0, "standard_error": 0.0}
    assert later["kl"]["k1"] == {"value": 2.0, "standard_error": pytest.approx(1.0)}
    expected = np.mean([np.exp(-x) - 1 + x for x in (0.5, 1.5, 2.0, 4.0)])
    assert later["kl"]["k3"]["value"] == pytest.approx(expected)
    unknown = evaluation.compare([a, dataclasses.replace(b, log_ratios=None)])["policies"][1]
    assert unknown["kl"] is None


def test_categories_have_their_own_numbers_unless_they_are_a_single_prompt() -> None:
    """birds: rewards 1 and 3 against 0 and 0. fish is one prompt, which shows no spread."""
    categories = ("birds", "fish", "birds")
    a = answers("a", {"r": [[0], [0], [0]]}, categories=categories)
    b = answers("b", {"r": [[1], [9], [3]]}, categories=categories)
    table = evaluation.compare([a, b])["policies"][1]["categories"]
    assert list(table) == ["birds"] and table["birds"]["prompts"] == 2
    assert table["birds"]["rewards"]["r"]["mean"] == table["birds"]["gains"]["r"]["mean"] == 2


def test_correlation_of_proxy_and_gold_leaves_out_what_one_of_them_could_not_score() -> None:
    """(0, 1), (1, 0), (2, 2) and a pair with a gap. Deviations (-1, 0, 1) and (0, -1, 1): 1 / (sqrt 2 sqrt 2)."""
    item = answers("a", {"proxy": [[0, 1], [2, 9]], "gold": [[1, 0], [2, NAN]]})
    (found,) = evaluation.compare([item])["policies"][0]["correlations"]
    assert found["between"] == ["proxy", "gold"] and found["pearson"] == pytest.approx(0.5)
    constant = answers("a", {"proxy": [[1, 1], [1, 1]], "gold": [[1, 0], [2, 0]]})
    assert evaluation.compare([constant])["policies"][0]["correlations"][0]["pearson"] is None


def test_length_that_explains_the_wins_is_taken_out_of_the_win_rate() -> None:
    """b wins exactly where it is longer, half of the prompts, and ties the rest: .75 of the comparisons. A
    logistic curve through 1/2 at equal length fits that; the win rate at equal length must lie near 1/2."""
    longer = [["word " * 30] if row % 2 else ["word " * 3] for row in range(40)]
    a = answers("a", {"r": [[0.0]] * 40}, texts=[["word " * 3]] * 40)
    b = answers("b", {"r": [[float(row % 2)] for row in range(40)]}, texts=longer)
    versus = evaluation.compare([a, b])["policies"][1]["against"]["a"]["r"]
    assert versus["win_rate"]["mean"] == 0.75
    assert versus["length_controlled_win_rate"]["mean"] == pytest.approx(0.5, abs=0.06)


# Names and flags


@pytest.mark.parametrize(
    ("ref", "name"),
    [
        ("runs/tiny/sft", "sft"),
        ("runs/tiny/iteration_2/policy", "iteration_2"),
        ("./policy/", "policy"),
        ("meta-llama/Meta-Llama-3-8B-Instruct@main", "Meta-Llama-3-8B-Instruct"),
        ("rlhf_pipeline.tiny:gold", "gold"),
        ("./judges/mine.py:score", "score"),
    ],
)
def test_a_policy_or_judge_is_called_after_its_place(ref: str, name: str) -> None:
    assert names.default_name(ref) == name


def config_for(**values: Any) -> evaluate.Config:
    given: dict[str, Any] = {"policies": ("a=./a", "b=./b"), "reward_models": ("rlhf_pipeline.tiny:gold",)}
    return evaluate.Config(**(given | {"backend": "transformers"} | values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"policies": ("./x/sft", "./y/sft")}, r"--policies names sft twice \(./x/sft and ./y/sft\): write NAME="),
        ({"policies": ()}, "--policies is empty"),
        ({"reward_models": ("kl=./r",)}, "--reward_models kl=./r can't be called kl, which"),
        ({"reward_models": ("responses=./r",)}, "can't be called responses, which"),
        ({"ensemble": ("gold", "proxy")}, "--ensemble proxy is none of the reward models gold"),
        ({"ensemble": ("gold",)}, "at least two different"),
        ({"temperature": 0.0}, "pass --no_kl, or a temperature above 0"),
        ({"num_responses": 0}, "--num_responses is 0; expected 1 or more"),
    ],
)
def test_values_that_can_not_be_meant_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(BadUse, match=message):
        evaluate.check_values(config_for(**values))


OWN_CODE = """
import torch
from transformers import LlamaConfig, LlamaModel, LlamaPreTrainedModel


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnModel(LlamaPreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = LlamaModel(config)
        self.score = torch.nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()
"""


@pytest.mark.parametrize("flag", ["--trust_remote_code", "--trust-remote-code"])
def test_a_judge_is_looked_at_as_rank_flags_have_it_read(flag: str, tmp_path: Path) -> None:
    folder = write_classifier(tmp_path)
    (folder / "own.py").write_text(OWN_CODE)
    code = {"AutoConfig": "own.OwnConfig", "AutoModelForSequenceClassification": "own.OwnModel"}
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "own", "auto_map": code}
    (folder / "config.json").write_text(json.dumps(config))
    template = folder / "chat_template.jinja"
    template.rename(tmp_path / "elsewhere.jinja")
    with pytest.raises(BadUse, match=r"--reward_models .* has no chat template"):
        evaluate.resolve_judge(config_for(rank_flags=flag), str(folder))
    flags = f"--batch_tokens 512 --chat_template={tmp_path}/elsewhere.jinja"
    with pytest.raises(BadUse, match=r"--reward_models .*--trust_remote_code runs the repo's own code"):
        evaluate.resolve_judge(config_for(rank_flags=flags), str(folder))
    judge = evaluate.resolve_judge(config_for(rank_flags=f"{flags} {flag}"), str(folder))
    assert judge.kind == "sequence classifier"


def test_greedy_responses_can_be_judged_without_a_kl() -> None:
    evaluate.check_values(config_for(temperature=0.0, kl=False))


def test_a_run_folder_stands_for_its_last_policy(tmp_path: Path) -> None:
    for k in (1, 2, 10):
        (tmp_path / f"iteration_{k}" / "policy").mkdir(parents=True)
    assert names.last_policy(str(tmp_path)) == str(tmp_path / "iteration_10" / "policy")
    assert names.last_policy("OWNER/NAME") == "OWNER/NAME"


# Against real policies, without processes: the responses and rewards are there, as after a kill

JUDGE = """
def score(rows):
    return [float(len(row["response"])) for row in rows]


def short(rows):
    return [-reward for reward in score(rows)]
"""


@pytest.fixture(scope="module")
def policies(tiny_policy: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three tiny policies: one, and two with other weights."""
    from safetensors.torch import load_file, save_file

    found = {"start": tiny_policy}
    for name, scale in (("later", 1.05), ("last", 1.1)):
        folder = tmp_path_factory.mktemp("policies") / name
        shutil.copytree(tiny_policy, folder, ignore=shutil.ignore_patterns("fingerprint.json"))
        weights = {key: value * scale for key, value in load_file(folder / "model.safetensors").items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        found[name] = folder
    return found


@pytest.fixture
def setting(tmp_path: Path, policies: dict[str, Path], tiny_prompts: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """config(*names, **values): an evaluation of these policies by the length of a response."""
    monkeypatch.chdir(tmp_path)
    Path("judge.py").write_text(JUDGE)

    def config(*names: str, **values: Any) -> evaluate.Config:
        return config_for(
            policies=tuple(f"{name}={policies[name]}" for name in names),
            **({"reward_models": ("size=./judge.py:score",)} | values),
            prompts=str(tiny_prompts),
            output="./out",
            num_responses=2,
        )

    return config


def write_part(folder: Path, table: pa.Table) -> None:
    with storage.open_output(folder, {"command": "test"}, overwrite=False) as output:
        output.write_shard("train", 0, table)
        output.publish({}, "# made for a test\n")


def write_stages(config: evaluate.Config, *names: str) -> None:
    """What a killed evaluation has left: its identity, and the responses and rewards of these policies."""
    plan = evaluate.make_plan(config)
    _, identity = evaluate.state_of(plan, overwrite=False)
    write_json(plan.folder / storage.IDENTITY, identity)
    for name in names:
        if (plan.folder / name / "responses").is_dir():
            continue
        rng = np.random.default_rng(len(name))
        columns: dict[str, list[Any]] = {"prompt_id": [], "prompt": []}
        for row in plan.source.rows():
            columns["prompt_id"].append(row["prompt_id"])
            columns["prompt"].append(row["prompt"])
            for i in range(config.num_responses):
                tokens = rng.integers(0, 256, rng.integers(1, 9)).tolist()
                columns.setdefault(f"response_{i}", []).append(f"{name} " * len(tokens))
                columns.setdefault(f"response_{i}_tokens", []).append(tokens)
                columns.setdefault(f"response_{i}_finish_reason", []).append("length" if len(tokens) == 8 else "stop")
        rewards = {f"response_{i}_reward": [float(len(text)) for text in columns[f"response_{i}"]] for i in range(2)}
        write_part(plan.folder / name / "responses", pa.table(columns))
        write_part(plan.folder / name / "size", pa.table({"prompt_id": columns["prompt_id"], **rewards}))


def test_kl_is_that_of_whole_responses_at_the_sampling_temperature(setting: Any, policies: dict[str, Path]) -> None:
    """The reference: transformers' logits of prompt and response, divided by .8, log_softmax, summed over the
    response's tokens; policy minus start, averaged over prompts."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = setting("start", "later")
    write_stages(config, "start", "later")
    folder = evaluate.main(config)
    tokenizer = AutoTokenizer.from_pretrained(policies["start"])
    models = {name: AutoModelForCausalLM.from_pretrained(policies[name]) for name in ("later", "start")}

    def logp(model: Any, prompt: list[int], tokens: list[int]) -> float:
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens])).logits[0].double() / 0.8
        table = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        return float(table.gather(1, torch.tensor(tokens)[:, None]).sum())

    rows = list(evaluation.open_part(folder / "later" / "responses").rows())
    ratios = []
    for row in rows:
        turns = [{"role": "user", "content": row["prompt"]}]
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        for i in range(2):
            tokens = row[f"response_{i}_tokens"]
            ratios.append(logp(models["later"], prompt, tokens) - logp(models["start"], prompt, tokens))
    start, later = read_json(folder / "results.json")["policies"]
    assert start["kl"]["k1"]["value"] == 0
    assert later["kl"]["k1"]["value"] == pytest.approx(np.mean(ratios), abs=1e-4)
    assert abs(np.mean(ratios)) > 0.1


def test_a_killed_evaluation_goes_on_and_a_finished_one_does_nothing(setting: Any, capsys: Any) -> None:
    config = setting("start", "later")
    write_stages(config, "start", "later")
    folder = evaluate.main(config)
    assert "\n$ " not in capsys.readouterr().out, "what was there whole was made again"
    assert not (folder / storage.IDENTITY).exists()
    results = (folder / "results.json").read_bytes()
    made = read_json(folder / "provenance.json")
    assert made["identity"]["baseline"] == "start" and made["inputs"]["policy later"]["fingerprint"]
    assert evaluate.main(config) == folder
    assert "done before" in capsys.readouterr().out
    assert (folder / "results.json").read_bytes() == results


def test_an_evaluation_grows_by_policies_and_keeps_what_it_has(setting: Any, capsys: Any) -> None:
    write_stages(setting("start", "later"), "start", "later")
    evaluate.main(setting("start", "later"))
    before = read_json(Path("out/results.json"))["policies"]
    log_probs = Path("out/later/log_probs/provenance.json").stat().st_mtime_ns
    write_stages(setting("start", "later", "last"), "last")
    evaluate.main(setting("start", "later", "last"))
    after = read_json(Path("out/results.json"))["policies"]
    assert [item["name"] for item in after] == ["start", "later", "last"] and after[:2] == before
    assert Path("out/later/log_probs/provenance.json").stat().st_mtime_ns == log_probs
    capsys.readouterr()
    evaluate.main(setting("start", "later"))
    assert "done before" in capsys.readouterr().out


def test_another_evaluation_in_the_same_folder_is_refused_naming_what_differs(
    setting: Any, policies: dict[str, Path]
) -> None:
    write_stages(setting("start", "later"), "start", "later")
    evaluate.main(setting("start", "later"))
    with pytest.raises(BadUse, match=r"what.temperature was 0.8, now 0.7"):
        evaluate.main(setting("start", "later", temperature=0.7))
    with pytest.raises(BadUse, match=r"baseline was \"start\", now \"later\""):
        evaluate.main(setting("later", "start"))
    moved = dataclasses.replace(setting("start"), policies=(f"start={policies['start']}", f"later={policies['last']}"))
    with pytest.raises(BadUse, match=r"inputs.policies.later was"):
        evaluate.main(moved)
    Path("judge.py").write_text(JUDGE + "\n# another one\n")
    with pytest.raises(BadUse, match=r"inputs.reward_models.size.fingerprint was"):
        evaluate.main(setting("start", "later"))


def test_policies_with_other_tokenizers_have_no_kl(setting: Any, policies: dict[str, Path], tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(policies["later"], other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    first, second = list(vocab)[100:102]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = dataclasses.replace(setting("start"), policies=(f"start={policies['start']}", f"other={other}"))
    write_stages(config, "start", "other")
    with pytest.raises(BadUse, match="other and start have different tokenizers, so there is no KL between them"):
        evaluate.main(config)


def test_check_prints_the_plan_and_writes_nothing(setting: Any, capsys: Any, tmp_path: Path) -> None:
    config = setting("start", "later")
    evaluate.main(dataclasses.replace(config, run=dataclasses.replace(config.run, check=True)))
    printed = capsys.readouterr().out
    assert "start (baseline)" in printed and "48 responses of every policy" in printed and "absent" in printed
    assert not Path("out").exists()
    pending = dataclasses.replace(config.run, check=True, pending=("./not_there=1",))
    later = dataclasses.replace(config, policies=(config.policies[0], "next=./not_there"), run=pending)
    evaluate.main(later)
    assert "next: ./not_there, to be written by an earlier stage" in capsys.readouterr().out


def test_the_stages_understand_the_commands_that_are_run(setting: Any) -> None:
    """The flags are parsed by the stages' own Configs: a renamed flag fails here, not after hours."""
    config = setting(
        "start",
        "later",
        num_prompts=10,
        temperature=0.7,
        top_p=1.0,
        maxlen=64,
        seed=3,
        system_prompt="Be brief.",
        tensor_parallel_size=1,
        generate_flags="--engine.max_model_len 96",
        rank_flags="--batch_tokens 512",
        reward_models=("size=./judge.py:score", "short=./judge.py:short"),
    )
    plan = evaluate.make_plan(config)
    command = evaluate.generate_command(config, plan.folder, "later")
    made = parse(generate.Config, command[command.index("rlhf_pipeline.generate") + 1 :])
    assert (made.num_prompts, made.num_responses, made.seed, made.maxlen) == (10, 2, 3, 64)
    assert (made.temperature, made.top_p, made.system_prompt) == (0.7, 1.0, "Be brief.")
    assert made.output_repo == "out/later/responses" and made.engine.max_model_len == 96
    launched = dataclasses.replace(config, rank_processes=2)
    command = evaluate.rank_command(launched, plan.folder, "later", ["size", "short"])
    assert command[1:5] == ["-m", "accelerate.commands.launch", "--num_processes", "2"]
    ranked = parse(rank.Config, command[command.index("rlhf_pipeline.rank") + 1 :])
    assert ranked.reward_model == ("./judge.py:score", "./judge.py:short") and ranked.num_responses == 2
    assert (ranked.input_repo, ranked.output_repo) == ("out/later/responses", ("out/later/size", "out/later/short"))
    assert ranked.batch_tokens == 512 and ranked.judge_model is None


def test_an_endpoint_judges_with_the_model_that_was_named(setting: Any) -> None:
    config = dataclasses.replace(setting("start"), reward_models=("gpt=http://localhost:1/v1",))
    with pytest.raises(BadUse, match="name the model that is to judge with --judge_model"):
        evaluate.make_plan(config)
    config = dataclasses.replace(config, judge_model="big")
    command = evaluate.rank_command(config, evaluate.make_plan(config).folder, "start", ["gpt"])
    ranked = parse(rank.Config, command[command.index("rlhf_pipeline.rank") + 1 :])
    assert ranked.reward_model == ("http://localhost:1/v1",) and ranked.judge_model == "big"
    assert ranked.output_repo == ("out/start/gpt",)


def test_flags_for_the_stages_are_taken_as_the_help_writes_them(
    run_command: Any, policies: dict[str, Path], tiny_prompts: Path, tmp_path: Path
) -> None:
    """And generate is asked what it says to them before anything is there: the policy's window is shorter."""
    folder, flags = tmp_path / "out", "--generate_flags=--engine.max_model_len 99999"
    words = ["--policies", f"start={policies['start']}", "--reward_models", "rlhf_pipeline.tiny:gold", flags]
    done = run_command("evaluate", *words, "--prompts", tiny_prompts, "--output", folder, "--backend", "transformers")
    assert done.returncode == 2 and not folder.exists()
    assert "generate for start: --engine.max_model_len 99999 is longer than the window" in done.stderr


# The whole


@pytest.mark.slow
def test_two_policies_and_two_judges_end_to_end(
    run_command: Any, policies: dict[str, Path], tiny_prompts: Path, tmp_path: Path
) -> None:
    """Real generate and rank processes. The results agree with the repos in between; a refused stage is told."""
    (tmp_path / "judge.py").write_text(JUDGE)
    arguments = [
        *("--policies", f"start={policies['start']}", f"later={policies['later']}"),
        *("--reward_models", "./judge.py:score", "./judge.py:short"),
        *("--prompts", tiny_prompts, "--output", "./out", "--num_responses", 2, "--maxlen", 24),
        *("--backend", "transformers", "--ensemble", "score", "short"),
    ]
    done = run_command("evaluate", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n$ ") == 4 and "log-probs of later's responses" in done.stdout
    results = read_json(tmp_path / "out" / "results.json")
    start, later = results["policies"]
    for item in (start, later):
        source = storage.open_source(str(tmp_path / "out" / item["name"] / "responses"), flag="test")
        lengths = [len(row[f"response_{i}"]) for row in source.rows() for i in range(2)]
        assert item["rewards"]["score"]["mean"] == pytest.approx(np.mean(lengths))
        assert item["rewards"]["short"]["mean"] == pytest.approx(-np.mean(lengths))
        assert item["correlations"][0]["pearson"] == pytest.approx(-1)
        assert item["responses"] == 48
    assert later["rewards"]["ensemble"]["mean"] == pytest.approx(0, abs=1e-9)
    assert later["kl"]["k1"]["value"] > 0, "a policy's own samples are likelier under it"
    assert verdict.summarize(results)["policies"][1]["win_rate_score"] == later["against"]["start"]["score"]["win_rate"]
    again = run_command("evaluate", *arguments, "--rank_flags=--batch_tokens 4096", cwd=tmp_path)
    assert again.returncode == 0 and "done before" in again.stdout, again.stderr
    other = run_command("evaluate", *arguments, "--rank_flags=--head_dtype bfloat16", cwd=tmp_path)
    assert other.returncode == 2 and 'what.rank_flags was "", now "--head_dtype bfloat16"' in other.stderr
    wrong = run_command("evaluate", *arguments, "--rank_flags=--no_such 1", "--overwrite", cwd=tmp_path)
    assert wrong.returncode == 2 and "rank for start: its flags are wrong" in wrong.stderr
    assert (tmp_path / "out" / "results.json").exists()
    refused = run_command("evaluate", *arguments, "--output", "./out2", "--maxlen", 24, "--top_p", 2, cwd=tmp_path)
    assert refused.returncode == 2 and "generate for start was refused" in refused.stderr
