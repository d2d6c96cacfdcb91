"""Classes by WordNet id or name: elsewhere, the same class has another number, and often another name.

ImageNet's classes have several names each: `n01440764` is "tench, Tinca tinca", so "tench" is the same class.
"""

import difflib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache

from ..errors import PrismError
from ..recipe import NAMED_CLASSES, ClassPart

_WORDNET_ID = re.compile(r"(?<![0-9a-zA-Z])(n\d{8})(?![0-9a-zA-Z])")
_MOSTLY = 0.99
"""Share of names that must agree for a list of 1000 classes to be that of ImageNet: a few are spelled in several ways."""


def plain_name(name: str) -> str:
    """Return a class name for comparisons: composed Unicode, without case, spaces, `_` and `-`."""
    return re.sub(r"[\s_-]+", "", unicodedata.normalize("NFC", name)).casefold()


def choose_classes(part: ClassPart, names: Sequence[str], where: str, error: type[PrismError]) -> tuple[int, ...]:
    """Return the numbers in `names` of the classes that a recipe asks for; see `DataRecipe.classes`.

    Raises:
        PrismError: Of the given type. A class is not in `names`, which belong to `where`; or two names mean the same one.
    """
    wanted = NAMED_CLASSES[part] if isinstance(part, str) else part
    outside = [number for number in wanted if isinstance(number, int) and number >= len(names)]
    if outside:
        raise error(f"data.classes has {outside[0]}, but {where} has {len(names)} classes, 0 to {len(names) - 1}")
    named = iter(find_classes([name for name in wanted if isinstance(name, str)], names, where, error))
    found = tuple(name if isinstance(name, int) else next(named) for name in wanted)
    twice = [number for place, number in enumerate(found) if number in found[:place]]
    if twice:
        raise error(f"data.classes names class {names[twice[0]]!r} of {where} twice; remove one")
    return found


def find_classes(wanted: Sequence[str], names: Sequence[str], where: str, error: type[PrismError]) -> tuple[int, ...]:
    """Return the number in `names` of each class of `wanted`, by WordNet id, by its full name, or by one of its names.

    Raises:
        PrismError: Of the given type. A class is not there, or cannot be told from another one.
    """
    tables = _tables(tuple(names))
    found = []
    for name, keys in zip(wanted, _keys(tuple(wanted)), strict=True):
        tried = (_lookup(table, part) for table, part in zip(tables, keys, strict=True))
        candidates = sorted(next(filter(None, tried), set()))
        if not candidates:
            close = difflib.get_close_matches(name, names, n=3)
            hint = f"; similar: {', '.join(map(repr, close))}" if close else ""
            raise error(f"class {name!r} is not one of the {len(names)} classes of {where}{hint}")
        if len(candidates) > 1:
            several = f"{names[candidates[0]]!r} (number {candidates[0]}) and {names[candidates[1]]!r} ({candidates[1]})"
            raise error(f"class {name!r} may be {several} of {where}; name it by its WordNet id or by its number")
        found.append(candidates[0])
    return tuple(found)


def names_of(chosen: Sequence[int], names: Sequence[str]) -> tuple[str, ...]:
    """Return the names of chosen classes; a name that ImageNet has twice gets its WordNet id: "crane (n02012849)"."""
    ids = wordnet_ids(names)
    unclear = {number for number in chosen if ids[number] is not None and _wordnet_id(names[number]) is None}
    return tuple(f"{names[n]} ({ids[n]})" if n in unclear else names[n] for n in chosen)


def _lookup(table: dict[str, set[int]], keys: Sequence[str]) -> set[int]:
    return set[int]().union(*(table.get(key, set()) for key in keys))


@lru_cache(maxsize=64)
def _tables(names: tuple[str, ...]) -> list[dict[str, set[int]]]:
    """Return the numbers of the classes by each kind of key; see `_keys`."""
    tables: list[dict[str, set[int]]] = [defaultdict(set) for _ in range(4)]
    for number, keys in enumerate(_keys(names)):
        for table, part in zip(tables, keys, strict=True):
            for key in part:
                table[key].add(number)
    return [dict(table) for table in tables]


def _keys(names: tuple[str, ...]) -> list[tuple[list[str], ...]]:
    """Return the keys of each class, best first: WordNet id if known, name, plain name, and each of several names."""
    return [
        ([] if wordnet_id is None else [wordnet_id], [name], [plain_name(name)], _parts(name))
        for name, wordnet_id in zip(names, wordnet_ids(names), strict=True)
    ]


def _parts(name: str) -> list[str]:
    return [plain_name(part) for part in name.split(",") if part.strip()]


def wordnet_ids(names: Sequence[str]) -> list[str | None]:
    """Return the WordNet id of each class of ImageNet-1K, and `None` for other classes and ambiguous names ("crane")."""
    known = imagenet_classes()
    same = sum(_parts(name)[:1] == _parts(own)[:1] for name, (_, own) in zip(names, known, strict=False))
    if len(names) == len(known) and same >= _MOSTLY * len(known):
        return [wordnet_id for wordnet_id, _ in known]
    return [_wordnet_id(name) for name in names]


def _wordnet_id(name: str) -> str | None:
    written = _WORDNET_ID.search(name)
    if written:
        return written[1]
    for table in _imagenet_names():
        ids = table.get(plain_name(name), set())
        if ids:
            return next(iter(ids)) if len(ids) == 1 else None
    return None


@lru_cache(maxsize=1)
def _imagenet_names() -> tuple[dict[str, set[str]], dict[str, set[str]]]:
    """Return the WordNet ids by full name, and by each of several names."""
    full, parts = defaultdict(set), defaultdict(set)
    for wordnet_id, name in imagenet_classes():
        full[plain_name(name)].add(wordnet_id)
        for part in _parts(name):
            parts[part].add(wordnet_id)
    return dict(full), dict(parts)


@lru_cache(maxsize=1)
def imagenet_classes() -> tuple[tuple[str, str], ...]:
    """Return WordNet id and names of each class of ImageNet-1K, in the usual order, as timm knows them."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    return tuple((info.index_to_label_name(i), info.index_to_description(i)) for i in range(info.num_classes()))
