"""A GGUF file holds the frozen model: every tensor, head counts per layer, rotations as llama.cpp makes them."""

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from microglia.errors import MicrogliaError, UnsupportedModelError
from microglia.export import export
from microglia.export.frozen import frozen
from microglia.export.to_gguf import in_pairs, read_tensor
from microglia.units import find_sites
from tests.export.plans import byte_fallback_tokenizer, byte_level_tokenizer, phi3_tokenizer, uneven_plan
from tests.tiny import tiny_model, tiny_tokenizer

gguf = pytest.importorskip("gguf", reason="gguf is not installed; pip install microglia[export]")
NAMES = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
MLP = {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}


def contents(reader, name):
    return reader.fields[name].contents()


def interleaved(x, head_dim):
    """Each head's rows back from llama.cpp's order: evens first, then odds."""
    heads = x.unflatten(0, (-1, head_dim))
    return torch.cat([heads[:, 0::2], heads[:, 1::2]], dim=1).flatten(0, 1)


@pytest.mark.parametrize(
    ("family", "changes"),
    [("llama", {}), ("llama", {"dtype": torch.bfloat16}), ("qwen2", {"tie_word_embeddings": True}), ("phi3", {})],
)
def test_every_tensor_reads_back(family, changes, tmp_path):
    model = tiny_model(family, **changes)
    plan = uneven_plan(model)
    exported = export(model, tiny_tokenizer(), plan, tmp_path / "exported", format="gguf")
    assert exported.difference == 0.0
    reader = gguf.GGUFReader(exported.folder / "model.gguf")
    found = {entry.name: read_tensor(entry) for entry in reader.tensors}
    assert contents(reader, "general.architecture") == "deci"
    assert contents(reader, "deci.attention.head_count") == [int(k.sum()) for k in plan.keep]
    with frozen(model, plan) as small:
        sites = find_sites(small)
        assert contents(reader, "deci.attention.head_count_kv") == [s.geometry.kv_heads for s in sites]
        assert sum(x.numel() for x in found.values()) == sum(x.numel() for x in small.parameters())
        assert torch.equal(found.pop("token_embd.weight"), small.model.embed_tokens.weight)
        assert torch.equal(found.pop("output_norm.weight"), small.model.norm.weight.float())
        if not small.config.tie_word_embeddings:
            assert torch.equal(found.pop("output.weight"), small.lm_head.weight)
        for site, layer in zip(sites, small.model.layers, strict=True):
            block, attention = f"blk.{site.layer.index}", layer.self_attn
            assert torch.equal(found.pop(f"{block}.attn_norm.weight"), layer.input_layernorm.weight.float())
            assert torch.equal(found.pop(f"{block}.ffn_norm.weight"), layer.post_attention_layernorm.weight.float())
            assert torch.equal(found.pop(f"{block}.ffn_down.weight"), layer.mlp.down_proj.weight)
            if family == "phi3":
                split = attention.qkv_proj.weight.split([site.geometry.width, *[site.geometry.kv_width] * 2])
                expected = {**dict(zip(("q_proj", "k_proj", "v_proj"), split, strict=True))}
                expected["o_proj"] = attention.o_proj.weight
                gate, up = layer.mlp.gate_up_proj.weight.chunk(2)
            else:
                expected = {name: getattr(attention, name).weight for name in NAMES}
                gate, up = layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight
            for name, weight in expected.items():
                rows = found.pop(f"{block}.{NAMES[name]}.weight")
                rows = interleaved(rows, site.geometry.head_dim) if name in ("q_proj", "k_proj") else rows
                assert torch.equal(rows, weight), name
                bias = getattr(getattr(attention, name, None), "bias", None)
                if bias is not None:
                    rows = found.pop(f"{block}.{NAMES[name]}.bias")
                    rows = interleaved(rows, site.geometry.head_dim) if name in ("q_proj", "k_proj") else rows
                    assert torch.equal(rows, bias.float()), name
            assert torch.equal(found.pop(f"{block}.ffn_gate.weight"), gate)
            assert torch.equal(found.pop(f"{block}.ffn_up.weight"), up)
    assert found == {}


