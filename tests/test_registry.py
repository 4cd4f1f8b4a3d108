"""Names: what is registered is found, and one sentence says what there is to choose from."""

import pytest

from microglia.errors import ConfigError
from microglia.registry import Registry, listed


def test_what_is_registered_is_found_by_its_name():
    colours = Registry("colour", {"red": 1})
    colours["green"] = 2

    @colours.register("blue")
    def blue():
        return 3

    assert (colours["red"], colours["green"], colours["blue"]()) == (1, 2, 3)
    assert list(colours) == ["red", "green", "blue"]


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["red"], "colour='pink' is unknown; choose red"),
        (["red", "green"], "colour='pink' is unknown; choose red or green"),
        (["red", "green", "blue"], "colour='pink' is unknown; choose red, green or blue"),
    ],
)
def test_an_unknown_name_is_answered_with_the_names_there_are(names, sentence):
    colours = Registry("colour", dict.fromkeys(names, 0))
    with pytest.raises(ConfigError) as caught:
        _ = colours["pink"]
    assert str(caught.value) == sentence
    assert "pink" not in colours


def test_names_are_listed_in_their_order():
    assert listed(("b",)) == "b"
    assert listed(["b", "a"]) == "b or a"
    assert listed(("b", "a", "c")) == "b, a or c"
