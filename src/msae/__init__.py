"""Matryoshka sparse autoencoders for CLIP and SigLIP embeddings."""

__version__ = "0.1.0"
