"""Build, measure, publish and promote the student as a model version."""

# First: it sets the environment variables that MLflow reads when it is imported, and the modules of this room import
# it.
import dho.tracking  # noqa: F401

CANDIDATE, CHAMPION = "candidate", "champion"
"""Aliases: the newest version that was registered, and the one that downstream teams load."""
