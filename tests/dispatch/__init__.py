"""Tests of what every protocol goes through."""
