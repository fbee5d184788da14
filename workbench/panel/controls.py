"""The knobs as widgets, grouped and named. Knows nothing of engines: it holds values and tells when one moves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import ipywidgets as widgets

from workbench.panel.knob import Choice, Knob, Number, Switch, Text
from workbench.panel.knobs import (
    GROUPS,
    KNOBS,
    checked,
    start_values,
    suggestions_for_machine,
    suggestions_for_preset,
)

OTHER = "other"
_LABEL = {"description_width": "96px"}
_FULL = {"width": "100%"}
_BRINGS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "workload": lambda values: suggestions_for_preset(values["workload"]),
    "model": lambda values: suggestions_for_machine(values["model"], values["device"]),
    "device": lambda values: suggestions_for_machine(values["model"], values["device"]),
}


class Controls:
    """One widget per knob. `box` shows them; `values` reads them; `on_move` is called after any of them moved."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self.on_move: Callable[[], None] = lambda: None
        self._quiet = False
        self._fields = {name: _field(knob) for name, knob in KNOBS.items()}
        self.set(**start_values(given))
        for name, field in self._fields.items():
            field.observe(partial(self._moved, name))
        groups = [
            widgets.VBox(
                [
                    widgets.HTML(f"<h4>{group}</h4>"),
                    *(f.box for n, f in self._fields.items() if KNOBS[n].group == group),
                ]
            )
            for group in GROUPS
        ]
        for group in groups:
            group.add_class("inferlab-group")
        self.box = widgets.Box(groups)
        self.box.add_class("inferlab-knobs")

    def values(self) -> dict[str, Any]:
        """Knob names to values, checked: a number typed into a field is still a user's number."""
        return checked({name: field.get() for name, field in self._fields.items()})

    def set(self, **values: Any) -> None:
        """Turn knobs from code; ConfigError names an unknown knob or a value outside its range."""
        values = checked(values)
        self._quiet = True
        try:
            for name, value in values.items():
                self._fields[name].set(value)
        finally:
            self._quiet = False
        self._enable()

    def widget(self, name: str) -> Any:
        """The input of a knob, as tests and curious people want it."""
        return self._fields[name].inputs[0]

    def _moved(self, name: str, _: Any = None) -> None:
        if self._quiet:
            return
        if name in _BRINGS:
            self.set(**_BRINGS[name]({key: self._fields[key].get() for key in ("workload", "model", "device")}))
        self._enable()
        self.on_move()

    def _enable(self) -> None:
        """Of the two ways to say how much arrives, the one that counts."""
        load = self._fields["load"].get()
        for name in ("rate", "concurrency"):
            for field in self._fields[name].inputs:
                field.disabled = load != name


class _Field:
    """A knob's widgets: `inputs` take values (the first one is the authority), `box` is what is shown."""

    def __init__(self, box: Any, inputs: list[Any]) -> None:
        self.box = box
        self.inputs = inputs

    def get(self) -> Any:
        return self.inputs[0].value

    def set(self, value: Any) -> None:
        self.inputs[0].value = value

    def observe(self, moved: Callable[[Any], None]) -> None:
        self.inputs[0].observe(moved, names="value")


class _ModelField(_Field):
    """A list of the models at hand, and a text field for any other."""

    def get(self) -> Any:
        chosen, text = self.inputs
        return text.value if chosen.value == OTHER else chosen.value

    def set(self, value: Any) -> None:
        chosen, text = self.inputs
        known = value in dict(chosen.options).values()
        if not known:
            text.value = value
        chosen.value = value if known else OTHER
        text.disabled = known

    def observe(self, moved: Callable[[Any], None]) -> None:
        chosen, text = self.inputs

        def choose(change: Any) -> None:
            text.disabled = chosen.value != OTHER
            if chosen.value != OTHER or text.value:
                moved(change)

        chosen.observe(choose, names="value")
        text.observe(moved, names="value")


def _field(knob: Knob) -> _Field:
    # A field takes the nearest number it may hold, without a word, so the range must be in sight beforehand.
    help = f"{knob.help} ({knob.permitted})" if isinstance(knob, Number) else knob.help
    common = {"description": knob.label, "tooltip": help, "description_allow_html": False, "style": _LABEL}
    match knob:
        case Text():
            options = [(label, value) for value, label in knob.suggestions().items()]
            options.append(("another: folder or hub id", OTHER))
            chosen = widgets.Dropdown(**common, options=options, layout=_FULL)
            text = widgets.Text(
                description="Folder or id",
                placeholder="folder or owner/name",
                style=_LABEL,
                layout=_FULL,
                continuous_update=False,
                tooltip="Used when the model above says another",
            )
            return _ModelField(widgets.VBox([chosen, text]), [chosen, text])
        case Choice():
            options = [(label, value) for value, label in knob.options.items()]
            chosen = widgets.Dropdown(**common, options=options, layout=_FULL)
            return _Field(chosen, [chosen])
        case Switch():
            switch = widgets.Checkbox(**{**common, "style": {"description_width": "0"}}, indent=False, layout=_FULL)
            return _Field(switch, [switch])
        case Number():
            return _number(knob, common)
    raise TypeError(f"no widget for knob {knob.name!r}")


def _number(knob: Number, common: dict[str, Any]) -> _Field:
    kind = widgets.BoundedIntText if knob.whole else widgets.BoundedFloatText
    number = kind(
        **common,
        value=knob.low,
        min=knob.low,
        max=knob.high,
        step=knob.step,
        layout=_FULL if knob.slider is None else {},
    )
    if knob.slider is None:
        return _Field(number, [number])
    low, high = knob.reach or (knob.low, knob.high)
    if knob.slider == "log":
        base = {"base": 10, "min": math.log10(low), "max": math.log10(high), "step": 0.02, "value": low}
        slider = widgets.FloatLogSlider(**base, readout=False, continuous_update=False, tooltip=knob.help)
    else:
        slider = widgets.FloatSlider(
            min=low, max=high, step=knob.step, value=low, readout=False, continuous_update=False, tooltip=knob.help
        )
    following = False

    def follow(target: Any, value: float) -> None:
        nonlocal following
        if following:
            return
        following = True
        try:
            target.value = value
        finally:
            following = False

    number.observe(lambda change: follow(slider, min(max(change["new"], low), high)), names="value")
    slider.observe(lambda change: follow(number, _rounded(change["new"], knob)), names="value")
    box = widgets.HBox([number, slider])
    box.add_class("inferlab-pair")
    return _Field(box, [number, slider])


def _rounded(value: float, knob: Number) -> float:
    """A slider's position as a number people would type: whole, or two digits on a log slider."""
    if knob.whole:
        return max(round(value), int(knob.low))
    return float(f"{value:.2g}") if knob.slider == "log" else round(value, 10)
