"""Before everything, for a laptop: a small world to do RLHF in.

Writes ordinary inputs of the other commands, all decided by --size and --seed, into one folder:

    prompts/           questions to train on                               generate --prompts
    prompts_heldout/   the same questions in wordings never trained on     evaluate --prompts
    demonstrations/    answers of mixed quality                            sft --input_repo
    start/             a Llama with random weights, its tokenizer          sft --base_model

and brings two judges, reward functions for rank: rlhf_pipeline.tiny:gold, a program that checks quality, and
rlhf_pipeline.tiny:annotator, noisy and fond of pleasantries.

    python -m rlhf_pipeline.tiny --output ./runs/tiny/world --size demo --seed 1
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal

from rlhf_pipeline.core import provenance, storage
from rlhf_pipeline.core.command import (
    RUN,
    BadUse,
    RunFlags,
    What,
    entry,
    fields_with_roles,
    what_fields,
)
from rlhf_pipeline.core.progress import say
from rlhf_pipeline.core.world.demonstrations import STYLES, demonstrate
from rlhf_pipeline.core.world.judges import annotator, gold, gold_of, look_at, utility_of
from rlhf_pipeline.core.world.questions import KINDS, Prompt, every_prompt
from rlhf_pipeline.core.world.tiny_llama import build_tokenizer, write_policy_folder

__all__ = ["annotator", "build_tokenizer", "gold", "write_policy_folder"]

Row = dict[str, Any]
SPLIT = "train"
TITLES = {
    "prompts": "Questions of a tiny world",
    "prompts_heldout": "Questions of a tiny world, in wordings held out",
    "demonstrations": "Answers of mixed quality to the questions of a tiny world",
    "start": "A Llama that knows nothing yet",
}
COLUMNS = {
    "prompt_id": "category, subject and wording (a to d); -2, -3 for further answers",
    "prompt": "the question",
    "response": "an answer, good or not",
    "style": "how it answers: " + ", ".join(STYLES),
    "category": "kind of question",
}


@dataclass(frozen=True)
class Llama:
    hidden_size: int
    num_heads: int
    intermediate_size: int
    num_layers: int = 2
    init_std: float = 0.05


@dataclass(frozen=True)
class Size:
    """How much of the world there is, and how big a Llama is to learn it."""

    kinds: tuple[str, ...]
    num_heldout: int
    num_demonstrations: int
    llama: Llama


VOCAB_SIZE = 1024
SIZES = {
    "demo": Size(tuple(KINDS), 252, 6000, Llama(hidden_size=128, num_heads=4, intermediate_size=384)),
    "ci": Size(tuple(KINDS)[:5], 116, 2400, Llama(hidden_size=96, num_heads=3, intermediate_size=288)),
}


@dataclass(frozen=True)
class Config:
    output: What[str] = "./runs/tiny/world"
    """Folder of the world."""
    size: What[Literal["demo", "ci"]] = "demo"
    """demo: nine kinds of questions and 0.56 million weights, for minutes. ci: five and 0.35, for seconds."""
    seed: What[int] = 1
    """Decides which wordings are held out, what the demonstrations say, and the random weights."""
    run: RUN = RunFlags()


def choose_prompts(size: Size, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """The prompts to train on and those held out, of which every kind has its equal share."""
    rng = Random(f"{seed} prompts")
    train: list[Prompt] = []
    heldout: list[Prompt] = []
    for index, kind in enumerate(size.kinds):
        prompts = [prompt for prompt in every_prompt().values() if prompt.question.category == kind]
        rng.shuffle(prompts)
        count = size.num_heldout // len(size.kinds) + (index < size.num_heldout % len(size.kinds))
        heldout += prompts[:count]
        train += prompts[count:]
    rng.shuffle(train)
    rng.shuffle(heldout)
    return train, heldout


def make_prompt_rows(prompts: Sequence[Prompt]) -> list[Row]:
    return [
        {"prompt_id": prompt.prompt_id, "prompt": prompt.text, "category": prompt.question.category}
        for prompt in prompts
    ]


def make_demonstration_rows(prompts: Sequence[Prompt], count: int, seed: int) -> list[Row]:
    """`count` responses, equally many to every kind of question, each in a style drawn by its share.

    Within a kind every prompt is answered about equally often; prompt_id is made unique by -2, -3, ...
    """
    rng = Random(f"{seed} demonstrations")
    kinds: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        kinds.setdefault(prompt.question.category, []).append(prompt)
    chosen = [
        (prompt, repeat)
        for index, members in enumerate(kinds.values())
        for prompt, repeat in _take(rng, members, count // len(kinds) + (index < count % len(kinds)))
    ]
    rng.shuffle(chosen)
    rows = []
    for prompt, repeat in chosen:
        style, response = demonstrate(rng, prompt.question)
        rows.append(
            {
                "prompt_id": prompt.prompt_id + (f"-{repeat}" if repeat > 1 else ""),
                "prompt": prompt.text,
                "response": response,
                "style": style,
                "category": prompt.question.category,
            }
        )
    return rows


def _take(rng: Random, prompts: Sequence[Prompt], count: int) -> Iterator[tuple[Prompt, int]]:
    """`count` prompts in shuffled rounds over all of them, each with the number of its round from 1 on."""
    for start in range(0, count, len(prompts)):
        for prompt in rng.sample(prompts, min(len(prompts), count - start)):
            yield prompt, start // len(prompts) + 1


def make_datasets(config: Config) -> dict[str, list[Row]]:
    """{folder name: rows} of the world's three datasets."""
    size = SIZES[config.size]
    train, heldout = choose_prompts(size, config.seed)
    return {
        "prompts": make_prompt_rows(train),
        "prompts_heldout": make_prompt_rows(heldout),
        "demonstrations": make_demonstration_rows(train, size.num_demonstrations, config.seed),
    }


