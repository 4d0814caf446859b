"""Every query of the dashboards and alerts, against what a running face serves."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from load_tests.fake_engine import empty_stats
from tests.api.face_site import open_site

DEPLOY = Path(__file__).resolve().parents[1] / "deploy"
DASHBOARDS = sorted((DEPLOY / "grafana" / "dashboards").glob("*.json"))
PROMETHEUS_LABELS = {"instance", "job", "le"}

FUNCTIONS = {
    "absent", "avg", "by", "clamp_min", "histogram_quantile", "increase", "max", "min", "or", "rate",
    "sort", "sum", "time", "topk", "without",
}  # fmt: skip
_WORD = re.compile(r"[A-Za-z_:][\w:]*")
_LABELS = re.compile(r"\b(?:by|without)\s*\(([^)]*)\)")
_SELECTOR = re.compile(r"\{([^}]*)\}")
_MATCHER = re.compile(r'\s*(\w+)\s*(?:=~|!~|!=|=)\s*"[^"]*"\s*')


class Expression:
    """The metrics and the labels that a PromQL expression names. Raises ValueError for a strange selector."""

    def __init__(self, text: str) -> None:
        self.labels = {name.strip() for group in _LABELS.findall(text) for name in group.split(",")}
        for selector in _SELECTOR.findall(text):
            for matcher in filter(None, selector.split(",")):
                match = _MATCHER.fullmatch(matcher)
                if match is None:
                    raise ValueError(f"{matcher!r} in {text}")
                self.labels.add(match[1])
        rest = re.sub(r"\[[^\]]*\]", "", _LABELS.sub("", _SELECTOR.sub("", text)))
        self.metrics = set(_WORD.findall(rest)) - FUNCTIONS


def expressions(dashboard: Path) -> Iterator[tuple[str, str]]:
    """Title and query."""
    for panel in json.loads(dashboard.read_text())["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]


async def scrape(root: Path) -> list[str]:
    """Both routes of a face that has served an adapter."""
    async with open_site(root) as site:
        site.say("the quick brown fox")
        await site.complete(model="sql")
        site.engine.stats = msgspec.structs.replace(empty_stats(), resident=(site.digest("sql"),))
        return [(await site.client.get(path)).text for path in ("/metrics", "/metrics/adapters")]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Name of each sample -> its labels."""
    texts = asyncio.run(scrape(tmp_path_factory.mktemp("site")))
    samples = [s for text in texts for family in text_string_to_metric_families(text) for s in family.samples]
    found: dict[str, set[str]] = {"up": set()}
    for sample in samples:
        found.setdefault(sample.name, set()).update(sample.labels)
    return found


def judge(text: str, served: dict[str, set[str]]) -> None:
    expression = Expression(text)
    assert expression.metrics
    assert expression.metrics <= served.keys(), text
    known = set().union(*(served[name] for name in expression.metrics)) | PROMETHEUS_LABELS
    assert expression.labels <= known, text


def test_the_parser_finds_metrics_and_labels() -> None:
    text = 'sum by (le, x) (rate(vllm:a_bucket{m=~"$v", o="f{1}"}[5m])) / topk(3, b_total > 0) or nosuch'
    with pytest.raises(ValueError, match=re.escape('o="f{1')):
        Expression(text)
    found = Expression(text.replace("{1}", ""))
    assert found.metrics == {"vllm:a_bucket", "b_total", "nosuch"}
    assert found.labels == {"le", "x", "m", "o"}


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda path: path.stem)
def test_every_query_names_what_is_served(dashboard: Path, served: dict[str, set[str]]) -> None:
    queries = list(expressions(dashboard))
    assert len(queries) > 5
    for title, text in queries:
        try:
            judge(text, served)
        except (AssertionError, ValueError) as error:
            raise AssertionError(f"{title}: {error}") from error


def test_every_alert_names_what_is_served(served: dict[str, set[str]]) -> None:
    (group,) = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())["groups"]
    for rule in group["rules"]:
        judge(rule["expr"], served)


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_is_whole(dashboard: Path) -> None:
    board: dict[str, Any] = json.loads(dashboard.read_text())
    (source,) = yaml.safe_load(
        (DEPLOY / "grafana" / "provisioning" / "datasources" / "prometheus.yml").read_text()
    )["datasources"]
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for target in panel.get("targets", ()):
            assert target["datasource"]["uid"] == source["uid"]
    (variable,) = board["templating"]["list"]
    names = {name for _, text in expressions(dashboard) for name in re.findall(r"\$(\w+)", text)}
    assert names <= {variable["name"], "__rate_interval"}
    cells = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))  # no panel lies on another


def test_boards_have_ids_of_their_own() -> None:
    boards = [json.loads(path.read_text()) for path in DASHBOARDS]
    assert len({board["uid"] for board in boards}) == len({board["title"] for board in boards}) == len(boards)
