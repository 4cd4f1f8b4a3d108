"""Hard spellings of final answers, each with the one that it must become."""

import time

import pytest
from hypothesis import given
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
    ("#### 18 (2 boxes of 9)", "18"),
    ("#### 5 feet of 12", "5"),
    ("#### - 7", "-7"),
    ("#### **- 7**", "-7"),
    ("#### \u2212 7", "-7"),
    ("#### 36 = 6^2", "36"),
    ("#### 5 + 3 = 8", "8"),
    ("#### 0", "0"),
    ("#### -0.0", "0"),
    ("#### 5\n\nQuestion: Tom has 9 pears.\nAnswer: the answer is 9", "5"),
    # the answer is
    ("The answer is 42.", "42"),
    ("the answer is: $3.50 per cup, which leaves 20 cups", "3.5"),
    ("The answer is 5 + 3 = 8. Checked 2 times.", "8"),
    ("So x = 3. The answer is x = -3", "-3"),
    ("The answer is 5 cups (1 cup = 8 ounces).", "5"),
    ("The answer is 5 cups, as 1 cup = 8 ounces.", "5"),
    ("The answer is 36 when x = 3.", "36"),
    ("The answer is 36 = 6^2.", "36"),
    ("The answer is 60 km/h = 16.7 m/s", "60"),
    ("The answer is 8 (= 5 + 3).", "8"),
    ("The answer is 8, because 5 + 3 = 8 and 4 + 4 = 8", "8"),
    ("The answer is 5 + 3 = 8 = 2^3.", "8"),
    ("The answer is 5 + 3 = 2 * 4 = 8", "8"),
    ("The answer is $5 + $3 = $8", "8"),
    ("The answer is 5 dollars + 3 dollars = 8 dollars", "8"),
    ("The answer is (5 + 3) * 2 = 16", "16"),
    ("The answer is 2(5 + 3) = 16", "16"),
    ("The answer is 5 x 3 = 15 and 5x3 = 15", "15"),
    ("The answer is \\(5 \\times 3 = 15\\)", "15"),
    ("The answer is 10/2 = 5", "5"),
    ("The answer is 6^2 = 36", "36"),
    ("The answer is 20% of 50 = 10", "10"),
    ("The answer is 2 times 5 = 10", "10"),
    ("The answer is f(2) = 10", "10"),
    ("The answer is - 7.", "-7"),
    ("The answer is:\n- 7 apples", "7"),
    ("The answer is not 5. It is 4", "4"),
    ("The answer isn't 5 but 4", "4"),
    ("The answer is 4. The answer is not 5.", "4"),
    ("**Final Answer:** 1,000", "1000"),
    ("Final answer: \\(\\boxed{12}\\), found in 3 steps", "12"),
    ("**Answer**: 64 (in 2 ways)", "64"),
    ("The answer would be 9 not 10", "9"),
    ("The answer is 3. No, wait, the answer is 4. It took 2 tries.", "4"),
    ("The answer is:\n\n18\n\nThat took 3 steps.", "18"),
    ("Answer:\n1. Tom has 5.\n2. He buys 6, so 11.", "11"),
    ("The answer is -$5 after 2 days", "-5"),
    ("The answer is $-5 after 2 days", "-5"),
    ("The answer is 1/2.", "0.5"),
    ("The answer is $\\frac{3}{4}$ of 8", "0.75"),
    ("The answer is twelve, or 12", "12"),
    ("The answer is unknown.\nWe computed 6", "6"),
    ("Answer: 8\nQ: How many are 2 and 2?\nA: The answer is 4", "8"),
    # \boxed
    ("Thus \\boxed{18} after 3 steps", "18"),
    ("The answer is found in 3 steps.\n\\[\n\\boxed{18}\n\\]", "18"),
    ("Therefore, Janet makes $\\boxed{18}$ dollars every day.", "18"),
    ("\\[ 9 \\times 2 = \\boxed{\\text{18 dollars}} \\]", "18"),
    ("\\boxed{1} then \\boxed{2} in 3 ways", "2"),
    ("\\boxed{x = \\text{total of } 1{,}250} in 3 ways", "1250"),
    ("\\boxed{\\$18.00} by 5 pm", "18"),
    ("\\boxed{- 7} by 5 pm", "-7"),
    ("\\boxed{18 \\text{ (2 boxes of 9)}} by 5 pm", "18"),
    ("\\boxed{5 + 3 = 8} by 5 pm", "8"),
    ("\\boxed{\\dfrac{1}{3}} by 5 pm", "1/3"),
    # a last line that is a number
    ("Two boxes of 9.\n18 (2 boxes of 9)", "18"),
    ("Squares.\n36 = 6^2", "36"),
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
    ("1 000 000", "1000000"),
    ("The answer is 1 000 000 km", "1000000"),
    ("1\u00a0000\u00a0000", "1000000"),
    ("1\u2009000\u2009000", "1000000"),
    ("1\u202f000\u202f000.50", "1000000.5"),
    ("in 2019 it was 100", "100"),
    ("5 1000 m runs", "1000"),
    ("it took 2 1/2 hours", "2.5"),
    ("it took 2\u00bd hours", "2.5"),
    ("it took 1 1/3 hours", "4/3"),
    ("it took $2\\frac{1}{2}$ hours", "2.5"),
    ("it took 2/6 of an hour", "1/3"),
    # thinking is not looked at
    ("<think>The answer is 5.</think>It is 4", "4"),
    ("<think>\nThe answer is 5.\n#### 5", None),
    ("It is 4. <think>The answer is 5.", "4"),
    ("The answer is 5.\n</think>\n\nIt is 4", "4"),
    ("<think>5</think>#### 4\n<think>#### 6</think>", "4"),
    ("12\\,\\text{km}", "12"),
    ("\u20ac 30", "30"),
    ("007", "7"),
    ("3.140", "3.14"),
    ("100", "100"),
    ("She ran 3/4 of it", "0.75"),
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
        ("6/8", "0.75"),
        ("-6/8", "-0.75"),
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


@given(st.integers(-(10**15), 10**15))
def test_every_integer_is_found_however_it_is_grouped(n: int) -> None:
    spaced = [f"{n:,}".replace(",", space) for space in " \u00a0\u2009\u202f"]
    for written in (f"{n}", f"{n:,}", f"{n:,}.00", f"{n:,}.".replace("-", "\u2212"), *spaced):
        for text in (f"#### {written}", f"The answer is {written}", f"\\boxed{{{written}}}", f"I find {written}"):
            assert extract_answer(text) == str(n)


@given(st.text(alphabet="0123456789.,-$%/e+ #\n\\{}boxed=x", max_size=60))
def test_a_normal_answer_stays_as_it_is(text: str) -> None:
    found = extract_answer(text)
    assert found is None or normalise_answer(found) == found


BABBLE = ["9", "a ", "a", "1,", "#### 1 a", "\\boxed{", "answer is ", "1/", "-", " ", "####", "1e", "\n", ". "]
BABBLE += ["1+", "1 ", "a(", "(1", "1 a", "$", "<think>", "</think>", "not ", "####\n", "answer is:\n", "x = 1 + "]


@pytest.mark.parametrize("unit", BABBLE)
def test_a_model_that_babbles_costs_no_time(unit: str) -> None:
    started = time.process_time()
    extract_answer("#### 1 " + unit * (4000 // len(unit)) + "!?")
    assert time.process_time() - started < 1.0
