"""The worker processes of the test pool: imports once, forks, then each runs the functions that it is sent.

Started as a script by ``conftest.py``: ``worker.py DESCRIPTOR …``, one inherited pipe per worker. A task is
(environment, file, function name, arguments); the file is loaded by its path, so that a test's functions need no
installed package.
"""

from __future__ import annotations

import faulthandler
import importlib.util
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import ModuleType
from typing import Any

import matplotlib.pyplot  # noqa: F401  heavy imports, paid for once before the fork

import fedsim.run.simulation  # noqa: F401

_loaded: dict[str, ModuleType] = {}


def function(file: str, name: str) -> Callable[..., Any]:
    """A module-level function of a test file."""
    if file not in _loaded:
        spec = importlib.util.spec_from_file_location(f"worker_{len(_loaded)}", file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        _loaded[file] = module
    found: Callable[..., Any] = getattr(_loaded[file], name)
    return found


def serve(connection: Connection) -> None:
    """Run tasks until the pool hangs up; an error goes back as its traceback's text."""
    connection.send(os.getpid())
    while True:
        try:
            environment, file, name, arguments = connection.recv()
        except EOFError:
            return
        os.environ.update(environment)
        try:
            answer = ("ok", function(file, name)(*arguments))
            message = pickle.dumps(answer)
        except BaseException:
            message = pickle.dumps(("error", traceback.format_exc()))
        connection.send_bytes(message)


def main(descriptors: list[int]) -> None:
    """Fork one worker per pipe and wait for them."""
    for mine in descriptors:
        if os.fork() == 0:
            for other in descriptors:
                if other != mine:
                    os.close(other)
            faulthandler.register(signal.SIGUSR1, all_threads=False)
            serve(Connection(mine))
            os._exit(0)
    for descriptor in descriptors:
        os.close(descriptor)
    for _ in descriptors:
        os.wait()


if __name__ == "__main__":
    main([int(word) for word in sys.argv[1:]])
