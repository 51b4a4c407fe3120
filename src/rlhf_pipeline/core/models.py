"""A policy's folder: find it, load it, and save one that vLLM and transformers load.

A saved policy is its starting model with other weights: every other file is a byte copy, so tokenizer,
template, stop ids and dtype can't change on the way.
"""

from __future__ import annotations

import fnmatch
import importlib
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from rlhf_pipeline.core import attention, hub
from rlhf_pipeline.core.command import BadUse
from rlhf_pipeline.core.files import read_json, sha256_of, sync_file, sync_folder, write_json
from rlhf_pipeline.core.provenance import fingerprint_model
from rlhf_pipeline.core.storage import parse_ref
from rlhf_pipeline.core.weights import some

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Attention = Literal["auto", "flash_attention_2", "packed", "sdpa", "eager"]

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
    "*.jinja",
    "chat_template.json",
    "*processor_config.json",
)
DESCRIPTION_FILES = (CONFIG, "generation_config.json", *TOKENIZER_FILES)
WEIGHT_FILES = ("*.safetensors", INDEX)
CHAT_TEMPLATE = "chat_template.jinja"
"""Where it stands it is the template, whatever tokenizer_config.json says."""
PARTIAL_POLICY = ".policy"
"""Where a policy is written inside its folder before it appears there."""

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""safetensors' names of the dtypes a model can be trained from."""


@dataclass(frozen=True)
class ModelRef:
    """A model that is there: its files are complete, and `folder` holds the small ones."""

    text: str
    """As the user wrote it."""
    folder: Path
    """The local folder, or the Hub snapshot, whose weights `fetch_weights` downloads."""
    repo_id: str | None = None
    commit: str | None = None
    """Of a Hub model."""


def resolve_model(text: str, *, flag: str, chat_template: bool = False, weights: bool = True) -> ModelRef:
    """What `text` names, a local folder or a Hub id, checked without loading or downloading any weight.

    `chat_template`: the model must bring one. `weights`: it must have some. Raises BadUse, naming `flag`, for
    a folder that doesn't exist, or lacks config.json, safetensors weights, a shard of them, a tokenizer or
    the asked chat template.
    """
    ref = parse_ref(text, flag=flag)
    if ref.path is not None:
        if not ref.path.is_dir():
            raise BadUse(f"{flag} {text}: no such folder. Give a model's folder, or a Hub id OWNER/NAME.")
        _check_files(ref.path, os.listdir(ref.path), f"{flag} {text}", chat_template, weights)
        return ModelRef(text, ref.path)
    repo_id = str(ref.repo_id)
    commit, names = hub.look_up(repo_id, "model", ref.revision, flag=flag)
    folder = hub.download(repo_id, "model", commit, patterns=(*DESCRIPTION_FILES, INDEX), flag=flag)
    _check_files(folder, names, f"{flag} {text}", chat_template, weights)
    return ModelRef(text, folder, repo_id, commit)


def _check_files(folder: Path, names: Iterable[str], what: str, chat_template: bool, weights: bool) -> None:
    names = sorted(names)
    if CONFIG not in names:
        hint = "a folder as save_pretrained or train writes it is expected"
        if PARTIAL_POLICY in names:
            hint = "its writer has not finished: run that command again"
        raise BadUse(f"{what} has no {CONFIG} (it has {', '.join(names[:8]) or 'nothing'}); {hint}.")
    if weights and not fnmatch.filter(names, "*.safetensors"):
        raise BadUse(f"{what} has no *.safetensors; other formats are not read, convert them first.")
    index = read_json(folder / INDEX)
    missing = sorted(set(index["weight_map"].values()) - set(names)) if index else []
    if missing:
        raise BadUse(f"{what} lacks weights that its {INDEX} names: {', '.join(missing)}.")
    if not fnmatch.filter(names, "tokenizer*") and "vocab.json" not in names:
        raise BadUse(f"{what} has no tokenizer (tokenizer.json): copy that of the model it came from.")
    if chat_template and not has_chat_template(folder):
        raise BadUse(f"{what} has no chat template: pass --chat_template FILE or an instruction-tuned model.")


def has_chat_template(folder: Path) -> bool:
    """Whether a model folder brings a chat template, in any of the three places where it may stand."""
    if (folder / CHAT_TEMPLATE).exists() or (folder / "chat_template.json").exists():
        return True
    return bool((read_json(folder / "tokenizer_config.json") or {}).get("chat_template"))


def fetch_weights(model: ModelRef, *, flag: str) -> Path:
    """The folder with everything in it; downloads the safetensors of a Hub model. Call it once per node."""
    if model.repo_id is None or model.commit is None:
        return model.folder
    patterns = (*DESCRIPTION_FILES, *WEIGHT_FILES)
    return hub.download(model.repo_id, "model", model.commit, patterns=patterns, flag=flag)


