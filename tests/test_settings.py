"""Settings of a generation: whoever sets them, they are honoured, as if unset, or refused in one sentence."""

import copy
import threading
from typing import Any

import peft
import pytest
import torch
from transformers import (
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
)

from microglia.attach import attached
from microglia.errors import ConfigError, MicrogliaError, UnsupportedModelError
from microglia.execution import Captured
from microglia.generation import generate
from microglia.models import load_model
from microglia.policies import StaticPolicy
from microglia.pruner import Pruner
from microglia.settings import TOKENS, end_tokens, merged, pad_token, without_defaults
from microglia.units import find_sites
from tests.tiny import tiny_model, tiny_prompts, tiny_tokenizer, uneven, wild

PROMPTS = ["what is 3+4?", "7*8-2="]
IDS, MASK = tiny_prompts(9, 5)

# Every field of a GenerationConfig, with a value that would change something if it were followed.
ON_THE_MODEL: dict[str, Any] = {
    "max_length": 2,
    "max_new_tokens": 1,
    "min_length": 30,
    "min_new_tokens": 30,
    "early_stopping": True,
    "max_time": 0.0,
    "stop_strings": ["1", "a", "7"],
    "do_sample": True,
    "num_beams": 3,
    "use_mtp": True,
    "use_cache": False,
    "cache_implementation": "static",
    "cache_config": {"backend": "quanto"},
    "max_cache_len": 12,
    "temperature": 9.0,
    "top_k": 2,
    "top_p": 0.1,
    "min_p": 0.5,
    "top_h": 0.5,
    "typical_p": 0.5,
    "epsilon_cutoff": 0.1,
    "eta_cutoff": 0.1,
    "repetition_penalty": 5.0,
    "encoder_repetition_penalty": 5.0,
    "length_penalty": 3.0,
    "no_repeat_ngram_size": 1,
    "bad_words_ids": [[i] for i in range(30)],
    "renormalize_logits": True,
    "forced_bos_token_id": 7,
    "forced_eos_token_id": 7,
    "remove_invalid_values": True,
    "exponential_decay_length_penalty": (1, 5.0),
    "suppress_tokens": list(range(30)),
    "begin_suppress_tokens": list(range(30)),
    "sequence_bias": [[[7], 100.0]],
    "token_healing": True,
    "guidance_scale": 3.0,
    "watermarking_config": {"bias": 9.0},
    "num_return_sequences": 2,
    "output_attentions": True,
    "output_hidden_states": True,
    "output_scores": True,
    "output_logits": True,
    "return_dict_in_generate": True,
    "encoder_no_repeat_ngram_size": 1,
    "decoder_start_token_id": 7,
    "is_assistant": True,
    "num_assistant_tokens": 3,
    "num_assistant_tokens_schedule": "constant",
    "assistant_confidence_threshold": 0.9,
    "prompt_lookup_num_tokens": 3,
    "max_matching_ngram_size": 2,
    "assistant_early_exit": 1,
    "assistant_lookbehind": 3,
    "target_lookbehind": 3,
    "assistant_ensemble_weight": 0.5,
    "speculation_type": "suffix",
    "compile_config": {},
    "disable_compile": True,
    "continuous_batching_config": {},
    "low_memory": True,
    "penalty_alpha": 0.6,
    "dola_layers": "low",
    "diversity_penalty": 1.0,
    "num_beam_groups": 2,
    "constraints": [],
    "force_words_ids": [[7]],
    "prefill_chunk_size": 3,
}
EXECUTIONS = ("masked", "compact", "captured", None)  # None: dense


def answers(model, pruner, execution):
    options = {"execution": execution or "compact", "max_new_tokens": 6, "eos_token_id": None}
    return generate(model, tiny_tokenizer(), PROMPTS, pruner if execution else None, **options)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def truths(model):
    return {execution: answers(model, uneven(model), execution) for execution in EXECUTIONS}


def test_every_field_of_this_version_is_tried() -> None:
    fields = {name for name in GenerationConfig().to_dict() if not name.startswith("_")}
    assert fields - {*ON_THE_MODEL, *TOKENS, "transformers_version"} == set()


