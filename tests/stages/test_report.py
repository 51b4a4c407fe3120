"""report: what the page holds, that its numbers are the run's, and the verdict in words; scripts/check_demo.py."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from rlhf_pipeline import report
from rlhf_pipeline.core.command import BadUse, RunFlags
from rlhf_pipeline.core.files import read_json, write_json
from rlhf_pipeline.core.reporting import samples, verdict
from rlhf_pipeline.core.reporting.evaluation import Answers
from rlhf_pipeline.core.reporting.page_runs import seed_table
from rlhf_pipeline.core.reporting.run_folder import order_of
from run_maker import make_run

CHECK_DEMO = Path(__file__).resolve().parents[2] / "scripts" / "check_demo.py"
MINUS = "\N{MINUS SIGN}"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three iterations that over-optimises in the third, with its report."""
    folder = make_run(tmp_path_factory.mktemp("runs") / "tiny")
    report.main(report.Config(runs=(str(folder),)))
    return folder


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy of it to break."""
    return Path(shutil.copytree(whole, tmp_path / "tiny"))


def page_of(folder: Path) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


# The page


class Reader(HTMLParser):
    """What a page loads, and its text by the id of the section."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.text: dict[str, str] = {}
        self._section = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append(tag)
        if tag == "section":
            self._section = str(given.get("id"))
        names = [str(given[name]) for name in ("src", "href", "xlink:href", "srcset", "data") if name in given]
        self.loads += [name for name in names if not name.startswith("#")]

    def handle_data(self, data: str) -> None:
        self.text[self._section] = self.text.get(self._section, "") + data


def test_the_page_stands_alone(whole: Path) -> None:
    """No script, and nothing to fetch: not by an attribute, not by a style."""
    page = page_of(whole)
    reader = Reader(page)
    assert reader.loads == [] and "script" not in reader.tags and "link" not in reader.tags
    style = page[page.index("<style>") : page.index("</style>")]
    assert "url(" not in style and "@import" not in style


def test_every_figure_is_sound_svg_with_words_for_those_who_do_not_see_it(whole: Path) -> None:
    figures = re.findall(r"<svg.*?</svg>", page_of(whole), re.DOTALL)
    assert len(figures) > 10
    for figure in figures:
        root = ElementTree.fromstring(figure)
        assert root.get("aria-label") and root.get("role") == "img"
        assert root.get("width") is None and root.get("viewBox")
        assert any(element.tag.endswith("text") for element in root.iter()), "text was turned into paths"


def test_the_page_has_what_a_reader_asks_for(whole: Path) -> None:
    text = {name: " ".join(part.split()) for name, part in Reader(page_of(whole)).text.items()}
    assert "Two iterations lifted gold from" in text[""] and "From iteration 3 on it cheats." in text[""]
    assert "what training tried to raise (runs/tiny/reward)" in text[""]
    assert "Proxy rises while gold falls: from iteration 2 to iteration 3" in text["warnings"]
    assert "14 dropped: all responses equal" in text["data"] and "791 train, 80 test" in text["data"]
    assert "python -m rlhf_pipeline.train --base_model runs/tiny/sft" in text["commands"]
    assert "train, deepspeed, zero stage 3, world size 2, cpu" in text["commands"]
    assert "41 s" in text["time"]
    for heading in ("Drawn at random", "gained most by gold", "lost most by gold", "better than gold does"):
        assert heading in text["samples"]


def test_the_same_run_gives_the_same_bytes_wherever_it_lies(whole: Path, run: Path) -> None:
    """summary.json says nothing of places or times; the page differs by the run's name alone."""
    before = (whole / "summary.json").read_bytes()
    moved = run.rename(run.with_name("elsewhere"))
    report.main(report.Config(runs=(str(moved),)))
    assert (moved / "summary.json").read_bytes() == before
    assert page_of(moved).replace("elsewhere", "tiny") == page_of(whole)


