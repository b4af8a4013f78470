"""Functions of a user's own, by `module:function`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bridge.errors import UsageError


def imported_function(name: str, said: str, what: str) -> Callable[..., Any]:
    """The function, found as Python finds modules, and in the folder that one stands in.

    Raises UsageError that begins with `said`, also for what is no function of `what`. `name` has a colon.
    """
    module_name, _, function_name = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)
    try:
        found: Any = getattr(importlib.import_module(module_name), function_name)
    except Exception as error:  # whatever a module does when it is imported
        why = " ".join(str(error).split())
        raise UsageError(f"{said} cannot be imported ({type(error).__name__}: {why})") from error
    if not callable(found):
        raise UsageError(f"{said} is no function of {what}")
    function: Callable[..., Any] = found
    return function
