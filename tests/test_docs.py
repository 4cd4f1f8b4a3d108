"""Pages show commands and code that exist: every option parses, every import resolves, the guides' examples run."""

import ast
import re
from importlib import import_module
from pathlib import Path

import pytest
import torch

import microglia
from microglia.cli.main import VERBS
from microglia.criteria import CRITERIA, Calibration
from microglia.models import load_model
from microglia.tasks import get_task
from microglia.units import find_sites
from tests.commands import check_command, command_lines, shell_blocks

ROOT = Path(__file__).resolve().parents[1]
PAGES = {str(p.relative_to(ROOT)): p.read_text("utf-8") for p in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]}
COMMANDS = [(page, words) for page, text in PAGES.items() for b in shell_blocks(text) for words in command_lines(b)]


def python_blocks(text: str) -> list[str]:
    """The contents of ```python blocks, without the indentation of a list."""
    found = re.findall(r"^( *)```python\n(.*?)^ *```", text, flags=re.MULTILINE | re.DOTALL)
    return [re.sub(rf"^{indent}", "", block, flags=re.MULTILINE) for indent, block in found]


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=lambda value: " ".join(value) if value else "")
def test_a_command_on_a_page_can_be_typed(page, words):
    check_command(words)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("trian", "no verb trian"),
        ("train --keep 0.5", "No such option: --keep"),
        ("train --max-steps many", "valid integer"),
    ],
)
def test_a_command_that_cannot_be_typed_is_seen(words, sentence):
    with pytest.raises(Exception, match=sentence):
        check_command(words.split())


@pytest.mark.parametrize("page", PAGES)
def test_code_on_a_page_imports_what_exists(page):
    for block in python_blocks(PAGES[page]):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "microglia":
                missing = [n.name for n in node.names if not hasattr(import_module(node.module or ""), n.name)]
                assert missing == [], f"{page}: {node.module}"


LINKS = [(page, link) for page, text in PAGES.items() for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text)]


def anchors(text: str) -> set[str]:
    """What headings are called in links: small letters, words joined by hyphens, other signs left out."""
    headings = re.findall(r"^#+ +(.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize(("page", "link"), LINKS)
def test_a_link_leads_to_a_file_and_a_heading_that_exist(page, link):
    name, _, anchor = link.partition("#")
    target = (ROOT / page).parent / name if name else ROOT / page
    assert target.exists()
    assert not anchor or anchor in anchors(target.read_text("utf-8"))


def test_the_page_of_the_command_line_lists_the_verbs():
    shown = re.findall(r"^\| `(\w+)` \|", PAGES["docs/api/cli.md"], flags=re.MULTILINE)
    assert shown == [verb.__name__ for verb in VERBS]


def test_the_criterion_of_the_guide_scores_heads():
    defined, whole = python_blocks(PAGES["docs/add-a-criterion.md"])
    exec(compile(defined, "add-a-criterion.md", "exec"), {"__name__": "guide"})
    model, tokenizer = load_model("reasoner")
    task = get_task("arithmetic")
    criterion = CRITERIA.pop("first_heads")()  # tests of the registry may follow in this process
    policy = criterion.policy(Calibration(model, tokenizer, task, task.load("train", limit=2)))
    for logits in policy([torch.zeros(1, 2 * site.geometry.heads) for site in find_sites(model)]):
        assert (logits.flatten().diff() < 0).all()
    exec(compile(whole, "add-a-criterion.md", "exec"), {})


def test_the_task_of_the_guide_can_be_evaluated():
    names: dict = {"__name__": "guide"}
    for block in python_blocks(PAGES["docs/add-a-task.md"]):
        exec(compile(block.replace("max_new_tokens=48", "max_new_tokens=2"), "add-a-task.md", "exec"), names)
    (example,) = names["DoublingTask"]().load("test", limit=1)
    assert names["DoublingTask"]().correct(example, example.answer)


def test_every_public_name_is_in_the_reference():
    described = re.findall(r"^::: ([\w.]+)$", PAGES["docs/api/index.md"], flags=re.MULTILINE)
    names = {place.rpartition(".")[2] for place in described} | set(vars(import_module("microglia.errors")))
    assert set(microglia.__all__) - {"__version__"} <= names
