"""Two processes on one machine, as `torchrun --nproc-per-node 2` starts them, talking over gloo."""

import multiprocessing
import os
import socket
import traceback

PATIENCE = 600  # seconds; a slow machine is no failure


def start_pair(function, *arguments, preload=()):
    """Call `function(*arguments)` in both processes at once.

    Raises AssertionError with the traceback of the process that failed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.pair", *preload])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    errors = context.SimpleQueue()
    given = (port, errors, function, arguments)
    pair = [context.Process(target=_one, args=(rank, *given), daemon=True) for rank in (0, 1)]
    for process in pair:
        process.start()
    failure = None
    for process in pair:
        process.join(PATIENCE if failure is None else 1)
        if process.exitcode != 0 and failure is None:
            failure = f"process {pair.index(process)} ended with {process.exitcode}"
    for process in pair:
        process.kill()
    while not errors.empty():
        failure = errors.get()
    assert failure is None, failure


def _one(rank, port, errors, function, arguments):
    import torch

    from microglia import processes

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""}
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    try:
        function(*arguments)
        processes.leave()
    except BaseException:
        errors.put(traceback.format_exc())
        os._exit(1)