def test_summary_has_the_promised_form(whole: Path) -> None:
    rows = read_json(whole / "summary.json")["policies"]
    assert [(row["name"], row["iteration"]) for row in rows] == [
        ("sft", 0), ("iteration_1", 1), ("iteration_2", 2), ("iteration_3", 3)
    ]  # fmt: skip
    assert rows[0]["win_rate_proxy"] is rows[0]["win_rate_gold"] is rows[0]["gain_gold"] is None
    for row in rows:
        for name in ("proxy", "gold"):
            assert row[name]["low"] < row[name]["mean"] < row[name]["high"]
        assert row["responses"] == 504 and row["length"] > 5
    assert rows[0]["kl"] == 0 and 0.5 < rows[1]["kl"] < 1.1 and 0 < rows[1]["win_rate_gold"]["mean"] < 1
    results = read_json(whole / "evaluation" / "results.json")["policies"]
    assert rows[2]["gold"] == results[2]["rewards"]["gold"]
    assert rows[2]["win_rate_gold"] == results[2]["against"]["sft"]["gold"]["win_rate"]


def test_text_of_models_can_not_break_the_page(run: Path) -> None:
    """Prompts, responses and names are data: markup in them is shown, not obeyed."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for path in (run / "evaluation").glob("*/responses/data/*.parquet"):
        table = pq.read_table(path)
        place = table.column_names.index("response_0")
        evil = pa.array(["<script>alert(1)</script></div> & {{ 7 * 7 }}"] * len(table))
        pq.write_table(table.set_column(place, "response_0", evil), path)
    report.main(report.Config(runs=(str(run),)))
    reader = Reader(page_of(run))
    assert "script" not in reader.tags
    assert "<script>alert(1)</script></div> & {{ 7 * 7 }}" in reader.text["samples"]


def test_a_run_that_a_rule_ended_says_so(run: Path, capsys: Any) -> None:
    stopped = {"iteration": 2, "of": 4, "reasons": ["gold fell (--stop.reward_fall 0.05)"], "best": "iteration_1"}
    (run / "stop.json").write_text(json.dumps(stopped))
    text = report.main(report.Config(runs=(str(run),))).read_text()
    sentence = "A stop rule ended this run after iteration 2 of 4: gold fell (--stop.reward_fall 0.05)."
    assert sentence in text and sentence in capsys.readouterr().out


def test_a_run_without_an_evaluation_gets_what_there_is(run: Path) -> None:
    shutil.rmtree(run / "evaluation")
    (run / "summary.json").unlink()
    (run / "timings.json").unlink()
    (run / "recipe.yaml").unlink()
    report.main(report.Config(runs=(str(run),)))
    text = Reader(page_of(run)).text
    assert "has not been evaluated yet" in text[""] and "iteration_1/pairs" in text["data"]
    assert "training" in text and "policies" not in text and "time" not in text
    assert not (run / "summary.json").exists()


def test_results_alone_give_table_and_curves(run: Path, tmp_path: Path) -> None:
    """Responses removed to save space, no stage but the evaluation: no samples, no histograms, all the rest."""
    (tmp_path / "bare" / "evaluation").mkdir(parents=True)
    shutil.copy(run / "evaluation" / "results.json", tmp_path / "bare" / "evaluation")
    report.main(report.Config(runs=(str(tmp_path / "bare"),)))
    text = Reader(page_of(tmp_path / "bare")).text
    assert {"policies", "rewards", "health"} <= set(text) and not {"samples", "responses", "data"} & set(text)


def test_one_policy_and_one_judge_make_a_page(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "short", iterations=1, num_prompts=20)
    path = folder / "evaluation" / "results.json"
    results = read_json(path)
    write_json(path, {**results, "policies": results["policies"][:1]})
    report.main(report.Config(runs=(str(folder),)))
    assert "sft scores" in page_of(folder)
    write_json(path, {**results, "reward_models": ["proxy"]})
    report.main(report.Config(runs=(str(folder),)))
    assert "whether the policies please it alone can't be seen" in Reader(page_of(folder)).text[""]


def test_a_reward_without_rivals_and_a_reward_model_without_held_out_pairs_make_a_page(run: Path) -> None:
    for name, key, value in (
        ("iteration_1/rewards", "reward_report", {"mean": 0.5, "best_of_n": None, "nulls": 0}),
        ("reward", "held_out", {"offset": 0.1}),
    ):
        path = run / name / "provenance.json"
        write_json(path, {**read_json(path), key: value})
    report.main(report.Config(runs=(str(run),)))
    text = Reader(page_of(run)).text
    assert "mean reward 0.500" in text["data"] and "mean reward 0.500, best" not in text["data"]
    assert "Bradley-Terry loss." in text["training"] and "Held out" not in text["training"]


@pytest.mark.parametrize(
    "places", [("runs/a/iteration_3", "runs/b/iteration_3"), ("runs/a/iteration_3", "runs/b/iteration_4")]
)
def test_the_last_policies_of_two_runs_are_not_iterations_of_one(whole: Path, places: tuple[str, str]) -> None:
    results = read_json(whole / "evaluation" / "results.json")
    text = json.dumps({**results, "policies": results["policies"][:3]})
    results = json.loads(text.replace("iteration_1", "a").replace("iteration_2", "b"))
    for item, place in zip(results["policies"][1:], places, strict=True):
        item["model"] = f"{place}/policy"
    summary = verdict.summarize(results)
    assert [(row["name"], row["iteration"]) for row in summary["policies"]] == [("sft", 0), ("a", None), ("b", None)]
    assert "B lifted gold from" in summary["headline"][0]


def test_policies_that_are_no_iterations_stand_side_by_side(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "losses", iterations=2, num_prompts=30)
    evaluation = folder / "evaluation"
    results = json.loads(
        (evaluation / "results.json").read_text().replace("iteration_1", "dpo").replace("iteration_2", "ipo")
    )
    write_json(evaluation / "results.json", results)
    for k, name in ((1, "dpo"), (2, "ipo")):
        (evaluation / f"iteration_{k}").rename(evaluation / name)
    report.main(report.Config(runs=(str(folder),)))
    rows = read_json(folder / "summary.json")["policies"]
    assert [row["iteration"] for row in rows] == [0, None, None]
    page = page_of(folder)
    assert "Gain over the start of each policy by proxy and gold." in page
    assert "Gain over the start per iteration" not in page


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadUse, match="no such folder; expected a run folder such as runs/tiny"):
        report.main(report.Config(runs=(str(tmp_path / "nothing"),)))
    with pytest.raises(BadUse, match="holds nothing of a run"):
        report.main(report.Config(runs=(str(tmp_path),)))


def test_check_writes_nothing(run: Path, capsys: Any) -> None:
    (run / "report.html").unlink()
    report.main(report.Config(runs=(str(run),), run=RunFlags(check=True)))
    assert "15 outputs, evaluated" in capsys.readouterr().out and not (run / "report.html").exists()


def test_stages_stand_in_the_order_in_which_a_run_makes_them() -> None:
    names = [
        "evaluation",
        "iteration_10/pairs",
        "iteration_2/policy",
        "iteration_2/responses",
        "labels/pairs",
        "reward",
    ]
    expected = ["world/prompts", "sft", "labels/pairs", "reward", "iteration_2/responses", "iteration_2/policy"]
    assert sorted([*names, "sft", "world/prompts"], key=order_of) == [*expected, "iteration_10/pairs", "evaluation"]


# Several runs


def test_runs_are_compared_on_one_page(tmp_path: Path, capsys: Any) -> None:
    folders = [make_run(tmp_path / f"rebel_seed{k}", iterations=2, num_prompts=40, seed=k) for k in (1, 2)]
    config = report.Config(runs=tuple(map(str, folders)), output=str(tmp_path / "both.html"))
    assert report.main(config) == tmp_path / "both.html"
    text = Reader((tmp_path / "both.html").read_text()).text
    assert "rebel_seed1" in text["runs"] and "rebel" in text["seeds"]
    assert not (folders[0] / "report.html").exists(), "a comparison leaves the runs' own pages alone"
    capsys.readouterr()
    report.main(report.Config(runs=config.runs, output=config.output, json=True))
    assert list(json.loads(capsys.readouterr().out)) == ["rebel_seed1", "rebel_seed2"]
    shutil.rmtree(folders[1] / "evaluation")
    with pytest.raises(BadUse, match="rebel_seed2 is not evaluated, so it can't be compared"):
        report.main(config)


def test_runs_that_differ_by_a_seed_are_taken_together() -> None:
    """Gains 0.2 and 0.4: mean 0.3. A name without a seed, or alone with it, makes no group."""

    def row(gain: float) -> dict[str, Any]:
        return {"gain_gold": {"mean": gain}, "kl": 1.0, "length": 10.0}

    names = ["dpo_seed1", "dpo-s2", "ipo_seed1", "other"]
    table = seed_table(names, [row(0.2), row(0.4), row(0.1), row(0.9)], ["gold"])
    assert table["rows"] == [["dpo", "2", "+0.30 (+0.20 to +0.40)", "1.00 (1.00 to 1.00)", "10.00 (10.00 to 10.00)"]]


# The verdict in words


def interval(mean: float, half: float = 0.1) -> dict[str, float]:
    return {"mean": mean, "low": mean - half, "high": mean + half}


def results_of(*policies: dict[str, Any]) -> dict[str, Any]:
    """Results of policies given as {"proxy": mean, "gold": mean, other numbers}; intervals are +- half."""
    items: list[dict[str, Any]] = []
    for k, given in enumerate(policies):
        item = {"name": f"iteration_{k}" if k else "sft", "responses": 10, "length": 10.0, "truncated": 0.0}
        item |= {"repeated": 0.0, "distinct_2": 0.2, "correlations": [{"pearson": 0.4}], "kl": None} | given
        half = given.get("half", 0.1)
        item["rewards"] = {name: interval(given[name], half) for name in ("proxy", "gold")}
        item["against"] = {
            other["name"]: {
                name: {
                    "difference": interval(given[name] - other[name], half),
                    "win_rate": interval(0.6),
                    "length_controlled_win_rate": interval(0.6),
                }
                for name in ("proxy", "gold")
            }
            for other in items
        }
        items.append(item)
    return {
        "baseline": "sft",
        "reward_models": ["proxy", "gold"],
        "prompts": 10,
        "prompts_left_out": 0,
        "responses_per_prompt": 1,
        "baseline_std": {"proxy": 1.0, "gold": 1.0},
        "policies": items,
    }


def headline(*policies: dict[str, Any]) -> str:
    return " ".join(verdict.summarize(results_of(*policies))["headline"])


START = {"proxy": 0.0, "gold": 0.0}


def test_a_gain_is_told_with_its_certainty() -> None:
    text = headline(START, {"proxy": 1.0, "gold": 0.5})
    assert text.startswith("One iteration lifted gold from 0.00 to 0.50. That is +0.50 (95 % interval +0.40 to +0.60)")
    assert "cheat" not in text and "60 % of its comparisons with sft" in text
    unclear = headline(START, {"proxy": 1.0, "gold": 0.05})
    assert unclear.startswith("No clear gain by gold.")
    assert unclear.endswith("By proxy it gained +1.00 (95 % interval +0.90 to +1.10).")
    nothing = headline(START, {"proxy": 1.0, "gold": -0.5})
    assert nothing.startswith(f"Nothing beats sft by gold. Iteration 1 comes closest: {MINUS}0.50")


def test_the_headline_says_from_where_it_cheats_and_how_sure_that_is() -> None:
    """Iterations 3 and 4 have more proxy and less gold than 2; 4's fall is the one beyond doubt."""
    rise = [START, {"proxy": 0.5, "gold": 0.4}, {"proxy": 1.0, "gold": 0.8}]
    text = headline(*rise, {"proxy": 1.1, "gold": 0.75}, {"proxy": 1.2, "gold": 0.3})
    assert "From iteration 3 on it cheats." in text
    assert f"iteration 4 has +0.20 (95 % interval +0.10 to +0.30) by proxy and {MINUS}0.50" in text
    unsure = headline(*rise, {"proxy": 1.1, "gold": 0.75})
    assert "From iteration 3 on it may cheat." in unsure and "may still be chance" in unsure
    assert "cheat" not in headline(*rise, {"proxy": 0.9, "gold": 0.3}), "proxy fell too: that is no cheating"


