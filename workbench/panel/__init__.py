"""The panel: its knobs and charts, what the browser needs for them, and the picture left on paper."""
