"""Operations on one device: each a torch reference with a native version beside it, and the registry that picks one."""

from __future__ import annotations
