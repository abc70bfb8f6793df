"""The traffic of a compiled program, read from its HLO text: collectives, and bytes to and from memory.

XLA's own cost analysis counts the body of a loop once. Here it counts as often as it runs: by `known_trip_count`, where
the text has one, else up to the constant that the loop's counter is compared with. So a loop that may end early, such
as sampling's, counts its longest run. Every branch of a conditional counts.
"""

import dataclasses
import functools
import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator

COLLECTIVES = "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"
_FREE = {  # opcodes that move nothing by themselves
    *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call", "after-all"),
    *("partition-id", "replica-id", "optimization-barrier", "async-update", "add-dependency"),
}
_SLICES = "dynamic-slice", "slice", "gather"
_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([\d,]*)\](?:\{[^{}]*?(?:S\((\d+)\))?\})?")
_SPACES = {None: "device", "0": "device", "5": "host"}  # memory spaces; an array in any other lies on the chip itself


@dataclasses.dataclass(frozen=True)
class Instruction:
    """An instruction of a computation, which is one line of the text."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]  # names
    attributes: str
    literal: str  # the text between the parentheses: the value of a constant, the number of a parameter

    def called(self, key: str) -> str | None:
        """The name of the computation in an attribute such as `body`."""
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else None


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, in order; the last one is the root."""

    instructions: dict[str, Instruction]
    root: Instruction

    @functools.cached_property
    def parameters(self) -> list[str]:
        """The names of the parameters, in order."""
        found = [(int(i.literal), i.name) for i in self.instructions.values() if i.opcode == "parameter"]
        return [name for _, name in sorted(found)]

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """The instructions that have an instruction as an operand, by its name."""
        found: dict[str, list[Instruction]] = {}
        for instruction in self.instructions.values():
            for name in dict.fromkeys(instruction.operands):
                found.setdefault(name, []).append(instruction)
        return found


@dataclasses.dataclass(frozen=True)
class Traffic:
    """The traffic of one device in a run of the program."""

    collectives: dict[str, float]  # bytes by kind: of the result, or of a reduce-scatter's operands
    counts: dict[str, int]  # the number of collectives of each kind
    waits: dict[str, float]  # the bytes of those that the device does nothing beside: they neither start nor end apart
    sent: float  # bytes that a device sends to others, on a ring
    memory: float  # bytes read from and written to its memory, once for each instruction that uses them
    host: float  # the same for the host's memory


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """The computations of a module by name, and the name of its entry."""
    computations: dict[str, Computation] = {}
    lines: dict[str, Instruction] = {}
    entry, name, root = "", "", None
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line):
            name, lines, root = header[2], {}, None
            entry = name if header[1] else entry
        elif line.startswith("}") and root is not None:
            computations[name] = Computation(lines, root)
        elif (found := _instruction(line)) is not None:
            lines[found.name] = found
            root = found if root is None or line.lstrip().startswith("ROOT ") else root
    return computations, entry


