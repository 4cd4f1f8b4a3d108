"""Reversible gating of a model: read the prompt with every head, decide, write the answer with the kept ones."""

import itertools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from microglia.errors import ConfigError, MicrogliaError
from microglia.gate import Gate, keep_ratio
from microglia.look import Look, Seen, watched
from microglia.policy import Policy
from microglia.signals import stack_features
from microglia.signals.features import selected
from microglia.sites import Site, causal_lm, find_sites

SCOPES = ("answer", "all")


class Pruning(Protocol):
    """How a decision is carried out: `gated` multiplies masks, `compact.compacted` takes the heads away."""

    def __call__(
        self, sites: Sequence[Site], keep: Sequence[Tensor], *, fill: Sequence[Tensor] | None, cache: Any
    ) -> AbstractContextManager[None]: ...


@dataclass
class Trace:
    """What was seen in the last prompt and what was decided: features (B, F), logits and keep (B, H), per site.

    prompts: how many were read so far, a batch counting as one.
    """

    features: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    keep: list[Tensor] = field(default_factory=list)
    prompts: int = 0

    @property
    def keep_ratio(self) -> Tensor:
        """Share of kept heads per prompt, (B,)."""
        if not self.keep:
            raise MicrogliaError("no prompt was read yet, so no head was decided on; run the model on a prompt first")
        return keep_ratio(self.keep)


@contextmanager
def gated(
    sites: Sequence[Site],
    keep: Sequence[Tensor],
    *,
    where: Tensor | None = None,
    fill: Sequence[Tensor] | None = None,
    cache: Any = None,
) -> Iterator[None]:
    """Multiply every head's output by its keep, at the input of the output projection.

    `keep` (B, H) or (1, H) per site. `where` (B, T) limits the gates to these positions. `fill` (B, H, D) per site
    stands in for what a pruned head would have written; zero when None. `cache` is not needed and not touched.
    """
    with ExitStack() as stack:
        for site, k in zip(sites, keep, strict=True):
            hook = _gate_hook(site, k, where, fill[site.index] if fill is not None else None)
            stack.callback(site.output.register_forward_pre_hook(hook).remove)
        yield


def _gate_hook(site: Site, keep: Tensor, where: Tensor | None, fill: Tensor | None) -> Callable[..., Any]:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        heads = site.geometry.split(inputs[0])  # (B, T, H, D)
        if len(keep) not in (1, len(heads)):
            raise MicrogliaError(
                f"{site.name} got a batch of {len(heads)} rows but decisions for {len(keep)}; continue the batch "
                "that was read, or read the new prompts first"
            )
        gate = keep[:, None, :, None].to(heads)
        if where is not None:
            gate = torch.where(where[:, :, None, None], gate, torch.ones_like(gate))
        heads = heads * gate if fill is None else heads * gate + (1 - gate) * fill[:, None].to(heads)
        return (heads.flatten(-2), *inputs[1:])

    return hook


@contextmanager
def attached(
    model: nn.Module,
    policy: Policy,
    *,
    gate: Gate | None = None,
    look: Look | None = None,
    scope: str = "answer",
    fill: str = "zero",
    pruning: Pruning = gated,
    tokens: Tensor | None = None,
) -> Iterator[Trace]:
    """While inside, the model prunes itself for every prompt it reads. Leaving restores it bit for bit.

    A forward pass that starts with an empty cache reads a prompt: dense and watched. Then the policy decides, and the
    passes that continue the cache are made with the kept heads (`scope="answer"`). With `scope="all"` every site also
    gates the prompt itself, from its own signals, as the original project does; that saves no prefill work.

    fill: what a pruned head leaves behind, `zero` or `mean` (its mean output over this prompt).
    tokens: (B, T), true at prompt tokens, for a pass that holds more than the prompt; else the attention mask says it.
    Yields the Trace of the last prompt. Raises MicrogliaError when the model is already attached, here or in another
    thread, and when threads read and write on one attached model at the same time.
    """
    if scope not in SCOPES:
        raise ConfigError(f"scope={scope!r} is unknown; choose answer or all")
    policy.check_scope(scope)
    if fill not in ("zero", "mean"):
        raise ConfigError(f"fill={fill!r} is unknown; choose zero or mean")
    look = look or Look()
    if scope == "all" and look.norm == "hidden":
        raise ConfigError("scope='all' gates a site before its hidden norms exist; use norm='head' or scope='answer'")
    lm = causal_lm(model)
    sites = find_sites(lm)
    reader = _Reader(sites, policy, gate or Gate(), look, scope, fill, pruning, tokens)
    with _held(lm, alone=True), ExitStack() as stack:
        stack.callback(reader.forget)
        stack.callback(lm.register_forward_pre_hook(reader.before, with_kwargs=True).remove)
        stack.callback(lm.register_forward_hook(reader.after, with_kwargs=True, always_call=True).remove)
        yield reader.trace


