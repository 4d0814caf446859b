"""`make conformance` tests the lowest versions that pyproject.toml allows, not others."""

from __future__ import annotations

import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ALLOWED = {
    requirement.name.replace("-", "_"): requirement.specifier
    for requirement in map(Requirement, [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]])
}
LOWEST = [
    Requirement(line)
    for line in (ROOT / "tests" / "lowest.txt").read_text().splitlines()
    if not line.startswith("#")
]


def test_transformers_and_triton_are_at_their_lower_bounds() -> None:
    pinned = {requirement.name: str(requirement.specifier) for requirement in LOWEST}
    for name in ("transformers", "triton"):
        bounds = [spec.version for spec in ALLOWED[name] if spec.operator == ">="]
        assert [f"=={bound}.0" for bound in bounds] == [pinned[name]]


def test_all_of_them_are_allowed() -> None:
    for requirement in LOWEST:
        (exact,) = requirement.specifier
        assert ALLOWED[requirement.name].contains(exact.version), requirement
