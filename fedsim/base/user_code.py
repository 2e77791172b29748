"""Loading of modules that a configuration names, and one-line errors for a user's file.

This is the one place that runs code from a file which is not fedsim's.
"""

from __future__ import annotations

import errno
import hashlib
import importlib
import importlib.machinery
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from fedsim.base.errors import ConfigError, FedsimError, RunError
from fedsim.base.paths import user_path

_files: dict[str, str] = {}
"""Source file of each loaded module that is not fedsim's → its name in messages."""

_FEDSIM: Final = str(Path(__file__).parents[1]) + os.sep
_COLLECTIVES: Final = os.path.join("torch", "distributed", "")


def load_target(target: str) -> Any:
    """Return the built-in object that ``module:Name`` means."""
    place, _, name = target.partition(":")
    return getattr(importlib.import_module(place), name)


def register(file: str) -> None:
    """Count errors in a file as a user's, unless it is fedsim's."""
    if not file.startswith(_FEDSIM):
        _files.setdefault(file, file)


def place_of(error: BaseException) -> str:
    """Innermost line of a user's file in a traceback, ``my.py, line 12, in server_step``, or ""."""
    # A syntax error has no frame in the file that it is in.
    if isinstance(error, SyntaxError) and error.filename in _files:
        return f"{_files[error.filename]}, line {error.lineno}"
    found = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_filename in _files:
            found = f"{_files[frame.f_code.co_filename]}, line {line}, in {frame.f_code.co_name}"
    return found


def in_words(error: BaseException) -> str:
    """Format an error as one line: its place in a user's file, its type and its message."""
    message = " ".join(str(error).split())[:500]
    parts = (place_of(error), type(error).__name__, message)
    return ": ".join(part for part in parts if part)


def passes_through(error: BaseException) -> bool:
    """True for an error that is not the user's, though it came through the user's code.

    These are full memory, a full disk, and a lost process.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    # A collective that the user's code called, below its innermost line.
    in_collective = False
    for frame, _ in traceback.walk_tb(error.__traceback__):
        file = frame.f_code.co_filename
        if file in _files:
            in_collective = False
        elif _COLLECTIVES in file:
            in_collective = True
    return in_collective


def _location(error: BaseException) -> str:
    """Line on which an error was raised, in any file: ``file.py, line 12``."""
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    return f"{frame.f_code.co_filename}, line {line}"


def _is_call_that_does_not_fit(error: BaseException) -> bool:
    """True for a TypeError of a call by fedsim that the user's function does not accept.

    No line of the function ran, so that all frames are fedsim's.
    """
    if not isinstance(error, TypeError):
        return False
    files = {frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)}
    return all(file.startswith(_FEDSIM) for file in files)


@contextmanager
def calling(
    what: str,
    kind: type[FedsimError] = RunError,
    *,
    quiet: bool = False,
) -> Iterator[None]:
    """Turn an error of a user's code in the block into one line that names file and line.

    Args:
        what: ``key=value`` that names the code.
        kind: class of the error that is raised.
        quiet: leave out the error's message, since it may quote a row or a reply; errors of fedsim
            keep theirs.
    """
    try:
        yield
    except FedsimError:
        raise
    except (Exception, SystemExit) as error:
        place = place_of(error)
        if passes_through(error):
            raise
        if _is_call_that_does_not_fit(error):
            words = in_words(error)
        elif quiet:
            words = f"{place or _location(error)}: {type(error).__name__}"
        elif place:
            words = in_words(error)
        else:  # a bug of fedsim's
            raise
        raise kind(f"{what}: {words}") from None


class _SourceLoader(importlib.machinery.SourceFileLoader):
    """Loader that runs the source that was read, never cached bytecode.

    Python matches bytecode only by the source's size and its time in seconds.
    """

    def __init__(self, name: str, path: str, source: bytes) -> None:
        super().__init__(name, path)
        self.source = source

    def path_stats(self, path: str) -> Mapping[str, Any]:
        raise OSError  # so that the import system looks for no bytecode

    def get_data(self, path: str) -> bytes:
        return self.source


def load_module(place: str, what: str, is_builtin: bool = False) -> ModuleType:
    """Load the module of a name, or of a path that ends with ``.py``.

    Args:
        place: the name or path.
        what: ``key=value`` that names it, for errors.
        is_builtin: it is fedsim's, and its errors are not a user's.

    Raises:
        ConfigError: there is none, or it cannot be imported.
    """
    with calling(what, ConfigError):
        if place.endswith(".py"):
            return _file_module(user_path(place), what)
        try:
            module = importlib.import_module(place)
        except (Exception, SystemExit) as error:
            # The module itself is missing, or a package that it lies in; not one that it imports.
            if isinstance(error, ModuleNotFoundError) and f"{place}.".startswith(f"{error.name}."):
                fix = "put its folder on PYTHONPATH, or give path/to/file.py:Name"
                raise ConfigError(f"{what}: there is no module {error.name}; {fix}") from error
            if not is_builtin:
                _register_failed(place, error)
            raise
        file = getattr(module, "__file__", None)
        if not is_builtin and file is not None:  # modules in C may have no file
            _files.setdefault(file, file)
        return module


def _register_failed(place: str, error: BaseException) -> None:
    """Count errors of a module that could not be imported as a user's."""
    if isinstance(error, SyntaxError):
        file = error.filename
    else:
        spec = importlib.util.find_spec(place)
        file = None if spec is None else spec.origin
    if file is not None:
        _files.setdefault(file, file)


def _file_module(path: Path, what: str) -> ModuleType:
    """The module of a file, loaded once a process; a changed file is another module."""
    try:
        source = path.read_bytes()
    except OSError as error:
        reason = f"cannot be read ({error.strerror})"
        raise ConfigError(f"{what}: {path} {reason}; give the path of a file") from error
    # A name of path and content: equal files share one module, changed ones do not.
    full = str(path.resolve())
    name = f"fedsim_extension_{hashlib.sha256(full.encode() + source).hexdigest()[:16]}"
    if name not in sys.modules:
        loader = _SourceLoader(name, full, source)
        spec = importlib.util.spec_from_file_location(name, full, loader=loader)
        assert spec is not None and spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        _files[full] = str(path)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]
