"""The decode step of one batch size and one length of cache: pieces that were captured on static tensors, replayed.

A step is a head (embedding, mask, positions), one piece per block of layers, and a tail (last norm, logits, the next
token, what has ended). The pieces come from the model's own forward pass, cut where a block begins and ends; nothing of
the model is rewritten. Each block is captured once per variant (see `variants`). Next to it stands its *switch*: the
copies that a new decision needs, captured like the step itself.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from microglia.anatomy import Anatomy, View, stock_attention, swap, with_attention
from microglia.execution.base import Decision
from microglia.execution.captured import kernels
from microglia.execution.captured.attention import ADDED_MASK, StepLayer, step_attention, uncompiled
from microglia.execution.captured.buckets import Bucket
from microglia.execution.captured.buffers import CHECK, StaticBuffers
from microglia.execution.captured.graphs import Capture, Graph
from microglia.execution.captured.kv import LayerCache, StaticKV
from microglia.execution.captured.linear import one_row_at_a_time
from microglia.execution.captured.moves import Copy, Moves
from microglia.execution.captured.rope import Rotary
from microglia.execution.captured.variants import DecisionBuffers, Variant
from microglia.execution.captured.ways import timed, worth_trying
from microglia.execution.captured.weights import CompactWeights
from microglia.units import HeadSite

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
    rotaries: Sequence[Rotary]
    block: int
    compiler: Callable[..., Any] | None
    attention: str
    linear: str = "stock"

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
        bias = torch.zeros(batch, 1, model.anatomy.hidden_size, dtype=lm.dtype, device=lm.device) if fill else None
        self.decision = DecisionBuffers(model.sites, model.buckets, model.blocks, batch, bias)
        self.layers = [StepLayer(self.kv(site), stock_attention(site.attention)) for site in model.sites]
        self.edges: list[Tensor] = []  # what goes into each block, and out of the last
        self.inputs: list[tuple[Any, dict[str, Any]]] = []  # what each layer gets besides
        self.pieces: dict[tuple[int, Variant], Graph] = {}
        self.switches: dict[tuple[int, Variant], Graph] = {}
        self.moves: dict[tuple[int, Variant], Moves | None] = {}  # what the switches read, where a kernel makes them
        self.ways: dict[Variant, dict[str, float]] = {}  # seconds of each way that was tried, the one taken first
        self.captures = 0
        self.dense = Variant("dense", model.buckets[0])
        self.variants = [self.dense] * len(model.blocks)
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
        self.variants = [self.dense] * len(self.variants)

    def prompt_read(self, mask: Tensor) -> None:
        """The prompts of `mask` (B, T), left-padded, have just been read into the cache."""
        for rotary in self.model.rotaries:
            rotary.hold()
        self.buffers.prompt_read(mask)

    @torch.inference_mode()
    def decide(self, decision: Decision, *, masked: bool = False) -> None:
        """Continue with a decision: choose each block's variant and copy its heads in.

        masked: multiply by the gates instead, with every head computed.
        """
        keep = torch.stack([k.expand(self.buffers.batch, -1) for k in decision.keep]).float()  # (sites, B, H)
        on_host = keep.cpu()  # the one wait
        variants = self.decision.variants(on_host, masked=masked)
        for variant in dict.fromkeys(variants):
            self.prepare(variant)
        self.decision.write(keep, decision.fill)
        self.decision.place(variants, on_host)
        self.variants = variants
        for block, variant in enumerate(variants):
            if (block, variant) in self.switches:
                self.switches[block, variant].replay()

    def step(self) -> None:
        """One token more in every row: reads `token`, leaves `logits` (B, V) and the likeliest next token."""
        self.head.replay()
        for block, variant in enumerate(self.variants):
            self.pieces[block, variant].replay()
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
        if variant in self.ways:
            return
        self.decision.reset(variant)
        self._keep_fastest(variant, {})
        if variant.is_cut:
            with self.capture.recording():
                for block in range(len(self.model.blocks)):
                    moves = self._moves(block, variant)
                    self._switch(block, variant, moves)  # once uncaptured: a capture allocates and compiles nothing
                    graph = self.capture.graph()
                    graph.begin()
                    self._switch(block, variant, moves)
                    graph.end()
                    self.moves[block, variant] = moves
                    self.switches[block, variant] = graph
        self.captures += 1

    def _worth_trying(self, variant: Variant) -> tuple[str, ...]:
        return worth_trying(self.model.attention, self.model.lm.device, self.buffers.batch, variant.bucket)

    def _keep_fastest(self, variant: Variant, known: dict[str, list[Graph]]) -> None:
        """Capture every block in each way of attention that is worth trying and not `known`; the fastest stays.

        A way that fails, as where a compiler breaks, is passed over unless it was the last.
        """
        kinds, pieces = self._worth_trying(variant), dict(known)
        for way in kinds:
            if way in known:
                continue
            try:
                with self.capture.recording(), self._as(variant, way):
                    for _ in range(WARM_UP):
                        self._cut_forward(variant, None)
                    self._cut_forward(variant, self.capture)
                pieces[way] = self._pieces_of(variant)
            except Exception:
                if way == kinds[-1] and not pieces:
                    raise
        seconds = {way: self._seconds(pieces[way]) if len(pieces) > 1 else 0.0 for way in pieces}
        self.ways[variant] = dict(sorted(seconds.items(), key=lambda item: item[1]))
        fastest = next(iter(self.ways[variant]))
        self.pieces |= {(block, variant): graph for block, graph in enumerate(pieces[fastest])}

    def _pieces_of(self, variant: Variant) -> list[Graph]:
        return [self.pieces[block, variant] for block in range(len(self.model.blocks))]

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
        kinds = self._worth_trying(self.dense)
        for way in kinds:
            try:
                self._record(way)
            except Exception:
                if way == kinds[-1]:
                    raise
                continue
            with torch.inference_mode():
                self._keep_fastest(self.dense, {way: self._pieces_of(self.dense)})
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

    def _cut_forward(self, variant: Variant, capture: Capture | None, *, first: bool = False) -> Tensor:
        """`_forward`, cut into pieces; without a capture it only warms up."""
        if first:
            self.edges, self.inputs = [], []
        cutter = _Cutter(self, variant, capture, first)
        with ExitStack() as stack:
            for index, site in enumerate(self.model.sites):
                module, compiler = site.layer.module, self.model.compiler
                forward = module.forward if compiler is None else compiler(module.forward)
                swap(stack, module, "forward", cutter.layer(index, forward))
            return self._forward()

    def _switch(self, block: int, variant: Variant, moves: Moves | None) -> None:
        """The copies of a block, by the kernel that makes all of them or one by one."""
        if variant.kind == "rows":
            self.decision.set_rows(block, variant.bucket)
        if moves is not None:
            return moves.make()
        for index in self.model.blocks[block]:
            slots = self.decision.slots_of(index, variant.bucket)
            self.kv(self.model.sites[index]).move(slots)
            if variant.kind == "shared":
                self.model.weights[index].gather(variant.bucket, slots)

    def _moves(self, block: int, variant: Variant) -> Moves | None:
        """A block's copies for one kernel, if there is one that can make them."""
        if not kernels.usable(self.model.lm.device):
            return None
        parts: list[list[Copy] | None] = []
        for index in self.model.blocks[block]:
            where = self.decision.places_of(index, variant.bucket)
            parts.append(self.kv(self.model.sites[index]).copies(where))
            if variant.kind == "shared":
                parts.append(self.model.weights[index].copies(variant.bucket, where))
        return Moves.of(parts, self.decision.slots)

    @contextmanager
    def _as(self, variant: Variant, way: str) -> Iterator[None]:
        """While inside, the model's forward pass is a step of this variant, with attention made in this way."""
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
            for site in self.model.sites:
                self._install(swaps, site, variant, way)
            if self.model.linear == "kernel" and self.buffers.batch == 1:
                one_row_at_a_time(swaps, self.model.lm.modules())
            yield

    def _install(self, stack: ExitStack, site: HeadSite, variant: Variant, way: str) -> None:
        kv, attention, bucket, layer = self.kv(site), site.attention, variant.bucket, self.layers[site.index]
        kv.active = kv.first(bucket.groups)
        kv.rows = self.decision.rows_of(site.index, bucket) if variant.kind == "rows" else None
        layer.way, layer.gate = way, self.decision.keep[site.index] if variant.kind == "masked" else None
        layer.own = self.decision.own[site.index][:, : bucket.heads] if variant.kind == "rows" else None
        if variant.kind == "shared":
            site.rewrite(stack, site.geometry.kept(bucket.heads, bucket.groups))
            for name, module in self.model.weights[site.index].projections(bucket).items():
                swap(stack, attention, name, module)
        if self.decision.bias is not None and variant.kind != "dense":
            output = _WithBias(site.output, self.decision.bias[site.index])
            swap(stack, attention, site.layer.family.attention.o, output)
        compiled = self.model.compiler is not None
        function = uncompiled() if compiled and way == "stock" else step_attention
        swap(stack, attention, "config", with_attention(attention.config, function, step_layer=layer))
        if compiled:  # another number would make every layer another one for the compiler; see LayerCache
            swap(stack, attention, "layer_idx", 0)


