"""The one door that every protocol goes through.

Knows models and messages, not HTTP or gRPC.
"""