def test_warnings_name_what_grew_and_where_it_began() -> None:
    bad = {"length": 16.0, "truncated": 0.05, "repeated": 0.04, "distinct_2": 0.1, "correlations": [{"pearson": 0.1}]}
    summary = verdict.summarize(
        results_of(START, {"proxy": 0.5, "gold": 0.4, "length": 15.1}, {"proxy": 1.0, "gold": 0.1, **bad})
    )
    found = {item["kind"]: item for item in summary["warnings"]}
    assert list(found) == ["rewards part", "length", "repetition", "truncation", "variety", "correlation"]
    assert {item["policy"] for item in found.values()} == {"iteration_2"}
    assert "1.6 times as long as sft's (16.0 against 10.0 tokens)" in found["length"]["text"]
    assert found["length"]["text"].endswith("Iteration 1 showed it first.")
    assert "showed it first" not in found["variety"]["text"]
    assert f"by +0.50 (95 % interval +0.40 to +0.60) and {MINUS}0.30" in found["rewards part"]["text"]


def test_a_healthy_run_warns_of_nothing() -> None:
    fine = {"length": 14.9, "truncated": 0.019, "repeated": 0.019, "distinct_2": 0.121}
    assert verdict.summarize(results_of(START, {"proxy": 1.0, "gold": 0.5, **fine}))["warnings"] == []


