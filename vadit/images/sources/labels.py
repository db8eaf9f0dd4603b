"""Files that give images their labels: a line of a name and a label each, in whichever way tables are written."""

import csv
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from vadit.runtime.errors import UsageError, write_fault
from vadit.runtime.reading import read_file

MAX_CLASSES = 1_000_000
"""Largest label + 1 where classes have no names: a damaged label shall not make a list of billions."""
GIVE_LABELS = "--labels-file (of vadit encode and prepare; vadit train: --data.labels-file)"
_LABEL_COLUMNS = {
    *("label", "labels", "labelid", "lbl", "class", "classid", "classname", "classindex", "target", "targets", "y"),
    *("category", "categoryid", "categoryname", "species", "breed", "synset", "wnid", "groundtruth", "gt"),
}
_HEADER = _LABEL_COLUMNS | {
    *("name", "file", "files", "filename", "fname", "path", "filepath", "image", "images", "imageid", "imagename"),
    *("imagepath", "imagefile", "img", "imgname", "imgpath", "id", "key", "photo", "picture"),
}
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)
_COMMENTED = re.compile(r"([+-]?[\d.]+)\s*#.*|(.*?)\s+#\s.*")
_SAMPLE = 200  # lines by which the separator is found

Row = tuple[int, list[str]]  # a line's number, from 1, and its columns


class LabelsFile:
    """The names of a labels file, in its order, their lines and labels, and the classes.

    Columns are parted by tabs, semicolons, commas or spaces, whichever part the names of images from the rest. A first
    line without an image's name is a header; of more than two columns it says which are meant. Lines that begin with #
    are comments, as is " # ..." after a label. Labels that are numbers stay as they are (3.0 is 3), names are numbered
    in sorted order.
    is_image(name): whether an image of this name is there or could be.
    """

    def __init__(self, path: Path, is_image: Callable[[str], bool]) -> None:
        self._path, self._is_image = path, is_image
        try:
            text = read_file(path).decode("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise self.refusal(f"cannot be read ({write_fault(error)})") from None
        numbered = enumerate(re.split("\r\n?|\n", text), start=1)
        lines = [(number, line) for number, line in numbered if line.strip() and not self._is_comment(line.strip())]
        self.lines: dict[str, int] = {}  # name of each image -> number of its line
        words: list[str] = []
        for number, name, word in self._pairs(lines):
            if (first := self.lines.setdefault(name, number)) != number:
                raise self.refusal(f"names {name} twice (lines {first} and {number})")
            words.append(word)
        if not words:
            raise self.refusal("names no images")
        self.classes, self.labels = self._numbered(words)

    def refusal(self, problem: str) -> UsageError:
        return UsageError(f"data.labels_file {self._path} {problem}; correct it, or set another {GIVE_LABELS}")

    def _fail(self, number: int, problem: str) -> NoReturn:
        raise self.refusal(f"is wrong in line {number}: {problem}")

    def _is_comment(self, line: str) -> bool:
        return line.startswith("#") and not self._is_image(re.split(r"[\s;,]", line)[0])

    def _pairs(self, lines: list[tuple[int, str]]) -> Iterator[tuple[int, str, str]]:
        rows, name = self._rows(lines)
        label, header = 1 - name, []
        words = [re.sub(r"[\s_-]", "", column.lower()) for column in rows[0][1]] if rows else []
        if name < len(words) and not self._is_image(rows[0][1][name]) and not _HEADER.isdisjoint(words):
            header = rows.pop(0)[1]
        if len(header) > 2:
            found = [at for at, word in enumerate(words) if word in _LABEL_COLUMNS and at != name]
            if len(found) != 1:
                raise self.refusal(f"has the columns {', '.join(header)}; call the one of the labels, alone, label")
            label = found[0]
        for number, columns in rows:
            if len(columns) != max(len(header), 2):
                wanted = f"of the {len(header)} columns of the header" if header else "NAME LABEL or NAME,LABEL"
                hint = "; above more columns, a header must say which is the label" if len(columns) > 2 else ""
                self._fail(number, f"{' '.join(columns)[:80]!r} is not {wanted}{hint}")
            if not columns[label]:
                self._fail(number, "the label is empty")
            if not self._is_image(columns[name]):
                self._fail(number, f"{columns[name][:80]!r} is neither an image nor a header (name,label)")
            commented = _COMMENTED.fullmatch(columns[label])
            word = commented[1] or commented[2] if commented else columns[label]
            yield number, os.path.normpath(columns[name]), word

    def _rows(self, lines: list[tuple[int, str]]) -> tuple[list[Row], int]:
        """The lines in columns, and which of these has the names: by the first lines, whose images must stay whole."""

        def fit(separator: str) -> tuple[int, int]:
            """How many of the first lines have an image's name in one column, and less which column."""
            parted = _parted(lines[:_SAMPLE], separator, self._is_image)
            places = [list(map(self._is_image, columns)) for _, columns in parted if len(columns) > 1]
            counts = Counter(place.index(True) for place in places if True in place)
            return max(((count, -at) for at, count in counts.items()), default=(0, 0))

        found = {separator: fit(separator) for separator in "\t;, "}
        best = max(found, key=lambda separator: found[separator][0])  # the first one of several
        if sum(found[each][0] == found[best][0] > 0 for each in "\t;,") > 1:
            raise self.refusal("can be read in columns in several ways; put one tab between the name and the label")
        if not found[best][0]:
            best = next((each for each in "\t;," if each in lines[0][1]), " ") if lines else " "
        return list(_parted(lines, best, self._is_image)), -found[best][1]

    def _numbered(self, words: list[str]) -> tuple[list[str], list[int]]:
        classes = sorted(set(words))
        numeric = set(filter(_NUMBER.fullmatch, classes))
        if not numeric:
            rank = {word: label for label, word in enumerate(classes)}
            return classes, [rank[word] for word in words]
        for number, word in zip(self.lines.values(), words, strict=True):
            shown = f"{word[:40]!r}"
            if word not in numeric:
                first = next(each for each in words if each in numeric)
                self._fail(number, f"the label {shown} is a name, and {first!r} is a number; give all of one kind")
            if not (float(word).is_integer() and 0 <= float(word) < MAX_CLASSES):
                self._fail(number, f"the label is {shown}; numbers are whole ones from 0 to {MAX_CLASSES - 1}")
        labels = [int(float(word)) for word in words]
        return [str(label) for label in range(max(labels) + 1)], labels


def _parted(lines: list[tuple[int, str]], separator: str, is_image: Callable[[str], bool]) -> Iterator[Row]:
    """Lines in columns; a name that is parted from its label by a space may hold others."""
    for number, line in lines:
        columns = line.strip().rsplit(None, 1)
        if separator != " " or '"' in line:
            try:
                columns = next(csv.reader([line.strip(" ")], delimiter=separator, skipinitialspace=True, strict=True))
            except csv.Error:
                columns = [line]
        elif " " in columns[0] and is_image(line.split()[0]) and not is_image(columns[0]):
            columns = line.split()
        yield number, columns if separator == " " else [column.strip() for column in columns]
