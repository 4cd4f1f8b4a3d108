"""How a question becomes a prompt, so that training targets and generation see the same text.

    text = render_prompt(tokenizer, question, template) + generated_answer_prefix(tokenizer) + answer + eos

A chat template writes its own special tokens, a begin-of-text token often among them, so a prompt is tokenised with
`add_special_tokens=not uses_chat_template(tokenizer)`. Prompt and the rest are tokenised apart: generation starts from
the prompt's own tokens, whatever a tokeniser would merge across the boundary.
"""

from transformers import PreTrainedTokenizerBase

from microglia.errors import ConfigError, DataError


def uses_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether prompts for this tokenizer are chat messages (an instruction-tuned model) rather than plain text."""
    return bool(getattr(tokenizer, "chat_template", None))


def check_characters(prompt: str) -> None:
    """Raise DataError for half of a surrogate pair: Python and JSON let it into a text, tokenizers do not read it."""
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise DataError("a prompt holds half of a surrogate pair, which is no character; give it valid Unicode")


def render_prompt(tokenizer: PreTrainedTokenizerBase, question: str, template: str) -> str:
    """The prompt of one question: its chat message up to where the assistant speaks, or else `template` filled in.

    template: plain text with `{question}`, used only for a tokenizer without a chat template.
    Raises ConfigError for a template without `{question}` or with other fields.
    """
    if uses_chat_template(tokenizer):
        message = [{"role": "user", "content": question}]
        return str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
    try:
        prompt = template.format(question=question)
        has_question = template.format(question="\0") != template.format(question="\1")
    except (KeyError, IndexError, ValueError) as error:
        raise ConfigError(
            f"the template {template!r} cannot be filled in ({type(error).__name__}: {error}); use {{question}} as its "
            "only field and double every other brace"
        ) from error
    if not has_question:
        raise ConfigError(f"the template {template!r} has no place for the question; put {{question}} into it")
    return prompt


def generated_answer_prefix(tokenizer: PreTrainedTokenizerBase) -> str:
    """What stands between prompt and answer and is generated with the answer: a space after `Answer:`, else nothing."""
    return "" if uses_chat_template(tokenizer) else " "
