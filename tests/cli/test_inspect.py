"""`microglia inspect --prompt`: decisions beside their signals, in the terminal, as JSON and as a picture."""

import json

import pytest
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from microglia.cli.main import app
from tests.tiny_folder import checkpoint_for, save_tiny_model

PROMPT = "What costs $5 + $7?"


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A checkpoint with opinionated agents, and its model."""
    folder = tmp_path_factory.mktemp("inspect")
    model = save_tiny_model(folder / "model")
    checkpoint_for(AutoModelForCausalLM.from_pretrained(model)).save_pretrained(folder / "checkpoint")
    return str(folder / "checkpoint"), str(model)


def run(places, *arguments: object):
    return CliRunner().invoke(app, ["inspect", places[0], "--model", places[1], *map(str, arguments)])


def test_every_head_has_signals_and_an_outcome(places):
    done = run(places, "--prompt", PROMPT, "--json")
    assert done.exit_code == 0, done.stderr
    data = json.loads(done.stdout)
    assert data["kind"] == "prompt"
    assert len(data["sites"]) == 2
    for site in data["sites"]:
        numbers = [*site["signals"].values(), *site["deviations"].values(), site["logit"], site["probability"]]
        assert {len(values) for values in numbers} == {8} == {len(site["outcome"])}
    kept = [keep for site in data["sites"] for keep in site["keep"]]
    assert data["keep_ratio"] == sum(kept) / len(kept)


def test_the_terminal_shows_as_many_heads_as_are_kept(places):
    data = json.loads(run(places, "--prompt", PROMPT, "--json").stdout)
    shown = run(places, "--prompt", PROMPT).stdout
    kept = sum(sum(site["keep"]) for site in data["sites"])
    assert f"{kept} of 16 heads kept" in shown
    rows = "".join(line for line in shown.splitlines() if f"/{8} " in line)
    assert rows.count("█") + rows.count("▒") == kept
    site = run(places, "--prompt", PROMPT, "--site", 1).stdout
    for outcome in set(data["sites"][1]["outcome"]):
        assert site.count(f" {outcome} ") >= data["sites"][1]["outcome"].count(outcome)
    assert "σ" in site


def test_a_picture_is_drawn(places, tmp_path):
    done = run(places, "--prompt", PROMPT, "--png", tmp_path / "pictures" / "heads.png")
    assert done.exit_code == 0, done.stderr
    assert (tmp_path / "pictures" / "heads.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--png", "heads.png"], "say --prompt TEXT too"),
        (["--prompt", "hello", "--png", "heads.bmp"], "it must end in .png, .svg, .pdf"),
        (["--prompt", "hello", "--site", 2], "the model has the sites 0 to 1"),
        (["--prompt", " "], "prompt 0 of 1 is empty"),
    ],
)
def test_a_wrong_request_ends_in_one_sentence(arguments, sentence, places):
    done = run(places, *arguments)
    assert done.exit_code == 2
    assert sentence in done.stderr
