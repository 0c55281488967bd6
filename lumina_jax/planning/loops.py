"""How often a loop turns: from the start, the step and the end of the number that it counts with.

The condition of a loop compares an element of the tuple that goes round with a constant. Where that
element starts may be written outside the loop, and its end in a tuple that an outer loop hands on.
"""

import re

from lumina_jax.planning.hlo_text import Frame, Instruction


def trip_count(frame: Frame, loop: Instruction) -> int:
    """The turns of a `while`; a ValueError where they are not in the program."""
    known = loop.find(r'known_trip_count"?[:=]\{"?n"?[:=]"?(\d+)')
    if known:
        return int(known)
    condition = frame.enter(loop, loop.find(r"condition=%?([\w.\-]+)"))
    body = frame.enter(loop, loop.find(r"body=%?([\w.\-]+)"))
    compare = condition.computation.root
    while compare.opcode == "fusion":
        condition = condition.enter(compare, compare.called)
        compare = condition.computation.root
    if compare.opcode == "compare":
        left, right = compare.operands
        direction = compare.find(r"direction=(\w+)")
        mirrored = direction.translate(str.maketrans("LG", "GL"))
        for counter, limit, relation in ((left, right, direction), (right, left, mirrored)):
            index, end = _place(condition, counter), _value(condition, limit)
            if index is None or end is None:
                continue
            first = _element(frame, loop.operands[0], index)
            start = first and _value(*first)
            after = _element(body, body.computation.root.name, index)
            step = after and _offset(*after, index)
            if start is None or not step or relation not in ("LT", "LE", "GT", "GE", "NE"):
                continue
            end += {"LE": 1, "GE": -1}.get(relation, 0)
            return max(0, -(-(end - start) // step))
    raise ValueError(
        f"How often %{loop.name} turns is not in the program ({loop.op_name}): its condition "
        f"%{condition.computation.name} does not compare a counter, of known start and step, "
        f"with a constant. Only loops of a fixed length can be counted."
    )


def _element(frame: Frame, name: str, index: int) -> tuple[Frame, str] | None:
    """Where the element of a tuple was made."""
    instruction = frame.computation.instructions[name]
    if instruction.opcode == "tuple":
        return frame, instruction.operands[index]
    if instruction.opcode in ("opt-barrier", "copy", "bitcast"):
        return _element(frame, instruction.operands[0], index)
    if instruction.opcode == "while":
        # Only what the loop hands on unchanged is known.
        body = frame.enter(instruction, instruction.find(r"body=%?([\w.\-]+)"))
        if _unchanged(body, index):
            return _element(frame, instruction.operands[0], index)
    if instruction.opcode == "parameter" and frame.in_loop and _unchanged(frame, index):
        return _element(frame.caller, frame.call.operands[0], index)
    return None


def _unchanged(frame: Frame, index: int) -> bool:
    body = frame.caller.enter(frame.call, frame.call.find(r"body=%?([\w.\-]+)"))
    after = _element(body, body.computation.root.name, index)
    return after is not None and _place(*after) == index


def _place(frame: Frame, name: str) -> int | None:
    """The index of the loop's tuple that an instruction of its body hands on."""
    instruction = frame.computation.instructions[name]
    if instruction.opcode in ("copy", "bitcast", "copy-done", "copy-start"):
        return _place(frame, instruction.operands[0])
    if instruction.opcode == "parameter" and frame.call and frame.call.opcode == "fusion":
        operand = frame.call.operands[frame.computation.parameter(instruction)]
        return _place(frame.caller, operand)
    if instruction.opcode == "get-tuple-element" and frame.in_loop:
        source = frame.computation.instructions[instruction.operands[0]]
        if source.opcode == "parameter":
            return int(instruction.find(r"index=(\d+)"))
    return None


def _value(frame: Frame, name: str) -> int | None:
    """The integer that an instruction gives, if it is the same in every run of it."""
    instruction = frame.computation.instructions[name]
    match instruction.opcode:
        case "constant":
            found = re.match(r"\((-?\d+)\)", instruction.rest)
            return int(found[1]) if found else None
        case "copy" | "bitcast" | "convert" | "copy-start" | "copy-done":
            return _value(frame, instruction.operands[0])
        case "add" | "subtract" | "multiply":
            left, right = (_value(frame, name) for name in instruction.operands)
            if left is None or right is None:
                return None
            return {"add": left + right, "subtract": left - right, "multiply": left * right}[
                instruction.opcode
            ]
        case "get-tuple-element":
            index = int(instruction.find(r"index=(\d+)"))
            found = _element(frame, instruction.operands[0], index)
            return found and _value(*found)
        case "parameter" if frame.call and frame.call.opcode == "fusion":
            operand = frame.call.operands[frame.computation.parameter(instruction)]
            return _value(frame.caller, operand)
    return None


def _offset(frame: Frame, name: str, index: int) -> int | None:
    """What is added to the element `index` of the loop's tuple."""
    if _place(frame, name) == index:
        return 0
    instruction = frame.computation.instructions[name]
    match instruction.opcode:
        case "copy" | "bitcast":
            return _offset(frame, instruction.operands[0], index)
        case "fusion":
            inner = frame.enter(instruction, instruction.called)
            return _offset(inner, inner.computation.root.name, index)
        case "add" | "subtract":
            left, right = instruction.operands
            sign = 1 if instruction.opcode == "add" else -1
            if instruction.opcode == "add" and _offset(frame, left, index) is None:
                left, right = right, left
            base, added = _offset(frame, left, index), _value(frame, right)
            return None if base is None or added is None else base + sign * added
    return None
