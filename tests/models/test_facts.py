import json

import pytest

from prism_hf.models.facts import (
    DistilledFacts,
    NetworkConfig,
    ScoredOn,
    SourceFacts,
    SqueezeSettings,
    StudentFacts,
    TeacherFacts,
    read_facts,
)

SOURCE = SourceFacts(id="pets", on_hub=False, revision=None, license="mit")
TEST = ScoredOn(id="pets", split="val")
TEACHER = TeacherFacts(
    kind="teacher", teacher="squeeze:a", architecture="a", train_content="7e3f", train_count=9, test_count=5, channels=3,
    source=SOURCE, test=TEST, settings=SqueezeSettings(seed=7, data="pets", steps=100, epochs=4), fingerprint="00ed",
    test_top1=0.5, weights_sha256="ff", wall_time_s=1.5,
)  # fmt: skip
STUDENT = StudentFacts(
    kind="student", architecture="a", labels="soft", epochs=4, channels=3,
    dataset=DistilledFacts(name=None, content="01", images=4, hub_id=None), source=SOURCE, test=TEST,
    recipe_fingerprint=None, settings={"lr": 0.01}, seed=3, test_top1=0.25, test_count=5,
)  # fmt: skip
SHARED = """\
  "source": {
    "id": "pets",
    "on_hub": false,
    "revision": null,
    "license": "mit"
  },
  "test": {
    "id": "pets",
    "split": "val"
  },
"""
TEACHER_TEXT = f"""\
{{
  "kind": "teacher",
  "teacher": "squeeze:a",
  "architecture": "a",
  "train_content": "7e3f",
  "train_count": 9,
  "test_count": 5,
  "channels": 3,
{SHARED}\
  "settings": {{
    "seed": 7,
    "data": "pets",
    "steps": 100,
    "epochs": 4
  }},
  "fingerprint": "00ed",
  "test_top1": 0.5,
  "weights_sha256": "ff",
  "wall_time_s": 1.5
}}
"""
STUDENT_TEXT = f"""\
{{
  "kind": "student",
  "architecture": "a",
  "labels": "soft",
  "epochs": 4,
  "channels": 3,
  "dataset": {{
    "name": null,
    "content": "01",
    "images": 4,
    "hub_id": null
  }},
{SHARED}\
  "recipe_fingerprint": null,
  "settings": {{
    "lr": 0.01
  }},
  "seed": 3,
  "test_top1": 0.25,
  "test_count": 5
}}
"""


@pytest.mark.parametrize(
    ("facts", "text"), [(TEACHER, TEACHER_TEXT), (STUDENT, STUDENT_TEXT)], ids=["squeeze.json", "student.json"]
)
def test_the_bytes_are_pinned_and_read_back(tmp_path, facts, text):
    facts.write(tmp_path / facts.FILE)
    assert (tmp_path / facts.FILE).read_text() == text
    assert read_facts(tmp_path) == facts


def test_missing_facts_and_facts_of_another_kind_give_a_one_line_error(tmp_path):
    with pytest.raises(ValueError, match=r"neither squeeze\.json nor student\.json"):
        read_facts(tmp_path)
    STUDENT.write(tmp_path / "squeeze.json")
    with pytest.raises(ValueError, match=r"squeeze\.json has 'student' as 'kind'"):
        read_facts(tmp_path)


def test_a_teacher_of_an_older_version_has_fewer_facts(tmp_path):
    settings = {"seed": 0, "data": "digits", "steps": 5}
    least = {"teacher": "squeeze:a", "fingerprint": "00", "train_content": "7e", "test_top1": 0.25, "wall_time_s": 0.7}
    (tmp_path / "squeeze.json").write_text(json.dumps(least | {"settings": settings}))
    facts = read_facts(tmp_path)
    assert facts.plain() == least | {"settings": settings}
    assert (facts.source, facts.weights_sha256, facts.settings.epochs) == (None, None, None)
    assert facts.title == "squeeze:a of digits"
    assert (TEACHER.title, STUDENT.title) == ("squeeze:a of pets", "student a of None")


def test_only_config_fields_for_the_card_are_read():
    cfg = {"input_size": [3, 32, 32], "mean": [0.5, 0.5, 0.5], "std": [1, 1, 1], "license": "mit", "pool_size": None}
    config = NetworkConfig.parse(
        json.dumps({"architecture": "a", "label_names": ["x"], "pretrained_cfg": cfg, "model_args": {}}).encode(), "c"
    )
    assert config.pretrained_cfg.input_size[-1] == 32
    assert config.pretrained_cfg.std == [1.0, 1.0, 1.0]


def test_licenses_spelled_by_earlier_versions_are_read():
    earlier = {"id": "digits", "on_hub": False, "revision": None, "licence": "CC BY 4.0"}
    facts = SourceFacts.model_validate(earlier)
    assert facts.plain() == {"id": "digits", "on_hub": False, "revision": None, "license": "CC BY 4.0"}
