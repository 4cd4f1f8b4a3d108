"""The server through OpenAI's own client, and what it refuses."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial

import jsonschema
import openai
import pytest
from tokenizers import Regex, normalizers

from microglia.errors import ConfigError, MicrogliaError
from microglia.pruner import Budget
from microglia.serving import admission
from microglia.serving.config import ServingConfig
from microglia.serving.run import listen
from microglia.tasks.prompts import prompt_ids
from tests.serving.served import NAME, alone, running, tiny_pruned

QUESTION = "How many is 3 times 4?"
CHAT = {"model": NAME, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 12}
TEXT = {"model": NAME, "prompt": "1 + 1 =", "max_tokens": 12}


def wrapped(model, question=QUESTION):
    return model.template.format(question=question)


@cache
def schema(app):
    return app.openapi()


def check(served, path, response, kind="application/json"):
    """The response has the shape that /openapi.json promises for its status."""
    whole = schema(served.app)
    (operation,) = whole["paths"][path].values()
    shape = operation["responses"][str(response.status_code)]["content"][kind]["schema"]
    jsonschema.validate(response.json(), {**shape, "components": whole["components"]})
    return response.json()


def test_a_chat_is_answered_with_its_usage(served, model):
    answer = served.client.chat.completions.create(**CHAT)
    truth = alone(wrapped(model), 12)
    assert answer.choices[0].message.content == truth.texts[0]
    assert answer.choices[0].finish_reason == "length"
    assert (answer.model, answer.object) == (NAME, "chat.completion")
    usage = answer.usage
    assert usage.prompt_tokens == len(wrapped(model))
    assert usage.completion_tokens == 12
    assert usage.total_tokens == usage.prompt_tokens + 12
    kept = sum(int(keep.sum()) for keep in truth.keep)
    assert (usage.heads_kept, usage.heads, usage.sparsity) == (kept, 16, 1 - kept / 16)
    assert usage.seconds > 0
    assert usage.queued_seconds >= 0


def test_parts_of_a_message_and_null_are_read(served, model):
    parts = [{"type": "text", "text": QUESTION[:9]}, {"type": "text", "text": QUESTION[9:]}]
    body = {**CHAT, "messages": [{"role": "user", "content": parts}], "max_tokens": None, "stop": None, "n": 1}
    answer = served.client.chat.completions.create(**body, max_completion_tokens=9, user="u")
    assert answer.choices[0].message.content == alone(wrapped(model), 9).texts[0]


def test_a_chat_is_streamed(served, model):
    chunks = list(served.client.chat.completions.create(**CHAT, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert text == alone(wrapped(model), 12).texts[0]
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert len(chunks) > 5  # it came in pieces
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 12
    assert len({chunk.id for chunk in chunks}) == 1


def test_several_prompts_are_continued(served, model):
    prompts = ["1 + 1 =", "abc", "xyz?"]
    answer = served.client.completions.create(model=NAME, prompt=prompts, max_tokens=8)
    truths = [alone(prompt, 8) for prompt in prompts]
    assert [choice.text for choice in answer.choices] == [truth.texts[0] for truth in truths]
    assert answer.usage.heads_kept == sum(int(keep.sum()) for truth in truths for keep in truth.keep)
    assert answer.usage.heads == 48
    texts = dict.fromkeys(range(3), "")
    for chunk in served.client.completions.create(model=NAME, prompt=prompts, max_tokens=8, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert [*texts.values()] == [truth.texts[0] for truth in truths]
    assert served.client.completions.create(model=NAME, prompt="abc").usage.completion_tokens <= 16  # as OpenAI's


def test_extensions_set_the_keep_ratio_or_turn_pruning_off(served, model):
    dense = served.client.completions.create(**TEXT, extra_body={"pruning": False})
    assert dense.usage.sparsity == 0
    assert dense.choices[0].text == alone(TEXT["prompt"], 12, pruning=False).texts[0]
    kept = []
    for ratio in (0.4, 0.9):
        answer = served.client.completions.create(**TEXT, extra_body={"keep_ratio": ratio})
        truth = alone(TEXT["prompt"], 12, keep_ratio=ratio)
        assert answer.choices[0].text == truth.texts[0]
        kept.append(answer.usage.heads_kept)
    assert kept[0] < kept[1]


def test_a_seed_is_repeatable_and_a_stop_ends(served, model):
    hot = {**TEXT, "temperature": 1.5, "top_p": 0.95}
    texts = [served.client.completions.create(**hot, seed=seed).choices[0].text for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]
    whole = alone(TEXT["prompt"], 12).texts[0]
    answer = served.client.completions.create(**TEXT, stop=whole[4:6])
    assert answer.choices[0].text == whole[: whole.index(whole[4:6])]
    assert answer.choices[0].finish_reason == "stop"


def test_a_keep_ratio_is_searched_for_once(served, monkeypatch):
    searches, keep_ratio = [], Budget.keep_ratio
    monkeypatch.setattr(Budget, "keep_ratio", lambda *args: searches.append(1) or keep_ratio(*args))
    for _ in range(24):
        served.client.completions.create(**{**TEXT, "max_tokens": 1}, extra_body={"keep_ratio": 0.4375})
    assert 0 < len(searches) <= 40


def test_known_fields_that_change_no_answer_are_accepted(served, model):
    known = {"safety_identifier": "a", "prompt_cache_key": "b", "prompt_cache_retention": "24h", "service_tier": "flex"}
    answer = served.client.chat.completions.create(**CHAT, **known, user="u", store=True, metadata={"a": "b"})
    assert answer.choices[0].message.content == alone(wrapped(model), 12).texts[0]
    answer = served.client.completions.create(**TEXT, extra_body=known)
    assert answer.choices[0].text == alone(TEXT["prompt"], 12).texts[0]


ON_THE_MODEL = {
    "num_beams": 2,
    "stop_strings": ["1", "a", " "],
    "max_time": 0.0,
    "use_cache": False,
    "repetition_penalty": 5.0,
}


@pytest.mark.parametrize("name", ON_THE_MODEL)
def test_the_models_own_settings_are_as_if_unset(name):
    model = tiny_pruned()
    setattr(model.lm.generation_config, name, ON_THE_MODEL[name])
    prompts = ["1 + 1 =", "abc"]
    with running(model) as served:
        create = partial(served.client.with_options(timeout=60).completions.create, model=NAME, max_tokens=12)
        for options in ({}, {"pruning": False}, {"keep_ratio": 0.4}):
            truths = [alone(prompt, 12, **options) for prompt in prompts]
            answer = create(prompt=prompts, extra_body=options)
            assert [choice.text for choice in answer.choices] == [truth.texts[0] for truth in truths]
            kept = 32 if options == {"pruning": False} else sum(int(k.sum()) for truth in truths for k in truth.keep)
            assert answer.usage.heads_kept == kept
        chunks = create(prompt=prompts[0], stream=True)
        assert "".join(chunk.choices[0].text for chunk in chunks) == alone(prompts[0], 12).texts[0]


def test_models_health_and_metrics(served):
    assert [card.id for card in served.client.models.list().data] == [NAME]
    assert served.client.models.retrieve(NAME).owned_by == "microglia"
    assert check(served, "/health", served.http.get("/health")) == {"status": "ok", "waiting": 0, "running": 0}
    before = served.metric("microglia_completion_tokens_total")
    served.client.completions.create(**TEXT)
    assert served.metric("microglia_completion_tokens_total") == before + 12
    text = served.http.get("/metrics").text
    assert 'microglia_requests_total{path="/v1/completions",status="200"}' in text
    assert "microglia_sparsity_bucket" in text
    assert "microglia_waiting 0.0" in text


def test_answers_and_refusals_have_the_promised_shape(served):
    for path, body in (("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)):
        check(served, path, served.http.post(path, json=body))
        for wrong in ({"temperature": 9}, {"model": "gpt-9"}):
            assert "error" in check(served, path, served.http.post(path, json={**body, **wrong}))
        shape = schema(served.app)["paths"][path]["post"]["responses"]["200"]["content"]["text/event-stream"]["schema"]
        streamed = served.http.post(path, json={**body, "stream": True, "stream_options": {"include_usage": True}})
        events = [line.removeprefix("data: ") for line in streamed.text.splitlines() if line]
        assert events[-1] == "[DONE]"
        for event in events[:-1]:
            jsonschema.validate(
                json.loads(event), {**shape["contentSchema"], "components": schema(served.app)["components"]}
            )
        with pytest.raises(jsonschema.ValidationError):  # it says something
            jsonschema.validate({}, {**shape["contentSchema"], "components": schema(served.app)["components"]})
    check(served, "/v1/models", served.http.get("/v1/models"))
    check(served, "/v1/models/{name}", served.http.get(f"/v1/models/{NAME}"))
    assert served.http.get("/openapi.json").json() == schema(served.app)


# --- refusals ---------------------------------------------------------------------------------------------------------

WRONG = {
    "no model": ({"model": None}, 400, "model is missing; give it", "model"),
    "other model": ({"model": "gpt-9"}, 404, "The model `gpt-9` does not exist or you do not have access", "model"),
    "unknown name": ({"temprature": 1}, 400, "temprature is nothing that this server does; leave it out", "temprature"),
    "tools": ({"tools": [{"type": "function"}]}, 400, "tools is nothing that this server does", "tools"),
    "two answers": ({"n": 2}, 400, "n=2 is not supported; give 1", "n"),
    "log probabilities": ({"logprobs": True}, 400, "logprobs=True is not supported; give False", "logprobs"),
    "penalty": ({"presence_penalty": 0.5}, 400, "presence_penalty=0.5 was given; input should be", "presence_penalty"),
    "too hot": ({"temperature": 3}, 400, "temperature=3 was given; input should be less than", "temperature"),
    "no number": ({"temperature": "warm"}, 400, "temperature='warm' was given; input should be a valid", "temperature"),
    "ratio": ({"keep_ratio": 0}, 400, "keep_ratio=0 was given; input should be greater than 0", "keep_ratio"),
    "tokens": ({"max_tokens": 0}, 400, "max_tokens=0 was given; input should be greater than", "max_tokens"),
    "many tokens": ({"max_tokens": 400}, 400, "max_tokens=400 was given and this server writes at most 300", "max_"),
    "beyond context": (
        {"messages": [{"role": "user", "content": "x" * 600}]},
        400,
        "the model's context is 512",
        "mes",
    ),
    "many stops": ({"stop": list("abcde")}, 400, "at most 4 items", "stop"),
    "empty": ({"messages": [{"role": "user", "content": " \n"}]}, 400, "the last message is empty", "messages"),
    "no message": ({"messages": []}, 400, "at least 1 item", "messages"),
    "image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "text": "x"}]}]},
        400,
        "'image_url' is not supported; give 'text'",
        "messages.0.content.0.type",
    ),
    "history": (
        {"messages": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]},
        400,
        "this model has no chat template, so it knows no roles and no history; send one user message",
        "messages",
    ),
    "half a pair": (
        {"messages": [{"role": "user", "content": "a\ud800"}]},
        400,
        "half of a surrogate pair",
        "",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_requests_get_an_error_object_with_one_sentence(served, kind):
    change, status, sentence, param = WRONG[kind]
    max_300(served)
    response = served.http.post(
        "/v1/chat/completions",
        content=json.dumps({**CHAT, **change}),
        headers={"Content-Type": "application/json"},
    )
    error = check(served, "/v1/chat/completions", response)["error"]
    assert response.status_code == status, error
    assert sentence in error["message"]
    assert "\n" not in error["message"]
    assert error["type"] == "invalid_request_error"
    assert (error["param"] or "").startswith(param)
    assert served.http.get("/health").json()["status"] == "ok"


def max_300(served):
    """The module's server with a lower limit, so that the model's context does not speak first."""
    config = served.app.state.service.admission.config
    object.__setattr__(config, "max_new_tokens", 300)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "the body is"),
        (b"{", "the body is no JSON"),
        (b"[]", "the body is no JSON object"),
        (b"null", "the body is"),
        (b"\xff\xfe", "body"),
        (b"[" * 100_000, "body"),
        (b'{"temperature": NaN, "model": "tiny", "prompt": "x"}', "temperature=nan was given"),
        (b'{"prompt": "x", "model": "\\ud800"}', ""),
        (b'{"prompt": "x", "model": "tiny", "\\ud800": 1}', ""),
        (b'{"prompt": "x", "model": "tiny", "seed": 1e400}', "seed"),
        (b'{"prompt": [1, 2], "model": "tiny"}', "prompt"),
        (b'{"prompt": [], "model": "tiny"}', "prompt"),
    ],
)
def test_bodies_that_are_no_request_are_refused(served, content, sentence):
    response = served.http.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code in (400, 404)
    assert sentence in check(served, "/v1/completions", response)["error"]["message"]


def test_addresses_methods_and_types_that_do_not_exist(served):
    assert served.http.get("/v1/embeddings").json()["error"]["message"].startswith("there is nothing at this address")
    assert served.http.get("/v1/completions").status_code == 405
    assert served.http.get("/v1/models/other").json()["error"]["code"] == "model_not_found"
    # What a page of another site could send without asking the browser: refused by its type and by its host name.
    assert served.http.post("/v1/completions", content=json.dumps(TEXT)).status_code == 400
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "[::2]:1", ""):
        refused = served.http.get("/v1/models", headers={"Host": host})
        assert refused.status_code == 400
        assert "this server does not answer as" in check(served, "/v1/models", refused)["error"]["message"]
    for host in ("localhost", "LOCALHOST:1", "[::1]:8000", "127.0.0.1"):
        assert served.http.get("/v1/models", headers={"Host": host}).status_code == 200


def test_it_answers_as_the_address_that_it_listens_on(model):
    with running(model, host="127.0.0.2") as served:
        assert served.url.startswith("http://127.0.0.2:")
        assert served.client.models.retrieve(NAME).id == NAME


def test_limits_key_and_a_full_queue(model):
    limits = {"api_key": "sesame", "max_body_bytes": 2000, "max_prompt_tokens": 40, "max_waiting": 1, "max_batch": 1}
    with running(model, **limits) as served:
        create = served.client.completions.create
        with pytest.raises(openai.AuthenticationError, match="the API key is wrong"):
            served.client.with_options(api_key="Sesame").completions.create(**TEXT)
        assert "no API key was given" in served.http.get("/v1/models").text
        assert served.http.get("/health").status_code == served.http.get("/metrics").status_code == 200
        with pytest.raises(openai.BadRequestError, match="the prompt has 41 tokens and this server reads 40"):
            create(model=NAME, prompt="x" * 41)
        headers = {"Authorization": "Bearer sesame", "Content-Type": "application/json"}
        for content in (b"x" * 2001, iter([b"x" * 1500] * 2)):  # the second does not say its length
            response = served.http.post("/v1/completions", content=content, headers=headers)
            assert response.status_code == 413
            assert check(served, "/v1/completions", response)["error"]["code"] == "body_too_large"
        with served.held() as go:
            streams = [create(**TEXT, stream=True)]
            assert go.reached.wait(60)
            streams.append(create(**TEXT, stream=True))
            with pytest.raises(
                openai.RateLimitError, match="1 prompts are waiting and 1 more would be too many"
            ) as full:
                create(**TEXT)
            assert full.value.response.headers["retry-after"] == "1"
            assert served.metric("microglia_answers_total", reason="cut") == 0  # it was refused, not cut off
            go.set()
            texts = ["".join(chunk.choices[0].text for chunk in stream) for stream in streams]
        assert texts == [alone(TEXT["prompt"], 12).texts[0]] * 2


def test_the_end_waits_for_running_answers(model):
    with running(model) as served, served.held() as go:
        stream = served.client.completions.create(**TEXT, stream=True)
        assert go.reached.wait(60)
        served.server.should_exit = True
        while served.server.servers[0].sockets:
            go.wait(0.01)
        with pytest.raises(openai.APIConnectionError):
            served.client.with_options(timeout=5).completions.create(**TEXT)
        go.set()
        text = "".join(chunk.choices[0].text for chunk in stream)
        assert text == alone(TEXT["prompt"], 12).texts[0]
        served.thread.join(60)
        assert not served.thread.is_alive()
        assert not served.app.state.service.worker.thread.is_alive()


def test_an_answer_that_needs_longer_than_the_grace_is_cut_off(model):
    with running(model, grace=1) as served:
        steps = []
        hook = model.lm.register_forward_pre_hook(lambda *_: steps.append(time.sleep(0.05)))
        stream = served.client.completions.create(**{**TEXT, "max_tokens": 300}, stream=True)
        next(iter(stream))
        served.server.should_exit = True
        served.thread.join(60)
        assert not served.thread.is_alive()
        assert len(steps) < 300
        hook.remove()


def test_clients_that_hang_up_are_counted_and_not_written_for(model):
    with running(model, max_batch=1) as served:
        with served.held() as go:
            stream = served.client.completions.create(**{**TEXT, "max_tokens": 300}, stream=True)
            assert go.reached.wait(60)
            with pytest.raises(openai.APITimeoutError):  # in the queue, and not as a stream
                served.client.with_options(timeout=0.5).completions.create(**TEXT)
            stream.close()
            while served.metric("microglia_answers_total", reason="cut") < 2:
                go.wait(0.01)
        served.client.completions.create(**TEXT)
        assert served.metric("microglia_answers_total", reason="length") == 1
        assert served.metric("microglia_completion_tokens_total") < 300
        assert served.metric("microglia_requests_total", path="/v1/completions", status="200") == 2


def test_a_prompt_that_is_far_too_long_is_refused_by_its_beginning(model, monkeypatch):
    read = []
    monkeypatch.setattr(
        admission, "prompt_ids", lambda tokenizer, texts: read.extend(map(len, texts)) or prompt_ids(tokenizer, texts)
    )
    with running(model, max_prompt_tokens=40) as served:
        for path, body in (
            ("/v1/completions", {"prompt": "x" * 500_000}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 500_000}]}),
        ):
            error = check(served, path, served.http.post(path, json={"model": NAME, **body}))["error"]
            sentence = "the prompt has more than 40 tokens, which is all that this server reads; shorten it"
            assert (error["message"], error["code"]) == (sentence, "context_length_exceeded")
        assert sum(read) <= 2 * 40 * 8
    with running(model) as served:
        response = served.http.post("/v1/completions", json={"model": NAME, "prompt": "x" * 500_000})
        assert "the prompt has more than 512 tokens" in response.text


def test_a_prompt_of_many_characters_and_few_tokens_is_answered():
    """By its characters alone it could not fit, but its tokenizer takes any number of spaces for one."""
    model = tiny_pruned()
    model.tokenizer.backend_tokenizer.normalizer = normalizers.Replace(Regex(" +"), " ")
    with running(model) as served:
        answer = served.client.completions.create(**{**TEXT, "prompt": "1 +" + " " * 50_000 + "1 ="})
        assert answer.choices[0].text == alone("1 + 1 =", 12).texts[0]
        assert answer.usage.prompt_tokens == 7


def test_others_are_answered_while_a_prompt_is_tokenised(model, monkeypatch):
    go, reached = threading.Event(), threading.Event()

    def hold(tokenizer, texts):
        reached.set()
        assert go.wait(60)
        return prompt_ids(tokenizer, texts)

    with running(model) as served, ThreadPoolExecutor(1) as pool:
        with served.held() as written:
            stream = served.client.completions.create(**TEXT, stream=True)
            assert written.reached.wait(60)
            monkeypatch.setattr(admission, "prompt_ids", hold)
            long = pool.submit(served.client.completions.create, **TEXT)
            assert reached.wait(60)
            assert served.http.get("/health").json()["status"] == "ok"
        assert "".join(chunk.choices[0].text for chunk in stream) == alone(TEXT["prompt"], 12).texts[0]
        assert not long.done()
        go.set()
        assert long.result().choices[0].text == alone(TEXT["prompt"], 12).texts[0]


def test_a_failing_model_is_an_error_and_not_the_end(model):
    with running(model) as served:

        def fail(*_):
            raise RuntimeError("secret weights")

        hook = model.lm.register_forward_pre_hook(fail)
        with pytest.raises(openai.InternalServerError, match="the model failed on this prompt") as caught:
            served.client.completions.create(**TEXT)
        assert "secret" not in str(caught.value)
        with pytest.raises(openai.APIError, match="the model failed on this prompt"):
            list(served.client.completions.create(**TEXT, stream=True))
        hook.remove()
        assert served.client.completions.create(**TEXT).choices[0].text == alone(TEXT["prompt"], 12).texts[0]


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"host": "0.0.0.0"}, r"host='0.0.0.0' can be reached from other machines and there is no API key"),
        ({"port": 70000}, r"port=70000 was given"),
        ({"max_new_tokens": 0}, r"max_new_tokens=0 was given; it must be at least 1"),
        ({"batch_by": "x"}, r"batch_by='x' is unknown; choose one of settings, decision, mask"),
        ({"name": " "}, r"the model's name is empty"),
        ({"api_key": "schlüssel"}, r"the API key must be ASCII"),
    ],
)
def test_wrong_settings_are_refused(wrong, sentence):
    with pytest.raises(ConfigError, match=sentence):
        ServingConfig(**{"name": NAME, **wrong})


def test_loopback_needs_no_key_and_a_taken_port_is_said():
    assert all(ServingConfig(NAME, host=host).loopback for host in ("127.0.0.1", "::1", "localhost", "127.8.8.8"))
    assert not ServingConfig(NAME, host="example.org", api_key="x").loopback
    with listen(ServingConfig(NAME, port=0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(MicrogliaError, match=rf"127.0.0.1:{port} cannot be listened on"):
            listen(ServingConfig(NAME, port=port))
