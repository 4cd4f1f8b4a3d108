"""Recovery: what else changes in the model while it writes with fewer units, learned together with what is pruned.

Low-rank additions to the projections of every layer (Hu et al. 2022, LoRA) and to the weights of its norms. They act
where the pruned units are missing: in the passes that write an answer. The prompt is read by the untouched model, in
training as in inference, so that decisions do not depend on the recovery and dense answers are the model's own.
"""

import hashlib
import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from microglia.anatomy import Anatomy, causal_lm, input_device
from microglia.anatomy.projection import features, oriented
from microglia.errors import ConfigError

SCALE = 2.0  # of the additions, as with lora_alpha = 2 · rank


class Recovery(nn.Module):
    """Additions `SCALE · up · down` to projections, down (r, in) and up (out, r), and to the weights of norms.

    Up and the norms' additions start at zero: at first nothing changes.
    """

    def __init__(self, shapes: list[tuple[int, int]], norms: list[int], rank: int) -> None:
        """shapes: inputs and outputs of every projection. norms: sizes of their weights."""
        super().__init__()
        self.rank = rank
        self.down = nn.ParameterList(nn.Parameter(torch.randn(rank, size) * size**-0.5) for size, _ in shapes)
        self.up = nn.ParameterList(nn.Parameter(torch.zeros(size, rank)) for _, size in shapes)
        self.norms = nn.ParameterList(nn.Parameter(torch.zeros(size)) for size in norms)
        self._merged: weakref.WeakKeyDictionary[nn.Module, tuple[Any, list[Tensor]]] = weakref.WeakKeyDictionary()

    @classmethod
    def for_model(cls, model: nn.Module, rank: int) -> "Recovery":
        """An untrained recovery on the model's device. Raises ConfigError for weights that are packed or quantised."""
        projections, norms = _places(model)
        shapes = [(features(p, of_inputs=True), features(p, of_inputs=False)) for p in projections]
        return cls(shapes, [len(norm.weight) for norm in norms], rank).to(input_device(model))  # type: ignore[arg-type]

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], rank: int) -> "Recovery":
        """What `state_dict` gave. Raises ConfigError for tensors that make no recovery of that rank."""
        parts = {name: _listed(tensors, name) for name in ("down", "up", "norms")}
        down, up, norms = parts.values()
        shaped = all(x.dim() == 2 for x in (*down, *up)) and all(x.dim() == 1 for x in norms)
        if not shaped or len(down) != len(up) or len(down) + len(up) + len(norms) != len(tensors):
            raise ConfigError(f"{len(tensors)} tensors make no recovery; save it again")
        if {len(x) for x in down} | {x.shape[1] for x in up} != {rank}:
            raise ConfigError(f"recovery={rank} was given, but its tensors have other ranks; save it again")
        if not all(x.is_floating_point() and bool(x.isfinite().all()) for x in tensors.values()):
            raise ConfigError("the recovery holds NaN, infinity or no numbers with a point; train at a lower rate")
        recovery = cls([(a.shape[1], len(b)) for a, b in zip(down, up, strict=True)], [len(x) for x in norms], rank)
        recovery.load_state_dict(dict(tensors))
        return recovery.requires_grad_(False)

    def fits(self, model: nn.Module) -> bool:
        """Whether it was made for a model of these shapes."""
        projections, norms = _places(model)
        there = [(features(p, of_inputs=True), features(p, of_inputs=False)) for p in projections]
        here = [(a.shape[1], len(b)) for a, b in zip(self.down, self.up, strict=True)]
        return here == there and [len(x) for x in self.norms] == [len(n.weight) for n in norms]  # type: ignore[arg-type]

    @contextmanager
    def applied(self, model: nn.Module, *, merged: bool) -> Iterator[None]:
        """While inside, the model has the additions. Leaving restores it bit for bit.

        merged: added to the weights, which are kept for the next time: a second set of the layers' weights in memory,
        and no time. Else computed beside every projection, through which gradients reach the recovery.
        """
        projections, norms = _places(model)
        with ExitStack() as stack:
            if merged:
                for module, weight in zip([*projections, *norms], self._weights(model), strict=True):
                    _replace(stack, module, weight)
            else:
                for module, down, up in zip(projections, self.down, self.up, strict=True):
                    stack.callback(module.register_forward_hook(_addition(down, up)).remove)
                for norm, more in zip(norms, self.norms, strict=True):
                    whole: Any = norm.weight
                    with torch.enable_grad():  # the pass that ends here has read a prompt, perhaps without gradients
                        changed = whole.detach() + more.to(whole.dtype)
                    _replace(stack, norm, changed)
            yield

    @torch.no_grad()
    def _weights(self, model: nn.Module) -> list[Tensor]:
        """The weights of projections and norms with what is added to them."""
        lm = causal_lm(model)
        version = [p._version for p in self.parameters()]
        if (known := self._merged.get(lm)) and known[0] == version:
            return known[1]
        projections, norms = _places(lm)
        with torch.inference_mode(False):
            weights: list[Tensor] = []
            for module, down, up in zip(projections, self.down, self.up, strict=True):
                weight: Any = module.weight
                added = weight.detach().clone()
                oriented(module, added).add_((SCALE * up @ down).to(added))
                weights.append(nn.Parameter(added, requires_grad=False))
            for norm, more in zip(norms, self.norms, strict=True):
                weight = norm.weight
                weights.append(nn.Parameter(weight.detach() + more.to(weight), requires_grad=False))
        self._merged[lm] = version, weights
        return weights

    def merge_permanently(self, model: nn.Module) -> None:
        """Add everything to the model's own weights, for an export: it then reads prompts with them too."""
        projections, norms = _places(model)
        for module, weight in zip([*projections, *norms], self._weights(model), strict=True):
            with torch.no_grad():
                module.weight.copy_(weight)  # type: ignore[operator]
        self._merged.pop(causal_lm(model), None)

    def fingerprint(self) -> str:
        """The same for recoveries with the same weights, and for no others."""
        digest = hashlib.sha256()
        for tensor in self.state_dict().values():
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


