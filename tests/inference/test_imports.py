"""What answering a prompt loads: neither transformers nor torch's compiler, which takes longer than all the rest."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.inference.folders import folder
from tests.inference.reference import reference, save
from tests.inference.test_storage import LLAMA, int4_pair, mxfp4_pair
from tests.worlds import child_environment

ANSWER = """
import sys
from importlib.abc import MetaPathFinder

class Refuse(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("transformers", "sympy", "matplotlib") or name == "torch._dynamo":
            raise ImportError(f"{name} is not needed")

sys.meta_path.insert(0, Refuse())
from trivium.inference import LLM, SamplingParams
llm = LLM(sys.argv[1], backend=sys.argv[2])
prompt = llm.encode_chat([{"role": "user", "content": "hello"}]) if llm.tokenizer else [1, 2, 3]
print(llm.generate(prompt, SamplingParams(max_tokens=3))[0].token_ids)
"""


@pytest.mark.parametrize(
    ("backend", "kind"), [("auto", "own"), ("torch", "own"), ("auto", "llama"), ("auto", "gptq"), ("auto", "mxfp4")]
)
def test_an_answer_needs_neither_transformers_nor_the_compiler(tmp_path: Path, backend: str, kind: str) -> None:
    model = tmp_path
    if kind == "own":
        model = folder(tmp_path / "run").parent
    elif kind == "llama":
        save(reference("Llama", LLAMA), tmp_path)
    elif kind == "gptq":
        int4_pair(tmp_path, "gptq")
    else:
        mxfp4_pair(tmp_path)
    ran = subprocess.run(
        [sys.executable, "-c", ANSWER, str(model), backend],
        env=child_environment({}), capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert len(ids_in(ran.stdout)) == 3


def ids_in(text: str) -> list[int]:
    return [int(word) for word in text.strip("[]\n").split(",")]
