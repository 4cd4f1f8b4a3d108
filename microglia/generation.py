"""Generate answers for prompts on the dense, masked or compacted path."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from microglia.attach import Trace, attached, dense, gated
from microglia.compact import compacted
from microglia.errors import ConfigError, DataError, MicrogliaError
from microglia.gate import Gate
from microglia.look import Look
from microglia.policy import Policy
from microglia.replay import GraphDecoder, greedy
from microglia.signals import split_features
from microglia.sites import causal_lm, input_device
from microglia.tasks.prompts import check_characters, uses_chat_template

PATHS = {"masked": gated, "compact": compacted}
PLAIN = {"pad_token_id", "eos_token_id", "bos_token_id", "use_cache"}
SAMPLING = {"do_sample", "temperature", "top_k", "top_p", "max_length", "transformers_version", "_from_model_config"}


@dataclass(frozen=True)
class Generated:
    """New tokens (B, N), their texts, and of every site the keep (B, H) and the signals, by name (B, H).

    Without a policy there is neither keep nor signals.
    """

    tokens: Tensor
    texts: list[str]
    keep: list[Tensor]
    signals: list[dict[str, Tensor]] = field(default_factory=list)

    def lengths(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """New tokens per row, up to and with the end-of-text token, without the padding after it."""
        ended = (self.tokens == tokenizer.eos_token_id).long().cumsum(1)
        before = (ended == 0).sum(1)
        return (before + (ended > 0).any(1)).tolist()


@torch.inference_mode()
def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    policy: Policy | None = None,
    *,
    gate: Gate | None = None,
    look: Look | None = None,
    fill: str = "zero",
    scope: str = "answer",
    path: str = "compact",
    decoder: GraphDecoder | None = None,
    max_new_tokens: int = 256,
    **options: Any,
) -> Generated:
    """Read `prompts` as one batch with every head; write the answers with the heads that `policy` keeps for each.

    Without a policy the model stays dense. `path` is `compact` (heads are gone) or `masked` (heads are multiplied by
    zero; the same tokens, no time saved) or `graph` (heads are gone and decode steps are captured, for GPUs; keep a
    `decoder` between calls, else everything is captured anew). `options` go to the model's own `generate` (sampling,
    streamer, stopping, beams, custom_generate); greedy by default. Raises DataError for an empty or too long prompt,
    MicrogliaError while another thread uses the model in a way that would mix the answers.
    """
    if path not in (*PATHS, "graph"):
        raise ConfigError(f"path={path!r} is unknown; choose {', '.join(PATHS)} or graph")
    for name in ("assistant_model", "prompt_lookup_num_tokens", "prefill_chunk_size"):
        if policy is not None and _asked(options, name):
            raise ConfigError(
                f"{name} reads the prompt in parts or with guesses, so nothing could be decided on it; leave it out"
            )
    if policy is not None and _asked(options, "use_cache") is False:
        raise ConfigError(
            "use_cache=False reads the prompt again for every token, so nothing is ever pruned; leave it out"
        )
    lm: Any = causal_lm(model)
    batch = encode_prompts(lm, tokenizer, prompts, max_new_tokens)
    options = {"do_sample": False, "pad_token_id": tokenizer.pad_token_id, **options}
    if policy is not None:
        options["use_cache"] = True  # whatever the model's own configuration says: without one nothing is ever pruned
    attach = functools.partial(attached, lm, gate=gate, look=look, fill=fill, scope=scope)
    if path == "graph":
        output, trace = _on_graphs(decoder or GraphDecoder(lm), policy, attach, batch, max_new_tokens, options)
    else:
        with attach(policy, pruning=PATHS[path]) if policy is not None else dense(lm) as trace:
            output = lm.generate(**batch, max_new_tokens=max_new_tokens, **options)
    if trace is not None and trace.prompts != 1 and options.get("custom_generate") is not None:
        raise MicrogliaError(
            f"custom_generate read a whole text {trace.prompts} times, but a prompt is read once and continued by its "
            "cache, else nothing is pruned; call model(...), not model.forward(...), and hand past_key_values on"
        )
    tokens = getattr(output, "sequences", output)[:, batch["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    if policy is None or trace is None:
        return Generated(tokens, texts, [])
    return Generated(tokens, texts, trace.keep, [split_features(x, policy.features) for x in trace.features])


def _asked(options: dict[str, Any], name: str) -> Any:
    """What the caller said of an option: by itself, or in a generation_config of his own."""
    return options.get(name, getattr(options.get("generation_config"), name, None))


def _on_graphs(
    decoder: GraphDecoder,
    policy: Policy | None,
    attach: Any,
    batch: dict[str, Tensor],
    new_tokens: int,
    options: dict[str, Any],
) -> tuple[Any, Trace | None]:
    """What `generate` returns, by captured steps: plain greedy in a loop of replays, all else in the model's own."""
    lm, mask = decoder.parts.lm, batch["attention_mask"]
    if any((_asked(options, name) or 1) > 1 for name in ("num_beams", "num_return_sequences")):
        raise ConfigError("beams and several answers to a prompt move rows of the captured cache; use path='compact'")
    config, fill = lm.generation_config, attach.keywords["fill"] == "mean"
    stop = options.get("eos_token_id", config.eos_token_id)
    stop = [] if stop is None else [stop] if isinstance(stop, int) else list(stop)
    pad = options["pad_token_id"]
    with (  # in this order: whoever is refused must not have touched what another thread captured and uses
        attach(policy, pruning=decoder.pruning) if policy is not None else dense(lm) as trace,
        decoder.serving(mask, new_tokens, fill=fill, stop=stop, pad=0 if pad is None else pad) as room,
    ):
        if not _is_plain(config, options):
            return lm.generate(**batch, past_key_values=room.cache, max_new_tokens=new_tokens, **options), trace
        first = lm(**batch, position_ids=positions(mask), past_key_values=room.cache, use_cache=True, logits_to_keep=1)
        return torch.cat([batch["input_ids"], greedy(room, first.logits[:, -1], new_tokens)], 1), trace


