"""The student: one backbone, two heads."""
