"""How good a trained SAE is: the metrics, the probe, the evaluation."""
