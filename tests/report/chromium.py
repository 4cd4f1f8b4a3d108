"""A Chromium that is already there: named by MICROGLIA_CHROMIUM, installed by the system, or playwright's own."""

import os
import shutil
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chromium-headless-shell", "chrome")


def find_chromium(playwright) -> str | None:
    """Path of an executable, None where there is none."""
    given = os.environ.get("MICROGLIA_CHROMIUM")
    places = [given, *map(shutil.which, NAMES), playwright.chromium.executable_path]
    return next((place for place in places if place and Path(place).is_file()), None)
