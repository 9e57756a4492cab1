"""What people do with named latents: search with edits, and audit a classifier."""
