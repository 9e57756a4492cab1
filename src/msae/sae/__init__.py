"""Rows become a trained sparse autoencoder in a run folder."""
