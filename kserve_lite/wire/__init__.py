"""HTTP bytes <-> events: no await, no clock, no socket, nothing of models."""
