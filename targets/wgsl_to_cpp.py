"""The WGSL of webgpu_kernels/, and TVM's, as C++ for compilers that take no WGSL: clang for AMD's GPUs, and Metal's.

A module becomes a struct. Its members are the buffers, the numbers and references to workgroup memory; its member
functions are the module's functions. The kernel that makes one and calls its entry is the compiler's own affair, as are
the functions and words that cpp_prelude/ defines for each. Names stay as they are, so the texts can be compared.

Only what our kernels use of WGSL is known here; everything else is refused, with its line.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, NoReturn

from mlcgen.errors import CompileError
from mlcgen.targets.device_kernel import Code

PRELUDES = Path(__file__).parent / "cpp_prelude"
SCALARS = frozenset({"f32", "i32", "u32", "bool"})
VECTORS = frozenset({"vec2", "vec3", "vec4"})
FUNCTIONS = frozenset(
    {"abs", "bitcast", "ceil", "clamp", "cos", "dot", "exp", "floor", "fma", "inverseSqrt", "max", "min"}
    | {"pack2x16float", "select", "sin", "sqrt", "unpack2x16float", "workgroupBarrier", "workgroupUniformLoad"}
)
STATEMENTS = frozenset({"if", "else", "for", "while", "return", "break", "continue", "true", "false"})
ATTRIBUTES = frozenset({"compute", "workgroup_size", "group", "binding", "builtin"})
BUILTINS = frozenset({"workgroup_id", "local_invocation_index", "local_invocation_id", "num_workgroups"})
ADDRESS_SPACES = frozenset({"storage,read", "storage,read_write", "uniform", "workgroup"})
# Names of WGSL's that are words of C++, Metal or OpenCL.
TAKEN = frozenset(
    {"thread", "kernel", "device", "constant", "local", "global", "private", "public", "template", "class", "this"}
    | {"half", "int", "uint", "short", "char", "float", "double", "long", "signed", "unsigned", "auto", "default"}
)
CLOSING = {"(": ")", "{": "}", "[": "]"}
_TOKEN = re.compile(
    r"(?P<space>\s+|//[^\n]*)|(?P<number>0[xX][0-9a-fA-F]+[iu]?|(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?[a-z]?)"
    r"|(?P<name>[A-Za-z_]\w*)"
    r"|(?P<sign>->|\+\+|--|&&|\|\||<<=?|[-+*/%&|^=!<>]=|[-+*/%&|^~!<>=.,;:(){}\[\]@])"
)


@dataclass(frozen=True)
class Buffer:
    name: str
    type: str
    is_read_only: bool


@dataclass
class Module:
    """A kernel as C++: `text` defines its struct; members are buffers, numbers and workgroup memory, in this order."""

    name: str = ""
    threads: int = 0
    entry: list[str] = field(default_factory=list)  # builtins that it is called with
    buffers: list[Buffer] = field(default_factory=list)  # in the order of their bindings
    numbers: tuple[str, str] | None = None  # the name of the struct of numbers, and its type
    fields: dict[str, str] = field(default_factory=dict)  # of that: name -> type
    workgroup: list[str] = field(default_factory=list)  # names; NAME_type is the type's name in the struct
    text: str = ""

    @property
    def struct(self) -> str:
        return f"{self.name}_module"


def modules(codes: Mapping[str, Code]) -> list[Module]:
    """Those of a model's kernels."""
    texts = {name: text for code in codes.values() for name, text in code.functions.items()}
    return [translate(text) for text in texts.values()]


def prelude(compiler: str) -> str:
    """What the translated text needs before it: of hip or metal."""
    return (PRELUDES / f"{compiler}.h").read_text() + (PRELUDES / "common.h").read_text()


def translate(text: str) -> Module:
    """One module with one kernel. Raises CompileError for what is not known, with its line."""
    return _Translation(text).module()


class _Token(NamedTuple):
    kind: str
    text: str
    space: str  # before it
    line: str