def _is_plain(config: GenerationConfig, options: dict[str, Any]) -> bool:
    """Whether an answer is the likeliest token after token, and nothing else was asked for."""
    asked = {name: value for name, value in options.items() if value is not None}
    told = {name for name, value in config.to_diff_dict().items() if value is not None and value is not False}
    return asked.pop("do_sample") is False and asked.keys() <= PLAIN and told <= PLAIN | SAMPLING


def encode_prompts(
    lm: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_new_tokens: int
) -> dict[str, Tensor]:
    """Prompts → left-padded input_ids and attention_mask (B, T) on the model's device; nothing is cut off."""
    if not prompts:
        raise DataError("no prompt was given; give at least one")
    if empty := [index for index, prompt in enumerate(prompts) if not prompt.strip()]:
        raise DataError(f"prompt {empty[0]} of {len(prompts)} is empty; give every prompt some text")
    for prompt in prompts:
        check_characters(prompt)
    tokenizer.padding_side = "left"
    special = not uses_chat_template(tokenizer)  # a chat template writes its own
    batch = tokenizer(list(prompts), return_tensors="pt", padding=True, add_special_tokens=special)
    longest, room = batch["input_ids"].shape[1], getattr(lm.config, "max_position_embeddings", None)
    if room is not None and longest + max_new_tokens > room:
        raise DataError(
            f"the longest prompt has {longest} tokens and {max_new_tokens} new ones were asked for, but the model's "
            f"context is {room}; shorten the prompt or lower max_new_tokens"
        )
    device = input_device(lm)
    return {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}


@torch.inference_mode()
def prompt_logits(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    policy: Policy,
    *,
    look: Look | None = None,
    batch_size: int = 32,
) -> list[Tensor]:
    """What `policy` says of each of N prompts, nothing generated: logits (N, H) per site, on the CPU (for a dial)."""
    lm: Any = causal_lm(model)
    parts = []
    for start in range(0, len(prompts), batch_size):
        batch = encode_prompts(lm, tokenizer, prompts[start : start + batch_size], 0)
        with attached(lm, policy, look=look) as trace:
            lm(**batch, position_ids=positions(batch["attention_mask"]), use_cache=True, logits_to_keep=1)
        parts.append([x.float().cpu() for x in trace.logits])
    return [torch.cat(site) for site in zip(*parts, strict=True)]


def positions(mask: Tensor) -> Tensor:
    """Position ids (B, T) that count tokens and not padding, as a model's own `generate` makes them."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)
