"""Twenty steps of every method and branch, and every task of evaluate, against what is kept in tests/goldens."""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import make_goldens as goldens


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("goldens")


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, (_, _, cases) in goldens.KINDS.items() for name in cases]
)
def test_what_is_computed_is_what_was(kind: str, name: str, folder: Path) -> None:
    make, compare, _ = goldens.KINDS[kind]
    stored = goldens.read(goldens.KEPT / f"{kind}.json")
    assert not compare(make(name, folder), stored["cases"][name], stored["machine"] == goldens.machine())


@pytest.mark.quick
@pytest.mark.parametrize("kind", list(goldens.KINDS))
def test_a_changed_number_is_seen(kind: str) -> None:
    """On the machine that made the goldens and on another."""
    compare: Callable[[Mapping[str, Any], Mapping[str, Any], bool], str] = goldens.KINDS[kind][1]
    cases = goldens.read(goldens.KEPT / f"{kind}.json")["cases"]
    for kept in cases.values():
        for same_machine in (True, False):
            assert not compare(kept, kept, same_machine)
        number = next(
            key for key, value in kept.items() if isinstance(value, list) or (isinstance(value, float) and value)
        )
        was = kept[number]
        other = {**kept, number: [*was[:-1], 1.01 * was[-1]] if isinstance(was, list) else was + 0.2}
        if "state" in kept:
            other["state"] = "another"
        assert compare(other, kept, False)
        assert compare(other, kept, True)
