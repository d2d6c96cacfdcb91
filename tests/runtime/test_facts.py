import json

import pytest
from pydantic import Field

from prism_hf.runtime.facts import Facts


class Part(Facts):
    name: str
    size: int | None = None


class Whole(Facts):
    share: float = Field(ge=0, le=1)
    note: str | None = None
    parts: list[Part] = []


def read(text):
    return Whole.parse(text.encode(), "whole.json")


@pytest.mark.parametrize(
    "text",
    [
        '{"share": 0.5}',
        '{"share": 0.5, "note": null}',
        '{"share": 0.5, "parts": [{"name": "a"}, {"name": "b", "size": null}]}',
        '{"share": 0.5, "parts": [{"name": "a", "later": [1, {"x": "y"}]}], "more": "words"}',
    ],
)
def test_exactly_the_content_of_a_file_is_written_again(tmp_path, text):
    facts = read(text)
    assert facts.plain() == json.loads(text)
    facts.write(tmp_path / "whole.json")
    assert json.loads((tmp_path / "whole.json").read_text()) == json.loads(text)
    assert Whole.read(tmp_path / "whole.json") == facts


def test_missing_fields_are_not_written(tmp_path):
    Whole(share=0.25, parts=[Part(name="a")]).write(tmp_path / "whole.json")
    assert (tmp_path / "whole.json").read_text() == (
        '{\n  "share": 0.25,\n  "parts": [\n    {\n      "name": "a"\n    }\n  ]\n}\n'
    )


WRONG = {
    "{}": "whole.json has no 'share'",
    '{"share": "0.5"}': "whole.json has '0.5' as 'share': ",
    '{"share": true}': "whole.json has True as 'share': ",
    '{"share": NaN}': "whole.json has nan as 'share': ",
    '{"share": 91.2}': "whole.json has 91.2 as 'share': Input should be less than or equal to 1",
    '{"share": 1, "parts": [{"name": "a"}, {"size": 1}]}': "whole.json has no 'parts.1.name'",
    '{"share": 1, "parts": {}}': "whole.json has {} as 'parts': ",
    '{"share": 1, "note": ["\\u001b\\u202e\\n"]}': "whole.json has ['\\x1b\\u202e\\n'] as 'note': ",
    "[]": "whole.json cannot be read (Input should be an object)",
    "": "whole.json cannot be read (Invalid JSON",
    "\ufeff{}": "whole.json cannot be read (Invalid JSON",
    "[" * 100_000: "whole.json cannot be read (Invalid JSON",
    '{"share": ' + "1" * 10_000: "whole.json cannot be read (Invalid JSON",
    '{"share": 1, "note": "' + "x" * 10_000 + '", "parts": "' + "y" * 10_000 + '"}': "whole.json has 'yyy",
}


def test_invalid_content_gives_a_short_one_line_error():
    for text, words in WRONG.items():
        with pytest.raises(ValueError, match=r"^whole\.json ") as error:
            read(text)
        line = str(error.value)
        assert line.startswith(words), line
        assert line.isprintable()
        assert len(line) < 400


def test_the_error_for_a_missing_file_names_it(tmp_path):
    with pytest.raises(ValueError, match="gone.json cannot be read"):
        Whole.read(tmp_path / "gone.json")
    with pytest.raises(ValueError, match="^its facts cannot be read"):
        Whole.read(tmp_path / "gone.json", "its facts")
    (tmp_path / "bytes.json").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="cannot be read"):
        Whole.read(tmp_path / "bytes.json")
