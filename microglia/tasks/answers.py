"""The final answer of a worked text, and the one way of writing it that makes equal answers equal texts."""

import re
from decimal import Decimal, InvalidOperation
from fractions import Fraction

# A number as people and models write it: sign, currency, 1,234.50 or 1 234.50 or .5 or 1.5e-3 or 3/4 or 2 1/2. It does
# not start inside a word (A4), a number or an exponent (m^2), and a minus right after a digit, a letter or a bracket
# subtracts or joins (10-3, 5-year); ordinals (2nd) are no numbers.
NUMBER = re.compile(
    r"(?<![\w^])(?<!\d\.)(?P<sign>(?<![\w)\]}])[-+])?(?P<currency>[$€£]\s?)?(?P<sign2>(?<=[$€£])-)?"
    r"(?P<body>(?:(?P<whole>\d+) )?(?P<top>\d+)/(?P<bottom>[1-9]\d*)"
    r"|(?:\d{1,3}(?:,\d{3})+(?!\d)|[1-9]\d{0,2}(?: \d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?"
    r"|\.\d+(?:[eE][-+]?\d+)?)"
    r"(?!\d|\.\d|(?:st|nd|rd|th)\b)",
    re.ASCII,
)
# Arithmetic and the `=` behind it: `5 dollars x 3 =`, `(5 + 3) * 2 =`, `f(2) =`; neither `36 =` nor `36 when x =`. In
# atomic groups and with a limit, so that a babbling model costs no time.
CALL = r"[A-Za-z]\w*\([^()=\n]*\)"
IN_WORDS = r"(?:of|times|plus|minus)\b"
UNIT = rf"(?:\s?(?!x[\s\d]|{IN_WORDS})/?[A-Za-z%]+)"
OPERAND = rf"(?>[\s(\[{{$€£]{{0,9}}-?(?:{CALL}|\d[\d,.]*{UNIT}{{0,3}}|[A-Za-z]\b)[\s)\]}}$]{{0,9}})"
OPERATOR = rf"(?:[-+*/^x×÷·]|{IN_WORDS}|\\(?:times|cdot|div)|(?<=\d)(?=\())"
ARITHMETIC = re.compile(rf"(?<![\w.,])(?:{OPERAND}(?:{OPERATOR}{OPERAND}){{1,20}}|{CALL}\s*)=")
# "the answer is", "Final answer:", "**Answer**: ", "the answer would be"
ANSWER_IS = re.compile(r"\banswer\W{0,4}(?:(?:is|are|will be|would be|must be|equals)\b|[:=])", re.I)
BEHIND_MARKER = re.compile(r"[\s*_:]*")
LIST_STARTS = re.compile(r"1[.)]\s+\S")  # "Answer:" and, on the next line, "1. Find the total"
HASHES = re.compile(r"####[ \t*_:]*")
BEFORE_NUMBER = re.compile(r"[\s*_:$\\(\[{]*(?:boxed\{)?[\s$(\[]*")
HEADING = re.compile(r"\d+[.):]\s+\S")  # the Markdown heading `#### 1. Find the total` is no answer
LOOSE_SIGN = re.compile(r"^(\W*?[-+])\s+(?=[$€£]?\.?\d)")
# "not 5", "isn't (A)", "cannot be option B"
NEGATED = re.compile(
    r"(?:\b(?:can)?not|n['\u2019]t)\s+(?:be\s+)?(?:option\s+|choice\s+)?(?:\([A-Z]\)|[A-Z]\b|[-$€£]*\d[\d,./]*)"
)
THINKING = re.compile(r"<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)", re.S | re.I)
THOUGHT = re.compile(r".*</think(?:ing)?>", re.S | re.I)  # the opening tag is often a part of the prompt
ANOTHER_QUESTION = re.compile(r"\n[ \t]*(?:Question|Q|Problem)[ \t]*:", re.I)
LONGEST_BOX = 300  # characters read in search of the closing brace
LARGEST_EXPONENT = 40  # 1e999999999 would otherwise be written out in full
MOST_PLACES = 12  # decimal places of 1/8; other fractions stay fractions

