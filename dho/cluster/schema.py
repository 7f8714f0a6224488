"""The schema of a kind of job, as strict as the API server with `--validate=strict`: an unknown field is an error.

A kind's schema is the `openAPIV3Schema` of its operator's CustomResourceDefinition without the descriptions, as gzipped
JSON; `schema_of_crd` makes it. That of PyTorchJob is from manifests/base/crds/kubeflow.org_pytorchjobs.yaml of
Kubeflow's training operator (Apache-2.0) in the version that the file's name says; tests/cluster/machine compares it
with the operator's own file.
"""

from __future__ import annotations

import difflib
import functools
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

_TYPES = {
    "string": "text in quotes",
    "integer": "a whole number",
    "boolean": "true or false",
    "object": "a mapping",
    "array": "a list",
}


def schema_problems(job: dict[str, Any], schema: Path) -> Iterator[str]:
    """Yield one line for each place of a job that its schema does not allow.

    Args:
        job: the document.
        schema: gzipped JSON file, as in `dho.cluster.job.JobKind.schema`.
    """
    errors = _validator(schema).iter_errors(job)
    for error in sorted(errors, key=lambda error: [str(key) for key in error.absolute_path]):
        where = dotted(error.absolute_path)
        if error.validator == "additionalProperties":
            known = list(error.schema.get("properties", {}))
            for name in sorted(set(error.instance) - set(known)):
                close = difflib.get_close_matches(name, known, 1)
                meant = f"; did you mean {close[0]}?" if close else f"; known here: {', '.join(known)[:200]}"
                yield f"{where + '.' if where else ''}{name} is an unknown field{meant}"
        elif error.validator == "type":
            expected = _TYPES.get(error.validator_value, error.validator_value)
            yield f"{where} is {json.dumps(error.instance)[:80]}; expected {expected}"
        elif error.validator == "required":
            missing = [name for name in error.validator_value if name not in error.instance]
            yield f"{where} has no {missing[0]}"
        else:
            yield f"{where}: {' '.join(error.message.split())[:200]}"


def dotted(path: Any) -> str:
    """`spec.containers[0].name`"""
    text = ""
    for key in path:
        text += f"[{key}]" if isinstance(key, int) else f".{key}" if text else str(key)
    return text


def schema_of_crd(crd: dict[str, Any]) -> dict[str, Any]:
    """The schema of a CustomResourceDefinition's one version, without descriptions."""
    (version,) = crd["spec"]["versions"]
    schema: dict[str, Any] = _without_descriptions(version["schema"]["openAPIV3Schema"])
    return schema


def _without_descriptions(node: Any) -> Any:
    if isinstance(node, dict):
        return {
            key: _without_descriptions(value)
            for key, value in node.items()
            if not (key == "description" and isinstance(value, str))
        }
    return [_without_descriptions(value) for value in node] if isinstance(node, list) else node


@functools.cache
def _validator(schema: Path) -> Draft202012Validator:
    return Draft202012Validator(_strict(json.loads(gzip.decompress(schema.read_bytes()))))


def _strict(node: Any) -> Any:
    """Forbid other properties where the CRD lists some; it lists none of the job's metadata, the API server's own."""
    if isinstance(node, dict):
        strict = {key: _strict(value) for key, value in node.items()}
        if (
            isinstance(strict.get("properties"), dict)
            and strict.get("type") == "object"
            and not strict.get("x-kubernetes-preserve-unknown-fields")
        ):
            strict.setdefault("additionalProperties", False)
        return strict
    return [_strict(value) for value in node] if isinstance(node, list) else node
