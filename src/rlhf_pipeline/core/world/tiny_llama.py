"""A Llama of the third generation's kind, small enough for a laptop: its tokenizer, its template, its folder.

Everything that decides how text becomes ids is as in Llama 3: the pre-tokenizer's pattern, the special
tokens, the chat template, one BOS put in front by the tokenizer, no pad token, and two ids that end a turn.
Only the vocabulary is small, so that code which works on it has no reason to be surprised by the 8B model.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedTokenizerFast

BOS, END_OF_TEXT, END_OF_TURN = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"
START_HEADER, END_HEADER = "<|start_header_id|>", "<|end_header_id|>"
SPECIAL_TOKENS = (BOS, END_OF_TEXT, START_HEADER, END_HEADER, END_OF_TURN)
ROLES = ("system", "user", "assistant")

WORD_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Llama 3's pre-tokenizer. GPT-2's cuts "\\n\\n" in two before a letter: no one-token end of a header."""

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS) + 32  # all bytes, the special tokens, the words of the headers


def build_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on `texts`, with at most `vocab_size` ids, special tokens last.

    The three roles and the blank line after a header are one token each, as in Llama 3, so that a rendered
    conversation begins with five ids: BOS, header start, role, header end, blank line. Raises ValueError if
    `vocab_size` is below SMALLEST_VOCABULARY.
    """
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
        processors,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(f"a vocabulary of {vocab_size} is too small: {SMALLEST_VOCABULARY} or more is needed")
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = list(texts)
    headers = [f"{role}\n\n" for role in ROLES] * (len(texts) + 1)  # as frequent as turns, so merged before anything
    tokenizer.train_from_iterator([*headers, *texts], trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{BOS} $A",
                pair=f"{BOS} $A {BOS}:1 $B:1",
                special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
            ),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END_OF_TURN,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def llama_config(
    tokenizer: PreTrainedTokenizerFast,
    *,
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    intermediate_size: int,
    init_std: float,
    tie_word_embeddings: bool = True,
    max_length: int = 2048,
) -> LlamaConfig:
    """A float32 Llama for `tokenizer`, with a context window of `max_length` tokens.

    hidden_size / num_heads should be 32 or 64: vLLM's CPU attention refuses less.
    """
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        intermediate_size=intermediate_size,
        initializer_range=init_std,
        tie_word_embeddings=tie_word_embeddings,
        max_position_embeddings=max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=end_ids(tokenizer),
        pad_token_id=None,
        dtype="float32",
    )


def end_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The ids at which generation stops, in the order of Llama-3-8B-Instruct's generation config."""
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[END_OF_TEXT], vocabulary[END_OF_TURN]]


def write_policy_folder(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    *,
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    intermediate_size: int | None = None,
    init_std: float = 0.02,
    tie_word_embeddings: bool = True,
    max_length: int = 2048,
    seed: int = 0,
) -> Path:
    """A Llama with random float32 weights, ready for transformers and vLLM. Returns `folder`.

    intermediate_size defaults to 3 * hidden_size; the other sizes are those of `llama_config`.
    """
    import torch
    from transformers import GenerationConfig, LlamaForCausalLM

    config = llama_config(
        tokenizer,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        intermediate_size=intermediate_size or 3 * hidden_size,
        init_std=init_std,
        tie_word_embeddings=tie_word_embeddings,
        max_length=max_length,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id,
        do_sample=True, temperature=0.6, top_p=0.9,
    )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
