"""Generate with captured decode steps: the prompt dense and measured, then one switch of heads, then replays."""

import functools
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from microglia.anatomy import Anatomy, View, swap
from microglia.errors import ConfigError, MicrogliaError, UnsupportedModelError
from microglia.execution.base import EXECUTIONS, Decision, Execution, Prepared, Request, check_kinds
from microglia.execution.captured.buckets import buckets
from microglia.execution.captured.buffers import END_TOKENS
from microglia.execution.captured.channels import Mlps
from microglia.execution.captured.graphs import Capture, capture_for
from microglia.execution.captured.rope import rotaries
from microglia.execution.captured.step import CapturedStep, StepModel
from microglia.execution.captured.ways import KINDS
from microglia.execution.captured.weights import CompactWeights
from microglia.registry import listed
from microglia.units import ChannelSite, HeadSite, Site, SublayerSite, find_sites

LENGTHS = 64  # lengths of caches are multiples of it, so that requests of similar length share what was captured
# What torch.compile is asked for. With coordinate descent the compiler writes products with a single row itself, as
# sums that read the weights nearly as fast as memory gives them. With one-row a kernel of our own makes them.
ONE_ROW = "one-row"
MODES: dict[str, dict[str, Any]] = {
    "default": {},
    "coordinate-descent": {"options": {"coordinate_descent_tuning": True}},
    ONE_ROW: {},
    "max-autotune-no-cudagraphs": {"mode": "max-autotune-no-cudagraphs"},
}


