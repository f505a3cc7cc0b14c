"""Replicas on Ray Serve, with a real Ray: `pytest -m ray` runs these alone."""