@pytest.mark.parametrize("name", [name for name in ON_THE_MODEL if hasattr(GenerationConfig(), name)])
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_what_the_model_says_of_anything_but_tokens_is_as_if_unset(model, truths, name, execution, monkeypatch) -> None:
    config = GenerationConfig()
    setattr(config, name, ON_THE_MODEL[name])
    monkeypatch.setattr(model, "generation_config", config)
    result = answers(model, uneven(model), execution)
    assert result.tokens.equal(truths[execution].tokens)
    assert [len(k) for k in result.keep] == [2] * len(truths[execution].keep)
    assert model.generation_config is config


@pytest.mark.parametrize("name", ["prefill_chunk_size", "prompt_lookup_num_tokens", "use_cache", "guidance_scale"])
@pytest.mark.parametrize("where", ["option", "config", "model"])
def test_what_cannot_be_pruned_is_refused_in_a_generation_of_the_callers_own(model, name, where, monkeypatch) -> None:
    value = ON_THE_MODEL[name]
    options = {"option": {name: value}, "config": {"generation_config": GenerationConfig(**{name: value})}, "model": {}}
    if where == "model":
        monkeypatch.setattr(model, "generation_config", GenerationConfig(**{name: value}))
    with attached(model, uneven(model)), pytest.raises(ConfigError, match=f"{name}.*leave it out"):
        model.generate(input_ids=IDS, attention_mask=MASK, max_new_tokens=3, **options[where])
    assert "generate" not in vars(model)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prefill_chunk_size", 3),
        ("prompt_lookup_num_tokens", 3),
        ("use_cache", False),
        ("guidance_scale", 2.0),
        ("token_healing", True),
        ("compile_config", CompileConfig()),
        ("assistant_model", object()),
    ],
)
def test_what_cannot_be_pruned_is_refused(model, name, value) -> None:
    config = GenerationConfig()
    for options in [{name: value}] + ([{"generation_config": config}] if hasattr(config, name) else []):
        setattr(config, name, value)
        with pytest.raises(ConfigError, match=f"{name}.*leave it out"):
            generate(model, tiny_tokenizer(), PROMPTS, uneven(model), max_new_tokens=3, **options)


def test_guidance_of_one_is_none(model) -> None:
    result = generate(model, tiny_tokenizer(), PROMPTS, uneven(model), max_new_tokens=3, guidance_scale=1.0)
    assert len(result.keep) == 2


@pytest.mark.parametrize("execution", ["masked", "compact", "captured"])
def test_a_configuration_of_the_callers_own_is_followed(model, execution) -> None:
    def answer(**options):
        return generate(model, tiny_tokenizer(), PROMPTS, uneven(model), execution=execution, **options)

    plain = answer(max_new_tokens=6, eos_token_id=None)
    penalised = answer(max_new_tokens=6, eos_token_id=None, repetition_penalty=5.0)
    config = GenerationConfig(max_new_tokens=6, repetition_penalty=5.0)
    before = copy.deepcopy(config)
    same = answer(generation_config=config, eos_token_id=None)
    assert same.tokens.equal(penalised.tokens)
    assert not same.tokens.equal(plain.tokens)
    assert config == before
    assert answer(generation_config=config, max_new_tokens=2, eos_token_id=None).tokens.shape == (2, 2)


def test_sampling_in_the_callers_configuration_samples(model) -> None:
    def answer(**options):
        torch.manual_seed(3)
        return generate(model, tiny_tokenizer(), PROMPTS, uneven(model), eos_token_id=None, **options).tokens

    config = GenerationConfig(do_sample=True, temperature=5.0, max_new_tokens=12)
    sampled = answer(generation_config=config)
    assert sampled.equal(answer(do_sample=True, temperature=5.0, max_new_tokens=12))
    assert not sampled.equal(answer(max_new_tokens=12))


def test_who_samples_does_so_as_the_model_says(model, monkeypatch) -> None:
    def answer(**options):
        torch.manual_seed(3)
        options = {"do_sample": True, "max_new_tokens": 12, "eos_token_id": None, **options}
        return generate(model, tiny_tokenizer(), PROMPTS, uneven(model), **options).tokens

    cold, hot = answer(temperature=0.01), answer(temperature=5.0)
    assert not cold.equal(hot)
    monkeypatch.setattr(model, "generation_config", GenerationConfig(temperature=5.0))
    assert answer().equal(hot)
    assert answer(temperature=0.01).equal(cold)


