"""Where the official data files lie, for tests that read them in place; they are no part of the project."""

from pathlib import Path

import pytest

DATA = Path(__file__).resolve().parents[2] / "shared/data"


def official(name: str) -> tuple[Path, pytest.MarkDecorator]:
    """The folder of a data set beside the checkout, and a mark that skips where it is absent."""
    folder = DATA / name
    return folder, pytest.mark.skipif(
        not folder.is_dir(), reason=f"the official {name} files are not beside the checkout"
    )
