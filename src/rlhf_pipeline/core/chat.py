"""Chats as token ids: the only place of the project that applies a chat template.

A response's ids are, by construction, what the model's own template puts after the ids of the prompt, up to
and with the id that ends the turn. No header is counted and no id known by heart, so any chat model will do.
"""

from __future__ import annotations

import datetime
import fnmatch
import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rlhf_pipeline.core import hub
from rlhf_pipeline.core.command import BadUse
from rlhf_pipeline.core.files import read_json
from rlhf_pipeline.core.storage import parse_ref

Prompt = str | list[dict[str, Any]]
"""A user's text, or the messages of a conversation whose next turn is the assistant's."""

DATE = "2024-07-26"
"""What a template that asks for today's date gets. A fixed day, the one that Llama's templates fall back on:
with the clock's, a run that goes on after midnight would have two kinds of prompts."""

_PROBE = "zyxwv"


@dataclass(frozen=True)
class Chat:
    """A tokenizer and its chat template. Build it with `Chat.load`."""

    tokenizer: Any
    template: str
    """The Jinja text."""
    name: str
    """Where the template comes from, as the user knows it."""
    system_prompt: str | None
    """Put before every prompt that has no system turn of its own."""
    date: str | None
    """The day that the template is told; None if it doesn't ask."""
    stop_ids: tuple[int, ...]
    """Where the model's generation config stops."""

    @classmethod
    def load(
        cls,
        model: str | Path,
        *,
        chat_template: str | None = None,
        system_prompt: str | None = None,
        date: str | None = None,
        flag: str = "--model",
    ) -> Chat:
        """The chat of a model folder or Hub id; no weights are read.

        chat_template: a Jinja file that replaces the model's. date: YYYY-MM-DD, default DATE. Raises BadUse,
        naming `flag`, for a model without tokenizer or template, and for a template that does not work.
        """
        from transformers import AutoTokenizer

        folder = _tokenizer_folder(str(model), flag)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        template = _read_template(chat_template) if chat_template else _own_template(tokenizer)
        if template is None:
            raise BadUse(
                f"{flag} {model} has no chat template: pass --chat_template FILE or an instruction-tuned model."
            )
        chat = cls(
            tokenizer=tokenizer,
            template=template,
            name=chat_template or str(model),
            system_prompt=system_prompt,
            date=_checked_date(date or DATE) if "strftime_now" in template else None,
            stop_ids=_stop_ids(folder),
        )
        chat.check_one_bos(chat.prompt_ids(_PROBE))
        return chat

    # Prompts, responses, conversations

    def messages(self, prompt: Prompt) -> list[dict[str, Any]]:
        """The conversation that `prompt` is, system prompt first. Raises BadUse if no answer can follow."""
        return turns_of(prompt, self.system_prompt)

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """The ids after which the model answers: one BOS where the model has one, the turns, its header."""
        return self.encode_prompts([prompt])[0]

    def encode_prompts(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """`prompt_ids` of many prompts, in one call of the tokenizer."""
        turns = [self.messages(prompt) for prompt in prompts]
        return self._encode(self._render(turns, open_turn=True))

    def response_ids(self, prompt: Prompt, text: str) -> list[int]:
        """What the template puts after `prompt_ids(prompt)` for the assistant's `text`, end of turn included.

        A template that opens every answer with an empty thinking block puts it here too. Raises BadUse if the
        template does not go on from the prompt's ids, or loses a part of the text (reasoning, in some).
        """
        ids = self.encode_responses([prompt], [text])[0]
        if ids is None:
            raise BadUse(
                f"the chat template of {self.name} can't encode a finished response: with the response "
                f"{text[:60]!r} it does not go on from the prompt with this text and an end of turn. "
                "Pass data with sampled ids (response_0_tokens, ...), or --chat_template FILE."
            )
        return ids

    def encode_responses(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[list[int] | None]:
        """`response_ids` of texts[i] to prompts[i]; None where that raises."""
        turns = [self.messages(prompt) for prompt in prompts]
        heads = self._render(turns, open_turn=True)
        wholes = self._render(_answered(turns, texts), open_turn=False)
        starts = [self._opening_start(head) for head in heads]
        openings = [head[start:] for head, start in zip(heads, starts, strict=True)]
        different = list(dict.fromkeys(openings))
        opening_ids = dict(zip(different, self._tokenize(different), strict=True))
        ids = self._tokenize([whole[start:] for whole, start in zip(wholes, starts, strict=True)])
        return [
            self._finished(opening_ids[openings[row]], ids[row], whole[len(head) :])
            if whole.startswith(head) and _is_kept(text, whole[len(head) :])
            else None
            for row, (head, whole, text) in enumerate(zip(heads, wholes, texts, strict=True))
        ]

    def _finished(self, opening_ids: list[int], ids: list[int], text: str) -> list[int] | None:
        """Of `ids` those after `opening_ids`, up to the end of the turn; None if nothing ends it.

        text: what follows the opening. Where a token spans the boundary it is tokenized by itself: the model saw the
        prompt's ids and wrote its response after them.
        """
        if self._after_end is None:
            return None
        spanned = ids[: len(opening_ids)] != opening_ids
        rest = self._tokenize([text])[0] if spanned else ids[len(opening_ids) :]
        rest = rest[: len(rest) - self._after_end]
        return rest if rest and rest[-1] in self.end_ids else None

    def conversation_ids(self, prompt: Prompt, response: str) -> list[int]:
        """Prompt and response as one finished conversation, as reward models read it; begins with one BOS."""
        whole = self._render(_answered([self.messages(prompt)], [response]), open_turn=False)
        return self._encode(whole)[0]

    # Ids with a meaning

    @cached_property
    def bos_id(self) -> int | None:
        """The id that begins every prompt: the template writes it, or the tokenizer puts it before a text."""
        bos = self.tokenizer.bos_token_id
        by_tokenizer = self.tokenizer("a")["input_ids"][:1] == [bos]
        return bos if bos is not None and (by_tokenizer or self._template_writes(bos)) else None

    def check_one_bos(self, ids: Sequence[int]) -> None:
        """Raise BadUse unless `ids` begin with exactly one BOS, or the model has none.

        Only the front counts: some templates write one before every user turn.
        """
        if self.bos_id is not None and (ids[0] != self.bos_id or list(ids[1:2]) == [self.bos_id]):
            count = sum(token == self.bos_id for token in ids[:2])
            raise BadUse(
                f"the chat template of {self.name} begins a prompt with {count} BOS (id {self.bos_id}), "
                "expected one: mend the template, or pass another with --chat_template FILE."
            )

    @cached_property
    def end_ids(self) -> tuple[int, ...]:
        """The ids at which a response ends: the generation config's, the tokenizer's, the template's."""
        eos = self.tokenizer.eos_token_id
        special = {index for index, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        by_template = [token for token in self._tail if token in special][:1]
        return tuple(dict.fromkeys([*self.stop_ids, *([] if eos is None else [eos]), *by_template]))

    @cached_property
    def pad_id(self) -> int:
        """The tokenizer's pad token, unless that also ends a turn; else the first id past the vocabulary."""
        pad = self.tokenizer.pad_token_id
        if pad is not None and pad not in self.end_ids:
            return int(pad)
        return int(max(self.tokenizer.get_vocab().values())) + 1

    # Provenance

    @cached_property
    def template_hash(self) -> str:
        """sha256 of the template's text."""
        return hashlib.sha256(self.template.encode()).hexdigest()

    @cached_property
    def tokenizer_hash(self) -> str:
        """sha256 of the vocabulary, special tokens included: what every id means."""
        digest = hashlib.sha256()
        for token, index in sorted(self.tokenizer.get_vocab().items()):
            digest.update(f"{index} {token}\n".encode())
        return digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        """What provenance says of it: all that decides the ids of a chat."""
        return {
            "template_hash": self.template_hash,
            "tokenizer_hash": self.tokenizer_hash,
            "system_prompt": self.system_prompt,
            "date": self.date,
            "bos_id": self.bos_id,
            "pad_id": self.pad_id,
        }

    # Rendering

    def _render(self, conversations: list[list[dict[str, Any]]], *, open_turn: bool) -> list[str]:
        """The template's text of each conversation; with `open_turn` up to where the assistant begins."""
        from jinja2.exceptions import TemplateError

        if not conversations:
            return []
        try:
            texts: list[str] = self.tokenizer.apply_chat_template(
                conversations,
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=open_turn,
                **self._clock,
            )
        except (TemplateError, TypeError) as error:  # TypeError: a role that is no text
            roles = ", ".join(str(turn["role"]) for turn in conversations[0])
            raise BadUse(
                f"the chat template of {self.name} refuses a conversation (first roles: {roles}): {error}"
            ) from error
        return texts

    @cached_property
    def _clock(self) -> dict[str, Callable[[str], str]]:
        if self.date is None:
            return {}
        day = datetime.datetime.fromisoformat(self.date)
        return {"strftime_now": lambda form: day.strftime(form)}

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        if self.tokenizer.is_fast:
            backend = self.tokenizer.backend_tokenizer
            backend.no_truncation()  # a tokenizer.json may come with either
            backend.no_padding()
            return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
        ids: list[list[int]] = self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]
        return ids

    def _encode(self, rendered: list[str]) -> list[list[int]]:
        ids = self._tokenize(rendered)
        return [[*self._bos_in_front, *row] for row in ids] if self._bos_in_front else ids

    @cached_property
    def _bos_in_front(self) -> tuple[int, ...]:
        """The BOS that a tokenizer has and this template forgets, or nothing."""
        bos = self.bos_id
        return () if bos is None or self._template_writes(bos) else (bos,)

    def _template_writes(self, bos: int) -> bool:
        text = self._render([self.messages(_PROBE)], open_turn=True)
        return self._tokenize(text)[0][:1] == [bos]

    def _opening_start(self, head: str) -> int:
        """Where the last special token of a prompt begins. Text from there on has the ids that it has in the whole,
        since tokenizers cut at special tokens first; so most of a prompt need not be tokenized with each response."""
        return max(head.rfind(self._last_special), 0) if self._last_special else 0

    @cached_property
    def _last_special(self) -> str | None:
        prompt = self._render([self.messages(_PROBE)], open_turn=True)[0]
        special = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        return max(special, key=prompt.rfind, default=None)

    @cached_property
    def _tail(self) -> list[int]:
        """The ids that the template puts after the text of an assistant's last turn."""
        whole = self._render(_answered([self.messages("a")], [_PROBE]), open_turn=False)[0]
        return self._tokenize([whole.rpartition(_PROBE)[2]])[0] if _PROBE in whole else []

    @cached_property
    def _after_end(self) -> int | None:
        """How many of those come after the end of the turn, where sampling stops; None if nothing ends it."""
        ends = [position for position, token in enumerate(self._tail) if token in self.end_ids]
        return len(self._tail) - ends[0] - 1 if ends else None


def _answered(turns: Sequence[list[dict[str, Any]]], texts: Sequence[str]) -> list[list[dict[str, Any]]]:
    return [[*before, {"role": "assistant", "content": text}] for before, text in zip(turns, texts, strict=True)]


def _is_kept(text: str, rendered: str) -> bool:
    """Whether a template left `text` as it is, but for white space."""
    return text in rendered or "".join(text.split()) in "".join(rendered.split())


def turns_of(prompt: Prompt, system_prompt: str | None) -> list[dict[str, Any]]:
    """The conversation that `prompt` is, system prompt first. Raises BadUse if no answer can follow."""
    if isinstance(prompt, str):
        turns: list[dict[str, Any]] = [{"role": "user", "content": prompt}]
    else:
        turns = [_message(turn) for turn in prompt or ()]
    if not turns or any("role" not in turn for turn in turns) or turns[-1]["role"] == "assistant":
        raise BadUse(
            "a prompt must be text, or a list of {role, content} that ends before an assistant turn, not "
            f"{str(prompt)[:200]!r}."
        )
    if system_prompt is not None and turns[0]["role"] not in ("system", "developer"):
        turns.insert(0, {"role": "system", "content": system_prompt})
    return turns


def _message(turn: Any) -> dict[str, Any]:
    """A message as templates expect it. Arrow gives every message all keys, with null for those it lacks."""
    if not isinstance(turn, dict):
        raise BadUse(f"a message must be an object with role and content, not {str(turn)[:200]!r}.")
    message = {key: value for key, value in turn.items() if value is not None}
    if "content" in message:
        message["content"] = text_of(message["content"])
    return message


def text_of(content: Any) -> str:
    """A message's content, which may be a list of parts {type: text, text}: their texts, on lines of their own."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    texts = [part["text"] for part in parts if _is_text(part)]
    if not texts or len(texts) < len(parts):
        raise BadUse(f"a message's content must be text, or a list of parts of type text, not {str(content)[:200]!r}.")
    return "\n".join(texts)


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _tokenizer_folder(model: str, flag: str) -> Path:
    ref = parse_ref(model, flag=flag)
    if ref.path is None:
        from rlhf_pipeline.core.models import DESCRIPTION_FILES  # that room brings torch

        commit, _ = hub.look_up(str(ref.repo_id), "model", ref.revision, flag=flag)
        return hub.download(str(ref.repo_id), "model", commit, patterns=DESCRIPTION_FILES, flag=flag)
    if not ref.path.is_dir():
        raise BadUse(f"{flag} {model}: no such folder. Give a model's folder, or a Hub id OWNER/NAME.")
    names = os.listdir(ref.path)
    if not fnmatch.filter(names, "tokenizer*") and "vocab.json" not in names:
        raise BadUse(f"{flag} {model} has no tokenizer: copy tokenizer.json of the model it came from.")
    return ref.path


def _own_template(tokenizer: Any) -> str | None:
    template = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template


def _read_template(path: str) -> str:
    file = Path(path).expanduser()
    if not file.is_file():
        raise BadUse(f"--chat_template {path}: no such file; expected a Jinja chat template.")
    return file.read_text(encoding="utf-8")


def _checked_date(date: str) -> str:
    try:
        return datetime.date.fromisoformat(date).isoformat()
    except ValueError:
        raise BadUse(f"--date {date} is not a day of the form YYYY-MM-DD, for example {DATE}.") from None


def _stop_ids(folder: Path) -> tuple[int, ...]:
    """eos_token_id of the generation config, one or several; of the model's config if there is none."""
    for name in ("generation_config.json", "config.json"):
        ids = (read_json(folder / name) or {}).get("eos_token_id")
        if ids is not None:
            return tuple(ids) if isinstance(ids, list) else (ids,)
    return ()
