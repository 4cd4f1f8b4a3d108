"""Generate with a step of our own on a CPU: the prompt as the library reads it, every further token at memory speed."""

import functools
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

from torch import nn
from transformers import GenerationConfig
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from microglia.anatomy import Anatomy, swap
from microglia.errors import ConfigError, MicrogliaError, UnsupportedModelError
from microglia.execution.base import EXECUTIONS, Decision, Execution, Prepared, Request, check_kinds
from microglia.execution.captured.rope import rotaries
from microglia.execution.cpu.plan import Plan, Thresholds, signature
from microglia.execution.cpu.request import Steps
from microglia.units import HeadSite, Site


@EXECUTIONS.register("fast")
class Fast(Execution):
    """The whole decode step of a model on a CPU as one compiled function over its own weights, in float32 activations.

    What is left out is a list of rows that are not read: nothing is cut, copied or switched, but the output projection
    of attention, which is transposed at the first decision (see `extra_bytes`). The function is compiled once for each
    machine, whatever the model, and kept on disk by numba.

    bits: 8 or 4 to read copies of the weights that are rounded to so many; None for the model's own.
    thresholds: of every layer, by projection (q, k, v, o, gate, up, down): an input no larger is left out for this very
        token (TEAL, arXiv 2408.14690). Such projections are transposed, which takes their bytes once more.
    """

    name: ClassVar[str] = "fast"
    scores: ClassVar[bool] = False
    shares: ClassVar[bool] = False
    calls_layers: ClassVar[bool] = False
    recovers: ClassVar[bool] = False

    def __init__(self, model: nn.Module, *, bits: int | None = None, thresholds: Sequence[Thresholds] = ()) -> None:
        if bits not in (None, 4, 8):
            raise ConfigError(f"bits={bits} was given; choose 4 or 8, or None for the model's own weights")
        if importlib.util.find_spec("numba") is None:
            raise UnsupportedModelError(
                "execution='fast' needs numba, without which a step takes two to four times as long; install "
                "microglia[cpu] or use execution='compact'"
            )
        self.anatomy = Anatomy(model)
        if thresholds and len(thresholds) != len(self.anatomy.layers):
            raise ConfigError(
                f"thresholds of {len(thresholds)} layers were given, but the model has {len(self.anatomy.layers)}; "
                "give one mapping for each layer"
            )
        self.rotaries = rotaries(self.anatomy.lm)
        self.plan = Plan(self.anatomy, bits, thresholds)
        self.present: Steps | None = None

    @classmethod
    def for_model(cls, model: nn.Module) -> "Fast":
        return cls(model)

    @property
    def extra_bytes(self) -> int:
        """Bytes beside the model's own weights: vectors in float32, and what was transposed."""
        return self.plan.extra_bytes

    def check_sites(self, sites: Sequence[Site]) -> None:
        check_kinds(sites, (HeadSite,), "fast steps prune attention heads")

    def check_generation(self, config: GenerationConfig) -> None:
        if max(config.num_beams or 1, config.num_return_sequences or 1) > 1:
            raise ConfigError(
                "beams and several answers to a prompt move rows of the cache of fast steps; use execution='compact'"
            )
        if config.output_attentions or config.output_hidden_states:
            raise ConfigError(
                "fast steps show neither attention weights nor hidden states; use execution='compact' for them"
            )

    @contextmanager
    def prepared(self, request: Request) -> Iterator[Prepared]:
        """While inside, a pass of the model over the request reads it into our cache, and later ones are fast steps."""
        for rotary in self.rotaries:
            rotary.check(int(request.mask.sum(1).max()), request.new_tokens)
        if self.plan.signature != signature(self.anatomy.lm):
            self.plan = Plan(self.anatomy, self.plan.bits, self.plan.thresholds)
        steps = Steps(self.plan, self.anatomy, request)
        with ExitStack() as stack:
            lm = self.anatomy.lm
            stack.callback(setattr, self, "present", None)
            self.present = steps
            swap(stack, lm, "forward", _forward(steps, lm.forward))
            yield Prepared(steps.cache, functools.partial(steps.greedy, new_tokens=request.new_tokens))

    @contextmanager
    def apply(self, sites: Sequence[Site], decision: Decision, cache: Cache | None = None) -> Iterator[None]:
        """The steps that continue the prompt take the decision."""
        if self.present is None or self.present.cache is not cache:
            raise MicrogliaError(
                "the prompt was not read into the cache of this fast execution; use generate, or read it inside "
                "Fast.prepared"
            )
        self.present.decide(sites, decision)
        yield


def _forward(steps: Steps, stock: Callable[..., Any]) -> Callable[..., Any]:
    cache, batch = steps.cache, len(steps.tokens)

    @functools.wraps(stock)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("past_key_values") is not cache:
            return stock(*args, **kwargs)
        if cache.place.length == 0:
            output = stock(*args, **kwargs)
            steps.prompt_read()
            return output
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        if ids.shape != (batch, 1) or cache.place.length >= steps.length:
            raise MicrogliaError(
                f"a fast step takes one token for each of {batch} rows, up to {steps.length} in all, but tokens of "
                f"shape {tuple(ids.shape)} came after {cache.place.length}; use execution='compact'"
            )
        logits = steps.step(ids[:, 0]).clone()
        return CausalLMOutputWithPast(logits=logits[:, None], past_key_values=cache)

    return forward
