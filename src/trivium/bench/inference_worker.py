"""The loop that every contestant of the inference bench runs in its process: a line of JSON in, a line out."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from typing import Any, Protocol


class Contestant(Protocol):
    """A loaded model that can be timed. ``step_bytes``: of the weights that one token's step reads. ``kernels``: what
    computes, in its own words."""

    step_bytes: int
    kernels: str

    def decode(self, batch: int, context: int, steps: int) -> list[float]:
        """Seconds of each of ``steps`` steps of ``batch`` sequences that each hold ``context`` tokens before."""

    def prefill(self, tokens: int) -> float:
        """Seconds until a prompt's next token is known."""


def serve(make: Callable[[str, str, int, str], Contestant]) -> None:
    """Build the contestant from the arguments (folder, form, threads, way), then answer until standard input ends.

    ``way``: empty, "cuda" for who runs there, or one of `inference_process.SECOND_WAYS`.
    """
    folder, form, threads, way = sys.argv[1:5]
    answers = sys.stdout
    sys.stdout = sys.stderr  # libraries may print
    try:
        contestant = make(folder, form, int(threads), way)
    except ImportError as error:
        _say(answers, {"error": f"not installed ({error.name}): pip install 'trivium[bench]'"})
        return
    except NotImplementedError as error:
        _say(answers, {"error": str(error)})
        return
    _say(answers, {"step_bytes": contestant.step_bytes, "kernels": contestant.kernels})
    for line in sys.stdin:
        question = json.loads(line)
        if question["do"] == "decode":
            times = contestant.decode(question["batch"], question["context"], question["steps"])
            _say(answers, {"seconds": statistics.median(times)})
        else:
            _say(answers, {"seconds": contestant.prefill(question["tokens"])})


def _say(to: Any, answer: dict[str, Any]) -> None:
    to.write(json.dumps(answer) + "\n")
    to.flush()
