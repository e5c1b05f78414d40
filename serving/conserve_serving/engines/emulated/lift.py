"""What the user's words offer as arguments: quoted strings, paths, numbers, words after "for" …

A ``Lifter`` hands out candidates for one answer and remembers which it gave away, so that two
arguments of one call do not get the same number.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Final

_QUOTED: Final = re.compile(
    "\"([^\"\n]{1,400})\"|(?<!\\w)'([^'\n]{1,400})'(?!\\w)|`([^`\n]{1,400})`"
    "|“([^”\n]{1,400})”|‘([^’\n]{1,400})’|«([^»\n]{1,400})»|「([^」\n]{1,400})」"
)
_NUMBER: Final = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?!\w)")
_URL: Final = re.compile(r"https?://[^\s\"'<>)\]}]+")
_EMAIL: Final = re.compile(r"[\w.+-]+@[\w-]+\.[\w.-]+\b")
_DATE: Final = re.compile(r"\b\d{4}-\d{2}-\d{2}\b")
_PATHISH: Final = re.compile(r"(?:~|\.{1,2})?/?[\w.@+-]+(?:/[\w.@+-]+)*/?")
_WITH_EXTENSION: Final = re.compile(r"[\w@+-]+(?:\.[\w@+-]+)*\.[A-Za-z][A-Za-z0-9]{0,5}|\.[a-z]\w+")
_SEARCH_HIT: Final = re.compile(r"^([^\s:]+):\d+:", re.MULTILINE)
_NOT_PATHS: Final = frozenset({"e.g", "i.e", "etc", "and/or", "either/or", "w/o", "n/a", "..."})
_WORD: Final = re.compile(r"[^\W_]+")
_CAMEL: Final = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_PHRASE_END: Final = (
    r"(?=\s*[?!;,:()\n]|\.(?:\s|$)|\s+(?:and|using|with|from|please|then|that|which|who|for|in|on|"
    r"at|to|by|as)\b|$)"
)
#: The same for places, which may hold a comma: "San Francisco, CA".
_PLACE_END: Final = (
    r"(?=\s*[?!;:()\n]|\.(?:\s|$)|\s+(?:and|using|with|from|please|then|today|tomorrow|now|for|in|"
    r"on|at|right)\b|$)"
)
#: Words that say nothing about the topic.
_COMMON: Final = """
    a about above after again all also am an and any are as at be because been before being below
    between both but by call can could did do does doing don down during each file few find for from
    function further get give had has have having he her here hers him his how i if in into is it
    its just know let look made make many may me might more most my no nor not now of off on once
    only or other our out over own please put result return same say search see she should show so
    some such tell than that the their them then there these they thing this those through to too
    tool under until up us use using value very was we were what when where which while who whom why
    will with would you your
"""
_STOP_WORDS: Final = frozenset(_COMMON.split())

#: Longer texts are looked at only at both ends: a prompt may hold a whole repository.
_MOST_CHARS: Final = 8000
_EDGE_CHARS: Final = 4000

#: Words of an argument's name, and how its value is best found.
_PATH_NAMES: Final = frozenset(
    {"path", "file", "filename", "filepath", "dir", "directory", "folder"}
)
_FOLDER_NAMES: Final = frozenset({"dir", "directory", "folder", "root"})
_PLACE_NAMES: Final = frozenset(
    {"location", "city", "place", "country", "region", "where", "address"}
)
_URL_NAMES: Final = frozenset({"url", "uri", "link"})
_EMAIL_NAMES: Final = frozenset({"email", "mail"})
_DATE_NAMES: Final = frozenset({"date", "day"})
_QUERY_NAMES: Final = frozenset(
    {"query", "pattern", "keyword", "keywords", "term", "regex", "search"}
)
_QUESTION_NAMES: Final = frozenset(
    {"question", "prompt", "message", "task", "instruction", "request"}
)
#: What stands in where the words hold nothing of the kind: reserved names, never a real address.
_EXAMPLES: Final = (
    (_URL_NAMES, "https://example.com/"),
    (_EMAIL_NAMES, "someone@example.com"),
    (_DATE_NAMES, "2026-01-01"),
)


def words_of(text: str) -> list[str]:
    """The words of a text or of an identifier, lower case, in order."""
    return [word.lower() for word in _WORD.findall(_CAMEL.sub(" ", text))]


def stem(word: str) -> str:
    """A word without its commonest English endings: ``listing`` and ``lists`` are one."""
    if word.endswith("s") and not word.endswith("ss"):
        word = word[:-1]
    for ending in ("ing", "ed", "e"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word[: -len(ending)]
    return word


def stems_of(text: str) -> set[str]:
    """Stems of a text's words, stop words left out."""
    return {stem(word) for word in words_of(text) if word not in _STOP_WORDS and len(word) > 1}


