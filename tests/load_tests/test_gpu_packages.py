"""The card's machine has its own packages and no registry: what it lacks is found before it is used."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from load_tests.gpu import packages

ROOT = Path(__file__).resolve().parents[2]
# What the machine's image holds of all that is installed here; then what travels as wheels.
IMAGE = """
accelerate aiofiles aiohappyeyeballs aiohttp aiosignal annotated-doc anyio attrs build certifi
charset-normalizer click cloudpickle contourpy coverage cycler einops execnet filelock fonttools frozenlist
fsspec grpcio h11 hf-xet httpcore httpx huggingface-hub humanize hypothesis idna iniconfig jinja2 joblib
kiwisolver lxml markdown markdown-it-py markupsafe matplotlib mdurl ml-dtypes mpmath msgpack multidict
mypy-extensions narwhals networkx ninja numba numpy packaging pandas pathspec peft pillow pip pluggy
prometheus-client propcache protobuf psutil pyarrow pybind11 pygments pyparsing pytest pytest-benchmark
pytest-cov pytest-mock pytest-timeout pytest-xdist python-dateutil pyyaml regex requests rich sacrebleu
safetensors scikit-learn scipy sentencepiece setuptools shellingham simplejson six sortedcontainers sympy
tabulate tensorboard threadpoolctl tiktoken tokenizers tqdm torch transformers triton typer
typing-extensions urllib3 uvloop werkzeug wheel wrapt xxhash yarl zipp
"""
# What the image's packages need in the versions that are installed here.
NEEDED_HERE = ["httpcore2", "httpx2", "truststore"]
WHEELS = """
annotated-types llguidance msgspec pydantic pydantic-core pydantic-settings python-dotenv typing-inspection
"""
HIDE = """
import importlib.metadata as metadata, sys

def normal(name):
    return name.lower().replace("_", "-")

visible = set(sys.argv[1].split(","))
hidden = {
    module
    for module, owners in metadata.packages_distributions().items()
    if not {normal(owner) for owner in owners} & visible
} - {"server", "load_tests", "tests"}

finders = list(sys.meta_path)

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in hidden:
            return None
        found = (finder.find_spec(name, path, target) for finder in finders)
        return next((spec for spec in found if spec is not None), None)

    def find_distributions(self, *context):
        for finder in finders:
            for found in getattr(finder, "find_distributions", lambda *context: [])(*context):
                if normal(found.metadata["Name"]) in visible:
                    yield found

sys.meta_path[:] = [Hide()]
"""
COLLECT = """
import pkgutil, pytest, load_tests.gpu
for module in pkgutil.iter_modules(load_tests.gpu.__path__):
    __import__(f"load_tests.gpu.{module.name}")
options = "--collect-only -q -o addopts= -o filterwarnings=default -p no:cacheprovider tests/gpu"
sys.exit(pytest.main(options.split()))
"""


def on_the_machine(visible: list[str], code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", HIDE + code, ",".join([*visible, *NEEDED_HERE])]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_everything_imports_with_what_the_machine_has() -> None:
    done = on_the_machine([*IMAGE.split(), *WHEELS.split()], COLLECT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert re.search(r"^\d{3,} tests collected", done.stdout, re.MULTILINE), done.stdout[-500:]


@pytest.mark.parametrize("missing", ["msgspec", "pydantic-core", "peft"])
def test_what_is_missing_is_named_with_the_way_to_bring_it(missing: str) -> None:
    visible = [name for name in [*IMAGE.split(), *WHEELS.split()] if name != missing]
    done = on_the_machine(visible, "import load_tests.gpu.packages as packages; packages.main()")
    assert done.returncode == packages.MISSING
    assert missing.replace("-", "_") in done.stdout
    assert f"\n{packages.download_line()}\n" in done.stdout


def test_what_is_there_is_enough() -> None:
    code = "import load_tests.gpu.packages as packages; packages.main(); print('torch' in sys.modules)"
    done = on_the_machine([*IMAGE.split(), *WHEELS.split()], code)
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stdout  # and nothing slow was imported


def test_wheels_are_of_the_versions_that_fit_together() -> None:
    line = packages.download_line()
    assert {f"{name}==" for name in WHEELS.split()} <= set(re.findall(r" ([\w-]+==)", line))
    pinned = (ROOT / "constraints.txt").read_text().replace("_", "-")
    for pin in re.findall(r"\S+==\S+", line):
        assert f"\n{pin}\n" in pinned


def test_the_readme_says_the_same() -> None:
    readme = (ROOT / "load_tests" / "gpu" / "README.md").read_text()
    assert packages.download_line() in re.sub(r"\s*\\\n\s*", " ", readme)
    assert "/.whl/" in readme
