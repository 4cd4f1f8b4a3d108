"""The decode step of one batch size and one length of cache: static tensors, and the pieces that were captured on them.

A step is a head (embedding, mask, positions), one piece per stretch of layers, and a tail (last norm, logits, the next
token, what has ended). The pieces come from the model's own forward pass, cut where a stretch begins and ends; nothing
of the model is rewritten. Each stretch is captured once per *kind* and level:

- `dense`: every head, the model's own weights;
- `masked`: the same, each head's output multiplied by its gate (for decisions between the full level and the next, and
  for comparison);
- `shared`: compact weights, for rows that agree;
- `rows`: dense projections, each row's own heads in the cache.

Next to it stands its *switch*: the copies that a new decision needs, captured like the step itself.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from microglia.fill import left_behind
from microglia.replay.attention import ADDED_MASK, step_attention, uncompiled
from microglia.replay.graphs import Capture, Graph
from microglia.replay.kv import Rows, StaticHeads, StaticKV
from microglia.replay.levels import Level, Placement, covering, packed_size, placed
from microglia.replay.rope import Rotary
from microglia.replay.swap import swap
from microglia.replay.weights import CompactWeights
from microglia.sites import Site, View, stock_attention, with_attention

WARM_UP = 2  # runs before a capture: a compiler works in the first and may settle only in the second


@dataclass(frozen=True)
class Form:
    """What a piece was captured for: a kind and a level."""

    kind: str
    level: Level


@dataclass(frozen=True)
class Parts:
    """What is the same for all rooms of a model: sites, layers and the module that stacks them, levels, weights.

    products: attention as two products instead of the model's own; see `replay.attention`.
    """

    lm: Any
    stack: nn.Module
    layers: Sequence[nn.Module]
    sites: Sequence[Site]
    levels: Sequence[Level]
    weights: Sequence[CompactWeights]
    rotaries: Sequence[Rotary]
    stretch: int
    compiler: Callable[..., Any] | None
    products: bool

    @property
    def stretches(self) -> list[range]:
        """The layers of each stretch."""
        count = len(self.layers)
        return [range(i, min(i + self.stretch, count)) for i in range(0, count, self.stretch)]


class Room:
    """Static tensors for `batch` rows of at most `length` tokens, and everything captured on them."""

    def __init__(self, parts: Parts, capture: Capture, batch: int, length: int, *, fill: bool) -> None:
        self.parts, self.capture, self.batch, self.length = parts, capture, batch, length
        lm, sites, device = parts.lm, parts.sites, parts.lm.device
        self.geometry = sites[0].geometry  # of every site
        with torch.inference_mode(False):
            zeros = functools.partial(torch.zeros, dtype=torch.long, device=device)
            self.cache = StaticHeads([s.geometry for s in sites], batch, length, dtype=lm.dtype, device=device)
            self.token, self.positions = zeros(batch, 1), zeros(batch, 1)
            self.tokens = torch.ones(batch, length, dtype=torch.bool, device=device)  # false at the prompt's padding
            self.logits = torch.zeros(batch, len(lm.get_output_embeddings().weight), device=device)
            self.answer, self.count = zeros(batch, length), zeros(1)
            self.ended = torch.zeros(batch, dtype=torch.bool, device=device)
            self.stop, self.pad = zeros(64) - 1, zeros(1)
            self.keep = [torch.ones(batch, s.geometry.heads, device=device) for s in sites]
            self.plan = zeros(len(sites), batch, packed_size(self.geometry, parts.levels))  # placements, packed
            self.groups = [zeros(batch, s.geometry.kv_heads) for s in sites]
            self.heads = [zeros(batch, s.geometry.heads) for s in sites]
            self.asked = [torch.zeros_like(k) for k in self.keep]
            self.left: list[Tensor] | None = None
            if fill:
                self.left = [torch.zeros(batch, 1, lm.config.hidden_size, dtype=lm.dtype, device=device) for _ in sites]
        for site in sites:
            self.kv(site).stock, self.kv(site).products = stock_attention(site.attention), parts.products
        self.edges: list[Tensor] = []  # what goes into each stretch, and out of the last
        self.inputs: list[tuple[Any, dict[str, Any]]] = []  # what each layer gets besides
        self.pieces: dict[tuple[int, Form], Graph] = {}
        self.switches: dict[tuple[int, Form], Graph] = {}
        self.captures = 0
        self.dense = Form("dense", parts.levels[0])
        self.forms = [self.dense] * len(parts.stretches)
        self._record_first()

    def kv(self, site: Site) -> StaticKV:
        """The site's keys and values."""
        layer: Any = self.cache.layers[site.layer]
        return layer

    # --- a prompt ---------------------------------------------------------------------------------------------------

    def clear(self, stop: Sequence[int], pad: int) -> None:
        """Ready for a new prompt; `stop` are the tokens that end an answer, `pad` what follows them."""
        self.cache.place.seen = 0
        self.forms = [self.dense] * len(self.forms)
        self.stop.fill_(-1)
        self.stop[: len(stop)] = torch.tensor(list(stop), dtype=torch.long)
        self.pad.fill_(pad)
        self.ended.zero_()
        self.count.zero_()

    def read(self, mask: Tensor) -> None:
        """The prompts of `mask` (B, T), left-padded, have just been read into the cache."""
        length = mask.shape[1]
        self.tokens.fill_(True)
        self.tokens[:, :length] = mask.bool()
        self.positions.copy_(mask.sum(1, keepdim=True))
        self.cache.place.position.fill_(length)
        for rotary in self.parts.rotaries:
            rotary.hold()
        self.cache.place.seen = length

    @torch.inference_mode()
    def decide(self, keep: Sequence[Tensor], fill: Sequence[Tensor] | None, *, masked: bool = False) -> None:
        """Continue with decisions (B, H) or (1, H) per site: choose each stretch's level and copy its heads in.

        masked: multiply by the gates instead, at the full level.
        """
        whole = torch.stack([k.expand(self.batch, -1) for k in keep]).float()  # (sites, B, H)
        known = whole.cpu()  # the one wait
        forms = self._forms(known, masked)
        for form in dict.fromkeys(forms):
            self.prepare(form)
        torch._foreach_copy_(self.keep, list(whole))
        if self.left is not None and fill is not None:
            for site, k in zip(self.parts.sites, keep, strict=True):
                self.left[site.index].copy_(left_behind(site, k, fill[site.index]))
        self._place(forms, known)
        self.forms = forms
        for stretch, form in enumerate(forms):
            if (stretch, form) in self.switches:
                self.switches[stretch, form].replay()

    def _forms(self, keep: Tensor, masked: bool) -> list[Form]:
        """The form of every stretch for decisions (sites, B, H) on the host."""
        grouped = self.geometry.by_group(keep > 0)
        groups = grouped.any(-1).sum(-1).amax(-1).tolist()  # of each site
        queries = grouped.sum(-1).flatten(1).amax(-1).tolist()
        dense = (keep > 0).flatten(1).all(-1).tolist()
        agreed = (keep == keep[:, :1]).flatten(1).all(-1).tolist()
        full = self.parts.levels[0]

        def form(sites: slice) -> Form:
            if all(dense[sites]):
                return self.dense
            level = covering(self.parts.levels, max(groups[sites]), max(queries[sites]))
            if masked or level == full:
                return Form("masked", full)
            return Form("shared" if all(agreed[sites]) else "rows", level)

        return [form(slice(stretch.start, stretch.stop)) for stretch in self.parts.stretches]

    def _place(self, forms: Sequence[Form], keep: Tensor) -> None:
        """Where the heads of decisions (sites, B, H) on the host live, found there and copied to the device at once.

        On the device it would be some twenty kernels at every site, for a few hundred numbers.
        """
        plan = torch.zeros(self.plan.shape, dtype=torch.long)
        for level in {form.level for form in forms if form.kind in ("shared", "rows")}:
            stretches = [s for s, form in zip(self.parts.stretches, forms, strict=True) if form.level == level]
            sites = [index for stretch in stretches for index in stretch]
            packed = placed(keep[sites], self.geometry, level).packed()
            plan[sites, :, : packed.shape[-1]] = packed
        self.plan.copy_(plan)

    # --- steps ------------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """One token more in every row: reads `token`, leaves `logits` (B, V) and the likeliest next token."""
        self._head.replay()
        for stretch, form in enumerate(self.forms):
            self.pieces[stretch, form].replay()
        self._tail.replay()
        self.cache.place.seen += 1

    def choose(self) -> None:
        """The likeliest token of `logits`, unless the row has ended, into `token` and the answer."""
        token = torch.where(self.ended, self.pad, self.logits.argmax(-1))
        self.ended |= (token[:, None] == self.stop).any(-1)
        self.token.copy_(token[:, None])
        self.answer.index_copy_(1, self.count, self.token)
        self.count += 1

    # --- capturing --------------------------------------------------------------------------------------------------

    def prepare(self, form: Form) -> None:
        """Capture every stretch at a form, unless that is done; the model runs to warm up, and once to be captured.

        May be called while a prompt waits: what a warm-up writes is written again by the step, and with every head kept
        a switch moves nothing.
        """
        if (0, form) in self.pieces:
            return
        for buffer in self.keep:
            buffer.fill_(1)
        self._place([form] * len(self.parts.stretches), torch.ones(len(self.keep), self.batch, self.geometry.heads))
        with self.capture.recording(), self._as(form):
            for _ in range(WARM_UP):
                self._cut_forward(form, None)
            self._cut_forward(form, self.capture)
        if form.kind in ("shared", "rows"):
            with self.capture.recording():
                for stretch in range(len(self.parts.stretches)):
                    self._switch(stretch, form)
                    graph = self.capture.graph()
                    graph.begin()
                    self._switch(stretch, form)
                    graph.end()
                    self.switches[stretch, form] = graph
        self.captures += 1

    def _record_first(self) -> None:
        """Capture the dense step with its head and tail; its tensors are those that all other pieces join."""
        with self.capture.recording(), self._as(self.dense), ExitStack() as swaps:
            if self.parts.compiler is not None:
                head = self.parts.lm.get_output_embeddings()
                swap(swaps, head, "forward", self.parts.compiler(head.forward))
            if self.parts.compiler is not None and not self.parts.rotaries:
                for child in self.parts.stack.children():
                    if not isinstance(child, nn.ModuleList | nn.Embedding):  # the last norm, the rotary embedding
                        swap(swaps, child, "forward", self.parts.compiler(child.forward))
            for _ in range(WARM_UP):
                self.logits.copy_(self._cut_forward(self.dense, None, first=True))
                self.choose()
            self._head = self.capture.graph()
            self._head.begin()
            self.logits.copy_(self._cut_forward(self.dense, self.capture, first=True))
            self.choose()
            self.positions += 1
            self.cache.place.position += 1
            self._tail.end()
        self.captures += 1

    def _forward(self) -> Tensor:
        """Logits (B, V) of the model's own forward pass on the static tensors."""
        lm = self.parts.lm
        output = type(lm).forward(  # its class's: while a decoder serves, the model's own attribute replays
            lm,
            input_ids=self.token,
            attention_mask=self.tokens,
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
        )
        return output.logits[:, -1]

    def _cut_forward(self, form: Form, capture: Capture | None, *, first: bool = False) -> Tensor:
        """`_forward`, cut into pieces; without a capture it only warms up."""
        stretches = self.parts.stretches
        if first:
            self.edges, self.inputs = [], []
        starts, ends = {s.start: i for i, s in enumerate(stretches)}, {s.stop - 1: i for i, s in enumerate(stretches)}
        open_: list[Graph] = []

        def layer(index: int, own: Callable[..., Any], hidden: Tensor, args: Any, kwargs: dict[str, Any]) -> Tensor:
            if index in starts:
                if first and index == 0:
                    if capture is not None:
                        self._head.end()
                    self.edges.append(hidden)
                hidden = self.edges[starts[index]]
                if capture is not None:
                    open_.append(capture.graph())
                    open_[-1].begin()
            if first:
                self.inputs.append((args, kwargs))
            args, kwargs = self.inputs[index]
            hidden = own(hidden, *args, **kwargs)
            if index in ends:
                if first:
                    self.edges.append(hidden)
                else:
                    self.edges[ends[index] + 1].copy_(hidden)
                if capture is not None:
                    open_[-1].end()
                    self.pieces[ends[index], form] = open_[-1]
                if first and capture is not None and ends[index] == len(stretches) - 1:
                    self._tail = capture.graph()
                    self._tail.begin()
                hidden = self.edges[ends[index] + 1]
            return hidden

        with ExitStack() as stack:
            for index, module in enumerate(self.parts.layers):
                own = module.forward if self.parts.compiler is None else self.parts.compiler(module.forward)
                swap(stack, module, "forward", _calls(layer, index, own))
            return self._forward()

    def _switch(self, stretch: int, form: Form) -> None:
        for index in self.parts.stretches[stretch]:
            site = self.parts.sites[index]
            placement = Placement.unpacked(self.plan[index], self.geometry, form.level)
            self.kv(site).move(placement)
            if form.kind == "shared":
                self.parts.weights[index].gather(form.level, placement)
            else:
                for buffer, values in zip(
                    (self.groups[index], self.heads[index], self.asked[index]),
                    (placement.slots, placement.heads, placement.asked),
                    strict=True,
                ):
                    buffer[:, : values.shape[1]].copy_(values)

    @contextmanager
    def _as(self, form: Form) -> Iterator[None]:
        """While inside, the model's forward pass is a step of this form."""
        with ExitStack() as swaps:
            if self.parts.compiler is not None:  # one code for all layers, but one for every form
                import torch._dynamo.config as limits  # slow to import, and needed here only

                swaps.enter_context(limits.patch(recompile_limit=256))
            swaps.callback(setattr, self.cache.place, "stepping", False)
            self.cache.place.stepping = True
            stack: Any = self.parts.stack
            swap(swaps, stack, "config", View(stack.config, _attn_implementation=ADDED_MASK))
            for rotary in self.parts.rotaries:
                rotary.install(swaps)
            for site in self.parts.sites:
                self._install(swaps, site, form)
            yield

    def _install(self, stack: ExitStack, site: Site, form: Form) -> None:
        kv, attention, level = self.kv(site), site.attention, form.level
        kv.now = kv.level(level.groups)
        kv.gate = self.keep[site.index] if form.kind == "masked" else None
        kv.rows = None
        changes: dict[str, int] = {}
        if form.kind == "rows":
            buffers = self.groups[site.index], self.heads[site.index], self.asked[site.index]
            sizes = (level.groups, level.heads, level.heads)
            kv.rows = Rows(*(buffer[:, :size] for buffer, size in zip(buffers, sizes, strict=True)))
        elif form.kind == "shared":
            attributes, config = site.layout.rewritten(site.geometry.kept(level.heads, level.groups))
            for name, value in attributes.items():
                swap(stack, attention, name, value)
            changes.update(config)
            for name, module in self.parts.weights[site.index].projections(level).items():
                swap(stack, attention, name, module)
        if self.left is not None and form.kind != "dense":
            swap(stack, attention, site.layout.o, _WithLeft(site.output, self.left[site.index]))
        function = uncompiled() if self.parts.compiler is not None and not kv.products else step_attention
        swap(stack, attention, "config", with_attention(attention.config, function, **changes))
        swap(stack, attention, "layer_idx", kv)  # a number would make every layer another one for the compiler


def _calls(layer: Callable[..., Tensor], index: int, own: Callable[..., Any]) -> Callable[..., Tensor]:
    return lambda hidden, *args, **kwargs: layer(index, own, hidden, args, kwargs)


class _WithLeft(nn.Module):
    """An output projection, and what the pruned heads left behind added to it."""

    def __init__(self, inner: nn.Module, left: Tensor) -> None:
        super().__init__()
        self.inner, self.left = inner, left

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.inner(x)
        return output + self.left
