"""Class names from lists, dictionaries and files; which fit, and what a class is called."""

import json
from types import SimpleNamespace

import pytest
from torch import nn

from cfcam_gpu import class_names as naming

NAMES = ["oak", "elm", "ash"]


@pytest.mark.parametrize(
    "given, expected",
    [
        (tuple(NAMES), NAMES),
        (iter(NAMES), NAMES),
        ({0: "oak", 1: "elm", 2: "ash"}, dict(enumerate(NAMES))),
        ({"2": "ash", "0": "oak"}, {2: "ash", 0: "oak"}),
        ({"oak": 0, "elm": 1, "ash": 2}, dict(enumerate(NAMES))),  # class_to_idx
        ({"0": ["n012", "oak"], "1": ["n013", "elm"]}, {0: "oak", 1: "elm"}),
        ([7, 8], ["7", "8"]),
    ],
)
def test_in_memory(given, expected):
    assert naming.class_names(given) == expected


@pytest.mark.parametrize(
    "name, text, expected",
    [
        ("names.txt", "oak\nelm \r\nash\n\n", NAMES),
        ("names.txt", "\ufeffoak\n\nash", ["oak", "", "ash"]),  # a line for each class, also for one without a name
        ("names", '["oak", "elm", "ash"]', NAMES),
        ("names.json", '\n{"0": "oak", "2": "ash"}', {0: "oak", 2: "ash"}),
        ("config.json", '{"id2label": {"0": "oak"}, "label2id": {"oak": 0}, "image_size": 96}', {0: "oak"}),
        ("names.txt", "7", ["7"]),
    ],
)
def test_in_a_file(tmp_path, name, text, expected):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert naming.class_names(str(tmp_path / name)) == naming.class_names(tmp_path / name) == expected


@pytest.mark.parametrize(
    "given, error, message",
    [
        (7, TypeError, "must be a list, a dictionary or a file's path, got int"),
        ({"oak": "elm"}, ValueError, "must have one index for each, got 'oak': 'elm'"),
        ({"-1": "oak"}, ValueError, "must have one index for each, got '-1'"),
        ({"0": "oak", 0: "elm"}, ValueError, "must have one index for each, got 0: 'elm'"),
    ],
)
def test_no_class_names(given, error, message):
    with pytest.raises(error, match=message):
        naming.class_names(given)


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("config.json", b'{"image_size": 96, "model_type": "vit"}', "config.json: expected JSON with class names: "),
        ("names.json", b'["oak", ', "names.json: expected JSON with class names: "),
        ("names.json", b"7", "names.json: expected JSON with class names: "),
        ("names.txt", b" \n", "names.txt: expected a class name on each line, got none"),
        ("names.txt", "ch\u00eane".encode("latin-1"), "names.txt: expected text in UTF-8"),
    ],
)
def test_no_file_of_class_names(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        naming.class_names(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        naming.class_names(tmp_path / "nowhere.txt")


def test_names_in_a_config():
    model = nn.Identity()
    assert naming.names_in_config(model) is None
    model.config = SimpleNamespace(id2label={0: "oak", 1: "elm"})
    assert naming.names_in_config(model) == {0: "oak", 1: "elm"}
    model.config = json.loads('{"id2label": {"0": "oak"}}')
    assert naming.names_in_config(model) == {0: "oak"}
    model.config = SimpleNamespace(id2label={0: "LABEL_0", 1: "LABEL_1"})
    assert naming.names_in_config(model) is None


def test_which_names_fit():
    assert naming.fit(NAMES, 3) and not naming.fit(NAMES, 4) and not naming.fit(NAMES, 2)
    assert naming.fit({1: "elm"}, 2) and not naming.fit({2: "ash"}, 2) and naming.fit({2: "ash"}, 9)
    assert naming.fit(["no", "yes"], 1) and naming.fit(["yes"], 1) and not naming.fit(NAMES, 1)
    assert not naming.fit(None, 3) and not naming.fit([], 0) and not naming.fit({}, 3)
    assert [naming.of_class({1: "elm"}, index) for index in range(3)] == ["class 0", "elm", "class 2"]


@pytest.mark.parametrize(
    "names, negative, positive",
    [
        (None, "negative", "positive"),
        (["healthy", "ill"], "healthy", "ill"),
        ({0: "healthy", 1: "ill"}, "healthy", "ill"),
        (["ill"], "not ill", "ill"),
        ({0: "ill"}, "not ill", "ill"),
        ({1: "ill"}, "not ill", "ill"),
    ],
)
def test_the_two_sides_of_one_output(names, negative, positive):
    assert [naming.of_side(names, side) for side in (False, True)] == [negative, positive]
