"""Training from one configuration: data, loop, metrics, report. Read: config, build, step, loop."""

from __future__ import annotations
