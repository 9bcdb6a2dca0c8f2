"""What a checkpoint's own settings are compared with when a run goes on from it."""

from __future__ import annotations

from typing import Any

from trivium.base import config as configs
from trivium.models import DecoderConfig
from trivium.models.moe_config import MoEConfig
from trivium.train.saving import completed


def test_a_setting_younger_than_the_checkpoint_counts_as_its_default() -> None:
    config = DecoderConfig(vocabulary=16, dim=32, layers=2, heads=2, ffn_dim=48, moe=MoEConfig(experts=4))
    now: dict[str, Any] = configs.to_dict(config)
    older = {key: value for key, value in now.items() if key != "rope_theta"}
    older["moe"] = {key: value for key, value in now["moe"].items() if key != "exchange"}
    assert configs.diff(older, now)
    assert not configs.diff(completed(DecoderConfig, older), now)
    assert set(configs.diff(completed(DecoderConfig, {**older, "dim": 64}), now)) == {"dim"}


def test_a_setting_that_is_not_known_any_more_is_told() -> None:
    now = configs.to_dict(DecoderConfig(vocabulary=16, dim=32, layers=2, heads=2, ffn_dim=48))
    assert "gone" in configs.diff(completed(DecoderConfig, {**now, "gone": 1}), now)
