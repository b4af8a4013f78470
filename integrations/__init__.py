"""Where programs of others meet this one: each package needs that program, and only what it needs of the bridge."""
