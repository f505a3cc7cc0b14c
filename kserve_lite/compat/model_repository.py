"""The models of a server by name, as KServe's SDK keeps them.

A server serves what is in here. `update` and `unload` tell it, from any thread; after
a client's load or unload it looks by itself. Nothing here serves: that is `lives.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kserve_lite.compat.model import BaseKServeModel

MODEL_MOUNT_DIRS = "/mnt/models"


class ModelRepository:
    """Models by name; override `load` to let clients load models.

    models_dir: the folder in which `load_models` finds a subfolder for each model.
    """

    # Who is told of a change, while a server runs.
    on_change: Callable[[], object] | None = None

    def __init__(self, models_dir: str = MODEL_MOUNT_DIRS) -> None:
        self.models: dict[str, BaseKServeModel] = {}
        self.models_dir = models_dir

    def load_models(self) -> None:
        """Call `load_model` with the name of each subfolder of `models_dir`."""
        for entry in sorted(Path(self.models_dir).iterdir()):
            if entry.is_dir():
                self.load_model(entry.name)

    def set_models_dir(self, models_dir: str) -> None:
        self.models_dir = models_dir

    def get_model(self, name: str) -> BaseKServeModel | None:
        return self.models.get(name)

    def get_models(self) -> dict[str, BaseKServeModel]:
        return self.models

    async def is_model_ready(self, name: str) -> bool:
        """Whether the model is here and `healthy`."""
        model = self.get_model(name)
        if model is None:
            return False
        healthy: Any = model.healthy()
        return bool(await healthy if inspect.isawaitable(healthy) else healthy)

    def update(self, model: BaseKServeModel, name: str | None = None) -> None:
        """Add a model, or put it in the place of another.

        name: default the model's own; another one is a second name for it.
        """
        self.models[name or model.name] = model
        if self.on_change is not None:
            self.on_change()

    def load(self, name: str) -> Any:
        """What a client's load calls; to be overridden, `def` or `async def`.

        The model is served if it is in the repository and ready afterwards. This one
        does nothing.
        """

    def load_model(self, name: str) -> Any:
        """What `load_models` calls; to be overridden."""

    def unload(self, name: str) -> None:
        """Stop a model and take it away; raise KeyError where there is none."""
        model = self.models.get(name)
        if model is None:
            raise KeyError(f"model with name {name} does not exist")
        if callable(getattr(model, "stop", None)):
            model.stop()
        if getattr(model, "engine", False):
            model.stop_engine()
        del self.models[name]
        if self.on_change is not None:
            self.on_change()