def test_pairs_turned_as_neighbours_give_the_scores_of_transformers():
    heads, size, hidden, length = 3, 6, 10, 5
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(heads * size, hidden, generator=generator, dtype=torch.float64) for _ in range(2))
    x = torch.randn(length, hidden, generator=generator, dtype=torch.float64)
    angle = torch.arange(length)[:, None] / 100 ** (torch.arange(0, size, 2) / size)  # (T, D/2)

    def halves(rows):  # transformers: value i turns with value i + D/2
        a, b = (x @ rows.T).unflatten(-1, (heads, 2, size // 2)).unbind(-2)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    def neighbours(rows):  # llama.cpp: value 2i turns with value 2i + 1
        a, b = (x @ rows.T).unflatten(-1, (heads, size // 2, 2)).unbind(-1)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    ours = torch.einsum("thd,shd->hts", neighbours(in_pairs(q, size)), neighbours(in_pairs(k, size)))
    assert torch.allclose(ours, torch.einsum("thd,shd->hts", halves(q), halves(k)), atol=1e-12)


def test_scaled_rotations_become_factors_and_a_window_ends_the_context(tmp_path):
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    model = tiny_model("mistral", rope_parameters=rope)
    exported = export(model, tiny_tokenizer(), uneven_plan(model), tmp_path / "exported", format="gguf")
    reader = gguf.GGUFReader(exported.folder / "model.gguf")
    (factors,) = (read_tensor(entry) for entry in reader.tensors if entry.name == "rope_freqs.weight")
    assert torch.allclose(factors, torch.full((3,), 4.0))
    assert contents(reader, "deci.context_length") == 7
    assert any("context ends at 7 tokens" in sentence for sentence in exported.lost)


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gemma3_text", "gpt2"])
def test_families_that_the_architecture_lacks_are_refused(family, tmp_path):
    model = tiny_model(family)
    with pytest.raises(UnsupportedModelError, match="cannot become GGUF"):
        export(model, tiny_tokenizer(), uneven_plan(model), tmp_path / "exported", format="gguf")


def test_a_tensor_that_reads_back_otherwise_is_named(tmp_path, monkeypatch):
    model = tiny_model("llama")
    monkeypatch.setattr("microglia.export.to_gguf._stored", lambda tensor: tensor.detach().float().numpy() * 2)
    with pytest.raises(MicrogliaError, match=r"blk\.0\.attn_k\.bias reads back differently"):
        export(model, tiny_tokenizer(), uneven_plan(model), tmp_path / "exported", format="gguf")


# --- tokenizers ------------------------------------------------------------------------------------------------------


def bpe(vocabulary, merges, **options):
    vocabulary = {token: index for index, token in enumerate(vocabulary)}
    return Tokenizer(models.BPE(vocabulary, merges, **options))


def test_byte_level_bpe_is_written_with_its_merges(tmp_path):
    tokenizer = bpe(["<pad>", "<eos>", "a", "b", "ab", "Ġ"], [("a", "b")])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    model = tiny_model("llama")
    exported = export(model, fast, uneven_plan(model), tmp_path / "exported", format="gguf")
    reader = gguf.GGUFReader(exported.folder / "model.gguf")
    assert contents(reader, "tokenizer.ggml.model") == "gpt2"
    assert contents(reader, "tokenizer.ggml.pre") == "smollm"
    tokens = contents(reader, "tokenizer.ggml.tokens")
    assert tokens[:6] == ["<pad>", "<eos>", "a", "b", "ab", "Ġ"]
    assert tokens[6:] == [f"[PAD{index}]" for index in range(6, 97)]
    assert contents(reader, "tokenizer.ggml.token_type")[:7] == [3, 3, 1, 1, 1, 1, 5]
    assert contents(reader, "tokenizer.ggml.merges") == ["a b"]
    assert contents(reader, "tokenizer.ggml.eos_token_id") == 1


def test_bpe_with_bytes_is_written_with_scores_in_the_order_of_its_merges(tmp_path):
    words = ["<unk>", "<s>", "</s>", "<0x41>", "▁", "a", "b", "▁a", "▁ab"]
    tokenizer = bpe(words, [("▁", "a"), ("▁a", "b")], byte_fallback=True, unk_token="<unk>")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    model = tiny_model("llama")
    exported = export(model, fast, uneven_plan(model), tmp_path / "exported", format="gguf")
    reader = gguf.GGUFReader(exported.folder / "model.gguf")
    assert contents(reader, "tokenizer.ggml.model") == "llama"
    scores = contents(reader, "tokenizer.ggml.scores")
    assert scores[7] == 0.0 > scores[8] == -1.0 > scores[5]
    assert contents(reader, "tokenizer.ggml.token_type")[3] == 6
    assert contents(reader, "tokenizer.ggml.add_space_prefix") is True


def test_a_tokenizer_with_more_tokens_than_the_embedding_has_rows_is_refused(tmp_path):
    tokenizer = byte_level_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer) - 1)
    with pytest.raises(UnsupportedModelError, match=r"the token 'Ġa' of id 98, but the embedding has 98 rows"):
        export(model, tokenizer, uneven_plan(model), tmp_path / "exported", format="gguf")
    assert not (tmp_path / "exported").exists()


def test_the_name_is_neutral_unless_its_rule_is_the_tokenizers(tmp_path):
    """llama.cpp strips white space behind special tokens in models that are called phi-3, and wants their tokens."""
    names = {}
    for kind, tokenizer in (("neutral", byte_fallback_tokenizer()), ("stripping", phi3_tokenizer())):
        model = tiny_model("phi3", vocab_size=len(tokenizer))
        model.config._name_or_path = "somebody/phi-3-tuned"
        exported = export(model, tokenizer, uneven_plan(model), tmp_path / kind, format="gguf")
        names[kind] = contents(gguf.GGUFReader(exported.folder / "model.gguf"), "general.name")
    assert names == {"neutral": "microglia", "stripping": "phi-3"}


def test_white_space_that_llama_cpp_reads_otherwise_is_said(tmp_path):
    stripping = byte_level_tokenizer()
    stripping.add_tokens([AddedToken("<end>", lstrip=True, special=True)])
    kinds = {"plain": byte_level_tokenizer(), "stripping": stripping, "space at first": byte_fallback_tokenizer()}
    for kind, tokenizer in kinds.items():
        model = tiny_model("llama", vocab_size=len(tokenizer))
        exported = export(model, tokenizer, uneven_plan(model), tmp_path / kind, format="gguf")
        said = any("other white space beside special tokens" in sentence for sentence in exported.lost)
        assert said == (kind != "plain"), kind


def test_a_tokenizer_of_another_kind_is_left_out_and_said(tmp_path):
    model = tiny_model("llama")
    exported = export(model, tiny_tokenizer(), uneven_plan(model), tmp_path / "exported", format="gguf")
    assert any("the tokenizer is of a kind" in sentence for sentence in exported.lost)
