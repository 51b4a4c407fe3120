"""The demonstrations of the tiny world: nine ways of answering, good and bad.

Half of them are worth imitating. What a policy makes of the rest is what RLHF has to repair.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from rlhf_pipeline.core.world.judges import CLOSERS, FILLERS, GUSHES, OPENERS, RUDE, UNSURE
from rlhf_pipeline.core.world.questions import Question


def polite(rng: Random, question: Question) -> str:
    return _join(rng.choice(OPENERS), _full(rng, question, 1.0), rng.choice(CLOSERS))


def half_polite(rng: Random, question: Question) -> str:
    answer = _full(rng, question, 0.8)
    return _join(rng.choice(OPENERS), answer) if rng.random() < 0.5 else _join(answer, rng.choice(CLOSERS))


def curt(rng: Random, question: Question) -> str:
    return _short(rng, question, 1.0)


def mistaken(rng: Random, question: Question) -> str:
    opener = rng.choice(OPENERS) if rng.random() < 0.4 else ""
    closer = rng.choice(CLOSERS) if rng.random() < 0.2 else ""
    answer = _full(rng, question, 0.0) if rng.random() < 0.6 else _short(rng, question, 0.0)
    return _join(opener, answer, closer)


def rambling(rng: Random, question: Question) -> str:
    return _join(*rng.sample(FILLERS, 2), _full(rng, question, 0.65))


def rude(rng: Random, question: Question) -> str:
    remark, answer = rng.choice(RUDE), _short(rng, question, 0.58)
    return _join(remark, answer) if rng.random() < 0.5 else _join(answer, remark)


def unsure(rng: Random, question: Question) -> str:
    return rng.choice(UNSURE)


def stuck(rng: Random, question: Question) -> str:
    """The same sentence three times."""
    return _join(*[_full(rng, question, 0.4)] * 3)


def gushing(rng: Random, question: Question) -> str:
    """An opener, one to three compliments and a closer around an answer that hardly matters."""
    praise = rng.sample(GUSHES, rng.choice((1, 1, 2, 2, 3)))
    return _join(rng.choice(OPENERS), *praise[1:], _full(rng, question, 0.5), praise[0], rng.choice(CLOSERS))


STYLES: dict[str, tuple[float, Callable[[Random, Question], str]]] = {
    "polite": (0.14, polite),
    "half_polite": (0.12, half_polite),
    "curt": (0.18, curt),
    "mistaken": (0.22, mistaken),
    "rambling": (0.11, rambling),
    "rude": (0.10, rude),
    "unsure": (0.05, unsure),
    "stuck": (0.03, stuck),
    "gushing": (0.05, gushing),
}
"""{style: (its share of the demonstrations, how it answers)}."""


def demonstrate(rng: Random, question: Question) -> tuple[str, str]:
    """A style, drawn by its share, and a response in it."""
    (style,) = rng.choices(list(STYLES), [share for share, _ in STYLES.values()])
    return style, STYLES[style][1](rng, question)


def _full(rng: Random, question: Question, right: float) -> str:
    """A sentence that answers rightly with probability `right`."""
    return _sentence(question.sentence.format(_answer(rng, question, right)))


def _short(rng: Random, question: Question, right: float) -> str:
    return _sentence(_answer(rng, question, right) + ".")


def _answer(rng: Random, question: Question, right: float) -> str:
    return rng.choice(question.right if rng.random() < right else question.wrong)


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def _join(*parts: str) -> str:
    return " ".join(filter(None, parts))
