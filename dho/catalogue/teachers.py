"""Classifiers of the teacher, by the name that `teacher.classifier` gives: how an embedding becomes logits."""

from __future__ import annotations

from dho.catalogue import Row

CLASSIFIERS = {
    "zero_shot": Row("dho.teacher.classifier:ZeroShot", "cosine similarity with the text weights"),
}
"""Each is a subclass of `dho.teacher.classifier.Classifier`."""


def list_classifiers() -> dict[str, str]:
    """Return the classifiers by name, each with what it is."""
    return {name: row.doc for name, row in CLASSIFIERS.items()}
