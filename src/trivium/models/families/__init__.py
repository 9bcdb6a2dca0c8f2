"""Families of foreign checkpoints as data: what differs in them, and what they call their tensors. Opens no file."""

from __future__ import annotations

from trivium.models.families.decoder import FAMILIES, LLAMA, FamilyMap, Key, family_of

__all__ = ["FAMILIES", "LLAMA", "FamilyMap", "Key", "family_of"]
