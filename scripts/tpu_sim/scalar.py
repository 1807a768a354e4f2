"""One scalar instruction as a closure that runs it on a `machine.Machine`.

A value is an int, a bool, or None where it depends on something unknown (vector data, operands that nobody gave).
Addresses are plain ints beyond 2**80: an allocation or operand number in the high bits, an offset in the low ones.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

ADDRESS = 1 << 80
OPERAND_BASE, OPERAND_BITS = ADDRESS << 120, 100

Value = int | bool | None
Read = Callable[[Any], Value]
Step = Callable[[Any], None]

_REGISTER = re.compile(r"^%[a-z]+\d+(?:_[a-z]+\d+)?$")
_PREDICATE_FIRST = re.compile(r"\((!?)(%\w+)(?:, (%\w+))?\)\s*,?\s*")
_PREDICATE_LAST = re.compile(r"\s\((!?)(%\w+)\)")
_OPERAND = re.compile(r"shape: (\w+)\[([\d,]*)\].*?index: (\d+)")


def signed(x: int) -> int:
    """Wraps to 32 bits, but leaves addresses alone."""
    if abs(x) >= ADDRESS:
        return x
    x &= 0xFFFFFFFF
    return x - (1 << 32) if x >= 1 << 31 else x


def unsigned(x: int) -> int:
    """The 32 bits as an unsigned number; addresses as they are."""
    return x if abs(x) >= ADDRESS else x & 0xFFFFFFFF


_OPS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("smov", "pmov", "sld", "int_to_ptr", "scopy"), lambda x: x),
    "sadd": lambda x, y: signed(x + y),
    "ssub": lambda x, y: signed(x - y),
    "smul": lambda x, y: signed(x * y),
    "smulhi": lambda x, y: signed((unsigned(x) * unsigned(y)) >> 32),
    "sand": lambda x, y: x & y,
    "sor": lambda x, y: x | y,
    "sxor": lambda x, y: x ^ y,
    "sshll": lambda x, y: signed(x << (y & 31)),
    "sshrl": lambda x, y: unsigned(x) >> (y & 31),
    "sshra": lambda x, y: x >> (y & 31),
    "scalar_lea": lambda *terms: sum(terms),
    "smin": min,
    "smax": max,
    "sdiv": lambda x, y: int(x / y) if y else 0,
    "srem": lambda x, y: (abs(x) % abs(y)) * (1 if x >= 0 else -1) if y else 0,
    "sdivrem": lambda x, y: x // y if y else 0,
    "sclz": lambda x: 32 - unsigned(x).bit_length(),
    "spcnt": lambda x: bin(unsigned(x)).count("1"),
    "scalar_select": lambda p, x, y: x if p else y,
    "pneg": lambda x: not x,
    "por": lambda x, y: bool(x or y),
    "pand": lambda x, y: bool(x and y),
    "pnand": lambda x, y: not (x and y),
    "pnor": lambda x, y: not (x or y),
    "pxor": lambda x, y: bool(x) != bool(y),
}
_UNSIGNED_OPS = {
    "smin": lambda x, y: min(unsigned(x), unsigned(y)),
    "smax": lambda x, y: signed(max(unsigned(x), unsigned(y))),
}
_COMPARE: dict[str, Callable[[int, int], bool]] = {
    "eq": lambda x, y: x == y,
    "ne": lambda x, y: x != y,
    "lt": lambda x, y: x < y,
    "le": lambda x, y: x <= y,
    "gt": lambda x, y: x > y,
    "ge": lambda x, y: x >= y,
}


class ScalarCompiler:
    """Turns instructions into closures. Notes the operands it sees and the operations it does not know."""

    def __init__(self):
        #: (memory space, dtype, dims) of each operand, by index
        self.operands: dict[int, tuple[str, str, str]] = {}
        self.unknown_ops: Counter[str] = Counter()
        self._allocations: dict[str, int] = {}

    def allocation(self, name: str) -> int:
        """Base address of a named allocation."""
        return ADDRESS * 4 + (self._allocations.setdefault(name, len(self._allocations) + 1) << 40)

    def read(self, token: str) -> Read:
        """A register, a word of SMEM, an address, or a constant."""
        token = re.sub(r"^(\S+) \[#[^\]]*\]$", r"\1", token.strip())  # "1 [#allocation6]": the bracket is a note
        if _REGISTER.match(token):
            return lambda m: m.registers.get(token)
        if token.startswith("[smem:"):
            address = self.address(token[6:-1])
            return lambda m: None if (at := address(m)) is None else m.smem.get(at, 0)
        if token.startswith("[") and token.endswith("]"):
            return self.address(token)
        text = token.lstrip("$")
        try:
            constant: Value = int(text, 0)
        except ValueError:
            constant = {"true": True, "false": False}.get(text)
        else:
            constant = constant - (1 << 32) if 1 << 31 <= constant < 1 << 32 else constant
        return lambda m: constant

    def address(self, token: str) -> Read:
        """`[base + register + constant]`"""
        terms = [self._term(t.strip()) for t in token.strip()[1:-1].split(" + ")]

        def read(m: Any) -> Value:
            total = 0
            for term in terms:
                x = term(m)
                if x is None:
                    return None
                total += x
            return total

        return read

    def _term(self, token: str) -> Read:
        if not token.startswith("#"):
            return self.read(token)
        base = self.allocation(token)
        return lambda m: base

    def step(self, dst: str | None, op: str, rest: str, dma_sizes: Iterator[str], dma_kind: str | None) -> Step | None:
        """The closure of one scalar instruction; None if it changes nothing that matters."""
        if op.startswith("inlined_call_operand"):
            return self._operand(dst, op, rest)
        predicate, otherwise, rest = _split_predicate(rest)
        args = [a for a in re.split(r",\s*(?![^\[]*\])", rest) if a.strip()]
        if op.startswith("dma.done.wait") or op == "swait":
            return self._wait(predicate, args)
        if op.startswith("dma."):
            return self._dma(predicate, op, args, next(dma_sizes, None), dma_kind)
        if op == "sst":
            return self._store(predicate, rest)
        if dst is None or not re.match(r"%(s|p)\d+", dst):
            return None
        return self._arithmetic(predicate, otherwise, dst, op, args)

    def _operand(self, dst: str | None, op: str, rest: str) -> Step | None:
        match = _OPERAND.search(rest)
        if not match:
            return None
        dtype, dims, index = match.group(1), match.group(2), int(match.group(3))
        scalar = "<" in op or "no memory space" in rest
        self.operands[index] = ("scalar" if scalar else op.split(".")[-1], dtype, dims)
        if scalar:
            return lambda m: m.set(dst, m.scalar_operand(index))
        return lambda m: m.set(dst, OPERAND_BASE + (index << OPERAND_BITS))

    def _wait(self, predicate, args: list[str]) -> Step:
        flag = self.read(args[0])
        amount = self.read(args[1]) if len(args) > 1 else lambda m: 0
        return lambda m: m.wait(flag(m), amount(m)) if _holds(m, predicate) else None

    def _dma(self, predicate, op: str, args: list[str], size: str | None, dma_kind: str | None) -> Step:
        granules = self.read(size) if size is not None else lambda m: 0
        reads = [self.read(a) for a in args]
        nothing: Read = lambda m: None
        source, target, flag = reads[0], (reads[2:3] or [nothing])[0], (reads[3:4] or [nothing])[0]
        kind = dma_kind if op == "dma.general" and dma_kind else op[4:]
        return lambda m: m.start_dma(kind, source(m), granules(m), target(m), flag(m)) if _holds(m, predicate) else None

    def _store(self, predicate, rest: str) -> Step | None:
        match = re.match(r"\[smem:(\[[^\]]*\])\]\s*,?\s*(\S+)$", rest.strip())
        if not match:
            self.unknown_ops["sst?"] += 1
            return None
        address, value = self.address(match.group(1)), self.read(match.group(2))

        def store(m: Any) -> None:
            if _holds(m, predicate) and (at := address(m)) is not None:
                m.smem[at] = value(m)

        return store

    def _arithmetic(self, predicate, otherwise: str | None, dst: str, op: str, args: list[str]) -> Step | None:
        name, *suffixes = op.split(".")
        function = _function(name, suffixes, "u32" in op)
        if function is None:
            self.unknown_ops[op] += 1
            return None if name == "scmp" else lambda m: m.set(dst, None)
        reads = [self.read(a) for a in args]

        def run(m: Any) -> None:
            if not _holds(m, predicate):
                if otherwise is not None:
                    m.set(dst, m.registers.get(otherwise))
                return
            xs = [read(m) for read in reads]
            if None in xs:
                m.set(dst, _partly_known(name, xs))
                return
            try:
                m.set(dst, function(*xs))
            except (ArithmeticError, TypeError, ValueError):
                m.set(dst, None)

        return run


def _function(name: str, suffixes: list[str], is_unsigned: bool) -> Callable[..., Any] | None:
    if name != "scmp":
        return (is_unsigned and _UNSIGNED_OPS.get(name)) or _OPS.get(name)
    compare = _COMPARE.get(suffixes[0])
    if compare is None or not is_unsigned:
        return compare
    return lambda x, y: compare(unsigned(x), unsigned(y))


def _partly_known(name: str, xs: list[Value]) -> Value:
    """The result where the known operands decide it."""
    if name == "scalar_select" and xs[0] is not None:
        return xs[1] if xs[0] else xs[2]
    if name == "por" and True in xs:
        return True
    if name == "pand" and False in xs:
        return False
    if name == "pnand" and False in xs:
        return True
    return None


def _split_predicate(rest: str) -> tuple[tuple[str, bool] | None, str | None, str]:
    """((register, negated) or None, register that gives the value otherwise, the rest without them)."""
    first = _PREDICATE_FIRST.match(rest)
    if first:
        return (first.group(2), bool(first.group(1))), first.group(3), rest[first.end() :]
    last = _PREDICATE_LAST.search(rest)
    if last:
        return (last.group(2), bool(last.group(1))), None, rest[: last.start()] + rest[last.end() :]
    return None, None, rest


def _holds(m: Any, predicate: tuple[str, bool] | None) -> bool:
    """An unknown predicate counts as true, and is counted."""
    if predicate is None:
        return True
    value = m.registers.get(predicate[0])
    if value is None:
        m.unknown_decisions += 1
        return True
    return bool(value) != predicate[1]
