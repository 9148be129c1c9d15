"""Short runs whose every decision is on record: what must not change when code only moves."""
