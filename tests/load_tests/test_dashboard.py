"""Dashboards as pictures: from their queries, put to something that answers as Prometheus does."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from matplotlib.image import imread
from typer.testing import CliRunner

from load_tests.__main__ import app
from load_tests.dashboard import read_panels

ROOT = Path(__file__).resolve().parents[2]
BOARD = ROOT / "deploy" / "grafana" / "dashboards" / "adapters.json"


class Prometheus:
    """Knows two series of everything but of what has `silent` in it; keeps the queries."""

    def __init__(self, silent: str) -> None:
        self.silent = silent
        self.queries: list[str] = []
        prometheus = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                query = parse_qs(urlsplit(self.path).query)["query"][0]
                prometheus.queries.append(query)
                points = [[time.time() - 60, "1"], [time.time(), "2.5"]]
                series = [{"metric": {"adapter": name}, "values": points} for name in ("sql", "*")]
                found = [] if silent in query else series
                self.send_response(200)
                self.end_headers()
                self.wfile.write(json.dumps({"data": {"result": found}}).encode())

            def log_message(self, *_: object) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture(params=["nothing is", "failed"])
def prometheus(request: pytest.FixtureRequest) -> Iterator[Prometheus]:
    found = Prometheus(request.param)
    thread = threading.Thread(target=found.server.serve_forever)
    thread.start()
    yield found
    found.server.shutdown()
    thread.join()
    found.server.server_close()


def test_every_panel_is_drawn_and_one_without_data_is_named(prometheus: Prometheus, tmp_path: Path) -> None:
    out = tmp_path / "board.png"
    done = CliRunner().invoke(
        app, ["dashboard", str(BOARD), "--prometheus", prometheus.url, "--out", str(out)]
    )
    queries = [query.expr for panel in read_panels(BOARD) for query in panel.queries]
    assert prometheus.queries == queries
    assert not any("$" in query for query in queries)
    assert imread(out).std() > 0.05  # lines were drawn
    assert done.exit_code == int(prometheus.silent == "failed"), done.output
    assert ("without data: Failures by adapter\n" in done.output) == (prometheus.silent == "failed")
