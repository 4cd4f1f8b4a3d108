"""The promise of a calibration in worlds whose truth is known, and each step by hand."""

import json
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

from microglia.anatomy import HeadGeometry
from microglia.errors import ConfigError, DataError, MicrogliaError
from microglia.evaluation.closeness import closeness
from microglia.evaluation.run import Answer, Evaluation
from microglia.evaluation.setup import Setup
from microglia.experiments.bounded import losses_needed, mean_limit, mean_p_value
from microglia.experiments.calibrate import (
    EVERY_HEAD,
    Aim,
    calibrate,
    fixed_sequence,
    gentlest_reaching,
    more_prompts,
    passed,
    questions_used,
    unused_examples,
)
from microglia.experiments.drop import drop_limit
from microglia.gate import Gate, keep_ratio
from microglia.ledger import Ledger
from microglia.policies import StaticPolicy
from microglia.pruner import Pruner
from microglia.results import from_json
from microglia.system import MicrogliaPruningSystem
from microglia.tasks import get_task
from microglia.tasks.used import question_keys
from tests.tiny_folder import opinionated_pruner, save_tiny_model

PROMPTS, SETTINGS, DROP = 300, 10, 0.03


# --- the promise ---


def worlds(kind: str, many: int) -> tuple[np.ndarray, np.ndarray]:
    """Counts (W, S, 2) of lost and won answers, and true drops (W, S), of kinds of worlds.

    A prompt has one number u in [0, 1]: a setting loses the answers with u below its loss rate and
    wins those above 1 minus its win rate, so settings agree with each other as those of one policy
    do, and every true drop is known.
    """
    rng = np.random.default_rng(sum(map(ord, kind)))
    win = np.repeat(rng.uniform(0, 0.05, (many, 1)), SETTINGS, 1)
    steps = np.linspace(0, 1, SETTINGS)
    drop = {
        "just too much from the start": np.full((many, SETTINGS), DROP + 1e-6),
        "nothing is ever won": np.full((many, SETTINGS), DROP + 1e-6),
        "slowly worse": rng.uniform(0.03, 0.15, (many, 1)) * steps,
        "better at first": -0.04 + rng.uniform(0.08, 0.2, (many, 1)) * steps,
        "a cliff": np.where(steps < rng.uniform(0, 1, (many, 1)), 0.002, 0.2),
        "up and down": rng.uniform(0, 2 * DROP, (many, SETTINGS)),
    }[kind]
    if kind == "nothing is ever won":
        win = np.zeros_like(win)
    if kind == "better at first":
        win = win + 0.05
    lose = drop + win
    u = rng.uniform(size=(many, 1, PROMPTS))
    return np.stack([(u < lose[..., None]).sum(-1), (u > 1 - win[..., None]).sum(-1)], -1), drop


KINDS = [
    "just too much from the start",
    "nothing is ever won",
    "slowly worse",
    "better at first",
    "a cliff",
    "up and down",
]


@pytest.mark.parametrize("kind", KINDS)
def test_the_promise_is_broken_no_more_often_than_said(kind: str) -> None:
    """1,000 worlds of each of six kinds at 95 %. Broken in 50 is allowed; of a method that breaks
    it in exactly 5 %, 1 run in 1,000 would show more than 73, so up to 73 pass."""
    many = 1000
    counts, drop = worlds(kind, many)
    broken = 0
    for world, truth in zip(counts.tolist(), drop, strict=True):
        passed = fixed_sequence(((lost, won) for lost, won in world), PROMPTS, DROP, 0.95)
        broken += bool(passed) and truth[passed - 1] > DROP
    assert broken <= stats.binom.isf(0.001, many, 0.05) == 73
    if kind == "nothing is ever won":
        assert broken >= 10  # so kind to itself that the test would say nothing, it is not