def identify(config: Config, rows: Sequence[Row]) -> dict[str, Any]:
    """What decides an output: the fields but for the place, and the rows it holds or is made from."""
    what = what_fields(config)
    del what["output"]
    return {"command": "tiny", "what": what, "rows": provenance.fingerprint_text(json.dumps(rows))}


def describe(config: Config, *, rows_in: int, rows_out: int) -> dict[str, Any]:
    return provenance.describe(
        command="tiny",
        config={name: value for name, _, value in fields_with_roles(config)},
        inputs={},
        rows_in=rows_in,
        rows_out=rows_out,
        dropped={},
        engine={"name": "none"},
    )


def write_dataset(folder: Path, rows: Sequence[Row], config: Config) -> None:
    import pyarrow as pa

    with storage.open_output(folder, identify(config, rows), overwrite=config.run.overwrite) as output:
        if output.done:
            return
        output.write_shard(SPLIT, 0, pa.Table.from_pylist(list(rows)))
        made = describe(config, rows_in=0, rows_out=len(rows))
        card = provenance.card(
            title=TITLES[folder.name],
            provenance=made,
            splits=[SPLIT],
            columns={name: COLUMNS[name] for name in rows[0]},
            samples=rows[:2],
        )
        output.publish(made, card)


def write_start(folder: Path, demonstrations: Sequence[Row], config: Config) -> None:
    """A Llama with random weights, and a tokenizer trained on the demonstrations."""
    with storage.open_output(folder, identify(config, demonstrations), overwrite=config.run.overwrite) as output:
        if output.done:
            return
        texts = [row[name] for row in demonstrations for name in ("prompt", "response")]
        tokenizer = build_tokenizer(texts, VOCAB_SIZE)
        llama = dataclasses.asdict(SIZES[config.size].llama)
        write_policy_folder(output.folder, tokenizer, **llama, seed=config.seed)
        made = describe(config, rows_in=len(demonstrations), rows_out=0)
        facts = {"weights": f"random, by --seed {config.seed}", "vocabulary": len(tokenizer), **llama}
        output.publish(made, provenance.model_card(title=TITLES["start"], provenance=made, facts=facts))


def print_plan(folder: Path, datasets: dict[str, list[Row]], config: Config) -> None:
    """Every output with its size and what is there of it already. Raises BadUse if another world is."""
    for name, rows in [*datasets.items(), ("start", datasets["demonstrations"])]:
        state = storage.existing_state(folder / name, identify(config, rows), overwrite=config.run.overwrite)
        size = "random weights" if name == "start" else f"{len(rows):,} rows"
        say(f"{folder / name}: {size}, {state}")


def show(demonstrations: Sequence[Row]) -> None:
    """Print one demonstration of each style, with gold's and the annotator's opinion of it."""
    say("\nthe policy will learn from such answers, and the judges think of them:\n\n  gold  liking")
    one_of_each = {row["style"]: row for row in reversed(demonstrations)}
    for style in STYLES:
        row = one_of_each[style]
        seen = look_at(every_prompt()[row["prompt"]], row["response"])
        say(f"{gold_of(seen):6.2f}  {utility_of(seen):6.2f}  {row['prompt']}  {row['response']}")


def main(config: Config) -> Path:
    folder = storage.parse_ref(config.output, flag="--output", output=True).path
    if folder is None:
        raise BadUse(f"--output {config.output} is not a local folder, and a world is written to one: ./NAME.")
    datasets = make_datasets(config)
    print_plan(folder, datasets, config)
    if config.run.check:
        return folder
    for name, rows in datasets.items():
        write_dataset(folder / name, rows, config)
    write_start(folder / "start", datasets["demonstrations"], config)
    show(datasets["demonstrations"])
    say(f"\ndone: {folder}")
    return folder


if __name__ == "__main__":
    entry(main, Config)
