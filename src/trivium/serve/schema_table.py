"""The endpoints' fields as a table for people, from the very tables that requests are read by."""

from __future__ import annotations

from trivium.serve import schema
from trivium.serve.fields import Field
from trivium.serve.limits import Limits


def table(limits: Limits | None = None) -> str:
    """Markdown: endpoint by endpoint, each field, whether it is honoured or refused, and what there is to know."""
    limits = limits or Limits()
    endpoints = (
        ("/v1/chat/completions", schema.chat_fields(limits)),
        ("/v1/completions", schema.completion_fields(limits)),
        ("/v1/embeddings", schema.embedding_fields(limits)),
        ("/tokenize", schema.tokenize_fields(limits)),
        ("/detokenize", schema.detokenize_fields(limits)),
    )
    return "\n\n".join(f"### `{path}`\n\n{_rows(fields)}" for path, fields in endpoints)


def _rows(fields: tuple[Field, ...]) -> str:
    lines = ["| field | | |", "|---|---|---|"]
    for field in sorted(fields, key=lambda one: not one.honoured):
        told = "honoured" if field.honoured else "refused"
        about = "required" if field.required else ""
        about = "; ".join(part for part in (about, field.about) if part)
        lines.append(f"| `{field.name}` | {told} | {about} |")
    return "\n".join(lines)
