"""Train the embedded reasoner from scratch and write it, with its card, into the package.

    python scripts/train_reasoner.py             # from scratch
    python scripts/train_reasoner.py --resume    # go on after an interruption
    python scripts/train_reasoner.py --card      # only answer the held-out problems again, rewrite the card

Two CPU cores that know bfloat16 suffice, in about an hour; without bfloat16 it takes twice as long. The dense scores on
the card come from the same command (greedy, 1,000 held-out problems).
"""

import argparse
import json
import random
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.masking_utils import sdpa_mask
from transformers.trainer_utils import get_last_checkpoint

from microglia.evaluation.run import Evaluation
from microglia.evaluation.setup import Setup
from microglia.models import load_model
from microglia.reasoner.problems import FAMILIES, problems
from microglia.results import plain
from microglia.tasks import get_task

PROMPT = "Question: {question}\nAnswer:"
VOCABULARY = 1024  # at most; the generator's words need fewer
HELD_OUT = 1000


@dataclass(frozen=True)
class Phase:
    """Steps of a batch of fresh problems each, at a learning rate that warms up and then decays linearly to zero."""

    steps: int
    learning_rate: float  # of the matrices inside the layers
    difficulties: tuple[int, ...]  # drawn evenly; a number that stands twice is drawn twice as often
    families: tuple[str, ...]  # likewise


# What stands twice: long problems, and the two families in which a model trained on all alike erred most on validation
# problems.
PHASES = (Phase(2200, 7e-3, (1, 2, 3, 4, 5, 6, 7, 8, 6, 7, 8), (*FAMILIES, "compare", "bare")),)
BATCH = 64
REST_LEARNING_RATE = 2e-3  # of embeddings and norms


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with single digits: any text can be written, the generator's words are mostly one token each.

    A space is put after every line break and taken away again in decoding, so that a word at the start of a line is the
    same token as in a sentence. Without it the model mixed up the names that start a line with those of the question.
    """
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.Replace("\n", "\n ")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("\n ", "\n")])
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(
        (f"{PROMPT.format(question=p.question)} {p.answer}" for p in problems("train", 20_000, seed=1)), trainer
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>", padding_side="left", model_max_length=512
    )


def matmul_attention(module, query, key, value, attention_mask, scaling=None, **_):
    """Causal attention as two batched products. In bfloat16 on a CPU its backward is four times faster than sdpa's."""
    length = query.shape[2]
    scores = (query * scaling) @ key.transpose(-1, -2)
    future = torch.full((length, length), float("-inf"), dtype=scores.dtype).triu(1)
    return (torch.softmax(scores + future, -1) @ value).transpose(1, 2).contiguous(), None


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon for the matrices inside the layers (Jordan et al. 2024), AdamW for embeddings and norms, as one optimizer.

    torch has both, but not the two as one.
    """

    def __init__(self, model: torch.nn.Module, learning_rate: float) -> None:
        inside = {name: p.ndim == 2 and "embed" not in name for name, p in model.named_parameters()}
        matrices = [p for name, p in model.named_parameters() if inside[name]]
        rest = [p for name, p in model.named_parameters() if not inside[name]]
        muon = torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        adamw = torch.optim.AdamW(rest, lr=REST_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0)
        self.parts = (muon, adamw)
        super().__init__(self._groups(), {})

    def _groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]  # the same dicts: a scheduler reaches both

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        # torch's Muon orthogonalises in bfloat16, which takes seconds a step on a CPU that does not know it.
        float32 = mock.patch.object(torch.Tensor, "bfloat16", torch.Tensor.clone)
        with nullcontext() if fast_bfloat16() else float32:
            for part in self.parts:
                part.step()

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = self._groups()


def encoded(tokenizer: PreTrainedTokenizerFast, phase: Phase, seed: int) -> Dataset:
    """A phase's training problems as token ids; the loss counts answer tokens only."""
    drawn = list(problems("train", phase.steps * BATCH, seed=seed, steps=phase.difficulties, families=phase.families))
    prompts = tokenizer([PROMPT.format(question=p.question) for p in drawn])["input_ids"]
    answers = tokenizer([f" {p.answer}" for p in drawn])["input_ids"]
    answers = [[*a, tokenizer.eos_token_id] for a in answers]
    order = batched(len(drawn), lambda i: len(prompts[i]) + len(answers[i]), seed)
    return Dataset.from_dict(
        {
            "input_ids": [prompts[i] + answers[i] for i in order],
            "labels": [[-100] * len(prompts[i]) + answers[i] for i in order],
        }
    )


def batched(count: int, length: Callable[[int], int], seed: int) -> list[int]:
    """An order in which every BATCH examples are of similar length and long and short batches come in turns.

    The Trainer's own grouping sorts 50 batches at a time, so that the loss swings with the length of the problems.
    """
    rng, order = random.Random(seed), []
    for start in range(0, count, 50 * BATCH):
        chunk = sorted(range(start, min(start + 50 * BATCH, count)), key=length)
        batches = [chunk[i : i + BATCH] for i in range(0, len(chunk), BATCH)]
        rng.shuffle(batches)
        order += [i for batch in batches for i in batch]
    return order


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work-dir", type=Path, default=Path("runs/reasoner"))
    parser.add_argument(
        "--output-dir", type=Path, default=Path(__file__).parents[1] / "microglia" / "reasoner" / "model"
    )
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--card", action="store_true")
    options = parser.parse_args()
    if not options.card:
        train(options)
    write_card(options.output_dir)


