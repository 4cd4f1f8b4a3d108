"""Text files as passages, and the prompts that ship: sizes, kinds, and nothing that stands in two splits."""

import re
from collections import Counter
from difflib import SequenceMatcher

import pytest

from microglia.errors import ConfigError, DataError
from microglia.tasks import get_task
from microglia.tasks.shipped import KINDS, SPLITS, shipped_prompts
from microglia.tasks.text import PASSAGE, SHORTEST, halves

TEXT = "\n\n".join(
    f"Chapter {n}. " + f"The {n}th fox, quick and brown, jumps over {n} lazy dogs. " * 20 for n in range(6)
)


def test_passages_put_together_are_the_text():
    pairs = halves(TEXT)
    together = " ".join("".join(pair) for pair in pairs)
    assert TEXT.startswith(together)
    assert len(TEXT) - len(together) < SHORTEST
    for before, after in pairs:
        assert len(before) + len(after) <= PASSAGE + 20
        assert abs(len(before) - len(after)) < 30
        assert re.search(r"\w$", before)
        assert re.match(r" \w", after)


def test_short_rests_are_left_out_and_text_without_spaces_is_cut_anyway():
    assert halves("word " * (SHORTEST // 5 - 2)) == []
    assert [len(a) + len(b) for a, b in halves("字" * (PASSAGE + SHORTEST))] == [PASSAGE, SHORTEST]


def test_a_folder_of_texts_is_read_whole(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "one.txt").write_text(TEXT)
    (tmp_path / "deep" / "two.md").write_text(TEXT[:500])
    (tmp_path / "no.json").write_text("{}")
    examples = get_task("text").load("test", data_dir=tmp_path)
    assert Counter(e.family for e in examples) == {"one.txt": len(halves(TEXT)), "deep/two.md": 1}
    assert all(e.whole and e.answer for e in examples)
    assert len({e.id for e in examples}) == len(examples)
    (alone,) = get_task("text").load("test", data_dir=tmp_path / "deep" / "two.md")
    assert (alone.id, alone.question + alone.answer) == ("text/two.md/0", TEXT[:500].strip())


def test_what_is_no_text_is_refused(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"x.txt cannot be read as UTF-8 text"):
        get_task("text").load("test", data_dir=tmp_path)
    (tmp_path / "x.txt").write_text("Too short.")
    with pytest.raises(DataError, match=r"holds no text of 200 characters"):
        get_task("text").load("test", data_dir=tmp_path)
    with pytest.raises(ConfigError, match=r"split='train' was given, but text files are not divided"):
        get_task("text").load("train", data_dir=tmp_path)
    with pytest.raises(ConfigError, match=r"shots=2 was given, but the text task has no solved examples"):
        get_task("text", shots=2).load("test")


def test_without_files_the_shipped_prompts_are_asked():
    examples = get_task("text").load("validation")
    assert [e.question for e in examples] == [row.prompt for row in shipped_prompts("validation")]
    assert {e.family for e in examples} == {*KINDS}
    assert not any(e.answer or e.whole for e in examples)


def test_the_shipped_prompts_have_the_promised_sizes_and_kinds():
    sizes = {split: Counter(row.kind for row in shipped_prompts(split)) for split in SPLITS}
    assert 600 <= sum(map(Counter.total, sizes.values())) <= 1200
    assert sizes["train"].total() > 400
    assert all(count.total() > 90 and count.keys() == {*KINDS} for count in sizes.values())
    assert min(min(count.values()) for count in sizes.values()) >= 15
    first = [row.kind for row in shipped_prompts("test")[:20]]
    assert len({*first}) >= 4  # mixed, so that a limit takes of every kind
    with pytest.raises(ConfigError, match=r"split='dev' is unknown; choose one of train, validation, test"):
        shipped_prompts("dev")


def test_no_shipped_prompt_stands_twice_or_much_like_another():
    words = {}
    for split in SPLITS:
        for row in shipped_prompts(split):
            key = " ".join(re.findall(r"\w+", row.prompt.casefold()))
            assert key not in words, row.prompt
            words[key] = split
            assert row.prompt == row.prompt.strip()
            assert 4 <= len(row.prompt) <= 400
    held_out = [key for key, split in words.items() if split != "train"]
    train = [key for key, split in words.items() if split == "train"]
    alike = [
        (a, b)
        for a in held_out
        for b in train
        if abs(len(a) - len(b)) < 8 and a[:6] == b[:6] and SequenceMatcher(None, a, b).ratio() > 0.85
    ]
    assert alike == []
