"""The student as a model version: built, measured, published, promoted."""
