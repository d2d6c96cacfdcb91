"""What is known of a trained network: squeeze.json of a teacher, student.json of a student, config.json of both."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import AliasChoices, Field

from ..runtime import Facts

Share = Annotated[float, Field(ge=0, le=1)]
LICENSE_KEYS = ("license", "licence")  # the second is what earlier versions wrote
Triple = Annotated[list[float], Field(min_length=3, max_length=3)]


class SourceFacts(Facts):
    """The real data that something was made from; `id` is a Hub id or a name, and of a local path its last part."""

    id: str
    on_hub: bool
    revision: str | None
    license: str = Field(validation_alias=AliasChoices(*LICENSE_KEYS))


class ScoredOn(Facts):
    """The real images that a network was scored on: their source, and which part of it."""

    id: str
    split: str | None


class SqueezeSettings(Facts):
    """How a teacher was trained, and on what."""

    seed: int
    data: str
    steps: int
    epochs: int | None = None


class TeacherFacts(Facts):
    """squeeze.json; earlier versions did not write what may be `None`."""

    FILE: ClassVar[str] = "squeeze.json"

    kind: Literal["teacher"] = "teacher"
    teacher: str
    architecture: str | None = None
    train_content: str
    train_count: int | None = None
    test_count: int | None = None
    channels: int | None = None
    source: SourceFacts | None = None
    test: ScoredOn | None = None
    settings: SqueezeSettings
    fingerprint: str
    test_top1: Share
    weights_sha256: str | None = None
    wall_time_s: float

    @property
    def title(self) -> str:
        """What a repo with this file holds a version of."""
        return f"{self.teacher} of {self.source.id if self.source else self.settings.data}"


class DistilledFacts(Facts):
    """The distilled set that a student learned from; `content` is `DistilledDataset.content`."""

    name: str | None
    content: str
    images: int
    hub_id: str | None


class StudentFacts(Facts):
    """student.json. No hardware and no times: the same recipe gives the same bytes."""

    FILE: ClassVar[str] = "student.json"

    kind: Literal["student"] = "student"
    architecture: str
    labels: str
    epochs: int
    channels: int
    dataset: DistilledFacts
    source: SourceFacts
    test: ScoredOn
    recipe_fingerprint: str | None
    settings: dict[str, object]
    seed: int
    test_top1: Share
    test_count: int

    @property
    def title(self) -> str:
        """What a repo with this file holds a version of."""
        return f"student {self.architecture} of {self.dataset.name}"


class InputConfig(Facts):
    """What config.json says of a network's input, and of the license of its weights."""

    input_size: Annotated[list[int], Field(min_length=3, max_length=3)]
    mean: Triple
    std: Triple
    license: str


class NetworkConfig(Facts):
    """config.json, which timm writes, as far as a card tells it."""

    architecture: str
    label_names: list[str]
    pretrained_cfg: InputConfig


def read_facts(folder: Path) -> TeacherFacts | StudentFacts:
    """The facts of the network in a model folder; a `ValueError` of one line if there are none, or not all of them."""
    for kind in (TeacherFacts, StudentFacts):
        if (folder / kind.FILE).is_file():
            return kind.read(folder / kind.FILE)
    raise ValueError(f"{str(folder)!r} has no {TeacherFacts.FILE} and no {StudentFacts.FILE}: its network is unknown")
