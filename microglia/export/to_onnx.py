"""One ONNX graph that reads prompts and writes answers: its key/value cache comes in and goes out as tensors."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.cache_utils import Cache, DynamicLayer

from microglia.anatomy import Anatomy
from microglia.errors import ConfigError, MicrogliaError, UnsupportedModelError
from microglia.execution.captured.rope import rotaries
from microglia.export.frozen import Written, probe
from microglia.export.precise import float32_allowance, float64_logits

GRAPH = "model.onnx"
OPSET = 20
TEXT_ONLY = "the graph reads text only: what the model does with images or sound is no part of it"
LENGTH = 19  # tokens of the comparison
STEPS = 3  # the last of them, which are read one by one


def write_onnx(lm: Any, tokenizer: PreTrainedTokenizerBase, folder: Path, *, check: bool) -> Written:
    """Write the frozen model `lm` as model.onnx. Returns its largest difference to float64 in logits (None unchecked).

    Raises ConfigError for other types than float32, UnsupportedModelError for rotary embeddings that change with the
    length, MicrogliaError when ONNX Runtime answers differently.
    """
    if lm.dtype != torch.float32:
        raise ConfigError(
            f"the model is in {lm.dtype}, but the graph is written in float32; load it with dtype float32"
        )
    for rotary in rotaries(lm):
        raise UnsupportedModelError(
            f"the rotary embedding is of type {rotary.kind}, whose frequencies change with the length (after "
            f"{rotary.limit} tokens), and a graph holds one set of them; export it with --format hf, or a model whose "
            "rotary embedding is fixed"
        )
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MicrogliaError(f"format onnx needs {error.name}; pip install 'microglia[export]'") from error

    backend = Anatomy(lm).attention_backend
    lm.set_attn_implementation("eager")
    try:
        step = _Step(lm)
        _save(step, folder / GRAPH)
        tokenizer.save_pretrained(folder)
        difference = _difference(lm, onnxruntime.InferenceSession(folder / GRAPH)) if check else None
    finally:
        lm.set_attn_implementation(backend)
    return difference, [] if lm.config is Anatomy(lm).text_config else [TEXT_ONLY]


class _Step(nn.Module):
    """One forward pass whose cache is a flat list of tensors, key and value (B, G, P, D) of each site in turn."""

    def __init__(self, lm: Any) -> None:
        super().__init__()
        self.lm, self.anatomy = lm, Anatomy(lm)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Tensor]) -> Any:
        """Ids and positions (B, T), mask (B, P + T) → logits (B, T, V), then keys and values (B, G, P + T, D)."""
        layers: list[Any] = [_cache_layer(key, value) for key, value in zip(past[::2], past[1::2], strict=True)]
        output = self.lm(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=Cache(layers=layers),
            use_cache=True,
        )
        return output.logits, [x for layer in output.past_key_values.layers for x in (layer.keys, layer.values)]


def _cache_layer(key: Tensor, value: Tensor) -> DynamicLayer:
    layer = DynamicLayer()
    layer.lazy_initialization(key, value)
    layer.keys, layer.values = key, value
    return layer


def empty_past(lm: Any, rows: int = 1) -> list[Tensor]:
    """A cache without a token: (rows, G, 0, D) twice per site."""
    sizes = [(rows, x.heads.kv_heads, 0, x.heads.head_dim) for x in Anatomy(lm).layers for _ in range(2)]
    return [torch.zeros(size, dtype=lm.dtype) for size in sizes]


def _save(step: _Step, path: Path) -> None:
    rows, past, new = 2, 3, 5  # of the example; none of them 0 or 1, which torch would take for fixed
    example = [x.new_zeros(rows, x.shape[1], past, x.shape[3]) for x in empty_past(step.lm)]
    ids = torch.ones(rows, new, dtype=torch.long)
    mask, positions = torch.ones(rows, past + new, dtype=torch.long), torch.arange(past, past + new).expand(rows, new)
    batch, before, length, total = (torch.export.Dim.DYNAMIC for _ in range(4))
    shapes = {
        "input_ids": {0: batch, 1: length},
        "attention_mask": {0: batch, 1: total},
        "position_ids": {0: batch, 1: length},
        "past": [{0: batch, 2: before} for _ in example],
    }
    sites = range(len(step.anatomy.layers))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporter warns of its own deprecated calls
        program = torch.onnx.export(
            step.eval(),
            (ids, mask, positions, example),
            dynamo=True,
            dynamic_shapes=shapes,
            input_names=["input_ids", "attention_mask", "position_ids", *_cache_names("past_key_values", sites)],
            output_names=["logits", *_cache_names("present", sites)],
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None
    program.save(path, external_data=True)


def _cache_names(prefix: str, sites: range) -> list[str]:
    return [f"{prefix}.{index}.{kind}" for index in sites for kind in ("key", "value")]


def run_step(session: Any, ids: Tensor, past: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """One pass of the graph over unpadded ids (1, T): logits (1, T, V) and the longer cache."""
    before, length = past[0].shape[2], ids.shape[1]
    inputs = [ids, torch.ones(1, before + length, dtype=torch.long), torch.arange(before, before + length)[None], *past]
    names = [entry.name for entry in session.get_inputs()]
    logits, *present = session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})
    return torch.from_numpy(logits), [torch.from_numpy(x) for x in present]


@torch.inference_mode()
def _difference(lm: Any, session: Any) -> float:
    """The graph's largest difference to float64 in logits, over a prompt and some decode steps on its own cache.

    Raises MicrogliaError when it is larger than what float32 explains.
    """
    ids = probe(lm, LENGTH).cpu()
    exact = float64_logits(lm, ids)
    past, steps = empty_past(lm), []
    for part in ids.split([LENGTH - STEPS, *[1] * STEPS], dim=1):
        logits, past = run_step(session, part, past)
        steps.append(logits)
    difference = float((torch.cat(steps, 1) - exact).abs().max())
    allowed = float32_allowance(lm, ids, exact)
    if not difference <= allowed:
        raise MicrogliaError(
            f"ONNX Runtime's logits differ from a float64 pass by {difference:.3g}, where rounding explains "
            f"{allowed:.3g} (the largest is {float(exact.abs().max()):.3g}), so the graph was not kept; report this "
            "with the model's name"
        )
    return difference
