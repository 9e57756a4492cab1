"""Pictures and captions become rows of embeddings on disk."""
