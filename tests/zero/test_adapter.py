"""An adapter trained on a sharded base is exported in PEFT's own files and reloaded onto the bare base."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.worlds import Worlds


@pytest.mark.parametrize("stage", [1, 3])
def test_an_adapter_on_a_sharded_base_in_pefts_own_files(world: Worlds, tmp_path: Path, stage: int) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    assert world(2).run("tests.zero.adapter_cases", "exported", str(tmp_path), stage) == [[], []]
