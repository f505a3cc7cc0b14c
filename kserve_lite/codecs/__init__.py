"""Payload bytes <-> messages. Pure functions: no model, no socket, no clock."""
