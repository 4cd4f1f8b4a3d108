"""Tests; a package, so that they can share `tests.tiny` and `tests.reference` wherever pytest is started."""
