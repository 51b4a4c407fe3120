"""Rewards for responses: from ArmoRM, a sequence classifier, a Python function, or a judge behind an
endpoint.

Every scorer takes rows {prompt_id, prompt, response, response_tokens, finish_reason} and gives one Score per
row, in order. A row that can't be scored gets no reward and the reason, and never takes its neighbours with
it. A reward depends on its row alone; batch size and order change it by rounding only.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import math
import numbers
import re
import statistics
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, Protocol

from rlhf_pipeline.core.command import BadUse, WorkFailed
from rlhf_pipeline.core.files import read_json, sha256_of
from rlhf_pipeline.core.provenance import fingerprint_model, fingerprint_text
from rlhf_pipeline.core.ranking.judge import TEMPLATE, Endpoint, Judge, read_template
from rlhf_pipeline.core.ranking.network_scorers import (
    ARMORM_TENSOR,
    ArmoRM,
    Row,
    Score,
    ScoringOptions,
    SequenceClassifier,
    head_shapes,
    resolve_dtype,
)
from rlhf_pipeline.core.ranking.vllm_scorer import VllmClassifier, refusal
from rlhf_pipeline.core.weights import check_head_names, tensor_files

if TYPE_CHECKING:
    from rlhf_pipeline.core.chat import Chat
    from rlhf_pipeline.core.models import ModelRef

Combine = Literal["mean", "min", "median"]
Kind = Literal["ArmoRM", "sequence classifier", "Python function", "judge"]

FUNCTION_NAME = re.compile(r"(?P<file>.+\.py):(?P<name>\w+)|(?P<module>[A-Za-z_][\w.]*):(?P<member>\w+)")
COMBINATIONS: dict[Combine, Callable[[Sequence[float]], float]] = {
    "mean": statistics.fmean,
    "min": min,
    "median": statistics.median,
}


class Scorer(Protocol):
    engine: dict[str, Any]
    """What provenance says of how the rewards were computed."""
    objectives: tuple[str, ...]
    """Names of the rewards behind each reward; none for a scorer with one reward."""
    has_coefficients: bool
    """Whether a Score also says how much each objective counted."""

    def score(self, rows: Sequence[Row]) -> list[Score]: ...

    def close(self) -> None:
        """Free what it holds: memory, processes, files. It can't score any more."""


@dataclass(frozen=True)
class RewardModel:
    """What --reward_model names: found and looked at, nothing loaded or downloaded but small files."""

    text: str
    kind: Kind
    fingerprint: str
    """Hub commit, or sha256 of a folder's safetensors, of the function's source files, of the judge's
    template.
    """
    model: ModelRef | None = None
    chat: Chat | None = None
    function: Callable[[list[Row]], Any] | None = None
    endpoint: Endpoint | None = None

    def identity(self) -> dict[str, str]:
        """All that decides its rewards, for the comparison of two runs."""
        about = {"kind": self.kind, "fingerprint": self.fingerprint}
        if self.endpoint is not None:
            return about | {"url": self.endpoint.url, "model": self.endpoint.model}
        if self.function is not None:
            return about | {"function": self.text.rpartition(":")[2]}
        if self.model is None or self.chat is None:
            return about
        return about | {
            "config": sha256_of([self.model.folder / "config.json"]),
            "tokenizer": self.chat.tokenizer_hash,
            "template": self.chat.template_hash,
        }


def resolve_reward_model(
    text: str,
    *,
    flag: str = "--reward_model",
    chat_template: str | None = None,
    trust_remote_code: bool = False,
    judge_model: str | None = None,
    judge_template: str | None = None,
) -> RewardModel:
    """What `text` names: `package.module:function`, `./file.py:function`, a model folder or Hub id, or the
    http(s) address of an endpoint, where `judge_model` rates by the template in the file `judge_template`.

    Raises BadUse when it does not exist, or lacks the weights of a reward head. Asks no endpoint.
    """
    if text.startswith(("http://", "https://")):
        if judge_model is None:
            raise BadUse(f"{flag} {text} is an endpoint: name the model that is to judge with --judge_model.")
        endpoint = Endpoint(text, judge_model, read_template(judge_template) if judge_template else TEMPLATE)
        return RewardModel(text, "judge", fingerprint_text(endpoint.template), endpoint=endpoint)
    if match := FUNCTION_NAME.fullmatch(text):
        return _resolve_function(text, match, flag)
    from rlhf_pipeline.core import models
    from rlhf_pipeline.core.chat import Chat

    model = models.resolve_model(text, flag=flag, chat_template=chat_template is None)
    names = _tensor_names(model.folder)
    kind: Kind = "ArmoRM" if ARMORM_TENSOR in names else "sequence classifier"
    if names:
        expected = head_shapes(model.folder, armorm=kind == "ArmoRM", trust_remote_code=trust_remote_code, flag=flag)
        check_head_names(model.folder, names, expected, flag=flag)
    chat = Chat.load(model.folder, chat_template=chat_template, flag=flag)
    return RewardModel(text, kind, model.commit or fingerprint_model(model.folder), model, chat)


