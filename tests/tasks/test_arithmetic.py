"""The generated problems are true, as long as they claim to be, repeatable, and not shared between splits."""

import random
import re
from fractions import Fraction
from functools import cache

import pytest

from microglia.errors import ConfigError
from microglia.reasoner.problems import FAMILIES, MAX_STEPS, MOST_STEPS, NAMES, SPLITS, draw, problems
from microglia.tasks import Example, get_task

TASK = get_task("arithmetic")
COUNT = 3000
OPERATION = re.compile(r"[A-Za-z ]+: (\d+)([-+*/])(\d+)=(\d+)")
PERCENTAGE = re.compile(r"(?:[A-Z][a-z]+ )?part: (\d+)% of (\d+)=(\d+)")


@cache
def drawn(split: str) -> list[Example]:
    return TASK.load(split, limit=COUNT)


def value_of(line: str) -> int:
    """The result of a worked line, after the calculation has been done again; AssertionError when it is wrong."""
    if percentage := PERCENTAGE.fullmatch(line):
        percent, whole, result = map(int, percentage.groups())
        assert Fraction(percent * whole, 100) == result, line
        return result
    operation = OPERATION.fullmatch(line)
    assert operation, f"not a worked line: {line}"
    a, b, result = int(operation[1]), int(operation[3]), int(operation[4])
    calculations = {"+": lambda: a + b, "-": lambda: a - b, "*": lambda: a * b, "/": lambda: Fraction(a, b)}
    assert calculations[operation[2]]() == result, line
    return result


def numbers(example: Example) -> tuple[str, ...]:
    return tuple(re.findall(r"\d+", example.answer))


@pytest.mark.parametrize("line", ["First: 3+4=8", "Ann: 7/2=3", "part: 5% of 30=1", "First: 3+4", "3+4=7"])
def test_a_false_line_is_seen(line: str) -> None:
    with pytest.raises(AssertionError):
        value_of(line)


@pytest.mark.parametrize("split", SPLITS)
def test_every_worked_line_is_true_and_the_last_one_is_the_answer(split: str) -> None:
    for example in drawn(split):
        *worked, last = example.answer.split("\n")
        assert [value_of(line) for line in worked][-1] == int(example.gold)
        assert last == f"#### {example.gold}"
        assert TASK.correct(example, example.answer)
        assert not TASK.correct(example, f"#### {int(example.gold) + 1}")


@pytest.mark.parametrize("split", SPLITS)
def test_difficulty_is_the_number_of_worked_lines_and_all_occur_evenly(split: str) -> None:
    assert all(example.answer.count("\n") == example.difficulty for example in drawn(split))
    counts = [sum(e.difficulty == steps for e in drawn(split)) for steps in range(1, MAX_STEPS + 1)]
    assert counts == [COUNT // MAX_STEPS] * MAX_STEPS


def test_the_operands_of_the_answer_come_from_the_question_or_earlier_lines() -> None:
    words = {"half": "2", "double": "2", "doubles": "2", "triples": "3"}
    for example in drawn("test"):
        known = {*re.findall(r"\d+", example.question), *(n for w, n in words.items() if w in example.question)}
        for line in example.answer.split("\n")[:-1]:
            *operands, result = re.findall(r"\d+", line)
            assert {*operands} <= known, example
            known.add(result)


def test_the_word_before_a_calculation_stands_in_the_question_or_names_a_total_or_a_part() -> None:
    ours = {"total", "part", "result", "each", "in all", "a day"}
    for example in drawn("test"):
        labels = {line.split(":")[0].removesuffix(" part") for line in example.answer.split("\n")[:-1]}
        assert all(re.search(rf"\b{label}\b", example.question) for label in labels - ours), example


def test_he_and_she_can_only_mean_the_person_of_the_story() -> None:
    """A sentence about somebody whom the answer does not need is about one of the other pronoun."""
    pronouns = {name: pronoun for pronoun, names in NAMES.items() for name in names}
    intruders = 0
    for problem in problems("test", COUNT):
        person, *_ = problem.question.split()
        for name in re.findall(r"(?<=\. )(\w+) (?:is|has) \d+", problem.question):
            if name in pronouns and name != person:
                assert pronouns[name] != pronouns.get(person), problem.question
                intruders += 1
    assert intruders > 50


@pytest.mark.parametrize(("held_out", "other"), [("test", "train"), ("validation", "train"), ("test", "validation")])
def test_no_number_sequence_of_a_held_out_split_occurs_elsewhere(held_out: str, other: str) -> None:
    assert {numbers(e) for e in drawn(held_out)}.isdisjoint(numbers(e) for e in drawn(other))
    assert {e.question for e in drawn(held_out)}.isdisjoint(e.question for e in drawn(other))


def test_questions_and_ids_are_unique() -> None:
    every = [example for split in SPLITS for example in drawn(split)]
    assert len({e.question for e in every}) == len({e.id for e in every}) == len(every)


@pytest.mark.parametrize("split", SPLITS)
def test_every_family_occurs(split: str) -> None:
    assert {e.family for e in drawn(split)} == {*FAMILIES}


def test_the_same_seed_gives_the_same_problems() -> None:
    assert TASK.load("train", limit=50, seed=3) == TASK.load("train", limit=50, seed=3)
    assert TASK.load("train", limit=20, seed=3) == TASK.load("train", limit=50, seed=3)[:20]
    other = {e.question for e in TASK.load("train", limit=50, seed=4)}
    assert other.isdisjoint(e.question for e in TASK.load("train", limit=50, seed=3))


def test_the_default_is_a_thousand_problems() -> None:
    assert len(TASK.load("validation")) == 1000


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ConfigError, match="no split 'dev'; choose one of train, validation, test"):
        TASK.load("dev")
    with pytest.raises(ConfigError, match="limit is -1 but must be at least 1"):
        TASK.load("test", limit=-1)
    with pytest.raises(ConfigError, match="reads no files; leave it out"):
        TASK.load("test", data_dir="somewhere")
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        next(problems("dev", 1))
    with pytest.raises(ValueError, match=r"steps \[9\] are outside 1 to 8"):
        next(problems("test", 1, steps=(9,)))
    with pytest.raises(ValueError, match="steps is empty"):
        next(problems("test", 1, steps=()))
    with pytest.raises(ValueError, match=r"unknown families \['poetry'\]"):
        draw(random.Random(0), 1, ("poetry", "change"))
    with pytest.raises(ValueError, match=r"families \['bare'\] have problems of 1 to 1 steps, not 2"):
        next(problems("test", 1, steps=(2,), families=("bare",)))


def test_a_family_that_stands_twice_is_drawn_twice_as_often() -> None:
    found = [p.family for p in problems("train", 600, steps=(3,), families=("change", "rates", "rates"))]
    assert set(found) == {"change", "rates"}
    assert 340 < found.count("rates") < 460  # 400 expected, standard deviation 12


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("steps", range(1, MAX_STEPS + 1))
def test_a_family_draws_so_many_steps_or_says_that_it_cannot(family: str, steps: int) -> None:
    if steps <= MOST_STEPS.get(family, MAX_STEPS):
        problem = draw(random.Random(0), steps, (family,))
        assert (problem.family, problem.steps) == (family, steps)
    else:
        with pytest.raises(ValueError, match=f"have problems of 1 to {MOST_STEPS[family]} steps, not"):
            draw(random.Random(0), steps, (family,))
