"""The process: settings, sockets, a server's life, signals."""
