"""Modules that a configuration names: how they are loaded, and how an error in a user's file is told.

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
"""Source file of each loaded module that is not fedsim's → how messages name it."""

_FEDSIM: Final = str(Path(__file__).parents[1]) + os.sep
_COLLECTIVES: Final = os.path.join("torch", "distributed", "")


def load_target(target: str) -> Any:
    """The object of fedsim's that ``module:Name`` means."""
    place, _, name = target.partition(":")
    return getattr(importlib.import_module(place), name)


def register(file: str) -> None:
    """Take errors of a file for a user's."""
    if not file.startswith(_FEDSIM):
        _files.setdefault(file, file)


def place_of(error: BaseException) -> str:
    """``my.py, line 12, in server_step``: the innermost line of a user's file that an error came through; else ""."""
    if isinstance(error, SyntaxError) and error.filename in _files:
        return f"{_files[error.filename]}, line {error.lineno}"
    found = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_filename in _files:
            found = f"{_files[frame.f_code.co_filename]}, line {line}, in {frame.f_code.co_name}"
    return found


def in_words(error: BaseException) -> str:
    """An error in one line: its type and message, behind its place in a user's file."""
    message = " ".join(str(error).split())[:500]
    return ": ".join(part for part in (place_of(error), type(error).__name__, message) if part)


def passes_through(error: BaseException) -> bool:
    """True for what is no fault of a user's code although it came through it: memory, disk, or a lost process."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    files = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
    users = [position for position, file in enumerate(files) if file in _files]
    return any(_COLLECTIVES in file for file in files[users[-1] + 1 if users else 0 :])


def _location(error: BaseException) -> str:
    """``file.py, line 12``: where an error was raised, whoever's file it is."""
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    return f"{frame.f_code.co_filename}, line {line}"


def _is_call_that_does_not_fit(error: BaseException) -> bool:
    """True for a TypeError of fedsim's own call: the user's function has another signature, and no line of it ran."""
    files = {frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)}
    return isinstance(error, TypeError) and all(file.startswith(_FEDSIM) for file in files)


@contextmanager
def calling(what: str, kind: type[FedsimError] = RunError, *, quiet: bool = False) -> Iterator[None]:
    """The block calls a user's code: an error there becomes one line that names file and line.

    Args:
        what: ``key=value`` that names the code.
        kind: of the error.
        quiet: leave out the error's message, since it may quote a row or a reply; fedsim's own errors keep theirs.
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
        else:
            raise
        raise kind(f"{what}: {words}") from None


class _SourceLoader(importlib.machinery.SourceFileLoader):
    """Runs the source that was read, never cached bytecode, which is matched by seconds and size alone."""

    def __init__(self, name: str, path: str, source: bytes) -> None:
        super().__init__(name, path)
        self.source = source

    def path_stats(self, path: str) -> Mapping[str, Any]:
        raise OSError

    def get_data(self, path: str) -> bytes:
        return self.source


def load_module(place: str, what: str, is_own: bool = False) -> ModuleType:
    """The module of a name, or of a path that ends with ``.py``.

    Args:
        what: ``key=value`` that names it, for errors.
        is_own: it is fedsim's, whose errors are no user's.

    Raises:
        ConfigError: there is none, or it cannot be imported.
    """
    with calling(what, ConfigError):
        if place.endswith(".py"):
            return _file_module(user_path(place), what)
        try:
            module = importlib.import_module(place)
        except (Exception, SystemExit) as error:
            if isinstance(error, ModuleNotFoundError) and f"{place}.".startswith(f"{error.name}."):
                fix = "put its folder on PYTHONPATH, or give path/to/file.py:Name"
                raise ConfigError(f"{what}: there is no module {error.name}; {fix}") from error
            if not is_own:
                spec = importlib.util.find_spec(place)
                file = error.filename if isinstance(error, SyntaxError) else spec.origin if spec is not None else None
                if file is not None:
                    _files.setdefault(file, file)
            raise
        if not is_own and (file := getattr(module, "__file__", None)) is not None:  # built-in modules have none
            _files.setdefault(file, file)
        return module


def _file_module(path: Path, what: str) -> ModuleType:
    """The module of a file, loaded once a process; a changed file is another module."""
    try:
        source = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{what}: {path} cannot be read ({error.strerror}); give the path of a file") from error
    full = str(path.resolve())
    name = f"fedsim_extension_{hashlib.sha256(full.encode() + source).hexdigest()[:16]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, full, loader=_SourceLoader(name, full, source))
        assert spec is not None and spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        _files[full] = str(path)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]
