"""The classes of the API: which fields their records have, of which type, and what can be set or given to a constructor.

`records.json` holds, class by class and in the order of the wire, one row per field: name, type, "rw" if there is a
setter, and the value that a new object has. It was drawn from records of a real server (xapi 24.19.2); classes that were
only seen in its database dump (PIF, SM, console, ...) were added with the field order of the data model.

Values are kept as they travel: an int is a decimal str, a date a str "20250319T04:16:24Z", a reference a str
"OpaqueRef:...", the rest bool, float, str, list and dict.
"""

import json
import os
import re
from typing import Any, Dict, List, Optional, Set, Tuple

NULL = "OpaqueRef:NULL"
EPOCH = "19700101T00:00:00Z"


class Failure(Exception):
    """A failure of the API: a code and its parameters, as ErrorDescription lists them."""

    def __init__(self, code: str, *params: str) -> None:
        Exception.__init__(self, code, *params)
        self.code = code
        self.params = tuple(str(param) for param in params)

    def description(self) -> List[str]:
        return [self.code] + list(self.params)

    def __str__(self) -> str:
        """As the server writes it into HTML pages and logs (exnHelper.ml string_of_exn)."""
        return "%s: [ %s ]" % (self.code, "; ".join(self.params))


class Field:
    """One field of a class."""

    def __init__(self, name: str, type_text: str, writable: bool, default: Any) -> None:
        self.name = name
        self.type = type_text
        self.kind = type_text.split()[0]
        self.writable = writable
        self.default = default
        self.enum = type_text.split()[1:] if self.kind == "enum" else []
        #: the class that a reference field points at
        self.target = type_text.split()[-1] if " ref " in " " + type_text and self.kind in ("ref", "set") else None


class Class:
    """One class of the data model."""

    def __init__(self, name: str, rows: List[List[Any]]) -> None:
        self.name = name
        self.fields = {}  # type: Dict[str, Field]
        for field_name, type_text, access, default in rows:
            self.fields[field_name] = Field(field_name, type_text, access == "rw", default)
        self._template = {field.name: field.default for field in self.fields.values()}
        self._mutable = [(field.name, type(field.default)) for field in self.fields.values()
                         if isinstance(field.default, (list, dict))]
        self.has_names = "name_label" in self.fields
        self.column_of = {name: column(self.name, name) for name in self.fields}
        self.field_of_column = {column_name: name for name, column_name in self.column_of.items()}

    def new_record(self, values: Dict[str, Any]) -> Dict[str, Any]:
        """A record with every field: the given values, and the defaults for the rest."""
        record = dict(self._template)
        for name, kind in self._mutable:
            record[name] = kind(record[name])
        for name in values:
            if name not in record:
                raise KeyError("%s has no field %s" % (self.name, name))
        record.update(values)
        return record


def column(cls: str, field: str) -> str:
    """The name of a field's column in the database, where namespaces are joined by two underscores.

    It is what get_all_records_where and the database dump know the field by.
    """
    if cls in NAMESPACES:
        for prefix in NAMESPACES[cls]:
            if field.startswith(prefix + "_"):
                return prefix + "__" + field[len(prefix) + 1:]
    return field


NAMESPACES = {
    "SM": ["name"], "SR": ["name"], "VDI": ["name"], "network": ["name"], "task": ["name"],
    "VBD": ["qos"], "VIF": ["qos"], "PIF_metrics": ["io"], "host_metrics": ["memory"],
    "host": ["API_version", "memory", "name"],
    "VM": ["HVM", "PV", "VCPUs", "actions", "memory", "name"],
    "VM_metrics": ["VCPUs", "memory"],
}


def _load() -> Dict[str, Class]:
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "records.json")
    with open(path, encoding="utf-8") as stream:
        return {name: Class(name, rows) for name, rows in json.load(stream).items()}


CLASSES = _load()

#: Lists of references are never written by hand: the server keeps them up from the field on the other side.
#: (class, reference field) -> (class pointed at, its list)
RELATIONS = {
    ("VBD", "VM"): ("VM", "VBDs"), ("VBD", "VDI"): ("VDI", "VBDs"),
    ("VIF", "VM"): ("VM", "VIFs"), ("VIF", "network"): ("network", "VIFs"),
    ("VDI", "SR"): ("SR", "VDIs"), ("VDI", "snapshot_of"): ("VDI", "snapshots"),
    ("VM", "snapshot_of"): ("VM", "snapshots"), ("VM", "parent"): ("VM", "children"),
    ("VM", "resident_on"): ("host", "resident_VMs"),
    ("PBD", "SR"): ("SR", "PBDs"), ("PBD", "host"): ("host", "PBDs"),
    ("PIF", "host"): ("host", "PIFs"), ("PIF", "network"): ("network", "PIFs"),
    ("host_cpu", "host"): ("host", "host_CPUs"),
    ("console", "VM"): ("VM", "consoles"),
    ("task", "subtask_of"): ("task", "subtasks"),
}  # type: Dict[Tuple[str, str], Tuple[str, str]]

