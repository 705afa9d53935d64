"""What the tests of data share."""

import pytest
from texts import prose, write_documents

from engram_jax.config import DataConfig


@pytest.fixture
def settings(tmp_path):
    """Small settings; the text is 60 documents in a folder."""
    texts = [prose(seed, 40 + seed % 7) for seed in range(60)]
    return DataConfig(path=write_documents(tmp_path / "text", texts), tokenizer="bpe:280",
                      sequence_length=16, batch_size=4, validation_fraction=0.1,
                      cache_dir=str(tmp_path / "cache"))
