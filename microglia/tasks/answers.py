"""The final answer of a worked text, and the one way of writing it that makes equal answers equal texts."""

import re
from decimal import Decimal, InvalidOperation

# A number as people and models write it: sign, currency, 1,234.50 or .5 or 1.5e-3 or 3/4. It does not start inside a
# word (A4), a number or an exponent (m^2), and a minus right after a digit, a letter or a bracket subtracts or joins
# (10-3, 5-year); ordinals (2nd) are no numbers.
NUMBER = re.compile(
    r"(?<![\w^])(?<!\d\.)(?P<sign>(?<![\w)\]}])[-+])?(?P<currency>[$€£]\s?)?(?P<sign2>(?<=[$€£])-)?"
    r"(?P<body>\d+/[1-9]\d*"
    r"|(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?"
    r"|\.\d+(?:[eE][-+]?\d+)?)"
    r"(?!\d|\.\d|(?:st|nd|rd|th)\b)",
    re.ASCII,
)
# "the answer is", "Final answer:", "**Answer**: ", "the answer would be"
ANSWER_IS = re.compile(r"\banswer\W{0,4}(?:(?:is|are|will be|would be|must be|equals)\b|[:=])[\s*_:$\\(\[]*", re.I)
# The rest of a `#### 72` line: punctuation, emphasis, a percent sign, a few words of unit. Without this rule the
# Markdown heading `#### 1. Find the total` would be the answer 1.
AFTER_HASHES = re.compile(r" ?[%°]?[A-Za-z/²³]*(?: [A-Za-z/²³]+){0,4}[ .*_$)\]}!]*(?:<[^>]*>)?$")
ANOTHER_QUESTION = re.compile(r"\n[ \t]*(?:Question|Q|Problem)[ \t]*:", re.I)
LIST_STARTS = re.compile(r"1[.)]\s+\S")  # "Answer:" and, on the next line, "1. Find the total"
LONGEST_BOX = 300  # characters read in search of the closing brace
LARGEST_EXPONENT = 40  # 1e999999999 would otherwise be written out in full

UNICODE = str.maketrans(
    {
        **dict.fromkeys("\u2212\u2012\u2013\ufe63\uff0d", "-"),  # minus, figure, en dash, small, full-width
        **dict.fromkeys("\u00a0\u2002\u2003", " "),
        **dict.fromkeys("\u2009\u202f", ""),  # thin spaces, which group digits
        "\uff0c": ",",
        "\uff04": "$",
        "\uff05": "%",
    }
)


def extract_answer(text: str) -> str | None:
    """The normalised final answer of a worked text, None when no number is in it.

    Tried in turn: the first `#### n` (Cobbe et al. 2021; the first, because a model that runs on repeats itself), the
    last "the answer is n", the last `\\boxed{n}`, the last number. What follows a new `Question:` is ignored: it is
    the model's own invention.
    """
    text = before_next_question(_plain(text))
    for answer in (_after_hashes(text), _after_answer_is(text), _boxed(text)):
        if answer is not None:
            return answer
    numbers = [_canonical(match) for match in NUMBER.finditer(text)]
    return numbers[-1] if numbers else None


def before_next_question(text: str) -> str:
    """Text up to a `Question:` that a model has made up after its answer."""
    another = ANOTHER_QUESTION.search(text)
    return text[: another.start()] if another and text[: another.start()].strip() else text


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
    """One spelling for one answer: `$1,234.50.` → `1234.5`, `-3.0 %` → `-3`, `5 apples` → `5`.

    Fractions stay as written; texts without a leading number are stripped and lower-cased (`B.` → `b`).
    """
    plain = _plain(answer).strip().strip("*_ ")
    if match := NUMBER.match(plain):
        return _canonical(match)
    return plain.rstrip(".").strip().casefold()


def _plain(text: str) -> str:
    """Text with Unicode's and LaTeX's spellings of digits' company replaced by ASCII."""
    text = text.translate(UNICODE)
    text = re.sub(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}", r"\1/\2", text)
    text = re.sub(r"(?<=\d)\s*(?:\u00d7|\\times)\s*10\^\{?(-?\d+)\}?", r"e\1", text)
    text = re.sub(r"(?<=\d)\\,(?=\d{3})", "", text)
    for latex, ascii_text in ((r"\$", "$"), (r"\%", "%"), ("{,}", ","), (r"\!", "")):
        text = text.replace(latex, ascii_text)
    return text


def _canonical(match: re.Match[str]) -> str:
    body = match["body"].replace(",", "")
    sign = "-" if "-" in (match["sign"], match["sign2"]) else ""
    if "/" in body:
        return sign + body
    try:
        value = Decimal(sign + body)
    except InvalidOperation:  # an exponent beyond what Decimal holds
        return sign + body
    if value and abs(value.adjusted()) > LARGEST_EXPONENT:
        return sign + body
    written = f"{value:f}"
    written = written.rstrip("0").rstrip(".") if "." in written else written
    return "0" if written == "-0" else written


def _after_hashes(text: str) -> str | None:
    for rest in re.findall(r"####([^\n]*)", text):
        line = " ".join(rest.split())
        start = re.match(r"[\s*_(\[{:]*(?:\\boxed\{)?[\s(\[]*", line)
        match = NUMBER.match(line, start.end() if start else 0)
        if match and AFTER_HASHES.match(line, match.end()):
            return _canonical(match)
    return None


def _after_answer_is(text: str) -> str | None:
    answer = None
    for marker in ANSWER_IS.finditer(text):
        newline = text.find("\n", marker.end())
        line = text[marker.end() : newline if newline >= 0 else len(text)]
        if "\n" in marker[0] and LIST_STARTS.match(line):
            continue
        sentence = re.split(r"[.!?;](?=\s|$)", line, maxsplit=1)[0]
        # In "the answer is 5 + 3 = 8" it is 8.
        if match := NUMBER.search(sentence.rsplit("=", 1)[-1]) or NUMBER.search(sentence):
            answer = _canonical(match)
    return answer


def _boxed(text: str) -> str | None:
    """The last number in the last `\\boxed{…}` that has one; braces inside are followed."""
    answer = None
    for box in re.finditer(r"\\boxed\s*\{", text):
        if numbers := list(NUMBER.finditer(braced(text, box.end(), LONGEST_BOX)[0])):
            answer = _canonical(numbers[-1])
    return answer
