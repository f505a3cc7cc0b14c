"""The registry, where models take each other's place and go away."""

from __future__ import annotations

import pytest

from kserve_lite import Model, ModelNotFound
from kserve_lite.registry import Registry


def registry_of(*versions: str | None) -> tuple[Registry, list[Model]]:
    registry = Registry()
    models = [Model("m", version=version) for version in versions]
    for model in models:
        registry.add(model)
    return registry, models


def test_a_model_takes_the_place_of_its_name_and_version() -> None:
    registry, (first, second) = registry_of("1", "2")
    other = Model("m", version="2")
    assert registry.replace(other) is second
    assert registry.get("m") is other
    assert registry.get("m", "1") is first
    assert list(registry) == [first, other]
    alone = Model("alone")
    assert registry.replace(alone) is None
    assert registry.names() == ["m", "alone"]


def test_what_is_removed_is_not_the_newest_any_more() -> None:
    registry, (first, second) = registry_of("1", "2")
    registry.remove(second)
    assert registry.get("m") is first
    with pytest.raises(ModelNotFound):
        registry.get("m", "2")
    registry.remove(first)
    assert "m" not in registry
    assert len(registry) == 0
    with pytest.raises(ModelNotFound):
        registry.get("m")
