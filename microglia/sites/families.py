"""Attention classes we know, by name. To add a family: one line here, one tiny model in tests/tiny.py."""

from microglia.sites.layouts import Fused, Layout, Separate

FAMILIES: dict[str, Layout] = {
    "LlamaAttention": Separate(),
    "MistralAttention": Separate(),
    "Qwen2Attention": Separate(),
    "Qwen3Attention": Separate(),
    "Gemma2Attention": Separate(),
    "Gemma3Attention": Separate(),
    "Phi3Attention": Fused("qkv_proj", "o_proj"),
    "GPT2Attention": Fused("c_attn", "c_proj", transposed=True),
}
