"""Generate with captured decode steps: the prompt dense and watched, then one switch of heads, then replays."""

import functools
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from microglia.errors import ConfigError, MicrogliaError, UnsupportedModelError
from microglia.replay.attention import KINDS
from microglia.replay.graphs import Capture, capture_for
from microglia.replay.levels import ladder
from microglia.replay.rope import rotaries
from microglia.replay.step import Parts, Room
from microglia.replay.swap import swap
from microglia.replay.weights import CompactWeights
from microglia.sites import Site, View, causal_lm, find_sites

ROOM = 64  # lengths of caches are multiples of it, so that requests of similar length share what was captured
# What torch.compile is asked for. With coordinate descent the compiler writes products with a single row itself, as
# sums that read the weights nearly as fast as memory gives them.
MODES: dict[str, dict[str, Any]] = {
    "default": {},
    "coordinate-descent": {"options": {"coordinate_descent_tuning": True}},
    "max-autotune-no-cudagraphs": {"mode": "max-autotune-no-cudagraphs"},
}
CHECK = 16  # steps between two looks at whether all rows have ended: each look waits for the device


class GraphDecoder:
    """Captured decoding of one model, kept by the caller between requests: what is captured once is replayed forever.

    stretch: neighbouring layers that share a level. 1 follows every site's own count with one launch per layer, the
        number of layers makes one launch of the whole step and rounds all sites up to the greediest.
    lowest: the smallest level as a share of the heads; sites that ask for less are filled up to it.
    compiled: fuse the small operations of a layer before capturing: with torch.compile, in one of MODES, or with the
        compiler given.
    attention: `stock` is the model's own, `products` reads keys and values on the whole device; see replay.attention.
    capture: how work is captured; None is CUDA graphs on a CUDA device and tapes elsewhere.
    rooms: how many pairs of batch size and length are kept captured; the one used longest ago goes first.

    Memory: the cache is reserved for every head, because the prompt is read with all of them, and the compact weights
    come on top of the model's own. Pruning here saves what a step reads, not what is reserved.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        stretch: int = 4,
        lowest: float = 0.5,
        compiled: bool | str | Callable[..., Any] = False,
        attention: str = "stock",
        capture: Capture | None = None,
        rooms: int = 2,
    ) -> None:
        lm: Any = causal_lm(model)
        sites = find_sites(lm)
        if stretch < 1 or rooms < 1:
            raise ConfigError(f"stretch={stretch} and rooms={rooms} were given; both must be at least 1")
        if attention not in KINDS:
            raise ConfigError(f"attention={attention!r} is unknown; choose {' or '.join(KINDS)}")
        _check(lm, sites)
        levels = ladder(sites[0].geometry, lowest)
        with torch.inference_mode(False):
            weights = [CompactWeights(site, levels) for site in sites]
        stack, layers = _layers(lm, sites)
        self.parts = Parts(
            lm,
            stack,
            layers,
            sites,
            levels,
            weights,
            rotaries(lm),
            stretch,
            _compiler(compiled),
            attention == "products",
        )
        self.capture = capture or capture_for(lm.device)
        self.limit, self.rooms = rooms, OrderedDict[tuple[int, int, bool], Room]()

    @property
    def captures(self) -> int:
        """How often the whole model was captured, over all rooms that are kept."""
        return sum(room.captures for room in self.rooms.values())

    @torch.inference_mode()
    def room(self, batch: int, length: int, *, fill: bool = False) -> Room:
        """A room for `batch` rows of at most `length` tokens, captured now if there is none.

        One that is longer serves too, up to twice as long: its empty places are read in vain.
        """
        key = batch, -(-length // ROOM) * ROOM, fill
        fitting = [k for k in self.rooms if k[0] == batch and k[2] == fill and key[1] <= k[1] <= 2 * key[1]]
        key = min(fitting, default=key)
        if key not in self.rooms:
            while len(self.rooms) >= self.limit:
                self.rooms.popitem(last=False)
            self.rooms[key] = Room(self.parts, self.capture, *key[:2], fill=fill)
        self.rooms.move_to_end(key)
        return self.rooms[key]

    @contextmanager
    def serving(
        self, mask: Tensor, new_tokens: int, *, fill: bool = False, stop: Sequence[int] = (), pad: int = 0
    ) -> Iterator[Room]:
        """While inside, a forward pass of the model reads these prompts into the room's cache, and later ones replay.

        mask: (B, T), false at padding. Hand `room.cache` to the model (or to its own `generate`) as past_key_values.
        """
        batch, width = mask.shape
        for rotary in self.parts.rotaries:
            rotary.check(int(mask.sum(1).max()), new_tokens)
        room = self.room(batch, width + new_tokens, fill=fill)
        room.clear(stop, pad)
        with ExitStack() as stack:
            lm: Any = self.parts.lm
            swap(stack, lm, "forward", _forward(room, mask, lm.forward))
            if self.parts.rotaries:  # Phi-3 throws a cache away where a text crosses that length, and none does here
                swap(stack, lm, "config", View(lm.config, original_max_position_embeddings=sys.maxsize))
            yield room

    @contextmanager
    def pruning(
        self, sites: Sequence[Site], keep: Sequence[Tensor], *, fill: Sequence[Tensor] | None = None, cache: Any = None
    ) -> Iterator[None]:
        """How `attached` carries out a decision here: the room that holds the prompt takes it."""
        self._deciding(cache).decide(keep, fill)
        yield

    @contextmanager
    def masking(
        self, sites: Sequence[Site], keep: Sequence[Tensor], *, fill: Sequence[Tensor] | None = None, cache: Any = None
    ) -> Iterator[None]:
        """The same by multiplying gates, every head still computed: for comparison."""
        self._deciding(cache).decide(keep, fill, masked=True)
        yield

    def _deciding(self, cache: Any) -> Room:
        room = next((room for room in self.rooms.values() if room.cache is cache), None)
        if room is None:
            raise MicrogliaError("the prompt was not read into this decoder's cache; generate inside decoder.serving")
        return room


@torch.inference_mode()
def greedy(room: Room, logits: Tensor, new_tokens: int) -> Tensor:
    """The answers (B, N) after a prompt with these last logits (B, V): replays only, until all rows have ended."""
    room.logits.copy_(logits)
    room.choose()
    done = 1
    while done < new_tokens and not (done % CHECK == 0 and bool(room.ended.all())):
        room.step()
        done += 1
    answer = room.answer[:, :done].clone()
    ended = (answer[..., None] == room.stop).any(-1).long().cumsum(1) > 0  # (B, N), from the end token on
    lengths = (~ended).sum(1) + 1
    return answer[:, : min(done, int(lengths.max()))]


def _forward(room: Room, mask: Tensor, own: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("past_key_values") is not room.cache:
            return own(*args, **kwargs)
        if room.cache.place.seen == 0:
            output = own(*args, **kwargs)
            room.read(mask)
            return output
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        if ids.shape != room.token.shape or room.cache.place.seen >= room.length:
            raise MicrogliaError(
                f"a captured step takes one token for each of {room.batch} rows, up to {room.length} in all, but "
                f"tokens of shape {tuple(ids.shape)} came after {room.cache.place.seen}; use path='compact'"
            )
        room.token.copy_(ids)
        room.step()
        return CausalLMOutputWithPast(logits=room.logits[:, None], past_key_values=room.cache)

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


def _layers(lm: nn.Module, sites: Sequence[Site]) -> tuple[nn.Module, list[nn.Module]]:
    """The module that stacks the decoder layers, and the layer around each site: a member of the model's list."""
    names = [next(part for part in _parents(site.name) if part.rpartition(".")[2].isdigit()) for site in sites]
    _, _, stack = list(_parents(names[0]))[:3]  # model.layers.0, model.layers, model
    return lm.get_submodule(stack), [lm.get_submodule(name) for name in names]


def _parents(name: str) -> Iterator[str]:
    while name:
        yield name
        name = name.rpartition(".")[0]


def _check(lm: Any, sites: Sequence[Site]) -> None:
    """Raise UnsupportedModelError for what a captured step could not follow."""
    kind = type(lm).__name__
    if len({site.geometry for site in sites}) > 1:
        raise UnsupportedModelError(f"the layers of this {kind} differ in their heads; use path='compact'")
    back_end = lm.config._attn_implementation
    if back_end not in ("sdpa", "eager"):
        raise UnsupportedModelError(
            f"attention by {back_end!r} takes no mask, so empty places of a static cache would be seen; load the model "
            "with attn_implementation='sdpa', which reads prompts with flash kernels on a GPU too"
        )
    if any(p.is_meta for p in lm.parameters()):
        raise UnsupportedModelError(f"weights of this {kind} are not on its device; use path='compact'")
