"""Where other projects meet this one: each package needs that project installed, and nothing else here needs them."""
