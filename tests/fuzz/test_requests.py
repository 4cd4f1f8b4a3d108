"""Any body that is sent to the server: an answer, or one sentence in an error object; never a failure."""

import json

import jsonschema
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.fuzz.test_files import VALUES
from tests.serving.served import NAME, running, tiny_pruned

few = settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
TEXTS = st.text(max_size=30) | st.text(st.characters(categories=["Cc", "Cf", "Cs", "So", "Zs"]), max_size=12)
VALID = {
    "/v1/completions": {"model": NAME, "prompt": "1 + 1 ="},
    "/v1/chat/completions": {"model": NAME, "messages": [{"role": "user", "content": "1 + 1 ="}]},
}
FIELDS = (
    "model prompt messages max_tokens max_completion_tokens temperature top_p seed stop stream stream_options n "
    "keep_ratio pruning user metadata store logprobs echo suffix best_of presence_penalty response_format tools"
).split()
LIKELY = st.sampled_from([0, 1, -1, 0.5, 2, True, "", "a", [], [""], ["a"], {}, None, 2**63, 1e-300, NAME])


@pytest.fixture(scope="module")
def served():
    with running(tiny_pruned(), max_new_tokens=3) as server:
        yield server


def said(served, path, content):
    """The response, after its error object, if it is one, was found to be as /openapi.json says."""
    response = served.http.post(path, content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 200 or 400 <= response.status_code < 500, response.text
    if response.status_code != 200:
        whole = served.app.openapi()
        shape = {"$ref": "#/components/schemas/Error", "components": whole["components"]}
        jsonschema.validate(response.json(), shape)
        sentence = response.json()["error"]["message"]
        assert sentence
        assert "\n" not in sentence
        assert "Traceback" not in sentence
    return response


@few
@given(path=st.sampled_from([*VALID]), changes=st.dictionaries(st.sampled_from(FIELDS), LIKELY | VALUES, max_size=3))
@example(path="/v1/completions", changes={"stop": "", "stream": True, "stream_options": {"include_usage": True}})
@example(path="/v1/completions", changes={"temperature": 1e-300, "top_p": 0, "seed": 2**63 - 1})
@example(path="/v1/chat/completions", changes={"messages": [{"role": "user", "content": [{}]}]})
def test_any_field_may_hold_anything(served, path, changes):
    said(served, path, json.dumps({**VALID[path], **changes}))
    assert served.http.get("/health").json()["status"] == "ok"


@few
@given(text=TEXTS)
@example(text="")
@example(text="\x00\x1b[2J\r\n")
@example(text="half a pair \ud83d")
@example(text="two halves \ud83d\ude00")
@example(text="<pad><eos><unk>")
@example(text="x" * 5000)
def test_any_prompt_is_answered_or_refused(served, text):
    arrived = json.loads(json.dumps(text))  # JSON joins a high surrogate and the low one behind it to one character
    refused = not arrived.strip() or len(arrived) > 500 or any("\ud800" <= c <= "\udfff" for c in arrived)
    for path, body in (
        ("/v1/completions", {"prompt": text}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": text}]}),
    ):
        response = said(served, path, json.dumps({"model": NAME, **body}))
        assert (response.status_code == 400) == refused
