"""Text in, batches out. Read: config, sources, split, tokenizer (with chat), corpus, pack, loader, baseline.

``prepare`` ties them together; nothing here communicates.
"""

from __future__ import annotations

from trivium.train.data.baseline import Baseline, baseline
from trivium.train.data.config import DataConfig
from trivium.train.data.corpus import Corpus
from trivium.train.data.loader import Batch, Loader, validation_batches
from trivium.train.data.pack import IGNORE
from trivium.train.data.prepare import Data, prepare
from trivium.train.data.sources import Message, Sources, find
from trivium.train.data.tokenizer import Tokenizer

__all__ = [
    "IGNORE",
    "Baseline",
    "Batch",
    "Corpus",
    "Data",
    "DataConfig",
    "Loader",
    "Message",
    "Sources",
    "Tokenizer",
    "baseline",
    "find",
    "prepare",
    "validation_batches",
]
