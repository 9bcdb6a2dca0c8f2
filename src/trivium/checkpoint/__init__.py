"""Checkpoints: written by all ranks at once, complete or absent, verified when read, into any layout. No pickle."""

from __future__ import annotations

from trivium.checkpoint.choose import Resumed, latest, load_resumable, resume
from trivium.checkpoint.commit import check_folder
from trivium.checkpoint.damage import DamagedError
from trivium.checkpoint.hugging_face import load_hugging_face, save_hugging_face
from trivium.checkpoint.reading import load
from trivium.checkpoint.writing import save

__all__ = [
    "DamagedError",
    "Resumed",
    "check_folder",
    "latest",
    "load",
    "load_hugging_face",
    "load_resumable",
    "resume",
    "save",
    "save_hugging_face",
]
