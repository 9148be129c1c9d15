"""AutoTuneNet for PyTorch: the same controller, driven by a PyTorch training loop."""
