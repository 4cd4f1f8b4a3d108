"""What the caller, the model and microglia want of a generation, merged in one place for every entry point.

Of the model's own generation_config only the tokens that begin, end and pad a text count, and how it samples where the
caller asks for sampling. Everything else in it is as if unset: an answer is greedy and nobody gave it a limit of time,
beams or a penalty without the caller's doing.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from microglia.anatomy import token_rows
from microglia.errors import ConfigError, first_line
from microglia.tasks.prompts import answer_end, uses_chat_template

MAX_NEW_TOKENS = 256
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
# What a loop of greedy steps follows without asking.
FOLLOWED = {*TOKENS, "use_cache", "do_sample", "max_new_tokens", "disable_compile", "transformers_version"}
MADE = ("input_ids", "inputs", "inputs_embeds", "attention_mask", "position_ids")
PARTS = "reads the prompt in parts or with guesses, so nothing could be decided on it"
# What cannot be combined with pruning, and why.
REFUSED = {
    "assistant_model": PARTS,
    "prompt_lookup_num_tokens": PARTS,
    "prefill_chunk_size": PARTS,
    "assistant_early_exit": PARTS,
    "use_mtp": PARTS,
    "token_healing": "cuts the end off the prompt and writes it anew, so the prompt read is not the one given",
    "guidance_scale": "reads a second prompt beside the first, about which nothing was decided",
    "compile_config": "compiles the dense model, whose layers then stay as they are",
}


@dataclass(frozen=True)
class Settings:
    """`config` is complete: nothing is taken from the model any more. others: streamer, criteria, processors, …"""

    config: GenerationConfig
    others: Mapping[str, Any]
    tokenizer: PreTrainedTokenizerBase

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the own `generate` of a model `without_defaults`."""
        texts = {} if self.config.stop_strings is None else {"tokenizer": self.tokenizer}
        return {"generation_config": self.config, **texts, **self.others}

    def check_no_cache(self, execution: str) -> None:
        """Raise ConfigError where a cache was asked for, for an execution that brings its own."""
        given = {"past_key_values": self.others.get("past_key_values")}
        given["cache_implementation"] = self.config.cache_implementation
        if names := [name for name, value in given.items() if value is not None]:
            raise ConfigError(f"{names[0]} was given, but execution={execution!r} has a cache of its own; leave it out")

    @property
    def new_tokens(self) -> int:
        """The longest answer."""
        return int(self.config.max_new_tokens)

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """The tokens that end an answer."""
        return _as_tuple(self.config.eos_token_id)

    @property
    def is_plain(self) -> bool:
        """Whether an answer is the likeliest token after token, and nothing else was asked for."""
        given = {name for name, value in self.config.to_diff_dict().items() if value is not None}
        return not self.config.do_sample and given <= FOLLOWED and not any(x is not None for x in self.others.values())

    def lengths(self, tokens: Tensor) -> list[int]:
        """New tokens per row of (B, N): up to and with the first that ends the answer, without the padding after it."""
        pad = self.config.pad_token_id if self._may_end_without_a_token else None
        return [_length(row, self.end_tokens, pad) for row in tokens.tolist()]

    @property
    def _may_end_without_a_token(self) -> bool:
        """By a stop text, a limit of time or a criterion."""
        return bool(self.config.stop_strings or self.config.max_time or self.others.get("stopping_criteria"))


