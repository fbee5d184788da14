"""What ipywidgets lacks in the browser: a live region that screen readers follow, names for sliders, groups and charts,

and charts that take the width they are given. One small anywidget; it draws nothing but its own text.
"""

from __future__ import annotations

from typing import Any

import ipywidgets
import traitlets

ROOT_CLASS = "inferlab"

_SCRIPT = """
const EVENT = "plotlywidget-after-render";

function decorate(root, charts) {
  for (const group of root.querySelectorAll(".inferlab-group")) {
    group.setAttribute("role", "group");
    group.setAttribute("aria-label", group.querySelector("h4")?.textContent ?? "");
  }
  for (const pair of root.querySelectorAll(".inferlab-pair")) {
    const name = pair.querySelector("label")?.textContent ?? "";
    pair.querySelectorAll("[role=slider]").forEach(handle => handle.setAttribute("aria-label", name + ", slider"));
  }
  for (const input of root.querySelectorAll("select, [role=slider]")) {
    input.dataset.lmSuppressShortcuts = "true";  // JupyterLab would take the arrows, and letters, for its cells
  }
  for (const plot of root.querySelectorAll(".js-plotly-plot")) {
    plot.setAttribute("role", "figure");
    plot.setAttribute("aria-label", ("Charts of memory, throughput, latency and runs. " + charts).trim());
  }
}

function render({ model, el }) {
  const region = document.createElement("div");
  region.className = "inferlab-live";
  region.setAttribute("role", model.get("urgent") ? "alert" : "status");
  region.setAttribute("aria-live", model.get("urgent") ? "assertive" : "polite");
  region.setAttribute("aria-atomic", "true");
  el.append(region);
  const write = () => {
    const unseen = document.createElement("span");
    unseen.className = "inferlab-unseen";
    unseen.textContent = model.get("unseen");
    region.dataset.kind = model.get("text") ? model.get("kind") : "";
    region.title = model.get("text");
    region.replaceChildren(unseen, model.get("text"));
  };
  model.on("change:text", write);
  model.on("change:kind", write);
  write();
  if (model.get("urgent")) return;  // one of the two regions looks after the panel
  let width = 0;
  const fit = () => requestAnimationFrame(() => {
    const root = el.closest(".inferlab");
    if (!root) return;
    decorate(root, model.get("text"));
    window.dispatchEvent(new Event("resize"));  // what plotly listens to
  });
  const watch = new ResizeObserver(entries => {
    const now = Math.round(entries[0].contentRect.width);
    if (now !== width) { width = now; fit(); }
  });
  const drawn = event => {
    if (!el.closest(".inferlab")?.contains(event.detail.element)) return;
    fit();
    model.set("renders", model.get("renders") + 1);  // what was sent while the charts were being built may be lost
    model.save_changes();
  };
  watch.observe(el);
  document.addEventListener(EVENT, drawn);
  return () => { watch.disconnect(); document.removeEventListener(EVENT, drawn); };
}
export default { render };
"""


def live_region(*, urgent: bool = False) -> Any:
    """A widget with `text`, `kind` and `unseen` (words for screen readers only, set before `text`).

    Screen readers announce its changes, at once if `urgent`. `renders` counts how often the browser has built the
    charts beside it. Without anywidget it is an HTML widget of the same look, which readers find but do not announce.
    """
    try:
        import anywidget
    except ImportError:
        return _plain_region(urgent)
    traits = {
        "_esm": _SCRIPT,
        "text": traitlets.Unicode("").tag(sync=True),
        "unseen": traitlets.Unicode("").tag(sync=True),
        "kind": traitlets.Unicode("").tag(sync=True),
        "urgent": traitlets.Bool(False).tag(sync=True),
        "renders": traitlets.Int(0).tag(sync=True),
    }
    return type("LiveRegion", (anywidget.AnyWidget,), traits)(urgent=urgent)


def _plain_region(urgent: bool) -> Any:
    from html import escape

    class PlainRegion(ipywidgets.HTML):  # type: ignore[misc]
        text = traitlets.Unicode("")
        unseen = traitlets.Unicode("")
        renders = traitlets.Int(0)
        kind = traitlets.Unicode("")

        @traitlets.observe("text", "kind")
        def _write(self, _: object) -> None:
            role = "alert" if urgent else "status"
            self.value = (
                f'<div class="inferlab-live" role="{role}" data-kind="{escape(self.kind)}">{escape(self.text)}</div>'
            )

    return PlainRegion()


