"""Where bytes meet sockets: asyncio protocols, and one request's life."""
