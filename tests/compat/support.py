"""A server of KServe's models inside the test's process."""

from __future__ import annotations

from typing import Any

from kserve_lite import Server
from kserve_lite.compat import ModelRepository
from kserve_lite.compat.lives import Lives
from kserve_lite.compat.model import BaseKServeModel
from kserve_lite.server.settings import make_settings
from tests.support import ServerThread


class CompatThread(ServerThread):
    """What `ModelServer.start` runs, on a free loopback port in a thread."""

    def __init__(
        self,
        *models: BaseKServeModel,
        repository: ModelRepository | None = None,
        on_loop: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.repository = repository or ModelRepository()
        for model in models:
            self.repository.update(model)
        self.lives = Lives(self.repository, on_loop=on_loop)

    def make(self) -> Server:
        settings = make_settings(self._settings)
        return Server(self.lives.models(), settings, guest=self.lives)