UNICODE = str.maketrans(
    {
        **dict.fromkeys("\u2212\u2012\u2013\ufe63\uff0d", "-"),  # minus, figure, en dash, small, full-width
        **dict.fromkeys("\u00a0\u2002\u2003\u2007\u2009\u202f", " "),  # no-break, en, em, figure and thin spaces
        **{"\u00bd": "1/2", "\u2153": "1/3", "\u2154": "2/3", "\u00bc": "1/4", "\u00be": "3/4"},
        "\u2044": "/",
        "\uff0c": ",",
        "\uff04": "$",
        "\uff05": "%",
    }
)
AFTER_WHOLE = re.compile(r"(?<=\d)(?=\\[dt]?frac\{\d+\}\{\d+\}|[\u00bc-\u00be\u2153\u2154])")  # the gap in 2½


def reply(text: str) -> str:
    """What a model says to the question: nothing of what it thinks in tags, closed or not, nor of a `Question:` and
    what follows, which it has made up after its answer.
    """
    text = THOUGHT.sub("", THINKING.sub("", text))
    another = ANOTHER_QUESTION.search(text)
    return text[: another.start()] if another and text[: another.start()].strip() else text


def extract_answer(text: str) -> str | None:
    """The normalised final answer of a worked text, None when no number is in it.

    Tried in turn: the first `#### n` (Cobbe et al. 2021; the first, because a model that runs on repeats itself), the
    last `\\boxed{n}`, which chat models are asked for, the last "the answer is n", a last line that is a number, the
    last number. Of an answer that is stated in one of these ways it is the first number that counts, or what arithmetic
    before an `=` comes to.
    """
    text = without_negated(_plain(reply(text)))
    last_line = text.rstrip().rpartition("\n")[2]
    for answer in (_after_hashes(text), _boxed(text), _after_answer_is(text), quantity(last_line)):
        if answer is not None:
            return answer
    numbers = [_canonical(match) for match in NUMBER.finditer(text)]
    return numbers[-1] if numbers else None


def stated(text: str, marker: re.Pattern[str] = ANSWER_IS) -> list[str]:
    """What follows each "the answer is" up to the end of its line, which may be one of the next lines.

    "The answer is not 5" states nothing, and neither does a list that begins below "Answer:".
    """
    rests = []
    for found in marker.finditer(text):
        gap = BEHIND_MARKER.match(text, found.end())
        assert gap is not None
        rest = text[gap.end() :].partition("\n")[0]
        below = "\n" in gap[0]
        if rest.strip() and not NEGATED.match(rest) and not (below and LIST_STARTS.match(rest)):
            rests.append(re.sub(r"^[-+]\s+", "", rest) if below else rest)
    return rests


def without_negated(text: str) -> str:
    """The text without the numbers and options that it says the answer is not."""
    return NEGATED.sub("", text)


def quantity(phrase: str) -> str | None:
    """The number that a whole phrase is, with its unit or a remark in brackets: `2 1/2 hours`, `18 (2 boxes of 9)`.

    None for other phrases with a number in them, such as `Paris in 1990` or `5 feet 3 inches`.
    """
    phrase = _signed(_plain(phrase))
    number = _number(phrase)
    if number is None or not NUMBER.match(phrase, _start(phrase)):
        return None
    unit = re.sub(r"\([^()]*\)|\s?=.*", "", phrase[number.end() :])
    return None if re.search(r"\d", unit) else _canonical(number)


def braced(text: str, start: int, limit: int) -> tuple[str, bool]:
    """What stands between an opening brace before `start` and its closing one, and whether there is one.

    Escaped braces are text. At most `limit` characters are read, so that a babbling model costs no quadratic time.
    """
    depth = 1
    for end in range(start, min(len(text), start + limit)):
        if text[end - 1] != "\\":
            depth += {"{": 1, "}": -1}.get(text[end], 0)
        if not depth:
            return text[start:end], True
    return text[start : start + limit], False