def _instruction(line: str) -> Instruction | None:
    start = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line)
    if start is None:
        return None
    rest = line[start.end() :]
    split = _closing_index(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    opcode, shape, rest = rest[split:].lstrip().split("(", 1)[0], rest[:split], rest[split:].lstrip()
    stop = _closing_index(rest, len(opcode))
    inside = rest[len(opcode) + 1 : stop]
    return Instruction(start[1], shape, opcode, tuple(re.findall(r"%([\w.\-]+)", inside)), rest[stop + 1 :], inside)


def _closing_index(text: str, start: int) -> int:
    """The index at which the parenthesis closes that opens at `start`."""
    depth = 0
    for parenthesis in re.compile(r"[()]").finditer(text, start):
        depth += 1 if parenthesis[0] == "(" else -1
        if depth == 0:
            return parenthesis.start()
    raise ValueError(f"unbalanced parentheses: {text[:80]}")


def size(shape: str, space: str | None = None) -> float:
    """The bytes of an array or tuple as HLO writes it, such as `f32[2,3]{1,0}`, without the padding of its layout.

    With a `space`, "device" or "host", only arrays in that memory count.
    """
    arrays = (found.groups() for found in _ARRAY.finditer(shape))
    counted = ((dtype, dims) for dtype, dims, number in arrays if space is None or _SPACES.get(number) == space)
    return sum((_itemsize(dtype) * math.prod(int(n) for n in dims.split(",") if n) for dtype, dims in counted), 0.0)


def _itemsize(dtype: str) -> float:
    bits = re.search(r"\d+", dtype)
    return 1.0 if dtype == "pred" else int(bits[0]) / 8 if bits else 0.0  # a token has none


def traffic(text: str) -> Traffic:
    """The traffic of a compiled program, from its HLO text."""
    computations, entry = parse(text)
    counts = Counter[str]()
    payloads, waits, moved = (defaultdict[str, float](float) for _ in range(3))
    sent, seen = 0.0, set[str]()
    every = (instruction for computation in computations.values() for instruction in computation.instructions.values())
    started = {instruction.called("calls") for instruction in every if instruction.opcode == "async-start"}
    for name, times, fused in _walk(computations, entry):
        computation = computations[name]
        for instruction in computation.instructions.values():
            kind = instruction.opcode.removesuffix("-start")
            if kind == "all-reduce" and name.startswith("all-reduce-scatter"):  # the fusion keeps a part of it
                kind = "reduce-scatter"
            channel = _chained_channel(instruction)
            if kind in COLLECTIVES and channel not in seen:
                seen |= {channel} - {""}
                payload = _payload_bytes(instruction, computation)
                payloads[kind] += times * payload
                counts[kind] += times
                if not (instruction.opcode.endswith("-start") or channel or name in started):
                    waits[kind] += times * payload
                sent += times * payload * _sent_share(kind, _group_size(instruction.attributes))
                if channel:
                    shapes = [instruction.shape, *(computation.instructions[x].shape for x in instruction.operands)]
                    moved["device"] += times * sum(size(shape, "device") for shape in shapes)
            if not fused:
                for space in ("device", "host"):
                    moved[space] += times * _moved_bytes(instruction, computation, computations, space)
    return Traffic(dict(payloads), dict(counts), dict(waits), sent, moved["device"], moved["host"])


def _chained_channel(instruction: Instruction) -> str:
    """The channel of a collective that several fusions carry out step by step, beside their own work; else ""."""
    found = re.search(r"channel_id=(\d+).*\bchain_id=", instruction.attributes)
    return found[1] if found else ""


def _is_collective_step(instruction: Instruction) -> bool:
    """Whether this is a step of a collective within a fusion, so that its operands and result move no bytes there."""
    return bool(_chained_channel(instruction)) or '"AsyncCollective' in instruction.attributes


def _walk(computations: dict[str, Computation], entry: str) -> Iterator[tuple[str, int, bool]]:
    """Yield each computation that runs, how often, and whether within a fusion; some come more than once."""
    waiting = [(entry, 1, False)]
    while waiting:
        name, times, fused = waiting.pop()
        yield name, times, fused
        for instruction in computations[name].instructions.values():
            match instruction.opcode:
                case "while":
                    trips = _trip_count(instruction, computations[name], computations)
                    waiting.append((instruction.called("body") or "", times * trips, fused))
                case "fusion":
                    waiting.append((instruction.called("calls") or "", times, True))
                case "call" | "async-start":
                    inner = instruction.called("to_apply") or instruction.called("calls") or ""
                    waiting.append((inner, times, fused))
                case "conditional":
                    named = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
                    keys = "true_computation", "false_computation"
                    branches = (
                        re.findall(r"%?([\w.\-]+)", named[1]) if named else [instruction.called(key) for key in keys]
                    )
                    waiting.extend((branch or "", times, fused) for branch in branches)


def _trip_count(loop: Instruction, caller: Computation, computations: dict[str, Computation]) -> int:
    """The most times that a loop runs; 1 where the text does not tell."""
    if known := re.search(r'known_trip_count\D*"?n"?\D*(\d+)', loop.attributes):
        return int(known[1])
    condition = computations[loop.called("condition") or ""]
    bound = _loop_bound(condition, computations)
    if bound is None:
        return 1
    limit, index = bound
    carried = caller.instructions[loop.operands[0]]
    first = _constant(carried.operands[index], caller) if carried.opcode == "tuple" else None
    return max(limit - (first or 0), 0)


def _loop_bound(condition: Computation, computations: dict[str, Computation]) -> tuple[int, int] | None:
    """The constant that an element of the carry must stay below, and the index of that element."""
    for instruction in condition.instructions.values():
        inner, outer = condition, list(instruction.operands)
        compare: Instruction | None = instruction
        if instruction.opcode == "fusion":
            inner = computations[instruction.called("calls") or ""]
            compare = next((i for i in inner.instructions.values() if i.opcode == "compare"), None)
        if compare is None or compare.opcode != "compare" or "direction=LT" not in compare.attributes:
            continue
        resolved = []
        for name in compare.operands:
            if inner is not condition and name in inner.parameters:
                resolved.append((outer[inner.parameters.index(name)], condition))
            else:
                resolved.append((name, inner))
        (counter, counter_home), (limit, limit_home) = resolved
        element, value = counter_home.instructions[counter], _constant(limit, limit_home)
        if element.opcode == "get-tuple-element" and value is not None:
            return value, int(re.search(r"index=(\d+)", element.attributes)[1])  # type: ignore[index]
    return None


def _constant(name: str, computation: Computation) -> int | None:
    """The value of an integer constant, also of a copy of it."""
    instruction = computation.instructions[name]
    while instruction.opcode in ("copy", "bitcast", "copy-done", "copy-start"):
        instruction = computation.instructions[instruction.operands[0]]
    return int(instruction.literal) if re.fullmatch(r"-?\d+", instruction.literal) else None


def _payload_bytes(instruction: Instruction, computation: Computation) -> float:
    """The bytes of a collective's result, or of a reduce-scatter's operands."""
    operands = sum(size(computation.instructions[name].shape) for name in instruction.operands)
    if instruction.opcode.startswith("all-gather"):
        whole = size(instruction.shape)  # the asynchronous one has the operands before the results
        return whole - operands if instruction.opcode.endswith("-start") else whole
    return operands


def _sent_share(kind: str, devices: int) -> float:
    """The bytes that a device sends for each byte of the payload, on a ring of its group."""
    rest = (devices - 1) / devices
    return {"all-reduce": 2 * rest, "collective-permute": 1.0}.get(kind, rest)


def _group_size(attributes: str) -> int:
    """The number of devices in one group of a collective."""
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return found[1].count(",") + 1
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", attributes):
        return int(found[2])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\].*? \{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"('[^']+')=(\d+)", found[1]))
        axes = re.findall(r"('[^']+')(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    return 2  # a permutation has no groups


def _moved_bytes(
    instruction: Instruction, computation: Computation, computations: dict[str, Computation], space: str
) -> float:
    """The bytes of one memory space that an instruction reads and writes."""
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith("-done"):
        return 0.0
    shapes = [computation.instructions[name].shape for name in instruction.operands]
    if opcode == "fusion":
        inner = computations[instruction.called("calls") or ""]
        reads = [
            _read_bytes(inner, parameter, computations) if size(shape, space) else 0.0
            for shape, parameter in zip(shapes, inner.parameters, strict=True)
        ]
        return sum(reads) + _written_bytes(inner, instruction.shape, space)
    result, operands = size(instruction.shape, space), sum((size(shape, space) for shape in shapes), 0.0)
    if opcode.removesuffix("-start") in _SLICES:
        taken = instruction.shape
        if opcode.endswith("-start"):  # its result holds the operand before the slice
            taken = [part[0] for part in _ARRAY.finditer(instruction.shape)][1]
        return size(taken, space) + (size(taken) if size(shapes[0], space) else 0.0)
    if opcode == "dynamic-update-slice":
        return 2 * size(shapes[1]) if result else 0.0
    return max(result, operands) if opcode.endswith("-start") else result + operands  # its result holds the operands


def _read_bytes(computation: Computation, name: str, computations: dict[str, Computation]) -> float:
    """The bytes of an operand that a fusion reads; where it slices the operand, those of the slices."""
    whole = size(computation.instructions[name].shape)
    total = 0.0
    for user in computation.users.get(name, []):
        if user.opcode in _SLICES and user.operands[0] == name:
            total += size(user.shape)
        elif user.opcode == "bitcast" or (user is not computation.root and _is_copy(user, computations)):
            total += _read_bytes(computation, user.name, computations)
        elif (user.opcode == "dynamic-update-slice" and user.operands[0] == name) or user.opcode == "tuple":
            continue  # written in place, or passed on
        elif _is_collective_step(user):
            continue
        elif user.opcode == "fusion":
            inner = computations[user.called("calls") or ""]
            total += sum(
                _read_bytes(inner, parameter, computations)
                for operand, parameter in zip(user.operands, inner.parameters, strict=True)
                if operand == name
            )
        else:
            return whole
    return min(total, whole)


def _is_copy(instruction: Instruction, computations: dict[str, Computation]) -> bool:
    """Whether this copies an array to another layout: within a fusion only what is read of the copy is read."""
    if instruction.opcode != "fusion":
        return instruction.opcode == "copy"
    return computations[instruction.called("calls") or ""].root.opcode == "copy" and len(instruction.operands) == 1


def _written_bytes(computation: Computation, shape: str, space: str) -> float:
    """The bytes that a fusion writes; where it updates a slice in place, those of the slice."""
    roots = [computation.root]
    if computation.root.opcode == "tuple":
        roots = [computation.instructions[name] for name in computation.root.operands]
    parts = _ARRAY.finditer(shape)
    total = 0.0
    for root in roots:
        arrays = list(itertools.islice(parts, len(_ARRAY.findall(root.shape))))
        while root.opcode == "bitcast":
            root = computation.instructions[root.operands[0]]
        if root.opcode == "parameter" or _is_collective_step(root):
            continue
        if root.opcode == "dynamic-update-slice" and size(arrays[0][0], space):
            total += size(computation.instructions[root.operands[1]].shape)
        else:
            total += sum(size(part[0], space) for part in arrays)
    return total