class _Tokens:
    """A text's tokens, and which of them comes next."""

    def __init__(self, text: str) -> None:
        self.at = 0
        self.tokens: list[_Token] = []
        space = ""
        for line in text.splitlines(keepends=True):
            at = 0
            while at < len(line):
                match = _TOKEN.match(line, at)
                if match is None:
                    raise CompileError(f"WGSL cannot be translated: {line[at]!r} is not known: {line.strip()!r}")
                if match.lastgroup == "space":
                    space += "" if match[0].startswith("//") else match[0]
                else:
                    self.tokens.append(_Token(str(match.lastgroup), match[0], space, line.strip()))
                    space = ""
                at = match.end()
        self.tokens.append(_Token("end", "", "", "the end"))

    def fail(self, why: str) -> NoReturn:
        line = self.tokens[min(max(self.at - 1, 0), len(self.tokens) - 1)].line
        raise CompileError(f"WGSL cannot be translated: {why}: {line!r}")

    def peek(self, ahead: int = 0) -> str:
        return self.tokens[min(self.at + ahead, len(self.tokens) - 1)].text

    def next(self) -> _Token:
        self.at += 1
        return self.tokens[min(self.at, len(self.tokens)) - 1]

    def take(self, expected: str = "") -> str:
        text = self.next().text
        if expected and text != expected:
            self.fail(f"{expected!r} is expected, not {text!r}")
        return text

    def accept(self, text: str) -> bool:
        found = self.peek() == text
        self.at += found
        return found


