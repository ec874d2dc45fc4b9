"""Policies of other systems, and simple ones, to compare with: each follows what its source says."""
