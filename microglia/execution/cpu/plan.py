"""The tables of a model, as its decode step reads them: where each array lies. Nothing is copied but vectors."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from microglia.anatomy import Anatomy, Computation, LayerComputation, Norm, Projection, computation
from microglia.anatomy.projection import oriented
from microglia.errors import UnsupportedModelError
from microglia.execution.cpu import code
from microglia.execution.cpu import tables as t
from microglia.execution.cpu.quantise import quantised

KINDS = {torch.float32: t.F32, torch.bfloat16: t.BF16, torch.float16: t.F16}
NORMS = {"rms": t.RMS, "layer": t.LAYER}
ACTIVATIONS = {"silu": t.SILU, "tanh_gelu": t.TANH_GELU, "gelu": t.GELU, "relu": t.RELU}
FIELDS = {"q": t.QUERY, "k": t.KEY, "v": t.VALUE, "o": t.OUTPUT, "gate": t.GATE, "up": t.UP, "down": t.DOWN}
Thresholds = Mapping[str, float]  # by projection, of a layer
Table = np.ndarray[Any, np.dtype[np.int64]]


def bits(x: float) -> int:
    """The bits of a double, as tables hold it."""
    return int(np.float64(x).view(np.int64))


class Plan:
    """What a step knows of a model: `layers` (L, fields), `whole` fields of the model, and what all of it points to.

    bits: 8 or 4 to multiply by rounded copies of the weights, None for the model's own. thresholds: of every layer,
    below which size an input of a projection does not count; see `Fast`. It stays right as long as
    `signature` is the model's: as long as no weight was moved or written.
    """

    def __init__(self, anatomy: Anatomy, bits: int | None = None, thresholds: Sequence[Thresholds] = ()) -> None:
        self.bits, self.thresholds = bits, thresholds
        self.computation: Computation = computation(anatomy)
        self.signature = signature(anatomy.lm)
        self.held: list[Any] = []
        self.projections: dict[tuple[int, int], Table] = {}
        self.layers = np.stack([self._layer(i, layer) for i, layer in enumerate(self.computation.layers)])
        self.whole = self._whole(anatomy)

    @property
    def extra_bytes(self) -> int:
        """Bytes that stand beside the model's own weights."""
        return sum(x.numel() * x.element_size() if isinstance(x, Tensor) else x.nbytes for x in self.held)

    def address(self, held: Any) -> int:
        """Where an array lies; it is kept until the plan goes. 0 for None."""
        if held is None:
            return 0
        self.held.append(held)
        return int(held.data_ptr() if isinstance(held, Tensor) else held.ctypes.data)

    def runs(self, keep: Tensor | int) -> tuple[int, int, int]:
        """Address and number of the runs of what is kept, (U,) or all of so many, and how many are kept."""
        kept = torch.ones(keep, dtype=torch.bool) if isinstance(keep, int) else keep > 0
        found = run_list(kept)
        return self.address(found), len(found), int(kept.sum())

    def columns(self, index: int, field: int) -> int:
        """The address of a projection whose matrix lies in columns, transposed now unless it does already."""
        table = self.projections[index, field]
        if not table[t.BY_COLUMNS]:
            layer = self.computation.layers[index]
            projection = getattr(layer, next(name for name, at in FIELDS.items() if at == field))
            outputs = slice(projection.first, projection.first + projection.outputs)
            stored = oriented(projection.module).detach()[outputs].T.contiguous()
            if self.bits is None:
                self.held.append(stored)
            self._store(table, stored, by_columns=True)
        return int(table.ctypes.data)

    def _projection(self, projection: Projection) -> Table:
        weight, module = oriented(projection.module).detach(), projection.module
        table = np.zeros(t.PROJECTION, np.int64)
        by_columns = weight.stride(1) != 1
        if by_columns and weight.stride(0) != 1:
            raise UnsupportedModelError(
                f"a weight of strides {weight.stride()} was given, but one of its dimensions must lie without gaps; "
                "make it contiguous"
            )
        outputs = slice(projection.first, projection.first + projection.outputs)
        stored = weight[outputs]
        self._store(table, stored.T if by_columns else stored, by_columns=by_columns)
        bias: Any = module.bias
        table[t.BIAS] = self.address(None if bias is None else bias.detach()[outputs].float().clone())
        self.held.append(table)
        return table

    def _store(self, table: Table, stored: Tensor, *, by_columns: bool) -> None:
        """Say where the rows of a matrix lie: those given, or rounded copies."""
        kind, scales = KINDS[stored.dtype], None
        if self.bits is not None:
            rounded = quantised(stored, self.bits)
            kind, stored, scales = (t.INT8 if rounded.bits == 8 else t.INT4), rounded.numbers, rounded.scales
            self.held.append(stored)
        table[[t.CODE, t.BY_COLUMNS]] = code.multiply(kind, by_columns), int(by_columns)
        table[[t.BASE, t.STEP]] = stored.data_ptr(), stored.stride(0) * stored.element_size()
        table[t.LENGTH] = stored.shape[1] * (2 if kind == t.INT4 else 1)
        table[t.SCALES] = self.address(scales)

    def _norm(self, norm: Norm | None) -> int:
        if norm is None:
            return 0
        table = np.zeros(t.NORM, np.int64)
        table[[t.NORM_KIND, t.NORM_EPS]] = NORMS[norm.kind], bits(norm.eps)
        table[[t.NORM_WEIGHT, t.NORM_BIAS]] = self.address(norm.weight.contiguous()), self.address(norm.bias)
        return self.address(table)

    def _layer(self, index: int, layer: LayerComputation) -> Table:
        row = np.zeros(t.LAYER_FIELDS, np.int64)
        heads = layer.heads
        row[[t.HEADS, t.GROUPS, t.SIZE, t.CHANNELS]] = heads.heads, heads.kv_heads, heads.head_dim, layer.channels
        row[[t.WINDOW, t.SCALING, t.SOFTCAP]] = layer.window or 0, bits(layer.scaling), bits(layer.softcap or 0)
        row[t.ROTARY_AT] = -1 if layer.rotary is None else layer.rotary
        row[t.ACTIVATION] = ACTIVATIONS[layer.activation]
        for name, field in FIELDS.items():
            projection = getattr(layer, name)
            if projection is not None:
                self.projections[index, field] = self._projection(projection)
                row[field] = self.projections[index, field].ctypes.data
        for name, threshold in (self.thresholds[index] if self.thresholds else {}).items():
            row[FIELDS[name]] = self.columns(index, FIELDS[name])
            self.projections[index, FIELDS[name]][t.THRESHOLD] = bits(threshold)
        first = t.NORM_ATTENTION
        row[first : first + len(layer.norms)] = [self._norm(norm) for norm in layer.norms]
        row[[t.HEAD_RUNS, t.HEAD_RUN_COUNT, t.HEADS_KEPT]] = self.runs(heads.heads)
        row[[t.GROUP_RUNS, t.GROUP_RUN_COUNT, t.GROUPS_KEPT]] = self.runs(heads.kv_heads)
        row[[t.CHANNEL_RUNS, t.CHANNEL_RUN_COUNT, t.CHANNELS_KEPT]] = self.runs(layer.channels)
        return row

    def _whole(self, anatomy: Anatomy) -> Table:
        row, computed = np.zeros(t.PLAN_FIELDS, np.int64), self.computation
        row[[t.LAYER_COUNT, t.HIDDEN, t.VOCABULARY]] = len(self.layers), anatomy.hidden_size, anatomy.vocab_size
        cache = KINDS[anatomy.lm.dtype]
        row[[t.CACHE_KIND, t.KEY_CODE, t.VALUE_CODE]] = cache, code.multiply(cache, False), code.multiply(cache, True)
        embedding = computed.embedding.contiguous()
        row[[t.EMBEDDING, t.EMBEDDING_KIND]] = embedding.data_ptr(), KINDS[embedding.dtype]
        row[t.EMBEDDING_FACTOR] = bits(computed.factor)
        if computed.positions is not None:
            row[t.POSITIONS] = computed.positions.data_ptr()
        row[t.NORM_LAST] = self._norm(computed.last)
        head = self._projection(computed.head)
        row[[t.HEAD, t.LOGIT_CAP]] = head.ctypes.data, bits(computed.softcap or 0)
        row[t.EVERY_HIDDEN], row[t.EVERY_TOKEN] = self.runs(anatomy.hidden_size)[0], self.runs(anatomy.vocab_size)[0]
        return row

    def rotaries(self) -> tuple[Table, int]:
        """The rotary embeddings as they are now, which may depend on the prompt's length, and the most frequencies."""
        found = self.computation.rotaries
        rows = np.zeros((max(1, len(found)), t.ROTARY), np.int64)
        for row, rotary in zip(rows, found, strict=False):
            row[[t.FREQUENCIES, t.FREQUENCY_COUNT]] = rotary.frequencies.data_ptr(), len(rotary.frequencies)
            row[t.ROTARY_FACTOR] = bits(rotary.factor)
        return rows, max((len(rotary.frequencies) for rotary in found), default=0)


def run_list(kept: Tensor) -> Table:
    """The runs (start, length) of true values in (U,)."""
    edges = np.flatnonzero(np.diff(np.pad(kept.numpy().astype(np.int8), 1)))
    starts, ends = edges[::2], edges[1::2]
    return np.ascontiguousarray(np.stack([starts, ends - starts], axis=1), dtype=np.int64)


def signature(lm: nn.Module) -> tuple[tuple[int, int], ...]:
    """Another one as soon as a parameter was moved or written."""
    return tuple(_places(lm))


def _places(lm: nn.Module) -> Iterator[tuple[int, int]]:
    for parameter in lm.parameters():
        yield parameter.data_ptr(), 0 if parameter.is_inference() else parameter._version