def fingerprint(model: ModelRef) -> str:
    """The Hub commit, or sha256 of a local folder's safetensors (of its config.json, if it has none)."""
    if model.commit is not None:
        return model.commit
    if not any(model.folder.glob("*.safetensors")):
        return sha256_of([model.folder / CONFIG])
    return fingerprint_model(model.folder)


def draw_policy(config_folder: Path, folder: Path, *, seed: int) -> None:
    """Write a policy with random float32 weights for a folder's config, with its tokenizer files."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(load_config(config_folder), dtype=torch.float32)
    folder.mkdir(parents=True, exist_ok=True)
    for name in files_matching(config_folder, DESCRIPTION_FILES):
        if name != CONFIG:
            shutil.copyfile(config_folder / name, folder / name)
    _save_weights(model, model.state_dict(), folder)
    shutil.copyfile(config_folder / CONFIG, folder / CONFIG)


def load_config(folder: Path, *, trust_remote_code: bool = False) -> PretrainedConfig:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)


def without_weights(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """A causal language model from its config alone: layers and shapes, on the meta device."""
    from transformers import AutoModelForCausalLM

    config = load_config(folder, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return model


def context_window(config: PretrainedConfig) -> int | None:
    """Tokens a model can attend to, prompt and response together; None if its config doesn't say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype of most of the weights, read from the header of the first shard.

    Raises BadUse for quantised weights, which can't be trained.
    """
    from safetensors import safe_open

    elements: dict[str, int] = {}
    with safe_open(min(folder.glob("*.safetensors")), framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (no mapping)
            tensor = file.get_slice(name)
            size = torch.Size(tensor.get_shape()).numel()
            elements[tensor.get_dtype()] = elements.get(tensor.get_dtype(), 0) + size
    name = max(elements, key=lambda key: elements[key])
    if name not in DTYPES:
        raise BadUse(f"--model {folder} holds {name} weights; training needs one of {', '.join(DTYPES)}.")
    return DTYPES[name]


def choose_attention(name: Attention, config: PretrainedConfig, *, half_precision: bool, can_pack: bool = False) -> str:
    """The attention implementation to load a model with; "auto" never downloads anything.

    `half_precision`: products run in it. `can_pack`: the caller packs its rows where attention takes that. "auto" is,
    on a CUDA GPU in half precision, flash_attention_2 where it is installed, else packed rows through torch's varlen
    attention where that works; PACKED also on a CPU; else sdpa, or eager for a model that sdpa computes wrongly (it
    drops a soft cap on attention logits) or not at all. Raises BadUse for a choice that is not there or not right:
    transformers would fetch a kernel from the Hub, or go on.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    flash = half_precision and _flash_attention_works()
    sdpa = not capped and getattr(model_class, "_supports_sdpa", True)
    obstacle = _obstacle_to_packing(model_class, config, half_precision) if can_pack else "this command pads its rows"
    if name == "auto":
        if flash and getattr(model_class, "_supports_flash_attn", True):
            return "flash_attention_2"
        if obstacle is None:
            return attention.PACKED
        return "sdpa" if sdpa else "eager"
    if name == "flash_attention_2" and not flash:
        raise BadUse(
            "--attn_implementation flash_attention_2 needs a CUDA device, bf16 and an installed flash-attn; "
            "auto takes the best that is there."
        )
    if name == attention.PACKED and obstacle is not None:
        raise BadUse(f"--attn_implementation packed can't be had: {obstacle}; auto takes the best that is there.")
    if name == "sdpa" and not sdpa:
        raise BadUse(f"--attn_implementation sdpa can't compute {config.model_type}'s attention: pass eager or auto.")
    return name


def _obstacle_to_packing(model_class: type | None, config: PretrainedConfig, half_precision: bool) -> str | None:
    """Why a model can't have packed rows through core/attention.py here; None if it can."""
    text = config.get_text_config()
    if getattr(text, "v_head_dim", None) is not None:
        return f"the values of {config.model_type}'s attention are narrower than its queries"
    slides = getattr(text, "sliding_window", None) is not None and getattr(text, "use_sliding_window", True)
    layers = set(getattr(text, "layer_types", None) or ["sliding_attention" if slides else "full_attention"])
    if not getattr(model_class, "_supports_attention_backend", False):
        return f"transformers lets no attention be plugged into {config.model_type}"
    if getattr(text, "attn_logit_softcapping", None) is not None or layers != {"full_attention"}:
        return f"{config.model_type} has more than plain causal attention (a soft cap, a sliding window, other layers)"
    if torch.cuda.is_available() and not (half_precision and attention.varlen_works()):
        return "on a GPU it needs bf16 and torch's varlen attention, which does not work here"
    return None


