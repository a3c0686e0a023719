"""One hash for anything a policy may yield: equal content, equal digest, on every machine and in every process."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from enum import Enum
from typing import Any

import numpy as np


def digest(value: object) -> str:
    """SHA-256 over a canonical walk of dataclasses, mappings, sequences, sets, numbers, texts and arrays.

    A field of a dataclass at its default counts for nothing: a field that a later version adds leaves the
    digests of what does without it as they were, so that journals of before can be resumed. Raises TypeError for
    anything else.
    """
    hasher = hashlib.sha256()
    _feed(hasher, value)
    return hasher.hexdigest()


def _feed(hasher: Any, value: object) -> None:
    if value is None or isinstance(value, bool):
        hasher.update(f"c{value};".encode())
    elif isinstance(value, Enum):
        _feed(hasher, value.value)
    elif isinstance(value, str):
        raw = value.encode()
        hasher.update(f"s{len(raw)};".encode() + raw)
    elif isinstance(value, int | np.integer):
        hasher.update(f"i{int(value)};".encode())
    elif isinstance(value, float | np.floating):
        hasher.update(f"f{float(value).hex()};".encode())
    elif isinstance(value, np.ndarray):
        _feed_array(hasher, value)
    elif is_dataclass(value) and not isinstance(value, type):
        _feed(hasher, type(value).__name__)
        for field in fields(value):
            held = getattr(value, field.name)
            if not _is_default(field, held):
                _feed(hasher, field.name)
                _feed(hasher, held)
        hasher.update(b".")
    elif isinstance(value, Mapping):
        hasher.update(f"m{len(value)};".encode())
        for key in sorted(value, key=str):
            _feed(hasher, str(key))
            _feed(hasher, value[key])
    elif isinstance(value, frozenset | set):
        _feed(hasher, sorted(str(item) for item in value))
    elif isinstance(value, Sequence):
        hasher.update(f"l{len(value)};".encode())
        for item in value:
            _feed(hasher, item)
    else:
        raise TypeError(f"{type(value).__name__} is not plain data")


def _is_default(field: Field[Any], held: object) -> bool:
    default = field.default if field.default_factory is MISSING else field.default_factory()
    return type(held) is type(default) and not isinstance(held, np.ndarray) and bool(held == default)


def _feed_array(hasher: Any, array: np.ndarray[Any, Any]) -> None:
    if array.dtype.kind not in "biuf":
        raise TypeError(f"an array of {array.dtype} is not plain data")
    plain = array.astype("<f8" if array.dtype.kind == "f" else "<i8")
    hasher.update(f"a{plain.dtype.str}{array.shape};".encode())
    hasher.update(np.ascontiguousarray(plain).tobytes())
