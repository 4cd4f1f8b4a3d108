"""How a question becomes a prompt, so that training targets and generation see the same text.

    text = render_prompt(tokenizer, question, template) + generated_answer_prefix(tokenizer) + answer + eos

A chat template writes its own special tokens, a begin-of-text token often among them, so what it made is a ChatPrompt,
to which tokenizers add none. Prompt and the rest are tokenised apart: generation starts from the prompt's own tokens,
whatever a tokeniser would merge across the boundary.
"""

from collections.abc import Sequence
from contextlib import suppress
from string import Formatter

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from microglia.errors import ConfigError, DataError
from microglia.tasks.base import Example

MOST_FIELDS = 8  # of a template: some let a question be read twice, but none needs a thousand copies


class ChatPrompt(str):
    """A text that a chat template wrote, with all of its special tokens."""

    __slots__ = ()


def uses_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether prompts for this tokenizer are chat messages (an instruction-tuned model) rather than plain text."""
    return bool(getattr(tokenizer, "chat_template", None))


def check_characters(prompt: str) -> None:
    """Raise DataError for half of a surrogate pair: Python and JSON let it into a text, tokenizers do not read it."""
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise DataError("a prompt holds half of a surrogate pair, which is no character; give it valid Unicode")


def render_prompt(
    tokenizer: PreTrainedTokenizerBase, question: str, template: str, shots: Sequence[tuple[str, str]] = ()
) -> str:
    """The prompt of one question: its chat message up to where the assistant speaks, or else `template` filled in.

    template: plain text with `{question}`, used only for a tokenizer without a chat template. shots: questions and
    answers that come first, as earlier turns of the chat or as filled templates with a blank line after each.
    Raises ConfigError for a template without `{question}` or with other fields.
    """
    if uses_chat_template(tokenizer):
        turns = [turn for shot in shots for turn in zip(("user", "assistant"), shot, strict=True)]
        messages = [{"role": role, "content": text} for role, text in [*turns, ("user", question)]]
        return ChatPrompt(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    solved = [f"{_fill(template, shot)} {answer}\n\n" for shot, answer in shots]
    return "".join([*solved, _fill(template, question)])


def example_prompt(tokenizer: PreTrainedTokenizerBase, example: Example, template: str) -> str:
    """The prompt of an example with its shots and, for a chat model, what it is told to do."""
    if example.whole:
        return example.question
    told = example.instruction and uses_chat_template(tokenizer)
    question = f"{example.question}\n{example.instruction}" if told else example.question
    return render_prompt(tokenizer, question, template, [(s.question, s.answer) for s in example.shots])


def choice_prompt(tokenizer: PreTrainedTokenizerBase, example: Example, template: str) -> str:
    """The prompt after which each choice's text is scored: the question alone, no list of choices.

    Raises ConfigError for an example that has no choices.
    """
    if example.choices is None:
        raise ConfigError(
            f"example {example.id} has no choices to score; choose a task with choices, or scoring='generation'"
        )
    shots = [(c.question, c.texts[c.gold]) for c in (shot.choices for shot in example.shots) if c is not None]
    return render_prompt(tokenizer, example.choices.question, template, shots)


def check_template(template: str) -> None:
    """Raise ConfigError unless the template's only field is a plain `{question}`: others could run or fill anything."""
    try:
        fields = [field for _, *field in Formatter().parse(template) if field[0] is not None]
        if other := next((field for field in fields if field != ["question", "", None]), None):
            raise ValueError(f"it has the field {''.join(part or '' for part in other)!r}")
    except ValueError as error:
        raise ConfigError(
            f"the template {template!r} cannot be filled in ({error}); use {{question}} as its only field and double "
            "every other brace"
        ) from error
    if not fields:
        raise ConfigError(f"the template {template!r} has no place for the question; put {{question}} into it")
    if len(fields) > MOST_FIELDS:
        raise ConfigError(
            f"the template holds the question {len(fields)} times; put {{question}} into it at most {MOST_FIELDS} times"
        )


def _fill(template: str, question: str) -> str:
    check_template(template)
    return template.format(question=question)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
    """The tokens of complete prompts, with those that begin a text and without those that would end it."""
    return [_ids(tokenizer, prompt) for prompt in prompts]


def _ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    begins = bool(tokenizer.bos_token) and prompt.startswith(str(tokenizer.bos_token))
    special = not (isinstance(prompt, ChatPrompt) or begins)
    ids = list(tokenizer(str(prompt), add_special_tokens=special)["input_ids"])
    end = str(tokenizer.eos_token)
    while special and ids and ids[-1] == tokenizer.eos_token_id and not prompt.endswith(end):
        ids.pop()  # of a tokenizer with add_eos_token
    return ids


def continuation_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text that stands behind another.

    SentencePiece puts a space in front of whatever it is given, so that a text with one would begin with two: it is
    tokenised behind a letter, whose tokens are then cut off.
    """
    alone, behind, letter = (
        list(tokenizer(part, add_special_tokens=False)["input_ids"]) for part in (text, "a" + text, "a")
    )
    return behind[len(letter) :] if text[:1] == " " and behind[: len(letter)] == letter else alone


def answer_end(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token after which an answer is over: what the chat template puts behind a turn, else the end of text.

    Raises ConfigError where there is neither.
    """
    if uses_chat_template(tokenizer):
        turns = [{"role": "user", "content": "What is 3 + 4?"}, {"role": "assistant", "content": "Seven."}]
        conversation = ""
        with suppress(TemplateError):  # of a template that takes no answers
            conversation = str(tokenizer.apply_chat_template(turns, tokenize=False))
        _, answer, rest = conversation.rpartition("Seven.")
        ids = tokenizer(rest.lstrip(), add_special_tokens=False)["input_ids"] if answer else []
        # The dictionary of added tokens is made anew at every look, and may hold thousands: only where it is needed.
        if ids and (ids[0] in tokenizer.all_special_ids or _is_special(tokenizer, ids[0])):
            return int(ids[0])
    if tokenizer.eos_token_id is None:
        raise ConfigError("the tokenizer has no end-of-text token, so an answer could not be ended; give one that has")
    return int(tokenizer.eos_token_id)


def worked_answers(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> list[list[int]]:
    """The tokens of the examples' worked answers as a model writes them, each with the one that ends it."""
    prefix, end = generated_answer_prefix(tokenizer), answer_end(tokenizer)
    return [[*continuation_ids(tokenizer, prefix + example.answer), end] for example in examples]


def _is_special(tokenizer: PreTrainedTokenizerBase, token: int) -> bool:
    added = tokenizer.added_tokens_decoder.get(token)
    return added is not None and bool(added.special)


def generated_answer_prefix(tokenizer: PreTrainedTokenizerBase) -> str:
    """What stands between prompt and answer and is generated with the answer: a space after `Answer:`, else nothing."""
    return "" if uses_chat_template(tokenizer) else " "
