"""Families of foreign checkpoints as data: what differs in them, and what they call their tensors. Opens no file."""

from __future__ import annotations

from trivium.models.families.decoder import FAMILIES, LLAMA, FamilyMap, Key, family_of
from trivium.models.families.family import Family, Part, canonical_names
from trivium.models.families.known import KNOWN, known_family
from trivium.models.families.settings import Settings

__all__ = [
    "FAMILIES",
    "KNOWN",
    "LLAMA",
    "Family",
    "FamilyMap",
    "Key",
    "Part",
    "Settings",
    "canonical_names",
    "family_of",
    "known_family",
]