def test_lengths_that_count_the_prompt_are_refused(model) -> None:
    with pytest.raises(ConfigError, match="max_length=40 was given, which counts the prompt too; give max_new_tokens"):
        generate(model, tiny_tokenizer(), PROMPTS, max_length=40)


def test_stop_texts_need_no_tokenizer() -> None:
    reasoner, tokenizer = load_model("reasoner")
    pruner = Pruner(StaticPolicy.random([site.geometry for site in find_sites(reasoner)], seed=0))

    def answer(**options):
        options = {"max_new_tokens": 12, "eos_token_id": None, **options}
        return generate(reasoner, tokenizer, ["Tom has 3 apples and buys 4. Answer:"], pruner, **options)

    full = answer()
    stop = full.texts[0][-4:]
    result = answer(max_new_tokens=40, stop_strings=[stop])
    assert result.texts[0].endswith(stop)
    assert result.lengths[0] < 40
    assert answer(max_new_tokens=40, generation_config=GenerationConfig(stop_strings=[stop])).texts == result.texts


def test_every_end_of_the_model_ends_an_answer_and_its_length(model, monkeypatch) -> None:
    full = generate(model, tiny_tokenizer(), PROMPTS, max_new_tokens=8, eos_token_id=None)
    ends = sorted({int(full.tokens[0, 2]), int(full.tokens[1, 4])})
    expected = [next((i + 1 for i, token in enumerate(row) if token in ends), 8) for row in full.tokens.tolist()]
    monkeypatch.setattr(model, "generation_config", GenerationConfig(eos_token_id=ends))
    for execution in EXECUTIONS:
        result = generate(model, tiny_tokenizer(), PROMPTS, None, execution=execution or "dense", max_new_tokens=8)
        assert result.lengths == expected
        assert result.tokens.shape[1] == max(expected)
    assert end_tokens(model, tiny_tokenizer()) == tuple(ends)


def test_a_padding_token_is_one_that_the_model_has(model) -> None:
    tokenizer = tiny_tokenizer()
    usual = generate(model, tokenizer, PROMPTS, uneven(model), max_new_tokens=5, eos_token_id=None)
    tokenizer.add_special_tokens({"pad_token": "<beyond>"})
    assert tokenizer.pad_token_id >= model.get_input_embeddings().num_embeddings
    assert pad_token(model, tokenizer) < model.get_input_embeddings().num_embeddings
    result = generate(model, tokenizer, PROMPTS, uneven(model), max_new_tokens=5, eos_token_id=None)
    assert result.tokens.equal(usual.tokens)


def test_a_tokenizer_without_padding_and_end_serves(model) -> None:
    tokenizer = tiny_tokenizer()
    usual = generate(model, tokenizer, PROMPTS, uneven(model), max_new_tokens=5, eos_token_id=None)
    tokenizer.pad_token = tokenizer.eos_token = None
    result = generate(model, tokenizer, PROMPTS, uneven(model), max_new_tokens=5)
    assert result.tokens.equal(usual.tokens)
    assert result.lengths == [5, 5]


def test_the_models_defaults_are_there_for_everybody_else(model, monkeypatch) -> None:
    config = GenerationConfig(max_new_tokens=3, eos_token_id=[5, 6])
    monkeypatch.setattr(model, "generation_config", config)
    seen = []

    class Reading(StoppingCriteria):
        def __call__(self, ids, scores, **_):
            seen.append((model.generation_config, model.generate(IDS, attention_mask=MASK).shape[1]))
            return torch.zeros(len(ids), dtype=torch.bool)

    generate(model, tiny_tokenizer(), PROMPTS, max_new_tokens=2, stopping_criteria=StoppingCriteriaList([Reading()]))
    assert len(seen) == 2
    assert all(given is config and length <= 9 + 3 for given, length in seen)
    other = without_defaults(model)
    assert other.generation_config is not config
    assert other.model is model.model


