"""Plain YAML for recipes and cards: text, numbers, booleans, lists and mappings, and nothing else.

Reading follows the core schema of YAML 1.2: `1e-3` is a number, `yes` and `2024-01-01` are text. The written YAML means
the same to the Hub's Python libraries, which follow YAML 1.1.
"""

import re
import sys
from collections.abc import Mapping
from io import StringIO
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import ConstructorError, SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode
from ruamel.yaml.representer import SafeRepresenter
from ruamel.yaml.resolver import VersionedResolver

MOST_ALIASES = 16
"""Maximum number of aliases in one text. An alias bomb needs two per level, so 16 expand to a few hundred values."""

_TAG = "tag:yaml.org,2002:"
_CORE_SCHEMA = {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+",
    "float": r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}
"""Types of unquoted scalars, from YAML 1.2.2, section 10.3.2; everything else is text."""
_PLAIN_TAGS = tuple(_TAG + kind for kind in (*_CORE_SCHEMA, "str", "seq", "map"))
# The header as huggingface_hub and `datasets` find it: the text checked here must be the text that they read.
_HEADER = re.compile(r"\A\s*---(?:\r\n|\r|\n)(.*?)(?:\r\n|\r|\n)---[ \t]*(?:\r\n|\n|\Z)", re.DOTALL)


class YamlError(ValueError):
    """Text that is not plain YAML, or that is nested too deeply or has too many aliases; one line, with the position."""


def read_yaml(text: str) -> object:
    """Read YAML as plain values, or raise a `YamlError`. Duplicate keys, merge keys and tags of other types are refused."""
    yaml = _yaml()
    yaml.Constructor = _PlainConstructor
    yaml.composer.warn_double_anchors = False
    try:
        values = yaml.load(text)  # linear time: an alias is only another reference to a value
        aliases = [event for event in _yaml().parse(text) if isinstance(event, AliasEvent)]
        if len(aliases) > MOST_ALIASES:
            problem = f"more than {MOST_ALIASES} aliases (*name); write the values out"
            raise ConstructorError(None, None, problem, aliases[MOST_ALIASES].start_mark)
        return values
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = " ".join(part for part in (error.context, error.problem) if part)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise YamlError(" ".join(f"{problem}{where}".split())) from error
    except YAMLError as error:
        raise YamlError(" ".join(str(error).split())) from error
    except RecursionError as error:
        raise YamlError("nested too deeply; expected sections and their values") from error


def read_header(text: str) -> object:
    """Read the YAML header of a card; `None` if it has none. See `read_yaml`."""
    header = _HEADER.match(text)
    return read_yaml(header[1]) if header else None


def dump_yaml(values: Mapping[str, Any]) -> str:
    """Return plain values as YAML 1.2 that reads back as exactly the same values, with YAML 1.1 readers too.

    Keys keep their order. Every text stays on one line, even if it contains line breaks: a part of it on a separate line
    could be mistaken for a part of the surrounding card.
    """
    yaml = _yaml()
    yaml.Representer = _PlainRepresenter
    yaml.default_flow_style, yaml.width = False, sys.maxsize
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    stream = StringIO()
    yaml.dump(dict(values), stream)
    return stream.getvalue()


def _yaml() -> YAML:
    yaml = YAML(typ="safe", pure=True)
    yaml.Resolver = _CoreSchema
    return yaml


class _CoreSchema(VersionedResolver):
    """The core schema of YAML 1.2, whatever the `%YAML` directive says."""

    processing_version = (1, 2)
    versioned_resolver = {None: [(_TAG + kind, re.compile(f"(?:{text})\\Z")) for kind, text in _CORE_SCHEMA.items()]}


class _PlainConstructor(SafeConstructor):
    """A constructor of plain values only."""

    def construct_object(self, node: Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, TypeError, ArithmeticError) as error:
            # The library does not catch these for wrong tags (`!!int x`) and for numbers with thousands of digits.
            problem = f"a value that looks like {_short_tag(node)} is not one; quote it if it is meant as text"
            raise ConstructorError(None, None, problem, node.start_mark) from error

    def flatten_mapping(self, node: MappingNode) -> None:
        for key, _ in node.value:
            if not isinstance(key, ScalarNode):
                raise ConstructorError(None, None, "a list or a mapping cannot be a key", key.start_mark)
            if (key.value == "<<" and not key.style) or key.tag == f"{_TAG}merge":
                raise ConstructorError(None, None, "merge keys (<<) are not supported", key.start_mark)

    def check_mapping_key(self, node: Node, key_node: Node, mapping: Any, key: Any, value: Any) -> bool:
        if key in mapping:
            raise ConstructorError(None, None, f"key {key!r} appears twice", key_node.start_mark)
        return True

    def refuse_tag(self, node: Node) -> None:
        problem = f"tag {_short_tag(node)!r} does not give a plain value; remove it"
        raise ConstructorError(None, None, problem, node.start_mark)

    yaml_constructors = {tag: SafeConstructor.yaml_constructors[tag] for tag in _PLAIN_TAGS} | {None: refuse_tag}


def _short_tag(node: Node) -> str:
    return str(node.tag).removeprefix(_TAG)


_YAML_1_1 = VersionedResolver(version=(1, 1))


class _PlainRepresenter(SafeRepresenter):
    """A representer whose output means the same in YAML 1.1 and 1.2."""

    def represent_str(self, data: str) -> ScalarNode:
        style = None
        if len(f"{data}.".splitlines()) > 1:
            style = '"'  # double quotes escape line breaks
        elif _YAML_1_1.resolve(ScalarNode, data, (True, False)) != _YAML_1_1.DEFAULT_SCALAR_TAG:
            style = "'"
        return self.represent_scalar(f"{_TAG}str", data, style=style)

    def represent_float(self, data: float) -> ScalarNode:
        node = super().represent_float(data)
        if "." not in node.value:
            node.value = node.value.replace("e", ".0e")  # YAML 1.1 reads 1e-05 as text
        return node

    yaml_representers = SafeRepresenter.yaml_representers | {str: represent_str, float: represent_float}