#: Constructors take one struct. Fields of the first list must be there (datamodel_*.ml: no default), those of the second may.
#: A record's other fields are ignored, as the real dispatcher does; names that the class does not have are refused here.
CONSTRUCTORS = {
    "VM": (("user_version is_a_template affinity memory_static_max memory_dynamic_max memory_dynamic_min memory_static_min "
            "VCPUs_params VCPUs_max VCPUs_at_startup actions_after_shutdown actions_after_reboot actions_after_crash "
            "PV_bootloader PV_kernel PV_ramdisk PV_args PV_bootloader_args PV_legacy_args HVM_boot_policy HVM_boot_params "
            "platform PCI_bus other_config recommendations").split(),
           ("name_label name_description power_state suspend_VDI last_booted_record last_boot_CPU_flags actions_after_softreboot "
            "HVM_shadow_multiplier xenstore_data ha_always_run ha_restart_priority tags blocked_operations "
            "is_snapshot_from_vmpp snapshot_schedule is_vmss_snapshot appliance start_delay shutdown_delay order suspend_SR "
            "version generation_id hardware_platform_version has_vendor_device reference_label domain_type NVRAM domid "
            "protection_policy").split()),
    "VBD": ("VM VDI userdevice bootable mode type empty other_config qos_algorithm_type qos_algorithm_params".split(),
            "unpluggable device currently_attached".split()),
    "VIF": ("device network VM MAC MTU other_config qos_algorithm_type qos_algorithm_params".split(),
            "locking_mode ipv4_allowed ipv6_allowed currently_attached".split()),
    "VDI": ("SR virtual_size type sharable read_only other_config".split(),
            "name_label name_description xenstore_data sm_config tags".split()),
    "network": ("other_config".split(), "name_label name_description MTU tags bridge managed".split()),
    "secret": ("value".split(), "other_config".split()),
}  # type: Dict[str, Tuple[List[str], List[str]]]


def check(cls: str, field: str, value: Any) -> Any:
    """`value`, as a client sent it, as the wire value of this field. ValueError with a reason if it can't be."""
    return convert(CLASSES[cls].fields[field].type, value)


def convert(type_text: str, value: Any) -> Any:
    """`value`, as a client sent it, as a value of this type. Ints may come as a string or a number, as on the real server."""
    kind, _, rest = type_text.partition(" ")
    if kind == "int":
        if isinstance(value, bool) or not isinstance(value, (int, str)):
            raise ValueError("not an int")
        if isinstance(value, str) and not re.match(r"-?[0-9]+\Z", value):
            raise ValueError("not an int: %s" % value)
        number = int(value)
        if not -2 ** 63 <= number < 2 ** 63:
            raise ValueError("int out of range")
        return str(number)
    if kind == "bool":
        if not isinstance(value, bool):
            raise ValueError("not a bool")
        return value
    if kind == "float":
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise ValueError("not a float")
        return float(value)
    if kind == "datetime":
        text = getattr(value, "value", value)
        if not isinstance(text, str) or not re.match(r"\d{4}-?\d\d-?\d\dT\d\d:\d\d:\d\d(Z|[+-]\d\d:?\d\d)?\Z", text):
            raise ValueError("not a date")
        return text
    if kind in ("string", "ref", "enum"):
        if not isinstance(value, str):
            raise ValueError("not a string")
        if kind == "enum" and value not in rest.split():
            raise ValueError("%s is not one of %s" % (value, ", ".join(rest.split())))
        return value
    if kind == "set":
        if not isinstance(value, (list, tuple)):
            raise ValueError("not an array")
        return [convert(rest, item) for item in value]
    if kind == "map":
        if not isinstance(value, dict):
            raise ValueError("not a struct")
        item_type = rest.partition(" ")[2]
        if rest.startswith("ref "):
            item_type = rest.split(" ", 2)[2]
        if rest == "string string":
            for item in value.values():
                if not isinstance(item, str):
                    raise ValueError("not a struct of strings")
            return dict(value)
        return {str(key): convert(item_type, item) for key, item in value.items()}
    raise ValueError("unknown type %s" % type_text)


def database_text(value: Any) -> str:
    """A value as the database holds it: filters compare with this text, and the dump writes it."""
    if value is True:
        return "true"
    if value is False:
        return "false"
    if isinstance(value, float):
        return "%.15g" % value
    if isinstance(value, list):
        return "(" + " ".join(_quoted(database_text(item)) for item in value) + ")"
    if isinstance(value, dict):
        return "(" + " ".join("(%s %s)" % (_quoted(key), _quoted(database_text(item)))
                              for key, item in value.items()) + ")"
    return value


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


_PART = re.compile(r"\s*(?:(?P<sign>[()])|'(?P<text>(?:[^'\\]|\\.)*)')", re.DOTALL)


def _parts(text: str) -> Any:
    """Nested lists of strings from `('a' ('b' 'c'))`."""
    stack = [[]]  # type: List[List[Any]]
    at = 0
    while at < len(text):
        match = _PART.match(text, at)
        if match is None:
            raise ValueError("not database text: %s" % text[at:at + 40])
        at = match.end()
        if match.group("sign") == "(":
            stack.append([])
        elif match.group("sign") == ")":
            inner = stack.pop()
            stack[-1].append(inner)
        else:
            stack[-1].append(re.sub(r"\\(.)", r"\1", match.group("text"), flags=re.DOTALL))
    return stack[0][0]


