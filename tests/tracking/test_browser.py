"""The MLflow UI in a real browser, with a finished study."""

import json
import re
from collections import Counter

import pytest
from browser import LoggedStudy, browser_page, chromium, eventually, log_study
from mlflow import MlflowClient
from playwright.sync_api import expect
from servers import Server

pytestmark = [pytest.mark.browser, pytest.mark.slow]

SEARCHED = ["wml.alpha", "wml.mirror_step_size"]
MEMBERS = ["peer0", "peer1", "peer2", "peer3", "ensemble_average", "ensemble_weighted"]
ACCURACIES = [f"val/accuracy/{member}" for member in MEMBERS]
SHOWN_DIGITS = 5e-4 + 1e-9  # the comparison rounds metrics to three decimals

CURVES = """title => {
    const heading = [...document.querySelectorAll("h4")].find(h4 => h4.title === title);
    const card = heading?.closest("[data-testid=experiment-view-compare-runs-card]");
    const traces = card?.querySelector(".js-plotly-plot")?.data ?? [];
    return Object.fromEntries(traces.map(trace => [trace.uuid, trace.x.map((step, i) => [step, trace.y[i]])]));
}"""
AXES = """plot => Object.fromEntries(plot.data[0].dimensions.map(axis => [axis.label, axis.values]))"""
DRAWN_PIXELS = """canvas => {
    const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d");
    copy.drawImage(canvas, 0, 0);
    return copy.getImageData(0, 0, canvas.width, canvas.height).data.filter((_, i) => i % 4 === 3).some(a => a > 0);
}"""
METRIC_ROWS = """() => {
    const grids = [...document.querySelectorAll(".ReactVirtualized__Grid > *")];
    const [labels, values] = grids.map(grid => [...grid.children]);
    const left = cell => parseFloat(cell.style.left);
    return Object.fromEntries(labels.map(label => {
        const row = values.filter(cell => cell.style.top === label.style.top).sort((a, b) => left(a) - left(b));
        return [label.innerText.trim(), row.map(cell => parseFloat(cell.innerText))];
    }));
}"""


@pytest.fixture(scope="module")
def finished_study(tmp_path_factory, ray_cluster):
    chromium()  # before the server, which takes seconds to start
    server = Server(tmp_path_factory.mktemp("server"))
    server.start()
    try:
        server.wait()
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(server.folder)
            patch.setenv("MLFLOW_TRACKING_URI", server.uri)
            yield log_study(server.uri)
    finally:
        server.kill()


@pytest.fixture
def page(finished_study, tmp_path):
    with browser_page(finished_study.uri) as page:
        yield page
        page.screenshot(path=tmp_path / "page.png")


def stored(study):
    client = MlflowClient(study.uri)
    return [client.get_run(child_id) for child_id in study.child_ids]


def metrics_of(runs):
    return {name for run in runs for name in run.data.metrics}


def open_runs(page, study: LoggedStudy, mode: str):
    """Open the runs of the experiment and expand the trials of the study."""
    page.goto(f"{study.uri}/#/experiments/{study.experiment_id}/runs?compareRunsMode={mode}")
    run_of(page, study.parent_id).get_by_role("button").click()
    for child_id in study.child_ids:
        expect(run_of(page, child_id)).to_be_visible()


def run_of(page, run_id):
    return page.get_by_role("row").filter(has=page.locator(f"a[href$='/runs/{run_id}']"))


def show_columns(page, names):
    page.get_by_role("button", name="Columns", exact=True).click()
    popover = page.get_by_role("dialog")
    for name in names:
        popover.get_by_placeholder("Search columns").fill(name)
        whole_name = f"normalize-space(.)='{name}' and normalize-space(..)='{name}'"  # space.wml.alpha matches in part
        popover.locator(f"xpath=.//strong[{whole_name}]").click()
    page.keyboard.press("Escape")


def test_the_overview_shows_the_note_and_the_dataset(page, finished_study):
    page.goto(f"{finished_study.uri}/#/experiments/{finished_study.experiment_id}/runs/{finished_study.child_ids[0]}")
    trial = stored(finished_study)[0]
    accuracy = f"{trial.data.metrics['test/accuracy/peer3'] * 100:.2f}"
    expect(page.get_by_role("row").filter(has=page.get_by_role("cell", name=accuracy, exact=True))).to_be_visible()
    expect(page.get_by_text("digits (").first).to_be_visible()
    page.goto(f"{finished_study.uri}/#/experiments/{finished_study.experiment_id}/runs/{finished_study.parent_id}")
    expect(page.get_by_text("4 trials: 4 complete")).to_be_visible()


