"""Third-party clients, as people use them, against a real server's one port."""
