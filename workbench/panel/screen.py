"""The widgets of the panel and where they stand. Shows what it is given; decides nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import ipywidgets as widgets

from workbench import text
from workbench.panel import headline
from workbench.panel.controls import Controls
from workbench.panel.frontend import ROOT_CLASS, STYLE, live_region
from workbench.panel.headline import Tile
from workbench.panel.snapshot import draw, image
from workbench.panel.view import View
from workbench.runs import neighbours

if TYPE_CHECKING:
    from engine.running.memory import MemoryPlan
    from workbench.runs.run import Run
    from workbench.runs.run_snapshot import RunSnapshot

NO_LIVE_CHARTS = (
    "The charts are still pictures here, drawn anew once a second: plotly's FigureWidget could not be built ({why}). "
    "'pip install anywidget' brings it back."
)


class Charts(Protocol):
    """Live ones, or pictures where live ones cannot be had."""

    @property
    def figure(self) -> Any: ...

    def show(self, view: View, *, slow: bool = True) -> None: ...

    def forget(self) -> None: ...

    def close(self) -> None: ...


class StillCharts:
    """The charts as one picture."""

    def __init__(self) -> None:
        self.figure = widgets.HTML()

    def show(self, view: View, *, slow: bool = True) -> None:
        if slow or not self.figure.value:
            self.figure.value = image(draw(view), "memory, throughput, latency and trade-off charts")

    def forget(self) -> None:
        pass

    def close(self) -> None:
        self.figure.close()


def build_charts() -> tuple[Charts, str]:
    """The best charts there are, and a sentence where these are not the live ones."""
    try:
        from workbench.panel.charts import LiveCharts

        return LiveCharts(), ""
    except ImportError as problem:
        return StillCharts(), NO_LIVE_CHARTS.format(why=str(problem).strip().splitlines()[0])


class Screen:
    """`root` is what a cell shows.

    All of it is built before it is shown, by the thread of the cell: a figure that another thread builds may reach the
    browser before its own data does, and then stays blank.
    """

    def __init__(self, controls: Controls) -> None:
        self.run = _button("Run", "Start a run with the knobs as they are", "play", "primary")
        self.stop = _button("Stop", "End the run after the step it is in", "stop", "")
        self.keep = _button("Keep as baseline", "Compare the next runs with the latest one", "bookmark", "")
        self.stop.disabled = self.keep.disabled = True
        self.save = widgets.HTML(headline.download_html(""))
        self.progress = widgets.HTML()
        self.tiles = widgets.HTML(headline.tiles_html(headline.tiles(None, None, None)))
        self.status = live_region()
        self.alert = live_region(urgent=True)
        self.alert.kind = "error"
        self.sample = widgets.HTML(headline.sample_html(None, ""))
        self.charts, lack = build_charts()
        self._place = widgets.Box([self.charts.figure])
        top = widgets.HBox([self.run, self.stop, self.keep, self.save, self.progress])
        said = widgets.Box([self.status, self.alert])
        results = widgets.VBox([self.tiles, said, self._place, self.sample])
        body = widgets.Box([controls.box, results])
        self.root = widgets.VBox([widgets.HTML(STYLE), top, body])
        for widget, name in (
            (self.root, ROOT_CLASS),
            (top, "inferlab-top"),
            (self.save, "inferlab-save"),
            (self.progress, "inferlab-progress"),
            (body, "inferlab-body"),
            (results, "inferlab-results"),
            (said, "inferlab-said"),
            (self._place, "inferlab-charts"),
            (self.sample, "inferlab-sample"),
        ):
            widget.add_class(name)
        self.step(0.0, "")
        self.say(lack)

    def show(self, view: View, tiles: Sequence[Tile], run: RunSnapshot | None, *, slow: bool) -> None:
        """Everything that changes during a run."""
        self.tiles.value = headline.tiles_html(tiles)
        self.charts.show(view, slow=slow)
        if run is not None:
            words = {"loading": f"run {run.id}: {run.phase}", "failed": f"run {run.id} failed"}.get(
                run.status, f"run {run.id} {run.status}: {run.finished:,} of {text.count(run.total, 'request')}"
            )
            took = f", {text.seconds(run.metrics.duration)}" if run.metrics and run.status != "loading" else ""
            beside = neighbours.words(run.others)
            self.step(run.finished / run.total, words + took + (f"; {beside}" if beside else ""))

    def forecast(self, plan: MemoryPlan | None) -> None:
        """What the next run would have, in the line under the bar."""
        if plan is None:
            self.step(0.0, "Ready. The memory plan is known once the model is loaded.")
        else:
            self.step(
                0.0,
                f"Next run: about {plan.tokens_that_fit:,} tokens fit; weights {text.size(plan.weights_total)}, "
                f"workspace {text.size(plan.workspace)}, KV {text.size(plan.kv)} of {text.size(plan.limit)}",
            )

    def step(self, share: float, words: str) -> None:
        self.progress.value = headline.progress_html(share, words)

    def say(self, words: str, unseen: str = "") -> None:
        """One sentence in the live region; `unseen` is for screen readers, who cannot glance at the tiles."""
        self.alert.text = ""
        self.status.unseen = unseen
        self.status.text = words

    def complain(self, words: str) -> None:
        """An error, in the place of the sentence."""
        self.status.unseen = self.status.text = ""
        self.alert.text = words

    def show_sample(self, run: Run) -> None:
        sample = run.sample()
        if sample is not None:
            note = "random weights: it means nothing" if run.is_synthetic else "prompt, then the answer in bold"
            self.sample.value = headline.sample_html(sample, note)

    def offer(self, table: str) -> None:
        """The runs as CSV, to be saved."""
        self.save.value = headline.download_html(table)

    def busy(self, busy: bool, *, can_keep: bool = False) -> None:
        """Which buttons make sense now."""
        self.run.disabled = busy
        self.stop.disabled = not busy
        self.keep.disabled = busy or not can_keep

    def close(self, view: View) -> None:
        """Leave a picture behind: what a page shows should not vanish under its reader."""
        still = StillCharts()
        still.show(view)
        self._place.children = (still.figure,)
        self.charts.close()
        _disable(self.root)
        self.step(0.0, "Closed: the memory has been given back.")


def _button(words: str, help: str, icon: str, style: str) -> Any:
    return widgets.Button(description=words, tooltip=help, icon=icon, button_style=style, layout={"width": "auto"})


def _disable(widget: Any) -> None:
    for child in getattr(widget, "children", ()):
        _disable(child)
    if widget.has_trait("disabled"):
        widget.disabled = True