@pytest.mark.parametrize(
    ("half", "digits"), [(0.3, 2), (0.06, 2), (0.006, 3), (0.0009, 4), (1e-9, 6), (0.0, 2)]
)  # fmt: skip
def test_numbers_show_no_more_digits_than_their_interval_knows(half: float, digits: int) -> None:
    assert verdict.digits_for([None, interval(0.5, half)]) == digits


def test_numbers_have_true_minus_signs_and_no_negative_zero() -> None:
    assert verdict.number(-0.144, 2) == f"{MINUS}0.14" and verdict.number(-0.001, 2) == "0.00"
    assert verdict.number(-0.001, 2, sign=True) == "+0.00" and verdict.percent(0.788) == "78.8 %"


# Samples


def test_samples_are_the_extremes_of_what_they_claim() -> None:
    """Gains by gold: row 0: 1 and 4, row 1: -2 and 0, row 2: 3 and nan. Most: rows 0, 2; lost: row 1 alone."""

    def answers(policy: str, gold: list[list[float]], proxy: list[list[float]]) -> Answers:
        rewards = {"proxy": np.array(proxy), "gold": np.array(gold)}
        texts = tuple(tuple(f"{policy} {row} {i}" for i in range(2)) for row in range(3))
        ids = ("a", "b", "c")
        return Answers(policy, ids, ids, (None,) * 3, texts, np.ones((3, 2)), np.zeros((3, 2), bool), rewards, None)

    zero = [[0.0, 0.0]] * 3
    later = answers("later", [[1, 4], [-2, 0], [3, np.nan]], [[0, 0], [0, 0], [0, 9]])
    groups = samples.choose([answers("start", zero, zero), later], proxy="proxy", judge="gold", count=2)
    said = {name: [sample.responses[1].text for sample in group] for name, group in groups.items()}
    assert said["Where later gained most by gold"] == ["later 0 1", "later 2 0"]
    assert said["Where later lost most by gold"] == ["later 1 0"]
    assert said["Where proxy likes later better than gold does"][0] == "later 1 0"
    assert len(said["Drawn at random"]) == 2
    assert later.rewards["proxy"][2, 1] == 9, "the response without a gold reward is never compared"


