"""The models that a server serves, by name and version."""

from __future__ import annotations

from collections.abc import Iterator

from kserve_lite.errors import ModelDefinitionError, ModelNotFound
from kserve_lite.model import Model


class Registry:
    """Models by name, and by version within a name, in the order they were added."""

    def __init__(self) -> None:
        self._models: dict[str, dict[str | None, Model]] = {}
        self._newest: dict[str, Model] = {}

    def add(self, model: Model) -> None:
        """Add a model; raise ModelDefinitionError if name and version are taken."""
        versions = self._models.setdefault(model.name, {})
        if model.version in versions:
            raise ModelDefinitionError(
                f"Two models are named {model.name!r} and have the same version: give "
                "one another name, or another version."
            )
        versions[model.version] = model
        self._newest[model.name] = versions[max(versions, key=_age)]

    def replace(self, model: Model) -> Model | None:
        """Add a model; return the one of its name and version, whose place it takes."""
        versions = self._models.get(model.name, {})
        before = versions.pop(model.version, None)
        self.add(model)
        return before

    def remove(self, model: Model) -> None:
        """Take a model away that is here."""
        versions = self._models[model.name]
        del versions[model.version]
        if versions:
            self._newest[model.name] = versions[max(versions, key=_age)]
        else:
            del self._models[model.name], self._newest[model.name]

    def get(self, name: str, version: str | None = None) -> Model:
        """Return the model; without a version the newest one of that name.

        Versions that are numbers are newer than others and ordered as numbers. Raises
        ModelNotFound.
        """
        newest = self._newest.get(name)
        if newest is None:
            raise ModelNotFound(name)
        if version is None:
            return newest
        model = self._models[name].get(version)
        if model is None:
            raise ModelNotFound(name, version)
        return model

    def __contains__(self, name: str) -> bool:
        return name in self._models

    def names(self) -> list[str]:
        return list(self._models)

    def of_name(self, name: str) -> list[Model]:
        """Every version of a name; raise ModelNotFound where there is none."""
        if name not in self._models:
            raise ModelNotFound(name)
        return list(self._models[name].values())

    def versions(self, name: str) -> list[str]:
        """The versions of a name, oldest first; a model without one is not listed."""
        known = [version for version in self._models[name] if version is not None]
        return sorted(known, key=_age)

    def __iter__(self) -> Iterator[Model]:
        for versions in self._models.values():
            yield from versions.values()

    def __len__(self) -> int:
        return sum(map(len, self._models.values()))


def _age(version: str | None) -> tuple[int, int, str]:
    """A sort key: no version, then names, then numbers in numeric order."""
    if version is None:
        return (0, 0, "")
    if version.isdecimal():
        return (2, int(version), version)
    return (1, 0, version)
