"""EgoHOD: video-language pretraining on the fine-grained dynamics of hands and objects."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from egohod.api import (
        create_model,
        create_model_and_transforms,
        embed,
        list_benchmarks,
        list_models,
        load_benchmark,
        load_clip,
        load_weights,
        model_info,
    )
    from egohod.publish import push_to_hub

__version__ = "0.2.0.dev0"
"""The only place of the version; pyproject.toml reads it."""

__all__ = [
    "create_model",
    "create_model_and_transforms",
    "embed",
    "list_benchmarks",
    "list_models",
    "load_benchmark",
    "load_clip",
    "load_weights",
    "model_info",
    "push_to_hub",
]


def __getattr__(name: str) -> Any:
    """The public functions, imported when first asked for: programs that need no model start fast."""
    if name not in __all__:
        raise AttributeError(f"module 'egohod' has no attribute '{name}'")
    from egohod import api, publish

    return getattr(publish if name == "push_to_hub" else api, name)
