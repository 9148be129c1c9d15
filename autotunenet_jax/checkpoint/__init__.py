"""Copies of a training state: durable snapshots in a folder, and copies in memory."""
