"""The decode step of one batch size and one length of cache: pieces that were captured on static tensors, replayed.

A step is a head (embedding, mask, positions), one piece per block of layers, and a tail (last norm, logits, the next
token, what has ended). The pieces come from the model's own forward pass, cut where a block begins and ends; nothing of
the model is rewritten. Each block is captured once per variant (see `variants`), or its layers are, one by one (see
`parts`). Next to it stands its *switch*: the copies that a new decision needs, captured like the step itself.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from microglia.anatomy import Anatomy, View, stock_attention, swap, with_attention
from microglia.execution.base import Decision
from microglia.execution.captured.attention import ADDED_MASK, StepLayer, step_attention, uncompiled
from microglia.execution.captured.buckets import Bucket
from microglia.execution.captured.buffers import CHECK, StaticBuffers
from microglia.execution.captured.channels import ChannelBuffers, Layout, Mlps
from microglia.execution.captured.cutter import Cutter
from microglia.execution.captured.graphs import Capture, Graph
from microglia.execution.captured.kv import StaticKV
from microglia.execution.captured.parts import ByLayer, Part, parts_of
from microglia.execution.captured.rope import Rotary
from microglia.execution.captured.sublayers import Around, Compiler, put_around
from microglia.execution.captured.variants import DecisionBuffers, Variant
from microglia.execution.captured.weights import CompactWeights
from microglia.units import ChannelSite, HeadSite, Site

WARM_UP = 2  # runs before a capture: a compiler works in the first and may settle only in the second


@dataclass(frozen=True)
class StepModel:
    """What is the same for all batch sizes and lengths of a model.

    block: neighbouring layers that share a bucket. products: attention as two products instead of the model's own; see
    `attention`.
    """

    anatomy: Anatomy
    sites: Sequence[HeadSite]
    buckets: Sequence[Bucket]
    weights: Sequence[CompactWeights]
    mlps: Mlps
    rotaries: Sequence[Rotary]
    block: int
    compiler: Compiler
    products: bool

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
        self.layers = [
            StepLayer(self.kv(site), stock_attention(site.attention), model.products) for site in model.sites
        ]
        self.edges: list[Tensor] = []  # what goes into each layer, and out of the last
        self.inputs: list[tuple[Any, dict[str, Any]]] = []  # what each layer gets besides
        self.pieces: dict[Part, Graph] = {}
        self.switches: dict[Part, Graph] = {}
        self.channel_switches: dict[tuple[range, int, int], Graph] = {}  # by layers, channels and run
        self.head, self.tail = capture.graph(), capture.graph()
        self.captures = 0
        self.dense = self._everywhere(self.decision.dense)
        self.parts = self.dense
        self._record_first()

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
        for switch in self._switches(parts, layout):
            switch.replay()

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
                yield self.channel_switches[part.layers, part.variant.mlp.channels, layout.run]

    def step(self) -> None:
        """One token more in every row: reads `token`, leaves `logits` (B, V) and the likeliest next token."""
        self.head.replay()
        for part in self.parts:
            self.pieces[part].replay()
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
                    self.channel_switches[key] = self._captured(functools.partial(self.channels.gather, *key))

    def _capture(self, parts: Sequence[Part]) -> None:
        """Capture parts that are not there yet, no two of the same layer; the others' layers are left out."""
        parts = [part for part in parts if part not in self.pieces]
        if not parts:
            return
        self.decision.reset(parts)
        with self.capture.recording(), self._as(parts):
            for _ in range(WARM_UP):
                self._cut_forward(parts, None)
            self._cut_forward(parts, self.capture)
        for part in parts:
            if part.variant.is_cut:
                self.switches[part] = self._captured(functools.partial(self._switch, part))
        self.captures += 1

    def _captured(self, work: Callable[[], None]) -> Graph:
        """Work as a graph, done once before so that nothing is allocated in the capture."""
        with self.capture.recording():
            work()
            graph = self.capture.graph()
            graph.begin()
            work()
            graph.end()
            return graph

    def _record_first(self) -> None:
        """Capture the dense step with its head and tail; its tensors are those that all other pieces join."""
        buffers, compiler = self.buffers, self.model.compiler
        with self.capture.recording(), self._as(self.dense), ExitStack() as swaps:
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
        self.captures += 1

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

    def _switch(self, part: Part) -> None:
        layers, variant = part
        for index in layers:
            slots = self.decision.slots_of(index, variant.bucket)
            self.kv(self.model.sites[index]).move(slots)
            if variant.kind == "shared":
                self.model.weights[index].gather(variant.bucket, slots)
            else:
                self.decision.set_rows(index, variant.bucket)

    @contextmanager
    def _as(self, parts: Sequence[Part]) -> Iterator[None]:
        """While inside, the model's forward pass is a step with these parts."""
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
                    if not variant.gone[0]:
                        self._install_attention(swaps, site, variant)
                    if not variant.gone[1]:
                        self._install_mlp(swaps, site, variant)
            yield

    def _install_attention(self, stack: ExitStack, site: HeadSite, variant: Variant) -> None:
        kv, attention, bucket, layer = self.kv(site), site.attention, variant.bucket, self.layers[site.index]
        kv.active = kv.first(bucket.groups)
        kv.rows = self.decision.rows_of(site.index, bucket) if variant.kind == "rows" else None
        layer.gate = self.decision.keep[site.index] if variant.kind == "masked" else None
        if variant.kind == "shared":
            site.rewrite(stack, site.geometry.kept(bucket.heads, bucket.groups))
            for name, module in self.model.weights[site.index].projections(bucket).items():
                swap(stack, attention, name, module)
        bias = None if self.decision.bias is None or variant.kind == "dense" else self.decision.bias[site.index]
        self._install_output(stack, site, 0, variant, bias=bias)
        compiled = self.model.compiler is not None
        function = uncompiled() if compiled and not self.model.products else step_attention
        swap(stack, attention, "config", with_attention(attention.config, function, step_layer=layer))
        if compiled:  # another number would make every layer another one for the compiler; see LayerCache
            swap(stack, attention, "layer_idx", 0)

    def _install_mlp(self, stack: ExitStack, site: HeadSite, variant: Variant) -> None:
        shape, channels = variant.mlp, self.channels
        if shape is None or channels is None:
            self._install_output(stack, site, 1, variant)
            return
        if shape.is_cut:
            for name, module in self.model.mlps.weights[site.index].projections(shape.channels).items():
                swap(stack, site.layer.mlp, name, module)
        bias = None if channels.bias is None else channels.bias[site.index]
        self._install_output(stack, site, 1, variant, gate=channels.gate(site.index, shape), bias=bias)

    def _install_output(
        self,
        stack: ExitStack,
        site: HeadSite,
        half: int,
        variant: Variant,
        *,
        gate: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> None:
        """What a decision puts around the output projection of attention (0) or MLP (1), or the norm after it."""
        layer, family = site.layer, site.layer.family
        scale, after = self.scales[site.index, half] if variant.scaled else None, family.norms_after
        put_around(
            stack,
            layer.halves[half],
            (family.attention.o, family.mlp.down)[half],
            Around(gate=gate, bias=bias, scale=None if after else scale),
        )
        if after:
            put_around(stack, layer.module, after[half], Around(scale=scale))