@pytest.mark.parametrize("name", ["input_ids", "attention_mask", "inputs_embeds"])
def test_what_is_made_from_the_prompts_is_refused(model, name) -> None:
    with pytest.raises(ConfigError, match=f"{name} is made from the prompts; leave it out"):
        generate(model, tiny_tokenizer(), PROMPTS, **{name: IDS})


@pytest.mark.parametrize("options", [{"past_key_values": DynamicCache()}, {"cache_implementation": "static"}])
def test_captured_steps_bring_their_own_cache(model, options) -> None:
    with pytest.raises(ConfigError, match=r"was given, but execution='captured' has a cache of its own"):
        generate(model, tiny_tokenizer(), PROMPTS, uneven(model), execution="captured", max_new_tokens=3, **options)


@pytest.mark.parametrize("make", [uneven, wild], ids=["shared", "rows"])
def test_a_cache_that_lost_heads_says_so_afterwards(model, make) -> None:
    cache, pruner = DynamicCache(config=model.config), make(model)
    generate(model, tiny_tokenizer(), PROMPTS, pruner, max_new_tokens=3, eos_token_id=None, past_key_values=cache)
    with pytest.raises(MicrogliaError, match="this cache lost heads to an answer that is over"):
        model(IDS[:, :1], past_key_values=cache)


def test_a_length_of_the_models_gives_way_to_one_of_the_callers(model) -> None:
    config = GenerationConfig(max_length=40)
    result = generate(model, tiny_tokenizer(), PROMPTS, generation_config=config, max_new_tokens=4, eos_token_id=None)
    assert result.tokens.shape == (2, 4)


def test_padding_is_no_answer_and_tokens_that_look_like_it_are(model) -> None:
    settings = merged(model, tiny_tokenizer(), {"eos_token_id": None, "pad_token_id": 0}, pruned=False)
    assert settings.lengths(torch.tensor([[5, 6, 0, 0]])) == [4]
    options = {"eos_token_id": None, "pad_token_id": 0, "max_time": 3.0}
    assert merged(model, tiny_tokenizer(), options, pruned=False).lengths(torch.tensor([[5, 6, 0, 0]])) == [2]


def test_settings_given_by_position_are_looked_at_too(model) -> None:
    with attached(model, uneven(model)), pytest.raises(ConfigError, match="prefill_chunk_size"):
        model.generate(IDS, GenerationConfig(prefill_chunk_size=4, max_new_tokens=5), attention_mask=MASK)
    with attached(model, uneven(model)) as trace:
        model.generate(IDS, attention_mask=MASK, max_new_tokens=3)
    assert trace.prompts == 1


def test_a_pass_may_give_a_tuple(model) -> None:
    with attached(model, uneven(model), "compact") as trace:
        output = model(input_ids=IDS, attention_mask=MASK, return_dict=False)
        model(input_ids=IDS[:, :1], past_key_values=output[1], return_dict=False)
    assert trace.prompts == 1


@pytest.mark.parametrize("targets", [["embed_tokens", "q_proj"]])
def test_a_wrapped_embedding_has_its_rows(targets) -> None:
    wrapped = peft.get_peft_model(
        tiny_model("llama"), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=targets, init_lora_weights=True)
    )
    assert generate(wrapped, tiny_tokenizer(), PROMPTS, max_new_tokens=3).tokens.shape[0] == 2


def test_options_that_do_not_fit_are_one_sentence(model) -> None:
    with pytest.raises(ConfigError, match="the options of a generation do not fit together: "):
        merged(model, tiny_tokenizer(), {"max_new_tokens": -3}, pruned=False)


# --- pruning that did not happen --------------------------------------------------------------------------------------


@pytest.mark.parametrize("execution", ["masked", "compact"])
@pytest.mark.parametrize("when", ["before", "wrapped"])
def test_a_compiled_model_is_pruned_all_the_same(model, truths, execution, when) -> None:
    compiled = tiny_model("llama")
    if when == "before":
        compiled.compile(backend="eager")
        generate(compiled, tiny_tokenizer(), PROMPTS, max_new_tokens=6, eos_token_id=None)  # dense code is there now
        given = compiled
    else:
        given = torch.compile(compiled, backend="eager")
    result = answers(given, uneven(compiled), execution)
    assert result.tokens.equal(truths[execution].tokens)
    assert len(result.keep) == 2
    assert not result.tokens.equal(truths[None].tokens)


