"""Whatever stands in a file: it is read, or refused by an error of ours in one sentence."""

import json

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from microglia.checkpoint import MicrogliaConfig
from microglia.errors import CheckpointError, DataError
from microglia.record import Record, append_records, read_records
from microglia.tasks.rows import read_rows
from tests.test_checkpoint_format_1 import VERBATIM
from tests.tiny import tiny_model
from tests.tiny_folder import checkpoint_for

few = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
NUMBERS = st.integers() | st.floats() | st.just(10**400)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def done(action, kind):
    """What the action gives, or the sentence of an error of this kind; any other error is a failure."""
    try:
        return action(), ""
    except kind as error:
        return None, str(error)


DEEP, LONG = b"[" * 100_000, b"1" * 5000


@few
@given(st.binary(max_size=60))
@example(DEEP)
@example(LONG)
@example(b'{"question": "\xff", "answer": "1"}')
@example("{'question': 1}".encode("utf-16"))
def test_any_bytes_as_examples(tmp_path, data):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(data)
    rows, sentence = done(lambda: read_rows(path, ("question", "answer")), DataError)
    assert "\n" not in sentence
    assert str(path) in sentence if rows is None else all(isinstance(row["question"], str) for row in rows)


@few
@given(st.binary(max_size=60) | VALUES.map(lambda value: json.dumps(value).encode()))
@example(DEEP)
@example(LONG)
@example(b'{"name": "x", "value": 1, "unit": "s", "n": []}')
def test_any_bytes_as_records(tmp_path, data):
    path = tmp_path / "records.jsonl"
    path.write_bytes(data)
    records, sentence = done(lambda: read_records(path), DataError)
    assert "\n" not in sentence
    assert str(path) in sentence if records is None else all(isinstance(record, Record) for record in records)


@few
@given(st.text(max_size=20), st.floats(), st.dictionaries(st.text(max_size=5), VALUES, max_size=3))
def test_a_record_is_read_as_it_was_written_or_not_written(tmp_path, name, value, extra):
    path = tmp_path / "records.jsonl"
    path.unlink(missing_ok=True)
    record = Record(name, value, "s", extra=extra)
    _, sentence = done(lambda: append_records(path, [record]), DataError)
    assert not path.exists() if sentence else read_records(path) == [record]


@pytest.fixture(scope="module", params=[1, 2], ids="format {}".format)
def saved_row(request):
    """A configuration as JSON, of either format, without the checksum of itself."""
    row = (
        json.loads(VERBATIM)
        if request.param == 1
        else json.loads(checkpoint_for(tiny_model("llama")).config.to_json({}))
    )
    return {**row, "sha256": {"agents.safetensors": "0"}}


@few
@given(st.binary(max_size=80))
@example(DEEP)
@example(LONG)
def test_any_bytes_as_a_configuration(data):
    with pytest.raises(CheckpointError) as caught:
        MicrogliaConfig.from_json(data, "it")
    assert "\n" not in str(caught.value)


@few
@given(data=st.data(), value=VALUES)
def test_a_configuration_with_any_field_changed(saved_row, data, value):
    row = json.loads(json.dumps(saved_row))
    site = row["sites"][0]
    place = data.draw(st.sampled_from([row, row, site, site.get("geometry", site)]))
    place[data.draw(st.sampled_from(sorted(place)))] = value
    text = json.dumps(row).encode()
    read, sentence = done(lambda: MicrogliaConfig.from_json(text, "it")[0], CheckpointError)
    assert "\n" not in sentence
    if read is not None:
        assert MicrogliaConfig.from_json(read.to_json({}), "it")[0] == read  # what was read can be written again
