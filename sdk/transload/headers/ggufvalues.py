"""The values of GGUF metadata: stepping over them, counting them and decoding them."""

from __future__ import annotations

import struct

from transload.errors import FormatError
from transload.headers.cursor import Cursor

# struct codes by value type number (gguf.GGUFValueType): UINT8 .. FLOAT32, BOOL, UINT64, INT64, FLOAT64
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_MAX_COUNT = 1 << 24  # elements of one array; the largest vocabularies have 2**18
_MAX_DEPTH = 4  # arrays inside arrays


def skip_value(cursor: Cursor, kind: int, depth: int = 0) -> None:
    """Steps over a value of type number `kind`. Raises FormatError for unknown types and values outside the file."""
    if kind == _STRING:
        cursor.skip_strings(1)
    elif kind == _ARRAY:
        element, count = _array(cursor, depth)
        if element == _STRING:
            cursor.skip_strings(count)
        elif element == _ARRAY:
            for _ in range(count):
                skip_value(cursor, _ARRAY, depth + 1)
        else:
            cursor.advance(count * _width(cursor, element), "an array")
    else:
        cursor.advance(_width(cursor, kind), "a value")


def decode_value(cursor: Cursor, kind: int, depth: int = 0) -> object:
    """The value: int, float, bool, str, or a list of them."""
    if kind == _STRING:
        return cursor.string("a string")
    if kind != _ARRAY:
        return _numbers(cursor, kind, 1)[0]
    element, count = _array(cursor, depth)
    if element == _STRING:
        return [cursor.string("a string") for _ in range(count)]
    if element == _ARRAY:
        return [decode_value(cursor, _ARRAY, depth + 1) for _ in range(count)]
    return list(_numbers(cursor, element, count))


def value_count(cursor: Cursor, kind: int) -> int:
    """The number of elements of an array value."""
    if kind != _ARRAY:
        raise FormatError(f"{cursor.where}: value type {kind} is no array")
    return _array(cursor, 0)[1]


def element_type(cursor: Cursor, kind: int) -> int | None:
    """The type number of an array's elements, None for other values."""
    return _array(cursor, 0)[0] if kind == _ARRAY else None


def _array(cursor: Cursor, depth: int) -> tuple[int, int]:
    """Element type and count of an array, checked against the bytes that are left."""
    if depth >= _MAX_DEPTH:
        raise FormatError(f"{cursor.where}: arrays nested deeper than {_MAX_DEPTH}")
    element, count = cursor.u32("an array's type"), cursor.u64("an array's length")
    least = {_STRING: 8, _ARRAY: 12}.get(element) or _width(cursor, element)
    cursor.room(count, least, "array elements")
    if count > _MAX_COUNT:
        raise FormatError(f"{cursor.where}: an array of {count} elements, the limit is {_MAX_COUNT}")
    return element, count


def _width(cursor: Cursor, kind: int) -> int:
    if kind not in _NUMBERS:
        raise FormatError(f"{cursor.where}: unknown value type {kind}")
    return struct.calcsize("<" + _NUMBERS[kind])


def _numbers(cursor: Cursor, kind: int, count: int) -> tuple[int | float | bool, ...]:
    width = _width(cursor, kind)
    start = cursor.advance(count * width, "a value")
    raw = cursor.data[start : start + count * width]
    if kind == _BOOL and not set(raw) <= {0, 1}:
        raise FormatError(f"{cursor.where}: a boolean is stored as {max(raw)}, expected 0 or 1")
    return struct.unpack(f"<{count}{_NUMBERS[kind]}", raw)
