"""Replicas of a model on Ray Serve, behind the same server. See `replicated.py`."""