def test_the_same_worlds_catch_a_rule_that_promises_too_much() -> None:
    """Taking the most aggressive setting whose measured drop is small enough breaks it often."""
    counts, drop = worlds("slowly worse", 1000)
    measured = (counts[..., 0] - counts[..., 1]) / PROMPTS
    last = SETTINGS - 1 - np.argmax((measured <= DROP)[:, ::-1], axis=1)
    assert (drop[np.arange(1000), last] > DROP).mean() > 0.3


def test_the_order_matters_and_the_first_failure_ends_it() -> None:
    taken = []

    def counts():
        for pair in ((0, 0), (1, 1), (40, 0), (0, 0)):
            taken.append(pair)
            yield pair

    assert fixed_sequence(counts(), 300, 0.03, 0.95) == 2
    assert taken == [(0, 0), (1, 1), (40, 0)]


# --- a calibration of answers made by hand ---


GEOMETRY = HeadGeometry(heads=8, kv_heads=8, head_dim=1)
LOGITS = [torch.arange(1.0, 9.0)[None]]
PRUNER = Pruner(StaticPolicy(LOGITS[0]), Gate(bucket=1)).with_budget(LOGITS, [GEOMETRY])
RATIOS = (0.625, 0.875, 0.75, 0.5)


@dataclass
class Scripted:
    """A setup whose model loses its first right answers: how many, by pruned heads of 8."""

    lost: dict[int, int]
    prompts: int = 200
    runs: int = 0
    task = SimpleNamespace(name="scripted", scoring="generation")

    @property
    def examples(self) -> list:
        return [None] * self.prompts

    @property
    def identity(self) -> dict:
        return {"examples": self.prompts}

    def answers(self, pruner, progress=None) -> Evaluation:
        self.runs += 1
        kept = 1.0 if pruner is None else keep_ratio(pruner.keep(LOGITS, [GEOMETRY])).item()
        lost = 0 if pruner is None else self.lost[round(8 * (1 - kept))]
        rows = [Answer(str(i), "", i >= lost, kept, 5, 1, "") for i in range(self.prompts)]
        if progress:
            progress(self.prompts, self.prompts)
        return Evaluation(tuple(rows), 1.0)


def test_the_last_setting_before_the_first_failure_is_chosen() -> None:
    setup, updates = Scripted({1: 0, 2: 1, 3: 30, 4: 0}), []
    aim = Aim(max_drop=0.03, keep_ratios=RATIOS)
    promise = calibrate(setup, PRUNER, aim, progress=lambda *args: updates.append(args))
    assert (promise.keep_ratio, promise.prompts) == (0.75, 200)
    assert 2 < promise.threshold < 3
    assert promise.drop == pytest.approx(1 / 200)
    assert promise.drop_bound == drop_limit(1, 0, 200)
    assert [t.target for t in promise.tried] == [0.875, 0.75, 0.625]
    thresholds = [PRUNER.at(t.target).gate.threshold for t in promise.tried]
    assert [t.threshold for t in promise.tried] == thresholds
    assert setup.runs == 4  # one dense run for all of them, and none after the failure
    assert updates[0] == ("dense", 200, 200)
    kept = "75.0% of the heads are kept (75.0% per token); with 95% confidence that costs at most 3 points"
    assert promise.sentence.startswith(kept)
    assert {"keep_ratio", "drop", "drop_bound", "confidence", "prompts"} <= promise.to_json().keys()


def test_settings_that_decide_alike_are_tried_once() -> None:
    setup = Scripted({1: 0, 2: 1})
    promise = calibrate(setup, PRUNER, Aim(max_drop=0.03, keep_ratios=(0.875, 0.8, 0.75, 0.7)))
    assert [t.target for t in promise.tried] == [0.875, 0.75]
    assert setup.runs == 3


def test_of_too_few_prompts_it_says_how_many_are_needed_and_runs_nothing() -> None:
    setup = Scripted({}, prompts=149)
    promise = calibrate(setup, PRUNER, Aim(max_drop=0.02))
    assert (promise.keep_ratio, promise.threshold) == (1.0, EVERY_HEAD)
    assert (promise.needed, setup.runs) == (150, 0)
    assert "149 prompts are too few" in promise.sentence
    assert "at least 150" in promise.sentence


