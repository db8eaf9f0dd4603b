"""The structure of a JPEG file, without its pixels: which size it states, and whether it is an ordinary one."""

import re
from collections.abc import Iterator

MAX_AREA = 1 << 25  # pixels of the largest image that counts as ordinary
_START, _END = b"\xff\xd8", b"\xff\xd9"
_SEQUENTIAL, _PROGRESSIVE = (0xC0, 0xC1), 0xC2
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_SCAN, _ADOBE = 0xDA, 0xEE
_ORDINARY = frozenset([*_SEQUENTIAL, _PROGRESSIVE, 0xC4, _SCAN, 0xDB, 0xDD, *range(0xE0, 0xF0), 0xFE])
"""Markers of frames (Huffman-coded only), Huffman tables, scans, quantisation tables, restart intervals, applications
and comments."""
_AFTER_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7]")
"""The first marker after entropy-coded data, which may hold stuffed bytes and restart markers."""


def jpeg_size(data: bytes | memoryview) -> tuple[int, int] | None:
    """Width and height by a JPEG's frame header; None: there is none, or not one of 8 bits and 1 or 3 components."""
    for _, marker, body, _ in _segments(data):
        if marker in _FRAMES and len(body) >= 6:
            is_known = body[0] == 8 and body[5] in (1, 3)
            return (int.from_bytes(body[3:5]), int.from_bytes(body[1:3])) if is_known else None
        if marker == _SCAN:
            break
    return None


def jpeg_area(data: bytes) -> int:
    """Pixels of an ordinary JPEG that is whole as far as its structure shows; 0 for anything else.

    Ordinary: 8 bits; grey, or Y, Cb and Cr; every marker from the first to the end of the image is one that belongs
    there. With what this leaves out, DALI is more forgiving than Pillow, or reads it in another way.
    """
    area, frame, num_scans, marker, place = 0, 0, 0, 0, len(_START)
    for begin, marker, body, end in _segments(data):
        if begin != place or marker not in _ORDINARY:
            return 0
        place = end
        if marker in _SEQUENTIAL or marker == _PROGRESSIVE:
            has_jfif_parts = len(body) >= 6 and len(body) == 6 + 3 * body[5] and body[6::3] in (b"\1", b"\1\2\3")
            if frame or not has_jfif_parts or body[0] != 8:
                return 0
            frame, area = marker, int.from_bytes(body[1:3]) * int.from_bytes(body[3:5])
        elif marker == _ADOBE and body.startswith(b"Adobe") and body[11:12] != b"\x01":
            return 0  # not Y, Cb and Cr
        elif marker == _SCAN:
            is_second = num_scans > 0 and frame != _PROGRESSIVE
            if not frame or is_second or not body or len(body) != 4 + 2 * body[0]:
                return 0
            num_scans += 1
    is_whole = marker == _SCAN and data[place : place + 2] == _END
    return area if is_whole and area <= MAX_AREA else 0


def _segments(data: bytes | memoryview) -> Iterator[tuple[int, int, bytes, int]]:
    """(begin, marker, body, end) of each segment, as far as they are whole; a scan ends behind its coded data."""
    place = len(_START) if data[: len(_START)] == _START else len(data)
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker, length = data[place + 1], int.from_bytes(data[place + 2 : place + 4])
        if marker == 0xFF:  # fill bytes before a marker
            place += 1
            continue
        end = place + 2 + length
        if length < 2 or end > len(data) or marker == _END[1]:
            return
        body = bytes(data[place + 4 : end])
        if marker == _SCAN:
            found = _AFTER_SCAN.search(data, end)
            if found is None:
                return
            end = found.start()
        yield place, marker, body, end
        place = end
