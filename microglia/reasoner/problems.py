"""A seeded generator of multi-step arithmetic word problems in GSM8K's form.

Each problem has a question, worked steps and `#### answer`. A worked step is a line, `word: a+b=c`; its word comes from
the sentence that it works on (who, what, which day). What happens one after the other has words for its order
(First, Second, Monday), which a model of this size needs to keep count (docs/log.md). The number of worked steps, 1 to
8, is the difficulty. The text is ours; the form (question, steps, `####`) is that of Cobbe et al. 2021, GSM8K.

Splits are disjoint by numbers, not only by wording: the sequence of numbers in the worked steps decides the split, so
no test problem, nor any rewording of one with other names, objects or distractors, occurs in training.
"""

import random
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

SPLITS = ("train", "validation", "test")
MAX_STEPS = 8
STEPS = tuple(range(1, MAX_STEPS + 1))

NAMES = {
    "he": "Tom Ben Sam Max Leo Omar Ravi Hugo Ivan Paul".split(),
    "she": "Ann Mia Eva Zoe Lily Nora Ruth Sara Tina Vera".split(),
}
THINGS = "apples pears stamps coins books pens cards shells marbles stickers beads buttons cookies plums roses".split()
BOXES = "boxes bags baskets crates jars shelves drawers packs".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
ORDINALS = "First Second Third Fourth Fifth Sixth Seventh Eighth".split()
COMPARED = "Shop Class Team House Garden Stall".split()
LETTERS = "ABCDEFGHIJ"
PLACES = "the park,the market,the garden,the school,the library,the station".split(",")
PERCENTS = (5, 10, 20, 25, 30, 40, 50, 60, 75, 80, 90)

MAX_SUM = 300  # largest value of a running quantity; products may reach MAX_PRODUCT
MAX_PRODUCT = 500


@dataclass(frozen=True)
class Problem:
    """One word problem. `answer` holds the worked steps and ends with `#### result`."""

    question: str
    answer: str
    result: int
    steps: int
    family: str
    distracted: bool


class DeadEnd(Exception):
    """The drawn numbers cannot be continued; the caller draws again."""


