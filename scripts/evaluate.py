"""The same as `microglia evaluate`, for those who know the original project's scripts."""

import sys

from microglia.cli.main import app

if __name__ == "__main__":
    app(["evaluate", *sys.argv[1:]])
