"""Bytes: what is held, where, and what is fetched ahead."""
