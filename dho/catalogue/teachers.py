"""Classifiers of the teacher, by the name that `teacher.classifier` gives: how an embedding becomes logits."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ClassifierRow:
    """One classifier."""

    implementation: str
    """A subclass of `dho.teacher.classifier.Classifier`, as "module:Class"."""
    doc: str


CLASSIFIERS = {
    "zero_shot": ClassifierRow("dho.teacher.classifier:ZeroShot", "cosine similarity with the text weights"),
}


def list_classifiers() -> dict[str, str]:
    """Return the classifiers by name, each with what it is."""
    return {name: row.doc for name, row in CLASSIFIERS.items()}
