"""Small stories with questions, from a seeded generator: text whose answers can be checked.

There are four kinds: who has what, where things are, who came when, how many there are. Each
question has one right answer and four choices, so a model without understanding scores 25 %. The
text depends on the seed alone, on every Python: it uses only `random.Random.random()`, whose stream
the standard library promises to keep.
"""

import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

NAMES = (
    "Ada Ben Cleo Dan Eva Finn Gita Hugo Iris Jonas Kim Lena "
    "Max Nina Omar Pia Ravi Sara Tom Uma Vera Will Yara Zoe"
).split()
THINGS = (
    "ball book coin cup drum flute hat kite lamp map pen ring rope shell spoon stone torch whistle"
).split()
COLOURS = "red blue green yellow white black".split()
PLACES = "kitchen garden cellar attic barn library garage office hall workshop".split()
NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()
GOODS = "apples marbles stamps buttons cards nuts pears shells".split()
KINDS = ("who", "where", "order", "count")
CHOICES = 4

# One story in HELD_OUT_SHARE (by a checksum of its text) is kept from training, whatever the seed.
HELD_OUT_SHARE = 16

T = TypeVar("T")


@dataclass(frozen=True)
class Question:
    """One question about a story, with its choices."""

    question: str
    choices: tuple[str, ...]
    answer: int  # index of the right choice

    def text(self) -> str:
        return f"Question: {self.question}\nAnswer: {self.choices[self.answer]}\n"


@dataclass(frozen=True)
class Story:
    """A few sentences, and questions that they answer."""

    kind: str
    text: str
    questions: tuple[Question, ...]

    def full_text(self) -> str:
        return f"{self.text}\n" + "".join(question.text() for question in self.questions)

    @property
    def held_out(self) -> bool:
        return zlib.crc32(self.text.encode()) % HELD_OUT_SHARE == 0


class _Dice:
    """Random draws from `random.Random.random()` alone, see the module's docstring."""

    def __init__(self, seed: int | str) -> None:
        self._random = random.Random(seed).random

    def below(self, n: int) -> int:
        return int(self._random() * n)

    def pick(self, items: Sequence[T]) -> T:
        return items[self.below(len(items))]

    def sample(self, items: Sequence[T], count: int) -> list[T]:
        rest = list(items)
        return [rest.pop(self.below(len(rest))) for _ in range(count)]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        return self.sample(items, len(items))


def _ask(dice: _Dice, question: str, right: str, others: Sequence[str]) -> Question:
    wrong = dice.sample([other for other in others if other != right], CHOICES - 1)
    choices = dice.shuffled([right, *wrong])
    return Question(question, tuple(choices), choices.index(right))


def _who(dice: _Dice) -> Story:
    people, things = dice.sample(NAMES, 4), dice.sample(THINGS, 4)
    holder = dict(zip(things, people, strict=True))
    lines = [f"{name} has a {dice.pick(COLOURS)} {thing}." for thing, name in holder.items()]
    for _ in range(dice.below(3)):
        thing = dice.pick(things)
        taker = dice.pick([name for name in people if name != holder[thing]])
        verb = dice.pick(("gives", "lends", "hands"))
        lines.append(f"{holder[thing]} {verb} the {thing} to {taker}.")
        holder[thing] = taker
    questions = [
        _ask(dice, f"Who has the {thing}?", holder[thing], people)
        for thing in dice.sample(things, 3)
    ]
    return Story("who", " ".join(lines), tuple(questions))


def _where(dice: _Dice) -> Story:
    things, places = dice.sample(THINGS, 4), dice.sample(PLACES, 4)
    place_of = dict(zip(things, places, strict=True))
    lines = [f"The {thing} is in the {place}." for thing, place in place_of.items()]
    for _ in range(dice.below(3)):
        thing = dice.pick(things)
        place = dice.pick([place for place in places if place != place_of[thing]])
        verb = dice.pick(("takes", "carries", "moves"))
        lines.append(f"{dice.pick(NAMES)} {verb} the {thing} to the {place}.")
        place_of[thing] = place
    choices = [f"the {place}" for place in places]
    questions = [
        _ask(dice, f"Where is the {thing}?", f"the {place_of[thing]}", choices)
        for thing in dice.sample(things, 3)
    ]
    return Story("where", " ".join(lines), tuple(questions))


def _order(dice: _Dice) -> Story:
    people, place = dice.sample(NAMES, 4), dice.pick(PLACES)
    lines = [f"{people[0]} comes to the {place} first."]
    for earlier, later in pairwise(people):
        ways = f"Then {later} comes.", f"{later} comes after {earlier}.", f"Next comes {later}."
        lines.append(dice.pick(ways))
    indices = dice.sample(range(8), 3)
    forms = [
        ("Who came first?", people[0]),
        ("Who came last?", people[3]),
        *((f"Who came right after {a}?", b) for a, b in pairwise(people)),
        *((f"Who came right before {b}?", a) for a, b in pairwise(people)),
    ]
    questions = [_ask(dice, *forms[i], people) for i in indices]
    return Story("order", " ".join(lines), tuple(questions))


def _count(dice: _Dice) -> Story:
    people, goods = dice.sample(NAMES, 2), dice.pick(GOODS)
    has = {name: 2 + dice.below(5) for name in people}
    lines = [f"{name} has {NUMBERS[has[name]]} {goods}." for name in people]
    for _ in range(1 + dice.below(2)):
        name, other = dice.shuffled(people)
        amount = 1 + dice.below(3)
        if dice.below(2) and has[name] >= amount:
            has[name] -= amount
            has[other] += amount
            lines.append(f"{name} gives {NUMBERS[amount]} to {other}.")
        else:
            has[name] += amount
            lines.append(f"{name} finds {NUMBERS[amount]} more.")
    questions = [
        _ask(
            dice,
            f"How many {goods} does {name} have?",
            NUMBERS[has[name]],
            [NUMBERS[n] for n in range(max(0, has[name] - 3), min(len(NUMBERS), has[name] + 4))],
        )
        for name in people
    ]
    return Story("count", " ".join(lines), tuple(questions))


_WRITERS = {"who": _who, "where": _where, "order": _order, "count": _count}


def stories(seed: int, *, held_out: bool, kinds: Sequence[str] = KINDS) -> Iterator[Story]:
    """Yield stories without end.

    Stories for training and held-out stories are disjoint, whatever the seeds.

    Args:
        held_out: yield held-out stories, else those for training.
        kinds: some of `KINDS`, drawn equally often.
    """
    dice = _Dice(seed)
    while True:
        story = _WRITERS[dice.pick(kinds)](dice)
        if story.held_out == held_out:
            yield story