def test_a_forward_that_passes_pruned_layers_by_is_refused(model) -> None:
    other, dense = tiny_model("llama"), tiny_model("llama")
    other.forward = dense.forward  # as a compiled one, it knows nothing of what is swapped
    for execution in ("masked", "compact"):
        with pytest.raises(MicrogliaError, match=r"did not go through model\.layers\.0\.self_attn as it is now"):
            answers(other, uneven(other), execution)


@pytest.mark.parametrize("make", [uneven, wild], ids=["shared", "rows"])
@pytest.mark.parametrize("execution", ["masked", "compact"])
def test_a_static_cache_of_the_callers_own_serves_again_and_again(model, make, execution) -> None:
    pruner, cache = make(model), StaticCache(config=model.config, max_cache_len=40)
    options = {"max_new_tokens": 6, "eos_token_id": None}
    truth = generate(model, tiny_tokenizer(), PROMPTS, pruner, execution=execution, **options).tokens
    dense = generate(model, tiny_tokenizer(), PROMPTS, **options).tokens
    for _ in range(2):
        given = {"past_key_values": cache, "execution": execution, **options}
        assert generate(model, tiny_tokenizer(), PROMPTS, pruner, **given).tokens.equal(truth)
        cache.reset()
    assert generate(model, tiny_tokenizer(), PROMPTS, past_key_values=cache, **options).tokens.equal(dense)
    for _ in range(2):
        given = {"cache_implementation": "static", "execution": execution, **options}
        assert generate(model, tiny_tokenizer(), PROMPTS, pruner, **given).tokens.equal(truth)
    assert generate(model, tiny_tokenizer(), PROMPTS, cache_implementation="static", **options).tokens.equal(dense)


# --- texts that are read anew -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("execution", ["masked", "compact", "captured"])
def test_phi3_continues_beyond_its_original_length_where_nothing_changes_there(execution) -> None:
    model = tiny_model("phi3", original_max_position_embeddings=16)
    pruner, options = uneven(model), {"max_new_tokens": 12, "eos_token_id": None}
    usual = tiny_model("phi3", original_max_position_embeddings=4096)
    result = generate(model, tiny_tokenizer(), PROMPTS, pruner, execution=execution, **options)
    truth = generate(usual, tiny_tokenizer(), PROMPTS, pruner, execution="masked", **options)
    assert result.tokens.equal(truth.tokens)


@pytest.mark.parametrize("execution", ["masked", "compact"])
def test_phi3_does_not_change_its_rotary_embedding_within_a_pruned_answer(execution) -> None:
    half = 6 // 2
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * half, "long_factor": [4.0] * half,
        "original_max_position_embeddings": 16,
    }  # fmt: skip
    model = tiny_model("phi3", original_max_position_embeddings=16, rope_parameters=rope)
    sentence = "12 tokens of prompt and 12 new ones cross the length of 16 at which this model changes its rotary"
    with pytest.raises(ConfigError, match=sentence):
        generate(
            model, tiny_tokenizer(), PROMPTS, uneven(model), execution=execution, max_new_tokens=12, eos_token_id=None
        )
    for length in (4, 5):  # up to the length, and its last token, which is never read
        generate(model, tiny_tokenizer(), PROMPTS, uneven(model), execution=execution, max_new_tokens=length)
    long = ["what is 3+4? what is 3+4?"]
    generate(model, tiny_tokenizer(), long, uneven(model), execution=execution, max_new_tokens=12)
    generate(model, tiny_tokenizer(), PROMPTS, uneven(model), execution="dense", max_new_tokens=12)


# --- wrappers of peft -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PromptTuning", "PrefixTuning", "PromptEncoder"])
def test_adapters_that_add_tokens_are_refused(kind) -> None:
    config = getattr(peft, f"{kind}Config")(task_type="CAUSAL_LM", num_virtual_tokens=3)
    wrapped = peft.get_peft_model(tiny_model("llama"), config)
    with pytest.raises(UnsupportedModelError, match="adds tokens of its own to every prompt"):
        generate(wrapped, tiny_tokenizer(), PROMPTS, max_new_tokens=3)