@EXECUTIONS.register("captured")
class Captured(Execution):
    """Captured steps of one model; keep it between requests: what is captured once is replayed forever.

    block: neighbouring layers that share a bucket. 1 follows every site's own count with one launch per layer, the
        number of layers makes one launch of the whole step and rounds all sites up to the greediest.
    lowest, lowest_channels: the smallest bucket as a share of the heads, and of the channels; sites that need less are
        filled up to it.
    compiled: fuse the small operations of a layer before capturing: with torch.compile, in one of MODES, or with the
        compiler given.
    attention: `stock` is the model's own, `products` and `kernel` read keys and values on the whole device, see
        `attention`; `auto` measures at every level which is fastest.
    capture: how work is captured; None is CUDA graphs on a CUDA device and tapes elsewhere.
    kept_steps: how many pairs of batch size and length stay captured; the one used longest ago goes first.

    Memory: the cache is reserved for every head, because the prompt is read with all of them, and the compact weights
    come on top of the model's own, those of MLPs from the first decision about channels on. Pruning here saves what a
    step reads, not what is reserved.
    """

    name: ClassVar[str] = "captured"
    scores: ClassVar[bool] = False
    shares: ClassVar[bool] = False
    calls_layers: ClassVar[bool] = False
    recovers: ClassVar[bool] = False

    def __init__(
        self,
        model: nn.Module,
        *,
        block: int = 4,
        lowest: float = 0.5,
        lowest_channels: float = 0.25,
        compiled: bool | str | Callable[..., Any] = False,
        attention: str = "auto",
        capture: Capture | None = None,
        kept_steps: int = 2,
    ) -> None:
        anatomy = Anatomy(model)
        sites = [site for site in find_sites(anatomy.lm) if isinstance(site, HeadSite)]
        if block < 1 or kept_steps < 1:
            raise ConfigError(f"block={block} and kept_steps={kept_steps} were given; both must be at least 1")
        if attention not in KINDS:
            raise ConfigError(f"attention={attention!r} is unknown; choose {listed(KINDS)}")
        _check(anatomy, compiled=bool(compiled))
        every = buckets(sites[0].geometry, lowest)
        with torch.inference_mode(False):
            weights = [CompactWeights(site, every) for site in sites]
        self.model = StepModel(
            anatomy,
            sites,
            every,
            weights,
            Mlps(anatomy.layers, lowest_channels),
            rotaries(anatomy.lm),
            block,
            _compiler(compiled),
            attention,
            compiled == ONE_ROW,
        )
        self.capture = capture or capture_for(anatomy.lm.device)
        self.kept_steps, self.steps = kept_steps, OrderedDict[tuple[int, int, bool], CapturedStep]()

    @classmethod
    def for_model(cls, model: nn.Module) -> "Captured":
        return cls(model)

    @property
    def captures(self) -> int:
        """How often the whole model was captured, over all steps that are kept."""
        return sum(step.captures for step in self.steps.values())

    @torch.inference_mode()
    def step_for(self, batch: int, length: int, *, fill: bool = False) -> CapturedStep:
        """The step for `batch` rows of at most `length` tokens, captured now if there is none.

        One that is longer serves too, up to twice as long: attention then also reads places that are still empty.
        """
        key = batch, -(-length // LENGTHS) * LENGTHS, fill
        fitting = [k for k in self.steps if k[0] == batch and k[2] == fill and key[1] <= k[1] <= 2 * key[1]]
        key = min(fitting, default=key)
        if key not in self.steps:
            while len(self.steps) >= self.kept_steps:
                self.steps.popitem(last=False)
            self.steps[key] = CapturedStep(self.model, self.capture, *key[:2], fill=fill)
        self.steps.move_to_end(key)
        return self.steps[key]

    def check_sites(self, sites: Sequence[Site]) -> None:
        check_kinds(sites, (HeadSite, ChannelSite, SublayerSite), "captured steps prune heads, channels and sublayers")
        kind = type(self.model.lm).__name__
        channels = {site.geometry.channels for site in sites if isinstance(site, ChannelSite)}
        if len(channels) > 1:
            raise UnsupportedModelError(f"the layers of this {kind} differ in their channels; use execution='compact'")
        if not self.model.anatomy.family.steps and any(isinstance(site, SublayerSite) for site in sites):
            raise UnsupportedModelError(
                f"the layers of this {kind} may be more than attention and MLP, so captured steps cannot leave out one "
                "of these; use execution='compact'"
            )
        if channels:
            self.model.mlps.reserve()

    def check_generation(self, config: GenerationConfig) -> None:
        ends = config.eos_token_id
        if isinstance(ends, list) and len(ends) > END_TOKENS:
            raise ConfigError(
                f"{len(ends)} tokens end an answer, and captured steps watch for at most {END_TOKENS}; use "
                "execution='compact'"
            )
        if max(config.num_beams or 1, config.num_return_sequences or 1) > 1:
            raise ConfigError(
                "beams and several answers to a prompt move rows of the captured cache; use execution='compact'"
            )

    @contextmanager
    def prepared(self, request: Request) -> Iterator[Prepared]:
        """While inside, a pass of the model over the request reads it into a static cache, and later ones replay."""
        with self.serving(request) as step:
            yield Prepared(step.cache, functools.partial(step.greedy, new_tokens=request.new_tokens))

    @contextmanager
    def serving(self, request: Request) -> Iterator[CapturedStep]:
        """As `prepared`, with the step itself."""
        batch, width = request.mask.shape
        for rotary in self.model.rotaries:
            rotary.check(int(request.mask.sum(1).max()), request.new_tokens)
        step = self.step_for(batch, width + request.new_tokens, fill=request.fill)
        step.clear(request.end_tokens, request.pad_token)
        with ExitStack() as stack:
            lm = self.model.lm
            swap(stack, lm, "forward", _forward(step, request.mask, lm.forward))
            if self.model.rotaries:  # Phi-3 throws a cache away where a text crosses that length, and none does here
                swap(stack, lm, "config", View(lm.config, original_max_position_embeddings=sys.maxsize))
            yield step

    @contextmanager
    def apply(
        self, sites: Sequence[Site], decision: Decision, cache: Cache | None = None, *, masked: bool = False
    ) -> Iterator[None]:
        """The step that holds the prompt takes the decision. masked: every unit is still computed, for comparison."""
        step = next((step for step in self.steps.values() if step.cache is cache), None)
        if step is None:
            raise MicrogliaError(
                "the prompt was not read into the cache of this captured execution; use generate, or read it inside "
                "Captured.prepared"
            )
        step.decide(decision, sites, masked=masked)
        yield


def _forward(step: CapturedStep, mask: Tensor, stock: Callable[..., Any]) -> Callable[..., Any]:
    buffers, cache = step.buffers, step.buffers.cache

    @functools.wraps(stock)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("past_key_values") is not cache:
            return stock(*args, **kwargs)
        length = cache.place.length
        if length == 0:
            output = stock(*args, **kwargs)
            step.prompt_read(mask)
            return output
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        if ids.shape != buffers.token.shape or length >= buffers.length:
            raise MicrogliaError(
                f"a captured step takes one token for each of {buffers.batch} rows, up to {buffers.length} in all, but "
                f"tokens of shape {tuple(ids.shape)} came after {length}; use execution='compact'"
            )
        buffers.token.copy_(ids)
        step.step()
        return CausalLMOutputWithPast(logits=buffers.logits[:, None], past_key_values=cache)

    return forward


def _compiler(compiled: bool | str | Callable[..., Any]) -> Callable[..., Any] | None:
    if isinstance(compiled, str):
        if compiled not in MODES:
            raise ConfigError(
                f"compiled={compiled!r} is unknown; choose {', '.join(MODES)}: other modes of torch.compile capture "
                "graphs themselves"
            )
        return functools.partial(torch.compile, dynamic=False, **MODES[compiled])
    return functools.partial(torch.compile, dynamic=False) if compiled is True else compiled or None


def _check(anatomy: Anatomy, *, compiled: bool) -> None:
    """Raise UnsupportedModelError for what a captured step could not follow."""
    kind = type(anatomy.lm).__name__
    if len({layer.heads for layer in anatomy.layers}) > 1:
        raise UnsupportedModelError(f"the layers of this {kind} differ in their heads; use execution='compact'")
    if anatomy.attention_backend not in ("sdpa", "eager"):
        raise UnsupportedModelError(
            f"attention by {anatomy.attention_backend!r} takes no mask, so empty places of a static cache would be "
            "seen; load the model with attn_implementation='sdpa', which reads prompts with flash kernels on a GPU too"
        )
    if any(p.is_meta for p in anatomy.lm.parameters()):
        raise UnsupportedModelError(f"weights of this {kind} are not on its device; use execution='compact'")
    if compiled and any(layer.scales_by_number for layer in anatomy.layers):
        raise UnsupportedModelError(
            f"this {kind} scales attention by the layer's number, which a compiled step hides; leave compiled out"
        )
