"""Low-rank adapters: what they are, which weights they hit, and their folders."""
