import pytest

from tests.unit.workbench.support import SIMULATED
from workbench import Session, Workbench
from workbench.panel import screen


@pytest.fixture
def session():
    with Session() as session:
        yield session


@pytest.fixture
def panel():
    with Workbench(threaded=False, **SIMULATED) as panel:
        yield panel


@pytest.fixture
def live(panel, monkeypatch):
    """A panel on a screen; the charts are pictures, which the tests of charts do not need to be."""
    monkeypatch.setattr(screen, "build_charts", lambda: (screen.StillCharts(), ""))
    panel.screen  # noqa: B018
    panel.tick()
    return panel
