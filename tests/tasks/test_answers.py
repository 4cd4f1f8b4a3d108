"""Hard spellings of final answers, each with the one that it must become."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microglia.tasks.answers import extract_answer, normalise_answer

EXTRACTED = [
    # after ####
    ("3 + 4 = 7\n#### 7", "7"),
    ("#### 72.", "72"),
    ("####72", "72"),
    ("#### $1,234.50", "1234.5"),
    ("#### 109,200,000", "109200000"),
    ("#### -10", "-10"),
    ("#### \u221210", "-10"),
    ("#### **18**", "18"),
    ("#### \\boxed{18}", "18"),
    ("#### 15%", "15"),
    ("#### 18 apples per day", "18"),
    ("#### 5kg", "5"),
    ("#### 7<|endoftext|>", "7"),
    ("#### 7\n#### 8\n#### 9", "7"),
    ("#### 1. Find the total\n2 + 3 = 5\n#### 2. Double it\n5 * 2 = 10", "10"),
    ("#### Step 1\nwe have 4\n#### 9", "9"),
    ("#### 0", "0"),
    ("#### -0.0", "0"),
    ("#### 5\n\nQuestion: Tom has 9 pears.\nAnswer: the answer is 9", "5"),
    # the answer is
    ("The answer is 42.", "42"),
    ("the answer is: $3.50 per cup, which leaves 20 cups", "3.5"),
    ("The answer is 5 + 3 = 8. Checked 2 times.", "8"),
    ("So x = 3. The answer is x = -3", "-3"),
    ("**Final Answer:** 1,000", "1000"),
    ("Final answer: \\(\\boxed{12}\\), found in 3 steps", "12"),
    ("**Answer**: 64 (in 2 ways)", "64"),
    ("The answer would be 9 not 10", "9"),
    ("The answer is 3. No, wait, the answer is 4. It took 2 tries.", "4"),
    ("The answer is:\n\n18\n\nThat took 3 steps.", "18"),
    ("Answer:\n1. Tom has 5.\n2. He buys 6, so 11.", "11"),
    ("The answer is -$5 after 2 days", "-5"),
    ("The answer is $-5 after 2 days", "-5"),
    ("The answer is 1/2.", "1/2"),
    ("The answer is $\\frac{3}{4}$ of 8", "3/4"),
    ("The answer is twelve, or 12", "12"),
    ("The answer is unknown.\nWe computed 6", "6"),
    ("Answer: 8\nQ: How many are 2 and 2?\nA: The answer is 4", "8"),
    # \boxed
    ("Thus \\boxed{18} after 3 steps", "18"),
    ("\\boxed{1} then \\boxed{2} in 3 ways", "2"),
    ("\\boxed{x = \\text{total of } 1{,}250} in 3 ways", "1250"),
    ("\\boxed{\\$18.00} by 5 pm", "18"),
    ("\\boxed{\\dfrac{1}{3}} by 5 pm", "1/3"),
    # the last number
    ("He has 10-3=7 left", "7"),
    ("10-3", "3"),
    ("between 3\u20135", "5"),
    ("x=-5", "-5"),
    ("it falls to -5 degrees", "-5"),
    ("f(2)-3", "3"),
    ("5-year", "5"),
    ("that is 1,234.50 in all", "1234.5"),
    ("lists 1,23", "23"),
    ("it weighs .5 kg", "0.5"),
    ("it weighs 1.5e3 g", "1500"),
    ("a chance of 2E-3", "0.002"),
    ("a chance of 1e-5.", "0.00001"),
    ("1.5 \u00d7 10^3", "1500"),
    ("1.5 \\times 10^{3}", "1500"),
    ("25 m^2", "25"),
    ("25 m\u00b2", "25"),
    ("30 on A4 paper", "30"),
    ("8, and he came 2nd of all, 12th of the year", "8"),
    ("1\u202f234\u00a0km", "1234"),
    ("1\\,234 km", "1234"),
    ("12\\,\\text{km}", "12"),
    ("\u20ac 30", "30"),
    ("007", "7"),
    ("3.140", "3.14"),
    ("100", "100"),
    ("She ran 3/4 of it", "3/4"),
    ("10/2=5", "5"),
    ("72..", "72"),
    ("what a 7!", "7"),
    ("1e999999999", "1e999999999"),
    # nothing
    ("", None),
    ("no idea", None),
    ("#### none", None),
]


@pytest.mark.parametrize(("text", "answer"), EXTRACTED)
def test_the_final_answer_is_found(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("written", "normal"),
    [
        (" 70,000 ", "70000"),
        ("$18.00", "18"),
        ("18.", "18"),
        ("\u22123.0 %", "-3"),
        ("5 apples", "5"),
        ("60 km/h", "60"),
        ("6/8", "6/8"),
        ("-6/8", "-6/8"),
        ("1.50", "1.5"),
        ("+4", "4"),
        ("1e3", "1000"),
        ("**9**", "9"),
        ("B.", "b"),
        (" Yes ", "yes"),
        ("", ""),
    ],
)
def test_one_answer_has_one_spelling(written: str, normal: str) -> None:
    assert normalise_answer(written) == normal


@settings(deadline=None)
@given(st.integers(-(10**15), 10**15))
def test_every_integer_is_found_however_it_is_grouped(n: int) -> None:
    for written in (f"{n}", f"{n:,}", f"{n:,}.00", f"{n:,}.".replace("-", "\u2212")):
        for text in (f"#### {written}", f"The answer is {written}", f"\\boxed{{{written}}}", f"I find {written}"):
            assert extract_answer(text) == str(n)


@settings(deadline=None)
@given(st.text(alphabet="0123456789.,-$%/e+ #\n\\{}boxed=x", max_size=60))
def test_a_normal_answer_stays_as_it_is(text: str) -> None:
    found = extract_answer(text)
    assert found is None or normalise_answer(found) == found


@pytest.mark.parametrize(
    "unit", ["9", "a ", "a", "1,", "#### 1 a", "\\boxed{", "answer is ", "1/", "-", " ", "####", "1e", "\n", ". "]
)
def test_a_model_that_babbles_costs_no_time(unit: str) -> None:
    started = time.process_time()
    extract_answer("#### 1 " + unit * (4000 // len(unit)) + "!?")
    assert time.process_time() - started < 1.0
