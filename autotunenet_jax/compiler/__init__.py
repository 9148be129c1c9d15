"""What exists because of XLA: how small programs are compiled, batched and kept at 32 bits."""
