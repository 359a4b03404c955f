"""Plain data in the files of somebody else: YAML and JSON that end in one line where they are damaged or hostile."""

import json
from pathlib import Path
from typing import Any

import yaml

from underpaint.errors import InputError

DEEPEST_YAML = 32  # levels of nesting; a recipe has 4
LARGEST_YAML = 2**18  # bytes; a recipe has 2 KiB, and reading takes a second for each 100 KiB


class _PlainLoader(yaml.SafeLoader):
    """No aliases: a few lines of them stand for gigabytes, and none of our files has any."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"aliases (*{self.peek_event().anchor}) are not read; write out what they stand for")
        if self.depth == DEEPEST_YAML:
            raise yaml.YAMLError("nested too deeply")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def plain_yaml(text: str) -> Any:
    """Plain data from YAML of at most `LARGEST_YAML` bytes and `DEEPEST_YAML` levels, without aliases.

    Raises:
        ValueError: it is something else; the text says why in one line.
    """
    if len(text) > LARGEST_YAML:
        raise ValueError(f"more than the {LARGEST_YAML:,} bytes that are read as YAML")
    try:
        return yaml.load(text, _PlainLoader)
    # Beside YAMLError, what stands behind a tag raises ValueError, KeyError, AttributeError and more.
    except Exception as error:
        raise ValueError(f"not YAML: {one_line(error) or type(error).__name__}") from error


def plain_json(text: str | bytes) -> Any:
    """Plain data from JSON.

    Raises:
        ValueError: it is something else; the text says why in one line.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"not JSON: {one_line(error)}") from error


def read_yaml(file: Path) -> dict[Any, Any]:
    """The settings in a YAML file.

    Raises:
        InputError: it cannot be read, or is something else.
    """
    try:
        with file.open("rb") as opened:
            text = opened.read(LARGEST_YAML + 1)  # a pipe has no size and no end
        found = plain_yaml(text.decode())
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: {_reason(error)}") from error
    if not isinstance(found, dict):
        raise InputError(f"{file}: holds no settings")
    return found


def read_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file that underpaint wrote.

    Raises:
        InputError: it cannot be read, or is damaged.
    """
    try:
        found = plain_json(file.read_bytes())
        if not isinstance(found, dict):
            raise ValueError("holds no object")
    except OSError as error:
        raise InputError(f"{file}: {_reason(error)}") from error
    except ValueError as error:
        raise InputError(f"{file}: is damaged ({_reason(error)}); restore it, or choose another folder") from error
    return found


def _reason(error: OSError | ValueError) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "not UTF-8"
    return f"cannot be read: {error.strerror}" if isinstance(error, OSError) and error.strerror else one_line(error)


def one_line(error: Exception) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split())[:400]
