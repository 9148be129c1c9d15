"""What may be tuned: parameters and their encoding into the unit cube, and where an optax state keeps their values."""