_LINE_NUMBER = re.compile(r":\d+:")


def is_path(token: str) -> bool:
    """Whether a word looks like the path of a file or folder."""
    if token.lower().rstrip(".") in _NOT_PATHS or "://" in token or "@" in token:
        return False
    if "/" in token.strip("/"):
        return True
    return _WITH_EXTENSION.fullmatch(token) is not None or token.startswith(("./", "../", "~/"))


def paths_in(text: str) -> list[str]:
    """Paths named in a text, each once: those a search gives with a line number first, then those
    with an extension, then the rest; otherwise in order."""
    text = _URL.sub(" ", text)
    found: dict[str, int] = {}
    for match in _PATHISH.finditer(text):
        token = match.group().rstrip(".")
        if not is_path(token):
            continue
        if _LINE_NUMBER.match(text, match.end()):
            sort = 0
        else:
            sort = 1 if _WITH_EXTENSION.fullmatch(token.rpartition("/")[2]) else 2
        found[token] = min(sort, found.get(token, sort))
    return sorted(found, key=lambda token: found[token])


def _shorten(text: str) -> str:
    """The beginning and the end of a long text: that is where people ask."""
    return text if len(text) <= _MOST_CHARS else f"{text[:_EDGE_CHARS]}\n{text[-_EDGE_CHARS:]}"


