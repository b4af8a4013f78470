"""Plug-ins that run in programs of others: each imports only what it needs of the bridge."""
