"""Sphinx: furo and myst; every page in this folder is in the contents."""

from __future__ import annotations

from trivium import __version__

project = "Trivium"
author = "The Trivium authors"
copyright = "2026, The Trivium authors"
release = version = __version__

extensions = ["myst_parser"]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
nitpicky = True

html_theme = "furo"
html_title = f"Trivium {__version__}"
html_copy_source = False
