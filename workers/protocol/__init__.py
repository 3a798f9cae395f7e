"""What routers and workers agree on: messages, frames, block hashes, Redis keys. The only room the router imports."""
