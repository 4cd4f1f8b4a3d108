"""A GGUF file becomes a folder of safetensors, once.

transformers reads the file; what comes out calls itself quantised and cannot be saved, so its weights move into a plain
model of the same configuration. What the file says beyond that is put right here: two roundings of one tied matrix, the
tokens that end an answer, how text is split before it is tokenised.
"""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import quantization_config

from microglia.catalogue.cache import alone, checksum, final, kept, made
from microglia.catalogue.known import KNOWN, PLACES
from microglia.catalogue.splits import pre_tokenizer
from microglia.errors import MicrogliaError, UnsupportedModelError, first_line

INPUT, OUTPUT = "token_embd.weight", "output.weight"  # llama.cpp's names of the embeddings and the output head
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ALIKE = 0.9  # least cosine of two roundings of one matrix; that of two different matrices is near 0
# Control tokens that end an answer in some family; llama.cpp stops at them too, whatever the file calls its end.
ENDS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "</s>", "<eos>")
NUMBERS = "numbers"  # how many weights the file holds, beside its own fields
VOCABULARY = (".tokens", ".merges", ".scores", ".token_type")  # of a file's fields, the long ones


def dequantised(file: Path | str, *, repository: str | None = None) -> Path:
    """The folder in the cache that holds this GGUF file as a plain model with its tokenizer; made where it is missing.

    Matrices are kept as float16, which holds what four to eight bits mean to 2e-4 of their size, or in the file's type
    where that is a float; vectors as float32. repository: of the Hub, where the file comes from there. Raises
    MicrogliaError for a file that cannot be read.
    """
    file = Path(file)
    if not file.is_file():
        raise MicrogliaError(f"there is no file {file}; {PLACES}")
    sha256 = checksum(file)
    with alone(sha256):
        if (folder := kept(sha256)) is not None:
            return folder
        fields, types = _contents(file)
        lm, tokenizer = _read(file, fields[NUMBERS])
        name = next((name for name, known in KNOWN.items() if known.sha256 == sha256), None)
        about = {"file": file.name, "sha256": sha256, "bytes": file.stat().st_size, "types": sorted({*types.values()})}
        if name is not None:
            about |= {"model": name, "source": KNOWN[name].repository, "licence": KNOWN[name].licence}
        else:
            place = str(file.absolute())
            about |= {"model": f"{repository}::{file.name}" if repository else place, "source": repository or place}
            about["licence"] = fields.get("general.license")
        with made(name or file.stem, sha256, about) as folder:
            _save(lm, tokenizer, folder, fields, types)
        return final(name or file.stem, sha256)


def check_gguf() -> None:
    """Raise MicrogliaError where GGUF files cannot be read."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise MicrogliaError("a GGUF file needs gguf, which is not installed; pip install 'microglia[gguf]'") from error


def _contents(file: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The file's fields but for the vocabulary, and the type of each of its matrices."""
    check_gguf()
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
    except Exception as error:  # ValueError for what is no GGUF, IndexError and others for what is cut short
        raise MicrogliaError(
            f"{file} is no GGUF file, or is damaged ({first_line(error)}); fetch or copy it again"
        ) from error
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.endswith(VOCABULARY)}
    fields[NUMBERS] = sum(int(tensor.n_elements) for tensor in reader.tensors)
    return fields, {tensor.name: tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1}


def _read(file: Path, numbers: int) -> tuple[Any, Any]:
    """The model with all its weights in float32, and its tokenizer. numbers: how many weights the file holds."""
    options: dict[str, Any] = {"gguf_file": file.name}
    if hasattr(quantization_config, "GgufConfig"):  # older transformers 5 know nothing but unpacked weights
        whole = quantization_config.GgufConfig(gguf_file=file.name, dequantize=True)
        options["quantization_config"] = whole
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            file.parent, dtype=torch.float32, output_loading_info=True, **options
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except Exception as error:  # ValueError, KeyError and NotImplementedError for what transformers does not know
        raise UnsupportedModelError(
            f"transformers cannot read {file} ({first_line(error)}); give a file of a family that it knows, or the "
            "model's safetensors"
        ) from error
    lm, report = loaded
    if missing := sorted(report["missing_keys"]):  # a file in several parts, say; transformers draws the rest at random
        raise MicrogliaError(
            f"{file} lacks {missing[0]}{f' and {len(missing) - 1} more' * (len(missing) > 1)}; give a file that holds "
            "the whole model"
        )
    if numbers != (found := sum(parameter.numel() for parameter in lm.parameters())):
        raise UnsupportedModelError(  # biases or factors of the rotary embedding, which transformers drops in silence
            f"{file} holds {numbers:,} weights, but the {type(lm).__name__} that transformers makes of it {found:,}; "
            "give the model's safetensors"
        )
    return lm, tokenizer


def _save(lm: Any, tokenizer: Any, folder: Path, fields: Mapping[str, Any], types: Mapping[str, str]) -> None:
    """Write weights, configuration and tokenizer as a model that nothing is special about."""
    _tie(lm, types)
    config = lm.config
    for name in ("quantization_config", "_model_name_or_path"):
        with suppress(AttributeError):
            delattr(config, name)
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config)
    kind = _stored(types)
    plain.load_state_dict({key: _as(kind, tensor) for key, tensor in lm.state_dict().items()}, assign=True)
    plain.tie_weights()
    plain.generation_config.eos_token_id = _ends(tokenizer)
    if (split := pre_tokenizer(fields.get("tokenizer.ggml.pre", ""))) is not None:
        tokenizer.backend_tokenizer.pre_tokenizer = split
    plain.save_pretrained(folder)
    # Where "as stored" is asked for: models whose weights were made smaller were trained in bfloat16, and the
    # activations of some overflow float16.
    plain.config.dtype = kind if {*types.values()} <= {*FLOATS} else torch.bfloat16
    plain.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _tie(lm: Any, types: Mapping[str, str]) -> None:
    """Where embeddings and output head are two roundings of one matrix, take the finer one for both."""
    if lm.config.tie_word_embeddings or OUTPUT not in types:
        return
    embeddings, head = lm.get_input_embeddings().weight, lm.get_output_embeddings().weight
    if embeddings.shape != head.shape or functional.cosine_similarity(embeddings.flatten(), head.flatten(), 0) < ALIKE:
        return
    finer = embeddings if _bits(types[INPUT]) > _bits(types[OUTPUT]) else head
    with torch.no_grad():
        embeddings.copy_(finer)
        head.copy_(finer)
    lm.config.tie_word_embeddings = True


def _bits(kind: str) -> float:
    """Bits that a type of llama.cpp takes for a weight."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    weights, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return 8 * size / weights


def _stored(types: Mapping[str, str]) -> torch.dtype:
    """What matrices are kept in: the file's float type, float32 for a mixture, float16 for anything quantised."""
    kinds = {*types.values()}
    if kinds <= {*FLOATS}:
        return FLOATS[kinds.pop()] if len(kinds) == 1 else torch.float32
    return torch.float16


def _as(kind: torch.dtype, tensor: Tensor) -> Tensor:
    """A matrix in that type, unless it holds numbers that the type does not reach; a vector as it is."""
    small = tensor.to(kind) if tensor.dim() > 1 else tensor
    return small if small.isfinite().all() else tensor


def _ends(tokenizer: Any) -> list[int]:
    """The token that the file says ends a text, then the others that do."""
    added = {token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    ends = [tokenizer.eos_token_id, *(added[name] for name in ENDS if name in added)]
    return list(dict.fromkeys(end for end in ends if end is not None))
