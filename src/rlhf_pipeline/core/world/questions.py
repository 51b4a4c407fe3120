"""The questions of the tiny world and their answers: 291 questions of nine kinds, each put in four ways.

A question knows right and wrong answers as a person would write them, so that demonstrations can be made, and
in which forms the right one may stand in a sentence, so that a program can judge whatever a policy makes up.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations, permutations

Words = tuple[str, ...]
"""Lower-cased words in order."""


@dataclass(frozen=True)
class Question:
    """What is asked, independently of its wording."""

    category: str
    subject: str
    phrasings: tuple[str, str, str, str]
    sentence: str
    """A full answer, with {} where right or wrong comes in."""
    right: tuple[str, ...]
    wrong: tuple[str, ...]
    vocabulary: frozenset[str]
    """Every word that is an answer of this kind, or could be taken for one."""
    accepted: frozenset[Words]
    """The answer words of a sentence that answers rightly."""

    def is_answered(self, text: str) -> bool | None:
        """Whether `text` answers rightly: all of its sentences that say an answer do. None: it says none."""
        said = [answers for sentence in sentences(text) if (answers := self._answers(sentence))]
        return all(answers in self.accepted for answers in said) if said else None

    def _answers(self, sentence: Words) -> Words:
        return tuple(word for word in sentence if word in self.vocabulary)


@dataclass(frozen=True)
class Prompt:
    prompt_id: str
    text: str
    question: Question


def words(text: str) -> Words:
    """Lower-cased runs of letters or of digits."""
    return tuple(re.findall(r"[^\W\d_]+|\d+", text.lower()))


def sentences(text: str) -> list[Words]:
    return [found for part in re.split(r"[.!?\n]", text) if (found := words(part))]


CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon", "Germany": "Berlin",
    "Austria": "Vienna", "Norway": "Oslo", "Greece": "Athens", "Ireland": "Dublin", "Poland": "Warsaw",
    "Czechia": "Prague", "Egypt": "Cairo", "Japan": "Tokyo", "Peru": "Lima", "Canada": "Ottawa",
    "Cuba": "Havana", "Kenya": "Nairobi", "Turkey": "Ankara", "Finland": "Helsinki", "Hungary": "Budapest",
}  # fmt: skip
OPPOSITES = (
    ("hot", "cold"), ("big", "small"), ("fast", "slow"), ("light", "dark"), ("loud", "quiet"),
    ("wet", "dry"), ("full", "empty"), ("open", "closed"), ("early", "late"), ("high", "low"),
)  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
NAMES = (
    "Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Hugo", "Iris",
    "Jonas", "Lena", "Max", "Nora", "Oscar", "Paula", "Ruth", "Tom",
)  # fmt: skip
GREETINGS = ("hello", "hi", "welcome")
THINGS = {
    "fruits": ("apple", "pear", "plum", "cherry", "banana", "grape"),
    "colours": ("red", "blue", "green", "yellow", "pink", "brown"),
    "birds": ("robin", "owl", "swan", "crow", "gull", "finch"),
    "tools": ("hammer", "saw", "drill", "wrench", "chisel", "ladder"),
    "flowers": ("rose", "tulip", "daisy", "lily", "poppy", "violet"),
    "drinks": ("tea", "coffee", "milk", "water", "juice", "cocoa"),
}
ANIMALS = (  # from small to big
    "ant", "bee", "mouse", "hedgehog", "rabbit", "fox", "sheep", "horse", "rhino", "elephant", "whale",
)  # fmt: skip
ECHOES = ("sun", "moon", "star", "rain", "tree", "bell", "drum", "fish", "boat", "leaf", "lamp", "snow")
SPELLED = {2: "two", 3: "three", 4: "four", 5: "five"}
NUMBERS = frozenset(map(str, range(1000)))


def capitals() -> Iterator[Question]:
    for country, city in CAPITALS.items():
        yield Question(
            "capital",
            country,
            (
                f"What is the capital of {country}?",
                f"Which city is the capital of {country}?",
                f"Name the capital of {country}.",
                f"Do you know the capital of {country}?",
            ),
            f"The capital of {country} is {{}}.",
            right=(city,),
            wrong=_others(CAPITALS.values(), city),
            vocabulary=frozenset(words(" ".join(CAPITALS.values()))),
            accepted=_forms(city),
        )


def opposites() -> Iterator[Question]:
    every = [word for pair in OPPOSITES for word in pair]
    for pair in OPPOSITES:
        for word, opposite in (pair, pair[::-1]):
            yield Question(
                "opposite",
                word,
                (
                    f"What is the opposite of {word}?",
                    f"Which word is the opposite of {word}?",
                    f"Name the opposite of {word}.",
                    f"Tell me the opposite of {word}.",
                ),
                f"The opposite of {word} is {{}}.",
                right=(opposite,),
                wrong=_others(every, opposite, word),
                vocabulary=frozenset(every),
                accepted=_forms(opposite, f"{word} {opposite}"),
            )


def successors() -> Iterator[Question]:
    for unit, cycle in (("day", DAYS), ("month", MONTHS)):
        for this, following in zip(cycle, cycle[1:] + cycle[:1], strict=True):
            yield Question(
                "after",
                this,
                (
                    f"What comes after {this}?",
                    f"Which {unit} follows {this}?",
                    f"Name the {unit} after {this}.",
                    f"Which {unit} comes next after {this}?",
                ),
                f"After {this} comes {{}}.",
                right=(following,),
                wrong=_others(cycle, following, this),
                vocabulary=frozenset(words(" ".join(DAYS + MONTHS))),
                accepted=_forms(following, f"{this} {following}"),
            )


def greetings() -> Iterator[Question]:
    for name in NAMES:
        yield Question(
            "greet",
            name,
            (
                f"Greet {name}.",
                f"Say hello to {name}.",
                f"Please welcome {name}.",
                f"{name} is here. Say hello!",
            ),
            "{}, it is lovely to meet you.",
            right=(f"Hello {name}",),
            wrong=tuple(f"Hello {other}" for other in _others(NAMES, name)),
            vocabulary=frozenset(words(" ".join(NAMES + GREETINGS))),
            accepted=_forms(*(f"{greeting} {name}" for greeting in GREETINGS)),
        )


def lists() -> Iterator[Question]:
    kinds = list(THINGS)
    for kind, things in THINGS.items():
        stranger = THINGS[kinds[kinds.index(kind) - 1]][0]
        for count in (2, 3):
            number = SPELLED[count]
            yield Question(
                "list",
                f"{number} {kind}",
                (
                    f"List {number} {kind}.",
                    f"Name {number} {kind}.",
                    f"Give me {number} {kind}.",
                    f"Can you name {number} {kind}?",
                ),
                f"{number.capitalize()} {kind} are {{}}.",
                right=tuple(map(_enumerate, permutations(things, count))),
                wrong=(
                    *map(_enumerate, permutations(things, 5 - count)),
                    *(_enumerate((*some, stranger)) for some in permutations(things, count - 1)),
                ),
                vocabulary=frozenset(thing for every in THINGS.values() for thing in every),
                accepted=frozenset(permutations(things, count)),
            )


def sums() -> Iterator[Question]:
    for a in range(1, 9):
        for b in range(1, 9):
            yield Question(
                "add",
                f"{a} {b}",
                (
                    f"What is {a} plus {b}?",
                    f"How much is {a} plus {b}?",
                    f"Add {a} and {b}.",
                    f"What do {a} and {b} make?",
                ),
                f"{a} plus {b} is {{}}.",
                right=(str(a + b),),
                wrong=tuple(str(a + b + off) for off in (-2, -1, 1, 2)),
                vocabulary=NUMBERS,
                accepted=_forms(f"{a + b}", f"{a} {b} {a + b}"),
            )


def comparisons() -> Iterator[Question]:
    for index, (small, big) in enumerate(combinations(ANIMALS, 2)):
        one, other = (_with_article(animal) for animal in ((small, big), (big, small))[index % 2])
        yield Question(
            "bigger",
            f"{small} {big}",
            (
                f"Which is bigger, {one} or {other}?",
                f"What is larger, {one} or {other}?",
                f"Is {one} or {other} bigger?",
                f"Tell me which is bigger, {one} or {other}.",
            ),
            "The bigger one is {}.",
            right=(f"the {big}",),
            wrong=(f"the {small}",),
            vocabulary=frozenset(ANIMALS),
            accepted=_forms(big, f"{big} {small}"),
        )


def counts() -> Iterator[Question]:
    for first in range(1, 10):
        for last in range(first + 2, first + 6):
            yield Question(
                "count",
                f"{first} {last}",
                (
                    f"Count from {first} to {last}.",
                    f"Please count from {first} to {last}.",
                    f"Can you count from {first} to {last}?",
                    f"Start at {first} and count to {last}.",
                ),
                "Here we go: {}.",
                right=(_numbers(first, last),),
                wrong=(_numbers(first + 1, last), _numbers(first, last - 1), _numbers(first, last + 1)),
                vocabulary=NUMBERS,
                accepted=_forms(_numbers(first, last)),
            )


def echoes() -> Iterator[Question]:
    for index, word in enumerate(ECHOES):
        for count, number in SPELLED.items():
            yield Question(
                "repeat",
                f"{word} {number}",
                (
                    f"Say {word} {number} times.",
                    f"Repeat {word} {number} times.",
                    f"Write {word} {number} times.",
                    f"Please say {word} {number} times.",
                ),
                "As you wish: {}.",
                right=(_repeated(word, count),),
                wrong=(
                    _repeated(word, count - 1),
                    _repeated(word, count + 1),
                    _repeated(ECHOES[index - 1], count),
                ),
                vocabulary=frozenset(ECHOES),
                accepted=_forms(_repeated(word, count)),
            )


KINDS = {
    "capital": capitals,
    "opposite": opposites,
    "after": successors,
    "greet": greetings,
    "list": lists,
    "add": sums,
    "bigger": comparisons,
    "count": counts,
    "repeat": echoes,
}
"""Category -> its questions. The first five are the small world of the tests."""


@cache
def every_prompt() -> dict[str, Prompt]:
    """{text: Prompt} of the whole world, in a fixed order: 1164 of them."""
    prompts = {}
    for questions in KINDS.values():
        for question in questions():
            slug = question.subject.lower().replace(" ", "-")
            for letter, text in zip("abcd", question.phrasings, strict=True):
                prompts[text] = Prompt(f"{question.category}-{slug}-{letter}", text, question)
    return prompts


def _forms(*answers: str) -> frozenset[Words]:
    return frozenset(map(words, answers))


def _others(answers: Iterable[str], *known: str) -> tuple[str, ...]:
    return tuple(answer for answer in answers if answer not in known)


def _enumerate(things: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(things[:-1]), things[-1])))


def _numbers(first: int, last: int) -> str:
    return ", ".join(map(str, range(first, last + 1)))


def _repeated(word: str, count: int) -> str:
    return ", ".join([word] * count)


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
