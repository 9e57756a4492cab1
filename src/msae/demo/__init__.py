"""The embedded default: a small world of scenes, and a small CLIP that has seen it."""