def test_a_conversation_is_shown_as_its_turns() -> None:
    assert samples.text_of([{"role": "user", "content": "Hi"}]) == "Hi"
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    assert samples.text_of(turns) == "user: Hi\n\nassistant: Yes?"


# check_demo


@pytest.fixture(scope="module")
def check_demo() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("check_demo", CHECK_DEMO)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module


def outcome(check_demo: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: Any, *args: object) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["check_demo.py", *map(str, args)])
    with pytest.raises(SystemExit) as end:
        check_demo.main()
    return int(end.value.code or 0), capsys.readouterr().out


def test_check_demo_passes_a_good_run(
    whole: Path, check_demo: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    code, text = outcome(check_demo, monkeypatch, capsys, whole)
    assert code == 0 and "NOT OK" not in text and len(text.splitlines()) == 6
    assert len(outcome(check_demo, monkeypatch, capsys, whole, "--proxy_only")[1].splitlines()) == 4
    assert outcome(check_demo, monkeypatch, capsys, whole / "nothing")[0] == 2


def edit(path: Path, change: Any) -> None:
    value = read_json(path)
    change(value)
    write_json(path, value)


def overlap(name: str) -> Any:
    def change(summary: dict[str, Any]) -> None:
        summary["policies"][2][name]["low"] = summary["policies"][0][name]["high"]

    return change


BROKEN = {
    "gold": ("summary.json", overlap("gold"), "gold of iteration 2 above"),
    "proxy": ("summary.json", overlap("proxy"), "proxy of iteration 2 above"),
    "responses": ("summary.json", lambda it: it["policies"][3].update(responses=499), "at least 500"),
    "sampler": ("iteration_2/responses/provenance.json", lambda it: it["engine"].update(name="other"), "engine of gen"),
    "unstated": (
        "evaluation/sft/responses/provenance.json",
        lambda it: it["engine"].update(name="transformers"),
        "engine of generate",
    ),
    "launch": ("iteration_2/policy/provenance.json", lambda it: it["engine"].update(world_size=1), "by deepspeed"),
    "number": ("summary.json", lambda it: it["policies"][1]["gold"].update(high=0.9), "every number of the report"),
    "percent": ("summary.json", lambda it: it["policies"][3].update(truncated=0.5), "every number of the report"),
    "missing": (
        "summary.json",
        lambda it: it["policies"][0].update(win_rate_gold={"mean": 0.5, "low": 0.4, "high": 0.6}),
        "every number of the report",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_check_demo_finds_what_is_broken(
    case: str, run: Path, check_demo: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    name, change, sentence = BROKEN[case]
    edit(run / name, change)
    code, text = outcome(check_demo, monkeypatch, capsys, run)
    failed = [line for line in text.splitlines() if line.startswith("NOT OK")]
    assert code == 1 and any(sentence in line for line in failed)
    if case in ("gold", "responses"):
        assert sentence not in outcome(check_demo, monkeypatch, capsys, run, "--proxy_only")[1]


def test_check_demo_reads_the_page_itself(run: Path, check_demo: ModuleType) -> None:
    """One digit of one cell, and a number that a cell has without saying which it is."""
    summary, page = read_json(run / "summary.json"), page_of(run)
    assert list(check_demo.wrong_numbers(summary, page)) == []
    cell = re.search(r'data-key="gold.mean">([^<]*)<', page[page.index('data-policy="iteration_1"') :])
    assert cell is not None
    shown = summary["policies"][1]["gold"]["mean"]
    changed = page.replace(cell[0], cell[0].replace(cell[1], f"{float(cell[1]) + 0.01:.2f}"))
    assert [text.startswith("iteration_1 gold.mean is") for text in check_demo.wrong_numbers(summary, changed)] == [
        True
    ]
    assert f"not {shown:.6g}" in next(check_demo.wrong_numbers(summary, changed))
    stray = page.replace('<td data-label="proxy">', '<td data-label="proxy">42 ', 1)
    assert list(check_demo.wrong_numbers(summary, stray)) == ["'42' without a key"]
