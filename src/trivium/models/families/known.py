"""All families whose checkpoints can be computed, and which of them a ``config.json`` belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trivium.base.errors import ConfigError
from trivium.models.families.bloom import BLOOM
from trivium.models.families.cohere import COHERE
from trivium.models.families.deepseek_v3 import DEEPSEEK_V3
from trivium.models.families.falcon import FALCON
from trivium.models.families.family import Family
from trivium.models.families.gemma import GEMMA2, GEMMA3
from trivium.models.families.gpt2 import GPT2
from trivium.models.families.gpt_neox import GPT_NEOX
from trivium.models.families.gpt_oss import GPT_OSS
from trivium.models.families.gptj import GPTJ
from trivium.models.families.llama import LLAMA_FAMILY
from trivium.models.families.mistral import MISTRAL
from trivium.models.families.mixtral import MIXTRAL
from trivium.models.families.olmo import OLMO2, OLMOE
from trivium.models.families.opt import OPT
from trivium.models.families.phi3 import PHI3
from trivium.models.families.qwen import QWEN2, QWEN2_MOE, QWEN3, QWEN3_MOE
from trivium.models.families.trivium import TRIVIUM

KNOWN: tuple[Family, ...] = (
    BLOOM,
    COHERE,
    DEEPSEEK_V3,
    FALCON,
    GEMMA2,
    GEMMA3,
    GPT2,
    GPT_NEOX,
    GPT_OSS,
    GPTJ,
    LLAMA_FAMILY,
    MISTRAL,
    MIXTRAL,
    OLMO2,
    OLMOE,
    OPT,
    PHI3,
    QWEN2,
    QWEN2_MOE,
    QWEN3,
    QWEN3_MOE,
    TRIVIUM,
)


def known_family(config: Mapping[str, Any]) -> Family:
    """The family a ``config.json`` belongs to, by ``model_type``; ``auto_map`` is never looked at.

    Raises ConfigError, listing the families, for one that is none of them, or for a model of another kind than the
    family's causal language model.
    """
    model_type = config.get("model_type")
    for family in KNOWN:
        if family.name != model_type:
            continue
        kinds = config.get("architectures")
        bare = family.bare or family.architectures[0].removesuffix("ForCausalLM").removesuffix("LMHeadModel") + "Model"
        if isinstance(kinds, list) and kinds and not {bare, *family.architectures} & set(map(str, kinds)):
            raise ConfigError(
                f"architectures={kinds!r}: of {family.name} Trivium computes {', '.join(family.architectures)}"
            )
        return family
    names = ", ".join(family.name for family in KNOWN)
    raise ConfigError(f"model_type={str(model_type)[:100]!r}: Trivium computes {names}")
