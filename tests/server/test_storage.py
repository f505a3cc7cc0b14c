"""STORAGE_URI: which folder it gives, what beats it, and what is not understood."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

import pytest

from kserve_lite import SettingsError
from kserve_lite.server.settings import make_settings
from kserve_lite.server.storage import local_folder
from tests.server.process import App, finish

READS = """
from kserve_lite import Model, run

model = Model("m")

@model.load
def load():
    return model.path("words.txt").read_text()

@model.predict
def predict(payload, state):
    return {"predictions": [state]}

if __name__ == "__main__":
    run(model, model_dir="of-the-program")
"""


def folder_of(environment: str = "", argument: str = "", flag: str = "") -> str:
    return make_settings(
        {"model_dir": argument} if argument else {},
        environment={"STORAGE_URI": environment},
        flags={"model_dir": flag} if flag else {},
    ).server.model_dir


@pytest.mark.parametrize("form", ["{}", "file://{}", "file://localhost{}", "FILE://{}"])
def test_a_folder_is_the_models_folder(form: str, tmp_path: Path) -> None:
    assert folder_of(form.format(tmp_path)) == str(tmp_path)


def test_a_file_url_is_decoded(tmp_path: Path) -> None:
    folder = tmp_path / "two words 100%"
    folder.mkdir()
    assert folder_of(folder.as_uri()) == str(folder)
    assert "%20" in folder.as_uri()


def test_a_relative_folder_is_relative_to_where_the_server_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    assert folder_of("models") == "models"


def test_the_stronger_source_gives_the_folder(tmp_path: Path) -> None:
    uri = str(tmp_path)
    assert folder_of() == "/mnt/models"
    assert folder_of(uri, argument="here") == uri
    assert folder_of(uri, argument="here", flag="there") == "there"
    assert folder_of(uri, flag="there") == "there"
    both = {"storage_uri": uri, "model_dir": "here"}
    assert make_settings(both).server.model_dir == "here"
    assert make_settings(flags=both).server.model_dir == "here"
    beaten = make_settings(both, environment={"STORAGE_URI": uri})
    assert beaten.server.model_dir == uri
    assert beaten.given == {"storage_uri", "model_dir"}
    # Not looked at, where it is not what counts.
    assert folder_of("s3://bucket/model", flag="there") == "there"


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("s3://key:secret@bucket", "s3:// is not supported by this version"),
        ("gs://secret/model", "gs:// is not"),
        ("https://host/model?secret", "https:// is not"),
        ("hf://owner/secret", "hf:// is not"),
        ("pvc://secret/model", "pvc:// is not"),
        ("file://models/here", "three slashes"),
        ("", "no folder ''"),
        ("/not/there", "no folder '/not/there'"),
        ("file:///not/there", "no folder '/not/there'"),
        (__file__, "no folder"),
        ("/no\0where", "no folder"),
        ("/" + "long" * 2000, "no folder"),
    ],
)
def test_other_uris_are_refused(uri: str, words: str) -> None:
    with pytest.raises(SettingsError, match=words) as caught:
        local_folder(uri, "$STORAGE_URI")
    assert str(caught.value).startswith("$STORAGE_URI: ")
    assert "--model_dir" in str(caught.value) or "three slashes" in words
    assert "secret" not in str(caught.value)


def test_errors_say_who_gave_it() -> None:
    with pytest.raises(SettingsError, match=r"^--storage_uri: s3://"):
        make_settings(flags={"storage_uri": "s3://b/m"})
    with pytest.raises(SettingsError, match=r"^storage_uri: s3://"):
        make_settings({"storage_uri": "s3://b/m"})


def test_a_process_loads_from_where_kserve_says(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(READS)
    models = tmp_path / "models"
    models.mkdir()
    (models / "words.txt").write_text("found")
    with App("app.py", cwd=tmp_path, PORT="0", STORAGE_URI=str(models)) as app:
        answer = urllib.request.urlopen(
            f"{app.url}/v1/models/m:predict", b'{"instances": [1]}', timeout=30
        )
        assert json.load(answer) == {"predictions": ["found"]}
        assert app.stop().status == 0


def test_a_process_that_cannot_have_it_ends_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(READS)
    ended = finish("app.py", cwd=tmp_path, STORAGE_URI="s3://bucket/model")
    assert ended.status == 1
    (line,) = ended.errors
    assert line.startswith("kserve-lite: $STORAGE_URI: s3:// is not supported")