def test_when_nothing_can_be_promised_the_model_stays_dense() -> None:
    aim = Aim(max_drop=0.03, keep_ratios=(0.875, 0.75))
    promise = calibrate(Scripted({1: 3, 2: 0}), PRUNER, aim)
    assert (promise.keep_ratio, promise.threshold) == (1.0, EVERY_HEAD)
    assert (promise.drop, promise.accuracy) == (0.0, 1.0)
    assert "lost 3 and won 0 of 200 answers" in promise.sentence
    assert "prompts might do" in promise.sentence
    hopeless = calibrate(Scripted({1: 60}), PRUNER, Aim(max_drop=0.03, keep_ratios=(0.875,)))
    assert "train longer" in hopeless.sentence


def test_as_many_prompts_as_estimated_would_do() -> None:
    tried = calibrate(Scripted({1: 3}), PRUNER, Aim(keep_ratio=0.875)).tried[0]
    more = more_prompts(tried, 200, 0.03, 0.95)
    assert more is not None
    assert drop_limit(round(3 * more / 200), 0, more) == pytest.approx(0.03, abs=0.001)
    assert more_prompts(tried, 200, 0.01, 0.95) is None


def test_a_keep_ratio_that_is_asked_for_gets_its_limit_and_no_promise() -> None:
    promise = calibrate(Scripted({4: 12}), PRUNER, Aim(keep_ratio=0.5))
    assert (promise.keep_ratio, promise.max_drop) == (0.5, None)
    assert promise.drop_bound == drop_limit(12, 0, 200) > promise.drop == 12 / 200
    assert "at most" in promise.sentence


def test_an_interrupted_calibration_goes_on(tmp_path) -> None:
    class Stops(Scripted):
        def answers(self, pruner, progress=None):
            if self.runs == 2:
                raise KeyboardInterrupt
            return super().answers(pruner, progress)

    lost, aim = {1: 0, 2: 1, 3: 30}, Aim(max_drop=0.03, keep_ratios=(0.875, 0.75, 0.625))
    with pytest.raises(KeyboardInterrupt):
        calibrate(Stops(lost), PRUNER, aim, ledger=Ledger(tmp_path / "x.jsonl"))
    again = Scripted(lost)
    promise = calibrate(again, PRUNER, aim, ledger=Ledger(tmp_path / "x.jsonl"))
    assert again.runs == 2  # dense and the first setting were there
    assert promise == calibrate(Scripted(lost), PRUNER, aim)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"max_drop": 0}, r"max_drop=0 was given; it must lie between 0 and 1"),
        ({"confidence": 1}, r"confidence is 1 but must lie between 0 and 1"),
        ({"keep_ratios": ()}, r"keep_ratios=\[\] was given; give at least one"),
        ({"keep_ratios": (1.0,)}, r"keep_ratios=\[1.0\] was given"),
        (
            {"keep_ratio": 0.5, "latency_ratio": 1.1},
            r"keep_ratio=0.5 and latency_ratio=1.1 were given; choose one",
        ),
        ({"byte_share": 0.5, "latency_ratio": 1.1}, r"bytes=0.5 and latency_ratio=1.1 were given; choose one of them"),
    ],
)
def test_what_is_out_of_range_is_refused(options, sentence) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Aim(**options)


# --- a speed that is asked for ---


def test_the_gentlest_setting_that_is_fast_enough_is_found_by_bisection() -> None:
    measured = []

    def speed(ratio: float) -> float:
        measured.append(ratio)
        return 1 + (1 - ratio) / 2

    ratios = [round(0.95 - 0.05 * step, 2) for step in range(14)]
    assert gentlest_reaching(1.19, speed, ratios) == 0.6
    assert len(measured) <= 5
    assert gentlest_reaching(1.0001, speed, ratios) == 0.95
    message = r"1.5 was asked for, but keeping 30% of the heads reaches 1.35 here"
    with pytest.raises(MicrogliaError, match=message):
        gentlest_reaching(1.5, speed, ratios)
    with pytest.raises(ConfigError, match=r"latency_ratio=1 was given; .* must be above 1"):
        gentlest_reaching(1, speed, ratios)


