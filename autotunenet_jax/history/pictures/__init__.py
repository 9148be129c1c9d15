"""Pictures of a run: the whole of it, what the surrogate made of it, and one round close up."""
