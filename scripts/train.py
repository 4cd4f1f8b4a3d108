"""The same as `microglia train`, for those who know the original project's scripts."""

import sys

from microglia.cli.main import app

if __name__ == "__main__":
    app(["train", *sys.argv[1:]])