# --- prompts that training did not use, and the system ---


def test_what_training_used_is_left_out() -> None:
    task = get_task("arithmetic")
    plain = task.load("validation", limit=20, seed=3)
    used = question_keys(e.question for e in plain[:6])
    assert unused_examples(task, "validation", used, limit=14, seed=3) == plain[6:]
    assert len(unused_examples(task, "validation", used, limit=14, seed=4)) == 14
    assert len(unused_examples(task, "test", used, limit=3, seed=3)) == 3
    assert len(unused_examples(task, "train", frozenset(), limit=3, seed=3)) == 3

    few = SimpleNamespace(load=lambda split, limit, seed: task.load("validation", limit=5, seed=seed))
    for split in ("train", "validation", "test"):  # by text, wherever it stands
        with pytest.raises(DataError, match=f"looked at all examples of the split {split}"):
            unused_examples(few, split, used, limit=None, seed=3)


def test_of_a_checkpoint_that_does_not_say_what_it_used_that_is_drawn_again() -> None:
    task = get_task("arithmetic")
    used = questions_used(task, {"limit": 7, "eval_limit": 300, "seed": 3})
    drawn = [*task.load("train", limit=7, seed=3), *task.load("validation", limit=300, seed=3)]
    assert used == question_keys(e.question for e in drawn)
    demo = task.load("validation", limit=200, seed=3)
    assert question_keys(e.question for e in demo) <= questions_used(task, {"limit": 1, "seed": 3})


def test_questions_are_known_however_they_are_spaced() -> None:
    assert question_keys(["What is\n 1 + 1? "]) == question_keys(["What is 1 + 1?"])
    assert question_keys(["What is 1 + 1?"]).isdisjoint(question_keys(["What is 1 + 2?"]))


