"""Chats as ids, for templates of nine kinds. The tokenizers know single bytes and special tokens only (except
where a test says otherwise), so that every expected id list is the expected text spelled out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rlhf_pipeline.core.chat import Chat
from rlhf_pipeline.core.command import BadUse

LLAMA_3 = (
    "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN_2_5 = "{% if messages[0].role != 'system' %}<|im_start|>system\nBe good.<|im_end|>\n{% endif %}" + CHATML
ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
PHI_3 = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
QWEN_3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}"
    "{% set parts = m.content.split('</think>') %}"
    "{% set thought = parts[0].split('<think>')[-1].strip('\\n') if parts | length > 1 else '' %}"
    "<think>\n{{ thought }}\n</think>\n\n{{ parts[-1].lstrip('\\n') }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_3_2 = (
    "{{ bos_token }}"
    "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "<|start_header_id|>system<|end_header_id|>\n\nToday Date: {{ date_string }}\n\n"
    "<|eot_id|>" + LLAMA_3.replace("{% if loop.first %}{{ bos_token }}{% endif %}", "")
)
R1 = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'assistant' %}<|assistant|>{{ m.content.split('</think>')[-1] }}{{ eos_token }}"
    "{% else %}<|user|>{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>HEADER{% endif %}"
)


@dataclass(frozen=True)
class Kind:
    """A kind of chat model, with what its prompt and its response must read, written down by hand."""

    template: str
    bos: str | None
    eos: str
    specials: tuple[str, ...]
    prompt: str
    """Of the user's text "Hi there"."""
    response: str
    """Of the assistant's text "Good day!" """
    adds_bos: bool = True
    """Whether the tokenizer puts BOS in front of any text."""


KINDS = {
    "llama_3": Kind(
        LLAMA_3, "<|begin_of_text|>", "<|eot_id|>", ("<|start_header_id|>", "<|end_header_id|>"),
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi there<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "Good day!<|eot_id|>",
    ),
    "default_system_turn": Kind(
        QWEN_2_5, None, "<|im_end|>", ("<|im_start|>", "<|endoftext|>"),
        "<|im_start|>system\nBe good.<|im_end|>\n"
        "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n",
        "Good day!<|im_end|>",
    ),
    "template_without_bos": Kind(
        ZEPHYR, "<s>", "</s>", (),
        "<s><|user|>\nHi there</s>\n<|assistant|>\n",
        "Good day!</s>",
    ),
    "bos_that_no_text_begins_with": Kind(  # as where the BOS is the pad or end-of-text token of a base model
        CHATML, "<|endoftext|>", "<|im_end|>", ("<|im_start|>",),
        "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n",
        "Good day!<|im_end|>",
        adds_bos=False,
    ),
    "other_end_of_turn": Kind(
        PHI_3, "<s>", "<|endoftext|>", ("<|user|>", "<|assistant|>", "<|end|>"),
        "<s><|user|>\nHi there<|end|>\n<|assistant|>\n",
        "Good day!<|end|>",
    ),
    "gemma": Kind(
        GEMMA, "<bos>", "<eos>", ("<start_of_turn>", "<end_of_turn>"),
        "<bos><start_of_turn>user\nHi there<end_of_turn>\n<start_of_turn>model\n",
        "Good day!<end_of_turn>",
    ),
    "mistral": Kind(
        MISTRAL, "<s>", "</s>", ("[INST]", "[/INST]"),
        "<s>[INST] Hi there [/INST]",
        " Good day!</s>",
    ),
    "thinking": Kind(
        QWEN_3, None, "<|im_end|>", ("<|im_start|>",),
        "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n",
        "<think>\n\n</think>\n\nGood day!<|im_end|>",
    ),
    "dated": Kind(
        LLAMA_3_2, "<|begin_of_text|>", "<|eot_id|>", ("<|start_header_id|>", "<|end_header_id|>"),
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\n<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi there<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "Good day!<|eot_id|>",
    ),
}  # fmt: skip
every_kind = pytest.mark.parametrize("name", KINDS)

