"""A pytest plugin: run another library's tests with all of its functions decorated.

    LIBRARY=sqlparse DECORATOR=timeit python -m pytest -p wrap_everything sqlparse/tests

`python tests/benchmark.py wrapped` downloads a library and does this for each decorator.
"""

import importlib
import inspect
import logging
import os
import pkgutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import decorators

Decorator = Callable[[Any], Any]
DECORATORS: dict[str, Decorator] = {
    "timeit": decorators.timeit,
    "timeit(every=)": decorators.timeit(every=1),
    "cache_profile": decorators.cache_profile(every=1),
    "profile": decorators.profile(every=0.1),
}


def modules(name: str) -> Iterator[ModuleType]:
    """A package with all that is in it, as far as it can be imported."""
    package = importlib.import_module(name)
    yield package
    for info in pkgutil.walk_packages(getattr(package, "__path__", []), f"{name}."):
        try:
            yield importlib.import_module(info.name)
        except Exception:  # noqa: BLE001, S112 - such as a missing optional dependency
            continue


def wrap_everything(library: str, decorator: Decorator) -> int:
    """Decorate all functions and methods of a library; return how many there were."""
    wrapped: dict[Any, Any] = {}
    scopes: list[Any] = [*modules(library)]
    scopes += {
        value
        for module in scopes
        for value in vars(module).values()
        if isinstance(value, type) and value.__module__.split(".")[0] == library
    }
    for scope in scopes:
        for name, value in list(vars(scope).items()):
            function = inspect.unwrap(getattr(value, "__func__", value))
            if not isinstance(function, FunctionType) or isinstance(value, type):
                continue
            if function.__module__.split(".")[0] == library:
                if value not in wrapped:
                    wrapped[value] = decorator(value)
                setattr(scope, name, wrapped[value])
    return len(wrapped)


def pytest_configure() -> None:
    handler = logging.FileHandler(os.environ.get("DECORATORS_LOG", os.devnull))
    decorators.logger.addHandler(handler)
    decorators.logger.setLevel(logging.INFO)
    decorators.logger.propagate = False
    decorator = DECORATORS[os.environ["DECORATOR"]]
    wrap_everything(os.environ["LIBRARY"], decorator)