class _Reader:
    """The two states of an attached model: reading a prompt (watched), continuing it (pruned)."""

    def __init__(
        self,
        sites: Sequence[Site],
        policy: Policy,
        gate: Gate,
        look: Look,
        scope: str,
        fill: str,
        pruning: Pruning,
        tokens: Tensor | None,
    ) -> None:
        self.sites, self.policy, self.gate, self.look = sites, policy, gate, look
        self.scope, self.fill, self.pruning, self.tokens = scope, fill, pruning, tokens
        self.trace = Trace()
        self.watching, self.pruned = ExitStack(), ExitStack()
        self.seen: list[Seen] | None = None
        self.passing: int | None = None  # the thread in a forward pass
        self.guard = threading.Lock()
        self.prompt = 0

    def forget(self) -> None:
        """Back to the dense model."""
        self.seen = None
        self.watching.close()
        self.pruned.close()

    def before(self, lm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with self.guard:
            if self.passing not in (None, threading.get_ident()):
                raise MicrogliaError(
                    f"two threads run this attached {type(lm).__name__} at the same time; let one answer end before "
                    "the next prompt, or use a second copy of the model"
                )
            self.passing = threading.get_ident()
        cache = kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length() > 0:
            if not self.trace.keep:
                raise MicrogliaError(
                    "the cache holds tokens that were read before attaching; start from the whole prompt"
                )
            if getattr(cache, _PROMPT, self.prompt) != self.prompt:
                raise MicrogliaError(
                    "the cache is that of another prompt than the last one, whose heads the model has now; let one "
                    "answer end before the next prompt is read, or use a second copy of the model"
                )
            return
        self.forget()
        self.prompt, self.trace.prompts = next(_PROMPTS), self.trace.prompts + 1
        tokens = _tokens(args, kwargs) if self.tokens is None else self.tokens
        if int(tokens.sum(1).min()) < 1:
            raise MicrogliaError("a prompt without any token was given; give every prompt at least one token")
        self.trace.features, self.trace.logits, self.trace.keep = [], [], []
        decide = self._decide_site if self.scope == "all" else None
        entropy = "entropy" in selected(self.policy.features)
        mean_outputs = self.fill == "mean"
        watch = watched(self.sites, tokens, self.look, entropy=entropy, mean_outputs=mean_outputs, on_site=decide)
        self.seen = self.watching.enter_context(watch)

    def after(self, lm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self.passing != threading.get_ident():
            return  # a pass that was refused, while another thread is in its own
        self.passing = None
        if self.seen is None:
            return
        seen, self.seen = self.seen, None
        self.watching.close()
        if output is None or any(not entry.signals for entry in seen):
            return  # the pass failed; its own error is on the way
        if self.scope == "answer":
            self._decide(seen)
        fill = [entry.mean_output for entry in seen] if self.fill == "mean" else None
        cache = getattr(output, "past_key_values", None)
        if cache is not None:
            setattr(cache, _PROMPT, self.prompt)  # copies of the cache have it too
        self.pruned.enter_context(self.pruning(self.sites, self.trace.keep, fill=fill, cache=cache))  # type: ignore[arg-type]

    def _decide(self, seen: list[Seen]) -> None:
        self.trace.features = [stack_features(entry.signals, self.policy.features) for entry in seen]
        with self._exactly(self.trace.features[0]):
            self.trace.logits = self.policy(self.trace.features)
            self.trace.keep = self.gate.every(self.trace.logits, [site.geometry for site in self.sites])

    @contextmanager
    def _exactly(self, features: Tensor) -> Iterator[None]:
        """Decisions are made in the policy's own precision, in mixed-precision training as in inference."""
        with torch.set_grad_enabled(self.gate.trains), torch.autocast(features.device.type, enabled=False):
            yield

    def _decide_site(self, index: int, signals: dict[str, Tensor]) -> Tensor:
        features = stack_features(signals, self.policy.features)
        with self._exactly(features):
            logits = self.policy.site_logits(index, features)
            keep = self.gate(logits, self.sites[index].geometry)
        self.trace.features.append(features)
        self.trace.logits.append(logits)
        self.trace.keep.append(keep)
        return keep


def _tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Which positions (B, T) of a forward pass are tokens, from its own arguments."""
    ids = kwargs.get("input_ids", args[0] if args else None)
    inputs = ids if ids is not None else kwargs["inputs_embeds"]
    mask = kwargs.get("attention_mask")
    if isinstance(mask, dict):  # one ready-made mask per kind of layer, all with the same diagonal
        mask = next((one for one in mask.values() if one is not None), None)
    if mask is None:
        return torch.ones(inputs.shape[:2], dtype=torch.bool, device=inputs.device)
    if mask.dim() == 4:  # ready-made for a static cache: a token sees itself, in sliding layers too; padding does not
        seen = mask[:, 0].diagonal(dim1=-2, dim2=-1)
        return seen if seen.dtype == torch.bool else seen == 0
    return mask[:, -inputs.shape[1] :].bool()


_PROMPT, _PROMPTS = "_microglia_prompt", itertools.count(1)  # which prompt a cache is of
_USES: "weakref.WeakKeyDictionary[nn.Module, int]" = weakref.WeakKeyDictionary()  # dense answers now; -1: attached
_USES_GUARD = threading.Lock()


def dense(lm: nn.Module) -> AbstractContextManager[None]:
    """While inside, nobody can attach the model: what is written meanwhile is written with every head."""
    return _held(lm, alone=False)


@contextmanager
def _held(lm: nn.Module, *, alone: bool) -> Iterator[None]:
    """One attachment per model at a time, and none beside dense answers: they would gate each other's answers."""
    with _USES_GUARD:
        uses = _USES.get(lm, 0)
        if uses < 0 or (alone and uses):
            state = "already attached" if uses < 0 else "writing a dense answer"
            raise MicrogliaError(
                f"this {type(lm).__name__} is {state}, here or in another thread; leave that context first or "
                "use a second copy of the model"
            )
        _USES[lm] = -1 if alone else uses + 1
    try:
        yield
    finally:
        with _USES_GUARD:
            _USES[lm] = 0 if alone else _USES[lm] - 1
