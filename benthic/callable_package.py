"""Lets ``benthic.train(config)`` and ``benthic.plan(config)`` be called although they are packages.

Importing ``benthic.train.anything`` binds ``benthic.train`` to the package, over any function of that name. A
package that can itself be called is both at once, in whichever order things are imported.
"""

import importlib
import sys
from types import ModuleType
from typing import Any


def make_callable(package: str, module: str, function: str) -> None:
    """Calling the module object ``package`` calls ``function`` of ``module``, which is imported only then."""

    class CallablePackage(ModuleType):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return getattr(importlib.import_module(module), function)(*args, **kwargs)

    sys.modules[package].__class__ = CallablePackage