@dataclass
class _Chain:
    """A running quantity, the lines that computed it and how many events have changed it."""

    rng: random.Random
    value: int
    lines: list[str]
    events: int = 0

    def moment(self) -> str:
        """The word for when the next event happens."""
        self.events += 1
        return ORDINALS[self.events - 1]

    def compute(self, operator: str, other: int, *, label: str, left: int | None = None) -> int:
        """Append `label: a+b=c`, or -, *, /, and make c the running value; DeadEnd when c is out of range."""
        a = self.value if left is None else left
        if operator == "/" and a % other:
            raise DeadEnd
        c = {"+": a + other, "-": a - other, "*": a * other, "/": a // other}[operator]
        if not 1 <= c <= (MAX_PRODUCT if operator == "*" else max(MAX_SUM, a)):
            raise DeadEnd
        self.lines.append(f"{label}: {a}{operator}{other}={c}")
        self.value = c
        return c


def _people(rng: random.Random, count: int) -> list[tuple[str, str]]:
    """`count` different (name, pronoun) pairs."""
    everyone = [(name, pronoun) for pronoun, names in NAMES.items() for name in names]
    return rng.sample(everyone, count)


def _number(rng: random.Random, low: int = 2, high: int = 60) -> int:
    """Small numbers more often than large ones, so that chains stay in range and carries still occur."""
    return rng.randint(low, rng.choice((min(high, 20), high)))


def _divisor(rng: random.Random, value: int, highest: int = 9) -> int:
    choices = [d for d in range(2, highest + 1) if value % d == 0 and value > d]
    if not choices:
        raise DeadEnd
    return rng.choice(choices)


def _percent(rng: random.Random, value: int) -> int:
    choices = [p for p in PERCENTS if value * p % 100 == 0]
    if not choices:
        raise DeadEnd
    return rng.choice(choices)


def _event(chain: _Chain, who: str, thing: str, other: str, day: str | None = None) -> str:
    """Change the running quantity by one calculation and return the sentence that tells of it, next or on a day."""
    rng = chain.rng
    kind = rng.choice("gain gain lose lose double triple half".split())
    if kind == "gain":
        operator, n = "+", _number(rng)
        clause = rng.choice((f"buys {n} more {thing}", f"finds {n} {thing}", f"gets {n} {thing} from {other}"))
    elif kind == "lose":
        operator, n = "-", _number(rng, high=min(60, max(2, chain.value - 1)))
        clause = rng.choice((f"loses {n} {thing}", f"gives {n} {thing} to {other}", f"sells {n} {thing}"))
    elif kind == "half":
        operator, n = "/", 2
        clause = rng.choice((f"gives half of the {thing} to {other}", f"sells half of the {thing}"))
    else:
        operator, n = "*", 2 if kind == "double" else 3
        if chain.value * n > 200:
            raise DeadEnd
        clause = f"{'doubles' if n == 2 else 'triples'} the number of {thing}"
    moment = day or chain.moment()
    chain.compute(operator, n, label=moment)
    return f"On {day} {who} {clause}." if day else f"{moment}, {who} {clause}."


def _change(rng: random.Random, steps: int) -> tuple[list[str], str, _Chain]:
    (name, pronoun), (other, _) = _people(rng, 2)
    thing = rng.choice(THINGS)
    chain = _Chain(rng, _number(rng, 5), [])
    sentences = [f"{name} has {chain.value} {thing}."]
    sentences += [_event(chain, rng.choice((name, pronoun)), thing, other) for _ in range(steps)]
    return sentences, f"How many {thing} does {name} have now?", chain


def _intermediate(rng: random.Random, steps: int) -> tuple[list[str], str, _Chain]:
    """Like `change`, sentences by days; the question asks for a day before the last, the later events do not count."""
    (name, pronoun), (other, _) = _people(rng, 2)
    thing = rng.choice(THINGS)
    extra = rng.randint(1, 2) if steps + 2 <= len(DAYS) else 1
    if steps + extra > len(DAYS):
        raise DeadEnd
    chain = _Chain(rng, _number(rng, 5), [])
    sentences = [f"{name} has {chain.value} {thing}."]
    sentences += [_event(chain, pronoun, thing, other, DAYS[i]) for i in range(steps)]
    beyond = _Chain(rng, chain.value, [])
    sentences += [_event(beyond, pronoun, thing, other, DAYS[steps + i]) for i in range(extra)]
    return sentences, f"How many {thing} does {name} have at the end of {DAYS[steps - 1]}?", chain


def _compare(rng: random.Random, steps: int) -> tuple[list[str], str, _Chain]:
    """Shops A, B, ... that each have more, fewer or times as many as the one before; asks for one or for their sum."""
    together = steps >= 3 and steps % 2 == 0 and rng.random() < 0.5
    relations = steps // 2 if together else steps
    beyond = 0 if together else rng.choice((0, 0, 1))
    thing, place = rng.choice(THINGS), rng.choice(COMPARED)
    chain = _Chain(rng, _number(rng, 4), [])
    has = [chain.value]
    sentences = [f"{place} A has {chain.value} {thing}."]
    for index in range(1, relations + beyond + 1):
        letter = LETTERS[index]
        target = chain if index <= relations else _Chain(rng, has[-1], [])
        kind = rng.choice("more more fewer fewer times half".split())
        if kind in ("more", "fewer"):
            n = _number(rng, high=60 if kind == "more" else min(60, max(2, has[-1] - 1)))
            target.compute("+" if kind == "more" else "-", n, label=letter, left=has[-1])
            amount = f"{n} {kind} {thing} than"
        elif kind == "times":
            factor = rng.randint(2, 5)
            if has[-1] * factor > 200:
                raise DeadEnd
            target.compute("*", factor, label=letter, left=has[-1])
            amount = f"{factor} times as many {thing} as"
        else:
            target.compute("/", 2, label=letter, left=has[-1])
            amount = f"half as many {thing} as"
        sentences.append(f"{place} {letter} has {amount} the {place.lower()} before.")
        has.append(target.value)
    if not together:
        return sentences, f"How many {thing} does {place} {LETTERS[relations]} have?", chain
    total = has[0]
    for value in has[1:]:
        total = chain.compute("+", value, label="total", left=total)
    return sentences, f"How many {thing} do they have together?", chain


def _groups(rng: random.Random, steps: int) -> tuple[list[str], str, _Chain]:
    """Kinds of containers with so many things each: k products and k - 1 sums, then single changes."""
    (name, pronoun), (other, _) = _people(rng, 2)
    thing = rng.choice(THINGS)
    kinds = rng.randint(1, min(3, (steps + 1) // 2))
    boxes = rng.sample(BOXES, kinds)
    chain = _Chain(rng, 0, [])
    sentences, products = [], []
    for index, box in enumerate(boxes):
        count, each = rng.randint(2, 9), rng.randint(2, 12)
        products.append(chain.compute("*", each, label=box, left=count))
        sentences.append(f"{pronoun.capitalize() if index else name} has {count} {box} with {each} {thing} each.")
    total = products[0]
    for product in products[1:]:
        total = chain.compute("+", product, label="total", left=total)
    chain.value = total
    sentences += [_event(chain, pronoun, thing, other) for _ in range(steps - 2 * kinds + 1)]
    return sentences, f"How many {thing} does {name} have now?", chain


def _share(rng: random.Random, steps: int) -> tuple[list[str], str, _Chain]:
    """Changes, then equal shares, then changes of one share."""
    (name, pronoun), (friend, _), (other, _) = _people(rng, 3)
    thing = rng.choice(THINGS)
    before = rng.randint(0, steps - 1)
    chain = _Chain(rng, _number(rng, 12), [])
    sentences = [f"{name} has {chain.value} {thing}."]
    sentences += [_event(chain, pronoun, thing, other) for _ in range(before)]
    friends = _divisor(rng, chain.value)
    chain.compute("/", friends, label="each")
    sentences.append(
        f"{pronoun.capitalize()} shares the {thing} equally among {friends} friends, and {friend} is one of them."
    )
    sentences += [_event(chain, friend, thing, other) for _ in range(steps - before - 1)]
    return sentences, f"How many {thing} does {friend} have now?", chain


def _rates(rng: random.Random, steps: int) -> tuple[list[str], str, _Chain]:
    """So many an hour, hours a day, days; then what is lost, sold and paid."""
    thing = rng.choice(THINGS)
    rate = rng.randint(2, 12)
    chain = _Chain(rng, rate, [])
    sentences = [f"A machine makes {rate} {thing} an hour."]
    hours = rng.randint(2, 8)
    chain.compute("*", hours, label="a day")
    sentences.append(f"It works {hours} hours a day.")
    question = f"How many {thing} does it make in a day?"
    if steps > 1:
        days = rng.randint(2, 5)
        chain.compute("*", days, label="in all")
        sentences.append(f"It works for {days} days.")
        question = f"How many {thing} does it make in all?"
    for _ in range(steps - 2):
        moment = chain.moment()
        kind = rng.choice(("broken", "more", "parts"))
        if kind == "broken":
            n = _number(rng, high=min(60, max(2, chain.value - 1)))
            chain.compute("-", n, label=moment)
            sentences.append(f"{moment}, {n} {thing} break.")
        elif kind == "more":
            n = _number(rng)
            chain.compute("+", n, label=moment)
            sentences.append(f"{moment}, {n} {thing} are added.")
        else:
            parts = _divisor(rng, chain.value)
            chain.compute("/", parts, label=moment)
            sentences.append(f"{moment}, the {thing} are split into {parts} equal parts, and one part is kept.")
        question = f"How many {thing} are left?"
    return sentences, question, chain


def _percentages(rng: random.Random, steps: int) -> tuple[list[str], str, _Chain]:
    """p % of the running quantity leaves or comes (two calculations each), with single changes between."""
    (name, pronoun), (other, _) = _people(rng, 2)
    thing = rng.choice(THINGS)
    chain = _Chain(rng, 10 * rng.randint(2, 20) if rng.random() < 0.7 else 20 * rng.randint(1, 10), [])
    sentences = [f"{name} has {chain.value} {thing}."]
    if steps == 1:
        p = _percent(rng, chain.value)
        _part(chain, p, "part")
        return sentences, f"How many {thing} are {p}% of the {thing}?", chain
    left = steps
    while left:
        if left >= 2 and (left == steps or rng.random() < 0.4):
            p = _percent(rng, chain.value)
            if p > 80 and left > 2:
                raise DeadEnd
            whole, moment = chain.value, chain.moment()
            part = _part(chain, p, f"{moment} part")
            grows = rng.random() < 0.4
            chain.compute("+" if grows else "-", part, label=moment, left=whole)
            change = f"buys {p}% more {thing}" if grows else f"sells {p}% of the {thing}"
            sentences.append(f"{moment}, {pronoun} {change}.")
            left -= 2
        else:
            sentences.append(_event(chain, pronoun, thing, other))
            left -= 1
    return sentences, f"How many {thing} does {name} have now?", chain


def _part(chain: _Chain, percent: int, label: str) -> int:
    """Append `label: p% of a=c` and make c the running value."""
    part = chain.value * percent // 100
    chain.lines.append(f"{label}: {percent}% of {chain.value}={part}")
    chain.value = part
    return part


def _bare(rng: random.Random, steps: int) -> tuple[list[str], str, _Chain]:
    """No story: one calculation, question plainly."""
    if steps != 1:
        raise DeadEnd
    operator = rng.choice("+-*/%")
    if operator == "%":
        whole = 10 * rng.randint(2, 30)
        chain = _Chain(rng, whole, [])
        p = rng.choice([p for p in (*PERCENTS, 15, 35, 45, 70) if whole * p % 100 == 0] or [10])
        _part(chain, p, "part")
        return [], f"What is {p}% of {whole}?", chain
    a = rng.randint(2, 12) if operator == "*" else _number(rng, 4, 200)
    b = rng.randint(2, 12) if operator == "*" else _divisor(rng, a) if operator == "/" else _number(rng)
    chain = _Chain(rng, a, [])
    chain.compute(operator, b, label="result")
    word = {"+": "plus", "-": "minus", "*": "times", "/": "divided by"}[operator]
    return [], f"What is {a} {rng.choice((word, operator))} {b}?", chain


FAMILIES: dict[str, Callable[[random.Random, int], tuple[list[str], str, _Chain]]] = {
    "change": _change,
    "intermediate": _intermediate,
    "compare": _compare,
    "groups": _groups,
    "share": _share,
    "rates": _rates,
    "percentages": _percentages,
    "bare": _bare,
}
MOST_STEPS = {"intermediate": len(DAYS) - 1, "bare": 1}  # the others reach MAX_STEPS


def _distractor(rng: random.Random, sentences: list[str]) -> str:
    """A sentence with a number that the answer does not need.

    Who it is about is of the other pronoun than the story's first person, so that a "he" or "she" after it still
    means that person.
    """
    story = " ".join(sentences)
    first = story.split()[0]
    thing = rng.choice([t for t in THINGS if t not in story])
    name = rng.choice([n for names in NAMES.values() if first not in names for n in names if n not in story])
    return rng.choice(
        (
            f"{name} is {rng.randint(6, 40)} years old.",
            f"{name} has {_number(rng)} {thing}.",
            f"A box of {thing} costs {_number(rng)} dollars.",
            f"It is {rng.randint(2, 30)} miles to {rng.choice(PLACES)}.",
        )
    )


def split_of(answer: str) -> str:
    """The split that a problem belongs to, decided by the numbers of its worked steps: 80 % train, 10 % each other."""
    slot = zlib.crc32(",".join(re.findall(r"\d+", answer)).encode()) % 10
    return "train" if slot < 8 else "validation" if slot == 8 else "test"


def draw(rng: random.Random, steps: int, families: Sequence[str] = tuple(FAMILIES)) -> Problem:
    """One problem with exactly `steps` worked steps from one of `families`; one that stands twice, twice as often.

    Raises ValueError for an unknown family, or when none of them has problems of so many steps.
    """
    if unknown := {*families} - {*FAMILIES}:
        raise ValueError(f"unknown families {sorted(unknown)}; choose among {', '.join(FAMILIES)}")
    if not 1 <= steps <= (most := max((MOST_STEPS.get(name, MAX_STEPS) for name in families), default=0)):
        raise ValueError(f"families {[*families]} have problems of 1 to {most} steps, not {steps}; change one of them")
    while True:
        name = rng.choice(families)
        try:
            sentences, question, chain = FAMILIES[name](rng, steps)
        except DeadEnd:
            continue
        distracted = bool(sentences) and rng.random() < 0.25
        if distracted:
            sentences.insert(rng.randint(1, len(sentences)), _distractor(rng, sentences))
        answer = "\n".join([*chain.lines, f"#### {chain.value}"])
        return Problem(" ".join([*sentences, question]), answer, chain.value, steps, name, distracted)


def problems(
    split: str, count: int, *, seed: int = 0, steps: Sequence[int] = STEPS, families: Sequence[str] = tuple(FAMILIES)
) -> Iterator[Problem]:
    """`count` different problems of a split, steps and families drawn evenly; the same for the same arguments.

    Raises ValueError for an unknown split, a number of steps outside 1 to 8, and where `draw` does.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
    if not steps:
        raise ValueError(f"steps is empty; choose at least one number in 1 to {MAX_STEPS}")
    if bad := [s for s in steps if not 1 <= s <= MAX_STEPS]:
        raise ValueError(f"steps {bad} are outside 1 to {MAX_STEPS}; choose steps in that range")
    rng = random.Random(f"{split}/{seed}")
    seen: set[str] = set()
    while len(seen) < count:
        wanted = steps[len(seen) % len(steps)]
        problem = draw(rng, wanted, families)
        while problem.question in seen or split_of(problem.answer) != split:
            problem = draw(rng, wanted, families)
        seen.add(problem.question)
        yield problem