def test_the_runs_table_shows_searched_params_and_accuracies_of_every_trial(page, finished_study):
    open_runs(page, finished_study, "TABLE")
    show_columns(page, [*SEARCHED, *ACCURACIES])
    for run in stored(finished_study):
        expect(run_of(page, run.info.run_id)).to_contain_text(run.info.run_name)
        row = page.locator(f".ag-row[row-id='{run_of(page, run.info.run_id).get_attribute('row-id')}']")
        for name in SEARCHED:
            expect(row.locator(f"[col-id='params.`{name}`']")).to_have_text(run.data.params[name])
        for name in ACCURACIES:
            cell = row.locator(f"[col-id='metrics.`{name}`']")
            expect(cell).to_have_text(re.compile(r"^[\d.]+$"))
            assert float(cell.inner_text()) == pytest.approx(run.data.metrics[name], abs=SHOWN_DIGITS)


def test_the_charts_draw_every_epoch_of_every_trial(page, finished_study):
    client = MlflowClient(finished_study.uri)
    open_runs(page, finished_study, "CHART")
    families = Counter(name.rpartition("/")[0] for name in metrics_of(stored(finished_study)))
    for family, charts in families.items():
        header = page.get_by_test_id("experiment-view-compare-runs-section-header")
        expect(header.filter(has_text=re.compile(rf"^{family}\s*\({charts}\)"))).to_be_visible()
    for name in ACCURACIES:  # one at a time: cards below the window are not rendered
        page.get_by_placeholder("Search metric charts").fill(name)
        card = page.get_by_test_id("experiment-view-compare-runs-card").filter(has=page.get_by_title(name, exact=True))
        card.scroll_into_view_if_needed()
        expect(card.locator("svg .scatterlayer .js-line").first).to_be_visible()
        histories = {
            child_id: [[entry.step, entry.value] for entry in client.get_metric_history(child_id, name)]
            for child_id in finished_study.child_ids
        }
        eventually(page, lambda title=name: page.evaluate(CURVES, title), histories)


def open_comparison(page, study: LoggedStudy):
    runs, experiments = json.dumps(study.child_ids), json.dumps([study.experiment_id])
    page.goto(f"{study.uri}/#/compare-runs?runs={runs}&experiments={experiments}")
    names = [run.info.run_name for run in stored(study)]
    expect(cells_of(page, "Run Name:")).to_have_text(names)  # the columns below are in this order


def cells_of(page, heading):
    return (
        page.get_by_role("row").filter(has=page.get_by_role("rowheader", name=heading, exact=True)).get_by_role("cell")
    )


def choose(page, box, names):
    box.click()
    for name in names:
        box.fill(name)
        page.locator(f".rc-virtual-list [title='{name}']:visible").click()
    box.press("Escape")


def test_the_comparison_draws_searched_params_against_accuracy(page, finished_study):
    open_comparison(page, finished_study)
    panel = page.get_by_role("tabpanel", name="Parallel Coordinates Plot")
    panel.get_by_role("button", name="Clear All").click()
    params, metrics = panel.get_by_role("combobox").all()
    choose(page, params, SEARCHED)
    choose(page, metrics, ACCURACIES[-1:])
    plot = panel.locator(".js-plotly-plot")
    expect(plot.locator("svg .parcoords .axis-title")).to_have_text([*SEARCHED, *ACCURACIES[-1:]])
    runs = stored(finished_study)
    axes = {name: [float(run.data.params[name]) for run in runs] for name in SEARCHED}
    axes |= {name: [run.data.metrics[name] for run in runs] for name in ACCURACIES[-1:]}
    eventually(page, lambda: plot.evaluate(AXES), axes)
    eventually(page, lambda: plot.locator("canvas.gl-canvas-context").evaluate(DRAWN_PIXELS), True)


def test_the_comparison_lists_searched_params_and_accuracies(page, finished_study):
    open_comparison(page, finished_study)
    runs = stored(finished_study)
    for name in SEARCHED:
        expect(cells_of(page, name)).to_have_text([run.data.params[name] for run in runs])
    shown = shown_metrics(page, runs)
    for name in ACCURACIES:
        assert shown[name] == pytest.approx([run.data.metrics[name] for run in runs], abs=SHOWN_DIGITS)


def shown_metrics(page, runs):
    """The metrics of the comparison, read while scrolling: only the rows in view exist.

    Labels and values are matched by their position in the list: on the screen the labels scroll a step late.
    """
    shown = {}
    page.get_by_role("grid").last.hover()

    def scroll():
        rows = page.evaluate(METRIC_ROWS)
        shown.update({name: values for name, values in rows.items() if len(values) == len(runs)})
        page.mouse.wheel(0, 100)
        return set(shown)

    eventually(page, scroll, metrics_of(runs))
    return shown