Folders = Callable[..., Path]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """`folder_of(kind, merges=(), **files)`: a tokenizer folder of that kind, with files name=JSON value."""

    def make(kind: Kind, merges: Sequence[tuple[str, str]] = (), **files: Any) -> Path:
        folder = tmp_path_factory.mktemp("chat")
        tokenizer = make_tokenizer(kind, merges)
        tokenizer.save_pretrained(folder)
        for file, value in files.items():
            (folder / f"{file}.json").write_text(json.dumps(value))
        return folder

    return make


def make_tokenizer(kind: Kind, merges: Sequence[tuple[str, str]] = ()) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = [*kind.specials, *([kind.bos] if kind.bos else []), kind.eos]
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in specials])
    if kind.bos and kind.adds_bos:
        bos_id = tokenizer.token_to_id(kind.bos)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{kind.bos} $A", pair=f"{kind.bos} $A $B", special_tokens=[(kind.bos, bos_id)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=kind.bos, eos_token=kind.eos, chat_template=kind.template
    )


@pytest.fixture(scope="module")
def chats(folder_of: Folders) -> dict[str, Chat]:
    return {name: Chat.load(folder_of(kind)) for name, kind in KINDS.items()}


def spelled(chat: Chat, kind: Kind, text: str) -> list[int]:
    """The ids of a text in which specials stand for themselves and every other byte for its own id."""
    from tokenizers.pre_tokenizers import ByteLevel

    byte_level = ByteLevel(add_prefix_space=False, use_regex=False)
    ids: list[int] = []
    while text:
        specials = [*kind.specials, kind.eos, *([kind.bos] if kind.bos else [])]
        special = next((token for token in specials if text.startswith(token)), None)
        symbols = [special] if special else list(byte_level.pre_tokenize_str(text[0])[0][0])
        ids += [chat.tokenizer.convert_tokens_to_ids(symbol) for symbol in symbols]
        text = text[len(special) if special else 1 :]
    return ids


@every_kind
def test_prompt_ids_are_the_text_that_the_template_shows_the_model(name, chats):
    kind, chat = KINDS[name], chats[name]
    assert chat.prompt_ids("Hi there") == spelled(chat, kind, kind.prompt)


@every_kind
def test_response_ids_are_what_follows_the_prompt_up_to_the_end_of_the_turn(name, chats):
    kind, chat = KINDS[name], chats[name]
    assert chat.response_ids("Hi there", "Good day!") == spelled(chat, kind, kind.response)


@every_kind
def test_exactly_one_bos_where_the_model_has_one(name, chats):
    kind, chat = KINDS[name], chats[name]
    count = int(kind.prompt.startswith(kind.bos or "\0"))
    prompt = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    for ids in (chat.prompt_ids("Hi"), chat.prompt_ids(prompt), chat.conversation_ids(prompt, "d")):
        assert ids.count(chat.tokenizer.bos_token_id) == count
        assert (ids[0] == chat.bos_id) == bool(count)
        chat.check_one_bos(ids)


@every_kind
def test_conversation_ids_are_prompt_and_response_in_one(name, chats):
    kind, chat = KINDS[name], chats[name]
    ids = spelled(chat, kind, kind.prompt + kind.response)
    assert chat.conversation_ids("Hi there", "Good day!")[: len(ids)] == ids


