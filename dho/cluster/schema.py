"""The schema of PyTorchJob, as strict as the API server with `--validate=strict`: a field that it does not know is an error.

`SCHEMA` is the `openAPIV3Schema` of manifests/base/crds/kubeflow.org_pytorchjobs.yaml of Kubeflow's training operator (Apache-2.0) in the
version that the name says, without its descriptions; `schema_of_crd` makes it, and tests/cluster/machine compares it with the
operator's own file.
"""

from __future__ import annotations

import difflib
import functools
import gzip
import json
from collections.abc import Iterator
from importlib import resources
from typing import Any

from jsonschema import Draft202012Validator

SCHEMA = "pytorchjob-v1.9.4.json.gz"
_TYPES = {
    "string": "text in quotes",
    "integer": "a whole number",
    "boolean": "true or false",
    "object": "a mapping",
    "array": "a list",
}


def schema_problems(job: dict[str, Any]) -> Iterator[str]:
    """One line for each place of a PyTorchJob that the operator's CRD does not allow."""
    for error in sorted(_validator().iter_errors(job), key=lambda error: [str(part) for part in error.absolute_path]):
        where = dotted(error.absolute_path)
        if error.validator == "additionalProperties":
            known = list(error.schema.get("properties", {}))
            for name in sorted(set(error.instance) - set(known)):
                close = difflib.get_close_matches(name, known, 1)
                meant = f"; did you mean {close[0]}?" if close else f"; known here: {', '.join(known)[:200]}"
                yield f"{where + '.' if where else ''}{name} is an unknown field{meant}"
        elif error.validator == "type":
            yield f"{where} is {json.dumps(error.instance)[:80]}; expected {_TYPES.get(error.validator_value, error.validator_value)}"
        elif error.validator == "required":
            missing = [name for name in error.validator_value if name not in error.instance]
            yield f"{where} has no {missing[0]}"
        else:
            yield f"{where}: {' '.join(error.message.split())[:200]}"


def dotted(path: Any) -> str:
    """`spec.containers[0].name`"""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
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
def _validator() -> Draft202012Validator:
    packed = (resources.files("dho.cluster") / SCHEMA).read_bytes()
    return Draft202012Validator(_strict(json.loads(gzip.decompress(packed))))


def _strict(node: Any) -> Any:
    """Objects whose properties the CRD lists may have no others. Only metadata of the job itself is the API server's own."""
    if isinstance(node, dict):
        made = {key: _strict(value) for key, value in node.items()}
        if (
            isinstance(made.get("properties"), dict)
            and made.get("type") == "object"
            and not made.get("x-kubernetes-preserve-unknown-fields")
        ):
            made.setdefault("additionalProperties", False)
        return made
    return [_strict(value) for value in node] if isinstance(node, list) else node
