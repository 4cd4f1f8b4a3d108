"""All that is known of model families: one line each. To add one: that line, and its tiny model in tests/tiny.py."""

from dataclasses import dataclass
from typing import Any

from microglia.anatomy.layouts import AttentionLayout, Fused, FusedEqual, Mlp, Separate
from microglia.registry import Registry


@dataclass(frozen=True)
class Family:
    """Where the models of a family keep what, by the names that transformers gives it.

    causal, decoder: classes of the language model and of its stack of layers. attention, mlp: how a layer's two halves
    store their projections. attention_name, mlp_name: of the halves in a layer. norms: of a layer, before attention and
    before the MLP. norms_after: of what attention and the MLP give, before it is added to the residual stream, where
    there are such. norm_offset: what is added to a norm's weight. softcap: whether attention caps its scores where its
    config says so. steps: whether a layer is nothing but norms, rotary embedding, attention and MLP, see `computation`.
    export_as: the family whose classes an export loads with (Phi-3 taken apart is Mistral). modelling: the file of
    `microglia.export` that an export's code is made of. gguf: whether llama.cpp's architecture `deci` computes it.
    """

    causal: str
    decoder: str
    attention: AttentionLayout = Separate()
    mlp: Mlp = Mlp()
    attention_name: str = "self_attn"
    mlp_name: str = "mlp"
    norms: tuple[str, str] = ("input_layernorm", "post_attention_layernorm")
    norms_after: tuple[str, ...] = ()
    norm_offset: float = 0.0
    softcap: bool = False
    steps: bool = False
    export_as: str | None = None
    modelling: str = "modeling_microglia.py"
    gguf: bool = False


GEMMA: dict[str, Any] = {
    "norms": ("input_layernorm", "pre_feedforward_layernorm"),
    "norms_after": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "norm_offset": 1.0,
    "steps": True,
}
# By the class of the attention module, which models that wrap a language model (vision and text, say) share with it.
FAMILIES: Registry[Family] = Registry(
    "family",
    {
        "LlamaAttention": Family("LlamaForCausalLM", "LlamaModel", steps=True, gguf=True),
        "MistralAttention": Family("MistralForCausalLM", "MistralModel", steps=True, gguf=True),
        "Qwen2Attention": Family("Qwen2ForCausalLM", "Qwen2Model", steps=True, gguf=True),
        "Qwen3Attention": Family("Qwen3ForCausalLM", "Qwen3Model", steps=True),
        "Gemma2Attention": Family("Gemma2ForCausalLM", "Gemma2Model", softcap=True, **GEMMA),
        "Gemma3Attention": Family("Gemma3ForCausalLM", "Gemma3TextModel", **GEMMA),
        "Phi3Attention": Family(
            "Phi3ForCausalLM",
            "Phi3Model",
            attention=Fused(),
            mlp=Mlp(("gate_up_proj",), packed=True),
            steps=True,
            export_as="MistralAttention",
            gguf=True,
        ),
        "GPT2Attention": Family(
            "GPT2LMHeadModel",
            "GPT2Model",
            attention=FusedEqual(),
            mlp=Mlp(("c_fc",), "c_proj"),
            attention_name="attn",
            norms=("ln_1", "ln_2"),
            steps=True,
            modelling="modeling_microglia_gpt2.py",
        ),
    },
)
