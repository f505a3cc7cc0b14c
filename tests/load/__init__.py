"""Under load: what is refused, what is given up, and that nothing else suffers."""