def write_problems(path, *, times: int, lines: int = 30):
    """A jsonl file of products; other `times` give other problems."""
    rows = [{"question": f"What is {n} times {times}?", "answer": f"#### {n * times}"} for n in range(1, lines + 1)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def answered(monkeypatch) -> list:
    """Whatever a setup answers from now on: its first question, and the type of the weights."""
    runs, real = [], Setup.answers

    def recorded(setup, *given):
        runs.append((setup.examples[0].question, next(setup.model.parameters()).dtype))
        return real(setup, *given)

    monkeypatch.setattr(Setup, "answers", recorded)
    return runs


def test_answers_are_taken_again_for_the_same_data_and_weights_only(system, tmp_path, answered) -> None:
    few = {"split": "test", "keep_ratio": 0.6, "max_new_tokens": 2, "ledger": tmp_path / "answers.jsonl"}
    one, other = write_problems(tmp_path / "one.jsonl", times=2), write_problems(tmp_path / "other.jsonl", times=3)

    def new_runs(path, model=system) -> int:
        before = len(answered)
        model.calibrate("jsonl", data_dir=path, **few)
        return len(answered) - before

    assert [new_runs(path) for path in (one, one, other, one)] == [2, 0, 2, 0]
    write_problems(one, times=4)  # the same name and as many lines, edited
    assert (new_runs(one), new_runs(one)) == (2, 0)
    half = MicrogliaPruningSystem(system.source, dtype="bfloat16")
    half.pruner = system.pruner
    assert (new_runs(one, half), new_runs(one, half), new_runs(one)) == (2, 0, 0)


def test_no_promise_rests_on_what_was_trained_on_or_set_the_threshold(tmp_path, answered) -> None:
    path = write_problems(tmp_path / "mine.jsonl", times=2)
    loaded = MicrogliaPruningSystem(save_tiny_model(tmp_path / "model"), hidden_dim=4)
    loaded.train(
        "jsonl", data_dir=path, max_steps=1, batch_size=2, eval_limit=1, output_dir=tmp_path / "saved", quiet=True
    )
    everything = get_task("jsonl").load("test", data_dir=path)
    again = MicrogliaPruningSystem.from_pretrained(tmp_path / "saved", loaded.source)
    for tried in (loaded, again):
        for split in ("train", "validation", "test"):
            with pytest.raises(DataError, match="training looked at all examples"):
                tried.calibrate("jsonl", split=split, data_dir=path, keep_ratio=0.6)
    more = write_problems(tmp_path / "more.jsonl", times=2, lines=40)  # the same problems, and ten new ones
    assert again.calibrate("jsonl", split="test", data_dir=more, keep_ratio=0.6, max_new_tokens=2).prompts == 10
    again.set_keep_ratio(0.7, prompts=["What is 31 times 2?", "What is  32 times 2?"])
    assert again.calibrate("jsonl", split="test", data_dir=more, keep_ratio=0.6, max_new_tokens=2).prompts == 8
    assert len(everything) == 30
    assert again.checkpoint().config.used.count(" ") == 31


@pytest.fixture(scope="module")
def system(tmp_path_factory):
    folder = save_tiny_model(tmp_path_factory.mktemp("model"))
    loaded = MicrogliaPruningSystem(folder)
    loaded.pruner = opinionated_pruner(loaded.model)
    prompts = ["What is 1 plus 2?", "Tom has 3 apples and eats one. How many are left?"]
    loaded.set_keep_ratio(None, prompts=prompts)
    return loaded


def test_the_system_is_calibrated_saved_and_loaded(system, tmp_path) -> None:
    few = {"limit": 4, "max_new_tokens": 2, "batch_size": 4, "ledger": tmp_path / "answers.jsonl"}
    promise = system.calibrate(keep_ratio=0.6, **few)
    assert system.pruner.gate.threshold == promise.threshold
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 2
    loaded = MicrogliaPruningSystem.from_pretrained(system.save_pretrained(tmp_path / "saved"))
    assert loaded.pruner.gate.threshold == promise.threshold
    assert loaded.promise["sentence"] == promise.sentence
    assert promise.sentence in (tmp_path / "saved" / "README.md").read_text()
    loaded.set_keep_ratio(0.5)
    assert loaded.promise == {}

    dense = system.calibrate(**few)
    assert (dense.keep_ratio, dense.needed) == (1.0, 150)
    system.generate(["What is 5 plus 6?", "What is 70 minus 6?"], 2)
    assert system.get_sparsity() == 0  # the dense model, from now on


def test_a_share_of_the_bytes_that_is_asked_for_is_set(system) -> None:
    promise = system.calibrate(byte_share=0.95, limit=4, max_new_tokens=2)
    assert promise.threshold == system.pruner.gate.threshold == system.pruner.at(byte_share=0.95).gate.threshold
    (tried,) = promise.tried
    assert tried.target == system.pruner.budget.keep_ratio(promise.threshold)
    assert promise.max_drop is None


def test_a_speed_is_reached_by_measuring(system, monkeypatch) -> None:
    speed = "microglia.experiments.calibrate.step_speed"
    monkeypatch.setattr(speed, lambda *_, **__: lambda ratio: 2 - ratio)
    promise = system.calibrate(latency_ratio=1.4, limit=4, max_new_tokens=2)
    assert [t.target for t in promise.tried] == [0.6]


def test_a_policy_is_known_by_its_weights(system) -> None:
    policy = system.pruner.policy
    assert policy.fingerprint() == policy.fingerprint()
    assert StaticPolicy.random([], 0).fingerprint() != policy.fingerprint()
    changed = opinionated_pruner(system.model, seed=1).policy
    assert changed.fingerprint() != policy.fingerprint()


# --- losses that count tokens ---


def test_agreement_is_promised_as_the_texts_say(system, tmp_path) -> None:
    path = tmp_path / "ledger.jsonl"
    common = {"dataset_name": "text", "limit": 12, "max_new_tokens": 6, "ledger": path, "confidence": 0.5}
    promise = system.calibrate(loss="agreement", max_drop=0.9, keep_ratios=(0.9, 0.5), **common)
    assert (promise.loss, promise.prompts, promise.dense_accuracy) == ("agreement", 12, None)
    task = get_task("text")
    setup = Setup(system.model, system.tokenizer, task, task.load("validation", limit=12), max_new_tokens=6)
    dense = setup.answers(None).answers
    prompts = [system.tokenizer(prompt)["input_ids"] for prompt in setup.prompts]
    texts = [(p, list(a.tokens)) for p, a in zip(prompts, dense, strict=True)]
    for one in promise.tried:
        close = closeness(system.model, texts, system.pruner.with_threshold(one.threshold))
        apart = [1 - c.agreed / c.tokens if c.tokens else 0.0 for c in close]
        assert one.drop == pytest.approx(np.mean(apart))
        assert one.drop_bound == pytest.approx(mean_limit(apart, 0.5), abs=1e-5)
        assert (one.accuracy, one.lost, one.won) == (None, None, None)
    passing = [one for one in promise.tried if one.drop_bound <= 0.9]
    assert promise.threshold == passing[-1].threshold
    assert "of a text's tokens against the dense model" in promise.sentence
    assert from_json(json.loads(json.dumps(promise.to_json()))) == promise
    kl = system.calibrate(loss="kl", max_drop=0.9, keep_ratios=(0.9, 0.5), **common)
    assert 0 < kl.tried[-1].drop <= 1
    assert "nats per token (a text counts as 1 at most)" in kl.sentence
    strict = system.calibrate(loss="kl", max_drop=0.06, keep_ratios=(0.5,), **common | {"confidence": 0.1})
    assert strict.threshold == EVERY_HEAD
    assert "no setting can be promised to lose at most 0.06 nats" in strict.sentence
    few = system.calibrate(loss="agreement", max_drop=0.01, **common)
    assert f"it takes at least {losses_needed(0.01, 0.5)}" in few.sentence


def test_a_text_counts_as_one_nat_at_most_and_without_tokens_as_nothing() -> None:
    from microglia.evaluation.closeness import Closeness
    from microglia.experiments.losses import Agreement, Kl

    far, near, empty = Closeness(4, 10.0, 1, 0, 0, 1), Closeness(4, 0.2, 4, 0, 0, 1), Closeness(0, 0, 0, 0, 0, 1)
    assert [Kl.of(None, one) for one in (far, near, empty)] == [1, 0.05, 0]
    assert [Agreement.of(None, one) for one in (far, near, empty)] == [0.75, 0, 0]


def test_a_loss_that_does_not_exist_or_fit_is_refused(system) -> None:
    with pytest.raises(ConfigError, match=r"loss='style' is unknown; choose one of accuracy, agreement, kl"):
        Aim(loss="style")
    with pytest.raises(
        ConfigError, match=r"task text has no right answers to count; .* a promise with loss='agreement'"
    ):
        system.calibrate("text", limit=200, max_new_tokens=2)


@pytest.mark.parametrize("kind", ["just too much from the start", "slowly worse", "a cliff", "up and down"])
def test_the_promise_of_a_mean_loss_is_broken_no_more_often_than_said(kind: str) -> None:
    """As for accuracy: 1,000 worlds at 95 %, up to 73 may break it; a prompt's loss is the share of its 20 tokens."""
    rng, many = np.random.default_rng(sum(map(ord, kind))), 1000
    _, drop = worlds(kind, many)
    broken = 0
    for truth in np.clip(drop, 0, 1):
        losses = [rng.binomial(20, mean, PROMPTS) / 20 for mean in truth]
        count = passed((mean_p_value(row, DROP) for row in losses), 0.95)
        broken += bool(count) and truth[count - 1] > DROP
    assert broken <= stats.binom.isf(0.001, many, 0.05) == 73
