"""Word problems from templates: some to fine-tune on, others that fine-tuning never sees."""

import random
from collections.abc import Callable

from examples.word_problems import NAMES, THINGS, Problem

Template = Callable[[random.Random], Problem]


def known() -> tuple[Template, ...]:
    """Templates of fine-tuning; it is asked about new numbers in them."""
    return (_bought, _given_away, _packed, _shared, _saved, _both, _older, _sold)


def held_out() -> tuple[Template, ...]:
    """Templates that fine-tuning does not see. Their arithmetic is that of the others."""
    return (_found, _lost, _rows)


def draw(templates: tuple[Template, ...], count: int, generator: random.Random) -> list[Problem]:
    """Different problems, each of a template as likely as any other.

    Raises:
      ValueError: the templates do not have so many.
    """
    found: dict[str, Problem] = {}
    for _ in range(50 * count):
        problem = generator.choice(templates)(generator)
        found.setdefault(problem.question, problem)
        if len(found) == count:
            return list(found.values())
    raise ValueError(f"{len(templates)} templates have no {count} different problems")


def _people(generator: random.Random) -> tuple[str, str, str]:
    name, other = generator.sample(NAMES, 2)
    return name, other, generator.choice(THINGS)


def _bought(generator: random.Random) -> Problem:
    name, _, thing = _people(generator)
    had, more = generator.randint(2, 40), generator.randint(2, 40)
    return _sum(f"{name} has {had} {thing} and buys {more} more. How many now?", had, more)


def _both(generator: random.Random) -> Problem:
    name, other, thing = _people(generator)
    a, b = generator.randint(2, 40), generator.randint(2, 40)
    question = f"{name} has {a} {thing} and {other} has {b}. How many do both have?"
    return _sum(question, a, b)


def _older(generator: random.Random) -> Problem:
    name, other, _ = _people(generator)
    age, more = generator.randint(3, 50), generator.randint(2, 30)
    return _sum(f"{name} is {age}. {other} is {more} years older. How old is {other}?", age, more)


def _given_away(generator: random.Random) -> Problem:
    name, other, thing = _people(generator)
    gone, left = generator.randint(2, 40), generator.randint(1, 40)
    question = f"{name} has {gone + left} {thing} and gives {gone} to {other}. How many are left?"
    return _difference(question, gone + left, gone)


def _sold(generator: random.Random) -> Problem:
    name, _, thing = _people(generator)
    gone, left = generator.randint(2, 40), generator.randint(1, 40)
    question = f"A shop has {gone + left} {thing} and sells {gone} to {name}. How many remain?"
    return _difference(question, gone + left, gone)


def _packed(generator: random.Random) -> Problem:
    name, _, thing = _people(generator)
    boxes, each = generator.randint(2, 12), generator.randint(2, 12)
    return _product(f"{name} has {boxes} boxes with {each} {thing} in each. How many?", boxes, each)


def _saved(generator: random.Random) -> Problem:
    name, _, thing = _people(generator)
    weeks, each = generator.randint(2, 12), generator.randint(2, 12)
    question = f"{name} saves {each} {thing} a week for {weeks} weeks. How many in the end?"
    return _product(question, weeks, each)


def _shared(generator: random.Random) -> Problem:
    name, _, thing = _people(generator)
    people, each = generator.randint(2, 12), generator.randint(2, 12)
    whole = people * each
    question = f"{name} shares {whole} {thing} among {people} friends. How many for each?"
    return Problem(question, f"{whole} / {people} = {each}.", each)


def _found(generator: random.Random) -> Problem:
    name, _, thing = _people(generator)
    first, second = generator.randint(2, 40), generator.randint(2, 40)
    question = f"{name} found {first} {thing} on Monday and {second} on Friday. How many in all?"
    return _sum(question, first, second)


def _lost(generator: random.Random) -> Problem:
    name, _, thing = _people(generator)
    gone, left = generator.randint(2, 40), generator.randint(1, 40)
    question = f"Of {gone + left} {thing}, {name} lost {gone}. How many does {name} still have?"
    return _difference(question, gone + left, gone)


def _rows(generator: random.Random) -> Problem:
    _, _, thing = _people(generator)
    rows, each = generator.randint(2, 12), generator.randint(2, 12)
    return _product(f"There are {rows} rows of {each} {thing}. How many are there?", rows, each)


def _sum(question: str, a: int, b: int) -> Problem:
    return Problem(question, f"{a} + {b} = {a + b}.", a + b)


def _difference(question: str, a: int, b: int) -> Problem:
    return Problem(question, f"{a} - {b} = {a - b}.", a - b)


def _product(question: str, a: int, b: int) -> Problem:
    return Problem(question, f"{a} * {b} = {a * b}.", a * b)