def value_of_text(type_text: str, text: str) -> Any:
    """The value of this type that the database holds as this text: what database_text wrote."""
    kind, _, rest = type_text.partition(" ")
    if kind == "bool":
        return text == "true"
    if kind == "float":
        return float(text)
    if kind == "set":
        return [value_of_text(rest, item) for item in _parts(text)]
    if kind == "map":
        item_type = rest.split(" ", 2)[2] if rest.startswith("ref ") else rest.partition(" ")[2]
        return {key: value_of_text(item_type, item) for key, item in _parts(text)}
    return text


def record_of_text(cls: str, text: str) -> Dict[str, Any]:
    """The fields of a row that was written as text: a snapshot's snapshot_metadata. Columns that are no fields are left out."""
    fields = CLASSES[cls]
    return {fields.field_of_column[column_name]: value_of_text(fields.fields[fields.field_of_column[column_name]].type, cell)
            for column_name, cell in (_parts(text) if text else []) if column_name in fields.field_of_column}


# ---------------------------------------------------------------------------------------------------------------------
# Filters: the little language of get_all_records_where (db_filter_lex.mll, db_filter_parse.mly, v26.17.0)

_TOKEN = re.compile(r'\s*(?:(?P<word>and|or|not|true|false|field)(?![A-Za-z0-9_])|(?P<sign>[()=])'
                    r'|"(?P<literal>[^"]*)")')


class Filter:
    """A parsed filter expression; `matches` tells whether a record passes it.

    As in the real grammar there are no escapes in literals, `and` and `or` have one precedence and group to the left,
    and `not` takes in everything behind it.
    """

    def __init__(self, cls: str, text: str) -> None:
        self._class = CLASSES[cls]
        self._text = text
        self._tokens = self._tokenise(text)
        self._at = 0
        self._tree = self._expression()
        if self._peek() is not None:
            self._fail()

    def matches(self, record: Dict[str, Any]) -> bool:
        return self._evaluate(self._tree, record)

    def _fail(self) -> None:
        # exnHelper.ml, v26.17.0: Db_filter.Expression_error (expr, exc) is INVALID_VALUE [expr; exc]
        raise Failure("INVALID_VALUE", self._text, "Stdlib.Parsing.Parse_error")

    def _tokenise(self, text: str) -> List[Tuple[str, str]]:
        tokens = []
        at = 0
        while text[at:].strip():
            match = _TOKEN.match(text, at)
            if match is None:
                self._fail()
                break
            kind = match.lastgroup or ""
            tokens.append(("literal" if kind == "literal" else match.group(kind), match.group(kind)))
            at = match.end()
        return tokens

    def _peek(self) -> Optional[str]:
        return self._tokens[self._at][0] if self._at < len(self._tokens) else None

    def _next(self) -> Tuple[str, str]:
        if self._at >= len(self._tokens):
            self._fail()
        self._at += 1
        return self._tokens[self._at - 1]

    def _value(self) -> Tuple[str, str]:
        kind, text = self._next()
        if kind == "field":
            kind, text = self._next()
            if kind != "literal":
                self._fail()
            return ("field", text)
        if kind != "literal":
            self._fail()
        return ("literal", text)

    def _expression(self) -> Tuple[Any, ...]:
        left = self._term()
        while self._peek() in ("and", "or"):
            operator = self._next()[0]
            left = (operator, left, self._term())
        return left

    def _term(self) -> Tuple[Any, ...]:
        kind = self._peek()
        if kind == "not":
            self._next()
            return ("not", self._expression())
        if kind in ("true", "false"):
            self._next()
            return (kind,)
        if kind == "(":
            self._next()
            inner = self._expression()
            if self._next()[0] != ")":
                self._fail()
            return inner
        left = self._value()
        if self._next()[0] != "=":
            self._fail()
        return ("=", left, self._value())

    def _text_of(self, value: Tuple[str, str], record: Dict[str, Any]) -> str:
        kind, text = value
        if kind == "literal":
            return text
        name = self._class.field_of_column.get(text)
        if name is None:
            raise Failure("INTERNAL_ERROR", "missing field", text, "")
        return database_text(record[name])

    def _evaluate(self, tree: Tuple[Any, ...], record: Dict[str, Any]) -> bool:
        operator = tree[0]
        if operator == "=":
            return self._text_of(tree[1], record) == self._text_of(tree[2], record)
        if operator == "and":
            return self._evaluate(tree[1], record) and self._evaluate(tree[2], record)
        if operator == "or":
            return self._evaluate(tree[1], record) or self._evaluate(tree[2], record)
        if operator == "not":
            return not self._evaluate(tree[1], record)
        return operator == "true"


def writable_fields(cls: str) -> Set[str]:
    return {field.name for field in CLASSES[cls].fields.values() if field.writable}