class _Cutter:
    """Cuts one forward pass of a variant at the edges of blocks, and captures the pieces where there is a capture."""

    def __init__(self, step: CapturedStep, variant: Variant, capture: Capture | None, first: bool) -> None:
        self.step, self.variant, self.capture, self.first = step, variant, capture, first
        blocks = step.model.blocks
        self.starts = {block.start: i for i, block in enumerate(blocks)}
        self.ends = {block.stop - 1: i for i, block in enumerate(blocks)}
        self.graph: Graph | None = None

    def layer(self, index: int, stock: Callable[..., Any]) -> Callable[..., Tensor]:
        """The forward of layer `index`, cut where a block begins or ends."""

        def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if index in self.starts:
                hidden = self._begin(index, hidden)
            if self.first:
                self.step.inputs.append(self._inputs(index, args, kwargs))
            args, kwargs = self.step.inputs[index]
            hidden = stock(hidden, *args, **kwargs)
            return self._end(index, hidden) if index in self.ends else hidden

        return forward

    def _inputs(self, index: int, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """What the layer gets besides the hidden states, with its own part of the cache in place of the whole."""
        whole, part = self.step.cache, LayerCache(self.step.layers[index].kv)
        given = {name: part if value is whole else value for name, value in kwargs.items()}
        return tuple(part if value is whole else value for value in args), given

    def _begin(self, index: int, hidden: Tensor) -> Tensor:
        step = self.step
        if self.first and index == 0:
            if self.capture is not None:
                step.head.end()
            step.edges.append(hidden)
        if self.capture is not None:
            self.graph = self.capture.graph()
            self.graph.begin()
        return step.edges[self.starts[index]]

    def _end(self, index: int, hidden: Tensor) -> Tensor:
        step, block = self.step, self.ends[index]
        if self.first:
            step.edges.append(hidden)
        else:
            step.edges[block + 1].copy_(hidden)
        if self.capture is not None and self.graph is not None:
            self.graph.end()
            step.pieces[block, self.variant] = self.graph
            if self.first and block == len(step.model.blocks) - 1:
                step.tail.begin()
        return step.edges[block + 1]


class _WithBias(nn.Module):
    """An output projection, and what the pruned heads left behind added to it."""

    def __init__(self, inner: nn.Module, bias: Tensor) -> None:
        super().__init__()
        self.inner, self.bias = inner, bias

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.inner(x)
        return output + self.bias
