"""`python -m tests.save_notebooks`: run every notebook and save what a page without a kernel can show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"


def save(path: Path) -> None:
    """Widget state is megabytes per figure, and a widget's view without it is an error message: both are left out."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook, timeout=300, store_widget_state=False, resources={"metadata": {"path": str(path.parent)}}
    ).execute()
    notebook.metadata.pop("widgets", None)
    notebook.metadata["language_info"] = {"name": "python"}
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if not _is_bar(output)]
        for output in cell.get("outputs", []):
            output.get("data", {}).pop(WIDGET_VIEW, None)
    nbformat.write(notebook, path)


def _is_bar(output: Any) -> bool:
    """A progress bar: it is displayed, not the cell's result, and without its widget a line of text."""
    data = output.get("data", {})
    return output.output_type == "display_data" and WIDGET_VIEW in data and "text/html" not in data


if __name__ == "__main__":
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        save(path)
        print(f"{path.relative_to(NOTEBOOKS.parent)}: {path.stat().st_size / 1000:.0f} kB")
