"""Reversible pruning of a model: read the prompt with every unit, decide, write the answer with the kept ones."""

import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from microglia.anatomy import causal_lm, never_reread, swap
from microglia.errors import ConfigError, MicrogliaError
from microglia.execution import Decision, Execution, execution_for
from microglia.gate import keep_ratio
from microglia.lease import attached_alone
from microglia.pruner import Pruner
from microglia.settings import check_prunable
from microglia.signals import Measured, Prompt, measured
from microglia.units import Site, gone


@dataclass
class Trace:
    """What was measured in the last prompt and what was decided: features (B, F), logits and keep (B, U), per site.

    signals: of every site what its features are made of, by name, (B, U).
    fill: of every site what its pruned units leave behind, None where that is nothing.
    prompts: how many were read so far, a batch counting as one. gaps: passes that did not begin where the one before
    had ended, as no answer to one prompt has them.
    """

    features: list[Tensor] = field(default_factory=list)
    signals: list[dict[str, Tensor]] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    keep: list[Tensor] = field(default_factory=list)
    fill: list[Tensor | None] | None = None
    prompts: int = 0
    gaps: int = 0

    @property
    def keep_ratio(self) -> Tensor:
        """Share of kept units per prompt, (B,)."""
        if not self.keep:
            raise MicrogliaError("no prompt was read yet, so no head was decided on; run the model on a prompt first")
        return keep_ratio(self.keep)


@contextmanager
def attached(
    model: nn.Module, pruner: Pruner, execution: str | Execution = "masked", *, tokens: Tensor | None = None
) -> Iterator[Trace]:
    """While inside, the model prunes itself for every prompt it reads. Leaving restores it bit for bit.

    A forward pass that starts with an empty cache reads a prompt: dense and measured. Then the policy decides, and the
    passes that continue the cache are made with the kept units.

    execution: how decisions are carried out, see `microglia.execution`; `dense` measures and decides only.
    tokens: (B, T), true at prompt tokens, for a pass that holds more than the prompt; else the attention mask says it.
    Yields the Trace of the last prompt. Raises MicrogliaError when the model is already attached, here or in another
    thread, and when threads read and write on one attached model at the same time.
    """
    lm = causal_lm(model)
    with attached_alone(lm), pruning_itself(lm, pruner, execution_for(execution, lm), tokens) as trace:
        yield trace


@contextmanager
def pruning_itself(
    lm: nn.Module, pruner: Pruner, execution: Execution, tokens: Tensor | None = None
) -> Iterator[Trace]:
    """As `attached`, for who has the model to themselves."""
    session = _Session(lm, pruner, execution, tokens)
    execution.check_sites(session.sites)
    if pruner.recovery is not None and not execution.recovers:
        raise ConfigError(
            f"execution={execution.name!r} writes with the model's own weights, but this pruner brings a recovery; use "
            "execution='compact'"
        )
    with ExitStack() as stack:
        stack.callback(session.end_prompt)
        for module in lm.modules():
            if module._compiled_call_impl is not None:  # its code knows nothing of what will be hooked and swapped
                swap(stack, module, "_compiled_call_impl", None)
        if hasattr(lm, "get_compiled_call"):  # which `generate` makes for static caches on a GPU
            swap(stack, lm, "get_compiled_call", lambda *_: lm.__call__)
        if execution.prunes:
            swap(stack, lm, "generate", _checked(lm))
        stack.callback(lm.register_forward_pre_hook(session.before, with_kwargs=True).remove)
        stack.callback(lm.register_forward_hook(session.after, with_kwargs=True, always_call=True).remove)
        yield session.trace


def _checked(lm: Any) -> Callable[..., Any]:
    """The model's own `generate`, which refuses what cannot be pruned, whoever asked for it."""
    stock = lm.generate

    @functools.wraps(stock)
    def generate(*args: Any, **options: Any) -> Any:
        given = inspect.signature(stock).bind_partial(*args, **options).arguments
        given |= given.pop("kwargs", {})
        ids = next((given[name] for name in ("inputs", "input_ids") if given.get(name) is not None), None)
        configs = [vars(config) for config in (lm.generation_config, given.get("generation_config")) if config]
        merged = {name: x for part in (*configs, given) for name, x in part.items() if x is not None}
        check_prunable(merged)
        with ExitStack() as stack:
            if ids is not None:
                longest = merged.get("max_length", ids.shape[1] + 20)  # as transformers has it
                never_reread(stack, lm, ids.shape[1], merged.get("max_new_tokens", longest - ids.shape[1]))
            return stock(*args, **options)

    return generate


