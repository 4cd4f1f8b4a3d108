"""Two-layer models of every family, random weights, made in memory; one line a family. And what to feed them."""

import string

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from microglia.attach import attached
from microglia.gate import Gate
from microglia.policies import AgentPolicy, SitewisePolicy
from microglia.pruner import Pruner
from microglia.units import find_sites

BASE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
FAMILIES = {
    "llama": {"num_key_value_heads": 8, "attention_bias": True},
    "mistral": {"sliding_window": 7},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 7, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 5.0},
    "gemma3_text": {
        "head_dim": 8,
        "sliding_window": 7,
        "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "phi3": {},
    "gpt2": {"num_key_value_heads": None},
}
BACKENDS = [(name, kind) for name in FAMILIES for kind in ("eager", "sdpa") if (name, kind) != ("gemma2", "sdpa")]


def tiny_model(family: str, *, backend: str | None = None, seed: int = 0, dtype=torch.float32, **changes):
    """A random model of a family in evaluation mode. Weights are larger than at initialisation, so heads differ."""
    options = {**BASE, **FAMILIES[family], **changes}
    if family == "gpt2":
        for name in ("num_key_value_heads", "intermediate_size"):
            options.pop(name)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name and "wte" not in name and "wpe" not in name:
                parameter.mul_(4)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
    if backend is not None:
        model.set_attn_implementation(backend)
    return model.to(dtype).eval()


def tiny_tokenizer():
    """One token a printable character, 97 in all; a space is the unknown token."""
    names = ["<pad>", "<eos>", "<unk>", *(c for c in string.printable if not c.isspace())]
    tokenizer = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def tiny_prompts(*lengths, seed=1, padding=0):
    """Random prompts of these lengths as one left-padded batch: ids and mask (B, T)."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths) + padding
    ids, mask = torch.zeros(len(lengths), width, dtype=torch.long), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, width - length :] = torch.randint(2, 97, (length,), generator=generator)
        mask[row, width - length :] = 1
    return ids, mask


@torch.no_grad()
def step_logits(model, ids, mask, answer):
    """Read the prompts, then feed the answer (B, N) token by token: logits (B, V) after each of the 1 + N passes."""
    output = model(input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=True)
    logits, cache = [output.logits[:, -1]], output.past_key_values
    for step in range(answer.shape[1]):
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        token, position = answer[:, step : step + 1], positions(mask)[:, -1:]
        output = model(input_ids=token, attention_mask=mask, position_ids=position, past_key_values=cache)
        logits.append(output.logits[:, -1])
    return torch.stack(logits, dim=1)


def positions(mask):
    """Position of each token in its own prompt, as generate() counts it: (B, T)."""
    return (mask.cumsum(1) - 1).clamp(min=0)


class Fixed(SitewisePolicy):
    """These logits, (B, H) per site, whatever is measured."""

    name = "fixed"

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    @classmethod
    def create(cls, geometries, signals, **options):
        return cls([torch.ones(1, geometry.count) for geometry in geometries])

    def site_logits(self, index, features):
        return self.logits[index].expand(len(features), -1)


ONE = Gate(bucket=1)  # counts are not rounded up


def pruner_of(policy, **parts):
    """A pruner whose counts are not rounded up."""
    return Pruner(policy, **{"gate": ONE, **parts})


def geometries_of(model):
    return [site.geometry for site in find_sites(model)]


def uneven_policy(model, rows=1):
    """Fixed logits: one row for all prompts, or as many rows as prompts, each with other heads.

    In groups of two, the first row keeps one head of three groups in the first site, both of two groups in the second.
    """
    logits = torch.full((2, rows, 8), -1.0)
    for row in range(rows):
        for site, heads in enumerate(([3, 4, 7], [2, 3, 6, 7])):
            logits[site, row, [(head + row) % 8 for head in heads]] = 1
    magnitude = torch.rand(logits.shape, generator=torch.Generator().manual_seed(3)) + 0.1
    return Fixed(list(logits * magnitude))


def uneven(model, rows=1, **parts):
    """The pruner of `uneven_policy`."""
    return pruner_of(uneven_policy(model, rows), **parts)


def wild_policy(model, *, seed=0, signals=("norm", "entropy")):
    """Agents whose decisions depend on the prompt."""
    torch.manual_seed(seed)
    policy = AgentPolicy(geometries_of(model), hidden_dim=16, signals=signals)
    ids, mask = tiny_prompts(14, 12, 9, 6, 4, 3, 2, seed=99)
    with torch.no_grad(), attached(model, Pruner(policy)) as trace:
        model(input_ids=ids, attention_mask=mask, position_ids=positions(mask))
        policy.fit_statistics(trace.features)
        for agent in policy.agents:
            agent.network[0].weight.mul_(3)
            agent.network[-1].weight.normal_()
            agent.network[-1].bias.zero_()
    return policy


def wild(model, *, seed=0, signals=("norm", "entropy"), **parts):
    """The pruner of `wild_policy`."""
    return pruner_of(wild_policy(model, seed=seed, signals=signals), **parts)
