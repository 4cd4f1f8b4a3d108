"""The server stops, whatever its clients do; nobody without the key, and no slow client, keeps it busy."""

import json
import logging
import socket
import threading
import time
from contextlib import closing, contextmanager

import openai
import pytest

from microglia.errors import ConfigError
from microglia.serving import app, run
from microglia.serving.config import ServingConfig
from tests.serving.served import NAME, PATIENCE, alone, running, tiny_pruned

TEXT = {"model": NAME, "prompt": "1 + 1 =", "max_tokens": 12}
SMALL = 4096  # bytes that a socket holds back
KEY = "sesame"


@pytest.fixture
def model():
    return tiny_pruned()


def connect(served):
    """A socket to the server, which takes little of what is sent to it."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL)
    client.settimeout(PATIENCE)
    address = served.server.servers[0].sockets[0].getsockname()
    client.connect(address)
    return closing(client)


def request(body, *headers, length=None):
    """The bytes of a request; `length` when it is to promise more than it sends."""
    content = json.dumps(body).encode()
    lines = ["POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json", *headers]
    return "\r\n".join([*lines, f"Content-Length: {length or len(content)}", "", ""]).encode() + content


def received(client):
    """All that the server sends until it closes the connection."""
    return b"".join(iter(lambda: client.recv(65536), b"")).decode()


@contextmanager
def never_read(served):
    """While inside, a client has asked for more than the connection holds, and reads none of it."""
    served.server.servers[0].sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL)
    with connect(served) as client:
        client.sendall(request({"model": NAME, "prompt": ["1 + 1 ="] * 8, "max_tokens": 300, "stream": True}))
        until(lambda: served.app.state.service.pending)
        yield client


def until(done):
    for _ in range(6000):
        if done():
            return
        time.sleep(0.01)
    raise AssertionError("waited in vain")


def stopped(served):
    """Seconds until the server has stopped."""
    start = time.monotonic()
    served.server.should_exit = True
    served.thread.join(60)
    assert not served.thread.is_alive()
    return time.monotonic() - start


def test_half_a_body_does_not_keep_the_server_from_stopping(model, monkeypatch, caplog):
    monkeypatch.setattr(run, "CLOSING", 0.2)
    with running(model) as served, connect(served) as body, connect(served) as headers:
        body.sendall(request(TEXT, length=1000))
        headers.sendall(b"POST /v1/completions HT")
        until(lambda: len(served.server.server_state.connections) == 2 and served.server.server_state.tasks)
        assert stopped(served) < 30
        assert received(body) == received(headers) == ""
        assert served.app.state.service.cut == set()
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


def test_a_client_that_never_reads_does_not_keep_the_server_from_stopping(model, monkeypatch, caplog):
    monkeypatch.setattr(run, "CLOSING", 0.2)
    with running(model) as served, never_read(served):
        until(lambda: not served.app.state.service.unanswered)
        assert stopped(served) < 30
        assert len(served.app.state.service.cut) == 1
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


def test_a_client_that_never_reads_is_cut_off(model, monkeypatch):
    monkeypatch.setattr(run, "SENDING", 0.2)
    with running(model) as served, never_read(served):
        until(lambda: not served.app.state.service.pending)
        until(lambda: not served.server.server_state.connections)
        assert served.client.completions.create(**TEXT).choices[0].text == alone(TEXT["prompt"], 12).texts[0]


def test_a_body_that_does_not_arrive_is_refused(model, monkeypatch):
    monkeypatch.setattr(app, "RECEIVING", 0.2)
    with running(model) as served, connect(served) as client:
        client.sendall(request(TEXT, length=1000))
        said = received(client)
        assert said.startswith("HTTP/1.1 408")
        assert "the request's body did not arrive in time; send it again, all at once" in said
        # The limit is the body's, not the answer's.
        with served.held() as go:
            stream = served.client.completions.create(**TEXT, stream=True)
            assert not go.wait(0.5)
            go.set()
            assert "".join(chunk.choices[0].text for chunk in stream) == alone(TEXT["prompt"], 12).texts[0]


def test_the_key_is_looked_at_before_the_body(model):
    with running(model, api_key=KEY) as served:
        for header, sentence in ((), "no API key was given"), (("Authorization: Bearer x",), "the API key is wrong"):
            with connect(served) as client:
                client.sendall(request(TEXT, "Connection: close", *header, length=1000))
                said = received(client)
                assert said.startswith("HTTP/1.1 401")
                assert sentence in said
        wrong = served.http.post("/v1/completions", content=b"{", headers={"Content-Type": "application/json"})
        assert wrong.status_code == 401
        assert served.app.openapi()["paths"]["/v1/completions"]["post"]["security"] == [{"HTTPBearer": []}]
        assert served.client.completions.create(**TEXT).usage.completion_tokens == 12


def test_the_grace_that_cuts_answers_is_a_sentence_and_no_traceback(model, caplog):
    with running(model, grace=0.3) as served:
        slow = model.lm.register_forward_pre_hook(lambda *_: time.sleep(0.05))
        stream = iter(served.client.completions.create(**{**TEXT, "max_tokens": 300}, stream=True))
        next(stream)
        whole = []

        def ask():
            with pytest.raises(openai.InternalServerError) as caught:
                served.client.completions.create(**{**TEXT, "max_tokens": 300})
            whole.append(caught.value)

        asking = threading.Thread(target=ask)
        asking.start()
        until(lambda: len(served.app.state.service.unanswered) == 2)
        stopped(served)
        with pytest.raises(openai.APIError, match="the server is shutting down; ask again when it is back"):
            list(stream)
        asking.join(60)
        assert (whole[0].status_code, whole[0].code) == (503, "stopping")
        assert len(served.app.state.service.cut) == 2
        assert served.metric("microglia_answers_total", reason="cut") == 2
        slow.remove()
    assert caplog.records == []


def test_answers_that_wait_in_the_queue_are_finished_too(model):
    with running(model, max_batch=1) as served, served.held() as go:
        streams = [served.client.completions.create(**TEXT, stream=True) for _ in range(3)]
        assert go.reached.wait(60)
        served.server.should_exit = True
        until(lambda: not served.server.servers[0].sockets)
        go.set()
        texts = ["".join(chunk.choices[0].text for chunk in stream) for stream in streams]
        assert texts == [alone(TEXT["prompt"], 12).texts[0]] * 3
        stopped(served)
        assert served.app.state.service.cut == set()


def test_a_step_that_does_not_end_is_not_waited_for(model, monkeypatch):
    monkeypatch.setattr(run, "CLOSING", 0.2)
    monkeypatch.setattr(app, "LAST_STEP", 0.2)
    with running(model, grace=0) as served, served.held() as go:
        stream = served.client.completions.create(**TEXT, stream=True)
        assert go.reached.wait(60)
        assert stopped(served) < 30
        with pytest.raises(openai.APIError, match="the server is shutting down"):
            list(stream)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"grace": float("nan")}, "grace=nan was given; it must be a number of seconds, 0 or more"),
        ({"grace": -1.0}, "grace=-1.0 was given; it must be a number of seconds, 0 or more"),
        *(({"api_key": key}, "the API key must be ASCII, printable") for key in ("", "a\n", " a", "a\tb", "é")),
    ],
)
def test_what_could_never_work_is_refused(wrong, sentence):
    with pytest.raises(ConfigError, match=sentence):
        ServingConfig(NAME, **wrong)
