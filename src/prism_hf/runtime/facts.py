"""Facts: a JSON file of this package as a typed class, the only code that reads and writes it."""

from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from .store import write_json


class Facts(BaseModel):
    """The content of a JSON file that prism-hf wrote, and that anybody may have edited since.

    Declared keys are checked. Unknown keys are kept, since a later version may have written them. Fields that are missing
    from the file, or that were not set, are not written.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="allow")

    @classmethod
    def parse(cls, data: bytes, name: str) -> Self:
        """Parse the bytes of a file, or raise a `ValueError` with one line that begins with `name`."""
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            problem = error.errors()[0]
        key, value = repr(".".join(map(str, problem["loc"])))[:120], repr(problem["input"])[:80]
        if problem["type"] == "missing":
            raise ValueError(f"{name} has no {key}")
        if not problem["loc"]:
            raise ValueError(f"{name} cannot be read ({problem['msg'][:120]})")
        raise ValueError(f"{name} has {value} as {key}: {problem['msg']}")

    @classmethod
    def read(cls, path: Path, name: str | None = None) -> Self:
        """Read a file; see `parse`. Messages use `name`, or the path if there is no name."""
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ValueError(f"{name or path} cannot be read ({error.strerror or error})") from error
        return cls.parse(data, name or str(path))

    def plain(self) -> dict[str, Any]:
        """Return plain JSON values, in the order of the file."""
        return self.model_dump(exclude_unset=True)

    def write(self, path: Path) -> None:
        """Write the file."""
        write_json(path, self.plain())
