"""Cuts a forward pass of the model into pieces: where the parts of a step begin and end."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from microglia.execution.captured.graphs import Capture, Graph
from microglia.execution.captured.kv import LayerCache
from microglia.execution.captured.parts import Part
from microglia.execution.captured.sublayers import Compiler, forward_of
from microglia.units import HeadSite

if TYPE_CHECKING:
    from microglia.execution.captured.step import CapturedStep


class Cutter:
    """Cuts one forward pass at the edges of parts, and captures the pieces where there is a capture."""

    def __init__(self, step: "CapturedStep", parts: Sequence[Part], capture: Capture | None, first: bool) -> None:
        self.step, self.capture, self.first = step, capture, first
        self.part_of = {index: part for part in parts for index in part.layers}
        self.graph: Graph | None = None

    def layer(self, site: HeadSite, compiler: Compiler) -> Callable[..., Tensor]:
        """The forward of a layer, cut where its part begins or ends; one that is in no part is not computed."""
        index, part = site.index, self.part_of.get(site.index)
        if part is None:
            return lambda *_, **__: self.step.edges[index + 1]
        stock = forward_of(site.layer, part.variant.gone, compiler)

        def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if index == part.layers.start:
                hidden = self._begin(index, hidden)
            if self.first:
                self.step.inputs.append(self._inputs(index, args, kwargs))
            args, kwargs = self.step.inputs[index]
            return self._end(index, part, stock(hidden, *args, **kwargs))

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
        return step.edges[index]

    def _end(self, index: int, part: Part, hidden: Tensor) -> Tensor:
        """What goes on from a layer; at the end of a part, what the next one reads."""
        step, last = self.step, index == part.layers.stop - 1
        if self.first:
            step.edges.append(hidden)
        elif last:
            step.edges[index + 1].copy_(hidden)
        if not last:
            return hidden
        if self.capture is not None and self.graph is not None:
            self.graph.end()
            step.pieces[part] = self.graph
            if self.first and index == len(step.model.sites) - 1:
                step.tail.begin()
        return step.edges[index + 1]
