import json

import pytest
from pydantic import BaseModel, Field

from prism_hf.runtime.typed_json import read_typed


class Inner(BaseModel):
    size: int


class Config(BaseModel):
    name: str = Field(description="a name")
    numbers: list[int] | dict[str, int] = Field([], description="numbers, or numbers by name")
    inner: Inner | None = None


def test_what_is_asked_for_is_read_and_the_rest_is_left_alone(tmp_path):
    (tmp_path / "c.json").write_text(json.dumps({"name": "x", "inner": {"size": 3}, "other": [{}]}))
    assert read_typed(tmp_path / "c.json", Config) == Config(name="x", inner=Inner(size=3))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{}", "c.json: name is missing; expected a name"),
        ('{"name": ["x"]}', "c.json: name is ['x']; expected a name"),
        ('{"name": "x", "numbers": 3}', "c.json: numbers is 3; expected numbers, or numbers by name"),
        ('{"name": "x", "inner": {"size": "large"}}', "c.json: inner.size is 'large'; expected"),
        ('{"name": "x", "inner": {}}', "c.json: inner.size is missing; expected"),
        ('{"name": "x", "inner": {"size": "\\u202e\\n' + "y" * 500 + '"}}', "c.json: inner.size is '\\\\u202e\\\\ny"),
        ("[]", "c.json: Input should be an object"),
        ("3", "c.json: Input should be an object"),
        ("", "c.json: Invalid JSON"),
        ("[" * 100_000, "c.json: Invalid JSON"),
    ],
)
def test_what_is_wrong_is_one_line_with_file_and_key(tmp_path, content, words):
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(ValueError, match="c.json") as error:
        read_typed(tmp_path / "c.json", Config)
    text = str(error.value)
    assert words.replace("\\\\", "\\") in text
    assert "\n" not in text
    assert len(text) < 400


def test_bytes_that_are_not_text_are_one_line(tmp_path):
    (tmp_path / "c.json").write_bytes(b"\xff\x00")
    with pytest.raises(ValueError, match=r"c\.json: Invalid JSON"):
        read_typed(tmp_path / "c.json", Config)
    with pytest.raises(FileNotFoundError):
        read_typed(tmp_path / "none.json", Config)
