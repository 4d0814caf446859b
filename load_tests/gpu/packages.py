"""What the card's machine must have before anything is spent: prints how to bring what it lacks.

    python -m load_tests.gpu.packages

Imports nothing that may be missing but to try it. Exit status 3 where something is.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path

CONSTRAINTS = Path(__file__).resolve().parents[2] / "constraints.txt"
# Present on images for machine learning; looked for but not imported, which takes seconds.
THERE = (
    "torch",
    "triton",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "peft",
    "pytest",
    "pytest_timeout",
)
# Small wheels that travel in .whl/, by the module that is imported to try them. pydantic must find the very
# pydantic-core it was made with, and typing-extensions that are not older than itself.
CARRIED = {
    "typing_extensions": "typing-extensions",
    "typing_inspection": "typing-inspection",
    "annotated_types": "annotated-types",
    "pydantic_core": "pydantic-core",
    "pydantic": "pydantic",
    "dotenv": "python-dotenv",
    "pydantic_settings": "pydantic-settings",
    "msgspec": "msgspec",
    "llguidance": "llguidance",
}
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
MISSING = 3  # exit status


def pin(name: str) -> str:
    """`name==version`, as constraints.txt has it."""
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", CONSTRAINTS.read_text(), re.MULTILINE))
    normal = {known.lower().replace("_", "-"): version for known, version in pins.items()}
    return f"{name}=={normal[name]}"


def download_line() -> str:
    """Fetches all wheels, for Python 3.12 on x86-64 Linux."""
    platforms = " ".join(f"--platform {platform}" for platform in PLATFORMS)
    return (
        "python3 -m pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp "
        f"{platforms} -d .whl {' '.join(pin(name) for name in CARRIED.values())}"
    )


def problems() -> list[str]:
    """One line for each module that is not there, or does not import."""
    found = [f"{name} is not installed" for name in THERE if importlib.util.find_spec(name) is None]
    for name in CARRIED:
        try:
            importlib.import_module(name)
        except Exception as error:
            found.append(f"{name} cannot be imported: {type(error).__name__}: {error}")
    return found


def main() -> None:
    if found := problems():
        print(*found, sep="\n")
        print(
            "Fetch the wheels where there is a registry, in the root of the checkout:",
            download_line(),
            sep="\n",
        )
        print("and send the folder .whl along.")
        raise SystemExit(MISSING)


if __name__ == "__main__":
    main()