class _PromptCache:
    """The cache of the prompt that was read last, known again also as a copy."""

    def __init__(self, cache: Any) -> None:
        self.cache = weakref.ref(cache)
        self.length = cache.get_seq_length()
        self.last_key = self._key(cache)

    def _key(self, cache: Any) -> Tensor | None:
        """The deepest layer's key of the prompt's last token, (B, G, D): it depends on the whole prompt.

        None where a sliding window has passed it, or the layer keeps no keys.
        """
        keys = getattr(cache.layers[-1], "keys", None)
        if keys is None or not keys.numel():
            return None
        behind = max(0, cache.get_seq_length() - keys.shape[2])  # what a window has dropped; 0 in a static layer
        place = self.length - 1 - behind
        return keys[:, :, place].clone() if 0 <= place < keys.shape[2] else None

    def holds(self, cache: Any) -> bool:
        """Whether a cache that holds tokens is this prompt's, or a copy of it."""
        if cache is self.cache():
            return True
        other = self._key(cache)
        if other is None or self.last_key is None:
            return True
        return other.shape == self.last_key.shape and other.equal(self.last_key)


class _Session:
    """The two states of an attached model: reading a prompt (measured), continuing it (pruned)."""

    def __init__(self, lm: nn.Module, pruner: Pruner, execution: Execution, tokens: Tensor | None) -> None:
        self.lm, self.sites = lm, pruner.sites(lm)
        self.geometries = [site.geometry for site in self.sites]
        self.pruner, self.execution, self.tokens = pruner, execution, tokens
        self.trace = Trace()
        self.reading, self.pruned = ExitStack(), ExitStack()
        self.measured: Measured | None = None
        self.passing: int | None = None  # the thread in a forward pass
        self.guard = threading.Lock()
        self.prompt_cache: _PromptCache | None = None
        self.length = 0  # tokens in the cache after the last pass
        self.watched: list[Site] = []  # the pruned ones, where passes call layers
        self.called: set[int] = set()  # those whose output the present pass has computed

    def end_prompt(self) -> None:
        """Back to the dense model."""
        self.measured = self.prompt_cache = None
        self.reading.close()
        self.pruned.close()

    def before(self, lm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pass begins: of a new prompt, or one that continues the last."""
        with self.guard:
            if self.passing not in (None, threading.get_ident()):
                raise MicrogliaError(
                    f"two threads run this attached {type(lm).__name__} at the same time; let one answer end before "
                    "the next prompt, or use a second copy of the model"
                )
            self.passing = threading.get_ident()
        cache = kwargs.get("past_key_values")
        self.called.clear()
        if cache is not None and (length := cache.get_seq_length()) > 0:
            self._check_continues(cache)
            self.trace.gaps += int(length) != self.length
            return
        self.end_prompt()
        self.trace.prompts += 1
        tokens = _tokens(args, kwargs) if self.tokens is None else self.tokens
        if int(tokens.sum(1).min()) < 1:
            raise MicrogliaError("a prompt without any token was given; give every prompt at least one token")
        self.trace.features, self.trace.signals, self.trace.logits, self.trace.keep = [], [], [], []
        prompt = Prompt(tokens, self.pruner.window)
        self.measured = self.reading.enter_context(measured(self.sites, self.pruner.signals, prompt))

    def _check_continues(self, cache: Any) -> None:
        if not self.trace.keep:
            raise MicrogliaError("the cache holds tokens that were read before attaching; start from the whole prompt")
        if self.prompt_cache is not None and not self.prompt_cache.holds(cache):
            raise MicrogliaError(
                "the cache is that of another prompt than the last one, whose heads the model has now; let one "
                "answer end before the next prompt is read, or use a second copy of the model"
            )

    def after(self, lm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """A forward pass has ended, with or without an error; when it read a prompt, decide and prune."""
        if self.passing != threading.get_ident():
            return  # a pass that was refused, while another thread is in its own
        self.passing = None
        cache = _cache_of(output)
        self.length = 0 if cache is None else int(cache.get_seq_length())
        if self.measured is None:
            if output is not None:
                self._check_called()
            return
        values, self.measured = self.measured, None
        self.reading.close()
        if output is None:
            return  # the pass failed; its own error is on the way
        self._check_measured(values, cache)
        self._decide(values)
        self.trace.fill = values.means(self.sites)
        if self.pruner.recovery is not None and self.execution.prunes:
            self.pruned.enter_context(self.pruner.recovery.applied(self.lm, merged=self.execution.saves))
        decision = Decision(self.trace.keep, self.trace.fill)
        self.pruned.enter_context(self.execution.apply(self.sites, decision, cache))
        self.prompt_cache = None if cache is None else _PromptCache(cache)
        self.watched = []
        if self.execution.calls_layers and self.execution.prunes:
            pairs = zip(self.sites, self.trace.keep, strict=True)
            self.watched = [site for site, k in pairs if not bool((k > 0).all()) and not gone(site, k)]
        for site in self.watched:
            note = functools.partial(self._note_call, site.index)
            self.pruned.callback(site.output.register_forward_pre_hook(note).remove)

    def _note_call(self, index: int, *_: Any) -> None:
        self.called.add(index)

    def _check_measured(self, values: Measured, cache: Any) -> None:
        if not values.complete:
            raise self._bypassed(self.sites[0])
        if cache is None and self.execution.prunes:
            raise MicrogliaError(
                "the pass that read the prompt kept no key/value cache, so nothing could continue it pruned; read it "
                "with use_cache=True"
            )

    def _check_called(self) -> None:
        """Every pruned layer must take part in a pass; compiled or replaced code would leave it as it was."""
        for site in self.watched:
            if site.index not in self.called:
                raise self._bypassed(site)

    def _bypassed(self, site: Site) -> MicrogliaError:
        return MicrogliaError(
            f"a pass of this {type(self.lm).__name__} did not go through {site.name} as it is now, so nothing would be "
            "pruned: its forward is compiled or replaced; give the model without that"
        )

    def _decide(self, values: Measured) -> None:
        """Decisions are made in the policy's own precision, in mixed-precision training as in inference."""
        policy, gate = self.pruner.policy, self.pruner.gate
        self.trace.signals = [values.at(site, policy.signals) for site in self.sites]
        self.trace.features = values.every_features(self.sites, policy.signals)
        device = self.trace.features[0].device.type
        with torch.set_grad_enabled(gate.trains), torch.autocast(device, enabled=False):
            self.trace.logits = policy(self.trace.features)
            self.trace.keep = self.pruner.keep(self.trace.logits, self.geometries)


def _cache_of(output: Any) -> Any:
    """The cache of a pass, whether it gave an object or a tuple."""
    if isinstance(output, tuple):
        return next((part for part in output if isinstance(part, Cache)), None)
    return getattr(output, "past_key_values", None)


def _tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Which positions (B, T) of a forward pass are tokens, from its own arguments."""
    ids = kwargs.get("input_ids", args[0] if args else None)
    inputs: Tensor = ids if ids is not None else kwargs["inputs_embeds"]
    mask = kwargs.get("attention_mask")
    if isinstance(mask, dict):  # one ready-made mask per kind of layer, all with the same diagonal
        mask = next((one for one in mask.values() if one is not None), None)
    if mask is None:
        return torch.ones(inputs.shape[:2], dtype=torch.bool, device=inputs.device)
    if mask.dim() == 4:  # ready-made for a static cache: a token sees itself, in sliding layers too; padding does not
        diagonal: Tensor = mask[:, 0].diagonal(dim1=-2, dim2=-1)
        return diagonal if diagonal.dtype == torch.bool else diagonal == 0
    tokens: Tensor = mask[:, -inputs.shape[1] :].bool()
    return tokens
