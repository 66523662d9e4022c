"""What a compiled program communicates, read from its HLO text.

`compiled.cost_analysis()` takes a loop's body once and does not name the devices that
exchange. The text of a compiled program has both: which devices form the groups of
a collective, and how often its loops go round.
"""

import dataclasses
import functools
import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping

import numpy as np

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
_OPERATION = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")
_NAME = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = ")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_OTHER = re.compile(r"\b(?:replica_groups|source_target_pairs)=")
_CALLED = re.compile(
    r"\b(body|condition|calls|to_apply|true_computation|false_computation)"
    r"=%?([\w.-]+)"
)
_BRANCHES = re.compile(r"\b(?:branch_computations|called_computations)=\{(.*?)\}")
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z\d]*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective of a compiled program.

    Args:
      kind: one of `KINDS`.
      bytes: of the whole value that a device exchanges when it runs once: what it
        reduces, what it has gathered, what it scatters.
      groups: the devices that exchange with each other, as positions in the mesh: an
        array `[groups, devices of a group]`, or of a permute `[pairs, 2]`.
      times: how often it runs; at least that often where the text does not say how
        often a loop goes round.
      source: where it comes from in the program, by JAX's name stack.
    """

    kind: str
    bytes: int
    groups: np.ndarray
    times: int
    source: str

    @property
    def sent(self) -> float:
        """Bytes a device sends when it runs once, by the algorithms that send least.

        A ring of n sends (n - 1) / n of the value, and for an all-reduce twice that.
        """
        if self.kind == "collective-permute":
            return self.bytes
        n = self.groups.shape[1]
        return self.bytes * (n - 1) / n * (2 if self.kind == "all-reduce" else 1)

    def axes(self, mesh: Mapping[str, int]) -> tuple[str, ...]:
        """The axes of a mesh, name to size, over which devices exchange."""
        places = np.stack(np.unravel_index(self.groups, (*mesh.values(),)))
        moves = (places != places[..., :1]).any(axis=(1, 2))
        return tuple(name for name, moved in zip(mesh, moves, strict=True) if moved)


def collectives(text: str) -> list[Collective]:
    """The collectives of a compiled program, in the order of its text.

    A collective that waits in several fusions, so that it overlaps with them, is in the
    text once in each, and here once. Of branches each counts as if it were taken.

    Raises:
      ValueError: for a collective of another kind than `KINDS`.
    """
    bodies = _computations(text)
    times = _times(bodies)
    fused = {*re.findall(r" fusion\(.*\bcalls=%?([\w.-]+)", text)}
    found: list[Collective] = []
    seen = set()
    for name, lines in bodies.items():
        for line in lines:
            if not times[name] or not (match := _OPERATION.search(line)):
                if times[name] and _OTHER.search(line) and "-done(" not in line:
                    raise ValueError(f"A collective of no known kind: {line[:500]}")
                continue
            new = _collective(match, line, times[name])
            channel = re.search(r"channel_id=\d+", line)
            copied = channel and (channel[0], new.kind, new.bytes, new.source)
            if name in fused and copied in seen:
                continue
            seen.add(copied if name in fused else None)
            if new.groups.shape[1] > 1:
                found.append(new)
    return found


def _collective(match: re.Match[str], line: str, times: int) -> Collective:
    result, kind, start = match.groups()
    groups = _groups(line)
    arrays = _arrays(result)
    if start and kind != "all-reduce":
        # Operands, as many results, and maybe words of state.
        while len(arrays) > 2 and not arrays[-1][1]:
            arrays.pop()
        arrays = arrays[len(arrays) // 2 :]
    size = sum(math.prod(shape) * bits for bits, shape in arrays) // 8
    if kind == "reduce-scatter":
        size *= groups.shape[1]
    source = re.search(r'op_name="(.*?)"', line)
    return Collective(kind, size, groups, times, source[1] if source else "")


def _arrays(types: str) -> list[tuple[int, tuple[int, ...]]]:
    """Bits of an entry, and shape, of all arrays that a type names."""
    found = []
    for dtype, dims in _ARRAY.findall(types):
        bits = re.search(r"\d+", dtype)  # s32, bf16, f8e4m3fn: all but pred have it.
        found.append(
            (
                int(bits[0]) if bits else 8,
                tuple(map(int, filter(None, dims.split(",")))),
            )
        )
    return found


#
# Groups, in the four ways that XLA writes them.
#
def _groups(line: str) -> np.ndarray:
    if listed := re.search(
        r"(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}(?:,|$|\s)", line
    ):
        groups = re.findall(r"\{([\d,]+)\}", listed[1])
        return np.array([_numbers(group) for group in groups])
    if iota := re.search(
        r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line
    ):
        shape, dims, order = map(_numbers, iota.groups())
        return _iota(dims, order).reshape(shape)
    if mesh := re.search(r"replica_groups=mesh\[(.*?)\](.*?) \{(.*?)\}", line):
        return _of_mesh(*mesh.groups())
    raise ValueError(f"No groups of devices are in this line of HLO: {line[:500]}")


def _numbers(text: str | None) -> list[int]:
    return [*map(int, text.split(","))] if text else []


def _iota(dims: list[int], order: list[int]) -> np.ndarray:
    """Of `[4,2]T(1,0)`: 0 to 7 as 4 x 2, transposed."""
    ids = np.arange(math.prod(dims)).reshape(dims)
    return ids.transpose(order or [*range(len(dims))])


def _of_mesh(axes: str, devices: str, grouped: str) -> np.ndarray:
    """Of `mesh['a'=8,'b'=2] {'b'}`; `'a':(2)4` is the middle of `'a'` as 2 x 4 x 1.

    The devices may be in another order: `mesh['b'=2], device_ids=(1,0) {'b'}`.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'(.*?)'=(\d+)", axes)}
    parts = {name: {1, size} for name, size in sizes.items()}
    wanted = []
    for name, low, size in re.findall(r"'(.*?)'(?::\((\d+)\)(\d+))?(?:,|$)", grouped):
        start, size = (int(low), int(size)) if size else (1, sizes[name])
        parts[name] |= {start, start * size}
        wanted.append((name, start, start * size))
    dims, members = [], []
    for name, cuts in parts.items():
        for low, high in itertools.pairwise(sorted(cuts)):
            if any(n == name and a <= low and high <= b for n, a, b in wanted):
                members.append(len(dims))
            dims.append(high // low)
    ids = np.arange(math.prod(dims))
    if order := re.search(r"device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\)", devices):
        ids = _iota(*map(_numbers, order.groups()))
    elif order := re.search(r"device_ids=\(([\d,]+)\)", devices):
        ids = np.array(_numbers(order[1]))
    ids = np.moveaxis(ids.reshape(dims), members, range(-len(members), 0))
    return ids.reshape(-1, math.prod(dims[i] for i in members))


#
# How often each computation runs.
#
def _computations(text: str) -> dict[str, list[str]]:
    """The lines of each computation of a module; that of the entry is called ''."""
    bodies: dict[str, list[str]] = {}
    name = None
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            name = "" if header[1] else header[2]
            bodies[name] = []
        elif name is not None and line.startswith(" "):
            bodies[name].append(line)
    return bodies


def _times(bodies: dict[str, list[str]]) -> Mapping[str, int]:
    """How often each computation runs, from the callers down."""
    callers: dict[str, Counter[str]] = defaultdict(Counter)
    for caller, lines in bodies.items():
        for line in lines:
            for called, trips in _calls(line, lines, bodies):
                callers[called][caller] += trips

    @functools.cache
    def times(name: str) -> int:
        if not name:
            return 1
        return sum(n * times(caller) for caller, n in callers[name].items())

    return {name: times(name) for name in bodies}


def _calls(
    line: str, lines: list[str], bodies: dict[str, list[str]]
) -> Iterator[tuple[str, int]]:
    for how, called in _CALLED.findall(line):
        trips = _trips(line, lines, bodies) if how in ("body", "condition") else 1
        yield called, trips + (how == "condition")
    for branches in _BRANCHES.findall(line):
        for called in branches.split(","):
            yield called.strip().lstrip("%"), 1


def _trips(line: str, lines: list[str], bodies: dict[str, list[str]]) -> int:
    """How often a `while` goes round; 1 where the text does not say.

    Either XLA has noted it, or the condition compares a counter with a constant.
    Counters go up by one, as JAX's do.
    """
    if known := re.search(r'known_trip_count"?:\{"n":"(\d+)"', line):
        return int(known[1])
    condition = re.search(r"\bcondition=%?([\w.-]+)", line)
    test = bodies[condition[1]] if condition else []
    root = next((row for row in test if row.lstrip().startswith("ROOT ")), "")
    compared = re.search(r"compare\(%?([\w.-]+), %?([\w.-]+)\), direction=LT", root)
    if not compared:
        return 1
    limit = _constant(compared[2], test)
    index = re.search(r"index=(\d+)", _definition(compared[1], test))
    return (
        1
        if limit is None or not index
        else max(limit - _first(line, index[1], lines), 1)
    )


def _first(line: str, index: str, lines: list[str]) -> int:
    """With what a `while` starts at an index of its tuple; 0 if not a constant."""
    argument = re.search(r" while\(%?([\w.-]+)\)", line)
    made = _definition(argument[1], lines) if argument else ""
    operands = re.search(r" tuple\((.*?)\)", made)
    if not operands:
        return 0
    names = re.sub(r"/\*.*?\*/", "", operands[1]).split(",")
    start = _constant(names[int(index)].strip().lstrip("%"), lines)
    return start or 0


def _definition(name: str, lines: list[str]) -> str:
    return next((row for row in lines if (m := _NAME.match(row)) and m[1] == name), "")


def _constant(name: str, lines: list[str]) -> int | None:
    found = re.search(r" constant\((-?\d+)\)", _definition(name, lines))
    return int(found[1]) if found else None