def test_an_adaption_prompt_is_refused() -> None:
    config = peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3, adapter_layers=1)
    wrapped = peft.get_peft_model(tiny_model("llama"), config)
    with pytest.raises(UnsupportedModelError, match="the adapter is ADAPTION_PROMPT"):
        generate(wrapped, tiny_tokenizer(), PROMPTS, max_new_tokens=3)


def test_a_projection_that_peft_trains_whole_is_masked_or_refused() -> None:
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["o_proj"])
    wrapped = peft.get_peft_model(tiny_model("llama"), config)
    pruner = uneven(wrapped)
    masked = generate(wrapped, tiny_tokenizer(), PROMPTS, pruner, execution="masked", max_new_tokens=5)
    assert masked.tokens.shape == (2, 5)
    with pytest.raises(MicrogliaError, match=r"ModulesToSaveWrapper, of which nothing can be cut out"):
        generate(wrapped, tiny_tokenizer(), PROMPTS, pruner, execution="compact", max_new_tokens=5)


# --- threads ----------------------------------------------------------------------------------------------------------


def test_dense_answers_of_threads_are_right_or_refused_on_captured_steps(model) -> None:
    captured = Captured(model)
    options = {"max_new_tokens": 20, "eos_token_id": None}
    truths = {p: generate(model, tiny_tokenizer(), [p], **options).texts for p in PROMPTS}
    right, refused = [], []

    def work(prompt: str) -> None:
        for _ in range(8):
            try:
                result = generate(model, tiny_tokenizer(), [prompt], execution=captured, **options)
                right.append(result.texts == truths[prompt])
            except MicrogliaError as error:
                refused.append(str(error))

    threads = [threading.Thread(target=work, args=(prompt,)) for prompt in PROMPTS * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(right) + len(refused) == 32
    assert right
    assert all(right)
    assert all("leave that context first" in sentence for sentence in refused)


def test_captured_steps_are_never_made_of_a_model_that_another_thread_has_cut() -> None:
    model = tiny_model("llama")
    pruner = uneven(model)
    truth = generate(model, tiny_tokenizer(), PROMPTS, pruner, execution="masked", max_new_tokens=6)
    refused = []

    def other() -> None:
        try:
            generate(model, tiny_tokenizer(), PROMPTS, pruner, execution="captured", max_new_tokens=6)
        except MicrogliaError as error:
            refused.append(error)

    with attached(model, pruner, "compact"):
        model(input_ids=IDS, attention_mask=MASK)
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(refused) == 1
    result = generate(model, tiny_tokenizer(), PROMPTS, pruner, execution="captured", max_new_tokens=6)
    assert result.tokens.equal(truth.tokens)


def test_captured_steps_watch_for_a_limited_number_of_end_tokens(model) -> None:
    ends = list(range(3, 68))
    with pytest.raises(ConfigError, match="65 tokens end an answer, and captured steps watch for at most 64"):
        generate(
            model, tiny_tokenizer(), PROMPTS, uneven(model), execution="captured", max_new_tokens=6, eos_token_id=ends
        )
    options = {"eos_token_id": ends[:64], "max_new_tokens": 6}
    results = [
        generate(model, tiny_tokenizer(), PROMPTS, uneven(model), execution=e, **options)
        for e in ("captured", "masked")
    ]
    assert results[0].tokens.equal(results[1].tokens)


@pytest.mark.parametrize("execution", ["masked", "compact"])
def test_attention_that_passes_its_gates_by_is_refused(execution) -> None:
    other, dense = tiny_model("llama"), tiny_model("llama")
    for layer, stock in zip(other.model.layers, dense.model.layers, strict=True):
        layer.self_attn.forward = stock.self_attn.forward  # code that knows nothing of what is swapped inside
    with pytest.raises(MicrogliaError, match=r"did not go through model\.layers\.0\.self_attn as it is now"):
        answers(other, uneven(other), execution)
