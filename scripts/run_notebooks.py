"""Run the notebooks, each in a folder of its own; begin none after the first that fails.

python scripts/run_notebooks.py --small                    # offline on the embedded reasoner
python scripts/run_notebooks.py --small --save             # and keep what they print in the notebooks
python scripts/run_notebooks.py --small quick_demo         # one of them
python scripts/run_notebooks.py --small --at-once 2        # two side by side, which disturbs the times in them
"""

import argparse
import os
import re
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
LONGEST = 24 * 3600  # seconds for one cell


def run(path: Path, *, save: bool) -> float:
    """Execute a notebook; returns the seconds that it took. Raises CellExecutionError."""
    notebook = nbformat.read(path, as_version=4)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook, timeout=LONGEST, kernel_name="python3", resources={"metadata": {"path": folder}}
        )
        client.execute()
    if save:
        for cell in notebook.cells:
            tidy(cell)
        notebook.metadata.pop("widgets", None)
        nbformat.write(notebook, path)
    return time.monotonic() - began


def tidy(cell: nbformat.NotebookNode) -> None:
    """Keep what a reader wants to see: no execution times, no progress bars, no colours of a terminal, one text."""
    cell.metadata.pop("execution", None)
    if cell.cell_type != "code":
        return
    printed = "".join(out.text for out in cell.outputs if out.get("name") == "stdout")
    shown = [out for out in cell.outputs if out.output_type != "stream"]
    plain = re.sub(r"\x1b\[[0-9;]*m", "", printed)
    cell.outputs = [*([nbformat.v4.new_output("stream", name="stdout", text=plain)] if plain else []), *shown]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="of notebooks; all without")
    parser.add_argument("--small", action="store_true", help="offline on the embedded reasoner")
    parser.add_argument("--save", action="store_true", help="keep the outputs")
    parser.add_argument("--at-once", type=int, default=1, metavar="N", help="run so many side by side (default: 1)")
    options = parser.parse_args()
    if options.at_once < 1:
        parser.error(f"--at-once {options.at_once} was given; it must be at least 1")
    if options.save and options.at_once > 1:
        parser.error("--save keeps the times that a notebook measures; leave out --at-once")
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # for `microglia`
    if options.small:
        os.environ |= {"MICROGLIA_SMALL": "1", "HF_HUB_OFFLINE": "1"}
    known = {path.stem: path for path in sorted(FOLDER.glob("*.ipynb"))}
    if unknown := sorted(set(options.names) - known.keys()):
        parser.error(f"there is no notebook {', '.join(unknown)}; choose from {', '.join(known)}")
    if options.at_once > 1:  # processes that share the cores would wait for one another's threads
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // options.at_once)))
    with ThreadPoolExecutor(options.at_once) as pool:  # each notebook has a kernel, a process of its own
        runs = {pool.submit(run, known[name], save=options.save): name for name in options.names or known}
        for finished in as_completed(runs):
            try:
                print(f"{runs[finished]}: {finished.result():.0f} s", flush=True)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


if __name__ == "__main__":
    main()
