"""Fixtures that every test may ask for."""

import pytest

from tests.tiny import FAMILIES


@pytest.fixture(params=list(FAMILIES))
def family(request):
    """Each family of tests.tiny in turn."""
    return request.param