def _listed(tensors: Mapping[str, Tensor], name: str) -> list[Tensor]:
    """The tensors of a list of parameters, `name.0` first, as far as none is missing."""
    listed: list[Tensor] = []
    while (key := f"{name}.{len(listed)}") in tensors:
        listed.append(tensors[key])
    return listed


def _places(model: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """The projections of the layers, and all norms of the decoder, in the order of the model."""
    anatomy = Anatomy(model)
    inside = [named for layer in anatomy.layers for named in layer.module.named_modules()]
    projections: list[nn.Module] = [
        m for name, m in inside if isinstance(m, nn.Linear | Conv1D) and "lora_" not in name
    ]
    norms = [m for m in anatomy.stack.modules() if type(m).__name__.endswith("Norm")]
    for module in projections:
        weight: Any = module.weight
        if type(weight.data) is not Tensor or not weight.is_floating_point() or weight.is_meta:
            raise ConfigError(
                f"recovery needs plain weights, but a {type(module).__name__} of this model holds "
                f"{type(weight.data).__name__} of {weight.dtype} on {weight.device}; load it whole and unquantised, or "
                "use recovery=0"
            )
    return projections, norms


def _addition(down: Tensor, up: Tensor) -> Any:
    def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0]
        more: Tensor = (x @ down.T.to(x.dtype)) @ (SCALE * up.T).to(x.dtype)
        return output + more

    return add


def _replace(stack: ExitStack, module: nn.Module, weight: Tensor) -> None:
    """Another weight, which may be no leaf, until the stack closes."""
    stack.callback(module._parameters.__setitem__, "weight", module._parameters["weight"])
    module._parameters["weight"] = weight  # type: ignore[assignment]
