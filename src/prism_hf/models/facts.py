"""Facts about a trained network: squeeze.json of a teacher, student.json of a student, config.json of both."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import AliasChoices, Field

from ..runtime import Facts

Share = Annotated[float, Field(ge=0, le=1)]
LICENSE_KEYS = ("license", "licence")  # earlier versions wrote the second spelling
Triple = Annotated[list[float], Field(min_length=3, max_length=3)]


class SourceFacts(Facts):
    """The real dataset that something was made from; `id` is a Hub id, a name, or the last part of a local path."""

    id: str
    on_hub: bool
    revision: str | None
    license: str = Field(validation_alias=AliasChoices(*LICENSE_KEYS))


class ScoredOn(Facts):
    """The real images that a network was scored on: their source and split."""

    id: str
    split: str | None


class SqueezeSettings(Facts):
    """The training settings and the dataset of a teacher."""

    seed: int
    data: str
    steps: int
    epochs: int | None = None


class StartFacts(Facts):
    """The pretrained network that a teacher was fine-tuned from; a local folder is named by its last part."""

    name: str
    license: str
    revision: str | None
    weights_sha256: str


class TeacherFacts(Facts):
    """The contents of squeeze.json; earlier versions did not write the fields that may be `None`."""

    FILE: ClassVar[str] = "squeeze.json"

    kind: Literal["teacher"] = "teacher"
    teacher: str
    architecture: str | None = None
    train_content: str
    train_count: int | None = None
    test_count: int | None = None
    channels: int | None = None
    source: SourceFacts | None = None
    start: StartFacts | None = None
    test: ScoredOn | None = None
    settings: SqueezeSettings
    fingerprint: str
    test_top1: Share
    weights_sha256: str | None = None
    wall_time_s: float

    @property
    def license(self) -> str:
        """The license of the weights: that of the data, from which they are derived, and of a pretrained start."""
        assert self.source is not None
        if self.start is None or self.start.license == self.source.license:
            return self.source.license
        version = "" if self.start.revision is None else f" at {self.start.revision}"
        return f"{self.source.license} (data) and {self.start.license} (weights of {self.start.name}{version})"

    @property
    def title(self) -> str:
        """The title of a repo with this file; it is the same for all versions of the network."""
        return f"{self.teacher} of {self.source.id if self.source else self.settings.data}"


class DistilledFacts(Facts):
    """The distilled dataset that a student was trained on; `content` is `DistilledDataset.content`."""

    name: str | None
    content: str
    images: int
    hub_id: str | None


class StudentFacts(Facts):
    """The contents of student.json. It records no hardware and no times: the same recipe gives the same bytes."""

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
        """The title of a repo with this file; it is the same for all versions of the network."""
        return f"student {self.architecture} of {self.dataset.name}"


class InputConfig(Facts):
    """The input of a network and the license of its weights, as stated in config.json."""

    input_size: Annotated[list[int], Field(min_length=3, max_length=3)]
    mean: Triple
    std: Triple
    license: str


class NetworkConfig(Facts):
    """The part of timm's config.json that a card shows."""

    architecture: str
    label_names: list[str]
    pretrained_cfg: InputConfig


def read_facts(folder: Path) -> TeacherFacts | StudentFacts:
    """Return the facts of the network in a model folder; a one-line `ValueError` if they are missing or incomplete."""
    for kind in (TeacherFacts, StudentFacts):
        if (folder / kind.FILE).is_file():
            return kind.read(folder / kind.FILE)
    raise ValueError(f"{str(folder)!r} has neither {TeacherFacts.FILE} nor {StudentFacts.FILE}: its network is unknown")
