"""What exists because of XLA: how small programs are compiled, stored, batched and kept at 32 bits."""
