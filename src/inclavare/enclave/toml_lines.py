"""Where a key stands in a TOML text that ``tomllib`` has already accepted."""

from __future__ import annotations

import tomllib

_Path = tuple[str | int, ...]


def line_of(text: str, path: _Path) -> int:
    """Line number, from 1, of the key that ``path`` leads to, or of the nearest table or array around it.

    Args:
        text: valid TOML.
        path: keys, and indices of arrays, from the document's top.
    """
    lines = _Scanner(text).lines
    for length in range(len(path), 0, -1):
        if path[:length] in lines:
            return lines[path[:length]]
    return 1


class _Scanner:
    """Walks over the text's statements; values are skipped by their brackets and quotes."""

    def __init__(self, text: str) -> None:
        self._text = text.replace("\r\n", "\n")
        self._at = 0
        self.lines: dict[_Path, int] = {}
        self._counts: dict[_Path, int] = {}
        table: _Path = ()
        while True:
            self._blank(newlines=True)
            if self._at >= len(self._text):
                return
            if self._text[self._at] == "[":
                array = self._text.startswith("[[", self._at)
                self._at += 2 if array else 1
                line = self._line()
                table = self._resolve(self._key())
                if array:
                    count = self._counts.get(table, 0)
                    self._counts[table] = count + 1
                    self.lines.setdefault(table, line)
                    table = (*table, count)
                for length in range(1, len(table) + 1):
                    self.lines.setdefault(table[:length], line)
                self._at += 2 if array else 1
            else:
                self._pair(table)

    def _line(self) -> int:
        return self._text.count("\n", 0, self._at) + 1

    def _resolve(self, keys: tuple[str, ...]) -> _Path:
        # A header below an array of tables means the array's last table.
        path: _Path = ()
        for at, key in enumerate(keys):
            path = (*path, key)
            if at < len(keys) - 1 and path in self._counts:
                path = (*path, self._counts[path] - 1)
        return path

    def _blank(self, *, newlines: bool) -> None:
        while self._at < len(self._text):
            char = self._text[self._at]
            if char == "#":
                end = self._text.find("\n", self._at)
                self._at = len(self._text) if end < 0 else end
            elif char in " \t" or (newlines and char == "\n"):
                self._at += 1
            else:
                return

    def _key(self) -> tuple[str, ...]:
        keys: list[str] = []
        while True:
            self._blank(newlines=False)
            start = self._at
            if self._text[start] in "\"'":
                self._string()
                [(key, _)] = tomllib.loads(self._text[start : self._at] + " = 0").items()
                keys.append(key)
            else:
                while self._text[self._at].isalnum() or self._text[self._at] in "-_":
                    self._at += 1
                keys.append(self._text[start : self._at])
            self._blank(newlines=False)
            if self._text[self._at] != ".":
                return tuple(keys)
            self._at += 1

    def _pair(self, table: _Path) -> None:
        line = self._line()
        path = table
        for key in self._key():
            path = (*path, key)
            self.lines.setdefault(path, line)
        self._at += 1  # =
        self._blank(newlines=False)
        self._value(path)

    def _value(self, path: _Path) -> None:
        self.lines.setdefault(path, self._line())
        char = self._text[self._at]
        if char in "\"'":
            self._string()
        elif char == "[":
            self._at += 1
            index = 0
            while True:
                self._blank(newlines=True)
                if self._text[self._at] == "]":
                    break
                if self._text[self._at] == ",":
                    self._at += 1
                    continue
                self._value((*path, index))
                index += 1
            self._at += 1
        elif char == "{":
            self._at += 1
            while True:
                self._blank(newlines=True)
                if self._text[self._at] == "}":
                    break
                if self._text[self._at] == ",":
                    self._at += 1
                    continue
                self._pair(path)
            self._at += 1
        else:
            while self._at < len(self._text) and self._text[self._at] not in ",]}#\n":
                self._at += 1

    def _string(self) -> None:
        quote = self._text[self._at]
        if self._text.startswith(quote * 3, self._at):
            self._at += 3
            while not self._text.startswith(quote * 3, self._at):
                self._at += 2 if quote == '"' and self._text[self._at] == "\\" else 1
            self._at += 3
            # Up to two quotes may stand directly before the closing three.
            while self._text.startswith(quote, self._at):
                self._at += 1
            return
        self._at += 1
        while self._text[self._at] != quote:
            self._at += 2 if quote == '"' and self._text[self._at] == "\\" else 1
        self._at += 1
