"""What people look at: the explorer, the report, the model card."""