class Lifter:
    """Candidates from the user's words, then from what tools have returned.

    Args:
        text: the user's last words.
        results: what tools returned since, oldest first.
        earlier: earlier words of the user, newest first, looked at when ``text`` offers nothing.
    """

    def __init__(self, text: str, results: Iterable[str] = (), earlier: Iterable[str] = ()) -> None:
        self.text = text = _shorten(text)
        self._sources = [text, *map(_shorten, earlier)]
        self._results = [_shorten(result) for result in results]
        self._used: set[str] = set()
        self.stems = stems_of(text)
        self.all_stems = {stem(word) for word in words_of(text)}

    def number(self, name: str, accepts: Callable[[float], bool]) -> float | None:
        """A number the user gave for ``name``, else the next one not given away."""
        said = self.said(name)
        if said is not None and _NUMBER.fullmatch(said) and accepts(float(said)):
            self._used.add(said)
            return float(said)
        for source in self._sources:
            for match in _NUMBER.finditer(source):
                key = f"#{match.start()}{match.group()}"
                if key not in self._used and accepts(float(match.group())):
                    self._used.add(key)
                    return float(match.group())
        return None

    def numbers(self, accepts: Callable[[float], bool]) -> list[float]:
        """All numbers of the user's last words."""
        values = (float(match.group()) for match in _NUMBER.finditer(self.text))
        return [value for value in values if accepts(value)]

    def quoted(self) -> list[str]:
        """All quoted strings of the user's last words, in order."""
        found = (match.group(match.lastindex or 0) for match in _QUOTED.finditer(self.text))
        return [text.strip() for text in found if text.strip()]

    def said(self, name: str) -> str | None:
        """The value of an explicit ``name is X``, ``name: X`` or ``name = X``, else None."""
        spelled = r"[\s_-]*".join(map(re.escape, words_of(name)))
        if not spelled:
            return None
        value = rf"[\"'“‘`]?([^\"'”’`\n]+?)[\"'”’`]?{_PHRASE_END}"
        match = re.search(rf"\b{spelled}\b\s*(?:is\b|=|:)\s*{value}", self.text, re.IGNORECASE)
        return match.group(1).strip() if match else None

    def specific(self, name: str, description: str = "") -> str | None:
        """A string that was meant for this argument, by its name or by its kind; else None."""
        said = self.said(name)
        if said is not None:
            return said
        kind = set(words_of(name))
        if kind & _URL_NAMES:
            return self._fresh(_URL.findall(self.text))
        if kind & _EMAIL_NAMES:
            return self._fresh(_EMAIL.findall(self.text))
        if kind & _DATE_NAMES:
            return self._fresh(_DATE.findall(self.text))
        if kind & _PATH_NAMES:
            return self._path(kind, description)
        if kind & _PLACE_NAMES:
            return self._fresh([*self.quoted(), *self._after("in|at|near|for|to|of", _PLACE_END)])
        if kind & _QUERY_NAMES:
            return self._fresh([*self.quoted(), *self._after("for|about|mentions?|define[sd]?")])
        if kind & _QUESTION_NAMES:
            return self.text.strip() or None
        if "name" in kind or "title" in kind:
            return self._fresh([*self._after("named|called|titled|entitled"), *self.quoted()])
        return None

    def string(self, name: str, description: str = "") -> str:
        """Some string for this argument: the best the words offer, never empty."""
        found = self.specific(name, description)
        if found is None:
            kind = set(words_of(name))
            if kind & _PATH_NAMES:
                return "."
            for names, example in _EXAMPLES:
                if kind & names:
                    return example
            if kind & _QUERY_NAMES:
                found = self._fresh(self._topics()) or self.text.strip()
            else:
                found = self._generic(kind)
        return found or f"(emulated {name or 'value'})"

    def strings(self) -> list[str]:
        """Several strings: what is quoted, or the members of the first list in the words."""
        quoted = self.quoted()
        if quoted:
            return quoted
        for phrase in re.findall(r":\s*([^.?!\n]+)", self.text):
            members = re.split(r"\s*,\s*(?:and\s+)?|\s+and\s+", phrase.strip())
            if len(members) > 1:
                return [member.strip() for member in members if member.strip()]
        return []

    def alternatives(self, name: str) -> list[str]:
        """Values for one call each: "in Paris and London" → both; empty when there is one only."""
        quoted = self.quoted()
        if len(quoted) > 1:
            return quoted[:4]
        if set(words_of(name)) & _PLACE_NAMES:
            match = re.search(
                r"\b(?:in|at|for)\s+([A-Z][\w ]*(?:,\s[A-Z][\w ]*)*?)"
                r"\s+and\s+(?:in\s+)?([A-Z][\w ]*)",
                self.text,
            )
            if match:
                first = re.split(r"\s*,\s*", match.group(1).strip())
                return [*first, match.group(2).strip()][:4]
        return []

    def has_path(self) -> bool:
        """Whether words or tool results name a file."""
        return any(paths_in(text) for text in [self.text, *self._results])

    def _path(self, kind: set[str], description: str) -> str | None:
        folder = bool(kind & _FOLDER_NAMES) or "folder" in description or "directory" in description
        named = [path for source in self._sources for path in paths_in(source)]
        if folder and not kind & {"file", "filename", "filepath"}:
            folders = [
                path for path in named if _WITH_EXTENSION.fullmatch(path.split("/")[-1]) is None
            ]
            return self._fresh(folders)
        if found := self._fresh(named):
            return found
        # Nothing named: the file among the results whose name shares most with the question, those
        # that a search found (path:line: text) before what only looks like a path in their text.
        listed = [path for text in self._results for path in paths_in(text)]
        hits = {path for text in self._results for path in _SEARCH_HIT.findall(text)}
        ranked = sorted(
            dict.fromkeys(listed),
            key=lambda path: (
                path not in hits,
                -len(stems_of(path) & self.stems),
                "readme" not in path.lower(),
                listed.index(path),
            ),
        )
        return self._fresh(ranked)

    def _generic(self, kind: set[str]) -> str | None:
        style = "|".join(sorted(map(re.escape, kind)))
        candidates = [
            *self.quoted(),
            *re.findall(rf"\b(?:an?|the)\s+(\w+)\s+(?:{style})\b", self.text),
            *self._after("named|called|titled"),
            *self._after("about|for|in|of|to|at|with|on", _PLACE_END),
            *re.findall(r"(?<=\s)[A-Z]\w+(?:\s[A-Z]\w+)*", self.text),
        ]
        return self._fresh(candidates) or self._fresh(self._topics()) or self.text.strip()[:200]

    def _topics(self) -> list[str]:
        """The words that say most: identifiers first, then the longest."""
        words = [word for word in re.findall(r"\w+", self.text) if word.lower() not in _STOP_WORDS]
        coined = [w for w in words if "_" in w or _CAMEL.search(w) or w[1:2].isupper()]
        plain = sorted((w for w in words if len(w) > 2), key=len, reverse=True)
        return [*coined, *plain]

    def _after(self, prepositions: str, end: str = _PHRASE_END) -> list[str]:
        article = r"(?:the |an? )?"
        found = re.findall(rf"\b(?:{prepositions})\s+{article}(\S.*?){end}", self.text)
        return [phrase.strip().strip("\"'“”‘’`") for phrase in found]

    def _fresh(self, candidates: Iterable[str]) -> str | None:
        for candidate in candidates:
            if candidate and candidate not in self._used:
                self._used.add(candidate)
                return candidate
        return None
