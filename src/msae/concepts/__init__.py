"""Latents get names, strongest samples, a hierarchy, a stability."""
