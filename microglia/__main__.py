"""`python -m microglia` is the command `microglia`."""

from microglia.cli.main import app

if __name__ == "__main__":
    app()
