"""One server for the tests that leave it as it is."""

import pytest

from tests.serving.served import running, tiny_pruned


@pytest.fixture(scope="module")
def model():
    return tiny_pruned()


@pytest.fixture(scope="module")
def served(model):
    with running(model) as server:
        yield server
