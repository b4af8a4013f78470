"""What a run needs of a GPU's memory, from the geometry and the layout alone."""
