"""MLflow's own pages in a real browser, after a real sweep."""

import json
import re
import time
from collections.abc import Iterator
from html import unescape
from typing import Any

import pytest

from tests.browser import BROWSER, Browser
from tests.commands import python
from tests.mlflow_server import free_port, kill, serve

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        BROWSER is None, reason="no Chromium here: MLflow's pages are not looked at"
    ),
]
ROOMY = 2400, 1200  # pixels of a window in which all charts are drawn
DESK = 1500, 860  # of a usual window, a quarter of which MLflow's assistant takes
# What a table's reader sees of each column's name.
HEADERS = """JSON.stringify([...document.querySelectorAll(".ag-header-cell")].map(cell => {
  const { left, right } = cell.getBoundingClientRect();
  const view = cell.closest(".ag-header-viewport, .ag-pinned-left-header").getBoundingClientRect();
  const name = cell.innerText.trim(), words = document.createRange();
  const leaf = [...cell.querySelectorAll("*")].find(
    (part) => !part.childElementCount && part.textContent.trim() === name) ?? cell;
  words.selectNodeContents(leaf);
  let cut = false;  // wider than one of the boxes that it stands in
  for (let box = leaf; box !== cell.parentElement; box = box.parentElement) {
    cut ||= words.getBoundingClientRect().right > box.getBoundingClientRect().right + 1;
  }
  return {
    name, left, cut,
    seen: left >= view.left - 1 && right <= Math.min(view.right, innerWidth) + 1,
  };
}))"""
SWEEP = (
    "-m method=rtn bits=2,4 evaluation.tasks=[] evaluation.texts=[demo] evaluation.limit=4 "
    "name=widths question=How.few.bits"
).split()


class Ui:
    """A store's server, and a browser that looks at it.

    start: the page that the sweep named when it ended
    """

    def __init__(self, address: str, start: str, browser: Browser) -> None:
        self.address, self.start, self.browser = address, start, browser

    def text(self, page: str, *expected: str) -> str:
        """Return a page's text, once it has fetched and shows all that is expected."""
        self.browser.open(self.address + page)
        deadline = time.monotonic() + 240  # charts are drawn late on a busy machine
        while True:
            shown = str(self.browser.ask("document.documentElement?.outerHTML"))
            bare = re.sub(r"<(style|script)\b.*?</\1>", "", shown, flags=re.DOTALL)
            text = unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", bare)))
            if all(words in text for words in expected) or time.monotonic() > deadline:
                return text
            time.sleep(0.2)

    def headers(self, *expected: str) -> dict[str, dict[str, Any]]:
        """Return what is seen of a table's columns by name, once those expected are placed."""
        deadline = time.monotonic() + 60
        while True:
            found = json.loads(self.browser.ask(HEADERS))
            headers = {header["name"]: header for header in found}
            seen = all(headers.get(name, {}).get("seen") for name in expected)
            if seen or time.monotonic() > deadline:
                return headers
            time.sleep(0.2)

    def link(self, name: str) -> str:
        """Return the page of the run of that name."""
        from mlflow import MlflowClient

        client = MlflowClient(self.address.rstrip("/"))
        experiment = client.get_experiment_by_name("widths")
        assert experiment is not None
        [run] = client.search_runs([experiment.experiment_id], f"attributes.run_name = '{name}'")
        return f"#/experiments/{experiment.experiment_id}/runs/{run.info.run_id}"


@pytest.fixture(scope="module")
def ui(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ui]:
    folder = tmp_path_factory.mktemp("ui")
    sweep = python("launch.py", *SWEEP, f"storage={folder}/mlruns")
    assert sweep.returncode == 0, sweep.stdout + sweep.stderr
    ending = re.search(r"mlflow ui .*, then http://127\.0\.0\.1:5000/(#\S+)", sweep.stdout)
    assert ending is not None, sweep.stdout
    port = free_port()
    server = serve(folder / "mlruns", port)
    try:
        with Browser(folder, *ROOMY) as browser:
            yield Ui(f"http://127.0.0.1:{port}/", ending[1], browser)
    finally:
        kill(server)


def test_the_page_that_the_sweep_names_is_a_table_of_its_trials(ui: Ui) -> None:
    names = ("none · demo", "rtn w4 g128 · demo", "rtn w2 g128 · demo")
    columns = ("Run Name", "ppl stories", "size MB", "method", "bits")
    text = ui.text(ui.start, *names)
    places = [text.find(name) for name in names]
    assert -1 not in places
    assert places == sorted(places)  # by perplexity, the best first
    ui.browser.size(*DESK)
    headers = ui.headers(*columns)
    ui.browser.size(*ROOMY)
    for name in columns:  # without scrolling, and in full
        assert headers[name]["seen"], headers
        assert not headers[name]["cut"], headers
    order = sorted((*columns, "Duration"), key=lambda name: headers[name]["left"])
    assert order == [*columns, "Duration"]
    assert "3 matching runs" in text
    assert "Overview Observability Traces" not in text  # the face for chat applications


def test_the_parent_asks_and_answers(ui: Ui) -> None:
    text = ui.text(ui.link("How.few.bits"), "python launch.py", "best choice")
    assert "Question. How.few.bits" in text
    assert "python launch.py -m method=rtn bits=2,4" in text
    assert "best choice for each size" in text  # the table that answers
    assert "report.html" in text


def test_a_trial_has_metrics_texts_and_files(ui: Ui) -> None:
    page = ui.link("rtn w2 g128 · demo")
    text = ui.text(page, "perplexity/stories", "Datasets")
    assert "COMPLETED" in text
    assert "perplexity/stories" in text
    assert "group_size" in text
    assert "scheme.bits" not in text
    assert re.search(r"Datasets.{0,40}stories", text)
    files = ui.text(page + "/artifacts", "record.json")
    assert "record.json" in files
    charts = ("answer", "perplexity of stories", "block/weight_error")
    metrics = ui.text(page + "/model-metrics", *charts)
    assert all(name in metrics for name in charts)
    assert metrics.find("perplexity of stories") < metrics.find("block/weight_error")


def test_somebody_who_knows_only_the_address_is_told_what_this_is(ui: Ui) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(ui.address.rstrip("/"))
    experiment = client.get_experiment_by_name("widths")
    assert experiment is not None
    assert "quantization" in experiment.tags["mlflow.note.content"]
    [sweep] = client.search_runs([experiment.experiment_id], "tags.`q3q.command` LIKE '%'")
    assert {
        "best at 2 bits/perplexity of stories",
        "unquantized/perplexity of stories",
    } <= sweep.data.metrics.keys()
    found = client.search_runs([experiment.experiment_id], 'params.bits = "4"')
    assert [run.info.run_name for run in found] == ["rtn w4 g128 · demo"]