@every_kind
def test_many_at_once_are_the_same_as_one_by_one(name, chats):
    chat = chats[name]
    prompts = ["Hi", "Why?\n", "Hi", "Grüße"]
    texts = ["", "Because.", " Yes, \n", "Schöne Grüße zurück"]
    assert chat.encode_prompts(prompts) == [chat.prompt_ids(prompt) for prompt in prompts]
    one_by_one = [chat.response_ids(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
    assert chat.encode_responses(prompts, texts) == one_by_one
    assert chat.encode_prompts([]) == chat.encode_responses([], []) == []


@pytest.mark.parametrize("text", ["Good day!", "", "  in front", "behind \n\n", "\n\nA\n\n\nB", "1 + 1", "né à 東京"])
def test_on_llama_3_the_authors_cut_after_five_ids_gives_the_same_response(text, tiny_policy):
    """They render the assistant's turn alone and drop BOS, header start, role, header end and blank line."""
    chat = Chat.load(tiny_policy)
    turn = [{"role": "assistant", "content": text}]
    theirs = chat.tokenizer.apply_chat_template(turn, tokenize=True, return_dict=False)[5:]
    assert chat.response_ids("What is the capital of France?", text) == theirs


def test_prompt_ids_equal_what_transformers_makes_of_the_same_messages(chats):
    for name in set(KINDS) - {"template_without_bos", "dated"}:
        chat = chats[name]
        turns = [{"role": "user", "content": "Hi there"}]
        theirs = chat.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        assert chat.prompt_ids("Hi there") == theirs


def test_a_token_across_the_boundary_leaves_the_prompt_as_the_model_saw_it(folder_of):
    """The merge of line break and "G" would take the last token from the prompt; "da" may merge."""
    kind = KINDS["default_system_turn"]
    chat = Chat.load(folder_of(kind, merges=[("Ċ", "G"), ("d", "a")]))
    assert chat.prompt_ids("Hi there") == spelled(chat, kind, kind.prompt)
    expected = ["G", "o", "o", "d", "Ġ", "da", "y", "!", "<|im_end|>"]
    assert chat.response_ids("Hi there", "Good day!") == chat.tokenizer.convert_tokens_to_ids(expected)


def test_a_response_has_the_ids_that_it_has_after_its_prompt(tmp_path):
    """A tokenizer of the SentencePiece kind puts a space mark before a text; the response of a chat is none that
    begins a text, so it must not get one."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = ["▁", "\n", *map(chr, range(33, 127))]
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.add_special_tokens([AddedToken("</s>", special=True, normalized=False)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", chat_template=ZEPHYR)
    assert fast.tokenize("Go") == ["▁", "G", "o"]
    fast.save_pretrained(tmp_path)
    chat = Chat.load(tmp_path)
    assert chat.tokenizer.convert_ids_to_tokens(chat.response_ids("Hi", "Go on")) == [*"Go▁on", "</s>"]


@every_kind
def test_leaving_most_of_the_prompt_out_changes_no_id(name, chats, folder_of):
    """The definition with nothing left out: ids of the whole conversation minus ids of the prompt."""
    merged = Chat.load(folder_of(KINDS[name], merges=[("o", "d"), ("e", "r"), ("Ġ", "G"), ("Ċ", "G")]))
    for chat in (chats[name], merged):
        for prompt in ("Hi", "order <s>over</s>", "ends with <|im_start|>", "<|eot_id|>"):
            for text in ("Good order!", "  God", "a <|eot_id|> in the text"):
                ids, whole = chat.prompt_ids(prompt), chat.conversation_ids(prompt, text)
                if whole[: len(ids)] == ids:
                    response = chat.response_ids(prompt, text)
                    assert whole[len(ids) :][: len(response)] == response


def test_a_thought_stays_in_the_response(chats):
    chat, kind = chats["thinking"], KINDS["thinking"]
    text = "<think>\nThey greet.\n</think>\n\nGood day!"
    assert chat.response_ids("Hi there", text) == spelled(chat, kind, text + "<|im_end|>")


@pytest.mark.parametrize("header", ["<think>\n", ""])
def test_a_template_that_loses_the_reasoning_is_refused_by_name(header, folder_of):
    kind = Kind(R1.replace("HEADER", header), "<s>", "</s>", (), "", "")
    folder = folder_of(kind)
    chat = Chat.load(folder)
    text = "They greet.</think>Good day!"
    assert chat.prompt_ids("Hi") == spelled(chat, kind, f"<s><|user|>Hi<|assistant|>{header}")
    assert chat.encode_responses(["Hi"], [text]) == [None]
    with pytest.raises(BadUse, match=f"template of {folder} can't encode .*They greet.*--chat_template"):
        chat.response_ids("Hi", text)


def test_the_date_is_fixed_and_can_be_chosen(folder_of, chats):
    folder = folder_of(KINDS["dated"])
    later = Chat.load(folder, date="2025-01-31")
    assert "Today Date: 31 Jan 2025\n" in later.tokenizer.decode(later.prompt_ids("Hi"))
    assert later.describe()["date"] == "2025-01-31"
    assert chats["dated"].describe()["date"] == "2024-07-26"
    assert chats["llama_3"].describe()["date"] is None
    with pytest.raises(BadUse, match=r"--date 31\.1\.2025 is not a day of the form YYYY-MM-DD"):
        Chat.load(folder, date="31.1.2025")


def test_end_ids_are_the_generation_configs_the_tokenizers_and_the_templates(folder_of):
    """Gemma's tokenizer ends texts with <eos>, its template turns with <end_of_turn>; configs add more."""
    kind = KINDS["gemma"]
    bare = Chat.load(folder_of(kind))
    eos, end_of_turn = (bare.tokenizer.convert_tokens_to_ids(token) for token in ("<eos>", "<end_of_turn>"))
    assert bare.end_ids == (eos, end_of_turn)
    assert Chat.load(folder_of(kind, generation_config={"eos_token_id": 7})).end_ids == (7, eos, end_of_turn)
    both = folder_of(kind, generation_config={"eos_token_id": [end_of_turn, 9]}, config={"eos_token_id": 8})
    assert Chat.load(both).end_ids == (end_of_turn, 9, eos)
    assert Chat.load(folder_of(kind, config={"eos_token_id": 8})).end_ids == (8, eos, end_of_turn)


def test_a_system_prompt_goes_before_prompts_that_have_none(folder_of):
    kind = KINDS["default_system_turn"]
    chat = Chat.load(folder_of(kind), system_prompt="Be brief.")
    own = [{"role": "system", "content": "Sing."}, {"role": "user", "content": "Hi"}]
    rest = "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert chat.prompt_ids("Hi") == spelled(chat, kind, f"<|im_start|>system\nBe brief.{rest}")
    assert chat.prompt_ids(own) == spelled(chat, kind, f"<|im_start|>system\nSing.{rest}")
    assert chat.describe()["system_prompt"] == "Be brief."


def test_keys_that_arrow_filled_with_null_are_as_if_absent(folder_of):
    template = CHATML.replace("{{ m.c", "{% if m.name is defined %}({{ m.name }}) {% endif %}{{ m.c")
    kind = Kind(template, None, "<|im_end|>", ("<|im_start|>",), "", "")
    chat = Chat.load(folder_of(kind))
    named, unnamed = ({"role": "user", "content": "Hi", "name": name} for name in ("Ann", None))
    expected = "<|im_start|>user\n(Ann) Hi<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert chat.prompt_ids([named, unnamed]) == spelled(chat, kind, expected)


@every_kind
def test_content_in_parts_is_their_text(name, chats):
    """As chat APIs write it; Arrow gives every part all keys."""
    parts = [{"type": "text", "text": "Hi", "image_url": None}, {"type": "text", "text": "there"}]
    assert chats[name].prompt_ids([{"role": "user", "content": parts}]) == chats[name].prompt_ids("Hi\nthere")


@pytest.mark.parametrize(
    "content",
    [5, [], {"type": "text", "text": "Hi"}, ["Hi"], [{"type": "text"}], [{"type": "image_url", "image_url": "x.png"}]],
)
def test_content_that_is_no_text_is_refused(content, chats):
    with pytest.raises(BadUse, match=r"a message's content must be text, or a list of parts of type text, not "):
        chats["llama_3"].prompt_ids([{"role": "user", "content": content}])


def test_a_role_that_is_no_text_is_refused(folder_of):
    template = CHATML.replace("{{ m.role }}\n{{ m.content }}", "{{ m.role + '\n' + m.content }}")
    chat = Chat.load(folder_of(Kind(template, None, "<|im_end|>", ("<|im_start|>",), "", "")))
    with pytest.raises(BadUse, match=r"refuses a conversation \(first roles: 5\): unsupported operand"):
        chat.prompt_ids([{"role": 5, "content": "Hi"}])


@pytest.mark.parametrize("prompt", [[], None, ["Hi"], [{"content": "Hi"}], [{"role": "assistant", "content": "a"}]])
def test_what_no_answer_can_follow_is_refused(prompt, chats):
    with pytest.raises(BadUse, match=r"a (prompt|message) must be"):
        chats["llama_3"].prompt_ids(prompt)


def test_a_bos_typed_by_the_user_is_no_error(chats):
    chat = chats["mistral"]
    ids = chat.prompt_ids("what does <s>old</s> mean?")
    chat.check_one_bos(ids)
    assert ids.count(chat.bos_id) == 2


def test_models_that_can_not_chat_are_refused_naming_the_flag(folder_of, tmp_path):
    kind = KINDS["llama_3"]
    folder = folder_of(kind)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(BadUse, match=f"--base_model {folder} has no chat template: pass --chat_t"):
        Chat.load(folder, flag="--base_model")
    file = tmp_path / "mine.jinja"
    file.write_text(CHATML)
    assert Chat.load(folder, chat_template=str(file)).template == CHATML
    with pytest.raises(BadUse, match=r"--chat_template nowhere\.jinja: no such file"):
        Chat.load(folder, chat_template="nowhere.jinja")
    file.write_text("{{ bos_token }}" + LLAMA_3)
    with pytest.raises(BadUse, match=f"template of {file} begins a prompt with 2 BOS"):
        Chat.load(folder, chat_template=str(file))
    file.write_text("{% for m in messages %}")
    with pytest.raises(BadUse, match=f"template of {file} refuses"):
        Chat.load(folder, chat_template=str(file))
    with pytest.raises(BadUse, match=f"--model {tmp_path} has no tokenizer"):
        Chat.load(tmp_path)
    with pytest.raises(BadUse, match=f"--model {tmp_path}/no: no such folder"):
        Chat.load(tmp_path / "no")


def test_a_conversation_that_the_template_refuses_is_named(folder_of):
    folder = folder_of(KINDS["gemma"])
    with pytest.raises(BadUse, match=f"{folder} refuses .*system, user.*System role not supported"):
        Chat.load(folder, system_prompt="Be brief.")


def test_the_pad_id_never_ends_a_turn(folder_of):
    kind = KINDS["default_system_turn"]
    folder = folder_of(kind)
    chat = Chat.load(folder)
    past = len(chat.tokenizer)
    assert chat.pad_id == past  # no pad token
    chat.tokenizer.pad_token = "<|im_end|>"
    assert Chat(chat.tokenizer, kind.template, "", None, None, ()).pad_id == past
    chat.tokenizer.pad_token = "<|endoftext|>"
    pad = chat.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert Chat(chat.tokenizer, kind.template, "", None, None, ()).pad_id == pad
    assert Chat(chat.tokenizer, kind.template, "", None, None, (pad,)).pad_id == past


def test_truncation_and_padding_stored_with_a_tokenizer_cut_and_fill_nothing(folder_of, tmp_path):
    """tokenizer.json of models that were trained on short texts often keeps both."""
    chat = Chat.load(shutil.copytree(folder_of(KINDS["llama_3"]), tmp_path / "model"))
    expected = chat.encode_prompts(["a", "a prompt of more than eight bytes"])
    file = tmp_path / "model" / "tokenizer.json"
    stored = json.loads(file.read_text())
    stored["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    stored["padding"] = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "a",
    }
    file.write_text(json.dumps(stored))
    assert Chat.load(tmp_path / "model").encode_prompts(["a", "a prompt of more than eight bytes"]) == expected


def test_hashes_tell_tokenizers_and_templates_apart(folder_of, chats):
    kind = KINDS["llama_3"]
    same = Chat.load(folder_of(kind)).describe()
    assert same == chats["llama_3"].describe()
    assert Chat.load(folder_of(kind, merges=[("o", "d")])).tokenizer_hash != same["tokenizer_hash"]
    assert chats["dated"].tokenizer_hash == same["tokenizer_hash"]
    assert chats["dated"].template_hash != same["template_hash"]
