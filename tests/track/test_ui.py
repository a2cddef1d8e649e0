"""MLflow's own pages in a real browser, after a real sweep."""

import re
import shutil
from collections.abc import Iterator
from html import unescape
from pathlib import Path

import pytest

from tests.commands import output_of, python
from tests.mlflow_server import free_port, kill, serve

ROOT = Path(__file__).parent.parent.parent
BROWSER = next(
    (
        path
        for name in ("chromium", "google-chrome", "chromium-browser")
        if (path := shutil.which(name))
    ),
    None,
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        BROWSER is None, reason="no Chromium here: MLflow's pages are not looked at"
    ),
]
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync "
    "--window-size=2400,1200 --virtual-time-budget=20000"
).split()
SWEEP = (
    "-m method=rtn bits=2,4 evaluation.tasks=[] evaluation.texts=[demo] evaluation.limit=4 "
    "name=widths question=How.few.bits"
).split()


class Ui:
    """A store's server.

    start: the page that the sweep named when it ended
    """

    def __init__(self, address: str, start: str, folder: Path) -> None:
        self.address, self.start, self.folder = address, start, folder

    def text(self, page: str, *expected: str) -> str:
        """Return a page's text, once it has fetched and shows all that is expected."""
        assert BROWSER is not None
        for _ in range(12):  # charts are drawn late on a busy machine
            command = [
                BROWSER,
                *FLAGS,
                f"--user-data-dir={self.folder}/profile",
                "--dump-dom",
                self.address + page,
            ]
            shown = output_of(*command, timeout=120, check=True).stdout
            bare = re.sub(r"<(style|script)\b.*?</\1>", "", shown, flags=re.DOTALL)
            text = unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", bare)))
            if all(words in text for words in expected):
                break
        return text

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
        yield Ui(f"http://127.0.0.1:{port}/", ending[1], folder)
    finally:
        kill(server)


def test_the_page_that_the_sweep_names_is_a_table_of_its_trials(ui: Ui) -> None:
    names = ("none · demo", "rtn w4 g128 · demo", "rtn w2 g128 · demo")
    columns = ("ppl stories", "size MB")
    text = ui.text(ui.start, *names, *columns)
    places = [text.find(name) for name in names]
    assert -1 not in places
    assert places == sorted(places)  # by perplexity, the best first
    assert all(column in text for column in columns)
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
