"""Ranks of a cluster that is not there: a step of the real schedule on fake tensors, counted, and told in seconds."""