def normalise_answer(answer: str) -> str:
    """One spelling for one answer: `$1,234.50.` → `1234.5`, `-3.0 %` → `-3`, `5 apples` → `5`, `2 1/2` → `2.5`.

    Fractions that no short decimal equals are reduced: `2/6` → `1/3`. Texts without a leading number are stripped and
    lower-cased (`B.` → `b`).
    """
    plain = _plain(answer).strip().strip("*_ ")
    if match := NUMBER.match(_signed(plain)):
        return _canonical(match)
    return plain.rstrip(".").strip().casefold()


def _plain(text: str) -> str:
    """Text with Unicode's and LaTeX's spellings of digits' company replaced by ASCII."""
    text = AFTER_WHOLE.sub(" ", text).translate(UNICODE)
    text = re.sub(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}", r"\1/\2", text)
    text = re.sub(r"(?<=\d)\s*(?:\u00d7|\\times)\s*10\^\{?(-?\d+)\}?", r"e\1", text)
    text = re.sub(r"(?<=\d)\\,(?=\d{3})", "", text)
    for latex, ascii_text in ((r"\$", "$"), (r"\%", "%"), ("{,}", ","), (r"\!", "")):
        text = text.replace(latex, ascii_text)
    return text


def _signed(text: str) -> str:
    """A statement whose first sign stands at its number: `- 7` → `-7`."""
    return LOOSE_SIGN.sub(r"\1", text)


def _start(text: str) -> int:
    """Where a statement's number begins, behind brackets, emphasis and currency."""
    found = BEFORE_NUMBER.match(text)
    return found.end() if found else 0


def _number(statement: str) -> re.Match[str] | None:
    """The first number of a statement, or what it comes to where that begins arithmetic with a result."""
    number = NUMBER.search(statement)
    for left in ARITHMETIC.finditer(statement):
        if number is None or number.start() < left.start():
            break
        if number.start() < left.end():
            number = NUMBER.search(statement, left.end()) or number
    return number


def _canonical(match: re.Match[str]) -> str:
    sign = "-" if "-" in (match["sign"], match["sign2"]) else ""
    body = re.sub(r"[, ](?=\d{3})", "", match["body"]) if match["top"] is None else match["body"]
    written = _fraction(match) if match["top"] else _decimal(body)
    return "0" if written == "0" else sign + (written or body)


def _decimal(body: str) -> str | None:
    """A decimal number without leading and trailing zeros, None for one too large to write out."""
    try:
        value = Decimal(body)
    except InvalidOperation:  # an exponent beyond what Decimal holds
        return None
    if value and abs(value.adjusted()) > LARGEST_EXPONENT:
        return None
    written = f"{value:f}"
    return written.rstrip("0").rstrip(".") if "." in written else written


def _fraction(match: re.Match[str]) -> str | None:
    """A fraction or mixed number as a decimal or reduced, None for one too long to reckon with."""
    if len(match["body"]) > LARGEST_EXPONENT:
        return None
    value = Fraction(int(match["top"]), int(match["bottom"])) + int(match["whole"] or 0)
    for places in range(MOST_PLACES + 1):
        if (scaled := value * 10**places).denominator == 1:
            whole, rest = divmod(scaled.numerator, 10**places)
            return f"{whole}.{rest:0{places}}" if places else f"{whole}"
    return f"{value}"


def _after_hashes(text: str) -> str | None:
    for found in HASHES.finditer(text):
        line = _signed(text[found.end() :].partition("\n")[0])
        if NUMBER.match(line, _start(line)) and not HEADING.match(line):
            number = _number(line)
            return number and _canonical(number)
    return None


def _after_answer_is(text: str) -> str | None:
    for rest in reversed(stated(text)):
        sentence = re.split(r"[.!?;](?=\s|$)", rest, maxsplit=1)[0]
        if number := _number(_signed(sentence)):
            return _canonical(number)
    return None


def _boxed(text: str) -> str | None:
    """The number of the last `\\boxed{…}` that has one; braces inside are followed."""
    for box in reversed([*re.finditer(r"\\boxed\s*\{", text)]):
        if number := _number(_signed(braced(text, box.end(), LONGEST_BOX)[0])):
            return _canonical(number)
    return None
