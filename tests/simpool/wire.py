"""The wire: XML-RPC as the server writes it, and the reading of requests.

Strings, ints, references and enums carry no type tag, void is an empty string, API failures are a struct inside a good
response, never an XML-RPC fault (ocaml-rpc, src/lib/xmlrpc.ml).
"""

import re
import xmlrpc.client
from typing import Any, Callable, Dict, List, Tuple

from schema import CLASSES

_SPECIAL = re.compile("[&<>\"\x00-\x08\x0b\x0c\x0e-\x1f]")
_ESCAPES = {ord("&"): "&amp;", ord("<"): "&lt;", ord(">"): "&gt;", ord('"'): "&quot;"}  # type: Dict[int, Any]
# control characters other than tab, LF and CR are dropped on output
_ESCAPES.update({code: None for code in range(32) if chr(code) not in "\t\n\r"})

_HEAD = '<?xml version="1.0"?><methodResponse><params><param><value><struct><member><name>Status</name><value>'
_TAIL = "</value></member></struct></value></param></params></methodResponse>"


def escape(text: str) -> str:
    return text.translate(_ESCAPES) if _SPECIAL.search(text) else text


def _string(value: str) -> str:
    return "<value>" + escape(value) + "</value>"


def _bool(value: bool) -> str:
    return "<value><boolean>1</boolean></value>" if value else "<value><boolean>0</boolean></value>"


def _float(value: float) -> str:
    return "<value><double>%.16g</double></value>" % value


def _date(value: str) -> str:
    return "<value><dateTime.iso8601>" + value + "</dateTime.iso8601></value>"


def _void(value: Any) -> str:
    return "<value></value>"


def _i4(value: int) -> str:
    return "<value><i4>%d</i4></value>" % value


_WRITERS = {"string": _string, "int": _string, "ref": _string, "enum": _string, "bool": _bool, "float": _float,
            "datetime": _date, "void": _void, "i4": _i4}  # type: Dict[str, Callable[[Any], str]]
_CACHE = {}  # type: Dict[str, Callable[[Any], str]]


def writer(type_text: str) -> Callable[[Any], str]:
    """The function that writes values of a type: those of schema.py, and "void", "record CLASS", "event_batch"."""
    if type_text not in _CACHE:
        _CACHE[type_text] = _make_writer(type_text)
    return _CACHE[type_text]


def _make_writer(type_text: str) -> Callable[[Any], str]:
    kind, _, rest = type_text.partition(" ")
    if kind in _WRITERS:
        return _WRITERS[kind]
    if kind == "set":
        write_item = writer(rest)
        return lambda items: "<value><array><data>" + "".join(map(write_item, items)) + "</data></array></value>"
    if kind == "map":
        # the key's type is one word, or two for a reference
        value_type = rest.split(" ", 2)[2] if rest.startswith("ref ") else rest.partition(" ")[2]
        write_value = writer(value_type)
        return lambda items: "<value><struct>" + "".join(
            ["<member><name>" + escape(key) + "</name>" + write_value(value) + "</member>"
             for key, value in items.items()]) + "</struct></value>"
    if kind == "record":
        return _record_writer([(field.name, field.type) for field in CLASSES[rest].fields.values()])
    if kind == "event_batch":
        return _record_writer([("events", "set event"), ("valid_ref_counts", "map string i4"), ("token", "string")])
    if kind == "event":
        return _event
    raise ValueError("unknown type %s" % type_text)


def _record_writer(fields: List[Tuple[str, str]]) -> Callable[[Any], str]:
    parts = [("<member><name>" + name + "</name>", name, writer(type_text)) for name, type_text in fields]

    def write(record: Dict[str, Any]) -> str:
        return "<value><struct>" + "".join(
            [head + write_field(record[name]) + "</member>" for head, name, write_field in parts]) + "</struct></value>"
    return write


def _event(event: Dict[str, Any]) -> str:
    names = [("id", "string"), ("timestamp", "string"), ("class", "string"), ("operation", "string"), ("ref", "string")]
    if event["snapshot"] is not None:
        names.append(("snapshot", "record " + event["table"]))
    return _record_writer(names)(event)


class RecordCache:
    """Records as XML, kept until the record changes: thousands of VMs are asked for again and again."""

    def __init__(self) -> None:
        self._texts = {}  # type: Dict[str, Dict[str, str]]

    def touch(self, cls: str, ref: str) -> None:
        """To be called whenever a record changes."""
        texts = self._texts.get(cls)
        if texts is not None:
            texts.pop(ref, None)

    def text(self, cls: str, ref: str, record: Dict[str, Any]) -> str:
        texts = self._texts.setdefault(cls, {})
        found = texts.get(ref)
        if found is None:
            found = texts[ref] = writer("record " + cls)(record)
        return found

    def map_text(self, cls: str, records: Dict[str, Dict[str, Any]]) -> str:
        """{ref: record}, ascending by reference, as the server writes it."""
        return "<value><struct>" + "".join(
            ["<member><name>" + ref + "</name>" + self.text(cls, ref, records[ref]) + "</member>" for ref in sorted(records)]
        ) + "</struct></value>"


def success(value_text: str) -> bytes:
    """The response for a value that is XML already (`<value>...</value>`)."""
    return (_HEAD + "Success</value></member><member><name>Value</name>" + value_text +
            "</member></struct></value></param></params></methodResponse>").encode("utf-8", "replace")


def failure(description: List[str]) -> bytes:
    """The response for a failure: its code and parameters."""
    return (_HEAD + "Failure</value></member><member><name>ErrorDescription</name>" + writer("set string")(description) +
            "</member></struct></value></param></params></methodResponse>").encode("utf-8", "replace")


def read_call(body: bytes) -> Tuple[str, List[Any]]:
    """(method, parameters) of an XML-RPC request; ValueError if it is not one.

    Parameters come as str, int, bool, float, list, dict, None (nil), or an object with a `value` (dates, base64).
    """
    try:
        parameters, method = xmlrpc.client.loads(body)
    except Exception as error:
        raise ValueError(str(error))
    if not isinstance(method, str):
        raise ValueError("no method")
    return method, list(parameters)
