"""The label of a row: the text, number or truth value in one of its fields, as partition.field and eval.task name one.

Both settings read a row's label here, so that what is a label to one is the same label to the other. No message holds
text of a row.
"""

from __future__ import annotations

from math import isnan
from typing import TYPE_CHECKING

from parablock.messages import MAX_LABEL
from workers.sources import DataError, named_fields

if TYPE_CHECKING:
    from workers.sources import Record

LONGEST = MAX_LABEL
"""Characters of a label. What is longer is a text."""

MOST = 1000
"""Different labels in one field. What differs more is an id."""


def label(record: Record, name: str, *, setting: str, where: str) -> str:
    """The label in the record's field `name`: 1 and 1.0 are "1", true is "True"; half a surrogate pair is written out.

    setting: the one that names the field, where: the row; both for a message.
    Raises DataError where the field is missing, blank or NaN, or holds something else than a label.
    """
    field = f"in the field {name!r}, which {setting} names"
    another = f"or name another field, as in --set {setting}=NAME"
    if name not in record:
        raise DataError(
            f"{where} has no field {name!r}, which {setting} names; it has {named_fields([record])}; name one that "
            f"every row has, as in --set {setting}=NAME"
        )
    value = record[name]
    if value is None or (isinstance(value, str) and not value.strip()) or (isinstance(value, float) and isnan(value)):
        raise DataError(f"{where} has nothing {field}; fill it in, delete the row, {another}")
    if not isinstance(value, str | int | float):
        raise DataError(
            f"{where} has a {type(value).__name__} {field}; a label is a text, a number, true or false; convert it, "
            f"{another}"
        )
    text = _text(value)
    if len(text) > LONGEST:
        raise DataError(
            f"{where} has {len(text)} characters {field}; a label has at most {LONGEST}; shorten it, {another}"
        )
    return text


def _text(value: str | float) -> str:
    whole = isinstance(value, float) and value.is_integer()
    return str(int(value) if whole else value).encode(errors="backslashreplace").decode()