def train(options: argparse.Namespace) -> None:
    """Train and write weights (bfloat16), tokenizer and the facts of the run."""
    set_seed(options.seed)
    AttentionInterface.register("matmul", matmul_attention)
    AttentionMaskInterface.register("matmul", sdpa_mask)
    tokenizer = train_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.set_attn_implementation("matmul")
    model.forward = torch.compile(model.forward, dynamic=True)  # type: ignore[method-assign]  # two minutes, then 1.5 times as fast
    losses: list[float] = []
    seconds = 0.0
    for index, phase in enumerate(PHASES):
        trainer = run_phase(
            model, tokenizer, phase, options, folder=options.work_dir / f"phase-{index + 1}", seed=options.seed + index
        )
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        seconds += trainer.state.log_history[-1].get("train_runtime", 0.0)

    del model.forward
    model.set_attn_implementation("sdpa")
    options.output_dir.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(options.output_dir)
    tokenizer.save_pretrained(options.output_dir)
    facts = {
        "parameters": model.num_parameters(),
        "seed": options.seed,
        "phases": [asdict(phase) for phase in PHASES],
        "batch_size": BATCH,
        "final_loss": sum(losses[-4:]) / len(losses[-4:]),
        "minutes": seconds / 60,
        "precision": "bfloat16 autocast" if fast_bfloat16() else "float32",
    }
    (options.output_dir / "training.json").write_text(json.dumps(facts, indent=2) + "\n")


def fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 fast. With AVX2 only, torch's products are 30 times slower than float32."""
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def run_phase(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    phase: Phase,
    options: argparse.Namespace,
    *,
    folder: Path,
    seed: int,
) -> Trainer:
    """Train `model` through one phase.

    Going on from its last checkpoint when resuming (a finished phase is only read).
    """
    data = encoded(tokenizer, phase, seed)
    print(
        f"{model.num_parameters():,} parameters, {len(data):,} problems, "
        f"{sum(map(len, data['input_ids'])) / len(data):.0f} tokens each",
        flush=True,
    )
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=phase.steps,
            per_device_train_batch_size=BATCH,
            lr_scheduler_type="linear",
            warmup_steps=100,
            max_grad_norm=1.0,
            bf16=fast_bfloat16(),
            use_cpu=True,
            train_sampling_strategy="sequential",
            logging_steps=25,
            save_steps=200,
            save_total_limit=2,
            seed=seed,
            disable_tqdm=True,
        ),
        train_dataset=data,
        optimizers=(MuonAndAdamW(model, phase.learning_rate), None),
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True, pad_to_multiple_of=8, label_pad_token_id=-100),
    )
    tokenizer.padding_side = "right"  # while training; the saved tokenizer pads left, as generation needs
    last = get_last_checkpoint(str(folder)) if options.resume and folder.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    tokenizer.padding_side = "left"
    return trainer


def write_card(folder: Path) -> None:
    """Answer the held-out problems with the stored weights and write the model card."""
    model, tokenizer = load_model(folder)
    task = get_task("arithmetic")
    held_out = task.load("test", limit=HELD_OUT)
    scores = Setup(model, tokenizer, task, held_out, batch_size=100, max_new_tokens=192).answers(None)
    facts = json.loads((folder / "training.json").read_text()) | {"test": plain(scores.summary())}
    (folder / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    (folder / "README.md").write_text(card(facts, scores))
    print(f"{scores.accuracy:.1%} of {HELD_OUT} held-out problems right", flush=True)


def card(facts: dict[str, Any], scores: Evaluation) -> str:
    """The model card, from the facts of the run and its scores."""
    steps = "\n".join(f"| {steps} | {right:.1%} |" for steps, right in scores.accuracy_by_difficulty.items())
    families = "\n".join(
        f"| {name} | {right:.1%} |" for name, right in scores.by("family", lambda a: a.correct).items()
    )
    low, high = scores.summary().accuracy_ci95
    phases = " then ".join(f"{phase['steps']} steps at {phase['learning_rate']}" for phase in facts["phases"])
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
language: en
---

# The microglia reasoner

A Llama of {facts["parameters"]:,} parameters (6 layers, 8 heads of 32, hidden size 256, byte-level BPE with \
single digits) that
solves multi-step arithmetic word problems in GSM8K's form: question, worked steps, `#### answer`. It ships with
microglia so that everything can be tried, tested and measured without a network. It knows its eight families of
problems (change, compare, groups, share, rates, percentages, an intermediate quantity, bare calculations, with and
without distractor sentences) and nothing else; it is a test bed, not an assistant.

Prompt: `Question: {{question}}\\nAnswer:`

## Training

`python scripts/train_reasoner.py`: seed {facts["seed"]}, {phases} of {facts["batch_size"]} \
problems a step (each seen once),
Muon for the matrices inside the layers and AdamW for the rest, warm-up and linear decay each time, \
{facts["precision"]} on
two CPU cores, {facts["minutes"]:.0f} minutes on a machine that was also busy with other work. Loss at the end
{facts["final_loss"]:.4f} (cross entropy per answer token). The weights in this folder are the ones that this command
made.

No GPU was at hand, so the model is as large as two cores train in that time. Weights are stored in bfloat16 and
evaluated in float32.

## Scores

Greedy exact match on {HELD_OUT} held-out problems, whose numbers occur in no training problem: \
**{scores.accuracy:.1%}** (95 % interval {low:.1%} to
{high:.1%}).

| steps | right |
|---|---|
{steps}

| family | right |
|---|---|
{families}
"""


if __name__ == "__main__":
    main()
