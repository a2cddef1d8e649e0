"""The page in a real browser: no console errors, every point present, no request."""

import http.server
import json
import re
import subprocess
import threading
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from q3q.record import COMPLETED, SiteError, TrialRecord
from q3q.report.about import About
from q3q.report.write import write_report
from tests.browser import BROWSER, Browser
from tests.report.test_opening import study
from tests.specs import make_spec

pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no Chromium here: the report's page is not looked at"
)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --virtual-time-budget=5000 "
    "--enable-logging=stderr --log-level=0"
).split()
OF_A_PAGE = 101845102  # Chromium's mark of requests by a page's loader: blink_resource_loader
# Records what a reader's pointer would show.
PROBE = """<script>
addEventListener("load", () => {
  const point = document.querySelector("svg .point[data-line]");
  point.dispatchEvent(new PointerEvent("pointerenter"));
  const tip = document.getElementById("tip").textContent;
  document.querySelector("svg .entry[data-line='gptq']").dispatchEvent(new Event("click"));
  const faint = new Set([...document.querySelectorAll(".faint")].map((part) => part.dataset.line));
  document.body.dataset.probe = JSON.stringify({
    tip, faint: [...faint].sort(), overflow: document.documentElement.scrollWidth > innerWidth,
    paper: getComputedStyle(document.body).backgroundColor,
  });
});
</script>"""


def record(method: str, bits: int, perplexity: float | None) -> TrialRecord:
    spec = make_spec(method, bits)
    measured = {} if perplexity is None else {"perplexity/stories": perplexity}
    sizes = {
        "model_bytes": 1e6 * bits,
        "bits_per_weight_model": float(bits),
        "kl/stories": 1 / bits,
    }
    sites = [
        SiteError(block=k, site="o", linear="o_proj", weight_error=0.1, output_error=None)
        for k in range(3)
    ]
    return TrialRecord(
        spec=spec,
        status=COMPLETED,
        metrics={**measured, **sizes},
        diverged=() if measured else ("perplexity/stories",),
        sites=() if method == "none" else tuple(sites),
    )


RECORDS = [
    record("none", 16, 3.0),
    record("rtn", 2, None),
    record("rtn", 4, 4.0),
    record("gptq", 2, 5.0),
    record("gptq", 4, 3.5),
]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("report")
    about = About(name="<b>a study</b>", command="python launch.py -m method=rtn,gptq")
    return write_report(RECORDS, folder, about).files["report.html"].decode()


class Asked(http.server.BaseHTTPRequestHandler):
    """Serves the page and keeps every path that the browser requests."""

    page = ""
    paths: list[str] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self.paths.append(self.path)
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.end_headers()
        self.wfile.write(self.page.encode())

    def log_message(self, *_: Any) -> None:
        pass


