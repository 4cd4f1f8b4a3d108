"""The decode step of one batch size and one length of cache: pieces that were captured on static tensors, replayed.

A step is a head (embedding, mask, positions), one piece per block of layers, and a tail (last norm, logits, the next
token, what has ended). The pieces come from the model's own forward pass, cut where a block begins and ends; nothing of
the model is rewritten. Each block is captured once per variant (see `variants`), or its layers are, one by one (see
`parts`). Next to it stands its *switch*: the copies that a new decision needs, captured like the step itself.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from microglia.anatomy import Anatomy, View, stock_attention, swap
from microglia.execution.base import Decision
from microglia.execution.captured import kernels
from microglia.execution.captured.attention import ADDED_MASK, StepLayer
from microglia.execution.captured.buckets import Bucket
from microglia.execution.captured.buffers import CHECK, StaticBuffers
from microglia.execution.captured.channels import ChannelBuffers, Layout, Mlps
from microglia.execution.captured.cutter import Cutter
from microglia.execution.captured.graphs import Capture, Graph
from microglia.execution.captured.install import install
from microglia.execution.captured.kv import StaticKV
from microglia.execution.captured.linear import one_row_at_a_time
from microglia.execution.captured.moves import Copy, Moves
from microglia.execution.captured.parts import ByLayer, Part, parts_of
from microglia.execution.captured.rope import Rotary
from microglia.execution.captured.sublayers import Compiler
from microglia.execution.captured.variants import DecisionBuffers, Variant
from microglia.execution.captured.ways import timed, worth_trying
from microglia.execution.captured.weights import CompactWeights
from microglia.units import ChannelSite, HeadSite, Site

WARM_UP = 2  # runs before a capture: a compiler works in the first and may settle only in the second


@dataclass(frozen=True)
class StepModel:
    """What is the same for all batch sizes and lengths of a model.

    block: neighbouring layers that share a bucket. attention: one of `ways.KINDS`.
    """

    anatomy: Anatomy
    sites: Sequence[HeadSite]
    buckets: Sequence[Bucket]
    weights: Sequence[CompactWeights]
    mlps: Mlps
    rotaries: Sequence[Rotary]
    block: int
    compiler: Compiler
    attention: str
    one_row: bool = False

    @property
    def lm(self) -> Any:
        return self.anatomy.lm

    @property
    def blocks(self) -> list[range]:
        """The layers of each block."""
        count = len(self.sites)
        return [range(i, min(i + self.block, count)) for i in range(0, count, self.block)]


class CapturedStep:
    """Everything captured for `batch` rows of at most `length` tokens, and the decision that it runs with."""

    def __init__(self, model: StepModel, capture: Capture, batch: int, length: int, *, fill: bool) -> None:
        self.model, self.capture = model, capture
        self.buffers = StaticBuffers(model.anatomy, batch, length)
        lm = model.lm
        zeros = functools.partial(torch.zeros, dtype=lm.dtype, device=lm.device)
        self.bias = zeros(batch, 1, model.anatomy.hidden_size) if fill else None  # a template
        self.decision = DecisionBuffers(model.sites, model.buckets, model.blocks, batch, self.bias)
        self.channels: ChannelBuffers | None = None  # from the first decision about channels on
        self.scales = zeros(len(model.sites), 2, batch, 1, 1)  # whether each row has attention and MLP
        self.layers = [StepLayer(self.kv(site), stock_attention(site.attention)) for site in model.sites]
        self.edges: list[Tensor] = []  # what goes into each layer, and out of the last
        self.inputs: list[tuple[Any, dict[str, Any]]] = []  # what each layer gets besides
        self.pieces: dict[Part, Graph] = {}
        self.switches: dict[Part, Graph] = {}
        self.failed: dict[str, str] = {}  # ways of attention that were passed over, and why
        self.moves: dict[Part, Moves | None] = {}  # what the switches read, where a kernel makes them
        # By layers, channels and run; with what was captured, since a graph keeps none of the tensors that it reads.
        self.channel_switches: dict[tuple[range, int, int], tuple[Graph, Callable[[], None]]] = {}
        self.ways: dict[Variant, dict[str, float]] = {}  # of attention: seconds of those tried
        self.captures = 0
        self.dense = self._everywhere(self.decision.dense)
        self.parts = self.dense
        self._record_first()
        self.captures += 1

    @property
    def cache(self) -> Any:
        """The static cache: given to the model as past_key_values."""
        return self.buffers.cache

    def kv(self, site: HeadSite) -> StaticKV:
        """The site's keys and values."""
        layer: Any = self.cache.layers[site.layer.index]
        kv: StaticKV = layer
        return kv

    # --- a request --------------------------------------------------------------------------------------------------

    def clear(self, end_tokens: Sequence[int] = (), pad: int = 0) -> None:
        """Ready for a new prompt, dense until a decision comes."""
        self.buffers.clear(end_tokens, pad)
        self.parts = self.dense

    def prompt_read(self, mask: Tensor) -> None:
        """The prompts of `mask` (B, T), left-padded, have just been read into the cache."""
        for rotary in self.model.rotaries:
            rotary.hold()
        self.buffers.prompt_read(mask)

    @property
    def variants(self) -> list[Variant]:
        """What the present decision is carried out with, part by part."""
        return [part.variant for part in self.parts]

    @torch.inference_mode()
    def decide(self, decision: Decision, sites: Sequence[Site] = (), *, masked: bool = False) -> None:
        """Continue with a decision about `sites`, the heads of all layers if none are given: each block gets its
        variant, and what it keeps is copied in.

        masked: multiply by the gates instead, with everything computed.
        """
        keep = ByLayer.of(decision, sites, self.decision.keep[0].expand(len(self.model.sites), -1, -1))
        on_host = keep.on_host()  # the one wait
        layout = self._layout(sites)
        parts = parts_of(on_host, self.decision, self.model.mlps, layout, masked=masked)
        self._prepare(parts, layout)
        self.decision.write(keep.heads, keep.head_fill)
        self.decision.place(parts, on_host.heads)
        if self.channels is not None and keep.channels is not None and layout is not None:
            still = [part.variant.mlp is None or not part.variant.mlp.is_cut for part in parts for _ in part.layers]
            self.channels.write(keep.channels, layout, still)
            self.channels.leave(layout.sites, keep.channels, keep.channel_fill)
        if keep.sublayers is not None:
            self.scales.copy_(keep.sublayers.transpose(1, 2)[..., None, None])
        self.parts = parts
        _replay(self._switches(parts, layout))

    def _layout(self, sites: Sequence[Site]) -> Layout | None:
        """How the channels of a decision lie in the MLPs, for which there are static tensors from now on."""
        channels = [site for site in sites if isinstance(site, ChannelSite)]
        if not channels:
            return None
        if self.channels is None:
            self.model.mlps.reserve()
            self.channels = ChannelBuffers(self.model.mlps, self.buffers.batch, self.bias)
        return self.model.mlps.layout(channels)

    def _switches(self, parts: Sequence[Part], layout: Layout | None) -> Iterator[Graph]:
        """All copies for a decision."""
        for part in parts:
            if part in self.switches:
                yield self.switches[part]
            if layout is not None and part.variant.mlp is not None and part.variant.mlp.is_cut:
                yield self.channel_switches[part.layers, part.variant.mlp.channels, layout.run][0]

    def step(self) -> None:
        """One token more in every row: reads `token`, leaves `logits` (B, V) and the likeliest next token."""
        self.head.replay()
        _replay(self.pieces[part] for part in self.parts)
        self.tail.replay()
        self.cache.place.length += 1

    @torch.inference_mode()
    def greedy(self, logits: Tensor, new_tokens: int) -> Tensor:
        """The answers (B, N) after a prompt with these last logits (B, V): replays only, until all rows have ended."""
        buffers = self.buffers
        buffers.logits.copy_(logits)
        buffers.choose()
        done = 1
        while done < new_tokens and not (done % CHECK == 0 and bool(buffers.ended.all())):
            self.step()
            done += 1
        return buffers.answers(done)

    # --- capturing --------------------------------------------------------------------------------------------------

    def prepare(self, variant: Variant) -> None:
        """Capture every block at a variant, unless that is done; the model runs to warm up, and once to be captured.

        May be called while a prompt waits: what a warm-up writes is written again by the step, and with every head kept
        a switch moves nothing.
        """
        self._capture(self._everywhere(variant))

    def _everywhere(self, variant: Variant) -> list[Part]:
        return [Part(block, variant) for block in self.model.blocks]

    def _prepare(self, parts: Sequence[Part], layout: Layout | None) -> None:
        """Capture what parts need and is not there: of heads alone in every block, since few shapes serve all of them;
        of the many that heads, channels and sublayers have together, only what is needed now.
        """
        blocks = self.model.blocks
        of_heads = (part.variant for part in parts if part.variant.is_of_heads and part.layers in blocks)
        for variant in dict.fromkeys(of_heads):
            self.prepare(variant)
        self._capture(parts)
        if layout is None or self.channels is None:
            return
        for layers, variant in parts:
            if variant.mlp is not None and variant.mlp.is_cut:
                key = layers, variant.mlp.channels, layout.run
                if key not in self.channel_switches:
                    self.channels.reset()
                    switch = self.channels.switch(*key)
                    self.channel_switches[key] = self._captured(switch), switch

    def _capture(self, parts: Sequence[Part]) -> None:
        """Capture parts that are not there yet, no two of the same layer; the others' layers are left out."""
        parts = [part for part in parts if part not in self.pieces]
        if not parts:
            return
        self.decision.reset(parts)
        for level in dict.fromkeys(part.variant.level for part in parts):
            self._keep_fastest(level, [part for part in parts if part.variant.level == level], {})
        for part in parts:
            if part.variant.is_cut:
                self.moves[part] = self._moves(part)
                self.switches[part] = self._captured(functools.partial(self._switch, part, self.moves[part]))
        self.captures += 1

    def _captured(self, work: Callable[[], None]) -> Graph:
        """Work as a graph, done once before: a capture allocates and compiles nothing."""
        with self.capture.recording():
            work()
            graph = self.capture.graph()
            graph.begin()
            work()
            graph.end()
            return graph

    def _worth_trying(self, level: Variant) -> tuple[str, ...]:
        """The ways of attention for a level: those that may be the fastest, or the one that was when it was new."""
        if level in self.ways:
            return tuple(self.ways[level])[:1]
        return worth_trying(self.model.attention, self.model.lm.device, self.buffers.batch, level.bucket)

    def _keep_fastest(self, level: Variant, parts: Sequence[Part], known: dict[str, list[Graph]]) -> None:
        """Capture parts of a level in each way of attention that is worth trying and not `known`; the fastest stays.

        A way that fails, as where a compiler breaks, is passed over unless it was the last.
        """
        kinds, pieces = self._worth_trying(level), dict(known)
        for way in kinds:
            if way in known:
                continue
            try:
                with self.capture.recording(), self._as(parts, way):
                    for _ in range(WARM_UP):
                        self._cut_forward(parts, None)
                    self._cut_forward(parts, self.capture)
                pieces[way] = [self.pieces[part] for part in parts]
            except Exception as error:
                for part in parts:
                    self.pieces.pop(part, None)
                self._pass_over(way, error, last=way == kinds[-1] and not pieces)
        seconds = {way: self._seconds(pieces[way]) if len(pieces) > 1 else 0.0 for way in pieces}
        fastest = min(seconds, key=seconds.__getitem__)
        self.ways.setdefault(level, dict(sorted(seconds.items(), key=lambda item: item[1])))
        self.pieces |= dict(zip(parts, pieces[fastest], strict=True))

    def _pass_over(self, way: str, error: Exception, *, last: bool) -> None:
        """Note why a way failed; called where it did. Time that is over is no failure of a way."""
        if last or isinstance(error, TimeoutError):
            raise error
        self.failed[way] = f"{type(error).__name__}: {error}"

    def _seconds(self, pieces: Sequence[Graph]) -> float:
        """How long the layers of a step take that reads the whole cache, however many tokens are in it now."""
        position = self.cache.place.position
        before = position.clone()
        position.fill_(self.buffers.length - 1)  # a place that the step which comes to it writes again
        try:
            return timed([piece.replay for piece in pieces], position.device)
        finally:
            position.copy_(before)

    def _record_first(self) -> None:
        """Capture the dense step with its head and tail; its tensors are those that all other pieces join."""
        level = self.decision.dense
        kinds = self._worth_trying(level)
        for way in kinds:
            try:
                self._record(way)
            except Exception as error:
                self._pass_over(way, error, last=way == kinds[-1])
                continue
            with torch.inference_mode():
                self._keep_fastest(level, self.dense, {way: [self.pieces[part] for part in self.dense]})
            return

    def _record(self, way: str) -> None:
        buffers, compiler = self.buffers, self.model.compiler
        self.head, self.tail = self.capture.graph(), self.capture.graph()
        with self.capture.recording(), self._as(self.dense, way), ExitStack() as swaps:
            if compiler is not None:
                head = self.model.lm.get_output_embeddings()
                swap(swaps, head, "forward", compiler(head.forward))
            if compiler is not None and not self.model.rotaries:
                for child in self.model.anatomy.stack.children():
                    if not isinstance(child, nn.ModuleList | nn.Embedding):  # the last norm, the rotary embedding
                        swap(swaps, child, "forward", compiler(child.forward))
            for _ in range(WARM_UP):
                buffers.logits.copy_(self._cut_forward(self.dense, None, first=True))
                buffers.choose()
            self.head.begin()
            buffers.logits.copy_(self._cut_forward(self.dense, self.capture, first=True))
            buffers.choose()
            buffers.advance()
            self.tail.end()

    def _forward(self) -> Tensor:
        """Logits (B, V) of the model's own forward pass on the static tensors."""
        lm, buffers = self.model.lm, self.buffers
        output = type(lm).forward(  # its class's: inside a request the model's own attribute replays
            lm,
            input_ids=buffers.token,
            attention_mask=buffers.tokens,
            position_ids=buffers.positions,
            past_key_values=self.cache,
            use_cache=True,
        )
        logits: Tensor = output.logits[:, -1]
        return logits

    def _cut_forward(self, parts: Sequence[Part], capture: Capture | None, *, first: bool = False) -> Tensor:
        """`_forward`, cut into parts; without a capture it only warms up."""
        if first:
            self.edges, self.inputs = [], []
        cutter = Cutter(self, parts, capture, first)
        with ExitStack() as stack:
            for site in self.model.sites:
                swap(stack, site.layer.module, "forward", cutter.layer(site, self.model.compiler))
            return self._forward()

    def _switch(self, part: Part, moves: Moves | None) -> None:
        """The copies of a part's heads, by the kernel that makes all of them or one by one."""
        layers, variant = part
        if variant.kind == "rows":
            self.decision.set_rows(layers, variant.bucket)
        if moves is not None:
            moves.make()
            return
        for index in layers:
            slots = self.decision.slots_of(index, variant.bucket)
            self.kv(self.model.sites[index]).move(slots)
            if variant.kind == "shared":
                self.model.weights[index].gather(variant.bucket, slots)

    def _moves(self, part: Part) -> Moves | None:
        """A part's copies for one kernel, if there is one that can make them."""
        if not kernels.usable(self.model.lm.device):
            return None
        copies: list[list[Copy] | None] = []
        for index in part.layers:
            where = self.decision.places_of(index, part.variant.bucket)
            copies.append(self.kv(self.model.sites[index]).copies(where))
            if part.variant.kind == "shared":
                copies.append(self.model.weights[index].copies(part.variant.bucket, where))
        return Moves.of(copies, self.decision.slots)

    @contextmanager
    def _as(self, parts: Sequence[Part], way: str) -> Iterator[None]:
        """While inside, the model's forward pass is a step with these parts, with attention made in this way."""
        with ExitStack() as swaps:
            if self.model.compiler is not None:  # one code for all layers, but one for every variant
                import torch._dynamo.config as limits  # slow to import, and needed here only

                swaps.enter_context(limits.patch(recompile_limit=256))
            swaps.callback(setattr, self.cache.place, "stepping", False)
            self.cache.place.stepping = True
            stack: Any = self.model.anatomy.stack
            swap(swaps, stack, "config", View(stack.config, _attn_implementation=ADDED_MASK))
            for rotary in self.model.rotaries:
                rotary.install(swaps)
            for layers, variant in parts:
                for site in self.model.sites[layers.start : layers.stop]:
                    install(swaps, self, site, variant, way)
            if self.model.one_row and self.buffers.batch == 1:
                one_row_at_a_time(swaps, self.model.lm.modules())
            yield


def _replay(graphs: Iterable[Graph]) -> None:
    for graph in graphs:
        graph.replay()
