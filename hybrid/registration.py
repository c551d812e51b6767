"""Makes transformers' Auto classes know the model after `import hybrid`.

Importing transformers' model code takes longer than all of `hybrid` may add to a command, and most commands never ask
an Auto class for a student. So nothing is imported here: the classes are registered when transformers' own tables are
loaded, by whom and whenever that may be.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

from hybrid.config import MODEL_TYPE

PACKAGE = "hybrid.hf"
"""Imported by a name that is put together here: stages do not depend on it, so its code is not part of their keys."""


def _register_config(tables: ModuleType) -> None:
    configuration = import_module(f"{PACKAGE}.configuration_{MODEL_TYPE}")
    tables.AutoConfig.register(MODEL_TYPE, configuration.HybridLlamaConfig, exist_ok=True)


def _register_model(tables: ModuleType) -> None:
    configuration = import_module(f"{PACKAGE}.configuration_{MODEL_TYPE}")
    modeling = import_module(f"{PACKAGE}.modeling_{MODEL_TYPE}")
    for auto, model in (
        (tables.AutoModel, modeling.HybridLlamaModel),
        (tables.AutoModelForCausalLM, modeling.HybridLlamaForCausalLM),
    ):
        auto.register(configuration.HybridLlamaConfig, model, exist_ok=True)


_WAITING = {
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.models.auto.modeling_auto": _register_model,
}


class _Registration(MetaPathFinder):
    """Finds transformers' tables as Python would, and adds a step to their loading."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _WAITING:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            _WAITING[fullname](module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Registers now what is loaded already, the rest when it is."""
    if not any(isinstance(finder, _Registration) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Registration())
    for name, step in _WAITING.items():
        if name in sys.modules:
            step(sys.modules[name])
