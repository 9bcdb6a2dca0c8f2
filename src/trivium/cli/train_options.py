"""The options that train and distill share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="TABLE.KEY=VALUE", help="Replace one value; may be repeated.")
]
Ranks = Annotated[
    int | None, typer.Option("--ranks", min=1, help="Start so many ranks here, through torchrun's launcher.")
]
Resume = Annotated[str | None, typer.Option("--resume", help="auto, must, never or a checkpoint's folder.")]
Run = Annotated[
    str | None, typer.Option("--run", help="The folder to write to (under torchrun itself: --set run=FOLDER).")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print how it ended as JSON on stdout.")]
Launched = Annotated[Path | None, typer.Option("--launched", hidden=True)]
Terminal = Annotated[bool, typer.Option("--terminal", hidden=True)]