# Colours and fonts are JupyterLab's own variables, so that the panel follows the theme, also when it changes; the
# values after the commas serve front ends that have none. Heights are fixed wherever text changes during a run.
STYLE = """<style>
.inferlab { container-type: inline-size; color: var(--jp-ui-font-color1, #222); font-size: 13px;
  padding: 4px 2px 8px; }
.inferlab, .inferlab .widget-box, .inferlab .widget-html, .inferlab .widget-html-content { overflow: visible; }
.inferlab .widget-html, .inferlab .widget-html-content { margin: 0; line-height: 1.35; width: 100%; display: block;
  height: auto; }
.inferlab h4 { margin: 0 0 4px; font-size: 12px; font-weight: 600; letter-spacing: .04em; text-transform: uppercase;
  color: var(--jp-ui-font-color2, #555); }
.inferlab-top { align-items: center; gap: 6px; flex-wrap: wrap; margin-bottom: 8px; }
.inferlab-top .widget-button { margin: 0; font-weight: 600; height: 32px; line-height: 30px; border-radius: 4px; }
.inferlab-top .inferlab-progress { flex: 1 1 260px; min-width: 220px; }
.inferlab-top .inferlab-save { width: auto; white-space: nowrap; font-size: 12px; margin: 0 4px; }
.inferlab-save a { color: var(--jp-content-link-color, #0072B2); text-decoration: underline; }
.inferlab-save a[aria-disabled] { color: var(--jp-ui-font-color2, #555); text-decoration: none; opacity: .6; }
.inferlab-bar { height: 8px; border-radius: 4px; background: var(--jp-layout-color3, #ddd); overflow: hidden; }
.inferlab-bar > div { height: 100%; background: #0072B2; }
.inferlab-progress small { display: block; height: 1.4em; overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap;
  color: var(--jp-ui-font-color2, #555); font-size: 12px; }
.inferlab-results { min-width: 0; }
.inferlab-body { display: grid; grid-template-columns: 300px minmax(0, 1fr); gap: 16px; align-items: start; }
.inferlab-knobs { display: grid; grid-template-columns: minmax(0, 1fr); gap: 10px; }
.inferlab-group { min-width: 0; box-sizing: border-box; border: 1px solid var(--jp-border-color2, #ddd);
  border-radius: 6px; padding: 8px 10px; }
.inferlab-group .widget-inline-hbox { width: 100%; min-width: 0; margin: 1px 0; }
.inferlab-group .widget-inline-hbox > select, .inferlab-group .widget-inline-hbox > input { min-width: 0; }
.inferlab-group .widget-label { color: var(--jp-ui-font-color1, #222); font-size: 12.5px; }
.inferlab-pair { width: 100%; align-items: center; gap: 4px; }
.inferlab-pair .widget-slider { flex: 1 1 60px; min-width: 60px; width: auto; margin: 0; }
.inferlab-pair .widget-inline-hbox.widget-text { flex: 0 0 172px; width: 172px; }
.inferlab-tiles { display: grid; grid-template-columns: repeat(7, minmax(0, 1fr)); gap: 6px; margin: 0 0 6px; }
.inferlab-tiles > div { border: 1px solid var(--jp-border-color2, #ddd); border-radius: 6px; padding: 6px 4px 4px 8px;
  min-width: 0; height: 100px; box-sizing: border-box; overflow: hidden; }
.inferlab-tiles > div > * { display: block; white-space: nowrap; overflow: hidden; text-overflow: ellipsis;
  font-size: 11px;
  line-height: 1.3; color: var(--jp-ui-font-color2, #555); }
.inferlab-tiles > div > strong { font-size: clamp(13px, 1.9cqi, 16px); font-variant-numeric: tabular-nums;
  color: var(--jp-ui-font-color0, #000); }
.inferlab-tiles > div > small { white-space: normal; text-overflow: clip; }
.inferlab h4 small { font-weight: 400; letter-spacing: 0; text-transform: none; }
.inferlab-tiles .met { border-color: #009E73; box-shadow: inset 3px 0 #009E73; }
.inferlab-tiles .missed { border-color: #D55E00; box-shadow: inset 3px 0 #D55E00; }
.inferlab-live { height: 4.05em; line-height: 1.35; overflow: auto; }
.inferlab-live[data-kind=error] { color: var(--jp-error-color0, #b00020); font-weight: 600; }
.inferlab-live[data-kind=error]::before { content: "\\26A0\\FE0E\\00A0"; }
.inferlab-said { display: grid; }
.inferlab-said > * { grid-area: 1 / 1; margin: 0; }
.inferlab-unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
.inferlab-charts { overflow-x: auto; overflow-y: hidden; min-width: 0; min-height: 658px; }
.inferlab-charts > * { flex: 1 1 100%; width: 100%; min-width: 600px; margin: 0; }
.inferlab .js-plotly-plot text:not(.bartext) { fill: var(--jp-ui-font-color1, #333) !important; }
.inferlab .js-plotly-plot .hoverlayer text { fill: inherit !important; }
.inferlab-sample pre { margin: 0; padding: 6px 8px; height: 118px; overflow: auto; font-size: 12px; line-height: 1.4;
  white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid var(--jp-border-color2, #ddd); border-radius: 6px;
  background: var(--jp-layout-color1, #fff); color: var(--jp-ui-font-color2, #555); }
.inferlab-sample pre b { unicode-bidi: isolate; color: var(--jp-ui-font-color0, #000); }
.inferlab .jupyter-widgets :focus-visible { outline: 2px solid #0072B2 !important; outline-offset: 1px; }
@container (max-width: 930px) {
  .inferlab-body { grid-template-columns: minmax(0, 1fr); }
  .inferlab-knobs { display: block; columns: 2 300px; column-gap: 12px; }
  .inferlab-knobs > .inferlab-group { break-inside: avoid; margin-bottom: 10px; }
}
@container (max-width: 680px) {
  .inferlab-tiles { grid-template-columns: repeat(4, minmax(0, 1fr)); }
  .inferlab-tiles > div > strong { font-size: 16px; }
}
</style>"""