def _tensor_names(folder: Path) -> Collection[str]:
    """From the index or the headers of the files; none for a one-file Hub model that is not downloaded
    yet.
    """
    index = read_json(folder / "model.safetensors.index.json")
    if index:
        return set(index["weight_map"])
    return tensor_files(folder) if any(folder.glob("*.safetensors")) else ()


def _resolve_function(text: str, match: re.Match[str], flag: str) -> RewardModel:
    name = match["name"] or match["member"]
    try:
        module = (
            _import_file(Path(match["file"]).expanduser())
            if match["file"]
            else importlib.import_module(match["module"])
        )
    except Exception as error:  # the user's code may raise anything
        raise BadUse(
            f"{flag} {text} can't be imported ({type(error).__name__}: {error}): expected package.module:function or "
            "./file.py:function; --debug shows where it fails."
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise BadUse(f"{flag} {text}: {module.__name__} has no function {name}.")
    return RewardModel(text, "Python function", _fingerprint_code(module, function), function=function)


def _fingerprint_code(module: ModuleType, function: Any) -> str:
    """sha256 of the file that a function is named by and of the one that holds its code; most often they are one."""
    while isinstance(function, functools.partial):
        function = function.func
    code = inspect.unwrap(function)
    holder = code if inspect.isroutine(code) or inspect.isclass(code) else type(code)
    files = {file for item in (module, holder) if (file := _source_file(item)) is not None}
    return sha256_of(files) if files else "built in"


def _source_file(item: Any) -> Path | None:
    try:
        source = inspect.getsourcefile(item)
    except TypeError:  # built in
        return None
    return Path(source) if source else None


def _import_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses and pickle look a class's module up there
    spec.loader.exec_module(module)
    return module


def load_scorer(reward_model: RewardModel, options: ScoringOptions, *, journal: Path | None = None) -> Scorer:
    """The scorer that `reward_model` names, loaded. Raises BadUse for a checkpoint without its reward head.

    journal: where a judge keeps the answers it got, for a run that is killed.
    """
    engine = describe_engine([reward_model], options)
    if reward_model.function is not None:
        return PythonFunction(reward_model.text, reward_model.function, engine)
    if reward_model.endpoint is not None:
        return Judge(reward_model.endpoint, engine, cache=journal)
    assert reward_model.model is not None and reward_model.chat is not None
    from rlhf_pipeline.core.models import fetch_weights

    folder = fetch_weights(reward_model.model, flag="--reward_model")
    if options.backend == "vllm":
        _check_vllm(reward_model.text, folder, options)
        return VllmClassifier(folder, reward_model.chat, options, engine)
    kind = ArmoRM if ARMORM_TENSOR in tensor_files(folder) else SequenceClassifier
    return kind(folder, reward_model.chat, options, engine)


def load_scorers(
    reward_models: Sequence[RewardModel], options: ScoringOptions, combine: Combine, *, journals: Path
) -> Scorer:
    """The one scorer, or the ensemble of several. `journals`: a folder for what judges answered."""
    scorers = [
        load_scorer(model, options, journal=journals / f"judge_{i}.jsonl") for i, model in enumerate(reward_models)
    ]
    if len(scorers) == 1:
        return scorers[0]
    names = [model.text for model in reward_models]
    return Ensemble(names, scorers, combine, describe_engine(reward_models, options, combine))


def _check_vllm(text: str, folder: Path, options: ScoringOptions) -> None:
    """Raise BadUse for a reward model that vLLM can't take."""
    trust = options.trust_remote_code
    armorm = ARMORM_TENSOR in _tensor_names(folder)
    reason = refusal(
        head_shapes(folder, armorm=armorm, trust_remote_code=trust), armorm=armorm, trust_remote_code=trust
    )
    if reason:
        raise BadUse(f"--backend vllm can't run {text}: {reason}. Leave --backend out.")


def describe_engine(
    reward_models: Sequence[RewardModel], options: ScoringOptions, combine: Combine = "mean"
) -> dict[str, Any]:
    """What provenance says of how rewards are computed; nothing is loaded.

    Raises BadUse for a model that says nowhere how many tokens it can read, or that the back end can't run.
    """
    members = [_describe(model, options) for model in reward_models]
    return members[0] if len(members) == 1 else {"kind": "ensemble", "combine": combine, "members": members}


def _describe(reward_model: RewardModel, options: ScoringOptions) -> dict[str, Any]:
    about: dict[str, Any] = {
        "kind": reward_model.kind,
        "name": reward_model.text,
        "fingerprint": reward_model.fingerprint,
    }
    if reward_model.endpoint is not None:
        return about | {"model": reward_model.endpoint.model, "max_tokens": reward_model.endpoint.max_tokens}
    if reward_model.model is None or reward_model.chat is None:
        return about
    from rlhf_pipeline.core.models import context_window, load_config
    from rlhf_pipeline.core.reward_model import REWARD_OFFSET

    if options.backend == "vllm":
        _check_vllm(reward_model.text, reward_model.model.folder, options)
    config = load_config(reward_model.model.folder, trust_remote_code=options.trust_remote_code)
    lengths = [length for length in (context_window(config), options.max_length) if length is not None]
    if not lengths:
        raise BadUse(f"--reward_model {reward_model.text} does not say how much it can read: pass --max_length.")
    return about | {
        "backend": options.backend,
        "dtype": str(resolve_dtype(options)).removeprefix("torch."),
        "head_dtype": options.head_dtype,
        "device": options.device.partition(":")[0],
        "max_length": min(lengths),
        "reward_offset": float(getattr(config, REWARD_OFFSET, 0.0)),
        "chat": reward_model.chat.describe(),
    }


class PythonFunction:
    """A reward program: fn(rows) -> one number or None per row."""

    objectives: tuple[str, ...] = ()
    has_coefficients = False

    def __init__(self, text: str, function: Callable[[list[Row]], Any], engine: dict[str, Any]):
        self._function = function
        self._text = text
        self.engine = engine

    def score(self, rows: Sequence[Row]) -> list[Score]:
        """Raises WorkFailed if the function gives another number of values than it got rows."""
        values = self._values_or_reason(rows)
        if not isinstance(values, str):
            return [_checked(value) for value in values]
        if len(rows) == 1:
            return [Score(None, values)]
        return [score for row in rows for score in self.score([row])]

    def close(self) -> None:
        """Nothing is held."""

    def _values_or_reason(self, rows: Sequence[Row]) -> Sequence[Any] | str:
        try:
            values = self._function(list(rows))
        except Exception as error:  # noqa: BLE001 (the user's code may raise anything; it is written down)
            return f"{type(error).__name__}: {error}"
        if isinstance(values, str) or not hasattr(values, "__len__"):
            raise WorkFailed(f"{self._text} returned {values!r}, expected a number or None for each of its rows.")
        if len(values) != len(rows):
            raise WorkFailed(f"{self._text} returned {len(values)} values for {len(rows)} rows.")
        return values


def _checked(value: Any) -> Score:
    if value is None:
        return Score(None, "no reward: the function returned None")
    if not isinstance(value, numbers.Real):
        return Score(None, f"no number: the function returned {value!r}"[:200])
    if not math.isfinite(value):
        return Score(None, f"not finite: {float(value)}")
    return Score(float(value))


class Ensemble:
    """Several reward models' scores combined; every member's own is kept as an objective under its name."""

    has_coefficients = False

    def __init__(self, names: Sequence[str], members: Sequence[Scorer], combine: Combine, engine: dict[str, Any]):
        self.objectives = tuple(names)
        self.engine = engine
        self._members = members
        self._combine = COMBINATIONS[combine]

    def score(self, rows: Sequence[Row]) -> list[Score]:
        columns = [member.score(rows) for member in self._members]
        return [self._combined(scores) for scores in zip(*columns, strict=True)]

    def close(self) -> None:
        for member in self._members:
            member.close()

    def _combined(self, scores: Sequence[Score]) -> Score:
        objectives = {n: s.reward for n, s in zip(self.objectives, scores, strict=True) if s.reward is not None}
        for name, score in zip(self.objectives, scores, strict=True):
            if score.error is not None:
                return Score(None, f"{score.error} (from {name})", objectives)
        return Score(self._combine(list(objectives.values())), None, objectives)
