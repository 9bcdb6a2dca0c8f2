"""The paper's formulas, and its Tables 1 and 2 computed from them.

ZeRO section 5.4 and tables 1 and 2: K = 12 bytes of optimizer state beside 2 of parameter and 2 of gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

GB = 10**9
MIXED = (2, 2, 12)
FULL = (4, 4, 8)
TABLE_1_RANKS = (1, 4, 16, 64, 256, 1024)
TABLE_1_MODELS: Mapping[str, int] = MappingProxyType({"7.5B": 7_500 * 10**6, "128B": 128 * 10**9, "1T": 10**12})
TABLE_2_MEMORY = 32 * GB
TABLE_2_RANKS = 64
TABLE_2_MODEL_PARALLEL = (1, 2, 4, 8, 16)
STAGE_NAMES = ("plain DP", "P_os", "P_os+g", "P_os+g+p")


def state_bytes(parameters: float, ranks: int, stage: int, widths: tuple[int, int, int] = MIXED) -> float:
    """Bytes of model states per rank; ``widths`` are the bytes of parameter, gradient and optimizer per element."""
    parameter, gradient, optimizer = (
        width / (ranks if sharded else 1)
        for width, sharded in zip(widths, (stage >= 3, stage >= 2, stage >= 1), strict=True)
    )
    return parameters * (parameter + gradient + optimizer)


def largest_model(memory_bytes: float, ranks: int, stage: int, model_parallel: int = 1) -> float:
    """Parameters whose model states fill ``memory_bytes`` on each of ``ranks · model_parallel`` devices."""
    return model_parallel * memory_bytes / state_bytes(1, ranks, stage)


def table_1() -> list[tuple[int, dict[str, tuple[float, float, float]]]]:
    """Ranks → model → GB per device at stages 1, 2, 3."""
    return [
        (
            ranks,
            {
                name: (
                    state_bytes(psi, ranks, 1) / GB,
                    state_bytes(psi, ranks, 2) / GB,
                    state_bytes(psi, ranks, 3) / GB,
                )
                for name, psi in TABLE_1_MODELS.items()
            },
        )
        for ranks in TABLE_1_RANKS
    ]


def table_2() -> list[tuple[int, int, tuple[float, float, float, float]]]:
    """Model parallelism, devices, and the largest model (in parameters) at stages 0 to 3 on 32 GB devices."""
    return [
        (
            degree,
            degree * TABLE_2_RANKS,
            (
                largest_model(TABLE_2_MEMORY, TABLE_2_RANKS, 0, degree),
                largest_model(TABLE_2_MEMORY, TABLE_2_RANKS, 1, degree),
                largest_model(TABLE_2_MEMORY, TABLE_2_RANKS, 2, degree),
                largest_model(TABLE_2_MEMORY, TABLE_2_RANKS, 3, degree),
            ),
        )
        for degree in TABLE_2_MODEL_PARALLEL
    ]