def browse(page: str, tmp_path: Path, width: int) -> tuple[str, str, list[str]]:
    """Return the DOM after the script ran, the console, and the paths requested."""
    assert BROWSER is not None
    handler: Any = type(
        "Handler", (Asked,), {"page": page.replace("</body>", PROBE + "</body>"), "paths": []}
    )
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/page"
        places = [f"--user-data-dir={tmp_path}/profile", f"--window-size={width},900"]
        shown = subprocess.run(
            [BROWSER, *FLAGS, *places, "--dump-dom", address],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        server.shutdown()
    console = [line for line in shown.stderr.splitlines() if "CONSOLE" in line]
    return shown.stdout, "\n".join(console), handler.paths


def test_the_page_works_in_a_browser(page: str, tmp_path: Path) -> None:
    dom, console, requests = browse(page, tmp_path, 1200)
    assert console == ""
    assert requests == ["/page"]
    probe = re.search(r'data-probe="([^"]*)"', dom)
    assert probe is not None
    values = probe[1].replace("&quot;", '"')
    assert '"tip":"unquantized float32: 16.0 MB"' in values
    assert '"faint":["rtn","unquantized float32"]' in values
    assert '"overflow":false' in values


def test_every_plot_has_the_points_it_should(page: str) -> None:
    points = {
        name: re.findall(r'data-tip="([^"]*)"', body)
        for name, body in re.findall(r'<figure id="([^"]*)".*?>(.*?)</figure>', page, re.DOTALL)
    }
    assert points["demo-perplexity-stories-bits"] == [
        "rtn, 4 bits: 4.000",
        "gptq, 2 bits: 5.000",
        "gptq, 4 bits: 3.500",
    ]
    assert [tip.partition(":")[0] for tip in points["demo-pareto"]] == [
        "unquantized float32",
        "rtn, 4 bits",
        "gptq, 2 bits",
        "gptq, 4 bits",
    ]
    assert len(points["demo-stories-kl"]) == 4
    assert len([name for name in points if name.endswith("-sites")]) == 2
    assert "not shown: rtn 2-bit" in page
    assert "Not shown: rtn w2 g128 (diverged)." in page


def test_the_page_asks_for_nothing_and_takes_names_for_text(page: str) -> None:
    assert "&lt;b&gt;a study&lt;/b&gt;" in page
    outside = re.findall(r'(?:src|href)="(?!#|data:)([^"]*)"', page) + re.findall(
        r"@import|url\((?!#)", page
    )
    assert outside == []
    identities = re.findall(r'\bid="([^"]*)"', page)
    assert len(identities) == len(set(identities))


def opened(page: str, tmp_path: Path, *flags: str) -> tuple[dict[str, Any], list[str]]:
    """Open the page as a file; return its probe's values and every address it requested."""
    assert BROWSER is not None
    file, log = tmp_path / "report.html", tmp_path / "net.json"
    file.write_text(page.replace("</body>", PROBE + "</body>"), encoding="utf-8")
    places = [
        f"--user-data-dir={tmp_path}/profile",
        f"--log-net-log={log}",
        "--net-log-capture-mode=Everything",
    ]
    command = [BROWSER, *FLAGS, *places, *flags, "--dump-dom", file.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in shown.stderr
    probe = re.search(r'data-probe="([^"]*)"', shown.stdout)
    assert probe is not None
    # Chromium itself requests the time and updates; a page's requests carry its loader's mark.
    requests = set(
        re.findall(
            rf'"traffic_annotation":{OF_A_PAGE},"url":"([^"]*)"', log.read_text(encoding="utf-8")
        )
    )
    return json.loads(unescape(probe[1])), sorted(requests)


def test_as_a_file_it_works_and_asks_nobody_for_anything(page: str, tmp_path: Path) -> None:
    values, requests = opened(page, tmp_path, "--window-size=1200,900")
    assert values["tip"] == "unquantized float32: 16.0 MB"
    assert requests == []


def test_a_request_would_be_noticed(page: str, tmp_path: Path) -> None:
    outside = '<img src="http://127.0.0.1:9/font" onerror="" alt=""></main>'
    assert BROWSER is not None
    file, log = tmp_path / "asks.html", tmp_path / "net.json"
    file.write_text(page.replace("</main>", outside), encoding="utf-8")
    places = [
        f"--user-data-dir={tmp_path}/profile",
        f"--log-net-log={log}",
        "--net-log-capture-mode=Everything",
    ]
    subprocess.run(
        [BROWSER, *FLAGS, *places, "--dump-dom", file.as_uri()],
        capture_output=True,
        timeout=120,
        check=True,
    )
    assert f'"traffic_annotation":{OF_A_PAGE},"url":"http://127.0.0.1:9/font"' in log.read_text(
        encoding="utf-8"
    )


# Where the parts of an answer are on the page, and what of them is wider than its place.
PLACES = """JSON.stringify((() => {
  const place = (part) => {
    const { top, bottom, left, right } = part.getBoundingClientRect();
    return { top: top + scrollY, bottom: bottom + scrollY, left, right };
  };
  const all = (what) => [...document.querySelectorAll(what)];
  return {
    overflow: document.documentElement.scrollWidth > innerWidth,
    sentences: all(".sentences li").map(place), picture: place(all(".answer svg")[0]),
    chosen: place(all(".answer tr.chosen")[0]), others: all("main > details").map(place),
    parts: all(".answer td, .answer th, .answer button").filter(
      (part) => part.checkVisibility()).map(place),
    commands: all(".answer .command pre").map((part) => ({
      whole: part.scrollWidth <= part.clientWidth,
      swiped: getComputedStyle(part).overflowX === "auto",
    })),
  };
})())"""
COPY = """JSON.stringify((() => {
  const copied = [];
  navigator.clipboard.writeText = (text) => { copied.push(text); return Promise.resolve(); };
  for (const button of document.querySelectorAll(".answer .command button")) button.click();
  return copied;
})())"""


def test_the_answer_is_read_and_copied_on_a_telephone_and_on_a_desk(tmp_path: Path) -> None:
    about = About(name="a study", command="python launch.py -m method=rtn,gptq")
    records = study(tmp_path / "trials")
    page = write_report(records, tmp_path / "report", about).files["report.html"].decode()
    file = tmp_path / "report.html"
    file.write_text(page, encoding="utf-8")
    commands = [
        unescape(found)
        for found in re.findall(r"<pre>(.*?)</pre>", page[: page.index("<details")], re.DOTALL)
    ]
    assert len(commands) == 3
    width, height = 360, 740
    with Browser(tmp_path, width, height) as browser:
        browser.open(file.as_uri())
        browser.until("document.readyState === 'complete' && location.protocol === 'file:'")
        seen = json.loads(browser.ask(PLACES))
        assert not seen["overflow"]
        [*_, last], picture, chosen = seen["sentences"], seen["picture"], seen["chosen"]
        assert last["bottom"] <= picture["top"]
        assert picture["bottom"] <= chosen["top"]
        assert len(seen["others"]) >= 3
        assert all(chosen["bottom"] <= other["top"] for other in seen["others"])
        assert picture["bottom"] <= 2 * height
        for part in (*seen["sentences"], picture, chosen, *seen["parts"]):
            assert part["left"] >= 0
            assert part["right"] <= width
        assert all(command["whole"] or command["swiped"] for command in seen["commands"])
        assert json.loads(browser.ask(COPY)) == commands
        browser.size(1240, 900)
        assert all(command["whole"] for command in json.loads(browser.ask(PLACES))["commands"])


def test_it_is_dark_where_its_reader_likes_that(page: str, tmp_path: Path) -> None:
    (tmp_path / "light").mkdir()
    (tmp_path / "dark").mkdir()
    light, _ = opened(page, tmp_path / "light", "--blink-settings=preferredColorScheme=1")
    dark, _ = opened(page, tmp_path / "dark", "--blink-settings=preferredColorScheme=0")
    assert (light["paper"], dark["paper"]) == ("rgb(255, 255, 255)", "rgb(18, 21, 26)")
