"""Load a model and its tokenizer from a hub id, a local folder, a module in memory, or the embedded reasoner."""

from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from microglia import processes
from microglia.errors import MicrogliaError, UnsupportedModelError, check_choice, first_line

QUANTIZATIONS = ("int8", "int4")
INT4_GROUP = 32  # weights that share a scale; divides the head size of every usual model, so heads can be cut out
REASONER = "reasoner"  # the model that ships with the package: the default, needs no network


def reasoner_path() -> Path:
    """Folder of the embedded reasoner in the installed package."""
    return Path(str(resources.files("microglia.reasoner") / "model"))


def is_reasoner(lm: nn.Module) -> bool:
    """Whether a model was loaded from the embedded reasoner's folder."""
    return str(getattr(getattr(lm, "config", None), "_name_or_path", "")) == str(reasoner_path())


def load_model(
    model: str | Path | nn.Module = REASONER,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    quantize: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, PreTrainedTokenizerBase]:
    """A causal LM in evaluation mode and its tokenizer, padding on the left and with a padding token.

    `model` is `reasoner`, a hub id, a local folder or a module in memory. `dtype` None means float32 on a CPU and the
    stored type elsewhere. `quantize` is int8 or int4: weight-only, by torchao, of the layers' linear weights. Raises
    MicrogliaError when nothing can be loaded from there.
    """
    processes.join()  # each has a device of its own, which `cuda` then means
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if isinstance(model, nn.Module):
        source, lm = getattr(getattr(model, "config", None), "_name_or_path", ""), model
    else:
        source = str(reasoner_path()) if str(model) == REASONER else str(model)
        lm = _from_pretrained(source, dtype or (torch.float32 if device.type == "cpu" else "auto"), trust_remote_code)
        lm.to(device)
    if quantize is not None:
        quantise(lm, quantize)
    if tokenizer is None:
        tokenizer = _tokenizer(source, trust_remote_code)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return lm.eval(), tokenizer


def _from_pretrained(source: str, dtype: Any, trust_remote_code: bool) -> Any:
    folder = Path(source)
    if folder.exists() and not (folder / "config.json").is_file():
        raise MicrogliaError(
            f"{source} holds no config.json; give a folder written by save_pretrained, a hub id or {REASONER!r}"
        )
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:  # a damaged config.json raises whatever its values come across
        raise MicrogliaError(
            f"no model could be found at {source!r} ({first_line(error)}); "
            f"give a hub id, a local folder or {REASONER!r}"
        ) from error
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{source} is an encoder-decoder model ({config.model_type}); microglia prunes decoder-only models"
        )
    try:
        # use_safetensors: no pickle is ever loaded
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, trust_remote_code=trust_remote_code, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # truncated and corrupt files raise safetensors', hub's and torch's own kinds
        raise MicrogliaError(
            f"the weights at {source!r} could not be loaded ({first_line(error)}); "
            "download or save them again as safetensors"
        ) from error
    lm, report = loaded
    if missing := sorted(report["missing_keys"]):  # transformers draws them at random, with no more than a warning
        raise MicrogliaError(
            f"the weights at {source!r} lack {missing[0]}{f' and {len(missing) - 1} more' * (len(missing) > 1)}, which "
            f"a {type(lm).__name__} of its config.json has; give the config.json and the weights of one model"
        )
    return lm


def quantise(lm: Any, kind: str) -> None:
    """Quantise the linear weights of the layers, in place; embeddings and the output head stay as they are.

    kind: int8 (one scale a row) or int4 (one scale for every 32 inputs); the activations are not touched.
    """
    check_choice("quantize", kind, QUANTIZATIONS)
    try:
        from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_
    except ImportError as error:
        raise MicrogliaError(
            f"quantize={kind!r} needs torchao, which is not installed; pip install 'microglia[quant]'"
        ) from error
    inner = getattr(lm, lm.base_model_prefix)
    if not any(isinstance(module, nn.Linear) for module in inner.modules()):
        raise MicrogliaError(
            f"{type(lm).__name__} has no nn.Linear weights, which torchao quantises; leave quantize out"
        )
    int4 = IntxWeightOnlyConfig(torch.int4, PerGroup(INT4_GROUP))  # type: ignore[attr-defined]
    quantize_(inner, Int8WeightOnlyConfig() if kind == "int8" else int4)


def _tokenizer(source: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    if not source:
        raise MicrogliaError("a model in memory does not say where its tokenizer is; pass tokenizer=")
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
        names = [*tokenizer.vocab_files_names.values()]
        # Older transformers 5 make up a tokenizer without a vocabulary where others raise.
        if names and Path(source).is_dir() and not any((Path(source) / name).is_file() for name in names):
            raise ValueError(f"there is no {' or '.join(names)}")
        return tokenizer
    except Exception as error:  # a damaged tokenizer.json raises KeyError and tokenizers' bare Exception too
        raise MicrogliaError(
            f"no tokenizer could be loaded from {source!r} ({first_line(error)}); pass tokenizer="
        ) from error