class _Translation(_Tokens):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        words = [token.text for token in self.tokens]
        self.found = Module()
        self.buffers: dict[int, Buffer] = {}  # by binding
        self.types: list[str] = []  # and constants, in the order of the text: they use each other
        self.functions: list[str] = []
        self.called = {name for fn, name in pairwise(words) if fn == "fn"}
        self.structs: dict[str, dict[str, str]] = {}  # name -> field -> type
        self.aliases: dict[str, str] = {}  # name -> type; of structs the name itself
        self.constants: dict[str, str] = {}  # name -> type
        self.globals: set[str] = set()
        self.locals: set[str] = set()  # of this function

    def module(self) -> Module:
        while self.peek():
            self.declaration()
        found = self.found
        if not found.name:
            raise CompileError("a module of WGSL has no kernel")
        found.buffers = [self.buffers[binding] for binding in sorted(self.buffers)]
        members = [f"GLOBAL {'const ' * b.is_read_only}{b.type}* {b.name};" for b in found.buffers]
        if found.numbers:
            name, type_ = found.numbers
            found.fields = self.structs[type_]
            members.append(f"UNIFORM({type_}) {name};")
        members += [f"WORKGROUP {name}_type& {name};" for name in found.workgroup]
        found.text = "\n".join([f"struct {found.struct} {{", *self.types, *members, *self.functions, "};\n"])
        return found

    # Declarations

    def declaration(self) -> None:
        attributes = self.attributes()
        kind = self.take()
        if kind == "var":
            self.variable(attributes)
        elif kind == "fn":
            self.function(attributes)
        elif kind in ("const", "alias", "struct"):
            self.types.append({"const": self.constant, "alias": self.alias, "struct": self.struct}[kind]())
        else:
            self.fail(f"{kind!r} is not known at the start of a declaration")

    def attributes(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        while self.accept("@"):
            name = self.take()
            if name not in ATTRIBUTES:
                self.fail(f"the attribute {name} is not known")
            found[name] = []
            if self.accept("("):
                while not self.accept(")"):
                    found[name].append(self.take())
                    self.accept(",")
        return found

    def type(self) -> str:
        name = self.take()
        if name == "array":
            element, extent = self.array()
            return f"Array<{element}, {extent}>"
        if name in VECTORS:
            self.take("<")
            name = f"{name}<{self.take()}>"
            self.take(">")
        if name not in SCALARS and name not in self.aliases and name[5:-1] not in SCALARS:
            self.fail(f"the type {name} is not known")
        return name

    def array(self) -> tuple[str, str]:
        """(element, extent or nothing), after the word `array`."""
        self.take("<")
        element, extent = self.type(), ""
        if self.accept(","):
            while self.peek() not in (">", ""):
                extent += self.term()
        self.take(">")
        return element, extent.strip()

    def constant(self) -> str:
        name = self.take()
        self.take("=")
        first = self.at
        value = self.until(";").strip()
        self.constants[name] = self.constant_type(self.tokens[first : self.at - 1])
        return f"static CONSTANT {self.constants[name]} {name} = {value};"

    def constant_type(self, tokens: list[_Token]) -> str:
        """That of the constants and literals in an expression; numbers without a suffix fit any."""
        numbers = [token.text for token in tokens if token.kind == "number"]
        found = [self.constants[token.text] for token in tokens if token.text in self.constants]
        found += ["u32" if n.endswith("u") else "f32" for n in numbers if n.endswith("u") or _is_float(n)]
        return found[0] if found else "i32"

    def alias(self) -> str:
        name = self.take()
        self.take("=")
        self.aliases[name] = self.type()
        self.take(";")
        return f"using {name} = {self.aliases[name]};"

    def struct(self) -> str:
        name, fields = self.take(), {}
        self.take("{")
        while not self.accept("}"):
            field_name = self.take()
            self.take(":")
            fields[field_name] = self.type()
            self.accept(",")
        self.accept(";")
        self.structs[name], self.aliases[name] = fields, name
        return f"struct {name} {{ {' '.join(f'{type_} {f};' for f, type_ in fields.items())} }};"

    def variable(self, attributes: Mapping[str, list[str]]) -> None:
        """One outside of functions."""
        self.take("<")
        space = ""
        while not self.accept(">"):
            space += self.take()
        if space not in ADDRESS_SPACES:
            self.fail(f"the address space {space} is not known")
        name = self.take()
        self.globals.add(name)
        self.take(":")
        type_, extent = self.array() if self.accept("array") else (self.type(), "")
        self.take(";")
        if space == "workgroup":
            self.found.workgroup.append(name)
            self.types.append(f"using {name}_type = {type_}{f'[{extent}]' * bool(extent)};")
        elif space == "uniform":
            self.found.numbers = (name, type_)
        else:
            self.buffers[int(attributes["binding"][0])] = Buffer(name, type_, space == "storage,read")

    def function(self, attributes: Mapping[str, list[str]]) -> None:
        name, params, builtins = self.take(), [], []
        self.locals = set()
        self.take("(")
        while not self.accept(")"):
            builtins += self.attributes().get("builtin", [])
            param = self.local_name()
            self.take(":")
            params.append(f"{self.type()} {param}")
            self.accept(",")
        if not BUILTINS.issuperset(builtins):
            self.fail(f"one of the builtins {builtins} is not known")
        result = self.type() if self.accept("->") else "void"
        self.take("{")
        self.functions.append(f"INLINE {result} {name}({', '.join(params)}) {{{self.until('}')}\n}}")
        if "compute" in attributes:
            threads, *others = attributes["workgroup_size"]
            if self.found.name or set(others) - {"1"}:
                self.fail("there is more than one kernel, or a workgroup of more than one dimension")
            self.found.name, self.found.threads, self.found.entry = name, int(threads), builtins

    # Statements and expressions

    def until(self, end: str) -> str:
        """What stands before `end`, which is taken; statements too."""
        found = ""
        closing: list[str] = []  # brackets for what is open, as C++ wants them
        while closing or self.peek() != end:
            if not self.peek():
                self.fail("a bracket is not closed")
            if self.peek() in CLOSING:
                opening = "{" if self.peek() == "(" and self.is_constructed() else self.peek()
                found += self.next().space + opening
                closing.append(CLOSING[opening])
            elif self.peek() in CLOSING.values():
                if not closing:
                    self.fail("a bracket is not open")
                found += self.next().space + closing.pop()
            else:
                found += self.term()
        self.take(end)
        return found

    def is_constructed(self) -> bool:
        """Whether the name before this bracket is a struct or an array, which C++ makes with braces."""
        name = self.peek(-1)
        return name in self.structs or self.aliases.get(name, "").startswith("Array")

    def term(self) -> str:
        token = self.tokens[self.at]
        if token.kind == "name":
            return token.space + self.word()
        self.next()
        if token.kind == "number":
            return token.space + self.number(token.text)
        if token.text in (":", "->", "@"):
            self.fail(f"{token.text!r} is not known here")
        if token.text == "&" and self.peek(-2) in ("(", ",", "="):
            if self.peek(-3) != "workgroupUniformLoad":
                self.fail("addresses are not known")
            return token.space
        return token.space + token.text

    def number(self, text: str) -> str:
        if _is_float(text):
            return f"{text.removesuffix('f')}f"
        if not re.fullmatch(r"0x[0-9a-f]+[iu]?|\d+[iu]?", text.lower()):
            self.fail(f"the number {text} is not known")
        if text.isdigit() and int(text) >= 1 << 31:
            self.fail(f"the number {text} is not known without a u")
        return text.removesuffix("i")

    def word(self) -> str:
        text, before = self.peek(), self.peek(-1)
        if text in ("let", "var"):
            return self.local()
        if text in VECTORS:
            if self.peek(1) == "(":  # its type is that of what it is made of
                return f"make_{self.take()}"
            type_ = self.type()
            return f"make_{type_}" if self.peek() == "(" else type_
        self.next()
        if before == ".":
            return self.field(text)
        if text in self.locals:
            return _renamed(text)
        if text in ("if", "while") and self.peek() != "(":
            self.fail(f"{text} without a bracket is not known")
        is_type = text in SCALARS or text in self.aliases
        is_known = text in self.globals or text in self.constants or text in self.called or text in STATEMENTS
        is_known |= is_type and self.peek() in ("(", ">")  # a cast, or bitcast's type
        is_known |= text in FUNCTIONS and self.peek() in ("(", "<")
        return text if is_known else self.fail(f"{text!r} is not known")

    def field(self, name: str) -> str:
        if not re.fullmatch("[xyzw]{1,4}", name) and not any(name in fields for fields in self.structs.values()):
            self.fail(f"the field {name} is not known")
        return name

    def local(self) -> str:
        is_let = self.take() == "let"
        name = self.local_name()
        type_ = self.type() if self.accept(":") else "auto"
        if self.peek() == "=":
            self.refuse_itself(self.tokens[self.at - 1].text if type_ == "auto" else name)
            return f"{'const ' * is_let}{type_} {name}"
        if is_let or type_ == "auto" or self.peek() != ";":
            self.fail(f"{name} has neither type nor value")
        return f"{type_} {name} = {{}}"  # WGSL's variables begin as zeros

    def refuse_itself(self, name: str) -> None:
        """A value that names its own variable means an outer one in WGSL, and the new one in C++."""
        end = next(i for i in range(self.at, len(self.tokens)) if self.tokens[i].text in (";", "{"))
        if any(self.tokens[i].text == name and self.tokens[i - 1].text != "." for i in range(self.at, end)):
            self.fail(f"{name} by its own name is not known")

    def local_name(self) -> str:
        token = self.next()
        if token.kind != "name":
            self.fail(f"{token.text!r} is no name")
        self.locals.add(token.text)
        return _renamed(token.text)


def _is_float(number: str) -> bool:
    return bool(re.fullmatch(r"(\d+\.?\d*|\.\d+)(e[+-]?\d+)?f?", number.lower())) and bool(re.search("[.ef]", number))


def _renamed(name: str) -> str:
    return f"{name}_" if name in TAKEN else name