def _flash_attention_works() -> bool:
    if not torch.cuda.is_available():
        return False
    try:
        importlib.import_module("flash_attn")
    except ImportError:  # not installed, or built for another torch
        return False
    return True


def load_policy(
    folder: Path, *, dtype: torch.dtype, attn_implementation: str, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The causal language model in `folder`, without dropout.

    It is in eval mode, where gradient checkpointing is inactive: call train(). `attn_implementation` is what
    `choose_attention` said. Only safetensors are read. Under ZeRO-3, call it after the Accelerator exists:
    the parameters are partitioned while they load. Raises BadUse for a checkpoint that lacks weights.
    """
    from transformers import AutoModelForCausalLM

    attention.register()
    config = load_config(folder, trust_remote_code=trust_remote_code)
    disable_dropout(config)
    model: PreTrainedModel
    model, report = AutoModelForCausalLM.from_pretrained(
        folder,
        config=config,
        dtype=dtype,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
    )
    if report["missing_keys"]:
        raise BadUse(f"{folder} lacks weights that its {CONFIG} asks for: {some(report['missing_keys'])}.")
    return model


def disable_dropout(config: PretrainedConfig) -> None:
    """Set every dropout probability of a config, and of the configs in it, to 0."""
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        for name, value in part.to_dict().items():
            if isinstance(value, float) and ("dropout" in name or "pdrop" in name or "layerdrop" in name):
                setattr(part, name, 0.0)


def save_policy(
    model: PreTrainedModel,
    state_dict: Mapping[str, torch.Tensor],
    *,
    start: Path,
    folder: Path,
    chat_template: Path | None = None,
) -> None:
    """Write `state_dict` as a policy into `folder`, which generate --model, vLLM and from_pretrained load.

    `model` gives the names that the weights have on disk; `start` is the folder it was loaded from, whose
    dtype the weights are cast to and whose config, generation config (with its stop ids), tokenizer and chat
    template (or the file `chat_template` in its place) are copied byte for byte. config.json arrives last and
    leaves first, so no one ever loads half a policy; other things in `folder` stay. Call it on one rank.
    """
    partial = folder / PARTIAL_POLICY
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    _save_weights(model, _cast(state_dict, stored_dtype(start)), partial)
    for name in files_matching(start, DESCRIPTION_FILES):
        shutil.copyfile(start / name, partial / name)
    if chat_template is not None:
        shutil.copyfile(chat_template, partial / CHAT_TEMPLATE)
    for path in partial.iterdir():
        sync_file(path)

    (folder / CONFIG).unlink(missing_ok=True)
    sync_folder(folder)
    for name in files_matching(folder, (*WEIGHT_FILES, *DESCRIPTION_FILES)):
        (folder / name).unlink()
    for name in sorted(os.listdir(partial), key=lambda name: name == CONFIG):
        if name == CONFIG:
            sync_folder(folder)
        os.replace(partial / name, folder / name)
    partial.rmdir()
    sync_folder(folder)


def add_to_config(folder: Path, values: Mapping[str, Any]) -> None:
    """Add keys to a folder's config.json."""
    write_json(folder / CONFIG, {**read_json(folder / CONFIG), **values})


def files_matching(folder: Path, patterns: Iterable[str]) -> list[str]:
    return sorted({path.name for pattern in patterns for path in folder.glob(pattern) if path.is_file()})


def _cast(state_dict: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The floating-point tensors in `dtype`, on the CPU; tied weights, which share memory, still share it."""
    done: dict[tuple[Any, ...], torch.Tensor] = {}
    for tensor in state_dict.values():
        key = _identity(tensor)
        if key not in done:
            done[key] = tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype)
    return {name: done[_identity(tensor)] for name, tensor in state_dict.items()}


def _identity(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride()


def _save_weights(model: PreTrainedModel, state_dict: dict[str, torch.Tensor], folder: Path) -> None:
    """save_pretrained, which knows how in-memory names differ from those on disk, minus what it adds."""
    from transformers import GenerationConfig

    own = getattr(model, "generation_config", None)  # a classifier has none
    if own is not None:
        model.generation_config = GenerationConfig()  # saving a published one may raise, if it is inconsistent
    try:
        model.save_pretrained(folder, state_dict=state_dict, max_shard_size="5GB")
    finally:
        if own is not None:
            model.generation_config = own
    (folder / "generation_config.json").unlink(missing_ok=True)