def merged(lm: Any, tokenizer: PreTrainedTokenizerBase, given: Mapping[str, Any], *, pruned: bool) -> Settings:
    """The caller's options over a generation_config of the caller's over ours.

    given: as for the model's own `generate`. Raises ConfigError for what does not fit together, or with pruning.
    """
    options, defaults = dict(given), _defaults(lm)
    if made := [name for name in MADE if options.get(name) is not None]:
        raise ConfigError(f"{made[0]} is made from the prompts; leave it out, or call the model inside attached")
    config = copy.deepcopy(options.pop("generation_config", None)) or GenerationConfig()
    try:
        others = {name: value for name, value in config.update(**options).items() if value is not None}
    except (ValueError, TypeError) as error:
        raise ConfigError(f"the options of a generation do not fit together: {first_line(error)}") from error
    if config.max_length is not None and config.max_new_tokens is None:
        raise ConfigError(
            f"max_length={config.max_length} was given, which counts the prompt too; give max_new_tokens instead"
        )
    config.max_length = None
    if pruned:
        check_prunable({**vars(config), **others})
        config.use_cache = config.disable_compile = True
    if config.do_sample:
        _fill_in(config, defaults, SAMPLING)
    config.do_sample = bool(config.do_sample)
    config.max_new_tokens = config.max_new_tokens or MAX_NEW_TOKENS
    _fill_in(config, defaults, ("bos_token_id",))
    if config.eos_token_id is None and "eos_token_id" not in options:  # None there says that nothing ends it
        config.eos_token_id = [*end_tokens(lm, tokenizer)] or None
    if config.pad_token_id is None:
        config.pad_token_id = pad_token(lm, tokenizer)
    return Settings(config, others, tokenizer)


def check_prunable(options: Mapping[str, Any]) -> None:
    """Raise ConfigError for options of a generation, set by whomever, that pruning cannot be combined with."""
    for name, why in REFUSED.items():
        value = options.get(name)
        if value is not None and value is not False and (name, value) != ("guidance_scale", 1):
            raise ConfigError(f"{name} {why}; leave it out")
    if options.get("use_cache") is False:
        raise ConfigError(
            "use_cache=False reads the prompt again for every token, so nothing is ever pruned; leave it out"
        )


def end_tokens(lm: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that end an answer: those of the model's generation_config, of which there may be several, else the
    tokenizer's; and what its chat template puts behind a turn.
    """
    ends = _as_tuple(_defaults(lm).eos_token_id) or _as_tuple(tokenizer.eos_token_id)
    turn = (answer_end(tokenizer),) if uses_chat_template(tokenizer) and ends else ()
    return tuple(dict.fromkeys((*ends, *turn)))


def pad_token(lm: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    """A token to pad with that the model has: the tokenizer's, else one that ends a text, else the first.

    It is never attended to, so which one it is changes nothing.
    """
    rows, pad = token_rows(lm), tokenizer.pad_token_id
    if isinstance(pad, int) and 0 <= pad < rows:
        return pad
    return next(token for token in (*end_tokens(lm, tokenizer), 0) if 0 <= token < rows)


def without_defaults(lm: Any) -> Any:
    """The same model, modules, weights and hooks, but with an empty generation_config; other users see no difference.

    transformers fills whatever a caller leaves open from the model's, and nobody can say "unset".
    """
    model = copy.copy(lm)
    model.generation_config = GenerationConfig()
    vars(model).pop("generate", None)  # that of an attached model, which is bound to it
    return model


def _defaults(lm: Any) -> GenerationConfig:
    """The model's own generation_config."""
    return lm.generation_config or GenerationConfig()


def _fill_in(config: GenerationConfig, source: GenerationConfig, names: tuple[str, ...]) -> None:
    for name in names:
        if getattr(config, name, None) is None and getattr(source, name, None) is not None:
            setattr(config, name, getattr(source, name))


def _as_tuple(tokens: Any) -> tuple[int, ...]:
    if tokens is None:
        return ()
    return (int(tokens),) if isinstance(tokens, int) else tuple(int(token) for token in tokens)


def _length(row: list[int], ends: tuple[int, ...], pad: int | None) -> int:
    end = next((place + 1 for place, token in enumerate(row) if token in ends), None)
    if end is not None:
        return end
    while row and row[-1] == pad:  # ended by a stop text, a time limit or a criterion
        row = row[:-1]
    return len(row)
