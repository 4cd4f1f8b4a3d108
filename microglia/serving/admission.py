"""A request becomes jobs, or is refused before it costs the model anything."""

import copy
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from jinja2 import TemplateError

from microglia.errors import DataError
from microglia.serving.config import ServingConfig
from microglia.serving.job import Event, Job, Sampling
from microglia.serving.model import PrunedModel
from microglia.serving.refusal import Refusal
from microglia.serving.schema import ChatRequest, CompletionRequest, Message
from microglia.tasks.prompts import ChatPrompt, check_characters, prompt_ids, render_prompt, uses_chat_template

TOO_LONG = "context_length_exceeded"
CHARACTERS = 8  # of a token, at most, in nearly any text


class Admission:
    """Renders, counts and limits. Has its own copy of the tokenizer, which no two threads may use at once."""

    def __init__(self, model: PrunedModel, config: ServingConfig) -> None:
        self.model, self.config = model, config
        self.tokenizer: Any = copy.deepcopy(model.tokenizer)

    def jobs(
        self, request: ChatRequest | CompletionRequest, receiver: Callable[[int], Callable[[Event], None]]
    ) -> list[Job]:
        """The jobs of a request, one a prompt; `receiver(index)` takes their events. Raises Refusal, MicrogliaError."""
        if request.model != self.config.name:
            raise unknown_model(request.model)
        if isinstance(request, ChatRequest):
            prompts, longest, field = [self.chat(request.messages)], request.longest, "messages"
        else:
            prompts, longest, field = request.prompts, request.max_tokens, "prompt"
            if "max_tokens" not in request.model_fields_set:
                longest = min(longest, self.config.max_new_tokens)
        if len(prompts) > (most := self.config.max_waiting):
            sentence = f"{len(prompts)} prompts were given and this server's queue holds {most}; send fewer at once"
            raise Refusal(400, sentence, param=field)
        pruning = self.model.pruning(request.pruning, request.keep_ratio)
        jobs = []
        for index, prompt in enumerate(prompts):
            tokens = self.count(prompt, field)
            new_tokens = self.new_tokens(tokens, longest, field)
            sampling = Sampling(new_tokens, request.temperature, request.top_p, request.seed, request.stops)
            jobs.append(Job(prompt, tokens, pruning, sampling, receiver(index)))
        return jobs

    def chat(self, messages: Sequence[Message]) -> str:
        """The prompt of a conversation: by the chat template, or for a model without one its one question."""
        if not messages[-1].text.strip():
            raise Refusal(400, "the last message is empty; give it some text", param="messages")
        if uses_chat_template(self.tokenizer):
            turns = [{"role": "system" if m.role == "developer" else m.role, "content": m.text} for m in messages]
            try:
                return ChatPrompt(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
            except TemplateError as error:
                sentence = f"the model's chat template refuses these messages ({error}); send others"
                raise Refusal(400, sentence, param="messages") from error
        if len(messages) != 1 or messages[0].role != "user":
            sentence = (
                "this model has no chat template, so it knows no roles and no history; send one user message, or a "
                "complete prompt to /v1/completions"
            )
            raise Refusal(400, sentence, param="messages")
        return render_prompt(self.tokenizer, messages[0].text, self.model.template)

    def count(self, prompt: str, field: str) -> int:
        """Tokens of a prompt as the model will read it; Refusal when there are none or too many."""
        if not prompt.strip():
            raise DataError("the prompt is empty; give it some text")
        check_characters(prompt)
        self.check_length(prompt, field)
        tokens = len(prompt_ids(self.tokenizer, [prompt])[0])
        if not tokens:
            raise DataError("the prompt holds no character that the model's tokenizer knows; give it some text")
        most = self.config.max_prompt_tokens
        if most is not None and tokens > most:
            sentence = f"the prompt has {tokens} tokens and this server reads {most}; shorten it"
            raise Refusal(400, sentence, param=field, code=TOO_LONG)
        return tokens

    def check_length(self, prompt: str, field: str) -> None:
        """Refuse a prompt that is far too long by its beginning, so that it costs no more than one that fits."""
        limits = (self.config.max_prompt_tokens, self.model.context_length)
        most = min((limit for limit in limits if limit is not None), default=None)
        if most is None:
            return
        size = CHARACTERS * most
        while size < len(prompt):
            beginning = type(prompt)(prompt[:size])
            # A cut through a token may make as many of it as it has characters.
            if len(prompt_ids(self.tokenizer, [beginning])[0]) > most + self.longest_token:
                sentence = f"the prompt has more than {most} tokens, which is all that this server reads; shorten it"
                raise Refusal(400, sentence, param=field, code=TOO_LONG)
            size *= 2

    @cached_property
    def longest_token(self) -> int:
        """Characters of the longest token."""
        return max(map(len, self.tokenizer.get_vocab()))

    def new_tokens(self, prompt_tokens: int, max_tokens: int | None, field: str) -> int:
        """The longest answer: `max_tokens`, or else all that server and context allow."""
        most, context, wanted = self.config.max_new_tokens, self.model.context_length, max_tokens or 1
        if context is not None and context - prompt_tokens < wanted:
            sentence = (
                f"the prompt has {prompt_tokens} tokens and {wanted} more were asked for, but the model's context is "
                f"{context}; shorten the prompt or lower max_tokens"
            )
            raise Refusal(400, sentence, param=field, code=TOO_LONG)
        if wanted > most:
            sentence = f"max_tokens={max_tokens} was given and this server writes at most {most}; lower it"
            raise Refusal(400, sentence, param="max_tokens")
        return max_tokens or (most if context is None else min(most, context - prompt_tokens))


def unknown_model(name: str) -> Refusal:
    """What OpenAI says of a model it does not have."""
    sentence = f"The model `{name}` does not exist or you do not have access to it; /v1/models lists what there is."
    return Refusal(404, sentence, param="model", code="model_not_found")
